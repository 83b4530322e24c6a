"""Settings of a comparison of feature spaces: which bands there are, and how they are compared."""

from dataclasses import dataclass

from featcache.config import DEVICES, at_least, check_split, one_of, option, split_option
from featcache.errors import ConfigError

BAND_SETS = ("layers", "backbones")
COMPARED_PER = ("roi", "surface", "all", "vertex")


@dataclass(frozen=True)
class BandSpec:
    """A band as the user names it: 'NAME=PATTERN:LAYER,LAYER'.

    patterns : of the features that it has, as fit-heads --features has them
    layers : of these features; () for all
    """

    name: str
    patterns: str
    layers: tuple[str, ...] = ()

    @classmethod
    def read(cls, text: str) -> "BandSpec":
        """Read a band. Raises ConfigError for a text that names none."""
        name, equals, rest = (part.strip() for part in text.partition("="))
        patterns, colon, layers = (part.strip() for part in rest.partition(":"))
        named = tuple(layer.strip() for layer in layers.split(",")) if colon else ()
        if not (name and equals and patterns and all(named)) or (colon and not named):
            raise ConfigError(
                "--features",
                expected=f"{', '.join(BAND_SETS)} or bands such as 'early=*lite0*:blocks.0,blocks.1', one in each",
                found=repr(text),
                remedy="write NAME=PATTERN, or NAME=PATTERN:LAYER,LAYER",
            )
        return cls(name, patterns, named)


@dataclass(frozen=True, kw_only=True)
class CompareConfig:
    """Which feature spaces are compared, and how."""

    features: tuple[str, ...] = option(
        ("layers",),
        "Bands to compare. layers: each layer of one set of features is a band. backbones: each set of features in "
        "the work folder is one, those of add-features too. Or a band by name, 'NAME=PATTERN' or "
        "'NAME=PATTERN:LAYER,LAYER', of the features that a pattern names; give the option once for each.",
        "Layers",
    )
    of: str = option(
        "*",
        "Features to choose bands from, by the patterns of fit-heads --features: where there are several backbones, "
        "--features layers is of the one that is named here.",
        "Layers",
    )
    per: str = option(
        "roi",
        f"What a row of the table is of: {', '.join(COMPARED_PER)}. vertex: a file with a row for each vertex besides.",
        "Output",
    )
    n_candidates: int = option(
        8,
        "Random weights of the bands that every vertex chooses from, besides equal weights and each band alone. "
        "Without a band, it chooses from the same ones with that band left out.",
        "Heads",
        name="candidates",
    )
    n_folds: int = option(5, "Parts (folds) that the training images are divided into.", "Data", name="folds")
    fold_seed: int = option(
        0, "Seed of the folds. The same --folds and --fold-seed give the same folds in every command.", "Data"
    )
    split: str = split_option()
    seed: int = option(0, "Seed of the bootstrap and of random weights of bands.", "Data")
    device: str = option("auto", f"Where to compute: {', '.join(DEVICES)}.", "Machine")
    max_memory: float = option(
        0.0, "Main memory that the process may take, in 10^9 bytes. 0: all free memory.", "Machine"
    )

    def __post_init__(self) -> None:
        one_of("per", self.per, COMPARED_PER)
        one_of("device", self.device, DEVICES)
        at_least("candidates", self.n_candidates, 0)
        at_least("folds", self.n_folds, 2)
        at_least("fold-seed", self.fold_seed, 0)
        at_least("seed", self.seed, 0)
        at_least("max-memory", self.max_memory, 0)
        check_split(self.split)
        specs = self.bands
        names = [spec.name for spec in specs]
        if twice := [name for name in names if names.count(name) > 1]:
            raise ConfigError(
                "--features", expected="bands of different names", found=f"{twice[0]!r} twice", remedy="rename one"
            )
        if self.band_set is None and len(specs) < 2:
            raise ConfigError("--features", expected="two bands or more", found=len(specs), remedy="name another one")

    @property
    def band_set(self) -> str | None:
        """'layers' or 'backbones', if bands are all of a kind; None where they are named."""
        return self.features[0].strip() if len(self.features) == 1 and self.features[0].strip() in BAND_SETS else None

    @property
    def bands(self) -> tuple[BandSpec, ...]:
        """The bands that are named; () for all of a kind. Raises ConfigError."""
        return () if self.band_set else tuple(map(BandSpec.read, self.features))
