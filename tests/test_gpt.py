"""GPT: packed prompt trees and the cache against a plain transformer that reads path by path."""

import math
from types import SimpleNamespace

import pytest
import torch

import data
import nanomodel
from data import collate, encode, sizes
from nanomodel import GPT, GPTConfig, attention, runs, visible

EOT, PAD, VOCAB = 1, 0, 40
IDS = SimpleNamespace(eot=EOT, pad=PAD, encode=lambda text: [int(word) for word in text.split()])


def make(seed=0, dtype=torch.float64, vocab=VOCAB, tokenizer=IDS, **changes):
    """A GPT of two layers whose weights are large enough for every token to matter."""
    shape = dict(
        vocab_size=vocab,
        hidden_size=16,
        intermediate_size=24,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    torch.manual_seed(seed)
    model = GPT(GPTConfig(**shape | dict(max_position_embeddings=64) | changes), tokenizer).to(
        dtype
    )
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(0 if p.dim() == 2 else 1, 0.4)
    return model


def plain(model, ids):
    """Logits (S, V) of one sequence: attention head by head, rotation as complex numbers."""
    c, w = model.config, dict(model.named_parameters())
    half, size = c.head_dim // 2, len(ids)
    angle = torch.arange(size).float()[:, None] * c.rope_theta ** (
        -2 * torch.arange(half).float() / c.head_dim
    )
    dtype = w["embed_tokens.weight"].dtype
    turn = torch.complex(angle.cos().to(dtype), angle.sin().to(dtype))  # (S, half)

    def norm(x, gain):
        return x / (x.square().mean(-1, keepdim=True) + c.rms_norm_eps).sqrt() * gain

    def turned(x):
        z = torch.complex(x[:, :half], x[:, half:]) * turn
        return torch.cat([z.real, z.imag], -1)

    x = w["embed_tokens.weight"][torch.tensor(ids)]
    for i in range(c.num_hidden_layers):
        q_proj, k_proj, v_proj, o_proj = (
            w[f"layers.{i}.self_attn.{n}_proj.weight"] for n in "qkvo"
        )
        y, heads = norm(x, w[f"layers.{i}.input_layernorm.weight"]), []
        for head in range(c.num_attention_heads):
            group = head * c.num_key_value_heads // c.num_attention_heads
            q = turned(y @ q_proj[head * c.head_dim : (head + 1) * c.head_dim].T)
            k = turned(y @ k_proj[group * c.head_dim : (group + 1) * c.head_dim].T)
            v = y @ v_proj[group * c.head_dim : (group + 1) * c.head_dim].T
            score = (q @ k.T / math.sqrt(c.head_dim)).masked_fill(
                torch.ones(size, size).triu(1).bool(), -math.inf
            )
            heads.append(score.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ o_proj.T
        y = norm(x, w[f"layers.{i}.post_attention_layernorm.weight"])
        gate, up, down = (w[f"layers.{i}.mlp.{n}_proj.weight"] for n in ("gate", "up", "down"))
        gate = y @ gate.T
        x = x + (gate * gate.sigmoid() * (y @ up.T)) @ down.T
    return norm(x, w["norm.weight"]) @ w.get("lm_head.weight", w["embed_tokens.weight"]).T


def path(row, k):
    """(ids from the root to the end of response k, number of scored tokens at its end)."""
    if k == -1:
        return row["prompt"] or [EOT], 0
    parents = row.get("parents", [-1] * len(row["responses"]))
    end = [EOT] * row.get("ends", [k not in parents for k in range(len(parents))])[k]
    scored = row["responses"][k] + end
    return path(row, parents[k])[0] + row.get("context", [[]] * len(parents))[k] + scored, len(
        scored
    )


def oracle(model, rows):
    """For each row K tensors of log-probs of response tokens, every path as a row of its own."""
    out = []
    for row in rows:
        out.append([])
        for k in range(len(row["responses"])):
            ids, n = path(row, k)
            logps = (
                plain(model, ids)
                .log_softmax(-1)[:-1]
                .gather(1, torch.tensor(ids[1:])[:, None])[:, 0]
            )
            out[-1].append(logps[len(ids) - 1 - n :])
    return out


def words(generator, low, high):
    """Random token ids, `low` to `high` of them."""
    size = int(torch.randint(low, high + 1, (), generator=generator))
    return torch.randint(2, VOCAB, (size,), generator=generator).tolist()


def grow(kind, n=5, seed=3):
    """n rows of a kind of prompt tree."""
    g = torch.Generator().manual_seed(seed)
    count = dict(pairs=2, lists=8, chain=4, tree=7).get(kind, 3)
    rows = [
        dict(prompt=words(g, 1, 9), responses=[words(g, 1, 7) for _ in range(count)])
        for _ in range(n)
    ]
    for b, row in enumerate(rows):
        if kind == "chain":
            row["parents"] = [-1, 0, 1, 2]
        if kind in ("tree", "everything"):
            row["parents"] = [
                int(torch.randint(-1, k, (), generator=g)) if k else -1 for k in range(count)
            ]
        if kind == "short":
            row["responses"], row["ends"] = [[], [5], [7, 8]], [True, False, False]
        if kind in ("absent", "everything"):
            row["responses"] = row["responses"][: 1 + b % count]
            row |= {"parents": row["parents"][: 1 + b % count]} if "parents" in row else {}
        if kind in ("context", "everything"):
            row["context"] = [words(g, 0, 3) for _ in row["responses"]]
        if kind in ("ends", "everything"):
            row["ends"] = [bool(torch.rand((), generator=g) < 0.5) for _ in row["responses"]]
        if kind == "packed":
            row["prompt"] = words(g, 40, 40) if b == 0 else row["prompt"]
        if (
            kind == "apart"
        ):  # so long behind so short a prompt that copies of it are cheaper than wide rows
            row |= dict(
                prompt=words(g, 1, 2), responses=[words(g, 40, 60) for _ in range(1 + b % 4)]
            )
            row |= dict(
                context=[words(g, 0, 3) for _ in row["responses"]],
                ends=[k != 1 for k in range(len(row["responses"]))],
            )
        if kind == "empty":  # no prompt; a step of the tree without a token of its own
            row |= dict(
                prompt=[],
                responses=[[8], [], [4, 5], []],
                parents=[-1, 0, 1, 1],
                ends=[False, False, True, True],
            )
            row["context"] = [[9], [], [], [3, 3]]
    return rows


KINDS = (
    "pairs",
    "lists",
    "chain",
    "tree",
    "ragged",
    "short",
    "absent",
    "context",
    "ends",
    "packed",
    "apart",
    "empty",
    "everything",
)


@pytest.mark.parametrize("kind", KINDS)
def test_packed_trees_equal_one_row_a_response_in_values_and_gradients(kind):
    model, rows = make(), grow(kind, 7)
    batch, expected = collate(rows, IDS), oracle(model, rows)
    logps = model.logps(batch)
    assert (kind == "apart") == (
        batch.tokens.shape[1] < max(len(encode(row, IDS)["tree"].tokens) for row in rows)
    )
    assert kind not in ("packed", "everything") or len(batch.tokens) < len(
        rows
    )  # several trees share a row
    target = torch.zeros_like(logps)
    for b, those in enumerate(expected):
        for k, values in enumerate(those):
            target[b, k, : len(values)] = values
        assert batch.mask[b].sum(-1).tolist() == [len(v) for v in those] + [0] * (
            logps.shape[1] - len(those)
        )
    torch.testing.assert_close(logps, target, rtol=0, atol=1e-9)
    assert logps.masked_select(~batch.mask).count_nonzero() == 0
    weight = torch.randn(logps.shape, generator=torch.Generator().manual_seed(1), dtype=logps.dtype)
    ours = torch.autograd.grad((weight * logps).sum(), list(model.parameters()))
    theirs = torch.autograd.grad((weight * target).sum(), list(model.parameters()))
    for a, b in zip(ours, theirs):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


@torch.no_grad()
def test_neighbours_padding_and_bucket_sizes_change_nothing():
    model, rows = make(), grow("everything", 9)
    logps = model.logps(collate(rows, IDS))
    order = [4, 7, 0, 8, 2, 6, 1, 5, 3]
    torch.testing.assert_close(
        model.logps(collate([rows[i] for i in order], IDS)), logps[order], rtol=0, atol=1e-12
    )
    batch = collate(rows, IDS, fixed=True)
    assert batch.tokens.numel() > collate(rows, IDS).tokens.numel()
    n, k, t = logps.shape
    fixed = model.logps(batch)
    torch.testing.assert_close(fixed[:, :k, :t], logps, rtol=0, atol=1e-12)
    assert fixed[:, :, t:].count_nonzero() == 0
    long = dict(prompt=list(range(2, 40)), responses=[[5] * 20, [6]])
    torch.testing.assert_close(
        model.logps(collate([long, *rows], IDS))[1:, :k, :t], logps, rtol=0, atol=1e-12
    )
    for b in range(n):
        alone = model.logps(collate([rows[b]], IDS))[0]
        torch.testing.assert_close(
            alone, logps[b, : alone.shape[0], : alone.shape[1]], rtol=0, atol=1e-12
        )


def test_what_padding_holds_reaches_neither_log_probs_nor_gradients():
    model, rows = make(), grow("ragged", 6)
    model.embed_tokens.weight.data[PAD] = 0
    batch = collate(rows, IDS, fixed=True)
    assert (batch.tokens == PAD).any() and not (batch.target[batch.mask] == PAD).any()
    before = model.logps(batch)
    garbage = torch.where(batch.branch == batch.sees.shape[1] - 1, 7, batch.tokens)
    batch.tokens = garbage
    assert torch.equal(model.logps(batch), before)


def certain(next_token):
    """A GPT that is certain of `next_token[v]` after token v: one-hot embeddings, idle layers."""
    size = len(next_token)
    model = make(vocab=size, hidden_size=size, num_hidden_layers=1, tie_word_embeddings=False)
    with torch.no_grad():
        for p in model.parameters():
            p.fill_(1.0 if p.dim() == 1 else 0.0)
        model.embed_tokens.weight.copy_(torch.eye(size))
        model.lm_head.weight[torch.tensor(next_token), torch.arange(size)] = 100.0
    return model


def test_a_certain_model_gives_log_prob_zero_to_its_own_continuation_and_to_no_shifted_one():
    # after 2 comes 3, ... after 7 comes the end
    model = certain([5, 2, 3, 4, 5, 6, 7, EOT])
    right = [
        dict(prompt=[2], responses=[[3, 4, 5, 6, 7], [3, 4, 5, 6, 7]]),
        dict(prompt=[4], responses=[[5], [6], [7], [6, 7]], parents=[-1, 0, 1, 0]),
        dict(prompt=[6], responses=[[7]]),
        dict(prompt=[3], responses=[[5], [7]], context=[[4], [6]], parents=[-1, 0]),
    ]
    assert model.logps(collate(right, IDS)).abs().max() < 1e-12
    wrong = [dict(prompt=[2], responses=[[4, 5, 6, 7], [2, 3, 4]])]
    logps = model.logps(collate(wrong, IDS))[0]
    assert (
        logps[0].tolist()[1:] == pytest.approx([0] * 4, abs=1e-12) and logps[0, 0] < -50
    )  # only the jump from 2 to 4
    assert logps[1, 0] < -50 and logps[1, 3] < -50  # 2 again, and an end after 4
    [[sampled, _]] = model.sample([[2]], 2, torch.Generator().manual_seed(0))
    assert sampled == [3, 4, 5, 6, 7, EOT]


def test_the_end_is_scored_where_a_response_ends_and_padding_is_another_token():
    batch = collate(
        [
            dict(prompt=[2], responses=[[3], [4, 5]], ends=[True, False]),
            dict(prompt=[2, 3], responses=[[9, 9, 9]]),
        ],
        IDS,
    )
    assert batch.target[0].tolist() == [[3, EOT, 0, 0], [4, 5, 0, 0]]
    assert batch.mask[0].tolist() == [[True, True, False, False], [True, True, False, False]]
    assert batch.target[1, 0].tolist() == [9, 9, 9, EOT] and batch.mask[1].sum(-1).tolist() == [
        4,
        0,
    ]
    assert EOT != PAD


@pytest.mark.parametrize("parents", [[1, -1], [0, -1], [-1, 1], [-2, -1], [-1, 2]])
def test_parents_that_do_not_stand_before_their_children_are_refused(parents):
    with pytest.raises(ValueError, match=r"must continue an earlier response or the prompt"):
        encode(dict(prompt=[2], responses=[[3], [4]], parents=parents), IDS)


# ---------------------------------------------------------------- the attention rule


def run_by_run(q, k, v, queries, keys, most_queries, most_keys, window_size):
    """What torch's varlen_attn computes: q (T, H, D), k and v (L, H, D) -> (T, H, D)."""
    assert window_size == (-1, 0) and queries.dtype == keys.dtype == torch.int32
    out = []
    for a, b, c, d in zip(queries, queries[1:], keys, keys[1:]):
        size, seen = int(b - a), int(d - c)
        assert size <= most_queries and size <= seen <= most_keys and (size > 0 or seen == 0)
        mask = torch.ones(size, seen, dtype=torch.bool).tril(seen - size)
        one = [x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d])]
        out.append(torch.nn.functional.scaled_dot_product_attention(*one, mask).transpose(0, 1))
    return torch.cat(out)


@pytest.fixture
def flashing(monkeypatch):
    """Attention takes the path that it takes on CUDA."""
    varlen = pytest.importorskip("torch.nn.attention.varlen")
    monkeypatch.setattr(varlen, "varlen_attn", run_by_run)
    monkeypatch.setattr(data, "LONG", 1)


@pytest.mark.parametrize("fixed, packed", [(True, True), (True, False), (False, True)])
def test_attention_of_runs_equals_the_boolean_mask(flashing, fixed, packed, monkeypatch):
    batch = collate(grow("everything", 9), IDS, fixed, packed)
    n, s = batch.tokens.shape
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, heads, s, 8, generator=g) for heads in (4, 2, 2))
    plainly = attention(q, k, v, visible(batch.branch, batch.sees))
    where = runs(batch.branch, batch.sees, batch.keys)
    real = batch.branch < batch.sees.shape[1] - 1  # what padding attends to does not matter
    found = attention(q, k, v, where).transpose(1, 2)[real]
    torch.testing.assert_close(found, plainly.transpose(1, 2)[real], rtol=0, atol=1e-5)

    model = make()
    logps = model.logps(batch)
    expected = torch.autograd.grad(logps.sum(), list(model.parameters()))
    monkeypatch.setattr(nanomodel, "visible", lambda branch, sees: runs(branch, sees, batch.keys))
    monkeypatch.setattr(nanomodel, "blocks", lambda mask: mask)
    logps_of_runs = model.logps(batch)
    torch.testing.assert_close(logps_of_runs, logps, rtol=0, atol=1e-12)
    found = torch.autograd.grad(logps_of_runs.sum(), list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


def test_runs_are_found_without_reading_a_value(flashing):
    batch = collate(grow("everything", 9), IDS, fixed=True).to("meta")
    where = runs(batch.branch, batch.sees, batch.keys)
    assert where.index.shape == (len(batch.tokens) * batch.keys,) and where.index.is_meta


def test_batches_of_one_run_have_the_same_number_of_keys(flashing):
    rows = [encode(row, IDS) for row in grow("everything", 40)]
    fixed = sizes(rows, 4, IDS)
    found = [collate(rows[i : i + 4], IDS, fixed).keys for i in range(0, 40, 4)]
    assert set(found) == {fixed.keys} and fixed.keys > 0
    whole = collate(rows, IDS, fixed, packed=False)
    assert whole.take(torch.tensor([3, 1])).keys == whole.keys == whole.to("cpu").keys


def test_short_rows_have_no_keys():
    assert collate(grow("everything", 9), IDS, fixed=True).keys == 0


def test_a_branch_sees_itself_and_its_ancestors_only():
    # prompt 0 1, then branch 1 (two tokens fed), its child 2, and branch 3 beside them
    row = dict(prompt=[2, 3], responses=[[4, 5], [6, 7], [8, 9]], parents=[-1, 0, -1])
    batch = collate([row], IDS)
    assert batch.tokens.tolist() == [[2, 3, 4, 5, 6, 7, 8, 9]] and batch.position.tolist() == [
        [0, 1, 2, 3, 4, 5, 2, 3]
    ]
    seen = [set(row.nonzero().flatten().tolist()) for row in visible(batch.branch, batch.sees)[0]]
    assert seen == [
        {0},
        {0, 1},
        {0, 1, 2},
        {0, 1, 2, 3},
        {0, 1, 2, 3, 4},
        {0, 1, 2, 3, 4, 5},
        {0, 1, 6},
        {0, 1, 6, 7},
    ]


# ---------------------------------------------------------------- hidden states, logits, log-probs


def test_hidden_logits_and_logps_agree():
    model, batch = make(num_hidden_layers=3), collate(grow("tree"), IDS)
    n, s = batch.tokens.shape
    last, states = model.hidden(batch), model.hidden(batch, layers=[0, 1, 3])
    assert last.shape == (n, s, 16) and [x.shape for x in states] == [(n, s, 16)] * 3
    assert torch.equal(states[0], model.embed_tokens(batch.tokens)) and torch.equal(
        model.norm(states[2]), last
    )
    logits = model.logits(batch)
    assert logits.shape == (*batch.target.shape, VOCAB)
    expected = logits.log_softmax(-1).gather(-1, batch.target[..., None])[..., 0] * batch.mask
    torch.testing.assert_close(model.logps(batch), expected, rtol=0, atol=1e-12)
    assert logits.dtype == model.logps(batch).dtype == torch.float64


def test_a_vocabulary_applied_in_pieces_gives_the_same_values_and_gradients():
    model, batch = make(), collate(grow("tree"), IDS)
    whole = model.logps(batch)
    gradients = torch.autograd.grad(whole.square().sum(), list(model.parameters()))
    model.chunk = 7 * VOCAB
    pieces = model.logps(batch)
    torch.testing.assert_close(pieces, whole, rtol=0, atol=1e-12)
    for a, b in zip(
        torch.autograd.grad(pieces.square().sum(), list(model.parameters())), gradients
    ):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-9)
    with torch.no_grad():
        model.chunk = 1  # less than one row: a row at a time
        torch.testing.assert_close(model.logps(batch), whole, rtol=0, atol=1e-12)


def test_autocast_gives_finite_float32_log_probs_and_gradients():
    model, batch = make(dtype=torch.float32), collate(grow("tree"), IDS)
    exact = model.logps(batch)
    with torch.autocast("cpu", torch.bfloat16):
        logps = model.logps(batch)
        [sampled] = model.sample([[2, 3]], 3, torch.Generator().manual_seed(0), max_tokens=4)
    assert logps.dtype == torch.float32 and len(sampled) == 3
    torch.testing.assert_close(logps, exact, rtol=0.1, atol=0.5)
    logps.sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters())


def test_an_all_absent_batch_has_log_probs_of_zero():
    assert make().logps(
        collate([dict(prompt=[3], responses=[[], []], ends=[False, False], scores=[0, 0])] * 2, IDS)
    ).shape == (2, 2, 0)


# ---------------------------------------------------------------- sampling


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14, 15], [EOT, 3]]


@torch.no_grad()
def greedy(model, prompt, tokens):
    out = []
    while len(out) < tokens and EOT not in out:
        out.append(int(plain(model, prompt + out)[-1].argmax()))
    return out


def test_greedy_samples_equal_an_uncached_loop():
    rng = torch.Generator()
    lengths = set()
    for seed in range(4):
        model = make(seed, vocab=16, tie_word_embeddings=False)
        expected = [greedy(model, p, 12) for p in PROMPTS]
        assert model.sample(PROMPTS, 3, rng, max_tokens=12, temperature=0) == [
            [ids] * 3 for ids in expected
        ]
        for prompt, ids in zip(PROMPTS, expected):
            assert model.sample([prompt], 1, rng, max_tokens=12, temperature=0) == [[ids]]
        lengths |= {len(ids) for ids in expected}
    assert len(lengths) > 1 and max(lengths) == 12  # some ended, some were cut


@torch.no_grad()
def test_cached_logits_of_diverging_samples_equal_the_plain_ones_and_share_one_prompt():
    model, k, steps = make(), 3, 5
    cache, first = model.prefill(PROMPTS, k, steps)
    for layer in range(2):
        assert [x.shape for x in cache.prompt[layer]] == [
            (4, 2, 7, 4)
        ] * 2  # no K: the prompt is there once
        assert [x.shape for x in cache.own[layer]] == [(4, k, 2, steps, 4)] * 2
    for n, prompt in enumerate(PROMPTS):
        torch.testing.assert_close(first[n], plain(model, prompt)[-1], rtol=0, atol=1e-9)
    tokens = torch.randint(VOCAB, (4, k, steps), generator=torch.Generator().manual_seed(0))
    for step in range(steps):
        logits = model.decode(cache, tokens[:, :, step])
        assert logits.shape == (4, k, VOCAB) and cache.length == step + 1
        for n, prompt in enumerate(PROMPTS):
            for i in range(k):
                ids = prompt + tokens[n, i, : step + 1].tolist()
                torch.testing.assert_close(logits[n, i], plain(model, ids)[-1], rtol=0, atol=1e-9)


def test_samples_depend_on_the_generator_alone():
    model = make()

    def draw(seed, **options):
        return model.sample(
            PROMPTS, 4, torch.Generator().manual_seed(seed), max_tokens=6, **options
        )

    before = torch.get_rng_state()
    assert draw(1) == draw(1) != draw(2)
    assert torch.equal(torch.get_rng_state(), before)
    assert draw(1, temperature=1e-4) == draw(2, temperature=0)
    flat, sharp = (
        len({tuple(ids) for group in draw(3, temperature=t) for ids in group}) for t in (10.0, 0.1)
    )
    assert sharp < flat


@pytest.mark.slow
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_sampled_frequencies_match_the_softmax(temperature):
    model, n = make(vocab=6), 20000
    [samples] = model.sample(
        [[2, 3, 4]], n, torch.Generator().manual_seed(0), max_tokens=2, temperature=temperature
    )
    with torch.no_grad():
        first = (plain(model, [2, 3, 4])[-1] / temperature).softmax(-1).tolist()
        second = [
            (plain(model, [2, 3, 4, i])[-1] / temperature).softmax(-1).tolist() for i in range(6)
        ]
    expected = {(i, j): first[i] * second[i][j] for i in range(6) for j in range(6) if i != EOT} | {
        (EOT,): first[EOT]
    }
    counts = {pair: 0 for pair in expected}
    for ids in samples:
        counts[tuple(ids)] += 1
    statistic = sum((counts[pair] - n * p) ** 2 / (n * p) for pair, p in expected.items())
    freedom = len(expected) - 1
    assert statistic < freedom + 4 * math.sqrt(2 * freedom)


def test_a_token_without_probability_is_never_drawn():
    model = certain([2, 3, 4, 5, 6, 7, 0, 0])
    with torch.no_grad():
        model.lm_head.weight[3, 2] = 100.0  # after 2 comes 3 or 4, half and half
    [samples] = model.sample([[2]], 2000, torch.Generator().manual_seed(0), max_tokens=1)
    counts = [samples.count([i]) for i in range(8)]
    assert counts[3] + counts[4] == 2000 and abs(counts[3] - 1000) < 100


def test_a_prompt_that_fills_the_context_is_refused_and_a_shorter_one_has_its_own_room():
    model, rng = make(max_position_embeddings=16), torch.Generator()
    with pytest.raises(ValueError, match="a prompt of 16 tokens leaves no room in a context of 16"):
        model.sample([[3], [5] * 16], 1, rng)
    short = next(
        p
        for p in ([i, j] for i in range(2, 9) for j in range(2, 9))
        if len(greedy(model, p, 14)) == 14
    )
    [[long], [free]] = model.sample([[5] * 15, short], 1, rng, max_tokens=64, temperature=0)
    assert len(long) == 1 and free == greedy(model, short, 14)  # however long its neighbours are


def test_texts_and_empty_prompts_are_prompts():
    model = make()
    assert model.sample(["5 6 7", ""], 1, torch.Generator(), temperature=0, max_tokens=5) == [
        [greedy(model, [5, 6, 7], 5)],
        [greedy(model, [EOT], 5)],  # as in `encode`, end-of-text replaces an empty prompt
    ]
