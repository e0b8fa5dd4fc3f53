"""TPO - Tree Preference Optimization: Aligning LLMs with Multi-branch & Multi-step Preference Trees (2024), arXiv:2410.12854

A problem has many solutions that share their first steps and differ in quality; DPO uses the best and the worst. TPO trains on the whole
ranked list, weighs pairs as learning to rank does, and weighs each STEP of a pair by how alike the two steps are (Adaptive Step Reward),
lest the few steps that differ drown. With step k of response i and its log-ratio g_ik = sum_t [ log pi - log pi_ref ], scores v in [0, 1]:

    w_ij,k = 1 + cos(u_ik, u_jk)                             u: mean last hidden state over a step, without gradient
    RM_ij  = beta sum_k w_ij,k (g_ik - g_jk)                 0 from shared steps, whatever w is
    lam_ij = |2^v_i - 2^v_j| |1 / log(1 + tau_i) - 1 / log(1 + tau_j)|                                        tau: ranks from 1
    loss   = - sum_{v_i > v_j} lam_ij log sigmoid(RM_ij)  [ / sum lam ]

Responses are given as a tree: a node is a step, `parents` names the step it continues, a leaf stands for its path and has the score.

What this file does differently from the paper: its equations could not be read. This is the LiPO form of the loss, and the step weight of
the published code, whose own loss is not followed: an outer -log sigmoid turns the sign of its ranking loss, it has no lambda, log-probs
are not shifted, cosines carry gradient and are all with the first response. What is open is a field. Steps are aligned by depth, those
beyond the shortest response merged into its last. u is of the states that PREDICT a step's tokens, the first being that of the token before
it. Rewards that tie rank by score. Dividing by sum lam is ours.
"""

import random
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import UserError, collate

FAMILY, KINDS = "lists", ("text",)
DEFAULTS = dict(world="arithmetic", k=5, prompts=1280, steps=40, lr=1e-4)


@dataclass
class Config:
    beta: float = 0.5  # scale of the step rewards (the published code)
    tau: str = "model"  # ranks of the pair weights: model, by the current rewards; label, by the scores; none, all pairs weigh 1
    asr: bool = True  # adaptive step reward: weigh the steps of a pair by their likeness
    reduce: str = "sum"  # over the tokens of a step: sum, mean (the code)
    divide: bool = (
        True  # by the sum of the pair weights, so that the step size does not depend on them
    )

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta = {self.beta} must be positive and finite")
        for name, allowed in dict(tau=("model", "label", "none"), reduce=("sum", "mean")).items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} = {getattr(self, name)} must be one of {', '.join(allowed)}"
                )


def paths(batch):
    """(on (B, K, K): is node k on the path to node i? leaf (B, K): does a response end there?) of trees; no `parents`: flat lists."""
    present = batch.mask.any(-1)
    parents = getattr(batch, "parents", None)
    parents = torch.full_like(present, -1, dtype=torch.long) if parents is None else parents
    places = torch.arange(present.shape[1], device=present.device)
    child_of = parents[..., None] == places  # (B, child, parent)
    on = eye = torch.eye(len(places), device=present.device)
    for _ in range(len(places)):  # a path is a node and the path of its parent
        on = eye + child_of.to(eye.dtype) @ on
    return on.bool(), present & ~child_of.any(1)


def check_trees(batch):
    """ValueError unless every row has 2 or more responses, each with a token in every step, and scores of 0 to 1."""
    if batch.mask.device.type != "cpu":  # on CUDA the question would make the device wait
        return
    on, leaf = paths(batch)
    if (leaf.sum(1) < 2).any():
        raise UserError("a list needs at least 2 responses with something to score")
    if not ((batch.scores >= 0) & (batch.scores <= 1)).all():  # NaN is neither
        raise UserError(
            "scores must be between 0 and 1: the gain 2^v of larger ones drowns the rest"
        )
    if (on & leaf[..., None] & ~batch.mask.any(-1)[:, None]).any():
        raise UserError("a step without a scored token lies on the path of a response")


def node_rewards(logps, ref_logps):
    """g (B, K), the log-ratio of every node, in float32 or better."""
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    return (logps - ref_logps).sum(-1)


def step_places(on, leaf):
    """(B, i, K, D): is node k a part of step d of response i? Steps beyond the shortest response are merged into its last one."""
    depth = on.sum(-1) - 1  # (B, K)
    last = depth.masked_fill(~leaf, on.shape[1]).amin(1, keepdim=True)
    return on[..., None] & F.one_hot(torch.minimum(depth, last), on.shape[1])[:, None]


def step_weights(batch, parts):
    """w (B, i, j, D) of the steps of a pair, without gradient, from the column `states` (B, K, H): hidden states summed over a node."""
    states = batch.states.to(torch.promote_types(batch.states.dtype, torch.float32))
    u = F.normalize(
        torch.einsum("bikd,bkh->bidh", parts.to(states.dtype), states), dim=-1
    )  # a mean has the direction of the sum
    return 1 + torch.einsum("bidh,bjdh->bijd", u, u)


def pair_weights(rewards, scores, leaf, cfg):
    """lam (B, i, j) of the pairs in which response i has the higher score, 0 for the others, without gradient."""
    better = (scores[:, :, None] > scores[:, None, :]) & leaf[:, :, None] & leaf[:, None, :]
    if cfg.tau == "none":
        return better.to(rewards.dtype)
    by = (
        rewards if cfg.tau == "model" else scores
    )  # what ties (all rewards do at the start) ranks by score, then all have the mean rank
    tied = by[:, None] == by[:, :, None]
    above = (by[:, None] > by[:, :, None]) | tied & (scores[:, None] > scores[:, :, None])
    tied = tied & (scores[:, None] == scores[:, :, None])
    tau = 0.5 + (above & leaf[:, None]).sum(-1) + (tied & leaf[:, None]).sum(-1) / 2
    gain, discount = 2**scores, 1 / torch.log(1 + tau.to(rewards.dtype))
    return (
        (gain[:, :, None] - gain[:, None, :])
        * (discount[:, :, None] - discount[:, None, :]).abs()
        * better
    )


def loss(logps, ref_logps, batch, cfg):
    """TPO's loss on trees of steps, or flat lists, with batch.scores (B, K) in [0, 1] at the leaves and, with asr, the column `states`.

    logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,) in nats, metrics: sum of lam, mean of w. ValueError: check_trees."""
    check_trees(batch)
    node, (on, leaf) = node_rewards(logps, ref_logps), paths(batch)
    parts = step_places(on, leaf)
    g = torch.einsum("bikd,bk->bid", parts.to(node.dtype), node)
    if cfg.reduce == "mean":
        g = g / torch.einsum(
            "bikd,bk->bid", parts.to(node.dtype), batch.mask.sum(-1).to(node.dtype)
        ).clamp(min=1)
    difference = g[:, :, None] - g[:, None, :]  # (B, i, j, D)
    w = step_weights(batch, parts) if cfg.asr else torch.ones_like(difference)
    margin = cfg.beta * (w * difference).sum(-1)  # RM
    lam = pair_weights(g.sum(-1), batch.scores.to(g.dtype), leaf, cfg)
    losses, total = -(lam * F.logsigmoid(margin)).sum((1, 2)), lam.sum((1, 2))
    if cfg.divide:
        losses = losses / total.clamp(min=torch.finfo(g.dtype).tiny)
    used = (lam > 0)[..., None] & parts.any(2)[:, :, None]
    return losses, {
        "pair_weight": total.mean(),
        "step_weight": w[used].sum() / used.sum().clamp(min=1),
    }


def with_states(policy, batch):
    """The batch with the column `states` (B, K, H): the policy's hidden states that predict a node's tokens, summed (for `align`)."""
    batch.columns["states"] = (
        policy.hidden(batch).flatten(0, 1)[batch.source] * batch.mask[..., None]
    ).sum(2)  # of (B, K, T, H)
    return batch


def tree(prompt, chains, scores):
    """Responses as lists of steps (token ids), each with whether it ended -> a row in which equal beginnings are one node."""
    nodes, values = {}, {}
    for (steps, ended), score in zip(chains, scores):
        parent = -1
        for n, ids in enumerate(steps):
            parent = nodes.setdefault(
                (parent, tuple(ids), ended and n + 1 == len(steps)), len(nodes)
            )
        values[parent] = float(score)
    parents, responses, ends = zip(*nodes)
    row = dict(
        prompt=prompt,
        responses=[list(ids) for ids in responses],
        parents=list(parents),
        ends=list(ends),
    )
    return row | {"scores": [values.get(k, 0.0) for k in range(len(nodes))]}


def split_steps(ids, tokenizer):
    """Token ids cut behind every separator of steps; at least one step, which may be empty."""
    steps = [[]]
    for i in ids:
        steps[-1].append(i)
        if tokenizer.decode([i]) in {",", ";", "\n", ":"}:
            steps.append([])
    return steps if steps[-1] or len(steps) == 1 else steps[:-1]


def grown(lab, policy):
    """Trees as the paper grows them, --k responses each: a right solution, k - 2 that the policy writes from a beginning of it of random
    length, and one of its own. Scores: 1 for a right one, else 0.9 of its share of right steps before the first wrong one."""
    world, encode = lab.world, lab.world.tokenizer.encode
    rng, rows = random.Random(int(torch.randint(2**62, (), generator=lab.rng("trees")))), []
    prompts = world.prompts(lab.prompts, lab.rng("prompts"))
    right = [
        split_steps(encode(world.demonstrate(prompt, rng)), world.tokenizer) for prompt in prompts
    ]
    begun = [
        steps[:cut]
        for steps in right
        for cut in [*(rng.randrange(1, len(steps)) for _ in range(lab.k - 2)), 0]
    ]
    asked = [encode(prompts[i // (lab.k - 1)]) + sum(start, []) for i, start in enumerate(begun)]
    written = iter(zip(begun, lab.sample(policy, asked, 1)))
    for prompt, steps in zip(prompts, right):
        chains, scores = [(steps, True)], [1.0]
        for start, row in (next(written) for _ in range(lab.k - 1)):
            chains.append(
                (start + split_steps(row["responses"][0], world.tokenizer), row["ends"][0])
            )
            ids = sum(chains[-1][0], [])
            marks = world.verify_steps(prompt, ids)
            scores.append(
                1.0
                if world.verify(prompt, ids) and all(marks)
                else 0.9 * [*marks, False].index(False) / len(marks)
            )
        rows.append(tree(prompt, chains, scores))
    return [
        row for row in rows if len(set(row["parents"]) - {-1}) < len(row["parents"]) - 1
    ]  # two leaves or more


def run(lab, cfg):
    policy = lab.base()
    if lab.world.verify_steps is not None:
        if lab.settings.flip:
            raise UserError(
                f"--flip {lab.settings.flip} does nothing in {lab.world.name}: the verifier grades the steps"
            )
        data = lab.rows(grown(lab, policy))
    else:  # flat lists, every response one step
        data = []
        for row in lab.preferences(policy):
            low, high = min(row["scores"]), max(row["scores"])
            data.append(
                row | {"scores": [(s - low) / ((high - low) or 1.0) for s in row["scores"]]}
            )
    return lab.align(policy, data, loss, cfg, prepare=with_states if cfg.asr else None)


# ---------------------------------------------------------------- the claim


def dpo_of_ends(logps, ref_logps, batch, cfg):
    """The baseline: DPO between the best and the worst response of a list."""
    on, leaf = paths(batch)
    r, v = torch.where(on, node_rewards(logps, ref_logps)[:, None], 0).sum(-1), batch.scores
    best, worst = (
        v.masked_fill(~leaf, -torch.inf).argmax(1, keepdim=True),
        v.masked_fill(~leaf, torch.inf).argmin(1, keepdim=True),
    )
    differ = v.gather(1, best) > v.gather(1, worst)
    return -(F.logsigmoid(cfg.beta * (r.gather(1, best) - r.gather(1, worst))) * differ)[:, 0], {}


def on_chains(lab, seed):
    """Lists of five chains of the modular sums, grown as trees are -> {name: share of right ends, exact} after equal steps."""
    here = lab.at(world="modular", seed=seed, eval_every=150)
    lists, every, found = here.world.lists(here.prompts, here.rng("chains")), slice(5), {}
    for name, objective, cfg, some in (
        ("TPO", loss, Config(asr=False), every),
        ("TPO, label", loss, Config(tau="label", asr=False), every),
        ("all pairs", loss, Config(tau="none", asr=False), every),
        ("best and worst", dpo_of_ends, Config(), every),
        ("fixed pair", dpo_of_ends, Config(), slice(0, 5, 4)),
    ):
        rows = [row | {n: row[n][some] for n in ("responses", "scores")} for row in lists]
        found[name] = here.align(here.base(), rows, objective, cfg).expect(here.world.truth)
    return found


def on_worked_sums(lab, seed):
    """The same trees of worked sums -> {name: true reward after equal steps}, and `w`, the mean step weight of the base model's pairs."""
    here = lab.at(
        world="arithmetic",
        seed=seed,
        k=5,
        prompts=1280,
        steps=40,
        lr=1e-4,
        eval_size=512,
        eval_every=40,
    )
    policy = here.base()
    rows = here.rows(grown(here, policy))
    with torch.no_grad():
        batch = with_states(policy, collate(rows[:64], here.world.tokenizer).to(here.device))
        logps = policy.logps(batch)
        found = {"w": loss(logps, logps, batch, Config())[1]["step_weight"].item()}
    for name, objective, cfg in (
        ("TPO", loss, Config()),
        ("no ASR, beta w", loss, Config(0.5 * found["w"], asr=False)),
        ("best and worst, beta w", dpo_of_ends, Config(0.5 * found["w"], asr=False)),
    ):
        here.align(here.base(), rows, objective, cfg, prepare=with_states if cfg.asr else None)
        found |= {"start": here.curve[0]["reward"], name: here.curve[-1]["reward"]}
    return found


def claim(lab):
    """Equal lists and steps: TPO ends above DPO on the best and the worst response, and that above DPO on one fixed pair (chains, seeds 100
    to 102: 0.828, 0.825, 0.826 and 0.798, 0.803, 0.805); ranks by the label give less (0.811, 0.805, 0.808), all pairs alike no more than
    DPO (0.803, 0.799, 0.803). Not expected on worked sums (seeds 100, 101): step weights above beta times their mean, 1.98 (0.672, 0.664
    against 0.672, 0.660), as two steps' states are nearly parallel; TPO above DPO of that beta (0.664, 0.648; of 0.5: 0.602, 0.648)."""
    chains, sums = (
        [measure(lab, seed) for seed in lab.seeds] for measure in (on_chains, on_worked_sums)
    )
    claims = []
    for found, ours, other, margin, expected in (
        (chains, "TPO", "best and worst", 0.01, True),
        (chains, "best and worst", "fixed pair", 0.01, True),
        (chains, "TPO", "all pairs", 0.01, True),
        (chains, "TPO", "TPO, label", 0.01, True),
        (sums, "TPO", "start", 0.05, True),
        (sums, "TPO", "best and worst, beta w", 0.02, False),
        (sums, "TPO", "no ASR, beta w", 0.02, False),
    ):
        text, metric = ("chains", "share of right ends") if found is chains else ("sums", "reward")
        side = ([f[name] for f in found] for name in (ours, other))
        claims.append(
            lab.compare(
                f"{text}: {ours} above {other}", metric, *side, margin=margin, expected=expected
            )
        )
    return [
        *claims,
        lab.compare(
            "sums: the mean step weight is nearly 2", "w", [f["w"] for f in sums], [1.8] * len(sums)
        ),
    ]
