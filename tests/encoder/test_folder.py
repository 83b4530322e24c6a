"""A folder to hand on predicts as the work folder does, by itself; whatever is wrong with it is one line."""

import json
import os
import pickletools
import shutil

import numpy as np
import pytest

from featcache.config import fingerprint
from featcache.dataset.algonauts import open_challenge
from featcache.errors import FeatcacheError, StoreError
from heads.encoder import folder as of_folder
from heads.encoder.export import export_work
from heads.encoder.folder import CARD, DESCRIPTION, load_encoder
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def subjects(tiny):
    return open_challenge(tiny).subjects


@pytest.fixture
def copy(exported, tmp_path):
    """A copy, for damaging."""
    return shutil.copytree(exported, tmp_path / "copy")


def files_in(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())


def refused(folder, match, encoder=load_encoder):
    with pytest.raises(StoreError, match=match) as caught:
        encoder(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_predicts_bit_for_bit_without_work_folder_data_and_hub(
    every_kind, exported, tiny, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    work, data = shutil.copytree(every_kind, tmp_path / "w"), shutil.copytree(tiny, tmp_path / "d")
    subjects = open_challenge(data).subjects
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for path in subjects[0].test.sources[:2]:
        shutil.copy(path, pictures)
    before = encoder_of_work(subjects, work)
    chosen = before.models()[::4]  # the blend is of all of them
    expected = {model: before.predict_all(pictures, model=model) for model in chosen}
    export_work(subjects, work, tmp_path / "e")
    assert files_in(tmp_path / "e") == files_in(exported)
    shutil.rmtree(work)
    shutil.rmtree(data)
    (tmp_path / "e").rename(tmp_path / "elsewhere")
    after = load_encoder(tmp_path / "elsewhere")
    assert after.models() == before.models() and after.subjects == before.subjects
    for model, of_subjects in expected.items():
        found = after.predict_all(pictures, model=model)
        for name, of_subject in of_subjects.items():
            for surface, values in of_subject.items():
                np.testing.assert_array_equal(found[name][surface], values, err_msg=model)


def test_rois_and_noise_ceilings_are_handed_on(every_kind, exported, subjects):
    before, after = encoder_of_work(subjects, every_kind), load_encoder(str(exported))
    for subject in subjects:
        name = subject.name
        assert set(after.rois(name)) == set(before.rois(name)) and after.surfaces(name) == before.surfaces(name)
        for roi in before.rois(name):
            for surface, numbers in before.numbers(name, roi=roi).items():
                np.testing.assert_array_equal(after.numbers(name, roi=roi)[surface], numbers)
        for surface, ceiling in before.noise_ceiling(name).items():
            found = after.noise_ceiling(name)[surface]
            assert (ceiling is None) == (found is None)
            if ceiling is not None:
                np.testing.assert_array_equal(found, np.asarray(ceiling, np.float32))


def test_nothing_in_a_folder_is_code(exported):
    names = files_in(exported)
    assert {os.path.splitext(name)[1] for name in names} == {".json", ".md", ".safetensors"}
    for name in names:
        with pytest.raises(Exception):  # noqa: B017 - no pickle, however it fails
            list(pickletools.genops((exported / name).read_bytes()))
    networks = [name for name in names if name.startswith("networks/")]
    assert len(networks) == 8 and DESCRIPTION in names and CARD in names  # each network once, however many read it


def test_every_file_that_is_changed_shortened_or_gone_is_noticed_but_the_card(copy):
    for name in files_in(copy):
        path = copy / name
        content = path.read_bytes()
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        for damaged in (flipped, content[: len(content) // 2], b"", None):
            if damaged is None:
                path.unlink()
            else:
                path.write_bytes(damaged)
            if name == CARD and damaged is not None:
                load_encoder(copy)
            else:
                said = refused(copy, "copy the folder again|name one that 'export' wrote")
                assert name.split(".")[0] in said
        path.write_bytes(content)
    load_encoder(copy)


def forged(folder, change):
    """A description that someone wrote, with a digest that is right."""
    content = json.loads((folder / DESCRIPTION).read_text())
    del content["digest"]
    change(content)
    (folder / DESCRIPTION).write_text(json.dumps(content | {"digest": fingerprint(content)}))


def test_a_newer_format_asks_for_a_newer_featcache(copy):
    forged(copy, lambda content: content.update(format=of_folder.FORMAT + 1, featcache="9.0"))
    refused(copy, "written by featcache 9.0; install a newer featcache")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "7", '{"format": 1}', "[" * 100_000, '{"a":' * 100_000, "\x00", "\xff{"]
)
def test_a_description_that_is_none_is_refused(copy, text):
    (copy / DESCRIPTION).write_text(text, encoding="latin-1")
    refused(copy, f"{DESCRIPTION} cannot be read|{DESCRIPTION} is not what")


def test_models_that_read_what_is_not_there_are_refused(copy):
    original = (copy / DESCRIPTION).read_text()

    def of_first(**values):
        return lambda content: content["subjects"]["subj01"]["models"][0].update(values)

    def without(content):
        del content["subjects"]["subj01"]["models"][0]

    for change in (
        of_first(features=[]),
        of_first(features=["x"]),
        of_first(arrays=["x"]),
        of_first(arrays=[]),
        without,
    ):
        forged(copy, change)
        refused(copy, "cannot be read")
        (copy / DESCRIPTION).write_text(original)


WRONG = [None, 7, -1, "text", [], {}, [7], {"a": 7}, True, 1e300]


@pytest.mark.parametrize("name", ["format", "versions", "features", "subjects", "digests", "featcache"])
def test_a_description_of_wrong_types_is_one_line(copy, name):
    for wrong in WRONG:
        shutil.copyfile(copy / DESCRIPTION, copy / "kept.json")
        forged(copy, lambda content, wrong=wrong: content.update({name: wrong}))
        try:
            load_encoder(copy)
            assert name not in ("digests", "features") or isinstance(wrong, dict)
        except FeatcacheError as error:
            assert "\n" not in str(error)
        shutil.move(copy / "kept.json", copy / DESCRIPTION)


def parts_of(content):
    """Every place of a description where a value may be wrong, as (the container, its key)."""
    feature = next(iter(content["features"].values()))
    subject = content["subjects"]["subj01"]
    model = subject["models"][0]
    for part in (feature, feature["key"], subject, model, next(iter([subject["n_vertices"]]))):
        for key in part:
            yield part, key


def test_parts_of_wrong_types_are_one_line(copy):
    content = json.loads((copy / DESCRIPTION).read_text())
    n_places = len(list(parts_of(content)))
    assert n_places > 20
    original = (copy / DESCRIPTION).read_text()
    for place in range(n_places):
        for wrong in (None, [7], {"a": 7}):

            def change(content, place=place, wrong=wrong):
                part, key = list(parts_of(content))[place]
                part[key] = wrong

            forged(copy, change)
            try:
                load_encoder(copy)
            except FeatcacheError as error:
                assert "\n" not in str(error)
            (copy / DESCRIPTION).write_text(original)


@pytest.mark.parametrize(
    "path", ["../stolen", "/etc/hostname", "heads/../../stolen", "networks/./../../stolen", "a\\..\\b", ""]
)
def test_paths_that_lead_outside_are_refused(copy, subjects, path):
    (copy.parent / "stolen").write_text("secret")
    original = (copy / DESCRIPTION).read_text()
    picture = subjects[0].test.sources[0]

    def as_network(content):
        for part in content["features"].values():
            part["weights"] = path

    def as_heads(content):
        for model in content["subjects"]["subj01"]["models"]:
            model["file"] = path

    def as_file(content):
        content["digests"][path] = "0"

    for change in (as_network, as_heads, as_file):
        forged(copy, change)
        refused(copy, "a file called", lambda folder: load_encoder(folder).predict(picture, subject="subj01"))
        (copy / DESCRIPTION).write_text(original)


def test_a_folder_that_is_missing_or_of_something_else_is_refused(tmp_path):
    refused(tmp_path / "gone", "name one that 'export' wrote")
    refused(tmp_path, f"no {DESCRIPTION}")
    (tmp_path / DESCRIPTION).mkdir()
    refused(tmp_path, "cannot be read")


@pytest.mark.parametrize("kind", ["folder", "file"])
def test_what_is_there_is_refused_and_kept(every_kind, subjects, tmp_path, kind):
    target = tmp_path / "out"
    kept = target / "mine.txt" if kind == "folder" else target
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("mine")
    refused(target, "new or empty", lambda folder: export_work(subjects[:1], every_kind, folder))
    assert kept.read_text() == "mine" and list(tmp_path.iterdir()) == [target]


def test_an_empty_folder_is_filled_and_an_interrupted_export_leaves_nothing(
    every_kind, subjects, tmp_path, monkeypatch
):
    target = tmp_path / "out"
    target.mkdir()

    def interrupted(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(of_folder, "replace_json", interrupted)  # the last file
        with pytest.raises(KeyboardInterrupt):
            export_work(subjects[:1], every_kind, target)
    assert list(tmp_path.iterdir()) == [target] and not list(target.iterdir())
    model = encoder_of_work(subjects[:1], every_kind).models()[1]
    n_bytes = export_work(subjects[:1], every_kind, target, model=model[-6:])
    assert n_bytes == sum((target / name).stat().st_size for name in files_in(target))
    assert load_encoder(target).models() == [model] and list(tmp_path.iterdir()) == [target]
