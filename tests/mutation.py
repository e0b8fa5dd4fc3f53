"""The mutation engine: every single edit of a function, and which of them no input tells from the original."""

import ast
import copy
import inspect
from types import SimpleNamespace

import torch

import data

SWAPS = {
    ast.Add: ast.Sub, ast.Sub: ast.Add, ast.Mult: ast.Div, ast.Div: ast.Mult, ast.Pow: ast.Mult, ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr, ast.BitOr: ast.BitAnd, ast.BitXor: ast.BitOr, ast.And: ast.Or, ast.Or: ast.And,
    ast.Gt: ast.Lt, ast.Lt: ast.Gt, ast.GtE: ast.LtE, ast.LtE: ast.GtE, ast.Eq: ast.NotEq, ast.NotEq: ast.Eq, ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}  # fmt: skip
TWINS = dict(sum="mean", max="min", amax="amin", maximum="minimum", any="all", argmax="argmin")
TWINS |= {b: a for a, b in TWINS.items()}


def names_in(node):
    return [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]


def refers(node, names):
    """Does an assignment to one name read any of these names?"""
    single = isinstance(node.targets[0], ast.Name)
    return single and any(name in names for name in names_in(node.value))


def changed_node(node, **fields):
    new = copy.deepcopy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def edits(node, graph):
    """What may stand in the place of a node; graph: does a gradient go through it?"""
    if isinstance(node, ast.BinOp):
        if type(node.op) in SWAPS:
            yield changed_node(node, op=SWAPS[type(node.op)]())
        yield node.left
        yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield changed_node(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield changed_node(node, op=SWAPS[type(node.op)]())
        yield from node.values
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield changed_node(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield changed_node(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Call):
        yield from edits_of_call(node, graph)
    elif graph and isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        other = {
            "logps": "ref_logps",
            "ref_logps": "logps",
            "chosen": "rejected",
            "rejected": "chosen",
        }.get(node.id)
        if other:
            yield ast.Name(other, ast.Load())


def edits_of_call(node, graph):
    """The call left out, its name for its twin's, two arguments exchanged, an argument detached or left out."""
    method = isinstance(node.func, ast.Attribute) and not (
        isinstance(node.func.value, ast.Name) and node.func.value.id in ("torch", "F")
    )
    if method:
        yield node.func.value
    elif node.args and not isinstance(node.args[0], (ast.GeneratorExp, ast.Starred)):
        yield node.args[0]
    if isinstance(node.func, ast.Attribute) and node.func.attr in TWINS:
        yield changed_node(node, func=changed_node(node.func, attr=TWINS[node.func.attr]))
    if len(node.args) >= 2 and getattr(node.func, "attr", "") not in (
        "promote_types",
        "minimum",
        "maximum",
        "equal",
    ):  # these are symmetric
        yield changed_node(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for i, arg in enumerate(node.args):
        if graph and not isinstance(arg, (ast.Constant, ast.GeneratorExp, ast.Starred)):
            yield changed_node(
                node,
                args=[
                    *node.args[:i],
                    ast.Call(ast.Name("_detached", ast.Load()), [arg], []),
                    *node.args[i + 1 :],
                ],
            )
    if method and graph:
        inner = ast.Call(ast.Name("_detached", ast.Load()), [node.func.value], [])
        yield changed_node(node, func=changed_node(node.func, value=inner))
    for i in range(len(node.keywords)):
        yield changed_node(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def sites(function):
    """(path, node, whether a gradient goes through) of all nodes of a function that may be edited: not its docstring, its signature, nor
    what an error says. None goes through a check that stands alone, a condition, and what is detached."""

    def walk(node, path, graph):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            graph = graph and node.func.attr not in ("dim", "detach")
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
            graph = graph and node.func.id != "readable"  # a question about the device alone
        graph = graph and not isinstance(node, (ast.Expr, ast.Compare))
        yield path, node, graph
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        for name, value in ast.iter_fields(node):
            if isinstance(value, ast.AST):
                yield from walk(value, (*path, name), graph)
            elif isinstance(value, list):
                for i, child in enumerate(value):
                    if isinstance(child, ast.AST):
                        yield from walk(child, (*path, (name, i)), graph)

    for i, statement in enumerate(function.body):
        yield from walk(statement, (("body", i),), True)


def replaced(function, path, new):
    """A copy of a function with another node at a path."""
    out = node = copy.deepcopy(function)
    for step in path[:-1]:
        node = getattr(node, step[0])[step[1]] if isinstance(step, tuple) else getattr(node, step)
    if isinstance(path[-1], tuple):
        getattr(node, path[-1][0])[path[-1][1]] = copy.deepcopy(new)
    else:
        setattr(node, path[-1], copy.deepcopy(new))
    return ast.fix_missing_locations(out)


def functions_of(module):
    """The functions of a file that its loss is made of: itself and what it calls, and so on.

    A table of functions, NAME = dict(...), is followed too; tables come last, after their functions."""
    body = ast.parse(inspect.getsource(module)).body
    tree = {f.name: f for f in body if isinstance(f, ast.FunctionDef)}
    tables = {a.targets[0].id: a for a in body if isinstance(a, ast.Assign) and refers(a, tree)}
    if hasattr(module, "pair"):  # the checks that losses on pairs share
        tree["pair"] = ast.parse(inspect.getsource(data.pair)).body[0]
    found, ask = {}, ["loss"]
    while ask:
        name = ask.pop()
        node = tree.get(name) or tables.get(name)
        if node and name not in found:
            found[name] = node
            ask += names_in(node)
    return dict(sorted(found.items(), key=lambda item: item[0] in tables))


def mutants(module):
    """(what was edited, functions of the mutant) for every single edit."""
    found = functions_of(module)
    for name, function in found.items():
        if isinstance(function, ast.Assign):
            continue
        original = ast.unparse(function)
        for path, node, graph in sites(function):
            for new in edits(node, graph):
                mutant = replaced(function, path, new)
                if ast.unparse(mutant) != original:
                    before, after = (ast.unparse(x).split("\n")[0] for x in (node, new))
                    yield f"{name}: {before} -> {after}", found | {name: mutant}


def built(module, functions):
    """The loss made of these functions, and a list that fills when `_detached` cut a gradient."""
    cut = []

    def detached(x):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            cut.append(True)
            return x.detach()
        return x

    space = vars(data) | vars(module) | {"_detached": detached}
    code = ast.fix_missing_locations(ast.Module(list(functions.values()), []))
    exec(compile(code, module.__file__, "exec"), space)
    return space["loss"], cut


def outcome(loss, cfg, item):
    """Losses, gradient and metrics on one input, or the kind of error."""
    logps, ref_logps, batch = item
    logps = logps.detach().clone().requires_grad_()
    batch = SimpleNamespace(**{k: v.clone() for k, v in vars(batch).items()})
    try:
        losses, metrics = loss(
            logps, None if ref_logps is None else ref_logps.detach().clone(), batch, cfg
        )
        (gradient,) = (
            torch.autograd.grad(losses.sum(), [logps], allow_unused=True)
            if losses.requires_grad
            else (None,)
        )
        gradient = torch.zeros_like(logps) if gradient is None else gradient
        if logps.is_meta:
            return "ran", None
        free = [
            value.requires_grad for value in metrics.values()
        ]  # a metric that carries a graph keeps it alive
        return [
            losses.detach(),
            gradient,
            *(value.detach() for value in metrics.values()),
            torch.tensor(free),
        ], list(metrics)
    except Exception as error:  # noqa: BLE001 - a mutant may do anything
        return f"{type(error).__name__}: {error}", None


def differ(a, b):
    if isinstance(a[0], str) or isinstance(b[0], str) or a[1] != b[1]:
        return a != b
    return any(
        x.dtype != y.dtype
        or x.shape != y.shape
        or not torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
        for x, y in zip(a[0], b[0])
    )


def survivors(module, cases, inputs):
    """(how many mutants there are, {what was edited} of those that made no difference)."""
    runs = [(module.Config(**fields), item) for item in inputs() for fields in cases]
    loss, _ = built(module, functions_of(module))
    runs = [(run, outcome(loss, *run)) for run in runs]
    count, alive = 0, []
    for text, functions in mutants(module):
        loss, cut = built(module, functions)
        told = next(
            (i for i, (run, known) in enumerate(runs) if differ(outcome(loss, *run), known)), None
        )
        if told is not None:
            runs.insert(0, runs.pop(told))  # what told this one will tell the next
        if "_detached" in text and not cut and told is None:
            continue  # nothing was detached: no edit
        count += 1
        if told is None:
            alive.append(text)
    return count, alive
