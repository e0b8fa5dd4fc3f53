"""The world `trie`: two of four symbols are fatal after every prefix."""

import pytest
import torch

from toy.trie import World


def test_one_response_in_sixteen_is_right_and_a_fatal_symbol_decides():
    world = World()
    assert world.truth.shape == (20, 256) and world.truth.mean() == pytest.approx(1 / 16)
    assert (world.truth.sum(1) == 16).all() and (world.fatal.sum(-1) == 2).all()
    for symbol in range(4):
        right = world.truth[3].view(4, 64)[symbol].any()
        assert right == ~world.fatal[3, 0, symbol]
    assert World(1).key() != world.key() == World().key()


def test_the_judge_sees_a_fatal_symbol_through_noise():
    world, rng = World(), torch.Generator().manual_seed(0)
    good, bad = (int((world.fatal[3, 0] == fatal).nonzero()[0]) for fatal in (False, True))
    drawn = [
        world.judge([3, 3, 3], [[good], [bad], [bad]], [False, False, True], rng)
        for _ in range(500)
    ]
    assert torch.stack(drawn).mean(0).tolist() == pytest.approx([0.67, 0.33, -0.67], abs=0.05)
