"""Kernels of bands are means over their layers, whatever their stores, and landmarks are columns of them."""

import numpy as np
import pytest
import torch

from heads.compare import spaces as module
from heads.compare.bands import Band
from heads.compare.spaces import Candidate, Spaces, is_sampled, n_columns, spaces_of
from heads.features.sets import feature_sets
from heads.solvers.layers.priors import Prior
from support.plans import plan_of
from support.planted import N_TRAIN, planted_features

WINDOWS = [Prior(), Prior(0.2, 0.4, 0.2)]


@pytest.fixture
def bands(tmp_path):
    subject = planted_features(tmp_path, tmp_path / "work")
    (features,) = feature_sets(subject, tmp_path / "work")
    return (
        Band("maps", (features.only(["near", "far"]),)),
        Band("vector", (features.only(["pooled"]),)),
        Band("both", (features.only(["near"]), features.only(["pooled"]))),
    )


def test_bands_of_any_size_have_the_same_share_and_parts_have_equal_ones(bands):
    plan = plan_of(N_TRAIN, 4)
    made = spaces_of(bands, plan, WINDOWS, "cpu", held=1e9)
    assert len(made) == 2 and all(of_set.landmarks is None for of_set in made)
    for number, of_set in enumerate(made):
        rows = plan.scale_rows(number)
        for window in WINDOWS:
            for kernel in of_set.columns[window]:
                assert kernel.shape == (N_TRAIN, N_TRAIN)
                assert float(kernel.diagonal()[rows].mean()) == pytest.approx(1, abs=1e-4)
    near = spaces_of([Band("near", (bands[2].parts[0],))], plan, WINDOWS[:1], "cpu", held=0)[0]
    first = made[0].columns[WINDOWS[0]]
    torch.testing.assert_close(first[2], (near.columns[WINDOWS[0]][0] + first[1]) / 2, atol=1e-4, rtol=1e-4)


def test_landmarks_are_columns_of_images_that_no_fold_holds_out(bands, monkeypatch):
    plan = plan_of(N_TRAIN, 4)
    whole = spaces_of(bands, plan, WINDOWS, "cpu", held=1e9)
    assert not is_sampled(plan) and n_columns(plan) == N_TRAIN
    monkeypatch.setattr(module, "LANDMARKS", 30)
    assert is_sampled(plan) and n_columns(plan) == 30
    for number, (every, some) in enumerate(zip(whole, spaces_of(bands, plan, WINDOWS, "cpu", held=0), strict=True)):
        assert len(some.landmarks) == 30 and np.isin(some.landmarks, plan.scale_rows(number)).all()
        for window in WINDOWS:
            for kernel, columns in zip(every.columns[window], some.columns[window], strict=True):
                torch.testing.assert_close(columns, kernel[:, some.landmarks], atol=1e-4, rtol=1e-4)


def test_weighted_kernels_are_centred_over_the_images_that_are_fitted_to():
    columns = [torch.randn(9, 9, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    rows, candidate = np.arange(6), Candidate(Prior(), (0.25, 0.75))
    weighted = Spaces({Prior(): columns}).weighted(candidate, rows, rows)
    assert weighted.shape == (2, 9, 6) and float(weighted[:, rows].mean(1).abs().max()) < 1e-6
    expected = 0.75 * (columns[1][:, :6] - columns[1][:6, :6].mean(0))
    torch.testing.assert_close(weighted[1], expected)
    assert candidate.support == {0, 1} and Candidate(Prior(), (0.0, 1.0)).support == {1}
