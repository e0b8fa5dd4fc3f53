"""SmPO: the weights of the paper, identities with InPO, relabelling, and what ReNoise changes."""

import math
from types import SimpleNamespace

import pytest
import torch

import toy.world
from data import collate
from diffusion import ddim_step
from lab import Lab, Settings
from methods import inpo
from methods.smpo import Config, inversion, loss, rated, relabelled, reward_model, run, weights
from tests import builders
from tests.builders import changed, margins, ragged, value_and_gradient
from toy.gaussians import MLP, World

LOW, HIGH = 0.11543526500463486, 0.28201571106910706  # the extremes of PickScore in the code


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def double(*values):
    return torch.tensor(values, dtype=torch.float64)


def weighted(item, omega):
    """An item with a column omega, one weight per row."""
    return changed(item, omega=torch.as_tensor(omega, dtype=torch.float64))


def small(**settings):
    """A Lab whose base model is hardly trained."""
    how = dict(base_steps=20, prompts=64, steps=4, batch_size=16, eval_size=16)
    return Lab(Settings(world="gaussians", **how | settings), quiet=True)


# ---- the weights


@pytest.mark.paper
def test_the_weight_of_the_worked_example():
    low, high = double(LOW, HIGH)
    scaled = (double(0.2350, 0.2100) - low) / (high - low)
    assert scaled.tolist() == pytest.approx([0.717760, 0.567682], abs=1e-6)
    p = torch.sigmoid(scaled[0] - scaled[1]).item()
    assert p == pytest.approx(0.537449, abs=1e-6)
    assert 2 * p - 1 == pytest.approx(0.074898, abs=1e-6)
    assert 2 * p - 1 == pytest.approx(math.tanh(0.075039), abs=1e-6)
    omega = weights(double(0.2350), double(0.2100), low, high, 10.0)
    assert omega.item() == pytest.approx(0.748983, abs=1e-6)
    assert omega.item() == pytest.approx(10 * (2 * p - 1))
    largest = weights(high[None], low[None], low, high, 10.0).item()
    assert largest == pytest.approx(4.621172, abs=1e-6)
    assert torch.sigmoid(double(1.0)).item() == pytest.approx(0.731059, abs=1e-6)


@pytest.mark.paper
def test_the_loss_of_the_worked_example():
    item = weighted(margins([0.25]), [0.748983])
    losses, metrics = loss(*item, Config(beta=1.0))
    assert losses.item() == pytest.approx(0.603901, abs=1e-6)
    assert -math.log(1 / (1 + math.exp(-0.187246))) == pytest.approx(0.603901, abs=1e-6)
    assert metrics["omega"].item() == pytest.approx(0.748983)


@pytest.mark.paper
def test_a_tie_has_weight_0_costs_ln_2_and_has_no_gradient():
    assert weights(double(1.0), double(1.0), *double(0, 2), 10.0).item() == 0
    for item in (ragged(), ragged(seed=1, scale=9)):
        losses, gradient = value_and_gradient(loss, *weighted(item, [0.0] * 5), Config())
        assert losses.tolist() == pytest.approx([math.log(2)] * 5) and gradient.abs().max() == 0


def test_the_weights_ignore_the_origin_and_the_scale_of_the_rewards():
    first, second = torch.randn(2, 50, generator=rng(), dtype=torch.float64)
    both = torch.stack([first, second])
    plain = weights(first, second, both.min(), both.max(), 3.0)
    other = both * 7.0 - 2.0
    torch.testing.assert_close(weights(*other, other.min(), other.max(), 3.0), plain)
    torch.testing.assert_close(weights(second, first, both.min(), both.max(), 3.0), -plain)
    torch.testing.assert_close(weights(first, second, both.min(), both.max(), 6.0), 2 * plain)
    assert (plain.abs() <= 3 * math.tanh(0.5)).all()


def test_the_gradient_grows_with_the_difference_of_the_rewards():
    """At the reference; hard labels have the same gradient for every pair."""
    differences = torch.linspace(0, 1, 6, dtype=torch.float64)
    omega = weights(differences, 0 * differences, *double(0, 1), 10.0)
    item = weighted(margins(torch.zeros(6, dtype=torch.float64)), omega)
    item[0].requires_grad_()
    _, gradient = value_and_gradient(loss, *item, Config())
    sizes = gradient[:, 0, 0].abs()
    assert sizes[0] == 0 and (sizes.diff() > 0).all()
    torch.testing.assert_close(sizes, omega * 1.25 / 2)


# ---- identities and gradients


def test_with_unit_weights_the_loss_is_that_of_inpo():
    for item in (ragged(), ragged(seed=1, scale=9)):
        ours = value_and_gradient(loss, *weighted(item, [1.0] * 5), Config(beta=0.7))
        theirs = value_and_gradient(inpo.loss, *item, inpo.Config(beta=0.7))
        assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_the_weight_is_inside_the_sigmoid():
    omega = [0.5, 2.0, 1.0]
    losses, _ = loss(*weighted(margins([1.0, -1.0, 3.0]), omega), Config(beta=1.0))
    expected = -torch.nn.functional.logsigmoid(torch.tensor([0.5, -2.0, 3.0]))
    torch.testing.assert_close(losses, expected.double())


def test_flipping_a_pair_with_its_weight_changes_nothing():
    logps, ref_logps, batch = weighted(ragged(), [0.3, 1.0, 2.0, 0.1, 4.0])
    plain = loss(logps, ref_logps, batch, Config())[0]
    flipped = SimpleNamespace(mask=batch.mask.flip(1), omega=-batch.omega)
    torch.testing.assert_close(loss(logps.flip(1), ref_logps.flip(1), flipped, Config())[0], plain)


def test_gradients_on_ragged_responses():
    omega = double(0.3, 1.0, 2.0, 0.1, 4.0)
    logps, ref_logps, batch = weighted(ragged(), omega)
    cfg = Config(beta=0.7)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))
    z = 0.7 * omega * (logps - ref_logps).sum(-1).detach().diff(dim=1)[:, 0].neg()
    _, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    expected = (0.7 * omega * torch.sigmoid(-z))[:, None] * omega.new_tensor([-1.0, 1.0])
    torch.testing.assert_close(gradient, expected[..., None].expand_as(gradient))


# ---- relabelling


def test_the_image_with_the_larger_reward_is_chosen_whatever_the_label():
    images = torch.arange(8.0).view(4, 2, 1)
    rows = [dict(prompt=0, responses=x, scores=[1.0, 0.0], reward=[5.0, 6.0]) for x in images]
    rewards = double(0, 4, 3, 1, 2, 2, 4, 3).view(4, 2)
    found = relabelled(rows, rewards, Config(gamma=1.0))
    assert [row["responses"].flatten().tolist() for row in found] == [
        [1, 0],
        [2, 3],
        [4, 5],
        [6, 7],
    ]
    assert [row["reward"] for row in found] == [[6, 5], [5, 6], [5, 6], [5, 6]]
    assert all(row["scores"] == [1, 0] for row in found)
    sizes = [math.tanh(d / 2) for d in (1.0, 0.5, 0.0, 0.25)]  # of rewards in [0, 1]
    assert [row["omega"] for row in found] == pytest.approx(sizes)


def test_raters_are_the_truth_or_a_proxy_of_the_world():
    world = World()
    rows = [dict(prompt=0, responses=torch.tensor([[1.0, 2.0], [0.5, -1.0]]))]
    assert rated(rows, reward_model(world, "truth")).tolist() == [[1.0, 0.5]]
    values = rated(rows, reward_model(world, "proxy"))[0].tolist()
    assert values == pytest.approx([1.3, 0.35])
    with pytest.raises(ValueError, match="rater = proxy: world has no proxy of its reward"):
        reward_model(toy.world.World(), "proxy")
    with pytest.raises(ValueError, match="rater = none"):
        Config(rater="none")


# ---- inversions


@pytest.mark.paper
def test_renoise_lowers_the_error_of_the_round_trip_and_nothing_else_changes():
    class Normal(MLP):
        """The exact noise prediction for data N(0, 1)."""

        def eps(self, x, t, label):
            return (1 - self.alpha_bar[t]).sqrt().view(-1, 1) * x

    model = Normal().double()
    batch = collate([dict(prompt=0, responses=torch.ones(2, 2, dtype=torch.float64))])
    lab = SimpleNamespace(step=0, rng=lambda *key: rng())
    times, gaps = model.times(5), []
    levels = torch.cat([torch.ones(1, 1), model.alpha_bar[times]])
    for renoise in (False, True):
        prepared = inversion(lab, Config(inversion_steps=5, renoise=renoise))(model, batch)
        place = times[:, 0].tolist().index(prepared.t.item())
        a = levels[place + 1]
        x = a.sqrt() * batch.images[0] + (1 - a).sqrt() * prepared.noise[0]
        for i in range(place + 1, 0, -1):
            x = ddim_step(x, model.eps(x, times[i - 1], None), levels[i], levels[i - 1])
        gaps.append((x - 1).abs().max().item())
    assert place > 0 and 0 < gaps[1] < 0.8 * gaps[0]


def test_plain_inversion_is_that_of_inpo():
    model, lab = MLP(), small()
    rows = [dict(prompt=0, responses=torch.randn(2, 2, generator=rng(i))) for i in range(9)]
    _, prepare = inpo.inverted(lab, model, rows, inpo.Config(inversion_steps=4))
    ours = inversion(lab, Config(inversion_steps=4, renoise=False))(model, collate(rows))
    theirs = prepare(model, collate(rows))
    assert torch.equal(ours.noise, theirs.noise) and torch.equal(ours.t, theirs.t)
    other = inversion(lab, Config(inversion_steps=4))(model, collate(rows))
    assert torch.equal(ours.t, other.t) and not torch.equal(ours.noise, other.noise)


def test_a_run_trains_on_relabelled_rows_and_repeats_itself():
    ends = []
    for _ in range(2):
        policy = run(small(), Config(inversion_steps=2, rater="proxy"))
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*ends)
    other = run(small(), Config(inversion_steps=2))
    assert not torch.equal(ends[0], torch.cat([p.detach().flatten() for p in other.parameters()]))


def test_a_run_says_how_many_labels_the_reward_model_replaces():
    lab, said = small(label_temperature=0.0), []
    lab.say = said.append
    run(lab, Config(inversion_steps=2))  # the truth agrees with labels without noise
    lab.preferences = lambda policy, k: [
        dict(prompt=0, responses=torch.tensor([[x, 0.0], [y, 0.0]]), scores=[1.0, 0.0])
        for x, y in [(0.0, 1.0), (0.0, 2.0), (1.0, 0.0), (1.0, 1.0)] * 4
    ]
    run(lab, Config(inversion_steps=2))
    words = "the reward model, which replaces the labels, agrees with {} of them"
    assert said == [words.format(share) for share in ("100%", "38%")]


# ---- errors


@pytest.mark.parametrize(
    "wrong", [dict(beta=0.0), dict(gamma=0.0), dict(gamma=-1.0), dict(inversion_steps=0)]
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Config(**wrong)


def test_rewards_that_are_equal_or_outside_the_extremes_are_refused():
    with pytest.raises(ValueError, match="all rewards are 2"):
        weights(double(2.0), double(2.0), *double(2, 2), 10.0)
    for first, second in ((3.0, 1.0), (1.0, -1.0)):
        with pytest.raises(ValueError, match="rewards from .* not 0 to 2"):
            weights(double(first), double(second), *double(0, 2), 10.0)


def test_lists_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 7\)"):
        loss(*weighted(ragged(k=3), [1.0] * 5), Config())


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=2.5)]
SURVIVORS = {}


def INPUTS():
    """Pairs with weights, some 0 or negative."""
    omega = torch.tensor([0.4, 0.0, 2.3, -0.7, 1.1], dtype=torch.float64)
    items = builders.pairs()
    return [changed(item, omega=omega.to(item[2].mask.device)) for item in items]
