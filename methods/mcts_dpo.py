"""MCTS-DPO - Monte Carlo Tree Search Boosts Reasoning via Iterative Preference Learning (2024),
arXiv:2405.00451

A pair of whole solutions does not say which step was wrong, so MCTS-DPO searches over steps with
the current policy. A node's value R is an opinion, plus 1 or -1 at a right or wrong end. A path
follows `select` and is backed up:

    select: argmax_child Q_child + c p sqrt(N) / (1 + N_child)
    backup: N += 1,   V = sum N_child Q_child / sum N_child,   Q = R - R_parent + V

Along the most visited path, the siblings of highest and lowest Q are a pair, with label smoothing
a = N_l / (N_w + N_l), at most 1/2:

    loss = -(1-a) log sigmoid(h) - a log sigmoid(-h),    h: DPO's z

Differences from the paper
1. The prior p is a share of samples, without length penalty.
2. A noisy judge, or the mean token probability, replaces self-evaluation: our models know no
evaluation prompt.
3. One search per question, not per step.

    python train.py --method mcts_dpo                              draws a question's tree
    python train.py --method mcts_dpo --level step,instance        whole samples
    python train.py --method mcts_dpo --world trie --online false  the base model searches
"""

import math
from dataclasses import dataclass, field

import torch.nn.functional as F

from data import Paper, StopTraining, UserError, check_fields, fill_variant, pair
from toy.chains import split_steps

PAPER = Paper(
    "online",
    worlds=("text", "table"),
    needs="verifier",
    defaults=dict(world="arithmetic"),
    demo=dict(steps=40, batch_size=32, lr=1e-4),
)
SEARCH = dict(simulations=8, breadth=4, explore=1.0, smooth=True, tokens=8, value="judge")
VARIANTS = dict(step=SEARCH, instance={})
NO_PAIRS = "the first questions gave no pairs: all are solved, or none; more --prompts may help"


@dataclass(frozen=True)
class Config:
    beta: float = 0.1  # strength of the pull to the reference, as in DPO
    level: str = "step"  # step: siblings of a search; instance: whole samples
    online: bool = True  # search with the current policy; false: all searches by the base model
    every: int = 4  # optimizer steps per round
    simulations: int | None = None  # step: paths per search
    breadth: int | None = None  # step: steps sampled at a node
    explore: float | None = None  # step: the weight c of the prior
    smooth: bool | None = None  # step: labels are smoothed by visits
    tokens: int | None = None  # step: longest step, in tokens
    # step: opinion of a solution so far: judge (the world's, 1/2 where there is none), own (the
    # policy's mean probability per token) or constant (1/2)
    value: str | None = None

    def __post_init__(self):
        fill_variant(self, VARIANTS, "level")
        check_fields(
            self,
            beta="(0, inf)",
            online=(True, False),
            every="[1, inf)",
            simulations="[1, inf)",
            breadth="[2, inf)",
            explore="[0, inf)",
            smooth=(True, False),
            tokens="[1, inf)",
            value=("judge", "own", "constant"),
        )


def loss(logps, ref_logps, batch, cfg):
    """logps, ref_logps (B, 2, T), chosen first, 0 outside batch.mask -> losses (B,), metrics.

    batch.doubt (B,): the smoothing a, at most 1/2.
    """
    logps, ref_logps = pair(logps, ref_logps, batch)
    chosen, rejected = (logps - ref_logps).sum(-1).unbind(1)  # (B,) log-ratios: SUM over tokens
    h = cfg.beta * (chosen - rejected)  # (B,)
    a = batch.doubt.to(h.dtype)
    losses = -(1 - a) * F.logsigmoid(h) - a * F.logsigmoid(-h)
    return losses, {"doubt": a.mean()}


# ---- the tree


@dataclass
class Node:
    """A step and what the search knows about the solution up to its end."""

    ids: list  # tokens of the solution so far, its own step included
    parent: "Node | None" = None
    ended: bool = False
    eot: bool = False  # it ended with end-of-text, not at the length limit
    prior: float = 1.0
    R: float = 0.0  # value of the solution so far; 0 at the root
    N: int = 0
    Q: float = 0.0
    children: list = field(default_factory=list)


def select(node, explore):
    """The child with the largest Q + c p sqrt(N) / (1 + N_child); the first one of equal ones."""
    scale = explore * math.sqrt(max(node.N, 1))
    return max(node.children, key=lambda child: child.Q + scale * child.prior / (1 + child.N))


def backup(path):
    """Update N and Q along a path from the root, beginning at its end."""
    for node in reversed(path):
        node.N += 1
        visits = sum(child.N for child in node.children)
        V = sum(child.N * child.Q for child in node.children) / visits if visits else 0.0
        node.Q = node.R - (node.parent.R if node.parent else node.R) + V


def tree_search(roots, grow, cfg):
    """Search from all roots in step; grow(nodes, places) gives children to nodes of these roots."""
    for _ in range(cfg.simulations):
        paths = [[root] for root in roots]
        live = list(range(len(roots)))
        while live:
            for i in live:
                while paths[i][-1].children:
                    paths[i].append(select(paths[i][-1], cfg.explore))
            live = [i for i in live if not paths[i][-1].ended]
            if live:
                grow([paths[i][-1] for i in live], live)
        for path in paths:
            backup(path)


def siblings(root, smooth):
    """(better, worse, doubt) of siblings at every node of the most visited path."""
    out, node = [], root
    while node.children:
        better, worse = (find(node.children, key=lambda n: n.Q) for find in (max, min))
        if better.Q - worse.Q > 1e-9:
            visits = better.N + worse.N
            doubt = min(0.5, worse.N / visits) if smooth and visits else 0.0
            out.append((better, worse, doubt))
        node = max(node.children, key=lambda n: n.N)
    return out


def printed(lab, node, depth=0):
    """A tree as lines of text: each step with its visits N, Q and prior, most visited first."""
    step = node.ids[len(node.parent.ids) if node.parent else 0 :]
    text = repr(lab.text(step)) if node.parent else "(the question)"
    line = "  " * depth + f"{text}  N {node.N}  Q {node.Q:+.2f}  p {node.prior:.2f}"
    lines = [line + ("  end" if node.ended else "")]
    for child in sorted(node.children, key=lambda n: -n.N):
        lines += printed(lab, child, depth + 1)
    return lines


def diagram(root):
    """A Figure of a tree: darker lines are visited more often, green ends are right."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 4))
    axes, place = figure.subplots(), [0]

    def draw(node, depth):
        xs = [draw(child, depth + 1) for child in node.children]
        if not xs:
            place[0] += 1
        x = sum(xs) / len(xs) if xs else place[0]
        for child, to in zip(node.children, xs):
            shade = 0.85 * (1 - child.N / max(1, root.N))
            axes.plot([x, to], [-depth, -depth - 1], color=str(shade), zorder=1)
        color = "white" if not node.ended else "tab:green" if node.R > 0 else "tab:red"
        axes.scatter(x, -depth, s=18, color=color, edgecolors="black", zorder=2)
        return x

    draw(root, 0)
    axes.set_title(f"{root.N} simulations; darker: more visits; green: right, red: wrong")
    axes.axis("off")
    return figure


# ---- steps of a policy


def steps_of(lab, policy, prompts, nodes, cfg, rng):
    """The distinct next steps of each node -> lists of (step, ended by end-of-text, prior)."""
    if lab.world.kind == "table":
        out = []
        for prompt, node in zip(prompts, nodes):
            place = 0
            for token in node.ids:
                place = place * policy.vocab + 1 + token
            priors = policy.logits[prompt, place].detach().softmax(-1).tolist()
            lab.samples += policy.vocab  # every symbol is looked at once
            out.append([([v], False, p) for v, p in enumerate(priors)])
        return out
    asked = [lab.tokens(prompt) + node.ids for prompt, node in zip(prompts, nodes)]
    out = []
    for row in lab.sample(policy, asked, cfg.breadth, rng, max_tokens=cfg.tokens):
        counts = {}
        for ids, ended in zip(row["responses"], row["ends"]):
            step = split_steps(ids, lab.world.tokenizer)[0]
            key = tuple(step), ended and len(step) == len(ids)
            counts[key] = counts.get(key, 0) + 1
        out.append([(list(s), e, n / cfg.breadth) for (s, e), n in counts.items()])
    return out


def confidence(lab, policy, prompts, nodes):
    """The geometric mean of the probabilities that the policy gives the tokens of each node."""
    rows = [dict(prompt=p, responses=[node.ids]) for p, node in zip(prompts, nodes)]
    if lab.world.kind == "text":
        rows = [row | dict(ends=[node.eot]) for row, node in zip(rows, nodes)]
    scored = lab.score_rows(policy, lab.rows(rows))
    return [math.exp(sum(logps) / max(1, len(logps))) for (logps,) in scored]


def values(lab, policy, prompts, nodes, cfg, rng):
    """R of each node: an opinion between 0 and 1, plus 1 or -1 at a right or wrong end."""
    ids, ended = [node.ids for node in nodes], [node.ended for node in nodes]
    if cfg.value == "judge" and lab.world.judge is not None:
        return lab.world.judge(prompts, ids, ended, rng).tolist()
    opinions = [0.5] * len(nodes)
    if cfg.value == "own":
        opinions = confidence(lab, policy, prompts, nodes)
    rows = [dict(prompt=p, responses=[y]) for p, y, end in zip(prompts, ids, ended) if end]
    verdicts = iter(lab.truth(rows) if rows else [])
    return [C + (2 * next(verdicts)[0] - 1 if end else 0.0) for C, end in zip(opinions, ended)]


def trees(lab, policy, prompts, key, cfg):
    """The roots of a search for each prompt."""
    roots, calls = [Node([]) for _ in prompts], []
    longest = lab.max_response
    if lab.world.kind == "table":
        longest = policy.length

    def grow(nodes, places):
        calls.append(None)
        asked = [prompts[i] for i in places]
        found = steps_of(lab, policy, asked, nodes, cfg, lab.rng("steps", *key, len(calls)))
        new, owners = [], []
        for prompt, node, steps in zip(asked, nodes, found):
            room = longest if lab.context is None else lab.context - len(lab.tokens(prompt)) - 1
            for step, eot, prior in steps:
                ids = node.ids + step
                ended = eot or len(ids) >= min(longest, room)
                node.children.append(Node(ids, node, ended, eot, prior))
            new += node.children
            owners += [prompt] * len(node.children)
        rewards = values(lab, policy, owners, new, cfg, lab.rng("judge", *key, len(calls)))
        for node, R in zip(new, rewards):
            node.R, node.Q = R, R - node.parent.R

    tree_search(roots, grow, cfg)
    return roots


def rows_of(lab, prompt, root, cfg):
    """The pairs of a tree as rows. A table scores the steps before, too; they cancel."""
    out = []
    for better, worse, doubt in siblings(root, cfg.smooth):
        both, before = (better, worse), len(better.parent.ids)
        if lab.world.kind == "table":
            row = dict(prompt=prompt, responses=[node.ids for node in both])
        else:
            row = dict(prompt=lab.tokens(prompt) + better.parent.ids)
            row |= dict(responses=[n.ids[before:] for n in both], ends=[n.eot for n in both])
        out.append(row | dict(scores=[1.0, 0.0], doubt=doubt))
    return out


def rollout(lab, policy, round, n, cfg):
    """The pairs of n fresh questions, none where all are solved or all fail."""
    if cfg.level == "instance":
        asked = lab.preferences(policy, k=lab.k, n=n, ties=True, key=("instance", round))
        out = []
        for row in asked:
            right, wrong = (
                find(range(lab.k), key=row["scores"].__getitem__) for find in (max, min)
            )
            # in a smoke run an untrained model may have no right sample
            if row["scores"][right] > row["scores"][wrong] or lab.smoke:
                two = dict(prompt=row["prompt"], scores=[1.0, 0.0], doubt=0.0)
                two["responses"] = [row["responses"][i] for i in (right, wrong)]
                if "ends" in row:
                    two["ends"] = [row["ends"][i] for i in (right, wrong)]
                out.append(two)
    else:
        prompts = lab.world.prompts(n, lab.rng("questions", round))
        roots = trees(lab, policy, prompts, (round,), cfg)
        out = [row for x, root in zip(prompts, roots) for row in rows_of(lab, x, root, cfg)]
    return out


def searched(lab, policy, round, cfg):
    """The rows of one round of the online training.

    UserError: the first round has none. StopTraining: a later one has none.
    """
    rows = rollout(lab, policy, round, tasks_per_round(lab), cfg)
    if not rows and round == 0:
        raise UserError(NO_PAIRS)
    if not rows:
        raise StopTraining(
            f"round {round + 1} gave no pairs: its questions are all solved, or none"
        )
    return lab.rows(rows)


def tasks_per_round(lab):
    """The number of questions per round: --prompts, by default those of one optimizer step."""
    return lab.settings.prompts or lab.batch_size


def check_settings(lab, cfg):
    """UserError: a setting does nothing under this level or in this world."""
    if cfg.level == "step" and lab.settings.flip:
        raise UserError("--flip does nothing with level = step: a search makes the labels")
    if cfg.level == "step" and lab.k != lab.world.align.get("k", lab.k):
        raise UserError("--k does nothing with level = step: --breadth is the number of samples")
    changed = [n for n in ("breadth", "tokens") if getattr(cfg, n) not in (None, SEARCH[n])]
    if lab.world.kind == "table" and changed:
        raise UserError(f"--{changed[0]} does nothing in a table: a step is one of all symbols")


def run(lab, cfg):
    check_settings(lab, cfg)
    policy = lab.base()
    if cfg.online:
        data = lambda policy, round: searched(lab, policy, round, cfg)  # noqa: E731
        policy = lab.align(policy, data, loss, cfg, every=cfg.every)
    else:
        total = tasks_per_round(lab) * max(1, lab.steps // cfg.every)
        rows = lab.stage("search", lambda: rollout(lab, policy, 0, total, cfg))
        if not rows:
            raise UserError(NO_PAIRS)
        policy = lab.align(policy, lab.rows(rows), loss, cfg)
    if cfg.level == "step" and not lab.quiet:
        before = lab.samples
        prompts = lab.world.prompts(8, lab.rng("shown"))
        roots = trees(lab, policy, prompts, ("shown",), cfg)
        lab.samples = before
        found = [printed(lab, root) for root in roots]
        most = max(range(8), key=lambda i: len(found[i]))
        lab.say(f"\nthe search of a question, {lab.text(prompts[most])}, the largest tree of eight")
        lab.say("\n".join(found[most]))
        lab.draw("tree", diagram(roots[most]))
    return policy
