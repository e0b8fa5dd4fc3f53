"""KRR-ST - Self-Supervised Dataset Distillation for Transfer Learning (2023), arXiv:2310.06511

An unlabeled data set is distilled into m learned images X_s with representations Y_s, so that a
fresh network regressing Y_s on X_s approaches a frozen self-supervised network g. The random views
of a self-supervised loss would bias the outer gradient, so both losses are mean squared errors.
Nothing is back-propagated through training: features f come from a pool of networks of all ages,
and kernel ridge regression solves their last layer. Only X_s and Y_s have a gradient.

    inner: mean (h(X_s) - Y_s)^2            a full-batch step of a pool network
    outer: mean (K_ts (K_ss + lambda I)^-1 Y_s - g(X_t))^2,    lambda = ridge tr K_ss
    K_ss = F_s F_s^T,  K_ts = F_t F_s^T,  F = [f(X), 1]

Differences from the paper
1. Networks are small and without batch normalization, the outer batch is not augmented, and the
   outer learning rate follows a cosine.
2. The representation is standardized, so that no dimension dominates.
3. A network that starts anew gets age 0; in the released code (--reset false) it keeps its age.

    python train.py --method krr_st                  a student of 20 learned images beats one of 20
                                                     real ones (distilled.png)
"""

import copy
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from data import Paper, UserError, check_fields

PAPER = Paper(
    "beyond",
    worlds=("vectors",),
    needs="points",
    ignores=("eval_every",),
    defaults=dict(world="pixels", steps=1500, lr=3e-3, batch_size=256),
    core=("barlow", "with_one", "krr", "outer", "descend", "older"),
)


@dataclass(frozen=True)
class Config:
    m: int = 20  # distilled images
    pool: int = 4  # networks in the pool
    age: int = 200  # steps after which a network of the pool starts anew
    ridge: float = 1e-6  # lambda as a share of the trace of K_ss
    reset: bool = True  # false: the age of a network that starts anew is kept, as in the code
    n: int = 1000  # unlabeled images
    dims: int = 32  # dimensions of the representation
    teacher_steps: int = 500  # steps of the self-supervised training
    student_steps: int = 500  # full-batch steps of a student

    def __post_init__(self):
        check_fields(self, m="[1, inf)", pool="[1, inf)", age="[2, inf)", ridge="(0, inf)")
        check_fields(self, n="[2, inf)", dims="[1, inf)")
        check_fields(self, teacher_steps="[1, inf)", student_steps="[1, inf)")


def barlow(a, b, weight=5e-3):
    """Barlow Twins' loss of the representations (n, k) of two views of the same images."""
    a, b = ((z - z.mean(0)) / (z.std(0) + 1e-6) for z in (a, b))
    C = a.T @ b / (len(a) - 1)  # (k, k) correlations; 1 on the diagonal and 0 elsewhere is wanted
    same = C.diagonal()
    return (1 - same).square().sum() + weight * (C.square().sum() - same.square().sum())


def with_one(features):
    """Features (n, k) with a column of ones, in float64."""
    features = features.double()
    return torch.cat([features, torch.ones_like(features[:, :1])], 1)


def krr(phi_s, y, phi_t, ridge):
    """Predictions (B, d) at features phi_t (B, k) of the ridge regression of y (m, d) on phi_s.

    The ridge is a share of the trace of the kernel, which has no gradient. UserError: there are no
    rows, they do not fit, or the kernel is not finite or singular.
    """
    m = len(phi_s)
    if m == 0 or len(y) != m:
        raise UserError(f"{m} distilled images and {len(y)} targets")
    if ridge <= 0 and m > phi_s.shape[1]:
        raise UserError(f"{m} images with {phi_s.shape[1]} features need a ridge above 0")
    K = phi_s @ phi_s.T
    if not K.isfinite().all():
        raise UserError("a feature of a distilled image is not finite: a lower --lr may help")
    lam = ridge * K.trace().detach()
    weights = torch.linalg.solve(K + lam * torch.eye(m, dtype=K.dtype, device=K.device), y)
    return phi_t @ phi_s.T @ weights


def outer(embed, x, y, x_t, target, ridge):
    """The outer loss, the mean over images and dimensions: of x and y alone it has a gradient.

    embed: images -> features. x (m, pixels), y (m, d); x_t (B, pixels), target = g(x_t) (B, d).
    """
    if y.shape[1] != target.shape[1]:
        raise UserError(f"targets of {y.shape[1]} dimensions, not {target.shape[1]}")
    with torch.no_grad():
        phi_t = with_one(embed(x_t))
    found = krr(with_one(embed(x)), y.double(), phi_t, ridge)
    return (found - target.detach()).square().mean()


def descend(weights, speeds, gradients, lr=0.1, momentum=0.9, decay=1e-3):
    """One step of SGD with momentum, in place: the inner optimizer."""
    for w, v, g in zip(weights, speeds, gradients):
        v.mul_(momentum).add_(g + decay * w)
        w.sub_(lr * v)
    return weights, speeds


def older(age, limit, reset):
    """Whether a network of the pool starts anew now, and its next age."""
    if age >= limit:
        return True, 0 if reset else age
    return False, age + 1


class Student(nn.Module):
    """A network with features `embed` and a linear layer."""

    def __init__(self, pixels, dims, rng):
        super().__init__()
        with torch.random.fork_rng(devices=[]):  # nn.init draws from the global generator
            torch.manual_seed(int(torch.randint(2**62, (), generator=rng)))
            self.embed = nn.Sequential(
                nn.Linear(pixels, 128), nn.ReLU(), nn.Linear(128, 128), nn.ReLU()
            )
            self.last = nn.Linear(128, dims)

    def forward(self, x):
        """x (n, pixels) -> representations (n, dims)."""
        return self.last(self.embed(x))

    def learn(self, speed, x, y):
        """One full-batch step on (x, y), which are constants; speed: a network of its momenta."""
        self.requires_grad_(True)
        loss = F.mse_loss(self(x.detach()), y.detach())
        gradients = torch.autograd.grad(loss, list(self.parameters()))
        self.requires_grad_(False)  # the outer step has no gradient here
        with torch.no_grad():
            descend(self.parameters(), speed.parameters(), gradients)


class Distilled(nn.Module):
    """The images and their targets, and the pool of networks with their momenta and ages."""

    def __init__(self, x, y, cfg, rng):
        super().__init__()
        self.x, self.y, self.cfg = nn.Parameter(x.clone()), nn.Parameter(y.clone()), cfg
        nets = [Student(x.shape[1], y.shape[1], rng) for _ in range(cfg.pool)]
        self.nets = nn.ModuleList(nets).requires_grad_(False)
        self.speeds = copy.deepcopy(self.nets)
        self.register_buffer("ages", torch.randint(1, cfg.age, (cfg.pool,), generator=rng))
        for speed in self.speeds.parameters():
            speed.zero_()
        for net, speed, age in zip(self.nets, self.speeds, self.ages):
            for _ in range(age):
                net.learn(speed, self.x, self.y)

    def grow(self, i, rng):
        """Network i makes one step on the distilled data, or starts anew."""
        new, age = older(int(self.ages[i]), self.cfg.age, self.cfg.reset)
        self.ages[i] = age
        if new:
            fresh = Student(self.x.shape[1], self.y.shape[1], rng)
            self.nets[i].load_state_dict(fresh.state_dict())
            for speed in self.speeds[i].parameters():
                speed.zero_()
        else:
            self.nets[i].learn(self.speeds[i], self.x, self.y)


def views(x, side, rng):
    """Images (n, pixels) moved by a pixel (if a side is known), with noise and missing pixels."""
    if side:
        move = torch.randint(-1, 2, (len(x), 2), generator=rng)
        rows, columns = ((torch.arange(side) - m[:, None]).clamp(0, side - 1) for m in move.T)
        x = x[torch.arange(len(x))[:, None, None], rows[:, :, None] * side + columns[:, None]]
        x = x.flatten(1)
    x = x + 0.1 * torch.randn(x.shape, generator=rng)
    return x * (torch.rand(x.shape, generator=rng) > 0.15)


def run(lab, cfg):
    world, device = lab.world, lab.device
    if cfg.m > cfg.n:
        raise UserError(f"--m {cfg.m}: there are --n {cfg.n} images to begin with")
    x = world.points(cfg.n, lab.rng("train"))[0].float()
    test = world.points(500, lab.rng("test"), held_out=True)[0].float().to(device)

    def pair(step):
        rows = x[torch.randint(len(x), (lab.batch_size,), generator=lab.rng("teacher", step))]
        return [views(rows, world.side, lab.rng("view", step, i)).to(device) for i in (0, 1)]

    def twins(net, batch):
        return barlow(net(batch[0]), net(batch[1])), {}

    teacher = Student(x.shape[1], cfg.dims, lab.rng("weights")).to(device)
    how = dict(steps=cfg.teacher_steps, lr=3e-3, decay=True, title="teacher")
    teacher = lab.fit(teacher, pair, twins, **how).requires_grad_(False)
    x = x.to(device)
    mean, sd = teacher(x).mean(0), teacher(x).std(0) + 1e-6
    y, truth = (teacher(x) - mean) / sd, (teacher(test) - mean) / sd
    first = torch.randperm(len(x), generator=lab.rng("first"))[: cfg.m].to(device)

    def chosen(step):
        return int(torch.randint(cfg.pool, (), generator=lab.rng("choice", step)))

    def real(step):
        rows = torch.randint(len(x), (lab.batch_size,), generator=lab.rng("batch", step))
        return step, x[rows.to(device)], y[rows.to(device)]

    def objective(model, item):
        step, x_t, target = item
        if step:  # the network of the last step has seen its outer step, and grows
            model.grow(chosen(step - 1), lab.rng("fresh", step))
        i = chosen(step)
        loss = outer(model.nets[i].embed, model.x, model.y, x_t, target, cfg.ridge)
        return loss, {"age": model.ages[i].double()}

    def distill(title, learned):
        model = Distilled(x[first], y[first], cfg, lab.rng("pool")).to(device)
        model.y.requires_grad_(learned)
        return lab.fit(model, real, objective, decay=True, title=title)

    both = distill("images and targets", True)
    images = distill("images", False)

    def error(x, y):
        net = Student(x.shape[1], cfg.dims, lab.rng("student")).to(device)
        speed = copy.deepcopy(net).requires_grad_(False)
        for v in speed.parameters():
            v.zero_()
        for _ in range(lab.few(cfg.student_steps)):
            net.learn(speed, x, y)
        return {"images": len(x), "held-out MSE": F.mse_loss(net(test), truth).item()}

    sets = {
        "random images": (x[first], y[first]),
        "KRR-ST": (both.x.detach(), both.y.detach()),
        "targets frozen": (images.x.detach(), images.y.detach()),
        "all images": (x, y),
    }
    if world.side:
        lab.draw("distilled", picture([x[first], both.x.detach()], world.side))
    return lab.stage("students", lambda: {name: error(*pair) for name, pair in sets.items()})


def picture(rows, side):
    """A Figure with rows of images: before the distillation, and after it."""
    from matplotlib.figure import Figure

    few = min(10, len(rows[0]))
    fig = Figure(figsize=(0.7 * few, 1.6), layout="constrained")
    for i, (images, name) in enumerate(zip(rows, ("real", "distilled"))):
        for k in range(few):
            ax = fig.add_subplot(2, few, i * few + k + 1)
            ax.imshow(images[k].view(side, side).tolist(), cmap="gray", vmin=0, vmax=1)
            ax.set_xticks([])
            ax.set_yticks([])
            if k == 0:
                ax.set_ylabel(name)
    return fig
