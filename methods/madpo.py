"""MADPO - Margin Adaptive DPO: Leveraging Reward Model for Granular Control in Preference
Optimization (2025), arXiv:2510.05342

With one beta for all pairs, DPO overfits easy pairs and underfits hard ones. MADPO first fits a
reward model r to the same pairs, then multiplies a pair's DPO loss by a weight w(h) of the margin
h = r(y_w) - r(y_l), which is negative where r disagrees with the label. Averaged over labels, a
pair with |h| < tau is fitted as if its margin were c(h) h. Margins beyond tau are hardly damped.

    c(h) = c_min + (c_max - c_min) sigmoid(-lam (|h| - tau) - log((c_max - 1) / (1 - c_min)))
    w(h) = sigmoid(c(h) h) / sigmoid(h)  for h > -tau,  else 1
    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = -w(h) log sigmoid(z)

Differences from the paper
1. The weight, and the value 1 for h <= -tau, are those of the published code.
2. The reward model has fixed steps and weight decay instead of early stopping.

    python train.py --method madpo                   the true reward rises
    python train.py --method madpo --c_max 2,4       a larger c_max has the larger KL
"""

import copy
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    c_max: float = 4.0  # factor on margins near 0, above 1; the paper sweeps 2, 3, 4
    c_min: float | None = None  # factor on the largest margins, below 1; default 1 / c_max
    tau: float = 6.9068  # margin on which the factor is 1; log(0.999 / 0.001) in the paper
    lam: float = 1.0  # steepness of the change from c_max to c_min
    reward_steps: int = 300  # training steps of the reward model
    reward_lr: float = 1e-3  # learning rate of the reward model
    reward_decay: float = 0.01  # weight decay of the reward model; overfitting gives margins > tau

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", c_max="(1, inf)", tau="(0, inf)", lam="(0, inf)")
        check_fields(self, reward_steps="[1, inf)", reward_lr="(0, inf)", reward_decay="[0, inf)")
        if self.c_min is None:
            object.__setattr__(self, "c_min", 1 / self.c_max)
        check_fields(self, c_min="(0, 1)")


def stretch(h, cfg):
    """The factor c(h) on a margin h (B,): between c_max and c_min, and 1 at |h| = tau."""
    odds = math.log(cfg.c_max - 1) - math.log(1 - cfg.c_min)
    fall = torch.sigmoid(-(cfg.lam * (h.abs() - cfg.tau) + odds))
    return cfg.c_min + (cfg.c_max - cfg.c_min) * fall


def margin_weights(h, cfg):
    """Weights w(h) (B,) of margins h (B,), chosen minus rejected, without gradient."""
    h = h.detach()
    weight = torch.exp(F.logsigmoid(stretch(h, cfg) * h) - F.logsigmoid(h))
    return torch.where(h > -cfg.tau, weight, 1.0)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    The column margin (B,) holds the reward model's margins, chosen minus rejected.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    w = margin_weights(batch.margin.to(z.dtype), cfg)  # (B,), not normalized over the batch
    losses = -w * F.logsigmoid(z)
    agreement = (batch.margin > 0).to(z.dtype).mean()
    return losses, {"weight": (w * torch.sigmoid(-z)).detach().mean(), "agreement": agreement}


class RewardModel(nn.Module):
    """One reward per response: a linear head on a language model, or a table of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = copy.deepcopy(base)
        self.head = nn.Linear(base.config.hidden_size, 1, bias=False).to(base.device)
        nn.init.zeros_(self.head.weight)  # all rewards begin at 0

    def forward(self, batch):
        """Rewards (B, K) of the responses of a Batch."""
        last = batch.mask.sum(-1, keepdim=True).clamp(min=1) - 1  # (B, K, 1) last scored token
        source = batch.source.gather(2, last)  # the state that predicts it
        return self.head(self.base.hidden(batch, rows=source.flatten())).view(last.shape[:2])


class RewardTable(nn.Module):
    """One reward per response of a table: the log-prob under a table that starts uniform."""

    def __init__(self, base):
        super().__init__()
        self.table = copy.deepcopy(base)
        nn.init.zeros_(self.table.logits)

    def forward(self, batch):
        """Rewards (B, K) of the responses of a Batch."""
        return self.table.logps(batch).sum(-1)


def reward_margins(lab, policy, rows, cfg):
    """Fit a Bradley-Terry reward model to pairs -> a list of its margins, one per pair."""
    model = (RewardTable if lab.world.kind == "table" else RewardModel)(policy)
    order = torch.randperm(len(rows), generator=lab.rng("reward model")).tolist()
    size = lab.batch_size
    batches = lab.batches([rows[i] for i in order])

    def margins(model, batch):
        chosen, rejected = model(batch).unbind(1)
        return chosen - rejected

    def bradley_terry(model, batch):
        return -F.logsigmoid(margins(model, batch)), {}

    def adamw(params):
        return torch.optim.AdamW(params, lr=cfg.reward_lr, weight_decay=cfg.reward_decay)

    try:
        kwargs = dict(steps=cfg.reward_steps, optimizer=adamw, capture=True)
        lab.fit(model, batches, bradley_terry, **kwargs)
    except UserError as error:  # the reward model diverged
        raise type(error)(str(error).replace("--lr", "--reward_lr")) from None
    with torch.no_grad():
        parts = [lab.collate(rows[i : i + size]) for i in range(0, len(rows), size)]
        return torch.cat([margins(model, part).cpu() for part in parts]).tolist()


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    margins = reward_margins(lab, policy, data, cfg)
    data = [row | {"margin": margin} for row, margin in zip(data, margins)]
    return lab.align(policy, data, loss, cfg)
