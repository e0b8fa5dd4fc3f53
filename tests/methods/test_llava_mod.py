"""LLaVA-MoD against its paper: both losses, distillation, the router, upcycling, the stages."""

import copy
import math
import warnings
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from claims import llava_mod as claims
from data import UserError
from lab import Lab, Settings
from methods import llava_mod
from methods.llava_mod import (
    MIXTURE,
    Also,
    Config,
    Mixture,
    balance,
    distill,
    fresh,
    loss,
    mimic,
    route,
    run,
    upcycle,
)
from nanomodel import MLP, GPTConfig
from tests import builders, mutation


def numbers(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def normal(*shape, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=rng)


def one_token(*pairs):
    """Log-probs (B, 2, 1) of pairs (chosen, rejected), and a batch."""
    logps = numbers(*pairs)[..., None]
    mask = torch.ones(logps.shape, dtype=torch.bool)
    scores, parents = torch.eye(2)[0].expand(len(pairs), 2), torch.full((len(pairs), 2), -1)
    return logps, SimpleNamespace(mask=mask, scores=scores, parents=parents)


TEACHER = (-3.5, -4.2)


# ---- the preference losses


@pytest.mark.paper
@pytest.mark.parametrize(
    ("student", "dpo", "kto"), [((-4, -5), 0.678260, 0.496254), ((-2.5, -6), 0.562915, 0.452737)]
)
def test_the_worked_examples(student, dpo, kto):
    logps, batch = one_token(student)
    ref_logps, _ = one_token(TEACHER)
    for variant, expected in (("dpo", dpo), ("kto_pair", kto)):
        losses, metrics = loss(logps, ref_logps, batch, Config(variant, beta=0.1))
        assert losses.item() == pytest.approx(expected, abs=1e-6)
        assert metrics["r_chosen"].item() == pytest.approx(student[0] - TEACHER[0])
        assert metrics["r_rejected"].item() == pytest.approx(student[1] - TEACHER[1])


@pytest.mark.paper
def test_a_student_that_equals_its_teacher_begins_at_the_loss_of_dpo():
    logps, ref_logps, batch = builders.ragged()
    losses, _ = loss(ref_logps, ref_logps, batch, Config())
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)))
    losses, _ = loss(ref_logps, ref_logps, batch, Config("kto_pair"))
    torch.testing.assert_close(losses, torch.full_like(losses, 0.5))
    small, _ = loss(logps, ref_logps, batch, Config(beta=1e-9))
    torch.testing.assert_close(small, torch.full_like(small, math.log(2)))


@pytest.mark.paper
def test_kto_pair_subtracts_the_mean_of_the_other_side_as_a_constant():
    logps, batch = one_token((-1, -3), (-2, -5), (-4, -1))
    ref_logps, _ = one_token(*[TEACHER] * 3)
    logps.requires_grad_()
    r = (logps - ref_logps)[..., 0].detach()
    z = r.mean(0).clamp(min=0)
    losses, _ = loss(logps, ref_logps, batch, Config("kto_pair", beta=0.3))
    up, down = torch.sigmoid(0.3 * (r[:, 0] - z[1])), torch.sigmoid(0.3 * (z[0] - r[:, 1]))
    torch.testing.assert_close(losses.detach(), 1 - (up + down) / 2)
    assert ((losses > 0) & (losses < 1)).all()
    (slope,) = torch.autograd.grad(losses.sum(), logps)
    expected = torch.stack([-up * (1 - up), down * (1 - down)], 1) * 0.3 / 2
    torch.testing.assert_close(slope[..., 0], expected)


@pytest.mark.paper
def test_the_teacher_sets_only_the_weight_of_dpos_gradient():
    logps, ref_logps, batch = builders.ragged()
    chosen, rejected = (logps - ref_logps).sum(-1).detach().unbind(1)
    (slope,) = torch.autograd.grad(loss(logps, ref_logps, batch, Config(beta=0.1))[0].sum(), logps)
    weight = -0.1 * torch.sigmoid(-0.1 * (chosen - rejected))
    sign = torch.tensor([1.0, -1.0])[None, :, None]
    torch.testing.assert_close(slope, weight[:, None, None] * sign * torch.ones_like(slope))


# ---- distillation over the whole vocabulary


@pytest.mark.paper
def test_the_distillation_of_the_worked_example():
    p, student = numbers([0.7, 0.2, 0.1]), torch.zeros(1, 3).double().requires_grad_()
    found = mimic(p.log(), student, torch.tensor([True]))
    assert found.item() == pytest.approx(0.296794, abs=1e-6)
    entropy = -(p * p.log()).sum().item()
    assert entropy == pytest.approx(0.801819, abs=1e-6)
    assert found.item() + entropy == pytest.approx(1.098612, abs=1e-6)
    (slope,) = torch.autograd.grad(found, student)
    assert slope[0].tolist() == pytest.approx([-0.366667, 0.133333, 0.233333], abs=1e-6)


@pytest.mark.paper
def test_distillation_reads_the_masked_positions_and_no_constant():
    teacher, student, mask = normal(2, 1, 4, 5), normal(2, 1, 4, 5, seed=1), torch.ones(2, 1, 4)
    mask = mask.bool()
    mask[0, 0, 2:] = False
    found = mimic(teacher, student, mask)
    p, q = (x.flatten(0, 2)[mask.flatten()].log_softmax(-1) for x in (teacher, student))
    torch.testing.assert_close(found, F.kl_div(q, p, log_target=True, reduction="batchmean"))
    torch.testing.assert_close(mimic(teacher + 3, student - normal(2, 1, 4, 1), mask), found)
    other = student.clone()
    other[0, 0, 2:] += normal(2, 5, seed=3)
    torch.testing.assert_close(mimic(teacher, other, mask), found)
    assert mimic(teacher, teacher, mask).abs() < 1e-12
    teacher[..., 0] = student[..., 0] = -torch.inf  # a token that neither can write
    assert mimic(teacher, student, mask).isfinite()


# ---- the mixture of experts


@pytest.mark.paper
def test_the_router_renormalizes_the_two_best_experts():
    weights, _ = route(numbers([2, 1, 0, -1], [0, 0.5, 3, 1]), 2)
    expected = [[0.731059, 0.268941, 0, 0], [0, 0, 0.880797, 0.119203]]
    for found, wanted in zip(weights.tolist(), expected):
        assert found == pytest.approx(wanted, abs=1e-6)
    weights, g = route(torch.randn(9, 4).bfloat16(), 3)
    assert weights.dtype == g.dtype == torch.float32
    assert (weights > 0).sum(1).tolist() == [3] * 9
    torch.testing.assert_close(weights.sum(1), torch.ones(9))


@pytest.mark.paper
def test_the_balance_is_one_for_equal_use_and_the_number_of_experts_for_one():
    even = (100 * torch.eye(4).double()).softmax(-1)
    assert balance(even).item() == pytest.approx(1)
    assert balance(even[:1].expand(7, 4)).item() == pytest.approx(4)
    g = numbers([2, 1, 0, 0], [0, 3, 1, 0], [5, 0, 0, 0]).softmax(-1)
    share = torch.tensor([2 / 3, 1 / 3, 0, 0]).double()
    torch.testing.assert_close(balance(g), 4 * (g.mean(0) * share).sum())


def layer(dtype=torch.float64, **changes):
    """A feed-forward layer and a mixture of its copies."""
    torch.manual_seed(0)
    dense = MLP(GPTConfig(hidden_size=8, intermediate_size=12)).to(dtype)
    how = dict(width=8, experts=4, top=2, aux=0.01) | changes
    return dense, Mixture(dense, **how).to(dtype)


@pytest.mark.paper
@pytest.mark.parametrize("top", [1, 2, 4])
def test_upcycling_changes_no_output(top):
    for dtype, exact in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        dense, mixture = layer(dtype, top=top)
        for shape in ((5, 8), (2, 3, 8), (1, 2, 3, 8)):
            x = normal(*shape).to(dtype)
            torch.testing.assert_close(mixture(x), dense(x), atol=exact, rtol=0)
            assert mixture(x).shape == x.shape


@pytest.mark.paper
def test_equal_experts_move_the_router_only_by_the_balance():
    _, mixture = layer(aux=0.0)
    x = normal(6, 8)
    mixture(x).square().sum().backward()
    assert mixture.router.weight.grad.abs().max() < 1e-12
    _, mixture = layer(aux=0.5)
    mixture(x).square().sum().backward()
    twin = copy.deepcopy(mixture)
    twin.zero_grad()
    (0.5 * balance(route(twin.router(x), 2)[1])).backward()
    torch.testing.assert_close(mixture.router.weight.grad, twin.router.weight.grad)
    assert mixture.balance.item() == pytest.approx(balance(route(mixture.router(x), 2)[1]).item())


def test_a_mixture_uses_the_weighted_experts():
    _, mixture = layer()
    for i, expert in enumerate(mixture.experts):
        expert.down_proj.weight.data *= i + 1
    x = normal(5, 8)
    g = mixture.router(x).softmax(-1)
    for row, (out, p) in enumerate(zip(mixture(x), g)):
        (a, b), (i, j) = (part.tolist() for part in p.topk(2))
        experts = [mixture.experts[k](x[row]) for k in (i, j)]
        torch.testing.assert_close(out, (a * experts[0] + b * experts[1]) / (a + b))


def test_the_router_is_in_float32_under_autocast_and_with_narrow_weights(monkeypatch):
    seen = []

    def watched(logits, top):
        seen.append(logits)
        return route(logits, top)

    monkeypatch.setattr(llava_mod, "route", watched)
    _, mixture = layer(torch.float32)
    x = normal(500, 8).float()
    with torch.autocast("cpu", torch.bfloat16):
        mixture(x)
    torch.testing.assert_close(seen.pop(), mixture.router(x))
    assert mixture.bfloat16()(x.bfloat16()).dtype == torch.bfloat16
    assert seen.pop().dtype == torch.float32


def test_the_balance_is_added_once_and_only_in_training():
    x, value = normal(3).requires_grad_(), normal(1)[0].requires_grad_()
    out = Also.apply(x, value)
    assert torch.equal(out, x)
    (2 * out.sum()).backward()
    assert x.grad.tolist() == [2, 2, 2] and value.grad.item() == 1
    _, mixture = layer()
    mixture.eval()
    assert "Also" not in str(mixture(normal(2, 8)).grad_fn.next_functions)


# ---- the student


def student(**changes):
    lab = Lab(Settings(world="captions", base_steps=0), quiet=True)
    teacher = lab.base("raw")
    return lab, teacher, fresh(lab, teacher, 32)


def test_a_sparse_student_writes_what_the_dense_one_wrote_and_trains_its_layers():
    lab, _, model = student()
    rows = lab.rows(lab.world.demonstrations(4, lab.rng("rows")))
    batch = lab.collate(rows)
    before, samples = model.logits(batch), lab.sample(model, [rows[0]["prompt"]], 3)
    sparse = upcycle(model, Config())
    torch.testing.assert_close(sparse.logits(batch), before, atol=1e-5, rtol=0)
    assert lab.sample(sparse, [rows[0]["prompt"]], 3) == samples
    assert [isinstance(layer.mlp, Mixture) for layer in sparse.layers] == [True, False]
    trained = {name for name, p in sparse.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in sparse.named_parameters() if ".mlp." in name}
    assert any("router" in name for name in trained) and not sparse.save_pretrained


def test_the_balance_of_the_experts_counts_once_in_a_step_of_sparse_distillation():
    lab, teacher, model = student()
    sparse, steps = upcycle(model, Config(aux=0.3)), []

    def fit(model, batches, objective, **how):
        steps.append((batches(0), objective))
        return model

    lab.fit = fit
    distill(lab, sparse, teacher, 4, sparse=True)
    batch, objective = steps[0]
    mixture = sparse.layers[0].mlp
    router = mixture.router.weight

    def slope(aux):
        router.grad, mixture.aux = None, aux
        objective(sparse, batch)[0].mean().backward()
        return router.grad

    router.grad, mixture.aux = None, 0.3  # one pass, whose other gradients are 0
    (0 * sparse.logits(batch)).sum().backward()
    once = router.grad
    torch.testing.assert_close(slope(0.3) - slope(0.0), once, rtol=1e-3, atol=1e-7)
    loss = objective(sparse, batch)[0]
    kl = mimic(teacher.logits(batch), sparse.logits(batch), batch.mask)
    nll = -sparse.logps(batch).sum() / batch.mask.sum()
    torch.testing.assert_close(loss, kl + nll)


def test_a_student_has_the_vocabulary_and_the_layers_of_its_teacher_at_another_width():
    _, teacher, model = student()
    assert model.config.hidden_size == 32 and model.config.vocab_size == teacher.config.vocab_size
    assert len(model.layers) == len(teacher.layers)


@pytest.mark.parametrize(
    "width, heads, shared", [(64, 4, 2), (72, 4, 2), (30, 3, 1), (14, 1, 1), (8, 4, 2)]
)
def test_a_student_of_any_even_width_has_the_heads_that_fit(width, heads, shared):
    lab, teacher, _ = student()
    config = fresh(lab, teacher, width).config
    assert (teacher.config.num_attention_heads, teacher.config.num_key_value_heads) == (4, 2)
    assert (config.num_attention_heads, config.num_key_value_heads) == (heads, shared)
    assert config.hidden_size == width


def test_what_makes_no_sense_is_refused():
    a, b, mask = normal(1, 1, 2, 5), normal(1, 1, 2, 4), torch.ones(1, 1, 2).bool()
    with pytest.raises(UserError, match="vocabularies of 5 and 4"):
        mimic(a, b, mask)
    with pytest.raises(UserError, match="no response token"):
        mimic(a, a, ~mask)
    with pytest.raises(UserError, match="--top 5 exceeds --experts 4"):
        layer(top=5)
    with pytest.raises(UserError, match="--width 31: expected an even number"):
        Config(width=31)
    for fields in (dict(beta=0.0), dict(variant="kto"), dict(anchor="self"), dict(top=0)):
        with pytest.raises(UserError):
            Config(**fields)
    with pytest.raises(UserError, match="--top 3 exceeds --experts 2"):  # before any training
        Config(experts=2, top=3)
    defaults = [{name: value} for name, value in MIXTURE.items()]
    for fields in (dict(experts=3), dict(top=1), dict(aux=0.0), *defaults):
        with pytest.raises(UserError, match="do nothing with sparse = 0"):
            Config(sparse=0, **fields)


@pytest.mark.slow
@pytest.mark.parametrize("part", [claims.captions, claims.tasks])
def test_what_the_claims_measure_depends_on_the_seed_and_leaves_the_global_generator(part):
    lab, found = Lab(Settings(world="captions", seed=100), quiet=True, smoke=True), []
    for state in (1, 2):
        before = torch.manual_seed(state).get_state()
        found.append(part(lab, 100))
        assert torch.equal(torch.get_rng_state(), before)
    assert found[0] == found[1] != part(lab, 101)


@pytest.mark.slow
def test_a_run_distils_and_aligns_a_sparse_student():
    settings = Settings(world="captions", steps=3, batch_size=8, prompts=32, base_steps=5, lr=1e-3)
    lab = Lab(settings, quiet=True)
    lab.eval_size, cfg = 8, Config(width=32, dense=3, sparse=3)
    model = run(lab, cfg)
    assert isinstance(model.layers[0].mlp, Mixture) and model.curve[-1]["step"] == 3
    assert all(p.isfinite().all() for p in model.parameters())
    dense = run(Lab(settings, quiet=True), Config(width=32, dense=3, sparse=0, anchor="student"))
    assert isinstance(dense.layers[0].mlp, MLP)


# ---- the mutants


CASES = [dict(), dict(beta=1.3), dict(variant="kto_pair"), dict(variant="kto_pair", beta=0.7)]
INPUTS = builders.pairs
SURVIVORS = {}


def coupled(cfg):
    """kto_pair subtracts means over the batch."""
    return cfg.variant == "kto_pair"


CORE = ["mimic", "route", "balance"]


def calls():
    """What the mutants of the distillation and the router are called with."""
    mask = torch.ones(2, 1, 3).bool()
    mask[0, 0, 1:] = False
    a, b = normal(2, 1, 3, 4).requires_grad_(), normal(2, 1, 3, 4, seed=1).requires_grad_()
    never = a.detach().clone()
    never[..., 1] = -torch.inf
    found = [("mimic", x, b, mask) for x in (a, never)]
    found += [("mimic", never, never.clone(), mask), ("mimic", a, b[..., :3], mask)]
    found += [("mimic", a.bfloat16(), b.bfloat16(), mask), ("mimic", a, b, ~mask & mask)]
    logits = normal(5, 4).requires_grad_()
    found += [("route", logits, top) for top in (1, 2, 4)] + [("route", logits.bfloat16(), 2)]
    g = normal(5, 4).softmax(-1).requires_grad_()
    return [*found, ("balance", g), ("balance", g[:, :3]), ("balance", g.float())]


@pytest.mark.mutants
def test_no_mutant_of_the_distillation_and_the_router_survives():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made, alive = mutation.survivors(llava_mod, [{}], calls, CORE, mutation.observe_call)
    assert len(made) > 30 and {mutant.name for mutant in alive} == set(ALIVE)


FLAT = "a second axis is the last one"
ALIVE = {
    "mimic: -1 -> 1": FLAT,
    "route: -1 -> 1": FLAT,
    "balance: -1 -> 1": FLAT,
    "mimic: 1 -> 2": FLAT,
    "mimic: 0.0 -> 1.0": "it is multiplied by a probability of 0",
    "route: torch.zeros_like(g) -> torch.zeros_like(_detached(g))": "zeros have no gradient",
    "balance: g.argmax(-1) -> _detached(g).argmax(-1)": "an index has no gradient",
}
