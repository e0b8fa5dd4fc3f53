"""rDPO: its values and identities in closed form, its errors, and what it recovers from flipped labels where all can be enumerated."""

import inspect
import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from claims.rdpo import (
    conservative_dpo,
    far_slope,
    on_reviews,
    on_six_responses,
    same_kl,
    six,
)
from lab import Lab, Settings
from methods import dpo
from methods.rdpo import PAPER, Config, loss, run
from tests import builders
from toy.bandit import World
from toy.exact import population


def pair(z, beta=1.0):
    """Log-probs (B, 2, 1) whose margin beta * (chosen - rejected) is z (B,), a zero reference, and a batch."""
    z = torch.as_tensor(z, dtype=torch.float64).reshape(-1)
    logps = torch.stack([z / (2 * beta), -z / (2 * beta)], 1)[..., None]
    return (
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)),
    )


def losses(z, epsilon, function=loss, beta=1.0):
    return function(*pair(z, beta), Config(beta, epsilon))[0]


def ragged(seed=0, B=5, T=7, dtype=torch.float64):
    """Random log-probs of policy and reference, 0 outside a mask of 1 to T tokens."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(T) < torch.randint(1, T + 1, (B, 2, 1), generator=rng)
    logps, ref_logps = (
        -3 * torch.rand(B, 2, T, generator=rng, dtype=dtype) * mask for _ in range(2)
    )
    return logps.requires_grad_(), ref_logps, SimpleNamespace(mask=mask)


def slope(epsilon):
    return epsilon / (1 - 2 * epsilon)


# ---- values


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
        logps = torch.stack([point, torch.zeros_like(point)], 1)[..., None]
        ours, metrics = function(
            logps,
            torch.zeros_like(logps),
            SimpleNamespace(mask=logps != math.inf),
            Config(1.0, epsilon),
        )
        assert ours.item() == pytest.approx(value, abs=1e-6)
        assert -torch.autograd.grad(ours.sum(), point)[0].item() == pytest.approx(
            minus_slope, abs=1e-6
        )
        if function is loss:
            assert (
                metrics["weight"].item() == pytest.approx(weight, abs=1e-6)
                and not metrics["weight"].requires_grad
            )


def test_the_worked_pair():
    """log pi (-12, -14), log pi_ref (-13, -13.5) at beta 0.1 is a margin of 0.15."""
    logps = torch.tensor([[[-12.0], [-14.0]]], dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    value, _ = loss(
        logps, torch.tensor([[[-13.0], [-13.5]]], dtype=torch.float64), batch, Config(0.1, 0.3)
    )
    assert value.item() == pytest.approx(0.508457, abs=1e-6)
    gradient = torch.autograd.grad(value.sum(), logps)[0].flatten().tolist()
    assert gradient == pytest.approx([-0.1 * 1.212570, 0.1 * 1.212570], abs=1e-7)


@pytest.mark.parametrize(("epsilon", "weight"), [(0.0, 0.5), (0.1, 0.625), (0.3, 1.25), (0.4, 2.5)])
def test_no_margin_costs_ln_2_and_pulls_with_half_the_amplified_weight(epsilon, weight):
    value, metrics = loss(*pair(0.0), Config(1.0, epsilon))
    assert value.item() == pytest.approx(math.log(2)) and metrics["weight"].item() == pytest.approx(
        weight
    )


# ---- identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_flips_it_is_dpo_bit_for_bit(dtype):
    logps, ref_logps, batch = ragged(dtype=dtype)
    for function, cfg in ((loss, Config(0.3, 0.0)), (conservative_dpo, Config(0.3, 0.0))):
        ours, plain = (
            function(logps, ref_logps, batch, cfg)[0],
            dpo.loss(logps, ref_logps, batch, dpo.Config(0.3))[0],
        )
        assert torch.equal(ours, plain)
        assert torch.equal(*(torch.autograd.grad(x.sum(), logps)[0] for x in (ours, plain)))


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_averaged_over_the_flips_it_is_dpo_on_clean_labels(epsilon):
    z = torch.linspace(-20, 20, 81, dtype=torch.float64).requires_grad_()
    logps, _, batch = pair(z)
    turned = logps.flip(1)  # the same pair with its label turned round
    kept, flipped = (
        loss(x, torch.zeros_like(x), batch, Config(1.0, epsilon))[0] for x in (logps, turned)
    )
    mean = (1 - epsilon) * kept + epsilon * flipped
    torch.testing.assert_close(mean, -logsigmoid(z))
    (gradient,) = torch.autograd.grad(mean.sum(), z)
    torch.testing.assert_close(gradient, -torch.sigmoid(-z))


def test_averaged_over_the_flips_in_numbers():
    for z, value in ((0.7, 0.403186), (-2.0, 2.126928)):
        assert (0.7 * losses(z, 0.3) + 0.3 * losses(-z, 0.3)).item() == pytest.approx(
            value, abs=1e-6
        )


@pytest.mark.parametrize("epsilon", [0.05, 0.2, 0.35])
def test_the_closed_form_is_the_two_term_form(epsilon):
    z = torch.linspace(-29, 29, 117)  # float32
    logps = torch.stack([z, torch.zeros_like(z)], 1)[..., None]
    mask = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool))
    robust, conservative = (
        f(logps, torch.zeros_like(logps), mask, Config(1.0, epsilon))[0]
        for f in (loss, conservative_dpo)
    )
    kept, turned = -logsigmoid(z.double()), -logsigmoid(-z.double())
    torch.testing.assert_close(
        robust.double(),
        ((1 - epsilon) * kept - epsilon * turned) / (1 - 2 * epsilon),
        rtol=1e-6,
        atol=1e-6,
    )
    torch.testing.assert_close(
        conservative.double(), (1 - epsilon) * kept + epsilon * turned, rtol=1e-6, atol=1e-6
    )
    torch.testing.assert_close(
        conservative.double(), kept + epsilon * z.double(), rtol=1e-6, atol=1e-6
    )


def test_near_one_half_nothing_cancels():
    """In float32 the two-term form loses most of its digits at epsilon 0.499999; the closed form does not."""
    epsilon, z = 0.499999, 3.0
    logps = torch.tensor([[[z], [0.0]]])
    ours = loss(
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)),
        Config(1.0, epsilon),
    )[0]
    exactly = math.log1p(math.exp(-z)) - slope(epsilon) * z
    assert ours.item() == pytest.approx(exactly, rel=1e-6)


def test_robust_and_conservative_are_one_family():
    """rDPO with epsilon is label smoothing with -epsilon / (1 - 2 epsilon)."""
    z = torch.linspace(-5, 5, 21, dtype=torch.float64)
    for epsilon in (0.1, 0.3, 0.4):
        smoothed = conservative_dpo(*pair(z), SimpleNamespace(beta=1.0, epsilon=-slope(epsilon)))[0]
        torch.testing.assert_close(losses(z, epsilon), smoothed)


def test_the_weight_is_never_below_its_floor_while_label_smoothing_turns_round():
    z = torch.linspace(-30, 30, 121, dtype=torch.float64).requires_grad_()
    for epsilon in (0.1, 0.3, 0.4):
        (gradient,) = torch.autograd.grad(loss(*pair(z), Config(1.0, epsilon))[0].sum(), z)
        two_terms = ((1 - epsilon) * torch.sigmoid(-z) + epsilon * torch.sigmoid(z)) / (
            1 - 2 * epsilon
        )
        torch.testing.assert_close(-gradient, two_terms)
        torch.testing.assert_close(-gradient, torch.sigmoid(-z) + slope(epsilon))
        assert (-gradient > slope(epsilon)).all()
        turn = torch.tensor(
            [math.log((1 - epsilon) / epsilon)], dtype=torch.float64
        ).requires_grad_()
        (gradient,) = torch.autograd.grad(
            conservative_dpo(*pair(turn), Config(1.0, epsilon))[0].sum(), turn
        )
        assert gradient.item() == pytest.approx(0, abs=1e-12)


@pytest.mark.parametrize("epsilon", [0.0, 0.1, 0.3, 0.45])
def test_the_curvature_is_dpos(epsilon):
    z = torch.linspace(-5, 5, 21, dtype=torch.float64).requires_grad_()
    (first,) = torch.autograd.grad(
        loss(*pair(z), Config(1.0, epsilon))[0].sum(), z, create_graph=True
    )
    (second,) = torch.autograd.grad(first.sum(), z)
    torch.testing.assert_close(second, torch.sigmoid(z) * torch.sigmoid(-z))


def test_swapping_a_pair():
    z = torch.linspace(-5, 5, 21, dtype=torch.float64)
    for epsilon in (0.0, 0.2, 0.4):
        torch.testing.assert_close(losses(z, epsilon) - losses(-z, epsilon), -z / (1 - 2 * epsilon))


def test_several_annotations_of_one_pair_are_a_soft_label():
    share, epsilon = 0.62, 0.3
    q = (share - epsilon) / (1 - 2 * epsilon)
    assert q == pytest.approx(0.8)

    def averaged(z, function=loss):
        return share * losses(z, epsilon, function) + (1 - share) * losses(-z, epsilon, function)

    z = torch.linspace(-4, 4, 33, dtype=torch.float64)
    torch.testing.assert_close(averaged(z), -q * logsigmoid(z) - (1 - q) * logsigmoid(-z))
    assert averaged(torch.tensor(0.9)).item() == pytest.approx(0.521154, abs=1e-6)

    def minimum(function):
        z = torch.linspace(-3, 3, 600001, dtype=torch.float64)
        return z[averaged(z, function).argmin()].item()

    assert minimum(loss) == pytest.approx(1.386294, abs=1e-5) == math.log(0.8 / 0.2)
    assert minimum(lambda *a: dpo.loss(*a[:3], dpo.Config(1.0))) == pytest.approx(
        0.489548, abs=1e-5
    )
    assert minimum(conservative_dpo) == pytest.approx(0.192593, abs=1e-5)
    assert share * 0.7 + (1 - share) * 0.3 == pytest.approx(
        0.548
    )  # what label smoothing takes the label for


@pytest.mark.parametrize(
    ("share", "finite"), [(0.65, True), (0.69, True), (0.70, False), (0.8, False), (1.0, False)]
)
def test_a_pair_annotated_alike_too_often_has_no_minimum(share, finite):
    z = torch.tensor([200.0], dtype=torch.float64).requires_grad_()
    mean = (
        share * loss(*pair(z), Config(1.0, 0.3))[0]
        + (1 - share) * loss(*pair(-z), Config(1.0, 0.3))[0]
    )
    (end,) = torch.autograd.grad(mean.sum(), z)
    assert end.item() == pytest.approx(
        1 - (share - 0.3) / 0.4, abs=1e-9
    )  # the slope far out, downhill for ever unless positive
    assert (end.item() > 1e-9) == finite
    if share == 1.0:
        assert end.item() == pytest.approx(-slope(0.3))


# ---- ragged responses, gradients


@pytest.mark.parametrize("function", [loss, conservative_dpo])
def test_gradients_on_ragged_responses(function):
    logps, ref_logps, batch = ragged()
    cfg = Config(0.7, 0.2)
    assert torch.autograd.gradcheck(lambda x: function(x, ref_logps, batch, cfg)[0], (logps,))
    assert torch.autograd.gradcheck(
        lambda x: function(logps.detach(), x, batch, cfg)[0], (ref_logps.clone().requires_grad_(),)
    )
    ratio = (logps - ref_logps).sum(-1).detach()
    z = 0.7 * (ratio[:, 0] - ratio[:, 1])
    weight = torch.sigmoid(-z) + (slope(0.2) if function is loss else -0.2)
    (gradient,) = torch.autograd.grad(function(logps, ref_logps, batch, cfg)[0].sum(), logps)
    expected = (
        0.7 * weight[:, None] * torch.tensor([-1.0, 1.0])
    )  # the same for every token: a sum, not a mean
    torch.testing.assert_close(gradient, expected[..., None].expand_as(logps).double())


def test_a_prompts_constant_padding_order_and_batch_do_not_matter():
    logps, ref_logps, batch = ragged()
    logps, cfg = logps.detach(), Config(0.5, 0.3)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    constant = torch.zeros_like(logps)
    constant[..., 0] = 3.0
    torch.testing.assert_close(loss(logps + constant, ref_logps, batch, cfg)[0], plain)
    torch.testing.assert_close(loss(logps, ref_logps + constant, batch, cfg)[0], plain)
    wider = [torch.nn.functional.pad(x, (0, 4)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(loss(*wider[:2], SimpleNamespace(mask=wider[2]), cfg)[0], plain)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        loss(logps[order], ref_logps[order], SimpleNamespace(mask=batch.mask[order]), cfg)[0],
        plain[order],
    )
    for b in range(5):
        one = [x[b : b + 1] for x in (logps, ref_logps, batch.mask)]
        torch.testing.assert_close(
            loss(*one[:2], SimpleNamespace(mask=one[2]), cfg)[0], plain[b : b + 1]
        )


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_dtypes(dtype, out):
    logps, ref_logps, batch = ragged()
    value, metrics = loss(logps.detach().to(dtype), ref_logps.to(dtype), batch, Config())
    assert (
        value.shape == (5,)
        and value.dtype == out
        and metrics["weight"].shape == ()
        and value.isfinite().all()
    )


def test_huge_margins_stay_finite():
    value, metrics = loss(*pair([-1e4, 1e4]), Config(1.0, 0.4))
    assert value.tolist() == pytest.approx([1e4 + 2e4, -2e4]) and metrics[
        "weight"
    ].item() == pytest.approx(2.5)


# ---- errors


@pytest.mark.parametrize("epsilon", [-1e-9, -0.1, 0.5, 0.7, 1.0, math.inf, math.nan])
def test_a_flip_rate_out_of_range_is_refused(epsilon):
    with pytest.raises(ValueError, match=r"epsilon = .*\[0, 0\.5\)"):
        Config(epsilon=epsilon)


@pytest.mark.parametrize("beta", [0.0, -0.1, math.inf, math.nan])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta = "):
        Config(beta=beta)


def test_the_largest_allowed_rate_is_finite():
    assert (
        Config(epsilon=math.nextafter(0.5, 0))
        and Config(epsilon=0.0)
        and losses(1.0, 0.4999).isfinite()
    )


def test_rows_that_are_no_pairs_are_refused():
    batch = SimpleNamespace(mask=torch.ones(2, 3, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), batch, Config())
    logps, ref_logps, batch = ragged()
    batch.mask[1, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the file


def test_the_file_has_the_parts_that_all_have():
    assert (PAPER.family, PAPER.worlds) == ("pairs", ("text", "images", "table"))
    assert PAPER.defaults == {"world": "reviews", "flip": 0.3, "prompts": 12800, "lr": 4e-4}
    assert inspect.getsource(run) == inspect.getsource(dpo.run)
    assert Config() == Config(beta=0.1, epsilon=0.3)


def test_a_run_learns_through_flipped_labels():
    lab = Lab(
        Settings(world="bandit", flip=0.3, steps=60, batch_size=512, prompts=4096), quiet=True
    )
    policy = run(lab, Config(beta=0.5, epsilon=0.3))
    assert lab.evaluate(policy)["reward"] > lab.evaluate(lab.reference)["reward"] + 1


# ---- the population: six responses, a uniform reference, beta 0.5


def measured(world, flip, cfg, function=loss):
    """(largest |h - r|, KL(pi* || pi), E_pi[r]) of the fit to the expected loss; h = beta * centred log-ratio, the implicit reward."""
    table = population(world, world.pairs_all(flip=flip), function, cfg)
    ratio = cfg.beta * (table.log_probs() - world.reference.log_probs())
    error = (ratio - ratio.mean(1, keepdim=True) - world.rewards()).abs().max().item()
    return error, world.optimum(world.reference, cfg.beta).kl(table), table.expect(world.rewards())


@pytest.mark.parametrize(
    ("flip", "plain", "conservative"),
    [
        (0.1, (0.5338, 0.0450, 1.0860), (0.8396, 0.1312, 0.9243)),
        (0.2, (0.9062, 0.1588, 0.8793), (1.2557, 0.3740, 0.5705)),
        (0.3, (1.2020, 0.3319, 0.6266), (1.5082, 0.6263, 0.2660)),
        (0.4, (1.4593, 0.5699, 0.3298), (1.6523, 0.8158, 0.0678)),
    ],
)
def test_flipped_labels_shrink_dpo_and_more_so_label_smoothing_and_not_at_all_rdpo(
    flip, plain, conservative
):
    world = six()
    assert measured(world, flip, Config(0.5, flip)) == pytest.approx((0.0, 0.0, 1.2506), abs=1e-4)
    assert measured(world, flip, Config(0.5, 0.0)) == pytest.approx(plain, abs=1e-4)
    assert measured(world, flip, Config(0.5, flip), conservative_dpo) == pytest.approx(
        conservative, abs=1e-4
    )


@pytest.mark.parametrize(
    ("assumed", "error"), [(0.0, 1.202), (0.1, 1.061), (0.2, 0.793), (0.3, 0.0), (0.35, 2.622)]
)
def test_a_wrong_guess_of_the_flip_rate(assumed, error):
    assert measured(six(), 0.3, Config(0.5, assumed))[0] == pytest.approx(error, abs=1e-3)


@pytest.mark.parametrize(
    ("assumed", "bounded"), [(0.0, True), (0.3, True), (0.35, True), (0.4, False)]
)
def test_too_high_a_guess_has_no_optimum(assumed, bounded):
    world = six()
    assert unbounded(world, world.pairs_all(flip=0.3), assumed).tolist() == [not bounded]
    r = world.rewards()[0]
    seen = 0.3 + 0.4 * torch.sigmoid(r[0] - r[1:])  # how often the best response is seen to win
    slope = (1 - assumed - seen).sum().item() / (1 - 2 * assumed) / 15
    assert far_slope(0.3, assumed) == pytest.approx(slope, abs=1e-6) and (slope > 0) == bounded


def test_a_shrunken_reward_ranks_as_the_true_one():
    """Why the best response alone cannot tell the methods apart."""
    world = six()
    for function in (loss, conservative_dpo):
        for epsilon in (0.0, 0.3):
            table = population(world, world.pairs_all(flip=0.3), function, Config(0.5, epsilon))
            assert table.log_probs()[0].argsort().tolist() == world.rewards()[0].argsort().tolist()


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_recovery_holds_for_every_beta_and_a_reference_that_is_not_uniform(beta):
    world = World()
    table = population(world, world.pairs_all(world.reference, flip=0.25), loss, Config(beta, 0.25))
    assert (table.probs() - world.optimum(world.reference, beta).probs()).abs().max() < 1e-4


# mean over 20 draws of the largest |h - r|; the bands are four standard errors of such a mean, roughly
@pytest.mark.parametrize(
    ("n", "flip", "mean", "band"),
    [(20_000, 0.1, 0.0544, 0.02), (20_000, 0.3, 0.1422, 0.05), (20_000, 0.4, 0.2928, 0.1)]
    + [(200_000, 0.1, 0.0236, 0.01), (200_000, 0.3, 0.0416, 0.015), (200_000, 0.4, 0.0901, 0.03)],
)
def test_the_error_falls_with_the_number_of_pairs(n, flip, mean, band):
    world = six(prompts=20)
    table = population(world, sampled(world, flip, n), loss, Config(0.5, flip))
    assert errors(world, table).mean().item() == pytest.approx(mean, abs=band)


def test_dpo_does_not_improve_with_the_number_of_pairs():
    world = six(prompts=20)
    for n in (20_000, 200_000):
        for flip, mean in ((0.1, 0.5428), (0.3, 1.1969), (0.4, 1.4550)):
            table = population(world, sampled(world, flip, n), loss, Config(0.5, 0.0))
            assert errors(world, table).mean().item() == pytest.approx(mean, abs=0.03)


def test_few_pairs_and_many_flips_diverge():
    world = six(prompts=20)
    share = unbounded(world, sampled(world, 0.4, 2000), 0.4).double().mean().item()
    assert 0 < share < 0.9  # some draws have no optimum
    assert not unbounded(world, sampled(world, 0.4, 20_000), 0.4).any()


def unbounded(world, rows, epsilon):
    """(P,) bool: has the weighted loss no minimum? Far out it is linear in h where the order of the responses is fixed, so it is enough to
    look along the sets of responses that leave the rest behind: wins over the rest must not be seen more often than 1 - epsilon."""
    count = len(world.reference.sequences())
    weight = torch.zeros(len(world.rewards()), count, count, dtype=torch.float64)
    for row in rows:
        (winner,), (loser,) = row["responses"]
        weight[row["prompt"], winner, loser] = row["weight"]
    cost = (1 - epsilon) * (
        weight + weight.mT
    ) - weight  # of every unit by which the first is above the second
    found = torch.zeros(len(weight), dtype=torch.bool)
    for members in itertools.product([False, True], repeat=count):
        inside = torch.tensor(members)
        found |= cost[:, inside][:, :, ~inside].sum((1, 2)) < 0
    return found


def sampled(world, flip, n):
    """All pairs with counts of n draws in place of their probabilities, each prompt's by itself."""
    rows = world.pairs_all(flip=flip)
    chance = torch.tensor([row["weight"] for row in rows], dtype=torch.float64).view(
        len(world.rewards()), -1
    )
    rng = torch.Generator().manual_seed(0)
    draws = torch.multinomial(chance, n, replacement=True, generator=rng)
    counts = (
        torch.stack([d.bincount(minlength=chance.shape[1]) for d in draws]).flatten()
        / n
        * chance.shape[1]
    )
    return [row | {"weight": count} for row, count in zip(rows, counts.tolist())]


def errors(world, table):
    ratio = 0.5 * (table.log_probs() - world.reference.log_probs())
    return (ratio - ratio.mean(1, keepdim=True) - world.rewards()).abs().max(1).values.detach()


@pytest.mark.parametrize(
    ("flip", "beta", "smaller"),
    [(0.2, 0.5, 0.2369), (0.4, 0.5, 0.0719), (0.4, 1.0, 0.1464), (0.4, 0.2, 0.0270)],
)
def test_at_one_kl_dpo_with_a_smaller_beta_is_all_but_as_good(flip, beta, smaller):
    """rDPO's optimum is on the frontier of reward against KL; DPO's leaves it by less than a thousandth."""
    world = six()
    ours, other = (
        population(world, world.pairs_all(flip=flip), loss, cfg)
        for cfg in (Config(beta, flip), Config(smaller, 0.0))
    )
    assert ours.kl(world.reference) == pytest.approx(other.kl(world.reference), abs=2e-3)
    gap = ours.expect(world.rewards()) - other.expect(world.rewards())
    assert abs(gap) < 1e-3


def test_the_exact_claims():
    claims = on_six_responses(Lab(Settings(), quiet=True))
    assert len(claims) == 6 and all(c["holds"] and c["expected"] for c in claims)
    control = same_kl(Lab(Settings(), quiet=True))
    assert (
        not control["holds"]
        and not control["expected"]
        and abs(control["difference"]) == pytest.approx(0.0004, abs=3e-4)
    )
    assert "0.886 and 0.886" in control["text"]


@pytest.mark.parametrize("flip", [0.2, 0.4])
def test_the_contest_on_reviews_is_what_its_names_say(flip):
    seen = []

    def at(seed, flip, **how):
        def align(policy, data, objective, cfg):
            seen.append((seed, flip, data, objective, cfg.beta, cfg.epsilon))
            return len(seen)

        return SimpleNamespace(
            base=lambda: None,
            preferences=lambda policy, k: ("pairs", seed, k),
            world=SimpleNamespace(prompts=lambda n, rng: n),
            rng=lambda name: name,
            align=align,
            sample=lambda policy, prompts, k: [policy] * 4,
            truth=lambda rows: [[float(row)] for row in rows],
            stage=lambda name, function: function(),
            curve=f"curve {seed}",
        )

    reward, curves = on_reviews(SimpleNamespace(seeds=[5, 6], at=at), flip)
    contest = [(loss, flip), (loss, 0.0), (conservative_dpo, flip)]
    first = [*contest, (loss, 0.4)] if flip == 0.2 else contest
    want = [(5, flip, ("pairs", 5, 2), o, 1.0, e) for o, e in first] + [
        (6, flip, ("pairs", 6, 2), o, 1.0, e) for o, e in contest
    ]
    assert seen == want
    n = len(first)
    assert reward == {
        "rDPO": [1.0, n + 1.0],
        "DPO": [2.0, n + 2.0],
        "conservative DPO": [3.0, n + 3.0],
        "too high": [4.0] if flip == 0.2 else [],
    }
    assert curves["DPO"] == ["curve 5", "curve 6"]


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3, epsilon=0.2), dict(beta=1.7, epsilon=0.0)]
INPUTS = builders.pairs
SURVIVORS = {}
