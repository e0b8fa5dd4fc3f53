"""Write an assignment: the student's folder and the grader's, out of method files.

OUT/student/   the project with the blanked files and without its other methods, visible tests,
               the task; a copy goes to every student
OUT/grader/    the solution, hidden calls, the answers of the mutants; stays with the teacher
"""

import dataclasses
import importlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import torch
from safetensors.torch import save_file

from classroom import blank, calls, grader, hidden, properties, ready, visible
from data import UserError

ROOT = Path(__file__).parents[1]
SHIPPED = ("LICENSE", "requirements.txt", "data.py", "diffusion.py", "nanomodel.py", "train.py")
PACKAGES = ("lab", "toy", "methods", "classroom")
CLASSROOM = ("__init__", "turn", "calls", "larger", "properties", "visible")
# what a short run sets itself
SIZES = ("world", "steps", "batch_size", "prompts", "lr", "eval_every", "base_steps")
SEEDS = 5  # runs of the solution
SPREAD = 3.0  # deviations below their mean that a submission's run may end
LARGER = "classroom/larger.py"
# short runs by world, long enough that zeros and a wrong sign end elsewhere
RUNS = {
    "bandit": dict(steps=80, batch_size=16, prompts=512),
    "trie": dict(steps=40, batch_size=16, prompts=20),
    LARGER: dict(steps=80, prompts=64, eval_size=100, lr=3e-3),
    "gaussians": dict(
        steps=60, batch_size=64, prompts=1024, eval_size=256, base_steps=600, lr=5e-4
    ),
}
OTHER_RUN = dict(steps=24, batch_size=16, prompts=384, eval_size=64, base_steps=60, lr=3e-4)
# where the run of a method differs from the others of its world
OWN_RUN = {
    "d3po": dict(prompts=64),  # pairs of a round, so that there are several rounds
    # demonstrations teach a base model that has not yet learned them, which a table always has
    "ddo": dict(world=LARGER, steps=160, prompts=2560, eval_size=300, base_steps=100),
    "more_is_less": dict(
        steps=40, batch_size=32, prompts=1024, eval_size=128, base_steps=300, lr=5e-4
    ),
    "ofs_dpo": dict(prompts=768, lr=1e-3),
    "spinal": dict(base_steps=150, lr=2e-4),
    "tpo": dict(world=LARGER, steps=160, prompts=1024, eval_size=300),  # no sum is right so early
    "urflex": dict(prompts=4, steps=8, batch_size=16, eval_size=8, base_steps=20),  # it is slow
}
# methods whose model is not of the base model's shape, and the fields of a short run
OTHER_SHAPE = {"llava_mod": dict(dense=60, sparse=30)}
FEW_ITEMS = 3  # inputs of the visible tests
TEST = '''"""The visible tests: properties that every right solution has. Run: python -m pytest"""

from pathlib import Path

import pytest

from classroom import visible

HERE = Path(__file__).parent


@pytest.mark.parametrize("case", visible.cases(HERE), ids=visible.title)
def test_property(case):
    wrong = visible.failure(HERE, case)
    if wrong:
        pytest.fail(wrong, pytrace=False)
'''


@dataclasses.dataclass
class File:
    """One file, a method or nanomodel.py: its name, module, source and what is blanked of it."""

    name: str
    module: object
    source: str
    wanted: list

    @property
    def path(self):
        return ready.path_of(self.name)

    @property
    def import_name(self):
        return self.path.removesuffix(".py").replace("/", ".")


def files_of(paths, texts):
    """[File] of the given paths; texts: what is blanked of each. UserError: no such method."""
    found = []
    for path, text in zip(paths, texts):
        path = Path(path)
        part = path.resolve().parent == ROOT and path.stem in hidden.PARTS
        if not path.is_file() or not (part or path.resolve().parent == ROOT / "methods"):
            raise UserError(f"{path}: expected a file in methods/ of this project")
        module = importlib.import_module(path.stem if part else f"methods.{path.stem}")
        if not part and "loss" not in module.PAPER.core:
            raise UserError(f"{path}: this paper has no loss, so there is nothing to grade")
        source = path.read_text(encoding="utf-8")
        found.append(File(path.stem, module, source, blank.targets(text)))
    return found


def shipped():
    """{path: text} of the project's sources that a handout holds besides its methods."""
    paths = [ROOT / name for name in SHIPPED]
    paths += [ROOT / f"classroom/{name}.py" for name in CLASSROOM]
    paths += [path for package in ("lab", "toy") for path in (ROOT / package).glob("*.py")]
    paths.append(ROOT / "methods/__init__.py")
    return {path.relative_to(ROOT).as_posix(): path.read_text("utf-8") for path in sorted(paths)}


def hide(files, keep_comments):
    """Blank the files and look for what gives them away.

    -> ({path: text} of the handout, paths that were left out although they tell). UserError: the
    code stands where it cannot be hidden.
    """
    tree = shipped()
    for file in files:
        tree[file.path] = blank.blanked(file.source, file.wanted, keep_comments)
    code = [line for file in files for line in blank.code_of(file.source, file.wanted)]
    found = blank.leaks(code, {path: text for path, text in tree.items() if path.endswith(".py")})
    if found:
        path, line, statement = found[0]
        raise UserError(f"`{statement}` also stands in {path}, line {line}: blank it there as well")
    others = {
        path.relative_to(ROOT).as_posix(): path.read_text(encoding="utf-8")
        for folder in ("methods", "claims", "tests/methods")
        for path in sorted((ROOT / folder).glob("*.py"))
    }
    telling = {path for path, _, _ in blank.leaks(code, others) if path not in tree}
    return tree, sorted(telling)


# ---------------------------------------------------------------- properties


def public_items(module, tests, seed):
    """A few inputs for the visible tests, of another seed than the hidden ones."""
    made = hidden.loss_calls(module, tests, seed + 1)
    cfg = module.Config()
    items = [item for item, used in made if used == cfg] or [made[0][0]]
    apart = [item for item in items if item[1] is None or (item[0] != item[1]).any()]
    ragged = [item for item in apart or items if item[2].mask.any(-1).all()]
    return (ragged or apart or items)[:FEW_ITEMS]


def property_cases(file, tests, items):
    """[(module, blank, property, fields)]: the properties that the solution's loss has, by setting.

    Those of a helper are the properties of the loss under settings in which it calls the helper.
    """
    cases = []
    if file.name in hidden.PARTS:
        return cases
    meets = hidden.reaching(file.module, tests, file.wanted, items)
    settings = [("loss", fields) for fields in ({}, *tests.CASES[:1]) if "loss" in meets]
    settings += [(name, fields) for name, fields in meets.items() if name not in ("", "loss")]
    for label, fields in settings:
        cfg = file.module.Config(**fields)
        usable = [item for item in items if hidden.takes(file.module, item, cfg)]
        for name in properties.holding(file.module, usable, cfg) if usable else []:
            known = [case[2] for case in cases if case[1] == label]
            if name not in known or name == "noisy labels":
                cases.append((file.import_name, label, name, fields))
    return cases


def helper_examples(file, made):
    """The first call of every blanked helper, with the shapes of what it returns."""
    found = {}
    for function, arguments in made:
        if function != "loss" and function not in found:
            answer = hidden.answer(vars(file.module), (function, arguments))
            shapes = [list(x.shape) for name, x in answer.items() if name.startswith("value")]
            found[function] = (arguments, shapes)
    return found


# ---------------------------------------------------------------- runs


def run_settings(module):
    """Settings of a short run: on an exact table where the method can use one, else in its world.

    All that the method changes by default is written out, so that the command in the task sheet and
    the grader's run are the same. Methods that need a verifier run on a world in which a small base
    model is right now and then; it never is on sums after so few steps.
    """
    paper = module.PAPER
    own = {name: value for name, value in paper.defaults.items() if name not in SIZES}
    change = OWN_RUN.get(module.__name__.split(".")[-1], {})
    world = paper.defaults.get("world", "reviews")
    if "table" in paper.worlds:
        world = "trie" if paper.needs == "verifier" else "bandit"
    elif paper.needs == "verifier":
        world = LARGER
    world = change.get("world", world)
    settings = own | {"world": world} | RUNS.get(world, OTHER_RUN) | change
    return {"lr": grader.lab_of(settings).lr} | settings


# ---------------------------------------------------------------- writing


def write(files, out, seed=0, keep_comments=False, title=None, task="", say=print, written=()):
    """Write an assignment to a folder. UserError: a mutant survives, or something leaks.

    written: the tests that a teacher marks by hand.
    """
    tree, telling = hide(files, keep_comments)
    say("blanked: " + "; ".join(f"{f.path} ({', '.join(t.name for t in f.wanted)})" for f in files))
    if telling:
        say("left out, since they hold the same lines: " + ", ".join(telling))
    half = begun(out, tree, TEST)
    student, teacher = half / "student", half / "grader"
    about = {"title": title or ", ".join(file.name for file in files), "seed": seed, "files": []}
    about["written"] = list(written)
    public = {"files": []}
    for file in files:
        one, cases = write_file(file, student / "tests", teacher / file.name, seed, say)
        about["files"].append(one)
        public["files"].append({"name": file.name, "module": one["module"], "cases": cases})
    (student / "tests/assignment.json").write_text(json.dumps(public, indent=1))
    (teacher / "assignment.json").write_text(json.dumps(about, indent=1))
    shutil.copytree(student, teacher / "tree")
    measure_runs(files, about, teacher, say)
    (teacher / "assignment.json").write_text(json.dumps(about, indent=1))
    text = ready.readme(about, files, task, keep_comments)
    ended(out, text)
    return about


def beside(out):
    """The folder in which OUT is written until it is complete."""
    out = Path(out).resolve()
    return out.with_name(out.name + ".half")


def begun(out, tree, test):
    """Write {path: text} and the visible tests to a folder beside OUT, which it will become."""
    half = beside(out)
    shutil.rmtree(half, ignore_errors=True)
    for path, text in (tree | {"tests/test_assignment.py": test}).items():
        (half / "student" / path).parent.mkdir(parents=True, exist_ok=True)
        (half / "student" / path).write_text(text, encoding="utf-8")
    (half / "grader").mkdir()
    return half


def ended(out, readme):
    """Write the task sheet, and put the folder that `begun` made in the place of OUT."""
    out, half = Path(out).resolve(), beside(out)
    (half / "student/README.md").write_text(readme, encoding="utf-8")
    if out.exists():
        shutil.rmtree(out)
    half.rename(out)


def write_file(file, public, folder, seed, say):
    """Write what is needed to test one file -> (what the grader knows, the visible cases)."""
    tests = hidden.material(file.name)
    made, found = hidden.all_tests(file.module, tests, file.wanted, seed)
    part = file.name in hidden.PARTS
    items = [] if part else public_items(file.module, tests, seed)
    cases = property_cases(file, tests, items)
    helpers = helper_examples(file, made)
    for name in helpers:
        rules = ("shapes", *properties.HELPERS.get(name, ()))
        cases += [(file.import_name, name, rule, {}) for rule in rules]

    def passes(names):
        """Whether the visible tests pass with the names of a mutant."""
        try:
            module = SimpleNamespace(**names)
            return all(
                visible.keeps(module, case[2], item, file.module.Config(**case[3]))
                for case in cases
                if case[2] in properties.PROPERTIES
                for item in items
            ) and not any(
                visible.of_helper(module, *case[1:3], *helpers[case[1]])
                for case in cases
                if case[2] not in properties.PROPERTIES
            )
        except Exception:  # noqa: BLE001 - a mutant may do anything
            return False

    gate = hidden.gate(file.module, tests, file.wanted, made, passes)
    total = len(gate.killed)
    say(f"{file.path}: {total} single edits, the hidden tests tell all of them from the solution,")
    say(f"    the visible tests {gate.visible}; {len(gate.habits)} more change no value and no")
    say(f"    gradient, and {len(gate.equivalent)} change nothing at all")
    sentences = [sentence for sentence, _ in gate.killed]
    shown = [made[number] for number in gate.shown]
    made, found = hidden.pruned(made, found, gate.tellers)
    first = len(made)
    made += shown
    for _, label, name, fields in [case for case in cases if case[2] in properties.PROPERTIES]:
        cfg, numbers = file.module.Config(**fields), []
        for item in items:
            group = properties.PROPERTIES[name].calls(item, cfg) or []
            numbers.append(list(range(len(made), len(made) + len(group))))
            for (logps, ref, batch), change in group:
                changed = dataclasses.replace(cfg, **change)
                frozen = ref is not None and ref.requires_grad
                leaf = logps.detach() if frozen else logps.requires_grad_()
                made.append(("loss", (leaf, ref, batch, changed)))
        title = visible.title(visible.Case(file.import_name, label, name, fields))
        sentence = properties.PROPERTIES[name].sentence
        test = hidden.Test(title, "loss", "property", numbers, 1, True, sentence, name, fields)
        found.append(test)
    for _, label, name, _ in [case for case in cases if case[2] in properties.LOGPS]:
        group = properties.LOGPS[name].calls(helpers[label][0], None)
        numbers = list(range(len(made), len(made) + len(group)))
        made += [(label, arguments) for arguments, _ in group]
        sentence = properties.LOGPS[name].sentence
        title = f"{label}: {name}"
        test = hidden.Test(title, label, "property", [numbers], 1, True, sentence, name)
        found.append(test)
    folder.mkdir()
    calls.write(folder, "calls", made)
    (folder / "solution.py").write_text(file.source, encoding="utf-8")
    answers = {
        f"m{i}-{j}-{name}": x.contiguous().clone()
        for i, (_, each) in enumerate(gate.killed)
        for j, answer in enumerate(each)
        if not isinstance(answer, str)
        for name, x in answer.items()
        if name != "touched"
    }
    save_file(answers, folder / "mistakes.safetensors")
    examples = [("loss", (*item, file.module.Config())) for item in items]
    examples += [(name, arguments) for name, (arguments, _) in helpers.items()]
    calls.write(public, file.name, examples)
    forms = json.loads((public / f"{file.name}.json").read_text())
    for form in forms[len(items) :]:
        form["shapes"] = helpers[form["function"]][1]
    (public / f"{file.name}.json").write_text(json.dumps(forms))
    return {
        "name": file.name,
        "path": file.path,
        "module": file.import_name,
        "functions": [target.name for target in file.wanted],
        "tests": [dataclasses.asdict(test) for test in found],
        "mistakes": sentences,
        "shown": list(range(first, first + len(shown))),
        "mutants": {"killed": total, "visible": gate.visible, "others": gate.habits},
    }, cases


def measure_runs(files, about, teacher, say):
    """Run the solutions for a few seeds, and store their rewards and their spread.

    Every run is an example in the task sheet. One whose reward the base model may have as well
    tells nothing, and is not marked; nor is one whose model has another shape than the base model.
    """
    cache = teacher / "cache"
    cache.mkdir()
    for file, one in zip(files, about["files"]):
        one["run"] = None
        if file.name in hidden.PARTS:
            continue
        tests = hidden.material(file.name)
        items = public_items(file.module, tests, about["seed"])
        meets = hidden.reaching(file.module, tests, file.wanted, items)
        first = next((target.name for target in file.wanted if target.name in meets), None)
        if first is None:
            continue
        fields = meets[first] | OTHER_SHAPE.get(file.name, {})
        settings = run_settings(file.module)
        runs = [dict(settings=settings | {"seed": seed}, fields=fields) for seed in range(SEEDS)]
        one["picture"], ends = picture(file, runs[0], teacher, cache)
        one["example"] = runs[0] | ends
        if file.name in OTHER_SHAPE:
            say(f"{file.path}: its model is not of the base model's shape, so no run is marked")
            continue
        rewards = []
        with tempfile.TemporaryDirectory() as work:
            job = grader.Job(teacher, one, Path(work), {file.path: file.source}, cache)
            for answer in job.run_only(runs):
                if isinstance(answer, str):
                    raise UserError(f"the short run of {file.path} fails: {answer}")
                rewards.append(grader.reward_of(answer, settings))
        low, mean = lowest(rewards), sum(rewards) / SEEDS
        say(
            f"{file.path}: the solution's short runs end at a reward of {mean:.3f}, and a "
            f"submission's must reach {low:.3f}"
        )
        before = grader.reward_of(None, settings)
        if before >= low:
            say(f"    the base model has {before:.3f}, so this run is not graded")
            continue
        one["run"] = runs[0] | {"low": low}
        name = f"{file.name}: a short run reaches the reward of the solution's"
        one["tests"].append(dataclasses.asdict(hidden.Test(name, "loss", "run", [], 10)))


def lowest(rewards):
    """The reward that a submission's run must reach, given those of the solution by seed."""
    found = torch.tensor(rewards, dtype=torch.float64)
    low = float(found.mean() - SPREAD * found.std())
    return min(low, rewards[0]) - 1e-6  # a right submission repeats the run of the first seed


def picture(file, run, teacher, cache):
    """Draw the curves of the solution's short run into the student's folder.

    -> (the file's name, {"before": reward, "after": reward}). UserError: the command that the task
    sheet prints does not work.
    """
    with tempfile.TemporaryDirectory() as work:
        tree = Path(work) / "tree"
        shutil.copytree(teacher / "tree", tree)
        (tree / file.path).write_text(file.source, encoding="utf-8")
        command = [sys.executable, "train.py", "--method", file.name, *ready.flags(run)]
        ran = subprocess.run(
            [*command, "--out", "run"],
            cwd=tree,
            env=os.environ | {"NANOPREF_CACHE": str(cache.resolve())},
            capture_output=True,
            text=True,
        )
        if ran.returncode:
            raise UserError(f"the short run fails: {(ran.stderr.splitlines() or ['?'])[-1]}")
        name = f"expected_{file.name}.png"
        shutil.copy(tree / "run/curves.png", teacher.parent / "student" / name)
        summary = json.loads((tree / "run/summary.json").read_text(encoding="utf-8"))
    return name, {when: summary[when]["reward"] for when in ("before", "after")}
