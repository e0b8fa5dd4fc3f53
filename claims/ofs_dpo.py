"""What OFS-DPO and COFS-DPO claim, and whether it holds here.

A log-linear stream: a pair is a vector x, the margin is theta x with a full vector in place of an
adapter, and two sources, whose true directions have a cosine of -0.3, label 400 pairs each, seen
once. There are 20 streams. Accuracy is that of the signs on 2,000 new pairs of each source. Drift
is the same with language models and adapters: two groups of readers label pairs of the base model,
one after the other.

Theory expects that a module of the second source forgets the first and that the combination keeps
both, close to joint training on shuffled pairs. It does not expect that the chase learns faster
than DPO: in a convex problem its extra push acts as a larger learning rate.

On tuning seeds 100 and 101 COFS-DPO and joint training end close to each other. They name more
objects than DPO on both groups in turn, and please the second group less.

DPO on both groups was also tried on seeds 102 to 104:
1. On all five seeds it pleases the first group less than before the second one came.
2. On three it ended at short captions that please the second group more than before, and OFS-DPO
   ended at nearly the same tastes.
3. On the other two DPO broke down and wrote mostly objects that are not there, as OFS-DPO did on
   one. So training on the second group is not safe at this learning rate, with or without the
   chase.
"""

import torch

from lab.claims import claim
from methods.ofs_dpo import Config, chase, loss, run, stream
from nanomodel import LoRA

D, PAIRS, MEMORY = 20, 400, 40


class Streams:
    """Both sources of S streams at once: pairs x (2, n, S, D), labelled by directions w (2, S, D).

    The difference of features is multiplied by the sign of its label, so the first response is
    chosen."""

    def __init__(self, seeds, n=PAIRS):
        draws = [torch.Generator().manual_seed(seed) for seed in seeds]

        def normal(*shape):
            each = [torch.randn(*shape, generator=rng, dtype=torch.float64) for rng in draws]
            return torch.stack(each, -2)  # (..., S, D)

        unit = torch.nn.functional.normalize
        a, b = unit(normal(1, D), dim=-1), normal(1, D)
        b = unit(b - (a * b).sum(-1, keepdim=True) * a, dim=-1)
        self.w = torch.stack([a, -0.3 * a + (1 - 0.09) ** 0.5 * b]).squeeze(1)  # (2, S, D)
        x = normal(2, n, D)
        p = torch.sigmoid(6 * (x * self.w[:, None]).sum(-1))
        u = torch.stack([torch.rand(2, n, generator=r, dtype=torch.float64) for r in draws], -1)
        self.x = x * torch.where(u < p, 1.0, -1.0)[..., None]
        self.new = normal(2000, D)

    def accuracy(self, theta):
        """How often theta (S, D) agrees with each source on new pairs, (2, S)."""
        ours = torch.einsum("nsd,sd->ns", self.new, theta) > 0
        true = torch.einsum("nsd,csd->cns", self.new, self.w) > 0
        return (ours == true).double().mean(1)


class Item:
    """What the loss reads of a batch."""

    def __init__(self, other, fast):
        self.other, self.fast = other, torch.full_like(other, fast)
        self.mask = torch.ones(len(other), 2, 1, dtype=torch.bool)


def chased(x, cfg, lr, start=None):
    """Two vectors, fast and slow, after one pass over x (n, S, D) by gradient descent: (2, S, D).

    Roles stay. With roles that swap, as they do for some steps where the source changes, mean
    accuracies differ by less than 0.01 (tests/methods/test_ofs_dpo.py)."""
    theta = torch.zeros(2, *x.shape[1:], dtype=torch.float64) if start is None else start.clone()
    theta.requires_grad_()
    rates = torch.tensor([lr, cfg.rho * lr], dtype=torch.float64)[:, None, None]
    for pairs in x:
        m = (theta * pairs).sum(-1)  # (2, S)
        total = 0.0
        for i in (0, 1):
            logps = torch.stack([m[i], torch.zeros_like(m[i])], -1)[..., None]  # (S, 2, 1)
            item = Item(m[1 - i].detach(), 1.0 - i)
            total = total + loss(logps, torch.zeros_like(logps), item, cfg)[0].sum()
        (gradient,) = torch.autograd.grad(total, theta)
        with torch.no_grad():
            theta -= rates * gradient
    return theta.detach()


def log_linear(seeds):
    """{arm: one {accuracy of each source, the smaller one} per stream}."""
    streams, found = Streams(seeds), {}
    for name, alpha in {"dpo": 0.0, "ofs": 0.1}.items():
        cfg = Config(beta=1.0, alpha=alpha)
        one = chased(streams.x[0], cfg, 0.05)
        found[f"{name}, first source"] = one[0]
        found[name] = chased(streams.x[1], cfg, 0.05, one)[0]
        if name == "ofs":
            modules = torch.stack([one[0], chased(streams.x[1], cfg, 0.05)[0]])
    memory = streams.x[:, -MEMORY:].flatten(0, 1)  # (80, S, D)
    shares = torch.linspace(0, 1, 21, dtype=torch.float64)
    mixed = shares[:, None, None] * modules[0] + (1 - shares)[:, None, None] * modules[1]
    margins = torch.einsum("nsd,lsd->lns", memory, mixed)
    best = -torch.nn.functional.logsigmoid(margins).mean(1)  # (21, S)
    found["cofs"] = mixed[best.argmin(0), torch.arange(len(seeds))]
    order = torch.randperm(2 * PAIRS, generator=torch.Generator().manual_seed(0))
    shuffled = streams.x.flatten(0, 1)[order]
    found["joint"] = chased(shuffled, Config(beta=1.0, alpha=0.0), 0.05)[0]
    out = {}
    for name, theta in found.items():
        first, second = streams.accuracy(theta)
        out[f"log-linear, {name}"] = [
            dict(first=a, second=b, least=min(a, b))
            for a, b in zip(first.tolist(), second.tolist())
        ]
    return out


def first_group(lab, cfg):
    """The policy of `run` on a stream after its first group of readers, before the second one."""
    base, steps = lab.base(), lab.steps // 2
    rows = lab.stage("stream", lambda: stream(lab, base, 0, lab.prompts // 2))
    rows = rows[: max(1, steps) * lab.batch_size]
    return LoRA.merged(chase(lab, base, rows, cfg, lab.rng("adapters"), steps))


def on_drift(lab):
    """{arm: one {named, hallucinations, tastes} per seed} of language models on drift."""
    arms = {
        "dpo": (run, Config(alpha=0.0)),
        "cofs": (run, Config(variant="cofs")),
        "joint": (run, Config(alpha=0.0, variant="joint")),
        "ofs": (run, Config()),
        "dpo, first group": (first_group, Config(alpha=0.0)),
    }
    out = {name: [] for name in arms}
    for seed in lab.seeds:
        for name, (train, cfg) in arms.items():

            def measured(seed=seed, train=train, cfg=cfg):
                here = lab.at(world="drift", seed=seed, base_seed=seed, eval_size=500)
                return here.world.measure(train(here, cfg), here)

            out[name].append(lab.stage("drift", measured))
    return out


def measure(lab):
    """Streams of vectors for the accuracy on both sources, language models for both tastes."""
    return log_linear(lab.worlds) | on_drift(lab)


CLAIMS = [
    claim(
        "On a log-linear stream of two sources, the smaller of the two accuracies is higher with "
        "COFS-DPO than with DPO on the first and then the second source",
        "least",
        "log-linear, cofs",
        ">",
        "log-linear, dpo",
        margin=0.05,
        kind="primary",
        world="log-linear, drift",
        matched="pairs, steps",
    ),
    claim(
        "On a log-linear stream, the smaller accuracy is higher with COFS-DPO than with OFS-DPO "
        "through both sources",
        "least",
        "log-linear, cofs",
        ">",
        "log-linear, ofs",
        margin=0.05,
    ),
    claim(
        "On a log-linear stream, DPO forgets: its accuracy on the first source falls while it "
        "learns from the second",
        "first",
        "log-linear, dpo",
        "<",
        "log-linear, dpo, first source",
        margin=0.05,
    ),
    claim(
        "On a log-linear stream, the smaller accuracy is lower with COFS-DPO than with DPO on "
        "shuffled pairs of both sources",
        "least",
        "log-linear, cofs",
        "<",
        "log-linear, joint",
        margin=0.05,
        expect="no effect",
    ),
    claim(
        "On a log-linear stream, OFS-DPO is more accurate than DPO after the first source",
        "first",
        "log-linear, ofs, first source",
        ">",
        "log-linear, dpo, first source",
        margin=0.02,
        expect="no effect",
    ),
    claim(
        "On drift, after both groups of readers, captions please the group that likes them less "
        "more with COFS-DPO than with DPO on the first and then the second group",
        "least_taste",
        "cofs",
        ">",
        "dpo",
        margin=0.2,
    ),
    claim(
        "On drift, captions please the group that likes them less, less with COFS-DPO than with "
        "DPO on shuffled pairs of both groups",
        "least_taste",
        "cofs",
        "<",
        "joint",
        margin=0.2,
        expect="no effect",
    ),
    claim(
        "On drift, captions name more objects of the picture with COFS-DPO than with DPO on the "
        "first and then the second group",
        "named",
        "cofs",
        ">",
        "dpo",
        margin=0.05,
    ),
    claim(
        "On drift, DPO forgets: captions please the first group of readers less after the second "
        "group than before it",
        "taste_1",
        "dpo",
        "<",
        "dpo, first group",
        margin=0.2,
    ),
    claim(
        "On drift, captions please the second group of readers more after DPO on its pairs",
        "taste_2",
        "dpo",
        ">",
        "dpo, first group",
        margin=0.2,
        expect="inconclusive",
    ),
    claim(
        "On drift, after both groups of readers, captions please the group that likes them less "
        "more with OFS-DPO than with DPO",
        "least_taste",
        "ofs",
        ">",
        "dpo",
        margin=0.2,
        expect="inconclusive",
    ),
]
