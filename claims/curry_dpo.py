"""The claims of Curry-DPO as an experiment: the curriculum against its controls."""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from data import collate
from methods.curry_dpo import Config, curriculum, loss, run
from toy import bandit


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
        for name in ("curriculum", "single"):
            ends[name].append((run(here, CONTEST[name]) and here.curve)[-1]["reward"])
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
