"""Values on disk: files written in one step, tensors, JSON, and the cache.

Nothing here unpickles or executes anything: tensors are safetensors, everything else is JSON.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import subprocess
import tempfile
import time

import torch

from data import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.environ.get("NANOPREF_CACHE") or os.path.join(HERE, ".cache")

# ---------------------------------------------------------------- files


def write_beside(path, write):
    """Call `write(temporary_path)` in the folder of `path`, then rename.

    Readers see the old file or the new one, never half of one."""
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(handle)
    try:
        write(temporary)
        mask = os.umask(0)
        os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def write_text(path, text):
    """Write a text file in one step (see write_beside)."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_beside(path, write)


def save_tensors(path, tensors, metadata=None):
    """Write {name: tensor} as safetensors in one step; tied or strided tensors are copied."""
    from safetensors.torch import save

    copies = {name: x.detach().cpu().contiguous().clone() for name, x in tensors.items()}
    data = save(copies, metadata or {"format": "pt"})

    def write(temporary):
        with open(temporary, "wb") as file:
            file.write(data)

    write_beside(path, write)


def load_tensors(path):
    """{name: tensor} of one safetensors file; UserError when it is not one."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def write_json(path, value):
    """Write JSON in one step; NaN becomes null."""

    def clean(x):
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        return [clean(v) for v in x] if isinstance(x, (list, tuple)) else x

    write_text(path, json.dumps(clean(value), indent=1) + "\n")


# ---------------------------------------------------------------- values in files


def pack(value, tensors):
    """A copy of nested dicts, lists, numbers and texts for JSON; tensors go into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value
        return {"__tensor__": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {str(k): pack(v, tensors) for k, v in value.items() if k != "tree"}
    if isinstance(value, (list, tuple)):
        if value and all(type(v) in (int, float) for v in value):
            return list(value)
        return [pack(v, tensors) for v in value]
    return value


def unpack(value, tensors):
    """The value that `pack` took apart."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: unpack(v, tensors) for k, v in value.items()}
    return [unpack(v, tensors) for v in value] if isinstance(value, list) else value


def save_value(path, value):
    """Write a value as `path`.json, and its tensors (if any) as safetensors beside it.

    The JSON comes last and makes the value whole."""
    tensors = {}
    packed, name = pack(value, tensors), None
    if tensors:  # a name of its own: the file that an older JSON points to must not change under it
        name = f"{os.path.basename(path)}.{os.getpid()}-{time.monotonic_ns()}.safetensors"
        save_tensors(os.path.join(os.path.dirname(path), name), tensors)
    old = _tensor_file(path)
    write_text(path + ".json", json.dumps({"tensors": name, "value": packed}))
    if old and old != name:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(os.path.join(os.path.dirname(path), old))


def _tensor_file(path):
    with contextlib.suppress(OSError, json.JSONDecodeError, KeyError, TypeError):
        with open(path + ".json", encoding="utf-8") as file:
            return os.path.basename(json.load(file)["tensors"] or "")


def load_value(path):
    """The value written by `save_value`, or None when there is none (or it is damaged)."""
    try:
        with open(path + ".json", encoding="utf-8") as file:
            packed = json.load(file)
        name = packed["tensors"]
        tensors = {}
        if name:
            tensors = load_tensors(os.path.join(os.path.dirname(path), os.path.basename(name)))
        return unpack(packed["value"], tensors)
    except (OSError, ValueError, KeyError):
        return None


def digest(*parts):
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@functools.cache
def source(*modules):
    """The source of modules, for cache keys."""
    return [inspect.getsource(m) for m in modules]


def remove_value(path):
    """Delete what `save_value` wrote."""
    for name in (_tensor_file(path), os.path.basename(path) + ".json"):
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(os.path.dirname(path), name))


def generator(*key):
    """A torch.Generator on the CPU whose stream depends on the key alone."""
    return torch.Generator().manual_seed(int(digest(*key)[:15], 16))


def commit():
    """The commit of this code, with a + when files differ from it; "" where there is none."""
    git = ["git", "-C", HERE]
    questions = ["rev-parse", "--short", "HEAD"], ["status", "--porcelain", "--untracked-files=no"]
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name, changed = (
            subprocess.run([*git, *ask], capture_output=True, text=True, check=True).stdout.strip()
            for ask in questions
        )
        return name + "+" * bool(changed)
    return ""
