"""The training loop: it learns, resumes bit for bit, keeps every state, and stops at a NaN."""

import json
import os
import signal

import pytest
import torch

from data import UserError
from lab import Lab, Settings, loop
from lab.loop import Diverged


def make(out=None, **changes):
    settings = Settings(**(dict(world="bandit", steps=30, warmup=2) | changes))
    return Lab(settings, out, quiet=True)


def line():
    """A linear model, and batches of points on a line."""
    torch.manual_seed(0)
    points = torch.linspace(-1, 1, 8)[:, None]
    return torch.nn.Linear(1, 1), [(points, 3 * points + 1)]


def squares(model, batch):
    losses = (model(batch[0]) - batch[1]).square()
    return losses, {"largest": losses.detach().max()}


class Indexed(torch.optim.Optimizer):
    """Gradient descent that keeps an index, bytes and a float64 sum: what torch would cast."""

    def __init__(self, params, lr=0.1):
        super().__init__(params, dict(lr=lr))

    @torch.no_grad()
    def step(self, closure=None):
        for p in self.param_groups[0]["params"]:
            state = self.state[p]
            if not state:
                state["index"] = torch.zeros(2, dtype=torch.int64)
                state["bytes"] = torch.full((3,), 200, dtype=torch.uint8)
                state["total"] = torch.zeros(1, dtype=torch.float64)
            state["index"] += 2**40 + 1  # lost in float32
            state["bytes"] += 1
            state["total"] += p.grad.double().sum()
            p -= self.param_groups[0]["lr"] * p.grad


def test_it_learns_a_line_and_keeps_what_was_seen():
    model, batches = line()
    looks = lambda model, step: {"slope": model.weight.item()}  # noqa: E731
    model = make().fit(model, batches, squares, steps=300, lr=0.1, watch=looks)
    assert model.weight.item() == pytest.approx(3, abs=0.05)
    assert [point["step"] for point in model.curve] == list(range(0, 301, 15))
    assert model.curve[-1]["slope"] == model.weight.item()


def test_the_learning_rate_warms_up_and_may_follow_a_cosine(tmp_path):
    for name, decay, last in (("constant", False, 1e-2), ("cosine", True, None)):
        lab = make(str(tmp_path / name), steps=20, warmup=4)
        lab.fit(*line(), squares, lr=1e-2, decay=decay)
        lines = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        rates = [json.loads(line)["lr"] for line in lines]
        assert rates[0] == pytest.approx(0.25e-2) and len(rates) == 20
        assert rates[-1] == pytest.approx(last) if last else 1e-3 < rates[-1] < 1.2e-3


def test_looks_and_the_trained_model_have_averaged_weights():
    seen, path = [], []

    def loss(model, batch):
        path.append(model.weight.detach().clone())  # the weights that are trained
        return squares(model, batch)

    def look(model, step):
        seen.append(model.weight.detach().clone())
        return {}

    model, batches = line()
    plain = make().fit(line()[0], batches, squares, steps=6, lr=0.1)
    model = make(eval_every=1).fit(model, batches, loss, steps=6, lr=0.1, watch=look, ema=0.3)
    average = path[0]
    for step, weight in enumerate([*path[1:], plain.weight]):
        assert torch.equal(seen[step], average)
        decay = min(0.3, (1 + step) / (10 + step))
        average = decay * average + (1 - decay) * weight
        torch.testing.assert_close(seen[step + 1], average)
        average = seen[step + 1]
    assert torch.equal(model.weight, seen[-1])  # and averaging does not change the training


def test_a_forward_pass_does_not_share_the_memory_with_the_gradients_of_the_last_step():
    held = []

    def loss(model, batch):
        held.append([p.grad for p in model.parameters() if p.grad is not None])
        return squares(model, batch)

    make().fit(*line(), loss, steps=3)
    assert held == [[], [], []]


@pytest.mark.parametrize("ema", [0.0, 0.9])
@pytest.mark.parametrize("optimizer", [None, Indexed])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, optimizer, ema):
    class Interrupted(Exception):
        pass

    def train(folder, fail_at):
        lab = make(str(tmp_path / folder))
        lab.checkpoint_every = 0.0
        model, batches = line()
        kept = []

        def loss(model, batch):
            if fail_at is not None and len(kept) == fail_at:
                raise Interrupted
            kept.append(1)
            return squares(model, batch)

        def build(params):
            made = optimizer(params) if optimizer else torch.optim.AdamW(params, lr=0.1)
            train.optimizer = made
            return made

        looks = lambda model, step: {"slope": model.weight.item()}  # noqa: E731
        return lab.fit(model, batches, loss, optimizer=build, watch=looks, ema=ema)

    whole, state = train("whole", None), train.optimizer.state_dict()["state"]
    with pytest.raises(Interrupted):
        train("cut", 17)
    again = train("cut", None)
    assert torch.equal(whole.weight, again.weight) and whole.curve == again.curve
    for index, values in train.optimizer.state_dict()["state"].items():
        for name, value in values.items():
            assert value.dtype == state[index][name].dtype and torch.equal(
                value, state[index][name]
            )
    files = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("whole", "cut")]
    assert files[0] == files[1]


def test_ctrl_c_in_the_last_look_stops_the_run_and_is_no_step_lost(tmp_path):
    """The run ends there, and a resumed one has what an uninterrupted one has."""
    asked = []

    def look(model, step):
        if step == 6 and not asked:
            asked.append(os.kill(os.getpid(), signal.SIGINT))
        return {"slope": model.weight.item()}

    def run(place, watch):
        model, batches = line()
        return make(str(tmp_path / place)).fit(model, batches, squares, steps=6, watch=watch)

    with pytest.raises(KeyboardInterrupt):
        run("cut", look)
    again, whole = run("cut", look), run("whole", lambda m, step: {"slope": m.weight.item()})
    assert again.curve == whole.curve and torch.equal(again.weight, whole.weight)


def test_a_nan_stops_the_training_with_the_step_and_the_metric(tmp_path):
    calls = []

    def broken(model, batch):
        calls.append(1)
        losses, metrics = squares(model, batch)
        return losses, metrics | {"largest": torch.tensor(float("nan"))} if len(
            calls
        ) == 7 else metrics

    lab = make(str(tmp_path))
    with pytest.raises(Diverged, match="largest became nan in step 7; a lower --lr may help"):
        lab.fit(*line(), broken)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        (lambda losses: losses, "one Tensor, not losses and metrics"),
        (lambda losses: (losses.detach(), {}), "the loss has no gradient"),
        (lambda losses: (1.0, {}), "the losses are a float"),
        (lambda losses: (losses, None), "the metrics are a NoneType"),
        (lambda losses: (losses, {"all": losses.detach()}), "'all' has shape"),
        (lambda losses: (losses, {"mean": losses.mean()}), "'mean' has a gradient"),
    ],
)
def test_a_loss_that_cannot_be_trained_is_one_line(wrong, words):
    model, batches = line()
    with pytest.raises(UserError, match=words):
        make().fit(model, batches, lambda *about: wrong(squares(*about)[0]), steps=2)


def test_a_training_without_batches_is_one_line():
    with pytest.raises(UserError, match="no batches"):
        make().fit(line()[0], [], squares, steps=2)


def test_a_nan_in_the_first_step_does_not_blame_the_learning_rate():
    def broken(model, batch):
        return (model(batch[0]) * float("nan")), {}

    with pytest.raises(Diverged, match="no weight had been changed yet") as error:
        make(steps=1).fit(*line(), broken)
    assert "--lr" not in str(error.value)


def test_a_finished_training_is_read_back(tmp_path):
    model = make(str(tmp_path)).fit(*line(), squares)
    again = make(str(tmp_path)).fit(*line(), lambda model, batch: 1 / 0)
    assert torch.equal(model.weight, again.weight) and model.curve == again.curve


def test_what_a_training_leaves_is_a_copy():
    model, batches = line()
    kept = loop.kept(make().fit(model, batches, squares))
    with torch.no_grad():
        model.weight += 1
    assert not torch.equal(kept["weights"]["weight"], model.weight)


def test_the_learning_rate_that_is_written_is_that_of_the_first_group(tmp_path):
    model, batches = line()

    def optimizer(params):
        groups = [dict(params=[p], lr=rate) for p, rate in zip(params, (1e-3, 0.5))]
        return torch.optim.SGD(groups)

    make(str(tmp_path), steps=4, warmup=1).fit(model, batches, squares, optimizer=optimizer)
    lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert {json.loads(row)["lr"] for row in lines} == {1e-3}
