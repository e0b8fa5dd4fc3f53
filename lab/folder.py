"""The folder of a run: how it is made, replaced by --overwrite, resumed and locked."""

import contextlib
import dataclasses
import glob
import hashlib
import json
import math
import os
import shutil
import sys
import time

import torch

from data import UserError, error_line, printable
from lab.store import alone, clear_half_written, commit, write_json

MARK = "run.json"
RESULTS = "README.md"  # the page of all papers in a folder of results


def versions():
    """The versions and the number of threads, which may change the last bits of the weights."""
    import numpy

    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "numpy": numpy.__version__,
        "threads": torch.get_num_threads(),
    }


@contextlib.contextmanager
def folder(run, flags, label, resumed=None):
    """A context that makes and locks the folder of a run, yields its path, and cleans up.

    run: the settings and the Config. flags: the command line, stored for --resume.
    label: METHOD-WORLD, for the default path. resumed: the folder of an interrupted run, which is
    continued in place. A run that fails before anything was trained leaves no folder. With
    --overwrite the former run is restored if the new one fails. The folder of a claim may hold
    results of other papers, which stay.
    """
    out = resumed or new_folder(run.settings, label, adds="claim" in flags)
    kept = resumed or os.listdir(out)
    former = aside(out)
    with contextlib.ExitStack() as held:
        held.enter_context(alone(out, wait=False))
        if kept:
            clear_half_written(out)
        try:
            if not resumed:
                write_run(out, run, flags)
            yield out
        except KeyboardInterrupt:
            note = f"; the former run waits in {former}" if os.path.exists(former) else ""
            line = f"\nstopped; go on with: python train.py --resume {out}{note}"
            print(printable(line, None, keep="\n"), file=sys.stderr)
            raise
        except Exception as error:
            held.close()  # an open file could not be moved on Windows
            left = out if kept else give_back(out, former)
            if isinstance(error, OSError) and left:
                hint = "the last checkpoint is kept, go on with: python train.py --resume"
                hint = f"{error.strerror or error}; {hint} {left}"
                raise OSError(error.errno, hint, error.filename) from None
            if isinstance(error, UserError) and left not in (None, out):
                text = str(error).replace(f"kept in {out}", f"kept in {left}")
                raise UserError(
                    f"{text}; {out} is the former run again, the failed one is {left}"
                ) from None
            raise
        for old in glob.glob(glob.escape(os.path.abspath(out)) + ".replaced-*"):
            shutil.rmtree(old, ignore_errors=True)


def new_folder(settings, label, adds=False):
    """Make the folder of a new run -> its path. UserError: it must not be used, or cannot be.

    adds: the run may add its files to those of earlier runs, which a folder of results holds.
    """
    out = settings.out
    if out is None:
        number = 1
        while os.path.exists(out := os.path.join("out", f"{label}-{number}")):
            number += 1
    waiting = sorted(glob.glob(glob.escape(os.path.abspath(out)) + ".replaced-*"))
    if waiting:
        raise UserError(
            f"{waiting[0]} holds the run that an interrupted --overwrite of {out} set aside; "
            f"finish that one with --resume {out}, or move the older one back or delete it"
        )
    if os.path.exists(out) and not os.path.isdir(out):
        raise UserError(f"--out {out} is a file")
    full = os.path.isdir(out) and os.listdir(out)
    if full and adds:
        if not os.path.exists(os.path.join(out, RESULTS)):
            raise UserError(f"--out {out} is not empty and has no results of claims")
    elif full:
        if not settings.overwrite:
            raise UserError(
                f"--out {out} is not empty; --overwrite replaces it, --resume goes on with it"
            )
        if not os.path.exists(os.path.join(out, MARK)):
            raise UserError(
                f"--out {out} does not look like a run (no {MARK}), so it is not replaced"
            )
        for name in ("init", "data"):
            value = getattr(settings, name)
            inside = os.path.realpath(out) + os.sep
            if value and (os.path.realpath(value) + os.sep).startswith(inside):
                raise UserError(f"--{name} {value} lies in --out {out}, which would be replaced")
        with alone(out, wait=False):
            pass
        os.replace(out, aside(out))
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    return out


def aside(out):
    """The path to which --overwrite moves the former run until the new one has ended."""
    return f"{os.path.abspath(out)}.replaced-{os.getpid()}"


def give_back(out, former):
    """Undo a failed run: the former run returns to `out` -> the failed run's new path, or None.

    If the failed run has trained something it is kept, next to the former run if there was one.
    """
    left = out
    if not trained(out):
        shutil.rmtree(out, ignore_errors=True)
        left = None
        if os.path.dirname(out) == "out":  # the default, made for this run
            with contextlib.suppress(OSError):
                os.rmdir("out")
    if os.path.exists(former):
        if left:
            left = f"{out}.failed-{os.getpid()}"
            os.replace(out, left)
        os.replace(former, out)
    return left


def trained(out):
    """Whether this folder, or a folder in it, has results of training or of an evaluation."""
    for place, _, names in os.walk(out):
        if any(n in ("summary.json", RESULTS) for n in names):
            return True
        if any("-checkpoint-" in n for n in names):
            return True
        if "metrics.jsonl" in names:
            with open(os.path.join(place, "metrics.jsonl"), encoding="utf-8") as file:
                if any('"loss"' in line for line in file):  # not only a look before the first step
                    return True
    return False


# ---------------------------------------------------------------- run.json


def write_run(out, run, flags):
    """Write run.json: flags, settings, Config, versions, and hashes of the files that are read."""
    flags = absolute(flags)
    files = [flags.get("data", ""), flags.get("world", ""), *flags.get("method", "").split(",")]
    write_json(
        os.path.join(out, MARK),
        {
            "flags": flags,
            "method": run.method,
            "settings": dataclasses.asdict(run.settings),
            "config": vars(run.cfg) if run.cfg else {},
            "versions": versions(),
            "commit": commit(),
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "began": time.time_ns(),
            "files": {path: stamp(path) for path in files if os.path.isfile(path)},
        },
    )


def absolute(flags):
    """Flags with absolute paths, which mean the same in any folder."""
    out = dict(flags)
    for name in ("data", "init", "world", "method"):
        parts = flags.get(name, "").split(",") if name == "method" else [flags.get(name, "")]
        if any(os.path.exists(part) for part in parts):
            paths = [os.path.abspath(part) if os.path.exists(part) else part for part in parts]
            out[name] = ",".join(paths)
    return out


def note_resolved(out, lab):
    """Add to run.json the settings that the world chose, as "resolved"."""
    path = os.path.join(out, MARK)
    known = read_object(path)
    names = ("steps", "batch_size", "lr", "prompts", "k", "max_response", "eval_every", "eval_size")
    known["resolved"] = {name: getattr(lab, name) for name in names}
    known["resolved"] |= {"world": lab.world.name, "device": str(lab.device), "bf16": lab.bf16}
    write_json(path, known)


def read_run(out):
    """The command line of an interrupted run, as a list of arguments.

    UserError: the folder is not a run, or a file that it reads has changed since.
    """
    try:
        kept = read_object(os.path.join(out, MARK))
        argv = [f"--{name}={text}" for name, text in kept["flags"].items()]
        old, files = dict(kept["versions"]), dict(kept.get("files", {}))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        raise UserError(f"--resume {out} is not a run (no readable {MARK})") from None
    if not argv:
        raise UserError(f"--resume {out} is one run of a sweep: resume the folder of the sweep")
    for path, before in files.items():
        if not os.path.isfile(path) or stamp(path) != before:
            raise UserError(f"--resume {out}: {path} has changed since that run began")
    if old != versions():
        print(
            f"the run was made with {old}, this is {versions()}: "
            "the weights may differ in the last bits",
            file=sys.stderr,
        )
    return argv


def stamp(path):
    """A hash of a file's content."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


# ---------------------------------------------------------------- what a run has written


def read_object(path):
    """The JSON object in a file. UserError: there is none, it is damaged."""
    try:
        with open(path, encoding="utf-8") as file:
            found = json.load(file)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error_line(error)}") from None
    if not isinstance(found, dict):
        raise UserError(f"{path} is damaged: it holds no JSON object")
    return found


def read_summary(out):
    """summary.json of a finished run, with NaN where it has null. UserError: it is damaged."""
    path = os.path.join(out, "summary.json")
    found = read_object(path)
    try:
        parts = [found[name] for name in ("before", "after") if name in found]
        parts += [*found.get("table", {}).values(), *found.get("best_of", [])]
        for part in parts:
            for name, value in part.items():
                pair = name.endswith("_interval") and isinstance(value, list) and len(value) == 2
                if not all(map(is_number, value if pair else [value])):
                    raise TypeError
                part[name] = math.nan if value is None else value
        for point in found.get("best_of", []):
            point["kl"], point["reward"], found["before"]["reward"]
        if not isinstance(found["method"], str):
            raise TypeError
    except (KeyError, TypeError, AttributeError):
        told = "it does not hold the numbers of an evaluation"
        raise UserError(f"{path} is damaged: {told}") from None
    return found


def is_number(value):
    """Whether a value from JSON is a number that a float can hold, or null."""
    small = type(value) is int and abs(value) < 2**63
    return small or value is None or type(value) is float


def read_metrics(path):
    """[(line, the dict in it)] of a metrics.jsonl, without a last line that a kill has cut off.

    UserError: another line is damaged."""
    found = []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.endswith(b"\n"):
                break
            try:
                values = json.loads(line)
                whole = {type(values["stage"]), type(values["step"])} == {int}
                if not whole or not all(map(is_number, values.values())):
                    raise ValueError
            except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
                raise UserError(f"{path}:{number} is damaged: it is no line of metrics") from None
            found.append((line, values))
    return found
