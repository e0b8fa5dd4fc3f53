"""Blobs: three classes on a circle, each of two blobs that lie opposite each other.

    x (4.0, 0.0)    P(class 0) 0.999

Six normal blobs of unit variance have their centers on a circle of radius 4; class c owns the blobs
c and c + 3. Points of one class are therefore not similar: two neighboring blobs, of other classes,
are nearer than the other blob of the same class. So clusters of similar points are not classes, and
a classifier that relies on similarity is misled. The class probabilities are known exactly.
"""

import math

import torch

from toy import world

RADIUS = 4.0


class World(world.World):
    """The world of this file. classes: their number; there are twice as many blobs."""

    name, kind = "blobs", "vectors"
    features = 2
    align = dict(steps=600, lr=3e-3, batch_size=256)

    def __init__(self, classes=3):
        self.classes = classes
        angle = torch.arange(2 * classes, dtype=torch.float64) * math.pi / classes
        self.centers = RADIUS * torch.stack([angle.cos(), angle.sin()], 1)  # (2 classes, 2)

    def key(self):
        """The argument."""
        return [self.name, self.classes]

    def points(self, n, rng, shares=None, held_out=False):
        """n points (n, 2) and their classes (n,); see World."""
        weight = torch.ones(self.classes) if shares is None else torch.as_tensor(shares)
        y = torch.multinomial(weight.double(), n, replacement=True, generator=rng)
        blob = y + self.classes * torch.randint(2, (n,), generator=rng)
        noise = torch.randn(n, 2, dtype=torch.float64, generator=rng)
        return self.centers[blob] + noise, y

    def bayes(self, x):
        """The probability of each class (n, classes), where all classes have equal shares."""
        logits = -torch.cdist(x, self.centers).square() / 2
        return logits.softmax(1).view(len(x), 2, self.classes).sum(1)
