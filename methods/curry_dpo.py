"""Curry-DPO - Enhancing Alignment using Curriculum Learning & Ranked Preferences (2024),
arXiv:2403.07230

Preference data often have K > 2 rated responses per prompt, of which DPO uses one pair. If R1 is
the best response, K - 1 pairs share it as chosen: (R1, RK) is the easiest, (R1, R2) the hardest.
Curry-DPO trains on them from easy to hard, one round per difficulty. Each round starts from the
policy rho that ended the previous round, and rho is also its reference:

    z = beta [ log pi(y_w) / rho(y_w) - log pi(y_l) / rho(y_l) ]
    loss = -log sigmoid(z)

A moving reference acts like a smaller beta: each round trained to its optimum on all pairs adds
r / beta to the logits, so M rounds amount to one run of DPO with beta / M.

Differences from the paper
1. Training details are not public; here each round has a new optimizer and equally many steps.
2. Pairs with equal ratings or identical responses are left out.
3. The fields `reference`, `order` and `pairs` are for ablations.

    python train.py --method curry_dpo                       the true reward rises in every round
    python train.py --method curry_dpo --order hard_easy     the opposite order
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair, reorder

PAPER = Paper(
    "pairs",
    worlds=("text", "images", "table"),
    defaults=dict(world="reviews", k=4),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the round's reference, as in DPO
    reference: str = "previous"  # previous: the policy as the round begins; sft: the base model
    order: str = "easy_hard"  # easy_hard or hard_easy; pooled: all pairs in every round
    pairs: str = "star"  # star: best against all others; single: against the worst (pooled only)
    rounds: int = 3  # one per difficulty, which makes k - 1; any number if pooled

    def __post_init__(self):
        check_fields(
            self,
            beta="(0, inf)",
            reference=("previous", "sft"),
            order=("easy_hard", "hard_easy", "pooled"),
            pairs=("star", "single"),
            rounds="[1, inf)",
        )
        if self.pairs == "single" and self.order != "pooled":
            raise UserError(f"order = {self.order}: pairs = single needs order = pooled")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    z = cfg.beta * (chosen - rejected)  # (B,) margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def star(row):
    """The pairs of a row, as [(rank of the rejected response, pair)], worst rejected first.

    The chosen response is always the best one. UserError: all ratings are equal, or the responses
    continue each other.
    """
    scores, pairs = row["scores"], []
    if len(set(scores)) < 2:
        raise UserError(f"the responses to {row['prompt']!r} have fewer than 2 distinct ratings")
    best, *others = sorted(range(len(scores)), key=lambda i: -scores[i])
    for rank, other in reversed([*enumerate(others, 1)]):
        two = reorder(row, [best, other]) | {"scores": [1.0, 0.0]}
        chosen, rejected = two["responses"]
        same = torch.equal(chosen, rejected) if torch.is_tensor(chosen) else chosen == rejected
        if not same and scores[best] > scores[other]:
            pairs.append((rank, two))
    return pairs


def check_rounds(k, cfg):
    """UserError unless k responses make as many difficulties as there are rounds."""
    if cfg.order != "pooled" and cfg.rounds != k - 1:
        made = f"{k} responses make {k - 1} difficult{'y' if k == 2 else 'ies'}"
        raise UserError(f"rounds = {cfg.rounds}, but {made}: --rounds {k - 1}, or order = pooled")


def curriculum(rows, cfg):
    """Rows of K rated responses -> a list of pairs for each round.

    UserError: a round has no pairs, or the number of rounds is not that of the difficulties.
    """
    rows = [row for row in rows if len(set(row["scores"])) > 1]  # drop rows of ties
    hardest = max((len(row["scores"]) for row in rows), default=0) - 1
    pairs = [each for row in rows for each in star(row)]
    if cfg.order == "pooled":
        kept = [two for rank, two in pairs if cfg.pairs == "star" or rank == hardest]
        rounds = [kept] * cfg.rounds
    else:
        check_rounds(hardest + 1 if rows else cfg.rounds + 1, cfg)
        ranks = range(hardest, 0, -1) if cfg.order == "easy_hard" else range(1, hardest + 1)
        rounds = [[two for r, two in pairs if r == rank] for rank in ranks]
    if not rows or not all(rounds):
        raise UserError("a round has no pairs: all of its ratings or responses are equal")
    return rounds


def run(lab, cfg):
    if 0 < lab.steps < cfg.rounds:
        raise UserError(f"--steps {lab.steps} is too few for rounds = {cfg.rounds}")
    if lab.world.given is None:
        check_rounds(lab.k, cfg)
    policy = lab.base()
    pairs = curriculum(lab.preferences(policy), cfg)
    reference = lab.base() if cfg.reference == "sft" else "start"  # "start": a frozen copy

    def data(policy, round):
        return lab.rows(pairs[round])

    return lab.align_in_rounds(policy, data, loss, cfg, cfg.rounds, reference=reference)
