"""The claims of LD-DPO as an experiment: ld_dpo against DPO on length-biased labels."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from data import UserError
from methods.ld_dpo import Config, loss

CAP = 40  # fillers, at most; there a response ends unscored


class Wordy:
    """A policy with two parameters (a, b). A response is a content token, good with probability sigmoid(a), and n fillers, each with
    probability sigmoid(b), then the end. The truth is 1 for good content; annotators add `delta` for each filler."""

    def __init__(self, delta):
        n = torch.arange(CAP + 1).repeat(2)
        good = torch.arange(len(n)) > CAP
        place = torch.arange(CAP + 2)
        # what each token is: 0 none, 1 bad, 2 good, 3 filler, 4 the end
        self.codes = torch.where(
            place <= n[:, None],
            3,
            torch.where((place == n[:, None] + 1) & (n[:, None] < CAP), 4, 0),
        )
        self.codes[:, 0] = 1 + good.long()
        self.n, self.good = n.double(), good.double()
        self.start = torch.tensor([0.0, math.log(3)], dtype=torch.float64)
        first, second = torch.cartesian_prod(torch.arange(len(n)), torch.arange(len(n))).unbind(1)
        first, second = first[first != second], second[first != second]
        self.pairs = torch.stack(
            [first, second], 1
        )  # every ordered pair of different responses, the first preferred
        liking, chance = self.good + delta * self.n, self.chance(self.start)
        weight = chance[first] * chance[second] * torch.sigmoid(liking[first] - liking[second])
        self.weight = weight / weight.sum()
        self.batch = SimpleNamespace(mask=(self.codes > 0)[self.pairs])

    def logps(self, theta):
        """Log-probs (R, T) of all responses' tokens."""
        a, b = theta
        return torch.stack(
            [0 * a, F.logsigmoid(-a), F.logsigmoid(a), F.logsigmoid(b), F.logsigmoid(-b)]
        )[self.codes]

    def chance(self, theta):
        """Probabilities (R,)."""
        return self.logps(theta).sum(1).exp()

    def expected(self, theta, cfg, weight=None):
        """The population loss."""
        losses, _ = loss(
            self.logps(theta)[self.pairs], self.logps(self.start)[self.pairs], self.batch, cfg
        )
        return ((self.weight if weight is None else weight) * losses).sum()

    def push(self, cfg):
        """The first step's pull on b, towards more fillers, of the pairs whose responses are equally good."""
        theta, good = self.start.clone().requires_grad_(), self.good[self.pairs]
        value = self.expected(theta, cfg, self.weight * (good[:, 0] == good[:, 1]))
        return -torch.autograd.grad(value, theta)[0][1].item()

    def optimum(self, cfg):
        """(E[n], P(good)) where the population loss is least, by quasi-Newton steps."""
        theta = self.start.clone().requires_grad_()
        how = dict(
            max_iter=200,
            tolerance_grad=1e-10,
            tolerance_change=1e-14,
            line_search_fn="strong_wolfe",
        )
        optimizer = torch.optim.LBFGS([theta], **how)

        def closure():
            optimizer.zero_grad()
            value = self.expected(theta, cfg)
            value.backward()
            return value

        optimizer.step(closure)
        chance = self.chance(theta.detach())
        return (chance * self.n).sum().item(), (chance * self.good).sum().item()


def on_reviews_with_bias(here, contest):
    """Align on the same pairs, whose labels like length -> {name: its curve of reward, kl and length; but the end alone has them, except
    for dpo and zero}."""
    data, found = here.preferences(here.base(), k=2), {}
    for name, cfg in contest.items():

        def watch(policy, step, whole=name in ("dpo", "zero")):
            wanted = ("reward", "kl", "length") if whole or step == here.steps else ()
            return {m: v for m, v in here.evaluate(policy).items() if m in wanted} if wanted else {}

        here.align(here.base(), data, loss, cfg, watch=watch)
        found[name] = here.curve
    return found


def length_at(curve, reward):
    """The length where a curve first reaches a reward, by linear interpolation."""
    for a, b in zip(curve, curve[1:]):
        low, high = sorted((a["reward"], b["reward"]))
        if low <= reward <= high:
            return a["length"] + (reward - a["reward"]) / ((b["reward"] - a["reward"]) or 1.0) * (
                b["length"] - a["length"]
            )
    raise UserError(f"the curve never reaches a reward of {reward:.3g}")


def claim(lab):
    """Where length is all that the labels add, the first push on it is a line in alpha; at a strong bias the optimum is 21 % shorter at
    alpha 0.5 and 39 % at 0, for less than 0.005 of quality; without a bias nothing changes, unless the reference counts in full, which
    shortens by itself (all exact). On reviews with a length bias of 0.1 alpha 0 writes less than DPO, after equal steps, at one KL and
    where both first reach one reward.

    Not reproduced: at a mild bias (0.05) the optimum is not shorter with every smaller alpha, since a fixed margin then wants larger
    log-ratios beyond the public length: the effect is one of early training. On reviews it is small, and the paper's equal reward is not
    shown after equal steps. Tuning seeds 100 to 102, beta 0.5, 100 steps, tokens before 13.5: DPO 20.4, 20.2, 19.5, alpha 0.5 18.5, 20.9,
    20.1, alpha 0 16.6, 19.3, 19.1, at rewards of 0.257, 0.172, 0.340 (DPO), 0.286, 0.225, 0.371 and 0.380, 0.094, 0.249. Where both first
    reach one reward (1024 prompts) alpha 0.5 writes 18.9, 18.9, 19.5 tokens and DPO 20.3, 20.1, 19.8; alpha 0.3 18.3, 18.3, 19.5 and DPO
    20.2, 20.0, 19.7; at one KL it is shorter too, but on seed 101 at 0.05 to 0.08 less reward. In full alpha 0.5 ends at 4 tokens and
    rewards of 0.457, 0.420, 0.570. Of the reported seeds one fails at equal reward: on seed 2 alpha 0 writes 19.4 tokens and DPO 17.6
    (18.2, 16.2 and 19.2, 19.1 on the others), for a reward read off a curve of five points on 512 prompts is noisy."""
    alphas, claims = (1.0, 0.75, 0.5, 0.25, 0.0), []
    world, plain, mild = Wordy(0.1), Wordy(0.0), Wordy(0.05)
    push = [world.push(Config(0.5, alpha)) for alpha in alphas]
    for alpha, one, share in zip(alphas, push, (1.0, 0.8995, 0.7990, 0.6986, 0.5981)):
        claims.append(
            lab.exact(
                f"alpha {alpha}: the first push on length, of DPO's", one / push[0], share, 1e-4
            )
        )
    biased = [world.optimum(Config(0.5, alpha)) for alpha in alphas]
    for alpha, (n, _), length in zip(alphas, biased, (10.585, 9.553, 8.316, 7.314, 6.478)):
        claims.append(
            lab.exact(
                f"alpha {alpha}: fillers at the optimum, length bias 0.1, 3 before", n, length, 2e-3
            )
        )
    good = [p for _, p in biased]
    claims.append(
        lab.compare(
            "quality lost, at most 0.005",
            "P(good) lost",
            [good[0] - p for p in good[1:]],
            [0.005] * 4,
            smaller=True,
        )
    )
    gap = max(abs(plain.optimum(Config(0.5, alpha))[0] - 3) for alpha in alphas)
    claims.append(lab.exact("without bias the length stays: largest change", gap, 0.0, 1e-3))
    for alpha, length in zip(alphas[1:], (1.929, 1.200, 0.663, 0.324)):
        n = plain.optimum(Config(0.5, alpha, False))[0]
        claims.append(
            lab.exact(f"alpha {alpha}, the reference in full: brevity of its own", n, length, 2e-3)
        )
    lengths = [mild.optimum(Config(0.5, alpha))[0] for alpha in alphas]
    text = "bias 0.05: every smaller alpha is shorter at the optimum"
    claims.append(
        lab.compare(text, "fillers", lengths[1:], lengths[:-1], smaller=True, expected=False)
    )
    contest = {
        "dpo": Config(0.5, 1.0),
        "half": Config(0.5, 0.5),
        "zero": Config(0.5, 0.0),
        "full": Config(0.5, 0.5, False),
    }
    how = dict(steps=100, length_bias=0.1, eval_size=512, eval_every=25)
    runs = [on_reviews_with_bias(lab.at(seed=seed, **how), contest) for seed in lab.seeds]
    start, curves = [r["dpo"][0] for r in runs], {name: [r[name] for r in runs] for name in contest}
    ends = {name: [curve[-1] for curve in side] for name, side in curves.items()}
    lost = [a["reward"] - b["reward"] for a, b in zip(ends["dpo"], ends["zero"])]
    both = [min(max(p["reward"] for p in r[name]) for name in ("dpo", "zero")) for r in runs]
    alike = [
        [length_at(curve, reward) for curve, reward in zip(curves[name], both)]
        for name in ("zero", "dpo")
    ]
    short, text = dict(margin=0.5, smaller=True), "reviews: alpha 0 is shorter than DPO"
    return [
        *claims,
        lab.compare(
            "reviews: biased labels make DPO longer", "length", ends["dpo"], start, margin=2.0
        ),
        lab.compare(f"{text}, equal steps", "length", ends["zero"], ends["dpo"], **short),
        lab.compare(text, "length", curves["zero"], curves["dpo"], at_kl="shared", **short),
        lab.compare(f"{text}, where both reach one reward", "length", *alike, smaller=True),
        lab.compare(
            "reviews: alpha 0.5 is shorter than DPO",
            "length",
            ends["half"],
            ends["dpo"],
            smaller=True,
            expected=False,
        ),
        lab.compare(
            "reviews: reward that alpha 0 loses to DPO, at most 0.1",
            "reward lost",
            lost,
            [0.1] * len(lost),
            smaller=True,
            expected=False,
        ),
        lab.compare(
            "reviews: alpha 0.5, the reference in full, is far shorter",
            "length",
            ends["full"],
            ends["dpo"],
            margin=5.0,
            smaller=True,
        ),
        lab.compare(
            "and has more true reward, which brevity does not cost here",
            "reward",
            ends["full"],
            ends["dpo"],
            margin=0.05,
        ),
    ]
