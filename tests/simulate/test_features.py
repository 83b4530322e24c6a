"""Features come from their own part of the image, in the order that they are named in."""

import numpy as np
import pytest

from featcache.simulate.anatomy import FIELD_REACH
from featcache.simulate.features import (
    ANALYSIS_SIDE,
    CHANNELS,
    GROUPS,
    N_FEATURES,
    RIM,
    channel_scales,
    encode,
    group_slices,
)
from featcache.simulate.scenes import compose, draw
from support.simulated import load_planted, load_truth


def pixels_seen(truth: dict[str, np.ndarray], vertex: int) -> np.ndarray:
    """Pixels of an image of ANALYSIS_SIDE that a pixel-driven vertex can depend on: its field's cells and their rim."""
    at = (np.arange(ANALYSIS_SIDE) + 0.5) / ANALYSIS_SIDE
    reach = FIELD_REACH * truth["field_size"][vertex] + 0.5 / GROUPS[0].grid + RIM / ANALYSIS_SIDE
    near_x = np.abs(at - truth["field_x"][vertex]) <= reach
    near_y = np.abs(at - truth["field_y"][vertex]) <= reach
    return near_y[:, None] & near_x[None, :]


def test_an_early_vertex_sees_nothing_outside_its_field(tree):
    planted, truth = load_planted(tree, "subj01", "lh"), load_truth(tree, "subj01", "lh")
    scene = compose(0, 7)
    pixels = draw(scene, ANALYSIS_SIDE)
    noise = np.random.default_rng(0).integers(0, 256, pixels.shape, dtype=np.uint8)
    before = planted.signals(encode(pixels, scene)[None])[0]
    local = [v for v in np.flatnonzero(truth["level"] == "early") if not pixels_seen(truth, v).all()]
    assert len(local) > 10
    for vertex in local:
        seen = pixels_seen(truth, vertex)[..., None]
        outside, inside = (np.where(where, noise, pixels) for where in (~seen, seen))
        assert planted.signals(encode(outside, scene)[None])[0, vertex] == before[vertex]
        assert abs(planted.signals(encode(inside, scene)[None])[0, vertex] - before[vertex]) > 0.05


def test_groups_cover_the_channels_and_the_features_once():
    groups = group_slices()
    for columns, total in ((1, len(CHANNELS)), (2, N_FEATURES)):
        covered = np.concatenate([np.arange(total)[group[columns]] for group in groups])
        assert covered.tolist() == list(range(total))
    assert all(CHANNELS[group[1]][0].startswith(group[0].name) for group in groups)


def test_a_channel_s_scale_is_over_images_and_cells_and_never_0():
    features = np.zeros((4, N_FEATURES))
    group, _, columns = group_slices()[0]
    cells = np.random.default_rng(0).standard_normal((4, group.n_cells))
    features[:, columns][:, : group.n_cells] = cells  # of the first channel
    scales = channel_scales(features)
    assert scales[0] == pytest.approx(cells.std()) and (scales[1:] == 1).all()
