"""nanopref's command line: one run, a sweep, the claims of a paper, a question to a model.

    python train.py --method dpo                                    a toy world, about a minute on two CPU cores
    python train.py --method dpo,rdpo --flip 0,0.2,0.4 --seeds 3    all combinations, one table, one plot
    python train.py --method rdpo --claim --seeds 3                 the paper's claims: exit 0 if every expected one holds, 1 if not
    python train.py --method dpo --init DIR --data FILE             a real checkpoint, real preferences
    python train.py --init OUT --prompt "..."                       ask a finished model

Lists separated by commas run all combinations. `--help` explains every flag, `--list` names the methods.
"""

import contextlib
import dataclasses
import importlib
import inspect
import itertools
import json
import math
import os
import re
import shutil
import sys
import time
import traceback

import torch

from data import UserError
from lab import Lab, Settings, report
from lab import claims as lab_claims
from lab.align import Stop
from lab.hub import load_pretrained
from lab.settings import (
    idle,
    make_world,
    methods,
    paper,
    pick_device,
    refuse_idle,
    title,
    unknown,
    worlds,
)
from lab.store import write_json, write_text

ACTIONS = dict(
    method="the paper to run (see --list); a list runs all of them, `all` every one that fits",
    claim="run the paper's claims instead of one alignment",
    seeds="run seed, seed+1, ... so many",
    resume="go on with the interrupted run in this folder",
    prompt="ask the model of --init (or the world's base model) and print its answer",
    show="stop before the first step and print one row as the model sees it",
    list="the methods, their papers and families, and the worlds",
    help="this text",
)


def explanations(cls):
    """{field: (type, default, explanation)} of a dataclass; the explanation is the comment on the field's line."""
    comments = dict(
        re.findall(r"^    (\w+):[^#\n]*(?:\(\n[^#\n]*)?#\s*(.*)$", inspect.getsource(cls), re.M)
    )
    return {
        f.name: (
            f.type if isinstance(f.type, str) else str(getattr(f.type, "__name__", f.type)),
            f.default,
            comments.get(f.name, ""),
        )
        for f in dataclasses.fields(cls)
    }


def convert(name, text, kind):
    """A flag's text as the type of its field; ValueError naming flag and value."""
    for part in (p.strip() for p in kind.split("|")):
        with contextlib.suppress(ValueError):
            if part == "int" and re.fullmatch(r"[+-]?\d+", text):
                return int(text)
            if part == "float" and not math.isnan(float(text)):
                return float(text)
            if part == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if part == "str":
                return text
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    raise UserError(
        f"--{name} {text}: not {' or '.join(wanted[p.strip()] for p in kind.split('|') if p.strip() in wanted)}"
    )


def read_flags(argv):
    """{flag: text} of a command line; ValueError for what is no known flag of train.py or any method."""
    known = {f.name for f in dataclasses.fields(Settings)} | set(ACTIONS)
    bare = {"claim", "show", "list", "help"} | {
        n for n, (kind, _, _) in explanations(Settings).items() if kind == "bool"
    }
    owners = {}
    for name in methods():
        for field, (kind, _, _) in explanations(load_method(name).Config).items():
            owners.setdefault(field, []).append(name)
            if kind == "bool":
                bare.add(field)
    flags, i = {}, 0
    while i < len(argv):
        if not argv[i].startswith("--") or argv[i] == "--":
            raise UserError(
                f"unexpected {argv[i]!r}: flags begin with --, lists are written with commas"
            )
        name, equals, value = argv[i][2:].partition("=")
        name = name.replace("-", "_")
        if name not in known and name not in owners:
            raise UserError(
                unknown("flag", "--" + name, sorted("--" + n for n in known | set(owners)))
            )
        i += 1
        if not equals and name in bare:
            value = "true"
            if i < len(argv) and argv[i].lower() in ("true", "false"):
                value, i = argv[i], i + 1
        elif not equals:
            if i == len(argv) or argv[i].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value, i = argv[i], i + 1
        if name in flags:
            raise UserError(f"--{name} is given twice")
        flags[name] = value
    return flags, owners


def load_method(name):
    """The module of a method; ValueError with the nearest name when there is none."""
    if name not in methods():
        raise UserError(unknown("method", name, methods()))
    return importlib.import_module(f"methods.{name}")


def combinations(flags, owners):
    """The runs that the flags ask for -> list of (method or None, Settings, Config or None, varied dict); every value checked."""
    names = flags.get("method", "").split(",") if flags.get("method") else [None]
    if names == ["all"]:
        names = methods()
    if len(set(names)) < len(names):
        raise UserError(f"--method {flags['method']} names a method twice")
    own = explanations(Settings)
    configs = {f for f in flags if f in owners}
    for name in sorted(configs):
        if not set(owners[name]) & set(names):
            raise UserError(
                f"--{name} is a flag of {', '.join(owners[name])}, not of {', '.join(n or 'no method' for n in names)}"
            )
    single = ("data", "init", "out", "world")
    grids = {}
    for name, text in flags.items():
        if name in own:
            grids[name] = [
                convert(name, part, own[name][0])
                for part in ([text] if name in single else text.split(","))
            ]
    if "seeds" in flags:
        first = grids.get("seed", [0])
        if len(first) > 1:
            raise UserError("--seeds and a list in --seed exclude each other")
        count = convert("seeds", flags["seeds"], "int")
        if count < 1:
            raise UserError(f"--seeds {count} must be at least 1")
        grids["seed"] = list(range(first[0], first[0] + count))
    runs = []
    for method in names:
        module = load_method(method) if method else None
        kinds = explanations(module.Config) if module else {}
        grid = dict(grids)
        for name in configs & set(kinds):
            grid[name] = [convert(name, part, kinds[name][0]) for part in flags[name].split(",")]
        defaults = dict(paper(module).defaults) if module and len(names) == 1 else {}
        if "data" in grid:
            defaults = {}
        if (
            len(defaults) > 1 and "world" in grid
        ):  # the defaults that another world leaves without effect are none
            there = Settings(**defaults | {"world": grid["world"][0]})
            defaults = {
                k: v for k, v in defaults.items() if k not in idle(there, make_world(there))
            }
        for name, values in grid.items():
            if len(set(values)) < len(values):
                raise UserError(f"--{name} {flags.get(name)} names a value twice")
        for name in paper(module).ignores if module else ():
            if name in grid:
                raise UserError(f"--{name} does nothing under {method}")
        for values in itertools.product(*grid.values()):
            chosen = dict(zip(grid, values))
            settings = Settings(**(defaults | {k: v for k, v in chosen.items() if k in own}))
            cfg = (
                module.Config(**{k: v for k, v in chosen.items() if k in kinds}) if module else None
            )
            varied = {k: v for k, v in chosen.items() if len(grid[k]) > 1}
            runs.append(
                (method, settings, cfg, ({"method": method} if len(names) > 1 else {}) | varied)
            )
    return runs


def check_fit(method, module, world, settings):
    """ValueError when a method cannot use a world, with the methods that can, or a setting does nothing with the two."""
    if world.kind not in paper(module).worlds:
        able = [n for n in methods() if world.kind in paper(load_method(n)).worlds]
        raise UserError(
            f"{method} needs a world of {' or '.join(paper(module).worlds)}, {world.name} is one of {world.kind}; {', '.join(able)} can use it"
        )
    needs = paper(module).needs
    if needs in ("verifier", "reward") and not getattr(world, needs):
        papers = {n: paper(load_method(n)) for n in methods()}
        able = [
            n
            for n, other in papers.items()
            if world.kind in other.worlds and getattr(world, other.needs, True)
        ]
        raise UserError(
            f"{method} needs a world with a {needs}, {world.name} has none; {', '.join(able)} can use it"
        )
    if needs != "demonstrations" and world.single:
        able = [n for n in methods() if paper(load_method(n)).needs == "demonstrations"]
        raise UserError(
            f"{world.name} has single answers (completion/label), {method} needs {needs}; {', '.join(able)} can use it"
        )
    if paper(module).family == "lists" and world.lists is not None:
        # given, graded by the truth; only their length is a choice
        idle = [
            n
            for n in ("flip", "label_temperature", "length_bias")
            if getattr(settings, n) != getattr(Settings, n)
        ]
        if idle:
            raise UserError(
                f"--{', --'.join(idle)} would do nothing with the lists of {world.name}"
            )
        world.lists(1, torch.Generator(), settings.k)


def replaced(out):
    """Where the former content of --out waits, under --overwrite, until the new run has ended; a refused run gives it back."""
    return f"{os.path.abspath(out)}.replaced-{os.getpid()}"


def new_folder(settings, label):
    """The run's folder, made and writable; ValueError when --out holds something already, or cannot be written."""
    out = settings.out
    if out is None:
        number = 1
        while os.path.exists(out := os.path.join("out", f"{label}-{number}")):
            number += 1
    elif os.path.isdir(out) and os.listdir(out):
        if not settings.overwrite:
            raise UserError(
                f"--out {out} is not empty; --overwrite empties it, --resume goes on with it"
            )
        if not os.path.exists(os.path.join(out, "run.json")):
            raise UserError(
                f"--out {out} does not look like a run (no run.json), so it is not emptied"
            )
        for name in ("init", "data"):
            value = getattr(settings, name)
            if value and (os.path.realpath(value) + os.sep).startswith(
                os.path.realpath(out) + os.sep
            ):
                raise UserError(
                    f"--{name} {value} lies in --out {out}, which --overwrite would empty"
                )
        os.replace(out, replaced(out))
    elif os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out} is a file")
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def versions():
    """What a run depends on besides its settings."""
    import numpy

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
    }


def one_run(method, settings, cfg, out, show=False, quiet=False):
    """One alignment: header, training, before/after table, samples, files -> summary dict."""
    lab, module = Lab(settings, out, quiet, show), load_method(method)
    check_fit(method, module, lab.world, settings)
    say = (lambda *a: None) if quiet else print
    done = out and os.path.join(out, "summary.json")
    if out and os.path.exists(done):  # a sweep that goes on
        shutil.rmtree(os.path.join(out, "stages"), ignore_errors=True)
        say(f"{out} is finished already")
        with open(done, encoding="utf-8") as file:
            return json.load(file)
    say(report.header(lab, method, module, cfg, lab.base()))
    for reason, n in lab.world.counts.items():
        say(f"{n} rows of {lab.world.name} are left out: {reason}")
    model = module.run(lab, cfg)
    if model is None:
        return {"method": method, "world": lab.world.name, "seed": settings.seed}
    evaluate = getattr(module, "evaluate", Lab.evaluate)
    before, after = (evaluate(lab, m) for m in (lab.reference, model))
    seconds = {
        k: round(lab.seconds.get(k, 0.0), 2) for k in ("base", "preferences", "align", "evaluate")
    }
    summary = dict(
        method=method,
        world=lab.world.name,
        seed=settings.seed,
        steps=lab.steps,
        params=report.count(model),
        seconds=seconds,
    )
    summary |= {"before": before, "after": after}
    say("\n" + report.before_after(before, after))
    if lab.world.reward is None:
        say("There is no true reward in this data, so none is reported.")
    if lab.world.kind == "images":
        report.write_picture(out, lab.world.picture(*report.pictures(lab, model)))
    elif lab.world.kind == "text":
        samples = report.side_by_side(lab, model)
        say("\n" + samples)
        write_text(os.path.join(out, "samples.txt"), samples + "\n")
    report.curves(lab, model, f"{method} on {lab.world.name}, seed {settings.seed}")
    if hasattr(model, "save_pretrained"):
        model.save_pretrained(out)
    write_json(os.path.join(out, "summary.json"), summary)
    shutil.rmtree(os.path.join(out, "stages"), ignore_errors=True)
    say(
        f"\n{report.clock(time.time() - lab.started)} in all; written to {out}/: "
        + ", ".join(sorted(n for n in os.listdir(out) if n[0] != "."))
    )
    return summary


def many_runs(runs, out):
    """All combinations of a sweep, each in its own folder; one table and one plot."""
    results, varied = [], list(dict.fromkeys(k for run in runs for k in run[3] if k != "seed"))
    for i, (method, settings, cfg, changed) in enumerate(runs):
        name = f"{i:03d}-" + "-".join(f"{k}{v}" for k, v in changed.items()).replace(os.sep, "_")
        print(
            f"[{i + 1}/{len(runs)}] " + ", ".join(f"{k} {v}" for k, v in changed.items()),
            file=sys.stderr,
            flush=True,
        )
        summary, about = (
            one_run(method, settings, cfg, os.path.join(out, name), quiet=True),
            os.path.join(out, name, "run.json"),
        )
        if os.path.exists(os.path.dirname(about)) and not os.path.exists(
            about
        ):  # no flags: it is the sweep that is resumed
            write_json(
                about,
                {
                    "settings": dataclasses.asdict(settings),
                    "config": vars(cfg),
                    "versions": versions(),
                },
            )
        if "after" in summary:
            results.append(
                (
                    dataclasses.asdict(settings) | (vars(cfg) if cfg else {}) | {"method": method},
                    summary["after"],
                )
            )
    if not results:
        return
    text = report.sweep_table(results, varied or ["method"])
    print(text)
    write_text(os.path.join(out, "sweep.txt"), text + "\n")
    write_json(
        os.path.join(out, "sweep.json"),
        [{**{n: s[n] for n in [*varied, "seed"]}, **after} for s, after in results],
    )
    plotted = report.sweep_plot(os.path.join(out, "sweep.png"), results, varied or ["method"])
    print(
        f"written to {out}/: sweep.txt, sweep.json"
        + (", sweep.png" if plotted else "")
        + ", a folder a run"
    )


def run_claims(method, settings, seeds, out, quiet=False):
    """The claims of one paper, judged and written to claim.json -> a list of dicts."""
    module = importlib.import_module(f"claims.{method}")
    print(f"{title(load_method(method))}\nclaims on seeds {', '.join(map(str, seeds))}", flush=True)
    lab = Lab(settings, out, quiet=quiet or not sys.stderr.isatty(), seeds=len(seeds))
    command = f"python train.py --method {method} --claim --seeds {len(seeds)}"
    command += f" --seed {seeds[0]}" if seeds[0] else ""
    rows = lab_claims.run(method, module, lab, command)
    shutil.rmtree(os.path.join(out, "stages"), ignore_errors=True)
    return rows


def all_claims(names, settings, seeds, out):
    """The claims of many methods, each in its own folder with what it prints; goes on after a failure, and with what an earlier call
    finished -> claims."""
    lines, start, ran = [], time.time(), 0
    for i, name in enumerate(names):
        folder, failed = os.path.join(out, name), ""
        try:
            with open(os.path.join(folder, "claim.json"), encoding="utf-8") as file:
                found = json.load(file)["claims"]
        except (OSError, ValueError, KeyError, TypeError):
            ran += 1
            os.makedirs(folder, exist_ok=True)
            try:
                with (
                    open(os.path.join(folder, "claim.txt"), "w", encoding="utf-8") as file,
                    contextlib.redirect_stdout(file),
                ):
                    found = run_claims(name, settings, seeds, folder, quiet=True)
            except Exception as error:  # noqa: BLE001 - one paper must not stop the others
                write_text(os.path.join(folder, "error.txt"), traceback.format_exc())
                failed, text = (
                    f"failed, see {folder}/error.txt: ",
                    f"failed: {type(error).__name__}: {error}",
                )
                found = [
                    {
                        "paper": name,
                        "text": " ".join(text.split()),
                        "expected": True,
                        "holds": False,
                    }
                ]
        lines += found
        left = (time.time() - start) / max(1, ran) * (len(names) - i - 1)
        hopes = [c for c in found if c["expected"]]
        say = f"{failed}{sum(c['holds'] for c in hopes)} of {len(hopes)} expected claims hold"
        say += (
            f", {len(found) - len(hopes)} more were not expected to"
            if len(found) > len(hopes)
            else ""
        )
        print(f"[{i + 1}/{len(names)}] {name}: {say}; {report.clock(left)} left", flush=True)
        write_text(os.path.join(out, "claims.md"), lab_claims.claims_markdown(lines))
        write_json(os.path.join(out, "claims.json"), lines)
    print(
        f"{report.clock(time.time() - start)} in all; written to {out}/: claims.json, claims.md, a folder a method"
    )
    return lines


def ask(settings, prompt):
    """The answer of --init's model (or of the world's base model) to one prompt, through the checkpoint's chat template if it has one.

    Greedy, unless --temperature asks for samples."""
    lab = Lab(settings)
    if lab.world.kind != "text":
        raise UserError(
            f"--prompt needs a text model; {lab.world.name} is a world of {lab.world.kind}"
        )
    model = lab.base()
    chat = model.tokenizer.chat
    text = chat([{"role": "user", "content": prompt}], True) if chat else prompt
    lab.max_response = settings.max_response or 128
    row = lab.sample(model, [text], 1)[0]
    print(lab.text(row["responses"][0]).strip())


def print_help():
    """--help: every flag with its default and explanation."""
    print(__doc__.strip())
    print("\nWhat to do")
    for name, text in ACTIONS.items():
        print(f"  --{name:<18} {text}")
    print("\nRun settings (None: the world's or method's default)")
    for name, (_, default, text) in explanations(Settings).items():
        print(f"  --{name:<18} {text} [{default}]")
    for name in methods():
        module = load_method(name)
        print(f"\n{title(module)}  (--method {name})")
        for field, (_, default, text) in explanations(module.Config).items():
            print(f"  --{field:<18} {text} [{default}]")


def print_list():
    """--list: methods, papers, families, worlds."""
    rows = []
    for name in methods():
        module = load_method(name)
        rows.append(
            [
                name,
                paper(module).family,
                "/".join(paper(module).worlds),
                title(module),
            ]
        )
    print(report.table(rows, ["method", "family", "worlds of", "paper"]))
    rows = []
    for name in worlds():
        module = importlib.import_module(f"toy.{name}")
        rows.append([name, module.World.kind, (module.__doc__ or "").strip().splitlines()[0]])
    print("\n" + report.table(rows, ["world", "kind", ""]))


def main(argv):
    flags, owners = read_flags(argv)
    if "help" in flags or not argv:
        return print_help()
    if "list" in flags:
        return print_list()
    if "resume" in flags:
        if len(flags) > 1:
            raise UserError("--resume takes no other flag: the run's own settings are used")
        out = flags["resume"]
        try:
            with open(os.path.join(out, "run.json"), encoding="utf-8") as file:
                kept = json.load(file)
            flags, old = kept["flags"], kept["versions"]
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(f"--resume {out} is no run folder (no readable run.json)") from None
        if old != versions():
            print(
                f"this machine differs from the run's ({old} -> {versions()}): the weights may differ in the last bits",
                file=sys.stderr,
            )
        return start(flags, owners, out)
    return start(flags, owners, None)


def start(flags, owners, out):
    """Carry out checked flags; `out` is given when a run goes on."""
    runs = combinations(flags, owners)
    method, settings, cfg, _ = runs[0]
    if "prompt" in flags:
        useful = {
            "prompt",
            "init",
            "world",
            "data",
            "temperature",
            "seed",
            "max_response",
            "device",
            "dtype",
            "base_seed",
            "base_steps",
        }
        if set(flags) - useful:
            raise UserError(
                f"--{', --'.join(sorted(set(flags) - useful))} does nothing beside --prompt"
            )
        return ask(
            dataclasses.replace(
                settings, temperature=settings.temperature if "temperature" in flags else 0.0
            ),
            flags["prompt"],
        )
    if method is None:
        raise UserError("--method is needed (see --list)")
    if "show" in flags:
        with contextlib.suppress(Stop):
            one_run(
                method, dataclasses.replace(settings, out=None), cfg, None, show=True, quiet=True
            )
        return None
    claim = "claim" in flags
    if claim and set(flags) - {
        "method",
        "claim",
        "seeds",
        "seed",
        "out",
        "overwrite",
        "device",
        "dtype",
        "compile",
    }:
        raise UserError(
            "--claim sets its own data and hyper-parameters; it takes --seeds, --seed, --out, --device, --dtype, --compile"
        )
    fitting, place = {}, "claim"
    for name, run_settings, _, _ in runs if not claim else []:
        if name in fitting:
            continue
        start = load_pretrained(run_settings.init) if run_settings.init else None
        world = make_world(run_settings, start)
        refuse_idle(run_settings, world, start)
        place = world.name
        try:
            check_fit(name, load_method(name), world, run_settings)
            fitting[name] = True
        except ValueError as error:
            if flags["method"] != "all":
                raise
            print(f"left out: {error}", file=sys.stderr)
            fitting[name] = False
    runs = [run for run in runs if claim or fitting[run[0]]]
    method, settings, cfg, _ = runs[0]
    pick_device(settings.device)
    if out is None:
        out = new_folder(
            settings, f"{method if len({r[0] for r in runs}) == 1 else 'sweep'}-{place}"
        )
        local = {
            name: os.path.abspath(flags[name])
            for name in ("data", "init")
            if os.path.exists(flags.get(name, ""))
        }
        flags = flags | local  # --resume may be called from another folder
    write_json(
        os.path.join(out, "run.json"),
        {
            "flags": flags,
            "settings": dataclasses.asdict(settings),
            "config": vars(cfg),
            "versions": versions(),
        },
    )
    try:
        if claim:
            names = list(dict.fromkeys(r[0] for r in runs))
            seeds = sorted({r[1].seed for r in runs})
            plain = Settings(
                seed=seeds[0],
                device=settings.device,
                dtype=settings.dtype,
                compile=settings.compile,
            )
            lines = (
                run_claims(method, plain, seeds, out)
                if len(names) == 1
                else all_claims(names, plain, seeds, out)
            )
            return 0 if all(c["holds"] for c in lines if c["expected"]) else 1
        if len(runs) > 1:
            return many_runs(runs, out)
        one_run(method, settings, cfg, out)
    except OSError as error:
        hint = f"{error.strerror}; the last checkpoint is kept, go on with: python train.py --resume {out}"
        raise OSError(error.errno, hint, error.filename) from None
    except ValueError:
        if os.listdir(out) == [
            "run.json"
        ]:  # refused before anything was made: the next try may have the same --out
            shutil.rmtree(out)
            if os.path.exists(replaced(out)):
                os.replace(replaced(out), out)
        raise
    except KeyboardInterrupt:
        print(f"\nstopped; go on with: python train.py --resume {out}", file=sys.stderr)
        return 130
    finally:
        shutil.rmtree(replaced(out), ignore_errors=True)


def cli(argv):
    """`main` with a user's mistake as one line on stderr -> exit status (0, 1 a claim does not hold, 2 bad input, 130 interrupted)."""
    try:
        return main(argv) or 0
    except KeyboardInterrupt:
        return 130
    except (UserError, OSError) as error:
        print("train.py: " + " ".join(str(error).split()), file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(cli(sys.argv[1:]))
