"""The claims of 3D-Properties as an experiment: DPO beside its two remedies."""

import math
from types import SimpleNamespace

import torch
import torch.nn.functional as F

from methods.three_d import Config, log_ratios, loss


def slower(cfg):
    """The beta of the rejected side and the weight of the SFT term, in any variant."""
    return (
        cfg.beta if cfg.beta_rejected is None else cfg.beta_rejected,
        0.0 if cfg.gamma is None else cfg.gamma,
    )


def likelihood_slopes(logps, ref_logps, cfg):
    """log |dL/dpi| of the preferred and the rejected response, from their log-probs (..., 2), in log space: nothing over- or underflows."""
    ratio = logps - ref_logps
    pull = F.logsigmoid(
        slower(cfg)[0] * ratio[..., 1] - cfg.beta * ratio[..., 0]
    )  # log sigmoid(-z)
    beta_rejected, gamma = logps.new_tensor(slower(cfg)).log()
    chosen = torch.logaddexp(math.log(cfg.beta) + pull, gamma)
    return torch.stack([chosen, beta_rejected + pull], -1) - logps


def embedded(cfg, rho=0.9, start=(0.45, 0.45, 0.10), steps=2000):
    """One prompt and three responses (preferred, rejected, in no pair) with fixed features and a trained state h, from h = 0 by gradient
    descent -> log-probs (steps + 1, 3). rho: cosine of the pair's features; the third lies where an update of DPO points."""
    chosen, rejected = torch.tensor([[1.0, 0.0], [rho, math.sqrt(1 - rho**2)]], dtype=torch.float64)
    features = torch.stack([chosen, rejected, F.normalize(chosen - rejected, dim=0)])
    reference, h, path = (
        torch.tensor(start, dtype=torch.float64).log(),
        torch.zeros(2, dtype=torch.float64, requires_grad=True),
        [],
    )
    batch = SimpleNamespace(mask=torch.ones(1, 2, 1, dtype=torch.bool))
    for _ in range(steps + 1):
        logps = (features @ h + reference).log_softmax(0)
        path.append(logps.detach())
        (slope,) = torch.autograd.grad(
            loss(logps[:2].view(1, 2, 1), reference[:2].view(1, 2, 1), batch, cfg)[0].sum(), h
        )
        h = (h - slope).detach().requires_grad_()
    return torch.stack(path)


def networks(cfg, scenario, seed, count=8, steps=500, width=32):
    """The paper's toy (sec. 3.2), `count` networks at once: 4 prompts and 10 responses, of which i is preferred for prompt i, one of 4 to 7
    is rejected and 8 and 9 are in no pair; three layers, fitted to the scenario's likelihoods, then trained by the loss.
    -> log-probs (steps + 1, count, 4 prompts, 4) of the preferred, the rejected, all other responses, and 8 and 9."""
    rng = torch.Generator().manual_seed(seed)
    high, low = {1: (0.12, 0.12), 2: (0.02, 0.12), 3: (0.12, 0.02), 4: (0.02, 0.02)}[
        scenario
    ]  # of a preferred, of a rejected response
    wanted = torch.tensor([high] * 4 + [low] * 4 + [(1 - 4 * high - 4 * low) / 2] * 2)
    sizes = [4, width, width, 10]
    weights = [
        (torch.randn(count, a, b, generator=rng) * (2 / a) ** 0.5).requires_grad_()
        for a, b in zip(sizes, sizes[1:])
    ]
    weights += [torch.zeros(count, 1, b, requires_grad=True) for b in sizes[1:]]
    pair = torch.stack(
        [torch.arange(4).expand(count, 4), torch.randint(4, 8, (count, 4), generator=rng)], -1
    )  # (count, 4, 2)
    batch, path = SimpleNamespace(mask=torch.ones(4 * count, 2, 1, dtype=torch.bool)), []

    def log_probs():  # of the 4 prompts, one-hot vectors
        return (
            ((weights[0] + weights[3]).relu() @ weights[1] + weights[4]).relu() @ weights[2]
            + weights[5]
        ).log_softmax(-1)

    optimizer = torch.optim.Adam(weights, lr=1e-2)
    for _ in range(300):
        optimizer.zero_grad()
        (wanted * (wanted.log() - log_probs())).sum().backward()
        optimizer.step()
    reference, optimizer = (
        log_probs().detach().gather(-1, pair).view(-1, 2, 1),
        torch.optim.Adam(weights, lr=1e-2),
    )
    for _ in range(steps + 1):
        found = log_probs()
        kept = found.gather(-1, pair)
        with torch.no_grad():
            path.append(
                torch.cat(
                    [
                        kept,
                        found.scatter(-1, pair, -torch.inf).logsumexp(-1, True),
                        found[..., 8:].logsumexp(-1, True),
                    ],
                    -1,
                )
            )
        optimizer.zero_grad()
        loss(kept.view(-1, 2, 1), reference, batch, cfg)[0].view(count, 4).mean(1).sum().backward()
        optimizer.step()
    return torch.stack(path)


def own_and_hotter(here, contest):
    """Align on pairs of own samples ("own"), or on the same preferred responses with rejected ones of a hotter model ("hot")
    -> {name: its last look, with the log-ratios of 256 of its pairs, and its `curve` (sft: none)}."""
    own, hotter, hot, found = here.preferences(here.base(), k=2), here.at(temperature=1.5), [], {}
    for row, other in zip(own, hotter.sample(hotter.base(), [row["prompt"] for row in own], 1)):
        responses, ends = ([row[name][0], other[name][0]] for name in ("responses", "ends"))
        hot.append(dict(prompt=row["prompt"], responses=responses, ends=ends, scores=[1.0, 0.0]))
    pairs = dict(own=own, hot=here.rows(hot))
    for name, (which, cfg) in contest.items():
        watch = (lambda policy, step: {}) if cfg.variant == "sft" else None
        ratio = (
            log_ratios(
                here,
                here.align(here.base(), pairs[which], loss, cfg, watch=watch),
                pairs[which][:256],
            )
            .mean(0)
            .tolist()
        )
        found[name] = here.curve[-1] | {
            "curve": here.curve,
            "chosen_ratio": ratio[0],
            "rejected_ratio": ratio[1],
        }
    return found


def claim(lab):
    """In the embedding toy DPO's preferred response peaks and is lost to one that no pair holds; both remedies keep it (exact). In the
    paper's toy it peaks and falls, hardly so with the remedies. On reviews DPO lowers the preferred log-probs too, far more so when a
    hotter model wrote the rejected responses, which costs reward at one KL. There flex ends with more reward only as its KL is smaller: at
    1.09 both have 0.135 (mean of seeds 100, 101). On own samples it has more at one KL (0.48, seeds 100 to 102: 0.29, 0.20, 0.24, DPO
    0.10, 0.14, 0.07), after equal steps, 60, not reliably: DPO 0.29, 0.43, 0.12 at three to six times the KL.

    Not reproduced: in the paper's toy the mass goes to responses 8 and 9, here those fall from 0.04 to 0 (seeds 100, 101) and it goes to
    the ones preferred for other prompts; scenario 1 ends above 3 on 5 of the seeds 100 to 107 (means of 0.35 and 0.31)."""
    claims, plain = [], embedded(Config("dpo"))

    def toy(text, path, target, what=0):
        claims.append(lab.exact(f"embedding toy, {text}", path[what].exp().item(), target, 1e-3))

    toy("DPO: the preferred likelihood at its peak", plain.amax(0), 0.473)
    toy("and in the end", plain[-1], 0.0)
    toy("that of the response in no pair", plain[-1], 1.0, 2)
    for cfg, end in (
        (Config("flex", 0.1, 0.05), 0.773),
        (Config("flex", 0.1, 0.02), 0.904),
        (Config("sft", gamma=0.2), 0.969),
    ):
        toy(
            f"{cfg.variant}, beta_rejected {cfg.beta_rejected}, gamma {cfg.gamma}: the preferred one in the end",
            embedded(cfg)[-1],
            end,
        )
    away = embedded(Config("dpo"), rho=-0.5)
    toy("DPO, a pair that shares less (rho -0.5)", away[-1], 0.165)
    slopes = likelihood_slopes(away[:, :2], away[0, :2], Config("dpo"))
    toy("the slope in its preferred likelihood at first", slopes[0], 0.1111)
    toy("and in the end", slopes[-1], 0.0105)
    claims.append(
        lab.compare(
            "that in the rejected likelihood explodes",
            "log slope",
            slopes[-1:, 1],
            slopes[:1, 1],
            margin=10.0,
        )
    )

    contest = dict(
        dpo=(Config("dpo"), 1),
        flex=(Config("flex", 0.1, 0.02), 1),
        sft=(Config("sft"), 1),
        third=(Config("dpo"), 3),
    )
    paths = {
        name: [networks(*how, seed).exp().mean((1, 2)) for seed in lab.seeds]
        for name, how in contest.items()
    }

    def likelihood(name, when=-1, what=0):
        return [
            (path[:, what].max() if when == "peak" else path[when, what]).item()
            for path in paths[name]
        ]

    def compare(text, ours, baseline, **how):
        claims.append(lab.compare(f"the paper's toy: {text}", "likelihood", ours, baseline, **how))

    compare(
        "DPO's preferred likelihood ends below its peak",
        likelihood("dpo"),
        likelihood("dpo", "peak"),
        margin=0.1,
        smaller=True,
    )
    compare("flex ends above DPO", likelihood("flex"), likelihood("dpo"), margin=0.1)
    compare("so does sft", likelihood("sft"), likelihood("dpo"), margin=0.1)
    compare(
        "scenario 1 ends above 3, whose rejected responses are unlikely",
        likelihood("dpo"),
        likelihood("third"),
        expected=False,
    )
    compare(
        "responses 8 and 9 rise", likelihood("dpo", -1, 3), likelihood("dpo", 0, 3), expected=False
    )

    contest = {
        f"{cfg.variant} {which}": (which, cfg)
        for which in ("own", "hot")
        for cfg in (Config("dpo"), Config("flex"))
    }
    contest["sft own"] = ("own", Config("sft", gamma=0.05))
    runs = [
        own_and_hotter(
            lab.at(seed=seed, steps=60, prompts=2048, eval_size=1024, eval_every=20), contest
        )
        for seed in lab.seeds
    ]

    def contrast(text, metric, ours, baseline, **how):
        sides = [
            [
                found[name]["curve" if how.get("at_kl") else metric] if name else 0.0
                for found in runs
            ]
            for name in (ours, baseline)
        ]
        claims.append(lab.compare(f"reviews: {text}", metric, *sides, **how))

    contrast(
        "DPO lowers the preferred log-prob",
        "chosen_ratio",
        "dpo own",
        None,
        margin=0.3,
        smaller=True,
    )
    contrast(
        "and the rejected one, by far more",
        "rejected_ratio",
        "dpo own",
        None,
        margin=1.5,
        smaller=True,
    )
    contrast(
        "if a hotter model wrote the rejected ones, the preferred fall further",
        "chosen_ratio",
        "dpo hot",
        "dpo own",
        smaller=True,
    )
    contrast(
        "and there is less true reward",
        "reward",
        "dpo hot",
        "dpo own",
        margin=0.05,
        smaller=True,
        at_kl="shared",
    )
    contrast("flex holds the preferred log-prob", "chosen_ratio", "flex own", "dpo own", margin=0.3)
    contrast("sft raises it", "chosen_ratio", "sft own", None, margin=0.05)
    for which, at_kl, expected in (
        ("own", "shared", True),
        ("own", None, False),
        ("hot", "shared", False),
        ("hot", None, True),
    ):
        text, how = (
            "" if at_kl else ", equal steps",
            dict(margin=0.02, expected=expected, at_kl=at_kl),
        )
        contrast(
            f"{which}: flex has more reward than DPO{text}",
            "reward",
            f"flex {which}",
            f"dpo {which}",
            **how,
        )
    return claims
