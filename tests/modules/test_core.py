"""The core brings layers of any grid together, and mixes neither images nor subjects."""

import pytest
import torch

from heads.config import CoreConfig
from heads.modules.core import CORE, Core

CONFIG = CoreConfig(hidden=6, channels=5, blocks=2)


def core_of(shapes):
    torch.manual_seed(0)
    return Core(shapes, CONFIG).eval()


def rows_of(shapes, n_images=3):
    torch.manual_seed(1)
    return {name: torch.randn(n_images, *shape) for name, shape in shapes.items()}


@pytest.mark.parametrize(
    ("shapes", "expected"),
    [
        ({"near": (7, 7, 4)}, (7, 7, 5)),
        ({"near": (14, 14, 4), "far": (7, 7, 3), "pooled": (8,)}, (7, 7, 5)),
        ({"near": (9, 5, 4)}, (9, 5, 5)),
        ({"pooled": (8,)}, (1, 1, 5)),
    ],
)
def test_the_output_has_the_shape_that_is_promised(shapes, expected):
    outputs = core_of(shapes)(rows_of(shapes))
    assert list(outputs) == [CORE] and outputs[CORE].shape == (3, *expected) and Core.shape(shapes, CONFIG) == expected


def test_an_image_does_not_depend_on_the_others_of_its_batch():
    shapes = {"near": (7, 7, 4), "pooled": (8,)}
    core, rows = core_of(shapes), rows_of(shapes)
    alone = core({name: values[1:2] for name, values in rows.items()})[CORE]
    torch.testing.assert_close(core(rows)[CORE][1:2], alone)


def test_a_place_sees_its_neighbours_and_nothing_farther_than_the_blocks_reach():
    shapes = {"near": (7, 7, 4)}
    core, rows = core_of(shapes), rows_of(shapes, 1)
    for block in core.blocks:
        torch.nn.init.ones_(block.step[-1].weight)  # blocks start as the identity
    changed = {"near": rows["near"].clone()}
    changed["near"][0, 0, 0] += 5
    moved = (core(rows)[CORE] != core(changed)[CORE]).any(-1)[0]
    assert moved[0, 0] and not moved[4:].any() and not moved[:, 4:].any()  # three convolutions reach three places


def test_blocks_start_as_the_identity():
    shapes = {"near": (7, 7, 4)}
    core, rows = core_of(shapes), rows_of(shapes)
    with_blocks = core(rows)[CORE]
    core.blocks = torch.nn.ModuleList()
    torch.testing.assert_close(core(rows)[CORE], with_blocks)
