"""The table of arms: what each training is worth, and by how much it is better than another."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from heads.report.scores import CHOSEN_ON

if TYPE_CHECKING:  # a table must not load what compares
    from heads.blend.compare import Arm


def arm_table(arms: "Sequence[Arm]") -> Table:
    """Table of arms: mean r of each subject and over all, seeds, and the difference from the reference."""
    subjects = sorted({subject for arm in arms for subject in arm.subjects})
    accuracy = any(arm.accuracy is not None for arm in arms)
    table = Table(title="Out-of-fold mean r over vertices, mean over seeds", title_justify="left")
    table.add_column("arm", overflow="fold")
    for subject in subjects:
        table.add_column(subject.removeprefix("subj"), justify="right", no_wrap=True)
    for column in ("mean r", *(["accuracy, %"] if accuracy else []), "seeds", "difference, 95 % interval", "pairs"):
        table.add_column(column, justify="right")
    for arm in arms:
        means = [f"{arm.subjects[name]:.3f}" if name in arm.subjects else "-" for name in subjects]
        percent = ["-" if arm.accuracy is None else f"{arm.accuracy:.2f}"] if accuracy else []
        mark = "*" if arm.chosen_on else ""
        table.add_row(arm.name, *means, f"{arm.mean_r():.4f}{mark}", *percent, _seeds(arm), *_difference(arm))
    table.caption = Text("\n".join(_notes(arms)))
    table.caption_justify = "left"
    return table


def _seeds(arm: "Arm") -> str:
    return str(len(arm.seeds)) if arm.seeds else "-"


def _difference(arm: "Arm") -> tuple[str, str]:
    if (gap := arm.difference) is None:
        return "-" if arm.reference else "reference", ""
    if gap.low is None or gap.high is None:
        return f"{gap.mean:+.4f}", str(gap.n_pairs)
    return f"{gap.mean:+.4f}, {gap.low:+.4f} to {gap.high:+.4f}", str(gap.n_pairs)


def _notes(arms: "Sequence[Arm]") -> list[str]:
    """How to read the table."""
    references = dict.fromkeys(arm.reference for arm in arms if arm.reference)
    notes = (
        [f"Differences are from {' or '.join(map(repr, references))}, within subject and seed."] if references else []
    )
    if partial := dict.fromkeys(arm.held_out for arm in arms if arm.held_out is not None):
        folds = " and ".join(",".join(map(str, held_out)) for held_out in partial)
        notes.append(f"Some arms have fold {folds} alone; arms of other folds are not compared with them.")
    return notes + ([CHOSEN_ON] if any(arm.chosen_on for arm in arms) else [])
