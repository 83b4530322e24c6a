"""Files of a simulated tree: the challenge's layout, the noise ceilings, and the truth beside them."""

import io
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from PIL import Image

from featcache.dataset.algonauts import image_folder, image_name, response_files
from featcache.dataset.rois import CLASSES, FSAVERAGE_VERTICES, HEMISPHERES
from featcache.errors import ConfigError
from featcache.machine.folders import whole_folder
from featcache.simulate.anatomy import Vertices, mapping, roi_labels
from featcache.simulate.config import SimulateConfig, blocks, generator
from featcache.simulate.features import CHANNELS, N_FEATURES, channel_scales, encode
from featcache.simulate.scenes import compose, draw
from featcache.simulate.truth import Planted, plant, response_blocks

IMAGES_PER_TASK = 16

Progress = Callable[[int, int], None]

README = """\
# What was planted

The challenge tree beside this folder is simulated. This is what its responses were made from.

- `features.npy` (n_images, n_features) float16 and `feature_ids.npy` (n_images,) int64: the feature bank and the image
  id of every row. Ids from {n_image_ids} on are reference images, which are nowhere in the tree: over them every
  signal has mean 0 and variance 1.
- `subjXX/{{lh,rh}}.npz`, one entry per vertex in the order of the response columns:
  - `index` fsaverage vertex; `area`, `level` where its features come from
  - `field_x`, `field_y`, `field_size` centre and standard deviation of its Gaussian field, fractions of the image side
    from the left and the top; the field ends after 2.5 standard deviations
  - `weights` (n_vertices, n_channels) per unit of the channels named in `channels`; `offset`
  - `ceiling` noise ceiling as a fraction of variance; `dead` constantly 0
- `subjXX/{{lh,rh}}_test_signal.npy` (n_test, n_vertices) float32: the noise-free part of the test responses
- `subjXX/{{lh,rh}}_test_responses.npy` (n_test, n_vertices) float32: the withheld test responses

signal = features @ weights spread over the field - offset;
response = sqrt(ceiling) signal + sqrt(1 - ceiling) noise. `test_signal` is sqrt(ceiling) signal: its squared
correlation with `test_responses` is the ceiling, on average.
"""


@dataclass(frozen=True)
class ImageIds:
    """Ids of a subject's images, each (n_images,) int64, in rising order."""

    train: np.ndarray
    test: np.ndarray


def simulate(config: SimulateConfig, root: Path, progress: Progress | None = None) -> None:
    """Write a challenge tree with a known ground truth to `root`; `root/truth/README.md` describes the truth.

    The tree appears under its name only when it is complete. Worker processes are spawned: a script that calls this
    at its top level needs an ``if __name__ == "__main__"`` guard, unless `config.workers` is 1.

    Parameters
    ----------
    progress : called with (steps done, steps in total); a step is an image, or the responses of a hemisphere

    Raises
    ------
    ConfigError : `root` exists and is not an empty folder
    """
    if root.exists() and not (root.is_dir() and not any(root.iterdir())):
        raise ConfigError(
            root, expected="a new or empty folder", found="something in it", remedy="remove it or name another"
        )
    ids = image_ids(config)
    with whole_folder(root) as staging, _mapper(config.n_workers) as run:
        tick = _ticker(config, progress)
        _write_images(config, staging, ids, run, tick)
        jobs = [(subject, hemisphere) for subject in config.subjects for hemisphere in HEMISPHERES]
        for _ in run(partial(_write_hemisphere, config, staging, ids), jobs):
            tick(1)
        for subject in config.subjects:
            _write_mappings(staging / _name(subject) / "roi_masks")
        (staging / "truth" / "README.md").write_text(README.format(n_image_ids=config.n_image_ids), encoding="utf-8")


def image_ids(config: SimulateConfig) -> dict[int, ImageIds]:
    """{subject: ids of its images}; shared images are training images of all, others belong to one subject."""
    order = generator(config.seed, "image ids").permutation(config.n_image_ids).astype(np.int64)
    shared, start, ids = order[: config.n_shared], config.n_shared, {}
    for subject in config.subjects:
        middle = start + config.train_count(subject) - config.n_shared
        stop = middle + config.test_count(subject)
        train = np.concatenate([shared, order[start:middle]])
        ids[subject] = ImageIds(np.sort(train), np.sort(order[middle:stop]))
        start = stop
    return ids


# ---------------------------------------------------------------------------------------------------- processes


@contextmanager
def _mapper(n_workers: int) -> Iterator[Callable[..., Iterator[Any]]]:
    """`map` over so many processes, results in order; 1 stands for this process."""
    if n_workers == 1:
        yield map
        return
    # Spawned, not forked: the caller may have threads, and a fork would copy their locks.
    with ProcessPoolExecutor(n_workers, mp_context=get_context("spawn")) as pool:
        try:
            yield pool.map
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _ticker(config: SimulateConfig, progress: Progress | None) -> Callable[[int], None]:
    total = config.n_drawn + config.n_reference + len(HEMISPHERES) * config.n_subjects
    done = 0

    def tick(n_steps: int) -> None:
        nonlocal done
        done += n_steps
        if progress is not None:
            progress(done, total)

    return tick


# ------------------------------------------------------------------------------------------ images and features


def _write_images(
    config: SimulateConfig,
    staging: Path,
    ids: dict[int, ImageIds],
    run: Callable[..., Iterator[Any]],
    tick: Callable[[int], None],
) -> None:
    """Draw every image once, write it for each subject that sees it, and write the feature bank."""
    places = _image_places(ids)
    for folder in {path.parent for paths in places.values() for path in paths}:
        (staging / folder).mkdir(parents=True)
    references = range(config.n_image_ids, config.n_image_ids + config.n_reference)
    drawn = [*sorted(places), *references]
    (staging / "truth").mkdir()
    np.save(staging / "truth" / "feature_ids.npy", np.array(drawn, dtype=np.int64))
    bank = np.lib.format.open_memmap(
        staging / "truth" / "features.npy", mode="w+", dtype=np.float16, shape=(len(drawn), N_FEATURES)
    )
    slices = list(blocks(len(drawn), IMAGES_PER_TASK))
    tasks = [[(image_id, places.get(image_id, [])) for image_id in drawn[rows]] for rows in slices]
    for rows, features in zip(slices, run(partial(_draw_task, config, staging), tasks), strict=True):
        bank[rows] = features
        tick(len(features))
    bank.flush()


def _image_places(ids: dict[int, ImageIds]) -> dict[int, list[Path]]:
    """{image id: its files, relative to the root}."""
    places: dict[int, list[Path]] = {}
    for subject, of_subject in ids.items():
        for split, of_split in (("train", of_subject.train), ("test", of_subject.test)):
            folder = image_folder(Path(_name(subject)), split)
            for number, image_id in enumerate(of_split.tolist(), start=1):
                places.setdefault(image_id, []).append(folder / image_name(split, number, image_id))
    return places


def _draw_task(config: SimulateConfig, staging: Path, images: list[tuple[int, list[Path]]]) -> np.ndarray:
    """Draw images, write them to their files, and return their rows of the bank: (n_images, N_FEATURES) float16."""
    rows = []
    for image_id, paths in images:
        scene = compose(config.seed, image_id)
        pixels = draw(scene, config.image_size)
        rows.append(encode(pixels, scene))
        png = _png(pixels) if paths else b""
        for path in paths:
            (staging / path).write_bytes(png)
    return np.stack(rows)


def _png(pixels: np.ndarray) -> bytes:
    buffer = io.BytesIO()
    # Level 4 takes less than half the time of the default 6, for 5 % more bytes.
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=4)
    return buffer.getvalue()


# --------------------------------------------------------------------------------------------------- responses


def _write_hemisphere(config: SimulateConfig, staging: Path, ids: dict[int, ImageIds], job: tuple[int, str]) -> None:
    """Write masks, ceiling, truth and responses of one hemisphere of one subject."""
    subject, hemisphere = job
    bank = np.load(staging / "truth" / "features.npy", mmap_mode="r")
    bank_ids = np.load(staging / "truth" / "feature_ids.npy")
    reference = np.asarray(bank[bank_ids >= config.n_image_ids])
    planted = plant(config, subject, hemisphere, reference, channel_scales(reference))
    _write_masks(config, staging / _name(subject) / "roi_masks", subject, hemisphere, planted.vertices)
    _save(staging / "noise_ceiling" / _name(subject) / f"{hemisphere}.npy", planted.ceiling * np.float32(100))
    _write_truth(staging / "truth" / _name(subject) / f"{hemisphere}.npz", planted)
    for split, of_split in (("train", ids[subject].train), ("test", ids[subject].test)):
        features = bank[np.searchsorted(bank_ids, of_split)]
        rows = response_blocks(config, planted, subject, hemisphere, split, features)
        _write_responses(staging, job, split, (len(of_split), len(planted.vertices)), rows)


def _write_responses(
    staging: Path,
    job: tuple[int, str],
    split: str,
    shape: tuple[int, int],
    rows: Iterator[tuple[slice, np.ndarray, np.ndarray]],
) -> None:
    """Write training responses into the tree, or test responses and their signals into the truth."""
    with ExitStack() as stack:
        files = [stack.enter_context(_row_file(path, shape)) for path in _response_paths(staging, *job, split)]
        for _, signal, responses in rows:
            for file, block in zip(files, (responses, signal), strict=False):  # training signals are not written
                file.write(np.ascontiguousarray(block, dtype="<f4").data)


def _response_paths(staging: Path, subject: int, hemisphere: str, split: str) -> list[Path]:
    if split == "train":
        return [response_files(staging / _name(subject))[hemisphere]]
    return [staging / "truth" / _name(subject) / f"{hemisphere}_test_{name}.npy" for name in ("responses", "signal")]


@contextmanager
def _row_file(path: Path, shape: tuple[int, int]) -> Iterator[BinaryIO]:
    """Open a float32 .npy file of a given shape to append its rows; a memory map would keep all of them in memory."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        header = {"descr": np.lib.format.dtype_to_descr(np.dtype("<f4")), "fortran_order": False, "shape": shape}
        np.lib.format.write_array_header_1_0(file, header)
        yield file


def _write_masks(config: SimulateConfig, folder: Path, subject: int, hemisphere: str, vertices: Vertices) -> None:
    """Write ROI labels, uint8, for the columns and for all fsaverage vertices."""

    def on_surface(values: np.ndarray | int) -> np.ndarray:
        surface = np.zeros(FSAVERAGE_VERTICES, dtype=np.uint8)
        surface[vertices.index] = values
        return surface

    _save(folder / f"{hemisphere}.all-vertices_fsaverage_space.npy", on_surface(1))
    for roi_class, labels in roi_labels(config, subject, hemisphere, vertices.position).items():
        _save(folder / f"{hemisphere}.{roi_class}_challenge_space.npy", labels)
        _save(folder / f"{hemisphere}.{roi_class}_fsaverage_space.npy", on_surface(labels))


def _write_mappings(folder: Path) -> None:
    for roi_class in CLASSES:
        names = np.empty((), dtype=object)
        names[()] = mapping(roi_class)
        np.save(folder / f"mapping_{roi_class}.npy", names, allow_pickle=True)


def _write_truth(path: Path, planted: Planted) -> None:
    arrays = vars(planted.vertices) | {"channels": np.array(CHANNELS)} | vars(planted)
    del arrays["vertices"]
    path.parent.mkdir(parents=True, exist_ok=True)
    np.savez(path, **arrays)


def _save(path: Path, values: np.ndarray) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    np.save(path, values)


def _name(subject: int) -> str:
    return f"subj{subject:02d}"
