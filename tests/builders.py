"""Random log-probs and batches that many tests use: pairs, lists, groups of verified responses.

Every item is (logps, ref_logps, batch), as a loss takes them.
"""

from types import SimpleNamespace

import torch


def ragged(k, scores, seed, dtype=torch.float64, absent=False, scale=1.0, batch=5, length=4):
    """Random log-probs of `batch` rows of k responses of 1 to `length` tokens -> (logps, ref_logps, batch)."""
    rng = torch.Generator().manual_seed(seed)
    count = torch.randint(1, length + 1, (batch, k), generator=rng)
    if absent:  # the last response of every other row is not there
        count[::2, -1] = 0
    mask = torch.arange(length) < count[..., None]
    logps, ref_logps = (
        (-scale * torch.rand(batch, k, length, generator=rng, dtype=torch.float64) - 0.1) * mask
        for _ in range(2)
    )
    scores = scores(batch, k, rng).to(torch.float64) * mask.any(-1)
    columns = dict(mask=mask, scores=scores, parents=torch.full((batch, k), -1))
    return logps.to(dtype), ref_logps.to(dtype), SimpleNamespace(**columns)


def first_wins(batch, k, rng):
    return torch.eye(k)[0].expand(batch, k).clone()


def grades(batch, k, rng):
    return torch.randint(0, 4, (batch, k), generator=rng)


def verdicts(batch, k, rng):
    return torch.randint(0, 2, (batch, k), generator=rng)


def changed(item, **columns):
    """The same inputs with other columns."""
    logps, ref_logps, batch = item
    return logps, ref_logps, SimpleNamespace(**vars(batch) | columns)


def elsewhere(item):
    """The same inputs on a device where nobody can look at values: what is asked there would fail."""
    logps, ref_logps, batch = item
    return (
        logps.to("meta"),
        ref_logps.to("meta"),
        SimpleNamespace(**{k: v.to("meta") for k, v in vars(batch).items()}),
    )


def pairs():
    """Pairs, in two precisions and sizes, some at the reference; and what is refused: lists, flat log-probs, a response without tokens."""
    inputs = [
        ragged(2, first_wins, 0),
        ragged(2, first_wins, 1, scale=9.0),
        ragged(2, first_wins, 2, torch.bfloat16),
    ]
    logps, ref_logps, batch = inputs[0]
    tied = (torch.where(torch.arange(5)[:, None, None] < 2, ref_logps, logps), ref_logps, batch)
    flat = [(logps[0], ref_logps[0], batch), (logps[..., 0], ref_logps[..., 0], batch)]
    return [
        *inputs,
        tied,
        elsewhere(tied),
        *flat,
        ragged(3, first_wins, 3),
        ragged(2, first_wins, 4, absent=True),
    ]


def far_pairs():
    """Pairs, some at ratios that no float32 holds."""
    return [
        *pairs(),
        ragged(2, first_wins, 5, scale=60.0),
        ragged(2, first_wins, 6, torch.float32, scale=200.0),
    ]


def ranked(item):
    """A column `rank`, 1 to n in a random order, 0 for what is absent."""
    present = item[2].mask.any(-1)
    draw = torch.rand(present.shape, generator=torch.Generator().manual_seed(9)).masked_fill(
        ~present, 2.0
    )
    return changed(item, rank=(draw.argsort(1).argsort(1) + 1) * present)


def lists():
    """Lists of graded items with and without given ranks; refused: no list, negative grades, wrong ranks, graded absent items."""
    inputs = [
        ragged(5, grades, 0),
        ragged(5, grades, 1, absent=True),
        ragged(4, grades, 2, torch.bfloat16),
    ]
    inputs += [ranked(inputs[0]), ranked(inputs[1]), ragged(2, first_wins, 3)]
    first = [x.roll(1, 1) for x in inputs[1][:2]]  # the absent item comes first
    inputs += [
        changed(
            (*first, inputs[1][2]),
            mask=inputs[1][2].mask.roll(1, 1),
            scores=2.0 * (inputs[1][2].scores.roll(1, 1) > 2),
        )
    ]
    inputs += [
        changed(inputs[0], scores=0 * inputs[0][2].scores),
        changed(inputs[3], rank=inputs[3][2].rank.double()),
    ]
    bad, twice = ragged(3, grades, 4, absent=True), ranked(inputs[0])
    graded = bad[2].scores.clone()
    graded[0, -1] = 1.0
    zero = inputs[0][2].scores.clone()
    zero[0, 0] = -1.0
    wrong = twice[2].rank.clone()
    wrong[0, 0] = wrong[0, 1]
    places = ranked(inputs[1])[2].rank.clone()
    places[0, -1] = 7
    large = inputs[0][2].scores.clone()
    large[0, 0] = 64.0
    bad_inputs = [
        changed(inputs[0], scores=large),
        ragged(2, first_wins, 5, absent=True),
        changed(bad, scores=graded),
        changed(inputs[0], scores=zero),
    ]
    return [
        *inputs,
        elsewhere(inputs[3]),
        *bad_inputs,
        changed(twice, rank=wrong),
        changed(inputs[1], rank=places),
    ]


def groups():
    """Groups of verified responses, some all right or all wrong, near and far from pi_old; and what is refused."""
    inputs = [
        ragged(6, verdicts, 0),
        ragged(6, verdicts, 1, absent=True),
        ragged(2, verdicts, 2),
        ragged(4, verdicts, 3, torch.bfloat16),
    ]
    logps, ref_logps, batch = ragged(4, verdicts, 4)
    near = (ref_logps + 0.01 * logps, ref_logps, batch)
    far, off = ragged(4, verdicts, 5, scale=4.0), ragged(4, verdicts, 7, torch.float32, scale=200.0)
    half, lone = batch.scores.clone(), ragged(3, verdicts, 6, absent=True)
    half[0, 0] = 0.5
    right = lone[2].scores.clone()
    right[0, -1] = 1.0
    empty = changed(
        lone,
        mask=lone[2].mask & (torch.arange(5) > 0)[:, None, None],
        scores=lone[2].scores * (torch.arange(5) > 0)[:, None],
    )
    return [
        *inputs,
        near,
        far,
        off,
        elsewhere(near),
        changed((logps, ref_logps, batch), scores=half),
        changed(lone, scores=right),
        empty,
    ]


def likelihoods():
    """Pairs of log-probs that make a probability: certain, likely and unlikely ones; and what is refused, a positive log-prob."""
    logps, ref_logps, batch = ragged(2, first_wins, 0, scale=0.5)
    certain = logps.clone()
    certain[:2] = 0.0
    positive = logps.clone()
    positive[0, 0, 0] = 0.25
    return [
        *pairs(),
        (logps, None, batch),
        (certain, ref_logps, batch),
        (logps / 100, ref_logps, batch),
        (positive, ref_logps, batch),
    ]


# ---- for the tests of one loss


def ragged_pairs(seed=0, **kwargs):
    """Five ragged pairs, the log-probs of the policy with gradient; kwargs as of `ragged`."""
    logps, ref_logps, batch = ragged(2, first_wins, seed, **kwargs)
    return logps.requires_grad_(), ref_logps, batch


def everything_scored(logps):
    """A batch for log-probs (B, K, T) without padding, the first response chosen."""
    mask = torch.ones(logps.shape, dtype=torch.bool)
    return SimpleNamespace(mask=mask, scores=torch.eye(logps.shape[1])[0].expand(logps.shape[:2]))


def one_pair(chosen, rejected, ref_chosen=0.0, ref_rejected=0.0, dtype=torch.float64):
    """One pair of one-token responses with these log-probs."""
    logps = torch.tensor([[[chosen], [rejected]]], dtype=dtype, requires_grad=True)
    ref_logps = torch.tensor([[[ref_chosen], [ref_rejected]]], dtype=dtype)
    return logps, ref_logps, everything_scored(logps)


def margins(z, beta=1.0):
    """One-token pairs whose beta * (chosen - rejected) is z (B,); the reference is zero."""
    z = torch.as_tensor(z).reshape(-1) / beta
    logps = torch.stack([z / 2, -z / 2], 1)[..., None]
    return logps, torch.zeros_like(logps), everything_scored(logps)


def swapped(item):
    """The same pairs with chosen and rejected exchanged."""
    logps, ref_logps, batch = item
    return logps.flip(1), ref_logps.flip(1), SimpleNamespace(mask=batch.mask.flip(1))


def value_and_gradient(loss, logps, ref_logps, batch, cfg):
    """Losses (B,) and the gradient of their sum in the policy's log-probs."""
    losses, _ = loss(logps, ref_logps, batch, cfg)
    return losses, torch.autograd.grad(losses.sum(), logps)[0]
