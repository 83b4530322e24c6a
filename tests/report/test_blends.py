"""What a blend is worth, in lines and as JSON."""

import io
import json
from dataclasses import replace

import numpy as np
from rich.console import Console

from heads.blend.run import Ensemble
from heads.blend.uncertainty import Gain, Null
from heads.report.blends import blend_as_json, blend_table, gain_lines
from heads.scores.metrics import VertexScores


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


def test_the_table_says_how_its_best_single_model_was_chosen_and_of_one_model_does_not():
    scores = [VertexScores("subj01", "lh", np.full(3, 0.5))]
    several = replace(ensemble(False), scores={"best single": scores, "uniform": scores, "blend": scores})
    out = io.StringIO()
    console = Console(file=out, width=80)
    console.print(blend_table(several, "score per vertex"))
    text = " ".join(out.getvalue().split())
    assert "weights of the blend (score per vertex) were learnt on other folds" in text
    assert "best single: for each fold and surface, the model that is best on the other folds" in text
    out.truncate(0)
    console.print(blend_table(replace(several, scores={"blend": scores}), "score per vertex"))
    assert "best single" not in out.getvalue() and "uniform" not in out.getvalue()


def test_models_without_weight_are_named():
    assert gain_lines(ensemble(True, ["a", "b"]))[-1] == "no weight anywhere: a, b"


def test_one_model_has_nothing_to_compare():
    alone = replace(ensemble(True), gains=[], null=None)
    assert gain_lines(alone) == [] and blend_as_json(alone)["shuffled"] is None


def test_json_has_what_the_lines_say():
    found = json.loads(json.dumps(blend_as_json(ensemble(True, ["a"]))))
    assert found["gains"][0]["low"] == 1.0 and found["shuffled"]["largest"] == 0.02 and found["unused"] == ["a"]
