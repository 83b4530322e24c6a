"""Pictures of the gallery, all of one small simulated dataset and one small network."""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

import featcache as fc
from featcache.cache.store import Store, list_stores, open_store
from featcache.dataset.subject import Subject
from featcache.simulate import simulate
from featcache.workdir import Workdir
from heads.blend.models import Model
from heads.blend.plot import new_figure, plot_weights
from heads.fit.run import Fitted, score
from heads.maps.export import roi_means
from heads.maps.plot import plot_maps
from heads.maps.read import read_maps

DATA = fc.SimulateConfig(
    n_subjects=1, n_train=400, n_test=10, n_shared=0, n_vertices=(240, 260), image_size=96, workers=1
)
NETWORK = fc.BackboneConfig(name="tf_efficientnet_lite0", weights="packaged", size=112)
LAYERS = ("pooled", "blocks.1", "blocks.2", "blocks.4")
MAPPED = ("all", "V1v", "V1d", "hV4", "FFA-1", "PPA")  # ROIs whose maps are shown
IMAGES = (20, 40, 80, 160, 320)  # of the learning curve; it is scored on the rest


def draw_gallery(folder: Path, data: fc.SimulateConfig = DATA, images: Sequence[int] = IMAGES) -> None:
    """Simulate, extract, fit, blend, and draw all pictures."""
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as scratch:
        work = Path(scratch) / "work"
        simulate(data, Path(scratch) / "challenge")
        dataset = fc.Dataset.from_algonauts(Path(scratch) / "challenge")
        (subject,) = dataset.subjects
        fc.extract(dataset.subjects, fc.ExtractConfig(backbone=NETWORK, layers=fc.LayerConfig(layers=LAYERS)), work)
        (pooled,) = fc.fit_heads(dataset.subjects, fc.FitConfig(layers="pooled"), work)
        (layers,) = fc.fit_heads(dataset.subjects, fc.FitConfig(layers="all"), work)
        fc.fit_heads(dataset.subjects, fc.FitConfig(layers="each"), work)
        blend = fc.blend(dataset, fc.BlendConfig(), work)
        draw_ceilings(folder / "ceilings.png", subject, {"pooled vector": pooled, "all layers": layers})
        plot_weights(folder / "weights.png", blend.weights, {subject.name: subject})
        draw_maps(folder / "maps.png", subject, layers, work)
        (features,) = list_stores(Workdir(work).features)
        draw_learning_curve(folder / "learning.png", subject, features, images)


def draw_ceilings(path: Path, subject: Subject, fits: dict[str, Fitted]) -> None:
    """Draw a dot for each vertex: what heads explain of its variance, against what can be explained."""
    figure = new_figure(9, 4.2)
    for axis, (name, fitted) in zip(figure.subplots(1, len(fits), sharex=True, sharey=True), fits.items(), strict=True):
        scores = [score(subject, surface, open_store(fitted.path)) for surface in subject.surfaces]
        for of_surface in scores:
            axis.plot(of_surface.noise_ceiling, of_surface.r.clip(0) ** 2, ".", markersize=4, label=of_surface.surface)
        axis.plot([0, 1], [0, 1], color="0.5", linewidth=1)
        axis.set(title=name, xlabel="noise ceiling, fraction of variance", xlim=(0, 1), ylim=(0, 1))
        axis.legend(fontsize=7)
    figure.axes[0].set_ylabel("r² out of fold")
    figure.savefig(path)


def draw_maps(path: Path, subject: Subject, fitted: Fitted, work: Path) -> None:
    """Draw where in the image the heads of some ROIs look, in each layer."""
    model = Model.from_store(open_store(fitted.path))
    maps = read_maps(model, work)
    assert maps is not None, "these heads read places"
    plot_maps(path, [one for one in roi_means(subject, model, maps) if one.roi in MAPPED], "where heads look")


def draw_learning_curve(path: Path, subject: Subject, features: Store, images: Sequence[int]) -> None:
    """Draw mean r of new images against the number of images that heads are fitted to."""
    surface = subject.surfaces[0]
    rows, responses = (
        features.read("pooled", 0, len(subject.train)).astype(np.float32),
        np.array(subject.responses(surface)),
    )
    new = slice(max(images), None)
    means = []
    for n_images in images:
        head = fc.RidgeHead().fit(rows[:n_images], responses[:n_images])
        means.append(np.nanmean(fc.pearson_r(head.predict(rows[new]), responses[new])))
    figure = new_figure(5, 3.4)
    axis = figure.subplots()
    axis.plot(images, means, "o-")
    axis.set(xscale="log", xlabel="images that heads are fitted to", ylabel="mean r on new images")
    axis.set_xticks(images, [str(n_images) for n_images in images])
    axis.minorticks_off()
    figure.savefig(path)
