"""Backbone and heads as one network, for both stages of training.

Outputs are one row of numbers an image, (n_images, n_outputs). `columns` says which of them are a subject's vertices,
so that whoever trains or scores needs to know nothing else of the heads. What heads read is {array: rows}, as the
layers that are tapped give it.
"""

from collections.abc import Sequence

import torch
from torch import nn

from featcache.backbone.taps import Taps
from heads.backbones.batches import Targets
from heads.config import CORRELATIONS
from heads.modules.by_subject import Columns, Heads
from heads.scores.losses import LOSSES


class Encoder(nn.Module):
    """images (n_images, 3, height, width) and their subjects (n_images,) -> (n_images, n_outputs)"""

    def __init__(self, backbone: nn.Module, heads: "Heads", taps: Taps) -> None:
        super().__init__()
        self.backbone, self.heads, self._taps = backbone, heads, taps

    def forward(self, images: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        return self.heads(self._taps.read(self.backbone, images), subjects)


def encoder_loss(
    terms: Sequence[tuple[float, str]],
    outputs: torch.Tensor,
    targets: Sequence[Targets],
    columns: Columns,
    ceilings: dict[tuple[str, str], torch.Tensor | None],
) -> torch.Tensor:
    """The weighted sum of losses over a batch of several subjects, each term a mean over their images and vertices.

    A subject's images are compared with the outputs that are its vertices, under its own ceilings: vertices that it
    lacks have no part in it, and correlations are over images of one subject. A subject with one image in the batch
    has no correlation.

    outputs : (n_images, n_outputs)
    """
    predicted = [outputs[t.rows.to(outputs.device)][:, columns[t.subject, t.hemisphere]] for t in targets]
    total = outputs.new_zeros(())
    for weight, name in terms:
        counted = [k for k, t in enumerate(targets) if name not in CORRELATIONS or len(t.rows) > 1]
        numbers = [targets[k].responses.numel() for k in counted]
        for k, n in zip(counted, numbers, strict=True):
            t = targets[k]
            value = LOSSES[name](predicted[k], t.responses, ceilings[t.subject, t.hemisphere])
            total = total + weight * n / sum(numbers) * value
    return total if targets and total.requires_grad else total + 0 * outputs.sum()
