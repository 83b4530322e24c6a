"""Non-negative least squares of many problems at once: the optimum that scipy finds for one after the other."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import nnls as one_by_one

from heads.blend.nnls import nnls


def problems(n, n_rows, n_variables, shared=0.0, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(n, n_rows, n_variables)) + shared * rng.normal(size=(n, n_rows, 1))
    y = x @ np.maximum(rng.normal(size=(n, n_variables, 1)), 0) + rng.normal(size=(n, n_rows, 1))
    return x, y[..., 0]


def normal_equations(x, y):
    return np.einsum("piv,piw->pvw", x, x), np.einsum("piv,pi->pv", x, y)


@pytest.mark.slow
@settings(max_examples=30, deadline=None)
@given(
    n_variables=st.integers(1, 30),
    shared=st.sampled_from([0.0, 1.0, 10.0]),
    seed=st.integers(0, 2**32 - 1),
)
def test_the_optimum_of_each(n_variables, shared, seed):
    x, y = problems(20, 3 * n_variables + 5, n_variables, shared, seed)
    found = nnls(*normal_equations(x, y))
    expected = np.stack([one_by_one(a, b)[0] for a, b in zip(x, y, strict=True)])
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max())
    assert (found >= 0).all()


@pytest.mark.parametrize("n_rows", [3, 8])
def test_fewer_rows_than_variables_reach_the_least_error(n_rows):
    x, y = problems(50, n_rows, 12)
    found = nnls(*normal_equations(x, y))
    error = [np.linalg.norm(a @ w - b) for a, b, w in zip(x, y, found, strict=True)]
    least = [one_by_one(a, b)[1] for a, b in zip(x, y, strict=True)]
    np.testing.assert_allclose(error, least, atol=1e-4)


def test_equal_columns_share_what_one_would_have():
    x, y = problems(20, 40, 4)
    alone = nnls(*normal_equations(x, y))
    twice = nnls(*normal_equations(x[..., [0, 0, 1, 2, 3]], y))
    np.testing.assert_allclose(twice[:, 0], twice[:, 1], atol=1e-6)
    np.testing.assert_allclose(twice[:, 0] + twice[:, 1], alone[:, 0], atol=1e-5)


def test_nothing_to_explain_and_nothing_to_explain_it_with():
    gram, cross = normal_equations(*problems(3, 40, 4))
    gram[1], cross[1] = 0, 0  # no signal at all
    gram[2, 3], gram[2, :, 3], cross[2, 3] = 0, 0, 0  # a constant variable
    cross[0] = -np.abs(cross[0])  # everything points the wrong way
    found = nnls(gram, cross)
    assert (found[:2] == 0).all() and found[2, 3] == 0 and np.isfinite(found).all()


def test_more_problems_than_a_tile(monkeypatch):
    gram, cross = normal_equations(*problems(33, 40, 5))
    whole = nnls(gram, cross)
    monkeypatch.setattr("heads.blend.nnls._TILE", 8)
    np.testing.assert_array_equal(nnls(gram, cross), whole)
