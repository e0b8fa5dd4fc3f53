"""The claims of MADPO as an experiment: madpo against DPO on tables and on reviews."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import collate, label
from methods.madpo import Config, loss, reward_margins
from toy import bandit


def dpo_of_pairs(logps, ref_logps, batch, cfg):
    """The baseline of the claim: DPO (arXiv:2305.18290)."""
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)
    return -F.logsigmoid(cfg.beta * (chosen - rejected)), {}


def settled(h, cfg):
    """The margin at which the expected loss of one pair with true margin h, met with either label, has no slope (by bisection)."""
    low, high, h = -50.0, 50.0, torch.tensor([h, -h], dtype=torch.float64)
    batch = SimpleNamespace(mask=torch.ones(2, 2, 1, dtype=torch.bool), margin=h)
    for _ in range(60):
        m = torch.tensor((low + high) / 2, dtype=torch.float64, requires_grad=True)
        logps = torch.stack([m, -m, -m, m]).view(2, 2, 1) / (2 * cfg.beta)
        losses, _ = loss(logps, torch.zeros_like(logps), batch, cfg)
        (slope,) = torch.autograd.grad((torch.sigmoid(h) * losses).sum(), m)
        low, high = (low, m.item()) if slope > 0 else (m.item(), high)
    return low


def margin_tables(lab, seed):
    """12 prompts of 8 responses with rewards in [-3, 3], 3000 pairs of the reference -> {name: {"reward", "kl"}} of each loss."""
    here, rng = (
        lab.at(world="bandit", seed=seed, batch_size=500),
        torch.Generator().manual_seed(seed),
    )
    rewards = 6 * torch.rand(12, 8, dtype=torch.float64, generator=rng) - 3
    world = bandit.World(8, 1, 12, seed=seed, rewards=rewards)
    prompts = world.prompts(3000, rng)
    rows = [
        dict(prompt=p, responses=r)
        for p, r in zip(prompts, world.reference.sample(prompts, 2, rng))
    ]
    rows = label(
        [
            row | {"reward": [rewards[row["prompt"], r[0]].item() for r in row["responses"]]}
            for row in rows
        ],
        rng,
    )
    margins = reward_margins(here, world.model(), rows, Config(reward_lr=0.05))
    h = torch.tensor(margins)
    columns = {
        "MADPO": h,
        "shuffled": h[torch.randperm(3000, generator=rng)],
        "turned": -h,
        "DPO": h,
    }
    found = {"reference": dict(reward=world.reference.expect(rewards), kl=0.0)}

    def train(name, objective, cfg):
        batch, policy = (
            collate([row | {"margin": m} for row, m in zip(rows, columns[name].tolist())]),
            world.model(),
        )
        ref_logps = policy.logps(batch).detach()
        here.fit(
            policy,
            [batch],
            lambda model, b: objective(model.logps(b), ref_logps, b, cfg),
            steps=400,
            lr=0.05,
        )
        found[name, cfg.beta] = dict(reward=policy.expect(rewards), kl=policy.kl(world.reference))

    for beta in (5.0, 3.0, 2.0, 1.5, 1.2, 1.0):
        train("MADPO", loss, Config(beta))
    for name in ("shuffled", "turned"):
        train(name, loss, Config(1.0))
    for beta in (1.0, 0.7, 0.5, 0.35, 0.25, 0.18):
        train("DPO", dpo_of_pairs, Config(beta))
    return {" ".join(map(str, k)) if isinstance(k, tuple) else k: v for k, v in found.items()}


def claim(lab):
    """A pair settles at its stretched margin, and beyond tau at hardly less than its own (exact; damping to c(h) h is the control). In a
    table MADPO has more true reward than DPO at one beta, and more than with the weights of other pairs, so that it is the reward model
    that speaks; with the sign of h turned the reward falls below the reference's.

    What did not reproduce is more reward at the same KL: there DPO with a smaller beta is as good, since tau exceeds nearly all margins and
    c is nearly constant. Tables of seeds 100 to 102: MADPO at beta 1 has 2.204, 2.394, 2.268 at a KL of 1.789, 1.755, 1.793, DPO at beta
    0.25 has 2.207, 2.402, 2.270 at 1.801, 1.784, 1.614. On reviews it depends on the seed: at beta 1 MADPO ends at 0.489 (KL 1.37) on seed
    100 and DPO at 0.485 (1.00), at beta 0.1 at 0.581 and 0.654 (0.752 with DPO's beta 0.025); on seed 101 at beta 1 at 0.647 and 0.352."""
    claims = [
        lab.exact(
            "a pair of margin 1 settles at 3.96318",
            settled(1.0, Config(1.0, tau=7.0)),
            3.96318,
            1e-4,
        ),
        lab.exact(
            "a pair of margin 8, beyond tau, is hardly damped",
            settled(8.0, Config(1.0, tau=7.0)),
            7.98958,
            1e-4,
        ),
        lab.exact(
            "a pair of margin 8 is damped to c(h) h",
            settled(8.0, Config(1.0, tau=7.0)),
            4.52671,
            0.1,
            expected=False,
        ),
    ]
    found = [lab.stage("tables", lambda seed=seed: margin_tables(lab, seed)) for seed in lab.seeds]
    ours, other, mixed, turned, start = (
        [f[name] for f in found]
        for name in ("MADPO 1.0", "DPO 1.0", "shuffled 1.0", "turned 1.0", "reference")
    )
    claims.append(
        lab.compare("tables: MADPO above DPO, one beta", "reward", ours, other, margin=0.1)
    )
    claims.append(
        lab.compare(
            "tables: its weights above those of other pairs", "reward", ours, mixed, margin=0.1
        )
    )
    claims.append(
        lab.compare(
            "tables: margins of the wrong sign, below the reference",
            "reward",
            turned,
            start,
            margin=0.5,
            smaller=True,
        )
    )
    fronts = [
        [[f["reference"], *(v for k, v in f.items() if k.startswith(name))] for f in found]
        for name in ("MADPO", "DPO")
    ]
    claims.append(
        lab.compare(
            "tables: MADPO above DPO",
            "reward",
            *fronts,
            at_kl="shared",
            margin=0.02,
            expected=False,
        )
    )
    curves = {"MADPO": [], "DPO": []}
    for seed in lab.seeds:
        here, cfg = lab.at(seed=seed, eval_size=512), Config(1.0, reward_steps=100)
        data = here.preferences(here.base(), k=2)
        data = [
            row | {"margin": margin}
            for row, margin in zip(data, reward_margins(here, here.base(), data, cfg))
        ]
        for name, objective in (("MADPO", loss), ("DPO", dpo_of_pairs)):
            here.align(here.base(), data, objective, cfg)
            curves[name].append(here.curve)
    text = "reviews: MADPO above DPO"
    ends = [[curve[-1] for curve in side] for side in curves.values()]
    claims.append(lab.compare(f"{text}, one beta", "reward", *ends, margin=0.05, expected=False))
    return [
        *claims,
        lab.compare(text, "reward", *curves.values(), at_kl="shared", margin=0.02, expected=False),
    ]
