"""The contract of a loss: what the first step of a run refuses, and how it says so."""

from types import SimpleNamespace

import pytest
import torch

from data import UserError
from lab import Lab, Settings, check
from methods import dpo

MASK = torch.ones(4, 2, 3, dtype=torch.bool)
BATCH = SimpleNamespace(mask=MASK)


def logps():
    return torch.randn(4, 2, 3, generator=torch.Generator().manual_seed(0)).requires_grad_()


def test_a_good_loss_passes():
    x = logps()
    losses, metrics = check.unpack((x.sum((1, 2)), {"weight": x.detach().mean(), "k": 2}))
    check.first_step(losses, metrics, x, None, BATCH, None)
    losses.mean().backward()  # the graph is still there
    assert x.grad is not None


@pytest.mark.parametrize(
    "make, words",
    [
        (lambda x: x.sum(), ["shape ()", "expected (4,)", ".mean()"]),
        (lambda x: x.sum(1), ["shape (4, 3)", ".sum(-1)"]),
        (lambda x: x.sum(2), ["shape (4, 2)", "combine the K responses"]),
        (lambda x: x, ["shape (4, 2, 3)"]),
        (lambda x: x.sum((1, 2))[:2], ["shape (2,)", "expected (4,)"]),
        (lambda x: 1.0, ["a float, not a tensor"]),
        (lambda x: x.sum((1, 2)).detach(), ["no gradient in the policy"]),
        (lambda x: torch.ones(4, requires_grad=True), ["no gradient in the policy"]),
        (lambda x: (-x.exp()).sum((1, 2)).log(), ["4 of 4 losses are NaN", "logarithm"]),
        (lambda x: (x - x).sum((1, 2)).sqrt(), ["gradient of the loss is NaN", "square root"]),
    ],
)
def test_bad_losses_are_named(make, words):
    x = logps()
    with pytest.raises(UserError) as caught:
        check.first_step(make(x), {}, x, None, BATCH, None)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(
    "metrics, words",
    [
        (None, ["not a dict"]),
        ({"margin": torch.ones(4)}, ["'margin'", "shape (4,)", ".mean()"]),
        ({"margin": torch.ones((), requires_grad=True)}, ["'margin'", ".detach()"]),
        ({"margin": "high"}, ["'margin'", "a str, not a number"]),
        ({"step": 1.0}, ["'step'", "rename it"]),
    ],
)
def test_bad_metrics_are_named(metrics, words):
    x = logps()
    with pytest.raises(UserError) as caught:
        check.first_step(x.sum((1, 2)), metrics, x, None, BATCH, None)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("returned", [torch.ones(2), torch.ones(4), (1,), (1, 2, 3), [1, 2], None])
def test_a_forgotten_metrics_dict_is_named(returned):
    with pytest.raises(UserError, match="return losses, metrics"):
        check.unpack(returned)


def test_log_probs_of_a_wrong_shape_are_named_by_the_loss():
    """A score of one's own, which sums over the tokens, is refused before metrics are made."""
    lab = Lab(Settings(world="bandit", steps=2, prompts=64), quiet=True)
    policy = lab.base()
    with pytest.raises(UserError, match="this loss takes pairs"):
        lab.align(
            policy,
            lab.preferences(policy, k=2),
            dpo.loss,
            dpo.Config(),
            score=lambda model, batch: model.logps(batch).sum(-1),
        )
