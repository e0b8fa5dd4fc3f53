"""MADPO against its paper: weights, gradients, settled margins, the reward model."""

import math
from types import SimpleNamespace

import pytest
import torch

from data import UserError, collate
from lab import Lab, Settings
from methods import dpo
from methods.madpo import (
    Config,
    RewardModel,
    RewardTable,
    loss,
    margin_weights,
    reward_margins,
    run,
    stretch,
)
from tests import builders
from toy.bandit import World

WIDE, NARROW = Config(tau=7.0), Config(c_max=2.0, tau=2.0)
MARGINS = [0.7, -0.4, 9.0, -9.0, 3.0]  # of either sign, and beyond tau


def judged():
    """Five ragged pairs with a reward model's margins."""
    return builders.ragged(margin=torch.tensor(MARGINS, dtype=torch.float64))


def one(difference, margin, dtype=torch.float64):
    """A pair of one token each, whose log-ratios differ by `difference`."""
    item = builders.one_pair(difference, 0.0, dtype=dtype)
    return builders.changed(item, margin=torch.tensor([margin], dtype=dtype))


def weight(h, cfg):
    return margin_weights(torch.tensor(h, dtype=torch.float64), cfg).item()


# ---- the weights


@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "h", "c"),
    [(WIDE, 0, 3.98637), (WIDE, 1, 3.96318), (WIDE, 4, 3.37722), (WIDE, 7, 1.0), (WIDE, 8, 0.56584)]
    + [(NARROW, 0, 1.68048), (NARROW, 1, 1.36418), (NARROW, 4, 0.59507)],
)
def test_how_far_a_margin_is_stretched(cfg, h, c):
    for sign in (1.0, -1.0):
        found = stretch(torch.tensor(sign * h, dtype=torch.float64), cfg)
        assert found.item() == pytest.approx(c, abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "h", "w"),
    [(WIDE, -8, 1), (WIDE, -2, 0.00343), (WIDE, -1, 0.06934), (WIDE, -0.5, 0.31887)]
    + [(WIDE, 0, 1), (WIDE, 0.5, 1.41313), (WIDE, 1, 1.34237), (WIDE, 2, 1.13487)]
    + [(WIDE, 4, 1.01831), (WIDE, 8, 0.98963)]
    + [(NARROW, -1, 0.75690), (NARROW, 1, 1.08943), (NARROW, 4, 0.93208)],
)
def test_the_weight_of_a_margin(cfg, h, w):
    assert weight(float(h), cfg) == pytest.approx(w, abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("c_max", "c_min", "lam", "tau"),
    [(4.0, None, 1.0, 7.0), (2.0, 0.9, 3.0, 0.5), (1.5, 0.1, 0.2, 40.0)],
)
def test_the_stretch_falls_from_c_max_through_1_at_tau_to_c_min(c_max, c_min, lam, tau):
    cfg = Config(c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    c = stretch(torch.linspace(0, 2 * tau, 101, dtype=torch.float64), cfg)
    assert (c.diff() < 0).all()
    assert c[50].item() == pytest.approx(1.0, abs=1e-12)
    assert stretch(torch.tensor(1e6), cfg).item() == pytest.approx(cfg.c_min)
    # continuous at the cut
    assert weight(-tau, cfg) == 1.0
    assert weight(-tau + 1e-9, cfg) == pytest.approx(1.0, abs=1e-6)


# ---- the loss


@pytest.mark.paper
def test_the_loss_has_the_value_of_the_worked_example():
    logps, ref_logps, batch = one(3.0, 1.0)
    _, metrics = loss(logps, ref_logps, batch, WIDE)
    losses, gradient = builders.value_and_gradient(loss, logps, ref_logps, batch, WIDE)
    assert losses.item() == pytest.approx(0.744150, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.057126, 0.057126], abs=1e-6)
    assert metrics["weight"].item() == pytest.approx(0.57126, abs=1e-5)
    assert metrics["agreement"].item() == 1.0
    plain, slope = builders.value_and_gradient(dpo.loss, logps, ref_logps, batch, dpo.Config())
    assert plain.item() == pytest.approx(0.554355, abs=1e-6)
    assert slope[0, 0, 0].item() == pytest.approx(-0.042556, abs=1e-6)


def test_the_gradient_is_the_weighted_closed_form():
    logps, ref_logps, batch = judged()
    cfg = Config(beta=0.3, tau=2.0)
    reference = ref_logps.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    assert torch.autograd.gradcheck(lambda x: loss(logps.detach(), x, batch, cfg)[0], reference)
    _, gradient = builders.value_and_gradient(loss, logps, ref_logps, batch, cfg)
    chosen, rejected = (logps - ref_logps).sum(-1).detach().unbind(1)
    z = cfg.beta * (chosen - rejected)
    slope = margin_weights(batch.margin, cfg) * cfg.beta * torch.sigmoid(-z)
    expected = torch.stack([-slope, slope], 1)[..., None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


@pytest.mark.paper
def test_without_a_margin_it_is_dpo():
    logps, ref_logps, batch = judged()
    plain = dpo.loss(logps, ref_logps, batch, dpo.Config(0.3))[0]
    near = loss(logps, ref_logps, batch, Config(0.3, c_max=1.0001, c_min=0.9999))[0]
    torch.testing.assert_close(near, plain, rtol=0, atol=1e-3)
    batch.margin = torch.zeros(5, dtype=torch.float64)
    flat = loss(logps, ref_logps, batch, Config(0.3))[0]
    torch.testing.assert_close(flat, plain, rtol=0, atol=0)


def settled(h, cfg):
    """The margin at which the expected loss of a pair of true margin h is minimal, by bisection.

    Each label occurs with its Bradley-Terry probability under h."""
    low, high, h = -50.0, 50.0, torch.tensor([h, -h], dtype=torch.float64)
    batch = SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool), margin=h)
    for _ in range(60):
        m = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        logps = torch.stack([m, -m, -m, m]).view(2, 2, 1) / (2 * cfg.beta)
        losses, _ = loss(logps, torch.zeros_like(logps), batch, cfg)
        (slope,) = torch.autograd.grad((torch.sigmoid(h) * losses).sum(), m)
        low, high = (low, m.item()) if slope > 0 else (m.item(), high)
    return low


@pytest.mark.paper
@pytest.mark.parametrize("beta", [1.0, 0.3])
@pytest.mark.parametrize("h", [1.0, -1.0])
def test_a_pair_below_tau_settles_at_its_stretched_margin(h, beta):
    assert settled(h, Config(beta, tau=7.0)) == pytest.approx(3.96318 * h, abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_a_pair_beyond_tau_is_hardly_damped(beta):
    """It settles at 7.99, not at c(h) h = 4.53."""
    found = settled(8.0, Config(beta, tau=7.0))
    assert found == pytest.approx(7.98958, abs=1e-5)
    assert found - 8.0 * 0.56584 > 3
    assert 8.0 * 0.56584 == pytest.approx(4.52671, abs=1e-4)


@pytest.mark.paper
def test_without_any_stretch_a_pair_keeps_its_margin():
    cfg = Config(1.0, c_max=1 + 1e-9, c_min=1 - 1e-9)
    assert settled(1.0, cfg) == pytest.approx(1.0, abs=1e-6)


@pytest.mark.paper
def test_a_pair_costs_the_same_whichever_response_is_named_first():
    """(y1, y2, label 1) and (y2, y1, label 2) are the same pair, so they have the same loss."""
    reward, log_ratio = {"a": 1.3, "b": -0.4}, {"a": 0.6, "b": -0.2}

    def cost(first, second, label):
        chosen, rejected = (first, second) if label == 1 else (second, first)
        item = one(log_ratio[chosen] - log_ratio[rejected], reward[chosen] - reward[rejected])
        return loss(*item, WIDE)[0].item()

    assert cost("a", "b", 1) == cost("b", "a", 2)
    assert cost("a", "b", 2) == cost("b", "a", 1)
    assert cost("a", "b", 1) != cost("a", "b", 2)


@pytest.mark.paper
def test_no_gradient_reaches_the_reward_model():
    logps, ref_logps, batch = judged()
    batch.margin.requires_grad_()
    losses, metrics = loss(logps, ref_logps, batch, Config())
    assert torch.autograd.grad(losses.sum(), batch.margin, allow_unused=True)[0] is None
    assert not any(m.requires_grad for m in metrics.values())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4, 30.0, -30.0, 0.0])
@pytest.mark.parametrize("difference", [1e4, -1e4])
def test_huge_margins_stay_finite(dtype, margin, difference):
    logps, ref_logps, batch = one(difference, margin, dtype)
    losses, metrics = loss(logps, ref_logps, batch, Config(1.0))
    assert losses.isfinite().all()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
    assert all(m.isfinite() for m in metrics.values())


def test_rows_do_not_change_each_other_and_padding_changes_nothing():
    logps, ref_logps, batch = judged()
    whole = loss(logps, ref_logps, batch, Config())[0]
    logps, ref_logps, mask = (
        torch.nn.functional.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)
    )
    padded = loss(logps, ref_logps, SimpleNamespace(mask=mask, margin=batch.margin), Config())[0]
    torch.testing.assert_close(padded, whole)
    for b in range(5):
        row = SimpleNamespace(mask=mask[b : b + 1], margin=batch.margin[b : b + 1])
        alone = loss(logps[b : b + 1], ref_logps[b : b + 1], row, Config())[0]
        torch.testing.assert_close(alone[0], whole[b])


@pytest.mark.parametrize(
    "change",
    [dict(beta=0.2), dict(c_max=3.0, c_min=0.25), dict(c_min=0.5), dict(tau=2.0), dict(lam=0.5)],
)
def test_every_field_of_the_loss_counts(change):
    logps, ref_logps, batch = judged()
    values = [loss(logps, ref_logps, batch, cfg)[0].sum() for cfg in (Config(), Config(**change))]
    gradients = [torch.autograd.grad(value, logps)[0] for value in values]
    assert abs(values[0] - values[1]) > 1e-6
    assert (gradients[0] - gradients[1]).abs().max() > 1e-6


# ---- errors


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("beta", (0.0, -1.0, math.inf, math.nan)),
        ("c_max", (1.0, 0.5, math.inf, math.nan)),
        ("c_min", (0.0, 1.0, 2.0, math.nan)),
        ("tau", (0.0, -1.0, math.inf)),
        ("lam", (0.0, math.nan)),
        ("reward_lr", (0.0, math.inf)),
        ("reward_decay", (-0.1, math.nan)),
        ("reward_steps", (0, -1)),
    ],
)
def test_fields_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(UserError, match=f"{name} = "):
            Config(**{name: value})


def test_c_min_is_1_over_c_max_by_default():
    assert Config(c_max=2.0).c_min == 0.5


def test_rows_that_are_not_pairs_are_refused():
    logps, ref_logps, batch = judged()
    with pytest.raises(UserError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(UserError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the reward model, and runs


def test_the_reward_model_of_a_table_can_hold_any_rewards():
    """All margins are 0 at first, and margins are differences of its log-probs."""
    world = World(vocab=3, length=3)
    reward_model = RewardTable(world.model())
    batch = collate([dict(prompt=0, responses=[[2, 0, 1], [0, 1, 2]])])
    start = reward_model(batch)[0]
    assert (start[0] - start[1]).item() == pytest.approx(0.0, abs=1e-6)
    wanted = torch.randn(27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward_model.table.set_log_probs(wanted)
    found = reward_model(batch)[0]
    assert (found[0] - found[1]).item() == pytest.approx((wanted[19] - wanted[5]).item(), abs=1e-5)


def test_the_reward_model_of_text_sees_the_whole_response_and_leaves_the_model_alone():
    lab = Lab(Settings(world="ranking", base_steps=0, batch_size=4, device="cpu"), quiet=True)
    model = lab.base()
    rows = lab.rows(
        [
            dict(prompt="find cheap:", responses=[" apple pie", " mint tea"]),
            dict(prompt="find hot:", responses=[" soup", " pie"]),
        ]
    )
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.head.weight, generator=torch.Generator().manual_seed(0))
    batch = collate(rows, lab.world.tokenizer)
    hidden = model.hidden(batch).flatten(0, 1)
    last = batch.source.gather(2, batch.mask.sum(-1, keepdim=True) - 1)[..., 0]
    torch.testing.assert_close(reward_model(batch), reward_model.head(hidden[last])[..., 0])
    before = [p.clone() for p in model.parameters()]
    margins = reward_margins(lab, model, rows, Config(reward_steps=3, reward_lr=0.01))
    assert len(margins) == 2 and all(m > 0 for m in margins)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.slow
@pytest.mark.parametrize(
    "change", [dict(reward_steps=5), dict(reward_lr=0.1), dict(reward_decay=0.5)]
)
def test_the_reward_models_settings_change_the_run(change):
    def weights(cfg):
        settings = Settings(world="bandit", steps=5, batch_size=64, prompts=256)
        return run(Lab(settings, quiet=True), cfg).logits

    plain = dict(reward_steps=20, reward_lr=0.05)
    assert not torch.equal(weights(Config(**plain)), weights(Config(**plain | change)))


def test_a_reward_model_that_diverges_names_its_own_learning_rate():
    lab = Lab(Settings(world="bandit", steps=5, batch_size=64, prompts=256), quiet=True)
    with pytest.raises(UserError, match="a lower --reward_lr may help"):
        run(lab, Config(reward_lr=1e38, reward_steps=50))


@pytest.mark.slow
def test_a_run_improves_the_reward():
    lab = Lab(Settings(world="bandit", steps=100, prompts=2048), quiet=True)
    policy = run(lab, Config(beta=0.5, reward_lr=0.05, reward_steps=50))
    assert policy.expect(lab.world.rewards()) > lab.reference.expect(lab.world.rewards()) + 1


# ---- the mutants of the loss: every one makes a difference on these inputs


def judged_pairs():
    """Pairs with a reward model's margins, in both directions, small and large."""
    margin = torch.tensor([-9.0, -0.3, 0.2, 2.5, 8.0], dtype=torch.float64)
    return [builders.changed(item, margin=margin) for item in builders.pairs()]


CASES = [
    dict(beta=0.3, c_max=4.0, tau=2.0),
    dict(beta=1.7, c_max=2.0, c_min=0.3, tau=4.0, lam=0.5),
]
INPUTS = judged_pairs
SURVIVORS = {
    "margin_weights: h.detach() -> h": "a column of the data carries no gradient; "
    "test_no_gradient_reaches_the_reward_model gives it one"
}
