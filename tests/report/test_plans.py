"""A plan as a table and as JSON: memory of the largest step, disk of all."""

import io
import json
from pathlib import Path

from rich.console import Console

from heads.recipes.plan import Estimate
from heads.recipes.steps import Step
from heads.report.plans import plan_as_json, plan_table

ESTIMATES = [
    Estimate(Step(Path("r"), 1, "extract", own={"size": 48}), 5e9, 1e9),
    Estimate(Step(Path("r"), 2, "check")),
    Estimate(Step(Path("r"), 3, "fit-heads"), 7e9, 2.5e6),
]


def test_disk_adds_up_and_memory_does_not():
    found = plan_as_json(ESTIMATES)
    assert found["total"] == {"memory": 7e9, "disk": 1.0025e9}
    assert found["plan"][0] == {"step": 1, "command": "extract", "options": {"size": 48}, "memory": 5e9, "disk": 1e9}
    assert found["plan"][1]["memory"] is None and json.dumps(found)


def test_the_table_has_a_row_for_each_step_and_one_for_all():
    out = io.StringIO()
    Console(file=out, width=120).print(plan_table(ESTIMATES))
    rows = [
        [cell.strip() for cell in line.strip("│").split("│")] for line in out.getvalue().splitlines() if "│" in line
    ]
    assert rows == [
        ["1", "extract size=48", "5.0 GB", "1.0 GB"],
        ["2", "check", "-", "-"],
        ["3", "fit-heads", "7.0 GB", "2.5 MB"],
        ["", "all", "7.0 GB", "1.0 GB"],
    ]


def test_a_device_has_a_column_of_its_own_where_there_is_one():
    found = plan_as_json([*ESTIMATES, Estimate(Step(Path("r"), 4, "finetune"), 1e9, 2e9, 18.1e9)])
    assert found["total"]["device"] == 18.1e9
    assert [step["device"] for step in found["plan"]] == [None, None, None, 18.1e9]
