"""What the study claims about SFT, instruction tuning and few pairs, and whether it holds here.

Tree: five losses are trained on 100 to 8,000 pairs from three models. These are the world's own
(base), one after SFT on 2,000 answers of a better tree (sft), and one after longer SFT on 8,000
answers of a far better tree (instruct). Beta is the same everywhere, so KLs differ; the table shows
them. Reviews: DPO is trained from the base model and after SFT.

Not reproduced:
1. That DPO needs SFT as much as IPO, on tuning seeds 100 to 105. In the tree, DPO gains little from
   SFT and IPO much, since a policy with separate logits for every prefix reaches the same
   log-ratios from any reference. On reviews DPO and CPO gain from SFT, which has seen 1,024 more
   prompts.
2. That 100 pairs are always nearly as good as 8,000: KTO lost more reward on the same seeds than
   the margin of the claims, DPO and CPO did not.
"""

from dataclasses import replace

import torch

from lab.claims import claim
from methods import insights
from methods.insights import SCENARIOS, VARIANTS, Config
from toy import tree

SIZES = (100, 500, 2000, 8000)


def tilted(lab, world, name, tilt, n):
    """n answers sampled from another random tree, whose probabilities are tilted by exp(tilt r)."""
    other = tree.random_tree(int(torch.randint(2**31, (), generator=lab.rng("tree", name))))
    return world.draw(world.optimum(other, 1 / tilt), n, lab.rng("answers", name))


def trained(lab, world, start, pairs, cfg, steps=150):
    """A copy of a tree trained on all pairs (n, 2) in every step; kto's z is the exact KL."""
    policy, batch, index = world.model(), world.batch(pairs), world.index[pairs]
    policy.load_state_dict(start.state_dict())
    ref_logps = start.scores(index).detach()

    def objective(model, batch):
        point = replace(cfg, z0=max(model.kl(start), 0.0)) if cfg.variant == "kto" else cfg
        return insights.loss(model.scores(index), ref_logps, batch, point)

    def adam(params):
        return torch.optim.Adam(params, lr=0.03)

    return lab.fit(policy, [batch], objective, steps=steps, optimizer=adam)


def starts(lab, world):
    """{scenario: tree}: the world's own tree, and two after SFT on better answers."""
    found = {"base": world.model()}
    for name, n, tilt, steps in (("sft", 2000, 1.0, 60), ("instruct", 8000, 2.0, 120)):
        shown = tilted(lab, world, name, tilt, n)[:, None].expand(-1, 2)  # nll reads the first
        found[name] = trained(lab, world, world.model(), shown, Config("nll"), steps)
    return found


def study(lab, world, sizes=SIZES, steps=150):
    """{(pairs, scenario, variant): {reward, kl, unseen}} of every alignment.

    kl: the KL from the reference, the tree of the scenario. unseen: the probability of answers that
    are in no pair. The entries with 0 pairs are the references. A pair has two answers from a pool
    that three other trees, from weak to strong, have sampled.
    """
    begin, n, found = starts(lab, world), max(sizes), {}
    pool = [tilted(lab, world, f"pool {tilt}", tilt, n) for tilt in (0.3, 1.0, 2.0)]
    pool = torch.cat(pool)
    chosen = torch.randperm(len(pool), generator=lab.rng("pool"))[: 2 * n]
    first, second = pool[chosen].view(2, n)
    pairs = world.labelled(first, second, lab.rng("labels"), sharpness=3.0)
    for scenario, start in begin.items():
        found[0, scenario, "start"] = {"reward": start.expect(world.truth)}
        for size in sizes:
            for name in VARIANTS:
                cfg = Config(name, ipo_mean=False) if name == "ipo" else Config(name)
                policy = trained(lab, world, start, pairs[:size], cfg, steps)
                seen = torch.zeros_like(world.truth[0]).index_fill_(0, pairs[:size].flatten(), 1.0)
                found[size, scenario, name] = {
                    "reward": policy.expect(world.truth),
                    "kl": policy.kl(start),
                    "unseen": policy.expect(1 - seen),
                }
    return found


def page(studies):
    """The table of the studies, means over seeds, with one line per size and scenario."""

    def mean(*key, measure="reward"):
        return f"{sum(found[key][measure] for found in studies) / len(studies):7.2f}"

    titles = {"reward": "true reward", "kl": "KL from the start", "unseen": "unseen answers"}
    lines = [" " * 15 + "".join(f" |{title:>{7 * len(VARIANTS)}}" for title in titles.values())]
    names = " |" + "".join(f"{name:>7}" for name in VARIANTS)
    lines.append(f"{'pairs':>5} {'start':9}" + names * len(titles))
    lines += [f"{0:5} {scenario:9} |{mean(0, scenario, 'start')}" for scenario in SCENARIOS]
    for size, scenario in (key[:2] for key in studies[0] if key[2] == "dpo"):
        cells = ""
        for measure in titles:
            row = [mean(size, scenario, name, measure=measure) for name in VARIANTS]
            cells += " |" + "".join(row)
        lines.append(f"{size:5} {scenario:9}{cells}")
    return "\n".join(lines)


def measure(lab):
    """Rewards in the tree by loss, scenario and size, their differences, and DPO on reviews."""
    series, studies = {}, []
    for seed in lab.seeds:
        here = lab.at(seed=seed, world="tree", warmup=0, clip=1e6)
        found = study(here, tree.World(seed))
        studies.append([[*key, row] for key, row in found.items()])
        for name, value in summary(found).items():
            series.setdefault(name, []).append(value)

    def after_sft(lab):
        policy, rows = lab.base(), lab.pairs(lab.base())
        policy = insights.begun(lab, policy, "sft")
        return lab.align(policy, rows, insights.loss, Config())

    arms = {"reviews, base": (insights.loss, Config()), "reviews, sft": after_sft}
    how = dict(world="reviews", steps=60, prompts=3840, eval_every=60, eval_size=1000)
    return series | lab.race(arms, **how) | {"studies": studies}


def summary(found):
    """{series: number} of one study: means over sizes, gains, and gaps of few to all pairs."""
    out = {}

    def mean(name, scenario, measure="reward"):
        rows = [row for key, row in found.items() if key[1:] == (scenario, name)]
        return sum(row[measure] for row in rows) / len(rows)

    for name in VARIANTS:
        for scenario in SCENARIOS:
            out[f"{name}, {scenario}"] = mean(name, scenario)
            out[f"unseen: {name}, {scenario}"] = mean(name, scenario, "unseen")
            for few in (100, 500):
                whole, part = (found[size, scenario, name]["reward"] for size in (8000, few))
                out[f"lack: {name}, {scenario}, {few}"] = whole - part
                out[f"gap: {name}, {scenario}, {few}"] = abs(whole - part)
        out[f"gain from sft: {name}"] = mean(name, "sft") - mean(name, "base")
        out[f"gap of sft: {name}"] = abs(out[f"gain from sft: {name}"])
        out[f"gain from instruct: {name}"] = mean(name, "instruct") - mean(name, "sft")
    return out


def report(lab, series):
    """The table of all alignments in the tree."""
    studies = [{tuple(entry[:3]): entry[3] for entry in found} for found in series["studies"]]
    return {"insights.txt": page(studies)}


def above(text, ours, baseline, margin=0.1, metric=None, **options):
    return claim(text, metric, ours, ">", baseline, margin=margin, **options)


CLAIMS = [
    above(
        "On reviews, DPO ends with a higher true reward after SFT than from the base model, after "
        "equal steps",
        "reviews, sft",
        "reviews, base",
        metric="reward",
        kind="primary",
        world="reviews",
        matched="steps",
    ),
    above(
        "In the tree, IPO has a higher reward after SFT than without it",
        "ipo, sft",
        "ipo, base",
        0.05,
    ),
    above(
        "In the tree, IPO gains more reward from SFT than DPO",
        "gain from sft: ipo",
        "gain from sft: dpo",
        0.05,
    ),
    *(
        above(
            f"In the tree, {name.upper()} has a higher reward after SFT than without it",
            f"{name}, sft",
            f"{name}, base",
            expect="no effect",
        )
        for name in ("kto", "cpo")
    ),
    *(
        above(
            f"In the tree, {name.upper()} has a higher reward on 8,000 pairs than 500 after SFT",
            f"lack: {name}, sft, 500",
            0.0,
            expect="no effect",
        )
        for name in ("dpo", "kto", "cpo")
    ),
    above(
        "In the tree, IPO gains more from an instruction-tuned model than DPO",
        "gain from instruct: ipo",
        "gain from instruct: dpo",
        0.03,
    ),
    above(
        "In the tree, CPO has a higher reward than SFT on its chosen responses",
        "cpo, sft",
        "nll, sft",
        0.02,
    ),
]
