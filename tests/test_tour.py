"""docs/tour.py runs unchanged from any folder, and prints what its cells announce."""

import os
import re
import subprocess
import sys

import pytest

from lab.store import HERE


@pytest.mark.slow
def test_the_tour_runs_and_says_what_it_promises(tmp_path):
    environment = os.environ | {"NANOPREF_CACHE": str(tmp_path / "cache")}
    command = [sys.executable, os.path.join(HERE, "docs", "tour.py")]
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    assert "loss 0.6931, which is ln 2" in done.stdout
    chosen, rejected = map(
        float, re.search(r"chosen (\S+), rejected (\S+)\n", done.stdout).groups()
    )
    assert chosen > 0 > rejected
    rewards = re.findall(r"(dpo|changed): true reward (\S+) -> (\S+), KL (\S+)", done.stdout)
    assert [name for name, *_ in rewards] == ["dpo", "changed"]
    assert all(float(after) > float(before) for _, before, after, _ in rewards)
    assert (tmp_path / "tour.png").stat().st_size > 1000


@pytest.mark.slow
def test_the_cells_run_one_by_one_in_a_notebook(own_folder, capsys, monkeypatch):
    """A notebook has no __file__; it may start in the project's folder."""
    monkeypatch.syspath_prepend(HERE)
    with open(os.path.join(HERE, "docs", "tour.py"), encoding="utf-8") as file:
        _, *cells = file.read().split("\n# %%")
    names = {"__name__": "__main__"}
    for cell in cells:
        exec(compile("#" + cell, "cell", "exec"), names)
    assert len(cells) == 7 and "true reward by step: " in capsys.readouterr().out
    steps = [look["step"] for look in names["policy"].curve]
    assert steps[0] == 0 and steps[-1] == 200 and os.path.exists("tour.png")
