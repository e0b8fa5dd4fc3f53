"""What goes into a model: tokenizers, preference files, rows, the Batch; and the Claim that comes out.

A row is a dict: prompt, responses (K), scores (K), optional parents, context, ends, and further columns. B prompts, K responses, T response
tokens, N packed rows of S tokens, G branches a row.
"""

import re
from collections import Counter
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np
import torch

# ---------------------------------------------------------------- what a method file declares


class UserError(ValueError):
    """A mistake that the user can mend. The command line prints it as one line and exits with 2."""


@dataclass(frozen=True)
class Paper:
    """What a method file says about itself, as `PAPER = Paper("pairs", ...)`.

    family: the heading under which `--list` shows it: pairs, lists, online, images, analysis,
    beyond, or baseline for a file without a paper of its own.
    worlds: the kinds of world that it runs on. needs: what a world must offer: "pairs or lists",
    "lists", "demonstrations", "verifier" or "reward". ignores: run settings that do nothing under
    this method and are therefore refused. defaults: run settings that it changes when it is run
    alone. core: what the contract tests and the mutants examine.
    """

    family: str
    worlds: tuple = ("text", "images", "table")
    needs: str = "pairs or lists"
    ignores: tuple = ()
    defaults: dict = field(default_factory=dict)
    core: tuple = ("loss",)


def check_fields(cfg, **allowed):
    """UserError unless every named field of a Config lies where it may.

    allowed: an interval as text, "(0, inf)" or "[0, 0.5)", or a tuple of the values that are
    accepted. A field annotated int takes whole numbers only. None is accepted where the field's
    default is None. Booleans are not numbers; NaN lies in no interval.
    """
    declared = {f.name: f for f in fields(cfg)}
    for name, where in allowed.items():
        value, kind = getattr(cfg, name), str(declared[name].type)
        if value is None and declared[name].default is None:
            continue
        if isinstance(where, tuple):
            if value not in where:
                raise UserError(f"{name} = {value}: expected one of {', '.join(map(str, where))}")
            continue
        whole = "int" in kind and "float" not in kind
        number = isinstance(value, int if whole else (int, float)) and not isinstance(value, bool)
        low, high = (float(end) for end in where[1:-1].split(","))
        if not (
            number
            and (low < value or (low == value and where[0] == "["))
            and (value < high or (value == high and where[-1] == "]"))
        ):
            what = "a whole number" if whole else "a number"
            raise UserError(f"{name} = {value}: expected {what} in {where}")


def fill_variant(cfg, variants, field="variant"):
    """Give the fields of a Config that are None the defaults of its variant, which `field` names.

    variants: {variant: {field: default}}. UserError: the variant is unknown, or a field was given
    that only other variants read.
    """
    variant = getattr(cfg, field)
    if variant not in variants:
        raise UserError(f"{field} = {variant}: expected one of {', '.join(variants)}")
    known = variants[variant]
    for name in dict.fromkeys(name for each in variants.values() for name in each):
        value = getattr(cfg, name)
        if name in known and value is None:
            object.__setattr__(cfg, name, known[name])
        elif name not in known and value is not None:
            readers = ", ".join(v for v, names in variants.items() if name in names)
            raise UserError(
                f"{name} = {value} does nothing with {field} = {variant}; it is read by {readers}"
            )


def upcast(*tensors):
    """The tensors in float32 or better (bfloat16 becomes float32, float64 stays); None stays."""
    wide = [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return wide[0] if len(wide) == 1 else tuple(wide)


def readable(x):
    """May a check look at the values of a tensor? On CPU only, and not in compiled code.

    On CUDA it would force a host-device sync, compiled code cannot ask, and rows were validated
    when they were loaded.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pair(logps, ref_logps, batch):
    """(logps, ref_logps) of pairs, checked and in float32 or better.

    logps (B, 2, T), the chosen response first; ref_logps alike, or None for a loss without a
    reference. UserError: the rows are not pairs, or a response has no scored token (checked where
    values are `readable`).
    """
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise UserError(
            f"log-probs of shape {tuple(logps.shape)}: "
            "this loss takes pairs (B, 2, T), the chosen response first"
        )
    if readable(batch.mask) and not batch.mask.any(-1).all():
        raise UserError("a response has no scored token")
    return upcast(logps, ref_logps)


# ---------------------------------------------------------------- text


class DataError(UserError):
    """A fault in a file of the user's, in one line that names file, line and column.

    In Parquet and on the Hub the row stands in place of the line, counted from 1.
    """


def error_line(error):
    """The first line of an error's message."""
    text = getattr(error, "msg", None) or getattr(error, "strerror", None) or str(error).strip()
    return str(text or type(error).__name__).splitlines()[0]


def printable(text, length=200):
    """Text that is not ours, fit for a line of a terminal.

    Everything that is not a printable character (control sequences, line breaks, marks that turn
    the direction of writing, lone surrogates) becomes its escape, and what goes beyond `length`
    characters is cut.
    """
    text = str(text)
    shown = "".join(
        c if c.isprintable() else c.encode("unicode_escape").decode() for c in text[:length]
    )
    return shown + "..." * (len(text) > length)


class Tokenizer:
    """One face for the tokenizers of tiktoken (toy worlds, GPT-2, bytes) and of checkpoints.

    eot: the id of the token that ends a response. pad: the id of another token, which fills rows
    up. vocab_size: ids are below it. name: for the header of a run. chat: None, or the checkpoint's
    chat template, a function of messages and add_generation_prompt that returns text. files: None,
    or {name: text} of the files that it was read from. `lab.hub` reads and writes them.
    """

    def __init__(self, name, engine, eot, pad, vocab_size, chat=None, files=None):
        self.name, self.engine, self.eot, self.pad = name, engine, eot, pad
        self.vocab_size, self.chat, self.files = vocab_size, chat, files
        self.is_tiktoken = hasattr(engine, "encode_ordinary")

    def __deepcopy__(self, memo):
        return self  # it never changes: a frozen copy of a model shares it

    @classmethod
    def toy(cls, words, name="toy"):
        """256 bytes and the given words, each one token (the longest first), built in code."""
        import tiktoken

        words = sorted(set(words), key=lambda w: (-len(w), w))
        ranks = {bytes([i]): i for i in range(256)}
        longer = [w.encode() for w in words if len(w.encode()) > 1]
        ranks |= {word: 256 + i for i, word in enumerate(longer)}
        pattern = "|".join([re.escape(w) for w in words] + [r"[\s\S]"])
        special = {"<|end|>": len(ranks), "<|pad|>": len(ranks) + 1}
        return cls.from_tiktoken(
            tiktoken.Encoding(name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special)
        )

    @classmethod
    def text(cls):
        """For real text without a checkpoint: GPT-2's, or bytes where that cannot be downloaded.

        The name says which.
        """
        import tiktoken

        try:
            return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except Exception:  # tiktoken raises whatever its download raises
            return cls.toy([], name="bytes")

    @classmethod
    def from_tiktoken(cls, encoding):
        """The tokenizer of a tiktoken.Encoding; without a padding token it gets one more id."""
        special = encoding._special_tokens
        eot = special.get("<|end|>", special.get("<|endoftext|>"))
        pad = special.get("<|pad|>", encoding.n_vocab)
        return cls(encoding.name, encoding, eot, pad, max(encoding.n_vocab, pad + 1))

    def encode(self, text):
        """Token ids of a text, without anything added. UserError: it cannot be encoded."""
        try:
            if self.is_tiktoken:
                return self.engine.encode_ordinary(text)
            return self.engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises bare Exception, for tokens that it lacks
            raise UserError(
                f"the tokenizer {self.name} cannot encode a text: {printable(error_line(error))}"
            ) from None

    def decode(self, ids):
        """Text of token ids; end and padding tokens are left out."""
        ids = [i for i in ids if i not in (self.eot, self.pad)]
        if self.is_tiktoken:
            return self.engine.decode([i for i in ids if i < self.engine.n_vocab], errors="replace")
        return self.engine.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------- rows and the Batch


@dataclass
class Batch:
    """The tensors of one step. Further columns of the rows are attributes: a number a row (B,), K numbers (B, K), K lists (B, K, T)."""

    mask: torch.Tensor  # (B, K, T) bool: scored response tokens; ones for images and tables
    scores: torch.Tensor  # (B, K) labels, 0 for an absent response
    tokens: torch.Tensor = None  # (N, S) packed prompt trees
    position: torch.Tensor = None  # (N, S) counted from the tree's root
    branch: torch.Tensor = None  # (N, S); padding is branch G-1
    sees: torch.Tensor = None  # (N, G, G) bool: itself and its ancestors
    source: torch.Tensor = (
        None  # (B, K, T) flat index into N*S of the hidden state that predicts a token
    )
    target: torch.Tensor = None  # (B, K, T) the token
    parents: torch.Tensor = None  # (B, K) the response that this one continues, -1 = the prompt
    images: torch.Tensor = None  # (B, K, C, H, W), or (B, K, D) for points
    label: torch.Tensor = None  # (B,) class of an image, number of a table's prompt
    t: torch.Tensor = None  # (B,) noise level, drawn by prepare
    noise: torch.Tensor = None  # (B, 1 or K, ...)
    columns: dict = field(default_factory=dict)

    def __getattr__(self, name):
        columns = self.__dict__.get("columns") or {}
        if name not in columns:
            raise AttributeError(
                f"the batch has no column {name!r}; it has {', '.join(sorted(columns)) or 'none'}"
            )
        return columns[name]

    def to(self, device):
        """The same batch on another device."""
        moved = {
            f.name: v.to(device)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved, columns={k: v.to(device) for k, v in self.columns.items()})


# columns with a meaning of their own; where: the place of a row in the user's file
OWN = ("prompt", "responses", "scores", "parents", "context", "ends", "reward", "tree", "where")


@dataclass(frozen=True, eq=False)
class Tree:
    """The prompt tree of one row, laid out in one sequence of n tokens, the prompt first.

    Branch 0 is the prompt, branch k + 1 the response k, with its context before it."""

    tokens: list  # n token ids
    position: list  # n positions, counted from the root
    branch: list  # n numbers of branches
    sees: np.ndarray  # (K + 1, K + 1) bool: the branch itself and its ancestors
    sources: list  # K lists: where in the sequence each response token is predicted
    targets: list  # K lists: the response tokens

    def key(self):
        """What identifies the tree, in JSON."""
        lists = [self.tokens, list(self.position), self.branch, self.sources, self.targets]
        return [*lists, self.sees.tolist()]


def encode(row, tokenizer):
    """The row with its prompt tree laid out: token, position and branch of every node, and where each response token is predicted from.

    Text becomes token ids. The end token is appended, and scored, to a response that nothing continues (or as `ends` says).
    A leaf's last token predicts nothing, so it is a target but never an input. ValueError when parents do not stand before children."""
    if "tree" in row:
        return row

    def ids(text):
        return tokenizer.encode(text) if isinstance(text, str) else list(text)

    count = len(row["responses"])
    parents = row.get("parents") or [-1] * count
    context = row.get("context") or [[]] * count
    ends = row.get("ends") or [k not in parents for k in range(count)]
    for name, values in dict(parents=parents, context=context, ends=ends).items():
        if len(values) != count:
            raise UserError(f"{count} responses, but {len(values)} {name}")
    prompt = ids(row["prompt"]) or [tokenizer.eot]  # something has to predict the first token
    tokens, position, branch = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    last, ancestors, sources, targets = {-1: len(prompt) - 1}, [{0}], [], []
    for k, (response, parent) in enumerate(zip(row["responses"], parents)):
        if not -1 <= parent < k:
            raise UserError(
                f"parents {parents}: response {k} must continue an earlier response or the prompt (-1)"
            )
        leaf = k not in parents
        before, response = ids(context[k]), ids(response)
        response = response + [tokenizer.eot] * bool(ends[k])
        path, start = before + response, len(tokens)
        fed = path[:-1] if leaf else path
        tokens += fed
        position += range(position[last[parent]] + 1, position[last[parent]] + 1 + len(fed))
        branch += [k + 1] * len(fed)
        ancestors.append(ancestors[parent + 1] | {k + 1})
        steps = [last[parent], *range(start, start + len(path) - 1)]
        sources.append(steps[len(before) : len(path)])
        targets.append(response)
        last[k] = start + len(fed) - 1 if fed else last[parent]
    sees = np.zeros((count + 1, count + 1), dtype=bool)
    for k, seen in enumerate(ancestors):
        sees[k, list(seen)] = True
    tree = Tree(tokens, position, branch, sees, sources, targets)
    return row | {"parents": parents, "tree": tree}


def bucket(n):
    """n rounded up to one of few sizes, four per octave and at most 25 % apart."""
    step = max(1, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def apart(tree):
    """A tree of responses to one prompt as trees of one response each, the prompt copied."""
    prompt = start = tree.branch.count(0)
    out, alone = [], np.ones((1, 1), dtype=bool)
    for k, (where, what) in enumerate(zip(tree.sources, tree.targets)):
        end = start + tree.branch.count(k + 1)
        tokens = tree.tokens[:prompt] + tree.tokens[start:end]
        where = [i if i < prompt else i - start + prompt for i in where]
        n = len(tokens)
        out.append(Tree(tokens, list(range(n)), [0] * n, alone, [where], [what]))
        start = end
    return out


def cheaper_apart(trees, copies):
    """Whether copies of short prompts cost less than the wider attention of the trees.

    The cost of a token is 256 plus the keys that it meets in blocks of 128 queries: 256 keys cost
    as much as the rest of a token (measured at two and three layers of width 64 and 96)."""
    longest = max(len(tree.tokens) for tree in copies)
    met = min(max(len(tree.tokens) for tree in trees), longest + 128)
    together, alone = (sum(len(tree.tokens) for tree in group) for group in (trees, copies))
    return alone * (256 + longest) < together * (256 + met)


def first_fit(sizes, room):
    """Places for pieces of these sizes in rows of `room`, the longest piece first.

    -> ([(row, offset) per piece], number of rows)."""
    free, places = [], [None] * len(sizes)
    for i in sorted(range(len(sizes)), key=lambda i: (-sizes[i], i)):
        row = next((n for n, left in enumerate(free) if left >= sizes[i]), len(free))
        if row == len(free):
            free.append(room)
        places[i] = (row, room - free[row])
        free[row] -= sizes[i]
    return places, len(free)


def branches(trees, places):
    """Branches of the packed row that has most of them, without the one of the padding."""
    used = Counter()
    for tree, (row, _) in zip(trees, places):
        used[row] += len(tree.sees)
    return max(used.values())


@dataclass(frozen=True)
class Sizes:
    """The least sizes of a batch of text, for compiled code (see `sizes` and `collate`)."""

    rows: int = 1  # N, packed rows
    length: int = 1  # S, tokens of a packed row
    branches: int = 1  # G, branches of a packed row, padding included
    responses: int = 1  # K
    tokens: int = 1  # T, tokens of a response

    def grown(self, other):
        """The larger of both, size by size: for rows that change from round to round."""
        return Sizes(*map(max, astuple(self), astuple(other)))


def sizes(rows, batch_size, tokenizer):
    """The Sizes that the batches of a run share, so that compiled code meets one shape.

    rows: in the order in which they are gone through, in a circle, `batch_size` at a time. Batches
    that are cut otherwise may need more packed rows, and then get more."""
    rows = [encode(row, tokenizer) for row in rows]
    trees = [row["tree"] for row in rows]
    length, height, groups = bucket(max(len(tree.tokens) for tree in trees)), 1, 1
    for start in range(0, len(trees), batch_size):
        some = [trees[i % len(trees)] for i in range(start, start + batch_size)]
        places, n = first_fit([len(tree.tokens) for tree in some], length)
        height, groups = max(height, n), max(groups, branches(some, places) + 1)
    return Sizes(
        rows=bucket(height),
        length=length,
        branches=bucket(groups),
        responses=max(len(row["responses"]) for row in rows),
        tokens=bucket(max(len(what) for tree in trees for what in tree.targets)),
    )


def collate(rows, tokenizer=None, fixed=False):
    """Rows -> Batch.

    With a tokenizer the rows are text. Without one, rows whose responses are a tensor (K, C, H, W)
    are images, and others are entries of a table.

    fixed: for compiled code, which is compiled again for every shape. True rounds N, S, G and T up
    to few sizes (`bucket`). Sizes are the least ones beside that, so that all batches of a data
    set get one shape."""
    count = max(len(row["responses"]) for row in rows)
    if isinstance(fixed, Sizes):
        count = max(count, fixed.responses)
    scores = torch.zeros(len(rows), count)
    for b, row in enumerate(rows):
        if "scores" in row:
            scores[b, : len(row["scores"])] = torch.as_tensor(row["scores"])
    if tokenizer is not None:
        tensors = _text([encode(row, tokenizer) for row in rows], count, tokenizer.pad, fixed)
    elif isinstance(rows[0]["responses"], torch.Tensor):
        present = [torch.ones(len(row["responses"]), 1, dtype=torch.bool) for row in rows]
        images = _stack([row["responses"] for row in rows], count)
        tensors = dict(mask=_stack(present, count), images=images)
    else:
        tensors = _table(rows, count)
    if tokenizer is None:
        tensors["label"] = torch.tensor([row["prompt"] for row in rows])
    length = tensors["target"].shape[2] if "target" in tensors else 0
    columns = {
        name: _column([row[name] for row in rows], count, length)
        for name in rows[0]
        if name not in OWN
    }
    return Batch(scores=scores, columns=columns, **tensors)


def _table(rows, count):
    """{mask, target} of entries of a table: lists of tokens that need not be equally long."""
    length = max(len(response) for row in rows for response in row["responses"])
    target = torch.zeros(len(rows), count, length, dtype=torch.int64)
    mask = torch.zeros(target.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            target[b, k, : len(response)] = torch.tensor(response)
            mask[b, k, : len(response)] = True
    return dict(mask=mask, target=target)


def _text(rows, count, pad, fixed):
    """The token tensors of a Batch: prompt trees packed into rows, as many as fit.

    Where copies of a short prompt are cheaper (`cheaper_apart`), a tree holds one response."""
    least = fixed if isinstance(fixed, Sizes) else Sizes()

    def size(n, least):
        return max(bucket(n), least) if fixed else n

    trees = [row["tree"] for row in rows]
    home = [(b, 0) for b in range(len(rows))]  # of each tree: its row, and its first response
    if not fixed and all(parent == -1 for row in rows for parent in row["parents"]):
        copies = [apart(tree) for tree in trees]
        flat = [tree for group in copies for tree in group]
        if cheaper_apart(trees, flat):
            home = [(b, k) for b, group in enumerate(copies) for k in range(len(group))]
            trees = flat
    width = size(max(len(tree.tokens) for tree in trees), least.length)  # S
    places, height = first_fit([len(tree.tokens) for tree in trees], width)
    height = size(height, least.rows)  # N
    groups = size(branches(trees, places) + 1, least.branches)  # G, the last one is padding
    length = size(max(len(what) for tree in trees for what in tree.targets), least.tokens)  # T

    tokens = np.full((height, width), pad, dtype=np.int64)
    position, branch = np.zeros_like(tokens), np.full_like(tokens, groups - 1)
    sees = np.zeros((height, groups, groups), dtype=bool)
    sees[:, groups - 1, groups - 1] = True
    source = np.zeros((len(rows), count, length), dtype=np.int64)
    target, mask = np.zeros_like(source), np.zeros(source.shape, dtype=bool)
    parents = np.full((len(rows), count), -1, dtype=np.int64)
    first = [0] * height  # the next free branch of each packed row
    for tree, (n, offset), (b, first_response) in zip(trees, places, home):
        end, g = offset + len(tree.tokens), first[n]
        tokens[n, offset:end] = tree.tokens
        position[n, offset:end] = tree.position
        branch[n, offset:end] = np.add(tree.branch, g)
        sees[n, g : g + len(tree.sees), g : g + len(tree.sees)] = tree.sees
        first[n] += len(tree.sees)
        parents[b, : len(rows[b]["parents"])] = rows[b]["parents"]
        for k, (where, what) in enumerate(zip(tree.sources, tree.targets), first_response):
            source[b, k, : len(what)] = np.add(where, n * width + offset)
            target[b, k, : len(what)] = what
            mask[b, k, : len(what)] = True
    arrays = dict(tokens=tokens, position=position, branch=branch, sees=sees, source=source)
    arrays |= dict(target=target, mask=mask, parents=parents)
    return {name: torch.from_numpy(array) for name, array in arrays.items()}


def _stack(values, count):
    """Tensors (k, ...) with k up to `count` as one (B, count, ...), zeros where a response is absent."""
    out = values[0].new_zeros(len(values), count, *values[0].shape[1:])
    for row, value in zip(out, values):
        row[: len(value)] = value
    return out


def _column(values, count, length):
    """A column as a tensor: (B,) of numbers, (B, K) of K numbers, (B, K, T) of K lists (zeros up to `length`), or stacked arrays."""
    if isinstance(values[0], torch.Tensor):
        return torch.stack(values) if len({v.shape for v in values}) == 1 else _stack(values, count)
    if isinstance(values[0], (list, tuple)) and isinstance(values[0][0], (list, tuple)):
        out = np.zeros(
            (len(values), count, max(length, *(len(x) for value in values for x in value)))
        )
        for b, value in enumerate(values):
            for k, x in enumerate(value):
                out[b, k, : len(x)] = x
    elif isinstance(values[0], (list, tuple)):
        out = np.zeros((len(values), count))
        for b, value in enumerate(values):
            out[b, : len(value)] = value
    else:
        out = np.array(values)
    return torch.from_numpy(out).to(
        torch.get_default_dtype() if out.dtype.kind == "f" else torch.int64
    )


def fit_context(rows, tokenizer, context, truncate=False):
    """(rows, number cut): every path of every row fits into `context` tokens. A longer prompt is refused with a ValueError, or, with
    `truncate`, loses its beginning (at least half the context is kept for it) and then each response its end, without end token."""
    out, cut = [], 0
    for row in rows:
        row = encode(row, tokenizer)
        longest = max(row["tree"].position) + 2
        place = f"{row['where']}: " if "where" in row else ""
        if longest > context:
            if not truncate:
                raise UserError(
                    f"{place}a prompt with its responses takes {longest} tokens, "
                    f"the context holds {context}; --truncate cuts it"
                )
            if any(p != -1 for p in row["parents"]) or row.get("context"):
                raise UserError(
                    f"{place}a chain or tree of {longest} tokens does not fit into the context of "
                    f"{context} and cannot be cut"
                )
            cut += 1
            prompt = (
                row["prompt"]
                if not isinstance(row["prompt"], str)
                else tokenizer.encode(row["prompt"])
            ) or [tokenizer.eot]
            texts = [
                tokenizer.encode(r) if isinstance(r, str) else list(r) for r in row["responses"]
            ]
            prompt = prompt[-max(context // 2, context - max(map(len, texts)) - 1) :]
            room = context - len(prompt)
            ends = row.get("ends") or [True] * len(texts)
            ends = [bool(e) and len(t) < room for t, e in zip(texts, ends)]
            bare = {k: v for k, v in row.items() if k != "tree"}
            row = encode(
                bare | {"prompt": prompt, "responses": [t[:room] for t in texts], "ends": ends},
                tokenizer,
            )
        out.append(row)
    return out, cut


# ---------------------------------------------------------------- labels


def label(
    rows,
    rng,
    temperature=1.0,
    flip=0.0,
    length_bias=0.0,
    verifier=False,
    prefers=None,
    lengths=None,
):
    """Give `scores` to rows that carry their true `reward` (K,), as an annotator would.

    K = 2: the first wins with probability sigmoid((reward difference + length_bias * length difference) / temperature) (Bradley-Terry), is
    flipped with probability `flip`, and the preferred response comes first with scores [1, 0]. `prefers` (one probability a row) replaces
    the sigmoid's reward part. K > 2: scores are the rewards plus Gumbel noise of that temperature (Plackett-Luce), then each pair of
    neighbours in that order changes places with probability `flip`. temperature 0: no noise. A verifier's reward is the score itself,
    inverted with probability `flip` (of two, the better comes first). Labels are drawn once, when the data are built."""
    out = []
    for i, row in enumerate(rows):
        reward = torch.as_tensor(row["reward"], dtype=torch.float64)
        biased = (
            reward + length_bias * torch.as_tensor(lengths[i], dtype=torch.float64)
            if length_bias
            else reward
        )
        draw = torch.rand(len(reward), dtype=torch.float64, generator=rng)
        switch = torch.rand(len(reward), dtype=torch.float64, generator=rng) < flip
        if verifier:
            scores = torch.where(switch, 1 - reward, reward).tolist()
            row = row | {"scores": scores}
            out.append(reorder(row, [1, 0]) if len(scores) == 2 and scores[1] > scores[0] else row)
            continue
        if len(reward) == 2:
            z = biased[0] - biased[1]
            if prefers is not None:
                z = (
                    torch.logit(torch.as_tensor(prefers[i], dtype=torch.float64))
                    + z
                    - (reward[0] - reward[1])
                )
            p = torch.sigmoid(z / temperature) if temperature else (torch.sign(z) + 1) / 2
            first = (draw[0] < p) ^ switch[0]
            order = [0, 1] if first else [1, 0]
            out.append(reorder(row, order) | {"scores": [1.0, 0.0]})
            continue
        noisy = biased - temperature * torch.log(-torch.log(draw))
        order, values = noisy.argsort(descending=True).tolist(), noisy.sort(descending=True).values
        for a in range(len(order) - 1):
            if switch[a]:
                order[a], order[a + 1] = order[a + 1], order[a]
        scores = torch.zeros_like(noisy)
        scores[order] = values
        out.append(row | {"scores": scores.tolist()})
    return out


def reorder(row, order):
    """The row with those of its K responses, and of every column of K values, that `order` names.

    order: places 0 to K - 1, all of them or some. The responses must not continue each other."""
    count = len(row["responses"])

    def move(value):
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim and len(value) == count:
            return value[order]
        if isinstance(value, (list, tuple)) and len(value) == count:
            return [value[k] for k in order]
        return value

    # a tree is laid out in one order
    return {k: v if k == "prompt" else move(v) for k, v in row.items() if k != "tree"}


def write_text(path, text):
    from lab.store import write_text

    write_text(path, text)


def write_beside(path, write):
    from lab.store import write_beside

    write_beside(path, write)


def interval(values):
    from lab.evaluate import interval

    return interval(values)
