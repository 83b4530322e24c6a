"""The device, the fellow processes and the precision of a training, as accelerate sees them."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from featcache.errors import ConfigError
from featcache.machine.device import network_dtype

_MIXED = {"float32": "no", "tf32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names


def resolve_precision(precision: str, device: str) -> str:
    """The precision that a setting means on 'cpu' or 'cuda'. Raises ConfigError for one that the device lacks.

    'auto' is float32 on a CPU. On CUDA it is bfloat16, or float16 where the device computes no bfloat16; weights, their
    gradients and the optimiser are float32 in all of them.
    """
    if device == "cpu":
        if precision in ("tf32", "float16"):
            raise ConfigError(
                f"--precision {precision}", expected="a CUDA device", found="the CPU", remedy="use bfloat16 or float32"
            )
        return "float32" if precision == "auto" else precision
    return network_dtype(precision, device)


def make_accelerator(precision: str, device: str, idle_weights: bool = False) -> Accelerator:
    """The accelerator of this process.

    precision : as `resolve_precision` gives it
    idle_weights : whether a step may leave weights without a gradient, for which processes then do not wait
    """
    # it is one for the whole process: it refuses another precision in a later run, and keeps the device of the first
    other_device = PartialState._shared_state != {} and PartialState().device.type != device
    AcceleratorState._reset_state(reset_partial_state=other_device)
    # the others wait while one of them decodes every image, or fits the heads to start from
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    exchange = DistributedDataParallelKwargs(find_unused_parameters=idle_weights)
    return Accelerator(cpu=device == "cpu", mixed_precision=_MIXED[precision], kwargs_handlers=[patient, exchange])
