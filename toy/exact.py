"""Worlds in which every response is enumerated, so that optimum, KL and reward are exact.

A response is a sequence of `length` tokens out of `vocab` symbols, so there are R = vocab^length of
them, in lexicographic order. A prompt is a number below P. `Table` is the policy, `World` is the
world, and `population` finds the optimum of an expected loss without sampling. Everything stays on
the CPU. The worlds bandit, tokens, modular and tree are built on this file.
"""

import copy
import math

import torch
from torch import nn

from data import UserError, collate
from toy import world


def prefixes(tokens, vocab):
    """The index of the prefix before each token, for tokens (..., T) -> (..., T).

    Prefixes are numbered level by level: 0 is the empty one, and token v leads from prefix i to
    prefix i * vocab + 1 + v.
    """
    prefix, out = torch.zeros_like(tokens[..., 0]), []
    for token in tokens.unbind(-1):
        out.append(prefix)
        prefix = prefix * vocab + 1 + token
    return torch.stack(out, -1)


class Table(nn.Module):
    """A policy with a separate softmax after every prefix; it starts uniform.

    It can represent any distribution over the responses of each prompt. Its parameters are `logits`
    (P, prefixes, vocab). A subclass that computes `logits` from other parameters passes
    parameters=False and defines `logits` as a property.
    """

    def __init__(self, vocab, length=1, prompts=1, parameters=True):
        super().__init__()
        self.vocab, self.length = vocab, length
        if parameters:
            count = sum(vocab**t for t in range(length))
            self.logits = nn.Parameter(torch.zeros(prompts, count, vocab))

    def logps(self, batch):
        """Log-probs (B, K, T) of the tokens batch.target (B, K, T), given the prompts batch.label.

        They are 0 outside batch.mask. In a batch without a mask, every token is scored.
        """
        prefix, label = prefixes(batch.target, self.vocab), batch.label[:, None, None]
        out = self.logits.log_softmax(-1)[label, prefix, batch.target]  # (B, K, T)
        mask = getattr(batch, "mask", None)
        return out if mask is None else out.masked_fill(~mask, 0.0)

    @torch.no_grad()
    def sample(self, prompts, k, rng):
        """k responses for each prompt (a number) -> a list of k lists of token ids per prompt.

        rng: a generator on the CPU, where samples are drawn.
        """
        label = torch.tensor(prompts, dtype=torch.long)[:, None].expand(-1, k)  # (n, k)
        prefix, out, probs = torch.zeros_like(label), [], self.logits.softmax(-1).cpu()
        for _ in range(self.length):
            token = torch.multinomial(probs[label, prefix].flatten(0, 1), 1, generator=rng)
            out.append(token.view_as(label))
            prefix = prefix * self.vocab + 1 + out[-1]
        return torch.stack(out, -1).tolist()

    @torch.no_grad()
    def next_logps(self, prompt, written):
        """Log-probs (n, vocab), float64, of the next token after each of n beginnings (n, t)."""
        prefix = torch.zeros(len(written), dtype=torch.long)
        for token in written.unbind(1):
            prefix = prefix * self.vocab + 1 + token
        return self.logits[prompt, prefix].double().log_softmax(-1)

    def sequences(self):
        """All responses (R, T), in lexicographic order."""
        return torch.cartesian_prod(*[torch.arange(self.vocab)] * self.length).view(-1, self.length)

    def log_probs(self):
        """Log-probs (P, R) of all responses, float64, with gradient."""
        log_probs = self.logits.double().log_softmax(-1)
        out, first = log_probs.new_zeros(len(log_probs), 1), 0
        for _ in range(self.length):
            level = log_probs[:, first : first + out.shape[1]]  # (P, prefixes of one length, vocab)
            first += out.shape[1]
            out = (out[..., None] + level).flatten(1)
        return out

    def probs(self):
        """Probabilities (P, R) of all responses, float64, with gradient."""
        return self.log_probs().exp()

    @torch.no_grad()
    def set_log_probs(self, log_probs):
        """Set the distribution to these log-probs, (P, R) or (R,), and return the table.

        They need not be normalized. A response with -inf never occurs.
        """
        level = torch.as_tensor(log_probs, dtype=torch.float64)
        level, levels = level.expand(len(self.logits), self.vocab**self.length), []
        for _ in range(self.length):
            level = level.unflatten(1, (-1, self.vocab))
            # after a prefix that never occurs, the distribution is uniform
            levels.insert(0, level.log_softmax(-1).nan_to_num(0.0, neginf=-math.inf))
            level = level.logsumexp(-1)
        self.logits.copy_(torch.cat(levels, 1))
        return self

    @torch.no_grad()
    def kl(self, other):
        """KL(self || other) in nats, mean over prompts."""
        p, q = self.log_probs(), other.log_probs().to(self.logits.device)
        return torch.where(p > -math.inf, p.exp() * (p - q), 0.0).sum(1).mean().item()

    @torch.no_grad()
    def entropy(self):
        """Entropy in nats, mean over prompts."""
        p = self.probs()
        return -torch.special.xlogy(p, p).sum(1).mean().item()

    @torch.no_grad()
    def expect(self, f):
        """The expectation of f, mean over prompts.

        f: a tensor (P, R) or (R,), or a function of all responses (R, T) that returns one.
        """
        values = f(self.sequences()) if callable(f) else f
        return (self.probs() * torch.as_tensor(values).to(self.logits.device)).sum(1).mean().item()

    @torch.no_grad()
    def optimum(self, rewards, beta):
        """The Table that maximizes E[r] - beta KL(policy || self), for rewards (P, R) or (R,).

        It is self * exp(r / beta) / Z (DPO, eq. 4).
        """
        best = Table(self.vocab, self.length, len(self.logits))
        return best.set_log_probs(self.log_probs().cpu() + rewards / beta)


def minimize(parameters, value):
    """Move parameters in place to a minimum of value() -> a scalar tensor, by L-BFGS in float64."""
    optimizer = torch.optim.LBFGS(
        parameters,
        max_iter=500,
        tolerance_grad=1e-12,
        tolerance_change=1e-16,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        found = value()
        found.backward()
        return found

    optimizer.step(closure)


def population(world, pairs, loss, cfg):
    """The Table that minimizes the mean of weight * loss over weighted pairs, in float64.

    world: a world of this file; its reference is the reference of the loss and the initial policy.
    pairs: rows with a column `weight`, as from `World.pairs_all`. loss(logps, ref_logps, batch,
    cfg) -> losses, metrics, as in methods/.
    """
    policy, batch = world.model().double(), collate(pairs)
    ref_logps, weight = policy.logps(batch).detach(), batch.weight.double()

    def value():
        losses, _ = loss(policy.logps(batch), ref_logps, batch, cfg)
        return (weight * losses).mean()

    minimize(policy.parameters(), value)
    return policy


class World(world.World):
    """Responses of a table with known rewards. The reference is given, so no base model is trained.

    vocab, length, prompts: the number of symbols, tokens and prompts.
    rewards: the true rewards (P, R) or (R,), or a function of all responses (R, T) that returns
        them.
    reference: the base model, a Table or log-probs (P, R) or (R,) that need not be normalized. By
        default it is a tree of softmaxes with logits from N(0, spread^2), drawn from `seed`.
    data: the distribution of the demonstrations, in the same form; by default the reference.
    """

    kind = "table"

    def __init__(
        self, vocab, length, prompts=1, *, rewards, reference=None, data=None, spread=0.7, seed=0
    ):
        self.shape = (vocab, length, prompts)
        if reference is None:
            rng = torch.Generator().manual_seed(seed)
            reference = Table(*self.shape)
            with torch.no_grad():
                reference.logits.normal_(0.0, spread, generator=rng)
        self.reference = self._table(reference)
        self.data = self.reference if data is None else self._table(data)
        values = rewards(self.reference.sequences()) if callable(rewards) else rewards
        values = torch.as_tensor(values, dtype=torch.float64)
        self.truth = values.expand(prompts, vocab**length).contiguous()

    def _table(self, given):
        table = given if isinstance(given, Table) else Table(*self.shape).set_log_probs(given)
        return table.requires_grad_(False)

    def key(self):
        """Everything that defines this world: shape, rewards, reference and data."""
        tables = [table.logits.tolist() for table in (self.reference, self.data)]
        return [self.name, self.shape, self.truth.tolist(), *tables]

    def model(self):
        """A trainable copy of the reference."""
        return copy.deepcopy(self.reference).requires_grad_(True)

    def prompts(self, n, rng):
        """n prompts, as uniformly drawn numbers."""
        return torch.randint(self.shape[2], (n,), generator=rng).tolist()

    def demonstrations(self, n, rng):
        """n rows of one response each, drawn from `data`."""
        prompts = self.prompts(n, rng)
        drawn = self.data.sample(prompts, 1, rng)
        return [dict(prompt=p, responses=r, scores=[1.0]) for p, r in zip(prompts, drawn)]

    def rewards(self):
        """The true reward of all responses, (P, R) float64."""
        return self.truth

    def reward(self, prompts, responses):
        """The true reward of n responses (token ids) to n prompts, (n,) float64."""
        vocab, length, _ = self.shape
        tokens = torch.as_tensor(responses).view(len(prompts), length)
        place = vocab ** torch.arange(length - 1, -1, -1)
        return self.truth[torch.as_tensor(prompts), (tokens * place).sum(1)]

    def wins(self, first, second):
        """The probability (P, n) that response first[i] beats response second[i] (Bradley-Terry).

        first, second: (n,) numbers of responses.
        """
        return torch.sigmoid(self.truth[:, first] - self.truth[:, second])

    def optimum(self, reference, beta):
        """The Table that maximizes E[r] - beta KL(policy || reference) (DPO, eq. 3 and 4)."""
        return reference.optimum(self.truth, beta)

    def objective(self, policy, beta, reference=None):
        """The exact E[r] - beta KL(policy || reference) (DPO, eq. 3).

        reference: by default the world's.
        """
        return policy.expect(self.truth) - beta * policy.kl(reference or self.reference)

    def frontier(self, kl):
        """The largest expected reward at a given KL (in nats) from the reference.

        The policy reference * exp(r / beta) / Z attains it; bisection finds the beta with this KL
        between 0.01 and 100.
        """
        low, high = 1e-2, 1e2
        for _ in range(60):
            beta = (low * high) ** 0.5
            if self.optimum(self.reference, beta).kl(self.reference) < kl:
                high = beta
            else:
                low = beta
        return self.optimum(self.reference, beta).expect(self.truth)

    def pairs_all(self, sampler=None, flip=0.0):
        """All P * R * (R - 1) ordered pairs of different responses as rows, chosen first.

        The column `weight` holds the probability of a pair, scaled to a mean of 1. Both responses
        are drawn from `sampler` (a Table; None: uniform), the first one wins with probability
        `wins`, and the label is flipped with probability `flip`. The mean of weight * loss over all
        rows is therefore proportional to the expected loss. UserError: flip is outside [0, 1].
        """
        if not 0 <= flip <= 1:
            raise UserError(f"flip = {flip} must be in [0, 1]")
        count = self.truth.shape[1]
        if sampler is None:
            chance = torch.full_like(self.truth, 1 / count)
        else:
            chance = sampler.probs().detach().cpu()
        first, second = (~torch.eye(count, dtype=torch.bool)).nonzero(as_tuple=True)
        wins = self.wins(first, second)
        labelled = (1 - flip) * wins + flip * (1 - wins)
        weight = chance[:, first] * chance[:, second] * labelled  # (P, R (R - 1))
        weight = (weight / weight.mean()).tolist()
        ids, truth = self.reference.sequences().tolist(), self.truth.tolist()
        return [
            dict(
                prompt=p,
                responses=[ids[i], ids[j]],
                scores=[1.0, 0.0],
                reward=[truth[p][i], truth[p][j]],
                weight=weight[p][n],
            )
            for p in range(self.shape[2])
            for n, (i, j) in enumerate(zip(first.tolist(), second.tolist()))
        ]
