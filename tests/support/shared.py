"""What is built once for a whole run of the tests, however many workers the run has."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from filelock import FileLock


def build_once(factory: pytest.TempPathFactory, name: str, build: Callable[[Path], object]) -> Path:
    """Folder that `build` fills for the first test that asks; the others, of every worker, find it filled.

    For reading: a test that writes takes a copy.
    """
    root = factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:  # the folder of a worker is in that of the run
        root = root.parent
    folder, mark = root / "shared" / name, root / "shared" / f"{name}.built"
    folder.parent.mkdir(exist_ok=True)
    with FileLock(root / "shared" / f"{name}.lock"):
        if not mark.exists():
            shutil.rmtree(folder, ignore_errors=True)  # left by a build that failed
            folder.mkdir()
            build(folder)
            mark.touch()
    return folder
