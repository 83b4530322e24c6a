"""The long table of scores: a row for each model, vertex and fold; as CSV, as Parquet, and for pandas."""

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from featcache.machine.extra import needed
from featcache.machine.files import whole_file
from heads.statistics.run import DIFFERENCES, P_VALUES, VertexScore

if TYPE_CHECKING:
    import pandas

POOLED = "all"  # the fold of an r over all images
CATEGORIES = ("subject", "surface", "roi", "model", "fold")
_NUMBERS = ("r", "noise_ceiling", "accuracy")
COLUMNS = ("subject", "surface", "vertex", "roi", "model", "fold", *_NUMBERS)


@dataclass(frozen=True, eq=False)
class Part:
    """The rows of one model, surface and fold.

    labels : {column: its one value}
    rois : numbers of names, (n_vertices,), and the names
    numbers : {column: (n_vertices,)}; NaN where there is no number
    """

    labels: dict[str, str]
    rois: tuple[np.ndarray, list[str]]
    numbers: dict[str, np.ndarray]

    def __len__(self) -> int:
        return len(self.rois[0])


def columns_of(scores: Sequence[VertexScore]) -> list[str]:
    """Names of all columns: those of p values and differences only where there are any."""
    more = [name for name in (*P_VALUES, *DIFFERENCES) if any(getattr(one, name) is not None for one in scores)]
    return [*COLUMNS, *more]


def parts_of(scores: Sequence[VertexScore]) -> Iterator[Part]:
    """The rows of a table, part by part. p values and differences are of the r over all images, and NaN for folds."""
    more = columns_of(scores)[len(COLUMNS) :]
    for one in scores:
        nothing = np.full(len(one.r), np.nan)
        ceiling = nothing if one.noise_ceiling is None else one.noise_ceiling
        for fold, r in {POOLED: one.r, **{str(fold): r for fold, r in one.of_folds.items()}}.items():
            numbers = {"r": r, "noise_ceiling": ceiling, "accuracy": one.accuracy(np.nan_to_num(r))}
            for name in more:
                values = getattr(one, name) if fold == POOLED else None
                numbers[name] = nothing if values is None else values
            labels = {"subject": one.subject, "surface": one.surface, "model": one.model, "fold": fold}
            yield Part(labels, one.rois, numbers)


def write_csv(path: Path, scores: Sequence[VertexScore]) -> int:
    """Write the table as CSV, with an empty cell for what there is none of; the number of its rows."""
    names, n_rows = columns_of(scores), 0
    with whole_file(path) as partial, partial.open("w", newline="", encoding="utf-8") as file:
        table = csv.writer(file)
        table.writerow(names)
        for part in parts_of(scores):
            roi_names = np.array(part.rois[1], dtype=object)[part.rois[0]].tolist()
            known: dict[str, Any] = {"vertex": range(len(part)), "roi": roi_names}
            known |= {name: [value] * len(part) for name, value in part.labels.items()}
            known |= {name: _cells(values) for name, values in part.numbers.items()}
            table.writerows(zip(*(known[name] for name in names), strict=True))
            n_rows += len(part)
    return n_rows


def _cells(values: np.ndarray) -> list[str]:
    return ["" if value != value else f"{value:.6g}" for value in values.tolist()]  # NaN is not itself


def write_parquet(path: Path, scores: Sequence[VertexScore]) -> int:
    """Write the table as Parquet, with null for what there is none of; the number of its rows.

    Raises ConfigError where pyarrow is missing.
    """
    pyarrow, parquet = needed("pyarrow", "Parquet files"), needed("pyarrow.parquet", "Parquet files")
    names, n_rows = columns_of(scores), 0
    text = pyarrow.dictionary(pyarrow.int32(), pyarrow.string())
    kinds = {name: text if name in CATEGORIES else pyarrow.float32() for name in names} | {"vertex": pyarrow.int32()}
    schema = pyarrow.schema([(name, kinds[name]) for name in names])
    with whole_file(path) as partial, parquet.ParquetWriter(partial, schema) as file:
        for part in parts_of(scores):
            numbers, values = part.rois
            known = {"vertex": pyarrow.array(np.arange(len(part), dtype=np.int32))}
            known["roi"] = pyarrow.DictionaryArray.from_arrays(numbers.astype(np.int32), pyarrow.array(values))
            for name, value in part.labels.items():
                codes = pyarrow.array(np.zeros(len(part), dtype=np.int32))
                known[name] = pyarrow.DictionaryArray.from_arrays(codes, pyarrow.array([value]))
            for name, of_name in part.numbers.items():
                known[name] = pyarrow.array(of_name.astype(np.float32), from_pandas=True)  # NaN is null
            file.write_table(pyarrow.table([known[name] for name in names], schema=schema))
            n_rows += len(part)
    return n_rows


def frame_of(scores: Sequence[VertexScore]) -> "pandas.DataFrame":
    """The table as a pandas DataFrame: names as categories, numbers as float32. Raises ConfigError without pandas."""
    pandas = needed("pandas", "tables of scores", "tables")
    parts, columns = list(parts_of(scores)), {}
    for name in columns_of(scores):
        if name == "vertex":
            columns[name] = np.concatenate([np.arange(len(part), dtype=np.int32) for part in parts])
        elif name in CATEGORIES:
            columns[name] = _categorical(pandas, [_coded(part, name) for part in parts])
        else:
            columns[name] = np.concatenate([part.numbers[name].astype(np.float32) for part in parts])
    return pandas.DataFrame(columns)


def _coded(part: Part, name: str) -> tuple[np.ndarray, list[str]]:
    """Numbers of names, and the names, of one column."""
    return part.rois if name == "roi" else (np.zeros(len(part), dtype=np.int32), [part.labels[name]])


def _categorical(pandas: Any, parts: Sequence[tuple[np.ndarray, list[str]]]) -> Any:
    names = list(dict.fromkeys(name for _, values in parts for name in values))
    number = {name: place for place, name in enumerate(names)}
    small = np.min_scalar_type(-max(len(names), 1))
    codes = [np.array([number[name] for name in values], dtype=small)[numbers] for numbers, values in parts]
    return pandas.Categorical.from_codes(np.concatenate(codes), names)


def explode_rois(scores: "pandas.DataFrame") -> "pandas.DataFrame":
    """The same table with a row for each ROI of a vertex, as for `groupby("roi")`; a vertex of none has one."""
    pandas = needed("pandas", "tables of scores", "tables")
    roi = scores["roi"].cat
    names = [str(name).split("+") if name else [""] for name in roi.categories]
    single = list(dict.fromkeys(name for several in names for name in several))
    lengths = np.array([len(several) for several in names])[roi.codes]
    exploded = scores.loc[scores.index.repeat(lengths)]
    place = np.arange(len(exploded)) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    numbers = np.zeros((len(names), max(map(len, names))), dtype=np.int32)
    for row, several in enumerate(names):
        numbers[row, : len(several)] = [single.index(name) for name in several]
    codes = numbers[np.repeat(roi.codes.to_numpy(), lengths), place]
    return exploded.assign(roi=pandas.Categorical.from_codes(codes, single)).reset_index(drop=True)
