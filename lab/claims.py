"""Claims: sentences of a paper, the measurements behind them, and whether they hold.

A file claims/NAME.py has two parts:

    measure(lab)    -> {series: a number, or a list with one entry per seed}. An entry is a number,
                    {metric: number}, or a curve (a list of dicts like `policy.curve`)
    CLAIMS          a list of claim(...)

It may have report(lab, series) -> {file name: text or matplotlib Figure}; these files are written
into the folder of the claim.
"""

import dataclasses
import math
import os
import time

import numpy as np

from data import UserError
from lab.evaluate import interval
from lab.report import clock, number, table, write_figure
from lab.store import commit, write_json, write_text

KINDS = ("primary", "mechanism", "control")


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
    expected: bool = True


def claim(
    text,
    metric,
    ours,
    relation,
    baseline,
    at_kl=None,
    margin=0.0,
    kind="mechanism",
    expected=True,
):
    """State a claim: `metric` of `ours` is above (">") or below ("<") that of `baseline`.

    ours, baseline: names of series of `measure`; the baseline may be a number.
    metric: a key of the series' dicts, or of the last point of its curves; None if a series holds
        plain numbers.
    at_kl: compare curves at this KL in nats; "shared" is the largest KL that all of them reach.
    margin: the mean difference must exceed it.
    kind: primary (the headline of the abstract), mechanism or control.
    expected: False for a claim that is not expected to hold.
    UserError: an unknown relation or kind.
    """
    if relation not in (">", "<"):
        raise UserError(f'relation {relation!r}: expected ">" or "<"')
    if kind not in KINDS:
        raise UserError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    return Claim(text, metric, ours, relation, baseline, at_kl, margin, kind, expected)


# ---------------------------------------------------------------- judging


def at_kl(curve, metric, kl):
    """The metric of a curve at its first point with a KL of `kl` nats, by linear interpolation.

    UserError: the curve never reaches this KL.
    """
    for a, b in zip(curve, curve[1:]):
        if min(a["kl"], b["kl"]) <= kl <= max(a["kl"], b["kl"]):
            share = 0.0 if a["kl"] == b["kl"] else (kl - a["kl"]) / (b["kl"] - a["kl"])
            return a[metric] + share * (b[metric] - a[metric])
    last = curve[-1]["kl"]
    raise UserError(f"a curve never reaches a KL of {kl:.3g} nats; it ends at {last:.3g}")


def entries(series, name):
    """The entries of a series, one per seed; for a number, the number itself."""
    if not isinstance(name, str):
        return [name]
    if name not in series:
        raise UserError(f"there is no series {name!r}; there are {', '.join(series)}")
    found = series[name]
    return found if isinstance(found, list) else [found]


def read(entry, metric, kl):
    """One entry of a series as a number."""
    if isinstance(entry, (int, float)):
        return float(entry)
    if kl is not None:
        return at_kl(entry, metric, kl)
    return float((entry[-1] if isinstance(entry, list) else entry)[metric])


def judge(claims, series):
    """Judge claims on the measured series -> a list of dicts, one per claim, as in claim.json.

    A claim holds if the difference has the claimed sign on every seed and its mean exceeds the
    margin. With five or more seeds the sign on every seed is not needed; instead, the paired 95 %
    interval of the difference must exclude 0.
    """
    rows = []
    for c in claims:
        ours, baseline = entries(series, c.ours), entries(series, c.baseline)
        kl = c.at_kl
        if kl == "shared":
            curves = [x for x in [*ours, *baseline] if isinstance(x, list)]
            kl = min(max(point["kl"] for point in curve) for curve in curves)
        ours, baseline = ([read(x, c.metric, kl) for x in side] for side in (ours, baseline))
        if len(baseline) == 1:
            baseline = baseline * len(ours)
        if len(ours) != len(baseline):
            raise UserError(f"{c.ours} has {len(ours)} entries, {c.baseline} has {len(baseline)}")
        sign = 1.0 if c.relation == ">" else -1.0
        differences = np.subtract(ours, baseline) * sign
        mean, low_high = float(differences.mean()), interval(differences)
        agree = low_high[0] > 0 if len(differences) >= 5 else bool((differences > 0).all())
        row = dataclasses.asdict(c) | {"at_kl": kl, "ours": ours, "baseline": baseline}
        row |= {"series": [c.ours, c.baseline], "difference": mean, "interval": low_high}
        rows.append(row | {"holds": bool(agree and mean > c.margin)})
    return rows


# ---------------------------------------------------------------- running


def run(name, module, lab, command, say=print):
    """Measure and judge the claims of one paper -> a list of dicts, one per claim.

    claim.json, claim.md and the files of `report` are written to `lab.out`.
    """
    start = time.time()
    series = module.measure(lab)
    rows = judge(module.CLAIMS, series)
    about = {"paper": name, "command": command, "commit": commit(), "seeds": lab.seeds}
    about["seconds"] = round(time.time() - start, 1)
    rows = [about | row for row in rows]
    say("\n" + claims_table(rows))
    for file, page in (module.report(lab, series) if hasattr(module, "report") else {}).items():
        path = os.path.join(lab.out, file)
        if isinstance(page, str):
            say("\n" + page)
            write_text(path, page + "\n")
        else:
            write_figure(path, page)
    write_text(os.path.join(lab.out, "claim.md"), claims_markdown(rows))
    write_json(os.path.join(lab.out, "claim.json"), about | {"claims": rows, "series": series})
    say(f"{clock(about['seconds'])} in all; written to {lab.out}/: claim.json, claim.md")
    return rows


# ---------------------------------------------------------------- tables


def verdict(row):
    """Whether a claim holds, in words."""
    expected = "" if row["expected"] else " (not expected to hold)"
    return ("holds" if row["holds"] else "not reproduced here") + expected


def sentence(row):
    """The text of a claim, with the KL at which curves were compared."""
    return row["text"] + (f" (at a KL of {row['at_kl']:.2f})" if row["at_kl"] is not None else "")


def values(row):
    """(ours, baseline, difference, interval) of a claim, averaged over seeds."""
    ours, baseline = (float(np.mean(row[side])) for side in ("ours", "baseline"))
    interval = [math.nan if x is None else x for x in row["interval"]]
    return ours, baseline, row["difference"], interval


def claims_table(rows):
    """Claims as a table for the terminal."""
    cells = []
    for row in rows:
        ours, baseline, difference, interval = values(row)
        numbers = [number(ours), row["relation"], number(baseline), number(difference, interval)]
        cells.append([sentence(row), row["metric"] or "", *numbers, number(row["margin"])])
        cells[-1].append(verdict(row))
    return table(cells, ["claim", "metric", "ours", "", "baseline", "difference", "margin", ""])


def claims_markdown(rows):
    """Claims as Markdown, with one section per paper that has its command, time and commit."""
    out, paper = [], None
    for row in rows:
        if row["paper"] != paper:
            paper = row["paper"]
            made = ""
            if "command" in row:
                made = f" `{row['command']}`: {row['seconds']:.0f} s, commit {row['commit'] or '?'}"
            head = ["claim", "kind", "metric", "ours", "", "baseline", "difference (95 %)"]
            head += ["margin", "verdict"]
            out += ["", f"**{paper}**{made}", "", f"| {' | '.join(head)} |"]
            out.append("|---" * len(head) + "|")
        if "metric" not in row:  # the measurement failed
            out.append(f"| {row['text'].replace('|', '/')} |" + " |" * 7 + " failed |")
            continue
        ours, baseline, difference, interval = values(row)
        spread = ""
        if math.isfinite(interval[0]):
            spread = f" [{number(interval[0])}, {number(interval[1])}]"
        cells = [sentence(row).replace("|", "/"), row["kind"], row["metric"] or ""]
        cells += [number(ours), row["relation"], number(baseline), number(difference) + spread]
        out.append(f"| {' | '.join([*cells, number(row['margin']), verdict(row)])} |")
    return "\n".join(out[1:]) + "\n"
