import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from featcache.backbone.network import TorchBackbone, load_backbone
from featcache.cache import extract as extract_module
from featcache.cache import store as store_module
from featcache.cache.chunks import chunk_file
from featcache.cache.extract import Extracted, extract
from featcache.cache.pixels import cache_pixels
from featcache.cache.store import Store, list_stores, open_store
from featcache.config import FITS, BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, DataError, StoreError
from featcache.workdir import Workdir
from support.damage import flip
from support.images import add_test_image

BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=48)
CONFIG = ExtractConfig(backbone=BACKBONE, batch_size=3, workers=2)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commit every 8 images, so that a small tree has several commits."""
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 8)


def run(tree: Path, work: Path, config: ExtractConfig = CONFIG) -> list[Extracted]:
    return extract(open_challenge(tree).subjects, config, work)


def subjects_of(tree: Path) -> tuple[Subject, ...]:
    return open_challenge(tree).subjects


def stores(results: list[Extracted]) -> list[Store]:
    return [open_store(result.path) for result in results]


def rows(results: list[Extracted]) -> list[np.ndarray]:
    return [store.read("pooled") for store in stores(results)]


def test_rows_are_the_network_on_each_image_training_then_test(tiny, tmp_path):
    results = run(tiny, tmp_path)
    backbone = load_backbone(BACKBONE)
    for subject, result, found in zip(open_challenge(tiny).subjects, results, rows(results), strict=True):
        store = open_store(result.path)
        assert store.image_ids.tolist() == subject.image_ids.tolist() and store.n_train == len(subject.train)
        for row, path in enumerate(subject.train.sources + subject.test.sources):
            image = backbone.transform(Image.open(path).convert("RGB"))[None]
            expected = backbone.model(image)[0].numpy()
            np.testing.assert_allclose(found[row], expected, rtol=1e-4, atol=1e-5)


def test_a_second_run_runs_nothing(tiny, tmp_path, monkeypatch, said):
    first = run(tiny, tmp_path)
    monkeypatch.setattr("featcache.cache.extract._forward", lambda *_: pytest.fail("ran the model again"))
    second = run(tiny, tmp_path)
    assert [(r.path, r.n_new) for r in second] == [(r.path, 0) for r in first]
    assert sum("already extracted" in line for line in said) == 2


@pytest.mark.parametrize("stop_at", [0, 1, 3, 4, 5, 11])
def test_an_interrupted_run_ends_bit_equal(tiny, tmp_path, monkeypatch, stop_at):
    """Stopped in the batch `stop_at`, run again: the same bits as a run that was never stopped."""
    whole = rows(run(tiny, tmp_path / "whole"))
    honest, calls = TorchBackbone.read, []

    def stopping(self, images, layers):
        calls.append(len(images))
        if len(calls) == stop_at + 2:  # the first call is the probe for the number of features
            raise KeyboardInterrupt
        return honest(self, images, layers)

    monkeypatch.setattr(TorchBackbone, "read", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "stopped")
    monkeypatch.setattr(TorchBackbone, "read", honest)
    again = run(tiny, tmp_path / "stopped")
    assert [a.tobytes() for a in rows(again)] == [b.tobytes() for b in whole]
    committed = 8 * (3 * stop_at // 9)  # batches of 3 fill a commit of 8 in three: 3 + 3 + 2
    assert again[0].n_new == again[0].n_images - min(committed, again[0].n_images)


KILLED = """
import sys, time
from pathlib import Path
from featcache.cache import store
from featcache.backbone.network import TorchBackbone
from featcache.dataset.algonauts import open_challenge
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.cache.extract import extract
store._CHUNK_ROWS = 8
honest = TorchBackbone.read
def slow(self, images, layers):
    time.sleep(0.1)
    return honest(self, images, layers)
TorchBackbone.read = slow
config = ExtractConfig(
    backbone=BackboneConfig(name="test_resnet", weights="none", size=48), dtype="float32", batch_size=3, workers=2
)
extract(open_challenge(Path(sys.argv[1])).subjects, config, Path(sys.argv[2]))
"""


def test_a_killed_process_goes_on_bit_equal(tiny, tmp_path):
    whole = rows(run(tiny, tmp_path / "whole"))
    for waited in (0.3, 0.7):  # seconds after the first commit: twice, at different places
        process = subprocess.Popen([sys.executable, "-c", KILLED, tiny, tmp_path / "killed"], cwd=Path.cwd())
        deadline = time.monotonic() + 120
        while not list(Workdir(tmp_path / "killed").features.glob("*/committed.json")) and time.monotonic() < deadline:
            time.sleep(0.02)
        time.sleep(waited)
        os.kill(process.pid, signal.SIGKILL)
        process.wait()
        assert process.returncode == -signal.SIGKILL
    again = run(tiny, tmp_path / "killed")
    assert 0 < sum(result.n_new for result in again) < sum(result.n_images for result in again)
    assert [a.tobytes() for a in rows(again)] == [b.tobytes() for b in whole]


def test_of_rows_that_are_taken_back_the_damaged_alone_are_computed(tiny, tmp_path, monkeypatch):
    config = replace(CONFIG, layers=LayerConfig(layers=("layer2", "layer3")))
    done = extract(subjects_of(tiny)[:1], config, tmp_path)[0]
    store = open_store(done.path)
    whole = {name: store.read(name) for name in store.arrays}
    rows_in_chunk = {name: store.chunk_rows(name) for name in store.arrays}
    early, late = sorted(store.arrays)[:2]

    def damage(name: str, row: int) -> None:
        flip(chunk_file(store.path / name, row // rows_in_chunk[name], store.arrays[name].ndim))

    damage(early, 9)
    damage(late, 17)
    store.take_back({early: 9, late: 17})
    assert set(store.committed.values()) >= {8, 16}
    damage(late, 25)  # after somebody looked
    again = extract(subjects_of(tiny)[:1], config, tmp_path)[0]
    assert again.path == done.path and again.n_new == 24
    store = open_store(done.path)
    assert {name: store.read(name).tobytes() for name in whole} == {name: a.tobytes() for name, a in whole.items()}
    assert not [chunk.fault for name in whole for chunk in store.chunks(name) if chunk.fault]
    assert extract(subjects_of(tiny)[:1], config, tmp_path)[0].n_new == 0


def test_batch_size_workers_and_place_do_not_change_the_key(tiny, tmp_path):
    first = run(tiny, tmp_path)
    moved = Path(shutil.copytree(tiny, tmp_path / "moved"))
    other = ExtractConfig(backbone=BACKBONE, batch_size=7, workers=1)
    assert [r.n_new for r in run(moved, tmp_path, other)] == [0, 0]
    assert [r.path for r in run(moved, tmp_path, other)] == [r.path for r in first]


def test_batch_size_changes_rows_by_rounding_alone(tiny, tmp_path):
    a = rows(run(tiny, tmp_path / "a"))
    b = rows(run(tiny, tmp_path / "b", ExtractConfig(backbone=BACKBONE, batch_size=16, workers=1)))
    for one, other in zip(a, b, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("config", "setting"),
    [
        (
            ExtractConfig(backbone=BackboneConfig(name="test_resnet", weights="none", size=64)),
            "transform.input_size is [3, 64, 64], was [3, 48, 48]",
        ),
        (ExtractConfig(backbone=BACKBONE, dtype="bfloat16"), "dtype is bfloat16, was float32"),
        (
            ExtractConfig(backbone=replace(BACKBONE, fit="pad")),
            ": fit is pad, was crop",
        ),
        (
            replace(CONFIG, layers=LayerConfig(layers=("pooled",))),
            ": layers is pooled, was pooled,act1,layer1,layer2,layer3,layer4",
        ),
    ],
)
def test_a_changed_setting_makes_another_store_and_is_named(tiny, tmp_path, said, config, setting):
    first = run(tiny, tmp_path)
    second = run(tiny, tmp_path, config)
    assert {r.path for r in first}.isdisjoint(r.path for r in second) and all(r.n_new for r in second)
    whys = [line for line in said if "a new store, because nothing matches" in line]
    assert whys and all(line.endswith(setting) for line in whys)


def test_layers_that_another_store_has_are_pointed_out(tiny, tmp_path, said):
    whole = ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers="pooled,layer2,layer4"))
    (first, _) = run(tiny, tmp_path, whole)
    said.clear()
    for layers, there in (("pooled", True), ("layer4,layer2", True), ("pooled,layer1", False)):
        run(tiny, tmp_path, replace(whole, layers=LayerConfig(layers=layers)))
        lines = [line for line in said if "has these layers too" in line]
        assert len(lines) == (2 if there else 0), layers
        assert not there or (first.path.name in lines[0] and "fit-heads --layers" in lines[0])
        said.clear()
    run(tiny, tmp_path, replace(whole, layers=LayerConfig(layers="layer2", grid="1")))
    assert not any("has these layers too" in line for line in said)  # on another grid


def redraw(tree: Path, draw: Callable[[int, Image.Image], Image.Image]) -> None:
    """Replace every image of a tree by what is drawn for its number."""
    paths = sorted(tree.glob("subj*/*/*_images/*.png"))
    assert paths
    for number, path in enumerate(paths):
        draw(number, Image.open(path).convert("RGB")).save(path)


def test_the_rows_of_whole_and_pad_know_the_border_and_those_of_crop_do_not(tree, tmp_path):
    """Images are grey inside a frame of one pixel, whose brightness is all that they differ in."""

    def framed(number: int, image: Image.Image) -> Image.Image:
        frame = Image.new("RGB", (128, 128), (number * 40 % 256,) * 3)
        frame.paste(Image.new("RGB", (126, 126), (128, 128, 128)), (1, 1))
        return frame

    redraw(tree, framed)
    found = {fit: run(tree, tmp_path, replace(CONFIG, backbone=replace(BACKBONE, fit=fit))) for fit in FITS}
    spread = {fit: np.ptp(rows(results)[0], axis=0).max() for fit, results in found.items()}
    assert spread["crop"] < 1e-5 and min(spread["whole"], spread["pad"]) > 1e-3
    assert len({result.path for results in found.values() for result in results}) == len(FITS) * 2
    assert [r.path for r in run(tree, tmp_path)] == [r.path for r in found["crop"]]


def test_one_changed_image_makes_another_store(tree, tmp_path, said):
    first = run(tree, tmp_path)
    path = sorted((tree / "subj01/test_split/test_images").iterdir())[0]
    pixels = np.asarray(Image.open(path)).copy()
    pixels[0, 0, 0] ^= 1
    Image.fromarray(pixels).save(path)
    second = run(tree, tmp_path)
    assert second[0].path != first[0].path and second[1].path == first[1].path
    assert f"subj01: 34 of 35 images are in {first[0].path.name}; 1 to compute" in said and second[0].n_new == 1


def test_an_image_that_cannot_be_decoded_keeps_what_was_committed(tree, tmp_path):
    path = sorted((tree / "subj01/training_split/training_images").iterdir())[20]
    good = path.read_bytes()
    path.write_bytes(good[:-50])
    with pytest.raises(DataError, match=path.name):
        run(tree, tmp_path)
    store = next(Workdir(tmp_path).features.iterdir())
    layers = ("pooled", "act1", "layer1", "layer2", "layer3", "layer4")
    assert open_store(store).committed == dict.fromkeys(layers, 16)


def test_features_that_are_not_finite_are_refused_by_name(tiny, tmp_path, monkeypatch):
    honest = extract_module._forward
    monkeypatch.setattr(
        extract_module, "_forward", lambda *a: lambda: {k: v * torch.nan for k, v in honest(*a)().items()}
    )
    with pytest.raises(StoreError, match=r"found nan in pooled\[0, 0\]; use other weights"):
        run(tiny, tmp_path)
    assert list(Workdir(tmp_path).features.iterdir()) == []  # no run could fill it


def test_bfloat16_is_close_and_not_the_same(tiny, tmp_path):
    exact = rows(run(tiny, tmp_path))[0]
    low = rows(run(tiny, tmp_path, ExtractConfig(backbone=BACKBONE, batch_size=3, dtype="bfloat16")))[0]
    error = np.linalg.norm(low - exact) / np.linalg.norm(exact)
    assert 1e-5 < error < 0.05 and low.dtype == np.float32


@pytest.mark.parametrize(
    ("flags", "dtype"), [({"sse2", "avx512_bf16"}, "bfloat16"), ({"asimd", "bf16"}, "bfloat16"), ({"avx2"}, "float32")]
)
def test_auto_is_bfloat16_where_the_processor_multiplies_it(tiny, tmp_path, monkeypatch, said, flags, dtype):
    monkeypatch.setattr("featcache.machine.device._cpu_flags", lambda: flags)
    found = run(tiny, tmp_path / "auto", replace(CONFIG, device="cpu"))
    assert any(line.startswith(f"arithmetic in {dtype}") for line in said)
    assert open_store(found[0].path).key["dtype"] == dtype
    named = rows(run(tiny, tmp_path / "named", replace(CONFIG, dtype=dtype)))
    assert [a.tobytes() for a in rows(found)] == [b.tobytes() for b in named]
    assert run(tiny, tmp_path / "named", replace(CONFIG, device="cpu"))[0].n_new == 0  # auto is a name, not a setting


def test_what_the_processor_emulates_is_said(tiny, tmp_path, said):
    run(tiny, tmp_path, replace(CONFIG, dtype="float16", device="cpu"))
    assert any(line.startswith("--dtype float16: no units for it were found") for line in said)


@pytest.mark.parametrize("size", [3, 8, 16])
def test_batches_cover_every_row_and_never_cross_a_commit(tiny, tmp_path, monkeypatch, size):
    honest, sizes = extract_module._forward, []
    monkeypatch.setattr(extract_module, "_forward", lambda *args: sizes.append(len(args[1])) or honest(*args))
    extract(subjects_of(tiny)[:1], replace(CONFIG, batch_size=size), tmp_path)  # 35 images, a commit every 8
    assert sizes == ([3, 3, 2] if size == 3 else [8]) * 4 + [3]


def test_a_cuda_that_is_not_there_is_refused(tiny, tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ConfigError, match="expected a CUDA device; found none"):
        run(tiny, tmp_path, ExtractConfig(backbone=BACKBONE, device="cuda"))


@pytest.mark.parametrize("fit", FITS)
def test_cached_pixels_give_the_bits_that_image_files_give(tree, tmp_path, monkeypatch, fit):
    redraw(tree, lambda number, image: image.resize((90, 60) if number % 2 else (48, 70)))
    backbone = replace(BACKBONE, fit=fit)
    config = replace(CONFIG, backbone=backbone)
    expected = run(tree, tmp_path / "files", config)
    cache_pixels(open_challenge(tree).subjects, load_backbone(backbone), tmp_path / "cached", 1, 2)
    monkeypatch.setattr("featcache.cache.extract.load_image", lambda path: pytest.fail(f"decoded {path}"))
    found = run(tree, tmp_path / "cached", config)
    assert [a.tobytes() for a in rows(found)] == [b.tobytes() for b in rows(expected)]
    assert [r.path.name for r in found] == [r.path.name for r in expected]


def test_images_are_decoded_into_the_cache_once_where_it_is_asked_for(tiny, tmp_path, monkeypatch):
    """A second run, of other layers, decodes none."""
    other = replace(CONFIG, layers=LayerConfig(layers=("layer2",)))
    expected = [run(tiny, tmp_path / "files", config) for config in (CONFIG, other)]
    found = [run(tiny, tmp_path / "cached", replace(CONFIG, image_cache=0.1))]
    assert len(list(Workdir(tmp_path / "cached").pixels.glob("*.npy"))) == 2
    monkeypatch.setattr("featcache.cache.extract.load_image", lambda path: pytest.fail(f"decoded {path}"))
    found.append(run(tiny, tmp_path / "cached", other))
    assert [everything(results) for results in found] == [everything(results) for results in expected]


def test_no_cache_is_made_for_the_few_images_that_are_not_known(tree, tmp_path):
    run(tree, tmp_path)
    add_test_image(tree)
    results = run(tree, tmp_path, replace(CONFIG, image_cache=0.1))
    assert [result.n_new for result in results] == [1, 0] and not Workdir(tmp_path).pixels.exists()


def test_an_image_cache_that_is_too_small_is_refused(tiny, tmp_path):
    with pytest.raises(StoreError, match=r"--image-cache 1e-07 GB; found .* kB .*; give --image-cache 0\.\d+ "):
        run(tiny, tmp_path, replace(CONFIG, image_cache=1e-7))
    assert not list_stores(Workdir(tmp_path).features)  # an unfinished store would be named by every later command
    with pytest.raises(ConfigError, match="--image-cache: expected 0 or more"):
        replace(CONFIG, image_cache=-1.0)


def test_cached_pixels_of_another_size_are_left_alone(tiny, tmp_path):
    expected = run(tiny, tmp_path / "files")
    other = load_backbone(BackboneConfig(name="test_resnet", weights="none", size=64))
    cache_pixels(open_challenge(tiny).subjects, other, tmp_path / "cached", 1, 2)
    assert [a.tobytes() for a in rows(run(tiny, tmp_path / "cached"))] == [b.tobytes() for b in rows(expected)]


def test_a_run_interrupted_on_files_goes_on_with_cached_pixels_bit_equal(tiny, tmp_path, monkeypatch):
    whole = rows(run(tiny, tmp_path / "whole"))
    honest, calls = extract_module._forward, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == 6:
            raise KeyboardInterrupt
        return honest(*args)

    monkeypatch.setattr(extract_module, "_forward", stopping)
    with pytest.raises(KeyboardInterrupt):
        run(tiny, tmp_path / "stopped")
    monkeypatch.setattr(extract_module, "_forward", honest)
    cache_pixels(open_challenge(tiny).subjects, load_backbone(BACKBONE), tmp_path / "stopped", 1, 2)
    again = run(tiny, tmp_path / "stopped")
    assert again[0].n_new == again[0].n_images - 8
    assert [a.tobytes() for a in rows(again)] == [b.tobytes() for b in whole]


def test_a_compiled_network_gives_the_same_rows_and_is_a_fact_and_no_setting(tiny, tmp_path, monkeypatch):
    """What makes machine code is left out: it takes a minute."""
    honest = torch.compile
    monkeypatch.setattr(torch, "compile", lambda function, **options: honest(function, backend="eager", **options))
    expected = run(tiny, tmp_path / "plain")
    found = run(tiny, tmp_path / "compiled", replace(CONFIG, compile=True))
    for one, other, store in zip(rows(found), rows(expected), stores(found), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-5)
        assert store.facts["compiled"] and store.facts["batch_size"] == 3
    assert [r.path.name for r in found] == [r.path.name for r in expected]
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled, though every row is there"))
    assert [r.n_new for r in run(tiny, tmp_path / "compiled", replace(CONFIG, compile=True))] == [0, 0]


# --- layers


SOME = replace(CONFIG, layers=LayerConfig(layers=("pooled", "layer2", "layer4"), grid="2"))
LOUD = 20  # row of the image for which a layer says more than float16 can hold


def everything(results: list[Extracted]) -> list[dict[str, bytes]]:
    """Every bit of every array."""
    return [
        {name: store.arrays[name].dtype.str.encode() + store.read(name).tobytes() for name in store.arrays}
        for store in stores(results)
    ]


def test_vectors_are_float32_and_maps_float16_of_the_network_itself(tiny, tmp_path):
    backbone = load_backbone(BACKBONE)
    for store, subject in zip(stores(run(tiny, tmp_path, SOME)), subjects_of(tiny), strict=True):
        assert {name: (array.shape[1:], str(array.dtype)) for name, array in store.arrays.items()} == {
            "pooled": ((96,), "float32"),
            "layer2": ((2, 2, 48), "float16"),
            "layer4": ((2, 2, 96), "float16"),
        }
        images = torch.stack([backbone.transform(Image.open(path).convert("RGB")) for path in subject.image_sources])
        with torch.no_grad():
            expected = backbone.read(images, backbone.taps(SOME.layers))
        for name, values in expected.items():
            np.testing.assert_allclose(store.read(name), values, rtol=2e-3, atol=1e-3)


@pytest.fixture
def loud(tiny, monkeypatch):
    """A network whose layer2 is a million times as loud for one image of each subject, in the third commit."""
    honest, backbone = TorchBackbone.read, load_backbone(BACKBONE)
    images = [
        backbone.transform(Image.open(subject.image_sources[LOUD]).convert("RGB")) for subject in subjects_of(tiny)
    ]

    def read(self, pixels, taps):
        out = honest(self, pixels, taps)
        if "layer2" in out:
            same = [(pixels - one).abs().amax((1, 2, 3)) < 1e-5 for one in images]
            out["layer2"] = out["layer2"] * torch.where(same[0] | same[1], 1e6, 1.0)[:, None, None, None]
        return out

    monkeypatch.setattr(TorchBackbone, "read", read)
    return read


def test_a_layer_beyond_float16_becomes_float32_from_its_first_row_and_alone(tiny, tmp_path, loud, said):
    backbone = load_backbone(BACKBONE)
    for store, subject in zip(stores(run(tiny, tmp_path, SOME)), subjects_of(tiny), strict=True):
        assert store.complete
        assert {name: str(array.dtype) for name, array in store.arrays.items()} == {
            "pooled": "float32",
            "layer2": "float32",
            "layer4": "float16",
        }
        found = store.read("layer2")
        images = torch.stack([backbone.transform(Image.open(path).convert("RGB")) for path in subject.image_sources])
        with torch.no_grad():
            expected = backbone.read(images, backbone.taps(SOME.layers))["layer2"].numpy()
        np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4)
        assert np.abs(found[LOUD]).max() > 65_504
        assert not np.array_equal(found[0], found[0].astype(np.float16))  # not what was rounded before
        told = f"{store.name}: layer2 has values beyond float16; it is stored as float32, from its first row"
        assert said.count(told) == 1


@pytest.mark.parametrize("stop_at", [1, 4, 7, 8, 10, 13, 17])
def test_a_run_interrupted_around_an_overflow_ends_bit_equal(tiny, tmp_path, loud, monkeypatch, stop_at):
    """Batches of 3 fill a commit of 8 in three: the loud image is in the ninth, then all begins anew."""
    whole = everything(run(tiny, tmp_path / "whole", SOME))
    honest, calls = extract_module._forward, []

    def stopping(*args):
        calls.append(args)
        if len(calls) == stop_at:
            raise KeyboardInterrupt
        return honest(*args)

    with monkeypatch.context() as patch:
        patch.setattr(extract_module, "_forward", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "stopped", SOME)
    assert everything(run(tiny, tmp_path / "stopped", SOME)) == whole
    monkeypatch.setattr(extract_module, "_forward", lambda *_: pytest.fail("ran the model again"))
    assert [result.n_new for result in run(tiny, tmp_path / "stopped", SOME)] == [0, 0]


def test_a_run_interrupted_while_a_layer_is_widened_ends_bit_equal(tiny, tmp_path, loud, monkeypatch):
    whole = everything(run(tiny, tmp_path / "whole", SOME))
    honest = Store.widen

    def stopping(self, name):
        honest(self, name)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Store, "widen", stopping)
        with pytest.raises(KeyboardInterrupt):
            run(tiny, tmp_path / "stopped", SOME)
    assert everything(run(tiny, tmp_path / "stopped", SOME)) == whole


def test_nan_in_a_layer_is_refused_and_not_taken_for_an_overflow(tiny, tmp_path, monkeypatch):
    honest = TorchBackbone.read

    def broken(self, images, taps):
        return {name: v * torch.nan if name == "layer4" else v for name, v in honest(self, images, taps).items()}

    monkeypatch.setattr(TorchBackbone, "read", broken)
    said = []
    monkeypatch.setattr(extract_module, "say", said.append)
    with pytest.raises(StoreError, match=r"found nan in layer4\[0, 0, 0, 0\]; use other weights"):
        run(tiny, tmp_path, SOME)
    assert not any("beyond float16" in line for line in said)


@pytest.mark.parametrize(
    "layers",
    [
        LayerConfig(layers=("pooled", "layer2", "layer4"), grid="1"),
        LayerConfig(layers=("pooled", "layer2", "layer4"), grid="2", pool="max"),
        LayerConfig(layers=("layer2", "layer4"), grid="2"),
        LayerConfig(layers=("pooled",), grid="2"),
    ],
)
def test_another_grid_pool_or_choice_of_layers_makes_another_store(tiny, tmp_path, layers):
    first = run(tiny, tmp_path, SOME)
    second = run(tiny, tmp_path, replace(SOME, layers=layers))
    assert {r.path for r in first}.isdisjoint(r.path for r in second) and all(r.n_new for r in second)


def test_two_ways_to_name_the_same_layers_share_a_store(tiny, tmp_path):
    first = run(tiny, tmp_path, SOME)
    second = run(tiny, tmp_path, replace(SOME, layers=LayerConfig(layers=("-1", "2", "pooled"), grid="2")))
    assert [(r.path, r.n_new) for r in second] == [(r.path, 0) for r in first]


def test_the_size_of_the_cache_is_said_before_it_is_made(tiny, tmp_path, said):
    results = run(tiny, tmp_path, SOME)
    per_image = 96 * 4 + 2 * 2 * 48 * 2 + 2 * 2 * 96 * 2
    line = next(line for line in said if "an image" in line)
    assert line.startswith(f"pooled 96, layer2 2x2x48, layer4 2x2x96: {per_image / 1e3:.1f} kB an image")
    assert sum(store.arrays[name].nbytes for store in stores(results) for name in store.arrays) == per_image * 65


def disk(monkeypatch, free: int) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("usage", (), {"free": free})())


PER_IMAGE = 96 * 4 + 2 * 2 * 48 * 2 + 2 * 2 * 96 * 2


@pytest.mark.parametrize("free", [0, PER_IMAGE * 40, PER_IMAGE * 65 - 1])
def test_a_disk_too_small_for_all_subjects_is_refused_before_an_image_is_read(tiny, tmp_path, monkeypatch, free):
    disk(monkeypatch, free)
    monkeypatch.setattr(extract_module, "_reader", lambda *_: pytest.fail("read images"))
    with pytest.raises(StoreError, match=r"of free disk; found .* make room or choose another --work"):
        run(tiny, tmp_path, SOME)
    assert list(Workdir(tmp_path).features.iterdir()) == []


def test_a_rerun_needs_no_room_for_what_is_there(tiny, tmp_path, monkeypatch):
    run(tiny, tmp_path, SOME)
    disk(monkeypatch, 0)
    assert [result.n_new for result in run(tiny, tmp_path, SOME)] == [0, 0]


def test_stores_of_another_backbone_leave_no_room_for_this_one(tiny, tmp_path, monkeypatch):
    pooled = replace(CONFIG, layers=LayerConfig(layers=("pooled",)))
    run(tiny, tmp_path, pooled)
    disk(monkeypatch, 64 * 4 * 40)  # for one of the two subjects
    monkeypatch.setattr(extract_module, "_reader", lambda *_: pytest.fail("read images"))
    with pytest.raises(StoreError, match="of free disk"):
        run(tiny, tmp_path, replace(pooled, backbone=BackboneConfig(name="test_convnext", weights="none", size=64)))


def test_a_transformer_is_stored_with_its_class_tokens(tiny, tmp_path):
    config = ExtractConfig(
        backbone=BackboneConfig(name="test_vit", weights="none", size=32),
        layers=LayerConfig(layers=("-1",), grid="2"),
        batch_size=8,
        workers=1,
    )
    for store in stores(run(tiny, tmp_path, config)):
        assert {name: array.shape[1:] for name, array in store.arrays.items()} == {
            "blocks.5.cls": (64,),
            "blocks.5": (2, 2, 64),
        }
        assert store.complete
