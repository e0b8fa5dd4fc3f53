"""What SFT on the chosen responses is worth compared with DPO.

SFT is the baseline of the other papers; the curves are those of claims/dpo.py. If all responses
have one length, the optimum of SFT is the distribution of the chosen responses, in which no
response is more than twice as likely as before; this is a test in a table
(tests/methods/test_sft.py).

What theory expects: up to the KL at which SFT stops by itself, both follow nearly the same path. On
tuning seeds 100 to 102, SFT was not worse than DPO at matched KL: it ended at a small KL, where its
reward was at least DPO's at beta 1. DPO at a tenth of this beta ended with about twice the reward
at more than ten times the KL.
"""

from claims import dpo as of_dpo
from lab.claims import claim


def measure(lab):
    """Curves of DPO at beta 1 and of SFT, on the same pairs of reviews."""
    arms = {name: of_dpo.ARMS[name] for name in ("dpo, beta 1", "sft")}
    how = dict(steps=120, batch_size=32, eval_size=1000, eval_every=30)
    return lab.race(arms, world="reviews", **how)


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
        "On reviews, SFT ends at a smaller KL from the base model than DPO at beta 1, after "
        "equally many steps",
        "kl",
        "sft",
        "<",
        "dpo, beta 1",
        margin=0.1,
    ),
]
