"""What --help and --list print."""

import textwrap

from lab.flags import ACTIONS, catalogue, settings_flags
from lab.report import table
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


def explained(flags):
    """[(name, explanation with the default)] of {name: Flag}."""
    rows = []
    for name, flag in flags.items():
        shown = "" if flag.default in ("None", "") else f" [{flag.default}]"
        rows.append((name, flag.text + shown))
    return rows


def page(intro, chosen):
    """--help: the actions and the run settings, or the papers that --method names."""
    if chosen:
        return "\n\n".join(paper_help(method) for method in chosen)
    parts = [intro.strip(), "\nWhat to do", lines_of(list(ACTIONS.items()))]
    parts += ["\nRun settings [default; none: the world's own]"]
    parts += [lines_of(explained(settings_flags()))]
    parts += ["\nA paper's own flags: python train.py --method NAME --help; names: --list"]
    return "\n".join(parts)


def paper_help(method):
    """--method NAME --help: that paper alone, with its flags and what it changes."""
    head = method.doc.split("Differences from the paper")[0].rstrip()
    paper, parts = method.paper, [head]
    if method.flags:
        rows = explained(method.flags)
        parts += [f"\nFlags of {method.name} [default]", lines_of(rows)]
    else:
        parts += [f"\n{method.name} has no flags of its own."]
    runs = f"\nIt runs on worlds of {' and '.join(paper.worlds)}; it needs {paper.needs}."
    parts += [runs]
    if paper.defaults:
        changed = "  ".join(f"--{name} {value}" for name, value in paper.defaults.items())
        parts += [f"Run alone it sets: {changed}"]
    if paper.ignores:
        parts += [f"Refused here, since they do nothing: --{', --'.join(paper.ignores)}"]
    return "\n".join([*parts, "The run settings: python train.py --help"])


def listing():
    """--list: methods by family, and worlds; a file that cannot be read says why."""
    rows = []
    for method in sorted(catalogue(), key=lambda m: (m.problem != "", family(m), m.name)):
        kinds = "/".join(method.paper.worlds) if not method.problem else ""
        title = f"cannot be read: {method.problem}" if method.problem else method.title
        rows.append([method.name, family(method), kinds, title])
    parts = [table(rows, ["method", "family", "worlds of", "paper"])]
    rows = []
    for name in worlds():
        module = world_module(name)
        rows.append([name, module.World.kind, (module.__doc__ or name).strip().splitlines()[0]])
    parts += [table(rows, ["world", "kind", ""])]
    return "\n\n".join(parts)


def family(method):
    return method.paper.family if method.paper and not method.problem else ""
