"""Zarr folders of others, in which a pipe may lie where a chunk is expected."""

from pathlib import Path
from typing import Any

import zarr
from zarr.abc.store import ByteRequest
from zarr.core.buffer import Buffer, BufferPrototype
from zarr.storage import LocalStore

from featcache.machine.files import regular_status


class _RegularFiles(LocalStore):
    """A folder of which regular files alone are read: a pipe would wait for its writer for ever."""

    async def get(
        self, key: str, prototype: BufferPrototype | None = None, byte_range: ByteRequest | None = None
    ) -> Buffer | None:
        path = self.root / key
        if path.exists() and not path.is_dir():
            regular_status(path)
        return await super().get(key, prototype, byte_range)


def open_zarr(path: Path) -> Any:
    """The array or group of a Zarr folder or .zip, to be read; a file in it that is no regular one raises OSError."""
    return zarr.open(_RegularFiles(path, read_only=True) if path.is_dir() else path, mode="r")
