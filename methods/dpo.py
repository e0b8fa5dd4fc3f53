"""DPO - Direct Preference Optimization: Your Language Model is Secretly a Reward Model (2023), arXiv:2305.18290

Reinforcement learning from preferences fits a reward model, then maximises reward - beta KL(policy || reference). Its optimum is known:
pi(y|x) = pi_ref(y|x) exp(r(x,y) / beta) / Z(x) (eq. 4). Turned round, the policy itself is the reward model, r = beta log(pi / pi_ref) up
to a constant of the prompt that cancels in a pair, so that a logistic loss on pairs is all that is left.

    loss = -log sigmoid( beta [ (log pi(y_w) - log pi_ref(y_w)) - (log pi(y_l) - log pi_ref(y_l)) ] )        (eq. 7)

What this file does differently from the paper: nothing. On images the log-probs are minus summed noise errors: that is Diffusion-DPO
(arXiv:2311.12908), whose beta of 5000 on means is 0.15 here.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import UserError, collate

FAMILY, KINDS = "pairs", ("text", "images", "table")
UNUSED = ("k",)  # run settings that leave no choice here
DEFAULTS = dict(world="reviews")


@dataclass
class Config:
    beta: float = 0.1  # strength of the pull to the reference (sec. 4); the paper sweeps 0.05 to 5

    def __post_init__(self):
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta = {self.beta} must be positive and finite")


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
    """DPO's loss on pairs, the preferred response first.

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
    losses = -F.logsigmoid(z)  # eq. 7
    return losses, {"weight": torch.sigmoid(-z).detach().mean()}


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)


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
