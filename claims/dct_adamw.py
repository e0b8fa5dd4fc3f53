"""What the paper claims about selected columns of the DCT as a subspace, and whether it holds here.

The same model is trained from scratch with several optimizers, on the same data in the same order,
each at the learning rate that was best for it on tuning seeds (RATES). On reviews it is a language
model, and its held-out loss is compared. On a Markov chain it is a network of two matrices, whose
loss above the entropy rate is exact; the ablations, Trion and Dion are measured there alone.
Moments of all optimizers of low rank have a quarter of the columns. The SVD is taken anew in every
step, with error feedback and rotation, as in LDAdamW; the fixed subset are the first cosines. A
page beside the claims has the size of the states and the time of a step, which no claim compares.

Learning rates were chosen on tuning seeds: on the chain (seeds 100 and 101) from five rates up to
1e-1, each about three times the one before, on reviews (seed 100) from three up to 2e-2, each twice
the one before. At a common small rate, all optimizers of low rank are far behind AdamW on the
chain, and rotation and feedback matter more there. On reviews AdamW and the SVD are worse at 2e-2
than at 1e-2, DCT-AdamW is not. Trion was behind Dion at every rate on the chain.
"""

import functools

import torch
import torch.nn.functional as F

from lab.claims import claim
from methods import dct_adamw
from methods.dct_adamw import DCTAdamW, Matrixwise, Trion, adam, dct

BETAS = (0.9, 0.999)


def columns(A, r, kind):
    """An orthonormal basis (n, r) for the rows of A (R, n): of the SVD, or chosen columns."""
    n = A.shape[1]
    if kind == "svd":  # the eigenvectors of A^T A; the last eigenvalues are the largest
        return torch.linalg.eigh(A.T @ A)[1][:, -r:]
    if kind == "random":
        Q = torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0]
    else:
        Q = torch.eye(n) if kind == "identity" else dct(n)
    if kind == "fixed":
        return Q[:, :r]
    return Q[:, dct_adamw.top_columns(A @ Q, r, "l2")]


class Projected(Matrixwise):
    """AdamW in any subspace, as it is usually written: with a stored basis of each matrix."""

    def __init__(self, params, lr, kind="svd", rank=0.25, feedback=True, rotate=True):
        names = dict(lr=lr, kind=kind, rank=rank, feedback=feedback, rotate=rotate)
        names |= dict(betas=BETAS, eps=1e-8, weight_decay=0.0, largest=32000)
        super().__init__(params, names)

    def update(self, G, state, t, group, wide):
        """See Matrixwise."""
        A = G + state.get("error", 0.0)
        basis = columns(A, max(1, round(group["rank"] * G.shape[1])), group["kind"])
        a, moments, new = A @ basis, state, {"basis": basis}
        if group["feedback"]:
            new["error"] = A - a @ basis.T
        if group["rotate"] and "basis" in state:
            turn = state["basis"].T @ basis
            moments = {"m": state["m"] @ turn, "v": (state["v"] @ turn).abs()}
        update, moments = adam(a, moments, t, group["betas"], group["eps"])
        return update @ basis.T, new | moments


class Dion(Matrixwise):
    """Dion, of which Trion replaces the power iteration and the QR by the selection."""

    def __init__(self, params, lr, rank=0.25, mu=0.95):
        names = dict(lr=lr, rank=rank, mu=mu, largest=32000)
        super().__init__(params, names | dict(betas=(0.9, 0.95), eps=1e-10, weight_decay=0.0))

    def update(self, G, state, t, group, wide):
        """See Matrixwise."""
        n = G.shape[1]
        B, V = G + state.get("M", 0.0), state.get("V")
        if V is None:
            rng = torch.Generator().manual_seed(n)
            V = torch.randn(n, max(1, round(group["rank"] * n)), generator=rng)
        P = torch.linalg.qr(B @ V)[0]
        found = B.T @ P  # (n, r)
        V = found / (found.norm(dim=0) + 1e-8)
        update = P @ V.T * (1.0 if wide else (G.shape[0] / n) ** 0.5)
        return update, {"M": B - (1 - group["mu"]) * P @ found.T, "V": V}


def adamw(params, lr):
    """AdamW with the paper's betas."""
    return torch.optim.AdamW(params, lr=lr, betas=BETAS, weight_decay=0.0)


part = functools.partial
ARMS = {
    "AdamW": adamw,
    "DCT": DCTAdamW,
    "SVD": part(Projected, kind="svd"),
    "fixed": part(Projected, kind="fixed"),
    "no feedback": part(DCTAdamW, feedback=False),
    "no rotation": part(DCTAdamW, rotate=False),
    "identity": part(Projected, kind="identity"),
    "random": part(Projected, kind="random"),
    "full rank": part(DCTAdamW, rank=1.0),
    "Trion": Trion,
    "Dion": Dion,
}
REVIEWS = ("AdamW", "DCT", "SVD", "fixed")
RATES = {  # the best on tuning seeds: on reviews, where it is measured, and on the chain
    "AdamW": (1e-2, 3e-2),
    "DCT": (2e-2, 3e-2),
    "SVD": (1e-2, 3e-2),
    "fixed": (1e-2, 1e-1),
    "no feedback": (None, 3e-2),
    "no rotation": (None, 1e-1),
    "identity": (None, 3e-2),
    "random": (None, 3e-2),
    "full rank": (None, 3e-2),
    "Trion": (None, 1e-1),
    "Dion": (None, 3e-2),
}


def reviews(lab, seed, rates=None):
    """{arm: loss, state and time} of one seed on reviews."""
    where = dict(world="reviews", seed=seed, base_seed=seed, steps=lab.few(300), batch_size=64)
    inside = lab.at(**where, eval_every=300)
    rates = rates or {name: RATES[name][0] for name in REVIEWS}
    arms = {name: part(ARMS[name], lr=lr) for name, lr in rates.items()}
    return dct_adamw.compare(inside, arms)


def chain(lab, seed, name, lr, steps=400, states=32, hidden=64, size=128):
    """The exact loss above the entropy rate on a Markov chain, at the end of a training."""
    rng = lab.at(seed=seed).rng("chain")

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    P = (2.5 * normal(states, states)).softmax(1)
    share = torch.linalg.matrix_power(P.double(), 1000)[0].float()  # the stationary distribution
    code = normal(states, states)  # frozen embeddings
    weights = [normal(states, hidden) / states**0.5, normal(hidden, states) / hidden**0.5]
    weights = [w.requires_grad_() for w in weights]
    optimizer, steps = ARMS[name](weights, lr=lr), lab.few(steps)

    def logits(x):
        return (code[x] @ weights[0]).relu() @ weights[1]

    for step in range(steps):
        x = torch.multinomial(share, size, replacement=True, generator=rng)
        y = torch.multinomial(P[x], 1, generator=rng)[:, 0]
        for group in optimizer.param_groups:
            group["lr"] = lr * (1 - step / steps)
        optimizer.zero_grad()
        F.cross_entropy(logits(x), y).backward()
        optimizer.step()
    with torch.no_grad():
        learned = logits(torch.arange(states)).log_softmax(1)
    return (share[:, None] * P * (P.log() - learned)).sum().item()


def measure(lab):
    """{series: loss, state and time of an arm on reviews, or its loss on the chain, per seed}."""
    found = [lab.stage("reviews", part(reviews, lab, seed)) for seed in lab.seeds]
    series = {name: [each[name] for each in found] for name in REVIEWS}
    for name in ARMS:
        chains = [part(chain, lab, seed, name, RATES[name][1]) for seed in lab.seeds]
        series[f"{name}, chain"] = [{"loss": lab.stage("chain", each)} for each in chains]
    return series


def report(lab, series):
    """The mean of every number, a row per optimizer and world."""
    from lab.report import rows_of

    rows = {
        name: {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        for name, rows in series.items()
    }
    return {"optimizers.txt": rows_of(rows)}


ON = "On reviews, each optimizer at its own learning rate,"
CHAIN = "On the Markov chain, each optimizer at its own learning rate,"
CLAIMS = [
    claim(
        f"{ON} DCT-AdamW has a lower held-out loss than AdamW in the subspace of the SVD, which is "
        "computed in every step",
        "loss",
        "DCT",
        "<",
        "SVD",
        margin=0.02,
        kind="primary",
        world="reviews",
        matched="steps, rank and data",
    ),
    claim(
        f"{ON} DCT-AdamW has a lower held-out loss than AdamW",
        "loss",
        "DCT",
        "<",
        "AdamW",
        margin=0.02,
    ),
    claim(
        f"{CHAIN} Trion ends at a lower loss than Dion",
        "loss",
        "Trion, chain",
        "<",
        "Dion, chain",
        margin=0.01,
        expect="reversed",
    ),
]
for words, ours, baseline in (
    ("columns that are selected anew beat a fixed subset", "DCT", "fixed"),
    ("error feedback lowers the loss", "DCT", "no feedback"),
    ("the loss is lower if the moments are rotated to new columns", "DCT", "no rotation"),
):
    CLAIMS.append(
        claim(f"{CHAIN} {words}", "loss", f"{ours}, chain", "<", f"{baseline}, chain", margin=0.01)
    )
CLAIMS += [
    claim(
        f"{CHAIN} DCT-AdamW ends at the same loss as with the SVD",
        "loss",
        "DCT, chain",
        "<",
        "SVD, chain",
        margin=0.01,
        kind="control",
        expect="no effect",
    ),
    claim(
        f"{CHAIN} whose states have no order, the DCT is no better than a random orthogonal basis",
        "loss",
        "DCT, chain",
        "<",
        "random, chain",
        margin=0.01,
        kind="control",
        expect="no effect",
    ),
    claim(
        f"{CHAIN} DCT-AdamW of full rank ends at the loss of AdamW",
        "loss",
        "full rank, chain",
        "<",
        "AdamW, chain",
        margin=0.01,
        kind="control",
        expect="no effect",
    ),
]
