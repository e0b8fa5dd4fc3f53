"""The interface of a world: its prompts, demonstrations, true reward, and the model that fits it.

Every world is a subclass of `World` that sets the attributes it has and inherits the defaults of
the others. The Lab reads these attributes directly; a world without a true reward, for example,
leaves `reward` at None. A world draws random numbers only from the generator that it is given, and
writes no files.
"""

import random

import torch


def python_rng(rng):
    """A random.Random whose seed is drawn from a torch.Generator."""
    return random.Random(int(torch.randint(2**62, (), generator=rng)))


def noisy(right, ended, rng):
    """Values of beginnings that are right or not, as a noisy self-evaluation gives them: (n,).

    0.7 for a right and 0.3 for a wrong one, plus noise of standard deviation 0.3, between 0 and 1.
    At the end the verdict is added, 1 or -1.
    """
    sign = 2 * torch.tensor(right, dtype=torch.float64) - 1
    noise = torch.randn(len(sign), generator=rng, dtype=torch.float64)
    return (0.5 + 0.2 * sign + 0.3 * noise).clamp(0, 1) + sign * torch.tensor(ended)


class World:
    """The interface of all worlds: the attributes that a world may set, with their defaults."""

    # the kind of world
    name = "world"  # its name in headers, tables and the cache
    # a table has numbers as prompts and everything is exact; vectors are features and classes,
    # without a model, a policy or a reward
    kind = "text"  # "text", "images", "table" or "vectors"
    tokenizer = None  # a data.Tokenizer, in a world of text
    max_response = None  # the largest number of tokens that are sampled for a response

    # recipes: defaults of the run settings, which flags override
    pretrain = None  # base model: dict(steps, batch_size, lr[, demonstrations]); None: no training
    align = {}  # alignment: dict(prompts, steps, lr, batch_size[, k])

    # the true reward
    reward = None  # (prompts, responses) -> (n,) float64, the true reward; None: it is unknown
    prefers = None  # (prompts, a, b) -> (n,) P(a beats b); None: sigmoid of the reward difference
    proxies = {}  # {name: (prompts, responses) -> (n,)}: imperfect estimators of the truth
    tastes = ()  # rewards (prompts, responses) -> (n,) of groups that annotate one after the other
    parts = None  # (prompt, response) -> {name: number}: the terms of the reward of a response
    verifier = False  # True: rewards are 0 or 1 and are the labels, without an annotator's noise
    verify_steps = None  # (prompt, response) -> a bool per step; None: steps cannot be checked
    judge = None  # (prompts, beginnings, ended, rng) -> (n,) values, plus 1 or -1 at the end
    frechet = None  # images (n, C, H, W) -> distance from the data; None: it is not defined
    guided = False  # True: the base model is trained with dropped prompts, so --guidance works
    gallery = None  # the prompts of the pictures of a run; None: every class
    opinions = None  # (prompts, images) -> {name: (n,)}: imperfect reward models; None: none
    criteria = None  # (prompts, images) -> (n, C): the scores that annotators weigh; None: none
    contexts = None  # prompts -> (n,): the kinds of prompts, on which the weights depend
    annotators = None  # their weights, C numbers for each kind of prompt

    # further numbers of a model (policy); lab: the lab.Lab of its run
    measure = None  # (policy, lab) -> {name: number}, measured in every evaluation; None: nothing
    look = None  # (policy, lab) -> {name: number}, quick ones for the looks during training
    explain = None  # {name: number} of an evaluation -> a sentence on what one means, or ""

    # a world of programs
    execute = None  # (program, test) -> bool, texts; None: there is no interpreter
    asks_test = None  # prompts -> prompts that ask for a test of the same task
    agreement = None  # (prompt, program) -> the share of inputs on which a program is right

    # a world of vectors
    features = None  # the number of features of a point
    classes = None  # the number of classes
    side = None  # a point is a picture of side x side pixels; None: it is none
    bayes = None  # x (n, features) -> (n, classes), the true class probabilities; None: unknown
    class_shares = None  # (classes,) of points without `shares`; None: all are equal
    soft_labels = None  # x (n, features) -> logits (n, classes) of a teacher; None: there is none

    # rows that the world provides itself
    teacher = None  # (n, rng) -> n demonstrations by a better writer; None: there is none
    writers = {}  # {name: (prompts, rng) -> responses}: responses of other models and of people
    lists = None  # (n, rng, k=None) -> n graded lists; None: lists are sampled and labelled
    given = None  # k responses per row -> the user's training rows; None: rows are sampled
    held_out = None  # rows of the user's file that are held out for the evaluation
    single = False  # True: rows are single responses with a label, so there are no pairs
    counts = {}  # {reason: number of rows of the user's file that are left out}

    def model(self):
        """A new model (GPT, UNet, a denoiser or a Table) with weights from the global generator."""
        raise NotImplementedError(f"{type(self).__name__} has no model")

    def prompts(self, n, rng):
        """n prompts: texts, class labels, or indices of a table's prompts."""
        raise NotImplementedError(f"{type(self).__name__} has no prompts")

    def test_prompts(self, n, rng):
        """n prompts of an evaluation; a world of a file holds some of its prompts out for it."""
        return self.prompts(n, rng)

    def demonstrations(self, n, rng):
        """n rows of one response, dict(prompt, responses, scores=[1.0]), for the base model."""
        raise NotImplementedError(f"{type(self).__name__} has no demonstrations")

    def points(self, n, rng, shares=None, held_out=False):
        """n labelled points of a world of vectors: x (n, features) float64, y (n,) int64.

        shares: the probability of each class (classes,), by default the world's own. held_out:
            points for a test, none of which is ever among the others in a world of real data.
        """
        raise NotImplementedError(f"{type(self).__name__} has no points")

    def text(self, response):
        """A response, text or token ids, as text."""
        return response if isinstance(response, str) else self.tokenizer.decode(response)

    def rewards(self):
        """The true reward of all responses of a table, (P, R) float64; only for kind = "table"."""
        raise NotImplementedError(f"{type(self).__name__} is not a table")

    def utility(self, prompts, images):
        """What the annotators think of n images, (n,) float64: their weights times the criteria."""
        weights = torch.tensor(self.annotators)[self.contexts(prompts)]
        return (weights * self.criteria(prompts, images)).sum(1).double()

    def key(self):
        """A value that differs between worlds of one class, for cache keys; JSON can hold it."""
        return self.name

    def picture(self, before, after):
        """A Figure of samples (prompts, k, C, H, W) of two models, or None if there is none."""
        return None
