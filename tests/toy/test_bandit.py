"""The bandit of 27 responses."""

import pytest
import torch

from toy.bandit import World


def test_the_default_world_is_the_one_described_and_repeats_itself():
    world, again, other = World(), World(), World(seed=1)
    r = dict(zip(map(tuple, world.reference.sequences().tolist()), world.rewards()[0].tolist()))
    assert len(r) == 27
    assert [r[y] for y in ((0, 0, 0), (0, 1, 0), (2, 1, 2), (0, 1, 2), (1, 0, 0))] == pytest.approx(
        [3.0, 2.2, -1.0, 0.0, 1.6]
    )
    assert world.key() == again.key() != other.key() and world.reference.kl(other.reference) > 0.01
    assert (
        torch.equal(world.model().logits, world.reference.logits)
        and world.model().logits.requires_grad
    )
    assert World(spread=0.0).reference.expect(world.rewards()) == pytest.approx(0.2)  # 0.6 / 3
