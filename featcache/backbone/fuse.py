"""Batch norms fused into the convolutions before them, which saves a pass over every map.

In a network that is not trained, a batch norm multiplies each channel by one number and adds another. The convolution
before it can do both, with features that differ by rounding (docs/decisions/0004). Which convolution a batch norm
follows is read from a trace of the network; a network that cannot be traced stays as it is.
"""

import copy
from typing import Any

from timm.layers.conv2d_same import Conv2dSame
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's own kinds are not looked into: batch norms that apply an activation, convolutions that pad by size
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fuse_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode, without the batch norms that follow one convolution and nothing else.

    The network itself, where it has none of these.
    """
    if not (pairs := _pairs(model)):
        return model
    fused = copy.deepcopy(model)
    for convolution, norm in pairs:
        _fuse(fused, convolution, norm)
    return fused


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of (convolution, batch norm) where the batch norm is all that reads the convolution's output."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # a network's own Python may fail a trace in any way, and the network is as good as it is
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    names = [str(node.target) for node in calls]
    used_once = {name for name in names if names.count(name) == 1}
    pairs = []
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution, norm = str(before.target), str(node.target)
        kinds_fit = type(modules[convolution]) in (nn.Conv2d, Conv2dSame) and isinstance(modules[norm], nn.BatchNorm2d)
        if kinds_fit and {convolution, norm} <= used_once:
            pairs.append((convolution, norm))
    return pairs


def _fuse(model: nn.Module, convolution: str, norm: str) -> None:
    conv: Any = model.get_submodule(convolution)
    bn: Any = model.get_submodule(norm)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    parent, _, name = norm.rpartition(".")
    setattr(model.get_submodule(parent), name, getattr(bn, "act", nn.Identity()))
