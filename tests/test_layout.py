"""Every source file has a test file of its name, in the folder that mirrors its own."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
# {source file: why it has no test file of its own}
EXCEPTIONS = {"featcache/dataset/importing/material.py": "dataclasses without code, which the importer's tests fill"}


def defines(path: Path) -> bool:
    """Whether a file has a function or a class; one without has nothing to test."""
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) for node in ast.parse(path.read_text(encoding="utf-8")).body)


SOURCES = sorted(
    path.relative_to(ROOT).as_posix()
    for package in ("featcache", "heads")
    for path in (ROOT / package).rglob("*.py")
    if path.name != "__init__.py" and defines(path)
)


@pytest.mark.slow
@pytest.mark.parametrize("source", SOURCES)
def test_every_source_file_has_its_own_test_file(source):
    path = Path(source)
    expected = ROOT / "tests" / path.relative_to(path.parts[0]).with_name(f"test_{path.stem.strip('_')}.py")
    assert expected.is_file() != (source in EXCEPTIONS), expected.relative_to(ROOT).as_posix()


def test_exceptions_are_of_files_that_there_are():
    assert EXCEPTIONS.keys() <= set(SOURCES) and len(SOURCES) > 50
