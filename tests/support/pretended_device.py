"""A pretended CUDA device: code runs on it as on a real one, with the CPU's numbers, and is told what it got wrong.

    with pretended_cuda() as device:
        fit(..., device="cuda")
    assert not device.waits_in("heads/solvers")

What it is for, and what it cannot show: docs/decisions/0036-pretended-device.md.
"""

import sys
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any
from unittest.mock import patch

import torch
import torch._dynamo  # optimisers import it at first use, and it must not see what is patched here
from accelerate.state import AcceleratorState, GradientState
from torch.amp import autocast_mode
from torch.utils import _foreach_utils

from support.pretended_tensor import CUDA, DeviceTensor, Dispatch, place

_TOTAL = 8 << 30  # bytes of memory unless a test says otherwise


@dataclass(frozen=True)
class Wait:
    """The host waited for the device. place : the project's file and line"""

    operation: str
    place: str


@dataclass(frozen=True)
class Copy:
    """Numbers went between main memory and the device. way : 'to device' or 'to host'; pinned : the main memory"""

    way: str
    pinned: bool
    blocking: bool
    n_bytes: int
    place: str


class PretendedDevice:
    """What happened on the device, and its memory.

    waits, copies : in their order
    allocated, peak : bytes of tensors on the device, now and at most; what an operation needs inside is not counted
    """

    def __init__(self, total: int = _TOTAL) -> None:
        self.waits: list[Wait] = []
        self.copies: list[Copy] = []
        self.total, self.others = total, 0
        self.allocated = self.peak = 0
        self.dispatch = Dispatch(self)
        self._storages: set[int] = set()
        self._refusals: list[tuple[int, int]] = []
        self._late: list[tuple[torch.Tensor, torch.Tensor]] = []
        self._reading: list[tuple[torch.Tensor, torch.Tensor, str]] = []

    # what a test asks

    def waits_in(self, part: str = "") -> list[Wait]:
        """Waits whose place has this part in it."""
        return [wait for wait in self.waits if part in wait.place]

    def copies_in(self, part: str = "", way: str = "") -> list[Copy]:
        """Copies whose place has this part in it; way : 'to device' or 'to host' only"""
        return [copy for copy in self.copies if part in copy.place and way in copy.way]

    def by_place(self) -> str:
        """All waits and copies as a table, the most frequent first."""
        rows = Counter((f"waits for {wait.operation}", wait.place) for wait in self.waits)
        for copy in self.copies:
            kind = "pinned" if copy.pinned else "pageable"
            rows[f"copies {copy.way}, {kind}{', waits' if copy.blocking else ''}", copy.place] += 1
        return "\n".join(f"{number:6} {what:40} {where}" for (what, where), number in rows.most_common())

    def forget(self) -> None:
        """Count from now on."""
        self.waits.clear()
        self.copies.clear()
        self.peak = self.allocated

    # what a test sets

    def limit_memory(self, total: int, others: int = 0) -> None:
        """Have a device of `total` bytes, `others` of which other processes hold: an allocation beyond fails."""
        self.total, self.others = total, others

    def refuse_memory(self, larger_than: int, times: int = 1) -> None:
        """Let the next `times` allocations of more than some bytes fail, as out of memory."""
        self._refusals = [(larger_than, times)]

    @property
    def free(self) -> int:
        """Bytes that are left."""
        return self.total - self.others - self.allocated

    # what the tensors tell

    def waited(self, operation: str) -> None:
        self.waits.append(Wait(operation, place()))
        self.settle()

    def copied(self, way: str, tensor: torch.Tensor, *, pinned: bool, blocking: bool) -> None:
        where = place()
        self.copies.append(Copy(way, pinned, blocking, tensor.numel() * tensor.element_size(), where))
        if blocking:
            self.waits.append(Wait(f"a copy {way}", where))
            self.settle()

    def deliver_later(self, target: torch.Tensor, source: torch.Tensor) -> None:
        """Put numbers into main memory at the next wait only: until then it has none that are right."""
        target.fill_(torch.nan if target.is_floating_point() else 85)
        self._late.append((target, source))

    def read_later(self, source: torch.Tensor) -> None:
        """Remember what main memory has until the next wait: a copy that is under way must not be written over."""
        self._reading.append((source, source.detach().clone(), place()))

    def settle(self) -> None:
        """End the copies that are under way. Raises RuntimeError where their source was changed meanwhile."""
        late, self._late = self._late, []
        reading, self._reading = self._reading, []
        for target, source in late:
            with torch.inference_mode(target.is_inference()):  # of whichever thread waits
                target.copy_(source)
        for source, before, where in reading:
            if not torch.equal(source.detach().nan_to_num(), before.nan_to_num()):
                raise RuntimeError(f"pinned memory was written over while it was copied to the device at {where}")

    def allocated_for(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage._cdata in self._storages:
            return
        n_bytes = storage.nbytes()
        self._refuse(n_bytes)
        self._storages.add(storage._cdata)
        self.allocated += n_bytes
        self.peak = max(self.peak, self.allocated)
        weakref.finalize(storage, self._freed, storage._cdata, n_bytes).atexit = False

    def _freed(self, storage: int, n_bytes: int) -> None:
        self._storages.discard(storage)
        self.allocated -= n_bytes

    def _refuse(self, n_bytes: int) -> None:
        refused = n_bytes > self.free
        if self._refusals and n_bytes > self._refusals[0][0]:
            larger_than, times = self._refusals.pop()
            refused = True
            self._refusals = [(larger_than, times - 1)] if times > 1 else []
        if refused:
            raise torch.OutOfMemoryError(
                f"CUDA out of memory. Tried to allocate {n_bytes / 2**20:.2f} MiB. GPU 0 has a total capacity of "
                f"{self.total / 2**30:.2f} GiB of which {self.free / 2**20:.2f} MiB is free."
            )


@contextmanager
def pretended_cuda(total: int = _TOTAL) -> Iterator[PretendedDevice]:
    """Have torch believe in one CUDA device, of `total` bytes, in this thread and in those that it starts."""
    device = PretendedDevice(total)
    with ExitStack() as stack:
        for patched in _patches(device):
            stack.enter_context(patched)
        stack.enter_context(_without_accelerate_state())
        stack.enter_context(device.dispatch.modes())
        yield device
        device.settle()


@contextmanager
def _without_accelerate_state() -> Iterator[None]:
    """accelerate keeps the device for the whole process."""
    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    try:
        yield
    finally:
        AcceleratorState._reset_state(True)
        GradientState._reset_state()


def _patches(device: PretendedDevice) -> Iterator[Any]:
    yield patch.multiple(torch.cuda, create=True, **_cuda(device))
    if hasattr(torch, "accelerator"):  # torch 2.6
        yield patch.multiple(torch.accelerator, create=True, **_accelerator(device))
    yield patch.object(threading.Thread, "run", _run_in_modes(device, threading.Thread.run))
    yield patch.object(autocast_mode.autocast, "__init__", _autocast_on_cpu(autocast_mode.autocast.__init__))
    for name in ("is_autocast_enabled", "get_autocast_dtype"):
        yield patch.object(torch, name, _asked_of_cpu(getattr(torch, name)))
    yield patch.object(torch.autograd, "_engine_run_backward", device.dispatch.run_backward(_ENGINE))
    yield patch.object(torch, "Generator", _Generator)
    yield patch.object(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
    for module in (_foreach_utils, sys.modules[torch.optim.Optimizer.__module__]):
        types = [*module._foreach_supported_types, DeviceTensor]
        yield patch.object(module, "_foreach_supported_types", types)


def _cuda(device: PretendedDevice) -> dict[str, Any]:
    """{name: what `torch.cuda` has of this name}."""

    def nothing(*_: Any, **__: Any) -> None:
        return None

    def wait(*_: Any, **__: Any) -> None:
        device.waited("synchronize")

    def forget_peak(*_: Any) -> None:
        device.peak = device.allocated

    properties = SimpleNamespace(name="pretended", total_memory=device.total, major=9, minor=0, multi_processor_count=1)
    stream = _Stream(device)
    values: dict[str, Any] = {
        "get_rng_state": lambda *_: torch.get_rng_state(),
        "set_rng_state": lambda state, *_: torch.set_rng_state(state),
        "get_rng_state_all": lambda: [torch.get_rng_state()],
        "set_rng_state_all": lambda states: torch.set_rng_state(states[0]),
        "get_device_name": lambda *_: properties.name,
        "get_device_properties": lambda *_: properties,
        "get_device_capability": lambda *_: (properties.major, properties.minor),
        "mem_get_info": lambda *_: (device.free, device.total),
        "memory_allocated": lambda *_: device.allocated,
        "memory_reserved": lambda *_: device.allocated,
        "max_memory_allocated": lambda *_: device.peak,
        "max_memory_reserved": lambda *_: device.peak,
        "reset_peak_memory_stats": forget_peak,
        "synchronize": wait,
        "Stream": lambda *_, **__: _Stream(device),
        "Event": lambda *_, **__: _Event(device),
        "stream": lambda _: ExitStack(),
        "device": lambda _: ExitStack(),
        "current_stream": lambda *_: stream,
        "default_stream": lambda *_: stream,
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_bf16_supported": lambda *_, **__: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
    }
    silent = ("_lazy_init", "init", "set_device", "empty_cache", "ipc_collect", "manual_seed", "manual_seed_all")
    return values | dict.fromkeys(silent, nothing)


def _accelerator(device: PretendedDevice) -> dict[str, Any]:
    """{name: what `torch.accelerator` has of this name}."""
    return {
        "is_available": lambda: True,
        "current_accelerator": lambda *_, **__: torch.device("cuda"),
        "device_count": lambda: 1,
        "current_device_index": lambda: 0,
        "set_device_index": lambda *_: None,
        "current_stream": lambda *_: _Stream(device),
        "synchronize": lambda *_: device.waited("synchronize"),
    }


class _Stream:
    """A stream of a device that has ended all work, except copies, when it is asked."""

    device = CUDA

    def __init__(self, device: PretendedDevice) -> None:
        self._device = device

    def synchronize(self) -> None:
        self._device.waited("synchronize")

    def wait_stream(self, stream: Any) -> None:
        """Nothing: work runs in its order."""

    wait_event = wait_stream

    def record_event(self, event: Any = None) -> "_Event":
        return event or _Event(self._device)

    def is_capturing(self) -> bool:
        return False

    def query(self) -> bool:
        self._device.settle()
        return True


class _Event(_Stream):
    def record(self, stream: Any = None) -> None:
        """Nothing: work runs in its order."""

    def wait(self, stream: Any = None) -> None:
        """Nothing: work runs in its order."""

    def elapsed_time(self, other: Any) -> float:
        return 0.0


class _Generator(torch.Generator):
    """Random numbers of the CPU for either device."""

    def __new__(cls, device: Any = "cpu") -> "_Generator":
        made = super().__new__(cls, "cpu")
        made.asked = torch.device(device)
        return made

    device = property(lambda self: CUDA if self.asked.type == "cuda" else self.asked)  # type: ignore[assignment]


def _run_in_modes(device: PretendedDevice, run: Any) -> Any:
    def run_in_modes(thread: threading.Thread) -> None:
        with device.dispatch.modes():
            run(thread)

    return run_in_modes


def _autocast_on_cpu(init: Any) -> Any:
    """Autocast of CUDA is the CPU's, whose kernels compute; without a dtype it is float16, as CUDA's is."""

    def __init__(self: Any, device_type: str, dtype: Any = None, *args: Any, **kwargs: Any) -> None:  # noqa: N807
        if device_type == "cuda":
            device_type, dtype = "cpu", dtype or torch.float16
        init(self, device_type, dtype, *args, **kwargs)

    return __init__


def _asked_of_cpu(function: Any) -> Any:
    def asked(device_type: str | None = None) -> Any:
        return function("cpu" if device_type in (None, "cuda") else device_type)

    return asked


def _grouped(lists: Any, with_indices: bool = False) -> Any:
    """Groups as torch's, under the device that their tensors say."""
    groups = _GROUP(lists, with_indices)
    return {
        (next((t.device for tensors in group[0] for t in tensors if t is not None), device), dtype): group
        for (device, dtype), group in groups.items()
    }


_ENGINE = torch.autograd._engine_run_backward
_GROUP = torch._C._group_tensors_by_device_and_dtype
