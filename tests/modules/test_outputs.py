"""The heads of a surface are trained each by itself, on its own vertices, and predict their mean together."""

import numpy as np
import pytest
import torch

from heads.modules.linear import RoiHead
from heads.modules.outputs import SurfaceOutputs
from heads.scores.losses import LOSSES

N_IMAGES, N_VERTICES, N_FEATURES = 6, 8, 5
ROIS = [np.array(mask, dtype=bool) for mask in ([1, 1, 1, 0, 0, 1, 0, 0], [0, 0, 1, 1, 1, 0, 0, 0])]


@pytest.fixture
def surface():
    return SurfaceOutputs.of_heads(N_VERTICES, [torch.from_numpy(mask) for mask in ROIS])


def values(n_columns, seed=0):
    return torch.randn(N_IMAGES, n_columns, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def slow_loss(outputs, responses, ceiling, loss, roi_loss):
    """Mean over heads, each of which is cut out of the outputs by hand."""
    losses, first = [], 0
    for number, mask in enumerate([np.ones(N_VERTICES, bool), *ROIS]):
        predicted, first = outputs[:, first : first + mask.sum()], first + mask.sum()
        of_head = None if ceiling is None else ceiling[mask]
        losses.append(LOSSES[roi_loss if number else loss](predicted, responses[:, mask], of_head).item())
    assert first == outputs.shape[1]
    return np.mean(losses)


@pytest.mark.parametrize(
    "pair", [("smooth_l1", "smooth_l1"), ("smooth_l1", "mnnpc"), ("pattern", "mnnpc"), ("mse", "pattern")]
)
@pytest.mark.parametrize("with_ceiling", [True, False])
def test_the_loss_is_the_mean_over_heads_of_the_loss_of_each_on_its_vertices(surface, pair, with_ceiling):
    outputs, responses = values(15), values(N_VERTICES, 1)
    ceiling = torch.linspace(0, 1, N_VERTICES, dtype=torch.float64) if with_ceiling else None
    loss = surface.averaged(*(LOSSES[name] for name in pair))
    assert loss(outputs, responses, ceiling).item() == pytest.approx(slow_loss(outputs, responses, ceiling, *pair))
    placed = torch.cat([values(3, 2), outputs, values(2, 3)], 1)
    shifted = surface.shifted(3).averaged(*(LOSSES[name] for name in pair))
    assert shifted(placed, responses, ceiling).item() == pytest.approx(loss(outputs, responses, ceiling).item())


def gradient(surface, outputs, responses, name):
    outputs = outputs.clone().requires_grad_()
    return torch.autograd.grad(surface.averaged(LOSSES[name], LOSSES[name])(outputs, responses), outputs)[0]


@pytest.mark.parametrize("name", LOSSES)
def test_the_gradient_of_a_roi_head_depends_on_its_own_vertices_alone(surface, name):
    outputs, responses = values(15), values(N_VERTICES, 1)
    of_first_roi = slice(N_VERTICES, N_VERTICES + 4)
    before = gradient(surface, outputs, responses, name)
    elsewhere, inside = responses.clone(), responses.clone()
    elsewhere[:, ~ROIS[0]] += values(4, 2)
    inside[:, 5] += values(1, 3)[:, 0]
    assert torch.equal(gradient(surface, outputs, elsewhere, name)[:, of_first_roi], before[:, of_first_roi])
    assert not torch.allclose(gradient(surface, outputs, inside, name)[:, of_first_roi], before[:, of_first_roi])
    others = outputs.clone()
    others[:, :N_VERTICES] += 1  # of the other heads, the outputs do not count either
    assert torch.equal(gradient(surface, others, responses, name)[:, of_first_roi], before[:, of_first_roi])


def test_each_head_is_supervised_by_itself_where_the_mean_of_heads_was_right_already(surface):
    """Heads that err by as much in opposite directions have a mean without an error, and still learn."""
    responses = values(N_VERTICES, 1)
    outputs = responses[:, surface.vertex].clone()
    alone = [8, 9, 11]  # vertices 0, 1 and 5 of the first ROI, which are in two heads
    outputs[:, alone] += 0.5
    outputs[:, [0, 1, 5]] -= 0.5
    torch.testing.assert_close(surface.mean(outputs), responses, rtol=1e-6, atol=1e-6)  # shares are float32
    by_head = gradient(surface, outputs, responses, "smooth_l1")
    of_mean = outputs.clone().requires_grad_()
    (mean_gradient,) = torch.autograd.grad(LOSSES["smooth_l1"](surface.mean(of_mean), responses), of_mean)
    assert mean_gradient.abs().max() < 1e-6 * by_head.abs().max()
    assert (by_head[:, alone] > 0).all() and (by_head[:, [0, 1, 5]] < 0).all()


def test_a_surface_with_one_head_has_its_loss_and_its_outputs_unchanged():
    columns = torch.tensor([5, 0, 3, 2])
    surface = SurfaceOutputs.of_one_head(columns)
    outputs, responses = values(6), values(4, 1)
    assert torch.equal(surface.mean(outputs), outputs[:, columns])
    ours = surface.averaged(LOSSES["mse"], LOSSES["pattern"])(outputs, responses)
    assert ours.item() == LOSSES["mse"](outputs[:, columns], responses).item()


def test_a_roi_head_gives_the_outputs_of_every_head_and_predicts_their_mean():
    head = RoiHead(N_FEATURES, N_VERTICES, [torch.from_numpy(mask) for mask in ROIS]).double()
    features = values(N_FEATURES)
    outputs = head.unaveraged(features)
    assert outputs.shape == (N_IMAGES, 15) and head.outputs.sizes == (8, 4, 3)
    torch.testing.assert_close(head.outputs.mean(outputs), head(features))
    in_both = outputs[:, [2, 8 + 2, 12]].mean(1)  # vertex 2 is the third of the first ROI, the first of the second
    torch.testing.assert_close(head(features)[:, 2], in_both)
