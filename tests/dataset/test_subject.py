"""A subject gives rows of images, and a dataset the subjects that were asked for."""

from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.subject import Dataset, Fault, Images, Subject, listed
from featcache.errors import DataError


def images(*ids: int) -> Images:
    return Images(tuple(Path(f"{image_id}.png") for image_id in ids), np.array(ids))


def subject(name: str, folder: Path = Path()) -> Subject:
    """Two training images and one test image; one surface, of another name than the challenge's."""
    nothing = {"V4": None}
    paths = {"V4": folder / "responses.npy"}
    return Subject(name, images(7, 3), images(5), paths, {"V4": 4}, {"V4": {}}, nothing, nothing)


@pytest.fixture
def two() -> Dataset:
    return Dataset(Path("root"), (subject("subj01"), subject("subj02")))


def test_rows_are_training_images_and_then_test_images(tmp_path):
    person = subject("subj01", tmp_path)
    responses = np.arange(8, dtype=np.float32).reshape(2, 4)
    np.save(tmp_path / "responses.npy", responses)
    assert person.surfaces == ("V4",) and len(person.train) == 2
    assert person.image_ids.tolist() == [7, 3, 5]
    assert [path.name for path in person.image_sources] == ["7.png", "3.png", "5.png"]
    assert isinstance(person.responses("V4"), np.memmap) and np.array_equal(person.responses("V4"), responses)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [("all", [0, 1]), ("2", [1]), ("subj02", [1]), ("2,1", [1, 0]), ("1,1,subj01", [0])],
)
def test_subjects_are_selected_by_number_or_name(two, names, chosen):
    assert two.select(names) == tuple(two.subjects[number] for number in chosen)


@pytest.mark.parametrize("names", ["1,3", "subj03", "1,subj03"])
def test_a_subject_that_is_not_there_is_refused(two, names):
    with pytest.raises(DataError, match="--subject: expected one of subj01, subj02; found 'subj03'"):
        two.select(names)


def test_a_fault_is_one_line():
    assert str(Fault(Path("a.npy"), "3 rows", "2")) == "a.npy: expected 3 rows; found 2"


@pytest.mark.parametrize(("n_values", "text"), [(0, ""), (5, "0, 1, 2, 3, 4"), (6, "0, 1, 2, 3, 4, ...")])
def test_long_lists_are_cut(n_values, text):
    assert listed(np.arange(n_values)) == text
