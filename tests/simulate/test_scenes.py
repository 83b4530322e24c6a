"""Images differ in content and place, and an image id gives the same image every time."""

import numpy as np

from featcache.simulate.scenes import CATEGORIES, compose, draw


def test_images_differ_in_content_and_place():
    scenes = [compose(0, image_id) for image_id in range(60)]
    things = [thing for scene in scenes for thing in scene.objects]
    assert {thing.category for thing in things} == set(CATEGORIES)
    assert len({scene.background for scene in scenes}) == 5
    for coordinate in ("x", "y"):
        at = np.array([getattr(thing, coordinate) for thing in things])
        assert at.min() < 0.2 and at.max() > 0.8 and at.std() > 0.15


def test_an_image_follows_from_seed_and_id_alone():
    pixels = draw(compose(0, 5), 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8
    np.testing.assert_array_equal(draw(compose(0, 5), 32), pixels)
    assert (draw(compose(1, 5), 32) != pixels).any() and (draw(compose(0, 6), 32) != pixels).any()


def test_a_scene_looks_alike_at_every_size():
    small, large = (draw(compose(0, 5), size).astype(float) for size in (32, 128))
    reduced = large.reshape(32, 4, 32, 4, 3).mean(axis=(1, 3))
    assert np.corrcoef(small.ravel(), reduced.ravel())[0, 1] > 0.9
