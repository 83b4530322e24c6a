"""Spatial heads on cached layers find what was planted, of one subject or of several, and see nothing held out."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import featcache.cache.store
import heads.features.rows
import heads.solvers.joint
from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.splits import assign_folds
from heads.config import AdamWConfig, FitConfig, SpatialConfig
from heads.features.rows import LayerRows
from heads.features.sets import feature_sets
from heads.fit.out_of_fold import predict_surface
from heads.fit.run import fit_heads
from heads.modules.linear import LinearHead
from heads.modules.saved import tensors_under
from heads.modules.spatial import SpatialReadout
from heads.scores.losses import LOSSES
from heads.scores.metrics import pearson_r
from heads.solvers.gradient import Task, train_head
from heads.solvers.spatial import SpatialTraining, leading_vectors
from heads.solvers.trained import predict
from support.layered import (
    N_FOLDS,
    N_TEST,
    N_TRAIN,
    N_VERTICES,
    SHAPES,
    ids_of,
    joint,
    responses_of,
    store_of,
    trainee_of,
    values_of,
)
from support.plans import assert_same_fits, block_of, plan_of

N_STREAMED, N_CHUNKS = 512, 8  # images of a streamed array, and its chunks that are in memory at once
QUICK = AdamWConfig(learning_rate=6e-2, weight_decay=0.05, epochs=6, batch_size=32, patience=6)
FEW = replace(QUICK, epochs=2)  # where only sameness is asked


def config_of(adamw=QUICK, loss="mse", seed=0, **spatial):
    settings = {"rank": 1, "token_dropout": 0.1, "smoothness": 0.0} | spatial
    return FitConfig(
        loss=loss,
        head="spatial",
        solver="adamw",
        n_folds=N_FOLDS,
        seed=seed,
        adamw=adamw,
        spatial=SpatialConfig(**settings),
    )


@pytest.fixture(scope="module")
def planted():
    """Ids, features and responses of all images; for reading."""
    values, ids = values_of(N_TRAIN + N_TEST), ids_of(N_TRAIN)
    return ids, values, responses_of(values)


@pytest.fixture(scope="module")
def trainee(planted, tmp_path_factory):
    """A subject with these, whose rows are in memory; for reading."""
    return trainee_of(tmp_path_factory.mktemp("trainee"), planted)


@pytest.fixture(scope="module")
def few_fits(trainee):
    """What a short training gives of its first surface."""
    return fits_of([trainee], config_of(FEW))


def training_of(trainees, config):
    return SpatialTraining(trainees, config, "cpu")


def fits_of(trainees, config, number=0, surface="lh", training=None):
    training = training or training_of(trainees, config)
    responses = np.array(trainees[number].subject.responses(surface))
    return training.solver(number).fit(block_of(responses, surface))


def out_of_fold(trainee, config, trainees=None, number=0):
    """{surface: predictions} as a prediction store has them."""
    solver = training_of(trainees or [trainee], config).solver(number)
    return {
        surface: predict_surface(solver, trainee.subject, surface, lambda _: None)[0]
        for surface in trainee.subject.surfaces
    }


def r_of(trainee, config, trainees=None, number=0):
    """Mean r out of fold, over the vertices of both surfaces."""
    predictions, n_train = out_of_fold(trainee, config, trainees, number), trainee.plan.n_train
    r = [pearson_r(values[:n_train], trainee.subject.responses(surface)) for surface, values in predictions.items()]
    return np.mean(np.concatenate(r))


def watched(monkeypatch):
    """The tasks of every training, one training a fold."""
    trainings, honest = [], heads.solvers.joint.train_head
    monkeypatch.setattr(
        "heads.solvers.joint.train_head",
        lambda head, tasks, *settings: trainings.append(tasks) or honest(head, tasks, *settings),
    )
    return trainings


# --- large surfaces, and devices


@pytest.mark.parametrize("space", [0, 3], ids=["separate", "shared"])
def test_vertices_that_start_in_blocks_start_as_all_together(tmp_path, monkeypatch, space):
    """Of vertices that are linear in three numbers, which a space of three has room for."""
    (trainee, _) = joint(tmp_path, 0, n_many=150, noise=0.0)
    config = config_of(replace(FEW, epochs=1, learning_rate=0.0), rank=2, space=space)
    rows = trainee.rows[0].rows(np.arange(20))
    whole = training_of([trainee], config).heads(0)[0](rows)
    monkeypatch.setattr("heads.solvers.spatial.START_NUMBERS", 5 * trainee.rows[0].n_features)  # five of 24 vertices
    parts = training_of([trainee], config).heads(0)[0](rows)
    assert pearson_r(parts.detach(), whole.detach()).min() > (0.99 if space else 0.99999)


@pytest.mark.parametrize("n_blocks", [1, 2, 5])
def test_leading_vectors_of_blocks_are_those_of_the_matrix(n_blocks):
    generator = torch.Generator().manual_seed(0)
    matrix = torch.randn(60, 4, generator=generator) @ torch.randn(4, 30, generator=generator)
    left, sizes, right = leading_vectors(matrix.tensor_split(n_blocks), 4)
    torch.testing.assert_close(left * sizes @ right.T, matrix, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(sizes, torch.linalg.svdvals(matrix)[:4], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(left.T @ left, torch.eye(4), rtol=1e-4, atol=1e-4)


def on_device(trainee):
    """The trainee with rows that are asked for on a device."""
    rows = [LayerRows(one._store, tuple(one.grids), "cuda", np.inf) for one in trainee.rows]
    for one in rows:
        one.keep_on_device(np.inf)
    return replace(trainee, rows=rows)


@pytest.mark.parametrize("space", [0, 3], ids=["separate", "shared"])
def test_memory_of_a_device_is_less_than_what_is_said_and_more_than_a_quarter_of_it(pretended_cuda, trainee, space):
    before = pretended_cuda.allocated
    config = config_of(FEW, rank=4, space=space)
    training = SpatialTraining([on_device(trainee)], config, "cuda")
    for k in range(N_FOLDS):
        training.heads(k)
    said = training.solver(0).memory(max(N_VERTICES.values()))
    assert said / 4 < pretended_cuda.peak - before < said


def test_a_step_of_training_waits_for_the_rows_of_no_image(pretended_cuda, trainee):
    training = SpatialTraining([on_device(trainee)], config_of(FEW), "cuda")
    pretended_cuda.forget()
    training.heads(0)
    assert pretended_cuda.waits_in("heads/features") == []
    assert pretended_cuda.waits_in("heads/modules/by_subject.py") == []


# --- one subject


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "space", "loss"), [(1, 0, "mse"), (2, 0, "smooth_l1+mnnpc"), (1, 12, "pearson")])
def test_one_place_of_one_layer_is_predicted_out_of_fold_and_on_test_images(trainee, planted, rank, space, loss):
    found = out_of_fold(trainee, config_of(loss=loss, rank=rank, space=space))
    for surface, truth in planted[2].items():
        assert found[surface].shape == truth.shape and found[surface].dtype == np.float32
        r = [pearson_r(found[surface][part], truth[part]) for part in (slice(N_TRAIN), slice(N_TRAIN, None))]
        assert r[0].mean() > 0.65 and r[1].mean() > 0.65  # the noise leaves about 0.89


@pytest.mark.slow
def test_there_is_nothing_to_predict_in_noise(tmp_path, planted):
    ids, values, responses = planted
    order = np.random.default_rng(5).permutation(N_TRAIN)
    trainee = trainee_of(tmp_path, (ids, values, {h: one[:N_TRAIN][order] for h, one in responses.items()}))
    assert abs(r_of(trainee, config_of())) < 0.12


@pytest.mark.slow
def test_responses_of_a_fold_have_no_say_in_its_predictions(tmp_path, planted, trainee):
    ids, values, responses = planted
    held_out = assign_folds(ids, N_FOLDS, 0) == 1
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[:N_TRAIN][held_out] = 50 * np.random.default_rng(0).normal(size=(held_out.sum(), one.shape[1]))
    trainees = [trainee, trainee_of(tmp_path, (ids, values, moved))]
    trainings = [training_of([one], config_of(FEW)) for one in trainees]
    before, after = (fits_of([one], config_of(FEW), training=own) for one, own in zip(trainees, trainings, strict=True))
    (ours,), (theirs,) = before.folds[1].held_out, after.folds[1].held_out
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(before.folds[1].test, after.folds[1].test)
    assert not torch.allclose(before.folds[0].test, after.folds[0].test, atol=0.1)
    stored = [
        predict_surface(training.solver(0), one.subject, "lh", lambda _: None)[0]
        for one, training in zip(trainees, trainings, strict=True)
    ]
    ours, theirs = (values[:N_TRAIN][held_out] for values in stored)
    np.testing.assert_allclose(pearson_r(ours, theirs), 1, atol=1e-4)  # one level and spread for all folds, no more


@pytest.mark.slow
def test_images_that_decide_when_to_stop_are_not_trained_on(tmp_path, planted, trainee):
    ids, values, responses = planted
    config = config_of(replace(FEW, epochs=1))  # one epoch: nothing to decide
    trained, (stop,), _ = plan_of(ids, N_FOLDS).split(0, config.adamw.validation, config.seed)
    assert not np.intersect1d(trained, stop).size and len(stop) > 5
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[stop] = -one[stop]
    before, after = (fits_of([one], config) for one in (trainee, trainee_of(tmp_path, (ids, values, moved))))
    assert torch.equal(before.folds[0].test, after.folds[0].test)


@pytest.mark.slow
def test_on_trained_backbones_a_part_of_a_fold_has_no_say_in_the_head_that_predicts_it(tmp_path, planted):
    ids, _, responses = planted
    several = [values_of(N_TRAIN + N_TEST, seed) for seed in range(N_FOLDS)]
    trainee = trainee_of(tmp_path / "a", (ids, several, responses), trained=True)
    config = config_of()
    before = fits_of([trainee], config)
    assert [len(fold.held_out) for fold in before.folds] == [4] * N_FOLDS
    part = before.folds[1].held_out[2]
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[part.rows] = 50 * np.random.default_rng(0).normal(size=(len(part.rows), one.shape[1]))
    after = fits_of([trainee_of(tmp_path / "b", (ids, several, moved), trained=True)], config).folds[1].held_out[2]
    for one, other in zip(part, after, strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.slow
def test_every_image_is_predicted_once_by_a_head_of_its_fold_and_its_backbone(tmp_path, planted):
    ids, values, responses = planted
    other = values_of(N_TRAIN + N_TEST, 9)
    trainee = trainee_of(tmp_path, (ids, [values, values, other], responses), trained=True)
    fits = fits_of([trainee], config_of())
    r = []
    for k, fold in enumerate(fits.folds):
        rows = np.concatenate([piece.rows for piece in fold.held_out])
        assert sorted(rows) == np.flatnonzero(trainee.plan.folds == k).tolist()
        predictions = torch.cat([piece.predictions for piece in fold.held_out])
        r.append(pearson_r(predictions.numpy(), responses["lh"][rows]).mean())
    assert min(r[:2]) > 0.4 and r[2] < 0.3  # the third backbone says nothing of these responses


@pytest.mark.slow
def test_saved_heads_rebuild_the_test_predictions_of_their_fold(trainee):
    for space in (0, 3):
        fits = fits_of([trainee], config_of(FEW, space=space, rank=2), surface="rh")
        for k, fold in enumerate(fits.folds):
            own = {part.removeprefix("head."): t for (prefix, part), t in fits.saved.items() if prefix == f"fold{k}."}
            head = torch.nn.Sequential(SpatialReadout(SHAPES, space or N_VERTICES["rh"], rank=2))
            if space:
                head.append(torch.nn.Linear(space, N_VERTICES["rh"]))
            head.load_state_dict(own)
            (rebuilt,) = predict([head.eval()], trainee.rows[0])
            r = pearson_r(rebuilt[N_TRAIN:].numpy(), fold.test.numpy())  # what is not saved is a slope and a shift
            np.testing.assert_allclose(r[fold.test.std(0).numpy() > 1e-4], 1, atol=1e-3)


@pytest.mark.slow
def test_predictions_are_in_the_units_of_the_responses(tmp_path, planted):
    ids, values, responses = planted
    trainee = trainee_of(tmp_path, (ids, values, {h: 10 * one + 5 for h, one in responses.items()}))
    found = out_of_fold(trainee, config_of(loss="pearson"))["lh"]
    truth = 10 * responses["lh"] + 5
    assert np.sqrt(np.square(found - truth).mean()) < 0.95 * truth.std()
    np.testing.assert_allclose(found.mean(0), truth.mean(0), atol=4)


def test_a_vertex_that_never_answers_is_predicted_as_it_is(tmp_path, planted):
    ids, values, responses = planted
    silent = {surface: own * (np.arange(own.shape[1]) != 1) for surface, own in responses.items()}
    found = out_of_fold(trainee_of(tmp_path, (ids, values, silent)), config_of(FEW, "mnnpc"))
    for one in found.values():
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one[:, 1], 0, atol=1e-5)


@pytest.mark.slow
def test_ceilings_of_both_surfaces_weigh_the_loss(trainee):
    ceilings = [{h: np.full(n, 0.3, np.float32) for h, n in N_VERTICES.items()} for _ in range(2)]
    ceilings[1]["lh"][0] = 1
    tests = []
    for ceiling in ceilings:
        weighed = replace(trainee, subject=replace(trainee.subject, noise_ceiling=ceiling))
        tests.append(fits_of([weighed], config_of(FEW, "mnnpc", space=3)).folds[0].test)
    assert not torch.equal(*tests)


@pytest.mark.slow
def test_the_seed_decides_everything(trainee, few_fits):
    torch.manual_seed(99)
    assert_same_fits(few_fits, fits_of([trainee], config_of(FEW)), rtol=0, atol=0)
    other = fits_of([trainee], config_of(FEW, seed=1))
    assert not torch.equal(few_fits.folds[0].test, other.folds[0].test)


def test_both_surfaces_come_from_one_training_a_fold(trainee, monkeypatch):
    trainings = watched(monkeypatch)
    training = training_of([trainee], config_of(FEW))
    for surface in trainee.subject.surfaces:
        predict_surface(training.solver(0), trainee.subject, surface, lambda _: None)
    assert len(trainings) == N_FOLDS
    for k, (task,) in enumerate(trainings):
        assert np.array_equal(task.train_rows, training.split(0, k).train_rows)
        assert task.responses.shape[1] == sum(N_VERTICES.values())


# --- rows from the disk


@pytest.mark.slow
def test_streamed_rows_give_what_rows_in_memory_give_in_the_same_order(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(LayerRows, "shuffled", lambda self, index: index[torch.randperm(len(index))])
    kept, streamed = (trainee_of(tmp_path / str(b), planted, budget=b) for b in (np.inf, 0))
    assert kept.rows[0].streamed == [] and streamed.rows[0].streamed == list(SHAPES)
    assert_same_fits(fits_of([kept], config_of(FEW)), fits_of([streamed], config_of(FEW)), rtol=1e-5, atol=1e-5)


@pytest.mark.slow
def test_streamed_rows_predict_as_well(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 16)
    config = config_of()
    r = [r_of(trainee_of(tmp_path / str(b), planted, budget=b), config) for b in (np.inf, 0)]
    assert r[1] > 0.5 and abs(r[0] - r[1]) < 0.15


@pytest.fixture
def streaming(tmp_path, monkeypatch):
    """A store of many images, in chunks of so many rows and bytes at most, and its rows, of which none is kept."""

    def make(chunk_rows, chunk_bytes=1 << 20, n_images=N_STREAMED):
        monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", chunk_rows)
        monkeypatch.setattr(featcache.cache.store, "_CHUNK_BYTES", chunk_bytes)
        monkeypatch.setattr(heads.features.rows, "_CHUNKS", N_CHUNKS)
        values = {name: np.zeros((n_images, *shape), np.float16) for name, shape in SHAPES.items()}
        store = store_of(tmp_path / "f", values, n_images)
        return store, LayerRows(store, tuple(SHAPES), "cpu", 0)

    return make


@pytest.mark.slow
@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1600], ids=["equal chunks", "small chunks of wide rows"])
def test_an_epoch_of_streamed_rows_reads_every_chunk_about_once(streaming, monkeypatch, chunk_bytes):
    store, rows = streaming(32, chunk_bytes)
    n_chunks = sum(N_STREAMED // store.chunk_rows(name) for name in SHAPES)
    reads, honest = [], type(store).read
    monkeypatch.setattr(type(store), "read", lambda self, *part: reads.append(part) or honest(self, *part))
    index = torch.from_numpy(np.random.default_rng(0).permutation(N_STREAMED)[:350])
    for seed in range(2):
        torch.manual_seed(seed)
        order = rows.shuffled(index)
        assert sorted(order.tolist()) == sorted(index.tolist()) and order.tolist() != index.tolist()
        reads.clear()
        for batch in order[:336].split(16):
            rows[batch]
        assert len(reads) <= 2 * n_chunks


@pytest.mark.slow
def test_a_batch_of_streamed_rows_is_of_a_few_chunks_that_change_with_every_epoch(streaming):
    _, rows = streaming(8)
    torch.manual_seed(0)
    epochs = [rows.shuffled(torch.arange(N_STREAMED)) for _ in range(2)]
    first, second = ({int(row) // 8 for row in order[:32]} for order in epochs)
    assert all(4 < len(chunks) <= N_CHUNKS for chunks in (first, second)) and first != second


# --- several subjects


@pytest.mark.slow
def test_a_subject_with_few_images_gains_from_one_with_many(tmp_path):
    config, alone, together = config_of(replace(QUICK, epochs=4), space=3), [], []
    for seed in range(2):
        trainees = joint(tmp_path, seed)
        alone.append(r_of(trainees[1], config))
        together.append(r_of(trainees[1], config, trainees, 1))
    assert np.mean(together) > np.mean(alone) + 0.15, (alone, together)


@pytest.mark.slow
def test_a_few_images_of_each_are_enough_to_train_together(tmp_path):
    """Where the draw leaves a subject nothing to stop by, what is taken instead is no image that another trains on."""
    for seed in range(4):
        trainees = joint(tmp_path, seed, n_many=26, n_few=24)
        found = fits_of(trainees, config_of(replace(FEW, epochs=1), space=3, seed=seed), 1)
        assert all(fold.test.isfinite().all() for fold in found.folds)


def as_trained(trainee):
    """The trainee as if its backbone had been trained, with the same features for every fold."""
    return replace(trainee, rows=trainee.rows * N_FOLDS, plan=replace(trainee.plan, backbone_trained=True))


@pytest.mark.slow
def test_on_trained_backbones_no_subject_has_a_say_in_the_head_of_an_image_that_it_shares(tmp_path, monkeypatch):
    """However few images of a fold a subject has: its choices are of the same images as the others'."""
    trained = watched(monkeypatch)
    for seed in range(4):
        trainees = [as_trained(trainee) for trainee in joint(tmp_path, seed, n_many=40, n_few=24)]
        trained.clear()
        config = config_of(replace(FEW, epochs=1), space=3)
        training = training_of(trainees, config)
        fitted = [fits_of(trainees, config, number, training=training) for number in range(2)]
        for k in range(N_FOLDS):
            tasks, fits = trained[k], [one.folds[k] for one in fitted]
            for own, fit in zip(trainees, fits, strict=True):
                assert (
                    sorted(np.concatenate([one.rows for one in fit.held_out]))
                    == np.flatnonzero(own.plan.folds == k).tolist()
                )
                for part, piece in enumerate(fit.held_out):
                    for theirs, task in zip(trainees, tasks, strict=True):
                        seen = theirs.subject.train.ids[task.choice_rows[part]]
                        assert not np.intersect1d(own.subject.train.ids[piece.rows], seen).size


class TwoTasks(LinearHead):
    """Remembers what it was called with."""

    def __init__(self):
        super().__init__(3, 2)
        self.calls = []

    def forward(self, features, number):
        self.calls.append((number, self.training, features[:, 0].tolist()))
        return super().forward(features)[:, : number + 1]


def tasks_of(sizes=(40, 24)):
    torch.manual_seed(0)
    tasks = []
    for number, n in enumerate(sizes):
        features = torch.randn(n, 3)
        features[:, 0] = torch.arange(n) + 1000 * number
        trained, choice = np.arange(n - 8), np.arange(n - 8, n)
        tasks.append(Task(features, torch.randn(n, number + 1), trained, [choice], None))
    return tasks


def test_a_batch_is_of_one_task_and_the_head_knows_which():
    head, tasks = TwoTasks(), tasks_of()
    train_head(head, tasks, LOSSES["mse"], AdamWConfig(epochs=3, batch_size=8))
    batches = [(number, rows) for number, training, rows in head.calls if training]
    assert len(batches) == 3 * (4 + 2) and all(len(rows) == 8 for _, rows in batches)
    for number, rows in batches:
        assert all(int(row) // 1000 == number for row in rows)
    for epoch in range(3):
        own = batches[6 * epoch : 6 * epoch + 6]
        assert sorted(row for number, rows in own for row in rows) == [*range(32), *range(1000, 1016)]
    orders = [[number for number, _ in batches[6 * e : 6 * e + 6]] for e in range(3)]
    assert len({str(order) for order in orders}) > 1 or orders[0] not in ([0] * 4 + [1] * 2, [1] * 2 + [0] * 4)


def test_an_epoch_is_chosen_by_the_mean_over_all_vertices(monkeypatch):
    tasks = tasks_of()  # one vertex, and two
    scores = iter([0.9, 0.1, 0.0, 0.5, 0.3, 0.0])  # first task, second task, epoch by epoch: 0.37, 0.33, 0.1
    monkeypatch.setattr("heads.solvers.gradient._score", lambda *_: next(scores))
    kept, head = [], TwoTasks()
    monkeypatch.setattr(TwoTasks, "snapshot", lambda self: kept.append(len(kept)) or len(kept) - 1, raising=False)
    (best,) = train_head(head, tasks, LOSSES["mse"], AdamWConfig(epochs=3, batch_size=8))
    assert best == 1  # after the first epoch; 0 is before it
    scores = iter([0.9, 0.1, 0.0, 0.6, 0.3, 0.0])  # 0.37, 0.4, 0.1
    kept.clear()
    (best,) = train_head(head, tasks, LOSSES["mse"], AdamWConfig(epochs=3, batch_size=8))
    assert best == 2


# --- through fit-heads

BACKBONE = BackboneConfig(name="test_resnet", weights="none", size=64)
TINY = config_of(AdamWConfig(learning_rate=1e-2, epochs=2, batch_size=8))
TINY_JOINT = replace(TINY, spatial=SpatialConfig(space=4, rank=1))


@pytest.fixture(scope="module")
def work(tiny, tmp_path_factory):
    """A work folder with the layers of both subjects."""
    folder = tmp_path_factory.mktemp("layers")
    extract(
        open_challenge(tiny).subjects,
        ExtractConfig(backbone=BACKBONE, layers=LayerConfig(layers=("all",)), workers=1),
        folder,
    )
    return folder


@pytest.fixture
def fresh(work, tmp_path):
    """The same, with nothing fitted."""
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "features.zarr").symlink_to(work / "features.zarr")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, TINY_JOINT], ids=["alone", "joint"])
def test_spatial_heads_are_fitted_once_and_stored_whole(tiny, fresh, said, monkeypatch, config):
    subjects, calls = open_challenge(tiny).subjects, watched(monkeypatch)
    fitted = fit_heads(subjects, config, fresh)
    assert len(calls) == N_FOLDS * (2 if config is TINY else 1)
    assert [one.new for one in fitted] == [True, True] and len({one.model for one in fitted}) == 1
    for one, subject in zip(fitted, subjects, strict=True):
        store = open_store(one.path)
        assert store.complete and one.weights.is_file()
        assert np.array_equal(store.image_ids, subject.image_ids) and " spatial mse " in one.model
        others = [other.name for other in subjects if other is not subject]
        assert list(store.key.get("joint", {})) == (others if config is TINY_JOINT else [])
    again = fit_heads(subjects, config, fresh)
    assert [one.new for one in again] == [False, False] and [a.path for a in again] == [b.path for b in fitted]
    assert sum("already fitted" in line for line in said) == 2 and len(calls) <= 2 * N_FOLDS


@pytest.mark.slow
@pytest.mark.parametrize("config", [TINY, TINY_JOINT], ids=["alone", "joint"])
def test_saved_weights_rebuild_the_predictions(tiny, fresh, said, config):
    subject = open_challenge(tiny).subjects[1]
    (fitted,) = [one for one in fit_heads(open_challenge(tiny).subjects, config, fresh) if one.subject == "subj02"]
    store, saved = open_store(fitted.path), load_file(fitted.weights)
    features = open_store(fresh / "features.zarr" / store.facts["features"])
    rows = LayerRows(features, tuple(features.arrays), "cpu", np.inf)
    n_train, folds = store.n_train, assign_folds(subject.train.ids, N_FOLDS, 0)
    for surface in subject.surfaces:
        for k in range(N_FOLDS):
            own = tensors_under(saved, f"fold{k}.{surface}.head.")
            head = torch.nn.Sequential(SpatialReadout(rows.shapes, len(own["0.bias"]), config.spatial.rank))
            if "1.weight" in own:
                head.append(torch.nn.Linear(4, subject.n_vertices[surface]))
            head.load_state_dict(own)
            (values,) = predict([head.eval()], rows)
            out = store.read(surface)[:n_train][folds == k]
            varies = out.std(0) > 1e-4  # a slope below 0 is 0
            np.testing.assert_allclose(
                pearson_r(values[:n_train][folds == k][:, varies].numpy(), out[:, varies]), 1, atol=2e-3
            )
            assert varies.mean() > 0.2


@pytest.mark.slow
def test_a_joint_store_is_another_when_another_subjects_responses_are(tree, fresh, said):
    subjects = open_challenge(tree).subjects
    before = fit_heads(subjects, TINY_JOINT, fresh)
    (alone,) = fit_heads(subjects[:1], TINY_JOINT, fresh)
    assert alone.new and alone.path != before[0].path
    path = subjects[1].response_paths["lh"]
    np.save(path, np.load(path) * 2)
    after = fit_heads(open_challenge(tree).subjects, TINY_JOINT, fresh)
    assert all(one.new for one in after) and {a.path for a in after}.isdisjoint(b.path for b in before)
    assert {one.model for one in after} == {one.model for one in before}


@pytest.mark.slow
def test_a_joint_training_of_several_models_is_done_once_for_all_subjects(tiny, fresh, said, monkeypatch):
    """Models and subjects are two loops, and only the last training is kept."""
    calls = watched(monkeypatch)
    layers = [name for name in feature_sets(open_challenge(tiny).subjects[0], fresh)[0].names if name != "pooled"][:2]
    subjects = open_challenge(tiny).subjects
    monkeypatch.setattr(
        "heads.features.sets.FeatureSet.reading", lambda self, _: [replace(self, arrays=(layer,)) for layer in layers]
    )
    fitted = fit_heads(subjects, replace(TINY_JOINT, layers="each"), fresh)
    assert len(fitted) == 4 and len({one.model for one in fitted}) == 2
    assert len(calls) == 2 * N_FOLDS
