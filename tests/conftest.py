"""A planted tree, small enough to be made anew for every run of the tests."""

import gc
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

import cli
from featcache.simulate import SimulateConfig, simulate
from heads.blend.plot import plot_weights
from heads.solvers.layers import priors
from support.lab import Lab, build_lab
from support.shared import build_once

if TYPE_CHECKING:
    from support.pretended_device import PretendedDevice

TINY = SimulateConfig(
    n_subjects=2,
    n_train=(30, 24),
    n_test=(5, 6),
    n_shared=8,
    n_vertices=(40, 44),
    image_size=32,
    n_reference=50,
    workers=1,
)
CENTRES = priors.CENTRES  # before tests have fewer of them
V4 = Path(__file__).resolve().parents[2] / "shared" / "real" / "v4"

# Tests run side by side, a worker a core, and more threads than that are slower. What the tests start inherits it.
torch.set_num_threads(1)
os.environ.setdefault("OMP_NUM_THREADS", "1")
for name in [name for name in os.environ if name.startswith("FEATCACHE_")]:
    del os.environ[name]  # a developer's defaults are not the tests'


# Tests that read a tree from the disk, or what was made of it, are slow.
FILES = frozenset({"tiny", "tree", "v4", "installed", "suite"})


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark as slow what does more than compute."""
    for item in items:
        if FILES.intersection(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.slow)


def pytest_collection_finish() -> None:
    """Training collects garbage after every fold, which is slow where it looks through all that was imported."""
    gc.collect()
    gc.freeze()


@pytest.fixture
def pretended_cuda() -> "Iterator[PretendedDevice]":
    """A CUDA device that is none, for a whole test; `support.pretended_device.pretended_cuda` is for a part of one."""
    from support import pretended_device  # slow to import

    with pretended_device.pretended_cuda() as device:
        yield device


NETWORK = ("--backbone", "test_resnet", "--weights", "none", "--size", "48")
TRAINING = ("--folds", "2", "--epochs", "1", "--batch-size", "8", "--workers", "1", "--stop", "never")


@pytest.fixture(scope="session", autouse=True)
def plain_processor() -> Iterator[None]:
    """`extract --dtype auto` is float32: tests say the same on every processor, and ask for bfloat16 by name.

    For the whole session, so that it also holds while fixtures of a session or of a module are made.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("featcache.machine.device._cpu_flags", lambda: set())
        yield


@pytest.fixture(autouse=True)
def few_shuffles(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blends of shuffled responses take ten times as long as the blend; tests of them ask for all ten."""
    monkeypatch.setattr("heads.blend.uncertainty.N_PERMUTATIONS", 1)


@pytest.fixture(scope="session", autouse=True)
def no_pictures() -> Iterator[None]:
    """Blends draw no picture of their weights, which takes as long as the blend; tests of it ask for `pictures`."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("heads.blend.run.plot_weights", lambda *_: None)
        yield


@pytest.fixture
def pictures(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blends draw, as they do outside tests."""
    monkeypatch.setattr("heads.blend.run.plot_weights", plot_weights)


@pytest.fixture(scope="session", autouse=True)
def few_windows() -> Iterator[None]:
    """Priors over layers have 4 windows and not 25; tests that look at windows ask for `every_window`.

    For the whole session, because fixtures of a session fit heads too.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(priors, "CENTRES", (0.3, 0.7))
        yield


@pytest.fixture
def every_window(monkeypatch: pytest.MonkeyPatch) -> None:
    """The windows that are fitted under outside tests."""
    monkeypatch.setattr(priors, "CENTRES", CENTRES)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two subjects of a simulated tree, for reading."""
    return build_once(tmp_path_factory, "tiny", lambda folder: simulate(TINY, folder / "challenge")) / "challenge"


@pytest.fixture(scope="session")
def lab(tmp_path_factory: pytest.TempPathFactory) -> Lab:
    """Photographs of a lab, for reading; what a test adds is in its own folder."""
    return build_lab(tmp_path_factory.mktemp("lab"))


@pytest.fixture
def tree(tiny: Path, tmp_path: Path) -> Path:
    """A copy of it, for damaging."""
    return Path(shutil.copytree(tiny, tmp_path / "challenge"))


@pytest.fixture(scope="session")
def fitted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of two backbones: each of three layers and all together, and the pooled vector of the other."""

    def build(work: Path) -> None:
        where = ("--data", str(tiny), "--work", str(work), "--weights", "none")
        commands = [
            ("extract", *where, "--size", "48", "--backbone", "test_resnet", "--layers", "pooled,layer2,layer4"),
            ("fit-heads", *where[:4], "--layers", "each"),
            ("fit-heads", *where[:4]),
            ("extract", *where, "--size", "32", "--backbone", "test_vit", "--layers", "pooled"),
            ("fit-heads", *where[:4]),
        ]
        for command in commands:
            assert cli.run(list(command)) == 0

    return build_once(tmp_path_factory, "fitted", build)


@pytest.fixture
def filled(fitted: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which bare commands find."""
    copy = Path(shutil.copytree(fitted, tmp_path / "work"))
    monkeypatch.setenv("FEATCACHE_DATA", str(tiny))
    monkeypatch.setenv("FEATCACHE_WORK", str(copy))
    return copy


@pytest.fixture(scope="session")
def every_kind(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Models of every kind for two subjects, and their blend: frozen, stage 1 and stage 2; linear, spatial and core."""

    def build(work: Path) -> None:
        where = ("--data", str(tiny), "--work", str(work))
        quick = ("--epochs", "2", "--batch-size", "8")
        commands = [
            ("extract", *where, *NETWORK, "--layers", "pooled,layer2,layer4", "--checkpoint", "none"),
            ("fit-heads", *where, "--folds", "3"),
            ("fit-heads", *where, "--folds", "3", "--layers", "pooled"),
            ("fit-heads", *where, "--folds", "3", "--layers", "pooled", "--loss", "smooth_l1", "--head", "roi", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "spatial", "--loss", "pearson", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "spatial", "--space", "4", "--loss", "mse", *quick),
            ("fit-heads", *where, "--folds", "3", "--head", "core", "--hidden", "8", "--channels", "4", *quick),
            ("extract", *where, "--backbone", "test_vit", "--weights", "none", "--size", "32", "--layers", "pooled"),
            ("fit-heads", *where, "--folds", "3", "--features", "test_vit*"),
            ("pretrain", *where, *NETWORK, *TRAINING, "--embedding", "4"),
            ("finetune", *where, *NETWORK, *TRAINING),
            ("extract", *where, "--backbone", "test_resnet", "--layers", "pooled,layer4"),
            ("fit-heads", *where, "--features", "*pretrain*,*finetune*"),
            ("fit-heads", *where, "--features", "*pretrain*,*finetune*", "--solver", "trained"),
            ("blend", *where, "--method", "uniform"),
        ]
        for command in commands:
            assert cli.run([*command, "--quiet"]) == 0, command

    return build_once(tmp_path_factory, "every_kind", build)


@pytest.fixture
def work(every_kind: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of it, which bare commands find."""
    copy = Path(shutil.copytree(every_kind, tmp_path / "work"))
    monkeypatch.setenv("FEATCACHE_DATA", str(tiny))
    monkeypatch.setenv("FEATCACHE_WORK", str(copy))
    return copy


@pytest.fixture(scope="session")
def exported(every_kind: Path, tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The blend of it as a folder to hand on, for reading."""

    def build(folder: Path) -> None:
        where = ("--data", str(tiny), "--work", str(every_kind))
        assert cli.run(["export", str(folder / "encoder"), *where, "--quiet"]) == 0

    return build_once(tmp_path_factory, "exported", build) / "encoder"


@pytest.fixture
def said(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Every line that a stage says while it runs."""
    lines: list[str] = []
    record: Callable[[str], None] = lines.append
    speakers = (
        "featcache.cache.extract",
        "featcache.cache.pixels",
        "featcache.cache.sources",
        "featcache.backbone.checkpoint",
        "featcache.machine.device_memory",
        "featcache.backbone.network",
        "heads.backbones.stages",
        "heads.features.sets",
    )
    for module in (
        *speakers,
        "heads.backbones.loop",
        "heads.solvers.memory",
        "heads.solvers.layers.ridge",
        "heads.fit.known_fits",
        "heads.fit.run",
        "heads.fit.stored",
        "heads.blend.run",
        "heads.blend.plot",
        "heads.maps.export",
        "featcache.machine.progress",
    ):
        monkeypatch.setattr(f"{module}.say", record)
    return lines


@pytest.fixture(scope="session")
def v4() -> Path:
    """Real recordings in the challenge's layout, which are not part of this project."""
    if not V4.is_dir():
        pytest.skip(f"no real recordings: {V4} is not on this machine")
    return V4
