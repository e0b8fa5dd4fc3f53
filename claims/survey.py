"""What the survey's losses do on the same pairs, in a tree and on reviews.

All losses are trained on the same 2,000 pairs in an exact tree of short responses (toy/tree.py).
The twelve that the claims are about are also trained for 40 steps on the same pairs of reviews,
which are the best and the worst of four samples. At one beta they end at different KLs, so rewards
in the tree are compared at matched KL. Some losses are also trained in the tree on length-biased
labels and on labels of which 30 % are flipped. A table of all losses and the taxonomy is written to
survey.txt, a plot to survey.png. The values, optima and limits of the losses are tests
(tests/methods/test_survey.py).

Not reproduced on tuning seeds 100 to 102:
1. With 30 % flips, none of rDPO, DPO and cDPO is reliably ahead; at matched KL they are equal.
2. The order of the losses by reward in the tree is not that on reviews.
"""

import math

import torch

from lab.claims import at_kl, claim
from lab.evaluate import interval
from lab.report import number, table
from methods.survey import FREE, TAXONOMY, VARIANTS, Config, loss, widest_pairs
from toy import tree

TEN = "dpo cdpo ipo bco nca sppo cal_dpo exo simpo simper".split()  # smooth, without alpha-DPO
ON_REVIEWS = [*TEN, "kto", "cpo"]
BIASED = dict(n=20000, length_bias=0.5)
FLIPPED = dict(flip=0.3, steps=300, lr=0.05)
IN_TREE = {name: dict(cfg=Config(name)) for name in VARIANTS}
IN_TREE |= {
    "dpo, length-biased": dict(cfg=Config("dpo", 1.0), **BIASED),
    "r_dpo, length-biased": dict(cfg=Config("r_dpo", 1.0, alpha=1.0), **BIASED),
    "dpo, flipped": dict(cfg=Config("dpo"), **FLIPPED),
    "cdpo, flipped": dict(cfg=Config("cdpo", epsilon=0.1), **FLIPPED),
    "rdpo, flipped": dict(cfg=Config("rdpo", epsilon=0.3), **FLIPPED),
}


def in_tree(lab, cfg, n=2000, steps=150, lr=0.02, **labels):
    """A tree of the seed's own, trained on all of n pairs in every step -> the policy.

    labels: as in `tree.World.labelled`. Its curve has what `tree.World.exact` measures, the mean
    log-ratios of the chosen and the rejected responses, and the accuracy: the share of pairs whose
    better response, by the truth, gained more log-probability than the other.
    """
    world = tree.World(lab.settings.seed)
    pairs = world.drawn(n, lab.rng, **labels)
    policy, batch, index = world.model(), world.batch(pairs), world.index[pairs]
    ref_logps, truth = policy.scores(index).detach(), world.truth[0][pairs]
    gap = truth[:, 0] - truth[:, 1]
    batch.scores[:, 0] = gap.abs().clamp(min=1e-6)  # odpo's grades, whichever is better

    @torch.no_grad()
    def watch(policy, step):
        ratio = (policy.scores(index) - ref_logps).sum(-1)  # (n, 2)
        right = (ratio[:, 0] - ratio[:, 1]) * gap
        means = {
            "accuracy": ((right > 0) + 0.5 * (right == 0)).double().mean(),
            "chosen_ratio": ratio[:, 0].mean(),
            "rejected_ratio": ratio[:, 1].mean(),
        }
        return world.exact(policy) | {name: value.item() for name, value in means.items()}

    def objective(policy, batch):
        return loss(policy.scores(index), ref_logps, batch, cfg)

    return lab.fit(policy, [batch], objective, steps=steps, lr=lr, watch=watch)


def reward_at(curve, kl=0.5):
    """The reward where a curve first reaches a KL; nan where it never does."""
    reached = max(look["kl"] for look in curve) >= kl
    return at_kl(curve, "reward", kl) if reached else math.nan


def rank_correlation(x, y):
    """Spearman's rank correlation of two lists, without the places where one is nan."""
    from scipy.stats import spearmanr

    return float(spearmanr(x, y, nan_policy="omit").statistic)


def measure(lab):
    """Curves in the tree and on reviews, and for each seed the comparisons of twelve losses."""
    arms = {name: lambda lab, how=how: in_tree(lab, **how) for name, how in IN_TREE.items()}
    curves = lab.race(arms, world="tree", eval_every=10, clip=1e6)
    arms = {
        f"{name}, reviews": (loss, Config(name), dict(reference=None if name in FREE else "start"))
        for name in ON_REVIEWS
    }
    curves |= lab.race(
        arms,
        data=widest_pairs,
        watch=lambda policy, step: {},
        end=lambda lab, policy: lab.evaluate(policy),
        world="reviews",
        steps=40,
        batch_size=16,
        eval_size=128,
        prompts=1024,
    )
    compared = {"spread of ten": [], "ranks of chosen": [], "ranks of rewards": []}
    for i in range(len(lab.seeds)):
        rewards = {name: reward_at(curves[name][i]) for name in ON_REVIEWS}
        chosen = [curves[name][i][-1]["chosen_ratio"] for name in ON_REVIEWS]
        reviews = [curves[f"{name}, reviews"][i][-1] for name in ON_REVIEWS]
        some = [rewards[name] for name in TEN]
        compared["spread of ten"].append(max(some) - min(some))
        ranks = rank_correlation(chosen, [last["chosen_logp"] for last in reviews])
        compared["ranks of chosen"].append(ranks)
        ranks = rank_correlation(list(rewards.values()), [last["reward"] for last in reviews])
        compared["ranks of rewards"].append(ranks)
    return curves | compared


# ---------------------------------------------------------------- pages


def ranked(series):
    """A table of all losses, sorted by reward at a KL of 0.5: means and half of 95 % intervals.

    The right part is measured on reviews, where a loss was trained there.
    """
    metrics = ["reward", "kl", "length", "accuracy", "chosen_ratio", "rejected_ratio"]
    on_reviews = ["reward", "kl", "length", "chosen_logp"]
    rows = []
    for name in VARIANTS:
        curves, reviews = series[name], series.get(f"{name}, reviews", [])
        values = [[reward_at(curve) for curve in curves]]
        values += [[curve[-1][metric] for curve in curves] for metric in metrics]
        values += [[curve[-1][metric] for curve in reviews] or [math.nan] for metric in on_reviews]
        rows.append((name, values, [sum(each) / len(each) for each in values]))
    rows.sort(key=lambda row: -row[2][0] if math.isfinite(row[2][0]) else math.inf)
    cells = [
        [name, *(number(m if math.isfinite(m) else None, interval(v)) for m, v in zip(means, each))]
        for name, each, means in rows
    ]
    head = ["loss", "reward at KL 0.5", *metrics, *(f"{metric}, reviews" for metric in on_reviews)]
    return table(cells, head)


def picture(series, world):
    """Reward against KL: paths in the tree below the largest reward at each KL, ends on reviews."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(15, 6), layout="constrained")
    left, right = figure.subplots(1, 2)
    best = [world.exact(world.optimum(world.reference, 0.2 * 1.1**i)) for i in range(50)]
    left.plot(*([x[m] for x in best] for m in ("kl", "reward")), "k--", label="largest")
    for i, name in enumerate(VARIANTS):
        color = f"C{i % 10}"
        path = ([look[m] for look in series[name][0]] for m in ("kl", "reward"))
        style = dict(color=color, ls=("-", ":", "-.", "--")[i // 10], marker="osD^"[i // 10])
        left.plot(*path, **style, markevery=[-1], label=name)
        if name in ON_REVIEWS:
            ends = [curve[-1] for curve in series[f"{name}, reviews"]]
            point = (sum(end[m] for end in ends) / len(ends) for m in ("kl", "reward"))
            right.plot(*point, "osD^"[i // 10], color=color)
    axes = dict(xlabel="KL from the reference (nats)", ylabel="true reward")
    left.set(title="tree, exact, one seed", xlim=(0, 3), **axes)
    right.set(title="reviews (some ends lie outside)", xlim=(0, 4), ylim=(-0.2, 0.8), **axes)
    outside = dict(loc="center left", bbox_to_anchor=(1, 0.5))
    lines = left.get_legend_handles_labels()
    right.legend(*lines, frameon=False, ncols=2, fontsize="small", **outside)
    return figure


def report(lab, series):
    """The table of all losses with the survey's taxonomy, and the picture."""
    return {
        "survey.txt": ranked(series) + "\n" + TAXONOMY.rstrip(),
        "survey.png": picture(series, tree.World(lab.seeds[0])),
    }


# ---------------------------------------------------------------- statements


def moves(name, relation, words, margin):
    return claim(
        f"In the tree, {name} {words} the log-probability of the chosen responses",
        "chosen_ratio",
        name,
        relation,
        0.0,
        margin=margin,
    )


def length_biased(text, metric, relation, margin, **options):
    return claim(
        f"In the tree with length-biased labels, R-DPO with the slope of the bias {text} than DPO",
        metric,
        "r_dpo, length-biased",
        relation,
        "dpo, length-biased",
        margin=margin,
        **options,
    )


CLAIMS = [
    claim(
        "In the tree at a KL of 0.5, the true rewards of ten smooth losses differ by less than "
        "0.2 standard deviations of the base model's reward",
        None,
        "spread of ten",
        "<",
        0.2,
        kind="primary",
        world="tree",
        matched="KL 0.5",
    ),
    *(moves(name, "<", "lowers", 1.5) for name in ("dpo", "kto")),
    *(moves(name, ">", "raises", 0.05) for name in ("sppo", "cpo")),
    claim(
        "Of twelve losses, those that raise or lower the log-probability of chosen responses in "
        "the tree do so on reviews: the rank correlation exceeds 0.5",
        None,
        "ranks of chosen",
        ">",
        0.5,
        margin=0.1,
    ),
    claim(
        "The order of twelve losses by true reward at a KL of 0.5 in the tree is that of their "
        "rewards on reviews: the rank correlation exceeds 0.5",
        None,
        "ranks of rewards",
        ">",
        0.5,
        expect="reversed",
    ),
    length_biased("has a higher true reward at matched KL", "reward", ">", 0.02, at_kl=0.5),
    length_biased("ends with shorter responses", "length", "<", 0.2),
    *(
        claim(
            f"In the tree with 30 % flipped labels, {name} has a higher true reward than DPO at "
            "matched KL",
            "reward",
            f"{name.lower()}, flipped",
            ">",
            "dpo, flipped",
            at_kl=0.5,
            margin=0.1,
            expect="no effect",
        )
        for name in ("rDPO", "cDPO")
    ),
    claim(
        "In the tree, DiscoPOP as published learns the opposite of the preferences: its accuracy "
        "falls below 0.5",
        "accuracy",
        "disco_pop",
        "<",
        0.5,
        margin=0.2,
    ),
]
