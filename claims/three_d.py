"""What the 3D-Properties paper claims about DPO and its two remedies, and whether it holds here.

The paper's toy: small networks with 4 prompts and 10 responses, in which the likelihood of the
chosen response is followed under DPO, flex and sft. Reviews: DPO, flex and sft are aligned on
on-policy pairs, and DPO and flex also on off-policy pairs, which have the same chosen responses and
rejected ones that are sampled at a higher temperature. The claims compare true reward, and by how
much the log-probs of chosen and rejected responses rose. A third toy with fixed features is a test
(tests/methods/test_three_d.py): under DPO the likelihood of its chosen response peaks and then
moves to a response outside the pair, and both remedies prevent this.

On tuning seeds 100 to 102, flex has a higher reward than DPO on off-policy pairs only because its
KL is smaller. On on-policy pairs it has a higher reward at matched KL, but not reliably after equal
steps, when DPO's KL is several times larger.

Not reproduced: in the paper's toy the lost probability goes to the responses that are in no pair.
Here it goes to the responses that are chosen for other prompts. Of the paper's scenarios, the first
ends above the third on only 5 of the seeds 100 to 107.
"""

from types import SimpleNamespace

import torch

from lab.claims import claim
from methods import dpo, three_d
from methods.three_d import Config

SCENARIOS = {1: (0.12, 0.12), 2: (0.02, 0.12), 3: (0.12, 0.02), 4: (0.02, 0.02)}


def networks(loss, cfg, scenario, seed, count=8, steps=500, width=32):
    """The paper's toy (sec. 3.2), `count` networks of three layers at once.

    For prompt i of 4, response i of 10 is chosen and one of 4 to 7 is rejected; 8 and 9 are in no
    pair. The networks are fitted to the scenario's likelihoods of a chosen and a rejected response,
    and then trained with the loss. -> log-probs (steps + 1, count, 4 prompts, 4) of the chosen
    response, the rejected one, all others, and 8 and 9."""
    rng = torch.Generator().manual_seed(seed)
    high, low = SCENARIOS[scenario]
    wanted = torch.tensor([high] * 4 + [low] * 4 + [(1 - 4 * high - 4 * low) / 2] * 2)
    sizes = [4, width, width, 10]
    weights = [
        (torch.randn(count, a, b, generator=rng) * (2 / a) ** 0.5).requires_grad_()
        for a, b in zip(sizes, sizes[1:])
    ]
    biases = [torch.zeros(count, 1, b, requires_grad=True) for b in sizes[1:]]
    rejected = torch.randint(4, 8, (count, 4), generator=rng)
    pair = torch.stack([torch.arange(4).expand(count, 4), rejected], -1)  # (count, 4, 2)
    batch = SimpleNamespace(mask=torch.ones(4 * count, 2, 1, dtype=torch.bool))

    def log_probs():  # of the 4 prompts, which are one-hot vectors
        hidden = (weights[0] + biases[0]).relu()
        hidden = (hidden @ weights[1] + biases[1]).relu()
        return (hidden @ weights[2] + biases[2]).log_softmax(-1)  # (count, 4, 10)

    def step(optimizer, value):
        optimizer.zero_grad()
        value.backward()
        optimizer.step()

    optimizer = torch.optim.Adam([*weights, *biases], lr=1e-2)
    for _ in range(300):
        step(optimizer, (wanted * (wanted.log() - log_probs())).sum())
    ref_logps = log_probs().detach().gather(-1, pair).view(-1, 2, 1)
    optimizer, path = torch.optim.Adam([*weights, *biases], lr=1e-2), []
    for _ in range(steps + 1):
        found = log_probs()
        kept = found.gather(-1, pair)
        with torch.no_grad():
            others = found.scatter(-1, pair, -torch.inf).logsumexp(-1, True)
            path.append(torch.cat([kept, others, found[..., 8:].logsumexp(-1, True)], -1))
        losses, _ = loss(kept.view(-1, 2, 1), ref_logps, batch, cfg)
        step(optimizer, losses.view(count, 4).mean(1).sum())
    return torch.stack(path)


def in_the_toy(seeds):
    """{series such as "DPO, end": the mean likelihood of the chosen response, one per seed}."""
    runs = {
        "DPO": (dpo.loss, dpo.Config(), 1),
        "flex": (three_d.loss, Config("flex", beta_rejected=0.02), 1),
        "sft": (three_d.loss, Config("sft"), 1),
        "DPO, scenario 3": (dpo.loss, dpo.Config(), 3),
    }
    paths = {
        name: [networks(*run, seed).exp().mean((1, 2)) for seed in seeds]
        for name, run in runs.items()
    }
    ends = {f"{name}, end": [path[-1, 0].item() for path in paths[name]] for name in runs}
    return ends | {
        "DPO, peak": [path[:, 0].max().item() for path in paths["DPO"]],
        "DPO, 8 and 9 at the end": [path[-1, 3].item() for path in paths["DPO"]],
        "DPO, 8 and 9 at the start": [path[0, 3].item() for path in paths["DPO"]],
    }


def on_policy(lab, base):
    """Pairs of the base model."""
    return lab.preferences(base, k=2)


def off_policy(lab, base):
    """The same chosen responses, with rejected ones that are sampled at a higher temperature."""
    rows = lab.preferences(base, k=2)
    others = lab.at(temperature=1.5).sample(base, [row["prompt"] for row in rows], 1)
    return lab.rows(
        {
            "prompt": row["prompt"],
            "responses": [row["responses"][0], other["responses"][0]],
            "ends": [row["ends"][0], other["ends"][0]],
            "scores": [1.0, 0.0],
        }
        for row, other in zip(rows, others)
    )


def measure(lab):
    """Likelihoods in the toy, and curves on reviews that end with log-ratios of 256 pairs."""

    def race(arms, data):
        def end(lab, policy):
            chosen, rejected = three_d.log_ratios(lab, policy, data(lab, lab.base())[:256]).mean(0)
            return {"chosen_ratio": chosen.item(), "rejected_ratio": rejected.item()}

        settings = dict(steps=60, prompts=2048, eval_size=1000, eval_every=20)
        return lab.race(arms, data=data, end=end, world="reviews", **settings)

    both = {"DPO": (dpo.loss, dpo.Config()), "flex": (three_d.loss, Config("flex"))}
    own = {f"{name}, on-policy": arm for name, arm in both.items()}
    other = {f"{name}, off-policy": arm for name, arm in both.items()}
    toy = lab.stage("toy", lambda: in_the_toy(lab.seeds))
    return toy | race(own, on_policy) | race(other, off_policy)


def in_toy(words, ours, relation, baseline, **kwargs):
    return claim(f"In the paper's toy {words}", None, ours, relation, baseline, **kwargs)


def flex_above_dpo(data, **kwargs):
    words = "at matched KL" if "at_kl" in kwargs else "after equal steps"
    return claim(
        f"On {data} pairs of reviews flex has a higher true reward than DPO {words}",
        "reward",
        f"flex, {data}",
        ">",
        f"DPO, {data}",
        margin=0.1,
        **kwargs,
    )


CLAIMS = [
    flex_above_dpo(
        "on-policy", at_kl="shared", kind="primary", world="reviews", expect="inconclusive"
    ),
    flex_above_dpo("off-policy", at_kl="shared", expect="inconclusive"),
    claim(
        "On reviews DPO on off-policy pairs has a lower true reward than on on-policy pairs at "
        "matched KL",
        "reward",
        "DPO, off-policy",
        "<",
        "DPO, on-policy",
        at_kl="shared",
        margin=0.1,
    ),
    claim(
        "On reviews DPO lowers the chosen log-prob further on off-policy than on on-policy pairs "
        "after equal steps",
        "chosen_ratio",
        "DPO, off-policy",
        "<",
        "DPO, on-policy",
        margin=0.3,
        expect="inconclusive",
    ),
    claim(
        "On reviews the chosen log-prob ends higher with flex than with DPO after equal steps",
        "chosen_ratio",
        "flex, on-policy",
        ">",
        "DPO, on-policy",
        margin=0.3,
    ),
    in_toy("DPO's chosen likelihood ends below its peak", "DPO, end", "<", "DPO, peak", margin=0.1),
    in_toy(
        "the chosen likelihood ends higher with flex than with DPO",
        "flex, end",
        ">",
        "DPO, end",
        margin=0.1,
    ),
    in_toy(
        "DPO's chosen likelihood ends higher in scenario 1 than in scenario 3, where rejected "
        "responses start unlikely",
        "DPO, end",
        ">",
        "DPO, scenario 3, end",
        margin=0.02,
        expect="inconclusive",
    ),
    in_toy(
        "DPO raises the likelihood of responses 8 and 9, which are in no pair",
        "DPO, 8 and 9 at the end",
        ">",
        "DPO, 8 and 9 at the start",
        expect="reversed",
    ),
]
