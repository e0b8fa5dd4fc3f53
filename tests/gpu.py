"""What a card does with this project, in five minutes: the command behind `make gpu`.

    python tests/gpu.py                          on the GPU, into out/gpu/
    python tests/gpu.py --device cpu --small     the same at a small scale, to test this file

One after the other: the default run, a short run of one method of each family, training steps at
three shapes beside a peer (TRL where it is installed), and then the tests on the device, in
parallel processes, for the rest of the time. Nothing is installed; what is not installed (pytest,
TRL) is left out, and the report says so. It is written to report.json and report.md: times, step
times, peak memory, tests, versions, and the last lines of whatever failed. Exit status 1: something
failed.
"""

import argparse
import glob
import importlib
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
sys.path.insert(0, HERE)

import torch  # noqa: E402

from lab.settings import methods, pick_device  # noqa: E402

REVIEWS = "--layers 2 --dim 96 --vocab 400 --prompt 6 --response 28 --batch_size 64"
GPT2 = "--layers 12 --dim 768 --heads 12 --vocab 50304"
SHAPES = {
    "reviews, 64 x (6 + 2 x 28)": REVIEWS,
    "124M, 16 x (128 + 2 x 384)": f"{GPT2} --prompt 128 --response 384 --batch_size 16",
    "124M, 8 x (512 + 2 x 512)": f"{GPT2} --prompt 512 --response 512 --batch_size 8",
}
TINY = "--layers 1 --dim 16 --vocab 50 --prompt 4 --response 6 --batch_size 2 --steps 2"
SHORT = "--steps 20 --base_steps 40 --eval_size 32"
SMALL = "--steps 3 --base_steps 2 --eval_size 4 --prompts 32"


def families():
    """{family: the first method of it}, and the first one on images alone.

    Papers that are not about preferences run another way.
    """
    found = {}
    for name in methods():
        paper = importlib.import_module(f"methods.{name}").PAPER
        images = paper.worlds == ("images",) and paper.family != "images"
        if paper.family != "beyond":
            found.setdefault(f"{paper.family} on images" if images else paper.family, name)
    return found


def call(words, seconds, device):
    """Run python with words -> a dict: ok, seconds, and its output (if it failed, the end)."""
    environment = os.environ | {"NANOPREF_DEVICE": device}
    start = time.time()
    try:
        done = subprocess.run(
            [sys.executable, *words],
            cwd=HERE,
            env=environment,
            capture_output=True,
            text=True,
            timeout=max(1.0, seconds),
        )
        ok, out, error = done.returncode == 0, done.stdout, done.stderr
    except subprocess.TimeoutExpired:
        ok, out, error = False, "", f"cut after {seconds:.0f} s"
    found = {"command": " ".join(words), "ok": ok, "seconds": time.time() - start, "out": out}
    return found | ({} if ok else {"error": "\n".join((out + error).splitlines()[-15:])})


def runs(device, small, out, seconds):
    """The default run and one run per family -> {name: result of `call`}."""
    deadline, found = time.time() + seconds, {}
    words = {"default": ["--method", "dpo", *(SMALL.split() if small else [])]}
    for family, name in families().items():
        size = SMALL if small else SHORT
        words[f"{family}: {name}"] = ["--method", name, *size.split()]
    for name, about in list(words.items())[: 2 if small else None]:
        folder = os.path.join(out, "runs", name.split()[-1] if ":" in name else name)
        argv = ["train.py", *about, "--out", folder, "--overwrite"]
        found[name] = call(argv, deadline - time.time(), device)
        path = os.path.join(folder, "summary.json")
        if found[name]["ok"] and os.path.exists(path):
            with open(path, encoding="utf-8") as file:
                found[name]["parts"] = json.load(file)["seconds"]
    return found


def steps(device, small, seconds):
    """Step times at three shapes beside a peer -> {shape: result of `call` with `bench`}."""
    deadline, found = time.time() + seconds, {}
    peer = "trl_compiled" if importlib.util.find_spec("trl") else "rows"
    for name, shape in list(SHAPES.items())[: 1 if small else None]:
        argv = ["bench.py", *(TINY if small else shape).split(), "--device", device, "--json"]
        argv += ["--sampling", "off", "--against", peer]
        found[name] = call(argv, deadline - time.time(), device)
        if found[name]["ok"]:
            found[name]["bench"] = json.loads(found[name]["out"].splitlines()[-1])
    return found


def tests(device, small, seconds):
    """The tests on the device, each process with its share of the files -> {name: result}."""
    if importlib.util.find_spec("pytest") is None:
        return {}
    files = sorted(glob.glob(os.path.join(HERE, "tests", "**", "test_*.py"), recursive=True))
    files = [os.path.relpath(path, HERE) for path in files if "test_gpu" not in path]
    if small:
        files = ["tests/test_diffusion.py"]
    count = min(len(files), max(1, (os.cpu_count() or 2) // 2))
    environment = os.environ | {"NANOPREF_DEVICE": device, "OMP_NUM_THREADS": "1"}
    start, begun = time.time(), []
    for n in range(count):
        argv = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
        argv += ["--device", device, *files[n::count]]
        process = subprocess.Popen(
            argv,
            cwd=HERE,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        begun.append((process, files[n::count]))
    found = {}
    for process, part in begun:
        try:
            left = max(1.0, start + seconds - time.time())
            out, _ = process.communicate(timeout=left)
            ok = process.returncode == 0
        except subprocess.TimeoutExpired:
            process.kill()
            ok, out = False, (process.communicate()[0] or "") + f"\ncut after {seconds:.0f} s"
        result = {"ok": ok, "seconds": time.time() - start, "files": part}
        lines = out.splitlines()
        shown = [line for line in lines if line.startswith(("FAILED", "ERROR"))] + lines[-1:]
        found[", ".join(part)] = result | {"error": "\n".join(shown)}
    return found


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
    report = {"versions": versions(device)}
    report["runs"] = runs(device, given.small, out, 0.45 * given.seconds)
    report["steps"] = steps(device, given.small, 0.3 * given.seconds)
    report["tests"] = tests(device, given.small, end - time.time())
    with open(os.path.join(out, "report.json"), "w", encoding="utf-8") as file:
        json.dump(report, file, indent=1)
    text = page(report)
    with open(os.path.join(out, "report.md"), "w", encoding="utf-8") as file:
        file.write(text)
    print(text + f"\nwritten to {out}/report.md and report.json")
    found = [run for part in ("runs", "steps", "tests") for run in report[part].values()]
    return 0 if all(run["ok"] for run in found) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
