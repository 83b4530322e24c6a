"""Outputs of a network for several subjects: which are whose vertices, and what a checkpoint's heads say of them."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import FSAVERAGE_VERTICES, HEMISPHERES
from heads.modules.by_subject import AllSubjects, OneSubject, output_columns
from heads.modules.linear import SMALL, LinearMap
from heads.modules.saved import linear_map_of

N_FEATURES = 7


@pytest.fixture
def subjects(tiny):
    """Two subjects whose surfaces overlap in part: the second lacks every third vertex and has two that are its own."""
    first, second = open_challenge(tiny).subjects
    fsaverage, counts = {}, {}
    for hemisphere in HEMISPHERES:
        mask = first.fsaverage[hemisphere].copy()
        mask[np.flatnonzero(mask)[::3]] = False
        mask[np.flatnonzero(~first.fsaverage[hemisphere])[[0, -1]]] = True
        fsaverage[hemisphere], counts[hemisphere] = mask, int(mask.sum())
    return first, replace(second, fsaverage=fsaverage, n_vertices=counts)


def random_heads(module):
    """Everything that training changes drawn anew, running statistics too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
            if name.rpartition(".")[2] in ("weight", "bias", "running_mean", "running_var"):
                tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return module.eval()


def test_with_masks_one_output_is_one_place_on_the_surface(subjects):
    columns = output_columns(subjects)
    places = {}
    for subject in subjects:
        for hemisphere in HEMISPHERES:
            surface = np.flatnonzero(subject.fsaverage[hemisphere])
            for output, vertex in zip(columns[subject.name, hemisphere].tolist(), surface, strict=True):
                assert places.setdefault(output, (hemisphere, vertex)) == (hemisphere, vertex)
    union = sum(int(np.logical_or(*(s.fsaverage[h] for s in subjects)).sum()) for h in HEMISPHERES)
    assert sorted(places) == list(range(union)) and len(set(places.values())) == union


def test_without_masks_every_subject_has_outputs_of_its_own(subjects):
    bare = [replace(subject, fsaverage=dict.fromkeys(HEMISPHERES)) for subject in subjects]
    indices = torch.cat(list(output_columns(bare).values())).tolist()
    assert sorted(indices) == list(range(sum(sum(subject.n_vertices.values()) for subject in subjects)))


def test_one_subject_without_a_mask_keeps_all_apart(subjects):
    first, second = subjects
    columns = output_columns([first, replace(second, fsaverage=dict.fromkeys(HEMISPHERES))])
    assert not set(columns[first.name, "lh"].tolist()) & set(columns[second.name, "lh"].tolist())


def test_masks_are_of_the_whole_surface(subjects):
    assert all(len(subject.fsaverage["lh"]) == FSAVERAGE_VERTICES for subject in subjects)


def test_a_subjects_map_is_what_stage_1_predicts_for_it(subjects):
    columns = output_columns(subjects)
    heads = random_heads(AllSubjects(N_FEATURES, [s.name for s in subjects], columns, 5, SMALL))
    features = torch.randn(6, N_FEATURES)
    for number, subject in enumerate(subjects):
        outputs = heads({"pooled": features}, torch.full((6,), number))
        for hemisphere in HEMISPHERES:
            mapped = linear_map_of(heads.saved(), heads.names, subject.name, hemisphere)(features)
            torch.testing.assert_close(mapped, outputs[:, columns[subject.name, hemisphere]])


def test_the_subject_changes_what_stage_1_predicts_by_a_constant_alone(subjects):
    """The embedding is an input of a linear layer: it shifts a vertex and cannot turn it."""
    heads = random_heads(AllSubjects(N_FEATURES, [s.name for s in subjects], output_columns(subjects), 5, SMALL))
    features = torch.randn(6, N_FEATURES)
    difference = heads({"pooled": features}, torch.zeros(6, dtype=torch.int64)) - heads(
        {"pooled": features}, torch.ones(6, dtype=torch.int64)
    )
    torch.testing.assert_close(difference, difference[:1].expand_as(difference), atol=1e-5, rtol=1e-4)
    assert difference[0].abs().max() > 0.01


def test_a_subjects_map_is_what_stage_2_predicts_for_it(tiny):
    subject = open_challenge(tiny).subjects[0]
    heads = random_heads(OneSubject(N_FEATURES, subject, SMALL))
    features = torch.randn(6, N_FEATURES)
    outputs = heads({"pooled": features}, torch.zeros(6))
    for hemisphere in HEMISPHERES:
        mapped = linear_map_of(heads.saved(), heads.names, subject.name, hemisphere)(features)
        torch.testing.assert_close(mapped, outputs[:, heads.columns[subject.name, hemisphere]])


def test_stage_2_predicts_the_mean_of_a_vertexs_layers_and_nothing_less_outside_rois(tiny):
    subject = open_challenge(tiny).subjects[0]
    heads = random_heads(OneSubject(N_FEATURES, subject, SMALL))
    features = torch.randn(3, N_FEATURES)
    outputs = heads({"pooled": features}, torch.zeros(3))
    outside = 0
    for hemisphere in HEMISPHERES:
        layer = heads.hemispheres[hemisphere].layer
        masks = [mask for mask in subject.rois[hemisphere].values() if mask.any()]
        starts = np.cumsum([subject.n_vertices[hemisphere], *(mask.sum() for mask in masks)])
        for vertex in range(subject.n_vertices[hemisphere]):
            rows = [vertex]
            rows += [int(start + m[:vertex].sum()) for start, m in zip(starts, masks, strict=False) if m[vertex]]
            outside += len(rows) == 1
            expected = (features @ layer.weight[rows].T + layer.bias[rows]).mean(1)
            column = heads.columns[subject.name, hemisphere][vertex]
            torch.testing.assert_close(outputs[:, column], expected)
    assert outside


def test_stage_2_starts_from_the_map_that_it_is_given(tiny):
    subject = open_challenge(tiny).subjects[0]
    heads = OneSubject(N_FEATURES, subject, SMALL)
    maps = {h: LinearMap(torch.randn(N_FEATURES, n), torch.randn(n)) for h, n in subject.n_vertices.items()}
    heads.start_from(maps)
    features = torch.randn(4, N_FEATURES)
    expected = torch.cat([maps[h](features) for h in HEMISPHERES], 1)
    torch.testing.assert_close(heads({"pooled": features}, torch.zeros(4)), expected)
