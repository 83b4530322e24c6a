"""What an encoder is made of: networks with the layers that are read, heads by subject, and a blend.

All of it is plain values, which a work folder describes itself with and `encoder.json` holds. Tensors are elsewhere.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from featcache.backbone.network import TorchBackbone
from featcache.backbone.taps import Taps
from featcache.cache.keys import FeatureKey
from featcache.config import fingerprint
from heads.blend.saved import BLEND, Coefficients
from heads.modules.readout import HeadTensors


@dataclass(frozen=True, kw_only=True)
class FeaturePart:
    """One set of features: a network, and what is read of it.

    key : what decides the features, as of a feature store
    network : what --backbone calls the network
    weights : the file of its weights, or what --weights calls them; in a checkpoint, that checkpoint's name
    rows : {array: (shape of a row, its type as stored)}
    """

    key: FeatureKey
    network: str
    weights: str
    rows: Mapping[str, tuple[tuple[int, ...], str]]

    @property
    def network_id(self) -> str:
        """Digest of all that decides the network and its input: features that share it come of one pass."""
        key = self.key
        decisive = {"backbone": key.backbone, "weights": key.weights, "transform": dict(key.transform)}
        return fingerprint(decisive | {"dtype": key.dtype, "fused": key.fused, "code": dict(key.code)})

    @property
    def dtypes(self) -> dict[str, str]:
        """{array: its type as stored}"""
        return {name: dtype for name, (_, dtype) in self.rows.items()}

    def taps(self, backbone: TorchBackbone) -> Taps:
        """What is read of the network."""
        code = backbone.reader.code(backbone.model) if self.key.grids else {}
        return Taps(self.key.layers, dict(self.key.grids), self.key.pool, backbone.reader, code)

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "FeaturePart":
        """Read what `to_json` gave. Raises KeyError, TypeError or ValueError for anything else."""
        rows = {name: (tuple(map(int, shape)), str(dtype)) for name, (shape, dtype) in json["rows"].items()}
        key = FeatureKey.from_json(json["key"])
        return cls(key=key, network=str(json["network"]), weights=str(json["weights"]), rows=rows)

    def to_json(self) -> dict[str, Any]:
        """The part as JSON has it."""
        rows = {name: [list(shape), dtype] for name, (shape, dtype) in self.rows.items()}
        return {"key": self.key.to_json(), "network": self.network, "weights": self.weights, "rows": rows}


@dataclass(frozen=True, kw_only=True)
class ModelPart:
    """One model of one subject.

    name : of the model
    features : names of the feature parts that its heads read: one, or one for each fold
    arrays : that heads read, in order
    head : of HEADS
    precision : 'bfloat16' where cores multiply in it
    products : how heads multiply: float32 or tf32
    predictions : name of the prediction store that its heads made
    file : name of the file of its heads, in a folder to hand on
    """

    name: str
    features: tuple[str, ...]
    arrays: tuple[str, ...]
    head: str
    precision: str
    products: str
    predictions: str
    file: str = ""

    @classmethod
    def from_json(cls, json: Mapping[str, Any]) -> "ModelPart":
        """Read what `to_json` gave. Raises KeyError or TypeError for anything else."""
        texts = {name: str(json[name]) for name in ("name", "head", "precision", "products", "predictions", "file")}
        return cls(features=tuple(json["features"]), arrays=tuple(json["arrays"]), **texts)

    def to_json(self) -> dict[str, Any]:
        """The part as JSON has it."""
        return vars(self) | {"features": list(self.features), "arrays": list(self.arrays)}


@dataclass(frozen=True, kw_only=True, eq=False)
class SubjectPart:
    """One subject.

    n_vertices : {surface: number of its vertices}
    models : by name
    rois : {surface: {ROI: (n_vertices,) bool}}
    noise_ceiling : {surface: (n_vertices,) fraction of variance, or None}
    blend : {surface: coefficients} of the blend; {} where there is none
    """

    name: str
    n_vertices: Mapping[str, int]
    models: Mapping[str, ModelPart]
    rois: Mapping[str, Mapping[str, np.ndarray]]
    noise_ceiling: Mapping[str, np.ndarray | None]
    blend: Mapping[str, Coefficients]

    @property
    def names(self) -> list[str]:
        """What can be asked for: the blend, where there is one, and the models."""
        return [*([BLEND] if self.blend else []), *self.models]

    def needed(self, name: str) -> list[str]:
        """The models that predictions by this name are made of."""
        if name != BLEND:
            return [name]
        return list(dict.fromkeys(model for of_surface in self.blend.values() for model in of_surface.needed))

    @property
    def roi_names(self) -> list[str]:
        """ROIs that have a vertex."""
        return list(dict.fromkeys(roi for masks in self.rois.values() for roi, mask in masks.items() if mask.any()))


@dataclass(frozen=True, kw_only=True, eq=False)
class Parts:
    """All parts of an encoder.

    origin : the folder that they are read from
    features : {name: feature part}
    """

    origin: Path
    features: Mapping[str, FeaturePart]
    subjects: Mapping[str, SubjectPart]


class Tensors(Protocol):
    """Where the tensors of an encoder are: a work folder, or a folder to hand on."""

    def network(self, part: FeaturePart, device: str) -> TorchBackbone:
        """The network of some features, with its weights and its transform. Raises FeatcacheError."""

    def heads(self, model: ModelPart) -> HeadTensors:
        """The heads of a model. Raises StoreError."""

    def copy_heads(self, model: ModelPart, path: Path) -> None:
        """Copy the file of a model's heads. Raises StoreError."""


def network_parts(parts: Parts, models: Sequence[ModelPart]) -> dict[str, dict[str, FeaturePart]]:
    """{network: {name: features}} that some models read, network by network."""
    grouped: dict[str, dict[str, FeaturePart]] = {}
    for name in dict.fromkeys(name for model in models for name in model.features):
        grouped.setdefault(parts.features[name].network_id, {})[name] = parts.features[name]
    return grouped
