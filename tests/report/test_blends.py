"""What a blend is worth, in lines and as JSON."""

import json
from dataclasses import replace

from heads.blend.run import Ensemble
from heads.blend.uncertainty import Gain, Null
from heads.report.blends import blend_as_json, gain_lines


def ensemble(accuracy, unused=()):
    return Ensemble(
        scores={},
        gains=[Gain("best single", 40.0, 2.0, 1.0, 3.0, 2.5)],
        null=Null(0.01, 0.02, 0.05),
        accuracy=accuracy,
        weights={},
        unused=list(unused),
        chosen_on=[],
        test={},
        submission=None,
    )


def test_a_gain_has_its_share_interval_and_what_it_would_seem():
    gain, null = gain_lines(ensemble(True))
    assert gain.startswith("blend over best single: +2.00 points (+5.0 %), 95 % interval over images +1.00 to +3.00;")
    assert gain.endswith("+2.50")
    assert null == "blends of shuffled responses: mean r 0.0100, at most 0.0200; optimistic 0.0500"
    assert "+2.0000 of mean r" in gain_lines(ensemble(False))[0]


def test_models_without_weight_are_named():
    assert gain_lines(ensemble(True, ["a", "b"]))[-1] == "no weight anywhere: a, b"


def test_one_model_has_nothing_to_compare():
    alone = replace(ensemble(True), gains=[], null=None)
    assert gain_lines(alone) == [] and blend_as_json(alone)["shuffled"] is None


def test_json_has_what_the_lines_say():
    found = json.loads(json.dumps(blend_as_json(ensemble(True, ["a"]))))
    assert found["gains"][0]["low"] == 1.0 and found["shuffled"]["largest"] == 0.02 and found["unused"] == ["a"]
