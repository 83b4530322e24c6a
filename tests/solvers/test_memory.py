"""Memory from counts alone: it grows with what it is counted from, and blocks are as large as there is room for."""

from dataclasses import replace

import pytest

from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from heads.config import FitConfig, SpatialConfig
from heads.solvers.memory import (
    Sizes,
    announce_whole,
    blockwise_bytes,
    choose_block,
    result_bytes,
    spatial_bytes,
    whole_bytes,
)
from heads.solvers.ridge import VERTEX_BLOCK
from support.plans import plan_of
from support.problems import N_VERTICES, VECTOR, features_of, planted_responses, problem_of, responding

SIZES = Sizes(n_train=8000, n_test=500, n_features=2000, n_vertices=(19_000, 20_500), n_folds=5)
LARGER = [
    ("n_train", 9000),
    ("n_test", 600),
    ("n_features", 2500),
    ("n_vertices", (19_000, 25_000)),
    ("n_folds", 6),
]


@pytest.fixture
def problem(tiny, tmp_path):
    """Of 30 images, 6 features and a few vertices."""
    (subject,) = open_challenge(tiny).subjects[:1]
    own = responding(subject, planted_responses(len(subject.train), VECTOR), tmp_path)
    return problem_of(own, features_of(own, tmp_path), FitConfig(n_folds=3), tmp_path)


@pytest.mark.parametrize(("name", "value"), LARGER)
def test_more_of_anything_takes_more(name, value):
    larger = replace(SIZES, **{name: value})
    assert blockwise_bytes(larger)[0] > blockwise_bytes(SIZES)[0]
    assert whole_bytes(larger) > whole_bytes(SIZES)


def test_a_block_costs_what_its_responses_and_weights_do_at_least():
    fixed, per_vertex = blockwise_bytes(SIZES)
    assert per_vertex >= 4 * (SIZES.n_train + SIZES.n_folds * SIZES.n_features)
    assert fixed >= 4 * (SIZES.n_train + SIZES.n_test) * SIZES.n_features
    assert fixed + VERTEX_BLOCK * per_vertex < 6e9  # a subject of the challenge fits into an ordinary machine


def test_what_is_fixed_does_not_depend_on_the_block_and_counts_the_largest_surface():
    same = replace(SIZES, n_vertices=(20_500, 19_000))
    assert blockwise_bytes(same) == blockwise_bytes(SIZES) and whole_bytes(same) == whole_bytes(SIZES)


def test_heads_that_see_all_vertices_hold_weights_gradient_and_moments():
    weights = 4 * SIZES.n_features * max(SIZES.n_vertices)
    assert whole_bytes(SIZES) > 5 * weights
    assert whole_bytes(SIZES, copies=2) - whole_bytes(SIZES) == pytest.approx(5 * weights)


def test_features_of_every_fold_are_counted_once_each():
    several = replace(SIZES, n_sources=5)
    extra = 4 * 2 * (SIZES.n_train + SIZES.n_test) * SIZES.n_features
    assert whole_bytes(several) - whole_bytes(SIZES) == pytest.approx(4 * extra)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_counts_of_a_matrix_are_those_of_its_plan(trained):
    plan = plan_of(60, 4, held_out=[0, 2, 3], trained=trained)
    sizes = Sizes.of_matrix(plan, (67, 12), 9)
    assert (sizes.n_train, sizes.n_test, sizes.n_features, sizes.n_vertices) == (60, 7, 12, (9,))
    assert sizes.n_folds == 3 and sizes.n_sources == (3 if trained else 1)


def test_counts_of_a_problem_are_of_all_its_surfaces(problem):
    sizes = Sizes.of(problem, 6)
    assert sizes == replace(Sizes.of_matrix(problem.plan, (35, 6), 1), n_vertices=tuple(N_VERTICES.values()))


def test_a_block_is_no_larger_than_the_largest_surface_and_its_memory_is_said(problem, said):
    assert choose_block(problem, 6) == max(N_VERTICES.values())
    assert any("6 features, 30 images: 5 vertices at a time; about" in line for line in said)


def test_a_block_shrinks_to_what_there_is_room_for(problem, said, monkeypatch):
    largest = Sizes(n_train=4000, n_test=100, n_features=500, n_vertices=(20_000,), n_folds=5)
    monkeypatch.setattr("heads.solvers.memory.Sizes.of", lambda problem, n_features: largest)
    fixed, per_vertex = blockwise_bytes(largest)
    for wanted in (100, 700, VERTEX_BLOCK, 10 * VERTEX_BLOCK):
        held = memory_limit(monkeypatch, fixed + (wanted + 0.5) * per_vertex)
        block = choose_block(replace(problem, config=replace(problem.config, max_memory=held)), 500)
        assert block <= min(wanted, VERTEX_BLOCK)
        assert block >= min(wanted, VERTEX_BLOCK) * 0.5


def memory_limit(monkeypatch, room):
    """A limit in 10^9 bytes, that leaves so much beside what the process holds at the start."""
    held = 1e9
    for module in ("heads.solvers.memory", "featcache.machine.memory"):
        monkeypatch.setattr(f"{module}.memory_at_start", lambda: held)
    return (held + room) / 1e9


@pytest.mark.parametrize("choose", [choose_block, lambda problem, n: announce_whole(problem, n, "by gradient")])
def test_a_limit_that_nothing_fits_into_is_refused(problem, said, choose):
    with pytest.raises(ConfigError, match="--max-memory"):
        choose(replace(problem, config=replace(problem.config, max_memory=1e-6)), 6)


def test_the_way_of_heads_that_see_all_vertices_is_said(problem, said):
    announce_whole(problem, 6, "by gradient")
    assert any("6 features, 30 images: by gradient; about" in line for line in said)


def test_a_block_is_as_large_as_the_device_has_room_for(pretended_cuda, problem, said, monkeypatch):
    """What is in main memory, and --max-memory, have no say in it."""
    largest = Sizes(n_train=4000, n_test=100, n_features=500, n_vertices=(20_000,), n_folds=5)
    monkeypatch.setattr("heads.solvers.memory.Sizes.of", lambda problem, n_features: largest)
    fixed, per_vertex = blockwise_bytes(largest)
    on_cuda = replace(problem, device="cuda", config=replace(problem.config, max_memory=1e-6))
    for wanted in (100, 700, VERTEX_BLOCK, 10 * VERTEX_BLOCK):
        room = fixed - result_bytes(largest) + (wanted + 0.5) * per_vertex
        pretended_cuda.limit_memory(int(room / 0.9))
        assert choose_block(on_cuda, 500) == min(wanted, VERTEX_BLOCK)
        assert said[-1].endswith("of the device's memory")


def test_a_device_too_small_for_the_smallest_block_is_tried_all_the_same(pretended_cuda, problem, said):
    pretended_cuda.limit_memory(1000)
    assert choose_block(replace(problem, device="cuda"), 6) == max(N_VERTICES.values())


def test_results_are_in_main_memory_wherever_a_fit_computes():
    assert 0 < result_bytes(SIZES) < blockwise_bytes(SIZES)[0]
    assert result_bytes(SIZES) >= 4 * (SIZES.n_train + SIZES.n_test) * max(SIZES.n_vertices)


SPATIAL = {
    "n_outputs": 400,
    "n_surface": 200,
    "n_images": 1000,
    "n_responses": 400_000,
    "n_folds": 5,
    "n_choices": 1,
}


@pytest.mark.parametrize("space", [0, 8])
@pytest.mark.parametrize("name", [name for name in SPATIAL if name != "n_surface"])
def test_spatial_heads_take_more_of_anything(name, space):
    config = FitConfig(head="spatial", spatial=SpatialConfig(space=space))
    few, more = (
        spatial_bytes({"near": (7, 7, 60)}, config, **SPATIAL | {name: factor * SPATIAL[name]}) for factor in (1, 50)
    )
    assert more > few


def test_spatial_heads_of_a_whole_subject_fit_into_a_large_device():
    """39,548 vertices on three layers: weights on the features alone would be 5 GB, several times over."""
    shapes = {"pooled": (2048,), "near": (7, 7, 300), "far": (7, 7, 300)}
    counts = {"n_outputs": 39_548, "n_surface": 20_544, "n_images": 10_000, "n_responses": 9841 * 39_548}
    assert spatial_bytes(shapes, FitConfig(head="spatial"), **counts, n_folds=5, n_choices=1) < 24e9
