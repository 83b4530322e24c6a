"""Maps say where a planted model looks, whatever heads it was fitted with."""

import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from featcache.backbone.extent import WHOLE, Extent
from featcache.cache.extract import extract
from featcache.cache.store import create_store, open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import StoreError
from featcache.workdir import Workdir
from heads.backbones.stages import train_stage
from heads.blend.models import Model
from heads.config import FitConfig, StageConfig, TrainConfig
from heads.fit.run import fit_heads
from heads.maps.read import VertexMaps, read_maps
from heads.modules.spatial import SpatialReadout
from support.planted import N_TEST, N_TRAIN, N_VERTICES, PLANTED, SHAPES, feature_key, store_features
from support.simulated import load_truth

SIDE = 7
SURFACES = tuple(N_VERTICES)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ridge", "spatial", "rank 2", "space"])
def test_maps_peak_at_the_planted_place_of_the_planted_layer(fitted, name):
    work, _, (model,) = fitted(name)
    maps = read_maps(model, work)
    assert tuple(maps) == SURFACES
    for surface, of_surface in maps.items():
        layer, (y, x) = PLANTED[surface]
        side = SHAPES[layer][0]
        assert of_surface.layers == tuple(SHAPES) and set(of_surface.places) == {"near", "far"}
        flat = of_surface.places[layer].reshape(N_VERTICES[surface], -1)
        assert (flat.argmax(1) == y * side + x).all() and (flat.max(1) > 2 / flat.shape[1]).all()
        # a vector of a few features is hardly penalised: its weights on noise are no smaller than those of a map
        assert (of_surface.shares[:, :2].argmax(1) == of_surface.layers.index(layer)).mean() > 0.8
        # what a penalty spreads over other places draws centres to the middle, and never past it
        planted = (np.array([x, y]) + 0.5) / side
        centre = of_surface.fields()[:, :2].mean(0)
        assert (np.sign(centre - 0.5) == np.sign(planted - 0.5))[planted != 0.5].all()


@pytest.mark.parametrize("name", ["ridge", "spatial"])
def test_maps_and_shares_sum_to_1(fitted, name):
    work, _, (model,) = fitted(name)
    for of_surface in read_maps(model, work).values():
        for layer, values in of_surface.places.items():
            assert (values >= 0).all() and values.shape[1:] == SHAPES[layer][:2]
            np.testing.assert_allclose(values.sum((1, 2)), 1, rtol=1e-4)
        np.testing.assert_allclose(of_surface.shares.sum(1), 1, rtol=1e-4)
        np.testing.assert_allclose(of_surface.together().sum((1, 2)), 1, rtol=1e-4)


def weights_at(readout, statistics):
    """{array: (n_outputs, n_places, n_channels)}, on standardised channels, from the readout's answers to unit rows."""
    found, n = {}, readout.n_outputs
    with torch.no_grad():
        zero = {name: statistics[name][0].expand(1, *shape) for name, shape in readout.shapes.items()}
        for name, shape in readout.shapes.items():
            size = int(np.prod(shape))
            units = torch.eye(size).reshape(size, *shape) * (statistics[name][1] + 1e-5).sqrt()
            rows = {other: value.expand(size, *value.shape[1:]).clone() for other, value in zero.items()}
            rows[name] = rows[name] + units
            found[name] = (readout(rows) - readout(zero)).T.reshape(n, -1, shape[-1]).numpy()
    return found


def crafted(work, heads, n_channels=4):
    """A model whose heads, one module a fold, were made by hand; and the shapes of the layers they read."""
    shapes = {name: (*grid, n_channels) for name, grid in {"near": (3, 3), "far": (2, 2)}.items()}
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(N_TRAIN + N_TEST, *shape)).astype(np.float16) for name, shape in shapes.items()}
    ids = np.arange(N_TRAIN + N_TEST)
    features = store_features(work, ids, values)
    key = {"subject": "subj01", "features": feature_key(shapes), "responses": ""}
    key |= {"head": "spatial", "solver": "adamw", "objective": "mse"}
    facts = {"model": "crafted", "features": features.name}
    store = create_store(Workdir(work).predictions, "crafted", key, ids, N_TRAIN, dict.fromkeys(SURFACES, 3), facts)
    tensors = {
        f"fold{fold}.{surface}.head.{name}": value.contiguous()
        for surface in SURFACES
        for fold, head in enumerate(heads(shapes))
        for name, value in head.state_dict().items()
    }
    Workdir(work).heads.mkdir()
    save_file(tensors, Workdir(work).head_weights(store.name))
    return Model.from_store(store), shapes


def statistics_of(shapes):
    generator = torch.Generator().manual_seed(3)
    return {
        name: (torch.randn(s[-1], generator=generator), torch.rand(s[-1], generator=generator) + 0.5)
        for name, s in shapes.items()
    }


def some_readout(shapes, n_outputs, rank, seed=0):
    torch.manual_seed(seed)
    readout = SpatialReadout(shapes, n_outputs, rank, start=1.0).eval()
    with torch.no_grad():
        readout.mixture.normal_()
        for layer in readout.layers:
            if hasattr(layer, "spatial"):
                layer.spatial.normal_()
        readout.layers[0].spatial[0, :, 1:] *= 0.01  # one that looks at a single place
    readout.standardise.fix(statistics_of(shapes))
    return readout


@pytest.mark.parametrize("rank", [1, 2])
def test_sizes_of_a_spatial_head_are_those_of_its_weights_on_channels_of_unit_variance(tmp_path, rank):
    made = []

    def heads(shapes):
        made[:] = [some_readout(shapes, 3, rank)]
        return [torch.nn.Sequential(made[0])]

    model, shapes = crafted(tmp_path, heads)
    weights = weights_at(made[0], statistics_of(shapes))
    sizes = {name: np.sqrt(np.square(one).sum(2)) for name, one in weights.items()}
    whole = np.stack([np.sqrt(np.square(one).sum((1, 2))) for one in weights.values()], 1)
    for of_surface in read_maps(model, tmp_path).values():
        for name, shape in shapes.items():
            expected = sizes[name] / sizes[name].sum(1, keepdims=True)
            np.testing.assert_allclose(of_surface.places[name].reshape(3, -1), expected, rtol=1e-2, atol=1e-4)
            assert of_surface.places[name].shape == (3, *shape[:2])
        np.testing.assert_allclose(of_surface.shares, whole / whole.sum(1, keepdims=True), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(of_surface.shares, made[0].maps()[1], rtol=1e-2, atol=1e-3)


def test_a_vertex_has_the_maps_of_the_outputs_of_the_space_that_it_uses(tmp_path):
    uses = torch.tensor([[2.0, 0, 0, 0, 0], [0, -3, 0, 0, 0], [0, 0, 0, 0, 0.1]])
    made = []

    def heads(shapes):
        linear = torch.nn.Linear(5, 3)
        with torch.no_grad():
            linear.weight.copy_(uses)
        made[:] = [some_readout(shapes, 5, 1)]
        return [torch.nn.Sequential(made[0], linear)]

    model, _ = crafted(tmp_path, heads)
    where, shares = made[0].maps()
    for of_surface in read_maps(model, tmp_path).values():
        for name, values in of_surface.places.items():
            np.testing.assert_allclose(values, where[name][[0, 1, 4]], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(of_surface.shares, shares[[0, 1, 4]], rtol=1e-3, atol=1e-5)


def test_folds_count_alike(tmp_path):
    made = []

    def heads(shapes):
        made[:] = [some_readout(shapes, 3, 1, seed) for seed in range(2)]
        return [torch.nn.Sequential(one) for one in made]

    model, _ = crafted(tmp_path, heads)
    found = read_maps(model, tmp_path)["lh"].shares
    both = np.stack([one.maps()[1].numpy() for one in made])
    assert (found >= both.min(0) - 0.05).all() and (found <= both.max(0) + 0.05).all()


@pytest.fixture
def own(fitted, tmp_path):
    """A copy of a work folder, for damaging, and its model."""
    work, _, (model,) = fitted("few priors")
    copy = shutil.copytree(work, tmp_path / "work")
    return copy, Model.from_store(open_store(Workdir(copy).predictions / model.store.name))


def swapped(path):
    save_file({"lh.weights": torch.ones(3, 2)}, path, {"predictions": "another"})


@pytest.mark.parametrize(
    ("damage", "found"),
    [
        (lambda path: path.unlink(), "found no such file; run 'fit-heads' again"),
        (lambda path: path.write_bytes(b""), "found a damaged file"),
        (lambda path: path.write_bytes(b"garbage" * 99), "found a damaged file"),
        (lambda path: path.write_bytes(path.read_bytes()[:-1]), "found a damaged file"),
        (swapped, "found those of another; delete it and run 'fit-heads' again"),
    ],
    ids=["missing", "empty", "garbage", "truncated", "swapped"],
)
def test_a_weights_file_that_is_not_whole_is_one_line_that_names_it(own, damage, found):
    work, model = own
    path = Workdir(work).head_weights(model.store.name)
    damage(path)
    with pytest.raises(StoreError) as error:
        read_maps(model, work)
    message = str(error.value)
    assert message.startswith(f"{path}: expected ") and found in message and "run 'fit-heads' again" in message
    assert "\n" not in message


def test_weights_that_were_not_kept_have_no_maps(own):
    work, model = own
    save_file({}, Workdir(work).head_weights(model.store.name), {"predictions": model.store.name})
    assert read_maps(model, work) is None


def test_sizes_of_closed_form_heads_are_those_of_weights_on_channels_of_unit_variance(fitted):
    work, _, (model,) = fitted("few priors")
    saved = load_file(Workdir(work).head_weights(model.store.name))
    features = open_store(Workdir(work).features / model.facts.features)
    for surface, of_surface in read_maps(model, work).items():
        whole = []
        for name, shape in SHAPES.items():
            x = features.read(name, 0, N_TRAIN).astype(np.float64).reshape(N_TRAIN, -1, shape[-1])
            unit = np.sqrt(x.var(0).mean(0))
            w = saved[f"{surface}.{name}.weights"].numpy().reshape(*x.shape[1:], -1) * unit[None, :, None]
            sizes = np.sqrt(np.square(w).sum(1)).T
            whole.append(np.sqrt(np.square(sizes).sum(1)))
            if len(shape) > 1:
                expected = (sizes / sizes.sum(1, keepdims=True)).reshape(-1, *shape[:2])
                np.testing.assert_allclose(of_surface.places[name], expected, rtol=1e-3)
        np.testing.assert_allclose(of_surface.shares, np.stack(whole, 1) / np.sum(whole, 0)[:, None], rtol=1e-3)


# --- maps put together, fields and depth


def resampled(image, side):
    """Bilinear between the centres of places, and beyond the outermost centres as at them."""
    out = np.zeros((side, side))
    height, width = image.shape
    for i in range(side):
        for j in range(side):
            y, x = ((i + 0.5) / side * height - 0.5, (j + 0.5) / side * width - 0.5)
            y, x = min(max(y, 0), height - 1), min(max(x, 0), width - 1)
            top, left = int(y), int(x)
            bottom, right = min(top + 1, height - 1), min(left + 1, width - 1)
            a, b = y - top, x - left
            upper = (1 - b) * image[top, left] + b * image[top, right]
            out[i, j] = (1 - a) * upper + a * ((1 - b) * image[bottom, left] + b * image[bottom, right])
    return out


def some_maps(seed=0, n=5):
    rng = np.random.default_rng(seed)
    places = {"low": rng.random((n, 6, 5)), "deep": rng.random((n, 2, 3))}
    places = {name: (one / one.sum((1, 2), keepdims=True)).astype(np.float32) for name, one in places.items()}
    shares = rng.dirichlet(np.ones(4), n)
    return VertexMaps(("low", "deep", "deep.cls", "pooled"), places, shares)


@pytest.mark.parametrize(
    "extent", [WHOLE, Extent(0.0625, 0.0625, 0.9375, 0.9375), Extent(0.2, 0, 0.8, 1), Extent(0, -0.25, 1, 1.25)]
)
def test_fields_are_in_coordinates_of_the_image(extent):
    """Of what the network sees, the left is the extent's left, and so on."""
    seen = some_maps(2)
    fields, of_seen = replace(seen, extent=extent).fields(), seen.fields()
    np.testing.assert_allclose(fields[:, 0], extent.left + (extent.right - extent.left) * of_seen[:, 0])
    np.testing.assert_allclose(fields[:, 1], extent.top + (extent.bottom - extent.top) * of_seen[:, 1])
    at, together = (np.arange(SIDE) + 0.5) / SIDE, seen.together()
    x, y = extent.left + extent.width * at, extent.top + extent.height * at
    for v, (centre_x, centre_y, deviation) in enumerate(fields):
        along_x = together[v].sum(0) @ (x - centre_x) ** 2
        along_y = together[v].sum(1) @ (y - centre_y) ** 2
        assert deviation == pytest.approx(np.sqrt((along_x + along_y) / 2))


def test_layers_are_put_together_by_their_shares_on_one_grid():
    maps = some_maps()
    found = maps.together()
    assert found.shape == (5, SIDE, SIDE)
    for v in range(5):
        total = np.zeros((SIDE, SIDE))
        for k, name in enumerate(("low", "deep")):
            one = resampled(np.square(maps.places[name][v].astype(np.float64)), SIDE)
            total += maps.shares[v, k] * one / one.sum()
        np.testing.assert_allclose(found[v], total / total.sum(), rtol=1e-4, atol=1e-7)


def test_fields_are_means_and_spreads_of_the_maps_put_together():
    maps = some_maps(1)
    together, fields = maps.together(), maps.fields()
    assert fields.shape == (5, 3)
    for v in range(5):
        x = y = spread = 0.0
        for i in range(SIDE):
            for j in range(SIDE):
                x += together[v, i, j] * (j + 0.5) / SIDE
                y += together[v, i, j] * (i + 0.5) / SIDE
        for i in range(SIDE):
            for j in range(SIDE):
                spread += together[v, i, j] * (((j + 0.5) / SIDE - x) ** 2 + ((i + 0.5) / SIDE - y) ** 2)
        np.testing.assert_allclose(fields[v], [x, y, np.sqrt(spread / 2)], rtol=1e-4)


def single(height, width, i, j):
    places = np.zeros((1, height, width), np.float32)
    places[0, i, j] = 1
    return VertexMaps(("low",), {"low": places}, np.ones((1, 1)))


@pytest.mark.parametrize("side", [7, 14, 24, 28])
def test_a_single_place_of_any_grid_is_where_its_field_is(side):
    for i, j in ((side // 2, side // 3), (1, side - 3), (side - 4, 4)):
        x, y, size = single(side, side, i, j).fields()[0]
        assert abs(x - (j + 0.5) / side) < 0.08 and abs(y - (i + 0.5) / side) < 0.08 and size < 0.15


# --- a planted truth


def truth_maps(truth):
    """Maps as perfect heads would have them: a blob at the planted centre of each vertex's field."""
    at = (np.arange(14) + 0.5) / 14
    x, y, size = (truth[name][:, None] for name in ("field_x", "field_y", "field_size"))
    squared = ((at - x) ** 2)[:, None] + ((at - y) ** 2)[:, :, None]
    blob = np.exp(-squared / (4 * size[..., None] ** 2))
    blob /= blob.sum((1, 2), keepdims=True)
    return VertexMaps(("layer",), {"layer": blob.astype(np.float32)}, np.ones((len(blob), 1)))


def test_fields_of_maps_made_from_a_simulated_truth_are_the_planted_ones(tiny):
    for subject in open_challenge(tiny).subjects:
        truths = [load_truth(tiny, subject.name, surface) for surface in subject.surfaces]
        found = np.concatenate([truth_maps(truth).fields() for truth in truths])
        planted = np.concatenate([np.stack([t["field_x"], t["field_y"], t["field_size"]], 1) for t in truths])
        local = np.concatenate([(t["ceiling"] >= 0.2) & np.isin(t["level"], ["early", "mid"]) for t in truths])
        x, y, size = (np.corrcoef(planted[local, k], found[local, k])[0, 1] for k in range(3))
        assert min(x, y) > 0.97 and size > 0.9


# --- what fit-heads writes


def test_heads_of_a_checkpoint_have_maps_among_more_layers_than_they_read(tiny, tmp_path, said):
    subjects, small = open_challenge(tiny).subjects[:1], BackboneConfig(name="test_resnet", weights="none", size=32)
    train = TrainConfig(head="spatial", epochs=1, batch_size=4, stop="never", layers="layer1,pooled", grid="2")
    stage = StageConfig(stage="finetune", train=train, backbone=small, init="none", n_folds=2, device="cpu", workers=1)
    train_stage(subjects, stage, tmp_path)
    layers = LayerConfig(layers=("layer1", "layer2", "pooled"), grid="2")
    extract(subjects, ExtractConfig(backbone=small, layers=layers, checkpoint="auto", workers=1), tmp_path)
    (fit,) = fit_heads(subjects, FitConfig(solver="trained"), tmp_path)
    maps = read_maps(Model.from_store(open_store(fit.path)), tmp_path)
    for of_surface in maps.values():
        assert set(of_surface.places) == {"layer1"} and "layer1" in of_surface.layers
        np.testing.assert_allclose(of_surface.shares.sum(1), 1, rtol=1e-4)
