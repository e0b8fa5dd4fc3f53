"""ASFT against its paper: values, gradients, identities, errors, and what it does to the preferred response."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.asft import displacement, dpo_of_pairs, pulls, shared, sides, three
from claims.sft import dpo_of_pairs as dpo_of_sft
from data import collate
from lab import Lab, Settings
from methods import dpo, sft
from methods.asft import LARGEST, PAPER, Config, log1mexp, loss, run
from tests import builders
from toy.exact import population

ALONE = Config(supervised=False)


def pair(chosen, rejected, dtype=torch.float64):
    """One pair of one-token responses with these log-probs."""
    logps = torch.tensor([[[chosen], [rejected]]], dtype=dtype, requires_grad=True)
    return logps, SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))


def ragged(rows=5, length=7, seed=0):
    """Random log-probs of ragged responses in float64, 0 outside the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 2, 1), generator=rng)
    logps = -3 * torch.rand(rows, 2, length, generator=rng, dtype=torch.float64) * mask
    return logps.requires_grad_(), SimpleNamespace(mask=mask)


def value_and_slopes(chosen, rejected, cfg):
    logps, batch = pair(chosen, rejected)
    losses, _ = loss(logps, None, batch, cfg)
    return losses.item(), torch.autograd.grad(losses.sum(), logps)[0].flatten().tolist()


def odds_form(logps, batch, cfg):
    """The definition, written with the odds, in the plainest way."""
    s = logps.sum(-1) / batch.mask.sum(-1)
    odds = (s.exp() / (1 - s.exp())).log()
    align = -F.logsigmoid(cfg.beta * odds[:, 0]) - F.logsigmoid(-cfg.beta * odds[:, 1])
    return cfg.weight * align - (s[:, 0] if cfg.supervised else 0)


def orpo_align(logps, batch):
    s = logps.sum(-1) / batch.mask.sum(-1)
    odds = s - log1mexp(s)
    return -F.logsigmoid(odds[:, 0] - odds[:, 1])


# ---- values


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
def test_the_worked_example(cfg, value, slopes):
    ours, gradient = value_and_slopes(-0.8, -1.2, cfg)
    assert ours == pytest.approx(value, abs=1e-6)
    if slopes:
        assert gradient == pytest.approx(slopes, abs=1e-6)


def test_its_parts():
    s = torch.tensor([-0.8, -1.2], dtype=torch.float64)
    assert s.exp().tolist() == pytest.approx([0.449329, 0.301194], abs=1e-6)
    assert (s - log1mexp(s)).tolist() == pytest.approx([-0.203382, -0.841618], abs=1e-6)
    assert log1mexp(s)[1].item() == pytest.approx(-0.358382, abs=1e-6)
    logps, batch = pair(-0.8, -1.2)
    metrics = loss(logps, None, batch, Config())[1]
    assert (
        metrics["rejected_odds"].item() == pytest.approx(0.431013, abs=1e-6)
        and metrics["clamped"] == 0
    )
    assert not any(value.requires_grad for value in metrics.values())


def test_orpo_is_one_term_away():
    logps, batch = pair(-0.8, -1.2)
    p, q = logps.detach().exp().flatten().tolist()
    extra = math.log(p * (1 - q) + q * (1 - p))
    assert extra == pytest.approx(-0.734276, abs=1e-6)
    assert orpo_align(logps, batch).item() == pytest.approx(0.424106, abs=1e-6)
    assert loss(logps, None, batch, ALONE)[0].item() + extra == pytest.approx(0.424106, abs=1e-6)
    logps, batch = ragged()
    assert (
        orpo_align(logps, batch) <= loss(logps, None, batch, ALONE)[0]
    ).all()  # ASFT is an upper bound


# ---- identities


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
    logps, batch = ragged(seed=3)
    ours, theirs = loss(logps, None, batch, cfg)[0], odds_form(logps, batch, cfg)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    gradients = [torch.autograd.grad(x.sum(), logps)[0] * batch.mask for x in (ours, theirs)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x * batch.mask, None, batch, cfg)[0], logps)


def test_the_gradient_is_the_closed_form():
    logps, batch = ragged(seed=1)
    (gradient,) = torch.autograd.grad(loss(logps, None, batch, Config(0.6))[0].sum(), logps)
    n = batch.mask.sum(-1).double()
    p = (logps.detach().sum(-1) / n).exp()
    expected = torch.stack([-1.6 / n[:, 0], 0.6 * p[:, 1] / (1 - p[:, 1]) / n[:, 1]], 1)[
        ..., None
    ].expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


def test_without_weight_it_is_fine_tuning_and_in_the_weight_it_is_a_line():
    logps, batch = ragged()
    batch.scores = torch.tensor([1.0, 0.0]).expand(5, 2)
    plain, tuned = (
        loss(logps, None, batch, Config(weight=0.0))[0],
        sft.loss(logps, None, batch, sft.Config())[0],
    )
    assert torch.equal(plain, tuned)
    assert torch.equal(*(torch.autograd.grad(x.sum(), logps)[0] for x in (plain, tuned)))
    one = loss(logps, None, batch, Config())[0]
    for weight in (0.25, 3.0):
        torch.testing.assert_close(
            loss(logps, None, batch, Config(weight))[0], (1 - weight) * plain + weight * one
        )
        torch.testing.assert_close(
            loss(logps, None, batch, Config(weight, 0.5))[0] - plain,
            weight * loss(logps, None, batch, Config(1.0, 0.5, False))[0],
        )


def test_a_reference_changes_nothing():
    logps, batch = ragged()
    ours = [
        loss(logps, ref_logps, batch, Config(1.0, 0.5))[0]
        for ref_logps in (None, torch.full_like(logps, torch.nan))
    ]
    assert torch.equal(*ours)


def test_doubled_tokens_change_nothing_here_and_dpo_doubles_its_margin():
    logps, batch = ragged()
    twice, wide = (
        torch.cat([logps, logps], 2),
        SimpleNamespace(mask=torch.cat([batch.mask, batch.mask], 2)),
    )
    for cfg in (Config(), Config(0.5, 2.0)):
        torch.testing.assert_close(
            loss(twice, None, wide, cfg)[0], loss(logps, None, batch, cfg)[0]
        )
    margin = [
        dpo.loss(x, torch.zeros_like(x), m, dpo.Config(1.0))[0].expm1().log().neg()
        for x, m in ((twice, wide), (logps, batch))
    ]
    torch.testing.assert_close(margin[0], 2 * margin[1])


def test_padding_order_and_the_other_rows_change_nothing():
    logps, batch = ragged()
    plain = loss(logps, None, batch, Config())[0]
    wide = SimpleNamespace(mask=F.pad(batch.mask, (0, 3)))
    torch.testing.assert_close(loss(F.pad(logps, (0, 3)), None, wide, Config())[0], plain)
    for b in range(5):
        torch.testing.assert_close(
            loss(logps[b : b + 1], None, SimpleNamespace(mask=batch.mask[b : b + 1]), Config())[0][
                0
            ],
            plain[b],
        )


@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_sides_do_not_know_each_other(beta):
    cfg = Config(1.0, beta)
    slopes = [value_and_slopes(-0.7, rejected, cfg)[1][0] for rejected in (-0.01, -1.0, -30.0)]
    assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-12)
    slopes = [value_and_slopes(chosen, -0.7, cfg)[1][1] for chosen in (-0.01, -1.0, -30.0)]
    assert slopes == pytest.approx([slopes[0]] * 3, abs=1e-12)


@pytest.mark.parametrize("cfg", [Config(), Config(0.5, 0.4), Config(1.0, 3.0, False)])
def test_down_in_the_preferred_up_in_the_rejected_and_without_bound_at_probability_1(cfg):
    grid = torch.linspace(-5, -0.01, 60).tolist()
    chosen = [value_and_slopes(s, -1.0, cfg)[0] for s in grid]
    rejected = [value_and_slopes(-1.0, s, cfg)[0] for s in grid]
    assert all(a > b for a, b in zip(chosen, chosen[1:])) and all(
        a < b for a, b in zip(rejected, rejected[1:])
    )
    assert value_and_slopes(-1.0, -1e-5, cfg)[0] - value_and_slopes(-1.0, -1e-2, cfg)[0] > 1


def test_the_pulls_on_the_probabilities():
    assert pulls(loss, ALONE, 0.3, 0.1) == pytest.approx(3.0) and pulls(
        loss, Config(), 0.3, 0.1
    ) == pytest.approx(6.0)
    assert pulls(dpo_of_pairs, SimpleNamespace(beta=0.1), 0.3, 0.1) == pytest.approx(1 / 3)
    for p, q in ((0.6, 0.3), (0.2, 0.7), (0.8, 0.9)):
        assert pulls(loss, ALONE, p, q) == pytest.approx((1 - q) / p) and (
            pulls(loss, ALONE, p, q) >= 1
        ) == (p + q <= 1)
        assert pulls(dpo_of_pairs, SimpleNamespace(beta=0.7), p, q) == pytest.approx(q / p)


def test_the_sides_of_a_batch():
    logps, batch = ragged()
    policy = SimpleNamespace(logps=lambda batch: logps)
    odds = (logps.detach().sum(-1) / batch.mask.sum(-1)).exp()[:, 1]
    expected = (odds / (1 - odds)).mean() / 2
    assert sides(policy, loss, Config(), None, batch) == pytest.approx(expected.item())
    n = batch.mask.sum(-1).double()
    expected = n[:, 1].sum() / n[:, 0].sum()  # at the reference every token pulls alike
    assert sides(
        policy, dpo_of_pairs, SimpleNamespace(beta=0.1), logps.detach(), batch
    ) == pytest.approx(expected.item())


# ---- numbers


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
    assert y[1].item() == pytest.approx(-13.8155, abs=1e-4) and y[0].item() == pytest.approx(
        -2.0612e-9, rel=1e-4
    )
    (slope,) = torch.autograd.grad(y.sum(), x)
    assert slope[:3].tolist() == pytest.approx(
        [-math.exp(-20) / (1 - math.exp(-20)), -1e6, -1.0], rel=1e-3
    )
    assert slope.isfinite().all()
    x = torch.cat(
        [
            -torch.logspace(-2, 1.5, 40, dtype=torch.float64),
            torch.tensor([-math.log(2)], dtype=torch.float64),
        ]
    ).requires_grad_()
    torch.testing.assert_close(log1mexp(x), (1 - x.exp()).log(), rtol=1e-9, atol=1e-12)
    assert torch.autograd.gradcheck(log1mexp, x)


@pytest.mark.parametrize("cfg", [Config(), Config(0.5, 0.5), Config(1.0, 2.0, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_certain_and_impossible_responses_are_finite(cfg, dtype):
    for chosen, rejected in ((-1e4, 0.0), (0.0, -1e4), (0.0, 0.0), (-1e4, -1e4), (-1e-3, -1e-3)):
        logps, batch = pair(chosen, rejected, dtype)
        losses, metrics = loss(logps, None, batch, cfg)
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
        assert metrics["clamped"].item() == (rejected == 0)


def test_the_cap_of_a_certain_rejected_response():
    assert value_and_slopes(-1.0, 0.0, Config()) == (
        pytest.approx(2 - math.log(-math.expm1(LARGEST))),
        [-2.0, 0.0],
    )
    assert value_and_slopes(-1.0, 0.0, Config())[0] - 2 == pytest.approx(13.8155, abs=1e-4)


def test_a_sum_in_place_of_the_mean_would_lose_the_rejected_side():
    """200 tokens at -0.5: the probability of the whole is e^-100, that of a token 0.61, and the second one is used."""
    logps = torch.full((1, 2, 200), -0.5, dtype=torch.bfloat16, requires_grad=True)
    losses, _ = loss(
        logps, None, SimpleNamespace(mask=torch.ones(1, 2, 200, dtype=torch.bool)), Config()
    )
    assert losses.item() == pytest.approx(1.0 - math.log(1 - math.exp(-0.5)), abs=1e-5)


# ---- errors


@pytest.mark.parametrize(
    ("values", "word"),
    [(dict(weight=w), "weight") for w in (-0.1, math.inf, math.nan)]
    + [(dict(beta=b), "beta") for b in (0.0, -1.0, math.inf, math.nan)]
    + [
        (dict(weight=0.0, beta=0.5), "weight = 0"),
        (dict(weight=0.0, supervised=False), "weight = 0"),
    ],
)
def test_values_out_of_range_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Config(**values)


def test_what_is_no_pair_of_likelihoods_is_refused(capsys, tmp_path, monkeypatch):
    logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], None, batch, Config())
    with pytest.raises(ValueError, match="positive"):
        loss(logps.detach() + 1e4 * batch.mask, None, batch, Config())
    batch.mask = batch.mask.clone()
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, None, batch, Config())
    monkeypatch.chdir(tmp_path)
    assert (
        "images" not in PAPER.worlds and train.cli(["--method", "asft", "--world", "digits"]) == 2
    )
    assert "images" in capsys.readouterr().err


# ---- claims


def test_c1_one_shared_parameter():
    features = torch.tensor([[[1.0], [2.0], [0.0]]], dtype=torch.float64)
    for weight, theta, probs in [
        (1.0, -0.28999, (0.32418, 0.24258, 0.43324)),
        (0.1, -0.06456, (0.33287, 0.31206, 0.35507)),
        (10.0, -0.45098, (0.31183, 0.19864, 0.48953)),
        (0.0, 0.0, (1 / 3, 1 / 3, 1 / 3)),
    ]:
        logps, end = shared(loss, Config(weight), features, 300, lr=1 / (1 + weight))
        assert end.item() == pytest.approx(theta, abs=1e-5) and logps[
            0
        ].exp().tolist() == pytest.approx(probs, abs=1e-5)
        if weight == 1:
            assert loss(logps[:, :2, None], None, pair(0.0, 0.0)[1], Config())[
                0
            ].item() == pytest.approx(2.530731, abs=1e-6)
    ends = [
        shared(dpo_of_pairs, SimpleNamespace(beta=0.1), features, steps, scale=10.0)
        for steps in (50, 500)
    ]
    assert (
        ends[1][1] < ends[0][1] < -1 and ends[1][0][0, 0] < ends[0][0][0, 0] < -1.5
    )  # on its way to minus infinity
    at = (-2.0 * features[..., 0]).log_softmax(1).exp()[0].tolist()
    assert at == pytest.approx((0.11731, 0.01588, 0.86681), abs=1e-5)


def test_c2_random_features():
    draws = displacement()
    rises = {name: sum(change > 0 for change in side[0]) for name, side in draws.items()}
    grows = {name: sum(gap > 0 for gap in side[1]) for name, side in draws.items()}
    assert (
        rises == {"asft": 20, "sft": 20, "dpo": 0}
        and grows["dpo"] == 20
        and grows["sft"] < grows["asft"] < 10
    )
    means = {name: sum(side[0]) / 20 for name, side in draws.items()}
    assert means["dpo"] < -20 and 1.5 < means["sft"] < means["asft"] < 2.5


@pytest.mark.parametrize(
    ("weight", "probs"),
    [
        (0.0, (0.53729, 0.33333, 0.12938)),
        (0.1, (0.54287, 0.33028, 0.12685)),
        (1.0, (0.56479, 0.31832, 0.11689)),
        (10.0, (0.58237, 0.30882, 0.10881)),
    ],
)
def test_c3_the_optimum_in_a_table(weight, probs):
    world, cfg = three(), Config(weight)
    table, batch = population(world, world.pairs_all(), loss, cfg), collate(world.pairs_all())
    assert table.probs()[0].tolist() == pytest.approx(probs, abs=1e-5)
    if weight == 1:
        value = (loss(table.logps(batch), None, batch, cfg)[0] * batch.weight).mean().item()
        assert value == pytest.approx(2.234631, abs=1e-6)
    assert world.optimum(world.reference, 1.0).probs()[0].tolist() == pytest.approx(
        (0.66524, 0.24473, 0.09003), abs=1e-5
    )


def test_a_run_makes_no_reference(monkeypatch):
    from lab import lab as lab_module

    lab, frozen = (
        Lab(Settings(world="bandit", steps=60, batch_size=128, prompts=512), quiet=True),
        [],
    )
    lab.base()
    monkeypatch.setattr(lab_module, "frozen", lambda model: frozen.append(model))
    policy = run(lab, Config())
    assert (
        not frozen and lab.evaluate(policy)["reward"] > lab.evaluate(lab.reference)["reward"] + 0.3
    )


def test_shared_scaffold():
    assert inspect.getsource(dpo_of_pairs) == inspect.getsource(dpo_of_sft)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(weight=0.3),
    dict(weight=1.7, beta=0.4),
    dict(weight=0.6, beta=2.0, supervised=False),
    dict(weight=0.7, supervised=False),
]
INPUTS = builders.likelihoods
SURVIVORS = {
    "log1mexp: 2 -> 3": "where one form gives way to the other; both are exact there",
    "pair: ref_logps -> logps": "there is no reference, so what pair returns for it is not read",
}
