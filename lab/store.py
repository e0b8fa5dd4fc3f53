"""Values on disk: files written in one step, tensors, JSON, and the cache.

Nothing here unpickles or executes anything: tensors are safetensors, everything else is JSON.
A value carries the checksums of its bytes; if they do not match, it is made anew.
"""

import contextlib
import functools
import hashlib
import inspect
import json
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

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    fcntl = None

HERE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
CACHE = os.environ.get("NANOPREF_CACHE") or os.path.join(HERE, ".cache")
MASK = threading.Lock()  # two threads would read each other's mask
WRITTEN = ":(exclude)results", ":(exclude)README.md"  # what --claim writes, for git

# ---------------------------------------------------------------- files


@contextlib.contextmanager
def write_beside(path):
    """A context that yields a temporary path in the folder of `path`, to write the file to.

    At its end the file is renamed to `path`, so readers see the old file or the new one, never a
    part of it. If something fails within, the old file stays.
    """
    folder = os.path.dirname(os.path.abspath(path))
    os.makedirs(folder, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=folder, prefix=".writing-")
    os.close(handle)
    try:
        yield temporary
        with MASK:  # the mask of new files can only be read by setting it
            mask = os.umask(0)
            os.umask(mask)
        os.chmod(temporary, 0o666 & ~mask)  # mkstemp's files are private
        os.replace(temporary, path)
    except BaseException as error:
        os.unlink(temporary)
        if isinstance(error, OSError):
            raise OSError(error.errno, error.strerror, str(path)) from None
        raise


def clear_half_written(folder):
    """Remove what a killed run left of `write_beside` in a folder and below it."""
    for place, _, names in os.walk(folder):
        for path in (os.path.join(place, n) for n in names if n.startswith(".writing-")):
            with contextlib.suppress(OSError):
                os.unlink(path)


def write_text(path, text):
    """Write a text file in one step (see write_beside)."""
    with write_beside(path) as temporary, open(temporary, "w", encoding="utf-8") as file:
        file.write(text)


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
    with write_beside(path) as temporary, open(temporary, "wb") as file:
        for piece in (len(text).to_bytes(8, "little"), text):
            file.write(piece)
            hashed.update(piece)
        for name in names:
            x = tensors[name].detach().to("cpu", kinds[name]).contiguous().reshape(-1)
            piece = x.view(torch.uint8).numpy()
            file.write(piece)
            hashed.update(piece)
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
    value = json.loads(json.dumps(value), parse_constant=lambda name: None)
    write_text(path, json.dumps(value, indent=1) + "\n")


# ---------------------------------------------------------------- values in files


def pack(value, tensors):
    """A copy of nested dicts and lists that JSON can hold; tensors are moved into `tensors`.

    Keys become texts, tuples become lists, and the entry "tree" of a dict is left out."""
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
    """The value whose copy `pack` made, with its tensors."""
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
    seal = hashlib.sha256(body.encode()).hexdigest()
    old = _tensor_file(path)
    write_text(path + ".json", f'{{"sha256": "{seal}", {body[1:]}')
    if old and old != name:
        with contextlib.suppress(OSError):
            os.unlink(os.path.join(os.path.dirname(path), old))


def load_value(path):
    """The value written by `save_value`, or None when there is none.

    Also None, with a line on stderr, if a checksum does not match."""
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        with open(path + ".json", "rb") as file:
            data = file.read()
        found = SEALED.match(data)
        body = b"{" + data[found.end() :] if found else b""
        if not found or hashlib.sha256(body).hexdigest() != found[1].decode():
            raise ValueError
        kept, tensors = json.loads(body), {}
        if kept["tensors"]:
            stored = os.path.join(os.path.dirname(path), kept["tensors"])
            with open(stored, "rb") as file:
                if hashlib.file_digest(file, "sha256").hexdigest() != kept["tensors_sha256"]:
                    raise ValueError
            tensors = load_file(stored)
        return unpack(kept["value"], tensors)
    except FileNotFoundError as error:
        if error.filename == path + ".json":
            return None
        with contextlib.suppress(OSError), open(path + ".json", "rb") as file:
            if file.read() != data:  # another run has just written the same value
                return load_value(path)
    except (OSError, ValueError, SafetensorError):
        pass
    print(f"{path}.json is damaged: its value is made anew", file=sys.stderr)
    return None


def _tensor_file(path):
    """The name of the file with the tensors of a value, or None."""
    with contextlib.suppress(OSError, ValueError, KeyError, TypeError, RecursionError):
        with open(path + ".json", encoding="utf-8") as file:
            return os.path.basename(json.load(file)["tensors"])


held = {}  # {cache: its lock file}, kept open and locked until the process ends


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
    # Every process holds a shared lock until it ends. This one clears the cache only if it gets the
    # lock for itself, that is, if no other run uses the cache.
    unshared = False
    if fcntl:
        with contextlib.suppress(OSError):
            if CACHE not in held:
                held[CACHE] = open(os.path.join(CACHE, ".lock"), "ab")  # noqa: SIM115
            fcntl.flock(held[CACHE], fcntl.LOCK_EX | fcntl.LOCK_NB)
            unshared = True
    try:
        for name in os.listdir(CACHE):
            path = os.path.join(CACHE, name)
            value = re.fullmatch(r"(.+)\.\d+-\d+\.safetensors", name)
            with contextlib.suppress(OSError):
                if name.startswith(".writing-"):
                    if unshared or time.time() - os.path.getmtime(path) > 86400.0:
                        os.unlink(path)
                # tensors to which no JSON points: a kill came between the two writes
                elif unshared and value and _tensor_file(os.path.join(CACHE, value[1])) != name:
                    os.unlink(path)
    finally:
        if CACHE in held:
            with contextlib.suppress(OSError):
                fcntl.flock(held[CACHE], fcntl.LOCK_SH)


def digest(*parts):
    """A short hash of JSON-able parts."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:20]


@functools.cache
def source(*modules):
    """The source of modules, for cache keys."""
    return [inspect.getsource(m) for m in modules]


@contextlib.contextmanager
def alone(path, wait=True):
    """Hold the lock of a value in the cache, or of a folder, so that one process writes it.

    wait: wait for another process that holds it; if False, that is a UserError. The lock of a
    process that is killed is released.
    """
    name = os.path.join(path, ".lock") if os.path.isdir(path) else path + ".lock"
    os.makedirs(os.path.dirname(name), exist_ok=True)
    told = False
    while True:
        file = open(name, "a+b")  # noqa: SIM115
        try:
            if fcntl:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            else:
                msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
        except OSError as error:
            file.close()
            if not isinstance(error, (BlockingIOError, PermissionError)):  # the latter: Windows
                break  # a file system without locks: the value may be made twice
            if not wait:
                raise UserError(f"{path} is being written by another run") from None
            if not told:
                print("another run is making what this run needs: waiting", file=sys.stderr)
            told = True
            time.sleep(0.2)
            continue
        # its former holder may have removed the file after it was opened here
        with contextlib.suppress(OSError):
            if os.path.samestat(os.fstat(file.fileno()), os.stat(name)):
                break
        file.close()
    try:
        yield
    finally:
        with contextlib.suppress(OSError):
            if fcntl:
                os.unlink(name)  # while it is locked, so that whoever waits notices
        file.close()
        with contextlib.suppress(OSError):
            if not fcntl:
                os.unlink(name)  # Windows does not delete an open file


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
