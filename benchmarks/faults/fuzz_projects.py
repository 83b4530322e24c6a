"""Readers of datasets, networks and work folders, with small valid files for them."""

import json
import os
import random
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_mutations as m
import google_crc32c
import numpy as np
import torch
from fuzz_reader import Reader, of_npz, place_of
from PIL import Image

from featcache.backbone import checkpoint, outline, weights
from featcache.backbone.sources import hf_hub, own_code
from featcache.cache import elsewhere
from featcache.cache.store import list_stores, open_store
from featcache.config import BackboneConfig, LayerConfig
from featcache.dataset.digests import file_digest
from featcache.dataset.folder import about_subject, scan_folder
from featcache.dataset.identity import remembered
from featcache.dataset.image_lists import ImageList
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from featcache.dataset.open import open_dataset, scan_dataset
from featcache.dataset.responses import refuse_unfit, response_fault
from featcache.dataset.rois import read_mapping
from featcache.dataset.split_files import read_split
from featcache.dataset.subject import Dataset, refuse_faults
from featcache.formats.lazy import rows_of
from featcache.machine.documents import sealed, write_document
from heads.blend.saved import load_blend, load_nested
from heads.encoder.folder import DESCRIPTION, load_encoder
from heads.modules.readout import HeadKind, InFile, SavedHeads
from heads.statistics.sources import find_scored

_ROOT = Path(__file__).resolve().parents[2]
SHARED = "FEATCACHE_FUZZ_SHARED"  # names the folder that workers share
_N, _VERTICES = 6, 4


def _run(*arguments: object) -> None:
    """A command of the project, in a process of its own."""
    command = [sys.executable, str(_ROOT / "cli.py"), *map(str, arguments), "--quiet"]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": str(_ROOT)})
    if done.returncode:
        raise RuntimeError(f"{' '.join(command)}: {done.stderr[-2_000:]}")


def _tree() -> Path:
    """A simulated tree, which workers share."""
    tree = Path(os.environ[SHARED]) / "data"
    if not tree.is_dir():
        sizes = ("--images", 40, "--test-images", 5, "--shared", 8, "--vertices", 100, "--image-size", 32)
        _run("simulate", "--data", tree, "--subjects", 1, "--workers", 1, *sizes)
        for path in (tree / "subj01/roi_masks").glob("*_fsaverage_space.npy"):
            path.unlink()  # large, and slow to read
    return tree


def _read_dataset(root: Path) -> None:
    dataset, faults = scan_dataset(root)
    refuse_faults(faults)
    for subject in dataset.subjects:
        for surface in subject.surfaces:
            np.asarray(subject.responses(surface)[:2])
            response_fault(subject.response_paths[surface])


def datasets(folder: Path) -> Iterator[Reader]:
    root, tree = place_of(folder, "tree"), _tree()
    masks = tree / "subj01/roi_masks"
    shutil.copytree(tree, root, dirs_exist_ok=True)
    names = {
        str(path.relative_to(root)): [m.of_npy] for path in sorted(root.rglob("*.npy")) if "mapping" not in path.name
    }
    yield Reader("tree", root, names, lambda path: _read_dataset(root))
    labels = place_of(folder, "label-names")
    for path in masks.glob("mapping_*.npy"):
        shutil.copy(path, labels)
    np.save(labels / "of-numpy.npy", {np.int64(1): "V1", np.int64(2): "V2"}, allow_pickle=True)
    yield Reader("label names", labels, {path.name: [m.of_mapping] for path in sorted(labels.iterdir())}, read_mapping)
    yield _imported(folder)
    yield _split(folder, open_dataset(tree))
    yield _importing(folder)
    yield _nsd(folder)


def _lab(root: Path) -> dict[str, Any]:
    """Files of a lab of six images: options of `import`."""
    rng = np.random.default_rng(0)
    (root / "images").mkdir(exist_ok=True)
    for n in range(_N):
        Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).save(root / f"images/{n:02d}.png")
    np.save(root / "responses.npy", rng.normal(size=(_N, _VERTICES)).astype(np.float32))
    np.save(root / "ceiling.npy", np.full(_VERTICES, 0.5, np.float32))
    (root / "rois.csv").write_text("V1,area\n1,a\n0,b\n1,a\n0,none\n")
    rows = "".join(f"{n:02d}.png,{n + 5},train,s{n % 2},{n}\n" for n in range(_N))
    (root / "table.csv").write_text("image,nr,part,run,x\n" + rows)
    columns = {"id_column": "nr", "split_column": "part", "session_column": "run"}
    return {
        "table": root / "table.csv",
        "images": str(root / "images"),
        "responses": (f"V4={root / 'responses.npy'}",),
        "ceiling": (f"V4={root / 'ceiling.npy'}",),
        "roi": (f"V4={root / 'rois.csv'}",),
        **columns,
    }


def _importing(folder: Path) -> Reader:
    root = place_of(folder, "import")
    config = ImportConfig(**_lab(root))
    kinds = {"responses.npy": [m.of_npy], "ceiling.npy": [m.of_npy], "rois.csv": [m.of_text], "table.csv": [m.of_text]}
    return Reader("import", root, kinds, lambda path: read_material(config))


def _nsd(folder: Path) -> Reader:
    """A small copy of the Natural Scenes Dataset, as the tests make it."""
    sys.path.insert(0, str(_ROOT / "tests"))
    from support.nsd import SUBJECT, build_nsd

    root = place_of(folder, "nsd")
    build_nsd(root)
    config = ImportConfig(nsd=root, subject=str(SUBJECT))
    kinds = {
        ".hdf5": [m.of_bytes],
        ".mat": [m.of_deflated],
        ".gz": [m.of_nifti],
        ".mgz": [m.of_bytes],
        ".mgh": [m.of_bytes],
        ".ctab": [m.of_text, m.of_bytes],
    }
    names = {
        str(path.relative_to(root)): kinds[path.suffix] for path in sorted(root.rglob("*")) if path.suffix in kinds
    }

    def read(path: Path) -> None:
        for recording in read_material(config).recordings.values():
            rows_of(recording.trials, np.array([len(recording.trials) - 1, 0]))

    return Reader("nsd", root, names, read)


def _imported(folder: Path) -> Reader:
    from featcache.dataset.importing.run import import_files

    lab = folder / "lab"
    lab.mkdir(exist_ok=True)
    import_files(ImportConfig(**_lab(lab)), folder / "folder", 1)
    root = folder / "folder/dataset"
    kinds = {".json": [m.of_json, m.of_bytes], ".csv": [m.of_text, m.of_bytes], ".npy": [m.of_npy]}
    names = {str(p.relative_to(root)): kinds[p.suffix] for p in sorted(root.rglob("*")) if p.suffix in kinds}

    def read(path: Path) -> None:
        about_subject(root, "subj01")
        refuse_faults(scan_folder(root)[1])
        _read_dataset(root)

    return Reader("folder", root, names, read)


def _split(folder: Path, dataset: Dataset) -> Reader:
    root, ids = place_of(folder, "split-file"), [int(n) for n in dataset.subjects[0].train.ids]
    (root / "a.json").write_text(json.dumps({str(n): f"g{n % 3}" for n in ids}))
    (root / "b.json").write_text(json.dumps({"variants": [{"train_ids": ids[:9], "test_ids": ids[9:]}]}))
    (root / "c.json").write_text(json.dumps({"groups": [ids[:9], ids[9:]]}))
    (root / "d.csv").write_text("id,fold\n" + "".join(f"{n},{n % 2}\n" for n in ids))
    kinds = {name: [m.of_json, m.of_text] for name in ("a.json", "b.json", "c.json")} | {
        "d.csv": [m.of_text, m.of_bytes]
    }
    return Reader("split file", root, kinds, lambda path: read_split(path, dataset.subjects))


# --- networks and their weights ---------------------------------------------------------------------------------------


def networks(folder: Path) -> Iterator[Reader]:
    import safetensors.torch
    import timm

    root = place_of(folder, "weights")
    model = torch.nn.Sequential(torch.nn.Linear(3, 2), torch.nn.BatchNorm1d(2))
    torch.save(model.state_dict(), root / "a.pth")
    torch.save({"state_dict": model.state_dict(), "epoch": 3}, root / "b.pth")
    torch.save(model.state_dict(), root / "old.pth", _use_new_zipfile_serialization=False)
    safetensors.torch.save_file(model.state_dict(), root / "a.safetensors")
    files = {"a.pth": [m.of_pth], "b.pth": [m.of_pth], "old.pth": [m.of_pickle], "a.safetensors": [m.of_safetensors]}

    def read(path: Path) -> None:
        checkpoint.refuse_trained(str(path), "--checkpoint")
        weights.load_file_into(model, path, "a network")

    yield Reader("weights", root, files, read)
    root, network = place_of(folder, "weights-of-timm"), timm.create_model("test_resnet")
    safetensors.torch.save_file(network.state_dict(), root / "a.safetensors")
    torch.save(network.state_dict(), root / "a.pth")

    def build_network(path: Path) -> None:
        weights.build_network(BackboneConfig(name="test_resnet", weights=str(path), size=48))

    yield Reader("weights of timm", root, {"a.safetensors": [m.of_safetensors], "a.pth": [m.of_pth]}, build_network)
    root = place_of(folder, "state")
    (root / "inside").mkdir(exist_ok=True)
    checkpoint.save_state(root / "inside", {"epoch": 1, "optimizer": {"a": torch.ones(3)}, "rng": [1, 2]})

    def read_state(path: Path) -> None:
        if path.is_file() and path.stat().st_size < 1 << 20:  # its digest fits whatever was changed
            write_document(path.with_name("state.json"), {path.name: file_digest(path)})
        checkpoint.load_state(path.parent)

    yield Reader("state", root, {"inside/state.pt": [m.of_pth]}, read_state)
    yield _hub(folder)
    root = place_of(folder, "own-code")
    settings = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "interpolation": "bilinear", "crop_pct": 0.9}
    (root / "settings.json").write_text(json.dumps({"transform": settings, "layers": ["0"]}))
    (root / "net.py").write_text(_OWN)
    config = BackboneConfig(name=f"{root / 'net.py'}:build")
    yield Reader("own code", root, {"settings.json": [m.of_json]}, lambda path: own_code.load(config))
    root = place_of(folder, "features-elsewhere")
    np.save(root / "a.npy", np.ones((3, 2), np.float32))
    (root / "ids.txt").write_text("1\n2\n3\n")
    (root / "ids.csv").write_text("id\n1\n2\n3\n")
    (root / "table.csv").write_text("id,a,b\n1,0.5,1\n2,1,2\n3,4,5\n")
    files = {"a.npy": [m.of_npy], "ids.txt": [m.of_text, m.of_bytes], "ids.csv": [m.of_text], "table.csv": [m.of_text]}

    def made(path: Path) -> None:
        for ids in ("ids.txt", "ids.csv"):
            elsewhere.read_made(str(root / "a.npy"), root / ids)
        elsewhere.read_made(str(root / "table.csv"), None)

    yield Reader("features elsewhere", root, files, made)


_OWN = """
import json
from pathlib import Path
import torch
class Built:
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 32, stride=32, padding=16))
def build():
    path = Path(__file__).with_name("settings.json")
    given = json.loads(path.read_bytes()) if path.is_file() else {}
    Built.transform, Built.layers = given.get("transform"), given.get("layers")
    return Built
"""


def _hub(folder: Path) -> Reader:
    """A repository in the cache of the hub."""
    repository = Path(os.environ["HF_HOME"]) / "hub/models--a--b"
    root = repository / "snapshots/0123456789abcdef0123456789abcdef01234567"
    root.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs/main").write_text(root.name)
    description = {
        "architecture": "test_resnet",
        "num_classes": 10,
        "num_features": 96,
        "global_pool": "avg",
        "model_args": {"in_chans": 3},
        "pretrained_cfg": {
            "tag": "a",
            "input_size": [3, 48, 48],
            "fixed_input_size": False,
            "interpolation": "bicubic",
            "crop_pct": 0.95,
            "mean": [0.5, 0.5, 0.5],
            "std": [0.5, 0.5, 0.5],
            "num_classes": 10,
            "classifier": "fc",
        },
    }
    (root / "config.json").write_text(json.dumps(description))
    config = BackboneConfig(name="hf-hub:a/b", weights="none", size=48)

    def read(path: Path) -> None:
        hf_hub.check(config)
        outline.outline.cache_clear()
        outline.outline(config, LayerConfig())

    return Reader("hub", root, {"config.json": [m.of_json]}, read)


def _worked(tree: Path) -> Path:
    """A folder with `work` and `encoder`, made by the commands themselves, which workers share."""
    shared = Path(os.environ[SHARED])
    both = ("--data", tree, "--work", shared / "work")
    network = ("--backbone", "test_resnet", "--weights", "none", "--size", 48)
    if not (shared / "encoder").is_dir():
        _run("extract", *both, *network)
        _run("fit-heads", *both)
        _run("blend", *both)
        _run("fit-heads", *both, "--split", "cluster")
        _run(
            "pretrain",
            *both,
            *network,
            "--folds",
            2,
            "--epochs",
            1,
            "--batch-size",
            8,
            "--workers",
            1,
            "--stop",
            "never",
        )
        _run("export", shared / "encoder", *both, "--model", "blend")
    return shared


def work(folder: Path) -> Iterator[Reader]:
    """What the commands leave in a work folder."""
    tree, work = _tree(), folder / "work"
    for name in ("work", "encoder"):
        shutil.copytree(_worked(tree) / name, folder / name)
    subjects = open_dataset(tree).subjects

    def stores(path: Path) -> None:
        for kind in ("features.zarr", "predictions.zarr"):
            for store in list_stores(work / kind):
                opened = open_store(store.path)
                for name in opened.arrays:
                    opened.read(name, 0, 2)

    yield _of_work("store", work, ("*.zarr/*/zarr.json", "*.zarr/*/*/zarr.json", "*.zarr/*/committed.json"), stores)

    def indexes(path: Path) -> None:
        for subject in subjects:
            ImageList.of(subject, work)
            remembered(subject, work)
        refuse_unfit(subjects, work)

    yield _of_work("index", work, ("index/*.json", "index/*.npz"), indexes)

    def lists(path: Path) -> None:
        images = ImageList.of(subjects[0], work)
        images.earlier({"images": "0" * 32, "image_ids": path.stem.rpartition("-")[2]})
        find_scored(subjects, work)

    yield _of_work("lists of images", work, ("images/*.json", "splits/*.json"), lists)

    def checkpoints(path: Path) -> None:
        for one in checkpoint.list_checkpoints(work):
            _ = one.seen_ids, one.training, one.fold, one.heads(), one.concerns(subjects[0])

    yield _of_work("checkpoint", work, ("checkpoints/*/checkpoint.json",), checkpoints)

    def blend(path: Path) -> None:
        load_blend(path)
        load_nested(path)

    yield _of_work("blend", work, ("submission/blend.safetensors",), blend)

    def heads(path: Path) -> None:
        tensors = InFile(path, path.stem)
        rows = {name: torch.ones(2, *shape) for name, shape in _shapes(work, path.stem).items()}
        saved = SavedHeads(tensors, {name: tuple(values.shape[1:]) for name, values in rows.items()}, HeadKind())
        for surface in saved.surfaces:
            saved.predict(surface, [rows])

    yield _of_work("heads", work, ("heads/*ridge*.safetensors",), heads)
    yield _of_work(
        "statistics",
        work,
        ("submission/weights.json", "submission/blend.safetensors"),
        lambda path: find_scored(subjects, work),
    )
    yield _encoder(folder / "encoder")


def _resealed(name: str, content: bytes, rng: random.Random) -> bytes:
    """A document that was changed and whose digest fits: digests protect from damage, not from malice."""
    with suppress(ValueError, TypeError, KeyError, RecursionError):
        document = json.loads(content)
        inside = document["attributes"]["featcache"] if name == "zarr.json" else document
        inside.pop("digest", None)
        new = sealed(name, json.loads(m.of_json(json.dumps(inside).encode(), rng)))
        if name == "zarr.json":
            document["attributes"]["featcache"], new = new, document
        return json.dumps(new).encode()
    return m.of_json(content, rng)


def _with_checksum(content: bytes, rng: random.Random) -> bytes:
    """A file of tensors that was changed and whose checksum fits, for the same reason."""
    changed = m.of_safetensors(content, rng)
    if found := re.search(rb'"crc32c": ?"([0-9a-f]{8})"', changed):
        start, stop = found.span(1)
        checksum = google_crc32c.value(changed[:start] + b"00000000" + changed[stop:])
        changed = changed[:start] + f"{checksum:08x}".encode() + changed[stop:]
    return changed


def _shapes(work: Path, predictions: str) -> dict[str, tuple[int, ...]]:
    features = next(iter(list_stores(work / "features.zarr")))
    return {name: tuple(features.arrays[name].shape[1:]) for name in features.arrays}


def _of_work(name: str, work: Path, patterns: Sequence[str], read: Callable[[Path], object]) -> Reader:
    kinds = {".json": [m.of_json, m.of_bytes, _resealed], ".npz": [of_npz], ".safetensors": [_with_checksum]}
    files = {
        str(path.relative_to(work)): [
            partial(one, path.name) if one is _resealed else one for one in kinds[path.suffix]
        ]
        for pattern in patterns
        for path in sorted(work.glob(pattern))
    }
    return Reader(name, work, files, read)


def _encoder(root: Path) -> Reader:
    """The folder of an encoder, whose digests fit whatever was changed: they protect from damage, not from malice."""
    from featcache.config import fingerprint

    def read(path: Path) -> None:
        with suppress(ValueError, TypeError, KeyError, OSError, RecursionError, AttributeError):
            if not (root / DESCRIPTION).is_file():  # a pipe would wait for ever
                raise OSError
            description = json.loads((root / DESCRIPTION).read_text())
            if path.is_file() and path.name != DESCRIPTION:
                description["digests"][str(path.relative_to(root))] = file_digest(path)
            description.pop("digest", None)
            (root / DESCRIPTION).write_text(json.dumps(description | {"digest": fingerprint(description)}))
        load_encoder(root)

    files = {
        DESCRIPTION: [m.of_json],
        "subjects.safetensors": [m.of_safetensors],
        "blend.safetensors": [m.of_safetensors],
    }
    return Reader("encoder folder", root, files, read)
