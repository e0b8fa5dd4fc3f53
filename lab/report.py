"""Output for people: the progress bar, tables, samples and pictures."""

import math
import os
import re
import shutil
import sys
import time

import numpy as np
import torch

from data import encode, printable
from lab.evaluate import interval
from lab.settings import Settings, title
from lab.store import load_value, write_beside

# ---------------------------------------------------------------- the terminal


class Progress:
    """A progress line: the step, the loss, margin and accuracy, and the time left.

    If stderr is not a terminal, a line is printed after every tenth of the steps. patience: nothing
    is printed where all steps together take less than this number of seconds.
    """

    def __init__(self, title, steps, first=0, quiet=False, patience=0.0):
        self.patience, self.shown = patience, False
        self.title, self.steps, self.first = title, steps, first
        self.quiet = quiet or not steps
        self.start, self.tty, self.tenth = time.time(), sys.stderr.isatty(), -1

    def show(self, step, values):
        """Show the values {name: number} of `step`."""
        if self.quiet:
            return
        spent = time.time() - self.start
        left = spent / max(1, step - self.first) * (self.steps - step)
        if not self.shown and (spent + left < self.patience or step == self.steps):
            if self.patience:
                return
        self.shown = True
        names = [name for name in ("loss", "margin", "accuracy") if name in values]
        seen = "  ".join(f"{name} {values[name]:.3f}" for name in names)
        line = f"{self.title} {step:>4}/{self.steps}  {seen}  {clock(left)} left"
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + line[:width].ljust(width))
            sys.stderr.flush()
        elif step * 10 // self.steps > self.tenth:
            self.tenth = step * 10 // self.steps
            print(line, file=sys.stderr, flush=True)

    def close(self):
        """End the line."""
        if self.tty and self.shown:
            sys.stderr.write("\n")


def clock(seconds):
    """Seconds as 0:07 or 1:02:03."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"


def header(lab, name, module, cfg, model):
    """The first lines that a run prints: title, world, model, device and settings.

    model: None in a world of vectors, which has none.
    """
    line = title(module) if module else name
    config = ""
    if cfg:
        config = "  ".join(f"{k} {v}" for k, v in vars(cfg).items() if v is not None)
    if model is None:
        world = (
            f"world {lab.world.name}   {lab.world.features} features, {lab.world.classes} classes"
        )
        return "\n".join([line, world, f"seed {lab.settings.seed}   {config}".rstrip()])
    dtype = "bfloat16 autocast" if lab.bf16 and lab.world.kind != "table" else "float32"
    size = f"model {type(model).__name__}, {count(model):,} parameters"
    if lab.settings.lora:
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        size += f", of which LoRA of rank {lab.settings.lora} trains {trained:,}"
    parts = [f"world {lab.world.name}", size]
    if lab.world.kind == "text":
        tokenizer = model.tokenizer
        parts.append(f"tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens)")
    parts.append(f"{lab.device.type}, {dtype}, {torch.get_num_threads()} threads")
    if lab.captured or lab.device.type == "cuda":
        compiled = ("on" if lab.compiled else "off") + lab.compile_reason
        parts.append(f"CUDA graphs {'on' if lab.captured else 'off'}, compile {compiled}")
    run = f"steps {lab.steps}   batch_size {lab.batch_size}   lr {lab.lr:g}"
    run += f"   prompts {lab.prompts}"
    if lab.settings.label_temperature != Settings.label_temperature:
        run += f"   label_temperature {lab.settings.label_temperature:g}"
    run += f"   seed {lab.settings.seed}   {config}"
    return "\n".join([line, "   ".join(parts), run.rstrip()])


def count(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def number(value, interval=None):
    """A number in a few digits, with half the width of its interval [low, high]; "-" for None."""
    if value is None:
        return "-"
    value = 0.0 if abs(value) < 1e-12 else value
    if 0 < abs(value) < 5e-4:
        text = f"{value:.1e}"
    else:
        text = f"{value:.3f}" if abs(value) < 1000 else f"{value:.0f}"
    if interval is not None and all(math.isfinite(x) for x in interval):
        text += f" +-{(interval[1] - interval[0]) / 2:.3f}"
    return text


def table(rows, head):
    """A plain-text table; columns of numbers are aligned right, columns of text left."""
    body = [[str(cell) for cell in row] for row in rows]
    # a column is of text if any of its cells starts with neither a digit nor a sign
    starts = [{cell[:1] for cell in column} - {"-", "+", ""} for column in zip(*body)]
    texts = [any(not start.isdigit() for start in column) for column in starts]
    cells = [[str(cell) for cell in head], *body]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        [cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(row, widths, texts)]
        for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def before_after(before, after):
    """The table of a run, from two evaluations {name: value}."""
    names = [name for name in after if not name.endswith("_interval")]
    rows = [
        [name, *(number(side.get(name), side.get(name + "_interval")) for side in (before, after))]
        for name in names
    ]
    return table(rows, ["", "before", "after"])


def rows_of(found):
    """The table {row: {column: value}} of a method that compares and trains no policy."""
    names = list(dict.fromkeys(name for row in found.values() for name in row))
    rows = [[label, *(number(row.get(name)) for name in names)] for label, row in found.items()]
    return table(rows, ["", *names])


def best_of(found):
    """The table of best-of-n sampling from the base model; found: of `evaluate.best_of`."""
    rows = [[f"best of {p['n']}", *(number(p[k]) for k in ("reward", "win_rate"))] for p in found]
    rows = [[*row, f"< {number(p['kl'])}"] for row, p in zip(rows, found)]
    return table(rows, ["for comparison, samples of the base model", "reward", "win_rate", "kl"])


def side_by_side(lab, policy, n=4, among=32):
    """A few prompts of the evaluation with the responses of the base model and of the policy.

    Where there is a true reward, of `among` prompts those whose gain is nearest to the median are
    shown: what is typical, and neither lucky nor unlucky."""
    among = among if lab.world.reward else n
    prompts, lines = lab.world.prompts(among, lab.eval_rng("evaluation")), []
    sides = [
        lab.sample(model, prompts, 1, lab.eval_rng("samples")) for model in (lab.reference, policy)
    ]
    truths, shown = None, range(len(prompts))
    if lab.world.reward:
        truths = [lab.truth(rows) for rows in sides]
        gain = np.array(truths[1])[:, 0] - np.array(truths[0])[:, 0]
        shown = sorted(np.abs(gain - np.median(gain)).argsort(kind="stable")[:n])
    for i in shown:
        lines.append(f"> {lab.text(prompts[i]).strip()}")
        for side, name in enumerate(("before", "after ")):
            row = sides[side][i]
            reward = f" [{truths[side][i][0]:+.2f}]" if truths else ""
            end = "" if row["ends"][0] else " ..."
            line = f"  {name}{reward} {lab.text(row['responses'][0]).strip()}{end}"
            lines.append(line.replace("\n", "\n      "))
    return printable("\n".join(lines), None, keep="\n")


def pictures(lab, policy, k=8):
    """k images of every class, or of the world's gallery, from the base model and from the policy.

    Both have the same noise. -> two tensors (prompts, k, C, H, W).
    """
    prompts = lab.world.gallery or list(range(policy.classes))

    def drawn(model):
        rows = lab.sample(model, prompts, k, lab.eval_rng("samples"))
        return torch.stack([row["responses"] for row in rows])

    return [drawn(model) for model in (lab.reference, policy)]


def write_progress(out):
    """Write training.png: the images that were kept during training, a column for each look."""
    stages = os.path.join(out, "stages")
    names = sorted(os.listdir(stages)) if os.path.isdir(stages) else []
    names = [name[:-5] for name in names if re.fullmatch(r"pictures-\d+\.json", name)]
    kept = {int(name.split("-")[1]): load_value(os.path.join(stages, name)) for name in names}
    looks = {step: shown["images"] for step, shown in kept.items() if shown}
    if len(looks) < 2 or next(iter(looks.values())).dim() != 4:
        return

    def draw(fig):
        ax = fig.subplots()
        tiles = torch.stack(list(looks.values()), 1).clamp(-1, 1) / 2 + 0.5  # (n, looks, C, H, W)
        tiles = torch.nn.functional.pad(tiles.nan_to_num(0.0), (1, 1, 1, 1), value=0.5)
        grid = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (n H, looks W, C)
        ax.imshow(grid.expand(-1, -1, 3).numpy(), interpolation="nearest")
        width = grid.shape[1] / len(looks)
        ax.set_xticks([(i + 0.5) * width - 0.5 for i in range(len(looks))], list(looks))
        ax.set_xlabel("step; every row has one prompt and one noise")
        ax.set_yticks([])

    rows = len(next(iter(looks.values())))
    size = max(4.0, 0.9 * len(looks) + 1), 0.8 * rows + 1
    figure(os.path.join(out, "training.png"), draw, size)


def show(lab, row, batch):
    """Print one row as the model sees it (--show): its tokens, the mask, and what is scored."""
    scores = [round(float(score), 3) for score in row["scores"]]
    print(f"one row of the first batch: {batch.mask.shape[1]} responses, scores {scores}")
    if lab.world.kind != "text":
        print(f"prompt {row['prompt']}; mask {tuple(batch.mask.shape)}, all ones")
        for name in ("images", "t", "noise", "target"):
            if getattr(batch, name) is not None:
                print(f"{name} {tuple(getattr(batch, name).shape)}")
        return
    tokenizer, scored = lab.world.tokenizer, {}
    tree = encode(row, tokenizer)["tree"]
    for k, (where, what) in enumerate(zip(tree.sources, tree.targets)):
        for i, token in zip(where, what):
            scored.setdefault(i, []).append((k, token))

    def piece(token):
        special = {tokenizer.eot: "<end>", tokenizer.pad: "<pad>"}
        return special.get(token) or repr(tokenizer.decode([token]))

    rows = []
    for i, token in enumerate(tree.tokens):
        branch = tree.branch[i]
        where = "prompt" if branch == 0 else f"response {branch - 1}"
        seen = ["prompt" if g == 0 else f"r{g - 1}" for g in np.flatnonzero(tree.sees[branch])]
        next_tokens = ", ".join(f"r{k}: {piece(t)}" for k, t in scored.get(i, [])) or "-"
        rows.append([i, tree.position[i], where, piece(token), "+".join(seen), next_tokens])
    head = ["index", "position", "branch", "token", "sees", "scored as its next"]
    print(table(rows, head))
    total = sum(map(len, tree.targets))
    shapes = f"tokens {tuple(batch.tokens.shape)}, log-probs {tuple(batch.mask.shape)}"
    print(f"{total} scored tokens; the batch: {shapes}")


# ---------------------------------------------------------------- pictures


def figure(path, draw, size=(10, 6)):
    """Draw a matplotlib Figure with `draw(figure)` and write it to `path` in one step."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    draw(fig)
    write_figure(path, fig)


def write_figure(path, fig, dpi=110):
    """Write a matplotlib Figure as a PNG file in one step."""
    with write_beside(path) as temporary:
        fig.savefig(temporary, format="png", dpi=dpi)


def write_picture(out, fig):
    """Write the Figure of World.picture as samples.png into `out`; do nothing if it is None."""
    if fig is not None:
        write_figure(os.path.join(out, "samples.png"), fig, dpi=150)


FIRST = ("reward", "accuracy", "win_rate", "kl", "frechet", "length")  # columns that matter most


def fitted(head, rows, keys, width):
    """The columns that fit into a width, the first `keys` and then those of FIRST -> head, rows.

    A column is kept whole or left out. Of the left-out ones, the last line of the table tells."""
    order = [*range(keys), *sorted(range(keys, len(head)), key=lambda i: place(head[i]))]
    used, kept = 0, []
    for i in order:
        used += 2 + max(len(str(row[i])) for row in [head, *rows])
        if i < keys or used <= width + 2:
            kept.append(i)
    return [head[i] for i in kept], [[row[i] for i in kept] for row in rows]


def place(name):
    """The place of a column in a table: that in FIRST, or behind them."""
    return FIRST.index(name) if name in FIRST else len(FIRST)


def short(value):
    """A setting for a table or a legend: numbers without needless digits."""
    return f"{value:g}" if isinstance(value, float) else str(value)


def sweep_table(results, varied, width=None):
    """The table of a sweep: one line per setting, with means over seeds and their 95 % intervals.

    results: a list of (settings dict, evaluation dict). The interval of a single seed is that of
    its evaluation. If only the method varies, methods are ranked by reward. width: of the table,
    the terminal's by default; columns that do not fit are named below it.
    """
    groups = {}
    for settings, after in results:
        groups.setdefault(tuple(settings[name] for name in varied), []).append(after)
    names = dict.fromkeys(n for _, after in results for n in after if not n.endswith("_interval"))
    names, rows = list(names), []
    if varied == ["method"] and "reward" in names:  # a ranking
        groups = dict(
            sorted(
                groups.items(),
                key=lambda item: -float(np.mean([after["reward"] for after in item[1]])),
            )
        )
    for key, group in groups.items():
        cells = []
        for name in names:
            values = [after[name] for after in group if name in after]
            spread = interval(values) if len(values) > 1 else group[0].get(name + "_interval")
            cells.append(number(float(np.mean(values)), spread) if values else "-")
        rows.append([*map(short, key), len(group), *cells])
    head = [*varied, "seeds", *names]
    width = width or shutil.get_terminal_size((100, 24)).columns
    shown, rows = fitted(head, rows, len(varied) + 1, width)
    text = table(rows, shown)
    left = [name for name in names if name not in shown]
    return text + (f"\nnot shown (see sweep.json): {', '.join(left)}" if left else "")


def spread_out(values):
    """Whether an axis should be logarithmic: positive values over at least a factor of 10."""
    values = sorted({v for v in values if v is not None})
    return len(values) > 2 and values[0] > 0 and values[-1] / values[0] >= 10


def sweep_plot(path, results, varied):
    """The plot of a sweep, with 95 % error bars -> whether there was anything to draw.

    It shows the reward (or the accuracy) against a numeric setting, with one line per method, or
    against the KL if no numeric setting varies. Lines at the same setting stand a little apart, so
    that their error bars can be told apart, and a setting that spans a factor of 10 has a
    logarithmic axis.
    """
    metric = "reward" if "reward" in results[0][1] else "accuracy"
    if metric not in results[0][1]:
        return False
    numeric = [
        n for n in varied if n != "method" and all(type(s[n]) in (int, float) for s, _ in results)
    ]
    axis = numeric[0] if numeric else None
    if axis is None and not any("kl" in after for _, after in results):
        return False
    groups = {}
    for settings, after in results:
        key = [str(settings[n]) if n == "method" else f"{n} {short(settings[n])}" for n in varied]
        key = ", ".join(label for label, n in zip(key, varied) if n != axis)
        groups.setdefault(key, {}).setdefault(settings[axis] if axis else 0, []).append(after)
    at = sorted({settings[axis] for settings, _ in results}) if axis else []
    log = spread_out(at)
    gap = min((math.log(b / a) if log else b - a for a, b in zip(at, at[1:])), default=0.0)

    def draw(fig):
        ax = fig.subplots()
        for i, (key, points) in enumerate(groups.items()):
            aside = gap * 0.3 * ((i + 0.5) / len(groups) - 0.5)
            xs, ys, bars = [], [], []
            for x, afters in sorted(points.items()):
                # a model that was trained from scratch has no KL from the base model
                afters = [a for a in afters if metric in a and (axis or "kl" in a)]
                values = [a[metric] for a in afters]
                if not values:
                    continue
                x = (x * math.exp(aside) if log else x + aside) if axis else mean_kl(afters)
                xs.append(x)
                ys.append(float(np.mean(values)))
                low, high = (
                    interval(values)
                    if len(values) > 1
                    else afters[0].get(metric + "_interval", [math.nan, math.nan])
                )
                bars.append((high - low) / 2 if math.isfinite(low) else 0.0)
            mark = "osD^vP*X<>"[i // 10 % 10]  # after ten colors the mark changes
            ax.errorbar(
                xs,
                ys,
                bars,
                fmt=mark + "-" if axis else mark,
                color=f"C{i % 10}",
                capsize=3,
                label=printable(key).replace("$", r"\$"),
            )
        if log:
            ax.set_xscale("log")
            ax.set_xticks(at, [short(x) for x in at])
            ax.minorticks_off()
        ax.set_xlabel(axis or "KL from the base model (nats)")
        where = "" if "row" in varied else " on held-out pairs"
        ax.set_ylabel("true reward" if metric == "reward" else "accuracy" + where)
        ax.spines[["top", "right"]].set_visible(False)
        if any(groups):
            # beside the plot, so that no label covers a point or another label
            columns = 1 + (len(groups) - 1) // 20
            fig.legend(loc="outside right upper", frameon=False, fontsize=8, ncols=columns)

    wide = 7 + (1.6 * (1 + (len(groups) - 1) // 20) if any(groups) else 0)
    figure(path, draw, (wide, 4.5))
    return True


def mean_kl(afters):
    """The mean KL of several evaluations."""
    return float(np.mean([after["kl"] for after in afters]))
