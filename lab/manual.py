"""The text of --help and --list."""

import textwrap
from collections import Counter

from data import UserError
from lab.flags import ACTIONS, catalogue, filled_in, settings_flags
from lab.report import table
from lab.results import OWN, verdicts
from lab.settings import world_module, worlds


def lines_of(rows):
    """Flags with their explanations, in two columns."""
    width = max(len(name) for name, _ in rows) + 4
    out = []
    for name, text in rows:
        first, *rest = textwrap.wrap(text, 98 - width) or [""]
        out.append(f"  --{name:<{width - 2}}{first}".rstrip())
        out += [" " * (width + 2) + line for line in rest]
    return "\n".join(out)


def explained(flags, filled=()):
    """[(name, explanation with the default)] of {name: Flag}; filled: see `flags.filled_in`."""
    rows = []
    for name, flag in flags.items():
        default = by_variant(filled[name]) if name in filled else flag.default.strip("'")
        shown = "" if default in ("None", "") else f" [{default}]"
        rows.append((name, flag.text + shown))
    return rows


def by_variant(defaults):
    """The defaults {variant: default} of one field as text.

    If all variants agree, it is their value; otherwise it lists the variants with other values and
    ends in `else` and the most common value. A default that is None is computed, as the comment
    beside the field explains.
    """
    given = {variant: str(value) for variant, value in defaults.items() if value is not None}
    (usual, count), *others = Counter(given.values()).most_common() or [("", 0)]
    if not others:
        return usual
    parts = [f"{v} {value}" for v, value in given.items() if value != usual or count == 1]
    return ", ".join(parts + [f"else {usual}"] * (count > 1))


def page(intro, chosen):
    """The text of --help: actions and run settings, or the help of the papers in --method."""
    if chosen:
        return "\n\n".join(paper_help(method) for method in chosen)
    parts = [intro.strip(), "\nWhat to do", lines_of(list(ACTIONS.items()))]
    parts += ["\nRun settings [default; without one, the world's own]"]
    parts += [lines_of(explained(settings_flags()))]
    parts += ["\nA paper's own flags: python train.py --method NAME --help; names: --list"]
    return "\n".join(parts)


def paper_help(method):
    """The text of --method NAME --help: one paper, its flags, and the settings that it changes."""
    head = method.doc.split("Differences from the paper")[0].rstrip()
    paper, parts = method.paper, [head]
    if method.flags:
        try:
            filled = filled_in(method)
        except UserError:  # the file fails while it is imported, so only its source is known
            filled = {}
        rows = explained(method.flags, filled)
        parts += [f"\nFlags of {method.name} [default]", lines_of(rows)]
    else:
        parts += [f"\n{method.name} has no flags of its own."]
    kinds = ", ".join(paper.worlds)
    runs = f"\nKinds of world that it runs on: {kinds}. It needs {paper.needs}."
    parts += [runs]
    if paper.defaults:
        changed = "  ".join(f"--{name} {value}" for name, value in paper.defaults.items())
        parts += [f"Settings that it changes when run alone: {changed}"]
    if paper.demo:
        changed = "  ".join(f"--{name} {value}" for name, value in paper.demo.items())
        parts += [f"Without --world and --data it also changes: {changed}"]
    if paper.ignores:
        parts += [f"Settings that it refuses, as they do nothing: --{', --'.join(paper.ignores)}"]
    return "\n".join([*parts, "The run settings: python train.py --help"])


def listing():
    """The text of --list: methods by family with the verdict of their primary claim, and worlds.

    For a file that is broken, it has the reason.
    """
    rows, known = [], verdicts(OWN)
    for method in sorted(catalogue(), key=lambda m: (m.problem != "", family(m), m.name)):
        kinds = "/".join(method.paper.worlds) if not method.problem else ""
        title = f"cannot be read: {method.problem}" if method.problem else method.title
        rows.append([method.name, family(method), kinds, known.get(method.name, ""), title])
    parts = [table(rows, ["method", "family", "worlds of", "verdict", "paper"])]
    rows = []
    for name in worlds():
        module = world_module(name)
        rows.append([name, module.World.kind, (module.__doc__ or name).strip().splitlines()[0]])
    parts += [table(rows, ["world", "kind", ""])]
    return "\n\n".join(parts)


def family(method):
    """The family of a method, or "" if its file cannot be read."""
    return method.paper.family if method.paper and not method.problem else ""
