"""Reading files: every accepted format, every refusal with its place, every dropped row counted."""

import datetime
import gzip
import json
import subprocess
import sys
import tracemalloc
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from data import DataError, Tokenizer, UserError, collate, fit_context
from lab.hub import chat_template
from toy import files
from toy.files import read_preferences, split

ROOT = Path(__file__).parents[2]
PAIR = {"prompt": "2 + 2 is", "chosen": " 4", "rejected": " 5"}
GRADED = {
    "prompt": "Add 3 and 4.",
    "responses": ["3 + 4 = 7", "3 + 4 = 8", "7 it is"],
    "scores": [1.0, 0.0, 1.0],
}
SINGLE = {"prompt": "Sky?", "completion": " blue", "label": True}
USER, GOOD, BAD = (
    {"role": r, "content": c}
    for r, c in (("user", "hi"), ("assistant", "hello"), ("assistant", "go away"))
)


def bare(rows):
    """The rows without their places."""
    return [{name: value for name, value in row.items() if name != "where"} for row in rows]


def write(path, *records):
    path.write_text(
        "".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in records),
        encoding="utf-8",
    )
    return path


def hh(*turns):
    return "".join(
        f"\n\n{who}: {text}" for who, text in zip(["Human", "Assistant"] * len(turns), turns)
    )


# ---- formats


def test_pairs_with_a_prompt_column_keep_file_order_and_numbers(tmp_path):
    first = PAIR | {"margin": 2, "lengths": [1, 3], "id": "a", "label": 1}
    rows, counts = read_preferences(
        write(tmp_path / "p.jsonl", first, PAIR | {"margin": 0.5, "lengths": [1, 1]})
    )
    assert counts == {}
    assert rows[0] == {
        "prompt": "2 + 2 is",
        "responses": [" 4", " 5"],
        "scores": [1.0, 0.0],
        "where": f"{tmp_path}/p.jsonl:1",
        "margin": 2.0,
        "lengths": [1.0, 3.0],
    }
    assert (
        "id" not in rows[0] and "label" not in rows[1]
    )  # text, and a number that only one row has


def test_hh_transcripts_are_cut_before_the_last_answer_and_odd_ones_counted(tmp_path):
    before = ("Is tea hot?", "Often.", "And ice?")
    same = {"chosen": hh(*before, "Cold."), "rejected": hh(*before, "Hot.")}
    other = {"chosen": hh("A?", "b", "C?", "d"), "rejected": hh("A?", "x", "C?", "d")}
    empty = {"chosen": hh("A?", "b"), "rejected": hh("A?", " ")}
    human = {"chosen": hh("A?", "b"), "rejected": hh("A?", "b", "C?")}
    equal = {"chosen": hh("A?", "b"), "rejected": hh("A?", "b")}
    rows, counts = read_preferences(write(tmp_path / "hh.jsonl", same, other, empty, human, equal))
    assert [(row["prompt"], row["responses"]) for row in rows] == [
        (hh(*before) + "\n\nAssistant:", [" Cold.", " Hot."])
    ]
    assert counts == {
        "prompts differ": 1,
        "empty response": 1,
        "last turn is not the assistant's": 1,
        "identical responses": 1,
    }


def test_graded_solutions_keep_scores_and_drop_ties(tmp_path):
    source = {"source": ["small", "large", "human"]}
    ties = GRADED | source | {"scores": [0, 0, 0]}
    rows, counts = read_preferences(write(tmp_path / "g.jsonl", GRADED | source, ties))
    assert bare(rows) == [GRADED] and counts == {"equal scores": 1}


def test_a_graded_list_of_two_comes_out_preferred_first(tmp_path):
    record = {
        "prompt": "p",
        "responses": ["b", "a"],
        "scores": [-1, 3],
        "context": ["", "x"],
        "reward": [0, 1],
    }
    rows, _ = read_preferences(write(tmp_path / "g.jsonl", record))
    assert bare(rows)[0] == {
        "prompt": "p",
        "responses": ["a", "b"],
        "scores": [3.0, -1.0],
        "context": ["x", ""],
        "reward": [1.0, 0.0],
    }


def test_trees_carry_parents_context_ends_and_token_ids(tmp_path):
    tree = {
        "prompt": [1, 2],
        "responses": [[3], [4, 5]],
        "scores": [0, 1],
        "parents": [-1, 0],
        "context": ["", [9]],
        "ends": [False, True],
    }
    rows, _ = read_preferences(write(tmp_path / "t.jsonl", tree))
    assert bare(rows) == [tree]  # with parents the order is the tree's


def test_unpaired_labels_become_rows_of_one(tmp_path):
    rows, counts = read_preferences(
        write(tmp_path / "u.jsonl", SINGLE, SINGLE | {"completion": " green", "label": 0})
    )
    assert [(row["responses"], row["scores"]) for row in rows] == [
        ([" blue"], [1.0]),
        ([" green"], [0.0]),
    ] and not counts


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]},
        {"chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER, BAD]},
        {"prompt": "hi", "chosen": [GOOD], "rejected": [BAD | {"tool_calls": None}]},
        {"prompt": [USER], "chosen": "hello", "rejected": "go away"},
        {"prompt": [USER], "responses": [[BAD], [GOOD]], "scores": [1, 2]},
    ],
)
def test_messages_in_every_arrangement_read_alike(tmp_path, record):
    (row,), counts = read_preferences(write(tmp_path / "m.jsonl", record))
    assert (row["prompt"], row["responses"], counts) == (
        "user: hi\nassistant:",
        [" hello", " go away"],
        {},
    )


def test_messages_whose_prompts_differ_or_that_end_with_the_user_are_counted(tmp_path):
    differ = {"chosen": [USER, GOOD], "rejected": [USER | {"content": "ho"}, BAD]}
    ends = {"prompt": [USER], "chosen": [GOOD, USER], "rejected": [BAD, USER]}
    rows, counts = read_preferences(write(tmp_path / "m.jsonl", differ, ends, PAIR))
    assert len(rows) == 1 and counts == {"prompts differ": 1, "last turn is not the assistant's": 1}


def test_gzip_parquet_and_blank_lines_read_like_plain_lines(tmp_path):
    import pyarrow
    import pyarrow.parquet

    other = PAIR | {"prompt": "caf\u00e9"}
    rows, counts = read_preferences(write(tmp_path / "p.jsonl", PAIR, "", other))
    assert [row["where"] for row in rows] == [f"{tmp_path}/p.jsonl:{n}" for n in (1, 3)]
    (tmp_path / "named_anyhow").write_bytes(
        gzip.compress(b"\xef\xbb\xbf" + (tmp_path / "p.jsonl").read_bytes())
    )
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, other]), tmp_path / "p.parquet")
    for name in ("named_anyhow", "p.parquet"):
        again = read_preferences(str(tmp_path / name))
        assert (bare(again[0]), again[1]) == (bare(rows), counts)
    pyarrow.parquet.write_table(
        pyarrow.Table.from_pylist([GRADED, GRADED | {"scores": None}]), tmp_path / "g.parquet"
    )
    with pytest.raises(DataError, match="g.parquet:2: column 'scores' is missing or null"):
        read_preferences(tmp_path / "g.parquet")


def test_seed_shuffles_and_none_does_not(tmp_path):
    path = write(tmp_path / "p.jsonl", *(PAIR | {"prompt": str(i)} for i in range(40)))
    order = [row["prompt"] for row in read_preferences(path)[0]]
    shuffled = [row["prompt"] for row in read_preferences(path, seed=1)[0]]
    assert order == [str(i) for i in range(40)] and sorted(shuffled) == sorted(order) != shuffled
    assert shuffled == [row["prompt"] for row in read_preferences(path, seed=1)[0]]


# ---- refusals


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ([1], "a list where an object with columns belongs"),
        ("null", "null where an object"),
        ('"text"', "text where an object"),
        ("7", "a number where an object"),
        ("{'prompt': 1}", "not a line of JSON"),
        ("[" * 100_000, "not a line of JSON"),
        (
            {"prompt": "p", "chosen": "c"},
            r"column 'rejected' is missing or null "
            r"\(columns there: prompt, chosen; accepted: prompt/chosen/rej",
        ),
        ({"prompt": "p", "chosen": "c", "rejected": None}, "column 'rejected' is missing"),
        ({"text": "p"}, r"column 'chosen' is missing or null \(columns there: text;"),
        ({}, r"column 'chosen' is missing or null \(columns there: none;"),
        (
            {"chosen": "c", "rejected": "r"},
            "column 'prompt' is missing, and 'chosen' has no turn before",
        ),
        ({"chosen": [1, 2], "rejected": [3]}, "column 'prompt' is missing"),
        ({"chosen": [GOOD], "rejected": [BAD]}, "column 'prompt' is missing"),
        ({"responses": ["a", "b"], "scores": [1, 2]}, "column 'prompt' is missing"),
        (PAIR | {"chosen": ""}, "column 'chosen' is empty"),
        (PAIR | {"rejected": " \n"}, "column 'rejected' is empty"),
        (PAIR | {"chosen": []}, "column 'chosen' is empty"),
        (PAIR | {"chosen": 4}, "column 'chosen' holds a number where text belongs"),
        (PAIR | {"chosen": {"a": 1}}, "column 'chosen' holds an object where text belongs"),
        (PAIR | {"chosen": ["a", "b"]}, "column 'chosen' holds a list where text belongs"),
        (PAIR | {"chosen": [True]}, "column 'chosen' holds a list where text belongs"),
        (PAIR | {"prompt": 5}, "column 'prompt' holds a number where text belongs"),
        (PAIR | {"chosen": "\ud800"}, "column 'chosen' holds half a character"),
        (PAIR | {"chosen": [GOOD, "x"]}, "column 'chosen' holds a list where messages"),
        (PAIR | {"chosen": [{"role": "assistant"}]}, "column 'chosen' holds a list where messages"),
        (
            PAIR | {"chosen": [{"role": "assistant", "content": 3}]},
            "column 'chosen' holds a list where messages",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD | {"content": ""}]},
            "column 'rejected' is empty",
        ),
        (
            {"prompt": [USER], "chosen": [GOOD], "rejected": 3},
            "column 'rejected' holds a number where messages",
        ),
        ({"prompt": [USER], "chosen": [USER, GOOD], "rejected": [USER]}, None),
        (
            PAIR | {"margin": float("nan")},
            "column 'margin' holds nan where a finite number belongs",
        ),
        (SINGLE | {"label": "yes"}, "column 'label' holds 'yes' where true or false belongs"),
        (SINGLE | {"label": 0.5}, "column 'label' holds 0.5"),
        (SINGLE | {"label": float("nan")}, "column 'label' holds nan"),
        (SINGLE | {"completion": ""}, "column 'completion' is empty"),
        (GRADED | {"responses": "abc"}, "column 'responses' holds text where a list belongs"),
        (GRADED | {"responses": ["a", "", "c"]}, "column 'responses' is empty"),
        (GRADED | {"responses": ["a", 1, "c"]}, "column 'responses' holds a number where text"),
        (
            GRADED | {"responses": ["a"], "scores": [1]},
            "column 'responses' has 1 where a comparison needs 2",
        ),
        (GRADED | {"responses": [], "scores": []}, "column 'responses' has 0 where"),
        (GRADED | {"scores": [1, 0]}, "column 'scores' has 2 entries for 3 responses"),
        (GRADED | {"scores": 1}, "column 'scores' holds a number where a list belongs"),
        (
            GRADED | {"scores": [1, 0, float("nan")]},
            "column 'scores' holds nan where a finite number",
        ),
        (GRADED | {"scores": [1, 0, float("-inf")]}, "column 'scores' holds -inf"),
        (GRADED | {"scores": [1, 0, 10**400]}, "column 'scores' holds 1000"),
        (GRADED | {"scores": [1, 0, "1"]}, "column 'scores' holds '1'"),
        (GRADED | {"scores": [1, 0, None]}, "column 'scores' holds None"),
        (
            GRADED | {"parents": [-1, 2, 0]},
            "column 'parents' holds 2 where -1 or the number of an earlier response",
        ),
        (GRADED | {"parents": [0, -1, -1]}, "column 'parents' holds 0"),
        (GRADED | {"parents": [-1, -2, 0]}, "column 'parents' holds -2"),
        (GRADED | {"parents": [-1, 0.0, 0]}, "column 'parents' holds 0.0"),
        (GRADED | {"parents": [-1, 0]}, "column 'parents' has 2 entries for 3 responses"),
        (GRADED | {"context": ["", 3, ""]}, "column 'context' holds a number where text"),
        (GRADED | {"ends": [True, False, 1]}, "column 'ends' holds 1 where true or false"),
    ],
)
def test_a_bad_line_is_named_with_its_column(tmp_path, record, message):
    """The second line is at fault in every case; the first (of the same format) is good."""
    columns = set(record) if isinstance(record, dict) else set()
    good = (
        GRADED
        if columns & {"responses", "scores"}
        else SINGLE
        if columns & {"completion", "label"}
        else PAIR
    )
    path = write(
        tmp_path / "pairs.jsonl", good, record if isinstance(record, str) else json.dumps(record)
    )
    if message is None:  # a fault of the conversation, not of the file
        assert sum(read_preferences(path)[1].values()) == 1
        return
    with pytest.raises(DataError, match=f"pairs.jsonl:2: {message}") as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "no usable row .the file is empty"),
        (b"\n \n", "the file is empty"),
        (b"\x89PNG\r\n\x1a\n\0\0", ":1: not text in UTF-8: a binary file"),
        (b"\0\0\0\0", ":1: not a line of JSON"),
        (
            json.dumps(PAIR).encode() + b'\n{"prompt": "a", "cho',
            ":2: not a line of JSON: .*is the file cut off",
        ),
        (
            gzip.compress(
                b"\n".join(json.dumps(PAIR | {"prompt": str(i)}).encode() for i in range(999)),
                mtime=0,
            )[:-900],
            "cannot be read",
        ),
        (gzip.compress(json.dumps(PAIR).encode(), mtime=0)[:-6], "cannot be read.*ended before"),
        (gzip.compress(b"\xff\xfe\x00", mtime=0), ":1: not text in UTF-8"),
        (b"\x1f\x8bnothing", "cannot be read"),
        (b"PAR1 and then nothing", "cannot be read: Parquet"),
        (json.dumps(PAIR, indent=1).encode(), ":1: not a line of JSON"),
    ],
    ids=lambda value: value if isinstance(value, str) else f"{len(value)} bytes",
)
def test_a_bad_file_is_one_clear_line(tmp_path, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(DataError, match=f"file.jsonl.*{message}") as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)


def test_names_of_columns_reach_no_terminal_raw(tmp_path):
    record = {"prompt": "a", "\x1b[31m\u202echosen": "b", **dict.fromkeys(map(str, range(999)), 1)}
    path = write(tmp_path / "file.jsonl", record)
    with pytest.raises(DataError, match=r"columns there: prompt, \\x1b\[31m\\u202echo") as caught:
        read_preferences(path)
    assert str(caught.value).isprintable() and len(str(caught.value)) < 800


def test_missing_files_folders_and_files_without_a_usable_row(tmp_path):
    with pytest.raises(DataError, match="none.jsonl: no such file"):
        read_preferences(tmp_path / "none.jsonl")
    with pytest.raises(
        DataError, match="data/none.jsonl: no such file"
    ):  # not looked for on the Hub
        read_preferences("data/none.jsonl")
    with pytest.raises(DataError, match="is a folder"):
        read_preferences(tmp_path)
    with pytest.raises(DataError, match=r"no usable row \(identical responses: 2\)"):
        read_preferences(
            write(tmp_path / "same.jsonl", PAIR | {"rejected": " 4"}, PAIR | {"rejected": " 4"})
        )


def test_the_hub_is_read_through_datasets_and_its_failures_are_one_line(monkeypatch):
    asked = []

    def load_dataset(name, split):
        asked.append((name, split))
        if name == "nobody/nothing":
            raise ConnectionError("Couldn't reach it\nand a long explanation")
        return [PAIR]

    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(__version__="5.0.0", load_dataset=load_dataset)
    )
    rows, _ = read_preferences("some/set:test")
    assert rows[0]["responses"] == [" 4", " 5"] and asked == [("some/set", "test")]
    with pytest.raises(DataError, match="^nobody/nothing: cannot be read: Couldn't reach it$"):
        read_preferences("nobody/nothing")
    monkeypatch.setitem(
        sys.modules, "datasets", SimpleNamespace(__version__="3.6.0", load_dataset=load_dataset)
    )
    with pytest.raises(DataError, match="may run code"):
        read_preferences("some/set")


# ---- chat templates

CHATML = (
    "{% for m in messages %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content | trim + '<|im_end|>' + '\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def folder(tmp_path, template, **settings):
    (tmp_path / "tokenizer_config.json").write_text(
        json.dumps({"chat_template": template, "eos_token": "<|im_end|>"} | settings)
    )
    return tmp_path


def test_a_template_frames_prompt_and_answer_and_its_closing_is_cut(tmp_path):
    """The end token closes a response, so the template's own closing would be scored twice.

    The response "i" also occurs in the closing."""
    path = write(
        tmp_path / "m.jsonl",
        {"prompt": [USER], "chosen": [GOOD | {"content": "i"}], "rejected": [BAD]},
    )
    (row,), _ = read_preferences(path, chat_template(folder(tmp_path, CHATML)))
    assert row["prompt"] == "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert row["responses"] == ["i", "go away"]
    several = {"prompt": [USER], "chosen": [GOOD, USER, GOOD], "rejected": [BAD]}
    (row,), _ = read_preferences(write(path, several), chat_template(tmp_path))
    assert (
        row["responses"][0]
        == "hello<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\nhello"
    )


@pytest.mark.parametrize(
    "template",
    [
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
        "{{ messages.append(1) }}",
        "{{ raise_exception('roles must alternate\nalways') }}",
        "{{ messages[0].content + 1 }}",
        "{% for i in range(10 ** 9) %}x{% endfor %}",
        "{{ messages | length }}",  # an answer changes the prompt
    ],
)
def test_templates_that_break_out_or_break_down_are_one_line(tmp_path, template):
    path = write(tmp_path / "m.jsonl", {"prompt": [USER], "chosen": [GOOD], "rejected": [BAD]})
    with pytest.raises(
        DataError,
        match="m.jsonl:1: column 'chosen' (is refused by the chat template|cannot be told)",
    ) as caught:
        read_preferences(path, chat_template(folder(tmp_path, template)))
    assert "\n" not in str(caught.value)


# ---- split


def test_split_keeps_equal_prompts_together_whatever_the_order():
    rows = [{"prompt": f"p{i % 50}", "n": i} for i in range(200)]
    train, held = split(rows, seed=0)
    assert (
        len(held) == 20
        and len(train) == 180
        and not {r["prompt"] for r in train} & {r["prompt"] for r in held}
    )
    again, backwards = split(rows, seed=0)[1], split(rows[::-1], seed=0)[1]
    assert held == again and {r["n"] for r in held} == {r["n"] for r in backwards}
    assert {r["prompt"] for r in held} != {r["prompt"] for r in split(rows, seed=1)[1]}


@pytest.mark.parametrize(
    ("prompts", "sizes"),
    [([7], (1, 0)), ([0, 1], (1, 1)), ([[1, 2], [1, 2], [3]], None), ([], (0, 0))],
)
def test_split_of_few_prompts_never_empties_the_training_side(prompts, sizes):
    train, held = split([{"prompt": p} for p in prompts], seed=3)
    assert (
        (len(train), len(held)) == sizes if sizes else len(train) in (1, 2) and len(held) in (1, 2)
    )
    assert split([{"prompt": p} for p in prompts], 3, fraction=0)[1] == []


# ---- hostile values and names

ESC = "\x1b[31mred\x07\u202e"


def fault(path, *records, **options):
    """The one line that a damaged file ends with."""
    with pytest.raises(DataError) as caught:
        read_preferences(write(path, *records), **options)
    line = str(caught.value)
    assert "\n" not in line and line.isprintable() and len(line) < 600
    return line


@pytest.mark.parametrize("token", [100, 999_999, 2**31, 2**63, 10**30, -1, -(10**30)])
@pytest.mark.parametrize("column", ["prompt", "chosen", "rejected"])
def test_a_token_id_outside_the_vocabulary_is_refused(tmp_path, token, column):
    good = {"prompt": [1, 2], "chosen": [3, 99], "rejected": [4]}
    line = fault(tmp_path / "ids.jsonl", good, good | {column: [5, token]}, vocab_size=100)
    assert line.endswith(
        f"ids.jsonl:2: column '{column}' holds {token} where a token id from 0 to 99 belongs"
    )


def test_without_a_vocabulary_a_token_id_still_fits_into_32_bits(tmp_path):
    good = {"prompt": [1], "chosen": [2**31 - 1], "rejected": [4]}
    assert read_preferences(write(tmp_path / "ids.jsonl", good))[0]
    assert "holds 2147483648" in fault(tmp_path / "ids.jsonl", good | {"chosen": [2**31]})


def test_token_ids_in_contexts_and_responses_are_checked_too(tmp_path):
    lists = {"prompt": "p", "responses": [[1], [2]], "scores": [0, 1], "context": ["", [7]]}
    assert "column 'context' holds 7" in fault(tmp_path / "l.jsonl", lists, vocab_size=7)
    lists = {"prompt": "p", "responses": [[1], [2, 9]], "scores": [0, 1]}
    assert "column 'responses' holds 9" in fault(tmp_path / "l.jsonl", lists, vocab_size=7)


@pytest.mark.parametrize(
    "record",
    [
        {ESC: 1, "b\nc": 2},
        {ESC: "x" * 1000, **{f"column {i}": i for i in range(5000)}},
        SINGLE | {"label": ESC},
        SINGLE | {"label": {ESC: ESC}},
        GRADED | {"scores": [1, 0, ESC]},
        GRADED | {"scores": [1, 0, [ESC]]},
        GRADED | {"parents": [ESC, 0, 0]},
        GRADED | {"ends": [True, True, "\ud800\n"]},
        PAIR | {"chosen": [USER | {"role": 3, ESC: ESC}]},
        "\x1b[2J{" + ESC,
    ],
    ids=range(10),
)
def test_nothing_of_a_file_reaches_the_terminal_raw(tmp_path, record):
    fault(tmp_path / "f.jsonl", record)


def test_the_name_of_a_file_is_printed_without_control_characters(tmp_path):
    path = write(tmp_path / "\x1b[31m\nname.jsonl", *(PAIR | {"prompt": p} for p in "abc"))
    assert files.World(path, Tokenizer.toy([])).name == r"\x1b[31m\nname.jsonl"
    fault(path, {})
    with pytest.raises(DataError) as caught:
        read_preferences(tmp_path / "\x1b[31m\nno.jsonl")
    assert str(caught.value).isprintable()


def test_messages_of_arrow_are_printed_without_control_characters(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    table = pyarrow.Table.from_pylist([{ESC: 1, "prompt": "p"}])
    pyarrow.parquet.write_table(table, path)
    with pytest.raises(DataError, match="column 'chosen' is missing") as caught:
        read_preferences(path)
    assert str(caught.value).isprintable()
    content = path.read_bytes()
    for start in range(4, len(content) - 8, 7):
        path.write_bytes(content[:start] + b"\x1b[31m\n" + content[start + 6 :])
        with pytest.raises(DataError) as caught:
            read_preferences(path)
        assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    "value",
    [b"bytes", datetime.date(2024, 1, 2), {"a": 1}, [{"a": 1}], [[1.5]], 3, [None]],
    ids=["bytes", "date", "struct", "structs", "lists", "number", "nulls"],
)
def test_parquet_values_of_other_types_are_one_line(tmp_path, value):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR | {"chosen": value}]), path)
    with pytest.raises(DataError, match=r"f.parquet:1: column 'chosen' holds "):
        read_preferences(path)


@pytest.mark.parametrize("depth", [90, 900, 5000, 90_000])
@pytest.mark.parametrize("column", ["prompt", "chosen", "margin", "messages"])
def test_deep_nesting_is_one_line_or_no_harm(tmp_path, column, depth):
    deep = "[" * depth + "]" * depth
    if column == "messages":  # an extra field of a message, compared and given to the template
        message = json.dumps(USER)[:-1] + f', "extra": {deep}}}'
        record = f'{{"chosen": [{message}, {json.dumps(GOOD)}], "rejected": [{message}, '
        record += f"{json.dumps(BAD)}]}}"
    else:
        record = json.dumps(PAIR)[:-1] + f', "{column}": {deep}}}'
    path = write(tmp_path / "deep.jsonl", record)
    try:
        rows, _ = read_preferences(path)
    except DataError as error:
        assert str(error).startswith(f"{path}:1: ") and len(str(error)) < 600
    else:
        assert len(rows) == 1 and column not in ("prompt", "chosen")


@pytest.mark.parametrize("name", sorted(files.RESERVED) + ["__class__", "__deepcopy__", "a b", "7"])
def test_a_column_named_like_a_field_of_the_batch_is_left_out(tmp_path, name):
    if name in ("prompt", "parents", "context", "ends"):
        return  # they have a meaning of their own
    record = {name: 1.0} | GRADED | {"fine": 2}
    rows, _ = read_preferences(write(tmp_path / "f.jsonl", record, record))
    assert set(rows[0]) == {"prompt", "responses", "scores", "where", "fine"}
    batch = collate(rows, Tokenizer.toy([]))
    assert batch.mask.dtype is torch.bool and batch.fine.tolist() == [2.0, 2.0]


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"q": [0.7, 0.4, 0.3]}, "column 'q' sums to 1.4 where probabilities sum to 1"),
        ({"q": [1.2, -0.4, 0.2]}, "column 'q' holds -0.4 where a probability belongs"),
        ({"q": [0.5, 0.5]}, "column 'q' has 2 entries for 3 responses"),
        ({"q": 0.5}, "column 'q' holds a number where a list belongs"),
        ({"q": [1, float("nan"), 0]}, "column 'q' holds nan where a probability belongs"),
        ({"rank": [1, 1, 2]}, "column 'rank' does not hold the ranks 1 to 3, each once"),
        ({"rank": [0, 1, 2]}, "column 'rank' does not hold the ranks 1 to 3, each once"),
        ({"rank": 1}, "column 'rank' holds a number where a list belongs"),
        ({"margin": float("inf")}, "column 'margin' holds inf where a finite number belongs"),
        ({"margin": 10**60}, "column 'margin' holds 1000"),
        ({"reward": [1, 2, float("inf")]}, "column 'reward' holds inf"),
    ],
)
def test_a_column_with_a_meaning_is_checked_when_it_is_read(tmp_path, column, message):
    assert f"f.jsonl:2: {message}" in fault(tmp_path / "f.jsonl", GRADED, GRADED | column)


def test_columns_with_a_meaning_are_kept_where_they_are_right(tmp_path):
    record = GRADED | {"q": [0.5, 0.2, 0.3], "rank": [1, 3, 2]}
    assert bare(read_preferences(write(tmp_path / "f.jsonl", record))[0]) == [record]
    record = PAIR | {"q": "a question", "rank": 7}  # of another meaning in other files
    assert "q" not in read_preferences(write(tmp_path / "f.jsonl", record))[0][0]


# ---- JSON arrays and CSV


@pytest.mark.parametrize("piece", [3, 64, 2**16])
@pytest.mark.parametrize("packed", [False, True])
def test_a_json_array_reads_like_json_lines(tmp_path, monkeypatch, piece, packed):
    monkeypatch.setattr(files, "PIECE", piece)
    records = [PAIR | {"prompt": "caf\u00e9 \n[" * i, "margin": i} for i in range(1, 9)]
    lines = read_preferences(write(tmp_path / "p.jsonl", *records))
    for indent in (None, 2):
        text = "\ufeff \n" + json.dumps(records, indent=indent, ensure_ascii=False) + "\n"
        path = tmp_path / f"p{indent}.json"
        path.write_bytes(gzip.compress(text.encode()) if packed else text.encode())
        rows, counts = read_preferences(path)
        assert (bare(rows), counts) == (bare(lines[0]), lines[1])
        places = [int(row["where"].rpartition(":")[2]) for row in rows]
        assert places == [2 + (1 + 6 * i) * bool(indent) for i in range(8)]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[", ":1: not a JSON array: Expecting value at column 2; is the file cut off"),
        ("[]", ": no usable row"),
        ("[" + json.dumps(PAIR) + ",\n {'a': 1}]", ":2: not a JSON array: .* at column 3"),
        ("[" + json.dumps(PAIR) + ",\n" + json.dumps(PAIR), ":2: not a JSON array: .*cut off"),
        ("[" + json.dumps(PAIR) + "\n" + json.dumps(PAIR) + "]", ":2: .*Expecting ',' or ']'"),
        ("[" + json.dumps(PAIR) + "] x", ":1: not a JSON array: Extra data at column"),
        ("[" + json.dumps(PAIR) + ",\n7]", ":2: a number where an object"),
        ("[" + json.dumps(PAIR) + ',\n{"prompt": 3}]', ":2: column 'chosen' is missing"),
        ("[" * 9999, ":1: not a JSON array: "),
    ],
)
def test_a_fault_of_a_json_array_has_line_and_column(tmp_path, text, message):
    path = tmp_path / "file.json"
    path.write_text(text)
    with pytest.raises(DataError, match="file.json" + message) as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)


def test_csv_reads_like_json_lines(tmp_path):
    records = [
        PAIR | {"prompt": "one, two", "chosen": ' "4"\n', "margin": 1.5},
        PAIR | {"prompt": "", "margin": -2.0},
    ]
    text = 'prompt,chosen,rejected,margin\r\n"one, two"," ""4""\n", 5,1.5\r\n\r\n, 4, 5,-2\r\n'
    (tmp_path / "p.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "p.csv.gz").write_bytes(gzip.compress(text.encode()))
    lines = read_preferences(write(tmp_path / "p.jsonl", *records))
    for name in ("p.csv", "p.csv.gz"):
        rows, counts = read_preferences(tmp_path / name)
        assert (bare(rows), counts) == (bare(lines[0]), lines[1])
        assert [row["where"].rpartition(":")[2] for row in rows] == ["2", "5"]
    (tmp_path / "g.csv").write_text(
        'prompt,responses,scores\n"Add 3 and 4.","[""3 + 4 = 7"", ""3 + 4 = 8"", ""7 it is""]",'
        '"[1.0, 0.0, 1.0]"\n'
    )
    assert bare(read_preferences(tmp_path / "g.csv")[0]) == [GRADED]
    (tmp_path / "l.csv").write_text("prompt,completion,label\nSky?, blue,True\nSky?, red,0\n")
    assert [row["scores"] for row in read_preferences(tmp_path / "l.csv")[0]] == [[1.0], [0.0]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": no usable row"),
        ("prompt,chosen\na,b\n", ":2: column 'rejected' is missing"),
        ("prompt,chosen,rejected\na,b\n", ":2: 2 cells where the header has 3 columns"),
        ("prompt,chosen,rejected\na,b,c,d\n", ":2: 4 cells where the header has 3 columns"),
        ("prompt,chosen,rejected\na,,c\n", ":2: column 'chosen' is empty"),
        ('prompt,chosen,rejected\na,"b"x,c\n', ":2: not a row of CSV: "),
        ('prompt,chosen,rejected\na,b,c\n"a,b\n', ":3: not a row of CSV: .*end of data"),
        ("prompt,chosen,rejected\na\rb,c,d\n", ":2: not a row of CSV: "),
        ("prompt,prompt,chosen\n", ":1: a column of the header"),
        ('prompt,responses,scores\na,b,"[1, 2]"\n', ":2: column 'responses' is not JSON: "),
        ('prompt,chosen,rejected,q\na,b,c,"[1, 2]"\n', ":2: column 'q' sums to 3"),
    ],
)
def test_a_fault_of_a_csv_has_line_and_column(tmp_path, text, message):
    path = tmp_path / "file.csv"
    path.write_text(text, newline="")
    with pytest.raises(DataError, match="file.csv" + message) as caught:
        read_preferences(path)
    assert "\n" not in str(caught.value)
    path.write_bytes(b"prompt,chosen,rejected\na,\xff,c\n")
    with pytest.raises(DataError, match="file.csv:2: not text in UTF-8"):
        read_preferences(path)


def test_cells_and_entries_have_a_limit(tmp_path):
    long = "x" * 10**6
    (tmp_path / "p.csv").write_text('prompt,chosen,rejected\na,"' + "y\n" * 10**5 + '",c\n')
    (tmp_path / "q.csv").write_text(f"prompt,chosen,rejected\na,{long},c\n")
    (tmp_path / "r.json").write_text(json.dumps([PAIR, PAIR | {"chosen": long}]))
    for name in ("p.csv", "q.csv", "r.json"):
        with pytest.raises(DataError, match=f"{name}.*(limit|--data_limit)"):
            read_preferences(tmp_path / name, limit=10**7)


# ---- limits


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("lines", [1, 1000])
def test_a_file_that_unpacks_to_more_than_the_limit_is_refused_early(tmp_path, packed, lines):
    record = json.dumps(PAIR | {"prompt": "x" * (3 * 10**6 // lines)}).encode() + b"\n"
    path = tmp_path / "large.jsonl"
    path.write_bytes(gzip.compress(record * lines) if packed else record * lines)
    tracemalloc.start()
    with pytest.raises(
        DataError, match="large.jsonl.*more than .* [GM]iB .*--data_limit allows more"
    ):
        read_preferences(path, limit=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < (2e5 if lines == 1 else 2e6)  # a line may have a 128th of the limit
    assert len(read_preferences(path)[0]) == lines


@pytest.mark.slow
@pytest.mark.parametrize(
    "record",
    [
        PAIR,
        GRADED | {"responses": ["a", "b"] * 200, "scores": [0, 1] * 200},
        {"prompt": [1], "chosen": [999] * 1000, "rejected": [2]},
        PAIR | {"x": [[]] * 20000},
    ],
    ids=["short rows", "long lists", "token ids", "a column that is left out"],
)
def test_rows_that_take_much_more_memory_than_their_text_are_refused_in_time(tmp_path, record):
    """What is read before the refusal stays near the limit, and so does what is kept below it."""
    limit, line = 3 * 10**6, json.dumps(record).encode() + b"\n"
    path = tmp_path / "large.jsonl.gz"
    path.write_bytes(gzip.compress(line * (3 * limit // len(line))))
    tracemalloc.start()
    with pytest.raises(DataError, match="--data_limit allows more"):
        read_preferences(path, limit=limit)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * limit


def test_a_large_file_is_kept_as_text_and_laid_out_again_in_the_batch():
    rows = [{"prompt": "abc", "responses": ["d", "e"], "scores": [1.0, 0.0]} for _ in range(9)]
    tokenizer = Tokenizer.toy([])
    kept, cut = fit_context(rows, tokenizer, 32, keep=20)
    assert not cut and ["tree" in row for row in kept] == [True] * 4 + [False] * 5
    first, last = collate(kept[:2], tokenizer), collate(kept[-2:], tokenizer)
    assert torch.equal(first.tokens, last.tokens) and torch.equal(first.target, last.target)
    (short,), cut = fit_context([rows[0] | {"prompt": "a" * 40}], tokenizer, 32, True, keep=0)
    assert cut and "tree" not in short and collate([short], tokenizer).position.max() < 32


@pytest.mark.slow
def test_a_damaged_byte_of_a_parquet_file_does_not_end_the_process(tmp_path):
    """Every byte in turn, in a process of its own: Arrow can abort where a file is damaged."""
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "f.parquet"
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist([PAIR, PAIR | {"chosen": " x"}]), path)
    code = """
import subprocess
import sys
from pathlib import Path
from toy.files import DataError, read_preferences
path = Path(sys.argv[1])
data, refused = path.read_bytes(), 0
for i in range(4, len(data)):
    for flip in (1, 2, 255):
        path.write_bytes(data[:i] + bytes([data[i] ^ flip]) + data[i + 1 :])
        try:
            read_preferences(path)
        except DataError:
            refused += 1
print(refused)
"""
    command = [sys.executable, "-c", code, str(path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 500


def test_a_parquet_file_that_unpacks_to_more_than_the_limit_is_refused(tmp_path):
    import pyarrow
    import pyarrow.parquet

    path = tmp_path / "large.parquet"
    rows = [PAIR | {"prompt": "x" * 1000}] * 5000
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    assert path.stat().st_size < 10**5
    with pytest.raises(DataError, match="large.parquet.*more than"):
        read_preferences(path, limit=2 * 10**6)


# ---- the world


def test_the_world_of_a_file_takes_the_tokenizer_that_it_is_given(tmp_path):
    path = write(tmp_path / "p.jsonl", *(PAIR | {"prompt": str(i)} for i in range(20)))
    world = files.World(path, Tokenizer.toy([" 4"]), context=32, seed=3)
    assert (len(world.train), len(world.held_out)) == (18, 2) and world.name == "p.jsonl"
    assert world.model().config.max_position_embeddings == 32
    assert (
        world.align["lr"] > files.World(path, Tokenizer.toy([]), from_checkpoint=True).align["lr"]
    )
    assert {row["responses"][0] for row in world.demonstrations(30, None)} == {" 4"}
    assert world.reward is None and world.single is False
    assert world.key() != files.World(path, Tokenizer.toy([" 4"]), context=32, seed=4).key()
    ids = write(tmp_path / "i.jsonl", {"prompt": [1], "chosen": [300], "rejected": [3]})
    with pytest.raises(DataError, match="i.jsonl:1: column 'chosen' holds 300"):
        files.World(ids, Tokenizer.toy([]))


def test_a_small_file_has_gentler_defaults(tmp_path):
    def world(n, **more):
        records = [PAIR | {"prompt": str(i)} for i in range(n)]
        return files.World(write(tmp_path / "p.jsonl", *records), Tokenizer.toy([]), **more)

    small, large = world(200), world(600)
    assert (small.align["steps"], small.align["lr"]) == (45, 1e-4)  # 180 rows, 8 a step
    assert (large.align["steps"], large.align["lr"]) == (100, 3e-4)
    assert world(10).align["steps"] == 10
    assert world(200, from_checkpoint=True).align["lr"] == 5e-6


def test_lists_become_pairs_of_the_best_and_the_worst(tmp_path):
    lists = [GRADED | {"prompt": p, "scores": [1, 0, 2], "rank": [2, 3, 1]} for p in "abc"]
    world = files.World(write(tmp_path / "g.jsonl", *lists), Tokenizer.toy([]))
    assert all(len(row["responses"]) == 3 for row in world.given(None))
    assert bare(world.given(2))[0] | {"prompt": "a"} == {
        "prompt": "a",
        "responses": ["7 it is", "3 + 4 = 8"],
        "scores": [1.0, 0.0],
        "rank": [1.0, 3.0],
    }


def test_a_file_of_bad_answers_alone_has_no_demonstrations(tmp_path):
    bad = [SINGLE | {"prompt": p, "label": False} for p in "ab"]
    world = files.World(write(tmp_path / "s.jsonl", *bad), Tokenizer.toy([]))
    assert world.single
    with pytest.raises(DataError, match="s.jsonl has no answer that is labelled good"):
        world.demonstrations(3, None)


def test_a_prompt_that_does_not_fit_is_named_with_its_place(tmp_path):
    path = write(tmp_path / "p.jsonl", PAIR, PAIR | {"prompt": "long " * 20})
    rows, _ = read_preferences(path)
    with pytest.raises(UserError, match="p.jsonl:2: a prompt with its responses takes 103 tokens"):
        fit_context(rows, Tokenizer.toy([]), 32)
