"""Metrics of a training step, of a quick look during training, and the evaluation of a model."""

import math

import numpy as np
import torch

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
    size, out = max(1, min(64, 2**27 // logits)), []  # rows per batch, for at most 2^27 logits
    for start in range(0, len(rows), size):
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
    return lab.world.prompts(n, lab.eval_rng("evaluation"))


def of_base(lab, name, look):
    """`look()`, cached; its value must depend only on the base model, the world and settings."""
    settings, fingerprint = lab.settings, getattr(lab.reference, "fingerprint", None)
    key = [name, fingerprint, lab.world.key(), settings.eval_size, settings.base_seed]
    key += [settings.temperature, lab.max_response]
    return lab.cached(key, look) if fingerprint else look()


def eval_pairs(lab):
    """Held-out rows with clean labels.

    With --data they are the file's. Otherwise pairs are sampled from the base model and labelled by
    the true reward; ties are left out.
    """
    world, settings = lab.world, lab.settings
    if world.reward is None:
        return lab.encode(world.held_out[: settings.eval_size])

    def draw():
        prompts = world.prompts(settings.eval_size, lab.eval_rng("held-out"))
        rng = lab.eval_rng("held-out samples")
        rows = lab.sample(lab.reference, prompts, 2, rng)
        return [
            row | {"scores": [float(a > b), float(b > a)]}
            for row, (a, b) in zip(rows, lab.truth(rows))
            if a != b
        ]

    return lab.encode(of_base(lab, "held-out", draw))


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


@torch.no_grad()
def evaluate(lab, policy):
    """{name: number or interval} of a model; see Lab.evaluate."""
    world, reference, training = lab.world, lab.reference, policy.training
    policy.eval()
    if world.kind == "table":
        out = {"reward": policy.expect(world.rewards()), "kl": policy.kl(reference)}
    elif world.kind == "images":
        prompts = eval_prompts(lab, lab.settings.eval_size)
        rows = lab.sample(policy, prompts, 1, lab.eval_rng("evaluation samples"))
        rewards = [r[0] for r in lab.truth(rows)]
        out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
    else:
        out = evaluate_text(lab, policy)
    out |= {name: float(value) for name, value in world.measure(policy, lab).items()}
    policy.train(training)
    return out


def evaluate_text(lab, policy):
    """The part of `evaluate` for a world of text."""
    world, size = lab.world, lab.settings.eval_size
    n = size if world.reward else min(size, 16)
    prompts, out = eval_prompts(lab, n), {}
    rows = lab.encode(lab.sample(policy, prompts, 1, lab.eval_rng("evaluation samples")))
    if world.reward:

        def of_reference():
            samples = lab.sample(lab.reference, prompts, 1, lab.eval_rng("evaluation samples"))
            return [r[0] for r in lab.truth(samples)]

        rewards = [r[0] for r in lab.truth(rows)]
        base = of_base(lab, "rewards", of_reference)
        wins = sum((a > b) + 0.5 * (a == b) for a, b in zip(rewards, base))
        out = {"reward": float(np.mean(rewards)), "reward_interval": interval(rewards)}
        out |= {"win_rate": wins / n, "win_rate_interval": wilson(wins, n)}
    out["kl"] = float(np.mean(sequence_kl(lab, policy, lab.reference, rows)))
    out["length"] = float(np.mean([len(row["responses"][0]) for row in rows]))
    out["diversity"] = diversity([row["responses"][0] for row in rows])
    return out | pair_stats(lab, policy)


@torch.no_grad()
def glance(lab, policy):
    """A quick evaluation during training: true reward, KL and length of text.

    It uses half as many prompts as an evaluation. In a world without a true reward it returns the
    accuracy on held-out pairs, and only if --eval_every is given.
    """
    world = lab.world
    if world.kind == "table":
        return {"reward": policy.expect(world.rewards()), "kl": policy.kl(lab.reference)}
    if world.reward is None:
        if lab.settings.eval_every is None:
            return {}
        found = pair_stats(lab, policy)
        return {name: value for name, value in found.items() if not isinstance(value, list)}
    prompts = eval_prompts(lab, max(2, lab.settings.eval_size // 2))
    rows = lab.encode(lab.sample(policy, prompts, 1, lab.eval_rng("glance")))
    out = {"reward": float(np.mean(lab.truth(rows)))}
    if world.kind == "text":
        out["kl"] = float(np.mean(sequence_kl(lab, policy, lab.reference, rows)))
        out["length"] = float(np.mean([len(row["responses"][0]) for row in rows]))
    return out


# ---------------------------------------------------------------- intervals


def interval(values):
    """95 % confidence interval of the mean of a few values by Student's t, as [low, high]."""
    values = np.asarray(values, dtype=float)
    if len(values) < 2:
        return [math.nan, math.nan]
    from scipy.stats import t

    half = t.ppf(0.975, len(values) - 1) * values.std(ddof=1) / math.sqrt(len(values))
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
