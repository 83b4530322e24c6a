"""Heads with weights as if trained, rows for them to read, and subjects whose surfaces overlap in part."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TypeVar

import numpy as np
import torch

from featcache.dataset.subject import Subject
from heads.modules.by_subject import SubjectHeads

SHAPES = {"pooled": (9,), "stages.0": (5, 4, 8), "stages.1": (3, 3, 12), "stages.1.cls": (12,)}
Heads = TypeVar("Heads", bound=SubjectHeads)


def some_rows(n_images: int, shapes: Mapping[str, tuple[int, ...]] = SHAPES, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random rows, channel c with mean c and standard deviation 3."""
    generator = torch.Generator().manual_seed(seed)
    return {
        array: 3 * torch.randn(n_images, *shape, generator=generator) + torch.arange(shape[-1])
        for array, shape in shapes.items()
    }


def as_trained(heads: Heads) -> Heads:
    """Heads in evaluation, with everything that training changes drawn anew, running statistics too."""
    generator = torch.Generator().manual_seed(0)
    buffers = [buffer for name, buffer in heads.named_buffers() if "running_" in name]
    with torch.no_grad():
        for tensor in [*heads.parameters(), *buffers]:
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.1)
    return heads.eval()


def overlapping(subjects: Sequence[Subject]) -> tuple[Subject, Subject]:
    """Two subjects, of whom the second lacks every third vertex of the first and has two that are its own."""
    first, second = subjects
    fsaverage, counts = {}, {}
    for surface in first.surfaces:
        mask = np.array(first.fsaverage[surface])
        mask[np.flatnonzero(mask)[::3]] = False
        mask[np.flatnonzero(~first.fsaverage[surface])[[0, -1]]] = True
        fsaverage[surface], counts[surface] = mask, int(mask.sum())
    return first, replace(second, fsaverage=fsaverage, n_vertices=counts)
