"""IRPO - In-context Ranking Preference Optimization (2025), arXiv:2504.15477

A prompt and a list of items stand in one context; the feedback is sparse and graded: a few items are marked relevant, more or less so. DPO
would compare one pair of them. IRPO gives every item a term "this one beats the rest of the list" and weights it as NDCG does, by the gain
of its relevance and the discount of its rank, so that the order among the relevant items is learnt too.

    r_j  = mean_t [ log pi(e_j,t | prompt, items before) - log pi_ref(same) ]          the score of item j
    w_j  = (2^y_j - 1) / log2(1 + k_j)                                                 its relevance y_j and label rank k_j: data
    z_i  = - log sum_{j in J_i} exp( beta (r_j - r_i) )                                item i against its competitors J_i
    loss = - mean_i w_i log sigmoid(z_i)

Another method has the same abbreviation: Iterative Reasoning Preference Optimization (arXiv:2404.19733).

The paper and its code differ in J_i and in the reductions, and the optimum depends on it, so both are fields. Free scores settle where
p = softmax(beta r) has p_i ~ w_i for `excl`, p_i (1 + p_i) ~ w_i for `incl` and p_i (1 + (n - 2) p_i) ~ w_i for `code`. An item with w = 0
is pushed away without end in all three.

What this file does differently from the paper:
1. lists are the given candidates; the variant in which the policy writes the list itself is left out
2. a batch is the mean over its lists (the code sums), so that the learning rate does not depend on the batch
3. the item is left out of its own sum exactly (the code subtracts 100 before the multiplication by beta, which fails at beta = 0.01), and
   log-probs are those of the next token (the code scores a token with the prediction made after it)
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import UserError, collate

FAMILY, KINDS = "lists", ("text", "images", "table")
DEFAULTS = dict(world="ranking")


@dataclass
class Config:
    beta: float = 1.0  # scale of the log-ratios (the code's scripts)
    inner: str = "code"  # competitors of an item: excl (the others), incl (itself too), code (the mean of the others)
    reduce: str = "mean"  # over the items of a list: mean (the code), sum
    weights: str = "ndcg"  # ndcg: (2^y - 1) / log2(1 + k); position: 1 / log2(1 + k); reciprocal: (2^y - 1) / k

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta = {self.beta} must be positive and finite")
        for name, allowed in dict(
            inner=("excl", "incl", "code"),
            reduce=("mean", "sum"),
            weights=("ndcg", "position", "reciprocal"),
        ).items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} = {getattr(self, name)} must be one of {', '.join(allowed)}"
                )


def label_ranks(batch):
    """The rank (B, K) of each item by its label, 1 = best: the column `rank`, else from the scores, ties in the order of the list.
    Absent items come last, or have rank 0 in the column."""
    if getattr(batch, "rank", None) is not None:
        return batch.rank
    order = batch.scores.masked_fill(~batch.mask.any(-1), -torch.inf).argsort(
        descending=True, stable=True
    )
    return order.argsort(1) + 1


def relevance_weights(batch, cfg):
    """The weight w (B, K) of each item, 0 for an absent one; from batch.mask, batch.scores and the label ranks."""
    y, k = batch.scores, label_ranks(batch).clamp(min=1)
    gain = torch.ones_like(y) if cfg.weights == "position" else 2**y - 1
    return (
        gain / (k if cfg.weights == "reciprocal" else torch.log2(1 + k.to(y.dtype)))
    ) * batch.mask.any(-1)


def check_lists(batch):
    """ValueError unless every row is a list of 2 or more items with relevance >= 0 and ranks 1 to n. An item without a scored token is an
    absent one, and then it has neither relevance nor rank."""
    if batch.mask.device.type != "cpu":  # on CUDA the question would make the device wait
        return
    present = batch.mask.any(-1)
    if (present.sum(1) < 2).any():
        raise UserError("a list needs at least 2 items with something to score")
    wrong = ~((batch.scores >= 0) & (batch.scores < 64))  # NaN is neither
    if wrong.any():
        raise UserError(
            f"relevance {batch.scores[wrong][0]:g}: the gain 2^y - 1 wants scores of 0 to 63"
        )
    ranks = getattr(batch, "rank", None)
    if ((batch.scores != 0) & ~present).any() or (
        ranks is not None and ((ranks != 0) & ~present).any()
    ):
        raise UserError("an item has no scored token but a relevance or a rank")
    if ranks is not None:
        places = torch.arange(1, ranks.shape[1] + 1)
        wanted = torch.where(places <= present.sum(1, keepdim=True), places, 0)
        if not (ranks.sort(1).values == wanted.sort(1).values).all():
            raise UserError("the ranks of a list must be 1 to n, each once")


def item_scores(logps, ref_logps, batch):
    """r (B, K), the MEAN over an item's tokens of the log-ratio, in float32 or better; 0 for an absent item."""
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    return (logps - ref_logps).sum(-1) / batch.mask.sum(-1).clamp(min=1)


def loss(logps, ref_logps, batch, cfg):
    """IRPO's loss on lists of K items with relevance batch.scores (B, K) >= 0 and, where there is one, the column `rank` (B, K).

    logps, ref_logps (B, K, T), 0 outside batch.mask (B, K, T) -> losses (B,) in nats, metrics. ValueError: see check_lists."""
    check_lists(batch)
    r, present = item_scores(logps, ref_logps, batch), batch.mask.any(-1)  # (B, K)
    w = relevance_weights(batch, cfg).to(r.dtype)
    n = present.sum(1)  # (B,)
    against = cfg.beta * (r[:, None, :] - r[:, :, None])  # (B, i, j)
    out = ~present[:, None, :]
    if cfg.inner != "incl":
        out = out | torch.eye(r.shape[1], dtype=torch.bool, device=r.device)
    z = -against.masked_fill(out, -torch.inf).logsumexp(2)  # item i beats the rest
    if cfg.inner == "code":
        z = z + (n - 1).to(r.dtype).log()[:, None]
    losses = -(w * F.logsigmoid(z)).sum(1)
    if cfg.reduce == "mean":
        losses = losses / n
    # how far the policy's order is from the label's, over what counts
    disagreement = (w * torch.sigmoid(-z).detach()).sum() / w.sum().clamp(
        min=torch.finfo(w.dtype).tiny
    )
    return losses, {"disagreement": disagreement}


def graded(rows):
    """Sampled lists with sparse relevance in place of their rewards: 2 for the best response, 1 for the next, 0 for the others. Pairs and a
    verifier's lists have scores of 0 and 1 and stay as they are."""
    out = []
    for row in rows:
        scores = row["scores"]
        if not set(scores) <= {0.0, 1.0}:
            scores = [float(max(0, 2 - sum(other > score for other in scores))) for score in scores]
        out.append(row | {"scores": scores})
    return out


def run(lab, cfg):
    policy = lab.base()
    if lab.world.lists is not None:
        data = lab.rows(lab.world.lists(lab.prompts, lab.rng("lists"), lab.settings.k))
    elif lab.settings.data and lab.world.kind == "text":
        data = lab.preferences(policy)
    else:  # k labelled samples
        data = graded(lab.preferences(policy))
    return lab.align(policy, data, loss, cfg)


# ---------------------------------------------------------------- the claim


def dpo_loss(logps, ref_logps, batch, cfg):
    """DPO between one relevant and one irrelevant item of the list, +1 and -1 in the column `role` (B, K), on the same item scores."""
    r = item_scores(logps, ref_logps, batch)
    return -F.logsigmoid(cfg.beta * (r * batch.role).sum(1)), {}


def sdpo_loss(logps, ref_logps, batch, cfg):
    """Softmax-DPO (arXiv:2406.09215): that relevant item against all irrelevant ones."""
    r = item_scores(logps, ref_logps, batch)
    others = cfg.beta * (r - (r * (batch.role > 0)).sum(1, keepdim=True))
    return -F.logsigmoid(
        -others.masked_fill((batch.scores > 0) | ~batch.mask.any(-1), -torch.inf).logsumexp(1)
    ), {}


def with_roles(rows, rng):
    """The rows with a column `role`: a relevant item at random 1, an irrelevant one at random -1, the others 0."""
    out = []
    for row in rows:
        relevant, draw = (
            torch.tensor(row["scores"]) > 0,
            torch.rand(len(row["scores"]), generator=rng),
        )
        role = torch.zeros(len(draw))
        role[(relevant + draw).argmax()], role[(~relevant + draw).argmax()] = 1.0, -1.0
        out.append(row | {"role": role.tolist()})
    return out


def free_scores(y, loss, cfg, **columns):
    """The scores r (K,) of one list that minimise a loss when nothing ties them together."""
    r = torch.zeros(1, len(y), 1, dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(
        scores=torch.tensor([y]), mask=torch.ones(1, len(y), 1, dtype=torch.bool), **columns
    )
    optimizer = torch.optim.LBFGS(
        [r],
        max_iter=100,
        tolerance_grad=1e-10,
        tolerance_change=1e-14,
        line_search_fn="strong_wolfe",
    )

    def closure():
        optimizer.zero_grad()
        value = loss(r, torch.zeros_like(r), batch, cfg)[0].mean()
        value.backward()
        return value

    optimizer.step(closure)
    return r.detach().flatten()


@torch.no_grad()
def shuffled_agreement(policy, reference, rows, tokenizer, rng):
    """Mean rank correlation (Spearman) of the item scores of each list in its own order and in another one."""

    def places(rows):
        batch = collate(rows, tokenizer)
        r = item_scores(policy.logps(batch), reference.logps(batch), batch)
        return r.argsort(1).argsort(1).double()

    count = len(rows[0]["responses"])
    order = torch.stack([torch.randperm(count, generator=rng) for _ in rows])
    moved = [
        row | {"responses": [row["responses"][j] for j in o]}
        for row, o in zip(rows, order.tolist())
    ]
    gap = places(rows).gather(1, order) - places(moved)
    return 1 - (6 * gap.square().sum(1) / (count**3 - count)).mean().item()


def claim(lab):
    """Free scores settle where the weights say (exact). On lists in context IRPO ranks better than softmax-DPO, and that better than DPO,
    at equal lists and steps, for neither baseline ever compares two relevant items; and its scores do not hang on the order of the list.

    The gain 2^y - 1 is not what helps: weights by position alone are the control, and not expected to lose. And sampling suffers: only
    items are scored, so the policy stops writing lists (the reward of sampled lists falls while NDCG of the scored candidates rises)."""
    claims, found, agree = [], {}, []
    for inner, best in (("excl", 0.745253), ("incl", 0.677810), ("code", 0.677810)):
        p = free_scores((3.0, 2.0, 1.0), loss, Config(inner=inner)).softmax(0)
        claims.append(
            lab.exact(
                f"{inner}: share of the best of three items of relevance 3, 2, 1",
                p[0].item(),
                best,
                1e-5,
            )
        )
    contest = dict(
        irpo=(loss, Config()),
        sdpo=(sdpo_loss, Config()),
        dpo=(dpo_loss, Config()),
        position=(loss, Config(weights="position")),
    )
    for seed in lab.seeds:
        lists = None
        for name, (objective, cfg) in contest.items():
            here = lab.at(
                seed=seed, world="ranking", steps=200, batch_size=32, lr=2e-3, prompts=6400
            )
            policy = here.base()
            lists = lists or here.rows(
                with_roles(here.world.lists(here.prompts, here.rng("lists")), here.rng("roles"))
            )
            policy = here.align(policy, lists, objective, cfg, watch=lambda policy, step: {})
            found.setdefault(name, []).append(here.world.measure(policy, here))
            if name == "irpo":
                held_out, rng = here.world.lists(256, here.rng("held out")), here.rng("shuffle")
                agree.append(
                    shuffled_agreement(policy, here.reference, held_out, here.world.tokenizer, rng)
                )
    for k in (1, 10):
        claims.append(
            lab.compare(
                "IRPO ranks better than softmax-DPO",
                f"ndcg_{k}",
                found["irpo"],
                found["sdpo"],
                margin=0.02,
            )
        )
        claims.append(
            lab.compare(
                "softmax-DPO ranks better than DPO",
                f"ndcg_{k}",
                found["sdpo"],
                found["dpo"],
                margin=0.02,
            )
        )
    claims.append(
        lab.compare(
            "IRPO's scores survive another shuffle", "rank correlation", agree, [0.9] * len(agree)
        )
    )
    name = "the gain of the relevance helps: ndcg weights against position alone"
    claims += [
        lab.compare(name, f"ndcg_{k}", found["irpo"], found["position"], expected=False)
        for k in (1, 10)
    ]
    return claims
