"""RLHF: the Bradley-Terry loss, the penalized reward, leave-one-out advantages, the optimum."""

import math
from types import SimpleNamespace

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods import rlhf
from methods.rlhf import Config, RewardTable, bradley_terry, fit_reward, loss, rollout, run
from tests import builders, mutation
from tests.builders import ragged


def samples(log_pi, log_ref, rewards):
    """One prompt with one-token samples of these log-probs and rewards."""
    logps = torch.tensor(log_pi, dtype=torch.float64)[None, :, None].requires_grad_()
    ref_logps = torch.tensor(log_ref, dtype=torch.float64)[None, :, None]
    batch = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool))
    batch.scores = torch.tensor([rewards], dtype=torch.float64)
    return logps, ref_logps, batch


def gradient(item, cfg):
    return torch.autograd.grad(loss(*item, cfg)[0].sum(), item[0])[0]


# ---- the reward model


def test_values_and_gradient_of_the_bradley_terry_loss():
    rewards = torch.tensor([[0.5, 0.5], [1.5, 0.0], [-1.0, 2.0]], dtype=torch.float64)
    losses, metrics = bradley_terry(rewards.requires_grad_())
    known = [math.log(2), math.log1p(math.exp(-1.5)), math.log1p(math.exp(3.0))]
    assert losses.tolist() == pytest.approx(known)
    assert metrics["reward_accuracy"].item() == pytest.approx(1 / 3)
    (grad,) = torch.autograd.grad(losses.sum(), rewards)
    wrong = torch.sigmoid(torch.tensor([0.0, -1.5, 3.0], dtype=torch.float64))
    torch.testing.assert_close(grad, torch.stack([-wrong, wrong], 1))


def test_the_bradley_terry_loss_ignores_a_constant_of_the_prompt():
    rewards = torch.tensor([[0.5, -0.7]], dtype=torch.float64)
    torch.testing.assert_close(bradley_terry(rewards + 9.0)[0], bradley_terry(rewards)[0])


@pytest.mark.slow
def test_a_reward_table_starts_flat_and_recovers_the_true_differences():
    lab = Lab(Settings(world="bandit", steps=300, batch_size=512, prompts=8192), quiet=True)
    policy = lab.base()
    pairs = lab.preferences(policy, k=2)
    start = RewardTable(policy).table.log_probs()
    torch.testing.assert_close(start, torch.full_like(start, -math.log(27)))
    model = fit_reward(lab, policy, pairs)
    found, truth = model.table.log_probs()[0].detach(), lab.world.rewards()[0]
    weight = policy.probs()[0].detach()  # rare responses are seldom compared
    found, truth = (x - (weight * x).sum() for x in (found, truth))
    error, spread = ((weight * x.square()).sum().sqrt() for x in (found - truth, truth))
    assert error < 0.3 * spread


def test_a_text_reward_model_reads_the_state_that_predicts_the_last_token():
    settings = dict(world="reviews", steps=1, prompts=8, batch_size=4, base_steps=1)
    lab = Lab(Settings(**settings, max_response=6), quiet=True)
    policy = lab.base()
    pairs = lab.preferences(policy, k=2)
    model = fit_reward(lab, policy, pairs)
    with torch.no_grad():
        model.head.weight.normal_(generator=torch.Generator().manual_seed(0))
        batch = lab.collate(pairs[:4])
        states = model.base.hidden(batch).flatten(0, 1)
        for b in range(4):
            for k in range(2):
                last = batch.source[b, k, batch.mask[b, k].sum() - 1]
                expected = model.head(states[last]).item()
                assert model(batch)[b, k].item() == pytest.approx(expected, abs=1e-5)


# ---- the policy gradient


def test_values_and_gradient_of_one_prompt():
    """R = 1, 0, -1 minus 0.5 * (0.2, -0.4, 0.0); each less the mean of the other two."""
    item = samples([-1.0, -2.0, -3.0], [-1.2, -1.6, -3.0], [1.0, 0.0, -1.0])
    R = [0.9, 0.2, -1.0]
    A = [R[0] - (R[1] + R[2]) / 2, R[1] - (R[0] + R[2]) / 2, R[2] - (R[0] + R[1]) / 2]
    losses, metrics = loss(*item, Config(beta=0.5))
    assert losses.item() == pytest.approx((A[0] * 1.0 + A[1] * 2.0 + A[2] * 3.0) / 3)
    assert gradient(item, Config(beta=0.5)).flatten().tolist() == pytest.approx([-a / 3 for a in A])
    assert metrics["sample_kl"].item() == pytest.approx(-0.2 / 3)
    assert metrics["model_reward"].item() == pytest.approx(0.0)
    assert not any(value.requires_grad for value in metrics.values())


def test_advantages_sum_to_zero_and_are_the_centered_rewards_times_k_over_k_minus_1():
    logps, ref_logps, batch = ragged(k=4, scores=builders.grades)
    A = -4 * gradient((logps, ref_logps, batch), Config())[..., 0]  # every token has the same one
    torch.testing.assert_close(A.sum(1), torch.zeros(5).double(), rtol=0, atol=1e-12)
    R = batch.scores - 0.1 * (logps - ref_logps).sum(-1).detach()
    torch.testing.assert_close(A, (R - R.mean(1, keepdim=True)) * 4 / 3)


def test_a_constant_reward_teaches_nothing_and_no_penalty_needs_no_reference():
    item = samples([-1.0, -2.0], [-1.0, -2.0], [3.0, 3.0])
    assert (gradient(item, Config()) == 0).all()
    item = samples([-1.0, -2.0], [-1.0, -2.0], [3.0, 1.0])
    moved = (item[0], item[1] - torch.tensor([[[1.0], [5.0]]]), item[2])
    assert torch.equal(gradient(item, Config(beta=0.0)), gradient(moved, Config(beta=0.0)))


def test_the_penalty_pulls_towards_the_reference():
    """Of two samples with equal rewards the one that became likelier is pushed down."""
    grad = gradient(samples([-1.0, -2.0], [-2.0, -2.0], [0.0, 0.0]), Config()).flatten()
    assert grad[0] > 0 > grad[1]


def test_the_expected_gradient_is_that_of_the_objective():
    """Over all pairs of independent samples: the gradient of E[r] - beta KL(pi || pi_ref)."""
    logits = torch.tensor([0.3, -0.2, 0.5], dtype=torch.float64, requires_grad=True)
    log_ref = torch.tensor([0.1, 0.7, -0.4], dtype=torch.float64).log_softmax(0)
    reward, log_pi = torch.tensor([1.0, -0.5, 0.2], dtype=torch.float64), logits.log_softmax(0)
    pairs = torch.cartesian_prod(torch.arange(3), torch.arange(3))
    mask = torch.ones(9, 2, 1, dtype=torch.bool)
    batch = SimpleNamespace(mask=mask, scores=reward[pairs])
    losses, _ = loss(log_pi[pairs][..., None], log_ref[pairs][..., None], batch, Config(beta=0.7))
    chance = log_pi.detach().exp()[pairs].prod(1)
    (found,) = torch.autograd.grad((chance * losses).sum(), logits, retain_graph=True)
    objective = (log_pi.exp() * (reward - 0.7 * (log_pi - log_ref))).sum()
    torch.testing.assert_close(found, -torch.autograd.grad(objective, logits)[0])


@pytest.mark.slow
def test_with_the_exact_reward_a_table_approaches_the_known_optimum():
    """pi* = pi_ref exp(r / beta) / Z: nearly all of what can be gained in reward - beta KL."""
    settings = dict(world="bandit", steps=150, batch_size=128, k=4, lr=0.05, eval_every=150)
    lab = Lab(Settings(**settings), quiet=True)
    policy, world = lab.base(), lab.world

    def data(policy, round):
        return rollout(lab, policy, round, [0], lab.truth)

    policy = lab.align(policy, data, loss, Config(beta=1.0), every=1)
    best = world.optimum(lab.reference, 1.0)
    start, end, optimum = (world.objective(p, 1.0) for p in (lab.reference, policy, best))
    assert end > start + 0.97 * (optimum - start)
    assert policy.kl(best) < 0.03


# ---- the run


def test_rollouts_take_the_prompts_in_turn_and_the_scores_of_the_function():
    lab = SimpleNamespace(batch_size=3, k=2)
    lab.sample = lambda policy, prompts, k: [dict(prompt=p, responses=[p] * k) for p in prompts]
    rows = rollout(lab, "policy", 1, [0, 1, 2, 3], lambda rows: [[r["prompt"], 9] for r in rows])
    assert [row["prompt"] for row in rows] == [3, 0, 1]
    assert [row["scores"] for row in rows] == [[3, 9], [0, 9], [1, 9]]


@pytest.mark.slow
def test_a_run_raises_the_true_reward_of_a_table_without_reading_it():
    settings = dict(world="bandit", steps=60, batch_size=64, eval_every=60)
    lab = Lab(Settings(**settings), quiet=True)
    pairs, base = lab.preferences(lab.base(), k=2), lab.base()
    lab.preferences, lab.truth = lambda policy, k: pairs, None
    policy = run(lab, Config())
    assert policy.expect(lab.world.truth) > base.expect(lab.world.truth) + 0.5


@pytest.mark.parametrize("beta", [-0.1, math.inf, math.nan])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(UserError, match="beta = "):
        Config(beta=beta)


def test_one_sample_per_prompt_is_refused():
    with pytest.raises(UserError, match="--k 2"):
        loss(*samples([-1.0], [-1.0], [1.0]), Config())


def test_losses_are_in_float32_or_better():
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        logps, ref_logps, batch = ragged(k=3, dtype=dtype)
        assert loss(logps, ref_logps, batch, Config())[0].dtype == expected


# ---- mutants

CASES = [dict(beta=0.3), dict(beta=1.7), dict(beta=0.0)]
SURVIVORS = {"loss: logps -> ref_logps": "its number of samples alone is read"}


def INPUTS():
    """Groups with graded rewards, in several sizes and precisions, some with absent samples;
    refused: a single sample."""
    items = [ragged(k=k, seed=k, scores=builders.grades) for k in (1, 2, 4)]
    items += [ragged(k=k, seed=k, scores=builders.grades, fewest=1) for k in (2, 4)]
    return [*items, ragged(k=3, dtype=torch.bfloat16, scores=builders.grades)]


@pytest.mark.mutants
def test_no_mutant_of_the_reward_models_loss_survives():
    def observe(names, cfg, rewards):
        rewards = rewards.clone().requires_grad_()
        losses, metrics = names["bradley_terry"](rewards)
        slope = torch.zeros_like(rewards)
        if losses.requires_grad:
            slope = torch.autograd.grad(losses.sum(), rewards)[0]
        return [losses.detach(), slope, *metrics.values()], list(metrics)

    def inputs():
        rng = torch.Generator().manual_seed(0)
        rewards = torch.randn(5, 2, generator=rng, dtype=torch.float64)
        return [rewards, rewards.flip(1), rewards.bfloat16(), torch.zeros(4, 2)]

    def seen(names, cfg, rewards):
        try:
            return observe(names, cfg, rewards)
        except Exception as error:  # noqa: BLE001 - a mutant may do anything
            return f"{type(error).__name__}: {error}", None

    made, alive = mutation.survivors(rlhf, CASES[:1], inputs, ["bradley_terry"], seen)
    # the two have one dtype, which is all that is read of `chosen` there
    assert len(made) > 5 and [mutant.name for mutant in alive] == [
        "bradley_terry: chosen -> rejected"
    ]
