"""predict and export: fitted heads, and the last blend -> predictions for any images, and an encoder to hand on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from featcache.config import BackboneConfig, ExtractConfig, usual_workers
from featcache.errors import ConfigError
from featcache.machine.progress import counted
from featcache.workdir import WORK, data_folder
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, option_of
from heads.recipes.jobs import Job, Outcome

# Options of what is predicted with, which both commands have
Model = Annotated[
    str | None,
    typer.Option(
        help="Name of a model, as 'models' lists it, or the six digits that end it; blend: the last blend.",
        show_default="the last blend, or the only model",
        rich_help_panel="Heads",
    ),
]
Name = Annotated[str | None, option_of(BackboneConfig, "name")]
Weights = Annotated[str | None, option_of(BackboneConfig, "weights")]

_OPTIONS = {"model": "--model", "--models": "--model", "subject": "--subject", "roi": "--roi"}


@contextmanager
def options_named() -> Iterator[None]:
    """Name the option in a mistake that names an argument of Python's, or a pattern of models."""
    try:
        yield
    except ConfigError as error:
        if (option := _OPTIONS.get(error.where)) is None:
            raise
        raise ConfigError(option, expected=error.expected, found=error.found, remedy=error.remedy) from error


@command()
def predict(
    images: Annotated[
        list[str],
        typer.Argument(help="Images to predict: files, folders, or files of many pictures (FILE or FILE:ARRAY)."),
    ],
    out: Annotated[Path, typer.Option(help="Zarr group to write; it must not exist.", rich_help_panel="Output")] = Path(
        "predicted.zarr"
    ),
    table: Annotated[
        bool,
        typer.Option(
            "--table", help="Also write means over ROIs to a CSV file of the same name.", rich_help_panel="Output"
        ),
    ] = False,
    model: Model = None,
    roi: Annotated[
        str | None, typer.Option(help="Predict only the vertices of this ROI.", rich_help_panel="Heads")
    ] = None,
    encoder: Annotated[
        Path | None,
        typer.Option(help="Folder that 'export' wrote, in place of the work folder.", rich_help_panel="Data"),
    ] = None,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    name: Name = None,
    weights: Weights = None,
    batch_size: Annotated[int, option_of(ExtractConfig, "batch_size")] = ExtractConfig.batch_size,
    workers: Annotated[int | None, option_of(ExtractConfig, "workers")] = None,
    device: Annotated[str, option_of(ExtractConfig, "device")] = ExtractConfig.device,
) -> Job:
    """Predict the responses to new images, with the last blend or one model."""
    network, csv = BackboneConfig(name=name, weights=weights), out.with_suffix(".csv") if table else None

    @options_named()
    def call() -> Outcome:
        from featcache.dataset.inputs import pictures_of
        from featcache.dataset.subject import names_in
        from heads.encoder.folder import load_encoder
        from heads.encoder.predictions import Wanted, refuse_existing, write_predictions
        from heads.encoder.work import encoder_of_work

        refuse_existing(out, csv)
        pictures = pictures_of(images)
        if encoder is not None:
            made = load_encoder(encoder, network=network, device=device)
        else:
            subjects = open_data(data, noise_ceiling, work).select(subject)
            made = encoder_of_work(subjects, work, model, network, device)
        wanted = Wanted(subjects=names_in(subject, made.subjects), roi=roi, model=model)
        chosen = write_predictions(
            made, pictures, wanted, out, table=csv, batch_size=batch_size, workers=workers or usual_workers()
        )
        by, written = ", ".join(dict.fromkeys(chosen.values())), f"{out} and {csv}" if csv else str(out)
        result = {"images": len(pictures), "models": chosen, "out": str(out), "table": str(csv) if csv else None}
        return Outcome(f"{counted(len(pictures), 'image')} predicted by {by}: {written}", result)

    return Job(None, call)


@command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    model: Model = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(
            help="Also upload the folder to this repository of the Hugging Face hub, OWNER/NAME.",
            rich_help_panel="Output",
        ),
    ] = None,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    name: Name = None,
    weights: Weights = None,
) -> Job:
    """Write an encoder to one folder: networks, heads, blend, ROIs and a card, for whoever has featcache."""
    network = BackboneConfig(name=name, weights=weights)

    @options_named()
    def call() -> Outcome:
        from heads.encoder.export import export_work, push

        subjects = open_data(data, noise_ceiling, work).select(subject)
        described = f"dataset '{data_folder(data, work).name}'"
        n_bytes = export_work(subjects, work, folder, model=model, network=network, data=described)
        url = push(folder, push_to_hub) if push_to_hub else None
        said = f"wrote {folder} ({n_bytes / 1e6:,.1f} MB)" + (f" and {url}" if url else "")
        return Outcome(said, {"folder": str(folder), "bytes": n_bytes, "url": url})

    return Job(None, call)
