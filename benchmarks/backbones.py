"""Both stages of training, extraction and heads with each of the paper's backbones at 384 px: what each takes.

    python benchmarks/backbones.py [convnext_base ...] [--size 384]

Weights are random and the challenge tree is a tiny simulated one. Each backbone has a process of its own, so that its
peak memory is its own. Without the package installed, set PYTHONPATH=. Prints a Markdown table.

GPU memory is computed, not measured: of the paper's stage 1 on one GPU in float32, weights, gradients and AdamW's two
moments of backbone and heads, and what a batch of 8 keeps for the backward pass. Workspaces of kernels come on top.
"""

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from featcache.backbone.network import load_backbone
from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import POOLED, BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.open import open_dataset
from featcache.dataset.rois import HEMISPHERES
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from featcache.simulate import SimulateConfig, simulate
from heads.backbones.stages import train_stage
from heads.config import FitConfig, StageConfig, preset
from heads.fit.run import Fitted, fit_heads

BACKBONES = (
    "convnext_xlarge",
    "seresnext101d_32x8d",
    "convnext_base",
    "vit_small_patch16_224",
    "efficientnet_b7",
    "seresnet152d",
    "seresnextaa101d_32x8d",
)
BATCH, PAPER_BATCH = 2, 8  # images: here, and on the paper's GPU
N_FOLDS = 2
EMBEDDING, OUTPUTS = 512, 39_548  # of the paper's stage 1: subject embedding, vertices of the challenge
BYTES = 16  # a parameter: weight, gradient and AdamW's two moments in float32
# The second subject is there so that there are two; the first has enough images for its held-out fold's four parts.
TREE = SimulateConfig(
    n_subjects=2, n_train=(12, 4), n_test=2, n_shared=2, n_vertices=(40, 44), image_size=32, n_reference=50, workers=1
)


def measure(name: str, size: int, folder: Path) -> dict[str, Any]:
    """Everything of one backbone, in this process."""
    simulate(TREE, folder / "challenge")
    subjects, work = open_dataset(folder / "challenge").subjects, folder / "work"
    own = BackboneConfig(name=name, weights="none", size=size)
    settings = replace(preset("paper", "pretrain"), epochs=1, batch_size=BATCH)
    ends: list[float] = []
    register_optimizer_step_post_hook(lambda *_: ends.append(time.perf_counter()))
    for stage, of in (("pretrain", subjects), ("finetune", subjects[:1])):  # the second starts from the first
        config = StageConfig(
            stage=stage, train=settings, backbone=own, fold=0, n_folds=N_FOLDS, device="cpu", workers=1
        )
        checkpoint = train_stage(of, config, work)[0].checkpoint.path
    step = float(np.median(np.diff(ends)))  # from one step's end to the next one's; what lies between stages is one
    reading = ExtractConfig(
        backbone=own,
        layers=LayerConfig(layers=(POOLED,)),
        batch_size=4 * BATCH,
        workers=1,
        device="cpu",
        checkpoint=str(checkpoint),
    )
    extracted = extract(subjects[:1], reading, work)[0]
    fitted = fit_heads(subjects[:1], FitConfig(n_folds=N_FOLDS, device="cpu"), work)[0]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux counts in KiB; taken before what follows
    network: Any = load_backbone(own).model
    n_parameters, n_features = sum(p.numel() for p in network.parameters()), network.num_features
    n_heads = (n_features + EMBEDDING) * OUTPUTS
    activations = saved_bytes(network, size) * PAPER_BATCH / BATCH
    n_bytes = BYTES * (n_parameters + n_heads) + activations
    return {
        "backbone": name,
        "parameters, M": f"{n_parameters / 1e6:.1f}",
        "pooled features": n_features,
        "s a training step (images/s)": f"{step:.2f} ({BATCH / step:.2f})",
        "peak memory, GB": f"{peak:.1f}",
        "checkpoint, MB": round(sum(f.stat().st_size for f in checkpoint.rglob("*") if f.is_file()) / 1e6),
        "extraction, images/s": f"{extracted.n_new / extracted.seconds:.2f}",
        "finite out-of-fold predictions": finite_predictions(fitted, subjects[0]),
        "GPU memory, computed GB (of it activations)": f"{n_bytes / 1e9:.1f} ({activations / 1e9:.1f})",
        "weights in timm": weights_in_timm(name),
    }


def saved_bytes(network: nn.Module, size: int) -> int:
    """What a forward pass of a batch keeps for the backward pass, each storage once and parameters not at all."""
    own = {t.untyped_storage().data_ptr() for t in (*network.parameters(), *network.buffers())}
    kept: dict[int, torch.UntypedStorage] = {}  # all at once, so that no two have had the same address

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage
        return tensor

    images = torch.randn(BATCH, 3, size, size).contiguous(memory_format=torch.channels_last)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        network.train().requires_grad_(True)(images)
    return sum(storage.nbytes() for address, storage in kept.items() if address not in own)


def finite_predictions(fitted: Fitted, subject: Subject) -> str:
    """How many of the predictions of the held-out fold there are; the store must have their shape."""
    n_held_out = int((assign_folds(subject.train.ids, N_FOLDS, 0) == 0).sum())
    store, n_finite = open_store(fitted.path), 0
    for hemisphere in HEMISPHERES:
        expected = (n_held_out + len(subject.test), subject.n_vertices[hemisphere])
        if store.arrays[hemisphere].shape != expected:
            sys.exit(f"expected {expected} predictions; found {store.arrays[hemisphere].shape}")
        n_finite += int(np.isfinite(store.read(hemisphere, 0, n_held_out)).sum())
    return f"{n_finite} of {n_held_out * sum(subject.n_vertices.values())}"


def weights_in_timm(name: str) -> str:
    """The weights that timm takes by default, or those of its nearest relative where it has none."""
    own, related = timm.list_pretrained(f"{name}.*"), timm.list_pretrained(f"*_{name}.*")
    if not own and not related:
        return "none"
    base = name if own else related[0].partition(".")[0]
    known: Any = timm.models.get_pretrained_cfg(base)
    return f"{base}.{known.tag}" if own else f"none; substitute {base}.{known.tag}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("backbones", nargs="*", default=BACKBONES, help="default: all seven")
    parser.add_argument("--size", type=int, default=384, help="pixels on a side")
    parser.add_argument("--one", help=argparse.SUPPRESS)  # this and the next: how the processes are started
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(measure(options.one, options.size, options.folder)))
        return
    versions = f"torch {torch.__version__}, timm {timm.__version__}"
    print(f"{options.size} px, batches of {BATCH}, {torch.get_num_threads()} threads, {versions}\n", flush=True)
    failed, first = [], True
    for name in options.backbones:
        with tempfile.TemporaryDirectory() as folder:
            own = [sys.executable, __file__, "--one", name, "--size", str(options.size), "--folder", folder]
            run = subprocess.run(own, stdout=subprocess.PIPE, text=True)
        if run.returncode:
            failed.append(f"{name} (exit code {run.returncode})")
            continue
        row = json.loads(run.stdout.splitlines()[-1])
        if first:
            print(f"| {' | '.join(row)} |\n|{'---|' * len(row)}")
        print(f"| {' | '.join(map(str, row.values()))} |", flush=True)
        first = False
    if failed:
        sys.exit(f"failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
