"""UnifiedReward-Flex: win rates, advantages, pairs of traces, and GRPO of the generator."""

import math

import pytest
import torch

from claims import urflex as claims
from data import UserError
from lab import Lab, Settings
from methods import urflex
from methods.urflex import (
    STAGE_2,
    Config,
    better_trace,
    group_advantages,
    judge_of,
    judged,
    loss,
    lost,
    normalized,
    reasons,
    run,
    trace_loss,
    trace_pairs,
    win_rates,
    wins,
)
from tests.builders import changed, elsewhere, everything_scored, margins, ragged, reals
from toy import verdicts


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


def table(*pairs):
    """Wins (3, 3) of three images from the winner (1 to 3, 0 = tie) of (1,2), (1,3), (2,3)."""
    out = torch.full((3, 3), 0.5, dtype=torch.float64)
    for (i, j), winner in zip([(0, 1), (0, 2), (1, 2)], pairs):
        if winner:
            out[i, j], out[j, i] = float(winner == i + 1), float(winner == j + 1)
    return out


OVERALL = table(1, 1, 2)[None]
CRITERIA = torch.stack([table(1, 3, 2), table(2, 1, 0), table(1, 1, 3)])[None]


def spread_out(R):
    """Centred and divided by the unbiased deviation, by hand."""
    mean = sum(R) / len(R)
    deviation = math.sqrt(sum((x - mean) ** 2 for x in R) / (len(R) - 1))
    return [(x - mean) / deviation for x in R]


# ---- the card's numbers: win rates and advantages


@pytest.mark.paper
def test_win_rates_of_three_images():
    assert win_rates(OVERALL)[0].tolist() == [1, 0.5, 0]
    assert normalized(win_rates(OVERALL))[0].tolist() == pytest.approx([1, 0, -1], abs=1e-6)
    expected = [[0.5, 0.5, 0.5], [0.5, 0.75, 0.25], [1, 0, 0.5]]
    assert win_rates(CRITERIA)[0].tolist() == expected


@pytest.mark.paper
def test_advantages_of_three_images():
    mean = win_rates(CRITERIA).mean(1)
    assert mean[0].tolist() == pytest.approx([0.6667, 0.4167, 0.4167], abs=1e-4)
    assert normalized(mean)[0].tolist() == pytest.approx([1.1547, -0.5774, -0.5774], abs=1e-4)
    A = group_advantages(OVERALL, CRITERIA, 0.7)[0].tolist()
    assert A == pytest.approx([1.1083, -0.4041, -0.7041], abs=1e-4)
    coupled = spread_out([0.7 * a + 0.3 * b for a, b in zip(mean[0].tolist(), (1, 0.5, 0))])
    assert coupled == pytest.approx([1.0982, -0.2402, -0.8580], abs=1e-4) != A


@pytest.mark.paper
def test_the_mean_win_rate_of_a_group_is_one_half_whoever_judges():
    draw = torch.rand(6, 4, 5, 5, generator=rng(), dtype=torch.float64)
    found = (draw + 1 - draw.transpose(2, 3)) / 2  # v_ij + v_ji = 1
    assert torch.allclose(win_rates(found).sum(-1), tensor(2.5))


def test_a_group_of_ties_has_no_advantage():
    ties = torch.full((2, 4, 3, 3), 0.5, dtype=torch.float64)
    A = group_advantages(ties[:, -1], ties[:, :-1], 0.7)
    assert A.shape == (2, 3) and (A == 0).all()


@pytest.mark.paper
def test_alpha_chooses_between_the_criteria_and_the_verdict():
    only = group_advantages(OVERALL, CRITERIA, 0.0)
    torch.testing.assert_close(only, normalized(win_rates(OVERALL)))
    ignored = group_advantages(1 - OVERALL, CRITERIA, 1.0)
    assert torch.equal(ignored, group_advantages(OVERALL, CRITERIA, 1.0))


# ---- the loss of the generator


def steps(change, A, epsilon=1e-3):
    """Loss, d loss / d logps and metrics of one group whose log p changed by `change`."""
    ref = torch.zeros(1, len(A), 1, dtype=torch.float64)
    logps = tensor(change)[None, :, None].requires_grad_()
    batch = everything_scored(logps)
    batch.scores = tensor(A)[None]
    losses, metrics = loss(logps, ref, batch, Config(epsilon=epsilon))
    (grad,) = torch.autograd.grad(losses.sum(), logps)
    return losses.item(), grad.flatten().tolist(), metrics


def test_at_the_old_policy_the_gradient_is_that_of_policy_gradient():
    value, grad, metrics = steps([0.0, 0, 0], [1.0, -2.0, 0.5])
    assert value == pytest.approx(0.5 / 3) and metrics["clipped"] == 0
    assert grad == pytest.approx([-1 / 3, 2 / 3, -0.5 / 3])


def test_a_step_that_went_far_enough_has_no_gradient():
    e = 0.1
    value, grad, metrics = steps([0.2, -0.2, -0.2, 0.2], [1.0, 1.0, -1.0, -1.0], e)
    rho = [math.exp(x) for x in (0.2, -0.2, -0.2, 0.2)]
    assert value == pytest.approx((-(1 + e) - rho[1] + (1 - e) + rho[3]) / 4)
    assert grad == pytest.approx([0, -rho[1] / 4, 0, rho[3] / 4])
    assert metrics["clipped"] == 1
    assert steps([0.2, 0.0, -0.01, 0.0], [1.0] * 4, e)[2]["clipped"] == 0.25


def test_advantages_are_clipped_at_five():
    assert steps([0.0, 0.0], [9.0, -7.0])[1] == pytest.approx([-2.5, 2.5])
    assert steps([0.0, 0.0], [4.9, -4.9])[1] == pytest.approx([-2.45, 2.45])


def test_gradients_on_ragged_groups():
    logps, ref_logps, batch = item = near(ragged(k=4, seed=1, fewest=3, scores=reals), 0.01)
    cfg = Config(epsilon=0.01)
    losses, _ = loss(*item, cfg)
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, cfg)[0], (logps,))
    rho = (logps - ref_logps).sum(-1).exp().detach()
    for b in range(len(losses)):
        n = int(batch.mask[b].any(-1).sum())
        each = [
            max(-a * r, -a * min(max(r, 0.99), 1.01))
            for a, r in zip(batch.scores[b, :n].tolist(), rho[b, :n].tolist())
        ]
        assert losses[b].item() == pytest.approx(sum(each) / n)


# ---- the judge


@pytest.mark.paper
def test_the_loss_of_a_pair_of_traces():
    logs = [[math.log(0.6), math.log(0.8)], [math.log(0.4), math.log(0.3)]]
    refs = [[math.log(0.5), math.log(0.8)], [math.log(0.5), math.log(0.4)]]
    logps, ref = tensor([logs]), tensor([refs])
    losses, _ = trace_loss(logps, ref, everything_scored(logps), Config(judge_beta=0.1))
    assert losses.item() == pytest.approx(0.659090, abs=1e-6)
    h = 0.1 * ((logps - ref).sum(-1) @ tensor([1.0, -1.0])).item()
    assert h == pytest.approx(0.069315, abs=1e-6)
    assert trace_loss(*margins([0.0]), Config())[0].item() == pytest.approx(math.log(2))


ITEM = dict(leader=0, winners=[0, 1, 1], overall=1)
BEST, GOOD, POOR = (0, [0, 1, 1], 1), (0, [0, 1, 0], 1), (1, [1, 0, 0], 1)
WRONG = (0, [0, 1, 1], 0)


@pytest.mark.parametrize(
    ("traces", "both", "alone"),
    [
        ((BEST, WRONG), 0, 0),
        ((WRONG, POOR), 1, 1),  # a right verdict for wrong reasons beats a wrong one
        ((GOOD, BEST), 1, None),
        ((BEST, POOR), 0, None),
        ((GOOD, GOOD), None, None),
        ((WRONG, WRONG), None, None),  # both wrong: dropped
        ((WRONG, None), None, None),
        ((None, POOR), 1, 1),
    ],
)
def test_which_of_two_traces_is_better(traces, both, alone):
    assert better_trace(traces, ITEM, True) == both
    assert better_trace(traces, ITEM, False) == alone


def test_reasons_count_the_leading_criterion_and_the_winners():
    assert [reasons(trace, ITEM) for trace in (BEST, GOOD, POOR)] == [4, 3, 0]


def on_verdicts(**settings):
    """A Lab on verdicts with an untrained judge."""
    how = dict(base_steps=0, prompts=12, steps=2, batch_size=4, warmup=1)
    return Lab(Settings(**how | settings), quiet=True, world=verdicts.World())


class Writer:
    """A judge that writes given traces."""

    def __init__(self, world, traces):
        self.parameters = list
        self.ids, self.eot = [world.tokenizer.encode(t) for t in traces], world.tokenizer.eot

    def sample(self, prompts, k, rng, max_tokens=6, temperature=1.0, capture=None):
        every = [[*ids, self.eot] for ids in self.ids]
        return [[every[(k * i + j) % len(every)] for j in range(k)] for i in range(len(prompts))]


def test_pairs_of_traces_have_the_better_one_first():
    lab = on_verdicts()
    world = lab.world
    items = world.items(12, lab.rng("items"))
    good = [world.trace(i["leader"], i["winners"], i["overall"]) for i in items]
    bad = [world.trace(i["leader"], i["winners"], 1 - i["overall"]) for i in items]
    both = [text for two in zip(bad, good) for text in two]
    rows = trace_pairs(lab, Writer(world, both), Config())
    assert [row["prompt"] for row in rows] == [item["prompt"] for item in items]
    texts = [[world.text(ids) for ids in row["responses"]] for row in rows]
    assert texts == [list(two) for two in zip(good, bad)]
    assert all(row["scores"] == [1, 0] and row["ends"] == [True, True] for row in rows)
    assert trace_pairs(lab, Writer(world, [bad[0]] * 2), Config()) == []


def test_verdicts_are_read_from_traces_and_a_broken_one_is_a_tie():
    lab = on_verdicts()
    judge = Writer(lab.world, [" A! A1 B2 C2 W2", " A! A1 B2 C2"])
    assert judged(lab, judge, ["exact"] * 2).tolist() == [[0, 1, 1, 1], [0.5] * 4]


def test_yardsticks_judge_by_the_digits():
    lab, asked = on_verdicts(), ["exact a3 b7 c5 | x6 y2 z5 ="]
    assert judged(lab, [[1.0] * 3], asked).tolist() == [[1, 0, 0.5, 0]]
    assert judged(lab, [None], asked).tolist() == [[1, 0, 0.5, 1]]


def test_every_pair_of_a_group_is_judged_once():
    lab = on_verdicts()
    scores = torch.zeros(2, 3, 3)
    scores[0, :, 0] = torch.tensor([0.0, 40.0, -40.0])  # the first request is for A
    scores[1, :, 0] = torch.tensor([40.0, 0.0, -40.0])
    found = wins(lab, [None], torch.tensor([0, 1]), scores, rng())
    assert found.shape == (2, 4, 3, 3)
    assert torch.equal(found + found.transpose(2, 3), torch.ones_like(found))
    assert win_rates(found)[:, 0].tolist() == [[0.5, 1, 0], [1, 0.5, 0]]
    assert win_rates(found)[0, 3].tolist() == [0.5, 1, 0]


def test_a_judge_loses_what_the_true_weights_get_from_the_same_digits():
    lab = Lab(Settings(world="glyphs", base_steps=0), quiet=True)
    there, _ = judge_of(lab, Config(critic="known"))
    # two prompts of the first kind, which asks for A, and one alone that is not compared
    prompts, scores = [0, 3, 0, 3, 1], torch.zeros(5, 3)
    scores[:, 0] = torch.tensor([-2.0, 2.0, 2.0, -2.0, 0.0])
    for judge, expected in (([None], 0), ([[-1.0, 0.0, 0.0]], 1), ([[0.0, 0.0, 0.0]], 0.5)):
        assert lost(lab, there, judge, prompts, scores, rng()) == expected
    assert lost(lab, there, [None], [0, 1, 2], scores[:3], rng()) == 0  # no pair


# ---- the whole


NAMES = ("utility", "worst_context", "judge_wins", "true_wins", "judge_right", "own_lost")


def tiny(**settings):
    how = dict(world="scenes", base_steps=0, prompts=2, batch_size=4, steps=4, warmup=1)
    return Lab(Settings(**how | dict(eval_size=4, eval_every=4) | settings), quiet=True)


@pytest.mark.slow
@pytest.mark.parametrize("judge", ["flex", "fixed"])
def test_a_run_reports_the_truth_beside_the_judge(judge, monkeypatch):
    monkeypatch.setattr(verdicts.World, "pretrain", dict(steps=2, batch_size=4, lr=1e-3))
    monkeypatch.setattr(verdicts.World, "align", dict(prompts=40, steps=1, lr=1e-5, batch_size=4))
    lab, rows = tiny(), []
    lab.world.look = lambda policy, lab: {}
    align = lab.align
    texts = [" A! A1 B1 C1 W1", " A! A1 B1 C1 W2"]

    def two_traces(lab, judge, cfg):
        row = dict(prompt=lab.world.prompts(1, rng())[0], scores=[1.0, 0.0])
        return [row | dict(responses=[lab.world.tokenizer.encode(text) for text in texts])] * 8

    monkeypatch.setattr(urflex, "trace_pairs", two_traces)

    def spy(policy, data, *about, **how):
        rows.extend(data(policy, 0))
        return align(policy, data, *about, **how)

    lab.align = spy
    short = dict(judge_steps=1) if judge == "flex" else {}
    policy = run(lab, Config(critic=judge, group=2, sampler_steps=3, **short))
    last = policy.curve[-1]
    assert {"reward", *NAMES} <= set(last)
    assert last["reward"] == lab.evaluate(policy)["reward"] != last["utility"]  # two truths here
    assert {"kl", "win_rate"} <= set(last) and last["step"] == 4
    assert len(rows) == 2 * 2 and [row["step"] for row in rows] == [0, 1, 0, 1]
    # the stored states are consecutive, and the images are the last ones
    assert torch.equal(rows[0]["after"], rows[1]["x"]) and rows[0]["x"].shape == (2, 3, 16, 16)
    A = tensor([row["scores"] for row in rows])
    assert torch.allclose(A.sum(1), tensor(0.0), atol=1e-9)


def test_every_image_of_a_group_counts_as_a_sample(monkeypatch):
    monkeypatch.setattr(urflex, "against_base", lambda *about: dict.fromkeys(NAMES, 0.0))
    lab, said = tiny(), []
    lab.world.look = lambda policy, lab: {}
    lab.say = said.append
    run(lab, Config(critic="known", group=2, sampler_steps=3))  # a round: 4 rows, one step
    assert lab.samples == 4 * 2 * 2
    assert said == ["share of wins over the base model: judge 0.000, annotators 0.000"]


@pytest.mark.parametrize(
    "unread",
    [dict(judge_steps=100), dict(judge_lr=1e-4), dict(judge_beta=1.0), dict(both_right=False)]
    + [{name: value} for name, value in STAGE_2.items()],  # a default value does nothing either
)
def test_options_of_stage_2_are_refused_where_the_judge_has_none(unread):
    assert Config(**unread).critic == "flex"
    for critic in ("sft", "fixed", "known"):
        with pytest.raises(UserError, match=f"{next(iter(unread))} .* does nothing with critic = "):
            Config(critic=critic, **unread)


def test_the_judge_learns_the_tastes_of_this_world_s_annotators():
    lab = tiny()
    lab.world.annotators = ((0.0, 1.0, 0.0),) * 3
    there, judge = judge_of(lab, Config(critic="known"))
    assert judge == [None] and there.world.tastes.tolist() == [[0, 1, 0]] * 3
    assert there.steps == 200 and there.prompts == 4000 and there.settings.guidance == 1


@pytest.mark.slow
def test_a_world_without_criteria_is_refused():
    from lab.flags import refuse_method

    with pytest.raises(UserError, match="urflex needs a world with criteria, but gaussians"):
        refuse_method("urflex", urflex.PAPER, Lab(Settings(world="gaussians")).world, Settings())


def test_the_page_of_the_claim_has_both_yardsticks_and_the_ends_of_the_generators():
    names = ("overall", "reasons", "leader", "valid", "greedy", "fixed_rubric", "known_weights")
    seen = [dict(zip(names, [x, *[0.5] * 3, 0.8, 0.7, 0.9 + x])) for x in (0.0, 0.04)]
    ends = dict.fromkeys((*NAMES, "frechet_256"), 2.0)
    curves = [[dict(ends, step=step, utility=step / 10) for step in (0, n)] for n in (10, 30)]
    series = {f"generator {name}": curves for name in claims.GENERATORS}
    pages = claims.report(None, series | {"judge sft": seen, "judge flex": seen})
    rows = [line.split() for line in pages["judges.txt"].splitlines()[1:]]
    assert ["known_weights", "-", "-", "-", "-", "0.920"] in rows
    assert ["judge", "flex", "0.020", "0.500", "0.500", "0.500", "0.800"] in rows
    words = pages["generators after GRPO.txt"].splitlines()[1].split()
    assert words[:4] == ["generator", "flex", "2.000", "2.000"]
    assert len(pages["truth and judge.png"].axes) == 4


# ---- mutation cases


def near(item, scale):
    """The same item with log-probs near those of the reference."""
    logps, ref_logps, batch = item
    return (ref_logps + scale * logps.detach()).requires_grad_(), ref_logps, batch


def groups():
    """Groups with advantages, near and far from the old policy, some with absent images."""
    full = ragged(k=4, scores=reals)
    large = changed(full, scores=4 * full[2].scores)
    short = ragged(k=5, seed=1, fewest=3, scores=reals)
    half = ragged(k=3, seed=2, scores=reals, dtype=torch.bfloat16)
    far = ragged(k=2, seed=3, scale=100, scores=reals, dtype=torch.float32)
    still = (full[1].clone().requires_grad_(), *full[1:])
    close = [near(item, scale) for item in (full, large, short) for scale in (1e-4, 1e-2)]
    empty = short[2].mask & (torch.arange(5) > 0)[:, None, None]
    nobody = changed(short, mask=empty, scores=short[2].scores * empty.any(-1))
    lone = near(ragged(k=3, seed=6, fewest=1, scores=reals), 1e-2)
    return [lone, full, large, short, half, far, still, *close, nobody, elsewhere(full)]


CASES = [dict(epsilon=0.01), dict(epsilon=0.3)]
INPUTS = groups
SURVIVORS = {}
