"""LLS - Unsupervised Learning under Latent Label Shift (2022), arXiv:2207.13179

There are no labels, only points from several domains in which the unknown classes have different
shares; what shifts together belongs together. A discriminator f(x) = p(d|x) maps all points of the
same class posterior to one point of the simplex, however different they look. Its outputs are
discretized, the table of clusters and domains is factorized, and linear algebra gives the classes:

    f(x) = Q_{D|Y} p(y | x)                        Q_{D|Y}[d, y] = W[y, d] / sum_d' W[y, d']  (1)
    p(y | x) = pinv(Q_{D|Y}) f(x)                                                             (2)
    p(y | x, d) ~ Q_{D|Y}[d, y] p(y | x)                                                      (3)
    Q_{c(X)|D} = C W                               W[y, d] = p(y | d)                         (4)

Differences from the paper
1. The factorization is also done with anchors (SPA), since NMF may fit the table exactly with other
   classes.
2. p(y|x) is clipped at 0 before (3); otherwise a negative sum would flip the classes.
3. The learning rate decays instead of early stopping.

    python train.py --method lls                            far above k-means on the features
    python train.py --method lls --alpha 10                 less shift: NMF loses more than SPA
    python train.py --method lls --world mates              the same on handwritten digits
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields

PAPER = Paper(
    "beyond",
    worlds=("vectors",),
    needs="points",
    ignores=("eval_every", "capture"),
    defaults=dict(world="blobs", steps=600, lr=3e-3, batch_size=256),
    core=("frequencies", "anchors", "rescaled", "posterior"),
)


@dataclass(frozen=True)
class Config:
    alpha: float = 0.5  # of the Dirichlet distribution of class shares; a larger one shifts less
    domains: int = 6  # number of domains, at least that of the classes
    clusters: int | None = None  # cells of the discretized simplex [three per class]
    cells: str = "kmeans"  # kmeans, or grid: a regular grid on the simplex
    n: int = 6000  # training points, of all domains

    def __post_init__(self):
        check_fields(self, alpha="(0, inf)", domains="[2, 1000]", clusters="[2, 10000]")
        check_fields(self, cells=("kmeans", "grid"), n="[100, inf)")
        if self.cells == "grid" and self.clusters is not None:
            raise UserError("clusters does nothing with a grid")


def frequencies(cell, domain, cells, domains):
    """Q_hat (cells, domains): the share of each domain's points in each cell; eq. 4.

    Cells without points are left out. UserError: a domain is empty.
    """
    counts = torch.bincount(cell * domains + domain, minlength=cells * domains)
    counts = counts.view(cells, domains).double()
    if (counts.sum(0) == 0).any():
        raise UserError("a domain has no points")
    return (counts / counts.sum(0))[counts.sum(1) > 0]


def anchors(table, k):
    """W (k, domains) from the cells that hold one class each, by successive projection (SPA).

    UserError: there are fewer cells or domains than classes, or no k cells differ.
    """
    rows = table / table.sum(1, keepdim=True)  # p(d | cell), a mixture of the columns of Q_{D|Y}
    if min(rows.shape) < k:
        raise UserError(f"{len(rows)} cells, {rows.shape[1]} domains: fewer than {k} classes")
    rest, found = rows, []
    for _ in range(k):
        length = rest.norm(dim=1)
        best = length.argmax()
        if length[best] < 1e-6:
            raise UserError("the domains do not differ enough: W has less than full rank")
        found.append(best)
        unit = rest[best] / length[best]
        rest = rest - (rest @ unit)[:, None] * unit
    given = rows[torch.stack(found)].T  # Q_{D|Y} (domains, k)
    # the shares q(y) of all domains together: Q_{D|Y} q = 1 / domains
    share = torch.linalg.pinv(given).sum(1).clamp(min=1e-8)
    W = given.T * share[:, None]
    total = W.sum(0)
    return torch.where(total > 0, W / total, 1 / k)  # no anchor tells of some domain: equal shares


def rescaled(C, W):
    """The factors of a table, C (cells, k) and W (k, domains), as W with columns that sum to 1."""
    W = W * C.sum(0)[:, None]
    return W / W.sum(0).clamp(min=1e-8)


def nmf(table, k, seed=0):
    """W (k, domains) by non-negative matrix factorization, as in the paper's code."""
    import warnings

    from sklearn.decomposition import NMF

    model = NMF(k, init="random", random_state=seed, max_iter=2000, tol=1e-8)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the last digits need not converge
        left = model.fit_transform(table.T.numpy())  # (domains, k), since the paper factors Q^T
    return rescaled(torch.from_numpy(model.components_.T), torch.from_numpy(left.T))


def posterior(f, W, domain):
    """p(y | x, d) (n, k) from f = p(d | x) (n, domains), W (k, domains) and the domains (n,).

    UserError: W has less than full row rank, so the classes are not identified.
    """
    if torch.linalg.matrix_rank(W, rtol=1e-6) < len(W):
        raise UserError("the domains do not differ enough: W has less than full rank")
    given = (W / W.sum(1, keepdim=True)).T  # Q_{D|Y} (domains, k), eq. 1
    plain = (f @ torch.linalg.pinv(given).T).clamp(min=0)  # eq. 2
    plain = torch.where(plain.sum(1, keepdim=True) > 1e-9, plain, 1.0)  # all clipped: by domain
    joint = given[domain] * plain  # eq. 3
    return joint / joint.sum(1, keepdim=True).clamp(min=1e-300)


def discretize(f, clusters, cells):
    """The cell of each point of the simplex f (n, domains) -> (n,), and the number of cells."""
    if cells == "kmeans":
        from sklearn.cluster import KMeans

        found = KMeans(clusters, n_init=5, random_state=0).fit_predict(f.numpy())
        return torch.from_numpy(found).long(), clusters
    cell = torch.unique((f * 5).round(), dim=0, return_inverse=True)[1]
    rare = torch.bincount(cell) < 0.01 * len(f)  # SPA would take a noisy cell for an anchor
    cell = torch.where(rare[cell], len(rare), cell)
    return cell, len(rare) + 1


def matched(found, truth, k):
    """For each found class the true one, by the largest overlap; for the metric only."""
    from scipy.optimize import linear_sum_assignment

    overlap = torch.bincount(found * k + truth, minlength=k * k).view(k, k)
    return torch.from_numpy(linear_sum_assignment(-overlap.numpy())[1])


def run(lab, cfg):
    k, r, rng = lab.world.classes, cfg.domains, lab.rng("domains")
    if r < k:
        raise UserError(f"{r} domains: {lab.world.name} has {k} classes, and needs as many domains")
    if cfg.clusters is not None and cfg.clusters < k:
        raise UserError(f"{cfg.clusters} clusters: {lab.world.name} has {k} classes")
    if cfg.n < max(r, cfg.clusters or 3 * k):
        raise UserError(f"n = {cfg.n}: fewer points than domains or clusters")
    W, sizes = shift(k, r, cfg.alpha, rng), [cfg.n // r, 2000 // r]
    x, d, _ = gathered(lab.world, W, sizes[0], rng)
    z, e, truth = gathered(lab.world, W, sizes[1], rng, held_out=True)

    width = lab.world.features
    with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
        torch.manual_seed(int(torch.randint(2**62, (), generator=lab.rng("weights"))))
        net = nn.Sequential(
            nn.Linear(width, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, r)
        ).to(lab.device)

    def batch(step):
        rows = torch.randint(len(x), (lab.batch_size,), generator=lab.rng("batch", step))
        return x[rows].float().to(lab.device), d[rows].to(lab.device)

    def objective(net, batch):
        return F.cross_entropy(net(batch[0]), batch[1], reduction="none"), {}

    net = lab.fit(net, batch, objective, decay=True)
    with torch.no_grad():
        f, g = (net(p.float().to(lab.device)).cpu().double().softmax(1) for p in (x, z))

    def row(found, shares):
        names = matched(found, truth, k)
        error = (shares - W[names]).abs().sum(0).mean().item()
        return {
            "accuracy": (names[found] == truth).double().mean().item(),
            "L1 error of p(y|d)": error,
        }

    def table():
        from sklearn.cluster import KMeans

        cell, cells = discretize(f, cfg.clusters or 3 * k, cfg.cells)
        Q = frequencies(cell, d, cells, r)
        rows = {}
        for name, shares in {"DDFA, NMF": nmf(Q, k), "DDFA, SPA": anchors(Q, k)}.items():
            rows[name] = row(posterior(g, shares, e).argmax(1), shares)
        oracle = posterior(g, W, e).argmax(1)
        rows["oracle W"] = {"accuracy": (oracle == truth).double().mean().item()}
        near = KMeans(k, n_init=5, random_state=0).fit(x.numpy())
        found = torch.from_numpy(near.predict(z.numpy())).long()
        shares = frequencies(torch.from_numpy(near.labels_).long(), d, k, r)
        rows["k-means on x"] = row(found, shares)
        if lab.world.bayes:
            best = most_probable(lab.world, z, W[:, e].T)
            rows["Bayes"] = {"accuracy": (best == truth).double().mean().item()}
        return rows

    return lab.stage("table", table)


def most_probable(world, z, shares):
    """The true most probable class of points z (m, D) that come from class shares (m, k): (m,)."""
    own = 1.0 if world.class_shares is None else world.class_shares
    return (world.bayes(z) / own * shares).argmax(1)


def shift(k, r, alpha, rng):
    """W (k, r): class shares of r domains, Dirichlet(alpha / k), with a condition below 8."""
    import numpy as np

    draw = np.random.default_rng(int(torch.randint(2**62, (), generator=rng)))
    for _ in range(10000):
        W = torch.from_numpy(draw.dirichlet([alpha / k] * k, r).T.copy())
        if W.isfinite().all() and torch.linalg.cond(W) < 8:
            return W
    raise UserError(f"no draw of {r} domains has a well-conditioned W at alpha {alpha:g}")


def gathered(world, W, n, rng, held_out=False):
    """n points of each domain, in one -> x, domains, classes."""
    parts = [world.points(n, rng, shares, held_out) for shares in W.T]
    x, y = (torch.cat(part) for part in zip(*parts))
    return x, torch.arange(W.shape[1]).repeat_interleave(n), y
