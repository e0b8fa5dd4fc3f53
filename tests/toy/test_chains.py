"""Trees of solutions: steps end with a separator, and equal first steps are one node."""

from data import Tokenizer
from toy import arithmetic
from toy.chains import split_steps, tree


def test_a_tree_is_made_of_what_the_solutions_share():
    chains = [
        ([[1], [2], [3]], True),
        ([[1], [2], [4, 5]], True),
        ([[1], [6]], False),
        ([[1], [2], [3]], True),
    ]
    row = tree("x", chains, [1.0, 0.6, 0.3, 1.0])
    assert row["responses"] == [[1], [2], [3], [4, 5], [6]] and row["parents"] == [-1, 0, 1, 1, 0]
    assert row["ends"] == [False, False, True, True, False] and row["scores"] == [
        0.0,
        0.0,
        1.0,
        0.6,
        0.3,
    ]


def test_steps_end_with_their_separator():
    tokenizer = arithmetic.World().tokenizer
    ids = tokenizer.encode("7+8+0=15,4+5+1=10:105")
    assert [tokenizer.decode(step) for step in split_steps(ids, tokenizer)] == [
        "7+8+0=15,",
        "4+5+1=10:",
        "105",
    ]
    assert (
        split_steps([], tokenizer) == [[]] and sum(split_steps(ids[:9], tokenizer), []) == ids[:9]
    )
    assert split_steps(tokenizer.encode(":405"), tokenizer)[0] == tokenizer.encode(":")
    assert split_steps(tokenizer.encode("12"), tokenizer) == [tokenizer.encode("12")]


def test_a_separator_within_a_token_ends_a_step_too():
    tokenizer = Tokenizer.toy(["so", "it", ".\n", "is"])
    ids = tokenizer.encode("so.\nit is")
    steps = [tokenizer.decode(step) for step in split_steps(ids, tokenizer)]
    assert steps[0] == "so.\n" and "".join(steps) == "so.\nit is" and len(steps) == 2
