"""ASFT - Aligned Supervised Fine-Tuning through Absolute Likelihood (2024), arXiv:2409.10571

DPO lowers the probability of the rejected response faster than it raises that of the chosen one, so
both may fall. Without a reference model, ASFT gives each response its own target: SFT plus two
binary cross-entropies on the length-normalized probability p.

    s(y) = 1/|y| sum_t log pi(y_t | x, y_<t)      p = exp(s)      o = log( p / (1 - p) )
    loss = -s(y_w) + weight [ -log sigmoid(o(y_w)) - log sigmoid(-o(y_l)) ]
         = -(1 + weight) s(y_w) - weight log(1 - p(y_l))

The second form is SFT plus unlikelihood training: the gradient in s(y_w) is constant, and that in
s(y_l) vanishes with p(y_l).

Differences from the paper
1. We had no access to the paper; formulas and weight are those of arXiv:2502.01237.
2. `beta` and `supervised` are additions of that study.
3. s(y_l), and with beta != 1 also s(y_w), is clamped at -1e-6, since the loss is infinite at 0.
4. Images are refused, since noise errors are not log-probs.

Anchored SFT (arXiv:2509.23753) is another method.

    python train.py --method asft                      the chosen log-prob ends above DPO's
    python train.py --method asft --weight 0,1,10      0 is SFT
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair, readable

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
)

LARGEST = -1e-6  # s is clamped here: log(1 - exp(s)) is -inf at 0


@dataclass(frozen=True)
class Config:
    weight: float = 1.0  # weight of the two cross-entropies (lambda in the paper); 0 is SFT
    beta: float = 1.0  # temperature of the log-odds; 1 is ASFT
    supervised: bool = True  # add -s(y_w); false for a model that has been through SFT

    def __post_init__(self):
        check_fields(self, weight="[0, inf)", beta="(0, inf)")
        if self.weight == 0 and (self.beta != 1 or not self.supervised):
            raise UserError("weight = 0 is plain SFT: beta must be 1 and supervised true")


def log1mexp(s):
    """log(1 - exp(s)) for s < 0, accurate both near 0 and far from it."""
    return torch.where(s > -math.log(2), torch.log(-torch.expm1(s)), torch.log1p(-torch.exp(s)))


def loss(logps, ref_logps, batch, cfg):
    """logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    There is no reference, so ref_logps is not read.
    """
    logps, _ = pair(logps, None, batch)
    if readable(logps) and (logps > 0).any():
        raise UserError(f"log-prob {logps.max():g} is positive: ASFT needs probabilities")
    chosen, rejected = (logps.sum(-1) / batch.mask.sum(-1)).unbind(1)  # (B,): MEAN over tokens
    low_w, low_l = chosen.clamp(max=LARGEST), rejected.clamp(max=LARGEST)
    if cfg.beta == 1:  # log sigmoid(o) = s, log sigmoid(-o) = log(1 - p)
        align = -chosen - log1mexp(low_l)
    else:
        odds_w, odds_l = low_w - log1mexp(low_w), low_l - log1mexp(low_l)
        align = -F.logsigmoid(cfg.beta * odds_w) - F.logsigmoid(-cfg.beta * odds_l)
    losses = cfg.weight * align - chosen if cfg.supervised else cfg.weight * align
    p = low_l.detach().exp()
    clamped = (rejected > LARGEST).to(p.dtype).mean()
    return losses, {"rejected_odds": (p / (1 - p)).mean(), "clamped": clamped}


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg, reference=None)
