"""Intervals over images of mean scores, and of differences between models, for each subject, surface and ROI.

A picture that several subjects saw has one weight for all of them (see `image_weights`), so an interval over subjects
takes into account that they saw the same pictures. Every interval is as wide as it takes for out-of-fold predictions:
see `CROSS_FITTED_SPREAD`.
"""

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np

from featcache.dataset.subject import Subject
from heads.scores.metrics import ALL_SURFACES, explained_share, pearson_r
from heads.scores.resampling import (
    CROSS_FITTED_SPREAD,
    LEVEL,
    N_DRAWS,
    image_weights,
    response_sums,
    standardised,
    weighted_r,
    with_all_alike,
)
from heads.statistics.blocks import Block, Source, blocks_of

MOST_VERTICES = 500  # of each ROI of a surface whose images are drawn; scores themselves are of all vertices
MEASURES = ("r", "accuracy")
ALL = "all"
_RANGES = {"r": (-1.0, 1.0), "accuracy": (0.0, 100.0)}

Measure = Literal["r", "accuracy"]
Place = tuple[str, str, str]  # subject, surface, ROI: 'all', ALL_SURFACES and 'all' for all of each together


@dataclass(frozen=True)
class Estimate:
    """Mean score of a model over the vertices of an ROI, or its difference from another model, with an interval.

    subject, surface, roi : 'all', 'both' and 'all' for all of each together
    against : the model that is subtracted; '' for the score of the model itself
    measure : 'r', or 'accuracy' in percent, over the vertices that have a ceiling above 0
    n_vertices : that the mean is over
    low, high : ends of the 95 % interval over images
    p : of no difference, two-sided; None for the score of one model
    """

    subject: str
    surface: str
    roi: str
    model: str
    against: str
    measure: Measure
    n_vertices: int
    mean: float
    low: float
    high: float
    p: float | None = None

    @property
    def over_everyone(self) -> bool:
        """Whether it is over all subjects and surfaces."""
        return (self.subject, self.surface) == (ALL, ALL_SURFACES)

    def to_json(self) -> dict[str, Any]:
        """The estimate as commands write it."""
        return dict(vars(self))


@dataclass(frozen=True)
class Drawn:
    """Mean score of one model over the vertices of an ROI, under draws of images.

    whole : mean over all vertices
    draws : (1 + n_draws,) mean over the sampled vertices: of the images as they are, then under each draw of weights
    """

    n_vertices: int
    whole: float
    draws: np.ndarray

    @property
    def deviations(self) -> np.ndarray:
        """(n_draws,) how far draws are from their mean.

        That is above the score of the images as they are where a score is made of squares, as accuracy is: weighted
        images are as good as half as many, and noise has squares of its own.
        """
        return np.asarray(self.draws[1:] - self.draws[1:].mean())


Draws = dict[tuple[Place, Measure], dict[str, Drawn]]  # of each place and measure: {model: draws}


def score_intervals(
    models: Mapping[Subject, Sequence[Source]],
    against: str = "",
    n_draws: int = N_DRAWS,
    seed: int = 0,
    cross_fitted: bool = True,
) -> list[Estimate]:
    """Intervals for every subject, surface, ROI and model, and all of each together.

    models : of each subject, all its models that are to be scored
    against : name of a model; there is a difference from it too, for every other model
    cross_fitted : whether predictions are out of fold; False for predictions of images that nothing was fitted to
    """
    draws: Draws = {}
    for subject, sources in models.items():
        drawer = Drawer(subject, n_draws, seed)
        for block in blocks_of(subject):
            drawer.start(block)
            for source in sources:
                drawer.add(source.name, source.read(block.surface, block.vertices))
        draws |= drawer.draws()
    return estimates(with_totals(draws), against, cross_fitted)


@dataclass
class _Sums:
    """Sums over vertices of scores, as blocks come in."""

    n: int = 0
    whole: float = 0.0
    n_sampled: int = 0
    draws: np.ndarray | float = 0.0

    def drawn(self) -> Drawn:
        return Drawn(self.n, self.whole / self.n, np.asarray(self.draws) / self.n_sampled)


@dataclass
class Drawer:
    """Collects scores under draws of images of one subject, block by block and model by model."""

    subject: Subject
    n_draws: int = N_DRAWS
    seed: int = 0
    _sums: dict[tuple[str, str, Measure, str], _Sums] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._weights = with_all_alike(image_weights(self.subject.train.ids, self.seed, self.n_draws))
        self._rois = {surface: _samples(self.subject, surface) for surface in self.subject.surfaces}

    def start(self, block: Block, responses: np.ndarray | None = None) -> None:
        """Take the responses of the block that models are added of next.

        responses : those of the block, `standardised`, where that is done already
        """
        inside = [members(block, one.sampled) for one in self._rois[block.surface]]
        self._block, self._chosen = block, np.flatnonzero(np.any(inside, axis=0))
        self._responses = self._standardised(block.responses, responses)
        self._response_sums = response_sums(self._weights, self._responses)

    def _standardised(self, values: np.ndarray, known: np.ndarray | None) -> np.ndarray:
        """The columns that are drawn."""
        return standardised(values[:, self._chosen]) if known is None else known[:, self._chosen]

    def add(
        self, model: str, predictions: np.ndarray, r: np.ndarray | None = None, known: np.ndarray | None = None
    ) -> None:
        """Score one model on the block.

        predictions : (n_images, n_block)
        r : (n_block,) of the images as they are, where it is known already
        known : predictions, `standardised`, where that is done already
        """
        block = self._block
        whole = pearson_r(predictions, block.responses) if r is None else r
        columns = self._standardised(predictions, known)
        drawn = weighted_r(self._weights, columns, self._responses, self._response_sums)
        ceiling = self.subject.noise_ceiling[block.surface]
        for one in self._rois[block.surface]:
            every, sampled = members(block, one.vertices), members(block, one.sampled)[self._chosen]
            if not every.any():
                continue
            sums = self._sums.setdefault((block.surface, one.roi, one.measure, model), _Sums())
            sums.n += int(every.sum())
            sums.n_sampled += int(sampled.sum())
            r_whole, r_drawn = whole[every], drawn[:, sampled]
            if one.measure == "accuracy":
                assert ceiling is not None
                of_block = ceiling[block.vertices].astype(np.float64)
                r_whole = explained_share(r_whole, of_block[every], whole=100)
                r_drawn = explained_share(r_drawn, of_block[self._chosen][sampled], whole=100)
            sums.whole += float(r_whole.sum())
            sums.draws = sums.draws + r_drawn.sum(1)

    def draws(self) -> Draws:
        """What was collected, once all blocks are there."""
        models = dict.fromkeys(model for *_, model in self._sums)
        return {
            ((self.subject.name, surface, one.roi), one.measure): {
                model: self._sums[key].drawn()
                for model in models
                if (key := (surface, one.roi, one.measure, model)) in self._sums
            }
            for surface, samples in self._rois.items()
            for one in samples
        }


@dataclass(frozen=True)
class _Sample:
    """The vertices of an ROI that count in a measure, and those of them whose images are drawn, by number."""

    roi: str
    measure: Measure
    vertices: np.ndarray
    sampled: np.ndarray


def _samples(subject: Subject, surface: str) -> list[_Sample]:
    """Samples of every ROI of a surface that has vertices, and of all vertices, for each measure that there is."""
    ceiling, n_vertices = subject.noise_ceiling[surface], subject.n_vertices[surface]
    every = np.full(n_vertices, True)
    counts: dict[Measure, np.ndarray] = {"r": every}
    if ceiling is not None:
        counts["accuracy"] = ceiling > 0
    samples = []
    for roi, mask in {**subject.rois[surface], ALL: every}.items():
        for measure, counted in counts.items():
            if len(vertices := np.flatnonzero(mask & counted)):
                n = min(len(vertices), MOST_VERTICES)
                samples.append(_Sample(roi, measure, vertices, vertices[np.arange(n) * len(vertices) // n]))
    return samples


def members(block: Block, vertices: np.ndarray) -> np.ndarray:
    """Whether each vertex of a block is one of some, given by number in rising order, (n_block,) bool."""
    inside = np.zeros(block.vertices.stop - block.vertices.start, dtype=bool)
    first, last = np.searchsorted(vertices, (block.vertices.start, block.vertices.stop))
    inside[vertices[first:last] - block.vertices.start] = True
    return inside


def with_totals(draws: Draws) -> Draws:
    """Draws of each place, and of all surfaces of a subject and of all subjects together, by their vertices.

    A model that a place lacks is left out of the totals that the place is in: they would be of other vertices than
    those of the other models.
    """
    totals: dict[tuple[Place, Measure], list[dict[str, Drawn]]] = {}
    for ((subject, surface, roi), measure), of_models in draws.items():
        for place in dict.fromkeys([(subject, ALL_SURFACES, roi), (ALL, surface, roi), (ALL, ALL_SURFACES, roi)]):
            totals.setdefault((place, measure), []).append(of_models)
    return draws | {where: _total(parts) for where, parts in totals.items()}


def _total(parts: Sequence[Mapping[str, Drawn]]) -> dict[str, Drawn]:
    everywhere = [model for model in parts[0] if all(model in part for part in parts)]
    return {model: combined([part[model] for part in parts]) for model in everywhere}


def combined(parts: Sequence[Drawn]) -> Drawn:
    """Mean over the vertices of several places. Draws are of the same weights of the same pictures."""
    n = sum(part.n_vertices for part in parts)
    return Drawn(
        n,
        sum(part.n_vertices * part.whole for part in parts) / n,
        np.asarray(sum(part.n_vertices * part.draws for part in parts) / n),
    )


def estimates(draws: Draws, against: str = "", cross_fitted: bool = True) -> list[Estimate]:
    """Scores with intervals, and differences from the model `against`, if that is given."""
    return [
        one
        for (place, measure), of_models in draws.items()
        for one in _estimates(place, measure, of_models, against, CROSS_FITTED_SPREAD if cross_fitted else 1.0)
    ]


def _estimates(
    place: Place, measure: Measure, of_models: Mapping[str, Drawn], against: str, spread: float
) -> Iterator[Estimate]:
    for model, drawn in of_models.items():
        low, high = _interval(drawn.whole, drawn.deviations * spread)
        least, most = _RANGES[measure]  # a score that is far from certain must not be said to be beyond its range
        ends = max(low, least), min(high, most)
        yield Estimate(*place, model, "", measure, drawn.n_vertices, drawn.whole, *ends)
    if (other := of_models.get(against)) is None:
        return
    for model, drawn in of_models.items():
        if model != against:
            difference, deviations = drawn.whole - other.whole, (drawn.deviations - other.deviations) * spread
            ends, p = _interval(difference, deviations), _two_sided(difference, deviations)
            yield Estimate(*place, model, against, measure, drawn.n_vertices, difference, *ends, p)


def _interval(mean: float, deviations: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(deviations, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return mean + float(low), mean + float(high)


def _two_sided(difference: float, deviations: np.ndarray) -> float:
    """p of a difference of 0: share of draws that are as far from their centre as the difference is from 0."""
    return float((1 + np.sum(np.abs(deviations) >= abs(difference))) / (1 + len(deviations)))


def select(
    found: Sequence[Estimate],
    *,
    subject: str = ALL,
    surface: str = ALL_SURFACES,
    rois: Collection[str] = (),
    measure: Measure = "r",
    against: str = "",
) -> list[Estimate]:
    """The estimates of one subject, surface, measure and reference; `rois` () for all ROIs."""
    return [
        one
        for one in found
        if (one.subject, one.surface, one.measure, one.against) == (subject, surface, measure, against)
        and (not rois or one.roi in rois)
    ]
