"""What is handed in is what was predicted, to 16 bits, the same bytes every time, and refused where it is wrong."""

from __future__ import annotations

import io
import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

import heads.blend.submission
from featcache.dataset.subject import Images, Subject
from featcache.errors import FeatcacheError
from heads.blend.submission import check_submission, prediction_name, write_predictions, write_zip
from heads.scores.metrics import pearson_r

N_TEST = {"subj01": 5, "subj02": 7}
N_VERTICES = {"subj01": {"lh": 4, "rh": 6}, "subj02": {"lh": 3, "rh": 5}}
FLOAT32 = np.finfo(np.float32)


def images(n_images):
    return Images(tuple(Path(f"{row}.png") for row in range(n_images)), np.arange(n_images))


@pytest.fixture
def subjects(tmp_path):
    nothing = {"lh": None, "rh": None}
    return [
        Subject(name, images(9), images(n_test), {}, N_VERTICES[name], {"lh": {}, "rh": {}}, nothing, nothing)
        for name, n_test in N_TEST.items()
    ]


@pytest.fixture
def folder(tmp_path, subjects):
    """Predictions of every subject, written."""
    for subject in subjects:
        for hemisphere in ("lh", "rh"):
            write_predictions(tmp_path / "submission", subject, hemisphere, predictions_of(subject, hemisphere))
    return tmp_path / "submission"


def predictions_of(subject, hemisphere):
    shape = (len(subject.test), subject.n_vertices[hemisphere])
    return np.random.default_rng(len(hemisphere) + shape[1]).normal(size=shape)


def members(path):
    with zipfile.ZipFile(path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zip_of(path, files):
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return path


def as_npy(array):
    buffer = io.BytesIO()
    np.save(buffer, array)
    return buffer.getvalue()


def rounded(values):
    return heads.blend.submission._rounded(np.asarray(values))


def test_predictions_come_back(folder, subjects, tmp_path):
    path = write_zip(folder, subjects, tmp_path / "submission.zip")
    found = members(path)
    assert list(found) == [f"{name}/{h}_pred_test.npy" for name in N_TEST for h in ("lh", "rh")]
    for subject in subjects:
        for hemisphere in ("lh", "rh"):
            array = np.load(io.BytesIO(found[prediction_name(subject, hemisphere)]))
            assert array.dtype == np.float32
            np.testing.assert_allclose(array, predictions_of(subject, hemisphere), rtol=2**-16)


def test_the_same_predictions_give_the_same_bytes(folder, subjects, tmp_path):
    first = write_zip(folder, subjects, tmp_path / "first.zip").read_bytes()
    for file in folder.rglob("*.npy"):
        os.utime(file, (1e9, 1e9))
    assert write_zip(folder, subjects, tmp_path / "second.zip").read_bytes() == first


def test_nothing_half_written_is_left(folder, subjects, tmp_path):
    write_zip(folder, subjects, tmp_path / "submission.zip")
    assert not [path for path in tmp_path.rglob(".*")]


def test_a_zip_that_is_right_is_accepted(folder, subjects, tmp_path):
    path = write_zip(folder, subjects, tmp_path / "submission.zip")
    check_submission(path, subjects)
    # Members in another order are the same submission.
    check_submission(zip_of(tmp_path / "other.zip", reversed(members(path).items())), subjects)


def changed(name, array):
    def change(files):
        return {**files, name: as_npy(array)}

    return change


def without(files):
    return {name: content for name, content in files.items() if name != "subj02/rh_pred_test.npy"}


WRONG = {
    "a row less": changed("subj01/lh_pred_test.npy", np.zeros((4, 4), dtype=np.float32)),
    "a vertex more": changed("subj01/lh_pred_test.npy", np.zeros((5, 5), dtype=np.float32)),
    "hemispheres swapped": changed("subj01/rh_pred_test.npy", np.zeros((5, 4), dtype=np.float32)),
    "transposed": changed("subj02/lh_pred_test.npy", np.zeros((3, 7), dtype=np.float32)),
    "another dimension": changed("subj01/lh_pred_test.npy", np.zeros((5, 4, 1), dtype=np.float32)),
    "float64": changed("subj01/lh_pred_test.npy", np.zeros((5, 4))),
    "float16": changed("subj01/lh_pred_test.npy", np.zeros((5, 4), dtype=np.float16)),
    "big-endian": changed("subj01/lh_pred_test.npy", np.zeros((5, 4), dtype=">f4")),
    "NaN": changed("subj01/lh_pred_test.npy", np.full((5, 4), np.nan, dtype=np.float32)),
    "one infinity": changed("subj01/lh_pred_test.npy", np.pad(np.float32([[-np.inf]]), ((4, 0), (0, 3)))),
    "pickled": changed("subj01/lh_pred_test.npy", np.array([{"a": 1}], dtype=object)),
    "no array": lambda files: {**files, "subj01/lh_pred_test.npy": b"not an array"},
    "cut short": lambda files: {**files, "subj01/lh_pred_test.npy": files["subj01/lh_pred_test.npy"][:-1]},
    "a file less": without,
    "a file more": lambda files: {**files, "subj03/lh_pred_test.npy": files["subj01/lh_pred_test.npy"]},
    "a stray file": lambda files: {**files, "__MACOSX/x": b""},
    "in a folder": lambda files: {f"submission/{name}": content for name, content in files.items()},
    "empty": lambda files: {},
}


@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_a_zip_that_is_wrong_is_refused(change, folder, subjects, tmp_path):
    right = members(write_zip(folder, subjects, tmp_path / "submission.zip"))
    path = zip_of(tmp_path / "wrong.zip", change(right).items())
    with pytest.raises(FeatcacheError, match=r"wrong\.zip: expected"):
        check_submission(path, subjects)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_file_that_is_there_twice_is_refused(folder, subjects, tmp_path):
    right = members(write_zip(folder, subjects, tmp_path / "submission.zip"))
    path = zip_of(tmp_path / "wrong.zip", [*right.items(), next(iter(right.items()))])
    with pytest.raises(FeatcacheError, match=r"wrong\.zip: expected"):
        check_submission(path, subjects)


def test_what_is_no_zip_is_refused(subjects, tmp_path):
    path = tmp_path / "wrong.zip"
    path.write_bytes(b"not a zip")
    with pytest.raises(FeatcacheError, match=r"wrong\.zip: expected"):
        check_submission(path, subjects)


def test_a_zip_above_the_limit_is_refused(folder, subjects, tmp_path, monkeypatch):
    path = write_zip(folder, subjects, tmp_path / "submission.zip")
    size = path.stat().st_size
    monkeypatch.setattr(heads.blend.submission, "MAX_BYTES", size)
    check_submission(path, subjects)
    monkeypatch.setattr(heads.blend.submission, "MAX_BYTES", size - 1)
    with pytest.raises(FeatcacheError, match=f"at most {size - 1:,} bytes; found {size:,}"):
        check_submission(path, subjects)


def test_predictions_that_are_wrong_do_not_replace_a_zip_that_is_right(folder, subjects, tmp_path):
    path = write_zip(folder, subjects, tmp_path / "submission.zip")
    right = path.read_bytes()
    write_predictions(folder, subjects[0], "lh", np.full((5, 4), np.nan))
    with pytest.raises(FeatcacheError, match="expected finite values in subj01/lh_pred_test"):
        write_zip(folder, subjects, path)
    assert path.read_bytes() == right


def test_every_subject_is_needed(folder, subjects, tmp_path):
    path = write_zip(folder, subjects[:1], tmp_path / "submission.zip")
    check_submission(path, subjects[:1])
    with pytest.raises(FeatcacheError, match="expected the files"):
        check_submission(path, subjects)


normal = st.floats(float(FLOAT32.smallest_normal), float(FLOAT32.max), width=32)


@pytest.mark.slow
@settings(max_examples=300)
@given(arrays(np.float32, 20, elements=normal), st.sampled_from([-1, 1]))
def test_rounding_changes_less_than_its_last_bit(values, sign):
    values = sign * values
    error = np.abs(rounded(values).astype(np.float64) - values.astype(np.float64))
    assert (error < 2**-16 * np.abs(values.astype(np.float64))).all()


@pytest.mark.parametrize("sign", [-1, 1])
def test_rounding_at_the_ends_of_the_range(sign):
    largest = sign * np.nextafter(FLOAT32.max, np.float32(0), dtype=np.float32)
    values = np.array([FLOAT32.max * sign, largest, FLOAT32.smallest_subnormal * sign, 0], dtype=np.float32)
    result = rounded(values)
    assert np.isfinite(result).all()
    np.testing.assert_allclose(result[:2], values[:2], rtol=2**-15)
    assert np.abs(result[2:]).max() < FLOAT32.smallest_normal


def test_rounding_is_to_the_nearest():
    values = np.random.default_rng(0).uniform(1, 2, 10_000).astype(np.float32)
    expected = np.floor(values.astype(np.float64) * 2**15 + 0.5) / 2**15
    np.testing.assert_array_equal(rounded(values), expected)
    assert abs((rounded(values) - values.astype(np.float64)).mean()) < 2**-20  # neither up nor down on the whole


def test_rounding_keeps_what_is_short_enough():
    values = np.array([0, 1, -1, 0.5, 65_535, -3.140625, 2.0**-100], dtype=np.float32)
    np.testing.assert_array_equal(rounded(values), values)
    np.testing.assert_array_equal(rounded(rounded(values * 1.1)), rounded(values * 1.1))


def test_rounding_hides_no_number_that_is_none():
    bits = np.array([0x7FC00000, 0x7FFFFFFF, 0xFFFFFFFF, 0x7F800001, 0x7F800000, 0xFF800000], dtype=np.uint32)
    result = rounded(bits.view(np.float32))
    assert np.isnan(result[:4]).all()
    np.testing.assert_array_equal(result[4:], [np.inf, -np.inf])


def test_rounding_leaves_its_argument_and_takes_any_layout():
    values = np.random.default_rng(0).normal(size=(6, 8)).astype(np.float32)
    before = values.copy()
    np.testing.assert_array_equal(rounded(values[:, ::2]), rounded(values)[:, ::2])
    np.testing.assert_array_equal(rounded(np.asfortranarray(values)), rounded(values))
    np.testing.assert_array_equal(values, before)


def test_rounding_does_not_show_in_r():
    rng = np.random.default_rng(0)
    responses = rng.normal(size=(300, 50))
    predictions = (0.2 * responses + 0.1 * rng.normal(size=responses.shape)).astype(np.float32)
    r, r_rounded = pearson_r(predictions, responses), pearson_r(rounded(predictions), responses)
    assert np.abs(r - r_rounded).max() < 1e-6
    assert not np.array_equal(predictions, rounded(predictions))


def test_rounding_makes_room():
    predictions = np.random.default_rng(0).normal(size=(200, 100)).astype(np.float32)
    size = {}
    for name, values in {"plain": predictions, "rounded": rounded(predictions)}.items():
        archive = io.BytesIO()
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=6) as target:
            target.writestr("x", values.tobytes())
        size[name] = len(archive.getvalue())
    assert size["rounded"] < 0.85 * size["plain"]
    # A full submission is 318 MB before compression.
    assert size["rounded"] / predictions.nbytes * 318e6 < heads.blend.submission.MAX_BYTES
