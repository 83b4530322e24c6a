"""Scores of predictions of test images, where their responses are given."""

import numpy as np

from featcache.dataset.subject import Subject
from heads.scores.metrics import VertexScores, pearson_r


def score_test(subject: Subject, surface: str, predictions: np.ndarray) -> VertexScores:
    """r of predictions of the test images with their responses, with the ceilings of these responses and the ROIs.

    predictions : (n_test, n_vertices). Only where `subject.has_test_responses`
    """
    r = pearson_r(predictions, subject.test_responses(surface))
    ceiling = subject.test_noise_ceiling.get(surface)
    return VertexScores(subject.name, surface, r, ceiling, subject.rois[surface])
