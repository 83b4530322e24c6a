"""Changes to the images of a subject in the challenge's tree."""

from pathlib import Path

import numpy as np
from PIL import Image

NEW_ID = 72_500  # of no picture of a simulated tree


def test_images(tree: Path, subject: str = "subj01") -> list[Path]:
    """Files of the test images, in order."""
    return sorted((tree / subject / "test_split/test_images").iterdir())


test_images.__test__ = False  # type: ignore[attr-defined]


def add_test_image(tree: Path, subject: str = "subj01", place: int | None = None, image_id: int = NEW_ID) -> Path:
    """Add a test image of noise that no other image has; the last one, or at a place from 0."""
    known = test_images(tree, subject)
    for number, path in reversed(list(enumerate(known))):
        if place is not None and number >= place:
            path.rename(path.with_name(f"test-{number + 2:04d}_{path.name.partition('_')[2]}"))
    number = len(known) if place is None else place
    path = known[0].with_name(f"test-{number + 1:04d}_nsd-{image_id:05d}.png")
    shape = np.asarray(Image.open(sorted(known[0].parent.iterdir())[0])).shape
    Image.fromarray(np.random.default_rng(image_id).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def remove_test_image(tree: Path, place: int, subject: str = "subj01") -> None:
    """Remove a test image, and number those behind it anew."""
    test_images(tree, subject)[place].unlink()
    for number, path in enumerate(test_images(tree, subject)):
        path.rename(path.with_name(f"test-{number + 1:04d}_{path.name.partition('_')[2]}"))


def turn_test_images(tree: Path, subject: str = "subj01") -> None:
    """Put the test images into the opposite order."""
    known = test_images(tree, subject)
    for number, path in enumerate(known):
        path.rename(path.with_name(f"test-{len(known) - number:04d}_{path.name.partition('_')[2]}"))
