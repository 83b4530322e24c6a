"""The same planted ROIs are read from files of every form."""

import csv
from pathlib import Path

import h5py
import nibabel
import numpy as np
import pytest

from featcache.dataset.importing.rois import read_rois
from featcache.errors import DataError

SHAPE = (2, 3, 4)
LABELS = np.random.default_rng(0).integers(0, 4, SHAPE)
LABELS[0, 0, :3] = 1, 2, 3  # each is there
INSIDE = np.random.default_rng(1).random(SHAPE) < 0.6
INSIDE[0, 0, :3] = True
VALUES = LABELS[INSIDE]
NAMES = {1: "V1", 2: "V2", 3: "V4"}
PLANTED = {name: label == VALUES for label, name in NAMES.items()}
N = len(VALUES)


def write_csv(path: Path, columns: dict[str, list[object]]) -> str:
    with path.open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return str(path)


def assert_equal(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert found.keys() == expected.keys()
    for name, mask in expected.items():
        assert found[name].dtype == bool, name
        np.testing.assert_array_equal(found[name], mask, err_msg=name)


def numbered(stem: str) -> dict[str, np.ndarray]:
    return {f"{stem}-{label}": PLANTED[name] for label, name in NAMES.items()}


def test_masks(tmp_path):
    np.savez(tmp_path / "masks.npz", **{name: mask.astype(float) for name, mask in PLANTED.items()})
    assert_equal(read_rois([str(tmp_path / "masks.npz")], N, None), PLANTED)
    with h5py.File(tmp_path / "masks.h5", "w") as file:
        for name, mask in PLANTED.items():
            file[f"rois/{name}"] = mask
    assert_equal(read_rois([str(tmp_path / "masks.h5")], N, None), PLANTED)
    files = []
    for name, mask in PLANTED.items():
        np.save(tmp_path / f"{name}.npy", mask)
        files.append(str(tmp_path / f"{name}.npy"))
    assert_equal(read_rois(files, N, None), PLANTED)
    table = write_csv(
        tmp_path / "t.csv", {"vertex": list(range(N))} | {name: list(map(int, mask)) for name, mask in PLANTED.items()}
    )
    assert_equal(read_rois([table], N, None), PLANTED)


def test_labels(tmp_path):
    np.save(tmp_path / "area.npy", VALUES)
    assert_equal(read_rois([str(tmp_path / "area.npy")], N, None), numbered("area"))
    words = write_csv(tmp_path / "w.csv", {"area": [NAMES.get(value, "none") for value in VALUES.tolist()]})
    assert_equal(read_rois([words], N, None), PLANTED)
    numbers = write_csv(tmp_path / "n.csv", {"area": VALUES.tolist()})
    assert_equal(read_rois([numbers], N, None), numbered("area"))
    nibabel.save(nibabel.Nifti1Image(LABELS.astype(np.int16), np.eye(4)), tmp_path / "area.nii.gz")
    nibabel.save(nibabel.Nifti1Image(INSIDE.astype(np.uint8), np.eye(4)), tmp_path / "mask.nii.gz")
    assert_equal(read_rois([str(tmp_path / "area.nii.gz")], N, tmp_path / "mask.nii.gz"), numbered("area"))
    with pytest.raises(DataError, match=f"for each of {N} vertices; found {LABELS.size}"):
        read_rois([str(tmp_path / "area.nii.gz")], N, None)


def gifti(path: Path, names: dict[int, str]) -> str:
    array = nibabel.gifti.GiftiDataArray(VALUES.astype(np.int32), intent="NIFTI_INTENT_LABEL")
    table = nibabel.gifti.GiftiLabelTable()
    for key, name in names.items():
        table.labels.append(nibabel.gifti.GiftiLabel(key=key))
        table.labels[-1].label = name
    nibabel.save(nibabel.GiftiImage(darrays=[array], labeltable=table), path)
    return str(path)


def test_names_of_a_label_table(tmp_path):
    assert_equal(read_rois([gifti(tmp_path / "a.label.gii", {0: "???", **NAMES})], N, None), PLANTED)
    one = read_rois([gifti(tmp_path / "b.label.gii", {1: "early", 2: "early", 3: "???"})], N, None)
    assert_equal(one, {"early": PLANTED["V1"] | PLANTED["V2"]})  # two labels of one name are one ROI


def test_an_roi_without_a_vertex_is_kept(tmp_path):
    np.save(tmp_path / "empty.npy", np.zeros(N, bool))
    assert_equal(read_rois([str(tmp_path / "empty.npy")], N, None), {"empty": np.zeros(N, bool)})


@pytest.mark.parametrize("first", [0, 1])
def test_rows_of_a_table_go_by_their_numbers(first, tmp_path):
    order = np.random.default_rng(0).permutation(N)
    columns = {"V1": PLANTED["V1"][order].astype(int).tolist(), "neuron": (order + first).tolist()}
    assert_equal(read_rois([write_csv(tmp_path / "t.csv", columns)], N, None), {"V1": PLANTED["V1"]})


@pytest.mark.parametrize("numbers", [[0] * N, [*range(N - 1), N], [*range(2, N + 2)], ["a"] * N])
def test_numbers_of_vertices_that_are_no_numbering_are_refused(numbers, tmp_path):
    columns = {"neuron": numbers, "V1": PLANTED["V1"].astype(int).tolist()}
    with pytest.raises(DataError, match="column 'neuron': expected the number of each vertex once, from 0 or from 1"):
        read_rois([write_csv(tmp_path / "t.csv", columns)], N, None)


@pytest.mark.parametrize(
    ("columns", "words"),
    [
        ({"index": list(range(N))}, "expected columns of ROIs; found index"),
        ({"V1": [0] * N, "area": ["V1", *["V2"] * (N - 1)]}, "an ROI once; found V1 again"),
        ({"area": ["V1", *["V2"] * (N - 1)], "V1": [0] * N}, "an ROI once; found V1 again"),
    ],
)
def test_tables_that_say_nothing_or_the_same_twice(columns, words, tmp_path):
    with pytest.raises(DataError, match=words):
        read_rois([write_csv(tmp_path / "t.csv", columns)], N, None)


def test_two_arrays_of_one_name_in_a_file(tmp_path):
    with h5py.File(tmp_path / "masks.h5", "w") as file:
        file["lh/V1"], file["rh/V1"] = PLANTED["V1"], PLANTED["V2"]
    with pytest.raises(DataError, match=r"masks.h5:rh/V1: expected an ROI once"):
        read_rois([str(tmp_path / "masks.h5")], N, None)
    assert_equal(read_rois([f"{tmp_path / 'masks.h5'}:rh/V1"], N, None), {"V1": PLANTED["V2"]})


def test_numbers_that_are_no_labels(tmp_path):
    np.save(tmp_path / "p.npy", np.linspace(0, 1, N))
    with pytest.raises(DataError, match=r"0 and 1, or whole numbers .* found 0.0"):
        read_rois([str(tmp_path / "p.npy")], N, None)
    np.save(tmp_path / "many.npy", np.arange(1500))
    with pytest.raises(DataError, match="at most 1000 regions; found 1,499 of them"):
        read_rois([str(tmp_path / "many.npy")], 1500, None)
