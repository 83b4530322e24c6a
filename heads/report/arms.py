"""The table of arms: what each training is worth, and by how much it is better than another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from heads.report.scores import CHOSEN_ON

if TYPE_CHECKING:  # a table must not load what compares
    from heads.blend.trainings import Arm


def arm_table(arms: "Sequence[Arm]") -> Table:
    """Table of arms: mean r of each subject and over all, seeds, and the difference from the reference."""
    subjects = sorted({subject for arm in arms for subject in arm.subjects})
    accuracy = any(arm.accuracy is not None for arm in arms)
    table = Table(title="Out-of-fold mean r over vertices, mean over seeds", title_justify="left")
    numbers = {arm.name: str(number) for number, arm in enumerate(arms, 1)}
    table.add_column("")
    table.add_column("arm", overflow="fold")
    for subject in subjects:
        table.add_column(subject.removeprefix("subj"), justify="right", no_wrap=True)
    for column in ("mean r", *(["accuracy, %"] if accuracy else []), "seeds", "difference, 95 % interval", "from"):
        table.add_column(column, justify="right")
    table.add_column("pairs", justify="right")
    for arm in arms:
        means = [f"{arm.subjects[name]:.3f}" if name in arm.subjects else "-" for name in subjects]
        percent = ["-" if arm.accuracy is None else f"{arm.accuracy:.2f}"] if accuracy else []
        mark, reference = "*" if arm.chosen_on else "", numbers.get(arm.reference or "", "")
        scores = [*means, f"{arm.mean_r():.4f}{mark}", *percent, _seeds(arm)]
        table.add_row(numbers[arm.name], arm.name, *scores, _difference(arm), reference, _pairs(arm))
    table.caption = Text("\n".join(_notes(arms)))
    table.caption_justify = "left"
    return table


def _seeds(arm: "Arm") -> str:
    return str(len(arm.seeds)) if arm.seeds else "-"


def _difference(arm: "Arm") -> str:
    if (gap := arm.difference) is None:
        return "-" if arm.reference else "reference"
    if gap.low is None or gap.high is None:
        return f"{gap.mean:+.4f}"
    return f"{gap.mean:+.4f}, {gap.low:+.4f} to {gap.high:+.4f}"


def _pairs(arm: "Arm") -> str:
    return "" if arm.difference is None else str(arm.difference.n_pairs)


def _notes(arms: "Sequence[Arm]") -> list[str]:
    """How to read the table."""
    notes = []
    if any(arm.reference for arm in arms):
        notes.append("A difference is within subject and seed, over the images that both arms predict.")
    if partial := dict.fromkeys(arm.held_out for arm in arms if arm.held_out is not None):
        folds = " and ".join(",".join(map(str, held_out)) for held_out in partial)
        notes.append(f"Arms with fold {folds} alone have their mean r over other images than arms with all folds.")
    return notes + ([CHOSEN_ON] if any(arm.chosen_on for arm in arms) else [])
