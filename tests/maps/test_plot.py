"""Pictures of maps are drawn, a row for each ROI and a column for each layer."""

import numpy as np
import pytest
from PIL import Image

from heads.maps.export import RoiMaps
from heads.maps.plot import plot_maps

pytest.importorskip("matplotlib")


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
