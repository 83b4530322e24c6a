"""Tensors that say they lie on cuda:0, over numbers in main memory, and the modes under which torch makes them.

`DeviceTensor` holds its numbers in a plain tensor. Every operation of torch, in forward and in backward passes, arrives
at `Dispatch.run`: it refuses what a CUDA device refuses, counts what the host waits for, computes with the plain
tensors and wraps the results. Two modes catch what begins without a `DeviceTensor`: `_Requests` what Python asks for
('device="cuda"'), `_Results` what torch makes of it.
"""

import copy
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch
from torch.multiprocessing.reductions import StorageWeakRef
from torch.overrides import TorchFunctionMode
from torch.utils._mode_utils import no_dispatch
from torch.utils._python_dispatch import TorchDispatchMode

CUDA = torch.device("cuda", 0)
_ROOT = Path(__file__).resolve().parents[2]
_OWN = (str(_ROOT / "tests" / "support" / "pretended_"),)

# Operations after which the host waits for the device, because their result, its size or an error must be known.
_WAITING = {
    "_linalg_check_errors",
    "_linalg_eigh",
    "_linalg_svd",
    "_local_scalar_dense",
    "_unique2",
    "allclose",
    "bincount",
    "equal",
    "histc",
    "is_nonzero",
    "linalg_eig",
    "linalg_lstsq",
    "masked_select",
    "nonzero",
    "unique_consecutive",
    "unique_dim",
}
_LISTS = ("_amp_foreach", "_foreach", "_fused", "cat", "stack")  # these take no number of main memory either
_INDEXED = {"index", "_index_put_impl_", "index_put", "index_put_", "_unsafe_index"}
_FROM_HOST = {"as_tensor", "asarray", "tensor"}  # functions that copy their argument where they are asked for a device


class Ledger(Protocol):
    """What is told of everything that happens on the device."""

    def waited(self, operation: str) -> None: ...
    def copied(self, way: str, tensor: torch.Tensor, *, pinned: bool, blocking: bool) -> None: ...
    def deliver_later(self, target: torch.Tensor, source: torch.Tensor) -> None: ...
    def read_later(self, source: torch.Tensor) -> None: ...
    def allocated_for(self, tensor: torch.Tensor) -> None: ...


class DeviceTensor(torch.Tensor):
    """A tensor on the pretended device. plain : its numbers, in main memory; views share them"""

    __torch_function__ = torch._C._disabled_torch_function_impl
    plain: torch.Tensor
    dispatch: "Dispatch"

    @staticmethod
    def __new__(cls, plain: torch.Tensor, dispatch: "Dispatch") -> "DeviceTensor":
        made = torch.Tensor._make_wrapper_subclass(
            cls, plain.size(), strides=plain.stride(), storage_offset=plain.storage_offset(), dtype=plain.dtype
        )
        made.plain, made.dispatch = plain, dispatch
        return made

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        dispatch = next(t for t in _tensors((args, kwargs)) if isinstance(t, DeviceTensor)).dispatch
        return dispatch.run(func, args, kwargs or {})

    # torch moves a module by exchanging such a tensor for its parameter, so that optimisers keep theirs
    def __tensor_flatten__(self) -> tuple[list[str], "Dispatch"]:
        return ["plain"], self.dispatch

    @staticmethod
    def __tensor_unflatten__(inner: dict[str, torch.Tensor], dispatch: "Dispatch", *_: Any) -> "DeviceTensor":
        return DeviceTensor(inner["plain"], dispatch)

    device = property(lambda self: CUDA)  # type: ignore[assignment]
    is_cuda = property(lambda self: True)  # type: ignore[assignment]
    is_cpu = property(lambda self: False)  # type: ignore[assignment]

    def get_device(self) -> int:
        return 0

    @property
    def data(self) -> "DeviceTensor":  # type: ignore[override]
        return self.detach()  # type: ignore[return-value]

    @data.setter
    def data(self, value: torch.Tensor) -> None:
        if isinstance(value, DeviceTensor) and value.shape == self.shape and value.dtype == self.dtype:
            self.plain = value.plain
        else:
            _become(self, value)

    def to(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        device, dtype, non_blocking, copied, layout = _asked(args, kwargs)
        if device is None or device.type == "cuda":
            return super().to(dtype or self.dtype, copy=copied, **layout)
        converted = super().to(dtype or self.dtype, **layout)
        return _Download.apply(converted, self.dispatch, non_blocking)  # type: ignore[no-any-return]

    def cpu(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self.to("cpu", *args, **kwargs)

    def cuda(self, *args: Any, **kwargs: Any) -> torch.Tensor:  # type: ignore[override]
        return self

    def numpy(self, *, force: bool = False) -> np.ndarray:  # type: ignore[override]
        if force:
            return self.detach().cpu().numpy()
        raise TypeError(
            "can't convert cuda:0 device type tensor to numpy. "
            "Use Tensor.cpu() to copy the tensor to host memory first."
        )

    def __array__(self, *_: Any, **__: Any) -> np.ndarray:
        return self.numpy()

    def __dlpack__(self, *_: Any, **__: Any) -> Any:
        raise BufferError("the pretended device exports no memory")

    def tolist(self) -> Any:
        return self.detach().cpu().tolist()

    def new_tensor(self, data: Any, *, dtype: Any = None, device: Any = None, requires_grad: bool = False) -> Any:
        return torch.tensor(data, dtype=dtype or self.dtype, device=device or CUDA, requires_grad=requires_grad)

    def is_pinned(self, *_: Any) -> bool:
        return False

    def pin_memory(self, *_: Any) -> torch.Tensor:
        raise RuntimeError("cannot pin a tensor of cuda:0: only dense CPU tensors can be pinned")

    def record_stream(self, stream: Any) -> None:
        """Nothing: freed memory is not used again before its time."""

    def untyped_storage(self) -> Any:
        return self.plain.untyped_storage()

    def data_ptr(self) -> int:
        return self.plain.data_ptr()

    def __deepcopy__(self, memo: dict[int, Any]) -> "DeviceTensor":
        if id(self) not in memo:
            if not self.is_leaf:
                raise RuntimeError("Only Tensors created explicitly by the user support the deepcopy protocol")
            made = self.dispatch.wrapped(self.plain.clone()).requires_grad_(self.requires_grad)
            made.__dict__ |= {k: v for k, v in self.__dict__.items() if k not in ("plain", "dispatch")}
            made.grad = copy.deepcopy(self.grad, memo)
            memo[id(self)] = made
        return memo[id(self)]  # type: ignore[no-any-return]

    def __reduce_ex__(self, protocol: Any) -> Any:
        raise NotImplementedError("the pretended device writes no tensors: move them to main memory first")

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]
        return f"{self.plain!r} on {CUDA}"


class _Download(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: DeviceTensor, dispatch: "Dispatch", non_blocking: bool) -> torch.Tensor:
        ctx.dispatch = dispatch
        return dispatch.download(tensor, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:  # type: ignore[override]
        return ctx.dispatch.upload(gradient, False), None, None


class _Upload(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, dispatch: "Dispatch", non_blocking: bool) -> DeviceTensor:
        ctx.dispatch = dispatch
        return dispatch.upload(tensor, non_blocking)

    @staticmethod
    def backward(ctx: Any, gradient: DeviceTensor) -> Any:  # type: ignore[override]
        return ctx.dispatch.download(gradient, False), None, None


class _Thread(threading.local):
    composing = 0  # calls under way that have a tensor of the device: what torch makes inside them lies there too


class Dispatch:
    """Runs torch's operations on tensors of the pretended device.

    ledger : what is told of them
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._pinned: dict[int, StorageWeakRef] = {}
        self._thread = _Thread()

    @contextmanager
    def modes(self) -> Iterator[None]:
        """Have torch understand 'cuda' in this thread."""
        with ExitStack() as stack:
            stack.enter_context(_Results(self))
            stack.enter_context(_Requests(self))
            yield

    def run_backward(self, engine: Callable[..., Any]) -> Callable[..., Any]:
        """The engine of backward passes, with Python's requests answered inside, where torch has left the mode."""

        def run(outputs: Any, *args: Any, **kwargs: Any) -> Any:
            on_device = _is_on_device(outputs)
            with _Requests(self), self.composing() if on_device else ExitStack():
                return engine(outputs, *args, **kwargs)

        return run

    @contextmanager
    def composing(self) -> Iterator[None]:
        """While this lasts, what torch makes of nothing lies on the device."""
        self._thread.composing += 1
        try:
            yield
        finally:
            self._thread.composing -= 1

    def wrapped(self, plain: torch.Tensor) -> DeviceTensor:
        """The tensor as one of the device, which shares its numbers."""
        self._ledger.allocated_for(plain)
        return DeviceTensor(plain, self)

    def upload(self, tensor: torch.Tensor, non_blocking: bool, dtype: torch.dtype | None = None) -> DeviceTensor:
        pinned = self.is_pinned(tensor)
        blocking = not (pinned and non_blocking)
        self._ledger.copied("to device", tensor, pinned=pinned, blocking=blocking)
        if not blocking:
            self._ledger.read_later(tensor)
        return self.wrapped(tensor.detach().clone().to(dtype or tensor.dtype))

    def download(self, tensor: DeviceTensor, non_blocking: bool) -> torch.Tensor:
        self._ledger.copied("to host", tensor, pinned=non_blocking, blocking=not non_blocking)
        copied = tensor.plain.detach().clone()
        if non_blocking:
            self.pin(copied)
            self._ledger.deliver_later(copied, copied.clone())
        return copied

    def pin(self, tensor: torch.Tensor) -> torch.Tensor:
        """Count the memory of a tensor as pinned."""
        storage = tensor.untyped_storage()
        self._pinned[storage.data_ptr()] = StorageWeakRef(storage)
        return tensor

    def is_pinned(self, tensor: torch.Tensor) -> bool:
        reference = self._pinned.get(tensor.untyped_storage().data_ptr())
        return reference is not None and not reference.expired()

    def run(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Compute one operation. Raises RuntimeError where a CUDA device would."""
        name = func._schema.name.removeprefix("aten::")
        tensors = list(_tensors((args, kwargs)))
        on_device = any(isinstance(tensor, DeviceTensor) for tensor in tensors)
        wanted = kwargs.get("device")
        if not on_device and not tensors:
            return self._made(func, args, kwargs, wanted)
        if not on_device and (wanted is None or wanted.type != "cuda"):
            return func(*args, **kwargs)
        if not on_device:
            return self._requested(func, args, kwargs, name)
        if func._can_decompose() and torch.is_inference_mode_enabled():  # elsewhere torch itself has taken it apart
            with self.composing():
                composed = func.decompose(*args, **kwargs)
            if composed is not NotImplemented:
                return composed
        if name == "copy_":
            return self._copy(args[0], args[1], *args[2:], **kwargs)
        self._refuse_mixed(name, args, tensors)
        self._count_waits(name, args, kwargs)
        return self._computed(func, args, kwargs)

    def _computed(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        wrappers: dict[int, DeviceTensor] = {}

        def plain_of(tensor: DeviceTensor) -> torch.Tensor:
            wrappers[id(tensor.plain)] = tensor
            return tensor.plain

        plain_args, plain_kwargs = _mapped(DeviceTensor, plain_of, (args, kwargs))
        results = func(*plain_args, **plain_kwargs)
        if torch.Tag.inplace_view in func.tags:  # the shape of the tensor itself changes too
            with no_dispatch():
                func(*args, **kwargs)
        if any(tensor.plain.shape != tensor.shape for tensor in wrappers.values()):
            raise NotImplementedError(f"the pretended device does not know how {func} changes a shape in place")
        # a view of a tensor that is none of inference mode is none either
        normal = torch.is_inference_mode_enabled() and not all(t.is_inference() for t in wrappers.values())
        with torch.inference_mode(False) if normal else ExitStack():
            return _mapped(torch.Tensor, lambda t: wrappers[id(t)] if id(t) in wrappers else self.wrapped(t), results)

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any], wanted: torch.device | None) -> Any:
        """What is made of no tensor: on the device if it is asked for, or if an operation on the device makes it."""
        if (wanted is not None and wanted.type == "cuda") or self._thread.composing:
            kwargs = kwargs | {"device": torch.device("cpu")} if wanted is not None else kwargs
            return _mapped(torch.Tensor, self.wrapped, func(*args, **kwargs))
        return func(*args, **kwargs)

    def _requested(self, func: Any, args: Any, kwargs: dict[str, Any], name: str) -> Any:
        """What is made on the device of tensors in main memory: a copy, or something of the same shape."""
        if name == "_to_copy":
            return self.upload(args[0], bool(kwargs.get("non_blocking")), kwargs.get("dtype"))
        return _mapped(torch.Tensor, self.wrapped, func(*args, **kwargs | {"device": torch.device("cpu")}))

    def _copy(self, target: torch.Tensor, source: torch.Tensor, non_blocking: bool = False) -> torch.Tensor:
        if isinstance(target, DeviceTensor):
            moved = source if isinstance(source, DeviceTensor) else self.upload(source, non_blocking)
            target.plain.copy_(moved.plain)
            return target
        assert isinstance(source, DeviceTensor)
        pinned = self.is_pinned(target)
        self._ledger.copied("to host", source, pinned=pinned, blocking=not non_blocking)
        target.copy_(source.plain)
        if non_blocking:
            self._ledger.deliver_later(target, target.clone())
        return target

    def _refuse_mixed(self, name: str, args: Sequence[Any], tensors: Sequence[torch.Tensor]) -> None:
        indices = args[1] if name in _INDEXED else ()
        if indices and not isinstance(args[0], DeviceTensor) and any(isinstance(i, DeviceTensor) for i in indices):
            raise RuntimeError("indices should be either on cpu or on the same device as the indexed tensor (cpu)")
        only_numbers = not name.startswith(_LISTS)
        for tensor in tensors:
            allowed = isinstance(tensor, DeviceTensor) or (only_numbers and tensor.ndim == 0)
            if not allowed and not any(tensor is index for index in indices):
                raise RuntimeError(
                    f"Expected all tensors to be on the same device, but found at least two devices, {CUDA} and cpu! "
                    f"(in aten::{name})"
                )

    def _count_waits(self, name: str, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        if name in _INDEXED:
            for index in args[1]:
                self._count_index(name, index, args)
        elif (
            name in _WAITING
            or kwargs.get("check_errors")
            or (name == "repeat_interleave" and kwargs.get("output_size") is None)
        ):
            self._ledger.waited(name)

    def _count_index(self, name: str, index: torch.Tensor | None, args: Sequence[Any]) -> None:
        if index is None:
            return
        if not isinstance(index, DeviceTensor):
            self._ledger.copied("to device", index, pinned=False, blocking=True)
        # a mask set to one number of main memory becomes masked_fill, which waits for nothing
        filled = name != "index" and args[2].numel() == 1 and not isinstance(args[2], DeviceTensor)
        if index.dtype in (torch.bool, torch.uint8) and not filled:
            self._ledger.waited("index by a mask")


class _Results(TorchDispatchMode):
    """Makes tensors of the device where torch's own operations are asked for them."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return self._dispatch.run(func, args, kwargs or {})


class _Requests(TorchFunctionMode):
    """Answers what Python asks of tensors in main memory about the device."""

    def __init__(self, dispatch: Dispatch) -> None:
        super().__init__()
        self._dispatch = dispatch

    def __torch_function__(self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        on_device = _is_on_device((args, kwargs))
        first = args[0] if args else None
        name = getattr(func, "__name__", "")
        if isinstance(first, DeviceTensor) and name in vars(DeviceTensor) and func is getattr(torch.Tensor, name, None):
            return getattr(first, name)(*args[1:], **kwargs)
        plain = isinstance(first, torch.Tensor) and not isinstance(first, DeviceTensor)
        answer = self._of_plain(func, first, args[1:], kwargs) if plain else None
        return self._made(func, args, kwargs, on_device) if answer is None else answer

    def _of_plain(self, func: Any, tensor: torch.Tensor, rest: Any, kwargs: dict[str, Any]) -> Any:
        dispatch = self._dispatch
        if func is torch.Tensor.pin_memory:
            return tensor if dispatch.is_pinned(tensor) else dispatch.pin(tensor.detach().clone())
        if func is torch.Tensor.is_pinned:
            return dispatch.is_pinned(tensor)
        if func is torch.Tensor.data.__set__ and isinstance(rest[0], DeviceTensor):
            return _become(tensor, rest[0])
        if func is torch.Tensor.cuda:
            rest, func = (CUDA,), torch.Tensor.to
        if func is torch.Tensor.to:
            device, dtype, non_blocking, _, _ = _asked(rest, kwargs)
            if device is not None and device.type == "cuda":
                moved = _Upload.apply(tensor, dispatch, non_blocking)
                return moved if dtype is None else moved.to(dtype)
        return None

    def _made(self, func: Any, args: Any, kwargs: dict[str, Any], on_device: bool) -> Any:
        wanted = kwargs.get("device")
        wanted = None if wanted is None or func is torch.Tensor.to else torch.device(wanted)
        if wanted is not None and wanted.type == "cuda" and not _is_on_cuda(kwargs.get("generator")):
            raise RuntimeError("Expected a 'cuda' device type for generator but found 'cpu'")
        name, pinned = getattr(func, "__name__", ""), kwargs.get("pin_memory", False)
        if pinned and not on_device:
            kwargs["pin_memory"] = False
        if name in _FROM_HOST and wanted is not None and wanted.type == "cuda":
            return self._from_host(func, args, kwargs)
        if wanted is not None:
            kwargs["device"] = CUDA if wanted.type == "cuda" else wanted
        with self._dispatch.composing() if on_device else ExitStack():
            made = func(*args, **kwargs)
        if wanted is not None and wanted.type == "cpu" and isinstance(made, DeviceTensor):
            return self._dispatch.download(made, False)
        return self._dispatch.pin(made) if pinned and isinstance(made, torch.Tensor) else made

    def _from_host(self, func: Any, args: Any, kwargs: dict[str, Any]) -> torch.Tensor:
        if args and isinstance(args[0], DeviceTensor):
            return args[0].to(kwargs.get("dtype") or args[0].dtype, copy=func is torch.tensor)
        requires_grad = kwargs.pop("requires_grad", False)
        made = func(*args, **kwargs | {"device": "cpu"})
        return self._dispatch.upload(made, False).requires_grad_(requires_grad)


# torch's own walks through trees of values take most of the time of a small operation


def _tensors(value: Any) -> Iterator[torch.Tensor]:
    """Tensors in lists, tuples and dictionaries."""
    if isinstance(value, torch.Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for part in value:
            yield from _tensors(part)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _mapped(kind: type, function: Callable[[Any], Any], value: Any) -> Any:
    """The value with the function's result in place of every tensor of a kind."""
    if isinstance(value, kind):
        return function(value)
    if isinstance(value, list | tuple):
        parts = [_mapped(kind, function, part) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else type(value)(parts)
    if isinstance(value, dict):
        return {key: _mapped(kind, function, part) for key, part in value.items()}
    return value


def _is_on_device(value: Any) -> bool:
    return any(isinstance(tensor, DeviceTensor) for tensor in _tensors(value))


def _become(tensor: torch.Tensor, value: torch.Tensor) -> bool:
    """Make the tensor the value, as setting its `data` does, also across devices."""
    made, gradient = value.detach().requires_grad_(tensor.requires_grad), tensor.grad
    tensor.grad = None
    torch.utils.swap_tensors(tensor, torch.nn.Parameter(made) if isinstance(tensor, torch.nn.Parameter) else made)
    if gradient is not None:  # a gradient lies where its tensor does
        tensor.grad = value.dispatch.wrapped(gradient) if isinstance(value, DeviceTensor) else gradient.plain
    return True


def _is_on_cuda(generator: torch.Generator | None) -> bool:
    return generator is None or generator.device.type == "cuda"


def _asked(args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
    """(device, dtype, non_blocking, copy, memory format) of the arguments of `Tensor.to`."""
    kwargs = dict(kwargs)
    other = next((a for a in (*args, kwargs.get("other")) if isinstance(a, torch.Tensor)), None)
    copied = bool(kwargs.pop("copy", False))
    if other is not None:
        flags = [a for a in args if isinstance(a, bool)]
        return other.device, other.dtype, bool(kwargs.get("non_blocking", *flags[:1])), copied, {}
    device, dtype, non_blocking, memory_format = torch._C._nn._parse_to(*args, **kwargs)
    return device, dtype, non_blocking, copied, {} if memory_format is None else {"memory_format": memory_format}


def place() -> str:
    """File and line of the project, or of its tests, that the current call comes from; 'a library' if there is none."""
    frame = sys._getframe(1)
    while frame is not None:
        name = frame.f_code.co_filename
        # libraries may be installed below the project, as `make test` does it
        if name.startswith(str(_ROOT)) and not name.startswith(_OWN) and "site-packages" not in name:
            return f"{Path(name).relative_to(_ROOT)}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return "a library"
