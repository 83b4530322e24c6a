"""What a blend is worth, in lines and as JSON: the same numbers, in the units of the score."""

import json

import numpy as np
import pytest

from heads.blend.run import Ensemble
from heads.blend.uncertainty import Gain, Null
from heads.report.blends import blend_as_json, gain_lines
from heads.report.scores import scores_as_json
from heads.scores.metrics import VertexScores

GAIN = Gain(over="uniform", score=40.0, gain=2.0, low=-0.5, high=3.25, optimistic=4.125)


def ensemble(gains=(GAIN,), accuracy=True, unused=()):
    scores = {"blend": [VertexScores("subj01", "lh", np.array([0.5, 0.25]), None, {})]}
    weights = {"subj01": {"lh": {"all": {"a": 1.0, "b": 0.0}}}}
    return Ensemble(scores, list(gains), Null(0.0012, 0.0034, 0.0056), accuracy, weights, list(unused), None)


def test_gains_are_points_with_their_interval_and_their_share():
    first, second = gain_lines(ensemble())
    assert first == (
        "blend over uniform: +2.00 points (+5.0 %), 95 % interval over images -0.50 to +3.25; "
        "optimistic, on the images its weights were learnt on: +4.12"
    )
    assert second == "blends of shuffled responses: mean r 0.0012, at most 0.0034; optimistic 0.0056"


def test_without_ceilings_gains_are_of_mean_r():
    gain = Gain(over="best single", score=0.4, gain=0.01234, low=0.0, high=0.1, optimistic=0.02)
    assert gain_lines(ensemble([gain], accuracy=False))[0].startswith(
        "blend over best single: +0.0123 of mean r (+3.1 %), 95 % interval over images +0.0000 to +0.1000;"
    )


@pytest.mark.parametrize("score", [0.0, -1.0])
def test_a_gain_over_nothing_has_no_share(score):
    gain = Gain(over="uniform", score=score, gain=2.0, low=0.0, high=3.0, optimistic=2.0)
    assert "%)" not in gain_lines(ensemble([gain]))[0]


def test_models_without_weight_are_named_where_there_are_any():
    assert gain_lines(ensemble(unused=("b", "c")))[-1] == "no weight anywhere: b, c"
    assert not any("no weight" in line for line in gain_lines(ensemble()))


def test_json_has_everything_that_lines_have():
    done = ensemble(unused=("b",))
    found = blend_as_json(done)
    assert list(found) == ["weights", "unused", "scores", "gains", "shuffled"]
    assert found["gains"] == [vars(GAIN)] and found["shuffled"] == vars(done.null) and found["unused"] == ["b"]
    assert found["scores"] == scores_as_json(done.scores) and found["weights"] == done.weights
    assert json.loads(json.dumps(found, allow_nan=False)) == found
