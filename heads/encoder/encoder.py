"""Predicts the responses to any images, exactly as test images were predicted.

Images go through in chunks. A network that several models read runs once over each image, and gives the layers of all
of them, as they are stored; then each model's heads predict, and the blend adds their predictions up.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from featcache.backbone.network import TorchBackbone
from featcache.cache.forward import BeyondFloat16Error, rows_of
from featcache.config import usual_workers
from featcache.dataset.inputs import Picture, decoded, pictures_of
from featcache.errors import ConfigError, DataError, some_of
from featcache.machine.device import matrix_products, pinned, resolve_device
from featcache.machine.device_memory import spare_on
from featcache.machine.memory import spare_memory
from featcache.machine.prefetch import prefetch
from heads.blend.saved import BLEND
from heads.encoder.parts import FeaturePart, ModelPart, Parts, SubjectPart, Tensors, network_parts
from heads.modules.readout import HeadKind, SavedHeads

Responses = dict[str, dict[str, np.ndarray]]  # {subject: {surface: (n_images, n_vertices) float32}}

_NETWORK_SHARE, _ROW_SHARE = 0.25, 0.1  # of the free memory, for networks that stay loaded, and for rows of a chunk
_LONGEST, _DECODED = 256, 64  # images of a chunk, at most; the second where their pixels are kept


class Vertices(NamedTuple):
    """Which vertex each column of `Encoder.predict` is.

    surface : (n_columns,) name of its surface
    number : (n_columns,) its number on that surface
    """

    surface: np.ndarray
    number: np.ndarray


class Encoder:
    """Predicts responses of the visual cortex to images. `load_encoder` makes one.

        encoder = fc.load_encoder("out/encoder")
        responses = encoder.predict(images, roi="FFA-1")  # (n_images, n_vertices)

    device : 'auto', 'cpu' or 'cuda'
    """

    def __init__(self, parts: Parts, tensors: Tensors, device: str = "auto") -> None:
        self._parts, self._tensors, self.device = parts, tensors, resolve_device(device)
        self._networks: OrderedDict[str, TorchBackbone] = OrderedDict()
        self._heads: dict[tuple[str, str], SavedHeads] = {}

    def __repr__(self) -> str:
        return f"<encoder of {', '.join(self.subjects)}: {some_of(self.models())}>"

    @property
    def subjects(self) -> list[str]:
        """Names of the subjects."""
        return list(self._parts.subjects)

    def surfaces(self, subject: str | None = None) -> dict[str, int]:
        """{surface: number of vertices} of a subject; it need not be named where there is one."""
        return dict(self._subject(subject).n_vertices)

    def rois(self, subject: str | None = None) -> list[str]:
        """ROIs of a subject that have a vertex."""
        return self._subject(subject).roi_names

    def noise_ceiling(self, subject: str | None = None) -> dict[str, np.ndarray | None]:
        """{surface: (n_vertices,) fraction of variance that a perfect model could explain; None where not known}"""
        return dict(self._subject(subject).noise_ceiling)

    def models(self, subject: str | None = None) -> list[str]:
        """What `model` may be: 'blend', where there is one, and the names of models; of all subjects, or of one."""
        subjects = self._parts.subjects.values() if subject is None else [self._subject(subject)]
        return list(dict.fromkeys(name for part in subjects for name in part.names))

    def vertices(self, subject: str | None = None, *, surface: str | None = None, roi: str | None = None) -> Vertices:
        """Which vertices the columns of `predict` are."""
        numbers = self.numbers(subject, surface=surface, roi=roi)
        names = np.concatenate([np.full(len(index), name) for name, index in numbers.items()])
        return Vertices(names, np.concatenate(list(numbers.values())))

    def numbers(
        self, subject: str | None = None, *, surface: str | None = None, roi: str | None = None
    ) -> dict[str, np.ndarray]:
        """{surface: numbers of its vertices} of a subject, or of its vertices in a surface or an ROI."""
        return _numbers(self._subject(subject), surface, roi)

    def choice(self, subject: str | None = None, model: str | None = None) -> str:
        """What predicts a subject where `model` is asked for: 'blend', or the whole name of a model."""
        return self._chosen(self._subject(subject), model)

    def predict(
        self,
        images: Any,
        *,
        subject: str | None = None,
        surface: str | None = None,
        roi: str | None = None,
        model: str | None = None,
        batch_size: int = 32,
    ) -> np.ndarray:
        """Predicted responses of one subject, (n_images, n_vertices) float32, in the units of the training responses.

        Columns are the vertices of all surfaces side by side, or those of a surface or an ROI; `vertices` names them.

        Parameters
        ----------
        images : one or several: paths of images, folders or arrays of pictures, images of Pillow, uint8 arrays or
            tensors (height, width, 3) or (3, height, width) or (n, ...) of them, or float ones from 0 to 1
        subject : may be left out where the encoder has one
        model : 'blend', or a model's name or the six digits that end it; None: the blend, or the only model
        batch_size : images in one pass of a network

        Raises
        ------
        FeatcacheError : no images or images of another kind; a subject, surface, ROI or model that is not there
        """
        part = self._subject(subject)
        numbers = _numbers(part, surface, roi)
        every = [
            np.concatenate([of_surfaces[part.name][name] for name in numbers], 1)
            for of_surfaces in self.stream(
                pictures_of(images), {part.name: numbers}, model=model, batch_size=batch_size
            )
        ]
        return np.concatenate(every)

    def predict_all(self, images: Any, *, model: str | None = None, batch_size: int = 32) -> Responses:
        """{subject: {surface: (n_images, n_vertices) float32}} of all subjects; arguments as of `predict`.

        A network that several subjects share runs once over each image.
        """
        wanted = {name: _numbers(part, None, None) for name, part in self._parts.subjects.items()}
        chunks = list(self.stream(pictures_of(images), wanted, model=model, batch_size=batch_size))
        return {
            name: {surface: np.concatenate([chunk[name][surface] for chunk in chunks]) for surface in numbers}
            for name, numbers in wanted.items()
        }

    def stream(
        self,
        pictures: Sequence[Picture],
        wanted: Mapping[str, Mapping[str, np.ndarray]],
        *,
        model: str | None = None,
        batch_size: int = 32,
        workers: int | None = None,
    ) -> Iterator[Responses]:
        """Predictions of some vertices, chunk by chunk of the pictures, in order.

        wanted : {subject: {surface: numbers of vertices}}
        workers : threads that decode pictures; None: one a core
        """
        if batch_size < 1:
            raise ConfigError("batch_size", expected="1 or more", found=batch_size, remedy="correct it")
        chosen = {name: self._chosen(self._parts.subjects[name], model) for name in wanted}
        needed: list[ModelPart] = []
        for name, choice in chosen.items():
            part = self._parts.subjects[name]
            for one in part.needed(choice):
                needed.append(part.models[one])
                for surface in wanted[name]:
                    self._saved(part, part.models[one]).refuse_fault(surface)  # before hours of work
        networks = network_parts(self._parts, needed)
        step = self._chunk(networks, batch_size)
        for start in range(0, len(pictures), step):
            chunk = pictures[start : start + step]
            rows = self._rows(chunk, networks, start, batch_size, workers or usual_workers())
            yield {
                name: self._of_subject(self._parts.subjects[name], choice, rows, wanted[name], len(chunk))
                for name, choice in chosen.items()
            }

    def _subject(self, name: str | None) -> SubjectPart:
        subjects = self._parts.subjects
        if name is None and len(subjects) == 1:
            return next(iter(subjects.values()))
        if name is None or name not in subjects:
            raise ConfigError(
                "subject",
                expected=f"one of {', '.join(subjects)}",
                found="none" if name is None else repr(name),
                remedy="choose one",
            )
        return subjects[name]

    def _chosen(self, part: SubjectPart, name: str | None) -> str:
        """The blend or the model that predicts a subject. Nothing else may ever predict in its place."""
        if name is None and (part.blend or len(part.models) == 1):
            return part.names[0]
        found = [one for one in part.names if name is not None and name in (one, one.rpartition(" ")[2])]
        if len(found) == 1:
            return found[0]
        raise ConfigError(
            "model",
            expected=f"one of {some_of(part.names)}" if part.names else f"a model of {part.name}",
            found="none" if name is None else f"{name!r}, which {part.name} has not" if not found else f"{len(found)}",
            remedy=("" if part.blend else "run 'blend', or ")
            + "choose one by its name, or by the six digits that end it"
            if part.names
            else "fit heads, or blend",
        )

    def _chunk(self, networks: Mapping[str, Mapping[str, FeaturePart]], batch_size: int) -> int:
        """Number of pictures whose rows are in memory together, a multiple of the batch size."""
        n_bytes = sum(
            np.prod(shape) * np.dtype(dtype).itemsize
            for parts in networks.values()
            for part in parts.values()
            for shape, dtype in part.rows.values()
        )
        # where several networks read a chunk, its decoded pictures are in memory too
        longest = _LONGEST if len(networks) < 2 else _DECODED
        fitting = int(min(spare_memory(0) * _ROW_SHARE / max(n_bytes, 1), longest))
        return max(fitting // batch_size, 1) * batch_size

    def _rows(
        self,
        pictures: Sequence[Picture],
        networks: Mapping[str, Mapping[str, FeaturePart]],
        first: int,
        batch_size: int,
        workers: int,
    ) -> dict[str, dict[str, torch.Tensor]]:
        """{features: {array: (n_images, *shape) as stored}} of some pictures."""
        images = list(prefetch(decoded, pictures, 2 * workers, workers)) if len(networks) > 1 else None
        rows: dict[str, dict[str, torch.Tensor]] = {}
        for identity, parts in networks.items():
            backbone = self._network(identity, next(iter(parts.values())))
            wanted = [(part.taps(backbone), part.dtypes) for part in parts.values()]
            dtype = next(iter(parts.values())).key.dtype
            source: Any = pictures if images is None else images
            pixels = prefetch(_pixels_by(backbone), source, batch_size + workers, workers)
            # a whole batch, as `extract` reads it; but a few pictures do not wait for the places of many
            n_read = batch_size if 2 * len(pictures) > batch_size or first else 0
            batches: list[list[dict[str, torch.Tensor]]] = []
            with matrix_products(dtype):
                for start in range(0, len(pictures), batch_size):
                    batch = pinned(
                        torch.stack([next(pixels) for _ in pictures[start : start + batch_size]]), self.device
                    )
                    try:
                        batches.append(rows_of(backbone, batch, wanted, dtype, self.device, n_read))
                    except BeyondFloat16Error as overflow:
                        raise DataError(
                            f"images {first + start} to {first + start + len(batch) - 1}",
                            expected="pictures whose layers float16 holds, as those of the training images",
                            found=f"values of {overflow} beyond it",
                            remedy="leave them out",
                        ) from overflow
            for number, name in enumerate(parts):
                rows[name] = {array: torch.cat([b[number][array] for b in batches]) for array in batches[0][number]}
        return rows

    def _network(self, identity: str, part: FeaturePart) -> TorchBackbone:
        """The network, loaded once as long as the memory holds it."""
        if identity in self._networks:
            self._networks.move_to_end(identity)
            return self._networks[identity]
        limit = spare_on(self.device, 0) * _NETWORK_SHARE
        while self._networks and sum(map(_network_bytes, self._networks.values())) > limit:
            self._networks.popitem(last=False)
        self._networks[identity] = self._tensors.network(part, self.device)
        return self._networks[identity]

    def _saved(self, part: SubjectPart, model: ModelPart) -> SavedHeads:
        if (part.name, model.name) not in self._heads:
            read = self._parts.features[model.features[0]].rows
            shapes = {array: read[array][0] for array in model.arrays}
            rois = {surface: tuple(masks.values()) for surface, masks in part.rois.items()}
            kind = HeadKind(name=model.head, precision=model.precision, rois=rois, surfaces=tuple(part.n_vertices))
            self._heads[part.name, model.name] = SavedHeads(self._tensors.heads(model), shapes, kind, self.device)
        return self._heads[part.name, model.name]

    def _of_subject(
        self,
        part: SubjectPart,
        choice: str,
        rows: Mapping[str, Mapping[str, torch.Tensor]],
        wanted: Mapping[str, np.ndarray],
        n_images: int,
    ) -> dict[str, np.ndarray]:
        """{surface: (n_images, n_wanted)} predictions of some vertices."""
        found: dict[str, np.ndarray] = {}
        for surface, numbers in wanted.items():
            # one span of vertices is read of the heads, and what was not asked for is left out
            span = slice(int(numbers.min()), int(numbers.max()) + 1) if len(numbers) else slice(0, 0)

            def predicted(name: str, surface: str = surface, span: slice = span) -> np.ndarray:
                model = part.models[name]
                read = [{array: rows[features][array] for array in model.arrays} for features in model.features]
                with matrix_products(model.products):
                    return self._saved(part, model).predict(surface, read, span).numpy()

            if choice == BLEND:
                values = part.blend[surface].at(span).of_predictions(predicted, n_images)
            else:
                values = predicted(choice)
            found[surface] = values[:, numbers - span.start]
        return found


def _pixels_by(backbone: TorchBackbone) -> Callable[[Picture], torch.Tensor]:
    return lambda picture: backbone.pixels(decoded(picture))


def _network_bytes(backbone: TorchBackbone) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in backbone.model.state_dict().values())


def _numbers(part: SubjectPart, surface: str | None, roi: str | None) -> dict[str, np.ndarray]:
    """{surface: numbers of the vertices} that were asked for. Raises ConfigError for a name that is not there."""
    if surface is not None and surface not in part.n_vertices:
        raise ConfigError(
            "surface", expected=f"one of {', '.join(part.n_vertices)}", found=repr(surface), remedy="choose one"
        )
    if roi is not None and roi not in part.roi_names:
        known = f"one of {', '.join(part.roi_names)}" if part.roi_names else f"none: {part.name} has no ROIs"
        raise ConfigError("roi", expected=known, found=repr(roi), remedy="choose one, or leave it out")
    chosen = {}
    for name, n_vertices in part.n_vertices.items():
        if surface in (None, name):
            mask = part.rois[name].get(roi, np.zeros(n_vertices, bool)) if roi else np.ones(n_vertices, bool)
            chosen[name] = np.flatnonzero(mask)
    return chosen
