"""A dataset of any layout: opened, and looked through for faults."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from featcache.dataset.algonauts import scan_tree
from featcache.dataset.folder import is_folder, moved_faults, scan_folder
from featcache.dataset.identity import (
    Looked,
    identified,
    in_both_splits,
    look,
    near_copy_notes,
    remembered,
    two_pictures,
)
from featcache.dataset.responses import response_fault
from featcache.dataset.subject import Dataset, Fault, names_in, refuse_faults
from featcache.errors import DataError
from featcache.machine.progress import bar
from featcache.workdir import Workdir


def scan_dataset(root: Path, noise_ceiling: Path | None = None) -> tuple[Dataset, list[Fault]]:
    """Subjects under `root`, and every fault that shows without decoding images or reading responses.

    noise_ceiling : folder of ceilings of the challenge's tree, as for `scan_tree`
    """
    if not is_folder(root):
        return scan_tree(root, noise_ceiling)
    dataset, faults = scan_folder(root)
    return dataset, faults + moved_faults(dataset.subjects)


def open_dataset(root: Path | str, noise_ceiling: Path | str | None = None) -> Dataset:
    """Subjects under `root`: the challenge's tree, or the project's own form. Raises DataError for the first fault.

    noise_ceiling : as for `scan_dataset`
    """
    dataset, faults = scan_dataset(Path(root), None if noise_ceiling is None else Path(noise_ceiling))
    refuse_faults(faults)
    return dataset


def of_subjects(names: str, dataset: Dataset, faults: Sequence[Fault]) -> tuple[Dataset, list[Fault]]:
    """Some subjects of a dataset, and the faults that are theirs or no subject's.

    names : as for `Dataset.select`; a subject may be named of which no more than a faulty folder is there

    Raises DataError for a subject that is not there.
    """
    if names == "all":
        return dataset, list(faults)
    names_read = [subject.name for subject in dataset.subjects]
    places = [_below(dataset.root, fault.where) for fault in faults]
    unread = dict.fromkeys(
        parts[0]
        for fault, parts in zip(faults, places, strict=True)
        if Path(fault.where).parent.is_relative_to(dataset.root) and not set(parts) & set(names_read)
    )
    known = [*names_read, *unread]
    wanted = set(names_in(names, known))
    theirs = [
        fault for fault, parts in zip(faults, places, strict=True) if wanted & set(parts) or not set(known) & set(parts)
    ]
    return replace(dataset, subjects=tuple(one for one in dataset.subjects if one.name in wanted)), theirs


def _below(root: Path, where: Path | str) -> tuple[str, ...]:
    """Names of the folders and the file that a fault is in; of what is in `root`, those below it."""
    path = Path(where)
    return path.relative_to(root).parts if path.is_relative_to(root) else path.parts


def open_imported(work: Path) -> Dataset:
    """Every subject that was imported into a work folder, with one id for each picture. Raises DataError."""
    return with_known_pictures(open_dataset(Workdir(work).dataset), work, None)


def deep_faults(
    dataset: Dataset, work: Path, workers: int = 2, advance: Callable[[int], object] = lambda n: None
) -> Iterator[Fault]:
    """Faults that show only by decoding every image and reading every response, which takes minutes.

    work : folder that remembers what pictures look like; images that did not change are not decoded again
    advance : called with the number of images just decoded, or remembered
    """
    looked = {}
    for subject in dataset.subjects:
        looked[subject.name] = look(subject, work, workers, advance)
        yield from looked[subject.name].faults
    yield from two_pictures(dataset, looked)
    yield from in_both_splits(dataset, looked)
    for subject in dataset.subjects:
        for surface in subject.surfaces:  # a reader reports those whose responses cannot be read
            paths = [subject.response_paths[surface], subject.test_response_paths.get(surface)]
            yield from (fault for path in paths if path and (fault := response_fault(path)))


def deep_notes(dataset: Dataset, work: Path) -> list[str]:
    """Sentences on equal pictures under several ids, and on near copies, of what `deep_faults` has looked at."""
    looked = _remembered(dataset, work)
    renamed = identified(dataset, looked)
    return [*renamed.notes[len(dataset.notes) :], *near_copy_notes(renamed, looked)]


def with_known_pictures(dataset: Dataset, work: Path, workers: int | None) -> Dataset:
    """The dataset with one id for each picture, by what the pictures look like; see `identity.identified`.

    workers : threads that decode the images that nobody has looked at yet; None to leave these out

    Raises DataError where one id means two pictures.
    """
    looked = _remembered(dataset, work)
    n_unseen = sum(len(each.unseen) for each in looked.values())
    if workers is not None and n_unseen:
        with bar("pictures, once", sum(len(each.pictures) for each in looked.values()), "images") as advance:
            looked = {subject.name: look(subject, work, workers, advance) for subject in dataset.subjects}
    for fault in two_pictures(dataset, looked):
        raise DataError(
            fault.where, expected=fault.expected, found=fault.found, remedy="give each picture an id of its own"
        )
    both = [f"{fault.where}: {fault.found}" for fault in in_both_splits(dataset, looked)]
    notes = tuple(f"pictures in training and test, {each}: their scores are too good" for each in both)
    renamed = identified(dataset, looked)
    return Dataset(renamed.root, renamed.subjects, renamed.notes + notes, renamed.challenge)


def _remembered(dataset: Dataset, work: Path) -> dict[str, Looked]:
    return {subject.name: remembered(subject, work) for subject in dataset.subjects}
