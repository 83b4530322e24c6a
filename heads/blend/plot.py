"""Pictures of the weights and scores of a blend and of trainings, and what every picture needs."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from featcache.dataset.subject import Subject
from featcache.machine.progress import say
from heads.fit.short_names import split_names
from heads.scores.by_roi import every_summary
from heads.scores.metrics import ALL_SURFACES, VertexScores

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

    rois, models, shares = over_subjects(weights, subjects)
    order = np.argsort(-shares[0], kind="stable")
    named, rest = order[:_MOST], order[_MOST:]
    shared, short = split_names(models)
    columns = [(short[number], shares[:, number]) for number in named]
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
    figure.legend(
        loc="outside lower center", fontsize=6, title=f"all models: {shared}" if shared else None, title_fontsize=6
    )
    figure.savefig(path)


def plot_scores(path: Path, scores: Sequence[VertexScores]) -> None:
    """Draw bars for each ROI, one for each surface, over the vertices of all subjects, and a dot for each subject.

    ROIs are in the order of the challenge's report, all vertices last. Noise-normalised accuracy where there are noise
    ceilings, else mean r.
    """
    if not can_draw("the scores"):
        return
    rows = every_summary(scores)
    accuracy = any(row.accuracy is not None for row in rows)
    values = {
        (row.subject, row.surface, row.roi): value
        for row in rows
        if (value := row.accuracy if accuracy else row.mean_r) is not None
    }
    rois = [roi for subject, surface, roi in values if (subject, surface) == ("all", ALL_SURFACES)]
    surfaces, subjects = (sorted({getattr(one, part) for one in scores}) for part in ("surface", "subject"))
    figure = new_figure(2 + 0.42 * len(rois), 3.6)
    axis, width = figure.subplots(), 0.8 / len(surfaces)
    for number, surface in enumerate(surfaces):
        places = np.arange(len(rois)) + (number - (len(surfaces) - 1) / 2) * width
        heights = [values.get(("all", surface, roi), np.nan) for roi in rois]
        axis.bar(places, heights, width, color=f"C{number}", alpha=0.6, label=surface)
        for subject in subjects:
            dots = [values.get((subject, surface, roi), np.nan) for roi in rois]
            axis.plot(places, dots, ".", color="0.2", markersize=3)
    axis.axhline(0, color="0.5", linewidth=0.5)
    axis.set_xticks(range(len(rois)), rois, rotation=90, fontsize=7)
    axis.set_ylabel("noise-normalised accuracy, %" if accuracy else "mean r", fontsize=8)
    axis.legend(fontsize=7, title="a dot is a subject", title_fontsize=7)
    figure.savefig(path)


def plot_arms(path: Path, arms: Mapping[str, Mapping[str, float]]) -> None:
    """Draw a group of bars for each subject, and one for their mean: one bar for each arm.

    arms : {arm: {subject: mean r}}
    """
    if not can_draw("the trainings"):
        return
    from matplotlib import colormaps

    subjects = sorted({subject for of_arm in arms.values() for subject in of_arm})
    longest = max(map(len, arms))  # of the names in the legend, 0.055 inches a letter
    figure = new_figure(max(3 + 0.16 * len(arms) * (len(subjects) + 1), 0.6 + 0.055 * longest), 2.8 + 0.2 * len(arms))
    axis, width = figure.subplots(), 0.85 / len(arms)
    for number, (name, of_arm) in enumerate(arms.items()):
        heights = [of_arm.get(subject, np.nan) for subject in subjects]
        places = np.arange(len(subjects) + 1) + (number - (len(arms) - 1) / 2) * width
        colour = colormaps["tab20"](number % 20)
        axis.bar(places, np.array([*heights, np.mean(list(of_arm.values()))]), width, color=colour, label=name)
    axis.axhline(0, color="0.5", linewidth=0.5)
    axis.set_xticks(range(len(subjects) + 1), [*subjects, "mean"], fontsize=7)
    axis.set_ylabel("mean r", fontsize=8)
    figure.legend(loc="outside lower center", fontsize=6)
    figure.savefig(path)


def over_subjects(weights: Shares, subjects: Mapping[str, Subject]) -> tuple[list[str], list[str], np.ndarray]:
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
