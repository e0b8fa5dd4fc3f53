"""Metrics of a training step, of a quick look during training, and the evaluation of a model."""

import hashlib
import math
import os

import numpy as np
import torch

from lab.store import save_value

# what looks and evaluations call their own numbers
NAMES = {"reward", "win_rate", "kl", "length", "diversity", "accuracy", "chosen_logp"}
NAMES |= {"rejected_logp", "stage", "step", "samples", "reward_sd", "frechet_256"}
NAMES |= {"reward_interval", "win_rate_interval", "accuracy_interval"}

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


def common_metrics(logps, ref_logps, batch, cfg=None):
    """The metrics of every method, from the responses of each row with the best and worst score.

    margin: the log-ratio of the best minus that of the worst, in nats, without beta. Without a
        reference, log-probs take the place of log-ratios.
    accuracy: the share of rows with a positive margin; ties count half.
    chosen_logp, rejected_logp: the raw log-probs in nats.
    In a tree of steps a response is a path to a leaf. In a chain, which has one leaf, every node
    counts as a response.
    """
    present, parents = batch.mask.any(-1), batch.parents
    total = (logps.detach() * batch.mask).sum(-1)  # (B, K)
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


def of_base(lab, stream, prompts, k=1):
    """k samples of the base model for each prompt, as rows, cached.

    stream: the name of their random numbers.
    """
    fingerprint, rng = getattr(lab.reference, "fingerprint", None), lab.eval_rng(stream)
    if not fingerprint:
        return lab.sample(lab.reference, prompts, k, rng)
    key = [stream, prompts, k, fingerprint, lab.world.key(), lab.settings.base_seed]
    key += [lab.settings.temperature, lab.settings.guidance, lab.max_response]
    return lab.cached(key, lambda: lab.sample(lab.reference, prompts, k, rng))


def pair_stats(lab, policy):
    """Accuracy of the implicit reward on held-out rows, and the raw log-probs in nats.

    With --data the rows are the file's. Otherwise they are pairs from the base model with clean
    labels, those of the true reward; ties are left out. The implicit reward is the log-ratio to the
    base model. All pairs of a row with different scores are compared, and ties count half. Every
    row has the same weight. In a tree of steps a response is a path to a leaf; in a chain, which
    has one leaf, every node counts as a response.
    """
    if lab.world.reward is None:
        rows = lab.world.held_out[: lab.eval_size]
    else:
        prompts = lab.world.test_prompts(lab.eval_size, lab.eval_rng("held-out"))
        drawn = of_base(lab, "held-out samples", prompts, 2)
        rows = [
            row | {"scores": [float(a > b), float(b > a)]}
            for row, (a, b) in zip(drawn, lab.truth(drawn))
            if a != b
        ]
    rows = lab.encode(rows)
    if not rows:
        return {}
    ours, base = lab.score_rows(policy, rows), lab.cached_logps(lab.reference, rows)
    shares, chosen, rejected = [], [], []
    for row, mine, theirs in zip(rows, ours, base):
        scores, parents = row["scores"], row.get("parents") or []
        total, known = ([sum(x) for x in logps] for logps in (mine, theirs))
        places = range(len(total))
        leaves = [k for k in places if k not in parents]
        if 1 < len(leaves) < len(total):  # neither a chain nor a list
            values = torch.tensor([total, known], dtype=torch.float64)
            total, known = paths(values, torch.tensor([parents, parents])).tolist()
            places = leaves
        ratio = {k: total[k] - known[k] for k in places}
        better = [(i, j) for i in places for j in places if scores[i] > scores[j]]
        won = [(ratio[i] > ratio[j]) + 0.5 * (ratio[i] == ratio[j]) for i, j in better]
        shares += [sum(won) / len(won)] if won else []
        chosen.append(total[max(places, key=lambda k: scores[k])])
        rejected.append(total[min(places, key=lambda k: scores[k])])
    out = {}
    if shares:
        out["accuracy"] = float(np.mean(shares))
        out["accuracy_interval"] = wilson(sum(shares), len(shares))
    return out | {
        "chosen_logp": float(np.mean(chosen)),
        "rejected_logp": float(np.mean(rejected)),
    }


# ---------------------------------------------------------------- evaluations


@torch.no_grad()
def evaluate(lab, policy):
    """The evaluation of a model, {name: number or [low, high]}; see docs/metrics.md.

    It has the true reward, win rate over the base model, KL from it, length, diversity, accuracy on
    held-out pairs with clean labels, raw log-probs of chosen and rejected, and the world's own
    measurements, as far as they apply. Prompts and random numbers are the same for every model.
    """
    with lab.verb("evaluate") as stage:
        if stage.done:
            return stage.value
        training, samples = policy.training, lab.samples
        policy.eval()
        try:
            out = of_samples(lab, policy, lab.eval_size)
            if lab.world.kind == "text":
                out |= pair_stats(lab, policy)
            if lab.world.measure:
                found = lab.world.measure(policy, lab)
                out |= {name: float(value) for name, value in found.items()}
        finally:
            lab.samples = samples  # those of an evaluation do not count: no method learns from them
        policy.train(training)
        stage.value = out
    return out


@torch.no_grad()
def glance(lab, policy, step, full):
    """A look during training, for a `watch` of one's own, too: {name: number}.

    It has the numbers of `evaluate` that come from samples, without their intervals.

    full: on all prompts of an evaluation, so that both agree; otherwise on an eighth of them. In a
    world without a true reward it is the accuracy on held-out pairs, and only where --eval_every
    asks for looks."""
    if lab.world.reward is None and lab.world.kind != "table":
        found = pair_stats(lab, policy) if lab.settings.eval_every else {}
    else:
        found = of_samples(lab, policy, lab.eval_size if full else max(2, lab.eval_size // 8))
    between = lab.eval_every or max(1, lab.steps // 20)
    # what takes seconds is measured in one look of 1 to 5
    seldom = min(5, max(1, lab.steps // between // 4))
    if full or step // between % seldom == 0:
        found |= lab.world.look(policy, lab) if lab.world.look else {}
        if lab.world.kind == "images":
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

    The prompts and the random numbers are the same for every model. The result is kept under a hash
    of the weights, since the last look and the evaluation measure the same model.
    """
    world, out = lab.world, {}
    if world.kind == "table":
        return {"reward": policy.expect(world.rewards()), "kl": policy.kl(lab.reference)}
    weights = hashlib.sha256()
    for value in policy.state_dict().values():
        weights.update(value.detach().cpu().contiguous().flatten().view(torch.uint8).numpy())
    key = n, weights.hexdigest()
    if key in lab.seen:
        return dict(lab.seen[key])
    prompts = world.test_prompts(n if world.reward else min(n, 16), lab.eval_rng("evaluation"))
    rows = lab.sample(policy, prompts, 1, lab.eval_rng("evaluation samples"))
    if world.reward:
        rewards = [reward for (reward,) in lab.truth(rows)]
        base = lab.truth(of_base(lab, "evaluation samples", prompts))
        wins = sum((ours > b) + 0.5 * (ours == b) for ours, (b,) in zip(rewards, base))
        out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
        out |= {"win_rate": wins / len(rows), "win_rate_interval": wilson(wins, len(rows))}
    if world.parts:
        parts = [world.parts(row["prompt"], lab.text(row["responses"][0])) for row in rows]
        out |= {name: float(np.mean([part[name] for part in parts])) for name in parts[0]}
    if world.kind == "images" and torch.equal(policy.alpha_bar, lab.reference.alpha_bar):
        kls = policy.path_kl(lab.reference, prompts, lab.eval_rng("paths"))
        out["kl"] = float(kls.mean())
    if world.kind == "text":
        responses = [row["responses"][0] for row in rows]
        kls = sequence_kl(lab, policy, lab.reference, lab.encode(rows))
        out["kl"] = float(np.mean(kls))
        out["length"] = float(np.mean([len(ids) for ids in responses]))
        # distinct pairs of neighbouring tokens, as a share of all such pairs (distinct-2)
        pairs = [pair for ids in responses for pair in zip(ids, ids[1:])]
        out["diversity"] = len(set(pairs)) / max(1, len(pairs))
    lab.seen[key] = out
    return dict(out)


@torch.no_grad()
def reward_sd(lab):
    """{"reward_sd": standard deviation of the base model's true reward}, the unit of margins.

    It is that of the samples of an evaluation, or exact in a table; {} without a true reward.
    """
    world = lab.world
    if world.kind == "table":
        rewards = world.rewards()
        base = lab.reference
        variance = base.expect(rewards.square()) - base.expect(rewards) ** 2
        return {"reward_sd": math.sqrt(max(0.0, variance))}
    if world.reward is None:
        return {}
    prompts = world.test_prompts(lab.eval_size, lab.eval_rng("evaluation"))
    rows = of_base(lab, "evaluation samples", prompts)
    return {"reward_sd": float(np.std([reward for (reward,) in lab.truth(rows)]))}


def best_of(lab, sizes=(2, 4, 8, 16)):
    """What the best of n samples from the base model reaches, [{n, reward, win_rate, kl}].

    The best is that with the highest true reward. kl is the upper bound log n - (n - 1) / n on its
    KL from the base model (Beirami et al. 2024, arXiv:2401.01879). This is the yardstick for what a
    method pays for its reward. The samples of a prompt are split into groups of n. At most 256
    prompts are read."""
    prompts = lab.world.test_prompts(lab.eval_size, lab.eval_rng("evaluation"))
    n, most = min(256, len(prompts)), max(sizes)
    rewards = np.array(lab.truth(of_base(lab, "best of", prompts[:n], most)))
    base = np.array(lab.truth(of_base(lab, "evaluation samples", prompts)))[:n]
    found = []
    for size in sizes:
        best = rewards.reshape(n, most // size, size).max(-1)
        wins = (best > base) + 0.5 * (best == base)
        bound = math.log(size) - (size - 1) / size
        found.append(dict(n=size, reward=best.mean(), win_rate=wins.mean(), kl=bound))
    return found


# ---------------------------------------------------------------- intervals


def interval(values):
    """95 % confidence interval of the mean of the values by Student's t, as [low, high]."""
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
