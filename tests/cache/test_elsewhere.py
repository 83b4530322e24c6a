"""Features that were made elsewhere reach the right image, whatever their order and what images are called there."""

import csv
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import h5py
import numpy as np
import pytest
import zarr

from featcache.cache.elsewhere import add_features, read_ids, read_made, rows_for
from featcache.cache.store import open_store
from featcache.config import MadeConfig
from featcache.dataset.subject import ArrayImage, Images, Subject
from featcache.errors import ConfigError, DataError

N, WIDTH = 9, 4
IDS = np.array([40, 7, 13, 0, 99, 5, 3, 21, 8])
NAMES = [f"p {chr(97 + number)}é.png" for number in range(N)]
FEATURES = np.random.default_rng(0).normal(size=(N, WIDTH)).astype(np.float32)
MAPS = np.random.default_rng(1).normal(size=(N, 5, 3, 2)).astype(np.float32)  # channels, height, width
ORDER = np.random.default_rng(2).permutation(N)


@pytest.fixture
def subject(tmp_path) -> Subject:
    """Seven training images and two test images, which are files of some bytes."""
    (tmp_path / "photos").mkdir()
    paths = [tmp_path / "photos" / name for name in NAMES]
    for path in paths:
        path.write_bytes(path.name.encode())
    train, test = Images(tuple(paths[:7]), IDS[:7]), Images(tuple(paths[7:]), IDS[7:])
    return Subject("subj01", train, test, {}, {}, {}, {}, {})


def table(path: Path, columns: dict[str, Sequence[object]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(columns)
        rows.writerows(zip(*columns.values(), strict=True))
    return path


def npy(path: Path, values: np.ndarray) -> str:
    np.save(path, values)
    return str(path)


def stored(subject: Subject, features: str, ids: Path | None, work: Path) -> dict[str, np.ndarray]:
    """What add-features stores of each layer."""
    (done,) = add_features([subject], MadeConfig(features=features, ids=ids, name="mine"), work)
    store = open_store(done.path)
    assert store.complete
    return {layer: store.read(layer) for layer in store.arrays}


def shuffled(names: Sequence[object]) -> list[object]:
    return [names[number] for number in ORDER]


WAYS = {
    "ids": {"id": shuffled(IDS.tolist())},
    "file names": {"image": shuffled(NAMES)},
    "names without ending": {"file": shuffled([name[:-4] for name in NAMES])},
    "only column": {"whatever": shuffled(NAMES)},
    "column of several": {"kind": ["x"] * N, "Filename": shuffled(NAMES)},
}


@pytest.mark.parametrize("way", WAYS)
def test_rows_reach_their_image_by_any_name_and_in_any_order(way, subject, tmp_path):
    ids = table(tmp_path / "ids.csv", WAYS[way])
    found = stored(subject, npy(tmp_path / "f.npy", FEATURES[ORDER]), ids, tmp_path)
    np.testing.assert_array_equal(found["features"], FEATURES)


def test_whole_paths_and_mixtures_of_names_will_do(subject, tmp_path):
    paths = [str(tmp_path / "photos" / name) for name in NAMES]
    mixed = [*IDS[:3].tolist(), *paths[3:6], *NAMES[6:]]
    made = read_made(npy(tmp_path / "f.npy", FEATURES[ORDER]), table(tmp_path / "ids.csv", {"id": shuffled(mixed)}))
    np.testing.assert_array_equal(ORDER[rows_for(subject, made, "f")], np.arange(N))


def test_ids_may_be_an_array_or_lines_of_text(tmp_path):
    for dtype in (np.int16, np.uint64, np.float64):
        assert read_ids(Path(npy(tmp_path / "i.npy", IDS.astype(dtype)))) == tuple(map(str, IDS))
    assert read_ids(Path(npy(tmp_path / "t.npy", np.array(NAMES)))) == tuple(NAMES)
    np.savez(tmp_path / "x.npz", ids=IDS, features=FEATURES)
    assert read_ids(Path(f"{tmp_path / 'x.npz'}:ids")) == tuple(map(str, IDS))
    (tmp_path / "t.txt").write_text("\n".join(NAMES) + "\n", encoding="utf-8")
    assert read_ids(tmp_path / "t.txt") == tuple(NAMES)


def test_rows_of_other_images_are_left_out(subject, tmp_path):
    ids = table(tmp_path / "ids.csv", {"id": [1000, *IDS.tolist(), 1001]})
    more = np.concatenate([FEATURES[:1] * np.nan, FEATURES, FEATURES[:1] * np.inf])
    np.testing.assert_array_equal(stored(subject, npy(tmp_path / "f.npy", more), ids, tmp_path)["features"], FEATURES)


def test_each_array_of_a_file_is_a_layer_and_maps_have_places(subject, tmp_path):
    ids = table(tmp_path / "ids.csv", {"id": shuffled(IDS.tolist())})
    with h5py.File(tmp_path / "f.h5", "w") as file:
        file["block/1"], file["block/2"] = MAPS[ORDER], FEATURES[ORDER]
    found = stored(subject, str(tmp_path / "f.h5"), ids, tmp_path)
    assert set(found) == {"block.1", "block.2"}
    np.testing.assert_array_equal(found["block.2"], FEATURES)
    np.testing.assert_allclose(np.sort(found["block.1"].reshape(N, -1)), np.sort(MAPS.reshape(N, -1)), atol=2e-3)
    alone = stored(subject, f"{tmp_path / 'f.h5'}:block/2", ids, tmp_path)
    assert set(alone) == {"block.2"}


def test_arrays_of_a_file_that_are_called_as_ids_are(tmp_path):
    """CLIP's embeddings of images and of texts are both layers; a vector of ids is none."""
    ids = table(tmp_path / "ids.csv", {"id": IDS.tolist()})
    np.savez(tmp_path / "f.npz", image=FEATURES, text=FEATURES, id=IDS)
    assert list(read_made(str(tmp_path / "f.npz"), ids).arrays) == ["image", "text"]
    np.savez(tmp_path / "f.npz", id=IDS)
    with pytest.raises(DataError, match="expected arrays of features; found id; name another"):
        read_made(str(tmp_path / "f.npz"), ids)


@pytest.mark.parametrize("names", [["a/b", "a.b"], [".."], ["a\\b"], ["zarr.json"], ["committed.json"]])
def test_names_of_arrays_that_cannot_be_those_of_layers(names, subject, tmp_path):
    ids = table(tmp_path / "ids.csv", {"id": IDS.tolist()})
    np.savez(tmp_path / "f.npz", **dict.fromkeys(names, FEATURES))
    with pytest.raises(DataError, match="expected arrays with names of their own"):
        add_features([subject], MadeConfig(features=str(tmp_path / "f.npz"), ids=ids, name="mine"), tmp_path)
    assert not (tmp_path / "features.zarr").exists()


def test_a_table_has_ids_and_features(subject, tmp_path):
    columns = {"filename": shuffled(NAMES)} | {f"f{n}": FEATURES[ORDER, n].tolist() for n in range(WIDTH)}
    found = stored(subject, str(table(tmp_path / "f.csv", columns)), None, tmp_path)
    np.testing.assert_array_equal(found["features"], FEATURES)


def test_adding_twice_stores_once_and_changed_features_again(subject, tmp_path):
    ids = table(tmp_path / "ids.csv", {"id": IDS.tolist()})
    zarr.create_array(tmp_path / "f.zarr", data=FEATURES, chunks=(3, WIDTH))
    arguments = ([subject], MadeConfig(features=str(tmp_path / "f.zarr"), ids=ids, name="mine"), tmp_path)
    (first,), (second,) = add_features(*arguments), add_features(*arguments)
    assert first.n_new == N and second.n_new == 0 and first.path == second.path
    zarr.open(tmp_path / "f.zarr", mode="r+")[0, 0] = 7
    (third,) = add_features(*arguments)
    assert third.n_new == N and third.path != first.path
    assert open_store(third.path).read("features")[0, 0] == 7


def test_every_subject_gets_the_rows_of_its_own_images(subject, tmp_path):
    few = replace(subject, name="subj02", train=Images(subject.train.sources[4:6], IDS[4:6]), test=Images.none())
    ids = table(tmp_path / "ids.csv", {"id": IDS.tolist()})
    config = MadeConfig(features=npy(tmp_path / "f.npy", FEATURES), ids=ids, name="mine")
    done = add_features([subject, few], config, tmp_path)
    np.testing.assert_array_equal(open_store(done[1].path).read("features"), FEATURES[4:6])


GOOD = {"id": IDS.tolist()}
# {kind: (features, columns of ids, words of the error)}
BAD = {
    "missing rows": (FEATURES[:7], {"id": IDS[:7].tolist()}, rf"subj01, .* found none for 2: {NAMES[7]}, {NAMES[8]}"),
    "other length": (FEATURES[:7], GOOD, "f.npy: expected a row for each of 9 ids; found 7 rows in features"),
    "id twice": (FEATURES, {"id": [40, 40, *IDS[2:].tolist()]}, "ids.csv: expected each image once; found 40 again"),
    "empty id": (FEATURES, {"id": [40, "", *IDS[2:].tolist()], "k": [1] * N}, "found none in row 1"),
    "no column of ids": (FEATURES, {"a": IDS.tolist(), "b": IDS.tolist()}, "expected a column 'id'; found a, b"),
    "NaN": (np.where(np.arange(WIDTH) == 1, np.nan, FEATURES), GOOD, "features: expected finite numbers"),
    "too large": (FEATURES * np.float64(1e300), GOOD, "features: expected finite numbers"),
    "text": (FEATURES.astype(str), GOOD, "f.npy: .* found text"),
    "three dimensions": (FEATURES[..., None], GOOD, "f.npy: expected real numbers in 2 or 4 dimension"),
    "no features": (FEATURES[:, :0], GOOD, r"f.npy: .*\(9, 0\)"),
}


@pytest.mark.parametrize("kind", BAD)
def test_what_does_not_fit_is_refused_and_nothing_is_left(kind, subject, tmp_path):
    values, columns, words = BAD[kind]
    ids = table(tmp_path / "ids.csv", columns)
    with pytest.raises(DataError, match=words):
        add_features([subject], MadeConfig(features=npy(tmp_path / "f.npy", values), ids=ids, name="mine"), tmp_path)
    assert not list((tmp_path / "features.zarr").glob("*mine*"))


def test_ids_are_needed(tmp_path):
    with pytest.raises(ConfigError, match="--ids: expected a file with the image of each row"):
        read_made(npy(tmp_path / "f.npy", FEATURES), None)
    columns = {f"f{n}": FEATURES[:, n].tolist() for n in range(WIDTH)}
    with pytest.raises(ConfigError, match="--ids"):
        read_made(str(table(tmp_path / "f.csv", columns)), None)
    with pytest.raises(DataError, match="column f0: expected a number in every row; found 'x'"):
        read_made(str(table(tmp_path / "g.csv", {"id": [1, 2], "f0": [1, "x"]})), None)
    with pytest.raises(DataError, match=r"g.csv: .*\(2, 0\)"):
        read_made(str(table(tmp_path / "g.csv", {"id": [1, 2]})), None)


@pytest.mark.parametrize(
    ("content", "words"),
    [(b"", "0 bytes"), (b"\xff\xfe", "one that cannot"), (None, "expected a file; found none")],
)
def test_lines_of_text_that_cannot_be_read(content, words, tmp_path):
    if content is not None:
        (tmp_path / "ids.txt").write_bytes(content)
    with pytest.raises(DataError, match=words):
        read_ids(tmp_path / "ids.txt")


def test_ids_that_are_no_integers(tmp_path):
    with pytest.raises(DataError, match=r"expected ids that are integers; found 40.5"):
        read_ids(Path(npy(tmp_path / "i.npy", IDS + 0.5)))


def test_one_name_of_two_images_is_refused(subject, tmp_path):
    paths = [tmp_path / folder / "p.png" for folder in "ab"]
    for path in paths:
        path.parent.mkdir()
        path.write_bytes(path.parent.name.encode())
    two = replace(subject, train=Images(tuple(paths), IDS[:2]), test=Images.none())
    made = read_made(npy(tmp_path / "f.npy", FEATURES[:1]), table(tmp_path / "ids.csv", {"image": ["p.png"]}))
    with pytest.raises(DataError, match=r"one row for each image .* found p.png for .*a/p.png and .*b/p.png"):
        rows_for(two, made, "f.npy")
    whole = table(tmp_path / "ids.csv", {"image": [str(path) for path in paths]})
    assert rows_for(two, read_made(npy(tmp_path / "f.npy", FEATURES[:2]), whole), "f.npy").tolist() == [0, 1]


def test_a_number_that_is_the_id_of_one_image_and_the_name_of_another_is_refused(subject, tmp_path):
    image = tmp_path / "40.png"
    image.write_bytes(b"x")
    one = replace(subject, train=Images((image,), IDS[1:2]), test=Images.none())  # its id is 7
    both = read_made(npy(tmp_path / "f.npy", FEATURES[:2]), table(tmp_path / "ids.csv", {"id": [7, 40]}))
    with pytest.raises(DataError, match=r"found 7 and 40 for .*40.png"):
        rows_for(one, both, "f.npy")


def test_pictures_of_an_array_go_by_their_ids(subject, tmp_path):
    sources = tuple(ArrayImage(tmp_path / "p.npy", "", row) for row in range(2))
    made = read_made(npy(tmp_path / "f.npy", FEATURES), table(tmp_path / "ids.csv", GOOD))
    one = replace(subject, train=Images(sources, IDS[3:5]), test=Images.none())
    assert rows_for(one, made, "f.npy").tolist() == [3, 4]


@pytest.mark.parametrize("name", ["a/b", "..", "", "-x", "ü", "x" * 65, "a b"])
def test_a_name_is_one_of_files_and_patterns(name):
    with pytest.raises(ConfigError, match="--name: expected 1 to 64 letters"):
        MadeConfig(features="f.npy", name=name)
