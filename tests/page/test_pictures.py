"""The best and the worst predicted images, as small pictures of training images alone."""

import base64
import io
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from heads.page.pictures import extremes


def test_the_best_and_the_worst_by_the_score_of_images(measured):
    found = extremes(measured, 4, True)
    r, ids = measured.image_r[measured.best], measured.subject.train.ids
    order = np.argsort(r)
    assert [one.image_id for one in found.best] == ids[order[::-1][:4]].tolist()
    assert [one.image_id for one in found.worst] == ids[order[:4]].tolist()
    np.testing.assert_allclose([one.r for one in found.worst], np.sort(r)[:4])
    assert found.n_images == len(ids) and found.median == np.median(r)


def test_pictures_are_small_and_of_the_image(measured):
    one = extremes(measured, 1, True).best[0]
    row = measured.subject.train.ids.tolist().index(one.image_id)
    with (
        Image.open(io.BytesIO(base64.b64decode(one.webp))) as small,
        Image.open(measured.subject.train.sources[row]) as whole,
    ):
        assert max(small.size) <= 88 and small.format == "WEBP"
        difference = np.asarray(small.convert("RGB"), float) - np.asarray(
            whole.convert("RGB").resize(small.size), float
        )
    assert np.abs(difference).mean() < 20


def test_scores_stay_where_pictures_are_unwanted_or_gone(measured):
    assert [one.webp for one in extremes(measured, 3, False).best] == [""] * 3
    images = measured.subject.train
    moved = replace(images, sources=tuple(Path("gone") / str(i) for i in range(len(images))))
    moved = replace(measured, subject=replace(measured.subject, train=moved))
    assert [one.webp for one in extremes(moved, 3, True).worst] == [""] * 3


def test_of_few_images_none_is_both_best_and_worst(measured):
    found = extremes(measured, 1000, False)
    assert not {one.image_id for one in found.best} & {one.image_id for one in found.worst}
    assert len(found.best) == len(measured.subject.train) // 2
