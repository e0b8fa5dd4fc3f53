"""`make gpu` works at a small scale on a CPU, and reports what fails."""

import json
import time

import pytest

from data import UserError
from lab.settings import pick_device
from tests import gpu


@pytest.mark.slow
def test_the_report_has_times_steps_tests_and_versions(tmp_path, monkeypatch):
    argv = ["--device", "cpu", "--small", "--out", str(tmp_path), "--seconds", "500"]
    runs = {"baseline": "sft", "images": "smpo --world digits"}
    monkeypatch.setattr(gpu, "families", lambda: runs)
    status = gpu.main(argv)
    report, page = json.loads((tmp_path / "report.json").read_text()), tmp_path / "report.md"
    assert status == 0, page.read_text()
    assert set(report["runs"]["default"]["parts"]) >= {"base", "align"}
    assert len(report["runs"]) == 3 and len(report["steps"]) == len(report["tests"]) == 1
    assert all(run["bench"]["step_s"] > 0 for run in report["steps"].values())
    assert report["versions"]["torch"] in page.read_text() and "FAILED" not in page.read_text()


@pytest.mark.slow
def test_a_failure_or_a_lack_of_time_is_in_the_report():
    found = gpu.call(["train.py", "--method", "nonsense"], time.time() + 100, "cpu")
    assert not found["ok"] and "nonsense" in found["error"]
    slow = gpu.call(["-c", "import time; time.sleep(60)"], time.time(), "cpu", threads=1)
    assert not slow["ok"] and slow["seconds"] < 30 and "no time left" in slow["error"]
    bad = {"versions": {}, "runs": {"default": found}, "steps": {"shape": slow}, "tests": {}}
    assert gpu.page(bad).count("FAILED") == 2 and "no time left" in gpu.page(bad)


def test_every_family_has_a_run():
    found = gpu.families()
    assert {"pairs", "lists", "online", "images", "baseline", "beyond"} <= set(found)
    assert found["online"] == "disco" and found["online on images"] == "d3po"


def test_auto_is_the_device_of_the_environment(monkeypatch):
    monkeypatch.setenv("NANOPREF_DEVICE", "cpu")
    assert pick_device("auto").type == "cpu"
    monkeypatch.setenv("NANOPREF_DEVICE", "tpu")
    with pytest.raises(UserError, match="--device tpu is not available"):
        pick_device("auto")
