"""Settings of training, fitting and blending. Imports no torch, so that `--help` answers at once."""

from heads.config.blending import BLEND_RECIPES, BLENDS, LEVELS, BlendConfig, blend_recipe
from heads.config.fitting import (
    HEADS,
    SOLVERS,
    AdamWConfig,
    FitConfig,
    MomentsConfig,
    RidgeConfig,
    SpatialConfig,
    adamw_of,
    refuse_unread,
)
from heads.config.losses import CORRELATIONS, LEAST_SQUARES, LOSS_NAMES, loss_label, parse_loss
from heads.config.training import PAPER_SIZE, RECIPES, STAGES, SoupConfig, StageConfig, TrainConfig, recipe

__all__ = [
    "BLENDS",
    "BLEND_RECIPES",
    "CORRELATIONS",
    "HEADS",
    "LEAST_SQUARES",
    "LEVELS",
    "LOSS_NAMES",
    "PAPER_SIZE",
    "RECIPES",
    "SOLVERS",
    "STAGES",
    "AdamWConfig",
    "BlendConfig",
    "FitConfig",
    "MomentsConfig",
    "RidgeConfig",
    "SoupConfig",
    "SpatialConfig",
    "StageConfig",
    "TrainConfig",
    "adamw_of",
    "blend_recipe",
    "loss_label",
    "parse_loss",
    "recipe",
    "refuse_unread",
]
