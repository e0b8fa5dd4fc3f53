"""OFS-DPO - Online DPO: Online Direct Preference Optimization with Fast-Slow Chasing (2024),
arXiv:2406.05534

Preferences arrive as a stream whose source changes. DPO's gradient fades once pairs are fitted, and
DPO forgets one source while learning the next. OFS-DPO trains two LoRA modules of one frozen model,
F fast and S slow. Each treats the other's margin as a constant:

    m = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    L_F = -log sigmoid(m_F) - alpha log sigmoid(m_F - m_S)
    L_S = -log sigmoid(m_S) + alpha log sigmoid(m_F - m_S)

Every N steps the module with the lower DPO loss becomes F, but keeps its learning rate. COFS-DPO
trains two modules per source and combines the sources' F by weights that minimize the DPO loss on
stored pairs.

Differences from the paper
1. We had no access to the paper; the equations are those of a public implementation.
2. COFS weights are the best on a grid.
3. COFS begins each source with new adapters.

    python train.py --method ofs_dpo                           both tastes, after the second source
    python train.py --method ofs_dpo --variant ofs,cofs,joint  one stream, combined, shuffled
    python train.py --method ofs_dpo --alpha 0                 DPO at two learning rates
"""

import functools
import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields, fill_variant, label, pair
from nanomodel import LoRA

PAPER = Paper(
    "online",
    worlds=("text",),
    needs="reward",
    ignores=("k", "lora", "ema", "compile"),
    defaults=dict(world="drift"),
)
VARIANTS = dict(ofs={}, joint={}, cofs=dict(memory=100, combine="deltas"))


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    alpha: float = 0.1  # weight of the chase
    rho: float = 0.2  # learning rate of the slow module, as a share of that of the fast one
    every: int = 20  # steps between two assignments of the roles
    rank: int = 4  # of the adapters
    # ofs: one stream, source by source; joint: ofs on the shuffled pairs of all sources, which a
    # stream cannot give; cofs: one pair of modules for each source
    variant: str = "ofs"
    memory: int | None = None  # cofs: pairs of each source that choose the weights
    combine: str | None = None  # cofs: deltas B A are combined, or parameters, A and B apart

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(
            self,
            beta="(0, inf)",
            alpha="[0, inf)",
            rho="(0, 1]",
            every="[1, inf)",
            rank="[1, inf)",
            memory="[1, inf)",
            combine=("deltas", "parameters"),
        )


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    Of one module. batch.other (B,): the log-ratio margin of the other one, without beta. batch.fast
    (B,): 1 if this module plays F, 0 if it plays S.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    m = cfg.beta * (chosen - rejected)  # (B,)
    other = cfg.beta * batch.other.to(m.dtype)  # a constant
    sign = 2 * batch.fast.to(m.dtype) - 1  # 1 for F, -1 for S
    losses = -F.logsigmoid(m) - cfg.alpha * sign * F.logsigmoid(sign * (m - other))
    return losses, {"gap": (sign * (m - other)).detach().mean()}


class Chase(nn.Module):
    """Two modules of adapters on one frozen model, and the roles that they play."""

    def __init__(self, base, rank, rng):
        super().__init__()
        first = LoRA.adapt(base, rank, rng)
        self.modules_of = nn.ModuleList([first, LoRA.copied(first)])  # learning rates lr, rho lr
        zero = torch.zeros((), dtype=torch.long, device=base.device)
        self.register_buffer("lead", zero)  # which of them plays F
        self.register_buffer("seen", torch.zeros(2, device=base.device))  # summed DPO losses
        self.register_buffer("steps", zero.clone())

    def roles(self):
        """(2,): 1 for the module that plays F, 0 for the other one."""
        return (torch.arange(2, device=self.lead.device) == self.lead).float()

    def note(self, losses, every):
        """Add the DPO losses (2,) of one step; every N steps the lower sum decides who plays F.

        Nothing is read on the host, so a training does not wait for its device.
        """
        self.seen += losses.detach()
        self.steps += 1
        now = self.steps % every == 0
        self.lead.copy_(torch.where(now, self.seen.argmin(), self.lead))
        self.seen.copy_(torch.where(now, 0.0, self.seen))

    def fast(self):
        """The module that plays F."""
        return self.modules_of[int(self.lead)]


def stream(lab, policy, d, n):
    """Labelled pairs of the policy from the d-th source of preferences, in order of arrival."""
    tastes = lab.world.tastes or (lab.world.reward,)
    prompts = lab.world.prompts(n, lab.rng("prompts", d))
    rows = lab.sample(policy, prompts, 2, lab.rng("responses", d))
    for row in rows:
        texts = [lab.text(response) for response in row["responses"]]
        row["reward"] = tastes[d]([row["prompt"]] * 2, texts).tolist()
    s, lengths = lab.settings, [[len(y) for y in row["responses"]] for row in rows]
    noise = s.label_temperature, s.flip, s.length_bias, lab.world.verifier
    rows = label(rows, lab.rng("labels", d), *noise, lengths=lengths)
    return [row for row in rows if row["scores"][0] != row["scores"][1]]


def margin(logps, ref_logps):
    """The difference (B,) of the log-ratios of chosen and rejected responses, without beta."""
    chosen, rejected = (logps - ref_logps).detach().float().sum(-1).unbind(1)
    return chosen - rejected


def chase(lab, base, rows, cfg, rng, steps):
    """OFS-DPO on rows in order of arrival, at most one pass -> the module that plays F last."""
    steps = min(steps, max(1, len(rows) // lab.batch_size))
    reference = lab.as_reference(base)
    model = Chase(base, cfg.rank, rng)

    def objective(model, batch):
        with lab.autocast(), torch.no_grad():
            ref_logps = reference.logps(batch)
        with lab.autocast():
            both = [module.logps(batch) for module in model.modules_of]
        margins = torch.stack([margin(logps, ref_logps) for logps in both])  # (2, B)
        losses, metrics, roles = 0.0, {}, model.roles()
        for i, logps in enumerate(both):
            batch.other, batch.fast = margins[1 - i], roles[i].expand_as(margins[i])
            own, found = loss(logps, ref_logps, batch, cfg)
            losses, metrics = losses + own, metrics | found
        model.note(-F.logsigmoid(cfg.beta * margins).mean(1), cfg.every)
        return losses, metrics | {"accuracy": roles @ (margins > 0).float().mean(1)}  # of F

    def optimizer(params):
        groups = [[p for p in m.parameters() if p.requires_grad] for m in model.modules_of]
        rates = lab.lr, cfg.rho * lab.lr
        adamw = functools.partial(torch.optim.AdamW, betas=(0.9, 0.95), weight_decay=0.0)
        both = [dict(params=group, lr=rate) for group, rate in zip(groups, rates)]
        return (lab.optimizer or adamw)(both, lr=lab.lr)

    lab.fit(model, lab.batches(lab.rows(rows)), objective, steps=steps, optimizer=optimizer)
    return model.fast()


def combined(modules, weights, cfg):
    """A GPT whose adapters are combined with these weights, merged into it."""
    out = LoRA.merged(modules[0])
    adapters = [LoRA.of(module) for module in modules]
    with torch.no_grad():
        for name, first in adapters[0].items():
            each = [found[name] for found in adapters]
            if cfg.combine == "parameters":
                a, b = (
                    sum(w * p for w, p in zip(weights, side)) for side in zip(*map(sides, each))
                )
                delta = first.scale * b @ a
            else:
                delta = sum(w * adapter.delta() for w, adapter in zip(weights, each))
            out.get_submodule(name).weight.copy_(first.linear.weight + delta)
    return out


def sides(adapter):
    """A and B of an adapter."""
    return adapter.A, adapter.B


def simplex(count, parts=20):
    """All weights of `count` modules that are multiples of 1 / parts and sum to 1."""
    grid = itertools.product(range(parts + 1), repeat=count - 1)
    return [[(parts - sum(w)) / parts, *(x / parts for x in w)] for w in grid if sum(w) <= parts]


def choose(lab, base, modules, rows, cfg):
    """The weights of the simplex with the least DPO loss on the rows of the memory."""
    known, best = lab.score_rows(base, rows), None
    for weights in simplex(len(modules)):
        ours = lab.score_rows(combined(modules, weights, cfg), rows)
        ratios = [[sum(a) - sum(b) for a, b in zip(*two)] for two in zip(ours, known)]
        z = (
            cfg.beta
            * torch.tensor(ratios, dtype=torch.float64)
            @ torch.tensor([1.0, -1.0]).double()
        )
        value = -F.logsigmoid(z).mean().item()
        if best is None or value < best[0]:
            best = value, weights
    return best[1]


def run(lab, cfg):
    sources = max(1, len(lab.world.tastes))
    if 0 < lab.steps < sources or lab.prompts < sources:
        raise UserError(f"--steps and --prompts: at least {sources}, one for each source")
    if cfg.variant != "ofs" and sources < 2:
        raise UserError(f"variant = {cfg.variant}: {lab.world.name} has one source of preferences")
    base, n = lab.base(), lab.prompts // sources
    streams = [lab.stage("stream", lambda d=d: stream(lab, base, d, n)) for d in range(sources)]
    if not all(streams):
        raise UserError("a source gave no pair with different scores: more --prompts may help")
    share = lab.steps // sources  # with few steps every source is cut, not the last one
    most = max(1, sum(map(len, streams)) // lab.batch_size)
    if lab.steps > most:
        lab.say(f"{most} of {lab.steps} steps: pairs are seen once, and more need more --prompts")
    streams = [rows[: max(1, share) * lab.batch_size] for rows in streams]
    if cfg.variant != "cofs":
        rows = sum(streams, [])
        if cfg.variant == "joint":
            order = torch.randperm(len(rows), generator=lab.rng("order of joint training"))
            rows = [rows[i] for i in order.tolist()]
        return LoRA.merged(chase(lab, base, rows, cfg, lab.rng("adapters"), lab.steps))
    modules = []
    for rows in streams:
        modules.append(chase(lab, lab.base(), rows, cfg, lab.rng("adapters"), share))
    kept = lab.rows([row for rows in streams for row in rows[-cfg.memory :]])
    weights = lab.stage("weights", lambda: choose(lab, base, modules, kept, cfg))
    lab.say("weights of the sources: " + ", ".join(f"{w:.2f}" for w in weights))
    return combined(modules, weights, cfg)
