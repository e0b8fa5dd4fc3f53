"""KRR-ST against its paper: the ridge regression, what has a gradient, the pool, and the bias."""

import copy

import pytest
import torch
import torch.nn.functional as F

from data import UserError
from lab import Lab, Settings
from methods.krr_st import (
    Config,
    Distilled,
    Student,
    barlow,
    krr,
    older,
    outer,
    picture,
    run,
    views,
    with_one,
)


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


PHI_S = numbers([1, 0, 1], [1, 1, 1], [0, 2, 1])
PHI_T = numbers([2, 1, 1], [1, -1, 1])
Y, G = numbers([1], [2], [0]), numbers([1.5], [0])


# ---- the ridge regression


@pytest.mark.paper
def test_the_worked_example_with_its_gradients():
    phi, y = PHI_S.clone().requires_grad_(), Y.clone().requires_grad_()
    found = krr(phi, y, PHI_T, 0.1)  # the trace is 10, so lambda is 1
    assert found[:, 0].tolist() == pytest.approx([1.896552, 1.068966], abs=1e-6)
    loss = (found - G).square().mean()
    assert loss.item() == pytest.approx(0.649970, abs=1e-6)
    loss.backward()
    assert y.grad[:, 0].tolist() == pytest.approx([0.905470, 0.494649, -0.378121], abs=1e-6)
    assert phi.grad[0].tolist() == pytest.approx([-0.734696, 0.011276, -0.358112], abs=1e-6)
    A = PHI_T @ PHI_S.T @ torch.linalg.inv(PHI_S @ PHI_S.T + torch.eye(3))
    torch.testing.assert_close(y.grad, 2 / 2 * A.T @ (A @ Y - G))
    assert krr(PHI_S, Y, PHI_T, 1e-6)[:, 0].tolist() == pytest.approx([4.9995, 0.00027], abs=1e-4)


@pytest.mark.paper
def test_primal_and_dual_agree_for_few_and_many_images():
    for m, k in ((3, 6), (9, 4)):
        phi_s, y, phi_t = normal(m, k), normal(m, 2, seed=1), normal(5, k, seed=2)
        lam = 1e-3 * phi_s.square().sum()
        primal = torch.linalg.solve(phi_s.T @ phi_s + lam * torch.eye(k), phi_s.T @ y)
        torch.testing.assert_close(krr(phi_s, y, phi_t, 1e-3), phi_t @ primal)


def test_it_is_the_kernel_ridge_regression_of_scikit_learn():
    from sklearn.kernel_ridge import KernelRidge

    phi, y, phi_t = normal(6, 9), normal(6, 3, seed=1), normal(5, 9, seed=2)
    fitted = KernelRidge(alpha=1e-3 * phi.square().sum().item(), kernel="linear")
    found = fitted.fit(phi.numpy(), y.numpy()).predict(phi_t.numpy())
    torch.testing.assert_close(krr(phi, y, phi_t, 1e-3), torch.from_numpy(found))


@pytest.mark.paper
def test_without_a_ridge_it_interpolates_and_recovers_a_linear_target():
    phi, y = normal(4, 7), normal(4, 3, seed=1)
    torch.testing.assert_close(krr(phi, y, phi, 1e-14), y, atol=1e-9, rtol=0)
    phi, W = with_one(normal(9, 4)), normal(5, 3, seed=1)  # more images than features
    phi_t = with_one(normal(6, 4, seed=2))
    torch.testing.assert_close(krr(phi, phi @ W, phi_t, 1e-13), phi_t @ W, atol=1e-8, rtol=0)


@pytest.mark.paper
def test_scale_order_and_a_constant_change_nothing():
    phi, y, phi_t = with_one(normal(4, 6)), normal(4, 3, seed=1), with_one(normal(5, 6, seed=2))
    found = krr(phi, y, phi_t, 1e-3)
    torch.testing.assert_close(krr(3 * phi, y, 3 * phi_t, 1e-3), found)
    order = torch.tensor([2, 0, 3, 1])
    torch.testing.assert_close(krr(phi[order], y[order], phi_t, 1e-3), found)
    wide, wide_t = with_one(normal(8, 3)), with_one(normal(5, 3, seed=2))
    targets = normal(8, 2, seed=1)  # what the column of ones is for
    shifted = krr(wide, targets + 5, wide_t, 1e-9)
    torch.testing.assert_close(shifted, krr(wide, targets, wide_t, 1e-9) + 5, atol=1e-5, rtol=0)


@pytest.mark.paper
def test_images_and_targets_have_a_gradient_and_nothing_else_has():
    net = Student(6, 3, generator()).double()
    x, y = normal(4, 6).requires_grad_(), normal(4, 3, seed=1).requires_grad_()
    x_t, g = normal(7, 6, seed=2).requires_grad_(), normal(7, 3, seed=3).requires_grad_()
    net.requires_grad_(False)
    loss = outer(net.embed, x, y, x_t, g, 1e-3)
    loss.backward()
    assert x.grad.abs().sum() > 0 and y.grad.abs().sum() > 0
    assert x_t.grad is None and g.grad is None
    assert all(p.grad is None for p in net.parameters())
    A = krr(with_one(net.embed(x)), torch.eye(4).double(), with_one(net.embed(x_t)), 1e-3).detach()
    torch.testing.assert_close(y.grad, 2 / 21 * A.T @ (A @ y.detach() - g.detach()))
    assert outer(net.embed, x, y, x_t, g, 1e-3).item() == pytest.approx(F.mse_loss(A @ y, g).item())


@pytest.mark.paper
def test_random_views_inside_bias_the_gradient_and_a_fixed_target_does_not():
    """The inner step is one step of size 1 on 0.5 (theta - xi x)^2; the outer 0.5 (theta - c)^2."""
    c = 1.0

    def gradient(inside, chances):
        """E over xi of the outer gradient, where the inner view has the strength inside(xi)."""
        total = 0.0
        for xi, p in chances.items():
            x, theta = torch.tensor(2.0, requires_grad=True), torch.zeros((), requires_grad=True)
            (slope,) = torch.autograd.grad(
                0.5 * (theta - inside(xi) * x) ** 2, theta, create_graph=True
            )
            (found,) = torch.autograd.grad(0.5 * (theta - slope - c) ** 2, x)
            total += p * found.item()
        return total

    chances = {0.0: 0.5, 1.0: 0.5}
    true = gradient(lambda xi: 0.5, chances)
    noisy = gradient(lambda xi: xi, chances)
    assert (true, noisy) == (0.0, 0.5)
    assert noisy - true == 0.25 * 2.0  # Var(xi) x


# ---- self-supervision


def test_barlow_twins_wants_equal_and_uncorrelated_dimensions():
    a = normal(50, 3)
    white = torch.linalg.qr(a - a.mean(0))[0]
    assert barlow(white, white).item() == pytest.approx(0, abs=1e-4)
    assert barlow(white, 5 * white + 2).item() == pytest.approx(0, abs=1e-4)
    assert barlow(white, -white).item() == pytest.approx(12, rel=1e-3)
    same = white[:, :1].expand(-1, 3)
    assert barlow(same, same).item() == pytest.approx(6 * 5e-3, rel=1e-2)
    assert barlow(same, same, weight=1.0).item() == pytest.approx(6, rel=1e-2)


def test_a_view_is_the_picture_moved_by_at_most_a_pixel():
    x = torch.zeros(200, 64)
    x[:, 8 * 4 + 4] = 100.0
    seen = {i for row in views(x, 8, generator()) for i in (row > 50).nonzero()[:, 0].tolist()}
    assert seen == {8 * r + c for r in (3, 4, 5) for c in (3, 4, 5)}
    fixed = views(x, None, generator())
    assert {i for row in fixed for i in (row > 50).nonzero()[:, 0].tolist()} == {36}
    assert 0.1 < (fixed == 0).double().mean() < 0.2


# ---- the pool


@pytest.mark.paper
def test_a_network_that_starts_anew_is_young_again():
    assert older(3, 5, True) == (False, 4) and older(5, 5, True) == (True, 0)
    assert older(5, 5, False) == (True, 5)  # the released code: it starts anew at every draw
    ages, age = [], 3
    for _ in range(9):
        _, age = older(age, 5, True)
        ages.append(age)
    assert ages == [4, 5, 0, 1, 2, 3, 4, 5, 0]


def test_networks_of_the_pool_grow_on_the_distilled_data():
    cfg = Config(m=4, pool=3, age=6)
    model = Distilled(normal(4, 6).float(), normal(4, 3, seed=1).float(), cfg, generator())
    assert all(1 <= age < 6 for age in model.ages)
    assert not any(p.requires_grad for p in (*model.nets.parameters(), *model.speeds.parameters()))
    before, others = copy.deepcopy(model.nets[1]), copy.deepcopy(model.nets[0])
    age, speed = int(model.ages[1]), copy.deepcopy(model.speeds[1])
    model.ages[1] = 2
    model.grow(1, generator(1))
    twin = before.requires_grad_(True)
    taken = torch.optim.SGD(twin.parameters(), lr=0.1, momentum=0.9, weight_decay=1e-3)
    F.mse_loss(twin(model.x.detach()), model.y.detach()).backward()
    for p, v in zip(twin.parameters(), speed.parameters()):
        taken.state[p]["momentum_buffer"] = v.clone()
    taken.step()
    for a, b in zip(model.nets[1].parameters(), twin.parameters()):
        torch.testing.assert_close(a, b.detach())
    assert int(model.ages[1]) == 3 and age < 6
    for a, b in zip(model.nets[0].parameters(), others.parameters()):
        assert torch.equal(a, b)
    model.ages[1] = 6
    model.grow(1, generator(1))
    fresh = Student(6, 3, generator(1))
    for a, b in zip(model.nets[1].parameters(), fresh.parameters()):
        assert torch.equal(a, b)
    assert int(model.ages[1]) == 0 and not any(v.any() for v in model.speeds[1].parameters())
    assert not model.x.grad and not model.y.grad


# ---- what is refused, and a run


def test_what_makes_no_sense_is_refused():
    empty = normal(0, 3)
    for phi, y, ridge, words in (
        (empty, normal(0, 1), 1e-6, "0 distilled images"),
        (PHI_S, Y[:2], 1e-6, "3 distilled images and 2 targets"),
        (normal(5, 3), normal(5, 1), 0.0, "a ridge above 0"),
        (PHI_S * torch.inf, Y, 1e-6, "not finite"),
    ):
        with pytest.raises(UserError, match=words):
            krr(phi, y, PHI_T, ridge)
    with pytest.raises(UserError, match="targets of 1 dimensions, not 2"):
        outer(lambda x: x, PHI_S, Y, PHI_T, normal(2, 2), 1e-6)
    for fields in (dict(m=0), dict(ridge=0.0), dict(age=1), dict(n=1), dict(pool=0)):
        with pytest.raises(UserError):
            Config(**fields)
    with pytest.raises(UserError, match="--m 30: there are --n 20"):
        run(Lab(Settings(world="pixels"), quiet=True), Config(m=30, n=20))


@pytest.mark.slow
def test_a_run_beats_random_images_and_resumes_bit_for_bit(tmp_path):
    def lab(folder):
        settings = Settings(world="pixels", steps=40, lr=1e-2, batch_size=64)
        made = Lab(settings, str(tmp_path / folder), quiet=True)
        made.checkpoint_every = 0.0
        return made

    cfg = Config(n=200, m=10, pool=2, age=10, teacher_steps=20, student_steps=60)
    whole = run(lab("whole"), cfg)
    names = ["random images", "KRR-ST", "targets frozen", "all images"]
    assert list(whole) == names and (tmp_path / "whole" / "distilled.png").exists()
    errors = [row["held-out MSE"] for row in whole.values()]
    assert errors[3] < errors[1] < errors[0] and whole["KRR-ST"]["images"] == 10
    cut, count = lab("cut"), []
    draw = cut.rng

    def interrupted(name, *key):
        count.append(name)
        if count.count("fresh") == 20:
            raise KeyboardInterrupt
        return draw(name, *key)

    cut.rng = interrupted
    with pytest.raises(KeyboardInterrupt):
        run(cut, cfg)
    assert run(lab("cut"), cfg) == whole


def test_the_picture_has_both_rows():
    fig = picture([torch.rand(3, 64), torch.rand(3, 64)], 8)
    assert len(fig.axes) == 6


# ---- the mutants of the core


CASES = [dict()]


class Embed:
    """Stands for a network's features."""

    def __call__(self, x):
        return torch.tanh(x @ normal(6, 4, seed=7))


def INPUTS():
    a, b = normal(9, 3).requires_grad_(), normal(9, 3, seed=1).requires_grad_()
    calls = [("barlow", a, b), ("barlow", a, b, 0.5), ("barlow", 1e-6 * a, 1e-6 * b)]
    calls += [("with_one", a), ("with_one", normal(3, 2).float())]
    phi, y = normal(4, 3).requires_grad_(), normal(4, 2, seed=1).requires_grad_()
    calls += [("krr", phi, y, normal(5, 3, seed=2), ridge) for ridge in (0.1, 1e-3, 0.0, -1.0)]
    square = normal(3, 3, seed=4)
    calls += [("krr", square, normal(3, 1), square, ridge) for ridge in (0.0, 0.1)]
    calls += [("krr", phi[:0], y[:0], phi, 0.1), ("krr", phi, y[:2], phi, 0.1)]
    broken = torch.cat([phi[:3].detach(), phi.detach()[3:] * torch.inf])
    calls += [("krr", broken, y, phi, 0.1)]
    x, x_t = normal(3, 6).requires_grad_(), normal(5, 6, seed=2).requires_grad_()
    g = normal(5, 2, seed=3).requires_grad_()
    few = normal(3, 2, seed=5).requires_grad_()
    calls += [
        ("outer", Embed(), x, few, x_t, g, 0.01),
        ("outer", Embed(), x, few, x_t, g[:, :1], 1),
    ]
    calls += [("outer", Embed(), x, few.detach().float(), x_t, g.detach().float(), 0.01)]
    three = [tuple(normal(2, 2, seed=i + k) for k in (0, 9)) for i in range(3)]
    calls += [("descend", *three), ("descend", *three, 0.3, 0.5, 0.2)]
    calls += [("older", age, 5, reset) for age in (4, 5, 6) for reset in (True, False)]
    return calls


ALONE = "a length or a shape has no gradient"
SURVIVORS = {
    "barlow: z.mean(0) -> _detached(z).mean(0)": "the other view is centered",
    "barlow: len(a) -> len(_detached(a))": ALONE,
    "with_one: torch.ones_like(features[:, :1]) -> torch.ones_like(_detached(features[:, :1]))": (
        ALONE
    ),
    "krr: len(phi_s) -> len(_detached(phi_s))": ALONE,
    "krr: torch.eye(m, dtype=K.dtype, device=K.device) -> torch.eye(m, dtype=K.dtype)": (
        "the inputs lie on the CPU"
    ),
    "outer: embed(x_t) -> embed(_detached(x_t))": "it is computed without a gradient",
}
