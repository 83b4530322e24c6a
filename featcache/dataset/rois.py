"""Names of ROIs: the pickled dicts that name the labels of vertices, read without running them."""

import io
import pickle
import pickletools
from pathlib import Path
from tokenize import TokenError
from typing import Any

import numpy as np

from featcache.errors import DataError, first_line
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

_MOST_AGAIN = 4  # times that a tuple of a pickle may be used again: numpy never does
_MAX_MAPPING_BYTES = 100_000  # a hundred times what a few dozen names need
_NOT_A_MAPPING = (  # errors that a damaged header or pickle causes
    pickle.UnpicklingError,
    ArithmeticError,
    AttributeError,
    EOFError,
    LookupError,
    MemoryError,
    OSError,
    RecursionError,
    SyntaxError,
    TokenError,
    TypeError,
    ValueError,
)


# Operations of pickles that such a dict needs, in any protocol. Others can take memory or time without end: sets, lists
# and classes of many levels, an item of which is hashed or compared; places of a memory of 2^32; extensions.
_OPERATIONS = {
    "PROTO", "FRAME", "STOP", "MARK", "POP", "POP_MARK", "GLOBAL", "STACK_GLOBAL",
    "REDUCE", "BUILD", "NONE", "NEWTRUE", "NEWFALSE", "INT", "BININT", "BININT1",
    "BININT2", "LONG", "LONG1", "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "STRING",
    "BINSTRING", "SHORT_BINSTRING", "BINBYTES", "SHORT_BINBYTES", "EMPTY_LIST", "LIST", "APPEND", "APPENDS",
    "EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_DICT", "DICT", "SETITEM",
    "SETITEMS", "PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE", "GET", "BINGET", "LONG_BINGET",
}  # fmt: skip
_TUPLES = {"EMPTY_TUPLE", "TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "EMPTY_LIST", "LIST", "EMPTY_DICT", "DICT"}
_KEEP = {"PUT", "BINPUT", "LONG_BINPUT"}


class _MappingUnpickler(pickle.Unpickler):
    """Loads a dict of integers and strings inside a 0-d object array; refuses functions that this does not need."""

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) in _ADMITTED:
            return _ADMITTED[module, name]
        raise pickle.UnpicklingError(f"it asks for {module}.{name}, which a dict of labels never needs")


def _refuse_operations(content: bytes) -> None:
    """Raise UnpicklingError for operations that a dict of labels never needs. They are looked at and not run."""
    containers: set[int] = set()  # places in the pickle's memory that hold a tuple, a list or a dict
    place, before, n_again = 0, "", 0
    for operation, argument, _ in pickletools.genops(content):
        if operation.name not in _OPERATIONS:
            raise pickle.UnpicklingError(f"it has {operation.name}, which a dict of labels never needs")
        if operation.name in _KEEP or operation.name == "MEMOIZE":
            number = place if argument is None else int(argument)
            if number > len(content):
                raise pickle.UnpicklingError(f"it asks for {number} places")
            place += 1
            if before in _TUPLES:
                containers.add(number)
        if operation.name in ("GET", "BINGET", "LONG_BINGET") and int(argument or 0) in containers:
            n_again += 1  # one inside the other, each twice, would be 2^n items
        if n_again > _MOST_AGAIN:
            raise pickle.UnpicklingError("it has parts inside each other, which a dict of labels never needs")
        before = operation.name


def read_mapping(path: Path) -> dict[int, str]:
    """{label: ROI name} from a .npy file with a pickled dict; nothing that the file contains is run.

    Raises DataError for a file that is not such a dict, or whose pickle asks for any function.
    """
    try:
        if (size := regular_status(path).st_size) > _MAX_MAPPING_BYTES:
            raise ValueError(f"it has {size} bytes")
        with io.BytesIO(path.read_bytes()) as file:  # in which no length can be more than there is
            version = np.lib.format.read_magic(file)
            read_header = (
                np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
            )
            shape, _, dtype = read_header(file)
            if shape != () or dtype.kind != "O":
                raise ValueError(f"it is an array of {dtype}, shape {shape}")
            _refuse_operations(file.getvalue()[file.tell() :])
            mapping = _MappingUnpickler(file).load().items[0]
            return {_label(label): _name(name) for label, name in mapping.items()}
    except FileNotFoundError as error:
        raise DataError(path, expected="the names of the labels", found="no file", remedy="copy it again") from error
    except _NOT_A_MAPPING as error:
        raise DataError(
            path,
            expected="a pickled dict of labels and ROI names",
            found=f"something else ({first_line(error)})",
            remedy="nothing in it was run; get the file from the challenge again",
        ) from error


def _label(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError(f"a label is of the type {type(value).__name__}, and not an integer")
    return value


def _name(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"a name is of the type {type(value).__name__}, and not a string")
    return value


def class_order(name: str) -> tuple[int, str]:
    """Sort key by which ROI classes come in the order of reports."""
    return (CLASSES.index(name) if name in CLASSES else len(CLASSES), name)
