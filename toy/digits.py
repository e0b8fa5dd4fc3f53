"""Handwritten digits: a prompt is a class, a response an image, the truth a fixed classifier's opinion plus the ink spent.

The images are scikit-learn's 1,797 real 8x8 digits, or those of an .npz file (`World.from_npz`), scaled to [-1, 1]. The reward
asks for a digit that the classifier recognises and for thick strokes, up to half of the pixels, so a white page is worse than a
digit. It is no judge of handwriting: what a method pays for it shows in the Frechet distance between its samples and the data.
"""

import hashlib

import torch
import torch.nn.functional as F

from data import UserError, printable
from nanomodel import UNet, UNetConfig
from toy import world

FLOOR = (
    -5.0
)  # least log-probability that counts: an image of another class costs this much and no more
INK = 3.0  # what the mean pixel is worth, up to an image that is half white


class World(world.World):
    name, kind = "digits", "images"
    pretrain = dict(steps=500, batch_size=128, lr=5e-3)
    align = dict(prompts=1024, steps=100, lr=2e-4, batch_size=64)

    def __init__(self, images=None, labels=None, size=None):
        """images: (N, H, W) or (N, H, W, 1 or 3) numbers, 0 = black, the largest = white; labels: (N,) ints, every class from 0 on; size:
        pixels a side (or height and width) to shrink to by averaging. Without images: scikit-learn's digits.
        ValueError in one line: they do not fit this, each other or the model (odd sides)."""
        import numpy as np

        if images is None:
            from sklearn.datasets import load_digits

            images, labels = load_digits(return_X_y=True)
            images = images.reshape(-1, 8, 8)
        images, labels = np.asarray(images), np.asarray(labels)
        channels = images.shape[3] if images.ndim == 4 else 1
        if (
            images.ndim not in (3, 4)
            or channels not in (1, 3)
            or not images.size
            or images.dtype.kind not in "uif"
        ):
            raise UserError(
                f"images {images.shape} {images.dtype}: expected numbers (N, H, W) or (N, H, W, 1 or 3)"
            )
        if not (images.min() >= 0 and 0 < images.max() < np.inf):
            raise UserError(
                f"images from {images.min()} to {images.max()}: expected finite numbers, 0 = black and the largest = white"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "ui":
            raise UserError(
                f"labels {labels.shape} {labels.dtype}: expected {len(images)} ints, one an image"
            )
        used = np.unique(labels)
        if len(used) < 2 or used[0] != 0 or used[-1] != len(used) - 1:
            raise UserError(
                f"labels {used[:20].tolist()}: expected two or more classes, each from 0 on in use"
            )
        self.config = UNetConfig(
            channels=channels, size=size or images.shape[1:3], classes=len(used)
        )
        pixels = (
            torch.from_numpy(images / np.float64(images.max()) * 2 - 1)
            .float()
            .reshape(*images.shape[:3], channels)
        )
        self.images = F.adaptive_avg_pool2d(
            pixels.permute(0, 3, 1, 2), self.config.size
        )  # (N, C, H, W)
        self.labels = torch.from_numpy(labels.astype("int64"))
        self.moments = moments(self.images)
        self.weight, self.bias = self._classifier()

    @classmethod
    def from_npz(cls, path, size=None):
        """The world of an .npz file with the arrays `images` and `labels`; sides of more than 16 pixels are halved (28 to 14) unless
        `size` is given. ValueError in one line naming the file: no archive, pickled objects, an array missing or not fitting."""
        import zipfile

        import numpy as np

        try:
            with open(path, "rb") as file:
                if not zipfile.is_zipfile(file):
                    raise UserError("not an .npz archive")
                file.seek(0)
                arrays = np.load(file, allow_pickle=False)
                for name in ("images", "labels"):
                    if name not in arrays:
                        raise UserError(
                            f"no array named {name}, only {', '.join(arrays) or 'none'}"
                        )
                images, labels = arrays["images"], arrays["labels"]
            if size is None and min(images.shape[1:3], default=0) > 16:
                size = [side // 2 for side in images.shape[1:3]]
            return cls(images, labels, size)
        except Exception as error:  # a broken archive raises many kinds
            raise UserError(f"{path}: {printable(' '.join(str(error).split()))}") from None

    def _classifier(self):
        """Weights and biases of a softmax regression on the pixels (of at most 5,000 images), right on 97 % of held-out digits."""
        from sklearn.linear_model import LogisticRegression

        few = torch.randperm(len(self.images), generator=torch.Generator().manual_seed(0))[:5000]
        fitted = LogisticRegression(C=0.1, max_iter=1000).fit(
            self.images[few].flatten(1).double().numpy(), self.labels[few].numpy()
        )
        weight, bias = torch.from_numpy(fitted.coef_), torch.from_numpy(fitted.intercept_)
        # of two classes scikit-learn keeps one logit
        return (
            (weight, bias)
            if len(weight) > 1
            else (torch.cat([0 * weight, weight]), torch.cat([0 * bias, bias]))
        )

    def key(self):
        """What tells this world from others of the same source: a hash of its images and labels."""
        return hashlib.sha256(
            self.images.numpy().tobytes() + self.labels.numpy().tobytes()
        ).hexdigest()

    def model(self):
        return UNet(self.config)

    def prompts(self, n, rng):
        """n class labels, uniform."""
        return torch.randint(self.config.classes, (n,), generator=rng).tolist()

    def demonstrations(self, n, rng):
        """n rows of one real image (1, C, H, W)."""
        chosen = torch.randint(len(self.images), (n,), generator=rng).tolist()
        return [
            {"prompt": int(self.labels[i]), "responses": self.images[i : i + 1], "scores": [1.0]}
            for i in chosen
        ]

    def classify(self, images):
        """(n, C, H, W) -> (n, classes) float64 log-probabilities."""
        return (shown(images).flatten(1) @ self.weight.T + self.bias).log_softmax(1)

    def reward(self, prompts, responses):
        """(n,) float64, -8 to 0: log p(prompt | image), not counted below -5, plus three times the mean pixel, not counted above 0."""
        images = responses if isinstance(responses, torch.Tensor) else torch.stack(list(responses))
        agreement = self.classify(images).gather(1, torch.as_tensor(prompts).view(-1, 1)).squeeze(1)
        return agreement.clamp(min=FLOOR) + INK * shown(images).flatten(1).mean(1).clamp(max=0.0)

    def frechet(self, images):
        """Frechet distance in pixel space between images (n, C, H, W) and the data: |m - m'|^2 + tr(S + S' - 2 (S S')^(1/2));
        infinite when an image is not finite. Halves of the digits are 0.3 apart."""
        if not images.isfinite().all():
            return float("inf")
        (mean, cov), (own_mean, own_cov) = moments(images), self.moments
        # S S' has the eigenvalues of the symmetric R S R with R = S'^(1/2)
        values, vectors = torch.linalg.eigh(own_cov)
        root = vectors * values.clamp(min=0).sqrt() @ vectors.T
        cross = torch.linalg.eigvalsh(root @ cov @ root).clamp(min=0).sqrt().sum()
        return max(
            0.0, float((mean - own_mean).square().sum() + cov.trace() + own_cov.trace() - 2 * cross)
        )

    def measure(self, policy, lab):
        """{frechet, agreement}: of samples in the data's class proportions, at most 2,000; the share the classifier reads as asked."""
        rng = lab.rng("measure")
        label = self.labels[torch.randperm(len(self.labels), generator=rng)[:2000]]
        images = policy.sample(label.tolist(), 1, rng)[:, 0].cpu()
        agreement = (self.classify(images).argmax(1) == label).double().mean()
        return {"frechet": self.frechet(images), "agreement": float(agreement)}

    def picture(self, before, after):
        """Samples (classes, k, C, H, W) before and after training, side by side, a row for each class: a Figure."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(9, 0.45 * len(before) + 0.6), layout="constrained")
        for axes, images, title in zip(figure.subplots(1, 2), (before, after), ("before", "after")):
            tiles = F.pad(shown(images) / 2 + 0.5, (1, 1, 1, 1), value=0.5)
            grid = tiles.permute(0, 3, 1, 4, 2).flatten(0, 1).flatten(1, 2)  # (classes H, k W, C)
            axes.imshow(grid.expand(-1, -1, 3).numpy(), interpolation="nearest")
            axes.set(title=title, xticks=[], yticks=[])
        return figure


def shown(images):
    """Images as a screen shows them: float64, cut to [-1, 1]; so no reward lies outside the range of pixels."""
    return images.detach().cpu().double().nan_to_num(-1.0).clamp(-1, 1)


def moments(images):
    """Mean (D,) and covariance (D, D) of images (n, C, H, W), float64."""
    x = images.detach().cpu().double().flatten(1)
    return x.mean(0), x.T.cov()
