"""A progress bar has room for its numbers, and one bar may be over several stages."""

import io
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


@pytest.mark.parametrize("room", [12, 13, 24, 41])
def test_a_text_is_cut_in_its_middle_to_the_room_there_is(room):
    cut = progress.shortened(LONG, room)
    first, last = cut.split("…")
    assert len(cut) == room and LONG.startswith(first) and LONG.endswith(last) and len(last) > len(first) > 2
    assert progress.shortened("subj01", 6) == "subj01"


class Screen(io.StringIO):
    """A file that says that it is a terminal."""

    def isatty(self):
        return True


def shown(monkeypatch, terminal):
    """What two stages under one bar leave on stderr, and what was shown meanwhile."""
    screen, seen = (Screen if terminal else io.StringIO)(), []
    console = Console(file=screen, width=80, force_terminal=terminal)
    monkeypatch.setattr(progress, "_stderr", console)
    with progress.overall("all steps", 2) as done:
        for stage in ("first", "second"):
            progress.say(f"step {stage}")
            with progress.bar(f"{stage} bar", 10, "images") as advance:
                advance(10)
                with progress.bar("inside", 3, "members"):
                    seen.append([task.description for task in progress._display[0].tasks] if terminal else [])
            done()
            seen.append([task.completed for task in progress._display[0].tasks] if terminal else [])
    assert progress._display == []
    return screen.getvalue(), seen


def test_bars_of_stages_are_lines_below_one_bar_over_all_of_them(monkeypatch):
    text, seen = shown(monkeypatch, terminal=True)
    assert seen == [["all steps", "first bar", "inside"], [1], ["all steps", "second bar", "inside"], [2]]
    assert "step first" in text and "2/2" in text


def test_in_a_file_each_stage_is_a_plain_line_and_there_is_no_bar_over_all(monkeypatch):
    text, _ = shown(monkeypatch, terminal=False)
    lines = [line.split(" ")[0] for line in text.splitlines() if line.strip()]
    assert lines == ["step", "inside", "first", "step", "inside", "second"] and "all steps" not in text
    assert "\x1b" not in text


def test_results_stay_on_stdout_where_that_is_a_file(monkeypatch, capfd):
    monkeypatch.setattr(progress, "_stderr", Console(stderr=True, width=80, force_terminal=True))
    with progress.overall("all steps", 1):
        print("a result")
    out, err = capfd.readouterr()
    assert out == "a result\n" and "a result" not in err


def test_a_stage_that_fails_leaves_no_display(monkeypatch):
    monkeypatch.setattr(progress, "_stderr", Console(file=Screen(), width=80, force_terminal=True))
    with pytest.raises(ValueError, match="broken"), progress.overall("all steps", 1), progress.bar("b", 1, "u"):
        raise ValueError("broken")
    assert progress._display == []
