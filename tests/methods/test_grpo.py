"""GRPO, Dr. GRPO and DAPO against their formulas, and the weights of DisCO's proposition 1."""

import math
from types import SimpleNamespace

import pytest
import torch

from lab import Lab, Settings
from methods.grpo import VARIANTS, Config, advantages, loss, run
from tests import builders


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def group(scores, change, ref=-1.0):
    """One group of one-token responses whose log-prob changed by `change` since pi_old."""
    change = tensor(change)[None, :, None]
    ref_logps = torch.full_like(change, ref)
    mask = torch.ones_like(change, dtype=torch.bool)
    batch = SimpleNamespace(mask=mask, scores=tensor([scores]))
    return (ref_logps + change).requires_grad_(), ref_logps, batch


def ragged(seed, rows=6, k=5, length=4):
    """Random groups of 1 to k verified responses, at ratios of 1/e to e to the old policy."""
    return builders.ragged(rows, k, length, seed, scale=1.0, fewest=1, scores=builders.verdicts)


def gradient(item, cfg):
    return torch.autograd.grad(loss(*item, cfg)[0].mean(), item[0])[0] * item[2].mask


# ---- advantages


def test_advantages_are_in_standard_deviations_of_the_group():
    rewards, present = tensor([[1.0, 0.0, 0.0, 0.0]]), torch.ones(1, 4, dtype=torch.bool)
    plain = advantages(rewards, present, scale=False)
    assert plain[0].tolist() == pytest.approx([0.75, -0.25, -0.25, -0.25])
    spread = math.sqrt(0.25 * 0.75)  # of a share of 1/4, over n and not n - 1
    scaled = advantages(rewards, present, scale=True)
    assert scaled[0].tolist() == pytest.approx([0.75 / spread] + [-0.25 / spread] * 3)


def test_advantages_take_any_rewards_and_sum_to_zero():
    g = torch.Generator().manual_seed(0)
    rewards = torch.randn(7, 5, generator=g, dtype=torch.float64)
    present = torch.arange(5) < torch.randint(2, 6, (7, 1), generator=g)
    scaled = advantages(rewards, present, scale=True) * present
    torch.testing.assert_close(scaled.sum(1), torch.zeros(7).double(), rtol=0, atol=1e-12)
    torch.testing.assert_close(scaled.square().sum(1), present.sum(1).double())


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("score", [0.0, 1.0])
def test_a_group_that_is_all_right_or_all_wrong_teaches_nothing(variant, score):
    logps, ref_logps, batch = ragged(7)
    batch.scores = batch.mask.any(-1) * score
    losses, metrics = loss(logps, ref_logps, batch, Config(variant))
    assert (losses == 0).all() and metrics["mixed"] == 0
    assert (gradient((logps, ref_logps, batch), Config(variant)) == 0).all()


# ---- the weight of a question


@pytest.mark.paper
@pytest.mark.parametrize(
    ("k", "grpo", "bessel", "dr_grpo"),
    [
        (1, 0.330719, 0.309359, 0.109375),
        (2, 0.433013, 0.405046, 0.1875),
        (4, 0.5, 0.467707, 0.25),
        (7, 0.330719, 0.309359, 0.109375),
    ],
)
def test_weight_of_a_question_in_each_variant(k, grpo, bessel, dr_grpo):
    """DisCO, prop. 1, for 8 responses, k of them right: what multiplies the gradient of the gap."""
    item = group([1.0] * k + [0.0] * (8 - k), [0.0] * 8)
    weight = {}
    for variant in VARIANTS:
        cfg = Config(variant)
        grad = gradient(item, cfg)[0, :, 0] * (cfg.normaliser or 1.0)
        assert grad.sum().item() == pytest.approx(0, abs=1e-12)
        weight[variant] = -grad[:k].sum().item()
    p = k / 8
    assert weight["grpo"] == pytest.approx(grpo, abs=1e-6)
    assert weight["grpo"] == pytest.approx(math.sqrt(p * (1 - p)), abs=1e-12)
    # the official code divides by n - 1
    assert weight["grpo"] * math.sqrt(7 / 8) == pytest.approx(bessel, abs=1e-6)
    assert weight["dr_grpo"] == pytest.approx(dr_grpo, abs=1e-6)
    assert weight["dapo"] == pytest.approx(weight["grpo"])


@pytest.mark.paper
@pytest.mark.parametrize(("variant", "high"), [("grpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28)])
def test_with_clipping_the_objective_is_a_weighted_gap_of_clipped_scores(variant, high):
    """Scores min(rho, 1 + high) of right and max(rho, 1 - epsilon) of wrong responses (prop. 1)."""
    g = torch.Generator().manual_seed(5)
    ref = -torch.rand(9, 8, 3, generator=g, dtype=torch.float64)
    logps = ref + 0.5 * torch.randn(ref.shape, generator=g, dtype=torch.float64)
    right = torch.rand(9, 8, generator=g) < 0.4
    batch = SimpleNamespace(mask=torch.ones(9, 8, 3, dtype=torch.bool), scores=right.double())
    losses, _ = loss(logps, ref, batch, Config(variant))
    ratio = (logps - ref).exp()
    assert (ratio > 1 + high).any() and (ratio < 0.8).any()
    s = torch.where(right[..., None], ratio.clamp(max=1 + high), ratio.clamp(min=0.8)).mean(-1)
    gap = (s * right).sum(1) / right.sum(1) - (s * ~right).sum(1) / (~right).sum(1)
    p = right.double().mean(1)
    weight = p * (1 - p) * 3 / 48 if variant == "dr_grpo" else (p * (1 - p)).sqrt()
    expected = torch.where((p > 0) & (p < 1), weight * gap, 0.0)
    torch.testing.assert_close(-losses, expected, atol=1e-14, rtol=0)


# ---- clipping


@pytest.mark.parametrize(("variant", "high"), [("grpo", 0.2), ("dr_grpo", 0.2), ("dapo", 0.28)])
def test_clipping_stops_the_gradient_on_both_sides_but_never_of_a_way_back(variant, high):
    """The gradient is 0 for a right response above 1 + high and a wrong one below 1 - epsilon."""
    inside, above, below = 0.0, math.log(1 + high) + 0.01, math.log(0.8) - 0.01
    for right, wrong, moves in (
        (inside, inside, (True, True)),
        (above, above, (False, True)),
        (below, below, (True, False)),
        (math.log(1 + high) - 0.01, math.log(0.8) + 0.01, (True, True)),
    ):
        grad = gradient(group([1.0, 0.0], [right, wrong]), Config(variant))[0, :, 0]
        assert ((grad != 0).tolist()) == list(moves)
        assert grad[0] <= 0 <= grad[1]


def test_clipping_limits_the_value_of_a_ratio():
    """With A = 1 and -1, rho = 1.5 is clipped to 1.2 (dapo: 1.28), and rho = 0.5 to 0.8."""
    item = group([1.0, 0.0], [math.log(1.5), math.log(0.5)])
    assert loss(*item, Config())[0].item() == pytest.approx(-(1.2 - 0.8) / 2)
    assert loss(*item, Config("dapo"))[0].item() == pytest.approx(-(1.28 - 0.8) / 2)
    item = group([1.0, 0.0], [math.log(0.5), math.log(1.5)])  # pessimistic: not clipped here
    assert loss(*item, Config())[0].item() == pytest.approx(-(0.5 - 1.5) / 2)


# ---- averages over tokens and responses


def test_each_variant_counts_tokens_in_its_own_way():
    """A right response of 1 token and a wrong one of 3, at pi_old; a group that is all right."""
    mask = torch.tensor([[[1, 0, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 1]]]).bool()
    batch = SimpleNamespace(mask=mask, scores=tensor([[1.0, 0.0], [1.0, 1.0]]))
    ref = -mask.double()
    item = (ref.clone().requires_grad_(), ref, batch)
    # a gradient per token, times 2 rows: A = 1 and -1 (dr_grpo: 1/2 and -1/2)
    expected = {
        "grpo": [-1 / 2, 1 / 6],  # 1/2 response, 1 or 3 tokens
        "dr_grpo": [-1 / 2 / 2 / 48, 1 / 2 / 2 / 48],
        "dapo": [-2 / 9, 2 / 9],  # 9 tokens in the whole batch, two rows
    }
    for variant, (right, wrong) in expected.items():
        grad = 2 * gradient(item, Config(variant))
        assert grad[0, 0].tolist() == pytest.approx([right, 0, 0])
        assert grad[0, 1].tolist() == pytest.approx([wrong] * 3)
        assert (grad[1] == 0).all()


def test_dapo_is_one_mean_over_all_tokens_of_the_batch():
    logps, ref_logps, batch = ragged(6)
    A = advantages(batch.scores, batch.mask.any(-1), scale=True)[..., None]
    ratio = (logps - ref_logps).exp()
    J = torch.minimum(ratio * A, ratio.clamp(0.8, 1.28) * A)[batch.mask]
    assert len(J) == batch.mask.sum()
    torch.testing.assert_close(loss(logps, ref_logps, batch, Config("dapo"))[0].mean(), -J.mean())


@pytest.mark.parametrize("variant", VARIANTS)
def test_ragged_groups_against_the_definition(variant):
    logps, ref, batch = ragged(6)
    n = batch.mask.any(-1).sum(1)  # responses of each group
    cfg = Config(variant)
    high = cfg.epsilon_high or cfg.epsilon
    rows, total = [], batch.mask.sum()
    for b in range(len(n)):
        rewards = batch.scores[b, : n[b]]
        spread = rewards.std(unbiased=False) if variant != "dr_grpo" else tensor(1.0)
        terms = []
        for k in range(n[b]):
            A = (rewards[k] - rewards.mean()) / spread if spread > 0 else tensor(0.0)
            ratio = (logps[b, k] - ref[b, k])[batch.mask[b, k]].exp()
            token = torch.minimum(ratio * A, ratio.clamp(1 - cfg.epsilon, 1 + high) * A)
            if variant == "grpo":
                terms.append(token.mean())
            elif variant == "dr_grpo":
                terms.append(token.sum() / 48)
            else:
                terms.append(token.sum() * len(n) / total)
        rows.append(-torch.stack(terms).sum() / (1 if variant == "dapo" else n[b]))
    losses, metrics = loss(logps, ref, batch, cfg)
    torch.testing.assert_close(losses, torch.stack(rows))
    (expected,) = torch.autograd.grad(torch.stack(rows).mean(), logps)
    torch.testing.assert_close(gradient((logps, ref, batch), cfg), expected)
    kl = ((ref - logps) * batch.mask).sum() / total
    assert metrics["round_kl"].item() == pytest.approx(kl.item())


@pytest.mark.parametrize("variant", VARIANTS)
def test_gradient_by_finite_differences(variant):
    logps, ref, batch = ragged(19, rows=3, k=3, length=2)
    cfg = Config(variant)
    assert torch.autograd.gradcheck(lambda x: loss(x * batch.mask, ref, batch, cfg)[0], logps)


@pytest.mark.parametrize("variant", ["grpo", "dr_grpo"])
def test_absent_responses_change_nothing(variant):
    logps, ref, batch = ragged(10)
    n = batch.mask.any(-1).sum(1)  # responses of each group
    losses, _ = loss(logps, ref, batch, Config(variant))
    for b in range(len(n)):
        one, m = slice(b, b + 1), n[b]
        alone = SimpleNamespace(mask=batch.mask[one, :m], scores=batch.scores[one, :m])
        value, _ = loss(logps[one, :m], ref[one, :m], alone, Config(variant))
        torch.testing.assert_close(losses[one], value)


@pytest.mark.parametrize("margin", [1e2, -1e2, 1e4, -1e4])
@pytest.mark.parametrize("variant", VARIANTS)
def test_far_from_pi_old_loss_and_gradient_stay_finite_in_float32(variant, margin):
    logps = torch.tensor([[[margin], [-1.0], [0.5]]], requires_grad=True)
    batch = SimpleNamespace(
        mask=torch.ones(1, 3, 1, dtype=torch.bool), scores=torch.tensor([[1.0, 0.0, 0.0]])
    )
    losses, metrics = loss(logps, torch.zeros(1, 3, 1), batch, Config(variant))
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    assert losses.isfinite().all() and grad.isfinite().all()
    assert all(value.isfinite() and not value.requires_grad for value in metrics.values())


@pytest.mark.parametrize("variant", VARIANTS)
def test_losses_are_in_float32_or_better(variant):
    batch = SimpleNamespace(
        mask=torch.ones(1, 2, 1, dtype=torch.bool), scores=torch.tensor([[1.0, 0.0]])
    )
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        x = torch.zeros(1, 2, 1, dtype=dtype)
        assert loss(x, x, batch, Config(variant))[0].dtype == expected


# ---- the Config and the run


@pytest.mark.parametrize(
    "fields",
    [
        dict(variant="ppo"),
        dict(epsilon=-0.2),
        dict(epsilon=math.nan),
        dict(epsilon_high=0.3),
        dict(normaliser=10.0),
        dict(epsilon_high=-0.3, variant="dapo"),
        dict(normaliser=10.0, variant="dapo"),
        dict(epsilon_high=0.3, variant="dr_grpo"),
        dict(normaliser=0.0, variant="dr_grpo"),
    ],
)
def test_what_does_nothing_or_cannot_be_is_refused(fields):
    name, value = next(iter(fields.items()))
    with pytest.raises(ValueError, match=f"{name} = {value}"):
        Config(**fields)


def test_every_variant_has_its_defaults():
    for variant, known in VARIANTS.items():
        idle = dict(epsilon_high=None, normaliser=None)
        assert vars(Config(variant)) == dict(variant=variant) | idle | known


@pytest.mark.parametrize(("prompts", "questions", "every"), [(None, 64, 4), (40, 40, 3), (5, 5, 1)])
def test_a_round_samples_afresh_and_takes_one_pass(prompts, questions, every):
    seen = {}
    lab = SimpleNamespace(
        settings=SimpleNamespace(prompts=prompts), batch_size=16, k=8, base=lambda: "base"
    )
    lab.preferences = lambda policy, k, n, ties: (policy, k, n, ties)
    lab.align = lambda policy, data, loss, cfg, **kwargs: seen.update(kwargs, rows=data("now", 3))
    run(lab, Config())
    assert seen == dict(reference="round", every=every, rows=("now", 8, questions, True))


def test_groups_of_two_that_are_all_right_stay_in_the_data():
    lab = Lab(
        Settings(world="arithmetic", k=2, steps=1, batch_size=4, base_steps=1, eval_size=2),
        quiet=True,
    )
    lab.world.reward = lambda prompts, responses: torch.ones(len(responses), dtype=torch.float64)
    seen = []
    lab.align = lambda policy, data, *rest, **kwargs: seen.extend(data(policy, 0))
    run(lab, Config())
    assert [row["scores"] for row in seen] == [[1.0, 1.0]] * 16


# ---- mutants


def coupled(cfg):
    """Whether the loss of a row depends on the other rows of its batch."""
    return cfg.variant == "dapo"  # divides by the tokens of the batch


CASES = [
    dict(epsilon=0.3),
    dict(variant="dr_grpo", epsilon=0.3, normaliser=7.0),
    dict(variant="dapo", epsilon=0.2, epsilon_high=0.4),
    dict(variant="dapo", epsilon=0.4, epsilon_high=0.2),
]
SURVIVORS = {
    "loss: 1 -> 2": "the size of a group of one response, whose advantage is 0",
    "loss: len(J) -> len(_detached(J))": "a length",
    "loss: logps -> ref_logps": "its dtype alone is read",
}


def INPUTS():
    """Groups, and rows with a single response."""
    return [*builders.groups(), builders.ragged(5, 1, 4, 8, scores=builders.verdicts)]
