"""Responses that a fit cannot use are refused by name before it starts, and a file is looked through once."""

from dataclasses import replace

import numpy as np
import pytest

from featcache.dataset import responses as module
from featcache.dataset.digests import response_digest
from featcache.dataset.responses import refuse_unfit, response_fault
from featcache.dataset.subject import Images
from featcache.errors import DataError
from featcache.machine.documents import write_document
from featcache.workdir import Workdir
from support.blends import N_TRAIN, N_VERTICES, subject_of

VALUES = np.random.default_rng(0).normal(size=(N_TRAIN, N_VERTICES)).astype(np.float32)


def subject_with(folder, row, vertex, value):
    values = VALUES.copy()
    values[row, vertex] = value
    return subject_of(folder, values)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 3e38, -1e16])
@pytest.mark.parametrize("block", [100, 1e9])
def test_a_number_that_no_fit_can_use_is_named(tmp_path, monkeypatch, value, block):
    monkeypatch.setattr(module, "_BLOCK_BYTES", block)
    subject = subject_with(tmp_path, N_TRAIN - 2, 1, value)
    path = subject.response_paths[subject.surfaces[0]]
    fault = response_fault(path)
    assert fault is not None and fault.where == path and f"at row {N_TRAIN - 2}, vertex 1" in fault.found
    with pytest.raises(DataError, match=f"finite responses.* at row {N_TRAIN - 2}, vertex 1") as caught:
        refuse_unfit([subject], tmp_path)
    assert caught.value.where == str(path)


def test_whole_numbers_and_bytes_are_responses(tmp_path):
    for dtype in (np.int16, np.uint8, np.float16, np.float64):
        np.save(tmp_path / "a.npy", (VALUES * 20).astype(dtype))
        assert response_fault(tmp_path / "a.npy") is None


@pytest.mark.parametrize("scale", [1e-30, 1e-9, 1e9, 1e14])
def test_a_scale_at_which_no_head_could_be_fitted_is_named_by_its_vertex(tmp_path, scale):
    values = VALUES.copy()
    values[:, 1] *= np.float32(scale)
    values[:, 2] = 1e9  # constant, which says nothing of a scale
    subject = subject_of(tmp_path, values)
    path = subject.response_paths[subject.surfaces[0]]
    found = f"{values[:, 1].std(dtype=np.float64):.1e} at vertex 1"
    fault = response_fault(path)
    assert (fault.where, fault.found) == (path, found)
    with pytest.raises(DataError, match=r"deviation is from 1e-06 to 1e\+06.*z-score the responses"):
        refuse_unfit([subject], tmp_path)


@pytest.mark.parametrize("scale", [1e-4, 1.0, 1e4])
def test_usual_scales_pass(tmp_path, scale):
    subject = subject_of(tmp_path, VALUES * np.float32(scale))
    refuse_unfit([subject], tmp_path)
    assert response_fault(subject.response_paths[subject.surfaces[0]]) is None


def test_what_was_looked_through_by_fewer_rules_is_looked_through_again(tmp_path):
    subject = subject_of(tmp_path, VALUES * np.float32(1e-9))
    digest = response_digest(subject, tmp_path)
    write_document(Workdir(tmp_path).checked_responses("subj01"), {"responses": digest})
    with pytest.raises(DataError, match="standard deviation"):
        refuse_unfit([subject], tmp_path)


def test_one_response_to_all_images_is_refused_and_some_such_vertices_are_counted(tmp_path, capfd):
    some = VALUES.copy()
    some[:, 2] = 4
    refuse_unfit([subject_of(tmp_path, some)], tmp_path)
    surface, n = next(iter(subject_of(tmp_path, some).n_vertices.items()))
    assert f"subj01 {surface}: 1 of {n} vertices have one response to all" in capfd.readouterr().err
    with pytest.raises(DataError, match="the same to all 40 images, at every vertex".replace("40", str(N_TRAIN))):
        refuse_unfit([subject_of(tmp_path, np.zeros_like(VALUES) + VALUES[:1])], tmp_path)


def test_one_image_and_no_vertices_are_refused(tmp_path):
    subject = subject_of(tmp_path, VALUES)
    one = replace(subject, train=Images(subject.train.sources[:1], subject.train.ids[:1]))
    with pytest.raises(DataError, match="found 1 images and"):
        refuse_unfit([one], tmp_path)
    with pytest.raises(DataError, match="and 0 vertices"):
        refuse_unfit([replace(subject, n_vertices=dict.fromkeys(subject.surfaces, 0))], tmp_path)


def test_a_file_is_looked_through_once_and_again_where_it_changed_or_the_record_is_damaged(tmp_path, monkeypatch):
    subject, looked = subject_of(tmp_path, VALUES), []
    real = module._look
    monkeypatch.setattr(module, "_look", lambda path: looked.append(path) or real(path))
    for _ in range(2):
        refuse_unfit([subject], tmp_path)
    assert len(looked) == len(subject.surfaces)
    Workdir(tmp_path).checked_responses("subj01").write_text("[]")
    refuse_unfit([subject], tmp_path)
    assert len(looked) == 2 * len(subject.surfaces)
    with pytest.raises(DataError, match="nan at row 0"):
        refuse_unfit([subject_with(tmp_path, 0, 0, np.nan)], tmp_path)
