"""Curry-DPO - Enhancing Alignment using Curriculum Learning & Ranked Preferences (2024), arXiv:2403.07230

Preference data often hold more than two rated responses of a prompt, and DPO uses one pair of them. With four, R1 the best, there are three
pairs that share the winner: (R1, R4) is easy, (R1, R3) medium, (R1, R2) hard. Curry-DPO trains on them in this order, a round for each
difficulty, and the model that a round ends with is the start and the reference of the next:

    h = beta [ log pi(y_w) - log rho(y_w) - log pi(y_l) + log rho(y_l) ],   loss = -log sigmoid(h),   rho = the policy when the round began

A reference that moves is a smaller beta: each exact round adds r / beta to the logits, so M rounds on all pairs are one DPO with beta / M.
A comparison with DPO has to include that one.

What this file does differently from the paper: 1. The paper's training details were not at hand; each round has a fresh optimizer and
warm-up and an equal share of the steps. 2. Pairs of equal ratings and of equal responses are left out. 3. Controls are fields: `reference`
stays or moves, `order` may be turned or pooled, and `pairs` = single keeps the easy pair alone.
"""

import copy
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn

from data import UserError, collate
from toy import bandit

FAMILY, KINDS = "pairs", ("text", "images", "table")
DEFAULTS = dict(world="reviews", k=4)


@dataclass
class Config:
    beta: float = 0.1  # strength of the pull to the round's reference, as in DPO
    reference: str = (
        "previous"  # previous, the policy when the round began; sft, the start of the run
    )
    order: str = (
        "easy_hard"  # of the rounds: easy_hard, hard_easy; pooled, all pairs in every round
    )
    pairs: str = "star"  # star, the best against each other response; single, against the worst (pooled only)
    rounds: int = 3  # as many as difficulties, k - 1, unless pooled

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta = {self.beta} must be positive and finite")
        known = dict(
            reference=("previous", "sft"),
            order=("easy_hard", "hard_easy", "pooled"),
            pairs=("star", "single"),
        )
        for name, allowed in known.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"{name} = {getattr(self, name)} must be one of {', '.join(allowed)}"
                )
        if self.rounds < 1:
            raise UserError(f"rounds = {self.rounds} must be at least 1")
        if self.pairs == "single" and self.order != "pooled":
            raise UserError(
                f"order = {self.order} does nothing with pairs = single, which have one difficulty: order = pooled"
            )


def check_pairs(logps, batch):
    """ValueError unless every row is a pair of responses with something to score."""
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise UserError(
            f"log-probs of shape {tuple(logps.shape)}: pairs are (B, 2, T), the preferred response first"
        )
    # on CUDA the question would make the device wait; there the data were looked at when they were read
    if logps.device.type == "cpu" and not batch.mask.any(-1).all():
        raise UserError("a response has no scored token")


def loss(logps, ref_logps, batch, cfg):
    """DPO's loss on pairs, the preferred response first; what moves is the reference.

    logps, ref_logps (B, 2, T), 0 outside batch.mask (B, 2, T) -> losses (B,) in nats, metrics. ValueError when a row is no pair or a
    response has no scored token."""
    check_pairs(logps, batch)
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    chosen, rejected = (
        (logps - ref_logps).sum(-1).unbind(1)
    )  # log-ratios (B,): SUM over a response's tokens, not mean
    z = cfg.beta * (chosen - rejected)  # the margin of the implicit reward
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def star(row):
    """[(rank of the loser, pair)] of a row of K rated responses: the best against each other one, the worst first.
    ValueError when all ratings are equal, or the responses are nodes of a tree. Pairs of equal ratings or equal responses are left out."""
    if any(parent >= 0 for parent in row.get("parents", ())):
        raise UserError(
            f"the responses to {row['prompt']!r} continue each other; a pair is of whole responses"
        )
    if len(set(row["scores"])) < 2:
        raise UserError(f"the responses to {row['prompt']!r} have fewer than 2 distinct ratings")
    order = sorted(range(len(row["scores"])), key=lambda i: -row["scores"][i])
    best, found = order[0], []
    for rank in range(len(order) - 1, 0, -1):
        two = [best, order[rank]]
        responses = (
            row["responses"][two]
            if torch.is_tensor(row["responses"])
            else [row["responses"][i] for i in two]
        )
        same = (
            bool((responses[0] == responses[1]).all())
            if torch.is_tensor(responses)
            else responses[0] == responses[1]
        )
        if not same and row["scores"][best] > row["scores"][two[1]]:
            kept = {
                name: [row[name][i] for i in two]
                for name in ("ends", "reward", "context")
                if name in row
            }
            found.append(
                (
                    rank,
                    {"prompt": row["prompt"], "responses": responses, "scores": [1.0, 0.0]} | kept,
                )
            )
    return found


def curriculum(rows, cfg):
    """A list of pairs for each round. ValueError when a round has none, or there are not as many rounds as difficulties."""
    rows = [row for row in rows if len(set(row["scores"])) > 1]  # ties teach nothing
    hardest, found = (
        max((len(row["scores"]) for row in rows), default=0) - 1,
        [star(row) for row in rows],
    )
    if cfg.order == "pooled":
        pairs = [
            pair
            for stars in found
            for rank, pair in stars
            if cfg.pairs == "star" or rank == hardest
        ]
        rounds = [pairs] * cfg.rounds
    elif rows and cfg.rounds != hardest:
        made = f"{hardest + 1} responses make {hardest} difficult{'y' if hardest == 1 else 'ies'}"
        raise UserError(f"rounds = {cfg.rounds}, but {made}: --rounds {hardest}, or order = pooled")
    else:
        rounds = [
            [pair for stars in found for r, pair in stars if r == rank]
            for rank in range(hardest, 0, -1)
        ]
        rounds = rounds if cfg.order == "easy_hard" else rounds[::-1]
    if not rows or not all(rounds):
        raise UserError(
            "a round has no pairs: every pair of it has equal ratings or equal responses"
        )
    return rounds


def train(lab, rows, cfg):
    """The rounds of the curriculum, each with a fresh optimizer -> the policy; lab.curve holds all rounds. ValueError when there are fewer
    steps than rounds, unless there are none."""
    policy, curve, rounds = lab.base(), [], curriculum(rows, cfg)
    if 0 < lab.steps < cfg.rounds:
        raise UserError(
            f"--steps {lab.steps} is too few for rounds = {cfg.rounds}, of a step or more each"
        )
    start = (
        lab.base() if cfg.reference == "sft" else "start"
    )  # "start": a frozen copy of the policy at the call
    ends = [round(lab.steps * i / cfg.rounds) for i in range(cfg.rounds + 1)]
    for first, last, pairs in zip(ends, ends[1:], rounds):
        policy = lab.align(policy, lab.rows(pairs), loss, cfg, reference=start, steps=last - first)
        curve += [point | {"step": first + point["step"]} for point in lab.curve[bool(curve) :]]
    lab.curve = curve
    return policy


def run(lab, cfg):
    return train(lab, lab.preferences(lab.base()), cfg)


# ---------------------------------------------------------------- the claim


def rounds_of_a_table(lab, rounds, beta=0.5):
    """Probabilities (4,) after exact rounds on all pairs of four responses, r = 0.7 (3, 2, 1, 0), the reference moving each round."""
    world = bandit.World(
        4, 1, rewards=[2.1, 1.4, 0.7, 0.0], reference=torch.tensor([0.1, -0.2, 0.3, -0.2])
    )
    policy, batch = world.model(), collate(world.pairs_all())
    for _ in range(rounds):
        ref_logps = policy.logps(batch).detach()

        def objective(model, batch, ref_logps=ref_logps):
            return batch.weight * loss(model.logps(batch), ref_logps, batch, Config(beta))[0], {}

        lab.fit(policy, [batch], objective, steps=1000, lr=0.05, decay=True)
    return policy.probs()[0].tolist()


CONTEST = {  # name: hyper-parameters
    "curriculum": Config(),
    "hard first": Config(order="hard_easy"),
    "curriculum, fixed": Config(reference="sft"),
    "pooled, moving": Config(order="pooled"),
    "pooled": Config(order="pooled", rounds=1),
    "pooled, beta / 3": Config(0.1 / 3, order="pooled", rounds=1),
    "single": Config(order="pooled", pairs="single", rounds=1),
}


def small_bandit(lab, seed):
    """30 responses, prompts in R^6, reward z + sin(2 z) / 2; 200 prompts with 4 rated samples -> {name: {"reward", "kl"}}."""
    rng = torch.Generator().manual_seed(seed)
    start = nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 30))
    for p in start.parameters():
        nn.init.normal_(p, 0.0, 0.3 if p.dim() == 2 else 0.0, generator=rng)
    x, new, taste = (torch.randn(n, 6, generator=rng) for n in (200, 1000, 30))

    def truth(x):
        z = x @ taste.T / 6**0.5
        return z + 0.5 * torch.sin(2 * z)

    samples = torch.multinomial(start(x).softmax(1), 4, replacement=True, generator=rng)
    ratings = truth(x).gather(1, samples) + 0.3 * torch.randn(200, 4, generator=rng)
    rows = [
        dict(prompt=i, responses=[[y] for y in s], scores=r)
        for i, (s, r) in enumerate(zip(samples.tolist(), ratings.tolist()))
    ]

    def fit(policy, pairs, reference, cfg, steps):
        prompt = torch.tensor([pair["prompt"] for pair in pairs])
        two, draw = (
            torch.tensor([pair["responses"] for pair in pairs]),
            torch.Generator().manual_seed(seed),
        )

        def logps(model, some):
            return model(x[prompt[some]]).log_softmax(1).gather(1, two[some, :, 0])[..., None]

        def objective(model, some):
            mask = torch.ones(len(some), 2, 1, dtype=torch.bool)
            return loss(logps(model, some), logps(reference, some), SimpleNamespace(mask=mask), cfg)

        return lab.fit(
            policy,
            lambda step: torch.randint(len(pairs), (64,), generator=draw),
            objective,
            steps=steps,
            lr=3e-3,
        )

    start.requires_grad_(False)
    found = {"sft": start}
    for name, cfg in CONTEST.items():
        policy = copy.deepcopy(start).requires_grad_(True)
        for pairs in curriculum(rows, cfg):
            reference = (
                start if cfg.reference == "sft" else copy.deepcopy(policy).requires_grad_(False)
            )
            policy = fit(policy, pairs, reference, cfg, 1800 // cfg.rounds)
        found[name] = policy
    first = start(new).log_softmax(1)

    def measure(policy):
        log_p = policy(new).log_softmax(1)
        return [(log_p.exp() * f).sum(1).mean().item() for f in (truth(new), log_p - first)]

    return {name: dict(zip(("reward", "kl"), measure(policy))) for name, policy in found.items()}


def claim(lab):
    """In a table three exact rounds with a moving reference are one round with beta / 3 (exact). In a bandit of 30 responses, and on
    reviews, the curriculum has much more true reward than the model it started from.

    The paper's headline did not reproduce, nor did the order. Bandit, tuning seeds 100 to 102, true reward: easy to hard 1.242, 1.329,
    1.150; hard to easy 1.260, 1.326, 1.128; the easy pair alone for as many steps 1.301, 1.429, 1.321; all pairs pooled, with a fixed
    reference, 1.361, 1.428, 1.208, with beta / 3 1.271, 1.384, 1.175, with a moving reference 1.299, 1.377, 1.200: these two are close,
    but on seed 102 the moving one is closer to beta itself, for the rounds are not solved to their end. Reviews, seed 100, 150 steps: the
    curriculum 0.819 at a KL of 3.07, the easy pair alone 0.969 at 3.26, pooled with beta / 3 0.900 at 2.92."""
    exact = lab.stage(
        "rounds", lambda: [rounds_of_a_table(lab, 3)[0], rounds_of_a_table(lab, 1, 0.5 / 3)[0]]
    )
    claims = [
        lab.exact("three rounds in a table: share of the best", exact[0], 0.988742, 1e-4),
        lab.exact("one round with beta / 3: share of the best", exact[1], 0.988742, 1e-4),
    ]
    found = [lab.stage("bandit", lambda seed=seed: small_bandit(lab, seed)) for seed in lab.seeds]
    side = {name: [f[name]["reward"] for f in found] for name in found[0]}
    moving = side["pooled, moving"]
    near, far = (
        [abs(a - b) for a, b in zip(moving, side[name])] for name in ("pooled, beta / 3", "pooled")
    )
    for text, other, expected in (
        ("the curriculum above its start", "sft", True),
        ("easy to hard above hard to easy", "hard first", False),
        ("the curriculum above single pairs", "single", False),
        ("the curriculum above beta / 3 on all pairs", "pooled, beta / 3", False),
    ):
        claims.append(
            lab.compare(
                f"bandit: {text}",
                "reward",
                side["curriculum"],
                side[other],
                margin=0.01,
                expected=expected,
            )
        )
    text = "bandit: a moving reference is nearer to beta / 3 than to beta"
    claims.append(lab.compare(text, "gap in reward", near, far, smaller=True, expected=False))
    ends = {"curriculum": [], "single": [], "start": []}
    for seed in lab.seeds:
        here = lab.at(seed=seed, k=4, eval_size=512, eval_every=50, steps=150, batch_size=32)
        rows = here.preferences(here.base(), k=4)
        for name in ("curriculum", "single"):
            train(here, rows, CONTEST[name])
            ends[name].append(here.curve[-1]["reward"])
        ends["start"].append(here.curve[0]["reward"])
    claims.append(
        lab.compare(
            "reviews: the curriculum above its start",
            "reward",
            ends["curriculum"],
            ends["start"],
            margin=0.1,
        )
    )
    text = "reviews: the curriculum above single pairs, equal steps"
    return [
        *claims,
        lab.compare(
            text, "reward", ends["curriculum"], ends["single"], margin=0.05, expected=False
        ),
    ]
