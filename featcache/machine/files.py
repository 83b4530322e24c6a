"""Files and folders that are whole or not there, folders with one writer, and room on the disk."""

import json
import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from filelock import FileLock, Timeout

from featcache.errors import StoreError

_LOCK = ".writing.lock"


def regular_status(path: Path) -> os.stat_result:
    """Size and times of a regular file, which can be opened without waiting and has an end.

    Raises OSError for a missing file, a folder, a pipe, a socket or a device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    return status


def small_bytes(path: Path, most: int) -> bytes:
    """Content of a regular file of `most` bytes or fewer. Raises OSError for a missing, special or larger one."""
    if (size := regular_status(path).st_size) > most:
        raise OSError(f"{size:,} bytes, more than {most:,}")
    return path.read_bytes()


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, for one writer.

    The lock ends with its process, however that ends. Where the file system has no such locks, a file stands for it.

    Raises StoreError where another writer holds the folder, unless `wait`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(folder / _LOCK).acquire(timeout=-1 if wait else 0)
    except Timeout as error:
        raise StoreError(
            folder, expected="to be the only writer", found="another process writing", remedy="wait for it to end"
        ) from error
    with lock:
        yield


def refuse_full_disk(folder: Path, n_bytes: int) -> None:
    """Raise StoreError unless the disk of a folder, which is made where it is missing, has room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise StoreError(
            folder,
            expected=f"{n_bytes / 1e9:.1f} GB of free disk",
            found=f"{free / 1e9:.1f} GB",
            remedy="make room or choose another --work",
        )


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name, in the same folder and with the same ending, under which to write the file.

    The file takes its own name, in place of any older one, once the block ends and all of it is on the disk. An error
    in the block removes what it wrote and leaves the older file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which takes that name once the block ends; an error in the block removes it.

    `path` must not exist, or be an empty folder.
    """
    path = path.absolute()
    path.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=f".{path.name}.partial-", dir=path.parent) as temporary:
        partial = Path(temporary) / path.name
        partial.mkdir()
        yield partial
        if path.exists():
            path.rmdir()  # not every system renames onto a folder
        partial.rename(path)


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk before returning."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def replace_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, and have it on the disk before returning."""
    replace_bytes(path, json.dumps(content).encode())
