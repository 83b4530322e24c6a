"""Files and folders that are whole or not there, folders with one writer, and room on the disk."""

import errno
import io
import itertools
import json
import os
import re
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache, lru_cache
from hashlib import blake2b
from pathlib import Path
from typing import Any

import google_crc32c
from filelock import BaseFileLock, FileLock, SoftFileLock, Timeout

from featcache.errors import BusyError, StoreError
from featcache.machine.progress import say, size_of

_AT_ONCE = 16 << 20  # bytes that are read at a time
_LOCK, _MARKER = ".writing.lock", ".writing.marker"
_NO_LOCKS = (errno.ENOSYS, errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOTSUP)  # of a disk without locks
_PATIENCE = 10  # seconds after which a wait is said
_NEVER_WRITTEN = 60  # seconds after which a marker without a number is nobody's
_PARTIAL = re.compile(r"\.([0-9a-f]{8})-(\d+)-\d+\.partial\..+", re.DOTALL)
_EARLIER = re.compile(r"\.(\d+)\..+|\..+\.(\d+)|\..+\.partial-\w+", re.DOTALL)  # as earlier versions called them
_FORGOTTEN = 7 * 86400  # seconds after which what is not finished is nobody's, whichever machine began it
_numbers = itertools.count()


def regular_status(path: Path) -> os.stat_result:
    """Size and times of a regular file, which can be opened without waiting and has an end.

    Raises OSError for a missing file, a folder, a pipe, a socket or a device.
    """
    status = path.stat()
    if not stat.S_ISREG(status.st_mode):
        raise OSError("no regular file")
    return status


def open_regular(path: Path) -> io.FileIO:
    """A regular file that is open to be read. Raises OSError as `regular_status`, and waits for no pipe's writer."""
    number = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    if not stat.S_ISREG(os.fstat(number).st_mode):
        os.close(number)
        raise OSError("no regular file")
    return io.FileIO(number)


def small_bytes(path: Path, most: int) -> bytes:
    """Content of a regular file of `most` bytes or fewer. Raises OSError for a missing, special or larger one."""
    with open_regular(path) as file:
        if (size := os.fstat(file.fileno()).st_size) > most:
            raise OSError(f"{size:,} bytes, more than {most:,}")
        return file.readall()


@contextmanager
def only_writer(folder: Path, wait: bool = False) -> Iterator[None]:
    """Hold a folder, which is made where it is missing, for one writer.

    The lock ends with its process, however that ends. Where the file system has no such locks, a file with the
    process's number and machine stands for it; that of a process of this machine that is gone does not count.

    Raises BusyError where another writer holds the folder, unless `wait`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock: BaseFileLock = FileLock(folder / _LOCK, fallback_to_soft=False)
    held_by: Path | None = None
    try:
        held = _acquired(lock, wait, folder, held_by)
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        # not the file of the lock: it stays when its writer is gone, also where a folder is copied from another disk
        held_by = folder / _MARKER
        lock = SoftFileLock(held_by)
        held = _acquired(lock, wait, folder, held_by)
    with held:
        yield


def _acquired(lock: BaseFileLock, wait: bool, folder: Path, marker: Path | None) -> AbstractContextManager[object]:
    """The lock, held. Raises BusyError where another writer holds it, unless `wait`; a long wait is said once."""
    said = False
    while True:
        try:
            return lock.acquire(timeout=_PATIENCE if wait else 0)
        except Timeout as error:
            if marker is not None and _was_never_written(marker):
                marker.unlink(missing_ok=True)
                continue
            gone = "" if marker is None else f"; if that process is gone, delete {marker}"
            if not wait:
                raise BusyError(
                    folder,
                    expected="to be the only writer",
                    found=f"another process writing{_holder(marker)}",
                    remedy=f"wait for it to end{gone}",
                ) from error
            if not said:
                say(f"{folder}: waits for another process that writes there{_holder(marker)}{gone}")
                said = True


def _holder(marker: Path | None) -> str:
    """Process and machine that a marker names, in words; '' for a lock of the file system, which names none."""
    try:
        process, machine = (marker.read_text() if marker is not None else "").split()[:2]
    except (OSError, ValueError):
        return ""
    return f", process {process} of {machine}"


def _was_never_written(marker: Path) -> bool:
    """Whether a marker's process ended between making the file and writing its number into it."""
    with suppress(OSError):
        status = marker.stat()
        return status.st_size == 0 and time.time() - status.st_mtime > _NEVER_WRITTEN
    return False


def refuse_full_disk(folder: Path, n_bytes: int) -> None:
    """Raise StoreError unless the disk of a folder, which is made where it is missing, has room for so many bytes."""
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if n_bytes > free:
        raise StoreError(
            folder,
            expected=f"{size_of(n_bytes)} of free disk",
            found=size_of(free),
            remedy="make room or choose another --work",
        )


def file_checksum(path: Path) -> str:
    """crc32c of a file's content, 8 hexadecimal digits. It tells damage, at several times the speed of a digest."""
    checksum = 0
    with open_regular(path) as file:
        while content := file.read(_AT_ONCE):
            checksum = google_crc32c.extend(checksum, content)
    return f"{checksum:08x}"


def partial_path(path: Path) -> Path:
    """Another name in the same folder, with the same ending, under which to write a file or a folder until it is whole.

    It says which process of which machine writes it, so that what a killed process left can be told: such leftovers in
    the folder are removed here, the first time that this process writes into it.
    """
    _tidy_once(path.parent.absolute())
    return path.with_name(f".{this_machine()}-{os.getpid()}-{next(_numbers)}.partial.{path.name}")


@cache
def this_machine() -> str:
    """Eight digits that tell this machine, and this set of processes on it, from others that share its disk."""
    processes = ""
    with suppress(OSError):  # not every system has sets of processes that cannot see each other
        processes = os.readlink("/proc/self/ns/pid")
    return blake2b(f"{socket.gethostname()} {processes}".encode(), digest_size=4).hexdigest()


@lru_cache(maxsize=4096)
def _tidy_once(folder: Path) -> None:
    remove_leftovers(folder)


def remove_leftovers(folder: Path) -> list[Path]:
    """Remove what processes that are gone left unfinished in a folder, and return it.

    What a process of another machine began, or an earlier version, is removed a week after it was last written to.
    """
    removed = []
    with suppress(OSError):  # no such folder yet
        for path in [Path(entry) for entry in os.scandir(folder) if entry.name.startswith(".")]:
            if is_leftover(path):
                shutil.rmtree(path, ignore_errors=True) if path.is_dir() and not path.is_symlink() else _unlink(path)
                removed.append(path)
    return removed


def _unlink(path: Path) -> None:
    with suppress(OSError):
        path.unlink()


def is_leftover(path: Path) -> bool:
    """Whether a file or folder is what a process that is gone left unfinished."""
    if (partial := _PARTIAL.fullmatch(path.name)) and partial[1] == this_machine():
        return not _runs(int(partial[2]))
    if partial or _EARLIER.fullmatch(path.name):
        with suppress(OSError):
            return time.time() - path.lstat().st_mtime > _FORGOTTEN
    return False


def _runs(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except OSError:  # another user's
        return True
    return True


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """Another name, in the same folder and with the same ending, under which to write the file.

    The file takes its own name, in place of any older one, once the block ends and all of it is on the disk. An error
    in the block removes what it wrote and leaves the older file. Raises StoreError where a folder has its name.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = partial_path(path)
    try:
        yield partial
        with partial.open("rb+") as file:
            os.fsync(file.fileno())
        if path.is_dir():
            raise StoreError(path, expected="a file, or nothing", found="a folder", remedy="remove it")
        os.replace(partial, path)
    except BaseException:
        partial.unlink(missing_ok=True)
        raise


def replace_bytes(path: Path, content: bytes) -> None:
    """Write a file whole or not at all, and have it on the disk before returning."""
    with whole_file(path) as partial:
        partial.write_bytes(content)


def replace_json(path: Path, content: Any) -> None:
    """Write a JSON file whole or not at all, and have it on the disk before returning."""
    replace_bytes(path, json.dumps(content).encode())
