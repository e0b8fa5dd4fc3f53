"""What SFT is compared with, and whether it holds here."""

from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import collate
from methods.sft import Config, loss


def dpo_of_pairs(logps, ref_logps, batch, cfg):
    """The baseline of the claim: DPO (arXiv:2305.18290)."""
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)
    return -F.logsigmoid(cfg.beta * (chosen - rejected)), {}


def winners(world):
    """Probabilities (P, R) of the preferred one of two different responses of the reference, under Bradley-Terry."""
    chance, truth = world.reference.probs(), world.rewards()
    beats = (
        torch.sigmoid(truth[:, :, None] - truth[:, None, :]) - torch.eye(truth.shape[1]) / 2
    )  # a response does not meet itself
    won = chance * (beats * chance[:, None, :]).sum(2)
    return won / won.sum(1, keepdim=True)


def imitate(lab):
    """A table trained on all ordered pairs, each with its exact Bradley-Terry weight -> {name: number} of what it reaches."""
    here = lab.at(world="bandit")
    policy, batch, world = (
        here.base(),
        collate(here.world.pairs_all(here.world.reference)),
        here.world,
    )

    def weighted(model, batch):
        return loss(model.logps(batch), None, batch, Config())[0] * batch.weight, {}

    policy = here.fit(policy, [batch], weighted, steps=1500, lr=0.05, decay=True)
    share, truth = winners(world), world.rewards()
    return {
        "gap": (policy.probs() - share).abs().sum().item() / 2,
        "reward": policy.expect(truth),
        "won": (share * truth).sum(1).mean().item(),
        "kl": policy.kl(world.reference),
        "largest": (policy.log_probs() - world.reference.log_probs()).max().exp().item(),
        "optima": [world.optimum(world.reference, beta).expect(truth) for beta in (1.0, 0.5)],
    }


def scorings(lab, objective, reference, steps=10):
    """How often a model is scored in a training of so many steps in the bandit."""
    here, calls = lab.at(world="bandit", prompts=512), []

    def score(model, batch):
        calls.append(model)
        return model.logps(batch)

    policy = here.base()
    data = here.preferences(policy, k=2)
    here.align(
        policy,
        data,
        objective,
        SimpleNamespace(beta=0.1),
        reference=reference,
        score=score,
        steps=steps,
    )
    return len(calls)


def claim(lab):
    """What it reaches against DPO, without a reference: in a bandit, where responses have one length, exactly the winners' distribution,
    far from DPO's optimum; on reviews more reward than the base model, less than DPO at equal steps, and a small part of DPO's KL.

    At one KL it is not behind: on tuning seed 100 it had a reward of 0.329 at KL 0.46 where DPO at beta 1 had 0.310, on 101 and 102 on
    average 0.337 against 0.250 at KL 0.40. That comparison is kept and not expected to hold. DPO at beta 0.1 ended at a reward of 0.654 and
    KL 10.5 (seed 100) and 0.752 and 6.6 (101 and 102), the fine-tuning at 0.329 and 0.46, and 0.312 and 0.43."""
    found = lab.stage("winners", lambda: imitate(lab))
    counts = lab.stage(
        "scorings", lambda: [scorings(lab, loss, None), scorings(lab, dpo_of_pairs, "start")]
    )
    claims = [
        lab.exact(
            "responses of one length: the optimum is the distribution of the winners, total variation",
            found["gap"],
            0.0,
            1e-3,
        ),
        lab.exact(
            "its reward is that of the preferred responses", found["reward"], found["won"], 1e-3
        ),
        lab.compare(
            "responses of one length: none becomes more than twice as likely",
            "ratio",
            [found["largest"]],
            [2.0],
            smaller=True,
        ),
        *(
            lab.compare(
                f"less reward than DPO's optimum at beta {beta}",
                "reward",
                [found["reward"]],
                [best],
                smaller=True,
            )
            for beta, best in zip((1.0, 0.5), found["optima"])
        ),
        lab.exact("scorings of a model in 10 steps", counts[0], 10, 0.5),
        lab.exact("those of DPO, which runs its reference", counts[1], 20, 0.5),
    ]
    curves = {"sft": [], "dpo": [], "tied": []}
    contest = dict(
        sft=(loss, None, None), dpo=(dpo_of_pairs, "start", 0.1), tied=(dpo_of_pairs, "start", 1.0)
    )
    for seed in lab.seeds:
        here = lab.at(seed=seed, eval_size=512)
        data = here.preferences(here.base(), k=2)
        for name, (objective, reference, beta) in contest.items():
            here.align(
                here.base(), data, objective, SimpleNamespace(beta=beta), reference=reference
            )
            curves[name].append(here.curve)
    ends = {name: [curve[-1] for curve in side] for name, side in curves.items()}
    start = [curve[0] for curve in curves["sft"]]
    claims.append(
        lab.compare("true reward above the base model", "reward", ends["sft"], start, margin=0.1)
    )
    claims.append(
        lab.compare(
            "less true reward than DPO, equal steps",
            "reward",
            ends["sft"],
            ends["dpo"],
            margin=0.1,
            smaller=True,
        )
    )
    claims.append(
        lab.compare(
            "less KL than DPO, equal steps",
            "kl",
            ends["sft"],
            ends["dpo"],
            margin=1.0,
            smaller=True,
        )
    )
    claims.append(
        lab.compare(
            "less true reward than DPO at beta 1",
            "reward",
            curves["sft"],
            curves["tied"],
            at_kl="shared",
            margin=0.05,
            smaller=True,
            expected=False,
        )
    )
    return claims
