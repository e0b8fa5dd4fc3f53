"""The process in which a checkpoint's chat template is rendered, and nothing else.

A template is a program from somebody else's file, so it runs in Jinja's sandbox, in a process that
can be killed. `lab.hub.ChatTemplate` starts `python -I render.py` and sends JSON objects, one per
line: first the template, then one conversation after the other. Each is answered by one line,
{"text": ...} or {"error": ...}. The process may use MEMORY bytes, and SECONDS of CPU time per
answer, if the operating system can limit them; elsewhere (Windows) the parent process kills it.
"""

import contextlib
import json
import signal
import sys

SECONDS = 5.0  # of CPU time per answer
MEMORY = 512 * 2**20  # bytes of address space
LENGTH = 10**6  # characters of a rendered text


def limit_memory():
    """Make memory beyond MEMORY raise MemoryError, on systems that have such limits."""
    with contextlib.suppress(ImportError, ValueError, OSError):
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))


def limit_time(seconds):
    """Let the system kill this process after `seconds` more of CPU time; 0 removes the limit.

    A signal handler in Python would not run during a single long operation such as 9 ** 9 ** 9, and
    a template might catch the exception that it raises.
    """
    if hasattr(signal, "setitimer"):
        signal.setitimer(signal.ITIMER_PROF, seconds)


def compiled(text, names):
    """The Jinja template of `text`, with the names that templates of chat models expect.

    names: {name: value} of the special tokens, such as bos_token.
    """
    import jinja2.sandbox

    def refuse(message):
        raise jinja2.TemplateError(message)

    def tojson(value, ensure_ascii=False, indent=None, separators=None, sort_keys=False):
        return json.dumps(
            value,
            ensure_ascii=ensure_ascii,
            indent=indent,
            separators=separators,
            sort_keys=sort_keys,
        )

    engine = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    engine.filters["tojson"] = tojson
    names = names | {"raise_exception": refuse, "tools": None, "documents": None}
    return engine.from_string(text, globals=names)


def answer(function):
    """One line of JSON: the text that function() returns, or the error that it raised."""
    limit_time(SECONDS)
    try:
        text = function()
        reply = {"text": text}
        if len(text) > LENGTH:
            reply = {"error": f"writes more than {LENGTH} characters"}
    except MemoryError:
        reply = {"error": f"needs more than {MEMORY >> 20} MB"}
    except Exception as error:  # a template may raise anything
        reply = {"error": f"fails: {str(error)[:1000] or type(error).__name__}"}
    limit_time(0)
    return json.dumps(reply)


def main():
    """Answer the lines on stdin until it ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is handled by the parent process
    first = json.loads(sys.stdin.readline())
    sys.path[:] = first["path"]
    import jinja2.sandbox  # noqa: F401 - imported before the memory is limited

    limit_memory()
    template = None

    def prepare():
        nonlocal template
        template = compiled(first["template"], first["names"])
        return ""

    print(answer(prepare), flush=True)
    for line in sys.stdin:
        asked = json.loads(line)
        print(answer(lambda asked=asked: template.render(**asked)), flush=True)


if __name__ == "__main__":
    main()
