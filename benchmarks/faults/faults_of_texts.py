"""Faults of recipes, files of splits, and options that name subjects."""

import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from good_files import KINDS, Case, Good, special, written

TEXTS: dict[tuple[str, str], Case] = {}
Plant = Callable[[Path], object]
_STEP = '[[steps]]\nrun = "extract"\nbackbone = "test_resnet"\nweights = "none"\nsize = 48\n'


def add(kind: str, name: str, line: Sequence[str], plant: Plant, words: str | None) -> None:
    """Add a case of one command line, in which HERE is a folder of its own."""

    def make(good: Good, here: Path) -> list[list[str]]:
        shutil.copytree(good.work, here / "work")
        plant(here)
        where = ("--data", str(good.tree), "--work", str(here / "work"))
        return [[*(one.replace("HERE", str(here)) for one in line), *where, "--quiet"]]

    TEXTS[kind, name] = Case(make, words is not None, tuple((words or "").split()))


def recipe(name: str, content: str | bytes, words: str | None) -> None:
    add("recipes", name, ("run", "HERE/r.toml", "--plan"), lambda here: written(here / "r.toml", content), words)


def lists(n: int, *options: str) -> str:
    values = ", ".join(map(str, range(1, n + 1)))
    return '[[steps]]\nrun = "fit-heads"\nloss = "smooth_l1"\n' + "".join(
        f"{option} = [{values}]\n" for option in options
    )


recipe("good", _STEP, None)
recipe("lists", lists(3, "epochs", "fold-seed"), None)
for what, content, words in (
    ("empty", "", "r.toml [[steps]]"),
    ("text", "no recipe", "r.toml TOML"),
    ("bytes", b"\xff\xfe\x00", "r.toml TOML"),
    ("a NUL", _STEP + "\0", "r.toml TOML"),
    ("cut off", _STEP[:-5], "r.toml"),
    ("a key twice", _STEP + "size = 96\n", "r.toml TOML"),
    ("an unknown part", "x = 1\n" + _STEP, "r.toml 'x'"),
    ("steps as a table", '[steps]\nrun = "extract"\n', "r.toml [[steps]]"),
    ("steps as numbers", "steps = [1, 2]", "r.toml [[steps]]"),
    ("no step", "steps = []", "r.toml [[steps]]"),
    ("a step without a command", "[[steps]]\nsize = 48\n", "r.toml, step 1 run"),
    ("a command that is a number", "[[steps]]\nrun = 3\n", "r.toml, step 1 run"),
    ("an unknown command", '[[steps]]\nrun = "extrat"\n', "r.toml, step 1 extract?"),
    ("a recipe in a recipe", '[[steps]]\nrun = "run"\n', "r.toml, step 1 'run'"),
    ("an unknown option", _STEP + "sise = 3\n", "r.toml, step 1 size?"),
    ("an option of the command line", _STEP + "json = true\n", "r.toml, step 1 'json'"),
    ("text for a number", _STEP.replace("48", '"x"'), "step 1 --size"),
    ("a number for text", _STEP.replace('"none"', "true"), "step 1 --weights"),
    ("a table for a value", _STEP.replace("48", "{a = 1}"), "step 1 --size"),
    ("a date for a value", _STEP.replace("48", "1979-05-27"), "step 1 --size"),
    ("a list in a list", _STEP.replace("48", "[[48]]"), "step 1 --size"),
    ("an empty list", _STEP.replace("48", "[]"), "step 1 size []"),
    ("a number of 5,000 digits", _STEP.replace("48", "9" * 5000), "r.toml"),
    ("a number of 10^5 hexadecimal digits", _STEP.replace("48", "0x" + "f" * 100_000), "r.toml"),
    ("infinity", _STEP.replace("48", "inf"), "step 1 --size"),
    ("a size below 0", _STEP.replace("48", "-48"), "size"),
    ("NaN for a rate", '[[steps]]\nrun = "fit-heads"\nloss = "smooth_l1"\nlearning-rate = nan\n', "learning-rate"),
    ("options as a list", "options = [1]\n" + _STEP, "r.toml [options]"),
    ("a list among options", "[options]\nsize = [1, 2]\n" + _STEP, "r.toml, [options] list"),
    ("an unknown one of options", "[options]\nsise = 1\n" + _STEP, "r.toml, [options] 'sise'"),
    ("a title that is a number", "title = 3\n" + _STEP, "r.toml title"),
    ("50,000 levels of lists", "title = " + "[" * 50_000 + "]" * 50_000, "r.toml TOML"),
    ("50,000 levels of tables", "a." * 50_000 + "a = 1", "r.toml TOML 100"),
    ("8 million steps", lists(200, "epochs", "batch-size", "folds"), "r.toml, step 1 10,000 8,000,000"),
    ("10^12 steps", lists(1000, "epochs", "batch-size", "folds", "fold-seed"), "r.toml, step 1 10,000"),
    ("10,001 steps", '[[steps]]\nrun = "fit-heads"\n' * 10_001, "r.toml 10,001"),
    ("2 MB", "# " + "x" * 2_000_000 + "\n" + _STEP, "r.toml 1,000,000"),
    ("a subject that is not there", _STEP + "subject = 9\n", "step 1 --subject 'subj09'"),
    ("a network that is not there", _STEP.replace("test_resnet", "test_rsnet"), "step 1 test_rsnet"),
    ("a folder outside", _STEP + 'data = "/nowhere"\n', "--data"),
):
    recipe(what, content, words if what != "a folder outside" else None)
for kind in KINDS:
    add(
        "recipes",
        kind,
        ("run", "HERE/r.toml", "--plan"),
        lambda here, kind=kind: special(here / "r.toml", kind),
        "r.toml",
    )
add("recipes", "missing", ("run", "HERE/r.toml", "--plan"), lambda here: None, "r.toml no such file")


def split(name: str, content: str | bytes, words: str | None, file: str = "s.json") -> None:
    add(
        "splits", name, ("fit-heads", "--split", f"file:HERE/{file}"), lambda here: written(here / file, content), words
    )


for what, content, words in (
    ("empty", "", "s.json"),
    ("text", "x", "s.json JSON"),
    ("bytes", b"\xff\xfe", "s.json"),
    ("a number", "3", "s.json"),
    ("null", "null", "s.json"),
    ("no images", "{}", "s.json"),
    ("a table in a table", '{"a": {"b": {}}}', "s.json"),
    ("other images", '{"a": [1, 2]}', "s.json none"),
    ("numbers that are none", '{"a": [NaN, Infinity]}', "s.json none"),
    ("50,000 levels", "[" * 50_000 + "]" * 50_000, "s.json"),
    ("an open 50,000 levels", '{"a":' * 50_000, "s.json"),
    ("5,000 digits", f'{{"{"9" * 5000}": "a"}}', "s.json none"),
    ("a number of 5,000 digits", f'{{"a": [{"9" * 5000}]}}', "s.json"),
    ("digits of another script", '{"\u0661": "a"}', "s.json none"),
):
    split(what, content, words)
for what, content, words in (
    ("CSV, empty", "", "s.csv header"),
    ("CSV, another header", "a,b\n1,2\n", "s.csv header"),
    ("CSV, no rows", "id,fold\n", "s.csv"),
    ("CSV, other images", "id,fold\n1,2\n", "s.csv none"),
    ("CSV, a cell of 10 MB", "id,fold\n" + "9" * 10_000_000 + ",1\n", "s.csv"),
    ("CSV, a NUL", "id,fold\n1\0,2\n", "s.csv"),
):
    split(what, content, words, "s.csv")
for kind in KINDS:
    line = ("fit-heads", "--split", "file:HERE/s.json")
    add("splits", kind, line, lambda here, kind=kind: special(here / "s.json", kind), "s.json")

for value in ("9", "subj9", "\u00b2", "\u0661", "9" * 5000, "1,", ",", "", "all,1", "../subj01", "-1", "1.0"):
    add("options", f"--subject {value[:9]!r}", ("fit-heads", "--subject", value), lambda here: None, "--subject")
for value in ("1", "subj02", "1,2", "1,1"):
    add("options", f"--subject {value!r}", ("fit-heads", "--subject", value), lambda here: None, None)
