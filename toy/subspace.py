"""Points near a plane in many dimensions: what a denoiser must find out about the data.

    prompt 0    response: a point of 64 numbers, 0.3 from the nearest mode    reward -0.3

A point is x = Q z: z has d coordinates (the intrinsic dimension), each -0.98 or 0.98 plus normal
noise of standard deviation 0.2, so that its variance is 1, and Q is a fixed random orthonormal
matrix D x d into the ambient dimension D. The only prompt is 0. The reward is minus the distance
from the nearest of the 2^d modes. Its largest value, 0, is at a mode, so it cannot be gamed, except
by points without the noise of the data. `measure` reports the distance from the subspace, which is
0 for the data, and the error within it.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from nanomodel import Denoiser
from toy import world
from toy.gaussians import points

MODE, STD = 0.98, 0.2  # where the modes of a coordinate are, and their standard deviation


class MLP(Denoiser):
    """Denoiser of points (D,): two hidden layers on the point and 8 smooth features of the time.

    The time is that of flow matching. The class is not read. The output begins at 0.
    """

    def __init__(self, dim, width=128, **kwargs):
        super().__init__((dim,), 1, **kwargs)
        self.input, self.hidden = nn.Linear(dim + 8, width), nn.Linear(width, width)
        self.output = nn.Linear(width, dim)
        nn.init.zeros_(self.output.weight)
        nn.init.zeros_(self.output.bias)

    def forward(self, x, noise_level, label):
        """Points x (n, D), noise levels (n,), unused labels (n,) -> the network's output (n, D)."""
        time = torch.sigmoid(-4 * noise_level)[:, None]  # t = 1 / (1 + sigma), 1 at the data
        angle = math.pi * torch.cat([time, 2 * time, 4 * time, 8 * time], 1)  # (n, 4)
        h = F.silu(self.input(torch.cat([x, angle.sin(), angle.cos()], 1)))
        return self.output(F.silu(self.hidden(h)))


class World(world.World):
    """The world of this file.

    ambient: the dimension D of a point. intrinsic: the dimension d of the subspace. UserError: not
    1 <= intrinsic <= ambient.
    """

    name, kind = "subspace", "images"
    pretrain = dict(steps=800, batch_size=256, lr=2e-3)
    align = dict(prompts=1024, steps=100, lr=1e-4, batch_size=128)

    def __init__(self, ambient=64, intrinsic=2):
        if not 1 <= intrinsic <= ambient:
            raise UserError(f"ambient {ambient}, intrinsic {intrinsic}: expected 1 <= d <= D")
        self.ambient, self.intrinsic = ambient, intrinsic
        rng = torch.Generator().manual_seed(0)
        random = torch.randn(ambient, intrinsic, generator=rng, dtype=torch.float64)
        self.basis = torch.linalg.qr(random)[0]  # Q (D, d), orthonormal

    def key(self):
        """All arguments that define this world."""
        return f"{self.ambient} {self.intrinsic}"

    def model(self):
        """A new MLP."""
        return MLP(self.ambient, prediction="v_vp")

    def prompts(self, n, rng):
        """The only prompt, 0, n times."""
        return [0] * n

    def points(self, n, rng):
        """n random points of the data (n, D), float32."""
        side = 2.0 * torch.randint(2, (n, self.intrinsic), generator=rng) - 1
        noise = torch.randn(n, self.intrinsic, generator=rng, dtype=torch.float64)
        return ((MODE * side + STD * noise) @ self.basis.T).float()

    def demonstrations(self, n, rng):
        """n rows of one point (1, D)."""
        points = self.points(n, rng)[:, None]
        return [dict(prompt=0, responses=x, scores=[1.0]) for x in points]

    def reward(self, prompts, responses):
        """The true reward of n points, (n,) float64: minus the distance from the nearest mode.

        A point that is not finite is taken as 0 where it is not.
        """
        x = points(responses).nan_to_num(0.0, 0.0, 0.0)
        side = torch.where(x @ self.basis >= 0, MODE, -MODE).double()
        return -(x - side @ self.basis.T).square().sum(1).sqrt()

    def distances(self, x):
        """{off_subspace, latent} of points (n, D): root mean squares.

        off_subspace: the distance from the subspace. latent: the distance of a coordinate from its
        nearest mode, which is 0.2 for the data.
        """
        x = points(x)
        z = x @ self.basis
        off = (x - z @ self.basis.T).square().sum(1).mean().sqrt()
        latent = (z.abs() - MODE).square().mean().sqrt()
        return {"off_subspace": off.item(), "latent": latent.item()}

    def measure(self, policy, lab):
        """The `distances` of 1,000 samples."""
        return self.distances(policy.sample([0], 1000, lab.rng("measure"), steps=40)[0])
