"""Some of the bad trees, imports, splits and recipes of benchmarks/faults/trees.py, each ends in one right line."""

import runpy
import sys
from pathlib import Path

import pytest

FAULTS = Path(__file__).resolve().parents[1] / "benchmarks" / "faults"
SOME = [
    "images: XMP as ASCII",
    "images: pipe",
    "names of images: a number of 11 digits",
    "subjects: digits of another script",
    "responses: NaN",
    "responses: a hemisphere without vertices",
    "masks: names of a trap",
    "ceilings: ncsnr",
    "tables: an id of 5,000 digits",
    "arrays: device for responses.npy",
    "names of subjects: '../x'",
    "subject.json: 40,000 levels",
    "images.csv: an id twice",
    "recipes: 8 million steps",
    "recipes: good",
    "splits: pipe",
    "options: --subject '²'",
]


@pytest.fixture(scope="module")
def bench():
    """Names of what the script defines."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(FAULTS))
        yield runpy.run_path(str(FAULTS / "trees.py"))
    for name in ("good_files", "faults_of_trees", "faults_of_imports", "faults_of_texts"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def good(bench, tmp_path_factory):
    return bench["build"](tmp_path_factory.mktemp("trees") / "good", lambda line: bench["_run"](line, 300))


def test_there_are_more_than_150_kinds_with_names_of_their_own(bench):
    assert len(bench["cases"]()) > 150


@pytest.mark.slow
@pytest.mark.parametrize("name", SOME)
def test_a_fault_ends_in_one_right_line_or_is_handled(bench, good, tmp_path, name):
    for verdict, said in bench["judge"](bench["cases"]()[name], good, tmp_path):
        assert verdict not in bench["BROKEN"], said


@pytest.mark.slow
def test_what_would_break_a_promise_is_noticed(bench, good, tmp_path):
    """A good tree that should have been refused is silence, and another word than the line has is another word."""
    case = bench["Case"]
    line = ["check", "--quiet", "--data", str(good.tree), "--work", str(tmp_path / "work")]
    assert bench["judge"](case(lambda *_: [line], True), good, tmp_path)[0][0] == "silence"
    wrong = [*line[:3], str(tmp_path / "nowhere"), *line[4:]]
    assert bench["judge"](case(lambda *_: [wrong], True, ("giraffe",)), good, tmp_path)[0][0] == "other words"
    assert bench["judge"](case(lambda *_: [wrong], False), good, tmp_path)[0][0] == "good file refused"
