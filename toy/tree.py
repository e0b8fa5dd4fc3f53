"""Responses of one to five tokens, with an end token: the smallest exact world with lengths.

    prompt 0    response [1, 0, 2, 4]    (4 is the end)

There is one prompt. A response has one to five tokens of {0, 1, 2, 3}; if it has fewer than five,
it is closed by the end token 4, which is scored like the others. All 1,364 responses are
enumerated, so reward, KL, entropy and length are exact. The reference is a tree of softmaxes with
logits from N(0, 0.7^2) at every prefix, and the reward is

    r(y) = 2 (share of 0s - share of 3s) + [ "1 0" occurs ]

standardized to mean 0 and variance 1 under the reference. Length is no term of it, but "1 0" occurs
more often in longer responses. So the lengths of two methods are compared at the same KL. Labels
may be biased towards length (`World.labelled`).

In the table (toy/exact.py) every response has five tokens: after an end token, only end tokens
follow, with probability 1. A row holds a response up to its first end token, and `World.batch`
masks the rest.
"""

from types import SimpleNamespace

import torch

from toy import exact

END, LENGTH = 4, 5


class Tree(exact.Table):
    """The table of responses that end."""

    def sample(self, prompts, k, rng):
        """See `Table.sample`; a response stops after its end token."""
        drawn = super().sample(prompts, k, rng)
        return [[y[: y.index(END) + 1] if END in y else y for y in group] for group in drawn]

    def scores(self, index):
        """Log-probs of tokens from their indices in the flattened table (`World.index`)."""
        return self.logits.log_softmax(-1).flatten().gather(0, index.flatten()).view_as(index)


def random_tree(seed, spread=0.7):
    """A Tree with logits from N(0, spread^2); the first token is never an end token."""
    table = Tree(END + 1, LENGTH).requires_grad_(False)
    table.logits.normal_(0.0, spread, generator=torch.Generator().manual_seed(seed))
    table.logits[0, 0, END] = -torch.inf
    y = table.sequences()
    ended = (y == END).cumsum(1) - (y == END).long() > 0  # there is an end before the token
    only_ends = torch.where(torch.arange(END + 1) == END, 0.0, -torch.inf)
    table.logits[0, exact.prefixes(y, END + 1)[ended]] = only_ends
    return table


class World(exact.World):
    """The world of this file, with a reference drawn from `seed`.

    answers (R, T): all sequences of the table. tokens (R,): the number of tokens before the end.
    mask (R, T): the scored tokens, with the end token. index (R, T): indices of the tokens in the
    flattened table.
    """

    name = "tree"
    align = dict(prompts=2048, steps=150, lr=0.02, batch_size=512)

    def __init__(self, seed=0):
        reference = random_tree(seed)
        self.answers = reference.sequences()
        self.tokens = (self.answers != END).sum(1)
        self.mask = torch.arange(LENGTH) <= self.tokens[:, None]
        self.index = exact.prefixes(self.answers, END + 1) * (END + 1) + self.answers
        p, r = reference.probs()[0], self.quality()
        mean = (p * r).sum()
        truth = (r - mean) / (p * (r - mean).square()).sum().sqrt()
        super().__init__(END + 1, LENGTH, rewards=truth, reference=reference)

    def quality(self):
        """The reward of all responses (R,) before it is standardized."""
        y = self.answers
        share = ((y == 0).sum(1) - (y == 3).sum(1)) / self.tokens.clamp(min=1)
        return (2 * share + ((y[:, :-1] == 1) & (y[:, 1:] == 0)).any(1)).double()

    def reward(self, prompts, responses):
        """The true reward of n responses (ids up to the end) to n prompts, (n,) float64."""
        return super().reward(prompts, [list(y) + [END] * (LENGTH - len(y)) for y in responses])

    def draw(self, table, n, rng):
        """n responses drawn from a table, as indices (n,) into `answers`."""
        return torch.multinomial(table.probs()[0], n, replacement=True, generator=rng)

    def labelled(self, first, second, rng, sharpness=2.0, length_bias=0.0, flip=0.0):
        """Pairs (n, 2) of the responses `first` and `second` (n,), chosen first.

        The first is chosen with probability sigmoid(sharpness * difference), where the value of a
        response is its true reward plus length_bias per scored token. Then the label is flipped
        with probability `flip`. An infinite sharpness always prefers the larger value.
        """
        liking = self.truth[0] + length_bias * self.mask.sum(1)
        gap = liking[first] - liking[second]
        p = torch.sigmoid(sharpness * gap) if sharpness < float("inf") else (gap > 0).double()
        wins = torch.rand(len(p), generator=rng, dtype=torch.float64) < p
        wins = wins ^ (torch.rand(len(p), generator=rng) < flip)
        pair = torch.stack([first, second], 1)
        return torch.where(wins[:, None], pair, pair.flip(1))

    def drawn(self, n, rng, **kwargs):
        """n pairs (n, 2) of samples of the reference; kwargs are those of `labelled`.

        rng(name) returns a generator, as `Lab.rng` does.
        """
        answers = rng("answers")  # one generator for both, so that the responses of a pair differ
        first, second = (self.draw(self.reference, n, answers) for _ in range(2))
        return self.labelled(first, second, rng("labels"), **kwargs)

    def batch(self, pairs, **columns):
        """A batch of responses (n, K) for a loss: mask (n, K, T), scores (n, K) and the columns.

        The first response of a row has score 1, the others have score 0.
        """
        scores = torch.zeros(pairs.shape).index_fill_(1, torch.tensor(0), 1.0)
        return SimpleNamespace(mask=self.mask[pairs], scores=scores, **columns)

    def exact(self, table):
        """{name: value} of a policy: true reward, KL from the reference, entropy, scored tokens."""
        return {
            "reward": table.expect(self.truth),
            "kl": table.kl(self.reference),
            "entropy": table.entropy(),
            "length": table.expect(self.mask.sum(1).double()),
        }
