"""Mates: handwritten digits in three classes of two digits each, which do not look alike.

    x (0.00, 0.00, 0.31, ...)    class 0 (a 0 or a 3)

Class c holds the digits c and c + 3 of toy/pixels.py. A picture of a 3 is not similar to one of a
0, so clusters of similar pictures are not the classes; what the digits of a class share is how
often they occur together. A method that has memorized pictures and their classes can be told from
one that has found the classes only on the pictures that are held out.
"""

import torch

from toy import pixels


class World(pixels.World):
    """The digits 0 to 5 in three classes."""

    name = "mates"
    classes = 3
    soft_labels = None
    align = dict(steps=600, lr=3e-3, batch_size=256)

    def __init__(self):
        super().__init__(bias=0.0)

    def named(self, digit):
        return torch.where(digit < 6, digit % 3, -1)
