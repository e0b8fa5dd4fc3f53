"""--claim: one paper or many, interrupted or failing."""

import json
from types import SimpleNamespace

import pytest

import train
from data import UserError
from lab import flags
from lab.claims import claim
from methods import dpo
from tests.lab.commands import Killed, killed_at, refused

pytestmark = pytest.mark.usefixtures("own_folder")


def test_a_killed_claim_goes_on(tmp_path, monkeypatch):
    def measure(lab):
        curves = lab.race({"dpo": (dpo.loss, dpo.Config())}, world="bandit", steps=6)
        return {"dpo": curves["dpo"], "base": [curve[0] for curve in curves["dpo"]]}

    module = SimpleNamespace(
        measure=measure, CLAIMS=[claim("a claim", "reward", "dpo", ">", "base")]
    )
    monkeypatch.setattr(flags, "load_claims", lambda method: module)
    argv = ["--method", "dpo", "--claim", "--seeds", "3", "--out"]
    codes = [train.main([*argv, "whole"])]
    loss = killed_at(monkeypatch, 9)  # at the second seed
    with pytest.raises(Killed):
        train.main([*argv, "cut"])
    calls = [0]

    def counting(*args):
        calls[0] += 1
        return loss(*args)

    monkeypatch.setattr(dpo, "loss", counting)
    codes.append(train.main(["--resume", "cut"]))
    assert codes[0] == codes[1] and calls[0] == 12  # the first seed was not trained again
    whole, cut = (
        json.loads((tmp_path / n / "claim.json").read_text())["claims"][0]["ours"]
        for n in ("whole", "cut")
    )
    assert whole == cut and len(set(whole)) == 3
    assert not (tmp_path / "cut" / "stages").exists()


def test_the_claims_of_many_methods_go_on_after_a_failure_and_are_resumed(
    tmp_path, monkeypatch, capsys
):
    ran, made = [], {}

    def paper(name, values):
        def measure(lab):
            ran.append(name)
            if name == "irpo" and len(ran) < 4:
                raise RuntimeError("no luck | at all")
            return {"ours": values, "zero": 0.0, "one": 1.0}

        stated = [
            claim("a claim", "reward", "ours", ">", "zero", margin=0.5),
            claim("a control", "kl", "zero", ">", "one", kind="control", expected=False),
        ]
        made[f"methods.{name}"] = SimpleNamespace(measure=measure, CLAIMS=stated)

    monkeypatch.setattr(flags, "load_claims", lambda method: made[method.__name__])
    monkeypatch.setattr(flags, "claims_path", lambda method: made.get(method.__name__))
    paper("dpo", [1.0, 2.0, 3.0])
    paper("irpo", [1.0, 1.0, 1.0])
    paper("rdpo", [1.0, 2.0, 0.6])
    argv = ["--method", "dpo,irpo,rdpo,curry_dpo", "--claim", "--seeds", "3"]
    assert train.main([*argv, "--out", "all"]) == 1 and ran == ["dpo", "irpo", "rdpo"]
    printed = capsys.readouterr()
    out = printed.out
    assert "left out: curry_dpo has no claims" in printed.err
    assert "[1/3] dpo: 1 of 1 expected claims hold; 1 more were not expected to hold" in out
    assert "failed, see all/irpo/error.txt" in out
    assert "no luck" in (tmp_path / "all" / "irpo" / "error.txt").read_text()
    page = (tmp_path / "all" / "dpo" / "claim.txt").read_text()
    assert "a control" in page and "a control" not in out
    rows = json.loads((tmp_path / "all" / "claims.json").read_text())
    assert [row["paper"] for row in rows] == ["dpo", "dpo", "irpo", "rdpo", "rdpo"]
    assert [row["holds"] for row in rows] == [True, False, False, True, False]
    assert rows[0]["difference"] == 2.0 and "commit" in rows[0]
    assert rows[0]["command"] == "python train.py --method dpo --claim --seeds 3"
    markdown = (tmp_path / "all" / "claims.md").read_text()
    assert "2.000 [-0.484, 4.484]" in markdown and "no luck / at all" in markdown
    assert train.main(["--resume", "all"]) == 0 and ran == ["dpo", "irpo", "rdpo", "irpo"]


def test_a_method_without_claims_is_refused(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(flags, "claims_path", lambda method: None)
    refused(capsys, ["--method", "dpo", "--claim", "--out", "run"], "dpo has no claims")
    assert not (tmp_path / "run").exists()


def test_a_claim_takes_no_hyper_parameters(capsys):
    refused(capsys, ["--method", "dpo", "--claim", "--beta", "1"], "--beta", "--claim sets its own")
    refused(capsys, ["--method", "dpo", "--claim", "--device", "cpu,cpu:0"], "one value")


def test_a_claim_that_cannot_be_judged_is_one_line(tmp_path, capsys, monkeypatch):
    def measure(lab):
        raise UserError("a curve never reaches a KL of 4")

    module = SimpleNamespace(measure=measure, CLAIMS=[])
    monkeypatch.setattr(flags, "load_claims", lambda method: module)
    refused(capsys, ["--method", "dpo", "--claim", "--out", "run"], "never reaches")
    assert not (tmp_path / "run").exists()
