"""DDO - Your Likelihood-Based Visual Generative Model is Secretly a GAN Discriminator (2025), arXiv:2503.01103

Maximum likelihood with too small a model, or on flawed data, covers every mode and spills mass between them. A GAN's discriminator would
see the difference; against samples of p_ref its optimum is sigmoid(log p_data / p_ref). Direct Discriminative Optimization writes it as
sigmoid(log p / p_ref) with the likelihood model p itself: to train the discriminator is to train the model, without a second network. There
are no preferences: real data are told from the reference's own samples, each in its own sigmoid, and the best model is the next reference.

    r(x) = log p(x) - log p_ref(x)
    loss = -log sigmoid( beta r(real) ) - alpha log sigmoid( -beta r(own sample) )                            (eq. 13)

The optimum for alpha = beta = 1 is the data (theorem 3.1); beta < 1 goes beyond it, p_ref^(1 - 1/beta) p_data^(1/beta), at the one alpha
that normalises it (theorem 3.3). On images log p is minus the weighted noise error at one draw of noise (eq. 14-16).

What this file does differently from the paper: 1. A real response and a sample for the same prompt or class make a row, and share their
draw of noise. 2. Models have no classifier-free guidance, so there are no rows without a label (the paper sets alpha = 0 there). 3. No
averaging of weights. 4. alpha and beta are the same in all rounds. 5. Which round is best is asked once a round, by the Frechet distance
to the data in worlds that have one; elsewhere the last round counts. A base model without a flaw gains nothing here (see claim).
"""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import Batch, UserError
from diffusion import to_sigma
from toy import bandit, gaussians

FAMILY, KINDS = "self-play", ("text", "images", "table")
UNUSED = (
    "k",
    "flip",
    "label_temperature",
    "length_bias",
)  # run settings of preferences: there are none here
DEFAULTS = dict(
    world="gaussians", base_steps=1000, lr=1e-3
)  # a base model with mass to spare: a third of its training


@dataclass
class Config:
    beta: float = 1.0  # scale of the log-ratio (sec. 3.3), about 1 / dimensions: the paper's images of 3,072 numbers have 0.01 to 0.1
    alpha: float = 0.8  # weight of the model's own samples (sec. 3.3); mass collapses from (2 + beta) / (2 - beta) on, near the data
    rounds: int = 2  # of self-play; the steps are divided among them
    p_mean: float | None = (
        None  # images: noise levels with ln sigma ~ N(p_mean, p_std^2) and EDM's weight, for models pretrained so
    )
    p_std: float | None = (
        None  # both or none; EDM has -1.2 and 1.2, this paper's listing -0.4 and 1.0
    )

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise UserError(f"beta = {self.beta} must be positive and finite")
        if not 0 <= self.alpha < math.inf:
            raise UserError(f"alpha = {self.alpha} must be 0 or more and finite")
        if not (isinstance(self.rounds, int) and self.rounds >= 1):
            raise UserError(f"rounds = {self.rounds} must be a whole number of 1 or more")
        given = (
            self.p_mean is not None
            and self.p_std is not None
            and math.isfinite(self.p_mean)
            and 0 < self.p_std < math.inf
        )
        if not given and (self.p_mean, self.p_std) != (None, None):
            raise UserError(
                f"p_mean = {self.p_mean} and p_std = {self.p_std} are a finite and a positive number, or both not given"
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


def loss(logps, ref_logps, batch, cfg):
    """DDO's loss on rows of a real response and one of the reference's own samples.

    logps, ref_logps (B, 2, T), 0 outside batch.mask (B, 2, T) -> losses (B,) in nats, metrics. ValueError when a row is no pair or a
    response has no scored token."""
    check_pairs(logps, batch)
    logps, ref_logps = (
        x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps)
    )
    real, fake = (
        (logps - ref_logps).sum(-1).unbind(1)
    )  # r (B,): SUM over all tokens (eq. 1), not mean
    losses = -F.logsigmoid(cfg.beta * real) - cfg.alpha * F.logsigmoid(
        -cfg.beta * fake
    )  # eq. 13: not one sigmoid for both
    right = torch.cat([real, -fake])
    told_apart = (
        (right > 0).to(right.dtype) + 0.5 * (right == 0)
    ).mean()  # the discriminator's accuracy
    return losses, {
        "real_ratio": real.detach().mean(),
        "fake_ratio": fake.detach().mean(),
        "told_apart": told_apart,
    }


def run(lab, cfg):
    best = lab.base()
    shortest = frechet(lab, best)
    for round in range(cfg.rounds):
        steps = lab.steps * (round + 1) // cfg.rounds - lab.steps * round // cfg.rounds
        policy = one_round(lab, copy.deepcopy(best), cfg, steps)
        if (now := frechet(lab, policy)) <= shortest:
            best, shortest = policy, now
    return best


def one_round(lab, policy, cfg, steps, loss=loss):
    """Train a policy, in place and with a fresh optimizer, against samples of what it is now."""
    how = edm_noise(lab, cfg, policy)
    if not steps:
        return policy

    def data(reference, _):
        rng = lab.rng("demonstrations")
        real = lab.world.demonstrations(lab.prompts, rng)
        real = [
            real[i]
            for i in torch.randperm(len(real), generator=rng)[: steps * lab.batch_size].tolist()
        ]
        return real_and_fake(real, lab.sample(reference, [row["prompt"] for row in real], 1))

    return lab.align(policy, data, loss, cfg, every=steps, steps=steps, **how)


def real_and_fake(real, fake):
    """Rows of one real response, rows of one sample for the same prompt -> rows of both, scores [1, 0]."""
    rows = []
    for a, b in zip(real, fake, strict=True):
        both = [a["responses"], b["responses"]]
        row = dict(
            prompt=a["prompt"],
            responses=torch.cat(both) if isinstance(both[0], torch.Tensor) else both[0] + both[1],
        )
        rows.append(
            row | {"scores": [1.0, 0.0]} | ({"ends": [True, *b["ends"]]} if "ends" in b else {})
        )
    return rows


def edm_noise(lab, cfg, model):
    """What `lab.align` needs to draw and weigh noise as EDM does; nothing where p_mean is None, for the world's own way."""
    if cfg.p_mean is None:
        return {}
    if lab.world.kind != "images":
        raise UserError(
            f"p_mean and p_std are noise levels of images; {lab.world.name} is a world of {lab.world.kind}"
        )
    levels = to_sigma(model.alpha_bar).log().cpu()
    between = (levels[1:] + levels[:-1]) / 2

    def times(n, rng):  # the steps whose ln sigma is nearest to the draws
        return torch.bucketize(cfg.p_mean + cfg.p_std * torch.randn(n, generator=rng), between)

    def weight(t):  # 1 / c_out^2 of the error in the image, which is sigma times that in the noise
        return 1 + (to_sigma(model.alpha_bar[t]) / model.sd) ** 2

    return dict(
        prepare=lambda policy, batch: policy.prepare(
            batch, lab.rng("noise", lab.step), times=times
        ),
        score=lambda model, batch: model.logps(batch, weight=weight),
    )


def frechet(lab, policy):
    """Frechet distance of samples to the data in worlds that have one; elsewhere 0, so that every round is kept."""
    return (
        lab.stage("frechet", lambda: lab.world.measure(policy, lab)["frechet"])
        if lab.world.frechet is not None
        else 0.0
    )


def claim(lab):
    """A table trained on the exact loss reaches p_ref^(1 - 1/beta) p_data^(1/beta), for beta < 1 cleaner than the data themselves.
    A denoiser pretrained on a ring of Gaussians with 30 % dirt leaves fewer points off the ring after 400 steps on clean data when
    it sees its own samples as well than by its likelihood alone, or without them, in as many steps. It pays with modes (seed 100: their
    entropy on the ring is 0.89, by the likelihood 0.99), and with twice the steps, as many rows, the likelihood comes near (0.54 and
    0.56).
    A negative control: pretrained on clean data, the same steps do harm, with samples of 25 steps or of 200 (seed 100: 0.48 and 0.37,
    by the likelihood 0.27 and 0.20). An exact likelihood at its maximum would stay there, because E[grad log p_ref] is 0 under p_ref; the
    bound is no likelihood of what the sampler draws. Fully trained, digits, arithmetic and reviews gained nothing either (seed 100)."""
    return [*on_sequences(lab), *on_a_ring(lab, 0.7), *on_a_ring(lab, 1.0)]


def on_sequences(lab):
    world, claims = counting(), []
    for beta in (1.0, 0.5, 0.25):
        best, alpha = theory(world.reference, world.data, beta)
        policy = fit_exactly(
            lab,
            world.model().double(),
            lambda p: expected_loss(p, world.reference, world.data, Config(beta, alpha)),
            800,
        )
        valid, apart = (
            [p.expect(world.rewards()) for p in (policy, best)],
            (policy.probs() - best.probs()).abs().sum().item() / 2,
        )
        claims.append(
            lab.exact(f"valid sequences at beta {beta:g} (0.904 in the data)", *valid, 5e-4)
        )
        claims.append(
            lab.exact(f"total variation from the theory at beta {beta:g}", apart, 0.0, 1e-3)
        )
    return claims


def on_a_ring(lab, clean):
    """Claims about points off the ring, from a base model pretrained on this share of clean points."""
    world, start = (
        gaussians.World(std=0.05, width=64, prediction="edm", sd=0.7),
        lab.at(world="gaussians", batch_size=512, lr=2e-3),
    )
    torch.manual_seed(0)
    base = world.model().to(start.device)
    how = edm_noise(start, Config(p_mean=-1.2, p_std=1.2), base)

    def batches(step):
        images, zeros = world.points(512, start.rng("points"), clean)[:, None], torch.zeros(512, 1)
        batch = Batch(zeros[..., None] == 0, zeros, images=images, label=zeros[:, 0].long())
        return how["prepare"](base, batch.to(start.device))

    start.fit(
        base,
        batches,
        lambda model, batch: likelihood(how["score"](model, batch), None, batch, None),
        3500,
        lr=3e-3,
        decay=True,
    )
    contest = {
        "the likelihood alone": (likelihood, 1.0, 400),
        "alpha 0": (loss, 0.0, 400),
        "the likelihood, twice the steps": (likelihood, 1.0, 800),
        "DDO": (loss, 1.0, 400),
    }
    off, modes = {name: [] for name in contest}, {name: [] for name in contest}
    for seed in lab.seeds:
        here = start.at(seed=seed, prompts=8192)
        here.world = world
        for name, (objective, alpha, steps) in contest.items():
            policy = one_round(
                here, copy.deepcopy(base), Config(0.1, alpha, 1, -1.2, 1.2), steps, objective
            )
            points = here.stage("points", lambda: here.sample(policy, [0], 6000)[0]["responses"])
            off[name].append(world.off_manifold(points))
            modes[name].append(world.mode_entropy(points))
    text = "pretrained " + ("with dirt" if clean < 1 else "without dirt")
    claims = []
    for name in list(contest)[:3]:
        how = dict(smaller=True, margin=0.02, expected=clean < 1 and contest[name][2] == 400)
        claims.append(
            lab.compare(
                f"points off the ring, {text}, against {name}",
                "off_manifold",
                off["DDO"],
                off[name],
                **how,
            )
        )
    even = f"evenness of the eight modes, {text}, against the likelihood alone"
    return [
        *claims,
        lab.compare(
            even, "mode_entropy", modes["DDO"], modes["the likelihood alone"], expected=False
        ),
    ]


def likelihood(logps, ref_logps, batch, cfg):
    """The baseline: fine-tuning on the real responses alone."""
    return -logps[:, 0].sum(-1), {}


def fit_exactly(lab, policy, objective, steps):
    """Train a policy on objective(policy), a scalar without randomness."""
    return lab.fit(
        policy,
        lambda step: None,
        lambda model, _: (objective(model)[None], {}),
        steps=steps,
        lr=0.1,
        decay=True,
    )


def expected_loss(policy, reference, data, cfg):
    """The loss of Tables over all responses: real ones with the probabilities of `data`, samples with those of `reference`. A scalar."""
    logps, ref_logps = (
        x.log_probs()[0, :, None, None].expand(-1, 2, -1) for x in (policy, reference)
    )  # (R, 2, 1)
    batch = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool))
    real = loss(logps, ref_logps, batch, Config(cfg.beta, alpha=0.0))[0]
    fake = loss(logps, ref_logps, batch, cfg)[0] - real
    return data.probs()[0] @ real + reference.probs()[0] @ fake


def theory(reference, data, beta):
    """(Table p* proportional to p_ref^(1 - 1/beta) p_data^(1/beta), the alpha = Z^beta at which it is the optimum) (theorem 3.3)."""
    log_probs = (1 - 1 / beta) * reference.log_probs() + data.log_probs() / beta
    best = bandit.Table(reference.vocab, reference.length).double().set_log_probs(log_probs)
    return best, math.exp(beta * log_probs.logsumexp(1).item())


def counting():
    """Six tokens mod 4 that count up (60 %) or down, 2 % of the steps wrong: 8 valid sequences of 4,096, with 0.9039 of the data. The
    reference has 30 % uniform mixed in, 0.6333; the reward is validity."""
    y = bandit.Table(4, 6).sequences()
    steps = [(y[:, 1:] - y[:, :-1] - by) % 4 == 0 for by in (1, -1)]  # (R, 5)
    up, down = (torch.where(right, 0.98, 0.02 / 3).double().prod(1) / 4 for right in steps)
    mixed, valid = 0.6 * up + 0.4 * down, steps[0].all(1) | steps[1].all(1)
    return bandit.World(
        4, 6, rewards=valid, data=mixed.log(), reference=(0.7 * mixed + 0.3 / 4**6).log()
    )
