"""Blanking by syntax tree, and the lines that give a blank away."""

import pytest
import torch

from classroom import blank
from data import UserError

SOURCE = '''"""A file."""

import torch


def scale(
    x,
    by=2.0,  # a factor
):
    # the answer is a product
    return x * by


def loss(logps, ref_logps, batch, cfg):
    """Shapes, and

    nothing else.
    """
    # the sum over tokens
    ratio = (logps - ref_logps).sum(-1)  # (B, K)
    z = cfg.beta * (
        ratio[:, 0]
        - ratio[:, 1]  # the margin
    )
    return -z, {}


class Model:
    def forward(self, x):
        """x"""
        y = x + self.bias
        return y
'''


def lines_of(text):
    return [line.strip() for line in text.splitlines()]


def test_a_body_goes_with_its_comments_and_signature_and_docstring_stay():
    text = blank.blanked(SOURCE, blank.targets("loss"))
    assert 'raise NotImplementedError("your turn: loss")' in lines_of(text)
    assert "nothing else." in text and "def loss(logps, ref_logps, batch, cfg):" in text
    for gone in ("the sum over tokens", "ratio", "the margin", "(B, K)", "return -z"):
        assert gone not in text
    assert "return x * by" in text and "y = x + self.bias" in text
    with pytest.raises(NotImplementedError, match="your turn: loss"):
        names = {}
        exec(text, names)
        names["loss"](1, 2, 3, 4)


def test_a_function_without_docstring_keeps_its_signature_of_several_lines():
    text = blank.blanked(SOURCE, blank.targets("scale"))
    assert "by=2.0,  # a factor" in text and "product" not in text and "x * by" not in text


def test_comments_stay_on_request():
    text = blank.blanked(SOURCE, blank.targets("loss"), keep_comments=True)
    for kept in ("# the sum over tokens", "# (B, K)", "# the margin"):
        assert kept in lines_of(text)
    assert "ratio[:, 0]" not in text


def test_the_right_side_of_one_assignment_goes():
    text = blank.blanked(SOURCE, blank.targets("loss:2"))
    assert 'z = your_turn("loss:2")' in lines_of(text) and "the margin" not in text
    assert "ratio = (logps - ref_logps).sum(-1)  # (B, K)" in text and blank.IMPORT in text
    compile(text, "x", "exec")
    kept = blank.blanked(SOURCE, blank.targets("loss:2"), keep_comments=True)
    assert 'z = your_turn("loss:2")  # the margin' in kept


TABLE = """import torch


def loss(h, tau, variant):
    losses = {
        "ipo": lambda: (h - 1 / (2 * tau)).square(),  # the target
        "hinge": lambda: (
            (1 - h).clamp(min=0)  # RSO
        ),
        "flat": h * tau,
    }
    return losses[variant]()
"""


def test_one_entry_of_a_dict_goes_and_the_others_still_run():
    text = blank.blanked(TABLE, blank.targets("loss:ipo,loss:hinge"))
    assert '"ipo": lambda: your_turn("loss:ipo"),' in lines_of(text) and blank.IMPORT in text
    assert "the target" not in text and "clamp" not in text
    names = {}
    exec(text, names)
    for variant in ("ipo", "hinge"):
        with pytest.raises(NotImplementedError, match=f"your turn: loss:{variant}"):
            names["loss"](torch.ones(2), 0.5, variant)
    text = blank.blanked(TABLE, blank.targets("loss:flat"))
    assert '"flat": your_turn("loss:flat"),' in lines_of(text)
    with pytest.raises(UserError, match="loss has no dict with a key kto"):
        blank.blanked(TABLE, blank.targets("loss:kto"))


def test_a_blanked_entry_is_found_in_another_lambda():
    code = blank.code_of(TABLE, blank.targets("loss:ipo,loss:flat"))
    assert code == ["(h - 1 / (2 * tau)).square()", "h * tau"]
    other = "def f(h, tau):\n    return lambda: (h - 1 / (2 * tau)).square()\n"
    assert blank.leaks(code, {"a.py": other}) == [("a.py", 2, code[0])]
    assert blank.leaks(code, {"a.py": "x = h * tau\n"}) == [("a.py", 1, code[1])]


LAYOUTS = """import torch


def loss(h, tau, sign="#", colon=":"):
    margin = (
        # the answer is a quotient
        h / tau  # and nothing else
    )
    scaled = \\
        h * tau
    table = {
        "hash": h + len("# no comment") + tau, "next": "#",  # a sum
        "below":
            # a difference
            h - tau,
        "lambda": lambda: (
            # a power
            h
            ** tau
            # of the margin
        ),
    }
    (named, é) = h * tau, "é" + sign
    return table["lambda"](), colon, margin, scaled
"""


@pytest.mark.parametrize(
    "name, line, gone, comment",
    [
        (
            "1",
            'margin = your_turn("loss:1")',
            ("quotient", "h / tau", "nothing else"),
            "  # the answer is a quotient  # and nothing else",
        ),
        ("2", 'scaled = your_turn("loss:2")', ("\\", "scaled = h"), ""),
        (
            "hash",
            '"hash": your_turn("loss:hash"), "next": "#",',
            ("no comment", "a sum"),
            "  # a sum",
        ),
        (
            "next",
            '"hash": h + len("# no comment") + tau, "next": your_turn("loss:next"),',
            ("a sum",),
            "  # a sum",
        ),
        (
            "below",
            '"below": your_turn("loss:below"),',
            ("a difference", "h - tau"),
            "  # a difference",
        ),
        (
            "lambda",
            '"lambda": lambda: your_turn("loss:lambda"),',
            ("a power", "of the margin"),
            "  # a power  # of the margin",
        ),
        ("4", '(named, é) = your_turn("loss:4")', ('"é"',), ""),
    ],
)
def test_a_value_goes_whatever_its_layout(name, line, gone, comment):
    """It may begin on the next line, hold a "#", stand in parentheses, or beside another one."""
    text = blank.blanked(LAYOUTS, blank.targets(f"loss:{name}"))
    compile(text, "x", "exec")
    assert line in lines_of(text) and not [words for words in gone if words in text]
    kept = blank.blanked(LAYOUTS, blank.targets(f"loss:{name}"), keep_comments=True)
    compile(kept, "x", "exec")
    assert line + comment in lines_of(kept)


def test_several_values_on_a_line_go_and_a_part_of_another_is_refused():
    text = blank.blanked(LAYOUTS, blank.targets("loss:hash,loss:next,loss:below"))
    assert '"hash": your_turn("loss:hash"), "next": your_turn("loss:next"),' in lines_of(text)
    for both in ("loss,loss:1", "loss:3,loss:below"):
        with pytest.raises(UserError, match=f"{both}: one of them is a part of the other"):
            blank.blanked(LAYOUTS, blank.targets(both))


def test_a_string_in_a_signature_ends_nothing():
    text = blank.blanked(LAYOUTS, blank.targets("loss"))
    assert lines_of(text)[3:] == [
        'def loss(h, tau, sign="#", colon=":"):',
        'raise NotImplementedError("your turn: loss")',
    ]


def test_a_method_of_a_class_is_named_with_its_class():
    text = blank.blanked(SOURCE, blank.targets("Model.forward"))
    assert 'raise NotImplementedError("your turn: Model.forward")' in lines_of(text)
    assert "self.bias" not in text


@pytest.mark.parametrize("text", ["", "loss:", "loss:0", "loss:-1", ":2", "loss,,gap"])
def test_a_target_that_is_none_is_refused(text):
    with pytest.raises(UserError, match="expected a function"):
        blank.targets(text)


def test_what_is_not_in_the_file_is_refused():
    with pytest.raises(UserError, match="no function gap"):
        blank.blanked(SOURCE, blank.targets("gap"))
    with pytest.raises(UserError, match="loss has 2 assignments, not 3"):
        blank.blanked(SOURCE, blank.targets("loss:3"))


def test_a_blanked_line_elsewhere_is_found_whatever_its_layout():
    code = blank.code_of(SOURCE, blank.targets("loss"))
    assert "ratio = (logps - ref_logps).sum(-1)" in code
    other = "def f(logps, ref_logps):\n    ratio = (\n        logps - ref_logps\n    ).sum(-1)\n"
    assert blank.leaks(code, {"a.py": other}) == [("a.py", 2, code[0])]
    assert blank.leaks(code, {"a.py": "ratio = 1\n"}) == []
    only = blank.code_of(SOURCE, blank.targets("loss:2"))
    assert only == ["z = cfg.beta * (ratio[:, 0] - ratio[:, 1])"]
