"""The loss of a network for several subjects: masked means, and correlations within a subject."""

from dataclasses import replace
from functools import partial

import pytest
import torch

from heads.backbones.batches import Targets
from heads.backbones.encoder import encoder_loss
from heads.modules.outputs import SurfaceOutputs
from heads.scores.losses import LOSSES
from support.training import QUICK, assert_close, train, weights


def mixed_batch():
    """5 images of subject a and 3 of b, which lacks two of six outputs and has the rest in another order."""
    torch.manual_seed(0)
    outputs = torch.randn(8, 6, requires_grad=True)
    rows = {"a": torch.tensor([0, 2, 3, 5, 7]), "b": torch.tensor([1, 4, 6])}
    columns = {("a", "lh"): torch.arange(6), ("b", "lh"): torch.tensor([5, 0, 3, 2])}
    targets = [Targets(s, "lh", rows[s], torch.randn(len(rows[s]), len(columns[s, "lh"]))) for s in "ab"]
    ceilings = {("a", "lh"): torch.rand(6), ("b", "lh"): None}
    return outputs, targets, columns, ceilings


def whole(columns):
    """Surfaces with one head each."""
    return {key: SurfaceOutputs.of_one_head(outputs) for key, outputs in columns.items()}


def test_smooth_l1_over_several_subjects_is_the_masked_mean():
    outputs, targets, columns, ceilings = mixed_batch()
    wanted, mask = torch.zeros(8, 6), torch.zeros(8, 6, dtype=torch.bool)
    for t in targets:
        for k, row in enumerate(t.rows):
            wanted[row, columns[t.subject, "lh"]], mask[row, columns[t.subject, "lh"]] = t.responses[k], True
    expected = torch.nn.functional.smooth_l1_loss(outputs[mask], wanted[mask])
    loss = encoder_loss([(1.0, "smooth_l1")], outputs, targets, whole(columns), ceilings)
    torch.testing.assert_close(loss, expected)
    loss.backward()
    assert (outputs.grad[~mask] == 0).all() and (outputs.grad[mask] != 0).all()


@pytest.mark.parametrize("name", ["pearson", "pattern", "mnnpc"])
def test_correlations_are_within_a_subject_under_its_own_ceiling(name):
    outputs, targets, columns, ceilings = mixed_batch()
    parts = [
        len(t.rows)
        * t.responses.shape[1]
        * LOSSES[name](outputs[t.rows][:, columns[t.subject, "lh"]], t.responses, ceilings[t.subject, "lh"])
        for t in targets
    ]
    expected = 0.5 * sum(parts) / (5 * 6 + 3 * 4)
    torch.testing.assert_close(encoder_loss([(0.5, name)], outputs, targets, whole(columns), ceilings), expected)


def test_a_subject_with_one_image_has_no_correlation_and_keeps_its_other_losses():
    outputs, targets, columns, ceilings = mixed_batch()
    alone = replace(targets[1], rows=targets[1].rows[:1], responses=targets[1].responses[:1])
    both = encoder_loss([(1.0, "pearson")], outputs, [targets[0], alone], whole(columns), ceilings)
    torch.testing.assert_close(both, encoder_loss([(1.0, "pearson")], outputs, targets[:1], whole(columns), ceilings))
    assert encoder_loss([(1.0, "pearson")], outputs, [alone], whole(columns), ceilings) == 0
    assert encoder_loss([(1.0, "smooth_l1")], outputs, [alone], whole(columns), ceilings) > 0


def test_images_of_subjects_that_differ_have_a_pattern_where_they_have_no_correlation_over_images():
    """In a batch with one image of each subject, `pattern` alone has a gradient, and it leads to the patterns."""
    torch.manual_seed(1)
    responses = torch.randn(8, 6)
    keys = [(f"subj{number:02d}", "lh") for number in range(8)]
    targets = [Targets(*key, torch.tensor([k]), responses[k : k + 1]) for k, key in enumerate(keys)]
    columns, ceilings = dict.fromkeys(keys, torch.arange(6)), dict.fromkeys(keys)
    outputs = torch.zeros(8, 6).normal_(std=0.1).requires_grad_()
    for name in ("pearson", "mnnpc"):
        (gradient,) = torch.autograd.grad(
            encoder_loss([(1.0, name)], outputs, targets, whole(columns), ceilings), outputs
        )
        assert (gradient == 0).all()
    optimiser = torch.optim.SGD([outputs], lr=1.0)
    for _ in range(200):
        optimiser.zero_grad()
        encoder_loss([(1.0, "pattern")], outputs, targets, whole(columns), ceilings).backward()
        assert (outputs.grad.abs().sum(1) > 0).all()
        optimiser.step()
    r = [torch.corrcoef(torch.stack(pair))[0, 1] for pair in zip(outputs.detach(), responses, strict=True)]
    assert min(r) > 0.99


def test_the_loss_of_a_surface_is_the_mean_over_its_heads_and_surfaces_count_by_their_vertices():
    torch.manual_seed(2)
    roi = torch.tensor([True, False, True, True])
    surfaces = {("a", "lh"): SurfaceOutputs.of_heads(4, [roi]), ("a", "rh"): SurfaceOutputs.of_heads(3).shifted(7)}
    outputs = torch.randn(5, 10, requires_grad=True)
    targets = [Targets("a", h, torch.arange(5), torch.randn(5, n)) for h, n in (("lh", 4), ("rh", 3))]
    ceilings = {("a", "lh"): torch.rand(4), ("a", "rh"): torch.rand(3)}
    lh, rh = (t.responses for t in targets)
    whole, of_roi, other = outputs[:, :4], outputs[:, 4:7], outputs[:, 7:]
    on_lh = (
        LOSSES["smooth_l1"](whole, lh)
        + 2 * LOSSES["pattern"](whole, lh)
        + LOSSES["mnnpc"](of_roi, lh[:, roi], ceilings["a", "lh"][roi])
    ) / 2
    on_rh = LOSSES["smooth_l1"](other, rh) + 2 * LOSSES["pattern"](other, rh)
    ours = encoder_loss([(1.0, "smooth_l1"), (2.0, "pattern")], outputs, targets, surfaces, ceilings, [(1.0, "mnnpc")])
    torch.testing.assert_close(ours, (4 * on_lh + 3 * on_rh) / 7)


@pytest.mark.parametrize("settings", [QUICK, replace(QUICK, head="spatial", token_dropout=0.0)])
def test_a_compiled_backbone_trains_to_the_same_weights_and_is_scored_as_it_is(tiny, tmp_path, monkeypatch, settings):
    """Compiled up to torch's own kernels, which takes a second: what is compiled, not how fast it is."""
    calls, compiled = [], partial(torch.compile, backend="eager")

    def counted(function):
        inner = compiled(function)
        return lambda model, images: (calls.append(model.training), inner(model, images))[1]

    expected = train(tiny, tmp_path / "plain", settings)
    monkeypatch.setattr(torch, "compile", counted)
    trained = train(tiny, tmp_path / "compiled", settings, compile=True)
    assert_close(weights(trained), weights(expected), atol=1e-4, rtol=1e-2)
    assert trained.facts.scores == pytest.approx(expected.facts.scores, abs=1e-3)
    assert set(calls) == {True} and trained.path.name == expected.path.name
