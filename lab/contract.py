"""python train.py --check NAME: whether a method keeps the contract, with one line per rule.

The loss is called with the log-probs of the first step of the method's own `run`, in a small world,
and with variations of them. A line begins with one of three words:

    ok       the rule holds
    look     this may be intended by the paper, or it may be a mistake
    WRONG    the contract is broken, and the exit status is 1
"""

import ast
import inspect
import re
from types import SimpleNamespace

import torch

from data import UserError
from lab import check as first
from lab.flags import declared
from lab.lab import Lab
from lab.settings import Settings, line_in

ORDER = ["logps", "ref_logps", "batch", "cfg"]
TITLE = r"\S.* - .*\(\d{4}\), arXiv:\d{4}\.\d{4,5}"


class Caught(Exception):
    """Ends a run at the first call of its loss."""


def check(run):
    """Print one line per rule -> exit status 1 if a rule is broken, else 0."""
    lines = form(run)
    settings = small(run)
    print(f"{run.module.__file__} on the world {settings.world}")
    try:
        if hasattr(run.module, "loss"):
            call = first_call(run, settings)
            if call is None:
                lines.append(("look", "`run` never calls `loss` here, so `loss` was not checked"))
            else:
                lines += of_loss(*call)
    except UserError as error:
        lines.append(("WRONG", f"run: {error}"))
    except Exception as error:  # noqa: BLE001 - a user's method may raise anything
        lines.append(("WRONG", line_in(run.module.__file__, error)))
    if all(mark != "WRONG" for mark, _ in lines):
        lines.append(of_run(run, settings))
    for mark, text in lines:
        print(f"  {mark:<5}  {text}")
    return 1 if any(mark == "WRONG" for mark, _ in lines) else 0


def small(run):
    """Settings under which a run takes seconds: on an exact table, if the method can use one."""
    paper, given = run.paper, run.settings
    world = given.world
    easy = paper.needs in ("pairs or lists", "demonstrations", "reward")
    if world in (None, paper.defaults.get("world")) and easy and "table" in paper.worlds:
        return Settings(world="bandit", steps=8, batch_size=16, prompts=128, seed=given.seed)
    if "vectors" in paper.worlds:
        return Settings(world=world, steps=8, batch_size=8, seed=given.seed, device=given.device)
    size = dict(steps=8, batch_size=8, prompts=64, eval_size=8)
    return Settings(world=world or "reviews", seed=given.seed, device=given.device, **size)


# ---------------------------------------------------------------- the file


def form(run):
    """The rules that the file itself shows: docstring, comments, signatures and imports."""
    module, lines = run.module, []
    found = re.match(TITLE, (module.__doc__ or "").replace("\n", " "))
    wanted = 'the docstring begins with "NAME - Title (year), arXiv:NNNN.NNNNN"'
    lines.append(("ok" if found else "look", wanted))
    about = declared(module.__file__)
    bare = [name for name, flag in about.flags.items() if not flag.text]
    if bare:
        lines.append(("look", f"a comment beside {', '.join(bare)} would be its text in --help"))
    if not module.Config.__dataclass_params__.frozen:
        lines.append(("look", "write @dataclass(frozen=True) above Config"))
    for name, order in (("loss", ORDER), ("run", ["lab", "cfg"])):
        if hasattr(module, name):
            has = list(inspect.signature(getattr(module, name)).parameters)
            mark = "ok" if has == order else "WRONG"
            lines.append((mark, f"the arguments of {name} are {', '.join(order)}"))
    tree = ast.parse(inspect.getsource(module))
    missing = [name for name in run.paper.core if name != "loss" and name not in functions(tree)]
    if missing:
        lines.append(("WRONG", f"PAPER.core names {', '.join(missing)}, which the file lacks"))
    for node in ast.walk(tree):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
        for name in names:
            if name.split(".")[0] in ("lab", "train", "claims", "methods"):
                lines.append(("look", f"a method imports data, toy and nanomodel, not {name}"))
    return lines


def functions(tree):
    """The names of a module's functions, and of its classes' methods as Class.method."""
    names = set()
    for node in tree.body:
        if isinstance(node, ast.FunctionDef):
            names.add(node.name)
        if isinstance(node, ast.ClassDef):
            inside = (part.name for part in node.body if isinstance(part, ast.FunctionDef))
            names |= {f"{node.name}.{name}" for name in inside}
    return names


# ---------------------------------------------------------------- the loss


class Probe(Lab):
    """A Lab that stores the first call of the loss and then ends the run."""

    call = None  # (loss, logps, ref_logps, batch, cfg)

    def note(self, loss):
        """A function that takes the place of the loss, stores its arguments and ends the run."""

        def noted(*arguments):
            self.call = loss, *arguments
            raise Caught

        return noted

    def align(self, policy, data, loss, cfg, **options):
        return super().align(policy, data, self.note(loss), cfg, **options)


def first_call(run, settings):
    """(loss, *arguments) of the first call of the loss in `run`; None if it is never called."""
    lab, loss = Probe(settings, quiet=True), run.module.loss
    run.module.loss = lab.note(loss)  # for a `run` that calls the loss itself, in lab.fit
    try:
        run.module.run(lab, run.cfg)
    except Caught:
        pass
    finally:
        run.module.loss = loss
    if lab.call and lab.call[0].__name__ == "noted":  # align was given the replacement
        return loss, *lab.call[1:]
    return lab.call


def of_loss(loss, logps, ref_logps, batch, cfg):
    """The rules of a loss, checked on the arguments of a first step."""
    lines = []
    if ref_logps is not None and ref_logps.requires_grad:
        lines.append(("WRONG", "the reference has a gradient: score it under torch.no_grad()"))
    x = logps.detach().clone()
    ref = None if ref_logps is None else ref_logps.detach().clone()
    before = [None if t is None else t.clone() for t in (x, ref, batch.mask, batch.scores)]

    def value(x, ref, batch):
        """losses (B,), their gradient in x (B, K, T), and the metrics."""
        x = x.detach().requires_grad_()
        losses, metrics = first.unpack(loss(x, ref, batch, cfg))
        first.first_step(losses, metrics, x, ref, batch, cfg)
        (slope,) = torch.autograd.grad(losses.sum(), x)
        return losses.detach(), slope, metrics

    try:
        losses, slope, metrics = value(x, ref, batch)
    except UserError as error:
        return [*lines, ("WRONG", str(error))]
    names = ", ".join(metrics) or "none"
    lines.append(("ok", f"losses of shape ({len(losses)},), one per row; metrics: {names}"))
    lines.append(("ok", "losses and gradient are finite, metrics have no gradient"))
    after = [x, ref, batch.mask, batch.scores]
    same = all(a is None or torch.equal(a, b) for a, b in zip(before, after))
    lines.append(("ok" if same else "WRONG", "the arguments are left as they were"))
    again = torch.equal(losses, value(x, ref, batch)[0])
    lines.append(("ok" if again else "WRONG", "a second call gives the same losses: no state"))
    wide = loss(x.bfloat16(), None if ref is None else ref.bfloat16(), batch, cfg)[0].dtype
    wide = wide in (torch.float32, torch.float64)
    lines.append(("ok" if wide else "WRONG", "bfloat16 log-probs are upcast (see data.upcast)"))
    lines.append(extreme(value, x, ref, batch))
    lines += of_reference(value, x, ref, batch, losses, slope)
    lines += signs(slope, batch)
    lines.append(length(value, x, ref, batch))
    return lines


def extreme(value, x, ref, batch):
    """Whether the loss is finite at log-ratios of 10,000 in either direction."""
    line = "the loss is finite at log-ratios of 10,000"
    for sign in (1.0, -1.0):
        far = torch.zeros_like(x)
        far[:, 0, 0], far[:, -1, 0] = sign * 1e4, -sign * 1e4
        try:
            value(x - far.relu(), ref, batch)
        except UserError as error:
            return "WRONG", f"{line}: {error}"
    return "ok", line


def of_reference(value, x, ref, batch, losses, slope):
    """Whether the loss depends on the reference."""
    if ref is None:
        return [("ok", "the loss has no reference")]
    moved = ref + torch.linspace(0.1, 0.5, ref.shape[1])[:, None].to(ref) * batch.mask
    other, other_slope, _ = value(x, moved, batch)
    if torch.equal(other, losses) and torch.equal(other_slope, slope):
        return [("look", "the loss is constant in ref_logps: give lab.align reference=None")]
    return [("ok", "the loss depends on ref_logps")]


def signs(slope, batch):
    """Whether a gradient step raises the best response and lowers the worst one."""
    present = batch.mask.any(-1)
    best = batch.scores.masked_fill(~present, -torch.inf).argmax(1, keepdim=True)
    worst = batch.scores.masked_fill(~present, torch.inf).argmin(1, keepdim=True)
    apart = (batch.scores.gather(1, best) > batch.scores.gather(1, worst))[:, 0]
    if not apart.any():
        return []
    total = (slope * batch.mask).sum(-1)[apart]
    up, down = (float(total.gather(1, i[apart]).mean()) for i in (best, worst))
    lines = []
    if up > 0:
        lines.append(("look", "raising the chosen log-prob raises your loss: a sign?"))
    if down < 0:
        lines.append(("look", "lowering the rejected log-prob raises your loss: a sign?"))
    return lines or [("ok", "the gradient raises the chosen log-prob, not the rejected one")]


def length(value, x, ref, batch):
    """Whether the loss stays the same when every token is split into two of half its log-prob."""
    # moved away from the reference, where all log-ratios are 0 and a mean equals a sum
    x = x - torch.linspace(0.1, 0.5, x.shape[1])[:, None].to(x) * batch.mask
    losses = value(x, ref, batch)[0]

    def cut(t):
        return None if t is None else t.repeat_interleave(2, -1) / 2

    columns = {
        name: cut(t) if t.shape == x.shape and t.is_floating_point() else t
        for name, t in batch.columns.items()
    }
    twice = SimpleNamespace(
        mask=batch.mask.repeat_interleave(2, -1), scores=batch.scores, parents=batch.parents
    )
    twice.__dict__.update(columns)
    other = value(cut(x), cut(ref), twice)[0]
    if torch.allclose(other, losses, rtol=1e-4, atol=1e-6):
        return "ok", "the loss depends on the sum over tokens, not on their number"
    return "look", "the loss and its gradient depend on the length of a response: a mean?"


def of_run(run, settings):
    """Whether `run` returns a model, a table or None."""
    try:
        result = run.module.run(Lab(settings, quiet=True), run.cfg)
    except UserError as error:
        return "WRONG", f"run: {error}"
    except Exception as error:  # noqa: BLE001 - a user's method may raise anything
        return "WRONG", line_in(run.module.__file__, error)
    if result is None:
        return "look", "run returns None, so a run reports nothing: is a `return` missing?"
    if isinstance(result, (dict, torch.nn.Module)):
        return "ok", f"run returns a {type(result).__name__}"
    kind = type(result).__name__
    return "WRONG", f"run returns a {kind}; expected the trained model, a table or None"
