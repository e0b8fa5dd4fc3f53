"""GRPO - DeepSeekMath: Pushing the Limits of Mathematical Reasoning in Open Language Models (2024),
arXiv:2402.03300

Group relative policy optimization is PPO without a value network: the mean reward of K responses to
one question is the baseline. Two successors are variants of it. Dr. GRPO (arXiv:2503.20783) drops
the divisions by the group's standard deviation and by the response's length, which bias GRPO. DAPO
(arXiv:2503.14476) averages over all tokens and clips high ratios less. With rho = pi / pi_old per
token,

    A   = (r - mean r) / std r over the group                            (dr_grpo: r - mean r)
    J_t = min( rho_t A, clip(rho_t, 1 - epsilon, 1 + epsilon_high) A )
    loss = -mean_k 1/|y_k| sum_t J_t                                                    (grpo)
    loss = -mean_k sum_t J_t / normaliser                                            (dr_grpo)
    loss = -mean of J_t over all tokens of the batch                                    (dapo)

Differences from the papers
1. The KL penalty of GRPO to a reference model is left out; the two successors have none.
2. DAPO's dynamic sampling, which replaces groups without a gradient, and its length penalty are
   left out.

    python train.py --method grpo                                the success rate rises
    python train.py --method grpo --variant grpo,dr_grpo,dapo    the three side by side
"""

from dataclasses import dataclass

import torch

from data import Paper, check_fields, fill_variant, upcast

PAPER = Paper(
    "baseline",
    worlds=("text",),
    needs="verifier",
    defaults=dict(world="arithmetic", steps=160, batch_size=16, lr=3e-4),
)
VARIANTS = dict(
    grpo=dict(epsilon=0.2),
    dr_grpo=dict(epsilon=0.2, normaliser=48.0),
    dapo=dict(epsilon=0.2, epsilon_high=0.28),
)


@dataclass(frozen=True)
class Config:
    variant: str = "grpo"  # grpo, dr_grpo or dapo
    epsilon: float | None = None  # the ratio is clipped to 1 - epsilon and 1 + epsilon
    epsilon_high: float | None = None  # dapo: the ratio is clipped to 1 + epsilon_high
    normaliser: float | None = None  # dr_grpo: the constant that divides sums over tokens

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(self, epsilon="[0, inf)", epsilon_high="[0, inf)", normaliser="(0, inf)")


def advantages(rewards, present, scale):
    """Rewards minus the mean of their group, and with `scale` divided by its deviation: (B, K).

    present (B, K) bool: an absent response is not part of its group, and its advantage is unused.
    """
    count = present.sum(1, keepdim=True).clamp(min=1)
    centered = rewards - (rewards * present).sum(1, keepdim=True) / count
    if not scale:
        return centered
    variance = (centered.square() * present).sum(1, keepdim=True) / count
    return centered / variance.sqrt().clamp(min=1e-6)  # all rewards equal: 0, not 0 / 0


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T) of pi and pi_old, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = upcast(logps, ref_logps)
    present, length, tokens = batch.mask.any(-1), batch.mask.sum(-1), batch.mask.sum()
    rewards = batch.scores.to(logps.dtype)
    A = advantages(rewards, present, scale=cfg.variant != "dr_grpo")[..., None]  # (B, K, 1)
    change = logps - ref_logps
    ratio = change.clamp(max=60.0).exp()  # (B, K, T); float32 ends at 88, and 0 * inf is NaN
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    clipped = ratio.clamp(1 - cfg.epsilon, 1 + high)
    J = torch.minimum(ratio * A, clipped * A) * batch.mask  # (B, K, T)
    if cfg.variant == "dapo":
        losses = -J.sum((1, 2)) * len(J) / tokens  # (B,): their mean is one mean over all tokens
    else:
        divisor = length.clamp(min=1) if cfg.variant == "grpo" else cfg.normaliser
        losses = -(J.sum(-1) / divisor).sum(1) / present.sum(1).clamp(min=1)
    mixed = (A.squeeze(-1) * present != 0).any(1)  # the groups with a gradient
    metrics = {"round_kl": -(change.detach().sum() / tokens), "mixed": mixed.to(logps.dtype).mean()}
    return losses, metrics


def questions(lab):
    """The number of questions per round: --prompts, by default those of four optimizer steps."""
    return lab.settings.prompts or 4 * lab.batch_size


def rollout(lab, policy, round):
    """Groups of --k responses of the policy to fresh questions, scored by the verifier."""
    return lab.preferences(policy, k=lab.k, n=questions(lab), ties=True)


def run(lab, cfg):
    policy = lab.base()
    every = -(-questions(lab) // lab.batch_size)  # optimizer steps per round

    def data(policy, round):
        return rollout(lab, policy, round)

    return lab.align(policy, data, loss, cfg, reference="round", every=every)
