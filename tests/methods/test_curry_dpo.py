"""Curry-DPO against its paper: pairs and rounds, where a round starts, tables in closed form."""

import json
import math
from types import SimpleNamespace

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods import dpo
from methods.curry_dpo import Config, curriculum, loss, run, star
from tests import builders
from toy import bandit
from toy.exact import population

ROWS = [
    dict(
        prompt=i,
        responses=[[4], [0], [2], [7]],
        scores=[3.0, 2.0, 5.0, 4.0],
        reward=[0.3, 0.2, 0.5, 0.4],
    )
    for i in range(3)
]


def small(**changes):
    """A Lab with a small run on the bandit."""
    settings = dict(world="bandit", steps=30, prompts=256, batch_size=64, k=4)
    return Lab(Settings(**settings | changes), quiet=True)


# ---- the loss


@pytest.mark.paper
def test_the_loss_has_the_value_of_the_worked_pair():
    item = builders.one_pair(-12.0, -15.0, -13.0, -14.0)
    losses, gradient = builders.value_and_gradient(loss, *item, Config())
    slope = 0.1 / (1 + math.exp(0.2))
    assert losses.item() == pytest.approx(0.598139, abs=1e-6)
    assert gradient.flatten().tolist() == pytest.approx([-slope, slope], abs=1e-8)
    assert loss(*item, Config())[1]["weight"].item() == pytest.approx(10 * slope, abs=1e-6)


@pytest.mark.parametrize("beta", [0.1, 0.7, 3.0])
def test_the_loss_is_dpo_in_value_and_gradient(beta):
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *item, Config(beta))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(beta))
    assert torch.equal(ours[0], plain[0])
    assert torch.equal(ours[1], plain[1])
    logps, ref_logps, batch = item
    assert torch.autograd.gradcheck(lambda x: loss(x, ref_logps, batch, Config(beta))[0], logps)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("margin", [1e4, -1e4])
def test_huge_margins_stay_finite(dtype, margin):
    item = builders.one_pair(margin, 0.0, dtype=dtype)
    losses, gradient = builders.value_and_gradient(loss, *item, Config())
    assert losses.isfinite().all()
    assert losses.dtype == torch.promote_types(dtype, torch.float32)
    assert gradient.isfinite().all()


@pytest.mark.paper
def test_where_a_round_starts_the_loss_is_ln_2_and_the_gradient_half_beta():
    logps, _, batch = builders.ragged()
    item = (logps, logps.detach(), batch)
    losses, gradient = builders.value_and_gradient(loss, *item, Config(0.4))
    torch.testing.assert_close(losses, torch.full_like(losses, math.log(2)), rtol=0, atol=1e-12)
    expected = torch.tensor([-0.2, 0.2], dtype=torch.float64)[:, None].expand_as(gradient)
    torch.testing.assert_close(gradient, expected)


# ---- pairs and rounds


@pytest.mark.paper
def test_the_star_of_a_row_easy_first():
    found = star(ROWS[0])
    assert [(rank, pair["responses"], pair["reward"]) for rank, pair in found] == [
        (3, [[2], [0]], [0.5, 0.2]),
        (2, [[2], [4]], [0.5, 0.3]),
        (1, [[2], [7]], [0.5, 0.4]),
    ]
    assert all(pair["scores"] == [1.0, 0.0] and pair["prompt"] == 0 for _, pair in found)
    kept = star(ROWS[0] | {"ends": [True, False, True, False]})
    assert [pair["ends"] for _, pair in kept] == [[True, False], [True, True], [True, False]]
    asked = star(ROWS[0] | {"context": ["a", "b", "c", "d"]})
    assert [pair["context"] for _, pair in asked] == [["c", "b"], ["c", "a"], ["c", "d"]]


def test_ties_and_equal_responses_are_left_out():
    assert [rank for rank, _ in star(ROWS[0] | {"scores": [3.0, 2.0, 5.0, 5.0]})] == [3, 2]
    assert [rank for rank, _ in star(ROWS[0] | {"responses": [[4], [2], [2], [7]]})] == [2, 1]
    images = star(
        dict(prompt=1, responses=torch.arange(8.0).view(4, 1, 1, 2), scores=[0.0, 1e4, -1e4, 2.0])
    )
    assert [rank for rank, _ in images] == [3, 2, 1] and images[0][1][
        "responses"
    ].flatten().tolist() == [2.0, 3.0, 4.0, 5.0]
    with pytest.raises(UserError, match="fewer than 2 distinct ratings"):
        star(ROWS[0] | {"scores": [1.0] * 4})


def test_rounds_go_from_easy_to_hard():
    easy, medium, hard = [
        [p["responses"][1] for p in pairs] for pairs in curriculum(ROWS, Config())
    ]
    assert (easy, medium, hard) == ([[0]] * 3, [[4]] * 3, [[7]] * 3)
    assert curriculum(ROWS, Config(order="hard_easy")) == curriculum(ROWS, Config())[::-1]
    pooled = curriculum(ROWS, Config(order="pooled", rounds=2))
    assert len(pooled) == 2 and pooled[0] == pooled[1] and len(pooled[0]) == 9
    single = curriculum(ROWS, Config(order="pooled", pairs="single", rounds=1))
    assert single == [curriculum(ROWS, Config())[0]]
    sixteen = [
        dict(prompt=0, responses=[[i] for i in range(16)], scores=[float(i) for i in range(16)])
    ]
    assert len(curriculum(sixteen, Config(rounds=15))) == 15
    two = [dict(prompt=0, responses=[[0], [1]], scores=[0.0, 1.0])]
    assert curriculum(two, Config(rounds=1)) == [
        [dict(prompt=0, responses=[[1], [0]], scores=[1.0, 0.0])]
    ]


def test_rows_that_make_no_curriculum_are_refused():
    with pytest.raises(UserError, match="4 responses make 3 difficulties"):
        curriculum(ROWS, Config(rounds=2))
    tied = [row | {"scores": [3.0, 2.0, 5.0, 5.0]} for row in ROWS]
    with pytest.raises(UserError, match="a round has no pairs"):
        curriculum(tied, Config())
    assert len(curriculum(ROWS + [ROWS[0] | {"scores": [1.0] * 4}], Config())[0]) == 3
    for cfg in (Config(order="pooled"), Config()):
        with pytest.raises(UserError, match="a round has no pairs"):
            curriculum([], cfg)


def test_responses_that_continue_each_other_are_not_pairs():
    assert len(star(ROWS[0] | {"parents": [-1] * 4})) == 3
    with pytest.raises(UserError, match="continue each other"):
        star(ROWS[0] | {"parents": [-1, 0, 0, 0]})


def test_a_file_of_pairs_has_one_round_and_contexts_count(tmp_path):
    ends = []
    for n, rows in enumerate(
        (
            [
                dict(prompt=f"q{i} is", responses=[" good", " bad"], scores=[1, 0])
                for i in range(20)
            ],
            [
                dict(
                    prompt=f"q{i} is",
                    responses=[" good", " bad"],
                    scores=[1, 0],
                    context=[" x", " y z"],
                )
                for i in range(20)
            ],
        )
    ):
        (tmp_path / f"{n}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        settings = Settings(
            data=str(tmp_path / f"{n}.jsonl"),
            base_steps=0,
            batch_size=4,
            steps=3,
            context=64,
            eval_size=2,
        )
        with pytest.raises(
            UserError, match="2 responses make 1 difficulty: --rounds 1, or order = pooled"
        ):
            run(Lab(settings, quiet=True), Config())
        ends.append(
            torch.cat(
                [
                    p.detach().flatten()
                    for p in run(Lab(settings, quiet=True), Config(rounds=1)).parameters()
                ]
            )
        )
    assert not torch.equal(*ends)


@pytest.mark.parametrize("steps", [1, 2])
def test_a_round_without_a_step_is_refused(steps):
    with pytest.raises(UserError, match=f"--steps {steps} .* rounds = 3"):
        run(small(steps=steps), Config())
    assert torch.equal(run(small(steps=0), Config()).logits, small().base().logits)
    run(small(steps=3), Config())


@pytest.mark.parametrize(
    "fields, word",
    [(dict(beta=v), "beta = ") for v in (0.0, -0.1, math.inf, math.nan)]
    + [({name: "other"}, f"{name} = ") for name in ("reference", "order", "pairs")]
    + [(dict(rounds=0), "rounds = "), (dict(pairs="single"), "order = ")],
)
def test_fields_out_of_range_are_refused(fields, word):
    with pytest.raises(UserError, match=word):
        Config(**fields)


def test_rows_that_are_not_pairs_are_refused():
    logps, ref_logps, batch = builders.ragged()
    with pytest.raises(UserError, match="pairs"):
        loss(logps[:, :1], ref_logps[:, :1], batch, Config())
    batch.mask[0, 1] = False
    with pytest.raises(UserError, match="no scored token"):
        loss(logps, ref_logps, batch, Config())


# ---- rounds in a table


REWARDS = 0.7 * torch.tensor([3.0, 2.0, 1.0, 0.0], dtype=torch.float64)
START = torch.tensor([0.1, -0.2, 0.3, -0.2], dtype=torch.float64)
FIRST, THIRD = [0.788602, 0.144065, 0.058572, 0.008761], [0.988742, 0.010984, 0.000272, 0.0000025]


def rounds_of_a_table(rounds, beta=0.5):
    """Probabilities (4,) after exact rounds on all pairs of four responses, moving reference."""
    log_p = START
    for _ in range(rounds):
        world = bandit.World(4, 1, rewards=REWARDS, reference=log_p)
        log_p = population(world, world.pairs_all(), loss, Config(beta)).log_probs().detach()[0]
    return log_p.exp().tolist()


@pytest.mark.paper
def test_an_exact_round_adds_the_reward_over_beta_to_the_logits():
    assert ((REWARDS - REWARDS.mean()) / 0.5).tolist() == pytest.approx([2.1, 0.7, -0.7, -2.1])
    assert (START + REWARDS / 0.5).softmax(0).tolist() == pytest.approx(FIRST, abs=1e-6)
    assert (START + 3 * REWARDS / 0.5).softmax(0).tolist() == pytest.approx(THIRD, abs=1e-6)
    assert rounds_of_a_table(1) == pytest.approx(FIRST, abs=1e-5)
    assert rounds_of_a_table(3) == pytest.approx(THIRD, abs=1e-5)


@pytest.mark.paper
def test_three_exact_rounds_with_a_moving_reference_are_one_with_a_third_of_beta():
    once = rounds_of_a_table(1, beta=0.5 / 3)
    assert once == pytest.approx(THIRD, abs=1e-5)
    assert once == pytest.approx(rounds_of_a_table(3), abs=1e-6)


@pytest.mark.paper
def test_star_rounds_in_a_table_are_additive_and_their_order_does_not_matter():
    r, beta = [2.1, 1.4, 0.7, 0.0], 0.5

    def shifts(losers):
        """The logits after each round's optimum: a pair ends at a margin of (r_1 - r_j) / beta."""
        logits, out = torch.zeros(4, dtype=torch.float64), []
        for j in losers:
            ref = logits.clone()
            low, high = -20.0, 20.0
            for _ in range(60):
                d = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
                policy = ref.index_add(0, torch.tensor([0, j]), torch.stack([d, -d]))
                pair, rho = (torch.stack([x[[0, j]], x[[j, 0]]])[..., None] for x in (policy, ref))
                losses, _ = loss(
                    pair,
                    rho,
                    SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool)),
                    Config(beta),
                )
                p = torch.sigmoid(torch.tensor(r[0] - r[j]))
                (slope,) = torch.autograd.grad(p * losses[0] + (1 - p) * losses[1], d)
                low, high = (low, d.item()) if slope > 0 else (d.item(), high)
            logits = policy.detach()
            out.append([round(x, 4) + 0.0 for x in logits.tolist()])
        return out

    assert shifts([3, 2, 1]) == [[2.1, 0, 0, -2.1], [3.5, 0, -1.4, -2.1], [4.2, -0.7, -1.4, -2.1]]
    assert shifts([1, 2, 3])[-1] == [4.2, -0.7, -1.4, -2.1]


@pytest.mark.paper
def test_one_round_of_single_pairs_is_dpo_bit_for_bit():
    lab = small()
    ours = run(lab, Config(order="pooled", pairs="single", rounds=1))
    other = small()
    pairs = curriculum(
        other.preferences(other.base()), Config(order="pooled", pairs="single", rounds=1)
    )[0]
    plain = other.align(other.base(), other.rows(pairs), dpo.loss, dpo.Config(0.1))
    assert torch.equal(ours.logits, plain.logits)


@pytest.mark.paper
def test_every_round_starts_at_ln_2_and_only_the_first_one_does_with_a_fixed_reference(tmp_path):
    for reference, wanted in (("previous", [True, True, True]), ("sft", [True, False, False])):
        lab = small()
        lab.out = str(tmp_path / reference)
        curve = run(lab, Config(1.0, reference=reference)).curve
        lines = [
            json.loads(line)
            for line in (tmp_path / reference / "metrics.jsonl").read_text().splitlines()
        ]
        lines = [line for line in lines if "loss" in line]  # without the looks at the policy
        starts = [line["loss"] for line in lines if line["step"] == 1]
        assert len(lines) == 30 and [abs(x - math.log(2)) < 1e-6 for x in starts] == wanted
        steps = [look["step"] for look in curve]
        assert steps == sorted(set(steps)) and steps[-1] == 30


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        dict(beta=1.0),
        dict(reference="sft"),
        dict(order="hard_easy"),
        dict(order="pooled"),
        dict(order="pooled", rounds=2),
    ]
    + [dict(order="pooled", pairs="single")],
)
def test_every_field_changes_the_run(change):
    base = {"order": "pooled"} if len(change) == 2 else {}
    assert not torch.equal(
        run(small(), Config(**base)).logits, run(small(), Config(**change)).logits
    )


def test_a_run_improves_the_reward():
    lab = small(steps=90)
    policy = run(lab, Config())
    assert policy.expect(lab.world.rewards()) > lab.reference.expect(lab.world.rewards()) + 0.5


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7)]
INPUTS = builders.pairs
SURVIVORS = {}
