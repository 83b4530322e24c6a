"""The device, the fellow processes and the precision of a training, as accelerate sees them."""

from datetime import timedelta

from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DistributedDataParallelKwargs, InitProcessGroupKwargs

from featcache.errors import ConfigError

_MIXED = {"float32": "no", "bfloat16": "bf16", "float16": "fp16"}  # accelerate's names


def make_accelerator(precision: str, device: str, idle_weights: bool = False) -> Accelerator:
    """The accelerator of this process. Raises ConfigError for float16 on a CPU.

    idle_weights : whether a step may leave weights without a gradient, for which processes then do not wait
    """
    if precision == "float16" and device == "cpu":
        raise ConfigError(
            "--precision float16", expected="a CUDA device", found="the CPU", remedy="use bfloat16 or float32"
        )
    AcceleratorState._reset_state()  # it is one for the whole process, and refuses another precision in a later run
    # the others wait while one of them decodes every image, or fits the heads to start from
    patient = InitProcessGroupKwargs(timeout=timedelta(days=1))
    exchange = DistributedDataParallelKwargs(find_unused_parameters=idle_weights)
    return Accelerator(cpu=device == "cpu", mixed_precision=_MIXED[precision], kwargs_handlers=[patient, exchange])
