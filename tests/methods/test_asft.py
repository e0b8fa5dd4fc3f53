"""ASFT against its paper: values, gradients, identities, and the fate of the chosen response."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.asft import displacement, log_linear, pull
from data import collate
from lab import Lab, Settings
from methods import dpo, sft
from methods.asft import LARGEST, PAPER, Config, log1mexp, loss, run
from tests import builders
from tests.builders import everything_scored, one_pair, ragged
from toy.bandit import World
from toy.exact import population

ALONE = Config(supervised=False)


def values(logps, batch, cfg):
    return loss(logps, None, batch, cfg)[0]


def value_and_slopes(chosen, rejected, cfg):
    """Loss of one pair of one-token responses, and its slopes in their log-probs."""
    logps, _, batch = one_pair(chosen, rejected)
    losses, gradient = builders.value_and_gradient(loss, logps, None, batch, cfg)
    return losses.item(), gradient.flatten().tolist()


def odds_form(logps, batch, cfg):
    """The definition, written with the odds, in the plainest way."""
    s = logps.sum(-1) / batch.mask.sum(-1)
    odds = (s.exp() / (1 - s.exp())).log()
    align = -F.logsigmoid(cfg.beta * odds[:, 0]) - F.logsigmoid(-cfg.beta * odds[:, 1])
    return cfg.weight * align - (s[:, 0] if cfg.supervised else 0)


def orpo_align(logps, batch):
    """ORPO's alignment term, on the same log-odds."""
    s = logps.sum(-1) / batch.mask.sum(-1)
    odds = s - log1mexp(s)
    return -F.logsigmoid(odds[:, 0] - odds[:, 1])


# ---- values


@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "value", "slopes"),
    [
        (Config(), 1.958382, (-2.0, 0.431013)),
        (Config(weight=0.1), 0.915838, (-1.1, 0.0431013)),
        (ALONE, 1.158382, (-1.0, 0.431013)),
        (Config(beta=0.5, supervised=False), 1.250001, None),
        (Config(beta=2.0, supervised=False), 1.087465, (-2.180292, 0.448387)),
        (Config(beta=2.0), 1.087465 + 0.8, (-3.180292, 0.448387)),
        (Config(weight=0.0), 0.8, (-1.0, 0.0)),
    ],
)
def test_the_loss_has_the_value_of_the_worked_example(cfg, value, slopes):
    ours, gradient = value_and_slopes(-0.8, -1.2, cfg)
    assert ours == pytest.approx(value, abs=1e-6)
    if slopes:
        assert gradient == pytest.approx(slopes, abs=1e-6)


@pytest.mark.paper
def test_the_parts_of_the_worked_example():
    s = torch.tensor([-0.8, -1.2], dtype=torch.float64)
    assert s.exp().tolist() == pytest.approx([0.449329, 0.301194], abs=1e-6)
    assert (s - log1mexp(s)).tolist() == pytest.approx([-0.203382, -0.841618], abs=1e-6)
    assert log1mexp(s)[1].item() == pytest.approx(-0.358382, abs=1e-6)
    logps, _, batch = one_pair(-0.8, -1.2)
    metrics = loss(logps, None, batch, Config())[1]
    assert metrics["rejected_odds"].item() == pytest.approx(0.431013, abs=1e-6)
    assert metrics["clamped"] == 0
    assert not any(value.requires_grad for value in metrics.values())


@pytest.mark.paper
def test_orpo_is_one_term_away():
    logps, _, batch = one_pair(-0.8, -1.2)
    p, q = logps.detach().exp().flatten().tolist()
    extra = math.log(p * (1 - q) + q * (1 - p))
    assert extra == pytest.approx(-0.734276, abs=1e-6)
    assert orpo_align(logps, batch).item() == pytest.approx(0.424106, abs=1e-6)
    assert values(logps, batch, ALONE).item() + extra == pytest.approx(0.424106, abs=1e-6)
    logps, _, batch = ragged()
    assert (orpo_align(logps, batch) <= values(logps, batch, ALONE)).all()  # an upper bound


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize(
    "cfg",
    [
        Config(),
        Config(0.3),
        Config(2.0, 0.4),
        Config(0.7, 3.0),
        Config(1.5, 1.0, False),
        Config(1.5, 0.2, False),
    ],
)
def test_ragged_responses_values_and_gradients_of_the_definition(cfg):
    logps, _, batch = ragged(seed=3)
    ours, theirs = values(logps, batch, cfg), odds_form(logps, batch, cfg)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x.sum(), logps)[0] * batch.mask for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: values(x * batch.mask, batch, cfg), logps)


@pytest.mark.paper
def test_the_gradient_is_the_closed_form():
    logps, _, batch = ragged(seed=1)
    (gradient,) = torch.autograd.grad(values(logps, batch, Config(0.6)).sum(), logps)
    n = batch.mask.sum(-1).double()
    p = (logps.detach().sum(-1) / n).exp()[:, 1]
    expected = torch.stack([-1.6 / n[:, 0], 0.6 * p / (1 - p) / n[:, 1]], 1)[..., None]
    torch.testing.assert_close(gradient, expected.expand_as(gradient), rtol=0, atol=1e-12)


@pytest.mark.paper
def test_without_weight_it_is_sft_and_in_the_weight_it_is_a_line():
    logps, _, batch = ragged()
    plain, tuned = values(logps, batch, Config(0.0)), sft.loss(logps, None, batch, sft.Config())[0]
    assert torch.equal(plain, tuned)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logps)[0] for x in (plain, tuned)))
    one, half = (values(logps, batch, Config(1.0, beta, beta == 1)) for beta in (1.0, 0.5))
    for weight in (0.25, 3.0):
        line = (1 - weight) * plain + weight * one
        torch.testing.assert_close(values(logps, batch, Config(weight)), line)
        tempered = values(logps, batch, Config(weight, 0.5)) - plain
        torch.testing.assert_close(tempered, weight * half)


def test_a_reference_changes_nothing():
    logps, _, batch = ragged()
    with_one = loss(logps, torch.full_like(logps, torch.nan), batch, Config(1.0, 0.5))[0]
    assert torch.equal(values(logps, batch, Config(1.0, 0.5)), with_one)


@pytest.mark.paper
def test_doubled_tokens_change_nothing_here_and_double_dpos_margin():
    logps, _, batch = ragged()
    twice = torch.cat([logps, logps], 2)
    wide = SimpleNamespace(mask=torch.cat([batch.mask, batch.mask], 2))
    for cfg in (Config(), Config(0.5, 2.0)):
        torch.testing.assert_close(values(twice, wide, cfg), values(logps, batch, cfg))

    def margin(logps, batch):
        losses = dpo.loss(logps, torch.zeros_like(logps), batch, dpo.Config(1.0))[0]
        return -losses.expm1().log()

    torch.testing.assert_close(margin(twice, wide), 2 * margin(logps, batch))


@pytest.mark.paper
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_gradient_of_one_response_does_not_depend_on_the_other(beta):
    cfg = Config(1.0, beta)
    slopes = [value_and_slopes(-0.7, rejected, cfg)[1][0] for rejected in (-0.01, -1.0, -30.0)]
    assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-12)
    slopes = [value_and_slopes(chosen, -0.7, cfg)[1][1] for chosen in (-0.01, -1.0, -30.0)]
    assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize("cfg", [Config(), Config(0.5, 0.4), Config(1.0, 3.0, False)])
def test_it_falls_in_the_chosen_log_prob_and_rises_without_bound_in_the_rejected_one(cfg):
    grid = torch.linspace(-5, -0.01, 60).tolist()
    chosen = [value_and_slopes(s, -1.0, cfg)[0] for s in grid]
    rejected = [value_and_slopes(-1.0, s, cfg)[0] for s in grid]
    assert all(a > b for a, b in zip(chosen, chosen[1:]))
    assert all(a < b for a, b in zip(rejected, rejected[1:]))
    assert value_and_slopes(-1.0, -1e-5, cfg)[0] - value_and_slopes(-1.0, -1e-2, cfg)[0] > 1


def ratio_of_gradients(loss, cfg, chosen, rejected):
    """|dL/dp_w| / |dL/dp_l| of a pair of one-token responses with these probabilities."""
    p = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    logps = p.log().view(1, 2, 1)
    value = loss(logps, torch.zeros_like(logps), everything_scored(logps), cfg)[0].sum()
    chosen, rejected = torch.autograd.grad(value, p)[0].abs().tolist()
    return chosen / rejected


@pytest.mark.paper
def test_in_probabilities_asft_pushes_the_chosen_one_harder_and_dpo_the_rejected_one():
    assert ratio_of_gradients(loss, ALONE, 0.3, 0.1) == pytest.approx(3.0)
    assert ratio_of_gradients(loss, Config(), 0.3, 0.1) == pytest.approx(6.0)
    assert ratio_of_gradients(dpo.loss, dpo.Config(), 0.3, 0.1) == pytest.approx(1 / 3)
    for p, q in ((0.6, 0.3), (0.2, 0.7), (0.8, 0.9)):
        ratio = ratio_of_gradients(loss, ALONE, p, q)
        assert ratio == pytest.approx((1 - q) / p) and (ratio >= 1) == (p + q <= 1)
        assert ratio_of_gradients(dpo.loss, dpo.Config(0.7), p, q) == pytest.approx(q / p)


# ---- probabilities near 0 and 1


@pytest.mark.paper
def test_log1mexp_near_0_and_far_from_it():
    x = torch.tensor([-20.0, -1e-6, -math.log(2), -100.0, -1e4], requires_grad=True)
    y = log1mexp(x)
    exact = [
        math.log1p(-math.exp(-20)),
        math.log(-math.expm1(-1e-6)),
        -math.log(2),
        -3.7200759760208361e-44,
        0.0,
    ]
    assert y.tolist() == pytest.approx(exact, rel=1e-5, abs=1e-42)
    assert y[1].item() == pytest.approx(-13.8155, abs=1e-4)
    assert y[0].item() == pytest.approx(-2.0612e-9, rel=1e-4)
    (slope,) = torch.autograd.grad(y.sum(), x)
    expected = [-math.exp(-20) / (1 - math.exp(-20)), -1e6, -1.0]
    assert slope[:3].tolist() == pytest.approx(expected, rel=1e-3)
    assert slope.isfinite().all()
    grid = -torch.logspace(-2, 1.5, 40, dtype=torch.float64)
    x = torch.cat([grid, torch.tensor([-math.log(2)], dtype=torch.float64)]).requires_grad_()
    torch.testing.assert_close(log1mexp(x), (1 - x.exp()).log(), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(log1mexp, x)


@pytest.mark.parametrize("cfg", [Config(), Config(0.5, 0.5), Config(1.0, 2.0, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_certain_and_impossible_responses_are_finite(cfg, dtype):
    for chosen, rejected in ((-1e4, 0.0), (0.0, -1e4), (0.0, 0.0), (-1e4, -1e4), (-1e-3, -1e-3)):
        logps, _, batch = one_pair(chosen, rejected, dtype=dtype)
        losses, metrics = loss(logps, None, batch, cfg)
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
        assert metrics["clamped"].item() == (rejected == 0)


def test_the_loss_of_a_certain_rejected_response_is_capped():
    value, slopes = value_and_slopes(-1.0, 0.0, Config())
    assert value == pytest.approx(2 - math.log(-math.expm1(LARGEST)))
    assert value - 2 == pytest.approx(13.8155, abs=1e-4)
    assert slopes == [-2.0, 0.0]


@pytest.mark.paper
def test_a_sum_in_place_of_the_mean_would_lose_the_rejected_side():
    """A response of 200 tokens at -0.5 has probability e^-100; ASFT uses the mean, exp(-0.5)."""
    logps = torch.full((1, 2, 200), -0.5, dtype=torch.bfloat16, requires_grad=True)
    value = values(logps, everything_scored(logps), Config()).item()
    assert value == pytest.approx(1.0 - math.log(1 - math.exp(-0.5)), abs=1e-5)


# ---- errors


@pytest.mark.parametrize("fields", [dict(beta=0.5), dict(supervised=False)])
def test_settings_that_do_nothing_without_weight_are_refused(fields):
    with pytest.raises(ValueError, match="weight = 0"):
        Config(weight=0.0, **fields)


@pytest.mark.parametrize("weight", [-0.1, math.inf, math.nan])
def test_a_weight_out_of_range_is_refused(weight):
    with pytest.raises(ValueError, match="weight"):
        Config(weight)


@pytest.mark.slow
def test_what_is_not_a_probability_is_refused(capsys, tmp_path, monkeypatch):
    logps, _, batch = ragged()
    with pytest.raises(ValueError, match="positive"):
        values(logps.detach() + 1e4 * batch.mask, batch, Config())
    monkeypatch.chdir(tmp_path)
    assert "images" not in PAPER.worlds
    assert train.main(["--method", "asft", "--world", "digits"]) == 2
    assert "images" in capsys.readouterr().err


# ---- shared features and tables


@pytest.mark.paper
@pytest.mark.parametrize(
    ("weight", "theta", "probs"),
    [
        (1.0, -0.28999, (0.32418, 0.24258, 0.43324)),
        (0.1, -0.06456, (0.33287, 0.31206, 0.35507)),
        (10.0, -0.45098, (0.31183, 0.19864, 0.48953)),
        (0.0, 0.0, (1 / 3, 1 / 3, 1 / 3)),
    ],
)
def test_one_shared_parameter_has_a_finite_optimum(weight, theta, probs):
    """Features (chosen, rejected, other) = (1, 2, 0)."""
    features = torch.tensor([[[1.0], [2.0], [0.0]]], dtype=torch.float64)
    logps, end = log_linear(loss, Config(weight), features, 300, lr=1 / (1 + weight))
    assert end.item() == pytest.approx(theta, abs=1e-5)
    assert logps[0].exp().tolist() == pytest.approx(probs, abs=1e-5)
    if weight == 1:
        pair = logps[:, :2, None]
        value = values(pair, everything_scored(pair), Config()).item()
        assert value == pytest.approx(2.530731, abs=1e-6)


@pytest.mark.paper
def test_one_shared_parameter_has_no_optimum_under_dpo():
    features = torch.tensor([[[1.0], [2.0], [0.0]]], dtype=torch.float64)
    ends = [log_linear(dpo.loss, dpo.Config(), features, steps, lr=0.5) for steps in (50, 500)]
    (early, first), (late, last) = ends
    assert last < first < -1 and late[0, 0] < early[0, 0] < -1.5  # on its way to -inf
    far, _ = log_linear(dpo.loss, dpo.Config(), features, 2000, lr=0.5)
    assert far[0, 0].exp() < 1e-6
    at = (-2.0 * features[..., 0]).log_softmax(1).exp()[0].tolist()
    assert at == pytest.approx((0.11731, 0.01588, 0.86681), abs=1e-5)


@pytest.mark.paper
def test_with_shared_features_asft_raises_the_chosen_response():
    """ASFT raises the chosen log-prob in all draws and DPO in none; DPO alone always separates."""
    draws = displacement(torch.Generator().manual_seed(0))
    rises = {name: int((values["change"] > 0).sum()) for name, values in draws.items()}
    grows = {name: int((values["gap"] > 0).sum()) for name, values in draws.items()}
    assert rises == {"asft": 20, "sft": 20, "dpo": 0}
    assert grows["dpo"] == 20 and grows["sft"] < grows["asft"] < 10
    means = {name: values["change"].mean().item() for name, values in draws.items()}
    assert means["dpo"] < -20 and 1.5 < means["sft"] < means["asft"] < 2.5


@pytest.mark.paper
@pytest.mark.parametrize(
    ("weight", "probs"),
    [
        (0.0, (0.53729, 0.33333, 0.12938)),
        (0.1, (0.54287, 0.33028, 0.12685)),
        (1.0, (0.56479, 0.31832, 0.11689)),
        (10.0, (0.58237, 0.30882, 0.10881)),
    ],
)
def test_the_optimum_in_a_table_is_not_that_of_reward_minus_kl_at_any_weight(weight, probs):
    world = World(vocab=3, length=1, spread=0.0, rewards=[1.0, 0.0, -1.0])
    pairs, cfg = world.pairs_all(), Config(weight)
    table, batch = population(world, pairs, loss, cfg), collate(pairs)
    assert table.probs()[0].tolist() == pytest.approx(probs, abs=1e-5)
    if weight == 1:
        value = (values(table.logps(batch), batch, cfg) * batch.weight).mean().item()
        assert value == pytest.approx(2.234631, abs=1e-6)
    best = world.optimum(world.reference, 1.0).probs()[0].tolist()
    assert best == pytest.approx((0.66524, 0.24473, 0.09003), abs=1e-5)


def test_the_pull_of_the_rejected_side_of_a_batch():
    logps, _, batch = ragged()
    policy = SimpleNamespace(logps=lambda batch: logps)
    p = (logps.detach().sum(-1) / batch.mask.sum(-1)).exp()[:, 1]
    expected = (p / (1 - p)).mean().item() / 2
    assert pull(policy, loss, Config(), None, batch) == pytest.approx(expected)
    n = batch.mask.sum(-1).double()
    expected = (n[:, 1].sum() / n[:, 0].sum()).item()  # at the reference all tokens weigh the same
    ours = pull(policy, dpo.loss, dpo.Config(), logps.detach(), batch)
    assert ours == pytest.approx(expected)


# ---- the run


def test_a_run_learns_without_a_reference():
    lab = Lab(Settings(world="bandit", steps=60, batch_size=128, prompts=512), quiet=True)
    calls, align = [], lab.align
    lab.align = lambda *args, **kwargs: calls.append(kwargs) or align(*args, **kwargs)
    policy = run(lab, Config())
    assert [kwargs["reference"] for kwargs in calls] == [None]
    assert lab.evaluate(policy)["reward"] > lab.evaluate(lab.reference)["reward"] + 0.3


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(weight=0.3),
    dict(weight=1.7, beta=0.4),
    dict(weight=0.6, beta=2.0, supervised=False),
    dict(weight=0.7, supervised=False),
]


def likelihoods():
    """Pairs, with probabilities so near 0 and 1 that only one form of log(1 - exp(s)) is exact."""
    near = [one_pair(*s, dtype=torch.float32) for s in ((-1.0, -2e-6), (0.0, -16.0))]
    return [*builders.likelihoods(), *near]


INPUTS = likelihoods
SURVIVORS = {
    "log1mexp: 2 -> 3": "where one form gives way to the other; both are exact there",
}
