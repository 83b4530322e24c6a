"""Heads on places: what they compute, what they find, and both stages of training with them."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.rois import HEMISPHERES
from featcache.errors import ConfigError
from heads.backbones.loop import EncoderTraining, _still_statistics
from heads.backbones.stages import train_stage
from heads.config import StageConfig, TrainConfig
from heads.modules import spatial
from heads.modules.by_subject import SpatialHeads
from heads.modules.saved import saved_shapes, spatial_head_of
from heads.modules.spatial import SpatialReadout, Standardise

SHAPES = {"pooled": (9,), "stages.0": (5, 4, 8), "stages.1": (3, 3, 12), "stages.1.cls": (12,)}
SPATIAL = TrainConfig(
    head="spatial", epochs=2, batch_size=4, stop="never", token_dropout=0.2, freeze_norm=False, embedding=8
)


def some_rows(n_images, shapes=SHAPES, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        array: 3 * torch.randn(n_images, *shape, generator=generator) + torch.arange(shape[-1])
        for array, shape in shapes.items()
    }


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
    monkeypatch.setattr(spatial, "_LARGEST", largest)
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
    with _still_statistics(norm):
        norm(some_rows(4, seed=1))
    assert all(torch.equal(before[key], value) for key, value in norm.state_dict().items())


def test_places_are_dropped_whole_while_training_alone():
    readout = SpatialReadout({"a": (6, 6, 5)}, 3, dropout=0.5, standardised=True)
    rows = {"a": torch.ones(200, 6, 6, 5)}
    torch.manual_seed(0)
    thinned = readout._thinned(rows["a"])
    assert set(thinned.unique().tolist()) == {0.0, 2.0} and (thinned == thinned[..., :1]).all()
    assert abs(thinned.mean() - 1) < 0.05
    assert not torch.equal(readout(rows)[0], readout(rows)[1])
    readout.eval()
    assert torch.equal(readout(rows), readout(rows)) and torch.equal(readout._thinned(rows["a"]), rows["a"])


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


def trained_like(heads):
    """Everything that training changes drawn anew, running statistics too."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for tensor in [*heads.parameters(), *(b for b in heads.buffers() if b.is_floating_point())]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return heads.eval()


@pytest.mark.parametrize("space", [0, 5])
def test_a_subjects_head_is_what_both_stages_predict_for_it(tiny, space):
    subjects = open_challenge(tiny).subjects
    settings = replace(SPATIAL, space=space, rank=2)
    rows = some_rows(6)
    for group in (subjects, subjects[1:]):
        heads = trained_like(SpatialHeads(SHAPES, group, settings, 0.1))
        numbers = torch.tensor([0, 1, 0, 0, 1, 1]) % len(group)
        outputs = heads(rows, numbers)
        assert outputs.shape == (6, heads.n_outputs) and saved_shapes(heads.saved()) == list(SHAPES.items())
        for number, subject in enumerate(group):
            for hemisphere in HEMISPHERES:
                alone = spatial_head_of(heads.saved(), heads.names, subject.name, hemisphere)
                own = outputs[numbers == number][:, heads.columns[subject.name, hemisphere]]
                torch.testing.assert_close(alone(rows)[numbers == number], own, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("space", [0, 5])
def test_stage_2_starts_from_its_subjects_heads_of_the_same_shape(tiny, space):
    subjects = open_challenge(tiny).subjects
    first = trained_like(SpatialHeads(SHAPES, subjects, replace(SPATIAL, space=space), 0.1))
    second = SpatialHeads(SHAPES, subjects[1:], replace(SPATIAL, space=space), 0.1).eval()
    assert second.start_from(first.saved(), first.names)
    rows, number = some_rows(4), torch.ones(4, dtype=torch.int64)
    torch.testing.assert_close(second(rows, 0 * number), first(rows, number)[:, : second.n_outputs])
    settings = replace(SPATIAL, space=space)
    unlike = [({**SHAPES, "pooled": (8,)}, settings)]
    unlike += [(SHAPES, changed) for changed in (replace(settings, rank=3), replace(settings, space=7))]
    for shapes, changed in unlike:
        other = SpatialHeads(shapes, subjects[1:], changed, 0.1)
        before = {key: value.clone() for key, value in other.state_dict().items()}
        assert not other.start_from(first.saved(), first.names)
        assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def train(tree, work, settings=SPATIAL, stage="pretrain", subject="all", network="test_resnet", init="none", **options):
    backbone = BackboneConfig(name=network, weights="none", size=64 if "vit" in network else 32)
    config = StageConfig(
        stage=stage, train=settings, backbone=backbone, init=init, fold=0, n_folds=3, device="cpu", workers=1, **options
    )
    return [one.checkpoint for one in train_stage(open_challenge(tree).select(subject), config, work)]


@pytest.mark.parametrize(("network", "space"), [("test_resnet", 0), ("test_vit", 4), ("test_efficientnet", 0)])
def test_both_stages_and_their_heads_read_what_a_network_says(tiny, tmp_path, network, space):
    """The heads of a checkpoint, on the layers of its backbone, score what training scored."""
    from featcache.cache.pixels import cache_pixels
    from heads.scores.metrics import VertexScores, pearson_r, summarize

    settings = replace(SPATIAL, space=space, smoothness=0.1, sparsity=0.01)
    train(tiny, tmp_path, settings, network=network)
    (second,) = train(tiny, tmp_path, settings, "finetune", "2", network, "stage1")
    (subject,) = open_challenge(tiny).select("2")
    backbone = second.backbone()
    taps = backbone.taps(settings.tapped)
    assert second.facts["taps"] == taps.key() and ("cls" in str(backbone.shapes(taps))) == (network == "test_vit")
    (pixels,) = cache_pixels([subject], backbone, tmp_path, 1.0, 1)
    held_out = np.flatnonzero(np.isin(subject.train.ids, second.seen_ids, invert=True))
    with torch.inference_mode():
        rows = backbone.features(backbone.normalise(pixels.read(held_out)), taps)
    scores = []
    for hemisphere in HEMISPHERES:
        head = spatial_head_of(second.heads(), [subject.name], subject.name, hemisphere)
        r = pearson_r(head(rows).numpy(), subject.responses(hemisphere)[held_out])
        scores.append(VertexScores(subject.name, hemisphere, r, subject.noise_ceiling[hemisphere]))
    assert summarize(scores)[-1].accuracy == pytest.approx(100 * second.facts["score"], abs=0.05)


def test_an_interrupted_run_ends_with_the_same_bits(tiny, tmp_path, monkeypatch):
    settings = replace(SPATIAL, loss="smooth_l1+pearson", ema=0.9, augment=True, smoothness=0.1, correlation_batch=8)

    def weights(checkpoint):
        folder = checkpoint.path / checkpoint.facts["weights"]
        return [load_file(folder / f"{part}.safetensors") for part in ("backbone", "heads")]

    (whole,) = train(tiny, tmp_path / "whole", settings, save_every=1)
    honest, calls = EncoderTraining._step, []

    def stopping(self, groups, number):
        calls.append(number)
        if len(calls) == 3:
            raise KeyboardInterrupt
        honest(self, groups, number)

    with monkeypatch.context() as patch:
        patch.setattr(EncoderTraining, "_step", stopping)
        with pytest.raises(KeyboardInterrupt):
            train(tiny, tmp_path / "parts", settings, save_every=1)
    (parts,) = train(tiny, tmp_path / "parts", settings, save_every=1)
    for one, other in zip(weights(whole), weights(parts), strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)


def test_pooled_and_spatial_heads_start_from_each_others_stage_1(tiny, tmp_path, monkeypatch):
    """What cannot be gone on from is said, and pooled heads are fitted in closed form instead."""
    said: list[str] = []
    monkeypatch.setattr("heads.backbones.stages.say", said.append)
    pooled = TrainConfig(epochs=1, batch_size=4, embedding=8)
    short = replace(SPATIAL, epochs=1)
    train(tiny, tmp_path / "a", short)
    (one,) = train(tiny, tmp_path / "a", pooled, "finetune", "1", init="stage1")
    train(tiny, tmp_path / "b", pooled)
    (other,) = train(tiny, tmp_path / "b", short, "finetune", "1", init="stage1")
    assert one.finished and other.finished
    assert sum("heads start from small random maps" in line for line in said) == 1


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"head": "places"}, "--head: expected one of pooled, spatial; found 'places'"),
        ({"layers": "all"}, "--layers: expected --head spatial with it; found --head pooled"),
        ({"token_dropout": 0.0}, "--token-dropout: expected --head spatial"),
        ({"head": "spatial", "token_dropout": 1.0}, "--token-dropout: expected a number from 0 and below 1"),
        ({"head": "spatial", "rank": 0}, "--rank: expected 1 or more"),
        ({"head": "spatial", "space": -1}, "--space: expected 0 or more"),
        ({"head": "spatial", "smoothness": -0.1}, "--smoothness: expected 0 or more"),
        ({"head": "spatial", "grid": "fine"}, "--grid: expected auto, native or a number"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ConfigError, match=message):
        TrainConfig(**settings)


def test_a_layer_that_the_network_lacks_is_one_line(tiny, tmp_path):
    with pytest.raises(ConfigError, match=r"--layers: expected auto, all, pooled, .*found 'layer9'"):
        train(tiny, tmp_path, replace(SPATIAL, layers="pooled,layer9"))


def test_pooled_heads_keep_their_recipe_and_spatial_settings_are_in_theirs():
    assert "layers" not in TrainConfig().key() and "head" not in TrainConfig().key()
    changed = {"layers": "all", "grid": "5", "space": 4, "rank": 2, "token_dropout": 0.3, "smoothness": 1.0}
    changed |= {"sparsity": 1.0}
    recipes = [SPATIAL.key(), *(replace(SPATIAL, **{key: value}).key() for key, value in changed.items())]
    assert len({str(key) for key in recipes}) == len(recipes)
    assert replace(SPATIAL, layers="0, pooled").key() == replace(SPATIAL, layers="0,pooled").key()
