"""What MCTS-DPO claims, and whether it holds here.

Arms are compared at equal sampled tokens: each curve is read at the largest number of tokens that
both arms of a pair have sampled. Tries are exact tables, one for each seed, in which looking at a
symbol counts as a token; arithmetic has language models. The frozen arm searches with the base
model alone. Tokens are equal, labels are not: a search judges every node that it visits, and pairs
of whole samples need one verdict a sample. How to read the claims:
1. A round of whole samples takes more than three times the tokens of a round of searches, so at
   equal tokens these pairs have had less than a third of the optimizer steps. At equal steps they
   end higher. So a search makes pairs that cost less, and not pairs that teach more. Against whole
   samples of a single round, with as many tokens and steps, most of the lead is gone.
2. Frozen searches visit more nodes for a question, so the arms with as many tokens, or a few more,
   search fewer questions. On tries, searches by the current policy are ahead after 40 steps, and
   not yet after 16; on sums, training on frozen searches soon does harm.
3. Step-level pairs should win on tries, where only the step tells what was wrong, and tie on sums:
   right and wrong solutions of one sum share all tokens but those at the error, so a pair of whole
   solutions points at the step as well.
4. The policy's own value is its mean probability per token. On tries it ranks siblings as the prior
   does, and the runs were those with a constant value, so there is no such arm. On sums a judge,
   the own value and a constant one end alike: the verdicts at the ends do the work. The greedy
   search has no prior, c = 0.

Tried on tuning seed 100, and the arms after "no smoothing" on seeds 100 to 104.
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
LONG = TRIE | dict(steps=40, eval_every=8)
FROZEN = Config(online=False)
# more arms, as (name, settings, arms); with fewer prompts the tokens of both arms are equal
MORE = (
    ("trie", TRIE, {"greedy": Config(explore=0.0), "constant value": Config(value="constant")}),
    ("trie", TRIE | dict(k=23), {"instance, as many steps": Config(level="instance", every=16)}),
    ("trie", TRIE | dict(prompts=18), {"frozen, equal tokens": FROZEN}),
    ("trie, 40 steps", LONG, {"step": Config()}),
    ("trie, 40 steps", LONG | dict(prompts=17), {"frozen, equal tokens": FROZEN}),
    ("sums", SUMS, {f"{value} value": Config(value=value) for value in ("own", "constant")}),
    ("sums", SUMS | dict(prompts=30), {"frozen, equal tokens": FROZEN}),
)


def at_tokens(curves, arms):
    """{arm: the reward of each seed at the largest number of tokens that all arms sampled}."""
    out = {arm: [] for arm in arms}
    for seed in zip(*(curves[arm] for arm in arms)):
        columns = [[(x.get("samples", 0), x["reward"]) for x in curve] for curve in seed]
        shared = min(column[-1][0] for column in columns)
        for arm, column in zip(arms, columns):
            out[arm].append(float(np.interp(shared, *zip(*column))))
    return out


def raced(lab, settings, arms):
    """The curves {arm: [curve per seed]} of Configs on tries or on sums."""
    if settings["world"] == "trie":
        settings = settings | dict(world=trie.World)
    else:
        settings = settings | dict(eval_size=500)
    return lab.race(
        {name: lambda lab, cfg=cfg: run(lab, cfg) for name, cfg in arms.items()}, **settings
    )


def ends(name, curves):
    """The last rewards of curves as series, and how many tokens were sampled for them."""
    found = {f"{name}, {arm}": [c[-1]["reward"] for c in each] for arm, each in curves.items()}
    tokens = {arm: [c[-1].get("samples", 0) for c in each] for arm, each in curves.items()}
    return found | {f"{name}, {arm}, tokens": counts for arm, counts in tokens.items()}


def measure(lab):
    """Rewards at equal sampled tokens, and at equal steps, on tries and on sums."""
    found = {}
    for name, settings, arms in (
        ("trie", TRIE, ARMS),
        ("sums", SUMS, {a: ARMS[a] for a in ("step", "instance")}),
    ):
        curves = raced(lab, settings, arms)
        equal = at_tokens(curves, ["step", "instance"])
        found |= {f"{name}, {arm}, equal tokens": values for arm, values in equal.items()}
        found |= ends(name, curves)
    for name, settings, arms in MORE:
        found |= ends(name, raced(lab, settings, arms))
    return found


def costs(series):
    """Lines with the mean success of every arm at its end, and the tokens that it sampled."""
    lines = ["arm                                         success   tokens"]
    for name in series:
        if f"{name}, tokens" in series:
            success, tokens = (np.mean(series[x]) for x in (name, f"{name}, tokens"))
            lines.append(f"{name:<42} {success:>8.3f} {tokens:>8,.0f}")
    return lines


def report(lab, series):
    """The search of one trie, as text and drawn, and what every arm has sampled."""
    here = lab.at(**TRIE)
    (root,) = trees(here, here.base(), [3], ("shown",), Config(simulations=20))
    texts = {"tree.txt": printed(here, root), "tokens.txt": costs(series)}
    return {x: "\n".join(lines) + "\n" for x, lines in texts.items()} | {"tree.png": diagram(root)}


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
    claim(
        "On tries, with as many optimizer steps from as many sampled tokens, step-level pairs end "
        "with a higher success than pairs of whole samples",
        None,
        "trie, step",
        ">",
        "trie, instance, as many steps",
        margin=0.05,
        expect="inconclusive",
    ),
    claim(
        "On tries, at equal optimizer steps, for which they sample about a quarter of the tokens, "
        "step-level pairs end with a higher success than pairs of whole samples",
        None,
        "trie, step",
        ">",
        "trie, instance",
        margin=0.05,
        expect="reversed",
    ),
    claim(
        "On tries, at equal sampled tokens and 16 steps, searches by the current policy end with a "
        "higher success than those by the base model",
        None,
        "trie, step",
        ">",
        "trie, frozen, equal tokens",
        margin=0.02,
        expect="inconclusive",
    ),
    claim(
        "On tries, at equal sampled tokens and 40 steps, searches by the current policy end with a "
        "higher success than those by the base model",
        None,
        "trie, 40 steps, step",
        ">",
        "trie, 40 steps, frozen, equal tokens",
        margin=0.02,
    ),
    claim(
        "On sums, at equal sampled tokens, searches by the current policy end with a higher "
        "success than those by the base model",
        None,
        "sums, step",
        ">",
        "sums, frozen, equal tokens",
        margin=0.05,
    ),
    claim(
        "On tries, searches with the prior end with a higher success than greedy ones",
        None,
        "trie, step",
        ">",
        "trie, greedy",
        margin=0.02,
    ),
    claim(
        "On tries, searches with a noisy judge end with a higher success than with a constant "
        "value",
        None,
        "trie, step",
        ">",
        "trie, constant value",
        margin=0.05,
    ),
    claim(
        "On sums, searches with a noisy judge end with a higher success than with the policy's own "
        "value",
        None,
        "sums, step",
        ">",
        "sums, own value",
        margin=0.05,
        expect="no effect",
    ),
    claim(
        "On sums, searches with the policy's own value end with a higher success than with a "
        "constant one",
        None,
        "sums, own value",
        ">",
        "sums, constant value",
        margin=0.05,
        expect="no effect",
    ),
]
