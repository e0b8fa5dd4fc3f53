"""What a student's world or training step promises: calls of it, and a judgement of the answers.

The calls are those of classroom/probe.py (a world) and classroom/clock.py (a step). A judgement
gets the answers, lists of tensors in the order in which they were returned, and says what is wrong
in one sentence, or returns None. The visible tests of a handout and the grader use the same list.
"""

from dataclasses import dataclass

import torch

from classroom import calls, clock, probe

ROUNDING = 1e-5  # relative difference that two rewards of one response may have
CLOSE = 1e-3  # relative difference that two right steps may have in float32, by their order of sums
RISE = 0.1  # deviations of the base model's rewards by which a short run must raise them
N = 8  # prompts and demonstrations of a question


class ByHand(str):
    """What a person has to know who marks a line by hand."""


@dataclass(frozen=True)
class Promise:
    """One line of the result.

    asks(seed): the calls, (function, *arguments). judge: (seed, answers) -> what is wrong, None, or
    ByHand. long: whether the calls take as long as a run. required: nothing else earns points
    where it is broken.
    """

    name: str
    points: int
    asks: object
    judge: object
    long: bool = False
    required: bool = False


# ---------------------------------------------------------------- a world


def enough(seed, answers):
    """Prompts and demonstrations are as many as asked for, and of the right form."""
    asked, shown = (int(answer[0]) for answer in answers)
    if asked != N:
        return f"prompts({N}, rng) returns {asked} prompts"
    if shown != N:
        return f"demonstrations({N}, rng) does not return {N} dict(prompt, responses=[one], scores)"
    return None


def same(a, b):
    return all(x.shape == y.shape and bool((x == y).all()) for x, y in zip(a, b))


def reproducible(seed, answers):
    prompts, again, rows, rows_again, other, other_rows = answers
    if not (same(prompts, again) and same(rows, rows_again)):
        return "the same generator gives other data: draw random numbers from rng alone"
    # a table may have one prompt and no demonstrations
    if len(rows[1]) and same(prompts, other) and same(rows, other_rows):
        return "another generator gives the same data: draw random numbers from rng"
    return None


def one_number_each(seed, answers):
    first, *_, n = answers[0]
    if first.shape != (int(n),) or first.dtype != torch.float64:
        return (
            f"the reward of {int(n)} responses is {first.dtype} of shape {tuple(first.shape)}, "
            "expected torch.float64 of shape (n,)"
        )
    if not first.isfinite().all():
        return "the reward of a response of an untrained model is NaN or infinite"
    return None


def rounded(a, b):
    """Whether two answers are the same up to rounding, which depends on the size of a batch."""
    return a.shape == b.shape and torch.allclose(a.double(), b.double(), rtol=ROUNDING, atol=1e-8)


def deterministic(seed, answers):
    first, again, back, alone, _ = answers[0]
    if not rounded(first, again):
        return "the reward of the same responses is another one the second time"
    if not rounded(first, back):
        return "the reward of a response depends on its place among the others"
    if not rounded(first, alone):
        return "the reward of a response depends on the others that are scored with it"
    return None


def told(seed, answers):
    text = bytes(answers[0][0].tolist()).decode()
    if len(text) < 200:
        return "the docstring of the file does not explain prompt, response and reward"
    if "gamed" not in text:
        return "the docstring does not say how the reward can be gamed, or that it cannot be"
    return None


def varies(seed, answers):
    if not float(answers[0][2]) > 0:
        return "all responses of the base model have the same reward, so there is nothing to learn"
    return None


def rises(seed, answers):
    before, after, deviation = (float(x) for x in answers[0][:3])
    if not after - before > RISE * deviation:
        return (
            f"DPO leaves the reward at {after:.3f}; before it was {before:.3f}, and it should rise "
            f"by {RISE:g} deviations of the base model's rewards, {RISE * deviation:.3f}"
        )
    return None


def looks(seed, answers):
    text, numbers = bool(answers[0][3]), answers[0][4]
    if not text or not numbers.isfinite().all():
        return "look and measure return finite numbers by name, and explain returns a text"
    return None


WORLD = (
    Promise(
        "as many rows as asked for",
        10,
        lambda s: [("prompts", N, s), ("demonstrations", N, s)],
        enough,
    ),
    Promise(
        "reproducible",
        15,
        lambda s: [
            ("prompts", N, s),
            ("prompts", N, s, 1),
            ("demonstrations", N, s),
            ("demonstrations", N, s, 1),
            ("prompts", N, s + 1),
            ("demonstrations", N, s + 1),
        ],
        reproducible,
    ),
    Promise("one finite reward each", 15, lambda s: [("rewards", s)], one_number_each),
    Promise("a reward for the response alone", 10, lambda s: [("rewards", s)], deterministic),
    Promise("documented", 5, lambda s: [("description",)], told),
    Promise("look and explain", 5, lambda s: [("trained",)], looks, long=True),
    Promise(
        "the reward tells responses apart",
        5,
        lambda s: [("trained",)],
        varies,
        long=True,
        required=True,
    ),
    Promise("DPO raises the reward", 20, lambda s: [("trained",)], rises, long=True),
)


# ---------------------------------------------------------------- a step


def near(a, b):
    """Whether two tensors differ by less than CLOSE of the second one's norm."""
    return a.shape == b.shape and bool((a - b).norm() <= CLOSE * b.norm())


def unlike(losses, moved, right_losses, right_moved):
    """What is wrong with the losses and the change of the weights of some steps; None: nothing."""
    if not near(losses.double(), right_losses.double()):
        return "the losses differ from those of the shipped step"
    if not near(moved, right_moved):
        gap = float((moved - right_moved).norm() / right_moved.norm())
        return f"the weights move elsewhere: the change differs by {gap:.2g} of its length"
    return None


def equal(seed, answers):
    """The losses and gradients, which the grader computes with the shipped step."""
    return unlike(*answers[0], *clock.trace(clock.SHIPPED, seed))


def times_as_fast(wanted):
    """The judgement that a step is so many times as fast as the shipped one, in the median."""

    def judge(seed, answers):
        seconds, losses, moved, on_card = answers[0]
        wrong = unlike(losses[:, 1], moved[1], losses[:, 0], moved[0])
        if wrong:
            return f"while it was timed, {wrong}"
        ratio = float((seconds[:, 0] / seconds[:, 1]).median())
        where = "a card" if on_card else "a CPU"
        said = f"{ratio:.2f} times as fast as the shipped step on {where}"
        if not on_card:
            return ByHand(f"{said}; the points are for a card: time it on one, or mark it by hand")
        return None if ratio >= wanted else f"{said}, expected {wanted:g}"

    return judge


STEP = (
    Promise(
        "the losses and weights of the shipped step",
        10,
        lambda s: [("trace", "step", s)],
        equal,
        long=True,
        required=True,
    ),
    *(
        Promise(
            f"{wanted:g} times as fast",
            points,
            lambda s: [("race", "step", s)],
            times_as_fast(wanted),
            long=True,
        )
        for wanted, points in ((1.1, 30), (1.5, 30), (2.0, 30))
    ),
)
KINDS = {"world": (WORLD, probe), "step": (STEP, clock)}


def asked(kind, seed):
    """[call] of all promises of a kind without repetition, the long ones last, and how many are."""
    short, long = [], []
    for promise in KINDS[kind][0]:
        some = long if promise.long else short
        some += [call for call in promise.asks(seed) if call not in some]
    return short + long, len(long)


def verdicts(kind, seed, answer):
    """[(promise, what is wrong or None, whether it was judged)].

    answer(call) -> list of tensors, or the text of an error, which is not judged.
    """
    found = []
    for promise in KINDS[kind][0]:
        answers = [answer(call) for call in promise.asks(seed)]
        wrong = next((x for x in answers if isinstance(x, str)), None)
        judged = wrong is None
        if judged:
            try:
                wrong = promise.judge(seed, answers)
            except Exception:  # noqa: BLE001 - a submission may answer anything
                wrong = "its answers have other shapes than asked for"
        found.append((promise, wrong, judged))
    return found


def here(kind, seed):
    """The verdicts on the file of the current folder, asked in this process."""
    known = {}

    def answer(call):
        if call not in known:
            function, *arguments = call
            try:
                known[call] = calls.flat(vars(KINDS[kind][1])[function](*arguments))
            except NotImplementedError as error:
                known[call] = f"your turn: {str(error).removeprefix('your turn: ')}"
            except Exception as error:  # noqa: BLE001 - a student's file may raise anything
                known[call] = f"{type(error).__name__}: {error}"
        return known[call]

    return verdicts(kind, seed, answer)
