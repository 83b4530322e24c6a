"""Tables of text: CSV, TSV and Parquet, as columns with names."""

import csv
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from featcache.errors import DataError, some_of
from featcache.formats.files import reading, regular_file
from featcache.formats.lazy import Place, in_memory
from featcache.machine.extra import needed

_DELIMITERS = ",;\t"
_N_COLUMNS_SHOWN = 20
_CELL = 60  # bytes of a Python text in a tuple


@dataclass(frozen=True)
class Table:
    """Columns of a table, each of as many cells of text as the table has rows; a missing cell is ''."""

    path: Path
    columns: dict[str, tuple[str, ...]]

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def column(self, name: str) -> tuple[str, ...]:
        """Cells of a column. Raises DataError where there is none of that name."""
        if name in self.columns:
            return self.columns[name]
        lower = {other.lower(): other for other in self.columns}
        near = get_close_matches(name.lower(), lower, n=1)
        raise DataError(
            self.path,
            expected=f"a column {name!r}",
            found=f"the columns {some_of(list(self.columns), _N_COLUMNS_SHOWN)}",
            remedy=f"did you mean {lower[near[0]]!r}?" if near else "name one of these",
        )


def read_table(path: Path | str) -> Table:
    """Table of a .csv, .tsv or .parquet file, which fits into memory.

    Text is UTF-8, with or without a byte order mark, and the first row names the columns; cells of a .csv are separated
    by commas, semicolons or tabs, whichever the first row has most of. Blank lines are left out. Numbers of a Parquet
    file that are whole have no '.0', whatever their type, so that 13 is the same in all formats.

    Raises DataError for a file that cannot be read, columns without a name or with the same one, rows of unequal
    length, and a table without rows; ConfigError where pyarrow is missing.
    """
    path = Path(path)
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet"):
        raise DataError(
            path,
            expected="a table, .csv, .tsv or .parquet",
            found=repr(suffix) if os.path.exists(path) else "another ending, and no such file",
            remedy="save it as one of these",
        )
    regular_file(path)
    in_memory(Place(path), 10 * path.stat().st_size, "a .npy file or Zarr store")  # cells are Python texts
    names, columns = _parquet(path) if suffix == ".parquet" else _text(path)
    _refuse_names(path, names)
    if not columns or not columns[0]:
        raise DataError(path, expected="rows below the names of the columns", found="none", remedy="copy it again")
    return Table(path, dict(zip(names, columns, strict=True)))


def column_names(path: Path) -> list[str]:
    """Names in the first row of a .csv, .tsv or .parquet file; () of a file that is none, or cannot be read."""
    suffix = path.suffix.lower()
    if suffix not in (".csv", ".tsv", ".parquet") or not path.is_file():
        return []
    if suffix == ".parquet":
        with reading(path, "a Parquet file"):
            return list(needed("pyarrow.parquet", "Parquet files").read_schema(path).names)
    with reading(path, "a table of text"), open(path, encoding="utf-8-sig", errors="replace", newline="") as file:
        line = file.readline(1_000_000)
        return [name.strip() for name in next(csv.reader([line], delimiter=delimiter_of(path, line)), [])]


def delimiter_of(path: Path, first_line: str) -> str:
    """What separates the cells of a text file: a tab in a .tsv, and in others what the first line has most of."""
    if path.suffix.lower() == ".tsv":
        return "\t"
    return max(_DELIMITERS, key=lambda sign: len(next(csv.reader([first_line], delimiter=sign), [])))


def _text(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    with reading(path, "a table of text"), open(path, encoding="utf-8-sig", newline="") as file:
        try:
            delimiter = delimiter_of(path, file.readline())
            file.seek(0)
            lines = csv.reader(file, delimiter=delimiter, skipinitialspace=True, strict=True)
            names = [name.strip() for name in next(lines, [])]
            rows = [_whole_row(path, lines.line_num, row, names) for row in lines if row]
        except UnicodeDecodeError as error:
            raise DataError(
                path,
                expected="text in UTF-8",
                found=f"another encoding ({error.reason} at byte {error.start})",
                remedy="save the table as UTF-8",
            ) from error
    return names, list(zip(*rows, strict=True))


def _whole_row(path: Path, line: int, row: Sequence[str], names: Sequence[str]) -> Sequence[str]:
    if len(row) == len(names):
        return row
    raise DataError(
        path,
        expected=f"{len(names)} cells in every row, one for each column",
        found=f"{len(row)} in line {line}",
        remedy="correct the line, or put cells that have the separator in them between double quotes",
    )


def _refuse_names(path: Path, names: Sequence[str]) -> None:
    """Raise DataError where a column has no name, or two have the same."""
    expected = "a name of its own for every column, in the first row"
    twice = [name for name, count in Counter(names).items() if count > 1 and name]
    if not names or "" in names:
        column = f"column {names.index('') + 1} without one" if names else "no column"
        remedy = "name it, or save the table without the index of its rows"
        raise DataError(path, expected=expected, found=column, remedy=remedy)
    if twice:
        raise DataError(path, expected=expected, found=f"two of the name {twice[0]!r}", remedy="rename one of them")


def _parquet(path: Path) -> tuple[list[str], list[tuple[str, ...]]]:
    parquet = needed("pyarrow.parquet", "Parquet files")
    with reading(path, "a Parquet file"):
        file = parquet.ParquetFile(path)
        groups = [file.metadata.row_group(group) for group in range(file.metadata.num_row_groups)]
        n_cells = rows_of_parquet(file) * file.metadata.num_columns
        in_memory(Place(path), 10 * sum(group.total_byte_size for group in groups) + _CELL * n_cells, "a .npy file")
        # of texts that repeat, each is held once, as in the file
        texts = [one.name for one in file.schema_arrow if str(one.type) in ("string", "large_string")]
        table = parquet.ParquetFile(path, read_dictionary=texts).read()
        columns = [_column(path, *column) for column in zip(table.column_names, table.columns, strict=True)]
    return list(table.column_names), columns


def rows_of_parquet(file: Any) -> int:
    """Rows of a Parquet file, by its own count or by those of its groups, whichever is more."""
    groups = (file.metadata.row_group(group).num_rows for group in range(file.metadata.num_row_groups))
    return max(int(file.metadata.num_rows), sum(map(int, groups)))


def _column(path: Path, name: str, column: Any) -> tuple[str, ...]:
    cells: list[str] = []
    for chunk in column.chunks:
        if not hasattr(chunk, "dictionary"):
            cells += [_cell(path, name, value) for value in chunk.to_pylist()]
            continue
        known = [_cell(path, name, value) for value in chunk.dictionary.to_pylist()]
        cells += ["" if number is None else known[number] for number in chunk.indices.to_pylist()]
    return tuple(cells)


def _cell(path: Path, column: str, value: Any) -> str:
    """Text of one value: '' for a missing one, and '13' for 13.0."""
    if value is None or value != value:  # NaN
        return ""
    if isinstance(value, float) and value.is_integer():
        return str(int(value))
    if isinstance(value, bytes | list | dict):
        raise DataError(
            path,
            expected=f"text or numbers in column {column!r}",
            found={bytes: "bytes", list: "lists", dict: "records"}[type(value)],
            remedy="save the table without this column",
        )
    return str(value)
