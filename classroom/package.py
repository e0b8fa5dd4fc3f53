"""The zip that Gradescope takes as an autograder.

Gradescope builds a container out of it: setup.sh installs what is needed and makes a second user,
run_autograder grades the one submission that lies in /autograder/submission. Outside of such a
container, AUTOGRADER_ROOT stands for /autograder, AUTOGRADER_PYTHON for the interpreter, and
AUTOGRADER_USER for the user that runs submissions; an empty one stands for the caller.
"""

import zipfile
from pathlib import Path

from data import UserError

ROOT = Path(__file__).parents[1]
SETUP = """#!/usr/bin/env bash
set -e
apt-get update && apt-get install -y python3 python3-pip python3-venv
python3 -m venv /autograder/venv
/autograder/venv/bin/pip install -r /autograder/source/project/requirements.txt
useradd --no-create-home student || true
chmod -R go-rwx /autograder/source/grader
"""
RUN = """#!/usr/bin/env bash
set -e
root="${AUTOGRADER_ROOT:-/autograder}"
user="${AUTOGRADER_USER-student}"
work="$(mktemp -d)"
mkdir "$work/all"
cp -r "$root/submission" "$work/all/student"
cd "$root/source/project"
"${AUTOGRADER_PYTHON:-$root/venv/bin/python}" grade.py "$root/source/grader" "$work/all" \\
  --out "$work/out" ${user:+--user "$user"}
cp "$work/out/student.json" "$root/results/results.json"
"""


def write(out):
    """Write OUT/autograder.zip and return its path. UserError: it cannot be written."""
    out = Path(out)
    target = out / "autograder.zip"
    folders = ("lab", "toy", "methods", "classroom")
    files = [path for folder in folders for path in sorted((ROOT / folder).rglob("*.py"))]
    names = ("bench.py", "data.py", "diffusion.py", "nanomodel.py", "train.py", "grade.py")
    files += [ROOT / name for name in (*names, "requirements.txt")]
    try:
        with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED, strict_timestamps=False) as archive:
            for name, text in (("setup.sh", SETUP), ("run_autograder", RUN)):
                entry = zipfile.ZipInfo(name)
                entry.external_attr = 0o755 << 16
                archive.writestr(entry, text)
            for path in files:
                archive.write(path, Path("project") / path.relative_to(ROOT))
            for path in sorted((out / "grader").rglob("*")):
                if path.is_file():
                    archive.write(path, Path("grader") / path.relative_to(out / "grader"))
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from error
    return target
