"""Each name under --work stands for one place, and asking for it makes nothing."""

from pathlib import Path

import pytest

from featcache.workdir import CHALLENGE, Workdir, data_folder

WORK = Workdir(Path("work"))


def test_every_name_is_a_place_of_its_own_in_the_work_folder(tmp_path: Path):
    work = Workdir(tmp_path)
    names = [name for name, member in vars(Workdir).items() if isinstance(member, property)]
    places = [getattr(work, name) for name in names]
    places += [work.split("0123456789ab"), work.clusters("0123456789ab")]
    places += [work.image_index("subj01"), work.response_index("subj01"), work.head_weights("subj01-a-0123456789ab")]
    assert len(set(places)) == len(places) and all(tmp_path in place.parents for place in places)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("place", "name"),
    [
        (WORK.features, "features.zarr"),
        (WORK.predictions, "predictions.zarr"),
        (WORK.heads, "heads"),
        (WORK.head_weights("a"), "heads/a.safetensors"),
        (WORK.checkpoints, "checkpoints"),
        (WORK.pixels, "pixels"),
        (WORK.splits, "splits"),
        (WORK.split("a"), "splits/a.json"),
        (WORK.clusters("a"), "splits/cluster-a.json"),
        (WORK.maps, "maps"),
        (WORK.image_index("subj01"), "index/subj01.json"),
        (WORK.response_index("subj01"), "index/subj01-responses.json"),
        (WORK.submission, "submission"),
        (WORK.saved_blend, "submission/blend.safetensors"),
        (WORK.blend_weights, "submission/weights.json"),
        (WORK.blend_picture, "submission/weights.png"),
        (WORK.blend_scores, "submission/scores.csv"),
        (WORK.scores_picture, "submission/scores.png"),
        (WORK.training_arms, "trainings/arms.csv"),
        (WORK.training_values, "trainings/values.csv"),
        (WORK.trainings_picture, "trainings/arms.png"),
        (WORK.compared_subject("layers-a", "subj01"), "compared/layers-a/subj01.npz"),
        (WORK.compared_shares("layers-a"), "compared/layers-a/shares.csv"),
        (WORK.compared_vertices("layers-a"), "compared/layers-a/vertices.csv"),
        (WORK.compared_json("layers-a"), "compared/layers-a/shares.json"),
        (WORK.compared_picture("layers-a"), "compared/layers-a/shares.png"),
        (WORK.submission_zip, "submission.zip"),
        (WORK.journal, "journal.jsonl"),
        (WORK.report, "report.html"),
    ],
)
def test_names_stay_those_that_work_folders_have(place: Path, name: str):
    assert place == Path("work") / name


def test_what_was_imported_is_the_dataset_and_the_rest_of_a_failed_import_is_none(tmp_path: Path):
    imported = Workdir(tmp_path).dataset
    assert data_folder(None, tmp_path) == CHALLENGE
    imported.mkdir()
    (imported / ".writing.lock").touch()
    assert data_folder(None, tmp_path) == CHALLENGE and data_folder(Path("mine"), tmp_path) == Path("mine")
    (imported / "subj01").mkdir()
    assert data_folder(None, tmp_path) == imported
