"""Maps show the blend's r, the layer that predicts best, and the model that leads the blend."""

import base64
import gzip
import json
from dataclasses import replace

import numpy as np

from heads.blend.products import surface_blocks
from heads.blend.saved import Coefficients, load_blend
from heads.page.maps import (
    Map,
    best_layers,
    by_subject,
    categories_scale,
    drawn_share,
    layer_maps,
    leading_models,
    model_maps,
    picture,
    score_maps,
    viewer_data,
)
from heads.page.surface import load_mesh, on_mesh


def without_blend(measured):
    return replace(measured, r={name: r for name, r in measured.r.items() if name != "blend"})


def test_scores_are_of_the_blend_where_there_is_one(measured):
    mesh, subject = load_mesh(), measured.subject
    for one, name, said in ((measured, "blend", "the blend"), (without_blend(measured), "", "best model")):
        (shown,) = score_maps([one], mesh)
        r = one.r[name or one.best]
        mapped = on_mesh(subject, r)
        known = ~np.isnan(mapped)
        np.testing.assert_array_equal(shown.values[known], mapped[known])
        assert said in shown.scale.label and shown.scale.high == np.quantile(r, 0.99)


def test_the_mean_over_subjects_is_over_those_with_the_vertex(measured):
    mesh, subject = load_mesh(), measured.subject
    n = sum(subject.n_vertices.values())
    ones = [
        replace(measured, subject=replace(subject, name=name), r={"blend": np.full(n, r)})
        for name, r in (("a", 0.2), ("b", 0.4))
    ]
    mean, first, _ = score_maps(ones, mesh)
    known = ~np.isnan(first.values)
    np.testing.assert_allclose(mean.values[known], 0.3)
    assert mean.subject == "mean of 2 subjects" and mean.scale == first.scale


def test_the_best_layer_is_that_of_the_best_model_of_one_layer(measured, reported):
    names, best = best_layers(measured, reported.work)
    assert names == ["layer2", "layer4", "pooled"]  # from the first to the deepest
    single = {
        model.key.read[0]: measured.r[model.name]
        for model in measured.models
        if model.key.backbone == "test_resnet" and len(model.key.read) == 1
    }
    assert set(single) == set(names)
    for vertex, number in enumerate(best):
        r = {name: of_layer[vertex] for name, of_layer in single.items()}
        if number < 0:
            assert max(r.values()) <= 0
        else:
            assert r[names[number]] == max(r.values()) > 0
    assert (best >= 0).any()


def test_else_it_is_the_layer_of_most_weight(measured, reported):
    several = replace(measured, models=[one for one in measured.models if len(one.key.read) > 1])
    names, best = best_layers(several, reported.work)
    assert set(names) <= {"pooled", "layer2", "layer4"} and len(names) > 1 and best.max() < len(names)
    assert best_layers(replace(measured, models=[]), reported.work) is None
    assert layer_maps([replace(measured, models=[])], reported.work, load_mesh()) == []


def test_the_leading_model_has_the_largest_part(measured):
    names, subject = [model.name for model in measured.models][:3], measured.subject
    n = sum(subject.n_vertices.values())
    coefficients = np.zeros((3, n), np.float32)
    coefficients[np.arange(n - 1) % 3, np.arange(n - 1)] = -1  # the last vertex has none
    coefficients[0, 1] = 1e-4 * measured.spread[names[1]][1]  # a small part beside that of model 1
    blend = {
        subject.name: {
            surface: Coefficients(tuple(names), coefficients[:, block], np.zeros(block.stop - block.start, np.float32))
            for surface, block in surface_blocks(subject).items()
        }
    }
    found, best = leading_models(measured, blend)
    spread = np.stack([measured.spread[name] for name in names])
    alive = spread[np.arange(n) % 3, np.arange(n)] > 0
    assert found == names and best[-1] == -1
    np.testing.assert_array_equal(best[:-1][alive[:-1]], (np.arange(n - 1) % 3)[alive[:-1]])
    (one,) = model_maps([measured], blend, names[:2], load_mesh())
    assert one.scale.categories == (*names[:2], "others")
    assert one.scale.css[0] == "rgb(59 130 196)"  # of the first model of the page, as everywhere


def test_a_blend_of_other_models_or_vertices_leads_nowhere(measured, reported):
    blend = load_blend(reported.work / "submission" / "blend.safetensors")
    assert leading_models(measured, blend) is not None and leading_models(measured, {}) is None
    fewer = {name: spread for name, spread in list(measured.spread.items())[:1]}
    assert leading_models(replace(measured, spread=fewer), blend) is None
    short = {s: replace(c, of_models=c.of_models[:, :3]) for s, c in blend[measured.subject.name].items()}
    assert leading_models(measured, {measured.subject.name: short}) is None


def test_the_viewer_has_every_map(measured):
    mesh = load_mesh()
    values = np.where(np.arange(20_484) < 10, np.arange(20_484) % 3.0, np.nan)
    shown = [
        Map("a", "model", values, categories_scale(["x", "y", "z"])),
        *score_maps([measured], mesh),
    ]
    data = viewer_data(shown, mesh)
    first, second = json.loads(gzip.decompress(base64.b64decode(data["maps"])))
    numbers = np.frombuffer(base64.b64decode(first["values"]), np.uint8)
    assert numbers[:10].tolist() == [0, 1, 2, 0, 1, 2, 0, 1, 2, 0] and (numbers[10:] == 255).all()
    assert len(first["palette"]) == 3 and len(second["palette"]) == 255
    header = gzip.decompress(base64.b64decode(data["mesh"])).partition(b"\n")
    assert sum(json.loads(header[0]).values()) == len(header[2])
    assert b"niivue" in gzip.decompress(base64.b64decode(data["library"]))


def test_pictures_and_groups(measured):
    mesh = load_mesh()
    (one,) = score_maps([measured], mesh)
    assert base64.b64decode(picture(one, mesh, 300))[8:12] == b"WEBP"
    assert [(name, len(maps)) for name, maps in by_subject([one, replace(one, subject="b"), one])] == [
        (measured.subject.name, 2),
        ("b", 1),
    ]
    assert drawn_share([measured.subject]) == 1
