"""A network that reads new images is the one that made the features, behind the same transform, or it is refused."""

from dataclasses import replace

import pytest
import torch

from featcache.config import BackboneConfig
from featcache.dataset.algonauts import open_challenge
from featcache.dataset.images import load_image
from featcache.errors import BackboneError
from heads.encoder import networks
from heads.encoder.networks import as_it_read, load_network, renamed
from heads.encoder.work import encoder_of_work


@pytest.fixture(scope="module")
def part(every_kind, tiny):
    """Features of the frozen ResNet."""
    parts = encoder_of_work(open_challenge(tiny).subjects, every_kind)._parts.features.values()
    return next(part for part in parts if part.network == "test_resnet" and part.key.fold is None)


@pytest.fixture(scope="module")
def picture(tiny):
    return load_image(open_challenge(tiny).subjects[0].test.sources[0])


def with_key(part, **changed):
    return replace(part, key=replace(part.key, **changed))


def test_the_same_network_is_fused_as_it_was(part):
    for fused in (True, False):
        found = load_network(with_key(part, fused=fused), "none", "cpu")
        assert (found.digest, found.fused) == (part.key.weights, fused)
        assert dict(found.transform_settings) == dict(part.key.transform)


@pytest.mark.parametrize(
    ("changed", "found"), [({"weights": "0" * 64}, "the weights"), ({"code": {"mine": "1"}}, "the code")]
)
def test_other_weights_and_other_code_are_refused(part, changed, found):
    with pytest.raises(BackboneError, match=f"{found} that made the features.*--backbone.*--weights") as caught:
        load_network(with_key(part, **changed), "none", "cpu")
    assert "\n" not in str(caught.value)


def test_a_transform_that_timm_would_make_otherwise_now_is_rebuilt_as_it_was(part, picture):
    backbone = load_network(part, "none", "cpu")
    other = {**part.key.transform, "mean": (0.1, 0.2, 0.3), "interpolation": "nearest"}
    assert other != dict(part.key.transform)
    found = as_it_read(with_key(part, transform=other), load_network(part, "none", "cpu"))
    assert dict(found.transform_settings) == other
    assert not torch.equal(found.transform(picture), backbone.transform(picture))
    back = as_it_read(part, found)
    torch.testing.assert_close(back.transform(picture), backbone.transform(picture), rtol=0, atol=0)


def test_a_transform_of_ones_own_must_be_the_same(part):
    backbone = load_network(with_key(part, fused=False), "none", "cpu")
    with pytest.raises(BackboneError, match="the transform that made the features"):
        as_it_read(with_key(part, transform={**part.key.transform, "own": "abc"}), backbone)


def test_another_timm_is_said(part, monkeypatch):
    said = []
    monkeypatch.setattr(networks, "say", said.append)
    load_network(part, "none", "cpu")
    assert said == []
    load_network(with_key(part, timm="0.1"), "none", "cpu")
    assert len(said) == 1 and "made with timm 0.1" in said[0]


@pytest.mark.parametrize(
    ("network", "weights", "given", "expected"),
    [
        ("resnet50", "hub", None, ("resnet50", "hub")),
        ("resnet50", "hub", BackboneConfig(name="resnet18", weights="a.pt"), ("resnet50", "hub")),  # another network
        ("resnet50", "hub", BackboneConfig(name="resnet50", weights="a.pt"), ("resnet50", "a.pt")),
        ("resnet50", "hub", BackboneConfig(name="resnet50", weights=None), ("resnet50", "hub")),
        ("resnet50", "hub", BackboneConfig(name=None, weights="a.pt"), ("resnet50", "hub")),  # of which is not known
        ("resnet50", None, BackboneConfig(name=None, weights="a.pt"), ("resnet50", "a.pt")),
        (
            "old/net.py:build",
            "none",
            BackboneConfig(name="new/net.py:build", weights=None),
            ("new/net.py:build", "none"),
        ),
        (
            "old/net.py:build",
            "none",
            BackboneConfig(name="new/net.py:make", weights=None),
            ("old/net.py:build", "none"),
        ),
    ],
)
def test_what_is_named_anew_is_the_network_of_that_name(network, weights, given, expected):
    assert renamed(network, weights, given) == expected
