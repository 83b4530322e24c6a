"""Counts of a simulated tree: those of the challenge, and those that cannot be."""

import pytest

from featcache.dataset.rois import HEMISPHERES
from featcache.errors import ConfigError
from featcache.simulate import SimulateConfig


def test_full_counts_are_the_challenge_s():
    full = SimulateConfig.full()
    n_vertices = [
        tuple(n - full.n_deleted(subject, h) for n, h in zip(full.n_vertices, HEMISPHERES, strict=True))
        for subject in full.subjects
    ]
    common = (19_004, 20_544)
    assert n_vertices == [*[common] * 5, (18_978, 20_220), common, (18_981, 20_530)]
    assert [full.train_count(s) + full.test_count(s) for s in full.subjects].count(10_000) == 4


@pytest.mark.parametrize(
    ("options", "problem"),
    [
        ({"n_subjects": 9}, "n_subjects: expected a whole number from 1 to 8; found 9"),
        ({"n_subjects": 3, "n_train": (5, 6)}, "n_train: expected one count, or 3 of them, .* found 2"),
        ({"n_train": 4.5}, "n_train: expected a whole number .* found 4.5"),
        ({"n_train": 20, "n_shared": 21}, "n_shared: expected a whole number from 0 to 20; found 21"),
        ({"n_image_ids": 1_000}, "n_image_ids: .* found 1000"),
        ({"n_vertices": (500,)}, r"n_vertices: expected two counts, \(left, right\)"),
        ({"n_vertices": (500, 200_000)}, "n_vertices: .* found 200000"),
        ({"n_dead": 400}, "n_dead: .* found 400"),
        ({"image_size": 8}, "image_size: .* found 8"),
        ({"seed": -1}, "seed: .* found -1"),
        ({"workers": 0}, "workers: .* found 0"),
    ],
)
def test_impossible_counts_are_refused_in_one_line(options, problem):
    with pytest.raises(ConfigError, match=problem) as error:
        SimulateConfig(**options)
    assert "\n" not in str(error.value)
