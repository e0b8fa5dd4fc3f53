"""ADPO - Anchored Direct Preference Optimization (2025), arXiv:2510.18913

If a policy is fitted directly to a target distribution q over a list of responses (from labels,
rewards, ranks or a teacher), noise in q can move it arbitrarily far. ADPO fits anchored
coordinates: log-ratios to an anchor, divided by a temperature tau, are the logits of a softmax over
the list, which cross-entropy fits to q:

    u_i = log pi(y_i) / pi_anchor(y_i) / tau
    loss = -sum_i q_i log softmax(u)_i                                 gradient in u: softmax(u) - q

The optimum is proportional to pi_anchor q^tau: a larger tau moves it farther from the anchor. A
pair with q = (1, 0) is DPO at beta = 1 / tau. Without an anchor, q = softmax(teacher / tau) is
distillation.

Differences from the paper
1. The versions of the paper differ; this is the sixth.
2. Adaptive tau, clipping and the KL-triggered update of the anchor are left out.
3. Equal scores share a hard target, and compete under target = order.
4. The target kde is our reading of rank smoothing, whose formula is unpublished.

    python train.py --method adpo                    the reward rises
    python train.py --method adpo --anchor round     more reward, more KL
"""

from dataclasses import dataclass

import torch

from data import Paper, UserError, check_fields, check_lists, fill_variant, readable, upcast

PAPER = Paper("lists", worlds=("text", "images", "table"), defaults=dict(world="reviews", k=4))
SOFT = dict(beta_r=0.5)
TARGETS = dict(hard=dict(smoothing=0.0), raw=SOFT, zscore=SOFT, kde=SOFT, given={}, order={})
ANCHORS = dict(fixed={}, round=dict(rounds=4), ema=dict(decay=0.99), uniform={})
REFERENCES = dict(fixed="start", round="round", ema="average", uniform=None)  # for lab.align


@dataclass(frozen=True)
class Config:
    tau: float = 1.0  # temperature of the anchored logits; 1 / beta of DPO
    target: str = "zscore"  # q: hard, raw, zscore, kde, given (the column q), order (Plackett-Luce)
    beta_r: float | None = None  # temperature of the targets raw, zscore and kde
    smoothing: float | None = None  # share of a hard target that goes to the other responses
    reduce: str = "sum"  # sum or mean over the tokens of a response
    # fixed: the base model; round: the policy at each round; ema: its average; uniform: none
    anchor: str = "fixed"
    rounds: int | None = None  # number of rounds for anchor = round, each with lists of its own
    decay: float | None = None  # decay of the moving average for anchor = ema

    def __post_init__(self):
        fill_variant(self, TARGETS, "target")
        fill_variant(self, ANCHORS, "anchor")
        check_fields(self, tau="(0, inf)", beta_r="(0, inf)", smoothing="[0, 1)", decay="[0, 1)")
        check_fields(self, rounds="[1, inf)", reduce=("sum", "mean"))


def check_targets(batch, present):
    """Check that the column q holds a distribution over each list; else UserError."""
    if not hasattr(batch, "q"):
        raise UserError("target = given reads the column q, and the rows have none")
    if readable(batch.q):
        wrong = ~(batch.q >= 0) | (batch.q != 0) & ~present  # true for NaN
        if wrong.any() or ((batch.q.sum(1) - 1).abs() > 1e-4).any():
            raise UserError("targets q must be 0 or more, 0 for an absent response, and sum to 1")


def deviation(scores, present):
    """Unbiased standard deviation (B, 1) of the scores (B, K) of each list; 0 for one score."""
    n = present.sum(1, keepdim=True)
    mean = scores.sum(1, keepdim=True) / n
    return (((scores - mean) * present).square().sum(1, keepdim=True) / (n - 1).clamp(min=1)).sqrt()


def kernel_ranks(scores, present):
    """logit F (B, K), F_i = mean_j Phi((R_i - R_j) / b), with Silverman's bandwidth b."""
    n = present.sum(1, keepdim=True)
    known = scores.masked_fill(~present, torch.nan)
    low, high = (known.nanquantile(share, dim=1, keepdim=True) for share in (0.25, 0.75))
    spread = torch.minimum(deviation(scores, present), (high - low) / 1.34)
    b = (0.9 * spread * n.to(scores.dtype) ** -0.2).clamp(min=1e-3)
    gaps = (scores[:, :, None] - scores[:, None, :]) / b[..., None]  # (B, K, K)
    return torch.logit((torch.special.ndtr(gaps) * present[:, None, :]).sum(2) / n)


def targets(batch, present, cfg):
    """q (B, K), a distribution over each list, without gradient; 0 for absent responses."""
    if cfg.target == "given":
        check_targets(batch, present)
        return batch.q.detach()
    scores = upcast(batch.scores.detach())
    if cfg.target == "hard":  # responses that tie for the best share the target
        best = scores == scores.masked_fill(~present, -torch.inf).amax(1, keepdim=True)
        best, others = ((x & present).to(scores.dtype) for x in (best, ~best))
        best, others = (x / x.sum(1, keepdim=True).clamp(min=1) for x in (best, others))
        smoothed = best + cfg.smoothing * (others - best)
        return torch.where(others.any(1, keepdim=True), smoothed, best)
    if cfg.target == "zscore":  # the mean cancels in the softmax
        scores = scores / (deviation(scores, present) + 1e-8)
    elif cfg.target == "kde":
        scores = kernel_ranks(scores, present)
    return (scores / cfg.beta_r).masked_fill(~present, -torch.inf).softmax(1)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,), metrics.

    ref_logps = None is the uniform anchor. The target is made from batch.scores (B, K), or is the
    column q (B, K).
    """
    present = batch.mask.any(-1)  # (B, K)
    check_lists(present, batch.scores, least=1)
    logps, ref_logps = upcast(logps, ref_logps)
    ratio = logps if ref_logps is None else logps - ref_logps
    count = batch.mask.sum(-1).clamp(min=1) if cfg.reduce == "mean" else 1
    u = (ratio.sum(-1) / count / cfg.tau).masked_fill(~present, -torch.inf)  # (B, K)
    if cfg.target == "order":  # each response against all with no higher score, itself included
        rest = (batch.scores[:, None, :] <= batch.scores[:, :, None]) & present[:, None, :]
        rival = present & (rest.sum(2) > 1)  # the last response has no rival
        rest = torch.where(rest, u[:, None, :], -torch.inf).logsumexp(2)
        return torch.where(rival, rest - u, 0.0).sum(1) / rival.sum(1).clamp(min=1), {}
    log_p = u.log_softmax(1).masked_fill(~present, 0.0)  # over the list, not the vocabulary
    q = targets(batch, present, cfg).to(u.dtype)
    losses = -(q * log_p).sum(1)
    return losses, {"gap": (losses + torch.xlogy(q, q).sum(1)).detach().mean()}  # KL(q || p)


def run(lab, cfg):
    """Sample lists from the base model (or take the world's, or --data), then fit the targets.

    With anchor = round, the policy is the anchor of every round and samples its lists; of the
    world's lists or those of --data, every round takes others.
    """
    given = lab.world.given(None) if lab.world.given is not None else []
    if cfg.target == "given" and not (given and all("q" in row for row in given)):
        raise UserError("target = given needs --data with the column q in every row")
    if cfg.reduce == "mean" and lab.world.kind == "images":
        raise UserError("reduce = mean does nothing for images, which have one number each")
    rounds, total = cfg.rounds or 1, min(lab.prompts, len(given) or lab.prompts)
    n, every = total // rounds, -(-lab.steps // rounds) or 1
    if not n or lab.steps and -(-lab.steps // every) < rounds:
        raise UserError(f"rounds = {rounds} is too many for {lab.steps} steps and {total} prompts")

    def draw(policy, round=0):
        if lab.world.lists is not None:
            return lab.rows(lab.world.lists(n, lab.rng("lists", round), lab.settings.k))
        return lab.preferences(policy, n=n)

    policy = lab.base()
    data = draw if cfg.anchor == "round" else draw(policy)
    return lab.align(policy, data, loss, cfg, REFERENCES[cfg.anchor], every=every, decay=cfg.decay)
