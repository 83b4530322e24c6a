"""A solver is built by the name of its settings, and by what its heads read."""

import pytest

from featcache.dataset.algonauts import open_challenge
from heads.config import HEADS, SOLVERS, FitConfig
from heads.config.solvers import HeadSpec, SolverSpec
from heads.solvers.gradient import GradientSolver
from heads.solvers.joint import JointSolver
from heads.solvers.layers.ridge import LayeredRidge
from heads.solvers.registry import build_solver
from heads.solvers.ridge_folds import RidgeFolds, TrainedBackboneRidge
from heads.solvers.trained import TrainedMaps
from support.problems import LAYERS, VECTOR, features_of, planted_responses, problem_of, responding


@pytest.fixture
def built(tiny, tmp_path):
    """Builds the solver of some settings, for features of a frozen backbone or of one that was trained."""
    (subject,) = open_challenge(tiny).subjects[:1]

    def build(config, shapes=VECTOR, **about):
        own = responding(subject, planted_responses(len(subject.train), shapes), tmp_path)
        return build_solver(problem_of(own, features_of(own, tmp_path, shapes, **about), config, tmp_path))

    return build


@pytest.mark.parametrize(
    ("settings", "shapes", "trained", "kind"),
    [
        ({}, VECTOR, False, RidgeFolds),
        ({}, VECTOR, True, TrainedBackboneRidge),
        ({}, LAYERS, False, LayeredRidge),
        ({}, LAYERS, True, LayeredRidge),
        ({"loss": "smooth_l1"}, VECTOR, False, GradientSolver),
        ({"head": "roi"}, LAYERS, True, GradientSolver),
        ({"head": "spatial"}, LAYERS, False, JointSolver),
        ({"head": "spatial", "solver": "adamw"}, LAYERS, True, JointSolver),
        ({"solver": "trained"}, VECTOR, True, TrainedMaps),
        ({"solver": "trained", "head": "spatial"}, LAYERS, True, TrainedMaps),
    ],
)
def test_settings_and_features_decide_the_solver(built, said, settings, shapes, trained, kind):
    config = FitConfig(n_folds=3, **settings)
    assert type(built(config, shapes, trained=trained, checkpoints=config.solver == "trained")) is kind


def test_what_a_solver_takes_is_said_before_it_fits(built, said):
    built(FitConfig(n_folds=3))
    assert any("6 features, 30 images: 5 vertices at a time; about" in line for line in said)


class Own:
    """A solver of an extension."""

    def __init__(self, problem):
        self.problem = problem


@pytest.mark.parametrize("table", ["solver", "head"])
def test_a_new_entry_of_either_table_is_built_by_its_own_function(built, said, monkeypatch, table):
    """Its reference is loaded when it is asked for."""
    monkeypatch.setattr("heads.solvers.registry.load", {"extension:build": Own}.__getitem__)
    if table == "solver":
        monkeypatch.setitem(SOLVERS, "own", SolverSpec(build="extension:build", stored="own"))
        config = FitConfig(solver="own", n_folds=3)
    else:
        monkeypatch.setitem(HEADS, "own", HeadSpec(build="extension:build"))
        config = FitConfig(head="own", n_folds=3)
    solver = built(config)
    assert type(solver) is Own and solver.problem.config is config
