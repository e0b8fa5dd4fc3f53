"""Deep: reviews, written by a GPT of six layers, for questions about layers.

    review of the camera : the lens is | not very sharp but i love the colors .    reward 0.875

Prompts, demonstrations and reward are those of reviews. The model has six layers of width 64, and
so about as many parameters, but enough depth to ask where in it alignment changes something. The
reward can be gamed as little as that of reviews.
"""

from nanomodel import GPT, GPTConfig
from toy import reviews


class World(reviews.World):
    """The world of this file. All worlds of this class are equal."""

    name = "deep"
    align = reviews.World.align | dict(prompts=4096, steps=150, lr=5e-4, batch_size=32)

    def model(self):
        """A new GPT with six layers of width 64, about 0.3M parameters."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=64,
            intermediate_size=176,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
        return GPT(config, self.tokenizer)
