"""Handwritten digits: a prompt is a class, a response is an image of 8 x 8 pixels.

    prompt 7    response: an image (1, 8, 8) of numbers from -1 (black) to 1 (white)

The images are scikit-learn's 1,797 real digits, or those of an .npz file (`World.from_npz`). The
reward is high for a digit that a fixed classifier recognizes, and for thick strokes until half of
the image is white; it lies between -8 and 0. Neither term measures how real the handwriting looks,
so the reward can be gamed by blobs that the classifier is sure of and by extra ink. The Frechet
distance between samples and data, which is not part of the reward, shows this.
"""

import hashlib
import math
import os
import warnings
import zipfile

import torch
import torch.nn.functional as F

from data import UserError, collate, printable
from nanomodel import UNet, UNetConfig
from toy import world

FLOOR = -5.0  # lower bound of the log-probability in the reward
INK = 3.0  # weight of the mean pixel in the reward, up to an image that is half white
SAMPLE = 5000  # largest number of images to which the classifier is fitted
CLASSES, NUMBERS = 256, 4096  # largest number of classes, and of values in an image (C * H * W)
SHOWN = 24  # prompts of samples.png, if there are more
LONGEST = 32  # largest number of words of a prompt
LIMIT = 2**29  # bytes of memory that the arrays of an .npz file and the images may take


class World(world.World):
    """The world of labelled images: `images` (N, C, H, W) in [-1, 1] and `labels` (N,).

    images: (N, H, W) or (N, H, W, 1 or 3) numbers, 0 = black, the largest = white; None: digits.
    labels: (N,) ints from 0 on, with every class in use.
    size: the side (or height and width) to which images are shrunk by averaging; it must be even.
    captions: the text of each class, whose words the model reads; None: it knows only the class.
    pairs: (P,) and (P,) indices of chosen and rejected images of one class; None: pairs are
        sampled. A tenth of them is held out.
    UserError: the arrays do not have this form, or do not fit each other or the model.
    """

    name, kind = "digits", "images"
    pretrain = dict(steps=500, batch_size=128, lr=5e-3)
    align = dict(prompts=1024, steps=100, lr=2e-4, batch_size=64)

    def __init__(self, images=None, labels=None, size=None, captions=None, pairs=None):
        import numpy as np

        own = images is not None  # larger images need another recipe, and guidance is expected
        if images is None:
            from sklearn.datasets import load_digits

            images, labels = load_digits(return_X_y=True)
            images = images.reshape(-1, 8, 8)
        images, labels = np.asarray(images), np.asarray(labels)
        classes = check_arrays(images, labels)
        channels = images.shape[3] if images.ndim == 4 else 1
        how = dict(schedule="cosine", error="output", free=True) if own else {}
        if captions is not None:
            how["words"] = word_table(captions)
        size = size or images.shape[1:3]
        self.config = UNetConfig(channels=channels, size=size, classes=classes, **how)
        self.guided, self.captions = own, captions
        height, width = self.config.size
        if channels * height * width > NUMBERS:
            raise UserError(
                f"an image of {height} x {width} pixels in {channels} channels has more than "
                f"{NUMBERS} numbers: --image_size shrinks it"
            )
        white = np.float64(images.max())
        self.images = torch.empty(len(images), channels, height, width)
        for start in range(0, len(images), 1024):  # in pieces, as float64 needs much more memory
            pixels = torch.from_numpy(images[start : start + 1024] / white * 2 - 1).float()
            pixels = pixels.view(*pixels.shape[:3], channels).permute(0, 3, 1, 2)
            self.images[start : start + 1024] = F.adaptive_avg_pool2d(pixels, self.config.size)
        self.labels = torch.from_numpy(labels.astype("int64"))
        if pairs is not None:
            self.pairs, self.held_out = self._split(*pairs)
            self.given = self._training_pairs
        if classes > SHOWN:
            self.gallery = list(range(SHOWN))
        self.moments = moments(self.images)
        self.weight, self.bias = self._classifier()

    @classmethod
    def from_npz(cls, path, size=None, limit=LIMIT):
        """The world of an .npz file with the arrays `images` and `labels` or `prompts`.

        prompts: (N,) texts, of which equal ones are one class. image_w and image_l, if they are
        there, are the indices of chosen and rejected images. Sides of more than 16 pixels are
        halved (28 to 14) unless `size` is given. limit: the
        largest number of bytes of memory that the arrays and the images take, after unpacking.
        UserError, which names the file: it is not an archive, it holds pickled objects, or an array
        is missing or does not fit.
        """
        try:
            more = ("labels", "prompts", "image_w", "image_l")
            arrays = read_arrays(path, ("images",), limit, more)
            labels, captions = labels_of(arrays)
            shape = arrays["images"].shape[1:3]
            if size is None and min(shape, default=0) > 16:
                size = [side // 2 for side in shape]
            # the images are kept in float32, at the size to which they are shrunk
            area = [size, size] if isinstance(size, int) else size or shape
            channels = arrays["images"].shape[3] if arrays["images"].ndim == 4 else 1
            kept = 4 * len(arrays["images"]) * math.prod(area) * channels
            if arrays["images"].nbytes + kept > limit:
                raise UserError(too_large(limit))
            pairs = [arrays[name] for name in ("image_w", "image_l") if name in arrays]
            if len(pairs) == 1:
                raise UserError("image_w and image_l are given together, or not at all")
            made = cls(arrays["images"], labels, size, captions, pairs or None)
            made.name = printable(os.path.basename(path), 60)
            return made
        except Exception as error:  # a damaged archive raises many types
            message = " ".join(str(error).split()) or type(error).__name__
            raise UserError(f"{printable(path)}: {printable(message)}") from None

    def _split(self, chosen, rejected):
        """Rows of pairs of images, for training and held out, in a fixed random order."""
        for side in (chosen, rejected):
            fits = side.ndim == 1 and side.dtype.kind in "ui" and len(side) == len(chosen) > 0
            if not fits or side.min() < 0 or side.max() >= len(self.images):
                raise UserError(
                    f"image_w, image_l: expected equally many indices from 0 to "
                    f"{len(self.images) - 1}, one or more"
                )
        pairs = torch.from_numpy(chosen.astype("int64")), torch.from_numpy(rejected.astype("int64"))
        mixed = (self.labels[pairs[0]] != self.labels[pairs[1]]).nonzero().flatten()
        if len(mixed):
            raise UserError(f"pair {int(mixed[0])} of image_w, image_l: images of two classes")
        order = torch.randperm(len(chosen), generator=torch.Generator().manual_seed(0))
        both = torch.stack(pairs, 1)[order]
        rows = [
            dict(prompt=int(self.labels[w]), responses=self.images[[w, r]], scores=[1.0, 0.0])
            for w, r in both.tolist()
        ]
        held_out = len(rows) // 10
        return rows[held_out:], rows[:held_out]

    def _training_pairs(self, k):
        """The user's pairs that are not held out."""
        return list(self.pairs)

    def _classifier(self):
        """Weights (classes, D) and biases (classes,) of a softmax regression on the pixels.

        It is fitted to SAMPLE random images, and to one image of each class that is not among
        them.
        """
        from sklearn.linear_model import LogisticRegression

        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        few, rest = order[:SAMPLE], order[SAMPLE:]
        for c in sorted(set(range(self.config.classes)) - set(self.labels[few].tolist())):
            few = torch.cat([few, rest[self.labels[rest] == c][:1]])
        pixels = self.images[few].flatten(1).double().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # the fit need not converge, it only has to be fixed
            fitted = LogisticRegression(C=0.1, max_iter=1000).fit(pixels, self.labels[few].numpy())
        weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        if len(weight) > 1:
            return weight, bias
        # for two classes scikit-learn stores only one logit
        return torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias])

    def key(self):
        """A hash of the images and labels."""
        hashed = hashlib.sha256(self.images.numpy())
        hashed.update(self.labels.numpy())
        hashed.update(repr(self.captions).encode())
        return hashed.hexdigest()

    def model(self):
        """A new UNet with about 0.2M parameters."""
        return UNet(self.config)

    def prompts(self, n, rng):
        """n class labels, uniformly drawn."""
        return torch.randint(self.config.classes, (n,), generator=rng).tolist()

    def demonstrations(self, n, rng):
        """n rows of one real image (1, C, H, W)."""
        drawn = torch.randint(len(self.images), (n,), generator=rng).tolist()
        return [
            dict(prompt=int(self.labels[i]), responses=self.images[i : i + 1], scores=[1.0])
            for i in drawn
        ]

    def classify(self, images):
        """The classifier's log-probabilities (n, classes), float64, of images (n, C, H, W)."""
        return (shown(images).flatten(1) @ self.weight.T + self.bias).log_softmax(1)

    def reward(self, prompts, responses):
        """The true reward of n images, (n,) float64 between -8 and 0.

        It is log p(prompt | image), clamped at -5 from below, plus three times the mean pixel,
        clamped at 0 from above. responses: a tensor (n, C, H, W) or a list of images (C, H, W).
        """
        images = responses if isinstance(responses, torch.Tensor) else torch.stack(list(responses))
        label = torch.as_tensor(prompts).view(-1, 1)
        agreement = self.classify(images).gather(1, label).squeeze(1)
        ink = shown(images).flatten(1).mean(1)
        return agreement.clamp(min=FLOOR) + INK * ink.clamp(max=0.0)

    def parts(self, prompt, response):
        """The two terms of the reward of one image (C, H, W): {name: number}."""
        log_prob = float(self.classify(response[None])[0, int(prompt)])
        ink = float(shown(response).mean())
        return {"log_prob": max(FLOOR, log_prob), "ink": INK * min(0.0, ink)}

    def halves(self):
        """The Frechet distance between two random halves of the data: what chance alone makes."""
        order = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))
        one, other = (moments(self.images[part]) for part in order.chunk(2))
        return distance(*one, *other)

    def explain(self, found):
        """A sentence on what the Frechet distance in an evaluation means."""
        root = math.sqrt(found["frechet"])
        return (
            f"A Frechet distance of {found['frechet']:.3g} between samples and data is that "
            f"of two clouds of images that lie {root:.2g} apart as vectors of pixels (black -1, "
            f"white 1), or differ as much in their spread; two random halves of the data have "
            f"{self.halves():.2g}."
        )

    def look(self, policy, lab):
        """The Frechet distance of 256 samples, for a look during training: {name: number}."""
        rng = lab.eval_rng("look")
        label = self.labels[torch.randperm(len(self.labels), generator=rng)[:256]]
        images = samples(policy, lab, label.tolist(), rng)
        return {"frechet_256": self.frechet(images)}

    def frechet(self, images):
        """Frechet distance in pixel space between images (n, C, H, W) and the data.

        With means m, m' and covariances S, S' it is |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2)). It is
        infinite if an image is not finite.
        """
        if not images.isfinite().all():
            return float("inf")
        return distance(*moments(images), *self.moments)

    def measure(self, policy, lab):
        """{frechet, agreement} of at most 2,000 samples, in the data's class proportions.

        agreement: the share of samples that the classifier assigns to the class of the prompt.
        """
        rng = lab.rng("measure")
        label = self.labels[torch.randperm(len(self.labels), generator=rng)[:2000]]
        images = samples(policy, lab, label.tolist(), rng)
        agreement = (self.classify(images).argmax(1) == label).double().mean()
        found = {"frechet": self.frechet(images), "agreement": float(agreement)}
        # models of different schedules do not score at the same noise levels
        if self.held_out and torch.equal(policy.alpha_bar, lab.reference.alpha_bar):
            found["pair_accuracy"] = self.pair_accuracy(policy, lab)
        return found

    @torch.no_grad()
    def pair_accuracy(self, policy, lab, draws=8):
        """The share of held-out pairs whose chosen image has the higher log-ratio; ties count half.

        A log-ratio is the mean over `draws` draws of noise, which all models share.
        """
        rng, total = lab.eval_rng("held-out noise"), 0.0
        for start in range(0, len(self.held_out), 64):
            batch = collate(self.held_out[start : start + 64]).to(policy.device)
            gap = 0.0
            for _ in range(draws):
                batch = policy.prepare(batch, rng)
                ratio = (policy.logps(batch) - lab.reference.logps(batch)).sum(-1)  # (B, 2)
                gap = gap + ratio[:, 0] - ratio[:, 1]
            total += ((gap > 0).double() + 0.5 * (gap == 0)).sum().item()
        return total / len(self.held_out)

    def picture(self, before, after):
        """A Figure of samples (classes, k, C, H, W) of two models, one row per class.

        Both have the same noise. Beside a row stand its class and the mean reward of its images."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(10, 0.45 * len(before) + 0.8), layout="constrained")
        classes, k = before.shape[:2]
        for axes, images, title in zip(figure.subplots(1, 2), (before, after), ("before", "after")):
            prompts = [c for c in range(classes) for _ in range(k)]
            rewards = self.reward(prompts, images.flatten(0, 1)).view(classes, k).mean(1).tolist()
            tiles = F.pad(shown(images) / 2 + 0.5, (1, 1, 1, 1), value=0.5)
            grid = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (classes H, k W, C)
            axes.imshow(grid.expand(-1, -1, 3).numpy(), interpolation="nearest")
            mean = sum(rewards) / classes
            axes.set_title(f"{title} (mean reward {mean:.2f})", fontsize=10)
            middle = [(c + 0.5) * grid.shape[0] / classes - 0.5 for c in range(classes)]
            axes.set_xticks([])
            names = self.captions or range(classes)
            axes.set_yticks(
                middle, [printable(str(names[c]), 40) for c in range(classes)], fontsize=8
            )
            axes.set_ylabel("prompt" if self.captions else "class")
            right = axes.secondary_yaxis("right")
            right.set_yticks(middle, [f"{reward:.2f}" for reward in rewards], fontsize=8)
            right.tick_params(length=0)
        return figure


def samples(policy, lab, prompts, rng):
    """One image for each prompt, (n, C, H, W) on the CPU, with the guidance of the run."""
    return torch.cat([row["responses"] for row in lab.sample(policy, prompts, 1, rng)])


def distance(mean, cov, own_mean, own_cov):
    """The Frechet distance of two normal distributions with these means and covariances."""
    # S S' has the eigenvalues of the symmetric R S R with R = S'^(1/2)
    values, vectors = torch.linalg.eigh(own_cov)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
    shift = (mean - own_mean).square().sum()
    return max(0.0, float(shift + cov.trace() + own_cov.trace() - 2 * cross))


def check_arrays(images, labels):
    """The number of classes of NumPy arrays. UserError: they are not images with labels."""
    import numpy as np

    shape, channels = images.shape, images.shape[3] if images.ndim == 4 else 1
    fits = images.ndim in (3, 4) and channels in (1, 3) and images.size
    if not fits or images.dtype.kind not in "uif" or images.dtype.itemsize > 8:
        raise UserError(
            f"images {shape} {images.dtype}: expected numbers (N, H, W) or (N, H, W, 1 or 3)"
        )
    if not (images.min() >= 0 and 0 < images.max() < np.inf):
        raise UserError(
            f"images from {images.min()} to {images.max()}: "
            "expected finite numbers, 0 = black and the largest = white"
        )
    if labels.shape != shape[:1] or labels.dtype.kind not in "ui":
        raise UserError(
            f"labels {labels.shape} {labels.dtype}: expected {len(images)} ints, one per image"
        )
    used = np.unique(labels)
    if len(used) < 2 or used[0] != 0 or used[-1] != len(used) - 1:
        raise UserError(
            f"labels {used[:20].tolist()}: expected two or more classes, each from 0 on in use"
        )
    if len(used) > CLASSES:
        raise UserError(f"labels of {len(used)} classes: expected at most {CLASSES}")
    return len(used)


def word_table(captions):
    """The numbers of the words of each text, and of no text in the last row, equally many."""
    words = [text.lower().split() or [""] for text in captions]
    known = {word: i + 2 for i, word in enumerate(sorted({w for each in words for w in each}))}
    longest = max(map(len, words))
    table = [[known[w] for w in each] + [1] * (longest - len(each)) for each in words]
    return [*table, [0] * longest]


def labels_of(arrays):
    """The labels (N,) of the arrays of a file, and the text of each class if it has prompts."""
    import numpy as np

    if ("labels" in arrays) == ("prompts" in arrays):
        raise UserError("no array named labels (or prompts, instead of labels)")
    if "labels" in arrays:
        return arrays["labels"], None
    prompts = arrays["prompts"]
    if prompts.ndim != 1 or prompts.dtype.kind != "U" or not len(prompts):
        raise UserError(f"prompts {prompts.shape} {prompts.dtype}: expected texts, one per image")
    captions, labels = np.unique(prompts, return_inverse=True)
    if max(len(text.split()) for text in captions.tolist()) > LONGEST:
        raise UserError(f"prompts: a text has more than {LONGEST} words")
    return labels, captions.tolist()


def read_arrays(path, names, limit, more=()):
    """{name: array} of an .npz file, with the arrays `more` where the file has them.

    UserError: one of `names` is missing, or they exceed `limit` bytes.

    Nothing is unpickled. The size is the one that the archive states, and no more than that is
    read.
    """
    import numpy as np

    with open(path, "rb") as file:
        if not zipfile.is_zipfile(file):
            raise UserError("not an .npz archive")
        file.seek(0)
        arrays = np.load(file, allow_pickle=False)
        for name in names:
            if name not in arrays:
                raise UserError(f"no array named {name}, only {', '.join(arrays) or 'none'}")
        names = [*names, *(name for name in more if name in arrays)]
        sizes = {info.filename: info.file_size for info in arrays.zip.infolist()}
        if sum(sizes.get(f"{name}.npy", sizes.get(name, 0)) for name in names) > limit:
            raise UserError(too_large(limit))
        return {name: arrays[name] for name in names}


def too_large(limit):
    """The message for arrays that take too much memory."""
    return f"more than {limit / 2**30:.2g} GiB once unpacked; --data_limit allows more"


def shown(images):
    """Images as a screen shows them: float64, clamped to [-1, 1], with black in place of NaN."""
    return images.detach().cpu().double().nan_to_num(-1.0).clamp(-1, 1)


def moments(images):
    """Mean (D,) and covariance (D, D), float64, of images (n, C, H, W) with D = C * H * W."""
    if len(images) <= 8192:
        x = images.detach().cpu().double().flatten(1)
        return x.mean(0), x.T.cov()
    # in pieces, as float64 needs twice the memory
    pieces = [x.detach().cpu().flatten(1) for x in images.split(8192)]
    mean = sum(x.double().sum(0) for x in pieces) / len(images)
    outer = sum((y := x.double() - mean).T @ y for x in pieces)
    return mean, outer / (len(images) - 1)
