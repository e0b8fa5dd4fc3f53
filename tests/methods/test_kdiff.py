"""k-Diff: the line of targets, the velocity and its gradient in k, the optimum, and training."""

import math

import pytest
import torch

from data import collate
from diffusion import alpha_bar, spread, to_flow, to_sigma
from lab import Lab, Settings
from lab.flags import combinations, read_flags
from methods.dct_adamw import DCTAdamW
from methods.kdiff import (
    Config,
    KDiff,
    evaluate,
    flow_loss,
    flow_steps,
    optimal_k,
    run,
    target_energy,
    train,
    velocity,
)
from toy.subspace import World


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def images(n, seed=1, shape=(3,)):
    """Random images, noise and times (n, 1)."""
    x, noise = torch.randn(2, n, *shape, generator=rng(seed), dtype=torch.float64)
    return x, noise, torch.rand(n, 1, generator=rng(2), dtype=torch.float64)


def small(**settings):
    how = dict(world="subspace", base_steps=2, steps=6, batch_size=16, eval_size=8)
    return Lab(Settings(**how | settings), quiet=True)


# ---- the algebra of the targets


@pytest.mark.paper
@pytest.mark.parametrize(
    ("t", "k", "x_t", "u", "den"),
    [
        (0.3, 0.25, -0.1, 1.25, 0.4),
        (0.3, 0.8, -0.1, 1.8, 0.62),
        (0.9, 1.0, 1.7, 2.0, 0.1),
        (0.1, 0.0, -0.7, 1.0, 0.1),
        (0.5, 0.5, 0.5, 1.5, 0.5),
    ],
)
def test_every_target_of_the_check_point_implies_its_velocity(t, k, x_t, u, den):
    x, n = 2.0, -1.0
    assert t * x + (1 - t) * n == pytest.approx(x_t)
    assert k * x - (1 - k) * n == pytest.approx(u)
    assert k * (1 - t) + (1 - k) * t == pytest.approx(den)
    v = velocity(*double(u, x_t, t, k)).item()
    assert v == pytest.approx(3.0)
    assert x_t + (1 - t) * v == pytest.approx(x) and x_t - t * v == pytest.approx(n)
    assert velocity(*double(u, x_t, t, k)).item() == pytest.approx((u + (1 - 2 * k) * x_t) / den)


def test_the_three_ends_of_the_line():
    u, x_t, t = images(50)
    torch.testing.assert_close(velocity(u, x_t, t, 0.5), 2 * u)
    torch.testing.assert_close(velocity(u, x_t, t, 1.0), (u - x_t) / (1 - t))
    torch.testing.assert_close(velocity(u, x_t, t, 0.0), (u + x_t) / t)


@pytest.mark.paper
def test_the_velocity_s_derivative_in_k():
    t, k, x, n, u = double(0.3, 0.6, 2.0, -1.0, 0.4)
    k.requires_grad_()
    v = velocity(u, t * x + (1 - t) * n, t, k)
    (slope,) = torch.autograd.grad(v, k)
    assert slope.item() == pytest.approx(-0.205761, abs=1e-6)
    x_t, den = t * x + (1 - t) * n, k * (1 - t) + (1 - k) * t
    assert slope.item() == pytest.approx((-(2 * x_t + (1 - 2 * t) * v) / den).item())


@pytest.mark.paper
def test_errors_of_velocity_and_target_differ_by_the_denominator():
    x, n, t = images(40)
    u = torch.randn(40, 3, generator=rng(3), dtype=torch.float64)
    for k in (0.05, 0.5, 0.9):
        den = (k * (1 - t) + (1 - k) * t)[:, 0]
        ours, theirs = (flow_loss(u, x, n, t, k, space) for space in ("velocity", "target"))
        torch.testing.assert_close(ours, theirs / den**2, rtol=1e-9, atol=1e-12)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("D", "d", "k", "energy"),
    [
        (2, 2, 0.5, 1.0),
        (16, 2, 0.888889, 1.777778),
        (64, 2, 0.969697, 1.939394),
        (768, 64, 0.923077, 59.076923),
    ],
)
def test_the_energy_of_the_target_is_smallest_at_k_star(D, d, k, energy):
    assert optimal_k(D, d) == pytest.approx(k, abs=1e-6)
    assert target_energy(optimal_k(D, d), D, d) == pytest.approx(energy, abs=1e-6)
    assert energy == pytest.approx(d * D / (D + d), abs=1e-6)
    for variance in (1.0, 0.3):
        best = optimal_k(D, d, variance)
        least = target_energy(best, D, d, variance)
        assert all(target_energy(best + e, D, d, variance) > least for e in (-0.01, 0.01))
    assert optimal_k(D, d, 0.3) > optimal_k(D, d)


def test_the_energy_is_that_of_the_world_s_points():
    world = World(16, 2)
    x, n = world.points(20000, rng()), torch.randn(20000, 16, generator=rng(1))
    for k in (0.2, 0.5, 0.9):
        seen = (k * x - (1 - k) * n).square().sum(1).mean().item()
        assert seen == pytest.approx(target_energy(k, 16, 2), rel=0.02)


@pytest.mark.paper
def test_at_the_optimum_of_the_network_k_has_no_gradient():
    """For normal data E[v | x_t] is linear; its loss does not depend on k to first order."""
    n = 200000
    x, noise, t = images(n, shape=(1,))
    x_t = t * x + (1 - t) * noise
    best = (2 * t - 1) / (t**2 + (1 - t) ** 2) * x_t  # E[x - n | x_t] for x, n ~ N(0, 1)
    k = double(0.7).requires_grad_()
    den = k.detach() * (1 - t) + (1 - k.detach()) * t
    u = den * best - (1 - 2 * k.detach()) * x_t  # the output that implies it at this k
    losses = flow_loss(u, x, noise, t, k, "velocity")
    slopes = -2 * (best - (x - noise)) * (2 * x_t + (1 - 2 * t) * best) / den
    (slope,) = torch.autograd.grad(losses.mean(), k)
    assert slope.item() == pytest.approx(slopes.mean().item())
    assert abs(slope.item()) < 4 * slopes.std().item() / n**0.5
    (wrong,) = torch.autograd.grad(flow_loss(u + 0.3, x, noise, t, k, "velocity").mean(), k)
    assert abs(wrong.item()) > 20 * slopes.std().item() / n**0.5


# ---- the model


def test_the_loss_is_the_weighted_score_of_the_denoiser():
    torch.manual_seed(0)
    net = World(6, 2).model().double()
    torch.nn.init.normal_(net.output.weight, 0.0, 0.1)
    for fixed in (None, 0.0, 0.3, 1.0):
        model = KDiff(net, fixed).double()
        model.alpha_bar = alpha_bar("flow")
        points = World(6, 2).points(20, rng()).double()
        batch = collate([dict(prompt=0, responses=x[None]) for x in points])
        model.prepare(batch, rng())
        level = model.alpha_bar[batch.t]
        scores = model.logps(batch, weight=lambda t: (1 + to_sigma(model.alpha_bar[t])) ** 2)
        x, noise = batch.images[:, 0], batch.noise[:, 0]
        x_t = level.sqrt()[:, None] * x + (1 - level).sqrt()[:, None] * noise
        u = net(x_t, to_sigma(level).log() / 4, batch.label)
        losses = flow_loss(u, x, noise, spread(to_flow(level), x), model.k, "velocity")
        torch.testing.assert_close(losses, -scores[:, 0, 0], rtol=1e-6, atol=1e-9)


def test_a_learned_k_begins_at_one_half_where_an_output_of_0_costs_the_energy_of_the_velocity():
    world = World(16, 2)
    model = KDiff(world.model())
    assert model.k.item() == 0.5 and KDiff(world.model(), 0.25).k == 0.25
    assert "w" in model.state_dict() and "w" not in KDiff(world.model(), 0.25).state_dict()
    x, n = world.points(20000, rng()), torch.randn(20000, 16, generator=rng(1))
    t = torch.rand(20000, 1, generator=rng(2))
    cost = flow_loss(torch.zeros_like(x), x, n, t, model.k, "velocity").mean().item()
    assert cost == pytest.approx(16 + 2, rel=0.02)


def test_training_times_are_logit_normal_in_flow_time():
    normal = torch.randn(20000, generator=rng())
    steps = flow_steps(normal, -0.8, 0.8, 1000)
    t = to_flow(alpha_bar("flow"))[steps]
    wanted = torch.sigmoid(-0.8 + 0.8 * normal).clamp(0.02, 0.98)
    assert (t - wanted).abs().max() < 6e-4
    ends = flow_steps(double(-1e9, 1e9), 0.0, 1.0, 1000)
    assert to_flow(alpha_bar("flow"))[ends].tolist() == pytest.approx([0.02, 0.98], abs=6e-4)


def test_only_a_learned_k_moves_and_it_rises_where_the_data_are_flat():
    lab = small(world="subspace")
    ends = {}
    for fixed in (None, 0.5):
        cfg = Config(fixed_k=fixed)
        model = KDiff(World(64, 2).model(), fixed).to(lab.device)
        train(lab, model, cfg, 40, 64, 2e-3)
        ends[fixed] = float(torch.as_tensor(model.k).detach())
    assert ends[0.5] == 0.5 and 0.6 < ends[None] < 1


def test_a_run_trains_by_the_recipe_of_the_base_model_and_repeats_itself():
    ends = []
    for _ in range(2):
        lab = small()
        model = run(lab, Config())
        assert lab.steps == 6 and model.sample([0], 3, rng(), steps=4).shape == (1, 3, 64)
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert torch.equal(*ends)
    found = evaluate(lab, model)
    assert 0.5 < found["k"] < 0.7 and found["off_subspace"] > 0 and "kl" not in found
    assert "k" not in evaluate(lab, lab.base())
    lab = small(steps=None, batch_size=None)
    lab.smoke = True
    run(lab, Config(fixed_k=1.0))
    assert lab.steps == 4 and lab.world.pretrain["steps"] == 800


def test_a_run_keeps_pictures_of_the_same_noise_while_it_trains(tmp_path):
    settings = Settings(world="digits", steps=10, batch_size=4, eval_size=4)
    lab = Lab(settings, str(tmp_path), quiet=True)
    model = run(lab, Config())
    kept = sorted(path.stem for path in (tmp_path / "stages").glob("pictures-*.json"))
    assert kept == [f"pictures-{step:09d}" for step in range(0, 11, 2)]
    assert [look["step"] for look in model.curve] == list(range(11))
    assert set(model.curve[0]) == {"step", "k"} and model.curve[0]["k"] == 0.5


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [dict(fixed_k=-0.1), dict(fixed_k=1.1), dict(fixed_k=math.nan), dict(lr_k=0.0)]
    + [dict(space="image"), dict(t_std=0.0), dict(t_mean=math.inf)],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Config(**wrong)


def test_a_learning_rate_of_a_fixed_k_is_refused():
    for lr_k in (0.1, Config().lr_k):  # the default value does nothing either
        with pytest.raises(ValueError, match=f"lr_k = {lr_k} does nothing with fixed_k = 0.5"):
            Config(fixed_k=0.5, lr_k=lr_k)
    assert (Config().lr_k, Config(lr_k=0.1).lr_k, Config(fixed_k=0.5).lr_k) == (0.05, 0.1, None)


@pytest.mark.parametrize("flag", ["init", "guidance", "eval_every"])
def test_settings_that_a_training_from_scratch_does_not_read_are_refused(flag):
    value = {"init": "folder"}.get(flag, "2")
    with pytest.raises(ValueError, match=f"--{flag} does nothing under kdiff"):
        combinations(*read_flags(["--method", "kdiff", f"--{flag}", value]))


def test_the_chosen_optimizer_trains_the_network_and_k_at_a_rate_of_its_own(monkeypatch):
    lab, seen = small(optimizer="dct_adamw"), []
    model = KDiff(World(64, 2).model())
    monkeypatch.setattr(lab, "fit", lambda *args, optimizer, **how: seen.append(optimizer))
    train(lab, model, Config(lr_k=0.1), 1, 8, 2e-3)
    made = seen[0](list(model.parameters()))
    assert isinstance(made, DCTAdamW) and [g["lr"] for g in made.param_groups] == [2e-3, 0.1]
    ends = [run(small(optimizer=name), Config()).k.item() for name in ("adamw", "dct_adamw")]
    assert 0.5 < ends[1] < 0.7 and ends[0] != ends[1]


def test_the_average_of_the_weights_is_used():
    ends = []
    for ema in (0.0, 0.9):
        model = run(small(ema=ema), Config())
        ends.append(model.k.item())
    assert 0.5 < ends[1] < ends[0]


# ---- the mutants of the core: every one makes a difference on these inputs


CASES = [{}]
SURVIVORS = {}


def INPUTS():
    """Calls of the core; a model stands for its method k."""
    x, n, t = images(6)
    u = torch.randn(6, 3, generator=rng(3), dtype=torch.float64).requires_grad_()
    k = double(0.3)[0].requires_grad_()
    items = [("optimal_k", 16, 3, 0.5), ("optimal_k", 5, 2)]
    items += [("target_energy", 0.3, 16, 3, 0.5), ("target_energy", 0.7, 5, 2)]
    items += [("velocity", u, x, t, k)]
    items += [("flow_loss", u, x, n, t, k, space) for space in ("velocity", "target")]
    wide = [v.detach()[:, :2].reshape(3, 1, 2, 2) for v in (u, x, n)]
    items += [("flow_loss", *wide, t[:3, :, None, None], k, "velocity")]
    normal = torch.randn(50, generator=rng(4))
    items += [("flow_steps", normal, -0.8, 0.7, 1000), ("flow_steps", 9 * normal, 0.0, 1.0, 1000)]
    return items
