"""The page of a work folder: what is there is shown, and of what is missing it says which command makes it."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from featcache import __version__
from featcache.dataset.subject import Dataset
from featcache.errors import StoreError
from featcache.machine.documents import read_document
from featcache.machine.extra import needed
from featcache.machine.files import replace_bytes
from featcache.machine.folders import read_unchanged
from featcache.machine.memory import keep_freed_memory
from featcache.machine.progress import bar, say
from featcache.workdir import Workdir
from heads.blend.plot import over_subjects
from heads.blend.saved import BLEND, SavedBlend, load_blend
from heads.page import charts, history, maps, pictures, tables
from heads.page.measures import Measured, measure
from heads.page.surface import load_mesh, on_fsaverage
from heads.statistics.intervals import ALL, Estimate, select
from heads.statistics.sources import find_scored

MOST_BYTES = 5_000_000  # of the page
TITLES = {
    "scores": "Scores by subject, ROI and model",
    "maps": "Maps of the cortex",
    "ceiling": "Vertices against their ceiling",
    "rois": "Who explains which ROI",
    "learning": "Learning curves",
    "images": "Best and worst predicted images",
    "runs": "What was run",
}
MOST_MODELS = 8  # side by side in tables and charts, best first


@dataclass(frozen=True)
class Detail:
    """How much a page shows.

    n_images : best images, and as many worst ones, of each subject
    width : of pictures of maps, pixels
    n_subjects : whose maps are drawn
    """

    n_images: int
    width: int
    n_subjects: int


# from the first that stays within MOST_BYTES
DETAILS = (Detail(6, 1000, 8), Detail(4, 760, 8), Detail(2, 600, 4), Detail(0, 600, 1), Detail(0, 600, 0))


@dataclass(frozen=True)
class Missing:
    """Why a part of the page is empty, and the command that fills it; '' where none can."""

    what: str
    command: str = ""


@dataclass(frozen=True)
class Page:
    """The page that was written.

    sections : what is in it, by name
    missing : {section: why it is not}
    """

    path: Path
    n_bytes: int
    sections: Sequence[str]
    missing: Mapping[str, str]


@dataclass
class _Found:
    """What the work folder has, read once.

    names : models that tables and charts show, best first
    """

    dataset: Dataset
    work: Path
    measured: list[Measured] = field(default_factory=list)
    estimates: list[Estimate] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    n_models: int = 0
    chosen_on: list[str] = field(default_factory=list)
    blend: SavedBlend = field(default_factory=dict)
    weights: dict[str, Any] = field(default_factory=dict)


def write_report(dataset: Dataset, work: Path | str, out: Path | None = None, images: bool = True) -> Page:
    """Write the page of a work folder.

    out : the file; None: report.html in the work folder
    images : whether it has small pictures of training images

    Raises ConfigError where the extra `report` is not installed, StoreError for a work folder without any results.
    """
    work = Path(work)
    for module in ("jinja2", "matplotlib", "nilearn"):
        needed(module, "reports", "report")
    _refuse_empty(work)
    keep_freed_memory()
    found = _find(dataset, work)
    path = Workdir(work).report if out is None else out
    sections, missing = _sections(found)
    for detail in DETAILS:
        content = _render(found, _detailed(found, sections, images, detail), missing, detail).encode()
        if len(content) <= MOST_BYTES:
            replace_bytes(path, content)
            return Page(path, len(content), list(sections), {name: why.what for name, why in missing.items()})
    raise StoreError(
        path,
        expected=f"a page of at most {MOST_BYTES:,} bytes",
        found=f"{len(content):,} without maps of single subjects or images",
        remedy="choose fewer subjects with --subject",
    )


def _refuse_empty(work: Path) -> None:
    files = Workdir(work)
    if not any(path.exists() for path in (files.features, files.checkpoints, files.predictions, files.submission)):
        raise StoreError(
            work,
            expected="a work folder with features, checkpoints or predictions",
            found="none of them" if work.is_dir() else "no such folder",
            remedy="run 'extract' first",
        )


def _find(dataset: Dataset, work: Path) -> _Found:
    """Read the predictions of every model once, and what the last blend left."""
    found, files = _Found(dataset, work), Workdir(work)
    try:
        scored = find_scored(dataset.subjects, work)
    except StoreError:
        return found
    with bar("report", len(scored), "subjects") as advance:
        for subject, of_subject in scored.items():
            found.measured.append(measure(subject, of_subject))
            advance(1)
    found.estimates = tables.all_estimates(found.measured)
    found.chosen_on = list(dict.fromkeys(one.name for each in scored.values() for one in each if one.chosen_on))
    means: dict[str, list[float]] = {}
    for one in found.measured:
        for model in one.models:
            means.setdefault(model.name, []).append(float(one.r[model.name].mean()))
    # a model of all subjects before one of some: their means are not over the same vertices
    ranked = sorted(means, key=lambda name: (-len(means[name]), -float(np.mean(means[name]))))
    found.names, found.n_models = ranked[:MOST_MODELS], len(ranked)
    try:
        found.blend, found.weights = read_unchanged(files.submission, partial(_read_blend, files))
    except (StoreError, ValueError, OSError) as error:
        say(f"left out the blend: {error}")
    return found


def _read_blend(files: Workdir) -> tuple[SavedBlend, dict[str, Any]]:
    blend = load_blend(files.saved_blend) if files.saved_blend.is_file() else {}
    return blend, read_document(files.blend_weights, dict[str, Any]) if files.blend_weights.is_file() else {}


Filled = dict[str, Any]  # what the template shows of one section


def _sections(found: _Found) -> tuple[dict[str, Filled], dict[str, Missing]]:
    """Each part of the page, in order, filled or with what is missing."""
    makers = {
        "scores": _scores,
        "maps": _maps,
        "ceiling": _ceiling,
        "rois": _rois,
        "learning": _learning,
        "images": _images,
        "runs": _runs,
    }
    parts = {name: make(found) for name, make in makers.items()}
    return (
        {name: part for name, part in parts.items() if not isinstance(part, Missing)},
        {name: part for name, part in parts.items() if isinstance(part, Missing)},
    )


def _detailed(found: _Found, sections: Mapping[str, Filled], images: bool, detail: Detail) -> dict[str, Filled]:
    """The parts with as many pictures as a detail allows."""
    more: dict[str, Filled] = {}
    if "maps" in sections:
        more["maps"] = _map_pictures(sections["maps"], detail)
    if "images" in sections:
        more["images"] = _image_pictures(found, images, detail)
    return {name: part | more.get(name, {}) for name, part in sections.items()}


def _no_predictions(found: _Found) -> Missing:
    if any(Workdir(found.work).features.glob("[!.]*")):
        return Missing("There are features, but no complete predictions of these subjects yet.", "fit-heads")
    if any(Workdir(found.work).checkpoints.glob("[!.]*")):
        return Missing("There are checkpoints, but no features and predictions yet.", "extract, then fit-heads")
    return Missing("There are no predictions of these subjects.", "extract, then fit-heads")


def _scores(found: _Found) -> Filled | Missing:
    if not found.measured:
        return _no_predictions(found)
    subject = ALL if len(found.measured) > 1 else found.measured[0].subject.name
    order = tables.roi_order(found.measured)
    of_all = {one.model for one in select(found.estimates, subject=subject)}
    blended = any(one.blended for one in found.measured)
    colours = ({BLEND: charts.INK} if blended else {}) | dict(zip(found.names, charts.COLOURS, strict=False))
    drawn = {name: colour for name, colour in colours.items() if name in of_all}
    accuracy = bool(select(found.estimates, subject=subject, measure="accuracy"))
    unit = "Noise-normalised accuracy, %" if accuracy else "Mean r"
    chosen = select(found.estimates, subject=subject, measure="accuracy" if accuracy else "r")
    rows = sorted((one for one in chosen if one.model in drawn), key=lambda one: order.index(one.roi))
    without = [one.subject.name for one in found.measured if np.isnan(one.ceiling).all()]
    return {
        "chart": charts.scores_chart(rows, drawn, f"{unit}, out of fold"),
        "digits": 2 if accuracy else 4,
        "measure": unit,
        "colours": [drawn.get(name, "") for name in found.names],
        "blend_drawn": BLEND in drawn,
        "tables": tables.tables(found.estimates, found.measured, list(colours)),
        "blended": blended,
        "without_ceilings": without,
        "all_without": len(without) == len(found.measured),
        "gains": found.weights.get("gains", []),
    }


def _maps(found: _Found) -> Filled | Missing:
    if not found.measured:
        return _no_predictions(found)
    placed = [one for one in found.measured if on_fsaverage(one.subject)]
    if not placed:
        where = (
            "positions of the vertices are known, but of no surface"
            if any(one.subject.positions for one in found.measured)
            else "it is not known where on the surface fsaverage the vertices lie"
        )
        return Missing(
            f"No maps of the cortex: {where}. Maps need the vertices of fsaverage: in the challenge's tree "
            "roi_masks/lh.all-vertices_fsaverage_space.npy and the same of rh, or fsaverage/lh.npy of an imported "
            "subject."
        )
    mesh = load_mesh()
    drawn = maps.score_maps(placed, mesh)
    drawn += (layers := maps.layer_maps(placed, found.work, mesh))
    drawn += (models := maps.model_maps(placed, found.blend, found.names, mesh))
    lacking = []
    if not layers:
        lacking.append(
            Missing("No map of the best layer: it takes models of several single layers.", "fit-heads --layers each")
        )
    if not models:
        lacking.append(Missing("No map of the blend's leading model: nothing was blended.", "blend"))
    return {
        "drawn": drawn,
        "placed": [one.subject.name for one in placed],
        "viewer": maps.viewer_data(drawn, mesh),
        "titles": [one.title for one in drawn],
        "scales": [one.scale for one in drawn],
        "lacking": lacking,
        "share": maps.drawn_share([one.subject for one in placed]),
        "without": [one.subject.name for one in found.measured if one not in placed],
    }


def _map_pictures(part: Filled, detail: Detail) -> Filled:
    """Pictures of the maps of all subjects together, and of as many single ones as a detail allows."""
    mesh, left_out = load_mesh(), part["placed"][detail.n_subjects :]
    shown = [one for one in part["drawn"] if one.subject not in left_out]
    return {
        "groups": [
            (subject, [(one, maps.picture(one, mesh, detail.width)) for one in of_subject])
            for subject, of_subject in maps.by_subject(shown)
        ],
        "undrawn": len(left_out),
    }


def _ceiling(found: _Found) -> Filled | Missing:
    if not found.measured:
        return _no_predictions(found)
    r = np.concatenate([one.r[one.best] for one in found.measured])
    ceiling = np.concatenate([one.ceiling for one in found.measured])
    what = maps.best_of(found.measured)
    filled = {"what": what, "n_vertices": len(r), "r": charts.histogram(r, f"r of {what}", "histogram"), "chart": ""}
    known = ceiling > 0
    if known.any():
        explained = np.minimum(np.maximum(r[known], 0) ** 2 / ceiling[known], 1)
        filled |= {
            "chart": charts.ceiling_chart(r, ceiling),
            "n_known": int(known.sum()),
            "median": float(np.median(explained)),
            "half": float(np.mean(explained > 0.5)),
        }
    return filled


def _rois(found: _Found) -> Filled | Missing:
    weights = found.weights.get("weights")
    subjects = {one.subject.name: one.subject for one in found.measured}
    if not weights:
        return Missing("Nothing was blended yet: who explains which ROI is read from the weights of a blend.", "blend")
    try:
        known = {name: of_subject for name, of_subject in weights.items() if name in subjects}
        rois, models, shares = over_subjects(known, subjects)
    except (AttributeError, KeyError, TypeError, ValueError):
        rois = []
    if not rois:
        return Missing("The last blend is of other subjects or ROIs than the dataset has now.", "blend")
    named = [name for name in found.names if name in models]
    rest = [number for number, name in enumerate(models) if name not in named]
    columns = shares[:, [models.index(name) for name in named]]
    if rest:
        columns = np.concatenate([columns, shares[:, rest].sum(1, keepdims=True)], axis=1)
    colours = [charts.COLOURS[found.names.index(name)] for name in named] + [charts.COLOURS[-1]] * bool(rest)
    named += [f"{len(rest)} others"] if rest else []
    return {
        "chart": charts.shares_chart(rois, columns, colours),
        "models": list(zip(named, colours, strict=True)),
        "rows": list(zip(rois, columns.tolist(), strict=True)),
    }


def _learning(found: _Found) -> Filled | Missing:
    trained = history.stages(found.work)
    if not trained:
        return Missing("No backbone was trained: the features are of a frozen one.", "pretrain, then finetune")
    names = {stage.name for stage in trained}
    other = {"pretrain": "stage 1 was not trained here", "finetune": "stage 2 was not trained yet"}
    return {
        "stages": [
            {
                "stage": stage,
                "chart": charts.learning_chart(stage.curves, stage.name),
                "colours": list(zip(stage.curves, charts.COLOURS * len(stage.curves), strict=False)),
            }
            for stage in trained
        ],
        "lacking": [Missing(f"No curve of {name}: {why}.", name) for name, why in other.items() if name not in names],
    }


def _images(found: _Found) -> Filled | Missing:
    return {} if found.measured else _no_predictions(found)


def _image_pictures(found: _Found, images: bool, detail: Detail) -> Filled:
    """The best and the worst images, with pictures where these are wanted and a detail allows them."""
    shown, most = images and detail.n_images > 0, detail.n_images or DETAILS[0].n_images
    return {
        "subjects": [pictures.extremes(one, most, shown) for one in found.measured],
        "shown": shown,
        "cut": images and not shown,
    }


def _runs(found: _Found) -> Filled | Missing:
    runs = history.runs(found.work)
    every = [model for one in found.measured for model in one.models]
    if not runs and not every:
        return Missing("No command was recorded: the journal starts with the next one.")
    return {"runs": runs, "keys": history.keys(every), "seconds": sum(run.seconds for run in runs)}


def _render(found: _Found, sections: Mapping[str, Filled], missing: Mapping[str, Missing], detail: Detail) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("heads.page"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    best = [one for one in select(found.estimates, subject=ALL) if one.roi == ALL]
    page: str = environment.get_template("report.html.jinja").render(
        version=__version__,
        made=datetime.now(UTC).strftime("%Y-%m-%d %H:%M UTC"),
        root=found.dataset.root,
        work=found.work,
        subjects=found.dataset.subjects,
        n_measured=len(found.measured),
        notes=found.dataset.notes,
        models=found.names,
        n_models=found.n_models,
        chosen_on=found.chosen_on,
        best=max(best, key=lambda one: (one.model == BLEND, one.mean), default=None),
        colours=charts.COLOURS,
        titles=TITLES,
        n_images=len({int(i) for subject in found.dataset.subjects for i in subject.train.ids}),
        n_vertices=sum(sum(subject.n_vertices.values()) for subject in found.dataset.subjects),
        tables_of=len(found.measured),
        sections=sections,
        missing=missing,
        reduced=detail != DETAILS[0],
    )
    return page
