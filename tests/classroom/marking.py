"""How the tests of assignments write one and mark a source, in this process."""

import re
import subprocess
import sys
from pathlib import Path

from classroom import grader, handout, hidden, outputs

ROOT = Path(handout.__file__).parents[1]


def without_runs(files, about, teacher, say):
    """In place of handout.measure_runs: no short runs."""
    (teacher / "cache").mkdir()
    for one in about["files"]:
        one["run"] = None


def written(tmp_path, monkeypatch, path, text):
    """An assignment of one file without a short run -> (its folder, its Sheet)."""
    monkeypatch.setattr(handout, "measure_runs", without_runs)
    files = handout.files_of([ROOT / path], [text])
    about = handout.write(files, tmp_path / "hw", say=lambda line: None)
    return tmp_path / "hw", grader.Sheet(tmp_path / "hw/grader", about["files"][0])


def marks_of(sheet, source):
    """The rows of a source of any file, run in this process as its own process would run it."""
    names = {"__name__": sheet.one["module"], "__file__": sheet.one["path"]}
    names["_detached"] = lambda x: x.detach()
    exec(compile(source, sheet.one["path"], "exec"), names)
    return sheet.mark([hidden.answer(names, call) for call in sheet.calls], None)


def points(rows):
    """The points of rows without their files, of 100."""
    return outputs.total([(None, *row) for row in rows])[0]


def visible_tests(student):
    """The visible tests of a handout in their own process -> (failed, passed, what is said)."""
    command = [sys.executable, "-m", "pytest", "-q", "-rN", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=student, capture_output=True, text=True)
    last = ran.stdout.strip().splitlines()[-1]
    counts = [re.search(rf"(\d+) {word}", last) for word in ("failed", "passed")]
    return *(int(found[1]) if found else 0 for found in counts), ran.stdout
