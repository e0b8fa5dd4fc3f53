"""The losses of the study: values, gradients, identities and errors; and its three scenarios."""

import math
from types import SimpleNamespace

import pytest
import torch

import lab
from claims.insights import page, starts, study, trained
from methods import dpo, insights, sft, survey
from methods.insights import FREE, SCENARIOS, VARIANTS, Config, begun, loss, prospects, run
from tests import builders
from tests.builders import ragged
from toy import tree


def canonical():
    """A pair of lengths 4 and 3 with a = 1, c = -0.5, h = 1.5.

    The log-probs are -4 and -6, those of the reference -5 and -5.5.
    """
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 1, 3] = False
    count = mask.sum(-1, keepdim=True)
    logps = (
        torch.tensor([-4.0, -6.0], dtype=torch.float64)[:, None] / count * mask
    ).requires_grad_()
    ref_logps = torch.tensor([-5.0, -5.5], dtype=torch.float64)[:, None] / count * mask
    return logps, ref_logps, SimpleNamespace(mask=mask)


def value(item, *args, **fields):
    return loss(*item, Config(*args, **fields))[0]


def gradient(item, *args, **fields):
    return torch.autograd.grad(value(item, *args, **fields).sum(), item[0])[0]


def sums(item):
    logps, ref_logps, batch = item
    a, c = (logps - ref_logps).sum(-1).unbind(1)
    return *logps.sum(-1).unbind(1), a, c, *batch.mask.sum(-1).double().unbind(1)


CANONICAL = [  # fields, value, slope in log pi(y_w), slope in log pi(y_l)
    (dict(), 0.620957, -0.046257, 0.046257),
    (dict(variant="ipo", ipo_mean=False), 12.25, -7.0, 7.0),
    (dict(variant="ipo"), 21.006944, -2.291667, 3.055556),
    (dict(variant="kto", z0=0.0), 0.962523, -0.024938, 0.024984),
    (dict(variant="kto", z0=0.3), 0.962518, -0.024969, 0.024960),
    (
        dict(variant="kto"),
        2 * 0.468795,
        2 * -0.012469,
        2 * 0.012430,
    ),  # z 0 and 1; the sum, not the mean, of the two sides
    (dict(variant="cpo", lam=0.0), 0.598139, -0.045017, 0.045017),
    (dict(variant="cpo"), 1.598139, -0.295017, 0.045017),
    (dict(variant="nll"), 1.0, -0.25, 0.0),
]


@pytest.mark.paper
@pytest.mark.parametrize("fields, known, chosen, rejected", CANONICAL)
def test_every_variant_has_its_value_on_the_canonical_pair(fields, known, chosen, rejected):
    item = canonical()
    assert value(item, **fields).item() == pytest.approx(known, abs=2e-6)
    grad = gradient(item, **fields)[0]
    torch.testing.assert_close(
        grad[:, 0], torch.tensor([chosen, rejected], dtype=torch.float64), rtol=0, atol=1.5e-6
    )
    assert (grad[0] == grad[0, 0]).all() and (
        grad[1, :3] == grad[1, 0]
    ).all()  # every token of a response alike


@pytest.mark.paper
@pytest.mark.parametrize(
    "fields, known",
    [
        (dict(), 0.693147),
        (dict(variant="ipo"), 25.0),
        (dict(variant="ipo", ipo_mean=False), 25.0),
        (dict(variant="kto", z0=0.0), 1.0),
    ]
    + [
        (dict(variant="kto"), 1.0),
        (dict(variant="kto", lambda_u=0.0), 0.5),
        (dict(variant="ipo", tau=0.5), 1.0),
    ],
)
def test_every_variant_has_its_value_at_the_reference(fields, known):
    _, ref_logps, batch = ragged()
    losses = value((ref_logps, ref_logps, batch), **fields)
    torch.testing.assert_close(
        losses, torch.full((5,), known, dtype=torch.float64), rtol=1e-6, atol=0
    )


@pytest.mark.paper
@pytest.mark.parametrize("seed", [1, 2])
def test_slopes_are_those_of_the_formulas(seed):
    """In log pi(y_w) and log pi(y_l), for random ragged pairs."""
    item = ragged(seed=seed, scale=3.0)
    lw, ll, a, c, nw, nl = (x.detach() for x in sums(item))
    s, h = torch.sigmoid, a - c
    good, bad = c.mean().clamp(min=0), a.mean().clamp(min=0)
    mean_h = a / nw - c / nl

    def hill(x):
        return s(x) * s(-x)

    slopes = [
        (dict(beta=0.4), -0.4 * s(-0.4 * h), 0.4 * s(-0.4 * h)),
        (dict(variant="ipo", tau=0.3, ipo_mean=False), 2 * (h - 1 / 0.6), -2 * (h - 1 / 0.6)),
        (dict(variant="ipo", tau=0.3), 2 * (mean_h - 1 / 0.6) / nw, -2 * (mean_h - 1 / 0.6) / nl),
        (
            dict(variant="kto", beta=0.4, z0=0.7),
            -0.4 * hill(0.4 * (a - 0.7)),
            0.4 * hill(0.4 * (0.7 - c)),
        ),
        (dict(variant="kto", beta=0.4), -0.4 * hill(0.4 * (a - good)), 0.4 * hill(0.4 * (bad - c))),
        (
            dict(variant="kto", z0=0.7, lambda_d=2.0, lambda_u=0.3),
            -0.2 * hill(0.1 * (a - 0.7)),
            0.03 * hill(0.1 * (0.7 - c)),
        ),
        (
            dict(variant="cpo", beta=0.4, lam=0.6),
            -0.4 * s(-0.4 * (lw - ll)) - 0.6 / nw,
            0.4 * s(-0.4 * (lw - ll)),
        ),
        (dict(variant="nll"), -1 / nw, 0 * lw),
    ]
    for fields, chosen, rejected in slopes:
        expected = torch.stack([chosen, rejected], 1)[..., None].expand_as(item[0])
        torch.testing.assert_close(
            gradient(item, **fields), expected.contiguous(), rtol=1e-10, atol=1e-14
        )


@pytest.mark.parametrize(
    "fields", [f for f, *_ in CANONICAL if f != dict(variant="kto")]
)  # z is not part of the graph
def test_gradients_are_those_of_the_values(fields):
    logps, ref_logps, batch = ragged(rows=3, length=4, seed=3)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, Config(**fields))[0], logps)


# the same losses in files of their own
TWICE = [
    (dict(beta=0.3), dpo, dpo.Config(0.3)),
    (dict(beta=0.3), survey, survey.Config("dpo", beta=0.3)),
    (dict(variant="ipo", tau=0.3), survey, survey.Config("ipo_mean", tau=0.3)),
    (dict(variant="ipo", tau=0.3, ipo_mean=False), survey, survey.Config("ipo", tau=0.3)),
    (dict(variant="kto", beta=0.3), survey, survey.Config("kto", beta=0.3)),
    (dict(variant="kto", beta=0.3, z0=0.4), survey, survey.Config("kto", beta=0.3, z0=0.4)),
    (dict(variant="kto", beta=0.3, z0=0.0), survey, survey.Config("apo_zero", beta=0.3)),
    (dict(variant="cpo", beta=0.3, lam=0.7), survey, survey.Config("cpo", beta=0.3, lam=0.7)),
    (dict(variant="nll"), sft, sft.Config()),
]


@pytest.mark.parametrize("fields, module, theirs", TWICE)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_a_loss_that_stands_in_two_files_is_the_same_in_both(fields, module, theirs, scale):
    logps, ref_logps, batch = ragged(seed=4, scale=scale)
    item = (
        logps,
        ref_logps,
        SimpleNamespace(mask=batch.mask, scores=torch.tensor([[1.0, 0.0]] * 5)),
    )
    own = module.loss(*item, theirs)[0]
    torch.testing.assert_close(value(item, **fields), own, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient(item, **fields), torch.autograd.grad(own.sum(), item[0])[0], rtol=1e-10, atol=1e-12
    )


def test_cpo_has_no_reference():
    """Its first term is DPO with a uniform reference, and ref_logps changes nothing."""
    logps, ref_logps, batch = item = ragged(seed=5)
    first = -torch.rand(5, 1, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    uniform = torch.zeros_like(ref_logps)
    uniform[..., 0] = first.expand(-1, 2)  # any probability, the same for both
    for read in (value, gradient):
        torch.testing.assert_close(
            read(item, "cpo", lam=0.0), read((logps, uniform, batch)), rtol=0, atol=1e-12
        )
    for name in FREE:
        for other in (None, 3 * ref_logps - 1, torch.full_like(ref_logps, math.nan)):
            assert torch.equal(value((logps, other, batch), name), value(item, name))
            assert torch.equal(gradient((logps, other, batch), name), gradient(item, name))
    for name in set(VARIANTS) - set(FREE):
        assert not torch.allclose(value((logps, 1.7 * ref_logps, batch), name), value(item, name))


@pytest.mark.paper
@pytest.mark.parametrize("mean", [True, False])
def test_ipo_is_at_rest_at_its_target_and_turns_round_beyond(mean):
    _, ref_logps, batch = ragged(seed=6)
    weight = (1 / batch.mask.sum(-1).double()) if mean else torch.ones(5, 2).double()
    for h, sign in ((5.0, 0), (4.9, -1), (5.1, 1)):  # 1 / (2 tau) = 5
        ratio = torch.zeros_like(ref_logps)
        ratio[:, 0, 0] = 0.5 * h / weight[:, 0]
        ratio[:, 1, 0] = -0.5 * h / weight[:, 1]
        item = (ref_logps + ratio).requires_grad_(), ref_logps, batch
        grad = gradient(item, "ipo", ipo_mean=mean)[..., 0]
        torch.testing.assert_close(
            value(item, "ipo", ipo_mean=mean),
            torch.full((5,), (h - 5) ** 2, dtype=torch.float64),
            rtol=0,
            atol=1e-9,
        )
        expected = 2 * (h - 5) * torch.stack([weight[:, 0], -weight[:, 1]], 1)
        torch.testing.assert_close(grad, expected, rtol=0, atol=1e-9)
        assert sign == 0 or (grad[:, 0].sign() == sign).all()


@pytest.mark.paper
def test_kto_weighs_its_two_sides_apart():
    logps, ref_logps, batch = item = ragged(seed=7)
    turned = logps.flip(1), ref_logps.flip(1), SimpleNamespace(mask=batch.mask.flip(1))
    # a response's losses as chosen and as rejected sum to 1
    for z0 in (0.0, 0.4):
        good, bad = (dict(variant="kto", z0=z0, **{name: 0.0}) for name in ("lambda_u", "lambda_d"))
        torch.testing.assert_close(
            value(turned, **good), 1 - value(item, **bad), rtol=0, atol=1e-12
        )
        torch.testing.assert_close(
            value(turned, **bad), 1 - value(item, **good), rtol=0, atol=1e-12
        )
    grad = gradient(item, "kto", lambda_u=0.0)
    assert (grad[:, 1] == 0).all() and (grad[:, 0][batch.mask[:, 0]] < 0).all()
    grad = gradient(item, "kto", lambda_d=0.0)
    assert (grad[:, 0] == 0).all() and (grad[:, 1][batch.mask[:, 1]] > 0).all()


def uneven():
    """Four good responses and two bad ones, in rows of which some have only one response."""
    logps, ref_logps, batch = ragged(seed=8)
    there = torch.tensor([[1, 1], [1, 0], [1, 0], [0, 1], [1, 0]]).bool()[..., None]
    return (
        (logps.detach() * there).requires_grad_(),
        ref_logps * there,
        SimpleNamespace(mask=batch.mask & there),
    )


def test_kto_takes_more_good_than_bad_responses_and_the_others_do_not():
    logps, ref_logps, batch = item = uneven()
    a, c = (logps - ref_logps).sum(-1).detach().unbind(1)
    z_good, z_bad = c[[0, 3]].mean().clamp(min=0), a[[0, 1, 2, 4]].mean().clamp(min=0)
    good, bad = torch.sigmoid(0.1 * (z_good - a)), torch.sigmoid(0.1 * (c - z_bad))
    expected = torch.stack([good[0] + bad[0], good[1], good[2], bad[3], good[4]])
    torch.testing.assert_close(value(item, "kto"), expected, rtol=0, atol=1e-12)
    assert torch.equal((gradient(item, "kto") != 0).any(-1), batch.mask.any(-1))
    for name in set(VARIANTS) - {"kto"}:
        with pytest.raises(ValueError, match="no scored token"):
            value(item, name)
    batch.mask[1] = False
    with pytest.raises(ValueError, match="no scored token"):
        value(item, "kto")


def test_ktos_reference_point_carries_no_gradient_and_is_never_negative():
    item = ragged(seed=9)
    (alone,) = torch.autograd.grad(value(item, "kto")[0], item[0])
    assert (alone[1:] == 0).all() and (alone[0] != 0).any()
    logps, ref_logps, batch = item
    low = (
        (ref_logps - 1.0 * batch.mask).requires_grad_(),
        ref_logps,
        batch,
    )  # all ratios negative: z is 0
    torch.testing.assert_close(value(low, "kto"), value(low, "kto", z0=0.0), rtol=0, atol=0)
    high = (ref_logps + 1.0 * batch.mask).requires_grad_(), ref_logps, batch
    assert not torch.allclose(value(high, "kto"), value(high, "kto", z0=0.0))
    # z is the mean of the other side, so it does not depend on the response it is compared with
    a, c = (high[0] - ref_logps).sum(-1).detach().unbind(1)
    expected = torch.sigmoid(0.1 * (c.mean() - a)) + torch.sigmoid(0.1 * (c - a.mean()))
    torch.testing.assert_close(value(high, "kto"), expected, rtol=0, atol=1e-12)


@pytest.mark.paper
def test_kto_saturates_far_from_its_reference_point():
    present = torch.ones(1, 2, dtype=torch.bool)
    slopes = [
        prospects(torch.tensor([x]), torch.tensor([-x]), present, Config("kto", z0=0.0))[1][
            "slope"
        ].item()
        for x in (0.0, 10.0, 300.0)
    ]
    assert (
        slopes[0] == 1
        and slopes[1] == pytest.approx(4 * 0.731059 * 0.268941, abs=1e-5)
        and slopes[2] < 1e-9
    )
    one = prospects(
        torch.tensor([10.0]), torch.zeros(1), torch.tensor([[True, False]]), Config("kto", z0=0.0)
    )[1]["slope"]
    assert one.item() == pytest.approx(slopes[1])


@pytest.mark.paper
def test_cpos_slope_in_the_preferred_response_never_vanishes():
    logps = torch.tensor([[[0.0, 0.0], [-1e4, 0.0]]], dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(mask=torch.ones(1, 2, 2, dtype=torch.bool))
    assert gradient((logps, None, batch), "cpo")[0].tolist() == [[-0.5, -0.5], [0.0, 0.0]]
    for name in ("dpo", "kto"):
        assert (gradient((logps, torch.zeros_like(logps), batch), name)[0, 1] == 0).all()


@pytest.mark.parametrize("name", VARIANTS)
def test_every_field_of_a_variant_matters(name):
    item = ragged(seed=10, scale=3.0)
    for field, default in VARIANTS[name].items():
        other = (
            not default
            if isinstance(default, bool)
            else 0.9
            if default is None
            else default * 0.7 + 0.01
        )
        assert not torch.allclose(value(item, name, **{field: other}), value(item, name)), field


@pytest.mark.parametrize("name", VARIANTS)
def test_extremes_stay_finite_in_every_dtype(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for chosen, rejected in ((0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0)):
            logps = torch.tensor([[[chosen], [rejected]]] * 2, dtype=dtype, requires_grad=True)
            batch = SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool))
            losses, metrics = loss(logps, torch.full_like(logps, -1.0), batch, Config(name))
            assert (
                losses.isfinite().all()
                and losses.shape == (2,)
                and losses.dtype == torch.promote_types(dtype, torch.float32)
            )
            assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
            assert all(x.isfinite() and not x.requires_grad for x in metrics.values())


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(variant="ppo"), "variant"),
        (dict(scenario="raw"), "scenario"),
        (dict(tau=0.1), "tau"),
        (dict(z0=0.1), "z0"),
        (dict(ipo_mean=False), "ipo_mean"),
        (dict(lam=0.0), "lam"),
        (dict(variant="ipo", beta=0.1), "beta"),
        (dict(variant="kto", lam=1.0), "lam"),
        (dict(variant="cpo", lambda_d=1.0), "lambda_d"),
        (dict(variant="nll", beta=0.1), "beta"),
        (dict(beta=0.0), "beta"),
        (dict(beta=math.inf), "beta"),
        (dict(variant="ipo", tau=0.0), "tau"),
        (dict(variant="ipo", tau=math.nan), "tau"),
        (dict(variant="kto", z0=-0.1), "z0"),
        (dict(variant="kto", lambda_u=-1.0), "lambda_u"),
        (dict(variant="kto", lambda_d=0.0, lambda_u=0.0), "lambda_d = 0 and lambda_u = 0"),
        (dict(variant="cpo", lam=-1.0), "lam"),
        (dict(variant="cpo", lam=math.inf), "lam"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Config(**fields)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_is_no_pair_is_refused(name):
    logps, ref_logps, batch = ragged()
    for bad in (logps[:, :1], logps[0], torch.cat([logps, logps], 1)):
        with pytest.raises(ValueError, match="pairs"):
            value((bad, bad.detach(), batch), name)
    batch.mask[0] = False
    with pytest.raises(ValueError, match="no scored token"):
        value((logps, ref_logps, batch), name)


def expected_loss(ratios, cfg, p):
    """The expected loss of two responses; the first one is chosen with probability p."""
    # (2, 2, 1): the pair with its label, and with the label flipped
    logps = torch.stack([ratios, ratios.flip(0)])[..., None]
    losses = loss(
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool)),
        cfg,
    )[0]
    return (torch.tensor([p, 1 - p], dtype=torch.float64) * losses).sum()


@pytest.mark.paper
@pytest.mark.parametrize(
    "cfg, h",
    [
        (Config(), 13.8629),
        (Config("ipo", ipo_mean=False), 3.0),
        (Config("ipo"), 3.0),
        (Config("cpo", lam=0.0), 13.8629),
    ],
)
def test_every_variant_has_its_population_optimum(cfg, h):
    """At p = 0.8, log(p / (1 - p)) / beta and (2 p - 1) / (2 tau); CPO has no reference."""
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    how = dict(
        max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS([ratios], **how)

    def closure():
        optimizer.zero_grad()
        expected = expected_loss(ratios, cfg, 0.8)
        expected.backward()
        return expected

    optimizer.step(closure)
    assert (ratios[0] - ratios[1]).item() == pytest.approx(h, abs=1e-3)
    assert h == pytest.approx(3.0 if cfg.variant == "ipo" else math.log(4) / 0.1, abs=1e-4)


@pytest.mark.paper
@pytest.mark.parametrize("p, sign", [(0.8, -1), (0.5, 0), (0.3, 1)])
def test_kto_with_a_fixed_reference_point_has_no_optimum(p, sign):
    for h in (1.0, 10.0, 100.0):
        gap = torch.tensor(h, dtype=torch.float64, requires_grad=True)
        slope = torch.autograd.grad(
            expected_loss(torch.stack([gap, -gap]) / 2, Config("kto", z0=0.0), p), gap
        )[0].item()
        assert slope * sign > 0 or (sign == 0 and slope == pytest.approx(0, abs=1e-12))


# ---------------------------------------------------------------- the scenarios


def first_call(monkeypatch, world, cfg, **settings):
    """Align and record the first call of the loss -> (logps, ref_logps, batch), trained policy."""
    calls, ours = [], loss

    def noted(logps, ref_logps, batch, cfg):
        calls.append((cfg.variant, logps.detach().clone(), ref_logps, batch))
        return ours(logps, ref_logps, batch, cfg)

    monkeypatch.setattr(insights, "loss", noted)
    here = lab.Lab(lab.Settings(world=world, **settings), quiet=True)
    policy = run(here, cfg)
    monkeypatch.undo()
    tuning = here.steps if cfg.scenario != "base" else 0
    assert [c[0] for c in calls] == ["nll"] * tuning + [cfg.variant] * here.steps
    return calls[tuning][1:], policy, here


@pytest.mark.parametrize("name", ["dpo", "ipo", "kto"])
def test_every_scenario_begins_at_its_own_reference(monkeypatch, name):
    """h is 0 for every pair at step 0, which the reference of another scenario would not give."""
    seen = {}
    for scenario in SCENARIOS:
        (logps, ref_logps, batch), *_ = first_call(
            monkeypatch, "bandit", Config(name, scenario), steps=3, prompts=64, batch_size=32
        )
        torch.testing.assert_close(logps, ref_logps, rtol=0, atol=1e-6)
        seen[scenario] = (logps, batch)
    for other in ("sft", "instruct"):
        ratio = seen[other][0] - seen["base"][0]
        assert torch.equal(
            seen[other][1].target, seen["base"][1].target
        )  # the same pairs in the same order
        assert ratio.sum(-1).abs().min() > 1e-4


@pytest.mark.parametrize("name", FREE)
@pytest.mark.parametrize("scenario", SCENARIOS)
def test_no_reference_is_made_for_cpo(monkeypatch, name, scenario):
    (_, ref_logps, _), *_ = first_call(
        monkeypatch, "bandit", Config(name, scenario), steps=2, prompts=32, batch_size=16
    )
    assert ref_logps is None


def test_from_the_base_it_is_the_method_itself(monkeypatch):
    """DPO in the scenario without SFT equals methods/dpo.py exactly."""
    settings = dict(steps=5, prompts=64, batch_size=16, seed=3)
    _, ours, _ = first_call(monkeypatch, "bandit", Config("dpo", "base"), **settings)
    theirs = dpo.run(lab.Lab(lab.Settings(world="bandit", **settings), quiet=True), dpo.Config())
    assert torch.equal(ours.logits, theirs.logits)


def test_the_starts_are_better_and_better():
    """In the exact table, SFT on the best of eight answers beats SFT on the better of two."""
    rewards = {}
    for scenario in SCENARIOS:
        here = lab.Lab(lab.Settings(world="bandit", steps=40, batch_size=64), quiet=True)
        base = here.base()
        rewards[scenario] = begun(here, base, scenario).expect(here.world.truth)
    assert rewards["base"] + 0.2 < rewards["sft"] < rewards["instruct"] - 0.2


def test_a_file_has_no_instruction_tuned_model():
    here = SimpleNamespace(settings=SimpleNamespace(data="pairs.jsonl"))
    with pytest.raises(ValueError, match="instruct"):
        run(here, Config("dpo", "instruct"))  # before anything is trained
    assert begun(here, "policy", "base") == "policy"


@pytest.mark.slow
def test_every_variant_runs_on_text():
    here = lab.Lab(
        lab.Settings(
            world="reviews", steps=2, prompts=8, batch_size=4, base_steps=2, max_response=6
        ),
        quiet=True,
    )
    before = here.base().state_dict()
    after = run(here, Config("cpo", "sft")).state_dict()
    assert any(not torch.equal(before[k], after[k]) for k in before)


# ---------------------------------------------------------------- the claim's parts


def on_the_tree(**settings):
    here = lab.Lab(lab.Settings(world="tree", seed=7, warmup=0, clip=1e6, **settings), quiet=True)
    return here, tree.World(7)


def test_an_alignment_on_the_tree_begins_at_its_start(monkeypatch):
    """h is 0 at step 0, kto's z is the exact KL from the start, and the start is not changed."""
    here, world = on_the_tree()
    begin, calls, ours = starts(here, world), [], loss
    assert world.exact(begin["base"])["reward"] == pytest.approx(0, abs=1e-9)
    assert 0.2 < begin["sft"].expect(world.truth) < begin["instruct"].expect(world.truth)
    pairs = world.draw(world.reference, 60, here.rng("pairs")).view(30, 2)

    def noted(logps, ref_logps, batch, cfg):
        calls.append((logps.detach(), ref_logps, batch.mask, cfg.z0))
        return ours(logps, ref_logps, batch, cfg)

    monkeypatch.setattr(insights, "loss", noted)
    for start in begin.values():
        kept = {k: v.clone() for k, v in start.state_dict().items()}
        policy = trained(here, world, start, pairs, Config("kto"), steps=3)
        torch.testing.assert_close(calls[0][0], calls[0][1], rtol=0, atol=0)
        assert torch.equal(calls[0][2], world.mask[pairs]) and calls[0][3] == pytest.approx(
            0, abs=1e-6
        )
        assert 0 < calls[1][3] < calls[2][3] < policy.kl(start)
        assert all(torch.equal(kept[k], v) for k, v in start.state_dict().items())
        calls.clear()


@pytest.mark.slow
def test_the_study_and_its_table():
    here, world = on_the_tree()
    found = study(here, world, sizes=(20, 60), steps=10)
    assert len(found) == 3 + 2 * 3 * 5
    for (size, scenario, name), row in found.items():
        assert set(row) == ({"reward"} if name == "start" else {"reward", "kl", "unseen"}), (
            size,
            scenario,
        )
    cell = found[60, "sft", "dpo"]
    assert (
        cell["reward"] > found[0, "sft", "start"]["reward"]
        and cell["kl"] > 0.05
        and 0 < cell["unseen"] < 1
    )
    again = study(*on_the_tree(), sizes=(20, 60), steps=10)
    assert again == found
    other = {key: {name: x + 2.0 for name, x in row.items()} for key, row in found.items()}
    lines = page([found, other]).splitlines()
    assert len(lines) == 2 + 3 + 2 * 3 and all(len(line) <= 140 for line in lines)
    row = (
        next(line for line in lines if line.split()[:2] == ["60", "sft"]).replace("|", " ").split()
    )
    expected = [
        found[60, "sft", name][m] + 1.0 for m in ("reward", "kl", "unseen") for name in VARIANTS
    ]
    assert [float(x) for x in row[2:]] == pytest.approx(expected, abs=0.006)


# ---- the mutants of the loss: every one makes a difference on these inputs


def one_sided_pairs():
    """Pairs near, far from, above and without the reference, and rows with one absent response."""
    items = builders.far_pairs()
    logps, ref_logps, batch = items[0]
    there = (
        [[1, 1], [1, 0], [1, 0], [0, 1], [1, 0]],
        [[1, 0]] * 4 + [[0, 1]],
        [[1, 0]] * 5,
        [[0, 1]] * 5,
        [[0, 0]] + [[1, 1]] * 4,
    )
    masks = [batch.mask & torch.tensor(sides).bool()[..., None] for sides in there]
    sides = [
        builders.changed((logps * mask, known * mask, batch), mask=mask)
        for mask in masks
        for known in (ref_logps, 2 * logps)
    ]
    return [*items, *sides, (logps, None, batch)]


def coupled(cfg):
    """Whether the loss of a row depends on the other rows of its batch."""
    return cfg.variant == "kto" and cfg.z0 is None  # z0 is a mean over the batch


CASES = (
    [
        dict(beta=0.3),
        dict(variant="ipo", tau=0.3),
        dict(variant="ipo", tau=0.7, ipo_mean=False),
        dict(variant="nll"),
    ]
    + [
        dict(variant="kto", beta=0.3),
        dict(variant="kto", beta=0.3, z0=0.4, lambda_d=1.7, lambda_u=0.6),
    ]
    + [dict(variant="cpo", beta=0.3, lam=0.7)]
)
INPUTS = one_sided_pairs
SURVIVORS = {
    "loss: torch.zeros_like(logps) -> torch.zeros_like(_detached(logps))": "zeros have no gradient"
}
