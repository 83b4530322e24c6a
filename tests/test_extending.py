"""The examples of docs/extending.md run, and each touches one table alone."""

import json
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

import cli
from heads.config import HEADS, SOLVERS
from heads.config.losses import LOSS_SPECS
from heads.config.registry import load

PAGE = Path(__file__).resolve().parents[1] / "docs" / "extending.md"
BLOCKS = re.findall(r"```python\n(.*?)```", PAGE.read_text(), re.S)


@pytest.fixture
def extended(monkeypatch):
    """The new files as modules, and the new entries in their tables; all of it is gone afterwards."""
    for table in (LOSS_SPECS, HEADS, SOLVERS):
        for name in table:
            monkeypatch.setitem(table, name, table[name])  # so that the table is restored whole
    before = {id(table): list(table) for table in (LOSS_SPECS, HEADS, SOLVERS)}
    for block in BLOCKS:
        if file := re.match(r"# (heads/\S+)\.py\n", block):
            module = ModuleType(file[1].replace("/", "."))
            monkeypatch.setitem(sys.modules, module.__name__, module)
            exec(compile(block, f"{file[1]}.py", "exec"), module.__dict__)
        else:
            exec(compile(block, "docs/extending.md", "exec"), {})
    yield
    for table in (LOSS_SPECS, HEADS, SOLVERS):
        for name in [name for name in table if name not in before[id(table)]]:
            del table[name]
    load.cache_clear()


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--loss", "huber+0.5*pearson", "--epochs", "2"), "linear 0.5*pearson+huber"),
        (("--head", "mlp", "--loss", "mnnpc", "--epochs", "2"), "mlp mnnpc"),
        (("--solver", "random-search", "--loss", "mse,pearson"), "linear random-search"),
    ],
)
def test_a_new_loss_head_or_solver_is_one_file_and_one_entry(extended, filled, capfd, options, words):
    code = cli.run(["fit-heads", "--layers", "pooled", *options, "--json"])
    out, err = capfd.readouterr()
    assert code == 0, err
    result = json.loads(out.splitlines()[-1])
    assert all(f"pooled {words}" in model for model in result["scores"]) and len(result["stores"]) == 4
    assert cli.run(["blend", "--models", f"*{words.split()[-1]}*"]) == 0


def test_the_new_solver_refuses_what_memory_does_not_hold_as_every_solver_must(extended, filled, capfd):
    assert cli.run(["fit-heads", "--solver", "random-search", "--layers", "pooled", "--max-memory", "1e-6"]) == 1
    assert "--max-memory: expected " in capfd.readouterr().err


def test_without_the_entries_their_names_are_refused(filled, capfd):
    for option, name in (("--loss", "huber"), ("--head", "mlp"), ("--solver", "random-search")):
        assert cli.run(["fit-heads", option, name]) == 1
        assert f"{option}: expected " in capfd.readouterr().err
