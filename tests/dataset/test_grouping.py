"""What --split names becomes groups over all subjects, which the work folder remembers."""

import json
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from featcache.dataset.grouping import recall, split_of
from featcache.dataset.splits import BY_ID, SplitKey, refuse_leak
from featcache.errors import ConfigError, DataError, StoreError
from featcache.workdir import Workdir
from support.shown import seen

SESSIONS = st.lists(
    st.dictionaries(st.integers(0, 60), st.sampled_from("pqrstuvw"), min_size=3), min_size=1, max_size=3
)


def subjects_of(*sessions, n_test=0):
    """Subjects who saw images in sessions, {id: session}."""
    return [
        seen(f"subj{number:02d}", list(of_subject), n_test, columns={"session": list(of_subject.values())})
        for number, of_subject in enumerate(sessions, 1)
    ]


def slow_groups(sessions):
    """{id: ids that must be with it}, by looking again until nothing changes."""
    together = {i: {i} for of_subject in sessions for i in of_subject}
    while True:
        before = {i: set(ids) for i, ids in together.items()}
        for one in sessions:
            for other in sessions:
                for i, value in one.items():
                    for j, same in other.items():
                        if value == same:
                            together[i] |= together[j]
        if before == together:
            return together


def test_the_default_is_by_image_id_and_writes_nothing(tmp_path):
    assert split_of("id", subjects_of({1: "a"}), tmp_path) is BY_ID is recall(SplitKey(), tmp_path)
    assert list(tmp_path.iterdir()) == []


@settings(deadline=None, max_examples=40)
@given(SESSIONS, st.integers(2, 5), st.integers(0, 9))
def test_images_of_a_session_of_any_subject_share_a_fold(tmp_path_factory, sessions, n_folds, seed):
    subjects, expected = subjects_of(*sessions), slow_groups(sessions)
    work = tmp_path_factory.mktemp("work")
    if len(next(iter(expected.values()))) == len(expected):
        with pytest.raises(DataError, match="expected two or more groups of images; found one group of all"):
            split_of("session", subjects, work)
        return
    split = split_of("session", subjects, work)
    for i, ids in expected.items():
        assert {j for j, group in split.groups.items() if group == split.groups[i]} == ids
    again = split_of("column:session", subjects[::-1], work)
    assert again == split == recall(split.key, work)
    for fold in range(n_folds):
        sides = [
            np.concatenate([s.train.ids[(split.folds(s.train.ids, n_folds, seed) == fold) == side] for s in subjects])
            for side in (False, True)
        ]
        refuse_leak(*sides, "a head", split)


def test_an_image_with_trials_in_several_sessions_makes_one_group_of_them(tmp_path):
    """As import writes them: else its trials in a session would be in another fold than those of other images."""
    split = split_of("session", subjects_of({1: "p", 2: "p+q", 3: "q", 4: "r", 5: "r+s", 6: "s"}), tmp_path)
    assert split.groups == {1: "p", 2: "p", 3: "p", 4: "r", 5: "r", 6: "r"}
    with pytest.raises(DataError, match="found one group of all 3 training images"):
        split_of("session", subjects_of({1: "p+q", 2: "q+r", 3: "r"}), tmp_path)


def test_test_images_decide_nothing(tmp_path):
    """A test image is in no fold: its session unites no others, and as a training image of another it has theirs."""
    first, second = {1: "a", 2: "b", 3: "a"}, {3: "c", 4: "c", 5: "d"}
    subjects = [*subjects_of(first, n_test=1), replace(subjects_of(second)[0], name="subj02")]
    assert split_of("session", subjects, tmp_path).groups == {1: "a", 2: "b", 3: "c", 4: "c", 5: "d"}


def test_images_without_a_value_are_counted_and_drawn_by_id(tmp_path, monkeypatch):
    lines = []
    monkeypatch.setattr("featcache.dataset.grouping.say", lines.append)
    split = split_of("session", subjects_of({1: "a", 2: "", 3: "b", 4: ""}, {2: "b", 5: "a"}), tmp_path)
    assert split.groups == {1: "a", 2: "b", 3: "b", 5: "a"}
    assert lines == ["--split session: 1 training images have no value there; they are drawn by image id"]


@pytest.mark.parametrize(
    ("columns", "line"),
    [
        ([("run", "kind"), ("kind", "run")], "expected a column of images that every subject has: run, kind; found "
         "'session'; choose one of those"),
        ([("session", "kind"), ("kind",)], "every subject has: kind; found 'session', which subj02 has not; choose"),
        ([(), ()], "every subject has: this dataset has none; found 'session'; use --split id, cluster or file:PATH"),
    ],
)  # fmt: skip
def test_a_column_that_is_missing_is_one_line_with_those_that_are_there(tmp_path, columns, line):
    subjects = [seen(f"subj0{k}", [1, 2], columns=dict.fromkeys(names, "ab")) for k, names in enumerate(columns, 1)]
    with pytest.raises(DataError) as refused:
        split_of("session", subjects, tmp_path)
    assert str(refused.value).startswith("--split column:session: ") and line in str(refused.value)


@pytest.mark.parametrize("value", ["", "sessions", "column:", "file:", "column", "ID"])
def test_what_names_no_split_is_refused(tmp_path, value):
    with pytest.raises(ConfigError, match="--split: expected id, session, column:NAME, cluster or file:PATH; found"):
        split_of(value, [], tmp_path)


def test_files_and_clusters_are_splits_too(tmp_path, monkeypatch):
    path = tmp_path / "there" / "groups.json"
    path.parent.mkdir()
    path.write_text(json.dumps({"1": "a", "2": "b", "3": "b"}))
    subjects = subjects_of({1: "a", 2: "b", 3: "c"})
    split = split_of(f"file:{path}", subjects, tmp_path)
    assert split.name == "file:groups.json" and split.groups == {1: "a", 2: "b", 3: "b"}
    path.unlink()
    assert recall(split.key, tmp_path) == split
    monkeypatch.setattr("featcache.dataset.grouping.cluster_images", lambda *_: {1: "x", 2: "x", 3: "y"})
    assert split_of("cluster", subjects, tmp_path).key.name == "cluster"
    assert len(list(Workdir(tmp_path).splits.iterdir())) == 2


def test_a_split_that_is_lost_or_damaged_is_one_line_and_comes_back(tmp_path):
    subjects = subjects_of({1: "a", 2: "b", 3: "c"})
    split = split_of("session", subjects, tmp_path)
    path = Workdir(tmp_path).split(split.digest)
    for fault, damage in (
        ("no such file", path.unlink),
        ("a damaged file", lambda: path.write_text(path.read_text().replace("[2]", "[5]"))),
        ("a damaged file", lambda: path.write_text("{")),
    ):
        damage()
        with pytest.raises(StoreError, match=f"the groups of --split session; found {fault}; run 'fit-heads --split"):
            recall(split.key, tmp_path)
        assert recall(split_of("session", subjects, tmp_path).key, tmp_path) == split
