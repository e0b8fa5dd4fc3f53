"""Checkpoints and tokenizers of others are read exactly, and any error in them is one line."""

import json
import math
import random
import shutil
import struct
import time

import pytest
import torch
from safetensors.torch import load_file, save_file

import train
from data import Tokenizer, UserError, collate
from lab import render
from lab.hub import (
    ChatTemplate,
    chat_template,
    find,
    load_pretrained,
    load_tokenizer,
    save_tokenizer,
)
from nanomodel import GPT, GPTConfig, UNet, UNetConfig

TOY = Tokenizer.toy([" good", " bad", " the", "\n", "film"])
CONTROL = "\x1b[31mred\x07\r\u202e"  # red, a bell, back to the start of the line, right to left
ROWS = [
    dict(prompt="the film", responses=[" good", " bad\n film"]),
    dict(prompt="a", responses=[" the the"]),
]
TINY = dict(
    vocab_size=TOY.vocab_size,
    hidden_size=16,
    intermediate_size=24,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=64,
)


def saved(folder, **changes):
    """A GPT of two layers with large weights, written to a folder."""
    model = GPT(GPTConfig(**TINY | changes), TOY)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.dim() == 2 else 1, 0.4, generator=generator)
    model.save_pretrained(str(folder))
    return model


def saved_unet(folder, **changes):
    """A small UNet, written to a folder."""
    torch.manual_seed(0)
    model = UNet(UNetConfig(**dict(width=8) | changes))
    torch.nn.init.normal_(model.output.weight, std=0.1)
    model.save_pretrained(folder)
    return model


def refusal(load, folder):
    """The message of the UserError with which `load` refuses a folder: one line that names it."""
    with pytest.raises(UserError) as caught:
        load(str(folder))
    message = str(caught.value)
    assert message.isprintable() and len(message) < 1000 and str(folder) in message
    return message


# ---------------------------------------------------------------- GPT folders


@pytest.mark.parametrize("tied", [True, False])
def test_a_saved_folder_loads_back_exactly_with_its_tokenizer(tmp_path, tied):
    model = saved(
        tmp_path, tie_word_embeddings=tied, num_key_value_heads=1, rope_theta=5e4, rms_norm_eps=1e-3
    )
    state = torch.get_rng_state()
    back = GPT.from_pretrained(str(tmp_path))
    assert torch.equal(torch.get_rng_state(), state)  # loading draws nothing
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))
    assert all(p.requires_grad and p.device.type == "cpu" for p in back.parameters())
    ours, theirs = back.tokenizer, model.tokenizer
    assert (ours.name, ours.eot, ours.pad, ours.vocab_size) == (
        theirs.name,
        theirs.eot,
        theirs.pad,
        theirs.vocab_size,
    )
    assert torch.equal(model.logps(collate(ROWS, TOY)), back.logps(collate(ROWS, ours)))
    back.save_pretrained(str(tmp_path / "again"))
    names = ["config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"]
    for name in names:
        assert (tmp_path / name).read_bytes() == (tmp_path / "again" / name).read_bytes()
    assert sorted(p.name for p in (tmp_path / "again").iterdir()) == names


def test_a_loaded_model_does_not_lean_on_its_file(tmp_path):
    saved(tmp_path)
    model = load_pretrained(tmp_path)
    before = model.norm.weight.clone()
    (tmp_path / "model.safetensors").write_bytes(bytes(10**5))
    assert torch.equal(model.norm.weight, before)


@pytest.mark.parametrize("tied", [True, False])
def test_sharded_half_precision_weights_load_as_float32(tmp_path, tied):
    model = saved(tmp_path, tie_word_embeddings=tied)
    weights = {k: v.bfloat16() for k, v in load_file(tmp_path / "model.safetensors").items()}
    if tied:  # some checkpoints hold the tied matrix twice
        weights["lm_head.weight"] = weights["model.embed_tokens.weight"]
    names = sorted(weights)
    where = {name: f"model-{1 + i % 2:05d}-of-00002.safetensors" for i, name in enumerate(names)}
    for shard in set(where.values()):
        save_file({n: weights[n].clone() for n in names if where[n] == shard}, tmp_path / shard)
    (tmp_path / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": where}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    back = GPT.from_pretrained(tmp_path)
    for a, b in zip(model.parameters(), back.parameters()):
        assert b.dtype == torch.float32 and torch.equal(a.bfloat16().float(), b)
    (tmp_path / "model-00002-of-00002.safetensors").unlink()
    assert "has no model-00002-of-00002.safetensors" in refusal(GPT.from_pretrained, tmp_path)


def test_what_a_config_leaves_out_is_llamas(tmp_path):
    model = saved(tmp_path, tie_word_embeddings=False, num_key_value_heads=4)
    config = json.loads((tmp_path / "config.json").read_text())
    left_out = "rms_norm_eps max_position_embeddings rope_theta tie_word_embeddings head_dim"
    config = {name: value for name, value in config.items() if name not in left_out.split()}
    config |= dict(
        num_key_value_heads=None,
        rope_scaling=None,
        rope_parameters=dict(rope_type="default", rope_theta=777.0),
    )
    (tmp_path / "config.json").write_text(json.dumps(config))
    read = GPT.from_pretrained(tmp_path).config
    assert (read.rms_norm_eps, read.max_position_embeddings) == (1e-6, 2048)
    assert (read.rope_theta, read.tie_word_embeddings) == (777.0, False)
    assert read.num_key_value_heads == 4 and read.head_dim == model.config.head_dim


@pytest.mark.parametrize(
    ("rope", "theta"),
    [
        (dict(rope_scaling=None), 10000.0),
        (dict(rope_scaling={}, rope_parameters=dict(rope_theta=5e4)), 5e4),
        (dict(rope_scaling=dict(rope_theta=5e4)), 5e4),
        (dict(rope_scaling=dict(type="default", factor=1.0)), 10000.0),
        (dict(rope_parameters=dict(rope_type="default", rope_theta=5e4)), 5e4),
    ],
)
def test_rotary_parameters_without_scaling_are_read(tmp_path, rope, theta):
    saved(tmp_path)
    edited(**rope, rope_theta=...)(tmp_path)
    assert GPT.from_pretrained(tmp_path).config.rope_theta == theta


# faults: functions that damage a folder


def edited(**changes):
    """Write config.json with other values; a key with the value `...` is removed."""

    def fault(folder):
        config = json.loads((folder / "config.json").read_text()) | changes
        config = {name: value for name, value in config.items() if value is not ...}
        (folder / "config.json").write_text(json.dumps(config))

    return fault


def without(name):
    return lambda folder: (folder / name).unlink()


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def reweighted(change):
    """Other weights: change({name: tensor}) in place."""

    def fault(folder):
        weights = load_file(folder / "model.safetensors")
        change(weights)
        save_file(weights, folder / "model.safetensors")

    return fault


def retyped(name, change):
    return reweighted(lambda weights: weights.update({name: change(weights[name])}))


def float4(folder):
    """A safetensors file by hand, whose one tensor holds numbers of four bits."""
    header = {"model.norm.weight": dict(dtype="F4", shape=[16], data_offsets=[0, 8])}
    text = json.dumps(header).encode()
    data = struct.pack("<Q", len(text)) + text + bytes(8)
    (folder / "model.safetensors").write_bytes(data)


def pickled(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def index(weight_map):
    """An index of shards."""
    text = json.dumps({"weight_map": weight_map})
    return written("model.safetensors.index.json", text)


def end(token):
    """Let only config.json name the end-of-text token."""

    def fault(folder):
        written("tokenizer_config.json", "{}")(folder)
        edited(eos_token_id=token)(folder)

    return fault


def gap(folder):
    """A tokenizer with one token far beyond the others."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"] = []
    tokenizer["model"]["vocab"]["far"] = 999
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))


LARGER = Tokenizer.toy([" more", " words", " than", " rows", " are", " there"])
NORM, DEEP = "model.norm.weight", "[" * 20000 + "]" * 20000
NOT_LLAMA = "config.json does not describe a Llama model: "
FAULTS = {
    "no folder": (shutil.rmtree, "is not a checkpoint folder"),
    "no config": (without("config.json"), "it has no config.json"),
    "config is no JSON": (written("config.json", "{"), "config.json cannot be read"),
    "config is a list": (written("config.json", "[]"), "config.json is not a JSON object"),
    "config is a number": (written("config.json", "5"), "config.json is not a JSON object"),
    "config is null": (written("config.json", "null"), "config.json is not a JSON object"),
    "deep config": (written("config.json", DEEP), "config.json cannot be read"),
    "deep object": (
        written("config.json", '{"a":' * 20000 + "1" + "}" * 20000),
        "config.json cannot be read",
    ),
    "config in Latin-1": (
        lambda folder: (folder / "config.json").write_bytes(b'{"a": "\xe9"}'),
        "config.json cannot be read",
    ),
    "config is a folder": (
        lambda folder: (without("config.json")(folder), (folder / "config.json").mkdir()),
        "config.json cannot be read",
    ),
    "another family": (edited(model_type="gpt2"), 'model_type "gpt2" is not of the Llama family'),
    "no model type": (edited(model_type=...), "model_type null is not of the Llama family"),
    "a list of types": (edited(model_type=["llama"]), "is not of the Llama family"),
    "control characters in the type": (
        edited(model_type=CONTROL),
        r'model_type "\u001b[31mred\u0007',
    ),
    "no width": (edited(hidden_size=...), NOT_LLAMA + "no hidden_size"),
    "odd heads": (
        edited(num_key_value_heads=3),
        NOT_LLAMA + "num_attention_heads 4 is not a multiple of num_key_value_heads 3",
    ),
    "odd head size": (edited(head_dim=3), NOT_LLAMA + "head_dim 3 must be even"),
    "another width": (
        edited(intermediate_size=32),
        "weight layers.0.mlp.gate_proj.weight has shape (24, 16), the config asks for (32, 16)",
    ),
    "more layers": (edited(num_hidden_layers=3), "num_hidden_layers is 3, the weights have 2"),
    "absurdly many layers": (edited(num_hidden_layers=2 * 10**9), "the weights have 2 layers"),
    "fewer layers": (edited(num_hidden_layers=1), "has no place in this model"),
    "an absurd vocabulary": (
        edited(vocab_size=2 * 10**9),
        "weight embed_tokens.weight has shape (262, 16)",
    ),
    "absurd widths": (
        edited(hidden_size=2 * 10**9, vocab_size=2 * 10**9, intermediate_size=2 * 10**9),
        "",
    ),
    "absurd heads": (
        edited(num_attention_heads=2 * 10**9, num_key_value_heads=2 * 10**9, head_dim=2 * 10**9),
        "",
    ),
    "untied in name only": (edited(tie_word_embeddings=False), "weight lm_head.weight is missing"),
    "missing weight": (reweighted(lambda w: w.pop(NORM)), "weight norm.weight is missing"),
    "one weight more": (
        reweighted(lambda w: w.update({CONTROL: torch.ones(1)})),
        r"weight \x1b[31mred\x07\r\u202e has no place in this model",
    ),
    "biases": (edited(attention_bias=True), "biases or activations other than Llama's"),
    "another activation": (edited(hidden_act="gelu"), "biases or activations other than Llama's"),
    "a list of activations": (edited(hidden_act=["silu"]), "biases or activations other than"),
    "rope scaling": (edited(rope_scaling=dict(type="linear", factor=2.0)), "rotary scaling"),
    "rope parameters": (edited(rope_parameters=dict(rope_type="llama3")), '"llama3"'),
    "rope scaling without a type": (
        edited(rope_scaling=dict(factor=2.0)),
        '{"factor": 2.0} is not',
    ),
    "rope scaling of unknown keys": (edited(rope_scaling=dict(a=1)), "rotary scaling"),
    "rope parameters without a type": (
        edited(rope_parameters=dict(rope_theta=5e4, factor=2.0)),
        "rotary scaling",
    ),
    "rope scaling is text": (edited(rope_scaling=CONTROL), "rotary scaling"),
    "pickle only": (pickled, "it has no model.safetensors (only safetensors are read)"),
    "no safetensors": (written("model.safetensors", "PK"), "is not a readable safetensors file"),
    "four bits": (float4, "weight norm.weight holds numbers of type F4"),
    "integers": (retyped(NORM, torch.Tensor.int), "weight norm.weight holds numbers of type I32"),
    "booleans": (retyped(NORM, torch.Tensor.bool), "holds numbers of type BOOL"),
    "NaN": (retyped(NORM, lambda w: w * math.nan), "weight norm.weight holds values that are not"),
    "infinity": (retyped(NORM, lambda w: w / 0), "weight norm.weight holds values that are not"),
    "no index": (written("model.safetensors.index.json", "{"), "index.json cannot be read"),
    "a list as index": (
        written("model.safetensors.index.json", "[]"),
        "index.json is not a JSON object",
    ),
    "a deep index": (written("model.safetensors.index.json", DEEP), "index.json cannot be read"),
    "index without a map": (
        written("model.safetensors.index.json", "{}"),
        "index.json is not an index of weights",
    ),
    "index of numbers": (index({NORM: 3}), "index.json is not an index of weights"),
    "control characters in a shard's name": (
        index({NORM: CONTROL}),
        r"it has no \x1b[31mred\x07\r\u202e (only safetensors are read)",
    ),
    "a shard elsewhere": (index({NORM: "../../etc/passwd"}), "it has no passwd"),
    "the folder as a shard": (index({NORM: ".."}), "it has no .. (only"),
    "an empty shard name": (index({NORM: ""}), "it has no  (only"),
    "no tokenizer": (without("tokenizer.json"), "has no tokenizer.json"),
    "tokenizer is no JSON": (written("tokenizer.json", "["), "tokenizer.json cannot be read"),
    "tokenizer is deep": (written("tokenizer.json", DEEP), "tokenizer.json cannot be read"),
    "tokenizer settings are no JSON": (
        written("tokenizer_config.json", "["),
        "tokenizer_config.json cannot be read",
    ),
    "tokenizer settings are a list": (
        written("tokenizer_config.json", "[]"),
        "tokenizer_config.json is not a JSON object",
    ),
    "half a character as end token": (
        written("tokenizer_config.json", r'{"eos_token": "\ud800"}'),
        "tokenizer_config.json cannot be read",
    ),
    "no end token": (end(None), "names no end-of-text token"),
    "a larger tokenizer": (
        lambda folder: save_tokenizer(LARGER, folder),
        "the tokenizer has 264 tokens, the model 262",
    ),
    "a tokenizer with a gap": (gap, "the tokenizer has 1000 tokens, the model 262"),
    "template is a number": (
        written("tokenizer_config.json", '{"eos_token": "<|end|>", "chat_template": 5}'),
        "its chat template is not text",
    ),
}
for token in ([], 99999, -1, "x", 10**30, True, 1.5, {}, [[]]):
    FAULTS[f"end token {token}"] = (end(token), "end-of-text token")
SIZES = "vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads"
for name in (*SIZES.split(), "num_key_value_heads", "max_position_embeddings"):
    for value in ("4", True, 4.0, 0, -4, 10**30, [4], {}, CONTROL):
        FAULTS[f"{name} {value!r}"] = (edited(**{name: value}), NOT_LLAMA + f"{name} = ")
for name in ("rms_norm_eps", "rope_theta"):
    for value in ("1e-5", True, [1.0], {}, -1.0, math.nan, math.inf, 1e308, 10**30, CONTROL):
        FAULTS[f"{name} {value!r}"] = (edited(**{name: value}), NOT_LLAMA + f"{name} = ")
for value in ("no", [], 2):
    FAULTS[f"tied {value!r}"] = (
        edited(tie_word_embeddings=value),
        NOT_LLAMA + "tie_word_embeddings",
    )


@pytest.mark.parametrize("name", FAULTS)
def test_a_damaged_llama_folder_is_refused_in_one_line(tmp_path, name):
    fault, message = FAULTS[name]
    saved(tmp_path)
    fault(tmp_path)
    assert message in refusal(GPT.from_pretrained, tmp_path)


def test_weights_are_compared_before_anything_of_their_size_is_built(tmp_path):
    saved(tmp_path)
    for change in (dict(num_hidden_layers=2**31 - 1), dict(vocab_size=2**31 - 1)):
        edited(**change)(tmp_path)
        start = time.process_time()
        refusal(GPT.from_pretrained, tmp_path)
        assert time.process_time() - start < 1


@pytest.mark.parametrize("name", ["nobody", "a/b/c", "../a", "/a/b", ""])
def test_a_name_that_is_neither_a_folder_nor_owner_and_name_is_not_looked_up(name):
    with pytest.raises(UserError, match="is not a checkpoint folder") as caught:
        find(name)
    assert str(caught.value).isprintable()


def test_a_failed_download_is_one_line(monkeypatch):
    import huggingface_hub

    def unreachable(name, **options):
        raise OSError(f"no such repository {CONTROL}\nat all")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    with pytest.raises(UserError, match="nobody/nothing is neither a folder nor") as caught:
        find("nobody/nothing")
    assert str(caught.value).isprintable()


def test_transformers_and_this_model_read_each_others_folders(tmp_path):
    transformers = pytest.importorskip("transformers")
    shape = dict(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    settings = dict(
        vocab_size=TOY.vocab_size,
        max_position_embeddings=128,
        rms_norm_eps=1e-4,
        initializer_range=0.3,
    )
    rope = dict(rope_parameters=dict(rope_type="default", rope_theta=5e4))
    ids = TOY.encode("the film the good\n film is not bad, it is long" * 2)
    batch = collate([dict(prompt=ids[:5], responses=[ids[5:]])], TOY)
    for tied in (True, False):
        torch.manual_seed(0)
        theirs = transformers.LlamaForCausalLM(
            transformers.LlamaConfig(**shape, **settings, **rope, tie_word_embeddings=tied)
        ).eval()
        theirs.save_pretrained(tmp_path / "theirs")
        save_tokenizer(TOY, str(tmp_path / "theirs"))
        ours = GPT.from_pretrained(tmp_path / "theirs")
        assert ours.config.rope_theta == 5e4 and ours.config.rms_norm_eps == 1e-4
        with torch.no_grad():
            expected = theirs(torch.tensor([ids])).logits[0, 4:]
            torch.testing.assert_close(ours.logits(batch)[0, 0], expected, rtol=0, atol=1e-5)
            ours.save_pretrained(str(tmp_path / "ours"))
            again = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "ours").eval()
            torch.testing.assert_close(
                again(torch.tensor([ids])).logits[0, 4:], expected, rtol=0, atol=1e-6
            )
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "ours")
    text = "the film\n good"
    assert tokenizer(text, add_special_tokens=False)["input_ids"] == TOY.encode(text)
    assert (tokenizer.eos_token_id, tokenizer.pad_token_id) == (TOY.eot, TOY.pad)


# ---------------------------------------------------------------- UNet folders


def test_a_unet_comes_back_exactly(tmp_path):
    model = saved_unet(tmp_path / "new" / "folder", classes=3, channels=2)
    assert sorted(p.name for p in (tmp_path / "new" / "folder").iterdir()) == [
        "config.json",
        "model.safetensors",
    ]
    again = load_pretrained(tmp_path / "new" / "folder")
    assert isinstance(again, UNet) and again.config == model.config
    assert again.alpha_bar.device.type == "cpu"
    draws = [
        each.sample([2], 2, torch.Generator().manual_seed(0), steps=2) for each in (model, again)
    ]
    assert torch.equal(*draws) and draws[0].abs().sum() > 0


NOT_UNET = "config.json does not describe a UNet: "
UNET_FAULTS = {
    "no folder": (shutil.rmtree, "is not a checkpoint folder"),
    "no weights": (without("model.safetensors"), "it has no model.safetensors"),
    "no tensors": (written("model.safetensors", "not tensors"), "not a readable safetensors"),
    "config is a list": (written("config.json", "[]"), "config.json is not a JSON object"),
    "deep config": (written("config.json", DEEP), "config.json cannot be read"),
    "no classes": (edited(classes=...), NOT_UNET + "no classes"),
    "another width": (edited(width=16), "has shape"),
    "more classes": (edited(classes=11), "weight condition.label.weight has shape (10, 16)"),
    "absurdly many classes": (edited(classes=2**31 - 1), "weight condition.label.weight"),
    "absurd channels": (edited(channels=2**31 - 1), ""),
    "an absurd width": (edited(width=2**31 - 8), ""),
    "booleans": (
        retyped("output.weight", torch.Tensor.bool),
        "weight output.weight holds numbers of type BOOL",
    ),
    "NaN": (retyped("output.weight", lambda w: w * math.nan), "values that are not finite"),
}
for name, values in dict(
    channels=("1", True, 0, -1, 1.5, [1], 10**30),
    classes=("10", True, 0, -1, 1.5, [], 10**30),
    width=("8", True, 0, 12, 8.0, {}, 10**30),
    sd=("1", True, 0, -1, [1.0], {}, math.nan, math.inf, 1e308, 10**30, CONTROL),
    size=("88", True, 8.0, 7, 0, [8], [8, 8, 8], [8, "8"], [8, 10**9], [[8], 8], {}, CONTROL),
    prediction=("v", 5, [], {}, True, CONTROL),
    schedule=("sqrt", 5, [], {}, True, CONTROL),
).items():
    for value in values:
        UNET_FAULTS[f"{name} {value!r}"] = (edited(**{name: value}), NOT_UNET + name)


def test_a_unet_of_words_and_patches_comes_back_exactly(tmp_path):
    how = dict(classes=2, words=[[0, 1], [2, 1], [3, 3]], free=True, place=True, error="output")
    model = saved_unet(tmp_path, patch=2, size=(8, 12), **how)
    back = UNet.from_pretrained(str(tmp_path))
    assert back.config == model.config and back.error == "output" and back.free
    rng = torch.Generator().manual_seed(0)
    one = model.sample([1], 1, rng, steps=2, guidance=2.0)
    assert torch.equal(one, back.sample([1], 1, rng.manual_seed(0), steps=2, guidance=2.0))


def test_a_unet_of_before_there_were_words_and_patches_loads(tmp_path):
    model, path = saved_unet(tmp_path), tmp_path / "config.json"
    config = json.loads(path.read_text())
    for name in ("error", "patch", "words", "place", "free"):
        del config[name]
    path.write_text(json.dumps(config))
    back = UNet.from_pretrained(str(tmp_path))
    assert back.config == model.config
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), back.parameters()))


@pytest.mark.parametrize("name", UNET_FAULTS)
def test_a_damaged_unet_folder_is_refused_in_one_line(tmp_path, name):
    fault, message = UNET_FAULTS[name]
    saved_unet(tmp_path)
    fault(tmp_path)
    assert message in refusal(UNet.from_pretrained, tmp_path)
    if name != "no folder":  # a faulty UNet is not mistaken for a faulty Llama
        assert message in refusal(load_pretrained, tmp_path)


@pytest.mark.parametrize("kind", ["UNet", "", None, 5, [], {}, CONTROL, ...])
def test_a_folder_of_unknown_type_is_refused_by_name(tmp_path, kind):
    saved_unet(tmp_path)
    edited(model_type=kind)(tmp_path)
    assert "expected llama or unet" in refusal(load_pretrained, tmp_path)
    assert NOT_UNET + "model_type is" in refusal(UNet.from_pretrained, tmp_path)


@pytest.mark.parametrize("name", ["UNet2DModel", "UNet2DConditionModel", CONTROL])
def test_a_folder_of_diffusers_is_refused_by_its_class(tmp_path, name):
    config = {"_class_name": name, "_diffusers_version": "0.35.1", "sample_size": 32}
    (tmp_path / "config.json").write_text(json.dumps(config))
    said = refusal(load_pretrained, tmp_path)
    assert "of diffusers has layers that the UNet of this project lacks" in said
    assert name == CONTROL or name in said


def test_each_loader_refuses_the_folder_of_the_other(tmp_path):
    saved(tmp_path / "gpt")
    saved_unet(tmp_path / "unet")
    assert NOT_UNET in refusal(UNet.from_pretrained, tmp_path / "gpt")
    assert 'model_type "unet" is not of the Llama family' in refusal(
        GPT.from_pretrained, tmp_path / "unet"
    )


# ---------------------------------------------------------------- tokenizers

WORDS = [" good", " very good", " the", "\n", "-", "é", " film", "film", "1", "+", "(a|b)"]


def random_texts(n):
    rng = random.Random(0)
    pieces = [
        *WORDS,
        "a",
        "0",
        "  ",
        "\t",
        "日本",
        "🙂",
        "e\u0301",
        "<|end|>",
        "<|pad|>",
        "[",
        "\\",
    ]
    return ["".join(rng.choice(pieces) for _ in range(rng.randrange(30))) for _ in range(n)]


def test_a_toy_tokenizer_reads_alike_through_tokenizer_json(tmp_path):
    toy = Tokenizer.toy(WORDS, name="films")
    save_tokenizer(toy, tmp_path)
    back = load_tokenizer(tmp_path)
    assert (back.name, back.eot, back.pad, back.vocab_size) == (
        "films",
        toy.eot,
        toy.pad,
        toy.vocab_size,
    )
    for text in random_texts(500):
        ids = toy.encode(text)
        assert back.encode(text) == ids
        assert back.decode(ids) == toy.decode(ids) == text
    assert toy.eot not in back.encode("<|end|>")  # a text cannot end a response
    assert back.decode([97, back.eot, back.pad, 98]) == "ab"
    (tmp_path / "tokenizer.json").unlink()  # a loaded model does not depend on its folder
    save_tokenizer(back, tmp_path / "again")
    again = load_tokenizer(tmp_path / "again")
    assert again.encode(" very good film") == toy.encode(" very good film")


def test_a_tokenizer_that_merges_reads_alike_through_tokenizer_json(tmp_path):
    import tiktoken

    # as in GPT-2, pieces that are not tokens are merged, the lowest rank first
    tokens = b"aa,ab, a,ba,aaa,aab, ab,abab, aaa,bb,bbb".split(b",")
    ranks = {bytes([i]): i for i in range(256)} | {w: 256 + i for i, w in enumerate(tokens)}
    pattern = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    engine = tiktoken.Encoding(
        "ab", pat_str=pattern, mergeable_ranks=ranks, special_tokens={"<|endoftext|>": len(ranks)}
    )
    ours = Tokenizer.from_tiktoken(engine)
    assert ours.eot == len(ranks) and ours.pad == len(ranks) + 1
    assert ours.vocab_size == len(ranks) + 2
    save_tokenizer(ours, tmp_path)
    back, rng = load_tokenizer(tmp_path), random.Random(0)
    assert (back.eot, back.pad, back.vocab_size) == (ours.eot, ours.pad, ours.vocab_size)
    for _ in range(500):
        text = "".join(rng.choice("aaabbb  1'\n") for _ in range(rng.randrange(30)))
        assert back.encode(text) == ours.encode(text) and back.decode(ours.encode(text)) == text


@pytest.mark.parametrize("name", [CONTROL * 50, 5, [], None, ""])
def test_the_name_of_a_tokenizer_fits_the_header_of_a_run(tmp_path, name):
    save_tokenizer(TOY, tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    settings["nanopref_tokenizer"] = name
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(settings))
    read = load_tokenizer(tmp_path).name
    assert read.isprintable() and 0 < len(read) < 200
    assert (read == "tokenizer.json") == (not isinstance(name, str) or not name)


def test_a_text_that_a_tokenizer_cannot_encode_is_one_line(tmp_path):
    words = dict(type="WordLevel", vocab=dict(a=0, b=1), unk_token="none")
    (tmp_path / "tokenizer.json").write_text(json.dumps(dict(version="1.0", model=words)))
    (tmp_path / "config.json").write_text('{"eos_token_id": 1}')
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer.encode("a") == [0]
    with pytest.raises(UserError, match="cannot encode a text"):
        tokenizer.encode("c")
    with pytest.raises(UserError, match="cannot encode a text"):
        tokenizer.encode("\ud800")


# ---------------------------------------------------------------- chat templates

USER, GOOD = dict(role="user", content="hi"), dict(role="assistant", content="hello")


def template(text, folder="somewhere", **names):
    return ChatTemplate(str(folder), text, names)


def test_where_a_template_is_found_and_what_it_is_given(tmp_path):
    def settings(**values):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(values))

    assert chat_template(tmp_path) is None
    settings(chat_template=None)
    assert chat_template(tmp_path) is None
    settings(chat_template=[dict(name="tools", template="no"), dict(name=[]), 5])
    assert chat_template(tmp_path) is None
    named = [
        dict(name="tools", template="no"),
        dict(name="default", template="{{ bos_token }}{{ messages | tojson }}"),
    ]
    settings(chat_template=named, bos_token={"content": "<s>"}, pad_token=None)
    message = dict(role="user", content="<\u00e9\n>")
    found = chat_template(tmp_path)([message], False)
    assert found == '<s>[{"role": "user", "content": "<\u00e9\\n>"}]'
    (tmp_path / "chat_template.jinja").write_text("file wins")
    assert chat_template(tmp_path)([], True) == "file wins"


@pytest.mark.parametrize("wrong", [5, {}, True, [dict(name="default")]])
def test_a_template_that_is_not_text_is_refused(tmp_path, wrong):
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(dict(chat_template=wrong)))
    with pytest.raises(UserError, match="its chat template is not text"):
        chat_template(tmp_path)


def test_one_process_renders_all_rows_and_none_is_started_before_the_first():
    chat = template("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    assert chat.process is None
    for i in range(300):
        assert chat([USER | dict(content=f"é {i}\n\u2028")], True) == f"user: é {i}\n\u2028\n"
    first = chat.process
    assert first.poll() is None
    chat([USER], False)
    assert chat.process is first
    del chat
    assert first.returncode is not None  # it ends with its last user


def test_a_template_is_stopped_at_any_time_and_starts_again():
    chat = template("good")
    chat.stop()
    assert chat([], True) == "good"
    process = chat.process
    chat.stop()
    chat.stop()
    assert process.returncode is not None and chat.process is None
    assert chat([], True) == "good" and chat.process is not process


def test_a_template_sees_what_transformers_gives_to_it():
    text = "{{ add_generation_prompt }}{{ tools is none }}{{ documents is none }}{{ x is defined }}"
    assert template(text)([], True) == "TrueTrueTrueFalse"
    loop = "{% for i in range(9) %}{% if i == 2 %}{% break %}{% endif %}{{ i }}{% endfor %}"
    assert template(loop)([], True) == "01"
    assert template("  {% if true %}\n  a\n  {% endif %}")([], True) == "  a\n"


def test_templates_agree_with_transformers(tmp_path):
    transformers = pytest.importorskip("transformers")
    save_tokenizer(TOY, str(tmp_path))
    text = (
        "{{ bos_token }}{% for m in messages %}<{{ m['role'] }}>{{ m['content'] | trim }}\n"
        "{% endfor %}{% if tools is not none %}tools{% endif %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    (tmp_path / "chat_template.jinja").write_text(text)
    theirs = transformers.AutoTokenizer.from_pretrained(tmp_path)
    for messages, more in (([USER], True), ([USER, GOOD], False)):
        expected = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=more)
        assert chat_template(tmp_path)(messages, more) == expected


HOSTILE = {
    "{% for %}": "fails",
    "{{ undefined_name.field }}": "fails: 'undefined_name' is undefined",
    "{{ messages[9].content }}": "fails",
    "{{ 1 / 0 }}": "fails: division by zero",
    "{{ messages[0].content + 1 }}": "fails",
    "{{ raise_exception('roles must alternate\\nalways') }}": "fails: roles must alternate",
    "{{ raise_exception('\\x1b[31m') }}": r"fails: \x1b[31m",
    "{{ raise_exception('x' * 5000) }}": "fails: xxx",
    "{{ raise_exception('') }}": "fails: TemplateError",
    "{% include 'other' %}": "fails",
    "{% import 'os' as os %}": "fails",
    "{% extends 'other' %}": "fails",
    "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}": "fails: maximum recursion depth exceeded",
    "{{ ''.__class__.__mro__[1].__subclasses__() }}": "fails: access to attribute '__class__'",
    "{{ messages.append(1) }}": "fails",
    "{{ cycler.__init__.__globals__.os.system('id') }}": "fails",
    "{{ 'x' * 1000001 }}": "writes more than 1000000 characters",
    "{{ 'x' * 10**10 }}": "needs more than 200 MB",
    "{% set x = [1] %}{% for i in range(9) %}{% set y = x * 99999999 %}{% endfor %}": "needs more",
    "{{ range(10**9) | list }}": "fails: Range too big",
    "{{ '%999999999d' % 1 }}": "needs more than 200 MB",
    "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}": "fails",
    "{{ '\\ud800' }}": "writes half a character",
}
ENDLESS = [
    "{{ 9 ** (9 ** 9) }}",  # as a constant, while the template is compiled
    "{{ 9 ** (9 ** (messages | length * 9)) }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{% set n = namespace(x=2) %}{% for i in range(99) %}{% set n.x = n.x * n.x %}{% endfor %}",
]


@pytest.mark.slow
@pytest.mark.parametrize("text", HOSTILE)
def test_a_template_that_breaks_out_or_down_is_one_line(impatient, text):
    with pytest.raises(UserError) as caught:
        template(text)([USER], True)
    message = str(caught.value)
    assert f"somewhere: its chat template {HOSTILE[text]}" in message
    assert message.isprintable() and len(message) < 400


@pytest.mark.slow
@pytest.mark.parametrize("text", ENDLESS)
def test_a_template_without_end_is_one_line(impatient, text):
    with pytest.raises(UserError, match="chat template takes longer than"):
        template(text)([USER], True)


def test_without_limits_of_the_system_the_waiting_side_ends_the_process(tmp_path, monkeypatch):
    """As on Windows, where there is neither `resource` nor an interval timer."""
    text = open(render.__file__, encoding="utf-8").read()
    text = text.replace("import resource", "raise ImportError").replace(
        'hasattr(signal, "setitimer")', "False"
    )
    (tmp_path / "render.py").write_text(text)
    monkeypatch.setattr(render, "__file__", str(tmp_path / "render.py"))
    chat = template("{% if messages %}{{ 9 ** (messages[0].n ** 9) }}{% else %}good{% endif %}")
    assert chat([], True) == "good"
    chat.patience = 0.3
    process = chat.process
    with pytest.raises(UserError, match="its chat template takes longer than 0.3 seconds"):
        chat([dict(n=9)], True)
    assert process.returncode is not None
    chat.patience = 20.0
    assert chat([], True) == "good"  # in a process of its own again


def test_a_process_that_ends_by_itself_is_one_line(tmp_path, monkeypatch):
    (tmp_path / "render.py").write_text("raise SystemExit(3)")
    monkeypatch.setattr(render, "__file__", str(tmp_path / "render.py"))
    with pytest.raises(UserError, match="its chat template ends its process"):
        template("good")([], True)


@pytest.mark.slow
def test_a_prompt_on_the_command_line_goes_through_the_template(tmp_path, impatient, capsys):
    folder = tmp_path / "model"
    saved(folder)
    ask = ["--init", str(folder), "--prompt", "the film", "--max_response", "2"]
    (folder / "chat_template.jinja").write_text("{{ messages[0].content }} good")
    assert train.main(ask) == 0
    for text in ("{{ messages[0].x.y }}", ENDLESS[2], "{{ '\\x1b[31m' + 1 }}", "{% for %}"):
        (folder / "chat_template.jinja").write_text(text)
        capsys.readouterr()
        assert train.main(ask) == 2
        error = capsys.readouterr().err
        assert "its chat template" in error and error.rstrip("\n").isprintable()


def test_an_interrupted_answer_is_not_taken_for_the_next_one(monkeypatch):
    chat = template("{{ messages[0].content }}")
    assert chat([USER], True) == "hi"

    def interrupted(timeout):
        raise KeyboardInterrupt

    monkeypatch.setattr(chat.replies, "get", interrupted)
    with pytest.raises(KeyboardInterrupt):
        chat([dict(content="late")], True)
    assert chat([USER], True) == "hi"
