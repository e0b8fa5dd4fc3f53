"""The visible tests of a handout: properties of a right solution, one sentence each on failure.

tests/assignment.json of a handout says which properties its blanked functions have, and
tests/FILE.json and .safetensors hold the inputs. The solution is not needed.
"""

import importlib
import json
from collections import namedtuple
from pathlib import Path

from classroom import calls, properties

Case = namedtuple("Case", "module function property setting")


def load(folder):
    """(what assignment.json says, {module: (forms, tensors)}) of a folder of tests."""
    folder = Path(folder)
    about = json.loads((folder / "assignment.json").read_text())
    return about, {file["module"]: calls.read(folder, file["name"]) for file in about["files"]}


def cases(folder):
    """[Case] of a handout, in the order of its files and functions."""
    about, _ = load(folder)
    return [Case(*case) for file in about["files"] for case in file["cases"]]


def title(case):
    """A case in a few words, as the name of its test."""
    setting = ", ".join(f"{key}={value}" for key, value in case.setting.items())
    return f"{case.function}: {case.property}" + (f" ({setting})" if setting else "")


def your_turn(case):
    """The line for a function that was not written yet."""
    return f"your turn: write {case.function} in {case.module.replace('.', '/')}.py"


def failure(folder, case):
    """What is wrong with a function, as one line; None if it has the property."""
    _, inputs = load(folder)
    forms, tensors = inputs[case.module]
    module = importlib.import_module(case.module)
    try:
        if case.property not in properties.PROPERTIES:
            form = next(form for form in forms if form["function"] == case.function)
            arguments = calls.unpack(form["arguments"], tensors, vars(module))
            return of_helper(module, case.function, case.property, arguments, form["shapes"])
        cfg = module.Config(**case.setting)
        for form in forms:
            if form["function"] == "loss":
                *item, _ = calls.unpack(form["arguments"], tensors, vars(module))
                if not keeps(module, case.property, tuple(item), cfg):
                    return properties.PROPERTIES[case.property].sentence
    except NotImplementedError:
        return your_turn(case)
    return None


def keeps(module, name, item, cfg):
    """Whether the loss of a module has a property on one item, or is not concerned by it."""
    made = properties.PROPERTIES[name].calls(item, cfg)
    if not made:
        return True
    return properties.keeps(
        name, [properties.observe(module, *call, cfg) for call in made], made, cfg
    )


def of_helper(module, function, name, arguments, shapes):
    """What is wrong with a function other than a loss, for one call; None: nothing.

    name: one of its properties, or "shapes": those of what it returns.
    """
    owner = module
    for part in function.split("."):
        owner = getattr(owner, part)
    if name == "shapes":
        found = calls.result(owner, arguments)
        made = [list(x.shape) for key, x in found.items() if key.startswith("value")]
        return None if made == shapes else f"{function} returns shapes {made}, expected {shapes}"
    rule = properties.RULES[name]
    group = rule.calls(arguments, None)
    results = [properties.Result.of(calls.result(owner, each)) for each, _ in group]
    return None if properties.keeps(name, results, group, None) else rule.sentence
