"""Rows of a feature store as heads read them: from memory if they fit, else from the disk, chunk by chunk."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from featcache.machine.device import pinned, to_device
from featcache.machine.device_memory import on_cuda

_CHUNKS = 8  # of each streamed array that are in memory at once
BLOCK_BYTES = 64 << 20


class _Source(Protocol):
    """What holds rows: a feature store, or memory."""

    @property
    def arrays(self) -> Mapping[str, Any]:
        """{array: what has a shape, (n_images, ...), and a dtype}"""

    @property
    def image_ids(self) -> Sequence[int] | np.ndarray:
        """One for each row."""

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        """Rows of an array."""

    def chunk_rows(self, name: str) -> int:
        """Number of rows that are read together."""


@dataclass(frozen=True)
class _Memory:
    """Rows of features that are in no store."""

    arrays: Mapping[str, np.ndarray]

    @property
    def image_ids(self) -> range:
        return range(len(next(iter(self.arrays.values()))))

    def read(self, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
        return self.arrays[name][start:stop]

    def chunk_rows(self, name: str) -> int:
        return len(self.arrays[name])


class LayerRows:
    """Some arrays of a feature store, as (n_images, n_places, n_channels) each; a vector has one place.

    device : of the rows that are returned; rows are kept in main memory, as stored, and on the device if
        `keep_on_device` is called
    budget : bytes that may be kept; arrays that do not fit are read from the disk at every use
    held : {array: rows as stored} of some images, in place of those of the store
    """

    def __init__(
        self,
        store: _Source,
        arrays: Sequence[str],
        device: str,
        budget: float,
        held: dict[str, np.ndarray] | None = None,
    ) -> None:
        self._store, self.device, self._n_images = store, device, len(store.image_ids)
        self.grids: dict[str, tuple[int, int]] = {name: _grid(store.arrays[name].shape[1:]) for name in arrays}
        self.channels: dict[str, int] = {name: store.arrays[name].shape[-1] for name in arrays}
        self._held: dict[str, np.ndarray] = held or {}
        self._chunks: dict[tuple[str, int], np.ndarray] = {}
        self._resident: dict[str, torch.Tensor] = {}  # on a device that is not the CPU, as stored
        if held:
            self._n_images = len(held[arrays[0]])
            return
        for name in sorted(arrays, key=self.n_bytes):
            if sum(map(self.n_bytes, self._held)) + self.n_bytes(name) <= budget:
                self._held[name] = store.read(name)

    @classmethod
    def of_arrays(cls, arrays: dict[str, np.ndarray], device: str) -> "LayerRows":
        """Rows in memory that are in no store. arrays : {array: (n_images, n_features) or (n_images, h, w, c)}"""
        return cls(_Memory(arrays), tuple(arrays), device, 0, arrays)

    def __len__(self) -> int:
        return self._n_images

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """{array: shape of a row}"""
        return {name: self._store.arrays[name].shape[1:] for name in self.grids}

    @property
    def n_features(self) -> int:
        """Features of an image, over all arrays."""
        return sum(self.n_places(name) * self.channels[name] for name in self.grids)

    @property
    def streamed(self) -> list[str]:
        """Arrays that are not in memory."""
        return [name for name in self.grids if name not in self._held]

    @property
    def held_bytes(self) -> int:
        """Bytes of the arrays in memory, and of the chunks that streaming keeps."""
        chunks = sum(
            min(self._kept_chunks(name) * self._store.chunk_rows(name), len(self))
            * self.n_bytes(name)
            // max(len(self), 1)
            for name in self.streamed
        )
        return sum(map(self.n_bytes, self._held)) + chunks

    def keep_on_device(self, budget: float) -> None:
        """Keep arrays that are in memory on a CUDA device too, the smallest first, up to so many bytes.

        Batches of them then need no copy, and the host does not wait for any.
        """
        for name in sorted(self._held, key=self.n_bytes) if on_cuda(self.device) else ():
            if sum(map(self.n_bytes, self._resident)) + self.n_bytes(name) <= budget:
                self._resident[name] = torch.from_numpy(self._held[name]).to(self.device)

    def n_places(self, name: str) -> int:
        return math.prod(self.grids[name])

    def n_bytes(self, name: str) -> int:
        array = self._store.arrays[name]
        return int(math.prod(array.shape) * array.dtype.itemsize)

    def read(self, name: str, start: int = 0, stop: int | None = None) -> torch.Tensor:
        """(stop - start, n_places, n_channels) float32 on the device."""
        stop = len(self) if stop is None else stop
        if name in self._resident:
            return self._shaped(name, self._resident[name][start:stop])
        held = self._held.get(name)
        rows = self._store.read(name, start, stop) if held is None else held[start:stop]
        return self._ready(name, rows)

    def rows(self, index: np.ndarray | torch.Tensor) -> dict[str, torch.Tensor]:
        """{array: (len(index), ...) float32, with the axes of the store} of any images."""
        found: dict[str, torch.Tensor] = {}
        if self._resident:
            where = self._sent(torch.as_tensor(index))
            found = {name: rows[where].float() for name, rows in self._resident.items()}
        if others := [name for name in self.grids if name not in self._resident]:
            numbers = index.cpu().numpy() if isinstance(index, torch.Tensor) else index
            found |= {name: self._sent(torch.from_numpy(self._stored(name, numbers))).float() for name in others}
        return {name: found[name] for name in self.grids}

    def _stored(self, name: str, index: np.ndarray) -> np.ndarray:
        """Rows of any images, as stored."""
        if name in self._held:
            rows: np.ndarray = self._held[name][index]
            return rows
        array, step = self._store.arrays[name], self._store.chunk_rows(name)
        rows = np.empty((len(index), *array.shape[1:]), dtype=array.dtype)
        for chunk in np.unique(index // step):  # a chunk is read and checked as a whole, so its rows are taken together
            in_chunk = index // step == chunk
            rows[in_chunk] = self._chunk(name, int(chunk))[index[in_chunk] - chunk * step]
        return rows

    def _kept_chunks(self, name: str) -> int:
        """Number of chunks to keep, so that they cover the images that a shuffled order draws from at a time."""
        widest = max(map(self._store.chunk_rows, self.streamed))
        return _CHUNKS * widest // self._store.chunk_rows(name)

    def _chunk(self, name: str, number: int) -> np.ndarray:
        """One chunk of an array; the last few are kept, because batches are drawn from a few."""
        if (name, number) not in self._chunks:
            kept = [key for key in self._chunks if key[0] == name]
            if len(kept) >= self._kept_chunks(name):
                del self._chunks[kept[0]]
            first = number * self._store.chunk_rows(name)
            last = min(first + self._store.chunk_rows(name), len(self._store.image_ids))
            self._chunks[name, number] = self._store.read(name, first, last)
        return self._chunks[name, number]

    def __getitem__(self, index: torch.Tensor | np.ndarray) -> dict[str, torch.Tensor]:
        return self.rows(index)

    def shuffled(self, index: torch.Tensor) -> torch.Tensor:
        """Rows in a random order by torch's seed; if arrays are read from the disk, from a few chunks at a time."""
        if not self.streamed:
            return index[torch.randperm(len(index), device=index.device)]
        step = max(self._store.chunk_rows(name) for name in self.streamed)
        chunk = torch.div(index, step, rounding_mode="floor")
        rank = torch.randperm(int(chunk.max()) + 1, device=index.device)[chunk]  # of each row's chunk in this epoch
        window = torch.div(rank, _CHUNKS, rounding_mode="floor")
        return index[torch.argsort(window + torch.rand(len(index), device=index.device).double())]

    def blocks(self, name: str, index: np.ndarray) -> Iterator[torch.Tensor]:
        """Rows of any images, (n, n_places, n_channels) float32 on the device, in blocks of images."""
        step = self.block_rows(name)
        for start in range(0, len(index), step):
            part = index[start : start + step]
            if name in self._resident:
                yield self._shaped(name, self._resident[name][self._sent(torch.from_numpy(part))])
            else:
                yield self._ready(name, self._stored(name, part))

    def mean_and_variance(self, name: str, index: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """(n_places, n_channels) mean over some images; (n_channels,) variance about it, over images and places."""
        total: Any = 0.0
        squares: Any = 0.0
        for stored in self.blocks(name, index):
            block = stored.double()
            total, squares = total + block.sum(0), squares + block.square().sum(0)
        mean = total / len(index)
        return mean.float(), (squares / len(index) - mean.square()).clamp_min(0).mean(0).float()

    def block_rows(self, name: str) -> int:
        """Number of images in a block whose float32 rows of an array take about BLOCK_BYTES."""
        return max(BLOCK_BYTES // (4 * self.n_places(name) * self.channels[name]), 1)

    def subset(self, index: np.ndarray) -> "LayerRows":
        """Rows of some images, in memory."""
        held = {name: self._stored(name, index) for name in self.grids}
        return LayerRows(self._store, tuple(self.grids), self.device, 0, held)

    def _ready(self, name: str, rows: np.ndarray) -> torch.Tensor:
        return self._shaped(name, self._sent(torch.from_numpy(rows)))

    def _shaped(self, name: str, rows: torch.Tensor) -> torch.Tensor:
        return rows.reshape(len(rows), self.n_places(name), self.channels[name]).float()

    def _sent(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor on the device, without a wait for the copy."""
        return to_device(pinned(tensor, self.device), self.device)

    def dense(self) -> torch.Tensor:
        """(n_images, n_features) float32, arrays side by side."""
        return torch.cat([self.read(name).flatten(1) for name in self.grids], 1)


def _grid(shape: tuple[int, ...]) -> tuple[int, int]:
    return (shape[0], shape[1]) if len(shape) == 3 else (1, 1)
