"""A game of three responses that beat each other in a cycle, so no reward explains the preferences.

    prompt 0    response [2]    reward 0.533

There is one prompt, and a response is one token of {0, 1, 2}. Response 0 beats 1 with probability
0.9, 1 beats 2 with 0.7, and 2 beats 0 with 0.8. A policy competes with another one, and the payoff
is the probability that its response is preferred. The Nash equilibrium is (2/9, 1/3, 4/9): against
it every response wins half of the time. The exploitability of a policy is the largest win rate
against it, minus 1/2; it is 0 at the equilibrium alone.

The true reward is the win rate over the reference, which is uniform. A policy that games it plays
one response and loses to the next one in the cycle, so the exploitability, which `measure` reports,
rises while the reward rises. Everything is a sum over the responses (toy/exact.py).
"""

import torch

from data import UserError
from toy import exact

CYCLE = [[0.5, 0.9, 0.2], [0.1, 0.5, 0.7], [0.8, 0.3, 0.5]]


class World(exact.World):
    """The game of this file, or any other.

    payoff: (R, R), the probability that response i beats response j, or (P, R, R), one game per
        prompt. reference: as in `exact.World`, by default uniform. UserError: the two probabilities
        of a pair do not sum to 1.
    """

    name = "game"
    align = dict(prompts=1024, steps=300, lr=0.05, batch_size=256, k=4)

    def __init__(self, payoff=None, reference=None):
        payoff = torch.as_tensor(CYCLE if payoff is None else payoff, dtype=torch.float64)
        self.payoff = payoff if payoff.dim() == 3 else payoff[None]  # (P, R, R)
        whole = self.payoff + self.payoff.mT
        if not torch.allclose(whole, torch.ones_like(whole)) or not (self.payoff >= 0).all():
            raise UserError("a payoff has P(i beats j) + P(j beats i) other than 1")
        prompts, count, _ = self.payoff.shape
        start = torch.zeros(count) if reference is None else reference
        super().__init__(count, 1, prompts, rewards=0.0, reference=start)
        self.truth = self.rates(self.reference.probs())

    def key(self):
        """Everything that defines this game: payoff and reference."""
        return [*super().key(), self.payoff.tolist()]

    def rates(self, probs):
        """The win rate (P, R) of every response over a policy with probabilities probs (P, R)."""
        return (self.payoff @ probs[..., None])[..., 0]

    def wins(self, first, second):
        """The probability (P, n) that response first[i] beats response second[i]."""
        return self.payoff[:, first, second]

    def prefers(self, prompts, a, b):
        """The probability (n,) that response a (a list of one token) beats response b."""
        first, second = (torch.as_tensor(x).view(len(prompts)) for x in (a, b))
        return self.payoff[torch.as_tensor(prompts), first, second]

    def exploitability(self, probs):
        """The largest win rate over a policy with probabilities probs (P, R), minus 1/2."""
        return (self.rates(probs).amax(-1) - 0.5).mean().item()

    def measure(self, policy, lab):
        """{"exploitability"}, 0 at the Nash equilibrium alone."""
        return {"exploitability": self.exploitability(policy.probs().detach().cpu())}
