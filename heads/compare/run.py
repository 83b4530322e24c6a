"""Feature stores -> shares of variance of feature spaces, in files, as a table and as a picture."""

import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

import featcache
from featcache.config import fingerprint
from featcache.dataset.digests import response_digest, subject_digests
from featcache.dataset.grouping import split_of
from featcache.dataset.responses import refuse_unfit
from featcache.dataset.splits import Split
from featcache.dataset.subject import Dataset, Subject
from featcache.errors import ConfigError, StoreError, first_line
from featcache.machine.device import resolve_device
from featcache.machine.device_memory import block_on, on_cuda, said_on
from featcache.machine.documents import DAMAGED_NPZ, parse_json, read_document, write_document
from featcache.machine.files import only_writer, open_regular, whole_file
from featcache.machine.folders import link_or_copy, renewed_folder
from featcache.machine.memory import give_back_memory, keep_freed_memory, memory_at_start, spare_memory
from featcache.machine.progress import bar, say
from featcache.workdir import Workdir
from heads.blend.plot import can_draw
from heads.compare.bands import Band, bands_of, on_folds, plan_of
from heads.compare.folds import PENALTIES, candidates_of, fit_fold, models_of
from heads.compare.measures import WITHOUT_INTERVAL, GroupSums, VarianceSums, measures_of
from heads.compare.plot import plot_shares
from heads.compare.results import EVERYTHING, Comparison, interval, rows_of, write_table
from heads.compare.spaces import Candidate, Spaces, is_sampled, n_columns, spaces_of
from heads.config.comparing import CompareConfig
from heads.features.sets import FeatureSet, choose, feature_sets, say_partial, say_without
from heads.fit.ends import refuse_ends
from heads.fit.run import refuse_leaks
from heads.scores.resampling import N_DRAWS, image_weights
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.axes import LANDMARKS
from heads.solvers.layers.kernels import BLUR, FLOOR
from heads.solvers.layers.priors import Prior
from heads.solvers.memory import FEATURE_SHARE
from heads.solvers.ridge import MAX_NUMBERS_AT_ONCE

VERSION = 1  # raised where the same settings give other numbers


@dataclass(frozen=True, eq=False)
class _Task:
    """One subject to compare bands for. key : all that decides its numbers"""

    subject: Subject
    bands: tuple[Band, ...]
    plan: FoldPlan
    key: dict[str, Any]


def compare(
    data: Dataset | Sequence[Subject], config: CompareConfig, work: Path | str, by: Split | None = None
) -> Comparison:
    """Shares of variance that bands of features explain alone, uniquely and together, in every vertex and ROI.

    Writes tables and a picture. A subject that was compared in the same way before is not computed again.

    by : which images stay together in the folds; None: what `config.split` says of these subjects alone

    Raises StoreError where there are no features, or where float32 cannot hold their squares, ConfigError for bands
    that are not there, LeakError for backbones of different folds.
    """
    subjects, work = data.subjects if isinstance(data, Dataset) else tuple(data), Path(work)
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    memory_at_start()
    refuse_unfit(subjects, work)
    by = split_of(config.split, subjects, work) if by is None else by
    tasks = [_task(subject, sets, config, by, work) for subject, sets in _sets(subjects, config, work).items()]
    _refuse_different_bands(tasks)
    name, files = _name(tasks[0], config), Workdir(work)
    paths = {task.subject.name: files.compared_subject(name, task.subject.name) for task in tasks}
    new = [task for task in tasks if not _is_done(paths[task.subject.name], task)]
    for part in (part for task in new for band in task.bands for part in band.parts):
        refuse_ends(part, "linear")
    for task in tasks:
        if task in new:
            _compute(task, config, device, paths[task.subject.name])
            give_back_memory()
        else:
            say(f"{task.subject.name}: already compared, {paths[task.subject.name]}")
    bands = tuple(band.name for band in tasks[0].bands)
    found = Comparison(
        bands=bands,
        made_of={band.name: band.titles for band in tasks[0].bands},
        rows=tuple(rows_of({subject: _read_sums(path) for subject, path in paths.items()}, bands)),
        folder=files.comparison(name),
        subjects=paths,
        new=tuple(task.subject.name for task in new),
    )
    _write(found, tasks, config, files, name)
    return found


def _sets(subjects: Sequence[Subject], config: CompareConfig, work: Path) -> dict[Subject, list[FeatureSet]]:
    """The features of each subject that --of chooses; subjects without any are left out, and it is said."""
    found = choose({subject: feature_sets(subject, work) for subject in subjects}, config.of, "--of")
    folder = Workdir(work).features
    if not any(found.values()):
        raise StoreError(
            folder,
            expected=f"complete features of {', '.join(subject.name for subject in subjects)}",
            found="none for these images",
            remedy="run 'extract' first",
        )
    say_without(found, folder, "extract")
    return {subject: sets for subject, sets in found.items() if sets}


def _task(subject: Subject, sets: Sequence[FeatureSet], config: CompareConfig, by: Split, work: Path) -> _Task:
    bands = bands_of(sets, config)
    say_partial(part for band in bands for part in band.parts)
    plan = plan_of(subject, bands, config, by)
    bands = on_folds(bands, plan)
    for part in {part.name: part for band in bands for part in band.parts}.values():
        refuse_leaks(subject, part, plan)
    digests = subject_digests(subject)
    key = {
        "kind": "comparison",
        "subject": subject.name,
        "bands": [band.key() for band in bands],
        "responses": response_digest(subject, work),
        "noise_ceiling": digests["noise_ceiling"],
        "rois": digests["rois"],
    }
    return _Task(subject, bands, plan, key | _settings(config, plan))


def _settings(config: CompareConfig, plan: FoldPlan) -> dict[str, Any]:
    """What decides numbers besides features and responses: folds, candidates, bootstrap, and how kernels are made."""
    return {
        "version": VERSION,
        "n_folds": int(plan.folds.max()) + 1,
        "folds": fingerprint({"folds": plan.folds.tolist(), "held_out": list(plan.held_out)}),
        "split": plan.by.key.to_json(),
        "n_candidates": config.n_candidates,
        "seed": config.seed,
        "bootstraps": N_DRAWS,
        "penalties": list(PENALTIES),
        "kernels": {"blur": BLUR, "floor": FLOOR, "landmarks": LANDMARKS},
    }


def _refuse_different_bands(tasks: Sequence[_Task]) -> None:
    """Raise ConfigError where subjects have bands of different features."""
    titles = [[(band.name, band.titles) for band in task.bands] for task in tasks]
    for task, of_subject in zip(tasks, titles, strict=True):
        if of_subject != titles[0]:
            raise ConfigError(
                "--features",
                expected=f"the same features for every subject, as {tasks[0].subject.name} has them",
                found=f"others for {task.subject.name}",
                remedy="extract them for all, choose with --of, or compare one --subject at a time",
            )


def _name(task: _Task, config: CompareConfig) -> str:
    """Name of the folder: what is compared, and digits that change with the features and with all settings."""
    decisive = {
        "bands": [[band.name, band.titles] for band in task.bands],
        "folds": [config.n_folds, config.fold_seed, config.split, list(task.plan.held_out)],
        "settings": [config.n_candidates, config.seed],
    }
    return f"{config.band_set or 'bands'}-{fingerprint(decisive)[:12]}"


def _is_done(path: Path, task: _Task) -> bool:
    if not path.is_file():
        return False
    try:
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            for name in arrays.files:  # which holds each of them against its checksum
                _ = arrays[name]
            return bool(parse_json(str(arrays["key"])) == json.loads(json.dumps(task.key)))
    except DAMAGED_NPZ as error:
        say(f"{path}: compared again, because the file is damaged ({first_line(error)})")
        return False


def _compute(task: _Task, config: CompareConfig, device: str, path: Path) -> None:
    """Compare the bands of one subject, and write its file."""
    subject, plan, n_bands = task.subject, task.plan, len(task.bands)
    windows = [Prior()]
    candidates = candidates_of(n_bands, config.n_candidates, windows, config.seed)
    fixed, per_vertex = needed_bytes(plan, n_bands, len(windows))
    n_vertices = sum(subject.n_vertices.values())
    block = block_on(device, fixed, per_vertex, n_vertices, config.max_memory)
    say(
        f"{subject.name}: {n_bands} bands, {len(candidates)} candidates, {len(plan.outside(0)):,} images to fit to"
        f"{', by kernels with landmark images' if is_sampled(plan) else ''}: {block:,} vertices at a time; "
        + said_on(device, fixed + block * per_vertex + (0 if on_cuda(device) else memory_at_start()))
    )
    held = spare_memory(config.max_memory) * FEATURE_SHARE
    spaces = spaces_of(task.bands, plan, windows, device, held=held)
    weights = image_weights(plan.image_ids, config.seed).astype(np.float32)
    draws = torch.from_numpy(np.concatenate([np.ones((1, plan.n_train), np.float32), weights])).to(device)
    groups = [(surface, roi) for surface in subject.surfaces for roi in (*subject.rois[surface], EVERYTHING)]
    sums = GroupSums.empty(groups, len(measures_of(n_bands)), len(draws))
    shape = len(measures_of(n_bands))
    without = [measure.kind in WITHOUT_INTERVAL for measure in measures_of(n_bands)]
    vertices = {
        f"{surface}/{name}": np.empty((shape, n), np.float32)
        for surface, n in subject.n_vertices.items()
        for name in ("values", "low", "high")
    }
    with bar(f"{subject.name} {config.band_set or 'bands'}", n_vertices * len(plan), "heads") as advance:
        for pieces in blocks_of(subject, block):
            shares = _shares(subject, pieces, plan, spaces, candidates, draws, advance)
            first = 0
            for surface, part in pieces:
                of_piece = shares[..., first : first + part.stop - part.start]
                first += part.stop - part.start
                ceiling = subject.noise_ceiling[surface]
                masks = {roi: mask[part] for roi, mask in subject.rois[surface].items()}
                masks[EVERYTHING] = np.ones(of_piece.shape[-1], dtype=bool)
                sums = sums.plus(surface, of_piece, masks, None if ceiling is None else ceiling[part])
                low, high = interval(of_piece.swapaxes(0, 1))
                low[without], high[without] = np.nan, np.nan
                for name, values in (("values", of_piece[:, 0]), ("low", low), ("high", high)):
                    vertices[f"{surface}/{name}"][:, part] = values
    _save(path, task, sums, vertices)


def needed_bytes(plan: FoldPlan, n_bands: int, n_windows: int) -> tuple[float, float]:
    """(fixed bytes, bytes per vertex) of the comparison of one subject."""
    n_fit = max(len(plan.outside(k)) for k in range(len(plan)))
    n_held = max(len(plan.inside(k)) for k in range(len(plan)))
    columns, n_models, n_parts = n_columns(plan), len(models_of(n_bands)), max(map(plan.n_choices, range(len(plan))))
    kernels = 4.0 * plan.n_scales * n_windows * n_bands * plan.n_train * columns
    fixed = kernels + 28.0 * plan.n_train * columns + 16.0 * MAX_NUMBERS_AT_ONCE
    rank = min(n_fit, columns)
    # responses and their fit; what images count for in every model, and products of every band; a few more of each
    images = plan.n_train + 8 * n_fit + 5 * rank + n_parts * n_fit * n_models + n_held * (n_models + 3 * n_bands + 6)
    draws = (1 + N_DRAWS) * (n_models + 3 + 3 * len(measures_of(n_bands)))
    return fixed, 4.0 * images + 8.0 * draws


Piece = tuple[str, slice]  # some vertices of a surface


def blocks_of(subject: Subject, size: int) -> Iterator[list[Piece]]:
    """The vertices of all surfaces, so many at a time, as pieces of surfaces."""
    pieces: list[Piece] = []
    room = size
    for surface, n_vertices in subject.n_vertices.items():
        start = 0
        while start < n_vertices:
            stop = min(start + room, n_vertices)
            pieces.append((surface, slice(start, stop)))
            start, room = stop, room - (stop - start)
            if room == 0:
                yield pieces
                pieces, room = [], size
    if pieces:
        yield pieces


def _shares(
    subject: Subject,
    pieces: Sequence[Piece],
    plan: FoldPlan,
    spaces: Sequence[Spaces],
    candidates: Sequence[Candidate],
    draws: torch.Tensor,
    advance: Callable[[int], None],
) -> np.ndarray:
    """(n_measures, n_draws, n_vertices) of one block of vertices."""
    columns = [np.asarray(subject.responses(surface)[:, part], dtype=np.float32) for surface, part in pieces]
    responses = torch.from_numpy(np.concatenate(columns, 1)).to(draws.device)
    sums = VarianceSums(len(candidates[0].weights), draws)
    for k in range(len(plan)):
        sums.add(fit_fold(spaces[plan.scales(k)], plan, k, responses, candidates))
        advance(responses.shape[1])
    return sums.shares()


def _save(path: Path, task: _Task, sums: GroupSums, vertices: dict[str, np.ndarray]) -> None:
    measures = measures_of(len(task.bands))
    names = [task.bands[measure.band].name if measure.band is not None else "" for measure in measures]
    arrays = {name: np.asarray(part) for name, part in sums._asdict().items()}
    # the folder may be renewed meanwhile by a process that compares other subjects in the same way
    with only_writer(path.parent.parent, wait=True), whole_file(path) as partial:
        np.savez_compressed(
            partial,
            allow_pickle=False,
            key=np.array(json.dumps(task.key)),
            measures=np.array([measure.kind for measure in measures]),
            bands=np.array(names),
            **arrays,
            **vertices,
        )


def _read_sums(path: Path) -> GroupSums:
    with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
        groups = [(str(surface), str(roi)) for surface, roi in arrays["groups"]]
        return GroupSums(groups, *(arrays[name] for name in GroupSums._fields[1:]))


def _write(found: Comparison, tasks: Sequence[_Task], config: CompareConfig, files: Workdir, name: str) -> None:
    content = {
        "bands": found.made_of,
        "keys": {task.subject.name: task.key for task in tasks},
        "versions": {"featcache": featcache.__version__, "torch": torch.__version__},
        "rows": [row.to_json() for row in found.rows],
    }
    drawn = can_draw("the shares")
    with renewed_folder(files.comparison(name), keep="*.npz") as folder:
        write_table(folder / files.compared_shares(name).name, found.table())
        if config.per == "vertex":
            write_table(folder / files.compared_vertices(name).name, list(vertex_records(found)))
        elif files.compared_vertices(name).is_file() and _is_of(files.compared_json(name), content):
            link_or_copy(files.compared_vertices(name), folder / files.compared_vertices(name).name)
        write_document(folder / files.compared_json(name).name, content)
        if drawn:
            plot_shares(folder / files.compared_picture(name).name, found)


def _is_of(path: Path, content: Mapping[str, Any]) -> bool:
    """Whether an earlier description is of the same bands, subjects and responses."""
    try:
        earlier = read_document(path, dict[str, Any])
        return bool(earlier["keys"] == json.loads(json.dumps(content["keys"])))
    except (OSError, ValueError, KeyError, TypeError):
        return False


def vertex_records(found: Comparison) -> Iterator[dict[str, Any]]:
    """A record for each vertex, measure and band, with its interval, from the files of subjects."""
    for subject, path in found.subjects.items():
        with open_regular(path) as file, np.load(file, allow_pickle=False) as arrays:
            measures = list(zip(arrays["measures"].tolist(), arrays["bands"].tolist(), strict=True))
            for surface in dict.fromkeys(str(surface) for surface, _ in arrays["groups"]):
                numbers = [arrays[f"{surface}/{one}"] for one in ("values", "low", "high")]
                for vertex in range(numbers[0].shape[1]):
                    for number, (kind, band) in enumerate(measures):
                        value, *ends = (float(of_kind[number, vertex]) for of_kind in numbers)
                        low, high = (None if np.isnan(end) else end for end in ends)
                        place = {"subject": subject, "surface": surface, "vertex": vertex}
                        yield place | {"measure": kind, "band": band, "value": value, "low": low, "high": high}
