"""The models that are scored: the last blend is read out of fold, and a reference is one name."""

from pathlib import Path

import numpy as np
import pytest

import cli
from featcache.dataset.splits import BY_ID
from featcache.errors import ConfigError
from featcache.workdir import Workdir
from heads.blend.saved import NestedCoefficients
from heads.statistics.sources import BlendedModel, Folding, Scored, reference_of
from support.statistics import Given, subject_with

IDS = np.arange(40) * 3


def test_folds_are_those_of_the_split():
    folding = Folding(4, 2, BY_ID)
    np.testing.assert_array_equal(folding.folds(IDS), BY_ID.folds(IDS, 4, 2))
    assert folding.key == (4, 2, "") != Folding(4, 1, BY_ID).key


def test_a_blend_out_of_fold_is_its_models_with_the_weights_of_each_fold():
    rng = np.random.default_rng(0)
    predictions, weights, intercept = rng.normal(size=(2, 40, 6)), rng.normal(size=(5, 2, 6)), rng.normal(size=(5, 6))
    weights[:, 1] = 0  # of a model that is not needed, and so not read
    folds = rng.integers(0, 5, 40)
    nested = NestedCoefficients(("a", "b"), weights.astype(np.float32), intercept.astype(np.float32))
    blend = BlendedModel({"lh": nested}, {"a": Given("a", {"lh": predictions[0].astype(np.float32)})}, folds)
    expected = [intercept[fold] + weights[fold, 0] * predictions[0, row] for row, fold in enumerate(folds)]
    np.testing.assert_allclose(blend.read("lh", slice(2, 5)), np.array(expected)[:, 2:5], rtol=1e-4, atol=1e-5)
    assert blend.name == "blend"


def test_a_reference_is_one_of_the_models(tmp_path: Path):
    names = ("net ridge 12ab34", "net other 56cd78")
    models = [Scored(Given(name, {}), Folding(5, 0, BY_ID), False) for name in names]
    found = {subject_with(tmp_path, {"lh": np.zeros((4, 2))}): models}
    assert reference_of(found, "") == ""
    assert reference_of(found, "56cd78") == reference_of(found, "*other*") == names[1]
    for pattern in ("net*", "nothing"):
        with pytest.raises(ConfigError, match="--against"):
            reference_of(found, pattern)


def test_a_blend_whose_file_is_gone_is_left_out_and_that_is_said(filled, capfd):
    assert cli.run(["blend"]) == 0
    capfd.readouterr()
    Workdir(filled).saved_blend.unlink()
    assert cli.run(["scores"]) == 0
    assert "blend.safetensors is missing; run 'blend' again" in capfd.readouterr().err
