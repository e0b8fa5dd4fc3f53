"""Files of graded solutions as a world with a verifier: answers, questions, and a run."""

import json
from fractions import Fraction

import pytest
import torch

import train
from data import Tokenizer, UserError
from lab import Lab, Settings
from methods import dno
from tests.lab.commands import rows_file, small
from toy.verified import World, final_answer


@pytest.mark.parametrize(
    "text, answer",
    [
        ("so 40 + 2 = 42\n#### 42", Fraction(42)),
        ("#### 7\nno, wait\n#### 1,234.50", Fraction(2469, 2)),
        ("5 is \\boxed{3} or \\boxed{ 12 }.", Fraction(12)),
        ("the area is \\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("20 - 5 = <<20-5=15>>15.\nA: 15", Fraction(15)),
        ("Answer: $8.00.", Fraction(8)),
        ("The answer is 18 dollars", Fraction(18)),
        ("#### 50%", Fraction(50)),
        ("#### 3/4", Fraction(3, 4)),
        ("#### 3/0", "3/0"),
        ("#### -2", Fraction(-2)),
        ("#### Monday  Morning", "monday morning"),
        ("\\boxed{4", Fraction(4)),
        ("no number", None),
        ("", None),
        ("#### " + "9" * 100, "9" * 100),
    ],
)
def test_final_answers_are_found_and_compared_as_numbers(text, answer):
    assert final_answer(text) == answer


def graded(n=20, **more):
    return [
        dict(
            prompt=f"What is {i} plus 2?",
            responses=[f"{i} + 2 = {i + 3}\n#### {i + 3}", f"{i} + 2 = {i + 2}\n#### {i + 2}"],
            scores=[0.0, 1.0],
        )
        for i in range(n)
    ]


def made(path, rows):
    return World(rows_file(path / "sums.jsonl", rows), Tokenizer.toy([], name="bytes"), 128)


def test_the_best_response_says_what_is_right_and_tests_are_held_out(tmp_path):
    world = made(tmp_path, graded())
    assert world.verifier and world.given is None and world.held_out is None
    tests = world.test_prompts(99, None)
    rng = torch.Generator().manual_seed(0)
    asked = world.prompts(50, rng)
    assert len(asked) == 50 and not set(asked) & set(tests) and len(set(asked)) + len(tests) == 20
    prompt = tests[0]
    number = int(prompt.split()[2]) + 2
    texts = [f"#### {number}", f"it is {number}.0", f"#### {number + 1}", "", "\\boxed{x}"]
    assert world.reward([prompt] * 5, texts).tolist() == [1, 1, 0, 0, 0]
    with pytest.raises(UserError, match="not one of the file's"):
        world.reward(["What?"], ["1"])


def test_questions_without_a_right_response_are_left_out_and_counted(tmp_path):
    rows = graded(30)
    for row in rows[:5]:
        row["responses"], row["scores"] = ["1", "2", "3"], [0.0, 0.0, 0.5]
    rows[5]["responses"][1] = "no number"
    world = made(tmp_path, rows)
    assert len(world.answers) == 29
    assert world.counts["no response is graded right"] == 1
    for row in rows:
        row["scores"] = [0.0, -1.0]
        row["responses"] = row["responses"][:2]
    with pytest.raises(UserError, match="graded right"):
        made(tmp_path, rows)


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
@pytest.mark.parametrize("method", ["grpo", "disco", "mcts_dpo"])
def test_online_methods_run_on_a_file(tmp_path, monkeypatch, method):
    small(monkeypatch)
    path = rows_file(tmp_path / "sums.jsonl", graded())
    argv = f"--method {method} --data {path} --verify true --base_steps 60 --steps 2".split()
    argv += "--batch_size 4 --eval_size 4 --max_response 24 --context 128 --k 4 --out run".split()
    code = train.main(argv)
    assert code == 0
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["samples"] > 0 and 0 <= summary["after"]["reward"] <= 1


@pytest.mark.usefixtures("own_folder")
def test_dno_pairs_right_with_wrong_solutions_of_a_file(tmp_path, monkeypatch):
    small(monkeypatch)
    path = rows_file(tmp_path / "sums.jsonl", graded(60))
    about = dict(data=path, verify=True, base_steps=0, context=128, k=4)
    lab = Lab(Settings(**about), quiet=True)
    lab.base()

    def sample(policy, prompts, k, rng):
        right = [int(x.split()[2]) + 2 for x in prompts]
        texts = [[f"#### {n + i}" for i in (0, 1, 2)] + [f"so #### {n}"] for n in right]
        return [
            dict(prompt=x, responses=[lab.tokens(y) for y in four], ends=[True] * 4)
            for x, four in zip(prompts, texts)
        ]

    monkeypatch.setattr(lab, "sample", sample)
    rows = dno.rollout(lab, None, 0, dno.Config(rounds=1))
    assert len(rows) > 50 and lab.truth(rows) == [[1.0, 0.0]] * len(rows)
    assert lab.collate(lab.rows(rows)).mask.any(-1).all()


def test_verify_is_for_data(capsys):
    assert train.main(["--method", "dpo", "--verify", "true"]) == 2
    assert "--verify are for --data" in capsys.readouterr().err
