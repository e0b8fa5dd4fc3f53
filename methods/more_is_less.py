"""More is Less - The Pitfalls of Multi-Model Synthetic Preference Data in DPO Safety Alignment
(2025), arXiv:2504.02193

The loss is DPO's; the paper varies who writes the two responses of a pair. If a stronger model or a
person writes the chosen one and the policy the other, DPO drives its loss to zero on style: all
features share one saturating factor sigmoid(-z), so refusals hardly change. Pairs of on-policy
samples, ranked by a reward model R, differ mainly in safety, and give the lowest attack rate.

    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ],    loss = -log sigmoid(z)
    hc_self      y_w: a person                y_l: the policy
    strong_self  y_w: the stronger model      y_l: the policy
    self_rm      best and worst by R of K samples of the policy
    peer_rm      the same of the policy and a peer
    all_rm       the same of all four writers

Differences from the paper
1. Rejected samples are drawn, not greedy.
2. R is the true reward plus noise.
3. Pairs labelled by people are left out.

    python train.py --method more_is_less --source self_rm,strong_self     attack rate and refusals
    python train.py --method more_is_less --source strong_self --beta 0.1  it loses its own style
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, fill_variant, pair, reorder

PAPER = Paper(
    "analysis",
    worlds=("text",),
    needs="reward",
    ignores=("flip", "label_temperature", "length_bias"),
    defaults=dict(world="safety"),
)
VARIANTS = dict(
    self_rm=dict(noise=0.15),
    peer_rm=dict(noise=0.15),
    all_rm=dict(noise=0.15),
    strong_self={},
    hc_self={},
)
OTHERS = dict(  # who writes responses besides the policy
    self_rm=(),
    peer_rm=("peer",),
    all_rm=("peer", "strong", "human"),
    strong_self=("strong",),
    hc_self=("human",),
)


@dataclass(frozen=True)
class Config:
    beta: float = 1.0  # strength of the pull to the reference, as in DPO
    source: str = "self_rm"  # self_rm, peer_rm, all_rm, strong_self or hc_self
    noise: float | None = None  # standard deviation of the noise of the reward model

    def __post_init__(self):
        fill_variant(self, VARIANTS, "source")
        check_fields(self, beta="(0, inf)", noise="[0, inf)")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def candidates(lab, policy, cfg):
    """Rows of samples of the policy, then one response of each other writer of the source.

    Prompts and samples are the same for every source.
    """
    prompts = lab.world.prompts(lab.prompts, lab.rng("prompts"))
    rows = lab.sample(policy, prompts, lab.k, lab.rng("responses"))
    for name in OTHERS[cfg.source]:
        texts = lab.world.writers[name](prompts, lab.rng("writer", name))
        for row, text in zip(rows, texts):
            row["responses"] = [*row["responses"], lab.tokens(text)]
            row["ends"] = [*row["ends"], True]
    return rows


def pair_of(row, k, r, cfg):
    """The pair of one row of `candidates`, or None if its responses do not differ.

    k: the number of samples of the policy, of which only self_rm uses more than the first. r: the
    reward model's value of each response.
    """
    pool = range(k) if cfg.source == "self_rm" else [0, *range(k, len(r))]
    if cfg.noise is None:  # the other writer is preferred without a reward model
        chosen, rejected = pool[1], pool[0]
    else:
        chosen, rejected = (find(pool, key=lambda i: r[i]) for find in (max, min))
        if r[chosen] == r[rejected]:
            return None
    if row["responses"][chosen] == row["responses"][rejected]:
        return None
    return reorder(row, [chosen, rejected]) | {"scores": [1.0, 0.0]}


def pairs(lab, policy, cfg):
    """The pairs of a source: one per prompt, if its responses differ."""
    rows = candidates(lab, policy, cfg)
    r = torch.tensor(lab.truth(rows), dtype=torch.float64)  # (n, responses)
    draw = torch.randn(r.shape, generator=lab.rng("reward model"), dtype=torch.float64)
    r = r + (cfg.noise or 0.0) * draw
    found = [pair_of(row, lab.k, each, cfg) for row, each in zip(rows, r.tolist())]
    return [two for two in found if two is not None]


def run(lab, cfg):
    missing = [name for name in OTHERS[cfg.source] if name not in lab.world.writers]
    if missing:
        raise UserError(f"source = {cfg.source}: {lab.world.name} has no writer {missing[0]!r}")
    policy = lab.base()
    found = lab.stage("pairs", lambda: pairs(lab, policy, cfg))
    if not found:
        raise UserError("no pair differs: more --prompts or --k may help")
    return lab.align(policy, lab.rows(found), loss, cfg)
