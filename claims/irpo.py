"""What IRPO claims, and whether it holds here.

The data are lists of twenty dishes in one context, three of them relevant, in grades of 2 and 3.
Every arm is trained on the same lists for equal steps, and NDCG is measured on 256 held-out lists
of the same kind. Softmax-DPO (arXiv:2406.09215) compares one relevant item with all irrelevant
ones, and DPO compares it with one of them; both are IRPO's loss on a part of the list. A further
baseline is the mean of DPO's loss over all pairs of different relevance. The arm with weights by
position alone shows whether the gain 2^y - 1 helps.

What theory expects: a loss that sees more comparisons per list learns more per step, so IRPO is
above DPO and softmax-DPO, but a plain loss over all pairs sees as many. In all arms the policy
stops writing lists, since only items are scored, so the reward of sampled lists falls while NDCG
rises.
"""

from types import SimpleNamespace

import torch

from data import collate
from lab.claims import claim
from methods import irpo, tpo
from toy.ranking import ndcg

ITEMS = 20  # of a list


def on_part(keep):
    """IRPO's loss on the items keep(batch) (B, K), of which only the item of role 1 is relevant."""

    def loss(logps, ref_logps, batch, cfg):
        mask = batch.mask & keep(batch)[..., None]
        part = SimpleNamespace(mask=mask, scores=(batch.role > 0).to(batch.scores.dtype))
        return irpo.loss(logps, ref_logps, part, cfg)

    return loss


dpo_loss = on_part(lambda batch: batch.role != 0)
softmax_dpo_loss = on_part(lambda batch: (batch.role > 0) | (batch.scores == 0))
ONE = irpo.Config(inner="excl", reduce="sum")  # one relevant item has weight 1
ALL_PAIRS = tpo.Config(beta=irpo.Config().beta, tau="none", asr=False, reduce="mean")


def all_pairs_loss(logps, ref_logps, batch, cfg):
    """The mean of DPO's loss over all pairs of items of different relevance."""
    flat = SimpleNamespace(mask=batch.mask, scores=batch.scores / 3)
    return tpo.loss(logps, ref_logps, flat, cfg)


def with_roles(rows, rng):
    """Rows with the column role: 1 for a random relevant item, -1 for an irrelevant one, else 0."""
    out = []
    for row in rows:
        relevant = torch.tensor(row["scores"]) > 0
        draw, role = torch.rand(len(relevant), generator=rng), torch.zeros(len(relevant))
        role[(relevant + draw).argmax()], role[(~relevant + draw).argmax()] = 1.0, -1.0
        out.append(row | {"role": role.tolist()})
    return out


def sparse(rows):
    """Rows in which only the items of grades 2 and 3 are relevant: three of each list."""
    return [row | {"scores": [s if s > 1 else 0.0 for s in row["scores"]]} for row in rows]


@torch.no_grad()
def item_scores(policy, reference, rows, tokenizer):
    """The mean log-ratio per token of every item (n, K), in parts of 64 lists."""
    out = []
    for start in range(0, len(rows), 64):
        batch = collate(rows[start : start + 64], tokenizer)
        gain = (policy.logps(batch) - reference.logps(batch)).sum(-1)
        out.append(gain / batch.mask.sum(-1))
    return torch.cat(out)


@torch.no_grad()
def shuffled_agreement(policy, reference, rows, tokenizer, rng):
    """Mean rank correlation (Spearman) of the item scores of each list in two orders."""

    def places(rows):
        gains = item_scores(policy, reference, rows, tokenizer)
        return gains.argsort(1).argsort(1).double()

    count = len(rows[0]["responses"])
    order = torch.stack([torch.randperm(count, generator=rng) for _ in rows])
    moved = [
        row | {"responses": [row["responses"][j] for j in o]}
        for row, o in zip(rows, order.tolist())
    ]
    gap = places(rows).gather(1, order) - places(moved)
    return 1 - (6 * gap.square().sum(1) / (count**3 - count)).mean().item()


def measure(lab):
    """{arm: one curve per seed}; the last point has NDCG and the agreement of two orders."""
    arms = dict(
        irpo=(irpo.loss, irpo.Config()),
        softmax_dpo=(softmax_dpo_loss, ONE),
        dpo=(dpo_loss, ONE),
        all_pairs=(all_pairs_loss, ALL_PAIRS),
        position=(irpo.loss, irpo.Config(weights="position")),
    )

    def data(lab, base):
        lists = sparse(lab.world.lists(lab.prompts, lab.rng("lists"), ITEMS))
        return lab.rows(with_roles(lists, lab.rng("roles")))

    def end(lab, policy):
        held_out = sparse(lab.world.lists(lab.few(256), lab.rng("held out"), ITEMS))
        tokenizer = lab.world.tokenizer
        agreement = shuffled_agreement(
            policy, lab.reference, held_out, tokenizer, lab.rng("shuffle")
        )
        relevance = torch.tensor([row["scores"] for row in held_out])
        gains = item_scores(policy, lab.reference, held_out, tokenizer)
        return {"ndcg_10": ndcg(gains, relevance, 10).mean().item(), "agreement": agreement}

    how = dict(world="ranking", steps=200, batch_size=16, lr=2e-3, prompts=3200)
    return lab.race(arms, data, watch=lambda policy, step: {}, end=end, **how)


def ranks_better(words, baseline, **kwargs):
    return claim(
        "On lists of twenty dishes with three relevant ones, IRPO reaches a higher NDCG@10 than "
        f"{words}, after equal steps on the same lists",
        "ndcg_10",
        "irpo",
        ">",
        baseline,
        margin=0.02,
        **kwargs,
    )


CLAIMS = [
    ranks_better(
        "DPO on one pair of each list",
        "dpo",
        kind="primary",
        world="ranking, sparse lists",
        matched="lists, steps",
    ),
    ranks_better("softmax-DPO on one relevant and all irrelevant dishes", "softmax_dpo"),
    ranks_better("DPO on all pairs of different relevance", "all_pairs", expect="inconclusive"),
    ranks_better("the same loss with weights by position alone", "position"),
    claim(
        "On such lists, IRPO's scores keep their order when the list is shuffled: the rank "
        "correlation exceeds 0.9",
        "agreement",
        "irpo",
        ">",
        0.9,
    ),
]
