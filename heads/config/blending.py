"""Settings of a blend."""

from dataclasses import dataclass

from featcache.config import at_least, one_of

BLENDS = ("uniform", "score", "greedy", "nnls")
LEVELS = ("all", "hemisphere", "roi", "vertex")


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """How models are weighed against each other, for each subject."""

    method: str = "score"  # uniform | score | greedy | nnls
    per: str = "vertex"  # all | hemisphere | roi | vertex: what has weights of its own
    by: str = "model"  # model | backbone: what has a weight; the models of one backbone are averaged first
    models: str = "*"  # patterns of names, with commas between: which models
    exclude: str = ""  # patterns as well: which of them not
    seed: int = 0  # of the bags of a greedy blend, the bootstrap and the permutations

    def __post_init__(self) -> None:
        one_of("method", self.method, BLENDS)
        one_of("per", self.per, LEVELS)
        one_of("by", self.by, ("model", "backbone"))
        at_least("seed", self.seed, 0)

    @property
    def label(self) -> str:
        return f"{self.method} per {self.per}" + (" by backbone" if self.by == "backbone" else "")


BLEND_PRESETS = ("best", "paper")


def blend_preset(name: str) -> BlendConfig:
    """best: what measured best; paper: as published, an average weighted by backbone. Raises ConfigError."""
    one_of("preset", name, BLEND_PRESETS)
    return BlendConfig(method="score", per="all", by="backbone") if name == "paper" else BlendConfig()
