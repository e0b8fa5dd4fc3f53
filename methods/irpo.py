"""IRPO - In-context Ranking Preference Optimization (2025), arXiv:2504.15477

A language model ranks a list of items in its context, of which only a few have a graded relevance.
IRPO gives every item i a term "i beats the rest", weighted as in NDCG by its relevance y_i and
label rank k_i:

    r_i = mean_t log pi(e_i,t | x, earlier items) / pi_ref(same)                  score
    z_i = -log sum_{j in J_i} exp(beta (r_j - r_i))                               competitors J_i
    loss = -mean_i w_i log sigmoid(z_i)               w_i = (2^y_i - 1)/log2(1 + k_i)

With all other items in J_i and free scores, the optimum is softmax(beta r) = w / sum w. Items with
w = 0 are pushed down without bound. Iterative Reasoning Preference Optimization, also abbreviated
IRPO, is another method.

Differences from the paper
1. The default J_i is the released code's; inner = incl is the paper's.
2. The policy does not generate lists.
3. Unlike in the released code, losses are batch means and tokens are scored with the logits before
   them.
4. No item competes with itself, as the released code allows at small beta.

    python train.py --method irpo                    held-out NDCG rises
    python train.py --method irpo --inner excl       listwise softmax
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, check_lists, readable, upcast

PAPER = Paper(
    "lists",
    worlds=("text", "images", "table"),
    defaults=dict(world="ranking"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 1.0  # scale of the log-ratios; 1 in the released scripts
    inner: str = "code"  # sum over J_i: excl, others; incl, all items; code, mean over the others
    reduce: str = "mean"  # over the items of a list: mean (released code) or sum
    weights: str = "ndcg"  # ndcg; position: 1 / log2(1 + k); reciprocal: (2^y - 1) / k

    def __post_init__(self):
        check_fields(
            self,
            beta="(0, inf)",
            inner=("excl", "incl", "code"),
            reduce=("mean", "sum"),
            weights=("ndcg", "position", "reciprocal"),
        )


def check_ranks(batch, present):
    """Check that absent items have no relevance and no rank, and ranks are 1 to n; else UserError.

    present: (B, K) bool. Checked where values are `readable`.
    """
    if not readable(present):
        return
    ranks = getattr(batch, "rank", None)
    used = batch.scores != 0 if ranks is None else (batch.scores != 0) | (ranks != 0)
    if (used & ~present).any():
        raise UserError("an item has no scored token, but it has a relevance or a rank")
    if ranks is not None:
        places = torch.arange(1, ranks.shape[1] + 1)
        wanted = torch.where(places <= present.sum(1, keepdim=True), places, 0)
        if not (ranks.sort(1).values == wanted.sort(1).values).all():
            raise UserError("the ranks of a list must be 1 to n, each once")


def label_ranks(batch):
    """Label ranks k (B, K), 1 = best: the column rank, or by default the order of the scores.

    Ties keep the order of the list. Absent items come last, or have rank 0 in the column.
    """
    if getattr(batch, "rank", None) is not None:
        return batch.rank
    scores = batch.scores.masked_fill(~batch.mask.any(-1), -torch.inf)
    return scores.argsort(descending=True, stable=True).argsort(1) + 1


def relevance_weights(batch, cfg):
    """Weights w (B, K) from the relevance and the label ranks; 0 for an absent item."""
    y, k = batch.scores, label_ranks(batch).clamp(min=1)
    gain = torch.ones_like(y) if cfg.weights == "position" else 2**y - 1
    discount = k if cfg.weights == "reciprocal" else torch.log2(1 + k.to(y.dtype))
    return gain / discount * batch.mask.any(-1)


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,), metrics.

    batch.scores (B, K) are relevances >= 0; the column rank (B, K) is optional.
    """
    present = batch.mask.any(-1)  # (B, K)
    check_lists(present, batch.scores, 0, 63)  # keeps the gain 2^y - 1 below 2^63
    check_ranks(batch, present)
    logps, ref_logps = upcast(logps, ref_logps)
    n = present.sum(1)  # (B,)
    r = (logps - ref_logps).sum(-1) / batch.mask.sum(-1).clamp(min=1)  # (B, K): MEAN over tokens
    w = relevance_weights(batch, cfg).to(r.dtype)  # (B, K)
    against = cfg.beta * (r[:, None, :] - r[:, :, None])  # (B, i, j)
    out = ~present[:, None, :]
    if cfg.inner != "incl":
        out = out | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    z = -against.masked_fill(out, -torch.inf).logsumexp(2)  # (B, K) item i beats the rest
    if cfg.inner == "code":
        z = z + (n - 1).to(r.dtype).log()[:, None]  # turns the sum into a mean
    losses = -(w * F.logsigmoid(z)).sum(1)
    if cfg.reduce == "mean":
        losses = losses / n
    # 1 - sigmoid(z), averaged with the weights w: 0 once every relevant item beats the rest
    disagreement = (w * torch.sigmoid(-z).detach()).sum()
    return losses, {"disagreement": disagreement / w.sum().clamp(min=torch.finfo(w.dtype).tiny)}


def graded(rows):
    """Sampled lists with sparse relevance: 2 for the best response, 1 for the next, else 0.

    Scores that are all 0 or 1 already (pairs, a verifier) are kept.
    """
    out = []
    for row in rows:
        scores = row["scores"]
        if not set(scores) <= {0.0, 1.0}:
            scores = [float(max(0, 2 - sum(other > score for other in scores))) for score in scores]
        out.append(row | {"scores": scores})
    return out


def run(lab, cfg):
    """Take the world's lists (or --data, or samples with sparse relevance), then align on them."""
    policy = lab.base()
    if lab.world.lists is not None:
        data = lab.rows(lab.world.lists(lab.prompts, lab.rng("lists"), lab.settings.k))
    elif lab.world.given is not None:
        data = lab.preferences(policy)
    else:
        data = graded(lab.preferences(policy))
    return lab.align(policy, data, loss, cfg)
