"""What LD-DPO claims, and whether it holds here.

Filler words: a response is a good or a bad word, then up to 40 filler words. The annotators want
good words (1 nat) and, wrongly, fillers (0.1 nat each). The policy has two parameters, so its
quality (the probability of a good word) and its expected fillers are exact. Each method is fitted
to 2,000 sampled pairs at four values of beta, and fillers are read where the quality is 0.88; 20
samples are the seeds. The baselines are DPO, and R-DPO with a penalty on length that is half the
bias of the annotators. Reviews: DPO and LD-DPO on the same length-biased pairs. Optima of the
expected loss are tests (tests/methods/test_ld_dpo.py).

What theory expects:
1. With this bias the optimum has fewer fillers for a smaller alpha, at nearly the same quality.
   With half the bias this is not so for every alpha, because a fixed margin then needs larger
   log-ratios beyond the public length.
2. R-DPO removes the share of the bias that it penalizes, but one must know how large the bias is.
3. If the reference is not split, responses become shorter whatever the labels say.

On tuning seeds 100 to 109 both values of alpha had fewer fillers than DPO on every seed, and R-DPO
fewer than both. On reviews, on seeds 100 to 102, alpha = 0 had a small effect, and alpha = 0.5,
which is not measured any more, no reliable one.
"""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from lab.claims import at_or_nan, claim
from methods import dpo, ld_dpo, survey
from toy.exact import minimize

CAP = 40  # fillers at most; a response that reaches it ends without a scored token
PULLS = (1.4, 1.8, 2.2, 2.8)  # 1 / beta of the fits
QUALITY = 0.88  # at which fillers are compared


class Fillers:
    """A policy with two parameters (a, b), and pairs of its responses with length-biased labels.

    A response is a content token, good with probability sigmoid(a), then n filler tokens, each with
    probability sigmoid(b), then the end. The true reward is 1 for good content, and the labels add
    `bias` for each filler token. Responses come from the reference, a = 0 and sigmoid(b) = 3/4.
    There are all ordered pairs with their probabilities as weights, or `count` sampled pairs.
    """

    def __init__(self, bias, count=None, rng=None):
        n = torch.arange(CAP + 1).repeat(2)  # (R,)
        good = torch.arange(len(n)) > CAP
        place = torch.arange(CAP + 2)
        # what each token is: 0 none, 1 bad, 2 good, 3 filler, 4 the end
        ends = (place == n[:, None] + 1) & (n[:, None] < CAP)
        self.codes = torch.where(place <= n[:, None], 3, torch.where(ends, 4, 0))
        self.codes[:, 0] = 1 + good.long()
        self.n, self.good = n.double(), good.double()
        self.start = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
        every = torch.arange(len(n))
        self.pairs = torch.cartesian_prod(every, every)  # (M, 2), the chosen response first
        self.pairs = self.pairs[self.pairs[:, 0] != self.pairs[:, 1]]
        first, second = self.pairs.unbind(1)
        score, probs = self.good + bias * self.n, self.probs(self.start)
        weight = probs[first] * probs[second] * torch.sigmoid(score[first] - score[second])
        self.weight = weight / weight.sum()
        if count is not None:
            drawn = torch.multinomial(self.weight, count, replacement=True, generator=rng)
            drawn, counts = drawn.unique(return_counts=True)
            self.pairs, self.weight = self.pairs[drawn], counts.double() / count
        self.batch = SimpleNamespace(mask=(self.codes > 0)[self.pairs])

    def logps(self, theta):
        """Log-probs (R, T) of all responses' tokens."""
        a, b = theta
        parts = [0 * a, F.logsigmoid(-a), F.logsigmoid(a), F.logsigmoid(b), F.logsigmoid(-b)]
        return torch.stack(parts)[self.codes]

    def probs(self, theta):
        """Probabilities (R,)."""
        return self.logps(theta).sum(1).exp()

    def losses(self, theta, loss, cfg):
        """The losses (M,) of all pairs."""
        logps, ref_logps = (self.logps(x)[self.pairs] for x in (theta, self.start))
        return loss(logps, ref_logps, self.batch, cfg)[0]

    def optimum(self, loss, cfg):
        """{fillers, quality} at the minimum of the weighted mean loss."""
        theta = self.start.clone().requires_grad_()
        minimize([theta], lambda: (self.weight * self.losses(theta, loss, cfg)).sum())
        probs = self.probs(theta.detach())
        found = {"fillers": self.n, "quality": self.good}
        return {name: (probs * values).sum().item() for name, values in found.items()}


ARMS = {  # the loss, its Config at a beta, and the bias of the annotators
    "DPO": (dpo.loss, dpo.Config, 0.1),
    "alpha 0": (ld_dpo.loss, lambda beta: ld_dpo.Config(beta, 0.0), 0.1),
    "alpha 0.5": (ld_dpo.loss, lambda beta: ld_dpo.Config(beta, 0.5), 0.1),
    "R-DPO": (survey.loss, lambda beta: survey.Config("r_dpo", beta, alpha=0.05), 0.1),
    "DPO, half the bias": (dpo.loss, dpo.Config, 0.05),
    "alpha 0.5, half the bias": (ld_dpo.loss, lambda beta: ld_dpo.Config(beta, 0.5), 0.05),
    "DPO, no bias": (dpo.loss, dpo.Config, 0.0),
    "not on the reference, no bias": (
        ld_dpo.loss,
        lambda beta: ld_dpo.Config(beta, 0.5, on_reference=False),
        0.0,
    ),
}


def with_fillers(lab):
    """{arm: fillers at the quality QUALITY} from one sample of pairs of each bias."""
    count, found = lab.few(2000, least=500), {}
    for name, (loss, config, bias) in ARMS.items():
        world = Fillers(bias, count, lab.rng("pairs"))
        looks = [world.optimum(loss, config(1 / pull)) for pull in PULLS]
        found[name] = at_or_nan(looks, "quality", QUALITY, "fillers")
    return found


def measure(lab):
    """Fillers at one quality, and curves on reviews."""
    found = [lab.stage("fillers", lambda i=i: with_fillers(lab.at(seed=i))) for i in lab.worlds]
    arms = {
        "DPO, reviews": (dpo.loss, dpo.Config(beta=0.5)),
        "alpha 0, reviews": (ld_dpo.loss, ld_dpo.Config(beta=0.5, alpha=0.0)),
    }
    how = dict(length_bias=0.1, steps=100, eval_every=25, eval_size=1000)
    curves = lab.race(arms, world="reviews", **how)
    longer = [curve[-1]["length"] - curve[0]["length"] for curve in curves["DPO, reviews"]]
    return {
        **{name: [each[name] for each in found] for name in ARMS},
        **curves,
        "DPO, reviews, longer by": longer,
    }


def fewer(ours, baseline, words, **kwargs):
    return claim(
        f"In the world of filler words, {words} at the same quality",
        None,
        ours,
        "<",
        baseline,
        **dict(margin=0.5) | kwargs,
    )


CLAIMS = [
    fewer(
        "alpha 0",
        "DPO",
        "LD-DPO with alpha 0 writes fewer fillers than DPO on the same 2,000 length-biased pairs",
        kind="primary",
        world="filler words",
        matched="quality, pairs",
    ),
    fewer(
        "alpha 0.5",
        "DPO",
        "LD-DPO with alpha 0.5 writes fewer fillers than DPO on the same length-biased pairs",
    ),
    fewer(
        "alpha 0",
        "R-DPO",
        "LD-DPO with alpha 0 writes fewer fillers than R-DPO with half the annotators' bias",
        expect="reversed",
    ),
    fewer(
        "alpha 0.5, half the bias",
        "DPO, half the bias",
        "LD-DPO with alpha 0.5 writes fewer fillers than DPO if the annotators have half the bias",
        expect="no effect",
    ),
    fewer(
        "not on the reference, no bias",
        "DPO, no bias",
        "LD-DPO without a split of the reference writes fewer fillers than DPO even if the "
        "annotators have no bias",
    ),
]
WHERE = "On reviews with length-biased labels"
CLAIMS += [
    claim(
        f"{WHERE}, LD-DPO with alpha 0 writes shorter responses than DPO at matched KL",
        "length",
        "alpha 0, reviews",
        "<",
        "DPO, reviews",
        at_kl="shared",
        margin=0.5,
    ),
    claim(
        f"{WHERE}, LD-DPO with alpha 0 has a lower true reward than DPO at matched KL",
        "reward",
        "alpha 0, reviews",
        "<",
        "DPO, reviews",
        at_kl="shared",
        margin=0.1,
        expect="no effect",
    ),
    claim(
        "Length-biased labels make DPO's responses on reviews longer than the base model's: by "
        "more than 2 tokens",
        None,
        "DPO, reviews, longer by",
        ">",
        2.0,
        kind="control",
        expect="supported",
    ),
]
