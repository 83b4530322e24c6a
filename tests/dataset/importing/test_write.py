"""Trials of one picture are one row, whatever the picture is called, and a subject is written whole or not at all."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from featcache.dataset.folder import SubjectWriter, scan_folder
from featcache.dataset.importing.material import Material, Recording, Stimuli
from featcache.dataset.importing.run import import_into
from featcache.dataset.subject import Subject
from featcache.errors import DataError

N_PICTURES, N_VERTICES = 8, 5


@pytest.fixture(scope="module")
def photos(tmp_path_factory) -> list[Path]:
    """Pictures that differ, and, last, the first of them as a PNG of another name and as a JPEG."""
    folder, rng = tmp_path_factory.mktemp("photos"), np.random.default_rng(0)
    coarse = rng.integers(20, 230, (N_PICTURES, 4, 4, 3)).astype(np.uint8)
    images = [Image.fromarray(pixels).resize((32, 32), Image.Resampling.BICUBIC) for pixels in coarse]
    paths = [folder / f"{number}.png" for number in range(N_PICTURES)] + [folder / "copy.png", folder / "first.jpg"]
    for image, path in zip([*images, images[0], images[0]], paths, strict=True):
        image.save(path)
    return paths


def material(photos: list[Path], shown: list[int], test: tuple[int, ...] = (), **more) -> Material:
    """Trials in which stimuli were shown. test : stimuli to predict"""
    made_up = np.random.default_rng(1).normal(3, 2, size=(len(shown), N_VERTICES)).astype(np.float32)
    trials = more.pop("responses", made_up)
    session = more.pop("session", None)
    ids = more.pop("ids", None)
    columns = more.pop("columns", {})
    is_test = np.isin(np.arange(len(photos)), test)
    stimuli = Stimuli(tuple(photos), None if ids is None else np.array(ids), is_test, columns)
    return Material("subj01", stimuli, np.array(shown), session, {"V4": Recording(trials, **more)})


def written(material: Material, work: Path, zscore: bool | None = None) -> Subject:
    import_into(material, work, workers=1, zscore=zscore)
    (subject,) = scan_folder(work / "dataset")[0].subjects
    return subject


def slow_averages(material: Material, order: list[int], zscore: bool = False) -> np.ndarray:
    """Average of each stimulus over its trials, one by one."""
    trials = np.array(material.recordings["V4"].trials, dtype=np.float64)
    if zscore:
        for session in np.unique(material.session):
            own = material.session == session
            trials[own] = (trials[own] - trials[own].mean(0)) / trials[own].std(0)
    return np.stack(
        [trials[[row for row, number in enumerate(material.shown) if number == one]].mean(0) for one in order]
    )


def test_trials_of_a_picture_are_averaged(photos, tmp_path):
    one = material(photos[:4], [2, 0, 1, 0, 2, 0, 3])
    subject = written(one, tmp_path)
    assert subject.train.sources == tuple(photos[:4])
    np.testing.assert_allclose(subject.responses("V4"), slow_averages(one, [0, 1, 2, 3]), rtol=1e-6)


def test_trials_are_z_scored_within_their_session_first(photos, tmp_path):
    one = material(photos[:4], [2, 0, 1, 0, 2, 0, 3], session=np.array([0, 1, 0, 1, 1, 0, 1]))
    by_default = written(one, tmp_path / "a")
    np.testing.assert_allclose(by_default.responses("V4"), slow_averages(one, [0, 1, 2, 3], True), atol=1e-6)
    as_they_are = written(one, tmp_path / "b", zscore=False)
    np.testing.assert_allclose(as_they_are.responses("V4"), slow_averages(one, [0, 1, 2, 3]), rtol=1e-6)


def test_equal_pictures_are_one_whatever_their_names_and_ids(photos, tmp_path):
    few = [photos[number] for number in (0, 1, 8)]  # the last has the pixels of the first
    one = material(few, [0, 1, 2, 2], ids=[9, 5, 7])
    done = import_into(one, tmp_path, workers=1)
    (subject,) = scan_folder(tmp_path / "dataset")[0].subjects
    assert subject.train.ids.tolist() == [7, 5] and subject.train.sources == (few[0], few[1])
    np.testing.assert_allclose(
        subject.responses("V4"), slow_averages(replace(one, shown=np.array([0, 1, 0, 0])), [0, 1]), rtol=1e-6
    )
    assert any("0.png is copy.png" in note for note in done.notes)


def test_a_picture_of_two_names_has_the_sessions_of_both(photos, tmp_path):
    few = [photos[number] for number in (0, 1, 8)]  # the last has the pixels of the first
    one = material(few, [0, 1, 2, 2], columns={"session": ["a+b", "a", "b+c"]})
    assert written(one, tmp_path).columns == {"session": ("a+b+c", "a")}


def test_a_compressed_copy_of_one_id_is_the_same_picture_and_another_picture_is_not(photos, tmp_path):
    alike = material([photos[0], photos[1], photos[9]], [0, 1, 2], ids=[3, 4, 3])
    assert written(alike, tmp_path).train.ids.tolist() == [3, 4]
    with pytest.raises(DataError, match=r"1 id of two pictures: 3 is 0.png and 2.png"):
        import_into(material(photos[:3], [0, 1, 2], ids=[3, 4, 3]), tmp_path, workers=1)


def test_a_picture_in_training_and_test_is_refused_under_any_name(photos, tmp_path):
    with pytest.raises(DataError, match=r"1 in both: .*0.png is .*copy.png"):
        import_into(material([*photos[:3], photos[8]], [0, 1, 2], test=(3,)), tmp_path, workers=1)
    assert not (tmp_path / "dataset").exists()


def test_pictures_without_a_trial_are_left_out_and_said(photos, tmp_path):
    one = material(photos[:5], [0, 4, 2])
    assert written(one, tmp_path).train.sources == (photos[0], photos[2], photos[4])
    assert any(note == "left out 2 pictures without a trial" for note in import_into(one, tmp_path, 1).notes)


def test_single_rows_of_test_images_have_the_ceiling_of_the_trials_that_they_are_the_mean_of(photos, tmp_path):
    """Rows that are means of trials would have the ceiling of single trials, and tell less noise than there is."""
    rng = np.random.default_rng(0)
    shown = [*np.repeat(np.arange(5), 3), 5, 6, 7]
    signal = rng.normal(size=(8, N_VERTICES))
    noise = rng.normal(size=(len(shown), N_VERTICES)) * np.repeat([1, 3**-0.5], [15, 3])[:, None]
    one = material(photos[:8], shown, test=(5, 6, 7), responses=(signal[shown] + noise).astype(np.float32))
    unknown = written(one, tmp_path / "a")
    assert unknown.test_noise_ceiling["V4"] is None and unknown.has_test_responses
    known = written(replace(one, test_trials=3), tmp_path / "b")
    np.testing.assert_array_equal(known.test_noise_ceiling["V4"], known.noise_ceiling["V4"])
    alone = written(material(photos[:5], shown[:15], responses=one.recordings["V4"].trials[:15]), tmp_path / "c")
    np.testing.assert_array_equal(known.noise_ceiling["V4"], alone.noise_ceiling["V4"])
    single = written(replace(one, test_trials=1), tmp_path / "d")
    above = known.noise_ceiling["V4"] > 0
    assert above.any() and (single.test_noise_ceiling["V4"] < known.noise_ceiling["V4"])[above].all()
    said = import_into(one, tmp_path / "a", 1).notes
    assert any("--test-trials says how many" in note for note in said)
    assert said[0].startswith("subj01: takes the place of an earlier import, of 5 training and 3 test images")


def test_columns_follow_their_pictures(photos, tmp_path):
    columns = {"kind": list("abcdef")}
    subject = written(material(photos[:6], [4, 2, 0], test=(1, 5), columns=columns), tmp_path)
    assert subject.columns == {"kind": ("a", "c", "e", "b", "f")} and subject.test.sources == (photos[1], photos[5])
    assert not subject.has_test_responses


def test_test_responses_are_averaged_and_have_a_ceiling_of_their_own(photos, tmp_path):
    shown = [*range(4), *range(4), 6, 7, 6, 7, 6, 7]  # training pictures twice, test pictures three times
    one = material(photos[:8], shown, test=(6, 7), ncsnr=np.linspace(0, 3, N_VERTICES))
    subject = written(one, tmp_path)
    np.testing.assert_allclose(subject.test_responses("V4"), slow_averages(one, [6, 7]), rtol=1e-6)
    squared = np.linspace(0, 3, N_VERTICES) ** 2  # Allen et al. 2022: ncsnr^2 / (ncsnr^2 + 1 / n)
    np.testing.assert_allclose(subject.noise_ceiling["V4"], squared / (squared + 1 / 2), rtol=1e-5)
    np.testing.assert_allclose(subject.test_noise_ceiling["V4"], squared / (squared + 1 / 3), rtol=1e-5)


def test_responses_to_some_test_images_are_refused(photos, tmp_path):
    for shown in ([0, 1, 2, 6], [0, 1, 2, 5, 6]):
        with pytest.raises(DataError, match=r"responses to all of them, 2 or more, or to none"):
            import_into(material(photos[:8], shown, test=(5, 6, 7)), tmp_path, workers=1)


def test_ceilings_are_those_given_or_from_repeats_or_none(photos, tmp_path):
    given = np.linspace(0, 1, N_VERTICES)
    once, twice = list(range(6)), [*range(6), *range(6)]
    subject = written(material(photos[:6], once, noise_ceiling=given), tmp_path)
    np.testing.assert_allclose(subject.noise_ceiling["V4"], given, rtol=1e-6)
    assert written(material(photos[:6], once), tmp_path).noise_ceiling["V4"] is None
    repeated = material(photos[:6], twice)
    signal = np.random.default_rng(3).normal(size=(6, N_VERTICES))
    clean = replace(repeated, recordings={"V4": Recording(np.tile(signal, (2, 1)).astype(np.float32))})
    np.testing.assert_allclose(written(clean, tmp_path).noise_ceiling["V4"], 1)  # repeats without noise


def test_positions_and_rois_are_kept(photos, tmp_path):
    positions = np.arange(3.0 * N_VERTICES).reshape(-1, 3)
    rois = {"V1": np.arange(N_VERTICES) < 2, "none": np.zeros(N_VERTICES, bool)}
    subject = written(material(photos[:3], [0, 1, 2], positions=positions, rois=rois), tmp_path)
    np.testing.assert_array_equal(subject.positions["V4"], positions)
    assert list(subject.rois["V4"]) == ["V1", "none"]
    for name, mask in rois.items():
        np.testing.assert_array_equal(subject.rois["V4"][name], mask)


def test_constant_vertices_are_said(photos, tmp_path):
    one = material(photos[:4], [0, 1, 2, 3], session=np.array([0, 0, 1, 1]))
    trials = np.array(one.recordings["V4"].trials)
    trials[:2, 3] = 7
    changed = replace(one, recordings={"V4": Recording(trials)})
    assert any("V4: 1 vertices" in note and "session" in note for note in import_into(changed, tmp_path, 1).notes)
    trials[:, 3] = 7
    assert any("V4: 1 of 5 vertices" in note for note in import_into(changed, tmp_path, 1, zscore=False).notes)


@pytest.mark.parametrize("moment", ["new_array", "save", "save_rois", "finish"])
def test_a_killed_import_leaves_the_older_subject_whole_and_nothing_else(moment, photos, tmp_path, monkeypatch):
    options = {"rois": {"V1": np.arange(N_VERTICES) < 2}, "noise_ceiling": np.full(N_VERTICES, 0.5)}
    written(material(photos[:4], [0, 1, 2, 3], **options), tmp_path)
    before = {path: path.read_bytes() for path in (tmp_path / "dataset").rglob("*") if path.is_file()}

    def die(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(SubjectWriter, moment, die)
    with pytest.raises(KeyboardInterrupt):
        import_into(material(photos[:4], [3, 1, 2, 0, 0], **options), tmp_path, workers=1)
    assert {path: path.read_bytes() for path in (tmp_path / "dataset").rglob("*") if path.is_file()} == before
    assert {path.name for path in (tmp_path / "dataset").iterdir()} <= {"subj01", ".writing.lock"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"name": "all"}, "the name of a subject: .* found 'all'"),
        ({"name": "a/b"}, "the name of the subject: .* found 'a/b'"),
        ({"recordings": {"both": None}}, "the name of a surface: .* found 'both'"),
        ({"recordings": {"V4": {"all": np.ones(N_VERTICES, bool)}}}, "the name of an ROI: .* found 'all'"),
        ({"recordings": {"../V4": None}}, "the name of a surface: .* found '../V4'"),
    ],
)
def test_names_that_tables_or_files_cannot_have(change, words, photos, tmp_path):
    one = material(photos[:3], [0, 1, 2])
    if "recordings" in change:
        trials = one.recordings["V4"].trials
        change = {"recordings": {name: Recording(trials, rois or {}) for name, rois in change["recordings"].items()}}
    with pytest.raises(DataError, match=words):
        import_into(replace(one, **change), tmp_path, workers=1)
    assert not any((tmp_path / "dataset").glob("*/*"))


def test_responses_to_test_images_decide_nothing_of_training(photos, tmp_path):
    """Neither its responses nor its ceilings, under z-scoring within sessions that have both."""
    shown, session = [*range(8)] * 3, np.repeat([0, 1, 2], 8)
    one = material(photos[:8], shown, test=(6, 7), session=session)
    before = written(one, tmp_path / "a")
    louder = np.array(one.recordings["V4"].trials)
    louder[np.isin(shown, (6, 7))] = 5 * louder[np.isin(shown, (6, 7))] + 9
    after = written(material(photos[:8], shown, test=(6, 7), session=session, responses=louder), tmp_path / "b")
    np.testing.assert_array_equal(after.responses("V4"), before.responses("V4"))
    np.testing.assert_array_equal(after.noise_ceiling["V4"], before.noise_ceiling["V4"])
    assert np.abs(after.test_responses("V4") - before.test_responses("V4")).max() > 1


def test_repeats_of_test_images_tell_the_noise_where_training_images_have_none(photos, tmp_path):
    shown = [0, 1, 2, 3, *[4, 5, 6, 7] * 6]
    rng = np.random.default_rng(3)
    responses = rng.normal(size=(8, N_VERTICES))[shown] + 0.1 * rng.normal(size=(len(shown), N_VERTICES))
    one = material(photos[:8], shown, test=(4, 5, 6, 7), responses=responses.astype(np.float32))
    subject = written(one, tmp_path)
    assert (subject.noise_ceiling["V4"] > 0.8).all()
    assert (subject.test_noise_ceiling["V4"] > subject.noise_ceiling["V4"]).all()
    assert any("those of test images tell the noise" in note for note in import_into(one, tmp_path, 1).notes)


def test_a_given_ceiling_is_of_the_trials_of_training_images(photos, tmp_path):
    """Allen et al. 2022: NC = ncsnr^2 / (ncsnr^2 + t), with t of each split."""
    given, shown = np.linspace(0, 1, N_VERTICES), [*[0, 1, 2] * 2, *[3, 4] * 8]
    subject = written(material(photos[:5], shown, test=(3, 4), noise_ceiling=given), tmp_path)
    np.testing.assert_allclose(subject.noise_ceiling["V4"], given, rtol=1e-6)
    with np.errstate(divide="ignore", invalid="ignore"):
        ncsnr2 = given * 0.5 / (1 - given)
        expected = np.where(given < 1, ncsnr2 / (ncsnr2 + 1 / 8), 1)
    np.testing.assert_allclose(subject.test_noise_ceiling["V4"], expected, rtol=1e-5)
