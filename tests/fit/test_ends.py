"""Features at the ends of float32 are refused by name before a fit; those of any usual scale are not."""

from types import SimpleNamespace

import numpy as np
import pytest

from featcache.errors import StoreError
from heads.fit.ends import refuse_ends


def features_of(values: np.ndarray) -> SimpleNamespace:
    store = SimpleNamespace(
        name="made",
        key={"transform": {}},
        image_ids=np.arange(len(values)),
        arrays={"pooled": values},
        chunk_rows=lambda name: 16,
        read=lambda name, start=0, stop=None: values[start:stop],
    )
    return SimpleNamespace(stores=(store,), names=("pooled",))


@pytest.fixture
def values() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(700, 12)).astype(np.float32)


@pytest.mark.parametrize("scale", [1e-9, 1e-3, 1.0, 1e4, 1e9])
def test_usual_scales_pass(values, scale):
    refuse_ends(features_of(values * np.float32(scale)), "linear")


@pytest.mark.parametrize(("scale", "head"), [(1e18, "linear"), (1e-24, "linear"), (1e-6, "spatial"), (1e-6, "core")])
def test_features_at_the_ends_are_refused_by_their_array(values, scale, head):
    with pytest.raises(StoreError, match="features pooled of made: expected numbers whose largest"):
        refuse_ends(features_of(values * np.float32(scale)), head)


@pytest.mark.parametrize("row", [0, 300, 699])
def test_one_huge_value_is_refused_by_its_row_and_column(values, row):
    values[row, 7] = -1e30
    with pytest.raises(StoreError, match=rf"found -1.0e\+30 in row {row}, column 7"):
        refuse_ends(features_of(values), "linear")
