"""What a prediction store says of itself: the key that decides its rows, facts beside it, and the name of its model."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, TypedDict

import numpy as np

from featcache.backbone.extent import fit_of, size_of
from featcache.cache.keys import HeldOutFolds
from featcache.config import LayerConfig, fingerprint
from featcache.dataset.digests import response_digest, subject_digests
from featcache.dataset.splits import SplitKey
from featcache.dataset.subject import Subject
from featcache.machine.device import resolve_dtype
from featcache.machine.documents import of_its_types, typed
from heads.config import HEADS, FitConfig
from heads.config.fitting import default_settings
from heads.config.solvers import HeadSpec, solver_of
from heads.features.sets import FeatureSet, title_of
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.ridge import METHOD

# What belongs to a subject and not to a model: without these, keys of one model agree across subjects.
_OF_A_SUBJECT = ("subject", "images", "image_ids", "responses", "noise_ceiling", "rois", "joint")


# Raised where the same settings give other predictions. 2: scales of features without the held-out fold, and test
# predictions of one spread over folds
VERSION = 2

# {solver of an earlier version: its settings where nothing was asked for}; its stores are still read and blended
RETIRED: dict[str, dict[str, Any]] = {"moments": {"steps": 128, "learning_rate": 0.25, "momentum": 0.9}}


class _Features(TypedDict):
    """What the key of predictions says of features in any case."""

    images: str
    image_ids: str
    backbone: str
    layers: list[str]
    transform: dict[str, Any]
    dtype: str
    fold: dict[str, Any] | None


@dataclass(frozen=True, kw_only=True)
class PredictionKey:
    """Everything that decides the rows of a prediction store. What is None is not part of the key.

    features : what decides the features (see FeatureSet.key)
    responses : digest of the responses
    noise_ceiling, rois : digests by surface, where the solver or the head reads them
    version : of how predictions are made; none in stores from before there were versions
    kernels : how priors are chosen and weighed, where heads are fitted under priors
    head, solver, objective : what was fitted, how, and to what; the solver by its stored name
    n_folds, seed : folds of the training images, and randomness
    split : which images stay together in the folds, where it is not by image id; the features of a trained backbone
        say it themselves
    settings : of the solver and the head
    joint : keys of the other subjects that were trained together with this one
    """

    subject: str
    features: Mapping[str, Any]
    responses: str
    noise_ceiling: Mapping[str, str | None] | None = None
    rois: Mapping[str, Any] | None = None
    version: int | None = None
    kernels: Mapping[str, Any] | None = None
    head: str
    n_folds: int | None = None
    seed: int | None = None
    split: Mapping[str, str] | None = None
    products: str | None = None
    target: str | None = None  # of stores of an earlier version, which could be fitted to a blend
    solver: str
    objective: str
    roi_loss: str | None = None  # of ROI heads that are trained head by head; None in stores of earlier versions
    settings: Mapping[str, Any] | None = None
    joint: Mapping[str, Any] | None = None

    @classmethod
    def from_json(cls, key: Mapping[str, Any]) -> "PredictionKey":
        """Read the key of a prediction store. Raises KeyError, TypeError or ValueError for what is none."""
        names = {field.name for field in fields(cls)}
        found = of_its_types(cls(**{name: value for name, value in key.items() if name in names}))
        typed(found.features, _Features)
        _ = found.training
        return found

    def to_json(self) -> dict[str, Any]:
        """The key as stores keep it."""
        return {"kind": "predictions"} | {name: value for name, value in vars(self).items() if value is not None}

    @property
    def backbone(self) -> str:
        """Name of the network."""
        return str(self.features["backbone"])

    @property
    def training(self) -> HeldOutFolds | None:
        """How the backbone was trained; None for a frozen one."""
        training = self.features["fold"]
        return None if training is None else HeldOutFolds.from_json(training)

    @property
    def images(self) -> str:
        """Digest of the images."""
        return str(self.features["images"])

    @property
    def folds(self) -> tuple[int, int]:
        """Number and seed of the folds that the predictions are out of."""
        if (training := self.training) is not None:
            return training.n_folds, training.seed
        assert self.n_folds is not None and self.seed is not None  # heads on a frozen backbone choose folds themselves
        return self.n_folds, self.seed

    @property
    def by(self) -> SplitKey:
        """Which images stay together in these folds."""
        return SplitKey.from_json(self.split) if self.training is None else self.training.split

    @property
    def read(self) -> Sequence[str]:
        """Names of the layers that heads read."""
        return list(self.features.get("read", self.features["layers"]))

    @property
    def head_words(self) -> list[str]:
        """Head and objective; once where they are one word, as of the heads that a checkpoint brought with it."""
        solver = [self.solver] if self.solver in RETIRED else []
        return list(dict.fromkeys([self.head, *solver, self.objective, *(["distilled"] if self.target else [])]))

    @property
    def of_every_subject(self) -> dict[str, Any]:
        """What decides the model, without what belongs to one subject."""
        # a backbone that was trained has other weights for every fold and, in stage 2, for every subject
        left_out = (*_OF_A_SUBJECT, "weights") if self.training else _OF_A_SUBJECT
        features = {name: value for name, value in self.features.items() if name not in left_out}
        model = {name: value for name, value in self.to_json().items() if name not in _OF_A_SUBJECT}
        return model | {"features": features}

    @property
    def model(self) -> str:
        """The name of the model, the same for every subject: words that tell models apart, and six digits.

        Backbone, size, stage, layers and their grid, head and objective always, other settings where they are not the
        default. The digits change with everything that decides the model.
        """
        digits = fingerprint(self.of_every_subject)[:6]
        return " ".join([*self._feature_words(), *self.head_words, *self._setting_words(), digits])

    def _feature_words(self) -> list[str]:
        """Backbone and size, fit if not crop, stage, layers and grids, pooling if not avg, precision if not float32."""
        read, features = self.read, self.features
        layers = "+".join(read) if len(read) < 3 else f"{len(read)} layers"
        size, fit = size_of(features["transform"]), fit_of(features["transform"])
        words = [title_of(self.backbone, size, fit, self._stage_words()), layers]
        grids = {"x".join(map(str, grid)): None for layer, grid in features.get("grids", {}).items() if layer in read}
        words += ["/".join(grids)] if grids else []
        words += [features["pool"]] if grids and features["pool"] != LayerConfig.pool else []
        return words + ([features["dtype"]] if features["dtype"] != "float32" else [])

    def _stage_words(self) -> str:
        if (training := self.training) is None:
            return ""
        words = training.stage
        if training.soup is not None:  # of an earlier version, which could average checkpoints
            words += f" soup of {training.soup}"
        if len(training.held_out) < training.n_folds:  # its score is over other images than a whole model's
            words += f" fold {','.join(map(str, training.held_out))}"
        return words

    def _setting_words(self) -> list[str]:
        """Settings that are not what the head is fitted with where nothing is asked for."""
        usual: dict[str, Any] = {"n_folds": FitConfig.n_folds, "seed": FitConfig.seed, "products": FitConfig.products}
        usual["roi_loss"] = self.objective
        given = {name: default if (value := getattr(self, name)) is None else value for name, default in usual.items()}
        if self.solver in RETIRED or solver_of(self.solver).named_settings:
            usual |= RETIRED.get(self.solver) or default_settings(self.head, solver_of(self.solver))
            given |= self.settings or {}
        changed = {name: value for name, value in given.items() if value != usual.get(name, value)}
        if self.by != SplitKey():
            changed["split"] = self.by.name
        return [f"{name.removeprefix('n_').replace('_', ' ')} {value}" for name, value in changed.items()]


@dataclass(frozen=True, kw_only=True)
class PredictionFacts:
    """What is known of a prediction store besides its key.

    model : the name of its model
    features : names of the feature stores, with + between
    torch : version
    seen_ids : for each held-out fold of a trained backbone, the ids of the images that it was trained on
    """

    model: str
    features: str
    torch: str = ""
    seen_ids: Sequence[Sequence[int]] | None = None

    @classmethod
    def from_json(cls, facts: Mapping[str, Any]) -> "PredictionFacts":
        """Read the facts of a prediction store. Raises TypeError or ValueError for what are none."""
        names = {field.name for field in fields(cls)}
        return of_its_types(cls(**{name: value for name, value in facts.items() if name in names}))

    def to_json(self) -> dict[str, Any]:
        """The facts as stores keep them."""
        return {name: value for name, value in vars(self).items() if value is not None}

    @property
    def seen(self) -> list[np.ndarray]:
        """`seen_ids` as arrays."""
        return [np.array(ids, dtype=np.int64) for ids in self.seen_ids or ()]


def prediction_key(
    subject: Subject, features: FeatureSet, plan: FoldPlan, config: FitConfig, work: Path
) -> PredictionKey:
    """The key of the predictions of these heads, on these features, for this subject."""
    key, spec, digests = config.key(), config.solver_spec, subject_digests(subject)
    if plan.backbone_trained and spec.fits:  # its training chose the folds; a seed is of the loop alone
        training = features.trainings[0]
        key |= {"n_folds": training.n_folds} | ({} if spec.random else {"seed": training.seed})
    head = HEADS[config.head] if spec.fits else HeadSpec()  # of heads that are taken as they are, features say all
    if head.auto_precision:
        key["settings"] |= {"precision": resolve_dtype("auto", config.device)}
    if not plan.backbone_trained:
        key |= plan.by.key.to_json()
    under_priors = head.under_priors or (spec.under_priors and features.is_layered)
    return PredictionKey(
        subject=subject.name,
        features=features.key(),
        responses=response_digest(subject, work),
        noise_ceiling=digests["noise_ceiling"] if spec.reads_noise_ceiling else None,
        rois=digests["rois"] if head.reads_rois else None,
        version=VERSION,
        kernels=METHOD if under_priors else None,
        **key,
    )
