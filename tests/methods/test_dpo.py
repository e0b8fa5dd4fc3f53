"""DPO against its paper: numbers, gradients, identities, errors."""

import math
from types import SimpleNamespace

import pytest
import torch

from claims.dpo import preferred
from data import collate
from methods.dpo import Config, loss
from tests import builders
from toy.bandit import Table, World


def pairs(chosen, rejected, ref_chosen, ref_rejected):
    """Two responses of one token each -> logps, ref_logps (1, 2, 1), batch."""
    logps = torch.tensor([[[chosen], [rejected]]], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.tensor([[[ref_chosen], [ref_rejected]]], dtype=torch.float64)
    return logps, ref_logps, SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))


def ragged(rows=5, length=7, seed=0):
    """Random log-probs of ragged responses in float64, 0 outside the mask."""
    rng = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, length + 1, (rows, 2, 1), generator=rng)
    mask = torch.arange(length) < lengths
    logps, ref_logps = (
        -3 * torch.rand(rows, 2, length, generator=rng, dtype=torch.float64) * mask
        for _ in range(2)
    )
    return logps.requires_grad_(), ref_logps, SimpleNamespace(mask=mask)


def test_at_the_reference_the_loss_is_ln_2_and_the_gradient_half_beta():
    logps, _, batch = ragged()
    losses, _ = loss(logps, logps.detach(), batch, Config(beta=0.1))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-12)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    expected = torch.tensor([-0.05, 0.05], dtype=torch.float64)[:, None].expand_as(grad)
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "beta, value, slope", [(0.1, 0.620957, -0.0462570), (0.5, 0.386871, -0.160411)]
)
def test_the_worked_example(beta, value, slope):
    logps, ref_logps, batch = pairs(-12.0, -14.0, -13.0, -13.5)
    losses, metrics = loss(logps, ref_logps, batch, Config(beta=beta))
    assert losses.item() == pytest.approx(value, abs=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert grad[0, 0, 0].item() == pytest.approx(slope, abs=1e-6)
    assert grad[0, 1, 0].item() == pytest.approx(-slope, abs=1e-6)
    assert metrics["weight"].item() == pytest.approx(-slope / beta, abs=1e-5)


def test_without_a_reference_the_example_gives_its_value():
    logps, _, batch = pairs(-12.0, -14.0, -13.0, -13.5)
    assert loss(logps, torch.zeros_like(logps), batch, Config(beta=0.1))[0].item() == pytest.approx(
        0.598139, abs=1e-6
    )


def test_swapping_the_pair_changes_the_loss_by_the_margin():
    logps, ref_logps, batch = ragged()
    beta = 0.7
    there, _ = loss(logps, ref_logps, batch, Config(beta=beta))
    back, _ = loss(
        logps.flip(1),
        ref_logps.flip(1),
        SimpleNamespace(mask=batch.mask.flip(1)),
        Config(beta=beta),
    )
    ratio = (logps - ref_logps).sum(-1)
    torch.testing.assert_close(
        there - back, -beta * (ratio[:, 0] - ratio[:, 1]), rtol=0, atol=1e-12
    )


def test_gradient_is_the_closed_form():
    logps, ref_logps, batch = ragged(seed=1)
    beta = 0.3
    (grad,) = torch.autograd.grad(loss(logps, ref_logps, batch, Config(beta=beta))[0].sum(), logps)
    ratio = (logps - ref_logps).sum(-1).detach()
    weight = beta * torch.sigmoid(-beta * (ratio[:, 0] - ratio[:, 1]))
    expected = torch.stack([-weight, weight], 1)[..., None].expand_as(
        grad
    )  # the same for every token: SUM, not mean
    torch.testing.assert_close(grad, expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(
        lambda x: loss(x, ref_logps, batch, Config(beta=beta))[0], logps
    )


def test_invariances():
    logps, ref_logps, batch = ragged(seed=2)
    cfg = Config(beta=0.4)
    losses = loss(logps, ref_logps, batch, cfg)[0]
    shift = torch.tensor([1.5, -2.0, 0.3, 4.0, -0.7], dtype=torch.float64)[:, None, None]
    first = torch.zeros_like(logps)
    first[..., 0] = 1.0  # a constant of the prompt on both responses, on either model
    torch.testing.assert_close(
        loss(logps + shift * first, ref_logps, batch, cfg)[0], losses, rtol=0, atol=1e-12
    )
    torch.testing.assert_close(
        loss(logps, ref_logps + shift * first, batch, cfg)[0], losses, rtol=0, atol=1e-12
    )
    padded = [torch.nn.functional.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(
        loss(padded[0], padded[1], SimpleNamespace(mask=padded[2]), cfg)[0],
        losses,
        rtol=0,
        atol=1e-12,
    )
    for b in range(5):
        one = loss(
            logps[b : b + 1], ref_logps[b : b + 1], SimpleNamespace(mask=batch.mask[b : b + 1]), cfg
        )[0]
        torch.testing.assert_close(one[0], losses[b], rtol=0, atol=1e-12)


def test_plackett_luce_of_two_is_dpo():
    rewards = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64)
    full = sum(torch.logsumexp(rewards[k:], 0) - rewards[k] for k in range(3))
    assert full.item() == pytest.approx(1.204948, abs=1e-6)
    logps, ref_logps, batch = pairs(0.5, 0.1, 0.0, 0.0)
    assert loss(logps, ref_logps, batch, Config(beta=1.0))[0].item() == pytest.approx(
        0.513015, abs=1e-6
    )


def test_huge_margins_stay_finite_in_every_dtype():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for margin in (1e4, -1e4):
            logps = torch.tensor([[[margin], [0.0]]], dtype=dtype, requires_grad=True)
            batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
            losses, _ = loss(logps, torch.zeros_like(logps), batch, Config(beta=1.0))
            assert losses.isfinite().all() and losses.dtype == torch.promote_types(
                dtype, torch.float32
            )
            assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = SimpleNamespace(mask=torch.ones(1, 2, 200, dtype=torch.bool))
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, Config(beta=1.0))
    assert losses.item() == pytest.approx(math.log1p(math.e), abs=1e-6)


@pytest.mark.parametrize("beta", [0.0, -0.1, float("inf"), float("nan")])
def test_beta_must_be_positive(beta):
    with pytest.raises(ValueError, match="beta"):
        Config(beta=beta)


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask = batch.mask.clone()
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


def test_the_chosen_probability_can_fall_while_the_loss_falls():
    """One shared parameter with features (chosen, rejected, other) = (1, 2, 0); the optimum lies at -inf."""
    reference = torch.zeros(3, dtype=torch.float64).log_softmax(0)
    for theta, p_chosen, value in [
        (0, 0.33333, 0.693147),
        (-1, 0.24473, 0.644397),
        (-2, 0.11731, 0.598139),
        (-4, 0.01798, 0.513015),
    ]:
        logp = (theta * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)).log_softmax(0)
        assert logp[0].exp().item() == pytest.approx(p_chosen, abs=1e-5)
        logps, ref_logps, batch = pairs(
            logp[0].item(), logp[1].item(), reference[0].item(), reference[1].item()
        )
        assert loss(logps, ref_logps, batch, Config(beta=0.1))[0].item() == pytest.approx(
            value, abs=1e-6
        )


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 2.0])
def test_the_population_gradient_vanishes_at_the_optimum_of_every_beta(beta):
    world = World()
    batch, reference = collate(world.pairs_all(world.reference)), world.reference
    policy = Table(*world.shape).double()
    policy.set_log_probs(world.optimum(reference, beta).log_probs())
    ref_logps = reference.double().logps(batch)

    def gradient(policy):
        losses, _ = loss(policy.logps(batch), ref_logps, batch, Config(beta=beta))
        return (
            torch.autograd.grad((losses * batch.weight).mean(), policy.logits)[0].abs().max().item()
        )

    assert gradient(policy) < 1e-7
    policy.set_log_probs(reference.log_probs())
    assert gradient(policy) > 1e-4


def test_the_supervised_baseline_looks_at_the_preferred_response_alone():
    logps, ref_logps, batch = ragged()
    losses, _ = preferred(logps, ref_logps, batch, Config())
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert (grad[:, 1] == 0).all() and (grad[:, 0][batch.mask[:, 0]] < 0).all()


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
