"""The commands as a user runs them: three bare ones after another, and one line for every mistake."""

import json
import re
import resource
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
from safetensors.torch import load_file

import cli
from featcache.cache.store import open_store
from featcache.dataset.algonauts import open_challenge
from support.commands import SMALL, fails, run

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Bare commands find the tiny tree, a small backbone and a work folder in the environment."""
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(tmp_path / "work")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "work"


def test_the_three_bare_commands(work, tiny, capfd, pictures, every_window):
    assert len(run(capfd, "extract")["stores"]) == 2
    fitted = run(capfd, "fit-heads", "--loss", "mnnpc")
    blended = run(capfd, "blend")
    assert Path(blended["submission"]) == work / "submission.zip"
    with zipfile.ZipFile(blended["submission"]) as archive:
        for subject in open_challenge(tiny).subjects:
            for hemisphere, n_vertices in subject.n_vertices.items():
                with archive.open(f"{subject.name}/{hemisphere}_pred_test.npy") as file:
                    predictions = np.load(file)
                assert predictions.shape == (len(subject.test), n_vertices) and predictions.dtype == np.float32
                assert np.isfinite(predictions).all() and predictions.std() > 0
    assert all(Path(store["weights"]).is_file() for store in fitted["stores"])
    assert (work / "submission/weights.png").stat().st_size > 5000
    again = [run(capfd, "extract"), run(capfd, "fit-heads", "--loss", "mnnpc"), run(capfd, "blend")]
    assert sum(store["new"] for store in again[0]["stores"]) == 0
    assert again[1]["scores"] == fitted["scores"] and again[2]["scores"] == blended["scores"]


def test_losses_with_one_optimum_share_their_heads_and_others_do_not(work, capfd):
    run(capfd, "extract", "--layers", "pooled")
    first = run(capfd, "fit-heads", "--loss", "mnnpc")
    assert run(capfd, "fit-heads", "--loss", "pearson+0.5*mse")["stores"] == first["stores"]
    other = run(capfd, "fit-heads", "--loss", "smooth_l1+mnnpc", "--epochs", "2")
    assert {s["path"] for s in other["stores"]}.isdisjoint(s["path"] for s in first["stores"])
    roi = run(capfd, "fit-heads", "--loss", "mse", "--head", "roi", "--epochs", "2")
    assert len({s["model"] for fit in (first, other, roi) for s in fit["stores"]}) == 3
    blended = run(capfd, "blend", "--method", "score")
    assert set(blended["scores"]) == {"best single", "uniform", "blend"}
    for weights in (w["all"] for subject in blended["weights"].values() for w in subject.values()):
        assert len(weights) == 3 and sum(weights.values()) == pytest.approx(1, abs=1e-5)


def test_several_losses_are_a_model_each_unless_they_are_one(work, capfd):
    run(capfd, "extract", "--layers", "pooled")
    arguments = ("--loss", "mnnpc,0.5*mse+pearson", "--solver", "adamw", "--epochs", "2")
    both = run(capfd, "fit-heads", *arguments)
    assert len({s["model"] for s in both["stores"]}) == 2
    subjects = [s["subject"] for s in both["stores"]]
    assert subjects == sorted(subjects) and len(subjects) == 2 * len(set(subjects))
    alone = run(capfd, "fit-heads", "--loss", "pearson+0.5*mse", *arguments[2:])  # the same sum, found again
    assert {s["path"] for s in alone["stores"]} < {s["path"] for s in both["stores"]}
    one = run(capfd, "fit-heads", "--loss", "mnnpc,pearson,mse")
    assert len({s["model"] for s in one["stores"]}) == 1
    assert len({s["path"] for s in both["stores"] + one["stores"]}) == 3 * len(set(subjects))
    assert cli.run(["fit-heads", "--loss", "mnnpc,none"]) == 1
    assert "'none'" in capfd.readouterr().err
    assert cli.run(["fit-heads", "--solver", "ridge", "--batch-size", "9"]) == 1
    assert "--batch-size: expected --solver adamw" in capfd.readouterr().err


def test_changed_responses_are_fitted_again_and_stale_predictions_left_out(tree, work, capfd):
    arguments = ("--data", str(tree))
    run(capfd, "extract", "--layers", "pooled", *arguments)
    first = run(capfd, "fit-heads", *arguments)
    path = tree / "subj01/training_split/training_fmri/lh_training_fmri.npy"
    np.save(path, np.load(path)[::-1])
    cli.run(["blend", *arguments])
    assert "fitted to other images or responses" in capfd.readouterr().err
    second = run(capfd, "fit-heads", *arguments)
    assert [a["path"] == b["path"] for a, b in zip(first["stores"], second["stores"], strict=True)] == [False, True]


def test_one_subject_at_a_time(work, capfd):
    assert [store["subject"] for store in run(capfd, "extract", "--subject", "2", "--layers", "pooled")["stores"]] == [
        "subj02"
    ]
    assert [store["subject"] for store in run(capfd, "fit-heads")["stores"]] == ["subj02"]
    blended = run(capfd, "blend")
    assert blended["submission"] is None and (work / "submission/subj02/lh_pred_test.npy").is_file()


def test_without_ceilings_scores_are_correlations(tree, work, capfd, tmp_path):
    (tree / "noise_ceiling").rename(tmp_path / "elsewhere")
    run(capfd, "extract", "--layers", "pooled", "--data", str(tree))
    cli.run(["fit-heads", "--data", str(tree)])
    out, err = capfd.readouterr()
    assert "no noise ceiling: mean r (mean r^2)" in " ".join(out.split()) and "no noise ceilings" in err
    given = run(capfd, "fit-heads", "--data", str(tree), "--noise-ceiling", str(tmp_path / "elsewhere"))
    assert all(row["accuracy"] is not None for rows in given["scores"].values() for row in rows)


def test_check_lists_and_fails(tree, work, capfd):
    assert run(capfd, "check", "--data", str(tree))["faults"] == []
    sorted((tree / "subj01/test_split/test_images").iterdir())[0].write_bytes(b"")
    np.save(tree / "noise_ceiling/subj02/lh.npy", np.full(40, -1.0))
    assert cli.run(["check", "--data", str(tree), "--json"]) == 1
    assert len(json.loads(capfd.readouterr().out.splitlines()[-1])["faults"]) == 2


@pytest.mark.slow
def test_simulate_writes_a_tree_that_check_passes(tmp_path, capfd):
    data = str(tmp_path / "made")
    sizes = (
        "--subjects",
        "1",
        "--images",
        "12",
        "--test-images",
        "3",
        "--shared",
        "0",
        "--vertices",
        "90",
        "--image-size",
        "32",
    )
    run(capfd, "simulate", "--data", data, *sizes, "--workers", "1")
    assert run(capfd, "check", "--data", data, "--work", str(tmp_path / "work"))["faults"] == []
    assert "expected" in fails(capfd, "simulate", "--data", data, *sizes)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["extract", "--data", "nowhere"], "get the data of the Algonauts 2023 challenge .* 'simulate'"),
        (["fit-heads"], "found none for the images of this tree; run 'extract' first"),
        (["blend"], "found none; run 'extract' and 'fit-heads' first"),
        (["extract", "--backbone", "convnext_xlarg"], "did you mean .*convnext_xlarge"),
        (["extract", "--weights", "nowhere.pth"], "found no file nowhere.pth"),
        (["extract", "--layers", "everything"], "--layers: expected auto, all, pooled, act1, .* found 'everything'"),
        (
            ["extract", "--grid", "9"],
            "--grid: expected at most the places of each layer; found 9 x 9 for layer2, whose map is 6 x 6",
        ),
        (["extract", "--grid", "many"], "--grid: expected auto, native or a number from 1; found 'many'"),
        (["extract", "--pool", "sum"], "--pool: expected one of avg, max; found 'sum'"),
        (["layers", "convnext_xlarg"], "did you mean .*convnext_xlarge"),
        (["extract", "--dtype", "int8"], "--dtype: expected one of"),
        (["extract", "--subject", "9"], "--subject: expected one of subj01, subj02"),
        (["extract", "--size", "big"], "--size"),
        (["extract", "--batch-size", "0"], "--batch-size: expected 1 or more; found 0"),
        (["fit-heads", "--loss", "mnpc"], "--loss: expected smooth_l1, .* found 'mnpc'"),
        (["fit-heads", "--solver", "ridge", "--loss", "smooth_l1"], "--solver ridge: expected --head linear"),
        (["fit-heads", "--folds", "1"], "--folds: expected 2 or more; found 1"),
        (
            ["fit-heads", "--epochs", "3"],
            "--epochs: expected --solver adamw with it; found --solver auto, which is ridge for --head linear and",
        ),
        (["fit-heads", "--solver", "ridge", "--weight-decay", "0.1"], "--weight-decay: .*found --solver ridge; leave"),
        (["fit-heads", "--rank", "4"], "--rank: expected --head spatial with it; .*; leave --rank out, or"),
        (["fit-heads", "--solver", "adamw", "--head", "roi", "--space", "9"], "--space: .*; found --head roi; leave"),
        (["fit-heads", "--solver", "trained", "--head", "linear"], "--head: expected a solver that fits heads with it"),
        (["fit-heads", "--solver", "trained", "--folds", "5"], "--folds: .*, which takes the heads of a checkpoint as"),
        (["blend", "--method", "magic"], "--method: expected one of uniform, score, greedy, nnls; found 'magic'"),
        (["blend", "--per", "lobe"], "--per: expected one of all, surface, roi, vertex; found 'lobe'"),
        (["blend", "--preset", "cake"], "--preset: expected one of best, paper; found 'cake'"),
        (["models"], "found none; run 'extract' and 'fit-heads' first"),
        (["blend", "--nonsense"], "--nonsense"),
        (["conquer"], "conquer"),
    ],
)
def test_a_mistake_is_one_line_and_code_1(work, capfd, arguments, message):
    line = fails(capfd, *arguments)
    assert re.search(message, line), line


def test_a_fold_without_an_image_is_refused(work, capfd):
    run(capfd, "extract", "--layers", "pooled")
    assert "--folds: expected an image in each of the 30 folds" in fails(capfd, "fit-heads", "--folds", "30")


def test_a_work_folder_that_cannot_be_written_is_one_line(work, tmp_path, capfd):
    (tmp_path / "file").write_text("a file where the folder should be")
    assert "choose another --work" in fails(capfd, "extract", "--work", str(tmp_path / "file"))


NOBODY = """
import os, sys, cli
assert cli.run(["extract", "--subject", "1", "--layers", "pooled"]) == 0  # loads every module while it still may
if os.geteuid() == 0:  # root may write anywhere
    os.seteuid(65534)
sys.exit(cli.run(["extract", "--work", sys.argv[1]]))
"""


def test_a_read_only_work_folder_is_one_line(work, tmp_path):
    (tmp_path / "locked").mkdir(mode=0o555)
    for folder in (tmp_path, *tmp_path.parents[:3]):
        folder.chmod(folder.stat().st_mode | 0o055)
    done = subprocess.run([sys.executable, "-c", NOBODY, tmp_path / "locked"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "choose another --work" in done.stderr


def test_a_full_disk_is_one_line_and_keeps_what_was_committed(work, tiny, capfd):
    """A limit on file size stands in for the disk: it is met in the middle of a chunk of predictions."""
    run(capfd, "extract", "--layers", "pooled")

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))

    command = [sys.executable, "cli.py", "fit-heads", "--data", str(tiny), "--work", str(work)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, preexec_fn=limited)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ") and "what was committed is intact" in done.stderr
    assert sum(store["new"] for store in run(capfd, "extract", "--layers", "pooled")["stores"]) == 0
    assert len(run(capfd, "fit-heads")["stores"]) == 2


def test_a_store_of_an_older_format_is_one_line(work, capfd):
    run(capfd, "extract", "--layers", "pooled")
    description = next((work / "features.zarr").iterdir()) / "zarr.json"
    description.write_text(description.read_text().replace('"format": 1', '"format": 0'))
    assert "expected store format 1; found 0; use the version" in fails(capfd, "fit-heads")


@pytest.mark.slow
def test_the_installed_command_is_the_same_program():
    done = subprocess.run([sys.executable, "cli.py", "extract", "--help"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "--backbone" in done.stdout


def test_no_command_is_help(capfd):
    assert cli.run([]) == 0 and "fit-heads" in capfd.readouterr().out


def test_predictions_made_with_other_ceilings_are_left_out_by_name(tree, work, capfd):
    arguments = ("--data", str(tree))
    run(capfd, "extract", "--layers", "pooled", *arguments)
    for _ in range(2):
        run(capfd, "fit-heads", *arguments, "--loss", "smooth_l1", "--epochs", "1")
        path = tree / "noise_ceiling/subj01/lh.npy"
        np.save(path, np.load(path) * 0.9)
    np.save(path, np.load(path) / 0.9)
    assert cli.run(["blend", *arguments]) == 0
    assert "subj01: left out" in (err := capfd.readouterr().err) and "another noise_ceiling than given now" in err


def test_an_older_zip_does_not_outlive_a_blend_without_one(work, capfd):
    run(capfd, "extract", "--subject", "1", "--layers", "pooled")
    run(capfd, "fit-heads")
    (work / "submission.zip").write_text("of an older blend")
    run(capfd, "blend")
    assert not (work / "submission.zip").exists()


def test_nothing_is_left_behind_by_folds_that_cannot_be(work, capfd):
    run(capfd, "extract", "--layers", "pooled")
    fails(capfd, "fit-heads", "--folds", "30")
    assert not (work / "predictions.zarr").exists()


@pytest.mark.parametrize("content", ["[]", "{", "\udcff"])
def test_a_damaged_index_is_only_a_memory(work, capfd, content):
    run(capfd, "extract", "--layers", "pooled")
    for path in (work / "index").iterdir():
        path.write_bytes(content.encode(errors="surrogateescape"))
    assert sum(store["new"] for store in run(capfd, "extract", "--layers", "pooled")["stores"]) == 0


def test_a_reader_that_goes_away_is_no_fault(tiny, tmp_path):
    command = [sys.executable, "cli.py", "check", "--data", str(tiny), "--work", str(tmp_path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT) as process:
        process.stdout.close()
        said = process.stderr.read()
    assert process.returncode == 0 and "error" not in said and "Traceback" not in said


def test_an_interruption_says_what_is_kept(work, monkeypatch, capfd):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("featcache.cache.sources.load_backbone", interrupted)
    assert cli.run(["extract"]) == 130
    assert capfd.readouterr().err.splitlines()[-1].startswith("error: interrupted; what was committed is kept")


# --- layers


LAYERS = ("extract", "--layers", "pooled,layer2,layer4", "--grid", "2")


def reads(fitted: dict) -> set[tuple[str, ...]]:
    """The layers that each prediction store says it was fitted to."""
    keys = [open_store(Path(store["path"])).key["features"] for store in fitted["stores"]]
    return {tuple(key.get("read", key["layers"])) for key in keys}


def test_layers_lists_what_extract_takes(work, capfd):
    found = run(capfd, "layers", "test_resnet", "--size", "48")["layers"]
    assert [row["layer"] for row in found] == ["act1", "layer1", "layer2", "layer3", "layer4"]
    assert found[2] == {"layer": "layer2", "channels": 48, "height": 6, "width": 6}
    every = ",".join(row["layer"] for row in found)
    stores = run(capfd, "extract", "--subject", "1", "--layers", every, "--grid", "native")["stores"]
    arrays = open_store(Path(stores[0]["path"])).arrays
    assert [(n, a.shape[1:]) for n, a in arrays.items()] == [
        (row["layer"], (row["height"], row["width"], row["channels"])) for row in found
    ]


@pytest.mark.slow
def test_layers_need_no_weights_and_no_tree(capfd):
    assert len(run(capfd, "layers", "convnext_xlarge")["layers"]) == 4


@pytest.mark.parametrize(
    ("layers", "read"),
    [
        ("all", {("pooled", "layer2", "layer4")}),
        ("joint", {("pooled", "layer2", "layer4")}),
        ("each", {("pooled",), ("layer2",), ("layer4",)}),
        ("layer4,pooled", {("pooled", "layer4")}),
    ],
)
def test_heads_are_fitted_to_the_layers_that_are_asked_for(work, capfd, layers, read):
    run(capfd, *LAYERS, "--subject", "1")
    fitted = run(capfd, "fit-heads", "--layers", layers)
    assert reads(fitted) == read and len(fitted["stores"]) == len(read)
    assert len({store["model"] for store in fitted["stores"]}) == len(read)
    written = {store["path"]: Path(store["path"], "committed.json").stat().st_mtime_ns for store in fitted["stores"]}
    again = run(capfd, "fit-heads", "--layers", layers)
    assert again["stores"] == fitted["stores"] and again["scores"] == fitted["scores"]
    assert written == {path: Path(path, "committed.json").stat().st_mtime_ns for path in written}
    blended = run(capfd, "blend")
    assert all(len(w["all"]) == len(read) for subject in blended["weights"].values() for w in subject.values())


def test_names_of_models_say_what_tells_them_apart(work, capfd):
    """In words, which a fingerprint alone would not be; and nothing that is what it always is."""

    def names(*arguments: str) -> list[str]:
        fitted = run(capfd, "fit-heads", "--subject", "1", *arguments)
        return [store["model"].rsplit(" ", 1)[0] for store in fitted["stores"]]

    for grid, pool in (("2", "avg"), ("3", "avg"), ("3", "max")):
        run(capfd, "extract", "--subject", "1", "--layers", "pooled,layer3", "--grid", grid, "--pool", pool)
    assert set(names()) == {f"test_resnet@48 pooled+layer3 {places} linear ridge" for places in GRIDS}
    assert names("--layers", "pooled", "--seed", "3") == ["test_resnet@48 pooled linear ridge seed 3"] * len(GRIDS)
    few = ("--layers", "layer3", "--loss", "mse", "--head", "spatial", "--epochs", "1")
    start = "test_resnet@48 layer3 {} spatial mse"
    assert set(names(*few)) == {f"{start.format(places)} epochs 1" for places in GRIDS}
    found = names(*few, "--rank", "2", "--space", "5", "--batch-size", "8")
    assert set(found) == {f"{start.format(places)} epochs 1 batch size 8 rank 2 space 5" for places in GRIDS}


GRIDS = ("2x2", "3x3", "3x3 max")


def test_weights_files_have_an_array_for_each_layer(work, capfd):
    run(capfd, *LAYERS, "--subject", "1")
    (store,) = run(capfd, "fit-heads")["stores"]
    tensors = load_file(store["weights"])
    parts = {"intercept", "pooled.weights", "layer2.weights", "layer4.weights"}
    assert set(tensors) == {f"{hemisphere}.{part}" for hemisphere in ("lh", "rh") for part in parts}
    stored, predicted = (open_store(Path(path)) for path in (next((work / "features.zarr").iterdir()), store["path"]))
    for hemisphere in ("lh", "rh"):
        out = tensors[f"{hemisphere}.intercept"].numpy().astype(np.float64)
        for name in stored.arrays:
            rows = stored.read(name, stored.n_train).astype(np.float64)
            out = out + rows.reshape(len(rows), -1) @ tensors[f"{hemisphere}.{name}.weights"].numpy()
        np.testing.assert_allclose(predicted.read(hemisphere, predicted.n_train), out, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize("options", [(), ("--layers", "pooled"), ("--layers", "pooled", "--solver", "adamw")])
def test_a_cap_below_what_a_fit_takes_is_refused_before_it_starts(work, capfd, options):
    run(capfd, *LAYERS, "--subject", "1")
    line = fails(capfd, "fit-heads", "--max-memory", "0.05", *options)
    assert re.search(r"--max-memory: expected [\d.]+ GB or more .* found 0.05; give more", line)
    assert not (work / "predictions.zarr").exists()
    assert len(run(capfd, "fit-heads", "--max-memory", "64", *options)["stores"]) == 1


def test_heads_of_checkpoints_where_there_are_none_ask_for_training(work, capfd):
    run(capfd, *LAYERS, "--subject", "1")
    assert "run 'pretrain' or 'finetune', then 'extract'" in fails(capfd, "fit-heads", "--solver", "trained")


def test_a_layer_that_was_not_extracted_is_one_line_that_lists_those_that_were(work, capfd):
    run(capfd, *LAYERS)
    line = fails(capfd, "fit-heads", "--layers", "layer9")
    assert "all, each, or layers that were extracted (pooled, layer2, layer4); found 'layer9'" in line
    assert not (work / "predictions.zarr").exists()


def test_every_layer_that_the_line_lists_can_be_asked_for(work, capfd):
    """A class token goes with its layer and has no name of its own."""
    run(capfd, "extract", "--subject", "1", "--backbone", "test_vit", "--size", "32", "--layers", "pooled,-1")
    line = fails(capfd, "fit-heads", "--layers", "nothing")
    listed = re.search(r"\(([^)]*)\)", line)[1].split(", ")
    assert "blocks.5" in listed
    for name in listed:
        assert len(run(capfd, "fit-heads", "--layers", name)["stores"]) == 1


# --- pictures


def test_a_picture_of_two_ids_keeps_one_from_extraction_to_the_blend(tree, work, capfd):
    images = sorted((tree / "subj01/training_split/training_images").iterdir())
    shared = {path.name[-9:] for path in tree.glob("subj02/*/*_images/*")}
    first, second = [path for path in images if path.name[-9:] not in shared][:2]
    second.write_bytes(first.read_bytes())
    where = ("--data", str(tree))
    run(capfd, "extract", "--layers", "pooled", *where)
    fitted = run(capfd, "fit-heads", *where)["stores"]
    ids = [dict(zip(images, open_store(Path(fit["path"])).image_ids, strict=False)) for fit in fitted]
    assert ids[0][first] == ids[0][second] == min(int(path.stem[-5:]) for path in (first, second))
    assert run(capfd, "blend", *where)["submission"]

    (work / "index/subj01-pictures.npz").unlink()  # without which nobody knows of it
    cli.run(["fit-heads", *where])
    assert (
        "subj01: left out" in (said := capfd.readouterr().err)
        and "its training images have other ids now; run 'extract' again" in said
    )
    assert "run 'extract' first" in said
    assert sum(store["new"] for store in run(capfd, "extract", "--layers", "pooled", *where)["stores"]) == 0
    assert {fit["path"] for fit in run(capfd, "fit-heads", *where)["stores"]} == {fit["path"] for fit in fitted}
