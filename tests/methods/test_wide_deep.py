"""WIDE_DEEP against its paper: dual activations, the limits of depth, and the classifiers."""

import math

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods import wide_deep
from methods.wide_deep import (
    VARIANTS,
    Config,
    coefficients,
    dual,
    finite,
    gaps,
    hermite,
    horner,
    kappa,
    limit,
    run,
    tabulated,
    votes,
)
from toy import arc


def numbers(*values):
    return torch.tensor(values, dtype=torch.float64)


def on_arc(n=60, seed=0):
    """n points of the arc, one-hot classes, and 50 other points."""
    rng = torch.Generator().manual_seed(seed)
    world = arc.World()
    x, y = world.points(n, rng)
    return x, torch.eye(2, dtype=x.dtype)[y], world.points(50, rng)[0]


def mixed(*weights):
    """Replaces `coefficients`: a dual activation with any weights, also with a mean."""
    return lambda cfg: numbers(*weights)


# ---- dual activations


@pytest.mark.paper
@pytest.mark.parametrize(
    ("cfg", "value"),
    [
        (Config(d=2), 0.1635),
        (Config(d=4), 0.12675),
        (Config(d=1), 0.15010935),
        (Config("sine", s=2.676), 0.1233714682),
    ],
)
def test_dual_activations_have_their_values(cfg, value):
    assert dual(numbers(0.3), cfg)[0].item() == pytest.approx(value, abs=1e-9)
    assert coefficients(cfg).sum().item() == pytest.approx(1, abs=1e-12)


ACTIVATIONS = {
    "optimal": lambda z: (z + (z**7 - 21 * z**5 + 105 * z**3 - 105 * z) / 5040**0.5) / 2**0.5,
    "sine": lambda z: torch.sin(2.67607**0.5 * z) * (math.exp(2.67607) / math.sinh(2.67607)) ** 0.5,
    "square": lambda z: (z**2 - 1) / 2**0.5,
    "poly": lambda z: (z + (z**7 - 21 * z**5 + 105 * z**3 - 105 * z) / 5040**0.5) / 2**0.5,
    "relu": lambda z: z.relu() * 2**0.5,
    "gelu": lambda z: torch.nn.functional.gelu(z) / 0.652075,
}


@pytest.mark.parametrize("cfg", [*map(Config, VARIANTS), Config(d=2), Config("poly", p=0.1)])
def test_the_drawn_activation_is_the_one_that_classifies(cfg):
    z = torch.linspace(-3, 3, 13, dtype=torch.float64)
    expected = ACTIVATIONS[cfg.variant](z)
    if cfg.d == 1 and cfg.p in (None, 0.5):
        torch.testing.assert_close(wide_deep.activation(z, cfg), expected, rtol=0, atol=2e-4)
    if cfg.variant != "relu":  # its quadrature converges slowly at the kink
        found = hermite(lambda x: wide_deep.activation(x, cfg)).square()
        size = min(len(found), len(coefficients(cfg)), 20)
        torch.testing.assert_close(found[:size], coefficients(cfg)[:size], rtol=0, atol=1e-9)


def test_the_picture_has_the_activations_of_each_limit_and_that_of_the_run_in_bold():
    panels = wide_deep.panels(Config("poly", p=0.1, degree=3)).axes
    found = {ax.get_title(): [line.get_label() for line in ax.lines] for ax in panels}
    assert found["majority vote"] == ["relu", "gelu"] and found["1-NN"] == ["square"]
    assert found["singular kernel"] == [
        "optimal, alpha 0.50",
        "poly, alpha 2.24",
        "sine, alpha 1.00",
    ]
    bold = [line.get_label() for ax in panels for line in ax.lines if line.get_linewidth() == 3]
    assert bold == ["poly, alpha 2.24"]


@pytest.mark.parametrize("name", ["optimal", "sine", "square", "poly", "gelu"])
def test_coefficients_are_those_of_the_activation(name):
    cfg = Config(name)
    found, expected = hermite(ACTIVATIONS[name]).square(), coefficients(cfg)
    size = min(len(found), len(expected), 20)
    torch.testing.assert_close(found[:size], expected[:size], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_dual_is_the_expectation_over_correlated_normals_and_its_derivative(name):
    import numpy as np

    z, w = np.polynomial.hermite_e.hermegauss(60)
    z, w = torch.from_numpy(z), torch.from_numpy(w / w.sum())
    xi = numbers(0.0, 0.3, 0.8, 0.95).requires_grad_()
    value, slope = dual(xi, Config(name))
    for x, found in zip(xi.tolist(), value.tolist()):
        phi = ACTIVATIONS[name]
        both = phi(z)[:, None] * phi(x * z[:, None] + (1 - x * x) ** 0.5 * z)
        expected = (w[:, None] * w * both).sum().item()
        assert found == pytest.approx(expected, abs=1e-2 if name == "relu" else 1e-4)
    (derivative,) = torch.autograd.grad(value.sum(), xi)
    torch.testing.assert_close(slope, derivative, rtol=1e-9, atol=1e-9)


def test_horner_is_the_polynomial():
    x = torch.rand(7, dtype=torch.float64)
    assert torch.allclose(horner(numbers(3.0, 0.0, 2.0), x), 3 + 2 * x**2)


# ---- the limits


@pytest.mark.paper
@pytest.mark.parametrize(
    ("weights", "alpha"),
    [((0, 0.5, 0, 0, 0, 0, 0, 0.5), 0.5), ((0, 0.5, 0, 0.5), 1), ((0, 0.25, 0.5, 0.25), 2)],
)
def test_the_order_is_that_of_linear_part_and_growth(weights, alpha, monkeypatch):
    monkeypatch.setattr(wide_deep, "coefficients", mixed(*weights))
    assert limit(Config()) == ("singular kernel", pytest.approx(alpha))


@pytest.mark.paper
@pytest.mark.parametrize("d", [1, 2, 3, 4, 8, 16])
def test_the_optimal_activation_has_order_d_over_2(d):
    assert limit(Config(d=d)) == ("singular kernel", pytest.approx(d / 2))


@pytest.mark.paper
@pytest.mark.parametrize(
    ("s", "alpha"), [(1.0, 0.59278), (2.67607, 1.0), (4.39483, 1.5), (6.13539, 2), (13.82585, 4)]
)
def test_the_orders_of_sines(s, alpha):
    assert limit(Config("sine", s=s))[1] == pytest.approx(alpha, abs=1e-5)


@pytest.mark.paper
@pytest.mark.parametrize(("phi", "alpha"), [(torch.tanh, 0.44035), (torch.erf, 0.44411)])
def test_the_orders_of_bounded_activations(phi, alpha, monkeypatch):
    squares = hermite(phi).square()
    monkeypatch.setattr(wide_deep, "coefficients", mixed(*(squares / squares.sum()).tolist()))
    assert limit(Config("gelu")) == ("singular kernel", pytest.approx(alpha, abs=0.01))


@pytest.mark.paper
def test_gelu_and_relu_vote_by_majority_and_the_square_is_the_nearest_neighbor():
    value, slope = dual(numbers(0.0, 1.0), Config("gelu"))
    assert value[0].item() ** 0.5 == pytest.approx(0.4326, abs=1e-4)
    assert slope[1].item() == pytest.approx(1.072, abs=1e-3)
    assert limit(Config("gelu"))[0] == limit(Config("relu"))[0] == "majority vote"
    assert math.isnan(limit(Config("relu"))[1])
    assert limit(Config("square")) == ("1-NN", math.inf)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("d", "xi", "value"),
    [
        (2, 0.1, 0.101344137),
        (2, 0.5, 0.713599128),
        (2, 0.9, 5.59116373),
        (2, 0.99, 60.0622281),
        (2, 0.999, 604.713488),
        (1, 0.2, 0.200013),
        (1, 0.6, 0.628605),
        (1, 0.9, 1.530722),
        (4, 0.1, 0.131213),
        (4, 0.5, 2.529927),
        (4, 0.9, 128.495854),
    ],
)
def test_the_singular_kernel_has_its_values(d, xi, value):
    assert kappa(1 - numbers(xi), Config(d=d)).item() == pytest.approx(value, rel=2e-6)


@pytest.mark.paper
@pytest.mark.parametrize("cfg", [Config(d=1), Config(d=2), Config(d=4), Config("sine")])
def test_the_singular_kernel_solves_its_functional_equation(cfg):
    xi = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    lam = dual(numbers(0.0), cfg)[1]
    inside = kappa(1 - dual(xi, cfg)[0], cfg)
    torch.testing.assert_close(inside, lam * kappa(1 - xi, cfg), rtol=1e-10, atol=0)


@pytest.mark.paper
def test_the_singular_kernel_has_its_order():
    gap = numbers(1e-2, 1e-3, 1e-4)
    scaled = kappa(gap, Config(d=2)) * gap
    assert scaled.tolist() == pytest.approx([0.60062, 0.60471, 0.60512], abs=1e-5)
    tiny = numbers(1e-15, 1e-15 / 2)
    ratio = kappa(tiny, Config(d=2))
    assert (ratio[1] / ratio[0]).item() == pytest.approx(2, rel=1e-6)
    ratio = kappa(numbers(1e-4 / 4, 1e-4), Config(d=1))
    assert (ratio[0] / ratio[1]).item() == pytest.approx(2, rel=1e-4)


@pytest.mark.parametrize("cfg", [Config(), Config(d=4), Config("poly", p=0.9), Config("sine")])
def test_the_table_of_the_singular_kernel_interpolates_it(cfg):
    gap = 10 ** torch.linspace(-16, 0, 999, dtype=torch.float64)
    gap = torch.cat([gap, numbers(0.9, 0.999, 1 - 1e-7)])
    torch.testing.assert_close(tabulated(gap, cfg), kappa(gap, cfg), rtol=1e-4, atol=1e-12)
    assert tabulated(numbers(0.0), cfg).isfinite().all()


# ---- finite depth


@pytest.mark.paper
@pytest.mark.parametrize(
    ("depth", "nngp", "ntk"),
    [(1, 0.3125, 0.75), (2, 0.1715087891, 0.6563720703), (3, 0.0882768827, 0.4454239552)],
)
def test_the_recursions_of_a_finite_network(depth, nngp, ntk, monkeypatch):
    monkeypatch.setattr(wide_deep, "coefficients", mixed(0, 0.5, 0, 0.5))
    gap = numbers(0.5, 0.0)
    found = finite(gap, Config(depth=depth)).tolist()
    assert found == pytest.approx([nngp, 1.0], abs=1e-9)
    found = finite(gap, Config(depth=depth, kernel="ntk")).tolist()
    assert found == pytest.approx([ntk, 2 ** (depth + 1) - 1], abs=1e-9)


@pytest.mark.paper
def test_a_finite_kernel_over_the_power_of_its_linear_part_tends_to_kappa():
    xi, cfg = numbers(0.2, 0.5, 0.8), Config(d=2)
    deep = finite(1 - xi, Config(d=2, depth=60)) / 0.5**60
    torch.testing.assert_close(deep, kappa(1 - xi, cfg), rtol=1e-9, atol=0)
    slow = finite(1 - xi, Config(d=2, depth=400, kernel="ntk")) / 401 / 0.5**400
    torch.testing.assert_close(slow, kappa(1 - xi, cfg), rtol=0.02, atol=0)


@pytest.mark.paper
def test_relu_tends_to_a_constant_plus_its_diagonal():
    gap = 1 - numbers(0.1, 0.5, 0.9, 1.0)
    near = finite(gap, Config("relu", depth=1000, kernel="ntk")) / 1001
    assert near.tolist() == pytest.approx([0.25335, 0.25380, 0.25636, 1.0], abs=1e-5)


@pytest.mark.paper
def test_with_a_mean_the_kernel_is_a_constant_and_votes_by_majority(monkeypatch):
    monkeypatch.setattr(wide_deep, "coefficients", mixed(0.2, 0.2, 0, 0.6))
    assert limit(Config())[0] == "majority vote"
    gap = 1 - numbers(0.1, 0.4, 0.9)
    assert finite(gap, Config(depth=200)).tolist() == pytest.approx([0.2637626] * 3, abs=1e-6)
    deep = finite(gap, Config(depth=200, kernel="ntk")).tolist()
    assert deep == pytest.approx([0.3908911] * 3, abs=1e-6)
    x, y, z = on_arc()
    winner = y.sum(0).argmax()
    shares = [
        (votes(x, y, z, Config(depth=depth, kernel="ntk")).argmax(1) == winner).double().mean()
        for depth in (10, 60)
    ]
    assert shares[0] < shares[1] == 1


@pytest.mark.paper
def test_without_growth_only_a_ridge_makes_the_majority_vote(monkeypatch):
    monkeypatch.setattr(wide_deep, "coefficients", mixed(0.6, 0.3, 0.1))
    x, y, z = on_arc(12)
    winner = y.sum(0).argmax()
    found = votes(x, y, z, Config(depth=14, ridge=0.1)).argmax(1)
    assert (found == winner).all()


# ---- classifiers


@pytest.mark.paper
def test_three_points_vote_as_in_the_worked_example():
    angles = [math.acos(xi) for xi in (0.2, 0.6, 0.9)]
    x = torch.stack([numbers(math.cos(a), math.sin(a)) for a in angles])
    y = torch.tensor([[0.0, 1], [0, 1], [1, 0]], dtype=torch.float64)
    z = numbers(1.0, 0.0)[None]
    found = votes(x, y, z, Config(d=2))[0]
    assert (found[1] - found[0]).item() == pytest.approx(-4.352939, abs=1e-4)
    assert votes(x, y, z, Config("relu"))[0].tolist() == [1, 2]
    assert votes(x, y, z, Config("square"))[0].tolist() == [1, 0]


@pytest.mark.paper
def test_the_square_is_the_nearest_neighbor_at_a_finite_depth_already():
    x, y, z = on_arc(20)
    near = votes(x, y, z, Config("square")).argmax(1)
    far = gaps(z, x).sort(1)[0]
    clear = (1 - far[:, 0]) / (1 - far[:, 1]) > 1.001
    deep = votes(x, y, z, Config("square", depth=14)).argmax(1)
    assert (deep == near)[clear].all() and clear.sum() > 10


@pytest.mark.paper
def test_the_network_of_finite_depth_tends_to_the_vote():
    x, y, z = on_arc()
    vote = votes(x, y, z, Config()).argmax(1)
    same = [
        (votes(x, y, z, Config(depth=depth)).argmax(1) == vote).double().mean().item()
        for depth in (5, 20)
    ]
    assert same[0] <= same[1] == 1


@pytest.mark.paper
@pytest.mark.parametrize("cfg", [Config(), Config(d=3), Config("square"), Config(depth=8)])
def test_votes_do_not_depend_on_rotations_or_names_and_keep_training_labels(cfg):
    x, y, z = on_arc(30)
    found = votes(x, y, z, cfg)
    assert torch.equal(votes(x, y.flip(1), z, cfg).flip(1), found)
    swap = votes(x.flip(1), y, z.flip(1), cfg)  # a reflection of the arc
    torch.testing.assert_close(swap, found, rtol=1e-4, atol=1e-6)
    assert torch.equal(votes(x, y, x, cfg).argmax(1), y.argmax(1))


# ---- what is refused


def test_points_off_the_positive_sphere_are_refused():
    x = numbers(1.0, 0.0)[None]
    for bad in (numbers(0.5, 0.5)[None], numbers(-0.6, 0.8)[None]):
        for pair in ((x, bad), (bad, x)):
            with pytest.raises(UserError, match="positive part of the unit sphere"):
                gaps(*pair)
    assert gaps(x, numbers(0.0, 1.0)[None]).item() == pytest.approx(1.0)
    near = numbers(math.cos(1e-9), math.sin(1e-9))[None]
    assert gaps(x, near).item() == pytest.approx(5e-19)


def test_a_kernel_that_is_singular_or_overflows_is_refused():
    x, y, z = on_arc()
    for cfg in (Config(depth=1), Config(depth=1500, kernel="ntk")):
        with pytest.raises(UserError, match="change depth or ridge"):
            votes(x, y, z, cfg)
    assert votes(x, y, z, Config(depth=1, ridge=0.1)).isfinite().all()


def test_a_singular_kernel_is_refused_where_the_limit_is_another():
    for name in ("relu", "gelu", "square"):
        with pytest.raises(UserError, match="not a singular kernel"):
            kappa(numbers(0.5), Config(name))


def test_fields_that_do_nothing_are_refused():
    for fields in (dict(ridge=0.1), dict(kernel="ntk"), dict(p=0.5), dict(variant="relu", s=1.0)):
        with pytest.raises(UserError):
            Config(**fields)
    with pytest.raises(UserError, match="p"):
        Config("poly", p=1.0)  # a linear activation


@pytest.mark.parametrize("name", VARIANTS)
def test_a_run_compares_classifiers(name):
    lab = Lab(Settings(world="arc"), quiet=True)
    table = run(lab, Config(name, n=50))
    assert list(table)[:2] == ["wide and deep", "Hilbert kernel"]
    assert all(0 < row["accuracy"] < 1 for row in table.values())
    same = dict(relu="majority vote", gelu="majority vote", square="1-NN").get(name)
    if same:
        assert table["wide and deep"]["accuracy"] == table[same]["accuracy"]
    assert table["Bayes"]["accuracy"] > 0.8


# ---- the mutants of the core


CASES = [
    dict(),
    dict(d=3),
    dict(variant="poly", p=0.9, degree=2),
    dict(variant="poly", depth=1500, kernel="ntk", ridge=0.1),
    dict(variant="relu"),
    dict(variant="poly", p=0.25, degree=4, depth=6, kernel="ntk", ridge=0.3),
    dict(variant="sine", depth=2),
    dict(variant="square"),
    dict(variant="relu", depth=5, kernel="ntk"),
    dict(variant="gelu", depth=4),
]


def INPUTS():
    x, y, z = on_arc(12)
    inside = torch.tensor([0.0, 0.2, 0.7, 1.0], dtype=torch.float64)
    gap = numbers(1e-12, 1e-3, 0.1, 0.5, 0.9, 0.995, 1.0)
    beyond = numbers(0.5, 1 + 1e-9)
    calls = [("coefficients", "cfg"), ("dual", inside, "cfg"), ("dual", beyond, "cfg")]
    calls += [("limit", "cfg"), ("kappa", gap, "cfg"), ("tabulated", gap, "cfg")]
    calls += [("finite", gap, "cfg"), ("finite", inside, "cfg"), ("votes", x, y, z, "cfg")]
    calls += [("votes", x, y, x, "cfg"), ("votes", x, y, -z, "cfg"), ("votes", x / 2, y, z, "cfg")]
    far = torch.eye(2, dtype=torch.float64)
    calls += [("votes", torch.cat([x, x]), torch.cat([y, y]), z, "cfg"), ("gaps", far, far)]
    calls += [("gaps", torch.cat([far, far[:1] / 2]), far)]
    calls += [("gaps", far, numbers(-0.6, 0.8)[None]), ("hermite", torch.nn.functional.gelu)]
    return calls


SURVIVORS = {
    "kappa: alpha * growth -> growth": "layers beyond the convergence change no digit",
    "votes: square.isfinite() -> square": "where the diagonal overflows, the rest underflows to 0",
    "votes: 1000000000000000.0 -> 1000000000000001.0": "a bound that need not be exact",
}
