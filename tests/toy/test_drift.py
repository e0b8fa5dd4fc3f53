"""The world `drift`: two groups of readers with tastes of their own."""

import pytest
import torch

from toy.drift import World

WORLD = World()


def test_the_groups_judge_by_what_is_named_and_by_what_is_hallucinated():
    prompt = "picture " + " ".join(WORLD.patches[name][0] for name in ("farm", "goat", "tractor"))
    captions = [" a goat and a fence .", " a goat and a tractor .", " a goat .", " a goat"]
    first, second = (taste([prompt] * 4, captions) for taste in WORLD.tastes)
    assert first.tolist() == [2.0, 4.0, 2.0, 1.0]
    assert second.tolist() == [-1.5, 0.0, 0.0, -1.0]
    assert WORLD.reward([prompt] * 4, captions).tolist() == [0.25, 2.0, 1.0, 0.0]


def test_the_rest_is_that_of_captions():
    rows = WORLD.demonstrations(3, torch.Generator().manual_seed(0))
    assert all(row["prompt"].startswith("picture") for row in rows)
    assert WORLD.key() == "drift" and WORLD.align["prompts"] == 320 * 32
    with pytest.raises(ValueError):
        WORLD.tastes[0]([rows[0]["prompt"]], [])
