"""DID against its paper: distributions, the sampler in closed form, what the loss recovers, entropies, errors."""

import math
from types import SimpleNamespace

import pytest
import torch

from claims.did import FORMS, as_far, divergence, entropy, moved, on_32_responses, settle
from lab import Lab, Settings
from methods import dpo
from methods.did import Config, did, loss, rejected_sampler, run, source_pairs
from tests import builders
from tests.builders import ragged

REF, TARGET = (
    torch.tensor(p, dtype=torch.float64).log()
    for p in ([0.4, 0.3, 0.2, 0.1], [0.55, 0.15, 0.2, 0.1])
)
LAB = Lab(Settings(), quiet=True)


def close(log_p, values):
    return log_p.exp().tolist() == pytest.approx(values, abs=1e-5)


def test_the_distribution_of_the_example():
    q = did(TARGET, REF)
    assert close(
        q, [0.354839, 0.129032, 0.258065, 0.258065]
    ) and q.exp().sum().item() == pytest.approx(1.0)
    for log_p, value in (
        (q, 1.330984),
        (REF, 1.279854),
        (TARGET, 1.165524),
        (did(REF, REF), math.log(4)),
    ):
        assert entropy(log_p).item() == pytest.approx(value, abs=1e-6)
    assert close(did(REF, REF), [0.25] * 4)
    product = q + did(REF, TARGET)
    assert (product - product[0]).abs().max() < 1e-12


@pytest.mark.parametrize(
    "beta, loser, back, wins",
    [
        (
            0.5,
            [0.320186, 0.398226, 0.187726, 0.093863],
            [0.302240, 0.182258, 0.257751, 0.257751],
            0.623821,
        ),
        (
            1.0,
            [0.244275, 0.503817, 0.167939, 0.083969],
            [0.354839, 0.129032, 0.258065, 0.258065],
            0.733333,
        ),
    ],
)
def test_the_sampler_and_the_labels_of_the_example(beta, loser, back, wins):
    log_loser = rejected_sampler(REF, TARGET, beta)
    assert close(log_loser, loser) and close(did(REF, log_loser), back)
    assert close((beta * did(TARGET, REF)).log_softmax(0), back)  # the power law
    by_source, by_did = (REF - log_loser), beta * did(TARGET, REF)
    for x in (by_source, by_did):
        assert torch.sigmoid(x[0] - x[1]).item() == pytest.approx(wins, abs=1e-6)
    margins = [log_p[:, None] - log_p for log_p in (log_loser, REF, TARGET)]
    torch.testing.assert_close(
        margins[1] - margins[0], beta * (margins[2] - margins[1])
    )  # they move monotonically


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_where_the_population_loss_is_flat(beta):
    """Over all pairs: with the sampler, or with Bradley-Terry's labels of the differential reward on pairs of the reference, at pi*; with a
    uniform source of the rejected at pi_ref^(1 + 1/beta); with chosen and rejected exchanged at pi_ref^2 / pi*."""
    first, second = (~torch.eye(4, dtype=torch.bool)).nonzero(as_tuple=True)
    loser, f = rejected_sampler(REF, TARGET, beta), TARGET - REF
    batch = SimpleNamespace(mask=torch.ones(12, 2, 1, dtype=torch.bool))
    cases = [
        (TARGET, REF[first] + loser[second]),
        (
            TARGET,
            REF[first]
            + REF[second]
            + torch.nn.functional.logsigmoid(beta * (f[first] - f[second])),
        ),
        (((1 + 1 / beta) * REF).log_softmax(0), REF[first]),
        ((2 * REF - TARGET).log_softmax(0), loser[first] + REF[second]),
    ]
    for goal, log_weight in cases:
        for point, flat in ((goal, True), (REF, False)):
            logits = point.clone().requires_grad_()
            logps = torch.stack([logits.log_softmax(0)[i] for i in (first, second)], 1)[..., None]
            ref_logps = torch.stack([REF[i] for i in (first, second)], 1)[..., None]
            losses, _ = loss(logps, ref_logps, batch, Config(beta=beta))
            (slope,) = torch.autograd.grad((losses * log_weight.exp()).sum(), logits)
            assert (slope.abs().max() < 1e-12) == flat


def test_what_is_expected_of_the_chosen_and_the_rejected():
    f = TARGET - REF
    assert (REF.exp() * f).sum().item() == pytest.approx(-0.080563, abs=1e-6)
    for beta, rejected, mirror in ((0.5, -0.174065, 0.002374), (1.0, -0.271429, 0.071177)):
        assert (rejected_sampler(REF, TARGET, beta).exp() * f).sum().item() == pytest.approx(
            rejected, abs=1e-6
        )
        assert ((REF + beta * f).softmax(0) * f).sum().item() == pytest.approx(mirror, abs=1e-6)
    assert (TARGET.exp() * f).sum().item() == pytest.approx(0.071177, abs=1e-6)  # KL(pi* || pi_ref)


@pytest.mark.parametrize(
    "k, p, q, value",
    [
        (1, [0.53333, 0.3, 0.13333, 0.03333], [0.4, 0.3, 0.2, 0.1], 1.27985),
        (2, None, None, 1.07848),
        (-0.5, None, [0.17957, 0.20735, 0.25395, 0.35914], 1.35043),
        (-1, [0.25] * 4, [0.12, 0.16, 0.24, 0.48], 1.24246),
    ],
)
def test_sharpening_and_smoothing(k, p, q, value):
    target = ((1 + k) * REF).log_softmax(0)
    assert p is None or close(target, p)
    assert q is None or close(did(target, REF), q)
    assert entropy(did(target, REF)).item() == pytest.approx(value, abs=1e-5)


def test_entropies_of_a_zipf_reference():
    zipf = (-1.5 * torch.arange(1, 33, dtype=torch.float64).log()).log_softmax(0)
    assert entropy(zipf).item() == pytest.approx(2.1488, abs=1e-4)
    for k, value in zip(
        (-1, -0.5, -0.25, 0.25, 1, 2, 3), (3.1649, 3.3478, 3.4276, 3.4017, 2.1488, 0.6736, 0.2399)
    ):
        assert entropy(did((1 + k) * zipf, zipf)).item() == pytest.approx(value, abs=1e-4)
    assert entropy(torch.tensor([0.0, -math.inf])).item() == 0.0


def test_at_one_kl_smoothing_has_the_higher_entropy():
    zipf = (-1.5 * torch.arange(1, 33, dtype=torch.float64).log()).log_softmax(0)
    for smooth, sharp, kl, values in (
        (-0.5, 0.9112, 0.35299, (3.3478, 2.3500)),
        (-0.25, 0.3187, 0.08318, (3.4276, 3.3552)),
    ):
        assert as_far(zipf, smooth) == pytest.approx(sharp, abs=1e-4)
        for k, value in zip((smooth, as_far(zipf, smooth)), values):
            assert moved(zipf, k) == pytest.approx(kl, abs=1e-5)
            assert entropy(did((1 + k) * zipf, zipf)).item() == pytest.approx(value, abs=1e-4)


def test_divergence_is_the_mean_of_two_kls():
    middle = ((REF.exp() + TARGET.exp()) / 2).log()
    by_hand = sum((p.exp() * (p - middle)).sum() for p in (REF, TARGET)) / 2
    assert (
        divergence(REF, TARGET).item() == pytest.approx(by_hand.item(), abs=1e-12)
        and divergence(REF, REF).abs().item() < 1e-12
    )


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_sampler_without_information_is_refused(beta):
    with pytest.raises(ValueError, match="beta = "):
        rejected_sampler(REF, TARGET, beta)
    for name in ("beta", "goal"):
        with pytest.raises(ValueError, match=f"{name} = "):
            Config(**{name: beta})


def test_the_loss_is_dpo_in_value_and_gradient():
    logps, ref_logps, batch = ragged()
    for beta in (0.1, 0.5, 2.0):
        ours, plain = (
            loss(logps, ref_logps, batch, Config(beta))[0],
            dpo.loss(logps, ref_logps, batch, dpo.Config(beta))[0],
        )
        assert torch.equal(ours, plain)
        assert torch.equal(*(torch.autograd.grad(x.sum(), logps)[0] for x in (ours, plain)))
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, Config())[0], logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_huge_margins_stay_finite(dtype):
    for far in (1e4, -1e4):
        logps = torch.tensor([[[far], [0.0]]], dtype=dtype, requires_grad=True)
        losses, metrics = loss(
            logps,
            torch.zeros_like(logps),
            SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool)),
            Config(),
        )
        assert (
            losses.isfinite().all()
            and losses.dtype == torch.promote_types(dtype, torch.float32)
            and metrics["weight"].isfinite()
        )
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()


def test_what_is_no_pair_is_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_the_population_ends_at_the_target_and_without_a_reference_at_the_did(beta):
    loser = rejected_sampler(REF, TARGET, beta)
    assert settle(LAB, REF, loser, beta=beta).exp().tolist() == pytest.approx(
        TARGET.exp().tolist(), abs=1e-3
    )
    assert settle(LAB, REF, loser, "beta log pi", beta).exp().tolist() == pytest.approx(
        did(TARGET, REF).exp().tolist(), abs=1e-3
    )


def test_other_sources_teach_other_things():
    loser, uniform = rejected_sampler(REF, TARGET, 0.5), torch.full_like(REF, -math.log(4))
    assert settle(LAB, REF, uniform).exp().tolist() == pytest.approx(
        (3 * REF).softmax(0).tolist(), abs=1e-3
    )
    # chosen from pi_l and rejected from pi_ref: pi ~ pi_ref^2 / pi*; the reference of the fit stays pi_ref
    assert settle(LAB, REF, 2 * REF - loser).exp().tolist() == pytest.approx(
        (2 * REF - TARGET).softmax(0).tolist(), abs=2e-3
    )


def test_the_claims_on_32_responses():
    found = on_32_responses(LAB, 103)
    for form in list(FORMS)[1:]:
        assert found["beta log ratio"] < found[form] / 8
    assert (
        found["chosen"] == pytest.approx(-found["KL"], abs=1e-3)
        and found["rejected"] < found["chosen"] < 0
    )
    assert found["no reference, to the DID"] < 1e-5 and found["uniform, to pi_ref^3"] < 1e-5


def test_the_rejected_response_is_drawn_by_the_closed_form():
    """Many samples of a table of four: the picked responses are distributed as pi_l, up to the finite number of candidates."""
    rng, reward = torch.Generator().manual_seed(0), TARGET - REF
    draws = torch.multinomial(REF.exp().expand(8000, 4), 64, replacement=True, generator=rng)
    rows = [
        dict(prompt=0, responses=[[y] for y in d], scores=reward[d].tolist(), reward=[0.0])
        for d in draws
    ]
    pairs = source_pairs(rows, Config(beta=1.0, goal=1.0), rng)
    assert [p["responses"][0] for p in pairs[:50]] == [row["responses"][0] for row in rows[:50]]
    share = torch.bincount(torch.tensor([p["responses"][1][0] for p in pairs]), minlength=4) / 8000
    assert share.tolist() == pytest.approx([0.244275, 0.503817, 0.167939, 0.083969], abs=0.015)
    half = source_pairs(rows, Config(beta=1.0, goal=1e9), rng)  # no goal: both from pi_ref
    same = torch.bincount(torch.tensor([p["responses"][1][0] for p in half]), minlength=4) / 8000
    assert same.tolist() == pytest.approx(REF.exp().tolist(), abs=0.015)


def test_pairs_keep_their_ends_and_images_and_equal_scores_are_no_trouble():
    rng = torch.Generator().manual_seed(0)
    row = dict(
        prompt="a", responses=["b", "c", "d"], scores=[1.0, 1.0, 1.0], ends=[True, False, True]
    )
    (pair,) = source_pairs([row], Config(), rng)
    assert pair["ends"] == [True, pair["responses"][1] == "d"] and pair["scores"] == [1.0, 0.0]
    (pair,) = source_pairs(
        [dict(prompt=1, responses=torch.rand(4, 1, 2, 2), scores=[1e4, -1e4, 0.0, 0.0])],
        Config(),
        rng,
    )
    assert pair["responses"].shape == (2, 1, 2, 2)
    with pytest.raises(ValueError, match="at least 3"):
        source_pairs([row | {"responses": ["b", "c"]}], Config(), rng)


def test_two_responses_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(Lab, "base", lambda lab: pytest.fail("a base model"))
    with pytest.raises(ValueError, match="--k 2"):
        run(Lab(Settings(k=2), quiet=True), Config())


@pytest.mark.parametrize("change", [dict(beta=1.0), dict(goal=0.3)])
def test_a_run_improves_the_reward_and_every_field_counts(change):
    def trained(**fields):
        lab = Lab(
            Settings(
                world="bandit", steps=60, prompts=1024, batch_size=256, k=8, label_temperature=0.0
            ),
            quiet=True,
        )
        return lab, run(lab, Config(**fields))

    lab, policy = trained()
    assert policy.expect(lab.world.rewards()) > lab.reference.expect(lab.world.rewards()) + 0.3
    assert not torch.equal(policy.logits, trained(**change)[1].logits)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
