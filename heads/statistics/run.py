"""Prediction stores and the last blend -> scores of each vertex with p and q values, and of ROIs with intervals."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar
from heads.config.statistics import ScoresConfig
from heads.scores.metrics import accuracy_from_r, pearson_r
from heads.scores.resampling import Columns
from heads.statistics.blocks import Block, blocks_of
from heads.statistics.difference import contributions, swap_p, swaps
from heads.statistics.discovery import q_values
from heads.statistics.intervals import ALL, Drawer, Draws, Estimate, estimates, with_totals
from heads.statistics.permutation import Permuted, Shuffles, Spectra, family_wise, permute, shared_by, shuffles_of
from heads.statistics.sources import Scored, find_scored, reference_of

# Parts of VertexScore that hold a number for each vertex, and are None where they were not asked for.
P_VALUES = ("p", "q", "p_family")
DIFFERENCES = ("difference", "difference_p", "difference_q")
_FOLD = "fold "


@dataclass(frozen=True, eq=False)
class VertexScore:
    """Scores of one model at each vertex of one surface, (n_vertices,) each.

    r : over all training images, out of fold
    of_folds : {fold: r over its images}, where folds were asked for
    noise_ceiling : fraction of variance; None where not given
    rois : names of the ROIs of each vertex with + between, as numbers, and the names that these stand for
    p : one-sided, of an r as large as that by chance; 1 where predictions or responses are constant
    q : false discovery rate over all vertices of the subject
    p_family : that any vertex of the subject has as large an r by chance
    difference : of r from the reference; difference_p is two-sided, difference_q over all vertices of the subject
    """

    subject: str
    surface: str
    model: str
    r: np.ndarray
    of_folds: Mapping[int, np.ndarray]
    noise_ceiling: np.ndarray | None
    rois: tuple[np.ndarray, list[str]]
    p: np.ndarray | None = None
    q: np.ndarray | None = None
    p_family: np.ndarray | None = None
    difference: np.ndarray | None = None
    difference_p: np.ndarray | None = None
    difference_q: np.ndarray | None = None

    def accuracy(self, r: np.ndarray) -> np.ndarray:
        """Noise-normalised accuracy of some r, percent; NaN where there is no ceiling, or one of 0."""
        return np.full(len(r), np.nan) if self.noise_ceiling is None else accuracy_from_r(r, self.noise_ceiling)


@dataclass(frozen=True)
class Scores:
    """Scores of models.

    vertices : of each subject, model and surface
    estimates : of each subject, surface and ROI, with intervals; differences from the reference too
    against : name of the reference; '' for none
    chosen_on : models whose scores are of images on which the epoch of a backbone was chosen
    """

    vertices: Sequence[VertexScore]
    estimates: Sequence[Estimate]
    against: str
    chosen_on: Sequence[str]

    def significant(self, level: float) -> dict[tuple[str, str], float]:
        """{(ROI or 'all', model): share of its vertices with q below a level}, of all subjects; {} without p."""
        counts: dict[tuple[str, str], np.ndarray] = {}
        for one in self.vertices:
            if one.q is None:
                continue
            numbers, names = one.rois
            for roi in dict.fromkeys([ALL, *(roi for name in names for roi in name.split("+") if roi)]):
                inside = np.array([roi == ALL or roi in name.split("+") for name in names])[numbers]
                new = np.array([inside.sum(), (one.q[inside] < level).sum()])
                counts[roi, one.model] = counts.get((roi, one.model), 0) + new
        return {key: float(n_below / n) for key, (n, n_below) in counts.items()}


def score_models(subjects: Sequence[Subject], config: ScoresConfig, work: Path | str, intervals: bool = True) -> Scores:
    """Score all models of a work folder, out of fold. Raises StoreError or ConfigError where there are none.

    intervals : whether to draw images for intervals of ROIs
    """
    work = Path(work)
    keep_freed_memory()
    found = find_scored(subjects, work, config.models, config.exclude)
    against = reference_of(found, config.against)
    seen = shared_by({subject.name: subject.train.ids for subject in subjects})
    vertices: list[VertexScore] = []
    draws: Draws = {}
    total = sum(len(of_subject) * sum(subject.n_vertices.values()) for subject, of_subject in found.items())
    with bar("scores", total, "vertices") as advance:
        for subject, of_subject in found.items():
            drawer = Drawer(subject, seed=config.seed) if intervals else None
            scorer = _Scorer(subject, of_subject, config, seen, against, drawer)
            for block in blocks_of(subject):
                scorer.score(block, advance)
            vertices += scorer.results()
            draws |= drawer.draws() if drawer else {}
    chosen_on = dict.fromkeys(one.name for of_subject in found.values() for one in of_subject if one.chosen_on)
    return Scores(vertices, estimates(with_totals(draws), against), against, list(chosen_on))


class _Scorer:
    """Scores of all models of one subject, as blocks of its vertices come in."""

    def __init__(
        self,
        subject: Subject,
        models: Sequence[Scored],
        config: ScoresConfig,
        seen: Mapping[int, str],
        against: str,
        drawer: Drawer | None,
    ) -> None:
        self._subject, self._models, self._config, self._drawer = subject, models, config, drawer
        self._reference = next((one for one in models if one.name == against), None)
        ids, n = subject.train.ids, config.permutations
        self._folds = {one.folding.key: one.folding.folds(ids) for one in models}
        self._shuffles: dict[tuple[int, int, str], Shuffles] = {}
        if n:
            for one in models:
                key, by = one.folding.key, one.folding.by
                if key not in self._shuffles:
                    self._shuffles[key] = shuffles_of(ids, self._folds[key], seen, by, n, config.seed)
        self._signs = swaps(ids, n, config.seed) if n and self._reference else None
        self._parts = {one.name: _Parts(list(subject.n_vertices), n) for one in models}

    def score(self, block: Block, advance: Callable[[int], object]) -> None:
        """Score every model on a block. advance : called with the number of vertices, for each model"""
        whole = bool(self._shuffles or self._reference)  # whether all columns are needed standardised
        responses = Columns(block.responses)
        if self._drawer:
            self._drawer.start(block, responses.z if whole else None)
        spectra: dict[tuple[int, int, str], Spectra] = {}
        others = Columns(self._reference.source.read(block.surface, block.vertices)) if self._reference else None
        for one in self._models:
            key, parts = one.folding.key, self._parts[one.name]
            if one is self._reference and others is not None:
                predictions = others
            else:
                predictions = Columns(one.source.read(block.surface, block.vertices))
            r = pearson_r(predictions.values, block.responses)
            parts.add(block.surface, "r", r)
            if self._drawer:
                self._drawer.add(one.name, predictions.values, r, predictions.z if whole else None)
            if self._config.per_fold:
                for fold, of_fold in _r_of_folds(predictions.values, block.responses, self._folds[key]).items():
                    parts.add(block.surface, f"{_FOLD}{fold}", of_fold)
            if self._shuffles:
                if key not in spectra:
                    spectra = {key: Spectra(self._shuffles[key], responses.z)}  # one at a time: they are large
                parts.add_permuted(block.surface, permute(spectra[key], predictions.z))
            if others is not None and one is not self._reference:
                d = contributions(predictions.z, others.z, responses.z)
                parts.add(block.surface, "difference", d.mean(0, dtype=np.float64))
                if self._signs is not None:
                    parts.add(block.surface, "difference_p", swap_p(self._signs, d))
            advance(len(r))

    def results(self) -> Iterator[VertexScore]:
        """Scores of every model and surface, once all blocks are there."""
        rois = {surface: joined_rois(self._subject, surface) for surface in self._subject.surfaces}
        for name, parts in self._parts.items():
            columns = parts.columns(self._config.fdr)
            for surface in self._subject.surfaces:
                if not (of_surface := columns[surface]):  # a surface without vertices
                    continue
                yield VertexScore(
                    subject=self._subject.name,
                    surface=surface,
                    model=name,
                    r=of_surface["r"],
                    of_folds={int(k.removeprefix(_FOLD)): v for k, v in of_surface.items() if k.startswith(_FOLD)},
                    noise_ceiling=self._subject.noise_ceiling[surface],
                    rois=rois[surface],
                    **{part: of_surface.get(part) for part in (*P_VALUES, *DIFFERENCES)},
                )


def _r_of_folds(predictions: np.ndarray, responses: np.ndarray, folds: np.ndarray) -> dict[int, np.ndarray]:
    """{fold: r over its images, (n_vertices,)}; NaN for a fold of one image."""
    rows = {fold: folds == fold for fold in np.unique(folds).tolist()}
    return {
        fold: pearson_r(predictions[own], responses[own]) if own.sum() > 1 else np.full(responses.shape[1], np.nan)
        for fold, own in rows.items()
    }


class _Parts:
    """Columns of one model, surface by surface, as blocks come in."""

    def __init__(self, surfaces: Sequence[str], n_permutations: int) -> None:
        self._blocks: dict[str, dict[str, list[np.ndarray]]] = {surface: {} for surface in surfaces}
        self._largest = np.full(n_permutations, -np.inf)

    def add(self, surface: str, column: str, values: np.ndarray) -> None:
        """Add the next vertices of a column."""
        self._blocks[surface].setdefault(column, []).append(values)

    def add_permuted(self, surface: str, permuted: Permuted) -> None:
        """Add p values of the next vertices."""
        self.add(surface, "p", permuted.p)
        self.add(surface, "within", permuted.r)
        self._largest = np.maximum(self._largest, permuted.largest)

    def columns(self, fdr: str) -> dict[str, dict[str, np.ndarray]]:
        """{surface: {column: (n_vertices,)}}, with those that are of all vertices of the subject together."""
        whole = {
            surface: {column: np.concatenate(parts) for column, parts in columns.items()}
            for surface, columns in self._blocks.items()
        }
        for p, q in (("p", "q"), ("difference_p", "difference_q")):
            if all(p in columns for columns in whole.values()):
                every = q_values(np.concatenate([columns[p] for columns in whole.values()]), fdr)
                ends = np.cumsum([len(columns[p]) for columns in whole.values()])[:-1]
                for columns, values in zip(whole.values(), np.split(every, ends), strict=True):
                    columns[q] = values
        for columns in whole.values():
            if (within := columns.pop("within", None)) is not None:
                columns["p_family"] = family_wise(within, self._largest)
        return whole


def joined_rois(subject: Subject, surface: str) -> tuple[np.ndarray, list[str]]:
    """The ROIs of each vertex, (n_vertices,) numbers of names; a vertex of several has their names with + between.

    The name of a vertex that has none is ''.
    """
    masks = subject.rois[surface]
    if not masks:
        return np.zeros(subject.n_vertices[surface], dtype=np.int64), [""]
    kinds, numbers = np.unique(np.stack(list(masks.values()), axis=1), axis=0, return_inverse=True)
    return numbers.reshape(-1), ["+".join(np.array(list(masks))[kind].tolist()) for kind in kinds]
