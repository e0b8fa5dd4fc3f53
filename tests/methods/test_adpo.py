"""ADPO against its paper: values, gradients, targets, special cases, anchors, errors."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from data import collate
from lab import Lab, Settings
from methods import dpo
from methods.adpo import TARGETS, Config, kernel_ranks, loss, run, targets
from tests import builders
from tests.builders import changed, ragged, reals
from toy.bandit import World

ELL, REF, Q = [-1.0, -2.0, -1.5, -3.0], [-1.2, -1.6, -1.5, -2.5], [0.5, 0.1, 0.3, 0.1]
REWARDS = [1.0, 0.2, -0.3, 0.5]


def a_list(ell=ELL, ref=REF, scores=REWARDS, q=None, dtype=torch.float64):
    """One list of responses of one token -> logps, ref_logps (1, K, 1), batch."""
    logps = torch.tensor(ell, dtype=dtype).view(1, -1, 1).requires_grad_()
    batch = SimpleNamespace(
        mask=torch.ones(1, len(ell), 1, dtype=torch.bool),
        scores=torch.tensor([scores], dtype=dtype),
    )
    if q is not None:
        batch.q = torch.tensor([q], dtype=dtype)
    return logps, torch.tensor(ref, dtype=dtype).view(1, -1, 1), batch


def targeted(seed=0):
    """Ragged lists of 1 to 4 responses with real scores and targets q."""
    item = ragged(k=4, length=6, seed=seed, fewest=1, scores=reals)
    rng = torch.Generator().manual_seed(seed + 7)
    q = torch.rand(5, 4, generator=rng, dtype=torch.float64) * item[2].mask.any(-1)
    return changed(item, q=q / q.sum(1, keepdim=True))


def grad_of(value, x):
    return torch.autograd.grad(value.sum(), x)[0]


@pytest.mark.paper
@pytest.mark.parametrize(
    "tau, value, kl, grad",
    [
        (1.0, 1.242264, 0.073981, [-0.150854, 0.091616, -0.014143, 0.073381]),
        (0.5, 1.176656, 0.008374, [-0.098332, 0.071577, 0.004406, 0.022349]),
        (2.0, 1.304063, 0.135780, None),
    ],
)
def test_the_loss_has_the_value_of_the_worked_example(tau, value, kl, grad):
    logps, ref_logps, batch = a_list(q=Q)
    losses, metrics = loss(logps, ref_logps, batch, Config(tau=tau, target="given"))
    assert losses.item() == pytest.approx(value, abs=1e-6) and metrics[
        "gap"
    ].item() == pytest.approx(kl, abs=1e-6)
    found = grad_of(losses, logps).flatten()
    assert abs(found.sum()) < 1e-12
    if grad:
        assert found.tolist() == pytest.approx(grad, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    "tau, optimum",
    [
        (0.5, [0.501130, 0.150227, 0.287566, 0.061078]),
        (1.0, [0.612347, 0.082094, 0.272183, 0.033377]),
    ]
    + [(2.0, [0.766631, 0.020556, 0.204456, 0.008357])],
)
def test_the_optimum_is_the_anchor_times_q_to_the_tau(tau, optimum):
    best = (
        torch.tensor(REF, dtype=torch.float64) + tau * torch.tensor(Q, dtype=torch.float64).log()
    ).log_softmax(0)
    assert best.exp().tolist() == pytest.approx(optimum, abs=1e-6)
    logps, ref_logps, batch = a_list(best.tolist(), q=Q)
    assert (
        grad_of(loss(logps, ref_logps, batch, Config(tau=tau, target="given"))[0], logps)
        .abs()
        .max()
        < 1e-8
    )


@pytest.mark.slow
@pytest.mark.paper
@pytest.mark.parametrize(
    "rounds, shares",
    [(1, (0.8749, 0.0559, 0.0142, 0.0549)), (3, (0.99610, 0.00058, 0.0000078, 0.00331))],
)
def test_a_fixed_anchor_ends_at_q_to_the_tau_and_a_following_one_goes_on(rounds, shares):
    """Gradient descent on one list, with the policy of the round before as the anchor."""
    tau, q = 0.8, torch.tensor([0.819065, 0.043407, 0.006922, 0.130607], dtype=torch.float64)
    start = torch.tensor(REF, dtype=torch.float64)
    known = (start + rounds * tau * q.log()).softmax(0)
    assert known.tolist() == pytest.approx(shares, abs=5e-5)
    lab = Lab(Settings(world="bandit"), quiet=True)
    batch = collate([dict(prompt=0, responses=[[0], [1], [2], [3]], scores=REWARDS)])
    policy = World(4, 1, reference=start).model()
    for _ in range(rounds):
        anchor = policy.logps(batch).detach()

        def objective(model, batch, anchor=anchor):
            return loss(model.logps(batch), anchor, batch, Config(tau))

        policy = lab.fit(policy, [batch], objective, steps=1000, lr=0.05, decay=True)
    assert policy.probs()[0].tolist() == pytest.approx(shares, abs=1e-4)


@pytest.mark.paper
def test_the_hessian_at_the_optimum():
    tau, q = 2.0, torch.tensor(Q, dtype=torch.float64)
    _, ref_logps, batch = a_list(q=Q)

    def value(x):
        return loss(x.view(1, 4, 1), ref_logps, batch, Config(tau=tau, target="given"))[0].sum()

    best = torch.tensor(REF, dtype=torch.float64) + tau * q.log()
    hessian = torch.autograd.functional.hessian(value, best)
    torch.testing.assert_close(hessian, (q.diag() - q[:, None] * q) / tau**2, rtol=0, atol=1e-8)


@pytest.mark.paper
@pytest.mark.parametrize("smoothing, value", [(0.0, 0.663597), (0.2, 0.675597)])
def test_pairs_are_dpo_and_its_smoothed_form(smoothing, value):
    logps, ref_logps, batch = a_list(ELL[:2], REF[:2], [1.0, 0.0])
    losses, _ = loss(logps, ref_logps, batch, Config(tau=10.0, target="hard", smoothing=smoothing))
    assert losses.item() == pytest.approx(value, abs=1e-6)
    given, _ = loss(
        logps,
        ref_logps,
        SimpleNamespace(**vars(batch), q=torch.tensor([[1 - smoothing, smoothing]])),
        Config(tau=10.0, target="given"),
    )
    assert given.item() == pytest.approx(value, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize("target", ["hard", "order"])
@pytest.mark.parametrize("beta", [0.1, 2.0])
def test_random_pairs_are_dpo_in_value_and_gradient(target, beta):
    rng = torch.Generator().manual_seed(0)
    mask = torch.arange(6) < torch.randint(1, 7, (8, 2, 1), generator=rng)
    logps, ref_logps = (
        -3 * torch.rand(8, 2, 6, generator=rng, dtype=torch.float64) * mask for _ in range(2)
    )
    batch = SimpleNamespace(mask=mask, scores=torch.tensor([[1.0, 0.0]]).repeat(8, 1))
    logps.requires_grad_()
    ours, plain = (
        loss(logps, ref_logps, batch, Config(tau=1 / beta, target=target))[0],
        dpo.loss(logps, ref_logps, batch, dpo.Config(beta))[0],
    )
    torch.testing.assert_close(ours, plain, rtol=0, atol=1e-12)
    torch.testing.assert_close(grad_of(ours, logps), grad_of(plain, logps), rtol=0, atol=1e-12)


@pytest.mark.paper
def test_one_hot_without_an_anchor_is_supervised_fine_tuning_when_the_list_is_all_there_is():
    logits = torch.tensor(ELL, dtype=torch.float64, requires_grad=True)
    _, _, batch = a_list()
    ours = loss(
        logits.log_softmax(0).view(1, 4, 1), None, batch, Config(target="hard", anchor="uniform")
    )[0]
    plain = -logits.log_softmax(0)[0]
    assert ours.item() == pytest.approx(plain.item(), abs=1e-12)
    torch.testing.assert_close(grad_of(ours, logits), grad_of(plain, logits))


@pytest.mark.paper
def test_distillation_ends_at_the_teacher_and_the_max_entropy_target_at_its_own():
    teacher = torch.tensor([0.3, -1.0, 2.0, 0.1], dtype=torch.float64).log_softmax(0)
    heat = 3.0
    logps, _, batch = a_list(teacher.tolist(), q=(teacher / heat).softmax(0).tolist())
    assert (
        grad_of(
            loss(logps, None, batch, Config(tau=heat, target="given", anchor="uniform"))[0], logps
        )
        .abs()
        .max()
        < 1e-8
    )
    logps, _, batch = a_list((torch.tensor(REWARDS).double() / 0.7).log_softmax(0).tolist())
    assert (
        grad_of(
            loss(logps, None, batch, Config(target="raw", beta_r=0.7, anchor="uniform"))[0], logps
        )
        .abs()
        .max()
        < 1e-8
    )


@pytest.mark.paper
def test_a_soft_pair_settles_at_the_margin_logit_p_over_beta():
    beta, p = 0.5, 0.8
    logps, ref_logps, batch = a_list(
        [math.log(p / (1 - p)) / beta, 0.0], [0.0, 0.0], [1.0, 0.0], q=[p, 1 - p]
    )
    assert (
        grad_of(loss(logps, ref_logps, batch, Config(tau=1 / beta, target="given"))[0], logps)
        .abs()
        .max()
        < 1e-8
    )


@pytest.mark.paper
@pytest.mark.parametrize(
    "target, beta_r, scores, q",
    [
        ("raw", 0.5, REWARDS, [0.608254, 0.122804, 0.045177, 0.223764]),
        ("zscore", 0.5, REWARDS, [0.819065, 0.043407, 0.006922, 0.130607]),
        ("kde", 1.0, REWARDS, [0.73481, 0.07688, 0.01784, 0.17047]),
        ("raw", 0.5, [1.0, 0.2, -0.3, 100.0], [0.0, 0.0, 0.0, 1.0]),
        ("kde", 1.0, [1.0, 0.2, -0.3, 100.0], [0.07295, 0.06750, 0.06426, 0.79529]),
        ("zscore", 0.5, [0.3] * 4, [0.25] * 4),
        ("kde", 0.5, [0.3] * 4, [0.25] * 4),
    ],
)
def test_targets_are_those_of_their_formulas(target, beta_r, scores, q):
    _, _, batch = a_list(scores=scores)
    found = targets(batch, batch.mask.any(-1), Config(target=target, beta_r=beta_r))
    assert found.flatten().tolist() == pytest.approx(q, abs=1e-5)


@pytest.mark.paper
def test_smoothed_ranks_have_their_values():
    _, _, batch = a_list()
    ranks = kernel_ranks(batch.scores, batch.mask.any(-1)).sigmoid().flatten().tolist()
    assert ranks == pytest.approx([0.86520, 0.40176, 0.13480, 0.59824], abs=1e-5)
    _, _, batch = a_list(scores=[1.0, 0.2, -0.3, 100.0])
    assert kernel_ranks(batch.scores, batch.mask.any(-1)).max().item() == pytest.approx(
        1.9459, abs=1e-4
    )


@pytest.mark.parametrize("target", TARGETS)
def test_no_gradient_reaches_the_targets(target):
    logps, ref_logps, batch = targeted()
    batch.scores, batch.q = batch.scores.requires_grad_(), batch.q.requires_grad_()
    losses, metrics = loss(logps, ref_logps, batch, Config(target=target))
    losses.sum().backward()
    assert batch.scores.grad is None and batch.q.grad is None and logps.grad.abs().sum() > 0
    assert not any(value.requires_grad for value in metrics.values())


def test_plackett_luce_in_values():
    logps, ref_logps, batch = a_list([0.5, 0.1, -0.4], [0.0] * 3, [3.0, 2.0, 1.0])
    assert loss(logps, ref_logps, batch, Config(target="order"))[0].item() == pytest.approx(
        1.204948 / 2, abs=1e-6
    )
    turned = a_list([-0.4, 0.5, 0.1], [0.0] * 3, [1.0, 3.0, 2.0])
    assert loss(*turned, Config(target="order"))[0].item() == pytest.approx(1.204948 / 2, abs=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("reduce", ["sum", "mean"])
def test_gradients_on_ragged_lists(target, reduce):
    logps, ref_logps, batch = targeted()
    cfg = Config(tau=0.7, target=target, reduce=reduce)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], logps)
    assert torch.autograd.gradcheck(
        lambda x: loss(logps.detach(), x, batch, cfg)[0], ref_logps.clone().requires_grad_()
    )
    losses, _ = loss(logps, ref_logps, batch, cfg)
    grad = grad_of(losses, logps)
    assert (losses[1], grad[1].abs().sum()) == (0.0, 0.0)  # alone in its list
    assert grad[:, :, 0].isfinite().all()
    if target != "order":
        present, tokens = batch.mask.any(-1), batch.mask.sum(-1).clamp(min=1)
        u = (
            (logps - ref_logps).sum(-1) / (tokens if reduce == "mean" else 1) / cfg.tau
        ).masked_fill(~present, -math.inf)
        by_hand = (
            (u.softmax(1) - targets(batch, present, cfg))
            / cfg.tau
            / (tokens if reduce == "mean" else 1)
        )
        torch.testing.assert_close(
            grad, by_hand.detach()[..., None].expand_as(grad), rtol=0, atol=1e-12
        )


@pytest.mark.parametrize("target", TARGETS)
def test_absent_members_rows_and_a_constant_of_the_list_do_not_matter(target):
    logps, ref_logps, batch = targeted(seed=3)
    logps, cfg = logps.detach(), Config(target=target)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    wide = {k: torch.nn.functional.pad(v, (0, 2)) for k, v in vars(batch).items() if k != "mask"}
    more = [torch.nn.functional.pad(x, (0, 1, 0, 2)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(
        loss(*more[:2], SimpleNamespace(mask=more[2], **wide), cfg)[0], plain
    )
    for b in range(5):
        one = SimpleNamespace(**{k: v[b : b + 1] for k, v in vars(batch).items()})
        torch.testing.assert_close(
            loss(logps[b : b + 1], ref_logps[b : b + 1], one, cfg)[0][0], plain[b]
        )
    first = torch.zeros_like(logps)
    first[..., 0] = 2.0 * batch.mask.any(-1)
    torch.testing.assert_close(loss(logps + first, ref_logps, batch, cfg)[0], plain)
    if target != "given":
        moved = SimpleNamespace(
            **vars(batch) | {"scores": (batch.scores + 5.0) * batch.mask.any(-1)}
        )
        torch.testing.assert_close(loss(logps, ref_logps, moved, cfg)[0], plain, rtol=0, atol=1e-6)


@pytest.mark.paper
def test_at_the_anchor_every_list_costs_the_log_of_its_length():
    logps, _, batch = targeted()
    n = batch.mask.any(-1).sum(1, keepdim=True)
    losses, _ = loss(logps, logps.detach(), batch, Config(tau=0.8))
    torch.testing.assert_close(losses, n[:, 0].double().log())
    present = batch.mask.any(-1)
    expected = (1 / n - targets(batch, present, Config())) / 0.8 * present
    torch.testing.assert_close(grad_of(losses, logps)[..., 0], expected)


@pytest.mark.paper
def test_equal_scores_pull_back_to_the_anchor():
    logps, ref_logps, batch = a_list(scores=[0.3] * 4)
    grad = grad_of(loss(logps, ref_logps, batch, Config())[0], logps).flatten()
    u = (logps - ref_logps).flatten()
    torch.testing.assert_close(grad, u.softmax(0).detach() - 0.25)


def test_equal_scores_share_a_target_and_teach_no_position():
    """The best share a hard target; under Plackett-Luce equal scores compete."""

    def q(scores, smoothing=0.0, there=None):
        present = torch.tensor([there or [True] * len(scores)])
        return targets(
            a_list(scores=scores)[2], present, Config(target="hard", smoothing=smoothing)
        )[0].tolist()

    assert q([0.0] * 4) == [0.25] * 4 == q([0.0] * 4, 0.2) and q([0.0, 1.0, 1.0, 0.0]) == [
        0,
        0.5,
        0.5,
        0,
    ]
    assert q([0.0, 1.0, 1.0, 0.0], 0.2) == pytest.approx([0.1, 0.4, 0.4, 0.1])
    assert q([0.0, -1.0, 0.0], 0.2, [False, True, False]) == [
        0,
        1,
        0,
    ]  # the only response, with a score below the 0 of absent ones
    for target in ("hard", "order", "raw", "zscore", "kde"):
        logps, ref_logps, batch = a_list(scores=[1.0] * 4)
        grad = grad_of(loss(logps, ref_logps, batch, Config(target=target))[0], logps).flatten()
        torch.testing.assert_close(grad, (logps - ref_logps).flatten().softmax(0).detach() - 0.25)
        moved = a_list(
            [ELL[i] for i in (2, 0, 3, 1)], [REF[i] for i in (2, 0, 3, 1)], [0.0, 1.0, 1.0, 1.0]
        )
        plain = a_list(scores=[1.0, 1.0, 0.0, 1.0])
        torch.testing.assert_close(
            loss(*moved, Config(target=target))[0], loss(*plain, Config(target=target))[0]
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("target", ["hard", "raw", "zscore", "kde", "order"])
def test_scores_of_half_precision(dtype, target):
    for scores in ([0.5, 0.25, -1.0, 2.0], [0.25] * 4):
        logps, ref_logps, batch = a_list(scores=scores)
        plain = loss(logps, ref_logps, batch, Config(target=target))[0]
        batch.scores = batch.scores.to(dtype)
        torch.testing.assert_close(
            loss(logps, ref_logps, batch, Config(target=target))[0], plain, rtol=0, atol=1e-5
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("target", TARGETS)
@pytest.mark.parametrize("count", [1, 2, 16])
def test_huge_log_ratios_and_long_lists_stay_finite(dtype, target, count):
    for far in (1e4, -1e4, 0.0):
        logps, ref_logps, batch = a_list(
            [far] + [0.0] * (count - 1), [0.0] * count, [1.0] * count, q=[1 / count] * count
        )
        logps = logps.detach().to(dtype).requires_grad_()
        losses, metrics = loss(logps, ref_logps.to(dtype), batch, Config(target=target))
        assert (
            losses.dtype == torch.promote_types(dtype, torch.float32)
            and losses.isfinite().all()
            and all(m.isfinite() for m in metrics.values())
        )
        assert grad_of(losses, logps).isfinite().all()


@pytest.mark.parametrize(
    "plain, change",
    [
        ({}, dict(tau=2.0)),
        ({}, dict(target="raw")),
        ({}, dict(beta_r=1.0)),
        ({}, dict(reduce="mean")),
    ]
    + [
        (dict(target="hard"), dict(smoothing=0.1)),
        ({}, dict(target="kde")),
        ({}, dict(target="order")),
    ],
)
def test_every_field_of_the_loss_counts(plain, change):
    logps, ref_logps, batch = targeted()
    values = [
        loss(logps, ref_logps, batch, Config(**cfg))[0].sum() for cfg in (plain, plain | change)
    ]
    grads = [grad_of(v, logps) for v in values]
    assert abs(values[0] - values[1]) > 1e-6 and (grads[0] - grads[1]).abs().max() > 1e-6


@pytest.mark.parametrize(
    "fields, word",
    [({n: v}, n) for n in ("tau", "beta_r") for v in (0.0, -1.0, math.inf, math.nan)]
    + [({n: "other"}, n) for n in ("target", "reduce", "anchor")]
    + [(dict(target="hard", smoothing=v), "smoothing") for v in (-0.1, 1.0, math.nan)]
    + [(dict(anchor="ema", decay=v), "decay") for v in (-0.1, 1.0)]
    + [
        (dict(anchor="round", rounds=0), "rounds"),
        (dict(rounds=3), "rounds"),
        (dict(decay=0.9), "decay"),
        (dict(smoothing=0.1), "smoothing"),
    ]
    + [(dict(target="hard", beta_r=0.5), "beta_r"), (dict(target="order", beta_r=1.0), "beta_r")],
)
def test_fields_out_of_range_or_idle_are_refused(fields, word):
    with pytest.raises(ValueError, match=f"{word} = "):
        Config(**fields)


def test_lists_that_cannot_be_used_are_refused():
    logps, ref_logps, batch = a_list(q=[0.5, 0.1, 0.3, 0.2])
    with pytest.raises(ValueError, match="sum to 1"):
        loss(logps, ref_logps, batch, Config(target="given"))
    batch.q = torch.tensor([[0.5, math.nan, 0.3, 0.2]])
    with pytest.raises(ValueError, match="sum to 1"):
        loss(logps, ref_logps, batch, Config(target="given"))
    logps, ref_logps, batch = a_list(q=[0.5, 0.0, 0.3, 0.2])
    loss(logps, ref_logps, batch, Config(target="given"))
    batch.mask[0, 3] = False  # its target has a share
    with pytest.raises(ValueError, match="0 for an absent response"):
        loss(logps, ref_logps, batch, Config(target="given"))
    with pytest.raises(ValueError, match="column q"):
        loss(*a_list(), Config(target="given"))
    logps, ref_logps, batch = a_list(scores=[1.0, math.nan, 0.0, 0.0])
    with pytest.raises(ValueError, match="finite"):
        loss(logps, ref_logps, batch, Config())
    batch.mask[:] = False
    with pytest.raises(ValueError, match="at least 1 response with"):
        loss(logps, ref_logps, batch, Config())


@pytest.mark.slow
@pytest.mark.parametrize(
    "fields",
    [
        dict(anchor="fixed"),
        dict(anchor="round"),
        dict(anchor="ema"),
        dict(anchor="uniform"),
        dict(target="order"),
    ],
)
def test_runs_improve_the_reward_and_differ(fields):
    lab = Lab(Settings(world="bandit", steps=40, prompts=512, batch_size=64, k=4), quiet=True)
    policy = run(lab, Config(**fields))
    assert policy.expect(lab.world.rewards()) > lab.reference.expect(lab.world.rewards()) + 0.3
    if fields.get("anchor", "fixed") != "fixed":
        other = run(
            Lab(Settings(world="bandit", steps=40, prompts=512, batch_size=64, k=4), quiet=True),
            Config(),
        )
        assert not torch.equal(policy.logits, other.logits)


@pytest.mark.parametrize(
    "fields, change",
    [(dict(anchor="round"), dict(rounds=2)), (dict(anchor="ema"), dict(decay=0.5))],
)
def test_the_anchors_own_fields_count(fields, change):
    def weights(**fields):
        return run(
            Lab(Settings(world="bandit", steps=8, prompts=256, batch_size=32, k=4), quiet=True),
            Config(**fields),
        ).logits

    assert not torch.equal(weights(**fields), weights(**fields | change))


def lists_in_a_file(folder, count=40, q=True):
    rows = [
        {"prompt": f"say {i}", "responses": [" a", " b", " c"], "scores": [0.1, 0.9, 0.5]}
        for i in range(count)
    ]
    rows = [row | ({"q": [0.2, 0.5, 0.3]} if q else {}) for row in rows]
    (folder / "lists.jsonl").write_text("\n".join(json.dumps(row) for row in rows))
    return str(folder / "lists.jsonl")


def test_every_round_has_its_own_part_of_a_file(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr(
        Lab,
        "align",
        lambda lab, policy, data, loss, cfg, reference, every, decay: seen.append(
            (lab, data, reference, every)
        ),
    )
    for prompts in (None, 1000):
        lab = Lab(
            Settings(
                data=lists_in_a_file(tmp_path), base_steps=0, context=16, prompts=prompts, steps=10
            ),
            quiet=True,
        )
        run(lab, Config(anchor="round", rounds=5))
        lab, data, reference, every = seen.pop()
        parts = []
        for round in range(5):
            with lab.in_round(round):
                parts.append([lab.text(row["prompt"]) for row in data(None, round)])
        together = [x for part in parts for x in part]
        assert (
            (reference, every) == ("round", 2)
            and min(map(len, parts)) == len(lab.world.train) // 5 > 0
            and len(set(together)) == len(together)
        )


@pytest.mark.parametrize("world", ["bandit", "ranking"])
@pytest.mark.parametrize(
    "how",
    [dict(rounds=65, prompts=64, steps=130), dict(rounds=8, steps=10), dict(rounds=8, steps=4)],
)
def test_rounds_that_do_not_fit_are_refused(world, how):
    rounds = how["rounds"]
    with pytest.raises(ValueError, match=f"rounds = {rounds}"):
        run(
            Lab(
                Settings(world=world, **{k: v for k, v in how.items() if k != "rounds"}), quiet=True
            ),
            Config(anchor="round", rounds=rounds),
        )


def test_targets_are_given_in_a_file_alone(tmp_path, monkeypatch):
    given, (logps, ref_logps, batch) = Config(target="given"), a_list()
    monkeypatch.setattr(Lab, "base", lambda lab: pytest.fail("before anything is trained"))
    for where in (
        dict(world="bandit"),
        dict(data=lists_in_a_file(tmp_path, q=False), context=16),
    ):
        with pytest.raises(ValueError, match="column q"):
            run(Lab(Settings(**where), quiet=True), given)
    with pytest.raises(ValueError, match="reduce = mean"):
        run(Lab(Settings(world="digits"), quiet=True), Config(reduce="mean"))
    far = SimpleNamespace(mask=batch.mask.to("meta"), scores=batch.scores.to("meta"))
    with pytest.raises(ValueError, match="column q"):
        loss(logps.to("meta"), ref_logps.to("meta"), far, given)


def test_a_run_on_given_targets(tmp_path):
    lab = Lab(
        Settings(data=lists_in_a_file(tmp_path), base_steps=0, context=16, steps=2, batch_size=2),
        quiet=True,
    )
    assert all(p.isfinite().all() for p in run(lab, Config(target="given")).parameters())


# ---- the mutants of the loss: every one makes a difference on these inputs


def targeted_lists():
    """Lists with scores and targets q; refused: empty rows, infinite scores, wrong targets."""

    def with_q(item):
        present = item[2].mask.any(-1)
        draw = (
            torch.rand(
                present.shape, generator=torch.Generator().manual_seed(7), dtype=torch.float64
            )
            * present
        )
        return builders.changed(
            item,
            q=draw / draw.sum(1, keepdim=True).clamp(min=1e-9),
            scores=item[2].scores * 1.3 - 2 * draw,
        )

    items = [
        with_q(builders.ragged(k=4, scores=builders.grades)),
        with_q(builders.ragged(k=5, scores=builders.grades, seed=1, fewest=4)),
        with_q(builders.ragged(k=3, scores=builders.grades, seed=2, dtype=torch.bfloat16)),
    ]
    items += [
        with_q(builders.ragged(seed=3)),
        builders.changed(
            with_q(builders.ragged(k=4, scores=builders.grades, seed=4)),
            scores=torch.ones(5, 4, dtype=torch.float64),
        ),
    ]
    logps, ref_logps, batch = items[1]
    first = builders.changed(
        (logps.roll(1, 1), ref_logps.roll(1, 1), batch),
        **{n: getattr(batch, n).roll(1, 1) for n in ("mask", "scores", "q")},
    )
    lone, below = (
        with_q(builders.ragged(scores=builders.grades, seed=6, fewest=1)),
        builders.changed(items[1], scores=(batch.scores - 9) * batch.mask.any(-1)),
    )
    infinite, small = items[0][2].scores.clone(), items[0][2].q.clone()
    infinite[0, 0], small[0] = torch.inf, 0.9 * small[0]
    bad = [
        builders.changed(items[0], scores=infinite),
        builders.changed(items[0], q=small),
        builders.changed(items[1], q=batch.q.roll(1, 1)),
    ]
    bad += [
        builders.changed(items[0], q=2 * items[0][2].q - items[0][2].q.flip(1)),
        builders.ragged(k=3, scores=builders.grades, seed=5),
    ]
    empty = builders.changed(items[1], mask=batch.mask & (torch.arange(5) > 0)[:, None, None])
    half = builders.changed(items[0], scores=items[0][2].scores.bfloat16())
    return [
        *items,
        half,
        first,
        lone,
        below,
        (logps, None, batch),
        builders.elsewhere(items[0]),
        builders.elsewhere(bad[-1]),
        *bad,
        empty,
    ]


CASES = [dict(target=t, tau=0.7) for t in ("hard", "raw", "zscore", "kde", "given", "order")] + [
    dict(target="hard", smoothing=0.2, reduce="mean"),
    dict(target="kde", beta_r=0.8, reduce="mean"),
]
INPUTS = targeted_lists
SURVIVORS = {
    "loss: 0.0 -> 1.0": "stands where q is 0: any finite number will do",
    "targets: batch.q.detach() -> batch.q": "test_no_gradient_reaches_the_targets sees it",
    "targets: batch.scores.detach() -> batch.scores": "the same",
}
