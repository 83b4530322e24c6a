"""Material -> a subject in the project's own form: pictures identified, trials averaged, ceilings estimated."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.dataset.folder import CEILINGS, RESPONSES, SubjectWriter, check_name, writing
from featcache.dataset.identity import Looked
from featcache.dataset.importing.material import Material, Recording, Stimuli
from featcache.dataset.importing.repeats import (
    ArrayRows,
    Moments,
    Trials,
    average_trials,
    ceiling_for,
    ceiling_from_ncsnr,
    noise_ceilings,
)
from featcache.dataset.pictures import alike
from featcache.dataset.subject import SESSION, SESSIONS_JOINED_BY, Images, ImageSource
from featcache.errors import DataError
from featcache.machine.files import refuse_full_disk

ALL_SURFACES, ALL = "both", "all"  # what tables call all surfaces, and all vertices or subjects, together


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures that are left once each is there once: those to fit to, then those to predict.

    sources, ids : (n_pictures,)
    columns : {name: (n_pictures,) texts}
    n_train : how many are to be fitted to
    of_trial : (n_trials,) number of the picture of each trial
    notes : sentences for the user
    """

    sources: tuple[ImageSource, ...]
    ids: np.ndarray
    columns: Mapping[str, tuple[str, ...]]
    n_train: int
    of_trial: np.ndarray
    notes: tuple[str, ...] = ()

    def split(self, name: str) -> slice:
        """Where the pictures of 'train' or 'test' are."""
        return slice(0, self.n_train) if name == "train" else slice(self.n_train, len(self.sources))


@dataclass(frozen=True)
class Imported:
    """What an import left.

    n_trials : rows of responses that were read
    notes : sentences for the user
    new : whether it was written now
    """

    name: str
    folder: Path
    n_train: int
    n_test: int
    n_trials: int
    n_vertices: Mapping[str, int]
    notes: tuple[str, ...]
    new: bool = True


def pictures_of(material: Material, looked: Looked) -> Pictures:
    """Each picture once, whatever its names and ids.

    Stimuli of equal pixels are one picture, whose id is the smallest of theirs, and all its trials are averaged. So are
    stimuli of one given id that look alike, such as a PNG and a JPEG.

    looked : what was seen of the stimuli, in their order

    Raises DataError for one id of two pictures, for a picture in both training and test, and where there are too few.
    """
    stimuli = material.stimuli
    ids = looked.pictures if stimuli.ids is None else stimuli.ids
    _refuse_two_pictures(material, ids, looked)
    contents = _united(ids, looked.pictures)
    _refuse_both_splits(material, contents)
    has_trial = np.zeros(len(contents), dtype=bool)
    has_trial[material.shown] = True
    first: dict[int, int] = {}  # {content: number of the first stimulus that has it}
    for number in [*np.flatnonzero(~stimuli.test & has_trial), *np.flatnonzero(stimuli.test)]:
        first.setdefault(int(contents[number]), int(number))
    chosen = np.array(list(first.values()), dtype=np.int64)
    position = {content: row for row, content in enumerate(first)}
    n_train = int((~stimuli.test[chosen]).sum())
    _refuse_too_few(material.name, n_train, int(stimuli.test.sum()))
    return Pictures(
        sources=tuple(stimuli.sources[number] for number in chosen),
        ids=contents[chosen],
        columns={name: tuple(values[number] for number in chosen) for name, values in stimuli.columns.items()}
        | _sessions_of(stimuli, contents, chosen),
        n_train=n_train,
        of_trial=np.array([position[int(contents[number])] for number in material.shown], dtype=np.int64),
        notes=tuple(_notes_on_pictures(material, contents, has_trial)),
    )


def _sessions_of(stimuli: Stimuli, contents: np.ndarray, chosen: np.ndarray) -> dict[str, tuple[str, ...]]:
    """{'session': those of all stimuli that are each chosen picture}; {} where sessions are not known."""
    shown: dict[int, dict[str, None]] = {}
    for content, sessions in zip(contents.tolist(), stimuli.columns.get(SESSION, ()), strict=False):
        shown.setdefault(content, {}).update(dict.fromkeys(sessions.split(SESSIONS_JOINED_BY)))
    return {SESSION: tuple(SESSIONS_JOINED_BY.join(shown[one]) for one in contents[chosen].tolist())} if shown else {}


def _united(ids: np.ndarray, pictures: np.ndarray) -> np.ndarray:
    """The smallest id of each stimulus among those of the same picture, and of the same id, and so on, (n_stimuli,)."""
    smallest = ids.copy()
    while True:
        before = smallest.copy()
        for groups in (pictures, ids):
            numbers = np.unique(groups, return_inverse=True)[1].reshape(-1)
            least = np.full(numbers.max(initial=0) + 1, np.iinfo(np.int64).max)
            np.minimum.at(least, numbers, smallest)
            smallest = least[numbers]
        if np.array_equal(smallest, before):
            return smallest


def _refuse_two_pictures(material: Material, ids: np.ndarray, looked: Looked) -> None:
    order = np.lexsort((np.arange(len(ids)), ids))
    first = order[np.searchsorted(ids[order], ids)]
    differs = looked.pictures != looked.pictures[first]
    other = np.flatnonzero(differs)
    other = other[~alike(looked.thumbnails[other], looked.thumbnails[first[other]])]
    if len(other):
        bad, sources = np.unique(ids[other]), material.stimuli.sources
        raise DataError(
            f"images of {material.name}",
            expected="one picture for each id",
            found=f"{len(bad)} {'ids' if len(bad) > 1 else 'id'} of two pictures: {ids[other[0]]} is "
            f"{sources[first[other[0]]].name} and {sources[other[0]].name}",
            remedy="give each picture its own id, or leave the ids out: they are then made from the pixels",
        )


def _refuse_both_splits(material: Material, contents: np.ndarray) -> None:
    test = material.stimuli.test
    if (both := np.intersect1d(contents[test], contents[~test])).size:
        first = contents[np.flatnonzero(np.isin(contents, both))[0]]
        files = [str(material.stimuli.sources[number]) for number in np.flatnonzero(contents == first)]
        raise DataError(
            f"images of {material.name}",
            expected="each picture in training or in test",
            found=f"{len(both)} in both{', such as' if len(both) > 1 else ':'} {' is '.join(dict.fromkeys(files))}",
            remedy="leave them out of one of the two",
        )


def _refuse_too_few(name: str, n_train: int, n_test: int) -> None:
    if n_train < 2:
        raise DataError(
            f"images of {name}",
            expected="2 or more different training images with responses",
            found=f"{n_train} ({n_test} to predict)",
            remedy="give more of them",
        )


def _notes_on_pictures(material: Material, contents: np.ndarray, has_trial: np.ndarray) -> list[str]:
    stimuli, notes = material.stimuli, []
    twice: dict[int, list[int]] = {}
    for number, content in enumerate(contents.tolist()):
        twice.setdefault(content, []).append(number)
    several = [numbers for numbers in twice.values() if len(numbers) > 1]
    if several:
        names = " is ".join(stimuli.sources[number].name for number in several[0][:2])
        notes.append(
            f"{len(several):,} picture{'s' * (len(several) > 1)} more than once (such as {names}): each is one image, "
            "and its trials are averaged"
        )
    if unused := int((~stimuli.test & ~has_trial).sum()):
        notes.append(f"left out {unused:,} picture{'s' * (unused > 1)} without a trial")
    return notes


class _TwoSplits:
    """Averages of all pictures, of which those of training and of test are in two files."""

    dtype = np.dtype(np.float32)

    def __init__(self, train: np.ndarray, test: np.ndarray | None) -> None:
        self._train, self._test = train, test
        self.shape = (len(self), train.shape[1])

    def __len__(self) -> int:
        return len(self._train) + (0 if self._test is None else len(self._test))

    def _at(self, row: int) -> tuple[np.ndarray, int]:
        if row < len(self._train) or self._test is None:
            return self._train, row
        return self._test, row - len(self._train)

    def __getitem__(self, row: int) -> np.ndarray:
        array, there = self._at(row)
        values: np.ndarray = array[there]
        return values

    def __setitem__(self, row: int, values: np.ndarray) -> None:
        array, there = self._at(row)
        array[there] = values


def import_material(
    material: Material,
    looked: Looked,
    root: Path,
    zscore: bool,
    about: Mapping[str, Any],
    advance: Callable[[int], object] = lambda n: None,
) -> Imported:
    """Write a subject of this material under `root`, whole or not at all.

    Parameters
    ----------
    looked : what was seen of the stimuli, in their order
    zscore : whether each vertex is z-scored within each session before trials are averaged
    about : how the subject was made, kept with it
    advance : called with the number of trials just read, of each surface; twice as many where they are z-scored

    Raises DataError for material that no head could be fitted to.
    """
    check_names(material)
    if zscore:
        _refuse_short_sessions(material)
    pictures = pictures_of(material, looked)
    tested = np.unique(pictures.of_trial[pictures.of_trial >= pictures.n_train])
    n_test = len(pictures.sources) - pictures.n_train
    _refuse_some_test(material.name, len(tested), n_test)
    notes = [*material.notes, *pictures.notes]
    widths = [recording.trials.shape[1] for recording in material.recordings.values()]
    refuse_full_disk(root, 4 * len(pictures.sources) * sum(widths))
    with writing(root, material.name) as writer:
        for surface, recording in material.recordings.items():
            notes += _write_surface(writer, material, pictures, surface, recording, zscore, advance)
        parts = {split: pictures.split(split) for split in RESPONSES}
        images = {split: Images(pictures.sources[part], pictures.ids[part]) for split, part in parts.items()}
        facts = {"n_trials": len(material.shown), "zscored": zscore, "notes": list(dict.fromkeys(notes))}
        writer.finish(images, pictures.columns, {**about, **facts})
        n_vertices = dict(writer.n_vertices)
    return Imported(
        name=material.name,
        folder=root / material.name,
        n_train=pictures.n_train,
        n_test=n_test,
        n_trials=len(material.shown),
        n_vertices=n_vertices,
        notes=tuple(dict.fromkeys(notes)),
    )


def check_names(material: Material) -> None:
    """Raise DataError for names that cannot be those of files, or that tables use for something else."""
    check_name(material.name, "the name of the subject")
    rois = {roi for recording in material.recordings.values() for roi in recording.rois}
    taken = {"a subject": {material.name} & {ALL}, "an ROI": rois & {ALL}}
    taken["a surface"] = material.recordings.keys() & {ALL_SURFACES}
    for what, names in taken.items():
        for name in names:
            raise DataError(
                f"the name of {what}",
                expected="one that tables do not use",
                found=f"{name!r}, which means all of them together",
                remedy="give it another name",
            )


def _refuse_short_sessions(material: Material) -> None:
    """Raise DataError where trials cannot be z-scored within their sessions."""
    if material.session is None:
        raise DataError(
            f"sessions of {material.name}",
            expected="the session of each trial, to z-score within sessions",
            found="none",
            remedy="say which column of a table has them (--session-column), or do not z-score (--no-zscore)",
        )
    sessions = np.unique(np.stack([material.session, material.shown]), axis=1)[0]  # once for each of its images
    if len(short := np.flatnonzero(np.bincount(sessions) == 1)):
        raise DataError(
            f"sessions of {material.name}",
            expected="two or more images in each, since z-scoring within a session of one leaves zeros",
            found=f"one in {material.session_names[short[0]] if material.session_names else short[0]}",
            remedy="name the column of the sessions (--session-column), leave such sessions out, or do not z-score "
            "(--no-zscore)",
        )


def _refuse_some_test(name: str, n_tested: int, n_test: int) -> None:
    if n_tested not in (0, n_test) or (n_test and n_tested == 1):
        raise DataError(
            f"test images of {name}",
            expected="responses to all of them, 2 or more, or to none",
            found=f"responses to {n_tested} of {n_test}",
            remedy="leave the others out, or all responses to test images",
        )


def _write_surface(
    writer: SubjectWriter,
    material: Material,
    pictures: Pictures,
    surface: str,
    recording: Recording,
    zscore: bool,
    advance: Callable[[int], object],
) -> list[str]:
    """Write all that is known of one surface; sentences for the user."""
    n_vertices, n_images = recording.trials.shape[1], len(pictures.sources)
    has_test = bool((pictures.of_trial >= pictures.n_train).any())
    train = writer.new_array(RESPONSES["train"], surface, (pictures.n_train, n_vertices))
    n_test = n_images - pictures.n_train
    test = writer.new_array(RESPONSES["test"], surface, (n_test, n_vertices)) if has_test else None
    chunks = getattr(recording.trials, "chunks", None)
    trials = Trials(
        ArrayRows(recording.trials),
        pictures.of_trial,
        material.session,
        where=f"responses of {surface}",
        chunk_rows=chunks[0] if chunks else 1,
    )
    out = _TwoSplits(train, test)
    repeats = np.bincount(pictures.of_trial, minlength=len(out))
    is_test = np.arange(len(out)) >= pictures.n_train
    # Test responses decide nothing that heads are fitted to, unless training images have no repeats.
    from_test = has_test and repeats[~is_test].max() == 1 < repeats[is_test].max()
    counted = None if from_test else ~is_test
    moments = average_trials(trials, len(out), zscore, out, counted, ~is_test, advance=advance)
    for array in (train, test):
        if array is not None:
            array.flush()
    writer.save_rois(surface, recording.rois)
    if recording.positions is not None:
        writer.save("positions", surface, np.asarray(recording.positions, dtype=np.float32))
    if recording.grid is not None:
        writer.grids[surface] = recording.grid
    if recording.fsaverage is not None:
        writer.save("fsaverage", surface, np.asarray(recording.fsaverage, dtype=bool))
    notes = [_note_on_constants(surface, moments)]
    for split in RESPONSES if has_test else ("train",):
        of_train, of_split = repeats[~is_test], repeats[pictures.split(split)]
        if split == "test":
            of_split = of_split * _averaged(material.test_trials, of_train, of_split)
        ceiling, note = _ceiling(recording, moments, of_train, of_split)
        also = "; as training images have no repeats, those of test images tell the noise"
        notes.append(f"{surface}: {note}{also if from_test and ceiling is not None else ''}")
        if ceiling is not None:
            writer.save(CEILINGS[split], surface, ceiling)
    return [note for note in notes if note]


def _averaged(test_trials: int | None, of_train: np.ndarray, of_test: np.ndarray) -> int:
    """Trials that each row of responses to test images is the mean of; 0 where that is not known.

    Where training images have repeats and each test image has one row, that row may be a mean of trials already.

    test_trials : as the user says
    of_train, of_test : number of rows of each image
    """
    if test_trials is not None:
        return test_trials
    return 0 if of_train.max() > 1 == of_test.max() else 1


def _ceiling(
    recording: Recording, moments: Moments, of_train: np.ndarray, of_split: np.ndarray
) -> tuple[np.ndarray | None, str]:
    """Ceiling of one split, (n_vertices,) fractions of variance, and where it is from.

    of_train, of_split : number of trials of each training image, and of each image of the split
    """
    if not of_split.all():
        return None, "no noise ceilings of test images: --test-trials says how many trials each row is the mean of"
    if recording.noise_ceiling is not None:
        given = recording.noise_ceiling.astype(np.float32)
        return ceiling_for(given, of_train, of_split), "noise ceilings as given, for the trials of training images"
    repeats = of_split
    if recording.ncsnr is not None:
        return ceiling_from_ncsnr(recording.ncsnr, repeats), "noise ceilings from the ncsnr that was given"
    ceilings = noise_ceilings(moments, repeats)
    words = ceilings.note if ceilings.ceiling is None else f"noise ceilings {ceilings.note}"
    return ceilings.ceiling, words


def _note_on_constants(surface: str, moments: Moments) -> str:
    """What to say of vertices whose responses never differ."""
    if n_constant := int(moments.constant.sum()):
        return f"{surface}: {n_constant:,} of {len(moments.constant):,} vertices have one response in all trials"
    if n_in_session := int(moments.constant_in_session.sum()):
        return f"{surface}: {n_in_session:,} vertices have one response in all of a session, which counts as 0 there"
    return ""
