"""A run and a sweep: what they write and print; the same command gives the same results."""

import errno
import json
import math
import os
import subprocess
import sys

import pytest
import torch

import methods.dpo
import train
from data import UserError
from lab import Lab, Settings, report, store
from tests.lab.commands import FILE, PAIRS, TINY, rows_file, small, weights

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_run_writes_what_it_says_and_nothing_half_written(tmp_path, capsys, pictures):
    out = tmp_path / "run"
    assert train.main(["--method", "dpo", *TINY, "--eval_every", "1", "--out", str(out)]) == 0
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
    looks = [line for line in lines if "loss" not in line]
    assert [look["step"] for look in looks] == list(range(13))
    for name in ("reward", "win_rate", "kl", "length", "diversity"):  # one evaluation behind both
        assert looks[0][name] == summary["before"][name], name
        assert looks[-1][name] == summary["after"][name], name
    assert [best["n"] for best in summary["best_of"]] == [2, 4, 8, 16]
    lines = [line for line in lines if "loss" in line]
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


@pytest.mark.slow
def test_the_same_command_gives_the_same_weights(tmp_path):
    for name in ("a", "b"):
        Lab.memory.clear()
        assert train.main(["--method", "dpo", *TINY, "--out", name]) == 0
    assert weights(tmp_path / "a") == weights(tmp_path / "b")
    assert train.main(["--method", "dpo", *TINY, "--seed", "1", "--out", "c"]) == 0
    assert weights(tmp_path / "a") != weights(tmp_path / "c")


@pytest.mark.slow
def test_a_finished_run_is_a_checkpoint(tmp_path, capsys):
    assert train.main(["--method", "dpo", *TINY, "--out", "a"]) == 0
    assert (
        train.main(["--init", "a", "--prompt", "review of the camera :", "--max_response", "5"])
        == 0
    )
    assert capsys.readouterr().out.strip()
    assert (
        train.main(
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


@pytest.mark.slow
def test_default_folders_are_numbered(tmp_path):
    for number in (1, 2):
        assert train.main(["--method", "dpo", "--world", "bandit", "--steps", "2"]) == 0
        assert (tmp_path / "out" / f"dpo-bandit-{number}" / "summary.json").exists()


@pytest.mark.slow
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
    assert train.main(argv) == 0
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert sorted((r["beta"], r["flip"], r["seed"]) for r in rows) == sorted(
        (b, f, s) for b in (0.1, 1) for f in (0, 0.4) for s in (0, 1)
    )
    assert (tmp_path / "s" / "sweep.png").exists() and "+-" in capsys.readouterr().out
    assert len({r["reward"] for r in rows}) == 8  # every setting changes the result


@pytest.mark.parametrize("world, dtype", [("bandit", "float32"), ("reviews", "bfloat16")])
def test_the_header_names_the_numbers_that_are_computed_with(world, dtype):
    lab = Lab(Settings(world=world, dtype="bfloat16", device="cpu"), quiet=True)
    assert f"cpu, {dtype}" in report.header(lab, "dpo", None, None, lab.base("raw"))


@pytest.mark.slow
def test_a_sweep_goes_on_after_a_run_that_fails(tmp_path, capsys, monkeypatch):
    """NaNs and errors of the method are named with their combination; a full disk ends all."""
    loss = methods.dpo.loss

    def failing(logps, ref_logps, batch, cfg):
        if cfg.beta == 0.2:
            raise UserError("a row that cannot be used")
        if cfg.beta == 0.5:
            raise IndexError("a slip of the method")
        if cfg.beta == 0.7:
            open(tmp_path / "nothing.txt")
        if cfg.beta == 0.6:
            raise OSError(errno.ENOSPC, "the disk is full")
        losses, metrics = loss(logps, ref_logps, batch, cfg)
        return losses * (math.nan if cfg.beta == 0.3 and calls.append(0) is None else 1), metrics

    calls = []
    monkeypatch.setattr(methods.dpo, "loss", failing)
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "3", "--out", "s"]
    assert train.main([*argv, "--beta", "0.1,0.2,0.3,0.4"]) == 2
    lines = capsys.readouterr().err.strip().splitlines()
    assert any(line.startswith("beta 0.2: a row") for line in lines)
    assert lines[-1].startswith("train.py: 2 of 4 runs failed: beta 0.2: a row")
    assert "beta 0.3" in lines[-1]
    rows = json.loads((tmp_path / "s" / "sweep.json").read_text())
    assert [row["beta"] for row in rows] == [0.1, 0.4]
    assert not list((tmp_path / "s").glob("*beta0.2"))
    assert train.main([*argv, "--beta", "0.1,0.5,0.4", "--overwrite"]) == 2
    error = capsys.readouterr().err
    assert "Traceback" in error and error.count("IndexError: a slip of the method") == 3
    assert error.strip().endswith("1 of 3 runs failed: beta 0.5: IndexError: a slip of the method")
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())) == 2
    assert train.main([*argv, "--beta", "0.1,0.7,0.4", "--overwrite"]) == 2
    assert "FileNotFoundError" in capsys.readouterr().err.strip().splitlines()[-1]
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())) == 2
    assert train.main([*argv[:-1], "full", "--beta", "0.1,0.6,0.4"]) == 2
    (line,) = capsys.readouterr().err.strip().splitlines()[-1:]
    assert "the disk is full" in line and line.endswith("train.py --resume full")
    assert len(list((tmp_path / "full").glob("*/summary.json"))) == 1
    assert train.main([*argv, "--beta", "0.2", "--seeds", "2", "--overwrite"]) == 2
    assert len(json.loads((tmp_path / "s" / "sweep.json").read_text())) == 2  # given back
    assert not list(tmp_path.glob("s.*"))


@pytest.mark.slow
def test_show_prints_a_row_and_trains_nothing(tmp_path, capsys):
    assert train.main(["--method", "dpo", *TINY, "--show"]) == 0
    printed = capsys.readouterr().out
    assert "scored" in printed and "prompt" in printed
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_pairs_and_lists_from_files_run(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    assert train.main(["--method", "dpo", "--data", path, *FILE, "--out", "a"]) == 0
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
    assert train.main(["--method", "dpo", "--data", path, *FILE, "--out", "b"]) == 0
    assert train.main(["--method", "irpo", "--data", path, *FILE, "--out", "c"]) == 0


@pytest.mark.slow
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


@pytest.mark.slow
def test_a_reader_that_stops_early_is_no_mistake(tmp_path):
    command = f"{sys.executable} {store.HERE}/train.py --list | head -n 1"
    done = subprocess.run(command, shell=True, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and done.stderr == ""


def test_a_sweep_over_a_field_of_one_method_alone_has_its_table(capsys):
    argv = ["--method", "dpo,rdpo", "--epsilon", "0.1,0.2", "--world", "bandit"]
    assert train.main([*argv, "--steps", "2", "--prompts", "64", "--out", "s"]) == 0
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split()[:2] for line in lines if line.startswith(("dpo", "rdpo"))]
    assert ["dpo", "-"] in cells and ["rdpo", "0.1"] in cells and ["rdpo", "0.2"] in cells
