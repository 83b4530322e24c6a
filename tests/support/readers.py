"""What a reader of the documentation has on the disk, by the names that its commands use, and small."""

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import nibabel
import numpy as np
import pytest

from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab
from support.nsd import build_nsd

ROOT = Path(__file__).resolve().parents[2]
SHAPE = (3, 4, 2)  # voxels, half of which are in the mask: as many as the lab has vertices


def write_files(folder: Path, lab: Lab) -> None:
    """Files of a lab: photographs, tables, and responses in several formats. Of every trial there are two."""
    names, test = [f"photos/{name}" for name in lab.names[:N_IMAGES]], lab.names[N_IMAGES:]
    for start, group in (("photos", lab.names[:N_IMAGES]), ("other_photos", test)):
        (folder / start).mkdir()
        for name in group:
            shutil.copy(lab.photos / name, folder / start / name)
    here = Lab(folder, lab.signal)
    trials = lab.responses(repeats=2).reshape(N_IMAGES, 2, N_VERTICES).swapaxes(0, 1)  # day, image, vertex
    for name in ("responses", "left", "right", "monkey2"):
        here.save(f"{name}.npy", trials.mean(0))
    for day, responses in enumerate(trials, 1):
        here.save(f"day{day}.npy", responses)
        shown, parts = names + [f"other_photos/{name}" for name in test], ["train"] * N_IMAGES + ["test"] * N_TEST
        here.table(f"day{day}.csv", picture=shown, part=parts)
        _save_volumes(folder / f"run{day}.nii.gz", responses)
    here.table("trials.csv", image=names * 2, run=[1] * N_IMAGES + [2] * N_IMAGES)
    with h5py.File(folder / "betas.h5", "w") as file:
        file["betas"] = trials.reshape(-1, N_VERTICES)
    _save_volumes(folder / "betas.nii.gz", trials.reshape(-1, N_VERTICES))
    mask = np.arange(np.prod(SHAPE)) % 2
    _save_nifti(folder / "visual.nii.gz", mask)
    _save_nifti(folder / "rois.nii.gz", mask * (1 + np.arange(len(mask)) // 8))
    here.table("rois.csv", V1=np.arange(N_VERTICES) < 5, V4=np.arange(N_VERTICES) >= 5)
    here.save("captions.npy", np.concatenate([lab.signal, np.zeros((90, N_VERTICES))]).astype(np.float32))
    here.table("ids.csv", image=[*lab.names, *range(90)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("support.nsd.SUBJECT", 1)
        build_nsd(folder / "NSD")
    shutil.copytree(ROOT / "recipes", folder / "recipes")


def _save_volumes(path: Path, rows: np.ndarray) -> None:
    volumes = np.zeros((np.prod(SHAPE), len(rows)), dtype=np.float32)
    volumes[1::2] = rows.T
    nibabel.save(nibabel.Nifti1Image(volumes.reshape(*SHAPE, -1), np.eye(4)), path)


def _save_nifti(path: Path, values: np.ndarray) -> None:
    nibabel.save(nibabel.Nifti1Image(values.reshape(SHAPE).astype(np.int16), np.eye(4)), path)


def write_challenge(folder: Path, tiny: Path) -> None:
    """The tree of the challenge, and another that is the same."""
    for place in ("data/challenge", "other"):
        (folder / place).parent.mkdir(parents=True, exist_ok=True)
        (folder / place).symlink_to(tiny, target_is_directory=True)


def write_work(folder: Path, run: Callable[..., Any], data: Path) -> None:
    """A work folder with layers of a network and models of them, and another that is the same."""
    where = ("--data", str(data), "--work", str(folder / "work"))
    network = ("--backbone", "tf_efficientnet_lite0", "--weights", "packaged", "--size", "112")
    run("extract", *network, "--layers", "pooled,blocks.2,blocks.4", *where)
    for options in (("mnnpc",), ("smooth_l1", "--layers", "pooled", "--epochs", "1"), ("mse", "--layers", "blocks.4")):
        run("fit-heads", *where, "--loss", *options)
    run("blend", *where, "--method", "uniform")
    shutil.copytree(folder / "work", folder / "other-work")


def names_of(lab: Lab) -> dict[str, Any]:
    """What blocks of Python name and do not make."""
    folder = Path.cwd()
    rng = np.random.default_rng(0)
    y = lab.responses(repeats=2)
    return {
        "images": folder / "photos",
        "paths": [folder / "photos" / name for name in lab.names[:N_IMAGES] for _ in range(2)],
        "y": y,
        "mask": np.arange(N_VERTICES) < 5,
        "masks": {"V1": np.arange(N_VERTICES) < 5},
        "run": np.tile([1, 2], N_IMAGES),
        "runs": np.tile([1, 2], N_IMAGES),
        "x": rng.normal(size=(len(y), 1000)).astype(np.float32),
        "x_new": rng.normal(size=(9, 1000)).astype(np.float32),
        "y_new": rng.normal(size=(9, N_VERTICES)).astype(np.float32),
        "pictures": np.arange(len(y)) // 2,
        "features": rng.normal(size=(50, 8)).astype(np.float32),
        "responses": rng.normal(size=(50, 5)).astype(np.float32),
        "new_features": rng.normal(size=(20, 8)).astype(np.float32),
        "new_responses": rng.normal(size=(20, 5)).astype(np.float32),
        "noise_ceiling": np.full(5, 0.5, dtype=np.float32),
    }
