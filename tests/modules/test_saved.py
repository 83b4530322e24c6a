"""Heads read back from a checkpoint predict what they predicted when they were trained."""

from dataclasses import replace

import pytest
import torch

from featcache.dataset.algonauts import open_challenge
from heads.config import TrainConfig
from heads.modules.by_subject import AllSubjects, OneSubject, SpatialHeads, output_columns
from heads.modules.core import CoreHeads, core_head_of, has_core
from heads.modules.linear import SMALL
from heads.modules.saved import linear_map_of, saved_shapes, shape_tensors, spatial_head_of
from support.heads import SHAPES, as_trained, overlapping, some_rows

N_FEATURES = 7


def test_a_subjects_map_is_what_stage_1_predicts_for_it(tiny):
    subjects = overlapping(open_challenge(tiny).subjects)
    columns = output_columns(subjects)
    heads = as_trained(AllSubjects(N_FEATURES, [s.name for s in subjects], columns, 5, SMALL))
    features = torch.randn(6, N_FEATURES)
    for number, subject in enumerate(subjects):
        outputs = heads({"pooled": features}, torch.full((6,), number))
        for surface in subject.surfaces:
            predictions = linear_map_of(heads.saved(), heads.names, subject.name, surface)(features)
            torch.testing.assert_close(predictions, outputs[:, columns[subject.name, surface]])


def test_a_subjects_map_is_what_stage_2_predicts_for_it(tiny):
    subject = open_challenge(tiny).subjects[0]
    heads = as_trained(OneSubject(N_FEATURES, subject, SMALL))
    features = torch.randn(6, N_FEATURES)
    outputs = heads({"pooled": features}, torch.zeros(6))
    assert saved_shapes(heads.saved()) == []
    for surface in subject.surfaces:
        predictions = linear_map_of(heads.saved(), heads.names, subject.name, surface)(features)
        torch.testing.assert_close(predictions, heads.surfaces[subject.name, surface].mean(outputs))


@pytest.mark.parametrize("space", [0, 5])
@pytest.mark.parametrize("n_subjects", [2, 1])
def test_a_subjects_spatial_head_is_what_both_stages_predict_for_it(tiny, space, n_subjects):
    subjects = open_challenge(tiny).subjects[-n_subjects:]
    settings = replace(TrainConfig(head="spatial"), space=space, rank=2)
    rows, numbers = some_rows(6), torch.tensor([0, 1, 0, 0, 1, 1]) % n_subjects
    heads = as_trained(SpatialHeads(SHAPES, subjects, settings, 0.1))
    outputs = heads(rows, numbers)
    assert outputs.shape == (6, heads.n_outputs) and saved_shapes(heads.saved()) == list(SHAPES.items())
    for number, subject in enumerate(subjects):
        for surface in subject.surfaces:
            alone = spatial_head_of(heads.saved(), heads.names, subject.name, surface)
            expected = outputs[numbers == number][:, heads.columns[subject.name, surface]]
            torch.testing.assert_close(alone(rows)[numbers == number], expected, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("n_subjects", [2, 1])
def test_a_subjects_head_on_a_core_is_what_both_stages_predict_for_it(tiny, n_subjects):
    subjects = open_challenge(tiny).subjects[-n_subjects:]
    settings = TrainConfig(head="core", hidden=6, channels=5, blocks=3)
    rows, numbers = some_rows(6), torch.tensor([0, 1, 0, 0, 1, 1]) % n_subjects
    heads = as_trained(CoreHeads(SHAPES, subjects, settings))
    outputs = heads(rows, numbers)
    assert has_core(heads.saved()) and saved_shapes(heads.saved()) == list(SHAPES.items())
    assert not has_core(SpatialHeads(SHAPES, subjects, settings, 0.1).saved())
    for number, subject in enumerate(subjects):
        for surface in subject.surfaces:
            alone = core_head_of(heads.saved(), heads.names, subject.name, surface)
            expected = outputs[numbers == number][:, heads.columns[subject.name, surface]]
            torch.testing.assert_close(alone(rows)[numbers == number], expected, atol=1e-4, rtol=1e-4)


def test_shapes_come_back_in_their_order():
    shapes = {f"layer{n}": (n + 1, n + 1, 3) for n in range(12)} | {"layer1.cls": (3,)}
    assert saved_shapes(shape_tensors(shapes)) == list(shapes.items())
