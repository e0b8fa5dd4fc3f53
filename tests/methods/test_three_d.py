"""3D-Properties against its paper: values, gradients in log-probs and likelihoods, both toys.

Also tested is the measurement of a finished run.
"""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.three_d import SCENARIOS, networks
from data import UserError
from lab import Lab, Settings
from methods import dpo
from methods.three_d import Config, evaluate, log_ratios, loss, measure, run
from tests import builders
from tests.builders import ragged, value_and_gradient

VARIANTS = [
    Config("dpo", 0.3),
    Config("flex", 0.3, 0.1),
    Config("flex", 0.3, 0.5),
    Config("flex", 0.3, 0.0),
    Config("sft", 0.3, gamma=0.2),
]
LN = math.log
REFERENCE = LN(0.12)


def of_variant(cfg):
    """(beta of the rejected side, weight of the SFT term), in any variant."""
    beta_rejected = cfg.beta if cfg.beta_rejected is None else cfg.beta_rejected
    return beta_rejected, cfg.gamma or 0.0


def slopes(chosen, rejected, cfg):
    """(loss, dL/dpi_w, dL/dpi_l) by autograd through the likelihoods; under the
    reference both responses have likelihood 0.12."""
    p = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    logps = p.log().view(1, 2, 1)
    ref_logps = torch.full_like(logps, REFERENCE).detach()
    value = loss(logps, ref_logps, builders.everything_scored(logps), cfg)[0].sum()
    return value.item(), *torch.autograd.grad(value, p)[0].tolist()


# ---- the numbers of the card


@pytest.mark.paper
@pytest.mark.parametrize(
    ("rejected", "value", "chosen_slope", "rejected_slope"),
    [
        (0.05, 0.607567, -0.151775, 0.910651),
        (1e-4, 0.370903, -0.103296, 309.889),
        (1e-8, 0.164469, -0.050552, 1.51656e6),
    ],
)
def test_the_slope_in_the_rejected_likelihood_explodes(
    rejected, value, chosen_slope, rejected_slope
):
    found = slopes(0.3, rejected, Config("dpo"))
    assert found[0] == pytest.approx(value, abs=1e-6)
    assert found[1] == pytest.approx(chosen_slope, abs=1e-6)
    assert found[2] == pytest.approx(rejected_slope, rel=1e-5)
    assert found[2] / found[1] == pytest.approx(-0.3 / rejected)
    z, a = rejected / 0.3, 1.0
    assert found[0] == pytest.approx(math.log(1 + a * z**0.1))  # eq. 6


@pytest.mark.paper
def test_flex_at_one_point():
    item = builders.one_pair(LN(0.3), LN(0.05), REFERENCE, REFERENCE)
    losses, gradient = value_and_gradient(loss, *item, Config("flex", 0.1, 0.02))
    assert losses.item() == pytest.approx(0.640066, abs=1e-6)
    assert -math.log(math.expm1(losses.item())) == pytest.approx(0.109138, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.047274, 0.009455], abs=1e-6)


@pytest.mark.paper
def test_sft_at_one_point():
    item = builders.one_pair(LN(0.3), LN(0.05), REFERENCE, REFERENCE)
    losses, gradient = value_and_gradient(loss, *item, Config("sft", 0.1, gamma=0.1))
    assert losses.item() == pytest.approx(0.727964, abs=1e-6)
    assert gradient[0, 0].item() == pytest.approx(-0.145533, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("beta", "slope"), [(0.2, 7.139), (0.1, 4.158), (0.05, 2.231), (0.02, 0.9295), (0.01, 0.4709)]
)
def test_a_smaller_rejected_beta_gives_a_smaller_slope(beta, slope):
    assert slopes(0.3, 0.01, Config("flex", 0.1, beta))[2] == pytest.approx(slope, rel=2e-4)


@pytest.mark.paper
@pytest.mark.parametrize(("beta", "other"), [(0.1, 0.1), (0.1, 0.05)])
def test_the_limits_as_the_rejected_likelihood_vanishes(beta, other):
    """Corollary 2 and its form for flex; a = pi_ref(y_w)^beta / pi_ref(y_l)^beta_rejected."""
    a, p, q = 0.12**beta / 0.12**other, 0.3, 1e-290
    _, chosen, rejected = slopes(p, q, Config("flex", beta, other))
    tolerance = 1e-6 + 2 * q**other
    assert chosen == pytest.approx(-a * beta * p ** (-beta - 1) * q**other, rel=tolerance)
    assert rejected == pytest.approx(a * other * p**-beta * q ** (other - 1), rel=tolerance)


@pytest.mark.paper
def test_the_slope_of_the_sft_term_stays_as_the_rejected_likelihood_vanishes():
    chosen = slopes(0.3, 1e-290, Config("sft", gamma=0.02))[1]
    assert chosen == pytest.approx(-0.02 / 0.3, abs=1e-6)


@pytest.mark.paper
def test_a_reward_model_has_balanced_slopes():
    r = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-F.logsigmoid(r[0] - r[1]), r)
    assert gradient.tolist() == pytest.approx([-1 / (1 + math.exp(0.7)), 1 / (1 + math.exp(0.7))])


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "cfg", [Config("dpo", 0.3), Config("flex", 0.3, 0.3), Config("sft", 0.3, gamma=0.0)], ids=str
)
def test_equal_betas_and_gamma_0_are_dpo(cfg, dtype):
    item = ragged(dtype=dtype)
    ours = value_and_gradient(loss, *item, cfg)
    theirs = value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    for found, known in zip(ours, theirs):
        atol = 1e-6 if dtype == torch.float32 else 1e-13
        torch.testing.assert_close(found, known, rtol=1e-6, atol=atol)


@pytest.mark.paper
def test_beta_rejected_0_leaves_the_rejected_side_alone():
    _, gradient = value_and_gradient(loss, *ragged(), Config("flex", 0.3, 0.0))
    assert (gradient[:, 1] == 0).all()
    assert (gradient[:, 0] < 0).all()


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_values_gradients_and_metrics_of_the_definition(cfg):
    logps, ref_logps, batch = ragged(rows=6, seed=3)
    beta_rejected, gamma = of_variant(cfg)
    chosen, rejected = (logps - ref_logps).sum(-1).detach().unbind(1)
    z = cfg.beta * chosen - beta_rejected * rejected
    losses, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    expected = torch.log1p(torch.exp(-z)) - gamma * logps[:, 0].sum(1)
    torch.testing.assert_close(losses, expected, rtol=0, atol=1e-12)
    s = torch.sigmoid(-z)
    # the same for every token: a SUM
    expected = torch.stack([-cfg.beta * s - gamma, beta_rejected * s], 1)[..., None]
    torch.testing.assert_close(gradient, expected.expand_as(gradient), rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    reference = ref_logps.clone().requires_grad_()
    (pull,) = torch.autograd.grad(loss(logps.detach(), reference, batch, cfg)[0].sum(), reference)
    # the SFT term has no reference
    expected = torch.stack([cfg.beta * s, -beta_rejected * s], 1)[..., None]
    torch.testing.assert_close(pull, expected.expand_as(pull), rtol=0, atol=1e-12)
    metrics = {name: value.item() for name, value in loss(logps, ref_logps, batch, cfg)[1].items()}
    ratios = dict(chosen_ratio=chosen.mean().item(), rejected_ratio=rejected.mean().item())
    assert metrics == pytest.approx(dict(weight=s.mean().item()) | ratios)


@pytest.mark.paper
def test_flex_is_dpo_and_a_push_that_ends_with_the_margin():
    item, cfg = ragged(seed=4), Config("flex", 0.3, 0.1)
    losses, gradient = value_and_gradient(loss, *item, cfg)
    s = losses.detach().neg().expm1().neg()  # sigmoid(-z) = 1 - exp(-loss)
    of_dpo = 0.1 * s[:, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    push = 0.2 * s[:, None] * torch.tensor([-1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient[..., 0], of_dpo + push, rtol=0, atol=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "same"), [(Config("dpo", 0.3), True), (Config("flex", 0.3, 0.1), False)], ids=str
)
def test_a_constant_on_both_log_ratios_matters_under_flex_alone(cfg, same):
    logps, ref_logps, batch = ragged(seed=5)
    shift = torch.zeros_like(logps)
    shift[..., 0] = 1.0
    there, here = (loss(x, ref_logps, batch, cfg)[0] for x in (logps + shift, logps))
    assert torch.allclose(there, here, atol=1e-12) == same


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_padding_changes_nothing(cfg):
    logps, ref_logps, batch = ragged(seed=5)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    logps, ref_logps, mask = (F.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask))
    padded = loss(logps, ref_logps, SimpleNamespace(mask=mask), cfg)[0]
    torch.testing.assert_close(padded, plain, rtol=0, atol=1e-12)


def likelihood_slopes(logps, ref_logps, cfg):
    """log |dL/dpi| of the chosen and the rejected response, from their log-probs (..., 2).

    In log space, where nothing overflows."""
    ratio = logps - ref_logps
    beta_rejected, gamma = of_variant(cfg)
    pull = F.logsigmoid(beta_rejected * ratio[..., 1] - cfg.beta * ratio[..., 0])
    chosen = torch.logaddexp(math.log(cfg.beta) + pull, logps.new_tensor(gamma).log())
    rejected = logps.new_tensor(beta_rejected).log() + pull
    return torch.stack([chosen, rejected], -1) - logps


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_slopes_in_log_space_are_those_of_autograd(cfg):
    ref_logps = torch.full((2,), REFERENCE, dtype=torch.float64)
    for chosen, rejected in ((0.3, 0.05), (0.01, 0.4), (0.3, 1e-8)):
        logps = torch.tensor([chosen, rejected], dtype=torch.float64).log()
        known = [abs(x) for x in slopes(chosen, rejected, cfg)[1:]]
        assert likelihood_slopes(logps, ref_logps, cfg).exp().tolist() == pytest.approx(known)
    far, near = torch.tensor([[-1.0, -2000.0], [-1.0, -1.0]], dtype=torch.float64)
    found = likelihood_slopes(far, near, cfg)
    assert not found.isnan().any()
    assert of_variant(cfg)[0] == 0 or found[1] > 900


# ---- precision and errors


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(cfg, dtype, margin):
    sides = [[[margin], [0.0]], [[0.0], [margin]]]
    logps = torch.tensor(sides, dtype=dtype, requires_grad=True)
    item = (logps, torch.zeros_like(logps), builders.everything_scored(logps))
    losses, gradient = value_and_gradient(loss, *item, cfg)
    assert losses.isfinite().all()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.isfinite().all()
    assert all(m.isfinite() and not m.requires_grad for m in loss(*item, cfg)[1].values())


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = builders.everything_scored(logps)
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, Config("sft", 1.0, gamma=0.5))
    assert losses.item() == pytest.approx(math.log1p(math.e) + 0.5 * 201, abs=1e-4)


@pytest.mark.parametrize(
    "fields",
    [
        dict(variant="ipo"),
        dict(variant="sft", beta_rejected=0.05),
        dict(variant="dpo", beta_rejected=0.05),
        dict(variant="dpo", gamma=0.1),
        dict(beta=0.0),
        dict(beta=math.inf),
        dict(beta=math.nan),
        dict(beta_rejected=-0.1),
        dict(beta_rejected=math.nan),
        dict(beta_rejected=math.inf),
        dict(gamma=0.1),
        dict(variant="sft", gamma=-0.1),
        dict(variant="sft", gamma=math.inf),
        dict(variant="sft", gamma=math.nan),
    ],
    ids=str,
)
def test_fields_out_of_range_or_of_another_variant_are_refused(fields):
    name = [*fields][-1]
    with pytest.raises(UserError, match=f"{name} = "):
        Config(**fields)


def test_defaults_of_the_variants():
    assert vars(Config()) == dict(variant="flex", beta=0.1, beta_rejected=0.05, gamma=None)
    assert vars(Config("sft")) == dict(variant="sft", beta=0.1, beta_rejected=None, gamma=0.02)
    assert vars(Config("dpo")) == dict(variant="dpo", beta=0.1, beta_rejected=None, gamma=None)


def test_rows_that_are_not_pairs_are_refused():
    logps, ref_logps, batch = ragged()
    for wrong in (logps[:, :1], logps[0], torch.zeros(2, 16, 3)):
        with pytest.raises(UserError, match="pairs"):
            loss(wrong, wrong, batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(UserError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the embedding toy: three properties and two remedies


def embedded(cfg, rho=0.9, start=(0.45, 0.45, 0.10), steps=2000):
    """One prompt and three responses: chosen, rejected, and one in no pair.

    Their features are fixed, a state h is trained from h = 0 by gradient descent. rho: cosine of
    the pair's features; those of the third lie where an update of DPO points.
    -> log-probs (steps + 1, 3)."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    features = torch.stack([chosen, rejected, F.normalize(chosen - rejected, dim=0)])
    reference = torch.tensor(start, dtype=torch.float64).log()
    h, path = torch.zeros(2, dtype=torch.float64, requires_grad=True), []
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    for _ in range(steps + 1):
        logps = (features @ h + reference).log_softmax(0)
        path.append(logps.detach())
        pair, ref_pair = (x[:2].view(1, 2, 1) for x in (logps, reference))
        (slope,) = torch.autograd.grad(loss(pair, ref_pair, batch, cfg)[0].sum(), h)
        h = (h - slope).detach().requires_grad_()
    return torch.stack(path)


@pytest.mark.slow
@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "setting", "peak", "step", "end"),
    [
        (Config("dpo"), {}, 0.473, 35, (0.0, 0.0, 1.0)),
        (Config("flex", 0.1, 0.07), {}, 0.485, 74, (0.478, 0.0002, 0.522)),
        (Config("flex", 0.1, 0.05), {}, 0.773, 2000, (0.773, 0.0019, 0.225)),
        (Config("flex", 0.1, 0.02), {}, 0.904, 2000, (0.904, 0.030, 0.067)),
        (Config("sft", gamma=0.05), {}, 0.871, 2000, (0.871, 7e-5, 0.129)),
        (Config("sft", gamma=0.2), {}, 0.969, 2000, (0.969, 5e-5, 0.031)),
        (Config("dpo"), dict(rho=-0.5), 0.757, 28, (0.165, 0.0, 0.835)),
        (Config("dpo"), dict(start=(0.45, 0.02, 0.53)), 0.450, 0, (0.0, 0.0, 1.0)),
    ],
)
def test_the_embedding_toy(cfg, setting, peak, step, end):
    p = embedded(cfg, **setting).exp()
    assert p[:, 0].max().item() == pytest.approx(peak, abs=1e-3)
    assert p[:, 0].argmax().item() == step
    assert p[-1].tolist() == pytest.approx(end, abs=6e-4)
    assert p.sum(1).tolist() == pytest.approx([1.0] * 2001)


@pytest.mark.paper
def test_the_slope_in_the_chosen_likelihood_vanishes_where_that_likelihood_stays():
    """Property 2: at rho -0.5 pi_w ends at 0.165, and its slope vanishes with pi_l."""
    path = embedded(Config("dpo"), rho=-0.5)
    found = likelihood_slopes(path[:, :2], path[0, :2], Config("dpo"))
    assert found[0, 0].exp().item() == pytest.approx(0.1111, abs=1e-4)
    assert found[-1, 0].exp().item() == pytest.approx(0.0105, abs=1e-4)
    assert found[-1, 1] > math.log(1e12)
    assert found[-1, 1] - found[0, 1] > 10


@pytest.mark.paper
def test_the_slope_in_the_chosen_likelihood_grows_where_that_likelihood_vanishes():
    path = embedded(Config("dpo"), rho=0.9)
    found = likelihood_slopes(path[:, :2], path[0, :2], Config("dpo"))
    assert found[0, 0].exp().item() == pytest.approx(0.1111, abs=1e-4)
    assert found[-1, 0].exp() > 1e3
    assert found[-1, 1] > math.log(1e12)


@pytest.mark.paper
def test_without_shared_features_no_probability_leaves_the_pair():
    """In a table only two logits change, and the chosen response gets all of the probability."""
    logits = torch.zeros(10, dtype=torch.float64, requires_grad=True)
    ref_logps = torch.full((1, 2, 1), 0.1, dtype=torch.float64).log()
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    for _ in range(500):
        pair = logits.log_softmax(0)[:2].view(1, 2, 1)
        losses, _ = loss(pair, ref_logps, batch, Config("dpo"))
        (slope,) = torch.autograd.grad(losses.sum(), logits)
        logits = (logits - 100 * slope).detach().requires_grad_()
    p = logits.softmax(0)
    assert p[0] > 0.99
    assert p[1] < 1e-6
    assert torch.equal(logits[2:], torch.zeros(8))


def test_exchanged_betas_let_the_rejected_likelihood_fall_faster():
    configs = (Config("flex", 0.1, 0.05), Config("dpo"), Config("flex", 0.05, 0.1))
    falls = [embedded(cfg, steps=100)[-1, 1].item() for cfg in configs]
    assert falls[0] > falls[1]
    right, wrong = (embedded(cfg, steps=20).diff(dim=0)[-1] for cfg in configs[::2])
    assert right[0] / right[1].abs() > wrong[0] / wrong[1].abs()


# ---- the paper's toy


@pytest.mark.parametrize("scenario", SCENARIOS)
def test_the_networks_start_at_the_likelihoods_of_the_scenario(scenario):
    high, low = SCENARIOS[scenario]
    path = networks(dpo.loss, dpo.Config(), scenario, seed=100, count=2, steps=1)
    assert all(values.shape == (2, 2, 4) for values in path.values())
    start = {name: values[0] for name, values in path.items()}
    total = start["chosen"] + start["rejected"] + start["outside the pair"]
    torch.testing.assert_close(total, torch.ones(2, 4), rtol=0, atol=1e-5)
    rest = 1 - 4 * high - 4 * low
    known = {"chosen": high, "rejected": low, "chosen elsewhere": 3 * high, "8 and 9": rest}
    for name, value in known.items():
        assert (start[name] - value).abs().max() < 0.02
    assert (start["kl"] == 0).all()
    assert (path["kl"][1] > 0).all()


# ---- runs


def test_a_run_and_its_variants_differ():
    found = {}
    for cfg in (Config("dpo"), Config("flex"), Config("sft")):
        lab = Lab(Settings(world="bandit", steps=20, batch_size=64, prompts=512), quiet=True)
        found[cfg.variant] = values = evaluate(lab, run(lab, cfg))
        assert values["own_ratio"] == pytest.approx(values["kl"], abs=0.15)
        assert values["rejected_ratio"] < values["chosen_ratio"]
    assert found["dpo"]["rejected_ratio"] < found["flex"]["rejected_ratio"]
    assert len({values["chosen_ratio"] for values in found.values()}) == 3


def moved():
    """A Lab on the bandit and a policy with random logits added."""
    lab = Lab(Settings(world="bandit", prompts=16), quiet=True)
    policy, rng = lab.base(), torch.Generator().manual_seed(0)
    with torch.no_grad():
        policy.logits += torch.randn(policy.logits.shape, generator=rng)
    return lab, policy


def test_log_ratios_are_those_of_the_models():
    lab, policy = moved()
    rows = lab.preferences(lab.reference, k=2)
    ratio = log_ratios(lab, policy, rows)
    difference = (policy.log_probs() - lab.reference.log_probs())[0]
    for row, pair in zip(rows, ratio.tolist()):
        for tokens, value in zip(row["responses"], pair):
            place = tokens[0] * 9 + tokens[1] * 3 + tokens[2]
            assert value == pytest.approx(difference[place].item(), abs=1e-5)


def test_every_model_is_measured_on_the_same_pairs():
    lab, policy = moved()
    first = measure(lab, policy)
    assert measure(lab, lab.reference)["chosen_ratio"] == 0
    assert measure(lab, policy) == first


SMALL = ["--prompts", "8", "--batch_size", "4", "--eval_size", "4", "--max_response", "5"]


def made(out, *flags):
    """The folder of a small finished run of DPO."""
    flags = ["--base_steps", "3", "--steps", "4", "--lr", "0.01", *SMALL, *flags]
    assert train.main(["--method", "dpo", "--out", str(out), *flags]) == 0
    return str(out)


def look(init, out, *flags):
    return train.main(["--method", "three_d", "--init", init, "--out", str(out), *SMALL, *flags])


def summary_of(folder):
    return json.loads((folder / "summary.json").read_text())


@pytest.mark.slow
def test_a_look_at_a_finished_run(tmp_path, capsys):
    """--init alone measures and trains nothing; with --steps it is trained further."""
    run_of_dpo, seen = made(tmp_path / "made"), tmp_path / "seen"
    assert look(run_of_dpo, seen) == 0
    assert "nothing is trained" in capsys.readouterr().out
    summary = summary_of(seen)
    before, after = summary["before"], summary["after"]
    assert summary["steps"] == 0
    for name in ("chosen_ratio", "rejected_ratio", "both_fell", "own_ratio", "kl"):
        assert before[name] == 0
    assert after["kl"] > 0
    assert after["chosen_ratio"] != 0
    assert after["rejected_ratio"] != 0
    assert 0 <= after["both_fell"] <= 1
    known = summary_of(tmp_path / "made")["after"]
    assert after["kl"] == pytest.approx(known["kl"], rel=1e-3)
    assert after["chosen_logp"] == pytest.approx(known["chosen_logp"], rel=1e-4)
    assert look(run_of_dpo, tmp_path / "zero", "--steps", "0") == 0
    assert summary_of(tmp_path / "zero")["after"] == after
    assert look(run_of_dpo, tmp_path / "on", "--steps", "2") == 0
    assert summary_of(tmp_path / "on")["before"]["kl"] == 0
    capsys.readouterr()
    assert look(run_of_dpo, tmp_path / "no", "--world", "ranking") == 2
    assert "--world reviews, not ranking" in capsys.readouterr().err
    for flags in (("--variant", "dpo"), ("--beta", "0.3"), ("--beta_rejected", "0.02")):
        assert look(run_of_dpo, tmp_path / "no", *flags) == 2
        assert "do nothing" in capsys.readouterr().err
    show = ["--method", "three_d", "--init", run_of_dpo, *SMALL, "--show"]
    assert train.main(show) == 2
    assert "there is no row to show" in capsys.readouterr().err
    kept = json.loads((tmp_path / "made" / "run.json").read_text())
    for settings in (3, {}, kept["settings"] | {"base_seed": "x"}):
        (tmp_path / "made" / "run.json").write_text(json.dumps(kept | {"settings": settings}))
        assert look(run_of_dpo, tmp_path / "no") == 2
        assert "run.json is damaged" in capsys.readouterr().err
    (tmp_path / "made" / "run.json").unlink()
    assert look(run_of_dpo, tmp_path / "no") == 2
    assert "no run.json" in capsys.readouterr().err


@pytest.mark.slow
def test_a_look_at_a_run_on_a_file(tmp_path, capsys, monkeypatch):
    """The context is that of the run, and a relative path and its absolute path are one file."""
    rows = [
        dict(prompt=f"q{i} is", chosen=f" good {i}", rejected=f" bad {i} x" + " so" * 40 * (i > 30))
        for i in range(40)
    ]
    for name in ("p.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    cut = ["--truncate", "true"]
    run_of_dpo = made(tmp_path / "made", "--data", "p.jsonl", "--context", "24", *cut)
    file = str(tmp_path / "p.jsonl")
    assert look(run_of_dpo, tmp_path / "seen", "--data", file, *cut) == 0
    summary = summary_of(tmp_path / "seen")
    assert summary["before"]["chosen_ratio"] == 0
    assert summary["after"]["chosen_ratio"] != 0
    capsys.readouterr()
    assert look(run_of_dpo, tmp_path / "no", "--data", "other.jsonl") == 2
    assert "is a run with --data" in capsys.readouterr().err


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(variant="dpo", beta=0.3),
    dict(variant="flex", beta=1.7, beta_rejected=0.4),
    dict(variant="sft", beta=0.3, gamma=0.6),
]
INPUTS = builders.pairs
SURVIVORS = {}
