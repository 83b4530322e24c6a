import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache import extract as extract_module
from featcache import store as store_module
from featcache.backbone import Backbone, load_backbone
from featcache.challenge import open_challenge
from featcache.config import BackboneConfig, ExtractConfig
from featcache.errors import ChallengeError, ConfigError, StoreError
from featcache.extract import FOLDER, Extracted, _plan, extract
from featcache.store import open_store

BACKBONE = BackboneConfig("test_resnet", "none", 48)
CONFIG = ExtractConfig(BACKBONE, batch_size=3, workers=2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit every 8 images, so that a small tree has several commits."""
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 8)


def run(tree: Path, work: Path, config: ExtractConfig = CONFIG) -> list[Extracted]:
    return extract(open_challenge(tree).subjects, config, work)


def rows(results: list[Extracted]) -> list[np.ndarray]:
    return [open_store(result.path).read("pooled") for result in results]


def test_rows_are_the_network_on_each_image_training_then_test(tiny, tmp_path):
    results = run(tiny, tmp_path)
    backbone = load_backbone(BACKBONE)
    for subject, result, found in zip(open_challenge(tiny).subjects, results, rows(results), strict=True):
        store = open_store(result.path)
        assert store.image_ids.tolist() == subject.image_ids.tolist() and store.n_train == len(subject.train)
        for row, path in enumerate(subject.train.paths + subject.test.paths):
            image = backbone.transform(Image.open(path).convert("RGB"))[None]
            expected = backbone.model(image)[0].numpy()
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_a_second_run_runs_nothing(tiny, tmp_path, monkeypatch, said):
    first = run(tiny, tmp_path)
    monkeypatch.setattr("featcache.extract._forward", lambda *_: pytest.fail("ran the model again"))
    second = run(tiny, tmp_path)
    assert [(r.path, r.n_new) for r in second] == [(r.path, 0) for r in first]
    assert sum("already extracted" in line for line in said) == 2


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4, 5, 11])
def test_an_interrupted_run_ends_bit_equal(tiny, tmp_path, monkeypatch, stop_at):
    """Stopped in the batch `stop_at`, run again: the same bits as a run that was never stopped."""
    whole = rows(run(tiny, tmp_path / "whole"))
    honest, calls = Backbone.features, []

    def stopping(self, images, layers):
        calls.append(len(images))
        if len(calls) == stop_at + 2:  # the first call is the probe for the number of features
            raise KeyboardInterrupt
        return honest(self, images, layers)

    monkeypatch.setattr(Backbone, "features", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "stopped")
    monkeypatch.setattr(Backbone, "features", honest)
    again = run(tiny, tmp_path / "stopped")
    assert [a.tobytes() for a in rows(again)] == [b.tobytes() for b in whole]
    committed = 8 * (3 * stop_at // 9)  # batches of 3 fill a commit of 8 in three: 3 + 3 + 2
    assert again[0].n_new == again[0].n_images - min(committed, again[0].n_images)


KILLED = """
import sys, time
from pathlib import Path
from featcache import store
from featcache.backbone import Backbone
from featcache.challenge import open_challenge
from featcache.config import BackboneConfig, ExtractConfig
from featcache.extract import extract
store._CHUNK_ROWS = 8
honest = Backbone.features
def slow(self, images, layers):
    time.sleep(0.1)
    return honest(self, images, layers)
Backbone.features = slow
config = ExtractConfig(BackboneConfig("test_resnet", "none", 48), batch_size=3, workers=2)
extract(open_challenge(Path(sys.argv[1])).subjects, config, Path(sys.argv[2]))
"""


def test_a_killed_process_goes_on_bit_equal(tiny, tmp_path):
    whole = rows(run(tiny, tmp_path / "whole"))
    for waited in (0.3, 0.7):  # seconds after the first commit: twice, at different places
        process = subprocess.Popen([sys.executable, "-c", KILLED, tiny, tmp_path / "killed"], cwd=Path.cwd())
        deadline = time.monotonic() + 120
        while not list((tmp_path / "killed" / FOLDER).glob("*/committed.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(waited)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    again = run(tiny, tmp_path / "killed")
    assert 0 < sum(result.n_new for result in again) < sum(result.n_images for result in again)
    assert [a.tobytes() for a in rows(again)] == [b.tobytes() for b in whole]


def test_batch_size_workers_and_place_do_not_change_the_key(tiny, tmp_path):
    first = run(tiny, tmp_path)
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    other = ExtractConfig(BACKBONE, batch_size=7, workers=1)
    assert [r.n_new for r in run(moved, tmp_path, other)] == [0, 0]
    assert [r.path for r in run(moved, tmp_path, other)] == [r.path for r in first]


def test_batch_size_changes_rows_by_rounding_alone(tiny, tmp_path):
    a = rows(run(tiny, tmp_path / "a"))
    b = rows(run(tiny, tmp_path / "b", ExtractConfig(BACKBONE, batch_size=16, workers=1)))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (
            ExtractConfig(BackboneConfig("test_resnet", "none", 64)),
            "transform.input_size is [3, 64, 64], was [3, 48, 48]",
        ),
        (ExtractConfig(BACKBONE, dtype="bfloat16"), "dtype is bfloat16, was float32"),
    ],
)
def test_a_changed_setting_makes_another_store_and_is_named(tiny, tmp_path, said, config, setting):
    first = run(tiny, tmp_path)
    second = run(tiny, tmp_path, config)
    assert {r.path for r in first}.isdisjoint(r.path for r in second) and all(r.n_new for r in second)
    assert any("a new store, because nothing matches" in line and setting in line for line in said)


def test_one_changed_image_makes_another_store(tree, tmp_path, said):
    first = run(tree, tmp_path)
    path = sorted((tree / "subj01/test_split/test_images").iterdir())[0]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    second = run(tree, tmp_path)
    assert second[0].path != first[0].path and second[1].path == first[1].path
    assert any("subj01: a new store" in line and "images is" in line for line in said)


def test_an_image_that_cannot_be_decoded_keeps_what_was_committed(tree, tmp_path):
    path = sorted((tree / "subj01/training_split/training_images").iterdir())[20]
    good = path.read_bytes()
    path.write_bytes(good[:-50])
    with pytest.raises(ChallengeError, match=path.name):
        run(tree, tmp_path)
    store = next((tmp_path / FOLDER).iterdir())
    assert open_store(store).committed == {"pooled": 16}


def test_features_that_are_not_finite_are_refused_by_name(tiny, tmp_path, monkeypatch):
    honest = extract_module._forward
    monkeypatch.setattr(extract_module, "_forward", lambda *a: {k: v * torch.nan for k, v in honest(*a).items()})
    with pytest.raises(StoreError, match="found NaN or infinity in pooled"):
        run(tiny, tmp_path)


def test_bfloat16_is_close_and_not_the_same(tiny, tmp_path):
    exact = rows(run(tiny, tmp_path))[0]
    low = rows(run(tiny, tmp_path, ExtractConfig(BACKBONE, batch_size=3, dtype="bfloat16")))[0]
    error = np.linalg.norm(low - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05 and low.dtype == np.float32


def test_batches_cover_every_row_and_never_cross_a_commit():
    for start, stop, span, size in [(0, 29, 8, 3), (8, 29, 8, 16), (0, 5, 8, 2), (24, 24, 8, 4), (0, 256, 256, 32)]:
        batches = _plan(start, stop, span, size)
        assert [row for batch in batches for row in batch] == list(range(start, stop))
        assert all(batch.start // span == (batch.stop - 1) // span and len(batch) <= size for batch in batches)


def test_a_cuda_that_is_not_there_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device; found none"):
        run(tiny, tmp_path, ExtractConfig(BACKBONE, device="cuda"))
