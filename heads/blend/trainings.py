"""Arms of an experiment: models that differ in the seed of their training alone, and how much one arm is better."""

import csv
import fnmatch
import itertools
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.keys import CheckpointKey
from featcache.backbone.trainings import Trainings
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, some_of
from featcache.machine.folders import renewed_folder
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import Model, find_models
from heads.blend.plot import plot_arms
from heads.config.solvers import SOLVERS
from heads.fit.run import score
from heads.scores.intervals import Interval, paired_interval
from heads.scores.metrics import Summary, summarize

_HEADS = ("trained", "refitted")  # in the order of tables; others follow
_FEWEST_IMAGES = 2  # that a correlation is of


@dataclass(frozen=True)
class Value:
    """Out-of-fold score of one model of one subject, over its vertices.

    seed : of the training; None for a frozen backbone, and where the checkpoint is gone
    accuracy : noise-normalised, percent; None without ceilings
    """

    subject: str
    seed: int | None
    mean_r: float
    accuracy: float | None


@dataclass(frozen=True)
class Arm:
    """Models that differ in the seed of their training alone.

    training, heads : what was done, in words
    held_out : folds that are scored; None for all
    chosen_on : whether the epoch was chosen on the images of the scores
    reference : the arm that it is compared with; None for the one that others are compared with
    difference : of mean r from the reference, over pairs of one subject and one seed, each over the images that both
        models predict; None without a reference, and where there is no such pair
    """

    training: str
    heads: str
    models: tuple[str, ...]
    values: tuple[Value, ...]
    held_out: tuple[int, ...] | None = None
    chosen_on: bool = False
    reference: str | None = None
    difference: Interval | None = None

    @property
    def name(self) -> str:
        """Its name for people."""
        return f"{self.training}, {self.heads}"

    @property
    def seeds(self) -> list[int]:
        """Seeds of its trainings."""
        return sorted({value.seed for value in self.values if value.seed is not None})

    @property
    def subjects(self) -> dict[str, float]:
        """{subject: mean r over seeds}"""
        return {name: self.mean_r(name) for name in dict.fromkeys(value.subject for value in self.values)}

    def mean_r(self, subject: str | None = None) -> float:
        """Mean over subjects and seeds, or over the seeds of one subject."""
        values = [value.mean_r for value in self.values if subject in (None, value.subject)]
        return sum(values) / len(values)

    @property
    def accuracy(self) -> float | None:
        """Mean over subjects and seeds, percent; None where one of them has no ceilings."""
        values = [value.accuracy for value in self.values]
        known = [value for value in values if value is not None]
        return sum(known) / len(known) if len(known) == len(values) else None

    def to_json(self) -> dict[str, Any]:
        """The arm as `--json` has it."""
        return {
            "arm": self.name,
            "models": list(self.models),
            "seeds": self.seeds,
            "mean_r": self.mean_r(),
            "accuracy": self.accuracy,
            "subjects": self.subjects,
            "values": [vars(value) for value in self.values],
            "held_out": None if self.held_out is None else list(self.held_out),
            "chosen_on": self.chosen_on,
            "reference": self.reference,
            "difference": None if self.difference is None else vars(self.difference),
        }


def compare_trainings(
    subjects: Sequence[Subject], work: Path | str, models: str = "*", exclude: str = "", reference: str = ""
) -> list[Arm]:
    """Arms of the models of a work folder, each with its difference from the reference; writes tables and a picture.

    models, exclude : patterns of names of models, as for a blend
    reference : pattern of the name of an arm; '' for the training that comes first. Of several, an arm is compared with
        another one that has its own kind of heads, else with the first

    Raises StoreError where there are no models, ConfigError where a pattern matches none.
    """
    work = Path(work)
    members = _members(subjects, work, models, exclude)
    arms = _against(members, reference)
    files = Workdir(work)
    with renewed_folder(files.trainings) as folder:
        _write_arms(folder / files.training_arms.name, arms)
        _write_values(folder / files.training_values.name, arms)
        plot_arms(folder / files.trainings_picture.name, {arm.name: arm.subjects for arm in arms})
    return arms


@dataclass(frozen=True, eq=False)
class _Member:
    """One model of one subject. seed : of its training; None for a frozen backbone, and where the checkpoint is gone"""

    subject: Subject
    model: Model
    seed: int | None

    @cached_property
    def ids(self) -> np.ndarray:
        """Ids of the training images that it predicts."""
        return self.model.store.image_ids[: self.model.store.n_train]

    @cached_property
    def whole(self) -> Summary:
        """Its score over all these images."""
        return self._summary(self.ids)

    def mean_r(self, ids: np.ndarray) -> float:
        """Mean r over some of these images."""
        return (self.whole if np.isin(self.ids, ids).all() else self._summary(ids)).mean_r

    def _summary(self, ids: np.ndarray) -> Summary:
        rows = summarize([score(self.subject, surface, self.model.store, ids) for surface in self.subject.surfaces])
        return next(row for row in rows if row.all_surfaces)

    @property
    def value(self) -> Value:
        return Value(self.subject.name, self.seed, self.whole.mean_r, self.whole.accuracy)


def _members(subjects: Sequence[Subject], work: Path, models: str, exclude: str) -> list[tuple[Arm, Sequence[_Member]]]:
    """Arms and their members, in the order of tables: the fewer stages and losses, the earlier."""
    trainings, groups = Trainings(work), dict[str, list[_Member]]()
    for subject, of_subject in find_models(subjects, work, models, exclude, some_folds=True).items():
        for model in of_subject:
            member = _Member(subject, model, _seed(model, trainings))
            groups.setdefault(_identity(model, trainings), []).append(member)
    found = sorted(((_arm(group, trainings), group) for group in groups.values()), key=lambda one: _place(one[0]))
    return list(zip(_distinct([arm for arm, _ in found]), [group for _, group in found], strict=True))


def _arm(group: Sequence[_Member], trainings: Trainings) -> Arm:
    first = group[0].model
    folds = first.key.training
    return Arm(
        training=_training_words(first, trainings),
        heads=_head_words(first),
        models=tuple(dict.fromkeys(member.model.name for member in group)),
        values=tuple(member.value for member in group),
        held_out=None if folds is None or len(folds.held_out) == folds.n_folds else tuple(folds.held_out),
        chosen_on=any(member.model.chosen_on(trainings) for member in group),
    )


def _seed(model: Model, trainings: Trainings) -> int | None:
    key = None if model.key.training is None else trainings.find(model.key.training.training)
    return None if key is None else key.settings.get("seed")


def _identity(model: Model, trainings: Trainings) -> str:
    """All that decides a model but the seed of its training, as JSON."""
    key = model.key.of_every_subject
    if (folds := model.key.training) is not None:
        backbone = key["features"] | {"fold": folds.to_json() | {"training": _without_seed(folds.training, trainings)}}
        key = key | {"features": backbone}
        key.pop("seed", None)  # of early stopping and first weights of heads: the folds are the training's own
    return json.dumps(key, sort_keys=True)


def _without_seed(training: str, trainings: Trainings) -> Any:
    """What decides a training and those before it, without seeds; its fingerprint where the checkpoint is gone."""
    key = trainings.find(training)
    if key is None:
        return training
    before = key.start.training
    rest = {name: value for name, value in key.to_json().items() if name not in ("fold", "start", "subjects")}
    rest |= {"settings": {name: value for name, value in key.settings.items() if name != "seed"}}
    rest |= {"subjects": sorted(key.subjects) if key.stage == "pretrain" else None}
    return rest | {"start": key.start.weights if before is None else _without_seed(before, trainings)}


def _training_words(model: Model, trainings: Trainings) -> str:
    """Stages and loss: 'frozen', 'finetune smooth_l1', 'pretrain+finetune smooth_l1 (ROIs mnnpc)'."""
    if model.key.training is None:
        return "frozen"
    last, chain = model.key.training.training, []
    key = trainings.find(last)
    if key is None:
        say(f"{model.name}: its checkpoint is gone, so loss and seed of its training are not known: an arm of its own")
        return f"{model.stage} {last[:6]}"
    while key is not None:
        chain.append((key.stage, _loss_words(key)))
        key = trainings.find(key.start.training)
    chain.reverse()
    if len({loss for _, loss in chain}) == 1:
        return f"{'+'.join(stage for stage, _ in chain)} {chain[-1][1]}"
    return " + ".join(f"{stage} {loss}" for stage, loss in chain)


def _loss_words(key: CheckpointKey) -> str:
    """Loss of a training, and that of the heads of ROIs where it is another."""
    loss = str(key.settings.get("loss", "mean of several"))
    of_rois = key.settings.get("roi_loss", loss)
    return loss if of_rois == loss else f"{loss} (ROIs {of_rois})"


def _head_words(model: Model) -> str:
    """'trained' with the backbone, 'refitted' in closed form, or head and objective."""
    key = model.key
    if key.solver == SOLVERS["trained"].stored:
        return "trained"
    if key.solver == SOLVERS["ridge"].stored:
        return "refitted"
    of_rois = [] if key.roi_loss in (None, key.objective) else [f"(ROIs {key.roi_loss})"]
    return " ".join([*key.head_words, *of_rois])


def _place(arm: Arm) -> tuple[Any, ...]:
    stages, _, losses = arm.training.partition(" ")
    heads = _HEADS.index(arm.heads) if arm.heads in _HEADS else len(_HEADS)
    return arm.training != "frozen", arm.training.count("+") and stages.count("+"), stages, len(losses), losses, heads


def _distinct(arms: Sequence[Arm]) -> list[Arm]:
    """Arms of one name have the name of a model behind it, without its digits where these words tell them apart."""
    names = [arm.name for arm in arms]
    words = [(arm.name, arm.models[0].rpartition(" ")[0]) for arm in arms]
    longer = [
        text if words.count((name, text)) == 1 else arm.models[0] for (name, text), arm in zip(words, arms, strict=True)
    ]
    return [
        arm if names.count(arm.name) == 1 else replace(arm, heads=f"{arm.heads} ({text})")
        for arm, text in zip(arms, longer, strict=True)
    ]


def _against(found: Sequence[tuple[Arm, Sequence[_Member]]], pattern: str) -> list[Arm]:
    """The arms with their differences from the reference."""
    arms = [arm for arm, _ in found]
    matches = [one for one in found if fnmatch.fnmatchcase(one[0].name, pattern) or one[0].name == pattern]
    candidates = matches if pattern else [one for one in found if one[0].training == arms[0].training]
    if not candidates:
        raise ConfigError(
            "--reference",
            expected=f"a pattern that matches one of {some_of([arm.name for arm in arms])}",
            found=repr(pattern),
            remedy="correct it; the table without --reference lists all names",
        )
    compared = []
    for arm, members in found:
        reference, theirs = next((one for one in candidates if one[0].heads == arm.heads), candidates[0])
        if reference is arm:  # others are compared with it, and it with the first of all
            reference, theirs = candidates[0]
        compared.append(arm if reference is arm else _with_difference(arm, members, reference, theirs))
    return compared


def _with_difference(arm: Arm, members: Sequence[_Member], reference: Arm, theirs: Sequence[_Member]) -> Arm:
    differences = _differences(members, theirs)
    difference = paired_interval(differences) if differences else None
    return replace(arm, reference=reference.name, difference=difference)


def _differences(members: Sequence[_Member], reference: Sequence[_Member]) -> list[float]:
    """Differences within subject and seed, over common images. A model without a seed is in a pair with every seed."""
    differences = []
    for ours, theirs in itertools.product(members, reference):
        alike = ours.seed == theirs.seed or None in (ours.seed, theirs.seed)
        common = np.intersect1d(ours.ids, theirs.ids)
        if ours.subject is theirs.subject and alike and len(common) >= _FEWEST_IMAGES:
            differences.append(ours.mean_r(common) - theirs.mean_r(common))
    return differences


def _write_arms(path: Path, arms: Sequence[Arm]) -> None:
    subjects = sorted({subject for arm in arms for subject in arm.subjects})
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(
            ["arm", *subjects, "mean_r", "accuracy", "seeds", "reference", "difference", "low", "high", "pairs"]
        )
        for arm in arms:
            of_subjects = [_number(arm.subjects.get(subject)) for subject in subjects]
            row = [arm.name, *of_subjects, _number(arm.mean_r()), _number(arm.accuracy), len(arm.seeds)]
            gap = arm.difference
            ends = ["", "", "", ""] if gap is None else [*map(_number, (gap.mean, gap.low, gap.high)), gap.n_pairs]
            table.writerow([*row, arm.reference or "", *ends])


def _write_values(path: Path, arms: Sequence[Arm]) -> None:
    with path.open("w", newline="") as file:
        table = csv.writer(file)
        table.writerow(["arm", "subject", "seed", "mean_r", "accuracy"])
        for arm in arms:
            for value in arm.values:
                seed = "" if value.seed is None else value.seed
                table.writerow([arm.name, value.subject, seed, _number(value.mean_r), _number(value.accuracy)])


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.5f}"
