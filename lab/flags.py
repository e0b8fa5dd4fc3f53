"""The command line: what methods declare, which flags there are, and the runs that they ask for.

What a method declares (its docstring, PAPER and Config) is read from its source with `ast`, without
importing it. So only the methods that are run are imported, and an unfinished file in methods/
breaks nothing but itself.
"""

import ast
import contextlib
import dataclasses
import functools
import io
import itertools
import math
import os
import re
import sys
import tokenize
from dataclasses import dataclass, field
from types import ModuleType

import torch

from data import Paper, UserError, printable
from lab.folder import read_run
from lab.hub import load_pretrained
from lab.rehearsal import rehearse
from lab.settings import (
    KINDS,
    Settings,
    file_path,
    idle,
    line_in,
    load_file,
    make_world,
    methods,
    pick_device,
    refuse_idle,
    slips,
    unknown,
)
from lab.spread import read_shard
from lab.store import HERE

ACTIONS = dict(
    method="the paper to run (see --list), or a file of your own; several with commas, or all",
    claim="measure the paper's claims, instead of one run",
    smoke="with --claim: measure with a few steps and prompts, to see that everything runs",
    tuning="with --claim: seeds from 100 on, which are kept apart from the reported ones",
    judge="judge the claims of a folder of results again, without measuring: --judge results",
    seeds="run this many seeds: seed, seed + 1, ... [1; 5 with --claim]",
    resume="continue the interrupted run in this folder",
    prompt="print the response of the model of --init (or of the world's base model)",
    jobs="run a sweep, or the claims of several papers, in this many processes at a time",
    shard="i/n: do every n-th run of a sweep, or paper, from the i-th on; needs --out",
    merge="join the folders of the shards of one command: --merge A B; --out DIR [the first]",
    compare="finished runs or sweeps beside each other, from their folders: --compare A B",
    show="print one row as the model sees it, and stop before the first step",
    check="test whether a method keeps the contract: --check my_method",
    list="the methods by family, and the worlds",
    help="this text; with --method NAME: that paper and its flags",
)
CAN = " can use it"  # the end of a list of methods in a refusal
FOLDERS = ("compare", "merge")  # actions that take folders, as the shell writes them out
BARE = ("claim", "smoke", "tuning", "show", "list", "help")  # actions that take no value
TEXTS = ("data", "init", "out", "world", "prompt", "resume", "check", "judge", *FOLDERS)
# the seeds of --claim: no release printed 30 to 49 before; tuning has seeds from 100 on
REPORTED, TUNING, SEEDS = 30, 100, 5
FAMILIES = ("pairs", "lists", "online", "images", "analysis", "beyond", "baseline")  # of a PAPER
NEEDS = ("pairs or lists", "lists", "demonstrations", "verifier", "reward", "criteria", "points")
TYPES = {"int", "float", "bool", "str", "None"}  # of the fields of a Config, joined by |
ENDINGS = r"(?i)(\.(py|jsonl?|csv|parquet|npz))?(\.gz)?$"  # of files, left out of a folder's name
ALIASES = dict(  # names of other libraries, for "did you mean"; they are not accepted
    batch_size="bs batchsize batch per_device_train_batch_size train_batch_size",
    check="test verify validate",
    clip="max_grad_norm grad_clip gradient_clip clip_grad",
    data="dataset dataset_name train_file train_data data_path",
    device="gpu cuda accelerator",
    dtype="precision bf16 fp16 torch_dtype",
    eval_every="eval_steps eval_interval logging_steps",
    flip="noise label_noise flip_rate",
    init="model model_name model_name_or_path model_path checkpoint ckpt pretrained load",
    k="num_samples num_generations num_responses n_samples",
    label_temperature="label_temp",
    lr="learning_rate learningrate eta",
    max_response="max_new_tokens max_tokens max_length max_completion_length",
    optimizer="optim optimiser opt",
    method="algo algorithm loss loss_type trainer paper name",
    out="output_dir output out_dir save_dir logdir",
    prompt="query question ask",
    seed="random_seed",
    seeds="num_seeds n_seeds",
    steps="epochs epoch num_epochs num_train_epochs num_steps max_steps iterations iters max_iters",
    temperature="temp",
    warmup="warmup_steps warmup_ratio",
    world="task env environment",
)


# ---------------------------------------------------------------- what a file declares


@dataclass(frozen=True)
class Flag:
    """One field of a Config or of Settings."""

    kind: str  # the annotation, "float | None"
    default: str  # as it is written in the source
    text: str  # the comment beside it, or above it

    def meaning(self):
        """A value that is equal for two fields of one name if they mean the same.

        It has the annotation, the default and the first clause of the comment, which ends at a
        comma, semicolon, colon, parenthesis or full stop.
        """
        clause = re.split(r"[,;:(.]", self.text)[0]
        return self.kind, self.default, " ".join(clause.lower().split())


def filled_in(method):
    """{field: {variant: default}} of the fields that a method's Config takes from its variant.

    They are in the tables that the Config hands to `data.fill_variant`: fill_variant(self, TABLE).
    """
    with open(method.path, encoding="utf-8") as file:
        calls = [node for node in ast.walk(ast.parse(file.read())) if isinstance(node, ast.Call)]
    calls = [call for call in calls if getattr(call.func, "id", "") == "fill_variant"]
    tables = [arg.id for call in calls for arg in call.args[1:] if isinstance(arg, ast.Name)]
    found = {}
    for table in tables:
        for variant, defaults in getattr(load(method), table).items():
            for name, value in defaults.items():
                found.setdefault(name, {})[variant] = value
    return found


@dataclass(frozen=True)
class Declared:
    """What a method file says about itself, read without importing it."""

    name: str
    path: str
    doc: str = ""
    paper: Paper | None = None
    flags: dict = field(default_factory=dict)  # {field of Config: Flag}
    problem: str = ""  # why the file cannot be read

    @property
    def title(self):
        """The first paragraph of the docstring: name, title, year and arXiv number."""
        return " ".join((self.doc.strip() or self.name).split("\n\n")[0].split())


def fields_of(source, name):
    """{field: Flag} of the dataclass `name` in a module's source; None if there is no such class.

    The explanation is the comment on the field's line or lines, else the comment lines above it.
    """
    found = [n for n in ast.parse(source).body if isinstance(n, ast.ClassDef) and n.name == name]
    if not found:
        return None
    lines, comments = source.splitlines(), {}
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if token.type == tokenize.COMMENT:
            comments[token.start[0]] = token.string.lstrip("# ").strip()
    flags = {}
    for node in found[0].body:
        if not isinstance(node, ast.AnnAssign):
            continue
        places = [i for i in range(node.lineno, node.end_lineno + 1) if i in comments]
        above = node.lineno - 1
        if not places:
            while lines[above - 1].strip().startswith("#"):
                places.insert(0, above)
                above -= 1
        kind = ast.unparse(node.annotation).strip("'\"")
        default = ast.unparse(node.value) if node.value else ""
        flags[node.target.id] = Flag(kind, default, " ".join(comments[i] for i in places))
    return flags


def literal(node):
    """The value of a literal, where dict(name=value) is one, too."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", "") == "dict":
        return {k.arg: literal(k.value) for k in node.keywords}
    return ast.literal_eval(node)


def config_fault(tree):
    """The first fault that a module's source (an ast) shows in its Config, with the line; or ""."""
    found = [n for n in tree.body if isinstance(n, ast.ClassDef) and n.name == "Config"]
    if not any("dataclass" in ast.unparse(d) for d in found[0].decorator_list):
        return f"line {found[0].lineno}: write @dataclass(frozen=True) above Config"
    for node in found[0].body:
        line = f"line {node.lineno}"
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            name = node.targets[0].id
            if name[0] != "_" and not name.isupper():  # not a constant
                return (
                    f"{line}: {name} has no type, so it is not a field of Config and not a flag; "
                    f"write {name}: TYPE = {ast.unparse(node.value)}"
                )
        if isinstance(node, ast.AnnAssign):
            name, kind = node.target.id, ast.unparse(node.annotation).strip("'\"")
            if {part.strip() for part in kind.split("|")} - TYPES:
                return (
                    f"{line}: the field {name} has the type {kind}, expected int, float, bool or "
                    "str, or one of them with | None"
                )
            if node.value is None:
                return f"{line}: the field {name} of Config needs a default"
    return ""


def declared(name):
    """What the method `name` (one of ours, or a path) declares; UserError for an unknown name."""
    known = {n.lower(): n for n in methods()}
    if name.lower() in known:
        name = known[name.lower()]
        path = os.path.join(HERE, "methods", f"{name}.py")
    elif path := file_path("method", name):
        name = os.path.basename(path)[:-3]
    else:
        raise UserError(unknown("method", name, methods()))
    try:
        with open(path, encoding="utf-8") as file:
            tree = ast.parse(source := file.read())
        flags, paper = fields_of(source, "Config"), None
        for node in tree.body:
            if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == "PAPER":
                call = node.value
                named = {k.arg: literal(k.value) for k in call.keywords}
                paper = Paper(*map(literal, call.args), **named)
                break
    except SyntaxError as error:
        return Declared(name, path, problem=f"line {error.lineno}: {error.msg}")
    except (OSError, ValueError, TypeError, AttributeError) as error:
        return Declared(name, path, problem=" ".join(str(error).split()))
    doc = ast.get_docstring(tree) or ""
    functions = [node.name for node in tree.body if isinstance(node, ast.FunctionDef)]
    missing = [what for what, there in (("Config", flags), ("PAPER", paper)) if there is None]
    missing += [] if "run" in functions else ["run"]
    problem = f"it has no {' and no '.join(missing)}" if missing else config_fault(tree)
    taken = sorted(set(flags or {}) & set(settings_flags()))
    if taken:
        problem = f"its Config has the field {taken[0]}, which is the name of a run setting"
    actions = sorted(set(flags or {}) & set(ACTIONS))
    if actions:
        problem = f"its Config has the field {actions[0]}, which is the name of an action"
    upper = [name for name in flags or {} if name != name.lower()]
    if upper:
        problem = f"its Config has the field {upper[0]}, but flags are in lower case"
    strange = sorted(set(paper.worlds) - set(KINDS)) if paper else []
    if strange:
        problem = f"its PAPER names worlds of {strange[0]}; there are {', '.join(KINDS)}"
    for several in ("worlds", "ignores", "core"):
        value = getattr(paper, several, ())
        if not isinstance(value, tuple):
            problem = f"{several} of its PAPER must be a tuple: ({value!r},)"
    if paper and paper.needs not in NEEDS:
        problem = f"its PAPER needs {paper.needs}; there are {', '.join(NEEDS)}"
    if paper and paper.family not in FAMILIES:
        problem = f"its PAPER has the family {paper.family}; there are {', '.join(FAMILIES)}"
    return Declared(name, path, doc, paper, flags or {}, problem)


def catalogue():
    """A Declared for every method in methods/, also for files that cannot be read."""
    return [declared(name) for name in methods()]


def load_method(name):
    """The module of a method: one of ours, or a user's own file."""
    return load(declared(name))


def load(about):
    """The module of a method that was `declared`."""
    if about.problem:
        raise UserError(f"{about.path} cannot be read: {about.problem}")
    return load_file("method", about.path)


def configured(module, values):
    """The Config of a method with these values {field: value}.

    UserError: the Config refuses a value, or it fails; the message then has its line."""
    with slips(module.__file__):
        return module.Config(**values)


# ---------------------------------------------------------------- reading flags


@dataclass
class Run:
    """One run that a command line asks for."""

    method: str | None
    module: ModuleType | None
    paper: Paper | None
    settings: Settings
    cfg: object
    varied: dict  # {flag: value} of the flags that differ between the runs of a sweep

    def name(self):
        return ", ".join(f"{k} {v}" for k, v in self.varied.items())


@functools.cache
def settings_flags():
    """{run setting: Flag}."""
    with open(os.path.join(HERE, "lab", "settings.py"), encoding="utf-8") as file:
        return fields_of(file.read(), "Settings")


def read_command(argv):
    """A command line -> (flags, what the chosen methods declare, the folder of --resume or None).

    --resume is replaced by the flags of the interrupted run, checked like any others."""
    flags, chosen = read_flags(argv)
    for action, useful in dict(list=set(), help={"method"}).items():
        if action in flags and (rest := sorted(set(flags) - useful - {action})):
            raise UserError(f"--{', --'.join(rest)} does nothing together with --{action}")
    if "resume" not in flags:
        return flags, chosen, None
    if len(flags) > 1:
        raise UserError("--resume takes no other flag: the run's own settings are used")
    again, chosen = read_flags(read_run(flags["resume"]))
    allowed = {"method", "claim", "tuning", "seeds", "jobs"}
    for name in sorted(set(again) & (set(ACTIONS) - allowed)):
        raise UserError(
            f"--resume {flags['resume']}: its run.json asks for --{name}, not for a run"
        )
    return again, chosen, flags["resume"]


def read_flags(argv):
    """A command line -> ({flag: text}, what the chosen methods declare).

    A flag that names its method, --ld_dpo.alpha, keeps that name. UserError: a flag that is not
    known, is given twice or lacks its value; a method that is not known or cannot be read."""
    argv = ["--help" if a == "-h" else a for a in argv]
    chosen = chosen_methods(argv)
    own = {f"{m.name}.{f}": flag for m in chosen for f, flag in m.flags.items()}
    own |= {f: flag for m in chosen for f, flag in m.flags.items()}
    known = settings_flags() | own | dict.fromkeys(ACTIONS)
    switches = (name for name, flag in known.items() if flag and "bool" in flag.kind)
    bare = {*BARE, *switches}
    flags, i = {}, 0
    while i < len(argv):
        if not argv[i].startswith("--") or argv[i] == "--":
            raise UserError(
                f"unexpected {argv[i]!r}: flags begin with --, and lists are written with commas"
            )
        name, equals, value = argv[i][2:].partition("=")
        name = name.replace("-", "_").lower()
        if name not in known:
            raise UserError(no_such_flag(name, known, chosen))
        i += 1
        if name in FOLDERS:
            first, folders = i, [value] * bool(equals)
            while i < len(argv) and not argv[i].startswith("--"):
                i += 1
            value, equals = "\n".join(folders + argv[first:i]), "="
        if not equals and name in bare:
            value = "true"
            if i < len(argv) and argv[i].lower() in ("true", "false"):
                value, i = argv[i], i + 1
        elif not equals:
            if i == len(argv) or argv[i].startswith("--"):
                raise UserError(f"--{name} needs a value")
            value, i = argv[i], i + 1
        if not value.strip():
            raise UserError(f"--{name} needs a value")
        if name in flags:
            raise UserError(f"--{name} is given twice")
        flags[name] = value
    for name in BARE:
        if name in flags and not convert(name, flags[name], "bool"):
            del flags[name]
    return flags, chosen


def chosen_methods(argv):
    """What the methods of --method (or --check) declare; `all` is every one that can be read."""
    text = ""
    for i, word in enumerate(argv):
        name, equals, value = word.partition("=")
        if name.lower() in ("--method", "--check"):
            text = value if equals else next(iter(argv[i + 1 :]), "")
    if text.lower() == "all":
        known = catalogue()
        for m in known:
            if m.problem:
                leave_out(f"{m.name} cannot be read: {m.problem}")
        return [m for m in known if not m.problem]
    if not text.strip() or text.startswith("--"):
        return []
    chosen = [declared(name.strip()) for name in text.split(",")]
    names = [m.name for m in chosen]
    for m in chosen:
        if names.count(m.name) > 1:
            raise UserError(f"--method {text} names {m.name} twice")
        if m.problem:
            raise UserError(f"{m.path} cannot be read: {m.problem}")
    return chosen


def leave_out(reason):
    """Print why a method is left out under --method all, as one line on stderr."""
    print(f"left out: {printable(' '.join(reason.split()), None)}", file=sys.stderr)


def no_such_flag(name, known, chosen):
    """The message for an unknown flag: the methods that have it, or the most similar flag."""
    owners = [m.name for m in catalogue() if name in m.flags]
    if owners:
        mine = ", ".join(m.name for m in chosen)
        end = f"not of {mine}" if chosen else "and --method is not given"
        return f"--{name} is a flag of {', '.join(owners)}, {end}"
    for meant, others in ALIASES.items():
        if name in others.split():
            return f"unknown flag '--{name}'; did you mean --{meant}?"
    head = name.partition(".")[0]
    if head != name and head not in [m.name for m in chosen] and head in methods():
        return f"--{name} needs --method {head}"
    return unknown("flag", "--" + name, sorted("--" + n for n in known if "." not in n))


def convert(name, text, kind):
    """The text of a flag as a value of its field's type. UserError: it is not of that type."""
    parts = [part.strip() for part in kind.split("|")]
    for part in parts:
        with contextlib.suppress(ValueError):
            if part == "int" and re.fullmatch(r"[+-]?\d{1,4000}", text):
                return int(text)
            if part == "float" and not math.isnan(float(text)):
                return float(text)
            if part == "bool" and text.lower() in ("true", "false"):
                return text.lower() == "true"
            if part == "str":
                return text
    wanted = {"int": "a whole number", "float": "a number", "bool": "true or false"}
    what = " or ".join(wanted[part] for part in parts if part in wanted)
    raise UserError(f"--{name} {text}: not {what}")


def seeds_of(flags, grid):
    """The seeds of a command line with --seeds or --claim.

    --claim has REPORTED as its first seed, with --tuning TUNING, and as many as SEEDS. UserError:
    seeds from TUNING on are mixed with others, or given for what is no tuning.
    """
    if "claim" in flags:
        first = TUNING if {"tuning", "smoke"} & set(flags) else REPORTED
        grid = {"seed": [first]} | grid
        if len({seed >= TUNING for seed in grid["seed"]}) > 1:
            raise UserError(f"--seed: seeds from {TUNING} on are for --tuning only")
        if (grid["seed"][0] >= TUNING) != (first == TUNING):
            raise UserError(f"--seed {grid['seed'][0]}: --tuning has the seeds from {TUNING} on")
        if len(grid["seed"]) == 1:
            flags = {"seeds": "1" if "smoke" in flags else str(SEEDS)} | flags
    if "seeds" not in flags:
        return grid["seed"]
    first = grid.get("seed", [0])
    if len(first) > 1:
        raise UserError("--seeds and a list in --seed exclude each other")
    count = convert("seeds", flags["seeds"], "int")
    if not 1 <= count <= 100000:
        raise UserError(f"--seeds {count} must be between 1 and 100000")
    return list(range(first[0], first[0] + count))


def followed(picked, follow, settings, cfg, kinds):
    """The flags {name: value} that take the value of another one: {name: its name}.

    UserError: there is no such flag, or it follows another one itself."""
    out = {}
    for name, other in follow.items():
        known = vars(cfg) | vars(settings)
        if other not in known or other in follow:
            why = "follows another flag itself" if other in follow else "is no flag of this run"
            raise UserError(f"--{name} ={other}: --{other} {why}")
        value = picked.get(other, known[other])
        out[name] = value if value is None else convert(name, str(value), kinds[name])
    return out


def values_of(flags, chosen, follow):
    """{flag: its values}, without the flags that follow another one.

    A bare flag is for every chosen method that has the field. UserError: a value is not of its
    field's type or occurs twice; a bare flag has different meanings in several of the chosen
    methods, or is given together with the flag that names the method."""
    run, values = settings_flags(), {}
    known = run | {f"{m.name}.{f}": flag for m in chosen for f, flag in m.flags.items()}
    known |= {f: flag for m in chosen for f, flag in m.flags.items()}
    for name, text in flags.items():
        owners = [m for m in chosen if name in m.flags]
        for exact in (f"{m.name}.{name}" for m in owners):
            if exact in flags:
                raise UserError(f"--{name} and --{exact} are both given")
        if len({m.flags[name].meaning() for m in owners}) > 1:
            each = "; ".join(f"--{m.name}.{name}: {m.flags[name].text}" for m in owners)
            raise UserError(f"--{name} has several meanings here; use one of these: {each}")
        if name not in known or name in follow:
            continue
        if name in run and name in TEXTS:
            values[name] = [text]
            continue
        values[name] = [convert(name, part.strip(), known[name].kind) for part in text.split(",")]
        if len(set(values[name])) < len(values[name]):
            raise UserError(f"--{name} {text} names a value twice")
    return values


def defaults_of(paper, grid):
    """The run settings and Config fields that a method changes when it is the only one.

    There are none with --data. Settings that do nothing in the world of --world are left out.
    """
    if "data" in grid:
        return {}
    if "world" not in grid:
        return paper.defaults | paper.demo
    defaults = paper.defaults
    if len(defaults) > 1:  # more than the world itself
        there = Settings(**defaults | {"world": grid["world"][0]})
        without = idle(there, make_world(there))
        defaults = {name: value for name, value in defaults.items() if name not in without}
    return defaults


def combinations(flags, chosen):
    """The runs of a command line: all combinations of the values of its flags, checked.

    A flag with the value =NAME follows another one: --flip 0.1,0.2 --epsilon =flip. With --method
    all, a method that ignores one of the flags, or whose file fails, is left out, and that is
    printed."""
    run = settings_flags()
    follow = {n: text[1:] for n, text in flags.items() if text.startswith("=") and n not in TEXTS}
    if follow and not chosen:
        raise UserError(f"--{next(iter(follow))} ={next(iter(follow.values()))} needs --method")
    values = values_of(flags, chosen, follow)
    grid = {name: found for name, found in values.items() if name in run}
    if {"claim", "seeds"} & set(flags):
        grid["seed"] = seeds_of(flags, grid)
    if not chosen:
        grids = itertools.product(*grid.values())
        return [Run(None, None, None, Settings(**dict(zip(grid, v))), None, {}) for v in grids]
    runs, everything = [], flags.get("method", "").lower() == "all"
    for method in chosen:
        try:
            module, paper = load_file("method", method.path), method.paper
            if everything:
                configured(module, {})  # a value of a flag that it refuses is the user's mistake
        except UserError as error:
            if not everything:
                raise
            reason = str(error).replace(method.path, method.name)
            leave_out(reason if method.name in reason else f"{method.name}: {reason}")
            continue
        # the flags of the run, and those that set a field of this method's Config
        own = {f: f if f in flags else f"{method.name}.{f}" for f in method.flags}
        full = grid | {f: values[name] for f, name in own.items() if name in values}
        followers = {name: other for name, other in follow.items() if name in run}
        followers |= {f: follow[name] for f, name in own.items() if name in follow}
        kinds = {n: (run.get(n) or method.flags.get(n)).kind for n in followers}
        defaults = defaults_of(paper, grid) if len(chosen) == 1 else {}
        ignored = [name for name in paper.ignores if name in grid or name in followers]
        if ignored and everything:
            leave_out(f"--{', --'.join(ignored)} does nothing under {method.name}")
            continue
        if ignored:
            raise UserError(f"--{', --'.join(ignored)} does nothing under {method.name}")
        for point in itertools.product(*full.values()):
            picked = dict(zip(full, point))
            both = defaults | picked
            settings = Settings(**{k: v for k, v in both.items() if k in run})
            cfg = configured(module, {k: v for k, v in both.items() if k not in run})
            if followers:
                both |= followed(both, followers, settings, cfg, kinds)
                settings = Settings(**{k: v for k, v in both.items() if k in run})
                cfg = configured(module, {k: v for k, v in both.items() if k not in run})
            varied = {"method": method.name} if len(chosen) > 1 else {}
            varied |= {k: v for k, v in picked.items() if len(full[k]) > 1}
            runs.append(Run(method.name, module, paper, settings, cfg, varied))
    known = set()
    for run in runs:
        about = run.method, str(run.settings), str(run.cfg)
        if about in known:  # --variant ipo,IPO
            raise UserError(f"two runs are the same: {run.name()}")
        known.add(about)
    return runs


# ---------------------------------------------------------------- what fits together


def refuse_idle_actions(flags, runs):
    """Refuse flags that have no effect together with the action. UserError: there are some."""
    if not {"prompt", "judge", *FOLDERS} & set(flags) and runs[0].method is None:
        raise UserError("--method is needed (see --list)")
    for name in ("smoke", "tuning"):
        if name in flags and "claim" not in flags:
            raise UserError(f"--{name} needs --claim")
    model = {"init", "world", "data", "device", "dtype", "base_seed", "base_steps"}
    answer = {"temperature", "seed", "max_response", "context", "truncate"}
    one_seed = {"seeds", "seed", "out", "overwrite", "device", "dtype", "compile", "capture"}
    spread = {"jobs", "shard"}
    fields = {name for name in flags if name not in settings_flags() and name not in ACTIONS}
    takes = dict(
        prompt=model | answer,
        compare={"out", "overwrite"},
        merge={"out", "overwrite"},
        judge={"method"},
        check={"world", "device", "seed"} | fields,
        claim={"method", "smoke", "tuning"} | one_seed | spread,
        show=set(flags) - {"out", "overwrite", "seeds", *ACTIONS} | {"method"},
    )
    for action, useful in takes.items():
        if action not in flags:
            continue
        idle_flags = sorted(set(flags) - useful - {action})
        if idle_flags and action == "claim":
            raise UserError(
                f"--{', --'.join(idle_flags)}: --claim sets its own data and hyper-parameters; "
                f"it takes --{', --'.join(sorted(one_seed))}"
            )
        if idle_flags:
            raise UserError(f"--{', --'.join(idle_flags)} does nothing together with --{action}")
        if action == "show" and "loss" not in runs[0].paper.core:
            raise UserError(f"{runs[0].method} does not align, so there is no row to --show")
        if action == "show" and runs[0].settings.steps == 0:
            raise UserError("--steps 0 trains nothing, so there is no row to --show")
        if action not in ("claim", "judge") and len(runs) > 1:
            raise UserError(f"--{action} takes one value for each flag, and one method")
        if action == "claim" and len({r.settings.seed for r in runs}) * len(
            {r.method for r in runs}
        ) < len(runs):
            raise UserError("--claim takes one value for --device, --dtype, --compile, --capture")
        break
    if {"jobs", "shard"} & set(flags):
        refuse_idle_spread(flags, runs)
    greedy = "temperature" not in flags or runs[0].settings.temperature == 0
    if "prompt" in flags and "seed" in flags and greedy:
        raise UserError("--seed does nothing with a greedy --prompt; --temperature 1 samples")


def refuse_idle_spread(flags, runs):
    """Refuse --jobs or --shard, one of which is given, where it cannot work (UserError)."""
    given = [name for name in ("jobs", "shard") if name in flags]
    if "smoke" in flags:
        raise UserError(f"--{given[0]} does nothing together with --smoke")
    if len(given) > 1:
        raise UserError("--jobs and --shard exclude each other: a shard is one process")
    tasks = {run.method for run in runs} if "claim" in flags else runs
    if len(tasks) < 2:
        what = "the claims of one paper" if "claim" in flags else "one run"
        raise UserError(f"--{given[0]} does nothing with {what}")
    if "shard" in flags and "out" not in flags:
        raise UserError("--shard needs --out: a folder that all shards share, or one for each")
    if "shard" in flags and "overwrite" in flags:
        raise UserError("--overwrite would remove what other shards have finished")
    if "shard" in flags:
        read_shard(flags["shard"])
    jobs = convert("jobs", flags.get("jobs", "1"), "int")
    if not 1 <= jobs <= 1024:
        raise UserError(f"--jobs {jobs} must be between 1 and 1024")


def fitting(runs, flags):
    """The runs whose methods can use their worlds; with --method all, other runs are left out.

    UserError, before anything is trained: a setting, a device or a world does not fit.
    """
    kept, made, left, rehearsed = [], {}, set(), set()
    everything = flags.get("method", "").lower() == "all"
    for run in runs:
        s = run.settings
        pick_device(s.device)
        key = (s.world, s.data, s.init, s.context, s.image_size, s.truncate, s.prompts, s.verify)
        if key not in made:
            start = load_pretrained(s.init) if s.init else None
            made[key] = make_world(s, start), start
        world, start = made[key]
        refuse_idle(s, world, start)
        # evaluations of a table are exact, without samples and without autocast
        exact = {"eval_size", "base_seed", "dtype"} if world.kind == "table" else set()
        if exact & set(flags):
            names = ", --".join(sorted(exact & set(flags)))
            raise UserError(f"--{names} would do nothing in {world.name}")
        steps = world.align.get("steps", 0) if s.steps is None else s.steps
        if "warmup" in flags and s.warmup > max(1, steps // 5):
            raise UserError(
                f"--warmup {s.warmup} exceeds a fifth of the steps, {steps // 5} of {steps}"
            )
        try:
            refuse_method(run.method, run.paper, world, s)
            seen = (run.method, str(run.cfg), str(dataclasses.replace(s, seed=0)))
            if seen not in rehearsed:  # the checks do not depend on the seed
                rehearse(run, world, start)
            rehearsed.add(seen)
            kept.append(run)
        except UserError as error:
            if not everything:
                raise UserError(f"{run.name()}: {error}" if run.varied else str(error)) from None
            if run.method not in left:
                named = "" if str(error).startswith(run.method) else f"{run.method}: "
                reason, _, rest = str(error).rpartition("; ")
                if not rest.endswith(CAN):
                    reason = str(error)
                leave_out(f"{named}{reason}")
            left.add(run.method)
        except Exception as error:
            if not everything:
                raise
            if run.method not in left:
                leave_out(f"{run.method}: {line_in(run.module.__file__, error)}")
            left.add(run.method)
    if not kept:
        raise UserError("no method can use this world")
    return kept


def label(runs, flags):
    """METHOD-WORLD, the name of the default folder of a run, a sweep or a claim."""
    if "compare" in flags:
        return "compare"
    settings = runs[0].settings
    place = os.path.basename((settings.data or settings.world or "reviews").rstrip("/" + os.sep))
    place = "claim" if "claim" in flags else re.sub(ENDINGS, "", place)
    name = runs[0].method if len({run.method for run in runs}) == 1 else "sweep"
    return f"{name}-{place}"


def claims_path(module):
    """The claims of a method: claims/NAME.py, or beside a user's file NAME_claims.py; or None."""
    folder, name = os.path.split(module.__file__)
    path = os.path.join(folder, name[:-3] + "_claims.py")
    if folder == os.path.join(HERE, "methods"):
        path = os.path.join(HERE, "claims", name)
    return path if os.path.isfile(path) else None


def load_claims(module):
    """The module that measures the claims of a method."""
    path, name = claims_path(module), module.__name__.split(".")[-1]
    if path is None:
        raise UserError(f"{name} has no claims (there is no claims/{name}.py or {name}_claims.py)")
    measured = load_file("method", path)
    for needed in ("measure", "CLAIMS"):
        if not hasattr(measured, needed):
            raise UserError(f"{path} has no {needed}")
    return measured


def refuse_method(method, paper, world, settings):
    """Check that a method can use a world; else UserError, which names the methods that can."""

    def able(fits):
        papers = [(m.name, m.paper) for m in catalogue() if not m.problem]
        return ", ".join(name for name, p in papers if fits(p)) + CAN

    lacking = [n for n in ("verifier", "reward", "criteria") if not getattr(world, n)]
    if world.kind not in paper.worlds:
        raise UserError(
            f"{method} needs a world of {' or '.join(paper.worlds)}, but {world.name} is one of "
            f"{world.kind}; {able(lambda p: world.kind in p.worlds and p.needs not in lacking)}"
        )
    if paper.needs in lacking:
        some = paper.needs if paper.needs == "criteria" else f"a {paper.needs}"
        raise UserError(
            f"{method} needs a world with {some}, but {world.name} has none; "
            f"{able(lambda p: world.kind in p.worlds and p.needs not in lacking)}"
        )
    if paper.needs != "demonstrations" and world.single:
        raise UserError(
            f"{world.name} has single answers (completion/label), "
            f"but {method} needs {paper.needs}; "
            f"{able(lambda p: p.needs == 'demonstrations')}"
        )
    if paper.family == "lists" and world.lists is not None:
        # these lists are graded by the true reward, so there is no noise on labels
        noise = ("flip", "label_temperature", "length_bias")
        changed = [n for n in noise if getattr(settings, n) != getattr(Settings, n)]
        if changed:
            names = ", --".join(changed)
            raise UserError(f"--{names} would do nothing with the lists of {world.name}")
        world.lists(1, torch.Generator(), settings.k)
