"""Scenes: small colour pictures of one or two shapes, asked for in words, that can be read back.

    prompt "a red disc left of a blue square"    response: 16 x 16 pixels in colour    reward 2

A picture has four corners on a grey ground, and a corner holds at most one object: a disc, a square
or a cross in one of four colours, small or large, and slightly off its centre. A prompt names one
object, which may stand in any corner, or two objects and their relation. The verifier compares each
corner with every picture that the renderer could have drawn there, so it reads back exactly what is
on a rendered picture, and on most noisy ones.

The reward is 2 faith + clean. faith is the share of the prompt that the picture fulfils in its best
reading: a quarter of an object for its being there, three eighths each for shape and colour, and a
quarter less for every object that nobody asked for. clean is minus the distance to the nearest
render, from -1 to 0. "a red disc left of a blue square", drawn with a green square, earns 2 * .8125
if it is drawn without noise. Here nothing can be had by ink. The reward can be gamed where reading
is coarse: a mark that is barely more like a disc than like the ground counts as a disc, and a
picture without variety costs nothing, which the Frechet distance shows.

Captions of the demonstrations are wrong in some words, as those of web pages are, so the base model
mixes up colours, shapes and relations. `opinions` are five imperfect reward models, and `utility`
is what annotators think, whose tastes depend on the prompt.
"""

import functools
import itertools

import torch
import torch.nn.functional as F

from nanomodel import UNet, UNetConfig
from toy import world
from toy.digits import distance, samples, shown

SIDE, CELL = 16, 8  # pixels of a picture and of a corner
SHAPES = ("disc", "square", "cross")
COLOURS = {
    "red": (1, -1, -1),
    "green": (-1, 0.6, -1),
    "blue": (-0.8, -0.6, 1),
    "yellow": (1, 0.8, -1),
}
RELATIONS = ("alone", "left of", "above")
RADII, SHIFTS = (2.0, 3.0), (-0.5, 0.0, 0.5)  # pixels
GROUND = (-1.0, -0.4)  # the darkest and the brightest ground
OBJECTS = len(SHAPES) * len(COLOURS)  # object 4 s + c has shape s and colour c
EMPTY = OBJECTS  # a corner without an object
HERE, FORM, EXTRA = 0.25, 0.375, 0.25  # shares of faith: being there; shape, colour; a stranger
# the corners, 0 1 above 2 3, where the first and the second object of a prompt may stand
PLACES = [
    [(corner, corner) for corner in range(4)],
    list(itertools.product((0, 2), (1, 3))),
    list(itertools.product((0, 1), (2, 3))),
]
CRITERIA = ("faith", "clean", "bold")  # what a picture can be liked for
# how annotators weigh them, for each relation of a prompt
TASTES = ((0.2, 0.2, 1.0), (1.0, 0.2, 0.2), (0.2, 1.0, 0.2))
GALLERY = [(0, 0, EMPTY), (5, 0, EMPTY), (10, 0, EMPTY), (3, 0, EMPTY), (0, 1, 6), (4, 2, 9)]
GALLERY += [(8, 1, 3), (2, 2, 5), (11, 1, 7), (1, 2, 0), (9, 1, 2), (6, 2, 3)]  # of samples.png


def stencil(shape, radius, down, right):
    """What an object covers of its corner, (8, 8) shares, antialiased by 4 x 4 subpixels."""
    at = (torch.arange(CELL * 4) + 0.5) / 4 - 0.5
    y, x = at[:, None] - 3.5 - down, at[None] - 3.5 - right
    far, near = torch.maximum(x.abs(), y.abs()), torch.minimum(x.abs(), y.abs())
    inside = {
        "disc": (x**2 + y**2).sqrt() <= radius * 1.08,
        "square": far <= radius * 0.9,
        "cross": (near <= radius * 0.34) & (far <= radius * 1.08),
    }[shape]
    return inside.float().view(CELL, 4, CELL, 4).mean((1, 3))


class World(world.World):
    """The world of this file.

    wrong: the probability that a word of a demonstration's caption is drawn at random, which may
    give the right word. width: of the UNet.
    """

    name, kind = "scenes", "images"
    pretrain = dict(steps=2400, batch_size=64, lr=4e-3)
    align = dict(prompts=1024, steps=200, lr=2e-4, batch_size=32, eval_size=1000)
    guided, annotators = True, TASTES

    def __init__(self, wrong=0.1, width=32):
        self.wrong, self.width = wrong, width
        pairs = [
            (a, r, b) for r in (1, 2) for a in range(OBJECTS) for b in range(OBJECTS) if a != b
        ]
        self.scenes = [(a, 0, EMPTY) for a in range(OBJECTS)] + pairs
        self.first, self.relation, self.second = torch.tensor(self.scenes).T
        forms = itertools.product(SHAPES, RADII, SHIFTS, SHIFTS)
        self.stencils = torch.stack([stencil(*form) for form in forms])  # (54, 8, 8)
        self.paint = torch.tensor(list(COLOURS.values()), dtype=torch.float32)  # (4, 3)
        self.places = torch.tensor(PLACES)  # (3, 4, 2)
        match = torch.zeros(OBJECTS + 1, OBJECTS + 1)
        a, b = torch.arange(OBJECTS)[:, None], torch.arange(OBJECTS)
        match[:OBJECTS, :OBJECTS] = HERE + FORM * ((a // 4 == b // 4).float() + (a % 4 == b % 4))
        self.match = match  # (13, 13): how far an object fulfils the wish for another one
        self.gallery = [self.scenes.index(scene) for scene in GALLERY]

    def key(self):
        """The arguments."""
        return [self.name, self.wrong, self.width]

    def model(self):
        """A new UNet with about 0.3M parameters that reads the words of a prompt."""
        config = UNetConfig(
            channels=3,
            size=(SIDE, SIDE),
            classes=len(self.scenes),
            width=self.width,
            schedule="cosine",
            error="output",
            patch=2,
            words=self.words(),
            place=True,
            free=True,
        )
        return UNet(config)

    def words(self):
        """The numbers of five words for each prompt, and for no prompt in the last row.

        Shapes and colours of the first and of the second object are different words.
        """
        table = []
        for a, r, b in self.scenes:
            second = [19, 20] if b == EMPTY else [11 + b // 4, 15 + b % 4]
            table.append([a // 4, 4 + a % 4, 8 + r, *second])
        return [*table, [21] * 5]

    def caption(self, prompt):
        """A prompt as text."""
        a, r, b = self.scenes[int(prompt)]
        return named(a) if b == EMPTY else f"{named(a)} {RELATIONS[r]} {named(b)}"

    def prompts(self, n, rng):
        """n prompts, the numbers of scenes; a third of them has one object."""
        alone = torch.rand(n, generator=rng) < 1 / 3
        one = torch.randint(OBJECTS, (n,), generator=rng)
        two = torch.randint(OBJECTS, len(self.scenes), (n,), generator=rng)
        return torch.where(alone, one, two).tolist()

    # ---------------------------------------------------------------- drawing

    def place(self, prompts, rng):
        """Random scenes that fulfil n prompts: the object in each corner, (n, 4), or EMPTY."""
        prompts = torch.as_tensor(prompts)
        pick = torch.randint(4, (len(prompts),), generator=rng)
        spots = self.places[self.relation[prompts], pick]  # (n, 2)
        corners = torch.full((len(prompts), 4), EMPTY)
        corners.scatter_(1, spots[:, 1:], self.second[prompts][:, None])
        return corners.scatter_(1, spots[:, :1], self.first[prompts][:, None])

    def draw(self, corners, rng):
        """Pictures (n, 3, 16, 16) of corners (n, 4), with random sizes, shifts and ground."""
        n = len(corners)
        bright = torch.rand(n, 1, 1, 1, 1, generator=rng)
        ground = GROUND[0] + (GROUND[1] - GROUND[0]) * bright
        form = torch.randint(len(RADII) * len(SHIFTS) ** 2, (n, 4), generator=rng)
        there = corners != EMPTY
        thing = torch.where(there, corners, 0)
        cover = self.stencils[thing // 4 * 18 + form] * there[..., None, None]  # (n, 4, 8, 8)
        cover, paint = cover[:, :, None], self.paint[thing % 4][..., None, None]
        tiles = (cover * paint + (1 - cover) * ground).view(n, 2, 2, 3, CELL, CELL)
        return tiles.permute(0, 3, 1, 4, 2, 5).reshape(n, 3, SIDE, SIDE)

    def demonstrations(self, n, rng):
        """n rows of one picture (1, 3, 16, 16), some words of whose caption are wrong."""
        prompts = torch.tensor(self.prompts(n, rng))
        pictures = self.draw(self.place(prompts, rng), rng)
        wrong = torch.rand(n, 5, generator=rng) < self.wrong
        other = torch.randint(12, (n, 5), generator=rng)
        a, r, b = self.first[prompts], self.relation[prompts], self.second[prompts]
        two, b = b != EMPTY, torch.where(b == EMPTY, 0, b)
        shape, colour, other_shape, other_colour = (
            torch.where(wrong[:, i], other[:, i] % size, own)
            for i, (size, own) in enumerate([(3, a // 4), (4, a % 4), (3, b // 4), (4, b % 4)])
        )
        r = torch.where(two & wrong[:, 4], 1 + other[:, 4] % 2, r)
        b = torch.where(two, other_shape * 4 + other_colour, EMPTY)
        captions = torch.stack([shape * 4 + colour, r, b], 1).tolist()
        known = {scene: i for i, scene in enumerate(self.scenes)}
        told = [known.get(tuple(c), p) for c, p in zip(captions, prompts.tolist())]
        rows = zip(told, pictures[:, None])
        return [dict(prompt=p, responses=picture, scores=[1.0]) for p, picture in rows]

    # ---------------------------------------------------------------- reading

    def errors(self, images):
        """The least mean squared error of every corner to each object and to none, (n, 4, 13).

        The brightness of the ground is the best one, in closed form. Second result: which of the
        18 forms of each object is the nearest, (n, 4, 12).
        """
        x = shown(images).float()
        tiles = x.view(-1, 3, 2, CELL, 2, CELL).permute(0, 2, 4, 1, 3, 5).reshape(-1, 3, CELL**2)
        cover = self.stencils.flatten(1)  # (54, 64)
        rest = 1 - cover
        weight = 3 * rest.square().sum(1)  # (54,)
        seen, overlap = tiles.sum(1) @ rest.T, (cover * rest).sum(1)  # (m, 54), (54,)
        square = tiles.square().sum((1, 2))[:, None]  # (m, 1)
        found = []
        for paint in self.paint:
            through = overlap * paint.sum()  # (54,)
            ground = ((seen - through) / weight).clamp(*GROUND)
            fit = torch.einsum("mcp,c->mp", tiles, paint) @ cover.T
            error = square - 2 * fit + cover.square().sum(1) * paint.square().sum()
            found.append(error - 2 * ground * (seen - through) + ground**2 * weight)
        error = (torch.stack(found, 2) / (3 * CELL**2)).view(-1, len(SHAPES), 18, len(COLOURS))
        least, form = error.min(2)
        bare = tiles.mean((1, 2)).clamp(*GROUND)[:, None, None]
        nothing = (tiles - bare).square().mean((1, 2))[:, None]
        errors = torch.cat([least.flatten(1), nothing], 1).view(-1, 4, OBJECTS + 1)
        return errors, form.flatten(1).view(-1, 4, OBJECTS)

    def read(self, images):
        """What is on pictures (n, 3, 16, 16): corners (n, 4), radii (n, 4) and the distance (n,).

        corners: the objects, or EMPTY. radii: 0 for no object, else 1 for a small and 2 for a large
        one. distance: the mean squared error to the nearest render.
        """
        errors, form = self.errors(images)
        error, corners = errors.min(2)
        there = corners != EMPTY
        size = form.gather(2, torch.where(there, corners, 0)[..., None])[..., 0] // 9 + 1
        return corners, torch.where(there, size, 0), error.mean(1).clamp(min=0.0)  # rounding

    def best_reading(self, prompts, corners, value, extra):
        """How well corners (n, 4) fulfil the prompts, in their best reading, (n,).

        value (13, 13): what an object is worth where another one is wanted. extra: the price of an
        object that nobody asked for.
        """
        prompts = torch.as_tensor(prompts)
        spots = self.places[self.relation[prompts]]  # (n, 4 places, 2 objects)
        there = corners[:, None].expand(-1, 4, -1).gather(2, spots)
        two = (self.second[prompts] != EMPTY).float()[:, None]  # (n, 1)
        one, other = value[self.first[prompts]], value[self.second[prompts]]  # (n, 13)
        got = one.gather(1, there[..., 0]) + two * other.gather(1, there[..., 1])  # (n, 4)
        used = (there[..., 0] != EMPTY).float() + two * (there[..., 1] != EMPTY)
        more = (corners != EMPTY).sum(1, keepdim=True) - used
        return (got / (1 + two) - extra * more).max(1).values

    def faith(self, prompts, corners):
        """The share (n,), 0 to 1, of the prompts that corners (n, 4) fulfil."""
        return self.best_reading(prompts, corners, self.match, EXTRA).clamp(min=0.0)

    def reward(self, prompts, responses):
        """The true reward (n,) float64 of pictures, a tensor or a list of them: -1 to 2."""
        images = responses if isinstance(responses, torch.Tensor) else torch.stack(list(responses))
        corners, _, error = self.read(images)
        return 2 * self.faith(prompts, corners).double() + clean(error).double()

    def parts(self, prompt, response):
        """{faith, clean} of one picture, and `exact`, 1 if the whole prompt is fulfilled."""
        corners, _, error = self.read(response[None])
        faith = self.faith([int(prompt)], corners).item()
        return {"faith": faith, "clean": clean(error).item(), "exact": float(faith > 0.999)}

    # ---------------------------------------------------------------- imperfect judges and tastes

    def opinions(self, prompts, images):
        """The scores {name: (n,)} of five imperfect reward models for n pictures.

        layout sees where objects are and not what they are; colours also sees their colours; bag
        sees which shapes and which colours are there and neither where nor of what (as CLIP does);
        tidy sees only noise; bold likes large objects and bright pictures, whatever was asked for.
        """
        prompts = torch.as_tensor(prompts)
        corners, sizes, error = self.read(images)
        kind = torch.arange(OBJECTS + 1)
        anything = (kind != EMPTY).float().expand(OBJECTS + 1, -1)  # (13, 13)
        colour = anything * (kind[:, None] % 4 == kind % 4)
        shapes = F.one_hot(corners // 4, 4)[..., :3].amax(1)  # (n, 3): the last is EMPTY
        colours = (F.one_hot(corners % 4, 4) * (corners != EMPTY)[..., None]).amax(1)  # (n, 4)
        two = self.second[prompts] != EMPTY
        bag = torch.zeros(len(prompts))
        for thing, counts in ((self.first[prompts], True), (self.second[prompts], two)):
            thing = torch.where(thing == EMPTY, 0, thing)
            named = shapes.gather(1, thing[:, None] // 4) + colours.gather(1, thing[:, None] % 4)
            bag = bag + named[:, 0] * counts
        return {
            "layout": self.best_reading(prompts, corners, anything, 0.5),
            "colours": self.best_reading(prompts, corners, colour, 0.0),
            "bag": bag / (2 + 2 * two),
            "tidy": -error,
            "bold": sizes.sum(1) + shown(images).float().flatten(1).mean(1),
        }

    def criteria(self, prompts, images):
        """Three scores (n, 3) of n pictures: faith, clean and bold, each from about -2 to 2."""
        corners, sizes, error = self.read(images)
        count = (corners != EMPTY).sum(1).clamp(min=1)
        faith, bold = 4 * self.faith(prompts, corners) - 2, 4 * sizes.sum(1) / count - 6
        return torch.stack([faith, 4 * clean(error) + 2, bold.clamp(min=-2)], 1)

    def contexts(self, prompts):
        """The relation (n,) that each prompt asks for; the annotators' tastes depend on it."""
        return self.relation[torch.as_tensor(prompts)]

    # ---------------------------------------------------------------- measurements and pictures

    def features(self, images):
        """The fixed features (n, 64) of the Frechet distance, float64.

        They are the likeness of every corner to each object and to none, and its mean colour.
        """
        likeness = torch.exp(-self.errors(images)[0] / 0.05).flatten(1)
        return torch.cat([likeness, F.avg_pool2d(shown(images), CELL).flatten(1)], 1).double()

    @functools.cached_property
    def moments(self):
        """Mean and covariance of the features of 4,000 renders of prompts."""
        rng = torch.Generator().manual_seed(0)
        features = self.features(self.draw(self.place(self.prompts(4000, rng), rng), rng))
        return features.mean(0), features.T.cov()

    def frechet(self, images):
        """The Frechet distance of pictures (n, 3, 16, 16) to renders, in the feature space.

        It is infinite if a picture is not finite.
        """
        if not images.isfinite().all():
            return float("inf")
        features = self.features(images)
        return distance(features.mean(0), features.T.cov(), *self.moments)

    def explain(self, found):
        """What 1,000 renders have as their Frechet distance, which is what chance makes."""
        rng = torch.Generator().manual_seed(1)
        same = self.frechet(self.draw(self.place(self.prompts(1000, rng), rng), rng))
        return f"1,000 renders of other prompts have a Frechet distance of {same:.2g}."

    def pictures(self, policy, lab, n, stream):
        """n prompts and a sample for each, for a measurement."""
        rng = lab.eval_rng(stream)
        prompts = self.prompts(n, rng)
        return prompts, samples(policy, lab, prompts, rng)

    def look(self, policy, lab):
        """The Frechet distance of 256 samples, for a look during training."""
        return {"frechet_256": self.frechet(self.pictures(policy, lab, 256, "look")[1])}

    def measure(self, policy, lab):
        """Of 1,000 samples: the Frechet distance, and the share of pictures that are exactly right
        for prompts of one and of two objects."""
        prompts, images = self.pictures(policy, lab, lab.few(1000), "measure")
        right = self.faith(prompts, self.read(images)[0]) > 0.999
        two = self.second[torch.tensor(prompts)] != EMPTY
        shares = {"one": right[~two], "two": right[two]}
        found = {name: share.double().mean().nan_to_num().item() for name, share in shares.items()}
        return {"frechet": self.frechet(images), **found}

    def verdicts(self, prompts, images):
        """What the verifier says about n pictures: [(reward and objects as text, all right)]."""
        corners, _, _ = self.read(images)
        found = zip(self.reward(prompts, images).tolist(), corners.tolist())
        right = (self.faith(prompts, corners) > 0.999).tolist()
        seen = [f"{r:.2f} " + ", ".join(named(k)[2:] for k in c if k != EMPTY) for r, c in found]
        return list(zip(seen, right))

    def picture(self, before, after):
        """A Figure of samples (prompts, k, 3, 16, 16) of two models for the gallery's prompts.

        Both have the same noise. Under a picture stand its reward and what the verifier reads
        there, in green if it is what the prompt says."""
        from matplotlib.figure import Figure

        columns, rows, step = min(4, before.shape[1]), len(before), SIDE + 6
        figure = Figure(figsize=(9, 1.1 * rows), layout="constrained")
        for axes, images, title in zip(figure.subplots(1, 2), (before, after), ("before", "after")):
            images = images[:, :columns]
            tiles = F.pad(shown(images) / 2 + 0.5, (1, 5, 1, 5), value=1.0)
            grid = (
                tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)
            )  # (rows H, columns W, 3)
            axes.imshow(grid.numpy(), interpolation="nearest")
            asked = [p for p in self.gallery[:rows] for _ in range(columns)]
            mean = self.reward(asked, images.flatten(0, 1)).mean().item()
            axes.set_title(f"{title} (mean reward {mean:.2f})", fontsize=10)
            axes.axis("off")
            for i, (words, right) in enumerate(self.verdicts(asked, images.flatten(0, 1))):
                down, across = (i // columns) * step, (i % columns) * step
                if not across:
                    axes.text(0, down - 0.8, self.caption(asked[i]), fontsize=7, weight="bold")
                color = "tab:green" if right else "tab:red"
                axes.text(across, down + SIDE + 2.4, words, fontsize=4.5, color=color)
        return figure


def named(thing):
    """An object in words, such as "a red disc"."""
    return f"a {list(COLOURS)[thing % 4]} {SHAPES[thing // 4]}"


def clean(error):
    """The second term of the reward of mean squared errors (n,): from -1 to 0."""
    return (-error / 0.1).clamp(min=-1.0)
