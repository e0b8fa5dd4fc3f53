"""Interrupted runs continue bit for bit, or say in one line why they cannot."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

import methods.dpo
import train
from data import StopTraining, UserError
from lab import Lab, Settings, store
from nanomodel import GPT
from tests.lab.commands import PAIRS, TINY, Killed, killed_at, refused, rows_file, weights

pytestmark = pytest.mark.usefixtures("own_folder")


@pytest.mark.slow
@pytest.mark.parametrize("world", ["reviews", "bandit", "digits"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, world):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)  # a checkpoint at every step
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(
        "toy.digits.World.measure", lambda self, policy, lab: {"frechet": 1.0}
    )  # 1,797 samples a look, tested elsewhere
    argv = [
        "--method",
        "dpo",
        "--world",
        world,
        "--steps",
        "9",
        "--prompts",
        "24",
        "--batch_size",
        "8",
    ]
    argv += [] if world == "bandit" else ["--base_steps", "2", "--eval_size", "8"]
    assert train.main([*argv, "--out", "whole"]) == 0
    Lab.memory.clear()
    loss = killed_at(monkeypatch, 6)
    with pytest.raises(Killed):
        train.main([*argv, "--out", "cut"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    Lab.memory.clear()
    assert train.main(["--resume", "cut"]) == 0
    whole, cut = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "cut"))
    assert (
        whole["after"] == cut["after"] and whole["before"] == cut["before"]
    )  # the reference is the model before alignment
    assert (tmp_path / "whole" / "metrics.jsonl").read_bytes() == (
        tmp_path / "cut" / "metrics.jsonl"
    ).read_bytes()
    if world != "bandit":
        assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


def counted(monkeypatch, name, call=None):
    """Count the calls of a GPT method, and die at one of them."""
    calls, method = [0], getattr(GPT, name)

    def counting(*args, **kwargs):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return method(*args, **kwargs)

    monkeypatch.setattr(GPT, name, counting)
    return calls, method


@pytest.mark.slow
def test_a_run_killed_at_any_moment_resumes(tmp_path, monkeypatch):
    """In base training, in sampling, in scoring, in an evaluation: wherever the model is used."""
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    argv = [
        "--method",
        "dpo",
        "--steps",
        "4",
        "--prompts",
        "16",
        "--batch_size",
        "8",
        "--eval_size",
        "4",
        "--base_steps",
        "5",
    ]
    argv += ["--max_response", "6", "--out"]
    moments = {}
    for name in ("logps", "decode"):
        calls, method = counted(monkeypatch, name)
        Lab.memory.clear()
        monkeypatch.setattr(store, "CACHE", str(tmp_path / f"cache-{name}"))
        assert train.main([*argv, f"whole-{name}"]) == 0
        monkeypatch.setattr(GPT, name, method)
        moments[name] = sorted({3, calls[0] // 2, calls[0]})
    assert weights(tmp_path / "whole-logps") == weights(tmp_path / "whole-decode")
    for name, calls in moments.items():
        for call in calls:
            out = f"cut-{name}-{call}"
            monkeypatch.setattr(store, "CACHE", str(tmp_path / f"cache-{out}"))
            Lab.memory.clear()
            _, method = counted(monkeypatch, name, call)
            with pytest.raises(Killed):
                train.main([*argv, out])
            monkeypatch.setattr(GPT, name, method)
            Lab.memory.clear()
            assert train.main(["--resume", out]) == 0
            assert weights(tmp_path / out) == weights(tmp_path / "whole-logps"), out
            for file in ("metrics.jsonl", "summary.json", "samples.txt"):
                assert (tmp_path / out / file).read_bytes() == (
                    tmp_path / "whole-logps" / file
                ).read_bytes(), (out, file)


@pytest.mark.slow
def test_a_killed_sweep_goes_on(tmp_path, monkeypatch):
    argv = [
        "--method",
        "dpo",
        "--world",
        "bandit",
        "--steps",
        "6",
        "--flip",
        "0,0.3",
        "--seeds",
        "2",
        "--out",
    ]
    assert train.main([*argv, "whole"]) == 0
    loss = killed_at(monkeypatch, 15)  # in the third of four runs
    with pytest.raises(Killed):
        train.main([*argv, "cut"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    assert len(list((tmp_path / "cut").glob("*/summary.json"))) == 2
    assert train.main(["--resume", "cut"]) == 0
    assert (tmp_path / "cut" / "sweep.json").read_bytes() == (
        tmp_path / "whole" / "sweep.json"
    ).read_bytes()


@pytest.mark.slow
def test_a_run_resumes_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "pairs.jsonl", PAIRS)
    loss = killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        train.main(
            ["--method", "dpo", "--data", "pairs.jsonl", *TINY, "--context", "64", "--out", "run"]
        )
    monkeypatch.setattr(methods.dpo, "loss", loss)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.main(["--resume", str(tmp_path / "run")]) == 0


def rounds(lab, policy, log, **how):
    def data(policy, round):
        log.append(round)
        return lab.preferences(policy, k=2, n=16)

    return lab.align(policy, data, methods.dpo.loss, methods.dpo.Config(), every=4, steps=12, **how)


@pytest.mark.slow
@pytest.mark.parametrize("call", [3, 5, 8, 11])
@pytest.mark.parametrize(
    "how", [dict(reference="round"), dict(reference="average", decay=0.8)], ids=["round", "average"]
)
def test_rounds_with_a_moving_reference_resume(tmp_path, monkeypatch, call, how):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    settings = Settings(
        world="reviews", base_steps=2, steps=12, batch_size=8, eval_size=8, max_response=6
    )
    whole = Lab(settings, str(tmp_path / "whole"), quiet=True)
    expected = rounds(whole, whole.base(), [], **how).state_dict()
    loss = killed_at(monkeypatch, call)
    lab = Lab(settings, str(tmp_path / "cut"), quiet=True)
    with pytest.raises(Killed):
        rounds(lab, lab.base(), [], **how)
    monkeypatch.setattr(methods.dpo, "loss", loss)
    lab, log = Lab(settings, str(tmp_path / "cut"), quiet=True), []
    resumed = rounds(lab, lab.base(), log, **how).state_dict()
    assert len(log) < 3
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


@pytest.mark.slow
@pytest.mark.parametrize("how", [dict(reference="round"), dict(reference="average", decay=0.8)])
def test_a_checkpoint_with_lora_holds_no_frozen_weights(tmp_path, monkeypatch, how):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    small = dict(world="reviews", base_steps=2, batch_size=8, eval_size=8, max_response=6, lora=2)
    loss = killed_at(monkeypatch, 6)
    lab = Lab(Settings(steps=12, **small), str(tmp_path / "cut"), quiet=True)
    policy = lab.base()
    with pytest.raises(Killed):
        rounds(lab, policy, [], **how)
    monkeypatch.setattr(methods.dpo, "loss", loss)
    size = sum(p.stat().st_size for p in (tmp_path / "cut" / "stages").glob("*.safetensors"))
    trained = sum(p.numel() for p in policy.parameters() if p.requires_grad)
    assert 4 * 4 * trained < size < 0.5 * 4 * sum(p.numel() for p in policy.parameters())


def two_fits(lab, die_at=None, cached=False, record=True):
    """Train two models in one stage, and die in this call of the loss -> their weights, calls."""
    calls = []

    def loss(model, batch):
        if len(calls) == die_at:
            raise Killed
        calls.append(batch)
        return ((model.weight * batch) ** 2).sum(1), {}

    def train(i, record=True):
        torch.manual_seed(i)
        model = torch.nn.Linear(2, 2, bias=False)
        batches = [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])]
        lab.fit(model, batches, loss, steps=6, lr=0.1, record=record)
        return model.weight.detach().clone()

    def work():
        make = lambda: train(0, record)  # noqa: E731
        first = lab.cached(["first", lab.out], make) if cached else make()
        return {"0": first, "1": train(1)}

    return lab.stage("both", work), len(calls)


@pytest.mark.parametrize("cached", [False, True])
@pytest.mark.parametrize("pause", [0.0, 1e9])
def test_two_fits_in_one_stage_resume_each_for_itself(tmp_path, monkeypatch, cached, pause):
    monkeypatch.setattr(Lab, "checkpoint_every", pause)
    monkeypatch.setattr(time, "time", lambda: 0.0)

    def run(folder, die_at=None):
        out = tmp_path / folder
        lab = Lab(Settings(world="bandit"), str(out), quiet=True)
        found = two_fits(lab, die_at, cached)
        assert [p.name for p in (out / "stages").iterdir() if "checkpoint" in p.name] == []
        return *found, (out / "metrics.jsonl").read_text()

    whole, calls, lines = run("whole")
    assert calls == 12 and lines.count("\n") == 12
    for die_at in range(12):
        folder = f"cut{die_at}"
        with pytest.raises(Killed):
            run(folder, die_at)
        Lab.memory.clear()
        cut, calls, again = run(folder)
        begun = die_at if pause == 0.0 else die_at // 6 * 6  # the first step that is repeated
        assert calls == 12 - begun, die_at
        assert all(torch.equal(whole[k], cut[k]) for k in whole), die_at
        # without a checkpoint, the lines are those of a run that finds the first in the cache
        skipped = 6 if cached and begun == 6 else 0
        assert again.splitlines() == lines.splitlines()[skipped:], die_at


def test_a_damaged_checkpoint_of_the_first_of_two_fits_repeats_both(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    settings, out = Settings(world="bandit"), tmp_path / "cut"
    whole, _ = two_fits(Lab(settings, str(tmp_path / "whole"), quiet=True))
    with pytest.raises(Killed):
        two_fits(Lab(settings, str(out), quiet=True), 9)
    (out / "stages" / "001-both-checkpoint-1.json").write_text("{}")
    cut, calls = two_fits(Lab(settings, str(out), quiet=True))
    assert "is damaged" in capsys.readouterr().err
    assert calls == 12 and all(torch.equal(whole[k], cut[k]) for k in whole)
    expected = (tmp_path / "whole" / "metrics.jsonl").read_text()
    assert (out / "metrics.jsonl").read_text() == expected


def test_lost_lines_before_the_first_recorded_fit_of_a_stage_are_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    settings, out = Settings(world="bandit"), tmp_path / "cut"
    with pytest.raises(Killed):
        two_fits(Lab(settings, str(out), quiet=True), 9, record=False)
    os.truncate(out / "metrics.jsonl", 0)
    with pytest.raises(UserError, match="metrics.jsonl is damaged: it is shorter"):
        two_fits(Lab(settings, str(out), quiet=True), record=False)


def test_a_resumed_run_says_why_a_training_of_a_finished_stage_stopped(tmp_path):
    def run():
        lab = Lab(Settings(world="bandit"), str(tmp_path), quiet=True)

        def batch(step):
            raise StopTraining("there is nothing to learn")

        def work():
            model = torch.nn.Linear(2, 2)
            return lab.fit(model, batch, None, steps=6).weight.detach().clone()

        lab.stage("work", work)
        return lab.stopped

    assert run() == run() == "stopped after step 0: there is nothing to learn"


def test_a_checkpoint_of_an_earlier_version_is_refused_in_one_line(tmp_path, monkeypatch, capsys):
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "9", "--out", "run"]
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    with monkeypatch.context() as patch, pytest.raises(Killed):
        killed_at(patch, 5)
        train.main(argv)
    (path,) = (tmp_path / "run" / "stages").glob("*checkpoint-1.json")
    place = str(path).removesuffix(".json")
    value = store.load_value(place)
    del value["ended"]
    store.save_value(place, value)
    words = "was written by an earlier version of nanopref, and only that version can resume it"
    refused(capsys, ["--resume", "run"], words)
    assert "ended" not in store.load_value(place)


@pytest.mark.slow
def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path):
    command = [
        sys.executable,
        os.path.join(store.HERE, "train.py"),
        "--method",
        "dpo",
        "--world",
        "bandit",
    ]
    command += ["--steps", "100000", "--out", "run"]
    process = subprocess.Popen(
        command, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=tmp_path
    )
    deadline = time.time() + 60
    while time.time() < deadline and not (tmp_path / "run" / "metrics.jsonl").exists():
        time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=60)
    assert (
        process.returncode == 130
        and "python train.py --resume run" in error
        and "Traceback" not in error
    )
    assert list((tmp_path / "run" / "stages").glob("*checkpoint*.json"))


@pytest.mark.slow
def test_a_full_disk_is_one_line_and_the_last_checkpoint_survives(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    real, calls = store.save_tensors, [0]

    def full(path, tensors, metadata=None):
        if "stages" in path and "checkpoint" in path:
            calls[0] += 1
            if calls[0] == 4:
                raise OSError(28, "No space left on device", path)
        return real(path, tensors, metadata)

    monkeypatch.setattr(store, "save_tensors", full)
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "6", "--out", "run"]
    refused_error = train.main(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert refused_error == 2 and "No space left" in error
    monkeypatch.setattr(store, "save_tensors", real)
    lab = Lab(Settings(world="bandit"), str(tmp_path / "run"))
    kept = [p for p in (tmp_path / "run" / "stages").glob("*checkpoint*.json")]
    assert len(kept) == 1 and store.load_value(str(kept[0])[:-5])["step"] == 3 and lab.stages == 0
    assert train.main(["--resume", "run"]) == 0


def test_a_nan_stops_the_run_and_is_named(tmp_path, capsys, monkeypatch):
    loss = methods.dpo.loss

    def broken(logps, ref_logps, batch, cfg):
        losses, metrics = loss(logps, ref_logps, batch, cfg)
        calls[0] += 1
        return (losses * float("nan") if calls[0] == 7 else losses), metrics

    calls = [0]
    monkeypatch.setattr(methods.dpo, "loss", broken)
    assert (
        train.main(["--method", "dpo", "--world", "bandit", "--steps", "20", "--out", "run"]) == 2
    )
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "loss" in error and "step 7" in error and "nan" in error and "checkpoint" not in error
    )  # there is none yet
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
        if "loss" in json.loads(line)
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    calls[0] = 0
    assert (
        train.main(["--method", "dpo", "--world", "bandit", "--steps", "20", "--out", "kept"]) == 2
    )
    assert "The checkpoint of step 6 is kept in kept" in capsys.readouterr().err
