"""Weights files as trainings write them give the network its weights; what cannot be loaded has a true reason."""

import argparse
import os
from collections import OrderedDict
from pathlib import Path

import pytest
import timm
import torch
from safetensors.torch import save_file

from featcache.backbone.network import load_backbone
from featcache.backbone.weights_files import read_tensors
from featcache.config import BackboneConfig
from featcache.errors import BackboneError

NAME = "test_vit"


@pytest.fixture(scope="module")
def weights():
    torch.manual_seed(3)
    return timm.create_model(NAME).state_dict()


@pytest.fixture(scope="module")
def expected(weights, tmp_path_factory):
    """Digest of the network with these weights, from a plain file."""
    path = tmp_path_factory.mktemp("plain") / "w.safetensors"
    save_file(weights, path)
    return load_backbone(BackboneConfig(name=NAME, weights=str(path))).digest


def within(prefix, state):
    return {prefix + name: tensor for name, tensor in state.items()}


def other(state):
    return {name: torch.randn_like(tensor) for name, tensor in state.items()}


def bare(state):
    return {name: tensor for name, tensor in state.items() if not name.startswith("head.")}


def projection(prefix):
    return {f"{prefix}0.weight": torch.zeros(9, 64), f"{prefix}2.weight": torch.zeros(4, 9)}


def moco(weights):
    queue = {"module.queue": torch.zeros(4, 9)}
    return {"state_dict": within("module.encoder_k.", other(weights)) | within("module.encoder_q.", weights) | queue}


def moco3(weights):
    online = within("module.base_encoder.", bare(weights) | projection("head."))
    return {"state_dict": within("module.momentum_encoder.", other(weights)) | online | projection("module.predictor.")}


def dino(weights):
    student = within("module.backbone.", other(bare(weights))) | projection("module.head.")
    return {"student": student, "teacher": within("backbone.", bare(weights)) | projection("head."), "epoch": 100}


# {what wrote it: how it has the weights}, in the forms of timm, of torch's wrappers, and of public trainings
WRITTEN = {
    "timm": lambda w: {"epoch": 3, "arch": NAME, "args": argparse.Namespace(lr=1.0), "state_dict": w, "optimizer": {}},
    "timm, average": lambda w: {"state_dict": other(w), "state_dict_ema": w},
    "distributed": lambda w: within("module.", w),
    "compiled, distributed": lambda w: within("_orig_mod.module.", w),
    "lightning": lambda w: {"pytorch-lightning_version": "2.4.0", "epoch": 1, "state_dict": within("model.", w)},
    "lightning, net": lambda w: {"state_dict": within("net.", bare(w)) | projection("projector.")},
    "moco": moco,
    "moco 3": moco3,
    "dino": dino,
    "mae": lambda w: {"model": bare(w), "epoch": 800, "scaler": {"scale": 1.0}},
    "simclr": lambda w: {"state_dict": within("backbone.", bare(w) | {"head.weight": torch.zeros(5, 64)})},
    "open_clip": lambda w: within("visual.trunk.", bare(w)) | {"logit_scale": torch.zeros(())},
    "open_clip, training": lambda w: {"epoch": 1, "state_dict": within("module.visual.trunk.", bare(w))},
    "torch's tutorial": lambda w: {"epoch": 5, "model_state_dict": OrderedDict(w), "loss": 0.4},
    "others": lambda w: {"net": w, "acc": 90.0},
    "weights": lambda w: {"weights": within("encoder.", w), "meta": ["a", 1]},
    "detection": lambda w: {"model": within("backbone.", bare(w)) | projection("neck.")},
}


@pytest.mark.parametrize("kind", WRITTEN)
def test_the_network_is_found_in_what_trainings_write(kind, weights, expected, tmp_path, capfd):
    torch.save(WRITTEN[kind](weights), tmp_path / "w.pth")
    found = load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    assert found.digest == expected
    assert "w.pth: the network is in " in capfd.readouterr().err


def test_safetensors_are_taken_out_of_prefixes_too(weights, expected, tmp_path):
    save_file(within("backbone.", weights), tmp_path / "w.safetensors")
    assert load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.safetensors"))).digest == expected


def test_a_plain_file_is_taken_as_it_is_and_nothing_is_said(weights, expected, tmp_path, capfd):
    torch.save(weights, tmp_path / "w.pth")
    assert load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth"))).digest == expected
    assert "the network is in" not in capfd.readouterr().err


def test_names_that_only_timm_knows_reach_timm(tmp_path):
    """The original names of ConvNeXt, which timm translates."""
    names = {"downsample_layers.0.0.weight": torch.zeros(1)}
    for content in ({"model": names}, names):
        torch.save(content, tmp_path / "w.pth")
        assert read_tensors(tmp_path / "w.pth", ["stem.0.weight"]).state.keys() == names.keys()


def test_a_container_within_itself_ends(tmp_path):
    content = {"net": 1}
    content["model"] = content
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(BackboneError, match="tensors are missing, such as"):
        load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
@pytest.mark.parametrize("kept", [0.0, 0.01, 0.5, 0.999])
def test_a_truncated_file_is_told_to_be_one(name, kept, weights, tmp_path):
    path = tmp_path / name
    save_file(weights, path) if name.endswith("safetensors") else torch.save({"state_dict": weights}, path)
    whole = path.read_bytes()
    path.write_bytes(whole[: int(kept * len(whole))])
    with pytest.raises(BackboneError, match=r"expected a whole .* cannot be read \(.+\); copy it again") as error:
        load_backbone(BackboneConfig(name=NAME, weights=str(path)))
    assert "\n" not in str(error.value) and "name the backbone" not in str(error.value)


@pytest.mark.parametrize("name", ["w.pth", "w.safetensors"])
def test_a_pipe_is_not_waited_for(name, tmp_path):
    os.mkfifo(tmp_path / name)
    with pytest.raises(OSError, match="no regular file"):
        read_tensors(tmp_path / name, [])


EXTRA = {"decoder.0.weight": torch.zeros(2), "decoder.0.bias": torch.zeros(2)}


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda w: w | EXTRA, 'there are 2 tensors more, such as "decoder.0.weight"'),
        (lambda w: {k: v for k, v in w.items() if k != "norm.weight"}, '1 tensors are missing, such as "norm.weight"'),
        (lambda w: w | {"norm.weight": torch.zeros(3)}, r"norm.weight has another shape, \[3\] in place of \[64\]"),
        (lambda w: {"optimizer": {"state": {}}, "epoch": 3}, "tensors are missing"),
        (lambda w: [1, 2], "tensors are missing"),
        (lambda w: {1: w, "state_dict": 5}, "tensors are missing"),
    ],
)
def test_what_does_not_fit_has_a_true_reason(change, reason, weights, tmp_path):
    torch.save(change(weights), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=f"expected weights of {NAME}; found others in .*{reason}") as error:
        load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    assert "\n" not in str(error.value)


class Attack:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.mkdir, (self.path,)


@pytest.mark.parametrize(
    "where", [lambda a, w: {"state_dict": w, "hyper_parameters": a}, lambda a, w: {"teacher": {"backbone.x": a}}]
)
def test_code_beside_weights_is_named_and_not_run(where, weights, tmp_path):
    torch.save(where(Attack(tmp_path / "made"), weights), tmp_path / "w.pth")
    with pytest.raises(BackboneError, match=r"found code in .*, which was not run \(.+\); save its tensors alone"):
        load_backbone(BackboneConfig(name=NAME, weights=str(tmp_path / "w.pth")))
    assert not (tmp_path / "made").exists()
