"""Voxels inside a mask are those that were planted there, in every format, and in the places that the affine says."""

import gzip
from collections.abc import Callable
from pathlib import Path
from typing import Any

import nibabel
import numpy as np
import pytest
from nibabel import cifti2, gifti

from featcache.errors import DataError
from featcache.formats import volumes
from featcache.formats.lazy import rows_of
from featcache.formats.volumes import is_volume, read_labels, read_volumes

SHAPE = (5, 4, 3)
AFFINE = np.array([[-2, 0, 0.3, 10], [0, 1.8, 0, -20], [0.1, 0, 2.5, 5], [0, 0, 0, 1.0]])
DATA = np.random.default_rng(0).standard_normal((*SHAPE, 9)).astype(np.float32)
MASK = np.random.default_rng(1).random(SHAPE) < 0.4
ROWS = np.array([8, 2, 2, 0])
EXPECTED = DATA[MASK].T


def save(path: Path, data: np.ndarray, affine: np.ndarray = AFFINE) -> Path:
    """The data as a file of the format of its ending."""
    image = nibabel.MGHImage if path.suffix in (".mgh", ".mgz") else nibabel.Nifti1Image
    data = data.astype(np.uint8) if data.dtype == bool else data
    nibabel.save(image(data, affine), path)
    return path


@pytest.fixture
def mask(tmp_path):
    return save(tmp_path / "mask.nii", MASK)


@pytest.mark.parametrize("ending", ["nii", "nii.gz", "mgh", "mgz"])
def test_rows_are_the_voxels_inside_the_mask(tmp_path, mask, ending, monkeypatch):
    path = save(tmp_path / f"a.{ending}", DATA)
    for block in (1, 3 * 8 * MASK.size, volumes._BLOCK):
        monkeypatch.setattr(volumes, "_BLOCK", block)
        read = read_volumes([path], mask)
        assert (read.rows.shape, read.rows.dtype, read.n_of_files) == (EXPECTED.shape, np.float32, (9,))
        np.testing.assert_array_equal(read.rows[:], EXPECTED)
        np.testing.assert_array_equal(read.rows[3:5, 2:7], EXPECTED[3:5, 2:7])
        np.testing.assert_array_equal(rows_of(read.rows, ROWS), EXPECTED[ROWS])
    everything = read_volumes([path])
    np.testing.assert_array_equal(everything.rows[:], DATA.reshape(-1, 9).T)


def recorded(method: Callable[..., Any], calls: list[str]) -> Callable[..., Any]:
    """The method, which writes its name into a list whenever it is called."""

    def call(*arguments: Any, **options: Any) -> Any:
        calls.append(method.__name__)
        return method(*arguments, **options)

    return call


def test_a_compressed_file_is_opened_once_and_read_forwards(tmp_path, monkeypatch):
    calls: list[str] = []
    path = save(tmp_path / "a.nii.gz", DATA)
    for kind, name in ((gzip.GzipFile, "__init__"), (gzip._GzipReader, "_rewind")):
        monkeypatch.setattr(kind, name, recorded(getattr(kind, name), calls))
    read = read_volumes([path]).rows
    before = len(calls)
    np.testing.assert_array_equal(np.concatenate([read[start : start + 3] for start in range(0, 9, 3)]), read[:])
    assert before and calls[before:] == ["__init__", "_rewind"]  # back to the start for the second reading alone


def test_positions_are_millimetres_of_the_same_voxels(tmp_path, mask):
    path = save(tmp_path / "a.nii", DATA)
    expected = nibabel.affines.apply_affine(AFFINE, np.argwhere(MASK))
    positions = read_volumes([path], mask).positions
    assert positions.dtype == np.float32
    np.testing.assert_allclose(positions, expected, rtol=1e-5)
    np.testing.assert_allclose(read_volumes([path]).positions[MASK.ravel()], expected, rtol=1e-5)


def test_scaled_integers_are_what_they_stand_for(tmp_path, mask):
    image = nibabel.Nifti1Image(np.round(DATA * 100).astype(np.int16), AFFINE)
    image.header.set_slope_inter(0.01, 3)
    nibabel.save(image, tmp_path / "a.nii")
    read = nibabel.load(tmp_path / "a.nii")
    read.header.set_data_dtype(np.int16)
    stored = np.round(DATA * 100).astype(np.int16)
    content = bytearray((tmp_path / "a.nii").read_bytes())
    content[112:120] = np.array([0.01, 3], dtype="<f4").tobytes()  # scl_slope and scl_inter
    content[352 : 352 + stored.nbytes] = stored.tobytes(order="F")
    (tmp_path / "a.nii").write_bytes(content)
    np.testing.assert_allclose(read_volumes([tmp_path / "a.nii"], mask).rows[:], EXPECTED + 3, atol=0.0051)


def test_sessions_are_one_below_the_other(tmp_path, mask):
    paths = [
        save(tmp_path / f"{n}.nii{'.gz' * (n % 2)}", DATA[..., start:stop])
        for n, start, stop in ((0, 0, 4), (1, 4, 5), (2, 5, 9))
    ]
    paths += [save(tmp_path / "3.nii", DATA[..., 0])]  # one volume, without an axis of volumes
    read = read_volumes(paths, mask)
    assert read.n_of_files == (4, 1, 4, 1)
    np.testing.assert_array_equal(read.rows[:], EXPECTED[[*range(9), 0]])
    np.testing.assert_array_equal(rows_of(read.rows, np.array([9, 4, 0, 8])), EXPECTED[[0, 4, 0, 8]])


def test_nan_stays_and_a_mask_may_be_infinite_outside(tmp_path):
    data, inside = DATA.copy(), MASK.astype(np.float32)
    data[tuple(np.argwhere(MASK)[1])] = np.nan
    outside = tuple(np.argwhere(~MASK)[0])
    inside[outside] = np.inf
    read = read_volumes([save(tmp_path / "a.nii", data)], save(tmp_path / "mask.nii", inside))
    np.testing.assert_array_equal(np.isnan(read.rows[:]).sum(axis=0), [0, 9, *[0] * (MASK.sum() - 2)])


MASKS = {
    "another shape": (MASK[:4], AFFINE, r"the shape \(5, 4, 3\), as in .*; found \(4, 4, 3\)"),
    "another place": (MASK, AFFINE + np.eye(4)[:, [3]] @ [[0, 0, 0, 0]] + 0.01 * np.eye(4, k=3), "0.01 mm away"),
    "another voxel size": (MASK, AFFINE @ np.diag([1.001, 1, 1, 1]), "0.00801 mm away"),
    "empty": (np.zeros_like(MASK), AFFINE, "found no voxel inside"),
    "NaN": (np.where(MASK, np.nan, 1), AFFINE, "found NaN"),
    "negative": (MASK * np.float32(-1), AFFINE, "found -1"),
    "several volumes": (DATA, AFFINE, "a mask in one volume; found 9"),
}


@pytest.mark.parametrize("name", MASKS)
def test_masks_of_other_spaces_or_values_are_refused(tmp_path, name):
    values, affine, message = MASKS[name]
    path, mask = save(tmp_path / "a.nii", DATA), save(tmp_path / "mask.nii", values, affine)
    with pytest.raises(DataError, match=message) as error:
        read_volumes([path], mask)
    assert error.value.where == str(mask)


def test_a_mask_that_is_rounded_otherwise_is_taken(tmp_path, mask):
    path = save(tmp_path / "a.nii", DATA, AFFINE + 1e-5)
    np.testing.assert_array_equal(read_volumes([path], mask).rows[:], EXPECTED)


def test_sessions_of_other_spaces_are_refused(tmp_path):
    first = save(tmp_path / "a.nii", DATA)
    for other in (save(tmp_path / "b.nii", DATA[:4]), save(tmp_path / "c.nii", DATA, AFFINE + 0.1)):
        with pytest.raises(DataError, match=f"^{other}: "):
            read_volumes([first, other])


def test_files_that_were_cut_off_are_refused(tmp_path):
    path = save(tmp_path / "a.nii", DATA)
    content = path.read_bytes()
    path.write_bytes(content[:-4])
    with pytest.raises(DataError, match="expected a brain volume that can be read"):
        read_volumes([path])
    packed = tmp_path / "b.nii.gz"
    packed.write_bytes(gzip.compress(content)[:-200])
    with pytest.raises(DataError, match=r"b\.nii\.gz: expected an array that can be read"):
        rows_of(read_volumes([packed]).rows, np.array([8]))
    for name, text in {"c.nii": b"text", "d.gii": b"<GIFTI>", "e.nii.gz": b"text", "f.mgz": b"text"}.items():
        (tmp_path / name).write_bytes(text)
        with pytest.raises(DataError, match=f"{name}: expected a brain volume that can be read"):
            read_volumes([tmp_path / name])


def test_what_is_no_volume_of_real_numbers_is_refused(tmp_path):
    save(tmp_path / "a.nii", DATA.astype(np.complex64))
    save(tmp_path / "b.nii", DATA[..., None])
    save(tmp_path / "c.nii", DATA[:, :, 0, 0])
    for name, message in {"a": "complex64", "b": r"\(5, 4, 3, 9, 1\)", "c": r"\(5, 4\)"}.items():
        with pytest.raises(DataError, match=message):
            read_volumes([tmp_path / f"{name}.nii"])
    with pytest.raises(DataError, match=r"endings \.nii, .*; found '\.npy'"):
        (tmp_path / "a.npy").touch()
        read_volumes([tmp_path / "a.npy"])
    assert is_volume(Path("A.NII.GZ")) and is_volume(Path("a.func.gii")) and not is_volume(Path("a.gz"))


def test_overlays_of_vertices_have_no_positions(tmp_path):
    values = DATA.reshape(60, 1, 1, 9)
    read = read_volumes([save(tmp_path / "lh.mgh", values)])
    np.testing.assert_array_equal(read.rows[:], DATA.reshape(60, 9).T)
    assert read.positions is None


def test_labels_are_whole_numbers_of_the_same_voxels(tmp_path, mask):
    labels = np.arange(60).reshape(SHAPE) - 1
    read = read_labels(save(tmp_path / "rois.nii.gz", labels.astype(np.float32)), mask)
    assert read.values.dtype == np.int64 and read.names == {}
    np.testing.assert_array_equal(read.values, labels[MASK])
    for value in (0.5, np.nan):
        with pytest.raises(DataError, match=f"whole numbers as labels; found {value}"):
            read_labels(save(tmp_path / "rois.nii", np.where(MASK, value, 0)), mask)
    with pytest.raises(DataError, match="labels in one volume; found 9"):
        read_labels(save(tmp_path / "a.nii", DATA))


def test_large_labels_are_not_rounded(tmp_path):
    labels = np.where(MASK, 2**24 + 1, 0).astype(np.int32)
    assert set(read_labels(save(tmp_path / "a.nii", labels)).values) == {0, 2**24 + 1}


def save_gifti(path: Path, *arrays: tuple[np.ndarray, str], names: dict[int, str] | None = None) -> Path:
    table = gifti.GiftiLabelTable()
    for key, name in (names or {}).items():
        label = gifti.GiftiLabel(key, 1, 0, 0, 1)
        label.label = name
        table.labels.append(label)
    darrays = [gifti.GiftiDataArray(values, intent=f"NIFTI_INTENT_{intent}") for values, intent in arrays]
    nibabel.save(gifti.GiftiImage(darrays=darrays, labeltable=table), path)
    return path


VERTICES = np.random.default_rng(2).standard_normal((3, 20)).astype(np.float32)
NAMES = {0: "???", 1: "V1", 2: "V2"}


def test_each_array_of_a_gifti_file_is_a_row(tmp_path):
    path = save_gifti(tmp_path / "a.func.gii", *((row, "TIME_SERIES") for row in VERTICES))
    inside = np.arange(20) % 3 == 0
    mask = save_gifti(tmp_path / "mask.gii", (inside.astype(np.float32), "SHAPE"))
    read = read_volumes([path, path], mask)
    assert read.positions is None and read.n_of_files == (3, 3)
    np.testing.assert_array_equal(read.rows[:], np.concatenate([VERTICES, VERTICES])[:, inside])


def test_a_gifti_file_may_say_where_its_vertices_are(tmp_path):
    points = np.random.default_rng(3).standard_normal((20, 3)).astype(np.float32)
    triangles = np.array([[0, 1, 2]], dtype=np.int32)
    arrays = ((points, "POINTSET"), (triangles, "TRIANGLE"))
    read = read_volumes([save_gifti(tmp_path / "a.gii", *arrays, (VERTICES[0], "SHAPE"))])
    np.testing.assert_array_equal(read.rows[:], VERTICES[:1])
    np.testing.assert_array_equal(read.positions, points)
    with pytest.raises(DataError, match="arrays of one value for each vertex, of the same length; found none"):
        read_volumes([save_gifti(tmp_path / "b.gii", *arrays)])
    with pytest.raises(DataError, match=r"found shapes such as \(20,\) and \(19,\)"):
        read_volumes([save_gifti(tmp_path / "c.gii", (VERTICES[0], "SHAPE"), (VERTICES[1][:19], "SHAPE"))])


def test_labels_of_gifti_have_names(tmp_path):
    labels = (np.arange(20) % 3).astype(np.int32)
    read = read_labels(save_gifti(tmp_path / "a.label.gii", (labels, "LABEL"), names=NAMES))
    assert read.names == NAMES
    np.testing.assert_array_equal(read.values, labels)


SURFACE = cifti2.BrainModelAxis.from_mask(np.arange(30) % 3 > 0, "CORTEX_LEFT")
SUBCORTEX = cifti2.BrainModelAxis.from_mask(MASK, "THALAMUS_LEFT", AFFINE)
BOTH = SURFACE + SUBCORTEX
CIFTI = np.random.default_rng(4).standard_normal((7, len(BOTH))).astype(np.float32)


def save_cifti(path: Path, values: np.ndarray, rows: cifti2.Axis, columns: cifti2.Axis = BOTH) -> Path:
    nibabel.save(cifti2.Cifti2Image(values, header=(rows, columns)), path)
    return path


def test_cifti_is_rows_of_grayordinates(tmp_path):
    path = save_cifti(tmp_path / "a.dtseries.nii", CIFTI, cifti2.SeriesAxis(0, 1, 7))
    inside = np.arange(len(BOTH)) % 4 == 1
    scalar = cifti2.ScalarAxis(["mask"])
    mask = save_cifti(tmp_path / "mask.dscalar.nii", inside[None].astype(np.float32), scalar)
    read = read_volumes([path, path], mask)
    assert read.positions is None
    np.testing.assert_array_equal(rows_of(read.rows, np.array([13, 0, 2])), CIFTI[[6, 0, 2]][:, inside])
    np.testing.assert_array_equal(read_volumes([path]).rows[2:4, 5:9], CIFTI[2:4, 5:9])
    turned = save_cifti(tmp_path / "turned.dscalar.nii", inside[None].astype(np.float32), scalar, SUBCORTEX + SURFACE)
    with pytest.raises(DataError, match=r"the brain structures of .*; found others"):
        read_volumes([path], turned)


def test_cifti_of_voxels_has_positions(tmp_path):
    path = save_cifti(tmp_path / "a.dscalar.nii", EXPECTED, cifti2.ScalarAxis([str(n) for n in range(9)]), SUBCORTEX)
    read = read_volumes([path])
    np.testing.assert_allclose(read.positions, nibabel.affines.apply_affine(AFFINE, np.argwhere(MASK)), rtol=1e-5)
    np.testing.assert_array_equal(read.rows[:], EXPECTED)


def test_labels_of_cifti_have_names_and_parcels_are_refused(tmp_path):
    labels = np.arange(len(BOTH))[None] % 3
    axis = cifti2.LabelAxis(["areas"], [{key: (name, (1, 0, 0, 1)) for key, name in NAMES.items()}])
    read = read_labels(save_cifti(tmp_path / "a.dlabel.nii", labels.astype(np.float32), axis))
    assert read.names == NAMES
    np.testing.assert_array_equal(read.values, labels[0])
    parcels = cifti2.ParcelsAxis.from_brain_models([("V1", SUBCORTEX)])
    path = save_cifti(tmp_path / "a.pscalar.nii", np.ones((1, 1), np.float32), cifti2.ScalarAxis(["x"]), parcels)
    with pytest.raises(DataError, match="found axes of the kinds ScalarAxis and ParcelsAxis"):
        read_volumes([path])
