"""DNO - Direct Nash Optimization: Teaching Language Models to Self-Improve with General
Preferences (2024), arXiv:2404.03715

No reward explains cyclic preferences, so DNO seeks the Nash equilibrium of the game with payoff
P(y > y'). Round t begins with the policy pi_t. The reward r_t of a response is its win rate over
samples of pi_t, and the implicit reward is fitted to it (Algorithm 1, dno):

    D = eta [ log pi(y1) / pi_t(y1) - log pi(y2) / pi_t(y2) ],    z = sigmoid(r_t(y1) - r_t(y2))
    loss = -z log sigmoid(D) - (1 - z) log sigmoid(-D)                                       (eq. 8)

Algorithm 2 (prct) is iterated DPO (z = 1) on large-margin pairs from pools of K samples and a
teacher's response, ranked by sampled comparisons. Variant restrictive keeps pairs that the
teacher wins; spin prefers the teacher without comparing.

Differences from the paper
1. The margin counts wins, not grades.
2. The last policy is returned, not the best one.
3. Appendix A's regularized game is left out.

    python train.py --method dno                        the policy overtakes its teacher
    python train.py --method dno --variant spin         it stays below its teacher
    python train.py --method dno --world game --variant dno --eta 1 --rounds 30 --output average
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, StopTraining, UserError, check_fields, fill_variant, pair
from toy.exact import Table

PAPER = Paper(
    "online",
    worlds=("text", "table"),
    needs="reward",
    defaults=dict(world="reviews"),
    demo=dict(k=5, prompts=1536, steps=180, lr=5e-4),
)
VARIANTS = dict(
    prct=dict(margin=2, replay=0.3),
    restrictive=dict(margin=2, replay=0.3),
    spin=dict(replay=0.3),
    dno=dict(output="last"),
)


@dataclass(frozen=True)
class Config:
    variant: str = "prct"  # prct (Algorithm 2), restrictive, spin, or dno (Algorithm 1)
    eta: float = 0.1  # strength of the pull to the round's policy, as beta in DPO
    rounds: int = 3  # each has its own prompts and an equal share of the steps
    gold: bool | None = None  # the teacher's response joins the pool [if the world has a teacher]
    margin: int | None = None  # prct, restrictive: least difference in wins between the two
    replay: float | None = None  # share of pairs of the last round that are added; then halves
    output: str | None = None  # dno: last, or average: the uniform mixture of a table's policies

    def __post_init__(self):
        if self.rounds == 1 and self.replay is not None:
            raise UserError(f"replay = {self.replay} does nothing with rounds = 1")
        fill_variant(self, VARIANTS)
        if self.rounds == 1:  # no round is older
            object.__setattr__(self, "replay", None)
        check_fields(
            self,
            eta="(0, inf)",
            rounds="[1, inf)",
            margin="[1, inf)",
            replay="[0, 1]",
            output=("last", "average"),
        )
        if self.variant in ("restrictive", "spin") and self.gold is False:
            raise UserError(f"gold = False: variant = {self.variant} needs the teacher's response")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), 0 outside batch.mask -> losses (B,), metrics.

    batch.preference (B,): z, which is 1 except in Algorithm 1. batch.teacher (B, 2): 1 where the
    response is the teacher's.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    first, second = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    D = cfg.eta * (first - second)  # (B,) margin of the implicit reward
    z = batch.preference.to(D.dtype)
    losses = -z * F.logsigmoid(D) - (1 - z) * F.logsigmoid(-D)  # eq. 8; with z = 1 eq. 13
    weight = (z - torch.sigmoid(D)).detach().mean()
    return losses, {"weight": weight, "overtaken": batch.teacher[:, 1].to(D.dtype).mean()}


def with_gold(lab, cfg):
    """Whether the teacher's response joins the pool."""
    return cfg.gold is True or (cfg.gold is None and lab.world.teacher is not None)


def check_pool(lab, cfg):
    """UserError unless the pools of this run can give pairs."""
    if 0 < lab.steps < cfg.rounds:
        raise UserError(f"--steps {lab.steps} is too few for rounds = {cfg.rounds}")
    if lab.prompts < cfg.rounds:
        raise UserError(f"--prompts {lab.prompts} is too few for rounds = {cfg.rounds}")
    needed = cfg.gold is True or cfg.variant in ("restrictive", "spin")
    if needed and lab.world.teacher is None:
        raise UserError(f"{lab.world.name} has no teacher: --gold false with variant prct or dno")
    noise = ("flip", "label_temperature", "length_bias")
    changed = [n for n in noise if getattr(lab.settings, n) != getattr(type(lab.settings), n)]
    if cfg.variant == "spin" and changed:
        raise UserError(f"--{changed[0]} does nothing with variant = spin: nothing is compared")
    most = lab.k - 1 + with_gold(lab, cfg)
    if (cfg.margin or 0) > most:
        raise UserError(f"margin = {cfg.margin}: a response has at most {most} wins in its pool")
    if cfg.output == "average" and lab.world.kind != "table":
        raise UserError("output = average: only tables have a mixture of policies as a policy")


def pools(lab, policy, t, cfg):
    """Rows of K samples of the policy to fresh prompts, and the teacher's response after them."""
    n = lab.prompts // cfg.rounds
    golds = lab.world.teacher(n, lab.rng("teacher", t)) if with_gold(lab, cfg) else []
    prompts = [gold["prompt"] for gold in golds] or lab.world.prompts(n, lab.rng("prompts", t))
    rows = lab.sample(policy, prompts, lab.k, lab.rng("responses", t))
    for row, gold in zip(rows, golds):
        row["responses"] = [*row["responses"], lab.tokens(gold["responses"][0])]
        row["ends"] = [*row["ends"], True]
    return rows


def chances(lab, rows):
    """P (n, M, M): the probability that response i of a pool is preferred to response j."""
    count = len(rows[0]["responses"])
    i, j = torch.triu_indices(count, count, 1)
    asked = [(row["prompt"], row["responses"], a, b) for row in rows for a, b in zip(i, j)]
    prompts, first, second = zip(*((x, ys[a], ys[b]) for x, ys, a, b in asked))
    P = torch.full((len(rows), count, count), 0.5, dtype=torch.float64)
    P[:, i, j] = lab.prefers(prompts, first, second).view(len(rows), -1)
    P[:, j, i] = 1 - P[:, i, j]
    return P


def ranks(P, k, rng, cfg):
    """How good the responses of the pools are, (n, M): win rates for dno, otherwise wins.

    P: see `chances`; the first k responses are samples of the policy. Each two responses are
    compared once.
    """
    if cfg.variant == "dno":
        others = 1 - torch.eye(P.shape[1], dtype=P.dtype)[:, :k]  # not a response against itself
        return (P[:, :, :k] * others).sum(-1) / others.sum(-1)
    upper = (torch.rand(P.shape, generator=rng, dtype=P.dtype) < P).triu(1)
    lower = (~upper).mT.tril(-1)
    return (upper | lower).sum(-1).to(P.dtype)


def pairs_of(row, r, k, cfg, level=None):
    """The pairs of one pool, the better response first; r: a list of the M ranks.

    level[i][j]: whether responses i and j are known to be equally good, and so not a pair.
    """
    out = []
    for i in range(len(r)):
        for j in range(len(r)):
            if cfg.variant == "spin":
                keep = i == k != j  # the teacher's response is number k
            elif cfg.variant == "dno":
                keep = r[i] > r[j] or (r[i] == r[j] and i < j)
            else:
                keep = r[i] - r[j] >= cfg.margin and (cfg.variant == "prct" or i == k)
                keep = keep and not (level and level[i][j])
            if keep and row["responses"][i] != row["responses"][j]:
                z = torch.sigmoid(torch.tensor(r[i] - r[j])).item() if cfg.variant == "dno" else 1.0
                two = dict(responses=[row["responses"][i], row["responses"][j]])
                two |= dict(teacher=[float(i == k), float(j == k)], preference=z)
                if "ends" in row:
                    two["ends"] = [row["ends"][i], row["ends"][j]]
                out.append(dict(prompt=row["prompt"], scores=[1.0, 0.0]) | two)
    return out


def rollout(lab, policy, t, cfg):
    """The pairs of round t: pools of responses, ranked; none where no two differ enough."""
    rows = pools(lab, policy, t, cfg)
    P = chances(lab, rows)
    r = ranks(P, lab.k, lab.rng("wins", t), cfg).tolist()
    # the wins of responses that a verifier calls equal are coin tosses: a pool of wrong answers
    # would give pairs at random
    level = (P - 0.5).abs().lt(1e-9).tolist() if lab.world.verifier else [None] * len(rows)
    return [
        two
        for row, each, same in zip(rows, r, level)
        for two in pairs_of(row, each, lab.k, cfg, same)
    ]


def replayed(fresh, older, rng, cfg):
    """Pairs of older rounds, the last round first: `replay` times the fresh ones, then halves."""
    out, share = [], cfg.replay or 0.0
    for rows in older:
        order = torch.randperm(len(rows), generator=rng).tolist()
        out += [rows[i] for i in order[: int(share * len(fresh))]]
        share /= 2
    return out


def run(lab, cfg):
    check_pool(lab, cfg)
    policy, older, iterates = lab.base(), [], []

    def data(policy, t):
        if cfg.output == "average":
            iterates.append(policy.probs().detach())  # (P, R)
        fresh = lab.stage("pairs", lambda: rollout(lab, policy, t, cfg))
        if not fresh and t == 0:
            raise UserError("round 1 gave no pairs: a smaller margin or more --prompts may help")
        if not fresh:
            raise StopTraining(f"round {t + 1} gave no pairs")
        rows = lab.rows(fresh + replayed(fresh, older, lab.rng("replay", t), cfg))
        older.insert(0, fresh)
        return rows

    policy = lab.align_in_rounds(policy, data, loss, cfg, cfg.rounds)  # reference: pi_t
    if cfg.output == "average":
        curve = policy.curve
        policy = Table(*lab.world.shape).set_log_probs(torch.stack(iterates).mean(0).log())
        policy.curve = curve
    return policy
