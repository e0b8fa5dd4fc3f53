"""DisCO - Reinforcing Large Reasoning Models with Discriminative Constrained Optimization (2025), arXiv:2505.12366

With a verifier's rewards of 0 and 1, GRPO's objective is the gap between the scores of right and wrong responses times a weight
sqrt(p (1 - p)) of the question, p = its success rate (prop. 1): questions that are hard, or easy, hardly count. DisCO maximises the gap
itself, with one score that is never clipped, a soft maximum over the wrong responses, and a penalty that only acts outside a trust region.

    s(o) = mean_t log pi(o_t)   (log_l)     or     mean_t pi(o_t) / pi_old(o_t)   (l_ratio)
    J    = mean_{o right} [ s(o) - tau log mean_{o' wrong} exp( s(o') / tau ) ]                    disco_b: the plain mean over o'
    loss = -J + beta max( KL(pi_old || pi) - delta, 0 )^2

An outer step samples k responses to four mini-batches of questions (or to --prompts questions) from the policy, which is pi_old then, and
takes one optimizer step a mini-batch. The KL is the mean of log pi_old - log pi over all response tokens of the mini-batch.

GRPO, Dr. GRPO and DAPO, which the paper compares with, are variants of the same loss; A is a reward less its group's mean, over the
group's standard deviation except in Dr. GRPO, and rho = pi / pi_old a token:

    loss = - min( rho A, clip(rho, 1 - epsilon, 1 + epsilon) A )

as the mean over tokens, then responses (GRPO), the sum over tokens by a constant (Dr. GRPO), or the mean over all tokens of the mini-batch
with another epsilon above (DAPO).

What this file does differently from the paper:
1. tau 1 and a wider delta, for small models: a step of theirs moves farther
2. the penalty is the paper's square; the official code's gradient is half of it
3. the baselines have no KL to a reference, and DAPO does not sample again where a group is all right or all wrong (nor in the paper)
"""

from dataclasses import dataclass, fields

import torch

FAMILY, KINDS, NEEDS = "online", ("text",), "verifier"
DEFAULTS = dict(world="arithmetic", k=8)

# what each variant reads, with its defaults
CONSTRAINED = dict(score="log_l", delta=0.01, beta=1000.0, estimator="k1")
READS = dict(
    disco=CONSTRAINED | dict(tau=1.0),
    disco_b=CONSTRAINED,
    grpo=dict(epsilon=0.2),
    dr_grpo=dict(epsilon=0.2, normaliser=48.0),
    dapo=dict(epsilon=0.2, epsilon_high=0.28),
)


@dataclass
class Config:
    variant: str = "disco"  # disco, disco_b (no soft maximum); the baselines grpo, dr_grpo, dapo
    score: str | None = None  # disco, disco_b: log_l or l_ratio [log_l]
    tau: float | None = None  # disco: temperature of the soft maximum over wrong responses [1]; the paper: 10 with log_l, 1 with l_ratio
    delta: float | None = None  # disco, disco_b: radius of the trust region, nats a token [0.01]; the paper: 1e-4
    beta: float | None = None  # disco, disco_b: weight of the penalty outside it [1000]
    estimator: str | None = None  # disco, disco_b: of the KL, k1 (log ratio) or k3 (never negative) [k1]
    epsilon: float | None = None  # grpo, dr_grpo, dapo: clipping of the ratio [0.2]
    epsilon_high: float | None = None  # dapo: clipping above [0.28]
    normaliser: float | None = None  # dr_grpo: what sums over tokens are divided by [48]

    def __post_init__(self):
        if self.variant not in READS:
            raise ValueError(f"variant = {self.variant} must be one of {', '.join(READS)}")
        for field in fields(self)[1:]:
            value, reads = getattr(self, field.name), READS[self.variant]
            if field.name not in reads:
                if value is not None:
                    raise ValueError(f"{field.name} = {value} has no meaning for the variant {self.variant}")
                continue
            value = reads[field.name] if value is None else value
            setattr(self, field.name, value)
            if field.name in ("score", "estimator"):
                allowed = dict(score=("log_l", "l_ratio"), estimator=("k1", "k3"))[field.name]
                if value not in allowed:
                    raise ValueError(f"{field.name} = {value} must be one of {', '.join(allowed)}")
            elif field.name in ("tau", "normaliser"):
                if not 0 < value < float("inf"):
                    raise ValueError(f"{field.name} = {value} must be positive and finite")
            elif not 0 <= value < float("inf"):
                raise ValueError(f"{field.name} = {value} must be 0 or more and finite")


def check_verified(batch):
    """ValueError unless every score is 0 or 1 and every row has a response. One without a scored token is absent, and then scores 0."""
    if batch.mask.device.type != "cpu":  # on CUDA the question would make the device wait
        return
    if not ((batch.scores == 0) | (batch.scores == 1)).all():
        raise ValueError("a score is neither 0 nor 1: a verifier says right or wrong")
    present = batch.mask.any(-1)
    if (batch.scores.bool() & ~present).any() or not present.any(1).all():
        raise ValueError("a response has no scored token")


def mean_of(x, where):
    """Mean (B,) of x (B, K) where `where` (B, K) is true, 0 where it never is."""
    return (x * where).sum(1) / where.sum(1).clamp(min=1)


def gap(s, right, wrong, tau=None):
    """J1 (tau None) or J2 (B,) of scores s (B, K): the mean of the right ones less the mean, or soft maximum, of the wrong ones. 0 for a
    group that lacks either."""
    mixed = right.any(1) & wrong.any(1)
    if tau is None:
        rest = mean_of(s, wrong)
    else:
        some = wrong | ~mixed[:, None]  # a set that is never empty, so that no infinity meets the gradient
        rest = tau * ((s / tau).masked_fill(~some, -torch.inf).logsumexp(1) - some.sum(1).to(s.dtype).log())
    return torch.where(mixed, mean_of(s, right) - rest, 0.0)


def loss(logps, ref_logps, batch, cfg):
    """DisCO's loss, or a baseline's, on groups of K responses with scores of 0 and 1.

    logps (B, K, T) of the policy, ref_logps (B, K, T) of pi_old, 0 outside batch.mask -> losses (B,), metrics. The KL of DisCO and the
    token count of DAPO belong to the mini-batch: every row carries the same penalty. ValueError when a score is neither 0 nor 1 or a
    response has no scored token."""
    check_verified(batch)
    logps, ref_logps = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps))
    present, length, tokens = batch.mask.any(-1), batch.mask.sum(-1).clamp(min=1), batch.mask.sum()
    right, wrong = present & (batch.scores == 1), present & (batch.scores == 0)
    mixed = right.any(1) & wrong.any(1)
    change = logps - ref_logps  # (B, K, T)
    ratio = change.exp()
    kl = (ratio - 1 - change if cfg.estimator == "k3" else -change).sum() / tokens
    metrics = {"round_kl": kl.detach(), "mixed": mixed.to(kl.dtype).mean()}
    if cfg.variant in ("disco", "disco_b"):
        s = (logps if cfg.score == "log_l" else ratio * batch.mask).sum(-1) / length  # (B, K): MEAN over tokens, unclipped
        penalty = cfg.beta * (kl - cfg.delta).clamp(min=0).square()
        losses = -gap(s, right, wrong, cfg.tau) + penalty
        return losses, metrics | {"hinge": (kl > cfg.delta).to(kl.dtype)}
    p = mean_of(right.to(ratio.dtype), present)  # (B,) success rate
    advantage = (right.to(ratio.dtype) - p[:, None]) * present
    if cfg.variant != "dr_grpo":
        advantage = advantage / torch.where(mixed, p * (1 - p), 1.0).sqrt()[:, None]
    high = cfg.epsilon if cfg.epsilon_high is None else cfg.epsilon_high
    A = advantage[..., None]
    per_token = torch.minimum(ratio * A, ratio.clamp(1 - cfg.epsilon, 1 + high) * A) * batch.mask
    if cfg.variant == "dapo":
        return -per_token.sum((1, 2)) * len(p) / tokens, metrics
    per_response = per_token.sum(-1) / (length if cfg.variant == "grpo" else cfg.normaliser)
    return -mean_of(per_response, present), metrics


def run(lab, cfg):
    policy = lab.base()
    questions = lab.settings.prompts or 4 * lab.batch_size

    def data(policy, round):
        return lab.preferences(policy, k=lab.k, n=questions)

    return lab.align(policy, data, loss, cfg, reference="round", every=-(-questions // lab.batch_size))
