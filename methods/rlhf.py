"""RLHF - Training Language Models to Follow Instructions with Human Feedback (2022),
arXiv:2203.02155

RLHF is what DPO replaces: a reward model r is fitted to the pairs under the Bradley-Terry model,
then the policy maximizes r - beta KL(policy || reference). The policy gradient is REINFORCE with a
leave-one-out baseline over K samples (RLOO, arXiv:2402.14740). It needs no value network and, since
every step draws new samples, no clipping. The policy never sees the true reward.

    loss of r = -log sigmoid( r(x, y_w) - r(x, y_l) )                              (DPO, eq. 2)
    R_k  = r(x, y_k) - beta log( pi(y_k|x) / pi_ref(y_k|x) )                       (DPO, eq. 3)
    A_k  = R_k - mean of R_j over the other K - 1 samples,   without gradient
    loss = -mean_k A_k log pi(y_k|x)

On text r is the base model with a linear head; on a table it is a second table.

Differences from the paper
1. RLOO replaces PPO, and no pretraining loss is mixed in.
2. Policy and reward model take --steps steps each; the prompts are those of the pairs.

    python train.py --method rlhf                 the true reward rises, reviews become short
    python train.py --method dpo,rlhf --seeds 3   DPO beside RLHF
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields, upcast

PAPER = Paper(
    "baseline",
    worlds=("text", "table"),
    defaults=dict(world="reviews", batch_size=32),
    core=("bradley_terry", "loss"),
)


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # weight of the KL penalty; the same beta has the same optimum as in DPO

    def __post_init__(self):
        check_fields(self, beta="[0, inf)")


class RewardModel(nn.Module):
    """One reward per response: a linear head on a language model, or a table of its own."""

    def __init__(self, base):
        super().__init__()
        self.base = copy.deepcopy(base)
        self.head = nn.Linear(base.config.hidden_size, 1, bias=False).to(base.device)
        nn.init.zeros_(self.head.weight)  # all rewards begin at 0

    def forward(self, batch):
        """Rewards (B, K) of the responses of a Batch."""
        last = batch.mask.sum(-1, keepdim=True).clamp(min=1) - 1  # (B, K, 1) last scored token
        source = batch.source.gather(2, last)  # the state that predicts it
        return self.head(self.base.hidden(batch, rows=source.flatten())).view(last.shape[:2])


class RewardTable(nn.Module):
    """One reward per response of a table: the log-prob under a table that starts uniform."""

    def __init__(self, base):
        super().__init__()
        self.table = copy.deepcopy(base)
        nn.init.zeros_(self.table.logits)

    def forward(self, batch):
        """Rewards (B, K) of the responses of a Batch."""
        return self.table.logps(batch).sum(-1)


def bradley_terry(rewards):
    """Bradley-Terry: rewards (B, 2), chosen first -> losses (B,), metrics."""
    chosen, rejected = upcast(rewards).unbind(1)
    right = (chosen > rejected).to(chosen.dtype).mean()
    return -F.logsigmoid(chosen - rejected), {"reward_accuracy": right}  # DPO, eq. 2


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,), metrics.

    batch.scores (B, K) are the rewards of the reward model.
    """
    logps, ref_logps = upcast(logps, ref_logps)
    K = logps.shape[1]
    if K < 2:
        raise UserError("one sample per prompt: the leave-one-out baseline needs --k 2 or more")
    n = batch.mask.any(-1).sum(1, keepdim=True)  # (B, 1): K may differ between rows
    log_pi = logps.sum(-1)  # (B, K): SUM over tokens
    kl = log_pi.detach() - ref_logps.sum(-1)  # (B, K): its mean over samples estimates the KL
    R = batch.scores.to(kl.dtype) - cfg.beta * kl  # DPO, eq. 3; 0 for an absent sample
    others = (R.sum(1, keepdim=True) - R) / (n - 1).clamp(min=1)
    A = (R - others) * (n > 1)  # (B, K): a single sample has no baseline and no advantage
    losses = -(A * log_pi).sum(1) / n[:, 0]
    return losses, {"model_reward": batch.scores.sum() / n.sum(), "sample_kl": kl.sum() / n.sum()}


def fit_reward(lab, policy, pairs):
    """A reward model that is fitted to pairs in `lab.steps` steps of `lab.batch_size` pairs."""
    model = (RewardTable if lab.world.kind == "table" else RewardModel)(policy)

    def objective(model, batch):
        return bradley_terry(model(batch))

    return lab.fit(model, lab.batches(pairs), objective, capture=True)


def rollout(lab, policy, round, prompts, score):
    """Rows of --k samples for each of the next `lab.batch_size` prompts, scored by score(rows)."""
    first = round * lab.batch_size
    asked = [prompts[i % len(prompts)] for i in range(first, first + lab.batch_size)]
    rows = lab.sample(policy, asked, lab.k)
    return [row | {"scores": values} for row, values in zip(rows, score(rows))]


def run(lab, cfg):
    policy = lab.base()
    pairs = lab.preferences(policy, k=2)
    model = fit_reward(lab, policy, pairs)
    prompts = [row["prompt"] for row in pairs]

    @torch.no_grad()
    def score(rows):
        return model(lab.collate(rows)).tolist()

    def data(policy, round):
        return rollout(lab, policy, round, prompts, score)

    return lab.align(policy, data, loss, cfg, every=1)
