"""Every file of claims, measured with two steps and a few prompts, as --smoke does."""

import importlib
from pathlib import Path

import pytest

from lab import Settings, results

ROOT = Path(__file__).parents[2]
NAMES = sorted(path.stem for path in ROOT.glob("claims/[a-z]*.py"))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:An input array is constant")
@pytest.mark.parametrize("name", NAMES)
def test_every_series_and_metric_of_a_claim_is_measured(name, own_folder):
    stated = importlib.import_module(f"claims.{name}")
    rows = results.tried(stated, Settings(seed=100), 2)
    assert len(rows) == len(stated.CLAIMS)
    assert all(len(row["ours"]) == len(row["baseline"]) == 2 for row in rows)
    assert results.claims_table(rows)
