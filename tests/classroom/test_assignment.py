"""An assignment from both sides: the handout, right and wrong and hostile submissions, results."""

import csv
import importlib
import inspect
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tracemalloc
import types
import xml.etree.ElementTree as ElementTree
import zipfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import assign
import grade
import nanomodel
from classroom import (
    blank,
    calls,
    clock,
    grader,
    handout,
    hidden,
    larger,
    outputs,
    package,
    promises,
    ready,
    tasks,
)
from data import UserError
from lab import flags, settings
from tests import mutation
from tests.classroom import logps
from tests.classroom.marking import (
    ROOT,
    marks_of,
    points,
    visible_tests,
    without_runs,
    written,
)

BLANK = '    raise NotImplementedError("your turn: loss")'
PLAIN = """    d = (logps - ref_logps).sum(dim=2)
    z = cfg.beta * (d[:, 0] - d[:, 1])
    e = cfg.epsilon
    both = (1 - e) * F.softplus(-z) - e * F.softplus(z)
    return both / (1 - 2 * e)"""
ZEROS = "    return (0 * logps).sum((1, 2)), {}"
needs_pipes = pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """The assignment of rdpo's loss without a short run -> (its folder, what was said)."""
    folder = tmp_path_factory.mktemp("assignment") / "hw"
    said = []
    files = handout.files_of([ROOT / "methods/rdpo.py"], ["loss"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(handout, "measure_runs", without_runs)
        handout.write(files, folder, say=said.append)
    return folder, "\n".join(said)


@pytest.fixture(scope="module")
def sheet(made):
    folder = made[0] / "grader"
    about = json.loads((folder / "assignment.json").read_text())
    return grader.Sheet(folder, about["files"][0])


def student_file(made, body=None):
    """The handout's file, with a body in place of the blank."""
    text = (made[0] / "student/methods/rdpo.py").read_text()
    assert BLANK in text
    return text if body is None else text.replace(BLANK, body)


# ---- the handout


def test_the_handout_has_the_blank_and_nothing_that_gives_it_away(made):
    student, said = made[0] / "student", made[1]
    solution = "losses = -F.logsigmoid(z) - slope * z"
    for path in student.rglob("*"):
        if path.is_file() and path.suffix in (".py", ".md", ".json"):
            assert solution not in path.read_text(), path
    assert sorted(p.name for p in (student / "methods").iterdir()) == ["__init__.py", "rdpo.py"]
    assert not (student / "claims").exists()
    assert "left out" in said and "methods/dpo.py" in said
    assert "the hidden tests tell all of them" in said
    task = (student / "README.md").read_text()
    assert "`methods/rdpo.py`: `loss`" in task and "noisy labels:" in task


@pytest.mark.slow
def test_every_visible_test_of_a_handout_says_your_turn_and_passes_with_the_solution(made):
    student = made[0] / "student"
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    ran = subprocess.run(command, cwd=student, capture_output=True, text=True)
    cases = len(re.findall("your turn: write loss in methods/rdpo.py", ran.stdout))
    assert ran.returncode == 1 and " passed" not in ran.stdout and cases >= 10
    blanked = (student / "methods/rdpo.py").read_text()
    try:
        (student / "methods/rdpo.py").write_text((ROOT / "methods/rdpo.py").read_text())
        ran = subprocess.run(command, cwd=student, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stdout
    finally:
        (student / "methods/rdpo.py").write_text(blanked)


@pytest.mark.slow
def test_what_cannot_be_assigned_is_refused(tmp_path, capsys):
    lines = [
        (["methods/wide_deep.py"], "no loss"),
        (["README.md"], "expected a file in methods/"),
        (["methods/rdpo.py", "--blank", "run"], "no part of the loss"),
        (["methods/rdpo.py", "--blank", "nothing"], "no function nothing"),
        (["99"], "no ready-made assignment 99"),
        ([], "name a method file"),
        (["1", "--blank", "loss"], "leave --blank"),
        (["methods/rdpo.py", "--blank", "loss", "--blank", "loss"], "2 times --blank for 1 files"),
        # two functions of one line: what one blanks, the other shows
        (["methods/rdpo.py", "methods/dpo.py", "--blank", "loss:2", "--blank", "loss:4"], "also"),
    ]
    for arguments, message in lines:
        out = tmp_path / "out"
        assert assign.main([*arguments, "--out", str(out)]) == 2, arguments
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1, said
        assert not out.exists()
    assert assign.main(["methods/rdpo.py", "--out", str(tmp_path)]) == 2
    assert "exists" in capsys.readouterr().err
    assert assign.main(["methods/rdpo.py", "--out", str(tmp_path), "--overwrite"]) == 2
    assert "is no assignment" in capsys.readouterr().err


def test_an_assignment_is_refused_while_a_mutant_passes():
    """At the reference alone, the two log-ratios cannot be told from their difference."""
    file = handout.files_of([ROOT / "methods/rdpo.py"], ["loss"])[0]
    tests = hidden.material("rdpo")
    made, _ = hidden.all_tests(file.module, tests, file.wanted, 0)
    _, (_, ref, batch, cfg) = made[0]
    weak = [("loss", (ref.clone().requires_grad_(), ref, batch, cfg))]
    with pytest.raises(UserError, match="passes the hidden tests"):
        hidden.gate(
            file.module,
            types.SimpleNamespace(CASES=[{}], INPUTS=list, SURVIVORS={}),
            file.wanted,
            weak,
            lambda names: True,
        )


# ---- marks


def test_any_right_formula_has_full_marks(made, sheet):
    assert points(marks_of(sheet, (ROOT / "methods/rdpo.py").read_text())) == 100
    assert points(marks_of(sheet, student_file(made, PLAIN))) == 100  # no metrics, another formula


def test_a_blank_is_not_attempted_and_zeros_earn_nothing(made, sheet):
    rows = marks_of(sheet, student_file(made))
    assert {status for _, _, status, _ in rows} == {"not attempted"} and points(rows) == 0
    for body in (ZEROS, "    return ref_logps.sum((1, 2)) * 0, {}", "    return 0.0"):
        rows = marks_of(sheet, student_file(made, body))
        assert points(rows) <= 10 and "passed" in {status for _, _, status, _ in rows}


@pytest.mark.parametrize(
    "before, after, named",
    [
        (".sum(-1).unbind", ".mean(-1).unbind", "the mean in place of the sum"),
        ("cfg.beta * (chosen - rejected)", "(chosen - rejected)", "beta is missing"),
        ("- slope * z", "- slope * z.detach()", ""),
        ("(chosen - rejected)", "(rejected - chosen)", ""),
        ("(logps - ref_logps)", "(logps - logps.detach())", ""),
    ],
)
def test_a_mistake_is_named(sheet, before, after, named):
    source = (ROOT / "methods/rdpo.py").read_text()
    assert before in source
    rows = marks_of(sheet, source.replace(before, after))
    said = " ".join(message for *_, message in rows)
    assert points(rows) < 100 and ("This equals the solution with a mistake" in said or not named)
    assert named in said


@pytest.mark.slow
def test_every_mutant_has_less_than_full_marks(sheet):
    """Those with full marks change a metric, a precision or a refusal alone."""
    source, full = (ROOT / "methods/rdpo.py").read_text(), []
    for mutant in mutation.mutants(source, ["loss"]):
        names = {"__name__": "methods.rdpo", "_detached": lambda x: x.detach()}
        exec(compile(mutant.source, "rdpo.py", "exec"), names)
        if points(sheet.mark([hidden.answer(names, call) for call in sheet.calls], None)) == 100:
            full.append(mutant.name)
    others = sheet.one["mutants"]["others"]
    assert set(others) <= set(full)
    assert all(name in others or "_detached" in name for name in full)


# ---- parts of a loss, and of the model


@pytest.mark.slow
def test_a_helper_has_the_visible_tests_of_the_loss_that_calls_it(tmp_path, monkeypatch):
    folder, sheet = written(tmp_path, monkeypatch, "methods/fdpo.py", "forward_kl,jensen_shannon")
    source = (ROOT / "methods/fdpo.py").read_text()
    for name, fields in (("forward_kl", {"divergence": "fkl"}), ("jensen_shannon", {})):
        tests = [t for t in sheet.one["tests"] if t["name"].startswith(f"{name}: ") and t["rule"]]
        assert len(tests) >= 8 and all(t["setting"] == fields for t in tests)
    assert points(marks_of(sheet, source)) == 100
    blank = (folder / "student/methods/fdpo.py").read_text()
    assert {row[2] for row in marks_of(sheet, blank)} == {"not attempted"}
    failed, passed, said = visible_tests(folder / "student")
    assert passed == 0 and said.count("your turn: write forward_kl in") >= 9
    assert said.count("your turn: write") == failed
    assert sheet.one["mutants"]["visible"] > 0


@pytest.mark.slow
def test_one_line_of_the_survey_can_be_assigned_alone(tmp_path, monkeypatch):
    folder, sheet = written(tmp_path, monkeypatch, "methods/survey.py", "loss:cdpo")
    blanked = (folder / "student/methods/survey.py").read_text()
    names = {test["name"].split(": ")[0] for test in sheet.one["tests"]}
    assert names == {"loss:cdpo"} and {call[1][3].variant for call in sheet.calls} == {"cdpo"}
    assert {row[2] for row in marks_of(sheet, blanked)} == {"not attempted"}
    for line, right in (
        ("-log_s(z) + epsilon * z", True),
        ("(1 - epsilon) * F.softplus(-z) + epsilon * F.softplus(z)", True),
        ("-log_s(z) - epsilon * z", False),
        ("-log_s(z)", False),
    ):
        got = points(marks_of(sheet, blanked.replace('your_turn("loss:cdpo")', line)))
        assert (got == 100) == right, line
    assert points(marks_of(sheet, blanked.replace('your_turn("loss:cdpo")', "0 * z"))) <= 10


def test_a_call_with_a_model_is_written_and_read_back(tmp_path):
    function, arguments = "GPT.logps", logps.calls(3)["GPT.logps"][0]
    calls.write(tmp_path, "calls", [(function, arguments)])
    (form,), tensors = calls.read(tmp_path, "calls")
    again = calls.unpack(form["arguments"], tensors, vars(nanomodel))
    right = hidden.answer(vars(nanomodel), (function, arguments))
    assert hidden.agree(hidden.answer(vars(nanomodel), (function, again)), right)
    assert len([key for key in right if key.startswith("gradient")]) == len(
        list(arguments[0].parameters())
    )


@pytest.mark.slow
def test_the_log_probs_of_the_model_can_be_assigned(tmp_path, monkeypatch):
    both = "GPT.logps,GPT._token_logps"
    folder, sheet = written(tmp_path, monkeypatch, "nanomodel.py", both)
    blanked = (folder / "student/nanomodel.py").read_text()
    turn = '        raise NotImplementedError("your turn: GPT.logps")'
    assert "F.cross_entropy" not in blanked and turn in blanked
    rows = marks_of(sheet, blanked)
    assert {row[2] for row in rows} == {"not attempted"} and points(rows) == 0
    assert points(marks_of(sheet, (ROOT / "nanomodel.py").read_text())) == 100
    plain = blanked.replace(turn, logps.PLAIN["GPT.logps"])
    assert points(marks_of(sheet, plain)) == 100
    zeros = blanked.replace(turn, "        return self.logits(batch)[..., 0] * 0")
    assert points(marks_of(sheet, zeros)) <= 10
    edits = mutation.mutants(plain, ["GPT.logps"])
    full = [edit.after for edit in edits if points(marks_of(sheet, edit.source)) == 100]
    assert len(edits) > 10 and len(full) == 1
    assert "_detached(batch.target" in full[0]  # tokens are numbers without a gradient
    said = " ".join(row[3] for row in marks_of(sheet, plain.replace(" * batch.mask", "")))
    assert "This equals the solution with a mistake: batch.mask is missing" in said
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    for text, passed in ((blanked, 0), (plain, 4)):
        (folder / "student/nanomodel.py").write_text(text)
        ran = subprocess.run(command, cwd=folder / "student", capture_output=True, text=True)
        assert ("your turn: write GPT.logps in nanomodel.py" in ran.stdout) == (not passed)
        assert (f"{passed} passed" in ran.stdout) == bool(passed), ran.stdout


# ---- short runs


def test_a_short_run_that_tells_nothing_is_not_graded(tmp_path, monkeypatch):
    files = handout.files_of([ROOT / "methods/rdpo.py"], ["loss"])
    (tmp_path / "tree").mkdir()
    for before, graded in ((0.4, True), (0.7, False)):
        said, about = [], {"seed": 0, "files": [{"path": "methods/rdpo.py", "tests": []}]}
        teacher = tmp_path / str(before)
        teacher.mkdir()
        rewards = iter([0.9, 0.8, 1.0, 0.9, 0.9, before])  # of five seeds, and of the base model
        monkeypatch.setattr(grader, "Job", lambda *about: types.SimpleNamespace(run_only=list))
        monkeypatch.setattr(grader, "reward_of", lambda weights, settings: next(rewards))
        ends = {"before": before, "after": 0.9}
        monkeypatch.setattr(handout, "picture", lambda *about: ("expected.png", ends))
        handout.measure_runs(files, about, teacher, said.append)
        one = about["files"][0]
        assert bool(one["run"]) == graded == bool(one["tests"])
        assert ("is not graded" in " ".join(said)) == (not graded)
        one |= dict(functions=["loss"])
        task = ready.readme(about | {"title": "t", "written": []}, files, "", False)
        assert f"about 0.90 in this short run. It begins at {before:.2f}, the reward" in task
        assert ("This run is marked by its reward" in task) == graded
        assert ("This run is not marked" in task) == (not graded) and "expected.png" in task


def test_a_model_of_another_shape_has_an_example_and_no_marked_run(tmp_path, monkeypatch):
    """The student of llava_mod is smaller than the base model, whose weights it does not fit."""
    files = handout.files_of([ROOT / "methods/llava_mod.py"], ["loss"])
    one, said = {"path": "methods/llava_mod.py", "tests": []}, []
    ends = {"before": -3.0, "after": -2.0}
    monkeypatch.setattr(handout, "picture", lambda *about: ("expected.png", ends))
    monkeypatch.delattr(grader, "reward_of")
    handout.measure_runs(files, {"seed": 0, "files": [one]}, tmp_path, said.append)
    assert one["run"] is None and one["tests"] == [] and "no run is marked" in said[0]
    assert one["example"]["after"] == -2.0 and one["example"]["fields"]["dense"] == 60
    one |= dict(functions=["loss"])
    task = ready.readme({"files": [one], "title": "t", "written": []}, files, "", False)
    assert "This run is not marked" in task and "tells little" not in task  # its reward may tell


def test_the_larger_of_two_digits():
    world = larger.World()
    rewards = world.reward(["38=", "83=", "38=", "38=", "44="], ["8", "8", "3", "88", "4"])
    assert rewards.tolist() == [1, 1, 0, 0, 1] and rewards.dtype == torch.float64
    rows, again = (world.demonstrations(500, torch.Generator().manual_seed(1)) for _ in range(2))
    assert rows == again
    right = world.reward([r["prompt"] for r in rows], [r["responses"][0] for r in rows]).mean()
    assert 0.6 < right < 0.75  # the wrong ones are right by chance now and then


# ---- submissions in their own process


HOSTILE = {
    "exit": ("    import os\n    os._exit(0)", "the process ended in the middle of it"),
    "loop": ("    while True:\n        pass", "did not end within 2 seconds"),
    "flood": ("    while True:\n        print('x' * 999)", "did not end within 2 seconds"),
    "nan": ("    return logps.sum((1, 2)) * float('nan'), {}", "NaN or infinite"),
    "shape": ("    return (logps - ref_logps).sum(-1), {}", "expected (5,)"),
    "float32": (PLAIN.replace("both /", "both.float() /"), "torch.float32, expected torch.float64"),
    "text": ("    return 'hello', {}", "holds no number"),
    "memory": ("    return torch.zeros(10**13), {}", "memory"),
    "recursion": ("    return loss(logps, ref_logps, batch, cfg)", "without end"),
    "fork": ("    import os\n    os.fork()\n    return 0.0", "expected (5,)"),
    "imports": ("    from methods.dpo import loss\n    return loss()", "No module named"),
    "control": ("    raise ValueError('\\x1b[31m|<b>')", "ValueError"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", HOSTILE)
def test_a_hostile_submission_ends_in_a_message_and_earns_little(made, sheet, tmp_path, name):
    body, message = HOSTILE[name]
    about = json.loads((made[0] / "grader/assignment.json").read_text())
    submitted = {"methods/rdpo.py": student_file(made, body)}
    rows, _ = grader.grade(made[0] / "grader", about, [sheet], submitted, seconds=2.0)
    said = " ".join(row[-1] for row in rows)
    assert message in said and "\x1b" not in said, said
    if name != "float32":
        assert outputs.total(rows)[0] <= 10


@pytest.mark.slow
def test_a_file_that_cannot_be_imported_or_edits_torch_ends_in_a_message(made, sheet):
    about = json.loads((made[0] / "grader/assignment.json").read_text())
    for text, message in (
        ("def (:\n", "cannot be imported: SyntaxError"),
        ("import sys\nsys.exit(0)\n", "cannot be imported: SystemExit"),
        ("import torch\ntorch.allclose = lambda *a, **k: True\n", "your turn"),
    ):
        submitted = {"methods/rdpo.py": student_file(made) + text}
        rows, _ = grader.grade(made[0] / "grader", about, [sheet], submitted)
        assert message in rows[0][-1] and outputs.total(rows)[0] == 0


@pytest.mark.slow
def test_a_class_is_graded_into_pages_a_table_json_and_xml(made, tmp_path, capsys):
    students = tmp_path / "students"
    for name in ("ann", "bob", "=cleo"):
        (students / name / "tests").mkdir(parents=True)
    (students / "ann/rdpo.py").write_text((ROOT / "methods/rdpo.py").read_text())
    # files that are not listed are not picked up
    for name in ("torch.py", "sitecustomize.py", "conftest.py", "tests/test_assignment.py"):
        (students / "ann" / name).write_text("raise SystemExit('picked up')\n")
    (students / "bob/methods").mkdir()
    (students / "bob/methods/rdpo.py").write_text(student_file(made, ZEROS))
    out = [tmp_path / "one", tmp_path / "two"]
    for folder in out:
        arguments = [str(made[0] / "grader"), str(students), "--out", str(folder)]
        assert grade.main([*arguments, "--jobs", "2"]) == 0
    printed = capsys.readouterr().out
    assert "ann                      100.0 points" in printed
    table = (out[0] / "class.csv").read_text().splitlines()
    assert table[0].startswith("student,points,loss: values")
    assert [line.split(",")[:2] for line in table[1:]] == [
        ["'=cleo", "0.0"],
        ["ann", "100.0"],
        ["bob", "0.0"],
    ]
    result = json.loads((out[0] / "ann.json").read_text())
    assert result["score"] == 100 and {test["visibility"] for test in result["tests"]} == {
        "visible",
        "after_published",
    }
    assert ElementTree.parse(out[0] / "bob.xml").getroot().get("failures") != "0"
    assert "was not handed in" in (out[0] / "=cleo.md").read_text()
    for name in ("ann.md", "bob.md", "ann.xml", "bob.xml", "class.csv"):
        assert (out[0] / name).read_bytes() == (out[1] / name).read_bytes()


@pytest.mark.parametrize("loaded", [True, False])
def test_a_solution_is_read_whether_or_not_its_method_is_loaded(tmp_path, monkeypatch, loaded):
    """mcts_dpo.py names a type in quotes, which a dataclass looks for in the loaded modules."""
    module = importlib.import_module("methods.mcts_dpo")
    monkeypatch.setitem(sys.modules, "methods.mcts_dpo", module)
    if not loaded:
        del sys.modules["methods.mcts_dpo"]
    (tmp_path / "mcts_dpo").mkdir()
    text = (ROOT / "methods/mcts_dpo.py").read_text()
    (tmp_path / "mcts_dpo/solution.py").write_text(text)
    one = dict(name="mcts_dpo", module="methods.mcts_dpo", path="methods/mcts_dpo.py")
    names = grader.solution_of(tmp_path, one)
    assert names["Config"]() == names["Config"]() and names["loss"] is not module.loss
    assert sys.modules.get("methods.mcts_dpo") is (module if loaded else None)


def test_a_grader_of_another_version_is_refused(made, sheet, tmp_path, capsys):
    sheet.check()
    about = json.loads((made[0] / "grader/assignment.json").read_text())
    shutil.copytree(made[0] / "grader", tmp_path / "grader")
    (tmp_path / "ann.py").write_text("")
    arguments = [str(tmp_path / "grader"), str(tmp_path), "--out", str(tmp_path / "out")]
    rule = next(test for test in about["files"][0]["tests"] if test["rule"])
    for change in (dict(rule="mean"), dict(rule="no such rule")):
        rule |= change
        (tmp_path / "grader/assignment.json").write_text(json.dumps(about))
        assert grade.main(arguments) == 2
        said = capsys.readouterr().err
        assert "with this version" in said and rule["name"] in said and said.count("\n") == 1
        assert "damaged" not in said


@pytest.mark.parametrize(
    "name, content",
    [
        ("assignment.json", b"{"),
        ("assignment.json", b"[]"),
        ("assignment.json", b'{"files": 5}'),
        ("assignment.json", b'{"files": [{"path": "methods/rdpo.py"}]}'),
        ("assignment.json", b"\xff\xfe"),
        ("*/mistakes.safetensors", b"\x00" * 40),
        ("*/mistakes.safetensors", None),
        ("*/calls.*", None),
        ("*/calls.*", b""),
        ("*/solution.py", "folder"),
        ("*/solution.py", "link"),
        pytest.param("*/calls.json", "pipe", marks=needs_pipes),
        pytest.param("*/mistakes.safetensors", "pipe", marks=needs_pipes),
        pytest.param("tree/methods/rdpo.py", "pipe", marks=needs_pipes),
    ],
)
def test_a_damaged_grader_is_refused_in_one_line(made, tmp_path, capsys, name, content):
    folder = tmp_path / "grader"
    shutil.copytree(made[0] / "grader", folder)
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ann.py").write_text("")
    places = list(folder.glob(name))
    assert places
    for place in places:
        place.unlink()
        if isinstance(content, bytes):
            place.write_bytes(content)
        elif content:
            special(place, content)
    arguments = [str(folder), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert grade.main(arguments) == 2 and not (tmp_path / "out").exists()
    said = capsys.readouterr().err
    assert "write the assignment again" in said and said.count("\n") == 1


def special(path, kind):
    """Put something at a path that is no file: a folder, a pipe, or a link that leads nowhere."""
    makers = dict(folder=Path.mkdir, pipe=os.mkfifo, link=lambda path: path.symlink_to("nowhere"))
    makers[kind](path)


def test_two_lines_of_one_function_can_be_blanked():
    """Each is tested although the first one hides the second where both are blank."""
    module = importlib.import_module("methods.dpo")
    wanted = blank.targets("loss:2,loss:4")
    tests = hidden.material("dpo")
    made, found = hidden.all_tests(module, tests, wanted, 0)
    assert {test.name.split(": ")[0] for test in found} == {"loss:2", "loss:4"}
    assert all(test.calls and max(test.calls) < len(made) for test in found)


def test_lines_to_mark_by_hand_are_added_and_kept(tmp_path):
    test = dict(name="question", points=5)
    rows = [(None, test, 0, outputs.BY_HAND, "")]
    assert outputs.write_by_hand(tmp_path, {"ann": rows}) == 1
    path = tmp_path / "by_hand.csv"
    path.write_text("\ufeff" + path.read_text().replace("5,", "5,4"), encoding="utf-8")
    assert outputs.write_by_hand(tmp_path, {"ann": rows, "bob": rows}) == 1
    assert outputs.write_by_hand(tmp_path, {"ann": rows, "bob": rows}) == 0
    assert outputs.read_by_hand(path) == {("ann", "question", 5.0): 4.0}
    assert "bob,question,5," in path.read_text()


@needs_pipes
@pytest.mark.parametrize("kind", ["folder", "pipe", "link"])
def test_results_of_a_second_grading_are_written_or_one_line(tmp_path, capsys, kind, monkeypatch):
    """What stands in the place of a result does not block: it is replaced, or it is one line."""
    file = dict(path="a.py", module="a", tests=[])
    test = dict(name="by hand: a plot", points=5, visible=True)
    rows = [(file, test, 0, outputs.BY_HAND, "")]
    one = {"files": [file], "title": "t"}
    monkeypatch.setattr(grader, "assignment", lambda folder: (one, []))
    monkeypatch.setattr(grader, "grade", lambda *about: (rows, 1.0))
    (tmp_path / "assignment.json").write_text("")
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ann.py").write_text("")
    arguments = [str(tmp_path), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    for name in ("ann.md", "ann.json", "ann.xml", "class.csv", "by_hand.csv"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        (tmp_path / "out").mkdir()
        special(tmp_path / "out" / name, kind)
        status = grade.main(arguments)
        said = capsys.readouterr().err
        refused = kind == "folder" or name == "by_hand.csv"
        assert status == 2 * refused and said.count("\n") == refused, said
        assert (name in said) == refused
        assert refused or (tmp_path / "out" / name).read_text()
    for name in ("folder", "pipe", "link"):
        special(tmp_path / name, name)
        assert grade.main([*arguments, "--written", str(tmp_path / name)]) == 2
        said = capsys.readouterr().err
        assert "--written" in said and "it cannot be read" in said and said.count("\n") == 1


def test_a_table_that_a_spreadsheet_spoiled_is_one_line(tmp_path):
    path, rows = tmp_path / "by_hand.csv", [(None, dict(name="q", points=5), 0, "by hand", "")]
    for content in (b"student,test,most,points\nJ\xf6rg,q,5,4\n", b'a,"' + b"x" * 200_000):
        path.write_bytes(content)
        for read in (
            outputs.read_by_hand,
            lambda path: outputs.write_by_hand(tmp_path, {"a": rows}),
        ):
            with pytest.raises(UserError, match="cannot be read as CSV in UTF-8"):
                read(path)
        assert path.read_bytes() == content
    for content in ("", "student;test;most;points\nann;q;5;4\n"):
        path.write_text(content)
        with pytest.raises(UserError, match="expected the columns student,test,most,points"):
            outputs.read_by_hand(path)
    path.write_text("student,test,most,points\nann,q,5,4\nann,q,5,3\n")
    with pytest.raises(UserError, match="line 3: ann, q has points already"):
        outputs.read_by_hand(path)


def test_points_by_hand_that_are_not_used_are_said():
    test = dict(name="q", points=5)
    graded = {
        "ann": [(None, test, 3, "marked", "")],
        "bob": [(None, test, 0, "by hand", "")],
        "cleo": [(None, test, 5, "passed", "")],  # on a card, say
    }
    assert outputs.unused({("ann", "q", 5.0): 3.0}, graded) == ""
    said = outputs.unused({("ann", "q", 5.0): 3.0, ("anne", "q", 5.0): 4.0}, graded)
    assert said.startswith("not used: the points of `anne, q` in --written") and "\n" not in said
    said = outputs.unused({("cleo", "q", 5.0): 4.0, ("bob", "p", 5.0): 4.0}, graded)
    assert "`cleo, q` (and of 1 more lines)" in said
    stale = {("bob", "q", 8.0): 7.0}  # the file of an assignment in which q had 8 points
    assert outputs.marked_by_hand(graded["bob"], "bob", stale) == graded["bob"]
    assert outputs.unused(stale, graded).endswith(
        "no submission here has such a test of 8 points to mark by hand"
    )


def test_a_folder_that_cannot_be_written_is_one_line(made, tmp_path, capsys):
    (tmp_path / "in").mkdir()
    (tmp_path / "in/ann.py").write_text("")
    (tmp_path / "out").write_text("")
    arguments = [str(made[0] / "grader"), str(tmp_path / "in"), "--out", str(tmp_path / "out")]
    assert grade.main(arguments) == 2
    assert capsys.readouterr().err == f"error: {tmp_path}/out: File exists\n"


def test_what_cannot_be_graded_is_refused(made, tmp_path, capsys):
    empty = tmp_path / "empty"
    empty.mkdir()
    folder = str(made[0] / "grader")
    for arguments, message in (
        ([str(tmp_path), str(empty)], "no assignment.json"),
        ([folder, str(empty)], "no submissions"),
        ([folder, str(tmp_path / "none")], "no such folder"),
        ([folder, str(empty), "--jobs", "0"], "positive"),
    ):
        assert grade.main([*arguments, "--out", str(tmp_path / "out")]) == 2
        said = capsys.readouterr().err
        assert message in said and said.count("\n") == 1


def many_folders(place, count=1200):
    """Make a folder in a folder, and so on, deeper than a path can name or a function can call."""
    before = os.getcwd()
    try:
        os.chdir(place)
        for _ in range(count):
            os.mkdir("d")
            os.chdir("d")
    finally:  # the next call in this process begins at the same place
        os.chdir(before)


def remove(folder):
    """Remove a folder with many folders, which shutil.rmtree cannot."""
    subprocess.run(["rm", "-rf", str(folder)], check=True)


@needs_pipes
def test_a_submission_that_cannot_be_read_costs_the_others_nothing(tmp_path, monkeypatch):
    """As root, nothing is unreadable."""
    (tmp_path / "a.py").write_text("")
    (tmp_path / "b").mkdir()
    (tmp_path / "c").mkdir()
    about = {"files": [{"path": "methods/rdpo.py"}]}
    plain, regular = type(tmp_path).read_text, grader.regular

    def read_text(path, **options):
        if path.name == "a.py":
            raise PermissionError(13, "Permission denied", str(path))
        return plain(path, **options)

    def locked(path):
        if "b" in path.parts:
            raise PermissionError(13, "Permission denied", str(path))
        return regular(path)

    monkeypatch.setattr(type(tmp_path), "read_text", read_text)
    monkeypatch.setattr(grader, "regular", locked)
    found = grader.submissions(tmp_path, about)
    assert {name: str(each["methods/rdpo.py"]) for name, each in found.items()} == {
        "a": "the file cannot be read: Permission denied",
        "b": "the folder cannot be read: Permission denied",
        "c": "rdpo.py was not handed in",
    }


@needs_pipes
def test_a_submission_that_is_no_source_is_said(tmp_path):
    students, about = tmp_path / "students", {"files": [{"path": "methods/rdpo.py"}]}
    students.mkdir()
    (students / "a.py").write_bytes(b"\xff\xfe")
    (students / "b.py").write_text("x" * (grader.LARGEST + 1))
    (students / "c.py").symlink_to(ROOT / "methods/rdpo.py")
    (students / "d").symlink_to(ROOT)
    (students / "e").mkdir()
    (students / "e/methods").symlink_to(ROOT / "methods")  # the folder with the solution
    (students / "f.py").symlink_to("nowhere")
    os.mkfifo(students / "g.py")
    (students / "h").mkdir()
    os.mkfifo(students / "h/rdpo.py")
    (students / "i").mkdir()
    many_folders(students / "i")
    (students / "notes.txt").write_text("")
    found = grader.submissions(students, about)
    remove(students / "i")
    said = {name: str(each["methods/rdpo.py"]).split(",")[0] for name, each in found.items()}
    assert said.pop("i").startswith(("the folder cannot be read: ", "rdpo.py was not handed in"))
    assert said == {
        "a": "the file is not text in UTF-8",
        "b": "the file is larger than 1024 KB",
        "c": "a link was handed in",
        "d": "a link was handed in",
        "e": "rdpo.py was not handed in",
        "f": "a link was handed in",
        "g": "a pipe or a device was handed in",
        "h": "rdpo.py was not handed in",
    }
    (students / "a").mkdir()
    with pytest.raises(UserError, match="two submissions of a"):
        grader.submissions(students, about)


def test_a_name_that_is_no_text_does_not_end_the_grading(tmp_path):
    try:
        (tmp_path / os.fsdecode(b"\xff.py")).write_text("")
    except OSError:
        pytest.skip("this file system has names in UTF-8 alone")
    (name,) = grader.submissions(tmp_path, {"files": [{"path": "a.py"}]})
    assert name == "?"


@needs_pipes
def test_an_answer_that_is_no_file_of_tensors_is_said(tmp_path):
    """A submission could write answers itself."""
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    (tmp_path / "folder").mkdir()
    (tmp_path / "text").write_text("hello")
    save_file({"error": torch.full((2, 2), 300.0)}, tmp_path / "error")
    for name in ("pipe", "link", "folder"):
        assert grader.read_answer(tmp_path / name) == "its answer is no file"
    assert grader.read_answer(tmp_path / "text") == "its answer cannot be read"
    assert isinstance(grader.read_answer(tmp_path / "error"), str)
    save_file({"error": torch.full((2**22,), 65, dtype=torch.uint8)}, tmp_path / "error")
    tracemalloc.start()
    assert grader.read_answer(tmp_path / "error").startswith("AAAA")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**20  # a text of 256 MB does not fill the memory of the grader


def empty_job(work, child):
    """A Job in a folder of its own whose process runs another program than child.py."""
    job = object.__new__(grader.Job)
    job.work, job.seconds, job.user, job.count = work, 20.0, None, 100
    (work / "answers").mkdir()
    job.renew = lambda: (work / "child.py").write_text(child)
    return job


def test_answers_cannot_fill_the_disk(tmp_path, monkeypatch):
    monkeypatch.setattr(grader, "WRITTEN", 3000)
    job = empty_job(
        tmp_path,
        "import pathlib, time\n"
        "for i in range(100):\n"
        "    pathlib.Path(f'answers/t-{i}.safetensors').write_bytes(bytes(1000))\n"
        "    time.sleep(0.1)\n",
    )
    assert "the answers before it have more than" in job.process({}, "t", 0, 100)


def test_another_user_is_given_no_file_outside(tmp_path, monkeypatch):
    """A submission may have made a hard link to a file of the caller."""
    pwd = pytest.importorskip("pwd")
    (tmp_path / "work").mkdir()
    (tmp_path / "outside").write_text("")
    (tmp_path / "work/link").hardlink_to(tmp_path / "outside")
    job = empty_job(tmp_path / "work", "")
    job.user = pwd.getpwuid(os.getuid()).pw_name
    given = []
    monkeypatch.setattr(os, "chown", lambda path, *_, **__: given.append(path.name))
    monkeypatch.setattr(subprocess, "Popen", refused_process)
    with pytest.raises(UserError, match="may not run"):
        job.process({}, "t", 0, 1)
    assert sorted(given) == ["answers", "child.py", "work"]


def refused_process(*arguments, **options):
    raise PermissionError(13, "Permission denied")


def test_tensors_that_cannot_be_compared_earn_nothing(sheet):
    losses = torch.zeros(5)
    for value in (
        {},
        {"value0": losses},
        {"value0": losses.to(torch.float8_e4m3fn), "touched": torch.tensor(False)},
        {"value0": losses.to(torch.complex64), "gradient0": losses, "touched": losses},
        {"value0": losses.to(torch.uint8)[None], "gradient0": losses[:0], "touched": losses > 0},
    ):
        rows = sheet.mark([value] * len(sheet.calls), None)
        assert points(rows) == 0 and all(row[3] for row in rows if row[2] == "failed")
        rows = sheet.mark([dict(value) for _ in sheet.calls], value)
        assert {row[2] for row in rows if row[0]["kind"] == "values"} == {"failed"}


@pytest.mark.slow
def test_a_short_run_is_measured_and_graded(tmp_path, capsys):
    out = tmp_path / "hw"
    assert assign.main(["methods/dpo.py", "--out", str(out), "--gradescope"]) == 0
    about = json.loads((out / "grader/assignment.json").read_text())
    assert about["files"][0]["run"]["low"] > about["files"][0]["example"]["before"]
    task = (out / "student/README.md").read_text()
    assert "ends at a true reward of about" in task and "expected_dpo.png" in task
    assert (out / "student/expected_dpo.png").read_bytes()[:4] == b"\x89PNG"
    students = tmp_path / "students"
    students.mkdir()
    source = (ROOT / "methods/dpo.py").read_text()
    (students / "right.py").write_text(source)
    (students / "sign.py").write_text(source.replace("-F.logsigmoid(z)", "-F.logsigmoid(-z)"))
    arguments = [str(out / "grader"), str(students), "--out", str(tmp_path / "out")]
    assert grade.main(arguments) == 0
    rows = (tmp_path / "out/class.csv").read_text().splitlines()
    assert rows[1].startswith("right,100.0,") and rows[1].endswith(",10")
    assert rows[2].endswith(",0")
    with zipfile.ZipFile(out / "autograder.zip") as archive:
        names = archive.namelist()
        assert {"setup.sh", "run_autograder", "grader/assignment.json"} <= set(names)
        assert {"project/grade.py", "project/classroom/child.py"} <= set(names)
        for name in ("setup.sh", "run_autograder"):
            assert archive.getinfo(name).external_attr >> 16 == 0o755
    assert package.write(out) == out / "autograder.zip"


def anyone_can_run_python():
    """Whether another user can run this interpreter, and this process may become one."""
    try:
        return subprocess.run([sys.executable, "-c", ""], user="nobody").returncode == 0
    except (PermissionError, ValueError, OSError):
        return False


def test_a_user_who_cannot_run_submissions_is_refused(made, tmp_path, capsys, monkeypatch):
    (tmp_path / "ann.py").write_text("")
    arguments = [str(made[0] / "grader"), str(tmp_path), "--out", str(tmp_path / "out")]
    assert grade.main([*arguments, "--user", "no-such-user"]) == 2
    assert "--user no-such-user:" in capsys.readouterr().err

    monkeypatch.setattr(shutil, "chown", lambda path, user: None)
    monkeypatch.setattr(subprocess, "Popen", refused_process)
    assert grade.main([*arguments, "--user", "nobody"]) == 2
    said = capsys.readouterr().err
    assert "this user may not run" in said and said.count("\n") == 1


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("bash") is None, reason="Gradescope's scripts are for bash")
def test_the_zip_for_gradescope_grades_a_submission(made, tmp_path):
    with zipfile.ZipFile(package.write(made[0])) as archive:
        archive.extractall(tmp_path / "source")
    for script in ("setup.sh", "run_autograder"):
        subprocess.run(["bash", "-n", str(tmp_path / "source" / script)], check=True)
    for folder in ("submission", "results"):
        (tmp_path / folder).mkdir()
    source = (ROOT / "methods/rdpo.py").read_text()
    (tmp_path / "submission/rdpo.py").write_text(
        source.replace("logsigmoid(z)", "logsigmoid(z.detach())")
    )
    user = "nobody" if anyone_can_run_python() else ""
    about = dict(AUTOGRADER_ROOT=str(tmp_path), AUTOGRADER_PYTHON=sys.executable)
    about |= dict(AUTOGRADER_USER=user)
    command = ["bash", str(tmp_path / "source/run_autograder")]
    ran = subprocess.run(command, env=os.environ | about, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr
    result = json.loads((tmp_path / "results/results.json").read_text())
    assert 0 < result["score"] < 75 and "no gradient passes through" in json.dumps(result)


RUINS = """
def ruin():
    \"\"\"Put something else in place of what the grader reads or writes, and end the process.\"\"\"
    import os, shutil
    from pathlib import Path

    work = Path("..").resolve()
    done = work / "tree/done"
    count = len(done.read_text()) if done.exists() else 0
    done.write_text("x" * (count + 1))
    if count == 0:
        os.mkfifo(work / "job.json")  # the job was a file once
    for name in ("calls.json", "calls.py", "child.py") if count < 3 else ():
        (work / name).unlink(missing_ok=True)
        if count == 0:
            os.mkfifo(work / name)
        elif count == 1:
            (work / name).mkdir()
        else:
            (work / name).symlink_to("nowhere")
    if count < 3:
        os._exit(0)
"""


@pytest.mark.slow
@needs_pipes
def test_a_submission_cannot_block_the_grader_or_its_next_process(made, sheet, tmp_path):
    """A pipe that nobody reads, a folder or a link in the place of a file; one at each start."""
    source = student_file(made, "    ruin()\n" + PLAIN) + RUINS
    job = grader.Job(made[0] / "grader", sheet.one, tmp_path, {"methods/rdpo.py": source})
    start = time.monotonic()
    answers = job.run([])
    assert time.monotonic() - start < 80
    assert ["ended in the middle" in str(answer) for answer in answers[:3]] == [True] * 3
    assert points([row for row in sheet.mark(answers, None) if row[2] == "passed"]) == 100
    assert not any(isinstance(answer, str) for answer in answers[3:])


@pytest.mark.slow
def test_a_submission_that_leaves_folders_in_folders_is_graded(made, sheet, tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    about = json.loads((made[0] / "grader/assignment.json").read_text())
    deep = inspect.getsource(many_folders)
    source = (
        student_file(made, "    many_folders('..')\n    os._exit(0)") + "\n\nimport os\n\n\n" + deep
    )
    rows, _ = grader.grade(made[0] / "grader", about, [sheet], {"methods/rdpo.py": source})
    assert outputs.total(rows)[0] == 0 and "ended in the middle" in rows[0][-1]
    assert not (tmp_path.parent / "d").exists()
    remove(tmp_path)


# ---- a world of one's own, a fast step, and what is marked by hand


def judged(kind, found):
    """The rows of a task for {call: answer}, where an answer is a list of tensors or an error."""
    asked, _ = promises.asked(kind, 7)
    tests = [
        dict(name=each.name, points=each.points, visible=True) for each in promises.KINDS[kind][0]
    ]
    one = dict(kind=kind, seed=7, tests=tests, asked=asked)
    answers = []
    for call in asked:
        answer = found[call] if call in found else found[call[0]]
        if isinstance(answer, tuple):
            answer = {f"value{i}": x for i, x in enumerate(calls.flat(answer))}
        answers.append(answer)
    return grader.TaskSheet(None, one).mark(answers)


def right_world():
    """Answers that keep all promises of a world."""
    text = "A prompt is a number. " * 12 + "The reward cannot be gamed."
    rewards = torch.arange(4, dtype=torch.float64)
    return {
        "prompts": (8, torch.tensor([1, 2])),
        ("prompts", 8, 8): (8, torch.tensor([3, 4])),
        "demonstrations": (8, torch.tensor([5])),
        "rewards": (rewards, rewards, rewards, rewards, 4),
        "description": (torch.tensor(list(text.encode()), dtype=torch.uint8),),
        "trained": (0.0, 0.5, 1.0, True, torch.tensor([0.3])),
    }


def test_a_world_that_keeps_its_promises_has_full_marks():
    rows = judged("world", right_world())
    assert {row[2] for row in rows} == {"passed"} and points(rows) == 100


NUMBERS = torch.arange(4, dtype=torch.float64)
BROKEN = {
    "one prompt too few": ({"prompts": (7, torch.tensor([1, 2]))}, "returns 7 prompts"),
    "global random numbers": (
        {("prompts", 8, 7, 1): (8, torch.tensor([1, 9]))},
        "the same generator gives other data",
    ),
    "no random numbers": ({("prompts", 8, 8): (8, torch.tensor([1, 2]))}, "gives the same data"),
    "float32": ({"rewards": (*[NUMBERS.float()] * 4, 4)}, "torch.float32"),
    "a column": ({"rewards": (*[NUMBERS[:, None]] * 4, 4)}, "of shape (4, 1)"),
    "NaN": ({"rewards": (*[NUMBERS / 0] * 4, 4)}, "NaN or infinite"),
    "noise": ({"rewards": (NUMBERS, NUMBERS + 1, NUMBERS, NUMBERS, 4)}, "the second time"),
    "place": ({"rewards": (NUMBERS, NUMBERS, NUMBERS + 1, NUMBERS, 4)}, "depends on its place"),
    "others": ({"rewards": (NUMBERS, NUMBERS, NUMBERS, NUMBERS - 1, 4)}, "on the others"),
    "short docstring": ({"description": (torch.tensor([65], dtype=torch.uint8),)}, "docstring"),
    "falls": ({"trained": (0.5, 0.4, 1.0, True, torch.tensor([0.3]))}, "should rise"),
    "look": ({"trained": (0.0, 0.5, 1.0, True, torch.tensor([1.0]).log() / 0)}, "finite numbers"),
    "explain": ({"trained": (0.0, 0.5, 1.0, False, torch.tensor([0.3]))}, "a text"),
    "error": ({"rewards": "TypeError: reward returns a list"}, "returns a list"),
}


def test_rewards_may_differ_by_their_rounding():
    """A model that scores responses one by one rounds otherwise than in a batch."""
    one = {"rewards": (NUMBERS, NUMBERS, NUMBERS * (1 + 1e-6), NUMBERS * (1 - 1e-6), 4)}
    assert points(judged("world", right_world() | one)) == 100
    one = {"rewards": (NUMBERS, NUMBERS, NUMBERS, NUMBERS * (1 + 1e-4), 4)}
    assert 80 < points(judged("world", right_world() | one)) < 90


def test_a_table_with_one_prompt_needs_no_demonstrations():
    none = (8, torch.zeros(0, dtype=torch.uint8))
    one = {("prompts", 8, 8): (8, torch.tensor([1, 2])), "demonstrations": none}
    assert points(judged("world", right_world() | one)) == 100


@pytest.mark.parametrize("name", BROKEN)
def test_a_world_that_breaks_a_promise_is_told_which(name):
    changed, message = BROKEN[name]
    rows = judged("world", right_world() | changed)
    said = " ".join(row[3] for row in rows)
    assert message in said and 0 < points(rows) < 100


def test_a_world_with_one_reward_for_all_earns_nothing():
    flat = (0.0, 0.0, 0.0, True, torch.tensor([0.3]))
    rows = judged("world", right_world() | {"trained": flat})
    assert points(rows) == 0 and "nothing to learn" in " ".join(row[3] for row in rows)
    turn = {name: "your turn: model" for name in right_world()}
    rows = judged("world", turn)
    assert {row[2] for row in rows} == {"not attempted"} and points(rows) == 0


@pytest.fixture
def own_world(tmp_path, monkeypatch):
    """A folder whose my_world.py is the example of the assignment."""
    monkeypatch.chdir(tmp_path)
    text = (ROOT / tasks.FILES["world"][2]).read_text()
    (tmp_path / "my_world.py").write_text(text)
    monkeypatch.delitem(sys.modules, "my_world", raising=False)
    monkeypatch.setattr(settings, "loaded", {})
    return tmp_path


@pytest.mark.slow
def test_the_example_of_a_world_keeps_its_promises(own_world):
    for promise, wrong, judged in promises.here("world", 3):
        assert wrong is None and judged, (promise.name, wrong)


def step_answers(seconds, on_card, losses=None, moved=None):
    """The answers of a step whose losses are right, or shifted."""
    right = torch.tensor([0.7, 0.6])
    way = torch.tensor([1.0, 2.0, 3.0])
    seconds = torch.tensor([[1.0, seconds]] * 5, dtype=torch.float64)
    losses = right if losses is None else losses
    moved = way if moved is None else moved
    both = torch.stack([right, losses], 1).double()
    return (
        right,
        way,
        {
            "trace": (losses, moved),
            "race": (seconds, both, torch.stack([way, moved]), on_card),
        },
    )


def test_a_fast_step_is_marked_on_a_card_and_by_hand_on_a_cpu(monkeypatch):
    right, way, _ = step_answers(1.0, True)
    monkeypatch.setattr(clock, "trace", lambda name, seed: (right, way))
    marks = [points(judged("step", step_answers(s, True)[2])) for s in (1.0, 0.85, 0.6, 0.4)]
    assert marks == [10, 40, 70, 100]  # the shipped step has the points of the right result alone
    rows = judged("step", step_answers(0.5, False)[2])
    assert points(rows) == 10 and {row[2] for row in rows[1:]} == {"by hand"}
    assert "2.00 times as fast as the shipped step on a CPU" in rows[1][3]
    for wrong in (dict(losses=right + 0.01), dict(moved=way * 1.01), dict(moved=way * 0)):
        rows = judged("step", step_answers(0.1, True, **wrong)[2])
        assert points(rows) == 0 and {row[2] for row in rows} == {"failed"}


@pytest.mark.slow
def test_the_shipped_step_equals_itself(monkeypatch):
    monkeypatch.setattr(clock, "ROUNDS", 4)
    monkeypatch.setattr(clock, "WARM", 1)
    losses, moved = clock.trace(clock.SHIPPED, 3)
    assert len(losses) == 4 and losses.isfinite().all() and moved.norm() > 0.05
    seconds, both, ways, on_card = clock.race(clock.SHIPPED, 3)
    assert seconds.shape == both.shape == (4, 2) and (seconds > 0).all()
    assert promises.unlike(both[:, 1], ways[1], both[:, 0], ways[0]) is None
    assert on_card == torch.cuda.is_available()


def test_right_steps_are_right_when_several_are_marked_at_a_time():
    """The weights of the shipped step come from the global random numbers, as with --jobs 4."""
    found = dict(trace=clock.trace(clock.SHIPPED, 7), race="no race")
    with ThreadPoolExecutor(4) as pool:
        marked = list(pool.map(lambda _: judged("step", found), range(8)))
    assert [rows[0][3] for rows in marked] == [""] * 8


@pytest.mark.slow
@pytest.mark.parametrize("number", ready.TASKS)
def test_a_task_without_a_blank_is_written_and_graded(number, tmp_path, capsys):
    out, students = tmp_path / "hw", tmp_path / "students"
    students.mkdir()
    assert assign.main([str(number), "--out", str(out)]) == 0
    path, _, example = tasks.FILES[ready.TASKS[number].kind]
    (students / "right.py").write_text((ROOT / example).read_text())
    (students / "blank.py").write_text((out / "student" / path).read_text())
    (students / "broken.py").write_text("raise ValueError('no')\n")
    assert grade.main([str(out / "grader"), str(students), "--out", str(tmp_path / "out")]) == 0
    table = (tmp_path / "out/class.csv").read_text().splitlines()
    got = {line.split(",")[0]: float(line.split(",")[1]) for line in table[1:]}
    if number == 9:
        assert got == dict(blank=0, broken=0, right=85)
    else:  # the shipped step is right and as fast as itself
        assert got["broken"] == 0 and got["right"] == got["blank"] == 10
    assert (tmp_path / "out/by_hand.csv").exists()
    task = (out / "student/README.md").read_text()
    assert f"Hand in `{path}`" in task


def test_equal_tests_of_two_files_have_different_names(made, tmp_path):
    one = json.loads((made[0] / "grader/assignment.json").read_text())["files"][0]
    names = [test["name"] for test in one["tests"]]
    assert len(set(names)) == len(names)
    test = dict(name="loss: values", points=25, visible=False)
    files = [dict(path=f"methods/{name}.py", module=f"methods.{name}") for name in ("dpo", "rdpo")]
    rows = [(file, test, 25, "passed", "") for file in files]
    rows.append((files[0], dict(name="by hand: a plot", points=5, visible=True), 0, "by hand", ""))
    titles = ["methods/dpo.py, loss: values", "methods/rdpo.py, loss: values", "by hand: a plot"]
    assert outputs.titles(rows) == titles and outputs.titles(rows[:1]) == ["loss: values"]
    assert [test["name"] for test in outputs.gradescope(rows, 1.0)["tests"]] == titles
    outputs.write_class(tmp_path, {"ann": rows})
    with open(tmp_path / "class.csv", newline="") as file:
        assert next(csv.reader(file)) == ["student", "points", *titles]


def test_what_a_teacher_marks_is_added(tmp_path):
    test = dict(name="by hand: the plot", points=20, visible=True)
    file = dict(path="a.py", module="a", tests=[])
    about = {"title": "t", "files": [file]}
    rows = [(file, dict(name="values", points=60, visible=False), 60, "passed", "")]
    rows += [(file, test, 0, "by hand", "the teacher marks it")]
    assert outputs.total(rows)[0] == 80  # what a person marks is a share of 100
    shown = outputs.page("=ann", about, rows)
    assert "Up to 20.0 more are marked by hand" in shown
    assert "Points by hand are points of the 100" in shown
    assert "skipped" in outputs.junit("=ann", rows) and 'failures="0"' in outputs.junit("a", rows)
    outputs.write_class(tmp_path, {"=ann": rows})
    assert (tmp_path / "class.csv").read_text().splitlines()[1] == "'=ann,80.0,60,"
    assert outputs.write_by_hand(tmp_path, {"=ann": rows})
    file = tmp_path / "by_hand.csv"
    empty = file.read_text()
    assert empty.splitlines()[1] == "'=ann,by hand: the plot,20,"
    assert outputs.read_by_hand(file) == {}
    file.write_text(empty.replace("20,", "20,15"))
    assert not outputs.write_by_hand(tmp_path, {"=ann": rows}) and ",20,15" in file.read_text()
    done = outputs.marked_by_hand(rows, "=ann", outputs.read_by_hand(file))
    assert outputs.total(done)[0] == 95 and done[1][3] == "marked"
    assert outputs.gradescope(done, 1.0)["tests"][1]["status"] == "passed"
    for text, message in (
        (empty.replace("20,", "20,21"), "from 0 to 20"),
        (empty.replace("20,", "20,x"), "from 0 to 20"),
        ("student,points\na,1\n", "expected the columns"),
    ):
        file.write_text(text)
        with pytest.raises(UserError, match=message):
            outputs.read_by_hand(file)
    with pytest.raises(UserError, match="cannot be read"):
        outputs.read_by_hand(tmp_path / "none.csv")


def test_the_task_sheet_states_the_points_of_what_is_marked_by_hand():
    rows = [dict(name=name, points=points) for name, points in (("values", 60), ("order", 20))]
    files = [dict(path="a.py", tests=rows), dict(path="b.py", tests=rows[:1])]
    written = ready.by_hand((("the plot", 30),))
    assert ready.marked(dict(files=files, written=written)) == [
        "- tests of `a.py`: 40.0 of 100 points",
        "- tests of `b.py`: 30.0 of 100 points",
        "- by hand: the plot: 30 of 100 points",
    ]
    assert "Nothing is marked by hand" in ready.marked(dict(files=files, written=[]))[-1]


@pytest.mark.parametrize("item", [*ready.READY.values(), *ready.TASKS.values()])
def test_what_is_marked_by_hand_leaves_points_for_the_tests(item):
    assert 0 <= sum(points for _, points in item.written) <= 50


# ---- every ready-made assignment


@pytest.mark.mutants
@pytest.mark.parametrize("number", ready.READY)
def test_every_sheet_of_a_ready_made_assignment_can_be_written(number, tmp_path, monkeypatch):
    monkeypatch.setattr(handout, "measure_runs", without_runs)
    for turn, option in enumerate(ready.READY[number].options):
        paths = [ROOT / ready.path_of(name) for name, _ in option]
        files = handout.files_of(paths, [text for _, text in option])
        handout.write(files, tmp_path / f"hw{turn}", say=lambda line: None)


@pytest.mark.parametrize("number", ready.READY)
def test_the_commands_of_a_task_sheet_can_be_run(number):
    for seed in range(8):
        text = ready.chosen(number, seed)[2]
        shell = dict(re.findall(r"^    ([A-Z])=(\S+)$", text, re.MULTILINE))
        for line in re.findall(r"^    python train.py (.*)$", text, re.MULTILINE):
            words = [shell[word[1:]] if word[0] == "$" else word for word in line.split()]
            assert flags.combinations(*flags.read_flags(words)), line


def test_another_seed_has_other_constants_and_another_sheet(capsys):
    sheets = {ready.chosen(3, seed)[1] for seed in range(20)}
    assert len(sheets) == len(ready.READY[3].options)
    assert len({ready.chosen(1, seed)[2] for seed in range(20)}) == 3
    assert assign.main(["--list"]) == 0
    assert all(item.title in capsys.readouterr().out for item in [ready.READY[1]])
