"""A picture of which model explains which ROI, and what every picture needs."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.dataset.subject import Subject
from featcache.machine.progress import say

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_MOST = 12  # models with a colour of their own; the others share one
Shares = dict[str, dict[str, dict[str, dict[str, float]]]]  # {subject: {surface: {ROI or 'all': {model: mean weight}}}}


def can_draw(what: str) -> bool:
    """Whether matplotlib is installed. If not, it is said that `what` is not drawn."""
    if find_spec("matplotlib") is None:
        say(f"no picture of {what}: matplotlib is not installed; it comes with the extra 'plot'")
        return False
    return True


def new_figure(width: float, height: float) -> "Figure":
    """A figure of so many inches that is saved to a file, and needs no display."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=110, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def plot_weights(path: Path, weights: Shares, subjects: Mapping[str, Subject]) -> None:
    """Draw a bar for each ROI: the models' weights averaged over its vertices in all subjects."""
    if not can_draw("the weights"):
        return
    from matplotlib import colormaps

    rois, models, shares = _over_subjects(weights, subjects)
    order = np.argsort(-shares[0], kind="stable")
    named, rest = order[:_MOST], order[_MOST:]
    columns = [(models[number], shares[:, number]) for number in named]
    columns += [(f"{len(rest)} others", shares[:, rest].sum(1))] if len(rest) else []
    figure = new_figure(9, 1.2 + 0.24 * len(rois) + 0.17 * len(columns))
    axis = figure.subplots()
    left = np.zeros(len(rois))
    for number, (name, values) in enumerate(columns):
        axis.barh(range(len(rois)), values, left=left, color=colormaps["tab20"](number), label=name)
        left += values
    axis.set_yticks(range(len(rois)), rois, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="mean weight")
    figure.legend(loc="outside lower center", fontsize=6)
    figure.savefig(path)


def _over_subjects(weights: Shares, subjects: Mapping[str, Subject]) -> tuple[list[str], list[str], np.ndarray]:
    """ROIs, models, and means over the vertices of all subjects, (n_rois, n_models)."""
    # the order of the score table: an ROI that is empty in one subject has its place by that subject all the same
    rois = dict.fromkeys(
        ["all", *(roi for s in subjects.values() for of_surface in s.rois.values() for roi in of_surface)]
    )
    sums: dict[str, dict[str, float]] = {roi: {} for roi in rois}
    counts = dict.fromkeys(rois, 0)
    for name, surfaces in weights.items():
        for surface, of_surface in surfaces.items():
            for roi, shares in of_surface.items():
                n = subjects[name].n_vertices[surface] if roi == "all" else int(subjects[name].rois[surface][roi].sum())
                counts[roi] += n
                for model, share in shares.items():
                    sums[roi][model] = sums[roi].get(model, 0.0) + n * share
    models = list(sums["all"])
    filled = [roi for roi in rois if counts[roi]]
    return filled, models, np.array([[sums[roi].get(model, 0.0) / counts[roi] for model in models] for roi in filled])
