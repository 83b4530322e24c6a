"""Backbones: networks that read images. What is asked of one, and those that are torch modules, of whatever source."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol, Self

import torch
from PIL import Image
from timm.data.transforms_factory import create_transform
from torch import nn

from featcache.backbone.extent import TIMM_SETTINGS, in_words
from featcache.backbone.fuse import fuse_batch_norms
from featcache.backbone.hooks import device_of, find_layers
from featcache.backbone.sizes import refused_layers, refused_size, unread_pixels, without_numbers
from featcache.backbone.sources.table import Network, OwnTransform, check_backbone, source_of
from featcache.backbone.taps import TIMM, Reader, Taps, choose_taps, map_shapes, read_together
from featcache.backbone.weights import weights_digest
from featcache.config import DEFAULT_FIT, BackboneConfig, LayerConfig
from featcache.errors import BackboneError, first_line
from featcache.machine.progress import say

_ROUNDING = 1e-4  # relative difference, of a layer, that sums in another order may leave in float32
_AS_FAR = 1.5  # times as far from float32 as in the same precision without compiling, at most

Run = Callable[[nn.Module, torch.Tensor, Sequence[Taps]], list[dict[str, torch.Tensor]]]


class Backbone(Protocol):
    """What extraction needs of a network that reads images. Torch modules are `TorchBackbone`s, of every source."""

    @property
    def name(self) -> str:
        """Name of the network, for settings, stores and people."""

    @property
    def digest(self) -> str:
        """Digest of its weights: what tells two networks of one name apart."""

    @property
    def origin(self) -> str:
        """Where its weights came from, in words."""

    @property
    def reads(self) -> str:
        """How an image becomes its input, whose transform that is, and which pixels it leaves out, in words."""

    @property
    def other_tags(self) -> str:
        """What is said where its weights may be of another name, which has another transform; '' for nothing."""

    @property
    def code(self) -> Mapping[str, str]:
        """What decides its rows besides timm, weights and transform, {name: version or digest}; {} for one of timm."""

    @property
    def fused(self) -> bool:
        """Whether its rows differ by rounding from those of the network as it was loaded; see `optimised`."""

    @property
    def is_compiled(self) -> bool:
        """Whether torch compiled it, which changes its rows by rounding as another size of batch does."""

    @property
    def transform_settings(self) -> Mapping[str, Any]:
        """What decides how an image becomes its input, in plain values; 'input_size' is (3, height, width)."""

    @property
    def pixels(self) -> Callable[[Image.Image], torch.Tensor]:
        """The function from an image to its pixels as the network reads them, (3, height, width) of `pixel_dtype`."""

    @property
    def pixel_dtype(self) -> str:
        """Type of the pixels: uint8, or float32 of a transform that normalises them itself."""

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Input of the network, (n_images, 3, height, width) float32, from pixels of that shape."""

    def taps(self, config: LayerConfig) -> Taps:
        """The layers that these settings mean for this network. Raises ConfigError or BackboneError."""

    def shapes(self, taps: Taps) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each array, {array: shape}."""

    def read(self, images: torch.Tensor, taps: Taps) -> dict[str, torch.Tensor]:
        """Rows of each array, {array: (n_images, *shape)}, for input that `normalise` gave."""

    def read_together(self, images: torch.Tensor, taps: Sequence[Taps]) -> list[dict[str, torch.Tensor]]:
        """The same of several taps, in one pass of the network."""

    def optimised(self, taps: Taps) -> "Backbone":
        """The same backbone, made faster, if every layer stays the same to rounding; else the backbone itself."""

    def compiled(self, taps: Taps, batch_size: int, dtype: str) -> "Backbone":
        """The same backbone, compiled for batches of one size and a precision, or the backbone itself; said."""


@dataclass(frozen=True)
class TorchBackbone:
    """A torch module with a transform of images, frozen and in evaluation mode as it is loaded.

    pixels : PIL image -> (3, height, width), resized, and cropped or padded where that was asked for; uint8, or float32
        where the transform is the network's own function
    transform_settings : what the whole transform does, in plain values
    digest : digest of every tensor, whatever file the weights came in
    origin : where the weights came from, in words
    reader : how its layers are read
    code : what decides the rows besides timm, weights and transform, {name: version or digest}
    reads, other_tags : what is said of its transform; see `Backbone`
    fused : whether batch norms are part of the convolutions before them; the digest is of the weights as they were
    run : reads some taps of the module for a batch of images
    """

    name: str
    model: nn.Module
    pixels: Callable[[Image.Image], torch.Tensor]
    transform_settings: Mapping[str, Any]
    digest: str
    origin: str
    reader: Reader = TIMM
    code: Mapping[str, str] = field(default_factory=dict)
    memory_format: torch.memory_format = torch.channels_last
    reads: str = ""
    other_tags: str = ""
    fused: bool = False
    run: Run = read_together
    _scales: dict[torch.device, tuple[torch.Tensor, torch.Tensor]] = field(
        default_factory=dict, init=False, repr=False, compare=False
    )

    @property
    def pixel_dtype(self) -> str:
        """Type of the pixels: uint8, or float32 of the network's own transform."""
        return pixel_dtype(self.transform_settings)

    @property
    def is_compiled(self) -> bool:
        """Whether torch compiled it; see `compiled`."""
        return self.run is not read_together

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n_images, 3, height, width) -> float32 as the weights expect them, on the device of the pixels."""
        if self.pixel_dtype == "float32":
            return pixels.to(memory_format=self.memory_format)
        mean, std = self._scale(pixels.device)
        return pixels.float().div_(255).sub_(mean).div_(std).to(memory_format=self.memory_format)

    def _scale(self, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and deviation of each channel, (3, 1, 1), on a device: copied there once, for a copy makes it wait."""
        if device not in self._scales:
            with torch.inference_mode(False):  # training uses them too
                mean, std = (
                    torch.tensor(self.transform_settings[key], device=device)[:, None, None] for key in ("mean", "std")
                )
            self._scales[device] = mean, std
        return self._scales[device]

    def transform(self, image: Image.Image) -> torch.Tensor:
        """One image as the network reads it, (3, height, width) float32."""
        return self.normalise(self.pixels(image)[None])[0]

    def read(self, images: torch.Tensor, taps: Taps) -> dict[str, torch.Tensor]:
        """{array: rows} for (n_images, 3, height, width) images; see `Taps.read`."""
        return self.read_together(images, [taps])[0]

    def read_together(self, images: torch.Tensor, taps: Sequence[Taps]) -> list[dict[str, torch.Tensor]]:
        """The same for several taps, in one pass of the network."""
        return self.run(self.model, images.to(memory_format=self.memory_format), taps)

    def with_transform(self, settings: Mapping[str, Any]) -> Self:
        """The same network behind timm's transform with these settings, as `transform_settings` has them."""
        crop = create_transform(**_of_timm(settings), is_training=False, use_prefetcher=True)
        return replace(self, pixels=lambda image: torch.as_tensor(crop(image)), transform_settings=dict(settings))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """The vectors that the classifier of the original network reads, (n_images, n_features)."""
        return self.reader.pooled(self.model, images.to(memory_format=self.memory_format))

    def taps(self, config: LayerConfig) -> Taps:
        """What these settings mean for this network at its size. Raises ConfigError (see `choose_taps`)."""
        size = self.transform_settings["input_size"]
        with layers_or_refuse(self.name, self.model, size, self.reader):
            return choose_taps(self.model, config, size, self.reader)

    def shapes(self, taps: Taps) -> dict[str, tuple[int, ...]]:
        """{array: shape of a row}, from one empty image. Raises BackboneError if the network cannot take its size."""
        size = self.transform_settings["input_size"]
        with refused_size(self.name, size[-1]), torch.inference_mode():
            outputs = self.read(torch.zeros(1, *size, device=self._device), taps)
        return {name: tuple(rows.shape[1:]) for name, rows in outputs.items()}

    def optimised(self, taps: Taps) -> Self:
        """The backbone without the batch norms that its convolutions can take over, if every layer stays the same to
        rounding on two random images; else the backbone itself.
        """
        model = fuse_batch_norms(self.model)
        if model is self.model:
            return self
        with torch.inference_mode(), torch.random.fork_rng(devices=[]):
            images = torch.randn(2, *self.transform_settings["input_size"]).to(
                self._device, memory_format=self.memory_format
            )
            pairs = zip(taps.read(self.model, images).values(), taps.read(model, images).values(), strict=True)
            same = all((before - after).norm() <= _ROUNDING * before.norm() for before, after in pairs)
        return replace(self, model=model, fused=True) if same else self

    def compiled(self, taps: Taps, batch_size: int, dtype: str) -> Self:
        """The backbone whose passes torch compiled for batches of one size, or the backbone itself; said.

        dtype : precision of the network

        Shorter batches are filled up, so that there is one shape to compile, and the bits of a row do not depend on
        where a run was interrupted. On random images no layer may be farther from float32 than by the rounding of the
        precision without compiling.
        """
        precision, kind = getattr(torch, dtype, torch.float32), self._device.type
        bare = replace(self, run=read_together)
        run = replace(self, run=partial(_run_filled, torch.compile(read_together, dynamic=False), batch_size))
        try:
            with torch.inference_mode(), torch.random.fork_rng(devices=[]):
                images = torch.randn(batch_size, *self.transform_settings["input_size"]).to(self._device)
                exact = bare.read(images, taps)
                with torch.autocast(kind, precision, enabled=precision != torch.float32):
                    plain, fast = bare.read(images, taps), run.read(images, taps)
            worst = max(_times_as_far(fast[name], plain[name], values) for name, values in exact.items())
        except Exception as error:  # a compiler is missing, or cannot read the network, or memory ends
            say(f"{self.name}: not compiled: {first_line(error)[:120]}")
            return bare
        if worst > _AS_FAR:
            say(f"{self.name}: not compiled: a layer would be {worst:.1f} times as far from float32 as without")
            return bare
        return run

    @property
    def _device(self) -> torch.device:
        return device_of(self.model)


def _run_filled(
    run: Run, batch_size: int, model: nn.Module, images: torch.Tensor, taps: Sequence[Taps]
) -> list[dict[str, torch.Tensor]]:
    """Rows of a batch that is filled up with zeros to its full size, and cut off again."""
    n_images = len(images)
    if n_images < batch_size:
        filled = images.new_zeros(batch_size, *images.shape[1:]).to(memory_format=torch.channels_last)
        filled[:n_images] = images
        images = filled
    return [{name: rows[:n_images] for name, rows in each.items()} for each in run(model, images, taps)]


def _times_as_far(found: torch.Tensor, plain: torch.Tensor, exact: torch.Tensor) -> float:
    """How many times as far from `exact` as `plain` some rows are, to the rounding of sums in float32."""
    distances = [(rows.float() - exact).norm() / exact.norm() for rows in (found, plain)]
    return float(distances[0] / distances[1].clamp(min=_ROUNDING))


def load_backbone(config: BackboneConfig, device: str = "cpu") -> TorchBackbone:
    """A network with its weights, of the source that its name says. Raises BackboneError, which names the way out."""
    network = source_of(config).load(config)
    # Channels last: convolutions ran 2 to 3 times as fast on a CPU, with features equal to 1e-6 (docs/decisions/0004).
    model = network.model.eval().requires_grad_(False).to(memory_format=network.memory_format)
    settings = settings_of(network, config)
    reader = reader_of(network, config, settings["input_size"])  # before the digest: lazy weights are made here
    digest = weights_digest(model)  # before the network moves: every tensor would come back from the device
    return TorchBackbone(
        config.label,
        model.to(device),
        _pixels_of(network, settings),
        {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        digest,
        network.origin,
        reader,
        network.code,
        network.memory_format,
        _in_words(network, settings, model),
        network.other_tags,
    )


def _in_words(network: Network, settings: Mapping[str, Any], model: nn.Module) -> str:
    """What `Backbone.reads` says."""
    words = f"images of {in_words(settings)}"
    if network.transform_origin and "own" not in settings:
        words += f", {network.transform_origin}"
    _, *sides = settings["input_size"]
    rows, columns = unread_pixels(model, settings["input_size"])
    if rows or columns:
        words += f"; it does not read the last {rows} rows and {columns} columns of pixels"
        if sides[0] == sides[1] and rows == columns:
            words += f", and reads all of --size {sides[0] - rows}"
    return words


def say_how_it_reads(backbone: Backbone, trained: bool) -> None:
    """Say how images become the input of a network, and what to do if its weights were read in another way.

    trained : its weights are of a checkpoint, which knows the name of its network
    """
    say(f"{backbone.name}: {backbone.reads}")
    if backbone.other_tags and not trained:
        say(f"{backbone.name}: {backbone.other_tags}")


def settings_of(network: Network, config: BackboneConfig) -> dict[str, Any]:
    """Settings of the transform at the size and fit that are asked for.

    Raises BackboneError for a network whose own function is the transform, where another size or fit is asked for.
    """
    own = network.transform
    if not isinstance(own, OwnTransform):
        size = {} if config.size is None else {"input_size": (3, config.size, config.size)}
        return {**own, **size, **TIMM_SETTINGS[config.resolved_fit]}
    for option, asked, given in (("size", config.size, own.size[-1]), ("fit", config.fit, DEFAULT_FIT)):
        if asked not in (None, given):
            raise BackboneError(
                f"--{option}",
                expected=f"none for {config.label}, whose own transform decides it",
                found=asked,
                remedy=f"leave --{option} out, or change the transform",
            )
    return {"input_size": own.size, "own": own.description}


def pixel_dtype(settings: Mapping[str, Any]) -> str:
    """Type of the pixels that a transform gives: float32 of a network's own function, else uint8."""
    return "float32" if "own" in settings else "uint8"


def reader_of(network: Network, config: BackboneConfig, size: Sequence[int]) -> Reader:
    """What reads the layers of a network. Raises BackboneError for one that cannot read images of this size."""
    if network.timm_layers:
        return TIMM
    with refused_size(config.resolved_name, size[-1]):
        return find_layers(network.model, size, network.layers)


def described_layers(config: BackboneConfig) -> dict[str, tuple[int, int, int]]:
    """{layer: (n_channels, height, width)} of a network by name, without weights or arithmetic where it is possible.

    Raises BackboneError as `extract` does: for a name that is none, and for layers that cannot be read at the size.
    """
    check_backbone(config)
    return without_numbers(lambda device: _described(config, device), config.size is None)


def _described(config: BackboneConfig, device: str) -> dict[str, tuple[int, int, int]]:
    model, settings, reader = outlined(config, device)
    size = settings["input_size"]
    with layers_or_refuse(config.resolved_name, model, size, reader):
        return map_shapes(model, size, reader)


def outlined(config: BackboneConfig, device: str) -> tuple[nn.Module, dict[str, Any], Reader]:
    """A network for its shapes alone, the settings of its transform and what reads its layers. Raises BackboneError.

    device : where it is, if it can be there
    """
    with refused_size(config.resolved_name, config.size or "its own"):
        network = source_of(config).outline(config, device)
    model, settings = network.model.eval(), settings_of(network, config)
    return model, settings, reader_of(network, config, settings["input_size"])


def layers_or_refuse(name: str, model: nn.Module, size: Sequence[int], reader: Reader) -> AbstractContextManager[None]:
    """Raise BackboneError where a network takes no images of (3, height, width), or its layers cannot be read there."""

    def whole() -> None:
        with torch.inference_mode():
            reader.pooled(model, torch.zeros(1, *size, device=device_of(model)))

    return refused_layers(name, size[-1], whole)


def _of_timm(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a transform as timm takes them: lists, as JSON has them, are tuples."""
    return {name: tuple(value) if isinstance(value, list) else value for name, value in settings.items()}


def _pixels_of(network: Network, settings: Mapping[str, Any]) -> Callable[[Image.Image], torch.Tensor]:
    """The transform up to where pixels become numbers to compute with."""
    if isinstance(network.transform, OwnTransform):
        return network.transform.call
    crop = create_transform(**settings, is_training=False, use_prefetcher=True)
    return lambda image: torch.as_tensor(crop(image))  # older releases of timm give an array
