"""Spatial heads on cached layers find what was planted, of one subject or of several, and see nothing held out."""

from contextlib import suppress
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import featcache.cache.store
import heads.features.rows
from featcache.cache.extract import extract
from featcache.cache.store import Row, create_store, open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge, response_files
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import ImageFiles, Subject
from featcache.errors import ConfigError, LeakError
from heads.backbones.stages import train_stage
from heads.config import AdamWConfig, FitConfig, SpatialConfig, StageConfig, TrainConfig
from heads.features.rows import LayerRows
from heads.features.sets import feature_sets
from heads.fit.run import fit_heads
from heads.modules.linear import LinearHead
from heads.modules.saved import spatial_head_of
from heads.modules.spatial import SpatialReadout
from heads.scores.losses import LOSSES
from heads.scores.metrics import pearson_r
from heads.solvers.base import cross_validate
from heads.solvers.gradient import Task, stop_split, train_head
from heads.solvers.registry import trained_heads
from heads.solvers.spatial import Member, SpatialFolds, predict

SHAPES = {"pooled": (5,), "near": (4, 4, 6), "far": (3, 3, 8)}
PLACE = {"lh": (1, 2), "rh": (3, 0)}  # of the layer `near`, which every vertex of a hemisphere looks at
N_FOLDS, N_TRAIN, N_TEST = 3, 180, 40
N_VERTICES = {"lh": 6, "rh": 4}
QUICK = AdamWConfig(learning_rate=6e-2, weight_decay=0.05, epochs=15, batch_size=16, patience=15)
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


def ids_of(n, seed=0):
    return np.random.default_rng(seed).permutation(73_000)[:n]


def values_of(n, seed=0):
    rng = np.random.default_rng(seed)
    return {
        name: (3 * rng.normal(size=(n, *shape)) + rng.normal(size=shape[-1])).astype(
            np.float16 if len(shape) > 1 else np.float32
        )
        for name, shape in SHAPES.items()
    }


def store_of(folder, values, n_train=N_TRAIN):
    rows = {name: Row(one.shape[1:], str(one.dtype)) for name, one in values.items()}
    n, number = len(values["near"]), len(list(folder.iterdir())) if folder.is_dir() else 0
    store = create_store(folder, "f", {"number": number}, np.arange(n), n_train, rows, {})
    step = max(store.chunk_rows(name) for name in rows)
    for start in range(0, n, step):
        store.append({name: one[start : start + step] for name, one in values.items()})
    return store


def rows_of(folder, values, budget=np.inf, n_train=N_TRAIN):
    return LayerRows(store_of(folder, values, n_train), tuple(values), "cpu", budget)


def responses_of(values, noise=0.7, seed=1):
    """{hemisphere: (n_images, n_vertices)}: a mixture of the channels at one place of `near`, and noise."""
    rng = np.random.default_rng(seed)
    found = {}
    for hemisphere, (i, j) in PLACE.items():
        seen = values["near"][:, i, j].astype(np.float64)
        signal = seen @ rng.normal(size=(seen.shape[1], N_VERTICES[hemisphere]))
        signal = (signal - signal.mean(0)) / signal.std(0)
        found[hemisphere] = (2 + signal + noise * rng.normal(size=signal.shape)).astype(np.float32)
    return found


def subject_of(folder, name, ids, responses, ceiling=None):
    """What spatial folds ask of a subject: responses in files, like any other's."""
    test_ids = np.arange(80_000, 80_000 + N_TEST)
    splits = [ImageFiles(tuple(folder / str(one) for one in own), own) for own in (ids, test_ids)]
    n_vertices = {h: one.shape[1] for h, one in responses.items()}
    nothing = dict.fromkeys(HEMISPHERES)
    subject = Subject(
        name,
        *splits,
        response_files(folder / name),
        n_vertices,
        {h: {} for h in n_vertices},
        ceiling or nothing,
        nothing,
    )
    for hemisphere, values in responses.items():
        path = subject.response_paths[hemisphere]
        path.parent.mkdir(parents=True, exist_ok=True)
        np.save(path, values[: len(ids)].astype(np.float32))
    return subject


@pytest.fixture
def planted(tmp_path):
    """Ids, features and responses of all images, and a member of them."""
    values, ids = values_of(N_TRAIN + N_TEST), ids_of(N_TRAIN)
    return ids, values, responses_of(values)


def member_of(folder, planted, trained=False, budget=np.inf, name="subj01"):
    ids, values, responses = planted
    subject = subject_of(folder, name, ids, responses)
    several = values if isinstance(values, list) else [values]
    rows = [rows_of(folder / "f", one, budget, len(ids)) for one in several]
    return Member(subject, rows, assign_folds(ids, N_FOLDS, 0), list(range(N_FOLDS)), trained)


def fits_of(members, config, number=0, hemisphere="lh", folds=None):
    folds = folds or SpatialFolds(members, config, "cpu")
    responses = torch.from_numpy(np.array(members[number].subject.responses(hemisphere)))
    return folds.of(number).fit(responses, hemisphere=hemisphere)


def out_of_fold(member, config, members=None, number=0):
    """{hemisphere: predictions} as a prediction store has them."""
    fits = SpatialFolds(members or [member], config, "cpu").of(number)
    return {h: cross_validate(fits, member.subject, h, lambda _: None)[0] for h in HEMISPHERES}


def r_of(member, config, members=None, number=0):
    """Mean r out of fold, over the vertices of both hemispheres."""
    found, n = out_of_fold(member, config, members, number), len(member.folds)
    return np.mean(np.concatenate([pearson_r(found[h][:n], member.subject.responses(h)) for h in HEMISPHERES]))


def assert_same(ours, theirs, **tolerance):
    for a, b in zip(ours.folds, theirs.folds, strict=True):
        torch.testing.assert_close(a.test, b.test, **tolerance)
        for one, other in zip(a.held_out, b.held_out, strict=True):
            assert np.array_equal(one.rows, other.rows)
            torch.testing.assert_close(one.predictions, other.predictions, **tolerance)


# --- one subject


@pytest.mark.parametrize(("rank", "space", "loss"), [(1, 0, "mse"), (2, 0, "smooth_l1+mnnpc"), (1, 12, "pearson")])
def test_one_place_of_one_layer_is_predicted_out_of_fold_and_on_test_images(tmp_path, planted, rank, space, loss):
    member = member_of(tmp_path, planted)
    found = out_of_fold(member, config_of(loss=loss, rank=rank, space=space))
    for hemisphere, truth in planted[2].items():
        assert found[hemisphere].shape == truth.shape and found[hemisphere].dtype == np.float32
        r = [pearson_r(found[hemisphere][part], truth[part]) for part in (slice(N_TRAIN), slice(N_TRAIN, None))]
        assert r[0].mean() > 0.6 and r[1].mean() > 0.6  # the noise leaves about 0.82


def test_there_is_nothing_to_predict_in_noise(tmp_path, planted):
    ids, values, responses = planted
    order = np.random.default_rng(5).permutation(N_TRAIN)
    member = member_of(tmp_path, (ids, values, {h: one[:N_TRAIN][order] for h, one in responses.items()}))
    assert abs(r_of(member, config_of())) < 0.12


def test_responses_of_a_fold_have_no_say_in_its_predictions(tmp_path, planted):
    ids, values, responses = planted
    held_out = assign_folds(ids, N_FOLDS, 0) == 1
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[:N_TRAIN][held_out] = 50 * np.random.default_rng(0).normal(size=(held_out.sum(), one.shape[1]))
    members = [member_of(tmp_path / str(k), (ids, values, one)) for k, one in enumerate((responses, moved))]
    before, after = (fits_of([member], config_of(FEW)) for member in members)
    (ours,), (theirs,) = before.folds[1].held_out, after.folds[1].held_out
    for one, other in zip(ours, theirs, strict=True):
        np.testing.assert_array_equal(one, other)
    assert torch.equal(before.folds[1].test, after.folds[1].test)
    assert not torch.allclose(before.folds[0].test, after.folds[0].test, atol=0.1)
    stored = [out_of_fold(member, config_of(FEW))["lh"][:N_TRAIN][held_out] for member in members]
    np.testing.assert_allclose(pearson_r(*stored), 1, atol=1e-4)  # one level and spread for all folds, no more


def test_images_that_decide_when_to_stop_are_not_trained_on(tmp_path, planted):
    ids, values, responses = planted
    config = config_of(replace(FEW, epochs=1))  # one epoch: nothing to decide
    trained, stop = stop_split(ids, assign_folds(ids, N_FOLDS, 0), 0, config)
    assert not np.intersect1d(trained, stop).size and len(stop) > 5
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[stop] = -one[stop]
    before, after = (
        fits_of([member_of(tmp_path / str(k), (ids, values, one))], config) for k, one in enumerate((responses, moved))
    )
    assert torch.equal(before.folds[0].test, after.folds[0].test)


def test_on_trained_backbones_a_part_of_a_fold_has_no_say_in_the_head_that_predicts_it(tmp_path, planted):
    ids, _, responses = planted
    several = [values_of(N_TRAIN + N_TEST, seed) for seed in range(N_FOLDS)]
    member = member_of(tmp_path / "a", (ids, several, responses), trained=True)
    config = config_of(replace(QUICK, epochs=8))
    before = fits_of([member], config)
    assert [len(fold.held_out) for fold in before.folds] == [4] * N_FOLDS
    part = before.folds[1].held_out[2]
    moved = {h: one.copy() for h, one in responses.items()}
    for one in moved.values():
        one[part.rows] = 50 * np.random.default_rng(0).normal(size=(len(part.rows), one.shape[1]))
    after = fits_of([member_of(tmp_path / "b", (ids, several, moved), trained=True)], config).folds[1].held_out[2]
    for one, other in zip(part, after, strict=True):
        np.testing.assert_array_equal(one, other)


def test_every_image_is_predicted_once_by_a_head_of_its_fold_and_its_backbone(tmp_path, planted):
    ids, values, responses = planted
    other = values_of(N_TRAIN + N_TEST, 9)
    member = member_of(tmp_path, (ids, [values, values, other], responses), trained=True)
    fits = fits_of([member], config_of(replace(QUICK, epochs=12)))
    r = []
    for k, fold in enumerate(fits.folds):
        rows = np.concatenate([piece.rows for piece in fold.held_out])
        assert sorted(rows) == np.flatnonzero(member.folds == k).tolist()
        predictions = torch.cat([piece.predictions for piece in fold.held_out])
        r.append(pearson_r(predictions.numpy(), responses["lh"][rows]).mean())
    assert min(r[:2]) > 0.4 and r[2] < 0.3  # the third backbone says nothing of these responses


def test_saved_heads_rebuild_the_test_predictions_of_their_fold(tmp_path, planted):
    member = member_of(tmp_path, planted)
    for space in (0, 3):
        fits = fits_of([member], config_of(FEW, space=space, rank=2), hemisphere="rh")
        for k, fold in enumerate(fits.folds):
            own = {part.removeprefix("head."): t for (prefix, part), t in fits.saved.items() if prefix == f"fold{k}."}
            head = torch.nn.Sequential(SpatialReadout(SHAPES, space or N_VERTICES["rh"], rank=2))
            if space:
                head.append(torch.nn.Linear(space, N_VERTICES["rh"]))
            head.load_state_dict(own)
            (rebuilt,) = predict([head.eval()], member.rows[0])
            r = pearson_r(rebuilt[N_TRAIN:].numpy(), fold.test.numpy())  # what is not saved is a slope and a shift
            np.testing.assert_allclose(r[fold.test.std(0).numpy() > 1e-4], 1, atol=1e-3)


def test_predictions_are_in_the_units_of_the_responses(tmp_path, planted):
    ids, values, responses = planted
    member = member_of(tmp_path, (ids, values, {h: 10 * one + 5 for h, one in responses.items()}))
    found = out_of_fold(member, config_of(loss="pearson"))["lh"]
    truth = 10 * responses["lh"] + 5
    assert np.sqrt(np.square(found - truth).mean()) < 0.95 * truth.std()
    np.testing.assert_allclose(found.mean(0), truth.mean(0), atol=4)


def test_a_vertex_that_never_answers_is_predicted_as_it_is(tmp_path, planted):
    ids, values, responses = planted
    for one in responses.values():
        one[:, 1] = 0
    found = out_of_fold(member_of(tmp_path, (ids, values, responses)), config_of(FEW, "mnnpc"))
    for one in found.values():
        assert np.isfinite(one).all()
        np.testing.assert_allclose(one[:, 1], 0, atol=1e-5)


def test_ceilings_of_both_hemispheres_weigh_the_loss(tmp_path, planted):
    ceilings = [{h: np.full(n, 0.3, np.float32) for h, n in N_VERTICES.items()} for _ in range(2)]
    ceilings[1]["lh"][0] = 1
    tests = []
    for k, ceiling in enumerate(ceilings):
        member = member_of(tmp_path / str(k), planted)
        member = replace(member, subject=replace(member.subject, noise_ceiling=ceiling))
        tests.append(fits_of([member], config_of(FEW, "mnnpc", space=3)).folds[0].test)
    assert not torch.equal(*tests)


def test_the_seed_decides_everything(tmp_path, planted):
    member = member_of(tmp_path, planted)
    one = fits_of([member], config_of(FEW))
    torch.manual_seed(99)
    assert_same(one, fits_of([member], config_of(FEW)), rtol=0, atol=0)
    other = fits_of([member], config_of(FEW, seed=1))
    assert not torch.equal(one.folds[0].test, other.folds[0].test)


def test_both_hemispheres_come_from_one_training_a_fold(tmp_path, planted, monkeypatch):
    calls, honest = [], SpatialFolds._train
    monkeypatch.setattr(SpatialFolds, "_train", lambda self, k: calls.append(k) or honest(self, k))
    member = member_of(tmp_path, planted)
    folds = SpatialFolds([member], config_of(FEW), "cpu")
    fits = folds.of(0)
    for hemisphere in HEMISPHERES:
        cross_validate(fits, member.subject, hemisphere, lambda _: None)
    assert calls == [0, 1, 2]


# --- rows from the disk


def test_streamed_rows_give_what_rows_in_memory_give_in_the_same_order(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 16)
    monkeypatch.setattr(LayerRows, "shuffled", lambda self, index: index[torch.randperm(len(index))])
    kept, streamed = (member_of(tmp_path / str(b), planted, budget=b) for b in (np.inf, 0))
    assert kept.rows[0].streamed == [] and streamed.rows[0].streamed == list(SHAPES)
    assert_same(fits_of([kept], config_of(FEW)), fits_of([streamed], config_of(FEW)), rtol=1e-5, atol=1e-5)


def test_streamed_rows_predict_as_well(tmp_path, planted, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 16)
    config = config_of(replace(QUICK, epochs=12))
    r = [r_of(member_of(tmp_path / str(b), planted, budget=b), config) for b in (np.inf, 0)]
    assert r[1] > 0.5 and abs(r[0] - r[1]) < 0.15


def big_rows(folder, monkeypatch, chunk_bytes, n=1024):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_BYTES", chunk_bytes)
    return rows_of(folder, {name: np.zeros((n, *shape), np.float16) for name, shape in SHAPES.items()}, 0, n)


@pytest.mark.parametrize("chunk_bytes", [1 << 20, 1600], ids=["equal chunks", "small chunks of wide rows"])
def test_an_epoch_of_streamed_rows_reads_every_chunk_about_once(tmp_path, monkeypatch, chunk_bytes):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 64)
    rows = big_rows(tmp_path / "f", monkeypatch, chunk_bytes)
    steps = {name: rows._store.chunk_rows(name) for name in SHAPES}
    reads, honest = [], type(rows._store).read
    monkeypatch.setattr(type(rows._store), "read", lambda self, *about: reads.append(about) or honest(self, *about))
    index = torch.from_numpy(np.random.default_rng(0).permutation(1024)[:700])
    for seed in range(2):
        torch.manual_seed(seed)
        order = rows.shuffled(index)
        assert sorted(order.tolist()) == sorted(index.tolist()) and order.tolist() != index.tolist()
        reads.clear()
        for batch in order[:672].split(32):
            rows[batch]
        assert len(reads) <= 2 * sum(1024 // step for step in steps.values())


def test_a_batch_of_streamed_rows_is_of_a_few_chunks_that_change_with_every_epoch(tmp_path, monkeypatch):
    monkeypatch.setattr(featcache.cache.store, "_CHUNK_ROWS", 16)
    rows = big_rows(tmp_path / "f", monkeypatch, 1 << 20)
    torch.manual_seed(0)
    epochs = [rows.shuffled(torch.arange(1024)) for _ in range(2)]
    seen = [{int(row) // 16 for row in order[:64]} for order in epochs]
    assert all(4 < len(one) <= heads.features.rows._CHUNKS for one in seen) and seen[0] != seen[1]


# --- several subjects


def joint(folder, seed, n_few=36, n_many=300, noise=1.0):
    """Two subjects whose vertices are linear in the same three numbers of an image; the second saw few images."""
    rng = np.random.default_rng(seed)
    channels = rng.normal(size=(3, 6, 1))
    members = []
    for number, n in enumerate((n_many, n_few)):
        values = values_of(n + N_TEST, 10 * seed + number)
        near = values["near"].astype(np.float64) - values["near"].mean((0, 1, 2), dtype=np.float64)
        latent = np.concatenate([near[:, i, j] @ channels[k] for k, (i, j) in enumerate([(0, 1), (2, 2), (3, 0)])], 1)
        latent /= latent.std(0)
        responses = {}
        for h in HEMISPHERES:
            signal = latent @ rng.normal(size=(3, 12))
            signal /= signal.std(0)
            responses[h] = signal + noise * rng.normal(size=signal.shape)
        ids = ids_of(n_many, seed)
        if number:  # of the first's images, and, unless there are too few, 9 that decide when to stop
            stop = assign_folds(ids, 10, 1) == 0
            ids = ids[np.argsort(~stop, kind="stable")][stop.sum() - 9 :][:n] if stop.sum() > 9 else ids[:n]
        members.append(member_of(folder / f"{seed}-{number}", (ids, values, responses), name=f"subj0{number + 1}"))
    return members


def test_a_subject_with_few_images_gains_from_one_with_many(tmp_path):
    config, alone, together = config_of(replace(QUICK, epochs=12), space=3), [], []
    for seed in range(2):
        members = joint(tmp_path, seed)
        alone.append(r_of(members[1], config))
        together.append(r_of(members[1], config, members, 1))
    assert np.mean(together) > np.mean(alone) + 0.15, (alone, together)


def test_an_image_is_in_the_same_fold_of_every_subject_that_saw_it(tmp_path):
    one, other = joint(tmp_path, 0)
    _, ours, theirs = np.intersect1d(one.subject.train.ids, other.subject.train.ids, return_indices=True)
    assert len(ours) == 36 and np.array_equal(one.folds[ours], other.folds[theirs])


def test_responses_of_a_fold_reach_its_predictions_through_no_subject(tmp_path):
    members = joint(tmp_path, 0, n_many=120, n_few=90)
    config = config_of(FEW, space=3)
    before = [fits_of(members, config, number) for number in (0, 1)]
    for member in members:
        path = member.subject.response_paths["lh"]
        responses = np.load(path)
        responses[member.folds == 1] *= -50
        np.save(path, responses)
    for number in (0, 1):
        after = fits_of(members, config, number)
        assert torch.equal(before[number].folds[1].held_out[0].predictions, after.folds[1].held_out[0].predictions)
        assert not torch.equal(before[number].folds[0].test, after.folds[0].test)


def test_folds_by_subject_are_refused(tmp_path):
    """An image that one subject is scored on may not be one that another is trained on."""
    one, other = joint(tmp_path, 0, n_many=120, n_few=90)
    other = replace(other, folds=(other.folds + 1) % N_FOLDS)
    with pytest.raises(LeakError):
        SpatialFolds([one, other], config_of(replace(FEW, epochs=1), space=3), "cpu").heads(0)


def test_no_subject_is_trained_on_what_another_chooses_by(tmp_path, monkeypatch):
    """Where images to stop by were drawn by subject it is refused, or they are left out of every training."""

    def by_row(ids, folds, fold, config):
        outside = np.flatnonzero(folds != fold)
        return outside[len(ids) // 4 :], outside[: len(ids) // 4]

    seen = []
    monkeypatch.setattr("heads.solvers.spatial.stop_split", by_row)
    monkeypatch.setattr("heads.solvers.spatial.train_head", lambda head, tasks, *about: seen.extend(tasks) or [head])
    members = joint(tmp_path, 0, n_many=120, n_few=90)
    with suppress(LeakError):
        SpatialFolds(members, config_of(FEW, space=3), "cpu").heads(0)
    ids = [member.subject.train.ids for member in members]
    trained = [own[task.trained] for own, task in zip(ids, seen, strict=False)]
    chosen = [own[task.choices[0]] for own, task in zip(ids, seen, strict=False)]
    assert not seen or not np.intersect1d(np.concatenate(trained), np.concatenate(chosen)).size


def test_a_few_images_of_each_are_enough_to_train_together(tmp_path):
    """Where the draw leaves a subject nothing to stop by, what is taken instead is no image that another trains on."""
    for seed in range(4):
        members = joint(tmp_path, seed, n_many=26, n_few=24)
        found = fits_of(members, config_of(replace(FEW, epochs=1), space=3, seed=seed), 1)
        assert all(fold.test.isfinite().all() for fold in found.folds)


def test_on_trained_backbones_no_subject_has_a_say_in_the_head_of_an_image_that_it_shares(tmp_path, monkeypatch):
    """However few images of a fold a subject has: its choices are of the same images as the others'."""
    trained = []
    monkeypatch.setattr(
        "heads.solvers.spatial.train_head",
        lambda head, tasks, *about: trained.append(tasks) or train_head(head, tasks, *about),
    )
    for seed in range(4):
        members = [replace(member, trained=True) for member in joint(tmp_path, seed, n_many=40, n_few=24)]
        trained.clear()
        folds = SpatialFolds(members, config_of(replace(FEW, epochs=1), space=3), "cpu")
        fitted = [fits_of(members, folds.config, number, folds=folds) for number in range(2)]
        for k in range(N_FOLDS):
            tasks, fits = trained[k], [one.folds[k] for one in fitted]
            for own, fit in zip(members, fits, strict=True):
                assert (
                    sorted(np.concatenate([one.rows for one in fit.held_out]))
                    == np.flatnonzero(own.folds == k).tolist()
                )
                for part, piece in enumerate(fit.held_out):
                    for theirs, task in zip(members, tasks, strict=True):
                        seen = theirs.subject.train.ids[task.choices[part]]
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


def counted(monkeypatch):
    calls, honest = [], SpatialFolds._train
    monkeypatch.setattr(SpatialFolds, "_train", lambda self, k: calls.append(k) or honest(self, k))
    return calls


@pytest.mark.parametrize("config", [TINY, TINY_JOINT], ids=["alone", "joint"])
def test_spatial_heads_are_fitted_once_and_stored_whole(tiny, fresh, said, monkeypatch, config):
    subjects, calls = open_challenge(tiny).subjects, counted(monkeypatch)
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


@pytest.mark.parametrize("config", [TINY, TINY_JOINT], ids=["alone", "joint"])
def test_saved_weights_rebuild_the_predictions(tiny, fresh, said, config):
    subject = open_challenge(tiny).subjects[1]
    (fitted,) = [one for one in fit_heads(open_challenge(tiny).subjects, config, fresh) if one.subject == "subj02"]
    store, saved = open_store(fitted.path), load_file(fitted.weights)
    features = open_store(fresh / "features.zarr" / store.facts["features"])
    rows = LayerRows(features, tuple(features.arrays), "cpu", np.inf)
    n_train, folds = store.n_train, assign_folds(subject.train.ids, N_FOLDS, 0)
    for hemisphere in HEMISPHERES:
        for k in range(N_FOLDS):
            own = {key.split(".head.")[1]: v for key, v in saved.items() if key.startswith(f"fold{k}.{hemisphere}.")}
            head = torch.nn.Sequential(SpatialReadout(rows.shapes, len(own["0.bias"]), config.spatial.rank))
            if "1.weight" in own:
                head.append(torch.nn.Linear(4, subject.n_vertices[hemisphere]))
            head.load_state_dict(own)
            (values,) = predict([head.eval()], rows)
            out = store.read(hemisphere)[:n_train][folds == k]
            varies = out.std(0) > 1e-4  # a slope below 0 is 0
            np.testing.assert_allclose(
                pearson_r(values[:n_train][folds == k][:, varies].numpy(), out[:, varies]), 1, atol=2e-3
            )
            assert varies.mean() > 0.2


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


def test_a_joint_training_of_several_models_is_done_once_for_all_subjects(tiny, fresh, said, monkeypatch):
    """Models and subjects are two loops, and only the last training is kept."""
    calls = counted(monkeypatch)
    layers = [name for name in feature_sets(open_challenge(tiny).subjects[0], fresh)[0].names if name != "pooled"][:2]
    subjects = open_challenge(tiny).subjects
    monkeypatch.setattr(
        "heads.features.sets.FeatureSet.reading", lambda self, _: [replace(self, arrays=(layer,)) for layer in layers]
    )
    fitted = fit_heads(subjects, replace(TINY_JOINT, layers="each"), fresh)
    assert len(fitted) == 4 and len({one.model for one in fitted}) == 2
    assert len(calls) == 2 * N_FOLDS


# --- heads that came with their backbones

SMALL = BackboneConfig(name="test_resnet", weights="none", size=32)
SPATIAL = TrainConfig(head="spatial", epochs=1, batch_size=4, stop="never", layers="0,pooled", grid="2")


@pytest.fixture(scope="module")
def checkpoints(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoints")
    subjects = open_challenge(tiny).subjects[:1]
    stage = StageConfig(
        stage="finetune", train=SPATIAL, backbone=SMALL, init="none", n_folds=2, device="cpu", workers=1
    )
    return folder, [one.checkpoint for one in train_stage(subjects, stage, folder)]


def extracted(tiny, checkpoints, tmp_path, layers, grid):
    folder = tmp_path / "work"
    folder.mkdir()
    (folder / "checkpoints").symlink_to(checkpoints[0] / "checkpoints")
    subjects = open_challenge(tiny).subjects[:1]
    config = ExtractConfig(
        backbone=SMALL, layers=LayerConfig(layers=layers, grid=grid), checkpoint="auto", workers=1, device="cpu"
    )
    extract(subjects, config, folder)
    return subjects, folder


def test_spatial_heads_of_a_checkpoint_predict_what_the_encoder_did(tiny, checkpoints, tmp_path, said):
    from featcache.cache.pixels import cache_pixels

    subjects, folder = extracted(tiny, checkpoints, tmp_path, ("0", "pooled"), "2")
    subject, (one,) = subjects[0], feature_sets(subjects[0], folder)
    folds = one.folds(subject)
    predictor = trained_heads(subject, one, folds, "cpu", folder)
    (fitted,) = fit_heads(subjects, FitConfig(solver="trained"), folder)
    store = open_store(fitted.path)
    for checkpoint in checkpoints[1]:
        k, backbone = checkpoint.fold["fold"], checkpoint.backbone()
        held_out = np.flatnonzero(folds == k)
        assert not np.isin(subject.train.ids[held_out], checkpoint.seen_ids).any()
        (pixels,) = cache_pixels([subject], backbone, tmp_path, 1.0, 1)
        with torch.inference_mode():
            rows = backbone.read(backbone.normalise(pixels.read(held_out)), backbone.taps(SPATIAL.tapped))
        for hemisphere in HEMISPHERES:
            head = spatial_head_of(checkpoint.heads(), [subject.name], subject.name, hemisphere)
            responses = torch.from_numpy(np.array(subject.responses(hemisphere)))
            (piece,) = predictor.fit(responses, hemisphere=hemisphere).folds[k].held_out
            assert np.array_equal(piece.rows, held_out)
            torch.testing.assert_close(piece.predictions, head(rows), rtol=1e-2, atol=1e-2)  # rows are float16
            stored = store.read(hemisphere)[: store.n_train][held_out]
            assert np.median(pearson_r(stored, head(rows).numpy())) > 0.999


def test_spatial_heads_of_a_checkpoint_are_found_among_more_layers(tiny, checkpoints, tmp_path, said):
    subjects, folder = extracted(tiny, checkpoints, tmp_path, ("0", "1", "pooled"), "2")
    (fitted,) = fit_heads(subjects, FitConfig(solver="trained"), folder)
    assert open_store(fitted.path).complete


@pytest.mark.parametrize(("layers", "grid"), [(("0", "pooled"), "3"), (("1", "pooled"), "2"), (("pooled",), "auto")])
def test_features_that_those_heads_cannot_read_are_refused(tiny, checkpoints, tmp_path, said, layers, grid):
    subjects, folder = extracted(tiny, checkpoints, tmp_path, layers, grid)
    with pytest.raises(
        ConfigError, match=r"--solver trained: expected .*; found no .*; extract with .*\(2 places"
    ) as e:
        fit_heads(subjects, FitConfig(solver="trained"), folder)
    assert "\n" not in str(e.value) and not (folder / "predictions.zarr").exists()
