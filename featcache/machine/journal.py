"""A journal of commands: a file with one JSON object a line, which only grows.

A record is written with one call in append mode, so that records of several processes stay apart. What a full disk cuts
off stays one unreadable line, which readers leave out: the next record starts a line of its own.
"""

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from featcache.machine.documents import DocumentError, parse_json


def append(path: Path, record: Mapping[str, Any]) -> bool:
    """Add one record; whether it could be written. A journal that cannot be kept fails no command."""
    line = f"{json.dumps(record, default=str)}\n".encode()
    with suppress(OSError):
        file = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o666)
        try:
            torn = (size := os.fstat(file).st_size) and os.pread(file, 1, size - 1) != b"\n"
            whole = b"\n" + line if torn else line
            return os.write(file, whole) == len(whole)
        finally:
            os.close(file)
    return False


def read(path: Path) -> list[dict[str, Any]]:
    """Every record that is whole, oldest first; none where there is no journal."""
    if not path.is_file():  # a pipe would wait for ever
        return []
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return []
    records = []
    for line in lines:
        with suppress(DocumentError):  # torn, or not text
            if isinstance(record := parse_json(line), dict):
                records.append(record)
    return records
