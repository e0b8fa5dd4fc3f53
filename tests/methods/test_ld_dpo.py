"""LD-DPO against its paper: values, gradients, identities, errors, and the exact optimum where length is all there is to gain."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.ld_dpo import Wordy, length_at
from lab import Lab, Settings
from methods import dpo
from methods.ld_dpo import PAPER, Config, loss, run
from tests import builders

ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)


def example(dtype=torch.float64):
    """A pair: five tokens preferred to three."""
    policy, reference = torch.zeros(1, 2, 5, dtype=dtype), torch.zeros(1, 2, 5, dtype=dtype)
    policy[0, 0] = torch.tensor([-1.0, -0.5, -2.0, -1.5, -0.2])
    reference[0, 0] = torch.tensor([-1.1, -0.7, -1.8, -1.6, -0.4])
    policy[0, 1, :3] = torch.tensor([-1.2, -0.9, -2.5])
    reference[0, 1, :3] = torch.tensor([-1.0, -1.0, -2.0])
    mask = torch.tensor([[[True] * 5, [True] * 3 + [False] * 2]])
    return policy.requires_grad_(), reference, SimpleNamespace(mask=mask)


def ragged(rows=6, length=7, seed=0, dtype=torch.float64):
    """Random log-probs of ragged responses, 0 outside the mask."""
    rng = torch.Generator().manual_seed(seed)
    mask = torch.arange(length) < torch.randint(1, length + 1, (rows, 2, 1), generator=rng)
    logps, ref_logps = (
        -3 * torch.rand(rows, 2, length, generator=rng, dtype=dtype) * mask for _ in range(2)
    )
    return logps.requires_grad_(), ref_logps, SimpleNamespace(mask=mask)


def value_and_gradient(logps, ref_logps, batch, cfg, objective=loss):
    losses = objective(logps, ref_logps, batch, cfg)[0]
    return losses, torch.autograd.grad(losses.sum(), logps)[0]


def weighted_sums(logps, batch, alpha):
    """The split log-probs (B, 2) of the definition, in plain loops."""
    rows = []
    for b, mask in enumerate(batch.mask):
        n = mask.sum(1).tolist()
        rows.append(
            [
                sum(logps[b, k, t] * (1.0 if t < min(n) else alpha) for t in range(n[k]))
                for k in (0, 1)
            ]
        )
    return torch.stack([torch.stack(row) for row in rows])


# ---- values


@pytest.mark.parametrize(
    ("alpha", "policy", "reference", "z", "value", "z_alone", "value_alone"),
    [
        (1.0, -5.20, -5.60, 0.100, 0.644397, 0.100, 0.644397),
        (0.5, -4.35, -4.60, 0.085, 0.651550, 0.185, 0.604919),
        (0.0, -3.50, -3.60, 0.070, 0.658760, 0.270, 0.567232),
    ],
)
def test_the_worked_example(alpha, policy, reference, z, value, z_alone, value_alone):
    logps, ref_logps, batch = example()
    assert weighted_sums(logps, batch, alpha)[0, 0].item() == pytest.approx(policy)
    assert weighted_sums(ref_logps, batch, alpha)[0, 0].item() == pytest.approx(reference)
    for cfg, margin, expected in ((Config(0.1, alpha), z, value), (None, z_alone, value_alone)):
        if cfg is None and alpha == 1:
            continue
        losses, metrics = loss(logps, ref_logps, batch, cfg or Config(0.1, alpha, False))
        assert (
            losses.item()
            == pytest.approx(expected, abs=1e-6)
            == pytest.approx(math.log1p(math.exp(-margin)), abs=1e-6)
        )
        assert metrics["weight"].item() == pytest.approx(1 / (1 + math.exp(margin))) and metrics[
            "tail"
        ].item() == pytest.approx(2 / 8)


@pytest.mark.parametrize(("alpha", "value"), [(0.5, 0.644397), (0.0, 0.598139)])
def test_the_policy_alone_starts_off_ln_2(alpha, value):
    """The tail of the reference is worth 2 nats: an offset of beta (1 - alpha) 2."""
    _, ref_logps, batch = example()
    assert loss(ref_logps, ref_logps, batch, Config(0.1, alpha, False))[0].item() == pytest.approx(
        value, abs=1e-6
    )
    assert loss(ref_logps, ref_logps, batch, Config(0.1, alpha))[0].item() == pytest.approx(
        math.log(2), abs=1e-12
    )


# ---- identities


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_1_and_equal_lengths_are_dpo_bit_for_bit(dtype):
    logps, ref_logps, batch = ragged(dtype=dtype)
    ours, theirs = (
        value_and_gradient(logps, ref_logps, batch, *a)
        for a in ((Config(0.3, 1.0),), (dpo.Config(0.3), dpo.loss))
    )
    assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])
    same = SimpleNamespace(mask=torch.ones(6, 2, 7, dtype=torch.bool))
    theirs = value_and_gradient(logps, ref_logps, same, dpo.Config(0.3), dpo.loss)
    for alpha in (0.5, 0.0):
        for on_reference in (True, False):
            ours = value_and_gradient(logps, ref_logps, same, Config(0.3, alpha, on_reference))
            assert torch.equal(ours[0], theirs[0]) and torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("on_reference", [True, False])
@pytest.mark.parametrize("alpha", [0.7, 0.3, 0.0])
def test_ragged_responses_values_and_gradients_of_the_definition(alpha, on_reference):
    logps, ref_logps, batch = ragged(seed=3)
    cfg = Config(0.7, alpha, on_reference)
    ratio = weighted_sums(logps, batch, alpha) - weighted_sums(
        ref_logps, batch, alpha if on_reference else 1.0
    )
    z = 0.7 * (ratio[:, 0] - ratio[:, 1])
    losses, gradient = value_and_gradient(logps, ref_logps, batch, cfg)
    torch.testing.assert_close(losses, -F.logsigmoid(z), rtol=0, atol=1e-10)
    public = batch.mask.sum(-1).amin(1)
    power = torch.ones(6, 1, 7, dtype=torch.float64).masked_fill(
        torch.arange(7) >= public[:, None, None], alpha
    )
    size = (
        (0.7 * torch.sigmoid(-z)).detach()[:, None, None]
        * torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None]
        * batch.mask
    )
    torch.testing.assert_close(gradient * batch.mask, size * power, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x * batch.mask, ref_logps, batch, cfg)[0], logps)
    reference = ref_logps.clone().requires_grad_()
    (pull,) = torch.autograd.grad(loss(logps.detach(), reference, batch, cfg)[0].sum(), reference)
    torch.testing.assert_close(
        pull * batch.mask, -size * power if on_reference else -size, rtol=0, atol=1e-10
    )


def test_the_margin_is_a_line_in_alpha():
    logps, ref_logps, batch = ragged(seed=4)

    def z(alpha):
        return -torch.expm1(loss(logps, ref_logps, batch, Config(1.0, alpha))[0]).log()

    for alpha in (0.25, 0.5, 0.9):
        torch.testing.assert_close(
            z(alpha), (1 - alpha) * z(0.0) + alpha * z(1.0), rtol=0, atol=1e-6
        )


def test_alpha_0_never_looks_beyond_the_public_length():
    logps, ref_logps, batch = ragged(seed=5)
    public = batch.mask.sum(-1).amin(1)[:, None, None]
    beyond = batch.mask & (torch.arange(7) >= public)
    assert beyond.any()
    there = value_and_gradient(logps, ref_logps, batch, Config(0.3, 0.0))
    moved = (logps.detach() - 5 * beyond).requires_grad_()
    here = value_and_gradient(moved, ref_logps - 2 * beyond, batch, Config(0.3, 0.0))
    assert (
        torch.equal(there[0], here[0])
        and torch.equal(there[1], here[1])
        and (there[1][beyond] == 0).all()
    )
    end = batch.mask.sum(-1).argmin(1)  # the shorter response's last token counts in full
    for b in range(6):
        assert there[1][b, end[b], public[b, 0, 0] - 1] != 0


@pytest.mark.parametrize("on_reference", [True, False])
def test_positions_are_counted_in_response_tokens(on_reference):
    logps, ref_logps, batch = ragged(seed=6)
    cfg = Config(0.4, 0.3, on_reference)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    for pad in ((0, 3), (4, 0), (2, 5)):
        wide = SimpleNamespace(mask=F.pad(batch.mask, pad))
        torch.testing.assert_close(
            loss(F.pad(logps, pad), F.pad(ref_logps, pad), wide, cfg)[0], plain
        )
    for b in range(6):
        one = SimpleNamespace(mask=batch.mask[b : b + 1])
        torch.testing.assert_close(
            loss(logps[b : b + 1], ref_logps[b : b + 1], one, cfg)[0][0], plain[b]
        )
    back = loss(logps.flip(1), ref_logps.flip(1), SimpleNamespace(mask=batch.mask.flip(1)), cfg)[0]
    torch.testing.assert_close(
        torch.exp(-plain) + torch.exp(-back), torch.ones_like(plain)
    )  # z changes its sign


def test_it_is_no_smaller_beta_and_no_mean():
    """Weights before the public length, or lengths in the denominator, would change pairs of equal length."""
    logps, ref_logps, batch = ragged(seed=7)
    ours = loss(logps, ref_logps, batch, Config(0.3, 0.5))[0]
    same = batch.mask.sum(-1)[:, 0] == batch.mask.sum(-1)[:, 1]
    weak = dpo.loss(logps, ref_logps, batch, dpo.Config(0.15))[0]
    assert not torch.allclose(ours[~same], weak[~same])


# ---- numbers and errors


@pytest.mark.parametrize("cfg", [Config(), Config(1.0, 0.0), Config(1.0, 0.5, False)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_margins_and_single_tokens_stay_finite(cfg, dtype):
    mask = torch.tensor(
        [
            [[True, False], [True, True]],
            [[True, True], [True, False]],
            [[True, False], [True, False]],
        ]
    )
    for size in (1e4, -1e4):
        logps = (torch.tensor([size, -size], dtype=dtype)[None, :, None] * mask).requires_grad_()
        losses, gradient = value_and_gradient(
            logps, torch.zeros_like(logps), SimpleNamespace(mask=mask), cfg
        )
        assert (
            losses.isfinite().all()
            and gradient.isfinite().all()
            and losses.dtype == torch.promote_types(dtype, torch.float32)
        )


def test_sums_are_taken_in_float32_under_bfloat16():
    logps = torch.full((1, 2, 200), -1.0, dtype=torch.bfloat16)
    logps[0, 0, 0] = -2.0
    batch = SimpleNamespace(mask=torch.ones(1, 2, 200, dtype=torch.bool))
    losses, _ = loss(logps, torch.full_like(logps, -1.0), batch, Config(beta=1.0))
    assert losses.item() == pytest.approx(math.log1p(math.e), abs=1e-6)


@pytest.mark.parametrize(
    ("values", "word"),
    [(dict(beta=b), "beta") for b in (0.0, -0.1, math.inf, math.nan)]
    + [(dict(alpha=a), "alpha") for a in (-0.1, 1.1, math.nan)]
    + [(dict(alpha=1.0, on_reference=False), "on_reference")],
)
def test_values_out_of_range_are_refused(values, word):
    with pytest.raises(ValueError, match=word):
        Config(**values)


def test_what_is_no_pair_of_texts_is_refused(capsys, tmp_path, monkeypatch):
    logps, ref_logps, batch = ragged()
    with pytest.raises(ValueError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask = batch.mask.clone()
    batch.mask[0, 1] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())
    monkeypatch.chdir(tmp_path)
    assert (
        PAPER.worlds == ("text",)
        and train.cli(["--method", "ld_dpo", "--world", "bandit", "--length_bias", "0"]) == 2
    )
    assert "needs a world of text" in capsys.readouterr().err


# ---- where length is all there is to gain


def column(world, how):
    return [getattr(world, how)(Config(0.5, alpha)) for alpha in ALPHAS]


def test_the_toy():
    world = Wordy(0.1)
    chance = world.chance(world.start)
    assert chance.sum().item() == pytest.approx(1) and world.weight.sum().item() == pytest.approx(1)
    assert (chance * world.n).sum().item() == pytest.approx(3, abs=1e-3)
    n, good = world.n[world.pairs], world.good[world.pairs]
    alike = world.weight * ((good[:, 0] == good[:, 1]) & (n[:, 0] != n[:, 1]))
    assert ((alike * (n[:, 0] > n[:, 1])).sum() / alike.sum()).item() == pytest.approx(
        0.595, abs=1e-3
    )


@pytest.mark.parametrize(
    ("delta", "pushes"),
    [(1e-6, (1, 0.8929, 0.7857, 0.6786, 0.5715)), (0.1, (1, 0.8995, 0.7990, 0.6986, 0.5981))],
)
def test_c1_the_first_push_on_length_is_a_line_in_alpha(delta, pushes):
    found = column(Wordy(delta), "push")
    assert [x / found[0] for x in found] == pytest.approx(pushes, abs=1e-4)


def test_c2_the_optimum_of_biased_labels_is_shorter_and_as_good():
    lengths, good = zip(*column(Wordy(0.1), "optimum"))
    assert lengths == pytest.approx((10.585, 9.553, 8.316, 7.314, 6.478), abs=2e-3)
    assert good == pytest.approx((0.8808, 0.8801, 0.8790, 0.8779, 0.8767), abs=2e-4)
    assert 0.75 * math.exp(0.1 / 0.5) == pytest.approx(
        0.9161, abs=1e-4
    )  # what DPO makes of the filler, without the cap


def test_mild_bias_is_not_monotone():
    lengths, _ = zip(*column(Wordy(0.05), "optimum"))
    assert lengths == pytest.approx((4.841, 4.970, 4.923, 4.732, 4.457), abs=2e-3)


def test_c3_unbiased_labels():
    world = Wordy(0.0)
    lengths, _ = zip(*column(world, "optimum"))
    assert lengths == pytest.approx([3.0] * 5, abs=1e-3)
    alone = [Config(0.5, alpha, False) for alpha in ALPHAS[1:]]
    assert [world.optimum(cfg)[0] for cfg in alone] == pytest.approx(
        [1.929, 1.200, 0.663, 0.324], abs=2e-3
    )
    assert [world.expected(world.start, cfg).item() for cfg in alone] == pytest.approx(
        [0.7040, 0.7354, 0.7850, 0.8498], abs=1e-4
    )


def test_the_length_where_a_reward_is_reached():
    curve = [dict(kl=9.0, reward=r, length=n) for r, n in ((0.0, 10.0), (0.2, 20.0), (0.1, 50.0))]
    assert length_at(curve, 0.1) == 15.0 and length_at(curve, 0.2) == 20.0
    assert length_at([dict(curve[1]), dict(curve[1]), dict(curve[0])], 0.2) == 20.0
    with pytest.raises(ValueError, match="never reaches"):
        length_at(curve, 0.3)


def test_a_run_and_shared_scaffold():
    lab = Lab(
        Settings(base_steps=0, steps=2, prompts=16, batch_size=4, eval_size=4, max_response=8),
        quiet=True,
    )
    ends = [
        next(run(lab, cfg).parameters())
        for cfg in (Config(), Config(alpha=0.0), Config(on_reference=False))
    ]
    assert all(x.isfinite().all() for x in ends)
    assert inspect.getsource(run) == inspect.getsource(dpo.run)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(beta=0.3, alpha=0.3),
    dict(beta=1.7, alpha=0.0),
    dict(beta=0.7, alpha=0.6, on_reference=False),
]
INPUTS = builders.pairs
SURVIVORS = {}
