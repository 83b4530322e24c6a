"""Arms of an experiment: models that differ in the seed of their training alone, and how much one arm is better."""

import csv
import fnmatch
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from featcache.backbone.trainings import Trainings
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import Model, find_models
from heads.blend.plot import plot_arms
from heads.config.solvers import SOLVERS
from heads.fit.run import score
from heads.scores.intervals import Interval, paired_interval
from heads.scores.metrics import summarize

_HEADS = ("trained", "refitted")  # in the order of tables; others follow


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
    reference : the arm that it is compared with
    difference : of mean r from the reference, over the pairs of subject and seed that both have; None where there are
        none, and for the reference
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


def compare(
    subjects: Sequence[Subject], work: Path | str, models: str = "*", exclude: str = "", reference: str = ""
) -> list[Arm]:
    """Arms of the models of a work folder, each with its difference from the reference; writes tables and a picture.

    models, exclude : patterns of names of models, as for a blend
    reference : pattern of the name of an arm; '' for the training that comes first. Of several, an arm is compared with
        the one that has its own kind of heads, else with the first

    Raises StoreError where there are no models, ConfigError where a pattern matches none.
    """
    work = Path(work)
    arms = _against(_arms(subjects, work, models, exclude), reference)
    files = Workdir(work)
    files.comparison.mkdir(parents=True, exist_ok=True)
    _write_arms(files.compared_arms, arms)
    _write_values(files.compared_values, arms)
    plot_arms(files.comparison_picture, {arm.name: arm.subjects for arm in arms})
    return arms


def _arms(subjects: Sequence[Subject], work: Path, models: str, exclude: str) -> list[Arm]:
    """Arms in the order of tables: the fewer stages and losses, the earlier."""
    trainings, groups = Trainings(work), dict[str, list[tuple[Subject, Model]]]()
    for subject, of_subject in find_models(subjects, work, models, exclude, some_folds=True).items():
        for model in of_subject:
            groups.setdefault(_identity(model, trainings), []).append((subject, model))
    arms = [_arm(group, trainings) for group in groups.values()]
    return _distinct(sorted(arms, key=_place))


def _arm(group: Sequence[tuple[Subject, Model]], trainings: Trainings) -> Arm:
    first = group[0][1]
    folds = first.key.training
    return Arm(
        training=_training_words(first, trainings),
        heads=_head_words(first),
        models=tuple(dict.fromkeys(model.name for _, model in group)),
        values=tuple(_value(subject, model, trainings) for subject, model in group),
        held_out=None if folds is None or len(folds.held_out) == folds.n_folds else tuple(folds.held_out),
        chosen_on=any(model.chosen_on(trainings) for _, model in group),
    )


def _value(subject: Subject, model: Model, trainings: Trainings) -> Value:
    rows = summarize([score(subject, surface, model.store) for surface in subject.surfaces])
    whole = next(row for row in rows if row.all_surfaces)
    key = None if model.key.training is None else trainings.find(model.key.training.training)
    seed = None if key is None else key.settings.get("seed")
    return Value(subject.name, seed, whole.mean_r, whole.accuracy)


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
    """Stages and loss: 'frozen', 'finetune smooth_l1', 'pretrain+finetune smooth_l1'."""
    if model.key.training is None:
        return "frozen"
    last, chain = model.key.training.training, []
    key = trainings.find(last)
    if key is None:
        say(f"{model.name}: its checkpoint is gone, so loss and seed of its training are not known: an arm of its own")
        return f"{model.stage} {last[:6]}"
    while key is not None:
        chain.append((key.stage, str(key.settings.get("loss", "mean of several"))))
        key = trainings.find(key.start.training)
    chain.reverse()
    if len({loss for _, loss in chain}) == 1:
        return f"{'+'.join(stage for stage, _ in chain)} {chain[-1][1]}"
    return " + ".join(f"{stage} {loss}" for stage, loss in chain)


def _head_words(model: Model) -> str:
    """'trained' with the backbone, 'refitted' in closed form, or head and objective."""
    solver = model.key.solver
    if solver == SOLVERS["trained"].stored:
        return "trained"
    return "refitted" if solver == SOLVERS["ridge"].stored else " ".join(model.key.head_words)


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


def _against(arms: Sequence[Arm], pattern: str) -> list[Arm]:
    """The arms with their differences from the reference."""
    matches = [arm for arm in arms if fnmatch.fnmatchcase(arm.name, pattern) or arm.name == pattern]
    candidates = matches if pattern else [arm for arm in arms if arm.training == arms[0].training]
    if not candidates:
        raise ConfigError(
            "--reference",
            expected=f"a pattern that matches one of: {'; '.join(arm.name for arm in arms)}",
            found=repr(pattern),
            remedy="correct it",
        )
    compared = []
    for arm in arms:
        reference = next((one for one in candidates if one.heads == arm.heads), candidates[0])
        compared.append(arm if arm is reference else _with_difference(arm, reference))
    return compared


def _with_difference(arm: Arm, reference: Arm) -> Arm:
    differences = _differences(arm, reference) if arm.held_out == reference.held_out else []
    difference = paired_interval(differences) if differences else None
    return replace(arm, reference=reference.name, difference=difference)


def _differences(arm: Arm, reference: Arm) -> list[float]:
    """Differences within subject and seed. Where one arm has no seeds, its one score of a subject is in every pair."""
    theirs = {(value.subject, value.seed): value.mean_r for value in reference.values}
    if not arm.seeds:
        ours = {value.subject: value.mean_r for value in arm.values}
        return [ours[subject] - r for (subject, _), r in theirs.items() if subject in ours]
    found = [(value.mean_r, _of_pair(theirs, value)) for value in arm.values]
    return [r - other for r, other in found if other is not None]


def _of_pair(scores: Mapping[tuple[str, int | None], float], value: Value) -> float | None:
    return scores.get((value.subject, value.seed), scores.get((value.subject, None)))


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
