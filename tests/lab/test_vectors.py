"""Worlds of vectors and the family "beyond": tables instead of policies, and what is refused."""

import json

import pytest
import torch

import train
from lab import flags, report
from tests import mutation
from tests.lab.commands import refused

pytestmark = pytest.mark.usefixtures("own_folder", "forget")

METHOD = '''"""NEAR - Nearest Points (2026), arXiv:0000.00000

Differences from the paper
1. None.

    python train.py --method near.py
"""

from dataclasses import dataclass

import torch

from data import Paper, check_fields

PAPER = Paper(
    "beyond",
    worlds=("vectors",),
    needs="points",
    ignores=("steps", "batch_size", "lr", "warmup", "clip", "eval_every", "init"),
    defaults=dict(world="arc"),
    core=("Near.scores", "vote"),
)


@dataclass(frozen=True)
class Config:
    near: int = 3  # neighbors

    def __post_init__(self):
        check_fields(self, near="[1, inf)")


class Near:
    def scores(self, x, z):
        return -torch.cdist(z, x)


def vote(scores, y, cfg):
    return y[scores.topk(cfg.near, 1)[1]].double().mean(1).round().long()


def run(lab, cfg):
    x, y = lab.world.points(100, lab.rng("train"))
    z, truth = lab.world.points(200, lab.rng("test"), held_out=True)

    def accuracy():
        found = vote(Near().scores(x, z), y, cfg)
        return {"near": {"accuracy": (found == truth).double().mean().item(), "k": cfg.near}}

    return lab.stage("table", accuracy)
'''


@pytest.fixture
def near(tmp_path):
    """The path of a method of one's own in this family."""
    (tmp_path / "near.py").write_text(METHOD)
    return str(tmp_path / "near.py")


def test_a_table_is_printed_and_written(near, tmp_path, capsys):
    assert train.main(["--method", near, "--out", "run"]) == 0
    page = capsys.readouterr().out
    assert "world arc   2 features, 2 classes" in page and "accuracy" in page
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["world"] == "arc" and "after" not in summary
    assert set(summary["table"]["near"]) == {"accuracy", "k"}
    assert 0.6 < summary["table"]["near"]["accuracy"] < 0.95
    again = ["--method", near, "--out", "again"]
    assert train.main(again) == 0
    other = json.loads((tmp_path / "again" / "summary.json").read_text())
    assert other["table"] == summary["table"]


def test_a_sweep_puts_the_rows_of_its_tables_below_each_other(near, tmp_path, capsys):
    assert train.main(["--method", near, "--near", "1,5", "--seeds", "2", "--out", "run"]) == 0
    rows = json.loads((tmp_path / "run" / "sweep.json").read_text())
    assert [(row["near"], row["seed"], row["row"]) for row in rows] == [
        (1, 0, "near"),
        (5, 0, "near"),
        (1, 1, "near"),
        (5, 1, "near"),
    ]
    assert (tmp_path / "run" / "sweep.png").exists()
    lines = [line for line in capsys.readouterr().out.splitlines() if "near" in line]
    assert len(lines) == 3 and lines[0].split()[:2] == ["near", "row"]


@pytest.mark.slow
def test_settings_that_do_nothing_in_a_world_of_vectors_are_refused(near, capsys):
    for name in ("prompts", "k", "flip", "label_temperature", "eval_size", "base_seed"):
        refused(capsys, ["--method", near, f"--{name}", "3" if name != "flip" else "0.3"], name)
    for name, value in dict(temperature="0.5", dtype="bfloat16", compile="on").items():
        refused(capsys, ["--method", near, f"--{name}", value], name, "arc")
    refused(capsys, ["--method", near, "--steps", "9"], "--steps does nothing under near")
    refused(capsys, ["--method", near, "--show"], "near does not align")
    refused(capsys, ["--method", "dpo", "--world", "arc"], "dpo needs a world of text")
    refused(capsys, ["--method", near, "--world", "reviews"], "near needs a world of vectors")


def test_the_contract_of_a_core_is_checked(near, tmp_path, capsys):
    assert train.main(["--check", near]) == 0
    page = capsys.readouterr().out
    assert "WRONG" not in page and "run returns a dict" in page
    text = METHOD.replace('"vote")', '"count")')
    (tmp_path / "other.py").write_text(text)
    assert train.main(["--check", str(tmp_path / "other.py")]) == 1
    assert "PAPER.core names count, which the file lacks" in capsys.readouterr().out


def test_the_mutants_of_a_core_are_told_by_its_calls(near):
    module = flags.load_method(near)
    scores = torch.rand(6, 5, generator=torch.Generator().manual_seed(0))
    y = torch.tensor([0, 1, 1, 0, 1])
    inputs = [("vote", scores, y, "cfg"), ("vote", scores[0], y, "cfg")]
    made, alive = mutation.survivors(
        module, [dict(near=3)], lambda: inputs, ["vote"], mutation.observe_call
    )
    assert len(made) > 5
    assert not [mutant.name for mutant in alive if "topk" in mutant.before]
    functions = mutation.reachable(METHOD, ["Near.scores", "vote"])
    assert functions == ["Near.scores", "vote"]
    assert mutation.flatten({"a": [1.0, None], "b": torch.ones(2)})[1][:2] == ["a", "b"]


def test_a_table_with_a_missing_number_has_a_dash():
    text = report.rows_of({"first": {"accuracy": 0.5}, "second": {"accuracy": 1.0, "kl": 2.0}})
    assert text.splitlines()[1].split() == ["first", "0.500", "-"]
