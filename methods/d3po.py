"""D3PO - Using Human Feedback to Fine-tune Diffusion Models without Any Reward Model (2023),
arXiv:2311.13231

A random sampler is a policy: each denoising step draws the next state from a normal distribution
with the model's mean. D3PO samples two paths of the current policy from one noise x_T, and an
annotator compares their images. Every step of the chosen path counts as better than the same step
of the rejected one, so each step has a DPO loss:

    log p(x_s | x_t) = -|x_s - mean|^2 / (2 sigma^2) + const         r_i = log p - log p_ref
    loss_i = -log sigmoid( beta r_i(chosen) - beta r_i(rejected) )                       (eq. 14)

Only the first step, where both paths share a state, follows from theory (eq. 12).

Differences from the paper
1. As in the code, log-probs are means over dimensions and ratios are clipped.
2. The last step, which has no density, and guidance are left out.
3. Training stops when the KL of a path exceeds a limit.

    python train.py --method d3po                          the reward rises, variety falls
    python train.py --method d3po --variant first --steps 60     as many pairs, hardly any reward
    python train.py --method d3po --world glyphs           cleaner, simpler drawings
"""

import math
from dataclasses import dataclass

import torch.nn.functional as F

from data import Paper, StopTraining, UserError, check_fields, pair

PAPER = Paper(
    "online",
    worlds=("images",),
    needs="reward",
    ignores=("k",),
    defaults=dict(world="gaussians", label_temperature=0.0),
    demo=dict(steps=540, prompts=256),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference
    clip_ratio: float = 0.1  # p / p_ref is clipped to 1 - clip and 1 + clip; 0: it is not clipped
    variant: str = "all"  # the steps of a path in the loss: all (eq. 14) or first (eq. 12)
    sampler_steps: int = 10  # denoising steps T of a path
    eta: float = 1.0  # noise of the sampler; 1 is ancestral sampling
    reference: str = "start"  # the base model, or round: the policy as each round begins
    kl_limit: float = 10.0  # KL of a path, in nats per dimension, at which the training stops

    def __post_init__(self):
        check_fields(self, beta="(0, inf)", clip_ratio="[0, 1)", variant=("all", "first"))
        check_fields(self, sampler_steps="[2, 100]", eta="(0, 1]", kl_limit="(0, inf)")
        check_fields(self, reference=("start", "round"))


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    ratios = (logps - ref_logps).sum(-1)  # (B, 2) of one transition; T = 1
    if cfg.clip_ratio:
        low, high = math.log(1 - cfg.clip_ratio), math.log(1 + cfg.clip_ratio)
        clipped = ratios.clamp(low, high)  # not exp, clamp, log: exp overflows, and 0 * inf is NaN
    else:
        clipped = ratios
    chosen, rejected = clipped.unbind(1)
    z = cfg.beta * (chosen - rejected)  # (B,)
    return -F.logsigmoid(z), {"clipped": (clipped != ratios).to(z.dtype).mean()}  # eq. 14


def prepare(policy, batch):
    """Nothing is drawn, since the noise of a transition is in its two states."""
    return batch


def pairs_per_round(lab):
    """The number of pairs per round: --prompts, by default the batch size."""
    return lab.few(lab.settings.prompts or lab.batch_size, 16)


def steps_per_pair(cfg):
    """The number of rows that a pair gives."""
    return 1 if cfg.variant == "first" else cfg.sampler_steps - 1


def rollout(lab, policy, cfg):
    """Rows (pair, step) of one round, with the columns x, after (2, *shape) and step.

    StopTraining: the policy is too far from the base model.
    """
    rng, T = lab.rng("paths", lab.round), cfg.sampler_steps
    prompts = lab.world.prompts(pairs_per_round(lab), rng)
    kl = policy.path_kl(lab.reference, prompts, lab.rng("kl", lab.round), T).mean().item()
    kl = kl / math.prod(policy.shape)
    if not kl <= cfg.kl_limit:
        raise StopTraining(
            f"the KL of a path is {kl:.3g} nats per dimension, more than kl_limit = "
            f"{cfg.kl_limit:g}: the policy leaves the data, and its reward means little"
        )
    states = policy.walk(prompts, 2, rng, T, cfg.eta).cpu()  # (T + 1, n, 2, *shape)
    lab.samples += 2 * len(prompts)
    rows = [
        dict(prompt=prompt, responses=states[-1, i], path=states[:, i].transpose(0, 1))
        for i, prompt in enumerate(prompts)
    ]
    out = []
    for row in lab.label(rows):  # the two paths are reordered with their images
        path = row.pop("path")  # (2, T + 1, *shape)
        if row["reward"][0] != row["reward"][1]:  # a tie has no gradient
            steps = range(steps_per_pair(cfg))
            out += [row | dict(x=path[:, s], after=path[:, s + 1], step=s) for s in steps]
    return lab.rows(out)


def run(lab, cfg):
    if lab.world.given is not None:
        raise UserError(f"d3po samples its own pairs, and would not use those of {lab.world.name}")
    policy = lab.base()
    every = -(-pairs_per_round(lab) * steps_per_pair(cfg) // lab.batch_size)  # steps per round

    def data(policy, round):
        rows = rollout(lab, policy, cfg)
        if not rows and round:
            raise StopTraining(f"round {round + 1} gave no pairs: both images have equal rewards")
        return rows

    def score(model, batch):
        about = batch.x, batch.after, batch.step, batch.label, cfg.sampler_steps, cfg.eta
        return model.transition_logps(*about)[..., None]  # (B, 2, 1)

    how = dict(reference=cfg.reference, every=every, prepare=prepare, score=score)
    return lab.align(policy, data, loss, cfg, **how)
