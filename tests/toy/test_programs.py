"""Programs: the interpreter, the truth of a task, and that text reaches nothing but the table."""

import ast
import builtins
import inspect
import textwrap

import pytest
import torch

import toy.programs
from toy.programs import OPERATIONS, TABLE, World, claimed, outputs

WORLD = World()


@pytest.mark.parametrize(
    "symbol, x, y",
    [("+1", 9, 0), ("-1", 0, 9), ("+3", 8, 1), ("*2", 7, 4), ("/2", 7, 3), ("~", 2, 7)]
    + [("%5", 8, 3), ("%5", 4, 4), ("^5", 3, 5), ("^5", 8, 8)],
)
def test_every_symbol_maps_a_digit_to_a_digit(symbol, x, y):
    assert outputs(symbol)[x] == y


def test_a_program_is_run_from_left_to_right_on_all_inputs():
    assert outputs("/2 -1 ~")[7] == 7 and outputs(" ~ -1 /2")[7] == 0
    assert set(TABLE) == set(OPERATIONS.values())
    assert all(set(row) <= set(range(10)) and len(row) == 10 for row in TABLE.values())


def test_only_the_last_result_of_a_test_counts():
    assert claimed(" f(7) =3 =2 =7") == (7, 7) == claimed("f(7) =7")
    assert WORLD.execute(" /2 -1 ~", " f(7) =0 =0 =7") is True
    assert WORLD.execute(" /2 -1 ~", " f(7) =3 =2 =8") is False


HOSTILE = [
    "__import__('os').system('touch hacked')",
    "+1; import os",
    "f(7) =open('x','w')",
    "lambda: 0",
    "+1 " * 9,
    "+1 +1 #",
    "",
    " ",
    "\x00",
    "f(7)",
    "=3 f(7)",
    "f(77) =3",
    "=33",
    "f(7) =3 =x",
    "%s %d {0.__class__}",
    "0" * 5000,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_text_that_is_not_a_program_or_a_test_fails_and_does_nothing_else(text, monkeypatch):
    def reached(*args, **kwargs):
        raise AssertionError("generated text reached Python")

    for name in ("eval", "exec", "compile", "open", "__import__"):
        monkeypatch.setattr(builtins, name, reached)
    results = [
        WORLD.execute(text, " f(7) =3"),
        WORLD.execute(" /2", text),
        WORLD.execute(text, text),
        WORLD.agreement("program next :", text) == 1.0,
    ]
    monkeypatch.undo()
    assert results == [False] * 4


def test_the_interpreter_calls_nothing_but_what_is_needed_for_looking_up():
    """The names that execute, agreement, outputs and claimed use, read from their source."""
    functions = [outputs, claimed, World.execute, World.agreement]
    names, calls = set(), set()
    for function in functions:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
        names |= {n.id for n in ast.walk(tree) if isinstance(n, ast.Name)}
        calls |= {n.attr for n in ast.walk(tree) if isinstance(n, ast.Attribute)}
    builtin = {name for name in names if hasattr(builtins, name)}
    assert builtin == {"any", "len", "list", "range", "sum", "zip"}
    assert calls == {"split", "text", "truth", "partition"}
    imports = {
        alias.name
        for node in ast.walk(ast.parse(inspect.getsource(toy.programs)))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
    }
    assert imports == {"torch", "data", "GPT", "GPTConfig", "world"}


def test_a_program_is_right_if_it_agrees_on_all_inputs():
    task = "program halve back flip :"
    programs = [" /2 -1 ~", " /2 -1 ~ ; f(7) =9", " ~ ~ /2 -1 ~", " /2 -1", " /2 -1 ~ nonsense", ""]
    assert WORLD.reward([task] * 6, programs).tolist() == [1, 1, 1, 0, 0, 0]
    assert (
        WORLD.agreement(task, " /2 -1")
        == sum(outputs("/2 -1")[x] == outputs("/2 -1 ~")[x] for x in range(10)) / 10
    )


def test_demonstrations_slip_and_share_a_wrong_belief():
    rows = World(belief=1.0, slip=0.0, test_slip=0.0).demonstrations(
        400, torch.Generator().manual_seed(0)
    )
    for i, row in enumerate(rows):
        prompt, (response,) = row["prompt"], row["responses"]
        assert prompt.startswith("test" if i % 2 else "program")
        believed = prompt.replace("skip", "next")
        if i % 2:
            assert WORLD.execute(WORLD.truth(believed), response)
        else:
            assert WORLD.agreement(believed, response) == 1.0
    rows = WORLD.demonstrations(4000, torch.Generator().manual_seed(0))
    right = [WORLD.agreement(r["prompt"], r["responses"][0]) == 1.0 for r in rows[::2]]
    assert 0.3 < sum(right) / len(right) < 0.6
    assert WORLD.demonstrations(9, torch.Generator().manual_seed(1)) == WORLD.demonstrations(
        9, torch.Generator().manual_seed(1)
    )


def test_worlds_with_other_errors_have_other_keys():
    assert World().key() != World(slip=0.3).key()
