"""fc.scores: what a program asks for is what is computed."""

import pandas
import pytest

import featcache
from featcache.errors import ConfigError, StoreError
from heads.statistics.table import COLUMNS


@pytest.mark.slow
def test_scores_are_a_frame_of_what_was_asked_for(filled, tiny):
    frame = featcache.scores(filled, tiny, subjects="1", models="test_resnet*", folds=True, permutations=9)
    assert isinstance(frame, pandas.DataFrame) and set(frame.subject) == {"subj01"}
    assert len(frame) == 4 * 84 * (1 + 5) and frame.p[frame.fold == "all"].between(0.1, 1).all()
    assert tuple(frame.columns[: len(COLUMNS)]) == COLUMNS and COLUMNS[:4] == ("subject", "surface", "vertex", "roi")
    assert "difference" not in frame and "q" in frame
    with pytest.raises(ConfigError, match="--models"):
        featcache.scores(filled, tiny, models="nothing")


@pytest.mark.slow
def test_an_empty_work_folder_has_no_scores(tiny, tmp_path):
    with pytest.raises(StoreError, match="predictions for this tree"):
        featcache.scores(tmp_path, tiny)
