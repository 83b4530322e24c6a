"""What the files of an import hold, put together: trials, their sessions, and what was recorded in them."""

import numpy as np
import pytest

from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from support.lab import N_VERTICES, Lab


@pytest.fixture
def here(tmp_path) -> Lab:
    return Lab(tmp_path, np.empty(0))


def saved(here: Lab, *lengths: int) -> tuple[str, ...]:
    return tuple(str(here.save(f"{i}.npy", np.full((n, N_VERTICES), i))) for i, n in enumerate(lengths))


def test_each_file_is_a_session_unless_a_table_says_other(lab, here):
    names = lab.names[:9]
    table = here.table("t.csv", image=names, run=list("aabbaabbb"))
    files = saved(here, 4, 3, 2)
    options = {"images": str(lab.photos), "table": table, "responses": files}
    by_file = read_material(ImportConfig(**options))
    assert by_file.session.tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2]
    by_column = read_material(ImportConfig(**options, session_column="run"))
    called = [by_column.session_names[number] for number in by_column.session]
    assert called == list("aabbaabbb")
    np.testing.assert_array_equal(by_file.recordings["all"].trials[:, :1].ravel(), [0, 0, 0, 0, 1, 1, 1, 2, 2])


def test_one_file_tells_no_session(lab, here):
    config = ImportConfig(images=str(lab.photos), responses=saved(here, len(lab.names)), subject="anna")
    material = read_material(config)
    assert material.session is None and material.name == "anna" and list(material.recordings) == ["all"]


def test_test_responses_are_a_session_of_their_own(lab, here):
    pictures = str(here.save("p.npy", np.zeros((7, 4, 4, 3), np.uint8)))
    train = saved(here, 4, 3)
    test = str(here.save("test.npy", np.zeros((len(lab.names), N_VERTICES))))
    config = ImportConfig(images=pictures, responses=train, test_images=str(lab.photos), test_responses=(test,))
    material = read_material(config)
    assert material.session.tolist() == [0] * 4 + [1] * 3 + [2] * len(lab.names)
    assert material.session_names == ("file 1", "file 2", "the test images")
    assert len(material.recordings["all"].trials) == len(material.shown) == 7 + len(lab.names)
