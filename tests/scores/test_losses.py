"""Every loss equals its formula in plain NumPy, and sends back finite and right gradients."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import pearsonr

from featcache.errors import ConfigError, FeatcacheError
from heads.scores.losses import LOSSES, ceiling_on, weighted_sum

all_losses = pytest.mark.parametrize("name", LOSSES)
correlation_losses = pytest.mark.parametrize("name", ["pearson", "mnnpc"])
shapes = st.tuples(st.integers(2, 12), st.integers(1, 9))


def slow_distance(predictions, responses):
    """(1 - r_v) / 2 by scipy, a vertex at a time; r_v = 0 for a constant column."""
    distances = []
    for p, y in zip(predictions.T, responses.T, strict=True):
        constant = np.ptp(p) == 0 or np.ptp(y) == 0
        distances.append(0.5 if constant else (1 - pearsonr(p, y).statistic) / 2)
    return np.array(distances)


def slow_smooth_l1(predictions, responses, noise_ceiling):
    error = np.abs(predictions - responses)
    return np.where(error < 1, error**2 / 2, error - 0.5).mean()


def slow_mnnpc(predictions, responses, noise_ceiling):
    distance = slow_distance(predictions, responses)
    if noise_ceiling is None:
        return distance.mean()
    return np.mean([d**2 / (nc if nc > 0 else 1) for d, nc in zip(distance, noise_ceiling, strict=True)])


SLOW = {
    "smooth_l1": slow_smooth_l1,
    "mse": lambda predictions, responses, noise_ceiling: ((predictions - responses) ** 2).mean(),
    "pearson": lambda predictions, responses, noise_ceiling: slow_distance(predictions, responses).mean(),
    "pattern": lambda predictions, responses, noise_ceiling: slow_distance(predictions.T, responses.T).mean(),
    "mnnpc": slow_mnnpc,
}


def matrices(shape=(12, 7), seed=0):
    rng = np.random.default_rng(seed)
    responses = rng.normal(size=shape)
    return rng.normal(size=shape) + responses, responses, rng.uniform(0.05, 1, size=shape[1])


def test_every_loss_has_a_slow_reference():
    assert SLOW.keys() == LOSSES.keys()


@all_losses
@pytest.mark.parametrize("with_ceiling", [True, False])
@settings(max_examples=25, deadline=None)
@given(shape=shapes, seed=st.integers(0, 2**32), data=st.data())
def test_equals_its_formula(name, with_ceiling, shape, seed, data):
    predictions, responses, ceiling = matrices(shape, seed)
    vertex = st.integers(0, shape[1] - 1)
    predictions[:, data.draw(vertex)] = 0.1
    responses[:, data.draw(vertex)] = -3.3
    ceiling[data.draw(vertex)] = 0
    ceiling = ceiling if with_ceiling else None
    loss = LOSSES[name](torch.tensor(predictions), torch.tensor(responses), ceiling)
    assert loss.shape == () and loss.dtype == torch.float64
    assert loss.item() == pytest.approx(SLOW[name](predictions, responses, ceiling), rel=1e-9, abs=1e-12)


@all_losses
def test_takes_arrays_as_it_takes_tensors(name):
    arrays = matrices()
    assert LOSSES[name](*arrays).item() == LOSSES[name](*map(torch.tensor, arrays)).item()


@all_losses
@pytest.mark.parametrize("zero_ceiling", [True, False])
def test_gradient_is_that_of_finite_differences(name, zero_ceiling):
    predictions, responses, ceiling = (torch.tensor(values) for values in matrices((6, 4)))
    if zero_ceiling:
        ceiling[1] = 0
    # Away from |error| = 1 and 0, where Smooth L1 bends.
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, responses, ceiling), predictions.requires_grad_())
    assert torch.autograd.gradcheck(lambda p: LOSSES[name](p, responses), predictions)


@all_losses
def test_the_gradient_may_be_that_of_the_responses(name):
    predictions, responses, ceiling = (torch.tensor(values) for values in matrices((6, 4)))
    assert torch.autograd.gradcheck(lambda y: LOSSES[name](predictions, y, ceiling), responses.requires_grad_())


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("constant", [0.0, 0.1, -1e4])
def test_constant_columns_have_finite_gradients(name, dtype, constant):
    predictions, responses, ceiling = (torch.tensor(values) for values in matrices())
    predictions[:, 2] = constant
    responses[:, 3] = constant
    predictions = predictions.to(dtype).requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](predictions, responses.to(dtype), ceiling), predictions)
    assert torch.isfinite(gradient).all()
    assert gradient.abs().sum() > 0
    if name in ("pearson", "mnnpc"):
        assert (gradient[:, [2, 3]] == 0).all()
        assert (gradient[:, [0, 1, 4]] != 0).any(dim=0).all()


@correlation_losses
def test_constant_column_counts_as_uncorrelated(name):
    predictions, responses, _ = matrices((9, 1))
    predictions[:] = 0.1  # its mean in floating point is not 0.1
    expected = {"pearson": 0.5, "mnnpc": 0.25 / 0.5}[name]
    for dtype in (np.float32, np.float64):
        loss = LOSSES[name](predictions.astype(dtype), responses.astype(dtype), np.array([0.5], dtype=dtype))
        assert loss.item() == expected


@correlation_losses
@pytest.mark.parametrize("scale", [1e-30, 1e-12, 1e12, 1e30])
def test_scale_changes_neither_loss_nor_finiteness(name, scale):
    predictions, responses, ceiling = (torch.tensor(values, dtype=torch.float32) for values in matrices())
    scaled = (predictions * scale).requires_grad_()
    loss = LOSSES[name](scaled, responses, ceiling)
    (gradient,) = torch.autograd.grad(loss, scaled)
    assert loss.item() == pytest.approx(LOSSES[name](predictions, responses, ceiling).item(), rel=1e-5)
    assert torch.isfinite(gradient).all()


@correlation_losses
def test_rounding_of_a_constant_is_not_a_signal(name):
    predictions, responses, ceiling = (torch.tensor(values, dtype=torch.float32) for values in matrices())
    predictions[:, 0] = 1
    predictions[3, 0] += torch.finfo(torch.float32).eps
    predictions.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES[name](predictions, responses, ceiling), predictions)
    assert (gradient[:, 0] == 0).all() and (gradient[:, 1] != 0).any()


@all_losses
def test_nan_shows_up_in_the_loss(name):
    predictions, responses, ceiling = matrices()
    predictions[2, 1] = np.nan
    assert torch.isnan(LOSSES[name](predictions, responses, ceiling))


@all_losses
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_summed_in_float32(name, dtype):
    halves = [torch.tensor(values).to(dtype) for values in matrices((64, 5))]
    loss = LOSSES[name](*halves)
    assert loss.dtype == torch.float32
    exact = LOSSES[name](*(half.double() for half in halves))
    assert loss.item() == pytest.approx(exact.item(), rel=1e-5)


@all_losses
def test_images_may_come_in_any_order(name):
    predictions, responses, ceiling = matrices()
    order = np.random.default_rng(1).permutation(len(predictions))
    shuffled = LOSSES[name](predictions[order], responses[order], ceiling)
    assert shuffled.item() == pytest.approx(LOSSES[name](predictions, responses, ceiling).item(), rel=1e-12)
    assert LOSSES[name](predictions[order], responses, ceiling).item() != pytest.approx(shuffled.item(), rel=1e-3)


def test_only_mnnpc_uses_the_ceiling():
    predictions, responses, ceiling = matrices()
    uses = {
        name for name, loss in LOSSES.items() if loss(predictions, responses, ceiling) != loss(predictions, responses)
    }
    assert uses == {"mnnpc"}


@all_losses
@pytest.mark.parametrize("as_type", [np.asarray, torch.tensor])
def test_no_argument_is_edited(name, as_type):
    arguments = matrices()
    arguments[2][[0, 3]] = 0
    given_arguments = [as_type(values) for values in arguments]
    before = [as_type(values.copy()) for values in arguments]
    LOSSES[name](*given_arguments)
    assert all((now == then).all() for now, then in zip(given_arguments, before, strict=True))


@all_losses
@pytest.mark.parametrize("bad", [1.01, 55.0, -0.1, np.nan, np.inf])
def test_ceiling_that_is_no_fraction_is_refused(name, bad):
    predictions, responses, ceiling = matrices()
    ceiling[4] = bad
    with pytest.raises(FeatcacheError, match=r"fractions of variance in \[0, 1\].*divide percent by 100"):
        LOSSES[name](predictions, responses, ceiling)


@pytest.mark.parametrize("bad", [1.01, -0.1, np.nan])
def test_a_ceiling_is_checked_before_it_goes_to_the_device_of_losses(bad):
    ceiling = np.array([0, 0.3, 1], dtype=np.float32)
    np.testing.assert_array_equal(ceiling_on(ceiling, 3, "cpu"), ceiling)
    with pytest.raises(FeatcacheError, match=r"expected \(4,\); found \(3,\)"):
        ceiling_on(ceiling, 4, "cpu")
    ceiling[1] = bad
    with pytest.raises(FeatcacheError, match=r"fractions of variance in \[0, 1\]"):
        ceiling_on(ceiling, 3, "cpu")


@pytest.mark.parametrize("bad", [1.01, -0.1, float("nan")])
def test_a_ceiling_on_a_device_that_is_no_fraction_shows_up_in_the_loss(pretended_cuda, bad):
    """An error would wait for the device at every step."""
    predictions, responses, ceiling = (torch.tensor(values) for values in matrices())
    on_device = [values.to("cuda") for values in (predictions, responses)]
    ceiling[1] = 0
    right = LOSSES["mnnpc"](*on_device, ceiling.to("cuda"))
    assert right.item() == pytest.approx(LOSSES["mnnpc"](predictions, responses, ceiling).item())
    ceiling[2] = bad
    no_ceiling = ceiling.to("cuda")
    pretended_cuda.waits.clear()
    loss = LOSSES["mnnpc"](*on_device, no_ceiling)
    assert not pretended_cuda.waits and torch.isnan(loss).item()
    with pytest.raises(FeatcacheError, match=r"expected \(7,\); found \(6,\)"):
        LOSSES["mnnpc"](*on_device, ceiling[:6].to("cuda"))


@all_losses
@pytest.mark.parametrize("shape", [(12, 1), (1, 7), (7,), (12, 6), (12, 7, 1), (7, 12)])
def test_wrong_shape_is_refused(name, shape):
    predictions, responses, ceiling = matrices()
    for pair in ((predictions, np.zeros(shape)), (np.zeros(shape), responses)):
        with pytest.raises(FeatcacheError, match=r"predictions and responses: expected \(n_images, n_vertices\) both"):
            LOSSES[name](*pair, ceiling)


@all_losses
@pytest.mark.parametrize("shape", [(), (1,), (6,), (12, 7), (7, 1)])
def test_wrong_shape_of_the_ceiling_is_refused(name, shape):
    predictions, responses, _ = matrices()
    with pytest.raises(FeatcacheError, match="one value per vertex"):
        LOSSES[name](predictions, responses, np.full(shape, 0.5))


@correlation_losses
def test_batch_of_one_image_is_refused(name):
    with pytest.raises(FeatcacheError, match="expected 2 images or more"):
        LOSSES[name](*matrices((1, 7)))


def test_a_pattern_has_neither_level_nor_scale():
    """A number added to all vertices of an image, or a factor of them, changes neither the loss nor the optimum."""
    predictions, responses, _ = matrices()
    rng = np.random.default_rng(1)
    levels, factors = rng.normal(size=(2, len(predictions), 1, 1))
    expected = LOSSES["pattern"](predictions, responses).item()
    for changed in (predictions + 5 * levels[:, 0], predictions * np.exp(factors[:, 0])):
        assert LOSSES["pattern"](changed, responses).item() == pytest.approx(expected, rel=1e-9)
        assert LOSSES["pattern"](responses, changed).item() == pytest.approx(expected, rel=1e-9)
        assert LOSSES["pearson"](changed, responses).item() != pytest.approx(
            LOSSES["pearson"](predictions, responses).item(), rel=1e-3
        )


@pytest.mark.parametrize("shape", [(3, 1), (1, 1)])
def test_a_pattern_of_one_vertex_has_no_correlation_and_no_gradient(shape):
    predictions, responses, _ = (torch.tensor(values) for values in matrices(shape))
    loss = LOSSES["pattern"](predictions.requires_grad_(), responses)
    (gradient,) = torch.autograd.grad(loss, predictions)
    assert loss.item() == 0.5 and (gradient == 0).all()


def test_a_second_derivative_which_would_be_wrong_is_refused():
    predictions, responses, _ = (torch.tensor(values) for values in matrices())
    loss = LOSSES["pearson"](predictions.requires_grad_(), responses)
    (gradient,) = torch.autograd.grad(loss.square(), predictions, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()


def test_an_image_of_one_value_everywhere_has_no_gradient_and_the_others_keep_theirs():
    predictions, responses, _ = (torch.tensor(values) for values in matrices((5, 7)))
    predictions[1], responses[3] = 0.1, -2.0
    predictions.requires_grad_()
    (gradient,) = torch.autograd.grad(LOSSES["pattern"](predictions, responses), predictions)
    assert (gradient[[1, 3]] == 0).all() and (gradient[[0, 2, 4]] != 0).all()


def test_one_image_has_a_pattern_and_no_correlation_over_images():
    predictions, responses, _ = (torch.tensor(values) for values in matrices((1, 7)))
    (gradient,) = torch.autograd.grad(LOSSES["pattern"](predictions.requires_grad_(), responses), predictions)
    assert (gradient != 0).all()


def test_dead_vertices_are_drawn_to_where_the_regression_of_responses_on_predictions_gives_their_value():
    """Where responses have a mean of 0, that is the mean of the predictions; and they weigh on the other gradients."""
    rng = np.random.default_rng(0)
    signal = rng.normal(size=(1, 12))
    for mean in (0.0, 1.5):
        responses = np.concatenate([signal - signal.mean() + mean, np.zeros((1, 3))], 1)
        predictions = torch.tensor(responses + rng.normal(scale=0.3, size=responses.shape)).requires_grad_()
        alone = torch.autograd.grad(LOSSES["pattern"](predictions[:, :12], responses[:, :12]), predictions)[0]
        dead = predictions[:, 12:].detach().clone().requires_grad_()
        optimiser = torch.optim.LBFGS([dead], max_iter=500, line_search_fn="strong_wolfe", tolerance_change=0)
        assert not torch.allclose(
            torch.autograd.grad(LOSSES["pattern"](predictions, responses), predictions)[0][:, :12], alone[:, :12]
        )

        def closure(optimiser=optimiser, dead=dead, predictions=predictions, responses=responses):
            optimiser.zero_grad()
            loss = LOSSES["pattern"](torch.cat([predictions.detach()[:, :12], dead], 1), responses)
            loss.backward()
            return loss

        optimiser.step(closure)
        whole = torch.cat([predictions.detach()[:, :12], dead.detach()], 1)[0].numpy()
        slope, shift = np.polyfit(whole, responses[0], 1)
        np.testing.assert_allclose(slope * whole[12:] + shift, 0, atol=1e-4)
        if mean == 0:
            np.testing.assert_allclose(whole[12:], whole.mean(), atol=1e-4)


@all_losses
def test_empty_batch_is_refused(name):
    with pytest.raises(FeatcacheError, match="not empty"):
        LOSSES[name](np.zeros((5, 0)), np.zeros((5, 0)))


def test_weighted_sum_adds_what_it_names():
    arguments = matrices()
    loss = weighted_sum([(0.5, "smooth_l1"), (2, "mnnpc"), (1, "mnnpc")])
    expected = 0.5 * LOSSES["smooth_l1"](*arguments) + 3 * LOSSES["mnnpc"](*arguments)
    assert loss(*arguments).shape == ()
    assert loss(*arguments).item() == pytest.approx(expected.item(), rel=1e-12)
    assert loss(*arguments[:2]).item() != pytest.approx(expected.item(), rel=1e-3)


def test_terms_that_change_later_do_not_change_the_sum():
    arguments, terms = matrices(), [(1.0, "mse")]
    loss = weighted_sum(terms)
    terms.append((1.0, "pearson"))
    assert loss(*arguments).item() == LOSSES["mse"](*arguments).item()


def test_weighted_sum_keeps_the_gradient():
    predictions, responses, _ = (torch.tensor(values) for values in matrices((5, 3)))
    loss = weighted_sum([(0.3, "mse"), (1.0, "pearson")])
    assert torch.autograd.gradcheck(lambda p: loss(p, responses), predictions.requires_grad_())


@pytest.mark.parametrize(
    ("terms", "message"),
    [
        ([], "expected one term or more; found none"),
        ([(1.0, "mnpc")], "--loss: expected one of smooth_l1, mse, pearson, pattern, mnnpc; found 'mnpc'"),
        ([(0.0, "mse")], "weight of mse: expected a finite number above 0"),
        ([(-1.0, "mse")], "weight of mse: expected a finite number above 0"),
        ([(float("nan"), "mse")], "weight of mse: expected a finite number above 0"),
    ],
)
def test_weighted_sum_refuses_what_it_cannot_add(terms, message):
    with pytest.raises(ConfigError, match=message):
        weighted_sum(terms)
