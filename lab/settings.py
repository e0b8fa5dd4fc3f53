"""Run settings, and the device and the world that they name."""

import contextlib
import difflib
import importlib
import importlib.util
import math
import os
import re
import sys
import traceback
from dataclasses import dataclass

import torch

import nanomodel
import toy.world
from data import Tokenizer, UserError, error_line, printable
from lab.store import HERE

KINDS = ("text", "images", "table", "vectors")  # of world

# ---------------------------------------------------------------- run settings


@dataclass
class Settings:
    """The settings of a run, besides a paper's own hyper-parameters. None: the world's default.

    The comment beside a field, or above it, is its text in --help. UserError: a value is out of
    range.
    """

    # a toy world (see --list), or a file of your own, path/to/my_world.py [the method's, reviews]
    world: str | None = None
    # preferences instead of a toy world: .jsonl, .json, .csv (also .gz), .parquet, a Hub name; or
    # images: .npz
    data: str | None = None
    # sample responses to the questions of --data and verify their final answers, for methods that
    # sample while they train; the file's own right responses say what the answers are
    verify: bool = False
    # a checkpoint folder or Hub name to start from, instead of training a base model
    init: str | None = None
    steps: int | None = None  # optimizer steps of alignment in all; 0 evaluates without training
    batch_size: int | None = None  # rows (prompts with their responses) per step
    lr: float | None = None  # peak learning rate of alignment
    # rank of LoRA: text models get adapters of this rank, and everything else is frozen; a larger
    # --lr is usual, such as ten times as much [all weights are trained]
    lora: int | None = None
    warmup: int = 20  # steps of linear warm-up, at most a fifth of all steps
    # adamw, or a method or a file of your own that has one (dct_adamw); base models have AdamW
    optimizer: str = "adamw"
    clip: float = 1.0  # largest gradient norm of each parameter group; inf: no clipping
    prompts: int | None = None  # number of training prompts (toy worlds), or of rows of --data
    k: int | None = None  # responses sampled per prompt, if the method leaves the choice
    seed: int = 0  # seed of sampling, labels and the order of the data
    base_seed: int = 0  # seed of the base model; it does not depend on --seed
    base_steps: int | None = None  # supervised steps of the base model
    temperature: float = 1.0  # temperature of sampling
    # classifier-free guidance of sampled images: 1 is none, more follows the prompt more closely
    guidance: float = 1.0
    # decay of a moving average of the weights, with which aligned models are evaluated; 0: none
    ema: float = 0.0
    # temperature of the labels; 0 always prefers the response with more reward
    label_temperature: float = 1.0
    flip: float = 0.0  # share of labels that are flipped, 0 to 1
    length_bias: float = 0.0  # reward that the labels add for each token of length
    device: str = "auto"  # cpu, cuda, mps; auto: cuda or mps where there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: str = "auto"  # torch.compile: on or off; auto: on CUDA, where a run is long enough
    # whole steps as CUDA graphs: on, off; auto: on CUDA. On a CPU, on takes the same path without
    capture: str = "auto"
    eval_every: int | None = None  # steps between two quick evaluations during training
    eval_size: int | None = None  # largest number of prompts and held-out pairs of an evaluation
    context: int | None = None  # context length of a model trained from scratch on --data
    max_response: int | None = None  # largest number of tokens sampled per response
    # cut prompts and responses that do not fit into the context, instead of refusing them
    truncate: bool = False
    data_limit: float = 0.5  # GiB of memory that the rows or images of --data may take
    image_size: int | None = None  # height and width of images of an .npz [halved if over 16]
    out: str | None = None  # the folder to write [out/METHOD-WORLD-N]
    overwrite: bool = False  # replace the run in the --out folder

    def __post_init__(self):
        for name in ("device", "dtype", "compile", "capture"):  # names, without regard to case
            setattr(self, name, str(getattr(self, name)).lower())
        known = {name.lower(): name for name in ("adamw", *methods())}
        self.optimizer = known.get(self.optimizer.lower(), self.optimizer)
        million, billion = 10**6, 10**9
        for name, (low, high) in dict(
            steps=(0, billion),
            base_steps=(0, billion),
            batch_size=(1, million),
            warmup=(0, billion),
            prompts=(1, 100 * million),
            k=(2, 4096),
            lora=(1, million),
            eval_every=(1, billion),
            eval_size=(2, million),
            max_response=(1, million),
            context=(8, million),
            image_size=(2, 4096),
        ).items():
            value = getattr(self, name)
            if value is not None and not low <= value <= high:
                side = f"at least {low}" if value < low else f"at most {high}"
                raise UserError(f"--{name} {value} must be {side}")
        if not self.clip > 0:
            raise UserError(f"--clip {self.clip} must be positive; inf switches it off")
        for name in ("lr", "data_limit"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)} must be positive and finite")
        for name in ("temperature", "label_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)} must be 0 or more and finite")
        if not 0 <= self.flip <= 1:
            raise UserError(f"--flip {self.flip} must be between 0 and 1")
        if not 0 <= self.guidance <= 100:
            raise UserError(f"--guidance {self.guidance} must be between 0 and 100")
        if not 0 <= self.ema < 1:
            raise UserError(f"--ema {self.ema} must be at least 0 and below 1")
        if not abs(self.length_bias) < million:
            raise UserError(f"--length_bias {self.length_bias} must be below a million")
        for name in ("seed", "base_seed"):
            if abs(getattr(self, name)) >= 2**63:
                raise UserError(f"--{name} {getattr(self, name)} must fit into 64 bits")
        choices = dict(dtype=("auto", "float32", "bfloat16"), compile=("auto", "on", "off"))
        choices |= dict(capture=("auto", "on", "off"))
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"--{name} {getattr(self, name)} must be one of {', '.join(allowed)}"
                )


# ---------------------------------------------------------------- device, model, world


def pick_device(name):
    """The torch device of --device. UserError: this machine does not have it.

    auto is what the environment variable NANOPREF_DEVICE says, or else the best that there is.
    """
    name = os.environ.get("NANOPREF_DEVICE", "auto") if name == "auto" else name
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        if device.type not in ("cpu", "cuda", "mps"):
            raise RuntimeError
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        here = ["cpu", "cuda", "mps"]
        here = [d for d in here if d == "cpu" or getattr(torch, d).is_available()]
        raise UserError(
            f"--device {name} is not available (torch {torch.__version__} has {', '.join(here)})"
        ) from None
    return device


PAYS = 1500  # steps from which torch.compile saves more time than it takes


def pick_compile(settings, steps):
    """What --compile auto means on CUDA, and why -> (bool, text for the header).

    Compiling log-probs and losses takes about a minute. Toy models gain nothing where whole steps
    are captured.
    """
    if not (settings.init or settings.data):
        return False, " (a toy model gains nothing)"
    if steps < PAYS:
        return False, f" (it pays from {PAYS} steps on)"
    return True, f" ({steps} steps pay for it)"


def pick_optimizer(name):
    """The function (params, lr) -> optimizer of an --optimizer other than adamw.

    As in torch.optim, params are tensors, or dicts with tensors `params` and a rate `lr` of their
    own (ofs_dpo, kdiff).
    UserError: there is no such method or file, or it has no function `optimizer`.
    """
    if file_path("optimizer", name):
        module = load_file("optimizer", name)
    elif name in methods():
        module = importlib.import_module(f"methods.{name}")
    else:
        raise UserError(unknown("optimizer", name, ["adamw", *methods()]))
    if not hasattr(module, "optimizer"):
        raise UserError(f"--optimizer {name}: the file has no function optimizer(params, lr)")
    return module.optimizer


def make_world(settings, start=None):
    """The World of --world, or of --data; `start` is the model of --init."""
    if settings.data:
        if settings.world:
            raise UserError("--world and --data exclude each other")
        if settings.data.endswith(".npz"):
            return importlib.import_module("toy.digits").World.from_npz(
                settings.data, settings.image_size, int(settings.data_limit * 2**30)
            )
        if start is not None and not isinstance(start, nanomodel.GPT):
            kind = type(start).__name__
            raise UserError(f"--init {settings.init} is a {kind}, --data {settings.data} is text")
        return importlib.import_module("toy.verified" if settings.verify else "toy.files").World(
            settings.data,
            Tokenizer.text() if start is None else start.tokenizer,
            context=settings.context or 512,
            seed=settings.base_seed,
            from_checkpoint=start is not None,
            limit=int(settings.data_limit * 2**30),
        )
    for_data = ("image_size", "truncate", "context", "data_limit", "verify")
    if any(getattr(settings, name) != getattr(Settings, name) for name in for_data):
        raise UserError(
            "--image_size, --truncate, --context, --data_limit and --verify are for --data"
        )
    world = settings.world or "reviews"
    if isinstance(world, str):
        world = new_world(world)
    if getattr(start, "tokenizer", None) is not None:
        world.tokenizer = start.tokenizer
    return world


def world_module(name):
    """The module of a world: one of toy/, or a user's own file."""
    names = {known.lower(): known for known in worlds()}
    if name.lower() in names:
        return importlib.import_module(f"toy.{names[name.lower()]}")
    if not file_path("world", name):
        raise UserError(unknown("world", name, worlds()))
    module = load_file("world", name)
    if not hasattr(module, "World"):
        raise UserError(f"--world {name} has no class World")
    return module


def new_world(name):
    """A new World of toy/, or of a user's own file. UserError: the World of the file has a fault.

    It is not a subclass of toy.world.World, it fails while it is made, its kind is unknown, or its
    `align` is not a dict."""
    module, path = world_module(name), file_path("world", name)
    if not (isinstance(module.World, type) and issubclass(module.World, toy.world.World)):
        raise UserError(f"{path}: World must be a subclass of toy.world.World")
    with slips(path):
        world = module.World()
    if world.kind not in KINDS:
        raise UserError(f"{path}: kind is {world.kind!r}, expected one of {', '.join(KINDS)}")
    if not isinstance(world.align, dict):
        raise UserError(f"{path}: align is {world.align!r}, expected a dict of run settings")
    return world


def idle(settings, world):
    """Names of the settings that were changed although they have no effect in this world."""
    names = []
    if settings.data and world.given is not None:
        names += ["flip", "label_temperature", "length_bias", "image_size", "k"]
    if world.given is not None:
        names += ["flip", "label_temperature", "k"]
    if world.verifier:
        names += ["label_temperature", "length_bias"]
    if world.kind != "text":
        names += [
            "max_response",
            "length_bias",
            "temperature",
            "context",
            "truncate",
            "lora",
            "verify",
        ]
    if not world.guided:
        names += ["guidance"]
    if world.kind == "vectors":  # no policy, no labels of preference, and nothing random but --seed
        names += ["prompts", "k", "flip", "label_temperature", "eval_size", "base_seed"]
        names += ["dtype", "compile", "ema"]
    if settings.init:
        names += ["base_steps", "context"]
    if not world.pretrain:
        names += ["base_steps"]
    return [n for n in dict.fromkeys(names) if getattr(settings, n) != getattr(Settings, n)]


def refuse_idle(settings, world, start):
    """Refuse settings without effect in this world, and an --init of another kind (UserError)."""
    fits = {"text": nanomodel.GPT, "images": nanomodel.UNet}.get(world.kind, ())
    if start is not None and not isinstance(start, fits):
        raise UserError(
            f"--init {settings.init} is a {type(start).__name__}, "
            f"{world.name} is a world of {world.kind}"
        )
    if isinstance(start, nanomodel.UNet):
        model = world.model()
        if start.shape != model.shape:
            raise UserError(
                f"--init {settings.init} makes images of shape {start.shape}, "
                f"{world.name} has {model.shape}"
            )
        if start.classes != model.classes:
            raise UserError(
                f"--init {settings.init} makes images of {start.classes} classes, "
                f"{world.name} has {model.classes}"
            )
    bad = idle(settings, world)
    if bad:
        where = f"{world.name} with --init" if settings.init else world.name
        raise UserError(f"--{', --'.join(bad)} would do nothing in {where}")


def worlds():
    """Names of the toy worlds."""
    other = ("__init__.py", "chains.py", "exact.py", "files.py", "verified.py", "world.py")
    names = os.listdir(os.path.join(HERE, "toy"))
    return sorted(n[:-3] for n in names if n.endswith(".py") and n not in other and n[0] != "_")


# ---------------------------------------------------------------- a user's own files

loaded = {}  # {module name: path} of the files that `load_file` has imported


def file_path(kind, name):
    """The absolute path of a user's own method or world; None if `name` is a name, not a path.

    kind: "method", "world" or "optimizer", for the message. UserError: it is no Python file."""
    if not (name.endswith(".py") or "/" in name or os.sep in name):
        return None
    path = os.path.abspath(name)
    if not os.path.isfile(path) and os.path.isfile(path + ".py"):
        path += ".py"
    if not os.path.isfile(path):
        raise UserError(f"--{kind} {name}: there is no such file")
    stem = os.path.basename(path)[:-3]
    if not path.endswith(".py") or not re.fullmatch(r"_?[A-Za-z]\w*", stem):
        raise UserError(f"--{kind} {name}: the file needs a name such as my_{kind}.py")
    return path


def load_file(kind, name):
    """Import a method or world from its file -> the module.

    Files of this project are modules of its packages. A user's own file has the module name of the
    file, and its folder is put last on the import path, so that it may import others next to it.
    UserError: the file cannot be imported, or its name is that of another module.
    """
    path = file_path(kind, name)
    stem, folder = os.path.basename(path)[:-3], os.path.dirname(path)
    if folder in [os.path.join(HERE, ours) for ours in ("methods", "toy", "claims")]:
        with readable(path):
            return importlib.import_module(f"{os.path.basename(folder)}.{stem}")
    if loaded.get(stem) == path:
        return sys.modules[stem]
    if stem not in loaded:
        taken = importlib.util.find_spec(stem)
        if taken is not None and taken.origin != path:
            raise UserError(f"--{kind} {name}: a module {stem} exists already; rename the file")
    if folder not in sys.path:
        sys.path.append(folder)
    spec = importlib.util.spec_from_file_location(stem, path)
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    try:
        with readable(path):
            spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[stem]
        raise
    loaded[stem] = path
    return module


@contextlib.contextmanager
def readable(path):
    """Turn any error in the import of the file at `path` into a UserError with the line."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a file may raise anything, SystemExit included
        lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
        line = error.lineno if isinstance(error, SyntaxError) else (lines or ["?"])[-1]
        text = error.msg if isinstance(error, SyntaxError) else f"{type(error).__name__}: {error}"
        raise UserError(f"{path} cannot be read: line {line}: {text}") from error


def line_in(path, error):
    """Where an error was raised in the file at `path`, "PATH, line N: TYPE: MESSAGE"."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    text = printable(f"{type(error).__name__}: {error_line(error)}")
    return f"{path}, line {lines[-1]}: {text}" if lines else f"{path}: {text}"


@contextlib.contextmanager
def slips(path):
    """Turn any error of the user's code in the file at `path` into a UserError with the line.

    path: None stands for code of this project, whose errors stay as they are."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # noqa: BLE001 - it may raise anything
        if path is None:
            raise
        raise UserError(line_in(path, error)) from error


def methods():
    """Names of the methods in methods/."""
    names = os.listdir(os.path.join(HERE, "methods"))
    return sorted(n[:-3] for n in names if n.endswith(".py") and n[0] not in "_.")


def title(module):
    """The first paragraph of a method file's docstring: name, title, year and arXiv number."""
    return " ".join((module.__doc__ or module.__name__).strip().split("\n\n")[0].split())


def unknown(kind, name, known):
    """The message for an unknown name, with the most similar name that is known."""
    near = difflib.get_close_matches(name.lower(), known, 1, 0.5)
    end = f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    return f"unknown {kind} {name!r}{end}"
