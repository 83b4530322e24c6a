"""A prior says how much each place and layer may weigh, in the geometry of the image and not of a grid."""

import math

import numpy as np
import pytest

from heads.solvers.layers.priors import CENTRES, DEPTHS, NARROW_IMAGES, WIDTHS, Prior, depths_of, prior_set


def test_a_window_is_a_gaussian_of_the_places_centres():
    window = Prior(0.3, 0.8, 0.2).window((4, 6)).reshape(4, 6)
    for i in range(4):
        for j in range(6):
            squared = ((j + 0.5) / 6 - 0.3) ** 2 + ((i + 0.5) / 4 - 0.8) ** 2
            assert window[i, j] == pytest.approx(math.exp(-squared / (2 * 0.2**2)))


def test_x_goes_to_the_right_and_y_down():
    right, down = Prior(0.9, 0.1, 0.2).window((5, 5)).reshape(5, 5), Prior(0.1, 0.9, 0.2).window((5, 5)).reshape(5, 5)
    assert np.unravel_index(right.argmax(), (5, 5)) == (0, 4)
    assert np.unravel_index(down.argmax(), (5, 5)) == (4, 0)


def test_the_whole_image_is_flat_on_every_grid():
    for grid in ((1, 1), (7, 7), (3, 9)):
        np.testing.assert_array_equal(Prior().window(grid), np.ones(grid[0] * grid[1]))


def test_a_preference_for_a_depth_is_largest_there_and_none_is_the_same_for_all():
    for depth in (0.0, 0.5, 1.0):
        shares = [Prior(depth=depth).layer(d) for d in np.linspace(0, 1, 11)]
        assert np.argmax(shares) == round(10 * depth) and max(shares) == 1 and min(shares) > 0
    assert {Prior().layer(d) for d in np.linspace(0, 1, 11)} == {1.0}


def test_the_set_has_every_window_with_every_depth_once(every_window):
    for n_images, widths in ((NARROW_IMAGES - 1, WIDTHS[:1]), (NARROW_IMAGES, WIDTHS)):
        priors = prior_set({"low": (4, 4), "pooled": (1, 1)}, DEPTHS, n_images)
        assert len(priors) == len(set(priors)) == (1 + len(widths) * len(CENTRES) ** 2) * len(DEPTHS)
        assert {prior.width for prior in priors} == {np.inf, *widths}
    assert priors[0] == Prior()


def test_features_without_places_have_no_windows_to_choose_from():
    assert prior_set({"pooled": (1, 1), "a.cls": (1, 1)}, (None,)) == [Prior()]
    assert prior_set({"pooled": (1, 1), "a": (1, 1)}, DEPTHS) == [Prior(depth=depth) for depth in DEPTHS]


def test_depths_go_from_the_first_layer_to_the_last_whatever_else_is_among_them():
    assert depths_of(["pooled", "a", "b", "c"]) == {"pooled": 1, "a": 0, "b": 0.5, "c": 1}
    assert depths_of(["a.cls", "a", "b.cls", "b"]) == {"a.cls": 0, "a": 0, "b.cls": 1, "b": 1}
    assert depths_of(["pooled"]) == {"pooled": 1}
    assert all(math.isfinite(depth) for depth in depths_of(["a"]).values())
