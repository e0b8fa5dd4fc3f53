"""Assignments without a blank: a world of one's own, and a training step to make fast.

What is tested are promises (classroom/promises.py). Nothing is written unless an example keeps
them: a small world of this project, or the shipped step.
"""

import dataclasses
import json
import shutil
import tempfile

from classroom import calls, grader, handout, hidden, promises, ready
from data import UserError

MORE = ("bench.py", "methods/dpo.py", "classroom/clock.py", "classroom/probe.py")
MORE += ("classroom/promises.py", "classroom/step.py")
TEST = '''"""The visible tests: what is promised. Run: python -m pytest"""

import pytest

from classroom import promises

KIND = "KIND"


@pytest.fixture(scope="session")
def found():
    """{name of a promise: what is wrong}; the long calls take a minute."""
    return {promise.name: wrong for promise, wrong, _ in promises.here(KIND, seed=1)}


@pytest.mark.parametrize("name", [promise.name for promise in promises.KINDS[KIND][0]])
def test_promise(found, name):
    wrong = found[name]
    if isinstance(wrong, promises.ByHand):
        pytest.skip(wrong)
    if wrong:
        pytest.fail(wrong, pytrace=False)
'''
WORLD = '''"""A world of my own: what a prompt, a response and the reward are, in a few sentences.

    a prompt | a response    its reward

Say here how the reward can be gamed, or why it cannot be.
"""

from toy import world


class World(world.World):
    """See toy/world.py for all that a world may define, and toy/bandit.py for a small one."""

    name, kind = "my_world", "text"
    max_response = 16  # tokens
    pretrain = dict(steps=300, batch_size=32, lr=3e-3)
    align = dict(prompts=512, steps=60, lr=1e-3, batch_size=32)

    def model(self):
        raise NotImplementedError("your turn: model")

    def prompts(self, n, rng):
        raise NotImplementedError("your turn: prompts")

    def demonstrations(self, n, rng):
        raise NotImplementedError("your turn: demonstrations")

    def reward(self, prompts, responses):
        raise NotImplementedError("your turn: reward")
'''
# {kind: (the student's file, the module that asks, an example that keeps the promises)}
FILES = {
    "world": ("my_world.py", "classroom.probe", "toy/bandit.py"),
    "step": ("step.py", "classroom.clock", "classroom/step.py"),
}


def write(task, out, seed=0, say=print):
    """Write a ready.Task to a folder. UserError: the example breaks a promise."""
    kind = task.kind
    path, module, example = FILES[kind]
    tree = handout.shipped()
    tree |= {name: (handout.ROOT / name).read_text(encoding="utf-8") for name in MORE}
    tree[path] = WORLD if kind == "world" else tree["classroom/step.py"]
    half = handout.begun(out, tree, TEST.replace('KIND = "KIND"', f'KIND = "{kind}"'))
    teacher, name = half / "grader", path.removesuffix(".py")
    asked, long = promises.asked(kind, 1000 + seed)
    (teacher / name).mkdir()
    short = [(function, arguments) for function, *arguments in asked[: len(asked) - long]]
    calls.write(teacher / name, "calls", short)
    forms = [
        {"function": each[0], "arguments": calls.pack(tuple(each[1:]), {})}
        for each in asked[len(asked) - long :]
    ]
    tests = [
        hidden.Test(each.name, name, "promise", [], each.points, True)
        for each in promises.KINDS[kind][0]
    ]
    one = dict(name=name, path=path, module=module, functions=[], kind=kind, seed=1000 + seed)
    one |= dict(asked=asked, long=forms, run=None)
    one |= dict(tests=[dataclasses.asdict(test) for test in tests])
    about = {"title": task.title, "seed": seed, "files": [one]}
    about["written"] = ready.by_hand(task.written)
    (teacher / "assignment.json").write_text(json.dumps(about, indent=1))
    shutil.copytree(half / "student", teacher / "tree")
    (teacher / "cache").mkdir()
    source = (handout.ROOT / example).read_text(encoding="utf-8")
    say(f"the promises are asked of {example}")
    with tempfile.TemporaryDirectory() as work:
        job = grader.Job(teacher, one, work, {path: source}, teacher / "cache")
        rows = grader.TaskSheet(teacher, one).mark(job.run(forms))
    for test, _, status, message in rows:
        say(f"    {test['name']}: {status}" + (f", {message}" if message else ""))
        if status == "failed" and not (kind == "step" and test["name"].endswith("as fast")):
            raise UserError(f"{example}: {message}")
    handout.ended(out, readme(task, path, tests))
    return about


def readme(task, path, tests):
    """The task sheet."""
    lines = [f"# {task.title}", "", task.task, "", "## What is marked", ""]
    lines += [f"- {test.name}: {test.points} points" for test in tests]
    lines += [f"- {each['name']}: {each['points']} points" for each in ready.by_hand(task.written)]
    lines += ["", f"Hand in `{path}` and nothing else.", "", "## Try it", ""]
    lines += ["    pip install -r requirements.txt", "    python -m pytest"]
    return "\n".join(lines) + "\n"
