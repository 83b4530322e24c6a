"""predict and export: fitted heads, and the last blend -> predictions for any images, and an encoder to hand on."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from featcache.config import BackboneConfig, ExtractConfig
from featcache.errors import ConfigError
from featcache.workdir import WORK, data_folder
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, open_data, option_of
from heads.recipes.jobs import Job, Outcome

if TYPE_CHECKING:
    from heads.encoder.encoder import Encoder

_MODEL = "Name of a model, as 'models' lists it, or the six digits that end it; blend: the last blend."


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
    model: Annotated[
        str | None, typer.Option(help=_MODEL, show_default="the last blend, or the only model", rich_help_panel="Heads")
    ] = None,
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
    name: Annotated[str | None, option_of(BackboneConfig, "name")] = None,
    weights: Annotated[str | None, option_of(BackboneConfig, "weights")] = None,
    batch_size: Annotated[int, option_of(ExtractConfig, "batch_size")] = ExtractConfig.batch_size,
    workers: Annotated[int | None, option_of(ExtractConfig, "workers")] = None,
    device: Annotated[str, option_of(ExtractConfig, "device")] = ExtractConfig.device,
) -> Job:
    """Predict the responses to new images, with the last blend or one model."""
    network = BackboneConfig(name=name, weights=weights)

    def call() -> Outcome:
        with options_named():
            return predicted()

    def predicted() -> Outcome:
        from featcache.config import usual_workers
        from featcache.dataset.inputs import pictures_of
        from featcache.dataset.subject import names_in
        from featcache.machine.progress import bar
        from heads.encoder.predictions import Wanted, write_predictions

        pictures = pictures_of(images)
        if encoder is None:
            made = _of_work(data, work, noise_ceiling, subject, model, network, device)
        else:
            from heads.encoder.folder import load_encoder

            made = load_encoder(encoder, network=network, device=device)
        wanted = Wanted(subjects=names_in(subject, made.subjects), roi=roi, model=model)
        csv = out.with_suffix(".csv") if table else None
        chosen = {name: made.choice(name, model) for name in wanted.subjects}
        with bar(f"predict by {', '.join(dict.fromkeys(chosen.values()))}", len(pictures), "images") as advance:
            write_predictions(
                made,
                pictures,
                wanted,
                out,
                table=csv,
                batch_size=batch_size,
                workers=workers or usual_workers(),
                advance=advance,
            )
        written = f"{out}{f' and {csv}' if csv else ''}"
        result = {"images": len(pictures), "models": chosen, "out": str(out), "table": str(csv) if csv else None}
        return Outcome(
            f"{len(pictures):,} images predicted by {', '.join(dict.fromkeys(chosen.values()))}: {written}", result
        )

    return Job(None, call)


@command()
def export(
    folder: Annotated[Path, typer.Argument(help="Folder to write; it must be new or empty.")],
    model: Annotated[
        str | None, typer.Option(help=_MODEL, show_default="the last blend, or the only model", rich_help_panel="Heads")
    ] = None,
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
    name: Annotated[str | None, option_of(BackboneConfig, "name")] = None,
    weights: Annotated[str | None, option_of(BackboneConfig, "weights")] = None,
) -> Job:
    """Write an encoder to one folder: networks, heads, blend, ROIs and a card, for whoever has featcache."""
    network = BackboneConfig(name=name, weights=weights)

    def call() -> Outcome:
        from heads.encoder.export import export_work, push

        opened = open_data(data, noise_ceiling, work)
        described = f"dataset '{data_folder(data, work).name}'"
        n_bytes = export_work(opened.select(subject), work, folder, model=model, network=network, data=described)
        url = push(folder, push_to_hub) if push_to_hub else None
        said = f"wrote {folder} ({n_bytes / 1e6:,.1f} MB)" + (f" and {url}" if url else "")
        return Outcome(said, {"folder": str(folder), "bytes": n_bytes, "url": url})

    return Job(None, call)


@contextmanager
def options_named() -> Iterator[None]:
    """Name an option in a mistake about a model, a subject or an ROI, which has the name of Python's argument."""
    try:
        yield
    except ConfigError as error:
        if error.where not in ("model", "subject", "surface", "roi"):
            raise
        where = f"--{error.where}"
        raise ConfigError(where, expected=error.expected, found=error.found, remedy=error.remedy) from error


def _of_work(
    data: Path | None,
    work: Path,
    noise_ceiling: Path | None,
    subject: str,
    model: str | None,
    network: BackboneConfig,
    device: str,
) -> "Encoder":
    from heads.encoder.work import encoder_of_work

    subjects = open_data(data, noise_ceiling, work).select(subject)
    return encoder_of_work(subjects, work, model, network, device)
