"""What ADPO claims, and whether it holds here.

Contextual bandit: there are 600 contexts in R^8 with 8 responses and one noisy reward each. An MLP
is trained on lists of 8 responses or on random pairs of them, with the reference as its anchor or
without an anchor. The measure is the probability of the truly best response in 1,000 new contexts.
A pair with a hard target and the anchor is DPO. Reviews: lists of 4 responses are labelled with 30
% of the neighbors in the ranking flipped.

Not reproduced on tuning seeds 100 to 102: lists did not beat pairs under Gaussian or Cauchy noise,
where pairs were ahead on every seed, and ranks smoothed by a kernel did not beat raw rewards under
the heavy tails of Cauchy noise, where the two were about equal.
"""

import copy
from types import SimpleNamespace

import torch
from torch import nn

from lab.claims import claim
from methods import adpo

ARMS = {  # target, responses of a list, anchored
    "dpo": ("hard", 2, True),
    "pairs without anchor": ("hard", 2, False),
    "lists": ("hard", 8, True),
    "lists, raw": ("raw", 8, True),
    "lists, kde": ("kde", 8, True),
    "lists, kde without anchor": ("kde", 8, False),
}


def noisy_bandit(lab, seed, noise):
    """{arm: mean probability of the truly best response in 1,000 new contexts}."""
    rng = torch.Generator().manual_seed(seed)
    world = torch.randn(8, 8, generator=rng)
    x, new = torch.randn(600, 8, generator=rng), torch.randn(1000, 8, generator=rng)
    truth, (normal, other) = 2 * torch.tanh(x @ world), torch.randn(2, 600, 8, generator=rng)
    # the ratio of two normal numbers has a Cauchy distribution
    scores = truth + (1.5 * normal if noise == "gaussian" else 0.7 * normal / other)
    start = nn.Sequential(nn.Linear(8, 64), nn.ReLU(), nn.Linear(64, 8))
    for p in start.parameters():
        nn.init.normal_(p, 0.0, p.shape[-1] ** -0.5 if p.dim() == 2 else 0.0, generator=rng)

    def train(model, anchor, scores, cfg, count, steps):
        def batches(step):
            draw = torch.Generator().manual_seed(seed * 1000 + step)
            some = torch.randint(600, (128,), generator=draw)
            members = torch.rand(128, 8, generator=draw).argsort(1).argsort(1) < count
            return SimpleNamespace(
                x=x[some], scores=scores[some] * members, mask=members[..., None]
            )

        def objective(model, batch):
            logps, ref_logps = (
                m and m(batch.x).log_softmax(1)[..., None] * batch.mask for m in (model, anchor)
            )
            return adpo.loss(logps, ref_logps, batch, cfg)

        return lab.fit(model, batches, objective, steps=steps, lr=5e-3)

    # the reference is trained for 30 steps on rewards without noise
    start = train(start, None, truth, adpo.Config(target="raw"), 8, 30).requires_grad_(False)
    best, found = (new @ world).argmax(1, keepdim=True), {}
    for name, (target, count, anchored) in ARMS.items():
        model, anchor = copy.deepcopy(start).requires_grad_(True), start if anchored else None
        model = train(model, anchor, scores, adpo.Config(target=target), count, 300)
        found[name] = model(new).softmax(1).gather(1, best).mean().item()
    return found


def measure(lab):
    """-> {series: one number or curve per seed}."""
    series = {}
    for noise in ("gaussian", "cauchy"):
        found = [
            lab.stage("bandit", lambda seed=seed, noise=noise: noisy_bandit(lab, seed, noise))
            for seed in lab.seeds
        ]
        series |= {f"{name}, {noise}": [each[name] for each in found] for name in ARMS}
    arms = {
        "anchored, reviews": (adpo.loss, adpo.Config()),
        "no anchor, reviews": (adpo.loss, adpo.Config(anchor="uniform"), dict(reference=None)),
    }

    def data(lab, base):
        return lab.preferences(base, k=4)

    how = dict(flip=0.3, k=4, steps=100, batch_size=32, eval_size=1000, eval_every=25)
    return series | lab.race(arms, data, **how)


CLAIMS = []
for noise, name in dict(gaussian="Gaussian", cauchy="Cauchy").items():
    CLAIMS += [
        claim(
            f"In a bandit with {name} noise, lists with an anchor put more probability on the best "
            "response than DPO on pairs",
            None,
            f"lists, {noise}",
            ">",
            f"dpo, {noise}",
            margin=0.02,
            kind="primary" if noise == "gaussian" else "mechanism",
            world="noisy bandit",
            matched="lists, steps",
            expect="reversed",
        ),
        claim(
            f"In a bandit with {name} noise, pairs with an anchor (DPO) put more probability on "
            "the best response than pairs without one",
            None,
            f"dpo, {noise}",
            ">",
            f"pairs without anchor, {noise}",
            margin=0.05,
        ),
        claim(
            f"In a bandit with {name} noise, lists of smoothed ranks with an anchor put more "
            "probability on the best response than without one",
            None,
            f"lists, kde, {noise}",
            ">",
            f"lists, kde without anchor, {noise}",
            margin=0.05,
        ),
        claim(
            f"In a bandit with {name} noise, smoothed ranks put more probability on the best "
            "response than raw rewards",
            None,
            f"lists, kde, {noise}",
            ">",
            f"lists, raw, {noise}",
            margin=0.02,
            expect="no effect" if noise == "gaussian" else "inconclusive",
        ),
    ]
CLAIMS += [
    claim(
        "On reviews with 30 % of neighbors flipped, ADPO with its anchor ends with a higher true "
        "reward than without one",
        "reward",
        "anchored, reviews",
        ">",
        "no anchor, reviews",
        margin=0.1,
    ),
    claim(
        "On reviews with 30 % of neighbors flipped, ADPO with its anchor has a higher true reward "
        "than without one at matched KL",
        "reward",
        "anchored, reviews",
        ">",
        "no anchor, reviews",
        at_kl="shared",
        margin=0.1,
    ),
]
