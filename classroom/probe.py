"""Questions to a student's world: the calls that the grader makes for an assignment of a world.

They run in the process of the submission, in the folder of the handout, and return numbers and
tensors; texts become bytes. What is right is judged elsewhere (classroom/promises.py).
"""

import json
import random

import torch

from lab import Lab, Settings
from lab.settings import world_module
from methods import dpo

FILE = "my_world.py"  # the student's file
MOST = dict(steps=60, prompts=1024, base_steps=300)  # of a short run, whatever the world's recipe


def coded(value):
    """A value as the bytes of its JSON, (n,) uint8; tensors become lists."""
    text = json.dumps(
        value, default=lambda x: x.tolist() if isinstance(x, torch.Tensor) else str(x)
    )
    return torch.tensor(list(text.encode()), dtype=torch.uint8)


def world(state=0):
    """The student's world. state: of the global random numbers, on which nothing may depend."""
    torch.manual_seed(state)
    random.seed(state)
    return world_module(FILE).World()


def prompts(n, seed, state=0):
    """n prompts of a seed -> their number, and the prompts."""
    found = world(state).prompts(n, torch.Generator().manual_seed(seed))
    return len(found), coded(list(found))


def demonstrations(n, seed, state=0):
    """n demonstrations of a seed -> how many rows are right, and the rows.

    A world whose base model is not trained needs none: they are 0 bytes.
    """
    own = world(state)
    if own.pretrain is None:
        return n, torch.zeros(0, dtype=torch.uint8)
    rows = own.demonstrations(n, torch.Generator().manual_seed(seed))
    right = [row["prompt"] is not None and len(row["responses"]) == 1 for row in rows]
    return sum(right) if len(rows) == n else -1, coded(rows)


def responses(lab, seed):
    """Prompts and what an untrained model answers to them, as the reward takes them."""
    asked = lab.world.prompts(8, lab.rng("prompts", seed))
    rows = lab.sample(lab.base(stage="raw"), asked, 2, lab.rng("sample", seed))
    told = [lab.text(row["prompt"]) for row in rows for _ in row["responses"]]
    if lab.world.kind == "images":
        return told, torch.cat([row["responses"] for row in rows])
    return told, [lab.text(response) for row in rows for response in row["responses"]]


def rewards(seed):
    """Rewards of what an untrained model writes: twice, in another order, and one by one.

    -> four times (n,), and n. TypeError: the reward is not a tensor.
    """
    torch.manual_seed(seed)
    lab = Lab(Settings(world=FILE, device="cpu"), quiet=True)
    told, made = responses(lab, seed)

    def reward(order):
        some = made[order] if isinstance(made, torch.Tensor) else [made[i] for i in order]
        found = lab.world.reward([told[i] for i in order], some)
        if not isinstance(found, torch.Tensor):
            raise TypeError(f"reward returns a {type(found).__name__}, expected a tensor (n,)")
        return found

    n = len(told)
    back = reward(list(range(n))[::-1])
    alone = torch.cat([reward([i]).reshape(-1) for i in range(n)])
    return reward(list(range(n))), reward(list(range(n))), back.flip(0), alone, n


def description():
    """The docstring of the file."""
    return coded(world_module(FILE).__doc__ or "")


def trained():
    """A short run of DPO -> the reward before and after, its deviation, and what look says.

    The deviation is that of the rewards of the base model's samples. look: its numbers (m,), and
    whether all that `explain` returns is text.
    """
    own = world()
    recipe = own.align | dict(base_steps=(own.pretrain or {}).get("steps"))
    few = {name: min(most, recipe[name]) for name, most in MOST.items() if recipe.get(name)}
    lab = Lab(Settings(world=FILE, eval_size=128, device="cpu", **few), quiet=True)
    policy = lab.base()
    before = lab.evaluate(policy)
    asked = lab.world.prompts(64, lab.rng("deviation"))
    rows = lab.sample(policy, asked, 2, lab.rng("deviation of samples"))
    deviation = torch.tensor(lab.truth(rows), dtype=torch.float64).std()
    looks = {}
    for ask in (lab.world.look, lab.world.measure):
        looks |= ask(policy, lab) if ask else {}
    explain = lab.world.explain
    told = not explain or all(isinstance(explain({k: v}), str) for k, v in before.items())
    policy = dpo.run(lab, dpo.Config())
    after = lab.evaluate(policy)
    numbers = torch.tensor([float(value) for value in looks.values()], dtype=torch.float64)
    return float(before["reward"]), float(after["reward"]), float(deviation), told, numbers
