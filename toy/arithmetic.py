"""Sums of two numbers, worked out digit by digit from the right; a verifier for the answer and for every step.

    347+58=7+8+0=15,4+5+1=10,3+0+1=04:405

The prompt ends with the first "="; each step adds the two digits of a place and the carry of the step before; the answer stands after the
colon. Difficulty = digits of the longer number (1 to 5). Demonstrations write every zero, so that each step takes the same seven tokens and
a model that finds its digits by counting learns faster.

Any chain of right steps counts, not this one string: operands in any order, zeros written or left out (3+0+1=04, 1+3=4), answers with
leading zeros, a last step for the carry alone, spaces, and steps parted by "," ";" or a line break. A step is marked as a teacher does: it
is right if it follows from the sum and from the carry *as the step before wrote it*, so that a mistake is counted where it is made. All
places of the longer number must be there: one that is left out is a wrong step, so the bare answer earns nothing.

The reward is 1 for the right answer reached without a wrong step, else 0; `verify` and `verify_steps` tell a chain apart that has a wrong
step and yet the right answer. Demonstrations slip more often the longer the sum, half the time with the pen alone, so that a base model
trained on them has right and wrong samples at every difficulty.
"""

import random
import re

import torch

import data
from data import UserError
from nanomodel import GPT, GPTConfig
from toy import world

DIGITS = 5  # the longest numbers
SLIP = 0.012  # wrong steps of the demonstrations: this times the squared number of digits
NUMBERS = re.compile(r"([0-9]+)\+([0-9]+)=")
STEP = re.compile(r"([0-9](?:\+[0-9]){0,2})=([0-9]{1,2})")


def numbers(prompt):
    """The two numbers of a prompt such as "347+58="; ValueError for any other text."""
    match = NUMBERS.fullmatch(prompt)
    if not match:
        raise UserError(f"{prompt!r} is not a sum such as '347+58='")
    return int(match[1]), int(match[2])


class World(world.World):
    """Text with a verifier; nothing is downloaded or kept."""

    name, kind, verifier = "arithmetic", "text", True
    max_prompt, max_response = 2 * DIGITS + 2, 48
    pretrain = dict(steps=1000, batch_size=16, lr=3e-3)
    align = dict(prompts=4096, steps=100, lr=3e-5, batch_size=32, k=8)

    def __init__(self):
        self.tokenizer = data.Tokenizer.toy(
            ["+0=", "+1="]
        )  # a carry with its signs is one token, all else single characters

    def model(self):
        """A fresh GPT: two layers of width 96, about 0.25M parameters."""
        model = GPT(
            GPTConfig(
                vocab_size=self.tokenizer.vocab_size,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=6,
                num_key_value_heads=2,
                max_position_embeddings=self.max_prompt + self.max_response,
                rope_theta=1000.0,  # a sum has at most 60 tokens
                tie_word_embeddings=False,  # 17 of 260 rows are in use, and tied ones spend the input's width on ruling out the others
            ),
            self.tokenizer,
        )
        with torch.no_grad():  # a spread of 0.02 suits a width of 768; this narrow model learns to carry in half the steps with its share
            for weight in model.layers.parameters():
                weight *= (768 / weight.shape[1]) ** 0.5 if weight.dim() == 2 else 1
        return model

    def prompts(self, n, rng, digits=None):
        """n sums of that difficulty (1 to 5); without it, of all difficulties alike. ValueError outside 1 to 5."""
        if digits is not None and not 1 <= digits <= DIGITS:
            raise UserError(f"digits={digits} must be 1 to {DIGITS}")
        rng, prompts = random.Random(int(torch.randint(2**62, (), generator=rng))), []
        for _ in range(n):
            longer = digits or rng.randint(1, DIGITS)
            a, b = (
                rng.randrange(10 ** (d - 1) if d > 1 else 0, 10**d)
                for d in (longer, rng.randint(1, longer))
            )
            prompts.append(f"{a}+{b}=")
        return prompts

    def demonstrate(self, prompt, rng, slip=0.0):
        """One worked sum (text); each step is wrong with probability `slip`: its carry forgotten, or its result one off.

        Half the time the wrong result is carried on, half the time it is a slip of the pen and the rest goes on as if it were right."""
        a, b = numbers(prompt)
        steps, answer, carry = [], "", 0
        for place in range(self.difficulty(prompt)):
            given = [a // 10**place % 10, b // 10**place % 10, carry]
            total = written = sum(given)
            if rng.random() < slip:
                if carry and rng.random() < 0.5:
                    given[2] = 0
                    written = sum(given)
                else:
                    written += rng.choice([-1, 1]) if written else 1
                total = rng.choice([total, written])
            steps.append("+".join(map(str, given)) + f"={written:02d}")
            answer, carry = str(total % 10) + answer, total // 10
        return ",".join(steps) + ":" + (str(carry) if carry else "") + answer

    def demonstrations(self, n, rng):
        """n rows with one worked sum each, slips included."""
        prompts = self.prompts(n, rng)
        rng = random.Random(int(torch.randint(2**62, (), generator=rng)))
        return [
            {
                "prompt": p,
                "responses": [self.demonstrate(p, rng, SLIP * self.difficulty(p) ** 2)],
                "scores": [1.0],
            }
            for p in prompts
        ]

    def difficulty(self, prompt):
        """Digits of the longer number."""
        return len(str(max(numbers(prompt))))

    def _parts(self, response):
        """(work, answer) of a response, text or token ids, without spaces."""
        work, _, answer = (
            response if isinstance(response, str) else self.tokenizer.decode(response)
        ).rpartition(":")
        return work.replace(" ", ""), answer.strip()

    def verify(self, prompt, response):
        """Is the answer right? It is what stands after the last colon, or the whole response when there is none."""
        answer = self._parts(response)[1]
        return bool(re.fullmatch("[0-9]+", answer)) and (answer.lstrip("0") or "0") == str(
            sum(numbers(prompt))
        )  # int() has a limit

    def verify_steps(self, prompt, response):
        """Is each step right? A list of bools: the steps in the order written, then False for every place that is left out."""
        a, b = numbers(prompt)
        work = self._parts(response)[0]
        steps, marks, carry = re.split("[,;\n]", work) if work else [], [], 0
        for place, step in enumerate(steps):
            given = [a // 10**place % 10, b // 10**place % 10, carry]
            match = STEP.fullmatch(step)
            operands, result = (match[1].split("+"), int(match[2])) if match else ([], None)
            same = sorted(int(x) for x in operands if x != "0") == sorted(
                x for x in given if x
            )  # zeros need not be written
            marks.append(same and result == sum(given))
            carry = result // 10 if match else sum(given) // 10
        return marks + [False] * (self.difficulty(prompt) - len(steps))

    def reward(self, prompts, responses):
        """The truth: n prompts (text) and n responses (text or token ids) -> (n,) float64, 1 = right answer and no wrong step, else 0."""
        right = [
            self.verify(p, r) and all(self.verify_steps(p, r))
            for p, r in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float64)

    def measure(self, policy, lab):
        """Share of rewarded samples by difficulty: {"success_1": ..., ..., "success_5": ...}."""
        success = {}
        for digits in range(1, DIGITS + 1):
            rows = lab.sample(policy, self.prompts(64, lab.rng(f"sums of {digits}"), digits), 4)
            flat = [(row["prompt"], response) for row in rows for response in row["responses"]]
            success[f"success_{digits}"] = float(self.reward(*zip(*flat)).mean())
        return success
