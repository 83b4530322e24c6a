"""Backbone and heads as one network, and its loss over a batch of several subjects, for both stages of training."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from featcache.backbone.taps import Taps
from heads.backbones.batches import Targets
from heads.config.losses import LOSS_SPECS
from heads.modules.by_subject import Columns, SubjectHeads
from heads.scores.losses import LOSSES

Ceilings = Mapping[tuple[str, str], torch.Tensor | None]  # {(subject, surface): (n_vertices,)}, None where not given


class Encoder(nn.Module):
    """Images, (n_images, 3, height, width), and numbers of their subjects, (n_images,), -> (n_images, n_outputs)."""

    def __init__(self, backbone: nn.Module, heads: SubjectHeads, taps: Taps) -> None:
        super().__init__()
        self.backbone, self.heads, self._taps = backbone, heads, taps

    def forward(self, images: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        outputs: torch.Tensor = self.heads(self._taps.read(self.backbone, images), subjects)
        return outputs


def encoder_loss(
    terms: Sequence[tuple[float, str]],
    outputs: torch.Tensor,
    targets: Sequence[Targets],
    columns: Columns,
    ceilings: Ceilings,
) -> torch.Tensor:
    """Weighted sum of losses over a batch of several subjects; each loss is a mean over their images and vertices.

    A subject's images are compared with the outputs that are its vertices, under its own ceilings. Vertices that it
    lacks have no part in the loss. Correlations over images are those of one subject; a subject with one image in the
    batch has none. Correlations over vertices are those of one surface of one image. Whatever the loss, a surface of a
    subject counts by the number of its images times the number of its vertices.

    Parameters
    ----------
    terms : pairs of weight and name of a loss
    outputs : (n_images, n_outputs)
    """
    predicted = [outputs[t.rows.to(outputs.device)][:, columns[t.subject, t.surface]] for t in targets]
    total = outputs.new_zeros(())
    for weight, name in terms:
        counted = [k for k, t in enumerate(targets) if len(t.rows) > 1 or not LOSS_SPECS[name].correlation]
        n_values = [targets[k].responses.numel() for k in counted]
        for k, n in zip(counted, n_values, strict=True):
            t = targets[k]
            value = LOSSES[name](predicted[k], t.responses, ceilings[t.subject, t.surface])
            total = total + weight * n / sum(n_values) * value
    # a loss of no terms still has a gradient, of zeros: processes that exchange gradients wait for each other's
    return total if targets and total.requires_grad else total + 0 * outputs.sum()
