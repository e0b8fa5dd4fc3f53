"""3D-Properties against the paper's card: values, gradients in log-probs and in likelihoods, the toys, and the look at a finished run."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.three_d import embedded, likelihood_slopes, networks, slower
from lab import Lab, Settings
from methods import dpo
from methods.three_d import Config, evaluate, log_ratios, loss, run
from tests import builders
from tests.builders import ragged


def pair(chosen, rejected, reference=0.12, dtype=torch.float64):
    """One-token responses with these likelihoods; both have the reference's."""
    logps = torch.tensor([[[chosen], [rejected]]], dtype=dtype).log().requires_grad_()
    ref_logps = torch.full((1, 2, 1), reference, dtype=dtype).log()
    return logps, ref_logps, SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))


def value_and_gradient(logps, ref_logps, batch, cfg, objective=loss):
    losses = objective(logps, ref_logps, batch, cfg)[0]
    return losses, torch.autograd.grad(losses.sum(), logps)[0]


def slopes(chosen, rejected, cfg, reference=0.12):
    """(loss, dL/dpi_w, dL/dpi_l) by autograd through the likelihoods themselves."""
    p = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    ref_logps = torch.full((1, 2, 1), reference, dtype=torch.float64).log()
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    value = loss(p.log().view(1, 2, 1), ref_logps, batch, cfg)[0].sum()
    return value.item(), *torch.autograd.grad(value, p)[0].tolist()


VARIANTS = [
    Config("dpo", 0.3),
    Config("flex", 0.3, 0.1),
    Config("flex", 0.3, 0.5),
    Config("flex", 0.3, 0.0),
    Config("sft", 0.3, gamma=0.2),
]


# ---- the card's numbers


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
    assert found[1] == pytest.approx(chosen_slope, abs=1e-6) and found[2] == pytest.approx(
        rejected_slope, rel=1e-5
    )
    assert found[2] / found[1] == pytest.approx(-0.3 / rejected)
    z, a = rejected / 0.3, 1.0
    assert found[0] == pytest.approx(math.log(1 + a * z**0.1))  # eq. 6


def test_flex_and_sft_at_one_point():
    logps, ref_logps, batch = pair(0.3, 0.05)
    losses, gradient = value_and_gradient(logps, ref_logps, batch, Config("flex", 0.1, 0.02))
    assert losses.item() == pytest.approx(0.640066, abs=1e-6) and -math.log(
        math.expm1(losses.item())
    ) == pytest.approx(0.109138, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-0.047274, 0.009455], abs=1e-6)
    losses, gradient = value_and_gradient(logps, ref_logps, batch, Config("sft", 0.1, gamma=0.1))
    assert losses.item() == pytest.approx(0.727964, abs=1e-6) and gradient[
        0, 0
    ].item() == pytest.approx(-0.145533, abs=1e-6)


@pytest.mark.parametrize(
    ("beta", "slope"), [(0.2, 7.139), (0.1, 4.158), (0.05, 2.231), (0.02, 0.9295), (0.01, 0.4709)]
)
def test_a_smaller_rejected_beta_is_a_smaller_slope(beta, slope):
    assert slopes(0.3, 0.01, Config("flex", 0.1, beta))[2] == pytest.approx(slope, rel=2e-4)


def test_the_limits_as_the_rejected_likelihood_vanishes():
    """Corollary 2, its form for flex, and the supervised slope that stays. a = pi_ref(y_w)^beta / pi_ref(y_l)^beta_rejected."""
    for beta, other in ((0.1, 0.1), (0.1, 0.05)):
        a, p, q = 0.12**beta / 0.12**other, 0.3, 1e-290
        _, chosen, rejected = slopes(p, q, Config("flex", beta, other))
        assert chosen == pytest.approx(
            -a * beta * p ** (-beta - 1) * q**other, rel=1e-6 + 2 * q**other
        )
        assert rejected == pytest.approx(
            a * other * p**-beta * q ** (other - 1), rel=1e-6 + 2 * q**other
        )
    assert slopes(0.3, 1e-290, Config("sft", gamma=0.02))[1] == pytest.approx(-0.02 / 0.3, abs=1e-6)


def test_a_reward_model_has_balanced_slopes():
    r = torch.tensor([0.4, -0.3], dtype=torch.float64, requires_grad=True)
    (gradient,) = torch.autograd.grad(-F.logsigmoid(r[0] - r[1]), r)
    assert gradient.tolist() == pytest.approx([-1 / (1 + math.exp(0.7)), 1 / (1 + math.exp(0.7))])


# ---- identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_equal_betas_and_gamma_0_are_dpo(dtype):
    logps, ref_logps, batch = ragged(dtype=dtype)
    theirs = value_and_gradient(logps, ref_logps, batch, dpo.Config(0.3), dpo.loss)
    for cfg in (Config("dpo", 0.3), Config("flex", 0.3, 0.3), Config("sft", 0.3, gamma=0.0)):
        for ours, known in zip(value_and_gradient(logps, ref_logps, batch, cfg), theirs):
            torch.testing.assert_close(
                ours, known, rtol=1e-6, atol=1e-6 if dtype == torch.float32 else 1e-13
            )


def test_beta_rejected_0_leaves_the_rejected_side_alone():
    logps, ref_logps, batch = ragged()
    gradient = value_and_gradient(logps, ref_logps, batch, Config("flex", 0.3, 0.0))[1]
    assert (gradient[:, 1] == 0).all() and (gradient[:, 0] < 0).all()


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_ragged_responses_values_and_gradients_of_the_definition(cfg):
    logps, ref_logps, batch = ragged(seed=3)
    chosen, rejected = ((logps - ref_logps)[:, k].sum(1).detach() for k in (0, 1))
    beta_rejected, gamma = slower(cfg)
    m = cfg.beta * chosen - beta_rejected * rejected
    losses, gradient = value_and_gradient(logps, ref_logps, batch, cfg)
    torch.testing.assert_close(
        losses, torch.log1p(torch.exp(-m)) - gamma * logps[:, 0].sum(1), rtol=0, atol=1e-12
    )
    s = torch.sigmoid(-m)
    expected = torch.stack(
        [-cfg.beta * s - gamma, beta_rejected * s], 1
    )  # the same for every token: a SUM
    torch.testing.assert_close(
        gradient, expected[..., None].expand_as(gradient), rtol=0, atol=1e-12
    )
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    reference = ref_logps.clone().requires_grad_()
    (pull,) = torch.autograd.grad(loss(logps.detach(), reference, batch, cfg)[0].sum(), reference)
    expected = torch.stack(
        [cfg.beta * s, -beta_rejected * s], 1
    )  # the supervised term knows no reference
    torch.testing.assert_close(pull, expected[..., None].expand_as(pull), rtol=0, atol=1e-12)
    metrics = loss(logps, ref_logps, batch, cfg)[1]
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx(
        dict(
            weight=s.mean().item(),
            chosen_ratio=chosen.mean().item(),
            rejected_ratio=rejected.mean().item(),
        )
    )


def test_flex_is_dpo_and_a_push_that_ends_with_the_margin():
    logps, ref_logps, batch = ragged(seed=4)
    cfg = Config("flex", 0.3, 0.1)
    gradient = value_and_gradient(logps, ref_logps, batch, cfg)[1]
    s = (
        loss(logps, ref_logps, batch, cfg)[0].detach().neg().expm1().neg()
    )  # sigmoid(-m) = 1 - exp(-loss)
    dpo_part = 0.1 * s[:, None] * torch.tensor([-1.0, 1.0], dtype=torch.float64)
    push = 0.2 * s[:, None] * torch.tensor([-1.0, 0.0], dtype=torch.float64)
    torch.testing.assert_close(gradient[..., 0], dpo_part + push, rtol=0, atol=1e-12)


def test_a_constant_on_both_log_ratios_matters_under_flex_alone():
    logps, ref_logps, batch = ragged(seed=5)
    shift = torch.zeros_like(logps)
    shift[..., 0] = 1.0
    for cfg, same in ((Config("dpo", 0.3), True), (Config("flex", 0.3, 0.1), False)):
        there, here = (loss(x, ref_logps, batch, cfg)[0] for x in (logps + shift, logps))
        assert torch.allclose(there, here, atol=1e-12) == same
    padded = [F.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)]
    for cfg in VARIANTS:
        alone = loss(*padded[:2], SimpleNamespace(mask=padded[2]), cfg)[0]
        torch.testing.assert_close(alone, loss(logps, ref_logps, batch, cfg)[0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
def test_slopes_in_log_space_are_those_of_autograd(cfg):
    for chosen, rejected in ((0.3, 0.05), (0.01, 0.4), (0.3, 1e-8)):
        logps, ref = (
            torch.tensor([chosen, rejected]).double().log(),
            torch.full((2,), 0.12).double().log(),
        )
        known = [abs(x) for x in slopes(chosen, rejected, cfg, ref[0].exp().item())[1:]]
        assert likelihood_slopes(logps, ref, cfg).exp().tolist() == pytest.approx(known, rel=1e-6)
    far = likelihood_slopes(
        torch.tensor([-1.0, -2000.0]).double(), torch.tensor([-1.0, -1.0]).double(), cfg
    )
    assert not far.isnan().any() and (slower(cfg)[0] == 0 or far[1] > 900)


# ---- precision and size


@pytest.mark.parametrize("cfg", VARIANTS, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_margins_stay_finite(cfg, dtype):
    for margin in (1e4, -1e4):
        logps = torch.tensor(
            [[[margin], [0.0]], [[0.0], [margin]]], dtype=dtype, requires_grad=True
        )
        batch = SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool))
        losses, metrics = loss(logps, torch.zeros_like(logps), batch, cfg)
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()
        assert all(value.isfinite() and not value.requires_grad for value in metrics.values())


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = SimpleNamespace(mask=torch.ones(1, 2, 200, dtype=torch.bool))
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, Config("sft", 1.0, gamma=0.5))
    assert losses.item() == pytest.approx(math.log1p(math.e) + 0.5 * 201, abs=1e-4)


# ---- errors


@pytest.mark.parametrize(
    "fields",
    [
        dict(variant="ipo"),
        dict(variant="sft", beta_rejected=0.05),
        dict(variant="dpo", beta_rejected=0.05),
        dict(variant="dpo", gamma=0.1),
    ]
    + [
        dict(beta=0.0),
        dict(beta=math.inf),
        dict(beta=math.nan),
        dict(beta_rejected=-0.1),
        dict(gamma=0.1),
    ]
    + [dict(beta_rejected=bad) for bad in (math.nan, math.inf)]
    + [dict(variant="sft", gamma=bad) for bad in (-0.1, math.inf, math.nan)],
)
def test_fields_out_of_range_or_of_another_variant_are_refused(fields):
    name = [*fields][-1]
    with pytest.raises(ValueError, match=f"{name} = "):
        Config(**fields)


def test_defaults():
    assert vars(Config()) == dict(variant="flex", beta=0.1, beta_rejected=0.05, gamma=None)
    assert vars(Config("sft")) == dict(variant="sft", beta=0.1, beta_rejected=None, gamma=0.02)
    assert vars(Config("dpo", 0.4)) == dict(variant="dpo", beta=0.4, beta_rejected=None, gamma=None)


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    for wrong in (logps[:, :1], logps[0], torch.zeros(2, 16, 3)):
        with pytest.raises(ValueError, match="pairs"):
            loss(wrong, wrong, batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the embedding toy: three properties and two remedies


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
    assert p[:, 0].max().item() == pytest.approx(peak, abs=1e-3) and p[:, 0].argmax().item() == step
    assert p[-1].tolist() == pytest.approx(end, abs=6e-4) and p.sum(1).tolist() == pytest.approx(
        [1.0] * 2001
    )


def test_the_slope_in_the_preferred_likelihood_goes_to_0_where_it_stays():
    """Property 2: at rho -0.5 pi_w ends at 0.165 and its slope vanishes with pi_l; at 0.9 pi_w vanishes itself, and the slope grows."""
    for rho, first, last in ((-0.5, 0.1111, 0.0105), (0.9, 0.1111, 1e3)):
        path = embedded(Config("dpo"), rho=rho)
        slopes = likelihood_slopes(path[:, :2], path[0, :2], Config("dpo")).exp()
        assert slopes[0, 0].item() == pytest.approx(first, abs=1e-4)
        assert (
            slopes[-1, 0] > last
            if rho > 0
            else slopes[-1, 0].item() == pytest.approx(last, abs=1e-4)
        )
        assert slopes[-1, 1] > 1e12


def test_without_shared_features_no_mass_leaves_the_pair():
    """A table moves two logits: the preferred response takes it all."""
    logits, ref = (
        torch.zeros(10, dtype=torch.float64, requires_grad=True),
        torch.full((1, 2, 1), 0.1).double().log(),
    )
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    for _ in range(500):
        logps = logits.log_softmax(0)
        (slope,) = torch.autograd.grad(
            loss(logps[:2].view(1, 2, 1), ref, batch, Config("dpo"))[0].sum(), logits
        )
        logits = (logits - 100 * slope).detach().requires_grad_()
    p = logits.softmax(0)
    assert p[0] > 0.99 and p[1] < 1e-6 and torch.equal(logits[2:], torch.zeros(8))


def test_betas_the_wrong_way_round_let_the_rejected_one_fall_faster():
    falls = [
        embedded(cfg, steps=100)[-1, 1].item()
        for cfg in (Config("flex", 0.1, 0.05), Config("dpo"), Config("flex", 0.05, 0.1))
    ]
    assert falls[0] > falls[1]
    ratio = [
        embedded(cfg, steps=20).diff(dim=0)[-1]
        for cfg in (Config("flex", 0.1, 0.05), Config("flex", 0.05, 0.1))
    ]
    assert ratio[0][0] / ratio[0][1].abs() > ratio[1][0] / ratio[1][1].abs()


# ---- the paper's toy


def test_the_networks_start_at_the_scenario():
    for scenario, (high, low) in {
        1: (0.12, 0.12),
        2: (0.02, 0.12),
        3: (0.12, 0.02),
        4: (0.02, 0.02),
    }.items():
        path = networks(Config("dpo"), scenario, seed=100, count=2, steps=1).exp()
        assert path.shape == (2, 2, 4, 4)
        start = path[0]
        torch.testing.assert_close(start[..., :3].sum(-1), torch.ones(2, 4), rtol=0, atol=1e-5)
        for column, value in ((0, high), (1, low), (3, 1 - 4 * high - 4 * low)):
            assert (start[..., column] - value).abs().max() < 0.02, (scenario, column)


# ---- runs


def test_a_run_and_its_variants_differ(tmp_path):
    found = {}
    for cfg in (Config("dpo"), Config("flex"), Config("sft")):
        lab = Lab(Settings(world="bandit", steps=20, batch_size=64, prompts=512), quiet=True)
        policy = run(lab, cfg)
        found[cfg.variant] = evaluate(lab, policy)
        assert found[cfg.variant]["own_ratio"] == pytest.approx(found[cfg.variant]["kl"], abs=0.15)
        assert found[cfg.variant]["rejected_ratio"] < found[cfg.variant]["chosen_ratio"]
    assert found["dpo"]["rejected_ratio"] < found["flex"]["rejected_ratio"]
    assert len({values["chosen_ratio"] for values in found.values()}) == 3


SMALL = ["--prompts", "8", "--batch_size", "4", "--eval_size", "4", "--max_response", "5"]


def made(out, *flags):
    """The folder of a small finished run of DPO."""
    assert (
        train.main(
            [
                "--method",
                "dpo",
                "--steps",
                "4",
                "--lr",
                "0.01",
                "--base_steps",
                "3",
                "--out",
                str(out),
                *SMALL,
                *flags,
            ]
        )
        == 0
    )
    return str(out)


def look(init, out, *flags):
    return train.main(["--method", "three_d", "--init", init, "--out", str(out), *SMALL, *flags])


def test_a_look_at_a_finished_run(tmp_path, capsys):
    """--init alone looks and trains nothing; --steps trains from there."""
    run_of_dpo, seen = made(tmp_path / "made"), tmp_path / "seen"
    assert look(run_of_dpo, seen) == 0
    summary = json.loads((seen / "summary.json").read_text())
    before, after = summary["before"], summary["after"]
    assert summary["steps"] == 0 and "nothing is trained" in capsys.readouterr().out
    assert (
        before["chosen_ratio"]
        == before["rejected_ratio"]
        == before["both_fell"]
        == before["own_ratio"]
        == before["kl"]
        == 0
    )
    assert (
        after["kl"] > 0
        and after["chosen_ratio"] != 0
        and after["rejected_ratio"] != 0
        and 0 <= after["both_fell"] <= 1
    )
    known = json.loads((tmp_path / "made" / "summary.json").read_text())["after"]
    assert after["kl"] == pytest.approx(known["kl"], rel=1e-3) and after[
        "chosen_logp"
    ] == pytest.approx(known["chosen_logp"], rel=1e-4)
    assert look(run_of_dpo, tmp_path / "zero", "--steps", "0") == 0
    assert json.loads((tmp_path / "zero" / "summary.json").read_text())["after"] == after
    assert look(run_of_dpo, tmp_path / "on", "--steps", "2") == 0
    assert json.loads((tmp_path / "on" / "summary.json").read_text())["before"]["kl"] == 0
    capsys.readouterr()
    assert look(run_of_dpo, tmp_path / "no", "--world", "ranking") == 2
    assert "--world reviews, not ranking" in capsys.readouterr().err
    for flags in (("--variant", "dpo"), ("--beta", "0.3"), ("--beta_rejected", "0.02")):
        assert look(run_of_dpo, tmp_path / "no", *flags) == 2
        assert "do nothing" in capsys.readouterr().err
    (tmp_path / "made" / "run.json").unlink()
    assert look(run_of_dpo, tmp_path / "no") == 2
    assert "no run.json" in capsys.readouterr().err


def test_a_look_at_a_run_on_a_file(tmp_path, capsys, monkeypatch):
    """Its context is that of the run, and a path is the same file however it is written."""
    rows = [
        dict(prompt=f"q{i} is", chosen=f" good {i}", rejected=f" bad {i} x" + " so" * 40 * (i > 30))
        for i in range(40)
    ]
    for name in ("p.jsonl", "other.jsonl"):
        (tmp_path / name).write_text("\n".join(map(json.dumps, rows)))
    monkeypatch.chdir(tmp_path)
    run_of_dpo = made(
        tmp_path / "made", "--data", "p.jsonl", "--context", "24", "--truncate", "true"
    )
    assert (
        look(
            run_of_dpo, tmp_path / "seen", "--data", str(tmp_path / "p.jsonl"), "--truncate", "true"
        )
        == 0
    )
    summary = json.loads((tmp_path / "seen" / "summary.json").read_text())
    assert summary["before"]["chosen_ratio"] == 0 and summary["after"]["chosen_ratio"] != 0
    capsys.readouterr()
    assert look(run_of_dpo, tmp_path / "no", "--data", "other.jsonl") == 2
    assert "is a run with --data" in capsys.readouterr().err


def test_log_ratios_are_those_of_the_models():
    lab = Lab(Settings(world="bandit", prompts=16), quiet=True)
    policy = lab.base()
    with torch.no_grad():
        policy.logits += torch.randn(
            policy.logits.shape, generator=torch.Generator().manual_seed(0)
        )
    rows = lab.preferences(lab.reference, k=2)
    ratio = log_ratios(lab, policy, rows)
    difference = policy.log_probs() - lab.reference.log_probs()
    for row, (chosen, rejected) in zip(rows, ratio.tolist()):
        for tokens, value in zip(row["responses"], (chosen, rejected)):
            assert value == pytest.approx(
                difference[0, tokens[0] * 9 + tokens[1] * 3 + tokens[2]].item(), abs=1e-5
            )


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(variant="dpo", beta=0.3),
    dict(variant="flex", beta=1.7, beta_rejected=0.4),
    dict(variant="sft", beta=0.3, gamma=0.6),
]
INPUTS = builders.pairs
SURVIVORS = {}
