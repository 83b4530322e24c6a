"""Numbers of one subject's models that the page shows, from one pass over their out-of-fold predictions."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.dataset.subject import Subject
from heads.blend.models import Model
from heads.blend.products import surface_blocks
from heads.blend.saved import BLEND
from heads.scores.metrics import VertexScores, pearson_r, r_from_sums
from heads.scores.resampling import N_DRAWS
from heads.statistics.blocks import Block, StoredModel, blocks_of
from heads.statistics.intervals import Drawer, Draws
from heads.statistics.sources import Scored


@dataclass(frozen=True)
class Measured:
    """One subject's models, and its blend by the name `BLEND`. The vertices of its surfaces are side by side.

    models : those with a prediction store
    r : {model: (n_vertices,)}, out of fold
    spread : {model: (n_vertices,)} standard deviations of its predictions
    image_r : {model: (n_train,)} r over vertices of each image's prediction with its response
    draws : of mean scores, for intervals
    """

    subject: Subject
    models: Sequence[Model]
    r: dict[str, np.ndarray]
    spread: dict[str, np.ndarray]
    image_r: dict[str, np.ndarray]
    draws: Draws

    @property
    def best(self) -> str:
        """The blend, where there is one; else the model with the highest mean r."""
        return BLEND if self.blended else max(self.r, key=lambda name: float(self.r[name].mean()))

    @property
    def blended(self) -> bool:
        """Whether there is a blend, out of fold."""
        return BLEND in self.r

    @property
    def ceiling(self) -> np.ndarray:
        """(n_vertices,) noise ceilings, fraction of variance; NaN where there is none."""
        return ceiling_of(self.subject)

    def scores(self, model: str) -> list[VertexScores]:
        """Scores of one model, surface by surface."""
        return [
            VertexScores(
                self.subject.name,
                surface,
                self.r[model][block],
                self.subject.noise_ceiling[surface],
                self.subject.rois[surface],
            )
            for surface, block in surface_blocks(self.subject).items()
        ]


def ceiling_of(subject: Subject) -> np.ndarray:
    """Noise ceilings of all vertices of a subject, its surfaces side by side; NaN where there is none."""
    parts = [
        np.full(n, np.nan) if (ceiling := subject.noise_ceiling[surface]) is None else ceiling.astype(np.float64)
        for surface, n in subject.n_vertices.items()
    ]
    return np.concatenate(parts)


def explainable(ceiling: np.ndarray) -> np.ndarray:
    """Vertices that an image's score is over: those with a ceiling above 0; all, where no ceiling is known."""
    return np.asarray(np.isnan(ceiling) | (ceiling > 0))


@dataclass
class _Sums:
    """Sums over vertices, for each image, of one model's predictions, their squares, and products with responses."""

    p: np.ndarray
    pp: np.ndarray
    py: np.ndarray

    @classmethod
    def none(cls, n_images: int) -> "_Sums":
        return cls(*np.zeros((3, n_images)))

    def add(self, p: np.ndarray, y: np.ndarray) -> None:
        self.p += p.sum(1, dtype=np.float64)
        self.pp += np.einsum("iv,iv->i", p, p)
        self.py += np.einsum("iv,iv->i", p, y)


class _Pass:
    """What is gathered block by block. Responses of a block are prepared once for all models.

    r, spread, image_r : as in `Measured`
    """

    def __init__(self, subject: Subject) -> None:
        self._n_vertices, self._explainable = sum(subject.n_vertices.values()), explainable(ceiling_of(subject))
        self.r: dict[str, np.ndarray] = {}
        self.spread: dict[str, np.ndarray] = {}
        self._images: dict[str, _Sums] = {}
        self._n, self._responses = 0, _Sums.none(len(subject.train))

    def start(self, block: Block, place: slice) -> None:
        """Take the responses of the block that models are added of next. place : of its vertices among all"""
        self._block, self._place = block, place
        spread = block.responses.std(0)
        counts = (spread > 0) & self._explainable[place]
        # in units of the response, so that a vertex of large responses counts as any other; 0 for one that does not
        self._unit = np.where(counts, 1 / np.where(counts, spread, 1), 0).astype(np.float32)
        self._y = self._in_units(block.responses)
        self._n += int(counts.sum())
        self._responses.add(self._y, self._y)

    def add(self, model: str, predictions: np.ndarray) -> None:
        """Add one model's predictions of the block."""
        for values in (self.r, self.spread):
            values.setdefault(model, np.zeros(self._n_vertices))
        self.r[model][self._place] = pearson_r(predictions, self._block.responses)
        self.spread[model][self._place] = predictions.std(0)
        self._images.setdefault(model, _Sums.none(len(predictions))).add(self._in_units(predictions), self._y)

    def _in_units(self, values: np.ndarray) -> np.ndarray:
        return np.asarray((values - values.mean(0)) * self._unit)

    @property
    def image_r(self) -> dict[str, np.ndarray]:
        y, n = self._responses, np.array(self._n)
        return {model: r_from_sums(n, p.p, p.pp, p.py, y.p, y.pp) for model, p in self._images.items()}


def measure(subject: Subject, scored: Sequence[Scored], n_draws: int = N_DRAWS) -> Measured:
    """Read the out-of-fold predictions of some models block by block, and score vertices, ROIs and images."""
    sources = [one.source for one in scored]
    gathered, drawer, starts = _Pass(subject), Drawer(subject, n_draws), surface_blocks(subject)
    for block in blocks_of(subject):
        start = starts[block.surface].start
        place = slice(start + block.vertices.start, start + block.vertices.stop)
        drawer.start(block)
        gathered.start(block, place)
        for source in sources:
            predictions = source.read(block.surface, block.vertices)
            gathered.add(source.name, predictions)
            drawer.add(source.name, predictions, gathered.r[source.name][place])
    models = [source.model for source in sources if isinstance(source, StoredModel)]
    return Measured(subject, models, gathered.r, gathered.spread, gathered.image_r, drawer.draws())
