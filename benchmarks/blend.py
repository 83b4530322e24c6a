"""Weights of a blend of 20 models at full size against reading their predictions once, and the memory it takes.

    PYTHONPATH=. python benchmarks/blend.py [--quick]

Predictions are in float16, as `fit-heads` stores them; `--bits 32` has them in float32, which takes twice as long to
read. Responses and stores are written by another process, so that the memory is the blend's alone. It does not grow
with the images: rows are read batch by batch.
"""

import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from measure import Figure, options, paired, peak_gb, report

from featcache.cache.store import Row, create_store, open_store
from featcache.dataset.algonauts import response_files
from featcache.dataset.subject import Images, Subject
from featcache.machine.memory import keep_freed_memory
from heads.blend.models import Model
from heads.blend.subject import blend_subject
from heads.config import BlendConfig

_N_TEST = 32


def hemispheres(n_vertices: int) -> dict[str, slice]:
    left = round(n_vertices * 19_004 / 39_548)
    return {"lh": slice(0, left), "rh": slice(left, n_vertices)}


def write(folder: Path, n_images: int, n_vertices: int, n_models: int, bits: int = 16) -> None:
    """Models that know the same half of the responses and differ in their noise, in float16 if not told otherwise."""
    rng = np.random.default_rng(0)
    path = folder / "training_split" / "training_fmri"
    path.mkdir(parents=True)
    signal = rng.standard_normal((n_images + _N_TEST, n_vertices), dtype=np.float32)
    responses = (signal + rng.standard_normal(signal.shape, dtype=np.float32))[:n_images]
    parts = hemispheres(n_vertices)
    for hemisphere, columns in parts.items():
        np.save(path / f"{hemisphere}_training_fmri.npy", responses[:, columns])
    rows = {hemisphere: Row((columns.stop - columns.start,), f"float{bits}") for hemisphere, columns in parts.items()}
    unread = {"images": "", "image_ids": "", "transform": {}, "dtype": "float32"}
    for model in range(n_models):
        key = {
            "subject": "subj01",
            "features": {"backbone": f"m{model}", "layers": ["pooled"], "fold": None} | unread,
            **{"responses": "", "head": "linear", "solver": "exact", "objective": "ridge", "n_folds": 5, "seed": 0},
        }
        facts = {"model": f"m{model}", "features": f"m{model}"}
        store = create_store(folder / "stores", f"m{model}", key, np.arange(len(signal)), n_images, rows, facts)
        predictions = signal + (1 + model / n_models) * rng.standard_normal(signal.shape, dtype=np.float32)
        step = store.chunk_rows("lh")
        with store.writing():
            for start in range(0, len(predictions), step):
                some = predictions[start : start + step]
                store.append({hemisphere: some[:, columns] for hemisphere, columns in parts.items()})


def main() -> None:
    if sys.argv[1:2] == ["--write"]:
        write(Path(sys.argv[2]), *json.loads(sys.argv[3]))
        return
    sizes = options(__doc__, images=(3936, 200), vertices=(39548, 500), models=(20, 4), bits=(16, 16), rounds=(3, 1))
    keep_freed_memory()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        shape = [sizes.images, sizes.vertices, sizes.models, sizes.bits]
        subprocess.run([sys.executable, __file__, "--write", name, json.dumps(shape)], check=True)
        stores = sorted((open_store(path) for path in (folder / "stores").iterdir()), key=lambda one: one.name)
        train = Images((folder,) * sizes.images, np.arange(sizes.images))
        test = Images((folder,) * _N_TEST, np.arange(sizes.images, sizes.images + _N_TEST))
        widths = {h: columns.stop - columns.start for h, columns in hemispheres(sizes.vertices).items()}
        ceiling = {h: np.full(n, 0.5) for h, n in widths.items()}
        subject = Subject("subj01", train, test, response_files(folder), widths, {h: {} for h in widths}, ceiling, {})
        step = 2 * stores[0].chunk_rows("lh")

        def read() -> None:
            for hemisphere in widths:
                for store in stores:
                    for start in range(0, sizes.images, step):
                        store.read(hemisphere, start, min(start + step, sizes.images))

        models = [Model.from_store(store) for store in stores]

        def blend() -> None:
            blend_subject(subject, models, BlendConfig(), accuracy=True)

        read()
        ours, theirs, ratio = paired(blend, read, sizes.rounds)
    details = {key: value for key, value in vars(sizes).items() if key != "quick"}
    what = f"blend of {sizes.models} models, {sizes.images:,} x {sizes.vertices:,}"
    report(
        [
            Figure(
                f"{what}: weights per vertex, nested scores, interval and null",
                "the same predictions read once from their stores",
                ratio,
                5,
                details=details | {"seconds": ours, "read_seconds": theirs},
            ),
            Figure(f"{what}: peak memory, 10^9 bytes", "nothing: it is no ratio", peak_gb(), 4),
        ]
    )


if __name__ == "__main__":
    main()
