"""Maps say where a planted model looks, whatever heads it was fitted with, and they are written whole or left out."""

import csv
from dataclasses import replace
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from scipy.stats import spearmanr

from featcache.cache.extract import FOLDER as FEATURES
from featcache.cache.extract import extract
from featcache.cache.store import Row, create_store, open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge, response_files
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import ImageFiles, Subject
from featcache.errors import ConfigError, StoreError
from heads.backbones.stages import train_stage
from heads.config import AdamWConfig, FitConfig, RidgeConfig, SpatialConfig, StageConfig, TrainConfig
from heads.features.rows import LayerRows
from heads.fit.run import FOLDER as PREDICTIONS
from heads.fit.run import WEIGHTS, _save_weights, fit_heads
from heads.maps.maps import FOLDER, VertexMaps, export_maps, read_maps, recovery
from heads.modules.spatial import SpatialReadout
from heads.solvers.base import cross_validate
from heads.solvers.layers.kernels import LayerKernels
from heads.solvers.layers.priors import DEPTHS, depths_of, prior_set
from heads.solvers.layers.ridge import DualFolds
from heads.solvers.spatial import Member, SpatialFolds

SHAPES = {"near": (4, 4, 6), "far": (3, 3, 8), "pooled": (5,)}
PLANTED = {"lh": ("near", (1, 2)), "rh": ("far", (2, 0))}  # the layer and the place that a hemisphere looks at
N_TRAIN, N_TEST, N_FOLDS = 240, 10, 3
N_VERTICES = {"lh": 6, "rh": 4}
SIDE = 7


@pytest.fixture
def said(said, monkeypatch):
    monkeypatch.setattr("heads.maps.maps.say", said.append)
    return said


# --- from heads to maps


def create(folder, key, ids, arrays, facts=None):
    """A whole store of arrays."""
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in arrays.items()}
    number = len(list(folder.iterdir())) if folder.is_dir() else 0
    store = create_store(folder, f"s{number}", {"number": number} | key, ids, N_TRAIN, rows, facts or {})
    store.append(arrays)
    return store


def planted_subject(folder, values, noise=0.5):
    rng = np.random.default_rng(1)
    ids = rng.permutation(73_000)[:N_TRAIN]
    splits = [ImageFiles(tuple(folder / str(i) for i in own), own) for own in (ids, 80_000 + np.arange(N_TEST))]
    rois = {
        h: {"V1v": np.arange(n) < 2, "FFA": np.arange(n) == n - 1, "nothing": np.zeros(n, bool)}
        for h, n in N_VERTICES.items()
    }
    rois["rh"].pop("FFA")
    nothing = dict.fromkeys(HEMISPHERES)
    subject = Subject("subj01", *splits, response_files(folder / "subj01"), N_VERTICES, rois, nothing, nothing)
    for h, (layer, (i, j)) in PLANTED.items():
        seen = values[layer][:N_TRAIN, i, j].astype(np.float64)
        signal = seen @ rng.normal(size=(seen.shape[1], N_VERTICES[h]))
        path = subject.response_paths[h]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, (signal / signal.std(0) + noise * rng.normal(size=signal.shape)).astype(np.float32))
    return subject


def adamw_predictor(subject, rows, **spatial):
    adamw = AdamWConfig(learning_rate=6e-2, weight_decay=0.05, epochs=25, batch_size=32, patience=25)
    settings = SpatialConfig(token_dropout=0.1, smoothness=0.0, **spatial)
    config = FitConfig(loss="mse", head="spatial", solver="adamw", n_folds=N_FOLDS, adamw=adamw, spatial=settings)
    folds = assign_folds(subject.train.ids, N_FOLDS, 0)
    return SpatialFolds([Member(subject, [rows], folds, list(range(N_FOLDS)), False)], config, "cpu").of(0)


def exact_predictor(subject, rows, step=1):
    folds, priors = assign_folds(subject.train.ids, N_FOLDS, 0), prior_set(rows.grids, DEPTHS)[::step]
    kernels = [LayerKernels(rows, N_TRAIN, 1e9)]
    config = RidgeConfig(penalties=(0.01, 0.1, 1.0))
    return DualFolds(kernels, folds, list(range(N_FOLDS)), subject.train.ids, config, priors, False, 1e9)


def few_priors(subject, rows):
    return exact_predictor(subject, rows, 40)


MAKERS = {
    "exact": exact_predictor,
    "spatial": adamw_predictor,
    "rank 2": lambda *about: adamw_predictor(*about, rank=2),
    "space": lambda *about: adamw_predictor(*about, space=10),
}


def fitted(work, maker, model="planted"):
    """A subject, and its prediction store and weights as fit-heads leaves them."""
    rng = np.random.default_rng(0)
    values = {
        name: (2 * rng.normal(size=(N_TRAIN + N_TEST, *shape)) + rng.normal(size=shape[-1])).astype(
            np.float16 if len(shape) > 1 else np.float32
        )
        for name, shape in SHAPES.items()
    }
    subject = planted_subject(work / "tree", values)
    features = create(work / FEATURES, {"subject": "subj01"}, subject.image_ids, values)
    predictor = maker(subject, LayerRows(features, tuple(SHAPES), "cpu", np.inf))
    arrays, tensors = {}, {}
    for h in HEMISPHERES:
        arrays[h], saved = cross_validate(predictor, subject, h, lambda _: None)
        tensors |= {f"{prefix}{h}.{part}": value for (prefix, part), value in saved.items()}
    key = {"subject": "subj01", "features": {"fold": None}}
    store = create(work / PREDICTIONS, key, subject.image_ids, arrays, {"model": model, "features": features.name})
    _save_weights(tensors, work / WEIGHTS / f"{store.name}.safetensors", store)
    return subject, store


@pytest.fixture(scope="module")
def spatial(tmp_path_factory):
    work = tmp_path_factory.mktemp("spatial")
    return work, *fitted(work, adamw_predictor)


def layers_at(maps, hemisphere):
    layer, (i, j) = PLANTED[hemisphere]
    return maps[hemisphere], layer, i * SHAPES[layer][1] + j


@pytest.mark.parametrize("maker", MAKERS)
def test_maps_peak_at_the_planted_place_of_the_planted_layer(tmp_path, maker):
    _, store = fitted(tmp_path, MAKERS[maker])
    maps = read_maps(store, tmp_path)
    for hemisphere in HEMISPHERES:
        own, layer, place = layers_at(maps, hemisphere)
        assert own.layers == tuple(SHAPES) and set(own.places) == {"near", "far"}
        flat = own.places[layer].reshape(N_VERTICES[hemisphere], -1)
        assert (flat.argmax(1) == place).all() and (flat.max(1) > 2 / flat.shape[1]).all()
        # a vector of a few features is hardly penalised: its weights on noise are no smaller than those of a map
        assert (own.shares[:, :2].argmax(1) == own.layers.index(layer)).mean() > 0.8
        (y, x), side = PLANTED[hemisphere][1], SHAPES[layer][0]
        centres = own.fields()[:, :2]
        # what a penalty spreads over other places draws centres to the middle, and never past it
        planted = (np.array([x, y]) + 0.5) / side
        assert (np.sign(centres.mean(0) - 0.5) == np.sign(planted - 0.5))[planted != 0.5].all()


@pytest.mark.parametrize("maker", ["exact", "spatial"])
def test_maps_and_shares_sum_to_1(tmp_path, maker):
    _, store = fitted(tmp_path, MAKERS[maker])
    for own in read_maps(store, tmp_path).values():
        for name, values in own.places.items():
            assert (values >= 0).all() and values.shape[1:] == SHAPES[name][:2]
            np.testing.assert_allclose(values.sum((1, 2)), 1, rtol=1e-4)
        np.testing.assert_allclose(own.shares.sum(1), 1, rtol=1e-4)
        np.testing.assert_allclose(own.together().sum((1, 2)), 1, rtol=1e-4)


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


def crafted(work, heads, n_channels=4, grids=None, prefix="fold0."):
    """A store whose heads, one module a hemisphere, were made by hand."""
    shapes = {name: (*grid, n_channels) for name, grid in (grids or {"near": (3, 3), "far": (2, 2)}).items()}
    rng = np.random.default_rng(0)
    values = {name: rng.normal(size=(N_TRAIN + N_TEST, *shape)).astype(np.float16) for name, shape in shapes.items()}
    ids = np.arange(N_TRAIN + N_TEST)
    features = create(work / FEATURES, {"subject": "subj01"}, ids, values)
    key = {"subject": "subj01", "features": {"fold": None}}
    arrays = {h: np.zeros((len(ids), 3), np.float32) for h in HEMISPHERES}
    store = create(work / PREDICTIONS, key, ids, arrays, {"model": "crafted", "features": features.name})
    tensors = {}
    for h in HEMISPHERES:
        for k, head in enumerate(heads(shapes)):
            tensors |= {f"fold{k}.{h}.head.{key}": value.contiguous() for key, value in head.state_dict().items()}
    (work / WEIGHTS).mkdir()
    save_file(tensors, work / WEIGHTS / f"{store.name}.safetensors")
    return store, shapes


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

    store, shapes = crafted(tmp_path, heads)
    weights = weights_at(made[0], statistics_of(shapes))
    sizes = {name: np.sqrt(np.square(one).sum(2)) for name, one in weights.items()}
    whole = np.stack([np.sqrt(np.square(one).sum((1, 2))) for one in weights.values()], 1)
    for own in read_maps(store, tmp_path).values():
        for name, shape in shapes.items():
            expected = sizes[name] / sizes[name].sum(1, keepdims=True)
            np.testing.assert_allclose(own.places[name].reshape(3, -1), expected, rtol=1e-2, atol=1e-4)
            assert own.places[name].shape == (3, *shape[:2])
        np.testing.assert_allclose(own.shares, whole / whole.sum(1, keepdims=True), rtol=1e-2, atol=1e-3)
        np.testing.assert_allclose(own.shares, made[0].maps()[1], rtol=1e-2, atol=1e-3)


def test_a_vertex_has_the_maps_of_the_outputs_of_the_space_that_it_uses(tmp_path):
    uses = torch.tensor([[2.0, 0, 0, 0, 0], [0, -3, 0, 0, 0], [0, 0, 0, 0, 0.1]])
    made = []

    def heads(shapes):
        linear = torch.nn.Linear(5, 3)
        with torch.no_grad():
            linear.weight.copy_(uses)
        made[:] = [some_readout(shapes, 5, 1)]
        return [torch.nn.Sequential(made[0], linear)]

    store, _ = crafted(tmp_path, heads)
    where, shares = made[0].maps()
    for own in read_maps(store, tmp_path).values():
        for name, values in own.places.items():
            np.testing.assert_allclose(values, where[name][[0, 1, 4]], rtol=1e-3, atol=1e-5)
        np.testing.assert_allclose(own.shares, shares[[0, 1, 4]], rtol=1e-3, atol=1e-5)


def test_folds_count_alike(tmp_path):
    made = []

    def heads(shapes):
        made[:] = [some_readout(shapes, 3, 1, seed) for seed in range(2)]
        return [torch.nn.Sequential(one) for one in made]

    store, _ = crafted(tmp_path, heads)
    found = read_maps(store, tmp_path)["lh"].shares
    both = np.stack([one.maps()[1].numpy() for one in made])
    assert (found >= both.min(0) - 0.05).all() and (found <= both.max(0) + 0.05).all()


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
def test_a_weights_file_that_is_not_whole_is_one_line_that_names_it(tmp_path, said, damage, found):
    subject, store = fitted(tmp_path, few_priors)
    path = tmp_path / WEIGHTS / f"{store.name}.safetensors"
    damage(path)
    with pytest.raises(StoreError) as error:
        export_maps([subject], "*", tmp_path)
    message = str(error.value)
    assert message.startswith(f"{path}: expected ") and found in message and "run 'fit-heads' again" in message
    assert "\n" not in message


def test_weights_that_were_too_large_to_keep_are_left_out_and_named(tmp_path, said):
    subject, store = fitted(tmp_path, few_priors)
    _save_weights({}, tmp_path / WEIGHTS / f"{store.name}.safetensors", store)
    assert export_maps([subject], "*", tmp_path) == ([], [])
    assert any("left out planted" in line for line in said)


def test_sizes_of_closed_form_heads_are_those_of_weights_on_channels_of_unit_variance(tmp_path):
    _, store = fitted(tmp_path, few_priors)
    saved = load_file(tmp_path / WEIGHTS / f"{store.name}.safetensors")
    features = open_store(tmp_path / FEATURES / store.facts["features"])
    for hemisphere, own in read_maps(store, tmp_path).items():
        whole = []
        for name, shape in SHAPES.items():
            x = features.read(name, 0, N_TRAIN).astype(np.float64).reshape(N_TRAIN, -1, shape[-1])
            unit = np.sqrt(x.var(0).mean(0))
            w = saved[f"{hemisphere}.{name}.weights"].numpy().reshape(*x.shape[1:], -1) * unit[None, :, None]
            sizes = np.sqrt(np.square(w).sum(1)).T
            whole.append(np.sqrt(np.square(sizes).sum(1)))
            if len(shape) > 1:
                expected = (sizes / sizes.sum(1, keepdims=True)).reshape(-1, *shape[:2])
                np.testing.assert_allclose(own.places[name], expected, rtol=1e-3)
        np.testing.assert_allclose(own.shares, np.stack(whole, 1) / np.sum(whole, 0)[:, None], rtol=1e-3)


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


def test_depth_is_the_mean_of_the_layers_by_their_shares():
    layers = ("a", "b", "b.cls", "c", "pooled")
    shares = np.random.default_rng(0).dirichlet(np.ones(5), 4)
    found = VertexMaps(layers, {}, shares).depth()
    assert depths_of(layers) == {"a": 0, "b": 0.5, "b.cls": 0.5, "c": 1, "pooled": 1}
    np.testing.assert_allclose(found, shares @ [0, 0.5, 0.5, 1, 1])


# --- what was planted in a simulated tree


def truth_maps(truth, noise=0.0, seed=0):
    """Maps as perfect heads would have them: a blob at the planted centre, in the layer of the planted level."""
    rng = np.random.default_rng(seed)
    at = (np.arange(14) + 0.5) / 14
    x, y, size = (truth[name] for name in ("field_x", "field_y", "field_size"))
    squared = (at - x[:, None]) ** 2
    blob = np.exp(-(squared[:, None] + (at - y[:, None])[:, :, None] ** 2) / (4 * size[:, None, None] ** 2))
    blob = blob + noise * rng.random(blob.shape)
    blob /= blob.sum((1, 2), keepdims=True)
    level = np.array([{"early": 0, "mid": 1, "late": 2}.get(str(one), 1) for one in truth["level"]])
    return VertexMaps(("a", "b", "c"), dict.fromkeys(("a", "b", "c"), blob.astype(np.float32)), np.eye(3)[level])


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def truths_of(root, name="subj01"):
    return {h: arrays_of(root / "truth" / name / f"{h}.npz") for h in HEMISPHERES}


def test_maps_made_from_the_truth_recover_it(tiny):
    for subject in open_challenge(tiny).subjects:
        truths = truths_of(tiny, subject.name)
        found = recovery(subject, {h: truth_maps(truth) for h, truth in truths.items()})
        assert set(found) == {"x", "y", "size", "level"}
        assert min(found["x"], found["y"], found["level"]) > 0.97 and found["size"] > 0.9


def test_recovery_is_over_vertices_with_a_signal_and_a_level(tiny):
    (subject,) = open_challenge(tiny).select("1")
    truths = truths_of(tiny)
    maps = {h: truth_maps(truth, 0.5) for h, truth in truths.items()}
    planted, found = {"x": [], "y": [], "size": [], "level": []}, {"x": [], "y": [], "size": [], "level": []}
    for h, truth in truths.items():
        fields, depth = maps[h].fields(), maps[h].depth()
        for v in range(len(depth)):
            level = str(truth["level"][v])
            if truth["ceiling"][v] < 0.2 or level not in ("early", "mid", "late"):
                continue
            planted["level"].append(("early", "mid", "late").index(level))
            found["level"].append(depth[v])
            if level != "late":
                for k, name in enumerate(("x", "y", "size")):
                    planted[name].append(truth[f"field_{name}"][v])
                    found[name].append(fields[v, k])
    expected = {name: np.corrcoef(planted[name], found[name])[0, 1] for name in ("x", "y", "size")}
    expected["level"] = spearmanr(planted["level"], found["level"]).statistic
    assert recovery(subject, maps) == pytest.approx(expected)


def test_without_a_truth_there_is_nothing_to_recover(tree):
    import shutil

    (subject,) = open_challenge(tree).select("1")
    truths = truths_of(tree)
    maps = {h: truth_maps(truth) for h, truth in truths.items()}
    shutil.rmtree(tree / "truth")
    assert recovery(subject, maps) == {}


# --- files


def exported(work, subject, pattern="*"):
    written, recovered = export_maps([subject], pattern, work)
    assert all(path.is_file() for path in written) and recovered == []
    return {path.suffix: path for path in written}


def test_files_hold_the_maps_of_every_vertex_and_of_every_roi_with_vertices(spatial, said):
    work, subject, store = spatial
    files = exported(work, subject)
    assert {path.name for path in files.values()} >= {f"{store.name}.npz", f"{store.name}.csv"}
    assert all(path.parent == work / FOLDER for path in files.values())
    maps, saved = read_maps(store, work), arrays_of(files[".npz"])
    assert saved["layers"].tolist() == list(SHAPES)
    for h, own in maps.items():
        for name, values in own.places.items():
            np.testing.assert_array_equal(saved[f"{h}/{name}"], values)
        np.testing.assert_array_equal(saved[f"{h}/layer_shares"], own.shares)
        np.testing.assert_array_equal(saved[f"{h}/fields"], own.fields())
    table = list(csv.DictReader(files[".csv"].open()))
    assert [row["roi"] for row in table] == ["all", "V1v", "FFA"]
    assert [int(row["vertices"]) for row in table] == [10, 4, 1]
    for row in table:
        assert sum(float(row[f"share {name}"]) for name in SHAPES) == pytest.approx(1, abs=1e-3)


def test_roi_means_are_weighed_by_squared_r(spatial, said):
    from heads.fit.run import score

    work, subject, store = spatial
    table = {row["roi"]: row for row in csv.DictReader(exported(work, subject)[".csv"].open())}
    maps = read_maps(store, work)
    for roi in ("all", "V1v", "FFA"):
        total, shares, field = 0.0, np.zeros(3), np.zeros(3)
        for h in HEMISPHERES:
            r, fields = score(subject, h, store).r, maps[h].fields()
            for v in range(N_VERTICES[h]):
                if roi != "all" and not subject.rois[h].get(roi, np.zeros(9))[v]:
                    continue
                weight = max(r[v], 0) ** 2
                total += weight
                shares += weight * maps[h].shares[v]
                field += weight * fields[v]
        found = [float(table[roi][f"share {name}"]) for name in SHAPES]
        np.testing.assert_allclose(found, shares / total, atol=1e-4)
        np.testing.assert_allclose([float(table[roi][k]) for k in ("x", "y", "size")], field / total, atol=1e-4)


def test_pictures_are_drawn_where_matplotlib_is(spatial, said):
    if find_spec("matplotlib") is None:
        pytest.skip("no matplotlib")
    work, subject, store = spatial
    path = exported(work, subject)[".png"]
    assert path.name == f"{store.name}.png" and path.read_bytes()[:4] == b"\x89PNG"


def test_without_matplotlib_tables_are_written_and_it_is_said(spatial, said, monkeypatch):
    monkeypatch.setattr("heads.maps.maps.find_spec", lambda _: None)
    work, subject, _ = spatial
    assert set(exported(work, subject)) == {".npz", ".csv"}
    assert [line for line in said if "matplotlib" in line] == ["no pictures: they need matplotlib, of the plot extra"]


def test_a_pattern_that_matches_no_model_is_one_line_with_those_there_are(spatial, said):
    work, subject, _ = spatial
    with pytest.raises(ConfigError, match=r"--models: expected .* one of: planted; found 'linear\*'") as error:
        export_maps([subject], "linear*", work)
    assert "\n" not in str(error.value)


def test_only_models_that_match_are_written(tmp_path, said, monkeypatch):
    monkeypatch.setattr("heads.maps.maps.find_spec", lambda _: None)
    subject, first = fitted(tmp_path, few_priors, "one [a]")
    _, second = fitted(tmp_path, few_priors, "two")
    assert {path.stem for path in exported(tmp_path, subject, "t*o").values()} == {second.name}
    assert {path.stem for path in exported(tmp_path, subject, "*").values()} <= {first.name, second.name}


def test_nothing_fitted_is_one_line(tmp_path, said):
    subject = planted_subject(tmp_path, {name: np.ones((N_TRAIN, *shape)) for name, shape in SHAPES.items()})
    with pytest.raises(StoreError, match="expected fitted heads; found none; run 'fit-heads' first"):
        export_maps([subject], "*", tmp_path)


def test_a_model_that_predicts_nothing_breaks_nothing(tmp_path, said):
    """ROI means are weighed by squared r, of which there is none."""
    subject, store = fitted(tmp_path, few_priors)
    for h in HEMISPHERES:
        store.arrays[h][:] = 0
    files, _ = export_maps([subject], "*", tmp_path)
    assert tmp_path / FOLDER / f"{store.name}.npz" in files


# --- what fit-heads writes


BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=64)
ADAMW = AdamWConfig(learning_rate=1e-2, epochs=2, batch_size=8)
SPATIAL = FitConfig(loss="mse", head="spatial", solver="adamw", n_folds=2, adamw=ADAMW)


def test_every_model_of_a_tree_has_maps_or_is_named(tiny, tmp_path, said, monkeypatch):
    monkeypatch.setattr("heads.maps.maps.find_spec", lambda _: None)
    subjects = open_challenge(tiny).subjects[:1]
    for layers in (("pooled",), ("layer1", "layer2", "pooled")):
        extract(subjects, ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers=layers), workers=1), tmp_path)
    exact = fit_heads(subjects, FitConfig(loss="mse", n_folds=2), tmp_path)
    spatial = fit_heads(subjects, SPATIAL, tmp_path)
    one = fit_heads(subjects, replace(SPATIAL, layers="layer2"), tmp_path)
    written, recovered = export_maps(subjects, "*", tmp_path)
    pooled = {f.path.name for f in [*exact, *spatial, *one] if " pooled " in f.model and "layer" not in f.model}
    placed = {f.path.name for f in [*exact, *spatial, *one]} - pooled
    assert len(placed) == 3 and {path.stem for path in written if path.suffix == ".csv"} == placed
    assert len(recovered) == 3 and all({"x", "y", "size"} <= set(found) for found in recovered)
    assert all(np.isfinite(value) for found in recovered for value in found.values())  # one layer has no depth
    left = [line for line in said if "no weights on places" in line]
    assert len(left) == len(pooled) == 2
    for path in written:
        if path.suffix == ".npz":
            saved = arrays_of(path)
            assert all(np.isfinite(saved[key]).all() for key in saved if key != "layers")


def test_heads_of_a_checkpoint_have_maps_among_more_layers_than_they_read(tiny, tmp_path, said):
    subjects, small = open_challenge(tiny).subjects[:1], BackboneConfig(name="test_resnet", weights="none", size=32)
    train = TrainConfig(head="spatial", epochs=1, batch_size=4, stop="never", layers="layer1,pooled", grid="2")
    stage = StageConfig(stage="finetune", train=train, backbone=small, init="none", n_folds=2, device="cpu", workers=1)
    train_stage(subjects, stage, tmp_path)
    layers = LayerConfig(layers=("layer1", "layer2", "pooled"), grid="2")
    extract(subjects, ExtractConfig(backbone=small, layers=layers, checkpoint="auto", workers=1), tmp_path)
    (one,) = fit_heads(subjects, FitConfig(solver="trained"), tmp_path)
    maps = read_maps(open_store(one.path), tmp_path)
    for own in maps.values():
        assert set(own.places) == {"layer1"} and "layer1" in own.layers
        np.testing.assert_allclose(own.shares.sum(1), 1, rtol=1e-4)
