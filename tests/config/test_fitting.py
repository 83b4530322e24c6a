"""Settings of a fit: which solver serves, what makes two models the same, and what cannot work."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from featcache.config import fingerprint
from featcache.errors import ConfigError
from heads.config import (
    HEADS,
    SOLVERS,
    AdamWConfig,
    FitConfig,
    RidgeConfig,
    SpatialConfig,
    adamw_of,
    loss_label,
    parse_loss,
    refuse_unread,
)


@pytest.mark.parametrize(
    ("loss", "head", "reached"),
    [
        ("mse", "linear", True),
        ("pearson", "linear", True),
        ("mnnpc", "linear", True),
        ("mse+0.5*pearson+2*mnnpc", "linear", True),
        ("smooth_l1", "linear", False),
        ("mnnpc+0.001*smooth_l1", "linear", False),
        ("pattern", "linear", False),
        ("mse+pattern", "linear", False),
        ("mse", "roi", False),
        ("mnnpc", "roi", False),
        ("smooth_l1", "roi", False),
    ],
)
def test_closed_form_serves_where_it_reaches_the_optimum(loss, head, reached):
    config = FitConfig(loss=loss, head=head)
    assert SOLVERS["ridge"].serves(head, [name for _, name in config.terms]) is reached
    assert config.resolved_solver == ("ridge" if reached else "adamw")
    assert config.solver_spec is SOLVERS[config.resolved_solver]
    assert config.objective == ("ridge" if reached else loss_label(parse_loss(loss)))
    assert FitConfig(loss=loss, head=head, solver="adamw").resolved_solver == "adamw"
    if reached:
        assert FitConfig(loss=loss, head=head, solver="ridge").resolved_solver == "ridge"
    else:
        with pytest.raises(ConfigError, match="use --solver adamw"):
            FitConfig(loss=loss, head=head, solver="ridge")


def test_one_key_for_all_losses_of_the_closed_form():
    keys = [FitConfig(loss=loss).key() for loss in ("mse", "pearson", "mnnpc", "mnnpc+0.5*mse")]
    assert len({fingerprint(key) for key in keys}) == 1
    # The gradient loop's settings are no part of it.
    assert FitConfig(loss="mse", adamw=AdamWConfig(epochs=3)).key() == keys[0]


def test_a_key_for_each_loss_of_the_gradient_loop():
    losses = ("mse", "pearson", "mnnpc", "mnnpc+0.5*mse", "mnnpc+0.6*mse", "0.5*mnnpc+mse")
    assert len({fingerprint(FitConfig(loss=loss, solver="adamw").key()) for loss in losses}) == len(losses)
    # The penalties are no part of it.
    config = FitConfig(loss="mse", solver="adamw")
    assert FitConfig(loss="mse", solver="adamw", ridge=RidgeConfig(penalties=(1.0,))).key() == config.key()


@pytest.mark.parametrize("solver", ["ridge", "adamw"])
def test_whatever_decides_the_heads_is_in_the_key_and_the_device_is_not(solver):
    config = FitConfig(loss="mse", solver=solver)
    changed = {"n_folds": 4, "seed": 3, "ridge": RidgeConfig(selection="gcv"), "adamw": AdamWConfig(patience=3)}
    del changed["ridge" if solver == "adamw" else "adamw"]
    keys = [config.key(), *(dataclasses.replace(config, **{k: v}).key() for k, v in changed.items())]
    assert len({fingerprint(key) for key in keys}) == len(keys)
    assert dataclasses.replace(config, device="cpu").key() == config.key()
    assert dataclasses.replace(config, solver="auto").key() == config.key() or solver == "adamw"


def test_every_setting_of_the_loop_is_in_its_key():
    config = FitConfig(loss="smooth_l1", head="roi")
    keys = [config.key()]
    for field in dataclasses.fields(AdamWConfig):
        value = getattr(config.adamw, field.name) + 1
        keys.append(dataclasses.replace(config, adamw=AdamWConfig(**{field.name: value})).key())
    assert len({fingerprint(key) for key in keys}) == 1 + len(dataclasses.fields(AdamWConfig))


def test_a_key_stays_what_it_is():
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


def test_the_key_of_the_closed_form_names_its_solver_as_stores_do():
    key = FitConfig().key()
    assert list(key) == ["head", "n_folds", "seed", "solver", "objective", "settings"]
    assert key["solver"] == "exact" and key["objective"] == "ridge"
    assert key["settings"] == {"penalties": list(RidgeConfig.penalties), "selection": "auto"}


def test_the_key_of_spatial_heads_has_the_settings_of_loop_and_head():
    config = FitConfig(head="spatial", solver="adamw")
    assert list(config.key()["settings"]) == [
        *(field.name for field in dataclasses.fields(AdamWConfig)),
        *(field.name for field in dataclasses.fields(SpatialConfig)),
    ]


def test_heads_that_are_taken_as_they_are_have_a_key_without_folds_or_settings():
    key = FitConfig(solver="trained", n_folds=7, seed=3, loss="smooth_l1").key()
    assert key == {"head": "trained", "solver": "trained", "objective": "trained"}


def test_products_are_in_the_key_where_they_are_not_float32():
    assert "products" not in FitConfig().key()
    assert FitConfig(products="tf32").key()["products"] == "tf32"


def test_losses_of_one_optimum_are_one_variant():
    assert [one.loss for one in FitConfig(loss="mnnpc,pearson,smooth_l1,mse").variants()] == ["mnnpc", "smooth_l1"]
    trained = FitConfig(loss="mnnpc, 0.5*mse+pearson", solver="adamw").variants()
    assert [one.objective for one in trained] == ["mnnpc", "0.5*mse+pearson"]


def test_losses_that_share_their_heads_are_named():
    assert FitConfig(loss="mnnpc,pearson,smooth_l1").shared_losses == {"ridge": ["mnnpc", "pearson"]}
    assert FitConfig(loss="mnnpc,pearson", solver="adamw").shared_losses == {}
    assert FitConfig(loss="mnnpc,pearson", solver="trained").shared_losses == {}


def test_the_closed_form_takes_linear_heads_under_losses_with_its_optimum_alone():
    with pytest.raises(ConfigError, match=r"--solver ridge: expected .*mse, pearson, mnnpc; found .*smooth_l1"):
        FitConfig(loss="smooth_l1", solver="ridge")
    with pytest.raises(ConfigError, match="expected --head linear"):
        FitConfig(loss="mse", head="roi", solver="ridge")


def test_the_builder_is_that_of_the_head_where_it_reads_more_than_a_matrix():
    assert FitConfig(head="spatial").builder == HEADS["spatial"].build
    assert FitConfig(head="roi").builder == SOLVERS["adamw"].build
    assert FitConfig(head="spatial", solver="trained").builder == SOLVERS["trained"].build


def test_one_training_serves_several_subjects_where_heads_have_a_space():
    space = SpatialConfig(space=3)
    assert FitConfig(head="spatial", spatial=space).joint
    assert not FitConfig(head="spatial").joint
    assert not FitConfig(head="linear", spatial=space).joint
    assert not FitConfig(head="spatial", spatial=space, solver="trained").joint


def test_spatial_heads_are_trained_with_settings_of_their_own():
    assert adamw_of("linear") == AdamWConfig()
    assert adamw_of("spatial").learning_rate < AdamWConfig().learning_rate


@pytest.mark.parametrize(
    ("given", "config", "option"),
    [
        (["epochs"], FitConfig(), "--epochs"),
        (["learning_rate"], FitConfig(solver="ridge"), "--learning-rate"),
        (["batch_size"], FitConfig(solver="ridge"), "--batch-size"),
        (["rank"], FitConfig(head="roi"), "--rank"),
        (["loss"], FitConfig(solver="trained"), "--loss"),
        (["folds"], FitConfig(solver="trained"), "--folds"),
    ],
)
def test_options_that_decide_nothing_are_refused(given, config, option):
    with pytest.raises(ConfigError, match=f"{option}: expected .* with it; found "):
        refuse_unread(given, config)


def test_options_that_decide_something_pass():
    refuse_unread(["loss", "folds", "seed"], FitConfig())
    refuse_unread(["epochs", "learning_rate"], FitConfig(solver="adamw"))
    refuse_unread(["epochs", "batch_size", "weight_decay"], FitConfig(loss="mse,smooth_l1"))
    refuse_unread(["rank", "space", "epochs"], FitConfig(head="spatial"))


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
        (SpatialConfig, {"rank": 0}),
        (SpatialConfig, {"token_dropout": 1.0}),
    ],
)
def test_settings_that_cannot_work_are_refused_when_built(kind, settings):
    with pytest.raises(ConfigError, match="expected"):
        kind(**settings)


def test_defaults_are_ordered_penalties_three_a_decade():
    penalties = np.array(RidgeConfig.penalties)
    assert penalties[[0, -1]].tolist() == [1e-4, 1e4]
    np.testing.assert_allclose(np.diff(np.log10(penalties)), 1 / 3, atol=1e-3)


@pytest.mark.parametrize(
    ("settings", "digest"),
    [
        ({}, "6b956dd8d58f"),
        ({"loss": "smooth_l1"}, "113f05384675"),
        ({"head": "spatial"}, "55d2d3c4eceb"),
        ({"solver": "trained"}, "5ce066a9b7ef"),
        ({"loss": "mse", "solver": "adamw", "adamw": AdamWConfig(epochs=3)}, "ded081b549e6"),
    ],
)
def test_keys_of_heads_without_rois_are_older_than_their_losses_and_stay(settings, digest):
    assert fingerprint(FitConfig(**settings).key()) == digest


def test_the_key_of_roi_heads_has_their_loss():
    """Earlier versions trained the mean of a vertex's heads, so their stores are not taken for these."""
    same = FitConfig(loss="smooth_l1", head="roi")
    assert fingerprint(same.key()) != "d034b227f84b"
    assert same.key() == FitConfig(loss="smooth_l1", head="roi", roi_loss="smooth_l1").key()
    other = FitConfig(loss="smooth_l1", head="roi", roi_loss="mnnpc + smooth_l1").key()
    assert other != same.key() and other["roi_loss"] == "smooth_l1+mnnpc"
    both = FitConfig(loss="smooth_l1,mse", head="roi").variants()
    assert [one.key()["roi_loss"] for one in both] == ["smooth_l1", "mse"]


def test_a_loss_of_roi_heads_is_refused_without_them():
    with pytest.raises(ConfigError, match="--roi-loss: expected --head roi with it; found --head linear"):
        FitConfig(roi_loss="mse")
    with pytest.raises(ConfigError, match="--roi-loss: expected --head roi with it; found --head spatial"):
        refuse_unread(["roi_loss"], FitConfig(head="spatial"))
    with pytest.raises(ConfigError, match="--roi-loss: expected a solver that fits heads"):
        refuse_unread(["roi_loss"], FitConfig(head="roi", solver="trained"))
    with pytest.raises(ConfigError, match=r"--roi-loss: expected smooth_l1, .*; found 'msee'"):
        FitConfig(head="roi", roi_loss="msee")
