"""Captured steps: on a CPU the same code as on a card, but for the replay of a graph."""

import json
import math

import pytest
import torch

import lab.batches
import lab.loop
import methods.dpo
from data import collate, encode
from lab import Lab, Settings, store
from lab.batches import Batches
from lab.graph import Captured, Graph, capturable, packed, unpacked
from methods import dpo
from nanomodel import GPT, GPTConfig
from tests.lab.commands import Killed, killed_at
from toy.reviews import World

pytestmark = pytest.mark.usefixtures("own_folder")
TINY = dict(world="reviews", base_steps=3, prompts=40, steps=12, batch_size=8, eval_size=8)


def make(out=None, **changes):
    about = TINY | {"max_response": 12, "capture": "on"} | changes
    return Lab(Settings(**about), out and str(out), quiet=True)


def trained(lab, loss=dpo.loss, **options):
    base = lab.base()
    return lab.align(base, lab.preferences(base, k=2), loss, dpo.Config(), **options)


def equal(ours, theirs):
    both = zip(ours.state_dict().values(), theirs.state_dict().values(), strict=True)
    return all(torch.equal(a, b) for a, b in both)


# ---- the wrapper


def test_a_captured_function_gives_its_values_at_every_visit_and_for_every_shape():
    calls = []

    def double(item):
        calls.append(item)
        return {"sum": (2 * item["x"]).sum(), "kept": [item["x"] + item["by"]]}

    captured, outs = Captured(double, "cpu"), []
    for visit in range(4):
        for n in (2, 3):
            x = torch.full((n,), float(visit))
            outs.append((x, captured({"x": x, "by": 1.0})))
    for x, out in outs:  # also after later visits have overwritten what a replay writes
        assert out["sum"] == 2 * x.sum() and torch.equal(out["kept"][0], x + 1)
    assert len(captured.graphs) == 2
    for shape in (0, 1):  # from the second visit on, the input is copied to one place
        assert len({item["x"].data_ptr() for item in calls[2 + shape :: 2]}) == 1


def test_other_numbers_texts_and_dtypes_are_other_graphs():
    captured = Captured(lambda item: item[0] * item[1], "cpu")
    for factor in (2, 3, 2, 3, 2, 3):
        assert captured((torch.ones(1), factor)) == factor
    assert captured((torch.ones(1, dtype=torch.float64), 2)).dtype == torch.float64
    assert len(captured.graphs) == 3


def test_unknown_inputs_and_too_many_shapes_are_not_captured():
    captured = Captured(lambda item: item, "cpu")
    for _ in range(3):
        assert isinstance(captured(object()), object)
    assert not captured.graphs
    for n in list(range(20)) * 2:
        assert len(captured(torch.zeros(n))) == n
    assert len(captured.graphs) == captured.most


def test_a_capture_that_fails_is_reported_once_and_the_function_runs_without(monkeypatch):
    def fail(*about):
        raise RuntimeError("operation not permitted\nwhen stream is capturing")

    monkeypatch.setattr("lab.graph.Graph", fail)
    lines = []
    captured = Captured(lambda x: x + 1, "cpu", lines.append)
    assert [captured(torch.tensor(i)).item() for i in range(4)] == [1, 2, 3, 4]
    assert len(lines) == 1 and lines[0].endswith("runs without: operation not permitted")


def test_a_users_error_inside_a_captured_step_is_not_a_failed_capture():
    def wrong(x):
        raise ValueError("wrong")

    with pytest.raises(ValueError, match="wrong"):
        Graph(wrong, torch.ones(1), None, None)(torch.ones(1))


def test_metrics_survive_one_vector():
    metrics = {"a": torch.tensor(1 / 3), "n": 3, "b": torch.tensor(2**40 + 1), "c": torch.ones(1)}
    back = unpacked(*packed(metrics))
    assert {name: float(value) for name, value in back.items()} == {
        name: float(value) for name, value in metrics.items()
    }


def test_only_optimizers_whose_step_can_be_captured_are():
    weights = [torch.nn.Parameter(torch.ones(2))]

    class Own(torch.optim.AdamW):
        pass

    assert capturable(torch.optim.AdamW(weights, lr=0.1), "cpu")
    assert not capturable(Own(weights, lr=0.1), "cpu")
    assert not capturable(torch.optim.SGD(weights, lr=0.1), "cpu")


@pytest.mark.parametrize("rate", [0.5, torch.tensor(0.5)])
def test_a_learning_rate_in_a_tensor_is_written_there(rate):
    """A captured step reads the learning rate where it was when the step was captured."""
    made = []

    def optimizer(params):
        made.append(torch.optim.SGD(params, lr=rate, foreach=False))
        return made[0]

    def loss(model, batch):
        return model(batch).square(), {}

    how = dict(steps=4, warmup=1, decay=True, optimizer=optimizer)
    model, data = torch.nn.Linear(1, 1), [torch.ones(1)]
    Lab(Settings(world="bandit"), quiet=True).fit(model, data, loss, **how)
    now = made[0].param_groups[0]["lr"]
    assert (now is rate) == torch.is_tensor(rate)
    assert float(now) == pytest.approx(0.5 * (0.1 + 0.45 * (1 + math.cos(math.pi * 3 / 4))))


# ---- batches


def pairs(n):
    world, rng = World(), torch.Generator().manual_seed(0)
    shown = world.demonstrations(2 * n, rng)
    for a, b in zip(shown[:n], shown[n:]):
        row = dict(prompt=a["prompt"], responses=[a["responses"][0], b["responses"][0]])
        yield encode(row | {"scores": [1.0, 0.0], "margin": len(a["prompt"])}, world.tokenizer)


def test_chosen_rows_of_one_batch_are_the_batch_of_the_chosen_rows():
    torch.manual_seed(0)
    rows, tokenizer = list(pairs(20)), World().tokenizer
    model = GPT(GPTConfig(vocab_size=tokenizer.vocab_size, hidden_size=16)).double()
    whole = collate(rows, tokenizer, fixed=True, packed=False)
    for places in ([3, 4, 5], [19, 0, 0], [7]):
        ours = whole.take(torch.tensor(places))
        theirs = collate([rows[i] for i in places], tokenizer)
        width = theirs.mask.shape[2]
        torch.testing.assert_close(
            model.logps(ours)[..., :width], model.logps(theirs), rtol=0, atol=1e-12
        )
        assert torch.equal(ours.mask[..., :width], theirs.mask) and not ours.mask[..., width:].any()
        for name in ("scores", "parents", "margin"):
            assert torch.equal(getattr(ours, name), getattr(theirs, name))
    assert set(whole.columns) == {"margin"}


@pytest.mark.slow
@pytest.mark.parametrize("capture, collated", [("on", 40), ("off", 12 * 8)])
def test_rows_are_collated_once_where_steps_are_captured(monkeypatch, capture, collated):
    lab, count, plain = make(capture=capture), [], collate
    base = lab.base()
    rows = (lab.preferences(base, k=2, ties=True) * 2)[:40]

    def counting(rows, *args, **options):
        count.append(len(rows))
        return plain(rows, *args, **options)

    monkeypatch.setattr("lab.batches.collate", counting)
    monkeypatch.setattr("lab.lab.collate", counting)
    options = dict(reference=None, watch=lambda *about: {})
    lab.align(base, rows, lambda logps, *about: (-logps.sum((1, 2)), {}), dpo.Config(), **options)
    assert sum(count) == collated


def test_rows_that_are_mostly_padding_or_too_large_are_collated_at_each_visit(monkeypatch):
    lab, rows = make(), list(pairs(20))
    assert Batches(lab, rows, 8).whole is not None
    monkeypatch.setattr("lab.batches.ROOM", 1000)
    assert Batches(lab, rows, 8).whole is None
    monkeypatch.setattr("lab.batches.ROOM", 2**30)
    monkeypatch.setattr("lab.batches.SMALL", 0)
    long = encode(dict(prompt=[5] * 400, responses=[[6], [7]], scores=[1, 0]), World().tokenizer)
    batches = Batches(lab, [*rows, long | {"margin": 1}], 8)
    assert batches.whole is None
    shapes = {batches(step).tokens.shape for step in range(9)}
    assert len(shapes) == 1


# ---- trainings


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 4])
@pytest.mark.parametrize("world", ["reviews", "digits"])
def test_a_captured_training_equals_the_same_steps_called(tmp_path, monkeypatch, every, world):
    if world == "digits":
        monkeypatch.setattr("toy.digits.World.measure", lambda self, policy, lab: {})
    changes = {"world": world} | ({} if world == "reviews" else {"max_response": None})

    def run(name):
        Lab.memory.clear()
        monkeypatch.setattr(store, "CACHE", str(tmp_path / f"cache-{name}"))
        lab = make(tmp_path / name, **changes)
        base = lab.base()
        if every is None:
            policy = trained(lab)
        else:
            rounds = lambda policy, round: lab.preferences(policy, k=2, n=24)  # noqa: E731
            options = dict(reference="round", every=every)
            policy = lab.align(base, rounds, dpo.loss, dpo.Config(), **options)
        return policy, (tmp_path / name / "metrics.jsonl").read_text()

    replays, call = [], Graph.__call__

    def counted(graph, item):
        replays.append(1)
        return call(graph, item)

    monkeypatch.setattr(Graph, "__call__", counted)
    ours, log = run("captured")
    assert len(replays) > 12
    monkeypatch.setattr(lab.loop, "Captured", lambda function, *about: function)
    monkeypatch.setattr("lab.lab.Captured", lambda function, *about: function)
    theirs, plain_log = run("plain")
    assert equal(ours, theirs) and log == plain_log
    names = set(json.loads(log.splitlines()[-2]))
    assert {"loss", "grad_norm", "lr", "margin", "accuracy"} <= names


@pytest.mark.slow
def test_a_captured_training_equals_one_on_tight_batches_but_for_rounding(tmp_path):
    ours, plain = trained(make(tmp_path / "a")), trained(make(tmp_path / "b", capture="off"))
    assert not equal(ours, plain)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3)


@pytest.mark.slow
@pytest.mark.parametrize("call", [2, 7])
def test_a_killed_captured_run_resumes_to_the_same_weights(tmp_path, monkeypatch, call):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr("time.time", lambda: 0.0)
    whole = trained(make(tmp_path / "whole"), methods.dpo.loss)
    plain = methods.dpo.loss
    loss = killed_at(monkeypatch, call)
    with pytest.raises(Killed):
        trained(make(tmp_path / "cut"), methods.dpo.loss)
    monkeypatch.setattr(methods.dpo, "loss", loss)
    again = trained(make(tmp_path / "cut"), plain)
    assert equal(whole, again)
    logs = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert logs[0] == logs[1]


@pytest.mark.slow
def test_a_method_with_a_score_or_an_optimizer_of_its_own_is_not_captured(monkeypatch):
    replays = []
    monkeypatch.setattr(Graph, "__call__", lambda graph, item: replays.append(1))
    monkeypatch.setattr("lab.lab.Captured", lambda function, *about: function)
    monkeypatch.setattr(lab.loop, "Captured", lambda function, *about: replays.append(1))
    here = make(base_steps=0)
    score = lambda model, batch: model.logps(batch)  # noqa: E731
    trained(here, score=score)
    trained(here, optimizer=lambda params: torch.optim.SGD(params, lr=1e-3))
    assert not replays


@pytest.mark.slow
def test_captured_sampling_draws_the_same_tokens(monkeypatch):
    here = make()
    base, prompts = here.base(), here.world.prompts(6, here.rng("asked"))
    ours, graphs = here.sample(base, prompts, 3, here.rng("drawn")), []
    call = Graph.__call__
    monkeypatch.setattr(Graph, "__call__", lambda *about: graphs.append(1) or call(*about))
    assert ours == here.sample(base, prompts, 3, here.rng("drawn")) and len(graphs) > 3
    here.captured = False
    assert ours == here.sample(base, prompts, 3, here.rng("drawn"))
    assert max(len(y) for row in ours for y in row["responses"]) > 3


def test_tables_stay_on_the_cpu(monkeypatch):
    monkeypatch.setattr("lab.lab.pick_device", lambda name: torch.device("meta"))
    here = Lab(Settings(world="bandit", device="cuda"), quiet=True)
    assert here.device.type == "cpu" and not here.captured and not here.bf16
    assert here.base().logits.device.type == "cpu"
