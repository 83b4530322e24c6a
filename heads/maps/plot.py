"""A picture of the maps of ROIs."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from featcache.backbone.extent import WHOLE, Extent
from heads.blend.plot import new_figure

if TYPE_CHECKING:
    from heads.maps.export import RoiMaps


def plot_maps(path: Path, rois: "Sequence[RoiMaps]", title: str, extent: Extent = WHOLE) -> None:
    """Draw a row for each ROI: its mean map of each layer, and the layers' shares.

    The frame of a map is the image. What the network did not see of it is grey, and padding is cut off.

    extent : the part of the image that maps span
    """
    edges = (extent.left, extent.right, extent.bottom, extent.top)
    layers = list(rois[0].places)
    figure = new_figure(1.3 * (len(layers) + 2), 1.15 * len(rois) + 0.8)
    figure.suptitle(title, fontsize=8)
    axes = figure.subplots(len(rois), len(layers) + 1, squeeze=False, width_ratios=[1] * len(layers) + [2])
    for axis, name in zip(axes[0], layers, strict=False):
        axis.set_title(name, fontsize=7)
    for row, roi in zip(axes, rois, strict=True):
        for axis, name in zip(row, layers, strict=False):
            axis.imshow(roi.places[name], cmap="magma", vmin=0, extent=edges)
            axis.set(xticks=[], yticks=[], xlim=(0, 1), ylim=(1, 0), facecolor="0.8")
        row[0].set_ylabel(roi.roi, fontsize=7)
        row[-1].bar(range(len(roi.shares)), list(roi.shares.values()), color="0.4")
        row[-1].set(xticks=[], yticks=[], ylim=(0, max(roi.shares.values()) * 1.05))
    axes[-1][-1].set_xticks(range(len(rois[0].shares)), list(rois[0].shares), rotation=90, fontsize=6)
    axes[0][-1].set_title("share of each layer", fontsize=7)
    figure.savefig(path)
