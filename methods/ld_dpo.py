"""LD-DPO - Length Desensitization in Direct Preference Optimization (2024), arXiv:2409.06411

DPO's log-prob is a sum over tokens, so a longer response contributes more to the gradient, and the
paper argues that this makes policies verbose. LD-DPO splits the longer response of a pair at the
public length l, which is the length of the shorter response, and multiplies the log-probs beyond l
by alpha in [0, 1]. alpha = 1 is DPO, and alpha = 0 truncates the longer response:

    log p(y) = sum_{t <= l} log pi(y_t) + alpha sum_{t > l} log pi(y_t),    l = min(|y_w|, |y_l|)
    z = beta [ log p(y_w) / p_ref(y_w) - log p(y_l) / p_ref(y_l) ]
    loss = -log sigmoid(z)

The public part is the first l positions, not a common prefix. End-of-text counts as a token.

Differences from the paper
1. Public sources disagree on whether the reference is split, so `on_reference` selects it.

    python train.py --method ld_dpo --alpha 0,1              alpha 0 writes shorter responses
    python train.py --method ld_dpo --on_reference false     much shorter, whatever the labels say
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair

PAPER = Paper(
    "pairs",
    worlds=("text",),  # images and most tables have responses of one length
    ignores=("k",),
    defaults=dict(world="reviews", length_bias=0.1),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    alpha: float = 0.5  # weight of the tokens beyond the public length; tuned for each model
    on_reference: bool = True  # split the reference as well, so that training starts at ln 2

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", alpha="[0, 1]")
        if self.alpha == 1 and not self.on_reference:
            raise UserError("on_reference = False does nothing with alpha = 1")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    public = batch.mask.sum(-1).amin(1)[:, None, None]  # (B, 1, 1) length of the shorter response
    tail = batch.mask.cumsum(-1) > public  # (B, 2, T) counted in response tokens

    def split(x):
        return torch.where(tail, cfg.alpha * x, x)

    ratio = split(logps) - (split(ref_logps) if cfg.on_reference else ref_logps)
    chosen, rejected = ratio.sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    share = (tail & batch.mask).sum() / batch.mask.sum()
    return losses, {"weight": torch.sigmoid(-z).detach().mean(), "tail": share.to(z.dtype)}


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)
