"""Settings of scores with intervals and p values."""

from dataclasses import dataclass

from featcache.config import at_least, one_of, option
from heads.config.blending import BlendConfig

FALSE_DISCOVERY = ("bh", "by")


@dataclass(frozen=True, kw_only=True)
class ScoresConfig:
    """Which models are scored, and how sure of them to be."""

    models: str = BlendConfig.models
    exclude: str = BlendConfig.exclude
    against: str = option(
        "", "Model that all others are compared with: a pattern of its name, or its six digits.", "Statistics"
    )
    permutations: int = option(
        1000,
        "Permutations for p values of each vertex, of which the smallest is 1 / (1 + so many); 0: none.",
        "Statistics",
    )
    fdr: str = option(
        "bh",
        "False discovery rate: bh (Benjamini-Hochberg), or by (Benjamini-Yekutieli), for any dependence.",
        "Statistics",
    )
    per_fold: bool = option(False, "Add r of each fold to the table of vertices.", "Statistics")
    seed: int = option(0, "Seed of draws of images and of permutations.", "Statistics")

    def __post_init__(self) -> None:
        at_least("permutations", self.permutations, 0)
        one_of("fdr", self.fdr, FALSE_DISCOVERY)
        at_least("seed", self.seed, 0)
