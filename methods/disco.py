"""DisCO - Reinforcing Large Reasoning Models with Discriminative Constrained Optimization (2025),
arXiv:2505.12366

With rewards 0 and 1, GRPO maximizes the gap between the scores of right and wrong responses,
weighted by sqrt(p (1 - p)) for the question's success rate p (prop. 1). So questions with p near 0
or 1 get almost no gradient (difficulty bias). DisCO maximizes the gap itself, with an unclipped
score, a logsumexp over the wrong responses and a KL penalty outside a trust region of radius delta:

    s(o) = mean_t log pi(o_t)   (log_l)     or     mean_t pi(o_t) / pi_old(o_t)   (l_ratio)
    J    = mean_{o right} [ s(o) - tau log mean_{o' wrong} exp(s(o') / tau) ]          (disco)
    J    = mean_{o right} s(o) - mean_{o' wrong} s(o')                               (disco_b)
    loss = -J + beta max( KL(pi_old || pi) - delta, 0 )^2

A round takes one pass over groups of K responses sampled from pi_old.

Differences from the paper
1. The default delta is ten times the paper's, since one step moves a small model farther.
2. The penalty is the paper's; the official code has half its gradient.

    python train.py --method disco                       the success rate rises
    python train.py --method disco,grpo --seeds 3        GRPO with as many rollouts
"""

from dataclasses import dataclass

import torch

from data import Paper, UserError, check_fields, fill_variant, readable, upcast

PAPER = Paper(
    "online",
    worlds=("text",),
    needs="verifier",
    defaults=dict(world="arithmetic", steps=160, batch_size=16, lr=3e-4),
)
SHARED = dict(score="l_ratio", delta=0.001, beta=1000.0, estimator="k1")
VARIANTS = dict(disco=SHARED | dict(tau=None), disco_b=SHARED)


@dataclass(frozen=True)
class Config:
    variant: str = "disco"  # disco, or disco_b: a plain mean over the wrong responses
    score: str | None = None  # log_l or l_ratio
    tau: float | None = None  # disco: temperature of the logsumexp [1 with l_ratio, 10 with log_l]
    delta: float | None = None  # radius of the trust region, nats per token; paper: 1e-4
    beta: float | None = None  # weight of the penalty outside the trust region
    estimator: str | None = None  # estimator of the KL: k1 (log-ratio) or k3 (never negative)

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        if self.variant == "disco" and self.tau is None:
            object.__setattr__(self, "tau", 1.0 if self.score == "l_ratio" else 10.0)
        check_fields(
            self,
            score=("log_l", "l_ratio"),
            tau="(0, inf)",
            delta="[0, inf)",
            beta="[0, inf)",
            estimator=("k1", "k3"),
        )


def check_verified(batch):
    """Check that scores are 0 or 1 and that every row has a scored token; else UserError.

    Checked where values are `readable`. An absent response has no scored token and a score of 0.
    """
    if not readable(batch.mask):
        return
    if not ((batch.scores == 0) | (batch.scores == 1)).all():
        raise UserError("a score is neither 0 nor 1, but DisCO needs the rewards of a verifier")
    present = batch.mask.any(-1)
    if (batch.scores.bool() & ~present).any() or not present.any(1).all():
        raise UserError("a response has no scored token")


def mean_of(x, where):
    """Mean (B,) of x (B, K) over the responses for which `where` (B, K) is true; 0 if none."""
    return (x * where).sum(1) / where.sum(1).clamp(min=1)


def gap(s, right, wrong, tau=None):
    """J (B,) of scores s (B, K), with tau = None that of disco_b.

    right, wrong: (B, K) bool. J is 0 for a group whose responses are all right or all wrong.
    """
    mixed = right.any(1) & wrong.any(1)
    if tau is None:
        rest = mean_of(s, wrong)
    else:
        # keep the set non-empty: logsumexp over only -inf has NaN gradients
        some = wrong | ~mixed[:, None]
        total = (s / tau).masked_fill(~some, -torch.inf).logsumexp(1)
        rest = tau * (total - some.sum(1).to(s.dtype).log())
    return torch.where(mixed, mean_of(s, right) - rest, 0.0)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T) of pi and pi_old, 0 outside batch.mask -> losses (B,), metrics."""
    check_verified(batch)
    logps, ref_logps = upcast(logps, ref_logps)
    present, length = batch.mask.any(-1), batch.mask.sum(-1).clamp(min=1)
    right, wrong = batch.scores == 1, present & (batch.scores == 0)
    change = logps - ref_logps  # (B, K, T)
    ratio = change.clamp(max=40.0).exp()  # the penalty squares it, and float32 ends at exp(88)
    s = logps if cfg.score == "log_l" else ratio * batch.mask
    s = s.sum(-1) / length  # (B, K): MEAN over tokens, unclipped
    kl = ratio - 1 - change if cfg.estimator == "k3" else -change
    kl = kl.sum() / batch.mask.sum()  # one number: the mean over all tokens of the batch
    penalty = cfg.beta * (kl - cfg.delta).clamp(min=0).square()
    losses = penalty - gap(s, right, wrong, cfg.tau)
    mixed = right.any(1) & wrong.any(1)  # the groups with a gradient
    metrics = {"round_kl": kl.detach(), "mixed": mixed.to(kl.dtype).mean()}
    return losses, metrics | {"hinge": (kl > cfg.delta).to(kl.dtype)}


def questions(lab):
    """The number of questions per round: --prompts, by default those of four optimizer steps."""
    return lab.settings.prompts or 4 * lab.batch_size


def rollout(lab, policy, round):
    """Groups of --k responses of the policy to fresh questions, scored by the verifier."""
    return lab.preferences(policy, k=lab.k, n=questions(lab), ties=True)


def run(lab, cfg):
    policy = lab.base()
    every = -(-questions(lab) // lab.batch_size)  # optimizer steps per round

    def data(policy, round):
        return rollout(lab, policy, round)

    return lab.align(policy, data, loss, cfg, reference="round", every=every)
