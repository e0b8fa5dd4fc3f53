"""What SFT on the chosen responses is worth compared with DPO.

SFT is the baseline of the other papers; the curves are those of claims/dpo.py. If all responses
have one length, the optimum of SFT is the distribution of the chosen responses, in which no
response is more than twice as likely as before; this is a test in a table
(tests/methods/test_sft.py).

What theory expects: up to the KL at which SFT stops by itself, both follow nearly the same path. On
tuning seeds 100 to 102, at matched KL SFT is not worse than DPO. It ends at a
small KL, where its reward is at least DPO's at beta = 1. DPO at beta = 0.1 ends with about twice
the reward at more than ten times the KL.
"""

from claims import dpo as of_dpo
from lab.claims import claim


def measure(lab):
    """Curves of DPO at beta 0.1 and 1 and of SFT, on the same pairs of reviews."""
    return lab.race(of_dpo.ARMS, world="reviews", steps=120, eval_size=1000, eval_every=20)


CLAIMS = [
    claim(
        "On reviews, SFT on the chosen responses has a lower true reward than DPO at beta 1 at "
        "matched KL",
        "reward",
        "sft",
        "<",
        "dpo, beta 1",
        at_kl="shared",
        margin=0.1,
        kind="primary",
        expect="no effect",
        world="reviews",
    ),
    claim(
        "On reviews, SFT ends at a smaller KL from the base model than DPO, after equally many "
        "steps",
        "kl",
        "sft",
        "<",
        "dpo",
        margin=1.0,
    ),
]
