"""More is Less against its paper: where pairs come from, saturation by style, and DPO's loss."""

import inspect
import json
import math

import pytest
import torch

import methods.more_is_less
import train
from data import UserError
from lab import Lab, Settings
from methods import dpo
from methods.more_is_less import OTHERS, Config, candidates, loss, pair_of, pairs, run
from tests import builders
from tests.lab.commands import Killed, killed_at

SOURCES = list(OTHERS)


def small(out=None, **changes):
    settings = dict(world="safety", base_steps=2, prompts=24, k=3, steps=6, batch_size=8)
    return Lab(Settings(**settings | dict(eval_size=4) | changes), out, quiet=True)


# ---- the loss


def test_the_loss_is_dpo_word_for_word():
    ours, plain = (inspect.getsource(f) for f in (loss, dpo.loss))
    assert ours == plain
    item = builders.ragged()
    for beta in (0.1, 1.0):
        mine = builders.value_and_gradient(loss, *item, Config(beta))
        theirs = builders.value_and_gradient(dpo.loss, *item, dpo.Config(beta))
        assert torch.equal(mine[0], theirs[0]) and torch.equal(mine[1], theirs[1])


@pytest.mark.slow
@pytest.mark.paper
def test_pairs_of_every_source_start_at_ln_2(tmp_path):
    for source in SOURCES:
        run(small(str(tmp_path / source)), Config(source=source))
        text = (tmp_path / source / "metrics.jsonl").read_text()
        lines = [line for line in map(json.loads, text.splitlines()) if "loss" in line]
        assert lines[0]["loss"] == pytest.approx(math.log(2), abs=1e-6)


# ---- pairs

ROW = dict(
    prompt="q",
    responses=[[0], [1], [2], [3], [4], [5]],  # three samples, then the other writers'
    ends=[True, False, True, True, True, True],
)


def found(source, r, row=ROW):
    two = pair_of(row, 3, r, Config(source=source))
    return two and [y[0] for y in two["responses"]]


@pytest.mark.paper
def test_sources_take_their_two_responses_from_the_writers_of_the_table():
    r = [0.1, 0.9, 0.5, -0.2, 1.5, 0.3]
    assert found("self_rm", r[:3]) == [1, 0]
    assert found("self_rm", r) == [1, 0]
    assert found("peer_rm", r[:4]) == [0, 3] and found("peer_rm", [0, 9, 9, 1]) == [3, 0]
    assert found("all_rm", r) == [4, 3]
    assert found("strong_self", [0, 9, 9, -5]) == [3, 0]  # no reward model
    assert found("hc_self", [0, 9, 9, -5]) == [3, 0]
    two = pair_of(ROW, 3, r, Config())
    assert two["ends"] == [False, True] and two["scores"] == [1.0, 0.0] and two["prompt"] == "q"


@pytest.mark.paper
def test_responses_that_are_equal_or_equally_good_make_no_pair():
    same = ROW | {"responses": [[0]] * 6}
    assert [found(source, [0.1, 0.2, 0.3, 0.4, 0.5, 0.6], same) for source in SOURCES] == [None] * 5
    assert found("self_rm", [1.0, 1.0, 1.0]) is None
    assert found("all_rm", [1.0] * 6) is None
    assert found("strong_self", [1.0] * 6) == [3, 0]


@pytest.mark.paper
def test_sources_share_prompts_and_samples():
    lab = small()
    base = lab.base()
    rows = {source: candidates(lab, base, Config(source=source)) for source in SOURCES}
    plain = [(row["prompt"], row["responses"]) for row in rows["self_rm"]]
    for source in SOURCES:
        assert [(row["prompt"], row["responses"][:3]) for row in rows[source]] == plain
        assert {len(row["responses"]) for row in rows[source]} == {3 + len(OTHERS[source])}
        assert {len(row["ends"]) for row in rows[source]} == {3 + len(OTHERS[source])}
    strong = lab.world.writers["strong"]
    texts = strong([row["prompt"] for row in rows["strong_self"]], lab.rng("writer", "strong"))
    assert [lab.text(row["responses"][3]) for row in rows["strong_self"]] == texts


@pytest.mark.paper
def test_the_share_of_pairs_of_five_samples_that_differ_in_safety():
    assert 1 - 0.64**5 - 0.36**5 == pytest.approx(0.886579, abs=1e-6)
    unsafe = torch.rand(20000, 5, generator=torch.Generator().manual_seed(0)) < 0.64
    differ = 0
    for row in unsafe.tolist():
        r = [-float(x) for x in row]
        differ += pair_of(ROW | {"responses": [[i] for i in range(5)]}, 5, r, Config()) is not None
    assert differ / 20000 == pytest.approx(0.886579, abs=0.01)


def test_without_noise_the_better_response_by_the_truth_is_chosen():
    lab = small(prompts=60)
    base = lab.base()
    for source in ("peer_rm", "all_rm"):
        rows = pairs(lab, base, Config(source=source, noise=0.0))
        rewards = lab.truth(rows)
        assert rows and all(a > b for a, b in rewards)
    noisy = lab.truth(pairs(lab, base, Config(source="all_rm", noise=5.0)))
    assert any(a < b for a, b in noisy)


@pytest.mark.paper
def test_style_saturates_the_loss_before_safety_is_learned():
    """The flow of a log-linear policy: m features of style differ in every pair, safety in q."""
    q, beta = 0.64, 1.0
    gains = []
    for m in (0, 1, 7):
        style, safety = torch.zeros(m), 0.0
        for _ in range(300):
            h = torch.stack([style.sum() + safety, style.sum()])  # pairs with and without safety
            slope = torch.sigmoid(-beta * h)
            mean = q * slope[0] + (1 - q) * slope[1]
            style = style + 0.1 * beta * mean
            safety = safety + 0.1 * beta * q * slope[0].item()
        gains.append(safety)
    assert gains[0] > 2 * gains[1] > 4 * gains[2]


# ---- runs


@pytest.mark.parametrize(
    "settings, fields, word",
    [
        (dict(world="reviews"), dict(source="strong_self"), "no writer 'strong'"),
        (dict(world="reviews"), dict(source="all_rm"), "no writer 'peer'"),
    ],
)
def test_sources_without_a_writer_are_refused(settings, fields, word):
    with pytest.raises(UserError, match=word):
        run(small(**settings), Config(**fields))


def test_a_reward_model_is_needed_for_its_noise():
    with pytest.raises(UserError, match="noise = 0.1 does nothing"):
        Config(source="hc_self", noise=0.1)
    assert Config().noise == 0.15 and Config(source="hc_self").noise is None


def test_pairs_that_do_not_differ_are_refused(monkeypatch):
    monkeypatch.setattr(methods.more_is_less, "pair_of", lambda *arguments: None)
    with pytest.raises(UserError, match="no pair differs"):
        run(small(), Config())


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_killed_run_resumes_to_the_same_weights(tmp_path, monkeypatch):
    argv = "--method more_is_less --base_steps 2 --steps 6 --prompts 24 --batch_size 8".split()
    argv += ["--eval_size", "4"]
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    assert train.main([*argv, "--out", "whole"]) == 0
    whole_loss = killed_at(monkeypatch, 4, methods.more_is_less)
    with pytest.raises(Killed):
        train.main([*argv, "--out", "cut"])
    monkeypatch.setattr(methods.more_is_less, "loss", whole_loss)
    Lab.memory.clear()
    assert train.main(["--resume", "cut"]) == 0
    whole, cut = ((tmp_path / n / "model.safetensors").read_bytes() for n in ("whole", "cut"))
    assert whole == cut


# ---- the mutants of the loss: every one makes a difference on these inputs


CASES = [dict(beta=0.3), dict(beta=1.7, source="strong_self"), dict(source="peer_rm", noise=0.3)]
INPUTS = builders.pairs
SURVIVORS = {}
