"""Heads of every kind, fitted to a subject whose maps are known."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from featcache.cache.store import open_store
from featcache.dataset.subject import Subject
from heads.blend.models import Model
from heads.config import AdamWConfig, FitConfig, SpatialConfig
from heads.fit.run import fit_heads
from heads.solvers.layers.priors import prior_set
from support.planted import planted_features


def _spatial(**settings: Any) -> FitConfig:
    adamw = AdamWConfig(learning_rate=6e-2, weight_decay=0.05, epochs=25, batch_size=32, patience=25)
    spatial = SpatialConfig(token_dropout=0.1, smoothness=0.0, **settings)
    return FitConfig(loss="mse", head="spatial", solver="adamw", n_folds=3, adamw=adamw, spatial=spatial)


_RIDGE = FitConfig(loss="mse", n_folds=3)
FITS = {
    "ridge": _RIDGE,
    "few priors": _RIDGE,
    "few priors, near": FitConfig(loss="mse", n_folds=3, layers="near"),
    "spatial": _spatial(rank=1),
    "rank 2": _spatial(rank=2),
    "space": _spatial(rank=1, space=10),
}
Fitted = Callable[..., tuple[Path, Subject, list[Model]]]


@pytest.fixture(scope="session")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Fitted:
    """Fits some of FITS, each set of them once: the work folder, the subject and its models."""
    known: dict[tuple[str, ...], tuple[Path, Subject, list[Model]]] = {}

    def fit(*names: str) -> tuple[Path, Subject, list[Model]]:
        if names not in known:
            root = tmp_path_factory.mktemp("planted")
            subject = planted_features(root / "tree", root / "work")
            models = []
            for name in names:
                with pytest.MonkeyPatch.context() as patch:
                    patch.setattr("heads.solvers.layers.ridge.PENALTIES", (0.01, 0.1, 1.0))
                    if name.startswith("few priors"):
                        patch.setattr("heads.solvers.layers.ridge.prior_set", lambda *about: prior_set(*about)[::20])
                    (fit,) = fit_heads([subject], FITS[name], root / "work")
                models.append(Model.from_store(open_store(fit.path)))
            known[names] = (root / "work", subject, models)
        return known[names]

    return fit
