"""`verify` against reading the same files and nothing more: from the disk, and from the page cache.

PYTHONPATH=. python benchmarks/verifying.py [--quick]
"""

import os
import tempfile
from pathlib import Path

from measure import Figure, options, paired, report
from planted import Sizes, write_subject

from featcache.config import usual_workers
from heads.verify.findings import verify

_BLOCK = 1 << 22


def files_of(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def forget(folder: Path) -> None:
    """Have the system drop the files from the page cache, so that the disk is read."""
    for path in files_of(folder):
        with path.open("rb") as file:
            os.fsync(file)
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def read(folder: Path) -> None:
    for path in files_of(folder):
        with path.open("rb", buffering=0) as file:
            while file.read(_BLOCK):
                pass


def main() -> None:
    sizes = options(__doc__, images=(9841, 120), vertices=(39548, 400), rounds=(5, 2))
    workers, figures = usual_workers(), []
    with tempfile.TemporaryDirectory() as folder:
        work = Path(folder) / "work"
        planted = Sizes(images=sizes.images, test_images=159, vertices=sizes.vertices, channels={"a": 128, "b": 512})
        write_subject(work, "subj01", planted)
        findings = verify(work, workers)
        assert not [one for one in findings if one.fault]
        n_bytes = sum(one.n_bytes for one in findings)

        def checked():
            verify(work, workers)

        def plain():
            read(work)

        def checked_from_disk():
            forget(work)
            verify(work, workers)

        def plain_from_disk():
            forget(work)
            read(work)

        for source, ours, theirs in (
            ("the disk", checked_from_disk, plain_from_disk),
            ("the page cache", checked, plain),
        ):
            took, reading, ratio = paired(ours, theirs, sizes.rounds)
            details = {"bytes": n_bytes, "files": len(findings), "seconds": took, "read_seconds": reading}
            target = 1.5 if source == "the disk" else None
            what = f"verify of {n_bytes / 1e9:.1f} GB from {source}, {workers} threads"
            figures.append(Figure(what, "reading the files", ratio, target, details=details))
    report(figures)


if __name__ == "__main__":
    main()
