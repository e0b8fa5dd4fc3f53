"""bench.py compares equals: losses, gradients, samples and counts are checked on plain code."""

import copy
import importlib.util
import json

import pytest
import torch

import bench
from data import collate
from methods import dpo
from nanomodel import visible

TINY = dict(
    layers=2,
    dim=16,
    heads=4,
    kv_heads=2,
    vocab=12,
    prompt=3,
    response=5,
    batch_size=2,
    steps=2,
    device="cpu",
)
FLAGS = [f"--{name}={value}" for name, value in TINY.items()]


def made(**changes):
    """A tiny Bench with a policy and a reference."""
    it = bench.Bench(bench.Settings(**(TINY | changes)))
    return it, it.gpt(), it.gpt()


# ---- the contenders


@pytest.mark.parametrize("k", [2, 3])
def test_packed_trees_and_padded_rows_have_the_same_losses_and_gradients(k):
    it, model, reference = made(k=k)
    ours, rows = (
        make(it, copy.deepcopy(model), reference) for make in (bench.ours, bench.plain_rows)
    )
    torch.testing.assert_close(ours.score(1), rows.score(1))
    for p, q in zip(ours.model.parameters(), rows.model.parameters()):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-7)
    losses = bench.first_losses([ours, rows])
    assert len(losses) == 2 and losses[0][0] != losses[0][1]


def test_padded_rows_of_different_lengths_are_scored_like_packed_trees():
    it, model, _ = made()
    rows = [
        {"prompt": [1, 2, 3], "responses": [[4], [5, 6, 7]], "scores": [1, 0]},
        {"prompt": [1], "responses": [[], [2, 2]], "scores": [1, 0]},
    ]
    packed = model.logps(collate(rows, it.tokenizer)).sum(-1)
    torch.testing.assert_close(bench.rows_logps(it, model, rows), packed)


def test_losses_that_differ_are_not_timed():
    it, model, reference = made()
    with pytest.raises(RuntimeError, match="first losses differ: nanopref .*, rows "):
        bench.first_losses(
            [bench.ours(it, model, reference), bench.plain_rows(it, it.gpt(), reference)]
        )


def test_the_listwise_loss_of_two_responses_is_dpo():
    logps, ref_logps = torch.randn(2, 3, 2, 5, dtype=torch.float64)
    batch = type("Batch", (), {"mask": torch.ones(3, 2, 5, dtype=torch.bool)})
    ours, theirs = (
        loss(logps, ref_logps, batch, dpo.Config(beta=0.3))[0]
        for loss in (bench.listwise, dpo.loss)
    )
    torch.testing.assert_close(ours, theirs)


# ---- sampling


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_the_samplers_draw_the_same_tokens(kv_heads):
    it, model, _ = made(kv_heads=kv_heads)
    model.tokenizer = type("Endless", (), {"eot": -1})
    prompts = [row["prompt"] for row in it.rows[:2]]
    cached = model.sample(prompts, 3, torch.Generator().manual_seed(5), 5)
    uncached = bench.sample_uncached(model, prompts, 3, torch.Generator().manual_seed(5), 5)
    assert sum(cached, []) == uncached.tolist()


def test_a_wrong_cache_is_noticed(monkeypatch):
    it, model, _ = made()
    bench.sampling(it, model)
    decode = type(model).decode
    monkeypatch.setattr(
        type(model), "decode", lambda self, cache, tokens: -decode(self, cache, tokens)
    )
    with pytest.raises(RuntimeError, match="cached sampling took a token"):
        bench.sampling(it, model)


# ---- what is counted


@pytest.mark.parametrize("lengths", ["equal", "mixed"])
@pytest.mark.parametrize("response", [1, 5])
def test_flops_are_counted_over_the_tokens_and_pairs_of_a_batch(response, lengths):
    it, model, _ = made(k=3, response=response, lengths=lengths, sampling="off")
    s, batch = it.settings, collate(it.pick(it.rows, 0), it.tokenizer)
    real = batch.branch < batch.sees.shape[1] - 1
    pairs = int((visible(batch.branch, batch.sees) & real[:, :, None]).sum())
    matrices = sum(p.numel() for name, p in model.named_parameters() if "proj" in name)
    expected = (
        6 * (matrices * int(real.sum()) + 12 * 16 * int(batch.mask.sum()))
        + 12 * s.layers * s.dim * pairs
    )
    assert bench.flops(s, model, it.pick(it.rows, 0)) == expected
    rows = it.pick(it.rows, 0)
    prompts = sum(len(row["prompt"]) for row in rows)
    assert bench.token_count(rows) == prompts + int(batch.mask.sum())
    assert (prompts < 6) == (lengths == "mixed")


def test_memory_holds_weights_moments_gradients_and_activations():
    shape = dict(prompt=24, response=12, k=4, vocab=64)
    it, model, reference = made(**shape)
    contenders = [
        make(it, copy.deepcopy(model), reference) for make in (bench.ours, bench.plain_rows)
    ]
    for contender in contenders:
        contender.step(0)
    ours, rows = (bench.memory(it, contender) for contender in contenders)
    weights = 4 * sum(p.numel() for p in model.parameters())
    assert 4 * weights < ours < rows


# ---- the command line


def test_without_sampling_only_steps_are_timed_and_captured_ones_train_as_plain_ones(capsys):
    assert bench.cli([*FLAGS, "--sampling=off", "--capture=on", "--json"]) == 0
    printed = capsys.readouterr().out
    out = json.loads(printed.splitlines()[-1])
    assert "sample_s" not in out and out["capture"] == "on" and "uncached" not in printed
    weights = []
    for capture in ("on", "off"):
        it, model, reference = made(capture=capture)
        contender = bench.ours(it, model, reference)
        it.exact, it.fast = False, True
        losses = [float(contender.step(i)) for i in range(6)]
        weights.append([torch.tensor(losses), *model.parameters()])
    for ours, plain in zip(*weights):
        torch.testing.assert_close(ours, plain, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    "changes",
    [
        ["--json"],
        ["--against=none", "--json", "--dtype", "bfloat16"],
        ["--k=3", "--kv_heads=4", "--json=true"],
    ],
)
def test_the_last_line_is_json_with_the_numbers(capsys, changes):
    given = [flag for flag in FLAGS if flag.split("=")[0] not in "".join(changes)]
    assert bench.cli([*given, *changes]) == 0
    printed = capsys.readouterr().out.strip().splitlines()
    out = json.loads(printed[-1])
    assert {"step_s", "tokens_s", "peak_mb", "sample_s", "sample_uncached_s"} <= {
        name for name, value in out.items() if isinstance(value, float)
    }
    assert out["mfu"] is None and out["layers"] == 2 and out["params"] > 0
    assert out["tokens_s"] == pytest.approx(2 * (3 + out["k"] * 5) / out["step_s"])
    assert out["sample_speedup"] == pytest.approx(out["sample_uncached_s"] / out["sample_s"])
    assert ("speedup" in out) == (out["against"] == "rows")
    if "speedup" in out:
        assert out["speedup"] == pytest.approx(out["against_step_s"] / out["step_s"])
    for word in ("step_s", "tokens_s", "peak memory", "MFU", "nanopref", "cached", "uncached"):
        assert word in "\n".join(printed[:-1])


def test_trl_has_the_same_losses_or_one_line_says_that_it_is_missing(capsys):
    installed = all(importlib.util.find_spec(name) for name in ("trl", "transformers"))
    assert bench.cli([*FLAGS, "--against", "trl", "--json"]) == (0 if installed else 2)
    printed = capsys.readouterr()
    if installed:
        assert json.loads(printed.out.splitlines()[-1])["against_step_s"] > 0
    else:
        assert (
            printed.err.startswith("bench.py: --against trl needs the package ")
            and printed.err.count("\n") == 1
        )


@pytest.mark.parametrize(
    "argv, message",
    [
        (["--layer", "2"], "unknown flag '--layer'; did you mean --layers?"),
        (["--layers", "2.5"], "--layers 2.5: not a whole number"),
        (["--layers", "0"], "--layers 0 must be at least 1"),
        (["--steps", "0"], "--steps 0 must be at least 1"),
        (["--k", "1"], "--k 1 must be at least 2"),
        (["--vocab", "3"], "--vocab 3 must be at least 4"),
        (["--steps", "2", "--steps", "2"], "--steps is given twice"),
        (["--steps"], "--steps needs a value"),
        (["--steps", "--json"], "--steps needs a value"),
        (["--json=maybe"], "--json maybe: not true or false"),
        (["dpo"], "unexpected 'dpo': flags begin with --"),
        (["--dim", "64", "--heads", "3"], "--dim 64 must be a multiple of twice --heads 3"),
        (["--heads", "4", "--kv_heads", "3"], "--kv_heads 3 must divide --heads 4"),
        (["--against", "dpo"], "--against dpo must be one of rows, trl, trl_compiled, none"),
        (["--against", "trl", "--k", "8"], "--against trl compares pairs, not --k 8"),
        (["--dtype", "float16"], "--dtype float16 must be one of auto, float32, bfloat16"),
        (["--compile", "yes"], "--compile yes must be one of on, off"),
        (["--sampling", "no"], "--sampling no must be one of on, off"),
        (["--device", "tpu"], "--device tpu is not available"),
    ],
)
def test_a_mistake_is_one_line_and_exit_2(capsys, argv, message):
    assert bench.cli(argv) == 2
    printed = capsys.readouterr()
    assert (
        printed.err.startswith("bench.py: " + message)
        and printed.err.count("\n") == 1
        and not printed.out
    )


def test_help_explains_every_flag(capsys):
    assert bench.cli(["--help"]) == 0
    printed = capsys.readouterr().out
    for name, flag in bench.own_flags().items():
        assert f"--{name} " in printed and flag.text and flag.text in printed


def test_the_default_shape_has_about_three_and_a_half_million_parameters():
    model = bench.Bench(bench.Settings(device="cpu")).gpt()
    assert sum(p.numel() for p in model.parameters()) == pytest.approx(3.5e6, rel=0.05)
