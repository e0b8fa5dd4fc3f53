"""NDCG against values worked out by hand, the labels of lists, and the chains that they make."""

import math
from types import SimpleNamespace

import pytest
import torch

from data import collate
from toy.ranking import World, dcg, ndcg

WORLD = World()


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def test_ndcg_of_hand_cases():
    relevance = torch.tensor([3.0, 2.0, 0.0, 1.0])
    # gains 7, 3, 0, 1; the order 2, 1, 0, 3 has the gains 0, 3, 7, 1
    scores = torch.tensor([0.1, 0.2, 0.3, 0.0])
    ideal = 7 + 3 / math.log2(3) + 1 / 2
    assert ndcg(scores, relevance, 1).item() == 0
    assert ndcg(scores, relevance, 2).item() == pytest.approx(
        (3 / math.log2(3)) / (7 + 3 / math.log2(3))
    )
    assert ndcg(scores, relevance, 4).item() == pytest.approx(
        (3 / math.log2(3) + 7 / 2 + 1 / math.log2(5)) / ideal
    )
    assert ndcg(scores, relevance, 10).item() == ndcg(scores, relevance, 4).item()
    assert ndcg(scores, relevance, 4).item() == pytest.approx(0.61999, abs=1e-5)


def test_ndcg_of_batches_ties_and_lists_without_relevance():
    relevance = torch.tensor([[1, 2, 3], [0, 0, 0], [3, 2, 1]])
    assert ndcg(relevance.double(), relevance, 3).tolist() == pytest.approx([1, 0, 1])
    assert ndcg(torch.zeros(3, 3), relevance, 1).tolist() == pytest.approx(
        [1 / 7, 0, 1]
    )  # ties stay where they are
    assert ndcg(-relevance.double(), relevance, 1).tolist() == pytest.approx([1 / 7, 0, 1 / 7])
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, gain = (
        torch.rand(20, 12, generator=seeded()),
        torch.randint(4, (20, 12), generator=seeded()),
    )
    for k in (1, 5, 10):
        assert ndcg(scores, gain, k).mean().item() == pytest.approx(
            sklearn.ndcg_score(2 ** gain.numpy() - 1, scores.numpy(), k=k)
        )


def test_labels_are_graded_by_the_truth():
    for row in (
        WORLD.lists(50, seeded()) + WORLD.lists(5, seeded(), k=20) + WORLD.lists(5, seeded(), k=2)
    ):
        items, k = [item.strip() for item in row["responses"]], len(row["responses"])
        assert len(set(items)) == k and set(items) <= set(WORLD.items)
        best = sorted(range(k), key=lambda j: -WORLD.answers(row["prompt"], items[j]))
        assert [row["scores"][j] for j in best] == [3, 2, 2, 1, 1, *[0] * 15][:k]
        assert sorted(row["rank"]) == list(range(1, k + 1))
        assert [row["scores"][row["rank"].index(r + 1)] for r in range(k)] == sorted(
            row["scores"], reverse=True
        )
    row = WORLD.lists(1, seeded())[0]
    assert WORLD.relevance(
        row["prompt"], [" no such dish", *row["responses"], row["responses"][0]]
    ).tolist() == [0, *row["scores"], 0]
    with pytest.raises(ValueError, match="is not a query"):
        WORLD.relevance("347+58=", WORLD.items)
    with pytest.raises(ValueError, match="k=21"):
        WORLD.lists(1, seeded(), k=21)


def test_ties_are_ranked_at_random_and_places_say_nothing():
    rows = WORLD.lists(2000, seeded())
    by_place = torch.tensor([row["scores"] for row in rows]).mean(0)
    assert by_place.tolist() == pytest.approx([0.9] * 10, abs=0.1)
    last = torch.tensor([row["rank"].index(10) for row in rows])
    assert torch.bincount(last, minlength=10).double().div(2000).tolist() == pytest.approx(
        [0.1] * 10, abs=0.03
    )


def test_a_row_is_one_chain_that_reads_like_a_demonstration():
    row = WORLD.lists(1, seeded())[0]
    text = "".join(a + b for a, b in zip(row["context"], row["responses"]))
    batch = collate([row], WORLD.tokenizer)
    ids = WORLD.tokenizer.encode(row["prompt"] + text)
    assert batch.tokens[0].tolist() == ids[:-1] and batch.parents[0].tolist() == list(range(-1, 9))
    assert [
        WORLD.tokenizer.decode(t[m].tolist()) for t, m in zip(batch.target[0], batch.mask[0])
    ] == row["responses"]  # no separator, no end
    assert batch.rank.tolist() == [row["rank"]] and set(batch.mask[0].sum(-1).tolist()) <= {1, 2, 3}


def test_reward_is_ndcg_over_the_whole_shelf():
    prompt = "find sweet cheap cold:"
    best = sorted(WORLD.items, key=lambda item: -WORLD.answers(prompt, item))
    ideal = 7 + 3 / math.log2(3) + 3 / 2 + 1 / math.log2(5) + 1 / math.log2(6)
    cases = {
        " " + ", ".join(best[:10]): 1.0,
        ",".join(best[:1]): 7 / ideal,
        ",".join([best[0]] * 10): 7 / ideal,
        "no such dish," + best[0]: (7 / math.log2(3)) / ideal,
        ",".join(best[5:10]): 0.0,
        ",".join(best[5:15] + best[:5]): 0.0,  # beyond the tenth place
    }
    cases |= {"": 0.0, ",,,": 0.0, "\0": 0.0, "sweet " * 1000: 0.0}
    assert WORLD.reward([prompt] * len(cases), list(cases)).tolist() == pytest.approx(
        list(cases.values())
    )
    assert WORLD.reward(
        [prompt], [WORLD.tokenizer.encode(" " + best[0])]
    ).tolist() == pytest.approx([7 / ideal])


def test_demonstrations_know_the_dishes_and_nothing_of_relevance():
    rows = WORLD.demonstrations(1000, seeded())
    for row in rows[:100]:
        items = [item.strip() for item in row["responses"][0].split(",")]
        assert 8 <= len(items) == len(set(items)) <= 20 and set(items) <= set(WORLD.items)
        assert len(WORLD.tokenizer.encode(row["prompt"])) <= WORLD.max_prompt
        assert len(WORLD.tokenizer.encode(row["responses"][0])) < WORLD.max_response
    reward = WORLD.reward([row["prompt"] for row in rows], [row["responses"][0] for row in rows])
    # each of the first ten places holds a dish of mean gain (7 + 3 + 3 + 1 + 1) / 60
    assert reward[
        [len(row["responses"][0].split(",")) >= 10 for row in rows]
    ].mean().item() == pytest.approx(
        (dcg(torch.ones(10), 10) / dcg(torch.tensor([3, 2, 2, 1, 1]), 10)).item() / 4, abs=0.01
    )


def test_measure_scores_the_candidates_and_takes_off_the_reference():
    class Oracle:
        device = "cpu"

        def __init__(self, sign):
            self.sign = sign

        def logps(self, batch):  # the relevance as the mean log-prob of an item's tokens
            return self.sign * batch.scores[..., None] * batch.mask

    class Lab(SimpleNamespace):
        reference = None

        def rng(self, name):
            return seeded()

    assert WORLD.measure(Oracle(1), Lab()) == pytest.approx(
        {"ndcg_1": 1, "ndcg_5": 1, "ndcg_10": 1}
    )
    assert WORLD.measure(Oracle(1), Lab(reference=Oracle(2)))["ndcg_1"] == 0
    untrained = WORLD.measure(
        Oracle(1), Lab(reference=Oracle(1))
    )  # the order of the list, which is random
    assert untrained["ndcg_1"] == pytest.approx(1.5 / 7, abs=0.06)
    model = WORLD.model()
    assert 0.1e6 < sum(p.numel() for p in model.parameters()) < 0.3e6
    assert 0 < WORLD.measure(model, Lab())["ndcg_10"] < 1
