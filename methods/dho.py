"""DHO - Simple (yet Effective) Semi-supervised Knowledge Distillation from Vision-Language Models
via Dual-Head Optimization (2025), arXiv:2505.07675

A student has few labels, many unlabeled inputs, and a frozen teacher that is systematically wrong
on some classes. On one head the gradients of labels and teacher oppose each other. DHO gives a
shared backbone two linear heads, of which one sees only labels and the other only the teacher, and
mixes their probabilities afterwards.

    L = lam CE(h_CE(z), y) + (1 - lam) tau^2 KL(softmax(t / tau) | softmax(h_KD(z) / tau))
    p(x) = alpha softmax(h_CE(z)) + (1 - alpha) softmax(h_KD(z) / beta)

KL is averaged over labeled inputs and over unlabeled ones, and the two means are added.

Differences from the paper
1. The inputs are vectors and the backbone is small; augmentation and initialization from text are
   left out.
2. alpha and beta are searched once, after training, on validation data that are not the test.

    python train.py --method dho                     the cosine of the gradients is below 0 on one
                                                     head; two heads are more accurate
    python train.py --method dho --world pixels      the same on handwritten digits
    python train.py --method dho --shots 2           the search on few labels is noisy
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields

PAPER = Paper(
    "beyond",
    worlds=("vectors",),
    needs="points",
    defaults=dict(world="warped", steps=500, lr=3e-3, batch_size=64),
    core=("distilled", "terms", "mix", "search"),
)
ALPHAS = [i / 20 for i in range(21)]
BETAS = [0.5, 0.75, 1.0, 1.25, 1.5, 2.0, 4.0]


@dataclass(frozen=True)
class Config:
    lam: float = 0.5  # weight of the labels; the teacher's is 1 - lam
    tau: float = 2.0  # temperature of distillation
    alpha: float | None = None  # share of the label head in the mix [searched]
    beta: float | None = None  # temperature of the teacher head in the mix [searched]
    shots: int = 8  # labels per class, and as many for the validation
    n: int = 1500  # unlabeled points, or as many as the world has

    def __post_init__(self):
        check_fields(self, lam="[0, 1]", tau="(0, inf)", alpha="[0, 1]", beta="(0, inf)")
        check_fields(self, shots="[1, inf)", n="[1, inf)")


class DualHead(nn.Module):
    """A backbone with two linear heads; with one=True both heads are the same module."""

    def __init__(self, features, classes, width=64, one=False):
        super().__init__()
        self.body = nn.Sequential(
            nn.Linear(features, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        )
        self.ce = nn.Linear(width, classes)
        self.kd = self.ce if one else nn.Linear(width, classes)

    def forward(self, x):
        """x (n, features) -> logits (n, classes) of the label head and of the teacher head."""
        z = self.body(x)
        return self.ce(z), self.kd(z)


def distilled(logits, teacher, tau):
    """tau^2 KL(teacher | student) at temperature tau, the mean over rows; both (n, classes)."""
    if logits.shape != teacher.shape:
        raise UserError(f"the teacher has logits {tuple(teacher.shape)}, not {tuple(logits.shape)}")
    target = (teacher / tau).log_softmax(1)
    student = (logits / tau).log_softmax(1)
    return tau**2 * (target.exp() * (target - student)).sum(1).mean()


def terms(model, batch, cfg):
    """The two terms of L, without their weights: of the labels and of the teacher.

    batch: labeled x, y and the teacher's logits t; unlabeled u and the teacher's logits v.
    """
    x, y, t, u, v = batch
    ce, kd = model(x)
    labels = F.cross_entropy(ce, y)
    teacher = distilled(kd, t, cfg.tau) + distilled(model(u)[1], v, cfg.tau)
    return labels, teacher


def mix(ce, kd, alpha, beta):
    """Class probabilities (n, classes): a mix of probabilities, not of logits, in float32."""
    if not (0 <= alpha <= 1 and beta > 0):
        raise UserError(f"alpha {alpha}, beta {beta}: expected alpha in [0, 1] and beta above 0")
    wide = torch.promote_types(ce.dtype, torch.float32)
    ce, kd = ce.to(wide), kd.to(wide)
    return alpha * ce.softmax(1) + (1 - alpha) * (kd / beta).softmax(1)


def search(ce, kd, y, alphas, betas):
    """The alpha and beta of the highest accuracy on validation data; the first one of equals."""
    best, chosen = -math.inf, None
    for beta in betas:
        for alpha in alphas:
            right = (mix(ce, kd, alpha, beta).argmax(1) == y).double().mean()
            if right > best:
                best, chosen = right, (alpha, beta)
    return chosen


def run(lab, cfg):
    world = lab.world
    if not world.soft_labels:
        raise UserError(f"{world.name} has no teacher, whose logits dho needs")
    x, y, val, val_y, u = sets(world, cfg, lab.rng("train"))
    test, truth = world.points(3000, lab.rng("test"), held_out=True)
    t, v, top = (world.soft_labels(part) for part in (x, u, test))
    x, val, u, test, t, v = (p.float().to(lab.device) for p in (x, val, u, test, t, v))
    y = y.to(lab.device)

    def batch(step):
        few, many = (
            torch.randint(len(p), (size,), generator=lab.rng(name, step)).to(lab.device)
            for name, p, size in (("few", x, min(24, len(x))), ("many", u, lab.batch_size))
        )
        return x[few], y[few], t[few], u[many], v[many]

    def trained(lam, one=False):
        def objective(model, batch):
            labels, teacher = terms(model, batch, cfg)
            return lam * labels + (1 - lam) * teacher, {}

        def cosine(model, step):  # of the two gradients of the backbone
            params = list(model.body.parameters())
            both = terms(model, batch(step), cfg)
            grads = [torch.autograd.grad(part, params, retain_graph=True) for part in both]
            a, b = (torch.cat([g.flatten() for g in grad]) for grad in grads)
            return {"cosine": F.cosine_similarity(a, b, dim=0).item()}

        with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=lab.rng("weights"))))
            model = DualHead(world.features, world.classes, one=one).to(lab.device)
        return lab.fit(model, batch, objective, watch=cosine)

    def heads(model):
        with torch.no_grad():
            return [[part.cpu() for part in model(p)] for p in (val, test)]

    def row(probs, **others):
        return {"accuracy": (probs.argmax(1) == truth).double().mean().item(), **others}

    def conflict(model):
        looks = [look["cosine"] for look in model.curve]
        return sum(looks) / len(looks)

    labels, teacher = heads(trained(1.0)), heads(trained(0.0))
    single, dual = trained(cfg.lam, one=True), trained(cfg.lam)
    (val_ce, val_kd), (ce, kd) = heads(dual)
    alphas = ALPHAS if cfg.alpha is None else [cfg.alpha]
    alpha, beta = search(val_ce, val_kd, val_y, alphas, BETAS if cfg.beta is None else [cfg.beta])
    table = {
        "labels only": row(labels[1][0]),
        "teacher only": row(teacher[1][1]),
        "one head": row(heads(single)[1][0], cosine=conflict(single)),
        "DHO": row(mix(ce, kd, alpha, beta), cosine=conflict(dual), alpha=alpha, beta=beta),
        "DHO, halves": row(mix(ce, kd, 0.5, 0.5), alpha=0.5, beta=0.5),
        "DHO, label head": row(ce, alpha=1.0),
        "DHO, teacher head": row(kd, alpha=0.0),
        "the teacher": row(top),
    }
    if world.bayes:
        table["Bayes"] = row(world.bayes(test.cpu().double()))
    return table


def sets(world, cfg, rng):
    """`shots` labeled points per class, as many for the validation, and the unlabeled ones.

    No point is in two sets. A world with few points gives fewer than cfg.n unlabeled ones.
    """
    need = 2 * cfg.shots
    x, y = world.points(max(cfg.n, 20 * need * world.classes), rng)
    labeled, val = [], []
    for c in range(world.classes):
        mine = (y == c).nonzero()[:, 0][:need]
        labeled.append(mine[: cfg.shots])
        val.append(mine[cfg.shots :])
    labeled, val = torch.cat(labeled), torch.cat(val)
    few = x[torch.cat([labeled, val])]
    if len(few) < need * world.classes or len(few.unique(dim=0)) < len(few):
        raise UserError(f"--shots {cfg.shots}: {world.name} has fewer points of some class")
    same = x.unique(dim=0, return_inverse=True)[1]  # a world with few points repeats them
    first = torch.full((len(x),), len(x)).scatter_reduce(0, same, torch.arange(len(x)), "amin")
    rest = torch.zeros(len(x), dtype=torch.bool)
    rest[first[first < len(x)]] = True
    rest &= ~torch.isin(same, same[torch.cat([labeled, val])])
    return x[labeled], y[labeled], x[val], y[val], x[rest][: cfg.n]
