"""Reading a feature store into a tensor against np.load of the same bytes, both from the page cache.

PYTHONPATH=. python benchmarks/store_read.py [--quick]
"""

import tempfile
from pathlib import Path

import numpy as np
import torch
from measure import Figure, options, paired, report

from featcache.cache.store import Row, create_store
from featcache.machine.memory import keep_freed_memory


def main() -> None:
    sizes = options(__doc__, images=(10000, 300), places=(7, 7), channels=(668, 64), rounds=(7, 3))
    keep_freed_memory()
    figures = []
    for dtype in ("float16", "float32"):
        n_images = sizes.images if dtype == "float16" else sizes.images // 2
        shape = (n_images, sizes.places, sizes.places, sizes.channels)
        values = np.random.default_rng(0).standard_normal(shape, dtype=np.float32).astype(dtype)
        with tempfile.TemporaryDirectory() as folder:
            store = create_store(Path(folder), "f", {}, np.arange(n_images), n_images, {"a": Row(shape[1:], dtype)}, {})
            step = store.chunk_rows("a")
            with store.writing():
                for start in range(0, n_images, step):
                    store.append({"a": values[start : start + step]})
            np.save(Path(folder) / "a.npy", values)
            size = values.nbytes
            del values

            def ours(store=store):
                return torch.from_numpy(store.read("a"))

            def plain(folder=folder):
                return torch.from_numpy(np.load(Path(folder) / "a.npy"))

            assert torch.equal(ours(), plain())
            took, theirs, ratio = paired(ours, plain, sizes.rounds)
        details = {"bytes": size, "seconds": took, "np_load_seconds": theirs}
        figures.append(Figure(f"reading a store, {size / 1e6:.0f} MB of {dtype}", "np.load", ratio, 2, details=details))
    report(figures)


if __name__ == "__main__":
    main()
