"""The tables of solvers and heads: every entry can be loaded, and names on disk and on the command line are apart."""

import dataclasses
import inspect

import pytest
import torch

from featcache.errors import ConfigError, StoreError
from heads.config import HEADS, LOSS_NAMES, SOLVERS, FitConfig, refuse_unread
from heads.config.registry import load
from heads.config.solvers import SolverSpec, automatic_solver, solver_of
from heads.solvers.base import Problem


@pytest.mark.parametrize("name", SOLVERS)
def test_every_solver_has_a_builder_and_settings_that_there_are(name):
    spec = SOLVERS[name]
    (parameter,) = inspect.signature(load(spec.build)).parameters.values()
    assert parameter.annotation is Problem
    if spec.settings is not None:
        settings = getattr(FitConfig(), spec.settings)
        assert set(spec.options) <= {field.name for field in dataclasses.fields(settings)}


@pytest.mark.parametrize("name", HEADS)
def test_every_head_has_a_module_or_a_builder(name):
    spec = HEADS[name]
    assert (spec.module is None) != (spec.build is None)
    assert spec.settings is None or dataclasses.is_dataclass(getattr(FitConfig(), spec.settings))
    if spec.module is not None:
        masks = [torch.tensor([True, False, True]).numpy()]
        head = load(spec.module)(5, 3, masks)
        assert head(torch.randn(4, 5)).shape == (4, 3)


def test_a_solver_is_found_by_the_name_that_stores_have():
    assert {solver_of(spec.stored).build for spec in SOLVERS.values()} == {spec.build for spec in SOLVERS.values()}
    assert solver_of("exact") is SOLVERS["ridge"]
    assert len({spec.stored for spec in SOLVERS.values()}) == len(SOLVERS)


def test_a_store_of_an_unknown_solver_is_refused():
    known = ", ".join(spec.stored for spec in SOLVERS.values())
    with pytest.raises(StoreError, match=f"expected heads of a solver among {known}; found 'lbfgs'"):
        solver_of("lbfgs")


def test_names_that_stores_have_stay_what_they_are():
    earlier = {"ridge": "exact", "adamw": "adamw", "trained": "trained"}
    assert {name: SOLVERS[name].stored for name in earlier} == earlier


@pytest.mark.parametrize("head", HEADS)
@pytest.mark.parametrize("loss", LOSS_NAMES)
def test_auto_takes_a_solver_that_serves_and_that_fits(head, loss):
    spec = SOLVERS[automatic_solver(head, [loss])]
    assert spec.automatic and spec.fits and spec.serves(head, [loss])


def test_the_closed_form_serves_linear_heads_and_no_sum_with_another_loss():
    ridge = SOLVERS["ridge"]
    assert ridge.serves("linear", ["mse", "mnnpc"])
    assert not ridge.serves("linear", ["mse", "smooth_l1"])
    assert not ridge.serves("roi", ["mse"])
    assert SOLVERS["adamw"].serves("roi", ["smooth_l1"])


def test_a_solver_may_serve_one_loss_and_is_refused_under_others_with_words_of_its_entry(monkeypatch):
    lasso = SolverSpec(build="a:b", stored="lasso", options=("sparsest",), linear_heads=True, serves_loss="mse".__eq__)
    monkeypatch.setitem(SOLVERS, "lasso", lasso)
    assert FitConfig(solver="lasso", loss="mse").objective == "mse"
    with pytest.raises(ConfigError) as refused:
        FitConfig(solver="lasso", loss="pearson")
    expected = "--solver lasso: expected --head linear and a loss of mse; found --head linear --loss pearson; use "
    assert str(refused.value) == expected + "--solver ridge"
    with pytest.raises(ConfigError, match="--sparsest: expected --solver lasso with it; found --solver ridge; "):
        refuse_unread(["sparsest"], FitConfig(solver="ridge"))
