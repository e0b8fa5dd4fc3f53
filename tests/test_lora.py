"""LoRA: exact at the start, merged exactly, trained alone, and resumed bit for bit."""

import time

import pytest
import torch

import methods.dpo
import train
from data import UserError, collate
from lab import Lab, Settings, loop, store
from nanomodel import GPT, LoRA
from tests.lab.commands import FILE, PAIRS, Killed, killed_at, rows_file, small, weights
from tests.test_gpt import IDS, make

ROWS = [
    dict(prompt="2 3 4", responses=["5 6", "7 8 9"], scores=[1.0, 0.0]),
    dict(prompt="9", responses=["3", "4 4 4 4"], scores=[1.0, 0.0]),
]
BATCH = collate(ROWS, IDS)
ADAPTED = 2 * 7  # seven Linears in each of two layers


def adapted(rank=3, **how):
    """A model with adapters whose B is not 0."""
    model = LoRA.adapt(make(**how), rank, torch.Generator().manual_seed(1))
    with torch.no_grad():
        for adapter in LoRA.of(model).values():
            adapter.B.normal_(0, 0.3)
    return model


def test_a_model_with_new_adapters_is_exactly_the_model_without():
    plain, model = make(), LoRA.adapt(make(), 3, torch.Generator().manual_seed(1))
    assert len(LoRA.of(model)) == ADAPTED
    assert torch.equal(model.logps(BATCH), plain.logps(BATCH))
    rng = [torch.Generator().manual_seed(5) for _ in range(2)]
    assert model.sample([[2, 3]], 4, rng[0], 9) == plain.sample([[2, 3]], 4, rng[1], 9)


def test_the_update_is_twice_the_product_of_two_small_matrices():
    linear = torch.nn.Linear(5, 4, bias=False).double()
    layer = LoRA(linear, 2, torch.Generator().manual_seed(0))
    assert layer.A.shape == (2, 5) and layer.B.shape == (4, 2) and not layer.B.any()
    torch.nn.init.normal_(layer.B)
    x = torch.randn(3, 5, dtype=torch.float64)
    torch.testing.assert_close(layer(x), x @ (linear.weight + 2 * layer.B @ layer.A).T)
    torch.testing.assert_close(layer.delta(), 2 * layer.B @ layer.A)
    wide = LoRA(torch.nn.Linear(400, 400, bias=False), 100, torch.Generator().manual_seed(0))
    assert wide.A.std().item() == pytest.approx(400**-0.5, rel=0.02)


def test_merged_weights_are_the_same_function_without_adapters():
    model = adapted()
    before = {name: p.clone() for name, p in model.named_parameters()}
    merged = LoRA.merged(model)
    assert not LoRA.of(merged) and len(LoRA.of(model)) == ADAPTED
    torch.testing.assert_close(merged.logps(BATCH), model.logps(BATCH), rtol=1e-10, atol=1e-12)
    assert not torch.allclose(merged.logps(BATCH), make().logps(BATCH))
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    assert merged.embed_tokens.weight is model.embed_tokens.weight  # shared, not copied
    assert set(dict(merged.named_parameters())) == set(dict(make().named_parameters()))


def test_a_copy_shares_what_is_frozen_and_nothing_else():
    model = adapted()
    twin, frozen = LoRA.copied(model), LoRA.frozen(model)
    assert len(frozen) == ADAPTED + 2 * 2 + 2  # also norms of the layers, last norm, embeddings
    for name, p in twin.named_parameters():
        assert (p is model.get_parameter(name)) == (name in frozen)
    plain = make()
    assert LoRA.frozen(plain) == {}
    assert all(p is not plain.get_parameter(n) for n, p in LoRA.copied(plain).named_parameters())


def test_only_the_adapters_have_gradients():
    model = adapted()
    model.logps(BATCH).sum().backward()
    for name, p in model.named_parameters():
        assert (p.grad is not None) == name.endswith((".A", ".B")), name


@pytest.mark.parametrize("rank, most", [(0, 16), (9, 8)])
def test_a_rank_that_does_not_fit_is_refused(rank, most):
    with pytest.raises(UserError, match=f"rank {rank} of LoRA: expected 1 to {most}"):
        LoRA.adapt(make(), rank)


# ---- --lora


def made_folder(path):
    path.mkdir()
    return str(path)


def test_the_optimizer_holds_the_adapters_alone_and_the_rest_never_changes():
    lab = Lab(Settings(lora=2, base_steps=0, steps=3, prompts=8, eval_size=4), quiet=True)
    policy, held = lab.base(), []

    def optimizer(params):
        held.extend(params)
        return torch.optim.SGD(params, lr=0.1)

    before = {name: p.clone() for name, p in policy.named_parameters()}
    rows = lab.preferences(policy, k=2)
    loss, cfg = methods.dpo.loss, methods.dpo.Config()
    lab.align(policy, rows, loss, cfg, optimizer=optimizer, watch=lambda policy, step: {})
    adapters = {id(p) for a in LoRA.of(policy).values() for p in (a.A, a.B)}
    assert {id(p) for p in held} == adapters
    changed = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert changed == {n for n in before if n.endswith((".A", ".B"))}
    assert torch.equal(lab.reference.embed_tokens.weight, policy.embed_tokens.weight)


def test_two_models_that_share_frozen_weights_are_kept_without_them():
    first = adapted()
    both = torch.nn.ModuleList([first, LoRA.copied(first)])
    assert all(name.endswith((".A", ".B")) for name in loop.weights(both))
    assert len(loop.weights(both)) == 2 * 2 * ADAPTED


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_checkpoint_is_shared_with_the_reference_and_saved_as_a_plain_one(tmp_path):
    Lab(Settings(base_steps=0), quiet=True).base().save_pretrained(made_folder(tmp_path / "base"))
    lab = Lab(Settings(init="base", lora=2), quiet=True)
    policy = lab.base()
    frozen = LoRA.frozen(policy)
    ours = {id(p) for p in lab.reference.parameters()}
    assert frozen and ours == {id(p) for p in frozen.values()}
    argv = "--method dpo --eval_size 4 --steps 2 --prompts 16 --batch_size 8 --lr 0.01".split()
    argv += ["--max_response", "8", "--init", "base", "--lora", "2", "--out", "run"]
    assert train.main(argv) == 0
    saved, start = (GPT.from_pretrained(str(tmp_path / name)) for name in ("run", "base"))
    same = {
        name for name, p in saved.named_parameters() if torch.equal(p, start.get_parameter(name))
    }
    assert same == {n for n, p in saved.named_parameters() if "proj" not in n}


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_a_killed_run_with_adapters_resumes_bit_for_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(Lab, "checkpoint_every", 0.0)
    monkeypatch.setattr(time, "time", lambda: 0.0)
    argv = "--method dpo --base_steps 2 --eval_size 4 --steps 6 --prompts 24".split()
    argv += ["--batch_size", "8", "--lora", "2", "--max_response", "8"]
    assert train.main([*argv, "--out", "whole"]) == 0
    loss = killed_at(monkeypatch, 5)
    with pytest.raises(Killed):
        train.main([*argv, "--out", "cut"])
    (checkpoint,) = (tmp_path / "cut" / "stages").glob("*-checkpoint-*.json")
    names = set(store.load_value(str(checkpoint.with_suffix("")))["model"])
    assert len(names) == 2 * ADAPTED and all(name.endswith((".A", ".B")) for name in names)
    monkeypatch.setattr(methods.dpo, "loss", loss)
    assert train.main(["--resume", "cut"]) == 0
    assert weights(tmp_path / "whole") == weights(tmp_path / "cut")


@pytest.mark.slow
@pytest.mark.usefixtures("own_folder")
def test_adapters_are_trained_on_a_file_and_refused_without_text(tmp_path, monkeypatch, capsys):
    small(monkeypatch)
    argv = ["--method", "dpo", "--data", rows_file(tmp_path / "pairs.jsonl", PAIRS), *FILE]
    assert train.main([*argv, "--lora", "2", "--out", "run"]) == 0
    assert "of which LoRA of rank 2 trains" in capsys.readouterr().out
    assert train.main(["--method", "dpo", "--world", "bandit", "--lora", "2"]) == 2
    assert "--lora would do nothing in bandit" in capsys.readouterr().err
    assert train.main(["--method", "dpo", "--lora", "500"]) == 2
    assert "rank 500 of LoRA" in capsys.readouterr().err
