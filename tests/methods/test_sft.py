"""SFT on the preferred responses: the loss against DPO's own baseline, pairs and lists by score, what its optimum is, no reference."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

import train
from claims.dpo import preferred
from claims.sft import dpo_of_pairs, scorings, winners
from data import collate
from lab import Lab, Settings
from methods import dpo
from methods.sft import Config, loss, run
from tests import builders
from toy.bandit import World


def ragged(rows=6, count=2, length=7, seed=0, dtype=torch.float64):
    """Random log-probs of ragged responses, 0 outside the mask, with distinct scores."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, count, 1), generator=rng)
    logps = -3 * torch.rand(rows, count, length, generator=rng, dtype=dtype) * mask
    scores = torch.rand(rows, count, generator=rng)
    return logps.requires_grad_(), SimpleNamespace(mask=mask, scores=scores)


def value_and_gradient(objective, logps, batch, ref_logps=None):
    losses = objective(logps, ref_logps, batch, Config())[0]
    return losses, torch.autograd.grad(losses.sum(), logps)[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_on_pairs_it_is_dpos_baseline_bit_for_bit(dtype):
    logps, batch = ragged(dtype=dtype)
    batch.scores = torch.tensor([1.0, 0.0]).expand(6, 2)
    ours, theirs = (value_and_gradient(f, logps, batch) for f in (loss, preferred))
    assert (
        torch.equal(ours[0], theirs[0])
        and torch.equal(ours[1], theirs[1])
        and ours[0].dtype == dtype
    )


@pytest.mark.parametrize("count", [1, 2, 3, 16])
def test_the_value_and_the_gradient_are_those_of_the_best_response_alone(count):
    logps, batch = ragged(count=count, seed=count)
    losses, gradient = value_and_gradient(loss, logps, batch)
    for b in range(6):
        k = max(range(count), key=batch.scores[b].tolist().__getitem__)
        n = int(batch.mask[b, k].sum())
        assert losses[b].item() == pytest.approx(-logps[b, k, :n].mean().item(), abs=1e-12)
        expected = torch.zeros_like(gradient[b])
        expected[k] = -1 / n
        torch.testing.assert_close(gradient[b], expected, rtol=0, atol=1e-12)
    assert torch.autograd.gradcheck(lambda x: loss(x, None, batch, Config())[0], logps)


def test_two_tokens_by_hand():
    logps = torch.tensor([[[-1.0, -3.0, 0.0], [-0.5, -0.5, -0.5]]], dtype=torch.float64)
    mask = torch.tensor([[[True, True, False], [True, True, True]]])
    for scores, value in (([1.0, 0.0], 2.0), ([0.0, 1.0], 0.5)):
        batch = SimpleNamespace(mask=mask, scores=torch.tensor([scores]))
        assert loss(logps, None, batch, Config())[0].item() == pytest.approx(value)


def test_a_reference_changes_nothing():
    logps, batch = ragged()
    plain = value_and_gradient(loss, logps, batch)
    other = value_and_gradient(loss, logps, batch, torch.full_like(logps, torch.nan))
    assert torch.equal(plain[0], other[0]) and torch.equal(plain[1], other[1])


def test_the_order_of_a_list_its_padding_and_the_other_rows_change_nothing():
    logps, batch = ragged(count=4)
    plain = loss(logps, None, batch, Config())[0]
    order = torch.tensor([2, 0, 3, 1])
    moved = SimpleNamespace(mask=batch.mask[:, order], scores=batch.scores[:, order])
    torch.testing.assert_close(loss(logps[:, order], None, moved, Config())[0], plain)
    wide = SimpleNamespace(
        mask=torch.nn.functional.pad(batch.mask, (0, 3, 0, 2)),
        scores=torch.nn.functional.pad(batch.scores, (0, 2)),
    )
    torch.testing.assert_close(
        loss(torch.nn.functional.pad(logps, (0, 3, 0, 2)), None, wide, Config())[0], plain
    )
    for b in range(6):
        one = SimpleNamespace(mask=batch.mask[b : b + 1], scores=batch.scores[b : b + 1])
        torch.testing.assert_close(loss(logps[b : b + 1], None, one, Config())[0][0], plain[b])


def test_an_absent_response_is_never_the_preferred_one():
    """Its score is 0, above those of responses with negative scores."""
    logps, batch = ragged(count=3)
    batch.scores, batch.mask, logps = batch.scores - 2, batch.mask.clone(), logps.detach().clone()
    batch.mask[:, 1], batch.scores[:, 1], logps[:, 1] = False, 0.0, 0.0
    rest = SimpleNamespace(mask=batch.mask[:, [0, 2]], scores=batch.scores[:, [0, 2]])
    torch.testing.assert_close(
        loss(logps, None, batch, Config())[0], loss(logps[:, [0, 2]], None, rest, Config())[0]
    )
    batch.mask[2] = False
    with pytest.raises(ValueError, match="no response with a scored token"):
        loss(logps, None, batch, Config())


def test_of_equal_scores_the_first_counts():
    for count in (2, 16):
        logps, batch = ragged(count=count)
        batch.scores = torch.full_like(batch.scores, 0.3)
        torch.testing.assert_close(
            loss(logps, None, batch, Config())[0], preferred(logps, None, batch, None)[0]
        )


def test_large_values_and_short_types():
    for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
        logps = torch.tensor([[[-1e4], [0.0]], [[0.0], [-1e4]]], dtype=dtype, requires_grad=True)
        batch = SimpleNamespace(
            mask=torch.ones(2, 2, 1, dtype=torch.bool),
            scores=torch.tensor([[1.0, 0.0], [1.0, 0.0]]),
        )
        losses, _ = loss(logps, None, batch, Config())
        assert losses.dtype == torch.promote_types(dtype, torch.float32)
        assert losses.tolist() == pytest.approx([1e4, 0.0], rel=1e-2)
        assert torch.autograd.grad(losses.sum(), logps)[0].flatten().tolist() == [
            -1.0,
            0.0,
            -1.0,
            0.0,
        ]
    logps = torch.full((1, 2, 300), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = SimpleNamespace(
        mask=torch.ones(1, 2, 300, dtype=torch.bool), scores=torch.tensor([[1.0, 0.0]])
    )
    assert loss(logps, None, batch, Config())[0].item() == pytest.approx(
        301 / 300, abs=1e-6
    )  # summed in float32


# ---- what its optimum is


def test_the_population_gradient_vanishes_at_the_winners_and_nowhere_near():
    world = World()
    batch, policy = collate(world.pairs_all(world.reference)), world.model().double()

    def slope():
        return (
            torch.autograd.grad(
                (loss(policy.logps(batch), None, batch, Config())[0] * batch.weight).mean(),
                policy.logits,
            )[0]
            .abs()
            .max()
        )

    assert slope() > 1e-3
    policy.set_log_probs(winners(world).log())
    assert slope() < 1e-7
    assert winners(world).sum().item() == pytest.approx(1)


def test_the_winners_by_counting():
    """Two responses of probability 1/4 and 3/4 that differ by ln 3: the better one wins 3 in 4 of the pairs of both."""
    world = World(
        vocab=2,
        length=1,
        spread=0.0,
        rewards=[math.log(3), 0.0],
        reference=torch.tensor([1.0, 3.0]).log(),
    )
    assert winners(world)[0].tolist() == pytest.approx([0.75, 0.25])


def test_with_unequal_lengths_a_winner_counts_by_its_length():
    """Equal rewards, an answer of 1 token (probability 1/4) and one of 5 tokens: each wins as often as it is written, and yet the short
    one ends at 1/4 / (1/4 + 3/4 / 5), 2.5 times what it was."""
    pairs = [(i, j) for i in (0, 1) for j in (0, 1)]  # the winner and the other one
    weight = torch.tensor([[0.25, 0.75][i] * [0.25, 0.75][j] for i, j in pairs])
    mask = (torch.arange(5) < torch.tensor([1, 5])[:, None])[torch.tensor(pairs)]
    batch = SimpleNamespace(mask=mask, scores=torch.tensor([[1.0, 0.0]] * 4))
    for share, still in ((0.625, True), (0.25, False)):
        logit = torch.tensor(math.log(share / (1 - share)), dtype=torch.float64, requires_grad=True)
        first = torch.stack(
            [torch.nn.functional.logsigmoid(logit), torch.nn.functional.logsigmoid(-logit)]
        )
        logps = torch.nn.functional.pad(first[:, None], (0, 4))[
            torch.tensor(pairs)
        ]  # the other tokens follow surely
        (slope,) = torch.autograd.grad(
            (weight * loss(logps, None, batch, Config())[0]).sum(), logit
        )
        assert (abs(slope.item()) < 1e-8) == still


# ---- the run


def test_the_reference_is_not_run():
    lab = Lab(Settings(), quiet=True)
    assert scorings(lab, loss, None, 4) == 4 and scorings(lab, dpo_of_pairs, "start", 4) == 8


def test_the_baseline_is_dpo():
    logps, batch = ragged()
    ref_logps, cfg = ragged(seed=1)[0].detach() * batch.mask, dpo.Config(beta=0.3)
    ours, theirs = (f(logps, ref_logps, batch, cfg)[0] for f in (dpo_of_pairs, dpo.loss))
    assert torch.equal(ours, theirs)


@pytest.mark.parametrize("k", [2, 4])
def test_a_run_learns_from_pairs_and_more_from_lists(k):
    lab = Lab(Settings(world="bandit", steps=100, batch_size=256, prompts=2048, k=k), quiet=True)
    policy = run(lab, Config())
    gain = lab.evaluate(policy)["reward"] - lab.evaluate(lab.reference)["reward"]
    assert gain > (0.3 if k == 2 else 0.6)


def test_images():
    """The noise error of the preferred image, and of nothing else."""
    lab = Lab(Settings(world="digits", base_steps=0), quiet=True)
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
    torch.testing.assert_close(loss(logps, None, batch, Config())[0], expected)
    lab.align(policy, rows, loss, Config(), reference=None, steps=1, watch=lambda policy, step: {})


def test_single_answers_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    answers = [
        {"prompt": f"say {i}", "completion": " yes" if i % 2 else " no", "label": i % 2 == 1}
        for i in range(8)
    ]
    (tmp_path / "answers.jsonl").write_text("\n".join(json.dumps(row) for row in answers))
    argv = [
        "--method",
        "sft",
        "--data",
        "answers.jsonl",
        "--context",
        "16",
        "--base_steps",
        "0",
        "--batch_size",
        "2",
        "--show",
    ]
    assert train.cli(argv) == 0
    printed = capsys.readouterr().out
    assert (
        "1 responses, scores [1.0]" in printed and "5 scored tokens" in printed
    )  # " yes" and the end: the good ones alone


# ---- the mutants of the loss: every one makes a difference on these inputs


def best_first():
    """Lists of which one is the best: negative scores, absent responses, ties; and what is refused, an empty row."""
    items = [
        builders.ragged(3, builders.grades, 0),
        builders.ragged(3, builders.grades, 1, absent=True),
        builders.ragged(2, builders.first_wins, 2, torch.bfloat16),
    ]
    logps, ref_logps, batch = items[1]
    negative = builders.changed(items[1], scores=(batch.scores - 5) * batch.mask.any(-1))
    empty = builders.changed(items[1], mask=batch.mask & (torch.arange(5) > 0)[:, None, None])
    return [*items, negative, (logps, None, batch), builders.elsewhere(items[0]), empty]


CASES = [{}]
INPUTS = best_first
SURVIVORS = {}
