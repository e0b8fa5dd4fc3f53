"""The larger of two digits: a world with a verifier for the short runs of an assignment.

    38= | 8    reward 1

A prompt has two digits and "=", and a response should be the larger one. The reward is 1 if the
response is that digit and nothing else, else 0. Six in ten demonstrations are right and the others
are the smaller digit or a random one, so a base model is right in about six of ten samples, and a
method that learns from the verifier soon does better. The reward cannot be gamed.
"""

import torch

import data
from nanomodel import GPT, GPTConfig
from toy import world

RIGHT = 0.6  # the share of demonstrations that are right


class World(world.World):
    """The world of this file. All worlds of this class are equal."""

    name, kind, verifier = "larger", "text", True
    max_response = 2  # tokens: the digit and end-of-text
    pretrain = dict(steps=300, batch_size=32, lr=3e-3)
    align = dict(prompts=64, steps=80, lr=3e-3, batch_size=16, k=8)

    def __init__(self):
        self.tokenizer = data.Tokenizer.toy([])

    def model(self):
        """A new GPT with one layer of width 32."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=1,
            max_position_embeddings=16,
        )
        return GPT(config, self.tokenizer)

    def prompts(self, n, rng):
        """n prompts, such as "38="."""
        digits = torch.randint(10, (n, 2), generator=rng).tolist()
        return [f"{a}{b}=" for a, b in digits]

    def demonstrations(self, n, rng):
        """n rows with one digit each, RIGHT of which are right."""
        rows = []
        for prompt in self.prompts(n, rng):
            digits = sorted(prompt[:2])
            other = [digits[0], str(int(torch.randint(10, (), generator=rng)))]
            wrong = other[int(torch.randint(2, (), generator=rng))]
            right = torch.rand((), generator=rng) < RIGHT
            response = digits[1] if right else wrong
            rows.append(dict(prompt=prompt, responses=[response], scores=[1.0]))
        return rows

    def reward(self, prompts, responses):
        """1 for the larger digit and nothing else, otherwise 0: (n,) float64."""
        right = [
            self.text(response) == max(prompt[:2])
            for prompt, response in zip(prompts, responses, strict=True)
        ]
        return torch.tensor(right, dtype=torch.float64)
