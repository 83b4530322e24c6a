"""fit-heads and maps: cached features -> heads and predictions."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from featcache.machine.progress import counted
from featcache.workdir import WORK, Workdir
from heads.commands.options import (
    DATA,
    Ceiling,
    Data,
    Subjects,
    Work,
    command,
    given,
    in_parts,
    on_command_line,
    open_data,
    option_of,
    read,
    settled,
)
from heads.config import (
    HEADS,
    SOLVERS,
    AdamWConfig,
    BlendConfig,
    CoreConfig,
    FitConfig,
    SpatialConfig,
    adamw_of,
    refuse_unread,
)
from heads.recipes.jobs import Job, Outcome

if TYPE_CHECKING:
    from featcache.dataset.splits import Split
    from featcache.dataset.subject import Subject

_OLD_SOLVERS = {"exact": "ridge"}  # {name in earlier versions: name}
_LOOPS = {head: vars(adamw_of(head)) for head in HEADS}


@command(
    FitConfig,
    AdamWConfig,
    SpatialConfig,
    CoreConfig,
    old={"seed": "seed"},
    presets={AdamWConfig: _LOOPS},
    has_parts=True,
)
def fit_heads(
    context: typer.Context,
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    **options: Any,
) -> Job:
    """Fit heads, from cached features to responses, and predict every image with heads that were not fitted to it."""
    solver = _OLD_SOLVERS.get(options["solver"], options["solver"])
    config = read(
        FitConfig,
        options | {"solver": solver},
        adamw=replace(adamw_of(options["head"]), **given(AdamWConfig, options)),
        spatial=read(SpatialConfig, options),
        core=read(CoreConfig, options),
    )
    refuse_unread(on_command_line(context), config)

    def parts(*given: Any) -> Sequence[Any]:
        from heads.fit.run import fit_parts

        return fit_parts(*given)

    return in_parts(config, lambda: settled(data, noise_ceiling, work, subject, config.split), _fit, parts, work)


def _fit(subjects: Sequence["Subject"], config: FitConfig, work: Path, by: "Split") -> Outcome:
    from featcache.machine.progress import say
    from heads.fit.run import chosen_on, scores_by_model, test_scores_by_model
    from heads.fit.run import fit_heads as run
    from heads.report.printing import print_table
    from heads.report.scores import score_table, scores_as_json

    for solver, losses in config.shared_losses.items():
        say(
            f"{', '.join(losses)}: --solver {solver}{', one model' if len(losses) > 1 else ''}; "
            f"its heads are the same under {', '.join(SOLVERS[solver].losses)}"
        )
    done = run(subjects, config, work, by)
    scores = scores_by_model(subjects, done)
    marked = chosen_on(done, work)
    print_table(score_table(scores, "Out-of-fold scores", marked))
    if test_scores := test_scores_by_model(subjects, done):
        print_table(score_table(test_scores, "Scores on test images"))
    stores = [
        {"subject": fit.subject, "model": fit.model, "path": str(fit.path), "weights": str(fit.weights)} for fit in done
    ]
    result: dict[str, Any] = {"stores": stores, "scores": scores_as_json(scores), "chosen_on": marked}
    if test_scores:
        result["test_scores"] = scores_as_json(test_scores)
    if by.alone and (alone := scores_by_model(subjects, done, by.images(by.alone))):
        print_table(score_table(alone, f"Scores on the images that {by.alone} holds out", marked))
        result["held_out"] = {"name": by.alone, "scores": scores_as_json(alone)}
    n_new = sum(fit.new for fit in done)
    return Outcome(f"{counted(len(done), 'fit')}, {n_new} of them new, in {Workdir(work).predictions}", result)


@command()
def maps(
    data: Data = DATA,
    work: Work = WORK,
    noise_ceiling: Ceiling = None,
    subject: Subjects = "all",
    models: Annotated[str, option_of(BlendConfig, "models")] = BlendConfig.models,
) -> Job:
    """Write where in the image and in which layers the heads look: for each vertex, for each ROI, and as plots."""

    def call() -> Outcome:
        subjects = open_data(data, noise_ceiling, work).select(subject)
        from heads.maps.export import export_maps

        written = export_maps(subjects, models, work)
        message = f"{counted(len(written), 'file')} in {Workdir(work).maps}"
        return Outcome(message, {"files": [str(path) for path in written]})

    return Job(None, call)
