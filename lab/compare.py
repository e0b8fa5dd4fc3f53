"""Runs beside each other, read from their folders: curves, a table at matched KL, a tidy CSV.

Everything comes from what a run has written (run.json, metrics.jsonl, summary.json), so that every
picture can be drawn again.
"""

import csv
import math
import os
import sys
from dataclasses import dataclass

import numpy as np

from data import UserError, printable
from lab import report
from lab.claims import at
from lab.evaluate import interval
from lab.folder import read_metrics, read_object, read_summary
from lab.store import write_beside

FRECHET = "frechet_256"  # the metric of a look against which the reward on images is shown
GRID = (0.5, 1.0, 2.0, 4.0)  # nats at which runs are compared
MULTIPLES = (1.1, 1.25, 1.5, 2.0)  # of the Frechet distance at the start, where images are compared
XLABEL = "KL from the base model (nats)"
PANELS = {  # title: the metrics of a training step that it shows
    "loss": ["loss"],
    "margin (nats, without beta)": ["margin"],
    "accuracy of the margin": ["accuracy"],
    "log-prob of chosen, rejected dashed (nats)": ["chosen_logp", "rejected_logp"],
}
FEW = 6  # groups of runs whose names have room in a panel
BESIDE = dict(loc="outside right upper", frameon=False, fontsize=8)  # where more names stand
COLUMN = 32  # names in a column there
MARKERS = "osv^DPX*<>"
DOUBLES = 4  # most columns of the table at equal samples that only some groups reach
# settings that name no run
IDLE = ("seed", "out", "overwrite", "device", "dtype", "compile", "capture", "bf16")


@dataclass
class Record:
    """What one run has written down.

    about: {"method": ..., every setting and field of its Config}. steps: the metrics of its
    training steps. looks: what was seen of the policy, from step 0 to the end. summary: the
    evaluation before and after.
    """

    folder: str
    about: dict
    steps: list
    looks: list
    summary: dict


def read(folder):
    """The Record of a folder; UserError when it is not a run that has ended.

    A method that trains its policy in several stages has looks in each of them. They follow each
    other as one training, and a stage without looks (of a reward model, say) is left out. If no
    stage has looks, the training is the last one.
    """
    if not os.path.exists(folder):
        raise UserError(f"--compare {folder} does not exist")
    steps, looks, before = [], [], 0
    try:
        made = read_object(os.path.join(folder, "run.json"))
        summary = read_summary(folder)
        about = {"method": summary["method"]} | made["settings"] | made["config"]
        about |= made["resolved"]
        if type(about["seed"]) is not int or not isinstance(about["method"], str):
            raise ValueError
        path = os.path.join(folder, "metrics.jsonl")
        lines = [values for _, values in read_metrics(path)] if os.path.exists(path) else []
        stages = list(dict.fromkeys(line["stage"] for line in lines))
        seen = {line["stage"] for line in lines if "loss" not in line}
        for stage in [s for s in stages if s in seen] or stages[-1:]:
            for line in (line for line in lines if line["stage"] == stage):
                known = {name: value for name, value in line.items() if value is not None}
                known["step"] += before
                if "loss" in line:
                    steps.append(known)
                elif not looks or looks[-1]["step"] != known["step"]:  # else it was seen already
                    looks.append(known)
            before = max(line["step"] for line in steps + looks)
    except UserError:
        raise
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{folder} is not a run that has ended") from None
    return Record(folder, about, steps, looks, summary)


def runs_in(folder):
    """The folders of the finished runs in a folder: itself, or those of its sweeps."""
    if os.path.exists(os.path.join(folder, "summary.json")):
        return [folder]
    tree = [(place, names) for place, _, names in os.walk(folder)]
    places = sorted(place for place, names in tree if "summary.json" in names)
    if places:
        # a run that was killed before its first step has only the values of its stages
        begun = {place for place, names in tree if "metrics.jsonl" in names}
        begun |= {os.path.dirname(p) for p, _ in tree if os.path.basename(p) == "stages"}
        begun = sorted(begun - {folder})
        for place in begun:
            inside = any(place == done or place.startswith(done + os.sep) for done in places)
            if not inside:
                print(printable(f"skipped: {place} has not ended", None), file=sys.stderr)
    return places or [folder]


def read_all(folders):
    """The Records of the runs in several folders, each run once.

    UserError: one is no finished run, or they are of different worlds, whose rewards differ.
    """
    places = {os.path.realpath(p): p for folder in folders for p in runs_in(folder)}
    records = [read(place) for place in places.values()]
    worlds = sorted({str(record.about["world"]) for record in records})
    if len(worlds) > 1:
        raise UserError(f"runs of different worlds cannot be compared: {', '.join(worlds)}")
    return records


def varied(records):
    """The settings in which the runs differ, the seed apart."""
    names = dict.fromkeys(name for record in records for name in record.about)
    values = {n: {str(record.about.get(n)) for record in records} for n in names}
    return [name for name in names if len(values[name]) > 1 and name not in IDLE]


def groups(records):
    """{label: its runs}: runs that differ in the seed alone are one group."""
    found, names = {}, varied(records)
    for record in records:
        about = record.about
        parts = [about["method"]] if "method" in names or not names else []
        parts += [f"{n} {about[n]}" for n in names if n != "method" and about.get(n) is not None]
        found.setdefault(", ".join(parts) or "default", []).append(record)
    return found


# ---------------------------------------------------------------- table and CSV


def matched(grouped):
    """A table of the true reward at the same KL, or for images at the same Frechet distance.

    The first group comes first, with the differences of the others to it, and then the best one. A
    cell is a mean over seeds; a difference is paired over the seeds that both groups have, with its
    95 % interval where there are several. "-": a curve does not reach that KL or distance. "" if
    no curve reaches one of them."""
    records = [record for group in grouped.values() for record in group]
    images = any(priced(record) == FRECHET for record in records)
    by, unit, places = "kl", "nats", GRID
    if images:  # distances that are multiples of the one at the start
        by, unit = FRECHET, "Frechet distance"
        starts = [look[by] for record in records for look in record.looks[:1] if by in look]
        places = [float(f"{n * np.mean(starts):.3g}") for n in MULTIPLES] if starts else []

    def rewards(records, place):
        found = {}
        for record in records:
            try:
                value = at([look for look in record.looks if by in look], by, place, "reward")
            except (UserError, KeyError, IndexError):
                return {}
            found.setdefault(record.about["seed"], []).append(value)
        return {seed: float(np.mean(values)) for seed, values in found.items()}

    names, rows = short(grouped), []
    theirs = {place: rewards(next(iter(grouped.values())), place) for place in places}
    for label, records in grouped.items():
        row, order = [printable(names[label]), len(records)], []
        for place in places:
            ours = rewards(records, place)
            order.append(-float(np.mean(list(ours.values()))) if ours else math.inf)
            row.append(report.number(-order[-1]) if ours else "-")
            both = [ours[seed] - theirs[place][seed] for seed in ours if seed in theirs[place]]
            cell = report.number(float(np.mean(both)), interval(both)) if both else "-"
            row.append(cell if rows else "")
        rows.append((order, row))
    if all(math.isinf(value) for order, _ in rows for value in order):
        return ""
    rows[1:] = sorted(rows[1:], key=lambda each: each[0])
    head = [f"true reward at a {unit if images else 'KL'} of", "runs"]
    for place in places:
        head += [f"{place:g}" if images else f"{place:g} {unit}", "difference"]
    return report.table([row for _, row in rows], head)


def short(grouped):
    """{label: the method}, or the labels themselves where a method has several settings."""
    names = {label: records[0].about["method"] for label, records in grouped.items()}
    return names if len(set(names.values())) == len(names) else {label: label for label in names}


def sampled(record):
    """[(tokens sampled so far, true reward)] of the looks of a run, in their order."""
    looks = [look for look in record.looks if "reward" in look]
    return [(look.get("samples", 0), look["reward"]) for look in looks]


def online(record):
    """Whether a run sampled while it trained, and not only before."""
    points = sampled(record)
    return len(points) > 1 and points[-1][0] > points[0][0]


def at_samples(grouped):
    """A table of the true reward at equally many sampled tokens or images, or "".

    It is read off the curves of runs that sample while they train, at the largest number that all
    of them reach, at a half and a quarter of it, and at the last few of its doubles that two groups
    reach, the best group first. Runs that sampled before they trained come last, with their reward
    at the end. "" if fewer than two groups sample while they train."""
    there = {label: [sampled(r) for r in records] for label, records in grouped.items()}
    there = {label: curves for label, curves in there.items() if all(curves)}
    moving = [label for label in there if all(online(record) for record in grouped[label])]
    if len(moving) < 2:
        return ""
    reached = sorted(min(curve[-1][0] for curve in there[label]) for label in moving)
    most = max(1, reached[0])
    places = [most // 4, most // 2, most]
    while 2 * places[-1] <= reached[-2]:
        places.append(2 * places[-1])
    places[3:] = places[3:][-DOUBLES:]

    def mean(values):
        return float(np.mean(values))

    def read_at(n, curves):
        inside = all(n <= curve[-1][0] for curve in curves)
        return mean([np.interp(n, *zip(*curve)) for curve in curves]) if inside else math.nan

    names, rows = short(grouped), []
    for label, curves in there.items():
        cells = [read_at(n, curves) if label in moving else math.nan for n in places]
        total, last = (mean([curve[-1][i] for curve in curves]) for i in (0, 1))
        rows.append((cells[2], names[label], len(curves), cells, total, last))
    rows.sort(key=lambda row: (math.isnan(row[0]), -row[5] if math.isnan(row[0]) else -row[0]))
    records = [record for group in grouped.values() for record in group]
    unit = "images" if any(priced(record) == FRECHET for record in records) else "tokens"
    head = [f"true reward at sampled {unit}", "runs", *(f"{n:,}" for n in places)]
    head += ["all", "the end"]
    body = []
    for _, label, count, cells, total, last in rows:
        shown = ["-" if math.isnan(x) else report.number(x) for x in cells]
        body.append([printable(label), count, *shown, f"{total:,.0f}", report.number(last)])
    return report.table(body, head)


def write_csv(path, records):
    """One line per run and look; a setting in which the runs differ is a column."""
    keys = ["method", *(n for n in varied(records) if n != "method"), "seed"]
    rows = []
    for record in records:
        settings = {name: record.about.get(name) for name in keys}
        for look in record.looks:
            values = {name: value for name, value in look.items() if name != "stage"}
            rows.append({"run": record.folder} | settings | values)
    columns = list(dict.fromkeys(name for row in rows for name in row))

    with (
        write_beside(path) as temporary,
        open(temporary, "w", encoding="utf-8", newline="") as file,
    ):
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


def write(out, records, title):
    """curves.csv and curves.png of several runs -> their names, for a person."""
    write_csv(os.path.join(out, "curves.csv"), records)
    path = os.path.join(out, "curves.png")
    return "curves.csv" + ", curves.png" * picture(path, groups(records), title)


# ---------------------------------------------------------------- picture


def picture(path, grouped, title):
    """Training metrics and looks of all runs, and the reward against KL beside best-of-n sampling
    from the base model -> whether there was anything to draw.

    Each group has a colour; beyond ten groups, each ten have a marker of their own.

    The reward of images is shown against their Frechet distance. The last panel has, for one run,
    what its reward is made of and the margin that was fitted; for several, the reward against what
    was sampled if one of them samples while it trains.
    """
    from matplotlib.figure import Figure

    runs = [(label, record) for label, group in grouped.items() for record in group]
    if not any(record.steps for _, record in runs):
        return False
    many = len(grouped) > FEW
    columns = -(-len(grouped) // COLUMN) if many else 0
    figure = Figure(figsize=(16 + 2 * columns, 6.5), layout="constrained")
    figure.suptitle(printable(title).replace("$", r"\$"))  # no mathematics between dollar signs
    axes = list(figure.subplots(2, 4).flat)
    names = short(grouped)
    styles = {  # ten colours with one marker, then the same with the next
        label: dict(color=f"C{i % 10}", marker=MARKERS[i // 10 % len(MARKERS)], markersize=3)
        for i, label in enumerate(grouped)
    }
    for label, record in runs:
        first = record is grouped[label][0]  # a group is named once
        name = printable(names[label]).replace("$", r"\$") if first else None
        draw_run(axes, record, styles[label], name, raw=not many)
    if len(runs) == 1:
        draw_parts(axes[7], runs[0][1])
    elif any(online(record) for _, record in runs):
        unit = "images" if any(priced(record) == FRECHET for _, record in runs) else "tokens"
        axes[7].set_title(f"true reward against sampled {unit}", fontsize=10)
        axes[7].set_xlabel(f"thousands of {unit} (one dot: sampled before)", fontsize=8)
        for label, record in runs:
            points = sampled(record) if online(record) else sampled(record)[-1:]
            points = [(n / 1000, reward) for n, reward in points]
            if points:
                axes[7].plot(*zip(*points), **styles[label])

    # titles, and what the base model reaches without training
    for ax, name in zip(axes, [*PANELS, "true reward of samples", XLABEL]):
        ax.set_title(name, fontsize=10)
        ax.set_xlabel("step", fontsize=8)
    summary = runs[0][1].summary
    best = summary.get("best_of", [])
    if best:
        points = [(0.0, summary["before"]["reward"])]
        points += [(point["kl"], point["reward"]) for point in best]
        axes[6].plot(*zip(*points), "k--o", markersize=3, label="best of n from the base model")
    images = priced(runs[0][1]) == FRECHET
    axes[6].set_title(f"true reward against {'Frechet distance' if images else 'KL'}", fontsize=10)
    unit = "Frechet distance of 256 samples to the data" if images else XLABEL
    axes[6].set_xlabel(unit, fontsize=8)

    # legends; panels that show nothing are left out
    for ax in axes:
        ax.spines[["top", "right"]].set_visible(False)
        if ax.get_legend_handles_labels()[0] and not (many and ax in (axes[0], axes[6])):
            ax.legend(frameon=False, fontsize=7)
        # the metrics of preferences are NaN for a paper that is not about them
        if not any(np.isfinite(line.get_ydata()).any() for line in ax.lines):
            ax.axis("off")
            ax.set_title("")
    full = [ax for ax in figure.axes if ax.axison]
    if many:
        handles = [h for ax in (axes[6], axes[0]) for h in ax.get_legend_handles_labels()[0]]
        figure.legend(handles=handles, ncols=columns, **BESIDE)
    elif 0 < len(full) <= 4:  # they get one row of their own
        grid = figure.add_gridspec(1, len(full))
        figure.set_size_inches(4 * len(full) + 1, 3.5)
        for ax in figure.axes:
            if ax.axison:
                ax.set_subplotspec(grid[full.index(ax)])
            else:
                ax.remove()
    with write_beside(path) as temporary:
        figure.savefig(temporary, format="png", dpi=110)
    return True


def priced(record):
    """What the reward of a run is shown against: the KL, or for images the Frechet distance."""
    return FRECHET if any(FRECHET in look for look in record.looks) else "kl"


def draw_run(axes, record, style, name, raw):
    """The curves of one run in the first seven panels of `picture`.

    style: colour and marker of the run. name: the label of its reward, or of its loss if it has no
    reward. raw: show the values that are not smoothed, too."""
    at = [line["step"] for line in record.steps]
    width = max(1, len(at) // 20)  # of the running mean
    starts = [max(0, i + 1 - width) for i in range(len(at))]
    for ax, keys in zip(axes, PANELS.values()):
        for key, dashes in zip(keys, ("-", "--")):
            values = [line.get(key, math.nan) for line in record.steps]
            total = np.cumsum([0.0, *values])
            smooth = [(total[i + 1] - total[s]) / (i + 1 - s) for i, s in enumerate(starts)]
            if raw:
                ax.plot(at, values, dashes, color=style["color"], alpha=0.2, linewidth=0.7)
            ax.plot(at, smooth, dashes, color=style["color"])
    looks = [look for look in record.looks if "reward" in look]
    for ax, key in zip(axes[4:6], ("reward", "kl")):
        points = [(look["step"], look[key]) for look in looks if key in look]
        if points:
            ax.plot(*zip(*points), **style)
    price = priced(record)
    both = [(look[price], look["reward"]) for look in looks if price in look]
    if both:
        axes[6].plot(*zip(*both), **style, label=name)
    elif name:
        axes[0].lines[-1].set_label(name)


def draw_parts(ax, record):
    """What the reward of one run is made of, against KL, and the margin that was fitted."""
    known = ("stage", "step", "reward", "win_rate", "kl", "length", "diversity", FRECHET)
    known += ("samples",)
    looks = [look for look in record.looks if "kl" in look]
    parts = [part for part in looks[0] if part not in known] if looks else []
    for i, part in enumerate(parts):  # some are measured in a few looks only
        points = [(look["kl"], look[part]) for look in looks if part in look]
        ax.plot(*zip(*points), color=f"C{i + 1}", label=part)
    margins = {line["step"]: line.get("margin") for line in record.steps}
    fitted = [(x["kl"], margins[x["step"]]) for x in looks if margins.get(x["step"])]
    if parts and fitted:
        right = ax.twinx()
        right.plot(*zip(*fitted), ":", color="0.4")
        right.set_ylabel("fitted margin (nats, dotted)", fontsize=8)
    ax.set_title("parts of the reward, and the margin", fontsize=10)
    ax.set_xlabel(XLABEL, fontsize=8)
