"""subspace: its dimensions, reward and distances, and a network whose output begins at 0."""

import pytest
import torch

from toy.subspace import World


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def test_the_data_lie_in_the_subspace_with_unit_variance():
    world = World(16, 3)
    x = world.points(4000, rng()).double()
    z = x @ world.basis
    assert x.shape == (4000, 16) and torch.linalg.matrix_rank(x, tol=1e-3) == 3
    assert ((z.square().mean(0) - 1).abs() < 0.05).all() and (z.mean(0).abs() < 0.06).all()
    found = world.distances(x)
    assert found["off_subspace"] < 1e-6 and found["latent"] == pytest.approx(0.2, abs=0.01)


def test_the_reward_is_minus_the_distance_from_the_nearest_mode():
    world = World()
    mode = world.basis @ torch.tensor([0.98, -0.98], dtype=torch.float64)
    side = torch.linalg.qr(torch.cat([world.basis, torch.eye(64).double()[:, :1]], 1))[0][:, 2]
    points = torch.stack([mode, mode + 0.3 * side, mode * 1.5, 0 * mode])
    rewards = world.reward([0] * 4, points).tolist()
    far = 0.98 * 2**0.5
    assert rewards == pytest.approx([0, -0.3, -far / 2, -far], abs=1e-6)
    assert world.reward([0], torch.full((1, 64), torch.nan)).item() == pytest.approx(-far)
    assert world.distances(points[1:2])["off_subspace"] == pytest.approx(0.3)


def test_dimensions_that_do_not_fit_are_refused_and_tell_worlds_apart():
    for wrong in ((2, 3), (4, 0)):
        with pytest.raises(ValueError, match="expected 1 <= d <= D"):
            World(*wrong)
    assert World(4, 2).key() != World(4, 1).key()


def test_the_network_begins_with_the_output_0():
    model = World(8, 2).model()
    x, level = torch.randn(5, 8, generator=rng()), torch.linspace(-1.2, 1.2, 5)
    assert model(x, level, torch.zeros(5)).abs().max() == 0
