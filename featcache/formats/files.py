"""What every reader needs: regular files alone are opened, and what a library says of a broken one is one line."""

import os
import zlib
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from featcache.errors import DataError, FeatcacheError, first_line

MOST_INFLATED = 1032  # times the size of its compressed data that zlib's data can have
_AT_ONCE = 1 << 20


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

    A header that lies may ask for more memory than there is, which is a DataError, too.

    what : what was to be read, as a message names it: 'an HDF5 file'
    """
    try:
        yield
    except FeatcacheError:
        raise
    except MemoryError as error:
        raise DataError(
            where,
            expected=f"{what} that fits into memory",
            found=f"one that asks for more than there is ({first_line(error)})",
            remedy="free memory, or copy the file again if it is smaller than that",
        ) from error
    except Exception as error:  # parsers of broken files raise anything: zlib.error, IndexError, kinds of their own
        raise DataError(
            where,
            expected=f"{what} that can be read",
            found=f"one that cannot be read ({first_line(error)})",
            remedy="copy it again, or write it again with the program that made it",
        ) from error


def inflates_beyond(pieces: Iterable[bytes], most: int) -> bool:
    """Whether zlib's compressed data, in pieces, becomes more than so many bytes; no more than 1 MB is held.

    Raises zlib.error for data that is broken before that.
    """
    inflate, n_bytes = zlib.decompressobj(), 0
    for piece in pieces:
        while piece:
            n_bytes += len(inflate.decompress(piece, _AT_ONCE))
            if n_bytes > most:
                return True
            piece = inflate.unconsumed_tail
    return False
