"""Kernels of several layers are the inner products that their description says, whichever way they are computed."""

import numpy as np
import pytest
import torch

import heads.features.rows
import heads.solvers.layers.kernels
from featcache.cache import store as store_module
from featcache.cache.store import Row, create_store
from heads.features.rows import LayerRows
from heads.solvers.layers.kernels import BLUR, FLOOR, LayerKernels
from heads.solvers.layers.priors import DEPTHS, Prior, prior_set

N, N_TRAIN = 23, 17
SHAPES = {"pooled": (6,), "low": (5, 4, 3), "mid": (3, 3, 4), "deep.cls": (7,), "deep": (2, 2, 7)}
DEPTH = {"pooled": 1.0, "low": 0.0, "mid": 0.5, "deep.cls": 1.0, "deep": 1.0}
PRIORS = [Prior(), Prior(0.1, 0.9, 0.2), Prior(0.5, 0.3, 0.35, 0.0), Prior(depth=0.5), Prior(0.7, 0.7, 0.2, 1.0)]
WAYS = ("whole", "blocks", "small blocks", "streamed")


@pytest.fixture
def values():
    rng = np.random.default_rng(0)
    made = {
        name: (3 * rng.normal(size=shape[-1]) + rng.normal(size=(N, *shape)) * rng.uniform(0.1, 10, shape[-1]))
        for name, shape in SHAPES.items()
    }
    made["low"][..., 1] = 0.25  # a channel that says nothing
    made["low"][N_TRAIN:] += 5  # test images are of another kind
    return {name: one.astype(np.float16 if one.ndim > 2 else np.float32) for name, one in made.items()}


@pytest.fixture
def store(tmp_path, values, monkeypatch):
    monkeypatch.setattr(store_module, "_CHUNK_ROWS", 4)
    rows = {name: Row(shape, str(values[name].dtype)) for name, shape in SHAPES.items()}
    made = create_store(tmp_path, "f", {"x": 1}, np.arange(N), N_TRAIN, rows, {})
    made.append(values)
    return made


@pytest.fixture(params=WAYS)
def kernels(request, store, monkeypatch):
    return made(store, request.param, monkeypatch)


def made(store, way, monkeypatch, names=tuple(SHAPES)):
    if way in ("small blocks", "streamed"):
        monkeypatch.setattr(heads.features.rows, "BLOCK_BYTES", 4 * 60 * 5)  # 5 images of the largest layer
        monkeypatch.setattr(heads.solvers.layers.kernels, "_PRODUCT_NUMBERS", 0)
        monkeypatch.setattr(heads.solvers.layers.kernels, "_LEAST_ROWS", 5)
    rows = LayerRows(store, names, "cpu", 0 if way == "streamed" else np.inf)
    return LayerKernels(rows, np.arange(N_TRAIN), whole=way == "whole")


def slow_features(values, prior, blur=BLUR):
    """{array: (N, n_places, n_channels)} float64 that the kernel is the inner product of, loop by loop."""
    found = {}
    for name, stored in values.items():
        height, width = stored.shape[1:3] if stored.ndim > 2 else (1, 1)
        x = stored.astype(np.float64).reshape(N, height, width, -1)
        x = x - x[:N_TRAIN].mean(0)
        variance = (x[:N_TRAIN] ** 2).mean((0, 1, 2))
        spread = np.sqrt(np.maximum(variance, FLOOR * variance.mean()))
        spread[variance < 1e-12] = np.inf  # a constant says nothing
        x, blurred = x / spread, np.zeros_like(x)
        for i in range(height):
            for j in range(width):
                rows, columns = (
                    np.exp(-((np.arange(n) - at) ** 2) / (2 * (blur * n / 7) ** 2))
                    for n, at in ((height, i), (width, j))
                )
                weights = np.outer(rows / rows.sum(), columns / columns.sum())
                blurred[:, i, j] = np.einsum("hw,nhwc->nc", weights, x)
        window = prior.window((height, width)).reshape(height, width, 1)
        weighed = blurred * np.sqrt(window)
        share = prior.layer(DEPTH[name]) * N_TRAIN / (weighed[:N_TRAIN] ** 2).sum()
        found[name] = (weighed * np.sqrt(share)).reshape(N, height * width, -1)
    return found


def slow_kernel(values, prior):
    return sum(np.einsum("ipc,jpc->ij", x, x) for x in slow_features(values, prior).values())


def test_a_channel_that_hardly_varies_does_not_decide_what_an_image_is_like(tmp_path):
    """Such as one that rounding alone changes, and that is 100 times as large in one image that is held out."""
    strange, n_channels = N - 1, 6
    values = {"pooled": np.random.default_rng(3).normal(size=(N, n_channels)).astype(np.float32)}
    values["pooled"][:, 0] = 1e-3 * values["pooled"][:, 0]
    sizes = []
    for value in (0.0, 0.1):
        values["pooled"][strange, 0] = value
        made = create_store(tmp_path / str(value), "f", {}, np.arange(N), N_TRAIN, {"pooled": n_channels}, {})
        made.append(values)
        kernels = LayerKernels(LayerRows(made, ("pooled",), "cpu", np.inf), np.arange(N_TRAIN))
        sizes.append(float(kernels.kernel(Prior())[strange, strange]))
    assert abs(sizes[1] / sizes[0] - 1) < 0.1, sizes  # without a floor, the second is a thousand times the first


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_a_kernel_is_what_its_description_says(kernels, values, prior):
    np.testing.assert_allclose(kernels.kernel(prior), slow_kernel(values, prior), rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_a_kernel_is_the_inner_product_of_its_features(kernels, values, prior):
    features = kernels.features(prior).double().numpy()
    assert features.shape == (N, kernels.rows.n_features)
    expected = np.concatenate([x.reshape(N, -1) for x in slow_features(values, prior).values()], 1)
    np.testing.assert_allclose(features, expected, rtol=1e-3, atol=1e-4)
    np.testing.assert_allclose(features @ features.T, kernels.kernel(prior), rtol=1e-3, atol=1e-3)


def test_every_layer_has_its_share_of_the_trace_over_training_images(store, monkeypatch):
    for prior in PRIORS:
        for name in SHAPES:
            alone = made(store, "blocks", monkeypatch, (name,))
            trace = float(alone.kernel(prior).diagonal()[:N_TRAIN].sum())
            depth = 1.0 if name == "pooled" else 0.0  # the only layer there is counts as the first
            assert trace == pytest.approx(N_TRAIN * prior.layer(depth), rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("prior", PRIORS, ids=str)
def test_weights_on_stored_features_say_what_the_kernel_says(kernels, values, prior):
    """The difference is one number a vertex: the intercept."""
    generator = torch.Generator().manual_seed(0)
    dual = torch.randn(N, 4, generator=generator)
    dual -= dual.mean(0)
    weights = kernels.weights([prior], np.arange(N), dual[None])
    assert list(weights) == list(SHAPES)
    stored = sum(values[n].astype(np.float64).reshape(N, -1) @ w.double().numpy() for n, w in weights.items())
    expected = slow_kernel(values, prior) @ dual.double().numpy()
    difference = stored - expected
    np.testing.assert_allclose(difference, np.broadcast_to(difference.mean(0), difference.shape), atol=2e-3)
    means = sum(kernels.means[n].double().numpy().ravel() @ w.double().numpy() for n, w in weights.items())
    np.testing.assert_allclose(difference.mean(0), means, atol=2e-3)


def test_a_channel_that_says_nothing_of_training_images_has_no_weight(kernels):
    dual = torch.randn(N, 2, generator=torch.Generator().manual_seed(0))
    dual[N_TRAIN:] = 0
    weights = kernels.weights([Prior()], np.arange(N), dual[None])
    assert weights["low"].reshape(20, 3, 2)[:, 1].abs().max() == 0


@pytest.mark.slow
def test_all_ways_of_computing_agree(store, monkeypatch):
    for prior in prior_set({name: shape[:2] for name, shape in SHAPES.items() if len(shape) > 1}, DEPTHS)[::13]:
        first, *others = (made(store, way, monkeypatch).kernel(prior) for way in WAYS)
        for other in others:
            torch.testing.assert_close(other, first, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_kernels_of_some_images_are_a_part_of_the_whole(store, monkeypatch, way):
    whole, index = made(store, way, monkeypatch), np.array([1, 2, 5, 11, 16])
    columns = np.array([0, 3, 4])
    some = whole.under(PRIORS, columns, index)
    for prior, kernel in zip(PRIORS, some, strict=True):
        torch.testing.assert_close(kernel, whole.kernel(prior)[index][:, columns], rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_test_images_have_no_say_in_means_scales_and_traces(store, values, tmp_path, monkeypatch):
    other = {name: one.copy() for name, one in values.items()}
    for one in other.values():
        one[N_TRAIN:] = one[N_TRAIN:] * 7 + 3
    rows = {name: Row(shape, str(values[name].dtype)) for name, shape in SHAPES.items()}
    moved = create_store(tmp_path, "g", {"x": 2}, np.arange(N), N_TRAIN, rows, {})
    moved.append(other)
    for prior in PRIORS:
        first, second = (made(one, "blocks", monkeypatch).kernel(prior)[:N_TRAIN, :N_TRAIN] for one in (store, moved))
        assert torch.equal(first, second)
