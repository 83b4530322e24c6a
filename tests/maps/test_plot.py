"""Pictures of maps are drawn, a row for each ROI and a column for each layer."""

import numpy as np
import pytest
from PIL import Image

from featcache.backbone.extent import Extent
from heads.blend.plot import new_figure
from heads.maps.export import RoiMaps
from heads.maps.plot import plot_maps

pytest.importorskip("matplotlib")


@pytest.mark.slow
def test_the_frame_of_a_map_is_the_image(tmp_path, monkeypatch):
    """What the network did not see is grey, and padding is cut off."""
    figures = []
    monkeypatch.setattr("heads.maps.plot.new_figure", lambda *size: figures.append(new_figure(*size)) or figures[-1])
    for extent in (Extent(0.1, 0.2, 0.9, 0.8), Extent(0, -0.5, 1, 1.5)):
        plot_maps(tmp_path / "a.png", [roi_maps("V1", 2)], "a title", extent)
        for axis in figures[-1].axes[:2]:
            assert (axis.get_xlim(), axis.get_ylim()) == ((0, 1), (1, 0))
            (image,) = axis.images
            assert image.get_extent() == [extent.left, extent.right, extent.bottom, extent.top]


def roi_maps(name, n_layers):
    places = {f"layer{k}": np.eye(3) / 3 for k in range(n_layers)}
    return RoiMaps(name, 4, dict.fromkeys(places, 1 / n_layers), places, (0.5, 0.5, 0.1))


def size_of(path, n_rois, n_layers):
    plot_maps(path, [roi_maps(f"ROI {k}", n_layers) for k in range(n_rois)], "a title")
    with Image.open(path) as image:
        assert image.format == "PNG" and np.ptp(np.asarray(image.convert("L"))) > 100  # something is drawn
        return image.size


@pytest.mark.slow
def test_a_picture_grows_with_rois_and_layers(tmp_path):
    width, height = size_of(tmp_path / "a.png", 1, 1)
    wider, as_high = size_of(tmp_path / "b.png", 1, 3)
    as_wide, higher = size_of(tmp_path / "c.png", 2, 1)
    assert wider > width == as_wide and higher > height == as_high
