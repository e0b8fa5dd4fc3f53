"""What RankDPO claims, and whether it holds here.

On scenes, four generators (the base model at four scales of guidance) draw an image each for 1,024
prompts, and five reward models with different faults vote on every list. All arms take 200 steps of
32 lists: RankDPO; the weight by gain alone; all pairs alike; noise that is shared in a list; the
votes of one reward model, the best by itself; random votes; Diffusion-DPO on one random pair of
each list, and on its best and worst image, whose noise is shared as usual. The true reward and the
Frechet distance of 512 samples are measured every 40 steps. Two arms are compared at the largest
Frechet distance that both of them reach, since equal steps are not equal distances.

What theory expects: six pairs of a list share four evaluations of the network, so a list teaches
more per step than a pair, and most of that is common to all weights. Independent noise averages
over draws that a shared one repeats. In trials on two seeds, with lists of one generator, the five
raters led the best single one and the pairs by about a tenth of the reward, best and worst cost two
to three times the distance, so did shared noise, all pairs alike were as good as the weights, and
random votes taught nothing.
"""

from types import SimpleNamespace

import torch

from lab.claims import at, claim
from methods import rankdpo

STEPS, EVERY, SAMPLES = 200, 40, 512
ALIKE = rankdpo.Config(weights="none")
# {arm: (Config, the column of votes or roles, whether the noise is shared)}
ARMS = {
    "rankdpo": (rankdpo.Config(), "scores", False),
    "gain": (rankdpo.Config(weights="gain"), "scores", False),
    "all pairs": (ALIKE, "scores", False),
    "shared noise": (rankdpo.Config(), "scores", True),
    "one rater": (rankdpo.Config(), "one", False),
    "random votes": (rankdpo.Config(), "random", False),
    "one pair": (ALIKE, "pair", True),
    "best and worst": (ALIKE, "extremes", True),
}


def judged(column):
    """RankDPO's loss with the phi of a column; an image with a negative one is left out."""

    def loss(logps, ref_logps, batch, cfg):
        phi = getattr(batch, column)
        kept = SimpleNamespace(mask=batch.mask & (phi >= 0)[..., None], scores=phi.clamp(min=0))
        return rankdpo.loss(logps, ref_logps, kept, cfg)

    return loss


def parts(row, rng):
    """The columns `pair` and `ends` of a list: its phi, or -1 for the images that are left out.

    A pair has different phi where the list has; a pair of ties teaches nothing.
    """
    phi = row["scores"]
    draw = torch.randperm(len(phi), generator=rng).tolist()
    first, *rest = draw
    other = next((i for i in rest if phi[i] != phi[first]), rest[0])
    order = sorted(draw, key=lambda i: phi[i])
    kept = {"pair": (first, other), "extremes": (order[0], order[-1])}
    return {
        name: [p if i in two else -1.0 for i, p in enumerate(phi)] for name, two in kept.items()
    }


def lists(lab, policy):
    """Rows whose scores are the votes of all raters, with the columns of the other arms."""
    rows, rng = rankdpo.ranked(lab, policy, rankdpo.Config()), lab.rng("parts")
    truth = torch.tensor([row["reward"] for row in rows])
    for raters in ("one", "random"):
        votes = rankdpo.ratings(lab, rows, truth, rankdpo.Config(raters=raters))
        phi = rankdpo.win_counts(votes).tolist()
        rows = [row | {raters: each} for row, each in zip(rows, phi)]
    return [row | parts(row, rng) for row in rows]


def arm(cfg, column, shared):
    """An arm of the race; its curve has the true reward and the Frechet distance."""

    def run(lab):
        policy = lab.base()
        key = ["lists of rankdpo", policy.fingerprint, lab.settings.seed, lab.prompts]
        rows = lab.cached(key, lambda: lists(lab, policy))

        def prepare(policy, batch):
            return policy.prepare(batch, lab.rng("noise", lab.step), shared=shared)

        def watch(policy, step):
            rng = lab.eval_rng("samples")
            prompts = lab.world.prompts(lab.few(SAMPLES, 16), rng)
            images = torch.cat([r["responses"] for r in lab.sample(policy, prompts, 1, rng)])
            reward = lab.world.reward(prompts, images).mean().item()
            return {"reward": reward, "frechet": lab.world.frechet(images)}

        return lab.align(policy, rows, judged(column), cfg, prepare=prepare, watch=watch)

    return run


def matched(ours, other):
    """The rewards of two curves at the largest Frechet distance that both of them reach."""
    most = min(max(point["frechet"] for point in curve) for curve in (ours, other))
    unit = {"reward_sd": ours[0]["reward_sd"]} if "reward_sd" in ours[0] else {}
    return [{"reward": at(curve, "frechet", most, "reward")} | unit for curve in (ours, other)]


def measure(lab):
    """Curves of all arms, and the rewards of RankDPO and each other arm at a matched distance."""
    how = dict(world="scenes", steps=STEPS, eval_every=EVERY, k=4)
    curves = lab.race({name: arm(*about) for name, about in ARMS.items()}, **how)
    series = dict(curves)
    for name in list(ARMS)[1:]:
        both = [matched(*two) for two in zip(curves["rankdpo"], curves[name])]
        series[f"rankdpo, against {name}"], series[f"{name}, matched"] = map(list, zip(*both))
    return series


def report(lab, series):
    """A picture of reward against Frechet distance, one line per arm and seed."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, name in enumerate(ARMS):
        for n, curve in enumerate(series[name]):
            points = [(point["frechet"], point["reward"]) for point in curve]
            axes.plot(*zip(*points), "o-", ms=3, color=f"C{i}", label=None if n else name)
    axes.set_xlabel("Frechet distance to the renders")
    axes.set_ylabel("true reward")
    axes.legend(frameon=False, fontsize=8)
    return {"reward and Frechet distance.png": figure}


def better(words, baseline, **kwargs):
    """A claim that RankDPO has more reward than another arm at a matched Frechet distance."""
    return claim(
        "On scenes, at a matched Frechet distance, RankDPO on lists of four images has a higher "
        f"true reward than {words}",
        "reward",
        f"rankdpo, against {baseline}",
        ">",
        f"{baseline}, matched",
        margin=0.1,
        **kwargs,
    )


CLAIMS = [
    better(
        "Diffusion-DPO on one random pair of each list",
        "one pair",
        kind="primary",
        world="scenes",
        matched="Frechet distance, lists",
    ),
    better("Diffusion-DPO on the best and the worst image of each list", "best and worst"),
    better("the same loss with all pairs weighted alike", "all pairs", expect="inconclusive"),
    better("the same loss weighted by gain alone", "gain", expect="inconclusive"),
    better("the same loss with noise that the images of a list share", "shared noise"),
    better("the same loss with the votes of the best reward model alone", "one rater"),
    claim(
        "On scenes, after 200 steps, RankDPO with the votes of five reward models has a higher "
        "true reward than with random votes",
        "reward",
        "rankdpo",
        ">",
        "random votes",
        margin=0.1,
        kind="control",
        expect="supported",
    ),
]
