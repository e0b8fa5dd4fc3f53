"""SFT - Supervised fine-tuning on chosen responses, Preferred-FT in DPO (2023), arXiv:2305.18290

SFT is the baseline of every preference method (DPO, sec. 6). The policy is trained by maximum
likelihood on the chosen response of a pair. There is no reference model.

    loss = -1/|y| sum_t log pi(y_t | x, y_<t)                                 y: the chosen response

If pairs are sampled from pi_ref and all responses have the same length, the optimum is the
distribution of the chosen responses, 2 pi_ref(y) E_{y' ~ pi_ref}[ p(y beats y') ]. No response
becomes more than twice as likely (K times in lists of K). If lengths differ, shorter responses
gain more, since the log-prob of each is divided by |y|.

Differences from the paper
1. Of a list, the first response with the best score is used.
2. Single answers (prompt, completion, label) are used if their label is good.
3. The loss is a mean over tokens, so all responses weigh the same.
4. On images the loss is the noise error of the chosen image.

    python train.py --method sft             the true reward rises a little
    python train.py --method sft --k 8       SFT on the best of eight samples
"""

from dataclasses import dataclass

import torch

from data import Paper, UserError, readable, upcast

PAPER = Paper(
    "baseline",
    worlds=("text", "images", "table"),
    needs="demonstrations",
    defaults=dict(world="reviews"),
)


@dataclass(frozen=True)
class Config:
    """SFT has no hyper-parameters of its own."""


def loss(logps, ref_logps, batch, cfg):
    """logps (B, K, T), 0 outside batch.mask; ref_logps is not read -> losses (B,), metrics."""
    if readable(batch.mask) and not batch.mask.flatten(1).any(1).all():
        raise UserError("a row has no response with a scored token")
    means = upcast(logps).sum(-1) / batch.mask.sum(-1).clamp(min=1)  # (B, K): MEAN over tokens
    scores = batch.scores.masked_fill(~batch.mask.any(-1), -torch.inf)  # absent responses lose
    best = scores.argmax(1, keepdim=True)  # (B, 1), the first response with the best score
    losses = -means.gather(1, best).squeeze(1)
    return losses, {}


def run(lab, cfg):
    policy = lab.base()
    if lab.world.single:
        data = lab.rows(lab.world.demonstrations(lab.prompts, lab.rng("demonstrations")))
    elif lab.world.given is not None:
        data = lab.preferences(policy)  # of a tree, too, the best response is known
    else:
        data = lab.preferences(policy, k=lab.settings.k or 2)
    return lab.align(policy, data, loss, cfg, reference=None)
