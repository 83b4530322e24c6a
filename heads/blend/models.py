"""The models of a blend: prediction stores that are complete, of this tree as it is now, and free of leaks."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from featcache.backbone.trainings import Trainings
from featcache.cache.store import Store, list_stores
from featcache.dataset.digests import image_digest, response_digest, subject_digests
from featcache.dataset.grouping import recall
from featcache.dataset.splits import BY_ID, Split, SplitKey, refuse_leak
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, StoreError, first_line, some_of
from featcache.workdir import Workdir
from heads.features.sets import keep, matches, newer_fault, say_without, subject_stores
from heads.fit.names import PredictionFacts, PredictionKey


@dataclass(frozen=True, eq=False)  # the same store read twice is two models
class Model:
    """One model of one subject: a prediction store, and what the store says of itself."""

    store: Store
    key: PredictionKey
    facts: PredictionFacts

    @classmethod
    def from_store(cls, store: Store) -> "Model":
        """The model whose predictions a store has."""
        try:
            return cls(store, PredictionKey.from_json(store.key), PredictionFacts.from_json(store.facts))
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                store.path,
                expected="a prediction store",
                found=f"a key that cannot be read ({first_line(error)})",
                remedy="move it out of this folder, or delete it and run 'fit-heads' again",
            ) from error

    @property
    def name(self) -> str:
        """Name of the model, the same for every subject."""
        return self.facts.model

    @property
    def backbone_trained(self) -> bool:
        """Whether the backbone was trained, once for each fold."""
        return self.key.training is not None

    def chosen_on(self, trainings: Trainings) -> bool:
        """Whether its scores are of images on which the epoch of its backbone was chosen."""
        return self.key.training is not None and trainings.chosen_on(self.key.training.training)

    @property
    def stage(self) -> str:
        """Stage of the backbone's training, or 'frozen'."""
        return "frozen" if self.key.training is None else self.key.training.stage

    @property
    def seen_ids(self) -> dict[int, np.ndarray]:
        """{fold: ids of the images that the backbone of its predictions was trained on}; {} for a frozen backbone."""
        training = self.key.training
        return {} if training is None else dict(zip(training.held_out, self.facts.seen, strict=True))


SubjectModels = dict[Subject, list[Model]]


def find_models(
    subjects: Sequence[Subject], work: Path, models: str = "*", exclude: str = "", some_folds: bool = False
) -> SubjectModels:
    """The models of each subject that has any, in the order of their names.

    models, exclude : patterns of `choose_names`
    some_folds : whether to take models that predict the images of some folds alone

    Raises StoreError where there are none, ConfigError for patterns that leave none, LeakError for a model whose
    backbone was trained on an image that it predicts.
    """
    stored = {subject: usable_models(subject, work, some_folds) for subject in subjects}
    if not any(stored.values()):
        raise StoreError(
            Workdir(work).predictions,
            expected="predictions for this tree",
            found="none",
            remedy="run 'extract' and 'fit-heads' first",
        )
    say_without(stored, Workdir(work).predictions, "fit-heads")
    names = choose_names(names_of(stored), models, exclude)
    chosen = {
        subject: sorted((model for model in of_subject if model.name in names), key=lambda model: model.name)
        for subject, of_subject in stored.items()
    }
    for subject, of_subject in chosen.items():
        for model in of_subject:
            _refuse_leaks(subject, model, recall(model.key.by, work))
    return {subject: of_subject for subject, of_subject in chosen.items() if of_subject}


def split_of_models(models: SubjectModels, work: Path) -> Split:
    """The one split of all models.

    Raises ConfigError where they differ: a blend of them would learn from images that it is scored on. Raises
    StoreError where the work folder has lost it.
    """
    names: dict[SplitKey, str] = {}
    for of_subject in models.values():
        for model in of_subject:
            names.setdefault(model.key.by, model.name)
    if len(names) > 1:
        raise ConfigError(
            "--models",
            expected="models of one split",
            found=", ".join(f"--split {key} ({name})" for key, name in names.items()),
            remedy="choose those of one with --models or --exclude, such as --exclude '*split*'",
        )
    return recall(next(iter(names), BY_ID.key), work)


def names_of(models: SubjectModels) -> list[str]:
    """Names of the models of all subjects, each once."""
    return list(dict.fromkeys(model.name for of_subject in models.values() for model in of_subject))


def chosen_on(models: SubjectModels, work: Path) -> list[str]:
    """Names of the models whose scores are of images on which the epoch of their backbone was chosen."""
    trainings = Trainings(work)
    every = [model for of_subject in models.values() for model in of_subject]
    return list(dict.fromkeys(model.name for model in every if model.chosen_on(trainings)))


def choose_names(names: Sequence[str], models: str, exclude: str = "") -> set[str]:
    """The names that match one of the patterns `models` and none of `exclude`. Raises ConfigError where none does.

    models, exclude : patterns with commas between. A pattern is of the whole name ('convnext*'), or the six digits that
        end it
    """
    wanted = {name for name in names if _matches(name, models)}
    left = {name for name in wanted if not exclude or not _matches(name, exclude)}
    if not left:
        option, pattern = ("--exclude", exclude) if wanted else ("--models", models)
        raise ConfigError(
            option,
            expected=f"{'a pattern that leaves' if wanted else 'one that matches'} one of {some_of(names)}",
            found=repr(pattern),
            remedy="correct it; 'models' lists all names",
        )
    return left


def _matches(name: str, patterns: str) -> bool:
    return matches(name, patterns) or name.rpartition(" ")[2] in map(str.strip, patterns.split(","))


def usable_models(subject: Subject, work: Path, some_folds: bool = False) -> list[Model]:
    """The models with complete predictions for the subject's images and responses as they are now.

    Other stores are left out, and named with what is wrong with them.
    """
    stores = subject_stores(subject, list_stores(Workdir(work).predictions), "fit-heads", some_folds)
    models = {store.name: Model.from_store(store) for store in stores}
    names = {store: model.key.model for store, model in models.items()}  # facts may have the name of an earlier version
    data = (image_digest(subject, work), response_digest(subject, work)) if stores else ("", "")
    digests = subject_digests(subject)

    def other_data(store: Store) -> str:
        key = models[store.name].key
        changed = [name for name, digest in digests.items() if getattr(key, name, None) not in (None, digest)]
        widths = {surface: array.shape[1] for surface, array in store.arrays.items()}
        if (key.images, key.responses) != data:
            return "fitted to other images or responses than the tree has now"
        if widths != subject.n_vertices:
            found = " and ".join(str(widths.get(surface, 0)) for surface in subject.surfaces)
            return f"it has {found} vertices; delete it and run 'fit-heads' again"
        return f"fitted with another {' and '.join(changed)} than given now" if changed else ""

    def older_twin(store: Store) -> str:  # two votes of one model would be a weight that nobody chose
        return newer_fault(store, [other for other in stores if names[other.name] == names[store.name]], "model")

    def unknown_past(store: Store) -> str:
        if not models[store.name].backbone_trained or models[store.name].facts.seen_ids is not None:
            return ""
        return "it does not say which images its backbone was trained on; delete it and run 'fit-heads' again"

    def lost_split(store: Store) -> str:
        try:
            recall(models[store.name].key.by, work)
        except StoreError as error:
            return f"{error.where} has {error.found}; {error.remedy}"
        return ""

    for fault in (other_data, older_twin, unknown_past, lost_split):
        stores = keep(subject, stores, fault)
    return [models[store.name] for store in stores]


def _refuse_leaks(subject: Subject, model: Model, by: Split) -> None:
    """Raise LeakError for an image that was seen by the backbone whose features predict it.

    The ids are in the prediction store: the checkpoint may be gone.
    """
    ids, label = subject.train.ids, f"{model.name} of {subject.name}"
    for fold, seen in model.seen_ids.items():
        refuse_leak(seen, ids[by.folds(ids, *model.key.folds) == fold], f"fold {fold} of {label}", by)
        refuse_leak(seen, subject.test.ids, f"the test images of {label}")


def has_ceilings(subjects: Sequence[Subject]) -> bool:
    """Whether scores are noise-normalised accuracy, or else r."""
    return any(ceiling is not None for subject in subjects for ceiling in subject.noise_ceiling.values())
