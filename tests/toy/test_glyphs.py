"""glyphs: what the three scores read off an image, and what the contexts ask for."""

import pytest
import torch

from toy.glyphs import CENTER, SCALE, SHAPES, World, stencils


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(shape, place=4, ground=-1.0, ink=1.0):
    """One stencil as an image (1, 1, 8, 8)."""
    stencil = stencils()[SHAPES.index(shape), place]
    return (stencil * ink + (1 - stencil) * ground).view(1, 1, 8, 8)


def raw(world, prompt, image):
    """The three scores before they are scaled and clamped."""
    return world.scores([prompt], image)[0] * SCALE.double() + CENTER.double()


def test_a_stencil_fits_its_own_shape_alone():
    world = World()
    for i, shape in enumerate(SHAPES):
        own = world.scores([3 * i], drawn(shape))[0]
        assert own[:2].tolist() == pytest.approx([1.5, 4 / 3], abs=1e-4)
        others = [world.scores([3 * j], drawn(shape))[0, 0] for j in range(4) if j != i]
        assert max(others) < own[0] - 0.3
    for place in range(9):
        assert raw(world, 0, drawn("cross", place))[0] == pytest.approx(1.0)


def test_noise_and_blank_images_have_low_scores():
    world = World()
    noise = torch.randn(1, 1, 8, 8, generator=rng()).clamp(-1, 1)
    assert world.scores([0], noise)[0, 1] == -3 and world.scores([0], noise)[0, 0] < 0
    assert raw(world, 0, torch.zeros(1, 1, 8, 8))[0] == pytest.approx(0.1)  # clamped at -3
    worst = world.reward([0], torch.full((1, 1, 8, 8), torch.nan))
    assert worst.isfinite().all()


def test_the_brightness_that_a_context_asks_for():
    world = World()
    for context, wanted in enumerate((-0.4, -0.4, -0.9)):
        image = torch.full((1, 1, 8, 8), wanted)
        assert raw(world, context, image)[2] == pytest.approx(0.0, abs=1e-9)
        assert raw(world, context, image + 0.3)[2] == pytest.approx(-0.09)


def test_the_utility_of_annotators_is_the_reward():
    world, prompts = World(), list(range(12))
    images = torch.cat([row["responses"] for row in world.demonstrations(12, rng())])
    assert world.contexts(prompts).tolist() == [0, 1, 2] * 4
    utility, reward = world.utility(prompts, images), world.reward(prompts, images)
    torch.testing.assert_close(utility, reward, rtol=1e-5, atol=1e-5)


def test_the_reward_weighs_the_score_of_the_context():
    world = World()
    images = torch.cat([drawn("ring"), drawn("dot", ink=0.2), drawn("bar", ground=-0.2)])
    for context in range(3):
        scores = world.scores([3 + context] * 3, images)
        weights = torch.full((3,), 0.2, dtype=torch.float64)
        weights[context] = 1.0
        expected = (scores * weights).sum(1)
        torch.testing.assert_close(world.reward([3 + context] * 3, images), expected)
    assert set(world.parts(4, images[0])) == {"exact", "crisp", "dark"}
    assert world.reward([3] * 3, list(images)).shape == (3,)


def test_demonstrations_leave_room_above_and_match_themselves():
    world = World()
    rows = world.demonstrations(2000, rng(1))
    images = torch.cat([row["responses"] for row in rows])
    rewards = world.reward([row["prompt"] for row in rows], images)
    assert images.shape == (2000, 1, 8, 8) and images.abs().max() <= 1
    assert -1 < rewards.mean() < 0.3 and rewards.max() > 1.2
    assert world.frechet(images) < 0.5 < world.frechet(torch.zeros(200, 1, 8, 8))


def test_the_picture_of_a_run_names_shape_and_context_of_each_prompt():
    images = torch.zeros(12, 2, 1, 8, 8)
    axes = World().picture(images, images + 0.5).axes[0]
    names = [label.get_text() for label in axes.get_yticklabels()]
    assert len(names) == 12 and names[4] == "ring, crisp" and axes.get_ylabel() == "prompt"
