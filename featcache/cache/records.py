"""What a store says of itself in JSON: its description, the record of its rows, and the descriptions of its arrays."""

from pathlib import Path
from typing import Any

import msgspec

from featcache.config import is_named_by
from featcache.machine.documents import Count, DocumentError, Id
from featcache.workdir import is_file_name

FORMAT = 1
COMMITTED, DESCRIPTION = "committed.json", "zarr.json"
_CODECS = [
    {"name": "bytes", "configuration": {"endian": "little"}},
    {"name": "crc32c"},
]


class Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True, omit_defaults=True):
    """What a store's `zarr.json` says of it. In the index are neither facts nor ids, which may be long."""

    format: int
    recipe: dict[str, Any]
    n_train: Count
    arrays: list[str]
    facts: dict[str, Any] | None = None
    image_ids: list[Id] | None = None

    def refuse_other(self, path: Path) -> None:
        """Raise DocumentError where this is not of the store in a folder, or has arrays that no folder can have."""
        if not is_named_by(path.name, self.recipe):
            raise DocumentError("its key is not the one that the folder is named by")
        if len(set(self.arrays)) < len(self.arrays) or not all(map(is_file_name, self.arrays)):
            raise DocumentError("its arrays have names that no folder can have")


class Committed(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `committed.json` says of the arrays of a store.

    key : fingerprint of the key of the store
    rows : of each array, that are whole
    checksums : crc32c of each of the chunks that have these rows; none in records of earlier versions
    """

    key: str
    rows: dict[str, Count]
    checksums: dict[str, list[Count]]


def refuse_other_array(description: Any) -> None:
    """Raise DocumentError for an array that is not as `_create_array` makes it, which would be read wrongly."""
    rows, *shape = description["shape"]
    chunk_rows, *chunk = description["chunk_grid"]["configuration"]["chunk_shape"]
    codecs = [{name: value for name, value in codec.items() if value != {}} for codec in description["codecs"]]
    if description["data_type"] not in ("float16", "float32"):
        raise DocumentError(f"its numbers are {description['data_type']!r}")
    if codecs != _CODECS or chunk != [max(side, 1) for side in shape] or not 0 < chunk_rows <= max(rows, 1):
        raise DocumentError("its chunks are not whole rows of numbers with a checksum")
