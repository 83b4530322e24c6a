"""The table of units: every one of a few, and of many those that are not done."""

import io
from dataclasses import replace

from rich.console import Console

from heads.report.units import counted_states, unit_table
from heads.units.listing import Listed

NEEDS = {"memory": 2.5e9, "disk": None, "device": None}
ONE = Listed(3, "fit-heads", "subj01 pc", "0123456789ab", ("subj01",), NEEDS, ("a",), "done", "host 7", 1.5)


def shown(listed):
    console = Console(width=200, record=True, file=io.StringIO())
    console.print(unit_table(listed))
    return console.export_text()


def test_a_unit_is_a_row_with_what_it_needs():
    text = shown([ONE, replace(ONE, unit="subj02 pc", state="failed", note="no memory")])
    row = next(line for line in text.splitlines() if "subj01 pc" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == [
        "3",
        "fit-heads",
        "subj01 pc",
        "done, host 7",
        "2.5 GB",
        "-",
    ]
    assert "failed, no memory" in text


def test_of_very_many_those_that_are_not_done_are_shown():
    done = [replace(ONE, unit=f"done {n}") for n in range(300)]
    left = [replace(ONE, unit=f"left {n}", state="open", note="") for n in range(3)]
    text = shown([*done, *left])
    assert "left 2" in text and "done 0" not in text
    assert "300 more, which --json has" in text


def test_states_are_counted():
    assert counted_states([ONE, ONE, replace(ONE, state="open")]) == "2 done, 1 open"
