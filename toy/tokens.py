"""Responses of six tokens with a true reward for each token, for credit assignment.

    prompt 0    response [1, 0, 3, 1, 2, 2]    token rewards [0.5, 0, -2, 0.5, 0, 0]    reward -1

There is one prompt. A response is six tokens of {0, 1, 2, 3}, so all 4^6 = 4096 can be enumerated.
A token 3 that directly follows a token 0 is an error and costs 2, a token 1 earns 0.5, and the
reward of a response is the sum over its tokens. Labels compare whole responses, as everywhere, so a
method that assigns credit to tokens can be compared with the true reward of every token.

The reference is uniform. The policy's logits are computed by a small network from the prefix, so
what it learns after one prefix generalizes to others.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError
from toy import exact

VOCAB, LENGTH = 4, 6


class SharedTable(exact.Table):
    """A table whose logits (1, prefixes, vocab) are the output of a network on the one-hot prefix.

    It starts as the uniform policy; its hidden weights are drawn from torch's global generator.
    """

    def __init__(self):
        super().__init__(VOCAB, LENGTH, parameters=False)
        padded = [
            (*prefix, *[VOCAB] * (LENGTH - 1 - n))
            for n in range(LENGTH)
            for prefix in itertools.product(range(VOCAB), repeat=n)
        ]
        one_hot = F.one_hot(torch.tensor(padded), VOCAB + 1).flatten(1).float()
        self.register_buffer("features", one_hot, persistent=False)  # (prefixes, 25)
        self.net = nn.Sequential(nn.Linear(one_hot.shape[1], 64), nn.Tanh(), nn.Linear(64, VOCAB))
        for p, spread in zip(self.net.parameters(), (0.3, 0.0, 0.0, 0.0)):
            nn.init.normal_(p, 0.0, spread)

    @property
    def logits(self):
        return self.net(self.features)[None]


def soft_optimum(r, log_ref, beta):
    """The exact soft values (Q, V, A) on the whole tree of tokens (arXiv:2404.12358).

    r, log_ref: rewards of the tokens and their log-probs under the reference, (prefixes, vocab),
    prefixes numbered as in `exact.prefixes`. Q (eq. 7) and A (eq. 10) have the same shape, V is
    (prefixes,), and the optimum is pi* = exp((Q - V) / beta). UserError: beta is not positive.
    """
    if not 0 < beta < float("inf"):
        raise UserError(f"beta = {beta} must be positive and finite")
    prefixes, vocab = r.shape
    q = r + beta * log_ref
    value = r.new_zeros(prefixes * vocab + 1)  # V = 0 at the end, after the longest prefixes
    first, size = prefixes, prefixes - (prefixes - 1) // vocab
    while first:  # from the longest prefixes to the empty one
        first -= size
        level = slice(first, first + size)
        q[level] += value[first * vocab + 1 : (first + size) * vocab + 1].view(size, vocab)
        value[level] = beta * (q[level] / beta).logsumexp(1)
        size //= vocab
    value = value[:prefixes]
    return q, value, q - beta * log_ref - value[:, None]


class World(exact.World):
    """The world of this file; `token_reward` (prefixes, vocab) holds the reward of every token."""

    name = "tokens"
    align = dict(prompts=4000, steps=800, lr=2e-3, batch_size=128)

    def __init__(self):
        count = sum(VOCAB**t for t in range(LENGTH))
        self.token_reward = torch.zeros(count, VOCAB, dtype=torch.float64)
        self.token_reward[:, 1] = 0.5
        self.token_reward[1::VOCAB, 3] = -2.0  # prefixes 1, 5, 9, ... end in token 0

        def rewards(y):
            return self.along(self.token_reward, y).sum(1)

        super().__init__(VOCAB, LENGTH, rewards=rewards, spread=0.0)

    def along(self, values, y):
        """The entries of `values` (prefixes, vocab) at the tokens of responses y (n, T): (n, T)."""
        return values[exact.prefixes(y, VOCAB), y]

    def key(self):
        """The name, since all worlds of this class are equal."""
        return self.name

    def model(self):
        """A new uniform policy with about 2,000 parameters."""
        return SharedTable()
