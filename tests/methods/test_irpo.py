"""IRPO against its paper: hand-computed lists, closed forms, and DPO and softmax-DPO inside it."""

import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from claims.irpo import (
    ALL_PAIRS,
    ONE,
    all_pairs_loss,
    dpo_loss,
    shuffled_agreement,
    softmax_dpo_loss,
    with_roles,
)
from lab import Lab, Settings
from methods import dpo
from methods.irpo import Config, graded, label_ranks, loss, relevance_weights, run
from tests import builders
from tests.builders import grades, ragged
from toy.exact import minimize
from toy.ranking import ndcg

R, Y, K = (0.5, -0.2, 0.1, -0.4), (0.0, 2.0, 1.0, 0.0), (3, 1, 2, 4)  # the hand case
W = (0.0, 3.0, 0.630930, 0.0)
LSE = (0.453287, 1.430871, 1.043513, 1.673300)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def lists(y, k=None, mask=None):
    """A batch of one-token items: relevance y (K,) or (B, K), ranks k of the same shape or None."""
    y = torch.tensor(y, dtype=torch.float64) if not isinstance(y, torch.Tensor) else y
    y = y.view(-1, y.shape[-1])
    mask = torch.ones(*y.shape, 1, dtype=torch.bool) if mask is None else mask
    batch = SimpleNamespace(mask=mask, scores=y)
    if k is not None:
        batch.rank = torch.as_tensor(k).view(y.shape)
    return batch


def value(r, y, k=None, **fields):
    """Loss and dL/dr of one list with item scores r."""
    logps = torch.tensor(r, dtype=torch.float64)[None, :, None].requires_grad_()
    losses, _ = loss(logps, torch.zeros_like(logps), lists(y, k), Config(**fields))
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    return losses.item(), grad.flatten()


def ragged_lists(seed, rows=5, k=6, length=4):
    """Ragged lists of 2 to k graded items, and how many items each list has."""
    item = ragged(rows, k, length, seed, fewest=2, scores=grades)
    return *item, item[2].mask.any(-1).sum(1)


def item_scores(logps, ref, mask):
    return ((logps - ref) * mask).sum(-1) / mask.sum(-1).clamp(min=1)


def by_hand(r, w, beta, inner, reduce):
    """One list, from the definition, item by item."""
    n, total = len(r), 0.0
    for i in range(n):
        others = [j for j in range(n) if j != i or inner == "incl"]
        z = -torch.logsumexp(torch.stack([beta * (r[j] - r[i]) for j in others]), 0) + (
            math.log(n - 1) if inner == "code" else 0
        )
        total = total - w[i] * F.logsigmoid(z)
    return total / n if reduce == "mean" else total


def free_scores(batch, objective, cfg):
    """The scores r (K,) of one list that minimize a loss, as free parameters."""
    r = torch.zeros(*batch.mask.shape, dtype=torch.float64, requires_grad=True)
    minimize([r], lambda: objective(r, torch.zeros_like(r), batch, cfg)[0].sum())
    return r.detach().flatten()


def optimum(y, k, **fields):
    """p = softmax(beta r) of the free scores that minimize the loss of one list."""
    cfg = Config(**fields)
    return (cfg.beta * free_scores(lists(y, k), loss, cfg)).softmax(0)


# ---- numbers


@pytest.mark.paper
@pytest.mark.parametrize(
    ("inner", "reduce", "expected"),
    [
        ("excl", "sum", 0.598139),
        ("excl", "mean", 0.299069),
        ("code", "sum", 0.598139),
        ("code", "mean", 0.299069),
        ("incl", "sum", 1.036287),
    ],
)
def test_the_loss_has_the_value_of_two_items(inner, reduce, expected):
    assert value((0.3, -0.1), (1.0, 0.0), (1, 2), beta=0.5, inner=inner, reduce=reduce)[
        0
    ] == pytest.approx(expected, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("inner", ["excl", "code"])
def test_two_one_token_items_are_dpo_in_value_and_gradient(inner):
    g = torch.Generator().manual_seed(0)
    logps, ref = (torch.randn(7, 2, 1, generator=g, dtype=torch.float64) for _ in range(2))
    logps.requires_grad_()
    batch = lists(torch.tensor([[1.0, 0.0]] * 7))
    ours, _ = loss(logps, ref, batch, Config(beta=0.3, inner=inner, reduce="sum"))
    theirs, _ = dpo.loss(logps, ref, batch, dpo.Config(beta=0.3))
    torch.testing.assert_close(ours, theirs)
    torch.testing.assert_close(*(torch.autograd.grad(x.sum(), logps)[0] for x in (ours, theirs)))
    halved, _ = loss(logps, ref, batch, Config(beta=0.3, inner=inner, reduce="mean"))
    torch.testing.assert_close(halved, theirs / 2)
    incl, _ = loss(logps, ref, batch, Config(beta=0.3, inner="incl", reduce="sum"))
    assert (incl - theirs).min() > 0.1


@pytest.mark.paper
def test_one_positive_is_softmax_dpo_and_cross_entropy():
    y, k = (1.0, 0.0, 0.0, 0.0), (1, 2, 3, 4)
    ours = value(R, y, k, beta=0.5, inner="excl", reduce="sum")[0]
    r = torch.tensor(R, dtype=torch.float64)
    sdpo = -F.logsigmoid(-torch.logsumexp(0.5 * (r[1:] - r[0]), 0))
    assert ours == pytest.approx(1.150903, abs=1e-6)
    assert (
        ours
        == pytest.approx(sdpo.item())
        == pytest.approx(F.cross_entropy(0.5 * r[None], torch.tensor([0])).item())
    )
    assert value(R, y, k, beta=0.5, inner="code", reduce="mean")[0] == pytest.approx(
        0.135632, abs=1e-6
    )


@pytest.mark.paper
def test_weights_of_the_hand_case():
    got = {
        weights: relevance_weights(lists(Y, K), Config(weights=weights))[0].tolist()
        for weights in ("ndcg", "position", "reciprocal")
    }
    assert got["ndcg"] == pytest.approx(W, abs=1e-6)
    assert got["position"] == pytest.approx([0.5, 1.0, 0.630930, 0.430677], abs=1e-6)
    assert got["reciprocal"] == pytest.approx([0.0, 3.0, 0.5, 0.0], abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("inner", "reduce", "expected", "gradient"),
    [
        ("excl", "sum", 5.784534, (1.410905, -2.299365, 0.314828, 0.573631)),
        ("incl", "sum", 6.459906, (1.171684, -1.932906, 0.284853, 0.476371)),
        ("code", "mean", 0.759806, (0.250580, -0.416720, 0.064262, 0.101878)),
    ],
)
def test_the_loss_and_its_gradient_are_those_of_the_hand_case(inner, reduce, expected, gradient):
    got, grad = value(R, Y, K, beta=1.0, inner=inner, reduce=reduce)
    assert got == pytest.approx(expected, abs=1e-6) and grad.tolist() == pytest.approx(
        gradient, abs=1e-6
    )
    assert grad.sum().item() == pytest.approx(0, abs=1e-12)


@pytest.mark.paper
def test_log_sum_exp_of_each_item():
    for i, expected in enumerate(
        LSE
    ):  # with weight 1 on item i alone the loss is softplus of its log-sum-exp
        y, k = [0.0] * 4, [2, 3, 4]
        y[i] = 1.0
        k.insert(i, 1)
        got = value(R, y, k, beta=1.0, inner="excl", reduce="sum")[0]
        assert math.log(math.expm1(got)) == pytest.approx(expected, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("inner", "reduce", "expected"),
    [("code", "mean", 0.629192), ("excl", "sum", 5.033537), ("incl", "sum", 5.843756)],
)
def test_the_loss_has_its_value_at_the_reference(inner, reduce, expected):
    total = sum(W)
    formula = {
        "code": math.log(2) * total / 4,
        "excl": math.log(4) * total,
        "incl": math.log(5) * total,
    }[inner]
    got = value((0.0,) * 4, Y, K, inner=inner, reduce=reduce)[0]
    assert got == pytest.approx(expected, abs=1e-6) == pytest.approx(formula, abs=1e-6)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0, 20.0])
def test_the_item_itself_is_left_out_whatever_beta(beta):
    """The released code subtracts 100 before multiplying by beta, which fails for a small beta."""
    assert value((0.0,) * 4, Y, K, beta=beta)[0] == pytest.approx(
        math.log(2) * sum(W) / 4, abs=1e-6
    )


@pytest.mark.paper
@pytest.mark.parametrize(
    ("inner", "expected"),
    [
        ("excl", (0.745253, 0.201515, 0.053232)),
        ("incl", (0.677810, 0.246664, 0.075527)),
        ("code", (0.677810, 0.246664, 0.075527)),
    ],
)
def test_optimum_of_free_scores(inner, expected):
    for beta in (1.0, 0.3):
        got = optimum((3.0, 2.0, 1.0), (1, 2, 3), beta=beta, inner=inner)
        assert got.tolist() == pytest.approx(expected, abs=1e-6)


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("inner", ["excl", "incl", "code"])
def test_optimum_is_where_the_weights_say(inner):
    y, k = (1.5, 3.0, 0.5, 2.0, 1.0), (3, 1, 5, 2, 4)
    p, n = optimum(y, k, inner=inner), 5
    w = relevance_weights(lists(y, k), Config())[0]
    shape = {"excl": p, "incl": p * (1 + p), "code": p * (1 + (n - 2) * p)}[inner]
    torch.testing.assert_close(shape / shape.sum(), w / w.sum(), atol=1e-6, rtol=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("beta", [0.5, 2.0])
def test_optimum_of_a_policy_over_the_whole_list(beta):
    """If the list has all responses, the optimum is pi_ref p^(1/beta), normalized."""
    ref = torch.tensor([0.1, 0.6, 0.3], dtype=torch.float64).log()
    logits = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    batch, cfg = lists((3.0, 2.0, 1.0), (1, 2, 3)), Config(beta=beta, inner="excl")

    def value():
        logps = logits.log_softmax(0)[None, :, None]
        return loss(logps, ref[None, :, None], batch, cfg)[0].sum()

    minimize([logits], value)
    w = relevance_weights(batch, cfg)[0]
    torch.testing.assert_close(
        logits.detach().softmax(0),
        (ref + (w / w.sum()).log() / beta).softmax(0),
        atol=1e-6,
        rtol=1e-6,
    )


@pytest.mark.parametrize("reduce", ["sum", "mean"])
@pytest.mark.parametrize("inner", ["excl", "incl", "code"])
@pytest.mark.parametrize("weights", ["ndcg", "position", "reciprocal"])
def test_ragged_lists_against_the_definition(inner, reduce, weights):
    logps, ref, batch, n = ragged_lists(3)
    losses, _ = loss(
        logps, ref, batch, Config(beta=0.7, inner=inner, reduce=reduce, weights=weights)
    )
    r, expected = item_scores(logps, ref, batch.mask), []
    for b in range(len(n)):
        order = sorted(range(n[b]), key=lambda j: -batch.scores[b, j])
        y, k = batch.scores[b].tolist(), {j: place + 1 for place, j in enumerate(order)}
        form = {
            "ndcg": lambda j: (2 ** y[j] - 1) / math.log2(1 + k[j]),
            "position": lambda j: 1 / math.log2(1 + k[j]),
            "reciprocal": lambda j: (2 ** y[j] - 1) / k[j],
        }[weights]
        expected.append(by_hand(r[b, : n[b]], [form(j) for j in range(n[b])], 0.7, inner, reduce))
    torch.testing.assert_close(losses, torch.stack(expected))
    ours, theirs = (
        torch.autograd.grad(x.sum(), logps, retain_graph=True)[0] * batch.mask
        for x in (losses, torch.stack(expected))
    )
    torch.testing.assert_close(ours, theirs)


@pytest.mark.paper
@pytest.mark.parametrize("inner", ["excl", "incl", "code"])
def test_gradient_in_closed_form(inner):
    """dL/dr_k = beta (sum_i w_i a_i rho_ik - w_k a_k), spread evenly over an item's tokens."""
    logps, ref, batch, n = ragged_lists(4)
    cfg = Config(beta=0.7, inner=inner, reduce="sum")
    grad = torch.autograd.grad(loss(logps, ref, batch, cfg)[0].sum(), logps)[0] * batch.mask
    r, w = item_scores(logps, ref, batch.mask).detach(), relevance_weights(batch, cfg)
    for b in range(len(n)):
        m = int(n[b])
        d = 0.7 * (r[b, None, :m] - r[b, :m, None])  # (i, j)
        if inner != "incl":
            d = d.masked_fill(torch.eye(m, dtype=torch.bool), -math.inf)
        rho, z = d.softmax(-1), -d.logsumexp(-1) + (math.log(m - 1) if inner == "code" else 0)
        wa = w[b, :m] * torch.sigmoid(-z)
        torch.testing.assert_close(grad[b, :m].sum(-1), 0.7 * (wa @ rho - wa))
        if inner == "excl":  # the weighted softmax cross-entropy
            p, total = (0.7 * r[b, :m]).softmax(0), w[b].sum()
            torch.testing.assert_close(torch.sigmoid(z), p)
            torch.testing.assert_close(grad[b, :m].sum(-1), 0.7 * (total * p - w[b, :m]))
            entropy = (w[b, :m] * (torch.logsumexp(0.7 * r[b, :m], 0) - 0.7 * r[b, :m])).sum()
            torch.testing.assert_close(loss(logps, ref, batch, cfg)[0][b].detach(), entropy)
    torch.testing.assert_close(
        grad, (grad.sum(-1) / batch.mask.sum(-1).clamp(min=1))[..., None] * batch.mask
    )


def test_gradient_by_finite_differences():
    logps, ref, batch, _ = ragged_lists(5, rows=2, k=3, length=2)
    for inner in ("excl", "incl", "code"):
        assert torch.autograd.gradcheck(
            lambda x: loss(x * batch.mask, ref, batch, Config(inner=inner))[0], logps
        )


@pytest.mark.paper
def test_irrelevant_items_are_driven_away_without_end():
    """With w_k = 0 the gradient on r_k is W p_k beta, which stays positive."""
    for r0 in (0.0, -5.0, -20.0):
        _, grad = value((1.0, 0.2, r0), (2.0, 1.0, 0.0), (1, 2, 3), inner="excl", reduce="sum")
        p = torch.tensor((1.0, 0.2, r0), dtype=torch.float64).softmax(0)[2]
        assert grad[2].item() == pytest.approx((3 + 0.630930) * p.item(), rel=1e-5) and grad[2] > 0


@pytest.mark.paper
def test_drawing_a_competitor_by_rho_has_less_variance_than_uniformly():
    _, grad = value(R, (0.0, 1.0, 0.0, 0.0), (2, 1, 3, 4), inner="excl", reduce="sum")
    rho = grad / -grad[1]  # a (rho - e_i), whose entry of item i is -1
    rho[1] = 0.0
    assert rho.sum().item() == pytest.approx(1)
    steps = torch.eye(4, dtype=torch.float64)[1] - torch.eye(4, dtype=torch.float64)  # e_i - e_j
    mean = rho @ steps

    def variance(chance, draws):
        return (chance * (draws - mean).square().sum(1)).sum().item()

    uniform = torch.tensor([1.0, 0.0, 1.0, 1.0], dtype=torch.float64) / 3
    assert variance(rho, steps) == pytest.approx(0.625678, abs=1e-6)
    assert variance(uniform, 3 * rho[:, None] * steps) == pytest.approx(0.871611, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("inner", ["excl", "incl", "code"])
def test_the_loss_is_invariant_to_shifts_and_to_order(inner):
    logps, ref, batch, _ = ragged_lists(6)
    cfg = Config(beta=0.8, inner=inner)
    before, _ = loss(logps, ref, batch, cfg)
    # one constant on every token of a list is one constant on every item, for scores are means
    torch.testing.assert_close(loss((logps + 3.7) * batch.mask, ref, batch, cfg)[0], before)
    batch.rank = label_ranks(batch) * batch.mask.any(-1)
    torch.testing.assert_close(
        loss(logps, ref, batch, cfg)[0], before
    )  # the ranks that the scores imply
    order = torch.tensor([4, 2, 0, 5, 1, 3])
    moved = lists(batch.scores[:, order], batch.rank[:, order], batch.mask[:, order])
    torch.testing.assert_close(loss(logps[:, order], ref[:, order], moved, cfg)[0], before)


def test_ranks_from_scores_take_ties_as_they_come():
    ranked, plain = lists((1.0, 2.0, 1.0, 0.0), (2, 1, 3, 4)), lists((1.0, 2.0, 1.0, 0.0))
    assert torch.equal(relevance_weights(ranked, Config()), relevance_weights(plain, Config()))
    turned = lists((1.0, 2.0, 1.0, 0.0), (3, 1, 2, 4))  # a column `rank` goes first
    assert not torch.equal(relevance_weights(turned, Config()), relevance_weights(plain, Config()))


@pytest.mark.paper
@pytest.mark.parametrize("inner", ["excl", "incl", "code"])
def test_nothing_relevant_is_a_differentiable_zero(inner):
    logps, ref, batch, _ = ragged_lists(7)
    batch.scores = torch.zeros_like(batch.scores)
    losses, metrics = loss(logps, ref, batch, Config(inner=inner))
    (grad,) = torch.autograd.grad(losses.mean(), logps)
    assert (
        (losses == 0).all()
        and (grad == 0).all()
        and all(torch.isfinite(m) for m in metrics.values())
    )


def test_absent_items_change_nothing():
    logps, ref, batch, n = ragged_lists(8)
    losses, _ = loss(logps, ref, batch, Config())
    for b in range(len(n)):
        alone = lists(batch.scores[b : b + 1, : n[b]], mask=batch.mask[b : b + 1, : n[b]])
        torch.testing.assert_close(
            loss(logps[b : b + 1, : n[b]], ref[b : b + 1, : n[b]], alone, Config())[0][0], losses[b]
        )


def test_losses_are_in_float32_or_better():
    logps = torch.zeros(1, 4, 1, dtype=torch.bfloat16)
    batch = lists(Y, K)
    batch.scores = batch.scores.float()
    assert loss(logps, logps, batch, Config())[0].dtype == torch.float32
    assert loss(logps.double(), logps.double(), batch, Config())[0].dtype == torch.float64


# ---- what the claim compares with


@pytest.mark.paper
def test_baselines_leave_the_relevant_items_unordered():
    """Averaged over the relevant items, both score them equally; IRPO orders them by w."""
    for baseline in (dpo_loss, softmax_dpo_loss):

        def all_choices(logps, ref_logps, batch, cfg):
            total = 0.0
            for winner in range(3):
                batch.role = torch.zeros(1, 4, dtype=torch.float64)
                batch.role[0, winner], batch.role[0, 3] = 1.0, -1.0
                total = total + baseline(logps, ref_logps, batch, cfg)[0]
            return total, {}

        r = free_scores(lists((3.0, 2.0, 1.0, 0.0)), all_choices, ONE)
        assert r[:3].max() - r[:3].min() < 1e-6 and r[0] - r[3] > 5
    r = free_scores(lists((3.0, 2.0, 1.0, 0.0)), loss, Config(inner="excl"))
    torch.testing.assert_close(
        r[:3].softmax(0), tensor((0.745253, 0.201515, 0.053232)), atol=1e-3, rtol=0
    )


def test_the_baselines_have_the_values_of_their_formulas():
    batch = lists(torch.tensor([[1.0, 0.0, 0.0, 2.0]]))
    batch.role = tensor([[1.0, 0.0, -1.0, 0.0]])
    r, zero = tensor(R)[None, :, None], torch.zeros(1, 4, 1, dtype=torch.float64)
    assert dpo_loss(r, zero, batch, replace(ONE, beta=0.5))[0].item() == pytest.approx(
        math.log1p(math.exp(-0.5 * 0.4))
    )
    others = sum(
        math.exp(0.5 * (x - 0.5)) for x in (-0.2, 0.1)
    )  # the other relevant item takes no part
    assert softmax_dpo_loss(r, zero, batch, replace(ONE, beta=0.5))[0].item() == pytest.approx(
        math.log1p(others)
    )


def test_the_loss_on_all_pairs_is_the_mean_of_dpo_over_them():
    """Pairs of different relevance, each on the mean log-ratios of its items."""
    logps, ref, batch, _ = ragged_lists(9)
    batch.parents = torch.arange(-1, 5).expand(5, -1)  # a list in one context is a chain
    r = item_scores(logps, ref, batch.mask)
    for b, found in enumerate(all_pairs_loss(logps, ref, batch, replace(ALL_PAIRS, beta=0.7))[0]):
        y, present = batch.scores[b], batch.mask[b].any(-1)
        better = (y[:, None] > y) & present[:, None] & present
        terms = -F.logsigmoid(0.7 * (r[b][:, None] - r[b]))[better]
        torch.testing.assert_close(found, terms.mean() if len(terms) else found * 0)


def small_ranker(objective, cfg, seed=0):
    """An MLP after 300 steps of 64 lists of 10 of 60 items -> NDCG@1, NDCG@10, KL from uniform."""
    g = torch.Generator().manual_seed(seed)
    torch.manual_seed(seed)
    qualities, grades = (
        torch.randn(60, 8, generator=g),
        torch.tensor([3.0, 2, 2, 1, 1, 0, 0, 0, 0, 0]),
    )
    net = torch.nn.Sequential(torch.nn.Linear(8, 12), torch.nn.Tanh(), torch.nn.Linear(12, 60))
    optimizer = torch.optim.Adam(net.parameters(), 3e-3)

    def draw(n):
        query, items = (
            torch.randn(n, 8, generator=g),
            torch.rand(n, 60, generator=g).argsort(1)[:, :10],
        )
        truth = (qualities[items] @ query[:, :, None])[..., 0]
        return query, items, grades[truth.argsort(1, descending=True).argsort(1)]

    def logps(query, items):
        return net(query).log_softmax(1).gather(1, items)[..., None]

    for _ in range(300):
        query, items, y = draw(64)
        relevant, rows = y > 0, torch.arange(64)
        role = torch.zeros(64, 10)
        role[rows, (relevant + torch.rand(64, 10, generator=g)).argmax(1)] = 1.0
        role[rows, (~relevant + torch.rand(64, 10, generator=g)).argmax(1)] = -1.0
        batch = SimpleNamespace(mask=torch.ones(64, 10, 1, dtype=torch.bool), scores=y, role=role)
        batch.rank = (y + 0.5 * torch.rand(64, 10, generator=g)).argsort(
            1, descending=True
        ).argsort(1) + 1  # ties at random
        optimizer.zero_grad()
        objective(logps(query, items), torch.full((64, 10, 1), -math.log(60)), batch, cfg)[
            0
        ].mean().backward()
        optimizer.step()
    query, items, y = draw(2000)
    with torch.no_grad():
        scores, p = logps(query, items)[..., 0], net(query).log_softmax(1)
    return *(ndcg(scores, y, k).mean().item() for k in (1, 10)), (p.exp() * (p + math.log(60))).sum(
        1
    ).mean().item()


@pytest.mark.slow
def test_the_order_of_the_methods_without_a_language_model():
    """IRPO ranks best of the three; weights by position rank higher still, at a tenth of its KL."""
    dpo_, sdpo = small_ranker(dpo_loss, ONE), small_ranker(softmax_dpo_loss, ONE)
    ours = small_ranker(loss, Config(inner="excl"))
    position = small_ranker(loss, Config(inner="excl", weights="position"))
    assert sdpo[1] > dpo_[1] and ours[0] > sdpo[0] + 0.04 and ours[1] > sdpo[1] + 0.02
    assert ours[0] == pytest.approx(0.834, abs=0.05) and ours[1] == pytest.approx(0.937, abs=0.02)
    assert position[0] == pytest.approx(0.909, abs=0.03) and position[1] == pytest.approx(
        0.968, abs=0.01
    )
    assert ours[2] == pytest.approx(0.57, abs=0.05) and position[2] == pytest.approx(0.07, abs=0.02)


# ---- refusals


def test_lists_that_are_refused():
    def run(batch):
        logps = torch.zeros(batch.mask.shape, dtype=torch.float64)
        return loss(logps, logps, batch, Config())

    empty = torch.ones(1, 3, 1, dtype=torch.bool)
    empty[0, 1] = False
    for batch, message in (
        (lists((1.0,)), "2 responses"),
        (lists((0.0, 0.0, 1.0), mask=empty & torch.tensor([[[0], [0], [1]]])), "2 responses"),
        (lists((1.0, -0.5)), "-0.5"),
        (lists((1.0, float("nan"))), "nan"),
        (lists((1.0, 64.0)), "64"),
        (lists((1.0, 0.0), (1.0, math.nan)), "1 to n"),
        (lists((1.0, 0.0, 0.0), (1, 2, 2)), "1 to n"),
        (lists((1.0, 0.0, 0.0), (0, 1, 2)), "1 to n"),
        (lists((1.0, 0.0, 0.0), (1, 2, 4)), "1 to n"),
        (lists((0.0, 1.0, 0.0), mask=empty), "no scored token"),  # relevance without tokens
        (lists((1.0, 0.0, 0.0), (1, 2, 3), mask=empty), "no scored token"),  # a rank without tokens
    ):
        with pytest.raises(ValueError, match=message):
            run(batch)
    run(lists((1.0, 63.0)))
    absent = lists((1.0, 0.0, 0.0), (1, 0, 2), mask=empty)  # no relevance, no rank: a shorter list
    assert torch.isfinite(run(absent)[0]).all()


@pytest.mark.parametrize(
    "fields",
    [
        dict(beta=0.0),
        dict(beta=-1.0),
        dict(beta=math.inf),
        dict(inner="all"),
        dict(reduce="max"),
        dict(weights="dcg"),
    ],
)
def test_config_is_checked(fields):
    ((name, value),) = fields.items()
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Config(**fields)


def test_sampled_lists_get_sparse_relevance():
    rows = [
        {"scores": s}
        for s in ([-0.3, 1.2, 0.4, -2.0], [1.0, 0.0], [0.0, 1.0, 1.0, 0.0], [-1.0, -1.0, -1.0])
    ]
    assert [row["scores"] for row in graded(rows)] == [
        [0.0, 2.0, 1.0, 0.0],
        [1.0, 0.0],
        [0.0, 1.0, 1.0, 0.0],
        [2.0, 2.0, 2.0],
    ]


@pytest.mark.slow
@pytest.mark.parametrize(
    "world, k, items",
    [("ranking", None, 10), ("ranking", 5, 5), ("reviews", None, 4), ("bandit", 3, 3)],
)
def test_k_is_the_length_of_the_lists(world, k, items):
    seen = []
    text = {} if world == "bandit" else dict(base_steps=1, eval_size=2)  # refused in a table
    settings = Settings(world=world, k=k, steps=1, batch_size=4, prompts=4, **text)
    lab = Lab(settings, quiet=True)
    lab.align = lambda policy, data, loss, cfg: seen.extend(data)
    run(lab, Config())
    assert {len(row["responses"]) for row in seen} == {items} and all(
        min(row["scores"]) >= 0 for row in seen
    )


def graded_rows(y, **columns):
    y = tensor(y)
    return SimpleNamespace(scores=y, mask=torch.ones(*y.shape, 1, dtype=torch.bool), **columns)


def test_disagreement_is_the_weighted_share_of_what_is_not_yet_won():
    r = tensor([[0.5, -0.2, 0.1, -0.4]])[..., None].requires_grad_()
    _, metrics = loss(
        r, torch.zeros_like(r), graded_rows([[0.0, 2.0, 1.0, 0.0]]), Config(inner="excl")
    )
    p, w = r[0, :, 0].softmax(0), tensor([0.0, 3.0, 1 / math.log2(3), 0.0])  # sigmoid(z_i) = p_i
    assert metrics["disagreement"].item() == pytest.approx(((w * (1 - p)).sum() / w.sum()).item())
    assert not metrics["disagreement"].requires_grad


def test_softmax_dpo_leaves_out_absent_items():
    batch = graded_rows([[1.0, 0.0, 0.0]], role=tensor([[1.0, -1.0, 0.0]]))
    r = tensor([[0.3, -0.1, 0.0]])[..., None]
    batch.mask[0, 2] = False
    assert softmax_dpo_loss(r, torch.zeros_like(r), batch, replace(ONE, beta=0.5))[
        0
    ].item() == pytest.approx(math.log1p(math.exp(-0.2)))


def test_roles_are_one_relevant_and_one_irrelevant_item():
    rows, rng = [{"scores": [0.0, 2.0, 0.0, 1.0]}] * 200, torch.Generator().manual_seed(0)
    roles = tensor([row["role"] for row in with_roles(rows, rng)])
    assert (roles.sum(1) == 0).all() and (roles.abs().sum(1) == 2).all()
    assert (roles[:, [1, 3]].max(1).values == 1).all() and (
        roles[:, [0, 2]].min(1).values == -1
    ).all()
    assert ((roles == 1).any(0) == torch.tensor([False, True, False, True])).all() and (
        roles.abs().sum(0) > 60
    ).all()


def test_agreement_of_shuffled_lists_tells_items_from_places():
    """Scores that depend on the items agree in any order of the list; scores of places do not."""
    world = Lab(Settings(world="ranking"), quiet=True).world
    rows = world.lists(40, torch.Generator().manual_seed(0))

    class Scorer:
        def __init__(self, of):
            self.of = of

        def logps(self, batch):
            return self.of(batch)[..., None] * batch.mask

    by_item = Scorer(lambda batch: (batch.target * batch.mask).double().cumsum(-1)[..., -1].sin())
    by_place = Scorer(
        lambda batch: torch.arange(batch.mask.shape[1]).double().expand(batch.mask.shape[:2])
    )
    nothing = Scorer(lambda batch: torch.zeros(batch.mask.shape[:2], dtype=torch.float64))

    def agreement(policy, reference):
        return shuffled_agreement(
            policy, reference, rows, world.tokenizer, torch.Generator().manual_seed(1)
        )

    assert agreement(by_item, nothing) == pytest.approx(1.0, abs=0.02)
    assert agreement(nothing, by_item) == pytest.approx(1.0, abs=0.02)
    assert abs(agreement(by_place, nothing)) < 0.2


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(beta=0.7, inner=i, reduce=r) for i in ("excl", "incl", "code") for r in ("mean", "sum")
] + [dict(beta=0.7, weights=w) for w in ("position", "reciprocal")]
INPUTS = builders.lists
SORTED = "scores.argsort(descending=True"
SURVIVORS = {
    "label_ranks: True -> False": "stable=True: a CPU sorts short rows stably anyway",
    f"label_ranks: {SORTED}, stable=True) -> {SORTED})": "the same",
}
