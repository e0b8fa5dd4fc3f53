"""k-Diff - Revisiting Diffusion Model Predictions Through Dimensionality (2026), arXiv:2601.21419

k-Diff puts the targets of a denoiser (noise, velocity, image) on one line and learns the place k
with the network:

    x_t = t x + (1-t) n                                       t: 0 noise n, 1 image x
    u   = k x - (1-k) n                                       k: 0 noise, 1/2 velocity, 1 image
    v   = (u + (1-2k) x_t) / (k (1-t) + (1-k) t)              the velocity that u implies
    loss = |v - (x-n)|^2,   k = sigmoid(w)

For data of intrinsic dimension d in D dimensions, the target u has the least energy at
k* = D/(D+d), the velocity if d = D and nearly the image if d is small. At the network's optimum k
has no gradient, so it depends on the course of training. The model is trained from scratch, without
preferences.

Differences from the paper
1. We had no access to training details; the velocity-space loss is our reading.
2. Steps, batch size and learning rate default to the base model's.

    python train.py --method kdiff                          k rises towards 64/66
    python train.py --method kdiff --fixed_k 0,0.5,1        fixed targets
    python train.py --method kdiff --world digits           k between velocity and image
"""

from dataclasses import dataclass

import torch
from torch import nn

from data import Paper, UserError, check_fields, fill_variant
from diffusion import q_sample, spread, to_flow, to_sigma
from nanomodel import Denoiser

PAPER = Paper(
    "beyond",
    worlds=("images",),
    needs="demonstrations",
    ignores=(
        "k",
        "flip",
        "label_temperature",
        "length_bias",
        "prompts",
        "init",
        "guidance",
        "eval_every",
    ),
    defaults=dict(world="subspace"),
    core=("optimal_k", "target_energy", "velocity", "flow_loss", "flow_steps"),
)
SPACES = dict.fromkeys(("velocity", "target"), dict(lr_k=0.05))  # lr_k is read if k is learned


@dataclass(frozen=True)
class Config:
    fixed_k: float | None = (
        None  # a fixed k: 0 noise, 0.5 velocity, 1 image; without it, k is learned
    )
    # learning rate of w in k = sigmoid(w); it needs a larger one than the network
    lr_k: float | None = None
    space: str = "velocity"  # where errors are measured: velocity, or target (of u, an ablation)
    t_mean: float = 0.0  # the training times t are sigmoids of normal numbers with this mean
    t_std: float = 1.0  # their standard deviation

    def __post_init__(self):
        if self.fixed_k is None:
            fill_variant(self, SPACES, "space")
        elif self.lr_k is not None:
            raise UserError(f"lr_k = {self.lr_k} does nothing with fixed_k = {self.fixed_k}")
        check_fields(self, fixed_k="[0, 1]", lr_k="(0, inf)", space=("velocity", "target"))
        check_fields(self, t_mean="(-inf, inf)", t_std="(0, inf)")


class KDiff(Denoiser):
    """A network that predicts u; `net` is a Denoiser whose raw output is read as u.

    fixed_k: k, or None for a learned one, which begins at 1/2.
    """

    def __init__(self, net, fixed_k=None):
        super().__init__(net.shape, net.classes, "u", schedule="flow")
        self.net, self.fixed_k = net, fixed_k
        self.w = nn.Parameter(torch.zeros(())) if fixed_k is None else None

    @property
    def k(self):
        return torch.sigmoid(self.w) if self.fixed_k is None else self.fixed_k

    def forward(self, x, noise_level, label):
        return self.net(x, noise_level, label)


def optimal_k(ambient, intrinsic, variance=1.0):
    """k* = D / (D + s^2 d), where `target_energy` is smallest."""
    return ambient / (ambient + variance * intrinsic)


def target_energy(k, ambient, intrinsic, variance=1.0):
    """E |u|^2 of data with a variance s^2 in each of d directions of D."""
    return k**2 * variance * intrinsic + (1 - k) ** 2 * ambient


def velocity(u, x_t, t, k):
    """The velocity x - n that a prediction u implies, given x_t = t x + (1 - t) n."""
    return (u + (1 - 2 * k) * x_t) / (k * (1 - t) + (1 - k) * t)


def flow_loss(u, x, n, t, k, space):
    """The squared error of a prediction u (B, ...), summed over the image: (B,)."""
    if space == "target":
        error = u - (k * x - (1 - k) * n)
    else:
        error = velocity(u, t * x + (1 - t) * n, t, k) - (x - n)
    return error.square().flatten(1).sum(1)


def flow_steps(normal, mean, std, steps):
    """Steps (B,) of the schedule "flow" from normal numbers (B,), with t from 0.02 to 0.98."""
    t = torch.sigmoid(mean + std * normal).clamp(0.02, 0.98)
    return ((1 - t) * (steps + 1)).round().long() - 1


def train(lab, model, cfg, steps, batch_size, lr, watch=None):
    """Train a KDiff on fresh demonstrations and return it. watch: as in `lab.fit`."""

    def times(n, rng):
        normal = torch.randn(n, generator=rng)
        return flow_steps(normal, cfg.t_mean, cfg.t_std, len(model.alpha_bar))

    def batches(step):
        rows = lab.world.demonstrations(batch_size, lab.rng("demonstrations", step))
        return model.prepare(lab.collate(rows), lab.rng("noise", step), times=times)

    def loss(model, batch):
        x, n, level = batch.images[:, 0], batch.noise[:, 0], model.alpha_bar[batch.t]
        x_t = q_sample(x, n, spread(level, x))  # the network's input has about unit variance
        u = model(x_t, to_sigma(level).log() / 4, batch.label)
        losses = flow_loss(u, x, n, spread(to_flow(level), x), model.k, cfg.space)
        k = torch.as_tensor(model.k, dtype=u.dtype, device=u.device)
        return losses / x[0].numel(), {"k": k.detach()}

    def optimizer(params):
        """w has a learning rate of its own, and no weight decay, which would pull k to 1/2."""
        groups = [dict(params=[p for p in params if p is not model.w], lr=lr)]
        groups += [dict(params=[model.w], lr=cfg.lr_k)] if cfg.fixed_k is None else []
        return (lab.optimizer or torch.optim.Adam)(groups, lr=lr)

    how = dict(steps=steps, optimizer=optimizer, decay=True, ema=lab.settings.ema, watch=watch)
    return lab.fit(model, batches, loss, **how)


def evaluate(lab, model):
    """The evaluation of the Lab, and of a KDiff its k."""
    k = {"k": float(torch.as_tensor(model.k).detach())} if isinstance(model, KDiff) else {}
    return lab.evaluate(model) | k


def run(lab, cfg):
    model = KDiff(lab.base(stage="raw"), cfg.fixed_k).to(lab.device)
    recipe = {name: getattr(lab, name) for name in ("steps", "batch_size", "lr")}
    own = {k: v for k, v in (lab.world.pretrain or {}).items() if k in recipe}
    given = {k: getattr(lab.settings, k) for k in recipe}
    recipe |= own | {k: v for k, v in given.items() if v is not None}
    lab.say("trained from scratch: " + "  ".join(f"{k} {v:g}" for k, v in recipe.items()))
    lab.steps = recipe["steps"] = lab.few(recipe["steps"])

    def watch(model, step):
        if step % max(1, lab.steps // 5) == 0:
            lab.keep_pictures(model, step)
        return {"k": float(torch.as_tensor(model.k).detach())}

    return train(lab, model, cfg, **recipe, watch=watch)
