"""DPO - Direct Preference Optimization: Your Language Model is Secretly a Reward Model (2023),
arXiv:2305.18290

RLHF fits a reward model to preferences and then maximizes reward - beta KL(policy || reference).
The optimum is pi(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x) (eq. 4), so
r = beta log(pi / pi_ref) + beta log Z(x) (eq. 5), and Z cancels between two responses to one
prompt. So the policy, as its own reward model, is trained by a logistic loss on pairs of a chosen
response y_w and a rejected one y_l:

    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = -log sigmoid(z)                                                                  (eq. 7)

Only the difference enters: both log-probs may fall while the margin z rises.

Differences from the paper: none. On images the log-probs are minus summed noise errors, which
makes this Diffusion-DPO (arXiv:2311.12908).

    python train.py --method dpo                     the true reward and the KL rise
    python train.py --method dpo --beta 0.1,1        a larger beta stays closer to the reference

Over-optimization: with few noisy pairs and a small beta the margin keeps rising while the true
reward falls (curves.png):

    python train.py --method dpo --prompts 1024 --label_temperature 1 --beta 0.05 --steps 250
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, check_fields, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
    demo=dict(prompts=9600, steps=260, label_temperature=0.0, beta=1.1),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference; 0.1 in the paper (app. B)

    def __post_init__(self):
        check_fields(self, beta="(0, inf)")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)
