"""rDPO - Provably Robust DPO: Aligning Language Models with Noisy Feedback (2024), arXiv:2403.00409

Labels are noisy: each preference is flipped, independently of its content, with probability
epsilon < 1/2. DPO then learns a reward that is too flat, and label smoothing (conservative DPO)
flattens it further. rDPO takes the unbiased estimate: averaged over the flips, its loss and
gradient are those of DPO on clean labels, for every policy. With l(z) = -log sigmoid(z):

    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = [ (1 - epsilon) l(z) - epsilon l(-z) ] / (1 - 2 epsilon)
         = -log sigmoid(z) - epsilon / (1 - 2 epsilon) z                 since l(-z) = l(z) + z

The loss is unbounded below: a pair whose labels always agree is pushed apart forever. Only a
larger beta, early stopping or generalization across pairs keeps a policy that can memorize from
diverging.

Differences from the paper
1. The second form is computed, since the first loses digits as epsilon approaches 1/2.

    python train.py --method rdpo                    30 % of the labels are flipped
    python train.py --method dpo,rdpo --flip 0.3     at the same beta, rDPO has the larger KL
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, check_fields, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    ignores=("k",),
    defaults=dict(world="reviews", flip=0.3, prompts=12800, lr=4e-4),  # every pair is seen once
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference; 0.1 in the paper (app. B)
    epsilon: float = 0.3  # assumed flip rate; one above the true rate makes the loss diverge

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", epsilon="[0, 0.5)")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    slope = cfg.epsilon / (1 - 2 * cfg.epsilon)
    losses = -F.logsigmoid(z) - slope * z  # the robust loss
    return losses, {"weight": (torch.sigmoid(-z) + slope).detach().mean()}


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)
