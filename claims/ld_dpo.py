"""What LD-DPO claims, and whether it holds here.

On reviews the labels prefer longer responses (a length bias of 0.1 per token). LD-DPO is compared
with DPO on the same pairs, at beta 0.5 and after 100 steps: by length after equal steps, at matched
KL, and where both first reach the same true reward, and by the true reward itself.

The optimum of the expected loss is known exactly (tests/methods/test_ld_dpo.py). With this bias it
is 21 % shorter at alpha 0.5 and 39 % shorter at alpha 0, and the probability of a good response is
lower by less than 0.005. With a bias of 0.05 the optimum is not shorter for every smaller alpha: a
fixed margin then needs larger log-ratios beyond the public length, so the effect is one of early
training.

On reviews the effect is small, and the paper's equal reward is not shown after equal steps. Tuning
seeds 100 to 102, at 13.5 tokens before training: DPO 20.4, 20.2, 19.5 tokens, alpha 0.5 18.5, 20.9,
20.1, alpha 0 16.6, 19.3, 19.1, at rewards of 0.257, 0.172, 0.340 (DPO), 0.286, 0.225, 0.371 and
0.380, 0.094, 0.249. Where both first reach one reward (1024 prompts), alpha 0.5 writes 18.9, 18.9,
19.5 tokens and DPO 20.3, 20.1, 19.8; alpha 0.3 writes 18.3, 18.3, 19.5 and DPO 20.2, 20.0, 19.7. At
matched KL it is shorter too, but on seed 101 at 0.05 to 0.08 less reward. With the reference not
split, alpha 0.5 ends at 4 tokens and rewards of 0.457, 0.420, 0.570. A length at equal reward is
noisy, since it is read off a curve of five looks at 512 prompts each.
"""

from data import UserError
from lab.claims import claim
from methods import dpo, ld_dpo

ARMS = {
    "DPO": (dpo.loss, dpo.Config(beta=0.5)),
    "alpha 0.5": (ld_dpo.loss, ld_dpo.Config(beta=0.5, alpha=0.5)),
    "alpha 0": (ld_dpo.loss, ld_dpo.Config(beta=0.5, alpha=0.0)),
    "not on the reference": (
        ld_dpo.loss,
        ld_dpo.Config(beta=0.5, alpha=0.5, on_reference=False),
    ),
}
SETTINGS = dict(world="reviews", length_bias=0.1, steps=100, eval_every=25, eval_size=1024)


def length_at(curve, reward):
    """The length where a curve first reaches a reward, by linear interpolation."""
    for a, b in zip(curve, curve[1:]):
        if min(a["reward"], b["reward"]) <= reward <= max(a["reward"], b["reward"]):
            share = (reward - a["reward"]) / ((b["reward"] - a["reward"]) or 1.0)
            return a["length"] + share * (b["length"] - a["length"])
    raise UserError(f"the curve never reaches a reward of {reward:.3g}")


def measure(lab):
    """-> curves of reward, KL and length of every arm, and what is read off two of them."""
    curves = lab.race(ARMS, **SETTINGS)
    both = [*zip(curves["DPO"], curves["alpha 0"])]
    rewards = [min(max(look["reward"] for look in curve) for curve in pair) for pair in both]
    return curves | {
        "base model": [curve[0] for curve in curves["DPO"]],
        "DPO, at one reward": [length_at(a, r) for (a, _), r in zip(both, rewards)],
        "alpha 0, at one reward": [length_at(b, r) for (_, b), r in zip(both, rewards)],
        "reward lost": [a[-1]["reward"] - b[-1]["reward"] for a, b in both],
    }


WHERE = "On reviews with length-biased labels"
CLAIMS = [
    claim(
        f"{WHERE}, LD-DPO with alpha 0 writes shorter responses than DPO at matched KL",
        "length",
        "alpha 0",
        "<",
        "DPO",
        at_kl="shared",
        margin=0.5,
        kind="primary",
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 writes shorter responses than DPO after equal steps",
        "length",
        "alpha 0",
        "<",
        "DPO",
        margin=0.5,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 writes shorter responses than DPO where both first reach "
        "the same true reward",
        None,
        "alpha 0, at one reward",
        "<",
        "DPO, at one reward",
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0.5 writes shorter responses than DPO after equal steps",
        "length",
        "alpha 0.5",
        "<",
        "DPO",
        expected=False,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 loses less than 0.1 of true reward to DPO",
        None,
        "reward lost",
        "<",
        0.1,
        expected=False,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0.5 writes far shorter responses than DPO when the reference "
        "is not split",
        "length",
        "not on the reference",
        "<",
        "DPO",
        margin=5.0,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0.5 has a higher true reward than DPO when the reference is "
        "not split",
        "reward",
        "not on the reference",
        ">",
        "DPO",
        margin=0.05,
    ),
    claim(
        "Length-biased labels make DPO's responses on reviews longer than the base model's",
        "length",
        "DPO",
        ">",
        "base model",
        margin=2.0,
        kind="control",
    ),
]
