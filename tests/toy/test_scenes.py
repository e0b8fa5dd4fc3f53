"""The world of scenes: what is drawn is read back, and the reward says what is wrong with it."""

from types import SimpleNamespace

import pytest
import torch

from data import UserError
from lab import Lab, Settings
from lab.report import write_picture
from toy.scenes import CELL, EMPTY, OBJECTS, SHIFTS, SIDE, TASTES, World, named, stencil


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return World()


@pytest.fixture(scope="module")
def drawn(world):
    """600 prompts, the corners that fulfil them, and their pictures."""
    prompts = world.prompts(600, rng())
    corners = world.place(prompts, rng(1))
    return prompts, corners, world.draw(corners, rng(2))


def scene(world, words):
    """The number of the prompt with these words."""
    return next(p for p in range(len(world.scenes)) if world.caption(p) == words)


def picture(world, *corners, seed=0):
    """One picture of four corners, given in words or as None."""
    names = {named(thing): thing for thing in range(OBJECTS)} | {None: EMPTY}
    return world.draw(torch.tensor([[names[corner] for corner in corners]]), rng(seed))


# ---------------------------------------------------------------- drawing and reading


def test_there_are_276_prompts_and_each_is_said_in_its_own_words(world):
    captions = [world.caption(p) for p in range(len(world.scenes))]
    assert len(set(captions)) == len(captions) == 12 + 2 * 12 * 11
    assert "a red disc" in captions and "a blue cross above a yellow square" in captions
    table = world.words()
    assert len({tuple(row) for row in table}) == len(table) == 277
    # words are shared: prompts that differ in one colour differ in one word
    two = [table[scene(world, f"a {c} disc left of a blue square")] for c in ("red", "green")]
    assert sum(a != b for a, b in zip(*two)) == 1


def test_a_stencil_covers_the_area_of_its_shape():
    assert stencil("square", 2.0, 0, 0).sum() == pytest.approx(3.6**2, rel=0.06)
    assert stencil("disc", 3.0, 0, 0).sum() == pytest.approx(3.14159 * 3.24**2, rel=0.02)
    moved = stencil("cross", 2.0, 0.5, -0.5)
    y, x = torch.meshgrid(torch.arange(8.0), torch.arange(8.0), indexing="ij")
    assert ((moved * y).sum() / moved.sum()).item() == pytest.approx(4.0, abs=0.01)
    assert ((moved * x).sum() / moved.sum()).item() == pytest.approx(3.0, abs=0.01)


def test_objects_stand_where_the_prompt_says(world, drawn):
    for prompt, corners in zip(*(x[:200] for x in drawn[:2])):
        a, relation, b = world.scenes[prompt]
        there = {c: i for i, c in enumerate(corners.tolist()) if c != EMPTY}
        assert set(there) == ({a, b} - {EMPTY})
        if relation == 1:
            assert there[a] % 2 == 0 and there[b] % 2 == 1
        elif relation == 2:
            assert there[a] // 2 == 0 and there[b] // 2 == 1


def test_what_is_drawn_is_read_back_exactly(world, drawn):
    _, corners, images = drawn
    found, sizes, error = world.read(images)
    assert torch.equal(found, corners) and error.max() < 1e-5
    assert torch.equal(sizes > 0, corners != EMPTY) and set(sizes.flatten().tolist()) == {0, 1, 2}
    assert images.shape == (600, 3, SIDE, SIDE) and images.abs().max() <= 1


def test_reading_agrees_with_a_search_through_all_renders(world):
    images = picture(world, "a red disc", None, "a blue cross", "a yellow square")
    images = images + 0.3 * torch.randn(images.shape, generator=rng(3))
    errors, _ = world.errors(images)
    tile = images[0, :, :CELL, CELL:].clamp(-1, 1)  # corner 1
    for thing in (0, 7, EMPTY):
        least = float("inf")
        forms = world.stencils.view(3, 18, CELL, CELL)[thing // 4] if thing < EMPTY else [0 * tile]
        for cover in forms:
            for ground in torch.linspace(-1.0, -0.4, 121):
                paint = world.paint[thing % 4][:, None, None]
                least = min(least, (tile - cover * paint - (1 - cover) * ground).square().mean())
        assert errors[0, 1, thing].item() == pytest.approx(least.item(), abs=2e-5)


def test_noise_is_forgiven_and_anything_can_be_read(world, drawn):
    _, corners, images = drawn
    noisy = images + 0.2 * torch.randn(images.shape, generator=rng(4))
    assert (world.read(noisy)[0] == corners).all(1).double().mean() > 0.99
    odd = torch.stack([torch.full((3, SIDE, SIDE), x) for x in (float("nan"), 1e30, -5.0)])
    rewards = world.reward([0, 20, 200], odd)
    assert rewards.isfinite().all() and (rewards >= -1).all() and (rewards <= 2).all()


# ---------------------------------------------------------------- the reward


PROMPT = "a red disc left of a blue square"
FAITH = [
    (("a red disc", "a blue square", None, None), 1.0),
    ((None, "a blue square", "a red disc", None), 1.0),  # in another row
    (("a red disc", "a green square", None, None), 1 - 0.375 / 2),
    (("a red disc", "a green disc", None, None), 1 - 0.75 / 2),
    (("a blue square", "a red disc", None, None), 0.25),  # both there, shape and colour swapped
    (("a red disc", None, "a blue square", None), 0.5 - 0.25),  # one below the other
    (("a red disc", "a blue square", "a red cross", None), 0.75),  # and a stranger
    (("a red disc", None, None, None), 0.5),
    ((None, None, None, None), 0.0),
    (("a red disc", "a blue square", "a red disc", "a blue square"), 0.5),
    (("a green cross", "a green cross", "a green cross", "a green cross"), 0.0),
]


@pytest.mark.parametrize("corners, faith", FAITH)
def test_the_reward_of_pictures_that_are_wrong_in_known_ways(world, corners, faith):
    images = picture(world, *corners)
    number = scene(world, PROMPT)
    assert world.reward([number], images).item() == pytest.approx(2 * faith, abs=1e-4)
    parts = world.parts(number, images[0])
    assert parts["faith"] == pytest.approx(faith, abs=1e-6) and parts["exact"] == (faith == 1)
    assert 2 * parts["faith"] + parts["clean"] == pytest.approx(2 * faith, abs=1e-4)


def test_one_object_may_stand_in_any_corner(world):
    number = scene(world, "a red disc")
    for corner in range(4):
        where = [None] * 4
        where[corner] = "a red disc"
        assert world.reward([number], picture(world, *where)).item() == pytest.approx(2, abs=1e-4)


def test_above_is_above(world):
    number = scene(world, "a red disc above a blue square")
    right = picture(world, None, "a red disc", "a blue square", None)
    wrong = picture(world, "a blue square", None, None, "a red disc")
    assert world.reward([number], right).item() == pytest.approx(2, abs=1e-4)
    assert world.reward([number], wrong).item() == pytest.approx(0.5, abs=1e-4)


def test_noise_costs_reward_until_a_whole_point_is_gone(world):
    images = picture(world, "a red disc", "a blue square", None, None)
    noise = torch.randn(images.shape, generator=rng(5))
    rewards = [world.reward([scene(world, PROMPT)], images + s * noise).item() for s in (0, 0.1, 3)]
    assert rewards[0] > rewards[1] > rewards[2] and rewards[1] == pytest.approx(1.9, abs=0.05)
    assert world.parts(0, torch.zeros(3, SIDE, SIDE))["clean"] == -1


def test_a_list_of_images_has_the_rewards_of_their_tensor(world, drawn):
    prompts, _, images = (x[:20] for x in drawn)
    assert torch.equal(world.reward(prompts, images), world.reward(prompts, list(images)))


# ---------------------------------------------------------------- data


def test_the_same_generator_gives_the_same_data(world):
    for make in (world.demonstrations, world.prompts):
        one, two, other = (make(20, rng(seed)) for seed in (1, 1, 2))
        if make == world.prompts:
            assert one == two != other and all(type(p) is int for p in one)
        else:
            assert all(torch.equal(a["responses"], b["responses"]) for a, b in zip(one, two))
            assert [row["prompt"] for row in one] == [row["prompt"] for row in two]


def test_captions_of_demonstrations_are_wrong_in_some_words(world):
    for wrong, low, high in ((0.0, 1.0, 1.0), (0.1, 0.72, 0.84), (1.0, 0.0, 0.2)):
        rows = World(wrong).demonstrations(1000, rng())
        prompts, images = [r["prompt"] for r in rows], torch.cat([r["responses"] for r in rows])
        exact = world.faith(prompts, world.read(images)[0]) > 0.999
        assert low <= exact.double().mean() <= high


def test_a_third_of_the_prompts_has_one_object(world):
    prompts = world.prompts(6000, rng())
    assert (torch.tensor(prompts) < OBJECTS).double().mean().item() == pytest.approx(
        1 / 3, abs=0.03
    )
    assert set(prompts) == set(range(len(world.scenes)))


# ---------------------------------------------------------------- imperfect judges, tastes


def test_each_opinion_is_blind_in_its_own_way(world):
    number = scene(world, PROMPT)
    right = picture(world, "a red disc", "a blue square", None, None)
    mixed = picture(world, "a blue disc", "a red square", None, None)  # CLIP cannot tell
    other = picture(world, "a green cross", "a green cross", None, None)  # only the places fit
    shapes = picture(world, "a red square", "a blue disc", None, None)  # only the colours fit
    both = torch.cat([right, mixed, other, shapes])
    found = world.opinions([number] * 4, both)
    assert found["bag"].tolist() == [1, 1, 0, 1]
    assert found["layout"].tolist() == [1, 1, 1, 1]
    assert found["colours"].tolist() == [1, 0, 0, 1]
    noisy = right + 0.1 * torch.randn(right.shape, generator=rng())
    tidy = world.opinions([number, number], torch.cat([right, noisy]))["tidy"]
    assert tidy[0] > tidy[1]
    # bold does not read the prompt
    assert (
        len(set(world.opinions([number, 3, 7], right.expand(3, -1, -1, -1))["bold"].tolist())) == 1
    )


def test_opinions_agree_with_the_truth_to_different_degrees(world):
    # wrong pictures of many kinds: the scenes of other prompts, some with noise
    prompts = world.prompts(400, rng(7))
    near = [p if i % 4 == 0 else (p + i) % len(world.scenes) for i, p in enumerate(prompts)]
    images = world.draw(world.place(near, rng(8)), rng(9))
    images = images + 0.3 * torch.rand(400, 1, 1, 1, generator=rng(1)) * torch.randn(images.shape)
    truth = world.reward(prompts, images)
    agreement = {}
    for name, score in world.opinions(prompts, images).items():
        assert score.shape == (400,) and score.isfinite().all()
        known, says = truth[:, None] > truth, score[:, None] > score
        agreement[name] = (says & known).sum().item() / known.sum().item()
    assert min(agreement["layout"], agreement["bag"], agreement["colours"]) > 0.3
    assert agreement["bold"] < 0.6
    assert len({round(a, 2) for a in agreement.values()}) > 2


def test_tastes_depend_on_the_prompt(world):
    alone, left = scene(world, "a red disc"), scene(world, PROMPT)
    assert world.contexts([alone, left]).tolist() == [0, 1] and world.annotators == TASTES
    images = torch.cat([picture(world, "a red disc", None, None, None, seed=s) for s in range(40)])
    criteria = world.criteria([alone] * 40, images)
    assert criteria.shape == (40, 3) and criteria.abs().max() <= 2
    assert set(criteria[:, 2].tolist()) == {-2.0, 2.0}  # small and large
    small, large = (images[criteria[:, 2] == size][:1] for size in (-2, 2))
    gap = [(world.utility([p], large) - world.utility([p], small)).item() for p in (alone, left)]
    assert gap == pytest.approx([4.0, 0.8], abs=1e-4)
    empty = picture(world, None, None, None, None)
    assert world.criteria([alone], empty)[0].tolist() == pytest.approx([-2, 2, -2], abs=1e-4)


# ---------------------------------------------------------------- distance, measurements, pictures


def test_the_frechet_distance_sees_noise_and_missing_variety(world, drawn):
    prompts, _, images = drawn
    real = world.frechet(images)
    noisy = world.frechet(images + 0.1 * torch.randn(images.shape, generator=rng()))
    alike = world.frechet(world.draw(world.place([0] * 600, rng()), rng()))
    assert real < 0.1 < noisy < alike
    assert world.frechet(images * float("nan")) == float("inf")
    assert world.features(images[:3]).shape == (3, 4 * (OBJECTS + 1) + 12)


class Painter:
    """A model that draws what the prompt says."""

    def __init__(self, world):
        self.world = world

    def sample(self, policy, prompts, k, rng):
        images = self.world.draw(self.world.place(prompts, rng), rng)
        return [{"responses": image[None]} for image in images]


def test_what_is_measured_of_a_perfect_painter(world):
    lab = SimpleNamespace(
        eval_rng=lambda name: rng(3), few=lambda n: n, sample=Painter(world).sample
    )
    found = world.measure(None, lab)
    assert found["one"] == found["two"] == 1 and found["frechet"] < 0.06
    assert world.look(None, lab)["frechet_256"] < 0.2
    assert "Frechet distance of 0.0" in world.explain(found)


@pytest.mark.slow
def test_pictures_have_captions_and_the_verdict(world, tmp_path):
    images = torch.stack([world.draw(world.place([p] * 8, rng(p)), rng(p)) for p in world.gallery])
    figure = world.picture(-images, images)
    words = [text.get_text() for axes in figure.axes for text in axes.texts]
    assert words.count("a red disc") == 2 and "2.00 red disc" in words
    assert len(words) == 2 * 12 * 5
    write_picture(tmp_path, figure)
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"


def test_a_picture_of_one_prompt_is_that_of_its_own_reading(world, drawn):
    prompts, _, images = (x[:10] for x in drawn)
    for (words, right), reward in zip(
        world.verdicts(prompts, images), world.reward(prompts, images)
    ):
        assert right and words.startswith(f"{reward.item():.2f} ")


# ---------------------------------------------------------------- training with dropped prompts


def test_the_base_model_is_trained_with_dropped_prompts(own_folder, monkeypatch):
    small = World()
    small.pretrain = dict(steps=2, batch_size=32, lr=1e-3)
    lab = Lab(Settings(), None, quiet=True, world=small)
    model = lab.world.model()
    seen = []
    loss = type(model).logps
    monkeypatch.setattr(
        type(model), "logps", lambda model, batch: seen.append(batch.label) or loss(model, batch)
    )
    lab.base()
    dropped = (torch.stack(seen) == model.classes).double().mean()
    assert len(seen) == 2 and 0 < dropped < 0.25


def test_guidance_reaches_samples_and_is_refused_where_it_would_do_nothing(own_folder):
    lab = Lab(Settings(world="scenes", guidance=3.0, base_steps=0), None, quiet=True)
    policy = lab.base()
    torch.nn.init.normal_(policy.output.weight, std=0.1)
    found = lab.sample(policy, [0, 30], 1, rng())
    told = policy.sample([0, 30], 1, rng(), guidance=3.0)
    assert torch.equal(torch.stack([row["responses"] for row in found]), told.cpu())
    assert not torch.equal(told, policy.sample([0, 30], 1, rng()))
    for other in ("gaussians", "reviews"):
        with pytest.raises(UserError, match="guidance would do"):
            Lab(Settings(world=other, guidance=3.0), None, quiet=True)


def test_shifts_leave_an_object_inside_its_corner(world):
    edges = torch.ones(CELL, CELL, dtype=torch.bool)
    edges[1:-1, 1:-1] = False
    assert max(abs(s) for s in SHIFTS) == 0.5
    assert (world.stencils[:, edges] <= 0.8).all()
