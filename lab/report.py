"""What a person sees: evaluation, the progress bar, tables, samples and pictures."""

import io
import json
import math
import os
import shutil
import sys
import time

import numpy as np
import torch

from data import interval, wilson
from lab.settings import title as title_of
from lab.store import write_beside

# ---------------------------------------------------------------- measuring


def paths(values, parents):
    """Sums (B, K) of values (B, K) over the path from the prompt to each response, its own included; parents (B, K), -1 = the prompt."""
    for _ in range(
        (values.shape[1] - 1).bit_length()
    ):  # each pass doubles the stretch that a sum covers
        up, ended = parents.clamp(min=0), parents < 0
        values = values + values.gather(1, up).masked_fill(ended, 0.0)
        parents = parents.gather(1, up).masked_fill(ended, -1)
    return values


def common_metrics(logps, ref_logps, batch):
    """Metrics of every method, from the best and the worst scored response of each row: the log-ratio margin (nats, without beta), the
    share of rows where it is positive, and the raw log-probs. Without a reference the log-probs themselves are compared. In a tree of
    steps a response is a path to a leaf; in a chain, which has one leaf, it is a node."""
    present, parents = batch.mask.any(-1), batch.parents
    total = (logps * batch.mask).sum(-1)
    ratio = total if ref_logps is None else total - (ref_logps * batch.mask).sum(-1)
    if parents is not None:
        places = torch.arange(parents.shape[1], device=parents.device)
        leaf = present & ~(parents[..., None] == places).any(1)
        tree = leaf.sum(1, keepdim=True) > 1
        present = torch.where(tree, leaf, present)
        total, ratio = (torch.where(tree, paths(x, parents), x) for x in (total, ratio))
    best = batch.scores.masked_fill(~present, -math.inf).argmax(1, keepdim=True)
    worst = batch.scores.masked_fill(~present, math.inf).argmin(1, keepdim=True)
    margin = (ratio.gather(1, best) - ratio.gather(1, worst))[:, 0]
    return {
        "margin": margin.mean(),
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "chosen_logp": total.gather(1, best).mean(),
        "rejected_logp": total.gather(1, worst).mean(),
    }


@torch.no_grad()
def sequence_kl(lab, policy, reference, rows):
    """KL(policy || reference) of whole responses in nats, one value a sampled response: the sum over tokens of the exact KL between the two
    next-token distributions at the prefixes that the policy wrote, at the temperature it wrote them with (1 for greedy samples)."""
    heat = lab.settings.temperature or 1.0
    out, size = (
        [],
        max(
            1,
            min(
                64,
                2**27
                // (
                    reference.config.vocab_size
                    * max(2, lab.max_response)
                    * len(rows[0]["responses"])
                ),
            ),
        ),
    )
    for start in range(0, len(rows), size):
        batch = lab._collate(rows[start : start + size])
        with lab._autocast():
            p, q = (
                (model.logits(batch).float() / heat).log_softmax(-1)
                for model in (policy, reference)
            )
        out.append(((p.exp() * (p - q)).sum(-1) * batch.mask).sum(-1).flatten())
    return torch.cat(out).tolist()


def eval_prompts(lab, n):
    """The evaluation's prompts: the same for every method and seed of a world."""
    return lab.world.prompts(n, lab._generator("evaluation", lab.settings.base_seed))


def of_base(lab, name, look):
    """`look()`, at the base model and the world alone: shared by all methods and seeds."""
    s, world, fingerprint = lab.settings, lab.world, getattr(lab.reference, "fingerprint", None)
    key = [
        name,
        fingerprint,
        world.key(),
        s.eval_size,
        s.base_seed,
        s.temperature,
        lab.max_response,
    ]
    return lab.cached(key, look) if fingerprint else look()


def eval_pairs(lab):
    """Held-out rows with clean labels: the file's, or pairs sampled from the base model and ordered by the truth (ties are left out)."""
    world, s = lab.world, lab.settings
    if world.reward is None:
        return lab._adopt(world.held_out[: s.eval_size])

    def draw():
        prompts = world.prompts(s.eval_size, lab._generator("held-out", s.base_seed))
        rows = lab.sample(
            lab.reference, prompts, 2, lab._generator("held-out samples", s.base_seed)
        )
        kept = []
        for row, (a, b) in zip(rows, lab.truth(rows)):
            if a != b:
                kept.append(row | {"scores": [float(a > b), float(b > a)]})
        return kept

    return lab._adopt(of_base(lab, "held-out", draw))


def answers(row, logps):
    """{index: log-prob} of a row's answers: the paths of a tree of steps, the items of a chain, the members of a list."""
    total, parents = [sum(x) for x in logps], row.get("parents") or [-1] * len(logps)
    leaves = sorted(set(range(len(total))) - set(parents))
    if len(leaves) < 2:
        return dict(enumerate(total))
    total = paths(torch.tensor([total], dtype=torch.float64), torch.tensor([parents]))[0].tolist()
    return {k: total[k] for k in leaves}


def pair_stats(lab, policy):
    """Accuracy of the implicit reward (log-ratio to the base model) on all held-out pairs of different scores, ties counting half, and the
    raw log-probs of the best and the worst response."""
    rows = eval_pairs(lab)
    if not rows:
        return {}
    ours, base = lab._logps(policy, rows), lab._reference_logps(lab.reference, rows)
    shares, chosen, rejected = [], [], []
    for row, mine, theirs in zip(rows, ours, base):
        scores, total, known = row["scores"], answers(row, mine), answers(row, theirs)
        ratio = {k: total[k] - known[k] for k in total}
        better = [(i, j) for i in total for j in total if scores[i] > scores[j]]
        won = [(ratio[i] > ratio[j]) + 0.5 * (ratio[i] == ratio[j]) for i, j in better]
        shares += [sum(won) / len(won)] if won else []
        chosen.append(total[max(total, key=lambda k: scores[k])])
        rejected.append(total[min(total, key=lambda k: scores[k])])
    # a row counts once: the pairs of one list are not independent
    out = (
        {"accuracy": float(np.mean(shares)), "accuracy_interval": wilson(sum(shares), len(shares))}
        if shares
        else {}
    )
    return out | {"chosen_logp": float(np.mean(chosen)), "rejected_logp": float(np.mean(rejected))}


def diversity(responses):
    """Distinct pairs of neighbouring tokens, as a share of all such pairs in all responses (distinct-2)."""
    pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(1, len(pairs))


@torch.no_grad()
def evaluate(lab, policy):
    """{name: value} of a model, see Lab.evaluate."""
    world, kind, reference = lab.world, lab.world.kind, lab.reference
    training = policy.training
    policy.eval()
    out = {}
    if kind == "table":
        truth = world.rewards()
        out = {"reward": policy.expect(truth), "kl": policy.kl(reference)}
    elif kind == "images":
        rows = lab.sample(
            policy,
            eval_prompts(lab, lab.settings.eval_size),
            1,
            lab._generator("evaluation samples"),
        )
        rewards = [r[0] for r in lab.truth(rows)]
        out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
    else:
        n = lab.settings.eval_size if world.reward is not None else min(lab.settings.eval_size, 16)
        prompts = eval_prompts(lab, n)
        rows = lab._adopt(lab.sample(policy, prompts, 1, lab._generator("evaluation samples")))
        if world.reward is not None:

            def theirs():
                return [
                    r[0]
                    for r in lab.truth(
                        lab.sample(reference, prompts, 1, lab._generator("evaluation samples"))
                    )
                ]

            rewards, base = [r[0] for r in lab.truth(rows)], of_base(lab, "rewards", theirs)
            wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, base))
            out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
            out |= {"win_rate": wins / n, "win_rate_interval": wilson(wins, n)}
        out["kl"] = float(np.mean(sequence_kl(lab, policy, reference, rows)))
        out["length"] = float(np.mean([len(row["responses"][0]) for row in rows]))
        out["diversity"] = diversity([row["responses"][0] for row in rows])
        out |= pair_stats(lab, policy)
    out |= {k: float(v) for k, v in world.measure(policy, lab).items()}
    policy.train(training)
    return out


@torch.no_grad()
def glance(lab, policy):
    """A quick look while training: true reward and KL on a few prompts (nothing in a world without a truth)."""
    world, n = lab.world, max(2, lab.settings.eval_size // 2)
    if world.kind == "table":
        return {"reward": policy.expect(world.rewards()), "kl": policy.kl(lab.reference)}
    if world.reward is None:
        return (
            {k: v for k, v in pair_stats(lab, policy).items() if not isinstance(v, list)}
            if lab.settings.eval_every
            else {}
        )
    rows = lab._adopt(lab.sample(policy, eval_prompts(lab, n), 1, lab._generator("glance")))
    out = {"reward": float(np.mean(lab.truth(rows)))}
    if world.kind == "text":
        out["kl"] = float(np.mean(sequence_kl(lab, policy, lab.reference, rows)))
    return out


def at_kl(curve, metric, kl):
    """The metric of a curve (points with "kl" and the metric, as training went) where it first reaches `kl`, by linear interpolation."""
    for a, b in zip(curve, curve[1:]):
        if min(a["kl"], b["kl"]) <= kl <= max(a["kl"], b["kl"]):
            share = 0.0 if a["kl"] == b["kl"] else (kl - a["kl"]) / (b["kl"] - a["kl"])
            return a[metric] + share * (b[metric] - a[metric])
    raise ValueError(f"the curve never reaches a KL of {kl:.3g} (it ends at {curve[-1]['kl']:.3g})")


# ---------------------------------------------------------------- the terminal


class Progress:
    """One line that says how far a loop is, what it sees, and the time left; a line at every tenth where the output is no terminal."""

    def __init__(self, title, steps, first=0, quiet=False):
        self.title, self.steps, self.first, self.quiet = title, steps, first, quiet or not steps
        self.start, self.tty, self.tenth = time.time(), sys.stderr.isatty(), -1

    def show(self, step, values):
        if self.quiet:
            return
        spent = time.time() - self.start
        left = spent / max(1, step - self.first) * (self.steps - step)
        names = [n for n in ("loss", "margin", "accuracy") if n in values]
        line = (
            f"{self.title} {step:>4}/{self.steps}  "
            + "  ".join(f"{n} {values[n]:.3f}" for n in names)
            + f"  {clock(left)} left"
        )
        if self.tty:
            width = shutil.get_terminal_size().columns - 1
            sys.stderr.write("\r" + line[:width].ljust(width))
            sys.stderr.flush()
        elif step * 10 // self.steps > self.tenth:
            self.tenth = step * 10 // self.steps
            print(line, file=sys.stderr, flush=True)

    def close(self):
        if self.tty and not self.quiet:
            sys.stderr.write("\n")


def clock(seconds):
    """Seconds as 0:07 or 1:02:03."""
    seconds = int(seconds + 0.5)
    hours, minutes = seconds // 3600, seconds // 60 % 60
    return f"{hours}:{minutes:02d}:{seconds % 60:02d}" if hours else f"{minutes}:{seconds % 60:02d}"


def header(lab, name, module, cfg, model):
    """The first lines of a run."""
    line = title_of(module) if module else name
    config = "  ".join(f"{k} {v}" for k, v in vars(cfg).items() if v is not None) if cfg else ""
    tokenizer = getattr(model, "tokenizer", None)
    dtype = "bfloat16 autocast" if lab.bf16 else "float32"
    parts = [
        f"world {lab.world.name}",
        f"model {type(model).__name__}, {count(model):,} parameters",
    ]
    parts += (
        [f"tokenizer {tokenizer.name} ({tokenizer.vocab_size:,} tokens)"]
        if tokenizer is not None
        else []
    )
    parts += [f"{lab.device.type}, {dtype}, {torch.get_num_threads()} threads"]
    lines = [line, "   ".join(parts)]
    lines.append(
        f"steps {lab.steps}   batch_size {lab.batch_size}   lr {lab.lr:g}   seed {lab.settings.seed}   {config}".rstrip()
    )
    return "\n".join(lines)


def count(model):
    """Number of parameters."""
    return sum(p.numel() for p in model.parameters())


def number(value, width=None):
    """A number (with its 95 % interval as half a width) in few digits; "-" for none."""
    if value is None:
        return "-"
    value = 0.0 if abs(value) < 1e-12 else value
    text = (
        f"{value:.1e}"
        if 0 < abs(value) < 5e-4
        else f"{value:.3f}"
        if abs(value) < 1000
        else f"{value:.0f}"
    )
    if width is not None and all(math.isfinite(x) for x in width):
        text += f" +-{(width[1] - width[0]) / 2:.3f}"
    return text


def table(rows, head):
    """Lines of a plain table: numbers to the right, texts to the left."""
    body = [[str(cell) for cell in row] for row in rows]
    texts = [
        any(not cell[:1].isdigit() and cell[:1] not in ("-", "+", "") for cell in column)
        for column in zip(*body)
    ]
    cells = [[str(cell) for cell in head], *body]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        [cell.ljust(w) if text else cell.rjust(w) for cell, w, text in zip(row, widths, texts)]
        for row in cells
    ]
    return "\n".join("  ".join(line).rstrip() for line in lines)


def before_after(before, after):
    """The table of a run."""
    names = [n for n in after if not n.endswith("_interval")]
    rows = [
        [n, *(number(side.get(n), side.get(n + "_interval")) for side in (before, after))]
        for n in names
    ]
    return table(rows, ["", "before", "after"])


def side_by_side(lab, policy, n=4):
    """A few evaluation prompts with the answers of the base model and of the policy, as text."""
    prompts, lines = eval_prompts(lab, n), []
    generators = (lab._generator("samples"), lab._generator("samples"))
    base, ours = (
        lab.sample(model, prompts, 1, rng)
        for model, rng in zip((lab.reference, policy), generators)
    )
    truths = [lab.truth(rows) for rows in (base, ours)] if lab.world.reward is not None else None
    for i, prompt in enumerate(prompts):
        lines.append(f"> {lab.text(prompt).strip()}")
        for name, rows, side in (("before", base, 0), ("after ", ours, 1)):
            reward = f" [{truths[side][i][0]:+.2f}]" if truths else ""
            end = "" if rows[i]["ends"][0] else " ..."
            lines.append(
                f"  {name}{reward} {lab.text(rows[i]['responses'][0]).strip()}{end}".replace(
                    "\n", "\n      "
                )
            )
    text = "\n".join(
        lines
    )  # an untrained model of bytes writes anything, and a terminal obeys control characters
    return "".join(c if c == "\n" or c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in text)


def pictures(lab, policy, k=8):
    """k images of every class from the base model and from the policy, from the same noise: two tensors (classes, k, C, H, W)."""
    prompts = list(range(policy.classes))
    return [
        model.sample(prompts, k, lab._generator("samples")).cpu()
        for model in (lab.reference, policy)
    ]


def write_picture(out, figure):
    """Write the Figure of World.picture as samples.png into the folder `out`; None: there is nothing to write."""
    if figure is not None:
        write_beside(
            os.path.join(out, "samples.png"),
            lambda path: figure.savefig(path, dpi=150, format="png"),
        )


def show(lab, row, batch):
    """Print one row as the model sees it (--show): tokens, what they may look at, and what is scored."""
    print(
        f"one row of the first batch: {batch.mask.shape[1]} responses, scores {[round(s, 3) for s in row['scores']]}"
    )
    if lab.world.kind != "text":
        print(f"prompt {row['prompt']}; mask {tuple(batch.mask.shape)}, all ones")
        for name in ("images", "t", "noise", "target"):
            if getattr(batch, name) is not None:
                print(f"{name} {tuple(getattr(batch, name).shape)}")
        return
    tokens, position, branch, sees, sources, targets = row["tree"]
    scored = {}
    for k, (where, what) in enumerate(zip(sources, targets)):
        for i, token in zip(where, what):
            scored.setdefault(i, []).append((k, token))
    tokenizer = lab.world.tokenizer

    def piece(token):
        return {tokenizer.eot: "<end>", tokenizer.pad: "<pad>"}.get(token) or repr(
            tokenizer.decode([token])
        )

    rows = []
    for i, token in enumerate(tokens):
        where = "prompt" if branch[i] == 0 else f"response {branch[i] - 1}"
        seen = "+".join(
            "prompt" if g == 0 else f"r{g - 1}" for g in np.flatnonzero(sees[branch[i]])
        )
        rows.append(
            [
                i,
                position[i],
                where,
                piece(token),
                seen,
                ", ".join(f"r{k}: {piece(t)}" for k, t in scored.get(i, [])) or "-",
            ]
        )
    print(table(rows, ["index", "position", "branch", "token", "sees", "scored as its next"]))
    print(
        f"{sum(map(len, targets))} scored tokens; the batch: tokens {tuple(batch.tokens.shape)}, log-probs {tuple(batch.mask.shape)}"
    )


# ---------------------------------------------------------------- pictures


def figure(path, draw, size=(10, 6)):
    """Make a picture with matplotlib (no window, no global state) and write it in one step; `draw(figure)` fills it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    fig = Figure(figsize=size, layout="constrained")
    FigureCanvasAgg(fig)
    draw(fig)
    buffer = io.BytesIO()
    fig.savefig(buffer, format="png", dpi=110)

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(buffer.getvalue())

    write_beside(path, write)


def read_metrics(out):
    """The lines of metrics.jsonl of the last stage that trained."""
    path = os.path.join(out, "metrics.jsonl")
    if not os.path.exists(path):
        return []
    with open(path, encoding="utf-8") as file:
        lines = [json.loads(line) for line in file if line.strip()]
    return [line for line in lines if line["stage"] == lines[-1]["stage"]]


def curves(lab, title):
    """curves.png: loss, margin, accuracy, raw chosen and rejected log-probs, reward and KL against the step."""
    lines = read_metrics(lab.out)
    if not lines:
        return
    steps = [line["step"] for line in lines]

    def smooth(values):
        width = max(1, len(values) // 20)
        total = np.cumsum([0.0, *values])
        return [
            (total[i + 1] - total[max(0, i + 1 - width)]) / (i + 1 - max(0, i + 1 - width))
            for i in range(len(values))
        ]

    def draw(fig):
        axes = fig.subplots(2, 3)
        fig.suptitle(title)
        panels = [
            ("loss", ["loss"]),
            ("margin (nats, without beta)", ["margin"]),
            ("accuracy of the margin", ["accuracy"]),
        ]
        panels.append(("log-prob of the responses (nats)", ["chosen_logp", "rejected_logp"]))
        for ax, (name, keys) in zip(axes.flat, panels):
            for i, key in enumerate(keys):
                values = [line.get(key, math.nan) for line in lines]
                ax.plot(steps, values, color=f"C{i}", alpha=0.25, linewidth=0.8)
                ax.plot(steps, smooth(values), color=f"C{i}", label=key.replace("_logp", ""))
            ax.set_title(name, fontsize=10)
            if len(keys) > 1:
                ax.legend(frameon=False)
        points = [p for p in lab.curve if "reward" in p]
        for ax, key, name in (
            (axes.flat[4], "reward", "true reward of samples"),
            (axes.flat[5], "kl", "KL from the base model (nats)"),
        ):
            kept = [p for p in points if key in p]
            if kept:
                ax.plot(
                    [p["step"] for p in kept],
                    [p[key] for p in kept],
                    "o-",
                    color="C2" if key == "reward" else "C3",
                )
                ax.set_title(name, fontsize=10)
            else:
                ax.axis("off")
        for ax in axes.flat:
            ax.set_xlabel("step", fontsize=8)
            ax.spines[["top", "right"]].set_visible(False)

    figure(os.path.join(lab.out, "curves.png"), draw, (12, 6.5))


def sweep_table(results, varied):
    """One line a setting, the mean over seeds with its 95 % interval (of one seed: over its samples); methods alone are ranked by reward.
    results: list of (settings dict, after dict)."""
    groups = {}
    for settings, after in results:
        groups.setdefault(tuple(settings[name] for name in varied), []).append(after)
    names = [n for n in results[0][1] if not n.endswith("_interval")]
    rows = []
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
            spread = (
                interval(values) if len(values) > 1 else group[0].get(name + "_interval")
            )  # over seeds, else that of the run
            cells.append(number(float(np.mean(values)), spread) if values else "-")
        rows.append([*key, len(group), *cells])
    return table(rows, [*varied, "seeds", *names])


def sweep_plot(path, results, varied):
    """One picture of a sweep: the reward (or accuracy) against a numeric setting, a line a method; otherwise against the KL. Bars: 95 %."""
    metric = "reward" if "reward" in results[0][1] else "accuracy"
    if metric not in results[0][1]:
        return False
    numeric = [
        n
        for n in varied
        if n != "method" and all(isinstance(s[n], (int, float)) for s, _ in results)
    ]
    axis = numeric[0] if numeric else None
    if axis is None and "kl" not in results[0][1]:
        return False
    groups = {}
    for settings, after in results:
        key = tuple(str(settings[n]) for n in varied if n != axis)
        groups.setdefault(key, {}).setdefault(settings[axis] if axis else 0, []).append(after)

    def draw(fig):
        ax = fig.subplots()
        for i, (key, points) in enumerate(groups.items()):
            xs, ys, bars = [], [], []
            for x, afters in sorted(points.items()):
                values = [a[metric] for a in afters]
                xs.append(x if axis else float(np.mean([a["kl"] for a in afters])))
                ys.append(float(np.mean(values)))
                low, high = (
                    interval(values)
                    if len(values) > 1
                    else afters[0].get(metric + "_interval", [math.nan, math.nan])
                )
                bars.append((high - low) / 2 if math.isfinite(low) else 0.0)
            mark = "osD^v"[i // 10 % 5]  # ten colours, then the next mark
            ax.errorbar(
                xs,
                ys,
                bars,
                fmt=mark + "-" if axis else mark,
                color=f"C{i}",
                capsize=3,
                label=" ".join(key),
            )
            if not axis:
                ax.annotate(
                    " ".join(key),
                    (xs[0], ys[0]),
                    xytext=(6, 4),
                    textcoords="offset points",
                    fontsize=8,
                    color=f"C{i}",
                )
        ax.set_xlabel(axis or "KL from the base model (nats)")
        ax.set_ylabel("true reward" if metric == "reward" else "accuracy on held-out pairs")
        ax.spines[["top", "right"]].set_visible(False)
        if axis and any(any(key) for key in groups):
            ax.legend(frameon=False)

    figure(path, draw, (7, 4.5))
    return True


def claims_table(claims):
    """Claims as a table: what, ours, baseline, the paired difference with its interval and margin, and whether it holds."""
    rows = []
    for c in claims:
        ours, baseline = (number(float(np.mean(side))) for side in (c.ours, c.baseline))
        verdict = ("holds" if c.holds else "not reproduced here") + (
            "" if c.expected else " (not expected to hold)"
        )
        rows.append(
            [
                c.text,
                c.metric,
                ours,
                baseline,
                number(c.difference, c.interval),
                number(c.margin),
                verdict,
            ]
        )
    return table(rows, ["claim", "metric", "ours", "baseline", "difference", "margin", ""])


def claims_markdown(lines):
    """Claims, as train.py writes them to claim.json, as Markdown: a section a paper with its command, time and commit, a row a claim."""
    out, paper = [], None
    for c in lines:
        if c["paper"] != paper:
            paper = c["paper"]
            made = (
                f"`{c['command']}`: {c['seconds']:.0f} s, commit {c['commit'] or 'unknown'}"
                if "command" in c
                else ""
            )
            head = [
                "claim",
                "metric",
                "ours",
                "baseline",
                "difference (95 %)",
                "margin",
                "expected",
                "",
            ]
            out += [
                "",
                f"**{paper}** {made}".rstrip(),
                "",
                f"| {' | '.join(head)} |",
                "|---" * len(head) + "|",
            ]
        cells = [c["text"].replace("|", "/"), "", "", "", "", ""]
        if "metric" in c:
            ours, baseline = (number(float(np.mean(c[side]))) for side in ("ours", "baseline"))
            low, high = (math.nan if x is None else x for x in c["interval"])
            spread = f" [{number(low)}, {number(high)}]" if math.isfinite(low) else ""
            cells[1:] = [
                c["metric"],
                ours,
                baseline,
                number(c["difference"]) + spread,
                number(c["margin"]),
            ]
        out.append(
            f"| {' | '.join([*cells, 'yes' if c['expected'] else 'no', 'holds' if c['holds'] else 'not reproduced here'])} |"
        )
    return "\n".join(out[1:]) + "\n"
