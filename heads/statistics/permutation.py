"""p values of r by permutations of images that keep what belongs together.

The null: the responses to the images of one stratum could have come in any order. A stratum is the images of one fold
that the same subjects saw (and of one group of the split, such as a session, where groups are large). A picture keeps
its responses of all subjects together: pictures that several subjects share go the same way in each of them. So
statistics over vertices and subjects keep their dependence.

Permutations are cyclic shifts of each stratum, whose images were put into a random order once. They form a group, so
that p = (1 + count) / (1 + n) is exact where predictions do not depend on the responses (Phipson and Smyth 2010,
https://doi.org/10.2202/1544-6115.1585; Hemerik and Goeman 2018, https://doi.org/10.1007/s11749-017-0571-1); and the
sums of all shifts of a stratum are one product of spectra.

Out-of-fold predictions do depend on the responses, those of other folds. Their null is wider by `CROSS_FITTED_SPREAD`,
which permutations of responses beside predictions that stay as they are do not show; so permuted sums are widened.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import fft

from featcache.dataset.splits import Split
from heads.scores.resampling import CROSS_FITTED_SPREAD

N_PERMUTATIONS = 1000
FEWEST = 10  # images of a stratum of its own; smaller ones of a fold are put together
_AT_ONCE = 128  # permutations whose sums are held at once


@dataclass(frozen=True)
class Shuffles:
    """Permutations of the images of one subject.

    strata : for each, the numbers of its images, in the order along which they are shifted
    shifts : (n_permutations, n_strata) by how many places
    """

    strata: Sequence[np.ndarray]
    shifts: np.ndarray

    def __len__(self) -> int:
        return len(self.shifts)

    def orders(self) -> Iterator[np.ndarray]:
        """Every permutation, (n_images,): the image whose responses each image has then."""
        for shifts in self.shifts:
            order = np.empty(sum(map(len, self.strata)), dtype=np.int64)
            for images, shift in zip(self.strata, shifts.tolist(), strict=True):
                order[images] = np.roll(images, -shift)
            yield order


@dataclass(frozen=True)
class Permuted:
    """p values of some vertices.

    p : (n_vertices,), one-sided, of an r as large as that; 1 where r is 0 because a side is constant
    r : (n_vertices,) r within strata, which p is of
    largest : (n_permutations,) largest r of these vertices under each permutation
    """

    p: np.ndarray
    r: np.ndarray
    largest: np.ndarray


def shared_by(ids: Mapping[str, np.ndarray]) -> dict[int, str]:
    """{image id: which subjects saw it}, of {subject: ids of its training images}."""
    seen: dict[int, list[str]] = {}
    for subject, of_subject in ids.items():
        for image_id in of_subject.tolist():
            seen.setdefault(image_id, []).append(subject)
    return {image_id: "+".join(subjects) for image_id, subjects in seen.items()}


def shuffles_of(
    ids: np.ndarray, folds: np.ndarray, seen: Mapping[int, str], by: Split, n_permutations: int, seed: int
) -> Shuffles:
    """Permutations of a subject's images; where strata are the same for two subjects, so are these.

    ids, folds : (n_images,)
    seen : which subjects saw each image, as `shared_by` says
    by : the split, whose groups stay together where they are large
    """
    strata = []
    for fold in np.unique(folds):
        images = np.flatnonzero(folds == fold)
        labels = [(by.groups.get(one, ""), seen[one]) for one in ids[images].tolist()]
        strata += _large(images, labels)
    orders = [images[np.argsort([_draw(seed, one) for one in ids[images].tolist()])] for images in strata]
    shifts = [
        np.random.default_rng((seed, 1, int(ids[images].min()), len(images))).integers(len(images), size=n_permutations)
        for images in strata
    ]
    return Shuffles(orders, np.stack(shifts, axis=1))


def _draw(seed: int, image_id: int) -> float:
    return float(np.random.default_rng((seed, 2, image_id)).random())


def _large(images: np.ndarray, labels: Sequence[tuple[str, str]]) -> list[np.ndarray]:
    """Images by label, where a label has enough of them; all others together."""
    _, number, counts = np.unique([str(label) for label in labels], return_inverse=True, return_counts=True)
    few = counts[number] < FEWEST
    strata = [images[number == one] for one in np.flatnonzero(counts >= FEWEST)]
    return [*strata, images[few]] if few.any() else strata


class Spectra:
    """Responses of a block, ready to be correlated with those of every model at every shift."""

    def __init__(self, shuffles: Shuffles, responses: np.ndarray) -> None:
        """responses : (n_images, n_vertices) float32, `standardised`"""
        self.shuffles = shuffles
        self._of_strata = [fft.rfft(_centred(responses[images]), axis=0, workers=-1) for images in shuffles.strata]

    def sums(self, predictions: np.ndarray) -> list[np.ndarray]:
        """Sums of predictions times shifted responses for each stratum: (n_shifts, n_vertices).

        predictions : (n_images, n_vertices) float32, `standardised`
        """
        sums = []
        for images, spectrum in zip(self.shuffles.strata, self._of_strata, strict=True):
            product = fft.rfft(_centred(predictions[images]), axis=0, workers=-1)
            np.conjugate(product, out=product)
            product *= spectrum
            sums.append(fft.irfft(product, len(images), axis=0, workers=-1, overwrite_x=True))
        return sums


def _centred(values: np.ndarray) -> np.ndarray:
    return np.asarray(values - values.mean(0))


def permute(spectra: Spectra, predictions: np.ndarray, cross_fitted: bool = True) -> Permuted:
    """p values of r of one model.

    predictions : (n_images, n_vertices) float32, `standardised`
    cross_fitted : whether they are out of fold; False for predictions that do not depend on these responses
    """
    sums, n_images = spectra.sums(predictions), len(predictions)
    observed = np.sum([of_stratum[0] for of_stratum in sums], axis=0)
    spread = np.float32(CROSS_FITTED_SPREAD if cross_fitted else 1.0)
    # sums of one permutation that is no other than the identity may differ from `observed` by rounding
    least = observed - 1e-5 * n_images * np.finfo(np.float32).eps ** 0.5
    counts, largest = np.zeros(len(observed), dtype=np.int64), np.empty(len(spectra.shuffles), np.float32)
    for start in range(0, len(largest), _AT_ONCE):
        some = slice(start, start + _AT_ONCE)
        permuted = _permuted_sums(sums, spectra.shuffles.shifts[some]) * spread
        counts += (permuted >= least).sum(0)
        largest[some] = permuted.max(1)
    p = (1 + counts) / (1 + len(largest))
    return Permuted(np.where(observed == 0, 1, p), observed / n_images, largest / n_images)


def _permuted_sums(sums: Sequence[np.ndarray], shifts: np.ndarray) -> np.ndarray:
    """Sums over all strata, (n_permutations, n_vertices). shifts : (n_permutations, n_strata) of some permutations"""
    total: np.ndarray = sums[0][shifts[:, 0]]
    for of_stratum, of_shifts in zip(sums[1:], shifts.T[1:], strict=True):
        total += of_stratum[of_shifts]
    return total


def family_wise(r: np.ndarray, largest: np.ndarray) -> np.ndarray:
    """p values that any of the vertices is as large by chance, (n_vertices,): r among the largest r of permutations.

    r : (n_vertices,) within strata
    largest : (n_permutations,) over all these vertices

    Westfall and Young 1993, Resampling-based multiple testing.
    """
    counts = len(largest) - np.searchsorted(np.sort(largest), r, side="left")
    return np.asarray(np.where(r == 0, 1, (1 + counts) / (1 + len(largest))))
