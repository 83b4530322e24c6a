"""Features and responses at the ends of float32 are refused by name before a fit; those of any usual scale are not."""

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from featcache.errors import DataError, StoreError
from heads.fit.ends import refuse_ends


def subject_of(folder: Path, responses: np.ndarray) -> SimpleNamespace:
    np.save(folder / "lh.npy", responses)
    return SimpleNamespace(
        surfaces=("lh",), responses=lambda surface: responses, response_paths={"lh": folder / "lh.npy"}
    )


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
def test_usual_scales_pass(tmp_path, values, scale):
    few = values[:, :3] * np.float32(min(max(scale, 1e-4), 1e4))
    refuse_ends(subject_of(tmp_path, few), features_of(values * np.float32(scale)), "linear")


@pytest.mark.parametrize(("scale", "head"), [(1e18, "linear"), (1e-24, "linear"), (1e-6, "spatial"), (1e-6, "core")])
def test_features_at_the_ends_are_refused_by_their_array(tmp_path, values, scale, head):
    with pytest.raises(StoreError, match="features pooled of made: expected numbers whose largest"):
        refuse_ends(subject_of(tmp_path, values), features_of(values * np.float32(scale)), head)


@pytest.mark.parametrize("row", [0, 300, 699])
def test_one_huge_value_is_refused_by_its_row_and_column(tmp_path, values, row):
    values[row, 7] = -1e30
    with pytest.raises(StoreError, match=rf"found -1.0e\+30 in row {row}, column 7"):
        refuse_ends(subject_of(tmp_path, np.ones((700, 1))), features_of(values), "linear")


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e14])
def test_responses_at_the_ends_are_refused_by_their_vertex(tmp_path, values, scale):
    responses = values.copy()
    responses[:, 5] *= np.float32(scale)
    responses[:, 6] = 1e9  # constant, which says nothing of a scale
    with pytest.raises(DataError, match=r"lh.npy: expected responses whose standard deviation.*at vertex 5"):
        refuse_ends(subject_of(tmp_path, responses), features_of(values), "linear")
