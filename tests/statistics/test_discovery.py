"""False discovery rate: a worked example, and the definition."""

import numpy as np
import pytest

from heads.statistics.discovery import q_values


def test_a_worked_example():
    p = np.array([0.01, 0.04, 0.03, 0.5])
    # sorted 0.01 0.03 0.04 0.5; times 4/rank: 0.04 0.06 0.0533 0.5; the least from the right: 0.04 0.0533 0.0533 0.5
    np.testing.assert_allclose(q_values(p), [0.04, 0.16 / 3, 0.16 / 3, 0.5])
    np.testing.assert_allclose(q_values(p, "by"), np.minimum(np.array([0.04, 0.16 / 3, 0.16 / 3, 0.5]) * 25 / 12, 1))


@pytest.mark.parametrize("method", ["bh", "by"])
def test_q_is_the_level_at_which_the_step_up_procedure_rejects(method):
    p = np.random.default_rng(0).uniform(size=(5, 20)) ** 3
    q, n = q_values(p, method), p.size
    factor = 1 if method == "bh" else np.sum(1 / np.arange(1, n + 1))
    for level in (0.01, 0.05, 0.2):
        ordered = np.sort(p.ravel())
        passed = np.flatnonzero(ordered <= level * np.arange(1, n + 1) / n / factor)
        threshold = ordered[passed[-1]] if len(passed) else -1
        np.testing.assert_array_equal(q <= level, p <= threshold)


def test_no_vertices_have_no_q():
    assert q_values(np.array([])).shape == (0,)
