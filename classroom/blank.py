"""Blank functions of a source by its syntax tree, and look for what gives a blank away.

A target is the name of a function, "loss" or "Class.method", whose body is blanked, or "loss:2",
the right side of its second assignment, or "loss:ipo", the value of the key "ipo" in a dict that it
writes out (of a lambda, what it returns). Signature and docstring stay. The blank begins right
after the docstring, so comments go as well, unless they are kept on request.
"""

import ast
import io
import tokenize
from dataclasses import dataclass

from data import UserError

IMPORT = "from classroom.turn import your_turn"


@dataclass(frozen=True)
class Target:
    """A function of a file, and a part of it: the number of an assignment, or a key of a dict.

    Without a part, 0 and "", it is the whole body.
    """

    function: str
    assignment: int = 0
    key: str = ""

    @property
    def part(self):
        return str(self.assignment or self.key)

    @property
    def whole(self):
        return not (self.assignment or self.key)

    @property
    def name(self):
        return self.function if self.whole else f"{self.function}:{self.part}"


def targets(text):
    """The targets in a text such as "loss,gap:2". UserError: a part is not one."""
    found = []
    for one in text.split(","):
        function, colon, part = one.strip().partition(":")
        number = int(part) if part.isdecimal() else 0
        if not function or (colon and not number and not part.isidentifier()):
            raise UserError(
                f"--blank {one}: expected a function, function:2 for its 2nd '=', or "
                "function:key for a key of its dict"
            )
        found.append(Target(function, number, "" if number else part))
    return list(dict.fromkeys(found))


def functions(source):
    """{name: node} of the functions of a source; a method is named Class.method."""
    found = {}
    for node in ast.parse(source).body:
        if isinstance(node, ast.FunctionDef):
            found[node.name] = node
        elif isinstance(node, ast.ClassDef):
            parts = [part for part in node.body if isinstance(part, ast.FunctionDef)]
            found |= {f"{node.name}.{part.name}": part for part in parts}
    return found


def assignments(function):
    """The statements of a function that assign, in the order of their lines."""
    kinds = (ast.Assign, ast.AugAssign, ast.AnnAssign)
    found = [node for node in ast.walk(function) if isinstance(node, kinds) and node.value]
    return sorted(found, key=lambda node: (node.lineno, node.col_offset))


def entries(function):
    """{key: value} of the dicts that a function writes out; of a lambda the value is its body."""
    found = {}
    for node in ast.walk(function):
        for key, value in zip(node.keys, node.values) if isinstance(node, ast.Dict) else ():
            if isinstance(key, ast.Constant) and isinstance(key.value, str):
                found[key.value] = value.body if isinstance(value, ast.Lambda) else value
    return found


def value_of(function, target):
    """The expression that a target blanks. UserError: the function has no such part."""
    if target.key:
        found = entries(function)
        if target.key not in found:
            raise UserError(f"{target.function} has no dict with a key {target.key}")
        return found[target.key]
    found = assignments(function)
    if target.assignment > len(found):
        raise UserError(f"{target.function} has {len(found)} assignments, not {target.assignment}")
    return found[target.assignment - 1].value


def documented(function):
    """Whether a function has a docstring."""
    return ast.get_docstring(function, clean=False) is not None


def body(source, function):
    """(first line, last line) of what is blanked of a function, counted from 1."""
    if documented(function):
        return function.body[0].end_lineno + 1, function.end_lineno
    begin = start_of(source, function.body[0])
    colons = [x.start[0] for x in tokens(source) if x.string == ":" and x.start < begin]
    return colons[-1] + 1, function.end_lineno


def tokens(source):
    """The tokens of a source; lines are counted from 1 and columns from 0."""
    return list(tokenize.generate_tokens(io.StringIO(source).readline))


def start_of(source, node):
    """(line, column) where a node starts; the tree counts bytes, and tokens count characters."""
    line = source.split("\n")[node.lineno - 1]
    return node.lineno, len(line.encode()[: node.col_offset].decode())


def end_of(source, node):
    """(line, column) where a node ends."""
    line = source.split("\n")[node.end_lineno - 1]
    return node.end_lineno, len(line.encode()[: node.end_col_offset].decode())


def comments(source, first, last):
    """[(line, text)] of the comments between two lines."""
    return [
        (token.start[0], token.string)
        for token in tokens(source)
        if token.type == tokenize.COMMENT and first <= token.start[0] <= last
    ]


def blanked(source, wanted, keep_comments=False):
    """The source with its targets blanked.

    UserError: a function or an assignment is not there, or one target is a part of another.
    """
    known = functions(source)
    edits = []  # ((line, column), (line, column), new text, name)
    for target in wanted:
        if target.function not in known:
            raise UserError(f"no function {target.function} in this file")
        node = known[target.function]
        edits += (
            whole_body(source, node, target, keep_comments)
            if target.whole
            else one_value(source, node, target, keep_comments)
        )
    edits = sorted({edit[:2]: edit for edit in edits}.values())
    for one, other in zip(edits, edits[1:]):
        if other[0] < one[1]:
            raise UserError(f"--blank {one[3]},{other[3]}: one of them is a part of the other")
    lines = source.rstrip("\n").split("\n")
    for (first, start), (last, end), new, _ in reversed(edits):
        text = lines[first - 1][:start] + new + lines[last - 1][end:]
        lines[first - 1 : last] = text.rstrip().split("\n")
    if not all(target.whole for target in wanted):
        last = [node for node in ast.parse(source).body if is_import(node)][-1].end_lineno
        lines.insert(last, IMPORT)
    return "\n".join(lines) + "\n"


def is_import(node):
    return isinstance(node, (ast.Import, ast.ImportFrom))


def whole_body(source, node, target, keep_comments):
    """The edits that blank the body of a function."""
    first, last = body(source, node)
    if last < first:
        raise UserError(f"{target.name} has no body besides its docstring")
    indent = " " * node.body[0].col_offset
    kept = [indent + text for _, text in comments(source, first, last)] if keep_comments else []
    new = [*kept, f'{indent}raise NotImplementedError("your turn: {target.name}")']
    end = last, len(source.split("\n")[last - 1])
    return [((first, 0), end, "\n".join(new), target.name)]


def one_value(source, node, target, keep_comments):
    """The edits that blank an expression, the parentheses around it and the comments beside it."""
    value, parts = value_of(node, target), tokens(source)
    first = [part.start for part in parts].index(start_of(source, value))
    last = [part.end for part in parts].index(end_of(source, value))
    space = (tokenize.NL, tokenize.COMMENT)
    opened = 0
    while parts[first - 1].string == "(" or parts[first - 1].type in space:
        first -= 1
        opened += parts[first].string == "("
    while opened:
        last += 1
        opened -= parts[last].string == ")"
    start, end = parts[first - 1].end, parts[last].end
    edits = [(start, end, f' your_turn("{target.name}")', target.name)]
    line = source.split("\n")[end[0] - 1]
    place = len(line)  # where a comment begins behind the expression
    for part in parts:
        if part.type == tokenize.COMMENT and part.start[0] == end[0] and part.start >= end:
            place = max(end[1], len(line[: part.start[1]].rstrip()))
    kept = "".join("  " + text for _, text in comments(source, start[0], end[0]) if keep_comments)
    return [*edits, ((end[0], place), (end[0], len(line)), kept, target.name)]


# ---- what was blanked, and where else it stands


def code_of(source, wanted):
    """The statements that were blanked and that compute something, as normalised text."""
    known, found = functions(source), []
    for target in wanted:
        node = known[target.function]
        parts = node.body
        if target.assignment:
            parts = [assignments(node)[target.assignment - 1]]
        elif target.key:
            value = value_of(node, target)
            found += [ast.unparse(value)] if computes(value) else []
            continue
        for part in parts:
            for inner in ast.walk(part):
                if isinstance(inner, (ast.Assign, ast.AugAssign, ast.Return)) and inner.value:
                    found += [ast.unparse(inner)] if computes(inner.value) else []
    return list(dict.fromkeys(found))


ARITHMETIC = (ast.Add, ast.Sub, ast.Mult, ast.Div, ast.Pow, ast.MatMult, ast.USub)


def computes(expression):
    """Whether an expression does arithmetic with at least two names."""
    parts = list(ast.walk(expression))
    names = {node.id for node in parts if isinstance(node, ast.Name)}
    return len(names) > 1 and any(isinstance(getattr(n, "op", None), ARITHMETIC) for n in parts)


def statements(source):
    """{normalised text: line} of the simple statements of a source, and of what lambdas return."""
    kinds = (ast.Assign, ast.AugAssign, ast.Return, ast.Expr)
    parts = list(ast.walk(ast.parse(source)))
    found = [node for node in parts if isinstance(node, kinds)]
    found += [node.body for node in parts if isinstance(node, ast.Lambda)]
    found += [node.value for node in parts if isinstance(node, (ast.Assign, ast.Return))]
    return {ast.unparse(node): node.lineno for node in found if node}


def leaks(code, sources):
    """[(file, line, statement)]: where a blanked statement stands in other sources {file: text}."""
    found = []
    for file, text in sources.items():
        lines = statements(text)
        found += [(file, lines[line], line) for line in code if line in lines]
    return found
