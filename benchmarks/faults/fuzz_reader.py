"""One reader, its valid files, and the ways in which these are changed."""

import random
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import fuzz_mutations as m

_SPECIAL = 0.02  # of all inputs are no file at all


@dataclass
class Reader:
    """A reader, the folder of its valid files, and those that are changed, each by which mutations.

    read : takes the file that was changed
    """

    name: str
    root: Path
    files: Mapping[str, Sequence[m.Mutation]]
    read: Callable[[Path], object]
    _whole: dict[str, bytes] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._whole = {name: (self.root / name).read_bytes() for name in self.files}
        for name in self.files:  # valid ones are read, or refusals would say nothing
            self.read(self.root / name)

    @contextmanager
    def changed(self, rng: random.Random) -> Iterator[Path]:
        """One of the files, changed; all of them are whole again afterwards."""
        name = rng.choice(list(self.files))
        path, content = self.root / name, self._whole[name]
        if rng.random() < _SPECIAL:
            m.replace_by_special(path, rng)
        elif rng.random() > 0.01:  # a few stay as they are
            path.write_bytes(rng.choice(self.files[name])(content, rng))
        try:
            yield path
        finally:
            for name, content in self._whole.items():
                other = self.root / name
                if other.is_symlink() or not other.is_file():
                    _remove(other)
                    other.write_bytes(content)
                elif other == path or other.stat().st_size != len(content) or other.read_bytes() != content:
                    other.write_bytes(content)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def place_of(folder: Path, name: str) -> Path:
    root = folder / name.replace(" ", "-")
    root.mkdir(parents=True, exist_ok=True)
    return root


def of_npz(content: bytes, rng: random.Random) -> bytes:
    """An .npz file, and the .npy files in it."""
    return m.of_zip(content, rng, m.of_npy)
