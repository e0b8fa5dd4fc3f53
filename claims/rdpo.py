"""What rDPO claims, and whether it holds here.

Tables: 8 prompts with 10 responses each, log-linear policies of 6 random features, and rewards that
are linear in the same features, as in the paper's theorem. Pairs of the uniform reference are
labelled by Bradley-Terry, and 40 % of the labels are flipped. rDPO, DPO and conservative DPO (label
smoothing) are fitted to 250, 2,000 or 16,000 pairs at the beta at which the known reward's optimum
is a log-linear policy, so the regret can reach 0. At matched KL the fitted parameters are scaled
until all policies have that KL, so that only their direction counts.

Reviews: rDPO and DPO at the same beta, with 20 % of the labels flipped. That rDPO recovers the
reward from the expected loss at every flip rate is a test (tests/methods/test_rdpo.py).

What theory expects: flips make DPO behave as if beta were larger, so more pairs do not help it, and
rDPO's regret falls with the number of pairs. A smaller beta removes that bias of DPO as well, so at
matched KL hardly a difference is left.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lab.claims import claim
from methods import dpo, rdpo, survey

FLIP = 0.4
SIZES = (250, 2000, 16000)
FITS = {
    "rdpo": (rdpo.loss, rdpo.Config(beta=1.0, epsilon=FLIP)),
    "dpo": (dpo.loss, dpo.Config(beta=1.0)),
    "cdpo": (survey.loss, survey.Config(variant="cdpo", beta=1.0, epsilon=FLIP)),
}
SCALES = [0.0, *(0.02 * 1.2**i for i in range(24))]


class LogLinear:
    """Random features (P, R, D) of responses, the reward as a parameter (D,), a uniform reference.

    A parameter stands for the policy softmax(features @ parameter) over the responses.
    """

    def __init__(self, rng, prompts=8, responses=10, features=6, size=1.0):
        self.features = torch.randn(prompts, responses, features, generator=rng).double()
        self.truth = size * torch.randn(features, generator=rng).double()
        self.rewards = self.features @ self.truth  # (P, R)
        i, j = (~torch.eye(responses, dtype=torch.bool)).nonzero(as_tuple=True)
        self.pairs = torch.stack([i, j], 1)  # (M, 2) ordered pairs of different responses

    def log_probs(self, parameter):
        return (self.features @ parameter).log_softmax(1)

    def look(self, parameter):
        """{reward, kl} of a policy, with the reference's standard deviation of the reward."""
        log_p = self.log_probs(parameter)
        reward = (log_p.exp() * self.rewards).sum(1).mean()
        kl = (log_p.exp() * log_p).sum(1).mean() + math.log(len(log_p[0]))
        spread = (self.rewards - self.rewards.mean(1, keepdim=True)).square().mean().sqrt()
        return {"reward": reward.item(), "kl": kl.item(), "reward_sd": spread.item()}

    def scaled(self, parameter):
        """The curve of the policies along a direction, from the reference to a large KL."""
        return [self.look(scale * F.normalize(parameter, dim=0) * 4) for scale in SCALES]

    def counts(self, n, flip, rng):
        """How often each ordered pair, chosen first, occurs among n labelled pairs: (P, M)."""
        first, second = self.rewards[:, self.pairs].unbind(-1)
        p = torch.sigmoid(first - second)
        p = (1 - flip) * p + flip * (1 - p)
        drawn = torch.multinomial(p.flatten(), n, replacement=True, generator=rng)
        return torch.bincount(drawn, minlength=p.numel()).view(p.shape).double()

    def fitted(self, loss, cfg, counts, steps, columns=None):
        """The parameter that Adam reaches in `steps` full-batch steps on weighted pairs."""
        parameter = torch.zeros_like(self.truth, requires_grad=True)
        ref_logps = self.log_probs(torch.zeros_like(self.truth))[:, self.pairs].flatten(0, 1)
        mask = torch.ones(*ref_logps.shape, 1, dtype=torch.bool)
        batch = SimpleNamespace(mask=mask, **(columns or {}))
        optimizer = torch.optim.Adam([parameter], lr=0.1)
        weight = counts.flatten() / counts.sum()
        for _ in range(steps):
            optimizer.zero_grad()
            logps = self.log_probs(parameter)[:, self.pairs].flatten(0, 1)  # (P * M, 2)
            losses, _ = loss(logps[..., None], ref_logps[..., None], batch, cfg)
            (weight * losses).sum().backward()
            optimizer.step()
        return parameter.detach()


def table_of(lab):
    """One random table -> {arm, pairs: {reward, regret, kl}} and {arm, scaled: curve}.

    The regret is what the policy lacks of the largest reward - KL, which is the truth's.
    """
    table, found = LogLinear(lab.rng("table")), {}
    best = table.look(table.truth)
    most = best["reward"] - best["kl"]
    for n in SIZES:
        counts = table.counts(n, FLIP, lab.rng("pairs", n))
        for name, (loss, cfg) in FITS.items():
            if name == "cdpo" and n < SIZES[-1]:
                continue
            parameter = table.fitted(loss, cfg, counts, lab.few(150))
            look = found[f"{name}, {n}"] = table.look(parameter)
            look["regret"] = most - look["reward"] + look["kl"]
            if n == SIZES[-1]:
                found[f"{name}, scaled"] = table.scaled(parameter)
    return found


def measure(lab):
    """Rewards and regrets in the tables, and curves on reviews."""
    tables = [lab.stage("table", lambda i=i: table_of(lab.at(seed=i))) for i in lab.worlds]
    arms = {
        "rdpo, reviews": (rdpo.loss, rdpo.Config(beta=1.0, epsilon=0.2)),
        "dpo, reviews": (dpo.loss, dpo.Config(beta=1.0)),
    }
    how = dict(flip=0.2, label_temperature=0.25, prompts=6400, batch_size=32, lr=4e-4)
    curves = lab.race(arms, world="reviews", eval_size=1000, eval_every=50, **how)
    return {name: [table[name] for table in tables] for name in tables[0]} | curves


TABLES = "In tables with log-linear policies and 40 % flipped labels"
CLAIMS = [
    claim(
        f"{TABLES}, rDPO fitted to 16,000 pairs has a higher true reward than DPO at the same beta",
        "reward",
        "rdpo, 16000",
        ">",
        "dpo, 16000",
        margin=0.1,
        kind="primary",
        world="log-linear tables",
        matched="pairs, beta",
    ),
    claim(
        f"{TABLES}, rDPO fitted to 16,000 pairs has a higher true reward than conservative DPO at "
        "the same beta",
        "reward",
        "rdpo, 16000",
        ">",
        "cdpo, 16000",
        margin=0.1,
    ),
    claim(
        f"{TABLES}, rDPO has less regret after 16,000 pairs than after 2,000",
        "regret",
        "rdpo, 16000",
        "<",
        "rdpo, 2000",
    ),
    claim(
        f"{TABLES}, DPO has less regret after 16,000 pairs than after 2,000",
        "regret",
        "dpo, 16000",
        "<",
        "dpo, 2000",
        margin=0.1,
        kind="control",
        expect="no effect",
    ),
    claim(
        f"{TABLES}, rDPO fitted to 16,000 pairs has a higher true reward than DPO at a KL of 1 nat",
        "reward",
        "rdpo, scaled",
        ">",
        "dpo, scaled",
        at_kl=1,
        margin=0.1,
        expect="no effect",
    ),
    claim(
        "On reviews with 20 % flipped labels, rDPO ends with a higher true reward than DPO at the "
        "same beta after equal steps",
        "reward",
        "rdpo, reviews",
        ">",
        "dpo, reviews",
        margin=0.1,
    ),
    claim(
        "On reviews with 20 % flipped labels, rDPO has a higher true reward than DPO at matched KL",
        "reward",
        "rdpo, reviews",
        ">",
        "dpo, reviews",
        at_kl="shared",
        margin=0.1,
        expect="no effect",
    ),
]
