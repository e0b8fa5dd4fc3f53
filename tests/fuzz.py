"""Random and hostile input: a result or one line, never a traceback, never lost work.

    python -m pytest -m fuzz tests/fuzz.py --fuzz-seed 7 --fuzz-cases 10000

A case depends on its kind and its seed alone, and a failure names both: the same kind with that
seed and `--fuzz-cases 1` repeats it. SHARES says how the cases are divided among the kinds.
"""

import contextlib
import csv
import functools
import gzip
import io
import json
import math
import multiprocessing
import os
import pathlib
import random
import shutil
import signal
import sys
import time
import traceback
from unittest.mock import ANY

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import Tokenizer, UserError, collate
from lab import Lab, Settings, compare, flags, render, store
from lab.hub import ChatTemplate, load_pretrained
from lab.settings import methods, worlds
from nanomodel import GPT, GPTConfig, LoRA, UNet, UNetConfig
from tests.lab.commands import PAIRS, Killed, killed_at, rows_file
from toy import files, verified
from toy.digits import World as Images
from toy.files import plain_chat

pytestmark = [pytest.mark.fuzz, pytest.mark.usefixtures("own_folder")]
SHARES = dict(rows=0.3, bytes=0.14, images=0.12, checkpoint=0.16, cache=0.124, template=0.015)
SHARES |= dict(folder=0.04, command=0.1, kill=0.001)
BYTES = Tokenizer.toy([], name="bytes")
TOY = Tokenizer.toy([" good", " bad", " the", "\n", "film"])
CHAT = Tokenizer("chat", BYTES.engine, BYTES.eot, BYTES.pad, BYTES.vocab_size, chat=plain_chat)

# ---------------------------------------------------------------- what is allowed


def one_line(text):
    """Whether an error is one line that a terminal may show."""
    return text.isprintable() and 0 < len(text) < 4000


def command(argv, main=train.main):
    """Carry out a command line -> (exit status, stderr); of errors, the last line is one."""
    out, err = io.StringIO(), io.StringIO()
    with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        status = main(argv)
    if status == 2:
        lines = err.getvalue().strip().split("\n")
        assert one_line(lines[-1]) and lines[-1].startswith(("train.py: ", "error: ")), lines
    return status, err.getvalue()


def refused_or(function):
    """The value of function(), or None where it refuses its input with one printable line."""
    try:
        return function()
    except UserError as error:
        line = " ".join(str(error).split())
        assert one_line(line), line
        return None


# ---------------------------------------------------------------- hostile values

ODD = [
    *(None, True, False, 0, -1, 1, 2, 0.5, 1e308, -1e308, 500, 999999, 2**31, 2**63, 10**30),
    *(math.nan, math.inf, -math.inf, "", " ", "x", "\x1b[31mred", "\r\u202e", "\ud800", "\0"),
    *("yes " * 400, [], [None], [0, 1], [[]], [[1, 2], [3]], ["a", "b"], [1e308, -1e308]),
    *({}, {"role": "user"}, {"role": "user", "content": "hi"}, {"a": {"b": [1]}}, [[1.0], [2.0]]),
    *([{"role": "user", "content": "hi"}], [{"role": "x", "content": 3}], [math.nan, 1.0]),
    [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}],
]
NAMES = [
    *("prompt", "chosen", "rejected", "responses", "scores", "completion", "label", "parents"),
    *("context", "ends", "q", "rank", "reward", "ref_logps", "where", "tree", "mask", "to", "t"),
    *("quality", "margin", "columns", "images", "target", "\x1b[31m", "", "__class__", "mine"),
]


def places(value, path=()):
    """The paths to everything inside nested lists and dicts."""
    yield path
    if isinstance(value, list):
        value = dict(enumerate(value))
    for key, inner in value.items() if isinstance(value, dict) else ():
        yield from places(inner, (*path, key))


def disturbed(value, rng, names=NAMES):
    """A copy of a JSON value with one part replaced, removed, renamed or doubled."""
    value = json.loads(json.dumps(value))
    inside = list(places(value))[1:]
    if not inside:
        return rng.choice(ODD)
    *path, key = rng.choice(inside)
    inner = value
    for step in path:
        inner = inner[step]
    kind = rng.random()
    if kind < 0.55:
        inner[key] = rng.choice(ODD)
    elif kind < 0.65:
        del inner[key]
    elif kind < 0.75 and isinstance(inner, dict):
        inner[rng.choice(names)] = inner.pop(key)
    elif kind < 0.9 and isinstance(inner, dict):
        inner[rng.choice(names)] = rng.choice(ODD)
    elif isinstance(inner, list):
        inner.insert(key, rng.choice([inner[key], rng.choice(ODD)]))
    else:
        for _ in range(rng.choice([3, 150])):
            inner[key] = [inner[key]] if rng.random() < 0.5 else {"a": inner[key]}
    return value


def damaged(data, rng):
    """Bytes with a part flipped, cut off, repeated, zeroed or replaced."""
    data = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 3, 20])):
        i = rng.randrange(len(data)) if data else 0
        n = rng.choice([1, 1, 4, 64, len(data)])
        kind = rng.randrange(6)
        if kind == 0 and data:
            data[i] ^= 1 << rng.randrange(8)
        elif kind == 1:
            del data[i : i + n]
        elif kind == 2:
            data[i:i] = data[i : i + n]
        elif kind == 3:
            data[i : i + n] = bytes(len(data[i : i + n]))
        elif kind == 4:
            data[i : i + 1] = rng.choice(
                [b"\xff", b"\0", b"[" * 3000, b'"', b"9" * 400, b"\x1b[2J"]
            )
        else:
            del data[i:]
    return bytes(data)


# ---------------------------------------------------------------- data files


def text_of(rng):
    return " ".join(rng.choice(["yes", "no", "the", "2 + 2", "é", "4"]) for _ in range(3))


def record(form, i, rng):
    """A good record in one of the layouts that are read."""
    prompt, chosen, rejected = f"q {i} ?", text_of(rng), text_of(rng)
    user, a, b = (
        {"role": role, "content": text}
        for role, text in (("user", prompt), ("assistant", chosen), ("assistant", rejected))
    )
    if form == "pairs":
        return {"prompt": prompt, "chosen": chosen, "rejected": rejected, "mine": rng.random()}
    if form == "ids":
        return {"prompt": [1, 2, i], "chosen": [3, 4], "rejected": [5]}
    if form == "messages":
        return {"chosen": [user, a], "rejected": [user, b]}
    if form == "chat":
        return {"prompt": [user], "chosen": [a], "rejected": [b]}
    if form in ("transcript", "asked"):
        head = f"\n\nHuman: {prompt}\n\nAssistant: "
        head = rng.choice(["", f"{head}no\n\nHuman: {prompt}", "note: "]) + head
        if form == "asked":
            return {"prompt": head, "chosen": chosen, "rejected": rejected}
        return {"chosen": head + chosen, "rejected": head + rejected}
    if form == "solutions":
        marks = ["#### {}", "\\boxed{{{}}}", "Answer: {}", "{}", "$ {} $", "\\boxed{{{}"]
        numbers = ["4", "-1,234.5", "1/0", "9" * 5000, "1e999", "\u0663", "x", "", "."]
        row = {"prompt": prompt, "responses": []}
        for _ in range(2):
            row["responses"].append(rng.choice(marks).format(rng.choice(numbers)))
        return row | {"scores": [rng.choice([1, 0]), rng.choice([0, 1])]}
    if form == "labels":
        return {"prompt": prompt, "completion": chosen, "label": rng.random() < 0.5}
    k = 2 if form == "two" else 4
    row = {"prompt": prompt, "responses": [text_of(rng) for _ in range(k)]}
    row["scores"] = [rng.choice([0, 1, 2, 0.5]) for _ in range(k)]
    if form == "tree":
        row |= {"parents": [-1, 0, 0, 1], "context": ["", "x", "", ""]}
        row |= {"ends": [False, True, True, True]}
    if form == "targets":
        row |= {"q": [0.25] * k, "rank": [2, 1, 4, 3], "quality": [0.1] * k}
    return row


FORMS = ["pairs", "ids", "messages", "chat", "transcript", "labels", "two", "four", "tree"]
FORMS += ["targets", "asked", "solutions"]


def records(rng):
    form = rng.choice(FORMS)
    return [record(form, i, rng) for i in range(rng.choice([2, 6, 12]))]


def as_file(path, rows, rng):
    """Write records as JSON Lines, a JSON array or CSV, each also gzipped, or Parquet -> a path."""
    kind = rng.choice([".jsonl", ".jsonl", ".json", ".csv", ".parquet"])
    lines = "".join(json.dumps(row) + "\n" for row in rows).encode()
    if kind == ".json":
        lines = json.dumps(rows, indent=rng.choice([None, 1])).encode()
    if kind == ".csv":
        page, rows = io.StringIO(newline=""), [row for row in rows if isinstance(row, dict)]
        writer = csv.DictWriter(page, list(dict.fromkeys(n for row in rows for n in row)))
        writer.writeheader()
        writer.writerows(
            {n: v if isinstance(v, str) else json.dumps(v) for n, v in row.items()} for row in rows
        )
        lines = page.getvalue().encode(errors="replace")
    if kind == ".parquet":
        import pyarrow
        import pyarrow.parquet

        with contextlib.suppress(pyarrow.ArrowException, TypeError, OverflowError, UnicodeError):
            table = pyarrow.Table.from_pylist([row for row in rows if isinstance(row, dict)])
            pyarrow.parquet.write_table(table, f"{path}.parquet")
            return f"{path}.parquet"
        kind = ".jsonl"
    packed = rng.random() < 0.25
    path += kind + ".gz" * packed
    with open(path, "wb") as file:
        file.write(gzip.compress(lines) if packed else lines)
    return path


def used(path, rng):
    """Everything that happens to a file before training, and the batches of its rows."""
    small = dict(steps=1, batch_size=4, eval_size=2, base_steps=1)
    if not path.endswith(".npz"):
        small |= dict(context=64, max_response=4)
        more = dict(truncate="true", lora=2, verify="true", ema=0.5, optimizer="dct_adamw")
        small |= {name: more[name] for name in more if rng.random() < 0.15}
    elif rng.random() < 0.3:
        small |= rng.choice([dict(guidance=2), dict(image_size=4), dict(ema=0.5)])
    given = {name: str(value) for name, value in small.items()} | {"data": path}
    online = ["grpo", "dno", "disco"]
    given["method"] = rng.choice(online if "verify" in small else methods())
    chosen = flags.read_flags(["--method", given["method"]])[1]
    runs = refused_or(lambda: flags.fitting(flags.combinations(given, chosen), given))
    if runs and rng.random() < 0.05:  # what was not refused trains
        argv = [f"--{name}={value}" for name, value in given.items()]
        with pytest.MonkeyPatch.context() as patch:  # whatever steps a method has of its own
            patch.setattr(Lab, "few", lambda lab, n, least=4: min(n, least))
            assert command([*argv, "--out", f"{path}-run"])[0] in (0, 2, 3)
    if path.endswith(".npz"):
        return
    kind = verified if "verify" in small else files
    world = refused_or(lambda: kind.World(path, rng.choice([BYTES, CHAT]), context=64))
    if world and kind is files:
        lab = Lab(Settings(base_steps=0, truncate=True), quiet=True, world=world)
        lab.base()
        batch = refused_or(lambda: lab.collate(lab.encode(world.given(None)[:8])))
        assert batch is None or batch.mask.any() and batch.scores.isfinite().all()


def fuzz_rows(rng, path):
    rows = records(rng)
    for _ in range(rng.choice([1, 1, 2, 5])):
        rows = disturbed(rows, rng)
    used(as_file(f"{path}/rows", rows if isinstance(rows, list) else [rows], rng), rng)


def fuzz_bytes(rng, path):
    name = as_file(f"{path}/rows", records(rng), rng)
    with open(name, "rb") as file:
        data = damaged(file.read(), rng)
    with open(name, "wb") as file:
        file.write(data)
    used(name, rng)


def fuzz_images(rng, path):
    n, side = rng.choice([0, 1, 4, 30]), rng.choice([0, 1, 4, 8])
    shape = rng.choice(
        [(n, side, side), (n, side, side, 3), (n, side, 2 * side), (n,), (n, 1, 8, 8)]
    )
    dtype = rng.choice(["uint8", "float32", "float64", "int64", "complex64", "bool", "U3"])
    noise = np.random.default_rng(rng.randrange(2**32))
    arrays = dict(images=(noise.random(shape) * rng.choice([1, 255, 1e30, -1])).astype(dtype))
    arrays["labels"] = np.arange(rng.choice([n, n, n + 1])) % rng.choice([1, 2, 10])
    if rng.random() < 0.3:
        arrays["labels"] = arrays["labels"] * rng.choice([-1, 0.5, 10**12])
    if rng.random() < 0.4:
        texts = ["a cat", "", "Two  dogs", "\x1b[31m", "x " * 70, "\ud800", "cat " * 20]
        arrays["prompts"] = np.array([rng.choice(texts) for _ in range(n)] or ["x"][:n])
        del arrays[rng.choice(["labels", "labels", "labels", "prompts"])]
    if rng.random() < 0.5:
        pairs = rng.choice([1, 3, 12])
        kind = arrays.get("labels", arrays.get("prompts", np.zeros(n)))
        for name in rng.choice([["image_w", "image_l"]] * 5 + [["image_w"]]):
            same = np.flatnonzero(kind == kind[0]) if n and rng.random() < 0.7 else np.arange(n)
            picked = [rng.choice(same.tolist() or [0]) for _ in range(pairs)]
            arrays[name] = np.array(picked) + (rng.random() < 0.1) * rng.choice([-1, 0.5, 10**12])
    if rng.random() < 0.2:
        arrays[rng.choice(["images", "labels", "image_w", "\x1b[31m"])] = np.array(
            rng.choice([1.0, math.nan])
        )
    name = f"{path}/images.npz"
    rng.choice([np.savez, np.savez_compressed])(name, **arrays)
    if rng.random() < 0.4:
        with open(name, "rb") as file:
            data = damaged(file.read(), rng)
        with open(name, "wb") as file:
            file.write(data)
    used(name, rng)
    world = refused_or(lambda: Images.from_npz(name, limit=2**22))
    if world:
        assert world.reward([0], world.images[:1]).isfinite().all()


# ---------------------------------------------------------------- checkpoints


def save_checkpoint(folder, kind):
    torch.manual_seed(0)
    if kind == "unet":
        model = UNet(UNetConfig(width=8))
    elif kind == "words":
        words = [[2, 3], [2, 1], [0, 0]]
        model = UNet(UNetConfig(width=8, classes=2, words=words, patch=2, place=True, free=True))
    else:
        sizes = dict(vocab_size=TOY.vocab_size, hidden_size=16, intermediate_size=24)
        sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
        model = GPT(GPTConfig(**sizes, max_position_embeddings=64), TOY)
    if kind == "lora":
        LoRA.adapt(model, 2)
    model.save_pretrained(folder)


def fuzz_checkpoint(rng, path):
    kind = rng.choice(["gpt", "gpt", "lora", "unet", "words"])
    save_checkpoint(path, kind)
    for _ in range(rng.choice([1, 1, 2])):
        name = rng.choice(sorted(n for n in os.listdir(path) if not n.startswith("rows")))
        with open(f"{path}/{name}", "rb") as file:
            data = file.read()
        if rng.random() < 0.1:
            os.unlink(f"{path}/{name}")
            continue
        if rng.random() < 0.6 and name.endswith(".json"):
            with contextlib.suppress(ValueError, RecursionError):
                value = json.loads(data)
                if name == "tokenizer.json" and rng.random() < 0.5:
                    value["model"] = disturbed(value["model"], rng)
                else:
                    value = disturbed(value, rng, ["eos_token_id", "rope_scaling", "chat_template"])
                data = json.dumps(value).encode()
        elif rng.random() < 0.6 and name == "model.safetensors":
            with contextlib.suppress(Exception):  # it may be damaged already
                weights = load_file(f"{path}/{name}")
                other = rng.choice(sorted(weights))
                change = rng.choice(
                    [
                        lambda x: x.long(),
                        lambda x: x > 0,
                        lambda x: x * math.nan,
                        lambda x: x[:1],
                        lambda x: x.half(),
                        lambda x: x * 1e38,
                    ]
                )
                weights[other] = change(weights[other])
                save_file(weights, f"{path}/{name}")
                continue
        else:
            data = damaged(data, rng)
        with open(f"{path}/{name}", "wb") as file:
            file.write(data)
    model = refused_or(lambda: load_pretrained(path))
    if isinstance(model, GPT):
        model.eval()
        model.tokenizer.decode([1, 2])
        if model.config.vocab_size < 2000 and refused_or(
            lambda: model.tokenizer.encode("the film")
        ):
            row = {"prompt": "the film", "responses": [" good", " bad"]}
            batch = collate([row], model.tokenizer)
            if batch.position.max() < model.config.max_position_embeddings:
                model.logps(batch)
    elif model is not None:
        model.sample([0], 1, torch.Generator().manual_seed(0), steps=2)


# ---------------------------------------------------------------- templates

PIECES = [
    "{{ bos_token }}",
    "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}",
    "{% if add_generation_prompt %}assistant:{% endif %}",
    "{{ messages[0]['content'] | trim }}",
    "{{ messages[9].content }}",
    "{{ raise_exception('no \x1b[31m') }}",
    "{{ messages | tojson }}",
    "{{ ''.__class__.__mro__ }}",
    "{{ messages.__init__.__globals__ }}",
    "{% set x = namespace(n=2) %}{% for i in range(40) %}{% set x.n = x.n * x.n %}{% endfor %}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10 ** 9 }}",
    "{{ 'x' * 10 ** 7 }}",
    "{{ 9 ** 9 ** 9 }}",
    "{% include 'x' %}",
    "{% macro f(n) %}{{ f(n) }}{% endmacro %}{{ f(1) }}",
    "{% for",
    "{{ '\\ud800' }}",
    "{{ namespace }}",
    "{{ range(10 ** 9) | list }}",
    "{{ ('%' ~ '99999999s') | format('x') }}",
]


def fuzz_template(rng, path):
    text = "".join(rng.choice(PIECES) for _ in range(rng.choice([1, 2, 4])))
    if rng.random() < 0.3:
        i = rng.randrange(len(text))
        text = text[:i] + text[i + rng.randrange(4) :]
    chat = ChatTemplate("somewhere\x1b", text, {"bos_token": "<s>"})
    chat.folder = "somewhere"
    start = time.time()
    for messages in ([{"role": "user", "content": "hi"}], []):
        found = refused_or(lambda messages=messages: chat(messages, True))
        assert found is None or isinstance(found, str) and len(found) <= render.LENGTH
    assert time.time() - start < 2 * chat.patience
    chat.stop()


# ---------------------------------------------------------------- command lines

VALUES = [
    *(
        "0",
        "1",
        "2",
        "5",
        "-1",
        "0.5",
        "1e308",
        "nan",
        "inf",
        "99999999999999999999",
        "1,2",
        "0.1,1",
    ),
    *(
        "",
        ",",
        "x",
        "true",
        "false",
        "cpu",
        "cuda:9",
        "meta",
        "reviews",
        "bandit",
        "\x1b[31m",
        "\0",
    ),
    *(
        "cpu,X",
        "a,a",
        "1,",
        "run",
        "nothing.jsonl",
        "/dev/null",
        "float32",
        "bfloat16",
        "on",
        "1e3",
    ),
]
KINDS = dict(int=["1", "2", "16", "2,4"], float=["0.5", "0.1,1", "=flip"], bool=["true", "false"])
KINDS["str"] = ["auto", "on", "off", "float32", "adamw", "dct_adamw", "1/2", "run"]


def fuzz_command(rng, path):
    """Whole command lines up to the first step: every run ends when it is opened."""
    argv = []
    if rng.random() < 0.95:
        argv += ["--method", rng.choice([*methods(), "dpo,rdpo", "all", "x"])]
    if rng.random() < 0.8:
        argv += ["--world", rng.choice([*worlds(), "nowhere"])]
    known = flags.settings_flags() | dict.fromkeys(flags.ACTIONS)
    for about in flags.catalogue():
        known |= about.flags if about.name in argv else {}
    for _ in range(rng.choice([0, 1, 2, 4])):
        name = rng.choice(list(known))
        fitting = (
            [KINDS.get(part.strip(), []) for part in known[name].kind.split("|")]
            if known[name]
            else []
        )
        argv += [f"--{name}"]
        argv += (
            [rng.choice(sum(fitting, []) if fitting and rng.random() < 0.6 else VALUES)]
            if rng.random() < 0.9
            else []
        )
    if rng.random() < 0.1:
        rng.shuffle(argv)
    before = os.listdir(".")
    status, _ = command(argv)
    assert status in (0, 1, 2)
    if status == 2:
        assert sorted(before) == sorted(os.listdir(".")), argv
    for name in set(os.listdir(".")) - set(before):
        shutil.rmtree(name, ignore_errors=True)


# ---------------------------------------------------------------- values on disk


def some_value(rng, depth=0):
    kind = rng.randrange(8 if depth < 3 else 5)
    if kind == 0:
        return torch.randn(
            rng.randrange(6), 3, generator=torch.Generator().manual_seed(rng.randrange(99))
        )
    if kind < 5:
        return [1, 2.5, "é\x1b", None][kind - 1]
    if kind == 5:
        return {str(i): some_value(rng, depth + 1) for i in range(rng.randrange(4))}
    return [some_value(rng, depth + 1) for _ in range(rng.randrange(4))]


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, list):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def fuzz_cache(rng, path):
    value, place = {"value": some_value(rng), "x": torch.ones(3)}, f"{path}/value"
    store.save_value(place, value)
    assert equal(store.load_value(place), value)
    names = [name for name in os.listdir(path) if name.startswith("value")]
    name = f"{path}/{rng.choice(sorted(names))}"
    with open(name, "rb") as file:
        data = file.read()
    if rng.random() < 0.1:
        os.unlink(name)
    else:
        with open(name, "wb") as file:
            file.write(damaged(data, rng))
    with contextlib.redirect_stderr(io.StringIO()) as said:
        found = store.load_value(place)
    assert found is None or equal(found, value)
    assert found is not None or "damaged" in said.getvalue() or not os.path.exists(f"{place}.json")
    store.save_value(place, value)
    assert equal(store.load_value(place), value)


# ---------------------------------------------------------------- folders of runs and of results

TINY = ["--steps=12", "--batch_size=4"]
TABLE = ["--method=dpo", "--world=bandit", "--prompts=24", *TINY]
TEXT = ["--method=dpo", "--lora=2", "--base_steps=2", "--max_response=4", "--eval_size=4", *TINY]
KEPT = ("compare", "prompt", "init", "merge")  # commands that leave the folders as they are


@functools.cache
def masters(place):
    """Undamaged folders, made once: runs, sweeps, a shard, a run that was killed, results."""
    data = rows_file(pathlib.Path(place) / "rows.jsonl", PAIRS)
    at = {name: f"{place}/{name}" for name in ("table", "text", "sweep", "shard", "begun")}
    sweep = [*TABLE, "--beta=0.1,0.3"]
    for name, argv in dict(table=TABLE, text=[*TEXT, "--data", data], sweep=sweep).items():
        assert command([*argv, "--out", at[name]]) == (0, ANY), name
    assert command([*sweep, "--shard=1/2", "--out", at["shard"]]) == (0, ANY)
    with pytest.MonkeyPatch.context() as patch, contextlib.suppress(Killed):
        patch.setattr(Lab, "checkpoint_every", 0.0)
        killed_at(patch, 9)
        command([*TEXT, "--data", data, "--out", at["begun"]])
    shutil.copytree(f"{store.HERE}/results", f"{place}/results", ignore=keep_papers)
    return [*at, "results"]


def keep_papers(folder, names):
    """What `copytree` leaves out: most papers."""
    return [n for n in names if n.partition(".")[0] not in ("dpo", "rdpo", "sft", "README")]


def spoil(folder, rng):
    """Damage one file of a folder, or remove it."""
    files = [os.path.join(place, n) for place, _, names in os.walk(folder) for n in names]
    name = rng.choice(sorted(n for n in files if not n.endswith((".png", ".lock"))))
    with open(name, "rb") as file:
        data = file.read()
    if rng.random() < 0.1:
        os.unlink(name)
        return
    lines = data.split(b"\n")
    i = rng.randrange(len(lines)) if name.endswith(".jsonl") else None
    if rng.random() < 0.7 and name.endswith((".json", ".jsonl")):
        with contextlib.suppress(ValueError, RecursionError):
            value = json.loads(data if i is None else lines[i])
            for _ in range(rng.choice([1, 1, 3])):
                value = disturbed(value, rng)
            lines[i or 0 : len(lines) if i is None else i + 1] = [json.dumps(value).encode()]
            data = b"\n".join(lines)
    else:
        data = damaged(data, rng)
    with open(name, "wb") as file:
        file.write(data)


def contents(folder):
    """{path: bytes} of the files of a folder, locks apart."""
    paths = [os.path.join(place, n) for place, _, names in os.walk(folder) for n in names]
    found = {}
    for path in paths:
        if not path.endswith(".lock"):
            with open(path, "rb") as file:
                found[path] = file.read()
    return found


def fuzz_folder(rng, path):
    """A folder with damaged files is refused in one line or used, and nothing in it is lost."""
    place = os.path.join(os.path.dirname(path), "masters")
    os.makedirs(place, exist_ok=True)
    names = masters(place)
    for name in names:
        shutil.copytree(f"{place}/{name}", f"{path}/{name}")
    target = rng.choice(names)
    folder = f"{path}/{target}"
    for _ in range(rng.choice([1, 1, 2])):
        spoil(folder, rng)
    data = ["--data", f"{place}/rows.jsonl"]
    ways = dict(
        compare=["--compare", folder, f"{path}/table", "--out", f"{path}/new"],
        resume=["--resume", folder],
        merge=["--merge", folder, f"{path}/shard", "--out", f"{path}/new"],
        judge=["--judge", folder],
        prompt=["--init", folder, "--prompt", "question 1 ?", *data, "--max_response=4"],
        init=[
            "--method=dpo",
            "--init",
            folder,
            *data,
            "--max_response=4",
            *TINY,
            "--out",
            f"{path}/new",
        ],
        overwrite=[*TABLE, "--out", folder, "--overwrite", *rng.choice([[], ["--lr=1e300"]])],
        shard=[*TABLE, "--beta=0.1,0.3", "--shard=2/2", "--out", folder],
        claim=["--method=dpo", "--claim", "--out", folder],
    )
    fitting = dict(text=["prompt", "init"], begun=["resume"], shard=["merge", "shard"])
    fitting |= dict(results=["judge", "judge", "claim"])
    way = rng.choice(fitting.get(target, []) * 3 + ["compare", "resume", "overwrite"])
    before = contents(folder)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train.results, "measured", lambda *about, **more: [])
        status, error = command(ways[way])
    assert status in (0, 1, 2, 3)
    after = contents(folder)
    if way in KEPT or status == 2 and way != "resume":
        assert before == {name: after.get(name) for name in before}, (way, error)
    lost = [name for name in before if name not in after and "/stages/" not in name]
    assert way == "overwrite" or not lost, (way, lost)


# ---------------------------------------------------------------- kills


SERVER = multiprocessing.get_context("forkserver")  # its children are copies of a clean process
SERVER.set_forkserver_preload(["train", "methods.dno", "lab.align", __name__])


def child(argv, path, cache, pause):
    """Start a command in a process of its own -> (the process, its stderr).

    pause: seconds between two checkpoints."""
    said = f"{path}/stderr"
    pathlib.Path(said).unlink(missing_ok=True)
    process = SERVER.Process(target=carry_out, args=(argv, path, said, f"{path}/{cache}", pause))
    process.start()
    return process, said


def carry_out(argv, path, said, cache, pause):
    """What a child does; it never returns."""
    status = 70
    with open(os.devnull, "w") as sys.stdout, open(said, "w") as sys.stderr:
        try:
            os.chdir(path)
            signal.signal(signal.SIGINT, signal.default_int_handler)
            torch.set_num_threads(1)
            compare.picture = lambda *about: False
            store.CACHE, Lab.checkpoint_every = cache, pause
            status = train.main(argv)
        except KeyboardInterrupt:
            status = 130
        except BaseException:  # noqa: BLE001 - the parent reads it
            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(status)


def ended(process, said):
    """Wait for a child -> its exit status, negative for a signal."""
    process.join()
    if not os.path.exists(said):  # it was killed before it began
        return process.exitcode or 1
    with open(said, encoding="utf-8") as file:
        error = file.read()
    assert "Traceback" not in error and process.exitcode in (0, 130, -9, -15, -2), (
        process.exitcode,
        error,
    )
    return process.exitcode


def fuzz_kill(rng, path):
    """A run that is killed again and again ends with the weights of one that is left alone."""
    world = rng.choice(["bandit", "reviews"])
    names = ["dpo", "adpo", "curry_dpo"]
    size = ["--steps=200"] if world == "bandit" else ["--steps=12", "--base_steps=4"]
    if world == "reviews":
        names += ["dno", "madpo", "ofs_dpo", "rlhf"]
        more = [["--lora=2"], ["--ema=0.5"], ["--optimizer=dct_adamw"], [], []]
        size += ["--eval_size=8", "--max_response=6", *rng.choice(more)]
    argv = ["--method", rng.choice(names), "--world", world, *size]
    argv += ["--prompts=24", "--batch_size=8", f"--seed={rng.randrange(99)}"]
    argv += ["--lr=0.001,0.003"] if rng.random() < 0.3 else []
    pause = rng.choice([0.0, 0.0, 0.1, 5.0])
    clean = SERVER.Process(target=int)  # the first child waits until the clean process has begun
    clean.start()
    clean.join()
    begun = time.time()
    assert ended(*child([*argv, "--out", "whole"], path, "cache-whole", 5.0)) == 0
    seconds, kills = time.time() - begun, rng.choice([1, 3, 5])
    while True:
        again = ["--resume", "cut"]
        if not os.path.exists(f"{path}/cut/run.json"):
            shutil.rmtree(f"{path}/cut", ignore_errors=True)  # killed before it was written
            again = [*argv, "--out", "cut"]
        process, said = child(again, path, "cache-cut", pause)
        if kills:
            time.sleep(rng.random() * 1.2 * seconds)
            way = rng.choice([signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
            # its id is free as soon as it has ended, and may be that of another process by now
            with contextlib.suppress(ProcessLookupError):
                if process.is_alive():
                    os.kill(process.pid, way)
            kills -= 1
        if ended(process, said) == 0:
            break
    assert not list(os.walk(f"{path}/cut/stages")) and not [
        name for _, _, names in os.walk(f"{path}/cut") for name in names if name[0] == "."
    ]
    for place, _, names in os.walk(f"{path}/whole"):
        for name in names:
            if name in ("model.safetensors", "metrics.jsonl", "samples.txt", "sweep.json"):
                one = os.path.join(place, name)
                two = one.replace(f"{path}/whole", f"{path}/cut", 1)
                assert open(one, "rb").read() == open(two, "rb").read(), name


# ---------------------------------------------------------------- all of them


@pytest.fixture
def limited(impatient, monkeypatch):
    """Small limits, no pictures, no downloads; commands end before their first step."""
    monkeypatch.setattr(Tokenizer, "text", classmethod(lambda cls: BYTES))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for name in ("declared", "fields_of"):  # they read the same sources again and again
        monkeypatch.setattr(flags, name, functools.cache(getattr(flags, name)))
    store.open_cache()


def enough(*about, **more):
    """Takes the place of `train.open_run`."""
    raise UserError("that is enough")


@pytest.mark.parametrize("kind", SHARES)
def test_random_and_hostile_input(kind, tmp_path, request, limited, monkeypatch):
    seed, cases = (request.config.getoption(f"--fuzz-{name}") for name in ("seed", "cases"))
    if kind == "command":
        monkeypatch.setattr(train, "open_run", enough)
        monkeypatch.setattr(train, "ask", lambda *about: None)
        monkeypatch.setattr(train, "several", lambda *about: 0)  # sweeps and claims
        for name in ("again", "smoke"):
            monkeypatch.setattr(train.results, name, lambda *about: 0)
        monkeypatch.setattr(train.contract, "check", lambda run: 0)
    faults = {}  # {where and what: the first case in which it happened}
    for case in range(seed, seed + max(1, round(cases * SHARES[kind]))):
        Lab.memory.clear()
        path = tmp_path / f"{kind}-{case}"
        path.mkdir()
        try:
            globals()[f"fuzz_{kind}"](random.Random(f"{kind} {case}"), str(path))
        except Exception as error:  # noqa: BLE001 - whatever it is, it is a fault
            ours = [
                f for f in traceback.extract_tb(error.__traceback__) if store.HERE in f.filename
            ]
            what = f"case {case}: {type(error).__name__}: {error}"
            where = " < ".join(f"{os.path.basename(f.filename)}:{f.lineno}" for f in ours[:1:-1])
            faults.setdefault(where, f"{what}\n  in {where}")
        shutil.rmtree(path)
    again = f'repeat: -k "[{kind}]" --fuzz-seed CASE --fuzz-cases 1'
    assert not faults, "\n".join([*faults.values(), again])
