"""Every file of claims, measured with two steps and a few prompts, as --smoke does."""

import importlib
from pathlib import Path

import pytest

from lab import Lab, Settings, claims, results

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in ROOT.glob("claims/[a-z]*.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("name", NAMES)
def test_every_series_and_metric_of_a_claim_is_measured(name, own_folder):
    module = importlib.import_module(f"claims.{name}")
    lab = Lab(Settings(seed=100), quiet=True, seeds=2, smoke=True)
    series = module.measure(lab)
    rows = claims.judge(module.CLAIMS, series)
    assert len(rows) == len(module.CLAIMS)
    for row in rows:
        assert len(row["ours"]) == len(row["baseline"]) == 2, row["text"]
    if hasattr(module, "report"):
        assert module.report(lab, series)
    assert results.claims_table(rows)
