"""What each step of the training is worth: frozen, stage 2 alone, stage 1, both, other losses, refitted heads.

    python benchmarks/ablation.py [--tree simulated | v4 | PATH] [--subjects 1,2,5,6] [--seeds 3]

One seed is one fold held out, one order of the batches and one start of the heads. Every arm is scored on the held-out
fold alone, by mean r over vertices, subject by subject; differences are paired within subject and seed, with a 95 %
t interval over these pairs. `v4` is a folder of real recordings beside the repository, where it is there.
For the paper's arms on any dataset and on whole folds, run recipes/table1.toml; frozen arms are here alone.
Results go to the work folder and are kept: a second run goes on where the first was stopped.
"""

import argparse
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from featcache.cache.extract import extract
from featcache.cache.store import open_store
from featcache.config import POOLED, BackboneConfig, ExtractConfig, LayerConfig
from featcache.dataset.open import open_dataset
from featcache.dataset.splits import assign_folds
from featcache.dataset.subject import Subject
from featcache.machine.files import replace_json
from featcache.simulate import SimulateConfig, simulate
from heads.backbones.stages import train_stage
from heads.config import FitConfig, StageConfig, preset
from heads.fit.run import fit_heads
from heads.scores.intervals import paired_interval
from heads.scores.metrics import pearson_r

V4 = Path(__file__).resolve().parents[2] / "shared" / "real" / "v4"
BACKBONE = "tf_efficientnet_lite0"
N_FOLDS = 5
HEADS = {"refitted": "auto", "trained": "trained"}  # solvers of fit-heads
COMPARED = [  # what is better than what, and by how much
    ("stage 2 alone, refitted", "frozen, refitted"),
    ("stage 1, refitted", "frozen, refitted"),
    ("stages 1 and 2, refitted", "frozen, refitted"),
    ("stages 1 and 2, refitted", "stage 2 alone, refitted"),
    ("stages 1 and 2, refitted", "stage 1, refitted"),
    ("stages 1 and 2 with PC and MNNPC, refitted", "stages 1 and 2, refitted"),
    ("stage 2 alone, refitted", "stage 2 alone, trained"),
    ("stage 1, refitted", "stage 1, trained"),
    ("stages 1 and 2, refitted", "stages 1 and 2, trained"),
]


def main() -> None:
    options = parse()
    root = tree(options.tree, options.work)
    challenge = open_dataset(root)
    subjects = challenge.select(options.subjects)
    results: dict[str, dict[str, float]] = {}
    for seed in range(options.seeds):
        began = time.perf_counter()
        for arm, scores in run_seed(challenge.subjects, subjects, seed, options).items():
            results.setdefault(arm, {}).update({f"{name}/{seed}": score for name, score in scores.items()})
        print(f"seed {seed}: {time.perf_counter() - began:.0f} s", flush=True)
        replace_json(options.work / "ablation.json", results)
    report(results)


def run_seed(
    everyone: tuple[Subject, ...], subjects: tuple[Subject, ...], seed: int, options: argparse.Namespace
) -> dict[str, dict[str, float]]:
    """{arm: {subject: mean r over the vertices of the held-out fold}}"""
    work = options.work / f"seed{seed}"
    backbone = BackboneConfig(name=BACKBONE, weights="packaged", size=options.size)
    # the default preset, with the rates that suit a small network in stage 1 (docs/log.md)
    second = replace(preset("fast", "finetune"), seed=seed, stop="never", epochs=options.stage2_epochs)
    settings = replace(
        second, loss="smooth_l1", epochs=options.stage1_epochs, learning_rate=1e-3, head_learning_rate=3e-3
    )
    common = StageConfig(stage="pretrain", train=settings, backbone=backbone, fold=seed % N_FOLDS, n_folds=N_FOLDS)
    stages = {"stage 1": (everyone, common)}
    for arm, init, loss in (
        ("stage 2 alone", "packaged", "smooth_l1"),
        ("stages 1 and 2", "stage1", "smooth_l1"),
        ("stages 1 and 2 with PC and MNNPC", "stage1", "smooth_l1+pearson+mnnpc"),
    ):
        stages[arm] = (subjects, replace(common, stage="finetune", init=init, train=replace(second, loss=loss)))
    frozen = ExtractConfig(backbone=backbone, layers=LayerConfig(layers=(POOLED,)))
    extract(subjects, frozen, work / "frozen")
    scores = {"frozen, refitted": score(subjects, work / "frozen", "auto", seed)}
    for arm, (trained_on, config) in stages.items():
        own = work / arm.replace(" ", "-")  # features and predictions of this arm alone
        share(work, own)
        for one in train_stage(trained_on, config, work):
            served = [subject for subject in subjects if one.checkpoint.concerns(subject)]
            extract(served, replace(frozen, checkpoint=str(one.checkpoint.path)), own)
        for heads, solver in HEADS.items():
            scores[f"{arm}, {heads}"] = score(subjects, own, solver, seed)
    return scores


def share(work: Path, own: Path) -> None:
    """Checkpoints and pixels of all arms in one place."""
    own.mkdir(parents=True, exist_ok=True)
    for folder in ("checkpoints", "pixels", "index"):
        (work / folder).mkdir(exist_ok=True)
        if not (own / folder).exists():
            (own / folder).symlink_to((work / folder).resolve())


def score(subjects: tuple[Subject, ...], work: Path, solver: str, seed: int) -> dict[str, float]:
    by_name = {subject.name: subject for subject in subjects}
    scores = {}
    for fitted in fit_heads(subjects, FitConfig(solver=solver, n_folds=N_FOLDS), work):
        subject, store = by_name[fitted.subject], open_store(fitted.path)
        held_out = np.flatnonzero(assign_folds(subject.train.ids, N_FOLDS, 0) == seed % N_FOLDS)
        stored = np.isin(store.image_ids[: store.n_train], subject.train.ids[held_out])
        r = [
            pearson_r(store.read(h, 0, store.n_train)[stored], subject.responses(h)[held_out])
            for h in subject.n_vertices
        ]
        scores[subject.name] = float(np.concatenate(r).mean())
    return scores


def report(results: dict[str, dict[str, float]]) -> None:
    pairs = sorted(next(iter(results.values())))  # 'subject/seed'
    names = sorted({pair.split("/")[0] for pair in pairs})
    print("\n| arm | " + " | ".join(names) + " | mean r |\n" + "|---" * (len(names) + 2) + "|")
    for arm, scores in results.items():
        means = [np.mean([scores[p] for p in pairs if p.startswith(name)]) for name in names]
        print(f"| {arm} | " + " | ".join(f"{m:.3f}" for m in means) + f" | {np.mean(list(scores.values())):.4f} |")
    print("\n| compared with | difference of mean r | 95 % interval | pairs |\n|---|---|---|---|")
    for better, worse in COMPARED:
        d = paired_interval([results[better][p] - results[worse][p] for p in pairs])
        print(f"| {better} - {worse} | {d.mean:+.4f} | {d.low:+.4f} to {d.high:+.4f} | {d.n_pairs} |")


def tree(name: str, work: Path) -> Path:
    if name == "v4":
        return V4
    if name != "simulated":
        return Path(name)
    root = work / "challenge"
    if not root.exists():
        simulate(SimulateConfig(n_subjects=4, n_train=120, n_test=10, image_size=128), root)
    return root


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", default="simulated")
    parser.add_argument("--work", type=Path, default=Path("work/ablation"))
    parser.add_argument("--subjects", default="all")
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--stage1-epochs", type=int, default=4)
    parser.add_argument("--stage2-epochs", type=int, default=3)
    return parser.parse_args()


if __name__ == "__main__":
    main()
