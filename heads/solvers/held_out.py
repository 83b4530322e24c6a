"""Which images a head is fitted to, chosen by and scored on, fold by fold: decided here and nowhere else.

On features of a frozen backbone everything that is chosen (penalties, when to stop) is chosen on images that the head
may see: no image of the held-out fold has a say. On features of a backbone that was trained on those very images that
would be worthless: it has learnt their responses, noise and all, and no penalty looks too small. There, choices are
made on the held-out fold, and yet no image has a say in the head that predicts it: the fold is cut in parts, and each
part is predicted by the head that the other parts chose.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from featcache.dataset.splits import assign_folds, check_folds, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from heads.features.sets import FeatureSet

_PARTS = 4  # of a held-out fold


class Split(NamedTuple):
    """The rows of one fold for a solver that chooses when to stop.

    train_rows : rows to fit to
    choices : for each head, the rows that it is chosen by; the last head is for images of no fold
    parts : the held-out rows that each of the first heads predicts
    """

    train_rows: np.ndarray
    choices: list[np.ndarray]
    parts: list[np.ndarray]


@dataclass(frozen=True, kw_only=True, eq=False)
class FoldPlan:
    """The folds of one subject's training images, and what each may be used for.

    image_ids : (n_train,) int64
    folds : (n_train,) the fold of each training image
    held_out : the folds that are held out, in turn
    backbone_trained : whether the features come from a backbone that was trained once for each held-out fold, on the others;
        then there is one set of features for each, else one for all
    """

    image_ids: np.ndarray
    folds: np.ndarray
    held_out: tuple[int, ...]
    backbone_trained: bool

    @classmethod
    def of_frozen(cls, image_ids: np.ndarray, n_folds: int, seed: int) -> "FoldPlan":
        """The plan for a frozen backbone: every fold is held out in turn. Raises ConfigError for an empty fold."""
        folds = assign_folds(image_ids, n_folds, seed)
        check_folds(folds, n_folds)
        return cls(image_ids=image_ids, folds=folds, held_out=tuple(range(n_folds)), backbone_trained=False)

    @classmethod
    def of_features(cls, subject: Subject, features: FeatureSet, n_folds: int, seed: int) -> "FoldPlan":
        """The plan for some features: the folds of the backbone's training, or those asked for where there was none.

        Raises ConfigError for a fold without images.
        """
        if not features.backbone_trained:
            return cls.of_frozen(subject.train.ids, n_folds, seed)
        training = features.trainings[0]
        folds = assign_folds(subject.train.ids, training.n_folds, training.seed)
        check_folds(folds, training.n_folds)
        return cls(image_ids=subject.train.ids, folds=folds, held_out=features.held_out, backbone_trained=True)

    def __len__(self) -> int:
        """Number of folds that are held out."""
        return len(self.held_out)

    @property
    def n_train(self) -> int:
        return len(self.folds)

    @property
    def n_sources(self) -> int:
        """Sets of features: one for all folds, or one for each."""
        return len(self) if self.backbone_trained else 1

    @property
    def prefixes(self) -> list[str]:
        """Names of what is saved of the heads: one for each set of features."""
        return [f"fold{fold}." for fold in self.held_out] if self.backbone_trained else [""]

    @property
    def scored(self) -> np.ndarray:
        """Rows that are predicted out of fold."""
        return np.flatnonzero(np.isin(self.folds, self.held_out))

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
        """The held-out rows in the parts that are predicted by heads chosen apart; one part for a frozen backbone."""
        if not self.backbone_trained:
            return [self.inside(k)]
        return clean_parts(self.image_ids, self.inside(k), self.held_out[k])

    def n_choices(self, k: int) -> int:
        """Heads of the k-th fold: one a part and, where parts are chosen for apart, one for images of no fold."""
        return len(self.parts(k)) + self.backbone_trained

    def split(self, k: int, one_in: int, seed: int) -> Split:
        """The rows of the k-th fold for early stopping. Raises ConfigError for too few images.

        one_in, seed : on a frozen backbone, one in so many images outside the fold decides when to stop
        """
        parts = self.parts(k)
        if self.backbone_trained:
            inside = self.inside(k)
            return Split(self.outside(k), [*(np.setdiff1d(inside, part) for part in parts), inside], parts)
        trained, stop = stop_split(self.image_ids, self.outside(k), self.held_out[k], one_in, seed)
        return Split(trained, [stop], parts)

    def refuse_leaks(self, choices: Sequence[np.ndarray], trained: np.ndarray, what: str) -> None:
        """Raise LeakError where an image is both trained on and chosen by."""
        for rows in choices:
            refuse_leak(self.image_ids[trained], self.image_ids[rows], what)


def stop_split(
    image_ids: np.ndarray, outside: np.ndarray, fold: int, one_in: int, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """Rows to train on and rows to decide when to stop by, all outside a fold, which is for scoring.

    Raises ConfigError for fewer than 4 images outside the fold.
    """
    if len(outside) < 4:
        raise ConfigError(
            f"fold {fold}",
            expected="4 or more images outside it, to train on and to decide when to stop",
            found=len(outside),
            remedy="add images, or give other --folds",
        )
    stop = assign_folds(image_ids[outside], one_in, seed + 1) == 0
    if not 2 <= stop.sum() <= len(outside) - 2:  # so few images that the draw left none for r: every tenth, by id
        stop = np.zeros(len(outside), dtype=bool)
        stop[np.argsort(image_ids[outside], kind="stable")[:: min(10, len(outside) // 2)]] = True
    return outside[~stop], outside[stop]


def clean_parts(image_ids: np.ndarray, held_out: np.ndarray, fold: int) -> list[np.ndarray]:
    """Row numbers of a held-out fold in parts, by image id; the others have 2 images or more to choose each by.

    Raises ConfigError for a fold that is too small.
    """
    numbers = assign_folds(image_ids[held_out], _PARTS, fold)
    parts = [held_out[numbers == part] for part in range(_PARTS)]
    parts = [part for part in parts if len(part)]
    if len(parts) < 2 or max(map(len, parts)) > len(held_out) - 2:
        raise ConfigError(
            f"fold {fold}",
            expected="enough held-out images to choose by and to score",
            found=len(held_out),
            remedy="add images, or train with fewer --folds",
        )
    for part in parts:
        refuse_leak(image_ids[np.setdiff1d(held_out, part)], image_ids[part], f"what is chosen on fold {fold}")
    return parts
