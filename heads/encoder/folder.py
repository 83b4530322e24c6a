"""An encoder as a folder to hand on: weights and masks as safetensors, what they mean as JSON, and a card.

    encoder.json              format, parts, versions, digests of the other files
    README.md                 the card
    networks/<name>.safetensors
    heads/<subject>/<number>.safetensors
    subjects.safetensors      ROI masks and noise ceilings
    blend.safetensors         coefficients, where there is a blend

Reading it runs no code and needs no network.
"""

import json
import re
import shutil
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
import torch
from safetensors import SafetensorError

from featcache import __version__
from featcache.backbone.network import TorchBackbone
from featcache.config import BackboneConfig, fingerprint
from featcache.dataset.digests import file_digest
from featcache.errors import FeatcacheError, StoreError, first_line
from featcache.machine.documents import parse_json, read_json, typed
from featcache.machine.files import replace_json
from featcache.machine.folders import whole_folder
from featcache.machine.progress import bar
from featcache.machine.tensors import write_tensors
from heads.blend.saved import BLEND, load_blend, save_blend
from heads.encoder.card import Card, card_text
from heads.encoder.encoder import Encoder
from heads.encoder.networks import load_network, renamed
from heads.encoder.parts import FeaturePart, ModelPart, Parts, SubjectPart, Tensors
from heads.modules.readout import HeadTensors, InFile

FORMAT = 1
DESCRIPTION, CARD = "encoder.json", "README.md"
_BLEND, _SUBJECTS = "blend.safetensors", "subjects.safetensors"
_SAFE = re.compile(r"[\w .+()-]+(/[\w .+()-]+)*")  # paths inside the folder; a subject's name is part of some


def export_encoder(parts: Parts, tensors: Tensors, folder: Path, card: Card) -> Path:
    """Write an encoder to a folder, whole or not at all.

    Raises StoreError for a folder that is not empty, FeatcacheError for a network or heads that are not there.
    """
    refuse_full(folder)
    with whole_folder(folder) as partial:
        features = _write_networks(parts, tensors, partial)
        subjects = _write_heads(parts, tensors, partial)
        _write_subjects(parts, partial / _SUBJECTS)
        if blend := {name: dict(part.blend) for name, part in parts.subjects.items() if part.blend}:
            save_blend(partial / _BLEND, blend)
        (partial / CARD).write_text(card_text(card), encoding="utf-8")
        files = sorted(path for path in partial.rglob("*") if path.is_file())
        content = {
            "format": FORMAT,
            "featcache": __version__,
            "versions": dict(card.versions),
            "features": {name: part.to_json() for name, part in features.items()},
            "subjects": subjects,
            "digests": {str(path.relative_to(partial)): file_digest(path) for path in files},
        }
        replace_json(partial / DESCRIPTION, content | {"digest": fingerprint(content)})
    return folder


def refuse_full(folder: Path) -> None:
    """Raise StoreError for a folder that has files, or is none."""
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise StoreError(
            folder,
            expected="a folder that is new or empty",
            found="one with files" if folder.is_dir() else "a file",
            remedy="choose another name",
        )


def _write_networks(parts: Parts, tensors: Tensors, folder: Path) -> dict[str, FeaturePart]:
    """Write the weights of every network once; the features, with the names of these files."""
    (folder / "networks").mkdir()
    files: dict[str, str] = {}
    written = {}
    with bar("networks", len(parts.features), "sets of features") as advance:
        for name, part in parts.features.items():
            # the weights as they are in the network, whatever file, package or hub they came from
            identity = f"{part.network}-{part.key.weights}"
            if identity not in files:
                files[identity] = f"networks/{part.key.backbone}-{part.key.weights[:12]}.safetensors"
                unfused = replace(part, key=replace(part.key, fused=False))
                state = tensors.network(unfused, "cpu").model.state_dict()
                write_tensors(folder / files[identity], _whole(state), {"network": part.network})
            written[name] = replace(part, weights=files[identity])
            advance(1)
    return written


def _whole(state: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {name: tensor.contiguous() for name, tensor in state.items() if isinstance(tensor, torch.Tensor)}


def _write_heads(parts: Parts, tensors: Tensors, folder: Path) -> dict[str, Any]:
    """Copy the heads of every model; the subjects as JSON has them."""
    subjects: dict[str, Any] = {}
    for subject, part in parts.subjects.items():
        models = []
        for number, model in enumerate(part.models.values()):
            file = f"heads/{subject}/{number:03d}.safetensors"
            (folder / file).parent.mkdir(parents=True, exist_ok=True)
            tensors.copy_heads(model, folder / file)
            models.append(replace(model, file=file).to_json())
        rois = {surface: list(part.rois[surface]) for surface in part.n_vertices}
        subjects[subject] = {"n_vertices": dict(part.n_vertices), "rois": rois, "models": models}
    return subjects


def _write_subjects(parts: Parts, path: Path) -> None:
    arrays: dict[str, np.ndarray] = {}
    for subject, part in parts.subjects.items():
        for surface in part.n_vertices:
            for roi, mask in part.rois[surface].items():
                arrays[json.dumps([subject, surface, "roi", roi])] = mask.astype(bool)
            if (ceiling := part.noise_ceiling[surface]) is not None:
                arrays[json.dumps([subject, surface, "noise_ceiling"])] = np.asarray(ceiling, np.float32)
    path.write_bytes(safetensors.numpy.save(arrays))


def load_encoder(folder: Path | str, *, network: BackboneConfig | None = None, device: str = "auto") -> Encoder:
    """The encoder in a folder that `export` wrote, whose files are held against their digests first.

        encoder = fc.load_encoder("out/encoder")
        responses = encoder.predict(["beach.jpg"], roi="V1v")

    network : where a network of one's own code is now, as --backbone names it; such code is not in the folder
    device : 'auto', 'cpu' or 'cuda'

    Raises StoreError for a folder that is missing, changed, or of a newer format.
    """
    folder = Path(folder)
    description = _read_description(folder)
    try:
        _refuse_changed(folder, description["digests"])
        every = {name: FeaturePart.from_json(part) for name, part in description["features"].items()}
        features = {name: _renamed(part, network) for name, part in every.items()}
        rois, ceilings = _read_subjects(folder / _SUBJECTS)
        blend = load_blend(folder / _BLEND) if _BLEND in description["digests"] else {}
        subjects = {}
        for name, part in description["subjects"].items():
            models = [ModelPart.from_json(model) for model in part["models"]]
            sizes = {surface: int(n_vertices) for surface, n_vertices in part["n_vertices"].items()}
            subjects[name] = SubjectPart(
                name=name,
                n_vertices=sizes,
                models={model.name: model for model in models},
                rois={s: {roi: rois[name, s][roi] for roi in part["rois"][s]} for s in sizes},
                noise_ceiling={surface: ceilings.get((name, surface)) for surface in sizes},
                blend=blend.get(name, {}),
            )
            _refuse_strangers(subjects[name], features)
    except FeatcacheError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError, SafetensorError) as error:
        raise _changed(folder, f"a description that cannot be read ({first_line(error)})") from error
    return Encoder(Parts(origin=folder, features=features, subjects=subjects), FolderTensors(folder), device)


class FolderTensors:
    """Tensors in a folder that `export_encoder` wrote."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder

    def network(self, part: FeaturePart, device: str) -> TorchBackbone:
        """The network of some features. Raises FeatcacheError."""
        return load_network(part, str(self._folder / _inside(self._folder, part.weights)), device)

    def heads(self, model: ModelPart) -> HeadTensors:
        """The heads of a model. Raises StoreError."""
        return InFile(self._folder / _inside(self._folder, model.file), model.predictions, "copy the folder again")

    def copy_heads(self, model: ModelPart, path: Path) -> None:
        """Copy the file of a model's heads."""
        shutil.copyfile(self._folder / _inside(self._folder, model.file), path)


def _renamed(part: FeaturePart, network: BackboneConfig | None) -> FeaturePart:
    return replace(part, network=renamed(part.network, part.weights, network)[0])


def _read_description(folder: Path) -> dict[str, Any]:
    path = folder / DESCRIPTION
    try:
        description: dict[str, Any] = typed(read_json(path), dict[str, Any])
        version = description["format"]
        if isinstance(version, int) and version > FORMAT:
            raise StoreError(
                path,
                expected=f"an encoder of format {FORMAT} or older",
                found=f"format {version}, written by featcache {description.get('featcache', 'of a later version')}",
                remedy="install a newer featcache",
            )
        content = {name: value for name, value in description.items() if name != "digest"}
        if fingerprint(content) != description["digest"]:
            raise _changed(folder, f"that {DESCRIPTION} is not what was written")
        return description
    except FileNotFoundError as error:
        raise StoreError(
            folder, expected="an encoder's folder", found=f"no {DESCRIPTION}", remedy="name one that 'export' wrote"
        ) from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise _changed(folder, f"that {DESCRIPTION} cannot be read ({first_line(error)})") from error


def _refuse_changed(folder: Path, digests: Mapping[str, str]) -> None:
    """Raise StoreError for a file that is missing or not what was written."""
    for name, digest in digests.items():
        path = folder / _inside(folder, name)
        if not path.is_file():
            raise _changed(folder, f"that {name} is missing")
        if name != CARD and file_digest(path) != digest:  # whoever gets a card may write on it
            raise _changed(folder, f"that {name} is not what was written")


def _inside(folder: Path, name: str) -> str:
    """A path of a file inside the folder. Raises StoreError for one that leads out of it."""
    if not _SAFE.fullmatch(name) or ".." in name.split("/"):
        raise _changed(folder, f"a file called {name!r}")
    return name


def _changed(folder: Path, found: str) -> StoreError:
    return StoreError(folder, expected="an encoder as it was exported", found=found, remedy="copy the folder again")


def _refuse_strangers(part: SubjectPart, features: Mapping[str, FeaturePart]) -> None:
    """Raise KeyError for models that read features or a blend that needs models that are not there."""
    for model in part.models.values():
        for name in model.features:
            for array in model.arrays:
                features[name].rows[array]
        if not model.features or not model.arrays:
            raise KeyError(f"what {model.name} reads")
    for name in part.needed(BLEND):
        part.models[name]


def _read_subjects(
    path: Path,
) -> tuple[dict[tuple[str, str], dict[str, np.ndarray]], dict[tuple[str, str], np.ndarray]]:
    """{(subject, surface): {ROI: mask}}, and {(subject, surface): noise ceiling}."""
    rois: dict[tuple[str, str], dict[str, np.ndarray]] = {}
    ceilings: dict[tuple[str, str], np.ndarray] = {}
    for name, values in safetensors.numpy.load_file(path).items():
        subject, surface, kind, *roi = typed(parse_json(name), list[str])
        if kind == "roi":
            rois.setdefault((subject, surface), {})[roi[0]] = values
        else:
            ceilings[subject, surface] = values
    return rois, ceilings
