"""InPO: values of the paper, identities with Diffusion-DPO, and exactly scored inversions."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from data import collate
from diffusion import alpha_bar, q_sample, to_eps, to_x0
from lab import Lab, Settings
from methods import dpo, inpo
from methods.inpo import Config, at_random_steps, inverted, loss, run
from tests import builders
from tests.builders import margins, ragged, swapped, value_and_gradient
from toy.gaussians import MLP, World


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def denoiser(seed=0):
    torch.manual_seed(seed)
    return MLP().double()


def rows_of(n, seed=1):
    points = torch.randn(n, 2, 2, generator=rng(seed), dtype=torch.float64)
    return [dict(prompt=0, responses=x, scores=[1.0, 0.0]) for x in points]


def small(**settings):
    """A Lab whose base model is hardly trained."""
    how = dict(base_steps=20, prompts=64, steps=6, batch_size=16, eval_size=16)
    return Lab(Settings(world="gaussians", **how | settings), quiet=True)


# ---- values


@pytest.mark.paper
def test_the_implied_noise_and_its_errors_have_the_values_of_the_paper():
    a = torch.tensor(0.25, dtype=torch.float64)
    x0, x = torch.tensor([[1.0, -2.0], [0.3, -0.9]], dtype=torch.float64)
    tau = to_eps("x0", x0, x, a)
    torch.testing.assert_close(tau, tau.new_tensor([-0.230940, 0.115470]), rtol=0, atol=1e-6)
    torch.testing.assert_close(q_sample(x0, tau, a), x)
    ours, theirs = tau.new_tensor([[0.1, 0.1], [-0.2, 0.2]])
    errors = [(eps - tau).square().mean().item() for eps in (ours, theirs)]
    assert errors == pytest.approx([0.054880, 0.004051], abs=1e-6)
    image_error = (x0 - to_x0("eps", ours, x, a)).square().sum().item()
    assert image_error == pytest.approx(0.329282, abs=1e-6)  # 3 = 1 / SNR times that of the noise
    assert image_error == pytest.approx(3 * (ours - tau).square().sum().item())


@pytest.mark.paper
def test_the_loss_of_the_worked_example():
    means = torch.tensor([0.20, 0.35, 0.25, 0.30], dtype=torch.float64, requires_grad=True)
    D, beta = 2, 5.0
    logps = (-D * means[:2]).view(1, 2, 1)  # sums, as `logps` has them
    ref_logps = (-D * means[2:]).detach().view(1, 2, 1)
    batch = builders.everything_scored(logps)
    losses, metrics = loss(logps, ref_logps, batch, Config(beta=beta / (2 * D)))
    assert losses.item() == pytest.approx(0.575939, abs=1e-6)
    assert metrics["weight"].item() == pytest.approx(1 / (1 + math.exp(0.25)))
    losses.sum().backward()
    assert means.grad.tolist() == pytest.approx([1.094559, -1.094559, 0, 0], abs=1e-6)


@pytest.mark.paper
def test_one_step_models_keep_gaussian_data_at_its_place():
    """For data N(0, 1) the exact inversion is x_0 itself at every step."""
    steps = torch.linspace(0, 999, 50).long()
    a = alpha_bar()[steps]
    for std in (1.0, 0.5):
        x = (a * std**2 + 1 - a).sqrt() / std  # the inversion of x_0 = 1
        tau = to_eps("x0", torch.ones_like(x), x, a)
        assert x[-1] == pytest.approx(1 / std, abs=1e-3)
        if std == 1:
            torch.testing.assert_close(x, torch.ones_like(x))
        torch.testing.assert_close(q_sample(torch.ones_like(x), tau, a), x)


# ---- identities and gradients


@pytest.mark.paper
def test_the_loss_is_that_of_diffusion_dpo():
    for item in (ragged(), ragged(seed=1, scale=9)):
        for beta in (0.3, 2.5):
            ours = value_and_gradient(loss, *item, Config(beta=beta))
            theirs = value_and_gradient(dpo.loss, *item, dpo.Config(beta=beta))
            assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


@pytest.mark.paper
def test_at_the_reference_a_pair_costs_ln_2_and_equal_images_have_no_gradient():
    logps, _, batch = ragged()
    losses, _ = loss(logps, logps.detach(), batch, Config())
    assert losses.tolist() == pytest.approx([math.log(2)] * 5)
    model = denoiser()
    reference = copy.deepcopy(model)
    torch.nn.init.normal_(model.output.bias, 0.0, 0.3)
    batch = collate(rows_of(4))
    batch.images = batch.images[:, :1].expand(-1, 2, -1).contiguous()
    times = model.times(4)
    at_random_steps(model, batch, model.latents(batch.images, times, batch.label), times, rng())
    with torch.no_grad():
        ref_logps = reference.logps(batch)
    losses, _ = loss(model.logps(batch), ref_logps, batch, Config())
    losses.sum().backward()
    assert losses.tolist() == pytest.approx([math.log(2)] * 4)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-12


def test_gradients_on_ragged_responses():
    logps, ref_logps, batch = ragged()
    cfg = Config(beta=0.7)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))
    z = 0.7 * (logps - ref_logps).sum(-1).detach().diff(dim=1)[:, 0].neg()
    _, gradient = value_and_gradient(loss, logps, ref_logps, batch, cfg)
    expected = 0.7 * torch.sigmoid(-z)[:, None] * z.new_tensor([-1.0, 1.0])
    torch.testing.assert_close(gradient, expected[..., None].expand_as(gradient))


def test_swapping_a_pair_flips_its_margin():
    item = margins([0.4, -2.0, 1.0])
    losses, others = (loss(*x, Config(beta=1.0))[0] for x in (item, swapped(item)))
    torch.testing.assert_close(others - losses, torch.tensor([0.4, -2.0, 1.0]))


def test_padding_and_other_rows_do_not_matter():
    logps, ref_logps, batch = ragged()
    whole = loss(logps, ref_logps, batch, Config())[0]
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(loss(*wider[:2], SimpleNamespace(mask=wider[2]), Config())[0], whole)
    one = loss(logps[3:4], ref_logps[3:4], SimpleNamespace(mask=batch.mask[3:4]), Config())[0]
    torch.testing.assert_close(one, whole[3:4])


# ---- inversions


def test_the_scores_are_those_of_the_inverted_image_at_a_step_of_the_grid():
    model, batch = denoiser(), collate(rows_of(40))
    times = model.times(5)
    latents = model.latents(batch.images, times, batch.label)
    at_random_steps(model, batch, latents, times, rng())
    assert batch.noise.shape == batch.images.shape and batch.t.shape == (40,)
    assert set(batch.t.tolist()) == set(times[:, 0].tolist())
    logps = model.logps(batch)
    for b in (0, 7, 39):
        place = times[:, 0].tolist().index(batch.t[b])
        one = times[: place + 1]
        x = model.invert(batch.images[b], one, batch.label[b].expand(2))
        torch.testing.assert_close(latents[b, :, place], x)
        a = model.alpha_bar[batch.t[b]]
        torch.testing.assert_close(q_sample(batch.images[b], batch.noise[b], a), x)
        error = model.eps(x, batch.t[b : b + 1], batch.label[b].expand(2)) - batch.noise[b]
        torch.testing.assert_close(logps[b, :, 0], -error.square().sum(1))


@pytest.mark.paper
def test_the_first_grid_point_is_one_step_and_its_error_is_zero():
    """One DDIM step from the image: the noise that it used is the implied noise."""
    model, batch = denoiser(), collate(rows_of(5))
    times = model.times(1)
    at_random_steps(model, batch, model.latents(batch.images, times, batch.label), times, rng())
    a = model.alpha_bar[times[0, 0]]
    flat = batch.images.flatten(0, 1)
    used = model.eps(flat, times[0], torch.zeros(10, dtype=torch.long)).view_as(batch.images)
    torch.testing.assert_close(batch.noise, used)
    torch.testing.assert_close(
        q_sample(batch.images, used, a), q_sample(batch.images, batch.noise, a)
    )


def test_the_reference_inverts_once_and_the_policy_in_every_step():
    lab, rows, model = small(device="cpu"), rows_of(6), denoiser()
    there, prepare = inverted(lab, model, rows, Config(inverter="reference", inversion_steps=4))
    assert there[2]["latents"].shape == (2, 4, 2)
    other = denoiser(1)
    batches = [prepare(policy, collate(there)) for policy in (model, other)]
    assert torch.equal(batches[0].noise, batches[1].noise)
    here, prepare = inverted(lab, model, rows, Config(inversion_steps=4))
    assert here is rows
    ours, theirs = (prepare(policy, collate(here)) for policy in (model, other))
    assert torch.equal(ours.t, theirs.t) and not torch.equal(ours.noise, theirs.noise)
    torch.testing.assert_close(ours.noise, batches[0].noise)  # the policy is the reference here
    lab.step = 1
    assert not torch.equal(prepare(model, collate(here)).t, ours.t)  # drawn anew in each step


def test_nothing_of_the_inversion_has_a_gradient():
    model, batch = denoiser(), collate(rows_of(3))
    latents = model.latents(batch.images, model.times(4), batch.label)
    assert not latents.requires_grad
    again = model.latents(batch.images, model.times(4), batch.label)
    assert torch.equal(latents, again)  # and no random number


@pytest.mark.slow
@pytest.mark.parametrize("inverter", ["policy", "reference"])
def test_a_run_trains_and_repeats_itself(inverter):
    ends = []
    for _ in range(2):
        lab = small()
        policy = run(lab, Config(inverter=inverter, inversion_steps=3))
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*ends)
    assert not torch.equal(ends[0], torch.cat([p.flatten() for p in lab.base().parameters()]))


@pytest.mark.paper
def test_with_forward_noise_it_is_diffusion_dpo_bit_for_bit(monkeypatch):
    def forward(lab, policy, rows, cfg):
        return rows, None

    ends = []
    monkeypatch.setattr(inpo, "inverted", forward)
    for method, cfg in ((inpo, Config(beta=0.5)), (dpo, dpo.Config(beta=0.5))):
        policy = method.run(small(), cfg)
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
    assert torch.equal(*ends)


# ---- errors


@pytest.mark.parametrize(
    "wrong",
    [dict(beta=0.0), dict(beta=math.nan), dict(inversion_steps=0), dict(inversion_steps=2.5)]
    + [dict(inversion_steps=101), dict(inverter="both")],
)
def test_values_out_of_range_are_refused(wrong):
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} = "):
        Config(**wrong)


def test_no_step_of_a_grid_is_so_early_that_the_implied_noise_is_a_ratio_of_small_numbers():
    assert (1 - alpha_bar()[MLP().times(100)]).min() > 1e-3


def test_lists_and_empty_responses_are_refused():
    with pytest.raises(ValueError, match=r"\(5, 3, 7\)"):
        loss(*ragged(k=3), Config())
    logps, ref_logps, batch = ragged()
    batch.mask[0, 0] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


def test_the_world_counts_samples_off_the_ring_in_every_fifth_look():
    lab = small(steps=20)
    policy = run(lab, Config(inversion_steps=2))
    seen = [point["step"] for point in policy.curve if "off_manifold" in point]
    assert seen == [0, 5, 10, 15, 20]
    assert World().proxies["biased"]([0], torch.tensor([[1.0, 2.0]])).item() == pytest.approx(1.3)


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=2.5)]
INPUTS = builders.pairs
SURVIVORS = {}
