"""Names of models side by side: words that all of them have are said once, and what is left tells them apart."""

import re
from collections.abc import Sequence

_NUMBER = re.compile(r"-?[\d.,]+(e-?\d+)?|True|False|None")
_DIGITS = re.compile(r"[0-9a-f]{6}")  # at the end of a name, which say that a model is another


def split_names(names: Sequence[str]) -> tuple[str, list[str]]:
    """The words that every name has, in one string, and each name without them.

    A number that differs keeps the words beside it, which say what it is of: '5 layers', 'seed 1'. One name alone, and
    names of which nothing would be left, stay as they are.
    """
    words = [name.split(" ") for name in names]
    every = {word for word in words[0] if all(of.count(word) == 1 for of in words)} if len(set(names)) > 1 else set()
    shared = every - {beside for of in words for beside in _beside_numbers(of, every)}
    rests = [" ".join(word for word in of if word not in shared) for of in words]
    if not all(rests):
        return "", list(names)
    return " ".join(word for word in words[0] if word in shared), rests


def _beside_numbers(words: Sequence[str], every: set[str]) -> list[str]:
    """The words before and after each number that not every name has."""
    last = len(words) - 1
    numbers = [
        place
        for place, word in enumerate(words)
        if word not in every and _NUMBER.fullmatch(word) and not (place == last and _DIGITS.fullmatch(word))
    ]
    return [words[place] for number in numbers for place in (number - 1, number + 1) if 0 <= place <= last]


def without_digits(names: Sequence[str]) -> list[str]:
    """Names without the six digits at their end, if they are still different names."""
    bare = [name.rpartition(" ")[0] if _DIGITS.fullmatch(name.rpartition(" ")[2]) else name for name in names]
    return bare if all(bare) and len(set(bare)) == len(set(names)) else list(names)
