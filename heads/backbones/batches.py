"""Images and responses of several subjects, in batches that mix them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch

from featcache.backbone.keys import Split
from featcache.cache.pixels import Pixels
from featcache.dataset.splits import BY_ID
from featcache.dataset.splits import Split as ImageSplit
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.device import pinned, to_device
from heads.config import TrainConfig


@dataclass(frozen=True)
class Targets:
    """Responses of one subject's surface to its images in a batch.

    rows : (n,) int64, images of the batch that are this subject's, in rising order
    responses : (n, n_vertices) float32
    """

    subject: str
    surface: str
    rows: torch.Tensor
    responses: torch.Tensor


@dataclass(frozen=True)
class Responses:
    """Responses of all subjects' surfaces to the images of a batch, side by side: two copies bring them to a device.

    keys : (subject, surface) of each part
    shapes : (n_images, n_vertices) of each part
    rows : int64, `Targets.rows` of all parts
    values : float32, the responses of all parts
    """

    keys: tuple[tuple[str, str], ...]
    shapes: tuple[tuple[int, int], ...]
    rows: torch.Tensor
    values: torch.Tensor

    def pinned(self, device: str) -> "Responses":
        """The same, from where it can be copied to this device without waiting."""
        return replace(self, rows=pinned(self.rows, device), values=pinned(self.values, device))

    def to(self, device: str) -> "Responses":
        """The same on a device."""
        return replace(self, rows=to_device(self.rows, device), values=to_device(self.values, device))

    def targets(self) -> list[Targets]:
        """The parts, as views."""
        rows = self.rows.split([n for n, _ in self.shapes])
        values = self.values.split([n * n_vertices for n, n_vertices in self.shapes])
        return [
            Targets(*key, own_rows, own_values.view(shape))
            for key, shape, own_rows, own_values in zip(self.keys, self.shapes, rows, values, strict=True)
        ]


class Images:
    """Training images of some subjects with their pixels and responses, split by one held-out fold.

    An image is a pair of numbers: the subject's, and the row among the subject's training images.

    Parameters
    ----------
    pixels : one a subject, in the same order
    split : the fold that is held out
    by : which images stay together in the folds

    Attributes
    ----------
    train_rows, held_out : for each subject the rows to train on, and those of the held-out fold

    Raises
    ------
    ValueError : pixels of other subjects
    ConfigError : a held-out fold that is too small to score
    """

    def __init__(
        self, subjects: Sequence[Subject], pixels: Sequence[Pixels], split: Split, by: ImageSplit = BY_ID
    ) -> None:
        self.subjects, self._pixels = tuple(subjects), tuple(pixels)
        if [len(subject_pixels.array) for subject_pixels in pixels] != [len(s.image_ids) for s in subjects]:
            raise ValueError("pixels are not those of the subjects")
        self._responses = [
            {surface: subject.responses(surface) for surface in subject.surfaces} for subject in subjects
        ]
        self.train_rows, self.held_out = split_rows(subjects, split, by)
        self._pairs = np.concatenate([pairs_of(number, rows) for number, rows in enumerate(self.train_rows)])

    def __len__(self) -> int:
        return len(self._pairs)

    @property
    def trained_ids(self) -> np.ndarray:
        """Ids of all images to train on, each once."""
        return np.unique(np.concatenate([s.train.ids[r] for s, r in zip(self.subjects, self.train_rows, strict=True)]))

    @property
    def held_out_ids(self) -> np.ndarray:
        """Ids of all images of the held-out fold, each once."""
        return np.unique(np.concatenate([s.train.ids[r] for s, r in zip(self.subjects, self.held_out, strict=True)]))

    def epoch(self, seed: int, number: int, n_images: int, by_subject: bool = False) -> list[np.ndarray]:
        """Images of each step of an epoch, (n_images, 2), in an order that seed and number decide.

        What does not fill a step is left out; it comes in another epoch.

        by_subject : whether a step has images of one subject alone
        """
        random = np.random.default_rng((seed, number))
        shuffled = random.permutation(self._pairs)
        if not by_subject:
            return _whole_steps(shuffled, n_images)
        of_subjects = [shuffled[shuffled[:, 0] == subject] for subject in range(len(self.subjects))]
        steps = [step for pairs in of_subjects for step in _whole_steps(pairs, n_images)]
        return [steps[k] for k in random.permutation(len(steps))]

    def n_steps(self, n_images: int, by_subject: bool = False) -> int:
        """Number of steps of an epoch, under the same settings."""
        return sum(len(rows) // n_images for rows in self.train_rows) if by_subject else len(self) // n_images

    def read(self, pairs: np.ndarray) -> torch.Tensor:
        """Pixels of some images, (n, 3, height, width), of the type in which they are kept."""
        first = self._pixels[pairs[0, 0]].array
        pixels = np.empty((len(pairs), *first.shape[1:]), dtype=first.dtype)
        for number in np.unique(pairs[:, 0]):
            of_subject = pairs[:, 0] == number
            pixels[of_subject] = self._pixels[number].array[pairs[of_subject, 1]]
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def responses(self, pairs: np.ndarray) -> Responses:
        """Responses to some images, for each subject and each of its surfaces that has vertices."""
        parts = [
            (number, surface, n_vertices, np.flatnonzero(pairs[:, 0] == number))
            for number in np.unique(pairs[:, 0])
            for surface, n_vertices in self.subjects[number].n_vertices.items()
            if n_vertices
        ]
        shapes = tuple((len(rows), n_vertices) for _, _, n_vertices, rows in parts)
        values, end = np.empty(sum(n * n_vertices for n, n_vertices in shapes), dtype=np.float32), 0
        for (number, surface, _, rows), shape in zip(parts, shapes, strict=True):
            start, end = end, end + shape[0] * shape[1]
            values[start:end].reshape(shape)[:] = self._responses[number][surface][pairs[rows, 1]]
        keys = tuple((self.subjects[number].name, surface) for number, surface, *_ in parts)
        rows = np.concatenate([np.empty(0, dtype=np.int64), *(rows for *_, rows in parts)])
        return Responses(keys, shapes, torch.from_numpy(rows), torch.from_numpy(values))


def split_rows(
    subjects: Sequence[Subject], split: Split, by: ImageSplit = BY_ID
) -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Rows of each subject to train on, and rows of the held-out fold.

    An image that one subject is tested on may be a training image of another: no subject is trained on it. Raises
    ConfigError for a held-out fold of fewer than 2 images.
    """
    tested = np.concatenate([subject.test.ids for subject in subjects])
    held_out = [by.folds(s.train.ids, split.n_folds, split.seed) == split.fold for s in subjects]
    for subject, mask in zip(subjects, held_out, strict=True):
        if mask.sum() < 2:
            raise ConfigError(
                f"fold {split.fold} of {subject.name}",
                expected="2 or more held-out images to score",
                found=mask.sum(),
                remedy="add images, or ask for fewer --folds",
            )
    trained = [~mask & ~np.isin(s.train.ids, tested) for s, mask in zip(subjects, held_out, strict=True)]
    return [np.flatnonzero(mask) for mask in trained], [np.flatnonzero(mask) for mask in held_out]


def _whole_steps(pairs: np.ndarray, n_images: int) -> list[np.ndarray]:
    """Pairs cut into steps; what does not fill the last is left out."""
    return [pairs[i : i + n_images] for i in range(0, len(pairs) - n_images + 1, n_images)]


def pairs_of(number: int, rows: np.ndarray) -> np.ndarray:
    """(n, 2) the images of one subject: its number beside each row."""
    return np.stack([np.full(len(rows), number), rows], 1)


@dataclass(frozen=True)
class Steps:
    """How the images of one step of the optimiser are cut into batches.

    batch : images that a device takes at a time
    passes : batches of a device in a step
    group : batches of each device whose predictions a correlation loss sees together; 0: each batch alone
    devices : processes that train together
    """

    batch: int
    passes: int
    group: int
    devices: int

    @property
    def images(self) -> int:
        """Images of one step, on all devices."""
        return self.batch * self.passes * self.devices

    def groups(self, pairs: np.ndarray) -> list[np.ndarray]:
        """The images of a step, (images, 2), by group: each (devices, passes of the group, batch, 2)."""
        passes = self.group or 1
        return list(pairs.reshape(-1, self.devices, passes, self.batch, 2))


def plan_steps(config: TrainConfig, devices: int, n_images: Sequence[int]) -> Steps:
    """Steps of a training on this many devices. n_images : of each subject

    Raises ConfigError where batches, accumulation and correlation batch do not fit each other or the images.
    """
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
    by_subject = config.batches == "subject"  # a subject that fills no step would never be trained on
    available = min(n_images) if by_subject else sum(n_images)
    if steps.images > available:
        raise ConfigError(
            "--batch-size",
            expected=f"at least {steps.images} training images{' of each subject' if by_subject else ''} for one step",
            found=available,
            remedy="lower it",
        )
    return steps
