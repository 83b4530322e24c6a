"""Out-of-fold predictions some vertices at a time, all images of them together, in bounded memory."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np

from featcache.cache.store import Store
from featcache.dataset.subject import Subject
from featcache.machine.tensors import as_float32
from heads.blend.models import Model

BLOCK_BYTES = 150e6  # of the float32 rows of one model that are held at once
_BATCH_ROWS = 512  # of whole rows that are read before the vertices are cut out


class Source(Protocol):
    """A model of one subject, by whatever it is read from."""

    @property
    def name(self) -> str:
        """Name of the model."""
        ...

    def read(self, surface: str, vertices: slice) -> np.ndarray:
        """Out-of-fold predictions of all training images for some vertices, (n_train, n_block) float32."""
        ...


@dataclass(frozen=True)
class StoredModel:
    """A model in its prediction store."""

    model: Model

    @property
    def name(self) -> str:
        return self.model.name

    def read(self, surface: str, vertices: slice) -> np.ndarray:
        return read_columns(self.model.store, surface, vertices)


@dataclass(frozen=True)
class Block:
    """Some vertices of one surface.

    responses : (n_train, n_block) float32
    """

    surface: str
    vertices: slice
    responses: np.ndarray


def blocks_of(subject: Subject, n_bytes: float = BLOCK_BYTES) -> Iterator[Block]:
    """The vertices of a subject, block by block; n_bytes is about what one matrix of a block takes."""
    step = max(int(n_bytes / 4 / len(subject.train)), 1)
    for surface, n_vertices in subject.n_vertices.items():
        responses = subject.responses(surface)
        for start in range(0, n_vertices, step):
            vertices = slice(start, min(start + step, n_vertices))
            yield Block(surface, vertices, np.array(responses[:, vertices], dtype=np.float32))


def read_columns(store: Store, surface: str, vertices: slice) -> np.ndarray:
    """Rows of the training images of some vertices, (n_train, n_block); a store has whole rows, read some at a time."""
    columns = np.empty((store.n_train, vertices.stop - vertices.start), np.float32)
    chunk = store.chunk_rows(surface)
    step = -(-_BATCH_ROWS // chunk) * chunk
    for start in range(0, store.n_train, step):
        stop = min(start + step, store.n_train)
        columns[start:stop] = as_float32(store.read(surface, start, stop)[:, vertices])
    return columns
