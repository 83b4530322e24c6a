"""Feature stores -> prediction stores: out-of-fold and test predictions, and the heads that made them."""

import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from featcache.backbone.trainings import Trainings
from featcache.cache.known_rows import KnownRows
from featcache.cache.store import NotFiniteError, Row, Store, create_store, list_stores, open_store, store_path
from featcache.config import settings_key
from featcache.dataset.digests import subject_digests
from featcache.dataset.grouping import split_of
from featcache.dataset.image_lists import SubjectDigests
from featcache.dataset.responses import refuse_unfit
from featcache.dataset.splits import Split, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, DataError, StoreError
from featcache.machine.device import check_products, matrix_products, resolve_device
from featcache.machine.files import refuse_full_disk, remove_leftovers
from featcache.machine.memory import give_back_memory, keep_freed_memory, memory_at_start
from featcache.machine.progress import bar, say
from featcache.machine.tensors import Spool, as_float32, write_tensors
from featcache.workdir import Workdir
from heads.config import HEADS, FitConfig
from heads.features.sets import FeatureSet, choose, feature_sets, layer_of, say_partial, say_without
from heads.fit.ends import refuse_ends
from heads.fit.known_fits import agree, find_known_fit, take_known_fit
from heads.fit.names import PredictionFacts, PredictionKey, prediction_key
from heads.fit.out_of_fold import predict_surface
from heads.fit.short_names import split_names, without_digits
from heads.fit.sizes import FitSizes, prediction_bytes, saved_bytes
from heads.fit.stored import prediction_rows, type_of, write_predictions
from heads.modules.readout import HeadKind, HeadTensors, InMemory, SavedHeads
from heads.scores.metrics import VertexScores, pearson_r
from heads.scores.withheld import score_test
from heads.solvers.base import Problem, Shared, Solver, Trainee
from heads.solvers.held_out import FoldPlan
from heads.solvers.registry import build_solver

_TEST_ROWS = 512  # test images whose features are in memory at a time


@dataclass(frozen=True)
class Fitted:
    """One subject's prediction store for one model.

    path, weights : the store, and the file of the heads
    new : whether it was fitted now
    """

    subject: str
    model: str
    path: Path
    weights: Path
    new: bool
    seconds: float


def fit_heads(
    subjects: Sequence[Subject], config: FitConfig, work: Path | str, by: Split | None = None
) -> list[Fitted]:
    """Fit the heads that `config` names, for each of its losses, to every set of features of these subjects.

    Each gives a prediction store: out-of-fold predictions of the training images, then the test images' predictions,
    the mean over the folds' heads. Raises StoreError if there is nothing to fit to.

    by : which images stay together in the folds; None: what `config.split` says of these subjects alone
    """
    work = Path(work)
    device = resolve_device(config.device)
    if device == "cpu":
        keep_freed_memory()
    memory_at_start()
    for folder in (Workdir(work).predictions, Workdir(work).heads):  # of runs that were killed, also if all is fitted
        remove_leftovers(folder)
    check_products("products", config.products, config.device)
    variants = config.variants()
    _refuse_missing_rois(subjects, variants[0])
    refuse_unfit(subjects, work)
    by = split_of(config.split, subjects, work) if by is None else by
    trainees = _trainees(subjects, variants[0], work, by)
    # one training for several subjects serves one loss; other fits share what their losses have in common
    runs = [[variant] for variant in variants] if variants[0].joint else [variants]
    labels = _labels(trainees, variants, work)
    _refuse_full_disk([problem for run in runs for problem in _problems(trainees, run, device, work)], work)
    fits = [fit for together in runs for fit in _fit_variants(trainees, together, device, work, labels)]
    order = {trainee: number for number, trainee in enumerate(trainees)}
    return [fitted for _, fitted in sorted(fits, key=lambda fit: order[fit[0]])]


@dataclass(frozen=True)
class FitPart:
    """One model of one subject, or of the subjects that are trained together.

    config : with its one loss, and the features and layers that it reads
    inputs : what decides the predictions, as JSON has it, and is the same on every machine
    """

    subjects: tuple[Subject, ...]
    name: str
    config: FitConfig
    inputs: Mapping[str, Any]


def fit_parts(subjects: Sequence[Subject], config: FitConfig, work: Path, by: Split) -> list[FitPart]:
    """What `fit_heads` does, in parts that share nothing but files; `fit_heads` does each."""
    variants = config.variants()
    _refuse_missing_rois(subjects, variants[0])
    trainees = _trainees(subjects, variants[0], work, by)
    digests = {subject: SubjectDigests.of(subject, work).to_json() | subject_digests(subject) for subject in subjects}
    # what is read is told by names of stores and arrays, and losses that share an objective have the same heads
    settings = [
        settings_key(replace(one, loss=FitConfig.loss, features=FitConfig.features, layers=FitConfig.layers))
        | {"objective": one.objective}
        for one in variants
    ]
    parts = []
    for group in _groups(trainees, variants[0], work):
        features = group[0].features
        title = ",".join(dict.fromkeys(each.features.title for each in group))
        one_layer = ",".join(dict.fromkeys(map(layer_of, features.names))) if config.layers == "each" else ""
        name = " ".join([", ".join(each.subject.name for each in group), title, *([one_layer] if one_layer else [])])
        inputs = {
            "subjects": {each.subject.name: digests[each.subject] for each in group},
            "features": [each.features.name for each in group],
            "arrays": list(features.names),
            "split": by.key.to_json(),
        }
        for variant, deciding in zip(variants, settings, strict=True):
            one = replace(variant, features=title, layers=one_layer or variant.layers)
            members = tuple(each.subject for each in group)
            parts.append(FitPart(members, f"{name} {one.head} {one.loss}", one, inputs | {"settings": deciding}))
    return parts


def _labels(trainees: Sequence[Trainee], variants: Sequence[FitConfig], work: Path) -> dict[str, str]:
    """{model: what tells it from the other models that are fitted now}, for progress bars."""
    one_of_each = {(trainee.features.title, trainee.features.names): trainee for trainee in trainees}.values()
    keys = (
        prediction_key(one.subject, one.features, one.plan, config, work) for one in one_of_each for config in variants
    )
    models = list(dict.fromkeys(key.model for key in keys))
    shorter = without_digits(split_names(models)[1])
    return dict(zip(models, [model.split(" ")[0] for model in models] if len(models) == 1 else shorter, strict=True))


def _refuse_missing_rois(subjects: Sequence[Subject], config: FitConfig) -> None:
    """Raise ConfigError for heads of ROIs where no subject has any ROI."""
    reads_rois = config.solver_spec.fits and HEADS[config.head].reads_rois
    if reads_rois and not any(subject.has_rois for subject in subjects):
        raise ConfigError(
            f"--head {config.head}",
            expected="one or more ROIs in roi_masks",
            found="none",
            remedy="use --head linear",
        )


def _trainees(subjects: Sequence[Subject], config: FitConfig, work: Path, by: Split) -> list[Trainee]:
    """Every set of features that heads are fitted to. Raises StoreError or ConfigError where there is none.

    Raises LeakError for features of a backbone that was trained under another split.
    """
    takes_heads = not config.solver_spec.fits
    listed = list_stores(Workdir(work).features)
    found = choose({subject: feature_sets(subject, work, listed) for subject in subjects}, config.features)
    stored = {subject: _suitable(sets, subject, takes_heads) for subject, sets in found.items()}
    if not any(stored.values()):
        raise StoreError(
            Workdir(work).features,
            expected=f"complete features of {', '.join(subject.name for subject in subjects)}",
            found=f"none for the images of this tree{' from a checkpoint with heads' if takes_heads else ''}",
            remedy="run 'pretrain' or 'finetune', then 'extract'" if takes_heads else "run 'extract' first",
        )
    say_without(stored, Workdir(work).features, "extract")
    read = [
        (subject, part) for subject, sets in stored.items() for each in sets for part in each.reading(config.layers)
    ]
    if not read:
        known = dict.fromkeys(layer_of(name) for sets in stored.values() for each in sets for name in each.names)
        raise ConfigError(
            "--layers",
            expected=f"all, each, or layers that were extracted ({', '.join(known)})",
            found=repr(config.layers),
            remedy="choose among those, or extract others first",
        )
    say_partial(features for _, features in read)
    if takes_heads:
        from heads.solvers.trained import read_by_its_heads  # loads timm, which takes seconds

        read = [(subject, read_by_its_heads(features, work)) for subject, features in read]
    return [
        Trainee(subject, features, FoldPlan.of_features(subject, features, config.n_folds, config.seed, by))
        for subject, features in read
    ]


def _suitable(sets: Sequence[FeatureSet], subject: Subject, takes_heads: bool) -> list[FeatureSet]:
    """The sets that have heads to take, if heads are taken; what is left out is named."""
    if not takes_heads:
        return list(sets)
    for features in sets:
        if not features.backbone_trained:
            say(f"{subject.name}: left out {features.name}: no heads were trained with a frozen backbone")
    return [features for features in sets if features.backbone_trained]


def _fit_variants(
    trainees: Sequence[Trainee], variants: Sequence[FitConfig], device: str, work: Path, labels: Mapping[str, str]
) -> Iterator[tuple[Trainee, Fitted]]:
    """Fit several losses to each set of features, which is read once for all of them."""
    for group in _groups(trainees, variants[0], work):
        shared = Shared()
        for trainee in group:
            for config in variants:
                yield trainee, _fit(_problem(trainee, group, config, device, work, shared), labels)
            give_back_memory()


def _problem(
    trainee: Trainee, group: Sequence[Trainee], config: FitConfig, device: str, work: Path, shared: Shared
) -> Problem:
    return Problem(
        subject=trainee.subject,
        features=trainee.features,
        plan=trainee.plan,
        config=config,
        device=device,
        work=work,
        trainees=tuple(group),
        shared=shared,
    )


def _problems(trainees: Sequence[Trainee], variants: Sequence[FitConfig], device: str, work: Path) -> Iterator[Problem]:
    """Every fit, as it will be."""
    for group in _groups(trainees, variants[0], work):
        for trainee in group:
            for config in variants:
                yield _problem(trainee, group, config, device, work, Shared())


def _refuse_full_disk(problems: Sequence[Problem], work: Path) -> None:
    """Raise StoreError where the disk has no room for the predictions and heads of every fit that is not there yet."""
    new = [(problem, place) for problem in problems if not (place := _place(problem)).done]
    sizes = [FitSizes.of(problem) for problem, _ in new]
    heads = [saved_bytes(of, problem.config) for of, (problem, _) in zip(sizes, new, strict=True)]
    needed = sum(heads) + max(heads, default=0)  # those of one fit are in files of their own until all are there
    predictions = [
        prediction_bytes(of, _n_together(problem), problem.config.dtype) - place.n_written
        for of, (problem, place) in zip(sizes, new, strict=True)
    ]
    try:
        refuse_full_disk(work, int(needed + sum(predictions)))
    except StoreError:  # unless most rows are there, in stores that they can be taken from
        known = [find_known_fit(problem, place.key.to_json()) is not None for problem, place in new]
        refuse_full_disk(work, int(needed + sum(n for n, taken in zip(predictions, known, strict=True) if not taken)))


def _groups(trainees: Sequence[Trainee], config: FitConfig, work: Path) -> list[list[Trainee]]:
    """Who is trained together: with a joint training the subjects of one model, else each alone."""
    if not config.joint:
        return [[trainee] for trainee in trainees]
    groups: dict[str, list[Trainee]] = {}
    for trainee in trainees:
        model = prediction_key(trainee.subject, trainee.features, trainee.plan, config, work).model
        groups.setdefault(f"{model} {trainee.features.names}", []).append(trainee)
    return list(groups.values())


def _key(problem: Problem) -> PredictionKey:
    """The key of one fit, with those of the other subjects where several are trained together."""
    keys = {
        trainee.subject: prediction_key(trainee.subject, trainee.features, trainee.plan, problem.config, problem.work)
        for trainee in problem.trainees
    }
    key = keys.pop(problem.subject)
    return replace(key, joint={subject.name: other.to_json() for subject, other in keys.items()}) if keys else key


@dataclass(frozen=True)
class _Place:
    """Where the predictions and the heads of one fit are, or will be."""

    key: PredictionKey
    label: str
    path: Path
    weights: Path
    store: Store | None

    @property
    def done(self) -> bool:
        return self.store is not None and self.store.complete and self.weights.exists()

    @property
    def n_written(self) -> int:
        """Bytes of the rows that an interrupted run left."""
        if self.store is None:
            return 0
        rows = ((n, self.store.arrays[name]) for name, n in self.store.committed.items())
        return sum(n * array.shape[1] * array.dtype.itemsize for n, array in rows)


def _place(problem: Problem) -> _Place:
    key, files = _key(problem), Workdir(problem.work)
    # of the key and not of the options: those that a solver does not read must not make another store
    label = "-".join([problem.subject.name, problem.features.label, *key.head_words])
    path = store_path(files.predictions, label, key.to_json())
    return _Place(key, label, path, files.head_weights(path.name), open_store(path) if path.is_dir() else None)


def _fit(problem: Problem, labels: Mapping[str, str]) -> Fitted:
    """Fit one model of one subject, or find it fitted. labels : of models, for progress bars"""
    began = time.perf_counter()
    subject, features, plan = problem.subject, problem.features, problem.plan
    place = _place(problem)
    key, path, weights, store = place.key, place.path, place.weights, place.store
    if place.done:
        say(f"{subject.name}: already fitted, {path}")
        return Fitted(subject.name, key.model, path, weights, False, time.perf_counter() - began)
    refuse_leaks(subject, features, plan)
    known = find_known_fit(problem, key.to_json())
    if known is None and problem.config.solver_spec.fits:
        for trainee in problem.trainees or (problem,):
            refuse_ends(trainee.features, problem.config.head)
    solver = build_solver(problem) if known is None else None  # what cannot be fitted must not leave a store
    if store is None:
        facts = PredictionFacts(
            model=key.model,
            features=features.name,
            torch=torch.__version__,
            # for whoever blends, when features and checkpoints may be gone
            seen_ids=[seen.tolist() for seen in features.seen_ids()] if plan.backbone_trained else None,
        )
        ids, n_scored = np.concatenate([subject.train.ids[plan.scored], subject.test.ids]), len(plan.scored)
        rows = prediction_rows(subject.n_vertices, type_of(problem.config.dtype, _n_together(problem)))
        if known is not None:  # as they are in the store that they are taken from
            rows = {name: Row(row.shape, str(known.stores[0].arrays[name].dtype)) for name, row in rows.items()}
        store = create_store(path.parent, place.label, key.to_json(), ids, n_scored, rows, facts.to_json())
    with matrix_products(problem.config.products):
        new = known is None or not _take(problem, known, store)
        if new:
            label = f"{subject.name} {labels.get(key.model, key.model)}"
            try:
                new = _fill(problem, solver or build_solver(problem), store, weights, label)
            except DataError:  # the same run would end in the same way: no store is left for it
                shutil.rmtree(store.path)
                raise
            except NotFiniteError as error:
                shutil.rmtree(store.path)
                raise StoreError(
                    f"{subject.name}, {key.model}",
                    expected="finite predictions",
                    found=f"{error.found} (of [image, vertex], from 0)",
                    remedy="scale the responses or features, or fit with another --loss or a lower --learning-rate",
                ) from error
    return Fitted(subject.name, key.model, path, weights, new, time.perf_counter() - began)


def _take(problem: Problem, known: KnownRows, store: Store) -> bool:
    """Take the predictions of heads that were fitted to the same images; False where that cannot be."""
    kind = head_kind(PredictionKey.from_json(store.key), problem.subject)
    by = partial(_by_saved_heads, problem, kind)
    return take_known_fit(problem, known, store, _metadata(store), by)


def _metadata(store: Store) -> dict[str, str]:
    """What the file of a store's heads says of them."""
    facts = PredictionFacts.from_json(store.facts)
    return {"model": facts.model, "predictions": store.name, "features": facts.features}


def refuse_leaks(subject: Subject, features: FeatureSet, plan: FoldPlan) -> None:
    """Raise LeakError where an image that is scored was trained on, by the heads or by the backbone before them."""
    ids = plan.image_ids
    refuse_leak(ids, subject.test.ids, f"the test split of {subject.name}")
    for fold in np.unique(plan.folds):
        refuse_leak(ids[plan.folds != fold], ids[plan.folds == fold], f"fold {fold} of {subject.name}", plan.by)
    for k, (store, seen) in enumerate(zip(features.stores, features.seen_ids(), strict=True)):
        scored = ids[plan.inside(k)] if features.backbone_trained else ids
        refuse_leak(seen, scored, f"{store.name} of {subject.name}", plan.by)
        refuse_leak(seen, subject.test.ids, f"the test split of {subject.name}")


def _fill(problem: Problem, solver: Solver, store: Store, weights: Path, label: str) -> bool:
    """Fit every surface; one surface's predictions are stored before the next has its own. label : of the bar

    False where another process has filled the store since it was opened.
    """
    subject = problem.subject
    tensors: dict[str, torch.Tensor] = {}
    spool = Spool(Workdir(problem.work).heads)
    with store.writing():
        store = open_store(store.path)  # as the writer before this one left it
        if store.complete and weights.exists():
            say(f"{subject.name}: fitted by another process meanwhile, {store.path}")
            return False
        with bar(label, sum(problem.n_vertices), "vertices") as advance:
            for surface in subject.surfaces:
                tensors |= _fill_surface(problem, solver, store, surface, spool, advance)
            write_tensors(weights, tensors, _metadata(store), spool=spool)
    return True


def _fill_surface(
    problem: Problem, solver: Solver, store: Store, surface: str, spool: Spool, advance: Callable[[int], None]
) -> dict[str, torch.Tensor]:
    """Store one surface's predictions; what comes back are the heads, named as their file has them."""
    predictions, saved = predict_surface(
        solver, problem.subject, surface, advance, problem.device, problem.plan.held_out, spool
    )
    if spool.used:
        give_back_memory()  # of the blocks: all weights of the surface are read now
    tensors = {f"{prefix}{surface}.{part}": values for (prefix, part), values in saved.items()}
    kind = head_kind(PredictionKey.from_json(store.key), problem.subject)
    _predict_test(problem, surface, kind, tensors, predictions)
    spool.let_go()
    scored = problem.plan.scored
    if len(scored) < problem.n_train:
        predictions = np.concatenate([predictions[scored], predictions[problem.n_train :]])
    write_predictions(store, surface, predictions, _n_together(problem))
    return tensors


def _n_together(problem: Problem) -> int:
    """Fewest images that have a score of their own: those of a fold, or test images whose responses are given."""
    plan = problem.plan
    _, n_of_folds = np.unique(plan.folds[plan.scored], return_counts=True)
    return int(min([*n_of_folds, *([problem.n_test] if problem.subject.has_test_responses else [])]))


def _predict_test(
    problem: Problem, surface: str, kind: HeadKind, tensors: Mapping[str, torch.Tensor], predictions: np.ndarray
) -> None:
    """Predict the test images, in place, by the heads that are saved: as any new image will be.

    What the solver predicts of them is the same up to rounding, which ill-conditioned kernels make visible.

    tensors : heads of the surface, by the names of their file
    predictions : (n_train + n_test, n_vertices), of which the last n_test rows are the solver's
    """
    fitted = predictions[problem.n_train :]
    found = _by_saved_heads(problem, kind, InMemory(tensors), surface)
    if found is None:
        return
    if not agree(found, fitted):
        raise StoreError(
            f"heads of {problem.subject.name}, {surface}",
            expected="saved heads that predict what the solver predicts",
            found=f"a difference of {np.sqrt(np.square(found - fitted).mean()):.2g}",
            remedy="correct what the solver returns in `Fits.saved`",
        )
    fitted[:] = found


def _by_saved_heads(problem: Problem, kind: HeadKind, tensors: HeadTensors, surface: str) -> np.ndarray | None:
    """(n_test, n_vertices) of the test images; None where heads are not saved, or in a form of their own."""
    shapes = {name: problem.features.stores[0].arrays[name].shape[1:] for name in problem.features.names}
    heads = SavedHeads(tensors, shapes, kind, problem.device)
    if not problem.n_test or not problem.subject.n_vertices[surface] or heads.fault(surface):
        return None
    n_images, parts = problem.n_train + problem.n_test, []
    for start in range(problem.n_train, n_images, _TEST_ROWS):
        stop = min(start + _TEST_ROWS, n_images)
        rows = [rows_from(store, problem.features.names, start, stop) for store in problem.features.stores]
        parts.append(heads.predict(surface, rows).numpy())
    return np.concatenate(parts)


def head_kind(key: PredictionKey, subject: Subject) -> HeadKind:
    """What has to be known of the heads of a prediction store besides their tensors."""
    rois = {surface: tuple(masks.values()) for surface, masks in subject.rois.items()}
    precision = str((key.settings or {}).get("precision", "float32"))
    return HeadKind(name=key.head, precision=precision, rois=rois, surfaces=subject.surfaces)


def rows_from(store: Store, names: Sequence[str], start: int, stop: int | None = None) -> dict[str, torch.Tensor]:
    """{array: (stop - start, *shape) as stored} rows of some arrays of a feature store; from `start` on by default."""
    return {name: torch.from_numpy(store.read(name, start, stop)) for name in names}


def chosen_on(fitted: Sequence[Fitted], work: Path | str) -> list[str]:
    """Names of the models whose scores are of images on which the epoch of their backbone was chosen."""
    known, models = Trainings(work), []
    for fit in fitted:
        training = PredictionKey.from_json(open_store(fit.path).key).training
        if training is not None and known.chosen_on(training.training):
            models.append(fit.model)
    return list(dict.fromkeys(models))


def scores_by_model(
    subjects: Sequence[Subject], fitted: Sequence[Fitted], ids: np.ndarray | None = None
) -> dict[str, list[VertexScores]]:
    """{model: out-of-fold scores of each subject and surface}, with the subjects' ceilings and ROIs.

    ids : of the images to score; models that predict fewer than two of them are left out. None: all
    """
    by_name = {subject.name: subject for subject in subjects}
    scores: dict[str, list[VertexScores]] = {}
    for fit in fitted:
        store, subject = open_store(fit.path), by_name[fit.subject]
        if ids is None or np.isin(store.image_ids[: store.n_train], ids).sum() > 1:
            scores.setdefault(fit.model, []).extend(score(subject, surface, store, ids) for surface in subject.surfaces)
    return scores


def test_scores_by_model(subjects: Sequence[Subject], fitted: Sequence[Fitted]) -> dict[str, list[VertexScores]]:
    """{model: scores on the test images of each subject and surface} of the subjects whose test responses are given."""
    by_name = {subject.name: subject for subject in subjects if subject.has_test_responses}
    scores: dict[str, list[VertexScores]] = {}
    for fit in fitted:
        if (subject := by_name.get(fit.subject)) is not None:
            store = open_store(fit.path)
            scores.setdefault(fit.model, []).extend(
                score_test(subject, surface, as_float32(store.read(surface, store.n_train)))
                for surface in subject.surfaces
            )
    return scores


def score(subject: Subject, surface: str, store: Store, ids: np.ndarray | None = None) -> VertexScores:
    """r of the out-of-fold predictions that a store has, with the subject's ceilings and ROIs.

    ids : of the images to score; None: all that the store predicts
    """
    stored = store.image_ids[: store.n_train]
    chosen = np.full(len(stored), True) if ids is None else np.isin(stored, ids)
    rows = np.isin(subject.train.ids, stored[chosen])
    predictions, responses = as_float32(store.read(surface, 0, store.n_train)), subject.responses(surface)
    r = pearson_r(_some(predictions, chosen), _some(responses, rows))
    return VertexScores(subject.name, surface, r, subject.noise_ceiling[surface], subject.rois[surface])


def _some(values: np.ndarray, rows: np.ndarray) -> np.ndarray:
    """Some rows; the array itself where these are all, for it may be large."""
    return values if rows.all() else values[rows]
