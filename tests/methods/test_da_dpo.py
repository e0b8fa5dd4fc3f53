"""DA-DPO against its paper: values, gradients, the normalizer, the vote, pairs of attributes."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from claims.da_dpo import attributes, inverted, on_attributes, shuffled
from lab import Lab, Settings
from methods import dpo
from methods.da_dpo import (
    Config,
    accuracy,
    balanced,
    estimates,
    loss,
    normalised,
    pair_beta,
    run,
    vote,
)
from tests import builders
from tests.builders import changed, one_pair, ragged, value_and_gradient


def at(delta, gap):
    """A pair of one-token responses whose log-ratios differ by delta."""
    return changed(one_pair(delta, 0.0), quality=torch.tensor([[gap, 0.0]], dtype=torch.float64))


def scored(seed=0, **kwargs):
    """Five ragged pairs with random scores."""
    item = ragged(seed=seed, **kwargs)
    rng = torch.Generator().manual_seed(seed)
    return changed(item, quality=torch.rand(5, 2, generator=rng, dtype=torch.float64))


# ---- the card's numbers


@pytest.mark.paper
@pytest.mark.parametrize(
    ("gap", "delta", "value", "slope"),
    [
        (0.0, 0.0, 0.693147, -0.050000),
        (0.0, 5.0, 0.474077, -0.037754),
        (0.0, 20.0, 0.126928, -0.011920),
        (0.5, 0.0, 0.693147, -0.075000),
        (0.5, 5.0, 0.386871, -0.048123),
        (0.5, 20.0, 0.048587, -0.007114),
        (1.0, 0.0, 0.693147, -0.100000),
        (1.0, 5.0, 0.313262, -0.053788),
        (1.0, 8.8137, 0.158348, -0.029290),
        (1.0, 20.0, 0.018150, -0.003597),
    ],
)
def test_the_loss_has_the_values_of_the_worked_examples(gap, delta, value, slope):
    losses, gradient = value_and_gradient(loss, *at(delta, gap), Config())
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-6)


@pytest.mark.paper
def test_an_easy_pair_is_pulled_more_at_first_and_less_beyond_the_crossover():
    crossover = math.log(1 + math.sqrt(2)) / 0.1
    assert crossover == pytest.approx(8.814, abs=1e-3)
    for delta in (-20.0, 0.0, crossover - 0.01, crossover + 0.01, 20.0, 60.0):
        easy, hard = (
            value_and_gradient(loss, *at(delta, gap), Config())[1][0, 0].abs().item()
            for gap in (1.0, 0.0)
        )
        assert (easy > hard) == (delta < crossover)
    one, other = (
        value_and_gradient(loss, *at(8.8137, gap), Config())[1][0, 0].item() for gap in (1.0, 0.0)
    )
    assert one == pytest.approx(other, abs=2e-6)


@pytest.mark.paper
def test_with_labels_of_either_kind_an_easy_pair_settles_half_as_far():
    """Delta* = logit(p) / beta_i."""
    p = 0.8
    for gap in (0.0, 0.5, 1.0):
        delta = math.log(p / (1 - p)) / (0.1 * (1 + gap))
        there, back = (
            value_and_gradient(loss, *at(sign * delta, gap), Config())[1][0, 0].item()
            for sign in (1, -1)
        )
        assert p * there - (1 - p) * back == pytest.approx(0.0, abs=1e-12)


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_without_gaps_and_with_one_gap_it_is_dpo(dtype):
    logps, ref_logps, batch = scored(dtype=dtype)
    theirs = value_and_gradient(dpo.loss, logps, ref_logps, batch, dpo.Config(0.3))
    for gap, alpha in ((0.0, 1.0), (0.5, 1 / 1.5)):
        batch.quality = torch.tensor([[gap, 0.0]], dtype=torch.float64).expand(5, 2)
        for ours, known in zip(
            value_and_gradient(loss, logps, ref_logps, batch, Config(0.3, alpha)), theirs
        ):
            assert torch.equal(ours, known) if gap == 0 else torch.allclose(ours, known, rtol=1e-6)


@pytest.mark.paper
def test_the_absolute_gap_knows_no_direction_and_no_level():
    logps, ref_logps, batch = scored()
    batch.quality = 0.5 * batch.quality
    for cfg, same in ((Config(gap="absolute"), True), (Config(gap="signed"), False)):
        plain = loss(logps, ref_logps, batch, cfg)[0]
        turned_round = SimpleNamespace(mask=batch.mask, quality=batch.quality.flip(1))
        assert (
            torch.allclose(loss(logps, ref_logps, turned_round, cfg)[0], plain, atol=1e-12) == same
        )
        lifted = SimpleNamespace(mask=batch.mask, quality=batch.quality + 0.3)
        torch.testing.assert_close(
            loss(logps, ref_logps, lifted, cfg)[0], plain, rtol=0, atol=1e-12
        )


@pytest.mark.parametrize(
    "cfg",
    [Config(0.3), Config(0.3, 0.7, 4.0, "absolute"), Config(0.7, 1.3, 0.8, "signed")],
    ids=str,
)
def test_ragged_responses_values_and_gradients_of_the_definition(cfg):
    logps, ref_logps, batch = scored(seed=3)
    gap = batch.quality[:, 0] - batch.quality[:, 1]
    beta = cfg.beta * cfg.alpha * (1 + cfg.reach * (gap if cfg.gap == "signed" else gap.abs()))
    ratio = (logps - ref_logps).sum(-1).detach()
    z = beta * (ratio[:, 0] - ratio[:, 1])
    losses, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    torch.testing.assert_close(losses, torch.log1p(torch.exp(-z)), rtol=0, atol=1e-12)
    size = (beta * torch.sigmoid(-z))[:, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    torch.testing.assert_close(
        gradient, size[..., None].expand_as(gradient), rtol=0, atol=1e-12
    )  # a SUM over tokens
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    metrics = loss(logps, ref_logps, batch, cfg)[1]
    assert metrics["pair_beta"].item() == pytest.approx(beta.mean().item())
    assert metrics["weight"].item() == pytest.approx(torch.sigmoid(-z).mean().item())
    padded = [F.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)]
    wider = loss(*padded[:2], SimpleNamespace(mask=padded[2], quality=batch.quality), cfg)[0]
    torch.testing.assert_close(wider, losses, rtol=0, atol=1e-12)


@pytest.mark.paper
def test_no_gradient_reaches_the_scores():
    logps, ref_logps, batch = scored()
    batch.quality = batch.quality.requires_grad_()
    loss(logps, ref_logps, batch, Config())[0].sum().backward()
    assert batch.quality.grad is None and logps.grad.abs().sum() > 0


# ---- precision, size, errors


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_margins_stay_finite(dtype):
    for margin in (1e4, -1e4):
        for cfg in (Config(1.0), Config(1.0, gap="signed")):
            logps = torch.tensor(
                [[[margin], [0.0]], [[0.0], [margin]]], dtype=dtype, requires_grad=True
            )
            quality = torch.tensor([[1.0, 0.0], [0.0, 1.0]])
            batch = SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool), quality=quality)
            losses, metrics = loss(logps, torch.zeros_like(logps), batch, cfg)
            assert losses.isfinite().all() and losses.dtype == torch.promote_types(
                dtype, torch.float32
            )
            assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
            assert all(value.isfinite() and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize(
    "fields",
    [{name: bad} for name in ("beta", "alpha", "reach") for bad in (0.0, -0.1, math.inf, math.nan)]
    + [
        dict(gap="none"),
        dict(gap="signed", reach=1.5),
        dict(contrastive=-0.1),
        dict(contrastive=1.1),
        dict(contrastive=math.nan),
    ],
)
def test_fields_out_of_range_are_refused(fields):
    with pytest.raises(ValueError, match=f"{[*fields][-1]} = "):
        Config(**fields)


def test_what_is_no_pair_or_has_no_scores_is_refused():
    logps, ref_logps, batch = scored()
    for wrong in (logps[:, :1], logps[0], torch.zeros(2, 16, 3)):
        with pytest.raises(ValueError, match="pairs"):
            loss(wrong, wrong, batch, Config())
    for bad in (math.nan, math.inf, 1.5, -0.5):
        broken = SimpleNamespace(mask=batch.mask, quality=batch.quality.clone())
        broken.quality[2, 1] = bad
        with pytest.raises(ValueError, match="between 0 and 1"):
            loss(logps, ref_logps, broken, Config())
    with pytest.raises(AttributeError, match="quality"):  # a silent 0 would be DPO
        loss(logps, ref_logps, SimpleNamespace(mask=batch.mask), Config())
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the normaliser and the vote


@pytest.mark.paper
def test_the_normaliser():
    v = torch.randn(20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    n = normalised(v)
    assert n.mean().item() == pytest.approx(0.5, abs=5e-3) and 0 < n.min() and n.max() < 1
    assert torch.equal(n.argsort(), v.argsort())
    torch.testing.assert_close(normalised(-4.0 + 3.0 * v), n, rtol=0, atol=1e-9)
    assert normalised(torch.tensor([1.0, 2.0, 3.0]).double()).tolist() == pytest.approx(
        [0.110336, 0.5, 0.889664], abs=1e-6
    )
    assert (
        normalised(torch.full((5,), 3.7, dtype=torch.float64)).tolist() == [0.5] * 5
    )  # no spread, no NaN


@pytest.mark.paper
def test_the_vote_is_weighed_by_how_often_an_estimator_is_right():
    rng = torch.Generator().manual_seed(0)
    c, m = (torch.randn(400, 2, generator=rng, dtype=torch.float64) for _ in range(2))
    right = accuracy(c), accuracy(m)
    assert right[0] == pytest.approx((c[:, 0] > c[:, 1]).double().mean().item())
    share = right[0] / sum(right)
    n = [normalised(x[:, 0] - x[:, 1]) for x in (c, m)]
    found = vote(c, m, Config())
    torch.testing.assert_close(found[:, 0], share * n[0] + (1 - share) * n[1])
    assert (found[:, 1] == 0).all() and (found >= 0).all() and (found <= 1).all()
    torch.testing.assert_close(vote(c, m, Config(contrastive=1.0))[:, 0], n[0])
    torch.testing.assert_close(vote(c, m, Config(contrastive=0.0))[:, 0], n[1])
    torch.testing.assert_close(
        vote(c, c.flip(0), Config())[:, 0], (n[0] + n[0].flip(0)) / 2
    )  # equally often right: the average
    guess = torch.where(torch.arange(400)[:, None] % 2 == 0, m.abs(), -m.abs()) * torch.tensor(
        [1.0, 0.0]
    )  # right on every other pair
    weight = 0.5 / (0.5 + right[0])  # one at chance keeps nearly half the vote
    torch.testing.assert_close(
        vote(c, guess, Config())[:, 0],
        (1 - weight) * n[0] + weight * normalised(guess[:, 0] - guess[:, 1]),
    )
    both = vote(c, m, Config(gap="absolute"))
    torch.testing.assert_close(both, share * normalised(c) + (1 - share) * normalised(m))
    torch.testing.assert_close(both, vote(c, m, Config(gap="signed")))
    assert accuracy(torch.zeros(4, 2)) == 0.5
    always_wrong = torch.tensor([[0.0, 1.0], [0.0, 2.0]]).double()
    assert vote(always_wrong, always_wrong, Config()).isfinite().all()
    for bad in (math.nan, math.inf):
        with pytest.raises(ValueError, match="contrastive"):
            vote(c * bad, m, Config())
        with pytest.raises(ValueError, match="generative"):
            vote(c, m * bad, Config())


def test_matched_keeps_the_mean_beta():
    quality = torch.rand(100, 2, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for cfg in (Config(0.3, 0.7, 2.0, matched=True), Config(0.2, 1.0, 0.5, "signed", matched=True)):
        found = pair_beta(quality, balanced(cfg, quality))
        assert found.mean().item() == pytest.approx(cfg.beta * cfg.alpha) and found.std() > 0
    assert balanced(Config(), quality) == Config()


# ---- the toy of attributes


def test_the_attributes_toy():
    features, truth, picture, pairs, easy, scores = attributes(100)
    wrong = (pairs[:, 0] != pairs[:, 1]).sum(1)
    assert (
        torch.equal(wrong == 4, easy)
        and set(wrong.tolist()) == {1, 4}
        and 0.4 < easy.double().mean() < 0.6
    )
    assert torch.equal(pairs[:, 0], truth[picture]) and features.shape == (60, 24)
    for estimator in scores:
        gap = estimator[:, 0] - estimator[:, 1]
        assert gap[easy].mean() > gap[~easy].mean() + 2 * gap[easy].std() / 2


def test_the_betas_narrow_the_gap_between_easy_and_hard_pairs():
    changes = dict(da_dpo=torch.clone, shuffled=shuffled, inverted=inverted)
    found = on_attributes(100, 4.0, changes, steps=100)
    assert found["da_dpo"]["gap"] < found["shuffled"]["gap"] < found["inverted"]["gap"]
    assert found["da_dpo"]["gap"] < found["dpo"]["gap"] < found["inverted"]["gap"]


# ---- runs


SMALL = dict(base_steps=2, steps=3, batch_size=4, prompts=12, eval_size=4, max_response=6)


@pytest.mark.slow
@pytest.mark.parametrize("world", ["captions", "reviews"])
def test_a_run_and_its_fields_differ(world):
    found = []
    for cfg in (
        Config(),
        Config(reach=3.0),
        Config(matched=True),
        Config(gap="absolute"),
        Config(contrastive=1.0),
        Config(alpha=2.0),
    ):
        lab = Lab(Settings(world=world, lr=0.05, **SMALL), quiet=True)
        policy = run(lab, cfg)
        found.append(sum(p.detach().double().abs().sum().item() for p in policy.parameters()))
    assert len(set(found)) == len(found)


def test_the_estimators_are_frozen_models():
    lab = Lab(Settings(world="captions", **SMALL), quiet=True)
    policy = lab.base()
    rows = lab.preferences(policy, k=2)
    contrastive, generative = estimates(lab, policy, rows)
    assert contrastive.shape == generative.shape == (len(rows), 2)
    row = rows[3]
    assert (
        contrastive[3].tolist()
        == lab.world.similarity(
            [row["prompt"]] * 2, [lab.text(r) for r in row["responses"]]
        ).tolist()
    )
    assert generative[3].tolist() == pytest.approx(
        [sum(tokens) for tokens in lab.logps(policy, [row])[0]], abs=1e-4
    )
    lab = Lab(Settings(world="reviews", **SMALL), quiet=True)
    rows = lab.preferences(lab.base(), k=2)
    contrastive, generative = estimates(lab, policy := lab.base(), rows)
    swapped = {name: rows[3][name] for name in ("responses", "ends")} | {
        "prompt": rows[2]["prompt"]
    }
    other = [sum(tokens) for tokens in lab.logps(policy, lab.rows([swapped]))[0]]
    assert contrastive[3].tolist() == pytest.approx(
        [a - b for a, b in zip(generative[3].tolist(), other)], abs=1e-3
    )


# ---- the mutants of the loss: every one makes a difference on these inputs


def scored_pairs():
    """Pairs with scores in both directions; refused: scores below 0 or above 1, no scores."""
    rng = torch.Generator().manual_seed(8)
    quality = torch.rand(5, 2, generator=rng, dtype=torch.float64)
    items = [
        builders.changed(item, quality=quality.to(item[0].device)) for item in builders.pairs()
    ]
    items.append(builders.changed(items[0], quality=quality.clone().requires_grad_()))
    high, low = quality.clone(), quality.clone()
    high[0, 0], low[0, 1] = 1.25, -0.25
    edge = torch.tensor(
        [[0.0, 1.0], [1.0, 0.0], [1.0, 1.0], [0.0, 0.0], [0.5, 1.0]], dtype=torch.float64
    )
    return [
        *items,
        *(builders.changed(items[0], quality=q) for q in (high, low, edge)),
        builders.pairs()[0],
    ]


CASES = [
    dict(beta=0.3),
    dict(beta=1.7, alpha=0.7, reach=4.0, gap="absolute"),
    dict(beta=0.7, alpha=1.3, reach=0.8, gap="signed"),
]
INPUTS = scored_pairs
SURVIVORS = {}
