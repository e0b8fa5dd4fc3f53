"""Warped: six normal classes behind a nonlinear map, and a teacher that underrates half of them.

    x (-1.29, -0.37, ...)    P(class 5) 0.997

A point of a class is a center in 16 dimensions plus standard normal noise, seen through an
invertible map: a matrix, v -> tanh(v) + v / 10 for every number, another matrix. The true class
probabilities are known. The teacher has the exact logits, lowered by a constant for the odd
classes: confident, good, and systematically wrong. A student that copies it is wrong there as well.
"""

import torch

from toy import world


class World(world.World):
    """The world of this file. bias: by how much the teacher lowers the logits of odd classes."""

    name, kind = "warped", "vectors"
    features, classes = 16, 6
    align = dict(steps=500, lr=3e-3, batch_size=64)

    def __init__(self, bias=4.8, radius=3.2):
        self.bias, self.radius = bias, radius
        rng = torch.Generator().manual_seed(0)
        rows = torch.randn(3, 16, 16, dtype=torch.float64, generator=rng)
        self.inner, self.outer, centers = torch.linalg.qr(rows)[0]
        self.centers = radius * centers[: self.classes]

    def key(self):
        """The arguments."""
        return [self.name, self.bias, self.radius]

    def points(self, n, rng, shares=None, held_out=False):
        """n points (n, 16) and their classes (n,); see World."""
        weight = torch.ones(self.classes) if shares is None else torch.as_tensor(shares)
        y = torch.multinomial(weight.double(), n, replacement=True, generator=rng)
        u = self.centers[y] + torch.randn(n, 16, dtype=torch.float64, generator=rng)
        v = 2 * u @ self.inner
        return (v.tanh() + v / 10) @ self.outer, y

    def logits(self, x):
        """The logarithm of the class probabilities, up to a constant (n, classes)."""
        seen = x.double() @ self.outer.T
        low, high = torch.full_like(seen, -1000), torch.full_like(seen, 1000)
        for _ in range(60):  # bisection
            middle = (low + high) / 2
            below = middle.tanh() + middle / 10 < seen
            low, high = torch.where(below, middle, low), torch.where(below, high, middle)
        u = low @ self.inner.T / 2
        return -torch.cdist(u, self.centers).square() / 2

    def bayes(self, x):
        """The probability of each class (n, classes), where all have equal shares."""
        return self.logits(x).softmax(1)

    def soft_labels(self, x):
        """The teacher's logits (n, classes)."""
        return self.logits(x) - self.bias * (torch.arange(self.classes) % 2)
