"""A progress bar has room for its numbers."""

import time

import pytest
from rich.console import Console

from featcache.machine import progress

LONG = "subj01 tf_efficientnet_lite0@224 6 layers 7x7 bfloat16 linear ridge 5fc524"


@pytest.mark.parametrize(
    ("name", "width", "whole"),
    [(LONG, 80, False), (LONG, 200, True), ("subj01", 80, True)],
    ids=["long name", "wide terminal", "short name"],
)
def test_a_name_leaves_room_for_counts_and_rate(name, width, whole, monkeypatch, capsys):
    monkeypatch.setattr(progress, "_stderr", Console(stderr=True, width=width, force_terminal=False))
    with progress.bar(name, 4000, "vertices") as advance:
        advance(1000)
        time.sleep(0.01)
        advance(3000)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("subj01") and "4000/4000" in line and "vertices/s" in line
    assert (name in line) is whole
