"""Ranking in context: a query, a list of dishes, and how well each answers the query.

    find cheap cold sweet: honey mint cake, soup, bean lemon tea, ...

60 dishes of 1 to 3 words. Each word has a random hidden vector of 8 qualities, and a dish has the sum of its words', scaled to one spread;
a query names 2 to 4 qualities by one of their poles (sweet or sour), and a dish answers it as far as it lies towards those poles. None of
this is in the text: which words are sweet has to be learnt from graded lists. In a list the best dish has relevance 3, the next two 2, the
next two 1, the others 0 (the setting of IRPO, arXiv:2504.15477, with one more grade).

A row is a whole list in one context, a chain whose order is shuffled once, so that a place says nothing about the relevance; separators are
not scored. Demonstrations are lists in random order: a base model knows the format and the dishes, and nothing of relevance.
"""

import random

import torch

import data
from data import UserError
from nanomodel import GPT, GPTConfig
from toy import world

POLES = "sweet sour hot cold light rich cheap fancy crisp soft mild spicy plain festive quick slow".split()  # two a quality
TASTES = "apple lemon honey ginger pepper mint bean corn nut plum onion cheese".split()
KINDS = "tea soup pie cake bread salad curry stew toast rice pasta punch".split()
GRADES = (3, 2, 2, 1, 1)  # relevance of the first places
LENGTH, SHORTEST, LONGEST = 10, 8, 20  # items of a list: by default, and of the demonstrations


def dcg(relevance, k):
    """Discounted cumulative gain of the first k places, (2^y - 1) / log2(1 + place): relevance (..., K) in the list's order -> (...)."""
    top = relevance[..., :k].to(torch.float64)
    place = torch.arange(1, top.shape[-1] + 1, dtype=torch.float64, device=top.device)
    return ((2**top - 1) / torch.log2(1 + place)).sum(-1)


def ndcg(scores, relevance, k):
    """NDCG@k of the order by falling scores, in [0, 1]: scores, relevance (..., K) -> (...) float64; equal scores keep their order, and a
    list without anything relevant has 0."""
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ideal = dcg(relevance.sort(dim=-1, descending=True).values, k)
    return dcg(relevance.gather(-1, order), k) / ideal.clamp(min=1e-12)


class World(world.World):
    """Text; the truth is `relevance`, and `reward` for a whole list. Two worlds are the same world."""

    name, kind = "ranking", "text"
    max_prompt, max_response = 6, 4 * LONGEST
    pretrain = dict(steps=250, batch_size=32, lr=3e-3)
    align = dict(prompts=4096, steps=300, lr=1e-3, batch_size=32)

    def __init__(self):
        rng = random.Random(0)
        vectors = {word: [rng.gauss(0, 1) for _ in POLES[::2]] for word in TASTES + KINDS}
        two = [(taste, kind) for taste in TASTES for kind in KINDS]
        three = [(other, *pair) for pair in two for other in TASTES if other < pair[0]]
        dishes = [(kind,) for kind in KINDS] + rng.sample(two, 24) + rng.sample(three, 24)
        self.qualities = {
            " ".join(dish): [
                sum(q) / len(dish) ** 0.5 for q in zip(*(vectors[word] for word in dish))
            ]
            for dish in dishes
        }
        self.items = list(self.qualities)
        self.tokenizer = data.Tokenizer.toy(
            ["find", *(" " + word for word in POLES + TASTES + KINDS)]
        )

    def model(self):
        """A fresh GPT: three layers of width 64, about 0.2M parameters."""
        return GPT(
            GPTConfig(
                vocab_size=self.tokenizer.vocab_size,
                hidden_size=64,
                intermediate_size=172,
                num_hidden_layers=3,
                num_attention_heads=4,
                num_key_value_heads=4,
                max_position_embeddings=self.max_prompt + self.max_response,
                tie_word_embeddings=False,  # 42 of 299 rows are in use, and tied ones spend the input's width on ruling out the others
            ),
            self.tokenizer,
        )

    def _prompt(self, rng):
        chosen = rng.sample(range(len(POLES) // 2), rng.randint(2, 4))
        return (
            "find"
            + "".join(" " + POLES[2 * quality + rng.randint(0, 1)] for quality in chosen)
            + ":"
        )

    def prompts(self, n, rng):
        """n queries of 2 to 4 qualities."""
        rng = random.Random(int(torch.randint(2**62, (), generator=rng)))
        return [self._prompt(rng) for _ in range(n)]

    def demonstrations(self, n, rng):
        """n rows of one response: a list of 8 to 20 different items in random order."""
        rng = random.Random(int(torch.randint(2**62, (), generator=rng)))
        lists = [
            (self._prompt(rng), rng.sample(self.items, rng.randint(SHORTEST, LONGEST)))
            for _ in range(n)
        ]
        return [
            {
                "prompt": prompt,
                "responses": [",".join(" " + item for item in items)],
                "scores": [1.0],
            }
            for prompt, items in lists
        ]

    def lists(self, n, rng, k=None):
        """n labelled rows of k items (default 10), each one context: scores = relevance, rank = 1 to k by relevance, ties at random.

        No end token is scored: it would count as a part of the last item. ValueError when k is not 2 to 20."""
        k = LENGTH if k is None else k
        if not 2 <= k <= LONGEST:
            raise UserError(f"k={k} must be 2 to {LONGEST}")
        rng, rows = random.Random(int(torch.randint(2**62, (), generator=rng))), []
        for _ in range(n):
            prompt, items = self._prompt(rng), rng.sample(self.items, k)
            scores = self.relevance(prompt, items).tolist()
            best = sorted(range(k), key=lambda j: (-scores[j], rng.random()))
            rank = [best.index(j) + 1 for j in range(k)]
            row = {
                "prompt": prompt,
                "responses": [" " + item for item in items],
                "scores": scores,
                "rank": rank,
            }
            rows.append(
                row
                | {
                    "parents": list(range(-1, k - 1)),
                    "context": [""] + [","] * (k - 1),
                    "ends": [False] * k,
                }
            )
        return rows

    def answers(self, prompt, item):
        """How well an item answers a query (a real number); ValueError for a text that is no query."""
        poles = prompt.removeprefix("find ").removesuffix(":").split()
        if not poles or not set(poles) <= set(POLES):
            raise UserError(f"{prompt!r} is not a query such as 'find cheap cold sweet:'")
        places = [POLES.index(pole) for pole in poles]
        return (
            sum(self.qualities[item][place // 2] * (-1) ** place for place in places)
            / len(places) ** 0.5
        )

    def relevance(self, prompt, items):
        """Grades (K,) float64 of K items among themselves: 3 for the best, 2 for the next two, 1 for the next two, else 0. What is no item
        of this world, or stood in the list before, has 0."""
        items = [item.strip() for item in items]
        score = {item: self.answers(prompt, item) for item in items if item in self.qualities}
        grade = dict(zip(sorted(score, key=score.get, reverse=True), GRADES))
        return torch.tensor([grade.pop(item, 0) for item in items], dtype=torch.float64)

    def reward(self, prompts, responses):
        """The truth: n queries and n whole lists (text or token ids) -> (n,) float64, NDCG@10 of each list, finite for any text.

        Graded among all items, not among those of the list: the ideal is the list of the best items there are, so that neither a
        short list nor one of poor items in good order is a good one. What is no item, or a repetition, takes up its place for nothing."""
        out = []
        for prompt, response in zip(prompts, responses, strict=True):
            text = response if isinstance(response, str) else self.tokenizer.decode(response)
            grade = dict(zip(self.items, self.relevance(prompt, self.items).tolist()))
            listed = torch.tensor([grade.pop(item.strip(), 0.0) for item in text.split(",")])
            out.append(float(dcg(listed, 10) / dcg(torch.tensor(GRADES), 10)))
        return torch.tensor(out, dtype=torch.float64)

    @torch.no_grad()
    def measure(self, policy, lab):
        """NDCG@1, @5 and @10 on 256 new lists of 10. The candidates are scored in one context, by the mean log-prob of their tokens minus
        the reference's (where the lab has one), and put in that order."""
        rows, parts = self.lists(256, lab.rng("lists")), []
        reference = getattr(lab, "reference", None)
        for start in range(0, len(rows), 64):
            batch = data.collate(rows[start : start + 64], self.tokenizer).to(policy.device)
            logps = policy.logps(batch) - (0 if reference is None else reference.logps(batch))
            parts.append(((logps.sum(-1) / batch.mask.sum(-1)).cpu(), batch.scores.cpu()))
        scores, relevance = (torch.cat(part) for part in zip(*parts))
        return {f"ndcg_{k}": float(ndcg(scores, relevance, k).mean()) for k in (1, 5, 10)}
