"""The process that runs one submission: python -I child.py FOLDER.

FOLDER holds the calls and tree/, a copy of the project with the student's files in it; the job is
the standard input, as JSON. The process imports one of these files, makes the calls in order and
writes what each returns to a file of tensors, whose name the grader chose. An error is written as
its text, in bytes. Expected values are not here.
"""

import contextlib
import importlib
import json
import os
import sys
from pathlib import Path


def limit(memory, written):
    """Limit memory and the size of a written file, in bytes, and forbid the network.

    The process also ends with the grader, and after an hour of processor time. Each is done where
    the operating system allows it.
    """
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
        resource.setrlimit(resource.RLIMIT_FSIZE, (written, written))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        resource.setrlimit(resource.RLIMIT_CPU, (3600, 3600))
    with contextlib.suppress(ImportError, AttributeError, OSError):
        import ctypes

        new_user, new_network = 0x10000000, 0x40000000
        libc = ctypes.CDLL(None, use_errno=True)
        libc.prctl(1, 9)  # PR_SET_PDEATHSIG, SIGKILL
        libc.unshare(new_network) and libc.unshare(new_user | new_network)


def main(folder):
    """Make the calls of the job that come from `first` on."""
    job = json.load(sys.stdin)
    import torch
    from safetensors.torch import save_file

    sys.path.insert(0, str(folder))
    import calls

    sys.path[:] = [str(folder / "tree"), *[p for p in sys.path if p != str(folder)]]
    torch.set_num_threads(1)
    os.chdir(folder / "tree")
    limit(job["memory"], job["written"])
    if hasattr(os, "register_at_fork"):  # a copy of this process would make the calls again
        os.register_at_fork(after_in_child=lambda: os._exit(1))

    def answer(number, function):
        """Write what function() returns, or the error that it raises, as answer `number`."""
        try:
            found = {name: x.contiguous().clone() for name, x in function().items()}
        except NotImplementedError as error:
            found = text(f"your turn: {str(error).removeprefix('your turn: ')}")
        except MemoryError:
            found = text(f"it needs more than {job['memory'] >> 20} MB of memory")
        except RecursionError:
            found = text("it calls itself without end")
        except BaseException as error:  # noqa: BLE001 - a submission may raise anything
            found = text(f"{type(error).__name__}: {str(error)[:300]}")
        half = folder / "answers" / f"{job['token']}-{number}.half"
        save_file(found, half)
        half.rename(half.with_suffix(".safetensors"))

    def text(line):
        shown = " ".join(line.split()).encode("utf-8", "replace")[:400]
        return {"error": torch.frombuffer(bytearray(shown), dtype=torch.uint8).clone()}

    (folder / "answers" / f"{job['token']}-started").touch()  # from here on time is the student's
    module, failed = None, None
    try:
        module = importlib.import_module(job["module"])
    except BaseException as error:  # noqa: BLE001 - a submission may raise anything
        failed = error
    forms, tensors = calls.read(folder, "calls")
    names = {} if module is None else vars(module)

    def one(form):
        if failed is not None:
            raise ImportError(f"the file cannot be imported: {type(failed).__name__}: {failed}")
        owner = module
        for part in form["function"].split("."):
            owner = getattr(owner, part)
        arguments = calls.unpack(form["arguments"], tensors, names)
        return calls.result(owner, arguments, form["function"] == "loss")

    def last(run):
        """A short run of a method, or a call that takes as long."""
        return one(run) if "function" in run else short_run(run)

    def short_run(run):
        if failed is not None:
            raise ImportError(f"the file cannot be imported: {type(failed).__name__}: {failed}")
        from lab import Lab, Settings

        plain = module.loss

        def loss(*arguments):
            """The loss with metrics, which a submission need not return."""
            returned = plain(*arguments)
            return returned if isinstance(returned, tuple) else (returned, {})

        module.loss = loss
        policy = module.run(
            Lab(Settings(**run["settings"]), quiet=True), module.Config(**run["fields"])
        )
        return {name: x.detach() for name, x in policy.state_dict().items()}

    for number in range(job["first"], job["count"]):
        if number < len(forms):
            answer(number, lambda form=forms[number]: one(form))
        else:
            answer(number, lambda n=number: last(job["runs"][n - len(forms)]))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
