"""Simulated trees for reading."""

from dataclasses import replace
from pathlib import Path

import pytest

from featcache.simulate import simulate
from support.simulated import TINY


@pytest.fixture(scope="session")
def tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All eight subjects, a few images each."""
    root = tmp_path_factory.mktemp("simulate") / "tree"
    simulate(TINY, root)
    return root


@pytest.fixture(scope="session")
def long_tree(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One subject with enough images to estimate a variance."""
    root = tmp_path_factory.mktemp("simulate") / "tree"
    simulate(replace(TINY, n_subjects=1, n_train=400, n_test=20, n_reference=400), root)
    return root
