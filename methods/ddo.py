"""DDO - Direct Discriminative Optimization: Your Likelihood-Based Visual Generative Model is
Secretly a GAN Discriminator (2025), arXiv:2503.01103

A small model trained by maximum likelihood covers every mode of the data, but puts probability
between them. A GAN's discriminator would see this: against samples of p_ref its optimum is
sigmoid(log p_data / p_ref). DDO writes the discriminator as sigmoid(log p / p_ref), so training it
trains the likelihood model p. The best model is the next round's reference:

    r(x) = log p(x) - log p_ref(x)
    loss = -log sigmoid( beta r(real) ) - alpha log sigmoid( -beta r(sample) )            (eq. 13)

On images log p is minus the weighted noise error at one noise draw (eq. 14-16).

Differences from the paper
1. A row pairs a real and a sampled response to one prompt or class, with shared noise.
2. Classifier-free guidance and the moving average of the weights are left out.
3. alpha and beta are the same in all rounds.
4. Without a Frechet distance, the last round counts as the best.

    python train.py --method ddo                      told_apart rises above 1/2
    python train.py --method ddo --rounds 4           more rounds in the same steps
    python train.py --method ddo --world digits       images
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, pair
from diffusion import to_sigma

PAPER = Paper(
    "images",
    worlds=("text", "images", "table"),
    needs="demonstrations",
    ignores=("k", "flip", "label_temperature", "length_bias"),
    defaults=dict(world="gaussians", base_steps=1000, lr=1e-3),
)


@dataclass(frozen=True)
class Config:
    beta: float = 1.0  # scale of the log-ratio (sec. 3.3); images: about 1 / number of dimensions
    alpha: float = 0.8  # weight of the samples (sec. 3.3); the model collapses if it is too large
    rounds: int = 2  # rounds of self-play, which share the steps
    p_mean: float | None = None  # images: draw ln sigma from N(p_mean, p_std^2), with EDM's weight
    p_std: float | None = None  # standard deviation of ln sigma; needs p_mean

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", alpha="[0, inf)", rounds="[1, inf)")
        check_fields(self, p_mean="(-inf, inf)", p_std="(0, inf)")
        if (self.p_mean is None) != (self.p_std is None):
            raise UserError("p_mean and p_std are given together, or not at all")


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), real first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    real, fake = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios r: SUM over tokens (eq. 1)
    losses = -F.logsigmoid(cfg.beta * real) - cfg.alpha * F.logsigmoid(-cfg.beta * fake)  # eq. 13
    right = torch.cat([real, -fake])
    told_apart = ((right > 0).to(right.dtype) + 0.5 * (right == 0)).mean()  # ties count half
    ratios = {"real_ratio": real.detach().mean(), "fake_ratio": fake.detach().mean()}
    return losses, ratios | {"told_apart": told_apart}


def run(lab, cfg):
    if cfg.p_mean is not None and lab.world.kind != "images":
        raise UserError(
            f"p_mean and p_std are noise levels of images; "
            f"{lab.world.name} is a world of {lab.world.kind}"
        )
    best = lab.base()
    shortest = frechet(lab, best)
    for round in range(cfg.rounds):
        steps = lab.steps * (round + 1) // cfg.rounds - lab.steps * round // cfg.rounds
        policy = one_round(lab, copy.deepcopy(best), cfg, steps, round)
        distance = frechet(lab, policy)
        if distance <= shortest:  # without distances, both are 0 and the last round wins
            best, shortest = policy, distance
    return best


def one_round(lab, policy, cfg, steps, round=0):
    """Train a policy, in place and with a new optimizer, against samples of its current weights."""
    how = edm_noise(lab, cfg, policy)

    def data(reference, _):
        rng = lab.rng("demonstrations", round)
        real = lab.world.demonstrations(lab.prompts, rng)
        chosen = torch.randperm(len(real), generator=rng)[: steps * lab.batch_size]
        real = [real[i] for i in chosen.tolist()]
        prompts = [row["prompt"] for row in real]
        return real_and_fake(real, lab.sample(reference, prompts, 1, lab.rng("own samples", round)))

    return lab.align(policy, data, loss, cfg, every=max(1, steps), steps=steps, **how)


def real_and_fake(real, fake):
    """Join rows of one real response and rows of one sample for the same prompt -> pairs."""
    rows = []
    for a, b in zip(real, fake, strict=True):
        both = [a["responses"], b["responses"]]
        images = isinstance(both[0], torch.Tensor)
        row = dict(prompt=a["prompt"], responses=torch.cat(both) if images else both[0] + both[1])
        ends = {"ends": [True, *b["ends"]]} if "ends" in b else {}
        rows.append(row | {"scores": [1.0, 0.0]} | ends)
    return rows


def edm_noise(lab, cfg, model):
    """Options of `lab.align` that draw and weight noise as EDM does; {} if p_mean is None."""
    if cfg.p_mean is None:
        return {}
    levels = to_sigma(model.alpha_bar).log().cpu()
    between = (levels[1:] + levels[:-1]) / 2

    def times(n, rng):
        """The n steps (n,) whose ln sigma is nearest to n draws."""
        return torch.bucketize(cfg.p_mean + cfg.p_std * torch.randn(n, generator=rng), between)

    def weight(t):
        """EDM's weight 1 / c_out^2 times sigma^2, since the image's error is sigma times eps's."""
        return 1 + (to_sigma(model.alpha_bar[t]) / model.sd) ** 2

    def prepare(policy, batch):
        return policy.prepare(batch, lab.rng("noise", lab.step), times=times)

    def score(model, batch):
        return model.logps(batch, weight=weight)

    return dict(prepare=prepare, score=score)


def frechet(lab, policy):
    """Frechet distance of samples to the data; 0 where the world has none."""
    if lab.world.frechet is None:
        return 0.0
    return lab.stage("frechet", lambda: lab.world.measure(policy, lab)["frechet"])
