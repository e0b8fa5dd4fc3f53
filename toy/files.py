"""The world of a user's file: real preferences in JSON, CSV, Parquet or a data set on the Hub.

    {"prompt": "2 + 2 is", "chosen": " 4", "rejected": " 5"}

A row has a prompt and responses that a person or a model compared; FORMATS names the columns. There
is no true reward. What can be measured is the KL and the accuracy on held-out pairs with the file's
own labels, so nothing here shows whether a policy exploits errors of the labels. Without a
checkpoint the base model is a small GPT that is trained on the chosen responses.

Rows are read one by one. An error in the file is reported in one line that names file, line and
column, and nothing in a file is unpickled or executed. Rows that are valid but useless, such as two
identical responses, are dropped and counted by reason.
"""

import codecs
import contextlib
import csv
import gzip
import hashlib
import json
import logging
import random
import re
import sys
from dataclasses import fields
from pathlib import Path

from data import OWN, Batch, DataError, error_line, extremes, printable, reorder
from nanomodel import GPT, GPTConfig
from toy import world

FORMATS = ("chosen", "rejected"), ("responses", "scores"), ("completion", "label")
ACCEPTED = (
    "prompt/chosen/rejected, chosen/rejected with the prompt inside, "
    "prompt/responses/scores, prompt/completion/label"
)
TURN, HUMAN = "\n\nAssistant:", "\n\nHuman:"  # the marks of speakers in an Anthropic HH transcript
RESERVED = {"ref_logps", "to", *OWN, *(field.name for field in fields(Batch))}
BLANK = b" \t\r\n\xef\xbb\xbf"  # characters that a line without a record may contain
LIMIT = 2**29  # bytes of memory that the rows of a file may take; a file may be twice as large
LINE = 128  # a line may have a 128th of that, since it takes up to 50 times its length when parsed
FEW = 400  # rows below which alignment has gentler defaults
PIECE = 2**16  # bytes that are read at a time from a JSON array
CELLS = ("responses", "scores", "parents", "context", "ends", "q", "rank")  # JSON in a CSV
LARGEST_ID = 2**31 - 1  # the largest token id if the vocabulary is not known


def plain_chat(messages, add_generation_prompt):
    """The chat template of models without one: a line "role: content" per message.

    With add_generation_prompt, "assistant:" is appended.
    """
    text = "".join(f"{m['role']}: {m['content']}\n" for m in messages)
    return text + "assistant:" * bool(add_generation_prompt)


def read_preferences(source, chat_template=None, seed=None, vocab_size=None, limit=LIMIT):
    """Preferences from a file or from the Hub -> (rows, counts).

    source: JSON Lines, a JSON array or CSV (each also gzipped), Parquet, or "owner/name" or
    "owner/name:split" on the Hub.
    Its columns are one of FORMATS (see ACCEPTED). A text is a string, a list of messages {"role",
    "content"} or, if there is a prompt column, a list of token ids. Without a prompt column, the
    prompt is everything before the last assistant turn. Pairs and graded lists of two are returned
    with the chosen response first; completion/label gives one response with score 1.0 or 0.0.
    Graded lists may have `parents`, `context` and `ends`. Further columns of numbers, one per row
    or one per response, are kept if every row has them and the Batch does not use their name.

    chat_template: a function of messages and add_generation_prompt -> text; None: `plain_chat`.
        With a function, transcripts in the form of Anthropic HH become messages, too.
        The text that it writes after the last message is cut off, since end-of-text closes a
        response.
    seed: shuffles the rows; None keeps their order.
    vocab_size: token ids must be below it.
    limit: the largest number of bytes of memory that the rows may take. The file may have twice as
        many bytes after unpacking, and a line a LINE-th of them.

    rows: dicts as in docs/data.md, with their place in the column `where`. counts: {reason: number
    of rows dropped}. DataError: the file has any other error, or no row is left.
    """
    reader = _Reader(chat_template, vocab_size)
    rows, counts, shared, size = [], {}, None, 0
    for where, record in _records(source, limit):
        try:
            row = reader.row(record, where)
        except RecursionError:
            raise DataError(f"{where}: nested too deeply") from None
        if isinstance(row, str):
            counts[row] = counts.get(row, 0) + 1
            continue
        size += memory(row)
        if size > limit:
            raise DataError(
                f"{where}: the rows up to here take more than {limit / 2**30:g} GiB of memory; "
                "--data_limit allows more"
            )
        rows.append(row)
        own = {(name, type(value)) for name, value in row.items() if name not in OWN}
        shared = own if shared is None else shared & own
    if not rows:
        reasons = ", ".join(f"{reason}: {n}" for reason, n in counts.items())
        raise DataError(f"{printable(source)}: no usable row ({reasons or 'the file is empty'})")
    kept = {name for name, _ in shared}.union(OWN)
    for row in rows:  # in place, as a second list of them would need memory
        for name in [name for name in row if name not in kept]:
            del row[name]
    if seed is not None:
        random.Random(seed).shuffle(rows)
    return rows, counts


def memory(value):
    """The bytes of memory that nested dicts and lists of texts and numbers take, roughly."""
    if isinstance(value, dict):
        return sys.getsizeof(value) + sum(map(memory, value.values()))
    if isinstance(value, list):
        numbers = value and isinstance(value[0], (int, float))
        return sys.getsizeof(value) + (32 * len(value) if numbers else sum(map(memory, value)))
    return sys.getsizeof(value)


# ---------------------------------------------------------------- one record


class _Reader:
    """Turns the records of a file into rows; the first record decides which format the file has."""

    def __init__(self, template, vocab_size):
        # a transcript is made into messages only for a template that a model was trained with
        self.template, self.form, self.turns = template or plain_chat, None, template is not None
        self.ids_below = LARGEST_ID + 1 if vocab_size is None else vocab_size

    def row(self, record, where):
        """The row of a record, or the reason (a string) for which it is dropped."""

        def at(column):
            return f"{where}: column '{printable(column)}'"

        if not isinstance(record, dict):
            raise DataError(f"{where}: {_kind(record)} where an object with columns belongs")
        record = {name: value for name, value in record.items() if value is not None}
        form = self.form = self.form or max(
            FORMATS, key=lambda form: sum(n in record for n in form)
        )
        for name in form:
            if name not in record:
                there = printable(", ".join(map(printable, record)) or "none")
                raise DataError(
                    f"{where}: column '{name}' is missing or null "
                    f"(columns there: {there}; accepted: {ACCEPTED})"
                )
        texts, columns, scores = self.compared(record, form, at)
        spoken = self.speak(record.get("prompt"), texts, columns, at)
        if isinstance(spoken, str):
            return spoken
        prompt, responses = spoken
        row = {"prompt": prompt, "responses": responses, "scores": [float(s) for s in scores]}
        row["where"] = where
        for name, value in record.items():
            if form[0] == "responses" and name in ("parents", "context", "ends"):
                row[name] = self.structure(name, value, len(responses), at(name))
            elif name not in form and name not in ("prompt", "where"):
                row |= self.column(name, value, len(responses), at(name))
        return self.drop(row) or self.preferred_first(row)

    def compared(self, record, form, at):
        """(texts, the column of each text, their scores) of a record."""
        first, second = (record[name] for name in form)
        if form[0] == "chosen":
            return [first, second], form, [1.0, 0.0]
        if form[0] == "completion":
            if not (isinstance(second, (int, float)) and second in (0, 1)):
                raise DataError(f"{at('label')} holds {_shown(second)} where true or false belongs")
            return [first], form, [second]
        texts = _list(first, at("responses"))
        scores = _list(second, at("scores"), len(texts), _finite, "a finite number")
        if len(texts) < 2:
            raise DataError(
                f"{at('responses')} has {len(texts)} where a comparison needs 2 "
                "(single answers: prompt/completion/label)"
            )
        return texts, ["responses"] * len(texts), scores

    def structure(self, name, value, count, at):
        """The column parents, context or ends of a graded list."""

        def earlier(k, parent):
            return type(parent) is int and -1 <= parent < k

        def text(k, value):
            return self.text(value, at, empty=True) is value

        def flag(k, end):
            return isinstance(end, bool)

        good, what = {
            "parents": (earlier, "-1 or the number of an earlier response"),
            "context": (text, "text"),
            "ends": (flag, "true or false"),
        }[name]
        return _list(value, at, count, good, what)

    def column(self, name, value, count, at):
        """{name: numbers} of a further column, or {} where it is left out."""
        values = value if isinstance(value, list) else [value]
        numbers = values and all(isinstance(v, (int, float)) for v in values)
        if name == "q" and numbers:
            self.probabilities(value, count, at)
        elif name == "rank" and numbers and self.form[0] == "responses":
            if sorted(_list(value, at, count)) != list(range(1, count + 1)):
                raise DataError(f"{at} does not hold the ranks 1 to {count}, each once")
        fits = numbers and len(values) == (count if values is value else 1)
        known = name == "reward" and values is value  # of each response
        usable = name not in RESERVED and name.isidentifier() and not name.startswith("_")
        if not fits or not (usable or known):
            return {}
        values = [float(v) for v in _list(values, at, None, _finite, "a finite number")]
        return {name: values if isinstance(value, list) else values[0]}

    def probabilities(self, value, count, at):
        """DataError unless the column q is a distribution over the responses."""

        def share(k, value):
            return _finite(k, value) and value >= 0

        total = sum(_list(value, at, count, share, "a probability"))
        if abs(total - 1) > 1e-4:
            raise DataError(f"{at} sums to {total:g} where probabilities sum to 1")

    def drop(self, row):
        """The reason to drop a row of several responses that compares nothing; None: keep it."""
        if len(row["responses"]) == 1:
            return None
        if len(set(row["scores"])) == 1:
            return "equal scores"
        plain = not {"parents", "context"} & set(row)
        if plain and all(text == row["responses"][0] for text in row["responses"]):
            return "identical responses"
        return None

    def preferred_first(self, row):
        """The row with the chosen response first, if it is a pair."""
        scores = row["scores"]
        if len(scores) == 2 and "parents" not in row and scores[1] > scores[0]:
            return reorder(row, [1, 0])
        return row

    # ------------------------------------------------------------ text

    def speak(self, prompt, texts, columns, at):
        """(prompt, responses) as text or token ids, or the reason for dropping the row."""
        if self.turns and (spoken := _messages(prompt, texts)):
            try:
                return self.speak(*spoken, columns, at)
            except DataError:
                return "a transcript that the chat template refuses"
        chat = any(
            isinstance(text, list) and text and isinstance(text[0], dict)
            for text in [prompt, *texts]
        )
        if chat:
            texts = [_chat(text, "assistant", at(column)) for text, column in zip(texts, columns)]
        else:
            texts = [self.text(text, at(column)) for text, column in zip(texts, columns)]
        repeated = chat and isinstance(prompt, str) and texts[0][0]["role"] != "assistant"
        if prompt is None or repeated:  # the responses contain the prompt
            apart = _apart(texts, chat)
            if isinstance(apart, str):
                return apart
            prompt, texts = apart
            if not prompt:
                raise DataError(
                    f"{at('prompt')} is missing, and '{columns[0]}' has no turn before the "
                    f"assistant's last (accepted: {ACCEPTED})"
                )
        if not chat:
            return self.text(prompt, at("prompt"), empty=True), texts
        if any(text[-1]["role"] != "assistant" for text in texts):
            return "last turn is not the assistant's"
        prompt = _chat(prompt, "user", at("prompt"))
        if all(text[: len(prompt)] == prompt for text in texts):
            texts = [text[len(prompt) :] for text in texts]
        framed = [self.frame(prompt, text, at(column)) for text, column in zip(texts, columns)]
        return self.text(framed[0][0], at("prompt")), [response for _, response in framed]

    def frame(self, prompt, text, at):
        """(prompt, response) as the chat template writes the messages `prompt` and `text`."""
        if not text or not text[-1]["content"].strip():
            raise DataError(f"{at} is empty")
        mark = "@@@"
        marked = prompt + text[:-1] + [{**text[-1], "content": mark}]
        try:
            head, full = self.template(prompt, True), self.template(prompt + text, False)
            closing = self.template(marked, False).rpartition(mark)[2]
        except RecursionError:
            raise
        except Exception as error:  # a template may raise anything
            message = printable(error_line(error))
            raise DataError(f"{at} is refused by the chat template: {message}") from None
        if not full.startswith(head):
            raise DataError(
                f"{at} cannot be told from its prompt: "
                "the chat template rewrites a prompt once it is answered"
            )
        return head, self.text(full[len(head) :].removesuffix(closing), at)

    def text(self, value, at, empty=False):
        """The value unchanged, if it is text or a list of token ids; else DataError."""
        ids = isinstance(value, list) and all(type(token) is int for token in value)
        if not (isinstance(value, str) or ids):
            raise DataError(f"{at} holds {_kind(value)} where text belongs")
        if not empty and not (value if ids else value.strip()):
            raise DataError(f"{at} is empty")
        if ids:
            for token in value:
                if not 0 <= token < self.ids_below:
                    raise DataError(
                        f"{at} holds {_shown(token)} where a token id from 0 to "
                        f"{self.ids_below - 1} belongs"
                    )
        elif re.search("[\ud800-\udfff]", value):
            raise DataError(f"{at} holds half a character (a lone surrogate)")
        return value


def _messages(prompt, texts):
    """(prompt, texts) of an Anthropic HH transcript as messages; None if it is something else.

    The prompt is None where the texts contain it, as in the original data."""
    parts = [*texts] if prompt is None else [prompt]
    if not all(isinstance(part, str) and part.lstrip().startswith(HUMAN.strip()) for part in parts):
        return None
    if not all(isinstance(text, str) for text in texts):
        return None
    if prompt is not None:
        if not prompt.rstrip().endswith(TURN.strip()):
            return None
        head = _turns(prompt.rstrip().removesuffix(TURN.strip()))
        return head, [[{"role": "assistant", "content": text.strip()}] for text in texts]
    return None, [_turns(text) for text in texts]


def _turns(text):
    """The messages of a transcript."""
    parts = re.split(r"(?:^|\n\n)\s*(Human|Assistant):", text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [
        {"role": roles[who], "content": said.strip()} for who, said in zip(parts[::2], parts[1::2])
    ]


def _apart(texts, chat):
    """(prompt, responses) of conversations that contain the prompt, or the reason to drop the row.

    The prompt is empty if there is none. Such conversations are logs, so a row that does not fit is
    dropped instead of being an error of the file.
    """
    if chat:
        heads, tails = [text[:-1] for text in texts], [text[-1:] for text in texts]
        contents = [tail[0]["content"] for tail in tails]
    else:
        parts = [text.rpartition(TURN) if isinstance(text, str) else ("",) * 3 for text in texts]
        heads, tails = [head + turn for head, turn, _ in parts], [tail for _, _, tail in parts]
        contents = tails
    if not heads[0]:
        return heads[0], tails
    if any(head != heads[0] for head in heads):
        return "prompts differ"
    if any(HUMAN in tail for tail in tails if not chat):
        return "last turn is not the assistant's"
    if not all(content.strip() for content in contents):
        return "empty response"
    return heads[0], tails


def _chat(value, role, at):
    """Messages without their null fields; a string becomes one message of `role`."""
    messages = [{"role": role, "content": value}] if isinstance(value, str) else value
    good = isinstance(messages, list) and messages
    good = good and all(isinstance(message, dict) for message in messages)
    if not good or not all(
        isinstance(message.get(key), str) for message in messages for key in ("role", "content")
    ):
        raise DataError(
            f"{at} holds {_kind(value)} where messages with text under 'role' and 'content' belong"
        )
    return [{key: v for key, v in message.items() if v is not None} for message in messages]


# ---------------------------------------------------------------- values


def _list(value, at, count=None, good=None, what=None):
    """The value unchanged, if it is a list of `count` entries with good(k, entry); else DataError.

    what: the expected kind of entry, for the message.
    """
    if not isinstance(value, list):
        raise DataError(f"{at} holds {_kind(value)} where a list belongs")
    if count is not None and len(value) != count:
        raise DataError(f"{at} has {len(value)} entries for {count} responses")
    for k, entry in enumerate(value):
        if good and not good(k, entry):
            raise DataError(f"{at} holds {_shown(entry)} where {what} belongs")
    return value


def _finite(k, value):
    return isinstance(value, (int, float)) and abs(value) < 3e38  # in float32 too


def _kind(value):
    """The kind of a value in words, for a message."""
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return "a number"
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false"}
    names |= {type(None): "null", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _shown(value):
    """A value for a message: text and numbers are quoted, anything else is described."""
    if isinstance(value, str):
        return f"'{printable(value, 40)}'"
    plain = isinstance(value, (int, float, type(None)))
    return printable(value, 40) if plain else _kind(value)


# ---------------------------------------------------------------- the file


def _records(source, limit):
    """(place, record) of a file or a data set on the Hub; place is "file:line"."""
    name, path, number = printable(source), Path(source).expanduser(), 0
    hub = re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:\w+)?", str(source))
    try:
        hub = hub and path.suffix not in (".jsonl", ".json", ".csv", ".gz", ".parquet")
        hub = hub and not path.parent.is_dir() and not path.exists()
        if path.is_dir() or not hub and not path.exists():
            what = "is a folder" if path.is_dir() else "no such file"
            raise DataError(
                f"{name}: {what}; a .jsonl, .json, .csv (or one of them with .gz) or .parquet file "
                "belongs here, or owner/name of a data set on the Hub"
            )
        for number, record in enumerate(_hub(source), 1) if hub else _raw(path, name, limit):
            yield f"{name}:{number}", record
    except DataError:
        raise
    except Exception as error:  # zlib, gzip, Arrow, the network and the Hub have dozens of types
        beyond = f" beyond line {number}" if number else ""
        raise DataError(f"{name}: cannot be read{beyond}: {printable(error_line(error))}") from None


def _raw(path, name, limit):
    """(line or row number, record) of each record of a file."""
    with path.open("rb") as file:
        magic = file.read(4)
        file.seek(0)
        if magic == b"PAR1":
            yield from _parquet(file, name, limit)
            return
        file = gzip.open(file) if magic[:2] == b"\x1f\x8b" else file
        if path.name.lower().removesuffix(".gz").endswith(".csv"):
            yield from _csv(_lines(file, name, limit), name, limit // LINE)
            return
        start = b""
        while not start.strip(BLANK) and (piece := file.read(1024)):  # until it has some text
            start = piece
        file.seek(0)
        if start.lstrip(BLANK).startswith(b"["):
            yield from _array(file, name, limit)
            return
        for number, line in enumerate(_lines(file, name, limit), 1):
            if line.strip(BLANK):
                yield number, _parsed(line, f"{name}:{number}")


def _too_large(name, limit, what=""):
    """The DataError for something with more than `limit` bytes."""
    size = f"{limit / 2**30:.2g} GiB" if limit >= 2**27 else f"{limit / 2**20:.2g} MiB"
    return DataError(f"{name}: {what}more than {size} once unpacked; --data_limit allows more")


def _lines(file, name, limit):
    """The lines (bytes) of a file. DataError: there are too many, or one is too long."""
    size, longest = 0, limit // LINE
    while line := file.readline(1 + longest):
        size += len(line)
        if size > 2 * limit:
            raise _too_large(name, 2 * limit)
        if len(line) > longest:
            raise _too_large(name, longest, "a line has ")
        yield line


def _parsed(line, where):
    """The record of a line (bytes) of JSON Lines."""
    try:
        return json.loads(line.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise DataError(f"{where}: not text in UTF-8: a binary file?") from None
    except (ValueError, RecursionError) as error:
        cut = "" if line.endswith(b"\n") else "; is the file cut off?"
        message = printable(error_line(error))
        raise DataError(f"{where}: not a line of JSON: {message}{cut}") from None


def _array(file, name, limit):
    """(line, record) of each entry of a JSON array, which is read in pieces."""
    decoder, scan = codecs.getincrementaldecoder("utf-8-sig")(), json.JSONDecoder().raw_decode
    text, size, line, column, ended = "", 0, 1, 1, False

    def more():
        """Read on, at least as much as is waiting, so that a long entry is not scanned often."""
        nonlocal text, size, ended
        data = file.read(max(PIECE, len(text)))
        size, ended = size + len(data), not data
        if size > 2 * limit:
            raise _too_large(name, 2 * limit)
        try:
            text += decoder.decode(data, final=ended)
        except UnicodeDecodeError:
            raise DataError(f"{name}:{line}: not text in UTF-8: a binary file?") from None

    def step(n):
        """Leave n characters behind, and count their lines."""
        nonlocal text, line, column
        breaks = text.count("\n", 0, n)
        line, column = line + breaks, n - text.rfind("\n", 0, n) if breaks else column + n
        text = text[n:]

    def following():
        """The next character that is not blank, "" at the end."""
        while True:
            step(len(text) - len(text.lstrip(" \t\r\n")))
            if text or ended:
                return text[:1]
            more()

    def wrong(what, at=0):
        step(at)
        cut = "; is the file cut off?" if ended and not text.strip() else ""
        return DataError(f"{name}:{line}: not a JSON array: {what} at column {column}{cut}")

    following()
    step(1)  # the opening bracket
    if following() == "]":
        step(1)
    else:
        while True:
            following()
            while True:
                try:
                    record, end = scan(text)
                    if end < len(text) or ended:  # else a number might go on
                        break
                except (ValueError, RecursionError) as error:
                    told, at = error_line(error), getattr(error, "pos", 0)
                    told = getattr(error, "msg", told).removesuffix(" starting at")
                    short = told.startswith("Unterminated") or at > len(text) - 16
                    if ended or len(text) > limit // LINE and not short:
                        raise wrong(printable(told), at) from None
                if len(text) > limit // LINE:
                    raise _too_large(f"{name}:{line}", limit // LINE, "an entry has ")
                more()
            yield line, record
            step(end)
            if (mark := following()) not in (",", "]"):
                raise wrong("Expecting ',' or ']'")
            step(1)
            if mark == "]":
                break
    if following():
        raise wrong("Extra data")


def _csv(lines, name, longest):
    """(line, record) of each row of a CSV file with a header.

    The cells of CELLS hold JSON; a label or a further column that looks like a number is one, and
    an empty cell of it is null.
    """
    number, header = 0, None

    def texts():
        for i, line in enumerate(lines, 1):
            try:
                yield line.decode("utf-8-sig" if i == 1 else "utf-8")
            except UnicodeDecodeError:
                raise DataError(f"{name}:{i}: not text in UTF-8: a binary file?") from None

    csv.field_size_limit(longest)
    reader = csv.reader(texts(), strict=True)
    while True:
        number = reader.line_num + 1  # a quoted cell may span lines
        try:
            cells = next(reader, None)
        except csv.Error as error:
            raise DataError(
                f"{name}:{number}: not a row of CSV: {printable(error_line(error))}"
            ) from None
        if cells is None:
            return
        if not cells:  # a blank line
            continue
        if header is None:
            header = cells
            if len(set(header)) < len(header) or "" in header:
                raise DataError(f"{name}:{number}: a column of the header has no name or two")
            continue
        if len(cells) != len(header):
            raise DataError(
                f"{name}:{number}: {len(cells)} cells where the header has {len(header)} columns"
            )
        where = f"{name}:{number}"
        yield number, {n: _cell(n, text, where) for n, text in zip(header, cells)}


def _cell(column, text, where):
    """The value of a cell of a CSV file."""
    if column in ("prompt", "chosen", "rejected", "completion"):
        return text
    if not text.strip():
        return None
    if column in CELLS:
        try:
            return json.loads(text)
        except (ValueError, RecursionError) as error:
            message = printable(error_line(error))
            raise DataError(f"{where}: column '{column}' is not JSON: {message}") from None
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    with contextlib.suppress(ValueError):
        return float(text)
    return text


def _parquet(file, name, limit):
    """(row, record) of each row of a Parquet file."""
    import pyarrow.parquet

    size, number, table = 0, 0, pyarrow.parquet.ParquetFile(file)
    # As the file states; a batch is measured before it becomes objects. The description of a single
    # column is not asked for, since Arrow ends the process where that is damaged.
    groups = [table.metadata.row_group(i) for i in range(table.metadata.num_row_groups)]
    if any(group.total_byte_size > 2 * limit for group in groups):
        raise _too_large(name, 2 * limit, "a row group has ")
    for batch in table.iter_batches(64):
        size += batch.nbytes
        if size > 2 * limit:
            raise _too_large(name, 2 * limit)
        for record in batch.to_pylist():
            number += 1
            yield number, record


def _hub(source):
    """The records of a data set on the Hub."""
    import datasets

    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # it reports every retry
    if int(datasets.__version__.split(".")[0]) < 4:
        raise DataError(
            f"{source}: datasets {datasets.__version__} may run code from the Hub; "
            "version 4 or later does not"
        )
    name, _, part = str(source).partition(":")
    yield from datasets.load_dataset(name, split=part or "train")


def split(rows, seed, fraction=0.1):
    """(train, held_out): about `fraction` of the distinct prompts are held out.

    At least one prompt is held out and at least one is kept. Rows with equal prompts are in one
    part, and the choice does not depend on the order of the rows.
    """
    rank = {
        str(row["prompt"]): hashlib.sha256(f"{seed}\0{row['prompt']}".encode()).digest()
        for row in rows
    }
    count = min(max(1, round(fraction * len(rank))), len(rank) - 1) if fraction else 0
    held = set(sorted(rank, key=rank.get)[:count])
    train = [row for row in rows if str(row["prompt"]) not in held]
    return train, [row for row in rows if str(row["prompt"]) in held]


# ---------------------------------------------------------------- the world


class World(world.World):
    """The world of one file; `train` and `held_out` are its rows.

    source, limit: see `read_preferences`.
    tokenizer: the checkpoint's, or one for text. Token ids in the file must be below its size.
    context: the context length of the base model in tokens.
    seed: chooses the held-out prompts.
    from_checkpoint: whether alignment starts from a checkpoint; its default learning rate is
        smaller than that of a small GPT.
    DataError: as in `read_preferences`, or there is only one prompt.
    """

    kind = "text"
    pretrain = dict(steps=100, batch_size=8, lr=1e-3)
    max_response = 64

    def __init__(self, source, tokenizer, context=512, seed=0, from_checkpoint=False, limit=LIMIT):
        rows, self.counts = read_preferences(
            source, tokenizer.chat, vocab_size=tokenizer.vocab_size, limit=limit
        )
        self.name, self.tokenizer = printable(Path(source).name), tokenizer
        self.context = context
        self.train, self.held_out = split(rows, seed)
        if not self.held_out:
            raise DataError(f"{printable(source)}: only one prompt, so there are no held-out pairs")
        self.single = len(rows[0]["responses"]) == 1
        # few pairs are soon fitted perfectly, so they are seen about twice and at a lower rate
        n = len(self.train)
        few = n < FEW
        lr = 5e-6 if from_checkpoint else 1e-4 if few else 3e-4
        steps = max(10, -(-2 * n // 8)) if few else 100
        self.align = dict(steps=steps, batch_size=8, lr=lr, prompts=n)

    def key(self):
        """Everything that the base model depends on: the rows, the tokenizer and the context."""
        hashed = hashlib.sha256()
        for row in self.train:
            about = [row["prompt"], row["responses"], row["scores"]]
            hashed.update(json.dumps(about).encode() + b"\n")
        return [self.name, self.tokenizer.name, self.context, hashed.hexdigest()]

    def model(self):
        """A new GPT with four layers of width 128 and the vocabulary of the tokenizer."""
        config = GPTConfig(
            vocab_size=self.tokenizer.vocab_size,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=4,
            num_attention_heads=4,
            num_key_value_heads=4,
            max_position_embeddings=self.context,
        )
        return GPT(config, self.tokenizer)

    def demonstrations(self, n, rng):
        """n rows with the best response of each training row, in cyclic order.

        Single answers are used only if their label is good. DataError: no label is good.
        """
        best = []
        for row in self.train:
            k = max(range(len(row["scores"])), key=row["scores"].__getitem__)
            if not self.single or row["scores"][k] > 0:
                best.append(
                    dict(prompt=row["prompt"], responses=[row["responses"][k]], scores=[1.0])
                )
        if not best:
            raise DataError(f"{self.name} has no answer that is labelled good")
        return [best[i % len(best)] for i in range(n)]

    def prompts(self, n, rng):
        """The first n held-out prompts."""
        return [row["prompt"] for row in self.held_out][:n]

    def given(self, k):
        """The training rows; for k = 2, lists are reduced to their best and worst response.

        Chains and trees are unchanged.
        """
        return [as_pair(row) for row in self.train] if k == 2 else self.train


def as_pair(row):
    """The best and the worst response of a list as a pair, chosen first; trees are unchanged."""
    if len(row["scores"]) <= 2 or row.get("parents"):
        return row
    return extremes(row) | {"scores": [1.0, 0.0]}
