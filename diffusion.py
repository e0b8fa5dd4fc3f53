"""The noise process as pure functions: schedules, noise levels, predictions and DDIM.

A noisy image is

    x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) eps        eps ~ N(0, I)

and alpha_bar, the signal's share of the variance, falls from 1 (the image) to 0 (pure noise).
The arguments `a` and `b` are values of alpha_bar in a shape that broadcasts over the images, as
`spread(levels, x)` returns them.
"""

import math

import torch

from data import UserError

SCHEDULES = ("linear", "scaled_linear", "cosine", "flow")
PREDICTIONS = ("eps", "x0", "v_vp", "v_flow", "u", "edm")


def spread(values, x):
    """One number per image, (n,) or (n, K), in a shape that broadcasts over the images x.

    x: (n, ...) or (n, K, ...); the result has as many dimensions as x.
    """
    return values.reshape(*values.shape, *[1] * (x.dim() - values.dim()))


# ---------------------------------------------------------------- schedules


def alpha_bar(schedule="linear", steps=1000):
    """alpha_bar after each of `steps` noise steps: (steps,) float64, decreasing.

    schedule: "linear" (DDPM, Ho et al. 2020), "scaled_linear" (Stable Diffusion: linear in the
    square root of beta), "cosine" (Nichol & Dhariwal 2021) or "flow" (flow matching: step i has
    the time t = 1 - i / (steps + 1) of `to_flow`, so that DDIM is Euler's method on straight
    paths). UserError: any other name.
    """
    if schedule == "cosine":
        angle = (torch.arange(steps, dtype=torch.float64) / steps + 0.008) / 1.008 * math.pi / 2
        # without the clamp, step 0 would have no noise, and ln(sigma) would be -inf
        return (angle.cos() / angle[0].cos()).square().clamp(max=1 - 1e-5)
    if schedule == "flow":
        return from_flow(1 - torch.arange(1, steps + 1, dtype=torch.float64) / (steps + 1))
    if schedule == "linear":
        beta = torch.linspace(1e-4, 2e-2, steps, dtype=torch.float64)
    elif schedule == "scaled_linear":
        beta = torch.linspace(0.00085**0.5, 0.012**0.5, steps, dtype=torch.float64) ** 2
    else:
        raise UserError(f"schedule = {schedule!r}: expected one of {', '.join(SCHEDULES)}")
    return (1 - beta).cumprod(0)


# ---------------------------------------------------------------- conventions of the noise level


def to_sigma(a):
    """EDM's noise level sigma, with x_t / sqrt(alpha_bar) = x0 + sigma eps (Karras et al. 2022)."""
    return ((1 - a) / a).sqrt()


def from_sigma(sigma):
    """alpha_bar of EDM's noise level sigma."""
    return 1 / (1 + sigma**2)


def to_flow(a):
    """Flow matching's time t, which is 1 at the image.

    x_t / (sqrt(alpha_bar) + sqrt(1 - alpha_bar)) = t x0 + (1 - t) eps
    """
    return 1 / (1 + to_sigma(a))


def from_flow(t):
    """alpha_bar of flow matching's time t in (0, 1]."""
    return from_sigma((1 - t) / t)


def q_sample(x0, eps, a):
    """The noisy image x_t of the image x0 and the noise eps at level a."""
    return a.sqrt() * x0 + (1 - a).sqrt() * eps


# ---------------------------------------------------------------- what a network predicts


def mixture(kind, a, k=0.5, sd=1.0):
    """The coefficients (c, d) of a network that predicts c x0 + d eps at level a.

    kind: "eps"; "x0"; "v_vp" = sqrt(a) eps - sqrt(1 - a) x0 (Salimans & Ho 2022); "v_flow" =
    x0 - eps; "u" = k x0 - (1 - k) eps (k-Diff); "edm" = the raw output F of Karras et al. (2022)
    for data of standard deviation sd. UserError: any other name.
    """
    if kind == "v_vp":
        return -(1 - a).sqrt(), a.sqrt()
    if kind == "edm":
        sigma = to_sigma(a)
        norm = (sigma**2 + sd**2).sqrt()
        return sigma / (sd * norm), -sd / norm
    constant = {"eps": (0.0, 1.0), "x0": (1.0, 0.0), "v_flow": (1.0, -1.0), "u": (k, k - 1.0)}
    if kind not in constant:
        raise UserError(f"prediction = {kind!r}: expected one of {', '.join(PREDICTIONS)}")
    return constant[kind]


# x_t and the prediction are two linear equations in x0 and eps, solved once for every kind


def to_x0(kind, output, x, a, **kwargs):
    """The image that a network's output implies, given the noisy image x at level a.

    kind, kwargs: as in `mixture`. The result has the shape of x.
    """
    c, d = mixture(kind, a, **kwargs)
    return (d * x - (1 - a).sqrt() * output) / (d * a.sqrt() - c * (1 - a).sqrt())


def to_eps(kind, output, x, a, **kwargs):
    """The noise that a network's output implies, with the arguments of `to_x0`."""
    c, d = mixture(kind, a, **kwargs)
    return (a.sqrt() * output - c * x) / (d * a.sqrt() - c * (1 - a).sqrt())


def edm(sigma, sd):
    """c_skip, c_out, c_in, c_noise of D(x) = c_skip x + c_out F(c_in x, c_noise).

    They are from Karras et al. (2022), table 1, for data of standard deviation sd. The loss weight
    of D's squared error is 1 / c_out^2.
    """
    total = sigma**2 + sd**2
    return sd**2 / total, sigma * sd / total.sqrt(), 1 / total.sqrt(), sigma.log() / 4


# ---------------------------------------------------------------- the reverse process


def ddim_step(x, eps, a, b, eta=0.0, z=None):
    """One step of DDIM (Song et al. 2021, eq. 12) from level a to level b, given the noise eps.

    With b > a the step goes towards the image, with b < a away from it (inversion). With eta > 0
    the step is random: given standard normal noise z of the shape of x it returns a sample, and
    without z it returns (mean, standard deviation). eta = 1 has DDPM's posterior variance. x0 is
    never clipped, so that densities and inversion stay exact.
    """
    variance = eta**2 * (1 - b) / (1 - a) * (1 - a / b) if eta else 0.0
    mean = b.sqrt() * to_x0("eps", eps, x, a) + (1 - b - variance).sqrt() * eps
    if not eta:
        return mean
    return mean + variance.sqrt() * z if z is not None else (mean, variance.sqrt())


def ddim_logprob(x_next, x, eps, a, b, eta):
    """log p(x_next | x) of one random DDIM step: (n,), summed over the dimensions of an image.

    Source: D3PO (Yang et al. 2023), algorithm 1. UserError: eta = 0, since a deterministic step has
    no density.
    """
    if eta <= 0:
        raise UserError(f"eta = {eta}: a deterministic step has no density, expected eta > 0")
    mean, std = ddim_step(x, eps, a, b, eta)
    logp = -((x_next - mean) ** 2) / (2 * std**2) - std.log() - 0.5 * math.log(2 * math.pi)
    return logp.flatten(1).sum(1)
