"""D3PO: the worked example, clipping, transitions of stored paths, and the limit on the KL."""

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from data import StopTraining, UserError, collate
from lab import Lab, Settings
from methods.d3po import Config, loss, prepare, rollout, run, steps_per_pair
from tests import builders
from tests.builders import margins, one_pair, ragged, swapped, value_and_gradient
from toy.exact import minimize


def small(**settings):
    """A Lab whose base model is hardly trained."""
    how = dict(base_steps=20, prompts=8, steps=6, batch_size=12, eval_size=16)
    how |= dict(world="gaussians", label_temperature=0.0)
    return Lab(Settings(**how | settings), quiet=True)


def density(x, mean, std=0.3):
    """The log density of a point, averaged over its dimensions."""
    x, mean = torch.tensor(x, dtype=torch.float64), torch.tensor(mean, dtype=torch.float64)
    return torch.distributions.Normal(mean, std).log_prob(x).mean().item()


# ---- values


@pytest.mark.paper
def test_the_worked_example():
    chosen, rejected = (0.5, -0.2), (-0.3, 0.1)
    ours = density(chosen, (0.4, -0.1)), density(rejected, (-0.2, 0.2))
    theirs = density(chosen, (0.2, 0.0)), density(rejected, (-0.25, 0.05))
    ratios = [a - b for a, b in zip(ours, theirs)]
    assert ratios == pytest.approx([0.305556, -0.041667], abs=1e-6)
    item = one_pair(*ours, *theirs)
    plain, metrics = loss(*item, Config(clip_ratio=0.0))
    assert plain.item() == pytest.approx(0.675937, abs=1e-6) and metrics["clipped"] == 0
    assert plain.item() == pytest.approx(-math.log(1 / (1 + math.exp(-0.034722))), abs=1e-6)
    clipped, metrics = loss(*item, Config())
    assert clipped.item() == pytest.approx(0.686322, abs=1e-6) and metrics["clipped"] == 0.5
    assert math.log(1.1) == pytest.approx(0.095310, abs=1e-6)


@pytest.mark.paper
def test_one_step_without_the_clip_has_the_optimum_of_the_paper_and_its_normalizer():
    reference = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)
    Q = torch.tensor([1.0, 0.0, -1.0], dtype=torch.float64)
    Z = (reference * Q.exp()).sum()
    assert Z.item() == pytest.approx(1.732717, abs=1e-6)
    assert Z.log().item() == pytest.approx(0.549691, abs=1e-6)
    chosen, rejected = torch.tensor([(a, b) for a in range(3) for b in range(3) if a != b]).T
    weight = torch.sigmoid(Q[chosen] - Q[rejected])  # how often the first one is chosen
    logits, cfg = torch.zeros(3, dtype=torch.float64, requires_grad=True), Config(1.0, 0.0)

    def pairs(logp):
        return torch.stack([logp[chosen], logp[rejected]], 1)[..., None]  # (6, 2, 1)

    def value():
        ours, theirs = pairs(logits.log_softmax(0)), pairs(reference.log())
        return (weight * loss(ours, theirs, builders.everything_scored(ours), cfg)[0]).mean()

    minimize([logits], value)
    expected = torch.tensor([0.78440, 0.17314, 0.04246], dtype=torch.float64)
    torch.testing.assert_close(logits.detach().softmax(0), expected, rtol=0, atol=1e-5)


@pytest.mark.paper
def test_the_clipped_loss_has_a_floor():
    losses, _ = loss(*margins([1e4, -1e4]), Config())
    span = math.log(1.1) - math.log(0.9)
    expected = [-logsigmoid(torch.tensor(s * 0.1 * span)).item() for s in (1, -1)]
    assert losses.tolist() == pytest.approx(expected, abs=1e-6)
    assert losses[0].item() == pytest.approx(0.683164, abs=1e-6) and losses[0] < math.log(2)


@pytest.mark.paper
def test_at_the_reference_a_step_costs_ln_2_and_has_a_gradient():
    logps, _, batch = ragged()
    losses, gradient = value_and_gradient(loss, logps, logps.detach(), batch, Config())
    assert losses.tolist() == pytest.approx([math.log(2)] * 5)
    assert gradient[:, 0, 0].tolist() == pytest.approx([-0.05] * 5)


@pytest.mark.paper
def test_a_clipped_side_has_no_gradient():
    item = one_pair(0.2, 0.05)
    _, gradient = value_and_gradient(loss, *item, Config())
    assert gradient[0, 0, 0] == 0 and gradient[0, 1, 0] > 0
    _, gradient = value_and_gradient(loss, *item, Config(clip_ratio=0.0))
    assert (gradient != 0).all()


@pytest.mark.paper
def test_clipping_is_that_of_the_ratio_and_asymmetric_in_the_log_domain():
    for d in (-0.2, -0.1, 0.0, 0.09, 0.2):
        value = loss(*one_pair(d, 0.0), Config(beta=1.0))[0]
        ratio = torch.tensor(d, dtype=torch.float64).exp().clamp(0.9, 1.1)
        torch.testing.assert_close(value, -logsigmoid(ratio.log())[None])


@pytest.mark.paper
def test_gradients_without_the_clip():
    logps, ref_logps, batch = ragged()
    cfg = Config(beta=0.7, clip_ratio=0.0)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))
    z = 0.7 * (logps - ref_logps).sum(-1).detach().diff(dim=1)[:, 0].neg()
    _, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    expected = 0.7 * torch.sigmoid(-z)[:, None] * z.new_tensor([-1.0, 1.0])
    torch.testing.assert_close(gradient, expected[..., None].expand_as(gradient))


def test_swapping_a_pair_flips_its_margin():
    item, cfg = margins([0.05, -0.02]), Config(beta=1.0)
    losses, others = (loss(*x, cfg)[0] for x in (item, swapped(item)))
    torch.testing.assert_close(others - losses, torch.tensor([0.05, -0.02]), atol=1e-3, rtol=0)


def test_log_ratios_that_overflow_stay_finite():
    for value in (1e4, -1e4):
        item = one_pair(value, -value, dtype=torch.float32)
        losses, gradient = value_and_gradient(loss, *item, Config())
        assert losses.isfinite().all() and gradient.isfinite().all()


# ---- transitions


@pytest.mark.parametrize("variant", ["all", "first"])
def test_rows_are_the_steps_of_both_paths_from_one_noise(variant):
    lab, cfg = small(device="cpu"), Config(sampler_steps=4, variant=variant)
    policy = lab.base()
    rows = rollout(lab, policy, cfg)
    count = steps_per_pair(cfg)
    assert count == (3 if variant == "all" else 1) and len(rows) == 8 * count
    for i in range(0, len(rows), count):
        path = rows[i : i + count]
        assert [row["step"] for row in path] == list(range(count))
        assert torch.equal(path[0]["x"][0], path[0]["x"][1])  # one x_T
        assert not torch.equal(path[0]["after"][0], path[0]["after"][1])
        for a, b in zip(path, path[1:]):
            assert torch.equal(a["after"], b["x"]) and torch.equal(a["responses"], b["responses"])
        better, worse = lab.world.reward([0, 0], path[0]["responses"]).tolist()
        assert better > worse and path[0]["scores"] == [1, 0]
    if variant == "all":  # the last, deterministic step leads from the last state to the image
        last, (times, levels) = rows[2], policy.grid(4)
        eps = policy.eps(last["after"], times[0], torch.zeros(2, dtype=torch.long))
        image = (last["after"] - (1 - levels[1]).sqrt() * eps) / levels[1].sqrt()
        torch.testing.assert_close(last["responses"], image)


def test_the_stored_steps_are_probable_under_the_policy_and_only_at_their_own_place():
    lab, cfg = small(prompts=200, device="cpu"), Config(sampler_steps=5)
    policy = lab.base()
    rows = rollout(lab, policy, cfg)
    batch = collate(rows)
    logps = policy.transition_logps(batch.x, batch.after, batch.step, batch.label, 5, 1.0)
    _, levels = policy.grid(5)
    a, b = levels[5 - batch.step, 0], levels[4 - batch.step, 0]
    std = ((1 - b) / (1 - a) * (1 - a / b)).sqrt()
    expected = -0.5 - std.log() - 0.5 * math.log(2 * math.pi)  # the mean of a normal's log density
    for step in range(4):
        gap = (logps.mean(1) - expected)[batch.step == step].mean().item()
        assert abs(gap) < 0.15
    other = policy.transition_logps(batch.x, batch.after, (batch.step + 1) % 4, batch.label, 5, 1.0)
    assert other.mean() < logps.mean() - 1


def test_ties_are_left_out_and_rounds_differ():
    lab, cfg = small(), Config(sampler_steps=3)
    policy = lab.base()
    with lab.in_round(1):
        other = rollout(lab, policy, cfg)
    assert not torch.equal(rollout(lab, policy, cfg)[0]["x"], other[0]["x"])
    lab.world.reward = lambda prompts, x: torch.zeros(len(x)).double()
    assert rollout(lab, policy, cfg) == []


def test_the_image_that_is_compared_is_scored_by_its_path_alone():
    lab = small()
    batch = collate(rollout(lab, lab.base(), Config(sampler_steps=3)))
    assert prepare(lab.base(), batch) is batch and batch.noise is None


# ---- runs


def test_a_run_trains_and_repeats_itself():
    ends = []
    for _ in range(2):
        policy = run(small(), Config(sampler_steps=3))
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*ends)


def test_both_images_of_every_pair_count_as_samples():
    lab = small(device="cpu")
    run(lab, Config(sampler_steps=3))  # 8 pairs a round, 16 rows, 2 steps of 12 rows
    assert lab.samples == 3 * 2 * 8


def test_a_policy_beyond_the_limit_is_stopped_and_the_run_says_so():
    lab = small(lr=0.02)
    policy = run(lab, Config(sampler_steps=4, kl_limit=0.01))
    assert "stopped after step 2" in lab.stopped and "kl_limit = 0.01" in lab.stopped
    assert policy.curve[-1]["step"] == 2 and policy.curve[-1]["kl"] > 0.02
    with lab.in_round(5), pytest.raises(StopTraining, match="leaves the data"):
        rollout(lab, policy, Config(sampler_steps=4, kl_limit=0.01))


def test_a_later_round_of_ties_ends_the_training_and_a_first_one_the_run():
    lab, rounds = small(), []
    plain = lab.world.reward

    def reward(prompts, x):
        later = lab.round is not None and lab.round >= min(rounds, default=1)
        return torch.zeros(len(x)).double() if later else plain(prompts, x)

    lab.world.reward = reward
    policy = run(lab, Config(sampler_steps=3))  # 2 steps per round
    assert "stopped after step 2: round 2 gave no pairs" in lab.stopped
    assert policy.curve[-1]["step"] == 2
    rounds.append(0)
    with pytest.raises(UserError, match="no rows to align on in round 0"):
        run(lab, Config(sampler_steps=3))


@pytest.mark.parametrize("reference", ["start", "round"])
def test_the_reference_stays_or_follows(reference):
    seen = []

    class Watched(Lab):
        def align(self, policy, data, loss, cfg, **how):
            def noted(logps, ref_logps, batch, cfg):
                seen.append((logps - ref_logps).abs().max().item())
                return loss(logps, ref_logps, batch, cfg)

            return super().align(policy, data, noted, cfg, **how)

    how = dict(base_steps=20, prompts=8, steps=4, batch_size=24, eval_size=16, lr=1e-3)
    lab = Watched(Settings(world="gaussians", **how), quiet=True)
    run(lab, Config(sampler_steps=4, reference=reference))  # one step per round
    assert len(seen) == 4 and seen[0] < 1e-5
    assert all(x > 1e-4 for x in seen[1:]) == (reference == "start")


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [dict(beta=0.0), dict(clip_ratio=1.0), dict(clip_ratio=-0.1), dict(eta=0.0), dict(eta=1.5)]
    + [dict(sampler_steps=1), dict(variant="last"), dict(reference="moving"), dict(kl_limit=0.0)],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Config(**wrong)


def test_the_pairs_of_a_file_are_refused_before_anything_is_trained():
    lab = small()
    lab.world.given = lambda k: []
    with pytest.raises(UserError, match="would not use those of gaussians"):
        run(lab, Config())
    assert lab.reference is None


def test_lists_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 7\)"):
        loss(*ragged(k=3), Config())


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=0.7, clip_ratio=0.3), dict(beta=2.5, clip_ratio=0.0)]
SURVIVORS = {}


def INPUTS():
    """Pairs far from the reference and near to it, where some ratios are not clipped."""
    logps, ref_logps, batch = ragged(seed=3)
    near = (ref_logps + 0.02 * logps, ref_logps, batch)
    return [*builders.pairs(), near]
