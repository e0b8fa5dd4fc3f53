"""Product reviews: text from a small grammar, with a computable true reward.

    review of the camera : the lens is | not very sharp but i love the colors .    reward 0.875

The prompt names a product and may hold the first words of its review; the response is the rest, up
to 32 words. The reward is the sentiment of the whole review, with degrees and negation: "not bad"
is mildly good, and after a prompt that ends in "not" the best next word is a negative one. The
reward is reduced for each place where the grammar is broken, for each repeated content word, for
each word that belongs to another product, and for a review that does not end. Sentiment is a mean
over opinions, so length alone earns nothing.

Labels only say which of two reviews is better. A policy that is optimized too strongly on them
praises with broken grammar and repetition: its true reward falls while its implicit reward still
rises (over-optimization). The same clauses generate the demonstrations and check the responses.
Demonstrations praise and blame equally often, and contain a few errors.
"""

import torch

import data
from nanomodel import GPT, GPTConfig
from toy import world

# product: parts (singular), parts (plural), words of praise, words of blame
# (a word may belong to several products)
PRODUCTS = {
    "camera": ("lens zoom flash viewfinder", "pictures colors", "sharp vivid", "blurry grainy"),
    "phone": ("screen speaker charger antenna", "calls apps", "bright responsive", "dim laggy"),
    "hotel": ("lobby pool breakfast view", "rooms beds", "quiet clean", "noisy dirty"),
    "jacket": ("zipper hood lining collar", "pockets sleeves", "warm waterproof", "itchy thin"),
    "novel": (
        "plot hero ending style",
        "chapters dialogues",
        "gripping witty",
        "predictable wordy",
    ),
    "bicycle": ("saddle frame chain bell", "brakes pedals", "fast agile", "wobbly rusty"),
    "blender": ("motor jar lid blade", "buttons smoothies", "powerful silent", "loud leaky"),
    "laptop": ("keyboard screen hinge fan", "keys ports", "light responsive", "slow bulky"),
    "game": (
        "story soundtrack map tutorial",
        "levels puzzles",
        "addictive clever",
        "repetitive unfair",
    ),
    "coffee": ("aroma taste roast foam", "beans capsules", "smooth fresh", "bitter stale"),
    "tent": ("floor porch fabric rope", "poles pegs", "roomy waterproof", "damp cramped"),
    "sofa": ("cover frame backrest armrest", "cushions legs", "soft cozy", "saggy creaky"),
}
# words that carry an opinion, by its strength; a word of DEGREE multiplies it
LEVELS = {
    "QUALITY": {
        2: "great excellent superb amazing perfect wonderful outstanding fantastic "
        "brilliant gorgeous",
        1: "good nice decent pleasant solid useful handy reliable elegant fine neat sensible",
        -1: "bad poor flimsy clumsy awkward cheap ugly odd annoying boring weak fragile",
        -2: "terrible awful horrible dreadful useless hideous pathetic atrocious "
        "disgusting unbearable",
    },
    "FEEL": {2: "love adore", 1: "like enjoy trust", -1: "dislike distrust", -2: "hate despise"},
    "MANNER": {
        2: "flawlessly perfectly",
        1: "well nicely",
        -1: "badly poorly",
        -2: "terribly miserably",
    },
    "ADVICE": {2: "recommend praise", 1: "buy keep", -1: "return avoid", -2: "ban burn"},
    "DEGREE": {
        0.5: "slightly somewhat fairly",
        1.0: "quite rather",
        1.5: "very really truly",
        2.0: "extremely absolutely incredibly",
    },
}
PLAIN = {
    "GOT": "bought ordered got borrowed rented",
    "WHEN": "week month year summer winter",
    "WHO": "sister brother mother father neighbor friend boss cousin",
    "USES": "uses wants needs borrows fixes",
    "OFTEN": "day morning evening weekend",
    "COMMON": "price design quality look service warranty",
}
# [ ] may be left out, | separates alternatives, capitals name a class of words;
# A_QUALITY and AN_QUALITY follow "a" and "an"
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
my WHO USES it every OFTEN""".splitlines()
JOIN = ("and", "but", "because", "although")
HEAD = "review of the PRODUCT :"
WEIGHTS = {"sentiment": 1.5, "broken": -0.5, "repeated": -0.5, "astray": -0.5, "unended": -1.0}
CENTRE = 0.25  # a constant that gives the base model a reward of about 0
SLIP = 0.01  # probability that a word of a demonstration is lost, doubled or swapped


STRENGTH = {
    name: {word: level for level, words in levels.items() for word in words.split()}
    for name, levels in LEVELS.items()
}
DEGREE = STRENGTH["DEGREE"]
OPINION = {
    word: level
    for name in ("QUALITY", "FEEL", "MANNER", "ADVICE")
    for word, level in STRENGTH[name].items()
}
OPINION |= {
    word: sign
    for parts in PRODUCTS.values()
    for sign, words in ((1, parts[2]), (-1, parts[3]))
    for word in words.split()
}
OWN = {product: {product, *" ".join(parts).split()} for product, parts in PRODUCTS.items()}
EVERY_OWN = set().union(*OWN.values())


def classes(products):
    """The word classes for reviews of the `products`: {class: [words]}."""
    columns = zip(*(PRODUCTS[product] for product in products))
    parts = [" ".join(column).split() for column in columns]
    table = {name: words.split() for name, words in PLAIN.items()}
    table |= {name: list(levels) for name, levels in STRENGTH.items()}
    table |= {
        "PRODUCT": list(products),
        "PART": parts[0],
        "PARTS": parts[1],
        "QUALITY": [*table["QUALITY"], *parts[2], *parts[3]],
    }
    table["AN_QUALITY"] = [
        word for word in table["QUALITY"] if word[0] in "aeiou" and not word.startswith("use")
    ]
    table["A_QUALITY"] = [word for word in table["QUALITY"] if word not in table["AN_QUALITY"]]
    return table


class World(world.World):
    """The world of this file; `parts` gives the terms of a reward. All such worlds are equal."""

    name, kind = "reviews", "text"
    max_prompt, max_response = 9, 32  # in tokens, which are words
    pretrain = dict(steps=600, batch_size=64, lr=6e-3, demonstrations=16384)
    align = dict(prompts=4096, steps=200, lr=7e-4, batch_size=64, eval_size=1000)

    def __init__(self):
        self.table = {product: classes([product]) for product in PRODUCTS}
        everything = classes(list(PRODUCTS))
        self.content = {word for words in everything.values() for word in words} - set(DEGREE)
        # the grammar as an automaton, {word: {state: states before it}}: a clause begins in state
        # 0, and every other state is a slot of a clause
        state, complete = 0, []
        self.arcs = {word: {0: complete} for word in (".", *JOIN)}
        for clause in CLAUSES:
            before = [0]
            for slot in clause.split():
                if slot == "[":
                    skipped = before
                elif slot == "]":
                    before = before + skipped
                else:
                    state += 1
                    words = [w for name in slot.split("|") for w in everything.get(name, [name])]
                    for word in words:
                        self.arcs.setdefault(word, {})[state] = before
                    before = [state]
            complete += before
        self.states = {word: frozenset(arcs) for word, arcs in self.arcs.items()}
        self.reached = {}  # {(states, word): the states that follow}, filled as they are met
        first, *head = HEAD.split()
        self.tokenizer = data.Tokenizer.toy([first] + [" " + word for word in (*head, *self.arcs)])

    def model(self):
        """A new GPT with two layers of width 96, about 0.25M parameters."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=96,
            intermediate_size=256,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return GPT(config, self.tokenizer)

    def clause(self, product, sign, used, rng):
        """The words of a random clause whose opinion, if it has one, has this sign (1 or -1).

        used: a set of content words to avoid; the clause's own are added. rng: a random.Random.
        """
        words, keep, negated = [], True, False
        table = self.table[product]
        for slot in rng.choice(CLAUSES).split():
            if slot == "[":
                keep = rng.random() < 0.4
            elif slot == "]":
                keep = True
            elif keep:
                negated |= slot == "not"
                wanted = -sign if negated else sign
                drawn = [word for name in slot.split("|") for word in table.get(name, [name])]
                fits = [w for w in drawn if w not in used and OPINION.get(w, sign) * wanted > 0]
                words.append(rng.choice(fits or drawn))
                used |= self.content & {words[-1]}
        return words

    def review(self, product, rng, mood=None, clauses=4):
        """(words, length of the first clause) of a review without errors; rng: a random.Random.

        It has 1 to `clauses` clauses of one prevailing mood, and at most 29 words. mood: from -1
        (every opinion is negative) to 1; None: -0.8, 0 or 0.8, drawn for this review.
        """
        mood = rng.choice((-0.8, 0.0, 0.8)) if mood is None else mood
        used, words, sign, first = set(), [], 0, 0
        for _ in range(rng.randint(1, clauses)):
            before, sign = sign, 1 if rng.uniform(-1, 1) < mood else -1
            clause = self.clause(product, sign, used, rng)
            if len(words) + len(clause) > 28:
                break
            # "and" or "because" joins clauses of one opinion, "but" or "although" opposite ones
            joint = [".", *JOIN[sign != before :: 2]]
            words += [rng.choice(joint), *clause] if words else clause
            first = first or len(clause)
        return words + ["."], first

    def demonstrations(self, n, rng, slip=SLIP, mood=None, clauses=4):
        """n rows of one response each: a random review with a few errors.

        Its first 0 to 4 words are part of the prompt, and these have no errors. slip: the
        probability of an error at a word. mood, clauses: as in `review`.
        """
        rng, rows = world.python_rng(rng), []
        for _ in range(n):
            product = rng.choice(list(PRODUCTS))
            words, first = self.review(product, rng, mood, clauses)
            cut = rng.randint(0, min(4, first - 1))
            prompt = [*HEAD.replace("PRODUCT", product).split(), *words[:cut]]
            words = words[cut:]
            for i in reversed(range(len(words))):
                if rng.random() < slip:  # drop the word, double it, or swap it with the next
                    lost, doubled = words[i + 1 : i + 2], [words[i], *words[i : i + 2]]
                    words[i : i + 2] = rng.choice([lost, doubled, words[i : i + 2][::-1]])
            response = "".join(" " + word for word in words[:31])
            rows.append(dict(prompt=" ".join(prompt), responses=[response], scores=[1.0]))
        return rows

    def teacher(self, n, rng):
        """n rows by a better writer: no errors, 1 to 3 clauses, three opinions in four positive."""
        return self.demonstrations(n, rng, slip=0.0, mood=0.5, clauses=3)

    def prompts(self, n, rng):
        """n prompts with the distribution of those of the demonstrations."""
        return [row["prompt"] for row in self.demonstrations(n, rng)]

    def broken(self, words):
        """The least number of places at which a review (a list of words) breaks the grammar.

        Every word that is not in the grammar is one such place.
        """
        # states in which it has broken the grammar least often so far; in any other, once more
        least, last, places = frozenset([0]), frozenset([0]), 0
        for word in words:
            if word not in self.arcs:
                least, places = last, places + 1
                continue
            if (least, word) not in self.reached:
                arcs = self.arcs[word].items()
                followers = (state for state, before in arcs if not least.isdisjoint(before))
                self.reached[least, word] = frozenset(followers)
            followers, last = self.reached[least, word], self.states[word]
            least, places = followers or last, places + (not followers)
        return places

    def parts(self, prompt, response):
        """The terms of the reward of one response (text or token ids): {name: number}.

        The reward is CENTRE plus the sum of these numbers, weighted by WEIGHTS.
        """
        head, _, opening = prompt.partition(" :")
        words = opening.split() + self.text(response).split()
        opinions, sign, degree = [], 1.0, 1.0
        for word in words:
            if word == "." or word in JOIN:
                sign, degree = 1.0, 1.0
            elif word == "not":
                sign = -0.75
            elif word in DEGREE:
                degree = DEGREE[word]
            elif word in OPINION:
                # a degree after "not" is ignored: "not very good" means "not good"
                opinions.append(OPINION[word] * (degree if sign > 0 else sign))
                sign, degree = 1.0, 1.0
        content = [word for word in words if word in self.content]
        foreign = EVERY_OWN - OWN.get(head.split(" ")[-1], EVERY_OWN)
        return {
            "sentiment": sum(opinions) / (1 + len(opinions)),  # mean with a neutral one added
            "broken": self.broken(words),
            "repeated": len(content) - len(set(content)),
            "astray": sum(word in foreign for word in words),
            "unended": float(words[-1:] != ["."]),
        }

    def reward(self, prompts, responses):
        """The true reward of n responses (text or token ids) to n prompts (text), (n,) float64.

        It is finite for any text.
        """
        out = []
        for prompt, response in zip(prompts, responses, strict=True):
            parts = self.parts(prompt, response)
            out.append(CENTRE + sum(WEIGHTS[name] * value for name, value in parts.items()))
        return torch.tensor(out, dtype=torch.float64)
