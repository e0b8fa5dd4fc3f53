"""What holds for every method file: the same parts in the same order, shared scaffold word for word, no imports across."""

import ast
import dataclasses
import importlib
import inspect
import re
from pathlib import Path

import pytest

import lab
from lab import flags, settings, store
from lab.settings import title

FILES = {name: Path(flags.load_method(name).__file__).read_text() for name in settings.methods()}


@pytest.mark.parametrize("name", FILES)
def test_parts_and_their_order(name):
    module, tree = flags.load_method(name), ast.parse(FILES[name])
    order = [n.name for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))]
    parts = [n for n in order if n in ("Config", "loss", "run")]
    assert parts == ["Config", "loss", "run"]
    assert re.fullmatch(r"\S.* - .*\(20\d\d\), arXiv:\d{4}\.\d{5}", title(module))
    assert re.search("differently from the paper|Differences from the paper", module.__doc__)
    paper = flags.declared(name).paper
    assert paper.family and set(paper.worlds) <= {"text", "images", "table"}
    assert set(paper.defaults) <= {f.name for f in dataclasses.fields(lab.Settings)}
    assert list(inspect.signature(module.loss).parameters) == ["logps", "ref_logps", "batch", "cfg"]
    assert list(inspect.signature(module.run).parameters) == ["lab", "cfg"]


CLAIMS = sorted(
    path.stem
    for path in Path(store.HERE, "claims").glob("[a-z]*.py")
    if "CLAIMS" in path.read_text()
)


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_data_beside_one_measurement(name):
    module = importlib.import_module(f"claims.{name}")
    assert list(inspect.signature(module.measure).parameters) == ["lab"] and module.__doc__
    assert [claim.kind for claim in module.CLAIMS].count("primary") == 1
    assert len({claim.text for claim in module.CLAIMS}) == len(module.CLAIMS)


@pytest.mark.parametrize("name", FILES)
def test_imports_go_one_way(name):
    for node in ast.walk(ast.parse(FILES[name])):
        names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
        for imported in names + ([node.module or ""] if isinstance(node, ast.ImportFrom) else []):
            assert imported.split(".")[0] not in ("methods", "train", "lab", "report"), (
                f"{name} imports {imported}"
            )


def test_shared_functions_are_word_for_word_the_same():
    own = {"loss", "run", "claim", "evaluate", "rollout", "measure", "__post_init__"}
    seen = {}
    for name, text in FILES.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in own:
                source = ast.get_source_segment(text, node)
                first = seen.setdefault(node.name, (name, source))
                assert first[1] == source, f"{node.name} differs between {first[0]} and {name}"
    assert seen


@pytest.mark.parametrize("name", FILES)
def test_losses_upcast_by_promotion_and_never_synchronise(name):
    tree = ast.parse(FILES[name])
    loss = next(n for n in tree.body if isinstance(n, ast.FunctionDef) and n.name == "loss")
    source = ast.get_source_segment(FILES[name], loss)
    assert ".float()" not in source and ".item()" not in source
    assert re.search(r"promote_types|pair\(|upcast\(", FILES[name])


def test_rdpo_differs_from_dpo_by_its_paper():
    """`diff methods/dpo.py methods/rdpo.py` shows the paper: few lines of the whole file differ."""
    import difflib

    dpo, rdpo = (FILES[name].splitlines() for name in ("dpo", "rdpo"))
    changed = [line for line in difflib.ndiff(dpo, rdpo) if line[:2] in ("+ ", "- ")]
    assert len(changed) < 45
