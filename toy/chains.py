"""Trees of solutions in steps: rows in which responses share the steps with which they begin.

    7+8+0=15,4+5+1=10:105    steps "7+8+0=15,"  "4+5+1=10:"  "105"

A step ends behind a token that contains a separator. `grown` samples such trees from a policy, in a
world that demonstrates and verifies steps, much as TPO's data are made (arXiv:2410.12854).
"""

import random

import torch

SEPARATORS = set(",:;\n")


def tree(prompt, chains, scores):
    """Make a row of responses (steps of token ids, ended), in which equal first steps are one node.

    scores: one number per response.
    """
    nodes, values = {}, {}
    for (steps, ended), score in zip(chains, scores):
        parent = -1
        for n, ids in enumerate(steps):
            node = (parent, tuple(ids), ended and n + 1 == len(steps))
            parent = nodes.setdefault(node, len(nodes))
        values[parent] = float(score)
    parents, responses, ends = zip(*nodes)
    return dict(
        prompt=prompt,
        responses=[list(ids) for ids in responses],
        parents=list(parents),
        ends=list(ends),
        scores=[values.get(k, 0.0) for k in range(len(nodes))],
    )


def split_steps(ids, tokenizer):
    """Split token ids after every separator -> the steps, at least one, which may be empty."""
    steps = [[]]
    for i in ids:
        steps[-1].append(i)
        if SEPARATORS & set(tokenizer.decode([i])):
            steps.append([])
    return steps if steps[-1] or len(steps) == 1 else steps[:-1]


def grown(lab, policy):
    """Trees of --k responses: a correct one, k - 2 samples after random prefixes of it, one sample.

    The score of a correct response is 1, and otherwise 0.9 times the share of its steps before the
    first error.
    """
    world, tokenizer = lab.world, lab.world.tokenizer
    rng = random.Random(int(torch.randint(2**62, (), generator=lab.rng("trees"))))
    prompts = world.prompts(lab.prompts, lab.rng("prompts"))
    texts = [world.demonstrate(prompt, rng) for prompt in prompts]
    chains = [[(split_steps(tokenizer.encode(text), tokenizer), True)] for text in texts]
    begun = []  # (index of the prompt, steps that are given)
    for n, [(steps, _)] in enumerate(chains):
        cuts = [*(rng.randrange(1, len(steps)) for _ in range(lab.k - 2)), 0]
        begun += [(n, steps[:cut]) for cut in cuts]
    asked = [tokenizer.encode(prompts[n]) + sum(prefix, []) for n, prefix in begun]
    for (n, prefix), row in zip(begun, lab.sample(policy, asked, 1)):
        steps = prefix + split_steps(row["responses"][0], tokenizer)
        chains[n].append((steps, row["ends"][0]))

    def score(prompt, ids):
        marks = world.verify_steps(prompt, ids)
        correct = world.verify(prompt, ids) and all(marks)
        return 1.0 if correct else 0.9 * [*marks, False].index(False) / len(marks)

    rows = []
    for prompt, group in zip(prompts, chains):
        rows.append(tree(prompt, group, [score(prompt, sum(steps, [])) for steps, _ in group]))
    # keep trees with at least two leaves, since a pair needs two
    return [row for row in rows if len(row["parents"]) > len(set(row["parents"]) - {-1}) + 1]
