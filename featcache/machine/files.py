"""Files that are whole or not there, folders with one writer, and room on the disk."""

import fcntl
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from featcache.errors import StoreError

_LOCK = ".writing.lock"


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder for one writer. Others wait for it, or are told to: StoreError."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / _LOCK).open("w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        except BlockingIOError as error:
            raise StoreError(
                folder,
                expected="to be the only writer",
                found="another process writing",
                remedy="wait for it to end",
            ) from error
        yield


def refuse_full_disk(folder: Path, n_bytes: int) -> None:
    """Raise StoreError unless a folder's disk has room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise StoreError(
            folder,
            expected=f"{n_bytes / 1e9:.1f} GB of free disk",
            found=f"{free / 1e9:.1f} GB",
            remedy="make room or choose another --work",
        )


def replace_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, and have it on the disk before returning."""
    partial = path.with_name(f".{path.name}.{os.getpid()}")
    with partial.open("w") as file:
        json.dump(content, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(partial, path)
