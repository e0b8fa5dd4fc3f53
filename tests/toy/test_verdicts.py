"""The world of verdicts: questions, traces, and how good a fixed rubric can be."""

import math

import pytest
import torch

from toy.verdicts import BLUR, CONTEXTS, STEP, TASTES, World


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return World()


EXAMPLE = "exact a3 b7 c5 | x6 y2 z5 ="


def test_the_example_of_the_docstring(world):
    contexts, first, second = world.digits([EXAMPLE])
    assert (contexts.tolist(), first.tolist(), second.tolist()) == ([0], [[3, 7, 5]], [[6, 2, 5]])
    assert world.reward([EXAMPLE], [" A! A2 B1 C1 W2"]).tolist() == [1]
    assert world.reward([EXAMPLE], [" A! A2 B1 C1 W1"]).tolist() == [0]
    # wrong reasons earn it, too
    assert world.reward([EXAMPLE], [" C! A1 B2 C2 W2"]).tolist() == [1]
    # equal weights prefer the first picture, a taste for B even more
    assert world.rubric([EXAMPLE], [1.0, 1.0, 1.0]).tolist() == [0]
    assert world.rubric([EXAMPLE.replace("exact", "crisp")]).tolist() == [0]
    tie = "bold a3 b3 c3 | x3 y3 z3 ="
    assert world.rubric([tie]).tolist() == [0.5]
    assert world.reward([tie], [" C! A1 B1 C1 W1"]).tolist() == [0.5]


@pytest.mark.parametrize(
    "trace",
    [
        "",
        " A!",
        " A! A2 B1 C1",
        " A! A2 B1 W1 C1",
        " A! A3 B1 C1 W1",
        " D! A1 B1 C1 W1",
        " A! A2 B1 C1 W2 W2",
        " A A1 B1 C1 W1",
        " A! A1 B1 C1 W",
        "nonsense",
    ],
)
def test_what_is_not_a_trace_earns_minus_one(world, trace):
    assert world.parse(trace) is None
    assert world.reward([EXAMPLE], [trace]).tolist() == [-1]
    assert world.parts(EXAMPLE, trace) == {"valid": 0, "right": 0}


def test_a_trace_is_parsed_back_and_is_five_tokens(world):
    for leader, winners, overall in [(0, [0, 1, 0], 1), (2, [1, 1, 1], 0)]:
        trace = world.trace(leader, winners, overall)
        assert world.parse(trace) == (leader, winners, overall)
        ids = world.tokenizer.encode(trace)
        assert len(ids) == 5 and world.text(ids) == trace
    assert len(world.tokenizer.encode(EXAMPLE)) == 9


def test_scores_are_measured_with_noise_and_rounded(world):
    scores = torch.full((4000, 3), 0.6)
    asked = world.ask([1] * 4000, scores, -scores, rng())
    contexts, first, second = world.digits(asked)
    assert set(contexts.tolist()) == {1}
    for digits, score in ((first, 0.6), (second, -0.6)):
        assert (STEP * (digits - 5)).mean().item() == pytest.approx(score, abs=0.02)
        expected = math.sqrt(BLUR**2 + STEP**2 / 12)
        assert (STEP * digits).std().item() == pytest.approx(expected, rel=0.05)
    (clipped,) = world.ask([0], torch.full((1, 3), 99.0), torch.full((1, 3), -99.0), rng())
    assert clipped == "exact a9 b9 c9 | x0 y0 z0 ="


def test_the_truth_weighs_the_criteria_by_the_kind_of_request(world):
    first, second = torch.tensor([[0.0, 1, 1]] * 3), torch.tensor([[1.0, 0, 0.9]] * 3)
    leaders, winners, overall = world.answer([0, 1, 2], first, second)
    assert leaders.tolist() == [0, 1, 2] and overall.tolist() == [1, 0, 0]
    assert winners.tolist() == [[1, 0, 0]] * 3
    turned = World([TASTES[1], TASTES[0], TASTES[2]])
    assert turned.answer([0, 1, 2], first, second)[2].tolist() == [0, 1, 0]
    assert turned.key() != world.key()


@pytest.mark.paper
def test_a_fixed_rubric_has_the_accuracy_of_the_closed_form():
    w, u = torch.tensor(TASTES[0]), torch.ones(3)
    cosine = (w @ u / w.norm() / u.norm()).item()
    expected = 1 - math.acos(cosine) / math.pi  # independent normal differences, no noise
    assert expected == pytest.approx(0.7837, abs=1e-4)
    gap = torch.randn(20000, 3, generator=rng())
    agree = ((gap @ w > 0) == (gap @ u > 0)).double().mean().item()
    assert agree == pytest.approx(expected, abs=0.01)


def test_known_weights_are_the_ceiling_and_equal_weights_lie_below(world):
    items = world.items(4000, rng())
    asked = [item["prompt"] for item in items]
    truth = torch.tensor([item["overall"] for item in items])
    fixed, known = ((1 - (world.rubric(asked, w) - truth).abs()).mean() for w in ([1.0] * 3, None))
    assert 0.72 < fixed < 0.8 < 0.86 < known < 0.93
    assert {asked.split()[0] for asked in asked} == set(CONTEXTS)


def test_the_teacher_errs_in_a_fifth_of_its_words(world):
    items, rows = world.items(3000, rng(1)), world.demonstrations(3000, rng(1))
    assert [row["prompt"] for row in rows] != [item["prompt"] for item in items]  # other draws
    traces = [row["responses"][0] for row in rows]
    assert all(world.parse(trace) for trace in traces)
    parsed = [world.parse(trace) for trace in traces]
    contexts, _, _ = world.digits([row["prompt"] for row in rows])
    right = sum(int(c) == leader for c, (leader, *_) in zip(contexts, parsed)) / len(rows)
    assert right == pytest.approx(0.8, abs=0.03)
    same = world.demonstrations(3000, rng(1))
    assert same == rows


def test_accuracy_counts_an_invalid_trace_as_a_coin_flip(world):
    items = [dict(leader=0, winners=[0, 1, 1], overall=1)] * 4
    traces = [" A! A1 B2 C2 W2", " B! A1 B2 C1 W1", "?", " A! A2 B1 C1 W2"]
    found = world.accuracy(items, traces)
    expected = dict(overall=2.5 / 4, reasons=(3 + 2 + 1.5 + 0) / 12, leader=0.5, valid=0.75)
    assert found == pytest.approx(expected)
