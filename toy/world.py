"""What a world is: its prompts, its demonstrations, its true reward, and the model that fits.

Every world subclasses `World` and sets what it has; the rest keeps the default given here. The Lab
reads these attributes directly, so a world without a known truth leaves `reward` at None. A world
draws random numbers from the generator that it is given and from nothing else, and writes no files.
"""

import random

import torch


def python_rng(rng):
    """A random.Random whose seed is drawn from a torch.Generator."""
    return random.Random(int(torch.randint(2**62, (), generator=rng)))


class World:
    """The interface of all worlds: what a world may set, and what each default means."""

    # what the world is
    name = "world"  # what the header, the tables and the cache call it
    kind = "text"  # "text", "images", or "table" (prompts are numbers, everything is exact)
    tokenizer = None  # a data.Tokenizer, in a world of text
    max_response = None  # tokens that are sampled for a response at most

    # recipes: defaults of the run settings, which flags override
    pretrain = None  # base model: dict(steps, batch_size, lr[, demonstrations]); None: no training
    align = {}  # alignment: dict(prompts, steps, lr, batch_size[, k])

    # the truth
    reward = None  # (prompts, responses) -> (n,) float64, the true reward; None: it is not known
    prefers = None  # (prompts, a, b) -> (n,) P(a beats b); None: sigmoid of the reward difference
    proxies = {}  # {name: (prompts, responses) -> (n,)}: imperfect estimators of the truth
    verifier = False  # True: rewards are 0 or 1 and are the labels, without an annotator's noise
    verify_steps = None  # (prompt, response) -> a bool per step; None: there are no steps to check
    frechet = None  # images (n, C, H, W) -> distance from the data; None: not defined here

    # rows that the world has of its own
    lists = None  # (n, rng, k=None) -> n graded lists; None: lists are sampled and labelled
    given = None  # k -> the training rows of the user's file; None: rows are sampled
    held_out = None  # rows of the user's file that are kept for the evaluation
    single = False  # True: rows are single responses with a label, so nothing can be compared
    counts = {}  # {reason: rows of the user's file that are left out for it}

    def model(self):
        """A fresh model (GPT, UNet, a denoiser or a Table); weights from the global generator."""
        raise NotImplementedError(f"{type(self).__name__} has no model")

    def prompts(self, n, rng):
        """n prompts: texts, classes, or numbers of a table's prompts."""
        raise NotImplementedError(f"{type(self).__name__} has no prompts")

    def demonstrations(self, n, rng):
        """n rows of one response, dict(prompt, responses, scores=[1.0]), for the base model."""
        raise NotImplementedError(f"{type(self).__name__} has no demonstrations")

    def text(self, response):
        """A response, text or token ids, as text."""
        return response if isinstance(response, str) else self.tokenizer.decode(response)

    def rewards(self):
        """Tables only: the truth of all responses, (P, R) float64."""
        raise NotImplementedError(f"{type(self).__name__} is not a table")

    def key(self):
        """What tells this world from others of its class, for cache keys; JSON can hold it."""
        return self.name

    def measure(self, policy, lab):
        """Further numbers that are natural here, {name: number}; they join every evaluation."""
        return {}

    def picture(self, before, after):
        """A Figure of samples (classes, k, C, H, W) of two models; None: nothing can be drawn."""
        return None
