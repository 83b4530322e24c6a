"""Extraction on a pretended CUDA device: the CPU's numbers, few waits, and memory that runs out."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from featcache.backbone.network import TorchBackbone, load_backbone
from featcache.cache import extract as extract_module
from featcache.cache import store as store_module
from featcache.cache.extract import Extracted, extract
from featcache.cache.pixels import cache_pixels
from featcache.cache.store import Store, open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import ConfigError
from support.pretended_device import pretended_cuda

CONFIG = ExtractConfig(
    backbone=BackboneConfig(name="test_resnet", weights="none", size=64),
    layers=LayerConfig(layers=("pooled", "layer2", "layer4"), grid="2"),
    batch_size=4,
    workers=2,
    dtype="float32",
    device="cuda",
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 8)


def run(tree: Path, work: Path, config: ExtractConfig = CONFIG) -> list[Extracted]:
    return extract(open_challenge(tree).subjects[:1], config, work)


def bits(results: list[Extracted]) -> dict[str, bytes]:
    store = open_store(results[0].path)
    return {name: store.read(name).tobytes() for name in store.arrays}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("cached", [False, True])
def test_rows_are_the_cpus_with_one_wait_a_batch_beside_the_host(tiny, tmp_path, dtype, cached):
    config = replace(CONFIG, dtype=dtype)
    expected = bits(run(tiny, tmp_path / "cpu", replace(config, device="cpu")))
    if cached:
        backbone = load_backbone(config.backbone)
        cache_pixels(open_challenge(tiny).subjects[:1], backbone, tmp_path / "cuda", 1, 2)
    with pretended_cuda() as device:
        results = run(tiny, tmp_path / "cuda", config)
    assert not device.waits_in("weights.py")  # digests are made before the network moves
    n_batches = 9  # of 35 images: 4 and 4 in each commit of 8, and the 3 of the last
    waits = device.waits_in("device.py")
    assert [wait.operation for wait in waits] == ["synchronize"] * n_batches
    images = device.copies_in("device.py", "to device")
    assert len(images) == n_batches and all(copy.pinned and not copy.blocking for copy in images)
    assert bits(results) == expected


INPUT = 3 * 64 * 64 * 4  # bytes of an image as the network reads it


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Sizes of the batches that a network reads for the rows of a store."""
    honest, sizes = extract_module._forward, []
    monkeypatch.setattr(extract_module, "_forward", lambda *args: sizes.append(len(args[1])) or honest(*args))
    return sizes


def test_memory_is_said_and_a_batch_that_does_not_fit_is_halved_before_an_image_is_read(
    tiny, tmp_path, monkeypatch, said, passes
):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 16)
    expected = bits(run(tiny, tmp_path / "cpu", replace(CONFIG, device="cpu", batch_size=8)))
    del passes[:]
    with pretended_cuda() as device:
        device.refuse_memory(larger_than=15 * INPUT, times=1)
        results = run(tiny, tmp_path / "cuda", replace(CONFIG, batch_size=16))
    assert "test_resnet: the device's memory is too small for 16 images; 8 a batch" in said
    assert sum("of weights, a batch of 8 images takes " in line for line in said) == 1
    assert passes == [8, 8, 8, 8, 3] and bits(results) == expected


def test_memory_that_runs_out_later_halves_batches_from_the_last_commit_on(tiny, tmp_path, monkeypatch, said, passes):
    whole, halved = (bits(run(tiny, tmp_path / str(n), replace(CONFIG, device="cpu", batch_size=n))) for n in (4, 2))
    del passes[:]
    monkeypatch.setattr(torch, "compile", lambda *_, **__: pytest.fail("compiled, though nobody asked for it"))
    honest, commits = Store.commit, []
    with pretended_cuda() as device:

        def commit(self, stops):
            commits.append(stops)
            honest(self, stops)
            if len(commits) == 1:
                device.refuse_memory(larger_than=3 * INPUT, times=1)

        monkeypatch.setattr(Store, "commit", commit)
        (result,) = run(tiny, tmp_path / "cuda")
    assert said.count("test_resnet: the device's memory is too small for 4 images; 2 a batch") == 1
    n_whole = 35 - sum(n for n in passes if n < 4)  # of the store's rows, before memory ran out
    assert n_whole in (8, 16, 24, 32) and result.n_new == 35
    for name, found in bits([result]).items():
        at = n_whole * len(found) // 35
        assert found == whole[name][:at] + halved[name][at:]


def test_a_device_too_small_for_one_image_or_for_the_network_is_refused(tiny, tmp_path, monkeypatch, said):
    def refuse(self, pixels):
        raise torch.OutOfMemoryError("CUDA out of memory.")

    with pretended_cuda() as device, monkeypatch.context() as patch:
        patch.setattr(TorchBackbone, "normalise", refuse)
        with pytest.raises(ConfigError, match="--batch-size 1: expected memory of the device for an image of 64 px"):
            run(tiny, tmp_path)
        assert sum("the device's memory is too small for" in line for line in said) == 2
        device.limit_memory(10_000)
        with pytest.raises(ConfigError, match="--device cuda: expected memory of the device for the network"):
            run(tiny, tmp_path)


def test_an_interrupted_run_on_the_device_ends_bit_equal(tiny, tmp_path, monkeypatch):
    honest, passes = extract_module._forward, []

    def stopping(*args):
        passes.append(1)
        if len(passes) == 5:
            raise KeyboardInterrupt
        return honest(*args)

    with pretended_cuda():
        whole = bits(run(tiny, tmp_path / "whole"))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(extract_module, "_forward", stopping)
            run(tiny, tmp_path / "stopped")
        (again,) = run(tiny, tmp_path / "stopped")
    assert again.n_new == again.n_images - 16 and bits([again]) == whole


def test_a_layer_beyond_float16_on_the_device_is_stored_as_float32(tiny, tmp_path, monkeypatch):
    honest = TorchBackbone.read

    def loud(self, images, taps):
        rows = honest(self, images, taps)
        if len(images) > 1 and torch.equal(images[-1], images[-2]):  # the last batch, which is filled up
            rows["layer2"] = rows["layer2"] + 1e6
        return rows

    monkeypatch.setattr(TorchBackbone, "read", loud)
    expected = bits(run(tiny, tmp_path / "cpu", replace(CONFIG, device="cpu")))
    with pretended_cuda():
        results = run(tiny, tmp_path / "cuda")
    assert str(open_store(results[0].path).arrays["layer2"].dtype) == "float32" and bits(results) == expected
