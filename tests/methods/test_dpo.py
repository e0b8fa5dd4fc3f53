"""DPO against its paper: numbers, gradients, identities, and the optimum in a table."""

import math
from types import SimpleNamespace

import pytest
import torch

from data import collate
from methods import sft
from methods.dpo import Config, loss
from tests import builders
from tests.builders import one_pair, ragged, value_and_gradient
from toy.bandit import World
from toy.exact import Table, population

# ---- values and gradients


@pytest.mark.paper
def test_at_the_reference_the_loss_is_ln_2_and_the_gradient_half_beta():
    logps, _, batch = ragged()
    losses, gradient = value_and_gradient(loss, logps, logps.detach(), batch, Config(beta=0.1))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-12)
    expected = torch.tensor([-0.05, 0.05], dtype=torch.float64)[:, None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize(
    "beta, value, slope", [(0.1, 0.620957, -0.0462570), (0.5, 0.386871, -0.160411)]
)
def test_the_loss_has_the_value_of_the_worked_example(beta, value, slope):
    item, cfg = one_pair(-12.0, -14.0, -13.0, -13.5), Config(beta=beta)
    losses, gradient = value_and_gradient(loss, *item, cfg)
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-6)
    weight = loss(*item, cfg)[1]["weight"].item()
    assert weight == pytest.approx(-slope / beta, abs=1e-5)
    if beta == 0.1:
        assert weight == pytest.approx(0.462570, abs=1e-6)


@pytest.mark.paper
def test_with_a_uniform_reference_the_example_has_its_value():
    logps, _, batch = one_pair(-12.0, -14.0)
    value = loss(logps, torch.zeros_like(logps), batch, Config(beta=0.1))[0].item()
    assert value == pytest.approx(0.598139, abs=1e-6)


@pytest.mark.paper
def test_the_gradient_is_the_closed_form():
    logps, ref_logps, batch = ragged(seed=1)
    beta = 0.3
    _, gradient = value_and_gradient(loss, logps, ref_logps, batch, Config(beta=beta))
    ratio = (logps - ref_logps).sum(-1).detach()
    weight = beta * torch.sigmoid(-beta * (ratio[:, 0] - ratio[:, 1]))
    expected = torch.stack([-weight, weight], 1)[..., None]  # alike for every token: a SUM
    torch.testing.assert_close(gradient, expected.expand_as(gradient), rtol=0, atol=1e-12)


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = builders.everything_scored(logps)
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, Config(beta=1.0))
    assert losses.item() == pytest.approx(math.log1p(math.e), abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(dtype, margin):
    item = one_pair(margin, 0.0, dtype=dtype)
    losses, gradient = value_and_gradient(loss, *item, Config(beta=1.0))
    assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_beta_must_be_positive_and_finite(beta):
    with pytest.raises(ValueError, match="beta"):
        Config(beta=beta)


# ---- identities


@pytest.mark.paper
def test_padding_and_the_other_rows_change_nothing():
    logps, ref_logps, batch = ragged(seed=2)
    plain, mask = loss(logps, ref_logps, batch, Config(beta=0.4))[0], batch.mask
    padded = [torch.nn.functional.pad(x, (0, 3)) for x in (logps, ref_logps, mask)]
    wide = loss(*padded[:2], SimpleNamespace(mask=padded[2]), Config(beta=0.4))[0]
    torch.testing.assert_close(wide, plain, rtol=0, atol=1e-12)
    for b in range(len(plain)):
        one = [x[b : b + 1] for x in (logps, ref_logps, mask)]
        alone = loss(*one[:2], SimpleNamespace(mask=one[2]), Config(beta=0.4))[0]
        torch.testing.assert_close(alone[0], plain[b], rtol=0, atol=1e-12)


@pytest.mark.paper
def test_swapping_the_pair_changes_the_loss_by_the_margin():
    logps, ref_logps, batch = ragged()
    cfg = Config(beta=0.7)
    there, _ = loss(logps, ref_logps, batch, cfg)
    back, _ = loss(*builders.swapped((logps, ref_logps, batch)), cfg)
    ratio = (logps - ref_logps).sum(-1)
    margin = 0.7 * (ratio[:, 0] - ratio[:, 1])
    torch.testing.assert_close(there - back, -margin, rtol=0, atol=1e-12)


@pytest.mark.paper
def test_a_constant_of_the_prompt_cancels():
    logps, ref_logps, batch = ragged(seed=2)
    plain = loss(logps, ref_logps, batch, Config(beta=0.4))[0]
    constant = torch.zeros_like(logps)
    constant[..., 0] = torch.tensor([1.5, -2.0, 0.3, 4.0, -0.7], dtype=torch.float64)[:, None]
    for item in ((logps + constant, ref_logps), (logps, ref_logps + constant)):
        moved = loss(*item, batch, Config(beta=0.4))[0]
        torch.testing.assert_close(moved, plain, rtol=0, atol=1e-12)


@pytest.mark.paper
def test_plackett_luce_of_two_responses_is_dpo():
    rewards = torch.tensor([0.5, 0.1, -0.4], dtype=torch.float64)
    full = sum(torch.logsumexp(rewards[k:], 0) - rewards[k] for k in range(3))
    assert full.item() == pytest.approx(1.204948, abs=1e-6)
    value = loss(*one_pair(0.5, 0.1), Config(beta=1.0))[0].item()
    assert value == pytest.approx(0.513015, abs=1e-6)


@pytest.mark.paper
def test_the_chosen_probability_can_fall_while_the_loss_falls():
    """One shared parameter, features (chosen, rejected, other) = (1, 2, 0): no finite optimum."""
    reference = -math.log(3)
    for theta, p_chosen, value in [
        (0, 0.33333, 0.693147),
        (-1, 0.24473, 0.644397),
        (-2, 0.11731, 0.598139),
        (-4, 0.01798, 0.513015),
    ]:
        logp = (theta * torch.tensor([1.0, 2.0, 0.0], dtype=torch.float64)).log_softmax(0).tolist()
        assert math.exp(logp[0]) == pytest.approx(p_chosen, abs=1e-5)
        item = one_pair(logp[0], logp[1], reference, reference)
        assert loss(*item, Config(beta=0.1))[0].item() == pytest.approx(value, abs=1e-6)


# ---- the optimum in a table


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 2.0])
def test_the_population_gradient_vanishes_at_the_optimum_of_every_beta(beta):
    world = World()
    batch, reference = collate(world.pairs_all(world.reference)), world.reference
    policy = Table(*world.shape).double()
    policy.set_log_probs(world.optimum(reference, beta).log_probs())
    ref_logps = reference.double().logps(batch)

    def gradient(policy):
        losses, _ = loss(policy.logps(batch), ref_logps, batch, Config(beta=beta))
        (slope,) = torch.autograd.grad((losses * batch.weight).mean(), policy.logits)
        return slope.abs().max().item()

    assert gradient(policy) < 1e-7
    policy.set_log_probs(reference.log_probs())
    assert gradient(policy) > 1e-4


@pytest.mark.slow
@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 2.0])
def test_dpo_reaches_the_optimum_of_reward_minus_beta_kl_and_sft_does_not(beta):
    """J = E[r] - beta KL, over all pairs of 27 responses; the implicit reward is r + a constant."""
    world = World()
    pairs = world.pairs_all(world.reference)
    best = world.objective(world.optimum(world.reference, beta), beta)
    policy = population(world, pairs, loss, Config(beta=beta))
    assert world.objective(policy, beta) == pytest.approx(best, abs=1e-5)
    implicit = beta * (policy.log_probs() - world.reference.log_probs())
    gap = implicit - world.rewards()
    assert (gap - gap.mean()).abs().max() < 1e-2
    tuned = world.objective(population(world, pairs, sft.loss, sft.Config()), beta)
    assert tuned < best - 0.02


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
