"""Keys and names of earlier versions stay what they are, and everything that decides a model is in its name."""

import hashlib
import json
from copy import deepcopy

import numpy as np
import pytest

from featcache.dataset.algonauts import open_challenge
from heads.config import FitConfig, SpatialConfig
from heads.fit.names import PredictionFacts, PredictionKey, prediction_key
from heads.solvers.held_out import FoldPlan
from heads.solvers.layers.ridge import METHOD
from support.problems import LAYERS, VECTOR, features_of, planted_responses, responding

# Keys as stores on disk have them. Digests of what belongs to a subject are cut short: no name depends on them.
FEATURES = """{
    "layers": ["pooled", "layer2", "layer4"], "grids": {"layer2": [4, 4], "layer4": [1, 1]}, "pool": "avg",
    "kind": "features", "subject": "subj01", "images": "51d9", "image_ids": "fd80", "backbone": "test_resnet",
    "weights": "6eb14fc19382e324721b848294d990f6", "timm": "1.0.31",
    "transform": {"input_size": [3, 32, 32], "interpolation": "bilinear", "mean": [0.5, 0.5, 0.5],
                  "std": [0.5, 0.5, 0.5], "crop_pct": 0.95, "crop_mode": "center"},
    "dtype": "float32", "fold": null, "batch_norm": "folded"%s}"""
POOLED, MAPS = FEATURES % ', "read": ["pooled"]', FEATURES % ', "read": ["layer2", "layer4"]'
THREE_FOLDS = (
    POOLED.replace('"6eb14fc19382e324721b848294d990f6"', '["4728", "0d84", "0423"]')
    .replace('"fold": null', '"fold": {"stage": "finetune", "training": "7fa2f52805b6", "n_folds": 3, "seed": 0, %s}')
    .replace("%s", '"held_out": [0, 1, 2]')
)
ADAMW = (
    '"learning_rate": 0.0003, "weight_decay": 0.1, "epochs": %d, "batch_size": 128, "patience": 10, "validation": 10'
)
SPATIAL = """"head": "spatial", "n_folds": 5, "seed": 0, "solver": "adamw", "objective": "mnnpc",
    "settings": {"learning_rate": 0.0001, "weight_decay": 0.1, "epochs": 2, "batch_size": 32, "patience": 10,
                 "validation": 10, "rank": 4, "space": 6, "token_dropout": 0.3, "smoothness": 0.1, "sparsity": 0.0}"""
OTHER = MAPS.replace("subj01", "subj02").replace("51d9", "ff38").replace("fd80", "ccac")
STORES = {
    "test_resnet@32 3 layers 4x4/1x1 linear ridge eca8bf": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {FEATURES % ""}, "responses": "b194",
        "kernels": {{"blur": 0.75, "centres": [0.1, 0.3, 0.5, 0.7, 0.9], "widths": [0.16, 0.08], "narrow": 1000,
            "depths": [null, 0.0, 0.5, 1.0], "depth_width": 0.25, "sharpness": 0.125,
            "penalties": [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0, 100.0, 1000.0, 10000.0], "landmarks": 2048,
            "search": [1024, 512, 2048, 8]}},
        "head": "linear", "n_folds": 5, "seed": 0, "solver": "exact", "objective": "ridge",
        "settings": {{"penalties": [0.0001, 0.0002154, 0.0004642, 0.001, 0.002154, 0.004642, 0.01, 0.02154, 0.04642,
            0.1, 0.2154, 0.4642, 1.0, 2.154, 4.642, 10.0, 21.54, 46.42, 100.0, 215.4, 464.2, 1000.0, 2154.0, 4642.0,
            10000.0], "selection": "auto"}}}}""",
    "test_resnet@32 pooled roi smooth_l1+0.5*mnnpc epochs 2 428360": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {POOLED}, "responses": "b194",
        "noise_ceiling": {{"lh": "8eca", "rh": "f8f0"}}, "rois": {{"lh": {{"V1v": "eeb0"}}, "rh": {{"V1v": "dd0f"}}}},
        "head": "roi", "n_folds": 5, "seed": 0, "solver": "adamw", "objective": "smooth_l1+0.5*mnnpc",
        "settings": {{{ADAMW % 2}}}}}""",
    "test_resnet@32 pooled linear smooth_l1 epochs 3 d53112": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {POOLED}, "responses": "b194",
        "noise_ceiling": {{"lh": "8eca", "rh": "f8f0"}}, "head": "linear", "n_folds": 5, "seed": 0, "solver": "adamw",
        "objective": "smooth_l1", "settings": {{{ADAMW % 3}}}}}""",
    "test_resnet@32 pooled linear moments mnnpc steps 12 67031d": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {POOLED}, "responses": "b194",
        "noise_ceiling": {{"lh": "8eca", "rh": "f8f0"}}, "head": "linear", "n_folds": 5, "seed": 0,
        "solver": "moments", "objective": "mnnpc",
        "settings": {{"steps": 12, "learning_rate": 0.25, "momentum": 0.9}}}}""",
    "test_resnet@32 layer2+layer4 4x4/1x1 spatial mnnpc epochs 2 space 6 a8e00a": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {MAPS}, "responses": "b194",
        "noise_ceiling": {{"lh": "8eca", "rh": "f8f0"}}, {SPATIAL},
        "joint": {{"subj02": {{"kind": "predictions", "subject": "subj02", "features": {OTHER}, "responses": "5b6b",
            "noise_ceiling": {{"lh": "2217", "rh": "88b8"}}, {SPATIAL}}}}}}}""",
    "test_resnet@32 finetune pooled trained d3a07b": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {THREE_FOLDS}, "responses": "b194",
        "head": "trained", "solver": "trained", "objective": "trained"}}""",
    "test_resnet@32 finetune pooled linear smooth_l1 folds 3 epochs 2 48e6d7": f"""{{
        "kind": "predictions", "subject": "subj01", "features": {THREE_FOLDS}, "responses": "b194",
        "noise_ceiling": {{"lh": "8eca", "rh": "f8f0"}}, "head": "linear", "n_folds": 3, "seed": 0, "solver": "adamw",
        "objective": "smooth_l1", "settings": {{{ADAMW % 2}}}}}""",
}
KEYS = {name: json.loads(text) for name, text in STORES.items()}
RIDGE, ROI, ADAMW_KEY, MOMENTS, JOINT, TRAINED, TRAINED_ADAMW = KEYS.values()
OF_A_SUBJECT = ("subject", "images", "image_ids", "responses", "noise_ceiling", "rois", "joint")

each_store = pytest.mark.parametrize(("name", "key"), KEYS.items(), ids=list(KEYS))


def name_of(key):
    return PredictionKey.from_json(key).model


def digits_of(key):
    """The six digits of a model, without the code under test."""
    left_out = (*OF_A_SUBJECT, *(["weights"] if key["features"]["fold"] else []))
    model = {name: value for name, value in key.items() if name not in OF_A_SUBJECT}
    model["features"] = {name: value for name, value in key["features"].items() if name not in left_out}
    return hashlib.sha256(json.dumps(model, sort_keys=True, separators=(",", ":")).encode()).hexdigest()[:6]


@each_store
def test_a_key_is_written_as_it_was_read_in_its_order(name, key):
    assert json.dumps(PredictionKey.from_json(key).to_json()) == json.dumps(key)


@each_store
def test_a_store_of_an_earlier_version_has_the_name_that_it_had(name, key):
    assert name_of(key) == name
    assert name.rpartition(" ")[2] == digits_of(key)


@each_store
def test_two_subjects_of_one_model_have_one_name(name, key):
    other = json.loads(json.dumps(key).replace("subj01", "subj07").replace("51d9", "a").replace("b194", "b"))
    other |= {part: {"lh": "c", "rh": "d"} for part in ("noise_ceiling", "rois") if part in key}
    other["features"]["image_ids"] = "e"
    if key["features"]["fold"]:  # a backbone of each subject
        other["features"]["weights"] = ["x", "y", "z"]
    assert other != key and name_of(other) == name


def leaves(value, path=()):
    """Path of every number and text in a key, but for those of a subject."""
    if isinstance(value, dict):
        for name, inner in value.items():
            if name not in OF_A_SUBJECT and (*path, name) != ("features", "weights"):
                yield from leaves(inner, (*path, name))
    elif isinstance(value, list):
        for number, inner in enumerate(value):
            yield from leaves(inner, (*path, number))
    else:
        yield path


def changed(key, path):
    """The key with another value at a place; of a name that code looks up, another that there is."""
    key = deepcopy(key)
    inner = key
    for name in path[:-1]:
        inner = inner[name]
    old = inner[path[-1]]
    words = {
        "exact": "adamw",
        "adamw": "moments",
        "moments": "adamw",
        "linear": "roi",
        "roi": "linear",
        "spatial": "roi",
    }
    inner[path[-1]] = words.get(old, f"{old}x") if isinstance(old, str) else (old or 0) + 1
    return key


@pytest.mark.parametrize("key", [RIDGE, ROI, MOMENTS, JOINT, TRAINED_ADAMW], ids=lambda key: name_of(key))
def test_whatever_decides_a_model_changes_its_name(key):
    paths = [path for path in leaves(key) if path not in (("kind",), ("features", "kind"), ("features", "fold"))]
    names = {path: name_of(changed(key, path)) for path in paths}
    assert len(paths) > 20 and len({*names.values(), name_of(key)}) == len(paths) + 1


@pytest.mark.parametrize(
    ("transform", "word"),
    [
        ({"crop_mode": "squash", "crop_pct": 1.0}, " whole"),
        ({"crop_mode": "border", "crop_pct": 1.0}, " pad"),
        ({"crop_mode": "squash", "crop_pct": 0.9}, ""),
        ({"crop_mode": "center", "crop_pct": 1.0}, ""),
    ],
)
def test_a_name_says_where_the_backbone_sees_the_whole_image(transform, word):
    for key, rest in ((RIDGE, " 3 layers 4x4/1x1 linear ridge"), (TRAINED, " finetune pooled trained")):
        changed_key = deepcopy(key)
        changed_key["features"]["transform"] |= transform
        assert name_of(changed_key).rpartition(" ")[0] == f"test_resnet@32{word}{rest}"


def test_weights_tell_frozen_backbones_apart():
    assert name_of(changed(RIDGE, ("features", "weights"))) != name_of(RIDGE)


def with_fold(key, **fold):
    key = deepcopy(key)
    key["features"]["fold"] |= fold
    return key


@pytest.mark.parametrize(
    ("key", "name"),
    [
        (
            with_fold(TRAINED_ADAMW, soup=3),
            "test_resnet@32 finetune soup of 3 pooled linear smooth_l1 folds 3 epochs 2 2f4dba",
        ),
        (
            with_fold(TRAINED_ADAMW, soup=3, held_out=[0, 2]),
            "test_resnet@32 finetune soup of 3 fold 0,2 pooled linear smooth_l1 folds 3 epochs 2 475368",
        ),
        (ROI | {"target": "blend"}, "test_resnet@32 pooled roi smooth_l1+0.5*mnnpc distilled epochs 2 959783"),
        (RIDGE | {"target": "blend"}, "test_resnet@32 3 layers 4x4/1x1 linear ridge distilled 5bb193"),
    ],
    ids=["soup", "soup of some folds", "gradient heads fitted to a blend", "closed form fitted to a blend"],
)
def test_what_an_earlier_version_alone_could_make_keeps_its_name(key, name):
    assert name_of(key) == name and PredictionKey.from_json(key).to_json() == key


def test_a_name_has_the_settings_that_are_not_the_default():
    def words(**about):
        return name_of(ADAMW_KEY | about).removeprefix("test_resnet@32 pooled linear smooth_l1").rpartition(" ")[0]

    usual = ADAMW_KEY["settings"] | {"epochs": 60}
    assert words(settings=usual) == ""
    assert words(settings=usual | {"batch_size": 64}, seed=4) == " seed 4 batch size 64"
    assert words(settings=usual, n_folds=8, products="tf32") == " folds 8 products tf32"
    assert "penalties" not in name_of(RIDGE | {"settings": {"penalties": [1.0], "selection": "loo"}})


@pytest.mark.parametrize(
    ("features", "words"),
    [({"pool": "max"}, "4x4/1x1 max"), ({"dtype": "bfloat16"}, "4x4/1x1 bfloat16"), ({"pool": "avg"}, "4x4/1x1")],
)
def test_a_name_has_pooling_and_precision_where_they_are_not_the_usual(features, words):
    name = name_of(RIDGE | {"features": RIDGE["features"] | features})
    assert name.rpartition(" ")[0] == f"test_resnet@32 3 layers {words} linear ridge"


@pytest.mark.parametrize(
    ("key", "folds", "training", "read"),
    [
        (RIDGE, (5, 0), None, ["pooled", "layer2", "layer4"]),
        (JOINT, (5, 0), None, ["layer2", "layer4"]),
        (TRAINED, (3, 0), TRAINED["features"]["fold"], ["pooled"]),
    ],
    ids=["frozen", "some layers", "trained"],
)
def test_a_key_says_folds_backbone_and_layers(key, folds, training, read):
    view = PredictionKey.from_json(key)
    assert (view.folds, view.read, view.backbone) == (folds, read, "test_resnet")
    assert (view.training and view.training.to_json()) == training


def test_facts_are_written_as_they_were_read_and_leave_out_what_there_is_not():
    facts = {"model": "a", "features": "f0+f1", "torch": "2.14.1", "seen_ids": [[1, 2], [3]]}
    assert json.dumps(PredictionFacts.from_json(facts).to_json()) == json.dumps(facts)
    assert [seen.tolist() for seen in PredictionFacts.from_json(facts).seen] == [[1, 2], [3]]
    assert PredictionFacts.from_json(facts).seen[0].dtype == np.int64
    frozen = PredictionFacts(model="a", features="f", torch="2")
    assert "seen_ids" not in frozen.to_json() and frozen.seen == []


@pytest.fixture
def key_of(tiny, tmp_path):
    """The JSON of the key of a fit of these settings to the features of a frozen or of a trained backbone."""

    subject = open_challenge(tiny).subjects[0]
    subject = responding(subject, planted_responses(len(subject.train), VECTOR), tmp_path)
    kinds = ((VECTOR, False), (LAYERS, False), (VECTOR, True))
    stored = [features_of(subject, tmp_path, shapes, trained=trained) for shapes, trained in kinds]

    def make(config, shapes=VECTOR, trained=False):
        features = stored[kinds.index((shapes, trained))]
        plan = FoldPlan.of_features(subject, features, config.n_folds, config.seed)
        return prediction_key(subject, features, plan, config, tmp_path).to_json()

    return make


def test_a_key_has_what_its_heads_read_and_leaves_out_the_rest(key_of):
    always = {"kind", "subject", "features", "responses", "version", "head", "n_folds", "seed"}
    always |= {"solver", "objective", "settings"}
    assert set(key_of(FitConfig())) == always
    layered = key_of(FitConfig(), LAYERS)
    assert set(layered) == always | {"kernels"} and layered["kernels"] == METHOD
    assert set(key_of(FitConfig(loss="smooth_l1"), LAYERS)) == always | {"noise_ceiling"}
    assert set(key_of(FitConfig(head="roi"))) == always | {"noise_ceiling", "rois", "roi_loss"}
    assert set(key_of(FitConfig(products="tf32"))) == always | {"products"}
    assert set(key_of(FitConfig(head="spatial", spatial=SpatialConfig(rank=2)), LAYERS)) == always | {"noise_ceiling"}


def test_a_key_says_in_which_precision_a_core_multiplies_and_how_its_outputs_are_weighed(key_of, monkeypatch):
    """The CPU decides the precision, so a store of another machine is not taken for one of this."""
    keys = []
    for precision in ("float32", "bfloat16"):
        monkeypatch.setattr("heads.fit.names.resolve_dtype", lambda *_, precision=precision: precision)
        keys.append(key_of(FitConfig(head="core", loss="mse")))
        assert keys[-1]["settings"]["precision"] == precision and keys[-1]["kernels"] == METHOD
        assert "precision" not in key_of(FitConfig(head="spatial"), LAYERS)["settings"]
    assert keys[0] != keys[1]


def test_folds_of_a_trained_backbone_are_those_of_its_training(key_of):
    """The closed form takes the seed of the training too; the gradient loop starts from the one that is asked for."""
    ridge, adamw = (key_of(FitConfig(seed=9, loss=loss), trained=True) for loss in ("mse", "smooth_l1"))
    assert (ridge["n_folds"], ridge["seed"]) == (3, 0) and (adamw["n_folds"], adamw["seed"]) == (3, 9)
    assert ridge["features"]["fold"]["held_out"] == [0, 1, 2] and len(ridge["features"]["weights"]) == 3


def test_heads_that_are_taken_as_they_are_have_no_folds_of_their_own(key_of):
    key = key_of(FitConfig(solver="trained"), trained=True)
    assert set(key) == {"kind", "subject", "features", "responses", "version", "head", "solver", "objective"}


def test_a_name_has_the_loss_of_roi_heads_where_it_is_another():
    same = name_of(ROI | {"roi_loss": ROI["objective"]})
    other = name_of(ROI | {"roi_loss": "mse"})
    assert same.rpartition(" ")[0] == name_of(ROI).rpartition(" ")[0] and same != name_of(ROI)
    assert other.startswith("test_resnet@32 pooled roi smooth_l1+0.5*mnnpc ") and "roi loss mse" in other
