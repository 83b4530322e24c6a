"""Subjects of which only the images, and what is known of them, matter."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from featcache.dataset.subject import Images, Subject


def subject_of(name: str, pictures: Mapping[int, Image.Image], folder: Path, n_test: int = 0) -> Subject:
    """A subject who saw these pictures, {id: picture}, of which the last are test images; files are written."""
    folder.mkdir(parents=True, exist_ok=True)
    for image_id, picture in pictures.items():
        picture.save(folder / f"{image_id:05d}.png")
    return seen(name, list(pictures), n_test, folder)


def seen(
    name: str,
    ids: Sequence[int],
    n_test: int = 0,
    folder: Path = Path(),
    columns: Mapping[str, Sequence[str]] | None = None,
) -> Subject:
    """A subject who saw images of these ids, with columns in the same order; no files are written."""
    split = len(ids) - n_test
    train, test = (
        Images(tuple(folder / f"{i:05d}.png" for i in part), np.array(part, dtype=np.int64))
        for part in (ids[:split], ids[split:])
    )
    known = {column: tuple(values) for column, values in (columns or {}).items()}
    return Subject(name, train, test, {}, {}, {}, {}, {}, columns=known)
