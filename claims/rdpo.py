"""What rDPO claims, and whether it holds here.

rDPO, DPO and conservative DPO (label smoothing) are aligned at the same beta on the same reviews,
of which 20 % or 40 % of the labels are flipped. The labels are otherwise reliable, and every pair
is seen once. That rDPO recovers the reward from the expected loss at every flip rate, and the
others do not, is a test in a table (tests/methods/test_rdpo.py).

At matched KL rDPO has no more reward than DPO: label flips make DPO behave as if beta were larger,
and a smaller beta in DPO removes that bias as well. In the exact table, DPO at a smaller beta has
the KL of rDPO's optimum and nearly all of its reward.

Not reproduced on tuning seeds 100 to 102:
1. A gain at 40 % flips: 6,400 pairs then teach too little.
2. A loss from an epsilon that is too high: 200 steps end long before training diverges.

At a smaller beta the three methods are alike. If pairs are seen three times at a larger learning
rate, they are memorized, most of all by rDPO.
"""

from lab.claims import claim
from methods import dpo, rdpo, survey


def true_reward(lab, policy):
    """The true reward of 4,000 samples, which are enough to show the margins of the claims."""
    prompts = lab.world.prompts(lab.few(4000), lab.rng("prompts of the reward"))
    rewards = [row[0] for row in lab.truth(lab.sample(policy, prompts, 1))]
    return {"true reward": sum(rewards) / len(rewards)}


def measure(lab):
    """Curves of each method at beta 1, with 20 % and with 40 % of the labels flipped."""
    curves = {}
    for flip in (0.2, 0.4):
        smoothed = survey.Config(variant="cdpo", beta=1.0, epsilon=flip)
        arms = {
            f"rdpo, {flip:.0%}": (rdpo.loss, rdpo.Config(beta=1.0, epsilon=flip)),
            f"dpo, {flip:.0%}": (dpo.loss, dpo.Config(beta=1.0)),
            f"cdpo, {flip:.0%}": (survey.loss, smoothed),
        }
        if flip == 0.2:
            arms["rdpo, 20%, epsilon 0.4"] = (rdpo.loss, rdpo.Config(beta=1.0, epsilon=0.4))
        curves |= lab.race(
            arms,
            end=true_reward,
            flip=flip,
            label_temperature=0.25,
            prompts=6400,
            batch_size=32,
            lr=4e-4,
            eval_size=512,
            eval_every=50,
        )
    return curves


def at_equal_steps(flip, name, baseline, **kwargs):
    return claim(
        f"On reviews with {flip} flipped labels, rDPO ends with a higher true reward than {name} "
        "at the same beta",
        "true reward",
        f"rdpo, {flip}",
        ">",
        f"{baseline}, {flip}",
        margin=0.02,
        **kwargs,
    )


def at_matched_kl(flip, name, baseline):
    return claim(
        f"On reviews with {flip} flipped labels, rDPO has a higher true reward than {name} at "
        "matched KL",
        "reward",
        f"rdpo, {flip}",
        ">",
        f"{baseline}, {flip}",
        at_kl="shared",
        margin=0.02,
        expect="inconclusive",
    )


CLAIMS = [
    at_equal_steps("20%", "DPO", "dpo", kind="primary", world="reviews", matched="steps"),
    at_matched_kl("20%", "DPO", "dpo"),
    at_equal_steps("20%", "conservative DPO", "cdpo"),
    at_matched_kl("20%", "conservative DPO", "cdpo"),
    claim(
        "On reviews with 20% flipped labels, rDPO with the right epsilon ends with a higher true "
        "reward than with an epsilon of 0.4",
        "true reward",
        "rdpo, 20%",
        ">",
        "rdpo, 20%, epsilon 0.4",
        margin=0.02,
        expect="inconclusive",
    ),
    at_equal_steps("40%", "DPO", "dpo", expect="inconclusive"),
    at_matched_kl("40%", "DPO", "dpo"),
    at_equal_steps("40%", "conservative DPO", "cdpo", expect="inconclusive"),
    at_matched_kl("40%", "conservative DPO", "cdpo"),
]
