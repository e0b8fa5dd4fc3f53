"""DSTC - Direct Preference Learning with Only Self-Generated Tests and Code to Improve Code LMs
(2024), arXiv:2411.13611

A model writes J programs and J tests for every task. All pairs are executed, r_jk = 1 if program j
passes test k, and the matrix gives one preference. The model's tests are often wrong, so the chosen
program is joined by the hardest test that it passes, and the rejected one by the easiest that it
fails (R, S: row and column sums):

    j+ = argmax R_j                   k+ = argmin S_k  with r_{j+ k} = 1
    k- = argmax S_k  with S_k < J     j- = argmin R_j  with r_{j k-} = 0

The texts "program ; test" are compared, so the label is what the interpreter said. The loss is that
of DPO or KTO. `select` has other rules.

Differences from the paper
1. The fourth rule, ties (first index) and the separator are our reading.
2. There are several rounds, each with tests by the current policy.
3. KTO's reference point is the mean log-ratio of the other side, at least 0.

    python train.py --method dstc                              success with own tests
    python train.py --method dstc --select passed,random,oracle    other selections
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, StopTraining, UserError, check_fields, pair

PAPER = Paper(
    "online",
    worlds=("text",),
    needs="reward",
    ignores=("flip", "label_temperature", "length_bias"),
    defaults=dict(world="programs"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    variant: str = "dpo"  # dpo or kto
    select: str = "minimax"  # rule that makes a pair: minimax, random, same_test, passed or oracle
    rounds: int = 3  # each has its own tasks and an equal share of the steps

    def __post_init__(self):
        check_fields(
            self,
            beta="(0, inf)",
            variant=("dpo", "kto"),
            select=tuple(RULES),
            rounds="[1, inf)",
        )


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    if cfg.variant == "kto":
        good, bad = (x.detach().mean().clamp(min=0) for x in (rejected, chosen))
        return torch.sigmoid(cfg.beta * (good - chosen)) + torch.sigmoid(
            cfg.beta * (rejected - bad)
        ), {}
    return -F.logsigmoid(cfg.beta * (chosen - rejected)), {}


# ---- selections: (r, quality, rng) -> (j+, k+, j-, k-), tests are None if left out; None: no pair


def first(values, allowed, largest=True):
    """The first index with the largest (or smallest) value among the allowed ones, or None."""
    values = values.double() if largest else -values.double()
    values = values.masked_fill(~allowed, -torch.inf)
    return int(values.argmax()) if allowed.any() else None


def minimax(r, quality, rng):
    """The paper's four rules, as in the docstring of this file."""
    R, S = r.sum(1), r.sum(0)
    best = int(R.argmax())
    hard = first(S, r[best], largest=False)
    easy = first(S, S < len(r))
    if hard is None or easy is None:
        return None
    return best, hard, first(R, ~r[:, easy], largest=False), easy


def random(r, quality, rng):
    """A passed and a failed cell of the matrix at random."""
    passed, failed = r.nonzero(), (~r).nonzero()
    if not len(passed) or not len(failed):
        return None
    (a, b), (c, d) = (
        cells[int(torch.randint(len(cells), (), generator=rng))].tolist()
        for cells in (passed, failed)
    )
    return a, b, c, d


def same_test(r, quality, rng):
    """A program that passes and one that fails the same random test, without the test."""
    mixed = (r.any(0) & ~r.all(0)).nonzero()[:, 0]
    if not len(mixed):
        return None
    column = r[:, mixed[int(torch.randint(len(mixed), (), generator=rng))]]
    sides = (side.nonzero()[:, 0] for side in (column, ~column))
    a, b = (int(side[int(torch.randint(len(side), (), generator=rng))]) for side in sides)
    return a, None, b, None


def passed(r, quality, rng):
    """The programs that pass the most and the fewest of the model's tests."""
    return extremes(r.sum(1))


def oracle(r, quality, rng):
    """The programs that are right most and least often, by true tests."""
    return extremes(quality)


def extremes(values):
    """The first program with the largest and the first with the smallest value; None if equal."""
    if values.max() == values.min():
        return None
    return int(values.argmax()), None, int(values.argmin()), None


RULES = dict(minimax=minimax, random=random, same_test=same_test, passed=passed, oracle=oracle)


def executed(world, programs, tests):
    """r (J, K) bool: whether a program (text) passes a test (text)."""
    return torch.tensor([[world.execute(c, t) for t in tests] for c in programs])


def distinct(lab, row):
    """The different responses of a row as texts, in the order of their first occurrence."""
    return list(dict.fromkeys(lab.text(response) for response in row["responses"]))


def rollout(lab, policy, t, cfg):
    """The pairs of round t: programs and tests of the policy, executed and selected.

    There are none where all programs are right, or none is.
    """
    world, out = lab.world, []
    prompts = world.prompts(lab.prompts // cfg.rounds, lab.rng("tasks", t))
    programs = lab.sample(policy, prompts, lab.k, lab.rng("programs", t))
    tests = lab.sample(policy, world.asks_test(prompts), lab.k, lab.rng("tests", t))
    rng = lab.rng("select", t)
    for prompt, *each in zip(prompts, programs, tests):
        c, u = (distinct(lab, row) for row in each)
        quality = torch.tensor([world.agreement(prompt, x) for x in c])
        found = RULES[cfg.select](executed(world, c, u), quality, rng)
        if found is None and lab.smoke and len(c) > 1:  # an untrained model writes no programs
            found = 0, None, 1, None
        if found is None or found[0] == found[2]:  # two tests of one program are not a pair
            continue
        texts = [c[j] + (f" ;{u[k]}" if k is not None else "") for j, k in (found[:2], found[2:])]
        valid = [k is not None and world.execute(world.truth(prompt), u[k]) for k in found[1::2]]
        about = dict(quality=[float(quality[j]) for j in found[::2]], valid=valid)
        ids = [lab.tokens(text) for text in texts]
        out.append(dict(prompt=prompt, responses=ids, ends=[True, True], scores=[1.0, 0.0]) | about)
    return out


def report(rows, n):
    """A sentence on the pairs of a round."""
    better, worse = (
        sum(sign * (row["quality"][0] - row["quality"][1]) > 0 for row in rows) for sign in (1, -1)
    )
    return (
        f"{len(rows)} pairs from {n} tasks: the chosen program is truly better in "
        f"{better / len(rows):.2f} of them and worse in {worse / len(rows):.2f}"
    )


def run(lab, cfg):
    if lab.world.execute is None:
        raise UserError(f"{lab.world.name} has no interpreter of programs, as programs has")
    if 0 < lab.steps < cfg.rounds or lab.prompts < cfg.rounds:
        raise UserError(f"--steps and --prompts: at least {cfg.rounds}, one for each round")

    def data(policy, t):
        rows = lab.stage("pairs", lambda: rollout(lab, policy, t, cfg))
        if not rows and t == 0:
            raise UserError("round 1 gave no pairs: more --prompts or a larger --k may help")
        if not rows:
            raise StopTraining(f"round {t + 1} gave no pairs")
        lab.say(report(rows, lab.prompts // cfg.rounds))
        about = ("quality", "valid")
        return lab.rows([{k: v for k, v in row.items() if k not in about} for row in rows])

    return lab.align_in_rounds(lab.base(), data, loss, cfg, cfg.rounds)
