"""Files of maps hold what was read, means are weighed, and what has no maps is left out and named."""

import csv
import shutil
from dataclasses import replace
from itertools import chain

import numpy as np
import pytest
from PIL import Image
from safetensors.torch import save_file

from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError, StoreError
from featcache.workdir import Workdir
from heads.config import AdamWConfig, FitConfig
from heads.fit.run import fit_heads, score
from heads.maps.export import export_maps
from heads.maps.read import read_maps
from support.planted import N_VERTICES, SHAPES

SURFACES = tuple(N_VERTICES)


@pytest.fixture
def planted(fitted, tmp_path):
    """A copy of a work folder with one model of all layers, its subject and the model."""
    work, subject, (model,) = fitted("few priors")
    return shutil.copytree(work, tmp_path / "work"), subject, model


@pytest.fixture
def unplotted(monkeypatch):
    monkeypatch.setattr("heads.blend.plot.find_spec", lambda _: None)


def arrays_of(path):
    with np.load(path) as file:
        return dict(file)


def table_of(path):
    return list(csv.DictReader(path.read_text().splitlines()))


def exported(work, subject, pattern="*"):
    written = export_maps([subject], pattern, work)
    assert all(path.is_file() and path.parent == Workdir(work).maps for path in written)
    return {path.suffix: path for path in written}


@pytest.mark.slow
def test_files_hold_the_maps_of_every_vertex_and_of_every_roi_with_vertices(planted, said):
    work, subject, model = planted
    files = exported(work, subject)
    assert {path.name for path in files.values()} >= {f"{model.store.name}.npz", f"{model.store.name}.csv"}
    maps, saved = read_maps(model, work), arrays_of(files[".npz"])
    assert saved["layers"].tolist() == list(SHAPES)
    for surface, of_surface in maps.items():
        for name, values in of_surface.places.items():
            np.testing.assert_array_equal(saved[f"{surface}/{name}"], values)
        np.testing.assert_array_equal(saved[f"{surface}/layer_shares"], of_surface.shares)
        # in coordinates of the image, of which the network saw 0.1 to 0.9
        seen = of_surface.fields() * 0.8 + [0.1, 0.1, 0]
        np.testing.assert_allclose(saved[f"{surface}/fields"], seen, rtol=1e-5)
    np.testing.assert_allclose(saved["extent"], [0.1, 0.1, 0.9, 0.9])
    table = table_of(files[".csv"])
    assert [row["roi"] for row in table] == ["all", "V1v", "FFA", "right"]
    assert [int(row["vertices"]) for row in table] == [10, 4, 1, 1]
    for row in table:
        assert sum(float(row[f"share {name}"]) for name in SHAPES) == pytest.approx(1, abs=1e-3)


def test_roi_means_are_weighed_by_squared_r(planted, said, unplotted):
    work, subject, model = planted
    table = {row["roi"]: row for row in table_of(exported(work, subject)[".csv"])}
    maps = read_maps(model, work)
    for roi in ("all", "V1v", "FFA"):
        total, shares, field = 0.0, np.zeros(3), np.zeros(3)
        for surface in SURFACES:
            r, fields = score(subject, surface, model.store).r, maps[surface].fields() * 0.8 + [0.1, 0.1, 0]
            for v in range(N_VERTICES[surface]):
                if roi != "all" and not subject.rois[surface].get(roi, np.zeros(9))[v]:
                    continue
                weight = max(r[v], 0) ** 2
                total += weight
                shares += weight * maps[surface].shares[v]
                field += weight * fields[v]
        found = [float(table[roi][f"share {name}"]) for name in SHAPES]
        np.testing.assert_allclose(found, shares / total, atol=1e-4)
        np.testing.assert_allclose([float(table[roi][k]) for k in ("x", "y", "size")], field / total, atol=1e-4)


def test_images_of_several_shapes_are_said_and_most_of_them_count(planted, said, unplotted, tmp_path):
    work, subject, _ = planted
    paths = list(subject.train.sources)
    for number in range(100):
        paths[number] = tmp_path / f"{number}.png"
        Image.new("RGB", (8, 4) if number % 4 else (4, 4)).save(paths[number])
    others = replace(subject, train=replace(subject.train, sources=tuple(paths)))
    np.testing.assert_allclose(arrays_of(exported(work, others)[".npz"])["extent"], [0.1, 0.1, 0.9, 0.9])
    assert any("several shapes; maps are in coordinates of 165 of 240" in line for line in said)
    wide = replace(subject, train=replace(subject.train, sources=(paths[1],) * len(paths)))
    np.testing.assert_allclose(arrays_of(exported(work, wide)[".npz"])["extent"], [0.3, 0.1, 0.7, 0.9])


def test_without_matplotlib_tables_are_written_and_it_is_said(planted, said, unplotted):
    work, subject, _ = planted
    assert set(exported(work, subject)) == {".npz", ".csv"}
    (line,) = [line for line in said if "matplotlib" in line]
    assert line.startswith("no picture of maps: matplotlib is not installed")


def test_a_pattern_that_matches_no_model_is_one_line_with_those_there_are(planted, said):
    work, subject, model = planted
    with pytest.raises(ConfigError, match=r"--models: expected .* one of .*; found 'convnext.*'") as error:
        export_maps([subject], "convnext*", work)
    assert model.name in str(error.value) and "\n" not in str(error.value)


@pytest.mark.slow
def test_only_models_that_match_are_written(fitted, tmp_path, said, unplotted):
    work, subject, (joint, near) = fitted("few priors", "few priors, near")
    copy = shutil.copytree(work, tmp_path / "work")
    assert {path.stem for path in export_maps([subject], "* near *", copy)} == {near.store.name}
    assert {path.stem for path in export_maps([subject], "*", copy)} == {joint.store.name, near.store.name}


def test_nothing_fitted_is_one_line(planted, said, tmp_path):
    _, subject, _ = planted
    with pytest.raises(StoreError, match="expected fitted heads; found none; run 'fit-heads' first"):
        export_maps([subject], "*", tmp_path / "empty")


def test_weights_that_were_too_large_to_keep_are_left_out_and_named(planted, said):
    work, subject, model = planted
    save_file({}, Workdir(work).head_weights(model.store.name), {"predictions": model.store.name})
    assert export_maps([subject], "*", work) == []
    assert any(f"left out {model.name}" in line for line in said)


def test_a_model_that_predicts_nothing_breaks_nothing(planted, said):
    """ROI means are weighed by squared r, of which there is none."""
    work, subject, model = planted
    store = open_store(Workdir(work).predictions / model.store.name)
    for surface in SURFACES:
        store.commit({surface: 0})
        store.append({surface: np.zeros(store.arrays[surface].shape, store.arrays[surface].dtype)})
    assert set(exported(work, subject)) == {".npz"}
    assert any("it predicts no vertex" in line for line in said)


BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=64)
ADAMW = AdamWConfig(learning_rate=1e-2, epochs=2, batch_size=8)
SPATIAL = FitConfig(loss="mse", head="spatial", solver="adamw", n_folds=2, adamw=ADAMW)


def test_every_model_of_a_tree_has_maps_or_is_named(tiny, tmp_path, said, unplotted):
    subjects = open_challenge(tiny).subjects[:1]
    for layers in (("pooled",), ("layer1", "layer2", "pooled")):
        extract(subjects, ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers=layers), workers=1), tmp_path)
    configs = (FitConfig(loss="mse", n_folds=2), SPATIAL, replace(SPATIAL, layers="layer2"))
    fits = list(chain.from_iterable(fit_heads(subjects, config, tmp_path) for config in configs))
    written = export_maps(subjects, "*", tmp_path)
    pooled = {fit.path.name for fit in fits if " pooled " in fit.model and "layer" not in fit.model}
    placed = {fit.path.name for fit in fits} - pooled
    assert len(placed) == 3 and {path.stem for path in written if path.suffix == ".csv"} == placed
    assert len([line for line in said if "no weights on places" in line]) == len(pooled) == 2
    for path in written:
        if path.suffix == ".npz":
            saved = arrays_of(path)
            assert all(np.isfinite(saved[key]).all() for key in saved if key != "layers")
