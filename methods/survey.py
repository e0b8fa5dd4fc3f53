"""Survey - A Survey of Direct Preference Optimization (2025), arXiv:2503.11701

The survey sorts some two hundred papers by the part of DPO's loss that they change. This file has its taxonomy as data (TAXONOMY) and 36
of its losses (VARIANTS), each a line over the same few numbers of a pair, to be run on the same pairs. With l, r the summed log-probs of
policy and reference, of the preferred response w and the rejected one l, and n their lengths,

    a = l_w - r_w,   c = l_l - r_l,   h = a - c;          DPO is -log sigmoid(beta h), the others stand in `loss`

What this file does differently from the papers: 1. A loss keeps nothing between steps: averages over the run are averages over the batch
(bco, alpha_dpo) or a number given (beta_dpo, which also keeps all pairs); kto's reference point is z0 or the mean log-ratio of the other
side, at least 0, and while that is 0 it is apo_zero. 2. r_dpo adds alpha (n_w - n_l): with a minus, as in one repository, it lengthens. 3.
simpo's and alpha_dpo's gamma is the margin before beta. 4. alpha_div's alpha counts as in fdpo. 5. sppo is the sum of two squares (TRL),
twice its authors'. 6. orpo imitates the response alone, not the prompt. 7. fkl's, chi_po's and disco_pop's exponents are held at 80. 8. No
row here: what reads whole distributions (TDPO, TIS-DPO, WPO, MallowsPO), draws tokens (SamPO), needs other rewards (MODPO), or is a way of
running DPO (SPIN, TR-DPO); and what could not be checked against code (the exponential GPO, DPO-RK).
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn.functional as F

from data import UserError, interval, write_beside, write_text
from toy import tree

FAMILY, KINDS = "pairs", ("text", "table")
UNUSED = ("k",)  # run settings that leave no choice here
DEFAULTS = dict(world="reviews")
LARGEST = -1e-6  # mean log-prob of a token in orpo's odds, at most

TAXONOMY = {  # the survey's figure: branch, section, papers; in brackets what runs here, a name of VARIANTS
    "heterogeneity (3.1.1)": "MinMax-DPO, MallowsPO, GRPO, GDPO",
    "distinguishability (3.1.1)": "ODPO [odpo], MPO, DPO-rc, alpha-DPO [alpha_dpo], GDPO, beta-DPO [beta_dpo], fDPO, Curri-DPO, "
    "Ada-DPO, sDPO, Sr-DPO, GaPO, Ma et al.",
    "noise (3.1.1)": "rDPO [rdpo], PerpCorrect, ROPO, SPA, Zhang et al., Im and Li, Gao et al., Wu et al. [dr_dpo]",
    "point-wise (3.1.2)": "KTO [kto], BCO [bco], Cal-DPO [cal_dpo], DRO, AOT [aot], ULMA, NCA [nca], GPO",
    "pair-wise (3.1.2)": "DPO [dpo], IPO [ipo ipo_mean], DPO-RK, DPO-D, BMC, IOPO, PMPO, SAPO, D2O, NPO [npo], SimNPO",
    "list-wise (3.1.2)": "Panacea, LiPO, LIRE, OPO, DRPO, mDPO, RPO, TODO",
    "token (3.1.3)": "Rafailov et al., TDPO, TIS-DPO, SparsePO, RTO, SePO, EPO, D2PO",
    "step (3.1.3)": "Step-DPO, SCDPO, CPO, MCTS-DPO, TPO, RDPO, DAPO",
    "sentence (3.1.3)": "DPO, MAPO, EURUS, IRPO, FACTALIGN",
    "turn (3.1.3)": "M-DPO, ETO, SDPO, AgentQ, DMPO",
    "offline (3.2.1)": "DPO, CPO, ORPO, ULMA, PAFT, Curri-DPO, sDPO, Linear Alignment, ICDPO",
    "online (3.2.1)": "OAIF, OFS-DPO, Yuan et al., BPO, RS-DPO, RSO [hinge], ROPO, Shi et al., OPTUNE, Iterative RPO, DPO-ST, "
    "Xie et al., APO, Xiong et al., COMAL, Xu et al., SeRA, CREAM, D2PO, DLMA, XPO, SELM, ETO, VPO, COPO, HyPO, MPO, AIPO, Tang et al.",
    "active (3.2.1)": "APL, divAPO, ADPO, Das et al.",
    "multi-objective (3.2.2)": "MODPO, SPO, MOSLIM, HPO, CPO, DRDO",
    "self-play (3.2.2)": "SPIN, SPPO [sppo], SPO, BoNBoN, Nash-MD, DNO, IPO-MD, SRPO, DNPO",
    "dynamic reference (3.3.1)": "Curri-DPO, MPO, M-DPO, Gorbatovski et al.",
    "no reference (3.3.1)": "ORPO [orpo], SimPO [simpo], SimPER [simper], Liu et al., Xu et al. [cpo]",
    "diversity (3.3.2)": "f-DPO [fkl js alpha_div], Slocum et al.",
    "generalisation (3.3.2)": "DPO-Kernels, FlipGuard, FPO, GPO, EXO [exo], SPO, QDPO, Huang et al. [chi_po]",
    "safety (3.3.3)": "SafeDPO, SACPO, C-DPO, ADPO, Lee et al., Zhang et al.",
    "distribution shift (3.4.1)": "NS-DPO, SRPO, SELM, e-DPO, Lin et al., Tajwar et al.",
    "length (3.4.1)": "RRHF [rrhf], R-DPO [r_dpo], SimPO, SamPO, DMPO, LIFT, LN-DPO [ln_dpo], LD-DPO [ld_dpo], D2PO, LongPO, "
    "Singhal et al., Richardson et al.",
    "likelihood collapse (3.4.2)": "APO [apo_zero apo_down], DPO-Positive [dpop], e-DPO, Flex-DPO, Rafailov et al., Feng et al., "
    "Yuan et al., Razin et al., Shi et al.",
    "alignment tax (3.4.2)": "PAFT, Lin et al., Thakkar et al., Lu et al., Chen et al.",
    "beside the figure": "cDPO [cdpo], SLiC-HF [slic], DiscoPOP [disco_pop], DPO+NLL [dpo_nll]",
}  # fmt: skip
VARIANTS = dict(  # the hyper-parameters that each reads, with their defaults
    dpo=dict(beta=0.1), ipo=dict(tau=0.1), ipo_mean=dict(tau=0.1), npo=dict(beta=0.1), kto=dict(beta=0.1, z0=None), bco=dict(beta=0.1),
    nca=dict(beta=0.1), cal_dpo=dict(beta=0.1), aot=dict(beta=0.1), rdpo=dict(beta=0.1, epsilon=0.1), dr_dpo=dict(beta=0.1, tau=1.0),
    odpo=dict(beta=0.1, alpha=1.0), beta_dpo=dict(beta=0.1, alpha=0.6, gamma=0.0), alpha_dpo=dict(beta=2.5, alpha=0.2, gamma=0.6),
    hinge=dict(beta=0.1), sppo=dict(beta=0.1), simpo=dict(beta=2.0, gamma=0.5), cpo=dict(beta=0.1, lam=1.0), orpo=dict(lam=0.1),
    simper=dict(), fkl=dict(beta=0.1), js=dict(beta=0.1), alpha_div=dict(beta=0.1, alpha=0.5), exo=dict(beta=0.1, epsilon=0.001),
    chi_po=dict(beta=0.1, gamma=1.0), rrhf=dict(), r_dpo=dict(beta=0.1, alpha=0.1), ln_dpo=dict(beta=1.0),
    ld_dpo=dict(beta=0.1, alpha=0.5), apo_zero=dict(beta=0.1), apo_down=dict(beta=0.1), dpop=dict(beta=0.1, lam=5.0),
    cdpo=dict(beta=0.1, epsilon=0.1), slic=dict(gamma=3.0, lam=0.1), disco_pop=dict(beta=0.05, tau=0.05), dpo_nll=dict(beta=0.1, lam=1.0),
)  # fmt: skip
FREE = ("simpo", "cpo", "orpo", "simper", "rrhf", "slic")  # no reference is made or run


@dataclass
class Config:
    variant: str = "dpo"  # a name of VARIANTS
    beta: float | None = (
        None  # strength of the pull to the reference, or of the margin; the default of all these is the variant's
    )
    tau: float | None = (
        None  # ipo: strength of the pull; dr_dpo: temperature over the batch; disco_pop: of the blend
    )
    epsilon: float | None = None  # cdpo, rdpo: share of flipped labels; exo: smoothing of the label
    alpha: float | None = (
        None  # odpo, beta_dpo, alpha_dpo: size of a correction; r_dpo: price of a token; alpha_div: order; ld_dpo: power
    )
    lam: float | None = None  # cpo, orpo, dpo_nll, slic, dpop: weight of the second term
    gamma: float | None = (
        None  # simpo, alpha_dpo, slic: margin; beta_dpo: usual h; chi_po: half the largest reward of a side
    )
    z0: float | None = (
        None  # kto: reference point; by default the mean log-ratio of the other side, at least 0
    )

    def __post_init__(self):
        if self.variant not in VARIANTS:
            raise UserError(f"variant = {self.variant} must be one of {', '.join(VARIANTS)}")
        known, strict = (
            VARIANTS[self.variant],
            {("exo", "epsilon"), ("alpha_div", "alpha"), ("chi_po", "gamma")},
        )
        for name in (f.name for f in fields(self)[1:]):
            if getattr(self, name) is not None and name not in known:
                raise UserError(
                    f"{name} = {getattr(self, name)} does nothing with variant = {self.variant}"
                )
            if getattr(self, name) is None:
                setattr(self, name, known.get(name))
            at, value = (self.variant, name), getattr(self, name)
            low = (
                -math.inf
                if at == ("r_dpo", "alpha") or (name == "gamma" and at not in strict)
                else 0.0
            )
            high = (
                0.5
                if name == "epsilon"
                else 1.0
                if at in (("alpha_div", "alpha"), ("ld_dpo", "alpha"))
                else math.inf
            )
            inside = (
                value is None
                or low < value < high
                or (value == low and name not in ("beta", "tau") and at not in strict)
            )
            if not (inside or (value == high == 1)) or value in (math.inf, -math.inf):
                raise UserError(
                    f"{name} = {value} is out of range for {self.variant}: from {low:g} to {high:g}"
                )


def check_pairs(logps, batch):
    """ValueError unless every row is a pair of responses with something to score."""
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise UserError(
            f"log-probs of shape {tuple(logps.shape)}: pairs are (B, 2, T), the preferred response first"
        )
    # on CUDA the question would make the device wait; there the data were looked at when they were read
    if logps.device.type == "cpu" and not batch.mask.any(-1).all():
        raise UserError("a response has no scored token")


def log1mexp(s):
    """log(1 - exp(s)) for s < 0, exact to the last digits near 0 and far from it."""
    return torch.where(s > -math.log(2), torch.log(-torch.expm1(s)), torch.log1p(-torch.exp(s)))


def kto(a, c, cfg):
    """KTO's loss of a preferred and a rejected response with log-ratios a and c, each against its reference point."""
    good, bad = (x.mean().detach().clamp(min=0) if cfg.z0 is None else cfg.z0 for x in (c, a))
    return torch.sigmoid(cfg.beta * (good - a)) + torch.sigmoid(cfg.beta * (c - bad))


def standardised(x):
    """x less its batch mean, in its batch's standard deviations, without gradient."""
    x = x.detach() - x.detach().mean()
    return x / x.square().mean().sqrt().clamp(min=1e-6)


def beyond(ratio, mask, alpha):
    """LD-DPO: h of log-ratios (B, 2, T) whose tokens beyond the length of the shorter response count alpha."""
    tail = mask.cumsum(-1) > mask.sum(-1).amin(1)[:, None, None]
    a, c = torch.where(tail, alpha * ratio, ratio).sum(-1).unbind(1)
    return a - c


def loss(logps, ref_logps, batch, cfg):
    """The loss of cfg.variant on pairs, the preferred response first.

    logps, ref_logps (B, 2, T), 0 outside batch.mask; FREE do not read ref_logps, odpo reads batch.scores (B, 2) -> losses (B,), metrics.
    ValueError when a row is no pair, a response has no scored token, or odpo meets equal scores."""
    check_pairs(logps, batch)
    if (
        cfg.variant == "odpo"
        and logps.device.type == "cpu"
        and not (batch.scores[:, 0] > batch.scores[:, 1]).all()
    ):
        raise UserError(
            "odpo: the score of a preferred response is not above that of the rejected one"
        )
    ref_logps = logps if cfg.variant in FREE else ref_logps  # which is not read
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    lw, ll = logps.sum(-1).unbind(1)  # SUM over a response's tokens (B,)
    rw, rl = ref_logps.sum(-1).unbind(1)
    nw, nl = batch.mask.sum(-1).unbind(1)
    a, c = lw - rw, ll - rl  # log-ratios
    h, mean_h, mean_l = a - c, a / nw - c / nl, lw / nw - ll / nl
    beta, tau, epsilon, alpha, lam, gamma = (
        cfg.beta,
        cfg.tau,
        cfg.epsilon,
        cfg.alpha,
        cfg.lam,
        cfg.gamma,
    )
    log_s, s, exp = F.logsigmoid, torch.sigmoid, lambda x: x.clamp(max=80.0).exp()
    link = lambda x: (beta * (exp(x) + x)).clamp(-2 * gamma, 2 * gamma)  # noqa: E731 - chi-PO's, held at +-2 gamma
    losses = {
        "dpo": lambda: -log_s(beta * h),
        "ipo": lambda: (h - 1 / (2 * tau)).square(),
        "ipo_mean": lambda: (mean_h - 1 / (2 * tau)).square(),
        "npo": lambda: -2 / beta * log_s(-beta * c),
        "kto": lambda: kto(a, c, cfg),
        "bco": lambda: (
            -log_s(beta * (a - (a + c).detach().mean() / 2))
            - log_s(beta * ((a + c).detach().mean() / 2 - c))
        ),
        "nca": lambda: -log_s(beta * a) - 0.5 * log_s(-beta * a) - 0.5 * log_s(-beta * c),
        "cal_dpo": lambda: (
            -log_s(h) + 0.5 * ((a - 1 / (2 * beta)).square() + (c + 1 / (2 * beta)).square())
        ),
        "aot": lambda: -log_s(beta * ((lw - ll).sort()[0] - (rw - rl).sort()[0])),
        "rdpo": lambda: -log_s(beta * h) - epsilon / (1 - 2 * epsilon) * beta * h,
        "dr_dpo": lambda: (
            -tau * ((log_s(beta * h) / tau).logsumexp(0) - math.log(len(h))).expand(len(h))
        ),
        "odpo": lambda: -log_s(beta * h - alpha * (batch.scores[:, 0] - batch.scores[:, 1]).log()),
        "beta_dpo": lambda: (
            -log_s((beta + beta * alpha * (h.detach().mean() - gamma)).clamp(min=1e-3) * h)
        ),
        "alpha_dpo": lambda: -log_s(beta * (mean_l - gamma - alpha * standardised(mean_h))),
        "hinge": lambda: (1 - beta * h).clamp(min=0),
        "sppo": lambda: (a - 1 / (2 * beta)).square() + (c + 1 / (2 * beta)).square(),
        "simpo": lambda: -log_s(beta * (mean_l - gamma)),
        "cpo": lambda: -log_s(beta * (lw - ll)) - lam * lw / nw,
        "orpo": lambda: (
            -lw / nw
            - lam
            * log_s(
                mean_l
                - log1mexp((lw / nw).clamp(max=LARGEST))
                + log1mexp((ll / nl).clamp(max=LARGEST))
            )
        ),
        "simper": lambda: exp(ll / nl) - exp(lw / nw),
        "fkl": lambda: -log_s(beta * (exp(-c) - exp(-a))),
        "js": lambda: -log_s(beta * (log_s(a) - log_s(c))),
        "alpha_div": lambda: -log_s(beta / alpha * (exp(-alpha * c) - exp(-alpha * a))),
        "exo": lambda: (
            s(beta * h) * (log_s(beta * h) - math.log(1 - epsilon))
            + s(-beta * h) * (log_s(-beta * h) - math.log(epsilon))
        ),
        "chi_po": lambda: -log_s(link(a) - link(c)),
        "rrhf": lambda: (-mean_l).clamp(min=0) - lw / nw,
        "r_dpo": lambda: -log_s(beta * h + alpha * (nw - nl).to(h.dtype)),
        "ln_dpo": lambda: -log_s(beta * mean_h),
        "ld_dpo": lambda: -log_s(beta * beyond(logps - ref_logps, batch.mask, alpha)),
        "apo_zero": lambda: s(-beta * a) + s(beta * c),
        "apo_down": lambda: s(beta * a) + s(-beta * h),
        "dpop": lambda: -log_s(beta * (h - lam * (-a).clamp(min=0))),
        "cdpo": lambda: -log_s(beta * h) + epsilon * beta * h,
        "slic": lambda: (gamma - lw + ll).clamp(min=0) - lam * lw,
        "disco_pop": lambda: (
            s(beta * h / tau) * exp(-beta * h) - s(-beta * h / tau) * log_s(beta * h)
        ),
        "dpo_nll": lambda: -log_s(beta * h) - lam * lw / nw,
    }
    return losses[cfg.variant](), {}


def extremes(row):
    """The pair of a list's best and worst response, with their scores. ValueError for a tree of steps."""
    if any(parent >= 0 for parent in row.get("parents", ())):
        raise UserError(
            f"the responses to {row['prompt']!r} continue each other; a pair is of whole responses"
        )
    best, worst = (row["scores"].index(find(row["scores"])) for find in (max, min))
    return {"prompt": row["prompt"]} | {
        k: [row[k][best], row[k][worst]]
        for k in ("responses", "scores", "ends", "context")
        if k in row
    }


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=4 if cfg.variant == "odpo" else 2)
    if (
        cfg.variant == "odpo"
    ):  # it wants graded pairs: the best and the worst of four samples, with their scores
        data = lab.rows(extremes(row) for row in data if max(row["scores"]) > min(row["scores"]))
    gaps, lengths = (
        {row["scores"][0] - row["scores"][1] for row in data},
        {len(y) for row in data for y in row["responses"]},
    )
    if (cfg.variant == "odpo" and gaps <= {1}) or (
        cfg.variant in ("r_dpo", "ld_dpo") and len(lengths) == 1
    ):
        raise UserError(
            f"alpha does nothing under {cfg.variant} in {lab.world.name}: scores 1 apart, or responses of one length"
        )
    return lab.align(policy, data, loss, cfg, reference=None if cfg.variant in FREE else "start")


# ---------------------------------------------------------------- the claim


def on_tree(here, world, pairs, cfg, steps=150, lr=0.02):
    """A tree trained on all pairs (n, 2) at every step -> its exact curve; dw, dl: the changes of preferred and rejected log-probs."""
    policy, batch, index = world.model(), world.batch(pairs), world.index[pairs]
    before, truth = policy.scores(index).detach(), world.truth[0][pairs]
    batch.scores[:, 0] = (
        (truth[:, 0] - truth[:, 1]).abs().clamp(min=1e-6)
    )  # odpo's grades: how far apart, whichever is preferred

    @torch.no_grad()
    def watch(policy, step):
        change = (policy.scores(index) - before).sum(-1)
        right = (change[:, 0] - change[:, 1]) * (truth[:, 0] - truth[:, 1])
        means = {
            "accuracy": ((right > 0) + 0.5 * (right == 0)).double().mean(),
            "dw": change[:, 0].mean(),
            "dl": change[:, 1].mean(),
        }
        return world.exact(policy) | {name: value.item() for name, value in means.items()}

    here.fit(
        policy,
        [batch],
        lambda model, batch: loss(model.scores(index), before, batch, cfg),
        steps=steps,
        lr=lr,
        watch=watch,
    )
    return here.curve


def reward_at(curve, kl):
    """The reward where a curve first reaches a KL, by linear interpolation; nan where it never does."""
    for x, y in zip(curve, curve[1:]):
        if x["kl"] <= kl <= y["kl"]:
            return x["reward"] + (y["reward"] - x["reward"]) * (kl - x["kl"]) / max(
                y["kl"] - x["kl"], 1e-12
            )
    return math.nan


def ranked(exact, text, kl=0.5):
    """A table of {variant: [curve on the tree of a seed]} and {variant: [evaluation on text]}: means with half their 95 % interval."""
    names, shown = (
        ("reward", "kl", "length", "accuracy", "dw", "dl"),
        ("reward", "kl", "length", "chosen_logp"),
    )

    def cell(values):
        mean = sum(values) / len(values)
        half = f"+-{interval(values)[1] - mean:.3f}" if len(values) > 1 else ""
        return f"{mean:9.3f}{half:>8}" if math.isfinite(mean) else f"{'-':>17}"

    reached = {
        variant: [reward_at(curve, kl) for curve in curves] for variant, curves in exact.items()
    }
    head = [f"reward at {kl}", *names, *(f"text {n}" for n in shown)]
    lines = [f"{'variant':10}" + "".join(f"{name:>17}" for name in head)]
    for variant in sorted(
        exact, key=lambda v: sum(-x if math.isfinite(x) else math.inf for x in reached[v])
    ):
        cells = [reached[variant], *([curve[-1][n] for curve in exact[variant]] for n in names)]
        lines.append(
            f"{variant:10}"
            + "".join(map(cell, cells + [[run[n] for run in text[variant]] for n in shown]))
        )
    return "\n".join(lines)


def picture(path, exact, text, world):
    """Reward against KL: the paths on the tree, below the largest reward at that KL, and the ends on reviews (means over seeds)."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(15, 6), layout="constrained")
    left, right = fig.subplots(1, 2)
    best, names = (
        [world.exact(world.optimum(world.reference, 0.2 * 1.1**i)) for i in range(50)],
        ("kl", "reward"),
    )
    left.plot(*([x[n] for x in best] for n in names), "k--", label="largest")
    for i, variant in enumerate(exact):
        how = dict(color=f"C{i % 10}", label=variant)
        left.plot(
            *([x[n] for x in exact[variant][0]] for n in names),
            ls=("-", ":", "-.", "--")[i // 10],
            **how,
        )
        x, y = (sum(run[n] for run in text[variant]) / len(text[variant]) for n in names)
        right.plot(x, y, "osD^"[i // 10], **how)
    axes = dict(xlabel="KL from the reference (nats)", ylabel="true reward")
    left.set(title="tree, exact, one seed", xlim=(0, 3), **axes)
    right.set(title="reviews (some ends lie outside)", xlim=(0, 4), ylim=(-0.2, 0.8), **axes)
    right.legend(
        frameon=False, ncols=2, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    write_beside(path, lambda temporary: fig.savefig(temporary, format="png", dpi=110))


def reviewed(here):
    """Align on reviews by each variant, on the same pairs, the best and the worst of four samples -> {variant: its evaluation}."""
    data = here.rows(
        extremes(row)
        for row in here.preferences(here.base(), k=4)
        if max(row["scores"]) > min(row["scores"])
    )
    reference = {v: None if v in FREE else "start" for v in VARIANTS}
    return {
        v: here.evaluate(
            here.align(here.base(), data, loss, Config(v), reference[v], watch=lambda *_: {})
        )
        for v in VARIANTS
    }


def contests(here, world):
    """Where labels like length, are flipped, or are certain -> {name: (pairs, config, steps, lr)}."""
    long, fair = (world.drawn(20000, here.rng, length_bias=bias) for bias in (0.5, 0.0))
    flipped, certain = (
        world.drawn(2000, here.rng, flip=0.3),
        world.drawn(300, here.rng, sharpness=math.inf),
    )
    sides = {"long": (long, Config("dpo", 1.0)), "fair": (fair, Config("dpo", 1.0))}
    sides |= {f"long {a:+g}": (long, Config("r_dpo", 1.0, alpha=a)) for a in (1.0, -1.0)}
    sides |= {
        f"flips {v}": (flipped, Config(v, epsilon=e), 300, 0.05)
        for v, e in dict(dpo=None, cdpo=0.1, rdpo=0.3).items()
    }
    both = (Config("dpo", 1.0), Config("ipo", tau=1.0))
    return sides | {
        f"certain {cfg.variant} {steps}": (certain, cfg, steps)
        for cfg in both
        for steps in (50, 1600)
    }


def claim(lab):
    """On a tree, exact: some losses bury the preferred response (and do on reviews), others raise it; R-DPO with the labels' slope undoes
    their liking for length; certain labels drive DPO away without end; DiscoPOP as published lowers h, where its slope is positive.

    Not reproduced (tuning seeds 100 to 102). 30 % flips, 300 steps: rDPO ends at 0.813, 1.633, 0.833, DPO at 0.653, 1.669, 0.707, cDPO at
    0.389, 0.420, 1.005: it is a matter of when one stops, and at KL 0.5 they are one. Nor is the order of rewards there that on reviews
    (rank correlation 0.518, 0.324, 0.372). The bound of 0.15 on ten losses (0.103, 0.074, 0.103) fails on the reported seed 2: 0.166."""
    from scipy.stats import spearmanr

    claims, exact, ends, reviews = [], {name: [] for name in VARIANTS}, [], []
    for seed in lab.seeds:
        here, world = lab.at(seed=seed, world="tree", eval_every=10, clip=1e6), tree.World(seed)
        pairs = world.drawn(2000, here.rng)
        for name in VARIANTS:
            exact[name].append(on_tree(here, world, pairs, Config(name)))
        curves = {name: on_tree(here, world, *how) for name, how in contests(here, world).items()}
        curves |= {name: exact[name][-1] for name in VARIANTS}
        ends.append(
            {
                name: curve[-1] | {"reward at KL 0.5": reward_at(curve, 0.5)}
                for name, curve in curves.items()
            }
        )
        reviews.append(
            reviewed(
                lab.at(
                    seed=seed, world="reviews", steps=40, batch_size=16, eval_size=128, prompts=1024
                )
            )
        )
    text = {name: [run[name] for run in reviews] for name in reviews[0]}
    page = (
        ranked(exact, text)
        + "\n\n"
        + "\n".join(f"{branch}: {papers}" for branch, papers in TAXONOMY.items())
    )
    print(page)
    write_text(f"{lab.out}/survey.txt", page + "\n")
    picture(f"{lab.out}/survey.png", exact, text, tree.World(lab.seeds[0]))

    def say(what, metric, ours, baseline, **how):
        sides = [
            [x[side][metric] if isinstance(side, str) else side for x in ends]
            for side in (ours, baseline)
        ]
        claims.append(lab.compare(what, metric, *sides, **how))

    for name in ("dpo", "exo", "hinge", "kto"):
        say(f"{name}: the preferred log-prob falls", "dw", name, 0.0, margin=1.5, smaller=True)
    for name in ("sppo", "cal_dpo", "cpo", "orpo", "dpop"):
        say(f"{name}: it rises", "dw", name, 0.0, margin=0.05)
    say(
        "labels that like length: R-DPO with their slope has more reward than DPO",
        "reward",
        "long +1",
        "long",
        margin=0.1,
    )
    say("at equal KL, too", "reward at KL 0.5", "long +1", "long", margin=0.02)
    say("and is shorter", "length", "long +1", "long", margin=0.2, smaller=True)
    say(
        "with the other sign it has less reward than DPO",
        "reward",
        "long -1",
        "long",
        margin=0.1,
        smaller=True,
    )
    for name, metric in (("rdpo", "reward"), ("cdpo", "reward"), ("rdpo", "reward at KL 0.5")):
        say(
            f"30 % flips: {name} has more {metric} than dpo",
            metric,
            f"flips {name}",
            "flips dpo",
            expected=False,
        )
    say(
        "certain labels: the KL of DPO grows from step 50 to 1,600",
        "kl",
        "certain dpo 1600",
        "certain dpo 50",
        margin=2.0,
    )
    say("IPO's ends near where it was, at most 0.2", "kl", "certain ipo 1600", 0.2, smaller=True)
    say(
        "DiscoPOP turns the preferences round",
        "accuracy",
        "disco_pop",
        0.5,
        margin=0.2,
        smaller=True,
    )
    for i, x in enumerate(ends):
        some = [
            x[name]["reward at KL 0.5"]
            for name in "dpo cdpo ipo bco nca sppo cal_dpo exo simpo simper".split()
        ]
        pairs = dict(dw=[(x[v]["dw"], text[v][i]["chosen_logp"]) for v in VARIANTS])
        pairs["reward"] = [(x[v]["reward at KL 0.5"], text[v][i]["reward"]) for v in VARIANTS]
        x["band"] = {"width": max(some) - min(some)}
        x["ranks"] = {
            name: spearmanr(*zip(*both), nan_policy="omit").statistic
            for name, both in pairs.items()
        }
    say(
        "at KL 0.5 the rewards of ten smooth losses (not alpha-DPO) differ by less than 0.15",
        "width",
        "band",
        0.15,
        smaller=True,
    )
    say(
        "rank correlation of the preferred log-prob on the tree and on reviews: above 0.5",
        "dw",
        "ranks",
        0.5,
        margin=0.1,
    )
    say(
        "of the reward at KL 0.5 and that on reviews: above 0.5",
        "reward",
        "ranks",
        0.5,
        expected=False,
    )
    return claims
