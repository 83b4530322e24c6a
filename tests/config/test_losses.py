"""How sums of losses are read and written, and which of them have the optimum of least squares."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.errors import ConfigError, FeatcacheError
from heads.config import FitConfig, loss_label, parse_loss
from heads.config.losses import CORRELATIONS, LEAST_SQUARES, LOSS_NAMES, LOSS_SPECS, split_losses
from heads.config.registry import load
from heads.scores.losses import LOSSES, weighted_sum

GOOD = {
    "mse": ((1.0, "mse"),),
    "smooth_l1+0.5*mnnpc": ((1.0, "smooth_l1"), (0.5, "mnnpc")),
    "0.5*mnnpc+smooth_l1": ((1.0, "smooth_l1"), (0.5, "mnnpc")),
    " 2 * pearson + mse ": ((1.0, "mse"), (2.0, "pearson")),
    "mnnpc+pattern+smooth_l1": ((1.0, "smooth_l1"), (1.0, "pattern"), (1.0, "mnnpc")),
    "1*mse": ((1.0, "mse"),),
    "1.*mse": ((1.0, "mse"),),
    ".25*mse": ((0.25, "mse"),),
    "1e-3*mse": ((0.001, "mse"),),
    "2.5e2*mse": ((250.0, "mse"),),
    "mnnpc+pearson+mse+smooth_l1": ((1.0, "smooth_l1"), (1.0, "mse"), (1.0, "pearson"), (1.0, "mnnpc")),
}
BAD = [
    "",
    " ",
    "+",
    "mse+",
    "+mse",
    "mse++pearson",
    "MSE",
    "huber",
    "mse pearson",
    "mse*2",
    "2mse",
    "*mse",
    "2**mse",
    "0*mse",
    "0.0*mse",
    "1e-999*mse",
    "1e999*mse",
    "-1*mse",
    "mse-pearson",
    "nan*mse",
    "inf*mse",
    "mse+mse",
    "0.5*mse+0.5*mse",
    "mse,pearson",
    "(mse)",
    "mse\n+pearson;",
]

weights = st.floats(1e-6, 1e6)
sums = st.dictionaries(st.sampled_from(LOSS_NAMES), weights, min_size=1).flatmap(
    lambda terms: st.permutations([(weight, name) for name, weight in terms.items()])
)


@pytest.mark.parametrize(("text", "terms"), GOOD.items(), ids=GOOD)
def test_losses_are_read(text, terms):
    assert parse_loss(text) == terms


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_loss_is_refused(text):
    with pytest.raises(ConfigError, match="--loss: expected"):
        parse_loss(text)
    if "," not in text:  # several losses, each of which is one
        with pytest.raises(ConfigError, match="--loss: expected"):
            FitConfig(loss=text)
    with pytest.raises(ConfigError, match="--loss: expected"):
        FitConfig(loss=f"mse,{text},pearson" if "," not in text else f"{text},")


@pytest.mark.slow
@given(sums)
def test_a_loss_is_read_as_it_is_written(terms):
    label = loss_label(tuple(terms))
    assert sorted(parse_loss(label)) == sorted(terms)


@pytest.mark.slow
@given(sums, st.randoms(use_true_random=False))
def test_a_loss_has_one_label_whatever_its_order(terms, random):
    shuffled = random.sample(terms, len(terms))
    labels = {loss_label(parse_loss(loss_label(tuple(order)))) for order in (terms, shuffled)}
    assert len(labels) == 1


def test_losses_that_differ_have_labels_that_differ():
    assert FitConfig(loss="0.12345671*smooth_l1").objective != FitConfig(loss="0.12345672*smooth_l1").objective


def test_several_losses_are_split_at_commas():
    assert split_losses("mnnpc, pearson") == ["mnnpc", "pearson"]
    assert split_losses("mse+0.5*pearson") == ["mse+0.5*pearson"]


def test_names_are_those_of_the_functions():
    assert set(LOSS_NAMES) == set(LOSSES) == set(LOSS_SPECS)
    assert all(load(spec.function) is LOSSES[name] for name, spec in LOSS_SPECS.items())


@pytest.mark.parametrize("name", LOSS_NAMES)
def test_a_loss_that_compares_images_with_each_other_says_so(name):
    """One image has no correlation; of the other losses a batch of one is as good as any."""
    one = torch.tensor([[1.0, 2.0, 4.0]])
    if name in CORRELATIONS:
        with pytest.raises(FeatcacheError, match="2 images or more"):
            LOSSES[name](one, one)
    else:
        assert LOSSES[name](one, one).item() == pytest.approx(0, abs=1e-6)


def outlying_responses():
    """Features and responses with noise that is skewed and has outliers, so that a loss's taste shows."""
    rng = np.random.default_rng(0)
    features = rng.normal(size=(60, 4))
    responses = features @ rng.normal(size=(4, 6)) + rng.exponential(size=(60, 6)) ** 3
    return features, responses, rng.uniform(0.05, 1, size=6)


def minimised(loss, features, responses, noise_ceiling):
    """Predictions of the linear head that minimises a loss over all images at once, in float64."""
    x, y = torch.from_numpy(features), torch.from_numpy(responses)
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(x.shape[1], y.shape[1], dtype=torch.float64, generator=generator).requires_grad_()
    intercept = torch.zeros(y.shape[1], dtype=torch.float64, requires_grad=True)
    optimiser = torch.optim.LBFGS(
        [weights, intercept], max_iter=2000, tolerance_grad=1e-12, tolerance_change=0, line_search_fn="strong_wolfe"
    )

    def closure():
        optimiser.zero_grad()
        value = loss(x @ weights + intercept, y, noise_ceiling)
        value.backward()
        return value

    optimiser.step(closure)
    return (x @ weights + intercept).detach().numpy()


def cosines(predictions, others):
    """(n_vertices,) between two predictions, their means taken out."""
    a, b = (part - part.mean(0) for part in (predictions, others))
    return (a * b).sum(0) / np.linalg.norm(a, axis=0) / np.linalg.norm(b, axis=0)


def least_squares(features, responses):
    design = np.column_stack([features, np.ones(len(features))])
    return design @ np.linalg.lstsq(design, responses, rcond=None)[0]


@pytest.mark.parametrize("loss", [*sorted(LEAST_SQUARES), "mse+2*pearson+0.5*mnnpc"])
@pytest.mark.parametrize("with_ceiling", [True, False])
def test_losses_of_the_closed_form_point_where_least_squares_does(loss, with_ceiling):
    features, responses, ceiling = outlying_responses()
    predictions = minimised(weighted_sum(parse_loss(loss)), features, responses, ceiling if with_ceiling else None)
    assert cosines(predictions, least_squares(features, responses)).min() > 0.9999


@pytest.mark.parametrize("loss", sorted(set(LOSS_NAMES) - LEAST_SQUARES))
def test_the_other_losses_point_elsewhere(loss):
    features, responses, _ = outlying_responses()
    predictions = minimised(LOSSES[loss], features, responses, None)
    assert cosines(predictions, least_squares(features, responses)).min() < 0.95
