"""What there is to blend: scores of models, fold by fold, and how alike they are."""

import numpy as np
import pytest

from heads.blend.overview import list_models
from support.blends import N_TRAIN, made_up, models_of, slow_r, standardised, subject_of
from support.commands import run


@pytest.mark.slow
@pytest.mark.parametrize("ceiling", [None, np.array([0, 0.5, 1, 0.7, 0.9, 0.2, 0.8], np.float32)])
def test_scores_of_models_are_those_of_their_predictions(ceiling, tmp_path, monkeypatch):
    predictions, responses = made_up(noise=(3, 1, 2, 4))
    subjects = [subject_of(tmp_path / name, responses, ceiling, name=name) for name in ("subj01", "subj02")]
    models = {subject: models_of(tmp_path / f"stores-{subject.name}", predictions) for subject in subjects}
    monkeypatch.setattr("heads.blend.overview.find_models", lambda *_: models)
    found, accuracy = list_models(subjects, tmp_path)
    assert [row.name for row in found] == ["model 1", "model 2", "model 0", "model 3"]  # best first
    assert accuracy == (ceiling is not None)
    standard = standardised(predictions)[:, :N_TRAIN]
    for row in found:
        model = int(row.name[-1])
        r = slow_r(standard[model], responses[:N_TRAIN])
        counted = np.full(7, True) if ceiling is None else ceiling > 0
        values = r if ceiling is None else 100 * np.minimum(np.maximum(r, 0) ** 2 / np.where(counted, ceiling, 1), 1)
        assert row.score == pytest.approx(values[counted].mean(), rel=1e-4)
        assert row.subjects == ("subj01", "subj02") and len(row.folds) == 5
        alike = {
            f"model {m}": np.mean([np.corrcoef(a, b)[0, 1] for a, b in zip(standard[model].T, z.T, strict=True)])
            for m, z in enumerate(standard)
            if m != model
        }
        assert row.agreement == pytest.approx(alike, rel=1e-3, abs=1e-4)
        assert row.closest()[0] == max(alike, key=alike.get)


def test_models_of_a_work_folder_are_listed(filled, capfd):
    found = run(capfd, "models")
    assert len(found["models"]) == 5
    stores = {store for row in found["models"] for store in row["predictions"].values()}
    assert stores == {path.name for path in (filled / "predictions.zarr").iterdir()}
    assert {row["backbone"] for row in found["models"]} == {"test_resnet", "test_vit"}
    assert {tuple(row["layers"]) for row in found["models"]} == {
        *(("pooled",), ("layer2",), ("layer4",), ("pooled", "layer2", "layer4"))
    }
    assert all(row["checkpoint"] == "frozen" and row["objective"] == "ridge" for row in found["models"])
    assert [row["score"] for row in found["models"]] == sorted((row["score"] for row in found["models"]), reverse=True)
