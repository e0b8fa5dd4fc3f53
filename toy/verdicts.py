"""Verdicts: two pictures, measured imprecisely, and a judge who writes down why one is better.

    exact a3 b7 c5 | x6 y2 z5 = | A! A2 B1 C1 W2    reward 1

The prompt is the kind of a request, the three scores a, b, c of the first picture in digits from 0
to 9, and those of the second one, x, y, z. The response is a trace of five words: the criterion
that counts most for a request of this kind (A!), which picture wins on each criterion (A2 B1 C1),
and which wins overall (W2). Nobody tells the judge what counts for whom: it has to be learned.

The true scores are hidden; the digits have a measurement error. The reward is 1 if the overall
winner is that of the weights and the digits, 0 if it is the other one, and -1 for a response that
is not such a trace. It can be gamed by a trace whose reasons are wrong and whose verdict is right,
so `measure` reports both. A teacher, who errs in every word with probability FLIP, writes the
demonstrations.
"""

import torch

import data
from nanomodel import GPT, GPTConfig
from toy import world

CRITERIA = "ABC"
CONTEXTS = ("exact", "crisp", "bold")  # kinds of requests
TASTES = ((1.0, 0.2, 0.2), (0.2, 1.0, 0.2), (0.2, 0.2, 1.0))  # weights of the criteria
BLUR, STEP = 0.3, 0.5  # standard deviation of a measurement, and the size of a digit
FLIP = 0.2  # probability that a word of the teacher is wrong


class World(world.World):
    """The world of this file. tastes: the weights of the criteria, for each kind of request."""

    name, kind = "verdicts", "text"
    max_response = 6
    pretrain = dict(steps=1000, batch_size=64, lr=5e-3, demonstrations=16384)
    align = dict(prompts=4000, steps=200, lr=5e-5, batch_size=64)

    def __init__(self, tastes=TASTES):
        self.tastes = torch.tensor(tastes)  # (3, 3)
        digits = [f" {letter}{d}" for letter in "abcxyz" for d in range(10)]
        winners = [f" {c}{k}" for c in CRITERIA + "W" for k in (1, 2)]
        words = [*CONTEXTS, *digits, " |", " =", *(f" {c}!" for c in CRITERIA), *winners]
        self.tokenizer = data.Tokenizer.toy(words)

    def key(self):
        """The tastes."""
        return [self.name, self.tastes.tolist()]

    def model(self):
        """A new GPT with two layers of width 48, about 0.07M parameters."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=48,
            intermediate_size=128,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=32,
        )
        return GPT(config, self.tokenizer)

    # ---------------------------------------------------------------- questions and answers

    def ask(self, contexts, first, second, rng):
        """n prompts about pictures with the scores first, second (n, 3), in kinds of request (n,).

        The scores are measured with noise and rounded to digits.
        """
        both = torch.stack([first, second], 1).float()  # (n, 2, 3)
        seen = both + BLUR * torch.randn(both.shape, generator=rng)
        digits = (seen / STEP + 5).round().clamp(0, 9).long().tolist()

        def side(letters, values):
            return "".join(f" {letter}{value}" for letter, value in zip(letters, values))

        asked = zip(torch.as_tensor(contexts).tolist(), digits)
        return [f"{CONTEXTS[c]}{side('abc', a)} |{side('xyz', b)} =" for c, (a, b) in asked]

    def trace(self, leader, winners, overall):
        """A trace of the index of the leading criterion and winners 0 or 1."""
        words = "".join(f" {c}{k + 1}" for c, k in zip(CRITERIA + "W", [*winners, overall]))
        return f" {CRITERIA[leader]}!{words}"

    def parse(self, text):
        """(leader, [winners], overall) of a trace, or None if it is not one."""
        words = text.split()
        if [word[:1] for word in words[1:]] != list(CRITERIA + "W"):
            return None
        if words[0] not in [f"{c}!" for c in CRITERIA]:
            return None
        if any(word[1:] not in ("1", "2") for word in words[1:]):
            return None
        winners = [int(word[1:]) - 1 for word in words[1:]]
        return CRITERIA.index(words[0][0]), winners[:-1], winners[-1]

    def answer(self, contexts, first, second):
        """The truth about true scores (n, 3): leaders (n,), winners (n, 3) and overall (n,).

        A tie goes to the first picture.
        """
        weights = self.tastes[torch.as_tensor(contexts)]  # (n, 3)
        overall = (weights * (second - first)).sum(1) > 0
        return weights.argmax(1), (second > first).long(), overall.long()

    def items(self, n, rng):
        """n questions with their true answers: rows of prompt, leader, winners, overall."""
        contexts = torch.randint(len(CONTEXTS), (n,), generator=rng)
        first, second = torch.randn(2, n, len(CRITERIA), generator=rng)
        asked = self.ask(contexts, first, second, rng)
        truth = [part.tolist() for part in self.answer(contexts, first, second)]
        names = ("prompt", "leader", "winners", "overall")
        return [dict(zip(names, row)) for row in zip(asked, *truth)]

    def digits(self, prompts):
        """The kinds of request (n,) and the digits (n, 3), (n, 3) of prompts."""
        words = [prompt.split() for prompt in prompts]
        contexts = torch.tensor([CONTEXTS.index(each[0]) for each in words])
        values = torch.tensor(
            [[int(w[1:]) for w in each[1:] if w not in ("|", "=")] for each in words]
        )
        return contexts, *values.float().split(len(CRITERIA), 1)

    def rubric(self, prompts, weights=None):
        """The verdict (n,) of fixed weights (3,) on the digits: 0, 1, or 0.5 for a tie.

        Without weights it is that of the true weights of each kind of request, which a judge can
        hardly surpass.
        """
        contexts, first, second = self.digits(prompts)
        weights = self.tastes[contexts] if weights is None else torch.tensor(weights)
        gap = (weights * (second - first)).sum(1)
        return torch.where(gap.abs() < 1e-5, 0.5, (gap > 0).double())

    # ---------------------------------------------------------------- the interface of worlds

    def prompts(self, n, rng):
        """n questions."""
        return [item["prompt"] for item in self.items(n, rng)]

    def demonstrations(self, n, rng):
        """n traces of the teacher."""
        rows = []
        wrong = (torch.rand(n, len(CRITERIA) + 2, generator=rng) < FLIP).tolist()
        for item, (lost, *flips, turned) in zip(self.items(n, rng), wrong):
            leader = (item["leader"] + lost) % len(CRITERIA)
            winners = [k ^ f for k, f in zip(item["winners"], flips)]
            trace = self.trace(leader, winners, item["overall"] ^ turned)
            rows.append(dict(prompt=item["prompt"], responses=[trace], scores=[1.0]))
        return rows

    def parts(self, prompt, response):
        """Of one trace: `valid`, and `right`, whether the overall winner is right on the digits."""
        found, known = self.parse(self.text(response)), self.rubric([prompt]).item()
        right = 0.0 if found is None else 1 - abs(known - found[2])
        return {"valid": float(found is not None), "right": right}

    def reward(self, prompts, responses):
        """The true reward of n traces, (n,) float64: 1, 0, or -1; 0.5 where the digits tie."""
        parts = [self.parts(p, r) for p, r in zip(prompts, responses, strict=True)]
        return torch.tensor([p["right"] + p["valid"] - 1 for p in parts], dtype=torch.float64)

    def accuracy(self, items, traces):
        """How often traces (n) say the hidden truth: {overall, reasons, leader, valid}.

        reasons: the mean share of right winners on the criteria. An invalid trace is a coin flip.
        """
        found = [self.parse(self.text(trace)) for trace in traces]
        scores = dict.fromkeys(("overall", "reasons", "leader", "valid"), 0.0)
        for item, trace in zip(items, found, strict=True):
            leader, winners, overall = trace or (None, [0.5] * 3, 0.5)
            scores["overall"] += 1 - abs(overall - item["overall"])
            scores["reasons"] += 1 - sum(abs(a - b) for a, b in zip(winners, item["winners"])) / 3
            scores["leader"] += leader == item["leader"]
            scores["valid"] += trace is not None
        return {name: value / len(items) for name, value in scores.items()}

    def measure(self, policy, lab):
        """The accuracy of 1,000 sampled traces, that of greedy ones, and of two yardsticks."""
        items = self.items(lab.few(1000), lab.eval_rng("items"))
        asked = [item["prompt"] for item in items]
        rows = lab.sample(policy, asked, 1, lab.eval_rng("traces"))
        found = self.accuracy(items, [row["responses"][0] for row in rows])
        greedy = [ids for (ids,) in policy.sample(asked, 1, lab.eval_rng("greedy"), 6, 0.0)]
        eot = self.tokenizer.eot
        clean = [ids[:-1] if ids[-1] == eot else ids for ids in greedy]
        found["greedy"] = self.accuracy(items, clean)["overall"]
        truth = torch.tensor([item["overall"] for item in items])
        for name, weights in (("fixed_rubric", [1.0] * 3), ("known_weights", None)):
            found[name] = (1 - (self.rubric(asked, weights) - truth).abs()).mean().item()
        return found
