"""Values on disk: what was written comes back, or is made anew and that is said."""

import contextlib
import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

import train
from lab import Lab, Settings, store
from tests.lab.commands import refused

pytestmark = pytest.mark.usefixtures("own_folder")

VALUE = {"rows": [{"prompt": "a", "scores": [1.0, 0.1 + 0.2]}], "weights": torch.arange(96.0)}


@contextlib.contextmanager
def another_run():
    """Hold the cache as another process does that is using it."""
    fcntl = pytest.importorskip("fcntl")
    os.makedirs(store.CACHE, exist_ok=True)
    with open(os.path.join(store.CACHE, ".lock"), "ab") as file:
        fcntl.flock(file, fcntl.LOCK_SH)
        yield


def flipped(data):
    """The bytes with one bit changed near their end."""
    return data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]


DAMAGED = {
    "a flipped bit": flipped,
    "zeros in the last two thirds": lambda data: data[: len(data) // 3].ljust(len(data), b"\0"),
    "the end cut off": lambda data: data[:-7],
    "an empty file": lambda data: b"",
    "bytes that are not UTF-8": lambda data: b"\xff\xfe\x00",
    "a list": lambda data: b"[]",
    "null": lambda data: b"null",
    "deep nesting": lambda data: b"[" * 100000,
    "another value": lambda data: b'{"tensors": null, "value": []}',
    "a number where a name belongs": lambda data: b'{"tensors": 3, "value": 1}',
    "a changed digit": lambda data: data.replace(b"0.3", b"0.2"),
}


@pytest.mark.parametrize("ending", [".json", ".safetensors"])
@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_value_is_none_and_said_in_one_line(tmp_path, capsys, damage, ending):
    path = str(tmp_path / "value")
    store.save_value(path, VALUE)
    assert store.load_value(path)["rows"] == VALUE["rows"]
    assert torch.equal(store.load_value(path)["weights"], VALUE["weights"])
    (file,) = tmp_path.glob("value*" + ending)
    data = file.read_bytes()
    file.write_bytes(DAMAGED[damage](data))
    if file.read_bytes() == data:  # the tensors hold no such digit
        return
    capsys.readouterr()
    assert store.load_value(path) is None
    said = capsys.readouterr().err
    assert said == f"{path}.json is damaged: its value is made anew\n"
    store.save_value(path, VALUE)
    assert torch.equal(store.load_value(path)["weights"], VALUE["weights"])
    store.remove_value(path)
    assert not list(tmp_path.glob("*.json"))


def test_tensors_that_are_missing_make_a_value_damaged(tmp_path, capsys):
    path = str(tmp_path / "value")
    store.save_value(path, VALUE)
    os.unlink(next(tmp_path.glob("*.safetensors")))
    assert store.load_value(path) is None and "damaged" in capsys.readouterr().err
    assert store.load_value(str(tmp_path / "nothing")) is None
    assert not capsys.readouterr().err


@pytest.mark.slow
def test_a_base_model_that_is_damaged_in_the_cache_is_trained_again(tmp_path, capsys):
    def weights():
        Lab.memory.clear()
        lab = Lab(Settings(world="reviews", base_steps=2), quiet=True)
        return lab.base().state_dict()

    first = weights()
    for damage in ("zeros in the last two thirds", "a flipped bit"):
        (file,) = (tmp_path / "cache").glob("*.safetensors")
        file.write_bytes(DAMAGED[damage](file.read_bytes()))
        again = weights()
        assert all(torch.equal(first[name], again[name]) for name in first)
        assert "damaged" in capsys.readouterr().err


def test_a_cache_that_cannot_be_written_is_named_before_anything_is_trained(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(store, "CACHE", "/dev/null/cache")
    monkeypatch.setattr(Lab, "pretrain", None)  # it would be a traceback
    for argv in (["--method", "dpo", "--out", "run"], ["--prompt", "hi"]):
        refused(capsys, argv, "/dev/null/cache", "NANOPREF_CACHE")
    assert os.listdir(tmp_path) == []


@pytest.mark.slow
def test_what_killed_runs_left_half_written_goes_from_the_cache_and_the_folder(tmp_path):
    cache = tmp_path / "cache"
    cache.mkdir()
    old, new = cache / ".writing-old", cache / ".writing-new"
    old.write_text("half"), new.write_text("half")
    os.utime(old, (0, 0))
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2"]
    with another_run():  # a new file may be one that it is writing
        assert train.main([*argv, "--out", "other"]) == 0
        assert not old.exists() and new.exists()
    assert train.main([*argv, "--out", "run"]) == 0
    assert not new.exists()
    inside = tmp_path / "run" / "seed1" / "stages"
    inside.mkdir(parents=True)
    (inside / ".writing-x").write_text("half")
    assert train.main(["--resume", "run"]) == 0
    assert not (inside / ".writing-x").exists()


def test_tensors_that_a_kill_left_without_their_json_go_from_the_cache(tmp_path):
    """The next run removes them, unless another run is alive, which may be about to write it."""
    store.open_cache()
    whole, cut = (os.path.join(store.CACHE, name) for name in ("whole", "cut"))
    for path in (whole, cut):
        store.save_value(path, VALUE)
    os.unlink(cut + ".json")
    foreign = tmp_path / "cache" / "model.safetensors"  # not a name that is written here
    foreign.write_text("mine")
    with another_run():
        store.open_cache()
        assert len(list((tmp_path / "cache").glob("cut.*"))) == 1
    store.open_cache()
    assert not list((tmp_path / "cache").glob("cut.*")) and foreign.exists()
    assert torch.equal(store.load_value(whole)["weights"], VALUE["weights"])


def test_two_runs_use_the_cache_at_once(tmp_path):
    with another_run():
        store.open_cache()
        store.save_value(os.path.join(store.CACHE, "a"), VALUE)
        with another_run():
            assert store.load_value(os.path.join(store.CACHE, "a")) is not None


@pytest.mark.slow
def test_an_empty_name_of_the_cache_is_not_the_current_folder(tmp_path):
    code = "from lab import store; print(store.CACHE)"
    environment = os.environ | {"NANOPREF_CACHE": "", "PYTHONPATH": store.HERE}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.strip() == os.path.join(store.HERE, ".cache")


def test_json_without_a_number_is_null_and_the_file_is_whole(tmp_path):
    store.write_json(tmp_path / "a.json", {"x": float("nan"), "y": [float("inf"), 1]})
    assert json.loads((tmp_path / "a.json").read_text()) == {"x": None, "y": [None, 1]}


def test_the_commit_has_a_plus_where_code_differs_and_not_for_what_claims_write(
    tmp_path, monkeypatch
):
    def git(*words):
        about = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", *about, *words], cwd=tmp_path, check=True, capture_output=True)

    monkeypatch.setattr(store, "HERE", str(tmp_path))
    assert store.commit() == ""
    (tmp_path / "results").mkdir()
    for name in ("train.py", "README.md", "results/dpo.md"):
        (tmp_path / name).write_text("1")
    git("init")
    git("add", "-A")
    git("commit", "-m", "first")
    clean = store.commit()
    assert len(clean) >= 7 and "+" not in clean
    for name in ("README.md", "results/dpo.md"):
        (tmp_path / name).write_text("2")
    assert store.commit() == clean
    (tmp_path / "train.py").write_text("2")
    assert store.commit() == clean + "+"


def test_one_lock_has_one_holder_whoever_waits(tmp_path):
    """The holder removes the file; whoever waited for it must not lock what is gone."""
    inside, most = [], []

    def work():
        for _ in range(20):
            with store.alone(str(tmp_path / "value")):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.001)
                inside.pop()

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1} and len(most) == 80
    assert not list(tmp_path.glob("value*"))
