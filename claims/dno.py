"""What DNO claims, and whether it holds here.

Reviews: DNO, DPO on pairs that were sampled once, iterated DPO on two samples per prompt, and SPIN.
All arms sample 5,120 responses from a policy, take equally many steps, and have beta = eta; only
DNO and SPIN see the teacher's 1,024 responses besides. Labels are not equal: DNO compares all pairs
of six responses to each of 1,024 prompts, DPO has one comparison for each of 2,560. Games: random
games of six responses without noise, in which 100 rounds of Algorithm 1 are in closed form. That
the average policy converges in the paper's game, what one exact round does, and the bound on its
improvement are tests (tests/methods/test_dno.py).

Up to two nats DNO and DPO are equal at matched KL; moving references let DNO go on to a larger KL,
where it has more reward. Iterated DPO does not fail on cycles: with fresh pairs it is DNO with a
smaller eta.
"""

import torch

from lab.claims import claim
from methods import dno, dpo
from methods.dno import Config

SAMPLES = 5120  # of a policy, in every arm on reviews


def aligned(cfg, k):
    """An arm of DNO's run with k samples per prompt."""

    def arm(lab):
        here = lab.child("run", None, dict(k=k, prompts=SAMPLES // k))
        here.full_looks = True
        rounds = lab.few(cfg.rounds)
        policy = dno.run(here, Config(**vars(cfg) | {"rounds": rounds}))
        lab.reference = here.reference
        return policy

    return arm


def offline(lab):
    """DPO on pairs that the base model sampled once."""
    policy = lab.base()
    rows = lab.preferences(policy, k=2, n=lab.few(SAMPLES // 2, 16))
    return lab.align(policy, rows, dpo.loss, dpo.Config(0.1))


ARMS = {
    "dno": aligned(Config(), 5),
    "offline dpo": offline,
    "iterated dpo": aligned(Config(gold=False, margin=1), 2),
    "spin": aligned(Config("spin"), 5),
}


def exploitability(P, p):
    """The largest win rate over the policy p (R,) in the game P (R, R), minus 1/2."""
    return (P @ p).max().item() - 0.5


def game_of(lab, count=6, eta=1.0, rounds=100):
    """One random game -> {policy: exploitability} after exact rounds from the uniform policy."""
    half = torch.rand(count, count, generator=lab.rng("game"), dtype=torch.float64).triu(1)
    P = half + (1 - half).mT.tril(-1) + 0.5 * torch.eye(count, dtype=torch.float64)
    start = p = torch.ones(count, dtype=torch.float64) / count
    total = torch.zeros_like(p)
    for _ in range(rounds):
        total += p
        p = (p.log() + P @ p / eta).softmax(0)  # the minimum of eq. 8
    fixed = (start.log() + rounds * (P @ start) / eta).softmax(0)  # r_t against pi_1, every round
    found = {"average policy": total / rounds, "last policy": p, "fixed opponent": fixed}
    return {name: exploitability(P, policy) for name, policy in found.items()}


def measure(lab):
    """Curves on reviews, the teacher's reward on the same seeds, and exploitabilities in games."""
    settings = dict(world="reviews", steps=120, lr=5e-4, eval_every=40, eval_size=1000)
    series = lab.race(ARMS, **settings)
    teacher = []
    for seed, curve in zip(lab.seeds, series["dno"]):
        rng = lab.at(seed=seed).rng("teacher's reward")
        rows = lab.world.teacher(lab.few(1000, 8), rng)
        rewards = lab.world.reward(*zip(*((r["prompt"], r["responses"][0]) for r in rows)))
        teacher.append({"reward": rewards.mean().item(), "reward_sd": curve[0]["reward_sd"]})
    games = [
        lab.stage("game", lambda s=s: game_of(lab.at(world="game", seed=s))) for s in lab.worlds
    ]
    return series | {"teacher": teacher} | {k: [game[k] for game in games] for k in games[0]}


def on_reviews(words, baseline, **kwargs):
    kwargs = dict(margin=0.1) | kwargs
    return claim(f"On reviews, {words}", "reward", "dno", ">", baseline, **kwargs)


def in_games(words, baseline, **kwargs):
    text = f"In random games, the average of 100 exact rounds is less exploitable than {words}"
    return claim(text, None, "average policy", "<", baseline, margin=0.01, **kwargs)


CLAIMS = [
    on_reviews(
        "DNO, which also compares samples with a teacher's responses, ends with a higher true "
        "reward than DPO on pairs sampled once, at equal samples of the policy and equal steps",
        "offline dpo",
        kind="primary",
        world="reviews",
        matched="samples, steps",
    ),
    on_reviews(
        "at matched KL, DNO has a higher true reward than DPO on pairs sampled once",
        "offline dpo",
        at_kl="shared",
        expect="inconclusive",
    ),
    on_reviews(
        "DNO ends with a higher true reward than iterated DPO on two samples per prompt, at equal "
        "samples of the policy and equal steps",
        "iterated dpo",
    ),
    on_reviews("DNO ends with a higher true reward than SPIN, at equal samples", "spin"),
    on_reviews("DNO ends with a higher true reward than its teacher's responses have", "teacher"),
    in_games("the last policy", "last policy"),
    in_games("rounds whose win rates are over the first policy", "fixed opponent"),
]
