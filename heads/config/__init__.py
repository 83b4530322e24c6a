"""Settings of training, fitting and blending. Imports no torch, so that `--help` answers at once."""

from heads.config.blending import BLEND_PRESETS, BLENDS, LEVELS, BlendConfig, blend_preset
from heads.config.comparing import CompareConfig
from heads.config.engines import EngineConfig
from heads.config.fitting import (
    AdamWConfig,
    CoreConfig,
    FitConfig,
    RidgeConfig,
    SpatialConfig,
    adamw_of,
    refuse_unread,
)
from heads.config.losses import CORRELATIONS, LEAST_SQUARES, LOSS_NAMES, loss_label, parse_loss
from heads.config.solvers import HEADS, SOLVERS
from heads.config.statistics import ScoresConfig
from heads.config.training import PAPER_FIT, PAPER_SIZE, PRESETS, STAGES, StageConfig, TrainConfig, preset

__all__ = [
    "BLENDS",
    "BLEND_PRESETS",
    "CORRELATIONS",
    "HEADS",
    "LEAST_SQUARES",
    "LEVELS",
    "LOSS_NAMES",
    "PAPER_FIT",
    "PAPER_SIZE",
    "PRESETS",
    "SOLVERS",
    "STAGES",
    "AdamWConfig",
    "BlendConfig",
    "CompareConfig",
    "CoreConfig",
    "EngineConfig",
    "FitConfig",
    "RidgeConfig",
    "ScoresConfig",
    "SpatialConfig",
    "StageConfig",
    "TrainConfig",
    "adamw_of",
    "blend_preset",
    "loss_label",
    "parse_loss",
    "preset",
    "refuse_unread",
]
