"""DA-DPO - Cost-efficient Difficulty-aware Preference Optimization for Reducing MLLM Hallucinations (2026), arXiv:2601.00623

Most pairs of multimodal preference data are easy: the rejected answer is plainly wrong. DPO goes on raising their margin, and fine-grained
pairs hardly move. DA-DPO asks two frozen estimators how far apart the responses of a pair are, a contrastive one (CLIP, which compares an
image with a text) and a generative one (a model's log-probs), lets them vote, and gives the pair a beta of its own: a larger gap, an easier
pair, a larger beta, so that its margin saturates earlier. Nothing is trained for that, and the betas never change.

    g_i  = a_c Phi( (c_i - mean c) / std c ) + a_m Phi( (m_i - mean m) / std m ),     c, m the estimators' gaps, chosen minus rejected
    loss = -log sigmoid( beta_i Delta_i ),   beta_i = beta alpha (1 + reach g_i),   Delta_i = the difference of the two log-ratios

with a_c + a_m = 1 as often as either ranks a pair rightly. A slope is beta_i sigmoid(-beta_i Delta): an easy pair is pulled MORE than under
DPO at first and less only beyond beta Delta = 0.8814 (g = 1). The mean of beta_i is over beta, which by itself changes much: `matched`
divides alpha by the mean of 1 + reach g, and a comparison with DPO wants it.

What this file does differently from the paper: the script that makes its difficulties is not published. 1. The Gaussian normaliser and the
voting are a reading; `gap` offers the released loss's too, the difference of two normalised scores a pair, absolute (a label that the
estimators contradict counts as easy) or signed (as hard). 2. The generative estimator is the reference, summed over tokens. 3. In a world
without `similarity` the contrastive one is log p(y | its prompt) - log p(y | another's). 4. reach is 1 in the paper.
"""

from dataclasses import dataclass, replace
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import UserError

FAMILY, KINDS = "pairs", ("text",)
UNUSED = ("k",)  # run settings that leave no choice here
DEFAULTS = dict(world="captions")


@dataclass
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    alpha: float = 1.0  # scale of all betas (db_alpha of the code)
    reach: float = 1.0  # how much larger the beta of the easiest pair is
    gap: str = "normalised"  # normalised gaps of the estimators; absolute or signed: differences of normalised scores (the code: absolute)
    contrastive: float | None = (
        None  # the contrastive estimator's vote a_c; default: as often as it is right, against the other
    )
    matched: bool = False  # divide alpha by the mean of 1 + reach g over the pairs, so that the mean beta is that of DPO

    def __post_init__(self):
        for name in ("beta", "alpha", "reach"):
            if not 0 < getattr(self, name) < float("inf"):
                raise UserError(f"{name} = {getattr(self, name)} must be positive and finite")
        if self.gap not in ("normalised", "absolute", "signed"):
            raise UserError(f"gap = {self.gap} must be one of normalised, absolute, signed")
        if self.gap == "signed" and self.reach > 1:
            raise UserError(
                f"reach = {self.reach} must be at most 1 where the gap is signed: a beta would be negative"
            )
        if self.contrastive is not None and not 0 <= self.contrastive <= 1:
            raise UserError(f"contrastive = {self.contrastive} must be between 0 and 1")


def check_pairs(logps, batch):
    """ValueError unless every row is a pair of responses with something to score."""
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise UserError(
            f"log-probs of shape {tuple(logps.shape)}: pairs are (B, 2, T), the preferred response first"
        )
    # on CUDA the question would make the device wait; there the data were looked at when they were read
    if logps.device.type == "cpu" and not batch.mask.any(-1).all():
        raise UserError("a response has no scored token")


def pair_beta(batch, cfg):
    """beta_i (B,), without gradient, from the normalised scores of the column `quality` (B, 2). ValueError unless they are in [0, 1]."""
    quality = batch.quality.detach()
    if quality.device.type == "cpu" and not ((quality >= 0) & (quality <= 1)).all():
        raise UserError("the column quality must hold normalised scores, between 0 and 1")
    gap = quality[:, 0] - quality[:, 1]
    return cfg.beta * cfg.alpha * (1 + cfg.reach * (gap if cfg.gap == "signed" else gap.abs()))


def loss(logps, ref_logps, batch, cfg):
    """DA-DPO's loss on pairs, the preferred response first, with the estimators' normalised scores in the column `quality` (B, 2).

    logps, ref_logps (B, 2, T), 0 outside batch.mask (B, 2, T) -> losses (B,) in nats, metrics. ValueError when a row is no pair, a response
    has no scored token, or a score is out of [0, 1]."""
    check_pairs(logps, batch)
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    chosen, rejected = (
        (logps - ref_logps).sum(-1).unbind(1)
    )  # log-ratios (B,): SUM over a response's tokens, not mean
    delta = chosen - rejected
    beta = pair_beta(batch, cfg).to(delta.dtype)
    z = beta * delta  # the margin of the implicit reward, with the pair's own beta
    losses = -F.logsigmoid(z)
    return losses, {"weight": torch.sigmoid(-z).detach().mean(), "pair_beta": beta.mean()}


def normalised(values):
    """Phi((v - mean) / std) of values of any shape, in (0, 1), by a Gaussian fitted to all of them; 1/2 where they are all alike."""
    spread = values.std(correction=0)
    if not spread > 1e-12 * (1 + values.abs().max()):
        return torch.full_like(values, 0.5)
    return torch.special.ndtr((values - values.mean()) / spread)


def share_right(scores):
    """The share of pairs that an estimator's scores (N, 2) rank as the labels do, ties half."""
    return (torch.sign(scores[:, 0] - scores[:, 1]) / 2 + 0.5).mean().item()


def vote(contrastive, generative, cfg):
    """The column `quality` (N, 2) from the two estimators' scores of N pairs, (N, 2) float64 each. ValueError for a score that is none."""
    for name, scores in dict(contrastive=contrastive, generative=generative).items():
        if not scores.isfinite().all():
            raise UserError(f"the {name} estimator has no finite score for some response")
    right = [share_right(scores) for scores in (contrastive, generative)]
    share = (
        cfg.contrastive
        if cfg.contrastive is not None
        else right[0] / sum(right)
        if sum(right)
        else 0.5
    )
    both = [normalised(x) for x in (contrastive, generative)]
    if cfg.gap == "normalised":  # the gap itself, against 0
        both = [F.pad(normalised(x[:, :1] - x[:, 1:]), (0, 1)) for x in (contrastive, generative)]
    return share * both[0] + (1 - share) * both[1]


def estimates(lab, model, rows):
    """(contrastive, generative) scores (N, 2) of all responses of N pairs by frozen estimators."""

    def total(rows):
        return torch.tensor(
            [[sum(tokens) for tokens in row] for row in lab.logps(model, rows)], dtype=torch.float64
        )

    generative = total(rows)
    if "similarity" in lab.world.proxies:
        flat = [
            (lab.text(row["prompt"]), lab.text(response))
            for row in rows
            for response in row["responses"]
        ]
        return lab.world.proxies["similarity"](*zip(*flat)).view(-1, 2), generative
    keep = ("responses", "ends", "context")
    others = [
        {name: row[name] for name in keep if name in row} | {"prompt": rows[i - 1]["prompt"]}
        for i, row in enumerate(rows)
    ]
    return generative - total(lab.rows(others)), generative


def run(lab, cfg):
    policy = lab.base()
    data = lab.preferences(policy, k=2)
    quality = vote(*estimates(lab, policy, data), cfg)  # once, then frozen
    data = [row | {"quality": pair} for row, pair in zip(data, quality.tolist())]
    return lab.align(policy, data, loss, balanced(cfg, quality))


def balanced(cfg, quality):
    """The Config whose mean beta over these pairs is beta alpha, where `matched` asks for it."""
    if not cfg.matched:
        return cfg
    mean = pair_beta(SimpleNamespace(quality=quality), cfg).mean().item()
    return replace(cfg, alpha=cfg.alpha * cfg.beta * cfg.alpha / mean)


# ---------------------------------------------------------------- the claim


def attributes(seed, count=800):
    """60 pictures of four attributes with six values, seen through noise; each pair is the truth and a description that is wrong in all
    four (easy) or in one (hard), and two noisy estimators count the wrong ones on scales of their own.
    -> features (60, 24), truth (60, 4), picture (count,), pairs (count, 2, 4), easy (count,), the estimators' scores (count, 2)."""
    rng = torch.Generator().manual_seed(seed)
    truth = torch.randint(6, (60, 4), generator=rng)
    features = F.one_hot(truth, 6).flatten(1) + 0.7 * torch.randn(60, 24, generator=rng)
    picture, easy = (
        torch.randint(60, (count,), generator=rng),
        torch.rand(count, generator=rng) < 0.5,
    )
    wrong = easy[:, None] | (torch.arange(4) == torch.randint(4, (count, 1), generator=rng))
    other = (truth[picture] + wrong * torch.randint(1, 6, (count, 4), generator=rng)) % 6
    n, noise = wrong.sum(1, dtype=torch.float64), torch.randn(2, count, generator=rng)
    scores = [
        F.pad(gap[:, None], (0, 1)) for gap in (0.03 * n + 0.009 * noise[0], 5 * n + 2.4 * noise[1])
    ]
    return features, truth, picture, torch.stack([truth[picture], other], 1), easy, scores


def on_attributes(seed, contest, steps=400):
    """Train a linear softmax by each (Config, change of the column `quality`) -> {name: {"gap": the mean over training of Delta on easy
    pairs minus hard ones, in nats, "hard": Delta of hard pairs as a share of that of easy ones in the end}}."""
    features, truth, picture, pairs, easy, scores = attributes(seed)
    weights = torch.zeros(24, 24, requires_grad=True)

    def logps(rows):
        log_probs = (features @ weights).view(60, 1, 4, 6).log_softmax(-1)
        return (
            log_probs[picture[rows]]
            .expand(-1, 2, -1, -1)
            .gather(-1, pairs[rows][..., None])[..., 0]
        )

    everything, found = torch.arange(len(pairs)), {}
    optimizer = torch.optim.Adam([weights], lr=0.02)
    for _ in range(60):  # the supervised stage
        optimizer.zero_grad()
        F.cross_entropy((features @ weights).view(240, 6), truth.flatten()).backward()
        optimizer.step()
    start, ref_logps, mask = (
        weights.detach().clone(),
        logps(everything).detach(),
        torch.ones(len(pairs), 2, 4, dtype=torch.bool),
    )
    for name, (cfg, change) in contest.items():
        quality = change(vote(*scores, cfg))
        cfg, rng, gaps = balanced(cfg, quality), torch.Generator().manual_seed(seed), []
        with torch.no_grad():
            weights.copy_(start)
        optimizer = torch.optim.Adam([weights], lr=0.02)
        for step in range(steps):
            rows = torch.randint(len(pairs), (64,), generator=rng)
            optimizer.zero_grad()
            batch = SimpleNamespace(mask=mask[rows], quality=quality[rows])
            loss(logps(rows), ref_logps[rows], batch, cfg)[0].mean().backward()
            optimizer.step()
            if step % 10 == 9:
                delta = (logps(everything) - ref_logps).detach().sum(-1) @ torch.tensor([1.0, -1.0])
                gaps.append((delta[easy].mean() - delta[~easy].mean()).item())
        found[name] = {
            "gap": sum(gaps) / len(gaps),
            "hard": (delta[~easy].mean() / delta[easy].mean()).item(),
        }
    return found


def shuffled(quality):
    """The same difficulties, given to other pairs."""
    return quality[torch.randperm(len(quality), generator=torch.Generator().manual_seed(0))]


def turned(quality):
    """Easy for hard."""
    return torch.stack([1 - quality[:, 0], quality[:, 1]], 1)


def on_captions(here, contest):
    """Align by each (Config, change of the column `quality`) on the same pairs -> {name: its evaluation}; "start" is the model
    before."""
    data = here.preferences(here.base(), k=2)
    scores = estimates(here, here.base(), data)
    found = {"start": here.evaluate(here.base())}
    for name, (cfg, change) in contest.items():
        quality = change(vote(*scores, cfg))
        rows = [row | {"quality": pair} for row, pair in zip(data, quality.tolist())]
        found[name] = here.evaluate(
            here.align(
                here.base(), rows, loss, balanced(cfg, quality), watch=lambda policy, step: {}
            )
        )
    return found


def claim(lab):
    """At one mean beta DA-DPO ends with a narrower gap between easy and hard pairs than DPO, than the same betas on other pairs, and than
    the wrong way round (attributes); an easy pair is pulled more before beta Delta = 0.8814 and less beyond (exact).

    On captions, where hallucinations are counted, DPO and DA-DPO both lose some of the 0.71 captions that have one. That DA-DPO loses more
    is not claimed: tuning seeds 100 to 102 at one mean beta of 0.15, 64 steps, lr 3e-4 gave 0.479, 0.518, 0.539 (DPO 0.498, 0.541, 0.561,
    its betas on other pairs 0.514, 0.535, 0.564), but on 100 and 101 at KLs of 0.87, 0.80 (DPO 0.70, 0.71): its easy pairs are pulled more
    at first. 100 steps at lr 7e-4 on 2,048 pairs gave KLs of 3.5 to 7.1 and rewards below 0."""
    claims = []

    def pull(gap, delta):
        z = torch.tensor([[[delta], [0.0]]], dtype=torch.float64, requires_grad=True)
        batch = SimpleNamespace(
            mask=torch.ones(1, 2, 1, dtype=torch.bool),
            quality=torch.tensor([[gap, 0.0]], dtype=torch.float64),
        )
        return torch.autograd.grad(loss(z, torch.zeros_like(z), batch, Config())[0].sum(), z)[0][
            0, 1
        ].item()

    for delta, ratio in ((0.0, 2.0), (8.8137, 1.0), (20.0, 0.3018)):
        text = f"pull on an easy pair (g = 1) by that of DPO at Delta {delta}"
        claims.append(lab.exact(text, pull(1.0, delta) / pull(0.0, delta), ratio, 1e-3))
    changes = {
        "DA-DPO": torch.clone,
        "DPO": torch.zeros_like,
        "its betas on other pairs": shuffled,
        "easy for hard": turned,
    }
    for reach in (1.0, 4.0):
        contest = {
            name: (Config(0.15, reach=reach, matched=True), change)
            for name, change in changes.items()
        }
        runs = [on_attributes(seed, contest) for seed in lab.seeds]
        for ours, other in (
            ("DA-DPO", "DPO"),
            ("DA-DPO", "its betas on other pairs"),
            ("DPO", "easy for hard"),
        ):
            sides = [[found[name]["gap"] for found in runs] for name in (ours, other)]
            claims.append(
                lab.compare(
                    f"attributes, reach {reach:g}: {ours} against {other}",
                    "gap",
                    *sides,
                    margin=0.3,
                    smaller=True,
                )
            )
        sides = [[found[name]["hard"] for found in runs] for name in ("DA-DPO", "DPO")]
        claims.append(lab.compare("and a larger share for the hard pairs", "hard", *sides))
    contest = {
        name: (Config(0.15, matched=True), changes[name])
        for name in ("DA-DPO", "DPO", "its betas on other pairs")
    }
    runs = [
        on_captions(lab.at(world="captions", seed=seed, steps=64, eval_size=512), contest)
        for seed in lab.seeds
    ]

    def contrast(text, metric, ours, baseline, **how):
        sides = [[found[name][metric] for found in runs] for name in (ours, baseline)]
        claims.append(lab.compare(f"captions: {text}", metric, *sides, **how))

    contrast(
        "DPO writes fewer captions with a hallucination than the model before",
        "chair_s",
        "DPO",
        "start",
        margin=0.02,
        smaller=True,
    )
    contrast("so does DA-DPO", "chair_s", "DA-DPO", "start", margin=0.02, smaller=True)
    contrast("and fewer than DPO", "chair_s", "DA-DPO", "DPO", expected=False, smaller=True)
    contrast(
        "and fewer than with its betas on other pairs",
        "chair_s",
        "DA-DPO",
        "its betas on other pairs",
        expected=False,
        smaller=True,
    )
    contrast("DA-DPO has more true reward than DPO", "reward", "DA-DPO", "DPO", expected=False)
    contrast("and orders held-out pairs better", "accuracy", "DA-DPO", "DPO", expected=False)
    return claims
