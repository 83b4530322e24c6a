"""The images that are predicted best and worst, as small pictures; all are training images."""

import base64
import io
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from featcache.dataset.images import load_image
from featcache.errors import DataError
from heads.page.measures import Measured

_SIDE = 88  # pixels of the longer side


@dataclass(frozen=True)
class Picture:
    """One image and its score.

    webp : in base64; '' where it is not shown, or no longer there
    """

    image_id: int
    r: float
    webp: str


@dataclass(frozen=True)
class Extremes:
    """Images of one subject, the best and the worst first, and all their scores."""

    subject: str
    model: str
    n_images: int
    median: float
    best: Sequence[Picture]
    worst: Sequence[Picture]


def extremes(measured: Measured, most: int, shown: bool) -> Extremes:
    """The images that a subject's best model predicts best and worst.

    most : images of each; fewer where there are few
    shown : whether with pictures
    """
    r = measured.image_r[measured.best]
    order = np.argsort(-r, kind="stable")
    n = min(most, len(r) // 2)
    images = measured.subject.train

    def pictures(rows: np.ndarray) -> list[Picture]:
        return [
            Picture(int(images.ids[row]), float(r[row]), _thumbnail(measured, int(row)) if shown else "")
            for row in rows
        ]

    return Extremes(
        measured.subject.name,
        measured.best,
        len(r),
        float(np.median(r)),
        pictures(order[:n]),
        pictures(order[::-1][:n]),
    )


def _thumbnail(measured: Measured, row: int) -> str:
    try:
        image = load_image(measured.subject.train.sources[row])
    except DataError:  # moved since: the score is still known
        return ""
    image.thumbnail((_SIDE, _SIDE))
    file = io.BytesIO()
    image.save(file, "WEBP", quality=60, method=4)
    return base64.b64encode(file.getvalue()).decode()
