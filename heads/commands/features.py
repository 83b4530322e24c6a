"""layers and extract: backbones and checkpoints -> cached features."""

from typing import Annotated

import typer

from featcache.config import DTYPES, POOLS, BackboneConfig, ExtractConfig, LayerConfig
from featcache.workdir import Workdir
from heads.commands.options import (
    DATA,
    WORK,
    AsJson,
    Ceiling,
    Data,
    Device,
    Name,
    Size,
    Subjects,
    Weights,
    Work,
    backbone_of,
    open_tree,
)
from heads.recipes.steps import Job, Outcome


def layers(
    backbone: Annotated[str, typer.Argument(help="Any model name of timm.")],
    size: Size = None,
    as_json: AsJson = False,
) -> Job:
    """List the layers of a backbone that can be cached, with their maps."""

    def call() -> Outcome:
        from featcache.backbone.network import described_layers
        from heads.report.tables import layer_table, print_table

        maps = described_layers(BackboneConfig(name=backbone, size=size))
        print_table(layer_table(maps))
        rows = [{"layer": name, "channels": c, "height": h, "width": w} for name, (c, h, w) in maps.items()]
        return Outcome(f"{backbone}: {len(maps)} layers, and pooled", {"layers": rows})

    return Job(None, call, as_json)


def extract(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    backbone: Name = None,
    weights: Weights = None,
    size: Size = None,
    checkpoint: Annotated[
        str, typer.Option(help="auto: those in the work folder, if any. none: the backbone as it is. Or a folder.")
    ] = "auto",
    layers: Annotated[
        str, typer.Option(help="auto, all, pooled, or names or numbers with commas between; 'layers' lists them.")
    ] = "auto",
    grid: Annotated[
        str, typer.Option(help="Places a side of each layer: a number, native, or auto (7 at most).")
    ] = LayerConfig.grid,
    pool: Annotated[
        str, typer.Option(help=f"Over the places that a cell takes in: {', '.join(POOLS)}.")
    ] = LayerConfig.pool,
    dtype: Annotated[
        str, typer.Option(help=f"Precision: {', '.join(DTYPES)}. auto: bfloat16 on a CPU that has it, or float32.")
    ] = ExtractConfig.dtype,
    batch_size: Annotated[int, typer.Option(help="Images a forward pass.")] = ExtractConfig.batch_size,
    workers: Annotated[int, typer.Option(help="Threads that decode while the model runs.")] = ExtractConfig().workers,
    device: Device = ExtractConfig.device,
    as_json: AsJson = False,
) -> Job:
    """Run a backbone over every image once and cache what its layers say."""
    config = ExtractConfig(
        backbone=backbone_of(backbone, weights, size),
        layers=LayerConfig(layers=tuple(layers.replace(" ", "").split(",")), grid=grid, pool=pool),
        dtype=dtype,
        batch_size=batch_size,
        workers=workers,
        device=device,
        checkpoint=checkpoint,
    )

    def call() -> Outcome:
        chosen = open_tree(data, noise_ceiling).select(subject)
        from featcache.cache.extract import extract as run

        done = run(chosen, config, work)
        new = sum(one.n_new for one in done)
        stores = [
            {"subject": one.subject, "path": str(one.path), "images": one.n_images, "new": one.n_new} for one in done
        ]
        return Outcome(f"{len(done)} stores, {new} new images in {Workdir(work).features}", {"stores": stores})

    return Job(config, call, as_json)
