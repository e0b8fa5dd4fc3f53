"""SFT on the chosen responses: pairs and lists by score, what its optimum is, no reference."""

import json
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid, pad

import train
from data import collate
from lab import Lab, Settings
from methods import dpo, sft
from methods.sft import Config, loss, run
from tests import builders
from tests.builders import ragged
from toy.bandit import World
from toy.exact import population


def distinct(**kwargs):
    """Ragged rows with distinct scores, the best anywhere."""
    return ragged(scores=spread, **kwargs)


def spread(rows, k, rng):
    return torch.rand(rows, k, generator=rng) + 0.1


def values(logps, batch):
    return loss(logps, None, batch, Config())[0]


# ---- values


@pytest.mark.parametrize("k", [1, 2, 3, 16])
def test_the_value_and_the_gradient_are_those_of_the_best_response_alone(k):
    logps, _, batch = distinct(k=k, seed=k)
    losses = values(logps, batch)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    for b in range(len(losses)):
        best = max(range(k), key=batch.scores[b].tolist().__getitem__)
        n = int(batch.mask[b, best].sum())
        assert losses[b].item() == pytest.approx(-logps[b, best, :n].mean().item(), abs=1e-12)
        expected = torch.zeros_like(gradient[b])
        expected[best] = -1 / n
        torch.testing.assert_close(gradient[b], expected, rtol=0, atol=1e-12)


def test_two_tokens_by_hand():
    logps = torch.tensor([[[-1.0, -3.0, 0.0], [-0.5, -0.5, -0.5]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    for scores, value in (([1.0, 0.0], 2.0), ([0.0, 1.0], 0.5)):
        batch = SimpleNamespace(mask=mask, scores=torch.tensor([scores]))
        assert values(logps, batch).item() == pytest.approx(value)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_pairs_it_is_the_mean_over_the_chosen_tokens_bit_for_bit(dtype):
    logps, _, batch = distinct(dtype=dtype)
    batch.scores = torch.tensor([1.0, 0.0]).expand(5, 2)
    plain = -logps[:, 0].sum(-1) / batch.mask[:, 0].sum(-1)
    ours = values(logps, batch)
    assert torch.equal(ours, plain) and ours.dtype == dtype
    assert torch.equal(*(torch.autograd.grad(x.sum(), logps)[0] for x in (ours, plain)))


def test_a_reference_changes_nothing():
    logps, _, batch = distinct()
    item = (logps, torch.full_like(logps, torch.nan), batch, Config())
    ours, gradient = builders.value_and_gradient(loss, *item)
    plain = values(logps, batch)
    assert torch.equal(ours, plain)
    assert torch.equal(gradient, torch.autograd.grad(plain.sum(), logps)[0])


def test_the_order_of_a_list_and_absent_responses_change_nothing():
    logps, _, batch = distinct(k=4)
    plain, order = values(logps, batch), torch.tensor([2, 0, 3, 1])
    moved = SimpleNamespace(mask=batch.mask[:, order], scores=batch.scores[:, order])
    torch.testing.assert_close(values(logps[:, order], moved), plain)
    wide = SimpleNamespace(mask=pad(batch.mask, (0, 3, 0, 2)), scores=pad(batch.scores, (0, 2)))
    torch.testing.assert_close(values(pad(logps, (0, 3, 0, 2)), wide), plain)


def test_an_absent_response_is_never_chosen():
    """Its score is 0, above those of responses with negative scores."""
    logps, _, batch = distinct(k=3)
    batch.scores, batch.mask, logps = batch.scores - 2, batch.mask.clone(), logps.detach().clone()
    batch.mask[:, 1], batch.scores[:, 1], logps[:, 1] = False, 0.0, 0.0
    rest = SimpleNamespace(mask=batch.mask[:, [0, 2]], scores=batch.scores[:, [0, 2]])
    torch.testing.assert_close(values(logps, batch), values(logps[:, [0, 2]], rest))
    batch.mask[2] = False
    with pytest.raises(ValueError, match="no response with a scored token"):
        values(logps, batch)


@pytest.mark.parametrize("k", [2, 16])
def test_of_equal_scores_the_first_counts(k):
    logps, _, batch = distinct(k=k)
    batch.scores = torch.full_like(batch.scores, 0.3)
    first = -logps[:, 0].sum(-1) / batch.mask[:, 0].sum(-1)
    torch.testing.assert_close(values(logps, batch), first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_large_values_in_short_types(dtype):
    logps = torch.tensor([[[-1e4], [0.0]], [[0.0], [-1e4]]], dtype=dtype, requires_grad=True)
    losses = values(logps, builders.everything_scored(logps))
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert losses.tolist() == pytest.approx([1e4, 0.0], rel=1e-2)
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    assert gradient.flatten().tolist() == [-1.0, 0.0, -1.0, 0.0]


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 300), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    value = values(logps, builders.everything_scored(logps)).item()
    assert value == pytest.approx(301 / 300, abs=1e-6)


# ---- what its optimum is


def winners(world):
    """Probabilities (P, R) of the chosen one of two different responses of the reference."""
    chance, truth = world.reference.probs(), world.rewards()
    beats = torch.sigmoid(truth[:, :, None] - truth[:, None, :])
    beats = beats - torch.eye(truth.shape[1]) / 2  # a response does not meet itself
    won = chance * (beats * chance[:, None, :]).sum(2)
    return won / won.sum(1, keepdim=True)


def test_the_winners_by_counting():
    """Two responses of probability 1/4 and 3/4 that differ by ln 3 in reward.

    The better one wins 3 in 4 of the pairs that have both."""
    reference = torch.tensor([1.0, 3.0]).log()
    rewards = [math.log(3), 0.0]
    world = World(vocab=2, length=1, spread=0.0, rewards=rewards, reference=reference)
    assert winners(world)[0].tolist() == pytest.approx([0.75, 0.25])


@pytest.mark.paper
def test_responses_of_one_length_the_optimum_is_the_distribution_of_the_winners():
    """It has their reward, no response is more than twice as likely, and DPO's optimum has more."""
    world = World()
    pairs, share, truth = world.pairs_all(world.reference), winners(world), world.rewards()
    policy = population(world, pairs, loss, Config())
    assert (policy.probs() - share).abs().sum().item() / 2 < 1e-3
    assert policy.expect(truth) == pytest.approx((share * truth).sum(1).mean().item(), abs=1e-3)
    assert (policy.log_probs() - world.reference.log_probs()).max().exp().item() < 2
    for beta in (1.0, 0.5):
        assert policy.expect(truth) < world.optimum(world.reference, beta).expect(truth)


def test_the_population_gradient_vanishes_at_the_winners_and_nowhere_near():
    world = World()
    batch, policy = collate(world.pairs_all(world.reference)), world.model().double()

    def slope():
        value = (values(policy.logps(batch), batch) * batch.weight).mean()
        return torch.autograd.grad(value, policy.logits)[0].abs().max()

    assert slope() > 1e-3
    policy.set_log_probs(winners(world).log())
    assert slope() < 1e-7
    assert winners(world).sum().item() == pytest.approx(1)


def test_with_unequal_lengths_a_chosen_response_counts_by_its_length():
    """Equal rewards, a response of 1 token (probability 1/4) and one of 5 tokens.

    Each is chosen as often as it is sampled, and yet the short one ends at
    1/4 / (1/4 + 3/4 / 5), 2.5 times what it was."""
    pairs = [(i, j) for i in (0, 1) for j in (0, 1)]  # the winner and the other one
    weight = torch.tensor([[0.25, 0.75][i] * [0.25, 0.75][j] for i, j in pairs])
    mask = (torch.arange(5) < torch.tensor([1, 5])[:, None])[torch.tensor(pairs)]
    batch = SimpleNamespace(mask=mask, scores=torch.tensor([[1.0, 0.0]] * 4))
    for share, still in ((0.625, True), (0.25, False)):
        logit = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64, requires_grad=True)
        first = torch.stack([logsigmoid(logit), logsigmoid(-logit)])
        logps = pad(first[:, None], (0, 4))[torch.tensor(pairs)]  # the other tokens are certain
        (slope,) = torch.autograd.grad((weight * values(logps, batch)).sum(), logit)
        assert (abs(slope.item()) < 1e-8) == still


# ---- the run


def scorings(method, cfg, reference, steps):
    """The number of times that models are scored in a training of `steps` steps on a table."""
    lab, calls = Lab(Settings(world="bandit", prompts=512), quiet=True), []

    def score(model, batch):
        calls.append(model)
        return model.logps(batch)

    policy = lab.base()
    data = lab.preferences(policy, k=2)
    lab.align(policy, data, method.loss, cfg, reference=reference, score=score, steps=steps)
    return len(calls)


def test_the_reference_is_not_run():
    assert scorings(sft, Config(), None, 4) == 4
    assert scorings(dpo, dpo.Config(), "start", 4) == 8


@pytest.mark.slow
@pytest.mark.parametrize("k", [2, 4])
def test_a_run_learns_from_pairs_and_more_from_lists(k):
    lab = Lab(Settings(world="bandit", steps=100, batch_size=256, prompts=2048, k=k), quiet=True)
    policy = run(lab, Config())
    gain = lab.evaluate(policy)["reward"] - lab.evaluate(lab.reference)["reward"]
    assert gain > (0.3 if k == 2 else 0.6)


def test_on_images_the_loss_is_the_noise_error():
    """The loss is the noise error of the chosen image only."""
    lab = Lab(Settings(world="digits", base_steps=0, device="cpu"), quiet=True)
    rng = torch.Generator().manual_seed(0)
    rows = [
        {
            "prompt": i,
            "responses": torch.rand(2, 1, 8, 8, generator=rng),
            "scores": [float(i % 2), float(1 - i % 2)],
        }
        for i in range(4)
    ]
    policy = lab.base()
    batch = policy.prepare(collate(rows), rng)
    logps = policy.logps(batch)
    expected = -torch.stack([logps[i, 1 - i % 2, 0] for i in range(4)])
    torch.testing.assert_close(values(logps, batch), expected)
    lab.align(policy, rows, loss, Config(), reference=None, steps=1, watch=lambda policy, step: {})


def test_single_answers_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = [
        {"prompt": f"say {i}", "completion": " yes" if i % 2 else " no", "label": i % 2 == 1}
        for i in range(8)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in answers))
    flags = "--method sft --data answers.jsonl --context 16 --base_steps 0 --batch_size 2 --show"
    assert train.main(flags.split()) == 0
    printed = capsys.readouterr().out
    assert "1 responses, scores [1.0]" in printed
    assert "5 scored tokens" in printed  # " yes" and the end: the good ones alone


# ---- the mutants of the loss: every one makes a difference on these inputs


def best_first():
    """Lists in which one is the best: negative scores, absent responses, ties; an empty row."""
    items = [
        builders.ragged(k=3, scores=builders.grades),
        builders.ragged(k=3, scores=builders.grades, seed=1, fewest=2),
        builders.ragged(seed=2, dtype=torch.bfloat16),
    ]
    logps, ref_logps, batch = items[1]
    negative = builders.changed(items[1], scores=(batch.scores - 5) * batch.mask.any(-1))
    empty = builders.changed(items[1], mask=batch.mask & (torch.arange(5) > 0)[:, None, None])
    return [*items, negative, (logps, None, batch), builders.elsewhere(items[0]), empty]


CASES = [{}]
INPUTS = best_first
SURVIVORS = {}
