"""layers and extract: backbones and checkpoints -> cached features."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.config import BackboneConfig, ExtractConfig, LayerConfig
from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import DATA, Ceiling, Data, Subjects, Work, command, in_parts, open_data, option_of, read
from heads.recipes.jobs import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.subject import Subject


@command(writes=False)
def layers(
    backbone: Annotated[str, typer.Argument(help="A network, as --backbone of 'extract' names it.")],
    size: Annotated[int | None, option_of(BackboneConfig, "size")] = BackboneConfig.size,
) -> Job:
    """List the layers of a backbone that can be cached, with the size of each map."""

    def call() -> Outcome:
        from featcache.backbone.network import described_layers
        from heads.report.layers import layer_table
        from heads.report.printing import print_table

        maps = described_layers(BackboneConfig(name=backbone, size=size))
        print_table(layer_table(maps))
        rows = [{"layer": name, "channels": c, "height": h, "width": w} for name, (c, h, w) in maps.items()]
        return Outcome(f"{backbone}: {len(maps)} layers, and pooled", {"layers": rows})

    return Job(None, call)


@command(BackboneConfig, LayerConfig, ExtractConfig, has_parts=True)
def extract(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    checkpoint: Annotated[
        str,
        typer.Option(
            help="Trained weights. auto: those in the work folder, if there are any. none: the backbone before "
            "training. Or the folder of a checkpoint.",
            rich_help_panel="Backbone",
        ),
    ] = "auto",
    layers: Annotated[
        str,
        typer.Option(
            help="Layers to keep: auto (pooled and up to 6 others), all, pooled, or names or numbers with commas "
            "between them; the command 'layers' lists them.",
            rich_help_panel="Layers",
        ),
    ] = ",".join(LayerConfig.layers),
    **options: Any,
) -> Job:
    """Run a backbone, an image network, over every image once, and cache the features of its layers."""
    config = read(
        ExtractConfig,
        options,
        backbone=read(BackboneConfig, options),
        layers=read(LayerConfig, options, layers=layers),
        checkpoint=checkpoint,
    )

    def parts(*given: Any) -> Sequence[Any]:
        from featcache.cache.extract import extract_parts

        return extract_parts(*given)

    def settle() -> "tuple[Sequence[Subject]]":
        return (open_data(data, noise_ceiling, work, decodes=True).select(subject),)

    return in_parts(config, settle, _extract, parts, work)


def _extract(subjects: Sequence["Subject"], config: ExtractConfig, work: Path) -> Outcome:
    from featcache.cache.extract import extract as run

    done = run(subjects, config, work)
    n_new = sum(store.n_new for store in done)
    stores = [
        {"subject": store.subject, "path": str(store.path), "images": store.n_images, "new": store.n_new}
        for store in done
    ]
    message = f"{counted(len(done), 'store')}, {counted(n_new, 'new image')} in {Workdir(work).features}"
    return Outcome(message, {"stores": stores})
