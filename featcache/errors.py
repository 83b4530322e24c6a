"""Mistakes that the user can put right.

Every one says where it is, what was expected, what was found, and what to do next, in fields. `str(error)` is the one
line that `cli.run` prints on stderr before it leaves with exit code 1; nothing else catches these.
"""

from collections.abc import Sequence
from typing import Self

_MOST_LETTERS = 4_000  # of one field of a message


class FeatcacheError(Exception):
    """Base of every error that the user, and not the program, can put right.

    Parameters
    ----------
    where : file, option or thing that is wrong; '' where the message needs none
    expected, found : what was wanted there, and what is there instead
    remedy : what the user can do about it
    """

    def __init__(self, where: object = "", *, expected: object, found: object, remedy: str) -> None:
        self.where, self.expected, self.found, self.remedy = str(where), str(expected), str(found), remedy
        super().__init__(self.where, self.expected, self.found, self.remedy)

    def __str__(self) -> str:
        where, expected, found, remedy = map(_in_a_line, (self.where, self.expected, self.found, self.remedy))
        place = f"{where}: " if where else ""
        return f"{place}expected {expected}; found {found}; {remedy}"

    def inside(self, place: str) -> Self:
        """The same mistake, with the larger place that it is in (such as a step of a key) before `where`."""
        where = f"{place}: {self.where}" if self.where else place
        return type(self)(where, expected=self.expected, found=self.found, remedy=self.remedy)

    def __reduce__(self) -> tuple[object, ...]:  # keyword-only arguments, which pickle cannot pass by itself
        return _rebuilt, (type(self), self.where, self.expected, self.found, self.remedy)


def _rebuilt(kind: type[FeatcacheError], where: str, expected: str, found: str, remedy: str) -> FeatcacheError:
    return kind(where, expected=expected, found=found, remedy=remedy)


def _in_a_line(text: str) -> str:
    """A text of which files may have given parts: without ends of lines or what moves a cursor, and not endless."""
    if len(text) > _MOST_LETTERS:
        text = f"{text[: _MOST_LETTERS - 100]} ... {text[-80:]}"
    if text.isprintable():
        return text
    return "".join(one if one.isprintable() else one.encode("unicode_escape").decode() for one in text)


class ConfigError(FeatcacheError):
    """An option or a combination of options that cannot work."""


class ArgumentError(ConfigError, ValueError):
    """An argument of an estimator that cannot work; also a ValueError, which scikit-learn expects."""


class DataError(FeatcacheError):
    """A dataset that breaks its published layout."""


class BackboneError(FeatcacheError):
    """A backbone, or its weights, that cannot be loaded."""


class StoreError(FeatcacheError):
    """A store that is missing, incomplete, damaged, or of another format."""


class BusyError(StoreError):
    """A folder that another process writes to; it is not wrong, and will be free."""


class LeakError(FeatcacheError):
    """One image on both sides of a split."""


class CheckpointError(FeatcacheError):
    """A checkpoint that is missing, damaged, diverged, or of another architecture or dataset."""


def first_line(error: BaseException) -> str:
    """First line of what another library says of an error, 200 characters at most."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]


def some_of(names: Sequence[str], most: int = 6) -> str:
    """Names as one line of text has room for them: all of a few, the first of many and how many there are."""
    if len(names) <= most:
        return ", ".join(map(repr, names))
    return f"{len(names)}, such as {', '.join(map(repr, names[:3]))}"
