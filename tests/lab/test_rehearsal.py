"""What is refused before anything is trained: no base model, no folder, one line."""

import os
from types import SimpleNamespace

import pytest
import torch

import train
from data import UserError
from lab import Lab, Settings, flags
from lab.rehearsal import rehearse
from lab.settings import make_world
from tests.lab.commands import FILE, PAIRS, TINY, refused, rows_file, small

pytestmark = pytest.mark.usefixtures("own_folder")

LISTS = [
    {"prompt": f"q {i}", "responses": ["a", "bb", "ccc"], "scores": [1, 2, 3]} for i in range(12)
]

TREES = [row | {"prompt": f"tree {i}", "parents": [-1, 0, 0]} for i, row in enumerate(LISTS)]


@pytest.fixture
def untrained(monkeypatch):
    """No base model can be trained: that would be a traceback."""
    small(monkeypatch)
    monkeypatch.setattr(Lab, "pretrain", None)


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, words",
    [
        ("--method did --k 2", ["--k 2", "3"]),
        ("--method adpo --target given", ["given", "--data", "column q"]),
        ("--method adpo --anchor round --rounds 300 --steps 5", ["rounds = 300", "5 steps"]),
        ("--method tpo --flip 0.2", ["--flip 0.2", "arithmetic"]),
        ("--method curry_dpo --k 5", ["rounds = 3", "5 responses"]),
        ("--method curry_dpo --steps 2", ["--steps 2", "rounds = 3"]),
        ("--method curry_dpo --k 4,5", ["k 5: rounds = 3"]),
        ("--method ddo --world reviews --p_mean 0.1 --p_std 1", ["p_mean", "reviews"]),
        ("--method dpo --warmup 30 --steps 100", ["--warmup 30", "20 of 100"]),
        ("--method dpo --show --steps 0", ["--steps 0", "--show"]),
    ],
)
def test_settings_that_a_method_cannot_use(tmp_path, capsys, untrained, argv, words):
    refused(capsys, argv.split(), *words)
    assert os.listdir(tmp_path) in ([], ["cache"])


@pytest.mark.slow
@pytest.mark.parametrize(
    "argv, rows, words",
    [
        ("--method curry_dpo", LISTS, ["rounds = 3", "3 responses"]),
        (
            "--method irpo",
            [*LISTS[1:], LISTS[0] | {"scores": [1, 2, 500]}],
            ["rows.jsonl:12: ", "500", "scores"],
        ),
        (
            "--method irpo",
            [LISTS[0] | {"scores": [1, 2, -1]}, *LISTS[1:]],
            ["rows.jsonl:1: ", "-1", "scores"],
        ),
        *(
            (
                f"--method {name}",
                [*LISTS, *TREES],
                ["rows.jsonl:", "continue each other"],
            )
            for name in ("dpo", "rlhf", "madpo", "da_dpo")
        ),
        ("--method insights --scenario instruct", PAIRS, ["scenario = instruct"]),
        ("--method dpo", [*PAIRS[1:], PAIRS[0] | {"chosen": "yes " * 300}], ["rows.jsonl:20: "]),
        ("--method dpo", [PAIRS[0] | {"prompt": "yes " * 300}, *PAIRS[1:]], ["rows.jsonl:1: "]),
        (
            "--method adpo --target given",
            [row | {"q": [0.7, 0.7, 0.0]} for row in LISTS],
            ["rows.jsonl:1: column 'q' sums to 1.4"],
        ),
        (
            "--method dpo",
            [*PAIRS, PAIRS[0] | {"prompt": [1], "chosen": [2, 999999], "rejected": [3]}],
            ["rows.jsonl:21: column 'chosen' holds 999999"],
        ),
    ],
)
def test_rows_that_a_method_cannot_use(tmp_path, capsys, untrained, argv, rows, words):
    """Every row is checked, also those that a few steps never visit."""
    path = rows_file(tmp_path / "rows.jsonl", rows)
    refused(capsys, [*argv.split(), "--data", path, "--context", "64"], *words)
    assert set(os.listdir(tmp_path)) <= {"cache", "rows.jsonl"}


@pytest.mark.parametrize(
    ("variant", "world"), [("odpo", "arithmetic"), ("r_dpo", "bandit"), ("ld_dpo", "bandit")]
)
def test_a_weight_that_does_nothing_is_refused_without_a_base_model(
    tmp_path, capsys, untrained, variant, world
):
    argv = ["--method", "survey", "--variant", variant, "--world", world, "--prompts", "8"]
    refused(capsys, argv, f"alpha does nothing under {variant}")
    assert set(os.listdir(tmp_path)) <= {"cache"}


@pytest.mark.parametrize(
    "method, flags",
    [
        ("dstc", ("flip", "label_temperature", "length_bias")),
        ("more_is_less", ("flip", "label_temperature", "length_bias")),
        ("ofs_dpo", ("ema", "compile")),
        ("llava_mod", ("lora",)),
        ("dct_adamw", ("prompts", "max_response", "eval_size", "base_steps", "ema", "compile")),
        ("dct_adamw", ("dtype",)),
        ("krr_st", ("eval_every",)),
    ],
)
def test_run_settings_without_effect_under_a_method_are_refused(capsys, method, flags):
    changed = dict(flip=0.1, label_temperature=0.5, length_bias=0.1, ema=0.9, compile="on")
    changed |= dict(lora=2, prompts=9, max_response=9, eval_size=9, base_steps=9)
    changed |= dict(eval_every=5, dtype="bfloat16")
    for name in flags:
        argv = ["--method", method, f"--{name}", str(changed[name])]
        refused(capsys, argv, f"--{name} does nothing under {method}")


ROUNDS = '''"""Rounds."""

from dataclasses import dataclass

from data import Paper
from methods.irpo import loss as listwise, Config as Lists

PAPER = Paper("lists")


@dataclass(frozen=True)
class Config:
    pass


def loss(logps, ref_logps, batch, cfg):
    return listwise(logps, ref_logps, batch, Lists())


def run(lab, cfg):
    policy = lab.base()
    rows = lab.preferences(policy)
    half = len(rows) // 2
    parts = [rows[:half], rows[half:]]
    BODY
    return policy
'''


@pytest.mark.slow
@pytest.mark.parametrize(
    "body",
    [
        "lab.align(policy, lambda policy, round: parts[round], loss, cfg, every=2, steps=4)",
        "[lab.align(policy, part, loss, cfg, steps=2) for part in parts]",
        "lab.align(policy, lambda p, r: parts[0] * (1 - r), loss, cfg, every=2, steps=4)",
    ],
)
def test_the_rows_of_every_round_are_rehearsed(
    tmp_path, capsys, untrained, forget, monkeypatch, body
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "rounds.py").write_text(ROUNDS.replace("BODY", body))
    bad = [row | {"scores": [1, 2, 500]} for row in LISTS[:1]] + LISTS
    for rows in (bad, bad[::-1]):
        path = rows_file(tmp_path / "rows.jsonl", rows)
        words = ["no rows to align on in round 1"] if "1 - r" in body else ["500", "scores"]
        argv = ["--method", "rounds.py", "--data", path, "--context", "64"]
        if "1 - r" not in body or rows is not bad:
            refused(capsys, argv, *words)


def test_what_follows_an_align_that_trained_nothing_is_not_judged(untrained, forget, tmp_path):
    """The rehearsed policy is no better than before, so a method may well be surprised."""
    body = 'lab.align(policy, rows, loss, cfg, steps=2).curve[-1]["kl"]'
    (tmp_path / "rounds.py").write_text(ROUNDS.replace("BODY", body))
    path = rows_file(tmp_path / "rows.jsonl", LISTS)
    given = {"method": str(tmp_path / "rounds.py"), "data": path, "context": "64"}
    chosen = flags.read_flags(["--method", given["method"]])[1]
    assert flags.fitting(flags.combinations(given, chosen), given)


@pytest.mark.slow
def test_a_refused_run_under_overwrite_leaves_the_former_run_as_it_is(tmp_path, capsys):
    argv = ["--method", "curry_dpo", "--world", "bandit", "--steps", "6", "--out", "run"]
    assert train.main(argv) == 0
    before = sorted(os.listdir("run"))
    refused(capsys, [*argv, "--k", "5", "--overwrite"], "5 responses")
    assert sorted(os.listdir("run")) == before and "run" in os.listdir()
    assert not list(tmp_path.glob("run.*"))


@pytest.mark.slow
def test_a_sweep_is_rehearsed_once_for_all_its_seeds(tmp_path, monkeypatch):
    import methods.dpo

    calls, run = [], methods.dpo.run
    monkeypatch.setattr(methods.dpo, "run", lambda lab, cfg: calls.append(lab) or run(lab, cfg))
    argv = ["--method", "dpo", "--world", "bandit", "--steps", "2", "--seeds", "3", "--out", "s"]
    assert train.main(argv) == 0
    assert len(calls) == 4


def test_a_rehearsal_changes_nothing(tmp_path, capsys, monkeypatch):
    """The global generator, the output and the current folder are as they were."""
    small(monkeypatch)
    path = rows_file(tmp_path / "rows.jsonl", PAIRS)
    seen = []

    def opened(run, out):
        seen.append((torch.random.get_rng_state(), os.listdir(out)))
        raise UserError("that is enough")

    monkeypatch.setattr(train, "open_run", opened)
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    argv = ["--method", "dpo", "--data", path, "--context", "64", *FILE, "--out", "run"]
    capsys.readouterr()
    assert train.main(argv) == 2
    ((after, files),) = seen
    assert torch.equal(after, state) and capsys.readouterr().out == ""
    assert set(files) <= {"run.json", ".lock"}


@pytest.mark.slow
def test_rows_that_are_wrong_in_a_file_are_left_out_of_all_methods(tmp_path, capsys, monkeypatch):
    """`--method all` names the methods that cannot use a file, and runs the others."""
    small(monkeypatch)
    path = rows_file(tmp_path / "rows.jsonl", [row | {"scores": [1, 2, 500]} for row in LISTS])
    ran = []
    monkeypatch.setattr(train, "sweep", lambda runs, *rest: ran.extend(r.method for r in runs) or 0)
    argv = ["--method", "all", "--data", path, "--context", "64", *TINY[:4], "--out", "s"]
    assert train.main(argv) == 0
    error = capsys.readouterr().err
    assert "left out: irpo: " in error and "left out: curry_dpo: " in error
    assert "left out: disco needs a world with a verifier" in error
    assert "left out: --steps does nothing under wide_deep" in error
    assert "can use it" not in error  # those run anyway
    assert "dpo" in ran and "irpo" not in ran


def test_a_rehearsal_leaves_the_global_generator_alone():
    drawn = []

    def run(lab, cfg):
        drawn.append(torch.rand(1))

    settings, before = Settings(world="bandit"), torch.get_rng_state()
    chosen = SimpleNamespace(settings=settings, cfg=None, module=SimpleNamespace(run=run))
    rehearse(chosen, make_world(settings), None)
    assert len(drawn) == 1 and torch.equal(torch.get_rng_state(), before)
