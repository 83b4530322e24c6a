"""Rows read as heads read them are the store's, whether they fit in memory or not."""

import numpy as np
import pytest
import torch

from featcache.cache import store as store_module
from featcache.cache.store import Row, create_store
from featcache.errors import StoreError
from heads.features.rows import LayerRows

N = 21
SHAPES = {"pooled": (6,), "low": (4, 3, 5), "deep.cls": (7,), "deep": (2, 2, 7)}
ALL = sum(int(np.prod(shape)) * (2 if len(shape) > 1 else 4) for shape in SHAPES.values()) * N


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    return {
        name: rng.normal(size=(N, *shape)).astype(np.float16 if len(shape) > 1 else np.float32)
        for name, shape in SHAPES.items()
    }


@pytest.fixture
def store(tmp_path, values, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 4)
    rows = {name: Row(shape, str(values[name].dtype)) for name, shape in SHAPES.items()}
    made = create_store(tmp_path, "f", {"x": 1}, np.arange(N), 15, rows, {})
    made.append(values)
    return made


def both(store, names=tuple(SHAPES)):
    """In memory, and from the disk."""
    found = [LayerRows(store, names, "cpu", budget) for budget in (np.inf, 0)]
    assert found[0].streamed == [] and found[1].streamed == list(names)
    return found


def flat(values, name):
    """As places, in the order of rows of the map, and channels."""
    return values[name].astype(np.float32).reshape(N, -1, SHAPES[name][-1])


def test_rows_are_places_and_channels_in_float32(store, values):
    for rows in both(store):
        for name in SHAPES:
            for start, stop in ((0, None), (0, N), (3, 9), (5, 6), (20, 21), (7, 7)):
                found = rows.read(name, start, stop)
                assert found.dtype == torch.float32
                np.testing.assert_array_equal(found, flat(values, name)[start:stop])


def test_any_images_come_in_the_order_asked_for_with_repeats(store, values):
    for rows in both(store):
        for index in ([20, 0, 7, 7, 3, 20], [4], np.arange(N)[::-1], []):
            index = np.array(index, dtype=int)
            found = rows.rows(index)
            assert list(found) == list(SHAPES)
            for name in SHAPES:
                np.testing.assert_array_equal(found[name], values[name][index].astype(np.float32))
                assert found[name].dtype == torch.float32


def test_a_subset_is_those_images_in_memory(store, values):
    index = np.array([2, 3, 11, 20, 5])
    for rows in both(store):
        some = rows.subset(index)
        assert len(some) == 5 and len(rows) == N and some.streamed == []
        for name in SHAPES:
            np.testing.assert_array_equal(some.read(name), flat(values, name)[index])
            np.testing.assert_array_equal(some.read(name, 1, 3), flat(values, name)[index][1:3])
        np.testing.assert_array_equal(some.dense(), rows.dense()[index])
        np.testing.assert_array_equal(some.rows(np.array([4, 0]))["deep"], values["deep"][[5, 2]].astype(np.float32))


def test_dense_is_all_arrays_side_by_side(store, values):
    expected = np.concatenate([values[name].reshape(N, -1) for name in SHAPES], 1).astype(np.float32)
    for rows in both(store):
        np.testing.assert_array_equal(rows.dense(), expected)
        assert rows.n_features == expected.shape[1]


def test_only_the_arrays_asked_for_are_there_in_the_order_asked_for(store, values):
    for rows in both(store, ("deep", "pooled")):
        expected = np.concatenate([values[name].reshape(N, -1) for name in ("deep", "pooled")], 1)
        np.testing.assert_array_equal(rows.dense(), expected.astype(np.float32))
        assert rows.grids == {"deep": (2, 2), "pooled": (1, 1)} and rows.channels == {"deep": 7, "pooled": 6}


@pytest.mark.parametrize("budget", [0, 100, ALL // 4, ALL // 2, ALL - 1, ALL, -5])
def test_what_is_kept_never_takes_more_than_the_budget(store, values, budget):
    rows = LayerRows(store, tuple(SHAPES), "cpu", budget)
    kept = sum(values[name].nbytes for name in SHAPES if name not in rows.streamed)
    assert kept <= max(budget, 0) and (rows.streamed == []) == (budget >= ALL)


def test_the_smallest_arrays_are_kept_first(store):
    rows = LayerRows(store, tuple(SHAPES), "cpu", ALL - 1)
    assert rows.streamed == ["low"]


def test_what_is_in_memory_is_not_read_again(store, monkeypatch):
    kept, streamed = both(store)
    monkeypatch.setattr(type(store), "read", lambda *_: pytest.fail("read the store"))
    kept.read("low")
    kept.rows(np.array([3]))
    with pytest.raises(pytest.fail.Exception):
        streamed.read("low")


def test_a_damaged_chunk_is_noticed_while_rows_are_streamed(store):
    (_, rows) = both(store)
    path = sorted(path for path in (store.path / "low" / "c").rglob("*") if path.is_file())[0]
    content = bytearray(path.read_bytes())
    content[5] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match="a chunk of low fails its checksum"):
        rows.rows(np.array([1]))


def test_a_shuffle_has_every_row_once_and_is_the_seeds(store):
    index = torch.tensor([3, 20, 7, 0, 11, 12, 13, 5])
    for rows in both(store):
        orders = []
        for seed in (0, 0, 1):
            torch.manual_seed(seed)
            orders.append(rows.shuffled(index).tolist())
        assert orders[0] == orders[1] != orders[2] and sorted(orders[0]) == sorted(index.tolist())


def test_a_shuffle_of_streamed_rows_reads_each_chunk_once(store, monkeypatch):
    monkeypatch.setattr("heads.features.rows._CHUNKS", 2)
    (_, rows) = both(store)
    order, reads, honest = rows.shuffled(torch.arange(N)).numpy(), [], type(store).read
    monkeypatch.setattr(type(store), "read", lambda self, *about: reads.append(about) or honest(self, *about))
    for start in range(0, N, 3):
        rows.rows(order[start : start + 3])
    n_chunks = -(-N // 4)
    # a batch that straddles two windows may ask for chunks of the first once more
    assert len(set(reads)) == n_chunks * len(SHAPES) and len(reads) <= 2 * len(set(reads))


def test_moments_are_means_of_places_and_variances_about_them(store, values, monkeypatch):
    monkeypatch.setattr("heads.features.rows.BLOCK_BYTES", 4 * 60 * 4)
    for rows in both(store):
        for name in SHAPES:
            x = flat(values, name)[:15].astype(np.float64)
            mean, variance = rows.mean_and_variance(name, np.arange(15))
            np.testing.assert_allclose(mean, x.mean(0), rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(variance, x.var(0).mean(0), rtol=1e-5)


def kept(store, budget):
    """Rows in memory, as many of them on the device too as a budget allows."""
    rows = LayerRows(store, tuple(SHAPES), "cuda", np.inf)
    rows.keep_on_device(budget)
    return rows


@pytest.mark.parametrize("budget", [0, 400, np.inf], ids=["none", "some", "all"])
def test_rows_on_a_device_are_those_of_memory(pretended_cuda, store, values, budget):
    expected, index = LayerRows(store, tuple(SHAPES), "cpu", np.inf), np.array([3, 20, 3, 0])
    rows = kept(store, budget)
    for name in SHAPES:
        assert torch.equal(rows.read(name, 2, 9).cpu(), expected.read(name, 2, 9))
        assert torch.equal(
            torch.cat(list(rows.blocks(name, index))).cpu(), torch.cat(list(expected.blocks(name, index)))
        )
        for asked in (index, torch.from_numpy(index), torch.from_numpy(index).cuda()):
            assert torch.equal(rows[asked][name].cpu(), expected[index][name])
    assert list(rows[index]) == list(SHAPES)


@pytest.mark.parametrize("asked", [np.array([1, 5]), torch.tensor([1, 5])], ids=["array", "tensor"])
def test_batches_of_rows_on_a_device_wait_for_nothing(pretended_cuda, store, asked):
    rows = kept(store, np.inf)
    sent = asked.cuda() if isinstance(asked, torch.Tensor) else asked
    pretended_cuda.forget()
    assert len(rows[sent]) == len(SHAPES)
    assert pretended_cuda.waits == []


def test_batches_of_rows_in_memory_wait_for_the_numbers_of_their_images_alone(pretended_cuda, store):
    rows, index = kept(store, 0), torch.tensor([1, 5], device="cuda")
    pretended_cuda.forget()
    assert len(rows[index]) == len(SHAPES)
    assert len(pretended_cuda.waits) == 1 and all(copy.pinned for copy in pretended_cuda.copies_in(way="to device"))


@pytest.mark.parametrize("budget", [0, 200, 1000, 4000, 10**6])
def test_what_is_kept_on_a_device_never_takes_more_than_the_budget(pretended_cuda, store, budget):
    rows = LayerRows(store, tuple(SHAPES), "cuda", np.inf)
    before = pretended_cuda.allocated
    rows.keep_on_device(budget)
    assert pretended_cuda.allocated - before <= budget
    assert pretended_cuda.allocated - before == ALL or budget < ALL
