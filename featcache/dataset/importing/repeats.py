"""Trials to images: the average over the trials of each image, and noise ceilings from its repeats.

The model of one vertex, for trial j of image i, is ``y_ij = m + s_i + e_ij`` with signal s and noise e of variances
sigma_s^2 and sigma_e^2. With k images of n_i trials each, N in all, the one-way random-effects analysis of variance
(Searle, Casella and McCulloch, Variance Components, 1992, chapter 3) has unbiased estimates of both, whatever the n_i::

    MSW = sum_ij (y_ij - y_i)^2 / (N - k)          noise variance
    MSB = sum_i n_i (y_i - y)^2 / (k - 1)
    n0  = (N - sum_i n_i^2 / N) / (k - 1)          n where every n_i is n
    (MSB - MSW) / n0                               signal variance

The Natural Scenes Dataset (Allen et al. 2022, https://doi.org/10.1038/s41593-021-00962-x) takes trials that are
z-scored within session, the mean over images of the variance of their repeats for the noise variance, and 1 less that
for the signal variance. With equal n_i, the noise variances are the same. With unequal n_i, MSW weights an image by its
n_i - 1, since an image with two trials says half as much on noise as one with three; so it varies less. In both, an
image with one trial says nothing on noise. The variance of all trials less MSW is the signal variance above times
``(N - sum_i n_i^2 / N) / (N - 1)``: nearly 1, but for few images, or where one image has many of the trials.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from featcache.dataset.responses import LARGEST_RESPONSE
from featcache.dataset.subject import listed
from featcache.errors import DataError

_BLOCK_BYTES = 64e6  # of float32 rows that are in memory at once
_LARGEST_BLOCK = 512e6  # where the file's chunks are larger than that; larger chunks yet are read several times
_FEW = 200  # degrees of freedom, below which a noise variance has a standard error above a tenth of itself


class Rows(Protocol):
    """Responses of trials, a row a trial, that are read some rows at a time."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_trials, n_vertices)."""

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        """Those rows, (n, n_vertices) float32."""


class Averaged(Protocol):
    """Where averages are written and read back, a row an image: an array, or several that take turns."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(n_images, n_vertices)."""

    @property
    def dtype(self) -> np.dtype[Any]:
        """float32."""

    def __len__(self) -> int: ...

    def __getitem__(self, row: int) -> np.ndarray: ...

    def __setitem__(self, row: int, values: np.ndarray) -> None: ...


@dataclass(frozen=True, eq=False)
class ArrayRows:
    """Rows of an array, a memory map, or anything else that has a shape and can be sliced as `array[a:b]`."""

    array: Any

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.array.shape)

    def read(self, rows: slice | np.ndarray) -> np.ndarray:
        with np.errstate(over="ignore"):  # what float32 has no room for becomes infinity, which is refused by name
            return np.asarray(self.array[rows]).astype(np.float32, copy=False)


@dataclass(frozen=True, eq=False)
class Trials:
    """Trials of one surface of one subject, in the order of the file.

    Parameters
    ----------
    responses : (n_trials, n_vertices)
    image : (n_trials,) index of the image of each trial
    session : (n_trials,) number of the session of each trial; None where not known
    where : name of the responses in messages, such as their file
    chunk_rows : rows that the file keeps in one chunk, so that a chunk is read whole

    Raises DataError where these do not belong together.
    """

    responses: Rows
    image: NDArray[np.int64]
    session: NDArray[np.int64] | None = None
    where: str = "trials"
    chunk_rows: int = 1

    def __post_init__(self) -> None:
        shape = self.responses.shape
        if len(shape) != 2 or 0 in shape:
            raise DataError(
                self.where,
                expected="one row a trial, (n_trials, n_vertices)",
                found=f"the shape {shape}",
                remedy="name the array that holds the single trials",
            )
        for name, values in (("image", self.image), ("session", self.session)):
            if values is not None and (np.shape(values) != shape[:1] or np.asarray(values).dtype.kind not in "iu"):
                raise DataError(
                    self.where,
                    expected=f"the {name} of each of {shape[0]} trials, as an integer",
                    found=f"{np.asarray(values).dtype} of shape {np.shape(values)}",
                    remedy=f"give one {name} for each row of the responses",
                )

    @property
    def n_trials(self) -> int:
        return self.responses.shape[0]

    @property
    def n_vertices(self) -> int:
        return self.responses.shape[1]


@dataclass(frozen=True, eq=False)
class Moments:
    """What the trials of all images say on signal and noise, by vertex.

    Parameters
    ----------
    repeats : (n_images,) int64, number of trials of each image, 1 or more
    within : (n_vertices,) float64, sum of squares of trials about the average of their image
    between : (n_vertices,) float64, sum over trials of squares of these averages about the mean of all trials
    zscored : whether trials were z-scored within session first
    constant : (n_vertices,) bool, the same response in every trial, or in every trial of each session if z-scored
    constant_in_session : (n_vertices,) bool, the same response in all of a session, where z-scoring made it 0
    """

    repeats: NDArray[np.int64]
    within: NDArray[np.float64]
    between: NDArray[np.float64]
    zscored: bool
    constant: NDArray[np.bool_]
    constant_in_session: NDArray[np.bool_]

    @property
    def n_images(self) -> int:
        return len(self.repeats)

    @property
    def n_trials(self) -> int:
        return int(self.repeats.sum())

    @property
    def noise_freedom(self) -> int:
        """Degrees of freedom of the noise variance, N - k: the number of repeats beyond the first of each image."""
        return self.n_trials - self.n_images

    @cached_property
    def noise_variance(self) -> NDArray[np.float64]:
        """Variance of the noise of one trial, (n_vertices,); unbiased. Only where `noise_freedom` is not 0."""
        return self.within / self.noise_freedom

    @cached_property
    def signal_variance(self) -> NDArray[np.float64]:
        """Variance of the signal between images, (n_vertices,); unbiased, and so below 0 for half of the vertices that
        have none. Only where `noise_freedom` is not 0 and there are two images or more."""
        n_trials, freedom = self.n_trials, self.n_images - 1
        n0 = (n_trials - float(np.square(self.repeats).sum()) / n_trials) / freedom
        return (self.between / freedom - self.noise_variance) / n0


@dataclass(frozen=True, eq=False)
class Ceilings:
    """Noise ceilings of the averages over trials of the images of one split.

    Parameters
    ----------
    ncsnr : (n_vertices,) float32, sd of the signal by sd of the noise of one trial: 0 or larger, infinity where
        repeats are all the same; None where repeats do not tell
    ceiling : (n_vertices,) float32 in [0, 1], fraction of the variance of the averages that is signal; None as above
    note : where they are from, or why there are none, such as 'from 512 images with 2 or more repeats, 3.0 on average;
        z-scored within session'
    """

    ncsnr: NDArray[np.float32] | None
    ceiling: NDArray[np.float32] | None
    note: str


def average_trials(
    trials: Trials,
    n_images: int,
    zscore: bool,
    out: Averaged,
    counted: NDArray[np.bool_] | None = None,
    scaling: NDArray[np.bool_] | None = None,
    block_rows: int | None = None,
    advance: Callable[[int], object] = lambda n: None,
) -> Moments:
    """Write the average over the trials of each image into `out`, and return what the trials say on signal and noise.

    Trials are read in their order, a block of rows at a time: once, or twice if they are z-scored. Besides `out`, which
    may be a memory map, memory holds a block and, if z-scored, up to four float64 numbers a vertex for each session.
    The result does not depend on the size of blocks.

    A running average is kept in `out` as float32 and updated in float64. With n trials of an image, its average is
    within ``(n + 1) / 2 * 2**-24`` of the largest running average, relative to that: 1.2e-7 for
    three trials. That error is in the sums of squares too, where it matters only for a mean thousands of times the sd,
    which float32 responses themselves round as much.

    Parameters
    ----------
    n_images : number of images; `trials.image` is in [0, n_images), and each image has a trial
    zscore : subtract the mean of all trials of a session from each vertex, and divide by their sd (ddof 0), before
        averaging; a vertex that is constant in a session is 0 there. The mean and the sd of a session depend on which
        images it has: with m images a session, variances are off by a part of about 1 / m
    out : (n_images, n_vertices) float32, in which every row is written; of no use after an error
    counted : (n_images,) bool, images whose trials tell signal and noise; None: all
    scaling : (n_images,) bool, images whose trials tell the mean and the sd of a session, where a session has two of
        them or more; None: all
    block_rows : rows to read at once; None for what fits into 64 MB, or whole chunks of the file
    advance : called with the number of trials just read, which are twice `trials.n_trials` in all if z-scored

    Raises
    ------
    DataError : NaN or infinity, named by trial and vertex, before its block is used; an image of no trial or out of
        range; z-scoring without sessions, or with a session of one trial; all vertices constant
    """
    if out.shape != (n_images, trials.n_vertices) or out.dtype != np.float32:
        raise ValueError(f"averages need ({n_images}, {trials.n_vertices}) float32, and not {out.shape} of {out.dtype}")
    repeats = _repeats(trials, n_images)
    blocks = _Blocks(trials, block_rows or _rows_per_block(trials), advance)
    of_sessions = _scaling_within_session(blocks, scaling) if zscore else None
    total, averages = _Spread(trials.n_vertices), _Averages(out)
    for trial, responses in blocks:
        row = of_sessions.scaled(trial, responses) if of_sessions else responses.astype(np.float64)
        counts = counted is None or bool(counted[trials.image[trial]])
        if counts:
            total.add(row)
        averages.add(int(trials.image[trial]), row, counts)
    constant = total.squares == 0
    if constant.all():
        raise DataError(
            trials.where,
            expected="responses that differ between trials",
            found=f"the same in all {trials.n_trials} trials of each of {trials.n_vertices} vertices",
            remedy="name the array that holds the responses",
        )
    return Moments(
        repeats=repeats if counted is None else repeats[counted],
        within=averages.within,
        between=np.maximum(total.squares - averages.within, 0),  # below 0 by rounding alone
        zscored=zscore,
        constant=constant,
        constant_in_session=of_sessions.constant if of_sessions else np.zeros_like(constant),
    )


def noise_ceilings(moments: Moments, repeats: ArrayLike) -> Ceilings:
    """Noise ceilings of one split: signal and noise from all images of `moments`, and repeats from the split's own.

    The signal variance is raised to 0 where its estimate is below. So ncsnr and ceiling are 0 for about half of the
    vertices without signal, and too high on average for these and other weak vertices, the more so with few images.
    `Moments.signal_variance` has the unbiased estimate.

    repeats : (n_images of the split,) number of trials of each of its images, 1 or more

    Raises DataError for repeats below 1.
    """
    if reason := _reason_for_none(moments, repeats):
        return Ceilings(None, None, reason)
    signal, noise = np.maximum(moments.signal_variance, 0), moments.noise_variance
    without_noise = np.where(signal > 0, np.inf, 0.0)
    ncsnr = np.sqrt(np.divide(signal, noise, out=without_noise, where=noise > 0)).astype(np.float32)
    return Ceilings(ncsnr, ceiling_from_ncsnr(ncsnr, repeats), _note(moments))


def ceiling_from_ncsnr(ncsnr: ArrayLike, repeats: ArrayLike) -> NDArray[np.float32]:
    """Noise ceiling, (n_vertices,) float32 in [0, 1], of averages over repeats: ``ncsnr^2 / (ncsnr^2 + t)``.

    t is the mean over images of 1 / repeats: with up to three, ``(n3 / 3 + n2 / 2 + n1) / (n1 + n2 + n3)``.

    Parameters
    ----------
    ncsnr : (n_vertices,) sd of the signal by sd of the noise of one trial, 0 or larger; infinity gives 1
    repeats : (n_images,) number of trials of each image that is averaged, 1 or more

    Raises DataError for an ncsnr below 0 or NaN, and for no images or repeats below 1.

    Source: Allen et al. 2022, and the data manual of the Natural Scenes Dataset.
    """
    if len(bad := np.flatnonzero(~(np.asarray(ncsnr) >= 0))):  # NaN is bad too
        raise DataError(
            "ncsnr",
            expected="0 or more for each vertex",
            found=f"{np.asarray(ncsnr)[bad[0]]} at vertex {bad[0]}",
            remedy="give 0 where it is not known",
        )
    with np.errstate(divide="ignore", over="ignore"):  # 0 and infinity have the limits that they should
        return (1 / (1 + _noise_left(repeats) / np.square(np.asarray(ncsnr, dtype=np.float64)))).astype(np.float32)


def ceiling_for(ceiling: NDArray[np.float32], given: ArrayLike, repeats: ArrayLike) -> NDArray[np.float32]:
    """Noise ceiling of averages over other numbers of repeats, (n_vertices,) float32.

    ceiling : (n_vertices,) in [0, 1], of averages over `given`
    given, repeats : (n_images,) number of trials of each image
    """
    before, after = _noise_left(given), _noise_left(repeats)
    if before == after:
        return ceiling
    left = ceiling + after / before * (1 - ceiling.astype(np.float64))
    return np.asarray(ceiling / left, dtype=np.float32)  # c / (c + (1 - c) t' / t); left is above 0


def _noise_left(repeats: ArrayLike) -> float:
    """Mean over images of 1 / repeats: the part of the noise variance that averaging leaves."""
    counts = np.asarray(repeats)
    if counts.ndim != 1 or not counts.size or counts.dtype.kind not in "iu" or counts.min() < 1:
        raise DataError(
            "repeats of images",
            expected="the number of trials of each image, an integer of 1 or more",
            found=f"{counts.min()}" if counts.size else "no images",
            remedy="leave out images without a trial",
        )
    return float((1 / counts).mean())


def _reason_for_none(moments: Moments, repeats: ArrayLike) -> str:
    """Why repeats do not tell noise ceilings, as a note; '' where they do."""
    if not np.size(repeats):
        return "no noise ceilings: the split has no images"
    if not moments.noise_freedom:
        return f"no noise ceilings: each of {moments.n_images} images has one repeat, which does not tell the noise"
    if moments.n_images < 2:
        return "no noise ceilings: one image does not tell the signal"
    return ""


def _note(moments: Moments) -> str:
    repeated = moments.repeats[moments.repeats > 1]
    images = f"from {len(repeated)} {'image' if len(repeated) == 1 else 'images'} with 2 or more repeats"
    parts = [f"{images}, {repeated.mean():.1f} on average"]
    if moments.noise_freedom < _FEW:
        parts.append(f"so few that a noise variance is known within {100 * (2 / moments.noise_freedom) ** 0.5:.0f} %")
    return "; ".join([*parts, "z-scored within session" if moments.zscored else "not z-scored"])


def _repeats(trials: Trials, n_images: int) -> NDArray[np.int64]:
    """Number of trials of each image, (n_images,); DataError where an image has none or a trial has no image."""
    outside = np.flatnonzero((trials.image < 0) | (trials.image >= n_images))
    if len(outside):
        raise DataError(
            trials.where,
            expected=f"trials of images 0 to {n_images - 1}",
            found=f"image {trials.image[outside[0]]} in trial {outside[0]}",
            remedy="leave out trials without an image",
        )
    repeats = np.bincount(trials.image.astype(np.int64), minlength=n_images)  # any kind of integer
    if len(without := np.flatnonzero(repeats == 0)):
        raise DataError(
            trials.where,
            expected=f"a trial of each of {n_images} images",
            found=f"none of {len(without)} images: {listed(without)}",
            remedy="leave these images out",
        )
    return repeats.astype(np.int64, copy=False)


def _rows_per_block(trials: Trials) -> int:
    row = 4 * trials.n_vertices
    fits = max(1, int(_BLOCK_BYTES // row))
    if trials.chunk_rows <= fits:
        return fits // trials.chunk_rows * trials.chunk_rows
    return min(trials.chunk_rows, max(1, int(_LARGEST_BLOCK // row)))


@dataclass(frozen=True, eq=False)
class _Blocks:
    """Every trial with its responses, in the order of the file, as often as it is asked for."""

    trials: Trials
    block_rows: int
    advance: Callable[[int], object]

    def __iter__(self) -> Iterator[tuple[int, np.ndarray]]:
        n_trials = self.trials.n_trials
        for start in range(0, n_trials, self.block_rows):
            stop = min(start + self.block_rows, n_trials)
            block = self.trials.responses.read(slice(start, stop))
            self._check(block, start, stop)
            yield from zip(range(start, stop), block, strict=True)
            self.advance(stop - start)

    def _check(self, block: np.ndarray, start: int, stop: int) -> None:
        """Raise DataError for rows that are missing, and for responses that no head can be fitted to."""
        where = self.trials.where
        if block.shape != (stop - start, self.trials.n_vertices):
            expected, found = f"trials {start} to {stop - 1} of {self.trials.n_vertices} vertices", f"{block.shape}"
            raise DataError(where, expected=expected, found=found, remedy="copy the file again: it is not whole")
        finite = np.abs(block) <= LARGEST_RESPONSE  # NaN is none
        if not finite.all():
            row, vertex = np.argwhere(~finite)[0]
            n_more = int(finite.size - finite.sum() - 1)
            raise DataError(
                where,
                expected=f"finite responses, up to {LARGEST_RESPONSE:.0e}, which float32 can hold and square",
                found=f"{block[row, vertex]} in trial {start + row}, vertex {vertex}"
                + (f" (and {n_more} more nearby)" if n_more else ""),
                remedy="leave out such trials or vertices",
            )


class _Spread:
    """Running mean and sum of squares about it, (n_vertices,) float64 each.

    Source: Welford, Note on a method for calculating corrected sums of squares and products (1962). Exactly 0 for a
    constant, however far from 0 it is.
    """

    def __init__(self, n_vertices: int) -> None:
        self.n, self.mean, self.squares = 0, np.zeros(n_vertices), np.zeros(n_vertices)

    def add(self, row: np.ndarray) -> None:
        self.n += 1
        deviation = row - self.mean
        self.mean += deviation / self.n
        self.squares += deviation * (row - self.mean)


class _Averages:
    """Running average of each image in an array of float32, and the sum of squares of trials about it in float64.

    within : (n_vertices,) of the images that are counted
    """

    def __init__(self, out: Averaged) -> None:
        self._out, self._n = out, np.zeros(len(out), dtype=np.int64)
        self.within = np.zeros(out.shape[1])

    def add(self, image: int, row: np.ndarray, counted: bool) -> None:
        self._n[image] += 1
        n = int(self._n[image])
        if n == 1:  # what the array held before does not matter
            self._out[image] = row
            return
        average = self._out[image].astype(np.float64)
        deviation = row - average
        self._out[image] = average + deviation / n
        if counted:
            self.within += np.square(deviation) * ((n - 1) / n)


@dataclass(frozen=True, eq=False)
class _Scaling:
    """Mean and 1 / sd of each session, (n_sessions, n_vertices); 0 for the latter where a session is constant.

    session : (n_trials,) row of each trial's session in these
    """

    session: NDArray[np.int64]
    mean: NDArray[np.float64]
    per_sd: NDArray[np.float64]

    @property
    def constant(self) -> NDArray[np.bool_]:
        """Vertices that are constant in a session, (n_vertices,)."""
        return np.asarray((self.per_sd == 0).any(axis=0))

    def scaled(self, trial: int, responses: np.ndarray) -> NDArray[np.float64]:
        """Responses of a trial, (n_vertices,), z-scored within its session."""
        session = self.session[trial]
        row: NDArray[np.float64] = (responses - self.mean[session]) * self.per_sd[session]
        return row


def _scaling_within_session(blocks: _Blocks, images: NDArray[np.bool_] | None) -> _Scaling:
    """images : as `scaling` of `average_trials`"""
    numbers, session = _sessions(blocks.trials)
    spreads = [_Spread(blocks.trials.n_vertices) for _ in numbers]
    told = np.full(len(session), True) if images is None else images[blocks.trials.image]
    told = told | (np.bincount(session[told], minlength=len(numbers)) < 2)[session]
    for trial, responses in blocks:
        if told[trial]:
            spreads[session[trial]].add(responses.astype(np.float64))
    per_sd = np.stack([spread.squares for spread in spreads])
    np.divide(per_sd, np.array([spread.n for spread in spreads])[:, None], out=per_sd)
    np.divide(1, np.sqrt(per_sd, out=per_sd), out=per_sd, where=per_sd > 0)
    return _Scaling(session, np.stack([spread.mean for spread in spreads]), per_sd)


def _sessions(trials: Trials) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Numbers of the sessions, and the index of each trial's session among these, (n_trials,)."""
    if trials.session is None:
        raise DataError(
            trials.where,
            expected="the session of each trial, to z-score within session",
            found="none",
            remedy="give it, or do not z-score",
        )
    numbers, session, counts = np.unique(trials.session, return_inverse=True, return_counts=True)
    if counts.min() < 2:
        raise DataError(
            trials.where,
            expected="two or more trials a session, to z-score within session",
            found=f"one in session {numbers[counts.argmin()]}",
            remedy="leave that trial out, or do not z-score",
        )
    return numbers, session.reshape(-1)
