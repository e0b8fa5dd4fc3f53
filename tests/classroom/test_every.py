"""Every method file with a loss as an assignment: the handout, and right, wrong and hostile losses.

test_assignment.py tests the parts on rdpo.py. Here is what must hold for every file; all of it has
the marker `mutants`, and one file is a sample for the marker `slow`.
"""

import importlib
import inspect
import warnings

import pytest

from classroom import grader, handout, hidden, ready, visible
from lab import settings
from tests import mutation
from tests.classroom.marking import ROOT, marks_of, points, visible_tests, written

SAMPLE = "dpo"
RUNS_IN_SLOW = ("dpo", "ddo", "disco", "grpo", "inpo", "ld_dpo")  # one for every world, and more
WITHOUT_RUN = ("dstc", "ofs_dpo", "urflex")  # their short runs tell nothing
WITHOUT = ("dct_adamw", "dho", "kdiff", "krr_st", "lls", "wide_deep")  # papers without a loss
LOSSES = [name for name in settings.methods() if name not in WITHOUT]
EVERY = [
    pytest.param(name, marks=pytest.mark.slow if name == SAMPLE else pytest.mark.mutants)
    for name in LOSSES
]
TURN = '    raise NotImplementedError("your turn: loss")'
# what a submission does at its first, second, ... call, and the message; the last ones end it
HOSTILE = (
    ("return logps.sum((1, 2)) * float('nan'), {}", "NaN or infinite"),
    ("return logps.sum((1, 2))[:, None], {}", "expected ("),
    ("return right(logps, ref_logps, batch, cfg)[0].float()", "torch.float32, expected"),
    ("return logps.sum((1, 2)) > 0, {}", "torch.bool, expected"),
    ("return 'hello', {}", "holds no number"),
    # torch refuses this where a gradient is asked for; else it is a wrong value
    (
        "logps.zero_()\n    return right(logps, ref_logps, batch, cfg)",
        ("in-place operation", "the value differs"),
    ),
    ("return torch.zeros(10**13), {}", "memory"),
    ("return loss_(logps, ref_logps, batch, cfg)", "without end"),
    ("os.fork()\n    return 0.0", "expected ("),
    ("from methods.METHOD_solution import loss\n    return loss()", "No module named"),
    ("sys.path.insert(0, '..')\n    import solution", "No module named"),
    ("raise ValueError('\\x1b[31m|<b>')", "ValueError: \\x1b[31m|<b>"),
    ("raise KeyboardInterrupt", "KeyboardInterrupt"),
    ("torch.autograd.grad = None\n    return right(logps, ref_logps, batch, cfg)", "TypeError"),
    ("os._exit(0)", "ended in the middle of it (exit status 0)"),
    ("while True:\n        pass", "did not end within 3 seconds"),
    ("while True:\n        print('x' * 999)", "did not end within 3 seconds"),
)
# the number of the call is kept in a file, since processes end; after the last one comes `right`
TURNS = """

import os
import sys
from pathlib import Path

import torch

names = {"__name__": __name__}
exec(SOLUTION, names)
right = names["loss"]


def turn():
    file = Path("turn")
    file.write_text((file.read_text() if file.exists() else "") + "x")
    return globals().get(f"loss_{file.stat().st_size - 1}", right)
"""


def test_the_files_with_a_loss_are_those_that_declare_one():
    declared = [
        name
        for name in settings.methods()
        if "loss" in importlib.import_module(f"methods.{name}").PAPER.core
    ]
    assert LOSSES == declared and len(LOSSES) >= 33 and SAMPLE in LOSSES


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_can_be_assigned(name, tmp_path, monkeypatch):
    """Blank, solution, zeros and every mutant; the handout in a process of its own."""
    path = f"methods/{name}.py"
    folder, sheet = written(tmp_path, monkeypatch, path, "loss")
    source, blank = (ROOT / path).read_text(), (folder / "student" / path).read_text()
    assert TURN in blank and points(marks_of(sheet, source)) == 100
    rows = marks_of(sheet, blank)
    assert {row[2] for row in rows} == {"not attempted"} and points(rows) == 0
    zeros = marks_of(sheet, blank.replace(TURN, "    return (0 * logps).sum((1, 2)), {}"))
    assert points(zeros) <= 10 and {row[2] for row in zeros} >= {"failed"}
    titles = [test["name"] for test in sheet.one["tests"]]
    assert len(set(titles)) == len(titles)
    failed, passed, said = visible_tests(folder / "student")
    cases = visible.cases(folder / "student/tests")
    assert (failed, passed) == (len(cases), 0) and len(cases) >= 5, said
    assert said.count(f"your turn: write loss in {path}") == failed, said
    for case in cases:  # methods.NAME of this process is the solution
        assert visible.failure(folder / "student/tests", case) is None, case
    module = importlib.import_module(f"methods.{name}")
    tests = hidden.material(name)
    explained = {*sheet.one["mutants"]["others"], *tests.SURVIVORS}
    seen = 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for mutant in mutation.mutants(inspect.getsource(module), ["loss"]):
            names, cut = mutation.execute(mutant.source, module)
            if full_values(sheet, names):
                assert mutant.name in explained or ("_detached" in mutant.after and not cut)
            else:
                seen += 1
    assert seen == sheet.one["mutants"]["killed"] > 0


def reward_of_run(module, settings, seed, sign):
    """The reward after a short run with a loss that is multiplied by a sign."""
    plain = module.loss

    def loss(*arguments):
        losses, metrics = plain(*arguments)
        return sign * losses, metrics

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "loss", loss)
        policy = module.run(grader.lab_of(settings | {"seed": seed}), module.Config())
    return grader.reward_of(policy.state_dict(), settings)


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.slow if name in RUNS_IN_SLOW else pytest.mark.mutants)
        for name in LOSSES
        if name not in handout.OTHER_SHAPE
    ],
)
def test_the_short_run_of_every_loss_tells_right_from_wrong(name):
    """The solution passes on seeds that were not measured; zeros and a wrong sign fail."""
    module = importlib.import_module(f"methods.{name}")
    settings = handout.run_settings(module)
    right = [reward_of_run(module, settings, seed, 1) for seed in range(handout.SEEDS + 3)]
    low = handout.lowest(right[: handout.SEEDS])
    zeros, wrong = (reward_of_run(module, settings, 0, sign) for sign in (0, -1))
    base = grader.reward_of(None, settings)
    assert zeros == pytest.approx(base)
    if name in WITHOUT_RUN:
        assert base >= low
    else:
        assert max(base, wrong) < low <= min(right), (base, wrong, low, right)


def test_the_docs_name_the_methods_without_a_marked_run():
    text = " ".join((ROOT / "docs/classroom.md").read_text(encoding="utf-8").split())
    named = ", ".join(sorted((*WITHOUT_RUN, *handout.OTHER_SHAPE)))
    assert f"No run is marked of {named}:" in text


def no_gate(module, tests, wanted, made, visible):
    """In place of hidden.gate, which takes long: no mutants."""
    return hidden.Gate([], 0, [], [], [], set())


def full_values(sheet, names):
    """Whether the names of a module pass all tests of values and gradients of a Sheet."""
    for test in sheet.one["tests"]:
        if test["kind"] in ("values", "gradients"):
            for number in test["calls"]:
                found = hidden.answer(names, sheet.calls[number])
                if not hidden.agree(found, sheet.expected[number], test["kind"]):
                    return False
    return True


READY = [(number, option) for number, item in ready.READY.items() for option in item.options]


@pytest.mark.slow
@pytest.mark.parametrize("number, option", READY)
def test_every_ready_made_assignment_tells_right_from_zeros(number, option, tmp_path, monkeypatch):
    """Constants earn nothing for a gradient that is 0 in the solution, too."""
    monkeypatch.setattr(hidden, "gate", no_gate)
    for name, text in option:
        (tmp_path / name).mkdir()
        folder, sheet = written(tmp_path / name, monkeypatch, ready.path_of(name), text)
        source = (ROOT / ready.path_of(name)).read_text()
        assert points(marks_of(sheet, source)) == 100
        zeros = [{key: 0 * x for key, x in answer.items()} for answer in sheet.expected]
        assert points(sheet.mark(zeros, None)) <= 10
        rows = marks_of(sheet, (folder / "student" / ready.path_of(name)).read_text())
        assert {row[2] for row in rows} == {"not attempted"} and points(rows) == 0


@pytest.mark.parametrize("name", EVERY)
def test_every_loss_may_be_hostile(name, tmp_path, monkeypatch):
    """A submission that does something else at each call: a message for each, and no crash."""
    path = f"methods/{name}.py"
    monkeypatch.setattr(hidden, "gate", no_gate)
    folder, sheet = written(tmp_path, monkeypatch, path, "loss")
    blank = (folder / "student" / path).read_text()
    solution = (ROOT / path).read_text()
    assert len(sheet.calls) > len(HOSTILE)
    source = blank.replace(TURN, "    return turn()(logps, ref_logps, batch, cfg)")
    for i, (body, _) in enumerate(HOSTILE):
        source += f"\n\ndef loss_{i}(logps, ref_logps, batch, cfg):\n    {body}\n"
        source = source.replace("return loss_(", f"return loss_{i}(")
    source += TURNS.replace("SOLUTION", repr(solution))
    work = tmp_path / "work"
    work.mkdir()
    job = grader.Job(folder / "grader", sheet.one, work, {path: source}, seconds=3.0)
    answers = job.run([])
    assert len(answers) == len(sheet.calls)
    for (body, message), found, right in zip(HOSTILE, answers, sheet.expected):
        said = found
        if not isinstance(found, str):
            said = sheet.difference(dict(kind="values"), found, right)
        wanted = (message,) if isinstance(message, str) else message
        assert any(words in said for words in wanted) and "\x1b" not in said, (body, said)
    rows = sheet.mark(answers, None)
    assert all(row[3] for row in rows if row[2] == "failed") and points(rows) < 100
