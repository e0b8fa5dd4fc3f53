"""What is computed exactly in a table."""

import pytest

from methods import dpo
from toy.bandit import World
from toy.exact import population


@pytest.mark.parametrize("beta", [0.2, 1.0])
def test_the_population_optimum_of_dpo_is_the_closed_form(beta):
    world = World()
    fitted = population(world, world.pairs_all(world.reference), dpo.loss, dpo.Config(beta))
    assert (fitted.probs() - world.optimum(world.reference, beta).probs()).abs().max() < 1e-4


def test_the_weights_of_the_pairs_count():
    world = World(vocab=2, length=1, spread=0.0, rewards=[0.0, 0.0])
    rows = [row | {"weight": w} for row, w in zip(world.pairs_all(), (1.5, 0.5))]
    fitted = population(world, rows, dpo.loss, dpo.Config(1.0))
    assert fitted.probs()[0].tolist() == pytest.approx([0.75, 0.25], abs=1e-6)
