"""What a card does with this project, in five minutes: the command behind `make gpu`.

    python tests/gpu.py                          on the GPU, into out/gpu/
    python tests/gpu.py --device cpu --small     the same at a small scale, to test this file

The default run and training steps at two shapes come first, alone, since they are timed. A step is
compared with TRL's, where TRL is installed, and otherwise with padded rows. Then a short run of one
method of each family and all tests run in parallel processes, and a third shape is timed in what is
left of the time. Nothing is installed; what is not installed (pytest, TRL) is left out, and the
report says so. It is written to report.json and report.md: times, step times, peak memory, tests,
versions, and the last lines of whatever failed. Exit status 1: something failed.
"""

import argparse
import glob
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

import torch  # noqa: E402

from lab.settings import methods, pick_device  # noqa: E402

REVIEWS = "--layers 2 --dim 96 --vocab 400 --prompt 6 --response 28 --batch_size 64"
GPT2 = "--layers 12 --dim 768 --heads 12 --vocab 50304"
SHAPES = {  # what is timed, the peer, and how both are run
    "reviews, 64 x (6 + 2 x 28)": (REVIEWS, "trl"),
    "124M, 8 x (512 + 2 x 512), compiled": (
        f"{GPT2} --prompt 512 --response 512 --batch_size 8 --compile on",
        "trl_compiled",
    ),
    "124M, 16 x (128 + 2 x 384)": (f"{GPT2} --prompt 128 --response 384 --batch_size 16", "trl"),
}
TINY = "--layers 1 --dim 16 --vocab 50 --prompt 4 --response 6 --batch_size 2 --steps 2"
SHORT = "--steps 20 --base_steps 40 --eval_size 32"
SMALL = "--steps 3 --base_steps 2 --eval_size 4 --prompts 32"


def families():
    """{family: the flags of a run of its first method}, and of runs on images.

    Of the papers that are not about preferences, which run in ways of their own, kdiff is one.
    """
    found = {"beyond": "kdiff --world digits", "images, a UNet": "smpo --world digits"}
    for name in methods():
        paper = importlib.import_module(f"methods.{name}").PAPER
        images = paper.worlds == ("images",) and paper.family != "images"
        if paper.family != "beyond":
            found.setdefault(f"{paper.family} on images" if images else paper.family, name)
    return found


def call(words, end, device, threads=None):
    """Run python with words -> a dict: ok, seconds, and its output (if it failed, the last lines).

    end: the time at which it is cut. threads: of torch on the CPU, by default as many as it likes.
    """
    environment = os.environ | {"NANOPREF_DEVICE": device}
    environment |= {"OMP_NUM_THREADS": str(threads)} if threads else {}
    start = time.time()
    with tempfile.TemporaryFile("w+", errors="replace") as out:
        process = subprocess.Popen(
            [sys.executable, *words],
            cwd=HERE,
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            ok, late = process.wait(max(1.0, end - start)) == 0, ""
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
            process.wait()
            ok, late = False, "cut: no time left"
        out.seek(0)
        text = out.read() + late
    found = {"command": " ".join(words), "ok": ok, "seconds": time.time() - start, "out": text}
    return found | ({} if ok else {"error": "\n".join(text.splitlines()[-15:])})


def training(name, words, device, out, end, threads=None):
    """One run of train.py -> the result of `call`, with the seconds of its parts."""
    folder = os.path.join(out, "runs", name)
    found = call(["train.py", *words, "--out", folder, "--overwrite"], end, device, threads)
    path = os.path.join(folder, "summary.json")
    if found["ok"] and os.path.exists(path):
        with open(path, encoding="utf-8") as file:
            found["parts"] = json.load(file)["seconds"]
    return found


def steps(name, device, small, end):
    """Step times at one of SHAPES beside a peer -> the result of `call`, with `bench`."""
    shape, peer = (TINY, "rows") if small else SHAPES[name]
    peer = peer if importlib.util.find_spec("trl") else "rows"
    argv = ["bench.py", *shape.split(), "--device", device, "--json"]
    found = call([*argv, "--sampling", "off", "--against", peer], end, device)
    if found["ok"]:
        line = [line for line in found["out"].splitlines() if line.startswith("{")][-1]
        found["bench"] = json.loads(line)
    return found


def tests(files, device, end):
    """Some test files on the device -> the result of `call`; its error names what failed."""
    argv = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--device", device, *files]
    found = call(argv, end, device, threads=1)
    lines = found["out"].splitlines()
    shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]
    return found | {"files": files, "error": "\n".join(shown) or found.get("error", "")}


def parts_of_tests(small, count):
    """The test files in `count` parts, as lists; [] if pytest is not installed."""
    if importlib.util.find_spec("pytest") is None:
        return []
    files = sorted(glob.glob(os.path.join(HERE, "tests", "**", "test_*.py"), recursive=True))
    files = [os.path.relpath(path, HERE) for path in files if "test_gpu" not in path]
    files = ["tests/test_diffusion.py"] if small else files
    return [files[n::count] for n in range(min(count, len(files)))]


def versions(device):
    """What the numbers depend on."""
    about = {"python": platform.python_version(), "torch": torch.__version__, "device": device}
    about |= {"cuda": torch.version.cuda, "cpus": os.cpu_count()}
    if device == "cuda":
        about["card"] = torch.cuda.get_device_name()
    for name in ("trl", "transformers", "pytest"):
        there = importlib.util.find_spec(name)
        about[name] = importlib.metadata.version(name) if there else None
    return about


def page(report):
    """The report as Markdown."""
    lines = ["# What this card does", ""]
    lines += [", ".join(f"{name} {value}" for name, value in report["versions"].items()), ""]
    lines += ["| run | seconds | of which | |", "|---|---|---|---|"]
    for name, run in report["runs"].items():
        parts = ", ".join(f"{k} {v:.1f}" for k, v in run.get("parts", {}).items())
        lines.append(f"| {name} | {run['seconds']:.1f} | {parts} | {mark(run)} |")
    lines += ["", "| step | ms | peer | its ms | times | peak MB | its MB | MFU | |"]
    lines += ["|---|---|---|---|---|---|---|---|---|"]
    for name, run in report["steps"].items():
        b = run.get("bench")
        cells = ["-"] * 7
        if b:
            cells = [f"{1e3 * b['step_s']:.2f}", b["against"], f"{1e3 * b['against_step_s']:.2f}"]
            cells += [f"{b['speedup']:.2f}"]
            cells += [f"{b[k]:.0f}" if b[k] else "-" for k in ("peak_mb", "against_peak_mb")]
            cells += [f"{b['mfu']:.1%}" if b["mfu"] else "-"]
        lines.append(f"| {name} | {' | '.join(cells)} | {mark(run)} |")
    bad = [name for name, run in report["tests"].items() if not run["ok"]]
    lines += ["", f"Tests: {len(report['tests'])} processes, {len(bad)} with failures."]
    if not report["tests"]:
        lines += ["pytest is not installed, so no test was run."]
    for part in ("runs", "steps", "tests"):
        for name, run in report[part].items():
            if not run["ok"]:
                lines += ["", f"## {name}", "", "```", run.get("error", ""), "```"]
    return "\n".join(lines) + "\n"


def mark(run):
    """ok or FAILED."""
    return "ok" if run["ok"] else "FAILED"


def main(argv):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--out", default=os.path.join(HERE, "out", "gpu"))
    parser.add_argument("--seconds", type=float, default=290.0, help="the time for everything")
    parser.add_argument("--small", action="store_true", help="tiny shapes, to test this file")
    given = parser.parse_args(argv)
    device = pick_device(given.device).type
    out, end = os.path.abspath(given.out), time.time() + given.seconds
    os.makedirs(out, exist_ok=True)
    report = {"versions": versions(device), "runs": {}, "steps": {}, "tests": {}}

    def keep(kind, name, result):
        """Add a result to the report and write it, so that an interrupted run has one, too."""
        report[kind][name] = result
        with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as file:
            json.dump(report, file, indent=1)
        with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as file:
            file.write(page(report))

    size = SMALL if given.small else SHORT
    words = ["--method", "dpo", *(SMALL.split() if given.small else [])]
    keep("runs", "default", training("default", words, device, out, end))
    first, *others, last = SHAPES
    for name in [first] if given.small else [first, *others]:
        keep("steps", name, steps(name, device, given.small, end))

    workers = max(1, (os.cpu_count() or 2) - 2)
    with ThreadPoolExecutor(workers) as pool:
        jobs = []
        for family, words in families().items():
            about = ["--method", *words.split(), *size.split()]
            job = pool.submit(training, family, about, device, out, end, 1)
            jobs.append(("runs", f"{family}: {words}", job))
        for files in parts_of_tests(given.small, 2 * workers):
            jobs.append(("tests", ", ".join(files), pool.submit(tests, files, device, end)))
        for kind, name, job in jobs:
            keep(kind, name, job.result())
    if not given.small and end - time.time() > 20:
        keep("steps", last, steps(last, device, given.small, end))
    print(page(report) + f"\nwritten to {out}/report.md and report.json")
    found = [run for part in ("runs", "steps", "tests") for run in report[part].values()]
    return 0 if all(run["ok"] for run in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
