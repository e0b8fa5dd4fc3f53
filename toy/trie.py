"""Tries: 20 problems of four steps, in which half of the symbols are fatal at every step.

    prompt 3    response [1, 0, 2, 0]    reward 1, if none of the four symbols was fatal

There are four symbols and 20 prompts. After every prefix two of the four symbols, drawn at random,
are fatal, and a response with a fatal symbol is wrong however it goes on. So one response in 16 is
right, and only the step tells where a wrong one failed. The reference is uniform, and reward, KL
and the optimum are exact. `judge` is a noisy look at a beginning, in place of a model's evaluation
of its own work. The reward cannot be gamed.
"""

import torch

from toy import exact, world

VOCAB, LENGTH, PROMPTS = 4, 4, 20


class World(exact.World):
    """The world of this file, with fatal symbols drawn from `seed`."""

    name, verifier = "trie", True
    align = dict(prompts=20, steps=40, lr=0.2, batch_size=64, k=20)

    def __init__(self, seed=0):
        rng = torch.Generator().manual_seed(seed)
        count = sum(VOCAB**t for t in range(LENGTH))
        order = torch.rand(PROMPTS, count, VOCAB, generator=rng).argsort(-1)
        self.fatal = order < 2  # (P, prefixes, V)
        shape = dict(vocab=VOCAB, length=LENGTH, prompts=PROMPTS)
        y = torch.cartesian_prod(*[torch.arange(VOCAB)] * LENGTH)  # (R, T)
        wrong = self.fatal[:, exact.prefixes(y, VOCAB), y].any(-1)  # (P, R)
        super().__init__(**shape, rewards=(~wrong).double(), reference=torch.zeros(VOCAB**LENGTH))

    def judge(self, prompts, beginnings, ended, rng):
        """See `toy.world.World.judge`: right means that no symbol was fatal."""
        right = []
        for prompt, y in zip(prompts, beginnings):
            y = torch.tensor(y, dtype=torch.long)
            right.append(not self.fatal[prompt, exact.prefixes(y, VOCAB), y].any())
        return world.noisy(right, ended, rng)
