"""The blend of one subject: mean weights of ROIs, weights of backbones, scores of surfaces."""

from types import SimpleNamespace

import numpy as np
import pytest

from heads.blend.subject import blend_subject, mean_weights, vertex_scores
from heads.config import BlendConfig
from support.blends import (
    N_TRAIN,
    N_VERTICES,
    ROIS,
    WIDTHS,
    made_up,
    mixed,
    models_of,
    slow_r,
    standardised,
    subject_of,
)


def test_the_weight_of_an_roi_is_the_mean_over_its_vertices(tmp_path):
    weights = np.random.default_rng(0).dirichlet(np.ones(2), size=7)
    blended = SimpleNamespace(models=("a", "b"), weights=weights)
    found = mean_weights(subject_of(tmp_path, made_up()[1]), blended)
    first = 0
    for surface, width in WIDTHS.items():
        own = weights[first : first + width]
        masks = {"all": np.full(width, True)} | {roi: mask for roi, mask in ROIS[surface].items() if mask.any()}
        assert found[surface] == {
            roi: pytest.approx(dict(zip("ab", own[mask].mean(0), strict=True)), abs=1e-6) for roi, mask in masks.items()
        }
        first += width


def test_scores_of_surfaces_have_their_vertices(tmp_path):
    r, ceiling = np.linspace(-1, 1, N_VERTICES), np.linspace(0, 1, N_VERTICES)
    scores = vertex_scores(subject_of(tmp_path, made_up()[1], ceiling), r)
    assert [score.surface for score in scores] == list(WIDTHS)
    np.testing.assert_array_equal(np.concatenate([score.r for score in scores]), r)
    np.testing.assert_array_equal(np.concatenate([score.noise_ceiling for score in scores]), ceiling)


@pytest.mark.slow
def test_a_blend_by_backbone_has_one_weight_for_all_models_of_a_backbone(tmp_path):
    predictions, responses = made_up(noise=(1, 3, 2, 2))
    subject, models = subject_of(tmp_path, responses), models_of(tmp_path / "stores", predictions)
    config = BlendConfig(method="score", per="all", by="backbone")
    blended = blend_subject(subject, models, config, accuracy=False)
    assert blended.models == tuple(model.name for model in models)
    np.testing.assert_allclose(blended.weights[:, 0], blended.weights[:, 1])
    np.testing.assert_allclose(blended.weights[:, 2], blended.weights[:, 3])
    blend = mixed(blended.weights, standardised(predictions)[:, :N_TRAIN])
    np.testing.assert_allclose(blended.r["optimistic"], slow_r(blend, responses[:N_TRAIN]), atol=1e-4)
