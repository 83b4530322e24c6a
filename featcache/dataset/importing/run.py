"""import: files that the user names -> a subject of the work folder."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from featcache.config import fingerprint
from featcache.dataset.digests import DigestIndex, FileTimes
from featcache.dataset.folder import about_subject, check_name, scan_folder
from featcache.dataset.identity import Looked, look
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.files import read_material
from featcache.dataset.importing.material import Material
from featcache.dataset.importing.nsd import nsd_files
from featcache.dataset.importing.stimuli import images_of_table
from featcache.dataset.importing.write import Imported, check_names, import_material
from featcache.dataset.subject import Images, Subject
from featcache.errors import DataError
from featcache.formats.arrays import is_zarr
from featcache.formats.lazy import Place
from featcache.machine.progress import bar
from featcache.workdir import Workdir

VERSION = 1  # raised where the same files give another subject
_PLACES = ("images", "test_images", "responses", "volume", "mask", "test_responses", "roi", "ceiling", "ncsnr")


def import_files(config: ImportConfig, work: Path | str, workers: int) -> Imported:
    """Import the files of one subject into `<work>/dataset`. What is there already is not written again.

    workers : threads that decode images

    Raises DataError or ConfigError for files that cannot be read or do not belong together; nothing is written then.
    """
    check_name(config.subject_name, "the name of the subject")  # before it is part of the name of any file
    files = Workdir(Path(work))
    key = _key(config, files)
    known = _imported(files.dataset, config.subject_name, key)
    if known is not None:
        return known
    material = read_material(config)
    return import_into(material, files.root, workers, config.zscore, {"key": key})


def import_into(
    material: Material, work: Path, workers: int, zscore: bool | None = None, about: Mapping[str, Any] | None = None
) -> Imported:
    """Look at the pictures of some material, and write it as a subject of `<work>/dataset`.

    zscore : whether each vertex is z-scored within each session; None: where sessions are known

    Raises DataError for images that cannot be decoded, and as `import_material` does.
    """
    check_names(material)
    replaced = _note_on_replaced(Workdir(work).dataset, material.name)
    looked = _look(material, work, workers)
    zscore = material.session is not None if zscore is None else zscore
    scaling = f"responses: {'z-scored within each session' if zscore else 'not z-scored'}"
    material = replace(material, notes=(*material.notes, scaling))
    n_rows = len(material.shown) * len(material.recordings) * (2 if zscore else 1)
    with bar(f"import {material.name}", n_rows, "trials") as advance:
        done = import_material(material, looked, Workdir(work).dataset, zscore, about or {}, advance)
    return replace(done, notes=(*replaced, *done.notes))


def _note_on_replaced(root: Path, name: str) -> tuple[str, ...]:
    """What to say of a subject whose place the new one takes."""
    there = scan_folder(root)[0].subjects if root.is_dir() else ()
    return tuple(
        f"{name}: takes the place of an earlier import, of {len(one.train):,} training and {len(one.test):,} test "
        "images; another --subject keeps both"
        for one in there
        if one.name == name
    )


def _look(material: Material, work: Path, workers: int) -> Looked:
    """What the pictures look like. Raises DataError for one that cannot be decoded."""
    sources = material.stimuli.sources
    images = Images(sources, np.arange(len(sources)))
    shown = Subject(material.name, images, Images.none(), {}, {}, {}, {}, {})
    with bar(f"look at images of {material.name}", len(sources), "images") as advance:
        looked = look(shown, work, workers, advance)
    if looked.faults:
        fault, others = looked.faults[0], len(looked.faults) - 1
        more = f" (and {others} more image{'s' if others > 1 else ''})" if others else ""
        raise DataError(
            fault.where,
            expected=fault.expected,
            found=f"{fault.found}{more}",
            remedy="copy it again, or leave it out",
        )
    return looked


def _key(config: ImportConfig, files: Workdir) -> dict[str, Any]:
    """What decides an import: its settings, and where its files are and what they hold."""
    settings = {name: str(value) for name, value in asdict(config).items() if value not in (None, ())}
    named = list(_files(config))
    key: dict[str, Any] = {
        "version": VERSION,
        "settings": settings,
        "names": fingerprint({"files": [str(path.absolute()) for path in named]}),
        "files": DigestIndex(files.import_index(config.subject_name)).digest(named),
    }
    if config.nsd is not None:  # 40 GB a subject, which are not read for this alone
        key["release"] = fingerprint({str(path.absolute()): FileTimes().of(path) for path in nsd_files(config)})
    return key


def _files(config: ImportConfig) -> Iterator[Path]:
    """Every file that is named, those of folders that are, and the images that a table names."""
    named = [getattr(config, name) or () for name in _PLACES]
    texts = [text for value in named for text in ([value] if isinstance(value, str) else value)]
    for text in [*texts, *([str(config.table)] if config.table else [])]:
        whole = Place.of(text).path
        path = whole if whole.exists() else Place.of(text.partition("=")[2] or text).path
        if path.is_file():
            yield path
        elif path.is_dir():
            inside = path.rglob("*") if is_zarr(path) else path.iterdir()
            yield from sorted(one for one in inside if one.is_file())
    if config.table is not None:
        yield from images_of_table(config)


def _imported(root: Path, name: str, key: Mapping[str, Any]) -> Imported | None:
    """The subject of an earlier import of the same files, if it is whole."""
    about = about_subject(root, name)
    if about.get("key") != key:
        return None
    dataset, _ = scan_folder(root)
    for subject in dataset.subjects:
        if subject.name == name:
            return Imported(
                name=name,
                folder=root / name,
                n_train=len(subject.train),
                n_test=len(subject.test),
                n_trials=about.get("n_trials", 0),
                n_vertices=subject.n_vertices,
                notes=tuple(about.get("notes", ())),
                new=False,
            )
    return None
