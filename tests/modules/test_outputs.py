"""Each head of a surface is trained on its own vertices, and a vertex is predicted by the mean of its heads."""

import numpy as np
import torch

from heads.modules.linear import RoiHead
from heads.modules.outputs import SurfaceOutputs
from heads.scores.losses import LOSSES

ROIS = [np.array([1, 1, 0, 0, 0], bool), np.array([0, 1, 1, 1, 0], bool)]


def data(seed=0):
    torch.manual_seed(seed)
    outputs = SurfaceOutputs.of_heads(5, [torch.from_numpy(mask) for mask in ROIS])
    values = torch.randn(8, len(outputs.vertex), requires_grad=True)
    return outputs, values, torch.randn(8, 5), torch.tensor([0.2, 0.4, 0.0, 0.8, 1.0])


def test_a_vertex_has_the_mean_of_its_heads():
    outputs, values, _, _ = data()
    expected = torch.stack(
        [
            (values[:, 0] + values[:, 5]) / 2,
            (values[:, 1] + values[:, 6] + values[:, 7]) / 3,
            (values[:, 2] + values[:, 8]) / 2,
            (values[:, 3] + values[:, 9]) / 2,
            values[:, 4],
        ],
        1,
    )
    torch.testing.assert_close(outputs.mean(values), expected)


def test_the_loss_is_the_mean_over_heads_of_each_ones_loss_on_its_own_vertices():
    outputs, values, responses, ceilings = data()
    loss = outputs.averaged(LOSSES["pattern"], LOSSES["mnnpc"])(values, responses, ceilings)
    parts = [LOSSES["pattern"](values[:, :5], responses, ceilings)]
    first = 5
    for mask in map(torch.from_numpy, ROIS):
        head = values[:, first : first + int(mask.sum())]
        parts.append(LOSSES["mnnpc"](head, responses[:, mask], ceilings[mask]))
        first += int(mask.sum())
    torch.testing.assert_close(loss, torch.stack(parts).mean())


def test_a_head_learns_from_its_own_vertices_alone():
    outputs, values, responses, ceilings = data()
    loss = outputs.averaged(LOSSES["smooth_l1"], LOSSES["smooth_l1"])
    (before,) = torch.autograd.grad(loss(values, responses, ceilings), values)
    responses[:, 4] += 10  # in no ROI
    (after,) = torch.autograd.grad(loss(values, responses, ceilings), values)
    assert torch.equal(before[:, 5:], after[:, 5:]) and not torch.equal(before[:, 4], after[:, 4])


def test_outputs_of_several_surfaces_stand_side_by_side():
    outputs, values, responses, _ = data()
    other = torch.cat([torch.randn(8, 3), values], 1)
    torch.testing.assert_close(outputs.shifted(3).mean(other), outputs.mean(values))
    both = zip(
        outputs.shifted(3).compared(other, responses, None), outputs.compared(values, responses, None), strict=True
    )
    assert all(torch.equal(ours.outputs, theirs.outputs) for ours, theirs in both)
    columns = torch.tensor([4, 0, 2])
    assert torch.equal(SurfaceOutputs.of_one_head(columns).mean(values), values[:, columns])


def test_heads_of_rois_become_other_functions_than_the_head_of_the_whole_surface():
    """Under a loss of patterns: over the vertices of an ROI, and over those of the surface, they are not the same."""
    torch.manual_seed(0)
    features = torch.randn(64, 6)
    responses = features @ torch.randn(6, 5) + 3 * torch.randn(64, 1)  # what all vertices share is no part of a pattern
    responses[:, 3:] += 4 * torch.randn(64, 1)
    head = RoiHead(6, 5, [torch.from_numpy(mask) for mask in ROIS])
    loss = head.outputs.averaged(LOSSES["pattern"], LOSSES["pattern"])
    optimiser = torch.optim.Adam(head.parameters(), lr=0.05)
    for _ in range(200):
        optimiser.zero_grad()
        loss(head.unaveraged(features), responses).backward()
        optimiser.step()
    weights = head.layer.weight.detach()
    of_roi = weights[7:10] - weights[7:10].mean(0)
    of_surface = weights[1:4] - weights[1:4].mean(0)
    r = torch.corrcoef(torch.stack([of_roi.flatten(), of_surface.flatten()]))[0, 1]
    assert r < 0.97
    assert not torch.allclose(of_roi, of_surface, atol=0.1)
