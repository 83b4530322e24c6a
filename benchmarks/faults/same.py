"""Every stage gives the same answer again: the same bytes, and nearly the same numbers on other settings.

    PYTHONPATH=. python benchmarks/faults/same.py [--seed 0] [--n 1] [--stages simulate,extract,...] [--only ...]

Each stage is run n more times as it was: all its files must have the same bytes, but for those that tell times. Then it
is run with settings that should only change how fast it is: batch size, number of workers, memory that it may take,
number of threads. Features, predictions, heads, weights of checkpoints and tables must then agree with those of the
first run within TOLERANCE of the largest number of their array, and have the same names.

Training by gradients with another number of threads is no such case: sums are rounded otherwise, and AdamW makes a
whole step of a gradient near 0, whatever its sign. There, all numbers of a file must agree within TRAINED of their
norm.
"""

import json
import re
import zipfile
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import stages
import torch
import zarr
from safetensors.numpy import load_file
from stages import Room

# Of float16 stores: one step of rounding is 2^-11 of a number. Training adds up rounding over its steps.
TOLERANCE = 2e-3
TRAINED = 0.25  # in two epochs on 24 images, which is the worst of cases: docs/reliability.md has a real one
BY_GRADIENTS = ("pretrain", "finetune", "fit-adamw", "fit-spatial", "fit-joint", "fit-core")

_FITS = tuple(name for name in stages.STAGES if name.startswith("fit-"))
# {what: (stages, options)}; memory in GB, which is so little that blocks are the smallest that are taken
VARIANTS: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "batch size": (("extract", "extract-trained", "predict"), ("--batch-size", "5")),
    "workers": (("import", "extract", "extract-trained", "pretrain", "finetune", "predict"), ("--workers", "3")),
    "simulate workers": (("simulate",), ("--workers", "2")),
    "no image cache": (("extract-trained",), ("--image-cache", "0")),
    "memory": ((*_FITS, "compare"), ("--max-memory", "0.9")),
    "threads": (tuple(name for name in stages.STAGES if name not in ("simulate", "report")), ()),
}


def numbers(folder: Path) -> dict[str, np.ndarray]:
    """{file and array: its numbers} of everything that stages compute."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.rglob("*")):
        name = str(path.relative_to(folder))
        if "/index/" in name or "/." in name or name.endswith(("responses.npy", "report.html")):
            continue
        if path.name == "zarr.json" and json.loads(path.read_text())["node_type"] == "array":
            found[name] = np.asarray(zarr.open_array(path.parent, mode="r")[...])
        elif path.suffix == ".safetensors":
            found |= {f"{name}: {key}": values for key, values in load_file(path).items()}
        elif path.suffix in (".npy", ".npz"):
            loaded = np.load(
                path, allow_pickle=True
            )  # the challenge's names of ROIs are pickled; these are our own files
            arrays = {"": loaded} if isinstance(loaded, np.ndarray) else dict(loaded)
            arrays = {key: values for key, values in arrays.items() if values.dtype.kind in "biuf"}
            found |= {f"{name}: {key}": values for key, values in arrays.items()}
        elif path.suffix == ".csv":
            words = re.split(r"[,\n]", path.read_text())
            found[name] = np.array([float(word) for word in words if re.fullmatch(r"-?\d+\.\d+(e-?\d+)?", word)])
        elif path.suffix == ".zip":
            with zipfile.ZipFile(path) as archive:
                found |= {f"{name}: {one}": np.load(archive.open(one)) for one in archive.namelist()}
    return found


def largest_difference(here: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The largest difference of two numbers, as a fraction of the largest number of their array, and where it is.

    Infinite where arrays are missing, or of other shapes or types of numbers.
    """
    if here.keys() != wanted.keys():
        return float("inf"), f"files: {sorted(here.keys() ^ wanted.keys())[:2]}"
    worst = (0.0, "")
    for name, values in wanted.items():
        other = here[name]
        if values.shape != other.shape or values.dtype != other.dtype:
            return float("inf"), name
        if values.dtype.kind != "f":
            apart = float("inf") if (values != other).any() else 0.0
        else:
            a, b = values.astype(np.float64), other.astype(np.float64)
            if (np.isfinite(a) != np.isfinite(b)).any():
                return float("inf"), name
            scale = np.abs(a[np.isfinite(a)]).max(initial=0)
            apart = float(np.nanmax(np.abs(a - b), initial=0) / scale) if scale else float(np.abs(b).max(initial=0))
        worst = max(worst, (apart, name))
    return worst


def apart_in_norm(here: Mapping[str, np.ndarray], wanted: Mapping[str, np.ndarray]) -> tuple[float, str]:
    """The norm of all differences in a file, as a fraction of the norm of its numbers, where that is largest.

    Infinite where arrays are missing, or of other shapes or types of numbers.
    """
    if here.keys() != wanted.keys() or any(here[name].shape != wanted[name].shape for name in wanted):
        return float("inf"), "names and shapes"
    files: dict[str, list[float]] = {}
    for name, values in wanted.items():
        if values.dtype.kind == "f":
            a, b = values.astype(np.float64), here[name].astype(np.float64)
            sums = files.setdefault(name.partition(": ")[0], [0.0, 0.0])
            sums[0] += float(np.nansum((a - b) ** 2))
            sums[1] += float(np.nansum(a**2))
    return max(((apart / size) ** 0.5 if size else apart, name) for name, (apart, size) in files.items())


def again(room: Room, stage: str, *more: str, threads: int = 1) -> str | None:
    """Run a stage once more on what it found; what it says if it fails."""
    room.restore(room.before(stage))
    line = list(stages.STAGES[stage])
    for name, value in zip(more[::2], more[1::2], strict=True):
        if name in line:
            line[line.index(name) + 1] = value
        else:
            line += [name, value]
    ended = room.run(stage, arguments=line, hurt=lambda: torch.set_num_threads(threads))
    return None if ended.code == 0 else f"exit code {ended.code}: {ended.last}"


def main() -> int:
    given = stages.options(__doc__, n=1)
    counts: Counter[str] = Counter()
    worst: dict[str, tuple[float, str]] = {}
    with stages.built(given.stages) as (room, _):
        for stage in given.only:
            for _ in range(given.n):
                failed = again(room, stage)
                counts["run again"] += 1
                wrong = {
                    "bytes": [
                        path
                        for path, data in stages.contents(room.after(stage), exact=True).items()
                        if stages.contents(room.case, exact=True).get(path) != data
                    ]
                }
                if failed or wrong["bytes"]:
                    counts["other bytes"] += 1
                    print(f"{stage}, again: {failed or stages.some(wrong)}", flush=True)
            for what, (those, options) in VARIANTS.items():
                if stage not in those:
                    continue
                counts["other settings"] += 1
                failed = again(room, stage, *options, threads=2 if what == "threads" else 1)
                trained = what == "threads" and stage in BY_GRADIENTS
                compared = apart_in_norm if trained else largest_difference
                apart, where = compared(numbers(room.case), numbers(room.after(stage)))
                what = f"{what}, trained by gradients" if trained else what
                worst[what] = max(worst.get(what, (0.0, "")), (apart, f"{stage}, {where}"))
                if failed or apart > (TRAINED if trained else TOLERANCE):
                    counts["other numbers"] += 1
                    print(f"{stage}, {what}: {failed or f'{apart:.2g} in {where}'}", flush=True)
    for what, (apart, where) in worst.items():
        print(f"{what}: at most {apart:.2g} apart{f', in {where}' if where else ''}")
    print(", ".join(f"{what} {n}" for what, n in counts.items()))
    return 1 if counts["other bytes"] or counts["other numbers"] else 0


if __name__ == "__main__":
    raise SystemExit(main())
