"""Readouts of places: what they compute, and what they find."""

import numpy as np
import pytest
import torch

from heads.backbones.step import still_statistics
from heads.modules import spatial
from heads.modules.spatial import SpatialReadout, Standardise
from support.heads import SHAPES, some_rows


def slow(readout, rows):
    """One einsum over everything, layer by layer, on rows that are standardised already."""
    shares = len(readout.shapes) * readout.mixture.softmax(1)
    outputs = readout.bias
    for k, (array, reader) in enumerate(zip(readout.shapes, readout.layers, strict=True)):
        if rows[array].ndim == 2:
            one = torch.einsum("nc,vc->nv", rows[array], reader.channels)
        else:
            places = reader.spatial / reader.spatial.shape[2] ** 0.5
            one = torch.einsum("npc,vrp,vrc->nv", rows[array].flatten(1, 2), places, reader.channels)
        outputs = outputs + shares[:, k] * one
    return outputs


@pytest.mark.parametrize("largest", [2**24, 7 * 20 * 2 * 3])
def test_the_factors_are_one_linear_map_of_all_places_and_channels(monkeypatch, largest):
    """In one piece, and outputs apart; forward and back."""
    monkeypatch.setattr(spatial, "LARGEST", largest)
    readout = SpatialReadout(SHAPES, 11, rank=2, start=1.0, standardised=True)
    torch.nn.init.normal_(readout.mixture)
    rows = {array: values.requires_grad_() for array, values in some_rows(7).items()}
    weights = [*readout.parameters(), *rows.values()]
    outputs, expected = readout(rows), slow(readout, rows)
    torch.testing.assert_close(outputs, expected, atol=1e-4, rtol=1e-4)
    direction = torch.randn(7, 11)
    ours, theirs = (torch.autograd.grad((o * direction).sum(), weights) for o in (outputs, expected))
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, atol=1e-3, rtol=1e-3)


def test_the_first_maps_are_nearly_uniform_and_the_first_outputs_small():
    readout = SpatialReadout(SHAPES, 200)
    (where, shares), uniform = readout.maps(), 1 / 20
    assert set(where) == {"stages.0", "stages.1"} and where["stages.0"].shape == (200, 5, 4)
    assert (where["stages.0"] - uniform).abs().max() < uniform / 2 and shares.shape == (200, 4)
    assert 0 < readout(some_rows(50)).std() < 0.2


def test_channels_are_standardised_by_what_was_seen_and_given_statistics_stay():
    rows = some_rows(4000)
    norm = Standardise(SHAPES)
    for values in norm(rows).values():
        flat = values.flatten(0, -2)
        torch.testing.assert_close(flat.mean(0), torch.zeros(flat.shape[1]), atol=1e-3, rtol=0)
        torch.testing.assert_close(flat.std(0), torch.ones(flat.shape[1]), atol=1e-2, rtol=0)
    torch.testing.assert_close(norm(rows), norm.eval()(rows), atol=1e-4, rtol=1e-4)
    given = {array: (torch.full((s[-1],), 2.0), torch.full((s[-1],), 4.0)) for array, s in SHAPES.items()}
    norm.fix(given)
    norm.train()(rows)
    for array, values in norm(rows).items():
        torch.testing.assert_close(values, (rows[array] - 2) / 2, atol=1e-4, rtol=1e-4)


def test_a_pass_that_must_leave_statistics_alone_does():
    norm = Standardise(SHAPES)
    norm(some_rows(4))
    before = {key: value.clone() for key, value in norm.state_dict().items()}
    with still_statistics(norm):
        norm(some_rows(4, seed=1))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_places_are_dropped_whole_while_training_alone():
    readout = SpatialReadout({"a": (6, 6, 5)}, 3, dropout=0.5, standardised=True)
    rows = {"a": torch.ones(200, 6, 6, 5)}
    torch.manual_seed(0)
    thinned = readout._drop_places(rows["a"])
    assert set(thinned.unique().tolist()) == {0.0, 2.0} and (thinned == thinned[..., :1]).all()
    assert abs(thinned.mean() - 1) < 0.05
    assert not torch.equal(readout(rows)[0], readout(rows)[1])
    readout.eval()
    assert torch.equal(readout(rows), readout(rows)) and torch.equal(readout._drop_places(rows["a"]), rows["a"])


def test_rough_maps_and_broad_maps_cost_more():
    def cost(grid, smoothness, sparsity, size=1.0):
        readout = SpatialReadout({"a": (4, 4, 3), "v": (5,)}, 1)
        with torch.no_grad():
            readout.layers[0].spatial.copy_(size * grid.reshape(1, 1, 16))
        return float(readout.regularisation(smoothness, sparsity).detach())

    board = (torch.arange(4)[:, None] + torch.arange(4)) % 2 * 2.0 - 1
    peak = torch.zeros(4, 4)
    peak[1, 2] = 1
    assert cost(torch.ones(4, 4), 1, 0) == 0 and cost(board, 1, 0) == pytest.approx(8)
    assert cost(peak, 0, 1) == pytest.approx(1 / 4) and cost(torch.ones(4, 4), 0, 1) == pytest.approx(1)
    assert cost(board, 1, 1, 0.1) == pytest.approx(cost(board, 1, 1)) and cost(board, 0, 0) == 0
    assert SpatialReadout({"v": (5,)}, 1).regularisation(1, 1) == 0


@pytest.mark.slow
def test_a_planted_place_of_a_planted_layer_is_found():
    """Responses that are one place of one layer: predicted on new images, and the maps say where it is."""
    shapes = {"pooled": (9,), "near": (6, 6, 8), "far": (5, 5, 12)}
    rows, new = some_rows(600, shapes), some_rows(200, shapes, seed=1)
    torch.manual_seed(0)
    mixture = torch.randn(12, 4)
    places = [(1, 3), (4, 0), (2, 2), (0, 4)]

    def responses(rows):
        seen = torch.stack([rows["far"][:, i, j] - torch.arange(12) for i, j in places], 2)
        signal = (seen * mixture).sum(1)
        return signal / signal.std(0)

    readout = SpatialReadout(shapes, 4, dropout=0.1)
    readout.standardise.fix({a: (v.flatten(0, -2).mean(0), v.flatten(0, -2).var(0)) for a, v in rows.items()})
    optimiser = torch.optim.AdamW(readout.parameters(), lr=2e-2, weight_decay=0.05)
    targets = responses(rows) + 0.3 * torch.randn(600, 4)
    for _ in range(250):
        own = torch.randint(600, (64,))
        loss = torch.nn.functional.mse_loss(readout({a: v[own] for a, v in rows.items()}), targets[own])
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    readout.eval()
    where, shares = readout.maps()
    for v, (i, j) in enumerate(places):
        assert np.corrcoef(readout(new)[:, v].detach(), responses(new)[:, v])[0, 1] > 0.95
        assert where["far"][v].argmax() == 5 * i + j and where["far"][v].max() > 0.5
    assert (shares.argmax(1) == 2).all() and (shares[:, 2] > 0.8).all()
