"""Files import only from those before them, and what answers `--help` imports nothing heavy."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ORDER = [
    "featcache",
    "featcache.errors",
    "featcache.config",
    "featcache.device",
    "featcache.ahead",
    "featcache.progress",
    "featcache.images",
    "featcache.roi",
    "featcache.challenge",
    "featcache.contents",
    "featcache.simulate",
    "featcache.splits",
    "featcache.taps",
    "featcache.backbone",
    "featcache.folding",
    "featcache.chunks",
    "featcache.store",
    "featcache.pixels",
    "featcache.checkpoint",
    "featcache.extract",
    "heads",
    "heads.config.losses",
    "heads.config.checks",
    "heads.config.fitting",
    "heads.config.blending",
    "heads.config.training",
    "heads.config",
    "heads.recipes",
    "heads.losses",
    "heads.metrics",
    "heads.ridge",
    "heads.modules",
    "heads.spatial",
    "heads.training",
    "heads.batches",
    "heads.encoder",
    "heads.encoder_training",
    "heads.end_to_end",
    "heads.soup",
    "heads.layers",
    "heads.features",
    "heads.folds",
    "heads.predictions",
    "heads.memory",
    "heads.fold_axes",
    "heads.ridge_folds",
    "heads.moments",
    "heads.priors",
    "heads.kernels",
    "heads.bases",
    "heads.dual",
    "heads.spatial_folds",
    "heads.solvers",
    "heads.fit",
    "heads.members",
    "heads.maps",
    "heads.nnls",
    "heads.blend_moments",
    "heads.weights",
    "heads.blend",
    "heads.honesty",
    "heads.model_list",
    "heads.saved_blend",
    "heads.weight_plot",
    "heads.submission",
    "heads.ensemble",
    "heads.distil",
    "heads.timings",
    "heads.plan",
    "heads.report",
    "heads.commands",
    "heads.commands.options",
    "heads.commands.trees",
    "heads.commands.training",
    "heads.commands.features",
    "heads.commands.fitting",
    "heads.commands.blending",
    "heads.commands.running",
    "cli",
]


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return "featcache.simulate" if parts[:2] == ("featcache", "simulate") else ".".join(parts).removesuffix(".__init__")


SOURCES = sorted([*ROOT.glob("featcache/**/*.py"), *ROOT.glob("heads/**/*.py"), ROOT / "cli.py"])


def imported(path: Path) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
    return {"featcache.simulate" if name.startswith("featcache.simulate") else name for name in names} & set(ORDER)


def test_every_file_has_a_place():
    assert {module_of(path) for path in SOURCES} == set(ORDER)


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_files_import_only_what_comes_before_them(path):
    own = module_of(path)
    late = [name for name in imported(path) if name != own and ORDER.index(name) > ORDER.index(own)]
    assert late == [] or own == "heads"  # `heads` hands out its estimator when first asked for it


def test_help_loads_nothing_heavy():
    script = "import sys, cli; cli.run(['--help']); print([m for m in sys.argv[1:] if m in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", script, "torch", "zarr", "timm", "scipy", "numpy"],
        capture_output=True,
        text=True,
        cwd=ROOT,
        check=True,
    )
    assert done.stdout.splitlines()[-1] == "[]"
