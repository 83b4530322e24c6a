"""Predict responses of the visual cortex from cached image features: extract once, refit heads in seconds, blend.

    import featcache as fc

    data = fc.Dataset.from_arrays(images=paths, responses=y, rois=masks, sessions=runs, work="work")
    fc.extract(data.subjects, fc.ExtractConfig(), "work")
    fc.fit_heads(data.subjects, fc.FitConfig(loss="mnnpc"), "work")
    fc.blend(data, fc.BlendConfig(), "work")

These names, listed in `__all__`, are the public interface. Each is loaded when it is first used, so that importing
featcache takes no time. Everything else may change from one version to the next.
"""

from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {  # {name: where it is, and its name there if that is another}
    "AdamWConfig": "heads.config",
    "BackboneConfig": "featcache.config",
    "BandedRidge": "heads.solvers.banded_estimator",
    "BlendConfig": "heads.config",
    "CompareConfig": "heads.config",
    "CoreConfig": "heads.config",
    "Dataset": "featcache.dataset.subject",
    "ExtractConfig": "featcache.config",
    "FeatcacheError": "featcache.errors",
    "FitConfig": "heads.config",
    "Images": "featcache.dataset.subject",
    "KernelHead": "heads.solvers.estimator",
    "LOSSES": "heads.scores.losses",
    "LayerConfig": "featcache.config",
    "RidgeConfig": "heads.config",
    "RidgeHead": "heads.solvers.estimator",
    "SimulateConfig": "featcache.simulate",
    "SpatialConfig": "heads.config",
    "StageConfig": "heads.config",
    "Subject": "featcache.dataset.subject",
    "TrainConfig": "heads.config",
    "accuracy": "heads.scores.metrics:noise_normalized_accuracy",
    "add_features": "featcache.cache.elsewhere",
    "blend": "heads.blend.run",
    "explode_rois": "heads.statistics.table",
    "compare": "heads.compare.run",
    "extract": "featcache.cache.extract",
    "fit_heads": "heads.fit.run",
    "export_encoder": "heads.encoder.export:export_work",
    "load_encoder": "heads.encoder.folder",
    "open_dataset": "featcache.dataset.open",
    "pearson_r": "heads.scores.metrics",
    "scores": "heads.statistics.api",
    "train_stage": "heads.backbones.stages",
}
__all__ = ["__version__", *_PUBLIC]


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module 'featcache' has no attribute {name!r}")
    module, _, name_there = _PUBLIC[name].partition(":")
    value = getattr(load_module(module), name_there or name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


def load_module(name: str) -> ModuleType:
    """Import a module of featcache or of heads, which is beside featcache in the repository and inside it elsewhere."""
    if name.partition(".")[0] == "heads" and Path(__file__).with_name("heads").is_dir():
        import_module("featcache.heads")  # which takes the name heads
    return import_module(name)
