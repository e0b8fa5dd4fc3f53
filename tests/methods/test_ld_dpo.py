"""LD-DPO against its paper: values, gradients, identities, and the exact optimum where the labels
prefer longer responses."""

import inspect
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import train
from claims.ld_dpo import Fillers
from data import UserError
from lab import Lab, Settings
from methods import dpo, survey
from methods.ld_dpo import PAPER, Config, loss, run
from tests import builders
from tests.builders import value_and_gradient

ALPHAS = (1.0, 0.75, 0.5, 0.25, 0.0)


def example():
    """A pair: five chosen tokens, three rejected ones -> logps, ref_logps (1, 2, 5), batch."""
    policy, reference = torch.zeros(2, 1, 2, 5, dtype=torch.float64)
    policy[0, 0] = torch.tensor([-1.0, -0.5, -2.0, -1.5, -0.2])
    reference[0, 0] = torch.tensor([-1.1, -0.7, -1.8, -1.6, -0.4])
    policy[0, 1, :3] = torch.tensor([-1.2, -0.9, -2.5])
    reference[0, 1, :3] = torch.tensor([-1.0, -1.0, -2.0])
    mask = torch.tensor([[[True] * 5, [True] * 3 + [False] * 2]])
    return policy.requires_grad_(), reference, SimpleNamespace(mask=mask)


def ragged(seed=0, dtype=torch.float64):
    """Six pairs of responses of 1 to 7 tokens."""
    return builders.ragged(rows=6, seed=seed, dtype=dtype)


def split_sums(logps, batch, alpha):
    """The split log-probs (B, 2) of the definition, in plain loops."""
    rows = []
    for b, mask in enumerate(batch.mask):
        n = mask.sum(1).tolist()
        for k in (0, 1):
            rows.append(sum(logps[b, k, t] * (1.0 if t < min(n) else alpha) for t in range(n[k])))
    return torch.stack(rows).view(-1, 2)


# ---- values


@pytest.mark.paper
@pytest.mark.parametrize(
    ("alpha", "policy", "reference", "z", "value"),
    [
        (1.0, -5.20, -5.60, 0.100, 0.644397),
        (0.5, -4.35, -4.60, 0.085, 0.651550),
        (0.0, -3.50, -3.60, 0.070, 0.658760),
    ],
)
def test_the_loss_has_the_value_of_the_worked_example(alpha, policy, reference, z, value):
    logps, ref_logps, batch = example()
    assert split_sums(logps, batch, alpha)[0, 0].item() == pytest.approx(policy)
    assert split_sums(ref_logps, batch, alpha)[0, 0].item() == pytest.approx(reference)
    losses, metrics = loss(logps, ref_logps, batch, Config(0.1, alpha))
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-z)), abs=1e-6)
    assert metrics["weight"].item() == pytest.approx(1 / (1 + math.exp(z)))
    assert metrics["tail"].item() == pytest.approx(2 / 8)


@pytest.mark.paper
@pytest.mark.parametrize(("alpha", "z", "value"), [(0.5, 0.185, 0.604919), (0.0, 0.270, 0.567232)])
def test_the_worked_example_without_splitting_the_reference(alpha, z, value):
    losses, metrics = loss(*example(), Config(0.1, alpha, False))
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert losses.item() == pytest.approx(math.log1p(math.exp(-z)), abs=1e-6)
    assert metrics["weight"].item() == pytest.approx(1 / (1 + math.exp(z)))


@pytest.mark.paper
@pytest.mark.parametrize(("alpha", "value"), [(0.5, 0.644397), (0.0, 0.598139)])
def test_only_a_split_reference_starts_at_ln_2(alpha, value):
    """The reference's tail is worth 2 nats, an offset of beta (1 - alpha) 2."""
    _, ref_logps, batch = example()
    alone = loss(ref_logps, ref_logps, batch, Config(0.1, alpha, False))[0]
    both = loss(ref_logps, ref_logps, batch, Config(0.1, alpha))[0]
    assert alone.item() == pytest.approx(value, abs=1e-6)
    assert both.item() == pytest.approx(math.log(2), abs=1e-12)


# ---- identities


@pytest.mark.paper
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_alpha_1_is_dpo_bit_for_bit(dtype):
    item = ragged(dtype=dtype)
    ours = value_and_gradient(loss, *item, Config(0.3, 1.0))
    theirs = value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.paper
@pytest.mark.parametrize("on_reference", [True, False])
@pytest.mark.parametrize("alpha", [0.5, 0.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pairs_of_equal_length_are_dpo_bit_for_bit(dtype, alpha, on_reference):
    logps, ref_logps, _ = ragged(dtype=dtype)
    batch = SimpleNamespace(mask=torch.ones(6, 2, 7, dtype=torch.bool))
    ours = value_and_gradient(loss, logps, ref_logps, batch, Config(0.3, alpha, on_reference))
    theirs = value_and_gradient(dpo.loss, logps, ref_logps, batch, dpo.Config(0.3))
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("on_reference", [True, False])
@pytest.mark.parametrize("alpha", [0.7, 0.3, 0.0])
def test_values_and_gradients_of_the_definition(alpha, on_reference):
    logps, ref_logps, batch = ragged(seed=3)
    cfg = Config(0.7, alpha, on_reference)
    theirs = split_sums(ref_logps, batch, alpha if on_reference else 1.0)
    ratio = split_sums(logps, batch, alpha) - theirs
    z = 0.7 * (ratio[:, 0] - ratio[:, 1])
    losses, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    torch.testing.assert_close(losses, -F.logsigmoid(z), rtol=0, atol=1e-10)
    public = batch.mask.sum(-1).amin(1)[:, None, None]
    ones = torch.ones(6, 1, 7, dtype=torch.float64)
    power = ones.masked_fill(torch.arange(7) >= public, alpha)
    sign = torch.tensor([-1.0, 1.0], dtype=torch.float64)[:, None]
    size = (0.7 * torch.sigmoid(-z)).detach()[:, None, None] * sign * batch.mask
    torch.testing.assert_close(gradient * batch.mask, size * power, rtol=0, atol=1e-10)
    assert torch.autograd.gradcheck(lambda x: loss(x * batch.mask, ref_logps, batch, cfg)[0], logps)
    reference = ref_logps.clone().requires_grad_()
    (pull,) = torch.autograd.grad(loss(logps.detach(), reference, batch, cfg)[0].sum(), reference)
    expected = -size * power if on_reference else -size
    torch.testing.assert_close(pull * batch.mask, expected, rtol=0, atol=1e-10)


@pytest.mark.paper
def test_the_margin_is_linear_in_alpha():
    logps, ref_logps, batch = ragged(seed=4)

    def z(alpha):
        return -torch.expm1(loss(logps, ref_logps, batch, Config(1.0, alpha))[0]).log()

    for alpha in (0.25, 0.5, 0.9):
        line = (1 - alpha) * z(0.0) + alpha * z(1.0)
        torch.testing.assert_close(z(alpha), line, rtol=0, atol=1e-6)


@pytest.mark.paper
def test_alpha_0_never_looks_beyond_the_public_length():
    logps, ref_logps, batch = ragged(seed=5)
    public = batch.mask.sum(-1).amin(1)[:, None, None]
    beyond = batch.mask & (torch.arange(7) >= public)
    assert beyond.any()
    losses, gradient = value_and_gradient(loss, logps, ref_logps, batch, Config(0.3, 0.0))
    moved = (logps.detach() - 5 * beyond).requires_grad_()
    again = value_and_gradient(loss, moved, ref_logps - 2 * beyond, batch, Config(0.3, 0.0))
    assert torch.equal(losses, again[0])
    assert torch.equal(gradient, again[1])
    assert (gradient[beyond] == 0).all()
    shorter = batch.mask.sum(-1).argmin(1)  # its last token counts in full
    for b in range(6):
        assert gradient[b, shorter[b], public[b, 0, 0] - 1] != 0


@pytest.mark.paper
@pytest.mark.parametrize("on_reference", [True, False])
def test_positions_are_counted_in_response_tokens(on_reference):
    logps, ref_logps, batch = ragged(seed=6)
    cfg = Config(0.4, 0.3, on_reference)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    for pad in ((0, 3), (4, 0), (2, 5)):
        wide = SimpleNamespace(mask=F.pad(batch.mask, pad))
        again = loss(F.pad(logps, pad), F.pad(ref_logps, pad), wide, cfg)[0]
        torch.testing.assert_close(again, plain)


@pytest.mark.paper
@pytest.mark.parametrize("on_reference", [True, False])
def test_swapping_the_pair_changes_the_sign_of_the_margin(on_reference):
    item, cfg = ragged(seed=6), Config(0.4, 0.3, on_reference)
    plain, back = loss(*item, cfg)[0], loss(*builders.swapped(item), cfg)[0]
    torch.testing.assert_close(torch.exp(-plain) + torch.exp(-back), torch.ones_like(plain))


@pytest.mark.paper
def test_pairs_of_different_length_are_not_dpo_with_a_smaller_beta():
    logps, ref_logps, batch = ragged(seed=7)
    ours = loss(logps, ref_logps, batch, Config(0.3, 0.5))[0]
    same = batch.mask.sum(-1)[:, 0] == batch.mask.sum(-1)[:, 1]
    weak = dpo.loss(logps, ref_logps, batch, dpo.Config(0.15))[0]
    assert not torch.allclose(ours[~same], weak[~same])


# ---- precision and errors


@pytest.mark.parametrize("cfg", [Config(), Config(1.0, 0.0), Config(1.0, 0.5, False)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_huge_margins_and_single_tokens_stay_finite(cfg, dtype):
    tokens = torch.tensor([[[1, 0], [1, 1]], [[1, 1], [1, 0]], [[1, 0], [1, 0]]])
    batch = SimpleNamespace(mask=tokens.bool())
    for size in (1e4, -1e4):
        sides = torch.tensor([size, -size], dtype=dtype)[:, None]
        logps = (sides * batch.mask).requires_grad_()
        losses, gradient = value_and_gradient(loss, logps, torch.zeros_like(logps), batch, cfg)
        assert losses.isfinite().all()
        assert gradient.isfinite().all()
        assert losses.dtype == torch.promote_types(dtype, torch.float32)


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
    with pytest.raises(UserError, match=word):
        Config(**values)


def test_rows_that_are_not_pairs_are_refused():
    logps, ref_logps, batch = ragged()
    with pytest.raises(UserError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(UserError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


@pytest.mark.slow
def test_a_world_of_tables_is_refused(capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert PAPER.worlds == ("text",)
    assert train.main(["--method", "ld_dpo", "--world", "bandit", "--length_bias", "0"]) == 2
    assert "needs a world of text" in capsys.readouterr().err


# ---- the exact optimum where the labels prefer longer responses


def push(world, cfg):
    """The first step's pull on b, towards more fillers, of pairs that are equally good."""
    theta, good = world.start.clone().requires_grad_(), world.good[world.pairs]
    weight = world.weight * (good[:, 0] == good[:, 1])
    value = (weight * world.losses(theta, loss, cfg)).sum()
    return -torch.autograd.grad(value, theta)[0][1].item()


def fillers(world, alpha, on_reference=True):
    """E[n] at the optimum of the expected loss."""
    return world.optimum(loss, Config(0.5, alpha, on_reference))["fillers"]


@pytest.mark.paper
def test_the_reference_and_the_labels_of_the_exact_model():
    world = Fillers(0.1)
    probs = world.probs(world.start)
    assert probs.sum().item() == pytest.approx(1)
    assert world.weight.sum().item() == pytest.approx(1)
    assert (probs * world.n).sum().item() == pytest.approx(3, abs=1e-3)
    n, good = world.n[world.pairs], world.good[world.pairs]
    alike = world.weight * ((good[:, 0] == good[:, 1]) & (n[:, 0] != n[:, 1]))
    longer = (alike * (n[:, 0] > n[:, 1])).sum() / alike.sum()
    assert longer.item() == pytest.approx(0.595, abs=1e-3)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("bias", "pushes"),
    [(1e-6, (1, 0.8929, 0.7857, 0.6786, 0.5715)), (0.1, (1, 0.8995, 0.7990, 0.6986, 0.5981))],
)
def test_the_first_push_on_length_is_linear_in_alpha(bias, pushes):
    world = Fillers(bias)
    found = [push(world, Config(0.5, alpha)) for alpha in ALPHAS]
    assert [x / found[0] for x in found] == pytest.approx(pushes, abs=1e-4)


@pytest.mark.paper
def test_with_biased_labels_the_optimum_is_shorter_and_as_good():
    world = Fillers(0.1)
    looks = [world.optimum(loss, Config(0.5, alpha)) for alpha in ALPHAS]
    lengths, good = ([look[name] for look in looks] for name in ("fillers", "quality"))
    assert lengths == pytest.approx((10.585, 9.553, 8.316, 7.314, 6.478), abs=2e-3)
    assert good == pytest.approx((0.8808, 0.8801, 0.8790, 0.8779, 0.8767), abs=2e-4)
    assert max(good) - min(good) < 0.005
    assert 1 - lengths[2] / lengths[0] == pytest.approx(0.21, abs=5e-3)
    assert 1 - lengths[4] / lengths[0] == pytest.approx(0.39, abs=5e-3)


@pytest.mark.paper
def test_with_a_mild_bias_a_smaller_alpha_is_not_always_shorter():
    world = Fillers(0.05)
    lengths = [fillers(world, alpha) for alpha in ALPHAS]
    assert lengths == pytest.approx((4.841, 4.970, 4.923, 4.732, 4.457), abs=2e-3)


@pytest.mark.paper
def test_without_bias_the_length_stays():
    world = Fillers(0.0)
    lengths = [fillers(world, alpha) for alpha in ALPHAS]
    assert lengths == pytest.approx([3.0] * 5, abs=1e-3)


@pytest.mark.paper
def test_a_reference_that_is_not_split_shortens_without_any_bias():
    world = Fillers(0.0)
    lengths = [fillers(world, alpha, on_reference=False) for alpha in ALPHAS[1:]]
    assert lengths == pytest.approx([1.929, 1.200, 0.663, 0.324], abs=2e-3)
    alone = [Config(0.5, alpha, False) for alpha in ALPHAS[1:]]
    starts = [(world.weight * world.losses(world.start, loss, cfg)).sum().item() for cfg in alone]
    assert starts == pytest.approx([0.7040, 0.7354, 0.7850, 0.8498], abs=1e-4)


@pytest.mark.paper
def test_dpo_at_the_optimum_lengthens_by_the_bias_over_beta():
    """log p(filler) = log 0.75 + bias / beta, apart from the cap."""
    assert 0.75 * math.exp(0.1 / 0.5) == pytest.approx(0.9161, abs=1e-4)


@pytest.mark.parametrize("variant", ["dpo", "r_dpo"])
def test_sampled_pairs_and_a_penalty_that_equals_the_bias(variant):
    """R-DPO ends at the length of the reference; DPO ends far above it."""
    world = Fillers(0.1, 20000, torch.Generator().manual_seed(0))
    assert world.weight.sum().item() == pytest.approx(1)
    fields = dict(alpha=0.1) if variant == "r_dpo" else {}
    found = world.optimum(survey.loss, survey.Config(variant, 0.5, **fields))
    assert found["quality"] == pytest.approx(0.8808, abs=0.02)
    length = dict(dpo=10.585, r_dpo=3.0)[variant]
    assert found["fillers"] == pytest.approx(length, rel=0.1)


# ---- runs


def test_a_run_trains_in_every_variant():
    settings = Settings(
        base_steps=0, steps=2, prompts=16, batch_size=4, eval_size=4, max_response=8
    )
    lab = Lab(settings, quiet=True)
    for cfg in (Config(), Config(alpha=0.0), Config(on_reference=False)):
        assert next(run(lab, cfg).parameters()).isfinite().all()
    assert inspect.getsource(run) == inspect.getsource(dpo.run)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [
    dict(beta=0.3, alpha=0.3),
    dict(beta=1.7, alpha=0.0),
    dict(beta=0.7, alpha=0.6, on_reference=False),
]
INPUTS = builders.pairs
SURVIVORS = {}
