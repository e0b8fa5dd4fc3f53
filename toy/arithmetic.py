"""Sums of two numbers, worked out digit by digit from the right, with a verifier for every step.

    347+58= | 7+8+0=15,4+5+1=10,3+0+1=04:405    reward 1

The prompt ends with the first "=". Each step of the response adds the two digits of a place and the
carry of the step before, and the answer stands after the colon. The difficulty of a sum is the
number of digits of the longer number, 1 to 5. Demonstrations write every zero, so that each step
takes the same seven tokens. Longer sums have a larger share of wrong steps, so a base model that is
trained on them writes right and wrong responses at every difficulty.

The reward is 1 for a right answer without a wrong step, else 0. Any form of right steps counts:
operands in any order, zeros written or left out (3+0+1=04, 1+3=4), an answer with leading zeros, a
last step for the carry alone, spaces, and steps that are separated by "," or ";" or a line break.
A step is right if it follows from the sum and from the carry that the step before wrote, so an
error counts once, in the step that makes it. A missing place of the longer number is a wrong step,
so an answer without steps earns nothing. `verify` can be gamed, since it checks only the answer:
two errors that cancel pass it.
"""

import re

import torch

import data
from data import UserError, printable
from nanomodel import GPT, GPTConfig
from toy import world

DIGITS = 5  # digits of the longest numbers
SLIP = 0.012  # the share of wrong steps in demonstrations is this times the squared digits
NUMBERS = re.compile(r"([0-9]+)\+([0-9]+)=")
STEP = re.compile(r"([0-9](?:\+[0-9]){0,2})=([0-9]{1,2})")


def numbers(prompt):
    """The two numbers of a prompt such as "347+58="; UserError for any other text."""
    match = NUMBERS.fullmatch(prompt)
    if not match:
        raise UserError(f"'{printable(prompt, 60)}' is not a sum such as '347+58='")
    return int(match[1]), int(match[2])


class World(world.World):
    """The world of this file. All worlds of this class are equal."""

    name, kind, verifier = "arithmetic", "text", True
    max_prompt, max_response = 2 * DIGITS + 2, 48  # tokens
    pretrain = dict(steps=1000, batch_size=16, lr=3e-3)
    align = dict(prompts=4096, steps=100, lr=3e-5, batch_size=32, k=8)

    def __init__(self):
        # a carry with its signs is one token, everything else is one token per character
        self.tokenizer = data.Tokenizer.toy(["+0=", "+1="])

    def model(self):
        """A new GPT with two layers of width 96, about 0.25M parameters."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=2,
            max_position_embeddings=self.max_prompt + self.max_response,
            rope_theta=1000.0,  # a sum has at most 60 tokens
            # only 17 of 260 tokens are used; tied embeddings would spend capacity on the others
            tie_word_embeddings=False,
        )
        model = GPT(config, self.tokenizer)
        # the usual std of 0.02 suits a width of 768; rescaled to this width, the model learns to
        # carry in half as many steps
        with torch.no_grad():
            for weight in model.layers.parameters():
                weight *= (768 / weight.shape[1]) ** 0.5 if weight.dim() == 2 else 1
        return model

    def prompts(self, n, rng, digits=None):
        """n sums of difficulty `digits`, or with None of all difficulties equally often.

        UserError: digits outside 1 to 5.
        """
        if digits is not None and not 1 <= digits <= DIGITS:
            raise UserError(f"digits={digits} must be 1 to {DIGITS}")
        rng, prompts = world.python_rng(rng), []
        for _ in range(n):
            longer = digits or rng.randint(1, DIGITS)
            a, b = (
                rng.randrange(10 ** (d - 1) if d > 1 else 0, 10**d)
                for d in (longer, rng.randint(1, longer))
            )
            prompts.append(f"{a}+{b}=")
        return prompts

    def demonstrate(self, prompt, rng, slip=0.0):
        """One worked sum (text), each step wrong with probability `slip`; rng: a random.Random.

        In a wrong step the carry is forgotten, or the result is one off. After half of the wrong
        steps the sum continues with the wrong result, after the other half with the right one.
        """
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
        """n rows with one worked sum each, some of which have wrong steps."""
        prompts = self.prompts(n, rng)
        rng, rows = world.python_rng(rng), []
        for prompt in prompts:
            worked = self.demonstrate(prompt, rng, SLIP * self.difficulty(prompt) ** 2)
            rows.append(dict(prompt=prompt, responses=[worked], scores=[1.0]))
        return rows

    def difficulty(self, prompt):
        """The number of digits of the longer number."""
        return len(str(max(numbers(prompt))))

    def _parts(self, response):
        """(work, answer) of a response, text or token ids, without spaces."""
        work, _, answer = self.text(response).rpartition(":")
        return work.replace(" ", ""), answer.strip()

    def verify(self, prompt, response):
        """Whether the answer is right; it stands after the last colon, or is the whole response."""
        answer = self._parts(response)[1]
        # compared as text: int() refuses more than 4,300 digits
        digits = answer.lstrip("0") or "0"
        return bool(re.fullmatch("[0-9]+", answer)) and digits == str(sum(numbers(prompt)))

    def verify_steps(self, prompt, response):
        """A bool per step, in the order of the response, then False for every missing place."""
        a, b = numbers(prompt)
        work = self._parts(response)[0]
        steps, marks, carry = re.split("[,;\n]", work) if work else [], [], 0
        for place, step in enumerate(steps):
            given = [a // 10**place % 10, b // 10**place % 10, carry]
            match = STEP.fullmatch(step)
            operands, result = (match[1].split("+"), int(match[2])) if match else ([], None)
            # zeros need not be written
            same = sorted(int(x) for x in operands if x != "0") == sorted(x for x in given if x)
            marks.append(same and result == sum(given))
            carry = result // 10 if match else sum(given) // 10
        return marks + [False] * (self.difficulty(prompt) - len(steps))

    def judge(self, prompts, beginnings, ended, rng):
        """See `toy.world.World.judge`: right means that no step so far, and no answer, is wrong."""
        right = []
        for prompt, y, end in zip(prompts, beginnings, ended):
            text = self.text(y)
            if end:
                right.append(bool(self.reward([prompt], [text])))
                continue
            work = text if ":" in text else text.rstrip(",") + ":"
            written = len([step for step in re.split("[,;\n]", self._parts(work)[0]) if step])
            right.append(all(self.verify_steps(prompt, work)[:written]))
        return world.noisy(right, ended, rng)

    def reward(self, prompts, responses):
        """The true reward of n responses (text or token ids) to n prompts (text), (n,) float64.

        It is 1 for a right answer without a wrong step, else 0.
        """
        right = [
            self.verify(prompt, response) and all(self.verify_steps(prompt, response))
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float64)

    def measure(self, policy, lab):
        """Mean reward by difficulty, {"success_1": ..., ..., "success_5": ...}."""
        success = {}
        for digits in range(1, DIGITS + 1):
            prompts = self.prompts(64, lab.rng(f"sums of {digits}"), digits)
            rows = lab.sample(policy, prompts, 4)
            flat = [(row["prompt"], response) for row in rows for response in row["responses"]]
            success[f"success_{digits}"] = float(self.reward(*zip(*flat)).mean())
        return success
