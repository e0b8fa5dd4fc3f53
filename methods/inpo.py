"""InPO - Inversion Preference Optimization with Reparametrized DDIM for Efficient Diffusion Model
Alignment (2025), arXiv:2503.18454

Diffusion-DPO adds random noise to both images of a pair, although the sampler would never turn this
noise into these images. By DDIM inversion, InPO finds the noisy image x_t from which the model
itself generates the image x_0, and applies DPO's loss there. The noise tau from x_0 to x_t replaces
the random noise:

    x_t = DDIM inversion of x_0 up to step t
    tau = (x_t - sqrt(alpha_bar) x_0) / sqrt(1 - alpha_bar)
    log p(x_0) = -|eps(x_t, t) - tau|^2
    loss = DPO's

Each image has its own tau. No gradient passes through the inversion.

Differences from the paper
1. Training steps t lie on the grid of the inversion; the official code scores at another t.
2. Errors are summed over the image, not averaged, so beta is smaller.
3. The official code's optional noise in the inversion is left out.
4. The reference can invert; its inversions are computed once.

    python train.py --method inpo                           the reward, and points off the ring
    python train.py --method inpo --inverter reference      fewer of them, and faster steps
    python train.py --method dpo,inpo --dpo.beta 2.5 --world gaussians
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, check_fields, pair
from diffusion import spread, to_eps

PAPER = Paper(
    "images",
    worlds=("images",),
    ignores=("k",),
    defaults=dict(world="gaussians", label_temperature=0.25),
)


@dataclass(frozen=True)
class Config:
    beta: float = 2.5  # strength of the pull to the reference, on summed errors
    inversion_steps: int = 10  # steps of DDIM inversion from an image to pure noise
    inverter: str = "policy"  # whose inversion: policy (the current one) or reference (once)

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", inversion_steps="[1, 100]")
        check_fields(self, inverter=("policy", "reference"))


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


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


def with_latents(lab, model, rows, cfg):
    """The rows with a column `latents` (K, S, *shape), the inversions of a model that stays."""
    found = []
    for start in lab.pieces("inversion", len(rows), lab.batch_size):
        batch = lab.collate(rows[start : start + lab.batch_size])
        times = model.times(cfg.inversion_steps)
        found += model.latents(batch.images, times, batch.label).cpu().unbind(0)
    return [row | {"latents": x} for row, x in zip(rows, found)]


def inverted(lab, policy, rows, cfg):
    """Rows and a `prepare` for `lab.align` that inverts images instead of adding noise."""
    cached = cfg.inverter == "reference"
    if cached:
        rows = with_latents(lab, policy, rows, cfg)

    def prepare(policy, batch):
        times = policy.times(cfg.inversion_steps)
        latents = batch.latents if cached else policy.latents(batch.images, times, batch.label)
        return at_random_steps(policy, batch, latents, times, lab.rng("noise", lab.step))

    return rows, prepare


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    rows, prepare = inverted(lab, policy, data, cfg)
    return lab.align(policy, rows, loss, cfg, prepare=prepare)
