"""Sums of four digits modulo 7 in three steps of one token: every step can be verified.

    prompt 5 (digits 6, 2, 4, 2)    response [1, 5, 0]    reward 1

A prompt is a number below 300; `World.problems` has its digits a, b, c, d. The right response is
the running sums a + b, a + b + c and a + b + c + d, all modulo 7. The reward is 1 if the last token
is right, so it can be gamed: a chain with two errors that cancel is rewarded, and a method that
only sees the reward can learn wrong steps.

The policy has one table per step, shared by all prompts. It maps the running sum and the digit to
logits of the next sum. The reference makes about three of five steps right. All 343 chains of a
prompt are enumerated.
"""

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from toy import exact

BASE, STEPS, PROMPTS = 7, 3, 300


class Chains(exact.Table):
    """A table whose logits (P, 57, 7) are looked up in `steps`, (3, 7, 7, 7).

    The axes of `steps` are the step, the running sum, the digit, and the next sum.
    problems: (P, 4) digits.
    """

    def __init__(self, problems, steps):
        super().__init__(BASE, STEPS, parameters=False)
        self.steps = nn.Parameter(steps.clone())
        count = BASE ** torch.arange(STEPS)  # prefixes of each length
        step = torch.arange(STEPS).repeat_interleave(count)  # (57,)
        # the running sum is the last token of the prefix, or the digit a for the empty prefix
        later = torch.arange(BASE).repeat(1 + BASE).expand(len(problems), -1)
        before = torch.cat([problems[:, :1], later], 1)  # (P, 57)
        digit = problems[:, 1:].repeat_interleave(count, 1)  # (P, 57)
        for name, index in dict(step=step, before=before, digit=digit).items():
            self.register_buffer(name, index, persistent=False)

    @property
    def logits(self):
        return self.steps[self.step, self.before, self.digit]


class World(exact.World):
    """The world of this file: 300 problems; `right` (P, 3) has their right chains."""

    name = "modular"
    align = dict(prompts=1200, steps=150, lr=0.02, batch_size=64)

    def __init__(self):
        rng = torch.Generator().manual_seed(0)
        self.problems = torch.randint(BASE, (PROMPTS, 1 + STEPS), generator=rng)
        self.right = self.problems.cumsum(1)[:, 1:] % BASE
        digits = torch.arange(BASE)
        sums = F.one_hot((digits[:, None] + digits) % BASE, BASE)
        noise = 0.5 * torch.randn(STEPS, BASE, BASE, BASE, generator=rng)
        reference = Chains(self.problems, (0.65 * sums + 0.35 / BASE).log() + noise)
        ends = reference.sequences()[:, -1]
        rewards = (ends == self.right[:, -1:]).double()  # (P, R)
        super().__init__(BASE, STEPS, PROMPTS, rewards=rewards, reference=reference)

    def key(self):
        """The name, since all worlds of this class are equal."""
        return self.name

    def lists(self, n, rng, k=None):
        """n rows of k (default 5) chains, graded step by step.

        The first chain is right, k - 2 chains are continued by the reference after one or two right
        steps, and the last chain is a sample of the reference. The score is 1 if the last token is
        right, and otherwise 0.3 for each right step before the first wrong one. UserError: k < 2.
        """
        k = 5 if k is None else k
        if k < 2:
            raise UserError(f"k = {k} must be at least 2")
        prompts, probs = self.prompts(n, rng), self.reference.logits.softmax(-1)
        kept = torch.randint(1, STEPS, (n, k), generator=rng)  # right steps to start with
        kept[:, 0], kept[:, -1] = STEPS, 0
        label = torch.tensor(prompts)[:, None].expand_as(kept)
        prefix, out = torch.zeros_like(kept), []
        for t in range(STEPS):
            drawn = torch.multinomial(probs[label, prefix].flatten(0, 1), 1, generator=rng)
            out.append(torch.where(t < kept, self.right[label, t], drawn.view_as(kept)))
            prefix = prefix * BASE + 1 + out[-1]
        chains = torch.stack(out, -1)  # (n, k, 3)
        good = (chains == self.right[prompts][:, None]).long()
        scores = torch.where(good[..., -1] == 1, 1.0, 0.3 * good.cumprod(2).sum(2))
        return [
            dict(prompt=p, responses=c, scores=v)
            for p, c, v in zip(prompts, chains.tolist(), scores.tolist())
        ]
