"""What ASFT claims, and whether it holds here.

There are two experiments. (1) Log-linear policies whose chosen and rejected response share
features: ASFT raises the chosen response and DPO lowers it, but the gap between the two grows much
more under DPO. (2) Reviews from the SFT base model. The gradients and the optima in tables are
tests (tests/methods/test_asft.py).

What theory expects: at the start p(y_l) is small, so the rejected side has only a small part of the
gradient, and ASFT is nearly SFT. On tuning seeds 100 to 102 the rejected side added no reliable
reward to SFT, and the chosen log-prob fell less than under DPO, but did not rise above the base
model's. Training from random weights, without an SFT stage, is not measured: it was tried on the
same seeds, and DPO, whose reference is then random, ended far behind ASFT.
"""

import math
from types import SimpleNamespace

import torch

from data import collate
from lab.claims import claim
from methods import asft, dpo, sft

LOSSES = {
    "asft": (asft.loss, asft.Config()),
    "sft": (sft.loss, sft.Config()),
    "dpo": (dpo.loss, dpo.Config()),
}
REFERENCE = {"asft": None, "sft": None, "dpo": "start"}


# ---------------------------------------------------------------- shared features


def log_linear(loss, cfg, features, steps, lr):
    """Policies with logits features (N, Y, D) @ theta (N, D), trained to choose response 0 over 1.

    -> log-probs (N, Y) and theta after `steps` steps of gradient descent from theta = 0.
    """
    N, Y, D = features.shape
    theta = torch.zeros(N, D, dtype=torch.float64, requires_grad=True)
    mask = torch.ones(N, 2, 1, dtype=torch.bool)
    batch = SimpleNamespace(mask=mask, scores=torch.tensor([[1.0, 0.0]]).expand(N, 2))
    uniform = torch.full((N, 2, 1), -math.log(Y), dtype=torch.float64)

    def log_probs():
        return (features @ theta[..., None]).squeeze(-1).log_softmax(1)

    for _ in range(steps):
        losses, _ = loss(log_probs()[:, :2, None], uniform, batch, cfg)
        (gradient,) = torch.autograd.grad(losses.sum(), theta)
        theta.data -= lr * gradient
    return log_probs().detach(), theta.detach()


def displacement(rng, draws=20):
    """20 responses with 6 random features; those of the rejected one are 1.3 times the chosen's.

    -> {method: {"change": change of the chosen log-prob, "gap": chosen minus rejected log-prob}},
    both (draws,).
    """
    features = torch.randn(draws, 20, 6, generator=rng, dtype=torch.float64)
    noise = torch.randn(draws, 6, generator=rng, dtype=torch.float64)
    features[:, 1] = 1.3 * features[:, 0] + 0.2 * noise
    out = {}
    for name, (loss, cfg) in LOSSES.items():
        lr = 0.5 if name == "dpo" else 0.05  # DPO's gradient has the factor beta = 0.1
        logps, _ = log_linear(loss, cfg, features, 400, lr)
        out[name] = {"change": logps[:, 0] + math.log(20), "gap": logps[:, 0] - logps[:, 1]}
    return out


# ---------------------------------------------------------------- reviews


def pull(policy, loss, cfg, ref_logps, batch):
    """The ratio of |dL / d log pi| between the rejected and the chosen responses of a batch."""
    logps = policy.logps(batch).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(loss(logps, ref_logps, batch, cfg)[0].sum(), logps)
    chosen, rejected = (gradient * batch.mask).abs().sum((0, 2)).tolist()
    return rejected / chosen


def looked_at(lab, policy):
    """An evaluation, with the `pull` of both losses on 256 of the training pairs."""
    base = lab.base()
    rows = lab.preferences(base, k=2)[:256]
    batch = collate(rows, lab.world.tokenizer).to(lab.device)
    with torch.no_grad():
        ref_logps = base.logps(batch)
    pulls = {f"pull of {n}": pull(policy, *LOSSES[n], ref_logps, batch) for n in ("asft", "dpo")}
    return lab.evaluate(policy) | pulls


def measure(lab):
    """Series of the two experiments: shared features and reviews."""
    series = {}
    for seed in lab.seeds:
        found = displacement(lab.at(seed=seed).rng("displacement"))
        for name, values in found.items():
            means = {metric: value.mean().item() for metric, value in values.items()}
            series.setdefault(f"{name}, shared features", []).append(means)
    arms = {n: (*LOSSES[n], dict(reference=REFERENCE[n])) for n in ("asft", "dpo")}
    tuned = lab.race(
        arms,
        end=looked_at,
        world="reviews",
        prompts=3200,
        steps=100,
        batch_size=32,
        eval_size=1000,
        eval_every=25,
    )
    for name in ("asft", "dpo"):
        for curve in tuned[name]:
            curve[-1]["pull"] = curve[-1][f"pull of {name}"]
    return series | tuned


CLAIMS = [
    claim(
        "On reviews from the base model, ASFT has a higher true reward than DPO at matched KL",
        "reward",
        "asft",
        ">",
        "dpo",
        at_kl="shared",
        margin=0.1,
        kind="primary",
        expect="no effect",
        world="reviews",
    ),
    claim(
        "Where responses share features, ASFT separates chosen and rejected less than DPO",
        "gap",
        "asft, shared features",
        "<",
        "dpo, shared features",
        margin=1.0,
    ),
    claim(
        "On reviews, the rejected side has a smaller share of the gradient in log-probs under "
        "ASFT than under DPO",
        "pull",
        "asft",
        "<",
        "dpo",
        margin=0.5,
    ),
    claim(
        "On reviews, ASFT ends with a higher chosen log-prob than DPO after equal steps",
        "chosen_logp",
        "asft",
        ">",
        "dpo",
        margin=0.5,
    ),
]
