"""What the paper claims about its three stages, and whether it holds here.

On captions the teacher is the base model, which hallucinates in more than half of its captions, and
the student is narrower. D2D distils it, D2S makes it sparse, and the last stage aligns it with the
teacher as the reference, on pairs that the teacher wrote. Beside it stand the usual reference (the
sparse student itself), paired KTO, and students that only imitate the data or stay dense. A
hallucination is an object that is named and not on the picture.

On tables of 16 prompts and 8 answers, whose optimum is known in closed form, the teacher favors two
answers, right or wrong. On vectors, four networks are distilled into one student, whose sparse
layer is compared with a dense one after equal steps.

Captions were tried on tuning seed 100, with 100 steps of the last stage:
1. With these settings hallucinations fall and the reward rises, with either reference.
2. At a smaller beta and a larger learning rate they fall more, but a third of the captions breaks
   the grammar and the reward falls.
3. In an earlier trial a sparse student was no closer to the teacher, so no effect is expected.

Tables and tasks were tried on tuning seeds 100 and 101. On both, paired KTO hallucinated less than
DPO, by about one caption in ten, but at several times the KL from the teacher, and named fewer
objects.
"""

import copy

import torch
import torch.nn.functional as F
from torch import nn

from lab.claims import claim
from methods import llava_mod
from methods.llava_mod import Config, Mixture, distill, fresh, mimic, upcycle

ARMS = {
    "MoD": Config(),
    "own start as reference": Config(anchor="student"),
    "KTO": Config(variant="kto_pair"),
}


def captions(lab, seed):
    """{stage: its hallucinations (chair_s), named objects and KL from the teacher} of one seed."""
    where = dict(world="captions", seed=seed, base_seed=seed, steps=lab.few(200))
    inside = lab.at(**where, lr=3e-4, batch_size=64, eval_every=200)
    world, teacher = inside.world, inside.base().requires_grad_(False)
    rows = inside.rows(world.demonstrations(inside.few(512), inside.rng("held out")))
    held = inside.collate(rows)

    def seen(model):
        model.eval()
        with torch.no_grad():
            kl = mimic(teacher.logits(held), model.logits(held), held.mask).item()
        prompts = world.prompts(inside.few(1000), inside.rng("prompts"))
        rows = inside.sample(model, prompts, 1, inside.rng("samples"))
        parts = [world.parts(row["prompt"], row["responses"][0]) for row in rows]
        reward = sum(x for (x,) in inside.truth(rows)) / len(rows)
        wrong = sum(part["hallucinated"] > 0 for part in parts) / len(rows)
        named = sum(part["named"] for part in parts) / len(rows)
        return {"chair_s": wrong, "named": named, "reward": reward, "KL": kl}

    def imitate(student):
        n = min(16384, 64 * inside.few(700))
        demonstrations = world.demonstrations(n, inside.rng("demonstrations"))
        batches = inside.batches(inside.rows(demonstrations), 64)

        def nll(model, batch):
            return -model.logps(batch).sum() / batch.mask.sum(), {}

        return inside.fit(student, batches, nll, steps=inside.few(700), lr=5e-3, decay=True)

    found = {"teacher": seen(teacher)}
    first = fresh(inside, teacher, 64)
    found["SFT"] = seen(imitate(copy.deepcopy(first)))
    dense = distill(inside, first, teacher, inside.few(700))
    found["D2D"] = seen(dense)
    with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
        torch.manual_seed(seed)
        sparse = upcycle(copy.deepcopy(dense), Config())
    sparse = distill(inside, sparse, teacher, inside.few(300), sparse=True)
    found["D2S"] = seen(sparse)
    longer = distill(inside, dense, teacher, inside.few(300), sparse=True)
    found["dense"] = seen(longer)
    data = inside.preferences(teacher, k=2)
    for name, cfg in ARMS.items():
        reference = teacher if cfg.anchor == "teacher" else "start"
        student = copy.deepcopy(sparse).train()
        found[name] = seen(inside.align(student, data, llava_mod.loss, cfg, reference=reference))
    return found


def table(lab, seed, beta=0.5):
    """{arm: mass of false answers} where the optimum is known: pi_T exp(R / beta) / Z."""
    rng = lab.at(seed=seed).rng("table")
    truth = (torch.rand(16, 8, generator=rng) < 0.5).double()
    truth[:, 0] = 1.0
    bias = torch.tensor([0.0] * 6 + [1.8] * 2).double()
    noise = torch.randn(16, 8, generator=rng, dtype=torch.float64)
    teacher = (0.5 * noise + 1.5 * truth + bias).log_softmax(1)

    def wrong(logps):
        return {"false": (logps.exp() * (1 - truth)).sum(1).mean().item()}

    best = (teacher + 2 * truth / beta).log_softmax(1)
    found = {"teacher, table": wrong(teacher), "closed form, table": wrong(best)}
    flat = torch.zeros(16, 8).double().log_softmax(1)
    starts = {
        "MoD, table": (teacher, teacher),
        "own start, table": (flat, flat),
        "unlike the teacher, table": (flat, teacher),
    }
    for name, (start, reference) in starts.items():
        logits = start.clone().requires_grad_()
        optimizer = torch.optim.Adam([logits], lr=0.02)
        cfg = Config(beta=beta)
        for _ in range(lab.few(1000)):
            s = torch.randint(16, (512,), generator=rng)
            y = torch.multinomial(teacher.exp()[s], 2, replacement=True, generator=rng)  # (512, 2)
            gap = 2 * (truth[s, y[:, 0]] - truth[s, y[:, 1]])
            flip = torch.rand(512, generator=rng) > torch.sigmoid(gap)
            y = torch.where(flip[:, None], y.flip(1), y)
            logps = logits.log_softmax(1)[s[:, None], y][..., None]
            batch = Pairs(torch.ones(512, 2, 1, dtype=torch.bool))
            losses, _ = llava_mod.loss(logps, reference[s[:, None], y][..., None], batch, cfg)
            optimizer.zero_grad()
            losses.mean().backward()
            optimizer.step()
        learned = logits.detach().log_softmax(1)
        kl = (learned.exp() * (learned - best)).sum(1).mean().item()
        found[name] = wrong(learned) | {"KL": kl}
    return found


class Pairs:
    """What the loss reads of a batch."""

    def __init__(self, mask):
        self.mask = mask


def tasks(lab, seed, steps=(600, 900)):
    """{arm: KL from the teachers} of a student of four tasks, sparse or dense after D2D."""
    rng = lab.at(seed=seed).rng("tasks")
    first, last = (torch.randn(4, *shape, generator=rng) for shape in ((20, 64), (64, 12)))

    def draw(n):
        z, task = torch.randn(n, 20, generator=rng), torch.randint(4, (n,), generator=rng)
        hidden = torch.einsum("nd,ndh->nh", z, first[task] / 20**0.5).tanh()
        target = torch.einsum("nh,nho->no", hidden, last[task] / 4)
        return torch.cat([z, F.one_hot(task, 4).float()], 1), target

    def train(body, head, steps):
        weights = [*body.parameters(), *head.parameters()]
        optimizer = torch.optim.Adam(weights, lr=3e-3)
        for step in range(lab.few(steps)):
            optimizer.param_groups[0]["lr"] = 3e-3 * (1 - step / steps)
            x, target = draw(128)
            kl = mimic(target, head(x + body(x)), torch.ones(128, dtype=torch.bool))
            optimizer.zero_grad()
            kl.backward()
            optimizer.step()
        return body, head

    with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
        torch.manual_seed(seed)
        body = nn.Sequential(nn.Linear(24, 16), nn.ReLU(), nn.Linear(16, 24))
        body, head = train(body, nn.Linear(24, 12), steps[0])
        sparse = Mixture(body, 24, 4, 2, 0.01)
    arms = {"dense, tasks": body, "sparse, tasks": sparse}
    arms = {
        name: train(copy.deepcopy(b), copy.deepcopy(head), steps[1]) for name, b in arms.items()
    }
    x, target = draw(5000)
    with torch.no_grad():
        every = torch.ones(5000, dtype=torch.bool)
        return {
            name: {"KL": mimic(target, head(x + body.eval()(x)), every).item()}
            for name, (body, head) in arms.items()
        }


def measure(lab):
    """{series: numbers of a stage or an arm, one dict per seed}."""
    series = {}
    for name, function in dict(captions=captions, table=table, tasks=tasks).items():
        found = [lab.stage(name, lambda seed=s, f=function: f(lab, seed)) for s in lab.seeds]
        series |= {arm: [each[arm] for each in found] for arm in found[0]}
    return series


def report(lab, series):
    """The mean of every number, a row per stage and arm."""
    from lab.report import rows_of

    rows = {
        name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        for name, rows in series.items()
    }
    return {"stages.txt": rows_of(rows)}


CLAIMS = [
    claim(
        "On captions, the student that is aligned with its teacher as the reference hallucinates "
        "in fewer captions than its teacher",
        "chair_s",
        "MoD",
        "<",
        "teacher",
        margin=0.05,
        kind="primary",
        world="captions",
        matched="prompts",
    ),
    claim(
        "On captions, the reference matters: with the teacher as the reference the student "
        "hallucinates less than with its own start as the reference",
        "chair_s",
        "MoD",
        "<",
        "own start as reference",
        margin=0.03,
        expect="no effect",
    ),
    claim(
        "On captions, the loss matters: with DPO the student hallucinates less than with paired "
        "KTO, in as many steps on the same pairs",
        "chair_s",
        "MoD",
        "<",
        "KTO",
        margin=0.03,
        expect="reversed",
    ),
    claim(
        "On captions, mimicry copies the error: after D2D the student hallucinates as often as its "
        "teacher",
        "chair_s",
        "D2D",
        "<",
        "teacher",
        margin=0.1,
        kind="control",
        expect="no effect",
    ),
    claim(
        "On captions, distillation of the whole vocabulary comes closer to the teacher than "
        "training on the same captions",
        "KL",
        "D2D",
        "<",
        "SFT",
        margin=0.01,
    ),
    claim(
        "On captions, a sparse student comes closer to the teacher than a dense one, whose weights "
        "are all trained, in as many steps",
        "KL",
        "D2S",
        "<",
        "dense",
        margin=0.005,
        expect="no effect",
    ),
    claim(
        "On four distilled tasks, a sparse student comes closer to its teachers than a dense one "
        "that is distilled for equally many steps",
        "KL",
        "sparse, tasks",
        "<",
        "dense, tasks",
        margin=0.01,
    ),
    claim(
        "On tables, the student that is aligned with its teacher as the reference gives false "
        "answers less often than the teacher",
        "false",
        "MoD, table",
        "<",
        "teacher, table",
        margin=0.05,
    ),
    claim(
        "On tables, it gives them as often as the optimum in closed form",
        "false",
        "MoD, table",
        "<",
        "closed form, table",
        margin=0.001,
        kind="control",
        expect="no effect",
    ),
    claim(
        "On tables, the reference and not the start sets the target: a student that begins unlike "
        "its teacher ends closer to the optimum with the teacher as reference than with its start",
        "KL",
        "unlike the teacher, table",
        "<",
        "own start, table",
        margin=0.05,
    ),
]
