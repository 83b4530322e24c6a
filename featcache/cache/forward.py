"""Rows of images: passes of a network over batches, which are started on a device and waited for later."""

import math
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch

from featcache.backbone.network import Backbone
from featcache.backbone.taps import Taps
from featcache.machine.device import to_device, to_host

_BEYOND = 65_520.0  # the smallest number that float16 rounds to infinity


class BeyondFloat16Error(Exception):
    """A layer has values that float16 cannot hold."""


Rows = dict[str, torch.Tensor]  # {array: (n_images, *shape)}


def start_rows(
    backbone: Backbone,
    pixels: torch.Tensor,
    wanted: Sequence[tuple[Taps, Mapping[str, str]]],
    dtype: str,
    device: str,
    n_read: int = 0,
) -> Callable[[], list[Rows]]:
    """Start one pass of the network, and return the function that waits for its rows, in main memory, and gives them.

    pixels : (n_images, 3, height, width) as `backbone.pixels` gives them
    wanted : taps, and {array: type} of their rows as stored
    dtype : precision of the network
    n_read : images that the network reads; fewer are filled up. Sums inside a network depend on the number of images,
        and not on which others these are, so that the row of an image is the same in whichever batch it is

    The host waits for the device once, in that function, which raises BeyondFloat16Error for values that float16 cannot
    hold. Any thread may call it.
    """
    precision = getattr(torch, dtype, torch.float32)  # TF32 is no type, but how CUDA multiplies float32
    with torch.inference_mode(), torch.autocast(device, precision, enabled=precision != torch.float32):
        images = _filled(backbone.normalise(to_device(pixels, device)), n_read)
        taps, *more = [taps for taps, _ in wanted]
        together = backbone.read_together(images, [taps, *more]) if more else [backbone.read(images, taps)]
        names, found, narrow, extremes = [], [], [], []
        for number, (rows, (_, dtypes)) in enumerate(zip(together, wanted, strict=True)):
            for layer, values in rows.items():
                names.append((number, layer))
                found.append(values[: len(pixels)].to(getattr(torch, dtypes[layer])))
                if dtypes[layer] == "float16":
                    narrow.append(layer)
                    extremes.append(torch.stack(torch.aminmax(values[: len(pixels)])).float())
        arrive = to_host([*found, torch.stack(extremes) if extremes else torch.empty(0, 2)])

    def arrived() -> list[Rows]:
        *all_values, limits = arrive()
        for layer, (low, high) in zip(narrow, limits.tolist(), strict=True):
            refuse_beyond_float16(layer, low, high)
        each: list[Rows] = [{} for _ in wanted]
        for (number, layer), values in zip(names, all_values, strict=True):
            each[number][layer] = values
        return each

    return arrived


def _filled(pixels: torch.Tensor, n_images: int) -> torch.Tensor:
    """The images, and the last of them again, up to that many."""
    missing = n_images - len(pixels)
    if missing <= 0:
        return pixels
    return torch.cat([pixels, pixels[-1:].expand(missing, *pixels.shape[1:])]).contiguous(
        memory_format=torch.channels_last
    )


def rows_of(
    backbone: Backbone,
    pixels: torch.Tensor,
    wanted: Sequence[tuple[Taps, Mapping[str, str]]],
    dtype: str,
    device: str,
    n_read: int = 0,
) -> list[Rows]:
    """The rows of one pass; see `start_rows`. Raises BeyondFloat16Error."""
    return start_rows(backbone, pixels, wanted, dtype, device, n_read)()


def refuse_beyond_float16(layer: str, low: float, high: float) -> None:
    """Raise BeyondFloat16Error for a smallest and a largest value of which one is finite and no float16.

    Where there is NaN or infinity, both are that: such values are no overflow, and are refused by the store.
    """
    if math.isfinite(low) and math.isfinite(high) and max(-low, high) >= _BEYOND:
        raise BeyondFloat16Error(layer)


def as_stored(values: np.ndarray, layer: str, dtype: str) -> np.ndarray:
    """Rows of another store as one of this type keeps them. Raises BeyondFloat16Error."""
    if dtype == "float16" and values.dtype != np.float16:
        refuse_beyond_float16(layer, float(values.min()), float(values.max()))
    return values.astype(dtype, copy=False)
