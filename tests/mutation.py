"""Mutation testing: make every single edit of a function and find those that change no result.

    names = reachable(source, ["loss"])             loss, and what it calls in its file
    for mutant in mutants(source, names):           one edit each: an operator, an argument, a sign
        print(mutant.line, mutant.before, "->", mutant.after)
    made, alive = survivors(module, cases, inputs)  run them all; `alive` changed no result

A mutant that changes no result on any input shows a line that is unnecessary or untested. An edit
swaps an operator, drops an operand, sign or call, changes a constant, replaces a sum by a mean,
exchanges two arguments, detaches or drops an argument, negates a condition, or replaces chosen by
rejected.
"""

import ast
import copy
import inspect
import sys
from dataclasses import dataclass
from types import SimpleNamespace

import numpy as np
import torch

from classroom import blank

SWAPS = {
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.Pow: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.BitAnd: ast.BitOr,
    ast.BitOr: ast.BitAnd,
    ast.BitXor: ast.BitOr,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Gt: ast.Lt,
    ast.Lt: ast.Gt,
    ast.GtE: ast.LtE,
    ast.LtE: ast.GtE,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
}
TWINS = dict(sum="mean", max="min", amax="amin", maximum="minimum", any="all", argmax="argmin")
TWINS |= {b: a for a, b in TWINS.items()}
OTHERS = dict(logps="ref_logps", chosen="rejected")
OTHERS |= {b: a for a, b in OTHERS.items()}
# functions whose arguments may be exchanged
SYMMETRIC = ("promote_types", "minimum", "maximum", "equal")


@dataclass(frozen=True)
class Mutant:
    """One edit of one expression.

    line: where the expression begins in the original source, counted from 1.
    before, after: the expression as text; a gradient that is cut reads `_detached(x)`.
    source: the whole source with this edit and no other. function: where it stands.
    last_line: where the expression ends.
    """

    line: int
    before: str
    after: str
    source: str
    function: str
    last_line: int

    @property
    def name(self):
        """The edit in one line, without its place in the file."""
        before, after = (text.split("\n")[0] for text in (self.before, self.after))
        return f"{self.function}: {before} -> {after}"


# ---- what may be edited


def reachable(source, core):
    """The names in `core` and of all functions of the source that they call, directly or not.

    A function in a table, NAME = dict(...), is called where NAME is read. KeyError: no such
    function.
    """
    functions = blank.functions(source)
    tables = {
        node.targets[0].id: node
        for node in ast.parse(source).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name)
    }
    found, ask = [], list(core)
    missing = [name for name in core if name not in functions]
    if missing:
        raise KeyError(f"no function {missing[0]} in this file")
    while ask:
        name = ask.pop(0)
        node = functions.get(name) or tables.get(name)
        if node and name not in found:
            found.append(name)
            ask += [part.id for part in ast.walk(node) if isinstance(part, ast.Name)]
    return [name for name in found if name in functions]


def sites(function):
    """(node, whether a gradient may pass through it) of all nodes of a function that may be edited.

    Its docstring, its signature and the texts of errors are not edited. No gradient passes through
    a statement that is a bare call, a condition, a comparison, or a detached expression.
    """

    def walk(node, graph):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            graph = graph and node.func.attr not in ("dim", "detach")
        graph = graph and not isinstance(node, (ast.Expr, ast.Compare))
        yield node, graph
        if isinstance(node, (ast.Raise, ast.JoinedStr)):
            return
        condition = getattr(node, "test", None)
        for child in ast.iter_child_nodes(node):
            yield from walk(child, graph and child is not condition)

    for statement in function.body:
        yield from walk(statement, True)


# ---- the edits


def edited(node, **fields):
    """A copy of a node with other fields."""
    new = copy.copy(node)
    for name, value in fields.items():
        setattr(new, name, value)
    return new


def edits(node, graph):
    """The nodes that may replace a node. graph: whether a gradient may pass through it."""
    if isinstance(node, ast.BinOp):
        if type(node.op) in SWAPS:
            yield edited(node, op=SWAPS[type(node.op)]())
        yield node.left
        yield node.right
    elif isinstance(node, ast.UnaryOp):
        yield node.operand
    elif isinstance(node, ast.Compare) and type(node.ops[0]) in SWAPS:
        yield edited(node, ops=[SWAPS[type(node.ops[0])](), *node.ops[1:]])
    elif isinstance(node, ast.BoolOp):
        yield edited(node, op=SWAPS[type(node.op)]())
        yield from node.values
    elif isinstance(node, ast.Constant) and isinstance(node.value, bool):
        yield ast.Constant(not node.value)
    elif isinstance(node, ast.Constant) and isinstance(node.value, (int, float)):
        yield ast.Constant(node.value + 1)
    elif isinstance(node, ast.IfExp):
        yield node.body
        yield node.orelse
    elif isinstance(node, ast.If):
        yield edited(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.AugAssign) and type(node.op) in SWAPS:
        yield edited(node, op=SWAPS[type(node.op)]())
    elif isinstance(node, ast.Call):
        yield from edits_of_call(node, graph)
    elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
        if node.id in OTHERS:
            yield ast.Name(OTHERS[node.id], ast.Load())


def edits_of_call(node, graph):
    """The call dropped, its twin, two arguments exchanged, an argument detached or dropped."""
    owner = node.func.value if isinstance(node.func, ast.Attribute) else None
    if isinstance(owner, ast.Name) and owner.id in ("torch", "F"):
        owner = None
    if owner:
        yield owner
    elif node.args and not isinstance(node.args[0], (ast.GeneratorExp, ast.Starred)):
        yield node.args[0]
    if isinstance(node.func, ast.Attribute) and node.func.attr in TWINS:
        yield edited(node, func=edited(node.func, attr=TWINS[node.func.attr]))
    if len(node.args) >= 2 and getattr(node.func, "attr", "") not in SYMMETRIC:
        yield edited(node, args=[node.args[1], node.args[0], *node.args[2:]])
    for i, arg in enumerate(node.args):
        if graph and not isinstance(arg, (ast.Constant, ast.GeneratorExp, ast.Starred)):
            yield edited(node, args=[*node.args[:i], detached(arg), *node.args[i + 1 :]])
    if owner and graph:
        yield edited(node, func=edited(node.func, value=detached(owner)))
    for i in range(len(node.keywords)):
        yield edited(node, keywords=node.keywords[:i] + node.keywords[i + 1 :])


def detached(node):
    return ast.Call(ast.Name("_detached", ast.Load()), [node], [])


# ---- mutants


def mutants(source, functions):
    """Every single edit of the named functions of a source -> [Mutant]."""
    nodes, made = blank.functions(source), []
    for name in functions:
        for node, graph in sites(nodes[name]):
            for new in edits(node, graph):
                before, after, place = ast.unparse(node), ast.unparse(new), node
                if isinstance(node, ast.If):  # its condition alone is another
                    before, after = (f"if {ast.unparse(x.test)}:" for x in (node, new))
                    place, new = node.test, new.test
                if before != after:
                    text = splice(source, place, new)
                    last = place.end_lineno
                    made.append(Mutant(place.lineno, before, after, text, name, last))
    return made


def splice(source, node, new):
    """The source, in which the text of one node is replaced by that of another."""
    lines = source.encode().splitlines(keepends=True)  # columns of the tree count bytes
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    text, rest = ast.unparse(new), b"".join(lines)[end:]
    compound = (ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.IfExp, ast.Lambda)
    if isinstance(new, compound) or (isinstance(new, ast.Constant) and rest.startswith(b".")):
        text = f"({text})"
    return (b"".join(lines)[:start] + text.encode() + rest).decode()


# ---- survivors


def execute(source, module):
    """Execute a source as a module -> its names, and a list.

    One of the names is the function `_detached`, which adds an entry to the list whenever it cuts a
    gradient.
    """
    cut = []

    def _detached(x):
        if isinstance(x, torch.Tensor) and x.requires_grad:
            cut.append(True)
            return x.detach()
        return x

    names = {"__name__": module.__name__, "__file__": module.__file__, "_detached": _detached}
    exec(compile(source, module.__file__, "exec"), names)
    return names, cut


def observe_loss(names, cfg, item):
    """The results of a loss on one item: losses, gradient and metrics, or the error.

    -> (tensors or text, the names of the metrics). A metric that carries a graph is told from one
    that does not, since it would keep the graph alive.
    """
    logps, ref_logps, batch = item
    logps = logps.detach().clone().requires_grad_()
    ref_logps = None if ref_logps is None else ref_logps.detach().clone()
    batch = SimpleNamespace(**{name: value.clone() for name, value in vars(batch).items()})
    try:
        losses, metrics = names["loss"](logps, ref_logps, batch, cfg)
        gradient = None
        if losses.requires_grad:
            (gradient,) = torch.autograd.grad(losses.sum(), [logps], allow_unused=True)
        if logps.is_meta:
            return "ran", None
        gradient = torch.zeros_like(logps) if gradient is None else gradient
        graphs = torch.tensor([value.requires_grad for value in metrics.values()])
        values = [value.detach() for value in metrics.values()]
        return [losses.detach(), gradient, *values, graphs], list(metrics)
    except Exception as error:  # noqa: BLE001 - a mutant may do anything
        return f"{type(error).__name__}: {error}", None


def observe_call(names, cfg, item):
    """What one call of a core without a loss returns: tensors and gradient, or the error.

    item: (function, *arguments); the string "cfg" stands for the Config. Arguments are copied. The
    gradient is that of the sum of the tensors that carry one, in the arguments (or members of an
    argument that is a tuple) that require it.
    """
    function, *arguments = item
    leaves = []

    def copied(x):
        if isinstance(x, tuple):
            return tuple(copied(part) for part in x)
        if not isinstance(x, torch.Tensor):
            return cfg if isinstance(x, str) and x == "cfg" else copy.deepcopy(x)
        new = x.detach().clone().requires_grad_(x.requires_grad)
        leaves.extend([new] * new.requires_grad)
        return new

    arguments = [copied(x) for x in arguments]
    try:
        values, kinds = flatten(names[function](*arguments))
        graphs = [x.sum() for x in values if x.requires_grad]
        if graphs and leaves:
            found = torch.autograd.grad(sum(graphs), leaves, allow_unused=True)
            values += [torch.zeros(()) if x is None else x for x in found]
        return [x.detach() for x in values], [*kinds, *(x.requires_grad for x in values)]
    except Exception as error:  # noqa: BLE001 - a mutant may do anything
        return f"{type(error).__name__}: {error}", None


def flatten(value):
    """Nested results -> ([tensor], what tells results of other kinds or structure apart)."""
    if isinstance(value, torch.Tensor):
        return [value], ["tensor"]
    if isinstance(value, (bool, int, float, np.ndarray, np.generic)):
        return [torch.as_tensor(value)], ["number"]
    if isinstance(value, dict):
        values, kinds = flatten(list(value.values()))
        return values, [*value, *kinds]
    if isinstance(value, (list, tuple)):
        parts = [flatten(part) for part in value]
        kinds = [type(value).__name__, len(value), *(k for _, kinds in parts for k in kinds)]
        return [x for values, _ in parts for x in values], kinds
    return [], [repr(value)]


def differ(a, b):
    """Whether two observations differ by more than rounding."""
    if isinstance(a[0], str) or isinstance(b[0], str):
        return type(a[0]) is not type(b[0]) or a[0] != b[0]
    return a[1] != b[1] or any(
        x.dtype != y.dtype
        or x.shape != y.shape
        or not torch.allclose(x.double(), y.double(), rtol=1e-9, atol=1e-12, equal_nan=True)
        for x, y in zip(a[0], b[0])
    )


def executed(function, file):
    """The lines of a file that a call without arguments executes, and what the call returns."""
    lines = set()

    def trace(frame, event, argument):
        if frame.f_code.co_filename != file:
            return None
        lines.add(frame.f_lineno)
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        result = function()
    finally:
        sys.settrace(before)
    return lines, result


def survivors(module, cases, inputs, functions=None, observe=observe_loss):
    """Run every mutant of a module until its result differs from the original on one input.

    module: a method file, imported. cases: keyword arguments of its Config (of a module without
    Config: the value of cfg). inputs: a function that makes the items (logps, ref_logps, batch).
    functions: names of what is edited; default: what PAPER.core is made of. observe(names, cfg,
    item): what is compared. -> ([Mutant] made, [Mutant] that made no difference). A mutant that
    detaches what has no gradient is no edit, and is not made.
    """
    source = inspect.getsource(module)
    functions = functions or reachable(source, module.PAPER.core)
    config = getattr(module, "Config", dict)
    names, _ = execute(source, module)
    runs = []  # (cfg, item, lines that it executes, what the original does)
    for cfg, item in [(config(**fields), item) for item in inputs() for fields in cases]:
        runs.append((cfg, item, *executed(lambda: observe(names, cfg, item), module.__file__)))

    def order(run, told=None):
        """What told the last mutant may tell the next; meta tensors are slow and come last."""
        first = run[1][0]
        return isinstance(first, torch.Tensor) and first.is_meta, run is not told

    runs.sort(key=order)
    made, alive = [], []
    for mutant in mutants(source, functions):
        names, cut = execute(mutant.source, module)
        place = set(range(mutant.line, mutant.last_line + 1))
        reached = [run for run in runs if run[2] & place]  # no other run can tell
        told = None
        for run in reached:
            if differ(observe(names, *run[:2]), run[3]):
                told = run
                break
        if told is None and "_detached" in mutant.after and not cut:
            continue
        made.append(mutant)
        if told is None:
            alive.append(mutant)
        else:
            runs.sort(key=lambda run: order(run, told))
    return made, alive
