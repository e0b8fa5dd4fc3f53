"""Glyphs: small drawings with three qualities, and a context that says which one counts most.

    prompt 4 (ring, crisp)    response: an image (1, 8, 8) from -1 to 1    reward -4.2 to 4.2

A prompt is one of four shapes (cross, ring, bar, dot) in one of three contexts (exact, crisp,
dark): 3 * shape + context. Three scores from -3 to 3 are read off an image: how well the best
placed stencil of the shape fits, how little there is besides a stencil, and how near the brightness
is to the context's. The reward is their sum with the weight 1 for the score that the context names
and 0.2 for the others, so it is continuous and bounded. A quarter of the demonstrations show a
random shape, and many are faint, blurred or noisy, which leaves room above them. The second score
accepts any stencil, so a policy can game the contexts crisp and dark by drawing a simpler shape
than it was asked for: the score "exact" then falls while the reward rises. The Frechet distance to
the demonstrations shows what a policy gives up.
"""

import itertools

import torch
import torch.nn.functional as F

from nanomodel import UNet, UNetConfig
from toy import digits, world

SHAPES = ("cross", "ring", "bar", "dot")
WEIGHTS = dict(exact=(1.0, 0.2, 0.2), crisp=(0.2, 1.0, 0.2), dark=(0.2, 0.2, 1.0))  # of the scores
BRIGHTNESS = dict(exact=-0.4, crisp=-0.4, dark=-0.9)  # mean pixel that a context asks for
CENTER = torch.tensor([0.7, -0.04, -0.15])  # an average image has these raw scores
SCALE = torch.tensor([0.2, 0.03, 0.15])


def stencils():
    """The shapes at nine places, 1 inside and 0 outside: (4, 9, 8, 8)."""
    found = []
    for shape, down, right in itertools.product(SHAPES, (-1, 0, 1), (-1, 0, 1)):
        rows, columns = torch.arange(8.0) - 3.5 - down, torch.arange(8.0) - 3.5 - right
        y, x = torch.meshgrid(rows, columns, indexing="ij")
        radius, side = (x**2 + y**2).sqrt(), torch.maximum(x.abs(), y.abs())
        inside = {
            "cross": (torch.minimum(x.abs(), y.abs()) < 1) & (side < 3),
            "ring": (radius < 3) & (radius > 1.3),
            "bar": (y.abs() < 1) & (x.abs() < 3.2),
            "dot": radius < 1.6,
        }
        found.append(inside[shape].float())
    return torch.stack(found).view(4, 9, 8, 8)


class World(world.World):
    """The world of this file."""

    name, kind = "glyphs", "images"
    pretrain = dict(steps=400, batch_size=128, lr=5e-3)
    align = dict(prompts=1024, steps=80, lr=3e-4, batch_size=64)
    picture = digits.World.picture
    captions = [f"{shape}, {context}" for shape, context in itertools.product(SHAPES, WEIGHTS)]
    annotators = tuple(WEIGHTS.values())

    def __init__(self):
        self.stencils = stencils()
        centered = self.stencils - self.stencils.mean((2, 3), keepdim=True)
        self.unit = centered / centered.square().sum((2, 3), keepdim=True).sqrt()
        rows = self.demonstrations(4000, torch.Generator().manual_seed(0))
        self.moments = digits.moments(torch.cat([row["responses"] for row in rows]))

    def model(self):
        """A new UNet with about 0.2M parameters."""
        return UNet(UNetConfig(channels=1, size=(8, 8), classes=12))

    def prompts(self, n, rng):
        """n prompts, uniformly drawn."""
        return torch.randint(12, (n,), generator=rng).tolist()

    def demonstrations(self, n, rng):
        """n rows of one drawing (1, 1, 8, 8)."""
        prompts = torch.tensor(self.prompts(n, rng))
        ground, ink, blur, noise = torch.rand(4, n, 1, 1, generator=rng)
        stray = torch.rand(n, generator=rng) < 0.25
        shape = torch.where(stray, torch.randint(4, (n,), generator=rng), prompts // 3)
        stencil = self.stencils[shape, torch.randint(9, (n,), generator=rng)]  # (n, 8, 8)
        sharp = stencil * (0.2 + 0.8 * ink) + (1 - stencil) * (0.8 * ground - 1)
        padded = F.pad(sharp[:, None], (1, 1, 1, 1), mode="replicate")
        soft = F.avg_pool2d(padded, 3, 1)[:, 0]
        grain = 0.4 * noise * torch.randn(n, 8, 8, generator=rng)
        images = (torch.lerp(sharp, soft, 0.8 * blur) + grain).clamp(-1, 1)[:, None]
        return [
            dict(prompt=p, responses=x[None], scores=[1.0])
            for p, x in zip(prompts.tolist(), images)
        ]

    def scores(self, prompts, images):
        """The three scores (n, 3), float64 from -3 to 3, of images (n, 1, 8, 8)."""
        x, prompts = digits.shown(images).view(-1, 8, 8), torch.as_tensor(prompts)
        centered = x - x.mean((1, 2), keepdim=True)
        energy = centered.square().sum((1, 2))
        fit = torch.einsum("nyx,skyx->nsk", centered, self.unit.double())  # (n, 4, 9)
        own = fit[torch.arange(len(prompts)), prompts // 3].amax(1)
        exact = own / energy.sqrt().clamp(min=1e-3)
        rest = energy - fit.clamp(min=0).flatten(1).amax(1).square()
        wanted = torch.tensor(list(BRIGHTNESS.values()), dtype=torch.float64)[prompts % 3]
        bright = (x.mean((1, 2)) - wanted).square()
        raw = torch.stack([exact, -rest / 64, -bright], 1)
        return ((raw - CENTER.double()) / SCALE.double()).clamp(-3, 3)

    def criteria(self, prompts, images):
        """What annotators look at: the three scores (n, 3) of images (n, 1, 8, 8)."""
        return self.scores(prompts, images).float()

    def contexts(self, prompts):
        """The contexts (n,) of prompts: 0 exact, 1 crisp, 2 dark."""
        return torch.as_tensor(prompts) % 3

    def reward(self, prompts, responses):
        """The true reward of n images, (n,) float64: the weighted sum of the three scores."""
        images = responses if isinstance(responses, torch.Tensor) else torch.stack(list(responses))
        weights = torch.tensor(list(WEIGHTS.values()), dtype=torch.float64)
        return (weights[torch.as_tensor(prompts) % 3] * self.scores(prompts, images)).sum(1)

    def parts(self, prompt, response):
        """The three scores of one image (1, 8, 8): {name: number}."""
        return dict(zip(WEIGHTS, self.scores([prompt], response[None])[0].tolist()))

    def frechet(self, images):
        """The Frechet distance, in pixel space, of images (n, 1, 8, 8) to the demonstrations."""
        return digits.distance(*digits.moments(images), *self.moments)

    def look(self, policy, lab):
        """{frechet_256}: the Frechet distance of 256 samples."""
        rng = lab.eval_rng("look")
        prompts = self.prompts(lab.few(256), rng)
        return {"frechet_256": self.frechet(digits.samples(policy, lab, prompts, rng))}

    def measure(self, policy, lab):
        """{frechet} of 2,000 samples."""
        rng = lab.rng("measure")
        prompts = self.prompts(lab.few(2000, 16), rng)
        return {"frechet": self.frechet(digits.samples(policy, lab, prompts, rng))}
