"""Claims: sentences of a paper, and how they are judged from what was measured.

A file claims/NAME.py has two parts:

    measure(lab)    -> {series: a number, or a list with one entry per seed (or per table of
                    `lab.worlds`)}. An entry is a number, {metric: number}, or a curve (a list of
                    dicts like `policy.curve`)
    CLAIMS          a list of claim(...), exactly one of them of kind "primary"

It may have report(lab, series) -> {file name: text or matplotlib Figure}, which becomes a part of
the claim's page. lab/results.py measures the claims and writes what came out.
"""

import dataclasses
import math

import numpy as np

from data import UserError
from lab.evaluate import interval

KINDS = ("primary", "mechanism", "control")
VERDICTS = ("supported", "reversed", "no effect", "inconclusive")
GRID = (0.5, 1, 2, 4)  # nats of KL at which curves are compared


class NotReached(UserError):
    """A curve ends before the KL at which it is to be read."""


@dataclasses.dataclass(frozen=True)
class Claim:
    """One claim as data; see `claim`."""

    text: str
    metric: str | None
    ours: str
    relation: str
    baseline: str | float
    at_kl: float | str | None = None
    margin: float = 0.0
    kind: str = "mechanism"
    expect: str = "supported"
    world: str = ""
    matched: str = ""


def claim(
    text,
    metric,
    ours,
    relation,
    baseline,
    at_kl=None,
    margin=0.0,
    kind="mechanism",
    expect=None,
    world="",
    matched="",
):
    """State a claim: `metric` of `ours` is above (">") or below ("<") that of `baseline`.

    ours, baseline: names of series of `measure`; the baseline may be a number.
    metric: a key of the series' dicts, or of the last point of its curves; None if a series holds
        plain numbers.
    at_kl: compare curves at this KL: 0.5, 1, 2 or 4 nats, or "shared", which is the largest KL that
        all curves of the claim reach.
    margin: a mean difference of at most this size is no effect. For the metric "reward" it is in
        units of the base model's standard deviation of the reward where the entries have it as
        `reward_sd` (a curve in its first point, as `lab.race` writes it there); any other margin is
        in the unit of its metric.
    kind: primary (the headline of the abstract), mechanism or control.
    expect: the verdict that the file's author expects, by default "supported". A control must name
        it, as it says what the control should show.
    world, matched: where it is measured, and what is equal for both sides besides the data, such as
        "steps". Both are columns of results/README.md, so a primary claim needs them; with at_kl
        the KL is what is matched.
    UserError: an unknown relation, kind, KL or verdict, or one of these is missing.
    """
    if relation not in (">", "<"):
        raise UserError(f'relation {relation!r}: expected ">" or "<"')
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    if at_kl not in (None, "shared", *GRID):
        raise UserError(f"at_kl {at_kl!r}: expected one of {', '.join(map(str, GRID))} or 'shared'")
    if kind == "control" and expect is None:
        raise UserError(f"a control says what it should show: expect= is missing in {text!r}")
    expect = expect or "supported"
    if expect not in VERDICTS:
        raise UserError(f"expect {expect!r}: expected one of {', '.join(VERDICTS)}")
    if not margin >= 0:
        raise UserError(f"margin {margin}: expected a number of 0 or more")
    if kind == "primary" and not (world and (matched or at_kl)):
        raise UserError(f"a primary claim needs world= and matched= (or at_kl=): {text!r}")
    return Claim(
        text, metric, ours, relation, baseline, at_kl, margin, kind, expect, world, matched
    )


# ---------------------------------------------------------------- reading series


def finite(value):
    """Whether a value is a finite number; JSON holds null for one that is not."""
    return value is not None and math.isfinite(value)


def at(curve, by, value, metric):
    """The metric of a curve where `by` first has a value, by linear interpolation.

    NotReached: it never has this value.
    """
    curve = [point for point in curve if finite(point[by])]
    for a, b in zip(curve, curve[1:]):
        if min(a[by], b[by]) <= value <= max(a[by], b[by]):
            share = 0.0 if a[by] == b[by] else (value - a[by]) / (b[by] - a[by])
            return a[metric] + share * (b[metric] - a[metric])
    most = max((point[by] for point in curve), default=math.nan)
    what = f"a KL of {value:.3g} nats" if by == "kl" else f"a {by} of {value:.3g}"
    raise NotReached(f"a curve never reaches {what}; its largest is {most:.3g}")


def at_or_nan(curve, by, value, metric):
    """As `at`, but nan where the curve never has this value; a claim on it is inconclusive."""
    try:
        return at(curve, by, value, metric)
    except NotReached:
        return math.nan


def at_kl(curve, metric, kl):
    """The metric of a curve at its first point with a KL of `kl` nats; see `at`."""
    return at(curve, "kl", kl, metric)


def entries(series, name):
    """The entries of a series, one per seed; for a number, the number itself."""
    if not isinstance(name, str):
        return [name]
    if name not in series:
        raise UserError(f"there is no series {name!r}; there are {', '.join(series)}")
    found = series[name]
    return found if isinstance(found, list) else [found]


def read(entry, metric, kl):
    """One entry of a series as a number; nan where JSON holds null."""
    if entry is None or isinstance(entry, (int, float)):
        return math.nan if entry is None else float(entry)
    if kl is not None:
        return float(at_kl(entry, metric, kl))
    value = (entry[-1] if isinstance(entry, list) else entry)[metric]
    return math.nan if value is None else float(value)


def unit_of(found, metric):
    """The unit of a margin: the mean `reward_sd` of entries for the metric "reward", else 1."""
    if metric != "reward":
        return 1.0
    firsts = [entry[0] if isinstance(entry, list) else entry for entry in found]
    known = [x["reward_sd"] for x in firsts if isinstance(x, dict) and "reward_sd" in x]
    return float(np.mean(known)) if known else 1.0


# ---------------------------------------------------------------- judging


def verdict(low, high, mean, margin):
    """One of four words, from the 95 % interval of a difference, its mean and the margin.

    "no effect": the interval is inside the margin on both sides.
    "supported": the interval is above 0 and the mean exceeds the margin.
    "reversed": the interval is below 0.
    "inconclusive": anything else, also where there is no interval because there is one seed.
    """
    if -margin <= low and high <= margin and margin > 0:
        return "no effect"
    if low > 0 and mean > margin:
        return "supported"
    return "reversed" if high < 0 else "inconclusive"


def p_value(differences):
    """Two-sided p of a paired t-test of differences against 0; 1 if there are fewer than two."""
    if len(differences) < 2 or not np.isfinite(differences).all():
        return 1.0
    if np.ptp(differences) == 0:
        return 1.0 if differences[0] == 0 else 0.0
    from scipy.stats import ttest_1samp

    return float(ttest_1samp(differences, 0.0).pvalue)


def holm(values):
    """p-values, adjusted for their number by Holm's method, in the same order."""
    order, largest, out = np.argsort(values), 0.0, [0.0] * len(values)
    for place, i in enumerate(order):
        largest = max(largest, min(1.0, (len(values) - place) * values[i]))
        out[i] = float(largest)
    return out


def judge(claims, series):
    """Judge claims on the measured series -> a list of dicts, one per claim, as in NAME.json.

    It depends on nothing else, so stored series can be judged again. Differences are paired over
    the seeds. A claim on a curve that does not reach its KL is inconclusive, and `reason` says so.
    """
    rows = []
    for c in claims:
        found = entries(series, c.ours), entries(series, c.baseline)
        kl, reason = c.at_kl, ""
        if kl == "shared":
            curves = [x for side in found for x in side if isinstance(x, list)]
            kl = min(max(p["kl"] for p in curve if finite(p["kl"])) for curve in curves)
        both = []
        for name, side in zip((c.ours, c.baseline), found):
            both.append([])
            for i, entry in enumerate(side):
                try:
                    both[-1].append(read(entry, c.metric, kl))
                except NotReached as error:
                    both[-1].append(math.nan)
                    reason = reason or f"{name}, seed number {i + 1} of {len(side)}: {error}"
        ours, baseline = both
        if len(baseline) == 1:
            baseline = baseline * len(ours)
        if len(ours) != len(baseline):
            raise UserError(f"{c.ours} has {len(ours)} entries, {c.baseline} has {len(baseline)}")
        differences = np.subtract(ours, baseline) * (1.0 if c.relation == ">" else -1.0)
        mean, (low, high) = float(differences.mean()), interval(differences)
        if not reason and not np.isfinite(differences).all():
            reason = f"{c.ours} or {c.baseline} is not a finite number on some seed"
        unit = unit_of([*found[0], *found[1]], c.metric)
        row = dataclasses.asdict(c) | {"kl": kl, "ours": ours, "baseline": baseline}
        row |= {"series": [c.ours, c.baseline], "unit": unit, "reason": reason}
        row |= {"difference": mean, "interval": [low, high], "p": p_value(differences)}
        rows.append(row | {"verdict": verdict(low, high, mean, c.margin * unit)})
    return rows


def as_expected(rows):
    """Whether every claim has the verdict that its file expects."""
    return all(row["verdict"] == row["expect"] for row in rows)
