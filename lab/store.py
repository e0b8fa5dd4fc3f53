"""Values on disk: files written in one step, tensors, JSON, and the cache.

Nothing here unpickles or executes anything: tensors are safetensors, everything else is JSON.
A value carries the checksums of its bytes; one that does not fit them is made anew.
"""

import contextlib
import functools
import hashlib
import inspect
import json
import math
import os
import re
import subprocess
import sys
import tempfile
import threading
import time

import numpy as np
import torch

from data import UserError

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.environ.get("NANOPREF_CACHE") or os.path.join(HERE, ".cache")
MASK = threading.Lock()  # two threads would read each other's mask
WRITTEN = ":(exclude)results", ":(exclude)README.md"  # what --claim writes, for git

# ---------------------------------------------------------------- files


def write_beside(path, write):
    """Call `write(temporary_path)` in the folder of `path`, then rename the file to `path`.

    So readers see the old file or the new one, never a part of it.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(handle)
    try:
        write(temporary)
        os.chmod(temporary, 0o666 & ~umask())  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def umask():
    """The file mode creation mask of this process, which can only be read by setting it."""
    with MASK:
        mask = os.umask(0)
        os.umask(mask)
    return mask


def write_text(path, text):
    """Write a text file in one step (see write_beside)."""

    def write(temporary):
        with open(temporary, "w", encoding="utf-8") as file:
            file.write(text)

    write_beside(path, write)


DTYPES = {  # safetensors' names
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


def save_tensors(path, tensors, metadata=None, dtype=None):
    """Write {name: tensor} as safetensors in one step -> the sha256 of the file's bytes.

    dtype: that of all tensors in the file; None keeps their own. One tensor after the other is
    converted and written, so that a large model needs no second copy in memory. A tied tensor is
    written under each of its names."""
    kinds = {name: dtype or x.dtype for name, x in tensors.items()}
    # the format wants the widest numbers first, which aligns all of them
    names, start = sorted(tensors, key=lambda name: (-kinds[name].itemsize, name)), 0
    head = {"__metadata__": metadata or {"format": "pt"}}
    for name in names:
        end = start + tensors[name].numel() * kinds[name].itemsize
        about = dict(dtype=DTYPES[kinds[name]], shape=list(tensors[name].shape))
        head[name], start = about | {"data_offsets": [start, end]}, end
    text = json.dumps(head, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    hashed = hashlib.sha256()

    def write(temporary):
        with open(temporary, "wb") as file:
            for piece in (len(text).to_bytes(8, "little"), text):
                file.write(piece)
                hashed.update(piece)
            for name in names:
                x = tensors[name].detach().to("cpu", kinds[name]).contiguous().reshape(-1)
                piece = x.view(torch.uint8).numpy()
                file.write(piece)
                hashed.update(piece)

    write_beside(path, write)
    return hashed.hexdigest()


def load_tensors(path):
    """{name: tensor} of one safetensors file. UserError: it is not a safetensors file."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} is not a readable safetensors file: {error}") from None


def write_json(path, value):
    """Write JSON in one step; NaN and infinity become null."""

    def clean(x):
        if isinstance(x, float) and not math.isfinite(x):
            return None
        if isinstance(x, dict):
            return {k: clean(v) for k, v in x.items()}
        return [clean(v) for v in x] if isinstance(x, (list, tuple)) else x

    write_text(path, json.dumps(clean(value), indent=1) + "\n")


# ---------------------------------------------------------------- values in files


def pack(value, tensors):
    """A copy of nested dicts and lists that JSON can hold; tensors are moved into `tensors`."""
    if isinstance(value, torch.Tensor):
        tensors[str(len(tensors))] = value
        return {"__tensor__": str(len(tensors) - 1)}
    if isinstance(value, dict):
        return {str(k): pack(v, tensors) for k, v in value.items() if k != "tree"}
    if isinstance(value, (list, tuple)):
        if value and all(type(v) in (int, float) for v in value):
            return list(value)
        return [pack(v, tensors) for v in value]
    return value.item() if isinstance(value, np.generic) else value


def unpack(value, tensors):
    """The inverse of `pack`."""
    if isinstance(value, dict):
        if "__tensor__" in value:
            return tensors[value["__tensor__"]]
        return {k: unpack(v, tensors) for k, v in value.items()}
    return [unpack(v, tensors) for v in value] if isinstance(value, list) else value


SEALED = re.compile(rb'\{"sha256": "([0-9a-f]{64})", ')  # how the JSON of a value begins


def save_value(path, value):
    """Write a value as `path`.json, and its tensors (if any) as safetensors beside it.

    The JSON comes last and makes the value whole. It begins with the sha256 of what follows, and
    holds that of the tensors."""
    tensors = {}
    packed, name, checksum = pack(value, tensors), None, None
    if tensors:  # a name of its own: the file that an older JSON points to must not change under it
        name = f"{os.path.basename(path)}.{os.getpid()}-{time.monotonic_ns()}.safetensors"
        checksum = save_tensors(os.path.join(os.path.dirname(path), name), tensors)
    body = json.dumps({"tensors": name, "tensors_sha256": checksum, "value": packed})
    old = _tensor_file(path)
    write_text(path + ".json", f'{{"sha256": "{_sha256(body.encode())}", {body[1:]}')
    if old and old != name:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(os.path.dirname(path), old))


def load_value(path):
    """The value written by `save_value`, or None when there is none.

    None, too, and a line on stderr, when its files do not have the checksums they had."""
    try:
        with open(path + ".json", "rb") as file:
            data = file.read()
        return _unsealed(path, data)
    except FileNotFoundError as error:
        if error.filename == path + ".json":
            return None
        with contextlib.suppress(OSError), open(path + ".json", "rb") as file:
            if file.read() != data:  # another run has just written the same value
                return load_value(path)
    except (OSError, ValueError):
        pass
    print(f"{path}.json is damaged: its value is made anew", file=sys.stderr)
    return None


def _unsealed(path, data):
    """The value in the JSON `data` of `path`; ValueError: it is damaged."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    found = SEALED.match(data)
    body = b"{" + data[found.end() :] if found else b""
    if not found or _sha256(body) != found[1].decode():
        raise ValueError
    kept, tensors = json.loads(body), {}
    if kept["tensors"]:
        stored = os.path.join(os.path.dirname(path), kept["tensors"])
        with open(stored, "rb") as file:
            if hashlib.file_digest(file, "sha256").hexdigest() != kept["tensors_sha256"]:
                raise ValueError
        try:
            tensors = load_file(stored)
        except SafetensorError as error:
            raise ValueError from error
    return unpack(kept["value"], tensors)


def _sha256(data):
    return hashlib.sha256(data).hexdigest()


def _tensor_file(path):
    """The name of the file with the tensors of a value, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(path + ".json", encoding="utf-8") as file:
            return os.path.basename(json.load(file)["tensors"])


def open_cache():
    """Make the cache's folder, and clear it of what killed runs left half-written there.

    UserError: it cannot be written."""
    try:
        os.makedirs(CACHE, exist_ok=True)
        with tempfile.TemporaryFile(dir=CACHE):
            pass
    except OSError as error:
        raise UserError(
            f"the cache {CACHE} cannot be written ({error.strerror}); "
            "the environment variable NANOPREF_CACHE names another folder"
        ) from None
    with cache_lock() as alone:
        clear_half_written(CACHE, age=0.0 if alone else 86400.0)
        if alone:
            clear_orphans(CACHE)


held = {}  # {cache: its lock file}, kept open and locked until the process ends


@contextlib.contextmanager
def cache_lock():
    """Mark the cache as in use until this process ends -> whether no other process uses it.

    Every process holds a shared lock. It is exclusive within this context, if nobody else has it,
    so that nothing is removed that another run is about to use. Where there are no such locks
    (Windows), the answer is False."""
    try:
        import fcntl

        if CACHE not in held:
            held[CACHE] = open(os.path.join(CACHE, ".lock"), "ab")  # noqa: SIM115
    except (ImportError, OSError):
        yield False
        return
    alone = True
    try:
        fcntl.flock(held[CACHE], fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        alone = False
    try:
        yield alone
    finally:
        with contextlib.suppress(OSError):
            fcntl.flock(held[CACHE], fcntl.LOCK_SH)


def clear_orphans(folder):
    """Remove the tensors to which no JSON in a folder points: a kill came between the two writes.

    Nobody else may write there now."""
    names = os.listdir(folder)
    tensors = [name for name in names if re.fullmatch(r".+\.\d+-\d+\.safetensors", name)]
    for name in tensors:
        value = re.sub(r"\.\d+-\d+\.safetensors$", "", name)
        if _tensor_file(os.path.join(folder, value)) != name:
            with contextlib.suppress(OSError):
                os.unlink(os.path.join(folder, name))


def clear_half_written(folder, age=0.0):
    """Remove what `write_beside` left in a folder and below it, if it is `age` seconds old."""
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, n) for n in names if n.startswith(".writing-")):
            with contextlib.suppress(OSError):
                if not age or time.time() - os.path.getmtime(path) > age:
                    os.unlink(path)


def digest(*parts):
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@functools.cache
def source(*modules):
    """The source of modules, for cache keys."""
    return [inspect.getsource(m) for m in modules]


def lock(file):
    """Lock an open file for this process without waiting. OSError: another process holds it."""
    try:
        import fcntl
    except ImportError:  # Windows
        import msvcrt

        msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    else:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextlib.contextmanager
def alone(path):
    """Hold the lock of a value in the cache, so that it is made by one process at a time.

    Another process that holds it is waited for; if it is killed, its lock is released.
    """
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path + ".lock", "a+b") as file:
        waiting = False
        while True:
            try:
                lock(file)
                break
            except (BlockingIOError, PermissionError):  # the latter on Windows
                if not waiting:
                    print("another run is making what this run needs: waiting", file=sys.stderr)
                waiting = True
                time.sleep(0.2)
            except OSError:  # a file system without locks: the value may be made twice
                break
        try:
            yield
        finally:
            with contextlib.suppress(OSError):
                os.unlink(path + ".lock")


def remove_value(path):
    """Delete what `save_value` wrote."""
    for name in (_tensor_file(path), os.path.basename(path) + ".json"):
        if name:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(os.path.join(os.path.dirname(path), name))


def generator(*key):
    """A torch.Generator on the CPU whose random numbers depend only on the key."""
    return torch.Generator().manual_seed(int(digest(*key)[:15], 16))


def commit():
    """The git commit of this code, with a + if files differ from it; "" without a repository.

    The results and the README, which --claim itself writes, are not looked at.
    """
    git = ["git", "-C", HERE]
    changed = ["status", "--porcelain", "--untracked-files=no", "--", ".", *WRITTEN]
    questions = ["rev-parse", "--short", "HEAD"], changed
    with contextlib.suppress(OSError, subprocess.CalledProcessError):
        name, changed = (
            subprocess.run([*git, *ask], capture_output=True, text=True, check=True).stdout.strip()
            for ask in questions
        )
        return name + "+" * bool(changed)
    return ""
