"""The way through the phases of a recipe, whoever does the units."""

import pytest

from featcache.errors import DataError
from heads.config import EngineConfig
from heads.units.course import Course, in_one_line
from heads.units.worker import Worker
from support.steps import parted, whole

HERE = EngineConfig(engine="here")
TWO = {"a": ("subj01",), "b": ("subj02",)}


@pytest.fixture
def work(tmp_path):
    folder = tmp_path / "work"
    folder.mkdir()
    return folder


def test_whoever_only_looks_sees_every_phase_come_and_go(work):
    """One course does the units, and one of another process looks on; both end with the same records."""
    steps = [parted(work, 1, "extract", TWO), parted(work, 2, "fit-heads", TWO), whole(work, 3, "blend")]
    doing, seen = Course(steps, work, HERE), []
    worker = Worker(doing, work)

    def look_on(look):
        seen.append((look.phase.command, [unit.name for unit in look.open]))
        return worker.turn(look)

    looking = Course(steps, work, HERE)
    ended = looking.follow(look_on)
    assert [command for command, _ in seen] == ["extract"] * 4 + ["fit-heads"] * 4 + ["blend"]
    assert seen[1] == ("extract", ["a", "b"]) and seen[2] == ("extract", ["b"])
    assert ended.records == doing.follow(lambda look: pytest.fail(f"{look.open} is open")).records


def test_results_are_those_of_the_steps(work):
    steps = [parted(work, 1, "extract", TWO), parted(work, 1, "extract", {"c": ("subj01",)}), whole(work, 2, "blend")]
    course = Course(steps, work, HERE)
    ended = course.follow(Worker(course, work).turn)
    first, second = ended.results(steps)
    assert (first["step"], first["command"], first["counts"]) == (1, "extract", {"a": 1, "b": 1, "c": 1})
    assert second["file"] == str(work / "blend.txt")


def test_subjects_that_lack_something_are_those_of_units_that_were_given_up(work):
    def act(name):
        if name in "ac":
            raise DataError(name, expected="x", found="y", remedy="z")

    course = Course([parted(work, 1, "extract", {**TWO, "c": ("subj03", "subj04")}, act)], work, HERE)
    assert course.follow(Worker(course, work).turn).subjects == {"subj01", "subj03", "subj04"}


def test_a_unit_whose_workers_are_all_lost_is_given_up_and_says_so(work):
    steps = [parted(work, 1, "extract", TWO)]
    course = Course(steps, work, HERE)
    seen = []

    def lose(look):
        unit = look.open[0]
        if unit.name != "a":
            return Worker(course, work).turn(look)
        number = look.state(unit).taken + 1
        (work / "units" / f"{unit.id}.{number}.lease").write_bytes(b"")
        seen.append(number)
        return True

    ended = course.follow(lose)
    ((unit, failure),) = ended.failed.values()
    assert unit.name == "a" and failure.error.startswith("10 workers were lost at it")
    assert len(seen) == 11


def test_an_error_is_kept_in_a_line():
    assert in_one_line(DataError("a", expected="b", found="c", remedy="d")) == "a: expected b; found c; d"
    assert in_one_line(RuntimeError("first\nsecond")) == "RuntimeError: first"
