"""DDO: values, identities and errors in closed form, the optimum in a table, and the rounds."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from data import collate
from diffusion import edm, q_sample, to_eps, to_sigma
from lab import Lab, Settings
from methods import ddo
from methods.ddo import Config, loss, run
from tests import builders
from tests.builders import ragged
from toy.bandit import World
from toy.exact import Table
from toy.gaussians import MLP

P_DATA, P_REF = [0.5, 0.3, 0.15, 0.05], [0.3, 0.3, 0.2, 0.2]


def fit_exactly(lab, policy, objective, steps):
    """Train a policy on objective(policy), a scalar without randomness."""
    return lab.fit(
        policy,
        lambda step: None,
        lambda model, _: (objective(model)[None], {}),
        steps=steps,
        lr=0.1,
        decay=True,
    )


def expected_loss(policy, reference, data, cfg):
    """The expected loss of Tables, a scalar: real responses follow `data`, samples `reference`."""
    logps, ref_logps = (
        x.log_probs()[0, :, None, None].expand(-1, 2, -1) for x in (policy, reference)
    )  # (R, 2, 1)
    batch = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool))
    real = loss(logps, ref_logps, batch, Config(cfg.beta, alpha=0.0))[0]
    fake = loss(logps, ref_logps, batch, cfg)[0] - real
    return data.probs()[0] @ real + reference.probs()[0] @ fake


def theory(reference, data, beta):
    """(p*, alpha) of theorem 3.3: p* is the optimum if alpha = Z^beta.

    p* is the Table p_ref^(1 - 1/beta) p_data^(1/beta) / Z.
    """
    log_probs = (1 - 1 / beta) * reference.log_probs() + data.log_probs() / beta
    best = Table(reference.vocab, reference.length).double().set_log_probs(log_probs)
    return best, math.exp(beta * log_probs.logsumexp(1).item())


def counting():
    """A world of six tokens modulo 4 that count up (60 %) or down, with 2 % of the steps wrong.

    8 of 4,096 sequences are valid. The reference is the data mixed with 30 % uniform sequences, and
    the reward is 1 for a valid sequence.
    """
    y = Table(4, 6).sequences()
    steps = [(y[:, 1:] - y[:, :-1] - by) % 4 == 0 for by in (1, -1)]  # (R, 5)
    up, down = (torch.where(right, 0.98, 0.02 / 3).double().prod(1) / 4 for right in steps)
    mixed, valid = 0.6 * up + 0.4 * down, steps[0].all(1) | steps[1].all(1)
    return World(4, 6, rewards=valid, data=mixed.log(), reference=(0.7 * mixed + 0.3 / 4**6).log())


def ratios(real, fake):
    """Log-probs (B, 2, 1) with these log-ratios to a zero reference, and a batch."""
    logps = torch.stack(
        [torch.as_tensor(x, dtype=torch.float64).reshape(-1) for x in (real, fake)], 1
    )[..., None]
    return (
        logps,
        torch.zeros_like(logps),
        SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool)),
    )


def four(data=P_DATA, reference=P_REF):
    return World(
        vocab=4, length=1, data=torch.tensor(data).log(), reference=torch.tensor(reference).log()
    )


def minimise(policy, objective):
    """Train a policy to the minimum of objective(policy) by quasi-Newton steps."""
    how = dict(
        max_iter=500, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe"
    )
    optimizer = torch.optim.LBFGS(policy.parameters(), **how)

    def closure():
        optimizer.zero_grad()
        value = objective(policy)
        value.backward()
        return value

    optimizer.step(closure)
    return policy


def optimum(world, cfg, policy=None):
    return minimise(
        policy or world.model().double(),
        lambda p: expected_loss(p, world.reference, world.data, cfg),
    )


# ---- values


@pytest.mark.paper
@pytest.mark.parametrize(("alpha", "value"), [(0.0, 0.693147), (1.0, 1.386294), (4.0, 3.465736)])
def test_at_the_reference_each_term_costs_ln_2(alpha, value):
    logps, _, batch = ragged()
    for beta in (0.05, 1.0):
        losses, metrics = loss(logps, logps.detach(), batch, Config(beta, alpha))
        assert losses.tolist() == pytest.approx([value] * 5, abs=1e-6)
        assert (
            metrics["real_ratio"] == 0
            and metrics["fake_ratio"] == 0
            and metrics["told_apart"] == 0.5
        )


@pytest.mark.paper
def test_the_loss_has_its_values():
    assert loss(*ratios(3.0, -2.0), Config(0.05, 4.0))[0].item() == pytest.approx(
        3.198544, abs=1e-6
    )
    assert loss(*ratios(3.0, -2.0), Config(1.0, 1.0))[0].item() == pytest.approx(0.175515, abs=1e-6)


def test_metrics_are_the_two_ratios_and_the_share_told_apart():
    _, metrics = loss(*ratios([1.0, -1.0, 0.0], [2.0, -3.0, 0.0]), Config(0.1, 1.0))
    assert {k: v.item() for k, v in metrics.items()} == pytest.approx(
        {"real_ratio": 0.0, "fake_ratio": -1 / 3, "told_apart": 0.5}
    )
    assert not any(v.requires_grad for v in metrics.values())


# ---- identities and gradients


@pytest.mark.parametrize(("beta", "alpha"), [(0.05, 4.0), (0.5, 1.0), (1.0, 0.0), (2.0, 0.5)])
def test_gradients_on_ragged_responses(beta, alpha):
    logps, ref_logps, batch = ragged()
    cfg = Config(beta, alpha)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))
    real, fake = (logps - ref_logps).sum(-1).detach().unbind(1)
    losses, _ = loss(logps, ref_logps, batch, cfg)
    torch.testing.assert_close(
        losses, torch.log1p((-beta * real).exp()) + alpha * torch.log1p((beta * fake).exp())
    )
    (gradient,) = torch.autograd.grad(losses.sum(), logps)
    expected = torch.stack(
        [-beta * torch.sigmoid(-beta * real), alpha * beta * torch.sigmoid(beta * fake)], 1
    )
    torch.testing.assert_close(
        gradient, expected[..., None].expand_as(logps)
    )  # the same for every token: a sum, not a mean


@pytest.mark.paper
def test_real_and_fake_do_not_meet_in_one_sigmoid():
    real, fake = torch.tensor([0.3, -1.0, 2.0]), torch.tensor([1.0, 0.5, -3.0])
    together = loss(*ratios(real, fake), Config(0.7, 2.0))[0].sum()
    shuffled = loss(*ratios(real, fake.roll(1)), Config(0.7, 2.0))[0].sum()
    torch.testing.assert_close(together, shuffled)


@pytest.mark.paper
def test_it_is_convex_in_each_ratio():
    beta, alpha = 0.7, 3.0
    r = torch.linspace(-8, 8, 33, dtype=torch.float64).requires_grad_()
    bump = beta**2 * torch.sigmoid(beta * r) * torch.sigmoid(-beta * r)
    for inputs, scale in (((r, torch.zeros(33)), 1.0), ((torch.zeros(33), r), alpha)):
        (first,) = torch.autograd.grad(
            loss(*ratios(*inputs), Config(beta, alpha))[0].sum(), r, create_graph=True
        )
        (second,) = torch.autograd.grad(first.sum(), r)
        torch.testing.assert_close(second, scale * bump)
        assert (second > 0).all()


@pytest.mark.paper
def test_one_sigmoid_a_draw_of_noise_bounds_the_sigmoid_of_the_mean():
    draws = torch.randn(2, 1000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    cfg = Config(0.5, 2.0)
    mean = draws.mean(1)
    assert (
        loss(*ratios(*draws), cfg)[0].mean() > loss(*ratios(mean[0], mean[1]), cfg)[0].item() + 0.01
    )
    alike = torch.full((7,), 0.3)
    torch.testing.assert_close(
        loss(*ratios(alike, alike), cfg)[0].mean(), loss(*ratios(0.3, 0.3), cfg)[0][0]
    )


@pytest.mark.paper
def test_without_fakes_it_is_a_monotone_transform_of_the_likelihood():
    r = torch.linspace(-5, 5, 21)
    values = [
        loss(*ratios(r, fake), Config(0.5, 0.0))[0]
        for fake in (torch.zeros(21), torch.full((21,), 9.0))
    ]
    torch.testing.assert_close(*values)
    torch.testing.assert_close(values[0], -logsigmoid(0.5 * r.double()))
    assert (values[0].diff() < 0).all()


def test_padding_order_and_batch_do_not_matter():
    logps, ref_logps, batch = ragged()
    logps, cfg = logps.detach(), Config(0.5, 2.0)
    plain = loss(logps, ref_logps, batch, cfg)[0]
    wider = [torch.nn.functional.pad(x, (0, 4)) for x in (logps, ref_logps, batch.mask)]
    torch.testing.assert_close(loss(*wider[:2], SimpleNamespace(mask=wider[2]), cfg)[0], plain)
    order = torch.tensor([3, 0, 4, 1, 2])
    torch.testing.assert_close(
        loss(logps[order], ref_logps[order], SimpleNamespace(mask=batch.mask[order]), cfg)[0],
        plain[order],
    )
    for b in range(5):
        one = [x[b : b + 1] for x in (logps, ref_logps, batch.mask)]
        torch.testing.assert_close(
            loss(*one[:2], SimpleNamespace(mask=one[2]), cfg)[0], plain[b : b + 1]
        )


def test_a_single_token_is_its_own_ratio():
    logps = torch.tensor([[[-1.0, 0.0], [-2.0, -0.5]]], dtype=torch.float64)
    ref_logps = torch.tensor([[[-1.5, 0.0], [-1.0, -0.5]]], dtype=torch.float64)
    batch = SimpleNamespace(mask=torch.tensor([[[True, False], [True, True]]]))
    value = loss(logps, ref_logps, batch, Config(1.0, 1.0))[0].item()
    assert value == pytest.approx(math.log1p(math.exp(-0.5)) + math.log1p(math.exp(-1.0)))


@pytest.mark.parametrize(
    ("dtype", "out"),
    [
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_the_loss_keeps_float64_and_upcasts_half_precision(dtype, out):
    logps, ref_logps, batch = ragged()
    value, _ = loss(logps.detach().to(dtype), ref_logps.to(dtype), batch, Config())
    assert value.shape == (5,) and value.dtype == out and value.isfinite().all()


def test_huge_ratios_stay_finite():
    assert loss(*ratios([-1e4, 1e4], [1e4, -1e4]), Config(1.0, 2.0))[0].tolist() == pytest.approx(
        [3e4, 0.0]
    )


# ---- errors


@pytest.mark.parametrize("beta", [0.0, -1.0, math.inf, math.nan])
def test_a_beta_out_of_range_is_refused(beta):
    with pytest.raises(ValueError, match="beta = "):
        Config(beta=beta)


@pytest.mark.parametrize("alpha", [-1e-9, math.inf, math.nan])
def test_an_alpha_out_of_range_is_refused(alpha):
    with pytest.raises(ValueError, match="alpha = "):
        Config(alpha=alpha)


def test_rounds_and_noise_levels_out_of_range_are_refused():
    with pytest.raises(ValueError, match="rounds = 0"):
        Config(rounds=0)
    for how in (
        dict(p_mean=-1.2),
        dict(p_std=1.2),
        dict(p_mean=-1.2, p_std=0.0),
        dict(p_mean=math.nan, p_std=1.0),
    ):
        with pytest.raises(ValueError, match="p_mean|p_std"):
            Config(**how)
    assert Config(p_mean=-1.2, p_std=1.2)
    with pytest.raises(ValueError, match="bandit"):
        run(Lab(Settings(world="bandit"), quiet=True), Config(p_mean=-1.2, p_std=1.2))


def test_rows_without_a_real_and_a_fake_are_refused():
    batch = SimpleNamespace(mask=torch.ones(2, 1, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"\(2, 1, 4\)"):
        loss(torch.zeros(2, 1, 4), torch.zeros(2, 1, 4), batch, Config())
    logps, ref_logps, batch = ragged()
    batch.mask[0, 0] = False
    with pytest.raises(ValueError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- the optimum, four states


@pytest.mark.paper
def test_the_optimum_is_the_data():
    world = four()
    policy = optimum(world, Config(1.0, 1.0))
    assert policy.probs()[0].tolist() == pytest.approx(P_DATA, abs=1e-5)
    value = expected_loss(policy, world.reference, world.data, Config(1.0, 1.0)).item()
    assert value == pytest.approx(1.309257, abs=1e-6)
    middle = [(a + b) / 2 for a, b in zip(P_DATA, P_REF)]
    shannon = (
        sum(a * math.log(a / m) + b * math.log(b / m) for a, b, m in zip(P_DATA, P_REF, middle)) / 2
    )
    assert value == pytest.approx(2 * math.log(2) - 2 * shannon, abs=1e-6)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("beta", "alpha", "probs"),
    [
        (0.5, 1.121755, (0.66225, 0.23841, 0.08940, 0.00993)),
        (0.5, 1.0, (0.62765, 0.25862, 0.10155, 0.01218)),
        (0.25, 1.279347, (0.86410, 0.11199, 0.02362, 0.00029)),
        (2.0, 0.922567, (0.40322, 0.31234, 0.18033, 0.10411)),
    ],
)
def test_beta_decides_how_far_beyond_the_data(beta, alpha, probs):
    world = four()
    assert optimum(world, Config(beta, alpha)).probs()[0].tolist() == pytest.approx(probs, abs=2e-5)
    target, best = theory(world.reference, world.data, beta)
    if alpha != 1.0:  # the alpha that normalises the point-by-point optimum
        assert best == pytest.approx(alpha, abs=1e-6) and target.probs()[
            0
        ].tolist() == pytest.approx(probs, abs=2e-5)
    else:  # any other alpha leaves the family
        assert max(abs(a - b) for a, b in zip(target.probs()[0].tolist(), probs)) > 0.01


@pytest.mark.paper
def test_the_normaliser():
    weight = [b ** (1 - 1 / 0.5) * a ** (1 / 0.5) for a, b in zip(P_DATA, P_REF)]
    assert sum(weight) == pytest.approx(1.258333, abs=1e-6) and theory(
        four().reference, four().data, 0.5
    )[1] == pytest.approx(sum(weight) ** 0.5)


@pytest.mark.paper
@pytest.mark.parametrize(
    ("beta", "alpha", "gradient"),
    [(1.0, 1.0, (-0.1, 0, 0.025, 0.075)), (0.3, 4.0, (-0.03, 0, 0.0075, 0.0225))],
)
def test_the_first_step_is_maximum_likelihood_whatever_alpha(beta, alpha, gradient):
    world = four()
    policy = world.model().double()
    (found,) = torch.autograd.grad(
        expected_loss(policy, world.reference, world.data, Config(beta, alpha)), policy.logits
    )
    assert found.flatten().tolist() == pytest.approx(gradient, abs=1e-7)
    nll = -(world.data.probs() * policy.log_probs()).sum()
    torch.testing.assert_close(found, beta / 2 * torch.autograd.grad(nll, policy.logits)[0])


@pytest.mark.paper
def test_away_from_the_reference_the_gradient_weighs_by_the_discriminator():
    world = four()
    policy = Table(4).double()
    with torch.no_grad():
        policy.logits.normal_(generator=torch.Generator().manual_seed(0))
    p_data, p_ref, r = (
        world.data.probs()[0],
        world.reference.probs()[0],
        (policy.log_probs() - world.reference.log_probs())[0].detach(),
    )
    jacobian = torch.autograd.functional.jacobian(
        lambda logits: logits.log_softmax(-1), policy.logits.detach().flatten()
    )
    for beta, alpha in ((1.0, 1.0), (0.3, 4.0)):
        (found,) = torch.autograd.grad(
            expected_loss(policy, world.reference, world.data, Config(beta, alpha)), policy.logits
        )
        density = beta * (
            -p_data * torch.sigmoid(-beta * r) + alpha * p_ref * torch.sigmoid(beta * r)
        )
        torch.testing.assert_close(found.flatten(), density @ jacobian)
    (found,) = torch.autograd.grad(
        expected_loss(policy, world.reference, world.data, Config(1.0, 1.0)), policy.logits
    )
    distance = (1 - torch.sigmoid(r)) * (policy.probs()[0].detach() - p_data)  # eq. 10
    torch.testing.assert_close(found.flatten(), distance @ jacobian)


@pytest.mark.paper
@pytest.mark.parametrize(("beta", "critical"), [(0.05, 1.051), (0.5, 1.667), (1.0, 3.0)])
def test_too_much_weight_on_fakes_breaks_the_symmetry(beta, critical):
    """If the reference is the data, it is a minimum up to alpha = (2 + beta) / (2 - beta)."""
    assert (2 + beta) / (2 - beta) == pytest.approx(critical, abs=1e-3)
    world = four([0.25] * 4, [0.25] * 4)
    for alpha, stable in (
        ((2 + beta) / (2 - beta) - 0.01, True),
        ((2 + beta) / (2 - beta) + 0.01, False),
    ):

        def value(logits):
            policy = SimpleNamespace(log_probs=lambda: logits.log_softmax(-1)[None])
            return expected_loss(policy, world.reference, world.data, Config(beta, alpha))

        curvature = torch.linalg.eigvalsh(
            torch.autograd.functional.hessian(value, torch.zeros(4, dtype=torch.float64))
        )
        curvature = curvature[curvature.abs().argsort()][1:]  # without the logits' common shift
        assert (curvature > 0).all() if stable else (curvature < 0).all()


@pytest.mark.paper
@pytest.mark.parametrize(
    ("alpha", "probs"), [(1.55, (0.25, 0.25, 0.25, 0.25)), (1.783, (0.652, 0.116, 0.116, 0.116))]
)
def test_where_the_mass_goes_beyond_the_critical_alpha(alpha, probs):
    world = four([0.25] * 4, [0.25] * 4)
    policy = world.model().double()
    with torch.no_grad():
        policy.logits += torch.tensor([0.1, 0.0, -0.01, 0.01])
    assert sorted(
        optimum(world, Config(0.5, alpha), policy).probs()[0].tolist(), reverse=True
    ) == pytest.approx(probs, abs=1e-3)


# ---- sequences


@pytest.mark.paper
@pytest.mark.parametrize(
    ("beta", "alpha", "valid"), [(1.0, 1.0, 0.9039), (0.5, 1.186, 0.9173), (0.25, 1.295, 0.9346)]
)
def test_the_theory_on_sequences(beta, alpha, valid):
    world = counting()
    assert world.reference.expect(world.rewards()) == pytest.approx(0.6333, abs=1e-4)
    target, best = theory(world.reference, world.data, beta)
    assert best == pytest.approx(alpha, abs=1e-3) and target.expect(
        world.rewards()
    ) == pytest.approx(valid, abs=1e-4)


@pytest.mark.slow
def test_a_table_reaches_the_theory_on_sequences():
    world = counting()
    target, alpha = theory(world.reference, world.data, 0.5)
    policy = fit_exactly(
        Lab(Settings(), quiet=True),
        world.model().double(),
        lambda model: expected_loss(model, world.reference, world.data, Config(0.5, alpha)),
        300,
    )
    assert policy.expect(world.rewards()) == pytest.approx(0.9173, abs=5e-4)
    assert (policy.probs() - target.probs()).abs().sum().item() / 2 < 2e-3


def test_expected_loss_is_the_mean_of_the_loss_over_draws():
    world = counting()
    policy = Table(4, 6).double()
    rows = ddo.real_and_fake(
        [
            dict(prompt=0, responses=r, scores=[1.0])
            for r in world.data.sample([0] * 4000, 1, torch.Generator().manual_seed(0))
        ],
        [
            dict(prompt=0, responses=r)
            for r in world.reference.sample([0] * 4000, 1, torch.Generator().manual_seed(1))
        ],
    )
    batch = collate(rows)
    sampled = loss(policy.logps(batch), world.reference.logps(batch), batch, Config(0.3, 2.0))[0]
    exactly = expected_loss(policy, world.reference, world.data, Config(0.3, 2.0)).item()
    assert sampled.mean().item() == pytest.approx(exactly, abs=5 * sampled.std().item() / 4000**0.5)


class Bigram(Table):
    """A Table whose logits depend only on the last token, so it cannot represent `counting`."""

    def __init__(self, vocab, length):
        torch.nn.Module.__init__(self)
        self.vocab, self.length = vocab, length
        self.tied = torch.nn.Parameter(torch.zeros(1, 1 + vocab, vocab))  # row 0: no token yet

    @property
    def logits(self):
        last = (torch.arange(sum(self.vocab**t for t in range(self.length))) - 1) % self.vocab + 1
        last[0] = 0
        return self.tied[:, last]


def test_a_bigram_has_one_row_of_logits_a_token():
    table = Bigram(3, 4).double()
    with torch.no_grad():
        table.tied.normal_(generator=torch.Generator().manual_seed(0))
    log = table.tied[0].log_softmax(-1)
    assert sum(p.numel() for p in table.parameters()) == 12
    for y, p in zip(table.sequences().tolist(), table.log_probs()[0].tolist()):
        assert p == pytest.approx(
            (log[0, y[0]] + sum(log[1 + a, b] for a, b in zip(y, y[1:]))).item()
        )


def test_a_bigram_at_its_maximum_likelihood_stays_there():
    world = counting()
    policy = minimise(
        Bigram(4, 6).double(), lambda p: -(world.data.probs() * p.log_probs()).sum()
    )  # maximum likelihood
    before = policy.expect(world.rewards())
    assert before == pytest.approx(0.0816, abs=1e-4)
    reference = Table(4, 6).double().set_log_probs(policy.log_probs())
    for cfg in (Config(1.0, 1.0), Config(0.3, 1.0)):
        (gradient,) = torch.autograd.grad(
            expected_loss(policy, reference, world.data, cfg), policy.parameters()
        )
        assert gradient.abs().max() < 1e-6
    for _ in range(8):  # rounds
        reference = Table(4, 6).double().set_log_probs(policy.log_probs())
        minimise(policy, lambda p: expected_loss(p, reference, world.data, Config(1.0, 1.0)))
    assert policy.expect(world.rewards()) == pytest.approx(before, abs=1e-4)


# ---- images


def edm_way(model, p_mean=-1.2, p_std=1.2):
    """The prepare and score of a run with EDM's noise."""
    return ddo.edm_noise(
        Lab(Settings(world="gaussians"), quiet=True), Config(p_mean=p_mean, p_std=p_std), model
    )


def point_batch(model, n=512, shared=True):
    rng = torch.Generator().manual_seed(0)
    batch = SimpleNamespace(
        images=torch.randn(n, 2, *model.shape, generator=rng),
        label=torch.zeros(n, dtype=torch.long),
    )
    batch.mask = torch.ones(n, 2, 1, dtype=torch.bool)
    return model.prepare(batch, rng, shared=shared)


def nudged(model, by=0.01):
    torch.manual_seed(1)
    other = copy.deepcopy(model)
    with torch.no_grad():
        for p in other.parameters():
            p += by * p.std() * torch.randn_like(p) if p.numel() > 1 else 0
    return other


def test_ratios_are_zero_to_the_bit_at_the_reference():
    torch.manual_seed(0)
    model = MLP(prediction="edm", sd=0.7)
    batch = point_batch(model)
    logps = [edm_way(model)["score"](model, batch) for _ in range(2)]
    assert torch.equal(*logps)
    assert loss(logps[0], logps[1], batch, Config(0.5, 4.0))[0].tolist() == pytest.approx(
        [5 * math.log(2)] * 512
    )


def test_shared_noise_makes_the_ratio_small():
    """Weights differ by about 1 %; other noise or another level would give a far larger std."""
    torch.manual_seed(0)
    model = MLP(prediction="edm", sd=0.7, width=64)
    other, batch, again = nudged(model), point_batch(model), point_batch(model)
    again.noise = torch.randn(batch.noise.shape, generator=torch.Generator().manual_seed(9))
    level = point_batch(model)
    level.noise, level.t = (
        again.noise,
        batch.t[torch.randperm(len(batch.t), generator=torch.Generator().manual_seed(3))],
    )
    score = edm_way(model)["score"]
    with torch.no_grad():
        shared, noise, both = (score(other, batch) - score(model, x) for x in (batch, again, level))
    assert shared.std() < noise.std() / 10 and shared.std() < both.std() / 10


@pytest.mark.paper
def test_edms_weight_is_one_over_c_out_squared():
    torch.manual_seed(0)
    model, sd = MLP(prediction="edm", sd=0.7).double(), 0.7
    batch = point_batch(model, 64)
    batch.images, batch.noise = batch.images.double(), batch.noise.double()
    a = model.alpha_bar[batch.t].double()[:, None, None]
    x_t = q_sample(batch.images, batch.noise, a)
    c_skip, c_out, _, _ = edm(to_sigma(a), sd)
    with torch.no_grad():
        logps = edm_way(model)["score"](model, batch)
        eps = model.eps(
            x_t.flatten(0, 1), batch.t.repeat_interleave(2), batch.label.repeat_interleave(2)
        ).view_as(x_t)
    x_edm = x_t / a.sqrt()
    denoised = x_edm - to_sigma(a) * eps
    squared = (denoised - batch.images).square().sum(-1, keepdim=True)
    torch.testing.assert_close(logps, -squared / c_out**2)
    output, target = (
        (x - c_skip * x_edm) / c_out for x in (denoised, batch.images)
    )  # the network's F and its target
    torch.testing.assert_close(logps, -(output - target).square().sum(-1, keepdim=True))
    torch.testing.assert_close(to_eps("edm", output, x_t, a, sd=sd), eps)


def test_noise_levels_are_log_normal():
    model = MLP()
    batch = SimpleNamespace(images=torch.zeros(20000, 2, 2))
    t = edm_way(model)["prepare"](model, batch).t
    assert batch.noise.shape == (20000, 1, 2)  # one draw for both responses
    assert t.dtype == torch.long and t.min() >= 0 and t.max() < len(model.alpha_bar)
    log_sigma = to_sigma(model.alpha_bar[t]).log()
    assert log_sigma.mean().item() == pytest.approx(
        -1.2, abs=0.03
    ) and log_sigma.std().item() == pytest.approx(1.2, abs=0.03)


# ---- rows and rounds


def test_every_real_response_meets_a_sample_for_its_own_prompt():
    real = [
        dict(prompt="a", responses=["x y"], scores=[1.0]),
        dict(prompt="b", responses=["z"], scores=[1.0], difficulty=3),
    ]
    fake = [
        dict(prompt="a", responses=[[1, 2]], ends=[False]),
        dict(prompt="b", responses=[[3]], ends=[True]),
    ]
    assert ddo.real_and_fake(real, fake) == [
        dict(prompt="a", responses=["x y", [1, 2]], scores=[1.0, 0.0], ends=[True, False]),
        dict(prompt="b", responses=["z", [3]], scores=[1.0, 0.0], ends=[True, True]),
    ]
    real, fake = (
        [dict(prompt=4, responses=torch.full((1, 1, 2, 2), value))] for value in (1.0, 2.0)
    )
    (row,) = ddo.real_and_fake(real, fake)
    assert (
        row["prompt"] == 4
        and row["scores"] == [1.0, 0.0]
        and row["responses"].flatten(1).tolist() == [[1.0] * 4, [2.0] * 4]
    )


def test_rounds_share_the_steps_and_each_starts_afresh():
    lab = Lab(Settings(world="bandit", steps=7, batch_size=64, prompts=256), quiet=True)
    seen, align = [], lab.align

    def note(policy, data, loss, cfg, **how):
        before = policy.probs().detach().clone()
        out = align(policy, data, loss, cfg, **how)
        seen.append(
            (
                how["steps"],
                how["every"],
                how.get("reference", "start"),
                "optimizer" in how,
                before,
                out.probs().detach().clone(),
            )
        )
        return out

    lab.align = note
    policy = run(lab, Config(beta=0.5, alpha=1.0, rounds=3))
    assert (
        sum(s[0] for s in seen) == 7
        and len(seen) == 3
        and all(s[0] == s[1] and s[2] == "start" and not s[3] for s in seen)
    )
    for last, this in zip(seen, seen[1:]):
        torch.testing.assert_close(last[5], this[4])
    torch.testing.assert_close(seen[-1][5], policy.probs())


def test_no_steps_leave_the_base_model():
    lab = Lab(Settings(world="bandit", steps=0), quiet=True)
    assert run(lab, Config()).kl(lab.reference) == pytest.approx(0, abs=1e-6)


def test_the_round_with_the_smallest_frechet_distance_is_kept_and_continued():
    lab = Lab(
        Settings(world="gaussians", base_steps=2, steps=8, batch_size=8, prompts=32), quiet=True
    )
    distances, started, ended = iter([3.0, 2.0, 5.0, 1.0, 4.0]), [], []
    lab.world.frechet, lab.world.measure = len, lambda policy, lab: {"frechet": next(distances)}
    align = lab.align

    def note(policy, *rest, **how):
        started.append(policy.output.weight.detach().clone())
        out = align(policy, *rest, **how)
        ended.append(out.output.weight.detach().clone())
        return out

    lab.align = note
    policy = run(lab, Config(rounds=4))
    assert torch.equal(started[2], ended[0])  # the second round was worse than the first
    assert torch.equal(started[3], ended[2]) and torch.equal(policy.output.weight, ended[2])


@pytest.mark.slow
@pytest.mark.parametrize("how", [{}, dict(p_mean=-1.2, p_std=1.2)])
def test_a_run_on_points(how):
    lab = Lab(
        Settings(world="gaussians", base_steps=5, steps=4, batch_size=16, prompts=64), quiet=True
    )
    policy = run(lab, Config(rounds=2, **how))
    assert all(p.isfinite().all() for p in policy.parameters())
    assert not torch.equal(policy.output.weight, lab.reference.output.weight)


@pytest.mark.slow
def test_a_run_moves_a_diluted_table_towards_the_data():
    lab = Lab(
        Settings(world="bandit", steps=200, batch_size=256, prompts=4096, lr=0.05), quiet=True
    )
    lab.world = counting()
    policy = run(lab, Config(beta=1.0, alpha=1.0, rounds=2))
    assert policy.expect(lab.world.rewards()) > 0.8


def test_told_apart_counts_real_above_and_fake_below():
    _, metrics = loss(*ratios([1.0, -1.0, 0.0], [-2.0, -3.0, 0.5]), Config())
    assert metrics["told_apart"].item() == pytest.approx(3.5 / 6)


def test_a_round_worse_than_the_best_before_is_dropped():
    lab = Lab(
        Settings(world="gaussians", base_steps=2, steps=4, batch_size=8, prompts=32), quiet=True
    )
    distances, ended = iter([3.0, 1.0, 2.0]), []
    lab.world.frechet, lab.world.measure = len, lambda policy, lab: {"frechet": next(distances)}
    align = lab.align

    def note(*rest, **how):
        out = align(*rest, **how)
        ended.append(out.output.weight.detach().clone())
        return out

    lab.align = note
    assert torch.equal(run(lab, Config(rounds=2)).output.weight, ended[0])


def test_a_round_meets_samples_of_its_own_start_for_the_prompts_of_the_real_ones(monkeypatch):
    lab = Lab(Settings(world="bandit", steps=20, batch_size=64, prompts=640, lr=0.1), quiet=True)
    lab.world = World(prompts=3, data=torch.arange(27.0))
    asked, joined, sample, join, align, ended = [], [], lab.sample, ddo.real_and_fake, lab.align, []

    def note(policy, prompts, k, rng=None):
        asked.append(policy.probs().detach().clone())
        return sample(policy, prompts, k, rng)

    def pair(real, fake):
        joined.append(([row["prompt"] for row in real], [row["prompt"] for row in fake]))
        return join(real, fake)

    def trained(*rest, **how):
        out = align(*rest, **how)
        ended.append(out.probs().detach().clone())
        return out

    lab.sample, lab.align = note, trained
    monkeypatch.setattr(ddo, "real_and_fake", pair)
    run(lab, Config(rounds=2))
    assert all(a == b and len(set(a)) == 3 for a, b in joined)
    torch.testing.assert_close(asked[1], ended[0])
    assert not torch.allclose(asked[1], asked[0], atol=1e-2)


def test_noise_is_drawn_anew_in_each_step_and_at_the_nearest_level():
    model = MLP()

    def draw(mean, std, n, step=0):
        lab = Lab(Settings(world="gaussians"), quiet=True)
        lab.step = step
        how = ddo.edm_noise(lab, Config(p_mean=mean, p_std=std), model)
        return how["prepare"](model, SimpleNamespace(images=torch.zeros(n, 2, 2)))

    first, same, other = (draw(-1.2, 1.2, 64, step) for step in (0, 0, 1))
    assert torch.equal(first.t, same.t) and torch.equal(first.noise, same.noise)
    assert not torch.equal(first.t, other.t) and not torch.equal(first.noise, other.noise)
    levels = to_sigma(model.alpha_bar).log()
    for t in (1, 10, 500, 900):
        for neighbour in (t - 1, t + 1):
            mean = (levels[t] + 0.4 * (levels[neighbour] - levels[t])).item()
            assert (draw(mean, 1e-9, 4).t == t).all()


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3, alpha=1.9), dict(beta=1.7, alpha=0.0)]
INPUTS = builders.pairs
SURVIVORS = {}
