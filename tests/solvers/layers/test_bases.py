"""Axes of finalists, and responses on them, are those of every fold by itself."""

import numpy as np
import pytest
import torch

import heads.solvers.layers.axes
import heads.solvers.layers.sizes
from heads.features.rows import LayerRows
from heads.solvers.layers.bases import FoldBases
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import Prior
from support.plans import block_of, plan_of

N_TRAIN, N_TEST = 80, 10
SHAPES = {"images": (5, 5, 6), "features": (2, 2, 5), "landmarks": (5, 5, 6)}
PRIORS = [Prior(), Prior(0.2, 0.2, 0.3), Prior(0.8, 0.5, 0.3)]
MULTIPLES = (1e-2, 1.0, 100.0)
methods = pytest.mark.parametrize("method", SHAPES)


@pytest.fixture
def made(monkeypatch):
    def make(method, priors=PRIORS, surfaces=None):
        monkeypatch.setattr(heads.solvers.layers.axes, "LANDMARKS", 20 if method == "landmarks" else 1000)
        rng = np.random.default_rng(1)
        plan = plan_of(rng.permutation(73_000)[:N_TRAIN], 5)
        maps = {"deep": rng.normal(size=(N_TRAIN + N_TEST, *SHAPES[method])).astype("f4")}
        rows = LayerRows.of_arrays(maps, "cpu")
        kernels = [LayerKernels(rows, plan.scale_rows(number)) for number in range(plan.n_scales)]
        return FoldBases(kernels, plan, priors, MULTIPLES, surfaces or {}), plan

    return make


def responses_of(level=0.0):
    return torch.randn(N_TRAIN, 4, generator=torch.Generator().manual_seed(2)) + level


@methods
@pytest.mark.parametrize("level", [0.0, 300.0], ids=["centred", "far from zero"])
def test_responses_on_the_axes_are_those_of_each_fold_alone(made, method, level):
    bases, plan = made(method)
    assert bases.sizes.method == method
    y = responses_of(level)
    targets = [y[plan.outside(k)] - y[plan.outside(k)].mean(0) for k in range(5)]
    of_surface = bases.of_surface(block_of(y))
    for k, found in enumerate(bases.rotated(of_surface, y, targets)):
        assert list(found) == PRIORS
        for prior, final in of_surface.of_fold[k].items():
            expected = final.basis.rotated(targets[k])
            scale = float(expected.abs().max())
            torch.testing.assert_close(found[prior], expected, rtol=1e-4, atol=5e-5 * scale)


@pytest.mark.parametrize("method", ["features", "landmarks"])
def test_no_bit_of_a_held_out_response_reaches_its_fold(made, method):
    """Folds share products, as sums of the others; a total less its own part would keep its rounding."""
    bases, plan = made(method)
    y = responses_of()
    moved = y.clone()
    moved[plan.inside(3)] = 1e6 * torch.randn(len(plan.inside(3)), 4)
    found = []
    for responses in (y, moved):
        targets = [responses[plan.outside(k)] - responses[plan.outside(k)].mean(0) for k in range(5)]
        found.append(bases.rotated(bases.of_surface(block_of(responses)), responses, targets))
    for prior in PRIORS:
        assert torch.equal(found[0][3][prior], found[1][3][prior])
        assert not torch.allclose(found[0][2][prior], found[1][2][prior], rtol=0.1)


@methods
def test_precise_axes_are_the_rough_ones_but_for_their_rounding(made, method):
    bases, _ = made(method)
    y = responses_of()
    for final in bases.of_surface(block_of(y)).of_fold[0].values():
        rough, precise = final.basis, final.precise()
        assert precise is final.precise() and precise.resolved == 0.0
        torch.testing.assert_close(rough.values[-10:], precise.values[-10:], rtol=1e-4, atol=1e-5)


def test_axes_that_are_there_are_not_computed_again(made, monkeypatch):
    bases, _ = made("images")
    first = bases.of_surface(block_of(responses_of()))
    monkeypatch.setattr("heads.solvers.layers.bases.views_under", lambda *_: pytest.fail("computed again"))
    second = bases.of_surface(block_of(responses_of()))
    assert all(first.of_fold[k][prior] is second.of_fold[k][prior] for k in range(5) for prior in PRIORS)


def test_a_choice_knows_which_priors_it_left_out(made, monkeypatch):
    monkeypatch.setattr(heads.solvers.layers.sizes, "FINALISTS", {"images": 1})
    bases, _ = made("images")
    of_surface = bases.of_surface(block_of(responses_of()))
    for k in range(5):
        (only,) = of_surface.of_fold[k]
        assert of_surface.left_out(k, only) == []
        assert [of_surface.left_out(k, prior) for prior in PRIORS if prior != only] == [[0], [0]]
