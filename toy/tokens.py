"""Responses of six tokens with a reward for each token: all 4^6 are enumerated, and it is known which token is to blame.

    r(s, a) = - 2 where token 3 follows token 0 (an error)   + 0.5 for token 1            reward of a response = the sum

The first policy is uniform. Its logits come from a small network that reads the prefix, so that what is learnt behind one prefix is
learnt behind others too; it has all that a `bandit.Table` has. Labels compare whole responses, as everywhere.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from toy import bandit

VOCAB, LENGTH = 4, 6


class SharedTable(bandit.Table):
    """A table whose logits (1, prefixes, vocab) are the output of a network on the one-hot prefix; uniform at first."""

    def __init__(self):
        nn.Module.__init__(self)
        self.vocab, self.length = VOCAB, LENGTH
        prefixes = [
            (*p, *[VOCAB] * (LENGTH - 1 - n))
            for n in range(LENGTH)
            for p in itertools.product(range(VOCAB), repeat=n)
        ]
        self.register_buffer(
            "features",
            F.one_hot(torch.tensor(prefixes), VOCAB + 1).flatten(1).float(),
            persistent=False,
        )
        self.net = nn.Sequential(
            nn.Linear(self.features.shape[1], 64), nn.Tanh(), nn.Linear(64, VOCAB)
        )
        for p, spread in zip(self.net.parameters(), (0.3, 0.0, 0.0, 0.0)):
            nn.init.normal_(p, 0.0, spread)

    @property
    def logits(self):
        return self.net(self.features)[None]


def soft_optimum(r, log_ref, beta):
    """Exact (Q, V, A) on a whole tree of tokens (arXiv:2404.12358): token rewards r and log pi_ref (prefixes, vocab), prefixes numbered
    as in `bandit.Table` -> Q (eq. 7) and A (eq. 10) of the same shape, V (prefixes,). pi* = exp((Q - V) / beta). ValueError: beta <= 0."""
    if not 0 < beta < float("inf"):
        raise UserError(f"beta = {beta} must be positive and finite")
    prefixes, vocab = r.shape
    q, value = (
        r + beta * log_ref,
        r.new_zeros(prefixes * vocab + 1),
    )  # the last level of states is the end, with V = 0
    first, size = prefixes, prefixes - (prefixes - 1) // vocab
    while first:  # from the longest prefixes to the empty one
        first -= size
        level = slice(first, first + size)
        q[level] += value[first * vocab + 1 : (first + size) * vocab + 1].view(size, vocab)
        value[level] = beta * (q[level] / beta).logsumexp(1)
        size //= vocab
    value = value[:prefixes]
    return q, value, q - beta * log_ref - value[:, None]


class World(bandit.World):
    """A table of 4096 responses to one prompt. `token_reward` (prefixes, vocab) is the truth of every token."""

    name = "tokens"
    align = dict(prompts=4000, steps=800, lr=2e-3, batch_size=128)

    def __init__(self):
        self.token_reward = torch.zeros(
            sum(VOCAB**t for t in range(LENGTH)), VOCAB, dtype=torch.float64
        )
        self.token_reward[:, 1], self.token_reward[1::VOCAB, 3] = (
            0.5,
            -2.0,
        )  # prefixes 1, 5, 9, ... end in token 0
        super().__init__(
            VOCAB, LENGTH, spread=0.0, rewards=lambda y: self.along(self.token_reward, y).sum(1)
        )

    def along(self, values, y):
        """Values (prefixes, vocab) of the tokens of responses y (n, T) -> (n, T)."""
        prefix, out = torch.zeros(len(y), dtype=torch.long), []
        for token in y.unbind(1):
            out.append(values[prefix, token])
            prefix = prefix * VOCAB + 1 + token
        return torch.stack(out, 1)

    def key(self):
        """What tells this world from others of its kind."""
        return [self.name]

    def model(self):
        """A fresh policy, uniform, with about 2,000 weights."""
        return SharedTable()
