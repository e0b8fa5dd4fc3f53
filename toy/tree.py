"""Answers of one to five tokens and an end: every one of the 1,364 can be enumerated, so reward, KL, entropy and length are exact.

A table (toy/bandit.py) over the tokens 0 to 3 and the end 4. An answer has at least one token; after an end only ends follow, with
probability 1, and an answer of five tokens has none. The reference is a tree of softmaxes with logits from N(0, 0.7^2) at every prefix,

    r(y) = 2 (share of 0s - share of 3s) + [ "1 0" occurs ],  standardised under the reference.

It is the smallest world in which answers differ in length: a row holds an answer up to its end, which is scored, and `World.batch` masks
what fills the answers of a table up.
"""

from types import SimpleNamespace

import torch

from toy import bandit

END, LENGTH = 4, 5


def random_tree(seed, spread=0.7):
    """A Table of random answers: logits from N(0, spread^2), no end first, nothing but ends after an end."""
    table = Tree(END + 1, LENGTH).requires_grad_(False)
    table.logits.normal_(0.0, spread, generator=torch.Generator().manual_seed(seed))
    table.logits[0, 0, END] = -torch.inf
    y = table.sequences()
    prefix, ended = torch.zeros(len(y), dtype=torch.long), torch.zeros(len(y), dtype=torch.bool)
    for token in y.unbind(1):
        table.logits[0, prefix[ended]] = torch.where(torch.arange(END + 1) == END, 0.0, -torch.inf)
        prefix, ended = prefix * (END + 1) + 1 + token, ended | (token == END)
    return table


class Tree(bandit.Table):
    """The table of answers that end, with a faster `scores` for many at once."""

    def sample(self, prompts, k, rng):
        """As that of a Table; an answer stops behind its end."""
        return [
            [y[: y.index(END) + 1] if END in y else y for y in group]
            for group in super().sample(prompts, k, rng)
        ]

    def scores(self, index):
        """Log-probs of tokens, by their places in the flat table (World.index)."""
        return self.logits.log_softmax(-1).flatten().gather(0, index.flatten()).view_as(index)


class World(bandit.World):
    """The world of this file; `seed` draws its reference."""

    name = "tree"
    align = dict(prompts=2048, steps=150, lr=0.02, batch_size=512)

    def __init__(self, seed=0):
        super().__init__(END + 1, LENGTH, rewards=torch.zeros(()))
        self.reference = self.data = random_tree(seed)
        self.answers = self.reference.sequences()
        self.tokens = (self.answers != END).sum(1)  # without the end
        self.mask = torch.arange(LENGTH) <= self.tokens[:, None]  # what is scored: the end, too
        chance, r = self.reference.probs()[0], self._quality()
        mean = (chance * r).sum()
        self.truth = ((r - mean) / (chance * (r - mean).square()).sum().sqrt())[None]
        # the place of each token in a flat table, prefix by prefix
        prefix, places = torch.zeros(len(self.answers), dtype=torch.long), []
        for token in self.answers.unbind(1):
            places.append(prefix * self.shape[0] + token)
            prefix = places[-1] + 1
        self.index = torch.stack(places, 1)

    def _quality(self):
        y = self.answers
        praise = ((y == 0).sum(1) - (y == 3).sum(1)) / self.tokens.clamp(min=1)
        return (2 * praise + ((y[:, :-1] == 1) & (y[:, 1:] == 0)).any(1)).double()

    def model(self):
        """The reference, as a Tree of its own."""
        model = Tree(*self.shape)
        model.load_state_dict(self.reference.state_dict())
        return model

    def reward(self, prompts, responses):
        """The truth for flat lists of n prompts and n answers (token ids) -> (n,) float64."""
        return super().reward(prompts, [list(y) + [END] * (LENGTH - len(y)) for y in responses])

    def draw(self, table, n, rng):
        """n answers of a table, as their numbers (n,)."""
        return torch.multinomial(table.probs()[0], n, replacement=True, generator=rng)

    def labelled(self, first, second, rng, sharpness=2.0, length_bias=0.0, flip=0.0):
        """Pairs (n, 2) of answers, the preferred one first: p = sigmoid(sharpness (difference of truth + length_bias per scored token)),
        then turned round with probability `flip`; an infinite sharpness always prefers the better one."""
        liking = self.truth[0] + length_bias * self.mask.sum(1)
        gap = liking[first] - liking[second]
        p = torch.sigmoid(sharpness * gap) if sharpness < float("inf") else (gap > 0).double()
        wins = torch.rand(len(p), generator=rng, dtype=torch.float64) < p
        wins = wins ^ (torch.rand(len(p), generator=rng) < flip)
        return torch.where(
            wins[:, None], torch.stack([first, second], 1), torch.stack([second, first], 1)
        )

    def drawn(self, n, rng, **how):
        """n pairs (n, 2) of the reference's answers, `labelled` how; rng(name) gives the generators (a Lab's)."""
        first, second = (self.draw(self.reference, n, rng("answers")) for _ in range(2))
        return self.labelled(first, second, rng("labels"), **how)

    def batch(self, pairs, **columns):
        """What a loss reads of answers (n, K): the mask (n, K, T), scores, 1 for the first of a row and 0 for the others, and columns."""
        scores = torch.zeros(pairs.shape).index_fill_(1, torch.tensor(0), 1.0)
        return SimpleNamespace(mask=self.mask[pairs], scores=scores, **columns)

    @torch.no_grad()
    def exact(self, table):
        """{name: number} of a policy: true reward, KL from the reference, entropy, length in scored tokens."""
        p = table.probs()[0]
        return {
            "reward": table.expect(self.truth),
            "kl": table.kl(self.reference),
            "entropy": -torch.special.xlogy(p, p).sum().item(),
            "length": table.expect(self.mask.sum(1).double()),
        }

    def frontier(self, kl):
        """The largest reward at a KL from the reference: that of reference * exp(r / beta), with beta found by bisection."""
        low, high = 1e-2, 1e2
        for _ in range(60):
            beta = (low * high) ** 0.5
            low, high = (
                (low, beta)
                if self.optimum(self.reference, beta).kl(self.reference) < kl
                else (beta, high)
            )
        return self.optimum(self.reference, beta).expect(self.truth)
