"""One command on several processes or machines: --jobs, --shard and --merge.

A sweep, or the claims of several papers, is a list of tasks with one folder each. A shard i/n does
every n-th task, from the i-th on. Shards share one --out folder, or --merge joins their folders.
"""

import concurrent.futures
import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time

from data import UserError, printable
from lab import report
from lab.folder import MARK, absolute, read_object, write_run
from lab.store import HERE

TRACEBACK = "Traceback (most recent call last):"  # Python's first line of a traceback

PATIENCE = 30  # seconds that processes have to end by themselves after Ctrl-C
PARTS = ("out", "overwrite", "jobs", "shard")  # flags in which the parts of a command may differ


def read_shard(text):
    """ "2/4" -> (2, 4). UserError: it is not such a pair."""
    found = re.fullmatch(r"(\d{1,6})/(\d{1,6})", text)
    i, n = map(int, found.groups()) if found else (0, 0)
    if not 1 <= i <= n:
        raise UserError(f"--shard {text}: expected i/n with i from 1 to n, such as 2/4")
    return i, n


def share(count, shard):
    """The indices of the tasks of a shard ("2/4"), or of all `count` tasks for None."""
    i, n = read_shard(shard) if shard else (1, 1)
    return range(i - 1, count, n)


def same_command(flags):
    """The flags of a command, without those in which its parts may differ."""
    return {name: text for name, text in absolute(flags).items() if name not in PARTS}


def flags_of(folder):
    """The flags in the run.json of a folder. UserError: it has none."""
    try:
        found = dict(read_object(os.path.join(folder, MARK))["flags"])
        if not all(isinstance(text, str) for text in found.values()):
            raise TypeError
        return found
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{folder} has no readable {MARK}") from None


def shared_folder(run, given):
    """The --out folder that the shards of one command share, made by the first of them -> its path.

    UserError: it is not empty and not of the same command.
    """
    out = run.settings.out
    try:
        os.makedirs(out, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written: {error.strerror}") from None
    flags = same_command(given)
    if not os.listdir(out):
        write_run(out, run, flags)
    if same_command(flags_of(out)) != flags:
        raise UserError(f"--out {out} is of another command, so this shard does not fit into it")
    return out


def in_processes(given, out, names, jobs):
    """Do all tasks of a command, each in a process of its own and `jobs` of them at a time.

    given: the flags of the command. names: what to print for each task. Returns {index: reason} of
    the tasks that failed.
    """
    flags = [f"--{name}={text}" for name, text in same_command(given).items()]
    command = [sys.executable, os.path.join(HERE, "train.py"), *flags, "--out", out]
    threads = str(max(1, (os.cpu_count() or 1) // jobs))
    environment = {"OMP_NUM_THREADS": threads} | dict(os.environ)
    start, failed, processes = time.time(), {}, {}

    def do(i):
        shard = ["--shard", f"{i + 1}/{len(names)}"]
        pipes = dict(stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        with subprocess.Popen([*command, *shard], env=environment, **pipes) as process:
            processes[i] = process
            said = process.communicate()[1].strip().splitlines()
        return process.returncode, said or [f"status {process.returncode}"]

    with ended_by_sigterm(), concurrent.futures.ThreadPoolExecutor(jobs) as pool:
        asked = {pool.submit(do, i): i for i in range(len(names))}
        try:
            for done, future in enumerate(concurrent.futures.as_completed(asked), 1):
                i, (status, said) = asked[future], future.result()
                if status not in (0, 1):  # 1: a claim does not hold
                    said[-1] = said[-1].removeprefix("train.py: ")
                    failed[i] = re.sub(r"^\d+ of \d+ runs failed: ", "", said[-1])
                    failed[i] = failed[i].removeprefix(f"{names[i]}: ")
                    if TRACEBACK in said:
                        about = "\n".join(said[said.index(TRACEBACK) : -1])
                        print(printable(about, None, keep="\n"), file=sys.stderr)
                left = (time.time() - start) / done * (len(names) - done)
                line = f"[{done}/{len(names)}] {names[i]}{' failed' * (i in failed)}"
                print(f"{printable(line)}; {report.clock(left)} left", file=sys.stderr, flush=True)
        except BaseException as reason:  # no process outlives this one
            pool.shutdown(wait=False, cancel_futures=True)
            if isinstance(reason, KeyboardInterrupt):  # they have it, too, and write checkpoints
                concurrent.futures.wait(asked, PATIENCE)
            while not all(future.done() for future in asked):
                for process in list(processes.values()):
                    process.terminate()
                time.sleep(0.1)
            raise
    return failed


@contextlib.contextmanager
def ended_by_sigterm():
    """A context in which SIGTERM, by which schedulers end a job, raises SystemExit."""

    def end(number, frame):
        sys.exit(128 + number)

    try:
        old = signal.signal(signal.SIGTERM, end)
    except ValueError:  # not the main thread
        yield
        return
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, old)


def gather(folders, out):
    """Copy the runs that the folders of shards have finished into `out`, each run once."""
    for folder in folders:
        for name in sorted(os.listdir(folder)):
            place, target = os.path.join(folder, name), os.path.join(out, name)
            if os.path.exists(f"{place}/summary.json") and not os.path.exists(target):
                shutil.copytree(place, target)


def parts_of(text):
    """The folders of --merge -> (folders, the flags of their command).

    UserError: one is not the folder of a sweep or of claims, or they are of different commands.
    """
    folders = text.split("\n")
    flags = [same_command(flags_of(folder)) for folder in folders]
    if "method" not in flags[0]:
        raise UserError(f"{folders[0]} has no readable {MARK}: it names no method")
    for folder, other in zip(folders, flags):
        if other != flags[0]:
            names = sorted(n for n in {*other, *flags[0]} if other.get(n) != flags[0].get(n))
            raise UserError(f"{folder} and {folders[0]} differ in --{', --'.join(names)}")
    return folders, flags[0]
