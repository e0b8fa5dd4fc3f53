"""DDO - Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is Secretly a GAN Discriminator (2025), arXiv:2503.01103

Maximum likelihood with too small a model, or on flawed data, covers every mode and spills mass between them. A GAN's discriminator would see
the difference; its optimum against samples of p_ref is sigmoid(log p_data / p_ref). So write the discriminator as sigmoid(log p / p_ref) with
the likelihood model p itself: training the discriminator then trains the model, without a second network. There are no preferences: real
data are told from the reference's own samples, each in a sigmoid of its own, and the next reference is the best model so far.

    r(x) = log p(x) - log p_ref(x)
    loss = -log sigmoid( beta r(real) ) - alpha log sigmoid( -beta r(own sample) )                            (eq. 13)

The optimum for alpha = beta = 1 is the data (theorem 3.1); beta < 1 goes beyond it, p_ref^(1 - 1/beta) p_data^(1/beta), at the one alpha that
normalises it (theorem 3.3). On images log p is minus the weighted noise error at one draw of noise (eq. 14-16).

What this file does differently from the paper: 1. A real response and a sample for the same prompt or class make a row, and share their draw
of noise. 2. Models have no classifier-free guidance, so there are no rows without a label (the paper sets alpha = 0 there). 3. No averaging of
weights. 4. alpha and beta are the same in all rounds. 5. Which round is best is asked once a round, by the Frechet distance to the data in
worlds that have one; elsewhere the last round counts.
"""

import copy
import math
from dataclasses import dataclass
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from nanomodel import to_sigma
from toy import bandit, gaussians

FAMILY, KINDS, NEEDS = "images", ("text", "images", "table"), "demonstrations"
DEFAULTS = dict(world="digits")


@dataclass
class Config:
    beta: float = 0.05  # scale of the log-ratio (sec. 3.3); the paper's range for images is 0.01 to 0.1, short texts want 0.25 to 1
    alpha: float = 1.0  # weight of the model's own samples (sec. 3.3)
    rounds: int = 2  # of self-play; the steps are divided among them
    p_mean: float | None = None  # images: noise levels with ln sigma ~ N(p_mean, p_std^2) and EDM's weight, for models pretrained so
    p_std: float | None = None  # both or none; EDM has -1.2 and 1.2, this paper's listing -0.4 and 1.0

    def __post_init__(self):
        if not 0 < self.beta < math.inf:
            raise ValueError(f"beta = {self.beta} must be positive and finite")
        if not 0 <= self.alpha < math.inf:
            raise ValueError(f"alpha = {self.alpha} must be 0 or more and finite")
        if self.rounds < 1:
            raise ValueError(f"rounds = {self.rounds} must be at least 1")
        if (self.p_mean is None) != (self.p_std is None):
            raise ValueError(f"p_mean = {self.p_mean} and p_std = {self.p_std} are given together or not at all")
        if self.p_mean is not None and not (math.isfinite(self.p_mean) and 0 < self.p_std < math.inf):
            raise ValueError(f"p_mean = {self.p_mean} must be finite, p_std = {self.p_std} positive and finite")


def check_pairs(logps, batch):
    """ValueError unless every row is a pair of responses with something to score."""
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise ValueError(f"log-probs of shape {tuple(logps.shape)}: pairs are (B, 2, T), the preferred response first")
    # on CUDA the question would make the device wait; there the data were looked at when they were read
    if logps.device.type == "cpu" and not batch.mask.any(-1).all():
        raise ValueError("a response has no scored token")


def loss(logps, ref_logps, batch, cfg):
    """DDO's loss on rows of a real response and one of the reference's own samples.

    logps, ref_logps (B, 2, T), 0 outside batch.mask (B, 2, T) -> losses (B,) in nats, metrics. ValueError when a row is no pair or a
    response has no scored token."""
    check_pairs(logps, batch)
    logps, ref_logps = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (logps, ref_logps))
    real, fake = (logps - ref_logps).sum(-1).unbind(1)  # r (B,): SUM over all tokens (eq. 1), not mean
    losses = -F.logsigmoid(cfg.beta * real) - cfg.alpha * F.logsigmoid(-cfg.beta * fake)  # eq. 13: not one sigmoid for both
    right = torch.cat([real, -fake]).detach()
    return losses, {
        "real_ratio": real.detach().mean(),
        "fake_ratio": fake.detach().mean(),
        "told_apart": ((right > 0).to(right.dtype) + 0.5 * (right == 0)).mean(),  # the discriminator's accuracy
    }


def pairs(real, fake):
    """Rows of one real response, rows of one sample each -> rows [real, sample] with scores [1, 0]."""
    rows = []
    for a, b in zip(real, fake):
        both = [a["responses"], b["responses"]]
        row = dict(prompt=a["prompt"], responses=torch.cat(both) if isinstance(both[0], torch.Tensor) else both[0] + both[1])
        rows.append(row | {"scores": [1.0, 0.0]} | ({"ends": [True, *b["ends"]]} if "ends" in b else {}))
    return rows


def noise_levels(model, p_mean, p_std):
    """times(n, rng) -> (n,) steps of the model's schedule whose ln sigma is nearest to draws from N(p_mean, p_std^2)."""
    levels = to_sigma(model.alpha_bar).log().cpu()
    between = (levels[1:] + levels[:-1]) / 2
    return lambda n, rng: torch.bucketize(p_mean + p_std * torch.randn(n, generator=rng), between)


def edm_weight(model):
    """weight(t) (B,) of the squared noise error that makes it EDM's: 1 / c_out^2 of the denoised image, whose error is sigma that of the noise."""
    return lambda t: 1 + (to_sigma(model.alpha_bar[t]) / model.sd) ** 2


def noise(lab, cfg, model):
    """What `lab.align` needs to draw and weigh noise as EDM does; nothing for the world's own way."""
    if cfg.p_mean is None:
        return {}
    if lab.world.kind != "images":
        raise ValueError(f"p_mean and p_std are noise levels of images; {lab.world.name} is a world of {lab.world.kind}")
    times = noise_levels(model, cfg.p_mean, cfg.p_std)
    return dict(
        prepare=lambda policy, batch: policy.prepare(batch, lab.rng("noise"), times=times),
        score=lambda model, batch: model.logps(batch, weight=edm_weight(model)),
    )


def run(lab, cfg):
    best = lab.base()
    how, shortest = noise(lab, cfg, best), distance(lab, best)
    for round in range(cfg.rounds):
        steps = lab.steps * (round + 1) // cfg.rounds - lab.steps * round // cfg.rounds
        if not steps:
            continue

        def data(reference, _):
            rng, n = lab.rng("demonstrations"), steps * lab.batch_size
            real = lab.world.demonstrations(lab.prompts, rng)
            real = [real[i] for i in torch.randperm(len(real), generator=rng)[:n].tolist()]
            return pairs(real, lab.sample(reference, [row["prompt"] for row in real], 1))

        policy = copy.deepcopy(best)
        policy = lab.align(policy, data, loss, cfg, every=steps, steps=steps, **how)  # a fresh optimizer in every round
        if (now := distance(lab, policy)) <= shortest:
            best, shortest = policy, now
    return best


def distance(lab, policy):
    """Frechet distance of samples to the data in worlds that have one; elsewhere 0, so that every round is kept."""
    return lab.stage("distance", lambda: lab.world.measure(policy, lab)["frechet"]) if hasattr(lab.world, "frechet") else 0.0


# ---------------------------------------------------------------- claims


def expected_loss(policy, reference, data, cfg):
    """The loss of Tables over all responses: real ones with the probabilities of `data`, samples with those of `reference`. A scalar."""
    logps, ref_logps = (x.log_probs()[0, :, None, None].expand(-1, 2, -1) for x in (policy, reference))  # (R, 2, 1)
    batch = SimpleNamespace(mask=torch.ones_like(logps, dtype=torch.bool))
    real = loss(logps, ref_logps, batch, Config(cfg.beta, alpha=0.0))[0]
    fake = loss(logps, ref_logps, batch, cfg)[0] - real
    return data.probs()[0] @ real + reference.probs()[0] @ fake


def minimise(policy, objective):
    """Train a policy to the minimum of objective(policy) by quasi-Newton steps; returns it."""
    how = dict(max_iter=1000, max_eval=2000, tolerance_grad=1e-10, tolerance_change=1e-15, line_search_fn="strong_wolfe")
    optimizer = torch.optim.LBFGS(policy.parameters(), **how)

    def closure():
        optimizer.zero_grad()
        value = objective(policy)
        value.backward()
        return value

    optimizer.step(closure)
    return policy


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
    return bandit.World(4, 6, rewards=valid, data=mixed.log(), reference=(0.7 * mixed + 0.3 / 4**6).log())


class Bigram(bandit.Table):
    """A Table whose logits depend on the last token alone: too small for sequences that count up or down."""

    def __init__(self, vocab, length):
        torch.nn.Module.__init__(self)
        self.vocab, self.length = vocab, length
        self.tied = torch.nn.Parameter(torch.zeros(1, 1 + vocab, vocab))  # row 0: no token yet

    @property
    def logits(self):
        last = [torch.zeros(1, dtype=torch.long), *(1 + torch.arange(self.vocab).repeat(self.vocab**t) for t in range(self.length - 1))]
        return self.tied[:, torch.cat(last)]
