"""The public interface: every name is there, documented, and loaded when it is first used."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import featcache as fc
from heads.scores.metrics import noise_normalized_accuracy

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.parametrize("name", fc.__all__)
def test_every_public_name_is_there_and_documented(name):
    value = getattr(fc, name)
    assert name in dir(fc) and value.__doc__


def test_names_are_those_of_the_rooms():
    import heads

    assert fc.RidgeHead is heads.RidgeHead and fc.accuracy is noise_normalized_accuracy
    assert set(fc.LOSSES) >= {"mse", "mnnpc"}


def test_other_names_are_refused():
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fc.nothing


def test_importing_loads_nothing_heavy():
    code = "import sys, featcache; sys.exit(not {'torch', 'numpy', 'heads'}.isdisjoint(sys.modules))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0


def test_a_head_is_fitted_in_three_lines():
    rng = np.random.default_rng(0)
    features, weights = rng.normal(size=(200, 5)).astype(np.float32), rng.normal(size=(5, 3)).astype(np.float32)
    head = fc.RidgeHead().fit(features, features @ weights)
    assert fc.pearson_r(head.predict(features), features @ weights) == pytest.approx(np.ones(3), abs=1e-3)


def test_every_stage_takes_its_folders_as_text(tiny, tmp_path):
    challenge, work = fc.Dataset.from_algonauts(str(tiny)), str(tmp_path / "work")
    subjects = challenge.select("1")
    backbone = fc.BackboneConfig(name="test_resnet", weights="none", size=32)
    layers = fc.LayerConfig(layers="pooled")
    fc.extract(subjects, fc.ExtractConfig(backbone=backbone, layers=layers, workers=1), work)
    (fitted,) = fc.fit_heads(subjects, fc.FitConfig(loss="mnnpc"), work)
    ensemble = fc.blend(challenge, fc.BlendConfig(), work)
    assert fitted.path.is_dir() and ensemble.submission is None  # one of two subjects
    train = fc.TrainConfig(epochs=1, batch_size=8)
    stage = fc.StageConfig(stage="pretrain", backbone=backbone, fold=0, n_folds=3, train=train)
    (trained,) = fc.train_stage(subjects, stage, work)
    assert trained.new and trained.checkpoint.path.is_dir()


@pytest.mark.slow
def test_the_command_line_runs_as_a_module():
    done = subprocess.run([sys.executable, "-m", "featcache", "--version"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and done.stdout.startswith(f"featcache {fc.__version__}")
