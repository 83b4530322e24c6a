"""Every reader of the project, by name."""

from pathlib import Path

import fuzz_formats as formats
import fuzz_projects as projects
from fuzz_reader import Reader


def build(folder: Path, names: set[str]) -> list[Reader]:
    """All readers, or those of some names, each with a folder of its own."""
    readers = []
    for make in _MADE:
        if not names or names & _MADE[make]:
            readers += [reader for reader in make(folder) if not names or reader.name in names]
    return readers


_MADE = {
    formats.arrays: {"npy", "npz", "hdf5", "mat", "zarr", "safetensors", "numbers as text", "parquet"},
    formats.tables: {"table", "parquet table"},
    formats.volumes: {"nifti", "nifti.gz", "mgh", "gifti", "cifti"},
    formats.images: {"image files", "arrays of images"},
    projects.datasets: {"label names", "tree", "folder", "split file", "import", "nsd"},
    projects.networks: {"weights", "weights of timm", "state", "hub", "own code", "features elsewhere"},
    formats.texts: {"recipe", "journal"},
    projects.work: {
        "store",
        "index",
        "checkpoint",
        "blend",
        "heads",
        "statistics",
        "encoder folder",
        "lists of images",
    },
}
