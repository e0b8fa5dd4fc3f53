"""What LD-DPO claims, and whether it holds here.

On reviews the labels are length-biased. LD-DPO is compared with DPO on the same pairs: in length
after equal steps, at matched KL and at the same true reward, and in true reward.

The optimum of the expected loss is known exactly (tests/methods/test_ld_dpo.py). With this bias it
is clearly shorter for a smaller alpha, at nearly the same probability of a good response. With half
the bias the optimum is not shorter for every smaller alpha: a fixed margin then needs larger
log-ratios beyond the public length, so the effect is one of early training.

On tuning seeds 100 to 102 the effect on reviews is small. After equal steps, responses with
alpha = 0 are shorter than DPO's on every seed, and with alpha = 0.5 only on one; the reward is
higher than DPO's on some seeds and lower on others. At the same reward, responses with alpha = 0.5
and alpha = 0.3 are shorter, but such a length is noisy, since it is interpolated on a curve of five
points. If the reference is not split, responses become much shorter and the
reward rises.
"""

from lab.claims import at_or_nan, claim
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
SETTINGS = dict(world="reviews", length_bias=0.1, steps=100, eval_every=25, eval_size=1000)


def measure(lab):
    """Curves of reward, KL and length of every arm, and lengths at the same reward."""
    curves = lab.race(ARMS, **SETTINGS)
    both = [*zip(curves["DPO"], curves["alpha 0"])]
    rewards = [min(max(look["reward"] for look in curve) for curve in pair) for pair in both]
    return curves | {
        "DPO, longer by": [a[-1]["length"] - a[0]["length"] for a in curves["DPO"]],
        "DPO, at one reward": [
            at_or_nan(a, "reward", r, "length") for (a, _), r in zip(both, rewards)
        ],
        "alpha 0, at one reward": [
            at_or_nan(b, "reward", r, "length") for (_, b), r in zip(both, rewards)
        ],
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
        world="reviews, length-biased",
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 writes shorter responses than DPO where both first reach "
        "the same true reward",
        None,
        "alpha 0, at one reward",
        "<",
        "DPO, at one reward",
        margin=0.5,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0.5 writes shorter responses than DPO at matched KL",
        "length",
        "alpha 0.5",
        "<",
        "DPO",
        at_kl="shared",
        margin=0.5,
        expect="inconclusive",
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 has a lower true reward than DPO at matched KL",
        "reward",
        "alpha 0",
        "<",
        "DPO",
        at_kl="shared",
        margin=0.1,
        expect="no effect",
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0.5 writes far shorter responses than DPO after equal steps "
        "when the reference is not split",
        "length",
        "not on the reference",
        "<",
        "DPO",
        margin=5.0,
    ),
    claim(
        "Length-biased labels make DPO's responses on reviews longer than the base model's: by "
        "more than 2 tokens",
        None,
        "DPO, longer by",
        ">",
        2.0,
        kind="control",
        expect="supported",
    ),
]
