"""Predictions of test images are scored against their responses, with the ceilings of these."""

import numpy as np
import pytest

from featcache.dataset.subject import Images, Subject
from heads.scores.withheld import score_test

N_TEST, N_VERTICES = 12, 5


@pytest.mark.parametrize("ceiling", [None, np.linspace(0.2, 1, N_VERTICES, dtype=np.float32)])
def test_r_is_that_of_each_vertex_and_the_ceiling_that_of_the_test_responses(ceiling, tmp_path):
    rng = np.random.default_rng(0)
    responses, predictions = rng.normal(size=(2, N_TEST, N_VERTICES)).astype(np.float32)
    predictions[:, 0] = 3 * responses[:, 0] + 2
    predictions[:, 1] = 4
    np.save(tmp_path / "test.npy", responses)
    rois = {"V4": {"V4d": np.arange(N_VERTICES) < 2}}
    other = {"V4": np.zeros(N_VERTICES, np.float32)}  # of the training responses
    subject = Subject(
        "m0",
        Images.none(),
        Images.none(),
        {},
        {"V4": N_VERTICES},
        rois,
        other,
        {"V4": None},
        test_response_paths={"V4": tmp_path / "test.npy"},
        test_noise_ceiling={"V4": ceiling},
    )
    scores = score_test(subject, "V4", predictions)
    slow = [np.corrcoef(predictions[:, v], responses[:, v])[0, 1] for v in (0, 2, 3, 4)]
    np.testing.assert_allclose(scores.r[[0, 2, 3, 4]], slow, rtol=1e-6)
    assert scores.r[0] == pytest.approx(1) and scores.r[1] == 0
    assert (scores.subject, scores.surface) == ("m0", "V4") and scores.rois is rois["V4"]
    assert scores.noise_ceiling is ceiling
