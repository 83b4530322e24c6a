"""Solvers by name: the builder of each is in its own file, and `heads.config.SOLVERS` says which."""

from featcache.machine.device_memory import refuse_beyond
from featcache.machine.memory import memory_at_start
from heads.config.registry import load
from heads.solvers.base import Problem, Solver


def build_solver(problem: Problem) -> Solver:
    """Build the solver that the settings name for these heads and features.

    Raises ConfigError for what cannot work, and for what --max-memory does not hold, before anything is stored.
    """
    solver: Solver = load(problem.config.builder)(problem)
    if problem.config.max_memory:
        needed = memory_at_start() + solver.memory(max(problem.n_vertices))
        refuse_beyond(problem.device, problem.config.max_memory, needed)
    return solver
