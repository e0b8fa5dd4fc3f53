"""The digits world: its data, its truth, its distance, and files of other images."""

import io
import re
import tracemalloc
import zipfile
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from data import UserError
from diffusion import alpha_bar
from lab import Lab, Settings
from lab.report import write_picture
from methods import dpo
from nanomodel import UNet
from toy.digits import World, moments


def rng(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def world():
    return World()


def test_real_digits_scaled_to_one(world):
    assert world.images.shape == (1797, 1, 8, 8) and world.images.dtype == torch.float32
    assert world.images.min() == -1 and world.images.max() == 1 and world.config.classes == 10
    assert (World.name, World.kind) == ("digits", "images")


def test_demonstrations_are_images_with_their_class(world):
    rows = world.demonstrations(300, rng())
    assert {row["prompt"] for row in rows} == set(range(10)) == set(world.prompts(300, rng()))
    assert all(
        row["responses"].shape == (1, 1, 8, 8)
        and row["scores"] == [1.0]
        and type(row["prompt"]) is int
        for row in rows
    )
    again = world.demonstrations(300, rng())
    assert all(torch.equal(a["responses"], b["responses"]) for a, b in zip(rows, again))
    label = torch.tensor([row["prompt"] for row in rows])
    assert (
        world.classify(torch.cat([row["responses"] for row in rows])).argmax(1) == label
    ).double().mean() > 0.95


def test_classifier_on_held_out_digits(world):
    order = torch.randperm(1797, generator=rng())
    part = World(world.images[order[:1300], 0].numpy() + 1, world.labels[order[:1300]].numpy())
    right = part.classify(world.images[order[1300:]]).argmax(1) == world.labels[order[1300:]]
    assert abs(right.double().mean() - 0.97) < 0.015


def test_reward_is_classifier_plus_bounded_ink(world):
    label, images = world.labels.tolist(), world.images
    reward = world.reward(label, images)
    assert reward.shape == (1797,) and reward.dtype == torch.float64
    agreement = world.classify(images)[range(1797), label]
    torch.testing.assert_close(
        reward,
        agreement.clamp(min=-5) + 3 * images.double().flatten(1).mean(1).clamp(max=0),
        rtol=0,
        atol=1e-12,
    )
    assert torch.equal(
        reward[:5], world.reward(label[:5], list(images[:5]))
    )  # a list of images is as good
    # the right class and more ink raise the reward
    assert (reward > world.reward([(c + 1) % 10 for c in label], images)).double().mean() > 0.99
    bolder = (images + 0.3 * (images > -0.5)).clamp(-1, 1)
    assert world.reward(label, bolder).mean() > reward.mean() + 0.1
    # a white image, or pixels beyond white, earn nothing
    assert world.reward(label, torch.ones_like(images)).mean() < reward.mean()
    assert torch.equal(
        world.reward(label, images.clamp(-1, 1)),
        world.reward(label, torch.where(images == 1, 1e6, images.double())),
    )
    for odd in (float("nan"), float("inf"), -float("inf"), 1e30):
        value = world.reward(label[:1], torch.full((1, 1, 8, 8), odd))
        assert value.isfinite() and -8 <= value <= 0


def test_frechet_distance(world):
    assert abs(world.frechet(world.images)) < 1e-8
    order = torch.randperm(1797, generator=rng())
    half = World(world.images[order[:898], 0].numpy() + 1, world.labels[order[:898]].numpy())
    assert 0.2 < half.frechet(world.images[order[898:]]) < 0.4
    # a shift costs its square, a scaling the square of what it adds to each standard deviation
    assert abs(world.frechet(world.images + 0.5) - 64 * 0.25) < 1e-4
    mean = world.images.mean(0)
    spread = world.images.double().flatten(1).var(0).sum().item()
    assert abs(world.frechet(mean + 1.5 * (world.images - mean)) - 0.25 * spread) < 1e-4
    assert world.frechet(torch.full((3, 1, 8, 8), float("nan"))) == float("inf")


def test_frechet_distance_against_the_general_matrix_root(world):
    images = torch.randn(500, 1, 8, 8, generator=rng(), dtype=torch.float64) * torch.linspace(
        0.1, 1, 8
    )
    (m, S), (n, T) = moments(images), world.moments
    # the eigenvalues of S T are those of its root, squared: no symmetry needed
    cross = torch.linalg.eigvals(S @ T).real.clamp(min=0).sqrt().sum()
    assert (
        abs(
            world.frechet(images)
            - ((m - n).square().sum() + S.trace() + T.trace() - 2 * cross).item()
        )
        < 1e-4
    )


def test_model_fits_and_is_measured(world):
    model = world.model()
    assert (
        isinstance(model, UNet) and 100_000 < sum(p.numel() for p in model.parameters()) < 350_000
    )
    lab = SimpleNamespace(
        rng=lambda name: rng(),
        sample=lambda policy, labels, k, rng: [
            {"responses": world.images[world.labels == c][:k]} for c in labels
        ],
    )
    assert world.model().sample([1, 2], 3, rng(), steps=1).shape == (2, 3, 1, 8, 8)
    values = world.measure(None, lab)
    assert (
        set(values) == {"frechet", "agreement"}
        and values["agreement"] > 0.85
        and values["frechet"] > 1
    )


def test_the_picture_is_written_as_a_png(world, tmp_path):
    images = torch.stack([world.images[world.labels == c][:4] for c in range(10)])
    write_picture(tmp_path, world.picture(images, images + 0.5))
    assert (tmp_path / "samples.png").read_bytes()[:4] == b"\x89PNG"
    assert len(list(tmp_path.iterdir())) == 1


# ---------------------------------------------------------------- other images


def squares(n=60, side=28, channels=None, classes=3):
    """Classes of noise that differ in which rows are bright."""
    label = np.arange(n) % classes
    images = (
        np.random.RandomState(0)
        .randint(0, 100, (n, side, side) + ((channels,) if channels else ()))
        .astype(np.uint8)
    )
    for i, c in enumerate(label):
        images[i, c * side // classes : (c + 1) * side // classes] += 155
    return images, label.astype(np.uint8)


@pytest.mark.parametrize(
    "side, size, expected", [(28, None, 14), (16, None, 16), (28, 8, 8), (32, None, 16), (9, 8, 8)]
)
def test_npz_files(tmp_path, side, size, expected):
    images, labels = squares(side=side)
    np.savez_compressed(tmp_path / "images.npz", images=images, labels=labels)
    world = World.from_npz(tmp_path / "images.npz", size=size)
    assert world.images.shape == (60, 1, expected, expected) and world.config.classes == 3
    assert (world.classify(world.images).argmax(1) == world.labels).all()
    assert world.model().sample([2], 2, rng(), steps=1).shape == (1, 2, 1, expected, expected)
    if side == 28 and size is None:  # means of 2 x 2 pixels
        blocks = images.reshape(60, 14, 2, 14, 2).mean((2, 4)) / images.max() * 2 - 1
        torch.testing.assert_close(
            world.images[:, 0].double(), torch.from_numpy(blocks), rtol=0, atol=1e-6
        )


def test_colour_and_two_classes():
    world = World(*squares(side=8, channels=3, classes=2))
    assert world.images.shape == (60, 3, 8, 8) and world.classify(world.images).shape == (60, 2)
    assert (world.classify(world.images).argmax(1) == world.labels).all()
    assert abs(world.frechet(world.images)) < 1e-6
    samples = world.images[:4].view(2, 2, 3, 8, 8)
    assert len(world.picture(samples, samples).axes) == 2
    assert world.key() != World(*squares(side=8, channels=3, classes=3)).key()


@pytest.mark.parametrize(
    "change, words",
    [
        (dict(images=None), "no array named images"),
        (dict(labels=None), "no array named labels"),
        (dict(labels=np.arange(59) % 3), "expected 60 ints"),
        (dict(labels=np.arange(60) % 3 + 1), "each from 0 on"),
        (dict(labels=np.zeros(60, int)), "two or more classes"),
        (dict(labels=np.ones(60) * 0.5), "expected 60 ints"),
        (dict(images=np.zeros((60, 28, 28), np.uint8)), "0 = black"),
        (dict(images=np.full((60, 28, 28), np.nan)), "0 = black"),
        (dict(images=-np.ones((60, 28, 28))), "0 = black"),
        (dict(images=np.ones((60, 784), np.uint8)), "(N, H, W)"),
        (dict(images=np.ones((60, 3, 28, 28), np.uint8)), "(N, H, W)"),
        (dict(images=np.ones((0, 28, 28), np.uint8), labels=np.zeros(0, int)), "(N, H, W)"),
        (dict(images=np.ones((60, 7, 7), np.uint8)), "even height and width"),
        (dict(images=np.array([{}] * 60)), "allow_pickle"),
        ({"images": None, "\x1b[31m": np.ones(1)}, r"no array named images, only labels, \x1b[31m"),
    ],
)
def test_files_that_do_not_fit_are_refused_in_one_line(tmp_path, change, words):
    images, labels = squares()
    arrays = {
        name: array
        for name, array in (dict(images=images, labels=labels) | change).items()
        if array is not None
    }
    np.savez(tmp_path / "images.npz", **arrays)
    with pytest.raises(ValueError) as error:
        World.from_npz(tmp_path / "images.npz")
    assert (
        "images.npz" in str(error.value)
        and words in str(error.value)
        and str(error.value).isprintable()
    )


def test_what_is_no_archive_is_refused_in_one_line(tmp_path):
    (tmp_path / "text.npz").write_text("images")
    np.save(tmp_path / "array.npz.npy", np.ones(3))
    images, labels = squares()
    np.savez(tmp_path / "cut.npz", images=images, labels=labels)
    whole = (tmp_path / "cut.npz").read_bytes()
    (tmp_path / "cut.npz").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "broken.npz").write_bytes(whole[:5000] + bytes(2000) + whole[7000:])
    for name in ("text.npz", "array.npz.npy", "cut.npz", "broken.npz", "missing.npz", "."):
        with pytest.raises(ValueError) as error:
            World.from_npz(tmp_path / name)
        assert str(tmp_path) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("size, words", [(9, "even height"), (10**6, "even height"), (80, "more")])
def test_a_size_that_does_not_suit_the_model_is_refused(size, words):
    images, labels = squares()
    with pytest.raises(UserError, match=words):
        World(images, labels, size)


def test_images_that_are_too_large_are_refused_before_memory_is_asked_for():
    images, labels = np.ones((4, 600, 600), np.uint8), np.arange(4) % 2
    with pytest.raises(UserError, match="600 x 600 .* --image_size shrinks it"):
        World(images, labels)
    assert World(images * labels[:, None, None].astype("uint8") + 1, labels, 8).images.shape[2] == 8


def test_a_class_that_the_sample_of_the_classifier_misses_is_added_to_it():
    rng = np.random.RandomState(0)
    labels = np.zeros(6000, int)
    images = rng.randint(0, 50, (6000, 4, 4)).astype(np.uint8)
    order = torch.randperm(6000, generator=torch.Generator().manual_seed(0))
    labels[1:3000] = 1
    labels[order[5500]], labels[order[5600]] = 2, 3  # behind the first 5,000
    for i, c in enumerate(labels):
        images[i, c] += 200
    world = World(images, labels)
    assert world.classify(world.images).shape == (6000, 4)
    assert (world.classify(world.images).argmax(1) == world.labels).double().mean() > 0.99
    assert world.reward(labels.tolist(), world.images).isfinite().all()


def test_too_many_classes_are_refused():
    images = np.random.RandomState(0).randint(0, 255, (300, 4, 4)).astype(np.uint8)
    with pytest.raises(UserError, match="labels of 300 classes: expected at most 256"):
        World(images, np.arange(300))


@pytest.mark.parametrize("dtype", ["f2", "f4", "f8", ">f8", "u1", "u2", "i8", ">i4", "u8"])
def test_any_type_of_numbers_makes_the_same_world(dtype):
    images, labels = squares(side=8)
    world = World(images.astype(dtype), labels.astype(dtype if dtype[-2] != "f" else "i8"))
    torch.testing.assert_close(world.images, World(images, labels).images, rtol=0, atol=1e-3)


@pytest.mark.parametrize(
    "images",
    [
        np.ones((60, 8, 8), complex),
        np.ones((60, 8, 8), "longdouble"),
        np.ones((60, 8, 8), "M8[s]"),
        np.ones((60, 8, 8), "S3"),
        np.ones((60, 8, 8), bool),
        np.ones((60, 8, 8), [("\x1b[31m", "f4"), ("b", "i8")]),
        np.ones((60, 8, 8, 4), np.uint8),
        np.ones((60, 0, 8), np.uint8),
        np.ones((60, 1, 1), np.uint8),
        np.ones((), np.uint8),
        np.ones(60, np.uint8),
        np.ones((1,) * 20, np.uint8),
    ],
    ids=range(12),
)
def test_arrays_of_other_types_and_shapes_are_one_line(tmp_path, images):
    np.savez(tmp_path / "odd.npz", images=images, labels=np.arange(60) % 3)
    with pytest.raises(UserError) as error:
        World.from_npz(tmp_path / "odd.npz")
    assert "odd.npz: " in str(error.value) and str(error.value).isprintable()


@pytest.mark.parametrize(
    "labels",
    [
        np.arange(60).astype("u8") + 2**63,
        np.full(60, -1),
        np.arange(60) % 3 * 10**12,
        np.array([b"a"] * 60),
        np.array([True, False] * 30),
        np.arange(60)[None] % 3,
    ],
    ids=range(6),
)
def test_labels_that_are_no_classes_are_one_line(tmp_path, labels):
    np.savez(tmp_path / "odd.npz", images=squares()[0], labels=labels)
    with pytest.raises(UserError, match="odd.npz: labels ") as error:
        World.from_npz(tmp_path / "odd.npz")
    assert str(error.value).isprintable()


def headed(shape, content=bytes(100), descr="|u1"):
    """An array in NumPy's format whose header states any shape."""
    file = io.BytesIO()
    header = dict(descr=descr, fortran_order=False, shape=shape)
    np.lib.format.write_array_header_1_0(file, header)
    return file.getvalue() + content


@pytest.mark.parametrize(
    "member",
    [
        headed((10**15, 8, 8)),
        headed((2**62, 2**62, 8)),
        headed((60, 8, 8)),
        headed((-1, 8, 8)),
        headed((60, 8, 8), descr="|O"),
        b"\x93NUMPY\x09\x09" + bytes(50),
        b"no array",
        b"",
    ],
    ids=range(8),
)
def test_headers_that_lie_are_one_line(tmp_path, member):
    with zipfile.ZipFile(tmp_path / "odd.npz", "w") as archive:
        archive.writestr("images.npy", member)
        archive.writestr("labels.npy", headed((60,), bytes([0, 1] * 30)))
    with pytest.raises(UserError) as error:
        World.from_npz(tmp_path / "odd.npz")
    assert "odd.npz: " in str(error.value) and str(error.value).isprintable()


def test_an_archive_that_unpacks_to_more_than_the_limit_is_refused_before_it_is_unpacked(tmp_path):
    images, labels = np.ones((10**4, 16, 16), np.uint8), np.arange(10**4) % 2
    np.savez_compressed(tmp_path / "large.npz", images=images, labels=labels)
    assert (tmp_path / "large.npz").stat().st_size < 10**5
    tracemalloc.start()
    with pytest.raises(UserError, match="large.npz: more than .* GiB once unpacked; --data_limit"):
        World.from_npz(tmp_path / "large.npz", limit=10**6)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10**6


def test_names_in_an_archive_and_its_own_are_printed_without_control_characters(tmp_path):
    names = {f"\x1b[31m{i}\n": np.ones(1) for i in range(300)}
    np.savez(tmp_path / "\x1b[2J.npz", **names)
    with pytest.raises(UserError) as error:
        World.from_npz(tmp_path / "\x1b[2J.npz")
    assert str(error.value).isprintable() and len(str(error.value)) < 500


def test_the_terms_of_the_reward_make_it_up(tmp_path):
    world = World()
    images, labels = world.images[:50], world.labels[:50].tolist()
    parts = [world.parts(label, image) for label, image in zip(labels, images)]
    total = torch.tensor([sum(part.values()) for part in parts])
    torch.testing.assert_close(total.double(), world.reward(labels, images), atol=1e-5, rtol=0)
    assert set(parts[0]) == {"log_prob", "ink"}
    noise = [world.parts(3, torch.full((1, 8, 8), value)) for value in (-1.0, 1.0)]
    assert noise[0]["ink"] == -3.0 and noise[1]["ink"] == 0.0


def test_halves_of_the_data_differ_less_than_other_images():
    world = World()
    assert 0.0 < world.halves() < 1.0 < world.frechet(torch.zeros(9, 1, 8, 8))
    said = world.explain({"frechet": 12.25})
    assert "12.2" in said and "3.5 apart" in said and f"{world.halves():.2g}" in said
    assert said.count(".") == 4 and said.endswith(".")


def test_the_world_of_a_file_has_its_name(tmp_path):
    images, labels = np.random.default_rng(0).random((40, 8, 8)), np.arange(40) % 2
    np.savez(tmp_path / "mine.npz", images=images, labels=labels)
    assert World.from_npz(tmp_path / "mine.npz").name == "mine.npz" and World().name == "digits"


def test_classes_and_rewards_stand_beside_the_pictures():
    world = World()
    figure = world.picture(-torch.ones(10, 4, 1, 8, 8), torch.ones(10, 4, 1, 8, 8))
    for axes, images in zip(figure.axes[:2], (-torch.ones(10, 1, 8, 8), torch.ones(10, 1, 8, 8))):
        rewards = world.reward(list(range(10)), images)
        assert [text.get_text() for text in axes.get_yticklabels()] == list("0123456789")
        (right,) = axes.child_axes
        shown = [text.get_text() for text in right.get_yticklabels()]
        assert shown == [f"{reward:.2f}" for reward in rewards.tolist()]
        assert f"{rewards.mean():.2f}" in axes.get_title()


def test_moments_in_pieces_are_those_of_all_images():
    images = torch.rand(9000, 1, 4, 4, generator=torch.Generator().manual_seed(0))
    mean, cov = moments(images)
    flat = images.double().flatten(1)
    torch.testing.assert_close(mean, flat.mean(0))
    torch.testing.assert_close(cov, flat.T.cov())


def test_the_limit_counts_the_images_that_are_kept(tmp_path):
    images, labels = np.zeros((1000, 16, 16), np.uint8), np.arange(1000) % 2
    images[0, 0, 0] = 1
    np.savez_compressed(tmp_path / "a.npz", images=images, labels=labels)
    arrays = images.nbytes + labels.nbytes
    with pytest.raises(UserError, match="--data_limit"):
        World.from_npz(tmp_path / "a.npz", limit=3 * arrays)
    World.from_npz(tmp_path / "a.npz", size=8, limit=3 * arrays)


# ---------------------------------------------------------------- preferences and prompts in a file


def written(path, **arrays):
    """An .npz file of squares with further arrays; None leaves one out."""
    images, labels = squares(side=8)
    named = dict(images=images, labels=labels) | arrays
    np.savez(path, **{name: array for name, array in named.items() if array is not None})
    return str(path)


def pairs_of_squares(n=40):
    """Indices of chosen and rejected images of one class; the classes repeat every three."""
    chosen = torch.randint(0, 20, (n,), generator=rng()).numpy() * 3
    return chosen, (chosen + 30) % 60


def test_pairs_of_a_file_are_its_training_rows_and_some_are_held_out(tmp_path):
    chosen, rejected = pairs_of_squares()
    chosen, rejected = chosen + 1, rejected + 1
    path = written(tmp_path / "pairs.npz", image_w=chosen, image_l=rejected)
    world = World.from_npz(path)
    rows = world.given(2)
    assert (len(rows), len(world.held_out)) == (36, 4)
    index = {image.numpy().tobytes(): i for i, image in enumerate(world.images)}
    found = [
        tuple(index[x.numpy().tobytes()] for x in r["responses"]) for r in rows + world.held_out
    ]
    assert sorted(found) == sorted(zip(chosen.tolist(), rejected.tolist()))
    assert all(row["scores"] == [1, 0] and row["prompt"] == 1 for row in rows)
    lab = Lab(Settings(data=path, prompts=20), quiet=True)
    assert len(lab.preferences(None, 2)) == 20
    with pytest.raises(UserError, match="flip, --k would do nothing"):
        Lab(Settings(data=path, flip=0.1, k=3), quiet=True)


def test_accuracy_on_held_out_pairs_is_that_of_the_log_ratio(tmp_path):
    chosen, rejected = pairs_of_squares()
    path = written(tmp_path / "pairs.npz", image_w=chosen, image_l=rejected)
    lab = Lab(Settings(data=path, base_steps=0, device="cpu"), quiet=True)
    world, policy = lab.world, lab.base()
    assert world.pair_accuracy(policy, lab) == 0.5  # the reference itself: ties
    first = {x["responses"][0].numpy().tobytes() for x in world.held_out}

    def logps(batch):
        known = [[image.numpy().tobytes() in first for image in row] for row in batch.images]
        return torch.tensor(known).double()[..., None]

    policy.logps = logps
    zero = SimpleNamespace(logps=lambda batch: torch.zeros(*batch.images.shape[:2], 1))
    lab.reference = zero
    assert world.pair_accuracy(policy, lab) == 1.0
    policy.logps = lambda batch: -logps(batch)
    assert world.pair_accuracy(policy, lab) == 0.0


def test_a_model_of_another_schedule_has_no_accuracy_on_held_out_pairs(tmp_path):
    chosen, rejected = pairs_of_squares()
    path = written(tmp_path / "pairs.npz", image_w=chosen, image_l=rejected)
    lab = Lab(Settings(data=path, base_steps=0, device="cpu"), quiet=True)
    policy = lab.base()
    assert lab.world.measure(policy, lab)["pair_accuracy"] == 0.5
    policy.alpha_bar = alpha_bar("flow").float()
    assert "pair_accuracy" not in lab.world.measure(policy, lab)


@pytest.mark.slow
def test_a_model_is_trained_on_the_pairs_of_a_file(tmp_path):
    chosen, rejected = pairs_of_squares()
    path = written(tmp_path / "pairs.npz", image_w=chosen, image_l=rejected)
    how = dict(base_steps=0, steps=2, batch_size=4, eval_size=4, warmup=1)
    lab = Lab(Settings(data=path, **how), quiet=True)
    lab.world.look = lambda policy, lab: {}
    policy = dpo.run(lab, dpo.Config())
    assert policy.curve[-1]["step"] == 2 and 0 <= lab.world.pair_accuracy(policy, lab) <= 1


def test_prompts_are_classes_whose_words_the_model_reads(tmp_path):
    names = np.array(["a low bar", "a bar", "a high bar"])
    _, labels = squares(side=8)
    path = written(tmp_path / "told.npz", labels=None, prompts=names[labels])
    world = World.from_npz(path)
    assert world.captions == ["a bar", "a high bar", "a low bar"]
    assert [world.captions[c] for c in world.labels[:3]] == names[labels[:3]].tolist()
    bar, high, low, nothing = world.config.words
    assert bar[0] == high[0] == low[0] and high[2] == low[2] == bar[1] and high[1] != low[1]
    assert len({len(row) for row in world.config.words}) == 1 and set(nothing) == {0}
    assert world.guided and world.model().free
    axes = world.picture(
        world.images[:6].view(3, 2, 1, 8, 8), world.images[:6].view(3, 2, 1, 8, 8)
    ).axes
    assert [label.get_text() for label in axes[0].get_yticklabels()] == world.captions
    assert (
        world.key()
        != World.from_npz(written(tmp_path / "plain.npz", labels=world.labels.numpy())).key()
    )


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (dict(image_w=np.arange(3)), "image_w and image_l are given together"),
        (dict(image_w=np.arange(3), image_l=np.arange(4)), "equally many indices"),
        (dict(image_w=np.array([60]), image_l=np.array([0])), "indices from 0 to 59"),
        (dict(image_w=np.array([-1]), image_l=np.array([2])), "indices from 0 to 59"),
        (dict(image_w=np.array([0.0]), image_l=np.array([3.0])), "indices from 0 to 59"),
        (dict(image_w=np.array([], int), image_l=np.array([], int)), "one or more"),
        (dict(image_w=np.array([3, 0]), image_l=np.array([0, 1])), "pair 1 of image_w"),
        (dict(prompts=np.array(["a"] * 60)), "labels (or prompts"),
        (dict(labels=None, prompts=np.arange(60)), "expected texts"),
        (dict(labels=None, prompts=np.array(["a " * 40, "b"] * 30)), "more than 32 words"),
        (dict(labels=None, prompts=np.array(["a"] * 60)), "two or more classes"),
    ],
)
def test_pairs_and_prompts_that_do_not_fit_are_refused_in_one_line(tmp_path, change, words):
    path = written(tmp_path / "odd.npz", **change)
    with pytest.raises(UserError, match=re.escape(words)) as error:
        World.from_npz(path)
    assert "odd.npz: " in str(error.value) and str(error.value).isprintable()
