"""What every reader needs: regular files alone are opened, and what a library says of a broken one is one line."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from featcache.errors import DataError, FeatcacheError, first_line


def regular_file(path: Path) -> Path:
    """The path, of a regular file with something in it.

    Raises DataError for a missing or empty file, a folder, and what is no file, such as a FIFO, which waits for a
    writer for ever.
    """
    expected, remedy = "a file", "name a file that holds the data"
    if not os.path.isfile(path):  # which raises nothing where a folder may not be entered
        found = "a folder" if os.path.isdir(path) else "something that is no file" if os.path.exists(path) else "none"
    elif not os.path.getsize(path):
        expected, found, remedy = "a file with something in it", "0 bytes", "copy it again"
    else:
        return path
    raise DataError(path, expected=expected, found=found, remedy=remedy)


@contextmanager
def reading(where: object, what: str) -> Iterator[None]:
    """Whatever a library raises on a broken file, raised as DataError with the first line of its message.

    what : what was to be read, as a message names it: 'an HDF5 file'
    """
    try:
        yield
    except (FeatcacheError, MemoryError):
        raise
    except Exception as error:  # parsers of broken files raise anything: zlib.error, IndexError, kinds of their own
        raise DataError(
            where,
            expected=f"{what} that can be read",
            found=f"one that cannot ({first_line(error)})",
            remedy="copy it again, or write it again with the program that made it",
        ) from error
