"""Checkpoints and tokenizers of others: Llama and UNet folders, tokenizer.json, chat templates.

These files were written by somebody else. Weights are safetensors and everything else is JSON, so
nothing is unpickled. Only a chat template is executed, in a process of its own (`lab/render.py`).
An error in a file is a UserError of one line that names the file, and text that is quoted from the
file goes through `printable`.
"""

import contextlib
import json
import os
import queue
import re
import signal
import subprocess
import sys
import threading
import weakref
from dataclasses import asdict, fields

import torch

from data import Tokenizer, UserError, error_line, printable
from lab import render
from lab.store import save_tensors, write_text
from nanomodel import GPT, GPTConfig, UNet, UNetConfig

# ---------------------------------------------------------------- reading


def load_pretrained(folder):
    """The GPT or UNet of a checkpoint (a folder or a Hub name). UserError: it is neither."""
    folder = find(folder)
    config = read_object(os.path.join(folder, "config.json"))
    loaders = {"llama": load_gpt, "unet": load_unet}
    kind = config.get("model_type")
    if kind is None and "_diffusers_version" in config:
        raise UserError(
            f"{folder}: {shown(config.get('_class_name'))} of diffusers has layers that the UNet "
            "of this project lacks; --init reads the folders that a run on images has written"
        )
    if not isinstance(kind, str) or kind not in loaders:
        raise UserError(f"{folder}: model_type is {shown(kind)}, expected llama or unet")
    return loaders[kind](folder)


def find(folder):
    """The path of a checkpoint folder; for a Hub name, owner/name, it is downloaded first.

    UserError: there is no such folder or Hub name.
    """
    folder = str(folder)
    if os.path.isdir(folder):
        return folder
    if os.path.exists(folder) or not re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*", folder):
        raise UserError(f"{folder} is not a checkpoint folder")
    from huggingface_hub import snapshot_download

    try:
        return snapshot_download(folder, allow_patterns=["*.json", "*.safetensors", "*.jinja"])
    except Exception as error:  # the client raises many kinds
        raise UserError(
            f"{folder} is neither a folder nor a Hub name that can be fetched: {reason(error)}"
        ) from None


def read_text(path):
    """The text of a file, or None if there is no such file. UserError: it is not readable text."""
    try:
        with open(path, encoding="utf-8") as file:
            return file.read()
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None


def read_object(path, default=None):
    """The JSON object in a file, as a dict.

    default: the value if there is no such file. UserError: there is no file and no default, or the
    file does not hold a JSON object.
    """
    text = read_text(path)
    if text is None:
        if default is not None:
            return default
        folder, name = os.path.split(path)
        raise UserError(f"{folder} is not a checkpoint: it has no {name}")
    try:
        value = json.loads(text)
        json.dumps(value, ensure_ascii=False).encode()  # half characters break `tokenizers`
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} cannot be read: {reason(error)}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} is not a JSON object")
    return value


def reason(error):
    """The first line of an error's message, safe to print."""
    return printable(error_line(error))


def shown(value):
    """A value from a JSON file, safe to print in an error message."""
    return printable(json.dumps(value, ensure_ascii=False))


class Weights:
    """The weights in the safetensors files of a folder, sharded or not.

    The constructor reads only the headers: `shapes` is {name: shape}. `fill` puts them into a model
    in float32; `dtypes` are those that they had.
    prefix: removed from the names. UserError: a file is missing, damaged or of another dtype.
    """

    def __init__(self, folder, prefix=""):
        self.folder, self.shapes, self.where, self.dtypes = folder, {}, {}, set()
        for file in self._files():
            path = os.path.join(folder, file)
            if not os.path.isfile(path):
                raise UserError(
                    f"{folder} is not a checkpoint: it has no {printable(file)} "
                    "(only safetensors are read)"
                )
            with self._open(path) as tensors:
                for stored in tensors.keys():
                    part, name = tensors.get_slice(stored), stored.removeprefix(prefix)
                    if part.get_dtype() not in ("F64", "F32", "F16", "BF16"):
                        raise UserError(
                            f"{folder}: weight {printable(name)} holds numbers of type "
                            f"{part.get_dtype()}, expected F64, F32, F16 or BF16"
                        )
                    self.shapes[name], self.where[name] = tuple(part.get_shape()), (path, stored)

    def _files(self):
        index = os.path.join(self.folder, "model.safetensors.index.json")
        if not os.path.exists(index):
            return ["model.safetensors"]
        files = read_object(index).get("weight_map")
        files = list(files.values()) if isinstance(files, dict) else [None]
        if not all(isinstance(file, str) for file in files):
            raise UserError(f"{index} is not an index of weights")
        return sorted({os.path.basename(file) for file in files})

    @contextlib.contextmanager
    def _open(self, path):
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="pt") as file:
                yield file
        except (SafetensorError, OSError) as error:
            raise UserError(f"{path} is not a readable safetensors file: {reason(error)}") from None

    def check(self, shapes):
        """Compare with {name: shape}. UserError: a weight is missing or has another shape."""
        for name, shape in shapes.items():
            if name not in self.shapes:
                raise UserError(f"{self.folder}: weight {name} is missing")
            if self.shapes[name] != shape:
                raise UserError(
                    f"{self.folder}: weight {name} has shape {self.shapes[name]}, "
                    f"the config asks for {shape}"
                )

    def fill(self, model):
        """Copy the weights into a model. UserError: one is missing, unknown or of another shape."""
        own = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
        self.check(own)
        for name in self.shapes:
            if name not in own and not name.endswith("rotary_emb.inv_freq"):
                raise UserError(
                    f"{self.folder}: weight {printable(name)} has no place in this model"
                )
        places = model.state_dict()  # of the parameters themselves, filled one by one
        for path in sorted({self.where[name][0] for name in own}):
            with self._open(path) as tensors:
                for name in (name for name in own if self.where[name][0] == path):
                    stored = tensors.get_tensor(self.where[name][1])
                    places[name].copy_(stored)
                    self.dtypes.add(stored.dtype)
                    if not places[name].isfinite().all():
                        raise UserError(
                            f"{self.folder}: weight {name} holds values that are not finite"
                        )
        return model


def described(kind, found, folder, what):
    """The config `kind` (a dataclass) with its fields from the dict `found`.

    what: the name of the model in the message. UserError: a value does not fit.
    """
    try:
        return kind(**{f.name: found[f.name] for f in fields(kind) if f.name in found})
    except UserError as error:
        raise UserError(
            f"{folder}/config.json does not describe a {what}: {reason(error)}"
        ) from None


def built(kind, config):
    """The model kind(config), without drawing from the global random generator."""
    with torch.random.fork_rng(devices=[]):
        return kind(config)


# ---------------------------------------------------------------- Llama folders

LLAMA = dict(  # default values of fields that a Llama config.json may omit
    rms_norm_eps=1e-6,
    max_position_embeddings=2048,
    rope_theta=10000.0,
    tie_word_embeddings=False,
)
SPECIAL_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")
NEEDED = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
)


def load_gpt(folder):
    """A GPT in float32, with its tokenizer, from a checkpoint of the Llama family.

    folder: a folder or a Hub name. UserError: it is not such a checkpoint, or it uses a feature
    that this GPT does not have.
    """
    folder = find(folder)
    raw = read_object(os.path.join(folder, "config.json"))
    found = {name: value for name, value in raw.items() if value is not None}
    if found.get("model_type") != "llama":
        raise UserError(
            f"{folder}: model_type {shown(found.get('model_type'))} is not of the Llama family"
        )
    scaling = found.get("rope_scaling") or found.get("rope_parameters") or {}
    plain = False
    if isinstance(scaling, dict):  # settings of an unnamed type are not the default type's
        named = scaling.get("rope_type", scaling.get("type"))
        plain = named == "default" or set(scaling) <= {"rope_theta"}
    if not plain:
        raise UserError(f"{folder}: rotary scaling {shown(scaling)} is not supported")
    if (
        found.get("attention_bias")
        or found.get("mlp_bias")
        or found.get("hidden_act", "silu") != "silu"
    ):
        raise UserError(f"{folder}: biases or activations other than Llama's are not supported")
    missing = [name for name in NEEDED if name not in found]
    if missing:
        raise UserError(
            f"{folder}/config.json does not describe a Llama model: no {', '.join(missing)}"
        )
    theta = {name: value for name, value in scaling.items() if name == "rope_theta"}
    found = LLAMA | {"num_key_value_heads": found["num_attention_heads"]} | theta | found

    c = described(GPTConfig, found, folder, "Llama model")
    weights = Weights(folder, prefix="model.")
    # before anything of its size is built, the config must fit the weights in the file
    layers = len({name.split(".")[1] for name in weights.shapes if name.startswith("layers.")})
    if c.num_hidden_layers > layers:
        raise UserError(
            f"{folder}: num_hidden_layers is {c.num_hidden_layers}, "
            f"the weights have {layers} layers"
        )
    weights.check(
        {
            "embed_tokens.weight": (c.vocab_size, c.hidden_size),
            "layers.0.self_attn.q_proj.weight": (c.num_attention_heads * c.head_dim, c.hidden_size),
            "layers.0.self_attn.k_proj.weight": (c.num_key_value_heads * c.head_dim, c.hidden_size),
            "layers.0.mlp.gate_proj.weight": (c.intermediate_size, c.hidden_size),
        }
    )
    if c.tie_word_embeddings:  # some checkpoints hold the tied matrix twice
        weights.shapes.pop("lm_head.weight", None)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > c.vocab_size:
        raise UserError(
            f"{folder}: the tokenizer has {tokenizer.vocab_size} tokens, the model {c.vocab_size}"
        )
    model = weights.fill(built(GPT, c))
    model.tokenizer = tokenizer
    # what `save_gpt` writes again
    model.stored_as = weights.dtypes.pop() if len(weights.dtypes) == 1 else torch.float32
    model.special_ids = {n: raw[n] for n in SPECIAL_IDS if n in raw}
    return model


def save_gpt(model, folder):
    """Write config.json, model.safetensors and the tokenizer in Hugging Face's layout.

    A model that came from a checkpoint keeps the dtype and the special ids that it had there."""
    dtype = model.stored_as or torch.float32
    config = asdict(model.config) | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "torch_dtype": str(dtype).removeprefix("torch."),
    }
    if model.tokenizer is not None:
        own = dict(zip(SPECIAL_IDS, (None, model.tokenizer.eot, model.tokenizer.pad)))
        config |= own if model.special_ids is None else model.special_ids
        save_tokenizer(model.tokenizer, folder)
    weights = {
        name if name.startswith("lm_head") else "model." + name: tensor
        for name, tensor in model.state_dict().items()
    }
    save_tensors(os.path.join(folder, "model.safetensors"), weights, dtype=dtype)
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=1))


# ---------------------------------------------------------------- UNet folders


def load_unet(folder):
    """A UNet from a folder that `save_unet` wrote. UserError: it is not such a folder."""
    folder = find(folder)
    found = read_object(os.path.join(folder, "config.json"))
    if found.get("model_type") != "unet":
        raise UserError(
            f"{folder}/config.json does not describe a UNet: "
            f"model_type is {shown(found.get('model_type'))}"
        )
    # the fields that were added later have their defaults in older folders
    later = ("error", "patch", "words", "place", "free")
    names = [field.name for field in fields(UNetConfig) if field.name not in later]
    missing = [name for name in names if name not in found]
    if missing:
        raise UserError(f"{folder}/config.json does not describe a UNet: no {', '.join(missing)}")

    c, weights = described(UNetConfig, found, folder, "UNet"), Weights(folder)
    # before anything of its size is built, the config must fit the weights in the file
    name, rows = "condition.label.weight", c.classes + c.free
    if c.words is not None:
        name, rows = "condition.label.embedding.weight", max(map(max, c.words)) + 1
    weights.check(
        {
            name: (rows, 2 * c.width),
            "input.weight": (c.width, c.channels * c.patch**2, 3, 3),
        }
    )
    return weights.fill(built(UNet, c))


def save_unet(model, folder):
    """Write config.json and model.safetensors."""
    save_tensors(os.path.join(folder, "model.safetensors"), model.state_dict())
    config = {"model_type": "unet"} | asdict(model.config)
    write_text(os.path.join(folder, "config.json"), json.dumps(config, indent=1))


# ---------------------------------------------------------------- tokenizers

# tiktoken's spelling of GPT-2's pattern means something else to the `tokenizers` library
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
TOKENIZER_FILES = ("tokenizer.json", "chat_template.jinja", "tokenizer_config.json")
COPIED = ("special_tokens_map.json", "added_tokens.json", "generation_config.json")


def load_tokenizer(folder):
    """The tokenizer of a checkpoint folder, with its chat template if it has one.

    UserError: no tokenizer.json, one that the `tokenizers` library cannot read, or no end-of-text
    token.
    """
    import tokenizers

    names = (*TOKENIZER_FILES, *COPIED)
    files = {name: read_text(os.path.join(folder, name)) for name in names}
    files = {name: text for name, text in files.items() if text is not None}
    if "tokenizer.json" not in files:
        raise UserError(f"{folder} has no tokenizer.json")
    settings = {}
    for name in ("config.json", "tokenizer_config.json"):
        settings |= read_object(os.path.join(folder, name), {})
    try:
        engine = tokenizers.Tokenizer.from_str(files["tokenizer.json"])
    except Exception as error:  # the library raises bare Exception
        raise UserError(f"{folder}/tokenizer.json cannot be read: {reason(error)}") from None
    engine.no_truncation()
    engine.no_padding()
    ids = engine.get_vocab(with_added_tokens=True).values()
    if len(ids) < 2:
        raise UserError(f"{folder}/tokenizer.json has fewer than two tokens")

    def identity(key):
        token = settings.get(key)
        token = token.get("content") if isinstance(token, dict) else token
        return engine.token_to_id(token) if isinstance(token, str) else None

    eot, size = identity("eos_token"), max(ids) + 1
    if eot is None:
        eot = settings.get("eos_token_id")
        if isinstance(eot, list) and eot:
            eot = eot[0]
    if eot is None:
        raise UserError(f"{folder} names no end-of-text token (eos_token)")
    if type(eot) is not int or not 0 <= eot < size:
        raise UserError(
            f"{folder}: end-of-text token {shown(eot)}, expected a token id from 0 to {size - 1}"
        )
    pad = identity("pad_token")
    if pad is None or pad == eot:  # end-of-text is scored, so padding must be another token
        pad = 0 if eot else 1
    own = settings.get("nanopref_tokenizer")
    own = printable(own, 40) if isinstance(own, str) and own else None
    # tiktoken encodes "<|end|>" as ordinary text, while a chat template means the special token
    engine.encode_special_tokens = bool(own)
    name, chat = own or "tokenizer.json", chat_template(folder)
    return Tokenizer(name, engine, eot, pad, size, chat=chat, files=files)


def save_tokenizer(tokenizer, folder):
    """Write tokenizer.json and tokenizer_config.json, readable by `tokenizers` and `transformers`.

    If the tokenizer came from a checkpoint, its files are copied unchanged. Otherwise it is one of
    tiktoken, which is written in Hugging Face's layout.
    """
    if tokenizer.files:
        for name, text in tokenizer.files.items():
            write_text(os.path.join(folder, name), text)
        return
    # byte-level BPE represents every byte by a printable character
    letters = [*range(33, 127), *range(161, 173), *range(174, 256)]
    letter = {byte: chr(byte) for byte in letters}
    letter |= {byte: chr(256 + i) for i, byte in enumerate(sorted({*range(256)} - {*letters}))}
    ranks = tokenizer.engine._mergeable_ranks
    vocab = {"".join(letter[byte] for byte in token): i for token, i in ranks.items()}
    # tiktoken merges adjacent tokens whose union is a token, the lowest rank first
    halves = (
        (token[:i], token[i:])
        for token in sorted(vocab, key=vocab.get)
        for i in range(1, len(token))
    )
    model = dict(
        type="BPE",
        vocab=vocab,
        merges=[[a, b] for a, b in halves if a in vocab and b in vocab],
        ignore_merges=True,
        fuse_unk=False,
        byte_fallback=False,
    )
    pattern = GPT2_PATTERN if tokenizer.name == "gpt2" else tokenizer.engine._pat_str
    split = dict(type="Split", pattern=dict(Regex=pattern), behavior="Isolated", invert=False)
    level = dict(type="ByteLevel", add_prefix_space=False, trim_offsets=True, use_regex=False)
    special = tokenizer.engine._special_tokens | {"<|pad|>": tokenizer.pad}
    flags = dict(single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
    file = dict(
        version="1.0",
        added_tokens=[dict(id=i, content=text) | flags for text, i in special.items()],
        pre_tokenizer=dict(type="Sequence", pretokenizers=[split, level]),
        decoder=level,
        model=model,
        truncation=None,
        padding=None,
        normalizer=None,
        post_processor=None,
    )
    settings = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        eos_token=next(text for text, i in special.items() if i == tokenizer.eot),
        pad_token="<|pad|>",
        nanopref_tokenizer=tokenizer.name,
    )
    write_text(os.path.join(folder, "tokenizer.json"), json.dumps(file))
    write_text(os.path.join(folder, "tokenizer_config.json"), json.dumps(settings))


# ---------------------------------------------------------------- chat templates


def chat_template(folder):
    """The ChatTemplate of a checkpoint folder, or None if it has none.

    It is read from chat_template.jinja, or else from tokenizer_config.json. UserError: it is not
    text.
    """
    settings = read_object(os.path.join(folder, "tokenizer_config.json"), {})
    text = read_text(os.path.join(folder, "chat_template.jinja"))
    text = settings.get("chat_template") if text is None else text
    if isinstance(text, list):  # a list of templates with names
        named = [each for each in text if isinstance(each, dict) and each.get("name") == "default"]
        text = named[0].get("template", named) if named else None
    if text is None:
        return None
    if not isinstance(text, str):
        raise UserError(f"{folder}: its chat template is not text")
    names = {}
    for name, value in settings.items():
        value = value.get("content") if isinstance(value, dict) else value
        if name.endswith("_token") and isinstance(value, str):
            names[name] = value
    return ChatTemplate(folder, text, names)


class ChatTemplate:
    """A checkpoint's chat template as a function: messages, add_generation_prompt -> text.

    Templates are rendered in a process of their own (`lab/render.py`), which is started at the
    first call and reused by later ones. UserError: the template fails, takes too long, needs too
    much memory or writes too much. On systems that cannot limit memory and CPU time (Windows), the
    only limit is that the process is killed after `patience` seconds.
    """

    patience = render.SECONDS + 15.0  # a busy machine takes seconds to start a process

    def __init__(self, folder, text, names):
        self.folder, self.text, self.names = folder, text, names
        self.process = self.replies = self.end = None

    def __call__(self, messages, add_generation_prompt):
        if self.process is None:
            self._start()
            self._ask(dict(path=[p for p in sys.path if p], template=self.text, names=self.names))
        return self._ask(dict(messages=messages, add_generation_prompt=add_generation_prompt))

    def _start(self):
        command = [sys.executable, "-I", render.__file__]
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        self.process, self.replies = subprocess.Popen(command, **pipes), queue.Queue()
        self.end = weakref.finalize(self, end, self.process)
        # a queue can be read with a time limit on every system, a pipe cannot
        threading.Thread(
            target=forward, args=(self.process.stdout, self.replies), daemon=True
        ).start()

    def _ask(self, question):
        """Send one question to the process -> the text of its answer. UserError: it has none."""
        try:
            with contextlib.suppress(OSError):  # the process has ended, which the queue reports
                self.process.stdin.write(json.dumps(question, default=str).encode() + b"\n")
                self.process.stdin.flush()
            line = self.replies.get(timeout=self.patience)
            reply = json.loads(line) if line else {"error": self._why()}
            if "error" not in reply:
                reply["text"].encode()  # raises for a lone surrogate, which cannot be printed
                return reply["text"]
            what = reply["error"].splitlines()[0]
        except queue.Empty:
            what = f"takes longer than {self.patience:g} seconds"
        except UnicodeEncodeError:
            what = "writes half a character (a lone surrogate)"
        except BaseException:  # after Ctrl-C, the next question would get this question's answer
            self.stop()
            raise
        self.stop()
        raise UserError(f"{self.folder}: its chat template {printable(what)}")

    def _why(self):
        """Why the process has ended, for a message."""
        if self.process.wait() == -getattr(signal, "SIGPROF", 0):
            return f"takes longer than {render.SECONDS:g} seconds"
        return f"ends its process (it may use {render.MEMORY >> 20} MB)"

    def stop(self):
        """End the process if there is one; the next call of the template starts another."""
        if self.process is not None:
            self.end()
            self.process = None


def forward(stream, replies):
    """Put the lines of a stream into a queue, and b"" after the last one."""
    with stream:
        for line in stream:
            replies.put(line)
    replies.put(b"")


def end(process):
    """Kill a process and close its pipes."""
    process.kill()
    process.wait()
    with contextlib.suppress(OSError):
        process.stdin.close()
