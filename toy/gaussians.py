"""Gaussians on a ring: the density is known, so it can be measured how far samples leave the data.

    prompt 0    response: a point such as (0.9, 0.1)    reward 0.9

Eight modes lie on the unit circle, in the plane or in a random plane of a D-dimensional space.
The only prompt is 0, and a response is one point (D,). The reward is the point's first coordinate
within the plane. On the data it is at most about 1, at one mode. Off the data it has no bound, so
it can be gamed by leaving the data: such a policy has a reward above 1 and an off-manifold share
that rises to 1. A policy that covers few modes has a low entropy over the modes.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from nanomodel import Denoiser
from toy import world

BIASED = (1.0, 0.15)  # weights of the two coordinates in the biased reward model


class MLP(Denoiser):
    """Denoiser of points (D,): two hidden layers on the point and 8 smooth features of the time.

    It does not read the class. The features are few on purpose: they resolve the smallest noise
    levels poorly, so the base model samples points between the modes, as larger models do on real
    data. With the UNet's features there are fewer such points, and DPO collapses to one mode before
    it leaves the data. kwargs: those of `Denoiser`.
    """

    def __init__(self, dim=2, width=96, **kwargs):
        super().__init__((dim,), 1, **kwargs)
        self.input = nn.Linear(dim + 8, width)
        self.hidden = nn.Linear(width, width)
        self.output = nn.Linear(width, dim)

    def forward(self, x, noise_level, label):
        """Points x (n, D), noise levels (n,), unused labels (n,) -> the network's output (n, D)."""
        # about t / T of the linear schedule: -log alpha_bar = log(1 + sigma^2) grows with the
        # square of t, up to 10
        time = (F.softplus(8 * noise_level) / 10).sqrt()[:, None]  # (n, 1)
        angle = math.pi * torch.cat([time, 2 * time, 4 * time, 8 * time], 1)  # (n, 4)
        h = F.silu(self.input(torch.cat([x, angle.sin(), angle.cos()], 1)))
        return self.output(F.silu(self.hidden(h)))


class World(world.World):
    """The world of this file.

    dim: the dimension D of the space around the ring, 2 or more. modes: their number.
    std: standard deviation of every mode in every direction. clean: the share of demonstrations
    from the ring; the others are from the uniform distribution of `points`. kwargs: those of the
    MLP. UserError: a value is out of range.
    """

    name, kind = "gaussians", "images"
    pretrain = dict(steps=3000, batch_size=512, lr=3e-3)
    align = dict(prompts=4096, steps=300, lr=1e-4, batch_size=256)
    gallery = [0] * 128  # samples.png shows eight points for each

    def __init__(self, dim=2, modes=8, std=0.1, clean=1.0, **kwargs):
        if dim < 2 or modes < 1 or std <= 0 or not 0 <= clean <= 1:
            raise UserError(
                f"dim {dim}, modes {modes}, std {std}, clean {clean}: "
                "expected dim >= 2, modes >= 1, std > 0, clean in [0, 1]"
            )
        self.dim, self.std, self.clean, self.kwargs = dim, std, clean, kwargs
        angle = torch.arange(modes, dtype=torch.float64) * (2 * math.pi / modes)
        ring = torch.stack([angle.cos(), angle.sin()], 1)  # (M, 2)
        rng = torch.Generator().manual_seed(0)
        random = torch.randn(dim, 2, generator=rng, dtype=torch.float64)
        plane = torch.linalg.qr(random)[0] if dim > 2 else torch.eye(2, dtype=torch.float64)
        self.plane = plane  # (D, 2), orthonormal
        self.modes = ring @ self.plane.T  # (M, D)

    def key(self):
        """All arguments that define this world."""
        return f"{self.dim} {self.modes.tolist()} {self.std} {self.clean} {self.kwargs}"

    def model(self):
        """A new MLP with about 0.01M parameters."""
        return MLP(self.dim, **self.kwargs)

    def prompts(self, n, rng):
        """The only prompt, 0, n times."""
        return [0] * n

    def points(self, n, rng, clean=1.0):
        """n random points (n, D), float32, each from the ring with probability `clean`.

        The others are uniform on the square [-1.5, 1.5]^2 of the plane; in all other directions
        they are normal with the modes' standard deviation.
        """
        mode = torch.randint(len(self.modes), (n,), generator=rng)
        noise = self.std * torch.randn(n, self.dim, generator=rng, dtype=torch.float64)
        square = 3 * torch.rand(n, 2, generator=rng, dtype=torch.float64) - 1.5
        stray = torch.rand(n, 1, generator=rng) >= clean
        off_plane = noise - noise @ self.plane @ self.plane.T
        strays = square @ self.plane.T + off_plane
        return torch.where(stray, strays, self.modes[mode] + noise).float()

    def contaminated(self, n, rng):
        """n points (n, D), 70 % from the ring and 30 % uniform: the flawed training set of DDO."""
        return self.points(n, rng, clean=0.7)

    def demonstrations(self, n, rng):
        """n rows of one point (1, D)."""
        points = self.points(n, rng, self.clean)[:, None]
        return [dict(prompt=0, responses=x, scores=[1.0]) for x in points]

    def reward(self, prompts, responses):
        """The true reward of n points, (n,) float64: the first coordinate within the plane.

        That is x[0] for D = 2. It is 0 for points that are not finite.
        """
        return (points(responses) @ self.plane[:, 0]).nan_to_num(0.0, 0.0, 0.0)

    def log_density(self, x):
        """The exact log density (n,), float64, of the clean mixture at points (n, D)."""
        square = torch.cdist(points(x), self.modes).square()  # (n, M)
        constant = self.dim / 2 * math.log(2 * math.pi * self.std**2) + math.log(len(self.modes))
        return torch.logsumexp(-square / (2 * self.std**2), 1) - constant

    def off_manifold(self, x):
        """The share of points (n, D) that lie farther from every mode than about 99 % of the data.

        In the plane this radius is 3 std. For D > 2 it grows like the length of a normal vector, by
        Fisher's approximation of the chi distribution.
        """
        radius = 3 + (math.sqrt(2 * self.dim - 1) - math.sqrt(3)) / math.sqrt(2)
        near = self._nearest(x)[0] <= radius * self.std  # false for NaN
        return (~near).double().mean().item()

    def mode_entropy(self, x):
        """Normalized entropy of the nearest modes of points (n, D): 1 = uniform, 0 = one mode."""
        share = self._nearest(x)[1].bincount(minlength=len(self.modes)).double() / len(x)
        return (-torch.special.xlogy(share, share).sum() / math.log(max(2, len(self.modes)))).item()

    def _nearest(self, x):
        return torch.cdist(points(x), self.modes).min(1)

    @property
    def proxies(self):
        """{"biased"}: a reward model that also likes the second coordinate within the plane."""
        return {"biased": lambda prompts, x: points(x) @ self.plane @ self.plane.new_tensor(BIASED)}

    def look(self, policy, lab):
        """{off_manifold} of 1,000 samples."""
        x = policy.sample([0], 1000, lab.eval_rng("look"), steps=25)[0]
        return {"off_manifold": self.off_manifold(x)}

    def measure(self, policy, lab):
        """{off_manifold, mode_entropy} of 4,000 samples."""
        x = policy.sample([0], 4000, lab.rng("measure"), steps=50)[0]
        return {"off_manifold": self.off_manifold(x), "mode_entropy": self.mode_entropy(x)}

    def picture(self, before, after):
        """A Figure of the points (n, k, D) of two models, in the plane of the ring.

        Circles are 3 std around the modes. A point farther than 2 from the origin in a coordinate
        is drawn at the edge.
        """
        from matplotlib.figure import Figure
        from matplotlib.patches import Circle

        figure = Figure(figsize=(9, 4.8), layout="constrained")
        for axes, x, title in zip(figure.subplots(1, 2), (before, after), ("before", "after")):
            x = points(x.flatten(0, 1))
            mean, off = self.reward([0] * len(x), x).mean(), self.off_manifold(x)
            axes.scatter(*(x @ self.plane).nan_to_num(0.0).clamp(-2, 2).T, s=3, alpha=0.5)
            for mode in self.modes @ self.plane:
                axes.add_patch(Circle(mode.tolist(), 3 * self.std, fill=False, color="0.5"))
            axes.set(xlim=(-2.05, 2.05), ylim=(-2.05, 2.05), aspect="equal")
            axes.set_title(f"{title} (mean reward {mean:.2f}, {off:.0%} off the ring)", fontsize=10)
            axes.set_xlabel("first coordinate, the reward", fontsize=8)
        return figure


def points(x):
    """Responses, a tensor (n, D) or a list of points (D,), as float64 on the CPU."""
    return (x if isinstance(x, torch.Tensor) else torch.stack(list(x))).detach().cpu().double()
