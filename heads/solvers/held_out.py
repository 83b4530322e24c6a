"""Which images a head is fitted to, chosen on and scored on, fold by fold: decided here and nowhere else.

On features of a frozen backbone, penalties and the epoch to stop at are chosen on training images: no image of the
held-out fold influences its head. If the backbone was trained on these images, choosing on them is useless: it has
learnt their responses with the noise, and no penalty looks too small. Then choices are made on the held-out fold. The
fold is cut in parts, and each part is predicted by a head that was chosen on the other parts: no image influences the
head that predicts it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from featcache.dataset.splits import BY_ID, check_folds, refuse_leak
from featcache.dataset.splits import Split as ImageSplit
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, LeakError
from heads.features.sets import FeatureSet

_PARTS = 4  # of a held-out fold


class Split(NamedTuple):
    """The rows of one fold for a solver that chooses when to stop.

    train_rows : rows to fit to
    choice_rows : for each head, the rows that it is chosen on; the last head is for test images
    parts : the held-out rows that each of the first heads predicts
    """

    train_rows: np.ndarray
    choice_rows: list[np.ndarray]
    parts: list[np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldPlan:
    """The folds of one subject's training images, and what each may be used for.

    image_ids : (n_train,) int64
    folds : (n_train,) the fold of each training image
    held_out : the folds that are held out, in turn
    backbone_trained : whether the backbone was trained once for each held-out fold, on the other folds; then there is
        one set of features for each held-out fold, else one for all
    by : which images stay together in the folds
    """

    image_ids: np.ndarray
    folds: np.ndarray
    held_out: tuple[int, ...]
    backbone_trained: bool
    by: ImageSplit = BY_ID

    @classmethod
    def of_frozen(cls, image_ids: np.ndarray, n_folds: int, seed: int, by: ImageSplit = BY_ID) -> "FoldPlan":
        """Plan for a frozen backbone: every fold is held out in turn. Raises ConfigError for an empty fold."""
        folds = by.folds(image_ids, n_folds, seed)
        check_folds(folds, n_folds)
        return cls(image_ids=image_ids, folds=folds, held_out=tuple(range(n_folds)), backbone_trained=False, by=by)

    @classmethod
    def of_features(
        cls, subject: Subject, features: FeatureSet, n_folds: int, seed: int, by: ImageSplit = BY_ID
    ) -> "FoldPlan":
        """Plan for some features: with the folds of the backbone's training, or `n_folds` for a frozen backbone.

        Raises ConfigError for a fold without images, LeakError for a backbone that was trained under another split.
        """
        if not features.backbone_trained:
            return cls.of_frozen(subject.train.ids, n_folds, seed, by)
        training = features.trainings[0]
        if training.split != by.key:
            same = training.split.name == by.name
            raise LeakError(
                f"{features.title} of {subject.name}",
                expected=f"--split {training.split}, under which its backbone was trained",
                found=str(by.key),
                remedy="train it again: the groups have changed since"
                if same
                else f"give --split {training.split.name}, or choose other features with --features",
            )
        folds = by.folds(subject.train.ids, training.n_folds, training.seed)
        check_folds(folds, training.n_folds)
        held_out = features.held_out
        return cls(image_ids=subject.train.ids, folds=folds, held_out=held_out, backbone_trained=True, by=by)

    def __len__(self) -> int:
        """Number of folds that are held out."""
        return len(self.held_out)

    @property
    def n_train(self) -> int:
        return len(self.folds)

    @property
    def n_sources(self) -> int:
        """Number of sets of features: one for all folds, or one for each."""
        return len(self) if self.backbone_trained else 1

    @property
    def prefixes(self) -> list[str]:
        """Prefixes of the names of saved heads, one for each set of features."""
        return [f"fold{fold}." for fold in self.held_out] if self.backbone_trained else [""]

    @property
    def scored(self) -> np.ndarray:
        """Rows that are predicted out of fold."""
        return np.flatnonzero(np.isin(self.folds, self.held_out))

    @property
    def n_scales(self) -> int:
        """Number of sets of scales of features (see scale_rows)."""
        return len(self) if self.backbone_trained else min(len(self), 2)

    def scales(self, k: int) -> int:
        """Number of the set of scales that the k-th held-out fold uses."""
        return k if self.backbone_trained else 2 * k // len(self)

    def scale_rows(self, number: int) -> np.ndarray:
        """Rows whose features decide a set of scales; no fold that uses the set holds any of them out.

        Features of a frozen backbone have two sets: each half of the folds uses the images of the other half. So what
        is computed from scaled features is computed twice, and not once for every fold.
        """
        return np.flatnonzero(~np.isin(self.folds, [self.held_out[k] for k in self.users(number)]))

    def users(self, number: int) -> list[int]:
        """The held-out folds, counted from 0, that use a set of scales."""
        return [k for k in range(len(self)) if self.scales(k) == number]

    def source(self, k: int) -> int:
        """Number of the set of features that the k-th held-out fold reads."""
        return k if self.backbone_trained else 0

    def outside(self, k: int) -> np.ndarray:
        """Rows to fit to, without the k-th held-out fold."""
        return np.flatnonzero(self.folds != self.held_out[k])

    def inside(self, k: int) -> np.ndarray:
        """Rows of the k-th held-out fold."""
        return np.flatnonzero(self.folds == self.held_out[k])

    def parts(self, k: int) -> list[np.ndarray]:
        """The held-out rows in parts, with a separate head for each; one part for a frozen backbone."""
        if not self.backbone_trained:
            return [self.inside(k)]
        return clean_parts(self.image_ids, self.inside(k), self.held_out[k], self.by)

    def n_choices(self, k: int) -> int:
        """Number of heads of the k-th fold: one for each part, and one for test images if the backbone was trained."""
        return len(self.parts(k)) + int(self.backbone_trained)

    def split(self, k: int, one_in: int, seed: int) -> Split:
        """Rows of the k-th fold for early stopping. Raises ConfigError for too few images.

        one_in, seed : on a frozen backbone, one in `one_in` images outside the fold decides when to stop
        """
        parts = self.parts(k)
        if self.backbone_trained:
            inside = self.inside(k)
            return Split(self.outside(k), [*(np.setdiff1d(inside, part) for part in parts), inside], parts)
        train_rows, stop = stop_split(self.image_ids, self.outside(k), self.held_out[k], one_in, seed, self.by)
        return Split(train_rows, [stop], parts)

    def refuse_leaks(self, choice_rows: Sequence[np.ndarray], train_rows: np.ndarray, what: str) -> None:
        """Raise LeakError where an image is both trained on and chosen on."""
        for rows in choice_rows:
            refuse_leak(self.image_ids[train_rows], self.image_ids[rows], what)


def stop_split(
    image_ids: np.ndarray, outside: np.ndarray, fold: int, one_in: int, seed: int, by: ImageSplit = BY_ID
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on, and rows that decide when to stop: both outside a fold, which is for scoring.

    Raises ConfigError for fewer than 4 images outside the fold.
    """
    pictures = np.unique(image_ids[outside])  # one that was shown twice has two rows
    if len(pictures) < 4:
        raise ConfigError(
            f"fold {fold}",
            expected="4 or more images outside it, to train on and to decide when to stop",
            found=len(pictures),
            remedy="add images, or give other --folds",
        )
    stop = by.parts(image_ids[outside], one_in, seed + 1) == 0
    # if the random draw leaves too few images for r: every tenth image by id, or 2 or 3 of fewer than 20
    if not 2 <= stop.sum() <= len(outside) - 2:
        stop = np.isin(image_ids[outside], pictures[:: min(10, len(pictures) // 2)])
    return outside[~stop], outside[stop]


def clean_parts(image_ids: np.ndarray, held_out: np.ndarray, fold: int, by: ImageSplit = BY_ID) -> list[np.ndarray]:
    """Rows of a held-out fold in parts; for each part, the other parts together have at least 2 images.

    by : whose groups stay in one part where the fold has enough of them; else parts are by image id

    Raises ConfigError for a fold that is too small.
    """
    parts = _parts(image_ids, held_out, fold, by) or _parts(image_ids, held_out, fold, BY_ID)
    if not parts:
        raise ConfigError(
            f"fold {fold}",
            expected="enough held-out images to choose by and to score",
            found=len(held_out),
            remedy="add images, or train with fewer --folds",
        )
    for part in parts:
        refuse_leak(image_ids[np.setdiff1d(held_out, part)], image_ids[part], f"what is chosen on fold {fold}")
    return parts


def _parts(image_ids: np.ndarray, held_out: np.ndarray, fold: int, by: ImageSplit) -> list[np.ndarray]:
    """Rows in parts; none where there would be one part, or fewer than 2 images beside one."""
    numbers = by.parts(image_ids[held_out], _PARTS, fold)
    parts = [held_out[numbers == part] for part in range(_PARTS)]
    parts = [part for part in parts if len(part)]
    return parts if len(parts) > 1 and max(map(len, parts)) <= len(held_out) - 2 else []
