"""Settings of the stages that turn images into features, and fingerprints and differences of keys."""

import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from featcache.errors import ConfigError

PRODUCTS = ("float32", "tf32")  # how CUDA multiplies float32 matrices: as they are, or rounded to TF32
DTYPES = ("auto", "float32", "tf32", "bfloat16", "float16")
DEVICES = ("auto", "cpu", "cuda")
DEFAULT_BACKBONE, DEFAULT_WEIGHTS = "convnext_xlarge", "hub"
OWN_WEIGHTS = "own"  # those that a network's own code gives it
FITS = ("crop", "whole", "pad")  # how an image is brought to the size of the network's input
DEFAULT_FIT = "crop"
POOLED = "pooled"  # the layer that a network's own classifier reads
CLASS_TOKEN = ".cls"  # ends the name of the array that holds the class token of a layer
POOLS = ("avg", "max")
_FEATURES_NAME = re.compile(r"[A-Za-z0-9][\w.+-]{0,63}", re.ASCII)  # it becomes part of names of folders
_LONGEST_LABEL = 80  # characters of a network's name in a file name, which has room for 255 in all


def one_of(option: str, value: str, known: tuple[str, ...]) -> None:
    """Raise ConfigError for a value that is not among the known ones."""
    if value not in known:
        raise ConfigError(
            f"--{option}", expected=f"one of {', '.join(known)}", found=f"{value!r}", remedy="choose one of those"
        )


def at_least(option: str, value: float, minimum: float) -> None:
    """Raise ConfigError for a number below the smallest that works."""
    if not value >= minimum:  # NaN is refused too
        raise ConfigError(f"--{option}", expected=f"{minimum} or more", found=value, remedy="raise it")


def check_split(value: str) -> None:
    """Raise ConfigError for a value of --split that names no kind of split."""
    kind, _, rest = value.partition(":")
    if value not in ("id", "session", "cluster") and not (kind in ("column", "file") and rest):
        raise ConfigError(
            "--split",
            expected="id, session, column:NAME, cluster or file:PATH",
            found=f"{value!r}",
            remedy="choose one of those",
        )


def split_name(value: str) -> str:
    """Name of a split in keys and titles: `--split`, with the file of `file:PATH` without its folders."""
    kind, _, rest = value.partition(":")
    if kind == "file":
        return f"file:{Path(rest).name}"
    return "session" if value == "column:session" else value


def split_option() -> Any:
    """The option --split, which every stage that has folds offers."""
    return option(
        "id",
        "What stays on one side of the folds. id: each image by itself. session, or column:NAME: images of one value "
        "in that column of the dataset. cluster: images that look alike. file:PATH: groups, folds, or training and "
        "test images that a JSON, CSV or TSV file lists. Give the same in every command.",
        "Data",
    )


def is_own_code(network: str) -> bool:
    """Whether --backbone names a Python file and its function: 'folder/my_network.py:build'."""
    return network.rpartition(":")[0].endswith(".py")


def label_of(network: str) -> str:
    """Name of a network in names of files and in tables, out of what --backbone calls it.

    Names of timm stay as they are. Of a Python file and its function it is 'my_network.build', in whichever folder the
    file is. Whatever has a meaning in paths, in patterns of names or in titles becomes a hyphen.
    """
    if is_own_code(network):
        file, _, function = network.rpartition(":")
        network = f"{Path(file).stem}.{function}"
    words = re.sub(r"[^A-Za-z0-9_.+-]+", "-", network)
    return re.sub(r"\.{2,}", ".", words).strip(".-")[:_LONGEST_LABEL] or "network"


def option(default: Any, meaning: str, panel: str, **more: str) -> Any:
    """Field of a settings class that the command line offers as an option.

    Parameters
    ----------
    default : its value where none is given; a function makes one, as of `field(default_factory=...)`
    meaning : the help text
    panel : the group of `--help` that it stands in
    more : name, on the command line, where it is not that of the field; envvar, which gives the option too; shown,
        what help says of the default
    """
    metadata = {"help": meaning, "panel": panel} | more
    return (
        field(default_factory=default, metadata=metadata)
        if callable(default)
        else field(default=default, metadata=metadata)
    )


def usual_workers() -> int:
    """Threads that decode images where the user does not say: one a core, 16 at most."""
    return min(os.cpu_count() or 1, 16)


@dataclass(frozen=True, kw_only=True)
class BackboneConfig:
    """Which network reads the images, and with which weights; None where the user did not say."""

    name: str | None = option(
        None,
        "Network that reads the images: any model name of timm, torchvision:NAME, hf-hub:OWNER/NAME, "
        "open_clip:MODEL/TAG, or FILE.py:FUNCTION, which runs that file.",
        "Backbone",
        name="backbone",
        envvar="FEATCACHE_BACKBONE",
        shown=DEFAULT_BACKBONE,
    )
    weights: str | None = option(
        None,
        "Weights of the network: hub (downloaded), packaged (needs the demo extra), none (random), own (as FILE.py "
        "gives them), or a .safetensors or .pth file.",
        "Backbone",
        envvar="FEATCACHE_WEIGHTS",
        shown=DEFAULT_WEIGHTS,
    )
    size: int | None = option(
        None,
        "Pixels on a side of the images that the network reads.",
        "Backbone",
        envvar="FEATCACHE_SIZE",
        shown="as its weights were trained",
    )
    fit: str | None = option(
        None,
        "How an image is brought to that size. crop: resized and cropped in the middle, as its weights were trained; "
        "the border is lost. whole: the whole image, both sides scaled to the size. pad: the whole image, scaled by "
        "its longer side, on the mean colour.",
        "Backbone",
        envvar="FEATCACHE_FIT",
        shown=DEFAULT_FIT,
    )

    def __post_init__(self) -> None:
        if self.size is not None:
            at_least("size", self.size, 16)
        if self.fit is not None:
            one_of("fit", self.fit, FITS)

    @property
    def resolved_name(self) -> str:
        """Name of the network to load: the one that was given, or the default."""
        return self.name or DEFAULT_BACKBONE

    @property
    def resolved_weights(self) -> str:
        """Weights to load: those that were given, or the default."""
        return self.weights or (OWN_WEIGHTS if is_own_code(self.resolved_name) else DEFAULT_WEIGHTS)

    @property
    def label(self) -> str:
        """Name of the network in names of files and in tables; see `label_of`."""
        return label_of(self.resolved_name)

    @property
    def resolved_fit(self) -> str:
        """How an image is brought to the size, one of FITS: as was asked for, or the default."""
        return self.fit or DEFAULT_FIT

    def applied_to(self, trained: Self) -> Self:
        """Settings of another backbone, with the size and the fit that are given here, if any."""
        return replace(trained, size=self.size or trained.size, fit=self.fit or trained.fit)

    def admits(self, label: str) -> bool:
        """Whether a network of this label may be taken: it was named, or none was."""
        return self.name is None or self.label == label


@dataclass(frozen=True, kw_only=True)
class LayerConfig:
    """Which layers are kept, and on which grid of places over the image.

    layers : auto, all, pooled, names, or numbers from 0; a text with commas between them is read, too
    """

    layers: tuple[str, ...] = ("auto",)
    grid: str = option("auto", "Places on a side of each layer: a number, native, or auto (at most 7).", "Layers")
    pool: str = option("avg", f"How a map of the network is pooled to these places: {', '.join(POOLS)}.", "Layers")

    def __post_init__(self) -> None:
        names = self.layers.split(",") if isinstance(self.layers, str) else self.layers
        object.__setattr__(self, "layers", tuple(name.strip() for name in names))
        one_of("pool", self.pool, POOLS)
        if self.grid not in ("auto", "native") and not (self.grid.isdecimal() and int(self.grid)):
            raise ConfigError(
                "--grid", expected="auto, native or a number from 1", found=f"{self.grid!r}", remedy="correct it"
            )


@dataclass(frozen=True, kw_only=True)
class ExtractConfig:
    """How images become rows of features. Of the machine's settings, only the precision decides what the rows are."""

    backbone: BackboneConfig = field(default_factory=BackboneConfig)
    layers: LayerConfig = field(default_factory=LayerConfig)
    dtype: str = option(
        "auto",
        f"Precision of the network: {', '.join(DTYPES)}. auto: bfloat16 on a device with units for it, "
        "else float16 on CUDA and float32 on a CPU.",
        "Machine",
    )
    batch_size: int = option(32, "Images in one pass of the network.", "Machine")
    workers: int = option(
        usual_workers, "Threads that decode images. With --engine: processes or jobs that share the work.", "Machine"
    )
    image_cache: float = option(
        0.0,
        "Decode the images once into files of at most so many 10^9 bytes, or refuse where they do not fit; backbones "
        "of the same size and crop then read them at the speed of memory. 0: none are kept. Those that are there are "
        "read in either case.",
        "Machine",
    )
    device: str = option("auto", f"Where to compute: {', '.join(DEVICES)}.", "Machine")
    compile: bool = option(
        False,
        "Have torch compile the network, which takes a minute or more; worth it for many images on a GPU.",
        "Machine",
    )
    # none: the backbone as its weights come | auto: the work folder's checkpoints of it, if any (the command's
    # default) | a checkpoint's folder
    checkpoint: str = "none"
    prune: bool = option(
        False,
        "Remove the backbone of each checkpoint of stage 2 once its features are cached. Its heads stay. Then neither "
        "other layers nor new images can be read with it.",
        "Backbone",
    )

    def __post_init__(self) -> None:
        one_of("dtype", self.dtype, DTYPES)
        one_of("device", self.device, DEVICES)
        at_least("batch-size", self.batch_size, 1)
        at_least("workers", self.workers, 1)
        at_least("image-cache", self.image_cache, 0)


_OF_A_MACHINE = ("workers",)  # settings whose usual value is another on each machine
_FINGERPRINTED = re.compile(r".+-([0-9a-f]{12})")


def fingerprint(key: Mapping[str, Any]) -> str:
    """Name of a key: 12 hexadecimal digits that change with any of its values, and never with the order of its names.

    Raises ValueError for what JSON cannot say, such as NaN.
    """
    canonical = json.dumps(key, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(canonical.encode()).hexdigest()[:12]


def settings_key(settings: Any) -> dict[str, Any]:
    """Settings as JSON has them, the same on every machine, with times and sizes of the files that they name."""
    values = {name: value for name, value in asdict(settings).items() if name not in _OF_A_MACHINE}
    plain: dict[str, Any] = json.loads(json.dumps(values, default=str))
    files = {text: _stamp(text) for text in _texts(plain)}
    return plain | {"files": {name: stamp for name, stamp in files.items() if stamp}}


def _texts(content: Any) -> Iterator[str]:
    if isinstance(content, Mapping | list):
        for inner in content.values() if isinstance(content, Mapping) else content:
            yield from _texts(inner)
    elif isinstance(content, str):
        yield content


def _stamp(text: str) -> list[int] | None:
    """Time in ns and size of the file that a setting names, such as file:PATH or PATH.py:FUNCTION, if it names one."""
    for name in (text, text.removeprefix("file:"), text.rpartition(":")[0]):
        if os.path.isfile(name):
            status = os.stat(name)
            return [status.st_mtime_ns, status.st_size]
    return None


def is_named_by(name: str, key: Mapping[str, Any]) -> bool:
    """Whether the name of a folder, '<label>-<fingerprint>', is of a key; a name without a fingerprint is of any."""
    named = _FINGERPRINTED.fullmatch(name)
    try:
        return named is None or named[1] == fingerprint(key)
    except ValueError:  # no folder was ever named by such a key
        return False


def _flatten(key: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{'a': {'b': 1}} -> {'a.b': 1}"""
    flat: dict[str, Any] = {}
    for name, value in key.items():
        flat |= _flatten(value, f"{prefix}{name}.") if isinstance(value, Mapping) else {f"{prefix}{name}": value}
    return flat


def differences(ours: Mapping[str, Any], theirs: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Settings in which two keys differ, {dotted name: (ours, theirs)}; None stands for a setting that is missing."""
    a, b = _flatten(ours), _flatten(theirs)
    return {name: (a.get(name), b.get(name)) for name in sorted(a.keys() | b.keys()) if a.get(name) != b.get(name)}


@dataclass(frozen=True, kw_only=True)
class MadeConfig:
    """Features that were made elsewhere.

    features : file, or 'file:array'; a row for each image
    ids : file with the image of each row; None where `features` is a table that has them
    name : what they are called, in place of a backbone
    """

    features: str
    ids: Path | None = None
    name: str = "features"

    def __post_init__(self) -> None:
        if not _FEATURES_NAME.fullmatch(self.name):
            raise ConfigError(
                "--name",
                expected="1 to 64 letters, digits and . _ + -, of which the first is a letter or a digit",
                found=repr(self.name),
                remedy="choose another name",
            )
