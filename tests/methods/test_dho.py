"""DHO against its paper: the two gradients, the mix of heads, the search, and what sees what."""

import math

import pytest
import torch
import torch.nn.functional as F

from data import UserError
from lab import Lab, Settings
from methods.dho import ALPHAS, BETAS, Config, DualHead, distilled, mix, run, search, sets, terms
from toy import pixels, warped


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


CE, KD = numbers([2, 0, 1]), numbers([0, 3, 1])


def batch(seed=0, labeled=5, unlabeled=7, classes=4):
    """Random x, y, t, u, v in float64."""
    rng = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=rng)

    y = torch.randint(classes, (labeled,), generator=rng)
    rows = normal(labeled, 3), y, 3 * normal(labeled, classes)
    return (*rows, normal(unlabeled, 3), 3 * normal(unlabeled, classes))


def heads(one=False, classes=4):
    torch.manual_seed(0)
    return DualHead(3, classes, width=8, one=one).double()


def gradient(value, tensors):
    return torch.autograd.grad(value, tensors, allow_unused=True, retain_graph=True)


# ---- the losses


@pytest.mark.paper
def test_the_worked_example_of_the_two_gradients():
    z, t = numbers([1, 0, 0]).requires_grad_(), numbers([0, 2, 0])
    labels, teacher = F.cross_entropy(z, torch.tensor([0])), distilled(z, t, 2.0)
    assert labels.item() == pytest.approx(0.551445, abs=1e-6)
    assert teacher.item() == pytest.approx(0.852313, abs=1e-6)
    a, b = (gradient(value, [z])[0][0] for value in (labels, teacher))
    assert a.tolist() == pytest.approx([-0.423883, 0.211942, 0.211942], abs=1e-6)
    assert b.tolist() == pytest.approx([0.479842, -0.604097, 0.124254], abs=1e-6)
    assert F.cosine_similarity(a, b, dim=0).item() == pytest.approx(-0.752071, abs=1e-6)


@pytest.mark.parametrize("tau", [0.5, 1.0, 4.0])
def test_distillation_is_the_scaled_divergence_of_torch_and_has_the_stated_gradient(tau):
    _, _, t, _, v = batch()
    z = v[: len(t)].clone().requires_grad_()
    p, q = (t / tau).softmax(1), (z / tau).log_softmax(1)
    found = distilled(z, t, tau)
    torch.testing.assert_close(found, tau**2 * F.kl_div(q, p, reduction="batchmean"))
    expected = tau * (q.exp() - p).detach() / len(t)
    torch.testing.assert_close(gradient(found, [z])[0], expected)
    assert torch.autograd.gradcheck(lambda x: distilled(x, t, tau), z)


@pytest.mark.paper
def test_distillation_vanishes_where_student_and_teacher_differ_by_a_constant():
    _, _, t, _, _ = batch()
    z = (t + 5).requires_grad_()
    assert distilled(z, t, 2.0).item() == pytest.approx(0, abs=1e-12)
    assert gradient(distilled(z, t, 2.0), [z])[0].abs().max() < 1e-12
    assert distilled(z * 2, t, 2.0) > 0


@pytest.mark.paper
def test_each_head_sees_its_own_term_and_the_backbone_sees_both():
    model, item = heads(), batch()
    labels, teacher = terms(model, item, Config())
    for value, mine, other in ((labels, model.ce, model.kd), (teacher, model.kd, model.ce)):
        assert all(g is not None and g.any() for g in gradient(value, list(mine.parameters())))
        assert all(g is None for g in gradient(value, list(other.parameters())))
        assert all(g is not None for g in gradient(value, list(model.body.parameters())))


@pytest.mark.paper
def test_tied_heads_are_distillation_on_one_head():
    model, item = heads(one=True), batch()
    x, y, t, u, v = item
    ce, kd = model(x)
    assert torch.equal(ce, kd) and len(list(model.parameters())) == 6
    labels, teacher = terms(model, item, Config(tau=3.0))
    torch.testing.assert_close(labels, F.cross_entropy(ce, y))
    expected = distilled(ce, t, 3.0) + distilled(model(u)[0], v, 3.0)
    torch.testing.assert_close(teacher, expected)


def test_labeled_and_unlabeled_means_are_added():
    model, (x, y, t, u, v) = heads(), batch()
    twice = x, y, t, torch.cat([u, u]), torch.cat([v, v])
    for a, b in zip(terms(model, (x, y, t, u, v), Config()), terms(model, twice, Config())):
        torch.testing.assert_close(a, b)


# ---- the mix


@pytest.mark.paper
@pytest.mark.parametrize(
    ("alpha", "beta", "probs"),
    [
        (0.5, 1, [0.3536, 0.4669, 0.1795]),
        (0.5, 2, [0.4027, 0.3593, 0.2380]),
        (0.5, 0.5, [0.3338, 0.5348, 0.1313]),
        (1, 1, [0.6652, 0.0900, 0.2447]),
        (0, 0.5, [0.0024, 0.9796, 0.0179]),
    ],
)
def test_the_mix_of_the_worked_example(alpha, beta, probs):
    assert mix(CE, KD, alpha, beta)[0].tolist() == pytest.approx(probs, abs=1e-4)


@pytest.mark.paper
def test_the_mix_is_a_distribution_and_its_ends_are_the_heads():
    _, _, ce, _, kd = batch(labeled=7)
    for alpha in (0.0, 0.3, 1.0):
        for beta in (0.25, 1.0, 4.0):
            torch.testing.assert_close(mix(ce, kd, alpha, beta).sum(1), torch.ones(7).double())
    for beta in BETAS:
        assert torch.equal(mix(ce, kd, 1, beta), ce.softmax(1))
        assert torch.equal(mix(ce, kd, 0, beta).argmax(1), kd.argmax(1))
    assert torch.equal(mix(ce, ce, 0.3, 1.0).argmax(1), ce.argmax(1))
    assert torch.equal(mix(ce, kd, 0.2, 1e9).argmax(1), ce.argmax(1))
    assert torch.equal(mix(ce, kd, 0.49, 1e-4).argmax(1), kd.argmax(1))
    assert mix(ce.bfloat16(), kd.bfloat16(), 0.5, 1).dtype == torch.float32


@pytest.mark.paper
def test_the_search_is_at_least_as_accurate_as_either_head():
    for seed in range(5):
        _, y, ce, _, kd = batch(seed, labeled=12, unlabeled=12)
        alpha, beta = search(ce, kd, y, ALPHAS, BETAS)

        def right(probs, y=y):
            return (probs.argmax(1) == y).double().mean()

        assert right(mix(ce, kd, alpha, beta)) >= max(right(ce), right(kd))
    assert ALPHAS[0] == 0 and ALPHAS[-1] == 1 and len(ALPHAS) == 21


def test_of_equal_pairs_the_search_takes_the_first():
    assert search(CE, CE, torch.tensor([0]), [0.0, 0.5, 1.0], [0.5, 1.0]) == (0.0, 0.5)
    assert search(CE, KD, torch.tensor([0]), [0.0, 0.5, 1.0], [1.0, 2.0]) == (1.0, 1.0)
    assert search(CE, KD, torch.tensor([2]), [0.5, 1.0], [1.0]) == (0.5, 1.0)


# ---- the worlds' teachers


def test_the_teacher_of_warped_underrates_the_odd_classes():
    world, rng = warped.World(), torch.Generator().manual_seed(0)
    x, y = world.points(4000, rng)
    truth, teacher = world.bayes(x).argmax(1), world.soft_labels(x).argmax(1)
    assert (truth == y).double().mean() > 0.9
    assert 0.7 < (teacher == y).double().mean() < 0.9
    odd = y % 2 == 1
    assert (teacher == y)[odd].double().mean() < 0.8 < (teacher == y)[~odd].double().mean()
    unbiased = warped.World(bias=0.0)
    torch.testing.assert_close(unbiased.soft_labels(x).softmax(1), world.bayes(x))
    assert unbiased.key() != world.key()


def test_the_teacher_of_pixels_is_good_and_wrong_on_odd_digits():
    world, rng = pixels.World(), torch.Generator().manual_seed(0)
    x, y = world.points(600, rng, held_out=True)
    right = world.soft_labels(x).argmax(1) == y
    assert 0.65 < right.double().mean() < 0.9
    assert right[y % 2 == 1].double().mean() < right[y % 2 == 0].double().mean() - 0.1


def test_labels_validation_and_unlabeled_points_are_apart():
    world = warped.World()
    cfg = Config(shots=3, n=100)
    x, y, val, val_y, u = sets(world, cfg, torch.Generator().manual_seed(0))
    assert torch.bincount(y).tolist() == torch.bincount(val_y).tolist() == [3] * 6
    assert len(u) == 100
    rows = [tuple(row) for part in (x, val, u) for row in part.tolist()]
    assert len(set(rows)) == len(rows) == 100 + 36


def test_a_world_with_few_points_gives_each_of_them_once():
    sizes = Config(shots=8, n=1500)
    parts = sets(pixels.World(), sizes, torch.Generator().manual_seed(0))
    x, _, val, _, u = parts
    rows = [tuple(row) for part in (x, val, u) for row in part.tolist()]
    assert len(set(rows)) == len(rows) == 1797 - 800 and len(u) == 837


# ---- what is refused


def test_what_makes_no_sense_is_refused():
    with pytest.raises(UserError, match="the teacher has logits"):
        distilled(CE, KD[:, :2], 2.0)
    for alpha, beta in ((-0.1, 1), (1.1, 1), (0.5, 0), (0.5, -1), (math.nan, 1)):
        with pytest.raises(UserError, match="alpha"):
            mix(CE, KD, alpha, beta)
    with pytest.raises(UserError, match="has no teacher"):
        run(Lab(Settings(world="blobs"), quiet=True), Config())
    # a digit has about a hundred pictures: others would repeat, in both the labels and the search
    with pytest.raises(UserError, match="--shots 60: pixels has fewer points"):
        run(Lab(Settings(world="pixels"), quiet=True), Config(shots=60))


def test_a_run_compares_heads_and_their_conflict():
    settings = Settings(world="warped", steps=60, lr=1e-2, batch_size=32, eval_every=20)
    table = run(Lab(settings, quiet=True), Config(n=400, alpha=0.5))
    assert list(table)[:4] == ["labels only", "teacher only", "one head", "DHO"]
    assert all(-1 < table[name]["cosine"] < 1 for name in ("one head", "DHO"))
    assert table["DHO"]["alpha"] == 0.5 and table["DHO"]["beta"] in BETAS
    assert all(0.2 < row["accuracy"] <= 1 for row in table.values())


# ---- the mutants of the core


CASES = [dict(), dict(tau=0.7)]


class Fixed:
    """Stands for a model: its heads are two linear maps."""

    def __init__(self):
        rng = torch.Generator().manual_seed(1)
        self.heads = torch.randn(2, 3, 4, dtype=torch.float64, generator=rng)

    def __call__(self, x):
        return x @ self.heads[0], x @ self.heads[1]


def INPUTS():
    x, y, t, u, v = batch()
    z = v[:5].clone().requires_grad_()
    few = x.clone().requires_grad_(), y, t, u.clone().requires_grad_(), v
    calls = [("distilled", z, t, 2.0), ("distilled", z, t[:, :3], 2.0), ("distilled", z, t, 0.7)]
    calls += [("terms", Fixed(), (x, y, t, u, v), "cfg"), ("terms", Fixed(), few, "cfg")]
    calls += [("mix", z, t, alpha, beta) for alpha, beta in ((0.3, 2.0), (1.0, 0.5), (0, 3))]
    calls += [("mix", z, t, alpha, beta) for alpha, beta in ((-0.5, 1.0), (1.5, 1.0), (0.5, 0.0))]
    calls += [("mix", z.detach().bfloat16(), t.bfloat16(), 0.4, 2.0), ("mix", CE, KD, 0.4, 0.5)]
    for seed in range(4):
        _, right, ce, _, kd = batch(seed, labeled=12, unlabeled=12)
        calls += [
            ("search", ce, kd, right, ALPHAS[::5], BETAS),
            ("search", ce, kd, right, [1], [1]),
        ]
    calls += [("search", CE, KD, torch.tensor([2]), [0.5, 1.0], [1.0])]
    return calls


SURVIVORS = {
    "search: (mix(ce, kd, alpha, beta).argmax(1) == y).double().mean() -> "
    "(mix(ce, kd, alpha, beta).argmax(1) == y).double().sum()": "the count has the same order",
}
