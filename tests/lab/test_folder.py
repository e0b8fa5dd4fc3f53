"""The folder of a run: replaced only by a run that has ended, resumed by one process at a time."""

import json
import os
import shutil

import pytest

import methods.dpo
import train
from lab import store
from tests.lab.commands import FILE, PAIRS, Killed, killed_at, refused, rows_file, small

pytestmark = pytest.mark.usefixtures("own_folder")

RUN = ["--method", "dpo", "--world", "bandit", "--steps", "4", "--out", "run"]


def files(path="run"):
    """{file: content} of a folder."""
    return {
        os.path.relpath(os.path.join(place, name), path): open(
            os.path.join(place, name), "rb"
        ).read()
        for place, _, names in os.walk(path)
        for name in names
    }


def raises(error):
    def loss(*about):
        raise error

    return loss


# ---------------------------------------------------------------- --overwrite


@pytest.fixture
def former():
    """A finished run in `run`, and its files."""
    assert train.main(RUN) == 0
    return files()


@pytest.mark.slow
@pytest.mark.parametrize("steps", ["3", "3,4"])
def test_a_run_that_diverges_gives_the_former_one_back(tmp_path, capsys, former, steps):
    argv = [*RUN[:4], "--steps", steps, "--out", "run", "--overwrite", "--lr", "1e300"]
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert "nan" in error and "run is the former run again" in error
    (failed,) = tmp_path.glob("run.*")
    assert failed.name in error and list(failed.rglob("metrics.jsonl"))
    assert files() == former


@pytest.mark.slow
@pytest.mark.parametrize("error", [ZeroDivisionError("a bug"), KeyboardInterrupt()])
def test_whatever_stops_a_run_the_former_one_is_not_lost(tmp_path, monkeypatch, former, error):
    monkeypatch.setattr(methods.dpo, "loss", raises(error))
    try:
        assert train.main([*RUN, "--overwrite"]) == 130
        (waiting,) = tmp_path.glob("run.replaced-*")
        assert files(waiting) == former
    except ZeroDivisionError:
        assert files() == former and not list(tmp_path.glob("run.*"))


@pytest.mark.slow
def test_a_cache_that_cannot_be_written_replaces_nothing(capsys, monkeypatch, former):
    monkeypatch.setattr(store, "CACHE", "/dev/null/cache")
    refused(capsys, [*RUN, "--overwrite"], "/dev/null/cache")
    assert files() == former


@pytest.mark.slow
def test_after_a_kill_the_next_command_says_where_the_former_run_is(
    tmp_path, capsys, monkeypatch, former
):
    loss = killed_at(monkeypatch, 3)
    with pytest.raises(Killed):
        train.main([*RUN, "--overwrite"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    (waiting,) = tmp_path.glob("run.replaced-*")
    assert files(waiting) == former
    for argv in (RUN, [*RUN, "--overwrite"]):
        refused(capsys, argv, str(waiting), "--resume run")
        assert files(waiting) == former
    assert train.main(["--resume", "run"]) == 0
    assert not list(tmp_path.glob("run.*"))
    assert train.main([*RUN, "--overwrite"]) == 0
    assert not list(tmp_path.glob("run.*"))


@pytest.mark.slow
def test_a_refused_run_leaves_no_folder_not_even_the_default_one(tmp_path, monkeypatch):
    monkeypatch.setattr(methods.dpo, "loss", raises(ZeroDivisionError("a bug")))
    with pytest.raises(ZeroDivisionError):
        train.main(RUN[:6])
    assert os.listdir(tmp_path) == ["cache"]


# ---------------------------------------------------------------- --resume


def kill(monkeypatch, argv):
    """Run a command that is killed in its second step."""
    loss = killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        train.main(argv)
    monkeypatch.setattr(methods.dpo, "loss", loss)


@pytest.fixture
def interrupted(tmp_path, monkeypatch):
    """The run.json of a killed run in `run`."""
    kill(monkeypatch, RUN)
    return json.loads((tmp_path / "run" / "run.json").read_text())


def test_a_file_that_has_changed_is_named(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    kill(monkeypatch, ["--method", "dpo", "--data", path, *FILE, "--context", "64", "--out", "run"])
    before = files()
    rows_file(tmp_path / "pairs.jsonl", [*PAIRS[:-1], PAIRS[-1] | {"chosen": "maybe"}])
    refused(capsys, ["--resume", "run"], "pairs.jsonl has changed")
    os.unlink(tmp_path / "pairs.jsonl")
    refused(capsys, ["--resume", "run"], "pairs.jsonl has changed")
    assert files() == before
    rows_file(tmp_path / "pairs.jsonl", PAIRS)
    assert train.main(["--resume", "run"]) == 0


@pytest.mark.slow
def test_a_second_resume_of_one_folder_is_refused(capsys, interrupted):
    before = files()
    with store.alone("run", wait=False):
        refused(capsys, ["--resume", "run"], "run is being written by another run")
        after = files()
    assert {name: after[name] for name in before} == before
    assert train.main(["--resume", "run"]) == 0


@pytest.mark.slow
@pytest.mark.parametrize(
    "changes, words",
    [
        (dict(flags=dict(steps="0.5")), ["--steps 0.5", "whole number"]),
        (dict(flags=dict(lr="-1")), ["--lr", "positive"]),
        (dict(flags=dict(nope="1")), ["unknown flag"]),
        (dict(flags={"\x1b[31mred": "1"}), ["unknown flag"]),
        (dict(flags=dict(method="xx")), ["unknown method"]),
        (dict(flags=dict(method=["dpo"])), ["unknown method"]),
        (dict(flags=dict(help="true")), ["run.json", "--help"]),
        (dict(flags=dict(list="true")), ["run.json", "--list"]),
        (dict(flags=dict(show="true")), ["run.json", "--show"]),
        (dict(flags=dict(resume="run")), ["run.json", "--resume"]),
        (dict(flags=dict(prompt="hi")), ["run.json", "--prompt"]),
        (dict(flags=dict(claim="true")), ["--claim"]),
        (dict(files={"pairs.jsonl": 1}), ["pairs.jsonl has changed"]),
        (dict(files={"\0": "1"}), ["has changed"]),
        (dict(files=[1]), ["not a run"]),
        (dict(versions=3), ["not a run"]),
    ],
)
def test_an_edited_run_json_is_checked_like_a_command_line(
    tmp_path, capsys, interrupted, changes, words
):
    for name, value in changes.items():
        interrupted[name] = interrupted[name] | value if isinstance(value, dict) else value
    (tmp_path / "run" / "run.json").write_text(json.dumps(interrupted))
    before = files()
    refused(capsys, ["--resume", "run"], *words)
    assert files() == before


@pytest.mark.parametrize("text", [b"", b"\xff", b"[]", b"null", b"[" * 100000, b'{"flags": 1}'])
def test_a_damaged_run_json_is_one_line(tmp_path, capsys, interrupted, text):
    (tmp_path / "run" / "run.json").write_bytes(text)
    refused(capsys, ["--resume", "run"], "run.json")
    shutil.rmtree("run")
    refused(capsys, ["--resume", "run"], "run is not a run")
