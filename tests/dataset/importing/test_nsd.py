"""The Natural Scenes Dataset in its published folders: every voxel, trial and image where it belongs."""

import shutil
from dataclasses import replace

import h5py
import nibabel
import numpy as np
import pytest

from featcache.dataset.folder import scan_folder
from featcache.dataset.images import load_image
from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.nsd import nsd_material
from featcache.dataset.importing.repeats import ceiling_from_ncsnr
from featcache.dataset.importing.run import import_files
from featcache.dataset.subject import Dataset
from featcache.errors import ConfigError, DataError
from featcache.workdir import Workdir
from support.commands import SMALL, fails, run
from support.nsd import AFFINE, N_TRIALS, SHAPE, SUBJECT, VERSION, build_nsd, load_surface, save_nifti, save_surface

FSAVERAGE = f"fsaverage/{VERSION}"


@pytest.fixture(scope="session")
def release(tmp_path_factory):
    return build_nsd(tmp_path_factory.mktemp("nsd"))


@pytest.fixture
def copy(release, tmp_path):
    """A release that a test may damage."""
    return replace(release, root=shutil.copytree(release.root, tmp_path / "nsd"))


def config(nsd, **settings):
    return ImportConfig(nsd=nsd.root, subject=str(SUBJECT), **settings)


def imported(nsd, work, **settings):
    import_files(config(nsd, **settings), work, workers=1)
    dataset, faults = scan_folder(Workdir(work).dataset)
    assert not faults
    return dataset.subjects[0]


def voxels(nsd, hemisphere):
    """Voxels inside nsdgeneral, one after the other: x first, z fastest."""
    general = nsd.labels[hemisphere]["nsdgeneral"]
    return [
        (x, y, z) for x in range(SHAPE[0]) for y in range(SHAPE[1]) for z in range(SHAPE[2]) if general[x, y, z] > 0
    ]


def percent_of(nsd, hemisphere):
    """(90, n_voxels): the responses of each voxel, trial by trial."""
    return np.array([[volume[voxel] / 300 for voxel in voxels(nsd, hemisphere)] for volume in nsd.volumes])


def zscored(values, nsd):
    """Each session by the mean and sd of its trials of images that are not shared, (n_trials, n_vertices)."""
    values, trained = values.astype(np.float64), ~np.isin(nsd.ids, nsd.shared)
    for number in np.unique(nsd.session):
        own = nsd.session == number
        told = values[own & trained]
        values[own] = (values[own] - told.mean(0)) / told.std(0)
    return values


def averages(values, nsd, images, zscore=True):
    """Mean over the trials of each image, one image at a time."""
    values = zscored(values, nsd) if zscore else values
    return np.array([values[nsd.ids == image].mean(0) for image in images])


@pytest.mark.parametrize("ending", [".hdf5", ".nii.gz"])
def test_both_formats_give_each_voxel_its_own_responses(copy, tmp_path, ending):
    shutil.rmtree(copy.betas())
    copy.write_sessions(ending)
    subject = imported(copy, tmp_path)
    assert subject.name == "subj03" and subject.surfaces == ("lh", "rh")
    for hemisphere in subject.surfaces:
        percent = percent_of(copy, hemisphere)
        expected = averages(percent, copy, subject.train.ids)
        np.testing.assert_allclose(subject.responses(hemisphere), expected, rtol=1e-4, atol=1e-5)
        expected = averages(percent, copy, subject.test.ids)
        np.testing.assert_allclose(subject.test_responses(hemisphere), expected, rtol=1e-4, atol=1e-5)


def test_responses_are_percent_of_signal_change(release, tmp_path):
    subject = imported(release, tmp_path, zscore=False)
    expected = averages(percent_of(release, "rh"), release, subject.train.ids, zscore=False)
    np.testing.assert_allclose(subject.responses("rh"), expected, rtol=1e-5, atol=1e-5)


def test_voxels_lie_where_the_volume_has_them(release):
    positions = nsd_material(config(release)).recordings["rh"].positions
    expected = [AFFINE @ [*voxel, 1] for voxel in voxels(release, "rh")]
    np.testing.assert_allclose(positions, np.array(expected)[:, :3], atol=1e-4)


def test_images_have_the_numbers_and_pixels_of_the_release(release, tmp_path):
    subject = imported(release, tmp_path)
    shown = np.unique(release.ids)
    np.testing.assert_array_equal(subject.test.ids, np.intersect1d(shown, release.shared))
    np.testing.assert_array_equal(subject.train.ids, np.setdiff1d(shown, release.shared))
    assert len(shown) < 40  # an image of the session that was not released is not there
    with h5py.File(release.root / "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5") as file:
        for image, source in zip(subject.image_ids, subject.image_sources, strict=True):
            np.testing.assert_array_equal(np.asarray(load_image(source)), file["imgBrick"][image])


def test_without_a_test_every_image_can_be_fitted_to(release, tmp_path):
    subject = imported(release, tmp_path, test="none")
    np.testing.assert_array_equal(subject.train.ids, np.unique(release.ids))
    assert not len(subject.test)


def test_only_the_sessions_that_are_there_are_used(copy):
    (copy.betas() / "betas_session02.hdf5").unlink()
    material = nsd_material(config(copy))
    there = copy.session != 2
    np.testing.assert_array_equal(material.session, copy.session[there])
    np.testing.assert_array_equal(material.stimuli.ids[material.shown], copy.ids[there])
    np.testing.assert_allclose(material.recordings["lh"].trials[:], percent_of(copy, "lh")[there], rtol=1e-6)
    assert "sessions: 1, 3, of 30 trials each" in material.notes


def test_ceilings_are_of_the_repeats_of_each_split(release, tmp_path):
    subject = imported(release, tmp_path)
    ncsnr = np.array([release.ncsnr[voxel] for voxel in voxels(release, "lh")])
    for ids, ceiling in ((subject.train.ids, subject.noise_ceiling), (subject.test.ids, subject.test_noise_ceiling)):
        repeats = np.array([(release.ids == image).sum() for image in ids])
        np.testing.assert_allclose(ceiling["lh"], ncsnr**2 / (ncsnr**2 + (1 / repeats).mean()), rtol=1e-5)


def test_without_ncsnr_ceilings_come_from_repeats(copy, tmp_path):
    """Noise is the variance over repeats, and signal is what is left of a variance of 1."""
    (copy.betas() / "ncsnr.nii.gz").unlink()
    subject = imported(copy, tmp_path)
    values = zscored(percent_of(copy, "lh"), copy)
    trials = [values[copy.ids == image] for image in subject.train.ids]
    repeated = [of_image for of_image in trials if len(of_image) > 1]
    noise = sum(((trials - trials.mean(0)) ** 2).sum(0) for trials in repeated) / sum(len(t) - 1 for t in repeated)
    ncsnr = np.sqrt(np.maximum(1 - noise, 0) / noise)
    repeats = np.array([(copy.ids == image).sum() for image in subject.train.ids])
    ceiling = subject.noise_ceiling["lh"]
    assert np.corrcoef(ceiling, ceiling_from_ncsnr(ncsnr, repeats))[0, 1] > 0.98
    assert ceiling.mean() == pytest.approx(ceiling_from_ncsnr(ncsnr, repeats).mean(), abs=0.03)


def test_an_ncsnr_that_is_not_known_is_no_signal(copy):
    ncsnr = copy.ncsnr.copy()
    unknown, *others = voxels(copy, "lh")
    ncsnr[unknown] = np.nan
    save_nifti(copy.betas() / "ncsnr.nii.gz", ncsnr)
    read = nsd_material(config(copy)).recordings["lh"].ncsnr
    np.testing.assert_allclose(read, [0, *(ncsnr[voxel] for voxel in others)])


def test_rois_have_their_names_and_voxels(release):
    rois = nsd_material(config(release)).recordings["lh"].rois
    labels = {
        name: np.array([values[v] for v in voxels(release, "lh")]) for name, values in release.labels["lh"].items()
    }
    assert list(rois) == ["V1v", "V1d", "V2v", "floc-faces-1", "floc-faces-2"]  # floc-faces have no file of names
    for label, name in ((1, "V1v"), (2, "V1d"), (3, "V2v")):
        np.testing.assert_array_equal(rois[name], labels["prf-visualrois"] == label)
    np.testing.assert_array_equal(rois["floc-faces-2"], labels["floc-faces"] == 2)
    assert rois["V1v"].any() and not rois["V2v"].any()


def test_more_rois_of_the_release_and_of_the_user(release, tmp_path):
    path = tmp_path / "own.nii.gz"
    own = np.random.default_rng(3).integers(0, 2, SHAPE).astype(np.int16)
    save_nifti(path, own)
    rois = nsd_material(config(release, roi=("Kastner2015", f"rh={path}"))).recordings["rh"].rois
    np.testing.assert_array_equal(rois["Kastner2015-V1d"], rois["V1d"])
    np.testing.assert_array_equal(rois["own"], [own[voxel] for voxel in voxels(release, "rh")])


def test_a_mask_by_name_and_the_whole_brain(release):
    areas = nsd_material(config(release, mask=("prf-visualrois",))).recordings["rh"].trials
    inside = release.labels["rh"]["prf-visualrois"] > 0
    np.testing.assert_allclose(areas[:], release.volumes[:, inside] / 300, rtol=1e-6)
    brain = nsd_material(config(release, mask=("all",))).recordings
    assert list(brain) == ["all"]
    np.testing.assert_allclose(brain["all"].trials[:], release.volumes[:, :, :, 1:].reshape(90, -1) / 300, rtol=1e-6)


def test_a_mask_of_the_user(release, tmp_path):
    inside = np.random.default_rng(4).random(SHAPE) < 0.1
    save_nifti(tmp_path / "own.nii.gz", inside.astype(np.int16))
    recordings = nsd_material(config(release, mask=(f"V9={tmp_path / 'own.nii.gz'}",))).recordings
    np.testing.assert_allclose(recordings["V9"].trials[:], release.volumes[:, inside] / 300, rtol=1e-6)


def test_a_mask_of_another_space_is_refused(release, tmp_path):
    moved = AFFINE.copy()
    moved[0, 3] += 1.8
    nibabel.save(nibabel.Nifti1Image(np.ones(SHAPE, dtype=np.int16), moved), tmp_path / "moved.nii.gz")
    with pytest.raises(DataError, match=r"moved\.nii\.gz.*1\.8 mm away"):
        nsd_material(config(release, mask=(str(tmp_path / "moved.nii.gz"),)))
    save_nifti(tmp_path / "other.nii.gz", np.ones((8, 10, 12), dtype=np.int16))
    with pytest.raises(DataError, match=r"expected the shape \(12, 10, 8\)"):
        nsd_material(config(release, mask=(str(tmp_path / "other.nii.gz"),)))


def test_the_surface_of_fsaverage(release, tmp_path, monkeypatch):
    n_vertices = len(load_surface(release.label / "lh.nsdgeneral.mgz"))  # of a smaller fsaverage
    for module in ("dataset.folder", "dataset.importing.nsd"):
        monkeypatch.setattr(f"featcache.{module}.FSAVERAGE_VERTICES", n_vertices)
    subject = imported(release, tmp_path, betas=FSAVERAGE)
    for hemisphere in ("lh", "rh"):
        inside = load_surface(release.label / f"{hemisphere}.nsdgeneral.mgz") > 0
        values = release.vertices[hemisphere][:, inside]
        expected = averages(values, release, subject.train.ids)
        np.testing.assert_allclose(subject.responses(hemisphere), expected, rtol=1e-4, atol=1e-5)
        ncsnr = load_surface(release.betas("fsaverage") / f"{hemisphere}.ncsnr.mgh")[inside]
        repeats = np.array([(release.ids == image).sum() for image in subject.train.ids])
        np.testing.assert_allclose(subject.noise_ceiling[hemisphere], ceiling_from_ncsnr(ncsnr, repeats), rtol=1e-5)
        streams = load_surface(release.label / f"{hemisphere}.streams.mgz")[inside]
        np.testing.assert_array_equal(subject.rois[hemisphere]["midventral"], streams == 2)
    assert not subject.positions
    np.testing.assert_array_equal(subject.fsaverage["lh"], load_surface(release.label / "lh.nsdgeneral.mgz") > 0)
    assert subject.fsaverage["rh"] is None  # of another number of vertices, so of no fsaverage


def test_all_vertices_of_a_surface(release):
    recordings = nsd_material(config(release, betas=FSAVERAGE, mask=("all",))).recordings
    for hemisphere, values in release.vertices.items():
        np.testing.assert_array_equal(recordings[hemisphere].trials[:], values)


def test_vertices_without_data_in_a_session_are_left_out(copy):
    path = copy.betas("fsaverage") / "rh.betas_session02.mgh"
    values = load_surface(path)
    inside = np.flatnonzero(load_surface(copy.label / "rh.nsdgeneral.mgz") > 0)
    values[inside[[1, 4]]] = np.nan
    save_surface(path, values)
    material = nsd_material(config(copy, betas=FSAVERAGE))
    left = np.delete(inside, [1, 4])
    np.testing.assert_array_equal(material.recordings["rh"].trials[:], copy.vertices["rh"][:, left])
    assert len(material.recordings["rh"].ncsnr) == len(left) == len(material.recordings["rh"].rois["early"])
    assert "rh: 2 vertices without responses in a session were left out" in material.notes


def test_the_surface_of_the_subject_is_hdf5_of_300ths(copy):
    rng = np.random.default_rng(5)
    values = {hemisphere: rng.integers(-900, 900, (90, 40), dtype=np.int16) for hemisphere in ("lh", "rh")}
    inside = rng.random(40) < 0.5
    for hemisphere, of_hemisphere in values.items():
        for number in (1, 2, 3):
            path = copy.betas("nativesurface") / f"{hemisphere}.betas_session{number:02d}.hdf5"
            path.parent.mkdir(parents=True, exist_ok=True)
            with h5py.File(path, "w") as file:
                file["betas"] = of_hemisphere[copy.session == number]
        label = copy.root / f"nsddata/freesurfer/subj03/label/{hemisphere}.nsdgeneral.mgz"
        save_surface(label, inside.astype(np.float32))
    recordings = nsd_material(config(copy, betas=f"nativesurface/{VERSION}")).recordings
    np.testing.assert_allclose(recordings["rh"].trials[:], values["rh"][:, inside] / 300, rtol=1e-6)
    whole = nsd_material(config(copy, betas=f"nativesurface/{VERSION}", mask=("all",))).recordings
    np.testing.assert_allclose(whole["lh"].trials[:], values["lh"] / 300, rtol=1e-6)


MISSING = {
    "nsddata/experiments/nsd/nsd_expdesign.mat": {},
    "nsddata_stimuli/stimuli/nsd/nsd_stimuli.hdf5": {},
    "nsddata/ppdata/subj03/func1pt8mm/roi/lh.nsdgeneral.nii.gz": {},
    "nsddata/ppdata/subj03/func1pt8mm/brainmask.nii.gz": {"mask": ("all",)},
    f"nsddata_betas/ppdata/subj03/{FSAVERAGE}/rh.betas_session02.mgh": {"betas": FSAVERAGE},
    "nsddata/freesurfer/fsaverage/label/rh.nsdgeneral.mgz": {"betas": FSAVERAGE},
}


@pytest.mark.parametrize("key", MISSING)
def test_what_is_missing_is_said_with_its_place_in_the_release(copy, key):
    (copy.root / key).unlink()
    with pytest.raises(DataError) as error:
        nsd_material(config(copy, **MISSING[key]))
    assert str(copy.root / key) in str(error.value) and f"copy it from {key} of its bucket" in str(error.value)


BROKEN = [key for key in MISSING if not key.endswith(".gz")]


@pytest.mark.parametrize("key", [*BROKEN, f"nsddata_betas/ppdata/subj03/func1pt8mm/{VERSION}/betas_session03.hdf5"])
@pytest.mark.parametrize("share", [0, 0.5])
def test_what_was_half_downloaded_is_said_with_its_place_in_the_release(copy, key, share):
    content = (copy.root / key).read_bytes()
    (copy.root / key).write_bytes(content[: int(share * len(content))])
    with pytest.raises(DataError) as error:
        nsd_material(config(copy, **MISSING.get(key, {})))
    assert str(copy.root / key) in str(error.value) and f"copy {key} of the bucket" in str(error.value)
    assert "\n" not in str(error.value)


def test_a_volume_that_was_cut_off_leaves_no_subject(copy, tmp_path):
    shutil.rmtree(copy.betas())
    copy.write_sessions(".nii.gz")
    path = copy.betas() / "betas_session03.nii.gz"
    path.write_bytes(path.read_bytes()[:-5000])
    with pytest.raises(DataError, match=r"betas_session03\.nii\.gz"):
        import_files(config(copy), tmp_path, workers=1)
    assert not (Workdir(tmp_path).dataset / "subj03").exists()


def test_no_sessions_at_all(copy):
    for path in copy.betas().glob("betas*"):
        path.unlink()
    with pytest.raises(DataError, match=r"betas_session01\.\w+.*found none"):
        nsd_material(config(copy))
    with pytest.raises(DataError, match=f"there is fsaverage/{VERSION}, func1pt8mm/{VERSION}"):
        nsd_material(config(copy, betas="func1mm/betas_fithrf"))


def test_files_that_do_not_belong_together_are_refused(copy):
    path = copy.betas() / "betas_session02.hdf5"
    whole = h5py.File(path)["betas"][:]
    with h5py.File(path, "w") as file:
        file["betas"] = whole[: N_TRIALS - 1]
    with pytest.raises(DataError, match="expected 30 trials"):
        nsd_material(config(copy))
    with h5py.File(path, "w") as file:
        file["betas"] = whole.transpose(0, 3, 2, 1)
    with pytest.raises(DataError, match="expected trials of 8 x 10 x 12 values"):
        nsd_material(config(copy))


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"subject": "9"}, "expected 1 to 8"),
        ({"betas": "func1pt8mm"}, "expected SPACE/VERSION"),
        ({"mask": ("nsdgenerel",)}, "there is Kastner2015, floc-faces, nsdgeneral, prf-visualrois"),
        ({"roi": ("Kastner",)}, "there is Kastner2015"),
        ({"test": "half"}, "expected one of shared, none"),
        ({"responses": ("x.npy",)}, "nothing beside --nsd"),
    ],
)
def test_options_that_name_nothing_are_refused(release, settings, expected):
    with pytest.raises(ConfigError, match=expected):
        nsd_material(ImportConfig(**{"nsd": release.root, "subject": str(SUBJECT), **settings}))


def test_a_second_import_reads_nothing_until_a_file_changes(copy, tmp_path):
    assert import_files(config(copy), tmp_path, workers=1).new
    assert not import_files(config(copy), tmp_path, workers=1).new
    (copy.betas() / "betas_session03.hdf5").unlink()
    again = import_files(config(copy), tmp_path, workers=1)
    assert again.new and again.n_trials == 2 * N_TRIALS


def test_from_the_release_to_scores(release, tmp_path, monkeypatch, capfd):
    """Colours of the pictures were planted: heads that are fitted to an untrained network's layers find them."""
    for name, value in SMALL.items():
        monkeypatch.setenv(name, value)
    work = ("--work", str(tmp_path))
    done = run(capfd, "import", "--nsd", str(release.root), "--subject", str(SUBJECT), *work)
    assert done["images"] + done["test_images"] == len(np.unique(release.ids))
    run(capfd, "extract", *work)
    fitted = run(capfd, "fit-heads", *work)
    for scores in (fitted["scores"], fitted["test_scores"]):
        (of_model,) = scores.values()
        assert min(score["mean_r"] for score in of_model) > 0.4  # of trials as noisy as their signal
    assert "copy nsddata_betas/ppdata/subj01" in fails(capfd, "import", "--nsd", str(tmp_path), "--subject", "1", *work)


def test_a_program_imports_as_the_command_line_does(release, tmp_path):
    by_command = imported(release, tmp_path / "a")
    (subject,) = Dataset.from_nsd(release.root, SUBJECT, work=tmp_path / "b").subjects
    np.testing.assert_array_equal(subject.image_ids, by_command.image_ids)
    for hemisphere in ("lh", "rh"):
        np.testing.assert_array_equal(subject.responses(hemisphere), by_command.responses(hemisphere))
