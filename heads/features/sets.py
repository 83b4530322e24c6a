"""The features that heads are fitted to: of a frozen backbone, or of one that was trained once per fold."""

import fnmatch
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from featcache.backbone.extent import fit_of, size_of
from featcache.cache.keys import FeatureFacts, FeatureKey, FoldKey, HeldOutFolds
from featcache.cache.store import Store, list_stores
from featcache.config import CLASS_TOKEN, fingerprint
from featcache.dataset.digests import image_digest
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError
from featcache.machine.progress import say
from featcache.workdir import Workdir
from heads.features.rows import LayerRows

_OF_A_SUBJECT = ("subject", "images", "image_ids")  # what keys of the same features of other subjects differ in
_DIGITS = 6  # of a fingerprint, at the end of a title


@dataclass(frozen=True)
class FeatureSet:
    """The features of one subject that one model reads.

    stores : the one store of a frozen backbone, or a store for each fold of a trained backbone, in order
    arrays : that heads read; None: all
    """

    stores: tuple[Store, ...]
    arrays: tuple[str, ...] | None = None

    @cached_property
    def keys(self) -> tuple[FeatureKey, ...]:
        """Key of each store: what decided its rows."""
        return tuple(FeatureKey.of(store) for store in self.stores)

    @cached_property
    def facts(self) -> tuple[FeatureFacts, ...]:
        """Facts of each store besides its key."""
        return tuple(FeatureFacts.from_json(store.facts) for store in self.stores)

    @cached_property
    def trainings(self) -> tuple[FoldKey, ...]:
        """The training of each store's backbone, and the fold that it did not see; () for a frozen backbone."""
        return tuple(key.fold for key in self.keys if key.fold is not None)

    @property
    def backbone_trained(self) -> bool:
        """Whether the backbone was trained, once for each fold."""
        return bool(self.trainings)

    @property
    def held_out(self) -> tuple[int, ...]:
        """The fold that each store's backbone did not see."""
        return tuple(training.fold for training in self.trainings)

    @property
    def name(self) -> str:
        """Names of the stores, with + between."""
        return "+".join(store.name for store in self.stores)

    @property
    def label(self) -> str:
        """Backbone and, if it was trained, the stage, for a person."""
        return "-".join([self.keys[0].backbone, *(training.label for training in self.trainings[:1])])

    @property
    def title(self) -> str:
        """The name that --features goes by (see `title_of`), and six digits that change with all that decides them.

        The digits are the same for every subject, and for every fold of one training.
        """
        key = self.keys[0]
        decisive = {name: value for name, value in key.to_json().items() if name not in _OF_A_SUBJECT}
        stage = ""
        if self.trainings:  # whose weights differ between folds
            stage = stage_words(self.trainings[0].label, self.trainings[0].split.name)
            decisive |= {"weights": None, "fold": self.trainings[0].training} | self.trainings[0].split.to_json()
        words = title_of(key.backbone, size_of(key.transform), fit_of(key.transform), stage)
        return f"{words} {fingerprint(decisive)[:_DIGITS]}"

    def key(self) -> dict[str, Any]:
        """Key of the features, as prediction stores keep it; for a trained backbone, of all folds together."""
        key = dict(self.stores[0].key)
        if self.arrays is not None:
            key["read"] = list(self.arrays)
        if not self.backbone_trained:
            return key
        weights = [feature_key.weights for feature_key in self.keys]
        return key | {"weights": weights, "fold": HeldOutFolds.of(self.trainings).to_json()}

    @property
    def names(self) -> tuple[str, ...]:
        """The arrays that heads read, in the order of the network."""
        return tuple(self.stores[0].arrays) if self.arrays is None else self.arrays

    @property
    def is_layered(self) -> bool:
        """Whether heads read several arrays, or places of the image."""
        return len(self.names) > 1 or any(self.stores[0].arrays[name].ndim > 2 for name in self.names)

    def read(self, device: str, budget: float) -> list[LayerRows]:
        """Rows of the arrays, for each store. budget : bytes of each store that may be kept in memory"""
        return [LayerRows(store, self.names, device, budget) for store in self.stores]

    def reading(self, layers: str) -> "list[FeatureSet]":
        """Feature sets that heads read under --layers, one for each model (see `models_of`)."""
        stored = tuple(self.stores[0].arrays)
        return [replace(self, arrays=None if read == stored else read) for read in models_of(stored, layers)]

    def only(self, arrays: Sequence[str]) -> "FeatureSet":
        """The same features, of which heads read only some arrays."""
        return replace(self, arrays=tuple(arrays))

    def seen_ids(self) -> list[np.ndarray]:
        """Ids of the images that each store's backbone was trained on."""
        return [np.array(facts.seen_ids or (), dtype=np.int64) for facts in self.facts]


def stage_words(stage: str, split: str) -> str:
    """Stage of a training as titles have it, with the split where it is not by image id: 'pretrain by session'."""
    return stage if split == "id" else f"{stage} by {split}"


def title_of(backbone: str, size: int | None, fit: str, stage: str) -> str:
    """What tells features of a subject apart, for a person: 'tf_efficientnet_lite0@112 whole pretrain'.

    stage : of the backbone's training; '' for a frozen one. fit : left out if it is crop. size : None for features
        that were made elsewhere
    """
    words = [backbone if size is None else f"{backbone}@{size}", "" if fit == "crop" else fit, stage]
    return " ".join(word for word in words if word)


def chosen_by(title: str, patterns: str) -> bool:
    """Whether --features chooses features: a pattern is of a whole title, of one without its digits, or the digits."""
    words, _, digits = title.rpartition(" ")
    return any(matches(name, patterns) for name in (title, words, digits))


def choose(
    found: Mapping[Subject, Sequence[FeatureSet]], patterns: str, option: str = "--features"
) -> dict[Subject, list[FeatureSet]]:
    """The sets whose titles match `patterns`. Raises ConfigError for a pattern that no set of any subject matches.

    option : that the patterns were given by
    """
    titles = dict.fromkeys(each.title for sets in found.values() for each in sets)
    for pattern in patterns.split(","):
        if titles and not any(chosen_by(title, pattern) for title in titles):
            raise ConfigError(
                option,
                expected=f"patterns that each match one of: {', '.join(map(repr, titles))}",
                found=repr(pattern.strip()),
                remedy="correct it",
            )
    return {subject: [each for each in sets if chosen_by(each.title, patterns)] for subject, sets in found.items()}


def without_digits(patterns: str) -> str:
    """Patterns for titles without digits, as of features that are not there yet; digits alone become '*'."""
    return ",".join(re.sub(rf"(^|\s)[0-9a-f]{{{_DIGITS}}}$", "", one.strip()) or "*" for one in patterns.split(","))


def matches(name: str, patterns: str) -> bool:
    """Whether a whole name is one of some patterns, with commas between them, as of file names: 'convnext*,*@112'."""
    return any(fnmatch.fnmatchcase(name, pattern.strip()) for pattern in patterns.split(","))


def models_of(arrays: Sequence[str], layers: str) -> list[tuple[str, ...]]:
    """The arrays that each model reads, out of those of a store, in their order.

    layers : all, in one model | each, a model of every layer | names with commas between, in one model. A layer's class
        token goes with it. Where a named layer is missing there is no model.
    """
    names = list(dict.fromkeys(map(layer_of, arrays)))
    if layers in ("all", "joint"):  # joint: its name in earlier versions
        chosen = [names]
    elif layers == "each":
        chosen = [[name] for name in names]
    else:
        chosen = [layers.replace(" ", "").split(",")]
    return [
        tuple(array for array in arrays if layer_of(array) in wanted) for wanted in chosen if set(wanted) <= set(names)
    ]


def layer_of(name: str) -> str:
    """The layer that an array belongs to: its own name, or that of the layer whose class token it is."""
    return name.removesuffix(CLASS_TOKEN)


def feature_sets(subject: Subject, work: Path, listed: Sequence[Store] | None = None) -> list[FeatureSet]:
    """The complete features of the subject's current images. Says which stores are left out, and why.

    listed : the feature stores of the work folder, where they are known already
    """
    listed = list_stores(Workdir(work).features) if listed is None else listed
    stores = subject_stores(subject, listed, "extract")
    digest = image_digest(subject, work) if stores else ""
    stores = keep(subject, stores, lambda s: "" if FeatureKey.of(s).images == digest else "made from other images")
    alike: dict[tuple[str, int], list[Store]] = {}  # of one training and fold
    for store in stores:
        alike.setdefault((_family(store), _fold(store)), []).append(store)
    newest = {store.name: newer_fault(store, of_one, "training") for of_one in alike.values() for store in of_one}
    keep(subject, stores, lambda store: newest[store.name])
    families: dict[str, list[Store]] = {}
    for (family, _), of_one in alike.items():
        families.setdefault(family, []).extend(store for store in of_one if not newest[store.name])
    return [FeatureSet(tuple(sorted(family, key=_fold))) for family in families.values()]


def say_partial(sets: Iterable[FeatureSet]) -> None:
    """Say which trainings have features of some folds alone, each once."""
    partial = [each for each in sets if each.backbone_trained and len(each.stores) < each.trainings[0].n_folds]
    for title, folds, n_folds in dict.fromkeys((p.title, p.held_out, p.trainings[0].n_folds) for p in partial):
        say(f"{title} has fold {', '.join(map(str, folds))} of {n_folds}; only their images are predicted")


def newer_fault(store: Store, alike: Sequence[Store], what: str) -> str:
    """Why a store is left out beside others of the same `what`: the one that was written last counts; '' if kept."""
    newest = max(alike, key=lambda other: (other.path / "committed.json").stat().st_mtime_ns)
    return "" if store is newest else f"{newest.name} is of the same {what} and newer"


def _family(store: Store) -> str:
    """Name that stores share only if they are folds of one training."""
    key = FeatureKey.of(store)
    return store.name if key.fold is None else repr(replace(key, weights="", fold=replace(key.fold, fold=0)))


def _fold(store: Store) -> int:
    training = FeatureKey.of(store).fold
    return training.fold if training else 0


def say_without(found: Mapping[Subject, Sequence[object]], folder: Path, command: str) -> None:
    """Say which subjects have nothing in a folder that can be used."""
    if names := [subject.name for subject, of_subject in found.items() if not of_subject]:
        say(f"{', '.join(names)}: nothing to use in {folder}; for these subjects, run '{command}' first")


def subject_stores(subject: Subject, listed: Sequence[Store], command: str, some_folds: bool = False) -> list[Store]:
    """The subject's stores that are complete and have the rows of its images, in the same order.

    listed : the stores of a folder
    some_folds : whether to take stores that have the training images of some folds alone
    """
    stores = [store for store in listed if store.key["subject"] == subject.name]
    complete = keep(subject, stores, lambda store: "" if store.complete else f"not complete, run '{command}' again")
    return keep(subject, complete, lambda store: _row_fault(store, subject, command, some_folds))


def _row_fault(store: Store, subject: Subject, command: str, some_folds: bool) -> str:
    """Why the rows of a store are not those of the subject's images; '' where they are."""
    ids = subject.image_ids
    if np.array_equal(store.image_ids, ids[np.isin(ids, store.image_ids)] if some_folds else ids):
        return ""
    train, test = store.image_ids[: store.n_train], store.image_ids[store.n_train :]
    some = subject.train.ids[np.isin(subject.train.ids, train)]
    if (folds := _some_folds(store)) and np.array_equal(train, some) and np.array_equal(test, subject.test.ids):
        n_missing = len(subject.train) - store.n_train
        return f"it predicts the images of {folds} alone, {n_missing} are missing; train and extract all folds"
    trained = some if folds and len(some) == len(train) else subject.train.ids
    parts = {"training": (train, trained), "test": (test, subject.test.ids)}
    changed = [_change(what, *of_part) for what, of_part in parts.items() if not np.array_equal(*of_part)]
    return f"{' and '.join(changed)}; run '{command}' again"


def _some_folds(store: Store) -> str:
    """'fold 0 of 5' for predictions of a training that has features of some folds alone; else ''."""
    training = store.key.get("features", {}).get("fold")  # features themselves are of all images
    if training is None or len((folds := HeldOutFolds.from_json(training)).held_out) == folds.n_folds:
        return ""
    return f"fold {', '.join(map(str, folds.held_out))} of {folds.n_folds}"


def _change(what: str, stored: np.ndarray, ids: np.ndarray) -> str:
    """How the images of a split differ from those that a store has: '2 test images were added since'."""
    n_new, n_gone = int((~np.isin(ids, stored)).sum()), int((~np.isin(stored, ids)).sum())
    if bool(n_new) == bool(n_gone) or n_new - n_gone != len(ids) - len(stored):  # one image may have got another id
        return f"its {what} images have other ids now"
    n = n_new + n_gone
    return f"{n} {what} image{'s were' if n > 1 else ' was'} {'added' if n_new else 'removed'} since"


def keep(subject: Subject, stores: Sequence[Store], fault: Callable[[Store], str]) -> list[Store]:
    """The stores without a fault. Says the faults of the others."""
    faults = {store.name: fault(store) for store in stores}
    for name, why in faults.items():
        if why:
            say(f"{subject.name}: left out {name}: {why}")
    return [store for store in stores if not faults[store.name]]
