"""SmPO - Smoothed Preference Optimization via ReNoise Inversion for Aligning Diffusion Models with
Varied Human Preferences (2025), arXiv:2506.02698

A binary label asks for a margin even if both images are equally good. SmPO scores all images with a
reward model r, scaled to [0, 1] by its extremes. The image with the larger r is chosen, and the
margin gets a weight that is 0 at a tie:

    p     = exp(r_w) / (exp(r_w) + exp(r_l))
    omega = gamma (2 p - 1) = gamma tanh((r_w - r_l) / 2)                                   (eq. 9)
    z     = omega beta [ log p(y_w) / p_ref(y_w) - log p(y_l) / p_ref(y_l) ]
    loss  = -log sigmoid(z)

Log-probs are scored at DDIM inversions by the current policy, as in InPO. ReNoise evaluates each
step of the inversion again at its result and averages both; the inversion errs less, and the reward
hardly changes.

Differences from the paper
1. Training steps t lie on the inversion's grid.
2. Errors are summed over the image, not averaged, so beta is smaller.

    python train.py --method smpo                           human labels are replaced
    python train.py --method smpo --rater proxy             a biased reward model
    python train.py --method smpo --renoise false           plain DDIM inversion
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair, reorder
from diffusion import spread, to_eps

PAPER = Paper(
    "images",
    worlds=("images",),
    needs="reward",
    ignores=("k", "flip", "label_temperature", "length_bias"),
    defaults=dict(world="gaussians", steps=200),
)


@dataclass(frozen=True)
class Config:
    beta: float = 1.25  # strength of the pull to the reference, on summed errors
    gamma: float = 10.0  # sensitivity of the weight to a difference of rewards; 10 in the code
    rater: str = "truth"  # reward model: truth (the true reward), or proxy (the world's first)
    inversion_steps: int = 10  # steps of DDIM inversion from an image to pure noise
    renoise: bool = True  # whether each step of the inversion is evaluated again and averaged

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", gamma="(0, inf)", inversion_steps="[1, 100]")
        check_fields(self, rater=("truth", "proxy"))


def weights(first, second, low, high, gamma):
    """omega (n,) of pairs of rewards (n,) whose data have rewards from `low` to `high`.

    It is negative where the second reward is larger. UserError: a reward outside low and high, or
    all rewards are equal.
    """
    if not low < high:
        raise UserError(f"all rewards are {low:g}, so no image is better than another one")
    both = torch.stack([first, second])
    if both.min() < low or both.max() > high:
        raise UserError(f"rewards from {both.min():g} to {both.max():g}, not {low:g} to {high:g}")
    scaled = (both - low) / (high - low)
    return gamma * torch.tanh((scaled[0] - scaled[1]) / 2)  # eq. 9


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    batch.omega: (B,), the weights of the margins.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = batch.omega * cfg.beta * (chosen - rejected)  # (B,) inside the sigmoid, not outside
    losses = -F.logsigmoid(z)
    return losses, {"omega": batch.omega.mean()}


def relabelled(rows, rewards, cfg):
    """The rows with the image of the larger reward first, and a column `omega`.

    rewards: (n, 2), by the reward model; its extremes are those of all rows.
    """
    omega = weights(*rewards.unbind(1), rewards.min(), rewards.max(), cfg.gamma)
    return [
        reorder(row, [0, 1] if w >= 0 else [1, 0]) | {"scores": [1.0, 0.0], "omega": abs(w)}
        for row, w in zip(rows, omega.tolist())
    ]


def reward_model(world, name):
    """The function (prompts, images) -> rewards (n,) of a rater. UserError: the world has none."""
    if name == "truth":
        return world.reward
    if not world.proxies:
        raise UserError(f"rater = proxy: {world.name} has no proxy of its reward")
    return next(iter(world.proxies.values()))


def rated(rows, rater):
    """The rewards (n, 2) of a reward model for the responses of pairs."""
    prompts = [row["prompt"] for row in rows for _ in row["responses"]]
    return rater(prompts, torch.cat([row["responses"] for row in rows])).view(-1, 2)


def at_random_steps(model, batch, latents, times, rng):
    """The batch with a step t (B,) of the grid for each row and the noise tau that leads there.

    latents: (B, K, S, *shape), the images at all S steps `times` (S, 1).
    """
    place = torch.randint(len(times), (len(latents),), generator=rng).to(latents.device)
    x = latents[torch.arange(len(latents), device=place.device), :, place]  # (B, K, *shape)
    batch.t = times[place, 0]
    # the noise of x_t if its image is x_0; `logps` rebuilds x_t from it
    batch.noise = to_eps("x0", batch.images, x, spread(model.alpha_bar[batch.t], x))
    return batch


def inversion(lab, cfg):
    """A `prepare` for `lab.align` that inverts images with the policy instead of adding noise."""
    how = dict(rounds=2, average=True) if cfg.renoise else {}

    def prepare(policy, batch):
        times = policy.times(cfg.inversion_steps)
        latents = policy.latents(batch.images, times, batch.label, **how)
        return at_random_steps(policy, batch, latents, times, lab.rng("noise", lab.step))

    return prepare


def run(lab, cfg):
    rater = reward_model(lab.world, cfg.rater)
    policy = lab.base()
    pairs = lab.preferences(policy, k=2)
    rewards = rated(pairs, rater)
    agreed = ((rewards[:, 0] > rewards[:, 1]) + 0.5 * (rewards[:, 0] == rewards[:, 1])).mean()
    lab.say(f"the reward model, which replaces the labels, agrees with {agreed:.0%} of them")
    rows = lab.rows(relabelled(pairs, rewards, cfg))
    return lab.align(policy, rows, loss, cfg, prepare=inversion(lab, cfg))
