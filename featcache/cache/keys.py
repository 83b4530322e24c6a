"""What a feature store describes: what decided its rows (its key), and what else is known of them (its facts).

On the disk both are JSON in the store's `zarr.json`. `to_json` gives the same keys in the same order every time, and
leaves out what does not apply, so that the fingerprint in a store's name never changes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, Self

from featcache.cache.store import Store
from featcache.dataset.splits import SplitKey
from featcache.errors import StoreError
from featcache.machine.documents import of_its_types


@dataclass(frozen=True, kw_only=True)
class _TrainingKey:
    """The training that a backbone went through.

    stage : 'pretrain' or 'finetune'
    training : fingerprint of the settings of the training, the same for all of its folds
    soup : number of trainings whose weights were averaged; None for weights that were trained. Such means are no longer
        made; those that were made are still read
    split : which images stay together in its folds
    """

    stage: str
    training: str
    soup: int | None = None
    split: SplitKey = field(default_factory=SplitKey)

    @property
    def label(self) -> str:
        """Stage of the training, and whether the weights are a mean, as names of stores have it."""
        return self.stage if self.soup is None else f"{self.stage}-soup"

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Self:
        """Key of a training, from the JSON of a store. Raises KeyError for what is missing."""
        names = [one.name for one in fields(cls) if one.name not in ("soup", "split")]
        values: dict[str, Any] = {name: mapping[name] for name in names}
        split = SplitKey.from_json(mapping.get("split"))
        return of_its_types(cls(**values, soup=mapping.get("soup"), split=split))

    def to_json(self) -> dict[str, Any]:
        """The key as stores have it."""
        values = {name: value for name, value in vars(self).items() if name != "split" and value is not None}
        return values | self.split.to_json()


@dataclass(frozen=True, kw_only=True)
class FoldKey(_TrainingKey):
    """One training of a backbone, and the fold of images that it did not see.

    fold, n_folds, seed : the fold that was held out, of how many, and the seed that drew them
    """

    fold: int
    n_folds: int
    seed: int


@dataclass(frozen=True, kw_only=True)
class HeldOutFolds(_TrainingKey):
    """One training of a backbone, and its folds that are read together, as prediction stores have them.

    held_out : the fold that each of its backbones did not see
    """

    n_folds: int
    seed: int
    held_out: list[int]

    @classmethod
    def of(cls, keys: Sequence[FoldKey]) -> Self:
        """Some folds of one training."""
        return cls.from_json(keys[0].to_json() | {"held_out": [key.fold for key in keys]})


@dataclass(frozen=True, kw_only=True)
class FeatureKey:
    """Everything that decides the rows of a feature store.

    layers : names in the order of the network; 'pooled' is the vector that its classifier reads
    grids : (height, width) of each layer but 'pooled'
    pool : how the places of a map are pooled to its grid, 'avg' or 'max'; None where no map is read
    images, image_ids : digests of the image files and of their ids, in row order
    weights : digest of every tensor of the backbone
    timm : version of timm
    code : what decides the rows of a network that is not timm's besides, {name: version or digest}
    transform : how an image becomes the input of the backbone
    dtype : precision of the backbone's arithmetic
    fold : the training of the backbone; None for one as its weights came, which saw none of the images
    fused : whether batch norms were made part of the convolutions before them
    """

    layers: tuple[str, ...]
    grids: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    pool: str | None = None
    subject: str
    images: str
    image_ids: str
    backbone: str
    weights: str
    timm: str
    transform: Mapping[str, Any]
    dtype: str
    fold: FoldKey | None = None
    fused: bool = False
    code: Mapping[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, store: Store) -> Self:
        """Key of an open store. Raises StoreError if the store does not hold features."""
        try:
            return cls.from_json(store.key)
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise StoreError(
                store.path,
                expected="a feature store",
                found=f"a key that cannot be read ({error!r})",
                remedy="move it out of this folder, or delete it and run 'extract' again",
            ) from error

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Self:
        """Key of features, from the JSON of a store. Raises KeyError for what is missing."""
        fold = mapping["fold"]
        key = cls(
            layers=tuple(mapping["layers"]),
            grids={layer: (height, width) for layer, (height, width) in mapping.get("grids", {}).items()},
            pool=mapping.get("pool"),
            subject=mapping["subject"],
            images=mapping["images"],
            image_ids=mapping["image_ids"],
            backbone=mapping["backbone"],
            weights=mapping["weights"],
            timm=mapping["timm"],
            transform=dict(mapping["transform"]),
            dtype=mapping["dtype"],
            fold=None if fold is None else FoldKey.from_json(fold),
            fused="batch_norm" in mapping,
            code=dict(mapping.get("code", {})),
        )
        return of_its_types(key)

    def to_json(self) -> dict[str, Any]:
        """The key as stores have it; stores of pooled vectors alone have neither grids nor pool, of timm no code."""
        grids = {layer: list(grid) for layer, grid in self.grids.items()}
        return (
            {"layers": list(self.layers)}
            | ({"grids": grids, "pool": self.pool} if grids else {})
            | {
                "kind": "features",
                "subject": self.subject,
                "images": self.images,
                "image_ids": self.image_ids,
                "backbone": self.backbone,
                "weights": self.weights,
                "timm": self.timm,
                "transform": dict(self.transform),
                "dtype": self.dtype,
                "fold": None if self.fold is None else self.fold.to_json(),
            }
            | ({"batch_norm": "folded"} if self.fused else {})
            | ({"code": dict(self.code)} if self.code else {})
        )


@dataclass(frozen=True, kw_only=True)
class FeatureFacts:
    """What is known of a feature store besides its key; None where it was not written down.

    origin : where the weights came from, in words
    torch, device : version of torch, and the processor that computed the rows
    batch_size : images in one pass, as the first run had it; sums inside a network depend on it in the last bits
    compiled : whether torch compiled the network, on which rows depend as on the batch size
    checkpoint : name of the checkpoint that the backbone was trained in; None for one as its weights came
    seen_ids : ids of the store's images that the backbone was trained on; None for one as its weights came
    network, weights : what --backbone and --weights called a backbone as its weights came
    """

    origin: str | None = None
    torch: str | None = None
    device: str | None = None
    batch_size: int | None = None
    compiled: bool | None = None
    checkpoint: str | None = None
    seen_ids: tuple[int, ...] | None = None
    network: str | None = None
    weights: str | None = None

    @classmethod
    def from_json(cls, mapping: Mapping[str, Any]) -> Self:
        """Facts of features, from the JSON of a store."""
        seen_ids = mapping.get("seen_ids")
        facts = cls(
            origin=mapping.get("origin"),
            torch=mapping.get("torch"),
            device=mapping.get("device"),
            batch_size=mapping.get("batch_size"),
            compiled=mapping.get("compiled"),
            checkpoint=mapping.get("checkpoint"),
            seen_ids=None if seen_ids is None else tuple(seen_ids),
            network=mapping.get("network"),
            weights=mapping.get("weights"),
        )
        return of_its_types(facts)

    def to_json(self) -> dict[str, Any]:
        """The facts as stores have them."""
        facts = {
            "origin": self.origin,
            "torch": self.torch,
            "device": self.device,
            "batch_size": self.batch_size,
            "compiled": self.compiled,
            "checkpoint": self.checkpoint,
            "seen_ids": None if self.seen_ids is None else list(self.seen_ids),
            "network": self.network,
            "weights": self.weights,
        }
        return {name: value for name, value in facts.items() if value is not None}
