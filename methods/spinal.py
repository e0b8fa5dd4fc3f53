"""SPINAL - Scaling-law and Preference Integration in Neural Alignment Layers (2026),
arXiv:2601.06238

Where in a model does DPO act? SPINAL measures every layer l at the last token of prompts:

    alpha_l = -d log sigma_k(H_l)/d log k     spectral decay of the states H_l
    path_l = 2 arccos sum_v sqrt(p_{l-1}(v) p_l(v))     step of the next-token belief

where p_l is the logit lens. The paper says that DPO raises alpha and shortens the path in the last
layers. Three terms describe this: the change of alpha minus that of the path in the last third, the
coherence of the trajectory, and the last layers' share of the gradient norm.

In the world deep the signature did not appear: alpha changed in all layers alike, and the path had
no common sign. It would have to in models of the paper's depth, about 30 layers.

Differences from the paper
1. The terms' formulas, the spectrum's tail and the position are our reading.
2. Both models are read through the base model's lens.

    python train.py --method spinal                every layer before and after DPO
    python train.py --method spinal --train last   no change in early layers
    python train.py --method spinal --init OUT     measures a finished run
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, extremes, pair

PAPER = Paper(
    "analysis",
    worlds=("text",),
    ignores=("k",),
    defaults=dict(world="deep"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    train: str = "all"  # all layers, or a third of them, at least 2: the last or the first

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", train=("all", "last", "first"))


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def terminal(model):
    """The number of terminal layers, a third and at least 2. UserError: there are no others."""
    count = len(model.layers)
    if count < 3:
        raise UserError(f"a model of {count} layers has no early ones; spinal needs 3, as in deep")
    return max(2, round(count / 3))


def spectrum(H):
    """alpha and R^2 of the tail of the spectrum of H (N, d): log sigma_k = b - alpha log k.

    Both are NaN if the tail has fewer than 5 singular values. UserError: fewer than 8 rows.
    """
    if len(H) < 8:
        raise UserError(f"a spectrum of {len(H)} states: at least 8 prompts are needed")
    H = H.double()
    sigma = torch.linalg.svdvals(H - H.mean(0))
    rank = int((sigma > 1e-6 * sigma[0]).sum())
    first, last = max(2, rank // 10), int(0.8 * rank)
    if last - first + 1 < 5:
        return math.nan, math.nan
    x = torch.arange(first, last + 1, dtype=torch.float64, device=H.device).log()
    y = sigma[first - 1 : last].log()
    x, y = x - x.mean(), y - y.mean()
    slope = (x @ y) / (x @ x)
    return -slope.item(), ((slope * x @ y) / (y @ y)).item()


def path(p, q):
    """The Fisher-Rao distance 2 arccos sum sqrt(p q) of distributions, given as log-probs (N, V).

    In the form 4 arcsin(|sqrt p - sqrt q| / 2), which is exact for equal distributions.
    """
    half = ((p.double() / 2).exp() - (q.double() / 2).exp()).norm(dim=-1) / 2
    return 4 * half.clamp(max=math.sqrt(0.5)).asin()


def coherence(points):
    """1 / (1 + mean norm of the second differences) of a trajectory (L, 3); 1 is a straight one."""
    bends = points[2:] - 2 * points[1:-1] + points[:-2]
    return 1 / (1 + bends.norm(dim=-1).mean().item())


@torch.no_grad()
def layers(lab, model, rows):
    """alpha (L,), R^2 (L,) and path (L,) of the layers 1 to L, read with the lens of the base."""
    lens, states = lab.reference, []
    for start in range(0, len(rows), 64):
        batch = lab.collate(rows[start : start + 64])
        found = model.hidden(batch, layers=list(range(len(model.layers) + 1)))
        # the state that predicts the first token of a response is that of the last prompt token
        states.append([h.flatten(0, 1)[batch.source[:, 0, 0]] for h in found])
    states = [torch.cat(part) for part in zip(*states)]  # L + 1 of (N, hidden)
    alpha, fit, steps, before = [], [], [], None
    for h in states:
        belief = lens.unembed(lens.norm(h)).double().log_softmax(-1)  # (N, V)
        if before is not None:
            a, r = spectrum(h)
            alpha.append(a)
            fit.append(r)
            steps.append(path(before, belief).mean().item())
        before = belief
    return tuple(torch.tensor(x, dtype=torch.float64) for x in (alpha, fit, steps))


def shares(lab, model, rows):
    """The share of each layer in the summed gradient norms of the DPO loss on rows, (L,).

    beta is the default one, so that models that were trained with different ones can be compared.
    """
    batch = lab.collate(rows)
    with torch.no_grad():
        ref_logps = lab.reference.logps(batch)
    model = copy.deepcopy(model).requires_grad_(True)
    loss(model.logps(batch), ref_logps, batch, Config())[0].mean().backward()
    norms = [
        torch.stack([p.grad.norm() for p in layer.parameters() if p.grad is not None]).norm()
        for layer in model.layers
    ]
    norms = torch.stack(norms).double().cpu()
    return norms / norms.sum()


def probes(lab):
    """Rows whose prompts are read, and labelled pairs for the gradient; the same for all models."""
    world, n = lab.world, max(64, lab.eval_size)  # fewer states have no spectrum
    prompts = world.prompts(n, lab.rng("probe"))
    if world.held_out is not None:
        lists = [row for row in world.held_out if len(row["responses"]) > 1]
        pairs = [extremes(row) for row in lists if not row.get("parents")][:64]
        if not pairs:
            raise UserError(f"{world.name} holds out no pair, whose gradient spinal measures")
    else:
        drawn = lab.sample(lab.reference, prompts[:64], 2, lab.rng("probe pairs"))
        pairs = lab.label(drawn, key=("probe",))
    asked = [dict(prompt=x, responses=[[]], ends=[True]) for x in prompts]
    return lab.rows(asked), lab.rows(pairs)


def measure(lab, model):
    """{name: number}: alpha, path and share of every layer, and the three terms of SPINAL.

    alpha_terminal and path_terminal are the mean changes in the last layers, alpha_early and
    path_early those in the others.
    """
    w = terminal(model)
    rows, pairs = probes(lab)
    alpha, fit, steps = layers(lab, model, rows)
    base_alpha, _, base_steps = layers(lab, lab.reference, rows)
    share = shares(lab, model, pairs)
    count = len(alpha)
    found = {f"alpha_{i + 1}": alpha[i] for i in range(count)}
    found |= {f"path_{i + 1}": steps[i] for i in range(count)}
    found |= {f"share_{i + 1}": share[i] for i in range(count)}
    change, shift = alpha - base_alpha, steps - base_steps
    found |= {"alpha_early": change[:-w].mean(), "alpha_terminal": change[-w:].mean()}
    found |= {"path_early": shift[:-w].mean(), "path_terminal": shift[-w:].mean()}
    depth = torch.arange(1, count + 1, dtype=torch.float64) / count
    points = torch.stack([depth, alpha / base_alpha.mean(), steps / base_steps.mean()], 1)
    found |= {"moved": shift.abs().sum(), "least_fit": fit.min()}
    found |= {"aligned": found["alpha_terminal"] - found["path_terminal"]}
    found |= {"coherence": coherence(points[-w - 1 :]), "terminal_share": share[-w:].sum()}
    return {name: float(value) for name, value in found.items()}


def evaluate(lab, model):
    """The Lab's evaluation and the measurements of SPINAL."""
    return lab.evaluate(model) | lab.stage("layers", lambda: measure(lab, model))


def run(lab, cfg):
    if lab.settings.init and not lab.settings.steps:  # measure a finished run, train nothing
        if cfg != Config():
            raise UserError("beta and train do nothing without --steps: nothing is trained")
        return lab.finished()
    if not lab.settings.init:
        terminal(lab.world.model())  # refuses a world whose model has too few layers
    policy = lab.base()
    w, count = terminal(policy), len(policy.layers)
    chosen = dict(all=range(count), last=range(count - w, count), first=range(w))[cfg.train]
    inside = {id(p) for i in chosen for p in policy.layers[i].parameters()}
    frozen = [p for p in policy.parameters() if id(p) not in inside and p.requires_grad]
    if cfg.train != "all":
        for p in frozen:
            p.requires_grad_(False)
    policy = lab.align(policy, lab.preferences(policy, k=2), loss, cfg)
    for p in frozen:
        p.requires_grad_(True)
    return policy
