"""The cyclic game: payoffs, the Nash equilibrium, and what no reward explains."""

import pytest
import torch

from data import UserError
from toy.game import CYCLE, World

NASH = torch.tensor([[2 / 9, 1 / 3, 4 / 9]], dtype=torch.float64)


def test_the_nash_equilibrium_is_not_exploitable_and_other_policies_are():
    world = World()
    assert world.exploitability(NASH) == pytest.approx(0, abs=1e-12)
    assert world.rates(NASH)[0].tolist() == pytest.approx([0.5] * 3)
    start = world.model()
    assert world.measure(start, None)["exploitability"] == pytest.approx(1 / 30)
    for i, value in enumerate((0.3, 0.4, 0.2)):
        assert world.exploitability(torch.eye(3, dtype=torch.float64)[i : i + 1]) == pytest.approx(
            value
        )
    some = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
    assert world.rates(some)[0].tolist() == pytest.approx([0.56, 0.34, 0.59])
    assert (some * world.rates(some)).sum().item() == pytest.approx(0.5)


def test_preferences_are_the_payoffs_and_the_reward_is_the_win_rate_over_the_reference():
    world = World()
    assert world.prefers([0, 0], [[0], [2]], [[1], [1]]).tolist() == [0.9, 0.3]
    assert world.rewards()[0].tolist() == pytest.approx([8 / 15, 13 / 30, 8 / 15])
    assert world.reward([0], [[1]]).item() == pytest.approx(13 / 30)
    rows = world.pairs_all()
    weight = {tuple(r[0] for r in row["responses"]): row["weight"] for row in rows}
    for i in range(3):
        for j in set(range(3)) - {i}:
            assert weight[i, j] / (weight[i, j] + weight[j, i]) == pytest.approx(CYCLE[i][j])


def test_games_are_kept_apart_and_what_is_no_game_is_refused():
    other = World([[0.5, 0.7], [0.3, 0.5]], reference=torch.tensor([0.0, 1.0]))
    two = World(torch.tensor([CYCLE, CYCLE]))
    assert len({str(world.key()) for world in (World(), other, two)}) == 3
    assert World().key() == World().key()
    assert two.prompts(9, torch.Generator()) != [0] * 9
    for payoff in ([[0.5, 0.9], [0.2, 0.5]], [[0.6, 0.5], [0.5, 0.5]], [[0.5, 1.2], [-0.2, 0.5]]):
        with pytest.raises(UserError, match="payoff"):
            World(payoff)
