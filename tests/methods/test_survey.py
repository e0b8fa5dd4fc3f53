"""The survey's losses: values, gradients, reductions to each other, equality with other files.

Also tested are refusals, the taxonomy, and the measurements of the claims.
"""

import math
import re
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import lab
from claims.survey import ON_REVIEWS, in_tree, rank_correlation, report, reward_at
from methods import asft, dpo, fdpo, ld_dpo, rdpo
from methods.survey import FREE, TAXONOMY, VARIANTS, Config, loss, run, standardized
from tests import builders
from tests.builders import descending, ragged
from toy import bandit


def canonical(lw=-4.0, ll=-6.0):
    """A pair of lengths 4 and 3 with reference -5 and -5.5; log-scores differ by 0.2."""
    mask = torch.ones(1, 2, 4, dtype=torch.bool)
    mask[0, 1, 3] = False
    count = mask.sum(-1, keepdim=True)
    logps = (torch.tensor([lw, ll], dtype=torch.float64)[:, None] / count * mask).requires_grad_()
    ref_logps = torch.tensor([-5.0, -5.5], dtype=torch.float64)[:, None] / count * mask
    return (
        logps,
        ref_logps,
        SimpleNamespace(
            mask=mask, scores=torch.tensor([[math.exp(0.2), 0.0]], dtype=torch.float64)
        ),
    )


def graded(**kwargs):
    """Ragged pairs with graded scores."""
    return ragged(scores=descending, **kwargs)


def value(item, *args, **fields):
    return loss(*item, Config(*args, **fields))[0]


def gradient(item, *args, **fields):
    return torch.autograd.grad(value(item, *args, **fields).sum(), item[0])[0]


VALUES = dict(
    dpo=0.620957,
    cdpo=0.635957,
    rdpo=0.602207,
    ipo=12.25,
    ipo_mean=21.006944,
    hinge=0.85,
    slic=1.4,
    rrhf=1.0,
    nca=1.350825,
    cal_dpo=18.326413,
    aot=0.620957,
    apo_zero=0.962523,
    apo_down=0.987549,
    odpo=0.718460,
    exo=2.505517,
    fkl=0.631154,
    js=0.660652,
    alpha_div=0.627691,
    chi_po=0.528778,
    sppo=36.25,
    simpo=0.313262,
    cpo=1.598139,
    orpo=1.023818,
    simper=-0.232544,
    r_dpo=0.575939,
    ln_dpo=0.506360,
    disco_pop=0.878234,
    dpo_nll=1.620957,
    npo=13.369193,
    dr_dpo=0.620957,
)


@pytest.mark.paper
@pytest.mark.parametrize("name", VALUES)
def test_every_variant_has_its_value_on_the_canonical_pair(name):
    assert value(canonical(), name).item() == pytest.approx(VALUES[name], abs=1e-6)


@pytest.mark.paper
def test_the_canonical_pair_where_more_than_it_counts():
    assert value(canonical(), "kto", z0=0.0).item() == pytest.approx(0.962523, abs=1e-6)
    assert value(canonical(), "kto", z0=0.3).item() == pytest.approx(0.962518, abs=1e-6)
    assert value(canonical(), "kto").item() == pytest.approx(2 * 0.468795, abs=2e-6)  # z 0 and 1
    assert value(canonical(lw=-6.0), "dpop").item() == pytest.approx(1.005492, abs=1e-6)
    assert value(canonical(), "dpop").item() == pytest.approx(0.620957, abs=1e-6)
    assert value(canonical(), "beta_dpo", gamma=1.0).item() == pytest.approx(0.600393, abs=1e-6)
    # a second pair brings the mean reward to 0 (bco) and puts the first pair one standard
    # deviation above the mean of both (alpha_dpo)
    logps, ref_logps, batch = canonical()
    both = (
        torch.cat([logps, 2 * ref_logps - logps]),
        torch.cat([ref_logps] * 2),
        SimpleNamespace(mask=torch.cat([batch.mask] * 2)),
    )
    assert value(both, "bco")[0].item() == pytest.approx(1.312856, abs=1e-6)
    assert value(both, "alpha_dpo")[0].item() == pytest.approx(0.474077, abs=1e-6)
    # Dr. DPO of two losses, 0.5 and 1
    h = [-math.log(math.expm1(x)) for x in (0.5, 1.0)]
    item = (
        torch.tensor([[[x], [0.0]] for x in h]),
        torch.zeros(2, 2, 1),
        SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool)),
    )
    torch.testing.assert_close(
        value(item, "dr_dpo", beta=1.0), torch.full((2,), 0.719070), rtol=0, atol=1e-6
    )


@pytest.mark.paper
@pytest.mark.parametrize(
    "name, expected",
    [
        ("dpo", 0.693147),
        ("ipo", 25),
        ("hinge", 1),
        ("nca", 1.386294),
        ("bco", 1.386294),
        ("apo_zero", 1),
        ("apo_down", 1),
        ("sppo", 50),
    ]
    + [("exo", 2.761231), ("disco_pop", 0.846574), ("kto", 1.0), ("cal_dpo", 25.693147)],
)
def test_every_variant_has_its_value_at_the_reference(name, expected):
    _, ref_logps, batch = graded()
    torch.testing.assert_close(
        value((ref_logps, ref_logps, batch), name),
        torch.full((5,), expected, dtype=torch.float64),
        rtol=1e-6,
        atol=0,
    )


def sums(item):
    logps, ref_logps, batch = item
    (lw, ll), (rw, rl) = logps.sum(-1).unbind(1), ref_logps.sum(-1).unbind(1)
    nw, nl = batch.mask.sum(-1).unbind(1)
    return lw, ll, rw, rl, nw, nl


REDUCED = [  # (variant and fields, variant and fields it equals)
    (dict(variant="cdpo", epsilon=0.0), {}),
    (dict(variant="rdpo", epsilon=0.0), {}),
    (dict(variant="odpo", alpha=0.0), {}),
    (dict(variant="r_dpo", alpha=0.0), {}),
    (dict(variant="ld_dpo", alpha=1.0), {}),
    (dict(variant="dpop", lam=0.0), {}),
    (dict(variant="beta_dpo", alpha=0.0), {}),
    (dict(variant="dpo_nll", lam=0.0), {}),
    (dict(variant="kto", z0=0.0), dict(variant="apo_zero")),
    (dict(variant="alpha_dpo", alpha=0.0, gamma=0.3, beta=2.0), dict(variant="simpo", gamma=0.3)),
]


@pytest.mark.paper
@pytest.mark.parametrize("fields, known", REDUCED)
def test_reductions_in_value_and_gradient(fields, known):
    item = graded(seed=3)
    torch.testing.assert_close(value(item, **fields), value(item, **known), rtol=0, atol=1e-12)
    torch.testing.assert_close(
        gradient(item, **fields), gradient(item, **known), rtol=0, atol=1e-12
    )


@pytest.mark.paper
def test_reductions_in_a_limit():
    item = graded(seed=4)
    torch.testing.assert_close(
        value(item, "dr_dpo", tau=1e7), value(item).mean().expand(5), rtol=0, atol=1e-6
    )
    torch.testing.assert_close(value(item, "alpha_div", alpha=1e-7), value(item), rtol=0, atol=1e-6)
    torch.testing.assert_close(
        value(item, "alpha_div", alpha=1.0), value(item, "fkl"), rtol=0, atol=1e-12
    )
    logps, ref_logps, batch = item
    none = (
        logps,
        torch.zeros_like(ref_logps),
        batch,
    )  # cpo without its second term is DPO with a uniform reference
    torch.testing.assert_close(value(item, "cpo", lam=0.0), value(none), rtol=0, atol=1e-12)
    for b in range(5):  # AOT of one pair is DPO
        one = (logps[b : b + 1], ref_logps[b : b + 1], SimpleNamespace(mask=batch.mask[b : b + 1]))
        torch.testing.assert_close(value(one, "aot"), value(one), rtol=0, atol=1e-12)
    equal = SimpleNamespace(mask=torch.ones_like(batch.mask), scores=batch.scores)
    for name in ("r_dpo", "ld_dpo"):  # equal lengths
        torch.testing.assert_close(
            value((logps, ref_logps, equal), name),
            value((logps, ref_logps, equal)),
            rtol=0,
            atol=1e-12,
        )


def test_aot_sorts_both_sides():
    item = graded(seed=5)
    lw, ll, rw, rl, *_ = sums(item)
    ours, theirs = sorted((lw - ll).tolist()), sorted((rw - rl).tolist())
    expected = [math.log1p(math.exp(-0.1 * (x - y))) for x, y in zip(ours, theirs)]
    torch.testing.assert_close(value(item, "aot").tolist(), expected, rtol=0, atol=1e-12)


# the same losses in files of their own
TWICE = [
    (dict(variant="dpo", beta=0.3), dpo, dict(beta=0.3)),
    (dict(variant="rdpo", beta=0.3, epsilon=0.2), rdpo, dict(beta=0.3, epsilon=0.2)),
    (dict(variant="fkl", beta=0.3), fdpo, dict(beta=0.3, divergence="fkl")),
    (dict(variant="js", beta=0.3), fdpo, dict(beta=0.3, divergence="js")),
    (
        dict(variant="alpha_div", beta=0.3, alpha=0.3),
        fdpo,
        dict(beta=0.3, divergence="alpha", alpha=0.3),
    ),
    (dict(variant="ld_dpo", beta=0.3, alpha=0.3), ld_dpo, dict(beta=0.3, alpha=0.3)),
]


@pytest.mark.parametrize("fields, module, theirs", TWICE)
@pytest.mark.parametrize("scale", [1.0, 40.0])
def test_a_loss_that_has_its_own_file_is_the_same_there(fields, module, theirs, scale):
    item = graded(seed=11, scale=scale)  # no exponent between 40 and 80, where the clamps differ
    own = module.loss(*item, module.Config(**theirs))[0]
    torch.testing.assert_close(value(item, **fields), own, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(
        gradient(item, **fields), torch.autograd.grad(own.sum(), item[0])[0], rtol=1e-10, atol=1e-12
    )


def test_cdpo_is_dpo_with_smoothed_labels_and_orpo_has_the_odds_of_asft():
    item = graded(seed=7)
    kept, flipped = (dpo.loss(*x, dpo.Config(0.3))[0] for x in (item, builders.swapped(item)))
    torch.testing.assert_close(
        value(item, "cdpo", beta=0.3, epsilon=0.2),
        0.8 * kept + 0.2 * flipped,
        rtol=0,
        atol=1e-12,
    )
    lw, ll, _, _, nw, nl = sums(item)
    odds = [(s - asft.log1mexp(s)) for s in (lw / nw, ll / nl)]
    torch.testing.assert_close(
        value(item, "orpo", lam=0.7),
        -lw / nw - 0.7 * F.logsigmoid(odds[0] - odds[1]),
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.paper
@pytest.mark.parametrize("e", [0.1, 0.3])
def test_rdpo_is_unbiased(e):
    logps, ref_logps, batch = graded(seed=8)
    turned = (logps.flip(1), ref_logps.flip(1), SimpleNamespace(mask=batch.mask.flip(1)))
    mean = (1 - e) * value((logps, ref_logps, batch), "rdpo", epsilon=e) + e * value(
        turned, "rdpo", epsilon=e
    )
    torch.testing.assert_close(mean, value((logps, ref_logps, batch)), rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_a_variant_reads(name):
    """Losses without a reference ignore ref_logps.

    The others do not change if policy and reference change by the same constant.
    """
    logps, ref_logps, batch = graded(seed=9)
    here = value((logps, ref_logps, batch), name)
    assert here.shape == (5,) and here.dtype == torch.float64
    if name in FREE:
        torch.testing.assert_close(value((logps, None, batch), name), here, rtol=0, atol=0)
        torch.testing.assert_close(
            value((logps, 3 * ref_logps - 1, batch), name), here, rtol=0, atol=0
        )
        return
    assert not torch.allclose(value((logps, 1.7 * ref_logps, batch), name), here)
    if name not in ("alpha_dpo", "dpo_nll"):  # these look at the policy alone, too
        first = torch.zeros_like(ref_logps)
        first[..., 0] = -0.7
        torch.testing.assert_close(
            value((logps + first, ref_logps + first, batch), name), here, rtol=0, atol=1e-9
        )


@pytest.mark.parametrize("name", VARIANTS)
def test_gradients_are_those_of_the_values(name):
    logps, ref_logps, batch = graded(rows=3, length=4, seed=10)
    fields = (
        dict(z0=0.1)
        if name == "kto"
        else dict(alpha=0.0)
        if name in ("beta_dpo", "alpha_dpo")
        else {}
    )
    if name == "bco":  # its mean is not part of the graph
        return
    assert torch.autograd.gradcheck(
        lambda x: loss(x, ref_logps, batch, Config(name, **fields))[0], logps
    )


@pytest.mark.parametrize("name", ["kto", "bco", "beta_dpo", "alpha_dpo"])
def test_what_is_taken_over_the_batch_carries_no_gradient(name):
    item = graded(seed=11)
    (alone,) = torch.autograd.grad(value(item, name)[0], item[0])
    assert (alone[1:] == 0).all() and (alone[0] != 0).any()


@pytest.mark.paper
def test_closed_form_gradients_of_the_canonical_pair():
    slopes = dict(
        dpo=(-0.046257, 0.046257),
        ipo=(-7.0, 7.0),
        ipo_mean=(-2.291667, 3.055556),
        cpo=(-0.295017, 0.045017),
    )
    for name, expected in slopes.items():
        grad = gradient(canonical(), name)[0, :, 0]
        torch.testing.assert_close(
            grad, torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-6
        )
    grad = gradient(canonical(), "kto", z0=0.3)[0, :, 0]
    torch.testing.assert_close(
        grad, torch.tensor([-0.024969, 0.024960], dtype=torch.float64), rtol=0, atol=1e-6
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_every_field_of_a_variant_matters(name):
    item = graded(seed=13)
    for field, default in VARIANTS[name].items():
        other = 0.9 if default is None else default * 0.7 + 0.01
        assert not torch.allclose(value(item, name, **{field: other}), value(item, name)), field


@pytest.mark.parametrize("name", VARIANTS)
def test_extremes_stay_finite_in_every_dtype(name):
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        for chosen, rejected in ((0.0, -1e4), (-1e4, 0.0), (-1e4, -1e4), (0.0, 0.0)):
            logps = torch.tensor([[[chosen], [rejected]]] * 2, dtype=dtype, requires_grad=True)
            batch = SimpleNamespace(
                mask=torch.ones(2, 2, 1, dtype=torch.bool), scores=torch.tensor([[1.0, 0.0]] * 2)
            )
            losses = loss(logps, torch.full_like(logps, -1.0), batch, Config(name))[0]
            assert losses.isfinite().all() and losses.dtype == torch.promote_types(
                dtype, torch.float32
            )
            assert torch.autograd.grad(losses.sum(), logps, allow_unused=True)[0].isfinite().all()


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(variant="ppo"), "variant"),
        (dict(tau=0.1), "tau"),
        (dict(variant="ipo", beta=0.1), "beta"),
        (dict(variant="ipo", tau=0.0), "tau"),
        (dict(beta=0.0), "beta"),
        (dict(beta=math.inf), "beta"),
        (dict(variant="rdpo", epsilon=0.5), "epsilon"),
        (dict(variant="cdpo", epsilon=-0.1), "epsilon"),
        (dict(variant="exo", epsilon=0.0), "epsilon"),
        (dict(variant="cpo", lam=-1.0), "lam"),
        (dict(variant="alpha_div", alpha=0.0), "alpha"),
        (dict(variant="ld_dpo", alpha=1.1), "alpha"),
        (dict(variant="odpo", alpha=-1.0), "alpha"),
        (dict(variant="chi_po", gamma=0.0), "gamma"),
        (dict(variant="kto", z0=-0.1), "z0"),
        (dict(variant="simpo", gamma=math.nan), "gamma"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(fields, word):
    with pytest.raises(ValueError, match=word):
        Config(**fields)


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = graded()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    with pytest.raises(ValueError, match="odpo"):
        loss(
            logps,
            ref_logps,
            SimpleNamespace(mask=batch.mask, scores=torch.ones(5, 2)),
            Config("odpo"),
        )
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


def settled(cfg, p):
    """[a, c] at the minimum of the expected loss, if the first of two responses is chosen with
    probability p."""
    ratios = torch.zeros(2, dtype=torch.float64, requires_grad=True)
    batch, weight = (
        SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool)),
        torch.tensor([p, 1 - p], dtype=torch.float64),
    )
    how = dict(
        max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-16, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS([ratios], **how)

    def closure():
        optimizer.zero_grad()
        # the pair with its label, and with the label flipped
        logps = torch.stack([ratios, ratios.flip(0)])[..., None]
        value = (weight * loss(logps, torch.zeros_like(logps), batch, cfg)[0]).sum()
        value.backward()
        return value

    optimizer.step(closure)
    return ratios.tolist()


@pytest.mark.paper
@pytest.mark.parametrize(
    "name, h",
    [
        ("dpo", 13.8629),
        ("cdpo", 10.4597),
        ("rdpo", 19.4591),
        ("ipo", 3.0),
        ("nca", 13.8629),
        ("bco", 27.7259),
        ("sppo", 6.0),
    ]
    + [("exo", 41.4405), ("cal_dpo", 5.6073)],
)
def test_every_variant_has_its_population_optimum(name, h):
    a, c = settled(Config(name), 0.8)
    assert a - c == pytest.approx(h, abs=1e-3)
    sides = dict(
        nca=(4.7, -9.1629), bco=(h / 2, -h / 2), sppo=(h / 2, -h / 2)
    )  # these three have an optimum for each side
    assert name not in sides or [a, c] == pytest.approx(sides[name], abs=1e-3)


def expected_slope(name, h, p=0.8):
    """Slope of the expected loss in h, at a = -c = h/2."""
    h = torch.tensor(h, dtype=torch.float64, requires_grad=True)
    pair = torch.stack([h, -h]) / 2
    logps = torch.stack([pair, pair.flip(0)])[..., None]
    cfg = Config(name, z0=0.0) if name == "kto" else Config(name)
    losses = loss(
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool)),
        cfg,
    )[0]
    return torch.autograd.grad((losses * torch.tensor([p, 1 - p])).sum(), h)[0].item()


@pytest.mark.paper
def test_the_hinge_turns_at_one_over_beta_and_kto_never():
    assert expected_slope("hinge", 9.9) < 0 < expected_slope("hinge", 10.1)
    for name in ("kto", "apo_zero"):
        assert all(expected_slope(name, h) < 0 for h in (1.0, 10.0, 100.0, 1000.0))


def test_the_taxonomy_holds_every_variant_once():
    marked = [name for names in re.findall(r"\[(.*?)\]", TAXONOMY) for name in names.split()]
    assert sorted(marked) == sorted(VARIANTS) and len(VARIANTS) == 36 and set(FREE) < set(VARIANTS)
    branches = re.findall(r"^\S.*?: ", TAXONOMY, re.MULTILINE)
    assert len(branches) == 25 and all("(3." in branch for branch in branches[:-1])


@pytest.mark.paper
def test_the_slope_of_disco_pop_at_the_reference_is_positive():
    _, ref_logps, batch = graded()
    grad = gradient((ref_logps.clone().requires_grad_(), ref_logps, batch), "disco_pop")
    slope = 0.05 * ((1 - math.log(2)) / (4 * 0.05) - 0.75)
    assert slope > 0
    torch.testing.assert_close(
        grad[:, 0, 0], torch.full((5,), slope, dtype=torch.float64), rtol=0, atol=1e-12
    )


@pytest.mark.parametrize(
    "how", [dict(variant="odpo", alpha=5.0), dict(variant="r_dpo"), dict(variant="ld_dpo")]
)
def test_what_does_nothing_in_a_world_is_refused(how):
    class Verified(bandit.World):  # scores 0 and 1, and responses of one length
        verifier = True

    here = lab.Lab(lab.Settings(world="bandit", steps=3, prompts=64, batch_size=8), quiet=True)
    here.world = Verified(rewards=lambda y: (y[:, 0] == 0).double())
    with pytest.raises(ValueError, match=f"alpha does nothing under {how['variant']}"):
        run(here, Config(**how))


@pytest.mark.paper
@pytest.mark.parametrize(
    ("a", "c", "loss_", "slopes"),
    [
        (
            4.0,
            3.9,
            0.463,
            (-2.06, 1.87),
        ),  # both links lie far beyond 2 R_max, but their difference does not
        (-22.0, -30.0, 0.371, (-0.031, 0.031)),
        (1.0, -25.0, math.log1p(math.exp(-2.0)), (0.0, 0.0)),
    ],
)
def test_chi_po_clips_the_difference_of_the_two_links(a, c, loss_, slopes):
    logps = torch.tensor([[[a], [c]]], dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    item = (logps, torch.zeros_like(logps), batch)
    assert value(item, "chi_po", gamma=1.0).item() == pytest.approx(loss_, abs=5e-4)
    assert gradient(item, "chi_po", gamma=1.0).flatten().tolist() == pytest.approx(slopes, abs=5e-3)


def test_helpers_return_the_values_of_their_formulas():
    assert standardized(torch.tensor([1.0, 3.0])).tolist() == [-1, 1]
    assert standardized(torch.ones(3)).tolist() == [0, 0, 0]
    curve = [dict(kl=0.0, reward=0.0), dict(kl=0.4, reward=1.0), dict(kl=0.8, reward=2.0)]
    assert reward_at(curve) == pytest.approx(1.25) and math.isnan(reward_at(curve, 1.0))
    assert rank_correlation([1.0, 2.0, 3.0, math.nan], [0.0, 5.0, 7.0, 1.0]) == pytest.approx(1)
    assert rank_correlation([1.0, 2.0, 3.0], [3.0, 2.0, 1.0]) == pytest.approx(-1)


def a_lab(seed=7, **settings):
    return lab.Lab(
        lab.Settings(world="tree", seed=seed, eval_every=10, clip=1e6, **settings), quiet=True
    )


def test_a_short_training_in_the_tree():
    policy = in_tree(a_lab(), Config("dpo"), n=400, steps=30)
    first, last = policy.curve[0], policy.curve[-1]
    assert first["kl"] == pytest.approx(0, abs=1e-6) and first["chosen_ratio"] == 0
    assert last["step"] == 30 and last["reward"] > 0.3 and last["kl"] > 0.05
    assert last["chosen_ratio"] > last["rejected_ratio"] and last["accuracy"] > 0.7


def test_the_pages_of_the_claims():
    """Losses are sorted by the reward at a KL of 0.5; those that never reach it stand last."""
    series = {}
    for i, name in enumerate(VARIANTS):
        kl = 0.4 if name == "cpo" else 1.0
        ends = dict(length=3.0, accuracy=0.8, chosen_ratio=-1.0, rejected_ratio=-2.0)
        series[name] = [[dict(kl=0.0, reward=0.0), dict(kl=kl, reward=0.1 * i) | ends]] * 2
        ends = dict(reward=1.5, kl=0.5, length=9.0, chosen_logp=-20.0)
        if name in ON_REVIEWS:
            series[f"{name}, reviews"] = [[{}, ends]] * 2
    pages = report(a_lab(), series)
    assert set(pages) == {"survey.txt", "survey.png"}
    lines = pages["survey.txt"].splitlines()
    names = [line.split()[0] for line in lines[1 : 1 + len(VARIANTS)]]
    assert names[:2] == list(VARIANTS)[:-3:-1] and names[-1] == "cpo"
    assert sorted(names) == sorted(VARIANTS)
    rows = (line.split() for line in lines[1 : 1 + len(VARIANTS)])
    assert {row[0] for row in rows if row[-1] != "-"} == set(ON_REVIEWS)
    assert lines[-1].startswith("beside the figure: ")
    left, right = pages["survey.png"].axes
    assert len(left.lines) == len(VARIANTS) + 1 and len(right.lines) == len(ON_REVIEWS)


@pytest.mark.parametrize("name", ["odpo", "simpo"])
def test_every_variant_runs(name, tmp_path):
    here = lab.Lab(
        lab.Settings(world="bandit", steps=3, prompts=32, batch_size=8), str(tmp_path), quiet=True
    )
    before = here.base().logits.detach().clone()
    assert not torch.equal(run(here, Config(name)).logits, before)


# ---- the mutants of the loss: every one makes a difference on these inputs


def graded_pairs():
    """Pairs with graded scores: near and far from the reference, at it, and without it.

    odpo refuses pairs whose rejected response has the higher score."""
    scores = torch.tensor(
        [[2.0, 0.5], [1.0, 0.9], [0.3, -4.0], [5.0, 1.0], [0.1, 0.0]], dtype=torch.float64
    )
    items = [
        builders.changed(item, scores=scores.to(item[0].device))
        if item[2].scores.shape == (5, 2)
        else item
        for item in [*builders.far_pairs(), *builders.likelihoods()]
    ]
    logps, ref_logps, batch = items[0]
    flipped = builders.changed(
        items[0], scores=torch.where(torch.arange(5)[:, None] < 2, scores.flip(1), scores)
    )
    return [*items, flipped, (ref_logps, ref_logps, batch), (logps, None, batch)]


COUPLED = ("bco", "aot", "dr_dpo", "beta_dpo", "alpha_dpo")  # these read means over the batch


def coupled(cfg):
    """Whether the loss of a row depends on the other rows of its batch."""
    return cfg.variant in COUPLED or (cfg.variant == "kto" and cfg.z0 is None)


CASES = (
    [
        dict(
            variant=v,
            **{k: x and 3.1 * x if k in ("beta", "tau") else x for k, x in known.items()},
        )
        for v, known in VARIANTS.items()
    ]
    + [
        dict(variant="kto", z0=0.3),
        dict(variant="beta_dpo", beta=0.3, alpha=1.7, gamma=0.2),
        dict(variant="chi_po", beta=0.3, gamma=0.2),
    ]
    + [
        dict(variant="dr_dpo", beta=0.3, tau=0.4),
        dict(variant="dpop", beta=0.3, lam=0.4),
        dict(variant="slic", gamma=0.3, lam=0.7),
    ]
    + [
        dict(variant="alpha_dpo", alpha=0.9, gamma=0.3),
        dict(variant="cpo", lam=0.4),
        dict(variant="orpo", lam=0.7),
    ]
    + [
        dict(variant="dpo_nll", lam=0.4),
        dict(variant="odpo", alpha=0.7),
        dict(variant="r_dpo", alpha=-0.3),
    ]
)
INPUTS = graded_pairs
SURVIVORS = {}
