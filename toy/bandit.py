"""Tables: every response can be enumerated, so optimum, KL and reward are exact, and a theorem can be checked to the last digit.

A response is a sequence of `length` tokens over `vocab` symbols; length 1 is a plain bandit. The default world is the smallest that has
everything a language model has (prefixes, a reference that is not uniform, a reward of the whole response): three tokens of {0, 1, 2},

    r(y) = 0.8 (number of 0s - number of 2s) + 0.6 [y_1 = y_3]

and as the reference a tree of softmaxes whose logits are drawn from N(0, 0.7^2). Other tables come from the constructor's arguments.
"""

import math

import torch
from torch import nn

from toy import world


class Table(nn.Module):
    """A policy with logits of its own after every prefix; it can represent any distribution, and starts uniform.

    Prefixes are numbered level by level: 0 is the empty one, and token v leads from prefix i to prefix i * vocab + 1 + v.
    P prompts, R = vocab^length responses in lexicographic order."""

    def __init__(self, vocab, length=1, prompts=1):
        super().__init__()
        self.vocab, self.length = vocab, length
        self.logits = nn.Parameter(
            torch.zeros(prompts, sum(vocab**t for t in range(length)), vocab)
        )

    def logps(self, batch):
        """Log-probs (B, K, T) of batch.target (B, K, T) for the prompts batch.label (B,), 0 outside batch.mask where the batch has one."""
        prefix, out = torch.zeros_like(batch.target[..., 0]), []
        log_probs = self.logits.log_softmax(-1)
        for token in batch.target.unbind(-1):  # (B, K)
            out.append(log_probs[batch.label[:, None], prefix, token])
            prefix = prefix * self.vocab + 1 + token
        out, mask = torch.stack(out, -1), getattr(batch, "mask", None)
        return out if mask is None else out.masked_fill(~mask, 0.0)

    @torch.no_grad()
    def sample(self, prompts, k, rng):
        """k responses for each prompt (a number) -> list of lists of token-id lists."""
        label = torch.tensor(prompts, dtype=torch.long, device=self.logits.device)[:, None].expand(
            -1, k
        )
        prefix, out, probs = torch.zeros_like(label), [], self.logits.softmax(-1)
        for _ in range(self.length):
            token = torch.multinomial(probs[label, prefix].flatten(0, 1), 1, generator=rng).view_as(
                label
            )
            out.append(token)
            prefix = prefix * self.vocab + 1 + token
        return torch.stack(out, -1).tolist()

    def sequences(self):
        """All responses (R, T), in lexicographic order."""
        return torch.cartesian_prod(*[torch.arange(self.vocab)] * self.length).view(-1, self.length)

    def log_probs(self):
        """Log-probs (P, R) of all responses, float64, with gradient."""
        log_probs = self.logits.double().log_softmax(-1)
        out, first = log_probs.new_zeros(len(log_probs), 1), 0
        for _ in range(self.length):
            level = log_probs[
                :, first : first + out.shape[1]
            ]  # (P, prefixes of this length, vocab)
            first += out.shape[1]
            out = (out[..., None] + level).flatten(1)
        return out

    def probs(self):
        """Probabilities (P, R) of all responses, float64, with gradient."""
        return self.log_probs().exp()

    @torch.no_grad()
    def set_log_probs(self, log_probs):
        """Become the distribution with these log-probs, (P, R) or (R,); they need not be normalised, -inf is allowed. Returns the table."""
        level, levels = (
            torch.as_tensor(log_probs, dtype=torch.float64).expand(
                len(self.logits), self.vocab**self.length
            ),
            [],
        )
        for _ in range(self.length):
            level = level.unflatten(1, (-1, self.vocab))
            levels.insert(
                0, level.log_softmax(-1).nan_to_num(0.0, neginf=-math.inf)
            )  # uniform after a prefix that never occurs
            level = level.logsumexp(-1)
        self.logits.copy_(torch.cat(levels, 1))
        return self

    @torch.no_grad()
    def kl(self, other):
        """KL(self || other), in nats, mean over prompts."""
        p, q = self.log_probs(), other.log_probs().to(self.logits.device)
        return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(1).mean().item()

    @torch.no_grad()
    def expect(self, f):
        """Expectation, mean over prompts, of f: a tensor (P, R) or (R,), or a function of all responses (R, T) that gives one."""
        values = f(self.sequences()) if callable(f) else f
        return (self.probs() * torch.as_tensor(values).to(self.logits.device)).sum(1).mean().item()


class World(world.World):
    """Responses of a table with known rewards. There is no base model to train: the reference is given.

    vocab, length, prompts: the shape.  spread: of the reference's random logits (0: uniform), drawn from `seed`.
    rewards: (P, R), (R,) or a function of all responses (R, T); default: the one of this file's first lines, with 2 for the last symbol and
    y_3 for the last token.  reference, data: log-probs (P, R) or (R,), not necessarily normalised, of the base model and of the
    demonstrations (default: the reference again)."""

    name, kind = "bandit", "table"
    pretrain = None
    align = dict(prompts=8192, steps=200, lr=0.05, batch_size=512)

    def __init__(
        self,
        vocab=3,
        length=3,
        prompts=1,
        spread=0.7,
        seed=0,
        rewards=None,
        reference=None,
        data=None,
    ):
        self.shape = (vocab, length, prompts)
        self.reference = Table(*self.shape).requires_grad_(False)
        self.reference.logits.normal_(0.0, spread, generator=torch.Generator().manual_seed(seed))
        if reference is not None:
            self.reference.set_log_probs(reference)
        self.data = (
            self.reference
            if data is None
            else Table(*self.shape).requires_grad_(False).set_log_probs(data)
        )
        values = self._default(self.reference.sequences()) if rewards is None else rewards
        values = torch.as_tensor(
            values(self.reference.sequences()) if callable(values) else values, dtype=torch.float64
        )
        self.truth = values.expand(prompts, vocab**length).contiguous()

    def _default(self, y):
        return 0.8 * ((y == 0).sum(1) - (y == self.shape[0] - 1).sum(1)) + 0.6 * (
            y[:, 0] == y[:, -1]
        )

    def key(self):
        """What tells this world from others of its kind."""
        return [
            self.shape,
            self.truth.tolist(),
            self.reference.logits.tolist(),
            self.data.logits.tolist(),
        ]

    def model(self):
        """The reference, as a table of its own; it depends on the world alone."""
        model = Table(*self.shape)
        model.load_state_dict(self.reference.state_dict())
        return model

    def prompts(self, n, rng):
        """n prompts, as numbers."""
        return torch.randint(self.shape[2], (n,), generator=rng).tolist()

    def demonstrations(self, n, rng):
        """n rows of one response each, drawn from `data`."""
        prompts = self.prompts(n, rng)
        return [
            dict(prompt=p, responses=r, scores=[1.0])
            for p, r in zip(prompts, self.data.sample(prompts, 1, rng))
        ]

    def rewards(self):
        """The truth for all responses, (P, R) float64."""
        return self.truth

    def reward(self, prompts, responses):
        """The truth for flat lists of n prompts and n responses (token ids) -> (n,) float64."""
        tokens = torch.as_tensor(responses).view(len(prompts), self.shape[1])
        place = self.shape[0] ** torch.arange(self.shape[1] - 1, -1, -1)
        return self.truth[torch.as_tensor(prompts), (tokens * place).sum(1)]

    def optimum(self, reference, beta):
        """The policy that maximises E[r] - beta KL(policy || reference): reference * exp(r / beta) / Z (DPO, eq. 4), as a Table."""
        return Table(*self.shape).set_log_probs(reference.log_probs().cpu() + self.truth / beta)

    def objective(self, policy, beta, reference=None):
        """E[r] - beta KL(policy || reference), exact (DPO, eq. 3); reference: by default the world's."""
        return policy.expect(self.truth) - beta * policy.kl(reference or self.reference)

    def pairs_all(self, sampler=None, flip=0.0):
        """Every ordered pair of different responses as a row, with the exact probability of meeting it as column `weight`.

        Both are drawn from `sampler` (a Table; None: uniform), the first wins under Bradley-Terry, and the label is turned round with
        probability `flip`. The weights have mean 1: the mean of weight * loss over all P * R * (R - 1) rows is the population loss."""
        chance = (
            torch.full_like(self.truth, 1 / self.truth.shape[1])
            if sampler is None
            else sampler.probs().detach().cpu()
        )
        first, second = (~torch.eye(self.truth.shape[1], dtype=torch.bool)).nonzero(as_tuple=True)
        wins = torch.sigmoid(self.truth[:, first] - self.truth[:, second])
        weight = (
            chance[:, first] * chance[:, second] * ((1 - flip) * wins + flip * (1 - wins))
        )  # (P, R (R - 1))
        weight = (weight / weight.mean()).tolist()
        texts, truth, scores = self.reference.sequences().tolist(), self.truth.tolist(), [1.0, 0.0]
        return [
            dict(
                prompt=p,
                responses=[texts[i], texts[j]],
                scores=scores,
                reward=[truth[p][i], truth[p][j]],
                weight=weight[p][n],
            )
            for p in range(self.shape[2])
            for n, (i, j) in enumerate(zip(first.tolist(), second.tolist()))
        ]
