"""MADPO against its paper: weights, gradients, the margin a pair settles at, errors, the reward model."""

import math
from types import SimpleNamespace

import pytest
import torch

from claims.madpo import dpo_of_pairs, settled
from data import collate
from lab import Lab, Settings
from methods import dpo
from methods.madpo import (
    Config,
    RewardModel,
    loss,
    margin_weights,
    reward_margins,
    run,
    stretch,
)
from tests import builders
from toy.bandit import World

WIDE, NARROW = Config(tau=7.0), Config(c_max=2.0, tau=2.0)


def ragged(rows=5, length=7, seed=0, dtype=torch.float64):
    """Random log-probs of ragged responses, 0 outside the mask, and margins of either sign and beyond tau."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 2, 1), generator=rng)
    logps, ref_logps = (
        -3 * torch.rand(rows, 2, length, generator=rng, dtype=dtype) * mask for _ in range(2)
    )
    margin = torch.tensor([0.7, -0.4, 9.0, -9.0, 3.0], dtype=dtype)[:rows]
    return logps.requires_grad_(), ref_logps, SimpleNamespace(mask=mask, margin=margin)


def one(difference, margin, dtype=torch.float64):
    logps = torch.tensor([[[difference], [0.0]]], dtype=dtype, requires_grad=True)
    batch = SimpleNamespace(
        mask=torch.ones(1, 2, 1, dtype=torch.bool), margin=torch.tensor([margin], dtype=dtype)
    )
    return logps, torch.zeros_like(logps).detach(), batch


def weight(h, cfg):
    return margin_weights(torch.tensor(h, dtype=torch.float64), cfg).item()


@pytest.mark.parametrize(
    "cfg, h, c",
    [(WIDE, 0, 3.98637), (WIDE, 1, 3.96318), (WIDE, 4, 3.37722), (WIDE, 7, 1.0), (WIDE, 8, 0.56584)]
    + [(NARROW, 0, 1.68048), (NARROW, 1, 1.36418), (NARROW, 4, 0.59507)],
)
def test_how_far_a_margin_is_stretched(cfg, h, c):
    for sign in (1.0, -1.0):
        assert stretch(torch.tensor(sign * h, dtype=torch.float64), cfg).item() == pytest.approx(
            c, abs=1e-5
        )


@pytest.mark.parametrize(
    "cfg, h, w",
    [
        (WIDE, -8, 1),
        (WIDE, -2, 0.00343),
        (WIDE, -1, 0.06934),
        (WIDE, -0.5, 0.31887),
        (WIDE, 0, 1),
        (WIDE, 0.5, 1.41313),
    ]
    + [(WIDE, 1, 1.34237), (WIDE, 2, 1.13487), (WIDE, 4, 1.01831), (WIDE, 8, 0.98963)]
    + [(NARROW, -1, 0.75690), (NARROW, 1, 1.08943), (NARROW, 4, 0.93208)],
)
def test_weights(cfg, h, w):
    assert weight(float(h), cfg) == pytest.approx(w, abs=1e-5)


@pytest.mark.parametrize(
    "c_max, c_min, lam, tau", [(4.0, None, 1.0, 7.0), (2.0, 0.9, 3.0, 0.5), (1.5, 0.1, 0.2, 40.0)]
)
def test_shape_of_the_stretch(c_max, c_min, lam, tau):
    cfg = Config(c_max=c_max, c_min=c_min, lam=lam, tau=tau)
    c = stretch(torch.linspace(0, 2 * tau, 101, dtype=torch.float64), cfg)
    assert (c.diff() < 0).all() and c[50].item() == pytest.approx(1.0, abs=1e-12)
    assert stretch(torch.tensor(1e6), cfg).item() == pytest.approx(cfg.c_min)
    assert weight(-tau, cfg) == 1.0 and weight(-tau + 1e-9, cfg) == pytest.approx(
        1.0, abs=1e-6
    )  # continuous at the cut


def test_the_worked_example():
    logps, ref_logps, batch = one(3.0, 1.0)
    losses, metrics = loss(logps, ref_logps, batch, WIDE)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.item() == pytest.approx(0.744150, abs=1e-6)
    assert grad.flatten().tolist() == pytest.approx([-0.057126, 0.057126], abs=1e-6)
    assert (
        metrics["weight"].item() == pytest.approx(0.57126, abs=1e-5)
        and metrics["agreement"].item() == 1.0
    )
    (plain,) = torch.autograd.grad(dpo_of_pairs(logps, ref_logps, batch, WIDE)[0].sum(), logps)
    assert plain[0, 0, 0].item() == pytest.approx(-0.042556, abs=1e-6)


def test_gradient_is_the_weighted_closed_form():
    logps, ref_logps, batch = ragged()
    cfg = Config(beta=0.3, tau=2.0)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    assert torch.autograd.gradcheck(
        lambda x: loss(logps.detach(), x, batch, cfg)[0], ref_logps.clone().requires_grad_()
    )
    (grad,) = torch.autograd.grad(loss(logps, ref_logps, batch, cfg)[0].sum(), logps)
    ratio = (logps - ref_logps).sum(-1).detach()
    slope = (
        margin_weights(batch.margin, cfg)
        * cfg.beta
        * torch.sigmoid(-cfg.beta * (ratio[:, 0] - ratio[:, 1]))
    )
    torch.testing.assert_close(
        grad, torch.stack([-slope, slope], 1)[..., None].expand_as(grad), rtol=0, atol=1e-12
    )


def test_without_a_margin_it_is_dpo():
    logps, ref_logps, batch = ragged()
    plain = dpo.loss(logps, ref_logps, batch, dpo.Config(0.3))[0]
    flat = loss(
        logps,
        ref_logps,
        SimpleNamespace(mask=batch.mask, margin=torch.zeros(5, dtype=torch.float64)),
        Config(0.3),
    )[0]
    near = loss(logps, ref_logps, batch, Config(0.3, c_max=1.0001, c_min=0.9999))[0]
    torch.testing.assert_close(flat, plain, rtol=0, atol=0)
    torch.testing.assert_close(near, plain, rtol=0, atol=1e-3)
    torch.testing.assert_close(
        dpo_of_pairs(logps, ref_logps, batch, Config(0.3))[0], plain, rtol=0, atol=0
    )


@pytest.mark.parametrize("h, m", [(1.0, 3.96318), (8.0, 7.98958), (-1.0, -3.96318)])
@pytest.mark.parametrize("beta", [1.0, 0.3])
def test_the_margin_that_a_pair_settles_at(h, m, beta):
    assert settled(h, Config(beta, tau=7.0)) == pytest.approx(m, abs=1e-5)


def test_near_one_stretch_a_pair_keeps_its_margin():
    assert settled(1.0, Config(1.0, c_max=1 + 1e-9, c_min=1 - 1e-9)) == pytest.approx(1.0, abs=1e-6)


def test_a_pair_seen_from_the_other_side_costs_the_same():
    """(y1, y2, label 1) and (y2, y1, label 2): the margin is that of the label, so both are the same row."""
    reward = {"a": 1.3, "b": -0.4}

    def cost(first, second, label):
        chosen, rejected = (first, second) if label == 1 else (second, first)
        logps, ref_logps, batch = one(
            {"a": 0.6, "b": -0.2}[chosen] - {"a": 0.6, "b": -0.2}[rejected],
            reward[chosen] - reward[rejected],
        )
        return loss(logps, ref_logps, batch, WIDE)[0].item()

    assert cost("a", "b", 1) == cost("b", "a", 2) and cost("a", "b", 2) == cost(
        "b", "a", 1
    ) != cost("a", "b", 1)


def test_no_gradient_reaches_the_reward_model():
    logps, ref_logps, batch = ragged()
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
    assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
    assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all() and all(
        m.isfinite() for m in metrics.values()
    )


def test_rows_do_not_meet():
    logps, ref_logps, batch = ragged()
    logps = logps.detach()
    whole = loss(logps, ref_logps, batch, Config())[0]
    padded = [torch.nn.functional.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(
        loss(*padded[:2], SimpleNamespace(mask=padded[2], margin=batch.margin), Config())[0], whole
    )
    for b in range(5):
        row = SimpleNamespace(mask=batch.mask[b : b + 1], margin=batch.margin[b : b + 1])
        torch.testing.assert_close(
            loss(logps[b : b + 1], ref_logps[b : b + 1], row, Config())[0][0], whole[b]
        )


@pytest.mark.parametrize(
    "change",
    [dict(beta=0.2), dict(c_max=3.0, c_min=0.25), dict(c_min=0.5), dict(tau=2.0), dict(lam=0.5)],
)
def test_every_field_of_the_loss_counts(change):
    logps, ref_logps, batch = ragged()
    values = [loss(logps, ref_logps, batch, cfg)[0].sum() for cfg in (Config(), Config(**change))]
    assert abs(values[0] - values[1]) > 1e-6
    grads = [torch.autograd.grad(v, logps)[0] for v in values]
    assert (grads[0] - grads[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "name, values",
    [
        ("beta", (0.0, -1.0, math.inf, math.nan)),
        ("c_max", (1.0, 0.5, math.inf, math.nan)),
        ("c_min", (0.0, 1.0, 2.0, math.nan)),
    ]
    + [
        ("tau", (0.0, -1.0, math.inf)),
        ("lam", (0.0, math.nan)),
        ("reward_lr", (0.0, math.inf)),
        ("reward_decay", (-0.1, math.nan)),
    ]
    + [("reward_steps", (0, -1))],
)
def test_fields_out_of_range_are_refused(name, values):
    for value in values:
        with pytest.raises(ValueError, match=f"{name} = "):
            Config(**{name: value})
    assert Config(c_max=2.0).c_min == 0.5


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


def test_the_reward_model_of_a_table_can_hold_any_rewards():
    """It starts at 0 margin, and its margins are those of its log-probs, up to a constant."""
    world = World(vocab=3, length=3)
    reward_model = RewardModel(world.model())
    batch = collate([dict(prompt=0, responses=[[2, 0, 1], [0, 1, 2]])])
    start = reward_model(batch)[0]
    assert (start[0] - start[1]).item() == pytest.approx(0.0, abs=1e-6)
    wanted = torch.randn(27, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reward_model.body.set_log_probs(wanted)
    found = reward_model(batch)[0]
    assert (found[0] - found[1]).item() == pytest.approx((wanted[19] - wanted[5]).item(), abs=1e-5)


def test_the_reward_model_of_text_sees_the_whole_response_and_leaves_the_model_alone():
    lab = Lab(Settings(world="ranking", base_steps=0, batch_size=4), quiet=True)
    model = lab.base()
    rows = lab.rows(
        [
            dict(prompt="find cheap:", responses=[" apple pie", " mint tea"]),
            dict(prompt="find hot:", responses=[" soup", " pie"]),
        ]
    )
    reward_model = RewardModel(model)
    torch.nn.init.normal_(reward_model.head, generator=torch.Generator().manual_seed(0))
    batch = collate(rows, lab.world.tokenizer)
    hidden = model.hidden(batch).flatten(0, 1)
    last = batch.source.gather(2, batch.mask.sum(-1, keepdim=True) - 1)[..., 0]
    torch.testing.assert_close(reward_model(batch), hidden[last] @ reward_model.head)
    before = [p.clone() for p in model.parameters()]
    margins = reward_margins(lab, model, rows, Config(reward_steps=3, reward_lr=0.01))
    assert len(margins) == 2 and all(m > 0 for m in margins)
    assert all(torch.equal(a, b) for a, b in zip(before, model.parameters()))


@pytest.mark.parametrize(
    "change", [dict(reward_steps=5), dict(reward_lr=0.1), dict(reward_decay=0.5)]
)
def test_the_reward_models_settings_change_the_run(change):
    def weights(cfg):
        return run(
            Lab(Settings(world="bandit", steps=5, batch_size=64, prompts=256), quiet=True), cfg
        ).logits

    plain = dict(reward_steps=20, reward_lr=0.05)
    assert not torch.equal(weights(Config(**plain)), weights(Config(**plain | change)))


def test_a_reward_model_that_diverges_names_its_own_learning_rate():
    lab = Lab(Settings(world="bandit", steps=5, batch_size=64, prompts=256), quiet=True)
    with pytest.raises(ValueError, match="a lower --reward_lr may help"):
        run(lab, Config(reward_lr=1e38, reward_steps=50))


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
    "margin_weights: h.detach() -> h": "a column of the data carries no gradient; if one did, test_madpo.py would notice"
}
