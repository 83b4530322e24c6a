"""The Natural Scenes Dataset in its published folders, formats and axes, but small, and with a planted model."""

import warnings
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import nibabel
import numpy as np
from scipy import io

N_PICTURES, SIDE = 90, 24  # pictures of all subjects, and their pixels
N_IMAGES, N_SHARED = 40, 10  # of each subject, and those of them that all subjects see
N_SESSIONS, N_TRIALS, N_PLANNED = 3, 30, 4  # sessions that were released, trials of each, sessions in the design
SHAPE = (12, 10, 8)  # voxels along x, y and z
AFFINE = np.array([[1.8, 0, 0, -9.9], [0, 1.8, 0, -8.1], [0, 0, 1.8, -6.3], [0, 0, 0, 1]])
N_VERTICES = {"lh": 50, "rh": 45}
VERSION = "betas_fithrf_GLMdenoise_RR"
SUBJECT = 3  # of eight: not the first row of the design


@dataclass(frozen=True)
class Nsd:
    """A copy of the release.

    ids : (90,) picture of each trial of the released sessions, counted from 0
    shared : pictures that all subjects see, counted from 0
    volumes : (90, 12, 10, 8) int16, 300ths of percent: voxel x, y, z of each trial
    vertices : {'lh', 'rh': (90, n_vertices) float32}, percent
    labels : {'lh', 'rh': {atlas: (12, 10, 8)}}: -1 outside of the hemisphere
    ncsnr : (12, 10, 8)
    """

    root: Path
    ids: np.ndarray
    shared: np.ndarray
    volumes: np.ndarray
    vertices: dict[str, np.ndarray]
    ncsnr: np.ndarray
    labels: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)

    @property
    def session(self) -> np.ndarray:
        """(90,) session of each trial, from 1."""
        return np.repeat(np.arange(1, N_SESSIONS + 1), N_TRIALS)

    def betas(self, space: str = "func1pt8mm") -> Path:
        return self.root / f"nsddata_betas/ppdata/subj{SUBJECT:02d}" / space / VERSION

    @property
    def roi(self) -> Path:
        return self.root / f"nsddata/ppdata/subj{SUBJECT:02d}/func1pt8mm/roi"

    @property
    def label(self) -> Path:
        return self.root / "nsddata/freesurfer/fsaverage/label"

    def write_sessions(self, ending: str) -> None:
        """Volumes of each session, as .hdf5 or .nii.gz."""
        for number in range(1, N_SESSIONS + 1):
            save_volumes(self.betas() / f"betas_session{number:02d}{ending}", self.volumes[self.session == number])


def save_volumes(path: Path, volumes: np.ndarray) -> None:
    """(n_trials, x, y, z) int16, as MATLAB leaves them in either format."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".hdf5":
        with h5py.File(path, "w") as file:
            chunks = (len(volumes), 1, 1, 1)
            file.create_dataset("betas", data=volumes.transpose(0, 3, 2, 1), chunks=chunks)
    else:
        save_nifti(path, volumes.transpose(1, 2, 3, 0))


def save_nifti(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    nibabel.save(nibabel.Nifti1Image(values, AFFINE), path)


def save_surface(path: Path, values: np.ndarray) -> None:
    """(n_vertices,) or (n_vertices, n_trials)."""
    path.parent.mkdir(parents=True, exist_ok=True)
    values = values.reshape(len(values), 1, 1, -1) if values.ndim > 1 else values.reshape(-1, 1, 1)
    nibabel.save(nibabel.MGHImage(values.astype(np.float32), np.eye(4)), path)


def load_surface(path: Path) -> np.ndarray:
    """(n_vertices,) or (n_vertices, n_trials)."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ResourceWarning)  # nibabel leaves it to Python to close an .mgh file
        return nibabel.load(path).get_fdata().squeeze()


def build_nsd(root: Path, seed: int = 0) -> Nsd:
    """A release whose responses are a linear map of the mean colour of what was shown, and noise."""
    rng = np.random.default_rng(seed)
    colours = rng.uniform(40, 210, size=(N_PICTURES, 3))
    _write_pictures(root, colours, rng)
    ids, shared = _write_design(root, rng)
    causes = (colours - colours.mean(0)) / colours.std(0)
    nsd = Nsd(
        root,
        ids,
        shared,
        volumes=np.round(300 * _responses(causes[ids], np.prod(SHAPE), rng)).astype(np.int16).reshape(-1, *SHAPE),
        vertices={hemi: _responses(causes[ids], n, rng).astype(np.float32) for hemi, n in N_VERTICES.items()},
        ncsnr=rng.uniform(0.1, 2, size=SHAPE).astype(np.float32),
    )
    nsd.write_sessions(".hdf5")
    save_nifti(nsd.betas() / "ncsnr.nii.gz", nsd.ncsnr)
    _write_labels(nsd, rng)
    _write_surfaces(nsd, rng)
    return nsd


def _responses(causes: np.ndarray, n: int, rng: np.random.Generator) -> np.ndarray:
    """(n_trials, n): signal and noise of equal variance, about a mean and with a scale that differ by session."""
    signal = causes @ rng.normal(size=(3, n)) / np.sqrt(3)
    values = signal + rng.normal(size=signal.shape)
    session = np.arange(len(causes)) // N_TRIALS
    return values * np.array([0.8, 1.0, 1.3])[session, None] + np.array([1.0, -0.5, 2.0])[session, None]


def _write_pictures(root: Path, colours: np.ndarray, rng: np.random.Generator) -> None:
    path = root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"
    path.parent.mkdir(parents=True)
    pixels = colours[:, None, None] + 20 * rng.normal(size=(N_PICTURES, SIDE, SIDE, 3))
    with h5py.File(path, "w") as file:
        file["imgBrick"] = pixels.clip(0, 255).astype(np.uint8)


def _write_design(root: Path, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Pictures of the trials that were released, and those that are shared; the file counts both from 1."""
    pictures = rng.permutation(N_PICTURES)
    shared, others = np.sort(pictures[:N_SHARED]), pictures[N_SHARED:]
    own = N_IMAGES - N_SHARED
    images = np.stack([np.append(shared, rng.permutation(others)[:own]) for _ in range(8)])
    order = rng.permutation(np.repeat(np.arange(N_IMAGES), N_PLANNED * N_TRIALS // N_IMAGES))
    folder = root / "nsddata/experiments/nsd"
    folder.mkdir(parents=True)
    arrays = {
        "masterordering": order[None].astype(np.float64) + 1,
        "subjectim": images.astype(np.float64) + 1,
        "sharedix": shared[None].astype(np.float64) + 1,
    }
    io.savemat(folder / "nsd_expdesign.mat", arrays)
    return images[SUBJECT - 1][order][: N_SESSIONS * N_TRIALS], shared


def _write_labels(nsd: Nsd, rng: np.random.Generator) -> None:
    """A band of cortex in each hemisphere, in which some voxels have labels."""
    x, y, z = np.indices(SHAPE)
    cortex = (y + z) % 3 == 0
    for hemisphere, side in (("lh", x < 5), ("rh", x >= 5)):
        here = cortex & side
        general = np.where(here & (y > 4) & (rng.random(SHAPE) < 0.8), 1, 0)
        areas = np.where(general & (rng.random(SHAPE) < 0.5), rng.integers(1, 3, SHAPE), 0)
        faces = np.where(here, rng.integers(0, 3, SHAPE), 0)
        atlases = {"nsdgeneral": general, "prf-visualrois": areas, "floc-faces": faces, "Kastner2015": areas}
        nsd.labels[hemisphere] = {name: np.where(here, values, -1) for name, values in atlases.items()}
        for name, values in nsd.labels[hemisphere].items():
            save_nifti(nsd.roi / f"{hemisphere}.{name}.nii.gz", values.astype(np.float32))
    save_nifti(nsd.roi.parent / "brainmask.nii.gz", (z > 0).astype(np.int16))
    names = nsd.root / f"nsddata/freesurfer/subj{SUBJECT:02d}/label"
    names.mkdir(parents=True)
    (names / "prf-visualrois.mgz.ctab").write_text("0 Unknown\n1 V1v\n2 V1d\n3 V2v\n")
    (names / "Kastner2015.mgz.ctab").write_text("0 Unknown 0 0 0 0\n1 V1v 255 0 0 0\n2 V1d 0 255 0 0\n")


def _write_surfaces(nsd: Nsd, rng: np.random.Generator) -> None:
    for hemisphere, values in nsd.vertices.items():
        for number in range(1, N_SESSIONS + 1):
            path = nsd.betas("fsaverage") / f"{hemisphere}.betas_session{number:02d}.mgh"
            save_surface(path, values[nsd.session == number].T.copy())
        general = (rng.random(values.shape[1]) < 0.6).astype(np.float32)
        save_surface(nsd.label / f"{hemisphere}.nsdgeneral.mgz", general)
        save_surface(nsd.label / f"{hemisphere}.streams.mgz", general * rng.integers(0, 3, len(general)))
        save_surface(nsd.betas("fsaverage") / f"{hemisphere}.ncsnr.mgh", rng.uniform(0, 2, len(general)).astype("f4"))
    (nsd.label / "streams.mgz.ctab").write_text("0 Unknown\n1 early\n2 midventral\n")
