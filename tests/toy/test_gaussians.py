"""The gaussians world: an exact density and what follows from it."""

import math
from types import SimpleNamespace

import pytest
import torch

from toy.gaussians import MLP, World


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("dim", [2, 5])
def test_density_is_that_of_the_mixture(dim):
    world = World(dim)
    x = 1.5 * torch.randn(50, dim, generator=rng(), dtype=torch.float64)
    parts = torch.distributions.MultivariateNormal(
        world.modes, 0.01 * torch.eye(dim, dtype=torch.float64)
    )
    mixture = torch.distributions.MixtureSameFamily(
        torch.distributions.Categorical(torch.ones(8, dtype=torch.float64)), parts
    )
    torch.testing.assert_close(world.log_density(x), mixture.log_prob(x), rtol=1e-9, atol=1e-6)


def test_density_integrates_to_one():
    axis = torch.linspace(-2, 2, 401, dtype=torch.float64)
    grid = torch.cartesian_prod(axis, axis)
    assert abs(World().log_density(grid).exp().sum().item() * 0.01**2 - 1) < 1e-6


@pytest.mark.parametrize("dim", [2, 16, 64])
def test_draws_lie_on_the_ring(dim):
    world = World(dim)
    x = world.points(20000, rng())
    assert x.shape == (20000, dim) and x.dtype == torch.float32
    assert 0.005 < world.off_manifold(x) < 0.015 and world.mode_entropy(x) > 0.99
    torch.testing.assert_close(world.modes.norm(dim=1), torch.ones(8, dtype=torch.float64))
    torch.testing.assert_close(world.plane.T @ world.plane, torch.eye(2, dtype=torch.float64))
    inside = x.double() @ world.plane @ world.plane.T
    assert abs((x - inside).square().sum(1).mean() - 0.01 * (dim - 2)) < 0.02 * dim * 0.01
    assert abs(world.reward([0] * len(x), x).mean()) < 0.03


def test_measure_counts_points_off_the_ring_and_modes():
    world = World(std=0.05)
    ring, one = world.modes, world.modes[:1].expand(100, -1)
    assert (
        world.off_manifold(ring + 0.149 / math.sqrt(2)) == 0 and world.off_manifold(1.2 * ring) == 1
    )
    assert abs(world.mode_entropy(ring) - 1) < 1e-12 and world.mode_entropy(one) == 0
    lost = torch.tensor([[torch.nan, 0.0], [torch.inf, 0.0]])
    assert world.off_manifold(lost) == 1 and world.off_manifold(torch.cat([ring[:2], lost])) == 0.5
    assert (
        abs(world.mode_entropy(torch.cat([ring[:1], ring[4:5]])) - math.log(2) / math.log(8))
        < 1e-12
    )
    reward = world.reward([0, 0], torch.tensor([[0.3, 2.0], [float("nan"), 0.0]]))
    assert reward.dtype == torch.float64 and abs(reward[0] - 0.3) < 1e-6 and reward[1] == 0
    policy = SimpleNamespace(sample=lambda prompts, k, rng, steps: world.points(k, rng)[None])
    values = world.measure(policy, SimpleNamespace(rng=lambda name: rng()))
    assert set(values) == {"off_manifold", "mode_entropy"} and values["off_manifold"] < 0.03


def test_the_picture_of_a_run_has_the_points_of_both_models():
    world, far = World(5), torch.tensor([[torch.nan] * 5, [torch.inf] * 5, [-1e9] * 5])
    before = world.points(16, rng()).view(2, 8, 5)
    after = torch.cat([before.flatten(0, 1)[:13], far]).view(2, 8, 5)
    left, right = world.picture(before, after).axes
    drawn = torch.from_numpy(left.collections[0].get_offsets().data)
    torch.testing.assert_close(drawn, before.flatten(0, 1).double() @ world.plane)
    others = torch.from_numpy(right.collections[0].get_offsets().data)
    assert torch.equal(others[:13], drawn[:13]) and others.abs().max() == 2
    mean = world.reward([0] * 16, before.flatten(0, 1)).mean()
    assert left.get_title() == f"before (mean reward {mean:.2f}, 0% off the ring)"
    assert "19% off the ring" in right.get_title() and len(left.patches) == 8


def test_contaminated_points():
    world = World(std=0.05)
    x = world.contaminated(20000, rng())
    # 30 % are strays, nearly all of them off the manifold: the modes cover 8 pi (3 std)^2 of the
    # square's area of 9
    assert (
        abs(world.off_manifold(x) - (0.7 * 0.0111 + 0.3 * (1 - 8 * math.pi * 0.15**2 / 9))) < 0.01
    )
    assert x.abs().max() <= 1.5
    rows = World(clean=0.0).demonstrations(500, rng())
    assert (
        rows[0]["responses"].shape == (1, 2)
        and rows[0]["prompt"] == 0
        and rows[0]["scores"] == [1.0]
    )
    assert World().off_manifold(torch.cat([row["responses"] for row in rows])) > 0.5


def test_model_learns_to_score_and_sample():
    world = World()
    torch.manual_seed(0)
    model = world.model()
    assert isinstance(model, MLP) and model.sample(
        world.prompts(3, rng()), 4, rng(), steps=2
    ).shape == (3, 4, 2)
    batch = SimpleNamespace(
        images=world.points(256, rng())[:, None],
        label=torch.zeros(256).long(),
        mask=torch.ones(256, 1, 1).bool(),
    )
    optimizer, draws, first = torch.optim.Adam(model.parameters(), lr=3e-3), rng(1), None
    for _ in range(100):
        loss = -model.logps(model.prepare(batch, draws)).mean()
        first = loss.item() if first is None else first
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.7 * first
    assert World(3, prediction="edm", sd=0.7).model().sample([0], 2, rng(), steps=2).shape == (
        1,
        2,
        3,
    )
    assert World().key() == World().key() != World(std=0.2).key()


@pytest.mark.parametrize("wrong", [dict(dim=1), dict(modes=0), dict(std=0.0), dict(clean=1.5)])
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        World(**wrong)
