"""f-DPO against its paper: values, gradients, identities, and the optimum of every divergence."""

import inspect
import math

import pytest
import torch
import torch.nn.functional as F

from claims.fdpo import calibration_error, log_ratios, predicted
from claims.fdpo import report as report_of_claim
from data import collate
from lab import Lab, Settings
from methods import dpo
from methods.fdpo import DIVERGENCES, Config, loss, run
from tests import builders
from tests.builders import one_pair, ragged, swapped, value_and_gradient
from toy.bandit import World
from toy.exact import Table, population

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


def score(rho, cfg):
    """s(rho) of the divergence of a Config."""
    return DIVERGENCES[cfg.divergence](rho, cfg.alpha)


def generator(u, cfg):
    """f(u), as the paper's table has it."""
    a = cfg.order
    if cfg.divergence == "js":
        return u * u.log() - (u + 1) * torch.log((u + 1) / 2)
    if a in (0.0, 1.0):
        return u * u.log() if a == 0 else -u.log()
    return (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1))


def slope(kind, rho):
    """ds/drho in closed form."""
    return torch.sigmoid(-rho) if kind == "js" else torch.exp(-config(kind).order * rho)


# ---- values


@pytest.mark.paper
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
def test_the_loss_has_the_value_of_the_worked_example(kind, delta, value, chosen, rejected):
    cfg, rho = config(kind, 0.1), torch.tensor([1.0, -0.5], dtype=torch.float64)
    s = score(rho, cfg)
    assert (s[0] - s[1]).item() == pytest.approx(delta, abs=1e-6)
    losses, gradient = value_and_gradient(loss, *one_pair(1.0, -0.5), cfg)
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([chosen, rejected], abs=1e-6)
    metrics = loss(*one_pair(1.0, -0.5), cfg)[1]
    assert metrics["weight"].item() == pytest.approx(-math.expm1(-value), abs=1e-6)
    assert metrics["clamped"] == 0


@pytest.mark.paper
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


@pytest.mark.paper
@pytest.mark.parametrize("kind", KINDS)
def test_every_divergence_has_its_value_at_the_reference(kind):
    logps, _, batch = ragged()
    losses, gradient = value_and_gradient(loss, logps, logps.detach(), batch, config(kind, 0.6))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-12)
    size = 0.15 if kind == "js" else 0.3
    expected = torch.tensor([-size, size], dtype=torch.float64)[:, None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-12)


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_reverse_kl_is_dpo_bit_for_bit(dtype):
    item = ragged(dtype=dtype)
    theirs = value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    for cfg in (config("rkl", 0.3), Config(0.3, "alpha", 0.0)):
        ours = value_and_gradient(loss, *item, cfg)
        assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.paper
def test_alpha_ends_at_reverse_and_at_forward_kl():
    item = ragged(seed=1)
    near, end = (value_and_gradient(loss, *item, Config(0.3, "alpha", a)) for a in (1e-6, 0.0))
    for x, y in zip(near, end):
        torch.testing.assert_close(x, y, rtol=0, atol=1e-5)
    one = value_and_gradient(loss, *item, Config(0.3, "alpha", 1.0))
    forward = value_and_gradient(loss, *item, config("fkl", 0.3))
    assert torch.equal(one[0], forward[0]) and torch.equal(one[1], forward[1])
    assert Config(divergence="alpha").alpha == 0.5


@pytest.mark.paper
def test_a_small_alpha_does_not_cancel():
    s = score(torch.tensor([1.0, -0.5]), Config(1.0, "alpha", 1e-7))
    assert (s[0] - s[1]).item() == pytest.approx(1.5, abs=1e-6)
    losses = loss(*one_pair(1.0, -0.5), Config(0.1, "alpha", 1e-6))[0]
    assert losses.item() == pytest.approx(0.620957, abs=1e-6)


def test_jensen_shannon_in_its_older_form():
    rho = torch.linspace(-6, 6, 25, dtype=torch.float64)
    torch.testing.assert_close(score(rho, config("js")), rho - F.softplus(rho))


@pytest.mark.paper
@pytest.mark.parametrize("kind", KINDS)
def test_the_score_is_f_prime_up_to_a_constant_and_rises(kind):
    cfg, rho = config(kind), torch.linspace(-4, 4, 33, dtype=torch.float64)
    u = rho.exp().requires_grad_()
    (f_prime,) = torch.autograd.grad(generator(u, cfg).sum(), u)
    gap = f_prime - score(rho, cfg)
    assert (gap - gap[0]).abs().max() < 1e-9 and (score(rho, cfg).diff() > 0).all()
    one = torch.ones(1, dtype=torch.float64)
    assert generator(one, cfg).item() == pytest.approx(0, abs=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize("kind", KINDS)
def test_ragged_responses_values_and_gradients_of_the_closed_form(kind):
    logps, ref_logps, batch = ragged(seed=2)
    cfg = config(kind, 0.7)
    losses, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    rho = (logps - ref_logps).sum(-1).detach()
    u = rho.exp()
    s = {"rkl": u.log(), "fkl": -1 / u, "js": (2 * u / (1 + u)).log()}.get(kind)
    s = (1 - u**-cfg.order) / cfg.order if s is None else s
    z = 0.7 * (s[:, 0] - s[:, 1])
    torch.testing.assert_close(losses, -F.logsigmoid(z), rtol=0, atol=1e-10)
    sides = torch.tensor([-1.0, 1.0], dtype=torch.float64)
    weight = 0.7 * torch.sigmoid(-z)[:, None] * slope(kind, rho) * sides
    expected = weight[..., None].expand_as(gradient)  # alike for every token: a SUM
    torch.testing.assert_close(gradient, expected, rtol=0, atol=1e-10)


@pytest.mark.paper
@pytest.mark.parametrize("kind", KINDS)
def test_only_under_reverse_kl_a_constant_of_the_prompt_cancels(kind):
    logps, ref_logps, batch = ragged()
    moved = torch.zeros_like(logps)
    moved[..., 0] = 0.5
    there, here = (loss(x, ref_logps, batch, config(kind, 0.4))[0] for x in (logps, logps + moved))
    assert torch.allclose(there, here, atol=1e-12) == (kind == "rkl")


@pytest.mark.parametrize("kind", KINDS)
def test_swapping_the_pair_changes_the_sign_of_the_margin(kind):
    item, cfg = ragged(), config(kind, 0.4)
    plain, back = loss(*item, cfg)[0], loss(*swapped(item), cfg)[0]
    torch.testing.assert_close(torch.exp(-plain) + torch.exp(-back), torch.ones_like(plain))


# ---- large log-ratios


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_log_ratios_stay_finite_and_are_counted(kind, dtype):
    ends = [(s * 1e4, t * 1e4) for s in (1, -1) for t in (1, -1)] + [(90.0, -90.0), (-90.0, 90.0)]
    for chosen, rejected in ends:
        item = one_pair(chosen, rejected, dtype=dtype)
        losses, metrics = loss(*item, config(kind, 0.1))
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), item[0])[0].isfinite().all()
        order = config(kind).order
        assert metrics["clamped"].item() == sum(-order * rho > 40 for rho in (chosen, rejected)) / 2


def test_a_clamped_response_has_no_gradient():
    losses, gradient = value_and_gradient(loss, *one_pair(-90.0, -41.0), config("fkl", 0.1))
    assert losses.item() == pytest.approx(math.log(2)) and gradient.abs().max() == 0
    _, gradient = value_and_gradient(loss, *one_pair(-39.0, -39.0), config("fkl", 0.1))
    assert gradient.abs().min() > 1e15


@pytest.mark.parametrize("chosen", [-39.0, -46.0, -60.0, -79.0])
def test_the_norm_of_the_largest_gradient_fits_into_float32(chosen):
    """Through a hundred weights, each of which moves the response."""
    weights = torch.zeros(100, requires_grad=True)
    logps, ref_logps, batch = one_pair(chosen, 0.0, dtype=torch.float32)
    losses, _ = loss(logps.detach() + weights.sum(), ref_logps, batch, config("fkl", 1.0))
    losses.sum().backward()
    norm = torch.nn.utils.clip_grad_norm_([weights], 1.0)
    assert norm.isfinite() and weights.grad.isfinite().all()


@pytest.mark.paper
def test_forward_kl_saturates_long_before():
    s = score(torch.tensor([2.0, -4.0], dtype=torch.float64), config("fkl"))
    assert (s[0] - s[1]).item() == pytest.approx(54.46, abs=0.01)
    value = loss(*one_pair(2.0, -4.0), config("fkl", 0.1))[0].item()
    assert value == pytest.approx(0.0043, abs=1e-4)


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = builders.everything_scored(logps)
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, config("fkl"))
    assert losses.item() == pytest.approx(math.log1p(math.exp(math.e - 1)), abs=1e-6)


# ---- errors


@pytest.mark.parametrize(
    ("values", "word"),
    [(dict(divergence=d), d) for d in ("tv", "chi2", "kl", "reverse")]
    + [(dict(divergence="alpha", alpha=a), "alpha") for a in (-0.1, 1.1, math.nan)]
    + [(dict(divergence=d, alpha=0.5), "alpha = 0.5 does nothing") for d in ("rkl", "fkl", "js")],
)
def test_values_out_of_range_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Config(**values)


# ---- the optimum of every divergence, in a table


def f_divergence(p, q, cfg):
    """D_f(p || q) of distributions (..., R), mean over the leading dimensions."""
    return (q * generator(p / q, cfg)).sum(-1).mean().item()


def optimum(world, cfg):
    """The policy that maximizes E[r] - beta D_f(policy || reference), as a Table.

    s(rho) = (r - c) / beta; bisection finds the c of a prompt that makes probabilities sum to 1."""
    reference, r, a = world.reference.log_probs(), world.rewards(), cfg.order

    def log_probs(c):
        t = (r - c) / cfg.beta
        if cfg.divergence == "js":
            return reference + t - (-torch.expm1(t)).log()
        return reference + (-torch.log1p(-a * t) / a if a else t)

    zero = torch.zeros((), dtype=torch.float64)
    low = (r - cfg.beta * score(-reference, cfg)).max(1, keepdim=True).values  # one has all of it
    high = r.max(1, keepdim=True).values - cfg.beta * score(zero, cfg)  # none above the reference
    for _ in range(100):
        middle = (low + high) / 2
        much = log_probs(middle).logsumexp(1, keepdim=True) > 0
        low, high = torch.where(much, middle, low), torch.where(much, high, middle)
    return Table(*world.shape).double().set_log_probs(log_probs(high))


def five():
    """Five responses with rewards 2, 1, 0, -1 and -2 and a uniform reference."""
    return World(vocab=5, length=1, spread=0.0, rewards=[2.0, 1.0, 0.0, -1.0, -2.0])


def measured(world, table, cfg):
    """Exact measurements of a policy -> {name: number}.

    `ece` reads preferences from the margin of cfg's divergence, `ece_log` from DPO's."""
    p, q, r = table.probs().detach(), world.reference.probs().detach(), world.rewards()
    rho = table.log_probs().detach() - world.reference.log_probs()
    pairs = (~torch.eye(r.shape[1], dtype=torch.bool)).nonzero()  # all ordered pairs
    truth = torch.sigmoid(r[:, pairs[:, 0]] - r[:, pairs[:, 1]]).flatten()

    def ece(cfg):
        return calibration_error(predicted(rho[:, pairs], cfg).flatten(), truth)

    return {
        "reward": table.expect(r),
        "entropy": -(p * p.log()).sum(1).mean().item(),
        "least": p.min().item(),
        "kl": table.kl(world.reference),
        "forward_kl": (q * (q / p).log()).sum(1).mean().item(),
        "divergence": f_divergence(p, q, cfg),
        "ece": ece(cfg),
        "ece_log": ece(Config(cfg.beta, "rkl")),
    }


ROWS = [  # divergence, pi*, E[r], entropy, KL(pi*, ref), D_f at beta 1
    ("rkl", (0.63641, 0.23412, 0.08613, 0.03168, 0.01166), 1.4519, 1.0000, 0.6095, 0.60947),
    ("alpha 0.3", (0.65262, 0.19913, 0.08313, 0.04163, 0.02349), 1.4158, 1.0271, 0.5823, 0.58769),
    ("alpha 0.5", (0.65774, 0.18091, 0.08309, 0.04752, 0.03072), 1.3874, 1.0434, 0.5661, 0.56916),
    ("alpha 0.7", (0.65849, 0.16706, 0.08407, 0.05298, 0.03739), 1.3563, 1.0608, 0.5487, 0.54835),
    ("fkl", (0.65322, 0.15312, 0.08672, 0.06049, 0.04644), 1.3062, 1.0898, 0.5196, 0.51499),
    ("js", (0.87817, 0.08557, 0.02478, 0.00845, 0.00303), 1.8274, 0.4740, 1.1355, 0.56570),
]


@pytest.mark.paper
@pytest.mark.parametrize(("kind", "probs", "reward", "entropy", "kl", "distance"), ROWS)
def test_every_divergence_reaches_its_own_optimum(kind, probs, reward, entropy, kl, distance):
    world, cfg = five(), config(kind)
    pairs = world.pairs_all()
    table, batch = population(world, pairs, loss, cfg), collate(pairs)
    assert (table.probs() - optimum(world, cfg).probs()).abs().max() < 1e-6
    assert table.probs()[0].tolist() == pytest.approx(probs, abs=1e-5)
    found = measured(world, table, cfg)
    names = ("reward", "entropy", "kl", "divergence", "least", "ece")
    expected = [reward, entropy, kl, distance, min(probs), 0.0]
    assert [found[name] for name in names] == pytest.approx(expected, abs=6e-5)
    assert (found["ece_log"] < 1e-6) == (kind == "rkl")
    if kind == "fkl":
        assert found["ece_log"] == pytest.approx(0.11456, abs=1e-4)
    ref_logps = world.model().double().logps(batch)
    losses = loss(table.logps(batch), ref_logps, batch, cfg)[0]
    label_entropy = (losses * batch.weight.double()).mean().item()
    assert label_entropy == pytest.approx(0.389664, abs=1e-6)  # whatever the divergence


@pytest.mark.paper
def test_at_the_same_beta_reward_falls_and_entropy_rises_from_reverse_to_forward_kl():
    order = ("rkl", "alpha 0.3", "alpha 0.5", "alpha 0.7", "fkl")
    found = []
    for kind in order:
        cfg = config(kind, 0.5)
        found.append(measured(five(), optimum(five(), cfg), cfg))
    rewards = [1.8437, 1.8017, 1.7553, 1.7035, 1.6238]
    entropies = [0.4579, 0.5203, 0.5800, 0.6424, 0.7320]
    assert [x["reward"] for x in found] == pytest.approx(rewards, abs=6e-5)
    assert [x["entropy"] for x in found] == pytest.approx(entropies, abs=1e-4)
    js = measured(five(), optimum(five(), config("js", 2.0)), config("js", 2.0))
    assert (js["reward"], js["entropy"]) == pytest.approx((1.4465, 0.9900), abs=6e-5)


@pytest.mark.paper
def test_at_matched_reward_the_others_keep_the_least_likely_response_but_not_more_entropy():
    contest = (("rkl", 1.0705), ("js", 2.1294), ("alpha 0.5", 0.9816), ("fkl", 0.8410))
    found = [measured(five(), optimum(five(), config(*one)), config(*one)) for one in contest]
    columns = {
        "least": ([0.01461, 0.02655, 0.02990, 0.03966], 1e-5),
        "forward_kl": ([0.7485, 0.6454, 0.6351, 0.6173], 1e-4),
        "entropy": ([1.0502, 1.0360, 1.0311, 0.9978], 1e-4),
        "reward": ([1.4] * 4, 1e-4),
    }
    for name, (expected, tolerance) in columns.items():
        assert [x[name] for x in found] == pytest.approx(expected, abs=tolerance)


@pytest.mark.paper
@pytest.mark.parametrize("kind", KINDS)
def test_the_optimum_of_a_reference_that_is_not_uniform_and_of_several_prompts(kind):
    rewards = torch.tensor([[1.0, -0.5, 0.2, 0.0], [0.3, 2.0, -1.0, 0.0]])
    world, cfg = World(vocab=4, length=1, prompts=2, rewards=rewards), config(kind, 0.8)
    table = optimum(world, cfg)
    assert table.probs().sum(1).tolist() == pytest.approx([1.0, 1.0])
    gap = world.rewards() - 0.8 * score(table.log_probs() - world.reference.log_probs(), cfg)
    assert (gap - gap[:, :1]).abs().max() < 1e-9  # r = beta s + a constant of the prompt
    fitted = population(world, world.pairs_all(), loss, cfg)
    assert (fitted.probs() - table.probs()).abs().max() < 1e-5


# ---- what the claims measure


def test_the_calibration_error_by_hand():
    p, truth = torch.tensor([0.12, 0.18, 0.95, 1.0]), torch.tensor([0.2, 0.1, 0.9, 0.85])
    assert calibration_error(p, truth) == pytest.approx((abs(-0.08 + 0.08) + 0.2) / 4)


@pytest.mark.parametrize("kind", KINDS)
def test_the_predicted_preference_is_exp_of_minus_the_loss(kind):
    item, cfg = ragged(seed=3), config(kind, 0.4)
    rho = (item[0] - item[1]).sum(-1)
    torch.testing.assert_close(predicted(rho, cfg), torch.exp(-loss(*item, cfg)[0]))


def test_the_log_ratios_of_the_base_model_are_0():
    lab = Lab(Settings(base_steps=0, eval_size=4, max_response=6), quiet=True)
    found = log_ratios(lab, lab.base())
    assert torch.tensor(found["log-ratios"]).shape == (512, 2)
    assert torch.tensor(found["log-ratios"]).abs().max() == 0 and len(found["truth"]) == 512
    assert {"reward", "kl", "diversity", "length"} <= set(found)


def test_the_table_of_the_tradeoff_has_means_over_seeds():
    metrics = ("reward", "kl", "diversity", "length", "accuracy", "ece")
    curves = [[{}, dict.fromkeys(metrics, value)] for value in (0.25, 0.75)]
    page = report_of_claim(None, {"rkl": curves, "fkl": curves})["tradeoff.txt"]
    assert page.count("0.500") == 12 and "diversity" in page and "fkl" in page


# ---- the run


@pytest.mark.slow
def test_a_run_learns_with_dpos_scaffold():
    lab = Lab(Settings(world="bandit", steps=60, batch_size=256, prompts=2048), quiet=True)
    start = lab.evaluate(lab.base())["reward"]
    gains = {}
    for kind in ("rkl", "fkl", "js"):
        gains[kind] = lab.evaluate(run(lab, config(kind, 0.5)))["reward"] - start
    assert min(gains.values()) > 0.5 and gains["fkl"] < gains["rkl"]
    assert inspect.getsource(run) == inspect.getsource(dpo.run)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3, divergence=d) for d in ("rkl", "fkl", "js")] + [
    dict(beta=0.3, divergence="alpha", alpha=a) for a in (0.0, 0.3, None)
]
INPUTS = builders.far_pairs
SURVIVORS = {}
