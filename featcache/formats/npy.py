"""The .npy files of the project's own rooms: one way to open them, whatever is in them."""

from pathlib import Path

import numpy as np

from featcache.formats.files import reading, regular_file


def open_npy(path: Path) -> np.ndarray:
    """Memory map of the array in a .npy file, of any type but Python objects: nothing in it is run.

    Raises DataError for a missing file, for what is no file, such as a pipe, and for a header that is broken or lies:
    negative rows, or more than the file holds.
    """
    regular_file(path)
    with reading(path, "a .npy file of numbers"):
        array: np.ndarray = np.lib.format.open_memmap(path, mode="r")  # np.load would also open a zip or a pickle
        return array
