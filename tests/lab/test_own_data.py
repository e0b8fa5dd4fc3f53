"""Own preferences, and checkpoints of others: what keeps a small file or a large model usable."""

import json
import os

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save

import methods.dpo
import train
from data import Tokenizer
from lab import Lab, Settings, loop, store
from lab.hub import load_pretrained
from nanomodel import GPT, GPTConfig
from tests.lab.commands import FILE, PAIRS, Killed, killed_at, rows_file, small
from toy.files import read_preferences

pytestmark = pytest.mark.usefixtures("own_folder")

# ---------------------------------------------------------------- a policy that unlearns


def line(step, chosen, loss):
    return {"step": step, "chosen_logp": chosen, "loss": loss}


@pytest.mark.parametrize(
    ("chosen", "loss", "fallen", "happened"),
    [
        (-118.0, 0.001, True, True),  # what 200 pairs did in 100 steps
        (-118.0, 0.2, True, False),  # much is left to learn
        (-38.0, 0.001, False, False),  # 22 nats of 16: less than 20 + 4
        (-41.0, 0.001, True, True),
        (-16.0, 0.001, False, False),
    ],
)
def test_a_fall_is_one_by_tens_of_nats_with_a_loss_near_0(chosen, loss, fallen, happened):
    fall = loop.Fall()
    for step in range(10):
        fall.add(line(step, -16.0, 0.69))
        assert not fall.fallen() and not fall.happened()
    for step in range(10, 40):
        fall.add(line(step, chosen, loss))
    assert (fall.fallen(), fall.happened()) == (fallen, happened)
    assert len(fall.seen) == 20


def test_long_responses_may_fall_further():
    fall = loop.Fall()
    for step in range(30):
        fall.add(line(step, -400.0 - 60.0 * (step > 9), 0.69 - 0.68 * (step > 9)))
    assert not fall.happened()  # 60 nats of 400 are fewer than 20 + 100


HOT = ["--steps", "200", "--lr", "0.01", "--batch_size", "8", "--base_steps", "20"]


@pytest.fixture
def falling(monkeypatch, tmp_path):
    """A run that unlearns its pairs: the loss pushes every log-prob down, and is soon 0."""
    small(monkeypatch)

    def loss(logps, ref_logps, batch, cfg):
        total = logps.sum((1, 2))
        return (0.02 * (total + 400)).relu().square(), {}

    monkeypatch.setattr(methods.dpo, "loss", loss)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    return ["--method", "dpo", "--data", path, *FILE[4:], *HOT[:2], "--lr", "0.003"]


@pytest.mark.slow
def test_a_run_that_unlearns_its_pairs_stops_and_keeps_good_weights(tmp_path, capsys, falling):
    assert train.main([*falling, "--base_steps", "20", "--out", "run"]) == 3
    error = capsys.readouterr().err
    (said,) = [text for text in error.splitlines() if "unlearns" in text]
    assert said.startswith("dpo: stopped in step ") and "the weights of step " in said
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    steps = [json.loads(text) for text in (tmp_path / "run" / "metrics.jsonl").open()]
    steps = [text for text in steps if "loss" in text]
    assert summary["stopped"] in said and len(steps) < 200
    good = int(said.partition("the weights of step ")[2].split()[0])
    assert 0 < good < len(steps)
    lowest = min(text["chosen_logp"] for text in steps)
    assert summary["after"]["chosen_logp"] > 0.6 * lowest
    assert not os.path.exists("run/stages") and os.path.exists("run/model.safetensors")


@pytest.mark.slow
def test_it_stops_at_the_same_step_after_a_kill(tmp_path, capsys, falling, monkeypatch):
    argv = [*falling, "--base_steps", "20", "--out"]
    assert train.main([*argv, "whole"]) == 3
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    loss = killed_at(monkeypatch, 16)
    with pytest.raises(Killed):
        train.main([*argv, "cut"])
    monkeypatch.setattr(methods.dpo, "loss", loss)
    assert train.main(["--resume", "cut"]) == 3
    one, two = (
        json.loads((tmp_path / name / "summary.json").read_text())["stopped"]
        for name in ("whole", "cut")
    )
    assert one == two and "nats" in one


# ---------------------------------------------------------------- checkpoints of others


def checkpoint(folder, dtype=torch.bfloat16, **ids):
    """A folder as another project writes it: bfloat16, with special ids of its own."""
    torch.manual_seed(0)
    tokenizer = Tokenizer.toy([" good", " bad"])
    sizes = dict(vocab_size=tokenizer.vocab_size, hidden_size=16, intermediate_size=24)
    sizes |= dict(num_attention_heads=4, num_key_value_heads=2, num_hidden_layers=2)
    model = GPT(GPTConfig(**sizes, max_position_embeddings=128), tokenizer)
    model.stored_as, model.special_ids = dtype, ids
    model.save_pretrained(folder)
    return model


def test_the_dtype_and_the_special_ids_of_a_checkpoint_are_kept(tmp_path):
    ids = dict(bos_token_id=1, eos_token_id=[2, 7], pad_token_id=2)
    checkpoint(tmp_path / "theirs", **ids)
    (tmp_path / "theirs" / "generation_config.json").write_text('{"eos_token_id": 2}')
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    argv = ["--method", "dpo", "--init", "theirs", "--data", path, *FILE[2:], "--out", "run"]
    assert train.main(argv) == 0
    config = json.loads((tmp_path / "run" / "config.json").read_text())
    assert {name: config[name] for name in ids} == ids and config["torch_dtype"] == "bfloat16"
    weights = load_file(tmp_path / "run" / "model.safetensors")
    assert {x.dtype for x in weights.values()} == {torch.bfloat16}
    assert (tmp_path / "run" / "generation_config.json").exists()
    model = load_pretrained(tmp_path / "run")
    assert {x.dtype for x in model.parameters()} == {torch.float32}
    checkpoint(tmp_path / "wide", torch.float32)
    assert load_pretrained(tmp_path / "wide").stored_as == torch.float32


def test_tensors_are_written_one_by_one_as_safetensors_would(tmp_path):
    tensors = {
        "a": torch.randn(3, 4).bfloat16(),
        "wide": torch.randn(5, dtype=torch.float64),
        "b": torch.arange(6).view(2, 3).T,
        "none": torch.zeros(0, 3),
        "number": torch.tensor(2.5),
        "bits": torch.tensor([True, False, True]),
        "tied": torch.ones(2, 2),
    }
    path = tmp_path / "x.safetensors"
    store.save_tensors(path, tensors)
    whole = {name: x.contiguous() for name, x in tensors.items()}
    assert path.read_bytes() == save(whole, {"format": "pt"})
    with safe_open(path, framework="pt") as file:
        for name, x in tensors.items():
            assert torch.equal(file.get_tensor(name), x)
    store.save_tensors(path, {"a": tensors["wide"]}, dtype=torch.float16)
    assert torch.equal(load_file(path)["a"], tensors["wide"].half())


def test_one_frozen_copy_serves_as_base_model_and_as_reference(tmp_path):
    checkpoint(tmp_path / "theirs")
    lab = Lab(Settings(init=str(tmp_path / "theirs")), quiet=True)
    policy = lab.base()
    assert lab.reference is lab.start and lab.as_reference(policy) is lab.start
    assert not any(p.requires_grad for p in lab.start.parameters())
    assert all(p.requires_grad for p in policy.parameters())
    assert lab.child("x", None, {}).start is lab.start
    policy.fingerprint = None  # as soon as it is trained
    assert lab.as_reference(policy) is not lab.start


def test_show_scores_nothing_and_trains_no_base_model(tmp_path, capsys, monkeypatch):
    small(monkeypatch)
    monkeypatch.setattr(Lab, "score_rows", None)  # it would be a traceback
    monkeypatch.setattr(Lab, "pretrain", None)
    path = rows_file(tmp_path / "pairs.jsonl", PAIRS)
    assert train.main(["--method", "dpo", "--data", path, "--show"]) == 0
    assert "one row of the first batch" in capsys.readouterr().out


def test_a_phase_of_many_seconds_has_a_bar_with_the_time_left(capsys, monkeypatch):
    from lab import report

    clock = [0.0]
    monkeypatch.setattr(report.time, "time", lambda: clock[0])

    def run(seconds):
        bar = report.Progress("log-probs", 20, patience=5.0)
        for step in range(1, 21):
            clock[0] += seconds
            bar.show(step, {})
        bar.close()
        return capsys.readouterr().err

    assert run(0.2) == ""  # 4 seconds in all
    assert "log-probs    4/20    0:08 left" in run(0.5)


# ---------------------------------------------------------------- transcripts


def template(messages, add_generation_prompt):
    text = "".join(f"<{m['role']}>{m['content']}</>" for m in messages)
    return text + "<assistant>" * bool(add_generation_prompt)


TALK = "\n\nHuman: Hi\nyou\n\nAssistant: Yes?\n\nHuman: Tea\n\nAssistant:"


@pytest.mark.parametrize(
    "row",
    [
        {"chosen": TALK + " Hot.", "rejected": TALK + " Cold. "},
        {"prompt": TALK, "chosen": " Hot.", "rejected": " Cold."},
    ],
)
def test_a_transcript_goes_through_the_template_of_the_checkpoint(tmp_path, row):
    path = rows_file(tmp_path / "hh.jsonl", [row])
    ((read,), counts) = read_preferences(path, template)
    assert read["prompt"] == "<user>Hi\nyou</><assistant>Yes?</><user>Tea</><assistant>"
    assert read["responses"] == ["Hot.", "Cold."] and not counts
    ((plain,), _) = read_preferences(path)
    assert plain["prompt"] == TALK and plain["responses"][0] == " Hot."


def test_odd_transcripts_are_counted_and_other_text_stays_text(tmp_path):
    def refusing(messages, add_generation_prompt):
        if [m["role"] for m in messages[:2]] == ["user", "user"]:
            raise ValueError("roles must alternate")
        return template(messages, add_generation_prompt)

    good = {"chosen": TALK + " Hot.", "rejected": TALK + " Cold."}
    double = {
        name: "\n\nHuman: a\n\nHuman: b\n\nAssistant: " + name for name in ("chosen", "rejected")
    }
    ends = {"chosen": TALK + " Hot.\n\nHuman: no", "rejected": TALK + " Cold.\n\nHuman: no"}
    empty = {"chosen": TALK + " Hot.", "rejected": TALK + "  "}
    plain = {"prompt": "Human: is no mark here", "chosen": "x", "rejected": "y"}
    path = rows_file(tmp_path / "hh.jsonl", [good, double, ends, empty, plain])
    rows, counts = read_preferences(path, refusing)
    assert len(rows) == 2 and rows[1]["prompt"] == "Human: is no mark here"
    assert sum(counts.values()) == 3 and "a transcript that the chat template refuses" in counts
