"""Every single edit of a loss changes a value, a gradient, a metric or an error on some input.

So no line of a loss is idle, and none is without inputs that would show its fault. That the values
are right is for tests/methods/test_NAME.py, where the inputs (INPUTS), the variants of the Config
(CASES) and the mutants that nobody could tell from the original (SURVIVORS, with the reason) stand.
"""

import importlib
import warnings

import pytest

from lab import settings
from tests import mutation

METHODS = [
    name
    for name in settings.methods()
    if hasattr(importlib.import_module(f"methods.{name}"), "loss")
]


@pytest.mark.mutants
@pytest.mark.parametrize("name", METHODS)
def test_no_mutant_of_the_loss_survives_without_a_reason(name):
    module = importlib.import_module(f"methods.{name}")
    here = importlib.import_module(f"tests.methods.test_{name}")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        count, alive = mutation.survivors(module, here.CASES, here.INPUTS)
    assert count >= 40
    unexplained, idle = set(alive) - set(here.SURVIVORS), set(here.SURVIVORS) - set(alive)
    assert sorted(unexplained) == [] and sorted(idle) == []
