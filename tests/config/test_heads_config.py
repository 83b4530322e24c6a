"""Settings of heads: how losses are read and written, which solver serves them, and what makes two models the same."""

from __future__ import annotations

import dataclasses
import subprocess
import sys

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from featcache.config import fingerprint
from featcache.errors import ConfigError
from heads.blend.weights import learners
from heads.config import (
    BLENDS,
    LEAST_SQUARES,
    LOSS_NAMES,
    AdamWConfig,
    BlendConfig,
    FitConfig,
    RidgeConfig,
    loss_label,
    parse_loss,
)
from heads.scores.losses import LOSSES, weighted_sum

GOOD = {
    "mse": ((1.0, "mse"),),
    "smooth_l1+0.5*mnnpc": ((1.0, "smooth_l1"), (0.5, "mnnpc")),
    "0.5*mnnpc+smooth_l1": ((1.0, "smooth_l1"), (0.5, "mnnpc")),
    " 2 * pearson + mse ": ((1.0, "mse"), (2.0, "pearson")),
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


@given(sums)
def test_a_loss_is_read_as_it_is_written(terms):
    label = loss_label(tuple(terms))
    assert sorted(parse_loss(label)) == sorted(terms)


@given(sums, st.randoms(use_true_random=False))
def test_a_loss_has_one_label_whatever_its_order(terms, random):
    shuffled = random.sample(terms, len(terms))
    labels = {loss_label(parse_loss(loss_label(tuple(order)))) for order in (terms, shuffled)}
    assert len(labels) == 1


def test_losses_that_differ_have_labels_that_differ():
    assert FitConfig(loss="0.12345671*smooth_l1").objective != FitConfig(loss="0.12345672*smooth_l1").objective


def test_names_are_those_of_the_functions():
    assert set(LOSS_NAMES) == set(LOSSES)
    assert all(learners(method, 0) for method in BLENDS)


@pytest.mark.parametrize(
    ("loss", "head", "reached"),
    [
        ("mse", "linear", True),
        ("pearson", "linear", True),
        ("mnnpc", "linear", True),
        ("mse+0.5*pearson+2*mnnpc", "linear", True),
        ("smooth_l1", "linear", False),
        ("mnnpc+0.001*smooth_l1", "linear", False),
        ("mse", "roi", False),
        ("mnnpc", "roi", False),
        ("smooth_l1", "roi", False),
    ],
)
def test_closed_form_serves_where_it_reaches_the_optimum(loss, head, reached):
    config = FitConfig(loss=loss, head=head)
    assert config.exact_reaches_optimum is reached
    assert config.resolved_solver == ("exact" if reached else "adamw")
    assert config.objective == ("ridge" if reached else loss_label(parse_loss(loss)))
    assert FitConfig(loss=loss, head=head, solver="adamw").resolved_solver == "adamw"
    if reached:
        assert FitConfig(loss=loss, head=head, solver="exact").resolved_solver == "exact"
    else:
        with pytest.raises(ConfigError, match="use --solver adamw"):
            FitConfig(loss=loss, head=head, solver="exact")


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


def test_one_recipe_for_all_losses_of_the_closed_form():
    keys = [FitConfig(loss=loss).key() for loss in ("mse", "pearson", "mnnpc", "mnnpc+0.5*mse")]
    assert len({fingerprint(key) for key in keys}) == 1
    # The gradient loop's settings are no part of it.
    assert FitConfig(loss="mse", adamw=AdamWConfig(epochs=3)).key() == keys[0]


def test_a_recipe_for_each_loss_of_the_gradient_loop():
    losses = ("mse", "pearson", "mnnpc", "mnnpc+0.5*mse", "mnnpc+0.6*mse", "0.5*mnnpc+mse")
    assert len({fingerprint(FitConfig(loss=loss, solver="adamw").key()) for loss in losses}) == len(losses)
    # The penalties are no part of it.
    config = FitConfig(loss="mse", solver="adamw")
    assert FitConfig(loss="mse", solver="adamw", ridge=RidgeConfig(penalties=(1.0,))).key() == config.key()


@pytest.mark.parametrize("solver", ["exact", "adamw"])
def test_whatever_decides_the_heads_is_in_the_recipe_and_the_device_is_not(solver):
    config = FitConfig(loss="mse", solver=solver)
    changed = {"n_folds": 4, "seed": 3, "ridge": RidgeConfig(selection="gcv"), "adamw": AdamWConfig(patience=3)}
    del changed["ridge" if solver == "adamw" else "adamw"]
    keys = [config.key(), *(dataclasses.replace(config, **{k: v}).key() for k, v in changed.items())]
    assert len({fingerprint(key) for key in keys}) == len(keys)
    assert dataclasses.replace(config, device="cpu").key() == config.key()
    assert dataclasses.replace(config, solver="auto").key() == config.key() or solver == "adamw"


def test_every_setting_of_the_loop_is_in_its_recipe():
    config = FitConfig(loss="smooth_l1", head="roi")
    keys = [config.key()]
    for field in dataclasses.fields(AdamWConfig):
        value = getattr(config.adamw, field.name) + 1
        keys.append(dataclasses.replace(config, adamw=AdamWConfig(**{field.name: value})).key())
    assert len({fingerprint(key) for key in keys}) == 1 + len(dataclasses.fields(AdamWConfig))


def test_a_recipe_stays_what_it_is():
    # Stores are found by it: a change here makes every cached prediction of the user's count as missing.
    key = FitConfig(loss="pearson+mse", solver="adamw").key()
    assert key == {
        "head": "linear",
        "n_folds": 5,
        "seed": 0,
        "solver": "adamw",
        "objective": "mse+pearson",
        "settings": {
            "learning_rate": 3e-4,
            "weight_decay": 0.1,
            "epochs": 60,
            "batch_size": 128,
            "patience": 10,
            "validation": 10,
        },
    }


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (FitConfig, {"head": "mlp"}),
        (FitConfig, {"solver": "lbfgs"}),
        (FitConfig, {"device": "tpu"}),
        (FitConfig, {"n_folds": 1}),
        (FitConfig, {"seed": -1}),
        (RidgeConfig, {"selection": "aic"}),
        (RidgeConfig, {"penalties": ()}),
        (RidgeConfig, {"penalties": (1.0, -1.0)}),
        (RidgeConfig, {"penalties": (float("nan"),)}),
        (RidgeConfig, {"penalties": (float("inf"),)}),
        (AdamWConfig, {"learning_rate": -1e-3}),
        (AdamWConfig, {"weight_decay": -0.1}),
        (AdamWConfig, {"epochs": 0}),
        (AdamWConfig, {"batch_size": 1}),
        (AdamWConfig, {"patience": 0}),
        (AdamWConfig, {"validation": 1}),
        (BlendConfig, {"method": "median"}),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(kind, settings):
    with pytest.raises(ConfigError, match="expected"):
        kind(**settings)


def test_defaults_are_ordered_penalties_three_a_decade():
    penalties = np.array(RidgeConfig.penalties)
    assert penalties[[0, -1]].tolist() == [1e-4, 1e4]
    np.testing.assert_allclose(np.diff(np.log10(penalties)), 1 / 3, atol=1e-3)


def test_no_torch_to_read_options():
    code = "import sys, heads.config; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
