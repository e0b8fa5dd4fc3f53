"""The noise process, samplers and inversion against closed forms in float64; the UNet's scores."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

import diffusion
from data import UserError
from diffusion import (
    ddim_logprob,
    ddim_step,
    edm,
    mixture,
    q_sample,
    spread,
    to_eps,
    to_sigma,
    to_x0,
)
from nanomodel import Denoiser, UNet, UNetConfig

A, X0, EPS = (
    torch.tensor([v], dtype=torch.float64) for v in (0.2, 1.5, -0.7)
)  # the check point of the conversions
KINDS = ["eps", "x0", "v_vp", "v_flow", "u", "edm"]


def close(value, expected, tol=1e-6):
    torch.testing.assert_close(
        torch.as_tensor(value, dtype=torch.float64),
        torch.as_tensor(expected, dtype=torch.float64),
        rtol=tol,
        atol=tol,
    )


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "schedule, steps, expected",
    [
        (
            "linear",
            [0, 100, 250, 500, 750, 999],
            [0.9999, 0.895142, 0.521423, 0.0777967, 0.00330016, 4.03583e-5],
        ),
        (
            "scaled_linear",
            [0, 100, 250, 500, 750, 999],
            [0.99915, 0.894223, 0.673793, 0.276333, 0.0561698, 0.0046601],
        ),
        (
            "cosine",
            [1, 100, 250, 500, 750, 999],
            [0.999959, 0.972093, 0.847012, 0.493844, 0.144272, 2.4e-6],
        ),
    ],
)
def test_schedules_have_the_published_values_of_alpha_bar(schedule, steps, expected):
    table = diffusion.alpha_bar(schedule)
    assert (
        table.shape == (1000,)
        and table.dtype == torch.float64
        and (table.diff() < 0).all()
        and table[0] < 1
    )
    torch.testing.assert_close(
        table[steps], torch.tensor(expected, dtype=torch.float64), rtol=5e-6, atol=5e-7
    )


def test_the_flow_schedule_has_equal_steps_of_flow_time():
    table = diffusion.alpha_bar("flow", 4)
    close(diffusion.to_flow(table), [0.8, 0.6, 0.4, 0.2], 1e-12)
    whole = diffusion.alpha_bar("flow")
    assert (whole.diff() < 0).all() and 0 < whole.min() and whole.max() < 1


def test_ddim_on_the_flow_schedule_is_euler_on_straight_paths():
    a, b = diffusion.alpha_bar("flow", 9)[[6, 3]]
    t, s = diffusion.to_flow(a), diffusion.to_flow(b)
    out, z = torch.randn(2, 5, generator=rng(), dtype=torch.float64)  # velocity, and t x0 + ...
    x = z * (a.sqrt() + (1 - a).sqrt())
    after = ddim_step(x, to_eps("v_flow", out, x, a), a, b)
    close(after / (b.sqrt() + (1 - b).sqrt()), z + (s - t) * out, 1e-12)


def test_unknown_schedule_and_prediction_are_refused():
    with pytest.raises(ValueError, match="schedule = 'sqrt'"):
        diffusion.alpha_bar("sqrt")
    with pytest.raises(ValueError, match="prediction = 'v'"):  # which v?
        mixture("v", A)


def test_one_point_in_three_conventions():
    x, sigma = q_sample(X0, EPS, A), to_sigma(A)
    close(x, [0.0447214])
    close(sigma, [2.0])
    close(x / A.sqrt(), X0 + sigma * EPS)
    close(x / A.sqrt(), [0.1])
    t = diffusion.to_flow(A)
    close(t, [1 / 3])
    close(x / (A.sqrt() + (1 - A).sqrt()), t * X0 + (1 - t) * EPS)
    close(x / (A.sqrt() + (1 - A).sqrt()), [0.0333333])
    close(diffusion.from_sigma(sigma), A)
    close(diffusion.from_flow(t), A)


def predict(kind, x0, eps, a, **how):
    c, d = mixture(kind, a, **how)
    return c * x0 + d * eps


def test_predictions_of_the_check_point():
    close(predict("v_vp", X0, EPS, A), [-1.6546903])
    close(predict("v_flow", X0, EPS, A), [2.2])
    close(predict("edm", X0, EPS, A, sd=0.5), [3.0802024])
    # EDM's F for data of unit variance is minus VP's v, and for very wide data minus the noise
    close(predict("edm", X0, EPS, A), -predict("v_vp", X0, EPS, A))
    close(predict("edm", X0, EPS, A, sd=1e9), -EPS)
    # k-Diff's u is half the velocity of flow matching at k = 1/2, the image at 1, minus the noise
    # at 0
    close(predict("u", X0, EPS, A), predict("v_flow", X0, EPS, A) / 2)
    close(predict("u", X0, EPS, A, k=1.0), X0)
    close(predict("u", X0, EPS, A, k=0.0), -EPS)


@pytest.mark.parametrize("kind", KINDS)
def test_every_prediction_gives_image_and_noise_back(kind):
    x0, eps = torch.randn(2, 50, 3, generator=rng(), dtype=torch.float64)
    a = torch.rand(50, 1, generator=rng(1), dtype=torch.float64) * 0.98 + 0.01
    x, output = q_sample(x0, eps, a), predict(kind, x0, eps, a)
    close(to_x0(kind, output, x, a), x0, 1e-10)
    close(to_eps(kind, output, x, a), eps, 1e-10)
    # any output, right or wrong, is read as an image and a noise that make up x
    wrong = output + 1
    close(q_sample(to_x0(kind, wrong, x, a), to_eps(kind, wrong, x, a), a), x, 1e-10)


def test_textbook_forms_of_the_conversions():
    x, sigma, t = q_sample(X0, EPS, A), to_sigma(A), diffusion.to_flow(A)
    z, out = (
        x / (A.sqrt() + (1 - A).sqrt()),
        torch.tensor([0.37], dtype=torch.float64),
    )  # an imperfect output
    close(to_x0("eps", out, x, A), (x - (1 - A).sqrt() * out) / A.sqrt())
    close(to_eps("x0", out, x, A), (x - A.sqrt() * out) / (1 - A).sqrt())
    close(to_x0("v_vp", out, x, A), A.sqrt() * x - (1 - A).sqrt() * out)
    close(to_eps("v_vp", out, x, A), (1 - A).sqrt() * x + A.sqrt() * out)
    close(to_x0("v_flow", out, x, A), z + (1 - t) * out)
    close(to_eps("v_flow", out, x, A), z - t * out)
    k, den = 0.3, 0.3 * (1 - t) + 0.7 * t
    close(to_x0("u", out, x, A, k=k), ((1 - t) * out + (1 - k) * z) / den)
    close(to_eps("u", out, x, A, k=k), (k * z - t * out) / den)
    skip, scale, _, _ = edm(sigma, 0.5)
    x_edm = x / A.sqrt()
    close(to_x0("edm", out, x, A, sd=0.5), skip * x_edm + scale * out)
    close(to_eps("edm", out, x, A, sd=0.5), (x_edm - skip * x_edm - scale * out) / sigma)


def test_errors_of_noise_and_image_differ_by_known_factors():
    x, sigma, guess = q_sample(X0, EPS, A), to_sigma(A), torch.tensor([0.37], dtype=torch.float64)
    error = (guess - EPS).square()
    close((to_x0("eps", guess, x, A) - X0).square(), sigma**2 * error)
    flow = predict("v_flow", to_x0("eps", guess, x, A), guess, A)
    close((flow - predict("v_flow", X0, EPS, A)).square(), (1 + sigma) ** 2 * error)


@pytest.mark.parametrize(
    "sigma, expected",
    [
        (0.02, (0.998403, 0.019984, 1.998402, 2504)),
        (0.5, (0.5, 0.353553, 1.414214, 8)),
        (5.0, (0.009901, 0.497519, 0.199007, 4.04)),
    ],
)
def test_edm_coefficients_are_those_of_the_paper(sigma, expected):
    skip, out, scale, noise = edm(torch.tensor(sigma, dtype=torch.float64), 0.5)
    weight = (sigma**2 + 0.25) / (sigma * 0.5) ** 2
    close([skip, out, scale, 1 / out**2], expected, 1e-5)
    close(weight * out**2, 1.0)
    close(noise, math.log(sigma) / 4)


def test_edm_weight_makes_the_loss_that_of_F():
    x0, eps, output = torch.randn(3, 40, generator=rng(), dtype=torch.float64)
    a, sd = torch.rand(40, generator=rng(1), dtype=torch.float64) * 0.9 + 0.05, 0.5
    x, sigma = q_sample(x0, eps, a), to_sigma(a)
    weight = 1 / edm(sigma, sd)[1] ** 2
    close(
        weight * (to_x0("edm", output, x, a, sd=sd) - x0).square(),
        (output - predict("edm", x0, eps, a, sd=sd)).square(),
        1e-9,
    )
    # the same in terms of the noise error
    close(weight * sigma**2, 1 + sigma**2 / sd**2, 1e-9)


def test_edm_for_infinitely_wide_data_predicts_minus_the_noise():
    skip, out, _, _ = edm(torch.tensor(2.0, dtype=torch.float64), 1e6)
    close([skip, out], [1.0, 2.0])


# ---------------------------------------------------------------- the reverse process


def test_ddim_with_the_true_noise_is_exact():
    a, b = A, torch.tensor([0.5], dtype=torch.float64)
    close(ddim_step(q_sample(X0, EPS, a), EPS, a, b), q_sample(X0, EPS, b))
    close(ddim_step(q_sample(X0, EPS, a), EPS, a, b), [0.5656854])
    close(ddim_step(q_sample(X0, EPS, a), EPS, a, torch.ones(1, dtype=torch.float64)), X0)
    # a step forward and back with the same noise changes nothing
    close(ddim_step(ddim_step(q_sample(X0, EPS, a), EPS, a, b), EPS, b, a), q_sample(X0, EPS, a))


def test_ancestral_step_has_the_posterior_of_ddpm():
    table = diffusion.alpha_bar()
    for t, s, expected in ((500, 499, 0.100256), (999, 998, 0.141421), (500, 400, 0.723196)):
        close(ddim_step(X0, EPS, table[t], table[s], eta=1.0)[1], expected, 1e-5)
    a, b = table[500], table[499]
    beta, x = 1 - a / b, q_sample(X0, EPS, a)
    mean, std = ddim_step(x, EPS, a, b, eta=1.0)
    close(std**2, (1 - b) / (1 - a) * beta)
    close(mean, b.sqrt() * beta / (1 - a) * X0 + (1 - beta).sqrt() * (1 - b) / (1 - a) * x)
    close(ddim_step(x, EPS, a, b, eta=1.0, z=X0), mean + std * X0)
    assert ddim_step(x, EPS, a, torch.ones(1, dtype=torch.float64), eta=1.0)[1] == 0


def test_ddim_logprob_is_that_of_the_gaussian():
    a, b = diffusion.alpha_bar()[[700, 600]]
    x, eps, z = torch.randn(3, 4, 1, 2, 2, generator=rng(), dtype=torch.float64)
    for eta in (0.3, 1.0):
        mean, std = ddim_step(x, eps, a, b, eta)
        x_next = ddim_step(x, eps, a, b, eta, z)
        close(
            ddim_logprob(x_next, x, eps, a, b, eta),
            torch.distributions.Normal(mean, std).log_prob(x_next).flatten(1).sum(1),
            1e-10,
        )
    with pytest.raises(ValueError, match="eta = 0"):
        ddim_logprob(x, x, eps, a, b, 0.0)


class Gaussian(Denoiser):
    """The exact noise prediction for data N(0, std^2)."""

    def __init__(self, std, prediction="eps"):
        super().__init__((2,), 1, prediction)
        self.std = std
        self.alpha_bar = diffusion.alpha_bar()  # float64, which the module's own copy is not

    def forward(self, x, noise_level, label):
        a = diffusion.from_sigma((4 * noise_level).exp())[:, None]
        eps = (1 - a).sqrt() * x / (a * self.std**2 + 1 - a)
        return predict(self.prediction, to_x0("eps", eps, x, a), eps, a)


@pytest.mark.parametrize("std, a, b, factor", [(1.0, 0.6, 0.9, 0.934847)])
def test_one_step_on_gaussian_data(std, a, b, factor):
    a, b = torch.tensor([a, b], dtype=torch.float64)
    eps = (1 - a).sqrt() / (a * std**2 + 1 - a)
    close(ddim_step(torch.tensor(1.0, dtype=torch.float64), eps, a, b), factor)


@pytest.mark.parametrize(
    "std, steps, ddim, renoise, fixed",
    [
        (1.0, 5, (1.150160, 3.54e-2), (None, 2.22e-2), (None, 3.2e-6)),
        (1.0, 10, (1.081623, 8.75e-3), (1.085758, 4.96e-3), (1.091166, 6.9e-9)),
        (1.0, 50, (1.017295, 3.43e-4), (None, 1.76e-4), (None, 0)),
        (0.5, 5, (1.923467, 0.266), (None, None), (None, None)),
        (0.5, 10, (1.958945, 0.129), (None, 0.078), (None, None)),
        (0.5, 50, (1.949128, 0.025), (None, 0.0131), (None, 0)),
    ],
)
def test_inversion_of_gaussian_data(std, steps, ddim, renoise, fixed):
    """To t = 500 and back on one grid. The ODE lands at 1 for std 1, at 1.940776 for std 1/2."""
    model, label = Gaussian(std), torch.zeros(1, dtype=torch.long)
    times = torch.arange(1, steps + 1)[:, None] * 500 // steps
    levels = torch.cat([torch.ones(1, 1, dtype=torch.float64), model.alpha_bar[times]])
    for how, (expected, gap) in (
        (dict(), ddim),
        (dict(rounds=2, average=True), renoise),
        (dict(rounds=9), fixed),
    ):
        x = model.invert(torch.ones(1, 2, dtype=torch.float64), times, label, **how)
        if expected is not None:
            close(x, torch.full((1, 2), expected))
        for i in range(steps, 0, -1):
            x = ddim_step(x, model.eps(x, times[i - 1], label), levels[i], levels[i - 1])
        if gap is not None:
            assert abs((x - 1).abs().max().item() - gap) < max(0.02 * gap, 1e-12)


@pytest.mark.parametrize("prediction", KINDS)
def test_scores_and_samples_do_not_depend_on_what_the_network_predicts(prediction):
    plain, other = Gaussian(0.5), Gaussian(0.5, prediction)
    batch = plain.prepare(image_batch(plain, 6, 2), rng())
    close(other.logps(batch), plain.logps(batch), 1e-9)
    close(other.sample([0], 5, rng(), steps=10), plain.sample([0], 5, rng(), steps=10), 1e-9)


def test_inversion_ends_at_each_image_s_own_step():
    model, label = Gaussian(0.5), torch.zeros(3, dtype=torch.long)
    last = torch.tensor([999, 500, 2])
    x0 = torch.randn(3, 2, generator=rng(), dtype=torch.float64)
    times = model.times(10, last)
    assert (
        times.shape == (10, 3)
        and (times[-1] == last).all()
        and (times >= 0).all()
        and (times.diff(dim=0) >= 0).all()
    )
    together = model.invert(x0, times, label)
    for i in range(3):
        close(
            together[i : i + 1], model.invert(x0[i : i + 1], times[:, i : i + 1], label[:1]), 1e-12
        )
    assert model.times(10)[:, 0].tolist() == list(range(99, 1000, 100))


def test_samples_of_gaussian_data_have_its_spread():
    for eta in (0.0, 1.0):  # a grid of 100 steps is 6 % short
        x = Gaussian(0.5).sample([0], 2000, rng(), steps=100, eta=eta)
        assert (
            x.shape == (1, 2000, 2)
            and abs(x.std().item() - 0.5) < 0.04
            and abs(x.mean().item()) < 0.03
        )


# ---------------------------------------------------------------- models


def image_batch(model, B, K, dtype=torch.float64):
    images = torch.randn(B, K, *model.shape, generator=rng(5), dtype=dtype)
    label = torch.arange(B) % model.classes
    return SimpleNamespace(
        images=images, label=label, mask=torch.ones(B, K, 1, dtype=torch.bool), t=None, noise=None
    )


def small(**how):
    """A UNet whose output is not zero."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(**(dict(width=8, size=(4, 6), prediction="v_vp") | how)))
    torch.nn.init.normal_(model.output.weight, 0.0, 0.1)
    return model.double()


def test_prepare_shares_the_draw_within_a_row():
    model = small()
    batch = model.prepare(image_batch(model, 200, 3), rng())
    assert (
        batch.noise.shape == (200, 1, 1, 4, 6)
        and batch.t.shape == (200,)
        and batch.t.dtype == torch.long
    )
    assert 0 <= batch.t.min() and batch.t.max() < 1000 and abs(batch.t.double().mean() - 500) < 80
    again = model.prepare(image_batch(model, 200, 3), rng())
    assert torch.equal(again.noise, batch.noise) and torch.equal(again.t, batch.t)
    assert model.prepare(image_batch(model, 200, 3), rng(), shared=False).noise.shape == (
        200,
        3,
        1,
        4,
        6,
    )
    early = model.prepare(
        image_batch(model, 200, 3),
        rng(),
        times=lambda n, rng: torch.randint(10, (n,), generator=rng),
    )
    assert early.t.max() < 10
    # equal images in a row then have equal scores, whatever was drawn
    batch.images = batch.images[:, :1].expand(-1, 3, -1, -1, -1)
    logps = model.logps(batch)
    close(logps, logps[:, :1].expand(-1, 3, -1), 1e-12)


@pytest.mark.parametrize("shared", [True, False])
def test_logps_are_minus_the_summed_noise_error(shared):
    model = small()
    batch = model.prepare(image_batch(model, 4, 3), rng(), shared=shared)
    logps = model.logps(batch)
    assert logps.shape == (4, 3, 1)
    for b in range(4):
        for k in range(3):
            noise, a = batch.noise[b, 0 if shared else k], model.alpha_bar[batch.t[b]]
            x = a.sqrt() * batch.images[b, k] + (1 - a).sqrt() * noise
            v = model(x[None], (to_sigma(a).log() / 4)[None], batch.label[b : b + 1])[0]
            eps = (1 - a).sqrt() * x + a.sqrt() * v
            close(logps[b, k, 0], -((eps - noise) ** 2).sum(), 1e-9)
    weighted = model.logps(batch, weight=lambda t: 1.0 + t)
    close(weighted, logps * (1.0 + batch.t)[:, None, None], 1e-9)
    batch.mask[0, 2] = False
    assert model.logps(batch)[0, 2].item() == 0 and torch.equal(model.logps(batch)[1:], logps[1:])


def test_edm_weighted_logps_are_minus_the_error_of_F():
    model = small(prediction="edm", sd=0.5)
    batch = model.prepare(image_batch(model, 4, 1), rng())
    a = model.alpha_bar[batch.t].view(-1, 1, 1, 1)
    logps = model.logps(batch, weight=lambda t: 1 + to_sigma(model.alpha_bar[t]) ** 2 / 0.25)
    x0, eps = batch.images[:, 0], batch.noise[:, 0]
    _, _, scale, noise_level = edm(to_sigma(a), 0.5)
    output = model(scale * q_sample(x0, eps, a) / a.sqrt(), noise_level.flatten(), batch.label)
    close(
        logps[:, 0, 0],
        -(output - predict("edm", x0, eps, a, sd=0.5)).square().flatten(1).sum(1),
        1e-7,
    )


def test_diffusion_dpo_of_these_scores():
    """beta on sums is beta_code / (2 D) on means.

    Equal models give ln 2, equal images no gradient.
    """
    model = small()
    reference = copy.deepcopy(model)
    batch = model.prepare(image_batch(model, 6, 2), rng())

    def loss(policy, beta):
        ratio = (policy.logps(batch) - reference.logps(batch)).sum(-1)
        return -F.logsigmoid(beta * (ratio[:, 0] - ratio[:, 1]))

    assert torch.equal(model.logps(batch), reference.logps(batch))
    close(loss(model, 0.1), torch.full((6,), math.log(2), dtype=torch.float64), 1e-12)
    torch.nn.init.normal_(model.output.bias, 0.0, 0.3)
    means = [-m.logps(batch)[..., 0] / 24 for m in (model, reference)]
    z = -(5.0 / 2) * ((means[0][:, 0] - means[0][:, 1]) - (means[1][:, 0] - means[1][:, 1]))
    close(loss(model, 5.0 / 48), -F.logsigmoid(z), 1e-9)
    batch.images = batch.images[:, :1].expand(-1, 2, -1, -1, -1).contiguous()
    value = loss(model, 0.1).sum()
    value.backward()
    close(value, 6 * math.log(2), 1e-9)
    assert max(p.grad.abs().max() for p in model.parameters()) < 1e-12


def test_diffusion_dpo_worked_example():
    means = torch.tensor([0.20, 0.35, 0.25, 0.30], dtype=torch.float64, requires_grad=True)
    D, beta = 64, 5.0
    logps = -D * means  # sums, as `logps` has them
    z = beta / (2 * D) * ((logps[0] - logps[2]) - (logps[1] - logps[3]))
    loss = -F.logsigmoid(z)
    loss.backward()
    close([z.item(), loss.item()], [0.25, 0.575939])
    close(means.grad[:2], [1.094559, -1.094559])


def test_sampling_depends_on_the_generator_alone():
    model = small()
    one, two = (model.sample([3, 1, 3], 2, rng(1), steps=3) for _ in range(2))
    assert one.shape == (3, 2, 1, 4, 6) and torch.equal(one, two)
    assert not torch.equal(one, model.sample([3, 1, 3], 2, rng(2), steps=3)) and not torch.equal(
        one[0], one[2]
    )
    torch.manual_seed(1)
    assert torch.equal(
        model.sample([3], 2, rng(1), steps=3, eta=1.0),
        model.sample([3], 2, rng(1), steps=3, eta=1.0),
    )
    assert model.sample([], 2, rng()).shape == (0, 2, 1, 4, 6)
    for wrong in ([10], [-1, 0]):
        with pytest.raises(ValueError, match="expected classes 0 to 9"):
            model.sample(wrong, 1, rng())


def test_sampling_takes_the_ddim_steps_of_the_formula():
    model = small()
    times = [249, 499, 749, 999]
    assert model.times(4)[:, 0].tolist() == times
    x = torch.randn(1, 1, 4, 6, generator=rng(), dtype=torch.float64)
    for t, s in ((999, 749), (749, 499), (499, 249), (249, None)):
        eps = model.eps(x, torch.tensor([t]), torch.tensor([7]))
        x = ddim_step(
            x,
            eps,
            model.alpha_bar[t],
            model.alpha_bar[s] if s else torch.ones((), dtype=torch.float64),
        )
    close(model.sample([7], 1, rng(), steps=4)[0], x, 1e-12)


def test_a_walk_is_the_path_of_the_sampler_and_shares_its_first_noise():
    model = small()
    for eta in (0.0, 1.0):
        one = model.walk([3], 1, rng(1), steps=4, eta=eta)
        assert one.shape == (5, 1, 1, 1, 4, 6)
        assert torch.equal(one[-1], model.sample([3], 1, rng(1), steps=4, eta=eta))
    states = model.walk([3, 1], 3, rng(2), steps=4)
    assert torch.equal(states[0, :, :1].expand(-1, 3, -1, -1, -1), states[0])
    assert not torch.equal(states[1, :, 0], states[1, :, 1])  # the steps differ
    apart = model.walk([3, 1], 3, rng(2), steps=4, shared=False)
    assert not torch.equal(apart[0, :, 0], apart[0, :, 1])
    with pytest.raises(ValueError, match="expected classes 0 to 9"):
        model.walk([10], 2, rng())


def test_transition_logps_are_those_of_the_steps_that_were_walked():
    """The noise that a step added is recovered from its log density, for every step and row."""
    model, steps = small(), 4
    states = model.walk([3, 1, 2], 2, rng(), steps)
    label, table = torch.tensor([3, 1, 2]), model.alpha_bar
    step = torch.tensor([0, 2, 1])
    x = torch.stack([states[s, i] for i, s in enumerate(step)])
    after = torch.stack([states[s + 1, i] for i, s in enumerate(step)])
    logps = model.transition_logps(x, after, step, label, steps, 1.0)
    assert logps.shape == (3, 2)
    for i, (t, s) in enumerate([(999, 749), (499, 249), (749, 499)]):
        noise = model.eps(x[i], torch.tensor([t]), label[i : i + 1].expand(2))
        mean, std = ddim_step(x[i], noise, table[t], table[s], 1.0)
        assert 0.5 < ((after[i] - mean) / std).std() < 1.5  # the noise that was drawn
        expected = torch.distributions.Normal(mean, std).log_prob(after[i]).flatten(1).mean(1)
        close(logps[i], expected, 1e-9)
    with pytest.raises(ValueError, match="eta = 0"):
        model.transition_logps(x, after, step, label, steps, 0.0)


def test_the_gradient_of_a_transition_is_that_of_its_mean():
    model = small()
    states = model.walk([5], 2, rng(), 3)
    label, step = torch.tensor([5]), torch.tensor([1])
    logps = model.transition_logps(states[1], states[2], step, label, 3, 1.0)
    bias = model.output.bias
    (slope,) = torch.autograd.grad(logps.sum(), bias)
    assert model.times(3)[:, 0].tolist() == [332, 665, 999]
    a, b = model.alpha_bar[[665, 332]]
    eps = model.eps(states[1, 0], torch.tensor([665]), label.expand(2))
    mean, std = ddim_step(states[1, 0], eps, a, b, 1.0)
    (direct,) = torch.autograd.grad(mean, bias, ((states[2, 0] - mean) / std**2 / 24).detach())
    close(slope, direct, 1e-9)


def test_path_kl_is_zero_for_one_model_and_is_the_mean_of_the_log_ratio():
    model, other = Gaussian(0.5), Gaussian(1.0)
    assert model.path_kl(Gaussian(0.5), [0] * 3, rng(), 5).abs().max() == 0
    n, label, ratio = 4000, torch.zeros(1, dtype=torch.long), 0.0
    kl = model.path_kl(other, [0] * n, rng(), 5)
    assert kl.shape == (n,) and (kl > 0).all()
    states = model.walk([0], n, rng(1), 5, shared=False)
    for step in range(4):
        about = states[step], states[step + 1], torch.tensor([step]), label, 5, 1.0
        ours, theirs = (m.transition_logps(*about) for m in (model, other))
        ratio = ratio + 2 * (ours - theirs)[0]  # two dimensions
    error = ((ratio.var() + kl.var()) / n).sqrt()
    assert (kl.mean() - ratio.mean()).abs() < 4 * error < 0.3 * kl.mean()


def test_path_kl_does_not_see_the_last_step_which_changes_images():
    class Late(Gaussian):
        def eps(self, x, t, label, guidance=1.0):
            return super().eps(x, t, label) + (t < 200).view(-1, 1)

    model, other = Gaussian(0.5), Late(0.5)
    assert model.times(5)[:2, 0].tolist() == [199, 399]
    assert model.path_kl(other, [0] * 3, rng(), 5).abs().max() == 0
    ours, theirs = (m.sample([0], 9, rng(), steps=5, eta=1.0) for m in (model, other))
    assert (ours - theirs).abs().min() > 0.5


@pytest.mark.parametrize("k", [0.0, 0.3, 1.0])
def test_a_denoiser_of_u_reads_its_output_with_its_own_k(k):
    class U(Gaussian):
        def forward(self, x, noise_level, label):
            a = diffusion.from_sigma((4 * noise_level).exp())[:, None]
            eps = (1 - a).sqrt() * x / (a * self.std**2 + 1 - a)
            return predict("u", to_x0("eps", eps, x, a), eps, a, k=k)

    plain, other = Gaussian(0.5), U(0.5, "u")
    other.k = k
    batch = plain.prepare(image_batch(plain, 6, 2), rng())
    close(other.logps(batch), plain.logps(batch), 1e-6)


def test_unet_sees_class_and_noise_level():
    model = small()
    x, label = torch.randn(2, 1, 4, 6, generator=rng(), dtype=torch.float64), torch.tensor([0, 1])
    out = model.eps(x, torch.tensor([500]), label)
    assert out.shape == x.shape
    assert not torch.allclose(out, model.eps(x, torch.tensor([600]), label))
    assert not torch.allclose(out, model.eps(x, torch.tensor([500]), label.flip(0)))
    parameters = sum(p.numel() for p in UNet(UNetConfig()).parameters())
    assert 150_000 < parameters < 250_000


@pytest.mark.parametrize(
    "wrong",
    [
        dict(size=(7, 8)),
        dict(size=0),
        dict(size=(8, 8, 8)),
        dict(width=12),
        dict(schedule="sqrt"),
        dict(prediction="v"),
    ],
)
def test_wrong_configs_are_refused(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        UNet(UNetConfig(**wrong))


# ---------------------------------------------------------------- patches, words, guidance


TABLE = [[0, 1], [0, 2], [3, 1], [0, 1], [4, 4]]  # the last row is that of no label


def worded(**how):
    """A UNet of four prompts of two words whose attention is not zero."""
    model = small(**(dict(classes=4, words=TABLE, free=True) | how))
    for layer in model.attention:
        torch.nn.init.normal_(layer.output.weight, 0.0, 0.5)
    return model


def noisy(model, n, seed=0):
    """n images of the shape that the model has."""
    return torch.randn(n, *model.shape, generator=rng(seed), dtype=torch.float64)


def test_a_prompt_is_known_by_its_words():
    model, t = worded(), torch.tensor([500])
    x = noisy(model, 1).expand(4, -1, -1, -1)
    out = model.eps(x, t, torch.arange(4))
    close(out[0], out[3], 1e-12)  # the same words under another number
    assert all((out[0] - out[i]).abs().max() > 1e-3 for i in (1, 2))


def test_attention_tells_apart_what_the_sum_of_the_words_cannot():
    model = worded(classes=2, words=[[0, 3], [1, 2], [4, 4]])
    with torch.no_grad():
        weight = model.condition.label.embedding.weight
        weight[3] = weight[1] + weight[2] - weight[0]  # both prompts have one sum
    x = noisy(model, 1).expand(2, -1, -1, -1)
    out = model.eps(x, torch.tensor([500]), torch.arange(2))
    assert (out[0] - out[1]).abs().max() > 1e-3
    for layer in model.attention:
        torch.nn.init.zeros_(layer.output.weight)
    out = model.eps(x, torch.tensor([500]), torch.arange(2))
    close(out[0], out[1], 1e-12)


def test_patches_cost_no_resolution():
    model = small(size=(8, 12), patch=2, channels=3)
    x, t = noisy(model, 2), torch.tensor([300])
    out = model.eps(x, t, torch.tensor([0, 1]))
    assert out.shape == x.shape and model.input.weight.shape[1] == 12
    x[0, 0, 3, 5] += 1  # one pixel is seen
    assert not torch.allclose(out[0], model.eps(x, t, torch.tensor([0, 1]))[0])


def test_the_learned_map_of_places_is_added_to_the_image_s_features():
    plain, model = small(), small(place=True)
    model.load_state_dict(plain.state_dict() | {"place": torch.zeros_like(model.place)})
    x, t, label = noisy(model, 1), torch.tensor([300]), torch.tensor([0])
    close(model.eps(x, t, label), plain.eps(x, t, label), 1e-12)
    with torch.no_grad():
        model.place[..., 1, 2] += 1
    assert (model.eps(x, t, label) - plain.eps(x, t, label)).abs().max() > 1e-3


def test_guidance_moves_the_noise_away_from_that_without_a_label():
    model, t, label = worded(), torch.tensor([400]), torch.tensor([0, 2])
    x = noisy(model, 2)
    told, untold = model.eps(x, t, label), model.eps(x, t, torch.tensor([4, 4]))
    assert (told - untold).abs().max() > 1e-3
    close(model.eps(x, t, label, guidance=3.0), untold + 3 * (told - untold), 1e-12)
    close(model.eps(x, t, label, guidance=0.0), untold, 1e-12)
    plain, free = (model.sample([1], 2, rng(1), steps=3, guidance=g) for g in (1.0, 0.0))
    assert torch.equal(plain, model.sample([1], 2, rng(1), steps=3))
    assert torch.equal(free, model.sample([2], 2, rng(1), steps=3, guidance=0.0))
    assert not torch.allclose(plain, free)
    with pytest.raises(UserError, match="guidance = 2.0: .* not trained with dropped labels"):
        small().sample([1], 1, rng(), guidance=2.0)
    with pytest.raises(UserError, match="expected classes 0 to 3"):
        model.sample([4], 1, rng())  # no label is not a prompt


@pytest.mark.parametrize("prediction", ["v_vp", "eps", "x0", "edm"])
def test_logps_can_be_the_error_of_the_output(prediction):
    model = small(error="output", prediction=prediction, schedule="cosine", sd=0.7)
    batch = model.prepare(image_batch(model, 3, 2), rng(2))
    batch.t = torch.tensor([10, 300, 700])
    a = model.alpha_bar[batch.t]
    kept = {}
    model.register_forward_hook(lambda module, _, output: kept.update(output=output))
    found = model.logps(batch)
    a = spread(a, batch.images)
    c, d = mixture(prediction, a, sd=0.7)
    target = c * batch.images + d * batch.noise
    error = (kept["output"].view_as(target) - target).square().flatten(2).sum(2, keepdim=True)
    small_weight = model.output_weight(batch.t) < 100
    assert small_weight.any()
    close(found[small_weight], -error[small_weight], 1e-9)
    assert (
        model.logps(batch, weight=lambda t: torch.ones_like(t, dtype=torch.float64)) != found
    ).any()


def test_the_weight_of_the_output_s_error_is_bounded():
    model = small(error="output", schedule="cosine")
    weight = model.output_weight(torch.tensor([0, 500, 999]))
    close(weight[:2], 1 / model.alpha_bar[[0, 500]], 1e-6)
    assert weight[2] == 100


@pytest.mark.parametrize(
    "wrong",
    [
        dict(patch=3),
        dict(size=(8, 12), patch=4),
        dict(error="v"),
        dict(free=2),
        dict(words=[[0, 1]]),
        dict(words=[[0]] * 9 + [[0, 1]]),
        dict(words=[[-1]] * 10),
        dict(words=[[0.5]] * 10),
        dict(words=[[0]] * 10, free=True),
    ],
)
def test_wrong_patches_and_words_are_refused(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        UNet(UNetConfig(**wrong))
