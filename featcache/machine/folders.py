"""Folders that take the place of an older one in one step, and reading a folder that may be replaced meanwhile."""

import ctypes
import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from featcache.errors import StoreError
from featcache.machine.files import only_writer, partial_path

_AT_WORKING_FOLDER, _EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of linux/fcntl.h and linux/fs.h
_ATTEMPTS = 20  # of a reader, whose folder is replaced again and again

T = TypeVar("T")


@contextmanager
def staged_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, with a name that no other process uses, which is gone once the block ends.

    Whoever fills it gives it away with `replace_folder` in the block.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    partial.mkdir()
    try:
        yield partial
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def whole_folder(path: Path) -> Iterator[Path]:
    """An empty folder beside `path`, which takes that name once the block ends; an error in the block removes it.

    `path` must not exist, or be an empty folder. Raises StoreError where it has files by then.
    """
    path = path.absolute()
    with staged_folder(path) as partial:
        yield partial
        try:
            with suppress(FileNotFoundError):
                path.rmdir()  # not every system renames onto a folder
            partial.rename(path)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                raise
            raise StoreError(
                path,
                expected="a folder that is new or empty",
                found="what another process has put there meanwhile",
                remedy="look at it, and choose another name or remove it",
            ) from error


@contextmanager
def renewed_folder(path: Path, keep: str = "") -> Iterator[Path]:
    """An empty folder that takes the place of `path` once the block ends; an error in the block leaves the older one.

    Processes that renew one folder at once take turns at the end: what is there is wholly of one of them.

    keep : pattern of files of the older folder that the new one has too, unless it has others of their names
    """
    with staged_folder(path) as partial:
        yield partial
        with only_writer(path.parent, wait=True):
            restore_folder(path)
            for file in path.glob(keep) if keep else ():
                if not (partial / file.name).exists():
                    link_or_copy(file, partial / file.name)
            replace_folder(partial, path)


def link_or_copy(source: Path, target: Path) -> None:
    """Have a file under another name too, which must be free: linked, or copied where the file system has no links."""
    try:
        os.link(source, target)
    except OSError:
        partial = partial_path(target)
        try:
            shutil.copyfile(source, partial)
            os.replace(partial, target)
        finally:
            partial.unlink(missing_ok=True)


def replace_folder(new: Path, path: Path) -> None:
    """Put a whole folder in the place of another, if any, which is removed; both are in one folder.

    It is one step where the system can exchange two names, as Linux can. Elsewhere the older folder is set aside for a
    moment; `restore_folder` puts it back if the process ends in that moment. One process at a time may do this.
    """
    _sync(new)
    if path.exists() and not _exchanged(new, path):
        path.rename(_aside(path))
    if new.exists() and not path.exists():
        new.rename(path)
    for older in (new, _aside(path)):
        shutil.rmtree(older, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Put back the older folder that a process had set aside when it ended; the caller is the only writer."""
    if _aside(path).is_dir():
        if path.exists():
            shutil.rmtree(_aside(path), ignore_errors=True)
        else:
            _aside(path).rename(path)


def read_unchanged(folder: Path, read: Callable[[], T]) -> T:
    """What `read` returns or raises of files that are all of one state of a folder, which may be replaced meanwhile."""
    for _ in range(_ATTEMPTS):
        before = _identity(folder)
        try:
            found = read()
        except Exception:
            if _identity(folder) == before:
                raise
        else:
            if _identity(folder) == before:
                return found
    return read()


def _identity(folder: Path) -> tuple[int, int, int] | None:
    try:
        status = folder.stat()
        return status.st_dev, status.st_ino, status.st_mtime_ns
    except OSError:
        return None


def _aside(path: Path) -> Path:
    return path.with_name(f".{path.name}.older")


def _exchanged(one: Path, other: Path) -> bool:
    """Exchange the names of two folders; whether the system and the file system can do that."""
    try:
        rename = ctypes.CDLL(None).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old one
        return False
    names = (os.fsencode(one), _AT_WORKING_FOLDER, os.fsencode(other))
    return bool(rename(_AT_WORKING_FOLDER, *names, ctypes.c_uint(_EXCHANGE)) == 0)


def _sync(folder: Path) -> None:
    """Have every file of a folder on the disk, before its name says that it is whole."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
