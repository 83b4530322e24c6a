"""A picture of which model explains which ROI."""

from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from featcache.dataset.subject import Subject
from featcache.machine.progress import say

_MOST = 12  # models with a colour of their own; the others share one


def plot_weights(
    path: Path, weights: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], subjects: Mapping[str, Subject]
) -> None:
    """A bar for each ROI, of the models' weights averaged over its vertices in all subjects.

    weights : {subject: {hemisphere: {ROI or 'all': {model: mean weight}}}}
    """
    if find_spec("matplotlib") is None:
        say("no picture of the weights: it needs matplotlib, of the plot extra")
        return
    from matplotlib import colormaps
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rois, models, shares = _over_subjects(weights, subjects)
    figure = Figure(figsize=(9, 1.2 + 0.24 * len(rois) + 0.17 * min(len(models), _MOST + 1)), layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    order = np.argsort(-shares[0], kind="stable")
    named, rest = order[:_MOST], order[_MOST:]
    columns = [(models[i], shares[:, i]) for i in named]
    columns += [(f"{len(rest)} others", shares[:, rest].sum(1))] if len(rest) else []
    left = np.zeros(len(rois))
    for number, (name, values) in enumerate(columns):
        axis.barh(range(len(rois)), values, left=left, color=colormaps["tab20"](number), label=name)
        left += values
    axis.set_yticks(range(len(rois)), rois, fontsize=7)
    axis.invert_yaxis()
    axis.set(xlim=(0, 1), xlabel="mean weight")
    figure.legend(loc="outside lower center", fontsize=6)
    figure.savefig(path, dpi=110)


def _over_subjects(
    weights: Mapping[str, Mapping[str, Mapping[str, Mapping[str, float]]]], subjects: Mapping[str, Subject]
) -> tuple[list[str], list[str], np.ndarray]:
    """ROIs, models, and (n_rois, n_models) means over the vertices of all subjects."""
    parts = [
        (roi, len(mask) if roi == "all" else int(mask.sum()), of_roi)
        for name, hemispheres in weights.items()
        for h, of_hemisphere in hemispheres.items()
        for roi, of_roi in of_hemisphere.items()
        for mask in [subjects[name].rois[h].get(roi, np.zeros(subjects[name].n_vertices[h], dtype=bool))]
    ]
    there = {roi for roi, _, _ in parts}
    # in the order of the score table; an ROI that is empty in one subject has its place by it all the same
    in_order = dict.fromkeys(["all", *(roi for s in subjects.values() for of_h in s.rois.values() for roi in of_h)])
    rois = [roi for roi in in_order if roi in there]
    models = list(dict.fromkeys(model for _, _, of_roi in parts for model in of_roi))
    shares, counts = np.zeros((len(rois), len(models))), np.zeros(len(rois))
    for roi, n, of_roi in parts:
        shares[rois.index(roi), [models.index(model) for model in of_roi]] += n * np.array(list(of_roi.values()))
        counts[rois.index(roi)] += n
    return rois, models, shares / counts[:, None]
