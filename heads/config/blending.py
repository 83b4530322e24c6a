"""Settings of a blend."""

from dataclasses import dataclass

from featcache.config import at_least, one_of, option

BLENDS = ("uniform", "score", "greedy", "nnls")
LEVELS = ("all", "surface", "roi", "vertex")
_OLD_LEVELS = {"hemisphere": "surface"}  # {name in earlier versions: name}


@dataclass(frozen=True, kw_only=True)
class BlendConfig:
    """How models are weighed against each other, for each subject."""

    method: str = option(
        "score",
        f"How models are weighed: {', '.join(BLENDS)}. uniform: all alike. score: by the score of each. greedy: models "
        "are added as long as that helps. nnls: non-negative least squares.",
        "Blend",
    )
    per: str = option(
        "vertex",
        f"What has weights of its own: {', '.join(LEVELS)}. all: one set of weights for all vertices of a subject.",
        "Blend",
    )
    by: str = "model"  # model | backbone: what has a weight; the models of one backbone are averaged first
    models: str = option(
        "*",
        "Models to take: patterns of their names, such as 'convnext*', or the six digits at their end, with commas "
        "between them. The command 'models' lists them.",
        "Blend",
    )
    exclude: str = option("", "Models to leave out, by the same kind of patterns.", "Blend")
    seed: int = option(0, "Seed of everything random: halves of the models, bootstraps and permutations.", "Blend")

    def __post_init__(self) -> None:
        one_of("method", self.method, BLENDS)
        object.__setattr__(self, "per", _OLD_LEVELS.get(self.per, self.per))
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
