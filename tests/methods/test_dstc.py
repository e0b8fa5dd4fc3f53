"""DSTC: the card's matrices and losses, pairs from own tests, and what a run needs."""

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from methods import dpo, dstc
from methods.dstc import (
    RULES,
    Config,
    distinct,
    executed,
    loss,
    minimax,
    report,
    rollout,
    run,
)
from tests import builders


def matrix(*rows):
    return torch.tensor(rows, dtype=torch.bool)


def picked(rule, r, quality=None, seed=0):
    quality = torch.zeros(len(r)) if quality is None else quality
    return RULES[rule](r, quality, torch.Generator().manual_seed(seed))


WORKED = matrix([1, 1, 1, 0], [1, 1, 0, 0], [1, 0, 0, 1], [0, 1, 0, 0])

# ---- selection


@pytest.mark.paper
def test_the_four_rules_on_the_matrices_of_the_card():
    assert picked("minimax", WORKED) == (0, 2, 3, 0)
    assert picked("minimax", matrix([1, 0], [0, 1])) == (0, 0, 1, 0)
    # only the first program fails the easiest test, so it is chosen and rejected at once
    both = matrix([1, 1, 1, 0], [0, 0, 0, 1], [0, 0, 0, 1], [0, 0, 0, 1])
    assert picked("minimax", both) == (0, 0, 0, 3)


@pytest.mark.paper
@pytest.mark.parametrize("rule", ["minimax", "random", "same_test", "passed", "oracle"])
def test_without_a_difference_there_is_no_pair(rule):
    for value in (True, False):
        assert picked(rule, torch.full((3, 4), value)) is None
    assert picked(rule, matrix([1])) is None


@pytest.mark.paper
def test_the_chosen_text_passes_and_the_rejected_one_fails_and_names_do_not_matter():
    rng = torch.Generator().manual_seed(0)
    seen = 0
    for _ in range(200):
        r = torch.rand(5, 6, generator=rng) < 0.5
        found = minimax(r, None, None)
        if found is None:
            continue
        seen += 1
        a, b, c, d = found
        assert r[a, b] and not r[c, d]
        assert r.sum(1)[a] == r.sum(1).max() and r.sum(0)[d] < 5
        assert r.sum(0)[b] == r.sum(0)[r[a]].min()
        assert r.sum(0)[d] == r.sum(0)[r.sum(0) < 5].max()
        assert r.sum(1)[c] == r.sum(1)[~r[:, d]].min()
        rows, columns = torch.randperm(5, generator=rng), torch.randperm(6, generator=rng)
        e, f, g, h = minimax(r[rows][:, columns], None, None)
        values = [(r.sum(1)[rows[e]], r.sum(0)[columns[f]]), (r.sum(0)[columns[h]],)]
        assert values[1] == (r.sum(0)[d],) and values[0][0] == r.sum(1)[a]
    assert seen > 150


def test_the_other_rules():
    for seed in range(20):
        a, b, c, d = picked("random", WORKED, seed=seed)
        assert WORKED[a, b] and not WORKED[c, d]
        a, b, c, d = picked("same_test", WORKED, seed=seed)
        assert b is None is d and any(WORKED[a, k] and not WORKED[c, k] for k in range(4))
    assert len({picked("random", WORKED, seed=s) for s in range(20)}) > 5
    assert len({picked("same_test", WORKED, seed=s) for s in range(20)}) > 3
    assert picked("passed", WORKED) == (0, None, 3, None)
    quality = torch.tensor([0.2, 0.9, 0.1, 0.9])
    assert picked("oracle", WORKED, quality) == (1, None, 2, None)
    assert picked("oracle", WORKED, torch.ones(4)) is None


@pytest.mark.paper
def test_minimax_pairs_are_better_than_random_cells_and_rejected_tests_are_nearly_all_valid():
    """The card's toy of 8 programs with 8 outputs out of 4, and tests that are valid at .7."""
    rng = torch.Generator().manual_seed(0)
    right = {"minimax": [], "random": [], "passed": []}
    valid = []
    for _ in range(600):
        truth = torch.randint(4, (8,), generator=rng)
        programs = truth.repeat(8, 1)
        wrong = (torch.rand(8, 8, generator=rng) < 0.35) & (torch.rand(8, 1, generator=rng) < 0.75)
        programs = torch.where(
            wrong, (truth + torch.randint(1, 4, (8, 8), generator=rng)) % 4, programs
        )
        inputs = torch.randint(8, (8,), generator=rng)
        fine = torch.rand(8, generator=rng) < 0.7
        shift = torch.where(fine, 0, torch.randint(1, 4, (8,), generator=rng))
        r = programs[:, inputs] == (truth[inputs] + shift) % 4
        quality = (programs == truth).double().mean(1)
        for rule in right:
            found = RULES[rule](r, quality, rng)
            if found and found[0] != found[2]:
                right[rule].append(float(quality[found[0]] > quality[found[2]]))
                if rule == "minimax":
                    valid.append(float(fine[found[3]]))
    means = {name: sum(values) / len(values) for name, values in right.items()}
    assert means["minimax"] == pytest.approx(0.866, abs=0.05)
    assert means["random"] == pytest.approx(0.501, abs=0.06)
    assert means["passed"] == pytest.approx(0.876, abs=0.05)
    assert sum(valid) / len(valid) > 0.98


# ---- the loss


@pytest.mark.paper
def test_losses_at_the_numbers_of_the_card():
    item = builders.one_pair(1.5, -0.8)
    assert loss(*item, Config())[0].item() == pytest.approx(0.584745, abs=1e-6)
    both = loss(*builders.one_pair(1.5, 0.2), Config(variant="kto"))[0].item()
    desirable = both - torch.sigmoid(torch.tensor(0.1 * (0.2 - 1.5))).item()
    assert desirable == pytest.approx(0.467546, abs=1e-6)  # z0 = 0.2
    other = loss(*builders.one_pair(0.2, -0.8), Config(variant="kto"))[0].item()
    undesirable = other - torch.sigmoid(torch.tensor(0.1 * (0.0 - 0.2))).item()
    assert undesirable == pytest.approx(0.475021, abs=1e-6)


@pytest.mark.paper
def test_the_pair_loss_is_that_of_dpo():
    item = builders.ragged()
    ours = builders.value_and_gradient(loss, *item, Config(0.3))
    plain = builders.value_and_gradient(dpo.loss, *item, dpo.Config(0.3))
    torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-15)


# ---- rollouts


class Writer:
    """A policy that writes the same four programs, or tests, for every task."""

    programs = [" +1 -1", " +1", " +1 -1", " -1"]
    tests = [" f(0) =0", " f(3) =3", " f(3) =4", " f(3) =3"]


def lab_of(monkeypatch, **settings):
    lab = Lab(Settings(world="programs", **dict(prompts=6, k=4, steps=3) | settings), quiet=True)

    def sample(policy, prompts, k, rng=None, max_tokens=None):
        texts = [Writer.tests if p.startswith("test") else Writer.programs for p in prompts]
        return [
            dict(prompt=p, responses=[lab.tokens(x) for x in t[:k]], ends=[True] * k)
            for p, t in zip(prompts, texts)
        ]

    monkeypatch.setattr(lab, "sample", sample)
    monkeypatch.setattr(lab.world, "prompts", lambda n, rng: ["program next back :"] * n)
    return lab


def test_copies_are_executed_once_and_texts_are_joined(monkeypatch):
    lab = lab_of(monkeypatch)
    row = lab.sample(None, ["program next :"], 4)[0]
    assert distinct(lab, row) == [" +1 -1", " +1", " -1"]
    r = executed(lab.world, [" +1 -1", " +1", " -1"], [" f(0) =0", " f(3) =3", " f(3) =4"])
    assert r.int().tolist() == [[1, 1, 0], [0, 0, 1], [0, 0, 0]]
    rows = rollout(lab, None, 0, Config())
    assert len(rows) == 2
    texts = [lab.text(x) for x in rows[0]["responses"]]
    assert texts == [" +1 -1 ; f(0) =0", " -1 ; f(0) =0"]
    assert rows[0]["quality"] == [1.0, 0.0] and rows[0]["valid"] == [True, True]
    assert rows[0]["scores"] == [1.0, 0.0] and rows[0]["ends"] == [True, True]
    rows = rollout(lab, None, 0, Config(select="passed"))
    assert [lab.text(x) for x in rows[0]["responses"]] == [" +1 -1", " -1"]
    assert rows[0]["valid"] == [False, False]
    assert report(rows, 4).startswith(
        "2 pairs from 4 tasks: the chosen program is truly better in 1.00"
    )


def test_a_round_without_pairs_is_refused_if_it_is_the_first_and_else_ends_the_training(
    monkeypatch,
):
    lab = lab_of(monkeypatch)
    rows = rollout(lab, None, 0, Config())
    monkeypatch.setattr(Writer, "programs", [" +1 -1"] * 4)
    assert rollout(lab, None, 0, Config()) == []
    lab = Lab(Settings(world="programs", base_steps=0, steps=3, batch_size=2), quiet=True)
    monkeypatch.setattr(dstc, "rollout", lambda *about: [])
    with pytest.raises(UserError, match="round 1 gave no pairs"):
        run(lab, Config())
    monkeypatch.setattr(dstc, "rollout", lambda lab, policy, t, cfg: [] if t else rows)
    policy = run(lab, Config())
    assert lab.stopped == "stopped after step 1: round 2 gave no pairs"
    assert policy.curve[-1]["step"] == 1


@pytest.mark.parametrize(
    "settings, word",
    [
        (dict(world="reviews"), "no interpreter"),
        (dict(steps=2), "at least 3"),
        (dict(prompts=2), "at least 3"),
    ],
)
def test_runs_that_cannot_work_are_refused(settings, word):
    with pytest.raises(UserError, match=word):
        run(Lab(Settings(**dict(world="programs") | settings), quiet=True), Config())


@pytest.mark.parametrize("fields", [dict(select="best"), dict(variant="ipo"), dict(rounds=0)])
def test_wrong_fields_are_refused(fields):
    with pytest.raises(UserError, match=next(iter(fields))):
        Config(**fields)


@pytest.mark.slow
@pytest.mark.parametrize("fields", [{}, dict(variant="kto", select="random")])
def test_a_run_trains_in_rounds(fields):
    settings = dict(world="programs", base_steps=60, steps=4, prompts=32, batch_size=4, eval_size=8)
    lab = Lab(Settings(**settings), quiet=True)
    policy = run(lab, Config(rounds=2, **fields))
    steps = [look["step"] for look in policy.curve]
    assert steps == sorted(set(steps)) and steps[-1] == 4


# ---- the mutants of the loss


def coupled(cfg):
    """Whether the loss of a row depends on the other rows of its batch."""
    return cfg.variant == "kto"


CASES = [dict(), dict(beta=0.7), dict(variant="kto"), dict(variant="kto", beta=0.4)]
INPUTS = builders.pairs
SURVIVORS = {}
