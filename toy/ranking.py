"""Ranking in context: a query, a list of dishes, and how well each dish answers the query.

    find cheap cold sweet: | onion cake, tea, apple cheese pie, soup    reward 0.758

The prompt names 2 to 4 qualities by one of their poles (sweet or sour, hot or cold); the response
is a list of dishes in one context. There are 60 dishes of 1 to 3 words. Each word has a random
hidden vector of 8 qualities. The vector of a dish is the sum of its words' vectors, scaled to equal
variance, and the dish answers a query the better, the farther its vector lies towards the named
poles. The text does not show these vectors, so which words are sweet has to be learned from graded
lists. In a list the best dish has relevance 3, the next two 2, the next two 1, and the others 0
(IRPO, arXiv:2504.15477, with one more grade).

The reward of a whole list is its NDCG@10 among all 60 dishes. It cannot be gamed by a short list,
by a good order of poor dishes, by repetitions or by text that is not a dish: each takes up a place
for nothing. Graded lists (`lists`) are chains whose order is random, so a place says nothing about
relevance, and separators are not scored. Demonstrations are lists in random order: the base model
knows the format and the dishes, and nothing about relevance.
"""

import random

import torch

import data
from data import UserError, printable
from nanomodel import GPT, GPTConfig
from toy import world

# two poles per quality
POLES = (
    "sweet sour hot cold light rich cheap fancy crisp soft mild spicy plain festive quick slow"
).split()
TASTES = "apple lemon honey ginger pepper mint bean corn nut plum onion cheese".split()
KINDS = "tea soup pie cake bread salad curry stew toast rice pasta punch".split()
GRADES = (3, 2, 2, 1, 1)  # relevance of the first places
LENGTH = 10  # items of a list by default
SHORTEST, LONGEST = 8, 20  # items of a demonstration


def dcg(relevance, k):
    """Discounted cumulative gain of the first k places: relevance (..., K) in order -> (...).

    It is the sum of (2^relevance - 1) / log2(1 + place), float64.
    """
    top = relevance[..., :k].to(torch.float64)
    place = torch.arange(1, top.shape[-1] + 1, dtype=torch.float64, device=top.device)
    return ((2**top - 1) / torch.log2(1 + place)).sum(-1)


def ndcg(scores, relevance, k):
    """NDCG@k of the order by falling scores: scores, relevance (..., K) -> (...), in [0, 1].

    Equal scores keep their order. A list without a relevant item has 0.
    """
    order = scores.argsort(dim=-1, descending=True, stable=True)
    ideal = dcg(relevance.sort(dim=-1, descending=True).values, k)
    return dcg(relevance.gather(-1, order), k) / ideal.clamp(min=1e-12)


class World(world.World):
    """The world of this file: `relevance` grades items, and `reward` grades a whole list.

    All worlds of this class are equal.
    """

    name, kind = "ranking", "text"
    max_prompt, max_response = 6, 4 * LONGEST  # tokens
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
        words = [" " + word for word in POLES + TASTES + KINDS]
        self.tokenizer = data.Tokenizer.toy(["find", *words])

    def model(self):
        """A new GPT with three layers of width 64, about 0.2M parameters."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=172,
            num_hidden_layers=3,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=self.max_prompt + self.max_response,
            # only 42 of 299 tokens are used; tied embeddings would spend capacity on the others
            tie_word_embeddings=False,
        )
        return GPT(config, self.tokenizer)

    def _prompt(self, rng):
        """A random query; rng: a random.Random."""
        chosen = rng.sample(range(len(POLES) // 2), rng.randint(2, 4))
        poles = [POLES[2 * quality + rng.randint(0, 1)] for quality in chosen]
        return " ".join(["find", *poles]) + ":"

    def prompts(self, n, rng):
        """n queries of 2 to 4 qualities."""
        rng = world.python_rng(rng)
        return [self._prompt(rng) for _ in range(n)]

    def demonstrations(self, n, rng):
        """n rows of one response: a list of 8 to 20 different items in random order."""
        rng, rows = world.python_rng(rng), []
        for _ in range(n):
            prompt = self._prompt(rng)
            items = rng.sample(self.items, rng.randint(SHORTEST, LONGEST))
            response = ",".join(" " + item for item in items)
            rows.append(dict(prompt=prompt, responses=[response], scores=[1.0]))
        return rows

    def lists(self, n, rng, k=None):
        """n graded rows of k items (default 10) in one context, in random order.

        scores: the relevance of each item. rank: 1 to k by relevance, with ties in random order.
        End-of-text is not scored, since it would count as a part of the last item. UserError: k is
        not 2 to 20.
        """
        k = LENGTH if k is None else k
        if not 2 <= k <= LONGEST:
            raise UserError(f"k={k} must be 2 to {LONGEST}")
        rng, rows = world.python_rng(rng), []
        for _ in range(n):
            prompt, items = self._prompt(rng), rng.sample(self.items, k)
            scores = self.relevance(prompt, items).tolist()
            best = sorted(range(k), key=lambda j: (-scores[j], rng.random()))
            rows.append(
                dict(
                    prompt=prompt,
                    responses=[" " + item for item in items],
                    scores=scores,
                    rank=[best.index(j) + 1 for j in range(k)],
                    parents=list(range(-1, k - 1)),  # a chain: each item continues the one before
                    context=[""] + [","] * (k - 1),
                    ends=[False] * k,
                )
            )
        return rows

    def answers(self, prompt, item):
        """How well an item answers a query, as a real number. UserError: it is not a query."""
        poles = prompt.removeprefix("find ").removesuffix(":").split()
        if not poles or not set(poles) <= set(POLES):
            raise UserError(
                f"'{printable(prompt, 60)}' is not a query such as 'find cheap cold sweet:'"
            )
        places = [POLES.index(pole) for pole in poles]
        towards = sum(self.qualities[item][place // 2] * (-1) ** place for place in places)
        return towards / len(places) ** 0.5

    def relevance(self, prompt, items):
        """Grades (K,) float64 of K items compared with each other: 3, 2, 2, 1, 1, and then 0.

        An item that this world does not have, or that occurred earlier in the list, has 0.
        """
        items = [item.strip() for item in items]
        score = {item: self.answers(prompt, item) for item in items if item in self.qualities}
        grade = dict(zip(sorted(score, key=score.get, reverse=True), GRADES))
        return torch.tensor([grade.pop(item, 0) for item in items], dtype=torch.float64)

    def reward(self, prompts, responses):
        """The true reward of n lists (text or token ids) for n queries, (n,) float64: NDCG@10.

        Items are graded among all items of the world, not among those of the list, and the ideal
        list holds the best of all items. It is finite for any text. UserError: it is not a query.
        """
        out = []
        for prompt, response in zip(prompts, responses, strict=True):
            grade = dict(zip(self.items, self.relevance(prompt, self.items).tolist()))
            items = self.text(response).split(",")
            listed = torch.tensor([grade.pop(item.strip(), 0.0) for item in items])
            out.append(float(dcg(listed, 10) / dcg(torch.tensor(GRADES), 10)))
        return torch.tensor(out, dtype=torch.float64)

    @torch.no_grad()
    def measure(self, policy, lab):
        """{ndcg_1, ndcg_5, ndcg_10} on 256 new lists of 10.

        The candidates of a list are scored in one context and sorted by their scores. A score is
        the mean log-prob of an item's tokens, minus that of the reference if there is one.
        """
        rows, parts = self.lists(256, lab.rng("lists")), []
        for start in range(0, len(rows), 64):
            batch = data.collate(rows[start : start + 64], self.tokenizer).to(policy.device)
            logps = policy.logps(batch)
            if lab.reference is not None:
                logps = logps - lab.reference.logps(batch)
            parts.append(((logps.sum(-1) / batch.mask.sum(-1)).cpu(), batch.scores.cpu()))
        scores, relevance = (torch.cat(part) for part in zip(*parts))
        return {f"ndcg_{k}": float(ndcg(scores, relevance, k).mean()) for k in (1, 5, 10)}
