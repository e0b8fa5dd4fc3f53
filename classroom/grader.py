"""Run submissions and compare what they return with the solution.

A submission runs in a process of its own, over a fresh copy of the handout in which only the listed
files are the student's. The process gets inputs and returns tensors; the expected values are
computed here. Python is no sandbox: a submission could read files of the user it runs as, so give
the process another user (--user), or a container (--gradescope).
"""

import contextlib
import json
import os
import secrets
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from classroom import calls, hidden, outputs, properties
from data import UserError, error_line, printable

START = 90.0  # seconds in which torch is imported, and in which a short run ends
MEMORY = 8 * 2**30  # bytes of address space
WRITTEN = 256 * 2**20  # bytes of a file, and of all answers together
LARGEST = 2**20  # bytes of a submitted file
LONGEST = 400  # bytes that are read of the text of an error
RESTARTS = 3  # times that a process which ended early is started again
TURN = "your turn"
# what a damaged file raises, or a solution that needs names of another version
DAMAGED = OSError, ValueError, LookupError, TypeError, AttributeError, NameError, ImportError
DAMAGED += SyntaxError, SafetensorError
EVALUATION = threading.Lock()  # models are evaluated one at a time


class Job:
    """One file of one submission: its process, and its answers.

    teacher: the grader's folder. one: the entry of the file in assignment.json. work: an empty
    folder. submitted: {path: source}. cache: a folder with the base models of the short run.
    """

    def __init__(self, teacher, one, work, submitted, cache=None, seconds=20.0, user=None):
        self.one, self.work, self.seconds, self.user = one, Path(work), seconds, user
        tree, asked = self.work / "tree", Path(teacher) / one["name"]
        shutil.copytree(Path(teacher) / "tree", tree)
        for path, source in submitted.items():
            (tree / path).write_text(source, encoding="utf-8")
        here = Path(__file__).parent
        self.read = [here / "child.py", here / "calls.py"]  # by the process
        self.read += [asked / "calls.json", asked / "calls.safetensors"]
        (self.work / "answers").mkdir()
        self.count = len(json.loads((asked / "calls.json").read_text()))
        (self.work / "cache").mkdir()
        if cache and Path(cache).is_dir():  # a zip has no empty folders
            shutil.copytree(cache, self.work / "cache", dirs_exist_ok=True)
        self.cache = cache

    def run(self, runs):
        """The answers to all calls and then to the short runs: tensors, or the text of an error."""
        return self.answers(0, self.count + len(runs), runs)

    def run_only(self, runs):
        """The answers to the short runs alone; base models that were trained stay in the cache."""
        found = self.answers(self.count, self.count + len(runs), runs)
        shutil.copytree(self.work / "cache", self.cache, dirs_exist_ok=True)
        return found

    def answers(self, first, count, runs):
        """Start the process, and again behind a call that ended it, until all is answered."""
        token = secrets.token_hex(8)
        found, starts = {}, 0
        while first < count:
            reason = "the grader stopped after several processes that ended early"
            if starts <= RESTARTS:
                job = dict(module=self.one["module"], token=token, first=first, count=count)
                # a card maps far more addresses than it has memory
                memory = -1 if self.one.get("kind") == "step" else MEMORY
                job |= dict(memory=memory, written=WRITTEN, runs=runs)
                reason = self.process(job, token, first, count)
                starts += 1
            while first < count and self.file(token, first).exists():
                found[first] = read_answer(self.file(token, first))
                first += 1
            if first < count:
                found[first] = reason
                first += 1
        return [found[number] for number in sorted(found)]

    def file(self, token, number):
        return self.work / "answers" / f"{token}-{number}.safetensors"

    def renew(self):
        """Put what the process reads in its place, whatever the process before has left there."""
        for source in self.read:
            target = self.work / source.name
            if target.is_dir() and not target.is_symlink():
                shutil.rmtree(target)
            target.unlink(missing_ok=True)
            shutil.copy(source, target)

    def process(self, job, token, first, count):
        """Run the process until it ends or is too slow -> why an answer may be missing."""
        self.renew()
        environment = {
            "PATH": os.environ.get("PATH", ""),
            "NANOPREF_CACHE": str(self.work / "cache"),
            "OMP_NUM_THREADS": "1",
            "HOME": str(self.work),
            "TMPDIR": str(self.work),
            "PYTHONDONTWRITEBYTECODE": "1",
        }
        ready = self.work / "answers" / f"{token}-started"
        ready.unlink(missing_ok=True)
        options = {} if os.name == "nt" else {"start_new_session": True}
        if self.user:
            import pwd  # Windows has no such module

            try:
                uid = pwd.getpwnam(self.user).pw_uid
                for path in [self.work, *self.work.rglob("*")]:
                    if path.is_dir() or path.lstat().st_nlink == 1:  # a hard link leads outside
                        os.chown(path, uid, -1, follow_symlinks=False)  # so may another link
            except (LookupError, PermissionError) as error:
                raise UserError(f"--user {self.user}: {error}") from error
            options |= {"user": self.user, "extra_groups": []}
        # -I: no variables of the environment, no current folder and no user's packages are read
        command = [sys.executable, "-I", str(self.work / "child.py"), str(self.work)]
        asked = tempfile.TemporaryFile()  # it has no name, so nothing can be put in its place
        asked.write(json.dumps(job).encode())
        asked.seek(0)
        try:
            child = subprocess.Popen(
                command,
                stdin=asked,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                env=environment,
                cwd=self.work,
                **options,
            )
        except PermissionError as error:
            raise UserError(
                f"--user {self.user}: this user may not run {sys.executable}; use a Python that "
                "all users can read, and start grade.py as root"
            ) from error
        finally:
            asked.close()
        done, limit, started, written = first, START, False, 0
        deadline = time.monotonic() + limit
        try:
            while child.poll() is None:
                if not started and ready.exists():
                    started = True
                    limit = self.seconds if done < self.count else max(self.seconds, START)
                    deadline = time.monotonic() + limit
                while done < count and self.file(token, done).exists():
                    written += self.file(token, done).stat().st_size
                    done += 1
                    limit = self.seconds if done < self.count else max(self.seconds, START)
                    deadline = time.monotonic() + limit
                if written > WRITTEN:
                    return f"the answers before it have more than {WRITTEN >> 20} MB"
                if time.monotonic() > deadline:
                    return f"it did not end within {limit:g} seconds"
                time.sleep(0.02)
        finally:
            stop(child)
        return f"the process ended in the middle of it (exit status {child.returncode})"


def stop(child):
    """End a process and all that it has started."""
    if os.name != "nt":
        try:
            os.killpg(child.pid, signal.SIGKILL)
        except ProcessLookupError:
            pass
    child.kill()
    child.wait()


def read_answer(file):
    """The tensors of an answer, or the text of its error."""
    if not regular(file):  # a pipe, which a submission may put there, would never end
        return "its answer is no file"
    try:
        found = load_file(file)
        if set(found) != {"error"}:
            return found
        text = bytes(found["error"].flatten()[:LONGEST].to(torch.uint8).tolist())
    except (SafetensorError, OSError, ValueError, RuntimeError):
        return "its answer cannot be read"
    return printable(text.decode("utf-8", "replace"))


def regular(file):
    """Whether a path is a file, neither a link nor a pipe nor a folder."""
    return file.is_file() and not file.is_symlink()


def lab_of(settings):
    """A Lab of run settings, whose world may be a file of this project."""
    from lab import Lab, Settings

    own = Path(__file__).parents[1] / settings["world"]
    world = str(own) if own.suffix == ".py" else settings["world"]
    return Lab(Settings(**settings | {"world": world}), quiet=True)


def reward_of(weights, settings):
    """The true reward of a policy with these weights, measured in this process; None: the base."""
    with EVALUATION:
        lab = lab_of(settings)
        policy = lab.base()
        if weights is not None:
            policy.load_state_dict(weights)
        return float(lab.evaluate(policy)["reward"])


# ---------------------------------------------------------------- marks


def solution_of(folder, one):
    """The names of the solution of a file."""
    source = (folder / one["name"] / "solution.py").read_text(encoding="utf-8")
    name, module = one["module"], ModuleType(one["module"])
    before = sys.modules.get(name)
    sys.modules[name] = module  # a dataclass looks there for the types that it names in quotes
    try:
        exec(compile(source, one["path"], "exec"), vars(module))  # the teacher's own file
    finally:
        sys.modules.pop(name)
        if before:
            sys.modules[name] = before
    return vars(module)


class Sheet:
    """What is compared for one file: its calls, the solution's answers and the known mistakes."""

    def __init__(self, folder, one):
        from types import SimpleNamespace

        self.one, self.folder = one, folder
        self.names = solution_of(folder, one)
        forms, tensors = calls.read(folder / one["name"], "calls")
        self.calls = [
            (form["function"], calls.unpack(form["arguments"], tensors, self.names))
            for form in forms
        ]
        self.expected = [hidden.answer(self.names, call) for call in self.calls]
        self.module = SimpleNamespace(**self.names)
        stored = load_file(folder / one["name"] / "mistakes.safetensors")
        self.mistakes = [{} for _ in one["mistakes"]]
        for key, value in stored.items():
            number, call, name = key[1:].split("-")
            self.mistakes[int(number)].setdefault(int(call), {})[name] = value

    def check(self):
        """UserError: the solution fails a test, as in a folder that another version wrote."""
        for test in self.one["tests"]:
            try:
                if test["kind"] == "run":
                    wrong = "low" not in self.one["run"]
                else:
                    wrong = self.of_test(test, self.expected, None)
            except (KeyError, TypeError):
                wrong = True
            if wrong:
                raise UserError(
                    f"{self.folder}: the solution fails `{test['name']}`; write the assignment "
                    "again with this version of assign.py"
                )

    def mark(self, answers, weights):
        """[(test, points, status, message)] for the answers to the calls and the run's weights."""
        rows = []
        for test in self.one["tests"]:
            try:
                message = self.of_test(test, answers, weights)
            except Exception as error:  # noqa: BLE001 - the tensors may be anything
                message = f"its answers cannot be compared: {type(error).__name__}"
            status = "passed" if message is None else "failed"
            if message and TURN in message:
                status = "not attempted"
            rows.append([test, test["points"] if message is None else 0, status, message or ""])
        # a constant has many properties, and a gradient of 0 where that is right, and earns nothing
        earned = {label(test) for test, got, *_ in rows if got and self.tells(test)}
        for row in rows:
            if not earned or (row[0]["kind"] != "run" and label(row[0]) not in earned):
                row[1] = 0
        return rows

    def tells(self, test):
        """Whether a test compares values, or gradients of which one is not 0."""
        if test["kind"] != "gradients":
            return test["kind"] == "values"
        answers = [self.expected[number] for number in test["calls"]]
        slopes = [x for each in answers for key, x in each.items() if key.startswith("gradient")]
        return any(x.any() for x in slopes)

    def of_test(self, test, answers, weights):
        """What is wrong with the answers to the calls of a test; None: nothing."""
        if test["kind"] == "run":
            return self.of_run(weights)
        if test["kind"] == "property":
            return self.of_property(test, answers)
        return self.of_values(test, answers)

    def of_values(self, test, answers):
        """What is wrong with the values or gradients of a test; None: nothing."""
        for number in test["calls"]:
            found, right = answers[number], self.expected[number]
            if isinstance(found, str):
                return found
            if not hidden.agree(found, right, test["kind"]):
                return self.difference(test, found, right) + self.known(answers)
        return None

    def difference(self, test, found, right):
        """How an answer differs from the solution's, in one sentence."""
        start = "value" if test["kind"] == "values" else "gradient"
        keys = sorted(key for key in right if key.startswith(start))
        for key in keys:
            if key not in found:
                return f"it returns fewer tensors than the {len(keys)} expected"
            a, b = found[key], right[key]
            if a.shape != b.shape:
                return f"{start} of shape {tuple(a.shape)}, expected {tuple(b.shape)}"
            if not a.isfinite().all():
                return f"a {start} is NaN or infinite"
            if a.dtype != b.dtype:
                return f"{start} of {a.dtype}, expected {b.dtype}, the kind of the inputs"
            if not hidden.same(a, b):
                gap = float((a.double() - b.double()).abs().max())
                return f"the {start} differs from the solution's by up to {gap:.3g}"
        return f"it returns more {start}s than expected"

    def known(self, answers):
        """The known mistake that has the same answers to all of the calls shown, as a sentence."""
        found = [answers[number] for number in self.one["shown"]]
        names = set()
        for sentence, mistake in zip(self.one["mistakes"], self.mistakes):
            if mistake and all(
                not isinstance(found[call], str) and hidden.agree(found[call], answer)
                for call, answer in mistake.items()
            ):
                names.add(sentence)
        return ". This equals the solution with a mistake: " + min(names) if names else ""

    def of_property(self, test, answers):
        cfg = self.names["Config"](**test["setting"]) if "Config" in self.names else None
        for numbers in test["calls"]:
            results = []
            for number in numbers:
                found = answers[number]
                if isinstance(found, str):
                    return found
                if "gradient0" not in found or "value0" not in found:
                    return test["sentence"]
                results.append(properties.Result.of(found))
            group = [(self.calls[number][1][:3], {}) for number in numbers]
            try:
                if numbers and not properties.keeps(test["rule"], results, group, cfg):
                    return test["sentence"]
            except (RuntimeError, ValueError, IndexError):  # tensors of shapes that do not fit
                return test["sentence"]
        return None

    def of_run(self, weights):
        run = self.one["run"]
        if isinstance(weights, str):
            return weights
        try:
            reward = reward_of(weights, run["settings"])
        except (RuntimeError, KeyError, TypeError, ValueError) as error:
            return f"the weights it returns do not fit the model: {str(error).splitlines()[0]}"
        if not reward >= run["low"]:
            return (
                f"it ends at a reward of {reward:.3f}; the solution's runs reach {run['low']:.3f}"
            )
        return None


def label(test):
    """What was blanked, of which a test is a part."""
    return test["name"].split(": ")[0]


class TaskSheet:
    """What is judged of a file that has no solution: a world, or a training step."""

    def __init__(self, folder, one):
        self.one = one

    def mark(self, answers, weights=None):
        """[(test, points, status, message)] for the answers to all calls."""
        from classroom import promises

        known = {}
        for form, found in zip(self.one["asked"], answers):
            if not isinstance(found, str):
                count = sum(name.startswith("value") for name in found)
                found = [found.get(f"value{i}") for i in range(count)]
            known[tuple(form)] = found
        with EVALUATION:  # the shipped step draws its weights from the global random numbers
            verdicts = promises.verdicts(self.one["kind"], self.one["seed"], known.__getitem__)
        rows, broken = [], False
        for test, (promise, wrong, judged) in zip(self.one["tests"], verdicts):
            status = "failed" if wrong else "passed"
            if isinstance(wrong, promises.ByHand):
                status = outputs.BY_HAND
            elif wrong and not judged and TURN in wrong:
                status = "not attempted"
            broken |= promise.required and judged and status == "failed"
            rows.append([test, test["points"] if wrong is None else 0, status, wrong or ""])
        for row in rows:
            row[1] = 0 if broken else row[1]
        return rows


def assignment(folder):
    """What assignment.json of a grader's folder holds, and a sheet for each of its files.

    UserError: the folder is damaged, or another version of the project wrote it.
    """
    for path in folder.rglob("*"):
        if not path.is_dir() and not (path.is_file() and os.access(path, os.R_OK)):
            raise UserError(f"{path} is not a file that can be read; write the assignment again")
    try:
        about = json.loads((folder / "assignment.json").read_text(encoding="utf-8"))
        sheets = [sheet_of(folder, one) for one in about["files"]]
    except UserError:
        raise
    except DAMAGED as error:
        raise UserError(
            f"{folder} is damaged ({type(error).__name__}: {printable(error_line(error))}); "
            "write the assignment again"
        ) from None
    return about, sheets


def sheet_of(folder, one):
    """The Sheet or TaskSheet of a file of an assignment. UserError: it is of another version."""
    if "kind" in one:
        return TaskSheet(folder, one)
    sheet = Sheet(folder, one)
    sheet.check()
    return sheet


# ---------------------------------------------------------------- submissions


def submissions(folder, about):
    """{student: {path of a file: its source, or what is wrong with it}} of a folder.

    A submission is a folder with the listed files, in their places or not, or, if one file is
    asked for, a Python file of any name. UserError: there is none.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    wanted = [one["path"] for one in about["files"]]
    found = {}
    for entry in sorted(folder.iterdir()):
        name = shown(entry.stem if entry.suffix == ".py" and not entry.is_dir() else entry.name)
        if name in found:
            raise UserError(f"{folder}: there are two submissions of {printable(name)}")
        if entry.name.startswith("."):
            continue
        if entry.is_symlink() and entry.is_dir():
            link = ValueError("a link was handed in, not a folder")
            found[name] = dict.fromkeys(wanted, link)
        elif entry.is_dir():
            try:
                found[name] = {path: source_in(entry, path) for path in wanted}
            except (OSError, RecursionError) as error:  # it may be locked, or 1,000 folders deep
                wrong = ValueError(f"the folder cannot be read: {printable(error_line(error))}")
                found[name] = dict.fromkeys(wanted, wrong)
        elif entry.suffix == ".py" and len(wanted) == 1:
            found[name] = {wanted[0]: read_source(entry)}
    if not found:
        raise UserError(f"{folder}: no submissions; expected a folder or a .py file per student")
    return found


def shown(name):
    """A name of a file that can be written as text; bytes that are no UTF-8 become "?"."""
    return name.encode("utf-8", "replace").decode()


def source_in(folder, path):
    """The source of one listed file in a student's folder: in its place, or by its name alone."""
    name = Path(path).name
    home = folder.resolve()
    for place in [folder / path, folder / name, *sorted(folder.rglob(name))]:
        # a linked folder could hold the solution
        if regular(place) and place.resolve().is_relative_to(home):
            return read_source(place)
    return ValueError(f"{name} was not handed in")


def read_source(file):
    """A submitted source; a ValueError that says why not."""
    if not regular(file):
        what = "a link" if file.is_symlink() else "a pipe or a device"
        return ValueError(f"{what} was handed in, not a file")
    if file.stat().st_size > LARGEST:
        return ValueError(f"the file is larger than {LARGEST >> 10} KB")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        return ValueError("the file is not text in UTF-8")
    except OSError as error:
        return ValueError(f"the file cannot be read: {printable(error_line(error))}")


def grade(folder, about, sheets, submitted, seconds=20.0, user=None):
    """Grade one submission -> ([(file, test, points, status, message)], seconds that it took)."""
    rows, start = [], time.monotonic()
    for one, sheet in zip(about["files"], sheets):
        source = submitted[one["path"]]
        if not isinstance(source, str):
            rows += [(one, test, 0, "not attempted", str(source)) for test in one["tests"]]
            continue
        runs = one["long"] if "kind" in one else [one["run"]] if one["run"] else []
        place = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
        with contextlib.suppress(RecursionError), place as work:  # 1,000 folders deep, it stays
            if user:
                os.chmod(work, 0o755)
            # the other files are those of the handout: a mistake in one of them costs nothing here
            job = Job(folder, one, work, {one["path"]: source}, folder / "cache", seconds, user)
            try:
                answers = job.run(runs)
            except (OSError, RecursionError) as error:  # it has changed the folder that it runs in
                said = f"its folder cannot be used: {printable(error_line(error))}"
                answers = [said] * (job.count + len(runs))
        weights = answers.pop() if runs and "kind" not in one else None
        rows += [(one, *row) for row in sheet.mark(answers, weights)]
    for test in about.get("written", ()):
        rows.append((about["files"][0], test, 0, outputs.BY_HAND, test["sentence"]))
    return rows, time.monotonic() - start
