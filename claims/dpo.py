"""What DPO claims, and whether it holds here.

DPO, at two values of beta, RLHF, and SFT on the chosen responses are aligned from the same base
model on the same pairs of reviews. RLHF fits a reward model to the pairs for as many steps as DPO
takes, and then takes as many steps of policy gradient on fresh samples. That DPO reaches the
optimum of reward - beta KL, and SFT does not, is a test in a table of 27 responses
(tests/methods/test_dpo.py).

Not reproduced on tuning seed 100: DPO has no more reward than SFT at matched KL. SFT stops at a
small KL by itself, since the chosen responses are half of the samples, and up to there it gets as
much reward for its KL as DPO does. Three values of beta and two learning rates were tried, and the
claim uses the best, beta = 1. DPO's gain lies at KLs that SFT never reaches.

Nor does DPO have more reward than RLHF at the same beta and matched KL. On tuning seed 100 the KL
of RLHF stops growing near 3, where RLHF has about twice DPO's reward, with reviews half as long. At
a KL near 1, DPO at beta = 1 has more reward than RLHF at beta = 0.1, which is there in its first
steps; RLHF at beta = 1 hardly leaves the reference. With batches of 32, and so half as many pairs
for its reward model, RLHF ends below a KL of 1 with slightly less reward than DPO at beta = 1.
"""

from lab.claims import claim
from methods import dpo, rlhf, sft

ARMS = {
    "dpo": (dpo.loss, dpo.Config()),
    "dpo, beta 1": (dpo.loss, dpo.Config(beta=1.0)),
    "sft": (sft.loss, sft.Config(), dict(reference=None)),
}


def measure(lab):
    """Curves of DPO at beta 0.1 and 1, of RLHF and of SFT, on the same pairs of reviews."""
    arms = ARMS | {"rlhf": lambda lab: rlhf.run(lab, rlhf.Config())}
    return lab.race(arms, eval_size=512)


CLAIMS = [
    claim(
        "On reviews, DPO ends with a higher true reward than SFT on the chosen responses of the "
        "same pairs, after equally many steps",
        "reward",
        "dpo",
        ">",
        "sft",
        margin=0.1,
        kind="primary",
        world="reviews",
        matched="steps",
    ),
    claim(
        "On reviews, DPO at beta 1 has a higher true reward than SFT at matched KL",
        "reward",
        "dpo, beta 1",
        ">",
        "sft",
        at_kl="shared",
        margin=0.05,
        expect="inconclusive",
    ),
    claim(
        "On reviews, DPO has a higher true reward than RLHF at the same beta and matched KL",
        "reward",
        "dpo",
        ">",
        "rlhf",
        at_kl="shared",
        margin=0.05,
        expect="inconclusive",
    ),
    claim(
        "On reviews, DPO at beta 1 has a higher true reward than RLHF at beta 0.1 at matched KL, "
        "which RLHF passes early",
        "reward",
        "dpo, beta 1",
        ">",
        "rlhf",
        at_kl="shared",
        margin=0.05,
    ),
]
