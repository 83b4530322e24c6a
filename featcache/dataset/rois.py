"""Names of ROIs: the pickled dicts that name the labels of vertices, read without running them."""

import pickle
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from featcache.errors import DataError
from featcache.machine.files import regular_status

HEMISPHERES = ("lh", "rh")
FSAVERAGE_VERTICES = 163_842  # of one hemisphere of the fsaverage surface
FSAVERAGE5_VERTICES = 10_242  # of its coarser mesh fsaverage5, which are the first of fsaverage's

# Known ROI classes in the order of reports. A dataset may have others, which follow in alphabetical order.
CLASSES = ("prf-visualrois", "floc-bodies", "floc-faces", "floc-places", "floc-words", "streams")


class _ObjectArray:
    """Takes the place of numpy.ndarray while a mapping is unpickled: keeps the items and runs nothing."""

    items: list[Any]

    def __setstate__(self, state: tuple[Any, ...]) -> None:
        self.items = list(state[4])


class _Dtype:
    """Takes the place of numpy.dtype."""

    def __init__(self, *_: Any) -> None:
        pass

    def __setstate__(self, _: Any) -> None:
        pass


def _scalar(_: Any, raw: bytes) -> int:
    """Takes the place of numpy's constructor of scalars, for integer keys; little-endian, as pickled by numpy."""
    return int.from_bytes(raw, "little", signed=True)


def _encode(text: str, _: str) -> bytes:
    """Takes the place of _codecs.encode, by which old pickle protocols write bytes."""
    return text.encode("latin1")


_ADMITTED: dict[tuple[str, str], Any] = {
    ("numpy", "ndarray"): _ObjectArray,
    ("numpy", "dtype"): _Dtype,
    ("_codecs", "encode"): _encode,
}
for _module in ("numpy.core.multiarray", "numpy._core.multiarray"):  # before and since numpy 2
    _ADMITTED |= {(_module, "_reconstruct"): lambda *_: _ObjectArray(), (_module, "scalar"): _scalar}

_MAX_MAPPING_BYTES = 100_000  # a hundred times what a few dozen names need
_NOT_A_MAPPING = (  # errors that a damaged header or pickle causes
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)


class _MappingUnpickler(pickle.Unpickler):
    """Loads a dict of integers and strings inside a 0-d object array; refuses functions that this does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dict of labels never needs")


def read_mapping(path: Path) -> dict[int, str]:
    """{label: ROI name} from a .npy file with a pickled dict; nothing that the file contains is run.

    Raises DataError for a file that is not such a dict, or whose pickle asks for any function.
    """
    try:
        if (size := regular_status(path).st_size) > _MAX_MAPPING_BYTES:
            raise ValueError(f"it has {size} bytes")
        with path.open("rb") as file:
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if shape != () or dtype.kind != "O":
                raise ValueError(f"it is an array of {dtype}, shape {shape}")
            mapping = _MappingUnpickler(file).load().items[0]
            return {_label(label): _name(name) for label, name in mapping.items()}
    except FileNotFoundError as error:
        raise DataError(path, expected="the names of the labels", found="no file", remedy="copy it again") from error
    except _NOT_A_MAPPING as error:
        raise DataError(
            path,
            expected="a pickled dict of labels and ROI names",
            found=f"something else ({error})",
            remedy="nothing in it was run; get the file from the challenge again",
        ) from error


def _label(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"label {value!r} is not an integer")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"name {value!r} is not a string")
    return value


def class_order(name: str) -> tuple[int, str]:
    """Sort key by which ROI classes come in the order of reports."""
    return (CLASSES.index(name) if name in CLASSES else len(CLASSES), name)
