"""A file of graded solutions as a world whose verifier compares final answers.

    What is 6 times 7? | 6 times 7 is 42.\\n#### 42    reward 1

`--data FILE --verify true` samples solutions to the questions of a file instead of training on its
responses, so that online methods run on real questions. The right answer of a question is that of
its best response, if that is graded above 0; other questions are left out and counted. The final
answer of a text is in its last \\boxed{}, or behind its last "####", "A:" or "Answer:", or is its
last number. Numbers are compared as numbers, anything else as text.

The reward can be gamed by guessing, or by a solution whose steps are wrong and cancel.
"""

import re
from fractions import Fraction

import torch

from data import UserError
from toy import files

NUMBER = r"[-+]?(?:\d{1,3}(?:,\d{3})+|\d+)?(?:\.\d+|\d)(?:/\d+)?"
MARKS = r"(?:####|^\s*(?:final\s+)?answer\s*(?:is)?\s*:|^\s*a\s*:)([^\n]*)"


def boxed(text):
    """The content of the last \\boxed{...} of a text, with braces inside; None: there is none."""
    start = text.rfind("\\boxed{")
    if start < 0:
        return None
    depth, begin = 0, start + len("\\boxed")
    for i in range(begin, len(text)):
        depth += (text[i] == "{") - (text[i] == "}")
        if depth == 0:
            return text[begin + 1 : i]
    return None


def final_answer(text):
    """The final answer of a solution in a form that can be compared, or None."""
    found = boxed(text)
    if found is None:
        marked = re.findall(MARKS, text, re.IGNORECASE | re.MULTILINE)
        numbers = re.findall(NUMBER, text) if not marked else []
        found = marked[-1] if marked else numbers[-1] if numbers else None
    return None if found is None else plain(found)


def plain(answer):
    """An answer as a Fraction if it is a number of at most 40 characters, otherwise as text."""
    text = answer.strip().strip("$.").replace("\\$", "").replace("\\%", "").strip("$% ")
    digits = text.replace(",", "").replace(" ", "")
    if len(digits) <= 40 and re.fullmatch(r"[-+]?(\d+(\.\d*)?|\.\d+)(/\d+)?", digits):
        top, _, bottom = digits.partition("/")
        if not bottom or int(bottom):
            return Fraction(top) / (int(bottom) if bottom else 1)
    return " ".join(text.lower().split())


class World(files.World):
    """The questions of one file with a verifier. The arguments are those of `files.World`."""

    verifier, given = True, None
    max_response = 192

    def __init__(self, *about, **more):
        super().__init__(*about, **more)
        self.answers, parts = {}, []
        for rows in (self.train, self.held_out):
            questions = []
            for row in rows:
                best = max(range(len(row["scores"])), key=row["scores"].__getitem__)
                answer = final_answer(self.text(row["responses"][best]))
                if row["scores"][best] > 0 and answer is not None and not row.get("parents"):
                    self.answers[self.text(row["prompt"])] = answer
                    questions.append(row)
            parts.append(questions)
        lost = len(self.train) + len(self.held_out) - sum(map(len, parts))
        if lost:
            self.counts = self.counts | {"no response is graded right": lost}
        self.train, tests = parts
        if not self.train or not tests:
            raise UserError(f"{self.name}: --verify needs questions with a response graded right")
        self.asked = [row["prompt"] for row in tests]
        self.single, self.held_out = False, None
        self.align = self.align | dict(prompts=len(self.train), k=4)

    def key(self):
        """That of the file, and that its answers are verified."""
        return ["verified", super().key()]

    def prompts(self, n, rng):
        """n training questions, in random order and again if there are fewer."""
        order = torch.randperm(len(self.train), generator=rng).tolist()
        return [self.train[order[i % len(order)]]["prompt"] for i in range(n)]

    def test_prompts(self, n, rng):
        """The first n held-out questions."""
        return self.asked[:n]

    def reward(self, prompts, responses):
        """1 for the right final answer, otherwise 0, (n,) float64. UserError: another question."""
        out = []
        for prompt, response in zip(prompts, responses, strict=True):
            known = self.answers.get(self.text(prompt))
            if known is None:
                raise UserError("a question is not one of the file's: was it cut by --truncate?")
            out.append(final_answer(self.text(response)) == known)
        return torch.tensor(out, dtype=torch.float64)
