"""Worlds of vectors: what every one offers, and the truth that each docstring states."""

import importlib
import math

import pytest
import torch

from lab.settings import worlds
from toy import arc


def made(name):
    return importlib.import_module(f"toy.{name}").World()


VECTORS = [name for name in worlds() if made(name).kind == "vectors"]


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("name", VECTORS)
def test_points_are_features_and_classes_and_depend_on_the_generator_alone(name):
    world = made(name)
    x, y = world.points(200, rng())
    assert x.shape == (200, world.features) and x.dtype == torch.float64
    assert y.shape == (200,) and y.dtype == torch.int64
    assert 0 <= y.min() and y.max() < world.classes
    again, same = made(name).points(200, rng())
    assert torch.equal(x, again) and torch.equal(y, same)
    assert not torch.equal(x, world.points(200, rng(1))[0])


@pytest.mark.parametrize("name", VECTORS)
def test_shares_are_the_proportions_of_the_classes(name):
    world = made(name)
    shares = torch.arange(1.0, world.classes + 1)
    _, y = world.points(4000, rng(), shares / shares.sum())
    found = torch.bincount(y, minlength=world.classes) / 4000
    torch.testing.assert_close(found, shares / shares.sum(), atol=0.03, rtol=0)
    one = torch.eye(world.classes)[1]
    assert (world.points(50, rng(), one)[1] == 1).all()


@pytest.mark.parametrize("name", VECTORS)
def test_held_out_points_are_none_of_the_others(name):
    world = made(name)
    seen = {tuple(x) for x in world.points(2000, rng())[0].tolist()}
    assert not seen & {tuple(x) for x in world.points(2000, rng(1), held_out=True)[0].tolist()}


@pytest.mark.parametrize("name", [name for name in VECTORS if made(name).bayes])
def test_the_class_probabilities_are_calibrated(name):
    """Where the truth gives a class the probability p, a share p of the points is of it."""
    world = made(name)
    x, y = world.points(20000, rng())
    probs = world.bayes(x)
    torch.testing.assert_close(probs.sum(1), torch.ones(20000, dtype=torch.float64))
    for c in range(world.classes):
        for low in (0.0, 0.2, 0.6):
            some = (probs[:, c] >= low) & (probs[:, c] < low + 0.4)
            if some.sum() > 200:
                error = 4 * (0.25 / some.sum()).sqrt()
                assert abs((y[some] == c).double().mean() - probs[some, c].mean()) < error


# ---- the arc


def test_the_arc_is_the_positive_quarter_of_the_unit_circle_and_has_the_stated_accuracies():
    world = made("arc")
    x, y = world.points(20000, rng())
    assert (x >= 0).all()
    torch.testing.assert_close(x.norm(dim=1), torch.ones(20000, dtype=torch.float64))
    best = world.bayes(x).argmax(1)
    assert (best == y).double().mean().item() == pytest.approx(0.85, abs=0.01)
    assert (y == 0).double().mean().item() == pytest.approx(0.617, abs=0.01)


def test_the_example_of_the_arc():
    angle = math.radians(7.5)
    x = torch.tensor([[math.cos(angle), math.sin(angle)]], dtype=torch.float64)
    assert [round(v, 3) for v in x[0].tolist()] == [0.991, 0.131]
    assert made("arc").bayes(x)[0].tolist() == pytest.approx([0.15, 0.85])
    assert arc.World(high=0.7).key() != arc.World().key()


# ---- the other worlds


def test_the_example_of_blobs_and_that_neighbors_are_of_other_classes():
    world = made("blobs")
    x = torch.tensor([[4.0, 0.0]], dtype=torch.float64)
    assert round(world.bayes(x)[0, 0].item(), 3) == 0.999
    near = torch.cdist(world.centers, world.centers).sort(1)[1][:, 1:3]
    own = torch.arange(6) % 3
    assert (own[near] != own[:, None]).all()


def test_the_example_of_warped_is_a_point_of_it():
    world = made("warped")
    x, y = world.points(3, rng())
    assert [round(v, 2) for v in x[0, :2].tolist()] == [-1.29, -0.37] and y[0] == 5
    assert round(world.bayes(x)[0, 5].item(), 3) == 0.997


def test_the_example_of_pixels_is_a_zero_and_mates_are_pairs_of_digits():
    world = made("pixels")
    first = (world.x[:, 2] - 5 / 16).abs() < 1e-9
    assert (world.y[first & (world.x[:, :2] == 0).all(1)] == 0).any()
    assert len(world.x) == 1797 and 0 <= world.x.min() and world.x.max() == 1
    mates = made("mates")
    counts = torch.bincount(world.y)
    assert torch.bincount(mates.y).tolist() == (counts[:3] + counts[3:6]).tolist()
    assert made("pixels").key() == world.key()
