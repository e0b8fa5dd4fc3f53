"""The hidden tests of an assignment, and the gate that proves them with mutants.

A hidden test calls a blanked function with inputs of fresh seeds, in float64, under several
settings, and compares what it returns and its gradients with the solution. The gate makes every
single edit of what was blanked; the tests must tell each edit from the solution, unless the edit is
equivalent, or changes no value and no gradient (a metric, a precision, what is refused).
"""

import ast
import dataclasses
import importlib
import inspect
import sys
import warnings

import torch

from classroom import blank, calls, properties
from data import UserError

MOST = 150  # recorded calls of one helper function
SHOWN = 12  # calls by which a mistake is recognised
FEW = 40  # calls of a test besides those that tell mutants apart


# ---------------------------------------------------------------- calls


# files besides the methods of which parts can be blanked, and what the tests know about them: calls
# of these parts, PLAIN ways to write them, and the blanks that need not be filled
PARTS = {"nanomodel": "tests.classroom.logps"}


def place_of(name):
    """The module with what the tests know about a file."""
    return PARTS.get(name, f"tests.methods.test_{name}")


def material(name):
    """What the tests of this project know about a method: its cases, inputs and equivalent edits.

    For one of the PARTS, what they know about it. UserError: the project's tests are not there, or
    the method has none.
    """
    place = place_of(name)
    try:
        return importlib.import_module(place)
    except ImportError:
        raise UserError(
            f"{place.replace('.', '/')}.py is missing: an assignment is made in a clone of the "
            "project, out of a method that has tests"
        ) from None


def settings_of(module, tests):
    """[Config]: the default one, and those of the tests."""
    made = []
    for fields in [{}, *tests.CASES]:
        cfg = module.Config(**fields)
        if cfg not in made:
            made.append(cfg)
    return made


def jittered(item, rng):
    """The item with other log-probs, outside the mask 0, of the same sign and about the same size.

    Where policy and reference are equal they stay equal.
    """
    logps, ref_logps, batch = item

    def other(x):
        return x.detach() * (0.6 + 0.8 * torch.rand(x.shape, generator=rng, dtype=x.dtype))

    new = other(logps)
    if ref_logps is None:
        return new.requires_grad_(), None, batch
    ref = torch.where(logps.detach() == ref_logps, new, other(ref_logps))
    return new.requires_grad_(), ref, batch


def takes(module, item, cfg):
    """Whether the loss of a module is finite for an item under a Config."""
    try:
        return bool(properties.observe(module, item, {}, cfg).losses.isfinite().all())
    except UserError:
        return False
    except (AttributeError, NameError, TypeError, KeyError):  # an input without some column
        return False


def loss_calls(module, tests, seed):
    """[(item, Config)] that the solution takes: the inputs of the tests and jittered copies."""
    rng, made = torch.Generator().manual_seed(seed), []
    plain = [x for x in tests.INPUTS() if x[0].dtype == torch.float64 and not x[0].is_meta]
    items = [other for item in plain for other in (jittered(item, rng), item)]
    for cfg in settings_of(module, tests):
        made += [(item, cfg) for item in items if takes(module, item, cfg)]
    return made


def reached(names, call):
    """The name of the blank that a call of blanked code ends at, or ""."""
    found = answer(names, call)
    start = "NotImplementedError: your turn: "
    return found.removeprefix(start) if isinstance(found, str) and start in found else ""


def blanked_names(module, wanted):
    """The names of a module in which the targets are blanked."""
    from tests import mutation

    return mutation.execute(blank.blanked(inspect.getsource(module), wanted), module)[0]


def reaching(module, tests, wanted, items):
    """{name of a blank: fields of a Config, as few as possible, with which the loss meets it}.

    UserError: with none of the items and settings of the tests it meets a blank of the loss.
    """
    alone, found = {target.name: blanked_names(module, [target]) for target in wanted}, {}
    single = [{name: value} for fields in tests.CASES for name, value in fields.items()]
    for fields in [{}, *single, *tests.CASES]:
        try:
            cfg = module.Config(**fields)
        except UserError:  # a field that no default variant has
            continue
        for item in items:
            if takes(module, item, cfg):
                for name, names in alone.items():
                    if reached(names, ("loss", (*item, cfg))):
                        found.setdefault(name, fields)
    for target in wanted:
        if target.function == "loss" and target.name not in found:
            raise UserError(f"no public input of the tests reaches {target.name}")
    return found


def recorded(module, function, made):
    """The arguments of all calls of a function of a module while its loss runs on the items."""
    owner = module
    for part in function.split("."):
        owner = getattr(owner, part)
    code, found, seen = owner.__code__, [], set()

    def watch(frame, event, argument):
        if event == "call" and frame.f_code is code:
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            tensors = {}
            form = calls.pack(tuple(frame.f_locals[name] for name in names), tensors)
            key = str(form) + str([x.tolist() for x in tensors.values()])
            if key not in seen:
                seen.add(key)
                found.append(calls.unpack(form, tensors, vars(module)))

    for item, cfg in made:
        leaf = properties.with_logps(item, item[0])
        before = sys.getprofile()
        sys.setprofile(watch)
        try:
            module.loss(*leaf, cfg)
        finally:
            sys.setprofile(before)
    step = max(1, len(found) // MOST)
    return found[::step]


@dataclasses.dataclass
class Test:
    """One line of the result: what is compared, on which calls, for how many points.

    kind: "values", "gradients", "property" or "run". calls: the numbers of the calls that it reads;
    of a property one list of numbers per input. rule: the name of the property, and setting: the
    fields of its Config.
    """

    name: str
    function: str
    kind: str
    calls: list
    points: int
    visible: bool = False
    sentence: str = ""
    rule: str = ""
    setting: dict = dataclasses.field(default_factory=dict)


def tests_of(name, made):
    """[Test] of values and gradients, of the default settings and of the others.

    name: what was blanked. made: [(number of a call, its arguments)].
    """
    default, other = [], []
    for number, arguments in made:
        configs = [x for x in arguments if dataclasses.is_dataclass(x)]
        plain = not configs or configs[0] == type(configs[0])()
        (default if plain else other).append(number)
    if not default:  # a variant that is not the default one
        default, other = other, []
    found = []
    for label, numbers, points in (("", default, 25), (", other settings", other, 15)):
        if numbers:
            for kind in ("values", "gradients"):
                line = f"{name}: {kind}{label}"
                found.append(Test(line, name.split(":")[0], kind, numbers, points))
    return found


def all_tests(module, tests, wanted, seed):
    """The calls of all blanked functions and what is compared -> ([(function, arguments)], [Test]).

    A function that cannot be called alone, because it takes an argument that cannot be written to a
    file, is tested through the loss. UserError: a function is no part of the loss.
    """
    free = ()
    if module.__name__ in PARTS:
        entries, free = tests.calls(seed), tests.FREE
    else:
        entries = entries_of(module, tests, wanted, seed)
    every = [(name, each) for name, arguments in entries.items() for each in arguments]
    made, found = [], []
    for target in wanted:
        names = blanked_names(module, [target])  # a blank before it would hide it
        meets = [call for call in every if reached(names, call)]
        own = [call for call in meets if call[0] == target.function] or meets
        if not own and target.name not in free:
            raise UserError(f"no input of the tests reaches {target.name}")
        found += tests_of(target.name, [(place(made, call), call[1]) for call in own])
    if not found:
        raise UserError(f"no input of the tests reaches {wanted[0].name} alone")
    return made, found


def place(made, call):
    """The number of a call in the list of calls, to which it is added if it is new."""
    for number, other in enumerate(made):
        if other is call:
            return number
    made.append(call)
    return len(made) - 1


def entries_of(module, tests, wanted, seed):
    """{function: [arguments]}: the calls that test the blanked functions of a method."""
    names = list(dict.fromkeys(target.function for target in wanted))
    losses = loss_calls(module, tests, seed)
    parts = reachable(inspect.getsource(module))
    for name in names:
        if name not in parts:
            raise UserError(f"{name} is no part of the loss, so no test would see what it does")
    entries = {}
    for name in names:
        if name != "loss":
            try:
                entries[name] = recorded(module, name, losses)
            except calls.NotPlain:
                names.append("loss")
    if "loss" in names:
        entries["loss"] = [(*item, cfg) for item, cfg in losses]
    return entries


def reachable(source):
    """The names of the loss and of the functions of its file that it calls, directly or not."""
    from tests import mutation

    return mutation.reachable(source, ["loss"])


# ---------------------------------------------------------------- answers


def answer(names, call):
    """What a call returns, given the names of a module -> tensors, or the text of its error."""
    function, arguments = call
    owner, *rest = function.split(".")
    owner = names[owner]
    for part in rest:
        owner = getattr(owner, part)
    try:
        fresh = tuple(copied(x, names) for x in arguments)
        return calls.result(owner, fresh, function == "loss")
    except Exception as error:  # noqa: BLE001 - a mutant may do anything
        return f"{type(error).__name__}: {error}"


def copied(x, names):
    """A copy of an argument whose leaf tensors share nothing with it; names: of its module."""
    tensors = {}
    return calls.unpack(calls.pack(x, tensors), tensors, names)


def agree(a, b, kind="both"):
    """Whether two answers have the same values, gradients, or both."""
    if isinstance(a, str) or isinstance(b, str):
        return False
    wanted = {"values": ("value",), "gradients": ("gradient",)}.get(kind, ("value", "gradient"))
    keys = [key for key in a if key.startswith(wanted)]
    if sorted(keys) != sorted(key for key in b if key.startswith(wanted)):
        return False
    return all(same(a[key], b[key]) for key in keys)


def same(a, b):
    """Whether two tensors are equal up to rounding, in shape and kind too."""
    return a.dtype.is_floating_point == b.dtype.is_floating_point and properties.close(a, b)


# ---------------------------------------------------------------- mutants


@dataclasses.dataclass
class Gate:
    """What the mutants of an assignment showed.

    killed: [(sentence, answers to the calls `shown`)] of the mutants that the hidden tests tell
    apart. visible: how many of these the visible tests tell apart. habits: edits that change a
    metric, a precision or a refusal alone. equivalent: edits that change nothing, as the tests
    explain. tellers: the calls that told some mutant from the solution.
    """

    killed: list
    visible: int
    habits: list
    equivalent: list
    shown: list
    tellers: set


def spread(count, most):
    """At most `most` of the numbers below count, evenly spread."""
    step = max(1, -(-count // most))
    return list(range(0, count, step))


def pruned(made, tests, tellers):
    """Fewer calls that tell as many mutants: the tellers, and a few of every test.

    -> (calls, tests with new numbers).
    """
    kept = set(tellers)
    for test in tests:
        kept |= {test.calls[i] for i in spread(len(test.calls), FEW)}
    numbers = {old: new for new, old in enumerate(sorted(kept))}
    fewer = [
        dataclasses.replace(test, calls=[numbers[i] for i in test.calls if i in numbers])
        for test in tests
    ]
    return [made[i] for i in sorted(kept)], fewer


def gate(module, tests, wanted, made, visible):
    """Make every edit of what was blanked and run the hidden tests on it -> Gate.

    visible(names) -> whether the visible tests pass with the names of a module. UserError: a mutant
    passes, changes something, and nobody has explained why.
    """
    from tests import mutation

    source = inspect.getsource(module)
    if module.__name__ in PARTS:
        source, wanted = in_plain_words(source, tests.PLAIN), blank.targets(",".join(tests.PLAIN))
    places = [place for target in wanted for place in lines_of(source, target)]
    functions = list(dict.fromkeys(target.function for target in wanted))
    expected = [answer(vars(module), call) for call in made]
    order, shown = list(range(len(made))), spread(len(made), SHOWN)
    result = Gate([], 0, [], [], shown, set())
    alive = []
    if module.__name__ in PARTS:
        names, _ = mutation.execute(source, module)
        if not all(agree(answer(names, call), right) for call, right in zip(made, expected)):
            raise UserError("the plain way to write it differs from the solution")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mutant in mutation.mutants(source, functions):
            if not any(first <= mutant.line <= last for first, last in places):
                continue
            names, cut = mutation.execute(mutant.source, module)
            told = None
            for number in order:
                if not agree(answer(names, made[number]), expected[number]):
                    told = number
                    break
            if told is not None:
                order.remove(told)
                order.insert(0, told)  # what told one mutant may tell the next
                result.tellers.add(told)
                answers = [answer(names, made[number]) for number in shown]
                result.killed.append((mistake(mutant), answers))
                result.visible += not visible(names)
            elif "_detached" not in mutant.after or cut:
                alive.append(mutant)
        for mutant in alive:
            if mutant.name in tests.SURVIVORS:
                result.equivalent.append(mutant.name)
            elif module.__name__ not in PARTS and changes_habits(module, tests, mutant):
                result.habits.append(mutant.name)
            else:
                place = place_of(module.__name__.split(".")[-1]).replace(".", "/")
                raise UserError(
                    f"line {mutant.line}: `{mutant.after}` in place of `{mutant.before}` passes "
                    "the hidden tests: no assignment is written before an input tells them apart "
                    f"(INPUTS in {place}.py)"
                )
    return result


def in_plain_words(source, plain):
    """A source with other bodies of some of its functions, {name: body}.

    What a student would write is edited in their place where the shipped body also decides about
    memory and devices.
    """
    lines, known = source.splitlines(), blank.functions(source)
    for name in sorted(plain, key=lambda name: -known[name].lineno):
        first, last = blank.body(source, known[name])
        lines[first - 1 : last] = plain[name].splitlines()
    return "\n".join(lines) + "\n"


def lines_of(source, target):
    """[(first, last line)] of what a target blanks."""
    node = blank.functions(source)[target.function]
    if target.whole:
        return [(node.body[0].lineno, node.end_lineno)]
    value = blank.value_of(node, target)
    return [(value.lineno, value.end_lineno)]


def changes_habits(module, tests, mutant):
    """Whether an edit changes what a loss does for an input of any precision, metrics included."""
    from tests import mutation

    plain, _ = mutation.execute(inspect.getsource(module), module)
    other, _ = mutation.execute(mutant.source, module)
    for cfg in [module.Config(**fields) for fields in tests.CASES]:
        for item in tests.INPUTS():
            one = mutation.observe_loss(plain, cfg, item)
            two = mutation.observe_loss(other, cfg, item)
            if mutation.differ(one, two):
                return True
    return False


WORDS = {
    "sum": "the sum",
    "mean": "the mean",
    "max": "the maximum",
    "min": "the minimum",
    "logsigmoid": "the log of the sigmoid",
}
SIGNS = {ast.Add: "+", ast.Sub: "-", ast.Mult: "*", ast.Div: "/", ast.Pow: "**"}


def mistake(mutant):
    """One sentence on what an edit did, which does not show the solution."""
    before, after = (
        ast.parse(text.rstrip(":").removeprefix("if ")).body[0].value if text.strip() else None
        for text in (mutant.before, mutant.after)
    )
    where = f"in {mutant.function}"
    if "_detached" in mutant.after:
        return f"no gradient passes through a term that should have one, {where}"
    if isinstance(before, ast.BinOp):
        texts = [ast.unparse(node) for node in (after, before.left, before.right)]
        if texts[0] in texts[1:]:
            dropped = before.right if texts[0] == texts[1] else before.left
            return f"{named(dropped)} is missing, {where}"
        signs = [SIGNS.get(type(node.op), "another operator") for node in (after, before)]
        return f"{signs[0]} in place of {signs[1]}, {where}"
    if isinstance(before, ast.UnaryOp):
        kinds = {ast.USub: "a minus sign", ast.Invert: "a ~", ast.Not: "a not"}
        return f"{kinds.get(type(before.op), 'an operator')} is missing, {where}"
    if isinstance(before, ast.Constant):
        return f"a constant is another, {where}"
    if isinstance(before, ast.Compare):
        return f"a comparison is another, {where}"
    if isinstance(before, ast.Name) and isinstance(after, ast.Name):
        return f"{after.id} in place of {before.id}, {where}"
    if isinstance(before, ast.Call):
        return of_call(before, after, where)
    return f"a condition is another, {where}"


def of_call(before, after, where):
    name = getattr(before.func, "attr", getattr(before.func, "id", "a call"))
    if isinstance(after, ast.Call):
        other = getattr(after.func, "attr", getattr(after.func, "id", ""))
        if other != name and len(after.args) == len(before.args):
            return f"{WORDS.get(other, other)} in place of {WORDS.get(name, name)}, {where}"
        if len(after.args) == len(before.args) >= 2 and len(after.keywords) == len(before.keywords):
            return f"two arguments of {name} are exchanged, {where}"
        if len(after.keywords) < len(before.keywords):
            return f"an argument of {name} is missing, {where}"
    return f"{WORDS.get(name, name)} is missing, {where}"


def named(node):
    """A term by its name where it has one."""
    if isinstance(node, (ast.Name, ast.Attribute)):
        return ast.unparse(node).removeprefix("cfg.")
    return f"the constant {node.value}" if isinstance(node, ast.Constant) else "a term"
