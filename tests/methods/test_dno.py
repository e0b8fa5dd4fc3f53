"""DNO against its paper: the loss, pools and pairs, and the cyclic game in closed form."""

import json
import math

import pytest
import torch

import methods.dno
import train
from data import UserError, collate
from lab import Lab, Settings
from methods import dpo
from methods.dno import Config, chances, loss, pairs_of, ranks, replayed, rollout, run
from tests import builders
from tests.lab.commands import Killed, killed_at
from toy.exact import population
from toy.game import CYCLE, World

GAME = torch.tensor(CYCLE, dtype=torch.float64)
POLICY = torch.tensor([0.5, 0.3, 0.2], dtype=torch.float64)


def with_columns(item, z, teacher=None):
    """An item with the columns that the loss reads; z: a number or (B,)."""
    rows = len(item[0])
    z = torch.as_tensor(z, dtype=torch.float64).expand(rows).clone()
    teacher = torch.zeros(rows, 2) if teacher is None else teacher
    return builders.changed(item, preference=z, teacher=teacher)


def small(out=None, **changes):
    """A Lab with a small run on the game."""
    settings = dict(world="game", steps=30, prompts=240, batch_size=32, k=4)
    return Lab(Settings(**settings | changes), out, quiet=True)


# ---- the loss


@pytest.mark.paper
def test_the_loss_has_the_values_of_the_worked_pair():
    item = builders.one_pair(-2.0, -1.5, -2.3, -1.1)
    for z, value, slope in ((0.6, 0.686760, -0.00825071), (1.0, 0.658760, None)):
        losses, gradient = builders.value_and_gradient(loss, *with_columns(item, z), Config())
        assert losses.item() == pytest.approx(value, abs=1e-6)
        if slope:
            assert gradient.flatten().tolist() == pytest.approx([slope, -slope], abs=1e-8)


@pytest.mark.paper
def test_with_a_preference_of_one_the_loss_is_dpo_with_the_reference_of_the_round():
    item = with_columns(builders.ragged(), 1.0)
    ours = builders.value_and_gradient(loss, *item, Config(eta=0.3))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


@pytest.mark.paper
def test_at_the_policy_of_the_round_the_loss_is_ln_2_whatever_the_preference():
    logps, _, batch = builders.ragged()
    z = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0])
    losses, _ = loss(*with_columns((logps, logps.detach(), batch), z), Config())
    assert losses.tolist() == pytest.approx([math.log(2)] * 5)


@pytest.mark.paper
def test_the_gradient_is_eta_times_the_error_of_the_preference():
    z = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0], dtype=torch.float64)
    logps, ref_logps, batch = item = with_columns(builders.ragged(), z)
    _, gradient = builders.value_and_gradient(loss, *item, Config(eta=0.3))
    first, second = (logps - ref_logps).sum(-1).unbind(1)
    slope = 0.3 * (torch.sigmoid(0.3 * (first - second)) - z)
    expected = torch.stack([slope, -slope], 1)[..., None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected.detach())
    _, metrics = loss(*item, Config(eta=0.3))
    assert metrics["weight"].item() == pytest.approx(-(slope / 0.3).mean().item())


@pytest.mark.paper
def test_exchanged_responses_with_the_opposite_preference_have_the_same_loss():
    z = torch.tensor([0.1, 0.4, 0.5, 0.9, 1.0], dtype=torch.float64)
    item = builders.ragged()
    losses, _ = loss(*with_columns(item, z), Config(eta=0.7))
    others, _ = loss(*with_columns(builders.swapped(item), 1 - z), Config(eta=0.7))
    torch.testing.assert_close(losses, others)


def test_a_metric_is_the_share_of_pairs_whose_rejected_response_is_the_teachers():
    teacher = torch.tensor([[1.0, 0.0], [0.0, 1.0], [0.0, 0.0], [0.0, 1.0], [1.0, 0.0]])
    _, metrics = loss(*with_columns(builders.ragged(), 1.0, teacher), Config())
    assert metrics["overtaken"].item() == pytest.approx(0.4)


# ---- one round on the exact game


def exact_round(policy, eta, weight=None, target=None):
    """The minimum of eq. 8 over all pairs: probabilities (R,).

    policy (R,): pi_t. weight (R,): the distribution of both responses. target: whose win rates are
    r_t; by default those over pi_t."""
    world = World(GAME, policy.log())
    r = GAME @ (policy if target is None else target)
    weight = policy if weight is None else weight
    pairs = [
        dict(
            prompt=0,
            responses=[[i], [j]],
            preference=torch.sigmoid(r[i] - r[j]).item(),
            teacher=[0.0, 0.0],
            weight=(weight[i] * weight[j]).item(),
        )
        for i in range(3)
        for j in range(3)
        if i < j
    ]
    return population(world, pairs, loss, Config("dno", eta)).probs().detach()[0]


@pytest.mark.paper
def test_an_exact_round_ends_at_the_soft_policy_iteration_from_any_pairs():
    r = GAME @ POLICY
    assert r.tolist() == pytest.approx([0.56, 0.34, 0.59])
    expected = [0.552133, 0.213356, 0.234510]
    assert (POLICY * (r / 0.5).exp()).div((POLICY * (r / 0.5).exp()).sum()).tolist() == (
        pytest.approx(expected, abs=1e-6)
    )
    for weight in (None, torch.tensor([0.2, 0.2, 0.6])):
        found = exact_round(POLICY, 0.5, weight)
        assert found.tolist() == pytest.approx(expected, abs=1e-6)
    kl = (found * (found / POLICY).log()).sum()
    won = found @ GAME @ POLICY
    assert [kl.item(), won.item()] == pytest.approx([0.0193754, 0.520097], abs=1e-5)
    assert won > 0.5 + 0.5 * kl


@pytest.mark.paper
def test_the_minimum_of_the_loss_is_the_entropy_of_the_preference():
    z = torch.sigmoid(torch.tensor(0.22, dtype=torch.float64)).item()
    assert z == pytest.approx(0.554779, abs=1e-6)
    item = with_columns(builders.one_pair(0.22, 0.0), z)
    assert loss(*item, Config("dno", 1.0))[0].item() == pytest.approx(0.687134, abs=1e-6)


@pytest.mark.paper
def test_equal_win_rates_leave_the_policy_where_it_is():
    nash = torch.tensor([2 / 9, 1 / 3, 4 / 9], dtype=torch.float64)
    assert exact_round(nash, 0.5).tolist() == pytest.approx(nash.tolist(), abs=1e-6)


@pytest.mark.paper
def test_the_monotone_bound_holds_in_random_games():
    rng = torch.Generator().manual_seed(0)
    for _ in range(500):
        half = torch.rand(6, 6, generator=rng, dtype=torch.float64).triu(1)
        P = half + (1 - half).mT.tril(-1) + 0.5 * torch.eye(6)
        p = torch.rand(6, generator=rng, dtype=torch.float64).softmax(0)
        q = (p.log() + P @ p / 0.3).softmax(0)
        assert q @ P @ p >= 0.5 + 0.3 * (q * (q / p).log()).sum() - 1e-12


def exploitability(p):
    return (GAME @ p).max().item() - 0.5


@pytest.mark.paper
def test_the_average_policy_converges_and_the_last_one_cycles_outward():
    """The update of the exact round, which is in closed form; two rounds are the loss itself."""
    p, total, average, last = torch.ones(3, dtype=torch.float64) / 3, 0, {}, {}
    for t in range(1, 1001):
        total = total + p
        average[t], last[t] = exploitability(total / t), exploitability(p)
        q = (p.log() + GAME @ p).softmax(0)
        if t < 3:
            assert exact_round(p, 1.0).tolist() == pytest.approx(q.tolist(), abs=1e-6)
        p = q
    assert [average[t] for t in (1, 100, 1000)] == pytest.approx([0.0333, 0.0115, 0.0050], abs=2e-4)
    assert [last[t] for t in (2, 100, 1000)] == pytest.approx([0.041, 0.117, 0.299], abs=0.02)


@pytest.mark.paper
def test_the_reward_that_fits_a_cycle_best_leads_to_a_policy_that_is_exploited():
    """Bradley-Terry scores of the game, and what RLHF with a fixed reward makes of them."""
    scores = torch.zeros(3, dtype=torch.float64, requires_grad=True)
    fit = torch.optim.LBFGS([scores], tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure():
        fit.zero_grad()
        value = -(GAME * torch.nn.functional.logsigmoid(scores[:, None] - scores)).sum()
        value.backward()
        return value

    fit.step(closure)
    found = (scores - scores.mean()).detach()
    assert found.tolist() == pytest.approx([0.135, -0.270, 0.135], abs=1e-3)
    ends = [exploitability((found / beta).softmax(0)) for beta in (0.1, 0.5, 1.0)]
    assert ends == pytest.approx([0.147, 0.086, 0.0625], abs=1e-3)


# ---- pools and pairs


def test_each_two_responses_of_a_pool_are_compared_once():
    P = GAME.expand(400, 3, 3)
    wins = ranks(P, 3, torch.Generator().manual_seed(0), Config())
    assert wins.sum(1).tolist() == [3.0] * 400
    assert wins.min() == 0 and wins.max() == 2
    expected = (GAME.sum(1) - 0.5).tolist()
    assert wins.mean(0).tolist() == pytest.approx(expected, abs=0.08)
    sure = torch.tensor([[0.5, 1.0, 1.0], [0.0, 0.5, 1.0], [0.0, 0.0, 0.5]]).expand(4, 3, 3)
    assert ranks(sure, 3, torch.Generator(), Config())[0].tolist() == [2.0, 1.0, 0.0]
    again = ranks(sure.flip(1, 2), 3, torch.Generator(), Config())
    assert again[0].tolist() == [0.0, 1.0, 2.0]


def test_win_rates_are_means_over_the_other_samples_of_the_policy():
    r = ranks(GAME[None], 3, None, Config("dno"))[0]
    assert r.tolist() == pytest.approx([(0.9 + 0.2) / 2, (0.1 + 0.7) / 2, (0.8 + 0.3) / 2])
    r = ranks(GAME[None], 2, None, Config("dno"))[0]  # the third response is the teacher's
    assert r.tolist() == pytest.approx([0.9, 0.1, (0.8 + 0.3) / 2])


def test_chances_are_the_preferences_of_the_annotator():
    lab = small(flip=0.1)
    rows = [dict(prompt=0, responses=[[0], [1], [2]]), dict(prompt=0, responses=[[2], [2], [0]])]
    P = chances(lab, rows)
    torch.testing.assert_close(P[0], 0.1 + 0.8 * GAME)
    torch.testing.assert_close(P + P.mT, torch.ones_like(P))
    assert P[1, 0].tolist() == pytest.approx([0.5, 0.5, 0.1 + 0.8 * 0.8])


ROW = dict(prompt=7, responses=[[1], [2], [2], [3]], ends=[True, False, True, True])


def found(r, **fields):
    pairs = pairs_of(ROW, r, 3, Config(**fields))
    assert all(two["prompt"] == 7 and two["scores"] == [1.0, 0.0] for two in pairs)
    return [tuple(y[0] for y in two["responses"]) for two in pairs]


@pytest.mark.paper
def test_pairs_have_a_large_margin_and_may_be_of_all_three_kinds():
    r = [3.0, 0.0, 1.0, 2.0]
    assert found(r) == [(1, 2), (1, 2), (3, 2)]
    assert found(r, margin=1) == [(1, 2), (1, 2), (1, 3), (3, 2), (3, 2)]  # equal texts are no pair
    assert found(r, margin=3) == [(1, 2)]
    assert found(r, variant="restrictive", margin=1) == [(3, 2), (3, 2)]
    assert found(r, variant="spin") == [(3, 1), (3, 2), (3, 2)]
    assert found([1.0] * 4) == []
    two = pairs_of(ROW, r, 3, Config())
    assert [pair["ends"] for pair in two] == [[True, False], [True, True], [True, False]]
    assert [pair["teacher"] for pair in two] == [[0.0, 0.0], [0.0, 0.0], [1.0, 0.0]]
    assert all(pair["preference"] == 1.0 for pair in two)
    assert pairs_of(ROW, r, 3, Config(margin=1))[2]["teacher"] == [0.0, 1.0]


def test_responses_that_a_verifier_calls_equal_are_not_a_pair():
    """The wins of equally good responses are coin tosses, and some of their margins are large."""
    lab = Lab(Settings(world="trie", prompts=100, k=8), quiet=True)
    rows = rollout(lab, lab.base(), 0, Config(rounds=1))
    assert len(rows) > 100
    assert lab.truth(rows) == [[1.0, 0.0]] * len(rows)
    level = [[False] * 4 for _ in ROW["responses"]]
    level[0][2] = True
    two = pairs_of(ROW, [3.0, 0.0, 1.0, 2.0], 3, Config(), level)
    assert [pair["responses"] for pair in two] == [[[1], [2]], [[3], [2]]]


@pytest.mark.paper
def test_algorithm_1_regresses_every_pair_on_the_difference_of_win_rates():
    pairs = pairs_of(ROW, [0.2, 0.6, 0.6, 0.2], 3, Config("dno"))
    assert [tuple(y[0] for y in two["responses"]) for two in pairs] == [
        (1, 3),
        (2, 1),
        (2, 3),
        (2, 1),
        (2, 3),
    ]
    z = 1 / (1 + math.exp(-0.4))
    assert [two["preference"] for two in pairs] == pytest.approx([0.5, z, z, z, z])


@pytest.mark.paper
def test_older_pairs_are_added_by_halves():
    fresh, older = [0] * 100, [list(range(200)), list(range(200, 210)), list(range(300, 400))]
    rows = replayed(fresh, older, torch.Generator().manual_seed(0), Config())
    counts = [sum(x < 200 for x in rows), sum(200 <= x < 300 for x in rows)]
    assert counts == [30, 10] and len(rows) == 30 + 10 + 7 and len(set(rows)) == 47
    assert replayed(fresh, older, torch.Generator(), Config(replay=0.0)) == []
    assert replayed(fresh, older, torch.Generator(), Config("dno")) == []
    alone = Config(rounds=1)
    assert alone.replay is None and Config(**vars(alone)) == alone


def test_a_round_has_its_own_prompts_and_the_teacher_is_the_last_of_the_pool():
    settings = dict(base_steps=0, prompts=12, k=3, max_response=4, label_temperature=0)
    lab = Lab(Settings(**settings), quiet=True)
    base = lab.base()
    rows = methods.dno.pools(lab, base, 0, Config())
    assert len(rows) == 4 and all(len(row["responses"]) == 4 == len(row["ends"]) for row in rows)
    golds = lab.world.teacher(4, lab.rng("teacher", 0))
    assert [lab.text(row["responses"][3]) for row in rows] == [g["responses"][0] for g in golds]
    assert all(row["ends"][3] for row in rows)
    other = methods.dno.pools(lab, base, 1, Config())
    assert [row["prompt"] for row in rows] != [row["prompt"] for row in other]
    plain = methods.dno.pools(lab, base, 0, Config(gold=False))
    assert all(len(row["responses"]) == 3 for row in plain)
    pairs = rollout(lab, base, 0, Config(variant="spin"))
    assert len(pairs) == 12 and all(two["teacher"] == [1.0, 0.0] for two in pairs)
    assert collate(lab.rows(pairs), lab.world.tokenizer).teacher.tolist() == [[1.0, 0.0]] * 12


# ---- runs


def test_the_pairs_of_the_last_round_are_replayed_first(monkeypatch):
    seen, plain = [], rollout

    def noted(fresh, older, rng, cfg):
        seen.append([rows[0]["round"] for rows in older])
        return []

    def marked(lab, policy, t, cfg):
        return [row | {"round": float(t)} for row in plain(lab, policy, t, cfg)]

    monkeypatch.setattr(methods.dno, "replayed", noted)
    monkeypatch.setattr(methods.dno, "rollout", marked)
    run(small(steps=3), Config(margin=1))
    assert seen == [[], [0.0], [1.0, 0.0]]


@pytest.mark.slow
def test_the_policy_of_a_run_is_less_exploitable_on_average_than_at_its_end():
    settings = dict(steps=120, prompts=600, lr=0.05, batch_size=64, eval_every=120)
    ends = {}
    for output in ("average", "last"):
        lab = small(**settings)
        policy = run(lab, Config("dno", eta=0.5, rounds=12, output=output))
        ends[output] = lab.world.measure(policy, lab)["exploitability"]
        steps = [look["step"] for look in policy.curve]
        assert steps == sorted(set(steps)) and steps[-1] == 120
    assert 3 * ends["average"] < ends["last"]


def test_every_round_begins_at_its_own_reference(tmp_path):
    run(small(str(tmp_path)), Config(eta=3.0))
    lines = [json.loads(x) for x in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    starts = [line["loss"] for line in lines if line.get("step") == 1 and "loss" in line]
    assert starts == pytest.approx([math.log(2)] * 3)


def test_a_round_without_pairs_is_refused():
    world = World(torch.full((3, 3), 0.5))
    lab = Lab(Settings(world="game", steps=3, prompts=3, k=2), quiet=True, world=world)
    lab.world.reference.set_log_probs(torch.tensor([0.0, -99.0, -99.0]))
    with pytest.raises(UserError, match="round 1 gave no pairs"):
        run(lab, Config(margin=1))


def test_a_later_round_without_pairs_ends_the_training_with_its_policy(monkeypatch):
    plain = rollout
    later = lambda lab, policy, t, cfg: [] if t else plain(lab, policy, t, cfg)  # noqa: E731
    monkeypatch.setattr(methods.dno, "rollout", later)
    lab = small()
    policy = run(lab, Config())
    assert lab.stopped.endswith("round 2 gave no pairs")
    assert f"step {policy.curve[-1]['step']}:" in lab.stopped and policy.curve[-1]["step"] > 0


@pytest.mark.parametrize(
    "settings, fields, word",
    [
        (dict(steps=2), {}, "--steps 2"),
        (dict(prompts=2), {}, "--prompts 2"),
        ({}, dict(gold=True), "no teacher"),
        ({}, dict(variant="spin"), "no teacher"),
        ({}, dict(variant="restrictive"), "no teacher"),
        ({}, dict(margin=4), "margin = 4"),
        (dict(world="reviews", prompts=9), dict(variant="dno", output="average"), "only tables"),
        (dict(world="reviews", flip=0.1), dict(variant="spin"), "--flip does nothing"),
        (dict(world="reviews", length_bias=1.0), dict(variant="spin"), "--length_bias does"),
    ],
)
def test_runs_that_cannot_give_pairs_are_refused_before_anything_is_trained(settings, fields, word):
    with pytest.raises(UserError, match=word):
        run(small(**settings), Config(**fields))


def test_the_teacher_makes_the_pool_larger():
    lab = Lab(Settings(steps=3, prompts=9, k=4), quiet=True)
    methods.dno.check_pool(lab, Config(margin=4))
    with pytest.raises(UserError, match="margin = 5"):
        methods.dno.check_pool(lab, Config(margin=5))
    with pytest.raises(UserError, match="margin = 4"):
        methods.dno.check_pool(lab, Config(margin=4, gold=False))


@pytest.mark.parametrize(
    "fields, word",
    [
        (dict(variant="spin", gold=False), "gold = False"),
        (dict(variant="restrictive", gold=False), "gold = False"),
        (dict(variant="dno", margin=2), "margin = 2 does nothing"),
        (dict(variant="spin", margin=2), "margin = 2 does nothing"),
        (dict(output="last"), "output = last does nothing"),
        (dict(rounds=1, replay=0.3), "replay = 0.3 does nothing with rounds = 1"),
    ],
)
def test_fields_that_contradict_each_other_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        Config(**fields)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("call", [4, 14, 25])
def test_a_killed_run_resumes_to_the_same_policy(tmp_path, monkeypatch, call):
    argv = "--method dno --world game --steps 30 --prompts 90 --batch_size 16 --k 3".split()
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    assert train.main([*argv, "--out", "whole"]) == 0
    whole_loss = killed_at(monkeypatch, call, methods.dno)
    with pytest.raises(Killed):
        train.main([*argv, "--out", "cut"])
    monkeypatch.setattr(methods.dno, "loss", whole_loss)
    assert train.main(["--resume", "cut"]) == 0
    for name in ("metrics.jsonl",):
        assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "cut" / name).read_bytes()
    whole, cut = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "cut"))
    assert whole["after"] == cut["after"]


# ---- the mutants of the loss: every one makes a difference on these inputs


def inputs():
    """Pairs with preferences between 0 and 1, and with the teacher on either side."""
    rng = torch.Generator().manual_seed(3)
    out = []
    for item in builders.pairs():
        rows = item[0].shape[0]
        z = torch.rand(rows, generator=rng, dtype=torch.float64)
        teacher = torch.randint(0, 2, (rows, 2), generator=rng).double()
        place = item[0].device
        out.append(builders.changed(item, preference=z.to(place), teacher=teacher.to(place)))
    return out


CASES = [
    dict(eta=0.3),
    dict(variant="dno", eta=1.7, output="average"),
    dict(variant="restrictive", margin=1),
    dict(variant="spin"),
]
INPUTS = inputs
SURVIVORS = {}
