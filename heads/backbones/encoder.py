"""Backbone and heads as one network, and its loss over a batch of several subjects, for both stages of training."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from featcache.backbone.taps import Taps
from heads.backbones.batches import Targets
from heads.config.losses import LOSS_SPECS
from heads.modules.by_subject import SubjectHeads, Surfaces
from heads.scores.losses import LOSSES

Terms = Sequence[tuple[float, str]]  # weights and names of the losses in a sum
Ceilings = Mapping[tuple[str, str], torch.Tensor | None]  # {(subject, surface): (n_vertices,)}, None where not given

_WHOLE, _ROIS = slice(0, 1), slice(1, None)  # which of a surface's heads are those of the surface, and of ROIs


class Encoder(nn.Module):
    """Images, (n_images, 3, height, width), and numbers of their subjects, (n_images,), -> (n_images, n_outputs).

    compiled : whether the backbone is compiled, for training alone: scoring has batches of other sizes
    """

    def __init__(self, backbone: nn.Module, heads: SubjectHeads, taps: Taps, compiled: bool = False) -> None:
        super().__init__()
        self.backbone, self.heads, self._taps = backbone, heads, taps
        self._read_in_training = torch.compile(taps.read) if compiled else taps.read

    def forward(self, images: torch.Tensor, subjects: torch.Tensor) -> torch.Tensor:
        read = self._read_in_training if self.training else self._taps.read
        outputs: torch.Tensor = self.heads(read(self.backbone, images), subjects)
        return outputs


def encoder_loss(
    terms: Terms,
    outputs: torch.Tensor,
    targets: Sequence[Targets],
    surfaces: Surfaces,
    ceilings: Ceilings,
    roi_terms: Terms | None = None,
) -> torch.Tensor:
    """Weighted sum of losses over a batch of several subjects; each loss is a mean over their images and vertices.

    The loss of a surface is the mean over its heads of the loss of each head's outputs on its own vertices. A subject's
    images are compared with the outputs of its surfaces, under its own ceilings. Vertices that it
    lacks have no part in the loss. Correlations over images are those of one subject; a subject with one image in the
    batch has none. Correlations over vertices are those of one surface of one image. Whatever the loss, a surface of a
    subject counts by the number of its images times the number of its vertices.

    Parameters
    ----------
    terms : pairs of weight and name of a loss, for heads of whole surfaces
    outputs : (n_images, n_outputs)
    roi_terms : the same for heads of ROIs; None: as `terms`
    """
    of_subject = _by_subject(outputs, targets)
    heads = [
        surfaces[key].compared(of_subject[t.subject], t.responses, ceilings[key])
        for t in targets
        for key in [(t.subject, t.surface)]
    ]
    total = outputs.new_zeros(())
    for which, weight, name in [*((_WHOLE, *term) for term in terms), *((_ROIS, *term) for term in roi_terms or terms)]:
        counted = [k for k, t in enumerate(targets) if len(t.rows) > 1 or not LOSS_SPECS[name].correlation]
        n_values = [targets[k].responses.numel() for k in counted]
        for k, n in zip(counted, n_values, strict=True):
            for head in heads[k][which]:
                total = total + weight * n / sum(n_values) / len(heads[k]) * LOSSES[name](*head)
    # a loss of no terms still has a gradient, of zeros: processes that exchange gradients wait for each other's
    return total if targets and total.requires_grad else total + 0 * outputs.sum()


def _by_subject(outputs: torch.Tensor, targets: Sequence[Targets]) -> dict[str, torch.Tensor]:
    """The outputs of each subject's images, all copied at once: the gradient of a copy is as large as all outputs."""
    rows = {target.subject: target.rows for target in targets}
    if len(rows) == 1 and len(targets[0].rows) == len(outputs):
        return {targets[0].subject: outputs}
    if not rows:
        return {}
    parts = outputs[torch.cat(list(rows.values()))].split([len(own) for own in rows.values()])
    return dict(zip(rows, parts, strict=True))
