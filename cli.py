"""Command line: options -> config -> one call -> one result line. Heavy imports wait until a command runs.

A command reads its options, builds its settings and gives back a Job, which `run` does. So a recipe is checked
whole, by the same parsers and settings, before the first of its steps is done.
"""

import inspect
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from featcache.config import DTYPES, POOLS, PRODUCTS, BackboneConfig, ExtractConfig, LayerConfig
from featcache.errors import ConfigError, FeatcacheError
from heads.config import (
    BLEND_RECIPES,
    BLENDS,
    HEADS,
    LEVELS,
    LOSS_NAMES,
    PAPER_SIZE,
    RECIPES,
    SOLVERS,
    STAGES,
    BlendConfig,
    FitConfig,
    MomentsConfig,
    SoupConfig,
    SpatialConfig,
    StageConfig,
    TrainConfig,
    adamw_of,
    blend_recipe,
    refuse_unread,
    split_losses,
)
from heads.config import recipe as settings_of
from heads.recipes import Job, Outcome, UsageError, commands_of, read_recipe, ready, run_steps

app = typer.Typer(
    help="Predict responses of the visual cortex from cached image features: extract once, refit heads, blend.",
    rich_markup_mode=None,  # plain help answers in half the time
    add_completion=False,
    pretty_exceptions_enable=False,
)

Data = Annotated[Path, typer.Option("--data", envvar="FEATCACHE_DATA", help="The challenge tree.")]
Work = Annotated[Path, typer.Option("--work", envvar="FEATCACHE_WORK", help="Where stores and results go.")]
Ceiling = Annotated[
    Path | None,
    typer.Option(
        "--noise-ceiling",
        envvar="FEATCACHE_NOISE_CEILING",
        help="Folder of subjXX/{lh,rh}.npy, percent or fraction. Default: noise_ceiling in the tree, if there.",
    ),
]
Subjects = Annotated[str, typer.Option("--subject", help="all, or numbers such as 1,3.")]
Name = Annotated[
    str | None,
    typer.Option("--backbone", envvar="FEATCACHE_BACKBONE", help=f"Any model name of timm. [{BackboneConfig.name}]"),
]
Weights = Annotated[
    str | None,
    typer.Option(
        "--weights", envvar="FEATCACHE_WEIGHTS", help=f"hub, packaged, none or a file. [{BackboneConfig.weights}]"
    ),
]
Size = Annotated[
    int | None,
    typer.Option("--size", envvar="FEATCACHE_SIZE", help="Pixels on a side. [what the weights were trained at]"),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
AsJson = Annotated[bool, typer.Option("--json", help="Make the last line of stdout a JSON object.")]


def _either(name: str) -> str:
    """A default of the gradient loop, and that of spatial heads where it is another."""
    usual, spatial = (getattr(adamw_of(head), name) for head in ("linear", "spatial"))
    return f"{usual}" if usual == spatial else f"{usual}; spatial {spatial}"


DATA, WORK = Path("data/challenge"), Path("work")


@app.command()
def simulate(
    data: Data = DATA,
    full: Annotated[
        bool, typer.Option("--full", help="The real challenge's counts: 73,000 images, 39,548 vertices.")
    ] = False,
    subjects: Annotated[int, typer.Option(help="Number of subjects.")] = 8,
    images: Annotated[int, typer.Option(help="Training images of a subject.")] = 200,
    test_images: Annotated[int, typer.Option(help="Test images of a subject.")] = 40,
    shared: Annotated[int, typer.Option(help="Training images that all subjects saw.")] = 50,
    vertices: Annotated[int, typer.Option(help="Vertices of both hemispheres together.")] = 989,
    size: Annotated[int, typer.Option(help="Pixels on a side of an image.")] = 128,
    seed: Annotated[int, typer.Option(help="The same seed gives the same bytes.")] = 0,
    workers: Annotated[int | None, typer.Option(help="Processes. Default: one a core.")] = None,
    as_json: AsJson = False,
) -> Job:
    """Write a challenge tree whose ground truth is known."""
    from featcache.progress import steps
    from featcache.simulate import SimulateConfig
    from featcache.simulate import simulate as run

    left = round(vertices * 19_004 / 39_548)
    config = (
        SimulateConfig.full(seed=seed, workers=workers)
        if full
        else SimulateConfig(
            n_subjects=subjects,
            n_train=images,
            n_test=test_images,
            n_shared=shared,
            n_vertices=(left, vertices - left),
            image_size=size,
            seed=seed,
            workers=workers,
        )
    )

    def call() -> Outcome:
        with steps("simulate", "steps") as update:
            run(config, data, update)
        return Outcome(f"wrote {data}", {"data": str(data)})

    return Job(config, call, as_json, is_done=data.is_dir)


@app.command()
def check(
    data: Data = DATA,
    noise_ceiling: Ceiling = None,
    workers: Annotated[int, typer.Option(help="Threads that decode images.")] = ExtractConfig().workers,
    as_json: AsJson = False,
) -> Job:
    """List everything that is wrong with a challenge tree."""

    def call() -> Outcome:
        from featcache.challenge import deep_faults, scan_tree
        from featcache.progress import bar, say

        challenge, faults = scan_tree(_existing(data), noise_ceiling)
        total = sum(len(subject.image_paths) for subject in challenge.subjects)
        with bar("check", total, "images") as advance:
            faults += deep_faults(challenge, workers, advance)
        for note in challenge.notes:
            say(note)
        for fault in faults:
            typer.echo(str(fault))
        result = {"data": str(data), "faults": [str(fault) for fault in faults], "notes": challenge.notes}
        found = f"{data}: {len(challenge.subjects)} subjects, {total} images, {len(faults)} faults"
        return Outcome(found, result, code=1 if faults else 0)

    return Job(None, call, as_json)


def _training_command(stage: str) -> Callable[..., Job]:
    """The command of one stage of training. Its options are the fields of TrainConfig, so that each stands once."""

    def command(
        *,
        data: Data = DATA,
        work: Work = WORK,
        noise_ceiling: Ceiling = None,
        subject: Subjects = "all",
        backbone: Name = None,
        weights: Weights = None,
        size: Size = None,
        init: Annotated[
            str, typer.Option(help="stage1, hub, packaged, none, a weights file, or a checkpoint's folder.")
        ] = "stage1",
        fold: Annotated[str, typer.Option(help="The fold held out, or all: each in turn.")] = "all",
        folds: Annotated[int, typer.Option(help="Folds of the training images, by image id.")] = StageConfig.n_folds,
        fold_seed: Annotated[int, typer.Option(help="Of the folds.")] = StageConfig.fold_seed,
        recipe: Annotated[str, typer.Option(help=f"Settings to start from: {', '.join(RECIPES)}.")] = "fast",
        save_every: Annotated[
            int, typer.Option(help="Steps between states to go on from, besides epochs; 0: none.")
        ] = StageConfig.save_every,
        image_cache: Annotated[
            float, typer.Option(help="GB that decoded images may take on the disk.")
        ] = StageConfig.image_cache,
        workers: Annotated[int, typer.Option(help="Threads that decode images.")] = StageConfig("pretrain").workers,
        device: Device = StageConfig.device,
        as_json: AsJson = False,
        **given: Any,
    ) -> Job:
        if not fold.isdecimal() and fold != "all":
            raise ConfigError(f"--fold: expected all or a number from 0 to {folds - 1}; found {fold!r}; correct it")
        config = StageConfig(
            stage,
            replace(settings_of(recipe, stage), **{name: value for name, value in given.items() if value is not None}),
            _backbone(backbone, weights, size or (PAPER_SIZE if recipe == "paper" else None)),
            init,
            any_backbone=backbone is None,
            fold=None if fold == "all" else int(fold),
            n_folds=folds,
            fold_seed=fold_seed,
            device=device,
            save_every=save_every,
            image_cache=image_cache,
            workers=workers,
        )

        def call() -> Outcome:
            challenge = _open(data, noise_ceiling)
            chosen = challenge.select(subject)
            from heads.end_to_end import train_stage

            done = train_stage(chosen, config, work)
            new = sum(one.new for one in done)
            checkpoints = [
                {
                    "path": str(one.checkpoint.path),
                    "score": one.checkpoint.facts["score"],
                    "seconds": round(one.seconds, 1),
                }
                for one in done
            ]
            found = f"{len(done)} checkpoints, {new} of them new, in {work / 'checkpoints'}"
            return Outcome(found, {"checkpoints": checkpoints})

        return Job(config, call, as_json)

    signature = inspect.signature(command)
    options = [p for p in signature.parameters.values() if p.kind is p.KEYWORD_ONLY]
    options = [p for p in options if stage == "finetune" or p.name != "init"]
    for setting in fields(TrainConfig):
        kind: Any = Annotated[cast(type, setting.type) | None, typer.Option(help=setting.metadata["help"])]
        options.append(inspect.Parameter(setting.name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = signature.replace(parameters=options)  # type: ignore[attr-defined]
    command.__annotations__ = {option.name: option.annotation for option in options}
    return command


app.command("pretrain", help="Train a backbone on all subjects at once: stage 1.")(_training_command("pretrain"))
app.command("finetune", help="Train a backbone on each subject alone: stage 2.")(_training_command("finetune"))


@app.command()
def soup(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[
        str, typer.Option(help="Of the checkpoints whose folders or trainings match, such as '*-0a1b*,3c4d*'.")
    ] = SoupConfig.models,
    stage: Annotated[str, typer.Option(help=f"{', '.join(STAGES)}.")] = SoupConfig.stage,
    as_json: AsJson = False,
) -> Job:
    """Average the weights of checkpoints that share a start: one more checkpoint of each family and fold."""
    config = SoupConfig(stage, models)

    def call() -> Outcome:
        challenge = _open(data, noise_ceiling)
        from heads.report import print_table, soup_table, soups_as_json
        from heads.soup import make_soups

        done = make_soups(challenge.select(subject), config, work)
        print_table(soup_table(done))
        new, below = sum(one.new for one in done), sum(one.score < one.best for one in done)
        message = f"{len(done)} soups, {new} of them new, {below} below their best member, in {work / 'checkpoints'}"
        return Outcome(message, {"soups": soups_as_json(done)})

    return Job(config, call, as_json)


@app.command()
def layers(
    backbone: Annotated[str, typer.Argument(help="Any model name of timm.")],
    size: Size = None,
    as_json: AsJson = False,
) -> Job:
    """List the layers of a backbone that can be cached, with their maps."""

    def call() -> Outcome:
        from featcache.backbone import described_layers
        from heads.report import layer_table, print_table

        maps = described_layers(BackboneConfig(backbone, size=size))
        print_table(layer_table(maps))
        rows = [{"layer": name, "channels": c, "height": h, "width": w} for name, (c, h, w) in maps.items()]
        return Outcome(f"{backbone}: {len(maps)} layers, and pooled", {"layers": rows})

    return Job(None, call, as_json)


@app.command()
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
        _backbone(backbone, weights, size),
        LayerConfig(tuple(layers.replace(" ", "").split(",")), grid, pool),
        dtype,
        batch_size,
        workers,
        device,
        checkpoint,
        any_backbone=backbone is None,
    )

    def call() -> Outcome:
        challenge = _open(data, noise_ceiling)
        chosen = challenge.select(subject)
        from featcache.extract import FOLDER
        from featcache.extract import extract as run

        done = run(chosen, config, work)
        new = sum(one.n_new for one in done)
        stores = [
            {"subject": one.subject, "path": str(one.path), "images": one.n_images, "new": one.n_new} for one in done
        ]
        return Outcome(f"{len(done)} stores, {new} new images in {work / FOLDER}", {"stores": stores})

    return Job(config, call, as_json)


@app.command("fit-heads")
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
    target: Annotated[
        str, typer.Option(help="responses. blend: what the last blend predicts, to have it in one set of heads.")
    ] = FitConfig.target,
    products: Annotated[str, typer.Option(help=f"How CUDA multiplies: {', '.join(PRODUCTS)}.")] = FitConfig.products,
    max_memory: Annotated[
        float, typer.Option(help="10^9 bytes that the process may take; 0: what is free.")
    ] = FitConfig.max_memory,
    device: Device = FitConfig.device,
    as_json: AsJson = False,
) -> Job:
    """Fit heads to every cached feature store, out of fold."""
    given: dict[str, Any] = {
        "epochs": epochs,
        "learning_rate": learning_rate,
        "weight_decay": weight_decay,
        "batch_size": batch_size,
    }
    moments = MomentsConfig(
        MomentsConfig.steps if epochs is None else epochs,
        MomentsConfig.learning_rate if learning_rate is None else learning_rate,
    )
    adamw = replace(adamw_of(head), **{name: value for name, value in given.items() if value is not None})
    config = FitConfig(
        loss,
        head,
        layers,
        solver,
        folds,
        seed,
        device,
        products,
        max_memory,
        target,
        moments=moments,
        adamw=adamw,
        spatial=SpatialConfig(rank, space, token_dropout, smoothness, sparsity),
    )
    refuse_unread(_on_command_line(context), config)

    def call() -> Outcome:
        challenge = _open(data, noise_ceiling)
        chosen = challenge.select(subject)
        from featcache.progress import say
        from heads.fit import fit_heads as run
        from heads.fit import folder_of, scores_by_model
        from heads.report import as_json as scores_as_json
        from heads.report import print_table, score_table

        if exact := [one for one in split_losses(loss) if replace(config, loss=one).resolved_solver == "exact"]:
            say(
                f"{', '.join(exact)}: closed form{', one model' if len(exact) > 1 else ''}; "
                "linear heads have the same optimum under mse, pearson and mnnpc"
            )
        if config.target == "blend":
            from heads.distil import taught

            chosen = taught(chosen, work)
        done = run(chosen, config, work)
        scores = scores_by_model(chosen, done)
        what = "out-of-fold" if config.target == "responses" else "agreement with the blend, out-of-fold"
        print_table(score_table(scores, what))
        stores = [
            {"subject": f.subject, "model": f.model, "path": str(f.path), "weights": str(f.weights)} for f in done
        ]
        new = sum(fitted.new for fitted in done)
        result: dict[str, Any] = {"stores": stores, "scores": scores_as_json(scores)}
        if config.target == "blend":
            from heads.distil import agreement

            result["agreement"] = agreement(chosen, done, work)
            for model, r in result["agreement"].items():
                typer.echo(f"agreement with the blend on test images: mean r {r:.4f}, {model}")
        return Outcome(f"{len(done)} fits, {new} of them new, in {folder_of(config, work)}", result)

    return Job(config, call, as_json)


@app.command()
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
        challenge = _open(data, noise_ceiling)
        chosen = challenge.select(subject)
        from heads.maps import FOLDER, export_maps

        written, recovered = export_maps(chosen, models, work)
        for found in recovered:
            typer.echo("planted and found: " + ", ".join(f"{name} r = {value:.2f}" for name, value in found.items()))
        result = {"files": [str(path) for path in written], "recovery": recovered}
        return Outcome(f"{len(written)} files in {work / FOLDER}", result)

    return Job(None, call, as_json)


Models = Annotated[
    str, typer.Option("--models", help="Those whose names match, such as 'convnext*'; several: with commas.")
]
Exclude = Annotated[str, typer.Option("--exclude", help="But for those whose names match.")]


@app.command()
def models(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    chosen: Models = BlendConfig.models,
    exclude: Exclude = BlendConfig.exclude,
    as_json: AsJson = False,
) -> Job:
    """List what there is to blend: each model, its score fold by fold, and how alike models are."""

    def call() -> Outcome:
        challenge = _open(data, noise_ceiling)
        from heads.model_list import list_models
        from heads.report import model_table, print_table

        found, accuracy = list_models(challenge.select(subject), work, chosen, exclude)
        print_table(model_table(found, accuracy))
        return Outcome(f"{len(found)} models in {work}", {"models": [vars(one) for one in found]})

    return Job(None, call, as_json)


@app.command()
def blend(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    recipe: Annotated[
        str, typer.Option(help=f"What the next options start from: {', '.join(BLEND_RECIPES)}.")
    ] = BLEND_RECIPES[0],
    method: Annotated[str | None, typer.Option(help=f"{', '.join(BLENDS)}. [{BlendConfig.method}]")] = None,
    per: Annotated[
        str | None, typer.Option(help=f"What has weights of its own: {', '.join(LEVELS)}. [{BlendConfig.per}]")
    ] = None,
    chosen: Models = BlendConfig.models,
    exclude: Exclude = BlendConfig.exclude,
    apply: Annotated[
        Path | None, typer.Option(help="Learn nothing: put these predictions through a blend that was saved.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of bags, bootstrap and permutations.")] = BlendConfig.seed,
    as_json: AsJson = False,
) -> Job:
    """Blend every model, score the blend, and write the submission."""
    given = {"method": method, "per": per}
    config = replace(
        blend_recipe(recipe),
        **{name: value for name, value in given.items() if value is not None},
        models=chosen,
        exclude=exclude,
        seed=seed,
    )

    def call() -> Outcome:
        challenge = _open(data, noise_ceiling)
        from heads import ensemble
        from heads.report import blend_as_json, gain_lines, print_table, score_table

        if apply is not None:
            return _handed_in(ensemble.apply(challenge, apply, work), work, {})
        done = ensemble.blend(challenge, config, work)
        print_table(score_table(done.scores, f"out-of-fold, blend weights ({config.label}) learnt on other folds"))
        for line in gain_lines(done):
            typer.echo(line)
        return _handed_in(done.submission, work, blend_as_json(done))

    return Job(config, call, as_json)


def _handed_in(submission: Path | None, work: Path, result: dict[str, Any]) -> Outcome:
    folder = work / "submission"
    files = {"submission": str(submission) if submission else None, "predictions": str(folder)}
    return Outcome(f"wrote {submission or folder}", files | result)


@app.command("run")
def run_recipe(
    context: typer.Context,
    recipe: Annotated[Path, typer.Argument(help="A file of commands in order, such as recipes/demo.toml.")],
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    device: Device = ExtractConfig.device,
    plan: Annotated[
        bool, typer.Option("--plan", help="Say what each step is expected to take, and run nothing.")
    ] = False,
    as_json: AsJson = False,
) -> Job:
    """Run every step of a recipe, or go on where it stopped. Options given here go to every step."""
    given = {
        name.replace("_", "-"): context.params[name]
        for name in _on_command_line(context)
        if name in ("data", "work", "noise_ceiling", "subject", "device")
    }
    steps = [ready(app, step) for step in read_recipe(recipe, commands_of(app), given)]
    from featcache.progress import say
    from heads.plan import estimates_of, subjects_of

    subjects = subjects_of(steps)

    def show() -> Outcome:
        from heads.report import plan_as_json, plan_table, print_table

        estimates = estimates_of(steps, subjects)
        print_table(plan_table(estimates))
        return Outcome(f"{recipe}: {len(steps)} steps planned, none run", plan_as_json(estimates))

    def call() -> Outcome:
        results, code = run_steps(steps, say)
        return Outcome(f"{recipe}: {len(results)} of {len(steps)} steps", {"steps": results}, code)

    return Job(None, show if plan else call, as_json)


def _on_command_line(context: typer.Context) -> list[str]:
    """The options that were given there, and not by the environment or by default."""
    sources = {name: context.get_parameter_source(name) for name in context.params}
    return [name for name, source in sources.items() if source and source.name == "COMMANDLINE"]


def _backbone(name: str | None, weights: str | None, size: int | None) -> BackboneConfig:
    return BackboneConfig(name or BackboneConfig.name, weights or BackboneConfig.weights, size)


def _existing(data: Path) -> Path:
    if not data.is_dir():
        raise ConfigError(
            f"--data: expected a challenge tree; found no folder {data}; get the data of the Algonauts 2023 challenge "
            "(algonauts.csail.mit.edu/2023), or write a stand-in with 'simulate'"
        )
    return data


def _open(data: Path, noise_ceiling: Path | None) -> Any:
    from featcache.challenge import open_challenge
    from featcache.progress import say

    challenge = open_challenge(_existing(data), noise_ceiling)
    for note in challenge.notes:
        say(note)
    return challenge


def _do(job: Job) -> int:
    """The exit code of a command that is done, and the one line that it ends with, from one of its processes."""
    began = time.perf_counter()
    outcome = job.call()
    if os.environ.get("RANK", "0") == "0":
        seconds = round(time.perf_counter() - began, 2)
        typer.echo(f"{outcome.message} ({seconds:.1f} s)")
        if job.as_json:
            typer.echo(json.dumps(outcome.result | {"seconds": seconds}, allow_nan=False))
    return outcome.code


def _fail(message: str, code: int = 1) -> int:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    return code


def _interrupted() -> int:
    return _fail("interrupted; what was committed is kept, and the same command goes on from there", 130)


def run(arguments: Sequence[str] | None = None) -> int:
    """The exit code of one command; a user's mistake is one line on stderr and code 1."""
    try:
        given = list(sys.argv[1:] if arguments is None else arguments) or ["--help"]
        asked = app(args=given, standalone_mode=False)
        code = _do(asked) if isinstance(asked, Job) else asked or 0
        return _interrupted() if code == 130 else code  # typer may turn the interruption into its exit code
    except FeatcacheError as error:
        return _fail(str(error))
    except UsageError as error:
        return _fail(f"{getattr(error, 'format_message', error.__str__)()}; --help lists the options")
    except (KeyboardInterrupt, typer.Abort):
        return _interrupted()
    except MemoryError as error:
        return _fail(f"expected enough memory; found none left ({error}); fit fewer subjects or vertices at a time")
    except RuntimeError as error:
        if "memory" not in str(error):  # torch has no class of its own for it on a CPU
            raise
        first = str(error).splitlines()[0]
        return _fail(
            f"expected enough memory; found: {first}; lower --batch-size, or choose one --subject or --device cpu"
        )
    except OSError as error:
        where = error.filename or "a file"
        return _fail(
            f"{where}: expected to read and write there; found: {error.strerror or error}; "
            "make room or choose another --work; what was committed is intact"
        )


def main() -> None:
    code = run()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code) if code == 130 else sys.exit(code)  # threads that still decode must not hold up an interruption


if __name__ == "__main__":
    main()
