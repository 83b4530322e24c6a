"""Readers of file formats, with small valid files for them."""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import fuzz_mutations as m
import numpy as np
import torch
from fuzz_reader import Reader, of_npz, place_of
from PIL import Image

from featcache.dataset import images as pictures
from featcache.dataset.subject import ArrayImage
from featcache.formats.arrays import open_array
from featcache.formats.lazy import Place, numbers, rows_of
from featcache.formats.names import array_names
from featcache.formats.tables import column_names, read_table
from featcache.formats.volumes import read_labels, read_volumes
from featcache.machine import journal
from heads.recipes.steps import Option, described, read_recipe

# --- arrays, tables, volumes ------------------------------------------------------------------------------------------


def _use(array: Any) -> None:
    """What callers do with an array: rows in any order, as float32."""
    numbers(array, getattr(array, "place", ""), (1, 2, 3, 4, 5))
    rows_of(array, np.array([len(array) - 1, 0]))


def _read_array(path: Path) -> None:
    for name in array_names(path)[:3]:
        _use(open_array(Place(path, name)))


def arrays(folder: Path) -> Iterator[Reader]:
    import h5py
    import pyarrow as pa
    import pyarrow.parquet as parquet
    import safetensors.torch
    import scipy.io
    import zarr

    values = np.arange(40, dtype=np.float32).reshape(10, 4)
    root = place_of(folder, "npy")
    for name, array in {
        "c": values,
        "f": np.asfortranarray(values),
        "i": values.astype(">i8"),
        "b": values > 3,
    }.items():
        np.save(root / f"{name}.npy", array)
    yield Reader("npy", root, dict.fromkeys(("c.npy", "f.npy", "i.npy", "b.npy"), (m.of_npy,)), _read_array)
    root = place_of(folder, "npz")
    np.savez(root / "stored.npz", a=values, f=np.asfortranarray(values))
    np.savez_compressed(root / "packed.npz", a=values)
    yield Reader("npz", root, dict.fromkeys(("stored.npz", "packed.npz"), (of_npz,)), _read_array)
    root = place_of(folder, "hdf5")
    for libver in ("earliest", "latest"):
        with h5py.File(root / f"{libver}.h5", "w", libver=libver) as file:
            file["group/a"] = values
            file.create_dataset("b", data=values, chunks=(2, 4), compression="gzip", shuffle=True, fletcher32=True)
            file["b"].attrs["MATLAB_class"] = b"double"
            file["text"] = ["a", "b"]
    yield Reader("hdf5", root, dict.fromkeys(("earliest.h5", "latest.h5"), (m.of_bytes,)), _read_array)
    root = place_of(folder, "mat")
    scipy.io.savemat(root / "plain.mat", {"a": values, "s": {"b": 1}, "t": "text"})
    scipy.io.savemat(root / "packed.mat", {"a": values}, do_compression=True)
    scipy.io.savemat(root / "old.mat", {"a": values}, format="4")
    yield Reader("mat", root, dict.fromkeys(("plain.mat", "packed.mat", "old.mat"), (m.of_deflated,)), _read_array)
    root = place_of(folder, "zarr")
    for version in (2, 3):
        group = zarr.open_group(root / f"v{version}.zarr", mode="w", zarr_format=version)
        group.create_array("a", data=values, chunks=(3, 4))
    names = [str(path.relative_to(root)) for path in sorted(root.rglob("*")) if path.is_file()]
    kinds = {name: [m.of_json] if Path(name).name.startswith(("zarr", ".z")) else [m.of_bytes] for name in names}
    yield Reader("zarr", root, kinds, lambda path: _read_array(_store_of(path)))
    root = place_of(folder, "safetensors")
    tensors = {"a": torch.from_numpy(values), "b": torch.ones(3, 2, dtype=torch.bfloat16)}
    safetensors.torch.save_file(tensors, root / "two.safetensors", {"x": "y"})
    safetensors.torch.save_file({"b": tensors["b"]}, root / "one.safetensors")
    files = dict.fromkeys(("two.safetensors", "one.safetensors"), (m.of_safetensors,))
    yield Reader("safetensors", root, files, _read_array)
    root = place_of(folder, "text")
    np.savetxt(root / "a.csv", values, delimiter=",", header="a,b,c,d", comments="")
    np.savetxt(root / "a.tsv", values, delimiter="\t")
    yield Reader("numbers as text", root, dict.fromkeys(("a.csv", "a.tsv"), (m.of_text, m.of_bytes)), _read_array)
    root = place_of(folder, "parquet")
    table = pa.table({name: values[:, i] for i, name in enumerate("abcd")})
    for codec in ("none", "snappy", "zstd"):
        parquet.write_table(table, root / f"{codec}.parquet", compression=codec)
    files = dict.fromkeys(("none.parquet", "snappy.parquet", "zstd.parquet"), (m.of_bytes,))
    yield Reader("parquet", root, files, _read_array)


def _store_of(path: Path) -> Path:
    return next(one for one in (path, *path.parents) if one.suffix == ".zarr")


def _read_table(path: Path) -> None:
    column_names(path)
    read_table(path).column("id")


def tables(folder: Path) -> Iterator[Reader]:
    import pyarrow as pa
    import pyarrow.parquet as parquet

    root = place_of(folder, "table")
    (root / "a.csv").write_text('id,image,group\n1,"a.png",x\n2,b.png,y\n3,c.png,\n')
    (root / "a.tsv").write_text("id\timage\n1\ta.png\n2\tb.png\n")
    yield Reader("table", root, dict.fromkeys(("a.csv", "a.tsv"), (m.of_text, m.of_bytes)), _read_table)
    root = place_of(folder, "parquet-table")
    table = pa.table({"id": [1, 2, None], "name": ["a", "b", "c"], "x": [0.5, 1.0, None]})
    parquet.write_table(table, root / "a.parquet")
    parquet.write_table(table, root / "plain.parquet", use_dictionary=False, compression="gzip")
    yield Reader("parquet table", root, dict.fromkeys(("a.parquet", "plain.parquet"), (m.of_bytes,)), _read_table)


def _read_volume(path: Path) -> None:
    volumes = read_volumes([path])
    _use(volumes.rows)
    if volumes.n_of_files == (1,):
        read_labels(path)


def volumes(folder: Path) -> Iterator[Reader]:
    import nibabel as nib

    values, affine = np.arange(60, dtype=np.int16).reshape(3, 4, 5), np.eye(4)
    for name in ("nifti", "nifti.gz"):
        root, ending = place_of(folder, name), name.replace("nifti", "nii")
        nib.save(nib.Nifti1Image(values, affine), root / f"one.{ending}")
        nib.save(nib.Nifti2Image(np.stack([values] * 3, -1).astype(np.float32), affine), root / f"two.{ending}")
        scaled = nib.Nifti1Image(np.stack([values] * 2, -1), affine)
        scaled.header.set_slope_inter(0.5, 1)
        nib.save(scaled, root / f"many.{ending}")
        files = dict.fromkeys((f"one.{ending}", f"two.{ending}", f"many.{ending}"), (m.of_nifti, m.of_bytes))
        yield Reader(name, root, files, _read_volume)
    root = place_of(folder, "mgh")
    for ending in ("mgh", "mgz"):
        nib.save(nib.MGHImage(values.astype(np.float32), affine), root / f"a.{ending}")
    yield Reader("mgh", root, dict.fromkeys(("a.mgh", "a.mgz"), (m.of_bytes,)), _read_volume)
    root = place_of(folder, "gifti")
    for encoding in ("ASCII", "B64BIN", "B64GZ"):
        array = nib.gifti.GiftiDataArray(np.arange(9, dtype=np.float32), encoding=f"GIFTI_ENCODING_{encoding}")
        (root / f"{encoding}.gii").write_bytes(nib.GiftiImage(darrays=[array]).to_bytes())
    files = dict.fromkeys(("ASCII.gii", "B64BIN.gii", "B64GZ.gii"), (m.of_text, m.of_bytes))
    yield Reader("gifti", root, files, _read_volume)
    root = place_of(folder, "cifti")
    brain = nib.cifti2.BrainModelAxis.from_mask(np.ones(9, bool), name="cortex_left")
    brain += nib.cifti2.BrainModelAxis.from_mask(np.ones((2, 2, 2), bool), name="thalamus_left", affine=affine)
    scalars = nib.cifti2.ScalarAxis(["a", "b"])
    nib.save(nib.Cifti2Image(np.ones((2, 17), np.float32), (scalars, brain)), root / "a.dscalar.nii")
    labels = nib.cifti2.LabelAxis(["a"], [{0: ("none", (0, 0, 0, 0)), 1: ("V1", (1, 0, 0, 1))}])
    nib.save(nib.Cifti2Image(np.ones((1, 17), np.float32), (labels, brain)), root / "a.dlabel.nii")
    files = dict.fromkeys(("a.dscalar.nii", "a.dlabel.nii"), (m.of_nifti, m.of_bytes, m.of_text))
    yield Reader("cifti", root, files, _read_volume)


# --- images and datasets ----------------------------------------------------------------------------------------------


def _read_image(path: Path) -> None:
    pictures.image_fault(path)
    pictures.image_shape(path)
    pictures.load_image(path)


def images(folder: Path) -> Iterator[Reader]:
    root, rng = place_of(folder, "images"), np.random.default_rng(0)
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
    for ending in (
        "tif",
        "bmp",
        "ppm",
        "tga",
        "pcx",
        "ico",
        "jp2",
        "sgi",
        "dds",
        "avif",
        "icns",
        "dib",
        "im",
        "msp",
        "xbm",
    ):
        with suppress(OSError, KeyError, ValueError):
            (image.convert("1") if ending in ("msp", "xbm") else image).save(root / f"a.{ending}")
    files = {path.name: [m.of_bytes] for path in sorted(root.iterdir()) if path.stat().st_size}
    yield Reader("image files", root, files, _read_image)
    root = place_of(folder, "arrays-of-images")
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


# --- texts, and work folders ------------------------------------------------------------------------------------------

_COMMANDS = {
    "extract": {"backbone": Option(str, "--backbone"), "size": Option(int, "--size"), "data": Option(Path, "--data")},
    "fit-heads": {
        "loss": Option(str, "--loss"),
        "folds": Option(int, "--folds"),
        "quick": Option(bool, "--quick", "--no-quick"),
        "rate": Option(float, "--rate"),
        "layer": Option(str, "--layer", many=True),
    },
}
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


def texts(folder: Path) -> Iterator[Reader]:
    root = place_of(folder, "recipe")
    (root / "a.toml").write_text(_RECIPE)

    def recipe(path: Path) -> None:
        described(path)
        read_recipe(path, _COMMANDS, {"data": Path("y")})

    yield Reader("recipe", root, {"a.toml": [m.of_text, m.of_bytes]}, recipe)
    root = place_of(folder, "journal")
    (root / "journal.jsonl").write_text('{"command": "extract", "seconds": 1.5}\n{"command": "blend"}\n')
    yield Reader("journal", root, {"journal.jsonl": [m.of_text, m.of_bytes, m.of_json]}, journal.read)
