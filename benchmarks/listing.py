"""Listing the stores of a work folder against opening each of them, with many small stores.

    PYTHONPATH=. python benchmarks/listing.py [--quick]

Seconds are of the processor. A list is asked for the keys of all stores, as the search for known fits does. The first
list after stores were added reads their descriptions; a later one has them from the index.
"""

import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import zarr
from measure import Figure, options, report

from featcache.cache.store import create_store, list_stores, open_store
from featcache.config import fingerprint
from featcache.machine.documents import sealed, unsealed

_SUBJECTS = 8


def write_stores(folder: Path, n_stores: int, n_images: int) -> None:
    """Stores of vectors, of which no row is written; all but the key is copied from the first."""
    key = {"kind": "predictions", "features": {"backbone": "a", "layers": ["pooled"] * 6}, "settings": {"x": 1}}
    rows, ids = {"lh": 20, "rh": 20}, np.arange(n_images)
    first = create_store(folder, "subj01", {**key, "subject": "subj01"}, ids, n_images - 10, rows, {"scores": [0.5]})
    texts = {path.relative_to(first.path): path.read_text() for path in first.path.rglob("zarr.json")}
    description = json.loads(texts[Path("zarr.json")])
    about = unsealed("zarr.json", description["attributes"]["featcache"])
    for number in range(1, n_stores):
        subject = f"subj0{number % _SUBJECTS + 1}"
        new = {**key, "subject": subject, "seed": number}
        description["attributes"]["featcache"] = sealed("zarr.json", {**about, "recipe": new})
        path = folder / f"{subject}-{fingerprint(new)}"
        for name, text in texts.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(json.dumps(description) if name == Path("zarr.json") else text)


def opened(folder: Path) -> list[object]:
    """Every store of a folder with its arrays, opened by zarr."""
    found = []
    for path in sorted(folder.glob("[!.]*")):
        group = zarr.open_group(path, mode="r", zarr_format=3)
        about = group.attrs["featcache"]
        found.append((about["recipe"], {name: group[name] for name in about["arrays"]}))
    return found


def processor_seconds(call: Callable[[], object]) -> float:
    began = time.process_time()
    call()
    return time.process_time() - began


def figures(n_stores: int, n_images: int, folder: Path) -> Figure:
    write_stores(folder / "predictions.zarr", n_stores, n_images)

    def listed() -> list[object]:
        return [store.key for store in list_stores(folder / "predictions.zarr")]

    first, again = processor_seconds(listed), processor_seconds(listed)
    one = next((folder / "predictions.zarr").glob("subj01*"))
    took = {"first": first, "again": again, "open_store": processor_seconds(lambda: open_store(one))}
    by_zarr = processor_seconds(lambda: opened(folder / "predictions.zarr"))
    return Figure(
        f"keys of {n_stores} stores of {n_images} images: times as fast",
        "opening every store with zarr",
        by_zarr / again,
        20.0,
        at_most=False,
        details={f"{what}_seconds": value for what, value in took.items()} | {"zarr_seconds": by_zarr},
    )


def main() -> None:
    sizes = options(__doc__, stores=(5000, 60), fewer_stores=(500, 50), images=(1000, 20))
    found = []
    for n_stores in (sizes.fewer_stores, sizes.stores):
        with tempfile.TemporaryDirectory() as folder:
            found.append(figures(n_stores, sizes.images, Path(folder)))
    report(found)


if __name__ == "__main__":
    main()
