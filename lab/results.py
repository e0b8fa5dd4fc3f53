"""Claims measured, judged and written: NAME.json, NAME.md, and README.md with all papers.

A folder of results holds one NAME.json per paper, with everything that was measured, and pages that
are made from these files alone. So the results of several machines are merged by copying their
NAME.json into one folder, and `--judge` makes all pages anew without measuring anything.
"""

import ast
import contextlib
import glob
import hashlib
import json
import math
import os
import re
import shutil
import sys
import time
import traceback
from collections import Counter

import numpy as np

from data import UserError, error_line, printable
from lab import flags
from lab.claims import as_expected, holm, judge
from lab.folder import MARK, read_object
from lab.lab import Lab
from lab.report import clock, number, table, write_figure
from lab.settings import Settings, methods, title
from lab.store import HERE, commit, write_text

BLOCKS = ("reported", "tuning")
OWN = os.path.join(HERE, "results")  # the project's own folder, whose verdicts its README shows


def block_of(seeds):
    """The block that seeds belong to: "tuning" from 100 on, else "reported"."""
    return "tuning" if seeds[0] >= flags.TUNING else "reported"


# ---------------------------------------------------------------- files


def stored(out, judging=()):
    """{paper: content of its NAME.json} of a folder of results.

    judging: papers whose verdicts are made anew, so that those in the file are not looked at.
    A JSON file of another origin is left out. UserError: a file of a paper is damaged.
    """
    found = {}
    for path in sorted(glob.glob(os.path.join(glob.escape(out), "*.json"))):
        name = os.path.basename(path)[: -len(".json")]
        try:
            content = read_object(path) if name + ".json" != MARK else {}
        except UserError:
            if name in methods():
                raise
            content = {}
        if "exact checks" in content or name in methods():
            if name not in judging:
                readable(path, name, content)
            found[name] = content
    return found


def stored_paper(out, name):
    """The content of one NAME.json, which is empty where there is none."""
    path = os.path.join(out, f"{name}.json")
    content = read_object(path) if os.path.exists(path) else {}
    if content:
        readable(path, name, content)
    return content


def readable(path, name, content):
    """UserError if no page can be made of the content of a NAME.json."""
    with fitting(path, "page"):
        overview({name: content})
        paper_page(content, {}, {})
        if not all(isinstance(content[key], str) for key in ("paper", "title", "family")):
            raise TypeError("paper, title and family are texts")
        if not any(which in content for which in BLOCKS):
            raise LookupError("it has neither reported nor tuning seeds")


@contextlib.contextmanager
def fitting(path, what):
    """UserError for a NAME.json that does not hold what was measured, so that `what` fails."""
    try:
        yield
    except UserError:
        raise
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError) as error:
        told = f"{type(error).__name__}: {error_line(error)}"
        raise UserError(f"{path} is damaged, or of other claims: no {what} ({told})") from None


def verdicts(out):
    """{paper: verdict of its primary claim on the reported seeds} of a folder of results."""
    return {
        name: row["verdict"]
        for name, content in stored(out).items()
        for row in content.get("reported", {"claims": []})["claims"]
        if row["kind"] == "primary"
    }


def refuse_measured(out, names, seeds):
    """UserError if the folder has results of these papers already, which must not be replaced."""
    there = stored(out) if out else {}
    for name in names:
        if block_of(seeds) in there.get(name, {}):
            raise UserError(
                f"{out}/{name}.json has results already; --overwrite measures {name} again, "
                f"--judge {out} judges what was measured"
            )


def gather(folders, out):
    """Copy the results of several folders into `out`; those of a paper once."""
    for folder in folders:
        for name in stored(folder):
            target = os.path.join(out, f"{name}.json")
            if not os.path.exists(target):
                shutil.copy(os.path.join(folder, f"{name}.json"), target)


def exact_checks(name):
    """The number of tests marked `paper` in a method's tests; None where the tests are absent."""
    path = os.path.join(HERE, "tests", "methods", f"test_{name}.py")
    if not os.path.isfile(path):
        return None
    with open(path, encoding="utf-8") as file:
        tree = ast.parse(file.read())
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    marks = [[ast.unparse(mark) for mark in node.decorator_list] for node in functions]
    return sum("pytest.mark.paper" in each for each in marks)


def stamp(module):
    """A hash of a file of claims."""
    with open(module.__file__, "rb") as file:
        return hashlib.sha256(file.read()).hexdigest()


# ---------------------------------------------------------------- measuring


def claim(runs, seeds, out, tasks, start):
    """The claims of one or several papers -> exit status 0 if every verdict is the expected one.

    The output of each of several papers goes to NAME/log.txt while it is measured. A paper that
    raises an error does not stop the others, and papers that the interrupted run of --resume has
    finished are not measured again. tasks: the indices of the papers that are measured here; the
    others belong to other shards. start: the time at which the command began.
    """
    settings, modules = plan(runs, seeds)
    here = [name for i, name in enumerate(modules) if i in tasks]
    if len(modules) == 1:
        ((name, module),) = modules.items()
        rows = finished(out, name, seeds)
        if rows is None:
            rows = measured(name, module, settings, seeds, out, quiet=not sys.stderr.isatty())
        return 0 if as_expected(rows) else 1
    good, ran = True, 0
    for i, (name, module) in enumerate(modules.items()):
        rows, failed = None, ""
        place = os.path.join(out, name)
        try:
            rows = finished(out, name, seeds)
        except UserError as error:  # its file was damaged meanwhile, and is not written over
            failed = f"failed: {error}"
        if rows is None and not failed and name not in here:
            print(f"[{i + 1}/{len(modules)}] {name}: not done", flush=True)
            continue
        if rows is None and not failed:
            ran += 1
            os.makedirs(place, exist_ok=True)
            try:
                with (
                    open(os.path.join(place, "log.txt"), "w", encoding="utf-8") as page,
                    contextlib.redirect_stdout(page),
                ):
                    rows = measured(name, module, settings, seeds, out, quiet=True)
            except Exception as error:  # noqa: BLE001 - one paper must not stop the others
                write_text(os.path.join(place, "error.txt"), traceback.format_exc())
                text = " ".join(f"{type(error).__name__}: {error}".split())
                failed = f"failed, see {place}/error.txt: {text}"
        good = good and not failed and as_expected(rows)
        left = (time.time() - start) / max(1, ran) * (len(modules) - i - 1)
        line = failed or in_short(rows)
        print(f"[{i + 1}/{len(modules)}] {name}: {line}; {clock(left)} left", flush=True)
    publish(out)
    took, place = clock(time.time() - start), printable(out, None)
    print(f"{took} in all; written to {place}/: README.md, NAME.md, NAME.json")
    return 0 if good else 1


def with_claims(runs):
    """{name: module} of the papers of a command line: those with claims, if there are several."""
    modules = {run.method: run.module for run in runs}
    if len(modules) == 1:
        return modules
    return {name: module for name, module in modules.items() if flags.claims_path(module)}


def plan(runs, seeds):
    """(settings, {name: module}) of the papers of a command line that have claims."""
    first = runs[0].settings
    same = {name: getattr(first, name) for name in ("device", "dtype", "compile", "capture")}
    modules = with_claims(runs)
    for name in dict.fromkeys(run.method for run in runs if run.method not in modules):
        print(f"left out: {name} has no claims", file=sys.stderr)
    return Settings(seed=seeds[0], **same), modules


def finished(out, name, seeds):
    """The rows of a paper that this run has measured before it was interrupted, or None."""
    block = stored_paper(out, name).get(block_of(seeds))
    with fitting(os.path.join(out, f"{name}.json"), "run"):
        return block["claims"] if block and block["run"] == run_of(out) else None


def run_of(out):
    """When the run that writes to this folder began, which tells it from earlier ones."""
    with contextlib.suppress(OSError, UserError):
        return read_object(os.path.join(out, MARK)).get("began")
    return None


def measured(name, module, settings, seeds, out, quiet=False):
    """Measure and judge the claims of one paper and write its pages -> a dict for each claim."""
    start = time.time()
    about = flags.load_claims(module)
    print(f"{title(module)}\nclaims on seeds {', '.join(map(str, seeds))}", flush=True)
    place = os.path.join(out, name)
    lab = Lab(settings, place, quiet=quiet, seeds=len(seeds))
    series = rounded(about.measure(lab))
    rows = judge(about.CLAIMS, series)
    block = {"command": command(name, seeds), "commit": commit(), "run": run_of(out)}
    block |= {"seeds": seeds, "seconds": round(time.time() - start, 1), "source": stamp(about)}
    block |= {"claims": rows, "series": series}
    content = stored_paper(out, name) | {block_of(seeds): block}
    write_paper(out, name, module, about, content)
    publish(out)
    shutil.rmtree(place, ignore_errors=True)
    print("\n" + claims_table(rows))
    took, place = clock(block["seconds"]), printable(out, None)
    print(f"{took} in all; written to {place}/: README.md, {name}.md, {name}.json")
    return rows


def rounded(value):
    """Series as they are stored: six digits of every number, None for what is not finite.

    They are judged in this form, so that judging them again gives the same verdicts.
    """
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {name: rounded(each) for name, each in value.items()}
    return [rounded(each) for each in value] if isinstance(value, (list, tuple)) else value


def command(name, seeds):
    """The command that measures a paper on these seeds."""
    words = ["python train.py --method", name, "--claim"]
    first = flags.TUNING if block_of(seeds) == "tuning" else flags.REPORTED
    words += ["--tuning"] * (first == flags.TUNING)
    words += ["--seed", str(seeds[0])] * (seeds[0] != first)
    words += ["--seeds", str(len(seeds))] * (len(seeds) != flags.SEEDS)
    return " ".join(words)


def smoke(runs, seeds):
    """Every `measure` with a few steps and a handful of prompts: does it run? -> exit status.

    Verdicts mean nothing there, so only errors count. Nothing is written.
    """
    settings, modules = plan(runs, seeds)
    failed = []
    for name, module in modules.items():
        start = time.time()
        try:
            rows = tried(flags.load_claims(module), settings, len(seeds))
        except Exception:  # noqa: BLE001 - the others are tried, too
            failed.append(name)
            traceback.print_exc()
        else:
            print(f"{name}: {len(rows)} claims in {time.time() - start:.1f} s", flush=True)
    if failed:
        print(f"failed: {', '.join(failed)}", flush=True)
    return 1 if failed else 0


def tried(about, settings, seeds):
    """The judged claims and the report of a smoke run of one file of claims -> its rows."""
    lab = Lab(settings, quiet=True, seeds=seeds, smoke=True)
    series = about.measure(lab)
    rows = judge(about.CLAIMS, series)
    if hasattr(about, "report"):
        about.report(lab, series)
    return rows


def again(out, chosen):
    """Judge what a folder of results holds with the claims as they are now -> exit status.

    Nothing is measured. UserError: the folder has no results of these papers.
    """
    found = stored(out, judging=[method.name for method in chosen])
    modules = {method.name: flags.load(method) for method in chosen if method.name in found}
    if not modules:
        raise UserError(f"{out} has no results to judge: there is no NAME.json of these papers")
    good, claims = True, {name: flags.load_claims(module) for name, module in modules.items()}
    for name, about in claims.items():  # all are judged before anything is written
        path = os.path.join(out, f"{name}.json")
        for block in (found[name][which] for which in BLOCKS if which in found[name]):
            with fitting(path, "verdict"):
                try:
                    block["claims"] = judge(about.CLAIMS, block["series"])
                except UserError as error:  # a claim is newer than what was measured
                    raise UserError(f"{path}: {error}; --claim measures it anew") from None
                if stamp(about) != block["source"]:
                    block["judged"] = commit()
        readable(path, name, found[name])
    for name, module in modules.items():
        content = found[name]
        with fitting(os.path.join(out, f"{name}.json"), "page"):
            write_paper(out, name, module, claims[name], content)
        rows = content.get("reported", content.get("tuning"))["claims"]
        good = good and as_expected(rows)
        print(f"{name}: {in_short(rows)}")
    publish(out)
    return 0 if good else 1


# ---------------------------------------------------------------- pages


def write_paper(out, name, module, about, content):
    """Write NAME.json, NAME.md and pictures of one paper."""
    head = {"paper": name, "title": title(module), "family": module.PAPER.family}
    content = head | {"exact checks": exact_checks(name)} | {k: content[k] for k in content}
    content["exact checks"] = exact_checks(name)
    pages = {}
    block = content.get("reported", content.get("tuning"))
    if hasattr(about, "report"):
        settings = Settings(seed=block["seeds"][0])
        lab = Lab(settings, quiet=True, seeds=len(block["seeds"]))
        pages = about.report(lab, block["series"])
    texts = {file: page for file, page in pages.items() if isinstance(page, str)}
    figures = {  # of this paper alone, and without spaces, at which a link of Markdown would end
        file: f"{name}-{re.sub('[^a-zA-Z0-9.]+', '-', file)}" for file in pages if file not in texts
    }
    for file, path in figures.items():
        write_figure(os.path.join(out, path), pages[file])
    write_text(os.path.join(out, f"{name}.json"), as_json(rounded(content)))
    write_text(os.path.join(out, f"{name}.md"), paper_page(content, texts, figures))


def publish(out):
    """Write README.md of a folder of results, and the project's README if the folder is its own."""
    write_text(os.path.join(out, "README.md"), overview(stored(out)))
    page = os.path.join(HERE, "README.md")
    if os.path.realpath(out) == os.path.realpath(OWN) and os.path.isfile(page):
        with open(page, encoding="utf-8") as file:
            text = file.read()
        write_text(page, with_verdicts(text, verdicts(out)))


def with_verdicts(text, known):
    """The text of the README, with {paper: verdict} in its rows and counted above them."""
    text = re.sub(r"^Of \d+ primary claims.*$", counted(known.values()), text, flags=re.MULTILINE)
    row = r"^(\| \[(\w+)\]\(methods/\w+\.py\) \|[^|\n]*\|[^|\n]*\|)[^|\n]*\|"
    return re.sub(row, lambda m: f"{m[1]} {known.get(m[2], 'not run')} |", text, flags=re.MULTILINE)


def as_json(content, depth=0):
    """JSON text of NAME.json, with each claim and each series on a line of its own."""
    if depth == 3 or not isinstance(content, (dict, list)) or not content:
        return json.dumps(content)
    inner, outer = "\n" + " " * (depth + 1), "\n" + " " * depth
    if isinstance(content, dict):
        lines = [f"{json.dumps(k)}: {as_json(v, depth + 1)}" for k, v in content.items()]
        return "{" + inner + f",{inner}".join(lines) + outer + "}" + "\n" * (depth == 0)
    return "[" + inner + f",{inner}".join(as_json(v, depth + 1) for v in content) + outer + "]"


def in_short(rows):
    """The verdicts of a paper in one line."""
    primary = next((row["verdict"] for row in rows if row["kind"] == "primary"), "none")
    agree = sum(row["verdict"] == row["expect"] for row in rows)
    return f"primary claim {primary}; {agree} of {len(rows)} verdicts are as expected"


def words(row):
    """The verdict of a claim, and what was expected instead."""
    expected = "" if row["verdict"] == row["expect"] else f" (expected: {row['expect']})"
    return row["verdict"] + expected


def sentence(row):
    """The text of a claim, with the KL that its curves share."""
    shared = f" (at a KL of {row['kl']:.2f})" if row["at_kl"] == "shared" else ""
    return row["text"] + shared


def mean(values):
    """The mean of the values that are numbers; None, if there are none."""
    known = [x for x in values if x is not None and math.isfinite(x)]
    return float(np.mean(known)) if known else None


def bounds(row):
    """The difference and its interval as text, "0.120 [0.080, 0.160]"."""
    difference, (low, high) = row["difference"], row["interval"]
    if difference is None or not math.isfinite(difference):
        return "-"
    spread = low is not None and math.isfinite(low)
    return number(difference) + (f" [{number(low)}, {number(high)}]" if spread else "")


def margin(row):
    """The margin as text, with the base model's standard deviation that it is measured in."""
    if row["unit"] == 1.0:
        return number(row["margin"])
    return f"{number(row['margin'] * row['unit'])} ({row['margin']:g} sd)"


def claims_table(rows):
    """Claims as a table for the terminal, with the reasons of claims that could not be read."""
    cells = []
    for row in rows:
        numbers = [number(mean(row["ours"])), row["relation"], number(mean(row["baseline"]))]
        cells.append([sentence(row), row["metric"] or "", *numbers, bounds(row), margin(row)])
        cells[-1].append(words(row))
    head = ["claim", "metric", "ours", "", "baseline", "difference [95 %]", "margin", "verdict"]
    reasons = [f"{row['text']}: {row['reason']}" for row in rows if row["reason"]]
    return "\n".join([table(cells, head), *dict.fromkeys(reasons)])


def markdown(head, rows):
    """A Markdown table; | in a cell becomes /."""
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    return lines + [
        f"| {' | '.join(str(cell).replace('|', '/') for cell in row)} |" for row in rows
    ]


def paper_page(content, texts, figures):
    """NAME.md: how the claims of one paper were measured, and their verdicts.

    texts: {file: text}; figures: {file: path}, where the file is what claims/NAME.py calls it.
    """
    lines = [f"# {content['title']}", ""]
    if content["exact checks"]:
        name = content["paper"]
        lines += [
            f"Besides these claims, {content['exact checks']} tests of "
            f"[tests/methods/test_{name}.py](../tests/methods/test_{name}.py) check numbers, "
            "identities and closed forms of the paper "
            f"(`python -m pytest -m paper tests/methods/test_{name}.py`).",
            "",
        ]
    for which in BLOCKS:
        if which in content:
            block = content[which]
            seeds = ", ".join(map(str, block["seeds"]))
            lines += [f"## {'Seeds' if which == 'reported' else 'Tuning seeds'} {seeds}", ""]
            made = f"`{block['command']}`: {block['seconds']:.0f} s, "
            made += f"commit {block['commit'] or '?'}"
            if "judged" in block:
                made += "; its file of claims has changed since, and the results were judged again "
                made += f"at {block['judged']}"
            head = ["claim", "kind", "metric", "ours", "", "baseline", "difference [95 %]"]
            lines += [made, "", *markdown([*head, "margin", "verdict"], cells_of(block["claims"]))]
            reasons = [f"- {r['text']}: {r['reason']}" for r in block["claims"] if r["reason"]]
            lines += [""] * bool(reasons) + reasons + [""]
    for file, text in texts.items():
        lines += [f"## {file.partition('.')[0]}", "", "```", text, "```", ""]
    for file, path in figures.items():
        lines += [f"![{file.partition('.')[0]}]({path})", ""]
    return "\n".join(lines)


def cells_of(rows):
    """The cells of the table in NAME.md."""
    return [
        [sentence(row), row["kind"], row["metric"] or "", number(mean(row["ours"]))]
        + [row["relation"], number(mean(row["baseline"])), bounds(row), margin(row), words(row)]
        for row in rows
    ]


def counted(known):
    """How often each of some verdicts occurs, as a sentence."""
    count = Counter(known)
    told = ", ".join(f"{n} {verdict}" for verdict, n in sorted(count.items()))
    return f"Of {count.total()} primary claims, one per method: {told}."


def overview(found):
    """README.md of a folder of results: one row per paper, with its primary claim."""
    found = {name: content for name, content in found.items() if "reported" in content}
    rows = [
        (content, row)
        for content in sorted(found.values(), key=lambda c: (c["family"], c["paper"]))
        for row in content["reported"]["claims"]
        if row["kind"] == "primary"
    ]
    if not rows:
        return "# Results\n\nThere are no results of the reported seeds here.\n"
    adjusted = holm([row["p"] for _, row in rows])
    held = [row["verdict"] == "supported" and p < 0.05 for (_, row), p in zip(rows, adjusted)]
    checks = sum(content["exact checks"] or 0 for content in found.values())
    lines = [
        "# What the papers claim, and what came out here",
        "",
        f"{counted(row['verdict'] for _, row in rows)} After Holm's correction for "
        f"{len(rows)} tests, {sum(held)} stay supported at 5 %. Besides, {checks} tests check "
        "numbers, identities and closed forms of the papers (`python -m pytest -m paper`).",
        "",
        f"The reported seeds are {flags.REPORTED} to {flags.REPORTED + flags.SEEDS - 1}, with "
        f"{flags.SEEDS * 4} exact tables from {flags.REPORTED} on; no earlier release printed "
        "results of them, and margins and expectations were committed before they were run. Each "
        "seed has its own base model and its own evaluation prompts. `python train.py --method all "
        "--claim --out results --overwrite` writes these files, and `python train.py --judge "
        "results` writes them again from what was measured. Differences are paired over seeds, "
        "with a 95 % interval by Student's t. The verdict is *no effect* if the interval lies "
        "inside the margin on both sides, *supported* if the interval is above 0 and the mean "
        "exceeds the margin, *reversed* if the interval is below 0, and *inconclusive* otherwise.",
        "",
    ]
    head = ["family", "paper", "claim", "world", "ours / baseline", "difference [95 %]"]
    head += ["matched on", "verdict", "p (Holm)", "exact checks", "seconds"]
    cells = []
    for (content, row), p in zip(rows, adjusted):
        name = content["paper"]
        matched = row["matched"] or f"KL {row['kl']:.2g}"
        both = f"{number(mean(row['ours']))} / {number(mean(row['baseline']))}"
        cells.append([content["family"], f"[{name}]({name}.md)", row["text"], row["world"], both])
        cells[-1] += [bounds(row), matched, words(row), f"{p:.2g}", content["exact checks"] or ""]
        cells[-1].append(f"{content['reported']['seconds']:.0f}")
    return "\n".join([*lines, *markdown(head, cells)]) + "\n"
