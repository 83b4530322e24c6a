"""Keys of feature stores, as extraction would write them."""

from typing import Any

from featcache.cache.keys import FeatureKey


def feature_key(subject: str, **changes: Any) -> dict[str, Any]:
    """The JSON of a key of pooled features of a frozen backbone, with some of it changed or added."""
    key = FeatureKey(
        layers=("pooled",),
        subject=subject,
        images="these",
        image_ids="ids",
        backbone="b",
        weights="w",
        timm="1.0",
        transform={"input_size": [3, 32, 32]},
        dtype="float32",
    )
    return key.to_json() | changes


def training_of(
    fold: int, training: str = "t", stage: str = "pretrain", n_folds: int = 3, seed: int = 0
) -> dict[str, Any]:
    """The JSON of the training of a backbone that did not see a fold."""
    return {"stage": stage, "training": training, "fold": fold, "n_folds": n_folds, "seed": seed}
