"""Charts of the page, as SVG inside it: their lines and letters have the colour of the text around them."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np

from heads.blend.plot import new_figure
from heads.statistics.intervals import ALL, Estimate

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# readable on white and on the page's dark ground, and apart for most colour-blind eyes
COLOURS = (
    "#3b82c4",
    "#e08a1e",
    "#3f9b57",
    "#c2504f",
    "#8d6cc2",
    "#2fa5b5",
    "#cf6fae",
    "#a0785a",
    "#a8a032",
    "#7f8c8d",
)
INK = "#010203"  # drawn with, and replaced by the colour of the text


def svg_of(figure: "Figure", name: str) -> str:
    """A figure as an <svg> that scales with its column; nothing in it is looked up outside the page.

    name : of the figure, from which the ids in it are made
    """
    from matplotlib import rc_context

    figure.patch.set_alpha(0)
    file = io.StringIO()
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(file, format="svg", metadata=dict.fromkeys(("Date", "Creator", "Format", "Type")))
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", text, count=1, flags=re.DOTALL)
    text = re.sub(r'<svg [^>]*?viewBox="([^"]*)"[^>]*>', r'<svg viewBox="\1" aria-hidden="true">', text, count=1)
    text = re.sub(r'(?<=\sid=")|(?<=xlink:href="#)|(?<=url\(#)', f"{name}-", text)
    text = text.replace("xlink:href", "href").replace(INK, "currentColor")
    return re.sub(r"font: (\d+)px [^\"]*?(?=[;\"])", r"font-size: \1px", text)


def _axis(figure: "Figure") -> "Axes":
    axis = figure.subplots()
    style(axis)
    return axis


def style(axis: "Axes") -> None:
    """Ink of the text, no box, no ground."""
    axis.patch.set_alpha(0)
    axis.spines[["top", "right"]].set_visible(False)
    axis.spines[:].set_color(INK)
    axis.tick_params(colors=INK, labelsize=8)
    for label in (axis.xaxis.label, axis.yaxis.label, axis.title):
        label.set_color(INK)
        label.set_fontsize(9)


def scores_chart(estimates: Sequence[Estimate], colours: Mapping[str, str], unit: str) -> str:
    """Dots with intervals: a row for each ROI, and in it a dot for each model, {model: its colour}."""
    rois = list(dict.fromkeys(one.roi for one in estimates))
    labels = ["all vertices" if roi == ALL else roi for roi in rois]
    figure = new_figure(7.2, 0.9 + (0.17 + 0.055 * len(colours)) * len(rois))
    axis = _axis(figure)
    for number, (model, colour) in enumerate(colours.items()):
        own = [one for one in estimates if one.model == model]
        rows = [rois.index(one.roi) + (number - (len(colours) - 1) / 2) * 0.7 / max(len(colours), 1) for one in own]
        mean = np.array([one.mean for one in own])
        errors = np.maximum([mean - [one.low for one in own], [one.high for one in own] - mean], 0)
        axis.errorbar(mean, rows, xerr=errors, fmt="o", markersize=3, linewidth=1.2, color=colour)
    axis.axvline(0, color=INK, linewidth=0.5, alpha=0.5)
    axis.grid(axis="x", color=INK, alpha=0.12, linewidth=0.6)
    axis.set_yticks(range(len(rois)), labels)
    axis.set_ylim(len(rois) - 0.5, -0.5)
    axis.set_xlabel(unit)
    return svg_of(figure, "scores")


def ceiling_chart(r: np.ndarray, ceiling: np.ndarray) -> str:
    """Explained variance of vertices against their ceilings, as a density, and the line at which all is explained."""
    figure = new_figure(4.6, 4.0)
    axis = _axis(figure)
    known = ~np.isnan(ceiling)
    x, y = ceiling[known], np.maximum(r[known], 0) ** 2
    top = max(float(x.max(initial=0)), float(y.max(initial=0)), 0.05)
    counts, *_ = np.histogram2d(y, x, bins=48, range=[[0, top], [0, top]])
    shown = np.ma.masked_equal(np.log1p(counts), 0)
    axis.imshow(shown, origin="lower", extent=(0, top, 0, top), cmap="viridis", aspect="auto", interpolation="nearest")
    axis.plot([0, top], [0, top], color=INK, linewidth=1, linestyle="--")
    axis.set(
        xlabel="noise ceiling, fraction of variance", ylabel="explained variance, r²", xlim=(0, top), ylim=(0, top)
    )
    return svg_of(figure, "ceiling")


def histogram(values: np.ndarray, label: str, name: str) -> str:
    """How many vertices have which score."""
    figure = new_figure(4.6, 4.0)
    axis = _axis(figure)
    axis.hist(values, bins=40, color=COLOURS[0])
    axis.set(xlabel=label, ylabel="vertices")
    return svg_of(figure, name)


def shares_chart(rois: Sequence[str], shares: np.ndarray, colours: Sequence[str]) -> str:
    """A bar for each ROI, which models share; (n_rois, n_models) that sum to 1 in each row."""
    figure = new_figure(7.2, 0.8 + 0.22 * len(rois))
    axis = _axis(figure)
    left = np.zeros(len(rois))
    for values, colour in zip(shares.T, colours, strict=True):
        axis.barh(range(len(rois)), values, left=left, height=0.78, color=colour)
        left += values
    axis.set_yticks(range(len(rois)), ["all vertices" if roi == ALL else roi for roi in rois])
    axis.set(xlim=(0, 1), ylim=(len(rois) - 0.4, -0.6), xlabel="share of the blend's weights")
    return svg_of(figure, "shares")


def learning_chart(curves: Mapping[str, Sequence[tuple[Sequence[float], int | None]]], stage: str) -> str:
    """Scores of each epoch on the held-out fold; a colour for each label, a ring at the epoch that is kept.

    curves : {label: [(score of each epoch, epoch that is kept, from 1)]}
    """
    figure = new_figure(6.4, 3.0)
    axis = _axis(figure)
    longest = 1
    for number, of_label in enumerate(curves.values()):
        colour = COLOURS[number % len(COLOURS)]
        for scores, kept in of_label:
            epochs = np.arange(1, len(scores) + 1)
            longest = max(longest, len(scores))
            axis.plot(epochs, scores, color=colour, linewidth=1.2, marker=".", markersize=4, alpha=0.85)
            if kept is not None and kept <= len(scores):
                axis.plot(kept, scores[kept - 1], "o", markersize=7, fillstyle="none", color=colour)
    axis.grid(color=INK, alpha=0.12, linewidth=0.6)
    axis.set_xticks(np.unique(np.linspace(1, longest, min(longest, 10)).astype(int)))
    axis.set(xlabel="epoch", ylabel="score on the held-out fold")
    return svg_of(figure, stage)
