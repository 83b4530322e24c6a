"""Tables of models with long names are readable on 80 columns: nothing is cut, and scores stand in columns."""

import io

import pytest
from rich.console import Console

from heads.report.named import NamedTable

SHARED = "pretrain 5 layers 7x7 linear"
NAMES = [f"tf_efficientnet_lite{n % 3}@224 {SHARED} ridge {n:06x}" for n in range(29)]
NAMES.append(f"tf_efficientnet_lite0@224 {SHARED} smooth_l1 1a2b3c")


def shown(n_columns, width, names=NAMES, **about):
    columns = [f"{column:02d}" for column in range(n_columns)]
    cells = [[f"{row}.{column:02d}" for column in range(n_columns)] for row in range(len(names))]
    out = io.StringIO()
    Console(file=out, width=width).print(NamedTable("title", columns, names, cells, **about))
    return [line.rstrip() for line in out.getvalue().splitlines()]


@pytest.mark.parametrize("n_columns", [9, 21])
def test_every_name_and_score_is_there_on_80_columns_and_scores_stand_in_columns(n_columns):
    lines = shown(n_columns, 80, notes=["a note"])
    assert max(map(len, lines)) <= 80 and lines[-2:] == [f"all models: {SHARED}", "a note"]
    places = [number for number, line in enumerate(lines) if "tf_efficientnet" in line]
    n_lines = places[1] - places[0]
    ends = [[at for at, letter in enumerate(line) if line[at : at + 1].isdigit() and line[at + 1 : at + 2] in " "]
            for line in lines[1:n_lines]]  # fmt: skip
    for row, place in enumerate(places):
        assert lines[place] == f"{row + 1:>2} {NAMES[row].replace(SHARED + ' ', '')}"
        scores = lines[place + 1 : place + n_lines]
        assert " ".join(scores).split() == [f"{row}.{column:02d}" for column in range(n_columns)]
        for line, of_line in zip(scores, ends, strict=True):
            assert [
                at for at, letter in enumerate(line) if letter.isdigit() and line[at + 1 : at + 2] in " "
            ] == of_line


def test_few_scores_are_beside_short_names_and_all_are_beside_whole_names_where_there_is_room():
    beside = [line for line in shown(2, 80) if line.startswith("│")]
    assert len(beside) == 30 and "│ tf_efficientnet_lite0@224 ridge 000000     │  0.00 │  0.01 │" in beside[0]
    whole = shown(21, 1000)
    assert not any(line.startswith("all models") for line in whole)
    assert all(any(name in line and f"{row}.20" in line for line in whole) for row, name in enumerate(NAMES))


def test_marks_are_behind_names_however_these_are_shown():
    marks = ["", " *"]
    for width in (30, 70, 200):
        lines = shown(3, width, NAMES[:2], marks=marks)
        assert any("000001 *" in line for line in lines) and not any("000000 *" in line for line in lines)


def test_a_name_that_is_longer_than_the_terminal_is_folded_and_not_cut():
    (name,) = names = ["word" * 30]
    assert name in "".join(line.strip() for line in shown(1, 40, names)[2:]).removeprefix("1 ")
