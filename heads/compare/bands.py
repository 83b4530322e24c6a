"""Bands of features that are compared, and the folds that all of them have."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from featcache.dataset.splits import Split
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, LeakError, some_of
from heads.config.comparing import BandSpec, CompareConfig
from heads.features.sets import FeatureSet, chosen_by, layer_of
from heads.solvers.held_out import FoldPlan


@dataclass(frozen=True)
class Band:
    """A named group of features of one subject.

    parts : sets of features, of which some layers are read; kernels of all layers of all parts have the same share
    """

    name: str
    parts: tuple[FeatureSet, ...]

    @property
    def titles(self) -> list[str]:
        """What it is made of, for a person: 'tf_efficientnet_lite0@224 1a2b3c: blocks.0, blocks.1'."""
        return [f"{part.title}: {', '.join(dict.fromkeys(map(layer_of, part.names)))}" for part in self.parts]

    def key(self) -> dict[str, Any]:
        """What decides its kernels."""
        return {"name": self.name, "features": [part.key() | {"read": list(part.names)} for part in self.parts]}


def bands_of(sets: Sequence[FeatureSet], config: CompareConfig) -> tuple[Band, ...]:
    """The bands of one subject, in the order that they are named, or that networks and stores have.

    sets : features of the subject that --of chooses

    Raises ConfigError where there are fewer than two, and for what is named and not there.
    """
    if config.band_set == "layers":
        bands = _layers(sets)
    elif config.band_set == "backbones":
        names = distinct([each.title for each in sets])
        bands = [Band(name, (each,)) for name, each in zip(names, sets, strict=True)]
    else:
        bands = [_named(spec, sets) for spec in config.bands]
    if len(bands) < 2:
        raise ConfigError(
            f"--features {config.features[0]}",
            expected="two bands or more",
            found=", ".join(title for band in bands for title in band.titles),
            remedy="extract more layers, or from another backbone, or add features",
        )
    return tuple(bands)


def distinct(titles: Sequence[str]) -> list[str]:
    """Titles without their digits, where that leaves no two alike."""
    words = [title.rpartition(" ")[0] for title in titles]
    return [word if words.count(word) == 1 else title for word, title in zip(words, titles, strict=True)]


def _layers(sets: Sequence[FeatureSet]) -> list[Band]:
    if len(sets) != 1:
        raise ConfigError(
            "--of",
            expected="one set of features, whose layers are compared",
            found=some_of([each.title for each in sets]),
            remedy=f"name one, such as --of '{sets[0].title}', or give --features backbones",
        )
    layers = dict.fromkeys(map(layer_of, sets[0].names))
    return [Band(layer, (_reading(sets[0], (layer,)),)) for layer in layers]


def _reading(features: FeatureSet, layers: Sequence[str]) -> FeatureSet:
    """The features, of which some layers are read, with their class tokens."""
    return features.only([name for name in features.names if layer_of(name) in layers])


def _named(spec: BandSpec, sets: Sequence[FeatureSet]) -> Band:
    matching = [each for each in sets if chosen_by(each.title, spec.patterns)]
    if not matching:
        raise ConfigError(
            f"--features {spec.name}",
            expected=f"a pattern of one of: {', '.join(repr(each.title) for each in sets)}",
            found=repr(spec.patterns),
            remedy="correct it, or extract these features",
        )
    known = dict.fromkeys(layer_of(name) for each in matching for name in each.names)
    if missing := [layer for layer in spec.layers if layer not in known]:
        raise ConfigError(
            f"--features {spec.name}",
            expected=f"layers that were extracted ({', '.join(known)})",
            found=repr(missing[0]),
            remedy="choose among those, or extract it",
        )
    parts = [_reading(each, spec.layers or tuple(known)) for each in matching]
    return Band(spec.name, tuple(part for part in parts if part.names))


def plan_of(subject: Subject, bands: Sequence[Band], config: CompareConfig, by: Split) -> FoldPlan:
    """The folds of the bands: those of the training where backbones were trained, else as fit-heads has them.

    Raises LeakError for backbones that were trained on different folds, or hold out no fold in common.
    """
    trained = [part for band in bands for part in band.parts if part.backbone_trained]
    plans = [FoldPlan.of_features(subject, part, config.n_folds, config.fold_seed, by) for part in trained]
    if not plans:
        return FoldPlan.of_features(subject, bands[0].parts[0], config.n_folds, config.fold_seed, by)
    common = [fold for fold in plans[0].held_out if all(fold in plan.held_out for plan in plans)]
    if not common or not all(np.array_equal(plan.folds, plans[0].folds) for plan in plans):
        raise LeakError(
            f"features of {subject.name}",
            expected="trained backbones of the same --folds and --fold-seed, with a held-out fold in common",
            found=some_of(list(dict.fromkeys(part.title for part in trained))),
            remedy="choose one of them with --of, or train with the same folds",
        )
    return replace(plans[0], held_out=tuple(common))


def on_folds(bands: Sequence[Band], plan: FoldPlan) -> tuple[Band, ...]:
    """The bands with the stores of these folds alone, in the order of the folds."""
    return tuple(replace(band, parts=tuple(_on_folds(part, plan) for part in band.parts)) for band in bands)


def _on_folds(features: FeatureSet, plan: FoldPlan) -> FeatureSet:
    if not features.backbone_trained:
        return features
    by_fold: Mapping[int, Any] = dict(zip(features.held_out, features.stores, strict=True))
    return replace(features, stores=tuple(by_fold[fold] for fold in plan.held_out))
