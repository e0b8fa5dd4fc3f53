"""TPO against its paper: pair weights, step weights, trees, the released code, errors."""

import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from claims.tpo import best_and_worst, dpo_on
from data import collate, paths
from lab import Lab, Settings
from methods import dpo
from methods.tpo import Config, loss, prepare, run, step_places
from tests import builders
from toy.chains import grown

PLAIN = dict(asr=False, divide=False, beta=1.0)


def flat(rewards, scores):
    """A list of one-token responses with these log-ratios -> logps (1, K, 1), ref_logps, batch."""
    logps = torch.tensor(rewards, dtype=torch.float64)[None, :, None].requires_grad_()
    scores = torch.tensor([scores], dtype=torch.float64)
    return (
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool), scores=scores),
    )


def forest(rows=4, seed=0, length=3, hidden=5):
    """Random trees of 7 nodes: 0-1-2, 0-3, 0-4-5 and 6, which is absent in every other row."""
    rng = torch.Generator().manual_seed(seed)
    parents = torch.tensor([-1, 0, 1, 0, 0, 4, -1]).expand(rows, -1)
    count = torch.randint(1, length + 1, (rows, 7), generator=rng)
    count[::2, -1] = 0
    mask = torch.arange(length) < count[..., None]
    logps, ref_logps = (
        -3 * torch.rand(rows, 7, length, generator=rng, dtype=torch.float64) * mask
        for _ in range(2)
    )
    scores = torch.zeros(rows, 7, dtype=torch.float64)
    for leaf in (2, 3, 5, 6):
        scores[:, leaf] = torch.rand(rows, generator=rng, dtype=torch.float64) * mask[:, leaf].any(
            -1
        )
    states = torch.randn(rows, 7, hidden, generator=rng, dtype=torch.float64) * mask.any(
        -1, keepdim=True
    )
    return (
        logps.requires_grad_(),
        ref_logps,
        SimpleNamespace(mask=mask, scores=scores, parents=parents, states=states),
    )


def by_hand(logps, ref_logps, batch, cfg, b):
    """The loss of row b, from the formulas, with loops."""
    g, count = (logps - ref_logps)[b].sum(-1), batch.mask[b].sum(-1)
    parents, leaves, routes = batch.parents[b].tolist(), [], []
    for i in range(len(parents)):
        if batch.mask[b, i].any() and i not in parents:
            route = [i]
            while parents[route[0]] >= 0:
                route.insert(0, parents[route[0]])
            leaves.append(i)
            routes.append(route)
    last = min(map(len, routes)) - 1
    steps = [
        [[k for n, k in enumerate(route) if min(n, last) == d] for d in range(last + 1)]
        for route in routes
    ]
    value = {
        tuple(step): g[step].sum() / (count[step].sum() if cfg.reduce == "mean" else 1)
        for chain in steps
        for step in chain
    }
    v = batch.scores[b, leaves]
    by = (
        [sum(value[tuple(step)] for step in chain).item() for chain in steps]
        if cfg.tau == "model"
        else v.tolist()
    )
    by = list(zip(by, v.tolist()))
    tau = [0.5 + sum((x > y) + (x == y) / 2 for x in by) for y in by]
    total, weight = 0.0, 0.0
    for i in range(len(leaves)):
        for j in range(len(leaves)):
            if v[i] > v[j]:
                lam = 1.0
                if cfg.tau != "none":
                    lam = (2 ** v[i].item() - 2 ** v[j].item()) * abs(
                        1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j])
                    )
                margin = 0.0
                for one, other in zip(steps[i], steps[j]):
                    w = 1.0
                    if cfg.asr:
                        u = [
                            batch.states[b, k].sum(0) / batch.mask[b, k].sum() for k in (one, other)
                        ]
                        w = 1 + F.cosine_similarity(*u, dim=0)
                    margin = margin + cfg.beta * w * (value[tuple(one)] - value[tuple(other)])
                total, weight = total - lam * F.logsigmoid(margin), weight + lam
    return total / weight if cfg.divide else total


@pytest.mark.paper
@pytest.mark.parametrize("tau", ["model", "label"])
def test_a_pair_without_step_weights_is_dpo_times_a_constant(tau):
    logps, ref_logps, batch = flat([0.3, -0.5], [1.0, 0.0])
    ours = loss(logps, ref_logps, batch, Config(**PLAIN | dict(beta=0.7, tau=tau)))[0]
    theirs = dpo.loss(logps, ref_logps, batch, dpo.Config(0.7))[0]
    assert (ours / theirs).item() == pytest.approx(0.532456, abs=1e-6)
    divided = loss(logps, ref_logps, batch, Config(0.7, tau=tau, asr=False))[0]
    torch.testing.assert_close(divided, theirs, rtol=0, atol=1e-12)
    torch.testing.assert_close(
        dpo_on(best_and_worst)(logps, ref_logps, batch, Config(0.7))[0], theirs, rtol=0, atol=1e-12
    )


def test_dpo_on_two_responses_of_a_tree_is_dpo_on_their_paths():
    logps, ref_logps, batch = forest()
    batch.scores = batch.mask.any(-1) * torch.tensor([0.0, 0.0, 0.8, 0.1, 0.0, 0.5, 0.3])
    node, cfg = (logps - ref_logps).sum(-1), dpo.Config(0.7)
    best, worst = node[:, :3].sum(-1), node[:, 0] + node[:, 3]
    found = dpo_on(best_and_worst)(logps, ref_logps, batch, cfg)[0]
    torch.testing.assert_close(found, -F.logsigmoid(0.7 * (best - worst)), rtol=0, atol=1e-12)
    logps, ref_logps, batch = flat([0.2, 0.5, -0.1], [0.6, 0.6, 0.6])
    assert dpo_on(best_and_worst)(logps, ref_logps, batch, cfg)[0].item() == 0  # they tie
    batch.scores[0, 2] = 0.1
    found = dpo_on(best_and_worst)(logps, ref_logps, batch, cfg)[0].item()
    assert found == pytest.approx(math.log1p(math.exp(-0.7 * 0.3)), abs=1e-12)


@pytest.mark.paper
def test_without_pair_weights_all_pairs_are_dpo():
    logps, ref_logps, batch = flat([0.2, 0.5, -0.1, 0.0], [1.0, 0.6, 0.3, 0.0])
    r = logps[0, :, 0]
    expected = -sum(F.logsigmoid(r[i] - r[j]) for i in range(4) for j in range(i + 1, 4))
    torch.testing.assert_close(
        loss(logps, ref_logps, batch, Config(**PLAIN | dict(tau="none")))[0][0],
        expected,
        rtol=0,
        atol=1e-12,
    )


@pytest.mark.paper
@pytest.mark.parametrize(
    "tau, value, slopes",
    [
        ("label", 1.130402, (-0.753893, 0.072828, 0.242930, 0.438135)),
        ("model", 0.752251, (-0.327685, -0.075147, 0.165214, 0.237618)),
    ],
)
def test_the_loss_has_the_value_of_the_hand_case(tau, value, slopes):
    logps, ref_logps, batch = flat([0.2, 0.5, -0.1, 0.0], [1.0, 0.6, 0.3, 0.0])
    losses, metrics = loss(logps, ref_logps, batch, Config(**PLAIN | dict(tau=tau)))
    assert losses.item() == pytest.approx(value, abs=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert grad.flatten().tolist() == pytest.approx(slopes, abs=1e-6) and grad.sum().abs() < 1e-12
    lam = {"label": 1.859695, "model": 0.2579 + 0.2221 + 0.1889 + 0.2337 + 0.3720 + 0.0231}[tau]
    assert (
        metrics["pair_weight"].item() == pytest.approx(lam, abs=2e-4)
        and metrics["step_weight"].item() == 1.0
    )


@pytest.mark.paper
def test_at_the_reference_the_loss_is_ln_2_times_the_weights():
    logps, _, batch = flat([0.2, 0.5, -0.1, 0.0], [1.0, 0.6, 0.3, 0.0])
    assert loss(logps, logps.detach(), batch, Config(**PLAIN | dict(tau="label")))[
        0
    ].item() == pytest.approx(1.289042, abs=1e-6)
    assert loss(logps, logps.detach(), batch, Config(asr=False))[0].item() == pytest.approx(
        math.log(2), abs=1e-12
    )


def two_chains(g, cosines):
    """Two responses that share no node, with these log-ratios and cosines between their steps."""
    n = len(cosines)
    parents = torch.tensor([[*range(-1, n - 1), -1, *range(n, 2 * n - 1)]])
    logps = torch.tensor(g, dtype=torch.float64).view(1, 2 * n, 1).requires_grad_()
    states = torch.zeros(1, 2 * n, 2, dtype=torch.float64)
    states[0, :n, 0] = 3.0
    for k, c in enumerate(cosines):
        states[0, n + k] = torch.tensor([c, math.sqrt(1 - c * c)]) * (1 + k)
    scores = torch.zeros(1, 2 * n, dtype=torch.float64)
    scores[0, n - 1] = 1.0
    mask = torch.ones(1, 2 * n, 1, dtype=torch.bool)
    return (
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=mask, scores=scores, parents=parents, states=states),
    )


@pytest.mark.paper
def test_step_weights_by_hand():
    item = two_chains([[0.4, 0.3, 0.1], [0.4, -0.2, 0.5]], [1.0, 0.2, 0.8])
    losses, metrics = loss(*item, Config(0.5))
    assert losses.item() == pytest.approx(
        0.723597, abs=1e-6
    )  # the margin is -0.06, since the weights change its sign
    assert metrics["step_weight"].item() == pytest.approx(5 / 3, abs=1e-6)
    (grad,) = torch.autograd.grad(losses.sum(), item[0])
    slope = (
        0.5
        * torch.sigmoid(torch.tensor(0.06, dtype=torch.float64))
        * torch.tensor([2.0, 1.2, 1.8], dtype=torch.float64)
    )
    torch.testing.assert_close(
        grad.flatten(), torch.cat([-slope, slope]), rtol=0, atol=1e-6, check_dtype=False
    )
    assert loss(*item, Config(0.5, asr=False))[0].item() == pytest.approx(0.668460, abs=1e-6)


@pytest.mark.paper
def test_equal_steps_count_twice_and_opposite_ones_not_at_all():
    item = two_chains([[0.4, 0.3], [0.1, -0.2]], [1.0, -1.0])
    (grad,) = torch.autograd.grad(loss(*item, Config(0.5))[0].sum(), item[0])
    assert grad[0, [1, 3]].abs().max() < 1e-12 and grad[0, 0].item() < -0.1
    both = two_chains([[0.4, 0.3], [0.1, -0.2]], [1.0, 1.0])
    torch.testing.assert_close(
        loss(*both, Config(0.5))[0], loss(*both, Config(1.0, asr=False))[0], rtol=0, atol=1e-12
    )


@pytest.mark.parametrize("tau", ["model", "label", "none"])
@pytest.mark.parametrize("asr", [True, False])
@pytest.mark.parametrize("how", [dict(), dict(reduce="mean"), dict(divide=False)])
def test_random_trees_against_loops(tau, asr, how):
    logps, ref_logps, batch = forest()
    cfg = Config(0.8, tau=tau, asr=asr, **how)
    losses = loss(logps, ref_logps, batch, cfg)[0]
    (grad,) = torch.autograd.grad(losses.sum(), logps, retain_graph=True)
    hand = torch.stack([by_hand(logps, ref_logps, batch, cfg, b) for b in range(4)])
    torch.testing.assert_close(losses, hand, rtol=0, atol=1e-10)
    torch.testing.assert_close(grad, torch.autograd.grad(hand.sum(), logps)[0], rtol=0, atol=1e-10)


@pytest.mark.parametrize("tau", ["model", "label", "none"])
def test_no_gradient_reaches_the_weights(tau):
    logps, ref_logps, batch = forest()
    plain = torch.autograd.grad(loss(logps, ref_logps, batch, Config(tau=tau))[0].sum(), logps)[0]
    batch.scores, batch.states = batch.scores.requires_grad_(), batch.states.requires_grad_()
    losses, metrics = loss(logps, ref_logps, batch, Config(tau=tau))
    losses.sum().backward()
    assert batch.scores.grad is None and batch.states.grad is None
    assert not any(value.requires_grad for value in metrics.values())
    torch.testing.assert_close(logps.grad, plain, rtol=0, atol=0)


def test_states_that_depend_on_the_policy_pass_no_gradient_on():
    logps, ref_logps, batch = forest()
    weight = torch.ones((), dtype=torch.float64, requires_grad=True)
    states, shift = batch.states, torch.arange(5, dtype=torch.float64)
    batch.states = states + (weight - 1) * shift
    found = loss(weight * logps.detach(), ref_logps, batch, Config(tau="label"))[0].sum()
    batch.states = states
    known = loss(weight * logps.detach(), ref_logps, batch, Config(tau="label"))[0].sum()
    assert torch.equal(*(torch.autograd.grad(x, weight)[0] for x in (found, known)))


def test_paths_and_merged_steps():
    _, _, batch = forest()
    on, leaf = paths(batch)
    assert (
        on[1, 5].tolist() == [True, False, False, False, True, True, False] and on[1, 6].sum() == 1
    )
    assert leaf[1].tolist() == [False, False, True, True, False, True, True] and not leaf[0, 6]
    parts = step_places(on, leaf)
    assert parts[0, 2, :, 0].nonzero().flatten().tolist() == [0] and parts[
        0, 2, :, 1
    ].nonzero().flatten().tolist() == [1, 2]
    assert parts[1, 2, :, 0].sum() == 3  # a response of one step: all is one step
    flat_on, flat_leaf = paths(SimpleNamespace(mask=batch.mask))
    assert (flat_on == torch.eye(7).bool()).all() and (flat_leaf == batch.mask.any(-1)).all()


@pytest.mark.paper
def test_a_shared_step_has_no_gradient():
    logps, ref_logps, batch = forest()
    batch.scores[:, 6] = 0.0
    alone = SimpleNamespace(**vars(batch) | dict(mask=batch.mask & (torch.arange(7) != 6)[:, None]))
    (grad,) = torch.autograd.grad(loss(logps, ref_logps, alone, Config())[0].sum(), logps)
    assert grad[:, 0].abs().max() < 1e-12 and grad[:, 1:6].abs().amax(-1).min(0).values.max() > 1e-3


@pytest.mark.paper
def test_the_order_of_the_list_does_not_matter():
    logps, ref_logps, batch = flat([0.2, 0.5, -0.1, 0.0], [0.6, 1.0, 0.3, 0.0])
    batch.states = torch.randn(
        1, 4, 3, generator=torch.Generator().manual_seed(1), dtype=torch.float64
    )
    order = [2, 0, 3, 1]
    moved = SimpleNamespace(
        mask=batch.mask, scores=batch.scores[:, order], states=batch.states[:, order]
    )
    for cfg in (Config(), Config(asr=False)):
        there, back = (
            loss(logps, ref_logps, batch, cfg)[0],
            loss(logps[:, order], ref_logps, moved, cfg)[0],
        )
        torch.testing.assert_close(there, back, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "tau, rewards, scores, value",
    [  # ranks, where rewards tie: by score, then the mean; by the label: 1, 2.5, 2.5, 4.5, 4.5
        ("model", [0.0] * 5, [1.0, 0.6, 0.3, 0.0, 0.0], (1.0, 2.0, 3.0, 4.5, 4.5)),
        ("model", [0.2, 0.2, -0.1, 0.2, 0.5], [1.0, 0.6, 0.3, 0.6, 0.0], (2.0, 3.5, 5.0, 3.5, 1.0)),
        ("label", [0.2, 0.5, -0.1, 0.0, 0.3], [1.0, 0.3, 0.3, 0.0, 0.0], (1.0, 2.5, 2.5, 4.5, 4.5)),
    ],
)
def test_ties_do_not_depend_on_the_order_of_the_list(tau, rewards, scores, value):
    logps, ref_logps, batch = flat(rewards, scores)
    cfg = Config(**PLAIN | dict(tau=tau))
    losses = loss(logps, ref_logps, batch, cfg)[0]
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    pairs = [(i, j) for i in range(5) for j in range(5) if scores[i] > scores[j]]
    lam = {
        (i, j): (2 ** scores[i] - 2 ** scores[j])
        * abs(1 / math.log(1 + value[i]) - 1 / math.log(1 + value[j]))
        for i, j in pairs
    }
    expected = sum(w * math.log1p(math.exp(rewards[j] - rewards[i])) for (i, j), w in lam.items())
    assert losses.item() == pytest.approx(expected, abs=1e-12)
    for order in ([4, 3, 2, 1, 0], [2, 0, 4, 1, 3], [1, 3, 0, 2, 4]):
        moved, _, other = flat([rewards[i] for i in order], [scores[i] for i in order])
        there = loss(moved, ref_logps, other, cfg)[0]
        torch.testing.assert_close(there, losses, rtol=0, atol=1e-12)
        torch.testing.assert_close(
            torch.autograd.grad(there.sum(), moved)[0], grad[:, order], rtol=0, atol=1e-12
        )


def test_a_merged_step_has_the_mean_of_its_tokens():
    mask = torch.arange(4) < torch.tensor([4, 1, 1])[None, :, None]
    logps = torch.tensor([[[0.1] * 4, [1.0, 0, 0, 0], [0.0] * 4]], dtype=torch.float64)
    batch = SimpleNamespace(
        mask=mask, scores=torch.tensor([[0.0, 1.0, 0.0]]), parents=torch.tensor([[-1, 0, -1]])
    )
    losses = loss(logps, 0 * logps, batch, Config(1.0, tau="none", asr=False, reduce="mean"))[0]
    assert losses.item() == pytest.approx(math.log1p(math.exp(-1.4 / 5)), abs=1e-12)


def test_a_verifier_has_no_labels_to_flip():
    settings = Settings(world="arithmetic", base_steps=2, prompts=4, k=3, flip=0.2)
    with pytest.raises(ValueError, match="--flip"):
        run(Lab(settings, quiet=True), Config())


@pytest.mark.paper
def test_equal_scores_teach_nothing():
    logps, ref_logps, batch = flat([0.2, 0.5, -0.1], [0.4, 0.4, 0.4])
    for tau in ("model", "label", "none"):
        losses = loss(logps, ref_logps, batch, Config(asr=False, tau=tau))[0]
        assert losses.item() == 0 and (torch.autograd.grad(losses.sum(), logps)[0] == 0).all()
    assert dpo_on(best_and_worst)(logps, ref_logps, batch, Config())[0].item() == 0


@pytest.mark.paper
def test_the_released_outer_loss_lowers_the_best():
    """It is -log sigmoid(beta R), R a ranking loss over all ordered pairs and the diagonal."""
    r = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    better = torch.tensor(
        [[0.0, 1.0, 1.0], [-1.0, 0.0, 1.0], [-1.0, -1.0, 0.0]], dtype=torch.float64
    )
    ranking = -F.logsigmoid(better * (r[:, None] - r)).sum() / 6
    outer = -F.logsigmoid(0.5 * ranking)
    (grad,) = torch.autograd.grad(outer, r)
    assert outer.item() == pytest.approx(0.466625, abs=1e-6)
    assert grad.tolist() == pytest.approx([0.062147, 0.0, -0.062147], abs=1e-6)
    logps, ref_logps, batch = flat([0.0, 0.0, 0.0], [1.0, 0.5, 0.0])
    ours = torch.autograd.grad(
        loss(logps, ref_logps, batch, Config(asr=False, tau="none"))[0].sum(), logps
    )[0].flatten()
    assert ours[0] < 0 < ours[2]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("k", [2, 16])
def test_huge_margins_stay_finite_in_every_dtype(dtype, k):
    for margin in (1e4, -1e4):
        logps = torch.zeros(2, k, 1, dtype=dtype)
        logps[:, 0] = margin
        logps.requires_grad_()
        scores, states = torch.linspace(1, 0, k).expand(2, k), torch.ones(2, k, 3, dtype=dtype)
        batch = SimpleNamespace(
            mask=torch.ones(2, k, 1, dtype=torch.bool), scores=scores, states=states
        )
        losses = loss(logps, torch.zeros_like(logps), batch, Config())[0]
        assert losses.isfinite().all() and losses.dtype == torch.promote_types(dtype, torch.float32)
        assert torch.autograd.grad(losses.sum(), logps)[0].isfinite().all()


def test_bad_trees_and_scores_are_refused():
    logps, ref_logps, batch = flat([0.2, 0.5], [1.0, 0.0])
    for scores in ([math.nan, 0.0], [100.0, 0.0], [0.5, -0.1]):
        with pytest.raises(ValueError, match="from 0 to 1"):
            loss(
                logps,
                ref_logps,
                SimpleNamespace(mask=batch.mask, scores=torch.tensor([scores])),
                Config(asr=False),
            )
    with pytest.raises(ValueError, match="at least 2"):
        loss(
            logps[:, :1],
            ref_logps[:, :1],
            SimpleNamespace(mask=batch.mask[:, :1], scores=batch.scores[:, :1]),
            Config(asr=False),
        )
    logps, ref_logps, batch = flat([0.2, 0.5, 0.1, 0.3], [0.0, 0.0, 0.0, 1.0])
    batch.parents = torch.tensor([[-1, 0, 1, 2]])  # one response of four steps
    with pytest.raises(ValueError, match="at least 2"):
        loss(logps, ref_logps, batch, Config(asr=False))
    logps, ref_logps, batch = forest()
    batch.mask[1, 1] = False
    with pytest.raises(ValueError, match="step without"):
        loss(logps, ref_logps, batch, Config())
    with pytest.raises((ValueError, TypeError)):
        collate([dict(prompt=0, responses=[[0], [1]], scores=["80", "20"])])
    for fields in (dict(beta=0.0), dict(beta=math.nan), dict(tau="rank"), dict(reduce="max")):
        with pytest.raises(ValueError, match=list(fields)[0]):
            Config(**fields)


@pytest.mark.slow
def test_trees_of_sums_are_scored_as_one_response_a_row():
    """A path of a tree has the log-probs and the score of the same response in a row of its own."""
    here = Lab(
        Settings(world="arithmetic", base_steps=20, prompts=6, k=5, batch_size=4), quiet=True
    )
    policy = here.base()
    rows = here.rows(grown(here, policy))
    batch = prepare(policy, collate(rows, here.world.tokenizer))
    on, leaf = paths(batch)
    with torch.no_grad():
        total = (on.float() @ policy.logps(batch).sum(-1)[..., None])[..., 0]
    assert batch.states.shape == (len(rows), batch.mask.shape[1], 96) and leaf.sum(1).max() <= 5
    for b, row in enumerate(rows):
        assert row["scores"].count(1.0) >= 1 and max(row["scores"]) == 1.0
        for i in leaf[b].nonzero().flatten().tolist():
            ids = sum((row["responses"][k] for k in on[b, i].nonzero().flatten().tolist()), [])
            whole = here.rows([dict(prompt=row["prompt"], responses=[ids], ends=[row["ends"][i]])])
            assert sum(here.logps(policy, whole)[0][0]) == pytest.approx(
                total[b, i].item(), abs=1e-3
            )
            marks = here.world.verify_steps(row["prompt"], ids)
            right = here.world.reward([row["prompt"]], [ids]).item()
            assert row["scores"][i] == pytest.approx(
                1.0 if right else 0.9 * [*marks, False].index(False) / len(marks)
            )


@pytest.mark.slow
def test_every_field_changes_the_run():
    settings = Settings(
        world="arithmetic",
        base_steps=10,
        prompts=6,
        k=4,
        batch_size=3,
        steps=2,
        eval_size=2,
        max_response=12,
    )
    ends = []
    for fields in (
        dict(),
        dict(beta=0.9),
        dict(tau="label"),
        dict(asr=False),
        dict(reduce="mean"),
        dict(divide=False),
    ):
        model = run(Lab(settings, quiet=True), Config(**fields))
        ends.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    assert all((a - b).abs().max() > 0 for i, a in enumerate(ends) for b in ends[:i])


def test_lists_without_steps_are_trained_as_one_step():
    settings = Settings(
        world="reviews",
        base_steps=2,
        prompts=6,
        k=3,
        batch_size=3,
        steps=1,
        eval_size=2,
        max_response=6,
    )
    assert run(Lab(settings, quiet=True), Config()) is not None


# ---- the mutants of the loss: every one makes a difference on these inputs


def trees():
    """Trees and flat lists with states; refused: wrong scores, one response, an empty step."""

    def grown(seed, dtype=torch.float64, absent=False):
        logps, ref_logps, batch = builders.ragged(
            k=7, scores=builders.grades, seed=seed, dtype=dtype, fewest=6 if absent else None
        )
        leaf = torch.tensor([0, 0, 1, 1, 0, 1, 1])
        states = torch.randn(
            5, 7, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
        ).to(dtype)
        parents = torch.tensor([-1, 0, 1, 0, 0, 4, -1]).expand(5, -1)
        return builders.changed(
            (logps, ref_logps, batch),
            parents=parents,
            scores=batch.scores * leaf / 3,
            states=states,
        )

    items = [grown(0), grown(1, absent=True), grown(2, torch.bfloat16)]
    flat = builders.ragged(k=4, scores=builders.grades, seed=3)
    states = torch.randn(5, 4, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    flat = builders.changed(flat, scores=flat[2].scores / 3, states=states)
    bare = (
        *flat[:2],
        SimpleNamespace(**{n: v for n, v in vars(flat[2]).items() if n != "parents"}),
    )
    deep = torch.tensor([-1, 0, 1, -1]).expand(5, -1)
    lone = builders.changed(flat, mask=flat[2].mask & (torch.arange(4) < 1)[:, None])
    two = builders.changed(
        flat,
        mask=flat[2].mask & (torch.arange(4) < 2)[:, None],
        scores=flat[2].scores * (torch.arange(4) < 2),
    )
    items += [(flat[1], flat[1], flat[2])]  # at the reference: all rewards tie
    items += [
        flat,
        bare,
        two,
        builders.changed(flat, parents=deep, scores=flat[2].scores * torch.tensor([0, 0, 1, 1])),
        builders.elsewhere(items[0]),
    ]
    known = items[0][2].scores.clone()
    known[:, :2] = 0.5  # steps within a response have scores too
    one, short = torch.zeros_like(flat[2].scores), flat[2].mask.clone()
    one[0, 0], short[0, 1:] = 1.0, False  # a single pair, and a single row that is not a list
    items += [builders.changed(items[0], scores=known), builders.changed(two, scores=one)]
    bad = [builders.changed(flat, mask=short, scores=flat[2].scores * short.any(-1))]
    bad += [builders.changed(flat, scores=flat[2].scores + x) for x in (-0.5, 0.5)] + [lone]
    graph = {n: getattr(items[0][2], n).clone().requires_grad_() for n in ("scores", "states")}
    items += [builders.changed(items[0], **graph)]
    hole = items[0][2].mask.clone()
    hole[1, 1] = False
    return [
        *items,
        builders.changed(flat, scores=0 * flat[2].scores),
        *bad,
        builders.changed(items[0], mask=hole),
    ]


CASES = [
    dict(beta=0.7, tau=t, asr=a) for t in ("model", "label", "none") for a in (True, False)
] + [
    dict(beta=1.3, reduce="mean"),
    dict(divide=False),
    dict(divide=False, asr=False, tau="label"),
]
INPUTS = trees
PAIR_WEIGHTS = "pair_weights(g.sum(-1), batch.scores.detach().to(g.dtype), leaf, cfg)"
DETACHED = PAIR_WEIGHTS.replace("g.sum(-1)", "_detached(g.sum(-1))")
ONES = "torch.ones_like(difference)"
SURVIVORS = {
    f"loss: {ONES} -> {ONES.replace('difference', '_detached(difference)')}": "ones are constant",
    f"loss: {PAIR_WEIGHTS} -> {DETACHED}": "only the order of the rewards is read",
    "loss: g.sum(-1) -> _detached(g).sum(-1)": "the same",
    "loss: g.sum(-1) -> g.mean(-1)": "the same",
    "step_places: on.sum(-1) - 1 -> on.sum(-1)": "the same",
    "step_places: 1 -> 2": "the same, or the other side of a square",
}
