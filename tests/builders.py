"""Random log-probs and batches that many tests use: pairs, lists, groups of verified responses.

An item is (logps, ref_logps, batch), as a loss takes them.
"""

from types import SimpleNamespace

import torch

# ---- labels of ragged rows: functions of (rows, k, rng) -> (rows, k)


def first_wins(rows, k, rng):
    """The first response is chosen, the others are not."""
    return torch.eye(k)[0].expand(rows, k).clone()


def grades(rows, k, rng):
    """Whole grades from 0 to 3, with ties."""
    return torch.randint(0, 4, (rows, k), generator=rng)


def verdicts(rows, k, rng):
    """Right (1) or wrong (0)."""
    return torch.randint(0, 2, (rows, k), generator=rng)


def reals(rows, k, rng):
    """Real scores of either sign."""
    return torch.randn(rows, k, generator=rng, dtype=torch.float64)


def descending(rows, k, rng):
    """Scores from 0 to 1, the best response first."""
    return torch.rand(rows, k, generator=rng, dtype=torch.float64).sort(1, descending=True)[0]


# ---- items


def ragged(
    rows=5,
    k=2,
    length=7,
    seed=0,
    dtype=torch.float64,
    scale=3.0,
    fewest=None,
    scores=first_wins,
    **columns,
):
    """Random log-probs of `rows` rows of `k` responses of 1 to `length` tokens.

    -> logps (rows, k, length), a leaf with requires_grad; ref_logps; a batch with mask, scores,
    parents and the given columns. All are 0 outside the mask. Log-probs lie between -scale and 0.
    fewest: a row has between `fewest` and k responses, the first row k and the second `fewest`;
    absent responses come last.
    """
    rng = torch.Generator().manual_seed(seed)
    count = torch.randint(1, length + 1, (rows, k), generator=rng)
    if fewest is not None:
        n = torch.randint(fewest, k + 1, (rows, 1), generator=rng)
        n[0], n[1:2] = k, fewest
        count *= torch.arange(k) < n
    mask = torch.arange(length) < count[..., None]  # (rows, k, length)
    logps, ref_logps = (
        -scale * torch.rand(rows, k, length, generator=rng, dtype=torch.float64) * mask
        for _ in range(2)
    )
    labels = scores(rows, k, rng).to(torch.float64) * mask.any(-1)
    parents = torch.full((rows, k), -1)
    batch = SimpleNamespace(mask=mask, scores=labels, parents=parents, **columns)
    return logps.to(dtype).requires_grad_(), ref_logps.to(dtype), batch


def changed(item, **columns):
    """The same item with other columns."""
    logps, ref_logps, batch = item
    return logps, ref_logps, SimpleNamespace(**vars(batch) | columns)


def elsewhere(item):
    """The same item on the meta device, where a loss that reads a value fails."""
    logps, ref_logps, batch = item
    columns = {name: value.to("meta") for name, value in vars(batch).items()}
    return logps.to("meta"), ref_logps.to("meta"), SimpleNamespace(**columns)


# ---- inputs of the mutants and the contract: what a loss takes, and what it refuses


def pairs():
    """Pairs in two precisions and sizes, some at the reference.

    The last items are refused: log-probs of another shape, lists, a response without tokens.
    """
    inputs = [ragged(), ragged(seed=1, scale=9), ragged(seed=2, dtype=torch.bfloat16)]
    logps, ref_logps, batch = inputs[0]
    tied = (torch.where(torch.arange(5)[:, None, None] < 2, ref_logps, logps), ref_logps, batch)
    flat = [(logps[0], ref_logps[0], batch), (logps[..., 0], ref_logps[..., 0], batch)]
    refused = [*flat, ragged(k=3, seed=3), ragged(seed=4, fewest=1)]
    return [*inputs, tied, elsewhere(tied), *refused]


def far_pairs():
    """Pairs, some with probability ratios that overflow float32."""
    return [
        *pairs(),
        ragged(seed=5, scale=60),
        ragged(seed=6, scale=200, dtype=torch.float32),
    ]


def likelihoods():
    """Pairs of likely, unlikely and certain responses; the last item has a positive log-prob.

    Positive log-probs are refused.
    """
    logps, ref_logps, batch = ragged(scale=0.5)
    certain, positive = logps.detach().clone(), logps.detach().clone()
    certain[:2] = 0.0
    positive[0, 0, 0] = 0.25
    likely = [(logps, None, batch), (certain, ref_logps, batch), (logps / 100, ref_logps, batch)]
    single = ragged(seed=1, scale=0.5, dtype=torch.float32)
    return [*pairs(), *likely, single, (positive, ref_logps, batch)]


def ranked(item):
    """A column `rank` with 1 to n in random order, and 0 for absent responses."""
    present = item[2].mask.any(-1)
    draw = torch.rand(present.shape, generator=torch.Generator().manual_seed(9))
    draw = draw.masked_fill(~present, 2.0)
    return changed(item, rank=(draw.argsort(1).argsort(1) + 1) * present)


def put(column, row, place, value):
    """A copy of a column with one entry changed."""
    new = column.clone()
    new[row, place] = value
    return new


def lists():
    """Lists of graded items with and without given ranks.

    The last items are refused: single responses, negative or huge grades, wrong ranks, and absent
    items with a grade or a rank.
    """
    full = ragged(k=5, scores=grades)
    short = ragged(k=5, seed=1, scores=grades, fewest=4)
    half = ragged(k=4, seed=2, scores=grades, dtype=torch.bfloat16)
    order = ranked(full)
    batch = short[2]
    first = changed(  # the absent item comes first
        (short[0].roll(1, 1), short[1].roll(1, 1), batch),
        mask=batch.mask.roll(1, 1),
        scores=2.0 * (batch.scores.roll(1, 1) > 2),
    )
    idle = changed(full, scores=0 * full[2].scores)
    inputs = [full, short, half, order, ranked(short), ragged(seed=3), first, idle]
    inputs += [changed(order, rank=order[2].rank.double()), elsewhere(order)]
    gone = ragged(k=3, seed=4, scores=grades, fewest=2)
    scores, rank = full[2].scores, order[2].rank
    refused = [
        ragged(seed=5, fewest=1),
        changed(full, scores=put(scores, 0, 0, 64.0)),
        changed(full, scores=put(scores, 0, 0, -1.0)),
        changed(gone, scores=put(gone[2].scores, 1, -1, 1.0)),
        changed(ranked(gone), scores=put(gone[2].scores, 1, -1, 1.0)),
        changed(order, rank=put(rank, 0, 0, rank[0, 1])),
        changed(short, rank=put(ranked(short)[2].rank, 1, -1, 7)),
    ]
    return [*inputs, *refused]


def groups():
    """Groups of verified responses, some all right or all wrong, near and far from the old policy.

    The last items are refused: scores between 0 and 1, an absent response with score 1, an empty
    row.
    """
    inputs = [
        ragged(k=6, scale=1, scores=verdicts),
        ragged(k=6, scale=1, seed=1, scores=verdicts, fewest=5),
        ragged(k=2, scale=1, seed=2, scores=verdicts),
        ragged(k=4, scale=1, seed=3, scores=verdicts, dtype=torch.bfloat16),
    ]
    logps, ref_logps, batch = item = ragged(k=4, scale=1, seed=4, scores=verdicts)
    near = (ref_logps + 0.01 * logps, ref_logps, batch)
    far = ragged(k=4, scale=4, seed=5, scores=verdicts)
    off = ragged(k=4, scale=200, seed=7, scores=verdicts, dtype=torch.float32)
    lone = ragged(k=3, scale=1, seed=6, scores=verdicts, fewest=2)
    some = torch.arange(5) > 0
    mask, scores = lone[2].mask & some[:, None, None], lone[2].scores * some[:, None]
    refused = [
        changed(item, scores=put(batch.scores, 0, 0, 0.5)),
        changed(lone, scores=put(lone[2].scores, 1, -1, 1.0)),
        changed(lone, mask=mask, scores=scores),
    ]
    return [*inputs, near, far, off, elsewhere(near), *refused]


# ---- for the tests of one loss


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
