"""Predictions on the disk are those of the encoder, readable without featcache, whole or not there."""

import csv
from dataclasses import replace

import numpy as np
import pytest
import zarr

from featcache.dataset.algonauts import open_challenge
from featcache.dataset.inputs import decoded, pictures_of
from featcache.dataset.pictures import picture_id
from featcache.errors import ConfigError, FeatcacheError, StoreError
from heads.encoder import predictions
from heads.encoder.encoder import Encoder
from heads.encoder.predictions import Wanted, roi_means, write_predictions
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def subjects(tiny):
    """The first has an ROI of its first vertices; the second lacks one of the first's."""
    first, second = open_challenge(tiny).subjects
    own = {surface: np.arange(n) < 5 for surface, n in first.n_vertices.items()}
    nowhere = {surface: np.zeros(n, bool) for surface, n in first.n_vertices.items()}
    left, right = first.surfaces
    rois = {s: dict(masks) | {"first": own[s]} for s, masks in first.rois.items()}
    rois[left]["left alone"], rois[right]["left alone"] = own[left], nowhere[right]
    return replace(first, rois=rois), second


@pytest.fixture(scope="module")
def encoder(every_kind, tiny, subjects):
    """Of one quick model, with those ROIs."""
    real = open_challenge(tiny).subjects
    name = next(name for name in encoder_of_work(real, every_kind).models() if "test_vit" in name)
    made = encoder_of_work(real, every_kind, name)
    parts = {one.name: replace(made._parts.subjects[one.name], rois=one.rois) for one in subjects}
    return Encoder(replace(made._parts, subjects=parts), made._tensors, "cpu")


@pytest.fixture(scope="module")
def pictures(subjects):
    return pictures_of([*subjects[0].test.sources, subjects[0].test.sources[0]])


def written(encoder, pictures, tmp_path, **wanted):
    out, table = tmp_path / "new" / "predicted.zarr", tmp_path / "means.csv"
    wanted = Wanted(**{"subjects": encoder.subjects} | wanted)
    chosen = write_predictions(encoder, pictures, wanted, out, table=table, batch_size=2)
    assert chosen == {subject: encoder.choice(subject, wanted.model) for subject in wanted.subjects}
    with table.open(newline="", encoding="utf-8") as file:
        return zarr.open_group(out, mode="r"), list(csv.DictReader(file))


def test_zarr_alone_reads_what_the_encoder_predicts(encoder, subjects, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("heads.encoder.encoder._LONGEST", 2)  # chunks, of which the last is shorter
    monkeypatch.setattr("heads.encoder.predictions._CHUNK_BYTES", 4 * 120 * 3)
    group, _ = written(encoder, pictures, tmp_path)
    for subject in subjects:
        for surface, n_vertices in subject.n_vertices.items():
            found = group[f"{subject.name}/{surface}"]
            assert found.dtype == np.float32 and found.shape == (len(pictures), n_vertices)
            expected = encoder.predict(pictures, subject=subject.name, surface=surface)
            np.testing.assert_allclose(found[:], expected, atol=1e-5, rtol=1e-5)
            assert f"{surface}.vertices" not in group[subject.name]
    ids = group["image_ids"][:]
    assert ids.dtype == np.int64 and ids.tolist() == [picture_id(decoded(picture)) for picture in pictures]
    assert ids[0] == ids[-1] and len(set(ids)) == len(pictures) - 1
    about = group.attrs["featcache"]
    assert about["images"] == [picture.name for picture in pictures] and about["roi"] is None
    assert about["model"] == dict.fromkeys(encoder.subjects, encoder.models()[0])


@pytest.mark.parametrize("roi", ["first", "left alone"])
def test_columns_of_an_roi_are_named(encoder, subjects, pictures, tmp_path, roi):
    """Also where they are the first vertices, which no numbers would make all of them, and where there are none."""
    name = subjects[0].name
    group, _ = written(encoder, pictures, tmp_path, subjects=[name], roi=roi)
    assert list(group.attrs["featcache"]["subjects"]) == [name] and group.attrs["featcache"]["roi"] == roi
    for surface, masks in subjects[0].rois.items():
        numbers = np.flatnonzero(masks[roi])
        np.testing.assert_array_equal(group[f"{name}/{surface}.vertices"][:], numbers)
        whole = encoder.predict(pictures, subject=name, surface=surface)
        np.testing.assert_allclose(group[f"{name}/{surface}"][:], whole[:, numbers], atol=1e-5, rtol=1e-5)


def test_means_are_those_of_the_arrays_and_empty_where_a_subject_has_no_such_roi(encoder, subjects, pictures, tmp_path):
    group, rows = written(encoder, pictures, tmp_path)
    assert len(rows) == len(pictures) * len(subjects)
    rois = {roi for subject in subjects for roi in encoder.rois(subject.name)}
    assert set(rows[0]) == {"image", "id", "subject", "all"} | rois
    empty = 0
    for number, row in enumerate(rows):
        image, subject = number // 2, subjects[number % 2]
        assert (row["image"], row["subject"]) == (pictures[image].name, subject.name)
        assert int(row["id"]) == group["image_ids"][image]
        values = {surface: group[f"{subject.name}/{surface}"][image] for surface in subject.surfaces}
        every = np.concatenate(list(values.values()))
        assert float(row["all"]) == pytest.approx(every.mean(), rel=1e-4, abs=1e-5)
        for roi in rois:
            inside = [values[s][subject.rois[s][roi]] for s in subject.surfaces if roi in subject.rois[s]]
            inside = np.concatenate(inside) if inside else np.empty(0)
            if inside.size:
                assert float(row[roi]) == pytest.approx(inside.mean(), rel=1e-4, abs=1e-5)
            else:
                empty += 1
                assert row[roi] == ""
    assert empty >= 2 * len(pictures)  # both ROIs of the first subject alone


def test_an_roi_that_a_subject_has_not_is_refused(encoder, pictures, tmp_path):
    with pytest.raises(ConfigError, match="roi: expected one of"):
        written(encoder, pictures, tmp_path, roi="first")
    assert list(tmp_path.iterdir()) == []


def test_means_of_some_vertices_are_of_those_alone(encoder, subjects):
    name, (left, right) = subjects[0].name, subjects[0].surfaces
    values = {left: np.array([[1.0, 2.0, 9.0]]), right: np.array([[4.0]])}
    numbers = {left: np.array([0, 4, 30]), right: np.array([100])}
    means = roi_means(encoder, name, values, numbers)
    assert means["all"] == 4 and means["first"] == 1.5 and means["left alone"] == 1.5


@pytest.mark.parametrize("existing", ["predicted.zarr", "means.csv"])
def test_what_exists_is_refused_and_kept(encoder, pictures, tmp_path, existing):
    (tmp_path / existing).write_text("mine")
    wanted = Wanted(subjects=encoder.subjects)
    with pytest.raises(StoreError, match="found one that exists"):
        write_predictions(encoder, pictures, wanted, tmp_path / "predicted.zarr", table=tmp_path / "means.csv")
    assert (tmp_path / existing).read_text() == "mine" and len(list(tmp_path.iterdir())) == 1


def test_a_table_cannot_have_the_name_of_the_group(encoder, pictures, tmp_path):
    out = tmp_path / "predicted.csv"
    with pytest.raises(ConfigError, match="another name"):
        write_predictions(encoder, pictures, Wanted(subjects=encoder.subjects), out, table=out)


def test_an_interrupted_run_leaves_nothing(encoder, pictures, tmp_path, monkeypatch):
    monkeypatch.setattr("heads.encoder.encoder._LONGEST", 2)

    def interrupt(*_):
        raise KeyboardInterrupt

    wanted, out, table = Wanted(subjects=encoder.subjects), tmp_path / "p.zarr", tmp_path / "p.csv"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("heads.encoder.predictions.roi_means", interrupt)  # once the first chunk is written
        write_predictions(encoder, pictures, wanted, out, table=table, batch_size=2)
    assert list(tmp_path.iterdir()) == []
    (tmp_path / "no.png").write_bytes(b"none")
    with pytest.raises(FeatcacheError, match=r"no\.png"):
        write_predictions(encoder, [*pictures, tmp_path / "no.png"], wanted, out, table=table, batch_size=2)
    assert [path.name for path in tmp_path.iterdir()] == ["no.png"]


def test_of_two_processes_that_write_one_group_the_table_is_of_the_one_whose_group_is_there(
    encoder, pictures, tmp_path, monkeypatch
):
    honest, first = predictions._description, []

    def after_another_process(*given):
        if not first:
            first.append(None)
            first.append(written(encoder, pictures, tmp_path))
        return honest(*given)

    monkeypatch.setattr(predictions, "_description", after_another_process)
    with pytest.raises(StoreError, match="found what another process has put there meanwhile"):
        written(encoder, pictures[:2], tmp_path)
    group = zarr.open_group(tmp_path / "new" / "predicted.zarr", mode="r")
    with (tmp_path / "means.csv").open(newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert rows == first[1][1] and group["image_ids"].shape == (len(pictures),)
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["predicted.zarr"]
