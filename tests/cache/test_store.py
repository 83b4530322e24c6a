import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from featcache.cache import store as store_module
from featcache.cache.chunks import chunk_file, stored_checksum
from featcache.cache.store import Row, Store, create_store, list_stores, nearest, open_store, stored_bytes
from featcache.errors import StoreError
from featcache.machine.documents import sealed, write_document
from support.damage import flip

KEY = {"kind": "features", "size": 224}
IDS = np.arange(100, 110)
ROWS = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)
MAPS = np.random.default_rng(1).standard_normal((10, 3, 2, 5)).astype(np.float16)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 4)


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return create_store(tmp_path / "features.zarr", "a", KEY, IDS, 7, {"pooled": 3, "stem": 2}, {"origin": "test"})


@pytest.fixture
def filled(store: Store) -> Store:
    store.append({"pooled": ROWS, "stem": ROWS[:, :2]})
    return store


def test_what_was_appended_is_read_after_reopening(filled):
    again = open_store(filled.path)
    assert np.array_equal(again.read("pooled"), ROWS) and np.array_equal(again.read("stem", 3, 9), ROWS[3:9, :2])
    assert again.image_ids.tolist() == IDS.tolist() and again.n_train == 7
    assert again.key == KEY and again.facts == {"origin": "test"} and again.complete
    assert list(again.arrays) == ["pooled", "stem"]


def test_a_store_that_another_process_made_meanwhile_is_opened_as_it_is(tmp_path, monkeypatch):
    folder, honest = tmp_path / "features.zarr", os.replace

    def make() -> Store:
        return create_store(folder, "a", KEY, IDS, 7, {"pooled": 3}, {})

    def later(partial, path):
        monkeypatch.setattr(os, "replace", honest)
        with monkeypatch.context() as other:
            other.setattr(os, "getpid", lambda: 1)
            make().append({"pooled": ROWS})
        honest(partial, path)

    monkeypatch.setattr(os, "replace", later)
    store = make()
    assert store.complete and np.array_equal(store.read("pooled"), ROWS)
    assert [path.name for path in folder.iterdir() if path.is_dir()] == [store.name]


def test_a_store_that_cannot_be_put_in_its_place_leaves_nothing(tmp_path, monkeypatch):
    def broken(*_):
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "replace", broken)
    with pytest.raises(OSError, match="Input/output error"):
        create_store(tmp_path, "a", KEY, IDS, 7, {"pooled": 3}, {})
    assert not list(tmp_path.iterdir())


def test_rows_that_were_not_committed_are_refused(store):
    assert not store.complete
    store.append({"pooled": ROWS[:4]})
    assert store.committed == {"pooled": 4, "stem": 0}
    with pytest.raises(StoreError, match="expected 5 rows of pooled; found 4"):
        store.read("pooled", 0, 5)


def test_a_chunk_written_but_not_committed_does_not_count(store):
    """What a kill between the chunk and its record leaves behind."""
    store.arrays["pooled"][0:4] = ROWS[:4]
    with pytest.raises(StoreError, match="found 0"):
        store.read("pooled", 0, 4)
    store.append({"pooled": ROWS[:4] + 1})
    assert np.array_equal(store.read("pooled", 0, 4), ROWS[:4] + 1)


def test_rows_must_fill_chunks_until_the_end(store):
    with pytest.raises(ValueError, match="do not fill chunks of 4"):
        store.append({"pooled": ROWS[:3]})
    store.append({"pooled": ROWS[:8]})
    store.append({"pooled": ROWS[8:]})
    assert np.array_equal(store.read("pooled"), ROWS)


def test_rows_of_another_width_or_past_the_end_are_refused(store):
    for rows in (ROWS[:, :2], np.zeros((12, 3), np.float32)):
        with pytest.raises(ValueError, match="do not fit"):
            store.append({"pooled": rows})


def test_the_first_of_several_values_that_are_not_finite_is_named(store):
    rows = ROWS.copy()
    rows[[2, 7], [2, 0]] = np.nan
    with pytest.raises(StoreError, match=r"found nan in pooled\[2, 2\]"):
        store.append({"pooled": rows})


def test_nothing_is_written_into_a_store_that_somebody_removed(filled):
    shutil.rmtree(filled.path)
    for write in (lambda: filled.put("pooled", 0, ROWS), lambda: filled.commit({"pooled": 4})):
        with pytest.raises(StoreError, match="expected the store that was opened; found that it is gone"):
            write()
    assert not filled.path.exists()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_values_that_are_not_finite_are_refused_by_name_and_nothing_is_committed(store, bad):
    rows = ROWS.copy()
    rows[5, 1] = bad
    with pytest.raises(StoreError, match=rf"found {bad} in pooled\[5, 1\]; correct"):
        store.append({"pooled": rows})
    assert store.committed["pooled"] == 0


def chunk_files(store: Store, name: str) -> list[Path]:
    return sorted(path for path in (store.path / name / "c").rglob("*") if path.is_file())


def test_one_flipped_bit_is_noticed(filled):
    path = chunk_files(filled, "pooled")[1]
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    assert np.array_equal(filled.read("pooled", 0, 4), ROWS[:4])
    with pytest.raises(StoreError, match="fails its checksum"):
        filled.read("pooled")


def test_a_lost_chunk_does_not_read_as_zeros(filled):
    chunk_files(filled, "pooled")[0].unlink()
    with pytest.raises(StoreError, match="a chunk of pooled is missing"):
        filled.read("pooled")


def test_a_truncated_chunk_is_noticed(filled):
    path = chunk_files(filled, "stem")[0]
    path.write_bytes(path.read_bytes()[:-7])
    with pytest.raises(StoreError, match="delete it and run the command that writes it again"):
        filled.read("stem")


def test_a_store_of_another_format_is_refused_with_both_numbers(filled):
    description = filled.path / "zarr.json"
    content = json.loads(description.read_text())
    content["attributes"]["featcache"]["format"] = 0
    description.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="expected store format 1; found 0; use the version"):
        list_stores(filled.path.parent)


@pytest.mark.parametrize("content", ["", "{}", '{"zarr_format": 3, "node_type": "group", "attributes": {}}'])
def test_a_damaged_description_is_refused(filled, content):
    (filled.path / "zarr.json").write_text(content)
    with pytest.raises(StoreError, match="its description cannot be read"):
        open_store(filled.path)


@pytest.mark.parametrize("content", ["{", "{}", "[]", '{"other": 3}'])
def test_a_damaged_record_of_rows_is_refused(filled, content):
    (filled.path / "committed.json").write_text(content)
    with pytest.raises(StoreError, match=r"committed.json cannot be read"):
        filled.read("pooled")


def record_of(store: Store, **changes: object) -> None:
    """Replace the record of rows by one that is sealed and says something else."""
    content = json.loads((store.path / "committed.json").read_text()) | changes
    content.pop("digest")
    write_document(store.path / "committed.json", content)


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"key": "0" * 12}, "it is another store's"),
        ({"rows": {"pooled": 10}}, "it is another store's"),
        ({"rows": {"pooled": 11, "stem": 10}}, "it is of more than 10 rows"),
        ({"checksums": {"pooled": [7], "stem": [7, 7, 7]}}, "has not a checksum for each chunk of pooled"),
    ],
)
def test_a_record_of_another_store_or_of_other_rows_is_refused(filled, changes, why):
    record_of(filled, **changes)
    with pytest.raises(StoreError, match=why):
        filled.read("pooled")


def test_a_store_says_from_its_beginning_that_it_has_no_rows(store):
    assert json.loads((store.path / "committed.json").read_text())["rows"] == {"pooled": 0, "stem": 0}


def test_a_store_of_an_earlier_version_has_no_record_before_its_first_rows(store):
    (store.path / "committed.json").unlink()
    assert store.committed == {"pooled": 0, "stem": 0} and not store.complete
    with pytest.raises(StoreError, match="expected 1 rows of pooled; found 0"):
        store.read("pooled", 0, 1)
    store.append({"pooled": ROWS})
    assert np.array_equal(store.read("pooled"), ROWS)


@pytest.mark.parametrize(
    "change",
    [{"data_type": "float64"}, {"chunk_grid": {"name": "regular", "configuration": {"chunk_shape": [4, 2]}}}],
)
def test_an_array_that_is_not_as_stores_have_it_is_refused(filled, change):
    path = filled.path / "pooled" / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match="the description of pooled cannot be read"):
        open_store(filled.path).read("pooled")


def test_an_array_is_opened_once(filled):
    assert filled.arrays["pooled"] is filled.arrays["pooled"]


@pytest.mark.parametrize("out", [np.empty((10, 2), np.float32), np.empty((10, 3), np.float64)])
def test_a_place_that_rows_do_not_fit_into_is_refused(filled, out):
    with pytest.raises(ValueError, match="is no place for rows 0 to 10"):
        filled.read("pooled", out=out)


@pytest.mark.parametrize("change", [{"node_type": "array"}, {"zarr_format": 2}])
def test_what_is_no_group_of_zarr_3_is_no_store(filled, change):
    path = filled.path / "zarr.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(StoreError, match="it is no group of Zarr 3"):
        open_store(filled.path)


@pytest.mark.parametrize("lost", ["facts", "image_ids"])
def test_a_description_without_facts_or_ids_is_refused(filled, lost):
    path = filled.path / "zarr.json"
    document = json.loads(path.read_text())
    content = {name: value for name, value in document["attributes"]["featcache"].items() if name != "digest"}
    content.pop(lost)
    document["attributes"]["featcache"] = sealed("zarr.json", content)
    path.write_text(json.dumps(document))
    with pytest.raises(StoreError, match="it has no facts or no ids"):
        open_store(filled.path)


def test_a_store_under_the_name_of_another_is_refused(filled):
    other = filled.path.with_name("a-0123456789ab")
    filled.path.rename(other)
    with pytest.raises(StoreError, match="its key is not the one that the folder is named by"):
        open_store(other)


def test_what_is_no_store_is_told_from_one_that_lost_its_description(filled, tmp_path):
    (tmp_path / "empty").mkdir()
    with pytest.raises(StoreError, match=r"found no zarr.json in it; name a folder"):
        open_store(tmp_path / "empty")
    with pytest.raises(StoreError, match="found no such folder; name a folder"):
        open_store(tmp_path / "missing")
    (filled.path / "zarr.json").unlink()
    with pytest.raises(StoreError, match=r"its description, zarr.json, is missing; delete it and run"):
        open_store(filled.path)


def test_a_file_among_stores_is_passed_over(filled):
    (filled.path.parent / "0-notes.txt").touch()
    assert [store.name for store in list_stores(filled.path.parent)] == [filled.name]


# --- rows that are taken back


@pytest.fixture
def narrow(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Store:
    """A whole store, of which one array has 4 rows in a chunk and the other 2."""
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 4 * 30 * 2)
    rows = {"pooled": 3, "low": Row((3, 2, 5), "float16")}
    store = create_store(tmp_path / "narrow.zarr", "a", KEY, IDS, 7, rows, {})
    store.append({"pooled": ROWS, "low": MAPS})
    assert [store.chunk_rows(name) for name in ("pooled", "low")] == [4, 2] and store.commit_rows == 4
    return store


def test_rows_are_taken_back_from_where_a_commit_begins_and_those_behind_it_are_kept_while_they_are_whole(narrow):
    narrow.take_back({"low": 7})
    assert narrow.committed == {"pooled": 10, "low": 4}
    assert narrow.keeps("low", range(4, 10))
    flip(chunk_file(narrow.path / "low", 3, 4))
    assert not narrow.keeps("low", range(4, 10))
    assert (
        narrow.keeps("low", range(4, 6)) and not narrow.keeps("low", range(6, 8)) and narrow.keeps("low", range(8, 10))
    )
    narrow.put("low", 6, MAPS[6:8])
    narrow.commit({"low": 8})
    assert narrow.keeps("low", range(8, 10)) and not narrow.complete
    narrow.commit({"low": 8})  # which takes nothing back
    assert narrow.keeps("low", range(8, 10))
    narrow.commit({"low": 10})
    assert np.array_equal(open_store(narrow.path).read("low"), MAPS)


def test_rows_that_are_taken_back_may_become_others(narrow):
    narrow.take_back({"low": 4, "pooled": 0})
    narrow.append({"low": 1 - MAPS[4:], "pooled": 1 - ROWS})
    again = open_store(narrow.path)
    assert np.array_equal(again.read("low"), np.concatenate([MAPS[:4], 1 - MAPS[4:]]))
    assert np.array_equal(again.read("pooled"), 1 - ROWS)


def test_a_commit_of_fewer_rows_keeps_nothing_behind_it(narrow):
    narrow.commit({"low": 4})
    assert not narrow.keeps("low", range(4, 6)) and narrow.committed["low"] == 4
    assert np.array_equal(narrow.read("low", 0, 4), MAPS[:4])


def test_nothing_is_kept_of_a_store_of_an_earlier_version(narrow):
    (narrow.path / "committed.json").write_text(json.dumps({"pooled": 10, "low": 10}))
    assert not narrow.keeps("low", range(4, 6))
    narrow.take_back({"low": 4})
    assert not narrow.keeps("low", range(4, 6)) and np.array_equal(narrow.read("low", 0, 4), MAPS[:4])


def test_chunks_are_those_of_the_committed_rows_with_what_they_were_written_with(narrow):
    narrow.take_back({"low": 8})
    chunks = {name: narrow.chunks(name) for name in narrow.arrays}
    assert {name: len(each) for name, each in chunks.items()} == {"pooled": 3, "low": 4}
    for name, each in chunks.items():
        assert [chunk.path for chunk in each] == chunk_files(narrow, name)[: len(each)]
        assert all(chunk.fault == "" and chunk.checksum == stored_checksum(chunk.path) for chunk in each)
        assert all(chunk.path.stat().st_size == chunk.n_bytes + 4 for chunk in each)


# --- links


def test_a_chunk_of_another_store_is_linked_in_the_place_of_what_was_begun(filled, tmp_path):
    store = create_store(tmp_path / "other.zarr", "b", {"kind": "other"}, IDS, 7, {"pooled": 3, "stem": 2}, {})
    store.put("pooled", 0, -ROWS)  # and not committed
    for start in (0, 4, 8):
        store.link("pooled", start, filled)
        store.link("stem", start, filled)
    store.commit({"pooled": 10, "stem": 10})
    again = open_store(store.path)
    assert np.array_equal(again.read("pooled"), ROWS) and np.array_equal(again.read("stem"), ROWS[:, :2])
    pairs = zip(chunk_files(store, "pooled"), chunk_files(filled, "pooled"), strict=True)
    assert all(one.samefile(other) for one, other in pairs)


# --- lists and sizes


def test_a_half_made_store_is_not_listed(filled):
    (filled.path.parent / ".a-other.123").mkdir()
    assert [store.name for store in list_stores(filled.path.parent)] == [filled.name]
    assert list_stores(filled.path / "nowhere") == []


def test_a_miss_names_the_nearest_store_and_the_setting(store, tmp_path):
    far = create_store(store.path.parent, "b", {"kind": "x", "size": 1, "dtype": "x"}, IDS, 7, {"pooled": 3}, {})
    found = nearest({"kind": "features", "size": 384}, [far, store])
    assert found is not None and found[0].name == store.name and found[1] == {"size": (384, 224)}
    assert nearest(KEY, []) is None


def test_a_store_that_cannot_fit_on_the_disk_is_refused_before_it_is_made(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 100})())
    with pytest.raises(StoreError, match=r"kB of free disk; found 0.1 kB"):
        create_store(tmp_path / "f", "a", KEY, IDS, 7, {"pooled": 3}, {})
    assert list((tmp_path / "f").iterdir()) == []


def test_chunk_rows_are_powers_of_two_of_bounded_size(monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 256)
    for n_columns in (0, 1, 1280, 20_544, 10**6, 10**8):
        rows = store_module._chunk_rows(n_columns)
        assert rows in {1 << k for k in range(9)} and (rows == 1 or rows * n_columns * 4 <= 16 << 20)


def test_chunks_are_as_earlier_versions_cut_them(monkeypatch):
    """Rows of other stores are linked chunk by chunk, so that another size would cost a copy of each."""
    monkeypatch.undo()
    assert [store_module._chunk_rows(n) for n in (1, 1280, 65_536, 33_026)] == [256, 256, 64, 64]


@pytest.mark.slow
def test_a_second_writer_is_refused(store):
    script = (
        "import sys; from pathlib import Path; from featcache.cache.store import open_store\n"
        "with open_store(Path(sys.argv[1])).writing(): print('wrote')"
    )
    with store.writing():
        second = subprocess.run([sys.executable, "-c", script, store.path], capture_output=True, text=True)
    assert "found another process writing" in second.stderr
    third = subprocess.run([sys.executable, "-c", script, store.path], capture_output=True, text=True)
    assert third.stdout == "wrote\n"


# --- lists of many stores


@pytest.fixture
def many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[Store]:
    """More stores than are listed without an index; the folder was listed once."""
    monkeypatch.setattr(store_module, "_UNINDEXED", 2)
    made = [
        create_store(tmp_path / "many.zarr", f"s{n}", {"size": n}, IDS + n, n, {"a": 3, "b": 2}, {"n": n})
        for n in range(5)
    ]
    list_stores(tmp_path / "many.zarr")
    return made


def described(stores: list[Store]) -> list[tuple[object, ...]]:
    return [(s.name, s.key, s.n_train, s.facts, s.image_ids.tolist(), list(s.arrays)) for s in stores]


def test_stores_that_did_not_change_are_listed_without_reading_them(many, monkeypatch):
    folder = many[0].path.parent
    with monkeypatch.context() as patch:
        patch.setattr(store_module, "open_store", lambda path: pytest.fail(f"opened {path}"))
        listed = list_stores(folder)
        assert [(store.name, store.key, store.n_train) for store in listed] == [
            (store.name, store.key, store.n_train) for store in many
        ]
        assert [store.committed for store in listed] == [{"a": 0, "b": 0}] * 5
    assert described(listed) == described(many)
    assert [store.name for store in list_stores(folder)] == [path.name for path in sorted(folder.iterdir())]


def test_few_new_stores_are_read_and_more_are_put_into_the_index_with_those_that_are_there(many):
    folder = many[0].path.parent
    index = folder.with_suffix(".index.json")
    names = {path.name for path in folder.iterdir()}
    for number in range(5, 8):
        create_store(folder, f"s{number}", {"size": number}, IDS, 7, {"c": 1}, {})
        assert {store.name for store in list_stores(folder)} == {path.name for path in folder.iterdir()}
        indexed = json.loads(index.read_text()).keys() - {"digest"}
        assert indexed == (names if number < 7 else {path.name for path in folder.iterdir()})


@pytest.mark.parametrize(
    "row", [Row((3,)), Row((9,)), Row((3, 2, 5), "float16"), Row((0,))], ids=["narrow", "wide", "maps", "empty"]
)
def test_a_store_takes_the_room_that_is_told_beforehand(tmp_path, row):
    for n_rows in (0, 3, 4, 10):
        store = create_store(tmp_path / f"{n_rows}.zarr", "a", KEY, np.arange(n_rows), 0, {"a": row}, {})
        if n_rows:
            store.append({"a": np.ones((n_rows, *row.shape), row.dtype)})
            assert np.array_equal(store.read("a"), np.ones((n_rows, *row.shape)))
        sizes = [path.stat().st_size - 4 for path in chunk_files(store, "a")]
        assert stored_bytes(row, n_rows) == sum(sizes)


def test_what_zarr_had_begun_of_any_chunk_is_removed_with_the_next_writer(tmp_path):
    store = create_store(tmp_path / "some.zarr", "a", {"a": 1}, IDS, len(IDS), {"a": 9}, {})
    for index in range(3):
        (store.path / f"a/c/{index}").mkdir(parents=True)
        (store.path / f"a/c/{index}/0.{'1f' * 16}.partial").write_bytes(b"half")
    store.append({"a": np.ones((10, 9), np.float32)})
    assert [path.name for path in chunk_files(store, "a")] == ["0"] * 3


def test_what_zarr_had_begun_of_a_chunk_is_removed_with_the_next_writer(tmp_path):
    store = create_store(tmp_path / "some.zarr", "a", {"a": 1}, IDS, len(IDS), {"a": ROWS.shape[1]}, {})
    folder = store.path / "a/c/0"
    folder.mkdir(parents=True)
    (folder / f"0.{'1f' * 16}.partial").write_bytes(b"half")
    store.append({"a": ROWS})
    assert [path.name for path in folder.iterdir()] == ["0"] and np.array_equal(store.read("a"), ROWS)


def test_a_listed_store_is_written_and_read_as_an_opened_one(many):
    listed = list_stores(many[0].path.parent)[3]
    listed.append({"a": ROWS, "b": ROWS[:, :2]})
    assert listed.complete and np.array_equal(open_store(listed.path).read("a"), ROWS)
    assert np.array_equal(list_stores(listed.path.parent)[3].read("b", 2, 5), ROWS[2:5, :2])


def test_stores_that_were_added_removed_or_written_anew_are_listed_as_they_are(many):
    folder = many[0].path.parent
    for number in range(5, 10):  # one after the other, through any number of indexes
        shutil.rmtree(folder / many[number % 5].name, ignore_errors=True)
        create_store(folder, f"s{number}", {"size": number}, IDS, 7, {"c": 1}, {})
        listed = list_stores(folder)
        assert described(listed) == described([open_store(path) for path in sorted(folder.iterdir())])
        assert len(listed) == 5 and f"s{number}" in listed[-1].name
    again, key = listed[0].path, listed[0].key
    shutil.rmtree(again)
    create_store(folder, again.name.rpartition("-")[0], key, IDS, 3, {"d": 1}, {})
    assert (list_stores(folder)[0].n_train, list(list_stores(folder)[0].arrays)) == (3, ["d"])


@pytest.mark.parametrize("damage", ["cut", "gone", "another format"])
def test_a_store_that_was_damaged_after_it_was_listed_is_refused(many, damage):
    path = many[2].path / "zarr.json"
    text = path.read_text()
    path.unlink()
    if damage != "gone":
        path.write_text(text[:50] if damage == "cut" else text.replace('"format": 1', '"format": 99'))
    with pytest.raises(StoreError, match=many[2].name):
        list_stores(many[0].path.parent)


@pytest.mark.parametrize("content", ["", "[]", "{", "null"])
def test_a_damaged_index_is_not_believed(many, content):
    folder = many[0].path.parent
    (index,) = (path for path in folder.parent.iterdir() if path != folder)
    index.write_text(content)
    assert described(list_stores(folder)) == described(many)
    assert json.loads(index.read_text()).keys() == {store.name for store in many} | {"digest"}


def test_without_an_index_that_can_be_written_stores_are_read(many, monkeypatch):
    folder = many[0].path.parent
    (index,) = (path for path in folder.parent.iterdir() if path != folder)
    index.unlink()

    def refuse(*_):
        raise PermissionError("read-only")

    monkeypatch.setattr(store_module, "write_document", refuse)
    assert described(list_stores(folder)) == described(many)


def test_a_damaged_description_of_an_array_is_named_where_the_array_is_read(filled):
    (filled.path / "stem" / "zarr.json").write_text("{")
    store = open_store(filled.path)
    assert np.array_equal(store.read("pooled"), ROWS)
    with pytest.raises(StoreError, match="the description of stem cannot be read"):
        store.read("stem")


# --- layers with places


@pytest.fixture
def layered(tmp_path: Path) -> Store:
    rows = {"pooled": 3, "low": Row((3, 2, 5), "float16"), "deep": Row((1, 1, 4), "float16")}
    return create_store(tmp_path / "layers.zarr", "a", KEY, IDS, 7, rows, {})


def test_maps_in_float16_come_back_bit_by_bit(layered):
    layered.append({"low": MAPS[:4]})
    layered.append({"low": MAPS[4:]})
    found = open_store(layered.path).read("low")
    assert found.dtype == np.float16 and found.shape == (10, 3, 2, 5) and found.tobytes() == MAPS.tobytes()
    assert np.array_equal(open_store(layered.path).read("low", 2, 7), MAPS[2:7])


def test_float32_values_are_rounded_to_float16_once(layered):
    values = np.random.default_rng(2).standard_normal((10, 3, 2, 5)).astype(np.float32)
    layered.append({"low": values})
    assert np.array_equal(layered.read("low"), values.astype(np.float16))


def test_maps_of_another_shape_are_refused(layered):
    for rows in (MAPS[:4, :2], MAPS[:4].reshape(4, 2, 3, 5), MAPS[:4].reshape(4, 30)):
        with pytest.raises(ValueError, match="do not fit"):
            layered.append({"low": rows})


def test_rows_of_a_map_that_were_never_written_are_refused(layered):
    """A record that says more than the disk has: zarr fills in NaN, which float16 has too."""
    layered.append({"low": MAPS[:4]})
    (layered.path / "committed.json").write_text(json.dumps({"pooled": 0, "low": 10, "deep": 0}))
    assert np.array_equal(layered.read("low", 0, 4), MAPS[:4])
    with pytest.raises(StoreError, match="a chunk of low is missing"):
        layered.read("low")


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_a_chunk_has_as_many_images_whatever_the_precision(tmp_path, monkeypatch, dtype):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 256)
    monkeypatch.setattr(store_module, "_CHUNK_BYTES", 4 * 30 * 8)
    one = create_store(tmp_path / dtype, "a", KEY, np.arange(100), 7, {"low": Row((3, 2, 5), dtype)}, {})
    assert one.chunk_rows("low") == 8


def test_the_room_that_a_store_needs_is_counted_by_precision(tmp_path, monkeypatch):
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": 10 * 30 * 2})())
    create_store(tmp_path / "a", "a", KEY, IDS, 7, {"low": Row((3, 2, 5), "float16")}, {})
    with pytest.raises(StoreError, match="of free disk"):
        create_store(tmp_path / "b", "a", KEY, IDS, 7, {"low": Row((3, 2, 5))}, {})


def test_widening_empties_one_array_and_leaves_the_others(layered):
    layered.append({"pooled": ROWS, "low": MAPS, "deep": np.ones((10, 1, 1, 4))})
    chunk_rows = layered.chunk_rows("low")
    layered.widen("low")
    again = open_store(layered.path)
    assert again.committed == {"pooled": 10, "low": 0, "deep": 10} and not again.complete
    assert [str(again.arrays[name].dtype) for name in ("pooled", "low", "deep")] == ["float32", "float32", "float16"]
    assert list(again.arrays) == ["pooled", "low", "deep"] and again.chunk_rows("low") == chunk_rows
    assert np.array_equal(again.read("pooled"), ROWS) and (again.read("deep") == 1).all()
    with pytest.raises(StoreError, match="found 0"):
        again.read("low", 0, 1)
    large = MAPS.astype(np.float32) * 1e6
    again.append({"low": large})
    assert np.array_equal(open_store(layered.path).read("low"), large) and again.complete


def test_nothing_of_the_narrow_array_is_left_to_be_read_after_widening(layered):
    layered.append({"low": MAPS})
    layered.widen("low")
    assert chunk_files(layered, "low") == []
    assert sorted(path.name for path in layered.path.iterdir()) == [
        "committed.json",
        "deep",
        "low",
        "pooled",
        "zarr.json",
    ]


@pytest.mark.parametrize("call", ["rmtree", "_create_array", "replace"])
def test_a_store_that_was_interrupted_while_it_was_widened_can_be_opened_and_widened_again(layered, monkeypatch, call):
    """Stopped before each step in turn; `rmtree` and `replace` are those of the array itself."""
    layered.append({"pooled": ROWS, "low": MAPS})
    module = {"rmtree": store_module.shutil, "_create_array": store_module, "replace": store_module.os}[call]
    honest = getattr(module, call)

    def stopping(*about, **more):
        aims = "" if call == "_create_array" else about[-1] if call == "replace" else about[0]
        if call == "_create_array" or (layered.path / "low") in (Path(aims), *Path(aims).parents):
            raise KeyboardInterrupt
        return honest(*about, **more)

    with monkeypatch.context() as patch:
        patch.setattr(module, call, stopping)
        with pytest.raises(KeyboardInterrupt):
            layered.widen("low")
    again = open_store(layered.path)
    assert again.committed == {"pooled": 10, "low": 0, "deep": 0} and np.array_equal(again.read("pooled"), ROWS)
    again.widen("low")
    again = open_store(layered.path)
    again.append({"low": MAPS.astype(np.float32)})
    assert np.array_equal(again.read("low"), MAPS.astype(np.float32))
    assert [store.name for store in list_stores(layered.path.parent)] == [layered.name]
