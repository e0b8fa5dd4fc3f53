"""What holds for every method file: the same parts in the same order, shared scaffold word for word, no imports across."""

import ast
import dataclasses
import inspect
import re
from pathlib import Path

import pytest

import lab
import train

FILES = {name: Path(train.load_method(name).__file__).read_text() for name in train.methods()}


@pytest.mark.parametrize("name", FILES)
def test_parts_and_their_order(name):
    module, tree = train.load_method(name), ast.parse(FILES[name])
    order = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    parts = [n for n in order if n in ("Config", "loss", "run", "claim")]
    assert parts == ["Config", "loss", "run", "claim"]
    assert re.match(r"\S.* - .*\(20\d\d\), arXiv:\d{4}\.\d{5}\n\n", module.__doc__)
    assert "differently from the paper" in module.__doc__
    assert module.FAMILY and set(module.KINDS) <= {"text", "images", "table"}
    assert set(module.DEFAULTS) <= {f.name for f in dataclasses.fields(lab.Settings)}
    assert list(inspect.signature(module.loss).parameters) == ["logps", "ref_logps", "batch", "cfg"]
    assert list(inspect.signature(module.run).parameters) == ["lab", "cfg"]
    assert list(inspect.signature(module.claim).parameters) == ["lab"] and module.claim.__doc__


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    for node in ast.walk(ast.parse(FILES[name])):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for imported in names + ([node.module or ""] if isinstance(node, ast.ImportFrom) else []):
            assert imported.split(".")[0] not in ("methods", "train", "lab", "report"), (
                f"{name} imports {imported}"
            )


def test_shared_functions_are_word_for_word_the_same():
    own = {"loss", "run", "claim", "evaluate", "__post_init__"}
    seen = {}
    for name, text in FILES.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in own:
                source = ast.get_source_segment(text, node)
                first = seen.setdefault(node.name, (name, source))
                assert first[1] == source, f"{node.name} differs between {first[0]} and {name}"
    assert "check_pairs" in seen


@pytest.mark.parametrize("name", FILES)
def test_losses_upcast_by_promotion_and_never_synchronise(name):
    tree = ast.parse(FILES[name])
    loss = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "loss")
    source = ast.get_source_segment(FILES[name], loss)
    assert ".float()" not in source and ".item()" not in source and "promote_types" in FILES[name]


def test_rdpo_differs_from_dpo_by_its_paper():
    """`diff methods/dpo.py methods/rdpo.py` shows the paper: in the code up to the end of `run`, few lines differ."""
    import difflib

    def code(name):
        text = FILES[name]
        return text[text.index("@dataclass") : text.index("return lab.align")].splitlines()

    changed = [
        line for line in difflib.ndiff(code("dpo"), code("rdpo")) if line[:2] in ("+ ", "- ")
    ]
    assert len(changed) < 30
