"""No change of one bit in what a store says of itself is taken for something else."""

import json

import numpy as np
import pytest

from featcache.cache.records import COMMITTED, DESCRIPTION
from featcache.cache.store import Store, create_store, open_store
from featcache.errors import StoreError

ROWS = np.random.default_rng(0).normal(size=(10, 3)).astype(np.float32)


@pytest.fixture
def store(tmp_path) -> Store:
    made = create_store(tmp_path, "a", {"kind": "features", "size": 224}, np.arange(10), 7, {"pooled": 3}, {"n": 2})
    made.append({"pooled": ROWS})
    return made


def said(store: Store) -> tuple:
    return json.dumps(store.key), json.dumps(store.facts), store.n_train, store.image_ids.tolist(), list(store.arrays)


@pytest.mark.parametrize("name", [DESCRIPTION, COMMITTED, f"pooled/{DESCRIPTION}"])
def test_a_changed_bit_is_refused_or_says_the_same(store, name):
    path, expected = store.path / name, said(store)
    whole = path.read_bytes()
    refused = 0
    for bit in range(8 * len(whole)):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        try:
            found = open_store(store.path)
            rows = found.read("pooled")
        except StoreError:
            refused += 1
            continue
        assert said(found) == expected
        np.testing.assert_array_equal(rows, ROWS)
    assert refused > 0.8 * 8 * len(whole)


@pytest.mark.parametrize("arrays", [["pooled", "pooled"], ["../pooled"], [".pooled"], [""], ["a/b"], ["x" * 300]])
def test_arrays_with_names_that_no_folder_can_have_are_refused(store, arrays):
    path = store.path / DESCRIPTION
    content = json.loads(path.read_text())
    about = content["attributes"]["featcache"]
    del about["digest"]  # as of an earlier version
    about["arrays"] = arrays
    path.write_text(json.dumps(content))
    with pytest.raises(StoreError, match="names that no folder can have"):
        open_store(store.path)
