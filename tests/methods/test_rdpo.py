"""rDPO against its paper: values and identities, and what it recovers from flipped labels."""

import inspect
import itertools
import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from claims.rdpo import LogLinear
from data import collate
from lab import Lab, Settings
from methods import dpo, survey
from methods.rdpo import PAPER, Config, loss, run
from tests import builders
from tests.builders import margins, one_pair, ragged, value_and_gradient
from toy.bandit import World
from toy.exact import population


def losses(z, epsilon, function=loss):
    """Losses of pairs with the margins z, in float64."""
    return function(*margins(torch.as_tensor(z, dtype=torch.float64)), Config(1.0, epsilon))[0]


def conservative_dpo(logps, ref_logps, batch, cfg):
    """DPO with smoothed labels, (1 - epsilon) l(z) + epsilon l(-z)."""
    plain = dpo.Config(cfg.beta)
    kept = dpo.loss(logps, ref_logps, batch, plain)[0]
    flipped = dpo.loss(*builders.swapped((logps, ref_logps, batch)), plain)[0]
    return (1 - cfg.epsilon) * kept + cfg.epsilon * flipped, {}


def slope(epsilon):
    return epsilon / (1 - 2 * epsilon)


# ---- values


@pytest.mark.paper
@pytest.mark.parametrize(
    ("z", "epsilon", "robust", "conservative", "weight", "conservative_weight"),
    [
        (0.15, 0.1, 0.602207, 0.635957, 0.587570, 0.362570),
        (0.15, 0.3, 0.508457, 0.665957, 1.212570, 0.162570),
        (1.0, 0.1, 0.188262, 0.413262, 0.393941, 0.168941),
        (1.0, 0.3, -0.436738, 0.613262, 1.018941, -0.031059),
        (-1.0, 0.3, 2.063262, 1.013262, 1.481059, 0.431059),
        (50.0, 0.3, -37.5, 15.0, 0.75, -0.3),
    ],
)
def test_values_and_slopes_of_both_corrections(
    z, epsilon, robust, conservative, weight, conservative_weight
):
    for function, value, minus_slope in (
        (loss, robust, weight),
        (conservative_dpo, conservative, conservative_weight),
    ):
        point = torch.tensor([z], dtype=torch.float64, requires_grad=True)
        ours, metrics = function(*margins(point), Config(1.0, epsilon))
        assert ours.item() == pytest.approx(value, abs=1e-6)
        (gradient,) = torch.autograd.grad(ours.sum(), point)
        assert -gradient.item() == pytest.approx(minus_slope, abs=1e-6)
        if function is loss:
            assert metrics["weight"].item() == pytest.approx(weight, abs=1e-6)
            assert not metrics["weight"].requires_grad


@pytest.mark.paper
def test_the_losses_have_the_values_of_the_worked_pair():
    """log pi (-12, -14), log pi_ref (-13, -13.5) at beta 0.1 is a margin of 0.15."""
    value, gradient = value_and_gradient(loss, *one_pair(-12.0, -14.0, -13.0, -13.5), Config())
    assert value.item() == pytest.approx(0.508457, abs=1e-6)
    expected = [-0.1 * 1.212570, 0.1 * 1.212570]
    assert gradient.flatten().tolist() == pytest.approx(expected, abs=1e-7)


@pytest.mark.paper
@pytest.mark.parametrize(("epsilon", "weight"), [(0.0, 0.5), (0.1, 0.625), (0.3, 1.25), (0.4, 2.5)])
def test_a_margin_of_0_costs_ln_2_and_has_half_the_amplified_weight(epsilon, weight):
    value, metrics = loss(*margins(0.0), Config(1.0, epsilon))
    assert value.item() == pytest.approx(math.log(2))
    assert metrics["weight"].item() == pytest.approx(weight)


def test_huge_margins_keep_their_slope():
    value, metrics = loss(*margins([-1e4, 1e4]), Config(1.0, 0.4))
    assert value.tolist() == pytest.approx([1e4 + 2e4, -2e4])
    assert metrics["weight"].item() == pytest.approx(2.5)


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_flips_it_is_dpo_bit_for_bit(dtype):
    item = ragged(dtype=dtype)
    ours = value_and_gradient(loss, *item, Config(0.3, 0.0))
    plain = value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    smoothed = value_and_gradient(conservative_dpo, *item, Config(0.3, 0.0))
    for other in (ours, smoothed):
        assert torch.equal(other[0], plain[0]) and torch.equal(other[1], plain[1])


@pytest.mark.paper
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_averaged_over_the_flips_it_is_dpo_on_clean_labels(epsilon):
    z = torch.linspace(-20, 20, 81, dtype=torch.float64).requires_grad_()
    mean = (1 - epsilon) * losses(z, epsilon) + epsilon * losses(-z, epsilon)
    torch.testing.assert_close(mean, -logsigmoid(z))
    (gradient,) = torch.autograd.grad(mean.sum(), z)
    torch.testing.assert_close(gradient, -torch.sigmoid(-z))


@pytest.mark.paper
@pytest.mark.parametrize(("z", "value"), [(0.7, 0.403186), (-2.0, 2.126928)])
def test_averaged_over_the_flips_in_numbers(z, value):
    mean = 0.7 * losses(z, 0.3) + 0.3 * losses(-z, 0.3)
    assert mean.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.35])
def test_the_closed_form_is_the_two_term_form(epsilon):
    z = torch.linspace(-29, 29, 117)  # float32
    item, wide = margins(z), z.double()
    robust, conservative = (
        function(*item, Config(1.0, epsilon))[0].double() for function in (loss, conservative_dpo)
    )
    kept, flipped = -logsigmoid(wide), -logsigmoid(-wide)
    two_terms = ((1 - epsilon) * kept - epsilon * flipped) / (1 - 2 * epsilon)
    smoothed = (1 - epsilon) * kept + epsilon * flipped
    torch.testing.assert_close(robust, two_terms, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conservative, smoothed, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(conservative, kept + epsilon * wide, rtol=1e-6, atol=1e-6)


def test_near_one_half_nothing_cancels():
    """In float32 the two-term form loses most of its digits at epsilon 0.499999."""
    epsilon, z = 0.499999, 3.0
    ours = loss(*margins(z), Config(1.0, epsilon))[0]
    exactly = math.log1p(math.exp(-z)) - slope(epsilon) * z
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(exactly, rel=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.4])
def test_rdpo_is_label_smoothing_with_a_negative_epsilon(epsilon):
    z = torch.linspace(-5, 5, 21, dtype=torch.float64)
    smoothed = -logsigmoid(z) + -slope(epsilon) * z
    torch.testing.assert_close(losses(z, epsilon), smoothed)


@pytest.mark.paper
@pytest.mark.parametrize("epsilon", [0.1, 0.3, 0.4])
def test_the_weight_has_a_floor_and_that_of_label_smoothing_changes_its_sign(epsilon):
    z = torch.linspace(-30, 30, 121, dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(losses(z, epsilon).sum(), z)
    two_terms = (1 - epsilon) * torch.sigmoid(-z) + epsilon * torch.sigmoid(z)
    torch.testing.assert_close(-gradient, two_terms / (1 - 2 * epsilon))
    torch.testing.assert_close(-gradient, torch.sigmoid(-z) + slope(epsilon))
    assert (-gradient > slope(epsilon)).all()
    turn = torch.tensor(math.log((1 - epsilon) / epsilon), dtype=torch.float64).requires_grad_()
    (gradient,) = torch.autograd.grad(losses(turn, epsilon, conservative_dpo).sum(), turn)
    assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_the_curvature_is_dpos(epsilon):
    z = torch.linspace(-5, 5, 21, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(losses(z, epsilon).sum(), z, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), z)
    torch.testing.assert_close(second, torch.sigmoid(z) * torch.sigmoid(-z))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.4])
def test_swapping_the_pair_changes_the_loss_by_the_amplified_margin(epsilon):
    z = torch.linspace(-5, 5, 21, dtype=torch.float64)
    difference = losses(z, epsilon) - losses(-z, epsilon)
    torch.testing.assert_close(difference, -z / (1 - 2 * epsilon))


@pytest.mark.paper
def test_several_annotations_of_one_pair_are_a_soft_label():
    share, epsilon = 0.62, 0.3
    q = (share - epsilon) / (1 - 2 * epsilon)
    assert q == pytest.approx(0.8)

    def averaged(z, function=loss, epsilon=epsilon):
        chosen, rejected = losses(z, epsilon, function), losses(-z, epsilon, function)
        return share * chosen + (1 - share) * rejected

    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(averaged(z), -q * logsigmoid(z) - (1 - q) * logsigmoid(-z))
    assert averaged(torch.tensor(0.9)).item() == pytest.approx(0.521154, abs=1e-6)
    grid = torch.linspace(-3, 3, 600001, dtype=torch.float64)
    minima = [
        grid[averaged(grid, *how).argmin()].item()
        for how in ((loss,), (loss, 0.0), (conservative_dpo,))
    ]
    assert minima == pytest.approx([1.386294, 0.489548, 0.192593], abs=1e-5)
    assert math.log(0.8 / 0.2) == pytest.approx(1.386294, abs=1e-6)
    assert share * 0.7 + (1 - share) * 0.3 == pytest.approx(0.548)  # label smoothing's label


@pytest.mark.paper
@pytest.mark.parametrize(
    ("share", "finite"), [(0.65, True), (0.69, True), (0.70, False), (0.8, False), (1.0, False)]
)
def test_a_pair_whose_labels_agree_too_often_has_no_minimum(share, finite):
    z = torch.tensor([200.0], dtype=torch.float64).requires_grad_()
    mean = share * losses(z, 0.3) + (1 - share) * losses(-z, 0.3)
    (far,) = torch.autograd.grad(mean.sum(), z)  # the loss has no minimum unless this is positive
    assert far.item() == pytest.approx(1 - (share - 0.3) / 0.4, abs=1e-9)
    assert (far.item() > 1e-9) == finite
    if share == 1.0:
        assert far.item() == pytest.approx(-slope(0.3))


@pytest.mark.paper
@pytest.mark.parametrize("function", [loss, conservative_dpo])
def test_gradients_on_ragged_responses(function):
    logps, ref_logps, batch = ragged()
    cfg = Config(0.7, 0.2)
    ratio = (logps - ref_logps).sum(-1).detach()
    z = 0.7 * (ratio[:, 0] - ratio[:, 1])
    weight = torch.sigmoid(-z) + (slope(0.2) if function is loss else -0.2)
    _, gradient = value_and_gradient(function, logps, ref_logps, batch, cfg)
    expected = 0.7 * weight[:, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(gradient, expected[..., None].expand_as(logps))  # a SUM over tokens


def test_a_constant_of_the_prompt_cancels():
    logps, ref_logps, batch = ragged()
    plain = loss(logps, ref_logps, batch, Config(0.5, 0.3))[0]
    constant = torch.zeros_like(logps)
    constant[..., 0] = 3.0
    for item in ((logps + constant, ref_logps), (logps, ref_logps + constant)):
        torch.testing.assert_close(loss(*item, batch, Config(0.5, 0.3))[0], plain)


def test_the_survey_has_the_same_conservative_dpo():
    item = ragged(seed=7)
    theirs = survey.loss(*item, survey.Config(variant="cdpo", beta=0.3, epsilon=0.2))[0]
    torch.testing.assert_close(theirs, conservative_dpo(*item, Config(0.3, 0.2))[0])


@pytest.mark.parametrize("epsilon", [-1e-9, -0.1, 0.5, 0.7, 1.0, math.inf, math.nan])
def test_a_flip_rate_that_cannot_be_undone_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon = .*\[0, 0\.5\)"):
        Config(epsilon=epsilon)


def test_the_largest_allowed_rate_is_finite():
    assert Config(epsilon=math.nextafter(0.5, 0)) and Config(epsilon=0.0)
    assert losses(1.0, 0.4999).isfinite()


# ---- the file and its run


def test_the_file_has_dpos_scaffold():
    assert (PAPER.family, PAPER.worlds, PAPER.ignores) == (
        dpo.PAPER.family,
        dpo.PAPER.worlds,
        dpo.PAPER.ignores,
    )
    assert PAPER.defaults == {"world": "reviews", "flip": 0.3, "prompts": 12800, "lr": 4e-4}
    assert inspect.getsource(run) == inspect.getsource(dpo.run)
    assert Config() == Config(beta=0.1, epsilon=0.3)


@pytest.mark.slow
def test_a_run_learns_through_flipped_labels():
    lab = Lab(
        Settings(world="bandit", flip=0.3, steps=60, batch_size=512, prompts=4096), quiet=True
    )
    policy = run(lab, Config(beta=0.5, epsilon=0.3))
    assert lab.evaluate(policy)["reward"] > lab.evaluate(lab.reference)["reward"] + 1


def test_scaling_a_log_linear_policy_reaches_every_kl_of_the_claims():
    table = LogLinear(torch.Generator().manual_seed(0))
    curve = table.scaled(table.truth)
    assert curve[0]["kl"] == pytest.approx(0.0, abs=1e-12)
    assert curve[0]["reward"] == pytest.approx(table.rewards.mean().item())
    assert max(look["kl"] for look in curve) > 1 and curve[-1]["reward"] > curve[0]["reward"]


def test_counts_of_labelled_pairs_follow_bradley_terry_with_flips():
    table = LogLinear(torch.Generator().manual_seed(1), prompts=1, responses=2)
    gap = (table.rewards[0, 0] - table.rewards[0, 1]).item()
    counts = table.counts(200_000, 0.3, torch.Generator().manual_seed(2))[0]
    share = dict(zip(map(tuple, table.pairs.tolist()), (counts / counts.sum()).tolist()))
    p = 1 / (1 + math.exp(-gap))
    assert share[0, 1] == pytest.approx(0.7 * p + 0.3 * (1 - p), abs=0.01)


# ---- the population: six responses, a uniform reference, beta 0.5


def six(prompts=1):
    """Six responses with known rewards and a uniform reference: at beta 0.5, E_pi*[r] = 1.2506."""
    rewards = torch.tensor([1.5, 1.0, 0.3, -0.2, -0.9, -1.7], dtype=torch.float64)
    return World(vocab=6, length=1, prompts=prompts, spread=0.0, rewards=rewards)


def errors(world, table):
    """Largest |h - r| per prompt (P,): the centred implicit reward h at beta 0.5 and the truth."""
    ratio = 0.5 * (table.log_probs() - world.reference.log_probs())
    return (ratio - ratio.mean(1, keepdim=True) - world.rewards()).abs().max(1).values.detach()


def measured(world, flip, cfg, function=loss):
    """(largest |h - r|, KL(pi* || pi), E_pi[r]) of the optimum of the expected loss."""
    table = population(world, world.pairs_all(flip=flip), function, cfg)
    best = world.optimum(world.reference, cfg.beta)
    return errors(world, table).item(), best.kl(table), table.expect(world.rewards())


@pytest.mark.paper
@pytest.mark.parametrize(
    ("flip", "plain", "conservative"),
    [
        (0.1, (0.5338, 0.0450, 1.0860), (0.8396, 0.1312, 0.9243)),
        (0.2, (0.9062, 0.1588, 0.8793), (1.2557, 0.3740, 0.5705)),
        (0.3, (1.2020, 0.3319, 0.6266), (1.5082, 0.6263, 0.2660)),
        (0.4, (1.4593, 0.5699, 0.3298), (1.6523, 0.8158, 0.0678)),
    ],
)
def test_flipped_labels_shrink_dpo_and_label_smoothing_more_and_rdpo_not_at_all(
    flip, plain, conservative
):
    world, cfg = six(), Config(0.5, flip)
    assert measured(world, flip, cfg) == pytest.approx((0.0, 0.0, 1.2506), abs=1e-4)
    assert measured(world, flip, Config(0.5, 0.0)) == pytest.approx(plain, abs=1e-4)
    assert measured(world, flip, cfg, conservative_dpo) == pytest.approx(conservative, abs=1e-4)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("assumed", "error"), [(0.0, 1.202), (0.1, 1.061), (0.2, 0.793), (0.3, 0.0), (0.35, 2.622)]
)
def test_a_wrong_guess_of_the_flip_rate(assumed, error):
    assert measured(six(), 0.3, Config(0.5, assumed))[0] == pytest.approx(error, abs=1e-3)


def far_slope(flip, epsilon):
    """Slope of the expected loss in h of the best response, as that grows without bound."""
    world = six()
    batch = collate(world.pairs_all(flip=flip))
    ref_logps = world.model().double().logps(batch).detach()
    policy = world.model().double()
    far = torch.zeros_like(policy.logits)
    far[..., 0] = 1e4
    policy.load_state_dict({"logits": far})
    values, _ = loss(policy.logps(batch), ref_logps, batch, Config(0.5, epsilon))
    (gradient,) = torch.autograd.grad((batch.weight.double() * values).mean(), policy.logits)
    return gradient.flatten()[0].item() / 0.5


@pytest.mark.paper
@pytest.mark.parametrize(
    ("assumed", "bounded"), [(0.0, True), (0.3, True), (0.35, True), (0.4, False)]
)
def test_too_high_a_guess_has_no_optimum(assumed, bounded):
    world = six()
    assert unbounded(world, world.pairs_all(flip=0.3), assumed).tolist() == [not bounded]
    r = world.rewards()[0]
    seen = 0.3 + 0.4 * torch.sigmoid(r[0] - r[1:])  # how often the best response is seen to win
    expected = (1 - assumed - seen).sum().item() / (1 - 2 * assumed) / 15
    assert far_slope(0.3, assumed) == pytest.approx(expected, abs=1e-6)
    assert (expected > 0) == bounded
    if assumed == 0.4:
        assert expected == pytest.approx(-0.0485, abs=1e-3)


def test_a_shrunken_reward_ranks_as_the_true_one():
    """Why the best response alone cannot tell the methods apart."""
    world = six()
    for function in (loss, conservative_dpo):
        for epsilon in (0.0, 0.3):
            pairs = world.pairs_all(flip=0.3)
            table = population(world, pairs, function, Config(0.5, epsilon))
            assert table.log_probs()[0].argsort().tolist() == world.rewards()[0].argsort().tolist()


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_recovery_holds_for_every_beta_and_a_reference_that_is_not_uniform(beta):
    world = World()
    pairs = world.pairs_all(world.reference, flip=0.25)
    table = population(world, pairs, loss, Config(beta, 0.25))
    assert (table.probs() - world.optimum(world.reference, beta).probs()).abs().max() < 1e-4


@pytest.mark.paper
@pytest.mark.parametrize(
    ("flip", "beta", "smaller"),
    [(0.2, 0.5, 0.2369), (0.4, 0.5, 0.0719), (0.4, 1.0, 0.1464), (0.4, 0.2, 0.0270)],
)
def test_at_matched_kl_dpo_with_a_smaller_beta_is_all_but_as_good(flip, beta, smaller):
    """rDPO's optimum is on the frontier of reward against KL; DPO's is within a thousandth."""
    world = six()
    pairs = world.pairs_all(flip=flip)
    ours, other = (
        population(world, pairs, loss, cfg) for cfg in (Config(beta, flip), Config(smaller, 0.0))
    )
    assert ours.kl(world.reference) == pytest.approx(other.kl(world.reference), abs=2e-3)
    gap = abs(ours.expect(world.rewards()) - other.expect(world.rewards()))
    assert gap < 1e-3
    if (flip, beta) == (0.4, 0.5):
        assert ours.kl(world.reference) == pytest.approx(0.886, abs=1e-3)
        assert gap == pytest.approx(0.0004, abs=3e-4)


# ---- finitely many pairs


def sampled(world, flip, n):
    """All pairs, weighted by their counts in n draws per prompt instead of their probabilities."""
    rows = world.pairs_all(flip=flip)
    chance = torch.tensor([row["weight"] for row in rows], dtype=torch.float64)
    chance = chance.view(len(world.rewards()), -1)
    rng = torch.Generator().manual_seed(0)
    draws = torch.multinomial(chance, n, replacement=True, generator=rng)
    counts = torch.stack([draw.bincount(minlength=chance.shape[1]) for draw in draws])
    weights = (counts.flatten() / n * chance.shape[1]).tolist()
    return [row | {"weight": weight} for row, weight in zip(rows, weights)]


def unbounded(world, rows, epsilon):
    """(P,) bool: whether the weighted loss has no minimum.

    For large h the loss is linear in h for a fixed order of the responses. So it is enough to check
    every set of responses that moves away from the rest: it must not win more often than
    1 - epsilon against the rest."""
    count = len(world.reference.sequences())
    weight = torch.zeros(len(world.rewards()), count, count, dtype=torch.float64)
    for row in rows:
        (winner,), (loser,) = row["responses"]
        weight[row["prompt"], winner, loser] = row["weight"]
    cost = (1 - epsilon) * (weight + weight.mT) - weight  # per unit of the first above the second
    found = torch.zeros(len(weight), dtype=torch.bool)
    for members in itertools.product([False, True], repeat=count):
        inside = torch.tensor(members)
        found |= cost[:, inside][:, :, ~inside].sum((1, 2)) < 0
    return found


# mean over 20 draws of the largest |h - r|; a band is about four standard errors of such a mean
@pytest.mark.paper
@pytest.mark.parametrize(
    ("n", "flip", "mean", "band"),
    [(20_000, 0.1, 0.0544, 0.02), (20_000, 0.3, 0.1422, 0.05), (20_000, 0.4, 0.2928, 0.1)]
    + [(200_000, 0.1, 0.0236, 0.01), (200_000, 0.3, 0.0416, 0.015), (200_000, 0.4, 0.0901, 0.03)],
)
def test_the_error_falls_with_the_number_of_pairs(n, flip, mean, band):
    world = six(prompts=20)
    table = population(world, sampled(world, flip, n), loss, Config(0.5, flip))
    assert errors(world, table).mean().item() == pytest.approx(mean, abs=band)


@pytest.mark.paper
@pytest.mark.parametrize(("flip", "mean"), [(0.1, 0.5428), (0.3, 1.1969), (0.4, 1.4550)])
def test_dpo_does_not_improve_with_the_number_of_pairs(flip, mean):
    world = six(prompts=20)
    for n in (20_000, 200_000):
        table = population(world, sampled(world, flip, n), loss, Config(0.5, 0.0))
        assert errors(world, table).mean().item() == pytest.approx(mean, abs=0.03)


@pytest.mark.paper
def test_few_pairs_and_many_flips_diverge():
    world = six(prompts=20)
    share = unbounded(world, sampled(world, 0.4, 2000), 0.4).double().mean().item()
    assert 0 < share < 0.9  # some draws have no optimum
    assert not unbounded(world, sampled(world, 0.4, 20_000), 0.4).any()


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3, epsilon=0.2), dict(beta=1.7, epsilon=0.0)]
INPUTS = builders.pairs
SURVIVORS = {}
