"""docs/worlds.md: its table is that of the worlds, and the world that it builds runs."""

import importlib
import re
from pathlib import Path

import pytest
import torch

from lab import Lab, Settings
from lab.settings import worlds
from methods import dpo
from tests.toy.test_world import made

TEXT = (Path(__file__).parents[2] / "docs" / "worlds.md").read_text(encoding="utf-8")
ROW = re.compile(
    r"\| \[(\w+)\]\(#\1\) \| (\w+) \| (\w+).*? \| ([\d,]+) \| (\w+) \| (\d+), (\d+) \|"
)


@pytest.fixture
def own(tmp_path):
    """The file of the world that the document builds."""
    path = tmp_path / "sorting.py"
    path.write_text(re.search(r"```python\n(.*?)```", TEXT, re.S)[1], encoding="utf-8")
    return str(path)


VECTORS = re.compile(r"\| \[(\w+)\]\(#\1\) \| (\d+) \| (\d+) \|")


def settings(path, **changes):
    small = dict(base_steps=60, prompts=64, steps=4, batch_size=16, eval_size=32)
    return Settings(world=path, **small | changes)


def example_of(name):
    """The example in the section of a world."""
    section = re.split("\n##? ", TEXT.split(f"\n## {name}\n")[1])[0]
    (example,) = re.findall(r"\n    (.+)\n", section)
    return example


def test_every_world_has_a_row_and_a_section_with_the_example_of_its_docstring():
    rows = ROW.findall(TEXT)
    vectors = VECTORS.findall(TEXT)
    assert sorted(row[0] for row in [*rows, *vectors]) == worlds()
    for name, features, classes in vectors:
        assert (made(name).features, made(name).classes) == (int(features), int(classes)), name
        assert f"\n    {example_of(name)}\n" in importlib.import_module(f"toy.{name}").__doc__
    for name, kind, model, parameters, steps, prompts, align_steps in rows:
        world = made(name)
        fresh = world.model()
        assert (world.kind, type(fresh).__name__) == (kind, model), name
        count = sum(p.numel() for p in fresh.parameters())
        assert count == int(parameters.replace(",", "")), (name, count)
        assert steps == (str(world.pretrain["steps"]) if world.pretrain else "none")
        assert (world.align["prompts"], world.align["steps"]) == (int(prompts), int(align_steps))
        assert f"\n    {example_of(name)}\n" in importlib.import_module(f"toy.{name}").__doc__


def test_the_world_of_the_document_rewards_as_it_says(own):
    world = Lab(settings(own), quiet=True).world
    texts = [" 1 3 4", " 3 1 4", " 1 3", "", " 1 3 4 9 9", "sorted !?"]
    values = world.reward(["sort 4 1 3:"] * len(texts), texts).tolist()
    assert values == pytest.approx([1, 1 / 3, 2 / 3 - 1, -3, 1 - 2, -1])
    ids = [world.tokenizer.encode(text) for text in texts]
    assert world.reward(["sort 4 1 3:"] * len(texts), ids).tolist() == values


@pytest.mark.slow
def test_the_world_of_the_document_runs_and_repeats_itself(own):
    ends = []
    for _ in range(2):
        lab = Lab(settings(own), quiet=True)
        policy = dpo.run(lab, dpo.Config())
        ends.append(torch.cat([p.detach().flatten() for p in policy.parameters()]))
        assert lab.evaluate(policy)["kl"] > 0
    assert torch.equal(*ends)
