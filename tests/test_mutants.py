"""Every single edit of a loss changes a value, a gradient, a metric or an error on some input.

So no line of a loss is unnecessary, and the inputs would show an error in any line. Whether the
values are right is tested in tests/methods/test_NAME.py. That file also has the inputs (INPUTS),
the variants of the Config (CASES), and the mutants that are equivalent to the original (SURVIVORS,
each with the reason).
"""

import importlib
import inspect
import warnings

import pytest
import torch

import data
from lab import settings
from tests import builders, mutation

CORES = {name: importlib.import_module(f"methods.{name}").PAPER.core for name in settings.methods()}


def check(made, alive, reasons):
    """Assert that every surviving mutant has a reason, and that every reason has a survivor."""
    names = {mutant.name for mutant in alive}
    assert sorted(names - set(reasons)) == [] and sorted(set(reasons) - names) == []
    assert len(made) > len(alive)


@pytest.mark.mutants
@pytest.mark.parametrize("name", CORES)
def test_no_mutant_of_a_core_survives_without_a_reason(name):
    """Without a loss, INPUTS are calls (function, *arguments); "cfg" stands for the Config."""
    module = importlib.import_module(f"methods.{name}")
    here = importlib.import_module(f"tests.methods.test_{name}")
    functions, observe = None, mutation.observe_call
    if "loss" in CORES[name]:
        functions = mutation.reachable(inspect.getsource(module), ["loss"])
        observe = mutation.observe_loss
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, alive = mutation.survivors(module, here.CASES, here.INPUTS, functions, observe)
    check(made, alive, here.SURVIVORS)


@pytest.mark.mutants
def test_no_mutant_of_the_checks_of_pairs_survives_without_a_reason():
    """Losses on pairs begin with data.pair, so it is edited once for all of them."""

    def observe(names, cfg, item):
        logps, ref_logps, batch = item
        try:
            pair = names["pair"](logps.detach(), ref_logps, batch)
            alone = names["upcast"](logps.detach())
        except Exception as error:  # noqa: BLE001 - a mutant may do anything
            return f"{type(error).__name__}: {error}", None
        if logps.is_meta:
            return "ran", None
        kinds = [type(x) for x in (pair, *pair, alone)]
        if kinds[0] is not tuple or kinds[-1] is not torch.Tensor:
            return f"returned {kinds}", None
        return [x for x in (*pair, alone) if x is not None], kinds

    def inputs():
        logps, _, batch = builders.ragged()
        return [*builders.pairs(), (logps, None, batch)]

    made, alive = mutation.survivors(data, [{}], inputs, ["pair", "upcast"], observe)
    check(made, alive, {})
