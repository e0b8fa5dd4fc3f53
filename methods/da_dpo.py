"""DA-DPO - Cost-efficient Difficulty-aware Preference Optimization for Reducing MLLM Hallucinations
(2026), arXiv:2601.00623

Most multimodal preference pairs are easy, since the rejected response is plainly wrong. DPO keeps
raising their margins, while those of fine-grained pairs hardly change. DA-DPO measures once how far
apart the two responses are, by two frozen models, contrastive (CLIP) and generative. A larger gap
means a larger beta and earlier saturation:

    g = a_c n(c) + a_m n(m)             gaps c and m, n(v) = Phi((v - mean) / std)
    z = beta alpha (1 + g) [ log pi(y_w) / pi_ref(y_w) - log pi(y_l) / pi_ref(y_l) ]
    loss = -log sigmoid(z)

Compared with DPO, an easy pair's gradient is larger at first and smaller later.

Differences from the paper
1. Phi and the weights a_c, a_m are our reading, since the code of the gaps is unpublished.
2. The generative score is the summed log-prob under the reference.
3. Without an image-text similarity, the contrastive score is log p(y|x) - log p(y|x') with another
   row's prompt x'.
4. `reach`, which scales g, and `matched` are ours.

    python train.py --method da_dpo                  fewer captions hallucinate
    python train.py --method da_dpo --matched true   at DPO's mean beta
"""

from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair, readable

PAPER = Paper(
    "pairs",
    worlds=("text",),
    ignores=("k",),
    defaults=dict(world="captions"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference; 0.1 in the released script
    alpha: float = 1.0  # scale of all betas; db_alpha in the released code
    reach: float = 1.0  # weight of the gap g
    gap: str = "normalised"  # g: normalised gaps, or absolute or signed gaps of normalised scores
    contrastive: float | None = None  # weight a_c; default: in proportion to the two accuracies
    matched: bool = False  # scale all betas so that their mean is beta alpha

    def __post_init__(self):
        gaps = ("normalised", "absolute", "signed")
        check_fields(self, beta="(0, inf)", alpha="(0, inf)", reach="(0, inf)")
        check_fields(self, gap=gaps, contrastive="[0, 1]")
        if self.gap == "signed" and self.reach > 1:
            raise UserError(
                f"reach = {self.reach} with gap = signed makes some betas negative: at most 1"
            )


def pair_beta(quality, cfg):
    """beta alpha (1 + reach g) (B,) from normalised scores (B, 2) in [0, 1]."""
    if readable(quality) and not ((quality >= 0) & (quality <= 1)).all():
        raise UserError("the column quality must hold normalised scores, between 0 and 1")
    gap = quality[:, 0] - quality[:, 1]
    return cfg.beta * cfg.alpha * (1 + cfg.reach * (gap if cfg.gap == "signed" else gap.abs()))


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    The column quality (B, 2), chosen first, is made by `vote`: the normalised scores of both
    responses, or their normalised gap and 0.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    delta = chosen - rejected  # (B,)
    beta = pair_beta(batch.quality.detach(), cfg).to(delta.dtype)  # (B,)
    z = beta * delta  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean(), "pair_beta": beta.mean()}


def normalised(values):
    """Phi((v - mean) / std) of the values v, in (0, 1); 1/2 if all values are equal."""
    spread = values.std(correction=0)
    if not spread > 1e-12 * (1 + values.abs().max()):
        return torch.full_like(values, 0.5)
    return torch.special.ndtr((values - values.mean()) / spread)


def accuracy(scores):
    """The share of pairs, with scores (N, 2), ranked as they are labelled; ties count half."""
    return (torch.sign(scores[:, 0] - scores[:, 1]) / 2 + 0.5).mean().item()


def vote(contrastive, generative, cfg):
    """The column quality (N, 2) from the scores of both estimators, each (N, 2) float64.

    UserError: a score is not finite.
    """
    for name, scores in dict(contrastive=contrastive, generative=generative).items():
        if not scores.isfinite().all():
            raise UserError(f"the {name} estimator has no finite score for some response")
    right = accuracy(contrastive), accuracy(generative)
    share = right[0] / sum(right) if sum(right) else 0.5
    share = share if cfg.contrastive is None else cfg.contrastive
    if cfg.gap == "normalised":  # the quality of chosen is the normalised gap, of rejected 0
        gaps = [normalised(x[:, 0] - x[:, 1]) for x in (contrastive, generative)]
        contrastive, generative = (torch.stack([g, 0 * g], 1) for g in gaps)
    else:
        contrastive, generative = normalised(contrastive), normalised(generative)
    return share * contrastive + (1 - share) * generative


def estimates(lab, model, rows):
    """Scores (N, 2) of the responses of N pairs by the contrastive and the generative estimator."""

    def total(rows):
        sums = [[sum(tokens) for tokens in row] for row in lab.logps(model, rows)]
        return torch.tensor(sums, dtype=torch.float64)

    generative = total(rows)
    if "similarity" in lab.world.proxies:
        texts = [(lab.text(row["prompt"]), lab.text(r)) for row in rows for r in row["responses"]]
        return lab.world.proxies["similarity"](*zip(*texts)).view(-1, 2), generative
    keep = ("responses", "ends", "context")
    others = [{name: row[name] for name in keep if name in row} for row in rows]
    others = [row | {"prompt": rows[i - 1]["prompt"]} for i, row in enumerate(others)]
    return generative - total(lab.rows(others)), generative


def balanced(cfg, quality):
    """The Config for these pairs; `matched` scales alpha to a mean beta of cfg.beta * cfg.alpha."""
    if not cfg.matched:
        return cfg
    mean = pair_beta(quality, cfg).mean().item()
    return replace(cfg, alpha=cfg.alpha * cfg.beta * cfg.alpha / mean)


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    quality = vote(*estimates(lab, policy, data), cfg)
    data = [row | {"quality": scores} for row, scores in zip(data, quality.tolist())]
    return lab.align(policy, data, loss, balanced(cfg, quality))
