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
from featcache.cache.store import Row, Store, create_store, list_stores, nearest, open_store
from featcache.errors import StoreError

KEY = {"kind": "features", "size": 224}
IDS = np.arange(100, 110)
ROWS = np.random.default_rng(0).standard_normal((10, 3)).astype(np.float32)


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


MAPS = np.random.default_rng(1).standard_normal((10, 3, 2, 5)).astype(np.float16)


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
