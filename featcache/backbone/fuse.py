"""Batch norms fused into the convolutions before it: a pass over every map less, for a network that is not
trained.

In use, a batch norm multiplies each channel with one number and adds another, which its convolution can do itself. The
features change by rounding (docs/log.md). Which convolution a batch norm follows is read from a trace of the network;
one that cannot be traced stays as it is.
"""

from __future__ import annotations

import copy
from typing import Any

from timm.layers import Conv2dSame
from torch import fx, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        # timm's batch norms have an activation inside, and convolutions that pad by the size of the image
        return isinstance(m, nn.Conv2d | nn.BatchNorm2d) or super().is_leaf_module(m, module_qualified_name)


def fuse_batch_norms(model: nn.Module) -> nn.Module:
    """A copy of a network in evaluation mode without the batch norms that only ever follow one convolution; the network
    itself where there are none.
    """
    if not (pairs := _pairs(model)):
        return model
    fused = copy.deepcopy(model)
    for convolution, norm in pairs:
        _fold(fused, convolution, norm)
    return fused


def _pairs(model: nn.Module) -> list[tuple[str, str]]:
    """Names of convolutions and the batch norms that alone read them."""
    try:
        graph = _Tracer().trace(model)
    except Exception:  # whatever a network's own Python does to a trace: it is as good without folding
        return []
    modules = dict(model.named_modules())
    calls = [node for node in graph.nodes if node.op == "call_module"]
    names = [str(node.target) for node in calls]
    once = {name for name in names if names.count(name) == 1}
    pairs = []
    for node in calls:
        before: Any = node.args[0] if node.args else None
        if not (isinstance(before, fx.Node) and before.op == "call_module" and len(before.users) == 1):
            continue
        convolution, norm = modules[str(before.target)], modules[str(node.target)]
        used_once = {str(before.target), str(node.target)} <= once
        if used_once and type(convolution) in (nn.Conv2d, Conv2dSame) and isinstance(norm, nn.BatchNorm2d):
            pairs.append((str(before.target), str(node.target)))
    return pairs


def _fold(model: nn.Module, convolution: str, norm: str) -> None:
    conv: Any = model.get_submodule(convolution)
    bn: Any = model.get_submodule(norm)
    conv.weight, conv.bias = fuse_conv_bn_weights(
        conv.weight, conv.bias, bn.running_mean, bn.running_var, bn.eps, bn.weight, bn.bias
    )
    parent, _, name = norm.rpartition(".")
    setattr(model.get_submodule(parent), name, getattr(bn, "act", nn.Identity()))
