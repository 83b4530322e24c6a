"""Memory of the device that a training takes: arithmetic on counts, said before the first step."""

from collections.abc import Iterator
from contextlib import contextmanager

from featcache.backbone.outline import Outline
from featcache.errors import ConfigError, first_line
from featcache.machine.device_memory import free_on, is_out_of_memory, said_on
from featcache.machine.progress import say, size_of
from heads.config import TrainConfig

_FLOAT32 = 4  # bytes
_OF_OUTPUTS = 6  # tensors of the size of the outputs: these, responses, and what the losses keep of both


def device_memory(network: Outline, trained: float, n_outputs: float, train: TrainConfig) -> float:
    """Bytes that a training takes on its device at the peak of a step.

    trained : bytes of the weights of the backbone and the heads
    n_outputs : of the heads, for one image
    train : its precision is that of the device, and not 'auto'
    """
    copies = 4 + bool(train.ema)  # weights, gradients and both moments of AdamW; the mean of the weights
    cast = 0.5 if train.precision in ("bfloat16", "float16") else 0.0  # weights as autocast multiplies them
    image = network.kept + _OF_OUTPUTS * _FLOAT32 * n_outputs
    return (copies + cast) * trained + train.batch_size * image


@contextmanager
def refused_where_full(device: str) -> Iterator[None]:
    """Raise ConfigError for what torch says where memory is full, and taking fewer images at a time would not help."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise ConfigError(
            f"--device {device}",
            expected="enough memory for the weights, their gradients and the moments of AdamW",
            found=first_line(error),
            remedy="choose another --backbone or a smaller --size, or end what else takes memory",
        ) from error


def say_memory(label: str, device: str, n_bytes: float) -> None:
    """Say what a training will take of a device's memory, and what of that is free."""
    say(f"{label}: {said_on(device, n_bytes)}, computed; {size_of(free_on(device))} are free")
