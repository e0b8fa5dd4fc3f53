"""LLS against its paper: the exact table, its factorizations, and class posteriors in a domain."""

import numpy as np
import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods.lls import (
    Config,
    anchors,
    discretize,
    frequencies,
    matched,
    most_probable,
    nmf,
    posterior,
    rescaled,
    run,
    shift,
)
from toy import arc


def numbers(rows):
    return torch.tensor(rows, dtype=torch.float64)


# the exact example: inputs 0, 3 and 4 belong to one class each
GIVEN = numbers([[0.6, 0.4, 0, 0, 0], [0, 0.2, 0.5, 0.3, 0], [0, 0, 0.3, 0, 0.7]]).T  # P(x | y)
SHARES = numbers([[0.7, 0.2, 0.1, 0.3], [0.2, 0.6, 0.2, 0.3], [0.1, 0.2, 0.7, 0.4]])  # W
TABLE = GIVEN @ SHARES  # Q_{X|D}
F = TABLE / TABLE.sum(1, keepdim=True)  # p(d | x)


def error(W, truth):
    """The mean over domains of the L1 distance, in the best order of the classes."""
    from itertools import permutations

    return min(
        (W[list(order)] - truth).abs().sum(0).mean().item() for order in permutations(range(len(W)))
    )


def random_table(alpha, seed, inputs=15, k=3, r=6):
    """An exact table with an input of its own for every class -> table, W."""
    rng = np.random.default_rng(seed)
    given = rng.dirichlet([1.0] * inputs, k).T
    given[:k] = np.diag(rng.random(k) * 0.2 + 0.05)
    given = torch.from_numpy(given / given.sum(0))
    W = shift(k, r, alpha, torch.Generator().manual_seed(seed))
    return given @ W, W


# ---- the exact example


@pytest.mark.paper
def test_the_domain_posterior_of_the_example():
    assert F[0].tolist() == pytest.approx([0.5385, 0.1538, 0.0769, 0.2308], abs=1e-4)
    assert F[2].tolist() == pytest.approx([0.1215, 0.3364, 0.2897, 0.2523], abs=1e-4)
    assert F[4].tolist() == pytest.approx([0.0714, 0.1429, 0.5, 0.2857], abs=1e-4)


@pytest.mark.paper
def test_the_class_posterior_of_the_example_is_that_of_bayes():
    for d in range(4):
        domain = torch.full((5,), d)
        found = posterior(F, SHARES, domain)
        exact = GIVEN * SHARES[:, d]
        torch.testing.assert_close(found, exact / exact.sum(1, keepdim=True), rtol=0, atol=1e-12)
    first = posterior(F, SHARES, torch.zeros(5, dtype=torch.long))
    assert first[1].tolist() == pytest.approx([0.875, 0.125, 0], abs=1e-12)
    assert first[2].tolist() == pytest.approx([0, 0.7692, 0.2308], abs=1e-4)


@pytest.mark.paper
def test_anchors_recover_the_example_and_plain_factorization_does_not():
    assert error(anchors(TABLE, 3), SHARES) < 1e-13
    for seed in range(4):
        assert error(nmf(TABLE, 3, seed), SHARES) > 0.1


@pytest.mark.paper
@pytest.mark.parametrize("alpha", [0.5, 3, 10])
def test_anchors_are_exact_on_random_tables_and_nmf_loses_with_less_shift(alpha):
    tables = [random_table(alpha, seed) for seed in range(6)]
    assert max(error(anchors(table, 3), W) for table, W in tables) < 1e-9
    plain = np.mean([error(nmf(table, 3), W) for table, W in tables])
    assert plain > (0.005 if alpha == 0.5 else 0.05)


def test_a_domain_that_no_anchor_tells_of_gets_equal_shares():
    mixed = torch.tensor([[0.5, 0.5, 0.5, 1.0]], dtype=torch.float64)
    pure = torch.cat([0.5 * torch.eye(3, dtype=torch.float64), torch.zeros(3, 1)], 1)
    W = anchors(torch.cat([pure, mixed]), 3)
    assert error(W[:, :3], torch.eye(3)) < 1e-12
    assert W[:, 3].tolist() == pytest.approx([1 / 3] * 3)


# ---- invariances


@pytest.mark.paper
def test_the_order_of_domains_and_copies_of_inputs_change_nothing():
    W = anchors(TABLE, 3)
    order = torch.tensor([2, 0, 3, 1])
    assert error(anchors(TABLE[:, order], 3), W[:, order]) < 1e-12
    copies = torch.cat([TABLE[:1] / 2, TABLE[:1] / 2, TABLE[1:]])
    assert error(anchors(copies, 3), W) < 1e-12
    assert error(anchors(TABLE.flip(0), 3), W) < 1e-12


@pytest.mark.paper
def test_with_one_class_per_domain_the_posterior_is_that_of_the_domain():
    f = torch.rand(7, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    f = f / f.sum(1, keepdim=True)
    eye = torch.eye(3, dtype=torch.float64)
    for d in range(3):  # in domain d every point is of class d
        found = posterior(f, eye, torch.full((7,), d))
        assert torch.equal(found, eye[d].expand(7, 3))
    near = 0.999 * eye + 0.001 / 3
    even = posterior(f, near / near.sum(0), torch.arange(7) % 3)
    assert even.argmax(1).tolist() == [d % 3 for d in range(7)]


@pytest.mark.paper
def test_negative_entries_are_clipped_before_they_flip_the_classes():
    plain, given = numbers([[-0.05, 0.2, -0.4]]), numbers([0.3, 0.1, 0.6])
    unclipped = (given * plain) / (given * plain).sum(1, keepdim=True)
    assert unclipped.argmax().item() == 2
    W = torch.stack([given, 1 - given], 1)  # (3, 2) would lack rank, so it is made square
    W = torch.cat([W, numbers([[0.2], [0.5], [0.3]])], 1)
    f = plain @ (W / W.sum(1, keepdim=True))  # pinv gives `plain` back
    found = posterior(f, W, torch.tensor([0]))
    assert found.tolist() == [[0, 1, 0]]


def test_where_all_entries_are_clipped_the_domain_decides():
    f = -F[:2]
    found = posterior(f, SHARES, torch.tensor([0, 2]))
    given = (SHARES / SHARES.sum(1, keepdim=True)).T
    torch.testing.assert_close(found, given[[0, 2]] / given[[0, 2]].sum(1, keepdim=True))


# ---- tables


def test_frequencies_are_counted_by_domain_and_empty_cells_are_left_out():
    cell = torch.tensor([0, 0, 2, 2, 2, 0])
    domain = torch.tensor([0, 1, 0, 0, 1, 1])
    found = frequencies(cell, domain, 4, 2)
    torch.testing.assert_close(found, numbers([[1 / 3, 2 / 3], [2 / 3, 1 / 3]]))


def test_factors_of_any_scale_give_columns_that_sum_to_1():
    scale = numbers([2.0, 0.1, 7.0])
    W = rescaled(GIVEN * scale, SHARES / scale[:, None])
    torch.testing.assert_close(W, SHARES)
    torch.testing.assert_close(rescaled(3 * GIVEN * scale, SHARES / scale[:, None]), SHARES)


def test_shares_are_distributions_that_shift_less_for_a_larger_alpha():
    rng = torch.Generator().manual_seed(0)
    few, many = shift(3, 6, 0.5, rng), shift(3, 6, 10.0, rng)
    for W in (few, many):
        torch.testing.assert_close(W.sum(0), torch.ones(6, dtype=torch.float64))
        assert torch.linalg.cond(W) < 8
    assert few.std() > many.std()


@pytest.mark.parametrize("cells", ["kmeans", "grid"])
def test_points_of_the_simplex_that_are_equal_share_a_cell(cells):
    f = F[torch.arange(500) % 5]
    cell, count = discretize(f, 5, cells)
    # two of the five points are in one cell of the grid
    assert len(cell.unique()) == (5 if cells == "kmeans" else 4) and cell.max() < count
    assert (cell.view(-1, 5) == cell[:5]).all()
    some = torch.cat([f, numbers([[0.25] * 4])])  # one point alone
    if cells == "grid":
        assert discretize(some, 5, cells)[0][-1] == discretize(some, 5, cells)[1] - 1


def test_classes_are_matched_by_their_overlap():
    truth = torch.tensor([0, 0, 1, 1, 2, 2])
    found = torch.tensor([2, 2, 0, 0, 1, 0])
    assert matched(found, truth, 3).tolist() == [1, 2, 0]


# ---- what is refused


def test_what_cannot_be_identified_is_refused():
    with pytest.raises(UserError, match="fewer than 3 classes"):
        anchors(TABLE[:2], 3)
    with pytest.raises(UserError, match="fewer than 3 classes"):
        anchors(TABLE[:, :2], 3)
    same = GIVEN @ SHARES[:, :1].expand(-1, 4)
    with pytest.raises(UserError, match="do not differ enough"):
        anchors(same, 3)
    with pytest.raises(UserError, match="full rank"):
        posterior(F, SHARES[:, :1].expand(-1, 4), torch.zeros(5, dtype=torch.long))
    with pytest.raises(UserError, match="a domain has no points"):
        frequencies(torch.tensor([0, 1]), torch.tensor([0, 0]), 2, 2)
    lab = Lab(Settings(world="blobs"), quiet=True)
    with pytest.raises(UserError, match="as many domains"):
        run(lab, Config(domains=2))
    lab.fit = None  # before any training
    with pytest.raises(UserError, match="2 clusters: blobs has 3 classes"):
        run(lab, Config(clusters=2))
    with pytest.raises(UserError, match="clusters does nothing"):
        Config(cells="grid", clusters=5)
    for fields in (dict(domains=200), dict(clusters=101)):
        with pytest.raises(UserError, match="fewer points than domains or clusters"):
            run(lab, Config(n=100, **fields))


def test_a_run_finds_classes_that_do_not_look_alike():
    lab = Lab(Settings(world="blobs", steps=150, lr=1e-2, batch_size=128), quiet=True)
    table = run(lab, Config(n=3000))
    assert list(table) == ["DDFA, NMF", "DDFA, SPA", "oracle W", "k-means on x", "Bayes"]
    accuracy = {name: row["accuracy"] for name, row in table.items()}
    assert accuracy["k-means on x"] < 0.7 < 0.85 < accuracy["DDFA, SPA"] <= accuracy["Bayes"] + 0.02
    assert table["DDFA, SPA"]["L1 error of p(y|d)"] < table["k-means on x"]["L1 error of p(y|d)"]


def test_the_bayes_row_knows_how_frequent_the_classes_of_the_world_are():
    world, rng = arc.World(), torch.Generator().manual_seed(0)
    for shares in (numbers([0.5, 0.5]), world.class_shares, numbers([0.3, 0.7])):
        x, y = world.points(20000, rng, shares=shares)
        best = most_probable(world, x, shares.expand(len(x), 2))
        # in each stripe it is the more frequent class
        stripe = (torch.atan2(x[:, 1], x[:, 0]) / (torch.pi / 2) * 6).long()
        for s in range(6):
            ours, classes = best[stripe == s], y[stripe == s]
            assert (ours == classes.mode().values).all(), shares


# ---- the mutants of the core


CASES = [dict()]


def INPUTS():
    rng = torch.Generator().manual_seed(0)
    cell, domain = torch.randint(5, (40,), generator=rng), torch.randint(4, (40,), generator=rng)
    table, W = random_table(3, 0)
    rough = table * (1 + 0.2 * torch.rand(table.shape, generator=rng, dtype=torch.float64))
    mixed = torch.rand(6, 6, generator=rng, dtype=torch.float64) - 0.3
    places = torch.arange(6)
    same = GIVEN @ SHARES[:, :1].expand(-1, 4)
    empty = torch.zeros(3, dtype=torch.float64)
    calls = [("frequencies", cell, domain, 7, 4), ("frequencies", cell, domain * 0, 7, 4)]
    calls += [("frequencies", cell, domain.clamp(max=2), 7, 4)]
    calls += [("anchors", x, 3) for x in (TABLE, rough, same, TABLE[:2], TABLE[:, :2])]
    calls += [("anchors", GIVEN @ numbers([[1, 0, 0.5], [0, 0, 0.5], [0, 1, 0]]), 3)]
    calls += [("anchors", table[:3].abs() + 0.1 * torch.eye(3, 6), 3)]
    lonely = torch.tensor([[0.5, 0, 0, 0], [0, 0.5, 0, 0], [0, 0, 0.5, 0], [0.5, 0.5, 0.5, 1]])
    calls += [("anchors", lonely.double(), 3)]
    alone = torch.cat([cell, torch.tensor([6])]), torch.cat([domain, torch.tensor([3])])
    calls += [("frequencies", *alone, 7, 4)]
    worse = numbers([[0.9, 0.1, 0], [0, 0.3, 0.7], [0.5, 0.5, 0], [0.1, 0.1, 0.8]])
    calls += [
        ("anchors", worse, 3),
        ("anchors", torch.cat([rough[:, :4].flip(1), worse @ worse.T]), 4),
    ]
    scale = numbers([0.2, 0.05, 0.1])
    calls += [("rescaled", GIVEN * scale, SHARES), ("rescaled", GIVEN, SHARES * empty[:, None])]
    calls += [("posterior", F, SHARES, torch.tensor([0, 1, 2, 3, 0]))]
    calls += [("posterior", mixed, W, places), ("posterior", -F, SHARES, torch.arange(5) % 4)]
    calls += [("posterior", F, SHARES[:, :1].expand(-1, 4), torch.arange(5) % 4)]
    thin = torch.cat([W[:2], W[:1] + 1e-8 * W[2:]])
    calls += [("posterior", mixed, thin, places)]
    zero = torch.cat([torch.eye(3), torch.eye(3)], 1).double()
    calls += [("posterior", torch.eye(6, dtype=torch.float64), zero, places.flip(0))]
    return calls


COMMON = "a common factor of all rows or columns cancels"
SIGN = "a mean is 0 or positive where the sum is"
SURVIVORS = {
    "frequencies: counts.sum(0) -> counts.mean(0)": SIGN,
    "frequencies: counts.sum(1) -> counts.mean(1)": SIGN,
    "rescaled: C.sum(0) -> C.mean(0)": COMMON,
    "posterior: W.sum(1, keepdim=True) -> W.mean(1, keepdim=True)": COMMON,
    "posterior: plain.sum(1, keepdim=True) -> plain.mean(1, keepdim=True)": SIGN,
    "posterior: 1.0 -> 2.0": COMMON,
}
