"""Heads by subject: which outputs are whose vertices, what they predict, and what they start from."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import FSAVERAGE_VERTICES
from heads.config import TrainConfig
from heads.modules.by_subject import AllSubjects, OneSubject, SpatialHeads, output_columns
from heads.modules.core import CoreHeads
from heads.modules.linear import SMALL, LinearMap
from support.heads import SHAPES, as_trained, overlapping, some_rows

N_FEATURES = 7
SPATIAL = TrainConfig(head="spatial")


@pytest.fixture
def subjects(tiny):
    return overlapping(open_challenge(tiny).subjects)


@pytest.fixture
def subject(tiny):
    return open_challenge(tiny).subjects[0]


def test_with_masks_one_output_is_one_place_on_the_surface(subjects):
    columns = output_columns(subjects)
    places = {}
    for subject in subjects:
        for surface in subject.surfaces:
            vertices = np.flatnonzero(subject.fsaverage[surface])
            for output, vertex in zip(columns[subject.name, surface].tolist(), vertices, strict=True):
                assert places.setdefault(output, (surface, vertex)) == (surface, vertex)
    union = sum(int(np.logical_or(*(s.fsaverage[h] for s in subjects)).sum()) for h in subjects[0].surfaces)
    assert sorted(places) == list(range(union)) and len(set(places.values())) == union


def without_masks(subject):
    return replace(subject, fsaverage=dict.fromkeys(subject.surfaces))


def test_without_masks_every_subject_has_outputs_of_its_own(subjects):
    columns = output_columns([without_masks(subject) for subject in subjects])
    indices = torch.cat(list(columns.values())).tolist()
    assert sorted(indices) == list(range(sum(sum(subject.n_vertices.values()) for subject in subjects)))


def test_one_subject_without_a_mask_keeps_all_apart(subjects):
    first, second = subjects
    columns = output_columns([first, without_masks(second)])
    assert not set(columns[first.name, "lh"].tolist()) & set(columns[second.name, "lh"].tolist())


def test_a_surface_that_one_subject_lacks_is_the_others_alone(subjects):
    first, second = subjects
    alone = replace(second, n_vertices={"rh": second.n_vertices["rh"]})
    columns = output_columns([first, alone])
    assert set(columns) == {(first.name, "lh"), (first.name, "rh"), (second.name, "rh")}
    union = int(np.logical_or(first.fsaverage["rh"], second.fsaverage["rh"]).sum())
    assert len(set(torch.cat(list(columns.values())).tolist())) == first.n_vertices["lh"] + union


def test_masks_are_of_the_whole_surface(subjects):
    assert all(len(subject.fsaverage["lh"]) == FSAVERAGE_VERTICES for subject in subjects)


def test_the_subject_changes_what_stage_1_predicts_by_a_constant_alone(subjects):
    """The embedding is an input of a linear layer: it shifts a vertex and cannot turn it."""
    heads = as_trained(AllSubjects(N_FEATURES, [s.name for s in subjects], output_columns(subjects), 5, SMALL))
    rows = {"pooled": torch.randn(6, N_FEATURES)}
    first, second = (heads(rows, torch.full((6,), number)) for number in (0, 1))
    difference = first - second
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-5, rtol=1e-4)
    assert difference[0].abs().max() > 0.01


def predictions_of(heads, features):
    """{surface: (n_images, n_vertices)} of heads of one subject."""
    outputs = heads({"pooled": features}, torch.zeros(len(features)))
    return {surface: of_surface.mean(outputs) for (_, surface), of_surface in heads.surfaces.items()}


def test_stage_2_predicts_the_mean_of_a_vertexs_layers_and_nothing_less_outside_rois(subject):
    heads = as_trained(OneSubject(N_FEATURES, subject, SMALL))
    features = torch.randn(3, N_FEATURES)
    predictions = predictions_of(heads, features)
    outside = 0
    for surface in subject.surfaces:
        layer = heads.hemispheres[surface].layer
        masks = [mask for mask in subject.rois[surface].values() if mask.any()]
        starts = np.cumsum([subject.n_vertices[surface], *(mask.sum() for mask in masks)])
        for vertex in range(subject.n_vertices[surface]):
            rows = [vertex]
            rows += [int(start + m[:vertex].sum()) for start, m in zip(starts, masks, strict=False) if m[vertex]]
            outside += len(rows) == 1
            expected = (features @ layer.weight[rows].T + layer.bias[rows]).mean(1)
            torch.testing.assert_close(predictions[surface][:, vertex], expected)
    assert outside


def test_stage_2_starts_from_the_map_that_it_is_given(subject):
    heads = OneSubject(N_FEATURES, subject, SMALL)
    maps = {h: LinearMap(torch.randn(N_FEATURES, n), torch.randn(n)) for h, n in subject.n_vertices.items()}
    heads.start_from(maps)
    features = torch.randn(4, N_FEATURES)
    for surface, predictions in predictions_of(heads, features).items():
        torch.testing.assert_close(predictions, maps[surface](features))


def test_states_of_interrupted_runs_keep_the_names_of_their_tensors(subject):
    names = set(OneSubject(N_FEATURES, subject, SMALL).state_dict())
    assert {"hemispheres.lh.layer.weight", "hemispheres.rh.layer.bias"} < names


@pytest.mark.parametrize("space", [0, 5])
def test_spatial_heads_of_stage_2_start_from_their_subjects_heads_of_the_same_shape(tiny, space):
    subjects = open_challenge(tiny).subjects
    settings = replace(SPATIAL, space=space)
    first = as_trained(SpatialHeads(SHAPES, subjects, settings, 0.1))
    second = SpatialHeads(SHAPES, subjects[1:], settings, 0.1).eval()
    assert second.start_from(first.saved(), first.names)
    rows, numbers = some_rows(4), torch.ones(4, dtype=torch.int64)
    expected = first(rows, numbers)[:, : second.n_outputs]
    torch.testing.assert_close(second(rows, 0 * numbers), expected)
    torch.testing.assert_close(second.of_subject(rows, 0), expected)
    unlike = [({**SHAPES, "pooled": (8,)}, settings)]
    unlike += [(SHAPES, changed) for changed in (replace(settings, rank=3), replace(settings, space=7))]
    for shapes, changed in unlike:
        other = SpatialHeads(shapes, subjects[1:], changed, 0.1)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        assert not other.start_from(first.saved(), first.names)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_heads_on_a_core_of_stage_2_start_from_their_subjects_heads_and_the_core_of_stage_1(tiny):
    subjects, settings = open_challenge(tiny).subjects, TrainConfig(head="core", hidden=6, channels=5)
    first, second = as_trained(CoreHeads(SHAPES, subjects, settings)), CoreHeads(SHAPES, subjects[1:], settings).eval()
    assert second.start_from(first.saved(), first.names)
    rows = some_rows(4)
    expected = first(rows, torch.ones(4, dtype=torch.int64))[:, : second.n_outputs]
    torch.testing.assert_close(second(rows, torch.zeros(4, dtype=torch.int64)), expected)
    spatial = SpatialHeads(SHAPES, subjects[1:], SPATIAL, 0.1)
    assert not second.start_from(spatial.saved(), spatial.names) and not spatial.start_from(first.saved(), first.names)


def test_only_spatial_heads_with_weights_of_a_penalty_add_one(subject):
    assert OneSubject(N_FEATURES, subject, SMALL).penalty() is None
    assert SpatialHeads(SHAPES, [subject], SPATIAL, 0.1).penalty() is None
    heads = SpatialHeads(SHAPES, [subject], replace(SPATIAL, sparsity=1.0), 0.1)
    (readout,) = heads.subjects
    assert heads.penalty() == readout.regularisation(0.0, 1.0) > 0
