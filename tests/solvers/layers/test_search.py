"""The few priors that serve a surface are found on rough kernels, and by images that may say so alone."""

import numpy as np
import pytest
import torch

import heads.solvers.layers.sizes
from heads.features.rows import LayerRows
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from heads.solvers.layers.search import PriorSearch, chosen_greedily
from support.plans import plan_of

N_TRAIN, N_TEST, N_VERTICES = 200, 20, 12
MULTIPLES = tuple(10.0**k for k in range(-4, 5))
WINDOWS = [(x, y, 0.16) for x in (0.2, 0.8) for y in (0.2, 0.8)]
PRIORS = [Prior(*window, depth=depth) for window in WINDOWS for depth in (0.0, 1.0)]
PLANTED = [Prior(0.2, 0.8, 0.16, 1.0), Prior(0.8, 0.2, 0.16, 0.0)]


def search(trained=False, **settings):
    """A search on features of two layers, and responses under each of the planted priors."""
    rng = np.random.default_rng(0)
    plan = plan_of(rng.permutation(73_000)[:N_TRAIN], 3, trained=trained)
    kernels = []
    for _ in range(3 if trained else 1):
        maps = {name: rng.normal(size=(N_TRAIN + N_TEST, 5, 5, 4)).astype("f4") for name in ("low", "deep")}
        kernels.append(LayerKernels(LayerRows.of_arrays(maps, "cpu"), np.arange(N_TRAIN)))
    generator = torch.Generator().manual_seed(0)
    responses = []
    for prior in PLANTED:
        features = kernels[0].features(prior)[:N_TRAIN]
        signal = features @ torch.randn(features.shape[1], N_VERTICES, generator=generator)
        responses.append(signal / signal.std(0) + 0.5 * torch.randn(signal.shape, generator=generator))
    kernels = kernels if trained else kernels * plan.n_scales
    return PriorSearch(kernels, plan, PRIORS, MULTIPLES, **settings), plan, responses


def test_planted_priors_are_among_few():
    found, _, responses = search()
    for of_fold in found.finalists([torch.cat(responses, 1)], 2):
        assert len(of_fold) == 1 and set(of_fold[0]) == set(PLANTED)


def test_each_surface_finds_its_own_and_both_find_both():
    found, _, (first, second) = search()
    assert [of_fold[0] for of_fold in found.finalists([first], 1)] == [PLANTED[:1]] * 3
    assert [of_fold[0] for of_fold in found.finalists([second], 1)] == [PLANTED[1:]] * 3
    for of_fold in found.finalists([first, second], 2):
        assert set(of_fold[0]) == set(PLANTED)


def test_a_sample_of_images_is_enough(monkeypatch):
    monkeypatch.setattr(heads.solvers.layers.sizes, "SEARCH_IMAGES", 120)
    found, _, responses = search()
    for of_fold in found.finalists(responses, 2):
        assert set(of_fold[0]) == set(PLANTED)


@pytest.mark.parametrize("trained", [False, True], ids=["frozen", "trained"])
def test_a_choice_is_not_made_by_images_that_it_predicts(trained):
    """Responses of these images are replaced by others that a wrong prior explains."""
    found, plan, (responses, others) = search(trained)
    before = found.finalists([responses], 3)[1]
    parts = plan.parts(1)
    for choice, part in enumerate(parts):
        moved = responses.clone()
        moved[part] = 50 * others[part]
        assert found.finalists([moved], 3)[1][choice] == before[choice]
    assert len(before) == plan.n_choices(1)


def test_choices_are_greedy():
    """The second is the one that adds most to the first, not the second best."""
    explained = torch.tensor([[0.5, 0.5, 0.0, 0.0], [0.5, 0.4, 0.0, 0.0], [0.0, 0.0, 0.3, 0.3], [0.0, 0.0, 0.1, 0.0]])
    assert chosen_greedily(explained, 2) == [0, 2]
    assert sorted(chosen_greedily(explained, 9)) == [0, 1, 2, 3]


def test_folds_that_share_finalists_seek_them_on_images_that_all_of_them_train_on():
    shared, plan, (responses, others) = search(shared=True)
    before = shared.finalists([responses], 3)
    assert before[0] == before[1] and before[0][0][0] == PLANTED[0]  # two folds of three have the first set of scales
    moved = responses.clone()
    outside = np.setdiff1d(np.arange(N_TRAIN), plan.scale_rows(0))
    moved[outside] = 50 * others[outside]
    after = shared.finalists([moved], 3)
    assert after[:2] == before[:2] and after[2] != before[2]
