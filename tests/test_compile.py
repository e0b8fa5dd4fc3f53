"""Compiled code meets few shapes, and gives the values and gradients of plain code."""

import pytest
import torch

from data import Sizes, collate, encode, sizes
from lab import Lab, Settings, store
from methods import dpo
from nanomodel import GPT, GPTConfig
from toy.reviews import World

WORLD = World()


def compiler():
    """(a torch.compile that takes one graph per shape, list of the graphs compiled so far)."""
    torch._dynamo.reset()
    graphs = []

    def backend(graph, inputs):
        graphs.append(graph)
        return graph.forward

    def compiled(function):
        return torch.compile(function, backend=backend, fullgraph=True, dynamic=False)

    return compiled, graphs


def pairs(n):
    """n pairs of the reviews world, of as many lengths as its demonstrations have."""
    rng = torch.Generator().manual_seed(0)
    shown = WORLD.demonstrations(2 * n, rng)
    for a, b in zip(shown[:n], shown[n:]):
        responses = [a["responses"][0], b["responses"][0]]
        yield encode(dict(prompt=a["prompt"], responses=responses), WORLD.tokenizer)


def losses(model, batch):
    """DPO's losses (B,) of a batch."""
    ref_logps = torch.zeros_like(batch.mask, dtype=torch.float32)
    return dpo.loss(model.logps(batch), ref_logps, batch, dpo.Config())[0]


def gradients(values, model):
    return torch.autograd.grad(values.mean(), list(model.parameters()))


@pytest.mark.parametrize("size", [8, 64])
def test_a_run_in_the_reviews_world_is_compiled_once(size):
    rows = list(pairs(250))
    fixed = sizes(rows, size, WORLD.tokenizer)
    shapes = set()
    for step in range(100):
        some = [rows[i % len(rows)] for i in range(step * size, (step + 1) * size)]
        batch = collate(some, WORLD.tokenizer, fixed=fixed)
        shapes.add((batch.tokens.shape, batch.sees.shape, batch.target.shape))
    assert len(shapes) <= 2  # later rounds through the rows cut them into other batches


@pytest.mark.slow
def test_compiled_losses_and_gradients_of_the_reviews_world_equal_plain_ones():
    torch.manual_seed(0)
    shape = dict(vocab_size=WORLD.tokenizer.vocab_size, hidden_size=16, num_hidden_layers=1)
    model, rows, size = GPT(GPTConfig(**shape)), list(pairs(200)), 2
    compiled, graphs = compiler()
    fast = compiled(losses)
    fixed = sizes(rows, size, WORLD.tokenizer)
    for step in range(100):
        some = rows[step * size : (step + 1) * size]
        with_grad = step % 20 == 0
        batch = collate(some, WORLD.tokenizer, fixed=fixed)
        ours = fast(model, batch)
        if with_grad:
            theirs = losses(model, collate(some, WORLD.tokenizer))
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)
            for a, b in zip(gradients(ours, model), gradients(theirs, model)):
                torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-6)
    assert len(graphs) == 1  # torch stops compiling after eight shapes


@pytest.mark.parametrize("chunk", [2**27, 10**4])
def test_trees_of_any_kind_and_length_share_one_shape(chunk):
    """Rows of 1 to 4 responses, up to the length at which plain code attends in blocks."""
    torch.manual_seed(0)
    config = GPTConfig(vocab_size=30, hidden_size=16, intermediate_size=24, num_hidden_layers=1)
    model = GPT(config).double()
    model.chunk = chunk  # logits in pieces
    rows = []
    for i in range(12):
        responses = [[3 + (i + k) % 20] * (1 + 7 * i % 90) for k in range(1 + i % 4)]
        parents = [-1, 0, -1, 1][: len(responses)] if i % 3 else [-1] * len(responses)
        rows.append(dict(prompt=[2] * (1 + 5 * i), responses=responses, parents=parents))
    tokenizer = type("Ids", (), dict(eot=1, pad=0))
    compiled, graphs = compiler()
    fast = compiled(lambda model, batch: model.logps(batch))
    fixed = sizes(rows, 3, tokenizer)
    for start in range(0, 12, 3):
        batch = collate(rows[start : start + 3], tokenizer, fixed=fixed)
        tight = collate(rows[start : start + 3], tokenizer)
        ours, theirs = fast(model, batch), model.logps(tight)
        k, t = theirs.shape[1:]
        torch.testing.assert_close(ours[:, :k, :t], theirs, rtol=0, atol=1e-12)
        assert not ours[:, k:].any() and not ours[:, :, t:].any() and batch.tokens.shape[1] > 192
        for a, b in zip(gradients(ours.sum(), model), gradients(theirs.sum(), model)):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    assert len(graphs) == 1


def test_sizes_are_least_ones_and_grow_with_the_rows():
    tokenizer = type("Ids", (), dict(eot=1, pad=0))
    short = [dict(prompt=[2, 3], responses=[[4]])]
    long = [dict(prompt=[2] * 30, responses=[[4] * 20, [5], [6]])]
    small, large = (sizes(rows, 1, tokenizer) for rows in (short, long))
    assert small == Sizes(rows=1, length=3, branches=3, responses=1, tokens=2)
    assert large == Sizes(rows=1, length=56, branches=5, responses=3, tokens=24)
    assert small.grown(large) == large.grown(small) == large
    assert Sizes(rows=9).grown(large).rows == 9
    wide = collate(short, tokenizer, fixed=large)
    assert wide.tokens.shape == (1, 56) and wide.sees.shape == (1, 5, 5)
    assert wide.mask.shape == wide.source.shape == (1, 3, 24) and wide.scores.shape == (1, 3)
    assert collate(long, tokenizer, fixed=small).tokens.shape == (1, 56)  # no row is cut


def run(tmp_path, compile, every=None, steps=12):
    """DPO in the reviews world on fixed rows, or on new ones every few steps -> (policy, curve)."""
    changes = dict(world="reviews", base_steps=4, prompts=40, batch_size=8, eval_size=8)
    lab = Lab(Settings(**changes, compile=compile, max_response=12), tmp_path, quiet=True)
    base = lab.base()
    data = lab.preferences(base, k=2)
    if every:

        def data(policy, round):
            """Short responses in the first round, so that the sizes grow in the second."""
            rows = lab.preferences(policy, k=2)
            short = [row for row in rows if max(map(len, row["responses"])) < 9]
            return rows if round else short or rows

    options = dict(steps=steps, every=every, reference="round" if every else "start")
    return lab.align(base, data, dpo.loss, dpo.Config(), **options)


@pytest.mark.slow
@pytest.mark.parametrize("every", [None, 6])
def test_compile_on_trains_the_same_policy_with_few_compilations(tmp_path, monkeypatch, every):
    monkeypatch.setattr(store, "CACHE", str(tmp_path / "cache"))
    plain = run(tmp_path / "plain", "off", every)
    compiled, graphs = compiler()
    monkeypatch.setattr(Lab, "compile", lambda lab, function: compiled(function))
    ours = run(tmp_path / "compiled", "on", every)
    for a, b in zip(ours.parameters(), plain.parameters()):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert 2 <= len(graphs) <= (4 if every else 2)  # log-probs and loss, per shape
