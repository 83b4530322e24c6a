"""The table of the models that there are to blend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table

from heads.report.scores import CHOSEN_ON

if TYPE_CHECKING:  # a table must not load what blends
    from heads.blend.overview import ModelScores


def model_table(models: "Sequence[ModelScores]", accuracy: bool) -> Table:
    """Table of models, best first and numbered: their scores on all images and on each fold, and the most similar one.

    accuracy : whether scores are noise-normalised accuracy in percent, and not mean r
    """
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r"
    table = Table(title=f"Out-of-fold scores; {measure}", title_justify="left", caption_justify="left")
    notes = ["Best first, by these scores: the highest of many is a little too high."] if len(models) > 1 else []
    if accuracy:
        notes.append("With few images r^2 is too large: scores of all folds may be above the score of all images.")
    notes += [CHOSEN_ON] if any(model.chosen_on for model in models) else []
    table.caption = "\n".join(notes)
    numbers = {model.name: str(number) for number, model in enumerate(models, 1)}
    table.add_column("")
    table.add_column("model", overflow="fold")
    for column in ("score", "by fold", "most like"):
        table.add_column(column, justify="right", no_wrap=True)
    digits, marked = 1 if accuracy else 2, any(model.chosen_on for model in models)
    for model in models:
        closest = model.closest()
        table.add_row(
            numbers[model.name],
            model.name,
            f"{model.score:.{digits + 1}f}{'*' if model.chosen_on else ' ' if marked else ''}",
            " ".join(f"{score:.{digits}f}" for score in model.folds),
            f"{numbers[closest[0]]} ({closest[1]:.2f})" if closest else "-",
            end_section=True,
        )
    return table
