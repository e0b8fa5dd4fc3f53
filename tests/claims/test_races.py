"""Claims that are read off races: every series and metric that a claim names is measured."""

import importlib
from dataclasses import fields

import pytest
import torch

from lab import Lab, Settings
from lab.claims import judge

START = {"step": 0, "reward": 0.0, "kl": 0.0, "length": 5.0}
LAST = {"step": 9, "reward": 1.0, "kl": 2.0, "diversity": 0.5, "length": 9.0, "accuracy": 0.5}
LAST |= {"chosen_logp": -9.0, "rejected_logp": -9.0}
OF_END = {
    "rdpo": {"true reward": 1.0},
    "fdpo": {"log-ratios": [[0.5, -0.5], [0.0, 0.0]], "truth": [[1.0, 0.0], [0.0, 0.0]]},
    "asft": {"pull of asft": 0.1, "pull of dpo": 1.0},
    "did": {"chosen_ratio": -1.0, "rejected_ratio": -2.0},
    "three_d": {"chosen_ratio": -1.0, "rejected_ratio": -2.0},
    "survey": {},
    "disco": {"success_4": 0.5, "success_5": 0.3},
}
# the curve of an arm that trains by itself
OF_ARM = {"survey": {"chosen_ratio": -1.0, "rejected_ratio": -2.0}}
# trainings inside a claim, replaced by functions that take no time
SHORT = {
    "madpo": {"margins_of": lambda lab, world, rows: [1.0] * len(rows), "STEPS": 1},
    "did": {"fitted": lambda log_ref, chance, loss=None: log_ref},
    "curry_dpo": {"STEPS": 6},
    "disco": {"STEP": 5.0},
    "three_d": {"networks": lambda *run: torch.zeros(2, 1, 4, 4)},
}
# series that no claim names
SHOWN = {
    "asft": {"sft, shared features"},
    "curry_dpo": {"curriculum, fixed reference", "pooled, moving reference", "pooled"},
}
NAMES = ["dpo", "rdpo", "sft", "fdpo", "asft", "ld_dpo", "madpo", "did", "curry_dpo", "three_d"]
NAMES += ["survey", "disco"]


@pytest.mark.filterwarnings("ignore:An input array is constant")  # all series are the same
@pytest.mark.parametrize("seeds", [1, 2])
@pytest.mark.parametrize("name", NAMES)
def test_every_series_and_metric_of_a_claim_is_measured(name, seeds, monkeypatch):
    def race(lab, arms, data=None, watch=None, end=None, **settings):
        assert set(settings) <= {f.name for f in fields(Settings)}
        assert end is None or name in OF_END
        last = LAST | (OF_END[name] if end else {})
        own = {arm: OF_ARM.get(name, {}) if callable(made) else {} for arm, made in arms.items()}
        return {arm: [[dict(START), last | own[arm]] for _ in lab.seeds] for arm in arms}

    monkeypatch.setattr(Lab, "race", race)
    module = importlib.import_module(f"claims.{name}")
    for what, short in SHORT.get(name, {}).items():
        monkeypatch.setattr(module, what, short)
    series = module.measure(Lab(Settings(), quiet=True, seeds=seeds))
    rows = judge(module.CLAIMS, series)
    assert len(rows) == len(module.CLAIMS)
    assert all(len(row["ours"]) == len(row["baseline"]) == seeds for row in rows)
    used = {name for row in rows for name in row["series"] if isinstance(name, str)}
    assert used <= set(series)
    assert hasattr(module, "report") or set(series) <= used | SHOWN.get(name, set())
