"""fit-heads and maps: cached features -> heads and predictions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.config import PRODUCTS
from featcache.workdir import Workdir
from heads.commands.options import (
    DATA,
    WORK,
    AsJson,
    Ceiling,
    Data,
    Device,
    Subjects,
    Work,
    given,
    on_command_line,
    open_tree,
)
from heads.config import HEADS, LOSS_NAMES, SOLVERS, FitConfig, MomentsConfig, SpatialConfig, adamw_of, refuse_unread
from heads.recipes.steps import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.subject import Subject


def _either(name: str) -> str:
    """A default of the gradient loop, and that of spatial heads where it is another."""
    usual, spatial = (getattr(adamw_of(head), name) for head in ("linear", "spatial"))
    return f"{usual}" if usual == spatial else f"{usual}; spatial {spatial}"


def fit_heads(
    context: typer.Context,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    loss: Annotated[
        str,
        typer.Option(help=f"{', '.join(LOSS_NAMES)}, or a weighted sum: smooth_l1+0.5*mnnpc; several: with commas."),
    ] = FitConfig.loss,
    head: Annotated[
        str,
        typer.Option(help=f"{', '.join(HEADS)}; roi: a layer a hemisphere and one an ROI; spatial: maps over places."),
    ] = FitConfig.head,
    layers: Annotated[
        str, typer.Option(help="joint: all that were extracted. each: a model of every one. Or names.")
    ] = FitConfig.layers,
    solver: Annotated[str, typer.Option(help=f"{', '.join(SOLVERS)}.")] = FitConfig.solver,
    folds: Annotated[int, typer.Option(help="Folds of the training images, by image id.")] = FitConfig.n_folds,
    seed: Annotated[int, typer.Option(help="Of the folds and of the gradient loop.")] = FitConfig.seed,
    epochs: Annotated[
        int | None,
        typer.Option(help=f"adamw, moments: the most. [{_either('epochs')}; moments {MomentsConfig.steps}]"),
    ] = None,
    learning_rate: Annotated[
        float | None,
        typer.Option(
            help=f"adamw: at the first step. [{_either('learning_rate')}] moments: in units of the curvature. "
            f"[{MomentsConfig.learning_rate}]"
        ),
    ] = None,
    weight_decay: Annotated[float | None, typer.Option(help=f"adamw: decoupled. [{_either('weight_decay')}]")] = None,
    batch_size: Annotated[int | None, typer.Option(help=f"adamw: images a step. [{_either('batch_size')}]")] = None,
    rank: Annotated[int, typer.Option(help="spatial: maps over places, an output and layer.")] = SpatialConfig.rank,
    space: Annotated[
        int, typer.Option(help="spatial: outputs that the vertices of all subjects are linear in; 0: each alone.")
    ] = SpatialConfig.space,
    token_dropout: Annotated[
        float, typer.Option(help="spatial: part of the places that an image lacks in training.")
    ] = SpatialConfig.token_dropout,
    smoothness: Annotated[
        float, typer.Option(help="spatial: penalty of differences between neighbouring places.")
    ] = SpatialConfig.smoothness,
    sparsity: Annotated[
        float, typer.Option(help="spatial: penalty of maps that spread over many places.")
    ] = SpatialConfig.sparsity,
    products: Annotated[str, typer.Option(help=f"How CUDA multiplies: {', '.join(PRODUCTS)}.")] = FitConfig.products,
    max_memory: Annotated[
        float, typer.Option(help="10^9 bytes that the process may take; 0: what is free.")
    ] = FitConfig.max_memory,
    device: Device = FitConfig.device,
    as_json: AsJson = False,
) -> Job:
    """Fit heads to every cached feature store, out of fold."""
    config = FitConfig(
        loss=loss,
        head=head,
        layers=layers,
        solver=solver,
        n_folds=folds,
        seed=seed,
        device=device,
        products=products,
        max_memory=max_memory,
        moments=MomentsConfig(**given(steps=epochs, learning_rate=learning_rate)),
        adamw=replace(
            adamw_of(head),
            **given(epochs=epochs, learning_rate=learning_rate, weight_decay=weight_decay, batch_size=batch_size),
        ),
        spatial=SpatialConfig(
            rank=rank, space=space, token_dropout=token_dropout, smoothness=smoothness, sparsity=sparsity
        ),
    )
    refuse_unread(on_command_line(context), config)
    return Job(config, lambda: _fit(open_tree(data, noise_ceiling).select(subject), config, work), as_json)


def _fit(subjects: "Sequence[Subject]", config: FitConfig, work: Path) -> Outcome:
    from featcache.machine.progress import say
    from heads.fit.run import fit_heads as run
    from heads.fit.run import scores_by_model
    from heads.report.tables import as_json, print_table, score_table

    if exact := config.shared_losses:
        say(
            f"{', '.join(exact)}: closed form{', one model' if len(exact) > 1 else ''}; "
            "linear heads have the same optimum under mse, pearson and mnnpc"
        )
    done = run(subjects, config, work)
    scores = scores_by_model(subjects, done)
    print_table(score_table(scores, "out-of-fold"))
    stores = [{"subject": f.subject, "model": f.model, "path": str(f.path), "weights": str(f.weights)} for f in done]
    result: dict[str, Any] = {"stores": stores, "scores": as_json(scores)}
    new = sum(fitted.new for fitted in done)
    return Outcome(f"{len(done)} fits, {new} of them new, in {Workdir(work).predictions}", result)


def maps(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[str, typer.Option(help="Of the models whose names match, such as '*spatial*'.")] = "*",
    as_json: AsJson = False,
) -> Job:
    """Write where in the image, and in which layers, heads look: per vertex, per ROI, and plotted."""

    def call() -> Outcome:
        subjects = open_tree(data, noise_ceiling).select(subject)
        from heads.maps.maps import export_maps

        written, recovered = export_maps(subjects, models, work)
        for found in recovered:
            typer.echo("planted and found: " + ", ".join(f"{name} r = {value:.2f}" for name, value in found.items()))
        result = {"files": [str(path) for path in written], "recovery": recovered}
        return Outcome(f"{len(written)} files in {Workdir(work).maps}", result)

    return Job(None, call, as_json)
