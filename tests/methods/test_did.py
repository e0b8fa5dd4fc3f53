"""DID against its paper: distributions, the sampler, the optimum of the loss, entropies."""

import math

import pytest
import torch
import torch.nn.functional as F

from claims.did import divergence, entropy, fitted, random_table
from data import UserError
from lab import Lab, Settings
from methods import dpo
from methods.did import Config, did, loss, rejected_sampler, run, source_pairs
from tests import builders

REF, TARGET = (
    torch.tensor(p, dtype=torch.float64).log()
    for p in ([0.4, 0.3, 0.2, 0.1], [0.55, 0.15, 0.2, 0.1])
)
ZIPF = (-1.5 * torch.arange(1, 33, dtype=torch.float64).log()).log_softmax(-1)


def as_loss(reward):
    """A loss on pairs from reward(log-probs, reference log-probs, beta) of a response."""

    def loss(logps, ref_logps, batch, cfg):
        chosen, rejected = reward(logps.sum(-1), ref_logps.sum(-1), cfg.beta).unbind(1)
        return -F.logsigmoid(chosen - rejected), {}

    return loss


FORMS = {
    "log-ratio": loss,
    "twice the log-ratio": as_loss(lambda p, r, beta: 2 * beta * (p - r)),
    "ratio": as_loss(lambda p, r, beta: beta * (p - r).exp()),
    "half the reference": as_loss(lambda p, r, beta: beta * (p - 0.5 * r)),
    "no reference": as_loss(lambda p, r, beta: beta * p),
}


def close(log_p, values):
    return log_p.exp().tolist() == pytest.approx(values, abs=1e-5)


# ---- the distributions of the paper


@pytest.mark.paper
def test_the_distribution_of_the_example():
    q = did(TARGET, REF)
    assert close(q, [0.354839, 0.129032, 0.258065, 0.258065])
    assert q.exp().sum().item() == pytest.approx(1.0)
    assert close(did(REF, REF), [0.25] * 4)
    product = q + did(REF, TARGET)
    assert (product - product[0]).abs().max() < 1e-12


@pytest.mark.paper
@pytest.mark.parametrize(
    ("log_p", "value"),
    [
        (did(TARGET, REF), 1.330984),
        (REF, 1.279854),
        (TARGET, 1.165524),
        (did(REF, REF), math.log(4)),
    ],
    ids=["did", "reference", "target", "nothing learned"],
)
def test_entropies_of_the_example(log_p, value):
    assert entropy(log_p).item() == pytest.approx(value, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("beta", "loser", "back", "wins"),
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
    assert close(log_loser, loser)
    assert close(did(REF, log_loser), back)
    assert close((beta * did(TARGET, REF)).log_softmax(0), back)  # the power law
    for x in (REF - log_loser, beta * did(TARGET, REF)):  # by source, and by the DID
        assert torch.sigmoid(x[0] - x[1]).item() == pytest.approx(wins, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_log_margins_move_monotonically_from_the_sampler_to_the_target(beta):
    points = (rejected_sampler(REF, TARGET, beta), REF, TARGET)
    loser, ref, target = (log_p[:, None] - log_p for log_p in points)
    torch.testing.assert_close(ref - loser, beta * (target - ref))


@pytest.mark.paper
def test_expected_log_ratios_of_the_chosen_and_the_rejected():
    f = TARGET - REF
    assert (REF.exp() * f).sum().item() == pytest.approx(-0.080563, abs=1e-6)
    for beta, rejected, mirror in ((0.5, -0.174065, 0.002374), (1.0, -0.271429, 0.071177)):
        loser = rejected_sampler(REF, TARGET, beta).exp()
        assert (loser * f).sum().item() == pytest.approx(rejected, abs=1e-6)
        assert ((REF + beta * f).softmax(0) * f).sum().item() == pytest.approx(mirror, abs=1e-6)
    assert (TARGET.exp() * f).sum().item() == pytest.approx(0.071177, abs=1e-6)  # KL(pi* || ref)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("k", "p", "q", "value"),
    [
        (1, [0.53333, 0.3, 0.13333, 0.03333], [0.4, 0.3, 0.2, 0.1], 1.27985),
        (2, None, None, 1.07848),
        (-0.5, None, [0.17957, 0.20735, 0.25395, 0.35914], 1.35043),
        (-1, [0.25] * 4, [0.12, 0.16, 0.24, 0.48], 1.24246),
    ],
)
def test_sharpening_and_smoothing_by_a_power_of_the_reference(k, p, q, value):
    target = ((1 + k) * REF).log_softmax(0)
    assert p is None or close(target, p)
    assert q is None or close(did(target, REF), q)
    assert entropy(did(target, REF)).item() == pytest.approx(value, abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("k", "value"),
    [(-1, 3.1649), (-0.5, 3.3478), (-0.25, 3.4276), (0.25, 3.4017)]
    + [(1, 2.1488), (2, 0.6736), (3, 0.2399)],
)
def test_entropies_of_a_zipf_reference(k, value):
    assert entropy(did((1 + k) * ZIPF, ZIPF)).item() == pytest.approx(value, abs=1e-4)
    assert entropy(ZIPF).item() == pytest.approx(2.1488, abs=1e-4)


def kl_of_power(k):
    """KL(pi || pi_ref) of pi ~ pi_ref^(1+k), for the Zipf reference."""
    log_p = ((1 + k) * ZIPF).log_softmax(-1)
    return (log_p.exp() * (log_p - ZIPF)).sum().item()


def equally_far(smooth):
    """The k > 0 whose KL is that of a k < 0, by bisection."""
    low, high = 0.0, 4.0
    for _ in range(60):
        k = (low + high) / 2
        low, high = (k, high) if kl_of_power(k) < kl_of_power(smooth) else (low, k)
    return low


@pytest.mark.paper
@pytest.mark.parametrize(
    ("smooth", "sharp", "kl", "values"),
    [
        (-0.5, 0.9112, 0.35299, (3.3478, 2.3500)),
        (-0.25, 0.3187, 0.08318, (3.4276, 3.3552)),
    ],
)
def test_at_matched_kl_smoothing_has_the_higher_entropy(smooth, sharp, kl, values):
    assert equally_far(smooth) == pytest.approx(sharp, abs=1e-4)
    for k, value in zip((smooth, equally_far(smooth)), values):
        assert kl_of_power(k) == pytest.approx(kl, abs=1e-5)
        assert entropy(did((1 + k) * ZIPF, ZIPF)).item() == pytest.approx(value, abs=1e-4)


def test_the_entropy_of_a_certain_response_is_0():
    assert entropy(torch.tensor([0.0, -math.inf])).item() == 0.0


def test_the_divergence_is_the_mean_of_two_kls():
    middle = ((REF.exp() + TARGET.exp()) / 2).log()
    by_hand = sum((p.exp() * (p - middle)).sum() for p in (REF, TARGET)) / 2
    assert divergence(REF, TARGET).item() == pytest.approx(by_hand.item(), abs=1e-12)
    assert divergence(REF, REF).abs().item() < 1e-12


@pytest.mark.parametrize("value", [0.0, -1.0, math.inf, math.nan])
def test_a_sampler_without_information_is_refused(value):
    with pytest.raises(UserError, match="beta = "):
        rejected_sampler(REF, TARGET, value)
    for name in ("beta", "goal"):
        with pytest.raises(UserError, match=f"{name} = "):
            Config(**{name: value})


# ---- what the loss recovers


@pytest.mark.parametrize("beta", [0.1, 0.5, 2.0])
def test_the_loss_is_dpo_in_value_and_gradient(beta):
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *item, Config(beta))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(beta))
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    logps, ref_logps, batch = item
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, Config(beta))[0], logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(dtype, margin):
    logps, ref_logps, batch = builders.one_pair(margin, 0.0, dtype=dtype)
    losses, metrics = loss(logps, ref_logps, batch, Config())
    assert losses.isfinite().all()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert metrics["weight"].isfinite()
    assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()


def test_rows_that_are_not_pairs_are_refused():
    logps, ref_logps, batch = builders.ragged()
    with pytest.raises(UserError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(UserError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


def by_labels(log_score):
    """Probabilities that i is chosen and j rejected, for Bradley-Terry labels of a score.

    Both responses are drawn from pi_ref.
    """
    labels = F.logsigmoid(log_score[:, None] - log_score)
    return (REF[:, None] + REF + labels).exp()


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.5, 1.0])
@pytest.mark.parametrize("source", ["sampler", "labels", "uniform", "exchanged"])
def test_the_expected_loss_is_flat_at_what_the_pairs_encode(source, beta):
    """With the sampler, or with labels of the DID reward, it is the target.

    With uniform rejected responses it is pi_ref^(1 + 1/beta), with chosen and rejected exchanged
    pi_ref^2 / pi*."""
    loser = rejected_sampler(REF, TARGET, beta)
    goal, chance = dict(
        sampler=(TARGET, (REF[:, None] + loser).exp()),
        labels=(TARGET, by_labels(beta * (TARGET - REF))),
        uniform=(((1 + 1 / beta) * REF).log_softmax(0), REF.exp()[:, None].expand(4, 4)),
        exchanged=((2 * REF - TARGET).log_softmax(0), (loser[:, None] + REF).exp()),
    )[source]
    places = (~torch.eye(4, dtype=torch.bool)).nonzero()
    batch = builders.everything_scored(torch.zeros(12, 2, 1))
    for point, flat in ((goal, True), (REF, False)):
        logits = point.clone().requires_grad_()
        logps, ref_logps = logits.log_softmax(0)[places][..., None], REF[places][..., None]
        losses, _ = loss(logps, ref_logps, batch, Config(beta=beta))
        (slope,) = torch.autograd.grad((losses * chance[tuple(places.T)]).sum(), logits)
        assert (slope.abs().max() < 1e-12) == flat
    found = fitted(REF, chance, beta=beta)
    assert found.exp().tolist() == pytest.approx(goal.exp().tolist(), abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.5, 1.0])
def test_without_a_reference_the_policy_becomes_the_did(beta):
    chance = (REF[:, None] + rejected_sampler(REF, TARGET, beta)).exp()
    found = fitted(REF, chance, FORMS["no reference"], beta)
    assert found.exp().tolist() == pytest.approx(did(TARGET, REF).exp().tolist(), abs=1e-5)


@pytest.mark.slow
@pytest.mark.paper
@pytest.mark.parametrize("seed", [101, 103])
def test_only_the_log_ratio_recovers_the_target_in_tables_of_32_responses(seed):
    log_ref, target = random_table(torch.Generator().manual_seed(seed))
    loser = rejected_sampler(log_ref, target, 0.5)
    chance = (log_ref[:, None] + loser).exp()
    ends = {form: fitted(log_ref, chance, each) for form, each in FORMS.items()}
    ours = ends.pop("log-ratio")
    assert divergence(ours, target) < 1e-9
    for other in ends.values():
        assert divergence(ours, target) < divergence(other, target) / 8
    assert divergence(ends["no reference"], did(target, log_ref)) < 1e-9
    kl = (log_ref.exp() * (log_ref - target)).sum()
    chosen, rejected = ((p.exp() * (ours - log_ref)).sum() for p in (log_ref, loser))
    assert chosen.item() == pytest.approx(-kl.item(), abs=1e-5)
    assert rejected < chosen < 0


@pytest.mark.paper
def test_uniform_rejected_responses_teach_a_power_of_the_reference():
    log_ref, _ = random_table(torch.Generator().manual_seed(103))
    found = fitted(log_ref, log_ref.exp()[:, None].expand(32, 32))
    assert divergence(found, (3 * log_ref).log_softmax(0)) < 1e-9


# ---- the pairs of a run


@pytest.mark.slow
def test_the_rejected_response_is_drawn_by_the_closed_form():
    """In a table of four the picks are distributed as pi_l, up to the number of candidates."""
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
    with pytest.raises(UserError, match="at least 3"):
        source_pairs([row | {"responses": ["b", "c"]}], Config(), rng)


def test_two_responses_are_refused_before_anything_is_trained(monkeypatch):
    monkeypatch.setattr(Lab, "base", lambda lab: pytest.fail("a base model"))
    with pytest.raises(UserError, match="--k 2"):
        run(Lab(Settings(k=2), quiet=True), Config())


@pytest.mark.slow
@pytest.mark.parametrize("change", [dict(beta=1.0), dict(goal=0.3)])
def test_a_run_improves_the_reward_and_every_field_counts(change):
    def trained(**fields):
        size = dict(steps=60, prompts=1024, batch_size=256, k=8)
        lab = Lab(Settings(world="bandit", label_temperature=0.0, **size), quiet=True)
        return lab, run(lab, Config(**fields))

    lab, policy = trained()
    assert policy.expect(lab.world.rewards()) > lab.reference.expect(lab.world.rewards()) + 0.3
    assert not torch.equal(policy.logits, trained(**change)[1].logits)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
