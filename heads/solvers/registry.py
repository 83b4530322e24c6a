"""Solvers by name: the builder of each is in its own file, and `heads.config.SOLVERS` says which."""

from heads.config.registry import load
from heads.solvers.base import Problem, Solver


def build_solver(problem: Problem) -> Solver:
    """Build the solver that the settings name for these heads and features.

    Says how much memory it expects to take. Raises ConfigError for what cannot work, before anything is stored.
    """
    solver: Solver = load(problem.config.builder)(problem)
    return solver
