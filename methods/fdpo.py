"""f-DPO - Beyond Reverse KL: Generalizing Direct Preference Optimization with Diverse Divergence
Constraints (2023), arXiv:2309.16240

Under DPO's reverse KL the policy gives up responses of low reward; other f-divergences keep more
of their probability. If f' is unbounded below at 0, the reward is still a function of the ratio
u = pi / pi_ref, namely r = beta f'(u) + a constant of the prompt. DPO's loss then needs one
change: f'(u) replaces log u. With rho = log u and s(rho) = f'(exp(rho)), up to a constant:

    z = beta [ s(rho_w) - s(rho_l) ]
    loss = -log sigmoid(z)

Under forward KL and alpha, gradients are large at responses that became less likely, and small at
those that became more likely. Jensen-Shannon has slope 1/2 at the reference, so it needs twice
DPO's beta. Total variation and chi-squared are excluded, since f'(0) is finite.

Differences from the paper
1. Exponents are clamped at 40, since larger ones overflow the gradient norm in float32.
2. alpha is the paper's; since version 0.29, TRL's is 1 - alpha.

    python train.py --method fdpo --divergence rkl,js,fkl            fkl moves the least
    python train.py --method fdpo --divergence alpha --alpha 0.3     between rkl and fkl
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, check_fields, fill_variant, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
)

VARIANTS = dict(rkl=dict(), fkl=dict(), js=dict(), alpha=dict(alpha=0.5))
LARGEST = 40.0  # of an exponent: a gradient norm sums squares, and exp(45) squared overflows


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference; js needs twice as much
    divergence: str = "js"  # rkl (DPO), fkl, js or alpha
    alpha: float | None = None  # order of the alpha-divergence; 0 is rkl, 1 is fkl

    def __post_init__(self):
        fill_variant(self, VARIANTS, "divergence")
        check_fields(self, beta="(0, inf)", alpha="[0, 1]")

    @property
    def order(self):
        """The a in ds/drho = exp(-a rho); 0 where the slope of s is bounded."""
        return {"rkl": 0.0, "fkl": 1.0, "js": 0.0}.get(self.divergence, self.alpha)


def reverse_kl(rho, alpha):
    """KL(pi || pi_ref), which makes f-DPO DPO: f(u) = u log u, ds/drho = 1."""
    return rho


def forward_kl(rho, alpha):
    """KL(pi_ref || pi): f(u) = -log u, ds/drho = exp(-rho)."""
    return -torch.expm1((-rho).clamp(max=LARGEST))


def jensen_shannon(rho, alpha):
    """f(u) = u log u - (u + 1) log((u + 1) / 2), ds/drho = sigmoid(-rho).

    This is twice the usual Jensen-Shannon divergence.
    """
    return F.logsigmoid(rho)


def alpha_divergence(rho, alpha):
    """f(u) = (u^(1 - alpha) - (1 - alpha) u - alpha) / (alpha^2 - alpha).

    ds/drho = exp(-alpha rho)
    """
    return -torch.expm1((-alpha * rho).clamp(max=LARGEST)) / alpha if alpha else rho


DIVERGENCES = dict(rkl=reverse_kl, fkl=forward_kl, js=jensen_shannon, alpha=alpha_divergence)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    s = DIVERGENCES[cfg.divergence]
    z = cfg.beta * (s(chosen, cfg.alpha) - s(rejected, cfg.alpha))  # (B,) margin of the reward
    losses = -F.logsigmoid(z)
    clamped = -cfg.order * torch.stack([chosen, rejected]) > LARGEST
    return losses, {
        "weight": torch.sigmoid(-z).detach().mean(),
        "clamped": clamped.to(z.dtype).mean(),
    }


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)
