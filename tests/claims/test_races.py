"""Claims that are read off races: every series and metric that a claim names is measured."""

import importlib
from dataclasses import fields

import pytest

from lab import Lab, Settings
from lab.claims import judge

START = {"step": 0, "reward": 0.0, "kl": 0.0}
LAST = {"step": 9, "reward": 1.0, "kl": 2.0, "diversity": 0.5, "length": 9.0, "accuracy": 0.5}
LAST |= {"chosen_logp": -9.0, "rejected_logp": -9.0}
OF_END = {
    "rdpo": {"true reward": 1.0},
    "fdpo": {"log-ratios": [[0.5, -0.5], [0.0, 0.0]], "truth": [[1.0, 0.0], [0.0, 0.0]]},
    "asft": {"pull of asft": 0.1, "pull of dpo": 1.0},
}


@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", ["dpo", "rdpo", "sft", "fdpo", "asft"])
def test_every_series_and_metric_of_a_claim_is_measured(name, seeds, monkeypatch):
    def race(lab, arms, data=None, watch=None, end=None, **settings):
        assert set(settings) <= {f.name for f in fields(Settings)}
        assert (end is not None) == (name in OF_END)
        last = LAST | OF_END.get(name, {})
        return {arm: [[dict(START), dict(last)] for _ in lab.seeds] for arm in arms}

    monkeypatch.setattr(Lab, "race", race)
    module = importlib.import_module(f"claims.{name}")
    series = module.measure(Lab(Settings(), quiet=True, seeds=seeds))
    rows = judge(module.CLAIMS, series)
    assert len(rows) == len(module.CLAIMS)
    assert all(len(row["ours"]) == len(row["baseline"]) == seeds for row in rows)
    used = {row["series"][i] for row in rows for i in (0, 1)} - {0.0}
    shown = set(series) if hasattr(module, "report") else used | {"sft, shared features"}
    assert set(series) <= shown and used <= set(series)
