"""Image backbones: a timm model, its own transform, its weights, and what its layers say of a batch."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import timm
import timm.data
import timm.models
import torch
from PIL import Image
from torch import nn

from featcache.backbone.taps import Taps, choose_taps, map_shapes
from featcache.backbone.weights import _build, _digest, _fixed_size, _refuse_unknown, first_line
from featcache.config import BackboneConfig, LayerConfig
from featcache.errors import BackboneError


@dataclass(frozen=True)
class Backbone:
    """A backbone, frozen and in evaluation mode as it is loaded.

    pixels : PIL image -> (3, height, width) uint8, resized and cropped as timm does for these weights
    transform_settings : what the whole transform does, in plain values
    digest : of every tensor, so of the weights themselves whatever file they came in
    origin : where the weights came from, in words
    fused : whether convolutions do what batch norms did; the digest is of the weights before
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
        """(3, height, width) float32: one image as the network reads it."""
        return self.normalise(self.pixels(image)[None])[0]

    def features(self, images: torch.Tensor, taps: Taps) -> dict[str, torch.Tensor]:
        """{array: rows} for (n_images, 3, height, width) images; see `Taps.read`."""
        return taps.read(self.model, images.to(memory_format=torch.channels_last))

    def pooled(self, images: torch.Tensor) -> torch.Tensor:
        """(n_images, n_features): the vector that the classifier of the original network reads."""
        return self.model(images.to(memory_format=torch.channels_last))

    def taps(self, config: LayerConfig) -> Taps:
        """What these settings mean for this network at its size. Raises ConfigError (see `choose_taps`)."""
        with self._takes_its_size():
            return choose_taps(self.model, config, self.transform_settings["input_size"])

    def shapes(self, taps: Taps) -> dict[str, tuple[int, ...]]:
        """{array: shape of a row}, from one empty image. Raises BackboneError if the network cannot take its size."""
        device = next(self.model.parameters()).device
        with self._takes_its_size(), torch.inference_mode():
            outputs = self.features(torch.zeros(1, *self.transform_settings["input_size"], device=device), taps)
        return {name: tuple(rows.shape[1:]) for name, rows in outputs.items()}

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


def load_backbone(config: BackboneConfig, device: str = "cpu") -> Backbone:
    """Build the network and load its weights. Raises BackboneError, which names the ways out."""
    _refuse_unknown(config.resolved_name)
    try:
        model, origin = _build(config)
    except AssertionError as error:
        raise BackboneError(
            "--size",
            expected=f"one that {config.resolved_name} can take",
            found=f"{config.size} ({first_line(error)})",
            remedy="choose another",
        ) from error
    # Channels last: convolutions ran 2 to 3 times as fast on a CPU, with features equal to 1e-6 (docs/log.md).
    model = model.eval().requires_grad_(False).to(memory_format=torch.channels_last)
    size = {} if config.size is None else {"input_size": (3, config.size, config.size)}
    data = timm.data.resolve_model_data_config(model, args=size)
    return Backbone(
        config.resolved_name,
        model.to(device),
        _pixels(timm.data.create_transform(**data, is_training=False, use_prefetcher=True)),
        {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()},
        _digest(model),
        origin,
    )


def described_layers(config: BackboneConfig) -> dict[str, tuple[int, int, int]]:
    """{layer: (n_channels, height, width)} of a network by name, without weights or arithmetic."""
    _refuse_unknown(config.resolved_name)
    with torch.device("meta"):
        model = timm.create_model(config.resolved_name, **_fixed_size(config)).eval()
    own = timm.data.resolve_model_data_config(model)["input_size"]
    return map_shapes(model, own if config.size is None else (own[0], config.size, config.size))


def _pixels(crop: Callable[[Image.Image], Any]) -> Callable[[Image.Image], torch.Tensor]:
    """timm's transform up to where pixels become numbers to compute with."""
    return lambda image: torch.as_tensor(crop(image))  # older releases of timm give an array
