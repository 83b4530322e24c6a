"""Backbones: networks that read images. What is asked of one, and those that timm provides."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Protocol, Self

import timm
import torch
from PIL import Image
from timm.data.config import resolve_model_data_config
from timm.data.transforms_factory import create_transform
from torch import nn

from featcache.backbone.extent import TIMM_SETTINGS
from featcache.backbone.fuse import fuse_batch_norms
from featcache.backbone.taps import Taps, choose_taps, map_shapes
from featcache.backbone.weights import build_network, fixed_size, refuse_unknown, weights_digest
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError, first_line

_ROUNDING = 1e-4  # relative difference, of a layer, that sums in another order may leave in float32


class Backbone(Protocol):
    """What extraction needs of a network that reads images. timm is one source of them, see `TimmBackbone`."""

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
    def fused(self) -> bool:
        """Whether its rows differ by rounding from those of the network as it was loaded; see `optimised`."""

    @property
    def transform_settings(self) -> Mapping[str, Any]:
        """What decides how an image becomes its input, in plain values; 'input_size' is (3, height, width)."""

    @property
    def pixels(self) -> Callable[[Image.Image], torch.Tensor]:
        """The function from an image to its pixels as the network reads them, (3, height, width) uint8."""

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """Input of the network, (n_images, 3, height, width) float32, from pixels of that shape."""

    def taps(self, config: LayerConfig) -> Taps:
        """The layers that these settings mean for this network. Raises ConfigError or BackboneError."""

    def shapes(self, taps: Taps) -> dict[str, tuple[int, ...]]:
        """Shape of one row of each array, {array: shape}."""

    def read(self, images: torch.Tensor, taps: Taps) -> dict[str, torch.Tensor]:
        """Rows of each array, {array: (n_images, *shape)}, for input that `normalise` gave."""

    def optimised(self, taps: Taps) -> "Backbone":
        """The same backbone, made faster, if every layer stays the same to rounding; else the backbone itself."""


@dataclass(frozen=True)
class TimmBackbone:
    """A backbone of timm with one of timm's transforms, frozen and in evaluation mode as it is loaded.

    pixels : PIL image -> (3, height, width) uint8, resized, and cropped or padded where that was asked for
    transform_settings : what the whole transform does, in plain values
    digest : digest of every tensor, whatever file the weights came in
    origin : where the weights came from, in words
    fused : whether batch norms are part of the convolutions before them; the digest is of the weights as they were
    """

    name: str
    model: nn.Module
    pixels: Callable[[Image.Image], torch.Tensor]
    transform_settings: Mapping[str, Any]
    digest: str
    origin: str
    fused: bool = False

    def normalise(self, pixels: torch.Tensor) -> torch.Tensor:
        """(n_images, 3, height, width) uint8 -> float32 as the weights expect them, on the device of the pixels."""
        mean, std = (
            torch.tensor(self.transform_settings[key], device=pixels.device)[:, None, None] for key in ("mean", "std")
        )
        return pixels.float().div_(255).sub_(mean).div_(std)

    def transform(self, image: Image.Image) -> torch.Tensor:
        """One image as the network reads it, (3, height, width) float32."""
        return self.normalise(self.pixels(image)[None])[0]

    def read(self, images: torch.Tensor, taps: Taps) -> dict[str, torch.Tensor]:
        """{array: rows} for (n_images, 3, height, width) images; see `Taps.read`."""
        return taps.read(self.model, images.to(memory_format=torch.channels_last))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """The vectors that the classifier of the original network reads, (n_images, n_features)."""
        vectors: torch.Tensor = self.model(images.to(memory_format=torch.channels_last))
        return vectors

    def taps(self, config: LayerConfig) -> Taps:
        """What these settings mean for this network at its size. Raises ConfigError (see `choose_taps`)."""
        with self._takes_its_size():
            return choose_taps(self.model, config, self.transform_settings["input_size"])

    def shapes(self, taps: Taps) -> dict[str, tuple[int, ...]]:
        """{array: shape of a row}, from one empty image. Raises BackboneError if the network cannot take its size."""
        with self._takes_its_size(), torch.inference_mode():
            outputs = self.read(torch.zeros(1, *self.transform_settings["input_size"], device=self._device), taps)
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
                self._device, memory_format=torch.channels_last
            )
            pairs = zip(taps.read(self.model, images).values(), taps.read(model, images).values(), strict=True)
            same = all((before - after).norm() <= _ROUNDING * before.norm() for before, after in pairs)
        return replace(self, model=model, fused=True) if same else self

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    @contextmanager
    def _takes_its_size(self) -> Iterator[None]:
        try:
            yield
        except (RuntimeError, AssertionError, ValueError) as error:
            raise BackboneError(
                "--size",
                expected=f"a size that {self.name} can take",
                found=f"{self.transform_settings['input_size'][-1]} ({first_line(error)[:120]})",
                remedy="choose another, such as the default",
            ) from error


def load_backbone(config: BackboneConfig, device: str = "cpu") -> TimmBackbone:
    """A network of timm with its weights. Raises BackboneError, which names what else can be done."""
    refuse_unknown(config.resolved_name)
    try:
        model, origin = build_network(config)
    except AssertionError as error:
        raise BackboneError(
            "--size",
            expected=f"one that {config.resolved_name} can take",
            found=f"{config.size} ({first_line(error)})",
            remedy="choose another",
        ) from error
    # Channels last: convolutions ran 2 to 3 times as fast on a CPU, with features equal to 1e-6 (docs/decisions/0004).
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    size = {} if config.size is None else {"input_size": (3, config.size, config.size)}
    settings = _data_settings(model, {**size, **TIMM_SETTINGS[config.resolved_fit]})
    return TimmBackbone(
        config.resolved_name,
        model.to(device),
        _pixels(create_transform(**settings, is_training=False, use_prefetcher=True)),
        {key: list(value) if isinstance(value, tuple) else value for key, value in settings.items()},
        weights_digest(model),
        origin,
    )


def described_layers(config: BackboneConfig) -> dict[str, tuple[int, int, int]]:
    """{layer: (n_channels, height, width)} of a network by name, without weights or arithmetic."""
    refuse_unknown(config.resolved_name)
    with torch.device("meta"):
        model = timm.create_model(config.resolved_name, **fixed_size(config)).eval()
    channels, height, width = _data_settings(model, {})["input_size"]
    return map_shapes(model, (channels, config.size or height, config.size or width))


def _data_settings(model: nn.Module, changes: Mapping[str, Any]) -> dict[str, Any]:
    """timm's settings of the transform for these weights, with some of them changed."""
    settings: dict[str, Any] = resolve_model_data_config(model, args=dict(changes))  # type: ignore[no-untyped-call]
    return settings


def _pixels(crop: Callable[[Image.Image], Any]) -> Callable[[Image.Image], torch.Tensor]:
    """timm's transform up to where pixels become numbers to compute with."""
    return lambda image: torch.as_tensor(crop(image))  # older releases of timm give an array
