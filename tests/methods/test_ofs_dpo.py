"""OFS-DPO: the card's numbers, the chase, the roles, combinations of modules, and forgetting."""

import math

import pytest
import torch

from claims.ofs_dpo import Streams, chased, first_group, log_linear
from data import UserError
from lab import Lab, Settings
from methods import dpo, ofs_dpo
from methods.dct_adamw import DCTAdamW
from methods.ofs_dpo import Chase, Config, choose, combined, loss, margin, run, simplex, stream
from nanomodel import LoRA
from tests import builders
from tests.test_gpt import make


def with_columns(item, other, fast):
    """The same pairs beside another module's margins (B,); fast: whether this one plays F."""
    rows = item[0].shape[0]
    other = torch.as_tensor(other, dtype=torch.float64).expand(rows)
    return builders.changed(item, other=other, fast=torch.full((rows,), float(fast)))


def one(mine, other, fast, **fields):
    """(loss, its slope in the own margin) at margins in units of beta."""
    item = with_columns(builders.one_pair(mine, 0.0), other, fast)
    losses, gradient = builders.value_and_gradient(loss, *item, Config(beta=1.0, **fields))
    return losses.item(), gradient.flatten()[0].item()


# ---- the loss


@pytest.mark.paper
def test_both_losses_at_the_margins_of_the_card():
    assert one(1.2, 0.8, True) == pytest.approx((0.314584, -0.271606), abs=1e-6)
    assert one(0.8, 1.2, False) == pytest.approx((0.319799, -0.350157), abs=1e-6)
    assert one(1.2, 0.8, True, alpha=0.0)[0] == pytest.approx(0.263282, abs=1e-6)
    assert one(0.8, 1.2, False, alpha=0.0)[0] == pytest.approx(0.371101, abs=1e-6)


@pytest.mark.paper
def test_level_modules_are_pushed_by_half_of_alpha_however_large_their_margin():
    plain = [0.5, 0.1192, 0.006693, 4.540e-5, 2.06e-9]
    chase = [0.55, 0.1692, 0.05669, 0.050045, 0.05]
    for m, without, pushed in zip((0.0, 2.0, 5.0, 10.0, 20.0), plain, chase):
        assert one(m, m, True, alpha=0.0)[1] == pytest.approx(-without, rel=1e-3)
        for fast in (True, False):
            assert one(m, m, fast)[1] == pytest.approx(-pushed, rel=1e-3)


@pytest.mark.paper
def test_the_push_on_the_slow_module_grows_with_its_margin_and_its_loss_has_no_minimum():
    margins = (-5.0, 0.0, 3.0, 8.0, 50.0)
    slopes = [one(m, 3.0, False)[1] for m in margins]
    chase = [slope - one(m, 3.0, False, alpha=0.0)[1] for slope, m in zip(slopes, margins)]
    expected = [-0.1 / (1 + math.exp(3.0 - m)) for m in margins]  # alpha sigmoid(m_S - m_F)
    assert chase == pytest.approx(expected, abs=1e-9)
    assert all(slope < 0 for slope in slopes)
    assert slopes[-1] == pytest.approx(-0.1, abs=1e-6)


@pytest.mark.paper
def test_without_alpha_it_is_dpo_and_the_reference_cancels_in_the_chase():
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *with_columns(item, 0.7, 1), Config(0.3, alpha=0.0))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)
    logps, ref_logps, batch = item
    shift = 0.5 * torch.randn(5, generator=torch.Generator().manual_seed(0)).double()
    moved = ref_logps.clone()
    moved[:, 0, 0] += shift  # the margins of both modules change by the same amount
    other = torch.arange(5.0).double()

    def chase_of(reference, other):
        both = [
            loss(*with_columns((logps, reference, batch), other, 1), Config(0.3, alpha=a))[0]
            for a in (0.2, 0.0)
        ]
        return both[0] - both[1]

    torch.testing.assert_close(chase_of(ref_logps, other), chase_of(moved, other - shift))


@pytest.mark.paper
def test_no_gradient_reaches_the_other_module():
    logps, ref_logps, _ = builders.ragged()
    assert logps.requires_grad and not margin(logps, ref_logps).requires_grad


def test_the_gap_is_that_of_the_fast_module_ahead_of_the_slow_one():
    gaps = [
        loss(*with_columns(builders.one_pair(a, 0.0), b, fast), Config())[1]["gap"].item()
        for a, b, fast in ((3.0, 1.0, 1), (1.0, 3.0, 0))
    ]
    assert gaps == pytest.approx([0.2, 0.2])


# ---- roles


def test_the_module_with_the_lower_loss_of_the_last_steps_plays_the_fast_one():
    chase = Chase(make(), 2, torch.Generator().manual_seed(0))
    for losses, lead in (((1.0, 0.5), 0), ((1.0, 0.9), 1), ((0.1, 5.0), 1), ((5.0, 4.8), 0)):
        chase.note(torch.tensor(losses), 2)
        assert int(chase.lead) == lead and chase.fast() is chase.modules_of[lead]
    assert "lead" in chase.state_dict() and "seen" in chase.state_dict()


def test_the_roles_are_never_read_on_the_host():
    """Tensors of the meta device have no values, so reading one is an error."""
    chase = Chase(make(), 2, torch.Generator().manual_seed(0)).to("meta")
    for _ in range(3):
        chase.note(torch.rand(2, device="meta"), 2)
        assert chase.roles().shape == (2,)


def test_the_roles_are_those_of_the_module_that_leads():
    chase = Chase(make(), 2, torch.Generator().manual_seed(0))
    assert chase.roles().tolist() == [1, 0]
    chase.note(torch.tensor([1.0, 0.5]), 1)
    assert chase.roles().tolist() == [0, 1]


def test_both_modules_begin_alike_and_share_the_frozen_weights():
    chase = Chase(make(), 2, torch.Generator().manual_seed(0))
    first, second = chase.modules_of
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters()))
    assert first.embed_tokens.weight is second.embed_tokens.weight
    ours = [{id(p) for p in m.parameters() if p.requires_grad} for m in (first, second)]
    assert not ours[0] & ours[1]


@pytest.mark.paper
def test_modules_with_equal_learning_rates_stay_identical():
    x = Streams([0, 1], 30).x[0]
    fast, slow = chased(x, Config(1.0, alpha=0.7, rho=1.0), 0.1)
    assert torch.equal(fast, slow)
    fast, slow = chased(x, Config(1.0, alpha=0.7, rho=0.2), 0.1)
    assert (fast.norm() > slow.norm()).item()


def with_roles(x, cfg, lr, start):
    """Fast and slow vectors (2, S, D) and who leads (S,), as `chased` with roles that swap."""
    theta, lead = start.clone(), torch.zeros(x.shape[1], dtype=torch.long)
    rates, seen, swaps = torch.tensor([lr, cfg.rho * lr]).double()[:, None, None], 0.0, 0
    for step, pairs in enumerate(x, 1):
        m = (theta * pairs).sum(-1)  # (2, S)
        fast = torch.stack([lead == 0, lead == 1]).double()
        sign, other = 2 * fast - 1, m.flip(0)
        slope = -torch.sigmoid(-m) - cfg.alpha * torch.sigmoid(-sign * (m - other))
        theta = theta - rates * slope[..., None] * pairs
        seen = seen - torch.nn.functional.logsigmoid(m)
        if step % cfg.every == 0:
            swaps, lead, seen = swaps + (seen.argmin(0) != lead).double(), seen.argmin(0), 0.0
    return theta, lead, swaps


def test_roles_swap_where_the_source_changes_and_accuracies_hardly_depend_on_it():
    """The claims on the log-linear stream leave the roles as they are."""
    streams, cfg = Streams(range(100, 110)), Config(1.0)
    start = chased(streams.x[0], cfg, 0.05)
    theta, lead, swaps = with_roles(streams.x[1], cfg, 0.05, start)
    assert (swaps >= 2).all()
    swapped = streams.accuracy(theta[lead, torch.arange(10)])
    kept = streams.accuracy(chased(streams.x[1], cfg, 0.05, start)[0])
    assert (swapped.mean(1) - kept.mean(1)).abs().max() < 0.01
    still, _, _ = with_roles(streams.x[1], Config(1.0, every=10**6), 0.05, start)
    torch.testing.assert_close(still, chased(streams.x[1], cfg, 0.05, start))


# ---- combinations


def trained(seed):
    model = LoRA.adapt(make(), 2, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for adapter in LoRA.of(model).values():
            adapter.B.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed))
    return model


def weights_of(model):
    return dict(model.named_parameters())["layers.0.mlp.up_proj.weight"]


@pytest.mark.paper
def test_a_weight_of_one_is_the_module_itself_and_deltas_are_not_parameters():
    modules = [trained(1), trained(2)]
    cfg = Config(variant="cofs")
    for i, weights in enumerate(([1.0, 0.0], [0.0, 1.0])):
        torch.testing.assert_close(
            weights_of(combined(modules, weights, cfg)), weights_of(LoRA.merged(modules[i]))
        )
    half = weights_of(combined(modules, [0.5, 0.5], cfg))
    mean = sum(weights_of(LoRA.merged(m)) for m in modules) / 2
    torch.testing.assert_close(half, mean)
    other = weights_of(combined(modules, [0.5, 0.5], Config(variant="cofs", combine="parameters")))
    adapters = [LoRA.of(m)["layers.0.mlp.up_proj"] for m in modules]
    a, b = (sum(getattr(x, side) for x in adapters) / 2 for side in "AB")
    torch.testing.assert_close(other, adapters[0].linear.weight + 2 * b @ a)
    assert not torch.allclose(other, half)


def test_the_grid_covers_the_simplex():
    assert simplex(2, 4) == [[1.0, 0.0], [0.75, 0.25], [0.5, 0.5], [0.25, 0.75], [0.0, 1.0]]
    assert len(simplex(3)) == 231 and all(sum(w) == pytest.approx(1.0) for w in simplex(3))


@pytest.mark.slow
def test_the_memory_chooses_the_module_that_fits_it():
    lab = Lab(Settings(world="drift", base_steps=0, prompts=16, batch_size=4), quiet=True)
    base, modules = lab.base(), []
    rows = stream(lab, base, 0, 12)
    for sign in (1.0, -1.0):
        module = LoRA.adapt(lab.base(), 2, torch.Generator().manual_seed(0))
        rate = torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.5)
        batch = lab.collate(lab.rows(rows))
        for _ in range(3):
            gap = module.logps(batch).sum(-1) @ torch.tensor([1.0, -1.0])
            rate.zero_grad()
            (-sign * gap.mean()).backward()
            rate.step()
        modules.append(module)
    cfg = Config(variant="cofs")
    assert choose(lab, base, modules, lab.rows(rows), cfg)[0] > 0.5
    assert choose(lab, base, modules[::-1], lab.rows(rows), cfg)[1] > 0.5


@pytest.mark.slow
@pytest.mark.paper
def test_a_combination_keeps_both_sources_where_a_stream_forgets():
    """The card's numbers are means of 20 streams of another generator."""
    found = log_linear(range(100, 106))
    means = {
        name: [sum(x[key] for x in each) / len(each) for key in ("first", "second")]
        for name, each in found.items()
    }
    card = {"dpo, first source": (0.933, 0.406), "dpo": (0.425, 0.925), "ofs": (0.444, 0.918)}
    card |= {"cofs": (0.699, 0.689), "joint": (0.667, 0.670)}
    for name, expected in card.items():
        assert means[f"log-linear, {name}"] == pytest.approx(expected, abs=0.05), name


# ---- runs


def chased_parts(monkeypatch, cfg, **settings):
    """(lab, model, batch, objective, optimizer) of `chase`, whose first module has a head start."""
    settings |= dict(world="drift", base_steps=0, prompts=8, batch_size=8, lr=0.01)
    lab = Lab(Settings(**settings), quiet=True)
    base, seen = lab.base(), []
    rows = stream(lab, base, 0, 8)
    monkeypatch.setattr(
        lab, "fit", lambda model, batches, f, steps, optimizer: seen.append((model, f, optimizer))
    )
    ofs_dpo.chase(lab, base, rows, cfg, torch.Generator().manual_seed(0), 1)
    (model, objective, optimizer) = seen[0]
    rng = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for scale, module in zip((0.3, 0.1), model.modules_of):
            for adapter in LoRA.of(module).values():
                adapter.B.normal_(0, scale, generator=rng)
    return lab, model, lab.collate(lab.rows(rows)), objective, optimizer


@pytest.mark.parametrize("lead", [0, 1])
def test_each_module_has_the_loss_of_its_role_beside_the_margin_of_the_other(monkeypatch, lead):
    cfg = Config(beta=0.5, alpha=0.4)
    lab, model, batch, objective, _ = chased_parts(monkeypatch, cfg)
    model.lead.fill_(lead)
    with torch.no_grad():
        ref = lab.reference.logps(batch)
        m = [cfg.beta * margin(module.logps(batch), ref) for module in model.modules_of]
        losses, metrics = objective(model, batch)
    ahead, log = m[lead] - m[1 - lead], torch.nn.functional.logsigmoid
    assert ahead.abs().min() > 1e-3
    torch.testing.assert_close(losses, -log(m[0]) - log(m[1]))  # the chase cancels in the sum
    assert metrics["gap"].item() == pytest.approx(ahead.mean().item(), rel=1e-4)
    share = (m[lead] > 0).float().mean().item()
    assert metrics["accuracy"].item() == pytest.approx(share)
    assert model.seen.tolist() == pytest.approx([-log(x).mean().item() for x in m], rel=1e-4)


@pytest.mark.parametrize("lead", [0, 1])
def test_the_gradient_of_a_module_is_that_of_its_own_loss_alone(monkeypatch, lead):
    cfg = Config(beta=0.5, alpha=0.4)
    lab, model, batch, objective, _ = chased_parts(monkeypatch, cfg)
    model.lead.fill_(lead)
    objective(model, batch)[0].mean().backward()
    ours = [[p.grad.clone() for p in m.parameters() if p.requires_grad] for m in model.modules_of]
    with torch.no_grad():
        ref = lab.reference.logps(batch)
        constant = [cfg.beta * margin(m.logps(batch), ref) for m in model.modules_of]
    log = torch.nn.functional.logsigmoid
    for i, module in enumerate(model.modules_of):
        m = cfg.beta * ((module.logps(batch) - ref).sum(-1) @ torch.tensor([1.0, -1.0]))
        other = constant[1 - i]
        chase = -log(m - other) if i == lead else log(other - m)
        model.zero_grad()
        (-log(m) + cfg.alpha * chase).mean().backward()
        own = [p.grad for p in module.parameters() if p.requires_grad]
        assert max(float(g.abs().max()) for g in own) > 1e-3
        torch.testing.assert_close(ours[i], own, rtol=1e-3, atol=1e-6)


@pytest.mark.parametrize("name, kind", [("adamw", torch.optim.AdamW), ("dct_adamw", DCTAdamW)])
def test_the_second_module_has_the_smaller_learning_rate(monkeypatch, name, kind):
    _, model, _, _, optimizer = chased_parts(monkeypatch, Config(rho=0.25), optimizer=name)
    made = optimizer(model.parameters())
    groups = made.param_groups
    assert type(made) is kind
    assert [group["lr"] for group in groups] == [0.01, 0.0025]
    for group, module in zip(groups, model.modules_of):
        trained = {id(p) for p in module.parameters() if p.requires_grad}
        assert {id(p) for p in group["params"]} == trained


def test_the_memory_has_the_last_pairs_of_each_source(monkeypatch):
    seen = []

    def streamed(lab, policy, d, n):
        two = dict(prompt=lab.world.prompts(1, lab.rng("x"))[0], responses=[" a", " ."])
        return [two | dict(place=10.0 * d + i, scores=[1.0, 0.0]) for i in range(8)]

    def chosen(lab, base, modules, rows, cfg):
        seen.extend(row["place"] for row in rows)
        return [0.5, 0.5]

    monkeypatch.setattr(ofs_dpo, "stream", streamed)
    monkeypatch.setattr(ofs_dpo, "choose", chosen)
    monkeypatch.setattr(ofs_dpo, "chase", lambda lab, base, *about: LoRA.adapt(base, 2))
    lab = Lab(Settings(world="drift", base_steps=0, steps=4, batch_size=4), quiet=True)
    run(lab, Config(variant="cofs", memory=2))
    assert seen == [6.0, 7.0, 16.0, 17.0]


@pytest.mark.slow
def test_the_policy_after_the_first_group_is_the_one_with_which_the_second_begins(monkeypatch):
    """A claim compares both ends of the same training."""
    settings = dict(world="drift", base_steps=2, steps=4, prompts=32, batch_size=4, eval_size=4)
    seen = []

    def noted(chase, losses, every, plain=Chase.note):
        if chase.steps == 2:
            seen.append(torch.cat([p.detach().flatten() for p in chase.modules_of[0].parameters()]))
        plain(chase, losses, every)

    monkeypatch.setattr(Chase, "note", noted)
    cfg = Config(alpha=0.0)
    run(Lab(Settings(max_response=8, **settings), quiet=True), cfg)
    found = []
    monkeypatch.setattr(LoRA, "merged", lambda module: found.append(module) or module)
    first_group(Lab(Settings(max_response=8, **settings), quiet=True), cfg)
    (before,), (after,) = seen, found
    assert torch.equal(before, torch.cat([p.detach().flatten() for p in after.parameters()]))


def test_sources_come_one_after_the_other_with_their_own_taste():
    lab = Lab(Settings(world="drift", base_steps=0, prompts=8, label_temperature=0), quiet=True)
    base = lab.base()
    for d, taste in enumerate(lab.world.tastes):
        for row in stream(lab, base, d, 8):
            texts = [lab.text(y) for y in row["responses"]]
            better, worse = taste([row["prompt"]] * 2, texts).tolist()
            assert better >= worse and row["scores"] == [1.0, 0.0]


@pytest.mark.slow
@pytest.mark.parametrize("variant", ["ofs", "cofs", "joint"])
def test_a_run_returns_a_plain_model_and_repeats_itself(variant):
    settings = dict(world="drift", base_steps=2, steps=4, prompts=32, batch_size=4, eval_size=4)
    found = []
    for _ in range(2):
        lab = Lab(Settings(max_response=8, **settings), quiet=True)
        cfg = Config(variant=variant, **(dict(memory=4) if variant == "cofs" else {}))
        policy = run(lab, cfg)
        assert not LoRA.of(policy)
        found.append(weights_of(policy))
        assert not torch.equal(found[-1], weights_of(lab.reference))
    assert torch.equal(*found)


@pytest.mark.parametrize("variant", ["ofs", "cofs", "joint"])
def test_with_few_steps_every_source_is_seen_and_not_only_the_first(monkeypatch, variant):
    seen = []

    def noted(lab, base, rows, cfg, rng, steps):
        seen.extend(row["source"] for row in rows)
        return LoRA.adapt(base, cfg.rank, rng)

    def streamed(lab, policy, d, n):
        two = dict(prompt=lab.world.prompts(1, lab.rng("x"))[0], responses=[" a", " ."])
        return [two | dict(source=d, scores=[1.0, 0.0])] * n

    monkeypatch.setattr(ofs_dpo, "chase", noted)
    monkeypatch.setattr(ofs_dpo, "stream", streamed)
    settings = dict(world="drift", base_steps=0, steps=4, prompts=100, batch_size=3)
    run(Lab(Settings(**settings), quiet=True), Config(variant=variant))
    assert sorted(seen) == [0] * 6 + [1] * 6
    assert (seen == sorted(seen)) == (variant != "joint")


@pytest.mark.parametrize("steps, said", [(16, False), (17, True)])
def test_steps_beyond_one_pass_over_the_stream_are_not_trained_and_a_line_says_so(
    monkeypatch, capsys, steps, said
):
    def streamed(lab, policy, d, n):
        two = dict(prompt=lab.world.prompts(1, lab.rng("x"))[0], responses=[" a", " ."])
        return [two | dict(scores=[1.0, 0.0])] * n

    monkeypatch.setattr(ofs_dpo, "chase", lambda lab, base, *about: LoRA.adapt(base, 2))
    monkeypatch.setattr(ofs_dpo, "stream", streamed)
    settings = dict(world="drift", base_steps=0, prompts=64, batch_size=4)
    run(Lab(Settings(steps=steps, **settings)), Config())
    assert ("16 of 17 steps: pairs are seen once" in capsys.readouterr().out) == said


def test_a_source_without_a_pair_is_refused(monkeypatch):
    monkeypatch.setattr(ofs_dpo, "stream", lambda lab, policy, d, n: [])
    lab = Lab(Settings(world="drift", base_steps=0), quiet=True)
    with pytest.raises(UserError, match="no pair with different scores"):
        run(lab, Config())


@pytest.mark.parametrize(
    "settings, fields, word",
    [
        (dict(world="drift", steps=1), {}, "at least 2"),
        (dict(world="drift", prompts=1), {}, "at least 2"),
        (dict(world="reviews"), dict(variant="cofs"), "one source"),
        (dict(world="reviews"), dict(variant="joint"), "variant = joint: reviews has one source"),
    ],
)
def test_runs_that_cannot_work_are_refused(settings, fields, word):
    with pytest.raises(UserError, match=word):
        run(Lab(Settings(**settings), quiet=True), Config(**fields))


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(alpha=-0.1), "alpha"),
        (dict(rho=0.0), "rho"),
        (dict(rho=1.5), "rho"),
        (dict(every=0), "every"),
        (dict(memory=5), "memory = 5 does nothing"),
        (dict(variant="cofs", memory=0), "memory"),
        (dict(variant="cofs", combine="both"), "combine"),
    ],
)
def test_wrong_fields_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        Config(**fields)


# ---- the mutants of the loss


def inputs():
    """Pairs beside margins of another module, in both roles."""
    out = []
    for item in builders.pairs():
        rows, place = item[0].shape[0], item[0].device
        rng = torch.Generator().manual_seed(3)
        other = 9 * torch.randn(rows, generator=rng, dtype=torch.float64)
        fast = torch.arange(rows) % 2
        out.append(builders.changed(item, other=other.to(place), fast=fast.double().to(place)))
    return out


CASES = [dict(alpha=0.4), dict(beta=0.7, alpha=0.0), dict(variant="cofs", memory=3, alpha=1.5)]
INPUTS = inputs
SURVIVORS = {"loss: cfg.alpha * sign -> cfg.alpha / sign": "the sign is 1 or -1"}
