"""Inputs on which every single edit of a loss changes a value, a gradient, a metric or an error: no line of it is idle, and none is without
inputs that would show its fault. That the values are right is for tests/test_NAME.py.

For each `loss` in methods/ and each function of its file that it calls, all single-edit mutants are made (an operator swapped, an operand,
sign or call dropped, a constant changed, a sum for a mean, two arguments exchanged, an argument detached, a condition turned
round) and run on random ragged inputs with every variant of its Config. A mutant that makes no difference is a survivor, and stands in
SURVIVORS with the reason why nobody could tell it from the original."""

import ast
import copy
import importlib
import inspect
import warnings
from types import SimpleNamespace

import pytest
import torch

import data
from lab import settings as lab_module

# ---------------------------------------------------------------- inputs


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


def far_pairs():
    """Pairs, some at ratios that no float32 holds."""
    return [
        *pairs(),
        ragged(2, first_wins, 5, scale=60.0),
        ragged(2, first_wins, 6, torch.float32, scale=200.0),
    ]


def judged_pairs():
    """Pairs with a reward model's margins, in both directions, small and large."""
    margin = torch.tensor([-9.0, -0.3, 0.2, 2.5, 8.0], dtype=torch.float64)
    return [changed(item, margin=margin) for item in pairs()]


def scored_pairs():
    """Pairs with normalised scores, in both directions; and what is refused: scores below 0, above 1, and none."""
    rng = torch.Generator().manual_seed(8)
    quality = torch.rand(5, 2, generator=rng, dtype=torch.float64)
    items = [changed(item, quality=quality.to(item[0].device)) for item in pairs()]
    items.append(changed(items[0], quality=quality.clone().requires_grad_()))
    high, low = quality.clone(), quality.clone()
    high[0, 0], low[0, 1] = 1.25, -0.25
    edge = torch.tensor(
        [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0]], dtype=torch.float64
    )
    return [*items, *(changed(items[0], quality=q) for q in (high, low, edge)), pairs()[0]]


def best_first():
    """Lists of which one is the best: negative scores, absent responses, ties; and what is refused, an empty row."""
    items = [
        ragged(3, grades, 0),
        ragged(3, grades, 1, absent=True),
        ragged(2, first_wins, 2, torch.bfloat16),
    ]
    logps, ref_logps, batch = items[1]
    negative = changed(items[1], scores=(batch.scores - 5) * batch.mask.any(-1))
    empty = changed(items[1], mask=batch.mask & (torch.arange(5) > 0)[:, None, None])
    return [*items, negative, (logps, None, batch), elsewhere(items[0]), empty]


def targeted_lists():
    """Lists of real scores with targets q; absent responses, pairs, ties; refused: empty rows, infinite scores, no or wrong targets."""

    def with_q(item):
        present = item[2].mask.any(-1)
        draw = (
            torch.rand(
                present.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
            )
            * present
        )
        return changed(
            item,
            q=draw / draw.sum(1, keepdim=True).clamp(min=1e-9),
            scores=item[2].scores * 1.3 - 2 * draw,
        )

    items = [
        with_q(ragged(4, grades, 0)),
        with_q(ragged(5, grades, 1, absent=True)),
        with_q(ragged(3, grades, 2, torch.bfloat16)),
    ]
    items += [
        with_q(ragged(2, first_wins, 3)),
        changed(with_q(ragged(4, grades, 4)), scores=torch.ones(5, 4, dtype=torch.float64)),
    ]
    logps, ref_logps, batch = items[1]
    first = changed(
        (logps.roll(1, 1), ref_logps.roll(1, 1), batch),
        **{n: getattr(batch, n).roll(1, 1) for n in ("mask", "scores", "q")},
    )
    lone, below = (
        with_q(ragged(2, grades, 6, absent=True)),
        changed(items[1], scores=(batch.scores - 9) * batch.mask.any(-1)),
    )
    infinite, small = items[0][2].scores.clone(), items[0][2].q.clone()
    infinite[0, 0], small[0] = torch.inf, 0.9 * small[0]
    bad = [
        changed(items[0], scores=infinite),
        changed(items[0], q=small),
        changed(items[1], q=batch.q.roll(1, 1)),
    ]
    bad += [changed(items[0], q=2 * items[0][2].q - items[0][2].q.flip(1)), ragged(3, grades, 5)]
    empty = changed(items[1], mask=batch.mask & (torch.arange(5) > 0)[:, None, None])
    half = changed(items[0], scores=items[0][2].scores.bfloat16())
    return [
        *items,
        half,
        first,
        lone,
        below,
        (logps, None, batch),
        elsewhere(items[0]),
        elsewhere(bad[-1]),
        *bad,
        empty,
    ]


def trees():
    """Trees of steps with hidden states, flat lists, absent and tied responses; refused: wrong scores, one response, an empty step."""

    def grown(seed, dtype=torch.float64, absent=False):
        logps, ref_logps, batch = ragged(7, grades, seed, dtype, absent)
        leaf = torch.tensor([0, 0, 1, 1, 0, 1, 1])
        states = torch.randn(
            5, 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).to(dtype)
        parents = torch.tensor([-1, 0, 1, 0, 0, 4, -1]).expand(5, -1)
        return changed(
            (logps, ref_logps, batch),
            parents=parents,
            scores=batch.scores * leaf / 3,
            states=states,
        )

    items = [grown(0), grown(1, absent=True), grown(2, torch.bfloat16)]
    flat = ragged(4, grades, 3)
    states = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flat = changed(flat, scores=flat[2].scores / 3, states=states)
    bare = (
        *flat[:2],
        SimpleNamespace(**{n: v for n, v in vars(flat[2]).items() if n != "parents"}),
    )
    deep = torch.tensor([-1, 0, 1, -1]).expand(5, -1)
    lone = changed(flat, mask=flat[2].mask & (torch.arange(4) < 1)[:, None])
    two = changed(
        flat,
        mask=flat[2].mask & (torch.arange(4) < 2)[:, None],
        scores=flat[2].scores * (torch.arange(4) < 2),
    )
    items += [(flat[1], flat[1], flat[2])]  # at the reference: all rewards tie
    items += [
        flat,
        bare,
        two,
        changed(flat, parents=deep, scores=flat[2].scores * torch.tensor([0, 0, 1, 1])),
        elsewhere(items[0]),
    ]
    known = items[0][2].scores.clone()
    known[:, :2] = 0.5  # steps within a response have scores too
    one, short = torch.zeros_like(flat[2].scores), flat[2].mask.clone()
    one[0, 0], short[0, 1:] = 1.0, False  # a single pair in all; a single row that is no list
    items += [changed(items[0], scores=known), changed(two, scores=one)]
    bad = [changed(flat, mask=short, scores=flat[2].scores * short.any(-1))]
    bad += [changed(flat, scores=flat[2].scores + x) for x in (-0.5, 0.5)] + [lone]
    hole = items[0][2].mask.clone()
    hole[1, 1] = False
    return [*items, changed(flat, scores=0 * flat[2].scores), *bad, changed(items[0], mask=hole)]


def graded_pairs():
    """Pairs with graded scores, near and far from the reference, at it, without it; refused by odpo: a rejected one that scores more."""
    scores = torch.tensor(
        [[2.0, 0.5], [1.0, 0.9], [0.3, -4.0], [5.0, 1.0], [0.1, 0.0]], dtype=torch.float64
    )
    items = [
        changed(item, scores=scores) if item[2].scores.shape == (5, 2) else item
        for item in [*far_pairs(), *likelihoods()]
    ]
    logps, ref_logps, batch = items[0]
    flipped = changed(
        items[0], scores=torch.where(torch.arange(5)[:, None] < 2, scores.flip(1), scores)
    )
    return [*items, flipped, (ref_logps, ref_logps, batch), (logps, None, batch)]


def one_sided_pairs():
    """Pairs, near and far from the reference, above it and without it, and rows where one side is absent; refused: a row without any."""
    items = far_pairs()
    logps, ref_logps, batch = items[0]
    there = (
        [[1, 1], [1, 0], [1, 0], [0, 1], [1, 0]],
        [[1, 0]] * 4 + [[0, 1]],
        [[1, 0]] * 5,
        [[0, 1]] * 5,
        [[0, 0]] + [[1, 1]] * 4,
    )
    masks = [batch.mask & torch.tensor(sides).bool()[..., None] for sides in there]
    sides = [
        changed((logps * mask, known * mask, batch), mask=mask)
        for mask in masks
        for known in (ref_logps, 2 * logps)
    ]
    return [*items, *sides, (logps, None, batch)]


# every variant of every method: the fields of its Config, and the inputs that drive it
CASES = {
    "dpo": ([dict(beta=0.3), dict(beta=1.7)], pairs),
    "did": ([dict(beta=0.3), dict(beta=1.7)], pairs),
    "curry_dpo": ([dict(beta=0.3), dict(beta=1.7)], pairs),
    "sft": ([{}], best_first),
    "asft": (
        [
            dict(weight=0.3),
            dict(weight=1.7, beta=0.4),
            dict(weight=0.6, beta=2.0, supervised=False),
            dict(weight=0.7, supervised=False),
        ],
        likelihoods,
    ),
    "fdpo": (
        [dict(beta=0.3, divergence=d) for d in ("rkl", "fkl", "js")]
        + [dict(beta=0.3, divergence="alpha", alpha=a) for a in (0.0, 0.3, None)],
        far_pairs,
    ),
    "ld_dpo": (
        [
            dict(beta=0.3, alpha=0.3),
            dict(beta=1.7, alpha=0.0),
            dict(beta=0.7, alpha=0.6, on_reference=False),
        ],
        pairs,
    ),
    "insights": (
        [
            dict(beta=0.3),
            dict(variant="ipo", tau=0.3),
            dict(variant="ipo", tau=0.7, ipo_mean=False),
            dict(variant="nll"),
        ]
        + [
            dict(variant="kto", beta=0.3),
            dict(variant="kto", beta=0.3, z0=0.4, lambda_d=1.7, lambda_u=0.6),
        ]
        + [dict(variant="cpo", beta=0.3, lam=0.7)],
        one_sided_pairs,
    ),
    "survey": (
        [
            dict(
                variant=v,
                **{k: x and 3.1 * x if k in ("beta", "tau") else x for k, x in known.items()},
            )
            for v, known in importlib.import_module("methods.survey").VARIANTS.items()
        ]
        + [
            dict(variant="kto", z0=0.3),
            dict(variant="beta_dpo", beta=0.3, alpha=1.7, gamma=0.2),
            dict(variant="chi_po", beta=0.3, gamma=0.2),
        ]
        + [
            dict(variant="dr_dpo", beta=0.3, tau=0.4),
            dict(variant="dpop", beta=0.3, lam=0.4),
            dict(variant="slic", gamma=0.3, lam=0.7),
        ]
        + [
            dict(variant="alpha_dpo", alpha=0.9, gamma=0.3),
            dict(variant="cpo", lam=0.4),
            dict(variant="orpo", lam=0.7),
        ]
        + [
            dict(variant="dpo_nll", lam=0.4),
            dict(variant="odpo", alpha=0.7),
            dict(variant="r_dpo", alpha=-0.3),
        ],
        graded_pairs,
    ),
    "r2q": ([dict(beta=0.3), dict(beta=1.7)], pairs),
    "tpo": (
        [dict(beta=0.7, tau=t, asr=a) for t in ("model", "label", "none") for a in (True, False)]
        + [
            dict(beta=1.3, reduce="mean"),
            dict(divide=False),
            dict(divide=False, asr=False, tau="label"),
        ],
        trees,
    ),
    "three_d": (
        [
            dict(variant="dpo", beta=0.3),
            dict(variant="flex", beta=1.7, beta_rejected=0.4),
            dict(variant="sft", beta=0.3, gamma=0.6),
        ],
        pairs,
    ),
    "da_dpo": (
        [
            dict(beta=0.3),
            dict(beta=1.7, alpha=0.7, reach=4.0, gap="absolute"),
            dict(beta=0.7, alpha=1.3, reach=0.8, gap="signed"),
        ],
        scored_pairs,
    ),
    "madpo": (
        [
            dict(beta=0.3, c_max=4.0, tau=2.0),
            dict(beta=1.7, c_max=2.0, c_min=0.3, tau=4.0, lam=0.5),
        ],
        judged_pairs,
    ),
    "adpo": (
        [dict(target=t, tau=0.7) for t in ("hard", "raw", "zscore", "kde", "given", "order")]
        + [
            dict(target="hard", smoothing=0.2, reduce="mean"),
            dict(target="kde", beta_r=0.8, reduce="mean"),
        ],
        targeted_lists,
    ),
    "rdpo": ([dict(beta=0.3, epsilon=0.2), dict(beta=1.7, epsilon=0.0)], pairs),
    "ddo": ([dict(beta=0.3, alpha=1.9), dict(beta=1.7, alpha=0.0)], pairs),
    "irpo": (
        [
            dict(beta=0.7, inner=i, reduce=r)
            for i in ("excl", "incl", "code")
            for r in ("mean", "sum")
        ]
        + [dict(beta=0.7, weights=w) for w in ("position", "reciprocal")],
        lists,
    ),
    "disco": (
        [
            dict(variant=v, score=s, delta=0.05, beta=3.0, estimator=e)
            for v in ("disco", "disco_b")
            for s in ("log_l", "l_ratio")
            for e in ("k1", "k3")
        ]
        + [dict(variant="grpo", epsilon=0.3), dict(variant="dr_grpo", epsilon=0.3, normaliser=7.0)]
        + [
            dict(variant="dapo", epsilon=0.2, epsilon_high=0.4),
            dict(variant="dapo", epsilon=0.4, epsilon_high=0.2),
        ],
        groups,
    ),
}

# mutants that nobody could tell from the original: {method: {what was edited: why it is the same}}
SORTED = "batch.scores.masked_fill(~batch.mask.any(-1), -torch.inf).argsort(descending=True"
PAIR_WEIGHTS = "pair_weights(g.sum(-1), batch.scores.to(g.dtype), leaf, cfg)"
SURVIVORS = {
    "irpo": {
        "label_ranks: True -> False": "stable=True: a CPU sorts short rows stably anyway",
        f"label_ranks: {SORTED}, stable=True) -> {SORTED})": "the same",
    },
    "adpo": {
        "loss: 0.0 -> 1.0": "stands where q is 0: any finite number will do",
    },
    "madpo": {
        "margin_weights: h.detach() -> h": "a column of the data carries no gradient; if one did, test_madpo.py would notice"
    },
    "tpo": {
        "loss: torch.ones_like(difference) -> torch.ones_like(_detached(difference))": "ones have no gradient",
        f"loss: {PAIR_WEIGHTS} -> {PAIR_WEIGHTS.replace('g.sum(-1)', '_detached(g.sum(-1))')}": "the order of the rewards alone is read",
        "loss: g.sum(-1) -> _detached(g).sum(-1)": "the same",
        "loss: g.sum(-1) -> g.mean(-1)": "the same",
        "step_places: on.sum(-1) - 1 -> on.sum(-1) + 1": "the places of all steps shifted alike, which nothing reads",
        "step_places: on.sum(-1) - 1 -> on.sum(-1)": "the same",
        "step_places: 1 -> 2": "the same, or the other side of a square",
        "paths: 1 -> 2": "-2 is no place of a parent either",
        "paths: eye + child_of.to(eye.dtype) @ on -> eye - child_of.to(eye.dtype) @ on": "only which entries are 0 is read",
    },
    "insights": {
        "loss: torch.zeros_like(logps) -> torch.zeros_like(_detached(logps))": "zeros have no gradient"
    },
    "survey": {
        "loss: ref_logps.sum(-1).unbind(1) -> _detached(ref_logps.sum(-1)).unbind(1)": "where it has a gradient it is not read",
        "loss: ref_logps.sum(-1) -> _detached(ref_logps).sum(-1)": "the same",
        "loss: len(h) -> len(_detached(h))": "a length",
        "loss: standardised(mean_h) -> standardised(_detached(mean_h))": "it takes no gradient through by itself",
    },
    "asft": {
        "log1mexp: 2 -> 3": "where one form gives way to the other; both are exact there",
        "pair: ref_logps -> logps": "there is no reference, so what pair returns for it is not read",
    },
    "disco": {
        "loss: 1.0 -> 2.0": "the divisor of the advantages of a group all right or all wrong, which are 0",
        "gap: wrong | ~mixed[:, None] -> wrong": "an infinity that the mask takes away again; anomaly detection reports it (test_disco.py)",
    },
}


# ---------------------------------------------------------------- mutants


SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
    ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
TWINS = dict(sum="mean", max="min", amax="amin", maximum="minimum", any="all", argmax="argmin")
TWINS |= {b: a for a, b in TWINS.items()}


def changed_node(node, **fields):
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def edits(node, graph):
    """What may stand in the place of a node; graph: does a gradient go through it?"""
    if isinstance(node, ast.BinOp):
        if type(node.op) in SWAPS:
            yield changed_node(node, op=SWAPS[type(node.op)]())
        yield node.left
        yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield changed_node(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield changed_node(node, op=SWAPS[type(node.op)]())
        yield from node.values
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield changed_node(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield changed_node(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Call):
        yield from edits_of_call(node, graph)
    elif graph and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        other = {
            "logps": "ref_logps",
            "ref_logps": "logps",
            "chosen": "rejected",
            "rejected": "chosen",
        }.get(node.id)
        if other:
            yield ast.Name(other, ast.Load())


def edits_of_call(node, graph):
    """The call left out, its name for its twin's, two arguments exchanged, an argument detached or left out."""
    method = isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "F")
    )
    if method:
        yield node.func.value
    elif node.args and not isinstance(node.args[0], (ast.GeneratorExp, ast.Starred)):
        yield node.args[0]
    if isinstance(node.func, ast.Attribute) and node.func.attr in TWINS:
        yield changed_node(node, func=changed_node(node.func, attr=TWINS[node.func.attr]))
    if len(node.args) >= 2 and getattr(node.func, "attr", "") not in (
        "promote_types",
        "minimum",
        "maximum",
        "equal",
    ):  # these are symmetric
        yield changed_node(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for i, arg in enumerate(node.args):
        if graph and not isinstance(arg, (ast.Constant, ast.GeneratorExp, ast.Starred)):
            yield changed_node(
                node,
                args=[
                    *node.args[:i],
                    ast.Call(ast.Name("_detached", ast.Load()), [arg], []),
                    *node.args[i + 1 :],
                ],
            )
    if method and graph:
        inner = ast.Call(ast.Name("_detached", ast.Load()), [node.func.value], [])
        yield changed_node(node, func=changed_node(node.func, value=inner))
    for i in range(len(node.keywords)):
        yield changed_node(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def sites(function):
    """(path, node, whether a gradient goes through) of all nodes of a function that may be edited: not its docstring, its signature, nor
    what an error says. None goes through a check that stands alone, a condition, and what is detached."""

    def walk(node, path, graph):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            graph = graph and node.func.attr not in ("dim", "detach")
        graph = graph and not isinstance(node, (ast.Expr, ast.Compare))
        yield path, node, graph
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                yield from walk(value, (*path, name), graph)
            elif isinstance(value, list):
                for i, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        yield from walk(child, (*path, (name, i)), graph)

    for i, statement in enumerate(function.body):
        yield from walk(statement, (("body", i),), True)


def replaced(function, path, new):
    """A copy of a function with another node at a path."""
    out = node = copy.deepcopy(function)
    for step in path[:-1]:
        node = getattr(node, step[0])[step[1]] if isinstance(step, tuple) else getattr(node, step)
    if isinstance(path[-1], tuple):
        getattr(node, path[-1][0])[path[-1][1]] = copy.deepcopy(new)
    else:
        setattr(node, path[-1], copy.deepcopy(new))
    return ast.fix_missing_locations(out)


def functions_of(module):
    """The functions of a file that its loss is made of: itself and what it calls, and so on.

    A table of functions, NAME = dict(...), is followed too; tables come last, after their functions."""
    body = ast.parse(inspect.getsource(module)).body
    tree = {f.name: f for f in body if isinstance(f, ast.FunctionDef)}
    tables = {a.targets[0].id: a for a in body if isinstance(a, ast.Assign) and refers(a, tree)}
    if hasattr(module, "pair"):  # the checks that losses on pairs share
        tree["pair"] = ast.parse(inspect.getsource(data.pair)).body[0]
    found, ask = {}, ["loss"]
    while ask:
        name = ask.pop()
        node = tree.get(name) or tables.get(name)
        if node and name not in found:
            found[name] = node
            ask += names_in(node)
    return dict(sorted(found.items(), key=lambda item: item[0] in tables))


def names_in(node):
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def refers(node, names):
    """Does an assignment to one name read any of these names?"""
    single = isinstance(node.targets[0], ast.Name)
    return single and any(name in names for name in names_in(node.value))


def mutants(module):
    """(what was edited, functions of the mutant) for every single edit."""
    found = functions_of(module)
    for name, function in found.items():
        if isinstance(function, ast.Assign):
            continue
        original = ast.unparse(function)
        for path, node, graph in sites(function):
            for new in edits(node, graph):
                mutant = replaced(function, path, new)
                if ast.unparse(mutant) != original:
                    before, after = (ast.unparse(x).split("\n")[0] for x in (node, new))
                    yield f"{name}: {before} -> {after}", found | {name: mutant}


def built(module, functions):
    """The loss made of these functions, and a list that fills when `_detached` cut a gradient."""
    cut = []

    def detached(x):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            cut.append(True)
            return x.detach()
        return x

    space = vars(data) | vars(module) | {"_detached": detached}
    code = ast.fix_missing_locations(ast.Module(list(functions.values()), []))
    exec(compile(code, module.__file__, "exec"), space)
    return space["loss"], cut


def outcome(loss, cfg, item):
    """Losses, gradient and metrics on one input, or the kind of error."""
    logps, ref_logps, batch = item
    logps = logps.clone().requires_grad_()
    batch = SimpleNamespace(**{k: v.clone() for k, v in vars(batch).items()})
    try:
        losses, metrics = loss(logps, None if ref_logps is None else ref_logps.clone(), batch, cfg)
        (gradient,) = (
            torch.autograd.grad(losses.sum(), [logps], allow_unused=True)
            if losses.requires_grad
            else (None,)
        )
        gradient = torch.zeros_like(logps) if gradient is None else gradient
        if logps.is_meta:
            return "ran", None
        free = [
            value.requires_grad for value in metrics.values()
        ]  # a metric that carries a graph keeps it alive
        return [
            losses.detach(),
            gradient,
            *(value.detach() for value in metrics.values()),
            torch.tensor(free),
        ], list(metrics)
    except Exception as error:  # noqa: BLE001 - a mutant may do anything
        return f"{type(error).__name__}: {error}", None


def differ(a, b):
    if isinstance(a[0], str) or isinstance(b[0], str) or a[1] != b[1]:
        return a != b
    return any(
        x.dtype != y.dtype
        or x.shape != y.shape
        or not torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
        for x, y in zip(a[0], b[0])
    )


def survivors(name):
    """(how many mutants there are, {what was edited} of those that made no difference)."""
    module, (configs, make) = importlib.import_module(f"methods.{name}"), CASES[name]
    runs = [(module.Config(**fields), item) for item in make() for fields in configs]
    loss, _ = built(module, functions_of(module))
    runs = [(run, outcome(loss, *run)) for run in runs]
    count, alive = 0, []
    for text, functions in mutants(module):
        loss, cut = built(module, functions)
        told = next(
            (i for i, (run, known) in enumerate(runs) if differ(outcome(loss, *run), known)), None
        )
        if told is not None:
            runs.insert(0, runs.pop(told))  # what told this one will tell the next
        if "_detached" in text and not cut and told is None:
            continue  # nothing was detached: no edit
        count += 1
        if told is None:
            alive.append(text)
    return count, alive


# ---------------------------------------------------------------- tests


def test_every_loss_is_here():
    with_loss = {
        n for n in lab_module.methods() if hasattr(importlib.import_module(f"methods.{n}"), "loss")
    }
    assert set(CASES) == with_loss


@pytest.mark.parametrize("name", sorted(CASES))
def test_no_mutant_survives_without_a_reason(name):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count, alive = survivors(name)
    assert count >= 40
    reasons = SURVIVORS.get(name, {})
    assert sorted(set(alive) - set(reasons)) == [] and sorted(set(reasons) - set(alive)) == []
