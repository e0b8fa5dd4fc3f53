"""The verifier of sums: every right chain counts, and a wrong one is marked at its wrong step."""

import random

import pytest
import torch

from data import collate
from toy.arithmetic import SLIP, World

WORLD = World()
PROMPT, CHAIN = "347+58=", "7+8+0=15,4+5+1=10,3+0+1=04:405"


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    "chain",
    [
        CHAIN,
        "7+8=15,4+5+1=10,3+1=4:405",  # zeros left out
        "8+7=15,1+5+4=10,1+3=04:405",  # operands in another order
        "7+8+0=15,4+5+1=10,3+0+1=04,0+0+0=00:0405",  # leading zeros
        "7+8=15, 4+5+1=10, 3+0+1=4: 405",
        "7+8=15\n4+5+1=10\n3+0+1=4:405",
        "7+8=15;4+5+1=10;3+0+1=4:405\n",
    ],
)
def test_any_right_chain_counts(chain):
    assert WORLD.verify(PROMPT, chain) and all(WORLD.verify_steps(PROMPT, chain))
    assert WORLD.reward([PROMPT], [chain]).tolist() == [1.0]


@pytest.mark.parametrize(
    "prompt, chain",
    [("95+7=", "5+7=12,9+1=10:102"), ("95+7=", "5+7=12,9+0+1=10,1=1:102"), ("0+0=", "0=0:0")],
)
def test_the_last_carry_may_have_a_step_of_its_own(prompt, chain):
    assert WORLD.reward([prompt], [chain]).tolist() == [1.0]


@pytest.mark.parametrize(
    "chain, answer, steps",
    [
        ("7+8=16,4+5+1=10,3+0+1=4:405", True, [False, True, True]),  # right answer, wrong step
        (
            "7+8=5,4+5=9,3+0=3:395",
            False,
            [False, True, True],
        ),  # the carry is lost in the first step; the others follow from it
        ("7+8=15,4+5+0=9,3+0=3:395", False, [True, False, True]),
        (
            "7+8=15,4+5=10,3+0+1=4:405",
            True,
            [True, False, True],
        ),  # the right result from the wrong digits
        ("7+9=15,4+5+1=10,3+0+1=4:405", True, [False, True, True]),
        ("7+8=15,4+5+1=10,3+0+1=4:406", False, [True, True, True]),  # wrong answer, right steps
        ("7+8=15,4+5+1=10,3+0+1=4:", False, [True, True, True]),
        (
            "7+8=15,4+5+1=10,3+0+1=4",
            False,
            [False, False, False],
        ),  # without a colon all of it is the answer
        ("3+0+1=4,4+5+1=10,7+8=15:405", True, [False, False, False]),  # from the wrong end
        ("7+8=15,4+5+1=10:405", True, [True, True, False]),  # a place left out
        ("7+8=15,,3+0+1=4:405", True, [True, False, True]),
        (
            "7+8=15,4+5+1=10,3+0+1=4,1+0=1:405",
            True,
            [True, True, True, False],
        ),  # a carry that is not there
        ("405", True, [False, False, False]),
        ("", False, [False, False, False]),
    ],
)
def test_wrong_chains_are_told_apart(chain, answer, steps):
    assert WORLD.verify(PROMPT, chain) == answer
    assert WORLD.verify_steps(PROMPT, chain) == steps
    assert WORLD.reward([PROMPT], [chain]).tolist() == [0.0]


def test_any_text_has_a_reward():
    rng = random.Random(0)
    odd = [
        "9" * 5000,
        ":",
        "::",
        ":+405",
        ":4 0 5",
        "7+8=" + "1" * 5000 + ":405",
        "\u0667+8=15:405",
        "7++8=15,=,+=,1+2+3+4=10:",
        ":4_05",
        "\0\ud7ff",
    ]
    odd += [
        "".join(rng.choice("0123456789+=,: ") for _ in range(rng.randint(0, 60)))
        for _ in range(300)
    ]
    reward = WORLD.reward([PROMPT] * len(odd), odd)
    assert reward.shape == (len(odd),) and reward.dtype == torch.float64 and not reward.any()


def test_token_ids_are_read_like_their_text():
    ids = WORLD.tokenizer.encode(CHAIN)
    assert WORLD.reward([PROMPT, PROMPT], [ids, ids + [WORLD.tokenizer.eot]]).tolist() == [1.0, 1.0]
    with pytest.raises(ValueError, match="347"):
        WORLD.reward(["347+58"], [CHAIN])


def test_a_demonstration_without_slips_is_right_and_an_oracle_agrees():
    rng = random.Random(1)
    for prompt in WORLD.prompts(300, seeded(1)):
        a, b = map(int, prompt[:-1].split("+"))
        assert WORLD.difficulty(prompt) == max(len(str(a)), len(str(b)))
        chain = WORLD.demonstrate(prompt, rng)
        assert (
            chain.rpartition(":")[2] == str(a + b) and WORLD.reward([prompt], [chain]).item() == 1
        )
        slipped = WORLD.demonstrate(prompt, rng, slip=1.0)
        assert (
            WORLD.reward([prompt], [slipped]).item() == 0
            and not WORLD.verify_steps(prompt, slipped)[0]
        )


def test_demonstrations_slip_more_often_the_longer_the_sum():
    rows = WORLD.demonstrations(3000, seeded())
    reward = WORLD.reward([row["prompt"] for row in rows], [row["responses"][0] for row in rows])
    digits = torch.tensor([WORLD.difficulty(row["prompt"]) for row in rows])
    right = [reward[digits == d].mean().item() for d in range(1, 6)]
    assert right == pytest.approx([(1 - SLIP * d * d) ** d for d in range(1, 6)], abs=0.06)
    answers = torch.tensor([WORLD.verify(row["prompt"], row["responses"][0]) for row in rows])
    assert 0.05 < (answers.double() - reward).mean() < 0.2  # slips of the pen


def test_prompts_have_the_difficulty_asked_for_and_fit():
    for digits in range(1, 6):
        assert {WORLD.difficulty(p) for p in WORLD.prompts(50, seeded(), digits)} == {digits}
    rows = WORLD.demonstrations(500, seeded())
    assert {WORLD.difficulty(row["prompt"]) for row in rows} == {1, 2, 3, 4, 5}
    assert max(len(WORLD.tokenizer.encode(row["prompt"])) for row in rows) == WORLD.max_prompt
    assert (
        max(len(WORLD.tokenizer.encode(row["responses"][0])) for row in rows) < WORLD.max_response
    )
    assert rows == WORLD.demonstrations(500, seeded()) != WORLD.demonstrations(500, seeded(1))
    with pytest.raises(ValueError, match="digits=6"):
        WORLD.prompts(1, seeded(), digits=6)


def test_the_model_has_the_stated_size_and_measure_counts_by_difficulty():
    model = WORLD.model()
    assert 0.2e6 < sum(p.numel() for p in model.parameters()) < 0.3e6
    assert model.logps(collate(WORLD.demonstrations(4, seeded()), WORLD.tokenizer)).shape[:2] == (
        4,
        1,
    )

    class Lab:
        def rng(self, name):
            return seeded(len(name))

        def sample(self, policy, prompts, k):
            return [{"prompt": p, "responses": [policy(p, i) for i in range(k)]} for p in prompts]

    def policy(prompt, i):  # right for short sums, every other time for three digits
        right = WORLD.difficulty(prompt) < 3 or (WORLD.difficulty(prompt) == 3 and i % 2)
        return WORLD.tokenizer.encode(WORLD.demonstrate(prompt, random.Random(0))) if right else []

    assert WORLD.measure(policy, Lab()) == dict(
        success_1=1.0, success_2=1.0, success_3=0.5, success_4=0.0, success_5=0.0
    )
