"""Prediction stores of the work folder -> blend, scores on folds it was not learnt on, weights and submission."""

import importlib.metadata
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch

from featcache.dataset.splits import Split, SplitKey
from featcache.dataset.subject import Dataset, Subject
from featcache.machine.documents import write_document
from featcache.machine.files import file_checksum, only_writer, refuse_full_disk, replace_bytes
from featcache.machine.folders import link_or_copy, read_unchanged, replace_folder, restore_folder, staged_folder
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar, say
from featcache.workdir import Workdir
from heads.blend.models import Model, SubjectModels, chosen_on, find_models, has_ceilings, names_of, split_of_models
from heads.blend.plot import Shares, plot_scores, plot_weights
from heads.blend.products import N_FOLDS, SEED
from heads.blend.saved import Coefficients, SavedBlend, load_blend, refuse_strangers, save_blend
from heads.blend.scores import write_scores
from heads.blend.subject import Blended, blend_subject, mean_weights, vertex_scores
from heads.blend.submission import PREDICTIONS, write_predictions, write_zip
from heads.blend.uncertainty import Gain, Null, gains, null
from heads.config import BlendConfig
from heads.scores.metrics import VertexScores
from heads.scores.withheld import score_test


@dataclass(frozen=True)
class Ensemble:
    """The result of a blend.

    scores : {'best single' | 'uniform' | 'blend': scores per subject and surface}, weights learnt on other folds;
        of one model, 'blend' alone
    gains : of the blend over the other two; points of accuracy, or r without ceilings
    null : of shuffled responses; None of one model
    accuracy : whether there are ceilings
    weights : mean over the vertices of an ROI, and of 'all'
    unused : models without weight at any vertex of any subject
    chosen_on : models whose scores are of images on which the epoch of their backbone was chosen
    test : {'blend': scores per subject and surface} on the test images, of subjects whose test responses are given
    submission : the zip; None where the dataset is not the challenge's, or a subject of it has no predictions
    """

    scores: Mapping[str, Sequence[VertexScores]]
    gains: Sequence[Gain]
    null: Null | None
    accuracy: bool
    weights: Shares
    unused: Sequence[str]
    chosen_on: Sequence[str]
    test: Mapping[str, Sequence[VertexScores]]
    submission: Path | None


def blend(
    dataset: Dataset, config: BlendConfig, work: Path | str, subjects: Sequence[Subject] | None = None
) -> Ensemble:
    """Blend the models of some subjects of a dataset; None: of all. The submission then has these subjects alone.

    Raises StoreError or ConfigError where there is nothing to blend.
    """
    work = Path(work)
    files = Workdir(work)
    keep_freed_memory()
    _tidy(files)
    models = find_models(dataset.subjects if subjects is None else subjects, work, config.models, config.exclude)
    by = split_of_models(models, work)
    _say_what_is_unusual(models)
    accuracy = has_ceilings(list(models))
    refuse_full_disk(work, _bytes_of(models, dataset))
    with staged_folder(files.submission) as staging:
        ensemble = _blend(models, config, work, by, accuracy, staging)
        return replace(ensemble, submission=_publish(staging, files, dataset, models))


def _blend(
    models: SubjectModels, config: BlendConfig, work: Path, by: Split, accuracy: bool, staging: Path
) -> Ensemble:
    """Blend the models of every subject, and write all but the zip into an empty folder."""
    files, several = Workdir(work), len(names_of(models)) > 1  # one model alone is its own best single, and uniform
    blends: dict[Subject, Blended] = {}
    test_scores: list[VertexScores] = []
    with bar(f"blend {config.label}", len(models), "subjects") as advance:
        for subject, of_subject in models.items():
            blends[subject] = blend_subject(subject, of_subject, config, accuracy, by, several)
            test_scores += _write_test(staging, subject, blends[subject].coefficients, of_subject)
            advance(1)
    resampled = [blended.resampled for blended in blends.values() if blended.resampled is not None]
    ensemble = Ensemble(
        scores={
            name: [score for subject, blended in blends.items() for score in vertex_scores(subject, blended.r[name])]
            for name in (("best single", "uniform", "blend") if several else ("blend",))
        },
        gains=gains(resampled) if several else [],
        null=null(resampled) if several else None,
        accuracy=accuracy,
        weights={subject.name: mean_weights(subject, blended) for subject, blended in blends.items()},
        unused=_unused(list(blends.values())),
        chosen_on=chosen_on(models, work),
        test={"blend": test_scores} if test_scores else {},
        submission=None,
    )
    save_blend(
        staging / files.saved_blend.name,
        {subject.name: blended.coefficients for subject, blended in blends.items()},
        {subject.name: blended.nested for subject, blended in blends.items()},
        {subject.name: of_subject[0].key.responses for subject, of_subject in models.items()},
    )
    write_document(staging / files.blend_weights.name, _description(models, config, by.key, blends, ensemble))
    on_test = {f"{name}, test images": scores for name, scores in ensemble.test.items()}
    write_scores(staging / files.blend_scores.name, {**ensemble.scores, **on_test})
    plot_scores(staging / files.scores_picture.name, ensemble.scores["blend"])
    plot_weights(staging / files.blend_picture.name, ensemble.weights, {subject.name: subject for subject in blends})
    return ensemble


def apply(dataset: Dataset, saved: Path, work: Path, subjects: Sequence[Subject] | None = None) -> Path | None:
    """Put predictions of the same models, such as of other test images, through a blend. The zip, as in `Ensemble`.

    subjects : as for `blend`

    Raises StoreError for a file that is no blend, a subject that it does not have, or a model that is not there.
    """
    files = Workdir(work)
    _tidy(files)
    models = find_models(dataset.subjects if subjects is None else subjects, work)
    coefficients, contents = read_unchanged(saved.parent, partial(_read_saved, saved, models, files))
    refuse_full_disk(work, _bytes_of(models, dataset))
    with staged_folder(files.submission) as staging:
        for subject, of_subject in models.items():
            _write_test(staging, subject, coefficients[subject.name], of_subject)
        for name, content in contents.items():
            replace_bytes(staging / name, content)
        return _publish(staging, files, dataset, models)


def _read_saved(saved: Path, models: SubjectModels, files: Workdir) -> tuple[SavedBlend, dict[str, bytes]]:
    """A blend, and its file and those beside it as they are. Raises StoreError for one that is not of these models."""
    coefficients = load_blend(saved)
    refuse_strangers(saved, coefficients, models)
    contents = {files.saved_blend.name: saved.read_bytes()}
    for file in (files.blend_weights, files.blend_picture, files.blend_scores, files.scores_picture):
        if (beside := saved.with_name(file.name)).is_file():
            contents[file.name] = beside.read_bytes()
    return coefficients, contents


def _say_what_is_unusual(models: SubjectModels) -> None:
    if any(model.backbone_trained for of_subject in models.values() for model in of_subject):
        say(
            "on test images a model of a trained backbone is the mean over the networks of all folds: it is better "
            "there than out of fold, and what a blend gains is other than said (docs/blend.md)"
        )
    alone: dict[str, list[str]] = {}
    for subject, of_subject in models.items():
        if len(of_subject) == 1:
            alone.setdefault(of_subject[0].name, []).append(subject.name)
    for name, subjects in alone.items():
        say(f"{', '.join(subjects)}: one model only, {name}: it is passed through as it is")
    for subject, of_subject in models.items():
        names = [model.name for model in of_subject]
        if missing := [name for name in names_of(models) if name not in names]:
            say(f"{subject.name}: blended without {', '.join(missing)}, of which it has no predictions")
        folds = {model.key.folds: model.name for model in of_subject}
        if len(folds) > 1:
            which = ", ".join(f"{n} folds of seed {seed} ({name})" for (n, seed), name in folds.items())
            say(f"{subject.name}: models of different folds: {which}; all are out of fold, and blended")


def _write_test(
    folder: Path, subject: Subject, coefficients: Mapping[str, Coefficients], models: Sequence[Model]
) -> list[VertexScores]:
    """Write the blend of the test images, and score it on each surface where their responses are given."""
    if not len(subject.test):
        return []
    stores, n_train = {model.name: model.store for model in models}, len(subject.train)
    scores = []
    for surface, of_surface in coefficients.items():
        test = of_surface.apply(surface, stores, n_train, n_train + len(subject.test))
        write_predictions(folder, subject, surface, test)
        if subject.has_test_responses:
            scores.append(score_test(subject, surface, test))
    return scores


def _unused(blends: Sequence[Blended]) -> list[str]:
    columns = [
        (model, column) for blended in blends for model, column in zip(blended.models, blended.weights.T, strict=True)
    ]
    used = {model for model, column in columns if column.any()}
    return [model for model in dict.fromkeys(model for model, _ in columns) if model not in used]


def _description(
    models: SubjectModels,
    config: BlendConfig,
    by: SplitKey,
    blends: Mapping[Subject, Blended],
    ensemble: Ensemble,
) -> dict[str, Any]:
    """What weights.json holds: everything that it takes to make the blend again, and its weights."""
    return {
        **{name: getattr(config, name) for name in ("method", "per", "by", "seed")},
        "folds": {"n_folds": N_FOLDS, "seed": SEED} | by.to_json(),
        # torch says of itself for which CUDA it was built
        "versions": {name: importlib.metadata.version(name) for name in ("featcache", "numpy", "torch", "zarr")}
        | {"torch": torch.__version__},
        "members": {
            subject.name: {
                model.name: {"predictions": model.store.name, "features": model.facts.features} for model in of_subject
            }
            for subject, of_subject in models.items()
        },
        "choices": {subject.name: [vars(choice) for choice in blended.choices] for subject, blended in blends.items()},
        "gains": [vars(gain) for gain in ensemble.gains],
        "unused": ensemble.unused,
        "weights": ensemble.weights,
    }


def _bytes_of(models: SubjectModels, dataset: Dataset) -> int:
    """About the bytes of a submission: predictions in the folder and in the zip, and coefficients out of fold."""
    n_bytes = 0
    for subject, of_subject in models.items():
        coefficients = (len(of_subject) + 1) * (N_FOLDS + 1)
        n_bytes += 4 * sum(subject.n_vertices.values()) * ((1 + dataset.challenge) * len(subject.test) + coefficients)
    return n_bytes


def _tidy(files: Workdir) -> None:
    """Put right what a process left that ended while it handed in a blend, and remove what it had begun."""
    if not files.root.is_dir():
        return
    shutil.rmtree(files.earlier_staging, ignore_errors=True)
    with only_writer(files.root, wait=True):
        restore_folder(files.submission)
        if files.blend_zip.is_file() and not files.submission_zip.exists():
            link_or_copy(files.blend_zip, files.submission_zip)


def _publish(staging: Path, files: Workdir, dataset: Dataset, models: SubjectModels) -> Path | None:
    """Replace an older submission as a whole, with the challenge's zip. None, and no zip, where that is incomplete.

    The zip is in the folder, so that it is of the same blend at any time; the name beside the folder is given to it
    afterwards. Of several blends at once, the last one stays.

    Subjects of another blend are not kept beside those of this one: weights and scores in the folder are of one blend.
    """
    whole = dataset.challenge and len(models) == len(dataset.subjects)
    if whole:
        write_zip(staging, dataset.subjects, staging / files.blend_zip.name)
    _record_files(staging, files)
    blended = {subject.name for subject in models}
    with only_writer(files.root, wait=True):
        restore_folder(files.submission)
        if gone := sorted({path.parent.name for path in files.submission.glob(f"*/{PREDICTIONS}")} - blended):
            names = ", ".join(gone)
            say(f"{files.submission}: predictions of {names} by an earlier blend were removed: it has one blend")
        _take_away_zip(files)
        replace_folder(staging, files.submission)
        if whole:
            link_or_copy(files.blend_zip, files.submission_zip)
    return files.submission_zip if whole else None


def _record_files(staging: Path, files: Workdir) -> None:
    """Write the checksums of what is handed in or read again, by which `verify` finds a changed or missing file."""
    names = (f"*/{PREDICTIONS}", files.saved_blend.name, files.blend_weights.name, files.blend_zip.name)
    paths = sorted(path for name in names for path in staging.glob(name))
    checksums = {path.relative_to(staging).as_posix(): file_checksum(path) for path in paths}
    write_document(staging / files.blend_files.name, checksums)


def _take_away_zip(files: Workdir) -> None:
    """Have the older zip in its folder alone. One of an earlier version, which is not there, goes there first."""
    if files.submission_zip.exists() and files.submission.is_dir() and not files.blend_zip.exists():
        os.replace(files.submission_zip, files.blend_zip)
    files.submission_zip.unlink(missing_ok=True)
