"""Product reviews: text from a small grammar, with a true reward that can be computed.

A prompt names a product and may hold the first words of a review; the response is the rest of it:

    review of the camera : the lens is | not very sharp but i really like the colors .

The reward is what a careful reader would say: the sentiment, with negation and degree ("not bad" is mildly good, "not" in the prompt turns the
best next word around), less a price for every place where the grammar is broken, for every content word said twice, for every word that belongs
to another product, and for a review that does not end. Sentiment is a mean, so that length alone earns nothing, and no reward of a
pair tells these parts apart: a policy pushed too far trades grammar for praise, and the true reward falls while its own implicit reward rises.

The same clauses make the demonstrations and check the responses. Demonstrations are as often bad-tempered as kind, and a little careless.
"""

import random

import torch

import data
from nanomodel import GPT, GPTConfig

# product: parts (singular), parts (plural), words of praise, words of blame; a word may belong to several products
PRODUCTS = {
    "camera": ("lens zoom flash viewfinder", "pictures colors", "sharp vivid", "blurry grainy"),
    "phone": ("screen speaker charger antenna", "calls apps", "bright responsive", "dim laggy"),
    "hotel": ("lobby pool breakfast view", "rooms beds", "quiet clean", "noisy dirty"),
    "jacket": ("zipper hood lining collar", "pockets sleeves", "warm waterproof", "itchy thin"),
    "novel": ("plot hero ending style", "chapters dialogues", "gripping witty", "predictable wordy"),
    "bicycle": ("saddle frame chain bell", "brakes pedals", "fast agile", "wobbly rusty"),
    "blender": ("motor jar lid blade", "buttons smoothies", "powerful silent", "loud leaky"),
    "laptop": ("keyboard screen hinge fan", "keys ports", "light responsive", "slow bulky"),
    "game": ("story soundtrack map tutorial", "levels puzzles", "addictive clever", "repetitive unfair"),
    "coffee": ("aroma taste roast foam", "beans capsules", "smooth fresh", "bitter stale"),
    "tent": ("floor porch fabric rope", "poles pegs", "roomy waterproof", "damp cramped"),
    "sofa": ("cover frame backrest armrest", "cushions legs", "soft cozy", "saggy creaky"),
}
# opinions by strength; "uses" of each in a clause below
QUALITY = {
    2: "great excellent superb amazing perfect wonderful outstanding fantastic brilliant gorgeous",
    1: "good nice decent pleasant solid useful handy reliable elegant fine neat sensible",
    -1: "bad poor flimsy clumsy awkward cheap ugly odd annoying boring weak fragile",
    -2: "terrible awful horrible dreadful useless hideous pathetic atrocious disgusting unbearable",
}
FEEL = {2: "love adore", 1: "like enjoy trust", -1: "dislike distrust", -2: "hate despise"}
MANNER = {2: "flawlessly perfectly", 1: "well nicely", -1: "badly poorly", -2: "terribly miserably"}
ADVICE = {2: "recommend praise", 1: "buy keep", -1: "return avoid", -2: "ban burn"}
DEGREE = {0.5: "slightly somewhat fairly", 1.0: "quite rather", 1.5: "very really truly", 2.0: "extremely absolutely incredibly"}
PLAIN = {
    "GOT": "bought ordered got borrowed rented",
    "WHEN": "week month year summer winter",
    "WHO": "sister brother mother father neighbor friend boss cousin",
    "USES": "uses wants needs borrows fixes",
    "OFTEN": "day morning evening weekend",
    "COMMON": "price design quality look service warranty",
}
# [ ] may be left out, | separates alternatives, capitals name a class above; A_ and AN_ are its words that go with "a" and with "an"
CLAUSES = """the PART|COMMON|PRODUCT is|was [ DEGREE ] QUALITY
the PARTS are|were [ DEGREE ] QUALITY
it is|was [ DEGREE ] QUALITY
the PART|COMMON|PRODUCT is|was not [ very ] QUALITY
the PARTS are|were not [ very ] QUALITY
it has a A_QUALITY PART|COMMON
it has an AN_QUALITY PART|COMMON
it has [ DEGREE ] QUALITY PARTS
the PART|PRODUCT works|worked [ DEGREE ] MANNER
the PART|PRODUCT does not work MANNER
i FEEL the PART|PARTS|COMMON|PRODUCT
i do not FEEL the PART|PARTS|COMMON|PRODUCT
i would [ not ] ADVICE it|this
i GOT it last WHEN
my WHO USES it every OFTEN"""
JOIN = ("and", "but", "because", "although")
HEAD = "review of the PRODUCT :"
WEIGHTS = {"sentiment": 1.5, "broken": -0.5, "repeated": -0.5, "astray": -0.5, "unended": -1.0}
CENTRE = 0.25  # the reward of the base model is about 0
SLIP = 0.01  # careless words of the demonstrations


def spread(levels):
    """{level: "words"} -> {word: level}."""
    return {word: level for level, words in levels.items() for word in words.split()}


OPINION = spread(QUALITY) | spread(FEEL) | spread(MANNER) | spread(ADVICE)
OPINION |= {word: sign for parts in PRODUCTS.values() for sign, words in ((1, parts[2]), (-1, parts[3])) for word in words.split()}
STRENGTH = spread(DEGREE)
OWN = {product: {product, *" ".join(parts).split()} for product, parts in PRODUCTS.items()}
EVERY_OWN = set().union(*OWN.values())


def classes(products):
    """The word classes for a review of one of `products`: {class: [words]}."""
    parts = [" ".join(column).split() for column in zip(*(PRODUCTS[product] for product in products))]
    table = {name: words.split() for name, words in PLAIN.items()} | {"PRODUCT": list(products), "PART": parts[0], "PARTS": parts[1]}
    table |= {"QUALITY": [*spread(QUALITY), *parts[2], *parts[3]], "DEGREE": list(STRENGTH)}
    table |= {"FEEL": list(spread(FEEL)), "MANNER": list(spread(MANNER)), "ADVICE": list(spread(ADVICE))}
    table["A_QUALITY"] = [word for word in table["QUALITY"] if word[0] not in "aeiou" or word.startswith("use")]
    table["AN_QUALITY"] = [word for word in table["QUALITY"] if word not in table["A_QUALITY"]]
    return {name: list(dict.fromkeys(words)) for name, words in table.items()}


def options(slot, table):
    return [word for name in slot.split("|") for word in table.get(name, [name])]


class World:
    """Text; the truth is `reward`. Nothing is downloaded or kept: two worlds are the same world."""

    name, kind = "reviews", "text"
    max_prompt, max_response = 9, 32
    base = dict(steps=600, batch_size=64, lr=6e-3)
    pairs = dict(prompts=4096, steps=200, lr=5e-4, batch_size=32)

    def __init__(self):
        self.table = {product: classes([product]) for product in PRODUCTS}
        everything = classes(list(PRODUCTS))
        self.content = {word for words in everything.values() for word in words}
        # one state per slot of a clause; arcs[word] = {state: the states it may follow}. State 0 is the boundary between clauses, 1 a complete clause
        self.arcs = {word: {0: [1]} for word in (".", *JOIN)}
        state = 1
        for clause in CLAUSES.splitlines():
            before, slots = [0], clause.split()
            for i, slot in enumerate(slots):
                if slot == "[":
                    skipped = before
                elif slot == "]":
                    before = before + skipped
                else:
                    state += 1
                    to = 1 if i == len(slots) - 1 else state
                    for word in options(slot, everything):
                        arcs = self.arcs.setdefault(word, {})
                        arcs[to] = arcs.get(to, []) + before
                    before = [state]
        words = [*HEAD.replace("PRODUCT", "").split(), *self.arcs]
        self.tokenizer = data.Tokenizer.toy([words[0]] + [" " + word for word in dict.fromkeys(words)])

    def model(self):
        """A fresh GPT: two layers of width 96, about 0.25M parameters."""
        return GPT(
            GPTConfig(
                vocab_size=self.tokenizer.vocab_size,
                hidden_size=96,
                intermediate_size=256,
                num_hidden_layers=2,
                num_attention_heads=4,
                num_key_value_heads=2,
                max_position_embeddings=64,
            ),
            self.tokenizer,
        )

    def clause(self, product, sign, used, rng):
        """The words of one random clause whose opinion, if it has one, has this sign; content words of `used` are avoided and added to it."""
        words, keep, negated = [], True, False
        for slot in rng.choice(CLAUSES.splitlines()).split():
            if slot == "[":
                keep = rng.random() < 0.4
            elif slot == "]":
                keep = True
            elif keep:
                negated |= slot == "not"
                drawn = options(slot, self.table[product])
                fits = [word for word in drawn if word not in used and OPINION.get(word, sign) * sign * (-1 if negated else 1) > 0]
                words.append(rng.choice(fits or drawn))
                used |= self.content & {words[-1]}
        return words

    def review(self, product, rng):
        """The words of one review, without a slip: 1 to 4 clauses in one mood, at most 30 words, and the length of the first clause."""
        mood, used, words, sign = rng.choice((-0.8, 0.0, 0.8)), set(), [], 0
        for _ in range(rng.randint(1, 4)):
            before, sign = sign, 1 if rng.uniform(-1, 1) < mood else -1
            clause = self.clause(product, sign, used, rng)
            if len(words) + len(clause) > 28:
                break
            joint = [rng.choice([".", *JOIN[sign != before :: 2]])] if words else []
            words += joint + clause
            first = first if joint else len(clause)
        return words + ["."], first

    def demonstrations(self, n, rng):
        """n rows of one response each: a random review, its first 0 to 4 words in the prompt, and SLIP of the other words lost, doubled or swapped."""
        rng, rows = random.Random(int(torch.randint(2**62, (), generator=rng))), []
        for _ in range(n):
            product = rng.choice(list(PRODUCTS))
            words, first = self.review(product, rng)
            cut = rng.randint(0, min(4, first - 1))
            prompt, words = [*HEAD.replace("PRODUCT", product).split(), *words[:cut]], words[cut:]
            for i in reversed(range(len(words))):
                if rng.random() < SLIP:
                    words[i : i + 2] = rng.choice([words[i + 1 : i + 2], [words[i], *words[i : i + 2]], words[i : i + 2][::-1]])
            rows.append({"prompt": " ".join(prompt), "responses": ["".join(" " + word for word in words[:31])], "scores": [1.0]})
        return rows

    def prompts(self, n, rng):
        """n prompts, drawn as those of the demonstrations are."""
        return [row["prompt"] for row in self.demonstrations(n, rng)]

    def broken(self, words):
        """The least number of places where the words of a review leave the grammar; a word it does not know is one more."""
        cost = {0: 0}  # state: places so far
        for word in words:
            best = min(cost.values()) + 1  # at a broken place any state may follow
            if word in self.arcs:
                cost = {state: min([best, *(cost.get(b, best) for b in before)]) for state, before in self.arcs[word].items()}
            else:
                cost = dict.fromkeys(cost, best)
        return min(cost.values())

    def parts(self, prompt, response):
        """What the reward is made of: {"sentiment", "broken", "repeated", "astray", "unended"}; text or, for the response, token ids."""
        response = response if isinstance(response, str) else self.tokenizer.decode(response)
        head, _, opening = prompt.partition(" :")
        words = (opening + response).split()
        opinions, sign, degree = [], 1.0, 1.0
        for word in words:
            if word == "." or word in JOIN:
                sign, degree = 1.0, 1.0
            elif word == "not":
                sign = -0.75
            elif word in STRENGTH:
                degree = STRENGTH[word]
            elif word in OPINION:
                opinions.append(OPINION[word] * (sign if sign < 0 else degree))  # "not bad" is mild, "not very good" the same as "not good"
                sign, degree = 1.0, 1.0
        content = [word for word in words if word in self.content]
        foreign = EVERY_OWN - OWN.get(head.split(" ")[-1], EVERY_OWN)
        return {
            "sentiment": sum(opinions) / (1 + len(opinions)),  # the mean with one neutral remark
            "broken": self.broken(words),
            "repeated": len(content) - len(set(content)),
            "astray": sum(word in foreign for word in words),
            "unended": words[-1:] != ["."],
        }

    def reward(self, prompts, responses):
        """The truth: n prompts (text) and n responses (text or token ids) -> (n,) float64, finite for any text."""
        parts = [self.parts(prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
        return torch.tensor([CENTRE + sum(WEIGHTS[name] * value for name, value in part.items()) for part in parts], dtype=torch.float64)

    def measure(self, policy, lab):
        """What the reward of sampled reviews is made of: the mean of each part."""
