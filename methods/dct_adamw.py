"""DCT_ADAMW - SVD-Free Low-Rank Adaptive Gradient Optimization for Large Language Models (2025),
arXiv:2505.17967

GaLore keeps its states in a subspace per matrix, and pays for an SVD and a stored projection. Here
all matrices share the DCT's cosines as basis Q. Each step selects the r columns that fit the
gradient G best and adds the rest, E, to the next gradient. Columns that stay selected keep their
moments; new ones begin at 0:

    A = G + E     S = A Q     idx = top-r columns by norm     Q_r = Q[:, idx]     a = A Q_r
    E = A - a Q_r^T              W = W - lr adam(a) Q_r^T                        DCT-AdamW
    M = B - (1 - mu) b Q_r^T     W = W - lr orth(b) Q_r^T      Trion, with b of B = M + G

Differences from the paper
1. Unlike in the official code, the matrix product and the FFT use the same Q, and 8 bits are 256
   levels.
2. The rank is a share of a matrix's smaller side.

    python train.py --method dct_adamw                    AdamW's loss with less state
    python train.py --method dct_adamw --variant trion --lr 0.02
    python train.py --method dpo --optimizer dct_adamw    under another method
"""

import copy
import functools
import math
import time
from dataclasses import dataclass

import torch

from data import Paper, UserError, check_fields, fill_variant, upcast

PAPER = Paper(
    "beyond",
    worlds=("text",),
    needs="demonstrations",
    ignores=(
        "k",
        "temperature",
        "label_temperature",
        "flip",
        "length_bias",
        "optimizer",
        "prompts",
        "max_response",
        "eval_size",
        "base_steps",
        "ema",
        "dtype",
        "compile",
        "capture",
    ),
    defaults=dict(world="reviews", steps=300, lr=1e-2, eval_every=60),
    core=(
        "dct",
        "makhoul",
        "top_columns",
        "quantize",
        "dequantize",
        "orthogonal",
        "adam",
        "low_rank",
        "momentum",
    ),
    start="raw",
)
VARIANTS = dict(
    dct_adamw=dict(gap=1, rotate=True, feedback=True, bits=8),
    trion=dict(mu=0.95),
)


@dataclass(frozen=True)
class Config:
    variant: str = "dct_adamw"  # dct_adamw or trion
    rank: float = 0.25  # columns, as a share of the smaller side of a matrix
    score: str = "l2"  # norm by which columns are selected: l2 (the best subset) or l1
    transform: str = "matmul"  # how S is computed: matmul or fft
    gap: int | None = None  # dct_adamw: steps between two selections
    rotate: bool | None = None  # dct_adamw: move the moments to the new columns
    feedback: bool | None = None  # dct_adamw: add what the columns missed to the next gradient
    bits: int | None = None  # dct_adamw: bits of the feedback, 8 or 32
    mu: float | None = None  # trion: decay of the momentum
    weight_decay: float = 0.0  # decoupled decay of the weights

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(self, rank="(0, 1]", score=("l2", "l1"), transform=("matmul", "fft"))
        check_fields(self, gap="[1, inf)", bits=(8, 32), mu="[0, 1)", weight_decay="[0, inf)")


@functools.cache
def dct(n, dtype=torch.float32, device=None):
    """The basis Q (n, n): orthonormal columns, which are cosines of rising frequency."""
    i = torch.arange(n, dtype=torch.float64)
    rows = math.sqrt(2 / n) * torch.cos(math.pi / (2 * n) * i[:, None] * (2 * i + 1))
    rows[0] *= math.sqrt(0.5)
    return rows.T.to(device, dtype)


def makhoul(A):
    """A Q, the DCT-II of each row of A (R, n), by one FFT of n numbers (Makhoul)."""
    n = A.shape[1]
    order = torch.cat([A[:, ::2], A[:, 1::2].flip(1)], 1)  # evens ascending, odds descending
    angle = torch.arange(n, dtype=A.dtype, device=A.device) * (-math.pi / (2 * n))
    S = (torch.polar(torch.ones_like(angle), angle) * torch.fft.fft(order)).real
    S = S * math.sqrt(2 / n)
    return torch.cat([S[:, :1] * math.sqrt(0.5), S[:, 1:]], 1)


def top_columns(S, r, score):
    """The r columns of S (R, n) of the largest norm, in ascending order (r,)."""
    if not 1 <= r <= S.shape[1]:
        raise UserError(f"a rank of {r} for {S.shape[1]} columns: expected 1 to {S.shape[1]}")
    norms = S.abs().sum(0) if score == "l1" else S.square().sum(0)
    return norms.topk(r).indices.sort().values


def quantize(x, bits):
    """x (R, n) as whole numbers up to 2^bits - 1, with the smallest value and the unit per row."""
    low, high = x.aminmax(dim=1, keepdim=True)
    unit = (high - low) / (2**bits - 1)
    steps = (x - low) / torch.where(unit > 0, unit, 1.0)  # a constant row has no unit
    return (steps + 0.5).to(torch.uint8), low, unit


def dequantize(q, low, unit):
    """The inverse of `quantize`, up to half a unit."""
    return q * unit + low


def orthogonal(X):
    """Newton-Schulz, five times: a matrix X with its singular values moved towards 1.

    Those above 0.002 of the norm of X end between 0.68 and 1.21. The smaller ones end between 0
    and 1.21, and the smallest stay near 0, as five steps multiply them by 485 at most.
    """
    X = X / (X.norm() + 1e-7)
    tall = X.shape[0] > X.shape[1]
    X = X.T if tall else X
    for _ in range(5):
        G = X @ X.T
        X = 3.4445 * X + (-4.7750 * G + 2.0315 * G @ G) @ X
    return X.T if tall else X


def adam(g, state, t, betas, eps):
    """Adam's update of any tensor at step t, and its new moments {m, v}."""
    m = betas[0] * state.get("m", 0) + (1 - betas[0]) * g
    v = betas[1] * state.get("v", 0) + (1 - betas[1]) * g * g
    update = (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + eps)
    return update, {"m": m, "v": v}


def low_rank(G, state, t, group):
    """DCT-AdamW's update of a matrix at step t, and its new state; G (R, n), n the smaller side."""
    n, idx, moments = G.shape[1], state.get("idx"), state
    Q, feedback = dct(n, G.dtype, G.device), {}
    A = G
    if "error" in state:
        A = G + state["error"]
    if "q" in state:
        A = G + dequantize(state["q"], state["low"], state["unit"])
    if t == 1 or t % group["gap"] == 0:
        S = makhoul(A) if group["transform"] == "fft" else A @ Q
        before, idx = idx, top_columns(S, max(1, round(group["rank"] * n)), group["score"])
        a = S[:, idx]
        if group["rotate"] and before is not None:
            moments = {name: torch.zeros_like(A) for name in "mv"}
            for name, full in moments.items():
                full[:, before] = state[name]
            moments = {name: full[:, idx] for name, full in moments.items()}
    else:
        a = A @ Q[:, idx]
    back = Q[:, idx].T  # (r, n)
    if group["feedback"]:
        error = A - a @ back
        feedback = {"error": error}
        if group["bits"] < 32:
            feedback = dict(zip(("q", "low", "unit"), quantize(error, group["bits"])))
    update, moments = adam(a, moments, t, group["betas"], group["eps"])
    return update @ back, {"idx": idx} | moments | feedback


def momentum(G, state, group):
    """Trion's update of a matrix, and its new state; G (R, n), n the smaller side."""
    n = G.shape[1]
    Q = dct(n, G.dtype, G.device)
    B = G + state.get("M", 0)
    S = makhoul(B) if group["transform"] == "fft" else B @ Q
    idx = top_columns(S, max(1, round(group["rank"] * n)), group["score"])
    b, back = S[:, idx], Q[:, idx].T
    return orthogonal(b) @ back, {"M": B - (1 - group["mu"]) * b @ back}


class Matrixwise(torch.optim.Optimizer):
    """An optimizer with an `update` for matrices of its own; all other parameters have Adam's.

    Matrices with a side of `largest` or more, such as embeddings, count as others.
    """

    def update(self, G, state, t, group, wide):
        """The update of a matrix G (R, n), n the smaller side, and its new state {name: value}.

        wide: whether G is the transpose of the gradient.
        """
        raise NotImplementedError

    @torch.no_grad()
    def step(self, closure=None):
        """One step on the gradients of all parameters, which are left unchanged."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is None:
                    continue
                G, state = upcast(p.grad), self.state[p]
                t = state.get("step", 0) + 1
                if p.ndim == 2 and max(p.shape) < group["largest"]:
                    wide = p.shape[0] < p.shape[1]
                    update, new = self.update(G.T if wide else G, state, t, group, wide)
                    update = update.T if wide else update
                else:
                    update, new = adam(G, state, t, group["betas"], group["eps"])
                self.state[p] = {"step": t} | new
                p.mul_(1 - group["lr"] * group["weight_decay"])
                p.sub_((group["lr"] * update).to(p.dtype))
        return loss

    def load_state_dict(self, state_dict):
        """As in torch, which however casts all states to the dtype of their parameter."""
        super().load_state_dict(state_dict)
        params = [p for group in self.param_groups for p in group["params"]]
        for i, values in state_dict["state"].items():
            for name, value in values.items():
                tensor = isinstance(value, torch.Tensor)
                self.state[params[i]][name] = value.to(params[i].device) if tensor else value


class DCTAdamW(Matrixwise):
    """AdamW whose moments of a matrix lie in selected columns of the DCT.

    rank: the number of columns as a share of the smaller side. score, transform, gap, rotate,
    feedback, bits: as in Config. largest: see Matrixwise.
    """

    def __init__(
        self,
        params,
        lr=1e-3,
        betas=(0.9, 0.999),
        eps=1e-8,
        weight_decay=0.0,
        rank=0.25,
        score="l2",
        transform="matmul",
        gap=1,
        rotate=True,
        feedback=True,
        bits=8,
        largest=32000,
    ):
        Config("dct_adamw", rank, score, transform, gap, rotate, feedback, bits)  # checks them
        names = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, score=score)
        names |= dict(transform=transform, gap=gap, rotate=rotate, feedback=feedback, bits=bits)
        super().__init__(params, names | dict(largest=largest))

    def update(self, G, state, t, group, wide):
        """See Matrixwise."""
        return low_rank(G, state, t, group)


class Trion(Matrixwise):
    """Dion with selected columns of the DCT instead of a power iteration.

    mu: decay of the momentum, a full matrix. rank, score, transform, largest: see DCTAdamW.
    """

    def __init__(
        self,
        params,
        lr=1e-2,
        betas=(0.9, 0.95),
        eps=1e-10,
        weight_decay=0.0,
        rank=0.25,
        score="l2",
        transform="matmul",
        mu=0.95,
        largest=32000,
    ):
        Config("trion", rank, score, transform, mu=mu)  # checks them
        names = dict(lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, rank=rank, score=score)
        super().__init__(params, names | dict(transform=transform, mu=mu, largest=largest))

    def update(self, G, state, t, group, wide):
        """See Matrixwise; a tall matrix has larger steps."""
        update, new = momentum(G, state, group)
        return update * (1.0 if wide else math.sqrt(G.shape[0] / G.shape[1])), new


def optimizer(params, lr, cfg=None):
    """The optimizer of a Config, by default of DCT-AdamW: what --optimizer dct_adamw asks for."""
    fields = {name: value for name, value in vars(cfg or Config()).items() if value is not None}
    kind = dict(dct_adamw=DCTAdamW, trion=Trion)[fields.pop("variant")]
    return kind(params, lr, **fields)


def run(lab, cfg):
    def adamw(params):
        return torch.optim.AdamW(params, lr=lab.lr, betas=(0.9, 0.999), weight_decay=0.0)

    arms = {"AdamW": adamw, cfg.variant: lambda params: optimizer(params, lab.lr, cfg)}
    return compare(lab, arms)


def compare(lab, arms):
    """Train one model from scratch with each optimizer, on the same rows in the same order.

    arms: {name: function of the parameters}. -> {name: held-out loss and cost}.
    """
    start, world, size = lab.base("raw"), lab.world, lab.batch_size
    rows = world.demonstrations(lab.few(16384, least=64), lab.rng("rows"))
    held = world.held_out or world.demonstrations(lab.few(1024), lab.rng("held out"))
    held = [dict(prompt=row["prompt"], responses=row["responses"][:1]) for row in held]
    batches, held, table = lab.batches(lab.rows(rows)), lab.rows(held), {}

    def objective(model, batch):  # next-token loss, the mean over tokens
        return -model.logps(batch).sum() / batch.mask.sum(), {}

    @torch.no_grad()
    def look(model, step):
        parts = [lab.collate(held[i : i + size]) for i in range(0, len(held), size)]
        total = sum(-model.logps(part).sum().item() for part in parts)
        return {"loss": total / sum(part.mask.sum().item() for part in parts)}

    for name, make in arms.items():
        how = dict(optimizer=make, decay=True, watch=look, title=name)
        policy = lab.fit(copy.deepcopy(start), batches, objective, **how)
        spent = functools.partial(cost, policy, make)
        table[name] = {"loss": policy.curve[-1]["loss"]} | lab.stage("cost", spent)
    return table


def cost(model, make):
    """The size of an optimizer's state, and the time of its fastest of five steps."""
    model = copy.deepcopy(model)
    params = [p for p in model.parameters() if p.requires_grad]
    found, times = make(params), []
    for p in params:
        p.grad = torch.randn_like(p)

    def wait():
        if params[0].is_cuda:
            torch.cuda.synchronize()

    for _ in range(5):
        wait()
        begin = time.perf_counter()
        found.step()
        wait()
        times.append(time.perf_counter() - begin)
    states = [x for state in found.state.values() for x in state.values()]
    size = sum(x.numel() * x.element_size() for x in states if isinstance(x, torch.Tensor))
    return {"state KB": size / 1024, "ms per step": 1000 * min(times)}
