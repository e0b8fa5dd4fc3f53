"""What MCTS-DPO claims, and whether it holds here.

Arms are compared at equal sampled tokens: the reward of each is read off its curve at the largest
number of tokens that both arms of a pair have sampled. Tries are exact tables, one for each seed,
in which looking at a symbol counts as a token; arithmetic has language models. The frozen arm
searches with the base model alone, for as many questions. Tokens are equal, labels are not: a
search judges every node that it visits, and pairs of whole samples need one verdict a sample.

The trial expects that step-level pairs win on tries, where only the step tells what was wrong, and
tie on sums: right and wrong solutions of one sum share all tokens but those at the error, so a pair
of whole solutions points at the step as well. Tried on tuning seed 100.
"""

import numpy as np

from lab.claims import claim
from methods.mcts_dpo import Config, diagram, printed, run, trees
from toy import trie

ARMS = {
    "step": Config(),
    "instance": Config(level="instance"),
    "frozen": Config(online=False),
    "no smoothing": Config(smooth=False),
}
TRIE = dict(world="trie", steps=16, eval_every=4, prompts=20, lr=0.2, batch_size=64, k=20)
SUMS = dict(world="arithmetic", steps=40, eval_every=10, prompts=32, lr=1e-4, batch_size=32, k=8)


def at_tokens(curves, arms):
    """{arm: the reward of each seed at the largest number of tokens that all arms sampled}."""
    out = {arm: [] for arm in arms}
    for seed in zip(*(curves[arm] for arm in arms)):
        columns = [[(x.get("samples", 0), x["reward"]) for x in curve] for curve in seed]
        shared = min(column[-1][0] for column in columns)
        for arm, column in zip(arms, columns):
            out[arm].append(float(np.interp(shared, *zip(*column))))
    return out


def measure(lab):
    """Rewards at equal sampled tokens, and at equal steps, on tries and on sums."""
    found = {}
    for name, settings, arms in (
        ("trie", TRIE | dict(world=trie.World), ARMS),
        ("sums", SUMS | dict(eval_size=500), {a: ARMS[a] for a in ("step", "instance")}),
    ):
        runs = {arm: lambda lab, cfg=cfg: run(lab, cfg) for arm, cfg in arms.items()}
        curves = lab.race(runs, **settings)
        equal = at_tokens(curves, ["step", "instance"])
        found |= {f"{name}, {arm}, equal tokens": values for arm, values in equal.items()}
        found |= {f"{name}, {arm}": [c[-1]["reward"] for c in each] for arm, each in curves.items()}
    return found


def report(lab, series):
    """The search of one trie, as text and drawn."""
    here = lab.at(**TRIE)
    (root,) = trees(here, here.base(), [3], ("shown",), Config(simulations=20))
    return {"tree.txt": "\n".join(printed(here, root)) + "\n", "tree.png": diagram(root)}


CLAIMS = [
    claim(
        "On tries, at equal sampled tokens, step-level pairs of a search end with a higher success "
        "than pairs of whole samples",
        None,
        "trie, step, equal tokens",
        ">",
        "trie, instance, equal tokens",
        margin=0.05,
        kind="primary",
        world="trie",
        matched="sampled tokens",
    ),
    claim(
        "On tries, searches by the current policy end with a higher success than as many by the "
        "base model",
        None,
        "trie, step",
        ">",
        "trie, frozen",
        margin=0.02,
        expect="inconclusive",
    ),
    claim(
        "On tries, labels that are smoothed by visits end with a higher success than hard ones",
        None,
        "trie, step",
        ">",
        "trie, no smoothing",
        margin=0.02,
        expect="inconclusive",
    ),
    claim(
        "On sums, at equal sampled tokens, step-level pairs of a search end with a higher success "
        "than pairs of whole samples",
        None,
        "sums, step, equal tokens",
        ">",
        "sums, instance, equal tokens",
        margin=0.03,
        expect="inconclusive",
    ),
]
