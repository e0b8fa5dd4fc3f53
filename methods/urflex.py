"""UnifiedReward-Flex - Unified Personalized Reward Model for Vision Generation (2026),
arXiv:2602.02380

Reward models apply one rubric to every prompt. This judge reads a prompt and two images and writes
a trace: which criterion counts most, and which image wins each and overall. It is trained by SFT on
a teacher's traces, then by DPO on its own: a right verdict beats a wrong one, and among right ones
better reasons win. In GRPO of a generator, it judges all pairs of G images:

    R(i) = wins of i / (G - 1)             A = alpha norm(mean_d R_d) + (1-alpha) norm(R)
    rho = p / p_old of a step
    loss = mean_i max(-A_i rho_i, -A_i clip(rho_i, 1 - epsilon, 1 + epsilon))

R_d is R on criterion d; norm is over a group. The generator never sees `utility`, the annotators'
opinion.

Differences from the paper
1. The judge reads noisy measurements, not pixels.
2. Known reasons, not a larger model, rank two right traces.
3. The sampler is DDIM with eta, not a flow, and there is no CLIP reward.

    python train.py --method urflex                          the judge's accuracy, then the truth
    python train.py --method urflex --critic fixed,known,flex    one rubric, the right weights
"""

import itertools
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from data import Paper, check_fields, fill_variant, pair, upcast
from toy import verdicts

PAPER = Paper(
    "images",
    worlds=("images",),
    needs="criteria",
    ignores=("k", "flip", "label_temperature"),
    defaults=dict(world="glyphs", prompts=16, batch_size=72, steps=80, lr=3e-4, eval_every=20),
)
STAGE_2 = dict(judge_steps=200, judge_lr=5e-5, judge_beta=0.1, both_right=True)
CRITICS = dict(flex=STAGE_2, sft={}, fixed={}, known={})


@dataclass(frozen=True)
class Config:
    critic: str = "flex"  # flex; sft, before stage 2; fixed, equal weights; known, the true weights
    alpha: float = 0.7  # weight of the criteria's verdicts beside the overall one (sec. 3)
    epsilon: float = 1e-3  # clip range; small, since log p is a mean over pixels
    group: int = 8  # images per group; 9 in the paper
    sampler_steps: int = 10  # steps of the random sampler
    eta: float = 0.7  # its noise; 1 is DDPM's
    judge_steps: int | None = None  # flex: DPO steps on the judge's own traces
    judge_lr: float | None = None  # flex: their learning rate
    judge_beta: float | None = None  # flex: their pull to the judge after SFT
    both_right: bool | None = None  # flex: also pair two right traces, by their reasons

    def __post_init__(self):
        fill_variant(self, CRITICS, "critic")
        check_fields(
            self,
            alpha="[0, 1]",
            epsilon="(0, 1)",
            group="[2, 64]",
            sampler_steps="[2, 1000]",
            eta="(0, 1]",
            judge_steps="[1, inf)",
            judge_lr="(0, inf)",
            judge_beta="(0, inf)",
            both_right=(False, True),
        )


# ---- stages 1 and 2: the judge


def trace_loss(logps, ref_logps, batch, cfg):
    """DPO on pairs of traces (B, 2, T), chosen first -> losses (B,), metrics."""
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    return -F.logsigmoid(cfg.judge_beta * (chosen - rejected)), {}


def reasons(trace, item):
    """How many criteria of a trace are right, the leading one included."""
    leader, winners, _ = trace
    return (leader == item["leader"]) + sum(a == b for a, b in zip(winners, item["winners"]))


def better_trace(traces, item, both_right):
    """0 or 1, the better of two parsed traces (or None) of an item; None if there is no pair."""
    right = [trace is not None and trace[2] == item["overall"] for trace in traces]
    if right[0] != right[1]:
        return int(right[1])
    if not all(right) or not both_right:
        return None
    first, second = (reasons(trace, item) for trace in traces)
    return None if first == second else int(second > first)


def trace_pairs(lab, judge, cfg):
    """Pairs of the judge's own traces of `lab.prompts` questions, the better one first."""
    items = lab.world.items(lab.prompts, lab.rng("items"))
    rows = lab.sample(judge, [item["prompt"] for item in items], 2, lab.rng("traces"))
    pairs = []
    for row, item in zip(rows, items):
        parsed = [lab.world.parse(lab.text(trace)) for trace in row["responses"]]
        best = better_trace(parsed, item, cfg.both_right)
        if best is not None:
            order = [best, 1 - best]
            both = {name: [row[name][i] for i in order] for name in ("responses", "ends")}
            pairs.append(row | both | {"scores": [1.0, 0.0]})
    return pairs


def trained_judge(lab, cfg):
    """The judge of a Lab on verdicts: SFT on the teacher's traces, then DPO on its own."""
    judge = lab.base()
    if cfg.critic == "sft":
        return judge
    rows = lab.stage("trace pairs", lambda: trace_pairs(lab, judge, cfg))
    if not rows:
        lab.say("the judge's own traces form no pairs, so it is left as it is after SFT")
        return judge
    return lab.align(judge, lab.rows(rows), trace_loss, cfg)


@torch.no_grad()
def judged(lab, judge, prompts):
    """Verdicts (n, 4) of questions: on three criteria and overall, 1 where the second one wins.

    They are 0.5 for a trace that cannot be parsed; the judge is greedy.
    """
    world = lab.world
    if isinstance(judge, list):  # fixed weights; None: the true ones
        _, first, second = world.digits(prompts)
        criteria = 0.5 + 0.5 * torch.sign(second - first).double()
        return torch.cat([criteria, world.rubric(prompts, judge[0])[:, None]], 1)
    traces = judge.sample(prompts, 1, lab.rng("greedy"), world.max_response, 0.0)
    eot = world.tokenizer.eot
    found = [world.parse(world.text([i for i in ids if i != eot])) for (ids,) in traces]
    unknown = [0.5] * (len(verdicts.CRITERIA) + 1)
    rows = [unknown if trace is None else [*trace[1], trace[2]] for trace in found]
    return torch.tensor(rows, dtype=torch.float64)


# ---- stage 3: GRPO


def win_rates(wins):
    """R (n, G) of wins (n, G, G), where [i, j] is 1 if i beats j, 0 if it loses, 0.5 for a tie."""
    others = wins.sum(-1) - wins.diagonal(dim1=-2, dim2=-1)
    return others / (wins.shape[-1] - 1)


def normalized(R):
    """R (n, G), centred and divided by its standard deviation within the group."""
    return (R - R.mean(-1, keepdim=True)) / (R.std(-1, keepdim=True) + 1e-8)


def group_advantages(overall, criteria, alpha):
    """A (n, G) of wins overall (n, G, G) and on C criteria (n, C, G, G)."""
    mean = win_rates(criteria).mean(1)
    return alpha * normalized(mean) + (1 - alpha) * normalized(win_rates(overall))


def wins(lab, judge, contexts, scores, rng):
    """Wins (n, 4, G, G), three criteria and overall, of groups with the scores (n, G, 3)."""
    n, G = scores.shape[:2]
    i, j = torch.tensor(list(itertools.combinations(range(G), 2))).T  # each pair once
    first, second = scores[:, i].flatten(0, 1), scores[:, j].flatten(0, 1)
    asked = lab.world.ask(contexts.repeat_interleave(len(i)), first, second, rng)
    found = judged(lab, judge, asked).view(n, len(i), -1).transpose(1, 2)  # (n, 4, pairs)
    out = torch.full((n, found.shape[1], G, G), 0.5, dtype=torch.float64)
    out[:, :, i, j], out[:, :, j, i] = 1 - found, found
    return out


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, K, T), 0 outside batch.mask -> losses (B,), metrics.

    They are log p of a step under the policy and the old one; batch.scores (B, K) are advantages.
    """
    logps, ref_logps = upcast(logps, ref_logps)
    present = batch.mask.any(-1)
    rho = (logps - ref_logps).sum(-1).clamp(max=60.0).exp()  # (B, K); float32 ends at 88
    A = batch.scores.to(rho.dtype).clamp(-5, 5)
    worst = torch.maximum(-A * rho, -A * rho.clamp(1 - cfg.epsilon, 1 + cfg.epsilon))
    losses = worst.sum(1) / present.sum(1).clamp(min=1)  # an absent advantage is 0
    clipped = ((rho - 1).abs() > cfg.epsilon) & present
    return losses, {"clipped": clipped.sum() / present.sum()}


def judge_of(lab, cfg):
    """A Lab on verdicts with the tastes of this world's annotators, and the judge."""
    about = dict(steps=cfg.judge_steps, lr=cfg.judge_lr, prompts=None, batch_size=None, k=None)
    about |= dict(guidance=1.0, ema=0.0, init=None, eval_every=None)
    there = lab.child("judge", verdicts.World(lab.world.annotators), about)
    fixed = {"fixed": [[1.0] * len(verdicts.CRITERIA)], "known": [None]}.get(cfg.critic)
    if fixed:
        return there, fixed
    judge = trained_judge(there, cfg)
    found = there.stage("accuracy", lambda: there.world.measure(judge, there))
    lab.say("judge: " + ", ".join(f"{name} {value:.3f}" for name, value in found.items()))
    return there, judge


def against_base(lab, policy, there, judge, n):
    """What the judge and the truth say of n images beside those of the base model.

    -> {utility of the policy's images, judge_wins, true_wins, judge_right, own_lost}
    """
    world, rng = lab.world, lab.eval_rng("beside the base")
    prompts = world.prompts(n, rng)
    models = lab.reference, policy
    base, ours = (
        torch.cat([row["responses"] for row in lab.sample(m, prompts, 1, lab.eval_rng("images"))])
        for m in models
    )
    two = [world.criteria(prompts, images) for images in (base, ours)]
    contexts = world.contexts(prompts)
    found = judged(there, judge, there.world.ask(contexts, *two, rng))[:, -1]
    utility, before = world.utility(prompts, ours), world.utility(prompts, base)
    truth = torch.where(utility == before, 0.5, (utility > before).double())
    clear = truth != 0.5
    right = 1 - (found - truth)[clear].abs()
    return {
        "utility": utility.mean().item(),
        "worst_context": min(utility[contexts == c].mean().item() for c in contexts.unique()),
        "judge_wins": found.mean().item(),
        "true_wins": truth.mean().item(),
        "judge_right": right.mean().nan_to_num(0.5).item(),
        "own_lost": lost(lab, there, judge, prompts, two[1], rng),
    }


def lost(lab, there, judge, prompts, scores, rng):
    """How much less often a judge is right than the true weights that read the same digits.

    scores (n, 3): of the generator's own images. Images of the same prompt are compared, each with
    the next one; it is 0 if all prompts differ.
    """
    asked, order = torch.as_tensor(prompts), torch.as_tensor(prompts).argsort(stable=True)
    same = asked[order[1:]] == asked[order[:-1]]
    i, j = order[:-1][same], order[1:][same]
    if not len(i):
        return 0.0
    contexts = lab.world.contexts(prompts)[i]
    truth = there.world.answer(contexts, scores[i], scores[j])[-1]
    questions = there.world.ask(contexts, scores[i], scores[j], rng)
    both = (judged(there, each, questions)[:, -1] for each in (judge, [None]))
    wrong, least = ((found - truth).abs().mean() for found in both)
    return (wrong - least).item()


def run(lab, cfg):
    return driven(lab, cfg, *judge_of(lab, cfg))


def driven(lab, cfg, there, judge):
    """The generator after GRPO with the verdicts of a judge and its Lab, as of `judge_of`."""
    policy, world, steps = lab.base(), lab.world, cfg.sampler_steps

    def data(policy, round):
        rng = lab.rng("groups", round)
        asked = world.prompts(lab.prompts, rng)
        states = policy.walk(asked, cfg.group, rng, steps, cfg.eta).cpu()  # (steps + 1, n, G, ...)
        lab.samples += cfg.group * len(asked)
        prompts = [p for p in asked for _ in range(cfg.group)]
        scores = world.criteria(prompts, states[-1].flatten(0, 1)).view(len(asked), cfg.group, -1)
        found = wins(there, judge, world.contexts(asked), scores, rng)
        A = group_advantages(found[:, -1], found[:, :-1], cfg.alpha).tolist()
        return lab.rows(
            [
                dict(
                    prompt=prompt,
                    responses=states[-1, i],
                    scores=A[i],
                    x=states[step, i],
                    after=states[step + 1, i],
                    step=step,
                )
                for i, prompt in enumerate(asked)
                for step in range(steps - 1)  # the last step has no noise, so no density
            ]
        )

    def score(model, batch):
        of = batch.x, batch.after, batch.step, batch.label
        return model.transition_logps(*of, steps, cfg.eta)[..., None]

    def watch(policy, step):
        full = step in (0, lab.steps)
        beside = against_base(lab, policy, there, judge, min(256, lab.eval_size))
        return lab.glance(policy, step, full) | beside

    every = -(-lab.prompts * (steps - 1) // lab.batch_size)  # one pass over each round
    how = dict(reference="round", every=every, prepare=unchanged, score=score, watch=watch)
    policy = lab.align(policy, data, loss, cfg, **how)
    wins_of = "judge {judge_wins:.3f}, annotators {true_wins:.3f}".format(**policy.curve[-1])
    lab.say(f"share of wins over the base model: {wins_of}")
    return policy


def unchanged(policy, batch):
    """A step of the sampler needs no further noise."""
    return batch
