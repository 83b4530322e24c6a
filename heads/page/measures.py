"""Numbers of one subject's models that the page shows, from one pass over their out-of-fold predictions."""

from collections.abc import Sequence
from dataclasses import dataclass, field

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
class _ImageSums:
    """Sums over vertices, for each image, of predictions, responses, their squares and products."""

    n: int
    p: np.ndarray
    pp: np.ndarray
    py: np.ndarray
    y: np.ndarray
    yy: np.ndarray

    @classmethod
    def none(cls, n_images: int) -> "_ImageSums":
        return cls(0, *np.zeros((5, n_images)))

    def add(self, p: np.ndarray, y: np.ndarray) -> None:
        self.n += p.shape[1]
        self.p += p.sum(1, dtype=np.float64)
        self.y += y.sum(1, dtype=np.float64)
        self.pp += np.einsum("iv,iv->i", p, p)
        self.yy += np.einsum("iv,iv->i", y, y)
        self.py += np.einsum("iv,iv->i", p, y)

    def r(self) -> np.ndarray:
        return r_from_sums(np.array(self.n), self.p, self.pp, self.py, self.y, self.yy)


@dataclass
class _Pass:
    """What is gathered block by block."""

    subject: Subject
    r: dict[str, np.ndarray] = field(default_factory=dict)
    spread: dict[str, np.ndarray] = field(default_factory=dict)
    images: dict[str, _ImageSums] = field(default_factory=dict)

    def add(self, block: Block, place: slice, model: str, predictions: np.ndarray) -> None:
        n = sum(self.subject.n_vertices.values())
        for values in (self.r, self.spread):
            values.setdefault(model, np.zeros(n))
        self.r[model][place] = pearson_r(predictions, block.responses)
        self.spread[model][place] = predictions.std(0)
        # in units of the response, so that a vertex of large responses counts as any other
        scale = block.responses.std(0)
        keep = np.flatnonzero((scale > 0) & explainable(ceiling_of(self.subject)[place]))
        p, y = ((values[:, keep] - values[:, keep].mean(0)) / scale[keep] for values in (predictions, block.responses))
        self.images.setdefault(model, _ImageSums.none(len(predictions))).add(p, y)


def measure(subject: Subject, scored: Sequence[Scored], n_draws: int = N_DRAWS) -> Measured:
    """Read the out-of-fold predictions of some models block by block, and score vertices, ROIs and images."""
    sources = [one.source for one in scored]
    gathered, drawer, starts = _Pass(subject), Drawer(subject, n_draws), surface_blocks(subject)
    for block in blocks_of(subject):
        drawer.start(block)
        start = starts[block.surface].start
        place = slice(start + block.vertices.start, start + block.vertices.stop)
        for source in sources:
            predictions = source.read(block.surface, block.vertices)
            gathered.add(block, place, source.name, predictions)
            drawer.add(source.name, predictions, gathered.r[source.name][place])
    models = [source.model for source in sources if isinstance(source, StoredModel)]
    image_r = {model: sums.r() for model, sums in gathered.images.items()}
    return Measured(subject, models, gathered.r, gathered.spread, image_r, drawer.draws())
