"""Gradient of one step of the optimiser, over batches, groups of batches and devices."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn
from torchvision.transforms import v2

from featcache.backbone.network import Backbone
from heads.backbones.batches import Images, Steps, Targets
from heads.backbones.encoder import encoder_loss
from heads.backbones.learner import Learner, norms
from heads.config import TrainConfig

# of xxHash64, and 2**61 - 1, modulo which CPython takes the hash of an integer
_PRIME_1, _PRIME_2, _PRIME_5, _INTEGERS = 0x9E3779B185EBCA87, 0xC2B2AE3D27D4EB4F, 0x27D4EB2F165667C5, 2**61 - 1

Batch = tuple[torch.Tensor, torch.Tensor]  # images (n, 3, height, width), numbers of their subjects (n,)


def step_seed(seed: int, number: int, process: int) -> int:
    """Seed of the random numbers of one step in one process, from 0 to 2**63 - 1.

    xxHash64 of the three numbers (>= 0), in the form that CPython has for tuples, whose `hash` earlier versions took:
    so trainings with equal settings still end with equal weights, on any Python.

    Source: https://github.com/Cyan4973/xxHash/blob/dev/doc/xxhash_spec.md; CPython 3.11, Objects/tupleobject.c.
    """
    mixed = _PRIME_5
    for value in (seed, number, process):
        mixed = (mixed + value % _INTEGERS * _PRIME_2) % 2**64
        mixed = (mixed << 31 | mixed >> 33) * _PRIME_1 % 2**64
    return (mixed + (3 ^ _PRIME_5 ^ 3527539)) % 2**63


@dataclass(frozen=True)
class Group:
    """Batches of this device whose outputs one loss sees, and the responses that they are compared with.

    targets : of the images of all devices where outputs are gathered, else of this device's one batch
    """

    batches: list[Batch]
    targets: list[Targets]


class Gradients:
    """Gradients of the loss with respect to a learner's weights, step by step.

    backbone : what the encoder's backbone was made from, for its transform
    """

    def __init__(self, learner: Learner, backbone: Backbone, images: Images, config: TrainConfig, steps: Steps) -> None:
        self._learner, self._accelerator, self._model = learner, learner.accelerator, learner.model
        self._backbone, self._images, self._config, self._steps = backbone, images, config, steps
        self._augment = augmentation() if config.augment else None
        device = learner.device
        self._surfaces = {key: surface.to(device) for key, surface in learner.encoder.heads.surfaces.items()}
        self._ceilings = {
            (subject.name, surface): None if ceiling is None else torch.tensor(ceiling, device=device)
            for subject in images.subjects
            for surface, ceiling in subject.noise_ceiling.items()
        }

    def read(self, pairs: np.ndarray) -> list[Group]:
        """The groups of a step's images, (n_images, 2), as this device computes them, in main memory."""
        device, groups = self._accelerator.process_index, []
        for group in self._steps.groups(pairs):
            batches = [(self._images.read(batch), torch.from_numpy(batch[:, 0].copy())) for batch in group[device]]
            compared = group if self._steps.group else group[device]
            groups.append(Group(batches, self._images.targets(compared.reshape(-1, 2))))
        return groups

    def compute(self, groups: Sequence[Group], number: int) -> tuple[float, float]:
        """Give every weight the gradient of step `number`, clipped; returns the loss and the norm before clipping.

        Both are the same in every process, and may be infinite or NaN.
        """
        accelerator, config = self._accelerator, self._config
        torch.manual_seed(step_seed(config.seed, number, accelerator.process_index))
        self._learner.optimiser.zero_grad()
        backward = self._backward_gathered if self._steps.group else self._backward
        losses = [backward(self._on_device(group), len(groups), group is groups[-1]) for group in groups]
        loss = float(accelerator.reduce(torch.stack(losses).mean(), "mean")) + self._add_penalty()
        norm = float(accelerator.clip_grad_norm_(self._model.parameters(), config.clip_norm or math.inf))
        return loss, norm

    def _on_device(self, group: Group) -> Group:
        device = self._learner.device
        batches = [(self._prepared(pixels), subjects.to(device)) for pixels, subjects in group.batches]
        targets = [replace(t, responses=t.responses.to(device, non_blocking=True)) for t in group.targets]
        return Group(batches, targets)

    def _prepared(self, pixels: torch.Tensor) -> torch.Tensor:
        pixels = pixels.to(self._learner.device, non_blocking=True)
        if self._augment is not None:
            pixels = torch.stack([self._augment(image) for image in pixels])
        return self._backbone.normalise(pixels)

    def _loss(self, outputs: torch.Tensor, targets: Sequence[Targets]) -> torch.Tensor:
        config = self._config
        return encoder_loss(config.terms, outputs, targets, self._surfaces, self._ceilings, config.roi_terms)

    def _backward(self, group: Group, n_groups: int, last: bool) -> torch.Tensor:
        """Loss of one batch alone, with its part of the gradient."""
        ((images, subjects),) = group.batches
        with self._synchronised(last):
            loss = self._loss(self._model(images, subjects), group.targets)
            self._accelerator.backward(loss / n_groups)
        return loss.detach()

    def _backward_gathered(self, group: Group, n_groups: int, last: bool) -> torch.Tensor:
        """Loss over all batches of a group and all devices, with one batch's graph in memory at a time.

        Outputs are gathered first, the loss is differentiated with respect to them, and each batch runs again to
        carry its part of that back into the weights. The second run repeats the random numbers of the first, and the
        first leaves running statistics alone.

        Source: Gao et al. 2021, https://arxiv.org/abs/2101.06983
        """
        devices, device = self._accelerator.num_processes, self._accelerator.process_index
        random_states, outputs = [], []
        with torch.no_grad(), still_statistics(self._model):
            for images, subjects in group.batches:
                random_states.append(_random_state(self._learner.device))
                outputs.append(self._model(images, subjects).float())
        gathered = self._accelerator.gather(torch.stack(outputs)).flatten(0, 1).requires_grad_()
        loss = self._loss(gathered, group.targets)
        (gradient,) = torch.autograd.grad(loss, gathered)
        # processes average their gradients, but here each has only its own part of the sum
        parts = gradient.reshape(devices, len(group.batches), -1, gradient.shape[1])[device] * devices / n_groups
        for k, ((images, subjects), state, part) in enumerate(zip(group.batches, random_states, parts, strict=True)):
            _set_random_state(self._learner.device, state)
            with self._synchronised(last and k == len(group.batches) - 1):
                self._accelerator.backward(self._model(images, subjects), gradient=part)
        return loss.detach()

    @contextmanager
    def _synchronised(self, last: bool) -> Iterator[None]:
        """Let processes exchange gradients in the last backward pass of a step, and in no other."""
        if last:
            yield
        else:
            with self._accelerator.no_sync(self._model):
                yield

    def _add_penalty(self) -> float:
        """Add the gradient of the heads' penalty, once a step and alike in every process; returns the penalty."""
        heads, scaler = self._learner.encoder.heads, self._accelerator.scaler
        if (penalty := heads.penalty()) is None:
            return 0.0
        weights = list(heads.parameters())
        # not by `backward`, which would tell whatever exchanges gradients that these are ready a second time
        gradients = torch.autograd.grad(
            penalty if scaler is None else scaler.scale(penalty), weights, allow_unused=True
        )
        for weight, gradient in zip(weights, gradients, strict=True):
            if gradient is not None:
                weight.grad = gradient if weight.grad is None else weight.grad + gradient
        return float(penalty.detach())


def augmentation() -> Callable[[torch.Tensor], torch.Tensor]:
    """Random change of an image: small enough that what was in a receptive field stays there, and never a flip."""
    move = v2.RandomAffine(0, translate=(0.03, 0.03), scale=(0.97, 1.03), interpolation=v2.InterpolationMode.BILINEAR)
    change: Callable[[torch.Tensor], torch.Tensor] = v2.Compose([move, v2.ColorJitter(0.1, 0.1, 0.1)])
    return change


@contextmanager
def still_statistics(model: nn.Module) -> Iterator[None]:
    """Let batch norms use the statistics of the batch without remembering them."""
    momenta = [(norm, norm.momentum) for norm in norms(model)]
    for norm, _ in momenta:
        norm.momentum = 0.0
    try:
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum


def _random_state(device: str) -> torch.Tensor:
    return torch.cuda.get_rng_state() if device.startswith("cuda") else torch.get_rng_state()


def _set_random_state(device: str, state: torch.Tensor) -> None:
    torch.cuda.set_rng_state(state) if device.startswith("cuda") else torch.set_rng_state(state)
