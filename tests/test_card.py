"""What a CUDA device needs and a CPU can check: no host sync, one device, random numbers.

Every training of every method is recorded: base model, reward models, alignment. Its first step is
then repeated on tensors without values, whose device is called cuda. An operation that reads a
value or that meets tensors on two devices fails there, as it would slow down or fail on a card.
"""

import copy
import dataclasses
import importlib
import os

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

import data
from data import Batch
from lab import Lab, Settings, align, evaluate, loop, store
from lab.settings import methods
from tests.test_contract import LOSSES, accepted

if os.environ.get("NANOPREF_DEVICE") == "cuda":
    # a second kind of device in one process breaks the streams of CUDA, and a card is at hand
    pytest.skip("there is a card", allow_module_level=True)
registration = pytest.importorskip("torch.utils.backend_registration")


class Backend(registration._DummyBackendModule):
    """What torch.autocast asks of a device."""

    def get_amp_supported_dtype(self):
        return [torch.bfloat16]


registration._setup_privateuseone_for_python_backend("card", Backend())
CARD = torch.device("card:0")
TINY = dict(base_steps=2, prompts=16, steps=3, batch_size=4, eval_size=4)


# their objective scores a second model, which the test cannot move
TWO_MODELS = ("llava_mod", "ofs_dpo")
UNTRAINED = ("dstc",)  # without training its base model writes no program, so there are no pairs
PICKY = ("spinal", "urflex")  # they need what only some worlds have


def papers():
    """(method, world) for every method, on text and on images if it runs on them."""
    for name in (name for name in methods() if name not in TWO_MODELS + UNTRAINED):
        paper = importlib.import_module(f"methods.{name}").PAPER
        if "text" in paper.worlds:
            # reviews has pairs only
            own = paper.needs in ("verifier", "lists") or name in PICKY
            yield name, paper.defaults["world"] if own else "reviews"
        if "images" in paper.worlds:
            own = paper.defaults.get("world") if name in PICKY else None
            yield name, own or ("gaussians" if name == "ddo" else "digits")


def moved(value, move):
    """The value with `move` applied to all tensors in it."""
    if isinstance(value, torch.Tensor):
        return move(value)
    if isinstance(value, Batch):
        inner = {f.name: moved(getattr(value, f.name), move) for f in dataclasses.fields(value)}
        return Batch(**inner)
    if isinstance(value, dict):
        return {name: moved(item, move) for name, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(moved(item, move) for item in value)
    return value


def place(model, move):
    """The model with `move` applied to all parameters and buffers, in place."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                new = move(p.detach())
                module._parameters[name] = torch.nn.Parameter(new, p.requires_grad)
        for name, b in module._buffers.items():
            module._buffers[name] = b if b is None else move(b)
    return model


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    """One cache for the base models of all tests."""
    return str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def trainings(cache, monkeypatch):
    """A function (method, world) -> [(lab, model, item, forward, loss)] of all trainings."""
    monkeypatch.setattr(store, "CACHE", cache)
    monkeypatch.setattr(align, "first_step", lambda *about: None)  # reads values, by design
    monkeypatch.setattr(Lab, "glance", lambda *about: {})
    for world in ("digits", "gaussians"):
        path = f"toy.{world}.World.measure"
        monkeypatch.setattr(path, lambda self, policy, lab: {"frechet": 1.0})
    found, fit = [], loop.fit

    def noted(lab, model, batches, loss, *args, **options):
        get = batches if callable(batches) else lambda step: batches[step]
        item, forward = copy.deepcopy(get(0)), options.get("forward")
        found.append((lab, copy.deepcopy(model), item, forward, loss))
        return fit(lab, model, batches, loss, *args, **options)

    for owner in (loop, align, Lab):
        monkeypatch.setattr(owner, "fit", noted)

    def run(name, world):
        module = importlib.import_module(f"methods.{name}")
        short = {} if world in ("digits", "gaussians", "glyphs") else {"max_response": 8}
        lab = Lab(Settings(**TINY | short | {"world": world}), quiet=True)
        module.run(lab, module.Config())
        for reader in (module, data):
            if "readable" in vars(reader):
                monkeypatch.setattr(reader, "readable", lambda x: False)
        return found

    return run


@pytest.mark.slow
@pytest.mark.parametrize("name, world", list(papers()))
def test_no_step_reads_a_value_or_mixes_devices(trainings, name, world):
    found = trainings(name, world)
    assert found
    for lab, model, item, forward, loss in found:
        mode = FakeTensorMode()

        def card(x):
            return FakeTensor(mode, x.to("meta"), CARD)

        model, item = place(model, card), moved(item, card)
        params = [p for p in model.parameters() if p.requires_grad]
        optimizer = loop.adamw(lab, 1e-3)(params)
        with mode:
            arguments = forward(model, item) if forward else (model, item)
            losses, metrics = loss(*arguments)
            shared = evaluate.common_metrics(*arguments) if forward else {}
            losses.mean().backward()
            torch.nn.utils.clip_grad_norm_(params, 1.0)
            optimizer.step()
        assert losses.device == CARD
        assert all(value.device == CARD for value in (shared | metrics).values())


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_is_compiled_as_one_graph(name):
    loss, done = importlib.import_module(f"methods.{name}").loss, 0
    for cfg, items in accepted(name)[:2]:
        for logps, ref_logps, batch in items:
            if logps.dtype != torch.float64 or ref_logps is None or done > 1:
                continue
            torch._dynamo.reset()
            compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=False)
            outs = []
            for function in (compiled, loss):
                x = logps.detach().clone().requires_grad_()
                losses, metrics = function(x, ref_logps, batch, cfg)
                slope = torch.zeros(()) if not losses.requires_grad else None
                if slope is None:
                    (slope,) = torch.autograd.grad(losses.sum(), x)
                outs.append([losses.detach(), slope, *map(torch.as_tensor, metrics.values())])
            for ours, plain in zip(*outs, strict=True):
                torch.testing.assert_close(ours, plain, equal_nan=True)
            done += 1
    assert done
