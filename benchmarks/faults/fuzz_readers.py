"""Every reader of the project, with small valid files for it and the ways in which they are changed."""

import io
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import fuzz_mutations as m
import numpy as np
import torch
from PIL import Image

from featcache.backbone import checkpoint, outline, weights
from featcache.backbone.sources import hf_hub, own_code
from featcache.cache import elsewhere
from featcache.cache.store import list_stores, open_store
from featcache.config import BackboneConfig, LayerConfig
from featcache.dataset import images as pictures
from featcache.dataset.folder import about_subject, scan_folder
from featcache.dataset.identity import remembered
from featcache.dataset.image_lists import ImageList
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from featcache.dataset.open import open_dataset, scan_dataset
from featcache.dataset.responses import refuse_unfit, response_fault
from featcache.dataset.rois import read_mapping
from featcache.dataset.split_files import read_split
from featcache.dataset.subject import ArrayImage, Dataset, refuse_faults
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Place, numbers, rows_of
from featcache.formats.names import array_names
from featcache.formats.tables import column_names, read_table
from featcache.formats.volumes import read_labels, read_volumes
from featcache.machine import journal
from featcache.machine.documents import sealed
from heads.blend.saved import load_blend, load_nested
from heads.encoder.folder import DESCRIPTION, load_encoder
from heads.modules.readout import HeadKind, InFile, SavedHeads
from heads.recipes.steps import Option, described, read_recipe
from heads.statistics.sources import find_scored

_ROOT = Path(__file__).resolve().parents[2]
SHARED = "FEATCACHE_FUZZ_SHARED"  # names the folder that workers share
_SPECIAL = 0.02  # of all inputs are no file at all
_N, _VERTICES = 6, 4


@dataclass
class Reader:
    """A reader, the folder of its valid files, and those that are changed, each by which mutations.

    read : takes the file that was changed
    """

    name: str
    root: Path
    files: Mapping[str, Sequence[m.Mutation]]
    read: Callable[[Path], object]
    _whole: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._whole = {name: (self.root / name).read_bytes() for name in self.files}
        for name in self.files:  # valid ones are read, or refusals would say nothing
            self.read(self.root / name)

    @contextmanager
    def changed(self, rng: random.Random) -> Iterator[Path]:
        """One of the files, changed; all of them are whole again afterwards."""
        name = rng.choice(list(self.files))
        path, content = self.root / name, self._whole[name]
        if rng.random() < _SPECIAL:
            m.replace_by_special(path, rng)
        elif rng.random() > 0.01:  # a few stay as they are
            path.write_bytes(rng.choice(self.files[name])(content, rng))
        try:
            yield path
        finally:
            for name, content in self._whole.items():
                other = self.root / name
                if other.is_symlink() or not other.is_file():
                    _remove(other)
                    other.write_bytes(content)
                elif other == path or other.stat().st_size != len(content) or other.read_bytes() != content:
                    other.write_bytes(content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def build(folder: Path, names: set[str]) -> list[Reader]:
    """All readers, or those of some names, each with a folder of its own."""
    readers = []
    for make in (_arrays, _tables, _volumes, _images, _datasets, _weights, _texts, _work):
        if not names or names & _MADE[make.__name__]:
            readers += [reader for reader in make(folder) if not names or reader.name in names]
    return readers


_MADE = {
    "_arrays": {"npy", "npz", "hdf5", "mat", "zarr", "safetensors", "numbers as text", "parquet"},
    "_tables": {"table", "parquet table"},
    "_volumes": {"nifti", "nifti.gz", "mgh", "gifti", "cifti"},
    "_images": {"image files", "arrays of images"},
    "_datasets": {"label names", "tree", "folder", "split file", "import"},
    "_weights": {"weights", "weights of timm", "state", "hub", "own code", "features elsewhere"},
    "_texts": {"recipe", "journal"},
    "_work": {"store", "index", "checkpoint", "blend", "heads", "statistics", "encoder folder", "lists of images"},
}


def _place(folder: Path, name: str) -> Path:
    root = folder / name.replace(" ", "-")
    root.mkdir(parents=True, exist_ok=True)
    return root


# --- arrays, tables, volumes ------------------------------------------------------------------------------------------


def _use(array: Any) -> None:
    """What callers do with an array: rows in any order, as float32."""
    numbers(array, getattr(array, "place", ""), (1, 2, 3, 4, 5))
    rows_of(array, np.array([len(array) - 1, 0]))


def _read_array(path: Path) -> None:
    for name in array_names(path)[:3]:
        _use(open_array(Place(path, name)))


def _arrays(folder: Path) -> Iterator[Reader]:
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import safetensors.torch
    import scipy.io
    import zarr

    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    root = _place(folder, "npy")
    for name, array in {"c": values, "f": np.asfortranarray(values), "i": values.astype(">i8"), "b": values > 3}.items():
        np.save(root / f"{name}.npy", array)
    yield Reader("npy", root, dict.fromkeys(("c.npy", "f.npy", "i.npy", "b.npy"), [m.of_npy]), _read_array)
    root = _place(folder, "npz")
    np.savez(root / "stored.npz", a=values, f=np.asfortranarray(values))
    np.savez_compressed(root / "packed.npz", a=values)
    of_npz = [lambda content, rng: m.of_zip(content, rng, m.of_npy)]
    yield Reader("npz", root, dict.fromkeys(("stored.npz", "packed.npz"), of_npz), _read_array)
    root = _place(folder, "hdf5")
    for libver in ("earliest", "latest"):
        with h5py.File(root / f"{libver}.h5", "w", libver=libver) as file:
            file["group/a"] = values
            file.create_dataset("b", data=values, chunks=(2, 4), compression="gzip", shuffle=True, fletcher32=True)
            file["b"].attrs["MATLAB_class"] = b"double"
            file["text"] = ["a", "b"]
    yield Reader("hdf5", root, dict.fromkeys(("earliest.h5", "latest.h5"), [m.of_bytes]), _read_array)
    root = _place(folder, "mat")
    scipy.io.savemat(root / "plain.mat", {"a": values, "s": {"b": 1}, "t": "text"})
    scipy.io.savemat(root / "packed.mat", {"a": values}, do_compression=True)
    scipy.io.savemat(root / "old.mat", {"a": values}, format="4")
    yield Reader("mat", root, dict.fromkeys(("plain.mat", "packed.mat", "old.mat"), [m.of_deflated]), _read_array)
    root = _place(folder, "zarr")
    for version in (2, 3):
        group = zarr.open_group(root / f"v{version}.zarr", mode="w", zarr_format=version)
        group.create_array("a", data=values, chunks=(3, 4))
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    kinds = {name: [m.of_json] if Path(name).name.startswith(("zarr", ".z")) else [m.of_bytes] for name in names}
    yield Reader("zarr", root, kinds, lambda path: _read_array(_store_of(path)))
    root = _place(folder, "safetensors")
    tensors = {"a": torch.from_numpy(values), "b": torch.ones(3, 2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, root / "two.safetensors", {"x": "y"})
    safetensors.torch.save_file({"b": tensors["b"]}, root / "one.safetensors")
    files = dict.fromkeys(("two.safetensors", "one.safetensors"), [m.of_safetensors])
    yield Reader("safetensors", root, files, _read_array)
    root = _place(folder, "text")
    np.savetxt(root / "a.csv", values, delimiter=",", header="a,b,c,d", comments="")
    np.savetxt(root / "a.tsv", values, delimiter="\t")
    yield Reader("numbers as text", root, dict.fromkeys(("a.csv", "a.tsv"), [m.of_text, m.of_bytes]), _read_array)
    root = _place(folder, "parquet")
    table = pa.table({name: values[:, i] for i, name in enumerate("abcd")})
    for codec in ("none", "snappy", "zstd"):
        parquet.write_table(table, root / f"{codec}.parquet", compression=codec)
    files = dict.fromkeys(("none.parquet", "snappy.parquet", "zstd.parquet"), [m.of_bytes])
    yield Reader("parquet", root, files, _read_array)


def _store_of(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.suffix == ".zarr")


def _read_table(path: Path) -> None:
    column_names(path)
    read_table(path).column("id")


def _tables(folder: Path) -> Iterator[Reader]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    root = _place(folder, "table")
    (root / "a.csv").write_text('id,image,group\n1,"a.png",x\n2,b.png,y\n3,c.png,\n')
    (root / "a.tsv").write_text("id\timage\n1\ta.png\n2\tb.png\n")
    yield Reader("table", root, dict.fromkeys(("a.csv", "a.tsv"), [m.of_text, m.of_bytes]), _read_table)
    root = _place(folder, "parquet-table")
    table = pa.table({"id": [1, 2, None], "name": ["a", "b", "c"], "x": [0.5, 1.0, None]})
    parquet.write_table(table, root / "a.parquet")
    parquet.write_table(table, root / "plain.parquet", use_dictionary=False, compression="gzip")
    yield Reader("parquet table", root, dict.fromkeys(("a.parquet", "plain.parquet"), [m.of_bytes]), _read_table)


def _read_volume(path: Path) -> None:
    volumes = read_volumes([path])
    _use(volumes.rows)
    if volumes.n_of_files == (1,):
        read_labels(path)


def _volumes(folder: Path) -> Iterator[Reader]:
    import nibabel as nib

    values, affine = np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)
    for name in ("nifti", "nifti.gz"):
        root, ending = _place(folder, name), name.replace("nifti", "nii")
        nib.save(nib.Nifti1Image(values, affine), root / f"one.{ending}")
        nib.save(nib.Nifti2Image(np.stack([values] * 3, -1).astype(np.float32), affine), root / f"two.{ending}")
        scaled = nib.Nifti1Image(np.stack([values] * 2, -1), affine)
        scaled.header.set_slope_inter(0.5, 1)
        nib.save(scaled, root / f"many.{ending}")
        files = dict.fromkeys((f"one.{ending}", f"two.{ending}", f"many.{ending}"), [m.of_nifti, m.of_bytes])
        yield Reader(name, root, files, _read_volume)
    root = _place(folder, "mgh")
    for ending in ("mgh", "mgz"):
        nib.save(nib.MGHImage(values.astype(np.float32), affine), root / f"a.{ending}")
    yield Reader("mgh", root, dict.fromkeys(("a.mgh", "a.mgz"), [m.of_bytes]), _read_volume)
    root = _place(folder, "gifti")
    for encoding in ("ASCII", "B64BIN", "B64GZ"):
        array = nib.gifti.GiftiDataArray(np.arange(9, dtype=np.float32), encoding=f"GIFTI_ENCODING_{encoding}")
        (root / f"{encoding}.gii").write_bytes(nib.GiftiImage(darrays=[array]).to_bytes())
    files = dict.fromkeys(("ASCII.gii", "B64BIN.gii", "B64GZ.gii"), [m.of_text, m.of_bytes])
    yield Reader("gifti", root, files, _read_volume)
    root = _place(folder, "cifti")
    brain = nib.cifti2.BrainModelAxis.from_mask(np.ones(9, bool), name="cortex_left")
    brain += nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2), bool), name="thalamus_left", affine=affine)
    scalars = nib.cifti2.ScalarAxis(["a", "b"])
    nib.save(nib.Cifti2Image(np.ones((2, 17), np.float32), (scalars, brain)), root / "a.dscalar.nii")
    labels = nib.cifti2.LabelAxis(["a"], [{0: ("none", (0, 0, 0, 0)), 1: ("V1", (1, 0, 0, 1))}])
    nib.save(nib.Cifti2Image(np.ones((1, 17), np.float32), (labels, brain)), root / "a.dlabel.nii")
    files = dict.fromkeys(("a.dscalar.nii", "a.dlabel.nii"), [m.of_nifti, m.of_bytes, m.of_text])
    yield Reader("cifti", root, files, _read_volume)


# --- images and datasets ----------------------------------------------------------------------------------------------


def _read_image(path: Path) -> None:
    pictures.image_fault(path)
    pictures.image_shape(path)
    pictures.load_image(path)


def _images(folder: Path) -> Iterator[Reader]:
    root, rng = _place(folder, "images"), np.random.default_rng(0)
    image = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x112], exif[0x10F], exif[0x128] = 6, "maker", 2
    image.save(root / "a.jpg", exif=exif)
    image.save(root / "a.png", exif=exif)
    image.save(root / "a.webp", exif=exif)
    image.convert("P").save(root / "p.gif", save_all=True, append_images=[image.convert("P")])
    image.convert("CMYK").save(root / "c.jpg")
    image.convert("CMYK").save(root / "c.tif", compression="tiff_lzw")
    image.convert("I;16").save(root / "i.png")
    image.convert("RGBA").save(root / "t.png")
    for ending in ("tif", "bmp", "ppm", "tga", "pcx", "ico", "jp2", "sgi", "dds", "avif", "icns", "dib", "im", "msp", "xbm"):
        with suppress(OSError, KeyError, ValueError):
            (image.convert("1") if ending in ("msp", "xbm") else image).save(root / f"a.{ending}")
    files = {path.name: [m.of_bytes] for path in sorted(root.iterdir()) if path.stat().st_size}
    yield Reader("image files", root, files, _read_image)
    root = _place(folder, "arrays-of-images")
    values = rng.integers(0, 256, (3, 9, 12, 3), dtype=np.uint8)
    np.save(root / "a.npy", values)
    import h5py

    with h5py.File(root / "a.h5", "w") as file:
        file["imgBrick"] = values
    files = {"a.npy": [m.of_npy], "a.h5": [m.of_bytes]}

    def read(path: Path) -> None:
        pictures.picture_count(path)
        pictures.load_image(ArrayImage(path, "", 1))

    yield Reader("arrays of images", root, files, read)


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


def _datasets(folder: Path) -> Iterator[Reader]:
    root, tree = _place(folder, "tree"), _tree()
    masks = tree / "subj01/roi_masks"
    shutil.copytree(tree, root, dirs_exist_ok=True)
    names = {str(path.relative_to(root)): [m.of_npy] for path in sorted(root.rglob("*.npy")) if "mapping" not in path.name}
    yield Reader("tree", root, names, lambda path: _read_dataset(root))
    labels = _place(folder, "label-names")
    for path in masks.glob("mapping_*.npy"):
        shutil.copy(path, labels)
    np.save(labels / "of-numpy.npy", {np.int64(1): "V1", np.int64(2): "V2"}, allow_pickle=True)
    yield Reader("label names", labels, {path.name: [m.of_mapping] for path in sorted(labels.iterdir())}, read_mapping)
    yield _imported(folder)
    yield _split(folder, open_dataset(tree))
    yield _importing(folder)


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
        "table": root / "table.csv", "images": str(root / "images"), "responses": (f"V4={root / 'responses.npy'}",),
        "ceiling": (f"V4={root / 'ceiling.npy'}",), "roi": (f"V4={root / 'rois.csv'}",), **columns,
    }  # fmt: skip


def _importing(folder: Path) -> Reader:
    root = _place(folder, "import")
    config = ImportConfig(**_lab(root))
    kinds = {"responses.npy": [m.of_npy], "ceiling.npy": [m.of_npy], "rois.csv": [m.of_text], "table.csv": [m.of_text]}
    return Reader("import", root, kinds, lambda path: read_material(config))


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
    root, ids = _place(folder, "split-file"), [int(n) for n in dataset.subjects[0].train.ids]
    (root / "a.json").write_text(json.dumps({str(n): f"g{n % 3}" for n in ids}))
    (root / "b.json").write_text(json.dumps({"variants": [{"train_ids": ids[:9], "test_ids": ids[9:]}]}))
    (root / "c.json").write_text(json.dumps({"groups": [ids[:9], ids[9:]]}))
    (root / "d.csv").write_text("id,fold\n" + "".join(f"{n},{n % 2}\n" for n in ids))
    kinds = {name: [m.of_json, m.of_text] for name in ("a.json", "b.json", "c.json")} | {"d.csv": [m.of_text, m.of_bytes]}
    return Reader("split file", root, kinds, lambda path: read_split(path, dataset.subjects))


# --- networks and their weights ---------------------------------------------------------------------------------------


def _weights(folder: Path) -> Iterator[Reader]:
    import safetensors.torch
    import timm

    root = _place(folder, "weights")
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
    root, network = _place(folder, "weights-of-timm"), timm.create_model("test_resnet")
    safetensors.torch.save_file(network.state_dict(), root / "a.safetensors")
    torch.save(network.state_dict(), root / "a.pth")

    def build_network(path: Path) -> None:
        weights.build_network(BackboneConfig(name="test_resnet", weights=str(path), size=48))

    yield Reader("weights of timm", root, {"a.safetensors": [m.of_safetensors], "a.pth": [m.of_pth]}, build_network)
    root = _place(folder, "state")
    (root / "inside").mkdir(exist_ok=True)
    checkpoint.save_state(root / "inside", {"epoch": 1, "optimizer": {"a": torch.ones(3)}, "rng": [1, 2]})
    yield Reader("state", root, {"inside/state.pt": [m.of_pth]}, lambda path: checkpoint.load_state(path.parent))
    yield _hub(folder)
    root = _place(folder, "own-code")
    settings = {"size": 32, "mean": [0.5, 0.5, 0.5], "std": [1, 1, 1], "interpolation": "bilinear", "crop_pct": 0.9}
    (root / "settings.json").write_text(json.dumps({"transform": settings, "layers": ["0"]}))
    (root / "net.py").write_text(_OWN)
    config = BackboneConfig(name=f"{root / 'net.py'}:build")
    yield Reader("own code", root, {"settings.json": [m.of_json]}, lambda path: own_code.load(config))
    root = _place(folder, "features-elsewhere")
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
    network = torch.nn.Sequential(torch.nn.Conv2d(3, 2, 3))
def build():
    given = json.loads(Path(__file__).with_name("settings.json").read_bytes())
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
        "architecture": "test_resnet", "num_classes": 10, "num_features": 96, "global_pool": "avg", "model_args": {"in_chans": 3},
        "pretrained_cfg": {"tag": "a", "input_size": [3, 48, 48], "fixed_input_size": False, "interpolation": "bicubic",
                           "crop_pct": 0.95, "mean": [0.5, 0.5, 0.5], "std": [0.5, 0.5, 0.5], "num_classes": 10, "classifier": "fc"},
    }  # fmt: skip
    (root / "config.json").write_text(json.dumps(description))
    config = BackboneConfig(name="hf-hub:a/b", weights="none", size=48)

    def read(path: Path) -> None:
        hf_hub.check(config)
        outline.outline.cache_clear()
        outline.outline(config, LayerConfig())

    return Reader("hub", root, {"config.json": [m.of_json]}, read)


# --- texts, and work folders ------------------------------------------------------------------------------------------

_COMMANDS = {
    "extract": {"backbone": Option(str, "--backbone"), "size": Option(int, "--size"), "data": Option(Path, "--data")},
    "fit-heads": {"loss": Option(str, "--loss"), "folds": Option(int, "--folds"), "quick": Option(bool, "--quick", "--no-quick"),
                  "rate": Option(float, "--rate"), "layer": Option(str, "--layer", many=True)},
}  # fmt: skip
_RECIPE = """title = "a"
takes = "1 minute"
[options]
data = "x"
[[steps]]
run = "extract"
backbone = ["a", "b"]
size = [1, 2]
[[steps]]
run = "fit-heads"
loss = "mse"
quick = true
rate = 0.5
layer = ["c", "d"]
"""


def _texts(folder: Path) -> Iterator[Reader]:
    root = _place(folder, "recipe")
    (root / "a.toml").write_text(_RECIPE)

    def recipe(path: Path) -> None:
        described(path)
        read_recipe(path, _COMMANDS, {"data": Path("y")})

    yield Reader("recipe", root, {"a.toml": [m.of_text, m.of_bytes]}, recipe)
    root = _place(folder, "journal")
    (root / "journal.jsonl").write_text('{"command": "extract", "seconds": 1.5}\n{"command": "blend"}\n')
    yield Reader("journal", root, {"journal.jsonl": [m.of_text, m.of_bytes, m.of_json]}, journal.read)


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
        _run("pretrain", *both, *network, "--folds", 2, "--epochs", 1, "--batch-size", 8, "--workers", 1, "--stop", "never")
        _run("export", shared / "encoder", *both, "--model", "blend")
    return shared


def _work(folder: Path) -> Iterator[Reader]:
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
    yield _of_work("statistics", work, ("submission/weights.json", "submission/blend.safetensors"),
                   lambda path: find_scored(subjects, work))  # fmt: skip
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


def _shapes(work: Path, predictions: str) -> dict[str, tuple[int, ...]]:
    features = next(iter(list_stores(work / "features.zarr")))
    return {name: tuple(features.arrays[name].shape[1:]) for name in features.arrays}


def _of_work(name: str, work: Path, patterns: Sequence[str], read: Callable[[Path], object]) -> Reader:
    kinds = {".json": [m.of_json, m.of_bytes, _resealed], ".npz": [lambda content, rng: m.of_zip(content, rng, m.of_npy)],
             ".safetensors": [m.of_safetensors]}  # fmt: skip
    files = {
        str(path.relative_to(work)): [partial(one, path.name) if one is _resealed else one for one in kinds[path.suffix]]
        for pattern in patterns
        for path in sorted(work.glob(pattern))
    }
    return Reader(name, work, files, read)


def _encoder(root: Path) -> Reader:
    """The folder of an encoder, whose digests fit whatever was changed: they protect from damage, not from malice."""
    from featcache.config import fingerprint
    from featcache.dataset.digests import file_digest

    def read(path: Path) -> None:
        with suppress(ValueError, TypeError, KeyError, OSError, RecursionError, AttributeError):
            description = json.loads((root / DESCRIPTION).read_text())
            if path.is_file() and path.name != DESCRIPTION:
                description["digests"][str(path.relative_to(root))] = file_digest(path)
            description.pop("digest", None)
            (root / DESCRIPTION).write_text(json.dumps(description | {"digest": fingerprint(description)}))
        load_encoder(root)

    files = {DESCRIPTION: [m.of_json], "subjects.safetensors": [m.of_safetensors], "blend.safetensors": [m.of_safetensors]}
    return Reader("encoder folder", root, files, read)
