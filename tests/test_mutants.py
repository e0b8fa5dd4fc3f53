"""Every single edit of a loss changes a value, a gradient, a metric or an error on some input.

So no line of a loss is unnecessary, and the inputs would show an error in any line. Whether the
values are right is tested in tests/methods/test_NAME.py. That file also has the inputs (INPUTS),
the variants of the Config (CASES), and the mutants that are equivalent to the original (SURVIVORS,
each with the reason).
"""

import importlib
import inspect
import math
import warnings
from types import SimpleNamespace

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


@pytest.mark.mutants
def test_no_mutant_of_the_checks_of_lists_and_of_paths_survives_without_a_reason():
    """Losses on lists begin with data.check_lists, and those on trees with data.paths."""

    def observe(names, cfg, item):
        try:
            if len(item) == 1:
                found = list(names["paths"](*item))
                return ("ran" if found[0].is_meta else found), None
            names["check_lists"](*item, **cfg)
        except Exception as error:  # noqa: BLE001 - a mutant may do anything
            return f"{type(error).__name__}: {error}", None
        return "ran", None

    def inputs():
        full = torch.tensor([[True, True, True], [True, True, False]])
        scores = torch.tensor([[0.0, 1.0, 0.5], [0.25, 0.75, 0.0]])
        trees = torch.tensor([[-1, 0, 1, 0, -1, 4], [-1, 0, 1, 2, 3, -1]])
        mask = torch.ones(2, 6, 2, dtype=torch.bool)
        mask[0, 1, 1] = mask[1, 5] = False
        lone = full & torch.tensor([True, False, False])
        items = [(full, scores), (lone, scores), (full & False, scores)]
        items += [(full.to("meta"), scores.to("meta"))]
        items += [
            (full, scores + torch.tensor([x, 0.0, 0.0])) for x in (-0.5, 1.5, -1e9, 1e9, math.nan)
        ]
        items += [(full, scores + torch.tensor([x, 0.0, 0.0])) for x in (math.inf, -math.inf)]
        elsewhere = SimpleNamespace(mask=mask.to("meta"), parents=trees.to("meta"))
        trees = SimpleNamespace(mask=mask, parents=trees)
        return [*items, (trees,), (SimpleNamespace(mask=mask),), (elsewhere,)]

    cases = [dict(low=0, high=1), dict(low=0, high=1, least=1), {}, dict(least=3)]
    made, alive = mutation.survivors(data, cases, inputs, ["check_lists", "paths"], observe)
    path = "child_of.to(eye.dtype) @ on"
    reasons = {
        "paths: 1 -> 2": "-2 is not the index of a parent either",
        f"paths: eye + {path} -> eye - {path}": "only which entries are 0 is read",
    }
    check(made, alive, reasons)
