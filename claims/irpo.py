"""What IRPO claims, and whether it holds here.

The data are lists of ten dishes in one context, five of them relevant in grades of 1 to 3. Every
arm is trained on the same lists, and NDCG is measured on held-out lists. Softmax-DPO
(arXiv:2406.09215) compares one relevant item with all irrelevant ones, and DPO compares it with one
of them; both are IRPO's loss on a part of the list. A further baseline is the mean of DPO's loss
over all pairs of different relevance.

The arm with weights by position alone is a control: it shows whether the gain 2^y - 1 helps. In all
arms the policy stops writing lists, since only items are scored, so the reward of sampled lists
falls while NDCG rises.
"""

from types import SimpleNamespace

import torch

from data import collate
from lab.claims import claim
from methods import irpo, tpo


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


@torch.no_grad()
def shuffled_agreement(policy, reference, rows, tokenizer, rng):
    """Mean rank correlation (Spearman) of the item scores of each list in two orders."""

    def places(rows):
        batch = collate(rows, tokenizer)
        gain = (policy.logps(batch) - reference.logps(batch)).sum(-1)
        return (gain / batch.mask.sum(-1)).argsort(1).argsort(1).double()

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
        return lab.rows(
            with_roles(lab.world.lists(lab.prompts, lab.rng("lists")), lab.rng("roles"))
        )

    def end(lab, policy):
        held_out = lab.world.lists(256, lab.rng("held out"))
        order = (lab.world.tokenizer, lab.rng("shuffle"))
        agreement = shuffled_agreement(policy, lab.reference, held_out, *order)
        return lab.world.measure(policy, lab) | {"agreement": agreement}

    how = dict(world="ranking", steps=200, batch_size=32, lr=2e-3, prompts=6400)
    return lab.race(arms, data, watch=lambda policy, step: {}, end=end, **how)


CLAIMS = [
    claim(
        "On lists in context, IRPO reaches a higher NDCG@10 than DPO on the same lists",
        "ndcg_10",
        "irpo",
        ">",
        "dpo",
        margin=0.02,
        kind="primary",
        world="ranking",
        matched="steps",
    ),
    claim(
        "The scores of IRPO's policy keep their order when the list is shuffled: the rank "
        "correlation exceeds 0.9",
        "agreement",
        "irpo",
        ">",
        0.9,
    ),
]
for metric in ("ndcg_1", "ndcg_10"):
    name = metric.upper().replace("_", "@")
    CLAIMS += [
        claim(
            f"IRPO, which compares relevant items, reaches a higher {name} than softmax-DPO",
            metric,
            "irpo",
            ">",
            "softmax_dpo",
            margin=0.02,
        ),
        claim(
            f"Softmax-DPO, with all irrelevant items, reaches a higher {name} than DPO with one",
            metric,
            "softmax_dpo",
            ">",
            "dpo",
            margin=0.02,
        ),
        claim(
            f"IRPO reaches a higher {name} than a loss on all pairs of different relevance",
            metric,
            "irpo",
            ">",
            "all_pairs",
            margin=0.02,
            expect="inconclusive",
        ),
        claim(
            f"The gain of the relevance helps: IRPO reaches a higher {name} than with weights by "
            "position alone",
            metric,
            "irpo",
            ">",
            "position",
            expect="inconclusive",
        ),
    ]
