"""Units change nothing of ordinary numbers, and bring others to where float32 and gradient steps can work."""

import numpy as np
import torch

from heads.solvers.units import to_train_on, varies, widest_of

GENERATOR = torch.Generator().manual_seed(0)


def test_responses_that_are_usual_are_trained_on_as_they_are():
    responses = 1 + torch.randn(50, 4, generator=GENERATOR) * torch.tensor([0.2, 1, 5, 0])
    assert to_train_on(responses, np.arange(40)) is responses


def test_other_responses_are_brought_to_a_unit_by_powers_of_two_and_the_training_rows_alone():
    usual = torch.randn(50, 4, generator=GENERATOR)
    scales = torch.tensor([1.0, 1e-4, 1e30, 1.0])
    responses = usual * scales + torch.tensor([0, 0, 0, 1e4])
    rows = np.arange(40)
    found = to_train_on(responses, rows)
    assert torch.equal(found[:, 0], responses[:, 0])
    np.testing.assert_array_equal(np.log2((responses[:, 1:3].double() / found[:, 1:3].double()).numpy()) % 1, 0)
    assert (found[rows].std(0) < 2).all() and (found[rows].std(0) > 0.5).all() and (found[rows].mean(0).abs() < 1).all()
    changed = responses.clone()
    changed[45] *= 1e3
    assert torch.equal(to_train_on(changed, rows)[:40], found[:40])


def test_rounding_is_no_variation():
    mean = torch.tensor([1.0, 1e6, 0.0, 1.0])
    assert varies(torch.tensor([1e-3, 1e-2, 1e-30, 0.0]), mean).tolist() == [True, False, True, False]


def test_the_widest_spread_is_told_by_a_quarter_of_those_that_vary():
    assert widest_of(torch.zeros(3)) is None
    assert widest_of(torch.tensor([0, 1.0, 2, 3, 4, 1e9])) == 32
