"""Inputs keep their numbers and devices, units change no digit, and bands are the columns that their names say."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from featcache.errors import ArgumentError, ConfigError
from heads.solvers.estimator import RidgeHead
from heads.solvers.inputs import (
    Form,
    argument_errors,
    columns_of,
    features_of,
    in_range,
    rescaled,
    responses_of,
)
from heads.solvers.units import column_units, in_units, means_of, unit_of

VALUES = np.arange(12.0).reshape(4, 3)


@pytest.mark.parametrize(
    ("given", "read"),
    [("float16", "float32"), ("float32", "float32"), ("float64", "float64"), ("int32", "float64"), ("bool", "float64")],
)
def test_dtypes_of_arrays_and_tensors_are_read_alike(given, read):
    array = (VALUES % 2).astype(given)
    for features in (array, torch.from_numpy(array)):
        x = features_of(RidgeHead(), features)
        assert x.dtype == getattr(torch, read)
        np.testing.assert_array_equal(x, VALUES % 2)


def test_memory_is_shared_where_it_can_be_and_read_only_arrays_are_left_alone():
    array = VALUES.copy()
    assert np.shares_memory(features_of(RidgeHead(), array).numpy(), array)
    array.flags.writeable = False
    x = features_of(RidgeHead(), array)
    x += 1
    np.testing.assert_array_equal(array, VALUES)
    np.testing.assert_array_equal(features_of(RidgeHead(), VALUES[::-1]), VALUES[::-1])


def test_responses_take_the_dtype_of_the_features_and_remember_their_form():
    x = torch.zeros(4, 2)
    y, form = responses_of(RidgeHead(), VALUES[:, 0], x)
    assert y.dtype == torch.float32 and y.shape == (4, 1) and form == Form(one_vertex=True, tensors=False)
    assert form.attribute(torch.ones(2, 1)).shape == (2,)
    y, form = responses_of(RidgeHead(), torch.from_numpy(VALUES), x)
    assert y.shape == (4, 3) and form == Form(one_vertex=False, tensors=True)
    assert isinstance(form.attribute(y), torch.Tensor) and isinstance(form.predictions(y, VALUES), np.ndarray)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_units_are_powers_of_two_that_bring_squares_into_range(dtype):
    info = torch.finfo(dtype)
    columns = torch.tensor([[0.0, 1.0, 1e5, 1e30, -1e-30, info.max, -info.tiny]], dtype=dtype)
    units = unit_of(columns)
    assert units[:3].tolist() == [1, 1, 1]
    np.testing.assert_array_equal(np.log2(units.numpy()) % 1, 0)
    scaled = in_units(columns, units)
    assert scaled[0, 3:5].abs().min() >= 1 and scaled[0, 3:].abs().max() <= 2**8
    assert torch.equal(scaled * units, columns)


def test_ordinary_values_are_not_copied():
    values = torch.ones(3, 2)
    assert in_units(values, unit_of(values)) is values and in_units(values, 1.0) is values


def test_the_mean_of_a_constant_column_is_its_value():
    columns = torch.stack([torch.full((7,), 7.3), torch.arange(7.0)], 1)
    means = means_of(columns)
    assert means[0] == columns[0, 0] and means[1] == 3


def test_values_come_back_in_their_unit_or_are_refused():
    values = torch.tensor([[0.5, 2.0], [0.0, 1.0]])
    np.testing.assert_allclose(rescaled("x", values, torch.tensor([1e30, 1e-30])), values * torch.tensor([1e30, 1e-30]))
    assert rescaled("x", values.double(), torch.tensor([1.0, 2.0]), torch.float32).dtype == torch.float32
    with pytest.raises(ArgumentError, match="x: expected numbers in the range of float32; found larger ones"):
        rescaled("x", values, torch.tensor([1.0, 3e38]))
    with pytest.raises(ArgumentError, match=r"found smaller ones.*float64 features"):
        rescaled("x", values, torch.tensor([1.0, 1e-60], dtype=torch.float64))
    with pytest.raises(ArgumentError, match="range of float64"):
        in_range("x", torch.tensor([np.inf], dtype=torch.float64))
    assert in_range("x", torch.tensor([3e38, 3e38]))[0] > 1e38  # numbers whose sum is not one


NAMES = np.array(["a", "b", "c", "d"], dtype=object)


@pytest.mark.parametrize(
    ("columns", "expected"),
    [
        (slice(1, 3), [1, 2]),
        (slice(-2, None), [2, 3]),
        ([0, -1], [0, 3]),
        (range(2), [0, 1]),
        (2, [2]),
        ([True, False, False, True], [0, 3]),
        (np.array([0, 1, 1, 0], dtype=bool), [1, 2]),
        (["d", "a"], [3, 0]),
        ("b", [1]),
        (torch.tensor([1, 2]), [1, 2]),
    ],
)
def test_a_band_is_any_choice_of_columns(columns, expected):
    assert columns_of({"band": columns}, 4, NAMES)["band"].tolist() == expected


def test_no_bands_are_one_band_of_all():
    assert columns_of(None, 3)["all"].tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("bands", "message"),
    [
        ({}, "a name for each band"),
        ([slice(0, 2)], "a name for each band"),
        ({"v": slice(4, None)}, "band 'v': expected a slice"),
        ({"v": []}, "band 'v'"),
        ({"v": [4]}, "some of the 4 columns"),
        ({"v": [-5]}, "some of the 4 columns"),
        ({"v": [0.5]}, "some of the 4 columns"),
        ({"v": [True, False]}, "some of the 4 columns"),
        ({"v": [[0, 1]]}, "some of the 4 columns"),
        ({"v": [1, 1]}, "each column once"),
        ({"v": [3, -1]}, "each column once"),
        ({"v": ["a", "z"]}, "names of columns; found 'z'"),
    ],
)
def test_bands_that_there_are_not_are_refused(bands, message):
    with pytest.raises(ArgumentError, match=message):
        columns_of(bands, 4, NAMES)


def test_names_need_a_data_frame():
    with pytest.raises(ArgumentError, match="features without names; pass a DataFrame"):
        columns_of({"v": ["a"]}, 4)


def test_settings_are_refused_as_value_errors():
    with pytest.raises(ValueError, match="here: expected 1; found 2; correct it"), argument_errors():
        raise ConfigError("here", expected=1, found=2, remedy="correct it")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_columns_far_beyond_the_others_are_divided_by_powers_of_two(dtype):
    x = torch.randn(200, 10, generator=torch.Generator().manual_seed(0)).to(dtype)
    units, shared = column_units(x)
    assert shared == 1 and (units == 1).all()
    x[:, 0] *= 1e30
    x[:, 1] = 1000 + x[:, 1] * 1000 * torch.finfo(dtype).eps  # of rounding
    x[:, 2] = 7.3
    units, shared = column_units(x)
    assert shared == 1 and (units[2:] == 1).all() and torch.isinf(units[1])
    np.testing.assert_array_equal(np.log2(units.numpy()[[0]]) % 1, 0)
    scaled = in_units(x, units)
    assert scaled.dtype == dtype and 6 < scaled[:, 0].std() < 20 and not scaled[:, 1].any()
    assert torch.equal(scaled[:, 2:], x[:, 2:])
    small, shared = column_units(x * 1e-33 if dtype == torch.float32 else x * 1e-300)
    assert shared < 1e-30 and small[3] == shared
