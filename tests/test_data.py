"""Tokenizers, rows and the Batch, labels: hand-made examples and counted frequencies."""

import contextlib
import itertools
import math
import os
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import (
    Batch,
    Tokenizer,
    UserError,
    bucket,
    check_lists,
    collate,
    encode,
    extremes,
    fit_context,
    label,
    paths,
    printable,
    reorder,
)
from lab.store import load_tensors, save_tensors, write_beside, write_text

IDS = SimpleNamespace(eot=1, pad=0, encode=lambda text: [int(word) for word in text.split()])
WORDS = [
    " good",
    " very good",
    " the",
    "\n",
    "-",
    "é",
    " film",
    "film",
    "1",
    "+",
    "(a|b)",
    " naïve",
]


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


# ---------------------------------------------------------------- files


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path):
    path = tmp_path / "folder" / "file.txt"
    write_text(path, "old")
    with pytest.raises(RuntimeError, match="disk full"), write_beside(path) as temporary:
        with open(temporary, "w") as file:
            file.write("half")
        raise RuntimeError("disk full")
    assert path.read_text() == "old" and os.listdir(path.parent) == ["file.txt"]
    write_text(path, "new")
    assert path.read_text() == "new" and os.listdir(path.parent) == ["file.txt"]


def test_tied_and_strided_tensors_are_written_whole(tmp_path):
    x = torch.arange(12.0).view(3, 4)
    save_tensors(
        tmp_path / "t.safetensors",
        {"a": x, "b": x, "c": x.T[1:], "d": torch.nn.Parameter(x[:, ::2])},
    )
    back = load_tensors(tmp_path / "t.safetensors")
    assert all(
        torch.equal(back[k], v) for k, v in {"a": x, "b": x, "c": x.T[1:], "d": x[:, ::2]}.items()
    )
    with pytest.raises(ValueError, match="is not a readable safetensors file"):
        load_tensors(tmp_path / "nothing.safetensors")


# ---------------------------------------------------------------- tokenizers


def test_each_word_of_a_toy_tokenizer_is_one_token_and_the_rest_are_bytes():
    toy = Tokenizer.toy([*WORDS, " good"])
    assert all(len(toy.encode(word)) == 1 for word in WORDS)
    assert len(toy.encode(" the very good film")) == 3  # the longest word first
    assert toy.encode("ab") == [97, 98] and toy.encode("日") == list("日".encode())
    assert toy.encode("(a|b)+") == [
        toy.encode("(a|b)")[0],
        ord("+"),
    ]  # words are words, not patterns
    longer = [word for word in WORDS if len(word.encode()) > 1]
    assert sorted(toy.encode(word)[0] for word in longer) == list(range(256, 256 + len(longer)))
    assert len({toy.eot, toy.pad}) == 2 and {toy.eot, toy.pad} == {
        toy.vocab_size - 2,
        toy.vocab_size - 1,
    }
    assert toy.decode([toy.pad, *toy.encode("the film"), toy.eot, toy.pad]) == "the film"
    assert toy.decode([0xE6, 0x97]) == "\ufffd"  # half a character
    assert Tokenizer.toy([], name="bytes").name == "bytes"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a name, ümlaut 日本", "a name, ümlaut 日本"),
        ("\x1b]0;title\x07", r"\x1b]0;title\x07"),
        ("a\nb\r\u2028\x85", r"a\nb\r\u2028\x85"),
        ("\u202eright to left\ud800\ufeff", r"\u202eright to left\ud800\ufeff"),
        ("x" * 5000, "x" * 200 + "..."),
        (["a list", 5], "['a list', 5]"),
    ],
)
def test_text_that_is_not_ours_fits_a_line_of_a_terminal(text, shown):
    assert printable(text) == shown and printable(text).isprintable()


def test_line_breaks_of_a_sample_stay_and_nothing_of_it_is_cut():
    text = "a\n\x1b[31m\r\n" + "b" * 300
    assert printable(text, None, keep="\n") == "a\n\\x1b[31m\\r\n" + "b" * 300


def test_real_text_falls_back_to_bytes_and_the_name_says_so(monkeypatch):
    import tiktoken

    def unreachable(name):
        raise OSError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", unreachable)
    text = Tokenizer.text()
    assert text.name == "bytes" and text.vocab_size == 258 and text.encode("é") == [0xC3, 0xA9]


# ---------------------------------------------------------------- prompt trees


def test_a_prompt_tree_is_laid_out_as_in_the_hand_made_example():
    row = dict(
        prompt="2 3",
        responses=["4 5", [6], "7"],
        parents=[-1, 0, -1],
        context=["", "9", "8 8"],
        ends=[False, True, False],
    )
    tree = encode(row, IDS)["tree"]
    # the prompt, response 0, 1's separator and 6, 2's separator (a leaf's last token is no input)
    assert tree.tokens == [2, 3, 4, 5, 9, 6, 8, 8]
    assert tree.position == [0, 1, 2, 3, 4, 5, 2, 3]
    assert tree.branch == [0, 0, 1, 1, 2, 2, 3, 3]
    assert tree.sees.astype(int).tolist() == [
        [1, 0, 0, 0],
        [1, 1, 0, 0],
        [1, 1, 1, 0],
        [1, 0, 0, 1],
    ]
    assert tree.targets == [[4, 5], [6, 1], [7]]
    assert tree.sources == [
        [1, 2],
        [4, 5],
        [7],
    ]  # 4 after the prompt's last token, 6 after its separator, the end after 6, 7 after 8 8


def test_ends_default_to_responses_that_nothing_continues():
    row = dict(prompt=[2], responses=[[3], [4], [5]], parents=[-1, 0, 0])
    assert encode(row, IDS)["tree"].targets == [[3], [4, 1], [5, 1]]
    row = encode(dict(prompt=[2], responses=[[3]]), IDS)
    assert encode(row, IDS) is row  # laid out once


@pytest.mark.parametrize(
    "wrong", [dict(parents=[-1]), dict(context=[[]]), dict(ends=[True, True, False])]
)
def test_fields_with_another_count_than_responses_are_refused(wrong):
    [(name, values)] = wrong.items()
    with pytest.raises(ValueError, match=f"2 responses, but {len(values)} {name}"):
        encode(dict(prompt=[2], responses=[[3], [4]]) | wrong, IDS)


def test_trees_are_packed_where_they_fit_and_padding_is_a_branch_of_its_own():
    rows = [
        dict(
            prompt=[2, 3], responses=[[4], [5, 6]], scores=[1.0, 0.0]
        ),  # 5 tokens: 2 3, then 4 (which predicts the end), then 5 6
        dict(prompt=[7] * 9, responses=[[8]], scores=[0.5]),  # 10 tokens: its end is no input
        dict(
            prompt=[9], responses=[[2], [3]], scores=[2.0, 3.0]
        ),  # 3 tokens: there is room for both of the others in one row
    ]
    batch = collate(rows, IDS)
    assert batch.tokens.tolist() == [[7] * 9 + [8], [2, 3, 4, 5, 6, 9, 2, 3, 0, 0]]
    assert batch.position.tolist() == [[*range(10)], [0, 1, 2, 2, 3, 0, 1, 1, 0, 0]]
    assert batch.branch.tolist() == [[0] * 9 + [1], [0, 0, 1, 2, 2, 3, 4, 5, 6, 6]]
    assert batch.sees.shape == (2, 7, 7)
    assert batch.sees[1].int().tolist() == [
        [1, 0, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0, 0],
        [1, 0, 1, 0, 0, 0, 0],
        [0, 0, 0, 1, 0, 0, 0],
        [0, 0, 0, 1, 1, 0, 0],
        [0, 0, 0, 1, 0, 1, 0],
        [0, 0, 0, 0, 0, 0, 1],
    ]
    assert batch.source[0].tolist() == [[11, 12, 0], [11, 13, 14]] and batch.target[0].tolist() == [
        [4, 1, 0],
        [5, 6, 1],
    ]
    assert batch.source[1, 0].tolist() == [8, 9, 0] and batch.source[2, 1].tolist() == [15, 17, 0]
    assert (
        batch.scores.tolist() == [[1.0, 0.0], [0.5, 0.0], [2.0, 3.0]] and not batch.mask[1, 1].any()
    )
    assert batch.parents.tolist() == [[-1, -1]] * 3
    assert batch.mask.dtype == batch.sees.dtype == torch.bool and batch.target.dtype == torch.int64


def test_fixed_shapes_come_in_few_sizes_at_most_a_quarter_apart():
    sizes = sorted({bucket(n) for n in range(1, 1025)})
    assert all(n <= bucket(n) <= 1.25 * n for n in range(1, 1025))
    assert len([s for s in sizes if 64 < s <= 128]) == 4 and sizes[-1] == 1024
    shapes, rng = set(), random.Random(0)
    for _ in range(40):
        rows = [
            dict(prompt=[2] * rng.randrange(20, 30), responses=[[3] * rng.randrange(10, 20)] * 2)
            for _ in range(8)
        ]
        batch = collate(rows, IDS, fixed=True)
        shapes.add((batch.tokens.shape, batch.sees.shape, batch.target.shape))
    assert len(shapes) <= 6


def test_columns_reach_the_batch_in_their_shapes():
    rows = [
        dict(
            prompt=[2],
            responses=[[3, 4], [5]],
            difficulty=3,
            margin=0.5,
            weight=[1, 2.5],
            step=[[0.1, 0.2, 0.3], [0.4, 0.5]],
            at=np.ones(4),
        ),
        dict(
            prompt=[2],
            responses=[[6]],
            difficulty=4,
            margin=1.0,
            weight=[7],
            step=[[0.6, 0.7]],
            at=np.zeros(4),
        ),
    ]
    batch = collate(rows, IDS)
    assert batch.difficulty.tolist() == [3, 4] and batch.difficulty.dtype == torch.int64
    assert batch.margin.tolist() == [0.5, 1.0] and batch.margin.dtype == torch.float32
    assert batch.weight.tolist() == [[1, 2.5], [7, 0]] and batch.at.shape == (2, 4)
    assert batch.step.shape == batch.mask.shape
    torch.testing.assert_close(batch.step[0], torch.tensor([[0.1, 0.2, 0.3], [0.4, 0.5, 0.0]]))
    assert torch.equal(batch.step != 0, batch.mask)
    wide = collate(
        [row | {"responses": [[3] * 17] * len(row["responses"])} for row in rows], IDS, fixed=True
    )
    assert (
        wide.step.shape == wide.mask.shape
    )  # as wide as the responses, whatever their size is rounded to
    with pytest.raises(
        AttributeError,
        match="the batch has no column 'reward'; it has at, difficulty, margin, step, weight",
    ):
        _ = collate(
            [row | {"reward": [1.0]} for row in rows], IDS
        ).reward  # the truth is not for the loss
    moved = batch.to("meta")
    assert (
        isinstance(moved, Batch)
        and moved.tokens.is_meta
        and moved.step.is_meta
        and moved.images is None
    )


def test_images_and_tables_fill_their_own_fields():
    images = torch.rand(3, 2, 1, 4, 4)
    batch = collate(
        [dict(prompt=b, responses=images[b], scores=[1.0, 0.0], ink=0.5) for b in range(3)]
    )
    assert (
        torch.equal(batch.images, images)
        and batch.label.tolist() == [0, 1, 2]
        and batch.tokens is None
    )
    assert batch.mask.shape == (3, 2, 1) and batch.mask.all() and batch.ink.tolist() == [0.5] * 3
    table = collate([dict(prompt=1, responses=[[0, 2], [1, 1], [2, 0]], scores=[3.0, 2.0, 1.0])])
    assert (
        table.target.tolist() == [[[0, 2], [1, 1], [2, 0]]]
        and table.mask.shape == (1, 3, 2)
        and table.label.tolist() == [1]
    )
    rows = [
        dict(prompt=0, responses=images[0, :1], at=torch.ones(1)),
        dict(prompt=1, responses=images[1], at=torch.ones(2)),
    ]
    batch = collate(rows)  # an absent response
    assert (
        batch.mask[..., 0].tolist() == [[True, False], [True, True]]
        and batch.images[0, 1].count_nonzero() == 0
    )
    assert (
        torch.equal(batch.images[1], images[1])
        and batch.scores.tolist() == [[0.0, 0.0]] * 2
        and batch.at.tolist() == [[1, 0], [1, 1]]
    )
    table = collate(
        [dict(prompt=0, responses=[[0, 2], [1, 1]]), dict(prompt=1, responses=[[2, 2]])]
    )
    assert table.mask.tolist() == [
        [[True] * 2] * 2,
        [[True] * 2, [False] * 2],
    ] and table.target.tolist()[1] == [[2, 2], [0, 0]]


# ---------------------------------------------------------------- the context


def longest(row):
    """Tokens of the longest path, written out."""
    prompt, ends = row["prompt"], row.get("ends", [True] * len(row["responses"]))
    return max(len(prompt) + len(r) + end for r, end in zip(row["responses"], ends))


def test_a_row_that_does_not_fit_the_context_is_refused_or_cut():
    row = dict(prompt=[2] * 5, responses=[[3] * 4, [4]])  # 5 + 4 and the end
    kept, cut = fit_context([row], IDS, 10)
    assert cut == 0 and kept[0]["responses"] == row["responses"] and "tree" in kept[0]
    with pytest.raises(
        ValueError, match="takes 10 tokens, the context holds 9; --truncate cuts it"
    ):
        fit_context([row], IDS, 9)
    [short], cut = fit_context(
        [row], IDS, 9, truncate=True
    )  # half of the context is the prompt's, and its end is kept
    assert (
        cut == 1
        and short["prompt"] == [2] * 4
        and short["responses"] == [[3] * 4, [4]]
        and short["ends"] == [True, True]
    )
    [short], _ = fit_context([row | {"prompt": [2, 3, 4, 5]}], IDS, 6, truncate=True)
    assert (
        short["prompt"] == [3, 4, 5]
        and short["responses"] == [[3] * 3, [4]]
        and short["ends"] == [False, True]
    )
    for context in range(2, 10):
        [short], _ = fit_context([row], IDS, context, truncate=True)
        assert longest(short) <= context and max(short["tree"].position) < context
        [short], _ = fit_context(
            [dict(prompt="", responses=["3 3 3 3 3 3 3 3 3 3"])], IDS, context, truncate=True
        )
        assert longest(short) <= context
    for tree in (dict(parents=[-1, 0]), dict(context=[[6], [6]])):
        with pytest.raises(ValueError, match="cannot be cut"):
            fit_context([row | tree], IDS, 6, truncate=True)


# ---------------------------------------------------------------- labels


def share(hits, n, p, sd=4):
    """Is `hits` of n a likely count of an event of probability p?"""
    return abs(hits - n * p) <= sd * math.sqrt(n * p * (1 - p)) + 1e-9


def pairs(n, reward=(1.0, 0.3)):
    return [
        dict(
            prompt=[2],
            responses=[[3], [4, 4]],
            reward=list(reward),
            ends=[True, False],
            note=(8, 9),
            at=np.array([5, 6]),
        )
        for _ in range(n)
    ]


def wins(rows):
    return sum(row["responses"][0] == [3] for row in rows)


N = 1500


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


@pytest.mark.parametrize("temperature", [1.0, 0.5])
def test_pairs_are_labelled_by_bradley_terry(temperature):
    rows = label(pairs(N), generator(), temperature)
    assert share(wins(rows), N, sigmoid(0.7 / temperature))
    again, other = (
        [row["responses"] for row in label(pairs(N), generator(seed), temperature)]
        for seed in (0, 1)
    )
    assert again == [row["responses"] for row in rows] != other
    for row in rows:  # everything of a response moves with it
        kept = row["responses"] == [[3], [4, 4]]
        assert row["scores"] == [1.0, 0.0] and row["prompt"] == [2]
        assert row["reward"] == ([1.0, 0.3] if kept else [0.3, 1.0]) and row["ends"] == (
            [True, False] if kept else [False, True]
        )
        assert list(row["note"]) == ([8, 9] if kept else [9, 8]) and row["at"].tolist() == (
            [5, 6] if kept else [6, 5]
        )


def test_a_row_laid_out_before_its_labels_is_laid_out_again():
    rows = label([encode(row, IDS) for row in pairs(20, (0.0, 5.0))], generator(), 0.0)
    assert encode(rows[0], IDS)["tree"].targets == [[4, 4], [3, 1]]
    assert collate(rows, IDS).target[:, 0].tolist() == [[4, 4]] * 20


def test_without_temperature_the_better_response_always_wins_and_ties_are_even():
    assert (
        wins(label(pairs(50), generator(), 0.0)) == 50
        and wins(label(pairs(50, (0.3, 1.0)), generator(), 0.0)) == 0
    )
    assert share(wins(label(pairs(N, (1.0, 1.0)), generator(), 0.0)), N, 0.5)


def test_flips_turn_labels_round_and_leave_the_truth():
    assert wins(label(pairs(50), generator(), 0.0, flip=1.0)) == 0
    rows = label(pairs(N), generator(), 0.0, flip=0.3)
    assert share(wins(rows), N, 0.7) and all(
        row["reward"] == ([1.0, 0.3] if row["responses"][0] == [3] else [0.3, 1.0]) for row in rows
    )
    assert share(
        wins(label(pairs(N), generator(), 1.0, flip=0.2)),
        N,
        0.8 * sigmoid(0.7) + 0.2 * sigmoid(-0.7),
    )


def test_length_bias_is_reward_for_each_token():
    lengths = [[1, 2]] * N
    assert share(
        wins(label(pairs(N), generator(), 2.0, length_bias=1.5, lengths=lengths)),
        N,
        sigmoid((0.7 - 1.5) / 2),
    )
    rows = label(pairs(5), generator(), 0.0, length_bias=1.0, lengths=lengths)
    assert wins(rows) == 0 and rows[0]["reward"] == [0.3, 1.0]  # the truth has no bias


def test_a_world_may_bring_its_own_preference():
    assert share(wins(label(pairs(N), generator(), prefers=[0.8] * N)), N, 0.8)
    assert share(
        wins(label(pairs(N), generator(), 2.0, prefers=[0.8] * N)), N, sigmoid(math.log(4) / 2)
    )
    rows = label(pairs(N), generator(), length_bias=1.0, prefers=[0.8] * N, lengths=[[1, 2]] * N)
    assert share(wins(rows), N, sigmoid(math.log(4) - 1))
    assert wins(label(pairs(20), generator(), prefers=[0.0] * 20)) == 0


def test_lists_are_labelled_by_plackett_luce():
    rewards, t = [0.5, 0.0, 1.0], 0.8
    rows = label(
        [dict(prompt=[2], responses=[[3], [4], [5]], reward=rewards) for _ in range(N)],
        generator(),
        t,
    )
    assert all(row["responses"] == [[3], [4], [5]] and row["reward"] == rewards for row in rows)
    counts = {order: 0 for order in itertools.permutations(range(3))}
    for row in rows:
        counts[tuple(sorted(range(3), key=lambda k: -row["scores"][k]))] += 1
    strength = [math.exp(r / t) for r in rewards]
    for (a, b, c), count in counts.items():
        p = strength[a] / sum(strength) * strength[b] / (strength[b] + strength[c])
        assert share(count, N, p)


def test_lists_without_noise_keep_the_truth_and_flips_exchange_neighbours():
    row = dict(prompt=[2], responses=[[3], [4], [5], [6]], reward=[0.5, 2.0, 1.0, -1.0])
    assert label([row], generator(), 0.0)[0]["scores"] == row["reward"]
    # best to worst 1 2 0 3; each pair of neighbours in turn: the best goes to the end
    assert label([row], generator(), 0.0, flip=1.0)[0]["scores"] == [1.0, -1.0, 2.0, 0.5]
    flipped = label([row] * N, generator(), 0.0, flip=0.25)
    assert all(sorted(r["scores"]) == sorted(row["reward"]) for r in flipped)
    assert share(sum(r["scores"][1] == 2.0 for r in flipped), N, 0.75)
    biased = label([row], generator(), 0.0, length_bias=1.0, lengths=[[1, 1, 1, 9]])[0]
    assert biased["scores"] == [1.5, 3.0, 2.0, 8.0] and biased["reward"] == row["reward"]


def test_a_verifier_is_the_label_itself():
    row = dict(prompt=[2], responses=[[3], [4], [5]], reward=[0.0, 1.0, 1.0])
    [kept] = label([row], generator(), verifier=True)
    assert kept["scores"] == [0.0, 1.0, 1.0] and kept["responses"] == row["responses"]
    assert label([row], generator(), flip=1.0, verifier=True)[0]["scores"] == [1.0, 0.0, 0.0]
    flipped = label([row] * N, generator(), flip=0.1, verifier=True)
    assert share(sum(r["scores"][0] for r in flipped), N, 0.1) and share(
        sum(r["scores"][1] for r in flipped), N, 0.9
    )
    assert flipped[0]["reward"] == row["reward"]
    # of two responses the better comes first, with its true reward
    for reward in ([0.0, 1.0], [1.0, 0.0]):
        [pair] = label(
            [dict(prompt=[2], responses=[[3], [4]], reward=reward)], generator(), verifier=True
        )
        assert pair["scores"] == pair["reward"] == [1.0, 0.0] and pair["responses"] == (
            [[3], [4]] if reward[0] else [[4], [3]]
        )
    [pair] = label(
        [dict(prompt=[2], responses=[[3], [4]], reward=[1.0, 1.0])], generator(), verifier=True
    )
    assert pair["scores"] == [1.0, 1.0] and pair["responses"] == [[3], [4]]


def test_reorder_moves_columns_of_k_values_and_nothing_else():
    row = dict(
        prompt=[7, 8],
        responses=torch.arange(2),
        scores=[1.0, 0.0],
        difficulty=3,
        steps=[1, 2, 3],
        name="ab",
        x=torch.eye(2)[0],
    )
    moved = reorder(row, [1, 0])
    assert (
        moved["prompt"] == [7, 8]
        and moved["responses"].tolist() == [1, 0]
        and moved["scores"] == [0.0, 1.0]
    )
    assert (
        moved["difficulty"] == 3
        and moved["steps"] == [1, 2, 3]
        and moved["name"] == "ab"
        and moved["x"].tolist() == [0, 1]
    )


def test_the_extremes_of_a_list_keep_what_belongs_to_a_response():
    row = dict(prompt="p", responses=["a", "b", "c"], scores=[0.1, 0.9, -1.0])
    row |= dict(context=["x", "y", "z"], parents=[-1, -1, -1])
    pair = dict(prompt="p", responses=["b", "c"], scores=[0.9, -1.0], context=["y", "z"])
    assert extremes(row) == pair | {"parents": [-1, -1]}
    with pytest.raises(UserError, match="continue each other"):
        extremes(row | {"parents": [-1, 0, 0]})


# ---------------------------------------------------------------- what lists and trees need


@pytest.mark.parametrize(
    "scores, bounds, message",
    [
        ((0.0, 0.5, 1.0), (0, 1), None),
        ((0.0, 0.5, 1.1), (0, 1), "score 1.1: this loss needs scores from 0 to 1"),
        ((-0.1, 0.5, 1.0), (0, 1), "score -0.1"),
        ((0.0, float("nan"), 1.0), (0, 1), "score nan"),
        ((-9.0, 1e6, 0.0), (), None),
        ((0.0, float("inf"), 0.0), (), "score inf: this loss needs scores that are finite"),
    ],
)
def test_scores_of_lists_lie_between_the_bounds(scores, bounds, message):
    present = torch.ones(1, 3, dtype=torch.bool)
    told = contextlib.nullcontext() if message is None else pytest.raises(UserError, match=message)
    with told:
        check_lists(present, torch.tensor([scores]), *bounds)


def test_lists_have_as_many_responses_as_a_loss_needs():
    scores, present = torch.zeros(2, 3), torch.tensor([[True, True, True], [True, False, False]])
    with pytest.raises(UserError, match="at least 2 responses with a scored token"):
        check_lists(present, scores)
    check_lists(present, scores, least=1)
    with pytest.raises(UserError, match="at least 1 response with"):
        check_lists(present & False, scores, least=1)
    check_lists(present.to("meta"), scores.to("meta"))  # values that cannot be read


def test_the_paths_of_trees():
    mask = torch.ones(2, 6, 3, dtype=torch.bool)
    mask[1, 5] = False
    parents = torch.tensor([[-1, 0, 1, 0, -1, 4], [-1, 0, 1, 2, 3, -1]])
    on, leaf = paths(SimpleNamespace(mask=mask, parents=parents))
    known = [[0], [0, 1], [0, 1, 2], [0, 3], [4], [4, 5]]
    assert [row.nonzero().flatten().tolist() for row in on[0]] == known
    assert [row.nonzero().flatten().tolist() for row in on[1, :5]] == [
        list(range(k + 1)) for k in range(5)
    ]
    assert leaf.tolist() == [[False, False, True, True, False, True], [False] * 4 + [True, False]]
    on, leaf = paths(SimpleNamespace(mask=mask))  # flat lists
    assert on.equal(torch.eye(6).bool().expand_as(on)) and leaf.equal(mask.any(-1))
