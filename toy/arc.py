"""Arc: points on a quarter circle, in six stripes of two noisy classes.

    x (0.991, 0.131)    stripe 0    P(class 1) 0.85

A point is uniform on the part of the unit circle in which both coordinates are positive, a manifold
of dimension 1. The arc has equal stripes; in every third one class 1 has probability 0.85, in the
others 0.15. So the Bayes classifier is right on 0.85 of the points, and a constant one on 0.617.
The labels of training points can be memorized, so only the accuracy on held-out points counts.
"""

import math

import torch

from toy import world


class World(world.World):
    """The arc of this file.

    stripes: their number. high: P(class 1) in every third stripe; in the others it is 1 - high.
    """

    name, kind = "arc", "vectors"
    features, classes = 2, 2

    def __init__(self, stripes=6, high=0.85):
        self.stripes, self.high = stripes, high
        first = torch.arange(stripes) % 3 == 0
        one = torch.where(first, high, 1 - high).double()
        self.table = torch.stack([1 - one, one], 1)  # (stripes, classes) P(class | stripe)
        self.class_shares = self.table.mean(0)

    def key(self):
        """The arguments."""
        return [self.name, self.stripes, self.high]

    def points(self, n, rng, shares=None, held_out=False):
        """n points (n, 2) and their classes (n,); see World."""
        joint = self.table / self.stripes  # (stripes, classes)
        if shares is not None:
            joint = joint / joint.sum(0) * torch.as_tensor(shares, dtype=torch.float64)
        cell = torch.multinomial(joint.flatten(), n, replacement=True, generator=rng)
        stripe, y = cell // 2, cell % 2
        place = torch.rand(n, dtype=torch.float64, generator=rng)
        angle = (stripe + place) / self.stripes * math.pi / 2
        return torch.stack([angle.cos(), angle.sin()], 1), y

    def bayes(self, x):
        """The probability of each class, (n, 2)."""
        angle = torch.atan2(x[:, 1], x[:, 0])
        stripe = (angle / (math.pi / 2) * self.stripes).long().clamp(0, self.stripes - 1)
        return self.table[stripe]
