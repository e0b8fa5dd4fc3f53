"""TEMPLATE - The Title of Your Paper (2026), arXiv:0000.00000

Say in three to eight sentences what the paper does: which problem of earlier methods it addresses,
what it changes, and what follows from that. This template is the hinge loss on pairs, as in SLiC: a
pair has no gradient once its margin exceeds delta.

    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = max(0, delta - z)                                                    (eq. N of the paper)

Differences from the paper
1. One sentence for each choice that differs from the paper's, or that the paper leaves open.

    python train.py --method methods/_template.py               the margin rises toward delta / beta
    python train.py --method methods/_template.py --delta 4     a larger margin costs more KL
"""

from dataclasses import dataclass

import torch.nn.functional as F

from data import Paper, check_fields, pair

# What the command line must know without running the file (see data.Paper): the heading under which
# --list shows it, the kinds of world that it runs on, the run settings that do nothing here and are
# refused, and the run settings that it changes when it is run alone.
PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
)


# The paper's own hyper-parameters and nothing else. Each is a flag, and the comment beside it is
# its help text. A field must not have the name of a run setting (--lr, --steps, ...).
@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference
    delta: float = 1.0  # margin beyond which a pair has no gradient

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", delta="(0, inf)")


# The mathematics. B rows, K = 2 responses, T tokens; `batch` has mask (B, K, T), scores (B, K), and
# whatever columns `run` adds to the rows. Return one loss per row, and detached numbers to log.
# Sum or average over T explicitly, since a wrong choice here is the most frequent mistake.
def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)  # refuses what is not a pair; float32
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = F.relu(cfg.delta - z)  # eq. N
    return losses, {"active": (z < cfg.delta).to(z.dtype).mean()}


# The algorithm, in the paper's order. `lab` gives the base model, sampled and labelled responses,
# and the training loop (see lab/lab.py for the other verbs). Return the trained model, a table
# {name: number} for a paper that trains none, or None.
def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)
