"""What a run has sampled is counted, in tokens, once, and without its evaluations."""

import json
import time

import pytest

import methods.grpo
import train
from lab import Lab, Settings
from methods import dpo
from tests.lab.commands import Killed, killed_at

SMALL = dict(base_steps=0, prompts=6, eval_size=4, max_response=5, steps=2, batch_size=2)


def test_samples_are_tokens_of_responses_with_their_ends_and_images_are_images():
    lab = Lab(Settings(**SMALL), quiet=True)
    rows = lab.sample(lab.base(), ["review of the sofa :"] * 3, 2)
    drawn = sum(len(ids) + e for row in rows for ids, e in zip(row["responses"], row["ends"]))
    assert lab.samples == drawn > 0
    lab = Lab(Settings(world="digits", base_steps=0), quiet=True)
    lab.sample(lab.base(), [1, 2], 3)
    assert lab.samples == 6


def test_evaluations_do_not_count_but_cached_and_stored_samples_do(tmp_path):
    counts = []
    for _ in range(2):  # the second one reads the pairs from the cache
        lab = Lab(Settings(**SMALL), quiet=True)
        policy = lab.base()
        lab.preferences(policy, k=2)
        counts.append(lab.samples)
        lab.evaluate(policy)
        assert lab.samples == counts[-1] > 0
    assert counts[0] == counts[1]
    for _ in range(2):  # the second one reads the stage
        lab = Lab(Settings(**SMALL), str(tmp_path), quiet=True)
        lab.stage("own", lambda: lab.sample(lab.base(), ["review of the sofa :"], 2) and 1)
        counts.append(lab.samples)
    assert counts[2] == counts[3] > 0


def test_the_samples_of_a_look_of_one_s_own_do_not_count_and_the_look_has_those_before_it():
    lab = Lab(Settings(world="bandit", steps=2, batch_size=2, eval_every=1), quiet=True)
    policy = lab.base()
    lab.sample(policy, [0], 5)

    def watch(policy, step):
        lab.sample(policy, [0], 3)
        return {"seen": 1.0}

    rows = lab.preferences(policy, k=2, n=4)
    before = lab.samples
    lab.align(policy, rows, dpo.loss, dpo.Config(), watch=watch)
    assert lab.samples == before > 0
    assert [look["samples"] for look in policy.curve] == [before] * 3


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_an_interrupted_run_counts_what_it_had_sampled_before(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    argv = "--method grpo --world arithmetic --base_steps 2 --steps 6 --prompts 4 --k 2".split()
    argv += "--batch_size 4 --eval_size 4 --max_response 6 --eval_every 2".split()
    assert train.main([*argv, "--out", "whole"]) == 0
    loss = killed_at(monkeypatch, 4, methods.grpo)
    with pytest.raises(Killed):
        train.main([*argv, "--out", "cut"])
    monkeypatch.setattr(methods.grpo, "loss", loss)
    assert train.main(["--resume", "cut"]) == 0
    whole, cut = (json.loads((tmp_path / n / "summary.json").read_text()) for n in ("whole", "cut"))
    assert whole["samples"] == cut["samples"] > 0
    lines = [json.loads(x) for x in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()]
    looks = [line["samples"] for line in lines if "samples" in line]
    assert looks == sorted(looks) and looks[-1] == whole["samples"]
