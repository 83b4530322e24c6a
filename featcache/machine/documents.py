"""JSON that is written and read again: bounded, of the types that are expected, and as it was written.

A document that featcache writes ends with a digest of its content and of the file's name, so that a changed or
exchanged one is noticed. Those of earlier versions have none; they are read by their types alone.
"""

import json
import re
import struct
import tokenize
import zipfile
import zlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from hashlib import blake2b
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_type_hints

import msgspec

from featcache.errors import first_line
from featcache.machine.files import replace_bytes, small_bytes

T = TypeVar("T")

DIGEST = "digest"  # name of the digest among the names of a document
Count = Annotated[int, msgspec.Meta(ge=0, le=2**62)]
Id = Annotated[int, msgspec.Meta(ge=-(2**63), le=2**63 - 1)]  # of an image
HexDigest = Annotated[str, msgspec.Meta(pattern="^[0-9a-f]{32}$")]
DAMAGED_NPZ = (  # what NumPy and zipfile raise on a .npz file that is missing or damaged
    OSError,
    ValueError,
    LookupError,
    EOFError,
    TypeError,
    AttributeError,
    RuntimeError,
    ArithmeticError,
    MemoryError,
    SyntaxError,
    tokenize.TokenError,
    zipfile.BadZipFile,
    zlib.error,
    struct.error,
)
_MOST_BYTES = 1 << 30  # an index of a million images takes a quarter of it
_MOST_DEPTH = 64
_LONG_NUMBER = re.compile(rb"[0-9]{19}")
_LARGEST = 2**63


class DocumentError(ValueError):
    """JSON that cannot be read, or is not what was written. Whoever knows whose it is says so, and what to do."""


def read_json(path: Path) -> Any:
    """The JSON of a file: a regular file of at most 2^30 bytes, 64 levels and integers of 64 bits.

    Raises DocumentError for another, OSError for one that is not regular or cannot be opened.
    """
    return parse_json(small_bytes(path, _MOST_BYTES))


def parse_json(text: bytes | str) -> Any:
    """The JSON of a text, bounded as that of `read_json`. Raises DocumentError."""
    raw = text.encode() if isinstance(text, str) else text
    try:
        content = json.loads(raw, parse_int=_bounded if _LONG_NUMBER.search(raw) else None)
    except RecursionError as error:
        raise DocumentError("it is nested too deeply") from error
    except ValueError as error:  # not JSON, or not text
        raise DocumentError(f"it is no JSON: {first_line(error)}") from error
    level = [content]
    for _ in range(_MOST_DEPTH):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return content
    raise DocumentError("it is nested too deeply")


def _bounded(digits: str) -> int:
    number = int(digits) if len(digits) < 64 else _LARGEST
    if not -_LARGEST <= number < _LARGEST:
        raise DocumentError(f"it has the number {digits[:24]}, which is too large")
    return number


def write_document(path: Path, content: Mapping[str, Any]) -> None:
    """Write a document with its digest, whole or not at all, and have it on the disk before returning."""
    replace_bytes(path, json.dumps(sealed(path.name, content)).encode())


def read_document(path: Path, kind: type[T]) -> T:
    """Read a document that `write_document` wrote, or an earlier version without a digest.

    kind : of its content: a msgspec.Struct, a dataclass, or a type such as dict[str, list[int]]

    Raises FileNotFoundError or another OSError, and DocumentError for one of other types or another digest.
    """
    return typed(unsealed(path.name, read_json(path)), kind)


def is_sealed(path: Path) -> bool:
    """Whether a document has a digest. Raises as `read_json`."""
    document = read_json(path)
    return isinstance(document, dict) and DIGEST in document


def sealed(name: str, content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of a document, as JSON has it, with its digest. name : of its file"""
    plain = json.loads(json.dumps(content))
    return {**plain, DIGEST: _digest(name, plain)}


def unsealed(name: str, document: Any) -> Any:
    """The content of a document without its digest. Raises DocumentError for one that is not what was written."""
    if not isinstance(document, dict) or DIGEST not in document:
        return document
    content = {key: value for key, value in document.items() if key != DIGEST}
    if document[DIGEST] != _digest(name, content):
        raise DocumentError("it is not what was written")
    return content


def _digest(name: str, content: Any) -> str:
    text = json.dumps([name, content], sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).hexdigest()


def typed(content: Any, kind: type[T]) -> T:
    """JSON content as a type: a msgspec.Struct, a dataclass or a type of the library. Raises DocumentError."""
    try:
        return msgspec.convert(content, kind)
    except msgspec.ValidationError as error:
        raise DocumentError(f"it is of another form ({first_line(error)})") from error


def of_its_types(instance: T) -> T:
    """The dataclass instance itself, whose values are of the types that its fields declare. Raises DocumentError.

    Fields that are dataclasses themselves are left to them.
    """
    kind: Any = type(instance)
    for name, hint in _hints(kind).items():
        value = getattr(instance, name)
        if not is_dataclass(value):
            try:
                msgspec.convert(value, hint)
            except msgspec.ValidationError as error:
                raise DocumentError(f"{name} is of another type ({first_line(error)})") from error
    return instance


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind, include_extras=True)
    return {field.name: _plain(hints[field.name]) for field in fields(kind)}


def _plain(hint: Any) -> Any:
    """The hint without the dataclasses of a union, which msgspec cannot tell apart."""
    options = getattr(hint, "__args__", ())
    if any(is_dataclass(option) for option in options):
        rest = [option for option in options if not is_dataclass(option)]
        return rest[0] if len(rest) == 1 else Any
    return Any if is_dataclass(hint) else hint
