"""Captions: what is on a picture, and what a caption only makes up.

    picture x49 x108 x93 x103 x36 x17 : a goat and a fence .

A picture is a line of patches: two of the background, which tell the scene, then one or two of each of its 2 to 4 objects. Every object
has three patches of its own, whose numbers say nothing: seeing has to be learnt. Most objects are typical of the scene. Demonstrations go
through a picture in order, leave some objects out and name typical ones that are not there, as people do: a base model has eyes and a
language prior, and it hallucinates. The truth counts that: a share of two points for each object named, less a price for each that is not
on the picture, for each named again, and for a sentence that is none. (On this picture are a goat and a tractor.)

`similarity` is an estimator from elsewhere, as CLIP is for photographs: frozen, blurred, and on another scale than the truth.
"""

import random

import torch

import data
from nanomodel import GPT, GPTConfig
from toy import world

SCENES = {
    "kitchen": "cup knife pan kettle spoon bowl",
    "street": "car bus lamp sign bicycle taxi",
    "park": "dog tree bench kite squirrel fountain",
    "office": "desk laptop phone folder printer mug",
    "beach": "boat towel shell surfboard parasol gull",
    "farm": "horse tractor barn fence sheep goat",
}
TYPICAL = {scene: objects.split() for scene, objects in SCENES.items()}
OBJECTS = [name for objects in TYPICAL.values() for name in objects]
PATCHES = 3  # of an object, and of a scene's background
HEAD = "picture"
WEIGHTS = {"named": 2.0, "hallucinated": -1.0, "repeated": -0.5, "broken": -1.0}
OMIT, INVENT = (
    0.15,
    0.5,
)  # how often a demonstration leaves an object out, and names a typical one that is not there


class World(world.World):
    """Text. The truth is `reward`, `parts` shows its working; two worlds are the same world."""

    name, kind = "captions", "text"
    max_prompt, max_response = 12, 24
    pretrain = dict(steps=800, batch_size=64, lr=5e-3, demonstrations=16384)
    align = dict(prompts=4096, steps=200, lr=3e-4, batch_size=64)

    def __init__(self):
        rng = random.Random(0)
        shown = OBJECTS + list(SCENES)
        codes = [f"x{i:02d}" for i in range(len(shown) * PATCHES)]
        rng.shuffle(codes)
        self.patches = {
            name: codes[i * PATCHES : (i + 1) * PATCHES] for i, name in enumerate(shown)
        }
        self.shows = {code: name for name, own in self.patches.items() for code in own}
        self.tokenizer = data.Tokenizer.toy(
            [HEAD, *(" " + word for word in (*sorted(codes), ":", "a", ",", "and", ".", *OBJECTS))]
        )
        # the eyes and the words of `similarity`
        self.words = {name: torch.tensor([rng.gauss(0, 1) for _ in range(16)]) for name in OBJECTS}
        self.eyes = {
            code: (self.words[name] if name in self.words else 0)
            + torch.tensor([rng.gauss(0, 0.8) for _ in range(16)])
            for code, name in self.shows.items()
        }
        self.proxies = {"similarity": self.similarity}

    def model(self):
        """A fresh GPT: two layers of width 80, about 0.2M parameters."""
        shape = dict(
            hidden_size=80,
            intermediate_size=216,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
        )
        return GPT(
            GPTConfig(vocab_size=self.tokenizer.vocab_size, max_position_embeddings=48, **shape),
            self.tokenizer,
        )

    def view(self, rng):
        """A random picture -> (prompt, its objects, its scene)."""
        scene, objects = rng.choice(list(SCENES)), []
        for _ in range(rng.randint(2, 4)):
            pool = TYPICAL[scene] if rng.random() < 0.75 else OBJECTS
            objects.append(rng.choice([name for name in pool if name not in objects]))
        seen = [
            rng.choice(self.patches[name]) for name in objects for _ in range(rng.randint(1, 2))
        ]
        words = [HEAD, *(rng.choice(self.patches[scene]) for _ in range(2)), *seen, ":"]
        return " ".join(words), objects, scene

    def caption(self, objects):
        """The sentence that names these objects, in this order."""
        items = [f" a {name}" for name in objects]
        return " ,".join(items[:-1]) + " and" * (len(items) > 1) + items[-1] + " ."

    def demonstrations(self, n, rng):
        """n rows of one response each: a caption that leaves objects out and makes some up."""
        rng, rows = random.Random(int(torch.randint(2**62, (), generator=rng))), []
        for _ in range(n):
            prompt, objects, scene = self.view(rng)
            named = [name for name in objects if rng.random() >= OMIT] or objects[:1]
            if rng.random() < INVENT:
                named.insert(
                    rng.randint(0, len(named)),
                    rng.choice([name for name in TYPICAL[scene] if name not in objects]),
                )
            rows.append({"prompt": prompt, "responses": [self.caption(named)], "scores": [1.0]})
        return rows

    def prompts(self, n, rng):
        """n pictures, drawn as those of the demonstrations are."""
        return [row["prompt"] for row in self.demonstrations(n, rng)]

    def objects(self, prompt):
        """The set of objects on a picture; what is no patch shows nothing."""
        return {self.shows[word] for word in prompt.split() if word in self.shows} - set(SCENES)

    def parts(self, prompt, response):
        """What the reward of one response (text or token ids) is made of: {name of WEIGHTS: number}, to be weighed and summed."""
        response = response if isinstance(response, str) else self.tokenizer.decode(response)
        there, named = (
            self.objects(prompt),
            [word for word in response.split() if word in self.words],
        )
        return {
            "named": len(there & set(named)) / max(1, len(there)),
            "hallucinated": len(set(named) - there),
            "repeated": len(named) - len(set(named)),
            "broken": float(not named or response != self.caption(named)),
        }

    def reward(self, prompts, responses):
        """The truth: n prompts (text) and n responses (text or token ids) -> (n,) float64, finite for any text."""
        parts = [
            self.parts(prompt, response)
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(
            [sum(WEIGHTS[name] * value for name, value in part.items()) for part in parts],
            dtype=torch.float64,
        )

    def similarity(self, prompts, responses):
        """Cosine (n,) of what blurred eyes see on n pictures and the words of n captions; 0 for a caption without objects."""
        out = []
        for prompt, response in zip(prompts, responses, strict=True):
            response = response if isinstance(response, str) else self.tokenizer.decode(response)
            seen = sum(
                (self.eyes[word] for word in prompt.split() if word in self.eyes), torch.zeros(16)
            )
            said = sum(
                (self.words[word] for word in response.split() if word in self.words),
                torch.zeros(16),
            )
            out.append(torch.cosine_similarity(seen, said, dim=0))
        return torch.stack(out).double()

    def measure(self, policy, lab):
        """On 512 sampled captions: the share with a hallucination, hallucinations as a share of the objects named (CHAIR's two numbers),
        and the share of the objects on a picture that are named."""
        rows = lab.sample(
            policy, self.prompts(512, lab.rng("measure prompts")), 1, lab.rng("measure samples")
        )
        parts = [self.parts(row["prompt"], row["responses"][0]) for row in rows]
        found, wrong = (sum(part[name] for part in parts) for name in ("named", "hallucinated"))
        right = sum(
            part["named"] * len(self.objects(row["prompt"])) for part, row in zip(parts, rows)
        )
        wrong_captions = sum(part["hallucinated"] > 0 for part in parts)
        return {
            "chair_s": wrong_captions / len(rows),
            "chair_i": wrong / max(1.0, wrong + right),
            "named": found / len(rows),
        }
