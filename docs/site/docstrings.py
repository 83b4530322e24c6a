"""Docstrings of featcache as mkdocstrings reads them.

They say a parameter on one line, `name : meaning`, and leave its type to the annotation; numpydoc has the meaning on
the next line. Options of the command line have their meaning in the field itself.
"""

import dataclasses
import importlib
import re
from typing import Any

from griffe import Class, Extension, Function

_HEADING = re.compile(r"(Parameters|Attributes|Returns|Raises)[^\n]*\n-{3,}\n")
_MEANING = re.compile(r"^(\w+(?:, \w+)*) : ", re.MULTILINE)


class Meanings(Extension):
    """Puts meanings where numpydoc has them, and adds those of options."""

    def on_class(self, *, cls: Class, **_: Any) -> None:
        if cls.docstring:
            text = in_numpydoc(cls.docstring.value, "Attributes")
            cls.docstring.value = f"{text}\n\n{options_of(cls.canonical_path)}".strip()

    def on_function(self, *, func: Function, **_: Any) -> None:
        if func.docstring:
            func.docstring.value = in_numpydoc(func.docstring.value, "Parameters")


def in_numpydoc(text: str, section: str) -> str:
    """A docstring whose meanings stand below their names. section : heading of meanings that have none

    Sections come last: numpydoc takes what follows a section as a part of it.
    """
    paragraphs = [_paragraph(paragraph, section) for paragraph in text.split("\n\n")]
    return "\n\n".join(sorted(paragraphs, key=lambda one: bool(_HEADING.match(one))))


def _paragraph(text: str, section: str) -> str:
    if heading := _HEADING.match(text):
        return f"{_headed(heading[1])}{_below(text[heading.end() :])}"
    return f"{_headed(section)}{_below(text)}" if _MEANING.match(text) else text


def _headed(heading: str) -> str:
    return f"{heading}\n{'-' * len(heading)}\n"


def _below(text: str) -> str:
    return _MEANING.sub(lambda name: f"{name[1]}\n    ", text)


def options_of(path: str) -> str:
    """Section of the fields of a settings class that are options of the command line; '' for any other class."""
    module, _, name = path.rpartition(".")
    kind = getattr(importlib.import_module(module), name)
    fields = dataclasses.fields(kind) if dataclasses.is_dataclass(kind) else ()
    lines = [f"{one.name}\n    {one.metadata['help']}" for one in fields if "help" in one.metadata]
    return _headed("Attributes") + "\n".join(lines) if lines else ""
