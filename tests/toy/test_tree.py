"""The world of answers of one to five tokens: exactness, labels, the frontier."""

import pytest
import torch

from data import collate
from toy.tree import END, Tree, World, random_tree


@pytest.fixture(scope="module")
def world():
    return World()


def test_there_are_1364_answers_and_they_share_the_whole_probability(world):
    p = world.reference.probs()[0]
    assert (p > 0).sum() == 1364 and p.sum().item() == pytest.approx(1.0, abs=1e-12)
    ends = world.answers == END
    assert torch.equal(
        p > 0, ~ends[:, 0] & (ends[:, 1:] | ~ends[:, :-1]).all(1)
    )  # the first token is not an end, and only ends follow an end
    # tokens are drawn with the random logits of each prefix
    logits = torch.zeros(1, 781, 5).normal_(0.0, 0.7, generator=torch.Generator().manual_seed(0))[0]
    after = logits[1].log_softmax(-1)  # the prefix "0"
    assert p[
        (world.answers == torch.tensor([0, END, END, END, END])).all(1)
    ].item() == pytest.approx(
        (logits[0, :4].log_softmax(-1)[0] + after[END]).exp().item(), rel=1e-5
    )


def test_the_truth_is_standardised_and_counts_what_it_says(world):
    assert world.reference.expect(world.truth) == pytest.approx(0.0, abs=1e-9)
    assert world.reference.expect(world.truth.square()) == pytest.approx(1.0, abs=1e-9)
    raw = world.quality()

    def of(*tokens):
        tokens = list(tokens) + [END] * (5 - len(tokens))
        return raw[(world.answers == torch.tensor(tokens)).all(1)].item()

    assert (
        of(0) == 2
        and of(3) == -2
        and of(1, 0) == 2
        and of(2, 1, 0, 3) == 1
        and of(0, 1) == 1
        and of(1, 1, 2, 2, 3) == pytest.approx(-0.4)
    )


def test_scores_are_the_log_probs_of_the_table_and_masked_tokens_cost_nothing(world):
    model, answers = world.model(), world.reference.probs()[0].nonzero()[:, 0]
    scores = model.scores(world.index[answers])
    torch.testing.assert_close(
        scores.sum(-1).double(), model.log_probs()[0, answers], rtol=0, atol=1e-5
    )
    assert (scores[~world.mask[answers]] == 0).all()
    (gradient,) = torch.autograd.grad(scores.square().sum(), model.logits)
    assert gradient.isfinite().all() and isinstance(model, Tree)


def test_lengths_count_the_end_where_there_is_one(world):
    def scored(*tokens):
        return (
            world.mask[
                (world.answers == torch.tensor(list(tokens) + [END] * (5 - len(tokens)))).all(1)
            ]
            .sum()
            .item()
        )

    assert [scored(0), scored(0, 0), scored(0, 0, 0, 0), scored(0, 0, 0, 0, 0)] == [2, 3, 5, 5]


def test_rows_hold_answers_up_to_their_end_and_padding_is_neither_scored_nor_counted(world):
    rows = world.demonstrations(200, torch.Generator().manual_seed(0))
    answers = [row["responses"][0] for row in rows]
    assert {len(y) for y in answers} == {2, 3, 4, 5} and all(END not in y[:-1] for y in answers)
    full = torch.tensor([y + [END] * (5 - len(y)) for y in answers])
    number = (full * 5 ** torch.arange(4, -1, -1)).sum(1)
    torch.testing.assert_close(world.reward([0] * 200, answers), world.truth[0, number])
    batch, model = collate(rows), world.model()
    assert (
        torch.equal(batch.mask[:, 0], world.mask[number])
        and (batch.target[:, 0][~batch.mask[:, 0]] == 0).all()
    )
    ours, theirs = model.logps(batch)[:, 0], model.scores(world.index[number])
    torch.testing.assert_close(ours, theirs * world.mask[number])
    gradients = [
        torch.autograd.grad((x.sum(1) / batch.mask.sum((1, 2))).sum(), model.logits)[0]
        for x in (ours, theirs)
    ]
    assert gradients[0].isfinite().all()
    torch.testing.assert_close(*gradients)


def test_exact_and_frontier_agree_with_enumeration(world):
    optimum = world.optimum(world.reference, 1.0)
    kl = optimum.kl(world.reference)
    assert world.frontier(kl) == pytest.approx(world.exact(optimum)["reward"], abs=1e-4)
    start = world.exact(world.model())
    assert start["kl"] == pytest.approx(0.0, abs=1e-6) and start["reward"] == pytest.approx(
        0.0, abs=1e-5
    )
    p = world.reference.probs()[0]
    assert start["entropy"] == pytest.approx(-(p[p > 0] * p[p > 0].log()).sum().item(), abs=1e-4)


def test_labels_follow_truth_length_and_flips(world):
    rng = torch.Generator().manual_seed(0)
    first, second = (world.draw(world.reference, 4000, rng) for _ in range(2))
    r, n = world.truth[0], world.mask.sum(1)

    def share(values, **how):
        pairs = world.labelled(first, second, torch.Generator().manual_seed(1), **how)
        told = values[pairs[:, 0]] != values[pairs[:, 1]]
        return (values[pairs[:, 0]] > values[pairs[:, 1]])[told].double().mean().item()

    assert share(r, sharpness=float("inf")) == 1.0
    assert share(r, sharpness=float("inf"), flip=0.3) == pytest.approx(0.7, abs=0.03)
    gap = r[first] - r[second]
    expected = torch.sigmoid(2 * gap.abs())[gap != 0].mean().item()
    assert share(r) == pytest.approx(expected, abs=0.03)
    assert share(n, length_bias=8.0) > 0.95 > share(n) + 0.2


def test_a_batch_has_masks_scores_and_columns(world):
    batch = world.batch(torch.tensor([[5, 9], [800, 3]]), weight=torch.ones(2))
    assert (
        batch.mask.shape == (2, 2, 5)
        and batch.scores.tolist() == [[1, 0], [1, 0]]
        and batch.weight.sum() == 2
    )


def test_seeds_draw_different_references(world):
    assert not torch.equal(random_tree(1).logits, random_tree(2).logits)
    assert world.key() != World(1).key()


def test_the_lab_runs_it(tmp_path):
    import lab
    from methods import dpo

    here = lab.Lab(
        lab.Settings(world="tree", steps=5, prompts=64, batch_size=16), str(tmp_path), quiet=True
    )
    policy = dpo.run(here, dpo.Config())
    found = here.evaluate(policy)
    assert found["kl"] > 0 and torch.isfinite(torch.tensor(found["reward"]))
