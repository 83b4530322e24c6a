"""A lab's own files on the command line: imported, given features from elsewhere, fitted, blended."""

import csv
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import cli
from featcache.dataset.folder import scan_folder
from support.commands import fails, run
from support.lab import N_IMAGES, N_TEST, N_VERTICES, Lab


@pytest.fixture
def work(lab, tmp_path, monkeypatch) -> Path:
    """A work folder with a subject of two surfaces, whose test responses are known."""
    monkeypatch.setenv("FEATCACHE_WORK", str(tmp_path / "work"))
    here = Lab(tmp_path, lab.signal)
    responses = np.tile(lab.signal, (2, 1)) + 0.3 * np.random.default_rng(0).normal(
        size=(2 * len(lab.signal), N_VERTICES)
    )
    split = ["train"] * N_IMAGES + ["test"] * N_TEST
    table = here.table("t.csv", image=lab.names * 2, part=split * 2)
    assert (
        cli.run(
            [
                *("import", "--images", str(lab.photos), "--table", str(table), "--split-column", "part"),
                *("--responses", f"V1={here.save('a.npy', responses[:, :7])}"),
                *("--responses", f"V4={here.save('b.npy', responses[:, 7:])}"),
            ]
        )
        == 0
    )
    return tmp_path / "work"


def causes(lab: Lab) -> np.ndarray:
    """Mean colour and contrast of each photo: what the planted responses depend on, linearly."""
    pixels = [np.asarray(Image.open(lab.photos / name), dtype=float) for name in lab.names]
    return np.stack([[*image.mean((0, 1)), (image - image.mean((0, 1))).std()] for image in pixels])


def write_features(path: Path, names: list[str], values: np.ndarray) -> str:
    with path.open("w", newline="", encoding="utf-8") as file:
        rows = csv.writer(file)
        rows.writerow(["image", *(f"f{n}" for n in range(values.shape[1]))])
        rows.writerows([name, *row] for name, row in zip(names, values.tolist(), strict=True))
    return str(path)


def test_import_says_what_it_did(lab, tmp_path, capfd):
    np.save(tmp_path / "r.npy", lab.signal)
    arguments = ("--images", str(lab.photos), "--responses", str(tmp_path / "r.npy"), "--work", str(tmp_path / "w"))
    first = run(capfd, "import", *arguments)
    assert first["subject"] == "subj01" and first["vertices"] == {"all": N_VERTICES} and first["new"]
    assert first["images"] == first["trials"] == N_IMAGES + N_TEST and first["test_images"] == 0
    assert any("no noise ceilings" in note for note in first["notes"]) and Path(first["folder"]).is_dir()
    again = run(capfd, "import", *arguments)
    assert not again["new"] and again["folder"] == first["folder"]
    assert cli.run(["import", *arguments]) == 0
    assert f"subj01: {N_IMAGES + N_TEST} training images, " in capfd.readouterr().out


def test_features_from_elsewhere_are_fitted_listed_and_blended_under_their_name(lab, work, tmp_path, capfd):
    order = np.random.default_rng(1).permutation(len(lab.names))
    names = [lab.names[number] for number in order]
    good = write_features(tmp_path / "colour.csv", names, causes(lab)[order])
    noise = write_features(tmp_path / "n.csv", names, np.random.default_rng(2).normal(size=(len(names), 3)))
    added = run(capfd, "add-features", good)  # named after the file
    assert [store["images"] for store in added["stores"]] == [N_IMAGES + N_TEST]
    run(capfd, "add-features", noise, "--name", "noise")
    assert run(capfd, "add-features", good)["stores"][0]["new"] == 0
    run(capfd, "fit-heads")
    models = {model["name"]: model for model in run(capfd, "models")["models"]}
    assert {name.split()[0] for name in models} == {"colour", "noise"}
    blended = run(capfd, "blend", "--method", "score")
    (weights,) = blended["weights"].values()
    for surface in ("V1", "V4"):
        of_surface = {name.split()[0]: weight for name, weight in weights[surface]["all"].items()}
        assert of_surface["colour"] > 0.9  # the planted causes, against noise
    predictions = np.load(work / "submission/subj01/V4_pred_test.npy")
    truth = scan_folder(work / "dataset")[0].subjects[0].test_responses("V4")
    r = [np.corrcoef(predictions[:, v], truth[:, v])[0, 1] for v in range(truth.shape[1])]
    assert np.mean(r) > 0.8


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--name", "a/b"], ["--name", "found 'a/b'"]),
        (["--subject", "9"], ["--subject", "subj01", "'subj09'"]),
        (["--ids", "no.csv"], ["no.csv", "found none"]),
        (["--data", "nowhere"], ["--data", "no folder nowhere"]),
    ],
)
def test_what_add_features_refuses(arguments, words, lab, work, tmp_path, capfd):
    features = write_features(tmp_path / "f.csv", lab.names, causes(lab))
    line = fails(capfd, "add-features", features, *arguments)
    assert all(word in line for word in words), line
    assert not (work / "features.zarr").exists()


def test_add_features_needs_ids_and_every_image(lab, work, tmp_path, capfd):
    np.save(tmp_path / "f.npy", causes(lab))
    assert "--ids: expected" in fails(capfd, "add-features", str(tmp_path / "f.npy"))
    few = write_features(tmp_path / "f.csv", lab.names[:-2], causes(lab)[:-2])
    line = fails(capfd, "add-features", few)
    assert f"found none for 2: {lab.names[-2]}, {lab.names[-1]}" in line
    line = fails(capfd, "add-features", str(tmp_path / "my features.npy"))  # named after the file by default
    assert line.startswith("error: --name: ") and "found 'my features'" in line
