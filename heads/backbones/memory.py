"""Memory of the device that a training takes: arithmetic on counts, said before the first step."""

from featcache.backbone.outline import Outline
from featcache.machine.device_memory import free_on, said_on
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


def say_memory(label: str, device: str, n_bytes: float) -> None:
    """Say what a training will take of a device's memory, and what of that is free."""
    say(f"{label}: {said_on(device, n_bytes)}, computed; {size_of(free_on(device))} are free")
