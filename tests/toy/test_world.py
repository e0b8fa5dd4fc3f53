"""The interface of worlds: every world is a World, and World explains what a world may set."""

import importlib
import inspect
import re

import pytest
import torch

from lab.report import write_picture
from lab.settings import worlds
from toy.world import World

PUBLIC = {name for name in vars(World) if not name.startswith("_")}


def made(name):
    return importlib.import_module(f"toy.{name}").World()


def test_the_modules_that_are_no_worlds_are_not_listed():
    assert len(worlds()) >= 9 and not {"world", "exact", "files"} & set(worlds())


@pytest.mark.parametrize("name", worlds())
def test_every_world_is_a_world_with_recipes_that_the_lab_knows(name):
    world = made(name)
    assert isinstance(world, World) and world.name == name
    assert world.kind in ("text", "images", "table", "vectors")
    assert (
        (world.kind == "text") == (world.tokenizer is not None) == (world.max_response is not None)
    )
    assert (world.kind in ("table", "vectors")) == (world.pretrain is None)
    assert world.key() is not None
    if world.kind == "vectors":
        assert world.features and world.classes and world.reward is None
        assert set(world.align) in (set(), {"steps", "lr", "batch_size"})
        return
    assert set(world.align) - {"k", "eval_size"} == {"prompts", "steps", "lr", "batch_size"}
    if world.pretrain is not None:
        assert set(world.pretrain) - {"demonstrations"} == {"steps", "lr", "batch_size"}
    assert callable(world.reward)


@pytest.mark.parametrize("name", [name for name in worlds() if made(name).kind != "vectors"])
def test_prompts_and_demonstrations_depend_on_the_generator_alone(name):
    one, other = made(name), made(name)

    def drawn(world, seed):
        rng = torch.Generator().manual_seed(seed)
        rows = world.demonstrations(3, rng)
        return world.prompts(3, rng), [
            [
                row["prompt"],
                *(
                    torch.as_tensor(r).tolist() if world.kind != "text" else r
                    for r in row["responses"]
                ),
            ]
            for row in rows
        ]

    torch.manual_seed(5)
    first = drawn(one, 1)
    torch.manual_seed(6)
    assert drawn(other, 1) == first and len(first[0]) == len(first[1]) == 3
    assert drawn(other, 2) != first or name == "gaussians"


# (world, prompt, response, reward) as the first lines of its file give them
EXAMPLES = [
    ("bandit", 0, [0, 2, 0], 1.4),
    ("tokens", 0, [1, 0, 3, 1, 2, 2], -1.0),
    ("modular", 5, [1, 5, 0], 1.0),
    ("game", 0, [2], 8 / 15),
]


@pytest.mark.parametrize("name, prompt, response, reward", EXAMPLES, ids=[e[0] for e in EXAMPLES])
def test_the_example_of_a_docstring_has_the_reward_that_it_says(name, prompt, response, reward):
    world, text = made(name), importlib.import_module(f"toy.{name}").__doc__
    assert world.reward([prompt], [response]).item() == pytest.approx(reward, abs=1e-6)
    assert f"response {response}" in text and f"reward {reward:.3g}" in text
    if name == "modular":
        assert f"prompt {prompt} (digits {str(world.problems[prompt].tolist())[1:-1]})" in text


@pytest.mark.parametrize("name", [name for name in worlds() if made(name).kind == "text"])
def test_the_example_of_a_world_of_text_has_the_reward_that_it_says(name):
    text = importlib.import_module(f"toy.{name}").__doc__
    prompt, response, reward = re.search(r"\n    (.+) \|(.+)    reward (\S+)\n", text).groups()
    if name == "arithmetic":
        response = response.strip()
    value = made(name).reward([prompt], [response]).item()
    assert value == pytest.approx(float(reward), abs=1e-3)


def test_every_attribute_has_an_explanation():
    lines = inspect.getsource(World).splitlines()
    plain = [line for line in lines if re.match(r"    \w+ = ", line)]
    assert len(plain) >= 16 and all("  # " in line for line in plain)
    assert all(
        vars(World)[name].__doc__ for name in PUBLIC if inspect.isfunction(vars(World)[name])
    )


def test_the_defaults_ask_for_nothing_and_a_missing_method_is_named(tmp_path):
    world = World()
    assert world.key() == "world" and world.measure is world.look is world.explain is None
    assert world.picture(None, None) is None
    write_picture(tmp_path, None)
    assert not list(tmp_path.iterdir())
    for ask in (world.model, world.rewards, lambda: world.prompts(1, None)):
        with pytest.raises(NotImplementedError):
            ask()
