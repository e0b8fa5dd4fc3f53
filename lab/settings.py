"""Run settings, the world and the device that they name, and what they may not ask for."""

import difflib
import importlib
import math
import os
from dataclasses import dataclass

import torch

import nanomodel
from data import Paper, Tokenizer, UserError
from lab.store import HERE


@dataclass
class Settings:
    """Run settings: what a run does apart from the paper's own hyper-parameters. None: the world's default."""

    world: str | None = None  # toy world (see --list); default: the method's, else reviews
    data: str | None = (
        None  # preferences instead of a toy world: .jsonl[.gz], .parquet, a Hub name; or images: .npz
    )
    init: str | None = (
        None  # checkpoint folder or Hub name to start from, instead of training a base model
    )
    steps: int | None = None  # optimizer steps of alignment in all; 0 evaluates without training
    batch_size: int | None = None  # rows (prompts with their responses) a step
    lr: float | None = None  # peak learning rate of alignment
    warmup: int = 20  # steps of linear warm-up
    clip: float = 1.0  # largest gradient norm, for each parameter group by itself
    prompts: int | None = None  # training prompts (toy worlds), or at most so many rows of --data
    k: int | None = None  # responses sampled for a prompt, where the method lets you choose
    seed: int = 0  # sampling, labels and order of the data
    base_seed: int = 0  # the base model's own seed: it does not depend on --seed
    base_steps: int | None = None  # supervised steps of the base model
    temperature: float = 1.0  # of sampling
    label_temperature: float = 1.0  # of the annotator: 0 always prefers the better response
    flip: float = 0.0  # share of labels turned round, 0 to 1
    length_bias: float = 0.0  # reward that the annotator gives for each token of length
    device: str = "auto"  # cpu, cuda, mps; auto takes CUDA where there is one
    dtype: str = "auto"  # float32 or bfloat16 (autocast); auto: bfloat16 on CUDA
    compile: str = "auto"  # on, off; auto: on CUDA only
    eval_every: int | None = None  # steps between two looks at the policy while it trains
    eval_size: int = 256  # prompts and held-out pairs of an evaluation, at most
    context: int | None = None  # tokens of the context of a model trained from scratch on --data
    max_response: int | None = None  # tokens sampled for a response, at most
    truncate: bool = False  # cut prompts and responses that do not fit into the context, instead of refusing them
    data_limit: float = 1.0  # GiB that --data may have once it is unpacked
    image_size: int | None = (
        None  # side of the images of an .npz; default: halved when it is over 16
    )
    out: str | None = None  # the folder to write; default: out/METHOD-WORLD-N
    overwrite: bool = False  # empty the --out folder first

    def __post_init__(self):
        for name, low in dict(
            steps=0,
            base_steps=0,
            batch_size=1,
            warmup=0,
            prompts=1,
            k=2,
            eval_every=1,
            eval_size=2,
            max_response=1,
            context=8,
        ).items():
            if getattr(self, name) is not None and getattr(self, name) < low:
                raise UserError(f"--{name} {getattr(self, name)} must be at least {low}")
        for name in ("lr", "clip", "data_limit"):
            if getattr(self, name) is not None and not 0 < getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)} must be positive and finite")
        for name in ("temperature", "label_temperature"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"--{name} {getattr(self, name)} must be 0 or more and finite")
        if self.image_size is not None and self.image_size < 2:
            raise UserError(f"--image_size {self.image_size} must be at least 2")
        if not 0 <= self.flip <= 1:
            raise UserError(f"--flip {self.flip} must be between 0 and 1")
        if not abs(self.length_bias) < 1e6:
            raise UserError(f"--length_bias {self.length_bias} must be below a million")
        for name in ("seed", "base_seed"):
            if abs(getattr(self, name)) >= 2**63:
                raise UserError(f"--{name} {getattr(self, name)} must fit into 64 bits")
        for name, allowed in dict(
            dtype=("auto", "float32", "bfloat16"), compile=("auto", "on", "off")
        ).items():
            if getattr(self, name) not in allowed:
                raise UserError(
                    f"--{name} {getattr(self, name)} must be one of {', '.join(allowed)}"
                )


def pick_device(name):
    """The torch device of --device; ValueError when it is not there."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError):
        raise UserError(
            f"--device {name} is not there (this torch {torch.__version__} sees: cpu{', cuda' * torch.cuda.is_available()})"
        ) from None
    return device


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
        return importlib.import_module("toy.files").World(
            settings.data,
            Tokenizer.text() if start is None else start.tokenizer,
            context=settings.context or 512,
            seed=settings.base_seed,
            from_checkpoint=start is not None,
            limit=int(settings.data_limit * 2**30),
        )
    for_data = ("image_size", "truncate", "context", "data_limit")
    if any(getattr(settings, name) != getattr(Settings, name) for name in for_data):
        raise UserError("--image_size, --truncate, --context and --data_limit are for --data")
    name = settings.world or "reviews"
    if name not in worlds():
        raise UserError(unknown("world", name, worlds()))
    world = importlib.import_module(f"toy.{name}").World()
    if getattr(start, "tokenizer", None) is not None:
        world.tokenizer = start.tokenizer
    return world


def idle(settings, world):
    """Names of the settings that are set and would do nothing in this world."""
    names = (
        ["flip", "label_temperature", "length_bias", "image_size", "k"]
        if settings.data and world.kind == "text"
        else []
    )
    names += ["label_temperature", "length_bias"] if world.verifier else []
    names += (
        []
        if world.kind == "text"
        else ["max_response", "length_bias", "temperature", "context", "truncate"]
    )
    names += ["base_steps", "context"] if settings.init else []
    names += [] if world.pretrain else ["base_steps"]
    return [
        name for name in dict.fromkeys(names) if getattr(settings, name) != getattr(Settings, name)
    ]


def refuse_idle(settings, world, start):
    """ValueError naming settings that would do nothing in this world, and a model of --init that is none of this world's kind."""
    fits = {"text": nanomodel.GPT, "images": nanomodel.UNet}.get(world.kind, ())
    if start is not None and not isinstance(start, fits):
        raise UserError(
            f"--init {settings.init} is a {type(start).__name__}, {world.name} is a world of {world.kind}"
        )
    if isinstance(start, nanomodel.UNet) and (start.shape, start.classes) != (
        world.model().shape,
        world.model().classes,
    ):
        raise UserError(
            f"--init {settings.init} makes images of shape {start.shape}, {world.name} has {world.model().shape}"
        )
    bad = idle(settings, world)
    if bad:
        raise UserError(
            f"--{', --'.join(bad)} would do nothing in {world.name}"
            + (" with --init" if settings.init else "")
        )


def worlds():
    """Names of the toy worlds."""
    return sorted(
        f[:-3]
        for f in os.listdir(os.path.join(HERE, "toy"))
        if f.endswith(".py") and f not in ("__init__.py", "exact.py", "files.py", "world.py")
    )


def methods():
    """Names of the methods."""
    return sorted(
        f[:-3]
        for f in os.listdir(os.path.join(HERE, "methods"))
        if f.endswith(".py") and f != "__init__.py"
    )


def paper(module):
    """The Paper of a method file; built from its constants where a file still has those."""
    if hasattr(module, "PAPER"):
        return module.PAPER
    needs = getattr(module, "NEEDS", "pairs or lists")
    unused = getattr(module, "UNUSED", ())
    return Paper(module.FAMILY, module.KINDS, needs, unused, module.DEFAULTS)


def title(module):
    """The first paragraph of a method file's docstring: name, title, year and arXiv number."""
    return " ".join((module.__doc__ or module.__name__).strip().split("\n\n")[0].split())


def unknown(kind, name, known):
    """A line about a name that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(name, known, 1, 0.5)
    return f"unknown {kind} {name!r}" + (
        f"; did you mean {near[0]}?" if near else f"; there are {', '.join(known)}"
    )
