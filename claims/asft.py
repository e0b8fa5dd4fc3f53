"""What ASFT claims, and whether it holds here."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import collate
from methods.asft import Config, loss
from toy import bandit
from toy.exact import population


def dpo_of_pairs(logps, ref_logps, batch, cfg):
    """The baseline of the claim: DPO (arXiv:2305.18290)."""
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)
    return -F.logsigmoid(cfg.beta * (chosen - rejected)), {}


def pulls(objective, cfg, chosen, rejected):
    """|dL/dp_w| / |dL/dp_l| of one pair of one-token responses with these probabilities, the reference being uniform."""
    p = torch.tensor([chosen, rejected], dtype=torch.float64, requires_grad=True)
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    value = objective(p.log().view(1, 2, 1), torch.zeros(1, 2, 1, dtype=torch.float64), batch, cfg)[
        0
    ].sum()
    chosen, rejected = torch.autograd.grad(value, p)[0].abs().tolist()
    return chosen / rejected


def shared(objective, cfg, features, steps, lr=0.05, scale=1.0):
    """Softmax policies with logits features (N, Y, D) @ theta (N, D), response 0 preferred to response 1, after some steps of gradient
    descent from 0 -> log-probs (N, Y), theta."""
    theta = torch.zeros(
        features.shape[0], features.shape[2], dtype=torch.float64, requires_grad=True
    )
    batch = SimpleNamespace(mask=torch.ones(len(theta), 2, 1, dtype=torch.bool))
    start = torch.full((len(theta), 2, 1), -math.log(features.shape[1]), dtype=torch.float64)
    for _ in range(steps):
        logps = (features @ theta[..., None])[..., 0].log_softmax(1)
        (gradient,) = torch.autograd.grad(
            objective(logps[:, :2, None], start, batch, cfg)[0].sum(), theta
        )
        theta.data -= lr * scale * gradient
    return (features @ theta.detach()[..., None])[..., 0].log_softmax(1), theta.detach()


def displacement(count=20):
    """20 responses with 6 random features, the rejected one 1.3 times the preferred one and a little noise; 400 steps ->
    {name: (change of the preferred log-prob, growth of the gap to the rejected one), a number a draw each}."""
    rng = torch.Generator().manual_seed(0)
    features = torch.randn(count, 20, 6, generator=rng, dtype=torch.float64)
    features[:, 1] = 1.3 * features[:, 0] + 0.2 * torch.randn(
        count, 6, generator=rng, dtype=torch.float64
    )
    contest = dict(
        asft=(loss, Config(), 1.0),
        sft=(loss, Config(weight=0.0), 1.0),
        dpo=(dpo_of_pairs, SimpleNamespace(beta=0.1), 10.0),
    )
    out = {}
    for name, (objective, cfg, scale) in contest.items():
        logps, _ = shared(objective, cfg, features, 400, scale=scale)
        out[name] = ((logps[:, 0] + math.log(20)).tolist(), (logps[:, 0] - logps[:, 1]).tolist())
    return out


def three():
    """Three responses with rewards 1, 0 and -1 and a uniform reference."""
    return bandit.World(vocab=3, length=1, spread=0.0, rewards=[1.0, 0.0, -1.0])


def sides(policy, objective, cfg, ref_logps, batch):
    """Size of dL/dlog pi summed over the rejected responses of a batch, as a share of that over the preferred ones."""
    logps = policy.logps(batch).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(objective(logps, ref_logps, batch, cfg)[0].sum(), logps)
    chosen, rejected = (gradient * batch.mask).abs().sum((0, 2)).tolist()
    return rejected / chosen


def aligned(here, stage, contest):
    """Align the model of a stage ("sft", or "raw": random weights) by each method on the same pairs -> {name: its evaluation, with `sides`
    on 256 of the pairs}; "start" is the model before."""
    data = here.preferences(here.base(), k=2)
    start = here.base(stage)
    batch = collate(data[:256], here.world.tokenizer)
    with torch.no_grad():
        ref_logps = start.logps(batch)
    found = {"start": here.evaluate(start)}
    for name, (objective, cfg, reference) in contest.items():
        policy = here.align(
            here.base(stage),
            data,
            objective,
            cfg,
            reference=reference,
            watch=lambda policy, step: {},
        )
        found[name] = here.evaluate(policy) | {
            "sides": sides(policy, objective, cfg, ref_logps, batch)
        }
        found["start"][name] = sides(start, objective, cfg, ref_logps, batch)
    return found


def claim(lab):
    """Where features are shared ASFT raises the preferred response and DPO buries it, at the price of a smaller gap (exact); in a
    table its optimum is not that of reward - KL at any weight. On reviews the rejected side pulls a small part of what it pulls
    under DPO; the preferred log-prob ends above DPO's, the reward below. From random weights ASFT learns and DPO does not.

    Not reproduced, on tuning seeds 100 to 102: that the preferred log-prob rises above the model before (-23.4 to -23.7 on held-out pairs,
    DPO's to -25.2; like fine-tuning, ASFT shortens what is written, since each response counts by its mean), and that the rejected side
    adds reward to fine-tuning (-0.21 against -0.17 from random weights after 120 steps; after 200 on seed 100, 0.05 against -0.05). At the
    start p_l is small, so the rejected side has but 0.13 of the preferred side's pull. Less reward than DPO's held on those seeds and fails
    on the reported ones, 0 to 2: DPO over-optimises on seed 0 and ends 0.07 below."""
    asft, tuned = (loss, Config(), None), (loss, Config(weight=0.0), None)
    dpo = (dpo_of_pairs, SimpleNamespace(beta=0.1), "start")
    claims = [
        lab.exact(
            "pull on p_w = 0.3 by that on p_l = 0.1, alignment alone",
            pulls(loss, Config(supervised=False), 0.3, 0.1),
            3.0,
            1e-6,
        ),
        lab.exact("the same of DPO", pulls(*dpo[:2], 0.3, 0.1), 1 / 3, 1e-6),
    ]
    one = torch.tensor([[[1.0], [2.0], [0.0]]], dtype=torch.float64)
    logps, theta = shared(*asft[:2], one, 2000)
    claims.append(lab.exact("features 1, 2, 0: the optimum", theta.item(), -0.28999, 1e-5))
    claims.append(lab.exact("its preferred probability", logps[0, 0].exp().item(), 0.32418, 1e-5))
    logps, _ = shared(*dpo[:2], one, 2000, scale=10.0)
    claims.append(
        lab.exact(
            "that of DPO after 2,000 steps, which has no optimum",
            logps[0, 0].exp().item(),
            0.0,
            1e-6,
        )
    )
    for weight, best in ((0.0, 0.53729), (0.1, 0.54287), (1.0, 0.56479), (10.0, 0.58237)):
        table = population(three(), three().pairs_all(), loss, Config(weight=weight))
        text = f"three responses, weight {weight}: probability of the best (0.66524 is DPO's at beta 1)"
        claims.append(lab.exact(text, table.probs()[0, 0].item(), best, 1e-4))
    draws = displacement()
    claims.append(
        lab.compare(
            "the preferred log-prob rises, 20 random features",
            "change",
            draws["asft"][0],
            [0.0] * 20,
            margin=1.0,
        )
    )
    claims.append(
        lab.compare("DPO's falls", "change", draws["dpo"][0], [0.0] * 20, margin=10.0, smaller=True)
    )
    claims.append(
        lab.compare(
            "the price: a smaller gap than DPO's",
            "gap",
            draws["asft"][1],
            draws["dpo"][1],
            margin=1.0,
            smaller=True,
        )
    )
    tuned_before, raw = [], []
    for seed in lab.seeds:
        tuned_before.append(aligned(lab.at(seed=seed, steps=100), "sft", dict(asft=asft, dpo=dpo)))
        raw.append(
            aligned(
                lab.at(seed=seed, steps=120, lr=3e-3), "raw", dict(asft=asft, sft=tuned, dpo=dpo)
            )
        )

    def contrast(text, found, metric, ours, baseline, **how):
        return lab.compare(
            text, metric, [here[ours] for here in found], [here[baseline] for here in found], **how
        )

    text = "reviews: less pull on the rejected side than DPO, as a share of the preferred one's"
    return [
        *claims,
        contrast(text, tuned_before, "sides", "asft", "dpo", margin=0.5, smaller=True),
        contrast(
            "reviews: the preferred log-prob above DPO's",
            tuned_before,
            "chosen_logp",
            "asft",
            "dpo",
            margin=0.5,
        ),
        contrast(
            "reviews: and above the model before",
            tuned_before,
            "chosen_logp",
            "asft",
            "start",
            expected=False,
        ),
        contrast(
            "reviews: less reward than DPO",
            tuned_before,
            "reward",
            "asft",
            "dpo",
            margin=0.1,
            smaller=True,
        ),
        contrast(
            "from random weights: the preferred log-prob rises",
            raw,
            "chosen_logp",
            "asft",
            "start",
            margin=20.0,
        ),
        contrast(
            "and ends above DPO's, whose reference has random weights",
            raw,
            "chosen_logp",
            "asft",
            "dpo",
            margin=20.0,
        ),
        contrast(
            "from random weights: true reward above DPO's", raw, "reward", "asft", "dpo", margin=5.0
        ),
        contrast(
            "and above supervised fine-tuning's",
            raw,
            "reward",
            "asft",
            "sft",
            margin=0.05,
            expected=False,
        ),
    ]
