"""Metrics of a training step, of a quick look during training, and the evaluation of a model."""

import functools
import hashlib
import math
import os

import numpy as np
import torch

from lab.store import save_value

# ---------------------------------------------------------------- a training step


def paths(values, parents):
    """Sums over the path from the prompt to each response, its own value included: (B, K).

    values, parents: (B, K); a parent of -1 is the prompt.
    """
    for _ in range((values.shape[1] - 1).bit_length()):
        # each pass doubles the part of the path that a sum covers
        up, ended = parents.clamp(min=0), parents < 0
        values = values + values.gather(1, up).masked_fill(ended, 0.0)
        parents = parents.gather(1, up).masked_fill(ended, -1)
    return values


def common_metrics(logps, ref_logps, batch):
    """The metrics of every method, from the responses of each row with the best and worst score.

    margin: the difference of their log-ratios in nats, without beta; without a reference, of their
        log-probs.
    accuracy: the share of rows with a positive margin; ties count half.
    chosen_logp, rejected_logp: the raw log-probs in nats.
    In a tree of steps a response is a path to a leaf; in a chain, which has one leaf, it is a node.
    """
    present, parents = batch.mask.any(-1), batch.parents
    total = (logps * batch.mask).sum(-1)  # (B, K)
    ratio = total if ref_logps is None else total - (ref_logps * batch.mask).sum(-1)
    if parents is not None:
        places = torch.arange(parents.shape[1], device=parents.device)
        leaf = present & ~(parents[..., None] == places).any(1)
        tree = leaf.sum(1, keepdim=True) > 1
        present = torch.where(tree, leaf, present)
        total, ratio = (torch.where(tree, paths(x, parents), x) for x in (total, ratio))
    best = batch.scores.masked_fill(~present, -math.inf).argmax(1, keepdim=True)
    worst = batch.scores.masked_fill(~present, math.inf).argmin(1, keepdim=True)
    margin = (ratio.gather(1, best) - ratio.gather(1, worst))[:, 0]
    return {
        "margin": margin.mean(),
        "accuracy": ((margin > 0).float() + 0.5 * (margin == 0).float()).mean(),
        "chosen_logp": total.gather(1, best).mean(),
        "rejected_logp": total.gather(1, worst).mean(),
    }


# ---------------------------------------------------------------- parts of an evaluation


@torch.no_grad()
def sequence_kl(lab, policy, reference, rows):
    """KL(policy || reference) of whole responses in nats, one value per sampled response.

    It is the sum over tokens of the exact KL between the two next-token distributions, at the
    prefixes that the policy sampled and at its sampling temperature (1 for greedy samples).
    """
    temperature = lab.settings.temperature or 1.0
    logits = reference.config.vocab_size * max(2, lab.max_response) * len(rows[0]["responses"])
    # rows per batch, for at most 2^25 logits
    size, out = max(1, min(lab.portion(policy, 64), 2**25 // logits)), []
    for start in lab.pieces("KL", len(rows), size):
        batch = lab.collate(rows[start : start + size])
        with lab.autocast():
            p, q = (
                (model.logits(batch).float() / temperature).log_softmax(-1)  # (B, K, T, V)
                for model in (policy, reference)
            )
        out.append(((p.exp() * (p - q)).sum(-1) * batch.mask).sum(-1).flatten())
    return torch.cat(out).tolist()


def eval_prompts(lab, n):
    """The prompts of an evaluation: the same for every method and seed of a world."""
    prompts = lab.world.test_prompts or lab.world.prompts
    return prompts(n, lab.eval_rng("evaluation"))


def of_base(lab, name, n, look):
    """`look()` on n prompts, cached; it must depend only on the base model, world and settings."""
    fingerprint = getattr(lab.reference, "fingerprint", None)
    key = [name, n, fingerprint, lab.world.key(), lab.settings.base_seed]
    key += [lab.settings.temperature, lab.settings.guidance, lab.max_response]
    return lab.cached(key, look) if fingerprint else look()


def eval_pairs(lab):
    """Held-out rows with clean labels.

    With --data they are the file's. Otherwise pairs are sampled from the base model and labelled by
    the true reward; ties are left out.
    """
    world = lab.world
    if world.reward is None:
        return lab.encode(world.held_out[: lab.eval_size])

    def draw():
        prompts = (world.test_prompts or world.prompts)(lab.eval_size, lab.eval_rng("held-out"))
        return lab.sample(lab.reference, prompts, 2, lab.eval_rng("held-out samples"))

    rows = of_base(lab, "held-out", lab.eval_size, draw)
    return lab.encode(
        [
            row | {"scores": [float(a > b), float(b > a)]}
            for row, (a, b) in zip(rows, lab.truth(rows))
            if a != b
        ]
    )


def answers(row, logps):
    """{index: log-prob} of the responses of a row: the paths of a tree, the items of a list.

    logps: K lists of token log-probs. A chain, which has one leaf, counts as a list.
    """
    total = [sum(x) for x in logps]
    parents = row.get("parents") or [-1] * len(logps)
    leaves = sorted(set(range(len(total))) - set(parents))
    if len(leaves) < 2:
        return dict(enumerate(total))
    along = paths(torch.tensor([total], dtype=torch.float64), torch.tensor([parents]))[0].tolist()
    return {k: along[k] for k in leaves}


def pair_stats(lab, policy):
    """Accuracy of the implicit reward on held-out rows, and the raw log-probs in nats.

    The implicit reward is the log-ratio to the base model. All pairs of a row with different scores
    are compared, and ties count half. Every row has the same weight.
    """
    rows = eval_pairs(lab)
    if not rows:
        return {}
    ours, base = lab.score_rows(policy, rows), lab.cached_logps(lab.reference, rows)
    shares, chosen, rejected = [], [], []
    for row, mine, theirs in zip(rows, ours, base):
        scores, total, known = row["scores"], answers(row, mine), answers(row, theirs)
        ratio = {k: total[k] - known[k] for k in total}
        better = [(i, j) for i in total for j in total if scores[i] > scores[j]]
        won = [(ratio[i] > ratio[j]) + 0.5 * (ratio[i] == ratio[j]) for i, j in better]
        shares += [sum(won) / len(won)] if won else []
        chosen.append(total[max(total, key=lambda k: scores[k])])
        rejected.append(total[min(total, key=lambda k: scores[k])])
    out = {}
    if shares:
        out["accuracy"] = float(np.mean(shares))
        out["accuracy_interval"] = wilson(sum(shares), len(shares))
    return out | {
        "chosen_logp": float(np.mean(chosen)),
        "rejected_logp": float(np.mean(rejected)),
    }


def diversity(responses):
    """Distinct pairs of neighbouring tokens, as a share of all such pairs (distinct-2)."""
    pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
    return len(set(pairs)) / max(1, len(pairs))


# ---------------------------------------------------------------- evaluations


def aside(function):
    """A function of a Lab whose samples are not counted, since no method learns from them."""

    @functools.wraps(function)
    def uncounted(lab, *args, **kwargs):
        before = lab.samples
        try:
            return function(lab, *args, **kwargs)
        finally:
            lab.samples = before

    return uncounted


@aside
@torch.no_grad()
def evaluate(lab, policy):
    """{name: number or interval} of a model; see Lab.evaluate."""
    training = policy.training
    policy.eval()
    out = of_samples(lab, policy, lab.eval_size)
    if lab.world.kind == "text":
        out |= pair_stats(lab, policy)
    if lab.world.measure:
        out |= {name: float(value) for name, value in lab.world.measure(policy, lab).items()}
    policy.train(training)
    return out


@torch.no_grad()
def glance(lab, policy, step, full):
    """A look during training: the numbers of `evaluate` that come from samples, without intervals.

    full: on all prompts of an evaluation, so that both agree; otherwise on an eighth of them. In a
    world without a true reward it is the accuracy on held-out pairs, and only where --eval_every
    asks for looks."""
    if lab.world.reward is None and lab.world.kind != "table":
        found = pair_stats(lab, policy) if lab.settings.eval_every else {}
    else:
        found = of_samples(lab, policy, lab.eval_size if full else max(2, lab.eval_size // 8))
    between = lab.eval_every or max(1, lab.steps // 20)
    seldom = min(5, max(1, lab.steps // between // 4))  # what takes seconds, in one of 1 to 5
    if full or step // between % seldom == 0:
        found |= lab.world.look(policy, lab) if lab.world.look else {}
        keep_pictures(lab, policy, step)
    return {name: value for name, value in found.items() if not isinstance(value, list)}


def keep_pictures(lab, policy, step, most=12):
    """Keep one image for each of a few prompts, from the same noise at every look of a run."""
    if not lab.out or lab.full_looks or lab.world.frechet is None:
        return
    prompts = list(lab.world.gallery or range(policy.classes))[:most]
    rows = lab.sample(policy, prompts, 1, lab.eval_rng("samples during training"))
    images = torch.cat([row["responses"] for row in rows])
    save_value(os.path.join(lab.out, "stages", f"pictures-{step:09d}"), {"images": images})


def of_samples(lab, policy, n):
    """What is read from one sample for each of n prompts; a table is exact and needs none.

    The prompts and the random numbers are the same for every model. What was read is kept for the
    weights that it was read from, since the first and the last look and the evaluation share them.
    """
    if lab.world.kind == "table":
        return {"reward": policy.expect(lab.world.rewards()), "kl": policy.kl(lab.reference)}
    key = n, hash_of_weights(policy)
    if key not in lab.seen:
        lab.seen[key] = from_samples(lab, policy, n)
    return dict(lab.seen[key])


def hash_of_weights(model):
    """A hash of the weights of a model."""
    found = hashlib.sha256()
    for value in model.state_dict().values():
        found.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    return found.hexdigest()


def from_samples(lab, policy, n):
    """`of_samples` of a model of text or images, from new samples."""
    world, out = lab.world, {}
    prompts = eval_prompts(lab, n if world.reward else min(n, 16))

    def drawn(model):
        return lab.sample(model, prompts, 1, lab.eval_rng("evaluation samples"))

    rows = drawn(policy)
    if world.reward:
        rewards = [reward for (reward,) in lab.truth(rows)]
        base = lab.truth(of_base(lab, "samples", n, lambda: drawn(lab.reference)))
        wins = sum((ours > b) + 0.5 * (ours == b) for ours, (b,) in zip(rewards, base))
        out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
        out |= {"win_rate": wins / len(rows), "win_rate_interval": wilson(wins, len(rows))}
    if world.parts:
        parts = [world.parts(row["prompt"], row["responses"][0]) for row in rows]
        out |= {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    if world.kind == "images" and torch.equal(policy.alpha_bar, lab.reference.alpha_bar):
        kls = policy.path_kl(lab.reference, prompts, lab.eval_rng("paths"))
        out["kl"] = float(kls.mean())
    if world.kind == "text":
        responses = [row["responses"][0] for row in rows]
        rows = lab.encode(rows)
        out["kl"] = float(np.mean(sequence_kl(lab, policy, lab.reference, rows)))
        out["length"] = float(np.mean([len(ids) for ids in responses]))
        out["diversity"] = diversity(responses)
    return out


@torch.no_grad()
def spread(lab, base):
    """{"reward_sd": standard deviation of the base model's true reward}, the unit of margins.

    It is that of the samples of an evaluation, or exact in a table; {} without a true reward.
    """
    world = lab.world
    if world.kind == "table":
        rewards = world.rewards()
        variance = base.expect(rewards.square()) - base.expect(rewards) ** 2
        return {"reward_sd": math.sqrt(max(0.0, variance))}
    if world.reward is None:
        return {}
    prompts = eval_prompts(lab, lab.eval_size)
    draw = functools.partial(lab.sample, base, prompts, 1, lab.eval_rng("evaluation samples"))
    rows = of_base(lab, "samples", lab.eval_size, draw)
    return {"reward_sd": float(np.std([reward for (reward,) in lab.truth(rows)]))}


def best_of(lab, sizes=(2, 4, 8, 16)):
    """What the best of n samples from the base model reaches, [{n, reward, win_rate, kl}].

    The best is that with the highest true reward. kl is the upper bound log n - (n - 1) / n on its
    KL from the base model (Beirami et al. 2024, arXiv:2401.01879). It is the yardstick for what a
    method pays for its reward. Of all samples for a prompt, groups of n are compared. It is read
    from at most 256 prompts."""
    prompts, most = eval_prompts(lab, lab.eval_size), max(sizes)
    n = min(256, len(prompts))

    def rewards_of(name, prompts, k, stream):
        """The rewards (prompts, k) of k samples per prompt of the base model."""
        draw = functools.partial(lab.sample, lab.reference, prompts, k, lab.eval_rng(stream))
        return np.array(lab.truth(of_base(lab, name, len(prompts), draw)))

    rewards = rewards_of("best of", prompts[:n], most, "best of")
    base = rewards_of("samples", prompts, 1, "evaluation samples")[:n]
    found = []
    for size in sizes:
        best = rewards.reshape(n, most // size, size).max(-1)
        wins = (best > base) + 0.5 * (best == base)
        bound = math.log(size) - (size - 1) / size
        found.append(dict(n=size, reward=best.mean(), win_rate=wins.mean(), kl=bound))
    return found


# ---------------------------------------------------------------- intervals


def interval(values):
    """95 % confidence interval of the mean of a few values by Student's t, as [low, high]."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return [math.nan, math.nan]
    from scipy.special import stdtrit

    half = stdtrit(len(values) - 1, 0.975) * values.std(ddof=1) / math.sqrt(len(values))
    return [float(values.mean() - half), float(values.mean() + half)]


def wilson(wins, n):
    """95 % confidence interval of a share by Wilson's score, as [low, high].

    wins: how many of n; ties may count half.
    """
    if not n:
        return [math.nan, math.nan]
    z, p = 1.959964, wins / n
    middle = p + z * z / (2 * n)
    half = z * math.sqrt(p * (1 - p) / n + z * z / (4 * n * n))
    return [(middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)]
