"""3D-Properties - Identifying Challenges in DPO and Charting a Path Forward (2024), arXiv:2406.07327

Seen as a function of the two likelihoods, DPO's loss is log(1 + a z^beta) with z = pi_l / pi_w and a constant a of the reference. Three
things follow. The rejected likelihood Drops drastically: |dL/dpi_l| / |dL/dpi_w| = pi_w / pi_l, without bound. As it does, the slope in
pi_w goes to 0 where pi_w stays, and all that is left is the suppression of a response, a Degradation. And where the two share features the
preferred one falls with the rejected one, so that the mass is Dispersed to responses that no pair has shown. All of it is milder when the
rejected response was likely, as one's own samples are. Both remedies slow the fall of the rejected likelihood:

    flex:  loss = -log sigmoid( beta (log pi(y_w) - log pi_ref(y_w)) - beta_rejected (log pi(y_l) - log pi_ref(y_l)) )      (B.2.1)
    sft:   loss = -log sigmoid( beta [ the same difference, one beta ] ) - gamma log pi(y_w)                                 (eq. 7)

flex is DPO and a push (beta - beta_rejected) on log pi_w that ends as the margin grows; that of sft never ends. The explosion is one in the
likelihoods: in log-probs, and in what reaches the parameters, the two sides of DPO are equal (B.1).

What this file does differently from the paper: 1. the supervised term has the sign of the text and of its gradient, eq. 7 prints the other
one; 2. means over a batch for sums; 3. gamma and the toy's width, learning rate and optimizer are not in the paper; 4. `--init OUT` looks
at a finished run of any method: how far the log-probs of pairs moved from where it began (see evaluate). With --steps it trains from there.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import UserError

FAMILY, KINDS = "pairs", ("text", "table")  # minus a noise error is no likelihood
UNUSED = ("k",)  # run settings that leave no choice here
DEFAULTS = dict(world="reviews")


@dataclass
class Config:
    variant: str = (
        "flex"  # flex, a smaller beta on the rejected side; sft, DPO and fine-tuning; dpo
    )
    beta: float = (
        0.1  # strength of the pull to the reference, in flex of the preferred side (beta+)
    )
    beta_rejected: float | None = (
        None  # flex: that of the rejected side (beta-), 0.05; 0.08 in the paper's tables
    )
    gamma: float | None = None  # sft: weight of the supervised term, a sum over tokens, 0.02

    def __post_init__(self):
        if self.variant not in ("flex", "sft", "dpo"):
            raise UserError(f"variant = {self.variant} must be one of flex, sft, dpo")
        if not 0 < self.beta < float("inf"):
            raise UserError(f"beta = {self.beta} must be positive and finite")
        own = dict(
            beta_rejected=("flex", 0.5 * self.beta, self.beta), gamma=("sft", 0.02, 0.0)
        )  # whose it is, its default, without it
        for name, (variant, default, without) in own.items():
            value, expected = getattr(self, name), without if self.variant != variant else default
            if self.variant != variant and value not in (None, without):
                raise UserError(
                    f"{name} = {value} is a field of variant = {variant}, not of {self.variant}"
                )
            setattr(self, name, expected if value is None else value)
            if not 0 <= getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {value} must be 0 or more and finite")


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
    """DPO's loss on pairs, the preferred response first, with a beta for each side and a supervised term.

    logps, ref_logps (B, 2, T), 0 outside batch.mask (B, 2, T) -> losses (B,) in nats, metrics. ValueError when a row is no pair or a
    response has no scored token."""
    check_pairs(logps, batch)
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    chosen, rejected = (
        (logps - ref_logps).sum(-1).unbind(1)
    )  # log-ratios (B,): SUM over a response's tokens, not mean
    z = cfg.beta * chosen - cfg.beta_rejected * rejected
    losses = -F.logsigmoid(z) - cfg.gamma * logps.sum(-1)[:, 0]  # B.2.1, eq. 7
    ratios = {"chosen_ratio": chosen.detach().mean(), "rejected_ratio": rejected.detach().mean()}
    return losses, {"weight": torch.sigmoid(-z).detach().mean()} | ratios


def run(lab, cfg):
    if lab.settings.init and not lab.settings.steps:
        if cfg != Config():
            raise UserError(
                f"{', '.join(vars(cfg))} do nothing where --init {lab.settings.init} is looked at; --steps trains from it"
            )
        return finished(lab)
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    return lab.align(policy, data, loss, cfg)


# ---------------------------------------------------------------- the diagnostic


def finished(lab):
    """The model of --init, the folder of a run; lab.reference becomes the model which the run began with, lab.steps 0. ValueError when
    there is no run.json, or the run was made in another world."""
    policy, folder, path = lab.base(), lab.settings.init, Path(lab.settings.init, "run.json")
    if not path.exists():
        raise UserError(
            f"--init {folder} has no run.json, so where it began is not known; --steps trains from it"
        )
    settings = json.loads(path.read_text(encoding="utf-8"))["settings"]
    for name, default in dict(world="reviews", data=None).items():
        two = [settings[name] or default, getattr(lab.settings, name) or default]
        if len({os.path.abspath(x) if x and os.path.exists(x) else x for x in two}) > 1:
            raise UserError(f"{folder} is a run with --{name} {two[0]}, not {two[1]}")
    lab.reference = lab.at(
        **{
            name: settings[name]
            for name in ("init", "base_seed", "base_steps", "context", "truncate")
        }
    ).base()
    lab.steps = 0
    lab.quiet or print(f"a look at {folder}: nothing is trained")
    return policy


def evaluate(lab, model):
    """The Lab's evaluation, and the three properties on pairs of samples of lab.reference (with --data: pairs of the file), in nats:
    `chosen_ratio` and `rejected_ratio`, by how much a response's log-prob rose, `both_fell`, the share of pairs where neither rose, and
    `own_ratio`, the same of the model's own samples: where the mass went, an estimate of the KL."""
    out = lab.evaluate(model)
    rows = lab.preferences(lab.reference, k=2, n=lab.settings.eval_size)
    ratio = log_ratios(lab, model, rows)
    out |= {"chosen_ratio": ratio[:, 0].mean().item(), "rejected_ratio": ratio[:, 1].mean().item()}
    fresh = lab.rows(lab.sample(model, [row["prompt"] for row in rows], 1))
    return out | {
        "both_fell": (ratio < 0).all(1).double().mean().item(),
        "own_ratio": log_ratios(lab, model, fresh).mean().item(),
    }


def log_ratios(lab, model, rows):
    """log pi(y) - log pi_ref(y) of all responses of rows with one K (rows, K), float64."""
    ours, theirs = (
        [[sum(tokens) for tokens in row] for row in lab.logps(m, rows)]
        for m in (model, lab.reference)
    )
    return torch.tensor(ours, dtype=torch.float64) - torch.tensor(theirs, dtype=torch.float64)


# ---------------------------------------------------------------- the claim


def likelihood_slopes(logps, ref_logps, cfg):
    """log |dL/dpi| of the preferred and the rejected response, from their log-probs (..., 2), in log space: nothing over- or underflows."""
    ratio = logps - ref_logps
    pull = F.logsigmoid(
        cfg.beta_rejected * ratio[..., 1] - cfg.beta * ratio[..., 0]
    )  # log sigmoid(-z)
    chosen = torch.logaddexp(math.log(cfg.beta) + pull, logps.new_tensor(cfg.gamma).log())
    return torch.stack([chosen, logps.new_tensor(cfg.beta_rejected).log() + pull], -1) - logps


def embedded(cfg, rho=0.9, start=(0.45, 0.45, 0.10), steps=2000):
    """One prompt and three responses (preferred, rejected, in no pair) with fixed features and a trained state h, from h = 0 by gradient
    descent -> log-probs (steps + 1, 3). rho: cosine of the pair's features; the third lies where an update of DPO points."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    features = torch.stack([chosen, rejected, F.normalize(chosen - rejected, dim=0)])
    reference, h, path = (
        torch.tensor(start, dtype=torch.float64).log(),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
        [],
    )
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    for _ in range(steps + 1):
        logps = (features @ h + reference).log_softmax(0)
        path.append(logps.detach())
        (slope,) = torch.autograd.grad(
            loss(logps[:2].view(1, 2, 1), reference[:2].view(1, 2, 1), batch, cfg)[0].sum(), h
        )
        h = (h - slope).detach().requires_grad_()
    return torch.stack(path)


def networks(cfg, scenario, seed, count=8, steps=500, width=32):
    """The paper's toy (sec. 3.2), `count` networks at once: 4 prompts and 10 responses, of which i is preferred for prompt i, one of 4 to 7
    is rejected and 8 and 9 are in no pair; three layers, fitted to the scenario's likelihoods, then trained by the loss.
    -> log-probs (steps + 1, count, 4 prompts, 4) of the preferred, the rejected, all other responses, and 8 and 9."""
    rng = torch.Generator().manual_seed(seed)
    high, low = {1: (0.12, 0.12), 2: (0.02, 0.12), 3: (0.12, 0.02), 4: (0.02, 0.02)}[
        scenario
    ]  # of a preferred, of a rejected response
    wanted = torch.tensor([high] * 4 + [low] * 4 + [(1 - 4 * high - 4 * low) / 2] * 2)
    sizes = [4, width, width, 10]
    weights = [
        (torch.randn(count, a, b, generator=rng) * (2 / a) ** 0.5).requires_grad_()
        for a, b in zip(sizes, sizes[1:])
    ]
    weights += [torch.zeros(count, 1, b, requires_grad=True) for b in sizes[1:]]
    pair = torch.stack(
        [torch.arange(4).expand(count, 4), torch.randint(4, 8, (count, 4), generator=rng)], -1
    )  # (count, 4, 2)
    batch, path = SimpleNamespace(mask=torch.ones(4 * count, 2, 1, dtype=torch.bool)), []

    def log_probs():  # of the 4 prompts, one-hot vectors
        return (
            ((weights[0] + weights[3]).relu() @ weights[1] + weights[4]).relu() @ weights[2]
            + weights[5]
        ).log_softmax(-1)

    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (wanted * (wanted.log() - log_probs())).sum().backward()
        optimizer.step()
    reference, optimizer = (
        log_probs().detach().gather(-1, pair).view(-1, 2, 1),
        torch.optim.Adam(weights, lr=1e-2),
    )
    for _ in range(steps + 1):
        found = log_probs()
        kept = found.gather(-1, pair)
        with torch.no_grad():
            path.append(
                torch.cat(
                    [
                        kept,
                        found.scatter(-1, pair, -torch.inf).logsumexp(-1, True),
                        found[..., 8:].logsumexp(-1, True),
                    ],
                    -1,
                )
            )
        optimizer.zero_grad()
        loss(kept.view(-1, 2, 1), reference, batch, cfg)[0].view(count, 4).mean(1).sum().backward()
        optimizer.step()
    return torch.stack(path)


def own_and_hotter(here, contest):
    """Align on pairs of own samples ("own"), or on the same preferred responses with rejected ones of a hotter model ("hot")
    -> {name: its last look, with the log-ratios of 256 of its pairs, and its `curve` (sft: none)}."""
    own, hotter, hot, found = here.preferences(here.base(), k=2), here.at(temperature=1.5), [], {}
    for row, other in zip(own, hotter.sample(hotter.base(), [row["prompt"] for row in own], 1)):
        responses, ends = ([row[name][0], other[name][0]] for name in ("responses", "ends"))
        hot.append(dict(prompt=row["prompt"], responses=responses, ends=ends, scores=[1.0, 0.0]))
    pairs = dict(own=own, hot=here.rows(hot))
    for name, (which, cfg) in contest.items():
        watch = (lambda policy, step: {}) if cfg.variant == "sft" else None
        ratio = (
            log_ratios(
                here,
                here.align(here.base(), pairs[which], loss, cfg, watch=watch),
                pairs[which][:256],
            )
            .mean(0)
            .tolist()
        )
        found[name] = here.curve[-1] | {
            "curve": here.curve,
            "chosen_ratio": ratio[0],
            "rejected_ratio": ratio[1],
        }
    return found


def claim(lab):
    """In the embedding toy DPO's preferred response peaks and is lost to one that no pair holds; both remedies keep it (exact). In the
    paper's toy it peaks and falls, hardly so with the remedies. On reviews DPO lowers the preferred log-probs too, far more so when a
    hotter model wrote the rejected responses, which costs reward at one KL. There flex ends with more reward only as its KL is smaller: at
    1.09 both have 0.135 (mean of seeds 100, 101). On own samples it has more at one KL (0.48, seeds 100 to 102: 0.29, 0.20, 0.24, DPO
    0.10, 0.14, 0.07), after equal steps, 60, not reliably: DPO 0.29, 0.43, 0.12 at three to six times the KL.

    Not reproduced: in the paper's toy the mass goes to responses 8 and 9, here those fall from 0.04 to 0 (seeds 100, 101) and it goes to
    the ones preferred for other prompts; scenario 1 ends above 3 on 5 of the seeds 100 to 107 (means of 0.35 and 0.31)."""
    claims, plain = [], embedded(Config("dpo"))

    def toy(text, path, target, what=0):
        claims.append(lab.exact(f"embedding toy, {text}", path[what].exp().item(), target, 1e-3))

    toy("DPO: the preferred likelihood at its peak", plain.amax(0), 0.473)
    toy("and in the end", plain[-1], 0.0)
    toy("that of the response in no pair", plain[-1], 1.0, 2)
    for cfg, end in (
        (Config("flex", 0.1, 0.05), 0.773),
        (Config("flex", 0.1, 0.02), 0.904),
        (Config("sft", gamma=0.2), 0.969),
    ):
        toy(
            f"{cfg.variant}, beta_rejected {cfg.beta_rejected}, gamma {cfg.gamma}: the preferred one in the end",
            embedded(cfg)[-1],
            end,
        )
    away = embedded(Config("dpo"), rho=-0.5)
    toy("DPO, a pair that shares less (rho -0.5)", away[-1], 0.165)
    slopes = likelihood_slopes(away[:, :2], away[0, :2], Config("dpo"))
    toy("the slope in its preferred likelihood at first", slopes[0], 0.1111)
    toy("and in the end", slopes[-1], 0.0105)
    claims.append(
        lab.compare(
            "that in the rejected likelihood explodes",
            "log slope",
            slopes[-1:, 1],
            slopes[:1, 1],
            margin=10.0,
        )
    )

    contest = dict(
        dpo=(Config("dpo"), 1),
        flex=(Config("flex", 0.1, 0.02), 1),
        sft=(Config("sft"), 1),
        third=(Config("dpo"), 3),
    )
    paths = {
        name: [networks(*how, seed).exp().mean((1, 2)) for seed in lab.seeds]
        for name, how in contest.items()
    }

    def likelihood(name, when=-1, what=0):
        return [
            (path[:, what].max() if when == "peak" else path[when, what]).item()
            for path in paths[name]
        ]

    def compare(text, ours, baseline, **how):
        claims.append(lab.compare(f"the paper's toy: {text}", "likelihood", ours, baseline, **how))

    compare(
        "DPO's preferred likelihood ends below its peak",
        likelihood("dpo"),
        likelihood("dpo", "peak"),
        margin=0.1,
        smaller=True,
    )
    compare("flex ends above DPO", likelihood("flex"), likelihood("dpo"), margin=0.1)
    compare("so does sft", likelihood("sft"), likelihood("dpo"), margin=0.1)
    compare(
        "scenario 1 ends above 3, whose rejected responses are unlikely",
        likelihood("dpo"),
        likelihood("third"),
        expected=False,
    )
    compare(
        "responses 8 and 9 rise", likelihood("dpo", -1, 3), likelihood("dpo", 0, 3), expected=False
    )

    contest = {
        f"{cfg.variant} {which}": (which, cfg)
        for which in ("own", "hot")
        for cfg in (Config("dpo"), Config("flex"))
    }
    contest["sft own"] = ("own", Config("sft", gamma=0.05))
    runs = [
        own_and_hotter(
            lab.at(seed=seed, steps=60, prompts=2048, eval_size=1024, eval_every=20), contest
        )
        for seed in lab.seeds
    ]

    def contrast(text, metric, ours, baseline, **how):
        sides = [
            [
                found[name]["curve" if how.get("at_kl") else metric] if name else 0.0
                for found in runs
            ]
            for name in (ours, baseline)
        ]
        claims.append(lab.compare(f"reviews: {text}", metric, *sides, **how))

    contrast(
        "DPO lowers the preferred log-prob",
        "chosen_ratio",
        "dpo own",
        None,
        margin=0.3,
        smaller=True,
    )
    contrast(
        "and the rejected one, by far more",
        "rejected_ratio",
        "dpo own",
        None,
        margin=1.5,
        smaller=True,
    )
    contrast(
        "if a hotter model wrote the rejected ones, the preferred fall further",
        "chosen_ratio",
        "dpo hot",
        "dpo own",
        smaller=True,
    )
    contrast(
        "and there is less true reward",
        "reward",
        "dpo hot",
        "dpo own",
        margin=0.05,
        smaller=True,
        at_kl="shared",
    )
    contrast("flex holds the preferred log-prob", "chosen_ratio", "flex own", "dpo own", margin=0.3)
    contrast("sft raises it", "chosen_ratio", "sft own", None, margin=0.05)
    for which, at_kl, expected in (
        ("own", "shared", True),
        ("own", None, False),
        ("hot", "shared", False),
        ("hot", None, True),
    ):
        text, how = (
            "" if at_kl else ", equal steps",
            dict(margin=0.02, expected=expected, at_kl=at_kl),
        )
        contrast(
            f"{which}: flex has more reward than DPO{text}",
            "reward",
            f"flex {which}",
            f"dpo {which}",
            **how,
        )
    return claims
