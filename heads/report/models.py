"""The table of the models that there are to blend."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from heads.report.named import NamedTable
from heads.report.scores import CHOSEN_ON

if TYPE_CHECKING:  # a table must not load what blends
    from heads.blend.overview import ModelScores


def model_table(models: "Sequence[ModelScores]", accuracy: bool) -> NamedTable:
    """Table of models, best first and numbered: their scores on all images and on each fold, and the most similar one.

    accuracy : whether scores are noise-normalised accuracy in percent, and not mean r
    """
    measure = "noise-normalised accuracy, %" if accuracy else "no noise ceiling: mean r"
    numbers = {model.name: str(number) for number, model in enumerate(models, 1)}
    digits, marked = 1 if accuracy else 2, any(model.chosen_on for model in models)
    cells = []
    for model in models:
        closest = model.closest()
        cells.append(
            [
                f"{model.score:.{digits + 1}f}{'*' if model.chosen_on else ' ' if marked else ''}",
                " ".join(f"{score:.{digits}f}" for score in model.folds),
                f"{numbers[closest[0]]} ({closest[1]:.2f})" if closest else "-",
            ]
        )
    return NamedTable(
        f"Out-of-fold scores; {measure}",
        ("score", "by fold", "most like"),
        list(numbers),
        cells,
        notes=_notes(models, accuracy),
    )


def _notes(models: "Sequence[ModelScores]", accuracy: bool) -> list[str]:
    """How to read the table."""
    notes = []
    if len(models) > 1:
        notes.append(
            "Best first, by these scores: the highest of many is a little too high. 'blend' chooses its best single "
            "model on other images than it scores it on, so the score there may be lower."
        )
    if accuracy:
        notes.append("With few images r^2 is too large: scores of all folds may be above the score of all images.")
    return notes + ([CHOSEN_ON] if any(model.chosen_on for model in models) else [])
