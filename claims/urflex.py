"""What UnifiedReward-Flex claims, and whether it holds here.

The judge: on verdicts, a small GPT is trained by SFT on traces of a teacher who errs in a fifth of
his words, and in stage 2 by 200 steps of DPO on pairs of its own traces. Sampled and greedy traces
are measured on 1,000 held-out questions; the yardsticks are one rubric for all requests and the
true weights, which read the same digits.

The generator: on glyphs, 40 rounds of GRPO with the verdicts of that judge or of the fixed rubric.
`utility` is what the annotators think, which no arm sees. `own_lost` is how much less often the
judge is right than the true weights, on pairs of the generator's own drawings, which are harder
questions where drawings grow alike.

What theory expects:
1. Sampled traces repeat the teacher's noise and greedy ones do not, so stage 2 sharpens what SFT
   has learned, and hardly changes greedy verdicts.
2. In expectation, the rubric is right in 78 % of the questions about scores without error (a test
   has the closed form). Where the criteria do not conflict, it drives a generator as well in the
   mean, and may neglect a kind of request.
3. A judge that is exploited loses more on the generator's drawings after GRPO. Its share of wins
   over the base model would not show that, since errors pull every share towards one half.

On tuning seed 100, stage 2 made sampled verdicts and reasons right four times in five instead of
about two in three, and left greedy verdicts as they were, almost as good as the true weights; the
rubric was clearly behind. GRPO raised the utility, most of all in the worst context, while the
Frechet distance grew about tenfold. The judge lost less after GRPO than before, so it was not
exploited. The margin of this claim is 0.05, above the noise that 256 drawings leave on one seed.
"""

from lab.claims import claim
from methods import urflex
from toy import verdicts

GENERATORS = {
    "flex": urflex.Config(),
    "fixed": urflex.Config(critic="fixed"),
}
HOW = dict(world="glyphs", prompts=8, batch_size=36, steps=80, lr=3e-4, eval_every=40)


def generator(cfg):
    """An arm of the race; its last point has what is measured of the trained judge."""

    def arm(lab):
        there, judge = urflex.judge_of(lab, cfg)
        policy = urflex.driven(lab, cfg, there, judge)
        if cfg.critic == "flex":
            found = there.stage("judge", lambda: there.world.measure(judge, there))
            policy.curve[-1] |= {f"of the judge, {name}": value for name, value in found.items()}
        return policy

    return arm


def before_stage_2(lab):
    """What is measured of the judge after SFT, on the same questions."""
    there = lab.at(world=verdicts.World())
    return there.stage("judge", lambda: there.world.measure(there.base(), there))


def measure(lab):
    """Numbers of two judges, and curves of generators that two judges drive."""
    curves = lab.race({name: generator(cfg) for name, cfg in GENERATORS.items()}, **HOW)
    series = {f"generator {name}": curve for name, curve in curves.items()}
    first = [before_stage_2(lab.at(seed=seed, base_seed=seed)) for seed in lab.seeds]
    flex = [
        {name: curve[-1].pop(f"of the judge, {name}") for name in first[0]}
        for curve in curves["flex"]
    ]
    series |= {"judge sft": first, "judge flex": flex}
    series["fixed_rubric"] = [each["fixed_rubric"] for each in flex]
    for name, found in (("sft", first), ("flex", flex)):
        series[f"judge {name}, greedy"] = [each["greedy"] for each in found]
    for when, look in (("before", 0), ("after", -1)):
        series[f"own_lost, {when}"] = [curve[look]["own_lost"] for curve in curves["flex"]]
    return series


def report(lab, series):
    """A picture of the truth and of the judge's errors during GRPO, one line per arm and seed.

    Besides, tables of the means over the seeds: of the judge before and after stage 2 beside both
    yardsticks, and of the generators at their last look.
    """
    from matplotlib.figure import Figure

    from lab.report import rows_of

    def means(found, keys):
        return {key: sum(each[key] for each in found) / len(found) for key in keys}

    said = ("overall", "reasons", "leader", "valid", "greedy")
    judges = {f"judge {name}": means(series[f"judge {name}"], said) for name in ("sft", "flex")}
    for name in ("fixed_rubric", "known_weights"):  # they write no traces
        judges[name] = {"greedy": means(series["judge flex"], [name])[name]}
    ends = {name: [curve[-1] for curve in series[f"generator {name}"]] for name in GENERATORS}
    last = ("utility", "worst_context", "judge_wins", "true_wins", "own_lost", "frechet_256")
    ends = {f"generator {name}": means(found, last) for name, found in ends.items()}

    figure = Figure(figsize=(12, 4), layout="constrained")
    panels = ("utility", "worst_context", "judge_right", "own_lost")
    for axes, metric in zip(figure.subplots(1, 4), panels):
        for i, name in enumerate(GENERATORS):
            for n, curve in enumerate(series[f"generator {name}"]):
                points = [(point["step"], point[metric]) for point in curve]
                axes.plot(*zip(*points), "o-", ms=3, color=f"C{i}", label=None if n else name)
        axes.set_title(metric, fontsize=10)
        axes.set_xlabel("step")
    axes.legend(frameon=False, fontsize=8)
    return {
        "truth and judge.png": figure,
        "judges.txt": rows_of(judges),
        "generators after GRPO.txt": rows_of(ends),
    }


CLAIMS = [
    claim(
        "On verdicts, a judge that weighs the criteria of each request is right more often than "
        "one rubric for all requests",
        None,
        "judge flex, greedy",
        ">",
        "fixed_rubric",
        margin=0.03,
        kind="primary",
        world="verdicts",
        matched="measurements",
    ),
    claim(
        "On verdicts, DPO on pairs of its own traces makes the verdicts of a judge's sampled "
        "traces right more often than SFT alone",
        "overall",
        "judge flex",
        ">",
        "judge sft",
        margin=0.05,
    ),
    claim(
        "On verdicts, DPO on its own traces makes a judge's greedy verdicts right more often",
        None,
        "judge flex, greedy",
        ">",
        "judge sft, greedy",
        margin=0.02,
        expect="no effect",
    ),
    claim(
        "On glyphs, GRPO with the judge raises the annotators' utility more than GRPO with one "
        "rubric for all prompts",
        "utility",
        "generator flex",
        ">",
        "generator fixed",
        margin=0.1,
        expect="inconclusive",
    ),
    claim(
        "On glyphs, GRPO with the judge raises the utility of the worst kind of prompt more than "
        "GRPO with one rubric for all prompts",
        "worst_context",
        "generator flex",
        ">",
        "generator fixed",
        margin=0.1,
        expect="inconclusive",
    ),
    claim(
        "On glyphs, on pairs of the generator's own drawings, what the judge loses to the true "
        "weights, which read the same digits, is more after GRPO than before",
        None,
        "own_lost, after",
        ">",
        "own_lost, before",
        margin=0.05,
        expect="no effect",
    ),
]
