"""Pixels: scikit-learn's 1,797 handwritten digits as 64 numbers, and a teacher with a bias.

    x (0.00, 0.00, 0.31, ...)    class 0

Features are the pixels of a picture of 8 x 8, from 0 (black) to 1. The teacher is a softmax
regression on 200 pictures that belong to no other set, whose logits of the odd digits are lowered
by a constant. So it knows the pictures and underrates half of the classes, as a model with an
unsuitable prompt does. The truth is the label of the 600 pictures that are held out. The pictures
are few, so a method that repeats points can memorize them.
"""

import warnings

import torch

from toy import world

TAUGHT, HELD_OUT = 200, 600  # pictures of the teacher, and of the test


class World(world.World):
    """The digits. bias: by how much the teacher lowers the logits of the odd digits."""

    name, kind = "pixels", "vectors"
    features, classes, side = 64, 10, 8
    align = dict(steps=500, lr=3e-3, batch_size=64)

    def __init__(self, bias=4.5):
        from sklearn.datasets import load_digits

        x, y = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
        order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
        x, y, self.bias = x[order].double() / 16, self.named(y[order].long()), bias
        self.x, self.y = x[y >= 0], y[y >= 0]
        self.weight = None

    def named(self, digit):
        """The classes of digits (n,); a negative one is left out."""
        return digit

    def key(self):
        """The argument."""
        return [self.name, self.bias]

    def points(self, n, rng, shares=None, held_out=False):
        """n pictures (n, 64) and their classes (n,); see World.

        They are drawn without replacement as long as they last; with shares, with replacement.
        """
        end = len(self.x) - HELD_OUT
        pool = torch.arange(end, len(self.x)) if held_out else torch.arange(TAUGHT, end)
        if shares is None:
            rounds = range(-(-n // len(pool)))
            some = torch.cat([torch.randperm(len(pool), generator=rng) for _ in rounds])[:n]
        else:
            y = self.y[pool]
            weight = torch.as_tensor(shares).double() / torch.bincount(y, minlength=self.classes)
            some = torch.multinomial(weight[y], n, replacement=True, generator=rng)
        return self.x[pool[some]], self.y[pool[some]]

    def soft_labels(self, x):
        """The teacher's logits (n, classes)."""
        if self.weight is None:
            from sklearn.linear_model import LogisticRegression

            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # the fit need not converge, it has to be fixed
                fitted = LogisticRegression(C=10.0, max_iter=300)
                fitted.fit(self.x[:TAUGHT].numpy(), self.y[:TAUGHT].numpy())
            self.weight = [torch.from_numpy(part) for part in (fitted.coef_, fitted.intercept_)]
        odd = torch.arange(self.classes) % 2
        return x @ self.weight[0].T + self.weight[1] - self.bias * odd
