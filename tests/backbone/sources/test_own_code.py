"""A network from a Python file is read as its modules say, and its store is found by its text and its weights."""

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import cli
from featcache.backbone.checkpoint import list_checkpoints
from featcache.backbone.network import load_backbone
from featcache.backbone.outline import outline
from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.algonauts import open_challenge
from featcache.errors import BackboneError
from support.commands import fails, run

NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Sequential(nn.Conv2d(3, 4, 3, 2, 1), nn.ReLU(inplace=True))
        self.two = nn.Sequential(nn.Conv2d(4, 6, 3, 2, 1), nn.BatchNorm2d(6), nn.ReLU(inplace=True))
        self.end = nn.Linear(6 * 64, 5)

    def forward(self, images):
        values = self.two(self.one(images))
        return self.end(values.view(len(values), -1))  # a view, which channels_last has not

def build():
    net = Net()
    net.transform = {"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "crop_pct": 1.0}
    return net
"""
OWN_TRANSFORM = (
    NETWORK.replace('{"size": 32, "mean": [0.4, 0.5, 0.6], "std": [0.2, 0.2, 0.3], "crop_pct": 1.0}', "transform")
    + """
def transform(image):
    import numpy as np
    return torch.from_numpy(np.array(image.resize((32, 32)))).permute(2, 0, 1) / 100 - 1
"""
)


def write(folder: Path, text: str = NETWORK, name: str = "net.py") -> str:
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    return f"{folder / name}:build"


def config(name: str, **options) -> ExtractConfig:
    return ExtractConfig(backbone=BackboneConfig(name=name, **options), dtype="float32", batch_size=4, workers=1)


def independent(folder: Path) -> torch.nn.Module:
    """The network of the same file, built without featcache."""
    space: dict = {"__name__": "independent"}
    exec((folder / "net.py").read_text(), space)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return space["build"]().eval()


def test_stored_features_are_what_hooks_on_the_network_see(tiny, tmp_path):
    """Image by image, with a transform and a network that never saw featcache."""
    name, network = write(tmp_path / "code"), None
    results = extract(open_challenge(tiny).subjects, config(name), tmp_path / "work")
    network, seen = independent(tmp_path / "code"), {}
    for layer in ("one", "two"):
        network.get_submodule(layer).register_forward_hook(
            lambda _, __, out, layer=layer: seen.update({layer: out + 0})
        )
    mean, std = torch.tensor([0.4, 0.5, 0.6])[:, None, None], torch.tensor([0.2, 0.2, 0.3])[:, None, None]
    for subject, result in zip(open_challenge(tiny).subjects, results, strict=True):
        store = open_store(result.path)
        assert list(store.arrays) == ["pooled", "one", "two"] and result.path.name.startswith(
            f"{subject.name}-net.build-"
        )
        rows = {layer: store.read(layer) for layer in store.arrays}
        for row, path in enumerate(subject.image_sources):
            pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 255  # 32 x 32
            with torch.no_grad():
                pooled = network(((pixels - mean) / std)[None])[0]
            np.testing.assert_allclose(rows["pooled"][row], pooled, rtol=1e-3, atol=1e-4)
            for layer, values in seen.items():
                expected = torch.nn.functional.adaptive_avg_pool2d(values, 7)[0].permute(1, 2, 0)
                np.testing.assert_allclose(rows[layer][row], expected, rtol=2e-3, atol=2e-3)  # float16


def test_a_transform_of_its_own_gives_the_input_as_it_is(tiny, tmp_path):
    name = write(tmp_path / "code", OWN_TRANSFORM)
    (result, _) = extract(open_challenge(tiny).subjects, config(name), tmp_path / "work")
    network, store = independent(tmp_path / "code"), open_store(result.path)
    rows, subject = store.read("pooled"), open_challenge(tiny).subjects[0]
    for row, path in enumerate(subject.image_sources):
        pixels = torch.from_numpy(np.array(Image.open(path).convert("RGB"))).permute(2, 0, 1) / 100 - 1
        with torch.no_grad():
            np.testing.assert_allclose(rows[row], network(pixels[None])[0], rtol=1e-3, atol=1e-4)
    assert store.key["transform"] == {"input_size": [3, 32, 32], "own": "<function transform>"}
    for options in ({"size": 64}, {"fit": "whole"}):
        with pytest.raises(BackboneError, match="whose own transform decides it"):
            load_backbone(BackboneConfig(name=name, **options))


def test_a_transform_that_gives_an_image_another_size_is_refused_and_the_image_named(tree, tmp_path):
    """One grey row would otherwise be spread over the whole image."""
    text = OWN_TRANSFORM.replace("/ 100 - 1", "/ 100 - 1 if image.height > 20 else torch.zeros(3, 1, 32)")
    subject = open_challenge(tree).subjects[0]
    Image.new("RGB", (32, 16)).save(subject.image_sources[3])
    with pytest.raises(
        BackboneError, match=rf"of every image; found \(3, 1, 32\) of .*{subject.image_sources[3].name}"
    ):
        extract([subject], config(write(tmp_path / "code", text)), tmp_path / "work")


def test_the_same_text_is_the_same_store_from_any_folder_and_another_text_or_weight_another(tiny, tmp_path):
    subject = open_challenge(tiny).subjects[:1]

    def store(name: str, **options) -> tuple[Path, int]:
        (result,) = extract(subject, config(name, **options), tmp_path / "work")
        return result.path, result.n_new

    first, n_new = store(write(tmp_path / "a"))
    assert n_new and store(write(tmp_path / "a")) == (first, 0) == store(write(tmp_path / "b"))
    other_text, _ = store(write(tmp_path / "c", NETWORK + "# a remark\n"))
    state = load_backbone(BackboneConfig(name=write(tmp_path / "a"))).model.state_dict()
    save_file({key: value + 1 for key, value in state.items()}, tmp_path / "w.safetensors")
    other_weights, _ = store(write(tmp_path / "a"), weights=str(tmp_path / "w.safetensors"))
    size = NETWORK.replace('"size": 32, "mean": [0.4', '"size": 32, "mean": [0.3')
    other_transform, _ = store(write(tmp_path / "d", size))
    assert len({first, other_text, other_weights, other_transform}) == 4
    keys = [json.dumps(open_store(path).key) for path in (first, other_text)]
    assert keys[0] != keys[1] and str(tmp_path) not in keys[0]


def test_a_file_that_changed_is_read_anew_though_it_is_as_long(tmp_path):
    """No compiled form of it is left beside it, nor kept in memory."""
    for n in (5, 7):
        name = write(tmp_path, NETWORK.replace("self.end = nn.Linear(6 * 64, 5)", f"self.end = nn.Linear(6 * 64, {n})"))
        assert load_backbone(BackboneConfig(name=name)).pooled(torch.zeros(1, 3, 32, 32)).shape == (1, n)
    assert [path.name for path in tmp_path.iterdir()] == ["net.py"]


def test_layers_and_network_may_be_in_an_object_and_files_beside_it_imported(tmp_path):
    text = "from types import SimpleNamespace\nfrom beside_it import make\nimport net_that_is_not_here_but_named as _\n"
    (tmp_path / "beside_it.py").write_text(NETWORK.replace("def build", "def make"))
    (tmp_path / "net_that_is_not_here_but_named.py").write_text("")
    text += "def build():\n    net = make()\n    return SimpleNamespace(network=net, layers=['two', 'one.0'], "
    text += "transform=net.transform)\n"
    path = list(sys.path)
    backbone = load_backbone(BackboneConfig(name=write(tmp_path, text)))
    assert backbone.taps(LayerConfig()).layers == ("pooled", "one.0", "two") and sys.path == path
    assert backbone.transform_settings["mean"] == [0.4, 0.5, 0.6]
    for name in ("beside_it", "net_that_is_not_here_but_named"):
        del sys.modules[name]


def test_a_network_of_timm_in_a_file_is_read_by_timm(tmp_path):
    text = "import timm\ndef build():\n    return timm.create_model('test_vit', num_classes=0)\n"
    backbone = load_backbone(BackboneConfig(name=write(tmp_path, text), size=None))
    assert backbone.taps(LayerConfig(layers=("0",))).layers == ("blocks.0",)
    assert backbone.transform_settings["input_size"] == [3, 160, 160]


def test_an_outline_has_the_shapes_and_the_bytes_of_the_network(tmp_path):
    for text, bytes_each in ((NETWORK, 1), (OWN_TRANSFORM, 4)):
        name = BackboneConfig(name=write(tmp_path, text))
        backbone, found = load_backbone(name), outline(name, LayerConfig(layers=("one", "pooled")))
        assert found.shapes == backbone.shapes(backbone.taps(LayerConfig(layers=("one", "pooled"))))
        assert found.pixels == 3 * 32 * 32 * bytes_each
        outline.cache_clear()


@pytest.mark.parametrize(
    ("text", "place", "found"),
    [
        ("x = 1\ny = (\n", "net.py, line 2", "SyntaxError"),
        ("x = 1\nimport no_such_module_at_all\n", "net.py, line 2", "ModuleNotFoundError: No module"),
        ("\n\nraise SystemExit(3)\n", "net.py, line 3", "SystemExit: 3"),
        ("def build():\n    return 1 / 0\n", "net.py, line 2", "ZeroDivisionError: division by zero"),
        (NETWORK.replace("6 * 64", "6 * 65"), "net.py, line 14", "RuntimeError: mat1 and mat2"),
        ("def other(): pass\n", "--backbone", "no build; name one: other"),
        ("build = 3\n", "--backbone", "build, which is none"),
        ("def build(): return 3\n", "net.py", "expected a function that returns a torch module"),
        (NETWORK.replace('"size"', '"sighs"'), "net.py", "expected a transform"),
        (NETWORK.replace("[0.4, 0.5, 0.6]", "0.5"), "net.py", "a mean of 0.5"),
        (OWN_TRANSFORM.replace("image.resize((32, 32))", "image"), "net.py", "expected a transform .* and "),
    ],
)
def test_a_mistake_in_the_file_is_one_line_with_its_place(tmp_path, tiny, capfd, text, place, found):
    name = write(tmp_path, text)
    line = fails(capfd, "extract", "--data", str(tiny), "--work", str(tmp_path / "work"), "--backbone", name)
    assert place in line
    with pytest.raises(BackboneError, match=found):
        load_backbone(BackboneConfig(name=name))


def test_a_file_or_weights_that_are_not_there(tmp_path):
    with pytest.raises(BackboneError, match=r"found no file .*gone.py"):
        load_backbone(BackboneConfig(name=str(tmp_path / "gone.py:build")))
    name = write(tmp_path)
    for weights in ("hub", "none", "packaged"):
        with pytest.raises(BackboneError, match=f"found {weights}; leave --weights out"):
            load_backbone(BackboneConfig(name=name, weights=weights))
    assert (
        load_backbone(BackboneConfig(name=name, weights="own")).digest
        == load_backbone(BackboneConfig(name=name)).digest
    )


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_weights_that_run_code_are_refused_and_run_nothing(tmp_path):
    torch.save({"one.0.weight": Attack(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"found code in .* which was not run"):
        load_backbone(BackboneConfig(name=write(tmp_path), weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("text", [NETWORK, OWN_TRANSFORM])
def test_every_stage_runs_from_the_command_line(tiny, tmp_path, capfd, monkeypatch, text):
    """Train, extract from the checkpoint without naming the file again, fit and blend."""
    name, work = write(tmp_path / "code", text), tmp_path / "work"
    where = ("--data", str(tiny), "--work", str(work))
    train = ("--epochs", "1", "--folds", "2", "--fold", "0", "--batch-size", "4", "--device", "cpu")
    run(capfd, "pretrain", *where, "--backbone", name, *train)
    (checkpoint,) = list_checkpoints(work)
    assert checkpoint.key.backbone.name == "net.build" and checkpoint.key.backbone.weights == "own"
    monkeypatch.chdir(tmp_path)
    stores = run(capfd, "extract", *where)["stores"]
    assert all("-net.build-pretrain-fold0-" in store["path"] for store in stores)
    loaded = load_backbone(BackboneConfig(name=name)).digest
    assert (
        {open_store(Path(store["path"])).key["weights"] for store in stores}
        == {checkpoint.backbone().digest}
        != {loaded}
    )
    run(capfd, "extract", *where, "--backbone", name, "--checkpoint", "none")
    run(capfd, "fit-heads", *where, "--features", "net.build@32")
    assert cli.run(["blend", *where]) == 0
    capfd.readouterr()
    write(tmp_path / "code", text + "# changed\n")
    line = fails(capfd, "extract", *where)
    assert "expected the code that was trained, source " in line and "bring that code back" in line
