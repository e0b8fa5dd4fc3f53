"""The world of sums modulo 7: its chains, its lists and its policy."""

import pytest
import torch

from toy import modular


def test_chains_are_graded_step_by_step_and_the_policy_shares_its_tables():
    world, rng = modular.World(), torch.Generator().manual_seed(3)
    assert (world.right[:, 2] == world.problems.sum(1) % 7).all()
    assert world.reward([5], [world.right[5].tolist()]).item() == 1.0
    policy = world.model()
    torch.testing.assert_close(
        policy.log_probs().exp().sum(1), torch.ones(300, dtype=torch.float64), rtol=0, atol=1e-5
    )
    a, b, c, d = world.problems[4].tolist()
    steps = policy.steps.log_softmax(-1)
    expected = steps[0, a, b, 2] + steps[1, 2, c, 6] + steps[2, 6, d, 1]
    assert policy.log_probs()[4, 2 * 49 + 6 * 7 + 1].item() == pytest.approx(
        expected.item(), abs=1e-5
    )
    rows = world.lists(50, rng)
    for row in rows:
        right = world.right[row["prompt"]].tolist()
        assert (
            row["responses"][0] == right and row["scores"][0] == 1.0 and len(row["responses"]) == 5
        )
        assert all(chain[0] == right[0] for chain in row["responses"][:4])
        for chain, v in zip(row["responses"], row["scores"]):
            first = [*(x == y for x, y in zip(chain, right)), False].index(False)
            assert v == pytest.approx(1.0 if chain[2] == right[2] else 0.3 * first)
    with pytest.raises(ValueError, match="k = 1"):
        world.lists(1, rng, 1)


def test_demonstrations_come_from_the_reference():
    world = modular.World()
    rows = world.demonstrations(4000, torch.Generator().manual_seed(0))
    value = world.reward([r["prompt"] for r in rows], [r["responses"][0] for r in rows]).mean()
    assert value.item() == pytest.approx(world.reference.expect(world.truth), abs=0.03)


def test_about_three_of_five_steps_of_the_reference_are_right():
    world = modular.World()
    y, p = world.reference.sequences(), world.reference.probs()
    first = (p * (y[:, 0] == world.right[:, :1])).sum(1).mean().item()
    assert first == pytest.approx(0.6, abs=0.05)
