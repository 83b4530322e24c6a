"""Images and responses of several subjects, in batches that mix them."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from featcache.cache.pixels import Pixels
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from heads.config import TrainConfig


@dataclass(frozen=True)
class Targets:
    """Responses of one subject's images in a batch.

    rows : (n,) which images of the batch are this subject's
    responses : (n, n_vertices) float32
    """

    subject: str
    hemisphere: str
    rows: torch.Tensor
    responses: torch.Tensor


class Images:
    """Training images of some subjects with their pixels and responses, split by one held-out fold.

    An image is a pair (number of the subject, row of its files).

    pixels : one a subject
    fold : {'fold': the one held out, 'n_folds': ..., 'seed': ...}
    """

    def __init__(self, subjects: Sequence[Subject], pixels: Sequence[Pixels], fold: dict[str, int]) -> None:
        self.subjects, self._pixels = tuple(subjects), tuple(pixels)
        if [len(own.array) for own in pixels] != [len(subject.image_ids) for subject in subjects]:
            raise ValueError("pixels are not those of the subjects")
        self._responses = [{h: subject.responses(h) for h in HEMISPHERES} for subject in subjects]
        self.trained, self.held_out = split(subjects, fold)
        self._pairs = np.concatenate([_pairs(number, rows) for number, rows in enumerate(self.trained)])

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def trained_ids(self) -> np.ndarray:
        return np.unique(np.concatenate([s.train.ids[r] for s, r in zip(self.subjects, self.trained, strict=True)]))

    @property
    def held_out_ids(self) -> np.ndarray:
        return np.unique(np.concatenate([s.train.ids[r] for s, r in zip(self.subjects, self.held_out, strict=True)]))

    def epoch(self, seed: int, number: int, step: int) -> list[np.ndarray]:
        """The pairs of each step of an epoch, (step, 2); those that do not fill one come in another epoch."""
        shuffled = np.random.default_rng((seed, number)).permutation(self._pairs)
        return [shuffled[i : i + step] for i in range(0, len(shuffled) - step + 1, step)]

    def read(self, pairs: np.ndarray) -> torch.Tensor:
        """(n, 3, height, width) uint8"""
        first = self._pixels[pairs[0, 0]]
        out = np.empty((len(pairs), *first.array.shape[1:]), dtype=np.uint8)
        for number in np.unique(pairs[:, 0]):
            own = pairs[:, 0] == number
            out[own] = self._pixels[number].array[pairs[own, 1]]
        return torch.from_numpy(out).permute(0, 3, 1, 2)

    def targets(self, pairs: np.ndarray) -> list[Targets]:
        """The responses to these images, for each subject and hemisphere that has vertices."""
        return [
            self._target(number, hemisphere, pairs)
            for number in np.unique(pairs[:, 0])
            for hemisphere in HEMISPHERES
            if self.subjects[number].n_vertices[hemisphere]
        ]

    def _target(self, number: int, hemisphere: str, pairs: np.ndarray) -> Targets:
        own = np.flatnonzero(pairs[:, 0] == number)
        responses = np.ascontiguousarray(self._responses[number][hemisphere][pairs[own, 1]], dtype=np.float32)
        return Targets(self.subjects[number].name, hemisphere, torch.from_numpy(own), torch.from_numpy(responses))


def split(subjects: Sequence[Subject], fold: dict[str, int]) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of each subject that are trained on, and rows that are held out.

    A picture that one subject is tested on may be a training image of another: it is trained on by none.
    """
    tested = np.concatenate([subject.test.ids for subject in subjects])
    held_out = [assign_folds(s.train.ids, fold["n_folds"], fold["seed"]) == fold["fold"] for s in subjects]
    for subject, mask in zip(subjects, held_out, strict=True):
        if mask.sum() < 2:
            raise ConfigError(
                f"fold {fold['fold']} of {subject.name}",
                expected="2 or more held-out images to score",
                found=mask.sum(),
                remedy="add images, or ask for fewer --folds",
            )
    shown = [~mask & ~np.isin(s.train.ids, tested) for s, mask in zip(subjects, held_out, strict=True)]
    return [np.flatnonzero(mask) for mask in shown], [np.flatnonzero(mask) for mask in held_out]


def _pairs(number: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), number), rows], 1)


@dataclass(frozen=True)
class Steps:
    """How a step of the optimiser is cut into batches.

    batch : images a device and pass
    passes : batches a device and step
    group : passes whose predictions a correlation loss sees together, over all devices; 0: each batch alone
    devices : processes that train together
    """

    batch: int
    passes: int
    group: int
    devices: int

    @property
    def images(self) -> int:
        return self.batch * self.passes * self.devices

    def groups(self, pairs: np.ndarray) -> list[np.ndarray]:
        """(images, 2) of one step -> for each group (devices, passes of the group, batch, 2)."""
        passes = self.group or 1
        return list(pairs.reshape(-1, self.devices, passes, self.batch, 2))


def plan_steps(config: TrainConfig, devices: int, n_images: int) -> Steps:
    """Raises ConfigError where batches, accumulation and correlation batch do not fit each other or the images."""
    batch, correlation = config.batch_size, config.correlation_batch if config.uses_correlation else 0
    together = batch * devices
    group = 0
    passes = config.accumulate
    if correlation not in (0, batch):
        if correlation % together or (config.accumulate > 1 and config.accumulate % (correlation // together)):
            raise ConfigError(
                "--correlation-batch",
                expected=f"a multiple of {together} (--batch-size times processes), and --accumulate "
                f"{config.accumulate} to be a multiple of the passes in it",
                found=correlation,
                remedy="choose another",
            )
        group = correlation // together
        passes = max(passes, group)
    steps = Steps(batch, passes, group, devices)
    if steps.images > n_images:
        raise ConfigError(
            "--batch-size",
            expected=f"at least {steps.images} training images for one step",
            found=n_images,
            remedy="lower it",
        )
    return steps
