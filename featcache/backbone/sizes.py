"""What a network says of images of a size: whether it takes them, whether its layers can be read, how much it sees."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from featcache.backbone.hooks import device_of
from featcache.errors import BackboneError, first_line

Result = TypeVar("Result")

# What networks raise for a size that they cannot take
_REFUSALS = (RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError, ArithmeticError)
_aten: Any = torch.ops.aten
_LOOK_UPS = {_aten.index, _aten.index_select, _aten.gather, _aten.embedding, _aten.take}


@contextmanager
def refused_size(name: str, size: object) -> Iterator[None]:
    """Raise BackboneError for what a network says of images of a size that it cannot take."""
    try:
        yield
    except NotImplementedError:  # an operation that has no form without numbers, on a network without weights
        raise
    except _REFUSALS as error:
        raise BackboneError(
            "--size",
            expected=f"a size that {name} can take",
            found=f"{size} ({_said(error)})",
            remedy="choose another, such as the default",
        ) from error


@contextmanager
def refused_layers(name: str, size: int, whole: Callable[[], object]) -> Iterator[None]:
    """Raise BackboneError for what a network says where its layers are read, of the layers or of the size.

    whole : runs the network without reading layers; where that works, the size is not what is wrong
    """
    try:
        yield
    except NotImplementedError:
        raise
    except _REFUSALS as error:
        with refused_size(name, size):
            whole()
        raise BackboneError(
            "--layers",
            expected=f"layers of {name} that can be read at {size} px",
            found=_said(error),
            remedy="use --layers pooled, another --size, or another backbone",
        ) from error


def _said(error: BaseException) -> str:
    return first_line(error)[:120]


def without_numbers(call: Callable[[str], Result], own_size: bool) -> Result:
    """What a function of a device gives on 'meta', where nothing is computed; on the CPU where that does not do.

    Some operations have no form without numbers. Others look numbers up in a table by place. On 'meta' they take any
    place, also one that is not in the table, so what they say of a size has to be tried. A refusal is tried, too.

    own_size : the network was made for the size, and there is nothing to be tried
    """
    operations = _Operations()
    try:
        with operations:
            result = call("meta")
    except NotImplementedError:
        return call("cpu")
    except BackboneError:
        if not operations.n_on_meta:
            raise
        return call("cpu")
    return result if own_size or not operations.n_look_ups else call("cpu")


class _Operations(TorchDispatchMode):
    """Counts the operations on tensors without numbers, and those of them that look numbers up."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.n_on_meta = self.n_look_ups = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if any(isinstance(value, torch.Tensor) and value.is_meta for value in args):
            self.n_on_meta += 1
            self.n_look_ups += func.overloadpacket in _LOOK_UPS
        return func(*args, **(kwargs or {}))


class _ReadError(Exception):
    """The first convolution has its input."""


def unread_pixels(model: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    """Rows at the bottom and columns at the right of (3, height, width) images that a network never looks at.

    A convolution whose steps do not fill the image leaves them out, as the patches of a transformer do at a size that
    they do not divide. It is asked of the first operation with weights, if that is a convolution of the image: a pixel
    on which none of its outputs depends is unread. (0, 0) of other networks.
    """
    seen: list[nn.Module] = []

    def keep(module: nn.Module, inputs: tuple[Any, ...]) -> None:
        if isinstance(module, nn.Conv2d) and isinstance(inputs[0], torch.Tensor) and inputs[0].shape[1:] == tuple(size):
            seen.append(module)
        raise _ReadError

    # a module that is made of others may have weights too, such as tokens, and is no operation
    single = [one for one in model.modules() if not any(True for _ in one.children())]
    with_weights = [one for one in single if any(True for _ in one.parameters())]
    hooks = [one.register_forward_pre_hook(keep) for one in with_weights]
    try:
        with torch.inference_mode():
            model(torch.zeros(1, *size, device=device_of(model)))
    except (_ReadError, *_REFUSALS):  # a size that it cannot take is refused where its layers are read
        pass
    finally:
        for hook in hooks:
            hook.remove()
    return _unread(seen[0], size) if seen else (0, 0)


def _unread(convolution: nn.Module, size: Sequence[int]) -> tuple[int, int]:
    image = torch.zeros(1, *size, device=device_of(convolution), requires_grad=True)
    with torch.enable_grad():
        (gradient,) = torch.autograd.grad(convolution(image).sum(), image)
    read = gradient[0].abs().amax(0) > 0
    return tuple(_behind(read.any(axis)) for axis in (1, 0))  # type: ignore[return-value]


def _behind(read: torch.Tensor) -> int:
    """Number of places behind the last that is read; 0 where none is, which says nothing of places."""
    places = read.nonzero()
    return len(read) - 1 - int(places[-1]) if len(places) else 0
