"""Preferences from files: pairs, graded lists and single answers as JSON Lines, Parquet or a data set on the Hub; no true reward."""

import gzip
import hashlib
import json
import random
import re
from pathlib import Path

from data import OWN, DataError, Tokenizer, error_line, printable, reorder
from toy import world

FORMATS = ("chosen", "rejected"), ("responses", "scores"), ("completion", "label")
ACCEPTED = "prompt/chosen/rejected, chosen/rejected with the prompt inside, prompt/responses/scores, prompt/completion/label"
TURN, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # who speaks in an Anthropic HH transcript


def plain_chat(messages, add_generation_prompt):
    """Chat without a template: one line "role: content" per message.

    "assistant:" follows when an answer is to come.
    """
    text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    return text + "assistant:" * bool(add_generation_prompt)


def read_preferences(source, chat_template=None, seed=None):
    """Preferences from JSON Lines (also gzipped), Parquet or the Hub ("owner/name" or "owner/name:split") -> (rows, counts).

    Columns: see ACCEPTED. A text is a string, a list of messages {"role", "content"} or, beside a prompt, a list of token ids. Without
    a prompt column the prompt is what stands before the last assistant turn. Pairs and graded lists of two come out preferred first;
    completion/label gives one response with score 1.0 or 0.0. Graded lists may have parents, context and ends; further columns of numbers
    (one a row, or one a response) are carried along where every row has them, other columns are left out.
    chat_template: function of messages, add_generation_prompt -> text; None is plain_chat. What a template writes after the last message
    is cut off: the end token closes a response. seed shuffles the rows; None keeps their order.
    counts: {reason: rows dropped for it}.  DataError: anything else that is wrong, or no row left."""
    rows, counts, form = [], {}, None
    for where, record in _records(source):
        if not isinstance(record, dict):
            raise DataError(f"{where}: {_kind(record)} where an object with columns belongs")
        record = {name: value for name, value in record.items() if value is not None}
        form = form or max(FORMATS, key=lambda names: sum(name in record for name in names))
        for name in form:
            if name not in record:
                there = printable(", ".join(map(str, record))) or "none"
                raise DataError(
                    f"{where}: column '{name}' is missing or null (columns there: {there}; accepted: {ACCEPTED})"
                )
        row = _row(record, form, chat_template or plain_chat, where)
        if isinstance(row, str):
            counts[row] = counts.get(row, 0) + 1
        else:
            rows.append(row)
    if not rows:
        raise DataError(
            f"{source}: no usable row ({', '.join(f'{r}: {n}' for r, n in counts.items()) or 'the file is empty'})"
        )
    shared = set.intersection(
        *({(name, type(value)) for name, value in row.items()} for row in rows)
    )
    rows = [
        {name: value for name, value in row.items() if name in OWN or (name, type(value)) in shared}
        for row in rows
    ]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return rows, counts


def _row(record, form, template, where):
    """One record -> a row, or the reason (a string) for which it is dropped."""

    def at(column):
        return f"{where}: column '{column}'"

    texts, columns, marks = [record[form[0]]], form, record[form[1]]
    if form[0] == "chosen":
        texts, scores = [*texts, marks], [1.0, 0.0]
    elif form[0] == "completion":
        scores = _list(
            [marks],
            at("label"),
            1,
            lambda k, mark: isinstance(mark, (int, float)) and mark in (0, 1),
            "true or false",
        )
    else:
        texts = _list(texts[0], at("responses"))
        columns, scores = (
            ["responses"] * len(texts),
            _list(marks, at("scores"), len(texts), _finite, "a finite number"),
        )
        if len(texts) < 2:
            raise DataError(
                f"{at('responses')} has {len(texts)} where a comparison needs 2 (single answers: prompt/completion/label)"
            )
    spoken = _speak(record.get("prompt"), texts, columns, template, at)
    if isinstance(spoken, str):
        return spoken
    row, count = (
        {"prompt": spoken[0], "responses": spoken[1], "scores": [float(score) for score in scores]},
        len(texts),
    )
    for name, value in record.items():
        if name in ("parents", "context", "ends") and form[0] == "responses":
            good, what = {
                "parents": (
                    lambda k, parent: type(parent) is int and -1 <= parent < k,
                    "-1 or the number of an earlier response",
                ),
                "context": (lambda k, text: _text(text, at("context"), empty=True) is text, "text"),
                "ends": (lambda k, end: isinstance(end, bool), "true or false"),
            }[name]
            row[name] = _list(value, at(name), count, good, what)
        elif name not in form and (name not in OWN or name == "reward" and isinstance(value, list)):
            values = value if isinstance(value, list) else [value]
            if len(values) == (count if values is value else 1) and all(
                isinstance(v, (int, float)) for v in values
            ):
                values = [
                    float(v) for v in _list(values, at(name), None, _finite, "a finite number")
                ]
                row[name] = values if isinstance(value, list) else values[0]
    if count > 1:
        if len(set(scores)) == 1:
            return "equal scores"
        if not {"parents", "context"} & set(row) and all(
            text == row["responses"][0] for text in row["responses"]
        ):
            return "identical responses"
        if count == 2 and "parents" not in row and scores[1] > scores[0]:
            row = reorder(row, [1, 0])
    return row


def _speak(prompt, texts, columns, template, at):
    """The prompt and the responses as text (or token ids), or the reason for dropping the row."""
    chat = any(
        isinstance(text, list) and text and isinstance(text[0], dict) for text in [prompt, *texts]
    )
    if chat:
        texts = [_chat(text, "assistant", at(column)) for text, column in zip(texts, columns)]
    else:
        texts = [_text(text, at(column)) for text, column in zip(texts, columns)]
    if (
        prompt is None or chat and isinstance(prompt, str) and texts[0][0]["role"] != "assistant"
    ):  # the prompt is inside
        if chat:
            heads, texts = [text[:-1] for text in texts], [text[-1:] for text in texts]
        else:
            parts = [
                text.rpartition(TURN) if isinstance(text, str) else ("", "", "") for text in texts
            ]
            heads, texts = [head + turn for head, turn, _ in parts], [tail for _, _, tail in parts]
        prompt = heads[0]
        if not prompt:
            raise DataError(
                f"{at('prompt')} is missing, and '{columns[0]}' has no turn before the assistant's last (accepted: {ACCEPTED})"
            )
        # such transcripts are logs of what happened: what is odd in them is no fault of the file
        if any(head != prompt for head in heads):
            return "prompts differ"
        if any(HUMAN in text for text in texts if not chat):
            return "last turn is not the assistant's"
        if not all((text[0]["content"] if chat else text).strip() for text in texts):
            return "empty response"
    if not chat:
        return _text(prompt, at("prompt"), empty=True), texts
    if any(text[-1]["role"] != "assistant" for text in texts):
        return "last turn is not the assistant's"
    prompt, responses, mark = _chat(prompt, "user", at("prompt")), [], "@@@"
    if all(text[: len(prompt)] == prompt for text in texts):
        texts = [text[len(prompt) :] for text in texts]
    for text, column in zip(texts, columns):
        if not text or not text[-1]["content"].strip():
            raise DataError(f"{at(column)} is empty")
        try:
            head, full = template(prompt, True), template(prompt + text, False)
            closing = template(
                prompt + text[:-1] + [{**text[-1], "content": mark}], False
            ).rpartition(mark)[2]
        except Exception as error:  # a template is foreign code: whatever it raises is its message
            raise DataError(
                f"{at(column)} is refused by the chat template: {printable(error_line(error))}"
            ) from None
        if not full.startswith(head):
            raise DataError(
                f"{at(column)} cannot be told from its prompt: the chat template rewrites a prompt once it is answered"
            )
        responses.append(_text(full[len(head) :].removesuffix(closing), at(column)))
    return _text(head, at("prompt")), responses


def _chat(value, role, at):
    """Messages without their null fields; a text is one message of `role`."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    good = (
        isinstance(messages, list)
        and messages
        and all(isinstance(message, dict) for message in messages)
    )
    if not good or not all(
        isinstance(message.get(key), str) for message in messages for key in ("role", "content")
    ):
        raise DataError(
            f"{at} holds {_kind(value)} where messages with text under 'role' and 'content' belong"
        )
    return [
        {key: field for key, field in message.items() if field is not None} for message in messages
    ]


def _text(value, at, empty=False):
    """value, if it is text or a list of token ids."""
    ids = isinstance(value, list) and all(type(token) is int and token >= 0 for token in value)
    if not (isinstance(value, str) or ids):
        raise DataError(f"{at} holds {_kind(value)} where text belongs")
    if not empty and not (value if ids else value.strip()):
        raise DataError(f"{at} is empty")
    if not ids and re.search("[\ud800-\udfff]", value):
        raise DataError(f"{at} holds half a character (a lone surrogate)")
    return value


def _list(value, at, count=None, good=None, what=None):
    """value, if it is a list of `count` entries for which good(k, entry) holds."""
    if not isinstance(value, list):
        raise DataError(f"{at} holds {_kind(value)} where a list belongs")
    if count is not None and len(value) != count:
        raise DataError(f"{at} has {len(value)} entries for {count} responses")
    for k, entry in enumerate(value):
        if good and not good(k, entry):
            raise DataError(f"{at} holds {entry!r:.40} where {what} belongs")
    return value


def _finite(k, value):
    return isinstance(value, (int, float)) and abs(value) < 3e38  # in float32 too


def _kind(value):
    return {
        dict: "an object",
        list: "a list",
        str: "text",
        bool: "true or false",
        type(None): "null",
    }.get(type(value), "a number")


def _records(source):
    """(file:line, record) of a file or a Hub data set. Nothing in it is ever unpickled or executed."""
    number, path, line = 0, Path(source).expanduser(), ""
    hub = (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:\w+)?", str(source)) and not path.parent.is_dir()
    )
    if (
        path.is_dir()
        or not path.exists()
        and (not hub or path.suffix in (".jsonl", ".json", ".gz", ".parquet"))
    ):
        what = "is a folder" if path.is_dir() else "no such file"
        raise DataError(
            f"{source}: {what}; a .jsonl, .jsonl.gz or .parquet file belongs here, or owner/name of a data set on the Hub"
        )
    try:
        for number, record in enumerate(_raw(source, path), 1):
            if isinstance(record, bytes):
                try:
                    line = record.decode("utf-8-sig")
                    if not line.strip():
                        continue
                    record = json.loads(line)
                except UnicodeDecodeError:
                    raise DataError(
                        f"{source}:{number}: not text in UTF-8: a binary file?"
                    ) from None
                except (ValueError, RecursionError) as error:
                    cut = "" if line.endswith("\n") else "; is the file cut off?"
                    raise DataError(
                        f"{source}:{number}: not a line of JSON: {printable(error_line(error))}{cut}"
                    ) from None
            yield f"{source}:{number}", record
    except DataError:
        raise
    except Exception as error:  # zlib, gzip, Arrow, the network and the Hub have dozens of types
        raise DataError(
            f"{source}: cannot be read{f' beyond line {number}' if number else ''}: {printable(error_line(error))}"
        ) from None


def _raw(source, path):
    """The lines (bytes) of a file, or the records of a Parquet file or a Hub data set."""
    if not path.exists():
        import logging

        import datasets

        logging.getLogger("huggingface_hub").setLevel(
            logging.ERROR
        )  # it reports every retry of a download
        if int(datasets.__version__.split(".")[0]) < 4:
            raise DataError(
                f"{source}: datasets {datasets.__version__} may run code from the Hub; version 4 or later does not"
            )
        name, _, part = str(source).partition(":")
        yield from datasets.load_dataset(name, split=part or "train")
        return
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"PAR1":
            import pyarrow.parquet

            for batch in pyarrow.parquet.ParquetFile(file).iter_batches(1024):
                yield from batch.to_pylist()
        else:
            yield from gzip.open(file) if magic[:2] == b"\x1f\x8b" else file


def split(rows, seed, fraction=0.1):
    """(train, held_out): about `fraction` of the distinct prompts are held out, but at least one and never the last.

    Equal prompts stay on one side, and the side does not depend on the order of the rows."""
    rank = {
        str(row["prompt"]): hashlib.sha256(f"{seed}\0{row['prompt']}".encode()).digest()
        for row in rows
    }
    held = set(
        sorted(rank, key=rank.get)[
            : min(max(1, round(fraction * len(rank))), len(rank) - 1) if fraction else 0
        ]
    )
    return [row for row in rows if str(row["prompt"]) not in held], [
        row for row in rows if str(row["prompt"]) in held
    ]


# ---------------------------------------------------------------- the world


class World(world.World):
    """Real preferences: no true reward, so accuracy on held-out pairs and the KL are what can be measured.

    Its tokenizer is the checkpoint's with --init, otherwise GPT-2's (or bytes), for a small model trained on the preferred responses."""

    kind = "text"

    def __init__(self, settings, start=None):
        tokenizer = start.tokenizer if start is not None else Tokenizer.text()
        rows, self.counts = read_preferences(settings.data, tokenizer.chat)
        self.name, self.tokenizer = Path(str(settings.data)).name, tokenizer
        self.train, self.held_out = split(rows, settings.base_seed)
        self.context = settings.context or 512
        self.max_response = 64
        # a checkpoint wants smaller steps than a model of yesterday
        self.align = dict(
            steps=100, batch_size=8, lr=5e-6 if start is not None else 3e-4, prompts=len(self.train)
        )
        self.pretrain = dict(steps=100, batch_size=8, lr=1e-3)
        self.single = len(rows[0]["responses"]) == 1  # answers with a label, nothing to compare
        if not self.held_out:
            raise DataError(f"{settings.data}: one prompt only, so no held-out pairs")

    def key(self):
        """What makes this world's base model, for cache keys."""
        rows = json.dumps([[row["prompt"], row["responses"], row["scores"]] for row in self.train])
        return [
            self.name,
            self.tokenizer.name,
            self.context,
            hashlib.sha256(rows.encode()).hexdigest(),
        ]

    def model(self):
        """A small GPT for the tokenizer at hand."""
        from nanomodel import GPT, GPTConfig

        shape = dict(
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
        )
        return GPT(
            GPTConfig(
                vocab_size=self.tokenizer.vocab_size, max_position_embeddings=self.context, **shape
            ),
            self.tokenizer,
        )

    def demonstrations(self, n, rng):
        """The best response of each training row (single answers: the good ones), in a circle of n."""
        best = [max(range(len(row["scores"])), key=row["scores"].__getitem__) for row in self.train]
        best = [
            (row, k) for row, k in zip(self.train, best) if not self.single or row["scores"][k] > 0
        ]
        if not best:
            raise DataError(f"{self.name} has no answer that is labelled good")
        rows = [
            {"prompt": row["prompt"], "responses": [row["responses"][k]], "scores": [1.0]}
            for row, k in best
        ]
        return [rows[i % len(rows)] for i in range(n)]

    def prompts(self, n, rng):
        """The first n held-out prompts."""
        return [row["prompt"] for row in self.held_out][:n]

    def given(self, k):
        """Training rows; with k = 2 the best and the worst response of each list (chains and trees stay as they are)."""
        return [as_pair(row) for row in self.train] if k == 2 else self.train


def as_pair(row):
    """The best and the worst response of a list as a pair, the preferred first."""
    if len(row["responses"]) == 2 or row.get("parents"):
        return row
    scores = row["scores"]
    order = [
        max(range(len(scores)), key=scores.__getitem__),
        min(range(len(scores)), key=scores.__getitem__),
    ]
    size = len(scores)
    return {
        k: [v[i] for i in order] if isinstance(v, list) and k != "prompt" and len(v) == size else v
        for k, v in row.items()
    } | {"scores": [1.0, 0.0]}
