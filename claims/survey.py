"""What the survey's losses do on the same pairs, on a tree and on reviews."""

import math

import torch

from data import interval, write_beside, write_text
from methods.survey import FREE, TAXONOMY, VARIANTS, Config, extremes, loss
from toy import tree


def on_tree(here, world, pairs, cfg, steps=150, lr=0.02):
    """A tree trained on all pairs (n, 2) at every step -> its exact curve; dw, dl: the changes of preferred and rejected log-probs."""
    policy, batch, index = world.model(), world.batch(pairs), world.index[pairs]
    before, truth = policy.scores(index).detach(), world.truth[0][pairs]
    batch.scores[:, 0] = (
        (truth[:, 0] - truth[:, 1]).abs().clamp(min=1e-6)
    )  # odpo's grades: how far apart, whichever is preferred

    @torch.no_grad()
    def watch(policy, step):
        change = (policy.scores(index) - before).sum(-1)
        right = (change[:, 0] - change[:, 1]) * (truth[:, 0] - truth[:, 1])
        means = {
            "accuracy": ((right > 0) + 0.5 * (right == 0)).double().mean(),
            "dw": change[:, 0].mean(),
            "dl": change[:, 1].mean(),
        }
        return world.exact(policy) | {name: value.item() for name, value in means.items()}

    here.fit(
        policy,
        [batch],
        lambda model, batch: loss(model.scores(index), before, batch, cfg),
        steps=steps,
        lr=lr,
        watch=watch,
    )
    return here.curve


def reward_at(curve, kl):
    """The reward where a curve first reaches a KL, by linear interpolation; nan where it never does."""
    for x, y in zip(curve, curve[1:]):
        if x["kl"] <= kl <= y["kl"]:
            return x["reward"] + (y["reward"] - x["reward"]) * (kl - x["kl"]) / max(
                y["kl"] - x["kl"], 1e-12
            )
    return math.nan


def ranked(exact, text, kl=0.5):
    """A table of {variant: [curve on the tree of a seed]} and {variant: [evaluation on text]}: means with half their 95 % interval."""
    names, shown = (
        ("reward", "kl", "length", "accuracy", "dw", "dl"),
        ("reward", "kl", "length", "chosen_logp"),
    )

    def cell(values):
        mean = sum(values) / len(values)
        half = f"+-{interval(values)[1] - mean:.3f}" if len(values) > 1 else ""
        return f"{mean:9.3f}{half:>8}" if math.isfinite(mean) else f"{'-':>17}"

    reached = {
        variant: [reward_at(curve, kl) for curve in curves] for variant, curves in exact.items()
    }
    head = [f"reward at {kl}", *names, *(f"text {n}" for n in shown)]
    lines = [f"{'variant':10}" + "".join(f"{name:>17}" for name in head)]
    for variant in sorted(
        exact, key=lambda v: sum(-x if math.isfinite(x) else math.inf for x in reached[v])
    ):
        cells = [reached[variant], *([curve[-1][n] for curve in exact[variant]] for n in names)]
        lines.append(
            f"{variant:10}"
            + "".join(map(cell, cells + [[run[n] for run in text[variant]] for n in shown]))
        )
    return "\n".join(lines)


def picture(path, exact, text, world):
    """Reward against KL: the paths on the tree, below the largest reward at that KL, and the ends on reviews (means over seeds)."""
    from matplotlib.figure import Figure

    fig = Figure(figsize=(15, 6), layout="constrained")
    left, right = fig.subplots(1, 2)
    best, names = (
        [world.exact(world.optimum(world.reference, 0.2 * 1.1**i)) for i in range(50)],
        ("kl", "reward"),
    )
    left.plot(*([x[n] for x in best] for n in names), "k--", label="largest")
    for i, variant in enumerate(exact):
        how = dict(color=f"C{i % 10}", label=variant)
        left.plot(
            *([x[n] for x in exact[variant][0]] for n in names),
            ls=("-", ":", "-.", "--")[i // 10],
            **how,
        )
        x, y = (sum(run[n] for run in text[variant]) / len(text[variant]) for n in names)
        right.plot(x, y, "osD^"[i // 10], **how)
    axes = dict(xlabel="KL from the reference (nats)", ylabel="true reward")
    left.set(title="tree, exact, one seed", xlim=(0, 3), **axes)
    right.set(title="reviews (some ends lie outside)", xlim=(0, 4), ylim=(-0.2, 0.8), **axes)
    right.legend(
        frameon=False, ncols=2, fontsize="small", loc="center left", bbox_to_anchor=(1, 0.5)
    )
    write_beside(path, lambda temporary: fig.savefig(temporary, format="png", dpi=110))


def reviewed(here):
    """Align on reviews by each variant, on the same pairs, the best and the worst of four samples -> {variant: its evaluation}."""
    data = here.rows(
        extremes(row)
        for row in here.preferences(here.base(), k=4)
        if max(row["scores"]) > min(row["scores"])
    )
    reference = {v: None if v in FREE else "start" for v in VARIANTS}
    return {
        v: here.evaluate(
            here.align(here.base(), data, loss, Config(v), reference[v], watch=lambda *_: {})
        )
        for v in VARIANTS
    }


def contests(here, world):
    """Where labels like length, are flipped, or are certain -> {name: (pairs, config, steps, lr)}."""
    long, fair = (world.drawn(20000, here.rng, length_bias=bias) for bias in (0.5, 0.0))
    flipped, certain = (
        world.drawn(2000, here.rng, flip=0.3),
        world.drawn(300, here.rng, sharpness=math.inf),
    )
    sides = {"long": (long, Config("dpo", 1.0)), "fair": (fair, Config("dpo", 1.0))}
    sides |= {f"long {a:+g}": (long, Config("r_dpo", 1.0, alpha=a)) for a in (1.0, -1.0)}
    sides |= {
        f"flips {v}": (flipped, Config(v, epsilon=e), 300, 0.05)
        for v, e in dict(dpo=None, cdpo=0.1, rdpo=0.3).items()
    }
    both = (Config("dpo", 1.0), Config("ipo", tau=1.0))
    return sides | {
        f"certain {cfg.variant} {steps}": (certain, cfg, steps)
        for cfg in both
        for steps in (50, 1600)
    }


def claim(lab):
    """On a tree, exact: some losses bury the preferred response (and do on reviews), others raise it; R-DPO with the labels' slope undoes
    their liking for length; certain labels drive DPO away without end; DiscoPOP as published lowers h, where its slope is positive.

    Not reproduced (tuning seeds 100 to 102). 30 % flips, 300 steps: rDPO ends at 0.813, 1.633, 0.833, DPO at 0.653, 1.669, 0.707, cDPO at
    0.389, 0.420, 1.005: it is a matter of when one stops, and at KL 0.5 they are one. Nor is the order of rewards there that on reviews
    (rank correlation 0.518, 0.324, 0.372). The bound of 0.15 on ten losses (0.103, 0.074, 0.103) fails on the reported seed 2: 0.166."""
    from scipy.stats import spearmanr

    claims, exact, ends, reviews = [], {name: [] for name in VARIANTS}, [], []
    for seed in lab.seeds:
        here, world = lab.at(seed=seed, world="tree", eval_every=10, clip=1e6), tree.World(seed)
        pairs = world.drawn(2000, here.rng)
        for name in VARIANTS:
            exact[name].append(on_tree(here, world, pairs, Config(name)))
        curves = {name: on_tree(here, world, *how) for name, how in contests(here, world).items()}
        curves |= {name: exact[name][-1] for name in VARIANTS}
        ends.append(
            {
                name: curve[-1] | {"reward at KL 0.5": reward_at(curve, 0.5)}
                for name, curve in curves.items()
            }
        )
        reviews.append(
            reviewed(
                lab.at(
                    seed=seed, world="reviews", steps=40, batch_size=16, eval_size=128, prompts=1024
                )
            )
        )
    text = {name: [run[name] for run in reviews] for name in reviews[0]}
    page = (
        ranked(exact, text)
        + "\n\n"
        + "\n".join(f"{branch}: {papers}" for branch, papers in TAXONOMY.items())
    )
    print(page)
    if lab.out:
        write_text(f"{lab.out}/survey.txt", page + "\n")
        picture(f"{lab.out}/survey.png", exact, text, tree.World(lab.seeds[0]))

    def say(what, metric, ours, baseline, **how):
        sides = [
            [x[side][metric] if isinstance(side, str) else side for x in ends]
            for side in (ours, baseline)
        ]
        claims.append(lab.compare(what, metric, *sides, **how))

    for name in ("dpo", "exo", "hinge", "kto"):
        say(f"{name}: the preferred log-prob falls", "dw", name, 0.0, margin=1.5, smaller=True)
    for name in ("sppo", "cal_dpo", "cpo", "orpo", "dpop"):
        say(f"{name}: it rises", "dw", name, 0.0, margin=0.05)
    say(
        "labels that like length: R-DPO with their slope has more reward than DPO",
        "reward",
        "long +1",
        "long",
        margin=0.1,
    )
    say("at equal KL, too", "reward at KL 0.5", "long +1", "long", margin=0.02)
    say("and is shorter", "length", "long +1", "long", margin=0.2, smaller=True)
    say(
        "with the other sign it has less reward than DPO",
        "reward",
        "long -1",
        "long",
        margin=0.1,
        smaller=True,
    )
    for name, metric in (("rdpo", "reward"), ("cdpo", "reward"), ("rdpo", "reward at KL 0.5")):
        say(
            f"30 % flips: {name} has more {metric} than dpo",
            metric,
            f"flips {name}",
            "flips dpo",
            expected=False,
        )
    say(
        "certain labels: the KL of DPO grows from step 50 to 1,600",
        "kl",
        "certain dpo 1600",
        "certain dpo 50",
        margin=2.0,
    )
    say("IPO's ends near where it was, at most 0.2", "kl", "certain ipo 1600", 0.2, smaller=True)
    say(
        "DiscoPOP turns the preferences round",
        "accuracy",
        "disco_pop",
        0.5,
        margin=0.2,
        smaller=True,
    )
    for i, x in enumerate(ends):
        some = [
            x[name]["reward at KL 0.5"]
            for name in "dpo cdpo ipo bco nca sppo cal_dpo exo simpo simper".split()
        ]
        pairs = dict(dw=[(x[v]["dw"], text[v][i]["chosen_logp"]) for v in VARIANTS])
        pairs["reward"] = [(x[v]["reward at KL 0.5"], text[v][i]["reward"]) for v in VARIANTS]
        x["band"] = {"width": max(some) - min(some)}
        x["ranks"] = {
            name: spearmanr(*zip(*both), nan_policy="omit").statistic
            for name, both in pairs.items()
        }
    say(
        "at KL 0.5 the rewards of ten smooth losses (not alpha-DPO) differ by less than 0.15",
        "width",
        "band",
        0.15,
        smaller=True,
    )
    say(
        "rank correlation of the preferred log-prob on the tree and on reviews: above 0.5",
        "dw",
        "ranks",
        0.5,
        margin=0.1,
    )
    say(
        "of the reward at KL 0.5 and that on reviews: above 0.5",
        "reward",
        "ranks",
        0.5,
        expected=False,
    )
    return claims
