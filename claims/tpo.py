"""What TPO claims, and whether it holds here.

Chains: sums of four digits modulo 7 in three steps, in an exact table. Every list has five chains
that continue prefixes of the correct one, and the reward is the probability of a correct result.
DPO gets the best and the worst response of a list. Sums: the weights of the steps in trees of
worked additions, which a language model samples.

Tuning seeds 100 to 102: on chains, TPO has more reward than DPO, than ranks by the label and than
equal weights, on every seed. Most of the gain over DPO is gone at matched KL, so TPO mainly takes
larger steps. A language model is not trained on sums: there (two seeds) the same loss without step
weights, at beta times their mean, was as good, since the states of two steps are nearly parallel,
so that all weights are nearly equal.
"""

from types import SimpleNamespace

import torch

from data import collate, paths, upcast
from lab.claims import claim
from methods import dpo, tpo
from toy.chains import grown

PLAIN = dict(asr=False)  # without step weights


def dpo_on(pick):
    """DPO's loss on two responses of every list; pick(scores, leaf) -> their indices, each (B,)."""

    def loss(logps, ref_logps, batch, cfg):
        on, leaf = paths(batch)
        chosen, rejected = pick(batch.scores, leaf)
        both = torch.stack([chosen, rejected], 1)  # (B, 2)
        pair = [
            torch.einsum("bik,bk->bi", on.to(x.dtype), x.sum(-1)).gather(1, both)[..., None]
            for x in upcast(logps, ref_logps)
        ]
        mask = torch.ones_like(pair[0], dtype=torch.bool)
        losses, metrics = dpo.loss(*pair, SimpleNamespace(mask=mask), cfg)
        scores = batch.scores.gather(1, both)
        return losses * (scores[:, 0] > scores[:, 1]), metrics

    return loss


def best_and_worst(scores, leaf):
    """The best and the worst response of every list."""
    best = scores.masked_fill(~leaf, -torch.inf).argmax(1)
    return best, scores.masked_fill(~leaf, torch.inf).argmin(1)


def mean_step_weight(lab):
    """The mean weight w of the steps of the base model's pairs, on 64 trees of sums."""
    policy = lab.base()
    rows = lab.rows(grown(lab, policy))
    with torch.no_grad():
        batch = tpo.prepare(policy, collate(rows, lab.world.tokenizer).to(lab.device))
        logps = policy.logps(batch)
        return tpo.loss(logps, logps, batch, tpo.Config())[1]["step_weight"].item()


def measure(lab):
    """{series: one number or curve per seed}."""
    beta = tpo.Config().beta
    chains = {
        "tpo": (tpo.loss, tpo.Config(**PLAIN)),
        "tpo, label ranks": (tpo.loss, tpo.Config(tau="label", **PLAIN)),
        "all pairs": (tpo.loss, tpo.Config(tau="none", **PLAIN)),
        "dpo, best and worst": (dpo_on(best_and_worst), dpo.Config(beta=beta)),
    }

    def lists(lab, base):
        return lab.rows(lab.world.lists(lab.prompts, lab.rng("lists")))

    series = lab.race(chains, lists, world="modular", eval_every=10)
    labs = [lab.at(world="arithmetic", seed=i, base_seed=i, k=5, prompts=64) for i in lab.seeds]
    series["step weight"] = [mean_step_weight(each) for each in labs]
    return series


def more_correct(words, ours, baseline, margin, **kwargs):
    return claim(
        f"On chains, TPO has more correct results than {words}",
        "reward",
        ours,
        ">",
        baseline,
        margin=margin,
        **kwargs,
    )


CLAIMS = [
    more_correct(
        "DPO on the best and the worst response of each list, at matched KL",
        "tpo",
        "dpo, best and worst",
        0.05,
        at_kl="shared",
        kind="primary",
        expect="no effect",
        world="modular chains",
    ),
    more_correct(
        "DPO on the best and the worst response, after equal lists and steps",
        "tpo",
        "dpo, best and worst",
        0.02,
    ),
    more_correct("without the pair weights, after equal steps", "tpo", "all pairs", 0.02),
    more_correct(
        "with ranks by the labels instead of the current rewards, after equal steps",
        "tpo",
        "tpo, label ranks",
        0.02,
    ),
    claim(
        "On sums, the mean step weight of the base model's pairs is nearly 2: it exceeds 1.8",
        None,
        "step weight",
        ">",
        1.8,
    ),
]
