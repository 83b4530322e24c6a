"""Models are prediction stores, chosen by name, and refused where a backbone saw the images that it predicts."""

import numpy as np
import pytest

from featcache.cache.store import create_store
from featcache.errors import ConfigError, LeakError, StoreError
from featcache.workdir import Workdir
from heads.blend.models import Model, choose_names, find_models, has_ceilings
from support.blends import FOLDS, IDS, N_TRAIN, N_VERTICES, WIDTHS, made_up, models_of, subject_of

NAMES = ["a@64 pooled linear ridge 111111", "a@64 layer2 linear ridge 222222", "b@32 pooled linear ridge 333333"]


@pytest.mark.parametrize(
    ("models", "exclude", "expected"),
    [
        ("*", "", {0, 1, 2}),
        ("b@*", "", {2}),
        ("333333", "", {2}),
        ("* pooled *, 222222", "", {0, 1, 2}),
        ("*", "b*", {0, 1}),
        ("a*", "* layer2 *,333333", {0}),
    ],
)
def test_names_are_chosen_by_patterns(models, exclude, expected):
    assert choose_names(NAMES, models, exclude) == {NAMES[number] for number in expected}


@pytest.mark.parametrize(
    ("models", "exclude", "message"),
    [
        ("ridge", "", "--models: expected one that matches one of 'a@64 .*; found 'ridge'"),
        ("b*", "*", "--exclude: expected a pattern that leaves one of 'a@64 .*; found '\\*'"),
    ],
)
def test_patterns_that_leave_no_name_are_refused(models, exclude, message):
    with pytest.raises(ConfigError, match=message):
        choose_names(NAMES, models, exclude)


def test_a_model_says_what_its_store_says(tmp_path):
    model = models_of(tmp_path, made_up()[0])[2]
    assert (model.name, model.key.backbone, model.stage, model.key.folds) == ("model 2", "net1", "frozen", (5, 0))
    assert not model.backbone_trained and model.seen_ids == {}


def trained_model(subject, work, seen_ids):
    """Stores the predictions of a backbone that was trained once per fold, of images by fold."""
    from featcache.dataset.digests import image_digest, response_digest

    for path in subject.image_sources:
        path.parent.mkdir(exist_ok=True)
        path.write_text(path.stem)
    features = {"backbone": "net", "layers": ["pooled"], "images": image_digest(subject, work), "dtype": "float32"}
    features |= {"fold": {"stage": "pretrain", "training": "", "n_folds": 5, "seed": 0, "held_out": list(range(5))}}
    features |= {"transform": {"input_size": [3, 8, 8]}, "image_ids": ""}
    key = {"subject": subject.name, "features": features, "responses": response_digest(subject, work), "n_folds": 5}
    key |= {"head": "linear", "solver": "exact", "objective": "ridge", "seed": 0}
    facts = {"model": "net", "features": "+".join(f"features {fold}" for fold in range(5))}
    facts |= {} if seen_ids is None else {"seen_ids": [ids.tolist() for ids in seen_ids]}
    store = create_store(Workdir(work).predictions, "trained", key, IDS, N_TRAIN, WIDTHS, facts)
    store.append({surface: np.zeros((len(IDS), width), np.float32) for surface, width in WIDTHS.items()})


@pytest.fixture
def subject(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # its images have relative paths
    return subject_of(tmp_path / "tree", made_up()[1])


def test_a_model_of_a_trained_backbone_knows_what_each_fold_was_trained_on(subject, tmp_path):
    trained_model(subject, tmp_path, [IDS[:N_TRAIN][fold != FOLDS] for fold in range(5)])
    ((model,),) = find_models([subject], tmp_path).values()
    assert model.backbone_trained and model.stage == "pretrain"
    assert {fold: set(ids.tolist()) for fold, ids in model.seen_ids.items()} == {
        fold: set(IDS[:N_TRAIN][fold != FOLDS].tolist()) for fold in range(5)
    }


@pytest.mark.parametrize(
    ("row", "what"), [(N_TRAIN + 3, "the test images"), (int(np.flatnonzero(FOLDS == 2)[0]), "fold 2")]
)
def test_a_backbone_that_saw_an_image_that_it_predicts_is_refused(subject, tmp_path, row, what):
    seen = [IDS[:N_TRAIN][fold != FOLDS] for fold in range(5)]
    seen[2] = np.append(seen[2], IDS[row])
    trained_model(subject, tmp_path, seen)
    with pytest.raises(LeakError, match=f"{what} of net of subj01.*{IDS[row]}"):
        find_models([subject], tmp_path)


def test_a_backbone_whose_training_images_are_unknown_is_left_out(subject, tmp_path, said):
    trained_model(subject, tmp_path, None)
    with pytest.raises(StoreError, match="expected predictions for this tree; found none"):
        find_models([subject], tmp_path)
    assert any("does not say which images its backbone was trained on" in line for line in said)


def test_one_ceiling_is_enough_for_scores_by_ceilings(tmp_path):
    without = subject_of(tmp_path / "a", made_up()[1])
    having = subject_of(tmp_path / "b", made_up()[1], np.ones(N_VERTICES))
    assert not has_ceilings([without]) and has_ceilings([without, having])


def test_reading_a_store_twice_gives_two_models(tmp_path):
    (model, *_) = models_of(tmp_path, made_up()[0])
    assert model != Model.from_store(model.store) and model == model
