"""Saved heads predict what a slow formula says, whatever their kind; files that are not theirs are refused."""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from featcache.errors import StoreError
from heads.config import HEADS, CoreConfig
from heads.modules import readout
from heads.modules.core import CORE, CoreFront
from heads.modules.linear import RoiHead
from heads.modules.readout import HeadKind, InFile, InMemory, SavedHeads, Standardised, by_head, parse
from heads.modules.spatial import SpatialReadout
from support.heads import SHAPES, as_trained, some_rows

N_VERTICES, N_IMAGES = 6, 5
NAMES = list(SHAPES)
N_FEATURES = sum(int(np.prod(shape)) for shape in SHAPES.values())


def drawn(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def saved(tensors, **kind) -> SavedHeads:
    return SavedHeads(InMemory(tensors), SHAPES, HeadKind(**kind))


def stored(n_images: int = N_IMAGES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Rows as stores have them, in float16, and an array that no head reads."""
    rows = {name: values.half() for name, values in some_rows(n_images, seed=seed).items()}
    return {"of another": torch.full((n_images, 4), torch.nan)} | rows


def side_by_side(rows) -> np.ndarray:
    return np.concatenate([rows[name].numpy().astype(np.float64).reshape(len(rows[name]), -1) for name in NAMES], 1)


def close(found: torch.Tensor, expected, atol: float = 2e-3) -> None:
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), np.asarray(expected), atol=atol, rtol=1e-4)


def one_map(prefix: str = "lh.", seed: int = 0) -> dict[str, torch.Tensor]:
    return {
        f"{prefix}weights": drawn(N_FEATURES, N_VERTICES, seed=seed),
        f"{prefix}intercept": drawn(N_VERTICES, seed=seed + 1),
    }


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("lh.weights", ("lh", None, "weights")),
        ("fold3.lh.stages.0.cls.weights", ("lh", 3, "stages.0.cls.weights")),
        ("fold12.folder.head.0.bias", ("folder", 12, "head.0.bias")),
        ("folder.head.0.bias", ("folder", None, "head.0.bias")),
    ],
)
def test_names_say_surface_fold_and_part(name, parts):
    assert parse(name) == parts


def test_heads_are_in_the_order_of_surfaces_and_folds():
    names = ["fold10.rh.a", "fold2.rh.b.c", "fold2.rh.a", "lh.a", "fold0.rh.a"]
    found = by_head(names)
    assert list(found) == [("lh", None), ("rh", 0), ("rh", 2), ("rh", 10)]
    assert found["rh", 2] == {"a": "fold2.rh.a", "b.c": "fold2.rh.b.c"}


def test_a_linear_map_of_all_arrays_side_by_side():
    tensors = one_map()
    expected = side_by_side(stored()) @ tensors["lh.weights"].double().numpy() + tensors["lh.intercept"].numpy()
    close(saved(tensors).predict("lh", [stored()]), expected)


def test_a_linear_map_of_each_array_is_their_sum():
    whole = one_map()
    widths = [int(np.prod(shape)) for shape in SHAPES.values()]
    parts = dict(zip(NAMES, whole["lh.weights"].split(widths), strict=True))
    tensors = {f"lh.{name}.weights": weights for name, weights in reversed(parts.items())}
    tensors["lh.intercept"] = whole["lh.intercept"]
    close(saved(tensors).predict("lh", [stored()]), saved(whole).predict("lh", [stored()]))


def test_folds_are_brought_together_and_each_reads_its_own_features():
    tensors, expected = {}, 0
    rows = [stored(seed=fold) for fold in range(3)]
    for fold in range(3):
        of_fold = one_map(f"fold{fold}.lh.", seed=10 * fold)
        scale, shift = drawn(N_VERTICES, seed=fold + 5), drawn(N_VERTICES, seed=fold + 6)
        tensors |= of_fold | {f"fold{fold}.lh.scale": scale, f"fold{fold}.lh.shift": shift}
        head = side_by_side(rows[fold]) @ of_fold[f"fold{fold}.lh.weights"].double().numpy()
        head = head + of_fold[f"fold{fold}.lh.intercept"].numpy()
        expected = expected + (scale.numpy() * head + shift.numpy()) / 3
    heads = saved(dict(reversed(tensors.items())))
    assert heads.by_fold and heads.surfaces == ["lh"] and heads.fault("lh") == ""
    close(heads.predict("lh", rows), expected)
    # one set of features for all folds
    means = [saved({k: v for k, v in tensors.items() if k.startswith(f"fold{f}.")}) for f in range(3)]
    close(heads.predict("lh", rows[:1]), sum(one.predict("lh", rows[:1]) for one in means) / 3)


def spatial_tensors() -> tuple[dict[str, torch.Tensor], SpatialReadout]:
    head = as_trained(SpatialReadout(SHAPES, N_VERTICES, rank=2))
    return {f"lh.head.0.{name}": tensor for name, tensor in head.state_dict().items()}, head


def slow_spatial(head: SpatialReadout, rows) -> np.ndarray:
    """Sum over places and channels, output by output."""
    shares = head.mixture.detach().softmax(1).numpy() * len(NAMES)
    total = np.tile(head.bias.detach().numpy().astype(np.float64), (N_IMAGES, 1))
    for layer, name in enumerate(NAMES):
        channels = head.standardise.channels[layer]
        mean, variance = channels.running_mean.numpy(), channels.running_var.numpy()
        values = (rows[name].numpy().astype(np.float64) - mean) / np.sqrt(variance + channels.eps)
        reader = {
            key: value.detach().numpy().astype(np.float64) for key, value in head.layers[layer].named_parameters()
        }
        for vertex in range(N_VERTICES):
            if values.ndim == 2:
                read = values @ reader["channels"][vertex]
            else:
                flat = values.reshape(N_IMAGES, -1, values.shape[-1])
                places = reader["spatial"][vertex] / np.sqrt(flat.shape[1])
                read = np.einsum("rp,npc,rc->n", places, flat, reader["channels"][vertex])
            total[:, vertex] += shares[vertex, layer] * read
    return total


def test_a_spatial_head_is_a_sum_over_places_and_channels():
    tensors, head = spatial_tensors()
    close(saved(tensors).predict("lh", [stored()]), slow_spatial(head, stored()))


def test_a_shared_space_is_a_linear_map_behind_a_spatial_head():
    tensors, head = spatial_tensors()
    weight, bias = drawn(4, N_VERTICES), drawn(4, seed=1)
    tensors |= {"lh.head.1.weight": weight, "lh.head.1.bias": bias}
    expected = slow_spatial(head, stored()) @ weight.double().numpy().T + bias.numpy()
    close(saved(tensors).predict("lh", [stored()]), expected, atol=5e-3)


CORE_CONFIG = CoreConfig(hidden=3, channels=4, blocks=1)


def front_tensors(seed: int) -> tuple[dict[str, torch.Tensor], CoreFront]:
    torch.manual_seed(seed)
    front = as_trained(CoreFront(SHAPES, CORE_CONFIG))
    with torch.no_grad():
        for parameter in front.parameters():
            parameter.add_(seed * 0.1)
    return dict(front.state_dict()), front


def test_a_trained_readout_of_a_core():
    state, front = front_tensors(0)
    behind = as_trained(SpatialReadout(front.shapes, N_VERTICES, standardised=True))
    tensors = {f"lh.head.0.{name}": tensor for name, tensor in state.items()}
    tensors |= {f"lh.head.1.{name}": tensor for name, tensor in behind.state_dict().items()}
    rows = {name: stored()[name].float() for name in NAMES}
    with torch.inference_mode():
        close(saved(tensors).predict("lh", [stored()]), behind(front(rows)), atol=1e-5)


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_linear_maps_of_cores_read_what_they_put_out_in_float16(precision):
    fronts = {member: front_tensors(member) for member in (0, 1)}
    outputs = []
    for _, front in fronts.values():
        front.in_bfloat16 = precision == "bfloat16"
        with torch.inference_mode():
            outputs.append(front({name: stored()[name].float() for name in NAMES})[CORE])
    rounded = np.concatenate([out.half().numpy().astype(np.float64) for out in outputs], -1).reshape(N_IMAGES, -1)
    tensors = {f"lh.core{m}.{name}": tensor for m, (state, _) in fronts.items() for name, tensor in state.items()}
    weights, intercept = drawn(rounded.shape[1], N_VERTICES), drawn(N_VERTICES, seed=1)
    tensors |= {"lh.core.weights": weights, "lh.intercept": intercept}
    expected = rounded @ weights.double().numpy() + intercept.numpy()
    close(saved(tensors, precision=precision).predict("lh", [stored()]), expected, atol=1e-3 * abs(expected).max())


class Squared(torch.nn.Module):
    """A head of one's own."""

    def __init__(self, n_features, n_vertices, rois):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(n_features, n_vertices))
        self.n_rois = len(rois)

    def forward(self, features):
        return features.square() @ self.weight + self.n_rois


def test_a_module_of_ones_own_reads_standardised_features(monkeypatch):
    own = replace(HEADS["linear"], module=f"{__name__}:Squared")
    monkeypatch.setitem(HEADS, "squared", own)
    monkeypatch.setattr(readout, "load", lambda name: {own.module: Squared}[name])
    mean, scale, weight = drawn(N_FEATURES), drawn(N_FEATURES, seed=1).abs() + 0.5, drawn(N_FEATURES, N_VERTICES)
    tensors = {
        "fold0.lh.head.mean": mean,
        "fold0.lh.head.scale": scale,
        "fold0.lh.head.head.weight": weight,
        "fold0.lh.scale": torch.full((N_VERTICES,), 2.0),
        "fold0.lh.shift": torch.ones(N_VERTICES),
    }
    rois = {"lh": [np.ones(N_VERTICES, bool)] * 3}
    values = ((side_by_side(stored()) - mean.numpy()) / scale.numpy()) ** 2 @ weight.double().numpy() + 3
    close(saved(tensors, name="squared", rois=rois).predict("lh", [stored()]), 2 * values + 1, atol=1e-2)


def test_heads_of_rois_are_averaged_vertex_by_vertex():
    masks = [np.array([1, 1, 0, 0, 0, 0], bool), np.zeros(N_VERTICES, bool), np.array([0, 1, 1, 0, 0, 1], bool)]
    head = RoiHead(N_FEATURES, N_VERTICES, [torch.from_numpy(mask) for mask in masks])
    torch.manual_seed(0)
    torch.nn.init.normal_(head.layer.weight)
    mean, scale = drawn(N_FEATURES), drawn(N_FEATURES, seed=1).abs() + 0.5
    state = Standardised(head, mean, scale).state_dict()
    tensors = {f"fold0.lh.head.{name}": tensor for name, tensor in state.items()}
    tensors |= {"fold0.lh.scale": torch.ones(N_VERTICES), "fold0.lh.shift": torch.zeros(N_VERTICES)}
    values = (side_by_side(stored()) - mean.numpy()) / scale.numpy()
    outputs = values @ head.layer.weight.detach().double().numpy().T + head.layer.bias.detach().numpy()
    owners = np.concatenate([np.arange(N_VERTICES), *(np.flatnonzero(mask) for mask in masks)])
    expected = np.stack([outputs[:, owners == vertex].mean(1) for vertex in range(N_VERTICES)], 1)
    close(saved(tensors, name="roi", rois={"lh": masks}).predict("lh", [stored()]), expected)


@pytest.mark.parametrize("kind", ["linear", "spatial"])
@pytest.mark.parametrize("vertices", [slice(1, 4), slice(0, 1), slice(5, 6), slice(2, None), slice(0, 0)], ids=str)
def test_some_vertices_are_those_of_all(tmp_path, monkeypatch, kind, vertices):
    tensors = one_map() if kind == "linear" else spatial_tensors()[0]
    tensors |= {"lh.scale": drawn(N_VERTICES), "lh.shift": drawn(N_VERTICES, seed=1)}
    save_file(tensors, tmp_path / "heads.safetensors")
    whole = saved(tensors).predict("lh", [stored()])
    monkeypatch.setattr(readout, "_BLOCK_NUMBERS", 2 * N_FEATURES)  # two vertices at a time
    in_file = SavedHeads(InFile(tmp_path / "heads.safetensors", "p"), SHAPES, HeadKind())
    for heads in (saved(tensors), in_file):
        found = heads.predict("lh", [stored()], vertices)
        assert found.shape == whole[:, vertices].shape
        close(found, whole[:, vertices], atol=1e-5 if found.numel() else 0)


def test_many_images_go_through_modules_in_batches(monkeypatch):
    tensors, _ = spatial_tensors()
    whole = saved(tensors).predict("lh", [stored()])
    monkeypatch.setattr(readout, "_BATCH", 2)
    close(saved(tensors).predict("lh", [stored()]), whole, atol=1e-5)


@pytest.mark.parametrize(
    ("tensors", "surface", "fault"),
    [
        (one_map(), "rh", "no heads of rh"),
        (one_map("fold0.lh."), "lh", "earlier version"),
        ({"lh.tree.leaves": torch.zeros(2)}, "lh", "of a kind"),
        ({"lh.pooled.weights": torch.zeros(9, 2), "lh.intercept": torch.zeros(2)}, "lh", "of a kind"),  # not all arrays
    ],
)
def test_heads_that_cannot_predict_say_why(tensors, surface, fault):
    heads = saved(tensors)
    assert fault in heads.fault(surface)
    with pytest.raises(StoreError, match=fault) as caught:
        heads.predict(surface, [stored()])
    assert "\n" not in str(caught.value)


def test_files_that_are_missing_damaged_or_of_other_heads_are_refused_in_one_line(tmp_path):
    path = tmp_path / "heads.safetensors"
    save_file(one_map(), path, {"predictions": "mine"})
    heads = InFile(path, "mine")
    assert heads.shape("lh.weights") == (N_FEATURES, N_VERTICES) and set(heads.names()) == set(one_map())
    content = path.read_bytes()
    faults = {
        "no such file; run 'fit-heads'": path.unlink,
        "found those of mine; delete it": lambda: path.write_bytes(content),
        "found a damaged file": lambda: path.write_bytes(content[:-5]),
        r"a damaged file \(.*\); delete it": lambda: path.write_bytes(b""),
    }
    for fault, damage in faults.items():
        damage()
        with pytest.raises(StoreError, match=fault) as caught:
            InFile(path, "theirs")
        assert "\n" not in str(caught.value) and "expected the heads that made theirs" in str(caught.value)
    with pytest.raises(StoreError, match="damaged"):  # after it was opened
        heads.read("lh.weights")
    for make in (Path.mkdir, os.mkfifo):
        path.unlink() if path.is_file() else path.rmdir()
        make(path)
        with pytest.raises(StoreError, match=r"damaged file \(no regular file"):  # and a pipe is not waited for
            InFile(path, "mine")


def test_one_number_has_no_vertices_to_choose_from(tmp_path):
    tensors = {"a": torch.tensor(3), "b": torch.arange(8).view(2, 4)}
    save_file(tensors, tmp_path / "a.safetensors")
    for heads in (InMemory(tensors), InFile(tmp_path / "a.safetensors", "p")):
        assert heads.read("a", slice(1, 2)).item() == 3 and heads.shape("a") == ()
        assert heads.read("b", slice(1, 3)).tolist() == [[1, 2], [5, 6]]
