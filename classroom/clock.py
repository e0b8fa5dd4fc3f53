"""Questions to a student's training step: whether it is the shipped one, and how fast it is.

They run in the process of the submission, in the folder of the handout. `trace` also runs in the
grader's process, with the shipped step. Both steps see the same rows and begin with the same
weights. The optimizer is plain SGD, so that equal gradients lead to equal weights.
"""

import copy
import importlib

import torch

from bench import Bench, Settings
from data import collate

ROUNDS, WARM = 30, 6  # timed rounds, and rounds before them
CARD = dict(steps=1, sampling="off", dtype="float32")
CPU = dict(layers=2, dim=64, vocab=400, prompt=16, response=16, batch_size=8)
SHIPPED = "classroom.step"


def bench(seed):
    """The Bench whose rows and models are used, on a card where there is one."""
    size = {} if torch.cuda.is_available() else CPU
    made = Bench(Settings(**CARD | size))
    torch.manual_seed(seed)
    return made


def batches(made, seed):
    """The batches of a Bench in an order of this seed, with random log-probs of a reference."""
    rng, found = torch.Generator().manual_seed(seed), []
    for i in torch.randperm(4, generator=rng).tolist():
        batch = collate(made.pick(made.rows, i), made.tokenizer).to(made.device)
        noise = torch.rand(batch.mask.shape, generator=rng).to(made.device)
        found.append((batch, -(5 + noise) * batch.mask))
    return found


def contender(made, name, model):
    """(step, model): the step of a module for a copy of a model."""
    model = copy.deepcopy(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    make_step = importlib.import_module(name).make_step
    return make_step(model, optimizer, made.loss, made.cfg), model


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()]).cpu()


def trace(name, seed):
    """Four steps of a module's step -> the losses (4,) and the change of all weights (n,)."""
    made = bench(seed)
    start = made.gpt()
    step, model = contender(made, name, start)
    losses = [step(*item).float().reshape(()).cpu() for item in batches(made, seed)]
    return torch.stack(losses), flat(model) - flat(start)


def race(name, seed):
    """The shipped step and a module's step in turns, in one process.

    -> seconds (ROUNDS, 2), losses (ROUNDS, 2), the changes of all weights (2, n), and whether it
    was on a card.
    """
    made = bench(seed)
    start = made.gpt()
    both = [contender(made, who, start) for who in (SHIPPED, name)]
    items, seconds, losses = batches(made, seed), [], []
    for i in range(WARM + ROUNDS):
        item, times, values = items[i % 4], [0.0, 0.0], [0.0, 0.0]
        for who in (0, 1) if i % 2 else (1, 0):  # nobody is always the first
            begin = made.now()
            value = both[who][0](*item)
            times[who] = made.now() - begin
            values[who] = float(value)
        seconds.append(times)
        losses.append(values)
    moved = torch.stack([flat(model) - flat(start) for _, model in both])
    seconds, losses = (torch.tensor(x, dtype=torch.float64)[WARM:] for x in (seconds, losses))
    return seconds, losses, moved, made.cuda
