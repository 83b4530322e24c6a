"""Vertices block by block: each once, all images of it, and no more at a time than was asked for."""

import numpy as np

import heads.statistics.blocks
from heads.statistics.blocks import StoredModel, blocks_of, read_columns
from support.blends import IDS, N_TRAIN, WIDTHS, made_up, models_of, subject_of


def test_blocks_are_all_vertices_once_in_bounded_memory(tmp_path):
    responses = made_up()[1]
    subject, n_bytes = subject_of(tmp_path, responses), 3 * 4 * N_TRAIN
    blocks = list(blocks_of(subject, n_bytes))
    assert [(one.surface, one.vertices) for one in blocks] == [
        ("lh", slice(0, 3)),
        ("lh", slice(3, 4)),
        ("rh", slice(0, 3)),
    ]
    assert max(one.responses.nbytes for one in blocks) <= n_bytes
    np.testing.assert_array_equal(np.hstack([one.responses for one in blocks]), responses[:N_TRAIN])
    assert [one.vertices for one in blocks_of(subject)] == [slice(0, n) for n in WIDTHS.values()]
    assert len(list(blocks_of(subject, 1))) == sum(WIDTHS.values())  # one vertex at least


def test_columns_of_a_store_are_read_a_few_rows_at_a_time(tmp_path, monkeypatch):
    predictions = made_up()[0][:1]
    model = models_of(tmp_path, predictions)[0]
    monkeypatch.setattr(heads.statistics.blocks, "_BATCH_ROWS", 1)
    expected = predictions[0][:N_TRAIN, 1:3]
    np.testing.assert_array_equal(read_columns(model.store, "lh", slice(1, 3)), expected)
    source = StoredModel(model)
    np.testing.assert_array_equal(source.read("lh", slice(1, 3)), expected)
    assert source.name == "model 0" and len(IDS) > N_TRAIN  # test images are not read
