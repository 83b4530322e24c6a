"""Plans: counts and sizes are those of what is then run, and nothing is run."""

import json
from pathlib import Path

import numpy as np
import pytest
from conftest import TINY

import cli
from featcache.cache.store import Row, create_store, stored_bytes
from featcache.config import BackboneConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.machine.progress import size_of
from featcache.simulate import SimulateConfig
from heads.config import RidgeConfig
from heads.recipes.plan import Estimate, simulated
from heads.recipes.steps import Step
from heads.recipes.timings import network
from heads.report.tables import duration_of, plan_as_json
from heads.solvers.ridge_folds import effort_of
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
    there, planned = open_challenge(tiny), simulated(TINY, tiny)
    assert [counts(one) for one in there.subjects] == [counts(one) for one in planned.subjects]


def test_the_full_tree_has_the_counts_of_the_challenge():
    subjects = simulated(SimulateConfig.full(), Path("anywhere")).subjects
    assert [len(one.train) for one in subjects] == [9841, 9841, 9082, 8779, 9841, 9082, 9841, 8779]
    assert subjects[5].n_vertices == {"lh": 18978, "rh": 20220} and subjects[7].n_vertices == {"lh": 18981, "rh": 20530}


def counts(subject) -> tuple:
    return subject.name, len(subject.train), len(subject.test), subject.n_vertices


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
    fits = '[[steps]]\nrun = "fit-heads"\nlayers = ["each", "joint"]\nloss = ["mnnpc", "pearson"]\n'
    plan, _, _ = planned(EXTRACT.format("auto") + fits)
    each, again, joint, _ = (step["disk"] for step in plan[1:])
    assert again == plan[4]["disk"] == 0 and each > joint > 0
    sizes = [30 + 5, 24 + 6]
    vertices = [84, 84]
    predictions = 4 * sum(a * b for a, b in zip(sizes, vertices, strict=True))
    assert each - joint == 5 * predictions  # weights are of the same features, once or layer by layer


def test_a_plan_needs_neither_tree_nor_weights_and_writes_neither(planned, tmp_path):
    text = '[[steps]]\nrun = "simulate"\nsubjects = 1\nimages = 20\ntest-images = 5\nshared = 0\nvertices = 90\n'
    text += '[[steps]]\nrun = "check"\n' + EXTRACT.format("pooled") + 'weights = "hub"\n'
    plan, _, _ = planned(text, "--data", str(tmp_path / "made"))
    assert [step["seconds"] is None for step in plan] == [True, True, False]
    rows = network(
        BackboneConfig(name="test_resnet", weights="hub", size=48),
        LayerConfig(layers=("pooled",)),
        "float32",
        "cpu",
        True,
    ).rows
    assert plan[2]["disk"] == 25 * sum(row.n_bytes for row in rows.values())
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
    assert nothing["seconds"] == 0 < few["seconds"] < many["seconds"]
    assert nothing["memory"] < few["memory"] < many["memory"]


def test_more_images_vertices_and_epochs_take_more(planned):
    fits = '[[steps]]\nrun = "fit-heads"\nloss = "smooth_l1"\nepochs = {}\n'
    few, many = (planned(EXTRACT.format("pooled") + fits.format(n))[0][1] for n in (1, 100))
    assert many["seconds"] > 10 * few["seconds"] and many["memory"] == few["memory"]


def test_the_products_of_a_closed_form_grow_with_what_they_multiply():
    """Twice the vertices are twice the products beyond the scatter of the features; no vertices are that scatter."""
    sizes = ((9000, 300), 2048)
    none, one, two = (effort_of(*sizes, (n,), 5, RidgeConfig())[0] for n in (0, 1000, 2000))
    assert none == 2 * 9300 * 2048 * 2048 and two - one == one - none > 0
    assert effort_of(*sizes, (1000,), 5, RidgeConfig())[1] == {2048: 5}


def test_times_add_up_and_memory_does_not():
    steps = [Estimate(Step(Path("r"), 1, "a"), 60.0, 5e9, 1e9), Estimate(Step(Path("r"), 2, "b"))]
    steps.append(Estimate(Step(Path("r"), 3, "c"), 40.0, 7e9, None))
    found = plan_as_json(steps)
    assert found["total"] == {"seconds": 100.0, "memory": 7e9, "disk": 1e9}
    assert found["plan"][1]["seconds"] is None and json.dumps(found)


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.123, "0.12 s"),
        (9.94, "9.9 s"),
        (119, "119 s"),
        (150, "2.5 min"),
        (5400, "90 min"),
        (9000, "2.5 h"),
        (864e3, "10 days"),
    ],
)
def test_times_in_words(seconds, said):
    assert duration_of(seconds) == said and size_of(1e9) == "1.0 GB"
