"""f-DPO against its paper: values, gradients, identities, errors, and the optimum of every divergence."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from claims import fdpo
from claims.fdpo import (
    calibration_error,
    claim,
    f_divergence,
    five,
    measured,
    optimum,
    score,
    tradeoff,
)
from data import collate
from lab import Lab, Settings
from methods import dpo
from methods.fdpo import Config, loss, run
from tests import builders
from toy.bandit import World
from toy.exact import population

KINDS = {
    "rkl": dict(divergence="rkl"),
    "alpha 0.3": dict(divergence="alpha", alpha=0.3),
    "alpha 0.5": dict(divergence="alpha", alpha=0.5),
    "alpha 0.7": dict(divergence="alpha", alpha=0.7),
    "fkl": dict(divergence="fkl"),
    "js": dict(divergence="js"),
}


def config(kind, beta=1.0):
    return Config(beta=beta, **KINDS[kind])


def pair(chosen, rejected, dtype=torch.float64):
    """One pair of one-token responses with these log-ratios to a zero reference."""
    logps = torch.tensor([[[chosen], [rejected]]], dtype=dtype, requires_grad=True)
    return (
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool)),
    )


def ragged(rows=5, length=7, seed=0, dtype=torch.float64):
    """Random log-probs of ragged responses, 0 outside the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 2, 1), generator=rng)
    logps, ref_logps = (
        -2 * torch.rand(rows, 2, length, generator=rng, dtype=dtype) * mask for _ in range(2)
    )
    return logps.requires_grad_(), ref_logps, SimpleNamespace(mask=mask)


def value_and_gradient(logps, ref_logps, batch, cfg, objective=loss):
    losses = objective(logps, ref_logps, batch, cfg)[0]
    return losses, torch.autograd.grad(losses.sum(), logps)[0]


def slope(kind, rho):
    """ds/drho in closed form."""
    return torch.sigmoid(-rho) if kind == "js" else torch.exp(-config(kind).order * rho)


# ---- values


@pytest.mark.parametrize(
    ("kind", "delta", "value", "chosen", "rejected"),
    [
        ("rkl", 1.500000, 0.620957, -0.046257, 0.046257),
        ("fkl", 1.280842, 0.631154, -0.017218, 0.077164),
        ("js", 0.660815, 0.660652, -0.013003, 0.030095),
        ("alpha 0.3", 1.403387, 0.625438, -0.034446, 0.054022),
        ("alpha 0.5", 1.354990, 0.627691, -0.028275, 0.059858),
        ("alpha 0.7", 1.317832, 0.629425, -0.023196, 0.066285),
    ],
)
def test_the_worked_example(kind, delta, value, chosen, rejected):
    cfg, rho = config(kind, 0.1), torch.tensor([1.0, -0.5], dtype=torch.float64)
    s = score(rho, cfg)
    assert (s[0] - s[1]).item() == pytest.approx(delta, abs=1e-6)
    losses, gradient = value_and_gradient(*pair(1.0, -0.5), cfg)
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([chosen, rejected], abs=1e-6)
    metrics = loss(*pair(1.0, -0.5), cfg)[1]
    assert (
        metrics["weight"].item() == pytest.approx(-math.expm1(-value), abs=1e-6)
        and metrics["clamped"] == 0
    )


@pytest.mark.parametrize(
    ("kind", "slopes"),
    [
        ("js", (0.95257, 0.5, 0.04743)),
        ("fkl", (20.08554, 1, 0.04979)),
        ("alpha 0.5", (4.48169, 1, 0.22313)),
        ("rkl", (1, 1, 1)),
    ],
)
def test_the_slope_of_the_score(kind, slopes):
    rho = torch.tensor([-3.0, 0.0, 3.0], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(score(rho, config(kind)).sum(), rho)
    assert gradient.tolist() == pytest.approx(slopes, abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_at_the_reference(kind):
    logps, _, batch = ragged()
    losses, gradient = value_and_gradient(logps, logps.detach(), batch, config(kind, 0.6))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-12)
    size = 0.15 if kind == "js" else 0.3
    expected = torch.tensor([-size, size], dtype=torch.float64)[:, None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


# ---- identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_kl_is_dpo_bit_for_bit(dtype):
    inputs = ragged(dtype=dtype)
    theirs = value_and_gradient(*inputs, dpo.Config(0.3), dpo.loss)
    for cfg in (config("rkl", 0.3), Config(0.3, "alpha", 0.0)):
        ours = value_and_gradient(*inputs, cfg)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


def test_the_ends_of_alpha():
    inputs = ragged(seed=1)
    near, end = (value_and_gradient(*inputs, Config(0.3, "alpha", a)) for a in (1e-6, 0.0))
    for x, y in zip(near, end):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    one, forward = (
        value_and_gradient(*inputs, Config(0.3, "alpha", 1.0)),
        value_and_gradient(*inputs, config("fkl", 0.3)),
    )
    assert torch.equal(one[0], forward[0]) and torch.equal(one[1], forward[1])
    assert Config(divergence="alpha").order == 0.5


def test_a_small_alpha_does_not_cancel():
    cfg = Config(1.0, "alpha", 1e-7)
    rho = torch.tensor([1.0, -0.5])
    s = score(rho, cfg)
    assert (s[0] - s[1]).item() == pytest.approx(1.5, abs=1e-6)
    logps, ref_logps, batch = pair(1.0, -0.5)
    losses = loss(logps, ref_logps, batch, Config(0.1, "alpha", 1e-6))[0]
    assert losses.item() == pytest.approx(0.620957, abs=1e-6)


def test_jensen_shannon_in_its_older_form():
    rho = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(score(rho, config("js")), rho - F.softplus(rho))


@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_f_prime_and_rises(kind):
    cfg, rho = config(kind), torch.linspace(-4, 4, 33, dtype=torch.float64)
    u, q = rho.exp().requires_grad_(), torch.ones(33, 1, dtype=torch.float64)
    p = u[:, None]
    f = torch.stack([_f(x, cfg) for x in p[:, 0]])
    (f_prime,) = torch.autograd.grad(f.sum(), u)
    gap = f_prime - score(rho, cfg)
    assert (gap - gap[0]).abs().max() < 1e-9 and (score(rho, cfg).diff() > 0).all()
    assert f_divergence(p.detach(), q, cfg) == pytest.approx(f.mean().item())
    assert f_divergence(q, q, cfg) == pytest.approx(0, abs=1e-12)


def _f(u, cfg):
    """The generators of the paper's table."""
    a = cfg.order
    if cfg.divergence == "js":
        return u * u.log() - (u + 1) * torch.log((u + 1) / 2)
    if a in (0.0, 1.0):
        return u * u.log() if a == 0 else -u.log()
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


@pytest.mark.parametrize("kind", KINDS)
def test_ragged_responses_values_and_gradients_of_the_closed_form(kind):
    logps, ref_logps, batch = ragged(seed=2)
    cfg = config(kind, 0.7)
    losses, gradient = value_and_gradient(logps, ref_logps, batch, cfg)
    rho = (logps - ref_logps).sum(-1).detach()
    u = rho.exp()
    s = {"rkl": u.log(), "fkl": -1 / u, "js": (2 * u / (1 + u)).log()}.get(kind)
    s = (1 - u**-cfg.order) / cfg.order if s is None else s
    z = 0.7 * (s[:, 0] - s[:, 1])
    torch.testing.assert_close(losses, -F.logsigmoid(z), rtol=0, atol=1e-10)
    weight = (
        0.7
        * torch.sigmoid(-z)[:, None]
        * slope(kind, rho)
        * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    )
    torch.testing.assert_close(
        gradient, weight[..., None].expand_as(gradient), rtol=0, atol=1e-10
    )  # a SUM over tokens
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    assert torch.autograd.gradcheck(
        lambda x: loss(logps.detach(), x, batch, cfg)[0], ref_logps.clone().requires_grad_()
    )


@pytest.mark.parametrize("kind", KINDS)
def test_only_reverse_kl_does_not_see_a_constant_of_the_prompt(kind):
    logps, ref_logps, batch = ragged()
    moved = torch.zeros_like(logps)
    moved[..., 0] = 0.5
    there, here = (loss(x, ref_logps, batch, config(kind, 0.4))[0] for x in (logps, logps + moved))
    assert torch.allclose(there, here, atol=1e-12) == (kind == "rkl")


@pytest.mark.parametrize("kind", KINDS)
def test_swaps_padding_and_the_other_rows(kind):
    logps, ref_logps, batch = ragged()
    cfg = config(kind, 0.4)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    back = loss(logps.flip(1), ref_logps.flip(1), SimpleNamespace(mask=batch.mask.flip(1)), cfg)[0]
    torch.testing.assert_close(
        torch.exp(-plain) + torch.exp(-back), torch.ones_like(plain)
    )  # z changes its sign
    wide = SimpleNamespace(mask=F.pad(batch.mask, (0, 3)))
    torch.testing.assert_close(
        loss(F.pad(logps, (0, 3)), F.pad(ref_logps, (0, 3)), wide, cfg)[0], plain
    )
    for b in range(5):
        one = SimpleNamespace(mask=batch.mask[b : b + 1])
        torch.testing.assert_close(
            loss(logps[b : b + 1], ref_logps[b : b + 1], one, cfg)[0][0], plain[b]
        )


# ---- numbers


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_ratios_stay_finite(kind, dtype):
    for chosen, rejected in (
        (1e4, -1e4),
        (-1e4, 1e4),
        (-1e4, -1e4),
        (1e4, 1e4),
        (90.0, -90.0),
        (-90.0, 90.0),
    ):
        logps, ref_logps, batch = pair(chosen, rejected, dtype)
        losses, metrics = loss(logps, ref_logps, batch, config(kind, 0.1))
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
        order = config(kind).order or 0
        assert metrics["clamped"].item() == sum(-order * rho > 40 for rho in (chosen, rejected)) / 2


def test_what_is_held_has_no_gradient():
    losses, gradient = value_and_gradient(*pair(-90.0, -41.0), config("fkl", 0.1))
    assert losses.item() == pytest.approx(math.log(2)) and gradient.abs().max() == 0
    assert value_and_gradient(*pair(-39.0, -39.0), config("fkl", 0.1))[1].abs().min() > 1e15


@pytest.mark.parametrize("chosen", [-39.0, -46.0, -60.0, -79.0])
def test_the_norm_of_a_gradient_fits_into_float32(chosen):
    """The largest there can be, through a hundred weights that all of them move a response."""
    weights = torch.zeros(100, requires_grad=True)
    logps, ref_logps, batch = pair(chosen, 0.0, torch.float32)
    losses, _ = loss(logps.detach() + weights.sum(), ref_logps, batch, config("fkl", 1.0))
    losses.sum().backward()
    assert (
        torch.nn.utils.clip_grad_norm_([weights], 1.0).isfinite() and weights.grad.isfinite().all()
    )


def test_forward_kl_saturates_long_before():
    s = score(torch.tensor([2.0, -4.0], dtype=torch.float64), config("fkl"))
    assert (s[0] - s[1]).item() == pytest.approx(54.46, abs=0.01)
    assert loss(*pair(2.0, -4.0), config("fkl", 0.1))[0].item() == pytest.approx(0.0043, abs=1e-4)


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = SimpleNamespace(mask=torch.ones(1, 2, 200, dtype=torch.bool))
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, config("fkl"))
    assert losses.item() == pytest.approx(math.log1p(math.exp(math.e - 1)), abs=1e-6)


# ---- errors


@pytest.mark.parametrize(
    ("values", "word"),
    [(dict(beta=b), "beta") for b in (0.0, -0.1, math.inf, math.nan)]
    + [(dict(divergence="alpha", alpha=a), "alpha") for a in (-0.1, 1.1, math.nan)]
    + [(dict(divergence=d), d) for d in ("tv", "chi2", "kl", "reverse")]
    + [(dict(divergence=d, alpha=0.5), "alpha = 0.5 does nothing") for d in ("rkl", "fkl", "js")],
)
def test_values_out_of_range_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Config(**values)


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask = batch.mask.clone()
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the optimum of every divergence


ROWS = [
    ("rkl", 1.0, (0.63641, 0.23412, 0.08613, 0.03168, 0.01166), 1.4519, 1.0000, 0.6095, 0.60947),
    (
        "alpha 0.3",
        1.0,
        (0.65262, 0.19913, 0.08313, 0.04163, 0.02349),
        1.4158,
        1.0271,
        0.5823,
        0.58769,
    ),
    (
        "alpha 0.5",
        1.0,
        (0.65774, 0.18091, 0.08309, 0.04752, 0.03072),
        1.3874,
        1.0434,
        0.5661,
        0.56916,
    ),
    (
        "alpha 0.7",
        1.0,
        (0.65849, 0.16706, 0.08407, 0.05298, 0.03739),
        1.3563,
        1.0608,
        0.5487,
        0.54835,
    ),
    ("fkl", 1.0, (0.65322, 0.15312, 0.08672, 0.06049, 0.04644), 1.3062, 1.0898, 0.5196, 0.51499),
    ("js", 1.0, (0.87817, 0.08557, 0.02478, 0.00845, 0.00303), 1.8274, 0.4740, 1.1355, 0.56570),
]


@pytest.mark.parametrize(("kind", "beta", "probs", "reward", "entropy", "kl", "distance"), ROWS)
def test_c1_every_divergence_reaches_its_own_optimum(
    kind, beta, probs, reward, entropy, kl, distance
):
    world, cfg = five(), config(kind, beta)
    pairs = world.pairs_all()
    table, batch = population(world, pairs, loss, cfg), collate(pairs)
    assert (table.probs() - optimum(world, cfg).probs()).abs().max() < 1e-6
    assert table.probs()[0].tolist() == pytest.approx(probs, abs=1e-5)
    found = measured(world, table, cfg)
    names = ("reward", "entropy", "kl", "divergence", "least", "ece")
    assert [found[n] for n in names] == pytest.approx(
        [reward, entropy, kl, distance, min(probs), 0.0], abs=6e-5
    )
    assert (found["ece_log"] < 1e-6) == (kind == "rkl")
    value = (
        (
            loss(table.logps(batch), world.model().double().logps(batch), batch, cfg)[0]
            * batch.weight.double()
        )
        .mean()
        .item()
    )
    assert value == pytest.approx(
        0.389664, abs=1e-6
    )  # the entropy of the labels, whatever the divergence


def test_c2_reward_against_entropy_at_one_beta():
    order = ("rkl", "alpha 0.3", "alpha 0.5", "alpha 0.7", "fkl")
    found = [
        measured(five(), optimum(five(), config(kind, 0.5)), config(kind, 0.5)) for kind in order
    ]
    assert [x["reward"] for x in found] == pytest.approx(
        [1.8437, 1.8017, 1.7553, 1.7035, 1.6238], abs=6e-5
    )
    assert [x["entropy"] for x in found] == pytest.approx(
        [0.4579, 0.5203, 0.5800, 0.6424, 0.7320], abs=1e-4
    )
    js = measured(five(), optimum(five(), config("js", 2.0)), config("js", 2.0))
    assert (js["reward"], js["entropy"]) == pytest.approx((1.4465, 0.9900), abs=6e-5)


def test_c3_coverage_at_one_reward():
    contest = (("rkl", 1.0705), ("js", 2.1294), ("alpha 0.5", 0.9816), ("fkl", 0.8410))
    found = [measured(five(), optimum(five(), config(*one)), config(*one)) for one in contest]
    assert [x["reward"] for x in found] == pytest.approx([1.4] * 4, abs=1e-4)
    assert [x["least"] for x in found] == pytest.approx(
        [0.01461, 0.02655, 0.02990, 0.03966], abs=1e-5
    )
    assert [x["forward_kl"] for x in found] == pytest.approx(
        [0.7485, 0.6454, 0.6351, 0.6173], abs=1e-4
    )
    assert [x["entropy"] for x in found] == pytest.approx(
        [1.0502, 1.0360, 1.0311, 0.9978], abs=1e-4
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_of_a_reference_that_is_not_uniform_and_of_several_prompts(kind):
    rewards = torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.3, 2.0, -1.0, 0.0]])
    world, cfg = World(vocab=4, length=1, prompts=2, rewards=rewards), config(kind, 0.8)
    table = optimum(world, cfg)
    assert table.probs().sum(1).tolist() == pytest.approx([1.0, 1.0])
    gap = world.rewards() - 0.8 * score(table.log_probs() - world.reference.log_probs(), cfg)
    assert (gap - gap[:, :1]).abs().max() < 1e-9  # r = beta s + a constant of the prompt
    assert (
        population(world, world.pairs_all(), loss, cfg).probs() - table.probs()
    ).abs().max() < 1e-5


def test_the_calibration_error_by_hand():
    p, truth = torch.tensor([0.12, 0.18, 0.95, 1.0]), torch.tensor([0.2, 0.1, 0.9, 0.85])
    assert calibration_error(p, truth) == pytest.approx((abs(-0.08 + 0.08) + 0.2) / 4)


def test_the_table_of_a_tradeoff(tmp_path, monkeypatch):
    rows = {"rkl": {"reward": 0.5, "kl": 2.0}, "fkl": {"reward": -0.25, "kl": 1.0}}
    lines = [line.split() for line in tradeoff(rows).split("\n")]
    assert lines == [["reward", "kl"], ["rkl", "0.5000", "2.0000"], ["fkl", "-0.2500", "1.0000"]]
    assert len({len(line) for line in tradeoff(rows).split("\n")}) == 1
    ends = dict.fromkeys(("reward", "kl", "diversity", "length", "accuracy", "ece"), 0.5)
    monkeypatch.setattr(fdpo, "on_text", lambda here, contest: dict.fromkeys(contest, ends))
    claim(Lab(Settings(), str(tmp_path), quiet=True))
    page = (tmp_path / "tradeoff.txt").read_text()
    assert (
        page.startswith("five responses")
        and page.count("rkl") == page.count("fkl") == 2
        and page.endswith("\n")
    )


# ---- the run


def test_a_run_learns_and_shared_scaffold():
    lab = Lab(Settings(world="bandit", steps=60, batch_size=256, prompts=2048), quiet=True)
    gains = {}
    for kind in ("rkl", "fkl", "js"):
        gains[kind] = (
            lab.evaluate(run(lab, config(kind, 0.5)))["reward"]
            - lab.evaluate(lab.reference)["reward"]
        )
    assert min(gains.values()) > 0.5 and gains["fkl"] < gains["rkl"]
    assert inspect.getsource(run) == inspect.getsource(dpo.run)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3, divergence=d) for d in ("rkl", "fkl", "js")] + [
    dict(beta=0.3, divergence="alpha", alpha=a) for a in (0.0, 0.3, None)
]
INPUTS = builders.far_pairs
SURVIVORS = {}
