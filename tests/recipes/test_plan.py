"""Plans: counts and sizes are those of what is then run, and nothing is run."""

import re
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

import cli
from featcache.backbone.outline import outline
from featcache.cache.store import Row, create_store, stored_bytes
from featcache.config import BackboneConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.machine.memory import memory_at_start
from featcache.simulate import SimulateConfig
from heads.recipes.plan import Counts, simulated
from support.commands import SMALL, run


@pytest.fixture
def work(tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(tmp_path / "work")}).items():
        monkeypatch.setenv(name, value)
    return tmp_path / "work"


@pytest.fixture
def planned(work: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]):
    """Plan a recipe, and, where it is asked for, run it: (plan, total, bytes on the disk by folder)."""

    def plan(text: str, *options: str, then_run: bool = False):
        (path := tmp_path / "r.toml").write_text(text)
        found = run(capfd, "run", str(path), "--plan", *options)
        assert not work.exists()
        if then_run:
            run(capfd, "run", str(path), *options)
        return found["plan"], found["total"], {folder.name: bytes_in(folder) for folder in work.glob("*")}

    return plan


def bytes_in(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def test_a_tree_to_be_simulated_has_the_counts_of_the_tree(tiny):
    assert [Counts.of(subject) for subject in open_challenge(tiny).subjects] == simulated(TINY)


def test_the_full_tree_has_the_counts_of_the_challenge():
    subjects = simulated(SimulateConfig.full())
    assert [counts.n_train for counts in subjects] == [9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779]
    assert subjects[5].n_vertices == {"lh": 18978, "rh": 20220} and subjects[7].n_vertices == {"lh": 18981, "rh": 20530}


EXTRACT = '[[steps]]\nrun = "extract"\nlayers = "{}"\n'


@pytest.mark.parametrize("n_rows", [1, 31, 64, 300])
@pytest.mark.parametrize("shape", [(7,), (9, 9, 640), (20_000,)])
def test_rows_take_whole_chunks_on_the_disk(tmp_path, shape, n_rows):
    row = Row(shape, "float16")
    store = create_store(tmp_path, "one", {}, np.arange(n_rows), n_rows, {"a": row}, {})
    with store.writing():
        store.append({"a": np.ones((n_rows, *shape), np.float16)})
    chunks = [path.stat().st_size for path in store.path.glob("a/c/**/*") if path.is_file()]
    assert sum(chunks) == stored_bytes(row, n_rows) + 4 * len(chunks)  # and a checksum each


@pytest.mark.parametrize("layers", ["pooled", "auto", "layer2,layer4"])
def test_the_disk_of_features_is_what_extract_then_writes(planned, layers):
    (step,), total, written = planned(EXTRACT.format(layers), then_run=True)
    # besides rows there are the descriptions of stores and of their arrays, a few kB each
    arrays = 2 * (len(layers.split(",")) if layers != "auto" else 6)
    assert 0 <= written["features.zarr"] - step["disk"] < 0.03 * step["disk"] + 6000 * arrays
    assert total["disk"] == step["disk"]


def test_the_disk_of_heads_is_what_fit_heads_then_writes(planned):
    fits = '[[steps]]\nrun = "fit-heads"\n[[steps]]\nrun = "fit-heads"\nloss = "smooth_l1"\nepochs = 1\n'
    plan, _, written = planned(EXTRACT.format("pooled") + fits, then_run=True)
    there = written["predictions.zarr"] + written["heads"]
    assert plan[1]["disk"] == plan[2]["disk"] > 0  # the same rows, and weights of the same shape
    assert 0 <= there - plan[1]["disk"] - plan[2]["disk"] < 0.05 * there + 12000 * 4


def test_the_disk_of_training_is_what_it_then_writes(planned):
    train = '[[steps]]\nrun = "pretrain"\nfold = 0\nepochs = 1\nembedding = 2\n'
    (step,), _, written = planned(train, then_run=True)
    assert written["checkpoints"] + written["pixels"] == pytest.approx(step["disk"], rel=0.1)


def test_heads_are_planned_for_the_features_that_are_named(planned):
    """By the names that the features then have: of a frozen backbone as of a trained one."""
    text = (
        EXTRACT.format("pooled") + 'fit = "whole"\n[[steps]]\nrun = "pretrain"\nfold = 0\nepochs = 1\nembedding = 2\n'
    )
    text += EXTRACT.format("pooled")
    fit = '[[steps]]\nrun = "fit-heads"\nfeatures = "{}"\n'
    names = ["*@48 whole", "test_resnet@48 pretrain", "*@64"]
    found = [planned(text + fit.format(name))[0][-1]["disk"] for name in names]
    assert planned(text + fit.format(f"{names[1]} 0a1b2c"))[0][-1]["disk"] == found[1]  # digits are not known yet
    plan, _, written = planned(text + fit.format(names[0]) + fit.format(names[1]), then_run=True)
    assert [step["disk"] for step in plan[-2:]] == found[:2] and min(found[:2]) > 0 == found[2]
    there = written["predictions.zarr"] + written["heads"]
    assert 0 <= there - sum(found) < 0.05 * there + 12000 * 4


def test_images_are_decoded_once_for_each_fit(planned):
    """The second training of a fit adds weights alone; another fit adds images as many as the first."""
    train = '[[steps]]\nrun = "pretrain"\nfold = 0\nepochs = 1\nembedding = 2\nseed = {}\n{}\n'
    fits = [(0, ""), (1, 'fit = "crop"'), (2, 'fit = "whole"')]
    plan, _, _ = planned("".join(train.format(*about) for about in fits))
    first, again, whole = (step["disk"] for step in plan)
    assert first == whole > again > 0


def test_a_later_step_counts_on_what_earlier_ones_leave(planned):
    """Features of every checkpoint, and heads of every one of their features; nothing twice."""
    train = '[options]\nepochs = 1\n[[steps]]\nrun = "pretrain"\nfolds = 3\n'
    fits = '[[steps]]\nrun = "fit-heads"\nsolver = "trained"\n'
    plan, _, _ = planned((train + EXTRACT.format("pooled") * 2).replace("[options]\nepochs = 1\n", "") + fits)
    frozen, _, _ = planned(EXTRACT.format("pooled"))
    assert plan[1]["disk"] == 3 * frozen[0]["disk"] and plan[2]["disk"] == 0
    assert plan[3]["disk"] > 0
    assert planned(EXTRACT.format("pooled") + fits)[0][1]["disk"] == 0  # no heads were trained with a frozen backbone


def test_each_layer_is_a_model(planned):
    """Predictions of a model for each of pooled and five layers, and one for all of them; one for losses alike."""
    fits = '[[steps]]\nrun = "fit-heads"\nlayers = ["each", "all"]\nloss = ["mnnpc", "pearson"]\n'
    plan, _, _ = planned(EXTRACT.format("auto") + fits)
    each, again, joint, _ = (step["disk"] for step in plan[1:])
    assert again == plan[4]["disk"] == 0 and each > joint > 0
    sizes = [30 + 5, 24 + 6]
    vertices = [84, 84]
    predictions = 4 * sum(a * b for a, b in zip(sizes, vertices, strict=True))
    assert each - joint == 5 * predictions  # weights are of the same features, once or layer by layer


def test_several_losses_of_one_step_are_a_model_each_as_they_are_run(planned):
    fits = '[[steps]]\nrun = "fit-heads"\nlayers = "pooled"\nepochs = 1\nloss = {}\n'
    together, total, written = planned(EXTRACT.format("pooled") + fits.format('"mnnpc,smooth_l1"'), then_run=True)
    assert together[1]["disk"] == pytest.approx(written["predictions.zarr"] + written["heads"], rel=0.2)
    assert total["disk"] == sum(step["disk"] for step in together)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        ('run = "fit-heads"\nproducts = "tf32"', "step 2 (fit-heads): --products tf32: expected a CUDA device"),
        ('run = "extract"\ndtype = "tf32"', "step 2 (extract): --dtype tf32: expected a CUDA device"),
        ('run = "pretrain"\nprecision = "tf32"', "step 2 (pretrain): --precision tf32: expected a CUDA device"),
    ],
)
def test_what_the_device_cannot_do_is_refused_before_the_first_step(work, tmp_path, capfd, step, message):
    (path := tmp_path / "r.toml").write_text(EXTRACT.format("pooled") + f'[[steps]]\n{step}\ndevice = "cpu"\n')
    for options in ([], ["--plan"]):
        assert cli.run(["run", str(path), *options]) == 1
        assert message in capfd.readouterr().err.splitlines()[-1]
        assert not work.exists()


def test_a_plan_needs_neither_tree_nor_weights_and_writes_neither(planned, tmp_path):
    text = '[[steps]]\nrun = "simulate"\nsubjects = 1\nimages = 20\ntest-images = 5\nshared = 0\nvertices = 90\n'
    text += '[[steps]]\nrun = "check"\n' + EXTRACT.format("pooled") + 'weights = "hub"\n'
    plan, _, _ = planned(text, "--data", str(tmp_path / "made"))
    assert [step["disk"] is None for step in plan] == [True, True, False]
    network = outline(BackboneConfig(name="test_resnet", size=48), LayerConfig(layers=("pooled",)))
    assert plan[2]["disk"] == 25 * 4 * network.n_features
    assert not (tmp_path / "made").exists()


def test_a_size_that_a_network_cannot_take_names_the_step(work, tmp_path, capfd):
    (path := tmp_path / "r.toml").write_text(EXTRACT.format("pooled") + 'backbone = "test_vit"\nsize = 17\n')
    assert cli.run(["run", str(path), "--plan"]) == 1
    assert "step 1 (extract): --size: " in capfd.readouterr().err.splitlines()[-1]


def test_a_blend_is_of_the_models_that_earlier_steps_fit(planned):
    fits = '[[steps]]\nrun = "fit-heads"\nlayers = "{}"\n[[steps]]\nrun = "blend"\n'
    nothing, few, many = (
        planned(EXTRACT.format("auto") + steps)[0][-1]
        for steps in ('[[steps]]\nrun = "blend"\n', fits.format("pooled"), fits.format("each"))
    )
    assert nothing["memory"] < few["memory"] < many["memory"]


SAYS = re.compile(r"about ([\d.]+) (MB|GB) of memory")


@pytest.mark.parametrize("layers", ["pooled", "layer2,layer4"])
@pytest.mark.parametrize("loss", ["mnnpc", "smooth_l1"])
def test_the_memory_of_heads_is_what_their_solvers_expect(planned, tmp_path, capfd, monkeypatch, layers, loss):
    monkeypatch.setattr("featcache.machine.memory.used_memory", lambda: 0)  # of the tests' process, which is most of it
    memory_at_start.cache_clear()
    text = EXTRACT.format(layers) + f'[[steps]]\nrun = "fit-heads"\nloss = "{loss}"\n'
    text += "epochs = 1\n" if loss == "smooth_l1" else ""
    plan, _, _ = planned(text)
    assert cli.run(["run", str(tmp_path / "r.toml")]) == 0
    units = {"MB": 1e6, "GB": 1e9}
    said = [float(number) * units[unit] for number, unit in SAYS.findall(capfd.readouterr().err)]
    memory_at_start.cache_clear()
    start = 0.12e9  # libraries
    assert max(said) - start == pytest.approx(plan[1]["memory"] - start, rel=0.02, abs=0.1e6)


def test_more_epochs_take_no_more_memory(planned):
    fits = '[[steps]]\nrun = "fit-heads"\nloss = "smooth_l1"\nepochs = {}\n'
    few, many = (planned(EXTRACT.format("pooled") + fits.format(n))[0][1] for n in (1, 100))
    assert many["memory"] == few["memory"] and many["disk"] == few["disk"]


def test_a_plan_for_the_whole_challenge_reads_nothing(planned, tmp_path):
    """Eight subjects, a backbone of 350 million weights, five folds: arithmetic alone, in seconds."""
    text = '[[steps]]\nrun = "simulate"\nfull = true\n[[steps]]\nrun = "pretrain"\nbackbone = "convnext_base"\n'
    text += 'weights = "hub"\n[[steps]]\nrun = "extract"\nbackbone = "convnext_base"\nlayers = "pooled"\n'
    text += '[[steps]]\nrun = "fit-heads"\n[[steps]]\nrun = "blend"\n'
    plan, total, _ = planned(text, "--data", str(tmp_path / "made"))
    n_images, features = sum(n + m for n, m in zip(*CHALLENGE, strict=True)), 4 * 1024
    chunk = 256 * features  # rows are stored in whole chunks
    assert 0 <= plan[2]["disk"] - 5 * n_images * features < 5 * 8 * chunk
    assert plan[1]["memory"] > 5 * 350e6 and total["disk"] == sum(step["disk"] or 0 for step in plan)


CHALLENGE = (
    (9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779),
    (159, 159, 293, 395, 159, 293, 159, 395),
)


TRAIN = """[[steps]]
run = "finetune"
init = "none"
fold = 0
subject = "1"
epochs = 1
batch-size = 4
"""


def test_a_plan_of_a_training_on_a_device_is_of_what_the_device_then_holds(planned, pretended_cuda):
    """Arithmetic on counts is within a factor of two; in bfloat16, the precision of the training."""
    (step,), total, _ = planned(TRAIN, "--device", "cuda")
    assert total["device"] == step["device"]
    pretended_cuda.forget()
    planned(TRAIN, "--device", "cuda", then_run=True)
    assert 0.5 < step["device"] / pretended_cuda.peak < 2


def test_backbones_that_extract_removes_are_taken_off_the_disk_of_a_plan(planned):
    kept, total, _ = planned(TRAIN + EXTRACT.format("pooled") + "prune = false\n")
    pruned, less, _ = planned(TRAIN + EXTRACT.format("pooled") + "prune = true\n")
    backbone = BackboneConfig(name="test_resnet", weights="none", size=32)
    weights = outline(backbone, LayerConfig(layers=("pooled",))).weights
    assert kept[1]["disk"] - pruned[1]["disk"] == total["disk"] - less["disk"] == weights
