"""What a person sees has room for the numbers."""

import time

import pytest
from rich.console import Console

import featcache.machine.progress


@pytest.mark.parametrize("width", [80, 200])
def test_a_long_name_leaves_room_for_counts_and_rate(width, monkeypatch, capsys):
    monkeypatch.setattr(featcache.machine.progress, "_stderr", Console(stderr=True, width=width, force_terminal=False))
    name = "subj01 tf_efficientnet_lite0@224 6 layers 7x7 bfloat16 linear ridge 5fc524"
    with featcache.machine.progress.bar(name, 4000, "vertices") as advance:
        advance(1000)
        time.sleep(0.01)
        advance(3000)
    (line,) = [line for line in capsys.readouterr().err.splitlines() if line.strip()]
    assert line.startswith("subj01") and "4000/4000" in line and "vertices/s" in line
    assert (name in line) is (width == 200)


def test_a_short_name_is_whole():
    assert featcache.machine.progress._short("subj01") == "subj01"
