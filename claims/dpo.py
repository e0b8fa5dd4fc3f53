"""What DPO claims, and whether it holds here."""

import torch

from data import collate
from methods.dpo import Config, loss


def preferred(logps, ref_logps, batch, cfg):
    """The baseline of the claim: supervised fine-tuning on the preferred responses ("Preferred-FT", sec. 6)."""
    return -logps[:, 0].sum(-1) / batch.mask[:, 0].sum(-1).clamp(min=1), {}


def recover(lab, beta, objective=loss):
    """A table trained on all ordered pairs, each with its exact Bradley-Terry weight -> (J of it, J of the optimum of eq. 4)."""
    here, cfg = lab.at(world="bandit"), Config(beta=beta)
    reference, policy, batch = (
        here.base(),
        here.base(),
        collate(here.world.pairs_all(here.world.reference)),
    )
    with torch.no_grad():
        ref_logps = reference.logps(batch)

    def weighted(model, batch):
        return objective(model.logps(batch), ref_logps, batch, cfg)[0] * batch.weight, {}

    policy = here.fit(policy, [batch], weighted, steps=1500, lr=0.05, decay=True)
    return here.world.objective(policy, beta), here.world.objective(
        here.world.optimum(reference, beta), beta
    )


def claim(lab):
    """DPO reaches the optimum of reward - beta KL without reinforcement learning (exact, in a bandit of 27 responses); supervised
    fine-tuning on the preferred responses does not. On text it ends with more true reward than that fine-tuning on the same pairs.

    What did not reproduce is more reward at the *same* KL. The fine-tuning stops by itself near a KL of 0.5 to 0.7, since the preferred
    responses are but half of the samples, and up to there it gets as much reward for its KL as DPO does. Tried on seed 100: beta 0.1 (0.2
    reward at KL 0.6, the fine-tuning 0.35 to 0.4), 0.5 (0.31) and 1 (0.40), and learning rates of 7e-4 and 2e-3 for both; the claim
    below takes beta 1, the best of them. DPO's gain lies at the KL that fine-tuning never reaches."""
    claims = []
    for beta in (0.2, 0.5, 1.0, 2.0):
        ours, optimum = recover(lab, beta)
        claims.append(
            lab.exact(f"J of DPO at beta {beta} is that of the optimum", ours, optimum, 1e-4)
        )
    tuned, _ = recover(lab, beta, preferred)
    claims.append(
        lab.compare(f"J above supervised fine-tuning at beta {beta}", "J", [ours], [tuned])
    )
    curves = {"dpo": [], "tied": [], "supervised": []}
    contest = dict(
        dpo=(loss, Config()), tied=(loss, Config(beta=1.0)), supervised=(preferred, Config())
    )
    for seed in lab.seeds:
        here = lab.at(seed=seed, eval_size=512)
        data = here.preferences(here.base(), k=2)
        for name, (objective, cfg) in contest.items():
            here.align(here.base(), data, objective, cfg)
            curves[name].append(here.curve)
    ends = {name: [curve[-1] for curve in side] for name, side in curves.items()}
    text = "true reward above supervised fine-tuning on the preferred responses"
    claims.append(
        lab.compare(f"{text}, equal steps", "reward", ends["dpo"], ends["supervised"], margin=0.1)
    )
    same_kl = lab.compare(
        f"{text}, equal KL",
        "reward",
        curves["tied"],
        curves["supervised"],
        at_kl="shared",
        margin=0.05,
        expected=False,
    )
    return [*claims, same_kl]
