"""Survey - A Survey of Direct Preference Optimization (2025), arXiv:2503.11701

The survey sorts papers by the part of the DPO loss that they change (TAXONOMY, below). `loss` has
36 of these losses, one line each, in these quantities of a pair:

    a = log pi(y_w) / pi_ref(y_w),   c = log pi(y_l) / pi_ref(y_l),   h = a - c       (sums)
    lw, ll = log pi(y_w), log pi(y_l),   nw, nl = their tokens,   z = beta h         (DPO: z)

Differences from the papers
1. A loss has no state: running averages become batch means (bco, alpha_dpo) or a given number
   (beta_dpo, which filters no pairs), and kto's z0 is the other side's mean, at least 0.
2. gamma of simpo and alpha_dpo is a margin before beta is applied; alpha of alpha_div is fdpo's.
3. sppo is twice the authors' loss, as in TRL.
4. orpo's SFT term covers the response, not the prompt.
5. Exponents are clamped at 80.
6. Losses of whole distributions (TDPO), random tokens (SamPO) or other rewards (MODPO), other ways
   to run DPO (SPIN), and losses that no code could confirm (DPO-RK) are left out.

    python train.py --method survey --variant dpo,ipo,simpo,kto     at one beta the KLs differ
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, extremes, fill_variant, pair, readable

PAPER = Paper(
    "pairs",
    worlds=("text", "table"),
    ignores=("k",),
    defaults=dict(world="reviews"),
)
# the fields that each variant reads, with their defaults
BETA_ALONE = "dpo npo bco nca cal_dpo aot hinge sppo fkl js apo_zero apo_down".split()
VARIANTS = dict.fromkeys(BETA_ALONE, dict(beta=0.1)) | dict(
    ipo=dict(tau=0.1),
    ipo_mean=dict(tau=0.1),
    kto=dict(beta=0.1, z0=None),
    rdpo=dict(beta=0.1, epsilon=0.1),
    cdpo=dict(beta=0.1, epsilon=0.1),
    dr_dpo=dict(beta=0.1, tau=1.0),
    odpo=dict(beta=0.1, alpha=1.0),
    beta_dpo=dict(beta=0.1, alpha=0.6, gamma=0.0),
    alpha_dpo=dict(beta=2.5, alpha=0.2, gamma=0.6),
    simpo=dict(beta=2.0, gamma=0.5),
    cpo=dict(beta=0.1, lam=1.0),
    orpo=dict(lam=0.1),
    simper=dict(),
    alpha_div=dict(beta=0.1, alpha=0.5),
    exo=dict(beta=0.1, epsilon=0.001),
    chi_po=dict(beta=0.1, gamma=1.0),
    rrhf=dict(),
    r_dpo=dict(beta=0.1, alpha=0.1),
    ln_dpo=dict(beta=1.0),
    ld_dpo=dict(beta=0.1, alpha=0.5),
    dpop=dict(beta=0.1, lam=5.0),
    slic=dict(gamma=3.0, lam=0.1),
    disco_pop=dict(beta=0.05, tau=0.05),
    dpo_nll=dict(beta=0.1, lam=1.0),
)
FREE = ("simpo", "cpo", "orpo", "simper", "rrhf", "slic")  # variants without a reference
RANGES = dict(  # variants whose fields have other intervals than in Config
    exo=dict(epsilon="(0, 0.5)"),
    alpha_div=dict(alpha="(0, 1]"),
    ld_dpo=dict(alpha="[0, 1]"),
    r_dpo=dict(alpha="(-inf, inf)"),
    chi_po=dict(gamma="(0, inf)"),
)


@dataclass(frozen=True)
class Config:
    variant: str = "dpo"  # a key of VARIANTS, which also has the defaults of the other fields
    beta: float | None = None  # strength of the pull to the reference, or scale of the margin
    tau: float | None = None  # ipo: as beta; dr_dpo: temperature over the batch; disco_pop: gate
    epsilon: float | None = None  # cdpo, rdpo: share of flipped labels; exo: label smoothing
    alpha: float | None = None  # weight of a correction; alpha_div: order; ld_dpo: tail weight
    lam: float | None = None  # cpo, orpo, dpo_nll, slic, dpop: weight of the second term
    gamma: float | None = None  # simpo, alpha_dpo, slic: margin; beta_dpo: usual h; chi_po: R_max
    z0: float | None = None  # kto: reference point [the other side's mean log-ratio, at least 0]

    def __post_init__(self):
        fill_variant(self, VARIANTS)
        ranges = dict.fromkeys(("beta", "tau"), "(0, inf)")
        ranges |= dict.fromkeys(("alpha", "lam", "z0"), "[0, inf)")
        ranges |= dict(epsilon="[0, 0.5)", gamma="(-inf, inf)")
        check_fields(self, **ranges | RANGES.get(self.variant, {}))


def log_odds(s):
    """log(p / (1 - p)) of p = exp(s), for ORPO; s is clamped below 0, where p is 1."""
    return s - (-torch.expm1(s.clamp(max=-1e-6))).log()


def kto(a, c, cfg):
    """KTO's losses (B,) of the chosen and rejected log-ratios a and c (B,).

    Each has a reference point of its own, which has no gradient.
    """
    good, bad = (x.mean().detach().clamp(min=0) if cfg.z0 is None else cfg.z0 for x in (c, a))
    return torch.sigmoid(cfg.beta * (good - a)) + torch.sigmoid(cfg.beta * (c - bad))


def standardized(x):
    """x (B,) minus its batch mean, divided by its standard deviation."""
    x = x - x.mean()
    return x / x.square().mean().sqrt().clamp(min=1e-6)


def discounted(ratio, mask, alpha):
    """LD-DPO's h (B,) of log-ratios (B, 2, T).

    alpha is the weight of the tokens beyond the length of the shorter response.
    """
    tail = mask.cumsum(-1) > mask.sum(-1).amin(1)[:, None, None]
    a, c = torch.where(tail, alpha * ratio, ratio).sum(-1).unbind(1)
    return a - c


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    The variants in FREE do not read ref_logps. odpo reads batch.scores (B, 2). UserError: chosen
    does not score higher.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    if cfg.variant == "odpo" and readable(batch.scores):
        if not (batch.scores[:, 0] > batch.scores[:, 1]).all():
            raise UserError("odpo: a chosen response does not score more than the rejected one")
    beta, tau, epsilon, alpha = cfg.beta, cfg.tau, cfg.epsilon, cfg.alpha
    lam, gamma = cfg.lam, cfg.gamma
    log_s, s, exp = F.logsigmoid, torch.sigmoid, lambda x: x.clamp(max=80.0).exp()

    # the quantities of which the losses below are made, each (B,)
    B = logps.shape[0]
    lw, ll = logps.sum(-1).unbind(1)  # log-probs: SUM over tokens
    nw, nl = batch.mask.sum(-1).unbind(1)  # lengths
    mw, ml = lw / nw, ll / nl  # log-probs: MEAN over tokens
    if ref_logps is not None:
        rw, rl = ref_logps.sum(-1).unbind(1)
        a, c = lw - rw, ll - rl  # log-ratios
        h, mean_h = a - c, a / nw - c / nl
        z = h if beta is None else beta * h  # the margin of DPO
        middle = (a + c).detach().mean() / 2  # bco: the mean reward of the batch, without beta

    losses = {
        # noise and distinguishability of the labels (3.1.1)
        "rdpo": lambda: -log_s(z) - epsilon / (1 - 2 * epsilon) * z,
        "cdpo": lambda: -log_s(z) + epsilon * z,
        "dr_dpo": lambda: (-tau * ((log_s(z) / tau).logsumexp(0) - math.log(B))).expand(B),
        "odpo": lambda: -log_s(z - alpha * (batch.scores[:, 0] - batch.scores[:, 1]).log()),
        "beta_dpo": lambda: (
            -log_s((beta + beta * alpha * (h.detach().mean() - gamma)).clamp(min=1e-3) * h)
        ),
        "alpha_dpo": lambda: (
            -log_s(beta * (mw - ml - gamma - alpha * standardized(mean_h.detach())))
        ),
        # the shape of the loss: points and pairs (3.1.2)
        "dpo": lambda: -log_s(z),
        "ipo": lambda: (h - 1 / (2 * tau)).square(),
        "ipo_mean": lambda: (mean_h - 1 / (2 * tau)).square(),
        "npo": lambda: -2 / beta * log_s(-beta * c),
        "kto": lambda: kto(a, c, cfg),
        "bco": lambda: -log_s(beta * (a - middle)) - log_s(beta * (middle - c)),
        "nca": lambda: -log_s(beta * a) - 0.5 * log_s(-beta * a) - 0.5 * log_s(-beta * c),
        "cal_dpo": lambda: (
            -log_s(h) + 0.5 * ((a - 0.5 / beta).square() + (c + 0.5 / beta).square())
        ),
        "aot": lambda: -log_s(beta * ((lw - ll).sort()[0] - (rw - rl).sort()[0])),
        "hinge": lambda: (1 - z).clamp(min=0),  # RSO
        "slic": lambda: (gamma - lw + ll).clamp(min=0) - lam * lw,
        "sppo": lambda: (a - 0.5 / beta).square() + (c + 0.5 / beta).square(),
        "disco_pop": lambda: s(z / tau) * exp(-z) - s(-z / tau) * log_s(z),
        "dpo_nll": lambda: -log_s(z) - lam * mw,
        # no reference (3.3.1)
        "simpo": lambda: -log_s(beta * (mw - ml - gamma)),
        "cpo": lambda: -log_s(beta * (lw - ll)) - lam * mw,
        "orpo": lambda: -mw - lam * log_s(log_odds(mw) - log_odds(ml)),
        "simper": lambda: exp(ml) - exp(mw),
        # other divergences than the reverse KL (3.3.2)
        "fkl": lambda: -log_s(beta * (exp(-c) - exp(-a))),
        "js": lambda: -log_s(beta * (log_s(a) - log_s(c))),
        "alpha_div": lambda: -log_s(beta / alpha * (exp(-alpha * c) - exp(-alpha * a))),
        "exo": lambda: (
            s(z) * (log_s(z) - math.log(1 - epsilon)) + s(-z) * (log_s(-z) - math.log(epsilon))
        ),
        "chi_po": lambda: (
            -log_s((beta * (exp(a) + a) - beta * (exp(c) + c)).clamp(-2 * gamma, 2 * gamma))
        ),
        # length (3.4.1)
        "rrhf": lambda: (ml - mw).clamp(min=0) - mw,
        "r_dpo": lambda: -log_s(z + alpha * (nw - nl).to(z.dtype)),  # + as its paper derives
        "ln_dpo": lambda: -log_s(beta * mean_h),
        "ld_dpo": lambda: -log_s(beta * discounted(logps - ref_logps, batch.mask, alpha)),
        # likelihood collapse (3.4.2)
        "apo_zero": lambda: s(-beta * a) + s(beta * c),
        "apo_down": lambda: s(beta * a) + s(-z),
        "dpop": lambda: -log_s(beta * (h - lam * (-a).clamp(min=0))),
    }
    return losses[cfg.variant](), {}


def widest_pairs(lab, policy):
    """Pairs of the best and the worst of four samples, with the graded scores that odpo needs."""
    rows = lab.preferences(policy, k=4)
    return lab.rows(extremes(row) for row in rows if max(row["scores"]) > min(row["scores"]))


def check_alpha(lab, data, variant):
    """UserError: alpha does nothing, as scores are 1 apart (odpo) or responses have one length."""
    gaps = {row["scores"][0] - row["scores"][1] for row in data}
    lengths = {len(y) for row in data for y in row["responses"]}
    flat = variant == "odpo" and gaps <= {1}
    if flat or (variant in ("r_dpo", "ld_dpo") and len(lengths) == 1):
        what = "all scores differ by 1" if flat else "all responses have one length"
        raise UserError(f"alpha does nothing under {variant} in {lab.world.name}: {what}")


def run(lab, cfg):
    if cfg.variant == "odpo" and lab.world.verifier:  # known before the base model is trained
        check_alpha(lab, [dict(scores=[1.0, 0.0], responses=[])], cfg.variant)
    policy = lab.base()
    data = widest_pairs(lab, policy) if cfg.variant == "odpo" else lab.preferences(policy, k=2)
    check_alpha(lab, data, cfg.variant)
    reference = None if cfg.variant in FREE else "start"
    return lab.align(policy, data, loss, cfg, reference=reference)


# the survey's figure: branch (section): papers [the variant of this file]
TAXONOMY = """
heterogeneity (3.1.1): MinMax-DPO, MallowsPO, GRPO, GDPO
distinguishability (3.1.1): ODPO [odpo], MPO, DPO-rc, alpha-DPO [alpha_dpo], GDPO, beta-DPO
    [beta_dpo], fDPO, Curri-DPO, Ada-DPO, sDPO, Sr-DPO, GaPO, Ma et al.
noise (3.1.1): rDPO [rdpo], PerpCorrect, ROPO, SPA, Zhang et al., Im and Li, Gao et al., Wu et al.
    [dr_dpo]
point-wise (3.1.2): KTO [kto], BCO [bco], Cal-DPO [cal_dpo], DRO, AOT [aot], ULMA, NCA [nca], GPO
pair-wise (3.1.2): DPO [dpo], IPO [ipo ipo_mean], DPO-RK, DPO-D, BMC, IOPO, PMPO, SAPO, D2O, NPO
    [npo], SimNPO
list-wise (3.1.2): Panacea, LiPO, LIRE, OPO, DRPO, mDPO, RPO, TODO
token (3.1.3): Rafailov et al., TDPO, TIS-DPO, SparsePO, RTO, SePO, EPO, D2PO
step (3.1.3): Step-DPO, SCDPO, CPO, MCTS-DPO, TPO, RDPO, DAPO
sentence (3.1.3): DPO, MAPO, EURUS, IRPO, FACTALIGN
turn (3.1.3): M-DPO, ETO, SDPO, AgentQ, DMPO
offline (3.2.1): DPO, CPO, ORPO, ULMA, PAFT, Curri-DPO, sDPO, Linear Alignment, ICDPO
online (3.2.1): OAIF, OFS-DPO, Yuan et al., BPO, RS-DPO, RSO [hinge], ROPO, Shi et al., OPTUNE,
    Iterative RPO, DPO-ST, Xie et al., APO, Xiong et al., COMAL, Xu et al., SeRA, CREAM, D2PO,
    DLMA, XPO, SELM, ETO, VPO, COPO, HyPO, MPO, AIPO, Tang et al.
active (3.2.1): APL, divAPO, ADPO, Das et al.
multi-objective (3.2.2): MODPO, SPO, MOSLIM, HPO, CPO, DRDO
self-play (3.2.2): SPIN, SPPO [sppo], SPO, BoNBoN, Nash-MD, DNO, IPO-MD, SRPO, DNPO
dynamic reference (3.3.1): Curri-DPO, MPO, M-DPO, Gorbatovski et al.
no reference (3.3.1): ORPO [orpo], SimPO [simpo], SimPER [simper], Liu et al., Xu et al. [cpo]
diversity (3.3.2): f-DPO [fkl js alpha_div], Slocum et al.
generalization (3.3.2): DPO-Kernels, FlipGuard, FPO, GPO, EXO [exo], SPO, QDPO, Huang et al.
    [chi_po]
safety (3.3.3): SafeDPO, SACPO, C-DPO, ADPO, Lee et al., Zhang et al.
distribution shift (3.4.1): NS-DPO, SRPO, SELM, e-DPO, Lin et al., Tajwar et al.
length (3.4.1): RRHF [rrhf], R-DPO [r_dpo], SimPO, SamPO, DMPO, LIFT, LN-DPO [ln_dpo], LD-DPO
    [ld_dpo], D2PO, LongPO, Singhal et al., Richardson et al.
likelihood collapse (3.4.2): APO [apo_zero apo_down], DPO-Positive [dpop], e-DPO, Flex-DPO,
    Rafailov et al., Feng et al., Yuan et al., Razin et al., Shi et al.
alignment tax (3.4.2): PAFT, Lin et al., Thakkar et al., Lu et al., Chen et al.
beside the figure: cDPO [cdpo], SLiC-HF [slic], DiscoPOP [disco_pop], DPO+NLL [dpo_nll]
"""
