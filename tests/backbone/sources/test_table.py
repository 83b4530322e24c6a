"""Which source a name is of, and the names that are of none."""

import pickle
from pathlib import Path

import pytest
import timm

from featcache.backbone.network import load_backbone
from featcache.backbone.sources.table import SOURCES, check_backbone, source_of
from featcache.config import BackboneConfig, label_of
from featcache.errors import BackboneError


@pytest.mark.parametrize(
    ("name", "module"),
    [
        (None, "timm"),
        ("test_resnet", "timm"),
        ("convnext_base.fb_in22k", "timm"),
        ("torchvision:resnet18", "torchvision"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf_hub"),
        ("open_clip:ViT-B-32/openai", "open_clip"),
        ("folder/net.py:build", "own_code"),
        ("torchvision:net.py:build", "own_code"),
    ],
)
def test_the_name_says_the_source(name, module):
    assert source_of(BackboneConfig(name=name)).__name__.rpartition(".")[2] == module


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize("ending", ["pt", "pth", "pkl", "bin"])
def test_a_pickle_is_no_backbone_and_is_not_opened(ending, tmp_path):
    path = tmp_path / f"network.{ending}"
    path.write_bytes(pickle.dumps(Attack(tmp_path / "made")))
    for refuse in (check_backbone, load_backbone):
        with pytest.raises(BackboneError, match=r"which is not opened.*; name the network .* with --weights"):
            refuse(BackboneConfig(name=str(path), weights="none"))
    assert not (tmp_path / "made").exists()


def test_a_python_file_needs_its_function_and_a_prefix_must_be_known():
    with pytest.raises(BackboneError, match=r"found the file alone, net.py; name the function, .*net.py:build"):
        check_backbone(BackboneConfig(name="net.py"))
    with pytest.raises(BackboneError, match=r"begins with torchvision:, hf-hub:, open_clip:; found 'keras:vgg16'"):
        check_backbone(BackboneConfig(name="keras:vgg16"))
    with pytest.raises(BackboneError, match="found 'torchvision:'"):
        check_backbone(BackboneConfig(name="torchvision:"))


def test_every_source_has_what_is_asked_of_one():
    for prefix in SOURCES:
        source = source_of(BackboneConfig(name=f"{prefix}:any"))
        assert all(callable(getattr(source, name)) for name in ("check", "load", "outline"))


def test_labels_of_timm_are_its_names_so_that_stores_are_found_again():
    for name in (*timm.list_models(), *timm.list_pretrained()):
        assert label_of(name) == name


@pytest.mark.parametrize(
    ("name", "label"),
    [
        ("net.py:build", "net.build"),
        ("/a/b c/../net.py:build", "net.build"),
        ("../.net,*[x].py:build", "net-x-.build"),
        ("hf-hub:timm/resnet18.a1_in1k", "hf-hub-timm-resnet18.a1_in1k"),
        ("torchvision:resnet18", "torchvision-resnet18"),
        ("open_clip:ViT-B-32/openai", "open_clip-ViT-B-32-openai"),
        ("x:../../../etc/passwd", "x-.-.-.-etc-passwd"),
        ("ü:é", "network"),
    ],
)
def test_labels_of_others_are_safe_in_names_of_files_patterns_and_titles(name, label):
    assert label_of(name) == label == label_of(label)
    assert not set(label) & set("/\\,*?[]@: ") and ".." not in label and not label.startswith(".")


def test_a_long_name_leaves_room_in_a_file_name():
    assert len(label_of("hf-hub:" + "a" * 500)) <= 80
