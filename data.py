"""What a method file declares and what goes into a model: tokenizers, rows, the Batch, labels.

A row is a dict with a prompt, K responses and K scores. The columns `parents`, `context` and
`ends` are optional, and any further column reaches the loss as an attribute of the batch.
Shapes: B prompts, K responses, T response tokens, N packed rows of S tokens with G branches. A
branch is a stretch of tokens with its own place in the prompt tree: the prompt, or a response.
"""

import math
import re
from dataclasses import astuple, dataclass, field, fields, replace

import numpy as np
import torch

# ---------------------------------------------------------------- what a method file declares


class UserError(ValueError):
    """A mistake that the user can correct: the command line prints one line and exits with 2."""


class StopTraining(Exception):
    """Raised by a data function of `lab.align`: the training ends here, and the run reports why.

    The policy keeps its weights.
    """


@dataclass(frozen=True)
class Paper:
    """What a method file says about itself, as `PAPER = Paper("pairs", ...)`.

    family: the heading under which `--list` shows it: pairs, lists, online, images, analysis,
        beyond, or baseline for a file without a paper of its own.
    worlds: the kinds of world that the method runs on.
    needs: what a world must offer: "pairs or lists", "lists", "demonstrations", "verifier",
        "reward", "criteria" (of annotators), or "points" (of a world of vectors).
    ignores: run settings that have no effect under this method and are therefore refused.
    defaults: run settings that the method changes when it is run alone.
    demo: further run settings and fields of its Config, which `--method NAME` changes if neither
        --world nor --data is given: what makes the first run a good one.
    core: the functions that the contract tests and the mutants examine; a method is named
        "Class.method". Papers that are not about preferences have their own core, without a loss.
    start: the stage of `lab.base` at which the method begins: "sft", or "raw" for random weights.
    """

    family: str
    worlds: tuple = ("text", "images", "table")
    needs: str = "pairs or lists"
    ignores: tuple = ()
    defaults: dict = field(default_factory=dict)
    demo: dict = field(default_factory=dict)
    core: tuple = ("loss",)
    start: str = "sft"


def choose(cfg, name, allowed):
    """Set a field of a Config to the one of `allowed` that it names, in any case, and return it.

    UserError: it names none.
    """
    value = getattr(cfg, name)
    if isinstance(value, str) and value not in allowed:
        names = {known.lower(): known for known in allowed if isinstance(known, str)}
        value = names.get(value.lower(), value)
    if value not in allowed:
        raise UserError(f"{name} = {value}: expected one of {', '.join(map(str, allowed))}")
    object.__setattr__(cfg, name, value)
    return value


def check_fields(cfg, **allowed):
    """Check the fields of a Config. UserError: a named field has a value that is not allowed.

    allowed: for each field an interval as text, "(0, inf)" or "[0, 0.5)", or a tuple of the
    accepted values, which are named in any case. A field annotated int takes whole numbers only.
    None is accepted where it is the field's default. Booleans are not numbers, and NaN lies in no
    interval.
    """
    declared = {f.name: f for f in fields(cfg)}
    for name, where in allowed.items():
        value, kind = getattr(cfg, name), str(declared[name].type)
        if value is None and declared[name].default is None:
            continue
        if isinstance(where, tuple):
            choose(cfg, name, where)
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
    """Replace the fields of a Config that are None by the defaults of the chosen variant.

    field: the name of the field that holds the variant. variants: {variant: {field: default}}.
    UserError: the variant is unknown, or a field was given that only other variants read.
    """
    variant = choose(cfg, field, variants)
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
    """The tensors in float32 or better: bfloat16 becomes float32, float64 and None stay."""
    wide = [x if x is None else x.to(torch.promote_types(x.dtype, torch.float32)) for x in tensors]
    return wide[0] if len(wide) == 1 else tuple(wide)


def readable(x):
    """Whether a check may read the values of a tensor: on CPU only, and not in compiled code.

    On CUDA the check would force a host-device sync, and compiled code cannot branch on values.
    Rows were validated when they were loaded.
    """
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def pair(logps, ref_logps, batch):
    """Check that log-probs belong to pairs -> (logps, ref_logps) in float32 or better.

    logps: (B, 2, T), the chosen response first. ref_logps: the same shape, or None for a loss
    without a reference. UserError: the rows are not pairs, or a response has no scored token (the
    latter is checked only where values are `readable`).
    """
    if logps.dim() != 3 or logps.shape[1] != 2:
        raise UserError(
            f"log-probs of shape {tuple(logps.shape)}: "
            "this loss takes pairs (B, 2, T), the chosen response first"
        )
    if readable(batch.mask) and not batch.mask.any(-1).all():
        raise UserError("a response has no scored token")
    return upcast(logps, ref_logps)


def check_lists(present, scores, low=-math.inf, high=math.inf, least=2):
    """Check that lists have enough responses, and finite scores from `low` to `high`.

    present: (B, K) bool, false for an absent response. scores: (B, K). least: the number of
    responses that are needed. UserError: a list breaks one of these rules, which is checked only
    where values are `readable`.
    """
    if not readable(present):
        return
    if (present.sum(1) < least).any():
        what = "response" if least == 1 else "responses"
        raise UserError(f"a list needs at least {least} {what} with a scored token")
    wrong = ~(scores.isfinite() & (scores >= low) & (scores <= high))
    if wrong.any():
        wanted = f"from {low:g} to {high:g}" if math.isfinite(low) else "that are finite"
        raise UserError(f"score {scores[wrong][0]:.8g}: this loss needs scores {wanted}")


# ---------------------------------------------------------------- text


class DataError(UserError):
    """A fault in the user's file; the message is one line that names file, line and column.

    For Parquet and the Hub it names the row, counted from 1, instead of the line.
    """


def error_line(error):
    """The first line of an error's message."""
    text = getattr(error, "msg", None) or getattr(error, "strerror", None) or str(error).strip()
    return str(text or type(error).__name__).splitlines()[0]


def printable(text, length=200, keep=""):
    """Text from a file or a model in a form that is safe to print on one line of a terminal.

    Every character that is not printable (control sequences, line breaks, marks that change the
    direction of writing, lone surrogates) becomes its escape, and the text is cut after `length`
    characters; None cuts nothing. keep: characters that stay as they are, for example line breaks.
    """
    text, length = str(text), len(str(text)) if length is None else length
    shown = "".join(
        c if c.isprintable() or c in keep else c.encode("unicode_escape").decode()
        for c in text[:length]
    )
    return shown + "..." * (len(text) > length)


class Tokenizer:
    """One interface for the tokenizers of tiktoken (toy worlds, GPT-2, bytes) and of checkpoints.

    name: shown in the header of a run.
    engine: a tiktoken.Encoding or a tokenizers.Tokenizer.
    eot: the id of the end-of-text token, which ends a response.
    pad: the id of the padding token, another one.
    vocab_size: every id is below it.
    chat: None, or the checkpoint's chat template as a function of messages and
        add_generation_prompt that returns text.
    files: None, or {name: text} of the files that the tokenizer was read from; `lab.hub` reads
        and writes them.
    """

    def __init__(self, name, engine, eot, pad, vocab_size, chat=None, files=None):
        self.name, self.engine, self.eot, self.pad = name, engine, eot, pad
        self.vocab_size, self.chat, self.files = vocab_size, chat, files
        self.is_tiktoken = hasattr(engine, "encode_ordinary")

    def __deepcopy__(self, memo):
        return self  # a tokenizer never changes, so copies of a model share it

    @classmethod
    def toy(cls, words, name="toy"):
        """A tokenizer built in code: 256 bytes and the given words, each one token.

        The longest word that matches is taken first.
        """
        import tiktoken

        words = sorted(set(words), key=lambda w: (-len(w), w))
        ranks = {bytes([i]): i for i in range(256)}
        longer = [w.encode() for w in words if len(w.encode()) > 1]
        ranks |= {word: 256 + i for i, word in enumerate(longer)}
        pattern = "|".join([re.escape(w) for w in words] + [r"[\s\S]"])
        eot, pad = len(ranks), len(ranks) + 1
        special = {"<|end|>": eot, "<|pad|>": pad}
        engine = tiktoken.Encoding(
            name, pat_str=pattern, mergeable_ranks=ranks, special_tokens=special
        )
        return cls(name, engine, eot, pad, engine.n_vocab)

    @classmethod
    def text(cls):
        """The tokenizer of real text without a checkpoint; its `name` says which of two it is.

        It is GPT-2's, or single bytes where GPT-2's cannot be downloaded.
        """
        import tiktoken

        try:
            return cls.from_tiktoken(tiktoken.get_encoding("gpt2"))
        except Exception:  # tiktoken raises whatever its download raises
            return cls.toy([], name="bytes")

    @classmethod
    def from_tiktoken(cls, encoding):
        """Wrap a tiktoken.Encoding; if it has no padding token, one id is added."""
        special = encoding._special_tokens
        eot = special.get("<|end|>", special.get("<|endoftext|>"))
        pad = special.get("<|pad|>", encoding.n_vocab)
        return cls(encoding.name, encoding, eot, pad, max(encoding.n_vocab, pad + 1))

    def encode(self, text):
        """Token ids of a text, without special tokens. UserError: it cannot be encoded."""
        try:
            if self.is_tiktoken:
                return self.engine.encode_ordinary(text)
            return self.engine.encode(text, add_special_tokens=False).ids
        except Exception as error:  # `tokenizers` raises a bare Exception for unknown tokens
            raise UserError(
                f"the tokenizer {self.name} cannot encode a text: {printable(error_line(error))}"
            ) from None

    def decode(self, ids):
        """Text of token ids, without end-of-text and padding tokens."""
        ids = [i for i in ids if i not in (self.eot, self.pad)]
        if self.is_tiktoken:
            return self.engine.decode([i for i in ids if i < self.engine.n_vocab], errors="replace")
        return self.engine.decode(ids, skip_special_tokens=False)


# ---------------------------------------------------------------- rows and the Batch


@dataclass
class Batch:
    """The tensors of one step. Fields that a kind of world does not use are None.

    A further column of the rows is an attribute of the batch: (B,) for one number per row, (B, K)
    for K numbers, (B, K, T) for K lists.
    """

    mask: torch.Tensor  # (B, K, T) bool: scored response tokens; ones for images
    scores: torch.Tensor  # (B, K) labels, 0 for an absent response
    tokens: torch.Tensor = None  # (N, S) packed prompt trees
    position: torch.Tensor = None  # (N, S) positions, counted from the tree's root
    branch: torch.Tensor = None  # (N, S) branch of each token; padding is branch G-1
    sees: torch.Tensor = None  # (N, G, G) bool: a branch attends to itself and its ancestors
    source: torch.Tensor = None  # (B, K, T) flat index into N*S of the predicting hidden state
    target: torch.Tensor = None  # (B, K, T) the response token that is predicted
    parents: torch.Tensor = None  # (B, K) the response that this one continues, -1 = the prompt
    images: torch.Tensor = None  # (B, K, C, H, W), or (B, K, D) for points
    label: torch.Tensor = None  # (B,) class of an image, or index of a table's prompt
    t: torch.Tensor = None  # (B,) noise level, drawn by prepare
    noise: torch.Tensor = None  # (B, 1 or K, ...) noise, drawn by prepare
    keys: int = 0  # keys of all branches of a packed row together; 0: rows shorter than LONG
    columns: dict = field(default_factory=dict)  # the further columns by name

    def __getattr__(self, name):
        columns = self.__dict__.get("columns") or {}
        if name not in columns:
            raise AttributeError(
                f"the batch has no column {name!r}; it has {', '.join(sorted(columns)) or 'none'}"
            )
        return columns[name]

    def take(self, index):
        """The batch of the rows `index` (n,) of a batch that was collated with packed=False."""
        new = replace(self, columns={name: v[index] for name, v in self.columns.items()})
        for f in fields(self):
            if isinstance(value := getattr(self, f.name), torch.Tensor):
                setattr(new, f.name, value[index])
        if self.source is not None:
            width = self.tokens.shape[1]
            row = torch.arange(len(index), device=index.device)[:, None, None]
            new.source = new.source % width + row * width
        return new

    def to(self, device):
        """The same batch on another device."""
        moved = {
            f.name: v.to(device)
            for f in fields(self)
            if isinstance(v := getattr(self, f.name), torch.Tensor)
        }
        return replace(self, **moved, columns={k: v.to(device) for k, v in self.columns.items()})


LONG = 512  # packed rows of so many tokens or more have lists of keys (nanomodel.Runs)
# columns that do not become attributes of the batch; `where` is a row's place in the user's file
OWN = ("prompt", "responses", "scores", "parents", "context", "ends", "reward", "tree", "where")


def paths(batch):
    """The trees of a batch as masks on (B, K, K) and leaf (B, K); without `parents`, flat lists.

    on[b, i, k]: node k is on the path to node i. leaf[b, k]: node k is the last step of a response.
    """
    present = batch.mask.any(-1)
    parents = getattr(batch, "parents", None)
    parents = torch.full_like(present, -1, dtype=torch.long) if parents is None else parents
    places = torch.arange(present.shape[1], device=present.device)
    child_of = parents[..., None] == places  # (B, child, parent)
    on = eye = torch.eye(len(places), device=present.device)
    for _ in range(len(places)):  # a path is a node and the path of its parent
        on = eye + child_of.to(eye.dtype) @ on
    return on.bool(), present & ~child_of.any(1)


@dataclass(frozen=True, eq=False)
class Tree:
    """The prompt tree of one row, laid out as one sequence of n tokens, the prompt first.

    Branch 0 is the prompt; branch k + 1 is the context of response k, followed by the response.
    """

    tokens: list  # n token ids
    position: list  # n positions, counted from the root
    branch: list  # n branch numbers
    sees: np.ndarray  # (K + 1, K + 1) bool: a branch attends to itself and its ancestors
    sources: list  # K lists: for each response token, the place in the sequence that predicts it
    targets: list  # K lists of response tokens

    def key(self):
        """All fields as lists that JSON can hold; equal trees have equal keys."""
        lists = [self.tokens, list(self.position), self.branch, self.sources, self.targets]
        return [*lists, self.sees.tolist()]

    def keys(self):
        """The number of keys that the branches attend to, added up over the branches."""
        sizes = np.bincount(self.branch, minlength=len(self.sees))
        return int((self.sees @ sizes)[sizes > 0].sum())


def encode(row, tokenizer):
    """The row with its prompt tree (`Tree`) in the column `tree`; text becomes token ids.

    End-of-text is appended and scored where `ends` says so; by default it ends every response that
    no other response continues. A leaf's last token predicts nothing, so it is a target but never
    an input. UserError: a parent does not stand before its children, or `parents`, `context` or
    `ends` does not have K values.
    """
    if "tree" in row:
        return row
    count = len(row["responses"])
    parents = row.get("parents") or [-1] * count
    context = row.get("context") or [[]] * count
    ends = row.get("ends") or [k not in parents for k in range(count)]
    for name, values in dict(parents=parents, context=context, ends=ends).items():
        if len(values) != count:
            raise UserError(f"{count} responses, but {len(values)} {name}")
    prompt, *ids = (
        tokenizer.encode(text) if isinstance(text, str) else list(text)
        for text in (row["prompt"], *row["responses"], *context)
    )
    prompt = prompt or [tokenizer.eot]  # something has to predict the first token
    tokens, position, branch = list(prompt), list(range(len(prompt))), [0] * len(prompt)
    last, ancestors, sources, targets = {-1: len(prompt) - 1}, [{0}], [], []
    for k, parent in enumerate(parents):
        if not -1 <= parent < k:
            raise UserError(
                f"parents {parents}: response {k} must continue an earlier response "
                "or the prompt (-1)"
            )
        leaf = k not in parents
        response, before = ids[k] + [tokenizer.eot] * bool(ends[k]), ids[count + k]
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
    sees = np.array([[k in seen for k in range(count + 1)] for seen in ancestors])
    tree = Tree(tokens, position, branch, sees, sources, targets)
    return row | {"parents": parents, "tree": tree}


def bucket(n):
    """n rounded up to one of a few sizes: four per power of two, at most 25 % apart."""
    step = max(1, 1 << max(0, (n - 1).bit_length() - 3))
    return -(-n // step) * step


def apart(trees):
    """One tree per response, each with a copy of its prompt, where such copies cost less.

    -> (trees, [(row, first response) per tree]). The cost of a token is 256 plus the number of keys
    that it meets in blocks of 128 queries, because 256 keys take as long as everything else that is
    computed for a token (measured with two and three layers of width 64 and 96).
    """
    copies, home, alone = [], [], np.ones((1, 1), dtype=bool)
    for b, tree in enumerate(trees):
        prompt = start = tree.branch.count(0)
        for k, (where, what) in enumerate(zip(tree.sources, tree.targets)):
            end = start + tree.branch.count(k + 1)
            tokens = tree.tokens[:prompt] + tree.tokens[start:end]
            where = [i if i < prompt else i - start + prompt for i in where]
            n = len(tokens)
            copies.append(Tree(tokens, list(range(n)), [0] * n, alone, [where], [what]))
            home.append((b, k))
            start = end
    longest = max(len(tree.tokens) for tree in copies)
    met = min(max(len(tree.tokens) for tree in trees), longest + 128)
    together, separate = (sum(len(tree.tokens) for tree in group) for group in (trees, copies))
    if separate * (256 + longest) < together * (256 + met):
        return copies, home
    return trees, [(b, 0) for b in range(len(trees))]


def pack(trees, width, packed=True):
    """Pack trees into rows of `width` tokens, the longest first, or each into a row of its own.

    -> ([(row, offset) per tree], N, G, keys). The last of the G branches of a row is that of the
    padding. keys: the largest number of keys of a row, padding included; 0 in rows of fewer than
    LONG tokens, where nothing reads it. In longer ones a place is left for padding, which attends
    to the keys that no branch needs.
    """
    sizes, room = [len(tree.tokens) for tree in trees], width if width < LONG else width - 1
    order = sorted(range(len(trees)), key=lambda i: (-sizes[i], i)) if packed else range(len(trees))
    free, places = [], [None] * len(trees)
    for i in order:
        fitting = (n for n, left in enumerate(free) if left >= sizes[i])
        row = next(fitting, len(free)) if packed else i
        if row == len(free):
            free.append(room)
        places[i] = (row, room - free[row])
        free[row] -= sizes[i]
    groups, keys = [1] * len(free), [width if width >= LONG else 0] * len(free)
    for tree, (row, _) in zip(trees, places):
        groups[row] += len(tree.sees)
        if width >= LONG:
            keys[row] += tree.keys() - len(tree.tokens)
    return places, len(free), max(groups), max(keys)


@dataclass(frozen=True)
class Sizes:
    """The minimum sizes of a batch of text, for compiled code (see `sizes` and `collate`)."""

    rows: int = 1  # N, packed rows
    length: int = 1  # S, tokens of a packed row
    branches: int = 1  # G, branches of a packed row, padding included
    responses: int = 1  # K
    tokens: int = 1  # T, tokens of a response
    keys: int = 0  # keys of all branches of a packed row

    def grown(self, other):
        """The larger of both in every field, for rows that change from round to round."""
        return Sizes(*map(max, astuple(self), astuple(other)))


def sizes(rows, batch_size, tokenizer):
    """The Sizes that all batches of a run share, so that compiled code sees one shape.

    rows: in the order of training, which is cyclic and takes `batch_size` rows at a time. A batch
    that is composed differently may need more packed rows; `collate` then gives it more.
    """
    rows = [encode(row, tokenizer) for row in rows]
    trees = [row["tree"] for row in rows]
    longest = max(len(tree.tokens) for tree in trees)
    length = bucket(longest) if bucket(longest) < LONG else bucket(longest + 1)
    found = Sizes()
    for start in range(0, len(trees), batch_size):
        some = [trees[i % len(trees)] for i in range(start, start + batch_size)]
        _, height, groups, keys = pack(some, length)
        found = found.grown(Sizes(rows=height, branches=groups, keys=keys))
    return Sizes(
        rows=bucket(found.rows),
        length=length,
        branches=bucket(found.branches),
        responses=max(len(row["responses"]) for row in rows),
        tokens=bucket(max(len(what) for tree in trees for what in tree.targets)),
        keys=bucket(found.keys) if found.keys else 0,
    )


def collate(rows, tokenizer=None, fixed=False, packed=True):
    """Rows -> Batch.

    With a tokenizer the rows are text. Without one, rows whose responses are a tensor (K, C, H, W)
    are images, and others are entries of a table.

    fixed: for compiled code, which is compiled again for every new shape. True rounds N, S, G and
    T up to one of a few sizes (`bucket`). A Sizes object does so, too, and sets minimum sizes, so
    that all batches of a data set have one shape.

    packed: whether several prompt trees may share a packed row. With False the tree of row b is
    packed row b, so that `Batch.take` can choose rows; it needs `fixed`.
    """
    count = max(len(row["responses"]) for row in rows)
    if isinstance(fixed, Sizes):
        count = max(count, fixed.responses)
    scores = torch.zeros(len(rows), count)
    for b, row in enumerate(rows):
        if "scores" in row:
            scores[b, : len(row["scores"])] = torch.as_tensor(row["scores"])
    if tokenizer is not None:
        rows = [encode(row, tokenizer) for row in rows]
        tensors = _text(rows, count, tokenizer.pad, fixed, packed)
    elif isinstance(rows[0]["responses"], torch.Tensor):
        responses = [row["responses"] for row in rows]
        present = np.arange(count) < np.array([[len(each)] for each in responses])
        mask = torch.from_numpy(present)[..., None]
        tensors = dict(mask=mask, images=_stack(responses, count))
    else:
        tensors = _table(rows, count)
    if tokenizer is None:
        tensors["label"] = torch.tensor([row["prompt"] for row in rows])
    length = tensors["target"].shape[2] if "target" in tensors else 0
    columns = {}  # numbers give (B,), K numbers (B, K), K lists (B, K, T); tensors are stacked
    for name in rows[0]:
        if name in OWN:
            continue
        values = [row[name] for row in rows]
        if isinstance(values[0], torch.Tensor):
            alike = len({value.shape for value in values}) == 1
            columns[name] = torch.stack(values) if alike else _stack(values, count)
            continue
        if isinstance(values[0], (list, tuple)) and isinstance(values[0][0], (list, tuple)):
            # K lists, with zeros after their ends
            longest = max(length, *(len(x) for value in values for x in value))
            column = np.zeros((len(rows), count, longest))
            for b, value in enumerate(values):
                for k, x in enumerate(value):
                    column[b, k, : len(x)] = x
        elif isinstance(values[0], (list, tuple)):  # K numbers
            column = np.zeros((len(rows), count))
            for b, value in enumerate(values):
                column[b, : len(value)] = value
        else:
            column = np.array(values)
        dtype = torch.get_default_dtype() if column.dtype.kind == "f" else torch.int64
        columns[name] = torch.from_numpy(column).to(dtype)
    return Batch(scores=scores, columns=columns, **tensors)


def _table(rows, count):
    """{mask, target}, both (B, K, T), of entries of a table: token lists of any lengths."""
    length = max(len(response) for row in rows for response in row["responses"])
    target = torch.zeros(len(rows), count, length, dtype=torch.int64)
    mask = torch.zeros(target.shape, dtype=torch.bool)
    for b, row in enumerate(rows):
        for k, response in enumerate(row["responses"]):
            target[b, k, : len(response)] = torch.tensor(response)
            mask[b, k, : len(response)] = True
    return dict(mask=mask, target=target)


def _text(rows, count, pad, fixed, packed=True):
    """The token tensors of a Batch: each packed row holds as many prompt trees as fit.

    Where copies of a short prompt are cheaper (see `apart`), a tree holds one response.
    """
    least = fixed if isinstance(fixed, Sizes) else Sizes()
    trees = [row["tree"] for row in rows]
    home = [(b, 0) for b in range(len(rows))]  # for each tree, its row and its first response
    if not fixed and all(parent == -1 for row in rows for parent in row["parents"]):
        trees, home = apart(trees)
    longest = max(len(tree.tokens) for tree in trees)
    length = max(len(what) for tree in trees for what in tree.targets)  # T
    width = max(bucket(longest), least.length) if fixed else longest  # S
    if width >= LONG:  # one place more, for padding
        width = max(bucket(longest + 1), least.length) if fixed else longest + 1
    places, height, groups, keys = pack(trees, width, packed)  # N, G
    if fixed:
        height = max(bucket(height), least.rows) if packed else height
        groups, length = max(bucket(groups), least.branches), max(bucket(length), least.tokens)
        keys = max(bucket(keys), least.keys) if keys else 0

    tokens = np.full((height, width), pad, dtype=np.int64)
    position, branch = np.zeros_like(tokens), np.full_like(tokens, groups - 1)
    sees = np.zeros((height, groups, groups), dtype=bool)
    sees[:, groups - 1, groups - 1] = True
    source = np.zeros((len(rows), count, length), dtype=np.int64)
    target, mask = np.zeros_like(source), np.zeros(source.shape, dtype=bool)
    parents = np.full((len(rows), count), -1, dtype=np.int64)
    first = [0] * height  # the next free branch of each packed row
    # branch numbers grow along a row
    for (n, offset), tree, (b, first_response) in sorted(
        zip(places, trees, home), key=lambda item: item[0]
    ):
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
    return {name: torch.from_numpy(array) for name, array in arrays.items()} | {"keys": keys}


def _stack(values, count):
    """B tensors (k, ...), k <= count -> one (B, count, ...), 0 where a response is absent."""
    if all(len(value) == count for value in values):
        return torch.stack(values)
    out = values[0].new_zeros(len(values), count, *values[0].shape[1:])
    for row, value in zip(out, values):
        row[: len(value)] = value
    return out


def fit_context(rows, tokenizer, context, truncate=False, keep=None):
    """Rows whose every path fits into `context` tokens -> (rows, number of rows that were cut).

    keep: after this number of tokens the rows are returned without their trees, which take much
    more memory than text and which `collate` makes again; None keeps all trees.

    With `truncate`, a prompt that is too long loses its beginning (it keeps at least half of the
    context), and then responses that are still too long lose their end and their end-of-text token.
    UserError: a row is too long and `truncate` is false, or the row is a chain or a tree.
    """
    out, cut, held = [], 0, 0
    for given in rows:
        row = encode(given, tokenizer)
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
            prompt, *texts = (
                tokenizer.encode(x) if isinstance(x, str) else list(x)
                for x in (row["prompt"], *row["responses"])
            )
            prompt = prompt or [tokenizer.eot]
            prompt = prompt[-max(context // 2, context - max(map(len, texts)) - 1) :]
            room = context - len(prompt)
            ends = row.get("ends") or [True] * len(texts)
            ends = [bool(e) and len(t) < room for t, e in zip(texts, ends)]
            bare = {k: v for k, v in row.items() if k != "tree"}
            short = {"prompt": prompt, "responses": [t[:room] for t in texts], "ends": ends}
            given = bare | short
            row = encode(given, tokenizer)
        held += len(row["tree"].tokens)
        out.append(row if keep is None or held <= keep else given)
    return out, cut


# ---------------------------------------------------------------- labels


def preference(z, temperature=1.0):
    """The probability that an annotator prefers the first of two responses.

    z: the difference of their rewards, a tensor of any shape. At temperature 0 it is 0, 1/2 or 1.
    """
    return torch.sigmoid(z / temperature) if temperature else (torch.sign(z) + 1) / 2


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
    """Give rows that carry their true `reward` (K,) the `scores` of an annotator.

    K = 2 (Bradley-Terry): the first response wins with probability sigmoid((reward difference +
    length_bias * length difference) / temperature), the label is flipped with probability `flip`,
    and the row gets the chosen response first, with scores [1, 0]. `prefers`, one probability per
    row, takes the place of the sigmoid of the reward difference.

    K > 2 (Plackett-Luce): the scores are the rewards plus Gumbel noise of scale `temperature`; then
    each response changes places with the next in that order with probability `flip`.

    A verifier's reward, 0 or 1, is the score itself and is inverted with probability `flip`; of two
    responses the better one comes first.

    Temperature 0 means labels without noise. lengths: the K lengths of each row, read where
    length_bias is not 0. Labels are drawn once, when the data are built.
    """
    out = []
    for i, row in enumerate(rows):
        reward = biased = torch.as_tensor(row["reward"], dtype=torch.float64)
        if length_bias:
            biased = reward + length_bias * torch.as_tensor(lengths[i], dtype=torch.float64)
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
                given = torch.logit(torch.as_tensor(prefers[i], dtype=torch.float64))
                z = given + z - (reward[0] - reward[1])
            first = (draw[0] < preference(z, temperature)) ^ switch[0]
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
    """The row with its K responses, and every column of K values, in another order.

    order: indices from 0 to K - 1; responses whose index is missing are left out. UserError: the
    responses continue each other.
    """
    if any(parent >= 0 for parent in row.get("parents", ())):
        raise UserError(f"the responses to {row['prompt']!r} continue each other: not pairs")
    count = len(row["responses"])
    # the tree is left out, since it is laid out in the old order
    out = {name: value for name, value in row.items() if name != "tree"}
    for name, value in out.items():
        if name == "prompt":
            continue
        if isinstance(value, (torch.Tensor, np.ndarray)) and value.ndim and len(value) == count:
            out[name] = value[order]
        elif isinstance(value, (list, tuple)) and len(value) == count:
            out[name] = [value[k] for k in order]
    return out


def extremes(row):
    """The pair of the best and the worst response of a row, with their scores."""
    return reorder(row, [row["scores"].index(find(row["scores"])) for find in (max, min)])
