"""What blends are worth on a tree: every method at every level, nested, beside the best single model and uniform.

    PYTHONPATH=. python benchmarks/ensemble.py --data TREE --work FOLDER [--recipe FILE] [--subject 1,3]

First the recipe is run, which makes the models or finds them there; then each blend is learnt in a process of its own.
Seconds are of reading, learning, scoring, bootstrap and permutations together. Where the tree has its test responses,
as simulated ones do (truth/subjXX/{lh,rh}_test_responses.npy), scores on these stand beside the nested ones: no model
and no weight has seen them.
"""

import argparse
import json
import os
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from measure import peak_gb, seconds

import cli
from featcache.dataset.open import open_dataset
from featcache.dataset.subject import Subject
from featcache.machine.memory import keep_freed_memory
from heads.blend.learn import judge_of, levels_of
from heads.blend.models import Model, SubjectModels, find_models, has_ceilings
from heads.blend.products import gather
from heads.blend.saved import coefficients_of
from heads.blend.subject import Blended, blend_subject
from heads.blend.uncertainty import gains, null, scorer_of
from heads.blend.weights import single
from heads.config import BLENDS, LEVELS, BlendConfig
from heads.scores.metrics import pearson_r

_COLUMNS = {  # heading: what of a row
    "models": "{models}",
    "nested": "{blend:.4f}",
    "95 % over best single": "{low:+.4f} to {high:+.4f}",
    "optimistic": "{optimistic:.4f}",
    "best single": "{single:.4f}",
    "uniform": "{uniform:.4f}",
    "shuffled": "{shuffled:.4f}",
    "withheld": "{withheld_blend:.4f}",
    "best single, withheld": "{withheld_single:.4f}",
    "uniform, withheld": "{withheld_uniform:.4f}",
    "s": "{seconds:.1f}",
    "GB": "{peak:.2f}",
}


def blended(data: Path, work: Path, subject: str, method: str, per: str) -> None:
    """One JSON line."""
    keep_freed_memory()
    models = find_models(open_dataset(data, None).select(subject), work)
    accuracy, config = has_ceilings(list(models)), BlendConfig(method=method, per=per)
    blends: list[Blended] = []
    took = seconds(lambda: blends.extend(blend_subject(*pair, config, accuracy) for pair in models.items()))
    peak = peak_gb()
    over_single, over_uniform = gains([blended.resampled for blended in blends])
    row = {
        "models": max(map(len, models.values())),
        "single": over_single.score,
        "uniform": over_uniform.score,
        "blend": over_single.score + over_single.gain,
        "low": over_single.low,
        "high": over_single.high,
        "optimistic": over_single.score + over_single.optimistic,
        "shuffled": null([blended.resampled for blended in blends]).mean,
        "seconds": took,
        "peak": peak,
    }
    print(json.dumps(row | withheld(data, models, blends, accuracy)))


def withheld(data: Path, models: SubjectModels, blends: Sequence[Blended], accuracy: bool) -> dict[str, float]:
    """Scores on test responses, over all subjects; {} without such responses."""
    total: dict[str, float] = defaultdict(float)
    n_vertices = 0
    for (subject, of_subject), blended in zip(models.items(), blends, strict=True):
        paths = [data / "truth" / subject.name / f"{surface}_test_responses.npy" for surface in subject.surfaces]
        if not all(path.is_file() for path in paths):
            return {}
        scorer = scorer_of(subject, judge_of(subject), accuracy)
        n_vertices += scorer.n_vertices
        for name, predicted in test_predictions(subject, of_subject, blended).items():
            r = pearson_r(predicted, np.concatenate([np.load(path) for path in paths], axis=1))
            total[f"withheld_{name}"] += float(scorer.mean(r)) * scorer.n_vertices
    return {name: value / n_vertices for name, value in total.items()}


def test_predictions(subject: Subject, models: Sequence[Model], blended: Blended) -> dict[str, np.ndarray]:
    """(n_images, n_vertices) of the blend, of the best single model of each surface and of the uniform blend."""
    stores = {model.name: model.store for model in models}
    gathered, surfaces = gather(subject, list(stores.values())), levels_of(subject)[1].groups
    weights = {
        "blend": blended.weights,
        "single": surfaces.spread(single(gathered.products.total(), surfaces, judge_of(subject))),
        "uniform": np.full(blended.weights.shape, 1 / len(stores)),
    }
    rows = (len(subject.train), len(subject.image_ids))
    predictions = {}
    for name, of_blend in weights.items():
        coefficients = coefficients_of(subject, blended.models, gathered, of_blend)
        parts = [of_surface.apply(surface, stores, *rows) for surface, of_surface in coefficients.items()]
        predictions[name] = np.concatenate(parts, axis=1)
    return predictions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--work", required=True)
    parser.add_argument("--recipe", default="recipes/best.toml", help="none: the models that are there")
    parser.add_argument("--subject", default="all")
    parser.add_argument("--blend", nargs=2, metavar=("METHOD", "LEVEL"), help="this one alone, in this process")
    given = parser.parse_args()
    tree = ["--data", given.data, "--work", given.work, "--subject", given.subject]
    if given.blend:
        return blended(Path(given.data), Path(given.work), given.subject, *given.blend)
    if given.recipe != "none" and cli.run(["run", given.recipe, *tree]):
        sys.exit(1)
    print(f"| blend | {' | '.join(_COLUMNS)} |\n|{'---|' * (len(_COLUMNS) + 1)}")
    for method in BLENDS:
        for per in LEVELS[:1] if method == "uniform" else LEVELS:
            command = [sys.executable, __file__, *tree, "--blend", method, per]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            row = defaultdict(lambda: float("nan"), json.loads(done.stdout.splitlines()[-1]))
            cells = [form.format_map(row) for form in _COLUMNS.values()]
            print(f"| {method} per {per} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
