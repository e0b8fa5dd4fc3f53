"""DID - Differential Information: An Information-Theoretic Perspective on Preference Optimization
(2025), arXiv:2505.23761

If the step from pi_ref to pi is a Bayesian update, its evidence has likelihood pi / pi_ref. This
ratio, normalized over responses, is the differential information distribution (DID) q_{pi/ref}.
Let chosen responses be sampled from pi_ref and rejected ones from another policy pi_l. If q_{ref/l}
is proportional to q_{*/ref} to the power beta, then the optimum of DPO with the same beta is the
target policy pi*. This condition yields the best sampler pi_l of rejected responses:

    q_{pi/ref}(y) = [pi(y) / pi_ref(y)] / sum_y' [pi(y') / pi_ref(y')]
    pi_l(y) ~ pi_ref(y) [pi_ref(y) / pi*(y)]^beta                  (Theorem 3.3, solved for pi_l)
    z = beta [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = -log sigmoid(z)

Differences from the paper
1. The target is pi* ~ pi_ref exp(r / goal), with the true reward r.
2. `run` resamples y_l from k - 1 samples of pi_ref, which becomes exact as k grows.
3. DPO-PG and the entropy estimate are left out: we had no access to their definitions.

    python train.py --method did                 the true reward rises, the chosen log-prob falls
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair, reorder

PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    needs="reward",  # `run` makes its own pairs
    defaults=dict(world="reviews", k=8, label_temperature=0.0),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.5  # power of the sampler and strength of the pull to the reference
    goal: float = 0.25  # the target is pi_ref exp(r / goal); a smaller goal is farther away

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", goal="(0, inf)")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def did(log_p, log_ref):
    """Log-probs (..., R) of the differential information distribution of log_p against log_ref.

    log_p, log_ref: log-probs (..., R) of all R responses.
    """
    return (log_p - log_ref).log_softmax(-1)


def rejected_sampler(log_ref, log_target, beta):
    """Log-probs (..., R) of the best sampler of rejected responses. UserError: beta <= 0."""
    if not 0 < beta < float("inf"):
        raise UserError(f"beta = {beta}: expected a number in (0, inf); with 0 labels are random")
    return (log_ref + beta * (log_ref - log_target)).log_softmax(-1)


def source_pairs(rows, cfg, rng):
    """Rows of k scored samples of pi_ref -> pairs of the first sample and one of the others.

    The rejected response is drawn with weights exp(-beta score / goal), which are proportional to
    pi_l / pi_ref. UserError: k < 3.
    """
    pairs = []
    for row in rows:
        if len(row["responses"]) < 3:
            raise UserError(f"{len(row['responses'])} responses per prompt: --k must be at least 3")
        scores = torch.tensor(row["scores"][1:], dtype=torch.float64)
        weights = (-cfg.beta / cfg.goal * scores).softmax(0)
        order = [0, 1 + int(torch.multinomial(weights, 1, generator=rng))]
        pairs.append(reorder(row, order) | {"scores": [1.0, 0.0]})
    return pairs


def run(lab, cfg):
    if lab.k < 3:
        raise UserError(f"--k {lab.k} is too few to choose a rejected response from: at least 3")
    policy = lab.base()
    data = lab.rows(source_pairs(lab.preferences(policy), cfg, lab.rng("sources")))
    return lab.align(policy, data, loss, cfg)
