"""Whatever `layers` accepts, `extract` takes: one network of every family of timm, at sizes that fit none of them.

    PYTHONPATH=. nice python benchmarks/faults/networks.py [--n 20] [--seed 0] [--sizes 64,100,112,224]

A family is a file of timm and a class in it; its smallest network stands for it. Weights are random. `layers` is asked
for the list of layers; `extract --layers all` then reads the images of a tiny simulated tree, and its store must have
the arrays of that list, on the same places. Prints a line for whatever is not so, then the counts:

- same: the list is what the store has; refused: both say in one line why not
- broken: a traceback; one of the two refuses what the other takes; or the store has other layers than the list

Leaves with exit code 1 where anything is broken.
"""

import argparse
import gc
import json
import random
import sys
import tempfile
import warnings
from collections import Counter
from pathlib import Path

import timm
import torch

from featcache.backbone.network import described_layers
from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import CLASS_TOKEN, POOLED, BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.open import open_dataset
from featcache.dataset.subject import Subject
from featcache.errors import FeatcacheError
from featcache.simulate import SimulateConfig, simulate

SIZES = (64, 100, 112, 224)
TREE = SimulateConfig(
    n_subjects=1, n_train=2, n_test=2, n_shared=0, n_vertices=(40, 40), image_size=32, n_reference=50, workers=1
)
BROKEN = ("traceback in layers", "traceback in extract", "layers alone", "extract alone", "other layers")


def families(most: float = 150.0) -> dict[str, str]:
    """{family: its smallest network}, of at most so many million parameters if it has one of those."""
    smallest: dict[str, tuple[float, str]] = {}
    for name in timm.list_models():
        with warnings.catch_warnings(), torch.device("meta"):
            warnings.simplefilter("ignore")
            model = timm.create_model(name)
        family = f"{timm.models.model_entrypoint(name).__module__.rpartition('.')[2]}:{type(model).__name__}"
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        smallest[family] = min(smallest.get(family, (size, name)), (size, name))
    return {family: name for family, (size, name) in sorted(smallest.items()) if size <= most}


def outcome(name: str, size: int, subject: Subject, folder: Path) -> tuple[str, str]:
    """What became of a network at a size, and what there is to say about it."""
    config = BackboneConfig(name=name, weights="none", size=size)
    try:
        listed = described_layers(config)
        refused = ""
    except FeatcacheError as error:
        listed, refused = {}, str(error)
    except Exception as error:  # what a user would see as a traceback
        return "traceback in layers", f"{type(error).__name__}: {error}"
    reading = ExtractConfig(
        backbone=config, layers=LayerConfig(layers=("all",), grid="native"), batch_size=2, workers=1, device="cpu"
    )
    try:
        (done,) = extract([subject], reading, folder)
        rows = {layer: array.shape[1:] for layer, array in open_store(done.path).arrays.items()}
    except FeatcacheError as error:
        if "\n" in str(error) or "\n" in refused:
            return "traceback in extract", f"a refusal of several lines: {error}"
        return ("refused", str(error)) if refused else ("layers alone", str(error))
    except Exception as error:
        return "traceback in extract", f"{type(error).__name__}: {error}"
    if refused:
        return "extract alone", refused
    maps = {layer: tuple(shape) for layer, shape in rows.items() if layer != POOLED and not layer.endswith(CLASS_TOKEN)}
    expected = {layer: (height, width, channels) for layer, (channels, height, width) in listed.items()}
    return ("same", "") if list(maps.items()) == list(expected.items()) else ("other layers", f"{maps}, not {expected}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--n", type=int, default=0, help="families, drawn at random; 0: all")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--sizes", default=",".join(map(str, SIZES)))
    parser.add_argument("--networks", default="", help="names with commas between them, in place of the families")
    options = parser.parse_args()
    names = options.networks.split(",") if options.networks else list(families().values())
    if options.n and not options.networks:
        names = sorted(random.Random(options.seed).sample(names, min(options.n, len(names))))
    counts: Counter[str] = Counter()
    with tempfile.TemporaryDirectory() as folder:
        simulate(TREE, Path(folder) / "challenge")
        (subject,) = open_dataset(Path(folder) / "challenge").subjects
        for name in names:
            for size in map(int, options.sizes.split(",")):
                with tempfile.TemporaryDirectory(dir=folder) as work:
                    what, why = outcome(name, size, subject, Path(work))
                counts[what] += 1
                if what != "same":
                    print(f"{what}: {name} at {size} px: {why}", flush=True)
            gc.collect()
    broken = sum(counts[what] for what in BROKEN)
    print(json.dumps({"networks": len(names), "tried": counts.total(), **counts, "broken": broken}))
    sys.exit(1 if broken else 0)


if __name__ == "__main__":
    main()
