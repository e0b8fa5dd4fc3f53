"""Sums of four digits modulo 7 in three steps of one token each: every chain of steps is enumerated, and every step can be verified.

A prompt is a number; `problems` has its digits a, b, c, d. The right chain is a + b, then that + c, then that + d. The policy has a table
for each step, shared by all prompts: sum so far and digit -> logits of the next sum. The base model draws 35 % of its steps at random, and
some steps more than others. The reward is 1 for the right end, however it was reached.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from toy import bandit

BASE, STEPS, PROMPTS = 7, 3, 300


class Chains(bandit.Table):
    """A table whose logits (P, 57, 7) are looked up in `steps` (3, 7, 7, 7): step, sum so far, digit, next sum."""

    def __init__(self, problems, steps):
        nn.Module.__init__(self)
        self.vocab, self.length, self.steps = BASE, STEPS, nn.Parameter(steps.clone())
        prefixes = BASE ** torch.arange(STEPS)
        self.register_buffer(
            "step", torch.arange(STEPS).repeat_interleave(prefixes), persistent=False
        )
        first = problems[:, :1]
        later = (
            torch.arange(BASE).repeat(1 + BASE).expand(len(problems), -1)
        )  # the last token of a prefix is the sum so far
        self.register_buffer("before", torch.cat([first, later], 1), persistent=False)
        self.register_buffer(
            "digit", problems[:, 1:].repeat_interleave(prefixes, 1), persistent=False
        )

    @property
    def logits(self):
        return self.steps[self.step, self.before, self.digit]


class World(bandit.World):
    """300 problems; `right` (P, 3) has their right chains."""

    name = "modular"
    align = dict(prompts=1200, steps=150, lr=0.02, batch_size=64)

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.problems = torch.randint(BASE, (PROMPTS, 1 + STEPS), generator=rng)
        self.right = self.problems.cumsum(1)[:, 1:] % BASE
        digits = torch.arange(BASE)
        sums = F.one_hot((digits[:, None] + digits) % BASE, BASE)
        self.start = (0.65 * sums + 0.35 / BASE).log() + 0.5 * torch.randn(
            STEPS, BASE, BASE, BASE, generator=rng
        )
        ends = bandit.Table(BASE, STEPS).sequences()[:, -1]
        super().__init__(BASE, STEPS, PROMPTS, rewards=(ends == self.right[:, -1:]).double())
        self.reference = Chains(self.problems, self.start).requires_grad_(False)

    def key(self):
        """What tells this world from others of its kind."""
        return [self.name]

    def model(self):
        """The base model, as a model of its own."""
        return Chains(self.problems, self.start)

    def lists(self, n, rng, k=None):
        """n rows of k (default 5) chains: the right one, k - 2 that the base model writes from one or two of its steps on, and one of its
        own. Scores: 1 for a right end, else 0.3 for each right step before the first wrong one. ValueError for k below 2."""
        k = 5 if k is None else k
        if k < 2:
            raise UserError(f"k = {k} must be at least 2")
        prompts, probs = self.prompts(n, rng), self.reference.logits.softmax(-1)
        kept = torch.randint(1, STEPS, (n, k), generator=rng)
        kept[:, 0], kept[:, -1] = STEPS, 0
        label, prefix, out = (
            torch.tensor(prompts)[:, None].expand_as(kept),
            torch.zeros_like(kept),
            [],
        )
        for t in range(STEPS):
            drawn = torch.multinomial(probs[label, prefix].flatten(0, 1), 1, generator=rng).view_as(
                kept
            )
            out.append(torch.where(t < kept, self.right[label, t], drawn))
            prefix = prefix * BASE + 1 + out[-1]
        chains = torch.stack(out, -1)  # (n, k, 3)
        good = (chains == self.right[prompts][:, None]).long()
        scores = torch.where(good[..., -1] == 1, 1.0, 0.3 * good.cumprod(2).sum(2))
        return [
            dict(prompt=p, responses=c, scores=v)
            for p, c, v in zip(prompts, chains.tolist(), scores.tolist())
        ]
