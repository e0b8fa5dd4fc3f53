"""Drift: the pictures of captions, judged by two groups of readers, one after the other.

    picture x49 x108 x93 x103 x36 x17 : | a goat and a fence .    reward 0.25

The first group wants every object of the picture to be named, and does not mind others; the second
dislikes objects that are not there, and does not mind missing ones. Both dislike repetitions and
broken sentences. `tastes` are their rewards, for methods that see a stream of preferences, and the
true reward is the mean of both: a policy that learns from the second group alone names less and
less. In the example one of two objects is named and a fence is hallucinated, so the tastes are 2
and -1.5. The second group alone can be gamed by naming one sure object, the first by naming
everything.
"""

import torch

from toy import captions

TASTES = (
    {"named": 4.0, "hallucinated": 0.0, "repeated": -0.5, "broken": -1.0},
    {"named": 0.0, "hallucinated": -1.5, "repeated": -0.5, "broken": -1.0},
)


class World(captions.World):
    """The world of this file. All worlds of this class are equal."""

    name = "drift"
    align = captions.World.align | dict(prompts=10240, steps=320, lr=5e-3, batch_size=32)

    def __init__(self):
        super().__init__()
        self.tastes = tuple(self.taste_of(weights) for weights in TASTES)

    def taste_of(self, weights):
        """The reward of a group of readers, a function (prompts, responses) -> (n,) float64."""

        def taste(prompts, responses):
            found = [self.parts(x, y) for x, y in zip(prompts, responses, strict=True)]
            values = [sum(weights[name] * part[name] for name in part) for part in found]
            return torch.tensor(values, dtype=torch.float64)

        return taste

    def reward(self, prompts, responses):
        """The mean taste of both groups, (n,) float64; finite for any text."""
        return sum(taste(prompts, responses) for taste in self.tastes) / len(self.tastes)

    def measure(self, policy, lab):
        """The measurements of captions, and both tastes, of 512 sampled captions."""
        prompts = self.prompts(512, lab.rng("measure prompts"))
        rows = lab.sample(policy, prompts, 1, lab.rng("measure samples"))
        texts = [self.text(row["responses"][0]) for row in rows]
        tastes = [float(taste(prompts, texts).mean()) for taste in self.tastes]
        found = {f"taste_{i + 1}": value for i, value in enumerate(tastes)}
        return super().measure(policy, lab) | found | {"least_taste": min(tastes)}
