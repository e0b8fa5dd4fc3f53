"""TPO - Tree Preference Optimization: Aligning Large Language Models with Multi-branch & Multi-step
Preference Trees (2024), arXiv:2410.12854

TPO trains on a ranked list of solutions of one problem. It weights pairs as in learning to rank,
and the steps of a pair by their similarity (Adaptive Step Reward). With the log-ratio g_ik of step
k of response i, scores v in [0, 1], ranks tau and mean hidden states u:

    w_ij,k = 1 + cos(u_ik, u_jk)
    RM_ij = beta sum_k w_ij,k (g_ik - g_jk)
    lam_ij = |2^v_i - 2^v_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|
    loss = -sum_{v_i > v_j} lam_ij log sigmoid(RM_ij) / sum lam

A row is a tree of steps whose root-to-leaf paths are the responses; shared steps cancel.

Differences from the paper
1. We had no access to the paper's equations; the loss is LiPO's lambda loss with the step weights
   of the released code.
2. The released code's outer loss, which inverts the ranking, is left out.
3. Surplus steps, beyond the shortest response, are merged into the last common one.
4. w and lam have no gradient, and the loss is divided by sum lam.

    python train.py --method tpo                     more correct sums
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, check_lists, paths, readable, upcast
from toy.chains import grown

PAPER = Paper(
    "lists",
    worlds=("text",),
    defaults=dict(world="arithmetic", k=5, prompts=1280, steps=40, lr=1e-4),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.5  # scale of the step rewards; 0.5 in the released code
    tau: str = "model"  # ranks in lam: model, by the current rewards; label, by v; none: lam = 1
    asr: bool = True  # adaptive step reward: weight the steps of a pair; false: w = 1
    reduce: str = "sum"  # over the tokens of a step: sum or mean (released code)
    divide: bool = True  # divide the loss of a list by sum lam, so that lam does not set its scale

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", tau=("model", "label", "none"), reduce=("sum", "mean"))


def check_trees(batch, on, leaf):
    """Check the scores, and that no path to a leaf of a tree has an empty step; else UserError."""
    check_lists(leaf, batch.scores, 0, 1)  # larger scores would dominate the gain 2^v
    empty = ~batch.mask.any(-1)[:, None]  # (B, 1, K)
    if readable(batch.mask) and (on & leaf[..., None] & empty).any():
        raise UserError("a step without a scored token lies on the path of a response")


def step_places(on, leaf):
    """(B, i, K, D) bool: node k belongs to step d of response i.

    Nodes beyond the depth of the shortest response of the tree belong to the step at that depth.
    D equals K, and the steps beyond that depth are empty.
    """
    depth = on.sum(-1) - 1  # (B, K)
    last = depth.masked_fill(~leaf, on.shape[1]).amin(1, keepdim=True)
    return on[..., None] & F.one_hot(torch.minimum(depth, last), on.shape[1])[:, None]


def step_weights(batch, parts):
    """Weights w (B, i, j, D) of the steps of all pairs (i, j), without gradient.

    parts: see `step_places`. The column states (B, K, H) holds the sum of the hidden states of the
    tokens of a node.
    """
    states = upcast(batch.states.detach())
    u = torch.einsum("bikd,bkh->bidh", parts.to(states.dtype), states)
    u = F.normalize(u, dim=-1)  # a sum has the direction of the mean
    return 1 + torch.einsum("bidh,bjdh->bijd", u, u)


def pair_weights(rewards, scores, leaf, cfg):
    """Weights lam (B, i, j) of all pairs; 0 unless response i has the higher score.

    Only the order of the rewards is used, so they get no gradient. Equal rewards, as all are at the
    start, are ranked by score; responses that still tie have their mean rank.
    """
    better = (scores[:, :, None] > scores[:, None, :]) & leaf[:, :, None] & leaf[:, None, :]
    if cfg.tau == "none":
        return better.to(rewards.dtype)
    by = rewards if cfg.tau == "model" else scores
    tied = by[:, None] == by[:, :, None]
    above = (by[:, None] > by[:, :, None]) | tied & (scores[:, None] > scores[:, :, None])
    tied = tied & (scores[:, None] == scores[:, :, None])
    tau = 0.5 + (above & leaf[:, None]).sum(-1) + (tied & leaf[:, None]).sum(-1) / 2
    gain, discount = 2**scores, 1 / torch.log(1 + tau.to(rewards.dtype))
    gain = gain[:, :, None] - gain[:, None, :]
    return gain * (discount[:, :, None] - discount[:, None, :]).abs() * better


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T) of the nodes, 0 outside batch.mask -> losses (B,), metrics.

    batch.scores (B, K) in [0, 1] are read at the leaves; asr reads the column states (B, K, H).
    """
    logps, ref_logps = upcast(logps, ref_logps)
    on, leaf = paths(batch)
    check_trees(batch, on, leaf)
    node = (logps - ref_logps).sum(-1)  # (B, K) log-ratios: SUM over tokens
    parts = step_places(on, leaf)  # (B, i, K, D)
    place = parts.to(node.dtype)
    g = torch.einsum("bikd,bk->bid", place, node)  # (B, i, D)
    if cfg.reduce == "mean":
        count = batch.mask.sum(-1).to(g.dtype)
        g = g / torch.einsum("bikd,bk->bid", place, count).clamp(min=1)
    difference = g[:, :, None] - g[:, None, :]  # (B, i, j, D)
    w = step_weights(batch, parts) if cfg.asr else torch.ones_like(difference)
    margin = cfg.beta * (w * difference).sum(-1)  # (B, i, j) RM
    lam = pair_weights(g.sum(-1), batch.scores.detach().to(g.dtype), leaf, cfg)
    losses, total = -(lam * F.logsigmoid(margin)).sum((1, 2)), lam.sum((1, 2))
    if cfg.divide:
        losses = losses / total.clamp(min=torch.finfo(g.dtype).tiny)
    used = (lam > 0)[..., None] & parts.any(2)[:, :, None]
    step_weight = (w * used).sum() / used.sum().clamp(min=1)
    return losses, {"pair_weight": total.mean(), "step_weight": step_weight}


def prepare(policy, batch):
    """The batch with the column states (B, K, H), summed over the tokens of a node."""
    states = policy.hidden(batch).flatten(0, 1)[batch.source]  # (B, K, T, H)
    batch.columns["states"] = (states * batch.mask[..., None]).sum(2)
    return batch


def run(lab, cfg):
    """Sample trees of steps that a verifier scores, or else lists of responses, then align."""
    flip, world = lab.settings.flip, lab.world
    if world.verify_steps is not None and flip:
        raise UserError(f"--flip {flip} does nothing in {world.name}: a verifier grades the steps")
    policy = lab.base()
    if world.verify_steps is not None:
        data = lab.rows(grown(lab, policy))
    else:
        data = []
        for row in lab.preferences(policy):
            low, high = min(row["scores"]), max(row["scores"])
            scores = [(s - low) / ((high - low) or 1.0) for s in row["scores"]]
            data.append(row | {"scores": scores})
    return lab.align(policy, data, loss, cfg, prepare=prepare if cfg.asr else None)
