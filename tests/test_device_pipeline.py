"""Every stage runs on a pretended CUDA device and gives the CPU's numbers."""

import shutil
from pathlib import Path

import numpy as np
import pytest
import zarr
from safetensors.numpy import load_file

import cli
from featcache.cache.store import list_stores
from featcache.workdir import Workdir
from support.commands import SMALL, run
from support.pretended_device import pretended_cuda
from support.shared import build_once

LAYERS = ["--layers", "pooled,layer4", "--grid", "2"]
TRAINING = [
    "--subject",
    "1",
    "--folds",
    "2",
    "--fold",
    "0",
    "--epochs",
    "1",
    "--batch-size",
    "8",
    "--workers",
    "1",
    "--stop",
    "never",
]
SHORT = ["--epochs", "2", "--batch-size", "8"]
HEADS = {
    "ridge": ["--layers", "pooled", "--loss", "mse"],
    "layered": ["--loss", "mse"],
    "gradient": ["--layers", "pooled", "--loss", "smooth_l1", *SHORT],
    "rois": ["--layers", "pooled", "--head", "roi", "--loss", "mse", *SHORT],
    "spatial": ["--head", "spatial", "--rank", "1", *SHORT],
    "shared space": ["--head", "spatial", "--rank", "1", "--space", "3", *SHORT],
    "core": ["--head", "core", "--members", "2", "--hidden", "8", "--channels", "4", "--folds", "2", *SHORT],
}
# Kernels on the CPU do the same work, but blocks, fused steps and copies differ, and penalties are chosen by a minimum.
CLOSE = {"rtol": 1e-4, "atol": 1e-4}


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)


def command(name: str, tiny: Path, work: Path, *arguments: str) -> tuple[str, ...]:
    return (name, "--data", str(tiny), "--work", str(work), *arguments)


@pytest.fixture(scope="module")
def extracted(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A work folder with features of a frozen backbone, extracted on the CPU."""

    def extract(folder: Path) -> None:
        settings = ["--backbone", "test_resnet", "--weights", "none", "--size", "48", "--device", "cpu"]
        assert cli.run([*command("extract", tiny, folder / "work", *LAYERS, "--subject", "1"), *settings]) == 0

    return build_once(tmp_path_factory, "extracted", extract) / "work"


def rows_of(folder: Path) -> dict[str, np.ndarray]:
    """{array: all rows} of every store of a folder, by the order of their labels."""
    stores = list_stores(folder)
    return {f"{number}.{name}": store.read(name) for number, store in enumerate(stores) for name in store.arrays}


def assert_same(found: dict[str, np.ndarray], expected: dict[str, np.ndarray], **tolerance: float) -> None:
    assert found.keys() == expected.keys() and found
    for name, values in expected.items():
        np.testing.assert_allclose(found[name], values, err_msg=name, **tolerance)


def test_features_are_the_cpus(tiny, extracted, tmp_path, capfd):
    words = [*LAYERS, "--subject", "1", "--device", "cuda", "--dtype", "float32"]  # on CUDA the default is bfloat16
    with pretended_cuda() as device:
        run(capfd, *command("extract", tiny, tmp_path, *words))
    assert_same(rows_of(Workdir(tmp_path).features), rows_of(Workdir(extracted).features), rtol=2e-3, atol=2e-3)
    assert device.peak > 0


@pytest.mark.parametrize("heads", HEADS)
def test_heads_are_the_cpus(tiny, extracted, tmp_path, capfd, monkeypatch, heads):
    for module in ("heads.solvers.core", "heads.fit.names"):  # on CUDA a core takes bfloat16
        monkeypatch.setattr(f"{module}.resolve_dtype", lambda *_: "float32")
    both = {}
    for device in ("cpu", "cuda"):
        work = shutil.copytree(extracted, tmp_path / device)
        if device == "cuda":
            with pretended_cuda() as pretended:
                run(capfd, *command("fit-heads", tiny, work, *HEADS[heads], "--device", device))
            assert pretended.peak > 0
        else:
            run(capfd, *command("fit-heads", tiny, work, *HEADS[heads], "--device", device))
        weights = [load_file(path) for path in sorted(Workdir(work).heads.glob("*.safetensors"))]
        both[device] = rows_of(Workdir(work).predictions) | {k: v for part in weights for k, v in part.items()}
    assert_same(both["cuda"], both["cpu"], **CLOSE)


def test_both_stages_of_training_and_their_heads_are_the_cpus(tiny, tmp_path, capfd):
    both = {}
    for device in ("cpu", "cuda"):
        work = tmp_path / device
        steps = [
            command("pretrain", tiny, work, *TRAINING, "--precision", "float32"),
            command("finetune", tiny, work, *TRAINING, "--precision", "float32"),
            command("extract", tiny, work, "--subject", "1", "--layers", "pooled", "--dtype", "float32"),
            command("fit-heads", tiny, work, "--solver", "trained"),
            command("fit-heads", tiny, work, "--loss", "mse"),
        ]
        for step in steps:
            if device == "cuda":
                with pretended_cuda():
                    run(capfd, *step, "--device", device)
            else:
                run(capfd, *step, "--device", device)
        both[device] = rows_of(Workdir(work).features) | {
            f"prediction {name}": rows for name, rows in rows_of(Workdir(work).predictions).items()
        }
    assert_same(both["cuda"], both["cpu"], rtol=1e-3, atol=1e-3)


def test_predictions_of_new_images_are_the_cpus(tiny, extracted, tmp_path, capfd):
    work = shutil.copytree(extracted, tmp_path / "work")
    run(capfd, *command("fit-heads", tiny, work, "--layers", "pooled", "--loss", "mse", "--device", "cpu"))
    run(capfd, *command("blend", tiny, work, "--subject", "1"))
    images = next(tiny.rglob("test_images"))
    both = {}
    for device in ("cpu", "cuda"):
        out = tmp_path / f"{device}.zarr"
        words = ["predict", str(images), "--data", str(tiny), "--work", str(work), "--out", str(out)]
        if device == "cuda":
            with pretended_cuda() as counted:
                run(capfd, *words, "--device", device)
            pixels = counted.copies_in("featcache/machine/device.py", "to device")
            assert pixels and all(copy.pinned and not copy.blocking for copy in pixels)
        else:
            run(capfd, *words, "--device", device)
        group = zarr.open_group(out, mode="r")
        both[device] = {
            name: np.asarray(array) for name, array in group.members(max_depth=None) if hasattr(array, "shape")
        }
    numbers = {name: values for name, values in both["cpu"].items() if values.dtype.kind == "f"}
    assert_same({name: both["cuda"][name] for name in numbers}, numbers, **CLOSE)
