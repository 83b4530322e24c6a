"""Splits as files say them: every form gives the same groups, and what a file does not say is said in one line."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from featcache.dataset.split_files import read_split
from featcache.errors import DataError
from support.shown import seen

IDS = list(range(100, 120))


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr("featcache.dataset.split_files.say", lines.append)
    return lines


@pytest.fixture
def subjects():
    """Images 100 to 119; 118 and 119 are test images of the second subject, of which the first saw 118 in training."""
    names = {i: f"stimuli/cluster_{i}.jpg" for i in IDS}
    parts = [("subj01", [*IDS[:12], 118], 0), ("subj02", [*IDS[10:18], 118, 119], 2)]
    return [seen(name, ids, n_test, columns={"name": [names[i] for i in ids]}) for name, ids, n_test in parts]


def written(tmp_path, content, name="split.json"):
    path = tmp_path / name
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def names_of(i):
    """Every way in which a file may name an image."""
    return [str(i), f"{i:05d}", f"{i:05d}.png", f"images/{i:05d}.png", f"cluster_{i}.jpg", f"a\\b\\{i:05d}.png"]


@pytest.mark.parametrize("form", range(6))
def test_images_go_by_id_by_file_and_by_the_text_of_a_column(tmp_path, subjects, form):
    path = written(tmp_path, {names_of(i)[form]: f"g{i % 3}" for i in IDS})
    split = read_split(path, subjects)
    assert split.name == "file:split.json" and not split.alone and not split.numbers
    assert split.groups == {i: f"g{i % 3}" for i in [*IDS[:18], 118]}  # 119 is a test image for everyone


GROUPS = {"a": IDS[:7], "b": IDS[7:13], "c": IDS[13:]}
FORMS = {
    "groups.json": json.dumps({str(i): group for group, ids in GROUPS.items() for i in ids}),
    "lists.json": json.dumps({group: [str(i) for i in ids] for group, ids in GROUPS.items()}),
    "nested.json": json.dumps(
        {"cutoffs": {"clip": 0.25}, "groups": [[f"{i:05d}.png" for i in ids] for ids in GROUPS.values()]}
    ),
    "plain.json": json.dumps([[i for i in ids] for ids in GROUPS.values()]),
    "groups.csv": "id,group\n" + "".join(f"{i},{group}\n" for group, ids in GROUPS.items() for i in ids),
    "excel.csv": "\ufeffImage,Group\r\n" + "".join(f"{i:05d}.png,{g}\r\n" for g, ids in GROUPS.items() for i in ids),
    "groups.tsv": "name\tweight\tgroup\n" + "".join(f"{i}\t1\t{g}\n" for g, ids in GROUPS.items() for i in ids),
}


@pytest.mark.parametrize("name", FORMS)
def test_every_form_gives_the_same_folds(tmp_path, subjects, said, name):
    split = read_split(written(tmp_path, FORMS[name], name), subjects)
    expected = read_split(written(tmp_path, FORMS["groups.json"]), subjects)
    ids = np.array([*IDS[:18], 118])
    for n_folds in (2, 3):
        assert split.folds(ids, n_folds, 1).tolist() == expected.folds(ids, n_folds, 1).tolist()
    assert said == []


def test_folds_of_a_table_are_the_folds(tmp_path, subjects):
    path = written(tmp_path, "id,fold\n" + "".join(f"{i},{i % 4}\n" for i in IDS), "folds.csv")
    assert read_split(path, subjects).folds(IDS[:18], 4, 9).tolist() == [i % 4 for i in IDS[:18]]


TRAIN, TEST = IDS[:12], [*IDS[12:18], 118, 119]
LAION = {
    "name": "ood",
    "pool": "shared",
    "splitter": "ood_holdout",
    "params": {"ood_types": ["cropped"]},
    "n_train": 12,
    "n_test": 8,
    "variants": [
        {
            "variant_id": 0,
            "train_ids": [f"cluster_{i}.jpg" for i in TRAIN],
            "test_ids": [f"cluster_{i}.jpg" for i in TEST],
        }
    ],
}
TABLE = "id,split\n" + "".join(f"{i},train\n" for i in TRAIN) + "".join(f"{i},test\n" for i in TEST)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("ood.json", LAION),
        ("ood.json", {"train": TRAIN, "test": TEST}),
        ("ood.json", {"train_ids": TRAIN, "test_ids": TEST}),
        ("ood.csv", TABLE),
    ],
)
def test_test_images_of_a_published_split_are_fold_0_and_no_other_image_is(tmp_path, subjects, said, name, content):
    split = read_split(written(tmp_path, content, name), subjects)
    assert (split.name, split.alone) == (f"file:{name}", "ood")
    assert split.images("ood").tolist() == [*IDS[12:18], 118]
    for subject in subjects:
        folds = split.folds(subject.train.ids, 5, 0)
        assert ((folds == 0) == np.isin(subject.train.ids, TEST)).all()
    assert said == []


def test_what_a_file_does_not_name_and_what_it_names_in_vain_are_counted(tmp_path, subjects, said):
    groups = {str(i): "a" for i in IDS[:3]} | {str(i): "b" for i in IDS[3:6]} | {"999": "a", "nobody.jpg": "b"}
    split = read_split(written(tmp_path, groups), subjects)
    assert split.groups.keys() == set(IDS[:6])
    assert said == [
        "split.json does not name 13 of 19 training images; they are drawn by image id",
        "split.json names 2 images that are not in this dataset",
    ]


@pytest.mark.parametrize(
    ("content", "line"),
    [
        ({"999": "a"}, "split.json: expected training images of this dataset, by id or name such as '00100.png'; found "
         "none among 1, such as 999; choose the file for these images"),
        ({"119": "a"}, "found none among 1, such as 119; 1 are its test images; choose"),
        ({"100": "a", "00100.png": "b"}, "expected one group for an image; found 'a' and 'b' for the image '00100.png' "
         "(id 100); correct it"),
        ({"a": ["100"], "b": ["100"]}, "expected one group for an image; found '100' in 'a' and 'b'; correct it"),
        ({"train": IDS[:5], "test": [119]}, "both in its training and in its test images; found 5 and 0; choose"),
        ({"variants": [LAION["variants"][0]] * 2}, "expected one variant of a split; found 2; write one of them"),
        ({"a": {"b": 1}}, "found keys a; correct it"),
        ("[1, 2]", "found list of something else; correct it"),
        ("{}", "found no images; correct it"),
        ("{", "expected JSON; found a mistake in it: it is no JSON: Expecting property name"),
    ],
)  # fmt: skip
def test_what_a_file_cannot_be_is_one_line(tmp_path, subjects, content, line):
    with pytest.raises(DataError) as refused:
        read_split(written(tmp_path, content), subjects)
    assert line in str(refused.value) and "\n" not in str(refused.value)


def test_a_table_without_its_columns_and_a_file_that_is_not_there_are_one_line(tmp_path, subjects):
    with pytest.raises(
        DataError, match=r"expected a header with id or image or name, and group or fold or split; found"
    ):
        read_split(written(tmp_path, "a,b\n1,2\n", "x.csv"), subjects)
    with pytest.raises(DataError, match=r"none.csv: expected a JSON, CSV or TSV file of a split; found no such file"):
        read_split(tmp_path / "none.csv", subjects)


def test_a_number_that_is_the_id_of_one_image_and_the_name_of_another_is_refused(tmp_path, subjects):
    """Else files named from 1 and ids from 0 would give every image the group of its neighbour."""
    one = replace(subjects[0], train=replace(subjects[0].train, ids=subjects[0].train.ids - 1))
    with pytest.raises(DataError, match=r"found '00101', which images 100, 101 have; name files with their ending"):
        read_split(written(tmp_path, {"00101": "a", "00102": "b"}), [one])
    assert read_split(written(tmp_path, {"00101.png": "a", "102": "b"}), [one]).groups == {100: "a", 102: "b"}


def test_a_name_of_two_images_is_refused_and_its_id_is_not(tmp_path, subjects):
    one = subjects[0]
    other = replace(one, name="subj03", train=replace(one.train, ids=one.train.ids + 50))
    groups = {"00100.png": "a", "101": "b"}
    with pytest.raises(DataError, match=r"found '00100.png', which images 100, 150 have; name them by id"):
        read_split(written(tmp_path, groups), [one, other])
    assert read_split(written(tmp_path, {"100": "a", "101": "b"}), [one, other]).groups == {100: "a", 101: "b"}


def test_a_file_without_an_end_or_a_bottom_is_refused(tmp_path, subjects):
    os.mkfifo(tmp_path / "pipe.json")
    (tmp_path / "zero.csv").symlink_to("/dev/zero")
    deep = written(tmp_path, "[" * 50_000 + "]" * 50_000, "deep.json")
    for path, found in (
        (tmp_path / "pipe.json", "no regular"),
        (tmp_path / "zero.csv", "no regular"),
        (deep, "a mistake"),
    ):
        with pytest.raises(DataError, match=f"{path.name}: expected.*{found}"):
            read_split(path, subjects)


def test_a_number_of_thousands_of_digits_is_an_image_that_is_not_there(tmp_path, subjects, said):
    read_split(written(tmp_path, {"101": "a", "100": "b", "9" * 5000: "c"}), subjects)
    assert any("names 1 images that are not in this dataset" in line for line in said)


def test_a_table_whose_header_never_ends_is_refused_in_one_line(tmp_path):
    (tmp_path / "a.csv").write_text("id," + "x" * 200_000)
    with pytest.raises(DataError, match="expected a table of text that can be read") as refused:
        read_split(tmp_path / "a.csv", ())
    assert "\n" not in str(refused.value)
