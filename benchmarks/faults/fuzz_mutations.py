"""Hostile forms of a valid file: of its bytes, and of what its format is made of."""

import contextlib
import copy
import gzip
import io
import json
import os
import pickle
import random
import re
import struct
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

DEEP = 40_000  # levels of nesting
_DEEP_MARK = "@deep@"
INTEGERS = (0, 1, -1, 7, 127, 255, 65_535, 2**31 - 1, 2**31, 2**32, 2**62, 2**63 - 1, 2**63, -(2**63), 2**64, 10**30)
TEXTS = (
    "",
    " ",
    "\x00",
    "a\x00b",
    "٣",
    "१२",
    "²",
    "nan",
    "inf",
    "-inf",
    "1e400",
    "../../x",
    "/dev/zero",
    "." * 300,
    "\u202eabc",
    "é" * 9,
    "\ud7ff",
    "9" * 5_000,
    "1_0",
    "0x10",
    "train",
    "\n\n",
    '"',
    "'",
    ",",
    ";",
    "\t",
    "#",
    "-1",
    "1e9",
    "9" * 19,
    "9" * 25,
    "{}",
    "[]",
    "None",
    "True",
)
VALUES: tuple[Any, ...] = (
    None,
    True,
    False,
    *INTEGERS,
    0.5,
    -0.0,
    1e308,
    float("nan"),
    float("inf"),
    *TEXTS,
    [],
    {},
    [[]],
    [None],
    [1, "a"],
    {"a": 1},
    {"": {}},
    _DEEP_MARK,
    [0] * 2_000,
    "x" * 300_000,
)
Mutation = Callable[[bytes, random.Random], bytes]


def of_bytes(content: bytes, rng: random.Random) -> bytes:
    """One to four changes of bytes, whatever they mean."""
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        n = len(changed)
        at = 0 if not n else rng.randrange(n) if rng.random() < 0.6 else min(rng.randrange(512), n - 1)
        size = min(rng.choice((1, 2, 4, 8, 64, 1_000)), max(n - at, 0))
        match rng.randrange(9):
            case 0 if n:
                changed[at] ^= 1 << rng.randrange(8)
            case 1 if n:
                changed[at] = rng.choice((0, 0xFF, 0x7F, 0x80, rng.randrange(256)))
            case 2:
                del changed[at:]
            case 3:
                del changed[at : at + size]
            case 4:
                changed[at:at] = changed[at : at + size]
            case 5:
                changed[at:at] = rng.randbytes(size)
            case 6:
                changed[at : at + size] = bytes(size)
            case 7:
                changed[at : at + 8] = _packed(rng)
            case _:
                changed[at : at + size] = rng.randbytes(size)
    return bytes(changed)


def _packed(rng: random.Random) -> bytes:
    """An integer from the ends of its type, as files have them."""
    kind = rng.choice("bhiqBHIQ")
    n_bits = 8 * struct.calcsize(kind)
    low, high = (0, 2**n_bits - 1) if kind.isupper() else (-(2 ** (n_bits - 1)), 2 ** (n_bits - 1) - 1)
    return struct.pack(rng.choice("<>") + kind, rng.choice((low, high, high // 2 + 1, high - 1, 0, min(high, 100_000))))


def of_text(content: bytes, rng: random.Random) -> bytes:
    """A number, a word or a line of a text is exchanged, is missing, or is there twice."""
    text = content.decode("utf-8", "surrogateescape")
    for _ in range(rng.choice((1, 1, 2))):
        pattern = rng.choice((r"-?\d+(?:\.\d+)?", r"\w+", r'"[^"]*"', r"(?m)^[^\n]*\n", r"[\[\]{},:=\"<>/]"))
        if not (found := list(re.finditer(pattern, text))):
            continue
        at = rng.choice(found)
        new = rng.choice(
            (
                str(rng.choice(INTEGERS)),
                rng.choice(TEXTS),
                "",
                at[0] * 2,
                "[" * DEEP,
                "x" * 200_000,
                rng.choice(found)[0],
                "\r",
                "\ufeff",
            )
        )
        text = text[: at.start()] + new + text[at.end() :]
    changed = text.encode("utf-8", "surrogateescape")
    return changed if rng.random() < 0.9 else changed.decode("utf-8", "replace").encode("utf-16")


def of_json(content: bytes, rng: random.Random) -> bytes:
    """A value of another type or size, a key that is missing, renamed or new, or one of 40,000 levels."""
    try:
        root = [json.loads(content)]
    except ValueError:
        return of_text(content, rng)
    for _ in range(rng.choice((1, 1, 1, 2, 3))):
        holder, key = rng.choice(list(_nodes(root)))
        action = rng.randrange(8)
        if action == 0 and holder is not root:
            del holder[key]
        elif action == 1 and isinstance(holder, dict):
            holder[rng.choice(TEXTS)] = holder.pop(key)
        elif action == 2 and isinstance(holder[key], str):
            holder[key] = of_text(holder[key].encode(), rng).decode("utf-8", "replace")
        elif action == 3 and isinstance(holder[key], int | float):
            holder[key] = rng.choice(INTEGERS)
        elif action == 4 and isinstance(holder[key], list):
            holder[key] = rng.choice((holder[key] * 2, holder[key][:-1], holder[key][::-1], [holder[key]]))
        elif action == 5 and isinstance(holder[key], dict):
            holder[key] = rng.choice((list(holder[key]), list(holder[key].values()), {**holder[key], "x": 1}))
        else:
            holder[key] = copy.deepcopy(rng.choice(VALUES))  # a list in itself would be no JSON
    level = rng.choice(('{"a":', "["))
    text = json.dumps(root[0]).replace(f'"{_DEEP_MARK}"', level * DEEP + "1" + {"[": "]"}.get(level, "}") * DEEP)
    return text.encode()


def _nodes(holder: Any) -> Any:
    """(holder, key) of every value inside; of a long list, its ends."""
    keys = list(holder) if isinstance(holder, dict) else [*range(len(holder))][:4] + [*range(len(holder))][4:][-2:]
    for key in keys:
        yield holder, key
        if isinstance(holder[key], dict | list):
            yield from _nodes(holder[key])


def of_npy(content: bytes, rng: random.Random) -> bytes:
    """A header that lies: negative rows, 2^63 of them, another type, or no header at all."""
    if not content.startswith(b"\x93NUMPY") or rng.random() < 0.25:
        return of_bytes(content, rng)
    length = struct.unpack("<H", content[8:10])[0]
    header, data = content[10 : 10 + length].decode("latin1").strip(), content[10 + length :]
    number = rng.choice((*INTEGERS, -3, 1.5, True, None, 0))
    match rng.randrange(6):
        case 0 | 1:
            sizes = re.search(r"'shape': \(([^)]*)\)", header)
            axes = [axis.strip() for axis in sizes[1].split(",") if axis.strip()] if sizes else []
            if axes:
                axes[rng.randrange(len(axes))] = repr(number)
            axes += [repr(rng.choice(INTEGERS))] * rng.choice((0, 0, 0, 1, 40))
            axes = axes if rng.random() < 0.9 else []
            header = re.sub(r"'shape': \([^)]*\)", f"'shape': ({', '.join(axes)}{',' * bool(axes)})", header)
        case 2:
            kinds = (
                "'|O'",
                "'<U4'",
                "'|V0'",
                "'<c16'",
                "'>f8'",
                "'<M8[s]'",
                "'|b1'",
                "'<f2'",
                "'|S0'",
                "'|u1'",
                "''",
                "1",
                "[('a', '<f4'), ('b', '|O')]",
                "'<f16'",
                "'|V2147483647'",
                "'<U536870911'",
                "None",
                "'<i8'",
            )
            header = re.sub(r"'descr': '[^']*'", f"'descr': {rng.choice(kinds)}", header)
        case 3:
            order = rng.choice(("True", "1", "None", "'a'"))
            header = re.sub(r"'fortran_order': \w+", f"'fortran_order': {order}", header)
        case 4:
            header = rng.choice(
                (
                    "",
                    "{}",
                    "[" * 9_000,
                    "(" * 9_000,
                    "{" * 9_000,
                    "-" * 9_000,
                    "1",
                    "f('x')",
                    "'" * 3,
                    "\x00",
                    "{'descr': '<f4'}",
                    "1" * 9_000,
                    f"{header}#",
                    f"{{**{header}}}",
                )
            )
        case _:
            header = of_text(header.encode("latin1"), rng).decode("latin1")[:60_000]
    text = header.encode("latin1", "replace") + b"\n"
    version, size = (1, "<H") if len(text) < 65_536 else (2, "<I")
    return b"\x93NUMPY" + bytes((version, 0)) + struct.pack(size, len(text)) + text + data


def of_zip(content: bytes, rng: random.Random, inner: Mutation | None = None) -> bytes:
    """A member that is changed, named otherwise, missing, or of 16 MB of zeros; or other bytes of the archive."""
    if rng.random() < 0.4:
        return of_bytes(content, rng)
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            members = [(info.filename, archive.read(info), info.compress_type) for info in archive.infolist()]
    except (zipfile.BadZipFile, OSError, EOFError):
        return of_bytes(content, rng)
    number = rng.randrange(len(members))
    name, data, how = members[number]
    match rng.randrange(8):
        case 0:
            members.append((rng.choice((name, *TEXTS[5:])), data, how))
        case 1:
            del members[number]
        case 2:
            members[number] = (name, data[:200] + _zeros(), zipfile.ZIP_DEFLATED)
        case _:
            members[number] = (name, (inner or of_bytes)(data, rng), how)
    written = io.BytesIO()
    with zipfile.ZipFile(written, "w") as archive, contextlib.suppress(ValueError, UnicodeError):
        for name, data, how in members:
            archive.writestr(name or "x", data, how, 1)
    return written.getvalue()


def _zeros() -> bytes:
    return bytes(16 << 20)


def of_pth(content: bytes, rng: random.Random) -> bytes:
    """A file of torch: its archive, and the pickle in it."""
    return of_zip(content, rng, lambda data, rng: of_pickle(data, rng) if data[:1] == b"\x80" else of_bytes(data, rng))


_SHARED = b"(K\x01K\x02tq\x01" + b"".join(b"0h%ch%c\x86q%c" % (n, n, n + 1) for n in range(1, 60))  # doubles 59 times
_OPERATIONS = (
    b"r\xff\xff\xff\x0f",
    b"\x8d" + b"\xff" * 8,
    b"\x8e" + b"\x7f" * 8,
    b"\x8b\xff\xff\xff\x7f",
    b"]" * 30_000,
    b"cos\nsystem\n",
    b"cbuiltins\neval\n",
    b"(i__main__\nx\n",
    b"\x82\x01",
    b"Px\n",
    b"\x95" + b"\xff" * 8,
    b"(" * 9_000,
    b"}]s.",
    b"}(" + _SHARED + b"K\x01s.",
    b"}" + _SHARED + b"K\x01s.",
    b"I" + b"9" * 9_000 + b"\n",
    b"h\xff",
    b"\x8f",
)


def of_pickle(content: bytes, rng: random.Random) -> bytes:
    """Operations that a pickle of this kind never needs, among its own."""
    if rng.random() < 0.4:
        return of_bytes(content, rng)
    at = rng.choice((rng.randrange(len(content) or 1), 2, max(content.rfind(b"}"), 0), max(len(content) - 1, 0)))
    new = rng.choice(_OPERATIONS) if rng.random() < 0.9 else pickle.dumps(rng.choice(VALUES), protocol=2)[2:-1]
    return content[:at] + new + content[at if rng.random() < 0.7 else at + len(new) :]


def of_mapping(content: bytes, rng: random.Random) -> bytes:
    """A .npy file with a pickle in it."""
    end = 10 + struct.unpack("<H", content[8:10])[0]
    return of_npy(content, rng) if rng.random() < 0.3 else content[:end] + of_pickle(content[end:], rng)


def of_safetensors(content: bytes, rng: random.Random) -> bytes:
    """A header of other types, shapes and places."""
    if rng.random() < 0.3 or len(content) < 8:
        return of_bytes(content, rng)
    n = struct.unpack("<Q", content[:8])[0]
    if rng.random() < 0.1:
        return struct.pack("<Q", rng.choice([one for one in INTEGERS if 0 <= one < 2**64])) + content[8:]
    header = of_json(content[8 : 8 + n].strip(), rng)
    return struct.pack("<Q", len(header)) + header + content[8 + n :]


def of_nifti(content: bytes, rng: random.Random) -> bytes:
    """A header with other axes, types, scales and places; compressed ones are packed again."""
    packed = content[:2] == b"\x1f\x8b"
    if packed and rng.random() < 0.3:
        return of_bytes(content, rng)
    changed = bytearray(gzip.decompress(content) if packed else content)
    for _ in range(rng.choice((1, 1, 2, 3))):
        at, kind, values = rng.choice(
            (
                (40 + 2 * rng.randrange(8), "<h", (0, 1, -1, 2, 7, 8, 100, 1_000, 20_000, 32_767, -32_768)),
                (70, "<h", (0, 1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 768, 1024, 1280, 1536, 1792, 2048, -1)),
                (72, "<h", (0, 1, 8, 16, 32, 64, 32_767)),
                (76 + 4 * rng.randrange(8), "<f", (0.0, -1.0, float("nan"), float("inf"), 1e38)),
                (108, "<f", (0.0, -1.0, 1.0, 351.0, 352.0, 1e30, float("nan"), float("inf"))),
                (112 + 4 * rng.randrange(2), "<f", (0.0, float("nan"), float("inf"), 1e38, -1.0)),
                (252 + 2 * rng.randrange(2), "<h", (0, 1, 4, -1, 32_767)),
                (280 + 4 * rng.randrange(12), "<f", (0.0, float("nan"), float("inf"), 1e38)),
                (0, "<i", (348, 540, 0, -1, 2**31 - 1)),
                (348, "<i", (0, 1, 2**24, -1)),
                (rng.randrange(max(len(changed) - 4, 1)), "<i", (-1, 2**31 - 1, 0)),
            )
        )
        changed[at : at + struct.calcsize(kind)] = struct.pack(kind, rng.choice(values))
    if rng.random() < 0.2:
        changed = changed[: rng.randrange(len(changed) + 1)]
    return gzip.compress(bytes(changed), 1) if packed else bytes(changed)


def of_deflated(content: bytes, rng: random.Random) -> bytes:
    """An older MATLAB file: the values under the compression of one of its arrays, or other bytes."""
    if rng.random() < 0.5 or len(content) < 140:
        return of_bytes(content, rng)
    kind, size = struct.unpack("<II", content[128:136])
    if kind != 15:
        return content[:128] + of_bytes(content[128:], rng)
    try:
        inner = zlib.decompress(content[136 : 136 + size])
    except zlib.error:
        return of_bytes(content, rng)
    changed = zlib.compress(of_bytes(inner, rng) + (_zeros() if rng.random() < 0.02 else b""))
    return content[:128] + struct.pack("<II", 15, len(changed)) + changed + content[136 + size :]


def replace_by_special(path: Path, rng: random.Random) -> None:
    """What is no file takes its place: a pipe, a folder, a device, a link to nothing, or nothing."""
    path.unlink()
    match rng.randrange(7):
        case 0:
            os.mkfifo(path)
        case 1:
            path.mkdir()
        case 2:
            path.symlink_to("/dev/zero")
        case 3:
            path.symlink_to(path.name)
        case 4:
            path.symlink_to("nowhere")
        case 5:
            path.write_bytes(b"")
        case _:
            pass
