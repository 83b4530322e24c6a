"""What an installation holds: two names at the top, whose modules are the same, and in nobody's way."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("featcache", "heads", "cli.py", "setup.py", "pyproject.toml", "README.md", "LICENSE")

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder that the wheel is installed into, built from a copy of the sources."""
    pytest.importorskip("setuptools", minversion="77")
    sources, target = tmp_path_factory.mktemp("sources"), tmp_path_factory.mktemp("installed")
    for name in SOURCES:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, sources / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, sources)
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    done = subprocess.run([*pip, "--target", str(target), str(sources)], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


@pytest.fixture
def python(installed: Path, tmp_path: Path):
    """Run code in a folder of its own, where only the installation is to be found."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        environment = os.environ | {"PYTHONPATH": str(installed)}
        command = [sys.executable, "-W", "error", "-c", code]
        return subprocess.run(command, env=environment, capture_output=True, text=True, cwd=tmp_path)

    return run


def test_there_are_two_names_at_the_top(installed):
    names = {path.name for path in installed.iterdir() if not path.name.endswith(".dist-info")}
    assert names - {"bin", "Scripts", "__pycache__"} == {"featcache", "heads"}
    ours = {path.relative_to(ROOT / "heads") for path in (ROOT / "heads").rglob("*.py")}
    assert {
        path.relative_to(installed / "featcache/heads") for path in (installed / "featcache/heads").rglob("*.py")
    } == ours


SAME = """
import featcache as fc, heads.fit.run, featcache.heads.fit.run
assert fc.RidgeHead.__module__ == "featcache.heads.solvers.estimator"
assert heads.fit.run is featcache.heads.fit.run and heads.fit.run.__spec__.name == "featcache.heads.fit.run"
assert all(getattr(fc, name) is not None for name in fc.__all__)
"""


@pytest.mark.parametrize(
    "code", [SAME, "from heads.config import FitConfig; import featcache as fc; assert FitConfig is fc.FitConfig"]
)
def test_both_names_mean_the_same_modules(python, code):
    done = python(code)
    assert done.returncode == 0, done.stderr


def test_modules_of_the_user_are_not_in_the_way(python, tmp_path):
    for name in ("heads.py", "cli.py"):
        (tmp_path / name).write_text("OWN = True\n")
    done = python("import featcache as fc; assert fc.FitConfig; import cli; assert cli.OWN")
    assert done.returncode == 0, done.stderr
    done = python("import heads; assert heads.OWN; import featcache as fc; fc.FitConfig")
    assert "ImportError: heads: expected the name of featcache.heads; found another module" in done.stderr


def test_the_command_is_installed(installed, tmp_path):
    script = next(
        path for path in (installed / "bin" / "featcache", installed / "Scripts" / "featcache.exe") if path.exists()
    )
    environment = os.environ | {"PYTHONPATH": str(installed)}
    done = subprocess.run([script, "--version"], env=environment, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and done.stdout.startswith("featcache ")
