"""The models that are scored: prediction stores, and the last blend out of fold."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.trainings import Trainings
from featcache.dataset.grouping import recall
from featcache.dataset.splits import Split
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, FeatcacheError, some_of
from featcache.machine.documents import read_document, typed
from featcache.machine.folders import read_unchanged
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.blend.models import Model, SubjectModels, choose_names, find_models, split_of_models
from heads.blend.products import N_FOLDS, SEED
from heads.blend.saved import BLEND, NestedCoefficients, load_nested
from heads.statistics.blocks import StoredModel


@dataclass(frozen=True)
class Folding:
    """The folds that predictions are out of.

    by : which images stay together in them
    """

    n_folds: int
    seed: int
    by: Split

    def folds(self, image_ids: np.ndarray) -> np.ndarray:
        """Fold of each image, (n_images,)."""
        return self.by.folds(image_ids, self.n_folds, self.seed)

    @property
    def key(self) -> tuple[int, int, str]:
        """What tells foldings apart."""
        return self.n_folds, self.seed, self.by.digest


@dataclass(frozen=True)
class BlendedModel:
    """The last blend of one subject, out of fold.

    nested : {surface: coefficients}
    models : {name: model} of those that it needs
    folds : (n_train,) of the blend
    """

    nested: Mapping[str, NestedCoefficients]
    models: Mapping[str, StoredModel]
    folds: np.ndarray

    @property
    def name(self) -> str:
        return BLEND

    def read(self, surface: str, vertices: slice) -> np.ndarray:
        some = self.nested[surface].at(vertices)
        return some.apply(((name, self.models[name].read(surface, vertices)) for name in some.needed), self.folds)


@dataclass(frozen=True)
class Scored:
    """A model that is scored, and how it was made.

    chosen_on : whether images of its score also chose the epoch of a backbone
    """

    source: StoredModel | BlendedModel
    folding: Folding
    chosen_on: bool

    @property
    def name(self) -> str:
        """Name of the model."""
        return self.source.name


def find_scored(
    subjects: Sequence[Subject], work: Path, models: str = "*", exclude: str = ""
) -> dict[Subject, list[Scored]]:
    """The models of each subject that has any, in the order of their names; the last blend, if there is one, first.

    models, exclude : patterns of `choose_names`; the blend goes by the name 'blend'

    Raises StoreError where there are no models, ConfigError for patterns that leave none.
    """
    stored = find_models(subjects, work)
    blends = _blends(stored, work)
    names = dict.fromkeys(model.name for of_subject in stored.values() for model in of_subject)
    chosen = choose_names([*([BLEND] if blends else []), *names], models, exclude)
    trainings = Trainings(work)
    found = {
        subject: [
            *([blends[subject]] if BLEND in chosen and subject in blends else []),
            *(_scored(model, work, trainings) for model in of_subject if model.name in chosen),
        ]
        for subject, of_subject in stored.items()
    }
    return {subject: of_subject for subject, of_subject in found.items() if of_subject}


def _scored(model: Model, work: Path, trainings: Trainings) -> Scored:
    folding = Folding(*model.key.folds, recall(model.key.by, work))
    return Scored(StoredModel(model), folding, model.chosen_on(trainings))


def _blends(stored: SubjectModels, work: Path) -> dict[Subject, Scored]:
    """The last blend of each subject; where it cannot be read out of fold, a message says why."""
    files = Workdir(work)
    if not files.saved_blend.exists():
        if files.blend_weights.exists():
            say(f"left out the last blend: {files.saved_blend} is missing; run 'blend' again")
        return {}
    try:
        nested, members = read_unchanged(
            files.submission, lambda: (load_nested(files.saved_blend), _members(files.blend_weights))
        )
    except (FeatcacheError, OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        say(f"left out the last blend: {files.submission} cannot be read ({' '.join(str(error).split())})")
        return {}
    found, trainings = {}, Trainings(work)
    for subject, of_subject in stored.items():
        if (of_blend := nested.get(subject.name)) is None:
            say(f"{subject.name}: left out the last blend, which says nothing of it out of fold; run 'blend' again")
            continue
        by_name = {model.name: model for model in of_subject}
        used = {name for of_surface in of_blend.values() for name in of_surface.models}
        stores = {name: by_name[name].store.name for name in used & by_name.keys()}
        widths = {surface: of_surface.intercept.shape[1] for surface, of_surface in of_blend.items()}
        if stores != members.get(subject.name) or widths != subject.n_vertices:
            say(f"{subject.name}: left out the last blend, which is of other predictions than there are; run it again")
            continue
        models = [by_name[name] for name in used]
        folding = Folding(N_FOLDS, SEED, split_of_models({subject: models}, work))
        of_names = {model.name: StoredModel(model) for model in models}
        source = BlendedModel(of_blend, of_names, folding.folds(subject.train.ids))
        found[subject] = Scored(source, folding, any(model.chosen_on(trainings) for model in models))
    return found


def _members(path: Path) -> dict[str, dict[str, str]]:
    """{subject: {model: name of its prediction store}} of the last blend."""
    members = typed(read_document(path, dict[str, Any])["members"], dict[str, dict[str, dict[str, str]]])
    return {
        subject: {model: facts["predictions"] for model, facts in of_subject.items()}
        for subject, of_subject in members.items()
    }


def reference_of(found: Mapping[Subject, Sequence[Scored]], pattern: str) -> str:
    """The one name that a pattern is of; '' for no pattern. Raises ConfigError for one of none or of several."""
    if not pattern:
        return ""
    names = list(dict.fromkeys(one.name for of_subject in found.values() for one in of_subject))
    try:
        matches = choose_names(names, pattern)
    except ConfigError:
        matches = set()
    if len(matches) != 1:
        raise ConfigError(
            "--against",
            expected=f"a pattern of one of {some_of(names)}",
            found=f"{pattern!r}, of {len(matches)}",
            remedy="name one that --models and --exclude leave, by the six digits that end it",
        )
    return matches.pop()
