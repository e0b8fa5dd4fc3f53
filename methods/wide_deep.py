"""WIDE_DEEP - Wide and Deep Neural Networks Achieve Optimality for Classification (2022),
arXiv:2204.14126

An infinitely wide and deep network classifies like a kernel that depends on the activation phi only
through three numbers of z ~ N(0, 1): A = E phi(z), A' = E phi'(z), B' = E phi'(z)^2, where
E phi(z)^2 = 1. If A is not 0 (and B' at least 1, as here), the classifier is the majority vote; if
A = A' = 0, it is the nearest neighbor. Otherwise it is a vote with a singular kernel, which is
Bayes-consistent in d dimensions if its order is d/2:

    phihat(xi) = E phi(u) phi(v) = sum_k a_k^2 xi^k       u, v normal with correlation xi
    class(x) = sign sum_i y_i kappa(x_i . x),    kappa(xi) = lim phihat^(L)(xi) / A'^(2L)
    kappa(1 - e) ~ e^(-alpha),    alpha = -log A'^2 / log B'

Differences from the paper
1. With several classes, the class with the largest vote wins.
2. A finite network can have a ridge.

    python train.py --method wide_deep                 as accurate as the Hilbert kernel
    python train.py --method wide_deep --variant relu  the majority vote
    python train.py --method wide_deep --variant poly --p 0.1 --degree 3      close to 1-NN
"""

import math
from dataclasses import dataclass

import torch

from data import Paper, UserError, check_fields, fill_variant

PAPER = Paper(
    "beyond",
    worlds=("vectors",),
    needs="points",
    ignores=("steps", "batch_size", "lr", "optimizer", "warmup", "clip", "eval_every", "device"),
    defaults=dict(world="arc"),
    core=("coefficients", "dual", "limit", "kappa", "finite", "votes"),
)
# the activations, with the defaults of the fields that they read
VARIANTS = dict(
    optimal=dict(),  # Hermite polynomials with alpha = d/2
    poly=dict(p=0.5, degree=7),  # sqrt(p) h_1 + sqrt(1 - p) h_degree
    sine=dict(s=2.67607),  # sin(sqrt(s) z), normalized
    square=dict(),  # h_2 = (z^2 - 1) / sqrt(2)
    relu=dict(),
    gelu=dict(),
)
DIGITS = 37.0  # -log of the rounding error of float64
TERMS = 64  # coefficients of an activation that is no polynomial


@dataclass(frozen=True)
class Config:
    variant: str = "optimal"  # the activation, a key of VARIANTS
    d: int = 1  # dimension of the manifold of the points, not of the space around it
    p: float | None = None  # poly: weight of the linear term
    degree: int | None = None  # poly: degree of the other term
    s: float | None = None  # sine: squared frequency
    n: int = 400  # training points
    depth: int = 0  # layers of a finite network; 0 is the limit
    kernel: str = "nngp"  # nngp or ntk, of a finite network
    ridge: float = 0.0  # added to the diagonal, for a finite network

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(self, d="[1, 64]", p="(0, 0.9]", degree="[2, 64]", s="(0, 20]", n="[1, inf)")
        check_fields(self, depth="[0, inf)", kernel=("nngp", "ntk"), ridge="[0, inf)")
        if not self.depth and (self.kernel != "nngp" or self.ridge):
            raise UserError("kernel and ridge do nothing in the limit: give a depth")


def hermite(phi):
    """Coefficients a_k of phi in normalized Hermite polynomials, by quadrature (TERMS,)."""
    import numpy as np

    z, weight = np.polynomial.hermite_e.hermegauss(200)
    weight = weight / weight.sum()
    values, now = phi(torch.from_numpy(z)).numpy(), np.ones_like(z)
    before, found = now, []
    for k in range(TERMS):
        found.append((weight * values * now).sum())
        before, now = now, (z * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    return torch.from_numpy(np.array(found))


def coefficients(cfg):
    """a_k^2 of the activation, (K + 1,) float64, which add up to 1; not for relu."""
    d, p, s = cfg.d, cfg.p, cfg.s
    if cfg.variant == "optimal" and d == 1:
        terms = {1: 0.5, 7: 0.5}
    elif cfg.variant == "optimal":
        p = 2 ** (-d / 2)
        terms = {1: p, 2: 1 - 2 * p, 3: p}
    elif cfg.variant == "poly":
        terms = {1: p, cfg.degree: 1 - p}
    elif cfg.variant == "sine":
        terms = {j: s**j / math.factorial(j) / math.sinh(s) for j in range(1, TERMS, 2)}
    elif cfg.variant == "square":
        terms = {2: 1.0}
    else:
        squares = hermite(torch.nn.functional.gelu).square()
        return squares / squares.sum()
    found = torch.zeros(max(terms) + 1, dtype=torch.float64)
    found[list(terms)] = torch.tensor(list(terms.values()), dtype=torch.float64)
    return found


def activation(z, cfg):
    """phi(z), which has E phi(z)^2 = 1 and coefficients a_k >= 0 where it is a polynomial."""
    if cfg.variant == "relu":
        return math.sqrt(2) * z.clamp(min=0)
    if cfg.variant == "gelu":
        gelu = torch.nn.functional.gelu
        return gelu(z) / hermite(gelu).norm()
    if cfg.variant == "sine":
        return (math.sqrt(cfg.s) * z).sin() / math.sqrt(math.exp(-cfg.s) * math.sinh(cfg.s))
    before, now, total = torch.zeros_like(z), torch.ones_like(z), torch.zeros_like(z)
    for k, square in enumerate(coefficients(cfg).tolist()):
        total = total + math.sqrt(square) * now
        before, now = now, (z * now - math.sqrt(k) * before) / math.sqrt(k + 1)
    return total


def horner(weights, x):
    """sum_k weights_k x^k."""
    total = torch.zeros_like(x)
    for weight in weights.flip(0):
        total = total * x + weight
    return total


def dual(xi, cfg):
    """phihat(xi) and its derivative, for xi in [0, 1]."""
    if cfg.variant == "relu":
        angle = math.pi - xi.clamp(max=1).arccos()
        root = (1 - xi.square()).clamp(min=0).sqrt()
        return (root + xi * angle) / math.pi, angle / math.pi
    weights = coefficients(cfg)
    return horner(weights, xi), horner(weights[1:] * torch.arange(1, len(weights)), xi)


def limit(cfg):
    """The classifier of infinite depth and its order alpha, nan where there is no such kernel."""
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    value, slope = dual(ends, cfg)
    mean, linear, growth = value[0], slope[0], slope[1]  # A^2, A'^2, B'
    if mean > 1e-12:
        return "majority vote", math.nan
    if linear < 1e-12:
        return "1-NN", math.inf
    return "singular kernel", -math.log(linear) / math.log(growth)


def kappa(gap, cfg):
    """The singular kernel kappa(xi) at gap = 1 - xi, 0 < gap <= 1.

    1 - phihat(xi) = (1 - xi) sum_j xi^j sum_{k > j} a_k^2 is computed without cancellation.
    UserError: the limit is another classifier.
    """
    name, alpha = limit(cfg)
    if name != "singular kernel":
        raise UserError(f"the limit of {cfg.variant} is not a singular kernel but the {name}")
    weights = coefficients(cfg)
    tails = weights.flip(0).cumsum(0).flip(0)[1:]  # tails_j = sum_{k > j} a_k^2
    growth = -math.log(weights[1]) / alpha  # log B'
    # layers until every gap has grown to about 1, and then until every xi has vanished
    layers = math.ceil(DIGITS / growth + DIGITS / (alpha * growth))
    total = 1 - gap
    for _ in range(layers):
        xi = 1 - gap
        total = total * horner(weights[1:], xi) / weights[1]  # phihat(xi) / (A'^2 xi)
        gap = gap * horner(tails, xi)
    return total


def tabulated(gap, cfg, cells=4000):
    """`kappa` of many gaps: log(kappa / xi) is interpolated over log gap."""
    low = math.log(1e-16)
    grid = torch.linspace(low, 0, cells + 1, dtype=torch.float64).exp().clamp(max=1 - 1e-9)
    values = (kappa(grid, cfg) / (1 - grid)).log()
    place = (gap.clamp(min=1e-16).log() / -low + 1) * cells
    cell = place.long().clamp(max=cells - 1)
    return (1 - gap) * torch.lerp(values[cell], values[cell + 1], place - cell).exp()


def finite(gap, cfg):
    """The kernel of a network of cfg.depth layers, at xi = 1 - gap."""
    nngp = ntk = 1 - gap
    for _ in range(cfg.depth):
        value, slope = dual(nngp, cfg)
        value, slope = torch.where(gap > 0, value, 1.0), slope  # 1 stays 1, free of rounding
        nngp, ntk = value, value + ntk * slope
    return ntk if cfg.kernel == "ntk" else nngp


def gaps(a, b):
    """1 - a . b of unit vectors a (m, D) and b (n, D) without cancellation, (m, n).

    UserError: they do not lie on the positive part of the unit sphere.
    """
    for x in (a, b):
        if (x < 0).any() or (x.norm(dim=1) - 1).abs().max() > 1e-6:
            raise UserError("the points must lie on the positive part of the unit sphere")
    apart = torch.cdist(a, b, compute_mode="donot_use_mm_for_euclid_dist")
    return apart.square() / 2


def votes(x, y, z, cfg):
    """Votes (m, C) for the classes of z (m, D), from points x (n, D) and one-hot classes y (n, C).

    UserError: the kernel of a finite network is singular or overflows.
    """
    gap = gaps(z, x)
    if cfg.depth:
        square = finite(gaps(x, x), cfg)
        square.diagonal().add_(cfg.ridge)
        if not square.isfinite().all() or torch.linalg.cond(square) > 1e15:
            raise UserError(f"at depth {cfg.depth} the kernel is singular: change depth or ridge")
        return finite(gap, cfg) @ torch.linalg.solve(square, y)
    name, _ = limit(cfg)
    if name == "majority vote":
        return y.sum(0).expand(len(z), -1)
    if name == "1-NN":
        return y[gap.argmin(1)]
    return tabulated(gap, cfg) @ y


def panels(cfg):
    """A Figure: the activations with their default fields by limit, and in bold that of cfg."""
    from matplotlib.figure import Figure

    figure, z = Figure(figsize=(9, 3), layout="constrained"), torch.linspace(-3, 3, 241).double()
    names = "majority vote", "singular kernel", "1-NN"
    axes = dict(zip(names, figure.subplots(1, 3, sharey=True)))
    for variant in VARIANTS:
        ours = variant == cfg.variant
        shown = cfg if ours else Config(variant, d=cfg.d)
        name, alpha = limit(shown)
        label = f"{variant}, alpha {alpha:.2f}" if name == "singular kernel" else variant
        axes[name].plot(z, activation(z, shown), label=label, linewidth=3 if ours else 1)
    for name, ax in axes.items():
        ax.set(title=name, xlabel="z", ylim=(-4, 4))
        ax.legend(fontsize="small")
    axes["majority vote"].set_ylabel("activation phi(z)")
    return figure


def run(lab, cfg):
    x, y = lab.world.points(cfg.n, lab.rng("train"))
    z, truth = lab.world.points(2000, lab.rng("test"), held_out=True)
    x, z = (points / points.norm(dim=1, keepdim=True) for points in (x, z))
    gap, onehot = gaps(z, x), torch.eye(lab.world.classes, dtype=x.dtype)[y]

    def row(found, alpha=None):
        return {"accuracy": (found == truth).double().mean().item(), "alpha": alpha}

    def table():
        _, alpha = limit(cfg)
        alpha = alpha if math.isfinite(alpha) and not cfg.depth else None
        return {
            "wide and deep": row(votes(x, onehot, z, cfg).argmax(1), alpha),
            "Hilbert kernel": row((gap.clamp(min=1e-16) ** (-cfg.d / 2) @ onehot).argmax(1)),
            "1-NN": row(y[gap.argmin(1)]),
            "majority vote": row(onehot.sum(0).argmax()),
            "Bayes": row(lab.world.bayes(z).argmax(1)) if lab.world.bayes else {},
        }

    if not cfg.depth:
        lab.draw("activations", panels(cfg))
    return lab.stage("table", table)
