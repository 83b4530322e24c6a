"""What a checkpoint describes: what decided its weights (its key), and what else is known of them (its facts).

On the disk both are JSON in `checkpoint.json`. `to_json` leaves out what does not apply, so that the fingerprint in a
folder's name never changes.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Self

import msgspec

from featcache.config import fingerprint, is_named_by
from featcache.dataset.splits import SplitKey
from featcache.machine.documents import DocumentError, of_its_types, read_document, write_document

DESCRIPTION = "checkpoint.json"  # in the folder of a checkpoint
FORMAT = 1


@dataclass(frozen=True, kw_only=True)
class Split:
    """The fold that is held out, of a split of the images into folds."""

    fold: int  # from 0
    n_folds: int
    seed: int
    by: SplitKey = field(default_factory=SplitKey)  # which images stay together

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """The fold in the JSON of a checkpoint. Raises KeyError where it is none."""
        by = SplitKey.from_json(json.get("split"))
        return of_its_types(cls(fold=json["fold"], n_folds=json["n_folds"], seed=json["seed"], by=by))

    def to_json(self) -> dict[str, Any]:
        """The numbers by their names, and the split where it is not by image id."""
        return {"fold": self.fold, "n_folds": self.n_folds, "seed": self.seed} | self.by.to_json()


@dataclass(frozen=True, kw_only=True)
class BackboneKey:
    """The network that was trained."""

    name: str  # timm's, or the label of a network of another source
    weights: str  # its weights before any training: hub, packaged, none, own, or file
    size: int  # pixels on a side
    fit: str = "crop"  # how images are brought to that size, one of FITS
    code: Mapping[str, str] = field(default_factory=dict)  # of a network that is not timm's, {name: version or digest}

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """The network in the JSON of a checkpoint. Raises KeyError where it is none."""
        return of_its_types(
            cls(
                name=json["name"],
                weights=json["weights"],
                size=json["size"],
                fit=json.get("fit", cls.fit),
                code=dict(json.get("code", {})),
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The settings by their names; the first checkpoints, which all cropped, have no fit, those of timm no code."""
        usual = {"fit": "crop", "code": {}}
        return {name: value for name, value in vars(self).items() if name not in usual or value != usual[name]}


@dataclass(frozen=True, kw_only=True)
class StartKey:
    """The weights that training started from."""

    weights: str  # digest of every tensor
    training: str | None  # `CheckpointKey.training` of the checkpoint that they are of; None where they are of none


@dataclass(frozen=True, kw_only=True)
class CheckpointKey:
    """What decides the weights of a checkpoint: the same key, the same weights."""

    stage: str  # pretrain | finetune
    subjects: Mapping[str, Mapping[str, Any]]  # {subject: digests of its images, ids, responses, ceilings, ROIs, masks}
    backbone: BackboneKey
    transform: Mapping[str, Any]  # what timm's transform does, in plain values
    timm: str  # version
    start: StartKey
    split: Split
    settings: Mapping[str, Any]  # of the training; of a mean of checkpoints, {'soup': the trainings of its members}
    devices: int | None = None  # processes that trained together; None in the first checkpoints, which did not say
    other: Mapping[str, Any] = field(default_factory=dict)  # what another version wrote besides

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """The key in the JSON of a checkpoint. Raises KeyError, TypeError or DocumentError where it is none."""
        rest = {name: value for name, value in json.items() if name not in _KEY_NAMES}
        start = json["start"]
        return of_its_types(
            cls(
                stage=json["stage"],
                subjects=json["subjects"],
                backbone=BackboneKey.from_json(json["backbone"]),
                transform=json["transform"],
                timm=json["timm"],
                start=of_its_types(StartKey(weights=start["weights"], training=start["training"])),
                split=Split.from_json(json["fold"]),
                settings=json["settings"],
                devices=json.get("devices"),
                other=rest,
            )
        )

    def to_json(self) -> dict[str, Any]:
        """The key as it is on the disk and in fingerprints."""
        json = {
            "kind": "checkpoint",
            "stage": self.stage,
            "subjects": self.subjects,
            "backbone": self.backbone.to_json(),
            "transform": self.transform,
            "timm": self.timm,
            "start": dict(vars(self.start)),
            "fold": self.split.to_json(),
            "settings": self.settings,
        }
        return json | ({} if self.devices is None else {"devices": self.devices}) | dict(self.other)

    @property
    def training(self) -> str:
        """Fingerprint of how it was trained: the same for every fold, and for every subject of the second stage."""
        not_shared = {"fold", "start"} | ({"subjects"} if self.stage == "finetune" else set())
        shared = {name: value for name, value in self.to_json().items() if name not in not_shared}
        return fingerprint(shared | {"start": self.start.training or self.start.weights})

    @property
    def mean_of(self) -> tuple[str, ...]:
        """Trainings of the members of a mean of checkpoints, which earlier versions could make; else ()."""
        return tuple(self.settings.get("soup", ()))

    @property
    def label(self) -> str:
        """Beginning of its folder's name: stage, subject of stage 2, backbone, 'soup' for a mean, fold."""
        subjects = self.subjects if self.stage == "finetune" else ()
        mean = ["soup"] if self.mean_of else []
        return "-".join([self.stage, *subjects, self.backbone.name, *mean, f"fold{self.split.fold}"])


_KEY_NAMES = {"kind", "stage", "subjects", "backbone", "transform", "timm", "start", "fold", "settings", "devices"}


@dataclass(frozen=True, kw_only=True)
class CheckpointFacts:
    """What is known of a checkpoint besides its key."""

    label: str  # what a person reads in messages
    origin: str  # of the first weights, in words
    versions: Mapping[str, str] = field(default_factory=dict)  # {package: version}
    scores: tuple[float, ...] = ()  # of each epoch on the held-out fold: fraction of the noise ceiling, or mean r
    finished: bool = False
    seen_ids: tuple[int, ...] = ()  # ids of the images that it, or the one it started from, was trained on
    taps: Mapping[str, Any] | None = None  # layers that its heads read; None where it does not say
    digests: Mapping[str, str] = field(default_factory=dict)  # {'<folder>/<file>': digest}; older checkpoints: none
    weights: str | None = None  # folder of the epoch that is kept; None before the first
    epoch: int | None = None  # the one that is kept, from 1
    score: float | None = None  # of that epoch
    state: str | None = None  # folder that an interrupted run goes on from
    network: str | None = None  # what --backbone calls a network that is not timm's, a file by its whole path
    pruned: bool | None = None  # whether the backbone was removed after its features were cached
    other: Mapping[str, Any] = field(default_factory=dict)  # what another version wrote besides

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> Self:
        """The facts in the JSON of a checkpoint. Raises KeyError or TypeError where they are none."""
        known = {name: json[name] for name in _FACT_NAMES if name in json}
        rest = {name: value for name, value in json.items() if name not in _FACT_NAMES}
        known |= {"scores": tuple(json.get("scores", ())), "seen_ids": tuple(json["seen_ids"])}
        return of_its_types(cls(**known, other=rest))

    def to_json(self) -> dict[str, Any]:
        """The facts as they are on the disk; what is not known is left out."""
        values = {name: getattr(self, name) for name in _FACT_NAMES}
        values |= {"scores": list(self.scores), "seen_ids": list(self.seen_ids)}
        unknown = [name for name in _UNKNOWN_AT_FIRST if values[name] in (None, {})]
        json = {name: value for name, value in values.items() if name not in unknown}
        return json | dict(self.other)


_FACT_NAMES = tuple(one.name for one in fields(CheckpointFacts) if one.name != "other")


_UNKNOWN_AT_FIRST = ("versions", "taps", "digests", "weights", "epoch", "score", "network", "pruned")


class _Description(msgspec.Struct, forbid_unknown_fields=True, frozen=True):
    """What `checkpoint.json` has."""

    format: int
    recipe: dict[str, Any]
    facts: dict[str, Any]


def write_description(folder: Path, key: CheckpointKey, facts: CheckpointFacts) -> None:
    """Put the description of a checkpoint on the disk, in one step."""
    write_document(folder / DESCRIPTION, {"format": FORMAT, "recipe": key.to_json(), "facts": facts.to_json()})


def read_description(folder: Path) -> tuple[CheckpointKey, CheckpointFacts]:
    """Key and facts of the checkpoint in a folder.

    Raises FileNotFoundError or another OSError, and DocumentError for what is damaged, of another format, or in a
    folder whose name is that of another key.
    """
    description = read_document(folder / DESCRIPTION, _Description)
    if description.format != FORMAT:
        raise DocumentError(f"it is of format {description.format}, and not {FORMAT}")
    try:
        key = CheckpointKey.from_json(description.recipe)
        if not is_named_by(folder.name, key.to_json()):
            raise DocumentError("its key is not the one that the folder is named by")
        return key, CheckpointFacts.from_json(description.facts)
    except (LookupError, TypeError, AttributeError) as error:
        raise DocumentError(f"it lacks what belongs to a checkpoint ({error})") from error
