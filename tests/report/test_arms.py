"""The table of arms: subjects, seeds, and the difference from the reference with its interval."""

import io

from rich.console import Console

from heads.blend.trainings import Arm, Value
from heads.report.arms import arm_table
from heads.scores.intervals import Interval


def arm(training, r, **about):
    values = tuple(Value(f"subj0{subject}", seed, r + 0.1 * subject, None) for subject in (1, 2) for seed in (0, 1))
    return Arm(training, "refitted", ("m",), values, **about)


def shown(arms):
    out = io.StringIO()
    Console(file=out, width=200).print(arm_table(arms))
    return out.getvalue()


def test_a_row_has_means_seeds_and_its_difference():
    arms = [arm("a", 0.1), arm("b", 0.2, reference="a, refitted", difference=Interval(0.1, 0.05, 0.15, 4))]
    rows = [[cell.strip() for cell in line.strip("│").split("│")] for line in shown(arms).splitlines() if "│" in line]
    assert rows == [
        ["1", "a, refitted", "0.200", "0.300", "0.2500", "2", "reference", "", ""],
        ["2", "b, refitted", "0.300", "0.400", "0.3500", "2", "+0.1000, +0.0500 to +0.1500", "1", "4"],
    ]


def test_scores_that_chose_an_epoch_are_marked():
    assert "0.2500*" in shown([arm("a", 0.1, chosen_on=True)]) and "* chosen on:" in shown(
        [arm("a", 0.1, chosen_on=True)]
    )
    assert "chosen on" not in shown([arm("a", 0.1)])
