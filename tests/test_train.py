"""The command line: runs, files, bad input, interrupted runs. Small worlds and few steps; nothing is downloaded."""

import dataclasses
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time

import pytest
import torch

import methods.dpo
import train
from data import Batch, collate
from lab import Lab, Settings, align, evaluate, store
from lab import settings as settings_module
from nanomodel import GPT

TINY = [
    "--base_steps",
    "4",
    "--steps",
    "12",
    "--prompts",
    "24",
    "--batch_size",
    "8",
    "--eval_size",
    "8",
    "--max_response",
    "8",
]


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Lab, "memory", {})
    monkeypatch.chdir(tmp_path)


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


# ---------------------------------------------------------------- what a run writes and prints


def test_a_run_writes_what_it_says_and_nothing_half_written(tmp_path, capsys):
    out = tmp_path / "run"
    assert train.cli(["--method", "dpo", *TINY, "--out", str(out)]) == 0
    printed = capsys.readouterr()
    names = {
        "run.json",
        "metrics.jsonl",
        "summary.json",
        "samples.txt",
        "curves.png",
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    }
    assert names <= set(os.listdir(out))
    assert (
        not [n for n in os.listdir(out) if n.startswith(".writing")]
        and not (out / "stages").exists()
    )
    summary = json.loads((out / "summary.json").read_text())
    assert {"method", "world", "seed", "steps", "params", "seconds", "before", "after"} <= set(
        summary
    )
    assert set(summary["seconds"]) == {"base", "preferences", "align", "evaluate"}
    for side in ("before", "after"):
        assert {
            "reward",
            "win_rate",
            "kl",
            "accuracy",
            "length",
            "chosen_logp",
            "rejected_logp",
        } <= set(summary[side])
    assert (
        summary["before"]["kl"] == 0
        and summary["before"]["accuracy"] == 0.5
        and summary["before"]["win_rate"] == 0.5
    )
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {"loss", "margin", "accuracy", "chosen_logp", "rejected_logp", "grad_norm", "lr"} <= set(
        lines[0]
    )
    assert abs(lines[0]["loss"] - 0.693147) < 1e-5
    run = json.loads((out / "run.json").read_text())
    assert (
        run["settings"]["steps"] == 12
        and run["versions"]["torch"] == torch.__version__
        and "threads" in run["versions"]
    )
    for word in ("before", "after", "reward", "arXiv:2305.18290", "tokenizer", "written to"):
        assert word in printed.out
    assert "alignment" in printed.err and "left" in printed.err


def test_every_printed_command_is_one_that_is_understood():
    """Those of the README and of the docstrings; what stands behind two spaces explains them."""
    files = ["README.md", "train.py", *(f"methods/{name}.py" for name in settings_module.methods())]
    texts = [open(os.path.join(store.HERE, name), encoding="utf-8").read() for name in files]
    found = {
        line.strip()
        for text in texts
        for line in re.findall(r"python train\.py (--[^`\n{]*?)(?:  |`|\n)", text)
    }
    assert len(found) > 25
    for line in sorted(found):
        flags, owners = train.read_flags(shlex.split(line))
        assert flags and train.combinations(flags, owners), line


def test_the_same_command_gives_the_same_weights(tmp_path):
    for name in ("a", "b"):
        Lab.memory.clear()
        assert train.cli(["--method", "dpo", *TINY, "--out", name]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert train.cli(["--method", "dpo", *TINY, "--seed", "1", "--out", "c"]) == 0
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


def test_a_finished_run_is_a_checkpoint(tmp_path, capsys):
    assert train.cli(["--method", "dpo", *TINY, "--out", "a"]) == 0
    assert (
        train.cli(["--init", "a", "--prompt", "review of the camera :", "--max_response", "5"]) == 0
    )
    assert capsys.readouterr().out.strip()
    assert (
        train.cli(
            [
                "--method",
                "dpo",
                "--init",
                "a",
                "--steps",
                "0",
                "--eval_size",
                "8",
                "--prompts",
                "8",
                "--out",
                "b",
            ]
        )
        == 0
    )
    summary = json.loads((tmp_path / "b" / "summary.json").read_text())
    assert summary["after"]["kl"] == 0 and summary["after"]["reward"] == summary["before"]["reward"]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


def test_default_folders_are_numbered(tmp_path):
    for number in (1, 2):
        assert train.cli(["--method", "dpo", "--world", "bandit", "--steps", "2"]) == 0
        assert (tmp_path / "out" / f"dpo-bandit-{number}" / "summary.json").exists()


def test_a_sweep_runs_all_combinations(tmp_path, capsys):
    argv = [
        "--method",
        "dpo",
        "--world",
        "bandit",
        "--steps",
        "5",
        "--beta",
        "0.1,1",
        "--flip",
        "0,0.4",
        "--seeds",
        "2",
        "--out",
        "s",
    ]
    assert train.cli(argv) == 0
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert sorted((r["beta"], r["flip"], r["seed"]) for r in rows) == sorted(
        (b, f, s) for b in (0.1, 1) for f in (0, 0.4) for s in (0, 1)
    )
    assert (tmp_path / "s" / "sweep.png").exists() and "+-" in capsys.readouterr().out
    assert len({r["reward"] for r in rows}) == 8  # every setting changes the result


def test_defaults_of_a_method_apply_only_when_it_runs_alone():
    flags, owners = train.read_flags(["--method", "rdpo"])
    assert train.combinations(flags, owners)[0][1].flip == 0.3
    flags, owners = train.read_flags(["--method", "dpo,rdpo"])
    assert {run[1].flip for run in train.combinations(flags, owners)} == {0.0}
    flags, owners = train.read_flags(["--method", "rdpo", "--flip", "0.1"])
    assert train.combinations(flags, owners)[0][1].flip == 0.1


@pytest.mark.parametrize("method", ["did", "ld_dpo"])
def test_a_default_that_does_nothing_in_another_world_is_none(capsys, method):
    (run,) = train.combinations({"method": method, "world": "arithmetic"}, {})
    assert (
        run[1].label_temperature == Settings.label_temperature
        and run[1].length_bias == Settings.length_bias
    )
    assert train.combinations({"method": method}, {})[0][1] != dataclasses.replace(
        Settings(), world="reviews"
    )
    refused(capsys, ["--method", "ld_dpo", "--world", "bandit"], "needs a world of text")
    refused(
        capsys,
        ["--method", "did", "--world", "arithmetic", "--label_temperature", "0.5"],
        "would do nothing",
    )


def test_show_prints_a_row_and_trains_nothing(tmp_path, capsys):
    assert train.cli(["--method", "dpo", *TINY, "--show"]) == 0
    printed = capsys.readouterr().out
    assert "scored" in printed and "prompt" in printed
    assert not (tmp_path / "out").exists()


def test_list_and_help_name_every_method_flag_and_world(capsys):
    assert train.cli(["--list"]) == 0
    listed = capsys.readouterr().out
    assert train.cli(["--help"]) == 0
    helped = capsys.readouterr().out
    for name in train.methods() + train.worlds():
        assert name in listed
    for name, (_, _, text) in train.explanations(Settings).items():
        assert f"--{name}" in helped and text, f"{name} has no explanation"
    for name in train.methods():
        module = train.load_method(name)
        assert "arXiv:" in (module.__doc__ or "")
        for field, (_, _, text) in train.explanations(module.Config).items():
            assert f"--{field}" in helped and text, f"{name}.{field} has no explanation"
            assert field not in {*train.explanations(Settings), *train.ACTIONS}


# ---------------------------------------------------------------- interrupted runs


class Killed(BaseException):
    """Stands for a SIGKILL: nothing is saved on the way out."""


def killed_at(monkeypatch, call):
    """Make dpo's loss die at its n-th call."""
    calls, loss = [0], methods.dpo.loss

    def dying(*args):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return loss(*args)

    monkeypatch.setattr(methods.dpo, "loss", dying)
    return loss


@pytest.mark.parametrize("world", ["reviews", "bandit", "digits"])
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch, world):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)  # a checkpoint at every step
    monkeypatch.setattr(time, "time", lambda: 0.0)
    monkeypatch.setattr(
        "toy.digits.World.measure", lambda self, policy, lab: {}
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
        "--eval_size",
        "8",
    ]
    argv += [] if world == "bandit" else ["--base_steps", "2"]
    assert train.cli([*argv, "--out", "whole"]) == 0
    Lab.memory.clear()
    loss = killed_at(monkeypatch, 6)
    with pytest.raises(Killed):
        train.cli([*argv, "--out", "cut"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    Lab.memory.clear()
    assert train.cli(["--resume", "cut"]) == 0
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
        assert train.cli([*argv, f"whole-{name}"]) == 0
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
                train.cli([*argv, out])
            monkeypatch.setattr(GPT, name, method)
            Lab.memory.clear()
            assert train.cli(["--resume", out]) == 0
            assert weights(tmp_path / out) == weights(tmp_path / "whole-logps"), out
            for file in ("metrics.jsonl", "summary.json", "samples.txt"):
                assert (tmp_path / out / file).read_bytes() == (
                    tmp_path / "whole-logps" / file
                ).read_bytes(), (out, file)


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
    assert train.cli([*argv, "whole"]) == 0
    loss = killed_at(monkeypatch, 15)  # in the third of four runs
    with pytest.raises(Killed):
        train.cli([*argv, "cut"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    assert len(list((tmp_path / "cut").glob("*/summary.json"))) == 2
    assert train.cli(["--resume", "cut"]) == 0
    assert (tmp_path / "cut" / "sweep.json").read_bytes() == (
        tmp_path / "whole" / "sweep.json"
    ).read_bytes()


def test_a_killed_claim_goes_on(tmp_path, monkeypatch):
    def claim(lab):
        found = []
        for seed in lab.seeds:
            here = lab.at(seed=seed, world="bandit", steps=6)
            policy = here.base()
            here.align(
                policy, here.preferences(policy, k=2), methods.dpo.loss, methods.dpo.Config()
            )
            found.append(here.curve[-1])
        return [lab.compare("a claim", "reward", found, [0.0] * len(found))]

    monkeypatch.setattr(train, "load_claim", lambda name: claim)
    argv = ["--method", "dpo", "--claim", "--seeds", "3", "--out"]
    codes = [train.cli([*argv, "whole"])]
    loss = killed_at(monkeypatch, 9)  # at the second seed
    with pytest.raises(Killed):
        train.cli([*argv, "cut"])
    calls = [0]

    def counting(*args):
        calls[0] += 1
        return loss(*args)

    monkeypatch.setattr(methods.dpo, "loss", counting)
    codes.append(train.cli(["--resume", "cut"]))
    assert codes[0] == codes[1] and calls[0] == 12  # the first seed was not trained again
    whole, cut = (
        json.loads((tmp_path / n / "claim.json").read_text())[0]["ours"] for n in ("whole", "cut")
    )
    assert whole == cut and len(set(whole)) == 3


def test_the_claims_of_many_methods_go_on_after_a_failure_and_are_resumed(
    tmp_path, monkeypatch, capsys
):
    ran, made = [], {}
    monkeypatch.setattr(train, "load_claim", made.get)

    def claim(name, differ):
        def make(lab):
            ran.append(name)
            if name == "irpo" and len(ran) < 4:
                raise RuntimeError("no luck | at all")
            return [
                lab.compare("a claim", "reward", differ, [0.0] * 3, margin=0.5),
                lab.compare("a control", "kl", [0.0], [1.0], expected=False),
            ]

        made[name] = make

    claim("dpo", [1.0, 2.0, 3.0]), claim("irpo", [1.0, 1.0, 1.0]), claim("rdpo", [1.0, 2.0, 0.6])
    argv = ["--method", "dpo,irpo,rdpo", "--claim", "--seeds", "3"]
    assert train.cli([*argv, "--out", "all"]) == 1 and ran == ["dpo", "irpo", "rdpo"]
    out = capsys.readouterr().out
    assert (
        "[1/3] dpo: 1 of 1 expected claims hold, 1 more were not expected to" in out
        and "failed, see all/irpo/error.txt" in out
    )
    assert "no luck" in (tmp_path / "all" / "irpo" / "error.txt").read_text()
    assert (
        "a control" in (tmp_path / "all" / "dpo" / "claim.txt").read_text()
        and "a control" not in out
    )
    lines = json.loads((tmp_path / "all" / "claims.json").read_text())
    assert [c["paper"] for c in lines] == ["dpo", "dpo", "irpo", "rdpo", "rdpo"]
    assert [c["holds"] for c in lines] == [True, False, False, True, False]
    assert (
        lines[0]["difference"] == 2.0
        and lines[0]["command"] == "python train.py --method dpo --claim --seeds 3"
        and "commit" in lines[0]
    )
    markdown = (tmp_path / "all" / "claims.md").read_text()
    assert (
        "| a claim | reward | 2.000 | 0.000 | 2.000 [-0.484, 4.484] | 0.500 | yes | holds |"
        in markdown
    )
    assert (
        "| a control | kl | 0.000 | 1.000 | -1.000 | 0.000 | no | not reproduced here |" in markdown
        and "no luck / at all" in markdown
    )
    assert train.cli(["--resume", "all"]) == 0 and ran == ["dpo", "irpo", "rdpo", "irpo"]


def test_a_run_resumes_from_another_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows_file(tmp_path / "pairs.jsonl", PAIRS)
    loss = killed_at(monkeypatch, 2)
    with pytest.raises(Killed):
        train.cli(
            ["--method", "dpo", "--data", "pairs.jsonl", *TINY, "--context", "64", "--out", "run"]
        )
    monkeypatch.setattr(methods.dpo, "loss", loss)
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert train.cli(["--resume", str(tmp_path / "run")]) == 0


def rounds(lab, policy, log):
    def data(policy, round):
        log.append(round)
        return lab.preferences(policy, k=2, n=16)

    return lab.align(
        policy, data, methods.dpo.loss, methods.dpo.Config(), reference="round", every=4, steps=12
    )


@pytest.mark.parametrize("call", [3, 5, 8, 11])
def test_rounds_with_a_moving_reference_resume(tmp_path, monkeypatch, call):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    settings = Settings(
        world="reviews", base_steps=2, steps=12, batch_size=8, eval_size=8, max_response=6
    )
    whole = Lab(settings, str(tmp_path / "whole"), quiet=True)
    expected = rounds(whole, whole.base(), []).state_dict()
    loss = killed_at(monkeypatch, call)
    lab = Lab(settings, str(tmp_path / "cut"), quiet=True)
    with pytest.raises(Killed):
        rounds(lab, lab.base(), [])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    lab, log = Lab(settings, str(tmp_path / "cut"), quiet=True), []
    resumed = rounds(lab, lab.base(), log).state_dict()
    assert len(log) < 3
    assert all(torch.equal(expected[k], resumed[k]) for k in expected)


def test_two_fits_in_one_stage_do_not_share_a_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    die = [False]

    def work(lab):
        def loss(model, batch):
            if die[0] and len(seen) == 9:
                raise Killed
            seen.append(batch)
            return ((model.weight * batch) ** 2).sum(1), {}

        out, seen = {}, []
        for i in range(2):
            torch.manual_seed(i)
            model = lab.fit(
                torch.nn.Linear(2, 2, bias=False),
                [torch.tensor([1.0, 2.0]), torch.tensor([3.0, -1.0])],
                loss,
                steps=6,
                lr=0.1,
            )
            out[str(i)] = model.weight.detach().clone()
        return out

    def result(folder):
        lab = Lab(Settings(world="bandit"), str(tmp_path / folder), quiet=True)
        return lab.stage("both", lambda: work(lab))

    whole = result("whole")
    die[0] = True
    with pytest.raises(Killed):
        result("cut")
    die[0] = False
    cut = result("cut")
    assert all(torch.equal(whole[k], cut[k]) for k in whole)


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


# ---------------------------------------------------------------- bad input: one line, exit 2, nothing trained


def refused(capsys, argv, *words):
    capsys.readouterr()
    assert train.cli(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error, error


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


PAIRS = [
    {"prompt": f"question {i} ?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)
]


@pytest.mark.parametrize(
    "argv, words",
    [
        (["--method", "dqo"], ["unknown method 'dqo'", "dpo"]),
        (["--method", "dpo", "--world", "review"], ["unknown world 'review'", "reviews"]),
        (["--method", "dpo", "--bta", "1"], ["unknown flag '--bta'", "--beta"]),
        (["--method", "dpo", "beta"], ["'beta'"]),
        (["--method", "dpo", "--beta"], ["--beta needs a value"]),
        (["--method", "dpo", "--beta", "0"], ["beta"]),
        (["--method", "dpo", "--beta", "-1"], ["beta"]),
        (["--method", "dpo", "--beta", "much"], ["--beta much", "number"]),
        (["--method", "dpo", "--beta", "nan"], ["--beta nan"]),
        (["--method", "dpo", "--beta", "inf"], ["beta"]),
        (["--method", "dpo", "--steps", "1.5"], ["--steps 1.5", "whole number"]),
        (["--method", "dpo", "--steps", "-1"], ["--steps"]),
        (["--method", "dpo", "--batch_size", "0"], ["--batch_size"]),
        (["--method", "dpo", "--lr", "0"], ["--lr"]),
        (["--method", "dpo", "--flip", "1.5"], ["--flip"]),
        (["--method", "dpo", "--k", "1"], ["--k"]),
        (["--method", "dpo", "--dtype", "int8"], ["--dtype"]),
        (["--method", "dpo", "--seeds", "0"], ["--seeds"]),
        (["--method", "dpo", "--seed", "1", "--seed", "2"], ["twice"]),
        (["--method", "dpo", "--epsilon", "0.1"], ["--epsilon", "rdpo"]),
        (["--method", "disco", "--world", "digits"], ["disco", "digits"]),
        (["--method", "dpo", "--init", "nowhere"], ["nowhere", "not a checkpoint"]),
        (["--method", "dpo", "--device", "cuda:7"], ["--device cuda:7"]),
        (["--method", "dpo", "--data", "nothing.jsonl"], ["nothing.jsonl"]),
        (
            ["--method", "dpo", "--world", "digits", "--temperature", "0.5", "--base_steps", "0"],
            ["--temperature"],
        ),
        (["--method", "dpo", "--claim", "--lr", "0.1"], ["--claim"]),
        (["--method", "dpo", "--seed", "0,0"], ["--seed", "twice"]),
        (["--method", "dpo,dpo"], ["dpo,dpo", "twice"]),
        (["--method", "dpo", "--out", "/dev/null/run"], ["--out /dev/null/run"]),
        (["--method", "irpo", "--flip", "0.1"], ["--flip", "ranking"]),
        (["--method", "irpo", "--k", "30"], ["k=30", "20"]),
        (["--method", "disco", "--length_bias", "1"], ["--length_bias", "arithmetic"]),
        (["--method", "ddo", "--flip", "0.1"], ["--flip", "ddo"]),
        (["--resume", "nowhere"], ["nowhere"]),
        (["--seed", "1"], ["--method"]),
    ],
)
def test_bad_flags(tmp_path, capsys, argv, words):
    refused(capsys, argv, *words)
    assert not list(tmp_path.glob("out/*/metrics.jsonl"))


def test_no_traceback_from_the_shell(tmp_path):
    command = [sys.executable, os.path.join(store.HERE, "train.py"), "--method", "dpp"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    assert (
        done.returncode == 2
        and done.stderr.count("\n") == 1
        and "dpo" in done.stderr
        and not done.stdout
    )


@pytest.mark.parametrize(
    "text, words",
    [
        (b"", ["empty"]),
        (b"\x00\x01\xff\xfe binary", ["pairs.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "b"', ["pairs.jsonl:1"]),
        (b'{"prompt": "a", "chosen": "b"}\n', ["pairs.jsonl:1", "rejected"]),
        (b'{"prompt": "a", "chosen": "", "rejected": "c"}\n', ["pairs.jsonl:1", "chosen", "empty"]),
        (
            b'{"prompt": "a", "responses": ["b", "c"], "scores": [1, NaN]}\n',
            ["pairs.jsonl:1", "scores"],
        ),
        (b'{"prompt": "a", "responses": ["b", "c"], "scores": [1]}\n', ["pairs.jsonl:1", "scores"]),
    ],
)
def test_bad_files(tmp_path, capsys, text, words):
    (tmp_path / "pairs.jsonl").write_bytes(text)
    refused(capsys, ["--method", "dpo", "--data", "pairs.jsonl"], *words)
    assert not (tmp_path / "out").exists()


def test_files_a_method_cannot_use(tmp_path, capsys):
    path = rows_file(
        tmp_path / "labels.jsonl",
        [{"prompt": f"a {i}", "completion": "b", "label": True} for i in range(8)],
    )
    refused(capsys, ["--method", "dpo", "--data", path], "labels.jsonl", "pairs")
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    refused(capsys, ["--method", "disco", "--data", path], "disco", "verifier", "dpo")
    pairs = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    refused(capsys, ["--method", "did", "--data", pairs], "did needs a world with a reward", "dpo")
    refused(
        capsys, ["--method", "disco", "--data", pairs], "disco needs a world with a verifier", "dpo"
    )


def small(monkeypatch):
    """Bytes instead of GPT-2's tokens, so that a model on a file is tiny."""
    from data import Tokenizer

    monkeypatch.setattr(Tokenizer, "text", classmethod(lambda cls: cls.toy([], name="bytes")))


FILE = [
    "--base_steps",
    "2",
    "--steps",
    "3",
    "--batch_size",
    "4",
    "--eval_size",
    "4",
    "--max_response",
    "4",
]


def test_a_refused_run_leaves_no_folder(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "long.jsonl", [row | {"chosen": "yes " * 300} for row in PAIRS])
    refused(
        capsys, ["--method", "dpo", "--data", path, "--context", "64", "--out", "run"], "--truncate"
    )
    assert not (tmp_path / "run").exists()
    assert train.cli(["--method", "dpo", "--world", "bandit", "--steps", "2", "--out", "run"]) == 0
    before = (
        tmp_path / "run" / "summary.json"
    ).read_bytes()  # a refused run gives back what --overwrite would have emptied
    refused(
        capsys,
        ["--method", "dpo", "--data", path, "--context", "64", "--out", "run", "--overwrite"],
        "--truncate",
    )
    assert (
        train.cli(
            [
                "--method",
                "dpo",
                "--beta",
                "0.1,1",
                "--data",
                path,
                "--context",
                "64",
                "--out",
                "run",
                "--overwrite",
            ]
        )
        == 2
    )
    assert (tmp_path / "run" / "summary.json").read_bytes() == before and not list(
        tmp_path.glob("run.*")
    )


def test_a_prompt_longer_than_the_context(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(
        tmp_path / "pairs.jsonl", [PAIRS[i] | {"prompt": "long " * 20 + str(i)} for i in range(20)]
    )
    refused(
        capsys, ["--method", "dpo", "--data", path, "--context", "64", *FILE], "64", "--truncate"
    )
    assert (
        train.cli(
            [
                "--method",
                "dpo",
                "--data",
                path,
                "--context",
                "64",
                "--truncate",
                *FILE,
                "--out",
                "cut",
            ]
        )
        == 0
    )
    assert "cut to the context" in capsys.readouterr().out


def test_pairs_and_lists_from_files_run(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    assert train.cli(["--method", "dpo", "--data", path, *FILE, "--out", "a"]) == 0
    assert "no true reward" in capsys.readouterr().out
    summary = json.loads((tmp_path / "a" / "summary.json").read_text())
    assert "reward" not in summary["after"] and "win_rate" not in summary["after"]
    assert (
        0 <= summary["after"]["accuracy"] <= 1 and len(summary["after"]["accuracy_interval"]) == 2
    )
    lists = [
        {"prompt": f"question {i}", "responses": ["a", "bb", f"c{i}"], "scores": [0.1, 0.5, 1.0]}
        for i in range(20)
    ]
    path = rows_file(tmp_path / "lists.jsonl", lists)
    assert train.cli(["--method", "dpo", "--data", path, *FILE, "--out", "b"]) == 0
    assert train.cli(["--method", "irpo", "--data", path, *FILE, "--out", "c"]) == 0


def test_out_folders_are_not_overwritten(tmp_path, capsys):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("precious")
    refused(capsys, ["--method", "dpo", "--out", "mine"], "mine", "not empty")
    refused(
        capsys, ["--method", "dpo", "--out", "mine", "--overwrite"], "mine", "not look like a run"
    )
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "precious"
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2", "--out", "run"]
    assert train.cli(argv) == 0
    refused(capsys, argv, "run", "not empty")
    assert train.cli([*argv, "--overwrite"]) == 0
    refused(
        capsys, ["--method", "dpo", "--out", str(tmp_path / "mine" / "thesis.txt")], "is a file"
    )


def test_weights_that_do_not_fit(tmp_path, capsys):
    assert train.cli(["--method", "dpo", *TINY, "--out", "a"]) == 0
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    (tmp_path / "a" / "config.json").write_text(json.dumps(config | {"intermediate_size": 8}))
    capsys.readouterr()
    refused(capsys, ["--method", "dpo", "--init", "a"], "shape", "gate_proj")
    (tmp_path / "a" / "model.safetensors").write_bytes(b"not safetensors")
    refused(capsys, ["--method", "dpo", "--init", "a"], "model.safetensors")
    (tmp_path / "a" / "config.json").write_text("{")
    refused(capsys, ["--method", "dpo", "--init", "a"], "config.json")


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
    refused_error = train.cli(argv)
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert refused_error == 2 and "No space left" in error
    monkeypatch.setattr(store, "save_tensors", real)
    lab = Lab(Settings(world="bandit"), str(tmp_path / "run"))
    kept = [p for p in (tmp_path / "run" / "stages").glob("*checkpoint*.json")]
    assert (
        len(kept) == 1
        and store.load_value(str(kept[0])[:-5])["step"] == 3
        and lab.stage_number == 0
    )
    assert train.cli(["--resume", "run"]) == 0


def test_a_nan_stops_the_run_and_is_named(tmp_path, capsys, monkeypatch):
    loss = methods.dpo.loss

    def broken(logps, ref_logps, batch, cfg):
        losses, metrics = loss(logps, ref_logps, batch, cfg)
        calls[0] += 1
        return (losses * float("nan") if calls[0] == 7 else losses), metrics

    calls = [0]
    monkeypatch.setattr(methods.dpo, "loss", broken)
    assert train.cli(["--method", "dpo", "--world", "bandit", "--steps", "20", "--out", "run"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert (
        "loss" in error and "step 7" in error and "nan" in error and "checkpoint" not in error
    )  # there is none yet
    steps = [
        json.loads(line)["step"]
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    ]
    assert steps == [1, 2, 3, 4, 5, 6]
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    calls[0] = 0
    assert (
        train.cli(["--method", "dpo", "--world", "bandit", "--steps", "20", "--out", "kept"]) == 2
    )
    assert "The checkpoint of step 6 is kept in kept" in capsys.readouterr().err


def test_two_runs_share_a_cache(tmp_path):
    command = [
        sys.executable,
        os.path.join(store.HERE, "train.py"),
        "--method",
        "dpo",
        *TINY,
        "--out",
    ]
    environment = os.environ | {"NANOPREF_CACHE": str(tmp_path / "shared")}
    both = [
        subprocess.Popen([*command, name], cwd=tmp_path, env=environment, stdout=subprocess.DEVNULL)
        for name in ("a", "b")
    ]
    assert [process.wait(timeout=120) for process in both] == [0, 0]
    assert weights(tmp_path / "a") == weights(tmp_path / "b")


@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_the_kl_is_that_of_the_sampled_distributions(temperature):
    """Its mean over samples is that of the log-ratio of whole responses, of which it is the version with less noise."""
    lab = Lab(
        Settings(world="reviews", base_steps=30, temperature=temperature, max_response=6),
        quiet=True,
    )
    policy = lab.base()
    torch.manual_seed(0)
    with torch.no_grad():
        for p in policy.parameters():
            p += p.std() * torch.randn_like(p)
    rows = lab.encode(lab.sample(policy, lab.world.prompts(500, lab.rng("prompts")), 4))
    kl, ratio = evaluate.sequence_kl(lab, policy, lab.reference, rows), []
    for start in range(0, 500, 50):
        batch = collate(rows[start : start + 50], lab.world.tokenizer)
        with torch.no_grad():
            p, q = (
                (m.logits(batch) / temperature).log_softmax(-1).gather(-1, batch.target[..., None])
                for m in (policy, lab.reference)
            )
        ratio += ((p - q)[..., 0] * batch.mask).sum(-1).flatten().tolist()
    ratio, kl = torch.tensor(ratio), torch.tensor(kl)
    error = (ratio - kl).std() / len(kl) ** 0.5
    assert (
        kl.mean() > 10 * error and abs(ratio.mean() - kl.mean()) < 4 * error and (kl >= -1e-6).all()
    )


def test_the_log_compares_paths_of_a_tree_items_of_a_chain_and_members_of_a_list():
    """Row 0: steps 0 -> 1 and 0 -> 2 -> 3, so paths end at 1 and 3. Row 1: a chain. Row 2: a list whose last member is absent."""
    parents = torch.tensor([[-1, 0, 0, 2], [-1, 0, 1, 2], [-1, -1, -1, -1]])
    scores = torch.tensor([[9.0, 0.0, 9.0, 1.0], [3.0, 0.0, 1.0, 2.0], [1.0, 0.0, 2.0, 0.0]])
    mask = torch.ones(3, 4, 2, dtype=torch.bool)
    mask[2, 3] = False
    logps = (
        torch.tensor(
            [[-1.0, -2.0, -3.0, -4.0], [-5.0, -6.0, -7.0, -8.0], [-1.0, -2.0, -4.0, -9.0]]
        )[..., None].expand(3, 4, 2)
        / 2
    )
    ref_logps = (
        torch.tensor(
            [[-7.0, -2.5, -1.0, -1.0], [-5.0, -5.0, -5.0, -5.0], [-1.0, -5.0, -4.5, -5.0]]
        )[..., None].expand(3, 4, 2)
        / 2
    )
    assert evaluate.paths(logps.sum(-1), parents).tolist()[0] == [-1.0, -3.0, -4.0, -8.0]
    rows = [evaluate.answers({"parents": p.tolist()}, x.tolist()) for p, x in zip(parents, logps)]
    assert rows[0] == {1: -3.0, 3: -8.0} and rows[1] == {0: -5.0, 1: -6.0, 2: -7.0, 3: -8.0}
    assert evaluate.answers({}, logps[2].tolist()) == {0: -1.0, 1: -2.0, 2: -4.0, 3: -9.0}
    found = evaluate.common_metrics(logps, ref_logps, Batch(mask, scores, parents=parents))
    margins = [
        (-8.0 + 9.0) - (-3.0 + 9.5),
        0.0 - (-1.0),
        0.5 - 3.0,
    ]  # -5.5: the common step 0 cancels
    assert found["margin"].item() == pytest.approx(sum(margins) / 3) and found[
        "accuracy"
    ].item() == pytest.approx(1 / 3)
    assert found["chosen_logp"].item() == pytest.approx((-8.0 - 5.0 - 4.0) / 3)
    assert found["rejected_logp"].item() == pytest.approx((-3.0 - 6.0 - 2.0) / 3)


def test_reference_logps_of_fixed_rows_are_the_frozen_model_s(tmp_path):
    lab = Lab(
        Settings(
            world="reviews",
            base_steps=3,
            steps=4,
            batch_size=4,
            prompts=8,
            eval_size=4,
            max_response=6,
        ),
        quiet=True,
    )
    policy = lab.base()
    rows, start, seen = lab.preferences(policy, k=2), align.frozen(policy), []

    def loss(logps, ref_logps, batch, cfg):
        seen.append((start.logps(batch) - ref_logps).abs().max().item())
        return methods.dpo.loss(logps, ref_logps, batch, cfg)

    lab.align(policy, rows, loss, methods.dpo.Config())
    assert len(seen) == 4 and max(seen) < 1e-5
    with torch.no_grad():
        batch = collate(rows[:4], lab.world.tokenizer)
        assert (
            policy.logps(batch) - start.logps(batch)
        ).abs().max() > 1e-4  # the policy moved, the reference did not
