"""RankDPO - Scalable Ranked Preference Optimization for Text-to-Image Generation (2024),
arXiv:2410.18013

Human-labelled pairs are expensive and soon outdated. Syn-Pic draws k images per prompt with several
generators, and n reward models vote: phi_i is the share of its comparisons that image i wins.
RankDPO compares all pairs of the list by their denoising errors, as Diffusion-DPO does, weighted as
in DCG, so most of the gradient goes to the top:

    s_i = |eps_i - eps_theta|^2 - |eps_i - eps_ref|^2               lower is better         (eq. 5)
    w_ij = |2^phi_i - 2^phi_j| |1/log(1 + tau_i) - 1/log(1 + tau_j)|                        (eq. 6)
    loss = -sum_{i better than j} w_ij log sigmoid( -beta (s_i - s_j) )                     (eq. 7)

tau is the rank by phi. On text, -s_i is the log-ratio r_i.

Differences from the paper
1. Generators are one base model at several guidance scales, or several base models.
2. The reward models are the world's opinions, or noisy copies of the truth.
3. If the model is trained on its output's error, s uses that error.
4. The paper does not give beta.

    python train.py --method rankdpo                            true reward and Frechet distance
    python train.py --method rankdpo --raters truth,all,random  better and worse reward models
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, UserError, check_fields, check_lists, upcast

PAPER = Paper(
    "images",
    worlds=("text", "images", "table"),
    ignores=("flip", "label_temperature", "length_bias"),  # reward models vote, not annotators
    defaults=dict(world="scenes"),
)
SCALES = (1.0, 1.5, 2.0, 3.0)  # guidance of the generators
RATERS = 5  # noisy copies of the truth, in a world without reward models
NOISE = 0.5  # standard deviation of their noise


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference
    weights: str = "dcg"  # of a pair: dcg, gain times discount; gain; discount; none, all alike
    shared_noise: bool = False  # the images of a list share their noise, not only the step
    raters: str = "all"  # who votes: all reward models; one, the first of them; truth; random
    # who draws: self, the base model; guidance, it at four scales; seeds, base models of several
    # seeds; auto, guidance where the base model allows it, else self
    generators: str = "auto"

    def __post_init__(self):
        check_fields(
            self,
            beta="(0, inf)",
            weights=("dcg", "gain", "discount", "none"),
            shared_noise=(False, True),
            raters=("all", "one", "truth", "random"),
            generators=("auto", "self", "guidance", "seeds"),
        )


def win_counts(ratings):
    """phi (B, K) of ratings (B, n, K): the share of strict wins over the others (algorithm 1)."""
    n, K = ratings.shape[1:]
    wins = (ratings[..., :, None] > ratings[..., None, :]).sum((1, 3))
    return wins.double() / (n * (K - 1))


def dcg_weights(phi, present, cfg):
    """w (B, i, j), 0 unless i is better than j, of phi (B, K); present (B, K) bool."""
    better = (phi[:, :, None] > phi[:, None, :]) & present[:, None, :]  # an absent phi is 0
    order = phi.masked_fill(~present, -1.0).argsort(descending=True, stable=True)
    tau = order.argsort(1) + 1  # (B, K), 1 = best
    gain, discount = 2**phi, 1 / torch.log(1.0 + tau.to(phi.dtype))
    w = better.to(phi.dtype)
    if cfg.weights in ("dcg", "gain"):
        w = w * (gain[:, :, None] - gain[:, None, :])
    if cfg.weights in ("dcg", "discount"):
        w = w * (discount[:, :, None] - discount[:, None, :])  # the better one has more of both
    return w


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,), metrics.

    batch.scores (B, K) are phi, the shares of comparisons that a response wins.
    """
    check_lists(batch.mask.any(-1), batch.scores, 0, 1)  # shares of wins
    logps, ref_logps = upcast(logps, ref_logps)
    r = (logps - ref_logps).sum(-1)  # (B, K) = -s: SUM over tokens, eq. 5
    w = dcg_weights(batch.scores.to(r.dtype), batch.mask.any(-1), cfg)  # (B, i, j), eq. 6
    z = cfg.beta * (r[:, :, None] - r[:, None, :])
    losses = -(w * F.logsigmoid(z)).sum((1, 2))  # eq. 7
    share = w / w.sum().clamp(min=torch.finfo(w.dtype).tiny)
    order = (z > 0) + 0.5 * (z == 0)  # ties count half
    return losses, {"ordered": (share * order).sum(), "z": (share * z.detach().abs()).sum()}


def check_options(lab, cfg):
    """UserError: an option has no effect in this run."""
    world = lab.world
    if world.given is not None and (cfg.raters, cfg.generators) != ("all", "auto"):
        raise UserError(f"raters and generators do nothing with the rows of {world.name}")
    if cfg.shared_noise and world.kind != "images":
        raise UserError(f"shared_noise does nothing in {world.name}: only images have noise")
    if cfg.generators == "guidance" and not world.guided:
        raise UserError(f"generators = guidance: {world.name} has no guidance")
    if cfg.generators == "seeds" and lab.settings.init:
        raise UserError("generators = seeds: --init is one model for all seeds")


def drawn(lab, policy, cfg, prompts):
    """--k responses for each prompt, each by the next of the generators -> rows."""
    kind = cfg.generators
    if kind == "auto":
        kind = "guidance" if lab.world.guided and policy.free else "self"
    if kind == "self":
        return lab.sample(policy, prompts, lab.k, lab.rng("lists"))
    columns = []
    for i in range(lab.k):
        if kind == "guidance":
            other, model = lab.at(guidance=SCALES[i % len(SCALES)]), policy
        else:
            other = lab.at(base_seed=lab.settings.base_seed + i)
            model = other.base()
        columns.append(other.sample(model, prompts, 1, lab.rng("lists", i)))
        lab.samples += other.samples
    return [beside(column) for column in zip(*columns)]


def beside(rows):
    """Rows of one response each for the same prompt -> one row of them all."""
    responses = [row["responses"] for row in rows]
    images = isinstance(responses[0], torch.Tensor)
    row = rows[0] | {"responses": torch.cat(responses) if images else sum(responses, [])}
    return row | ({"ends": sum([each["ends"] for each in rows], [])} if "ends" in row else {})


def ratings(lab, rows, truth, cfg):
    """The scores (B, n, K) of the n reward models that vote; truth (B, K)."""
    B, K = truth.shape
    if cfg.raters == "truth":
        return truth[:, None]
    if cfg.raters == "random":
        return torch.rand(B, 1, K, generator=lab.rng("ratings"))
    if lab.world.opinions is None:
        found = truth[:, None] + NOISE * torch.randn(B, RATERS, K, generator=lab.rng("ratings"))
    else:
        prompts = [row["prompt"] for row in rows for _ in row["responses"]]
        images = torch.cat([row["responses"] for row in rows])
        opinions = lab.world.opinions(prompts, images).values()
        found = torch.stack([scores.view(B, K) for scores in opinions], 1)
    return found[:, :1] if cfg.raters == "one" else found


def ranked(lab, policy, cfg):
    """Syn-Pic: lists of several generators, whose scores are the shares of won comparisons."""
    if lab.world.given is not None:
        rows = lab.preferences(policy)
        return [row | {"scores": given_counts(row["scores"])} for row in rows]

    def make():
        rows = drawn(lab, policy, cfg, lab.world.prompts(lab.prompts, lab.rng("prompts")))
        truth = torch.tensor(lab.truth(rows), dtype=torch.float64)
        phi = win_counts(ratings(lab, rows, truth, cfg)).tolist()
        both = zip(rows, phi, truth.tolist())
        return [row | {"scores": scores, "reward": reward} for row, scores, reward in both]

    return lab.rows(lab.stage("lists", make))


def given_counts(scores):
    """phi of one list with the scores of a file."""
    return win_counts(torch.tensor(scores, dtype=torch.float64)[None, None])[0].tolist()


def run(lab, cfg):
    check_options(lab, cfg)
    policy = lab.base()
    rows = ranked(lab, policy, cfg)

    def own_noise(policy, batch):
        rng = lab.rng("noise", lab.step)
        return policy.prepare(batch, rng, shared=cfg.shared_noise)

    images = lab.world.kind == "images"
    return lab.align(policy, rows, loss, cfg, prepare=own_noise if images else None)
