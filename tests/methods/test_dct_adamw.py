"""DCT-AdamW and Trion against the paper: the basis, the selection, the feedback, the rotation."""

import itertools
import math

import pytest
import torch

from claims.dct_adamw import Dion, Projected
from data import UserError
from lab import Lab, Settings
from methods import dct_adamw, dpo
from methods.dct_adamw import (
    Config,
    DCTAdamW,
    Trion,
    dct,
    dequantize,
    low_rank,
    makhoul,
    momentum,
    optimizer,
    orthogonal,
    quantize,
    top_columns,
)

HALF = math.sqrt(0.5)


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def basis(n):
    return dct(n, torch.float64)


def group(**changes):
    """The options of a parameter group, without error feedback and at full precision."""
    options = dict(lr=0.1, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, rank=0.5, score="l2")
    options |= dict(transform="matmul", gap=1, rotate=True, feedback=True, bits=32, mu=0.95)
    return options | changes


def walk(make, gradients, start=None):
    """The weights after each step of an optimizer on given gradients."""
    p = torch.nn.Parameter(torch.zeros_like(gradients[0]) if start is None else start.clone())
    taken, seen = make([p]), []
    for g in gradients:
        p.grad = g.clone()
        taken.step()
        assert torch.equal(p.grad, g)
        seen.append(p.detach().clone())
    return seen, taken.state[p]


# ---- the basis and its transforms


@pytest.mark.paper
def test_the_basis_of_four_columns_and_its_transforms_are_the_known_numbers():
    a, b = 0.653281, 0.270598
    expected = numbers([0.5, 0.5, 0.5, 0.5], [a, b, -b, -a], [0.5, -0.5, -0.5, 0.5], [b, -a, a, -b])
    torch.testing.assert_close(basis(4).T, expected, atol=1e-6, rtol=0)
    x = numbers([1, 2, 3, 4])
    assert (x @ basis(4))[0].tolist() == pytest.approx([5, -2.2304, 0, -0.1585], abs=1e-4)
    third = [4.3890, -3.0719, 1.0719, -0.3890]  # X D, the DCT-III, which is another basis
    assert (x @ basis(4).T)[0].tolist() == pytest.approx(third, abs=1e-4)


@pytest.mark.paper
@pytest.mark.parametrize("n", [1, 2, 4, 5, 8, 33])
def test_the_basis_is_orthonormal_and_the_fft_gives_its_matrix_product(n):
    torch.testing.assert_close(basis(n).T @ basis(n), torch.eye(n).double(), atol=1e-14, rtol=0)
    x = normal(3, n)
    torch.testing.assert_close(makhoul(x), x @ basis(n), atol=1e-13, rtol=0)
    if n > 2:
        assert (makhoul(x) - x @ basis(n).T).abs().max() > 0.1


def test_the_basis_is_made_once_for_all_matrices_of_a_size():
    assert dct(12) is dct(12) and dct(12).dtype == torch.float32
    assert dct(12, torch.float64) is not dct(12)


# ---- the selection


@pytest.mark.paper
def test_the_selection_of_the_worked_example():
    G = numbers([1, 2, 3, 4], [4, 3, 2, 1])
    S = G @ basis(4)
    assert S.abs().sum(0).tolist() == pytest.approx([10, 4.4609, 0, 0.3170], abs=1e-4)
    assert S.square().sum(0).tolist() == pytest.approx([50, 9.9497, 0, 0.0503], abs=1e-4)
    for r, left in ((1, 10), (2, 0.0503), (4, 0)):
        Q = basis(4)[:, top_columns(S, r, "l2")]
        residual = (G - G @ Q @ Q.T).square().sum().item()
        assert residual == pytest.approx(left, abs=1e-4)
    assert top_columns(S, 2, "l1").tolist() == [0, 1]


@pytest.mark.paper
def test_the_largest_squares_are_the_best_subset_and_contract_as_the_mean():
    better = 0
    for seed in range(20):
        G, n = normal(5, 6, seed=seed), 6
        S = G @ basis(n)

        def left(idx, G=G):
            Q = basis(6)[:, list(idx)]
            return (G - G @ Q @ Q.T).square().sum().item()

        for r in (1, 2, 4):
            best = min(left(idx) for idx in itertools.combinations(range(n), r))
            assert left(top_columns(S, r, "l2").tolist()) == pytest.approx(best, rel=1e-9)
            assert best <= (1 - r / n) * G.square().sum().item() + 1e-12
            better += left(top_columns(S, r, "l1").tolist()) > best + 1e-9
    assert better > 0


def test_columns_are_in_ascending_order_and_a_rank_that_does_not_fit_is_refused():
    S = normal(4, 9)
    idx = top_columns(S, 5, "l2").tolist()
    assert idx == sorted(idx) and len(set(idx)) == 5
    for r in (0, 10):
        with pytest.raises(UserError, match="expected 1 to 9"):
            top_columns(S, r, "l2")


# ---- the quantized feedback


@pytest.mark.paper
def test_the_quantizer_has_all_its_levels():
    x = numbers([-1, 0.3, 0.7, 2])
    q, low, unit = quantize(x, 4)
    assert q.tolist() == [[0, 7, 9, 15]] and unit.item() == pytest.approx(0.2)
    assert dequantize(q, low, unit)[0].tolist() == pytest.approx([-1, 0.4, 0.8, 2])
    q, low, unit = quantize(x, 8)
    assert q.tolist() == [[0, 111, 145, 255]] and q.dtype == torch.uint8
    assert dequantize(q, low, unit)[0].tolist() == pytest.approx(
        [-1, 0.30588, 0.70588, 2], abs=1e-5
    )
    x = normal(7, 40)
    q, low, unit = quantize(x, 8)
    assert ((dequantize(q, low, unit) - x).abs() <= unit / 2 + 1e-12).all()


def test_a_constant_row_survives_the_quantizer():
    x = numbers([0, 0, 0], [3, 3, 3], [-1, 1, -1])
    torch.testing.assert_close(dequantize(*quantize(x, 8)), x)


# ---- DCT-AdamW


@pytest.mark.paper
def test_the_first_step_of_the_worked_example():
    G = numbers([1, 2], [3, 4], [0, 1], [2, 2])
    update, state = low_rank(G, {}, 1, group())
    assert state["idx"].tolist() == [0]
    expected = numbers([-0.5, 0.5], [-0.5, 0.5], [-0.5, 0.5], [0, 0])
    torch.testing.assert_close(state["error"], expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(update, torch.full_like(G, HALF), atol=1e-6, rtol=0)
    moments = [2.12132, 4.94975, HALF, 2.82843]
    assert (state["m"] * 10)[:, 0].tolist() == pytest.approx(moments, abs=1e-5)


@pytest.mark.paper
def test_rotation_is_the_product_of_the_two_bases():
    Q, before, after = basis(10), torch.tensor([2, 5, 9]), torch.tensor([1, 5, 9])
    turn = Q[:, before].T @ Q[:, after]
    expected = numbers([0, 0, 0], [0, 1, 0], [0, 0, 1])
    torch.testing.assert_close(turn, expected, atol=1e-12, rtol=0)
    m, v = normal(12, 3, seed=1), normal(12, 3, seed=2) ** 2
    G = (normal(12, 3, seed=3) * 10) @ Q[:, after].T  # the next selection is `after`
    state = {"idx": before, "m": m, "v": v}
    _, new = low_rank(G, state, 7, group(rank=0.3, feedback=False))
    a = G @ Q[:, after]
    assert new["idx"].tolist() == after.tolist()
    torch.testing.assert_close(new["m"], 0.9 * m @ turn + 0.1 * a)
    torch.testing.assert_close(new["v"], 0.999 * (v @ turn).abs() + 0.001 * a * a)
    _, stale = low_rank(G, state, 7, group(rank=0.3, feedback=False, rotate=False))
    torch.testing.assert_close(stale["m"], 0.9 * m + 0.1 * a)


@pytest.mark.paper
@pytest.mark.parametrize("transform", ["matmul", "fft"])
@pytest.mark.parametrize("bits", [8, 32])
def test_it_is_projected_adamw_with_the_same_columns_and_a_stored_basis(transform, bits):
    gradients = [normal(9, 6, seed=i).float() + 0.5 for i in range(12)]
    options = dict(lr=0.1, rank=0.5, transform=transform, bits=bits)
    ours, _ = walk(lambda p: DCTAdamW(p, **options), gradients)
    theirs, _ = walk(lambda p: Projected(p, 0.1, kind="dct", rank=0.5), gradients)
    apart = (ours[-1] - theirs[-1]).abs()
    assert apart.max() < 1e-5 if bits == 32 else 1e-5 < apart.max() < 1e-3


@pytest.mark.paper
def test_in_the_standard_basis_and_at_full_rank_it_is_adamw(monkeypatch):
    gradients, start = [normal(5, 4, seed=i) for i in range(20)], normal(5, 4, seed=99)

    def adamw(params):
        return torch.optim.AdamW(params, lr=0.05, weight_decay=0.1)

    def ours(params):
        return DCTAdamW(params, lr=0.05, weight_decay=0.1, rank=1.0, bits=32)

    expected, _ = walk(adamw, gradients, start)
    rotated, state = walk(ours, gradients, start)
    assert (rotated[-1] - expected[-1]).abs().max() > 0.01
    assert state["error"].abs().max() < 1e-12
    monkeypatch.setattr(dct_adamw, "dct", lambda n, dtype, device: torch.eye(n, dtype=dtype))
    for a, b in zip(walk(ours, gradients, start)[0], expected):
        torch.testing.assert_close(a, b)
    vector = [normal(7, seed=i) for i in range(20)]  # what is no matrix has AdamW's update
    for a, b in zip(walk(ours, vector)[0], walk(adamw, vector)[0]):
        torch.testing.assert_close(a, b)


@pytest.mark.paper
def test_what_is_left_over_is_added_later_and_stays_bounded():
    state, total, passed, sizes = {}, 0, 0, []
    for t in range(1, 201):
        G = normal(24, 16, seed=t) + 0.5
        A = G + state.get("error", 0)
        _, state = low_rank(G, state, t, group(rank=0.25))
        Q = basis(16)[:, state["idx"]]
        total, passed = total + G, passed + A @ Q @ Q.T
        sizes.append(state["error"].norm().item())
    torch.testing.assert_close(passed + state["error"], total)
    assert max(sizes[100:]) < 2 * max(sizes[:50])


def test_between_two_selections_the_columns_stay():
    state, kept = {}, []
    for t in range(1, 8):
        _, state = low_rank(normal(6, 8, seed=t), state, t, group(gap=3))
        kept.append(state["idx"].tolist())
    assert kept[0] == kept[1] != kept[2]
    assert kept[2] == kept[3] == kept[4] != kept[5]


@pytest.mark.paper
@pytest.mark.parametrize("kind", [DCTAdamW, Trion, Dion, Projected])
def test_a_wide_matrix_is_treated_as_its_transpose(kind):
    gradients = [normal(4, 10, seed=i).float() for i in range(5)]

    def make(params):
        return kind(params, lr=0.1, rank=0.5)

    wide, _ = walk(make, gradients)
    tall, _ = walk(make, [g.T.contiguous() for g in gradients])
    scale = math.sqrt(10 / 4) if kind in (Trion, Dion) else 1.0  # larger steps for tall matrices
    torch.testing.assert_close(wide[-1] * scale, tall[-1].T, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("kind", [DCTAdamW, Trion])
def test_without_a_gradient_the_weights_only_decay(kind):
    start = normal(6, 5)
    weights, _ = walk(
        lambda p: kind(p, lr=0.1, weight_decay=0.5), [torch.zeros(6, 5).double()], start
    )
    torch.testing.assert_close(weights[0], 0.95 * start)
    p = torch.nn.Parameter(start.clone())
    kind([p], lr=0.1, weight_decay=0.5).step()  # no gradient at all: the parameter is not touched
    assert torch.equal(p.detach(), start)


def test_matrices_with_a_long_side_are_left_to_adamw():
    gradients = [normal(5, 40, seed=i) for i in range(4)]
    ours, state = walk(lambda p: DCTAdamW(p, lr=0.1, largest=40), gradients)
    theirs, _ = walk(lambda p: torch.optim.AdamW(p, lr=0.1, weight_decay=0.0), gradients)
    assert state["m"].shape == (5, 40) and "idx" not in state
    torch.testing.assert_close(ours[-1], theirs[-1])
    assert "idx" in walk(lambda p: DCTAdamW(p, lr=0.1, largest=41), gradients)[1]


def test_the_state_is_smaller_than_that_of_adamw():
    big = torch.nn.Linear(256, 512, bias=False)
    full = dct_adamw.cost(big, lambda p: torch.optim.AdamW(p))["state KB"]
    ours = dct_adamw.cost(big, DCTAdamW)["state KB"]
    none = dct_adamw.cost(big, lambda p: DCTAdamW(p, feedback=False))["state KB"]
    # 2 x 4 bytes a weight; a quarter of it with 64 integers; and one byte a weight of feedback
    assert none == pytest.approx(256.5) and ours == pytest.approx(256.5 + 128 + 4)
    assert full == pytest.approx(1024, abs=0.1)
    assert dct_adamw.cost(big, Trion)["state KB"] == pytest.approx(512)


# ---- Trion


@pytest.mark.paper
def test_newton_schulz_moves_singular_values_to_about_one():
    for x, y in ((1, 0.696436), (0.5, 0.765439), (0.1, 0.712120)):
        X = numbers([1.0, 0.0], [0.0, x])
        X = X / X.norm()  # the function divides by the norm itself
        small = orthogonal(X)[1, 1].item() if x < 1 else None
        one = orthogonal(numbers([7.0]))[0, 0].item()
        assert one == pytest.approx(0.696436, abs=1e-5)
        s = X[1, 1].item()
        for _ in range(5):
            s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
        assert small is None or small == pytest.approx(s, abs=1e-6)
        t = float(x)
        for _ in range(5):
            t = 3.4445 * t - 4.7750 * t**3 + 2.0315 * t**5
        assert t == pytest.approx(y, abs=1e-6)
    least = []
    for shape in ((8, 3), (3, 8), (5, 5), (64, 64), (100, 100)):
        X = normal(*shape)
        U, s, V = torch.linalg.svd(X, full_matrices=False)
        inside = U.T @ orthogonal(X) @ V.T  # the singular vectors stay
        torch.testing.assert_close(inside, torch.diag(inside.diag()), atol=1e-9, rtol=0)
        s, found = s / X.norm(), inside.diag()
        assert found[s > 0.002].min() > 0.68 and found.max() < 1.21
        assert (found > 0).all() and (found < 485 * s).all()
        least.append(found.min().item())
    assert min(least) < 0.1  # the smallest values of a random square matrix stay near 0


@pytest.mark.paper
def test_at_full_rank_trion_is_muon():
    options, M, state = group(rank=1.0), 0, {}
    for t in range(4):
        G = normal(7, 5, seed=t)
        update, state = momentum(G, state, options)
        torch.testing.assert_close(update, orthogonal(M + G), atol=1e-12, rtol=0)
        M = 0.95 * (M + G)
        torch.testing.assert_close(state["M"], M)


@pytest.mark.paper
def test_the_momentum_of_trion_keeps_what_the_columns_miss():
    options, state = group(rank=0.4, mu=0.7), {}
    for t in range(3):
        G, before = normal(7, 5, seed=t), state.get("M", 0)
        _, state = momentum(G, state, options)
        B = before + G
        Q = basis(5)[:, top_columns(B @ basis(5), 2, "l2")]
        left = B - B @ Q @ Q.T
        torch.testing.assert_close(state["M"], 0.7 * B + 0.3 * left)


def test_both_transforms_select_the_same_columns():
    G = normal(12, 9)
    for function in (lambda o: low_rank(G, {}, 1, o)[0], lambda o: momentum(G, {}, o)[0]):
        torch.testing.assert_close(function(group()), function(group(transform="fft")))


# ---- saving, and use by other methods


def model_and_steps(make, dtype=torch.float32):
    """A small network with gradients of its own, and a function that makes one step."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(20, 12), torch.nn.Linear(12, 300)).to(dtype)
    taken = make(model.parameters())

    def step(t):
        for i, p in enumerate(model.parameters()):
            p.grad = normal(*p.shape, seed=100 * t + i).to(dtype)
        taken.step()

    return model, taken, step


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [DCTAdamW, Trion])
def test_saved_states_keep_their_dtypes_and_go_on_bit_for_bit(kind, dtype, tmp_path):
    model, taken, step = model_and_steps(kind, dtype)
    for t in range(5):
        step(t)
    torch.save([model.state_dict(), taken.state_dict()], tmp_path / "saved.pt")
    saved = torch.load(tmp_path / "saved.pt")
    other, loaded, again = model_and_steps(kind, dtype)
    other.load_state_dict(saved[0])
    loaded.load_state_dict(saved[1])
    for t in range(5, 9):
        step(t)
        again(t)
    for a, b in zip(model.parameters(), other.parameters()):
        assert torch.equal(a, b) and a.dtype == dtype
    for a, b in zip(taken.state.values(), loaded.state.values()):
        for name, value in a.items():
            same = value == b[name] if name == "step" else torch.equal(value, b[name])
            assert same and (name == "step" or value.dtype == b[name].dtype), name
    if kind is DCTAdamW:
        state = loaded.state[next(iter(other.parameters()))]
        kinds = [state[name].dtype for name in ("idx", "q", "m")]
        assert kinds == [torch.int64, torch.uint8, torch.float32]


class Interrupted(Exception):
    """Ends a training before its end."""


@pytest.mark.parametrize("variant", ["dct_adamw", "trion"])
def test_an_interrupted_training_goes_on_bit_for_bit(tmp_path, variant):
    def train(folder, fail_at=None):
        lab = Lab(Settings(world="bandit", steps=20, lr=0.01), str(tmp_path / folder), quiet=True)
        lab.checkpoint_every = 0.0
        torch.manual_seed(0)
        model, calls = torch.nn.Linear(12, 5), []

        def loss(model, batch):
            if len(calls) == fail_at:
                raise Interrupted
            calls.append(1)
            return (model(batch) - batch[:, :5]).square(), {}

        def make(params):
            return optimizer(params, 0.01, Config(variant))

        batches = [normal(8, 12, seed=i).float() for i in range(7)]
        return lab.fit(model, batches, loss, optimizer=make)

    whole = train("whole")
    with pytest.raises(Interrupted):
        train("cut", 13)
    again = train("cut")
    assert torch.equal(whole.weight, again.weight) and torch.equal(whole.bias, again.bias)


@pytest.mark.slow
def test_any_method_takes_it_as_its_optimizer():
    def trained(**changes):
        settings = Settings(world="bandit", steps=12, lr=0.1, **changes)
        lab = Lab(settings, quiet=True)
        torch.manual_seed(0)
        model = lab.fit(torch.nn.Linear(12, 5), [normal(8, 12).float()], square)
        return model.weight.detach(), dpo.run(lab, dpo.Config()).state_dict()["logits"]

    def square(model, batch):
        return (model(batch) - 1).square(), {}

    for plain, ours in zip(trained(), trained(optimizer="dct_adamw")):
        assert ours.isfinite().all() and not torch.equal(plain, ours)
    (p,) = [torch.nn.Parameter(normal(4, 3))]
    assert type(Lab(Settings(optimizer="dct_adamw"), quiet=True).optimizer([p], 0.1)) is DCTAdamW


def test_optimizers_that_are_none_are_refused():
    for name, words in (("dct_adam", "did you mean dct_adamw"), ("dpo", "no function optimizer")):
        with pytest.raises(UserError, match=words):
            Lab(Settings(world="bandit", optimizer=name), quiet=True)
    with pytest.raises(UserError, match="--optimizer dct_adamw would do nothing"):
        lab = Lab(Settings(world="bandit", optimizer="dct_adamw", steps=2), quiet=True)
        lab.align(lab.base(), [0], None, None, optimizer=torch.optim.SGD)


def test_the_fields_of_a_config_are_those_of_its_optimizer():
    params = [torch.nn.Parameter(normal(4, 3))]
    ours = optimizer(params, 0.1, Config(rank=0.5, gap=2, bits=32, weight_decay=0.2))
    found = ours.param_groups[0]
    assert type(ours) is DCTAdamW and found["lr"] == 0.1
    assert [found[n] for n in ("rank", "gap", "bits", "weight_decay")] == [0.5, 2, 32, 0.2]
    trion = optimizer(params, 0.1, Config("trion", mu=0.5))
    assert type(trion) is Trion and trion.param_groups[0]["mu"] == 0.5
    assert type(optimizer(params, 0.1)) is DCTAdamW
    two = DCTAdamW([dict(params=params, rank=1.0)], lr=0.1)
    assert two.param_groups[0]["rank"] == 1.0


def test_what_makes_no_sense_is_refused():
    params = [torch.nn.Parameter(normal(4, 3))]
    for fields in (dict(rank=0.0), dict(rank=1.1), dict(gap=0), dict(bits=4), dict(score="max")):
        with pytest.raises(UserError):
            DCTAdamW(params, **fields)
        with pytest.raises(UserError):
            Config(**fields)
    with pytest.raises(UserError, match="mu = 1"):
        Trion(params, mu=1)
    with pytest.raises(UserError, match="does nothing with variant = trion"):
        Config("trion", rotate=False)


@pytest.mark.slow
def test_a_run_compares_it_with_adamw():
    settings = Settings(world="reviews", steps=20, batch_size=8, lr=1e-2, eval_every=10)
    table = dct_adamw.run(Lab(settings, quiet=True), Config())
    assert list(table) == ["AdamW", "dct_adamw"]
    assert all(2 < row["loss"] < 6.2 for row in table.values())
    assert table["dct_adamw"]["state KB"] < 0.4 * table["AdamW"]["state KB"]


# ---- the mutants of the core


CASES = [dict()]


def INPUTS():
    calls = [("dct", n, torch.float64, None) for n in (1, 4, 5)]
    calls += [("dct", 3)]
    calls += [("makhoul", normal(3, n)) for n in (1, 4, 5)]
    skew = normal(5, 6) * torch.tensor([1, 5, 1, 3, 1, 4.0])
    calls += [("top_columns", skew, r, score) for r in (1, 2, 3) for score in ("l1", "l2")]
    calls += [
        ("top_columns", numbers([3, 2, 2], [0, 2.1, 0], [0, 0, 2]), 1, s) for s in ("l1", "l2")
    ]
    calls += [("top_columns", skew, r, "l2") for r in (0, 7, 6)]
    calls += [("quantize", normal(4, 7), bits) for bits in (4, 8)]
    calls += [("quantize", numbers([2, 2], [0, 1]), 8), ("quantize", numbers([-3, 1, 0.9]), 4)]
    calls += [
        ("dequantize", torch.tensor([[3, 4]], dtype=torch.uint8), numbers([-1]), numbers([2]))
    ]
    calls += [("orthogonal", normal(*shape)) for shape in ((4, 2), (2, 4), (3, 3))]
    calls += [("orthogonal", 1e-7 * normal(2, 3))]
    m, v, g = normal(4, 3, seed=1), normal(4, 3, seed=2) ** 2, normal(4, 3, seed=3)
    calls += [
        ("adam", g, {}, 1, (0.9, 0.99), 1e-3),
        ("adam", g, dict(m=m, v=v), 4, (0.8, 0.9), 1e-3),
    ]
    G = normal(6, 4, seed=4)
    old = dict(idx=torch.tensor([0, 3]), m=normal(6, 2, seed=5), v=normal(6, 2, seed=6) ** 2)
    states = [old, old | dict(error=normal(6, 4, seed=7))]
    states += [old | dict(zip(("q", "low", "unit"), quantize(normal(6, 4, seed=7), 8)))]
    ways = [group(), group(gap=3), group(feedback=False), group(rotate=False), group(bits=8)]
    ways += [group(transform="fft"), group(rank=0.1), group(rank=0.7, feedback=False)]
    for way in ways:
        calls += [("low_rank", G, {}, 1, way), ("momentum", G, {}, way)]
        calls += [("momentum", G, {"M": normal(6, 4, seed=8)}, way)]
        if way["rank"] == 0.5:
            calls += [("low_rank", G, state, t, way) for state in states for t in (3, 4)]
    return calls


ALIKE = "the two transforms are equal by design"
MEAN = "the norms have the same order"
CHEAP = "the transpose only saves work"
SURVIVORS = {
    "makhoul: torch.arange(n, dtype=A.dtype, device=A.device) -> torch.arange(n, dtype=A.dtype)": (
        "the inputs lie on the CPU"
    ),
    "top_columns: S.abs().sum(0) -> S.abs().mean(0)": MEAN,
    "top_columns: S.square().sum(0) -> S.square().mean(0)": MEAN,
    "quantize: 1.0 -> 2.0": "a constant row has steps of 0 in any unit",
    "orthogonal: X.shape[0] > X.shape[1] -> X.shape[0] < X.shape[1]": CHEAP,
    "orthogonal: 0 -> 1": CHEAP,
}
for name, S in dict(low_rank="A", momentum="B").items():
    choice = f"makhoul({S}) if group['transform'] == 'fft' else {S} @ Q"
    SURVIVORS |= {f"{name}: {choice} -> {part}": ALIKE for part in (f"makhoul({S})", f"{S} @ Q")}
    equal = f"{name}: group['transform'] == 'fft' -> group['transform'] != 'fft'"
    large = f"{name}: max(1, round(group['rank'] * n)) -> max(round(group['rank'] * n), 1)"
    SURVIVORS |= {equal: ALIKE, large: "a maximum is symmetric"}
