"""RankDPO against its paper: DCG weights, win counts, Diffusion-DPO inside it, and its lists."""

import itertools
import math
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from data import UserError
from lab import Lab, Settings
from lab.flags import combinations, read_flags
from methods import dpo
from methods.rankdpo import (
    SCALES,
    Config,
    beside,
    dcg_weights,
    drawn,
    given_counts,
    loss,
    ranked,
    ratings,
    run,
    win_counts,
)
from tests.builders import changed, descending, elsewhere, put, ragged

PHI = (1.0, 2 / 3, 1 / 3, 0.0)
DELTA = {  # of the pairs of a list of four that one reward model has ranked
    (0, 1): 0.219691,
    (0, 2): 0.533854,
    (0, 3): 0.821360,
    (1, 2): 0.061858,
    (1, 3): 0.169703,
    (2, 3): 0.025995,
}
S = (-0.3, 0.1, 0.2, -0.1)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def scored(s, phi=PHI, **fields):
    """Loss, dL/ds and metrics of one list with the paper's scores s (lower is better)."""
    s = tensor(s).requires_grad_()
    mask = torch.ones(1, len(phi), 1, dtype=torch.bool)
    batch = SimpleNamespace(mask=mask, scores=tensor(phi)[None])
    losses, metrics = loss(
        -s[None, :, None], torch.zeros_like(s)[None, :, None], batch, Config(**fields)
    )
    (grad,) = torch.autograd.grad(losses.sum(), s)
    return losses.item(), grad, metrics


def everyone(phi):
    return torch.ones(1, len(phi), dtype=torch.bool)


# ---- the card's numbers


@pytest.mark.paper
def test_the_weights_of_four_ranked_images():
    w = dcg_weights(tensor(PHI)[None], everyone(PHI), Config())[0]
    expected = torch.zeros(4, 4, dtype=torch.float64)
    for (i, j), value in DELTA.items():
        expected[i, j] = value
    torch.testing.assert_close(w, expected, rtol=0, atol=1e-6)
    assert w.sum().item() == pytest.approx(1.832461, abs=1e-6)


@pytest.mark.paper
def test_at_the_reference_the_loss_is_ln_2_times_the_weights():
    value, grad, metrics = scored([0.0] * 4, beta=0.7)
    assert value == pytest.approx(1.270165, abs=1e-6)
    assert metrics["ordered"] == 0.5 and metrics["z"] == 0
    assert (grad[0] > 0).item() and (grad[3] < 0).item()  # the best one's error shall fall


@pytest.mark.paper
def test_loss_and_gradient_of_one_list():
    value, grad, metrics = scored(S, beta=2.0)
    assert value == pytest.approx(0.889045, abs=1e-6)
    assert grad.tolist() == pytest.approx([1.082614, 0.122671, -0.309276, -0.896010], abs=1e-6)
    assert grad.sum().item() == pytest.approx(0, abs=1e-12)
    weights = list(DELTA.values())
    gaps = {(i, j): 2.0 * (S[j] - S[i]) for i, j in DELTA}
    right = sum(w for pair, w in DELTA.items() if gaps[pair] > 0) / sum(weights)
    size = sum(w * abs(gaps[pair]) for pair, w in DELTA.items()) / sum(weights)
    found = {name: value.item() for name, value in metrics.items()}
    assert found == pytest.approx({"ordered": right, "z": size}, abs=1e-5)


@pytest.mark.paper
def test_a_pair_is_diffusion_dpo_with_a_constant_weight():
    value, grad, _ = scored([-0.3, 0.1], (1.0, 0.0), beta=2.0)
    assert value == pytest.approx(0.197595, abs=1e-6)
    assert value / 0.371101 == pytest.approx(0.532456, abs=1e-5)
    assert 0.532456 == pytest.approx(1 / math.log(2) - 1 / math.log(3), abs=1e-6)


@pytest.mark.paper
def test_win_counts_of_algorithm_1():
    phi = win_counts(tensor([[[3, 1, 2], [2, 2, 1]], [[1, 1, 1], [1, 1, 1]]]))
    assert phi.tolist() == [[0.75, 0.25, 0.25], [0, 0, 0]]  # a tie gives no win to either
    assert given_counts([5.0, -1.0, 2.0, 0.5]) == pytest.approx([1, 0, 2 / 3, 1 / 3])


# ---- identities


@pytest.mark.parametrize("seed", range(3))
def test_without_weights_a_pair_is_dpo(seed):
    logps, ref_logps, batch = ragged(seed=seed)
    losses, _ = loss(logps, ref_logps, batch, Config(beta=0.3, weights="none"))
    expected, _ = dpo.loss(logps, ref_logps, batch, dpo.Config(beta=0.3))
    torch.testing.assert_close(losses, expected)


@pytest.mark.parametrize("weights", ["dcg", "gain", "discount", "none"])
def test_the_loss_is_the_sum_over_pairs_and_its_gradient_that_of_the_card(weights):
    logps, ref_logps, batch = ragged(k=5, seed=1, fewest=2, scores=descending)
    cfg = Config(beta=0.4, weights=weights)
    losses, _ = loss(logps, ref_logps, batch, cfg)
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    s = -(logps - ref_logps).sum(-1).detach()
    for b in range(len(s)):
        n = int(batch.mask[b].any(-1).sum())
        phi = batch.scores[b, :n]
        tau = [1 + sum((phi > p).tolist()) for p in phi]
        total, slope = 0.0, [0.0] * n
        for i, j in itertools.combinations(range(n), 2):  # scores descend: i is better
            w = 1.0
            if weights in ("dcg", "gain"):
                w *= abs(2 ** phi[i] - 2 ** phi[j])
            if weights in ("dcg", "discount"):
                w *= abs(1 / math.log(1 + tau[i]) - 1 / math.log(1 + tau[j]))
            z = -0.4 * (s[b, i] - s[b, j])
            total += -w * F.logsigmoid(z)
            slope[i] += 0.4 * w * torch.sigmoid(-z)
            slope[j] -= 0.4 * w * torch.sigmoid(-z)
        torch.testing.assert_close(losses[b], torch.as_tensor(total))
        expected = -torch.stack([torch.as_tensor(x) for x in slope])  # in r = -s
        mask = batch.mask[b, :n]
        torch.testing.assert_close(grad[b, :n] * mask, expected[:, None] * mask)
        assert abs(sum(slope)) < 1e-9 and (grad[b, n:] == 0).all()


def test_gradients_on_ragged_lists():
    logps, ref_logps, batch = ragged(k=4, length=3, seed=2, fewest=2, scores=descending)
    for weights in ("dcg", "gain", "discount", "none"):
        cfg = Config(beta=0.5, weights=weights)
        assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))


def test_a_list_in_another_order_has_the_same_loss():
    logps, ref_logps, batch = item = ragged(k=4, seed=3, scores=descending)
    expected, _ = loss(*item, Config())
    for order in ([3, 2, 1, 0], [1, 0, 3, 2]):
        columns = dict(mask=batch.mask[:, order], scores=batch.scores[:, order])
        moved = changed((logps[:, order], ref_logps[:, order], batch), **columns)
        torch.testing.assert_close(loss(*moved, Config())[0], expected)


def test_a_list_of_ties_teaches_nothing_and_ties_have_no_pair():
    value, grad, _ = scored(S, (0.5,) * 4)
    assert value == 0 and (grad == 0).all()
    w = dcg_weights(tensor([(0.75, 0.25, 0.25)]), everyone((0, 0, 0)), Config())[0]
    assert w[1, 2] == w[2, 1] == 0
    # a tie is broken by the place in the list
    places = [1 / math.log(1 + tau) for tau in (1, 2, 3)]
    gain = 2**0.75 - 2**0.25
    assert w[0, 1:].tolist() == pytest.approx([gain * (places[0] - p) for p in places[1:]])


def test_only_better_errors_of_the_best_and_worse_ones_of_the_worst_lower_the_loss():
    start = scored(S)[0]
    assert scored((-0.4, *S[1:]))[0] < start < scored((*S[:3], -0.2))[0]
    assert scored((*S[:3], 0.1))[0] < start


@pytest.mark.parametrize(
    ("phi", "match"),
    [((1.5, 0.0), "score 1.5"), ((0.5, -0.1), "score -0.1"), ((math.nan, 0.5), "score nan")],
)
def test_scores_that_are_no_shares_are_refused(phi, match):
    with pytest.raises(UserError, match=match):
        scored([0.0, 0.0], phi)


def test_single_responses_are_refused():
    with pytest.raises(UserError, match="at least 2"):
        loss(*ragged(k=3, fewest=1, scores=descending), Config())


# ---- lists


def tiny(**settings):
    """A Lab on gaussians with an untrained base model."""
    how = dict(world="gaussians", base_steps=0, prompts=24, steps=2, batch_size=4, warmup=1)
    return Lab(Settings(**how | settings), quiet=True)


class Judged:
    """What a world with opinions shows to the method."""

    given, guided, name, kind = None, False, "judged", "images"

    def opinions(self, prompts, images):
        first = images.flatten(1)[:, 0]
        return {"up": first, "down": -first, "flat": torch.zeros(len(first))}


def judged(**fields):
    rows = [dict(prompt=0, responses=tensor([[1.0], [3.0], [2.0]])) for _ in range(2)]
    lab = SimpleNamespace(world=Judged(), rng=lambda *key: torch.Generator().manual_seed(0))
    return ratings(lab, rows, tensor([[5.0, 6, 7]] * 2), Config(**fields))


def test_who_votes():
    assert judged(raters="truth").tolist() == [[[5, 6, 7]]] * 2
    assert judged(raters="one").tolist() == [[[1, 3, 2]]] * 2
    assert judged().shape == (2, 3, 3)
    assert win_counts(judged())[0].tolist() == pytest.approx([2 / 6, 2 / 6, 2 / 6])
    assert judged(raters="random").shape == (2, 1, 3)


def test_lists_of_a_world_without_opinions_are_ranked_by_noisy_copies_of_the_truth():
    lab = tiny(k=3)
    rows = ranked(lab, lab.base(), Config())
    assert len(rows) == 24 and rows[0]["responses"].shape == (3, 2)
    phi, truth = (tensor([row[name] for row in rows]) for name in ("scores", "reward"))
    assert ((phi * 10).round() / 10 - phi).abs().max() < 1e-9 and phi.max() <= 1  # of 10 votes
    votes = ratings(lab, rows, 0 * truth, Config())
    assert votes.shape == (24, 5, 3) and votes.std().item() == pytest.approx(0.5, abs=0.08)
    assert torch.equal(ratings(lab, rows, truth, Config(raters="one"))[:, 0], (truth + votes[:, 0]))
    again = ranked(tiny(k=3), tiny(k=3).base(), Config())
    assert torch.equal(tensor([row["scores"] for row in again]), phi)


def test_generators_are_base_models_of_several_seeds_or_several_scales_of_guidance():
    lab = tiny(k=2)
    policy = lab.base()
    own, seeds = (drawn(lab, policy, Config(generators=g), [0] * 3) for g in ("self", "seeds"))
    assert [row["responses"].shape for row in seeds] == [(2, 2)] * 3
    assert not torch.equal(own[0]["responses"], seeds[0]["responses"])
    other = lab.at(base_seed=1)
    expected = other.sample(other.base(), [0] * 3, 1, lab.rng("lists", 1))
    assert torch.equal(seeds[2]["responses"][1], expected[2]["responses"][0])
    auto = drawn(lab, policy, Config(), [0] * 3)
    assert torch.equal(auto[0]["responses"], own[0]["responses"])


@pytest.mark.parametrize(
    ("world", "wrong", "match"),
    [
        ("bandit", dict(shared_noise=True), "shared_noise does nothing in bandit"),
        ("gaussians", dict(generators="guidance"), "guidance: gaussians has no guidance"),
        (
            "file",
            dict(raters="truth"),
            "generators do nothing with the rows of gaussians",
        ),
        ("file", dict(generators="self"), "raters and generators do nothing"),
        ("init", dict(generators="seeds"), "generators = seeds: --init is one model"),
    ],
)
def test_options_without_effect_are_refused_before_anything_is_trained(world, wrong, match):
    lab = tiny(world="bandit", base_steps=None) if world == "bandit" else tiny()
    if world == "file":
        lab.world.given = lambda k: []
    lab.settings.init = "folder" if world == "init" else None
    with pytest.raises(UserError, match=match):
        run(lab, Config(**wrong))
    assert lab.reference is None


@pytest.mark.parametrize("flag", ["flip", "label_temperature", "length_bias"])
def test_settings_of_annotators_are_refused_since_reward_models_vote(flag):
    argv = ["--method", "rankdpo", "--world", "reviews", f"--{flag}", "0.4"]
    with pytest.raises(UserError, match=f"--{flag} does nothing under rankdpo"):
        combinations(*read_flags(argv))
    if flag != "length_bias":  # only texts have a length
        there = [tiny(), tiny(**{flag: 0.4})]
        plain, other = ([row["scores"] for row in ranked(x, x.base(), Config())] for x in there)
        assert plain == other


def test_a_base_model_without_dropped_labels_draws_its_lists_without_guidance():
    lab = tiny(world="scenes", k=2, prompts=2)
    policy = lab.base()
    own = drawn(lab, policy, Config(generators="self"), [0, 40])
    policy.free = False
    auto = drawn(lab, policy, Config(), [0, 40])
    assert torch.equal(auto[1]["responses"], own[1]["responses"])


def test_the_images_of_all_generators_count_as_samples():
    for generators in ("self", "seeds"):
        lab = tiny(k=3, prompts=5)
        ranked(lab, lab.base(), Config(generators=generators))
        assert lab.samples == 15


@pytest.mark.slow
def test_lists_of_scenes_come_from_four_scales_of_guidance():
    lab = tiny(world="scenes", k=3, prompts=2)
    policy = lab.base()
    torch.nn.init.normal_(policy.output.weight, std=0.1)
    rows = drawn(lab, policy, Config(), [0, 40])
    for i in range(3):
        alone = policy.sample([0, 40], 1, lab.rng("lists", i), guidance=SCALES[i])
        assert torch.equal(rows[1]["responses"][i], alone[1, 0].cpu())


def test_responses_of_text_keep_their_ends():
    rows = [dict(prompt="a", responses=[[i]], ends=[i > 0]) for i in range(3)]
    assert beside(rows) == dict(prompt="a", responses=[[0], [1], [2]], ends=[False, True, True])


@pytest.mark.parametrize("shared", [False, True])
def test_each_image_of_a_list_has_its_own_noise_unless_it_is_shared(shared, monkeypatch):
    lab, shapes = tiny(k=3), []
    model = type(lab.world.model())
    plain = model.logps
    monkeypatch.setattr(
        model, "logps", lambda model, batch: shapes.append(batch.noise.shape) or plain(model, batch)
    )
    run(lab, Config(shared_noise=shared))
    assert set(shapes) == {(4, 1 if shared else 3, 2)}


def test_a_table_needs_no_noise():
    lab = Lab(Settings(world="bandit", prompts=16, steps=1, batch_size=4), quiet=True)
    assert run(lab, Config()).curve[-1]["step"] == 1


# ---- mutation cases


def shares():
    """Lists of shares of wins, some with ties and absent responses; the last items are refused."""
    full = ragged(k=5, scores=descending)
    tied = changed(full, scores=(4 * full[2].scores).round() / 4)
    short = ragged(k=5, seed=1, scores=descending, fewest=3)
    first = changed(  # the absent response comes first
        (short[0].roll(1, 1), short[1].roll(1, 1), short[2]),
        mask=short[2].mask.roll(1, 1),
        scores=short[2].scores.roll(1, 1),
    )
    idle = changed(full, scores=0 * full[2].scores)
    half = ragged(k=4, seed=2, scores=descending, dtype=torch.bfloat16)
    still = (full[1].clone().requires_grad_(), *full[1:])
    turned = changed(full, scores=full[2].scores.flip(1))
    ends = changed(full, scores=put(put(full[2].scores, 0, 0, 1.0), 0, 4, 0.0))
    zero = changed(first, scores=first[2].scores.round())  # absent ones before those of phi 0
    single = ragged(k=3, length=1, seed=5, scores=descending)
    inputs = [
        full,
        tied,
        short,
        first,
        zero,
        single,
        idle,
        half,
        ragged(seed=3),
        still,
        turned,
        ends,
    ]
    refused = [
        ragged(k=3, seed=4, fewest=1, scores=descending),
        changed(full, scores=put(full[2].scores, 0, 0, 1.01)),
        changed(full, scores=put(full[2].scores, 0, 0, 1.99)),
        changed(full, scores=put(full[2].scores, 0, 0, -0.01)),
        changed(full, scores=put(full[2].scores, 0, 0, math.nan)),
    ]
    return [*inputs, elsewhere(tied), *refused]


CASES = [dict(beta=0.7, weights=w) for w in ("dcg", "gain", "discount", "none")]
INPUTS = shares
RANKED = "phi.masked_fill(~present, -1.0).argsort(descending=True"
SURVIVORS = {
    "dcg_weights: 1.0 -> 2.0": "-1 and -2 are both below every phi",
    "dcg_weights: True -> False": "stable=True: a CPU sorts short rows stably anyway",
    f"dcg_weights: {RANKED}, stable=True) -> {RANKED})": "the same",
}
