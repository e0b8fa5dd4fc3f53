"""Helpers of the tests of the command line: small runs, refusals, runs that are killed."""

import json

import methods.dpo
import train

TINY = [
    "--base_steps",
    "4",
    "--steps",
    "12",
    "--prompts",
    "24",
    "--batch_size",
    "8",
    "--eval_size",
    "8",
    "--max_response",
    "8",
]


PAIRS = [
    {"prompt": f"question {i} ?", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(20)
]


FILE = [
    "--base_steps",
    "2",
    "--steps",
    "3",
    "--batch_size",
    "4",
    "--eval_size",
    "4",
    "--max_response",
    "4",
]


def weights(folder):
    return (folder / "model.safetensors").read_bytes()


def refused(capsys, argv, *words):
    capsys.readouterr()
    assert train.main(argv) == 2
    error = capsys.readouterr().err.strip()
    assert len(error.splitlines()) == 1, error
    for word in words:
        assert word in error, error


def rows_file(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def small(monkeypatch):
    """Use bytes instead of GPT-2's tokens, so that the model of a file is tiny."""
    from data import Tokenizer

    monkeypatch.setattr(Tokenizer, "text", classmethod(lambda cls: cls.toy([], name="bytes")))


class Killed(BaseException):
    """Replaces a SIGKILL: nothing is saved afterwards."""


def killed_at(monkeypatch, call, method=methods.dpo):
    """Make a method's loss die at its n-th call; -> the loss."""
    calls, loss = [0], method.loss

    def dying(*args):
        calls[0] += 1
        if calls[0] == call:
            raise Killed
        return loss(*args)

    monkeypatch.setattr(method, "loss", dying)
    return loss
