"""INSIGHTS - Insights into Alignment: Evaluating DPO and its Variants Across Multiple Tasks (2024),
arXiv:2404.14723

Does DPO, IPO, KTO or CPO still need SFT first? Each is trained on the same pairs from three models
(`scenario`). Let a and c be the log-ratios of chosen and rejected, n_w and n_l their lengths, and
h = a - c:

    dpo   -log sigmoid(beta h)
    ipo   (h - 1/(2 tau))^2                                       ipo_mean: h = a/n_w - c/n_l
    kto   lambda_d sigmoid(beta (z - a)) + lambda_u sigmoid(beta (c - z))
    nll   -log pi(y_w) / n_w                                      SFT
    cpo   -log sigmoid(beta [log pi(y_w) - log pi(y_l)]) + lam nll

dpo, ipo and kto stop learning once the log-ratios are large, so a base model that rarely writes a
good response may never learn to. cpo and nll raise the likelihood itself.

Differences from the paper
1. We had no access to its equations; losses follow the methods' papers and code.
2. kto's z is z0 or the detached mean log-ratio of the other side, at least 0.
3. Scenarios sft and instruct begin with SFT on the best of two or eight samples.
4. Worlds replace the paper's tasks.

    python train.py --method insights --variant dpo,ipo,kto,cpo --scenario sft,base,instruct
"""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, extremes, fill_variant, pair

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),  # minus a noise error is not a likelihood
    ignores=("k",),
    defaults=dict(world="reviews"),
)
VARIANTS = dict(
    dpo=dict(beta=0.1),
    ipo=dict(tau=0.1, ipo_mean=True),
    kto=dict(beta=0.1, z0=None, lambda_d=1.0, lambda_u=1.0),
    cpo=dict(beta=0.1, lam=1.0),
    nll=dict(),
)
FREE = ("cpo", "nll")  # variants without a reference
SCENARIOS = dict(base=None, sft=2, instruct=8)  # a demonstration is the best of so many samples


@dataclass(frozen=True)
class Config:
    variant: str = "dpo"  # dpo, ipo, kto, cpo or nll
    scenario: str = "sft"  # the model to start from: base, sft or instruct
    beta: float | None = None  # dpo, kto: pull to the reference; cpo: scale of the difference
    tau: float | None = None  # ipo: strength of the pull to the reference
    ipo_mean: bool | None = None  # ipo: mean over tokens as in TRL; false: the paper's sum
    z0: float | None = None  # kto: reference point [mean log-ratio of the other side]
    lambda_d: float | None = None  # kto: weight of the chosen (desirable) responses
    lambda_u: float | None = None  # kto: weight of the rejected (undesirable) responses
    lam: float | None = None  # cpo: weight of the likelihood of the chosen response

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        check_fields(self, scenario=tuple(SCENARIOS), beta="(0, inf)", tau="(0, inf)")
        check_fields(self, z0="[0, inf)", lambda_d="[0, inf)", lambda_u="[0, inf)", lam="[0, inf)")
        if self.lambda_d == 0 == self.lambda_u:
            raise UserError("lambda_d = 0 and lambda_u = 0 make the loss 0")


def prospects(a, c, present, cfg):
    """KTO's losses (B,) of chosen and rejected with log-ratios a and c (B,).

    A response that is absent, according to present (B, 2), has loss 0. The metric is the mean slope
    of the value function: 1 at the reference point, and near 0 where the loss is saturated.
    """
    other = torch.stack([c, a]).detach().sum(1) / present.sum(0).flip(0).clamp(min=1)
    good, bad = other.clamp(min=0) if cfg.z0 is None else (cfg.z0, cfg.z0)
    s = torch.sigmoid(cfg.beta * torch.stack([good - a, c - bad], 1)) * present  # (B, 2)
    slope = (4 * s * (1 - s)).detach().sum() / present.sum()
    return cfg.lambda_d * s[:, 0] + cfg.lambda_u * s[:, 1], {"slope": slope}


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    cpo and nll do not read ref_logps. kto accepts pairs in which one response is absent.
    """
    if cfg.variant in FREE:
        ref_logps = torch.zeros_like(logps)  # makes log-ratios equal to log-probs
    if cfg.variant == "kto":
        either = SimpleNamespace(mask=batch.mask.flatten(1))
        logps, ref_logps = pair(logps, ref_logps, either)
        a, c = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
        return prospects(a, c, batch.mask.any(-1), cfg)
    logps, ref_logps = pair(logps, ref_logps, batch)
    a, c = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    nw, nl = batch.mask.sum(-1).unbind(1)
    h = a / nw - c / nl if cfg.ipo_mean else a - c
    if cfg.variant == "dpo":
        losses = -F.logsigmoid(cfg.beta * h)
    elif cfg.variant == "ipo":
        losses = (h - 1 / (2 * cfg.tau)).square()
    elif cfg.variant == "cpo":
        losses = -F.logsigmoid(cfg.beta * h) - cfg.lam * a / nw
    else:
        losses = -a / nw
    return losses, {}


def begun(lab, policy, scenario, n=1024):
    """The model that a scenario starts from: the policy after SFT, in place, on demonstrations.

    A demonstration is the best of some samples of the policy, for each of n prompts.
    """
    if scenario == "base":
        return policy
    lists = lab.preferences(policy, k=SCENARIOS[scenario], n=n, key=("demonstrations",))
    # a pair of the best and the worst, of which nll reads the best
    shown = [extremes(row) for row in lists if max(row["scores"]) > min(row["scores"])]
    return lab.align(policy, lab.rows(shown), loss, Config("nll"), reference=None)


def run(lab, cfg):
    if cfg.scenario == "instruct" and lab.settings.data:
        raise UserError(
            "scenario = instruct samples from a world, which --data replaces; "
            "use scenario = base with an instruction-tuned --init"
        )
    policy = lab.base()
    data = lab.preferences(policy, k=2)  # the same pairs in every scenario
    policy = begun(lab, policy, cfg.scenario)
    return lab.align(policy, data, loss, cfg, reference=None if cfg.variant in FREE else "start")
