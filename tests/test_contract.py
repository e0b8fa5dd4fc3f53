"""The contract of method files, tested over all of them.

The variants of a Config (CASES) and the inputs of its loss (INPUTS) are in
tests/methods/test_NAME.py. If the loss of a row depends on the other rows, that file has a function
coupled(cfg), which says for which Config it does.
"""

import ast
import copy
import dataclasses
import difflib
import functools
import importlib
import inspect
import itertools
import math
import re
import statistics
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from classroom import blank, properties
from classroom.properties import mapped
from data import Paper, UserError
from lab import settings
from lab.settings import Settings
from tests import builders

ROOT = Path(settings.__file__).parents[1]
NAMES = settings.methods() + ["_template"] * (ROOT / "methods/_template.py").exists()
SOURCES = {name: (ROOT / f"methods/{name}.py").read_text() for name in NAMES}
CLAIMS = sorted(path.stem for path in ROOT.glob("claims/[a-z]*.py"))
FAMILIES = ("pairs", "lists", "online", "images", "analysis", "beyond", "baseline")
NEEDS = ("pairs or lists", "lists", "demonstrations", "verifier", "reward", "criteria", "points")


def module_of(name):
    return importlib.import_module(f"methods.{name}")


LOSSES = [name for name in NAMES if "loss" in module_of(name).PAPER.core]


def beside(name):
    """CASES, INPUTS and coupled of a method; the template is tested as a loss on pairs."""
    if name == "_template":
        return SimpleNamespace(CASES=[{}], INPUTS=builders.pairs)
    return importlib.import_module(f"tests.methods.test_{name}")


def coupled(name, cfg):
    """Whether the loss of a row depends on the other rows of its batch."""
    says = getattr(beside(name), "coupled", None)
    return bool(says and says(cfg))


@functools.cache
def accepted(name, every=False):
    """[(cfg, items that the loss takes under it)]: one item of each kind, or every one."""
    module, tests = module_of(name), beside(name)
    items = [item for item in tests.INPUTS() if not item[0].is_meta]
    items = items if every else {kind(item): item for item in reversed(items)}.values()

    def takes(cfg, item):
        try:
            module.loss(*item, cfg)
        except UserError:
            return False
        except (AttributeError, NameError, TypeError):  # an input without reference or column
            return False
        return True

    cfgs = [module.Config(**fields) for fields in tests.CASES]
    return [(cfg, [item for item in items if takes(cfg, item)]) for cfg in cfgs]


def kind(item):
    """A value that items of one kind share; one of them represents all."""
    logps, ref_logps, batch = item
    absent = batch.mask.any(-1).logical_not().any().item()
    at_reference = ref_logps is not None and not moved(item)
    return logps.dtype, logps.shape, ref_logps is None, absent, at_reference, *vars(batch)


def moved(item):
    """Whether no row is at the reference, where rewards tie and a loss may have a kink."""
    logps, ref_logps, _ = item
    return ref_logps is not None and (logps != ref_logps).flatten(1).any(1).all()


def each(name):
    """(loss, cfg, item) for every Config and every item that it takes."""
    loss = module_of(name).loss
    for cfg, items in accepted(name):
        assert items, f"{cfg} takes none of the inputs"
        yield from ((loss, cfg, cast(fresh(item), item[0].dtype)) for item in items)


def fresh(item):
    """A copy of an item that shares nothing with it, its log-probs a leaf with gradient."""
    logps, ref_logps, batch = item
    logps = logps.detach().clone().requires_grad_()
    ref_logps = None if ref_logps is None else ref_logps.detach().clone()
    columns = {name: value.detach().clone() for name, value in vars(batch).items()}
    return logps, ref_logps, SimpleNamespace(**columns)


def cast(item, dtype):
    """An item whose log-probs have another dtype; its columns are in float32 or better."""
    logps, ref_logps, batch = item
    ref_logps = None if ref_logps is None else ref_logps.to(dtype)
    wide = torch.promote_types(dtype, torch.float32)
    columns = {
        name: value.to(wide) if value.is_floating_point() else value
        for name, value in vars(batch).items()
    }
    return logps.detach().to(dtype).requires_grad_(), ref_logps, SimpleNamespace(**columns)


def gradient(losses, logps):
    """The gradient of the sum of the losses; 0 if the loss is constant."""
    if not losses.requires_grad:
        return torch.zeros_like(logps)
    (slope,) = torch.autograd.grad(losses.sum(), logps, allow_unused=True)
    return torch.zeros_like(logps) if slope is None else slope


def close(actual, expected):
    """Assert that two tensors are equal up to rounding."""
    rtol = 1e-9 if expected.dtype == torch.float64 else 1e-4
    torch.testing.assert_close(actual, expected, rtol=rtol, atol=rtol / 10, equal_nan=True)


# ---- the file


@pytest.mark.parametrize("name", NAMES)
def test_a_file_has_its_parts_in_order_and_nothing_runs_at_import(name):
    module, tree = module_of(name), ast.parse(SOURCES[name])
    defined = [node.name for node in tree.body if hasattr(node, "name")]
    assigned = [node.targets[0].id for node in tree.body if isinstance(node, ast.Assign)]
    assert assigned[0] == "PAPER" and isinstance(module.PAPER, Paper)
    assert all(value.isupper() for value in assigned)
    kinds = (ast.Import, ast.ImportFrom, ast.Assign, ast.FunctionDef, ast.ClassDef)
    for node in tree.body[1:]:
        assert isinstance(node, kinds), f"line {node.lineno} does something at import"
    core = list(dict.fromkeys(part.split(".")[0] for part in module.PAPER.core))
    parts = [part for part in defined if part in ("Config", *core, "run")]
    assert parts == ["Config", *core, "run"]
    first = next(node for node in tree.body if getattr(node, "name", "") == "Config")
    paper = next(node for node in tree.body if isinstance(node, ast.Assign))
    assert paper.lineno < first.lineno
    assert list(inspect.signature(module.run).parameters) == ["lab", "cfg"]
    if "loss" in core:
        order = ["logps", "ref_logps", "batch", "cfg"]
        assert list(inspect.signature(module.loss).parameters) == order


@pytest.mark.parametrize("name", NAMES)
def test_a_docstring_names_the_paper_and_the_differences_from_it(name):
    module = module_of(name)
    title = settings.title(module)
    if module.PAPER.family != "baseline" and name != "_template":
        assert re.fullmatch(r"\S.* - .*\(20\d\d\), arXiv:\d{4}\.\d{5}", title)
        assert "Differences from the paper" in module.__doc__
    assert len(module.__doc__.split()) <= 200  # equations and commands included
    assert re.search(r"^    python train.py --method \S+", module.__doc__, re.MULTILINE)
    assert max(len(line) for line in SOURCES[name].splitlines()) <= 100


@pytest.mark.parametrize("name", NAMES)
def test_what_a_file_says_about_itself_is_known(name):
    module, run_settings = module_of(name), {field.name for field in dataclasses.fields(Settings)}
    paper, fields = module.PAPER, {field.name for field in dataclasses.fields(module.Config)}
    assert paper.family in FAMILIES and paper.needs in NEEDS
    assert paper.worlds and set(paper.worlds) <= {"text", "images", "table", "vectors"}
    assert ("vectors" in paper.worlds) == (paper.needs == "points")
    assert "loss" in paper.core or paper.family == "beyond"
    assert set(paper.core) <= set(blank.functions(SOURCES[name]))
    assert set(paper.ignores) | set(paper.defaults) <= run_settings
    assert not set(paper.ignores) & (set(paper.defaults) | set(paper.demo))
    assert set(paper.demo) <= (run_settings | fields) - set(paper.defaults)
    assert not fields & run_settings, "a field has the name of a run setting"
    assert module.Config.__dataclass_params__.frozen
    module.Config()  # every field has a default


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_never_waits_for_the_device_to_read_a_number(name):
    tree = ast.parse(SOURCES[name])
    loss = next(node for node in tree.body if getattr(node, "name", "") == "loss")
    attributes = {node.attr for node in ast.walk(loss) if isinstance(node, ast.Attribute)}
    assert not attributes & {"item", "tolist", "cpu", "cuda", "numpy", "float", "double", "half"}


def test_functions_of_one_name_are_word_for_word_the_same():
    own = {"loss", "run", "evaluate", "rollout", "prepare", "score", "measure"}
    seen = {}
    for name, text in SOURCES.items():
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef) and node.name not in own:
                source = ast.get_source_segment(text, node)
                first, same = seen.setdefault(node.name, (name, source))
                assert same == source, f"{node.name} differs between {first} and {name}"


def test_a_file_differs_from_dpo_by_its_paper():
    """`diff methods/dpo.py methods/NAME.py` shows the paper's contribution and little else.

    In the median over the methods on pairs, at most 60 lines of code are removed or added. A line
    that is changed is both; docstrings and blank lines do not count, and the template is left out.
    """
    pairs = [name for name in NAMES if module_of(name).PAPER.family == "pairs"]
    lines, code = {}, {}
    for name in set(pairs) - {"dpo", "_template"}:
        both = [SOURCES[file] for file in ("dpo", name)]
        lines[name] = changed(*(text.splitlines() for text in both))
        code[name] = changed(*map(code_lines, both))
    print(sorted(lines.items()), sorted(code.items()))
    assert lines["rdpo"] < 45
    assert statistics.median(code.values()) <= 60, code


def code_lines(text):
    """The lines of a file without docstrings and blank lines."""
    left_out = set()
    for node in ast.walk(ast.parse(text)):
        kinds = ast.Module | ast.ClassDef | ast.FunctionDef
        if isinstance(node, kinds) and ast.get_docstring(node) is not None:
            left_out |= {*range(node.body[0].lineno, node.body[0].end_lineno + 1)}
    numbered = enumerate(text.splitlines(), 1)
    return [line for number, line in numbered if line.strip() and number not in left_out]


def changed(a, b):
    """The number of lines that are in one of two lists alone."""
    return sum(line[0] in "+-" for line in difflib.ndiff(a, b))


# ---- the whole house

# {folder: the modules of this project that its files may import}; lab and tests are not checked
LAYERS = {
    "data.py": set(),
    "diffusion.py": {"data"},
    "nanomodel.py": {"data", "diffusion"},
    "toy": {"data", "diffusion", "nanomodel", "toy"},
    "methods": {"data", "diffusion", "nanomodel", "toy"},
    "claims": {"data", "diffusion", "nanomodel", "toy", "methods", "claims", "lab"},
}
OURS = {"data", "diffusion", "nanomodel", "toy", "methods", "claims", "lab", "train", "bench"}
OURS |= {"classroom"}
FILES = [
    path.relative_to(ROOT).as_posix()
    for pattern in ("*.py", "toy/*.py", "methods/*.py", "claims/*.py", "lab/*.py", "classroom/*.py")
    for path in sorted(ROOT.glob(pattern))
]


DOORS = {("nanomodel.py", "lab.hub")}


def imports(tree):
    """(line, dotted name) of all that a tree imports, inside functions too."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield from ((node.lineno, f"{node.module}.{alias.name}") for alias in node.names)


@pytest.mark.parametrize("file", [file for file in FILES if file.split("/")[0] in LAYERS])
def test_imports_go_one_way(file):
    allowed = LAYERS[file.split("/")[0]]
    for line, name in imports(ast.parse((ROOT / file).read_text())):
        first, door = name.split(".")[0], ".".join(name.split(".")[:2])
        if (file, door) in DOORS:
            continue
        assert first not in OURS - allowed, f"{file}:{line} imports {name}"


@pytest.mark.parametrize("file", FILES)
def test_no_private_name_is_used_outside_its_package(file):
    tree = ast.parse((ROOT / file).read_text())
    modules = set()  # names of our modules
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            source = getattr(node, "module", None) or ""
            for alias in node.names:
                if (source or alias.name).split(".")[0] in OURS:
                    assert not alias.name.startswith("_"), f"{file}:{node.lineno} {alias.name}"
                    modules.add(alias.asname or alias.name)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match("_[a-z]", node.attr):
            owner = node.value.id if isinstance(node.value, ast.Name) else None
            assert owner not in modules, f"{file}:{node.lineno} {owner}.{node.attr}"


# ---- the claims


@pytest.mark.parametrize("name", CLAIMS)
def test_claims_are_data_beside_one_measurement(name):
    module = importlib.import_module(f"claims.{name}")
    assert list(inspect.signature(module.measure).parameters) == ["lab"] and module.__doc__
    assert [claim.kind for claim in module.CLAIMS].count("primary") == 1
    assert len({claim.text for claim in module.CLAIMS}) == len(module.CLAIMS)


# ---- values of a loss


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_returns_one_number_per_row_and_detached_metrics(name):
    for loss, cfg, item in each(name):
        losses, metrics = loss(*item, cfg)
        assert losses.shape == item[0].shape[:1], cfg
        assert isinstance(metrics, dict)
        for key, value in metrics.items():
            assert not value.requires_grad and value.shape == (), (cfg, key)


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_computes_in_float32_or_better(name):
    for loss, cfg, item in each(name):
        for dtype in (torch.bfloat16, torch.float16, torch.float32, torch.float64):
            losses, metrics = loss(*cast(item, dtype), cfg)
            wide = torch.promote_types(dtype, torch.float32)
            assert losses.dtype == wide, (cfg, dtype)


@pytest.mark.parametrize("name", LOSSES)
def test_half_precision_is_upcast_before_the_first_operation(name):
    for loss, cfg, item in each(name):
        low = cast(item, torch.bfloat16)
        losses, _ = loss(*low, cfg)
        expected, _ = loss(*cast(low, torch.float32), cfg)
        assert torch.equal(losses, expected), cfg


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_a_loss_is_finite_at_margins_of_ten_thousand(name, dtype):
    for loss, cfg, (logps, ref_logps, batch) in each(name):
        for first, last in ((-1e4, 0.0), (0.0, -1e4), (-1e4, -1e4)):
            far = torch.zeros_like(logps).detach()
            far[:, 0, 0], far[:, -1, 0] = first, last
            item = cast(((logps + far) * batch.mask, ref_logps, batch), dtype)
            losses, metrics = loss(*item, cfg)
            assert losses.isfinite().all(), (cfg, first, last)
            assert gradient(losses, item[0]).isfinite().all(), (cfg, first, last)
            assert all(value.isfinite() for value in metrics.values()), (cfg, first, last)


class Constants:
    """Replays what `detach` returned at the first call, so that a finite difference sees it fixed.

    A loss that weights its rows by detached numbers is then the integral of its own gradient.
    """

    def __init__(self, monkeypatch, loss):
        self.monkeypatch, self.loss, self.values = monkeypatch, loss, []

    def __call__(self, *arguments):
        plain, place, known = torch.Tensor.detach, itertools.count(), list(self.values)

        def detach(tensor):
            if known:
                return known[next(place)]
            self.values.append(plain(tensor).clone())
            return self.values[-1]

        with self.monkeypatch.context() as patch:
            patch.setattr(torch.Tensor, "detach", detach)
            return self.loss(*arguments)


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_is_that_of_finite_differences(name, monkeypatch):
    tried = 0
    for cfg, items in accepted(name):
        exact = [item for item in items if item[0].dtype == torch.float64 and moved(item)]
        few = min(exact, key=lambda item: item[0][0].numel())
        logps, ref_logps, batch = mapped(few, lambda x: x[:2])
        loss = Constants(monkeypatch, module_of(name).loss)

        def losses(x):
            return loss(x * batch.mask, ref_logps, batch, cfg)[0]

        if losses(logps).requires_grad:
            assert torch.autograd.gradcheck(losses, logps), cfg
            tried += 1
    assert tried


# ---- what a loss does not depend on


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_keeps_no_state_and_leaves_its_arguments_alone(name):
    module = module_of(name)
    known = {key: value for key, value in vars(module).items() if key.isupper() and key != "F"}
    before = copy.deepcopy(known)
    for cfg, items in accepted(name):
        losses = [module.loss(*fresh(item), cfg)[0] for item in items]
        for item, expected in reversed(list(zip(items, losses))):
            used = fresh(item)
            again, _ = module.loss(*used, cfg)
            torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)
            for here, there in zip(tensors(used), tensors(item)):
                assert torch.equal(here, there), cfg
    assert known == before


def tensors(item):
    logps, ref_logps, batch = item
    return [x for x in (logps, ref_logps, *vars(batch).values()) if x is not None]


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_padding_changes_nothing(name):
    """More tokens at the end of all responses; more absent responses where a list may be short."""
    lists = any(item[0].shape[1] > 2 for _, items in accepted(name) for item in items)
    for loss, cfg, item in each(name):
        losses, metrics = loss(*item, cfg)
        slope = gradient(losses, item[0])
        shape, more = item[2].mask.shape, (0, 2) if lists else (0, 0)

        def wide(x):
            if x.shape == shape:
                return torch.nn.functional.pad(x, (0, 3, *more))
            if lists and x.shape[:2] == shape[:2]:  # (B, K) and (B, K, ...)
                return torch.cat([x, torch.zeros_like(x[:, :1]).expand(-1, 2, *x.shape[2:])], 1)
            return x

        padded = mapped(item, wide)
        if hasattr(padded[2], "parents"):
            padded[2].parents[:, shape[1] :] = -1
        others, other_metrics = loss(*padded, cfg)
        close(others, losses)
        close(
            gradient(others, padded[0])[:, : shape[1], : shape[2]] * item[2].mask,
            slope * item[2].mask,
        )
        for key, value in metrics.items():
            close(other_metrics[key], value)


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_rows_in_another_order_have_the_same_losses(name):
    for loss, cfg, item in each(name):
        order = torch.randperm(len(item[0]), generator=torch.Generator().manual_seed(0))
        losses, metrics = loss(*item, cfg)
        others, other_metrics = loss(*mapped(item, lambda x: x[order]), cfg)
        if coupled(name, cfg):  # a coupled loss may belong to a position instead of a row
            close(others.sort().values, losses.sort().values)
        else:
            close(others, losses[order])
        for key, value in metrics.items():
            close(other_metrics[key], value)


@pytest.mark.parametrize("name", LOSSES)
def test_a_row_depends_on_the_others_only_where_its_method_says_so(name):
    for cfg, items in accepted(name, every=True):
        differ = False
        for item in items:
            loss = module_of(name).loss
            whole = loss(*item, cfg)[0].detach()
            parts = [mapped(item, lambda x: x[part]) for part in (slice(0, 2), slice(2, None))]
            try:
                parts = torch.cat([loss(*part, cfg)[0].detach() for part in parts])
            except UserError:  # the part has nothing to learn from
                continue
            rtol = 1e-9 if whole.dtype == torch.float64 else 1e-4
            differ |= not torch.allclose(parts, whole, rtol=rtol, atol=rtol / 10)
        assert differ == coupled(name, cfg), cfg


@pytest.mark.slow
@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_reads_no_value_on_a_device_that_would_have_to_wait(name):
    for cfg, items in accepted(name):
        shapes = {item[0].shape: item for item in items if item[1] is not None}
        for item in shapes.values():
            logps, ref_logps, batch = builders.elsewhere(item)
            losses, metrics = module_of(name).loss(logps.requires_grad_(), ref_logps, batch, cfg)
            assert losses.is_meta and losses.shape == logps.shape[:1], cfg
            assert all(value.is_meta for value in metrics.values()), cfg


EVERY = {"padding", "prompt", "arguments", "no state", "finite"}


@pytest.mark.parametrize("name", LOSSES)
def test_a_loss_has_the_properties_that_handouts_test(name):
    """The same list makes the visible tests of an assignment (classroom/properties.py)."""
    module = module_of(name)
    found = set()
    for cfg, items in accepted(name):
        exact = [fresh(x) for x in items if x[0].dtype == torch.float64 and moved(x)]
        if exact:
            found = set(properties.holding(module, exact[:1], cfg))
            assert EVERY <= found, (cfg, EVERY - found)
    assert found or name == "sft"


# ---- what is refused


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_not_pairs_is_refused_by_a_loss_on_pairs(name):
    if any(item[0].shape[1] != 2 for _, items in accepted(name) for item in items):
        return  # a loss on lists
    for loss, cfg, (logps, ref_logps, batch) in each(name):
        if ref_logps is None:
            continue
        three = [torch.cat([x, x[:, :1]], 1) for x in (logps, ref_logps, batch.mask)]
        one = [x[:, :1] for x in (logps, ref_logps, batch.mask)]
        flat = [x[:, 0] for x in (logps, ref_logps, batch.mask)]
        for x, ref, mask in (three, one, flat):
            columns = vars(batch) | {"mask": mask}
            with pytest.raises(UserError, match="pairs") as error:
                loss(x, ref, SimpleNamespace(**columns), cfg)
            assert "\n" not in str(error.value)


def checked(name, fields):
    """{field: where it may lie} that the Config of a method checks with these fields."""
    module, seen = module_of(name), {}
    plain = module.check_fields

    def recorder(cfg, **allowed):
        seen.update(allowed)
        return plain(cfg, **allowed)

    module.check_fields = recorder
    try:
        module.Config(**fields)
    finally:
        module.check_fields = plain
    return seen


def outside(where, whole):
    """Values outside an interval such as "[0, 0.5)", or that are not in a tuple of choices."""
    if isinstance(where, tuple):
        return ["no such thing", None, 0.123]
    low, high = (float(end) for end in where[1:-1].split(","))
    values = [math.nan, True, False, "1", [1]]
    step = 1 if whole else 0.125
    for end, sign, closed in ((low, -1, where[0] == "["), (high, 1, where[-1] == "]")):
        if math.isinf(end):
            values.append(end)
            continue
        values.append(math.inf * sign)
        beyond = end + sign * step
        values += [beyond, math.nextafter(end, math.inf * sign)]
        if not closed:
            values.append(end)
    values = [int(x) if whole and isinstance(x, float) and x.is_integer() else x for x in values]
    return values + [low + 0.5] * (whole and math.isfinite(low))


@pytest.mark.parametrize("name", NAMES)
def test_a_config_refuses_every_value_outside_its_intervals(name):
    module = module_of(name)
    kinds = {field.name: str(field.type) for field in dataclasses.fields(module.Config)}
    defaults = {field.name: field.default for field in dataclasses.fields(module.Config)}
    for fields in [{}, *beside(name).CASES]:
        for field, where in (checked(name, fields) if kinds else {}).items():
            if getattr(module.Config(**fields), field) is None:
                continue  # another variant reads it
            whole = "int" in kinds[field] and "float" not in kinds[field]
            for value in outside(where, whole):
                if value is None and defaults[field] is None:
                    continue  # None means the default
                with pytest.raises(UserError) as error:
                    module.Config(**fields | {field: value})
                    pytest.fail(f"{fields}: {field} = {value} is accepted, expected {where}")
                assert field in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", NAMES)
def test_a_config_accepts_the_closed_ends_of_its_intervals(name):
    module = module_of(name)
    kinds = {field.name: str(field.type) for field in dataclasses.fields(module.Config)}
    for field, where in (checked(name, {}) if kinds else {}).items():
        if isinstance(where, tuple) or getattr(module.Config(), field) is None:
            continue
        low, high = (float(end) for end in where[1:-1].split(","))
        for end, closed in ((low, where[0] == "["), (high, where[-1] == "]")):
            if closed:
                whole = "int" in kinds[field] and "float" not in kinds[field]
                module.Config(**{field: int(end) if whole else end})


@pytest.mark.parametrize("name", NAMES)
def test_every_number_and_every_choice_of_a_config_is_checked(name):
    module = module_of(name)
    fields = dataclasses.fields(module.Config)
    cases = [{}, *beside(name).CASES] if fields else []
    seen = {field for case in cases for field in checked(name, case)}
    chosen = re.findall(r'fill_variant\(\s*self, \w+(?:, "(\w+)")?', SOURCES[name])
    seen |= {field or "variant" for field in chosen}
    unchecked = {field.name for field in fields if "bool" not in str(field.type)} - seen
    assert not unchecked


@pytest.mark.parametrize("name", NAMES)
def test_a_config_refuses_an_unknown_choice_and_a_field_that_its_variant_does_not_read(name):
    module = module_of(name)
    for table, field in re.findall(r'fill_variant\(\s*self, (\w+)(?:, "(\w+)")?', SOURCES[name]):
        variants, field = getattr(module, table), field or "variant"
        with pytest.raises(UserError, match=field):
            module.Config(**{field: "no such variant"})
        for variant, read in variants.items():
            for other in {key for each in variants.values() for key in each} - set(read):
                default = next(each[other] for each in variants.values() if other in each)
                with pytest.raises(UserError, match=f"{other} = .* does nothing with {field}"):
                    module.Config(**{field: variant, other: 1.0 if default is None else default})
