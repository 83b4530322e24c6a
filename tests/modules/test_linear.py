"""Heads that a gradient trains equal the mean of their layers, and so does the one map that they reduce to."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from heads.modules.linear import LinearHead, LinearMap, RoiHead, make_linear, make_roi

N_FEATURES, N_VERTICES = 5, 8

# Two that overlap, one that is empty, one vertex alone; vertex 7 is in none.
MASKS = {
    "early": [1, 1, 1, 0, 0, 0, 0, 0],
    "overlapping": [0, 0, 1, 1, 1, 0, 0, 0],
    "empty": [0] * 8,
    "alone": [0, 0, 1, 0, 0, 0, 1, 0],
}
ROI_SETS = {
    "all kinds": list(MASKS),
    "none": [],
    "only empty": ["empty"],
    "the same twice": ["early", "early"],
}


def masks(names):
    return [torch.tensor(MASKS[name], dtype=torch.bool) for name in names]


def a_head(names, seed=0):
    torch.manual_seed(seed)
    head = RoiHead(N_FEATURES, N_VERTICES, masks(names)).double()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_()
    return head


def layers(head, names):
    """(weights, bias, mask) of the hemisphere's layer and of each ROI's, taken apart by hand."""
    weight, bias = head.layer.weight.detach().numpy(), head.layer.bias.detach().numpy()
    taken = 0
    for mask in [np.ones(N_VERTICES, dtype=bool), *(np.array(MASKS[name], dtype=bool) for name in names)]:
        rows = slice(taken, taken := taken + mask.sum())
        yield weight[rows], bias[rows], mask
    assert taken == len(weight)


def slow_forward(head, names, features):
    """Mean, for each vertex, over the layers that predict it."""
    predictions = np.zeros((len(features), N_VERTICES))
    for vertex in range(N_VERTICES):
        members = [
            features @ weight[mask[:vertex].sum()] + bias[mask[:vertex].sum()]
            for weight, bias, mask in layers(head, names)
            if mask[vertex]
        ]
        predictions[:, vertex] = np.mean(members, axis=0)
    return predictions


def some_features(n_images=6):
    return torch.randn(n_images, N_FEATURES, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("names", ROI_SETS.values(), ids=ROI_SETS)
def test_roi_head_is_the_mean_of_its_layers(names):
    head, features = a_head(names), some_features()
    expected = slow_forward(head, names, features.numpy())
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-6, atol=1e-6)  # shares are float32


@pytest.mark.parametrize("names", ROI_SETS.values(), ids=ROI_SETS)
def test_roi_head_reduces_to_one_map(names):
    head, features = a_head(names), some_features()
    weights, intercept = head.linear_map()
    assert weights.shape == (N_FEATURES, N_VERTICES)
    assert intercept.shape == (N_VERTICES,)
    torch.testing.assert_close(head.linear_map()(features), head(features))


def test_vertex_in_no_roi_has_the_hemisphere_layer_unscaled():
    names, features = list(MASKS), some_features()
    head = a_head(names)
    expected = features @ head.layer.weight[7] + head.layer.bias[7]
    torch.testing.assert_close(head(features)[:, 7], expected)


def test_a_roi_layer_moves_its_own_vertices_alone():
    names, features = list(MASKS), some_features()
    head = a_head(names)
    before = head(features)
    with torch.no_grad():
        head.layer.bias[N_VERTICES : N_VERTICES + 3] += (
            6  # the layer of "early": vertices 0 and 1 have 2 layers, 2 has 4
        )
    change = (head(features) - before)[0]
    torch.testing.assert_close(change, torch.tensor([3, 3, 1.5, 0, 0, 0, 0, 0], dtype=torch.float64))


def test_every_layer_of_a_roi_head_has_a_gradient():
    head = a_head(list(MASKS))
    head(some_features()).square().sum().backward()
    assert (head.layer.weight.grad.abs().sum(1) > 0).all()


def test_linear_head_is_one_layer_and_reduces_to_one_map():
    torch.manual_seed(0)
    head, features = LinearHead(N_FEATURES, N_VERTICES).double(), some_features()
    with torch.no_grad():
        head.layer.bias.normal_()
    expected = features.numpy() @ head.layer.weight.detach().numpy().T + head.layer.bias.detach().numpy()
    np.testing.assert_allclose(head(features).detach(), expected, rtol=1e-12)
    torch.testing.assert_close(head.linear_map()(features), head(features))


@pytest.mark.parametrize("make", [LinearHead, lambda d, v: RoiHead(d, v, masks(MASKS))], ids=["linear", "roi"])
def test_heads_start_small_but_not_at_zero(make):
    # At zero a correlation has no gradient; at torch's own start the predictions are noise as large as the signal.
    torch.manual_seed(0)
    features = torch.randn(200, 400)
    spread = make(400, N_VERTICES)(features).std(0)
    assert (spread > 1e-4).all()
    assert (spread < 0.1).all()


def test_buffers_follow_the_state_but_are_not_trained():
    head = RoiHead(N_FEATURES, N_VERTICES, masks(MASKS))
    assert {name for name, _ in head.named_parameters()} == {"layer.weight", "layer.bias"}
    assert {"vertex", "share"} <= head.state_dict().keys()


def test_heads_are_made_from_masks_and_rois_without_vertices_have_no_layer():
    rois = [np.array(MASKS[name], dtype=bool) for name in MASKS]
    assert isinstance(make_linear(N_FEATURES, N_VERTICES, rois), LinearHead)
    head = make_roi(N_FEATURES, N_VERTICES, rois)
    n_outputs = N_VERTICES + sum(map(sum, MASKS.values()))
    assert head.layer.weight.shape == (n_outputs, N_FEATURES)
    assert make_roi(N_FEATURES, N_VERTICES, rois[:1]).vertex.tolist() == [*range(N_VERTICES), 0, 1, 2]


def test_a_roi_head_that_starts_from_a_map_predicts_what_it_does():
    start = LinearMap(torch.randn(N_FEATURES, N_VERTICES), torch.randn(N_VERTICES))
    head = RoiHead(N_FEATURES, N_VERTICES, masks(MASKS))
    head.start_from(start)
    features = some_features().float()
    torch.testing.assert_close(head(features), start(features))


def test_a_snapshot_stays_what_it_was():
    head, features = LinearHead(N_FEATURES, N_VERTICES), some_features().float()
    kept, before = head.snapshot(), head(features).detach()
    with torch.no_grad():
        head.layer.weight.add_(1)
    torch.testing.assert_close(kept(features), before)
    assert not kept.weights.requires_grad
