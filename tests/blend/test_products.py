"""Sums that are gathered from stores are those of the predictions themselves."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import featcache.cache.store
import heads.blend.products
from heads.blend.products import Products, add_products, bytes_of, gather
from support.blends import (
    CASES,
    FOLDS,
    IDS,
    N_TRAIN,
    N_VERTICES,
    case,
    made_up,
    slow_products,
    standardised,
    stores_of,
    subject_of,
)


@pytest.fixture(params=CASES)
def data(request):
    return case(request.param)


@settings(max_examples=25, deadline=None)
@given(
    n_train=st.integers(10, 80),
    n_vertices=st.integers(1, 9),
    n_models=st.integers(1, 6),
    offset=st.sampled_from([0, 1000]),
    kind=st.sampled_from([np.float32, np.float16]),
    seed=st.integers(0, 2**32 - 1),
)
def test_batches_of_any_shape_add_up_to_the_plain_sums(n_train, n_vertices, n_models, offset, kind, seed):
    rng = np.random.default_rng(seed)
    folds = rng.integers(0, 5, n_train)  # a fold may have no image, or one
    values = (rng.normal(size=(n_models + 1, n_train, n_vertices)) + offset).astype(np.float32)
    values[:-1] = values[:-1].astype(kind)
    sums = np.zeros((5, n_vertices, n_models + 2, n_models + 2), np.float32)
    shift = np.zeros((n_vertices, n_models + 1), np.float32)
    for number, rows in enumerate(np.array_split(np.arange(n_train), 3)):
        add_products(sums, shift, [*values[:-1, rows].astype(kind), values[-1, rows]], folds[rows], first=number == 0)
    moved = np.concatenate([values - shift.astype(np.float64).T[:, None], np.ones((1, n_train, n_vertices))])
    for fold in range(5):
        own = moved[:, folds == fold]
        np.testing.assert_allclose(sums[fold], np.einsum("civ,div->vcd", own, own), atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("chunk_rows", [256, 16])
def test_products_are_gathered_from_the_stores(chunk_rows, data, tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", chunk_rows)
    predictions, responses = data
    found = gather(subject_of(tmp_path, responses), stores_of(tmp_path, predictions))
    np.testing.assert_allclose(found.products.sums, slow_products(predictions, responses).sums, atol=5e-3)


@pytest.mark.slow
def test_products_are_of_the_training_images_alone(tmp_path):
    predictions, responses = made_up()
    other = predictions.copy()
    other[:, N_TRAIN:] += 100
    one, two = (
        gather(subject_of(tmp_path / name, responses), stores_of(tmp_path / name, of_name)).products.sums
        for name, of_name in (("a", predictions), ("b", other))
    )
    np.testing.assert_array_equal(one, two)


@pytest.mark.slow
def test_units_are_mean_and_spread_of_the_columns(data, tmp_path):
    predictions, responses = data
    units = gather(subject_of(tmp_path, responses), stores_of(tmp_path, predictions)).units
    columns = np.concatenate([predictions[:, :N_TRAIN], responses[None, :N_TRAIN]]).astype(np.float64)
    constant = np.ptp(columns, axis=1) == 0
    np.testing.assert_allclose(units.mean, columns.mean(1).T, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(units.scale, np.where(constant, 1, columns.std(1)).T, rtol=1e-4)


@pytest.mark.parametrize("n_kept", [1, 3, N_VERTICES])
def test_rows_of_some_vertices_are_kept_as_they_are(n_kept, tmp_path, monkeypatch):
    predictions, responses = made_up()
    monkeypatch.setattr(heads.blend.products, "_SAMPLE_BYTES", 4 * N_TRAIN * 5 * n_kept)
    sample = gather(subject_of(tmp_path, responses), stores_of(tmp_path, predictions)).sample
    assert len(sample.vertices) == n_kept == len(set(sample.vertices.tolist()))
    columns = standardised(np.concatenate([predictions, responses[None]]))[:, :N_TRAIN, sample.vertices]
    np.testing.assert_allclose(sample.columns, columns, atol=1e-4)


@pytest.mark.parametrize("n_kept", [1, N_VERTICES])
def test_what_is_said_to_be_gathered_is_what_is_there_afterwards(n_kept, tmp_path, monkeypatch):
    predictions, responses = made_up()
    monkeypatch.setattr(heads.blend.products, "_SAMPLE_BYTES", 4 * N_TRAIN * 5 * n_kept)
    subject = subject_of(tmp_path, responses)
    found = gather(subject, stores_of(tmp_path, predictions))
    kept = found.products.sums.nbytes + found.sample.columns.nbytes
    batches = 4 * 5 * N_TRAIN * max(subject.n_vertices.values())  # four models and the responses, in one batch
    assert bytes_of(N_TRAIN, subject.n_vertices, 4) == kept + batches


def test_total_leaves_out_the_folds_that_it_should():
    predictions, responses = made_up()
    products = slow_products(predictions, responses)
    z = standardised(np.concatenate([predictions[:, :N_TRAIN], responses[None, :N_TRAIN]]))
    z = np.concatenate([z, np.ones_like(z[:1])])
    for without in ((), (3,), (0, 4)):
        own = z[:, ~np.isin(FOLDS, without)]
        plain = Products(products.sums, cross_fitted=False).total(without).sums
        np.testing.assert_allclose(plain, np.einsum("civ,div->vcd", own, own), atol=1e-9)
        free, share = products.total(without).sums, (5 - len(without)) / 4
        theirs = np.einsum("civ,iv->vc", z[:-2, np.isin(FOLDS, without)], z[-2, np.isin(FOLDS, without)])
        np.testing.assert_allclose(free[:, :-2, -2], plain[:, :-2, -2] - share * theirs, atol=1e-9)
        np.testing.assert_allclose(free[:, -2, :-2], free[:, :-2, -2])
        plain[:, :-2, -2], plain[:, -2, :-2] = free[:, :-2, -2], free[:, -2, :-2]
        np.testing.assert_allclose(free, plain, atol=1e-9)  # nothing else is touched
        n, p, pp, py, y, yy = products.total(without).of_each
        np.testing.assert_allclose([n, y, yy], [free[:, -1, -1], free[:, -2, -1], free[:, -2, -2]], atol=1e-9)
        for model in range(len(predictions)):
            own_sums = [free[:, model, -1], free[:, model, model], free[:, model, -2]]
            np.testing.assert_allclose([p[model], pp[model], py[model]], own_sums, atol=1e-9)
    np.testing.assert_array_equal(products.fold(2).sums, products.sums[2])
    np.testing.assert_array_equal(products.at(np.array([4, 1])).sums, products.sums[:, [4, 1]])


def test_covariances_are_those_of_the_columns():
    predictions, responses = made_up()
    gram, cross = Products(slow_products(predictions, responses).sums, cross_fitted=False).total((1,)).covariance
    own = FOLDS != 1
    z, y = standardised(predictions[:, :N_TRAIN])[:, own], responses[:N_TRAIN][own].astype(np.float64)
    for vertex in range(N_VERTICES):
        np.testing.assert_allclose(gram[vertex], np.cov(z[:, :, vertex], bias=True), atol=1e-9)
        expected = [np.cov(p, y[:, vertex], bias=True)[0, 1] / y[:, vertex].std() for p in z[:, :, vertex]]
        np.testing.assert_allclose(cross[vertex], expected, atol=1e-9)


def test_nothing_to_sum_is_no_fault():
    empty = Products(np.zeros((5, 2, 4, 4)))
    gram, cross = empty.total().covariance
    assert np.isfinite(gram).all() and np.isfinite(cross).all()
    assert len(IDS) == len(set(IDS.tolist()))
