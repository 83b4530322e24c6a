"""The Natural Scenes Dataset, in the folders in which it is published -> material.

Source: Allen et al. 2022, https://doi.org/10.1038/s41593-021-00962-x, and the data manual of the dataset. Files have
the names that they have in its bucket, natural-scenes-dataset:

    nsddata/experiments/nsd/nsd_expdesign.mat                    which image was shown in which trial
    nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5                 all 73,000 images, which are read in place
    nsddata_betas/ppdata/subj01/SPACE/VERSION/betas_session01.hdf5      responses, one file a session; see `_RESPONSES`
    nsddata_betas/ppdata/subj01/SPACE/VERSION/ncsnr.nii.gz
    nsddata/ppdata/subj01/SPACE/roi/nsdgeneral.nii.gz            ROIs of a space of voxels, with lh. and rh. before them
    nsddata/freesurfer/fsaverage/label/lh.nsdgeneral.mgz         ROIs of fsaverage; those of nativesurface: of subj01
    nsddata/freesurfer/subj01/label/streams.mgz.ctab             names of the labels of ROIs

An ROI file has -1 outside of the cortex of its hemisphere, 0 in the rest of it, and labels from 1 on. Numbers of images
and labels of trials count from 1 in the files, and from 0 here, as in the names of the challenge's images.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from featcache.dataset.images import picture_count
from featcache.dataset.importing.config import DEFAULT_SURFACE, ImportConfig
from featcache.dataset.importing.material import Material, Recording, Stimuli
from featcache.dataset.importing.responses import by_surface
from featcache.dataset.importing.rois import read_rois
from featcache.dataset.rois import CLASSES, FSAVERAGE_VERTICES, HEMISPHERES
from featcache.dataset.subject import ArrayImage, listed
from featcache.errors import ConfigError, DataError
from featcache.formats.arrays import open_array
from featcache.formats.files import regular_file
from featcache.formats.lazy import Array, Joined, Place, numbers
from featcache.formats.places import at_places
from featcache.formats.volumes import read_labels, read_volumes

_BUCKET = "natural-scenes-dataset"
_MASK = "nsdgeneral"  # the visual cortex that responds to the experiment: what the challenge and most papers use
_SURFACE_SPACES = ("fsaverage", "nativesurface")
_PICTURES = "imgBrick"  # array of nsd_stimuli.hdf5
# Endings of files of responses, the first that is there is read, and by what their values are divided to be percent of
# signal change. Integers are 300ths. HDF5 comes first: it has one chunk for each voxel, so that few bytes are read.
_RESPONSES = {".hdf5": 300, ".nii.gz": 300, ".mgh": 1}
_LABEL = re.compile("[0-9]{1,9}")
_SESSION = re.compile(r"(?:(lh|rh)\.)?betas_session(\d+)(\.hdf5|\.nii\.gz|\.mgh)")


@dataclass(frozen=True)
class _Release:
    """Where the files of one subject are.

    space, version : such as func1pt8mm and betas_fithrf_GLMdenoise_RR
    """

    root: Path
    subject: str
    space: str
    version: str

    @property
    def design(self) -> Path:
        return self.root / "nsddata/experiments/nsd/nsd_expdesign.mat"

    @property
    def pictures(self) -> Path:
        return self.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5"

    @property
    def betas(self) -> Path:
        return self.root / "nsddata_betas/ppdata" / self.subject / self.space / self.version

    @property
    def on_surface(self) -> bool:
        """Whether responses are of vertices, and not of voxels."""
        return self.space in _SURFACE_SPACES

    @property
    def labels(self) -> Path:
        """Folder of the ROIs."""
        if self.on_surface:
            return (
                self.root
                / "nsddata/freesurfer"
                / (self.subject if self.space == "nativesurface" else self.space)
                / "label"
            )
        return self.root / "nsddata/ppdata" / self.subject / self.space / "roi"

    def roi(self, name: str, surface: str) -> Path:
        """File of some ROIs: of one hemisphere, or of both where the surface is none."""
        return self.labels / f"{_prefix(surface)}{name}{'.mgz' if self.on_surface else '.nii.gz'}"

    def names(self, roi: str) -> list[Path]:
        """Files that may have the names of the labels of ROIs."""
        freesurfer = self.root / "nsddata/freesurfer"
        return [
            freesurfer / self.subject / "label" / f"{roi}.mgz.ctab",
            freesurfer / "fsaverage/label" / f"{roi}.mgz.ctab",
            self.root / "nsddata/templates" / f"{roi}.ctab",
        ]

    def ncsnr(self, surface: str) -> Path:
        return self.betas / (f"{_prefix(surface)}ncsnr.mgh" if self.on_surface else "ncsnr.nii.gz")

    @property
    def brain(self) -> Path:
        return self.root / "nsddata/ppdata" / self.subject / self.space / "brainmask.nii.gz"

    def missing(self, path: Path) -> DataError:
        """What to raise for a file of the release that is not there."""
        return DataError(
            path,
            expected="a file of the Natural Scenes Dataset",
            found="none",
            remedy=f"copy it from {self.key(path)} of its bucket {_BUCKET}",
        )

    @contextmanager
    def copied(self, path: Path) -> Iterator[Path]:
        """Read a file of the release: where it is missing or broken, the error says where it comes from."""
        if not path.exists():
            raise self.missing(path)
        try:
            yield regular_file(path)
        except DataError as error:
            remedy = f"copy {self.key(path)} of the bucket {_BUCKET} again"
            raise DataError(error.where, expected=error.expected, found=error.found, remedy=remedy) from error

    def key(self, path: Path) -> str:
        """Name of a file or folder in the bucket."""
        return path.relative_to(self.root).as_posix()


def _prefix(surface: str) -> str:
    return f"{surface}." if surface in HEMISPHERES else ""


@dataclass(frozen=True, eq=False)
class _Inside:
    """The places of one surface that are read.

    mask : bool, in the shape of one volume, (x, y, z); (n_vertices, 1, 1) of a surface
    path : of a file in the same space
    """

    mask: np.ndarray
    path: Path

    @property
    def places(self) -> tuple[np.ndarray, ...]:
        """Where the places are along x, y and z."""
        return tuple(np.nonzero(self.mask))


def nsd_material(config: ImportConfig) -> Material:
    """One subject of the Natural Scenes Dataset; responses are mapped, not read.

    Places inside nsdgeneral are read, of the hemispheres 'lh' and 'rh', unless `config.mask` names others. All sessions
    whose files are there are used.

    Raises DataError for files that are missing or not as published, ConfigError for options that name nothing.
    """
    release = _release(config)
    sessions = _sessions(release)
    inside = _masks(config, release, sessions)
    parts, inside, notes = _parts(release, sessions, inside)
    n_trials = _trials_per_session(parts)
    ids, test = _shown(config, release, list(sessions), n_trials)
    recordings = {}
    for surface, of_surface in parts.items():
        recordings[surface], more = _recording(config, release, surface, of_surface, inside)
        notes += more
    return Material(
        name=config.subject_name,
        stimuli=Stimuli(
            sources=tuple(ArrayImage(release.pictures, _PICTURES, int(image)) for image in np.unique(ids)),
            ids=np.unique(ids),
            test=test,
        ),
        shown=np.unique(ids, return_inverse=True)[1].reshape(-1),
        session=np.repeat(list(sessions), n_trials),
        recordings=recordings,
        notes=tuple(dict.fromkeys([_note_on_sessions(sessions, n_trials), *notes])),
    )


def nsd_files(config: ImportConfig) -> list[Path]:
    """Files of the release that an import of a subject may read, those that there are. Raises ConfigError as above."""
    release = _release(config)
    folders = [release.betas, release.labels, *dict.fromkeys(path.parent for path in release.names(""))]
    within = [path for folder in folders if folder.is_dir() for path in sorted(folder.iterdir())]
    return [path for path in [release.design, release.pictures, release.brain, *within] if path.is_file()]


def _release(config: ImportConfig) -> _Release:
    assert config.nsd is not None
    space, slash, version = config.betas.strip("/").partition("/")
    if not slash or "/" in version:
        raise ConfigError(
            "--betas",
            expected="SPACE/VERSION, such as fsaverage/betas_fithrf_GLMdenoise_RR",
            found=repr(config.betas),
            remedy="name the folder of the responses below nsddata_betas/ppdata/subj01",
        )
    if not re.fullmatch(r"subj0[1-8]", config.subject_name):
        raise ConfigError(
            "--subject",
            expected="1 to 8, or subj01 to subj08",
            found=repr(config.subject),
            remedy="choose one of those",
        )
    return _Release(config.nsd, config.subject_name, space, version)


_Files = Mapping[int, Mapping[str, Path]]  # {session: {'lh', 'rh', or '' for a file of both: responses}}


def _sessions(release: _Release) -> _Files:
    """Files of each session that there is, in their order. Raises DataError where there are none or one of two."""
    if not release.betas.is_dir():
        folders = sorted(path for path in release.betas.parent.parent.glob("*/*") if path.is_dir())
        there = [f"{path.parent.name}/{path.name}" for path in folders]
        raise DataError(
            release.betas,
            expected="a folder with the responses of each session",
            found=f"none; there is {listed(there)}" if there else "none",
            remedy=f"copy {release.key(release.betas)} from the bucket {_BUCKET}, or name another with --betas",
        )
    files: dict[int, dict[str, Path]] = {}
    order = list(_RESPONSES)
    named = [(path, match) for path in release.betas.iterdir() if (match := _SESSION.fullmatch(path.name))]
    for path, match in sorted(named, key=lambda each: -order.index(each[1][3])):  # so that the first ending stays
        files.setdefault(int(match[2]), {})[match[1] or ""] = path
    wanted = HEMISPHERES if release.on_surface else ("",)
    ending = ".nii.gz" if not release.on_surface else ".mgh" if release.space == "fsaverage" else ".hdf5"
    for number, of_session in (files or {1: {}}).items():
        for hemisphere in wanted:
            if hemisphere not in of_session:
                raise release.missing(release.betas / f"{_prefix(hemisphere)}betas_session{number:02d}{ending}")
    return dict(sorted(files.items()))


def _note_on_sessions(sessions: _Files, n_trials: int) -> str:
    first, last = min(sessions), max(sessions)
    whole = last - first + 1 == len(sessions)
    return f"sessions: {f'{first} to {last}' if whole else ', '.join(map(str, sessions))}, of {n_trials} trials each"


def _masks(config: ImportConfig, release: _Release, sessions: _Files) -> dict[str, _Inside]:
    """The places of each surface. Raises DataError or ConfigError for a mask that is missing or of no place."""
    names = config.mask or (_MASK,)
    if names == ("all",):
        inside = _everywhere(release, sessions)
    elif len(names) == 1 and (paths := _files_of_roi(release, names[0])):
        inside = {surface: _labelled(release, path) for surface, path in paths.items()}
    elif not config.mask:
        raise release.missing(release.roi(_MASK, "lh" if release.on_surface else DEFAULT_SURFACE))
    else:
        known = HEMISPHERES if release.on_surface else ()
        files = by_surface(names, "--mask", known)
        inside = {surface: _inside_file(release, surface, of_surface) for surface, of_surface in files.items()}
    for surface, places in inside.items():
        if not places.mask.any():
            raise DataError(
                places.path, expected="a mask", found=f"no place of {surface} inside", remedy="name another"
            )
    return inside


def _files_of_roi(release: _Release, name: str) -> dict[str, Path]:
    """{surface: file} of ROIs of the release; one for each hemisphere, or else one of both; {} where there is none."""
    if not re.fullmatch(r"[\w.-]+", name):
        return {}
    paths = {hemisphere: release.roi(name, hemisphere) for hemisphere in HEMISPHERES}
    if any(path.exists() for path in paths.values()):
        return paths
    both = release.roi(name, DEFAULT_SURFACE)
    return {DEFAULT_SURFACE: both} if both.exists() and not release.on_surface else {}


def _labelled(release: _Release, path: Path) -> _Inside:
    """Where a file of the release has a label above 0."""
    with release.copied(path):
        labels = read_labels(path)
    return _Inside((labels.values > 0).reshape(labels.shape), path)


def _inside_file(release: _Release, surface: str, files: Sequence[str]) -> _Inside:
    """Where a file that the user names is above 0."""
    if len(files) > 1:
        raise ConfigError("--mask", expected=f"one mask of {surface}", found=listed(files), remedy="leave one out")
    path = Path(files[0])
    if not path.exists():
        raise _unknown(release, f"--mask {path}", "'all', ")
    labels = read_labels(path)
    if like := next(iter(sorted(release.labels.glob(f"{_prefix(surface)}*gz"))), None):
        read_volumes([like, path])  # raises for another space
    return _Inside((labels.values > 0).reshape(labels.shape), path)


def _unknown(release: _Release, where: str, more: str = "") -> ConfigError:
    """What to raise for a name that is neither a file nor ROIs of the release."""
    names = {re.sub(r"^(lh|rh)\.|\.(nii\.gz|mgz)$", "", path.name) for path in release.labels.glob("*gz")}
    return ConfigError(
        where,
        expected=f"a file, {more}or ROIs in {release.labels}",
        found=f"none of these; there is {', '.join(sorted(names)) or 'nothing'}",
        remedy="correct the name",
    )


def _everywhere(release: _Release, sessions: _Files) -> dict[str, _Inside]:
    """All voxels of the brain, or all vertices."""
    if not release.on_surface:
        return {DEFAULT_SURFACE: _labelled(release, release.brain)}
    inside = {}
    for hemisphere, path in next(iter(sessions.values())).items():
        with release.copied(path):
            n = (
                open_array(Place(path, "betas")).shape[1]
                if path.suffix == ".hdf5"
                else read_volumes([path]).rows.shape[1]
            )
        inside[hemisphere] = _Inside(np.ones((n, 1, 1), dtype=bool), path)
    return inside


def _parts(
    release: _Release, sessions: _Files, inside: Mapping[str, _Inside]
) -> tuple[dict[str, list[Array]], dict[str, _Inside], list[str]]:
    """{surface: responses of each session}, the places that have some in every session, and sentences for the user."""
    opened: dict[Path, Array] = {}  # both hemispheres of a volume are in one file
    parts: dict[str, list[Array]] = {}
    kept, notes = dict(inside), []
    for surface, places in inside.items():
        paths = [of_session[surface if release.on_surface else ""] for of_session in sessions.values()]
        parts[surface] = [_rows(release, path, places, opened) for path in paths]
        without = _without_responses(paths, parts[surface])
        if without.all():
            raise DataError(paths[0], expected="responses", found="NaN alone", remedy="name another mask")
        if without.any():
            mask = places.mask.copy()
            mask[mask] = ~without
            kept[surface] = replace(places, mask=mask)
            parts[surface] = [_rows(release, path, kept[surface], opened) for path in paths]
            notes.append(f"{surface}: {without.sum():,} vertices without responses in a session were left out")
    return parts, kept, notes


def _without_responses(paths: Sequence[Path], parts: Sequence[Array]) -> np.ndarray:
    """Whether each place is NaN in a session, (n_places,): surfaces have NaN where no data were acquired in it.

    Integers have no NaN: voxels are 0 in such a session.
    """
    floats = [part for path, part in zip(paths, parts, strict=True) if path.suffix == ".mgh"]
    without = np.zeros(parts[0].shape[1], dtype=bool)
    for part in floats:
        without |= np.isnan(part[0:1][0])
    return without


def _rows(release: _Release, path: Path, inside: _Inside, opened: dict[Path, Array]) -> Array:
    """Responses of one session, (n_trials, n_places), in percent of signal change."""
    with release.copied(path):
        if path.suffix == ".hdf5":
            if path not in opened:
                opened[path] = open_array(Place(path, "betas"))
            rows = _inside_hdf5(opened[path], inside, release.on_surface)
        else:
            rows = read_volumes([path], inside.mask).rows
    per_percent = next(unit for ending, unit in _RESPONSES.items() if path.name.endswith(ending))
    if per_percent == 1:
        return rows

    def read(key: tuple[slice, ...]) -> np.ndarray:
        values: np.ndarray = rows[key].astype(np.float32)
        values /= per_percent
        return values

    return Array(rows.place, rows.shape, np.dtype(np.float32), read, rows.chunks)


def _inside_hdf5(array: Array, inside: _Inside, on_surface: bool) -> Array:
    """Responses inside a mask. MATLAB wrote (x, y, z, trial), which HDF5 has as (trial, z, y, x)."""
    shape, places = (inside.mask.shape[:1], inside.places[:1]) if on_surface else (inside.mask.shape, inside.places)
    numbers(array, array.place, 1 + len(shape))
    if array.shape[1:] != shape[::-1]:
        raise DataError(
            array.place,
            expected=f"trials of {' x '.join(map(str, shape[::-1]))} values, as in {inside.path}",
            found=" x ".join(map(str, array.shape[1:])),
            remedy="name a mask of this space",
        )
    return at_places(array, places[::-1])


def _trials_per_session(parts: Mapping[str, Sequence[Array]]) -> int:
    """Number of trials of each session. Raises DataError where they differ."""
    every = [part for of_surface in parts.values() for part in of_surface]
    for part in every:
        if len(part) != len(every[0]):
            raise DataError(
                part.place,
                expected=f"{len(every[0])} trials, as in {every[0].place}",
                found=len(part),
                remedy=f"copy it from the bucket {_BUCKET} again",
            )
    return len(every[0])


def _shown(
    config: ImportConfig, release: _Release, sessions: Sequence[int], n_trials: int
) -> tuple[np.ndarray, np.ndarray]:
    """Image of each trial, (n_trials of all sessions,), and whether each of the images, in rising order, is a test."""
    with release.copied(release.design) as path:
        order, images, shared = (_integers(path, name) for name in ("masterordering", "subjectim", "sharedix"))
        _check_design(path, order, images, sessions, n_trials)
    of_subject = images[int(release.subject[-2:]) - 1]
    of_trial = of_subject[order.reshape(-1) - 1] - 1
    ids = np.concatenate([of_trial[(number - 1) * n_trials : number * n_trials] for number in sessions])
    with release.copied(release.pictures) as path:
        n_pictures = picture_count(path, _PICTURES)
        if ids.max() >= n_pictures:
            raise DataError(
                path,
                expected=f"image {ids.max() + 1}, which was shown",
                found=f"{n_pictures} images",
                remedy="copy it again",
            )
    return ids, np.isin(np.unique(ids), shared - 1) & (config.test == "shared")


def _integers(path: Path, name: str) -> np.ndarray:
    """An array of the design, int64."""
    array = open_array(Place(path, name))
    numbers(array, array.place, 2)
    return np.asarray(array).astype(np.int64)


def _check_design(path: Path, order: np.ndarray, images: np.ndarray, sessions: Sequence[int], n_trials: int) -> None:
    """Raise DataError for a design that is not of these sessions."""
    if order.size % n_trials or max(sessions) * n_trials > order.size:
        expected = f"trials of {max(sessions)} sessions or more, of {n_trials} each, in masterordering"
        found = f"{order.size} trials"
    elif len(images) != 8 or order.min() < 1 or order.max() > images.shape[1] or images.min() < 1:
        expected = f"8 subjects and {order.max()} images or more in subjectim, counted from 1"
        found = f"the shape {images.shape}, numbers from {images.min()}"
    else:
        return
    raise DataError(path, expected=expected, found=found, remedy="copy it again")


def _recording(
    config: ImportConfig, release: _Release, surface: str, parts: Sequence[Array], masks: Mapping[str, _Inside]
) -> tuple[Recording, list[str]]:
    """Responses of one surface with all that is known of its places, and sentences for the user."""
    inside = masks[surface]
    rois, notes = _rois(config, release, surface, masks)
    ncsnr_path = release.ncsnr(surface)
    ncsnr = _ncsnr(release, ncsnr_path, inside) if ncsnr_path.exists() else None
    source = "all places" if config.mask == ("all",) else f"the places inside {inside.path.name}"
    notes = [f"{surface}: {source}; --mask names others", *notes]
    places = None if release.on_surface else read_volumes([inside.path], inside.mask)
    recording = Recording(
        trials=Joined(parts),
        rois=rois,
        ncsnr=ncsnr,
        positions=None if places is None else places.positions,
        grid=None if places is None else places.grid,
        fsaverage=inside.mask.reshape(-1) if inside.mask.size == FSAVERAGE_VERTICES else None,
    )
    return recording, notes


def _ncsnr(release: _Release, path: Path, inside: _Inside) -> np.ndarray:
    """Noise-ceiling signal-to-noise ratio, (n_places,) float32; 0 where it is not known, or below."""
    with release.copied(path):
        values = read_volumes([path], inside.mask).rows[:][0]
    return np.where(values > 0, values, 0).astype(np.float32)


def _rois(
    config: ImportConfig, release: _Release, surface: str, masks: Mapping[str, _Inside]
) -> tuple[dict[str, np.ndarray], list[str]]:
    """{ROI: (n_places,) bool} of the classes that the challenge has, and of those that --roi names."""
    mask = masks[surface].mask
    more = [name for name in config.roi if _files_of_roi(release, name)]
    classes = [*CLASSES, *(name for name in more if name not in CLASSES)]
    rois: dict[str, np.ndarray] = {}
    missing = []
    for name in classes:
        path = release.roi(name, surface)
        if path.exists():
            of_class = _of_class(release, name, path, mask)
            rois |= {f"{name}-{roi}" if roi in rois else roi: values for roi, values in of_class.items()}
        elif name in more:
            raise release.missing(path)
        else:
            missing.append(name)
    others = [text for text in config.roi if text not in more]
    for text in others:
        if "=" not in text and not Place.of(text).path.exists():
            raise _unknown(release, f"--roi {text}")
    files = by_surface(others, "--roi", list(masks)).get(surface, ())
    for roi, values in read_rois(files, int(mask.sum()), mask).items():
        rois[roi if roi not in rois else f"{roi} (2)"] = values
    note = f"{surface}: no ROIs of {', '.join(missing)} in {release.key(release.labels)}"
    return rois, [note] if missing else []


def _of_class(release: _Release, name: str, path: Path, mask: np.ndarray) -> dict[str, np.ndarray]:
    """{ROI: (n_places,) bool} of one file of labels; ROIs that have names are there without a place, too."""
    with release.copied(path):
        labels = read_labels(path, mask).values
    names = _label_names(release, name)
    known = {label: names.get(label, f"{name}-{label}") for label in np.unique(labels[labels > 0]).tolist()}
    return {roi: labels == label for label, roi in sorted((names | known).items()) if label > 0}


def _label_names(release: _Release, roi: str) -> dict[int, str]:
    """{label: name} of ROIs; {} where no file has them. A line is a label, a name, and perhaps a colour."""
    for path in release.names(roi):
        if path.is_file():
            lines = [line.split() for line in path.read_text(encoding="utf-8", errors="replace").splitlines()]
            return {int(words[0]): words[1] for words in lines if len(words) > 1 and _LABEL.fullmatch(words[0])}
    return {}
