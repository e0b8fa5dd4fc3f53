"""The exact values of a table are compared with sums over one response at a time."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from data import UserError, collate
from methods import dpo
from toy import modular, tokens
from toy.bandit import World
from toy.exact import Table, population, prefixes


def random_table(vocab=3, length=3, prompts=2, seed=0):
    table = Table(vocab, length, prompts).double()
    with torch.no_grad():
        table.logits.normal_(generator=torch.Generator().manual_seed(seed))
    return table


def everything(table):
    """A batch with every response of every prompt."""
    sequences = table.sequences()
    target = sequences.expand(len(table.logits), *sequences.shape)
    return SimpleNamespace(label=torch.arange(len(table.logits)), target=target)


# ---- the table


def test_log_probs_are_the_product_along_the_prefixes():
    table = random_table()
    assert table.logits.shape == (2, 1 + 3 + 9, 3)
    assert table.sequences().tolist() == [list(y) for y in itertools.product(range(3), repeat=3)]
    nodes = [(), *itertools.product(range(3), repeat=1), *itertools.product(range(3), repeat=2)]
    for p in range(2):
        for r, y in enumerate(table.sequences().tolist()):
            steps = [
                table.logits[p, nodes.index(tuple(y[:t]))].log_softmax(-1)[y[t]] for t in range(3)
            ]
            torch.testing.assert_close(table.log_probs()[p, r], sum(steps))
    torch.testing.assert_close(table.probs().sum(1), torch.ones(2, dtype=torch.float64))


def test_scores_agree_with_the_enumeration_in_value_and_gradient():
    table = random_table()
    weight = torch.linspace(-1, 1, 54, dtype=torch.float64).view(2, 27)
    scored = table.logps(everything(table))
    assert scored.shape == (2, 27, 3)
    torch.testing.assert_close(scored.sum(-1), table.log_probs())
    (a,) = torch.autograd.grad((scored.sum(-1) * weight).sum(), table.parameters())
    (b,) = torch.autograd.grad((table.log_probs() * weight).sum(), table.parameters())
    torch.testing.assert_close(a, b)


def test_scores_are_zero_outside_the_mask():
    table = random_table(2, 2, 1)
    rows = [
        dict(prompt=0, responses=[[0, 1], [1, 1]], scores=[1.0, 0.0]),
        dict(prompt=0, responses=[[1, 0]], scores=[1.0]),
    ]
    logps = table.logps(collate(rows))
    assert logps.shape == (2, 2, 2) and (logps[1, 1] == 0).all() and (logps[0] < 0).all()


@pytest.mark.parametrize(("vocab", "length"), [(3, 3), (5, 1), (2, 4)])
def test_set_log_probs_is_the_inverse_of_log_probs(vocab, length):
    table = random_table(vocab, length)
    other = (
        Table(vocab, length, 2)
        .double()
        .set_log_probs(table.log_probs() + torch.tensor([[3.0], [-1.0]]))
    )  # not normalised
    torch.testing.assert_close(other.log_probs(), table.log_probs())
    assert table.kl(other) == pytest.approx(0, abs=1e-12)


def test_impossible_responses_stay_impossible():
    table = Table(2, 2).set_log_probs(torch.tensor([0.5, 0.5, 0.0, 0.0]).log())
    torch.testing.assert_close(
        table.probs(), torch.tensor([[0.5, 0.5, 0.0, 0.0]], dtype=torch.float64)
    )
    assert table.kl(Table(2, 2)) == pytest.approx(math.log(2)) and Table(2, 2).kl(table) == math.inf
    assert {
        tuple(y) for ys in table.sample([0] * 20, 5, torch.Generator().manual_seed(0)) for y in ys
    } == {(0, 0), (0, 1)}


def test_kl_and_expectation_by_hand():
    p, q = (
        Table(2, prompts=2).set_log_probs(torch.tensor(x).log())
        for x in ([[0.5, 0.5], [0.9, 0.1]], [[0.25, 0.75], [0.9, 0.1]])
    )
    assert p.kl(q) == pytest.approx((0.5 * math.log(2) + 0.5 * math.log(2 / 3)) / 2, abs=1e-6)
    assert p.expect(lambda y: y[:, 0]) == pytest.approx(0.3) == p.expect(torch.tensor([0.0, 1.0]))
    assert p.expect(torch.tensor([[0.0, 1.0], [2.0, 0.0]])) == pytest.approx((0.5 + 1.8) / 2)


def test_samples_follow_the_probabilities_and_the_generator():
    table = random_table()
    draws = table.sample([0, 1] * 200, 50, torch.Generator().manual_seed(1))
    assert len(draws) == 400 and len(draws[0]) == 50 and len(draws[0][0]) == 3
    assert draws == table.sample([0, 1] * 200, 50, torch.Generator().manual_seed(1))
    for p in range(2):
        index = torch.tensor(draws[p::2]).view(-1, 3) @ torch.tensor([9, 3, 1])
        share = torch.bincount(index, minlength=27) / len(index)
        assert (share - table.probs()[p]).abs().max() < 0.02


def test_prefixes_are_numbered_level_by_level():
    nodes = [(), *itertools.product(range(3), repeat=1), *itertools.product(range(3), repeat=2)]
    y = Table(3, 3).sequences()
    expected = [[nodes.index(tuple(row[:t])) for t in range(3)] for row in y.tolist()]
    assert prefixes(y, 3).tolist() == expected
    assert prefixes(y.view(3, 9, 3), 3).view(27, 3).tolist() == expected


def test_the_entropy_of_a_uniform_table_is_the_log_of_its_size():
    assert Table(3, 2, 2).entropy() == pytest.approx(math.log(9))
    sure = Table(2, 2).set_log_probs(torch.tensor([1.0, 0.0, 0.0, 0.0]).log())
    assert sure.entropy() == 0.0


@pytest.mark.parametrize("make", [tokens.SharedTable, lambda: modular.World().model()])
def test_tables_with_fewer_parameters_have_everything_that_a_table_has(make):
    table = make()
    assert isinstance(table, Table) and "logits" not in dict(table.named_parameters())
    p = table.probs()
    torch.testing.assert_close(p.sum(1), torch.ones(len(p)).double(), rtol=0, atol=1e-5)
    scored = table.logps(everything(table)).sum(-1).double()
    torch.testing.assert_close(scored, table.log_probs(), rtol=0, atol=1e-5)
    drawn = table.sample([0, 0], 2, torch.Generator().manual_seed(0))
    assert drawn == table.sample([0, 0], 2, torch.Generator().manual_seed(0))
    best = table.optimum(torch.zeros(p.shape[1]), 1.0)
    assert type(best) is Table and best.kl(table) == pytest.approx(0.0, abs=1e-6)


# ---- the world


def test_rewards_are_looked_up_by_prompt_and_response():
    world = World(vocab=2, length=2, prompts=2, rewards=torch.arange(8.0).view(2, 4))
    assert world.reward([0, 1, 1], [[0, 1], [0, 0], [1, 1]]).tolist() == [1.0, 4.0, 7.0]
    rng = torch.Generator().manual_seed(0)
    assert set(world.prompts(50, rng)) == {0, 1}
    rows = world.demonstrations(3, rng)
    assert all(
        len(row["responses"]) == 1 and row["scores"] == [1.0] and len(row["responses"][0]) == 2
        for row in rows
    )


def test_demonstrations_come_from_the_data_and_the_reference_may_be_given():
    world = World(
        vocab=4,
        length=1,
        reference=torch.zeros(4),
        data=torch.tensor([0.0, 0.0, 1.0, 0.0]).log(),
        rewards=lambda y: y[:, 0].double(),
    )
    assert {
        row["responses"][0][0] for row in world.demonstrations(20, torch.Generator().manual_seed(0))
    } == {2}
    assert world.reference.probs().tolist() == [[0.25] * 4] and world.rewards().tolist() == [
        [0.0, 1.0, 2.0, 3.0]
    ]


@pytest.mark.parametrize("beta", [0.2, 0.5, 1.0, 2.0])
def test_the_optimum_has_the_highest_objective_and_its_value_is_beta_log_z(beta):
    world = World(prompts=2)
    best, log_z = (
        world.optimum(world.reference, beta),
        torch.logsumexp(world.reference.log_probs() + world.rewards() / beta, 1),
    )
    assert world.objective(best, beta) == pytest.approx(beta * log_z.mean().item(), abs=1e-5)
    for seed in range(5):
        other = random_table(seed=seed)
        gap = world.objective(best, beta) - world.objective(other, beta)
        assert gap == pytest.approx(
            beta * other.kl(best), abs=1e-4
        )  # the gap is a KL, so never negative


@pytest.mark.parametrize("sampled", [False, True])
def test_all_pairs_carry_the_probability_of_meeting_them(sampled):
    world = World(vocab=2, length=2, prompts=2)
    sampler = world.reference if sampled else None
    pairs = world.pairs_all(sampler, flip=0.3)
    assert len(pairs) == 2 * 4 * 3 and sum(row["weight"] for row in pairs) == pytest.approx(24)
    q = world.reference.probs().tolist() if sampled else [[0.25] * 4] * 2

    def chance(row):
        (a, b), p, (ra, rb) = row["responses"], row["prompt"], row["reward"]
        assert [ra, rb] == world.reward([p, p], [a, b]).tolist()
        clean = 1 / (1 + math.exp(rb - ra))
        return q[p][2 * a[0] + a[1]] * q[p][2 * b[0] + b[1]] * (0.7 * clean + 0.3 * (1 - clean))

    total = sum(map(chance, pairs))
    assert [row["weight"] for row in pairs] == pytest.approx(
        [24 * chance(row) / total for row in pairs]
    )


def test_a_mixture_reference_for_negatives_from_the_model_itself():
    """Sequences that count up or down (mod 4) with 2 % noise, diluted with uniform ones."""

    def chain(y, step):
        return torch.where((y[:, 1:] - y[:, :-1] - step) % 4 == 0, 0.98, 0.02 / 3).prod(1) / 4

    y = Table(4, 6).sequences()
    data = 0.6 * chain(y, 1) + 0.4 * chain(y, -1)
    valid = torch.stack([((y[:, 1:] - y[:, :-1] - step) % 4 == 0).all(1) for step in (1, -1)]).any(
        0
    )
    world = World(4, 6, rewards=valid, data=data.log(), reference=(0.7 * data + 0.3 / 4096).log())
    assert valid.sum() == 8 and world.data.expect(world.rewards()) == pytest.approx(
        0.9039, abs=1e-4
    )
    assert world.reference.expect(world.rewards()) == pytest.approx(0.6333, abs=1e-4)


def test_the_frontier_is_the_reward_of_the_optimum_that_has_this_kl():
    world = World(prompts=2)
    best = world.optimum(world.reference, 0.7)
    kl = best.kl(world.reference)
    assert world.frontier(kl) == pytest.approx(best.expect(world.rewards()), abs=1e-6)
    assert world.frontier(0.5 * kl) < world.frontier(kl) < world.frontier(2 * kl)


def test_a_reference_may_be_a_table_and_the_model_is_a_copy_of_it():
    reference = random_table(2, 2, 1)
    world = World(2, 2, reference=reference)
    model = world.model()
    assert torch.equal(model.logits, reference.logits) and model.logits.requires_grad
    with torch.no_grad():
        model.logits.zero_()
    assert world.reference.logits.abs().sum() > 0 and not world.reference.logits.requires_grad
    assert world.data is world.reference and world.key()[0] == "bandit"


@pytest.mark.parametrize("flip", [-0.1, 1.1, math.nan])
def test_a_flip_that_is_not_a_share_is_refused(flip):
    with pytest.raises(UserError, match="flip"):
        World().pairs_all(flip=flip)


# ---- the optimum of an expected loss


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_population_optimum_of_dpo_is_the_closed_form(beta):
    world = World()
    fitted = population(world, world.pairs_all(world.reference), dpo.loss, dpo.Config(beta))
    best = world.optimum(world.reference, beta)
    assert (fitted.probs() - best.probs()).abs().max() < 1e-4
    assert world.objective(fitted, beta) == pytest.approx(world.objective(best, beta), abs=1e-5)


def test_the_weights_of_the_pairs_count():
    world = World(vocab=2, length=1, spread=0.0, rewards=[0.0, 0.0])
    rows = [row | {"weight": w} for row, w in zip(world.pairs_all(), (1.5, 0.5))]
    fitted = population(world, rows, dpo.loss, dpo.Config(1.0))
    assert fitted.probs()[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-6)


def test_flipped_labels_shrink_dpo_and_their_correction_undoes_it():
    """Six responses, a uniform reference, 10 % of the labels flipped (the setting of rDPO)."""
    r, epsilon = torch.tensor([1.5, 1.0, 0.3, -0.2, -0.9, -1.7], dtype=torch.float64), 0.1
    world = World(vocab=6, length=1, spread=0.0, rewards=r)
    best, pairs = world.optimum(world.reference, 0.5), world.pairs_all(flip=epsilon)

    def corrected(logps, ref_logps, batch, epsilon):
        chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)
        z = 0.5 * (chosen - rejected)
        return -logsigmoid(z) - epsilon / (1 - 2 * epsilon) * z, {}

    plain, robust = (population(world, pairs, corrected, e) for e in (0.0, epsilon))
    assert best.expect(r) == pytest.approx(1.2506, abs=1e-4)
    assert plain.expect(r) == pytest.approx(1.0860, abs=1e-4)
    assert best.kl(plain) == pytest.approx(0.0450, abs=1e-4)
    assert robust.expect(r) == pytest.approx(1.2506, abs=1e-4) and best.kl(robust) < 1e-6
