"""3D-Properties - Identifying Challenges in DPO and Charting a Path Forward (2024),
arXiv:2406.07327

As a function of likelihoods, DPO's loss is log(1 + a (pi_l / pi_w)^beta) with a constant a. The
rejected likelihood Drops drastically, since the slope in pi_l is pi_w / pi_l times that in pi_w.
Learning then Degrades to suppressing rejected responses. Where y_w and y_l share features, both
likelihoods fall, and their probability is Dispersed to responses outside the pairs. On-policy pairs
suffer less. Two remedies slow the fall of the rejected likelihood:

    flex:  z = beta log pi(y_w) / pi_ref(y_w) - beta_rejected log pi(y_l) / pi_ref(y_l)
           loss = -log sigmoid(z)                                                        (B.2.1)
    sft:   loss = -log sigmoid(z) - gamma log pi(y_w),  z as in DPO                        (eq. 7)

The gradient in log-probs does not explode: it is equally large for both responses (B.1).

Differences from the paper
1. The SFT term has the sign of the paper's text and gradient; eq. 7 prints the opposite sign.
2. The loss is a mean over the batch, not a sum.
3. The paper does not give gamma.

    python train.py --method three_d --variant flex,sft,dpo     dpo lowers both log-probs most
    python train.py --method three_d --init OUT                 measures a finished run
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, fill_variant, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),  # minus a noise error is not a likelihood
    ignores=("k",),
    defaults=dict(world="reviews"),
)

VARIANTS = dict(flex=dict(beta_rejected=0.05), sft=dict(gamma=0.02), dpo=dict())


@dataclass(frozen=True)
class Config:
    variant: str = "flex"  # flex: a smaller beta on the rejected side; sft: an SFT term; dpo
    beta: float = 0.1  # strength of the pull to the reference; flex: beta of the chosen side
    beta_rejected: float | None = None  # flex: beta of the rejected side; 0.08 in the paper
    gamma: float | None = None  # sft: weight of the SFT term, a sum over tokens

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(self, beta="(0, inf)", beta_rejected="[0, inf)", gamma="[0, inf)")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    beta_rejected = cfg.beta_rejected if cfg.variant == "flex" else cfg.beta
    z = cfg.beta * chosen - beta_rejected * rejected  # (B,) B.2.1
    losses = -F.logsigmoid(z)
    if cfg.variant == "sft":
        losses = losses - cfg.gamma * logps.sum(-1)[:, 0]  # eq. 7
    ratios = {"chosen_ratio": chosen.detach().mean(), "rejected_ratio": rejected.detach().mean()}
    return losses, {"weight": torch.sigmoid(-z).detach().mean()} | ratios


def run(lab, cfg):
    if lab.settings.init and not lab.settings.steps:  # measure a finished run, train nothing
        if cfg != Config():
            raise UserError(
                f"{', '.join(vars(cfg))} do nothing without --steps: nothing is trained"
            )
        return lab.finished()
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)


# ---- the three properties of a model


def log_ratios(lab, model, rows):
    """log pi(y) - log pi_ref(y) (rows, K), float64, of rows with equally many responses."""
    columns = [lab.logps(each, rows) for each in (model, lab.reference)]
    sums = [[[sum(tokens) for tokens in row] for row in column] for column in columns]
    ours, theirs = torch.tensor(sums, dtype=torch.float64)
    return ours - theirs


def measure(lab, model):
    """The three properties, on pairs sampled from the reference, or on the pairs of --data.

    chosen_ratio, rejected_ratio: the mean log-ratios, in nats. both_fell: the share of pairs whose
    log-ratios are both negative. own_ratio: the mean log-ratio of samples of the model, which
    estimates its KL.
    """
    rows = lab.preferences(lab.reference, k=2, n=lab.eval_size, key=("measure",))
    ratio = log_ratios(lab, model, rows)
    fresh = lab.rows(lab.sample(model, [row["prompt"] for row in rows], 1))
    return {
        "chosen_ratio": ratio[:, 0].mean().item(),
        "rejected_ratio": ratio[:, 1].mean().item(),
        "both_fell": (ratio < 0).all(1).double().mean().item(),
        "own_ratio": log_ratios(lab, model, fresh).mean().item(),
    }


def evaluate(lab, model):
    """The Lab's evaluation and the three properties."""
    return lab.evaluate(model) | measure(lab, model)
