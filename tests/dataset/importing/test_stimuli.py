"""Trials are matched with the pictures that were shown in them, whatever the order of either."""

import shutil
from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.stimuli import ids_of, images_of_table, numbered_sessions, read_shown
from featcache.errors import DataError
from support.lab import N_IMAGES, N_TEST, Lab

N = N_IMAGES + N_TEST


def shown(n_rows: int, n_test: int = 0, **options):
    return read_shown(ImportConfig(responses=("x.npy",), **options), n_rows, n_test, n_columns=3)


@pytest.fixture
def here(tmp_path) -> Lab:
    """A folder for tables of the lab's photos."""
    return Lab(tmp_path, np.empty(0))


def test_every_trial_of_a_table_has_its_own_picture(lab, here):
    names = np.random.default_rng(0).choice(lab.names, 80).tolist()
    found = shown(80, images=str(lab.photos), table=here.table("t.csv", image=names))
    assert [found.stimuli.sources[number].name for number in found.stimulus] == names
    assert [source.name for source in found.stimuli.sources] == list(dict.fromkeys(names))
    assert not found.stimuli.test.any() and found.stimuli.ids is None and found.sessions is None


def test_images_of_a_table_lie_beside_it_where_no_folder_is_named(lab, here):
    shutil.copytree(lab.photos, here.folder / "nested")
    table = here.table("t.csv", image=[f"nested/{name}" for name in lab.names[:4]])
    assert [source.name for source in shown(4, table=table).stimuli.sources] == lab.names[:4]
    absolute = here.table("a.csv", image=[str(lab.photos / name) for name in lab.names[:4]])
    assert shown(4, table=absolute).stimuli.sources == tuple(lab.photos / name for name in lab.names[:4])


def test_rows_of_an_array_are_pictures(here):
    pictures = here.save("p.npy", np.zeros((9, 4, 4, 3), np.uint8))
    in_order = shown(9, images=str(pictures)).stimuli.sources
    assert [(source.path, source.row) for source in in_order] == [(pictures, row) for row in range(9)]
    rows = [8, 2, 2, 0]
    found = shown(4, images=str(pictures), table=here.table("t.csv", image=rows))
    assert [found.stimuli.sources[number].row for number in found.stimulus] == rows


def test_a_folder_is_read_in_the_order_of_its_names_and_what_else_is_in_it_is_said(lab, here):
    for name in ("b 2.png", "a 10.png", "c 1.png"):
        shutil.copy(lab.photos / lab.names[0], here.folder / name)
    for name in (".hidden.png", "notes.txt"):
        (here.folder / name).write_text("x")
    (here.folder / "more").mkdir()
    found = shown(3, images=str(here.folder))
    assert [source.name for source in found.stimuli.sources] == ["a 10.png", "b 2.png", "c 1.png"]
    assert len(found.notes) == 1 and "more, notes.txt" in found.notes[0] and "hidden" not in found.notes[0]


@pytest.mark.parametrize(
    ("names", "clear"),
    [
        (["img1.png", "img2.png", "img10.png"], False),
        (["img01.png", "img02.png", "img10.png"], True),
        (["a1_2.png", "a1_10.png"], False),
        (["a1.png", "b1.png", "b2.png"], True),
        (["9.png", "10.png"], False),
        (["a.png", "b10.png", "c9.png"], True),
    ],
)
def test_names_whose_order_could_mean_either_are_refused(names, clear, lab, here):
    for name in names:
        shutil.copy(lab.photos / lab.names[0], here.folder / name)
    if clear:
        assert [source.name for source in shown(len(names), images=str(here.folder)).stimuli.sources] == names
    else:
        with pytest.raises(DataError, match="order is the same as texts and as numbers"):
            shown(len(names), images=str(here.folder))


def test_test_images_come_last_with_and_without_responses(lab, here):
    pictures = str(here.save("p.npy", np.zeros((4, 4, 4, 3), np.uint8)))
    for n_test in (0, N):
        found = shown(4, n_test, images=pictures, test_images=str(lab.photos))
        assert found.stimuli.test.tolist() == [False] * 4 + [True] * N
        assert found.stimulus.tolist() == list(range(4 + n_test))


def test_a_split_column_says_what_is_test(lab, here):
    split = ["Train", "training", "TEST", "test", "train"]
    table = here.table("t.csv", image=lab.names[:5], part=split)
    found = shown(5, images=str(lab.photos), table=table, split_column="part")
    assert found.stimuli.test.tolist() == [False, False, True, True, False]


def test_columns_of_pictures_are_kept_and_those_of_trials_are_not(lab, here):
    names = [lab.names[number] for number in (0, 1, 0, 2, 1)]
    table = here.table(
        "t.csv", image=names, kind=list("abaab"), subject_said=list("vwxyz"), run=[1, 1, 5, 5, 5], id=range(5)
    )
    found = shown(5, images=str(lab.photos), table=table, session_column="run")
    assert found.stimuli.columns == {"session": ("1+5", "1+5", "5"), "kind": ("a", "b", "a")}
    assert found.sessions == ("1", "1", "5", "5", "5")
    assert any("subject_said" in note and "differ between trials" in note for note in found.notes)
    assert any(note.endswith(": id") for note in found.notes)


def test_numbers_are_ids_as_they_are_and_names_are_digests():
    path = Path("t.csv")
    assert ids_of(["13", "0", "007", str(2**63 - 1)], path, "id").tolist() == [13, 0, 7, 2**63 - 1]
    names = ["dog", "cat", "dog", "1.5"]
    ids = ids_of(names, path, "id")
    assert ids.dtype == np.int64 and ids.min() >= 0
    assert ids[0] == ids[2] and len(set(ids.tolist())) == 3
    assert ids_of(names[::-1], path, "other")[::-1].tolist() == ids.tolist()  # nothing else matters


def test_one_picture_under_two_ids_stays_apart_until_it_is_looked_at(lab, here):
    table = here.table("t.csv", image=[lab.names[0]] * 3, key=[4, 5, 4])
    found = shown(3, images=str(lab.photos), table=table, id_column="key")
    assert found.stimuli.ids.tolist() == [4, 5] and found.stimulus.tolist() == [0, 1, 0]


def test_trials_of_test_images_are_a_session_of_their_own_whatever_others_are_called():
    number, names = numbered_sessions(["b", "the test images", "b", "a"], n_test=2)
    assert [names[n] for n in number] == ["b", "the test images", "b", "a", "the test images", "the test images"]
    assert number[4] == number[5] and number[4] not in number[:4]
    assert numbered_sessions(["b", "b"], 0)[0].tolist() == [0, 0]


def test_images_of_a_table_are_listed_once_without_those_that_are_not_there(lab, here):
    table = here.table("t.csv", image=[lab.names[1], "no.png", lab.names[1], lab.names[0]])
    config = ImportConfig(responses=("x.npy",), images=str(lab.photos), table=table)
    assert images_of_table(config) == [lab.photos / lab.names[1], lab.photos / lab.names[0]]
    assert images_of_table(ImportConfig(responses=("x.npy",), images=str(lab.photos))) == []


def test_ids_that_a_program_wrote_as_fractions_are_the_same_ids():
    assert ids_of(["13.0", "7.0"], Path("t.csv"), "id").tolist() == [13, 7]
    assert ids_of(["1.5", "7"], Path("t.csv"), "id").tolist() != [1, 7]  # names
