"""Parts are what JSON gives back, and features of one network and input share its pass."""

import json
from dataclasses import replace

import numpy as np
import pytest

from featcache.dataset.algonauts import open_challenge
from heads.blend.saved import Coefficients
from heads.encoder.parts import FeaturePart, ModelPart, SubjectPart, network_parts
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def parts(every_kind, tiny):
    return encoder_of_work(open_challenge(tiny).subjects, every_kind)._parts


def test_parts_come_back_from_json(parts):
    for part in parts.features.values():
        found = FeaturePart.from_json(json.loads(json.dumps(part.to_json())))
        assert found.rows == part.rows and found.network_id == part.network_id and found.to_json() == part.to_json()
    models = [model for subject in parts.subjects.values() for model in subject.models.values()]
    for model in models:
        assert ModelPart.from_json(json.loads(json.dumps(model.to_json()))) == model
    assert len(models) == 22


def test_what_decides_a_network_tells_passes_apart(parts):
    part = next(iter(parts.features.values()))
    for changed in (
        {"weights": "x"},
        {"backbone": "x"},
        {"dtype": "bfloat16"},
        {"code": {"a": "b"}},
        {"transform": {}},
    ):
        assert replace(part, key=replace(part.key, **changed)).network_id != part.network_id
    assert replace(part, key=replace(part.key, fused=not part.key.fused)).network_id != part.network_id
    same = replace(part, network="called otherwise", weights="moved", key=replace(part.key, layers=("pooled",)))
    assert same.network_id == part.network_id


def test_features_are_grouped_by_network_each_once(parts):
    models = [model for subject in parts.subjects.values() for model in subject.models.values()]
    grouped = network_parts(parts, models)
    names = [name for of_network in grouped.values() for name in of_network]
    assert sorted(names) == sorted(parts.features) and len(grouped) == 8
    for identity, of_network in grouped.items():
        assert {part.network_id for part in of_network.values()} == {identity}
    assert network_parts(parts, []) == {}
    (first,) = network_parts(parts, [next(model for model in models if len(model.features) == 1)])
    assert first in grouped


def test_a_blend_needs_the_models_with_weight_on_any_surface():
    def blend(*rows):
        return Coefficients(("a", "b", "c"), np.array(rows, np.float32), np.zeros(2, np.float32))

    part = SubjectPart(
        name="s",
        n_vertices={"lh": 2, "rh": 2},
        models=dict.fromkeys("abc"),
        rois={"lh": {"V1": np.array([True, False]), "none": np.zeros(2, bool)}, "rh": {"V2": np.array([False, True])}},
        noise_ceiling={},
        blend={"lh": blend([0, 0], [0, 1], [0, 0]), "rh": blend([0, 2], [0, 0], [0, 0])},
    )
    assert sorted(part.needed("blend")) == ["a", "b"] and part.needed("c") == ["c"]
    assert part.names == ["blend", "a", "b", "c"] and part.roi_names == ["V1", "V2"]
    assert replace(part, blend={}).names == ["a", "b", "c"]
