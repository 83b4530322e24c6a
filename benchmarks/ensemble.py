"""What blends are worth on a tree: every method at every level, nested, beside the best single model and uniform.

    PYTHONPATH=. python benchmarks/ensemble.py --data TREE --work FOLDER [--recipe recipes/best.toml] [--subject 1,3]

First the recipe is run, which makes the models or finds them there; then each blend is learnt in a process of its own.
Seconds are of reading, learning, scoring, bootstrap and permutations together.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path

from measure import peak_gb, seconds

import cli
from featcache.challenge import open_challenge
from featcache.device import keep_freed_memory
from heads.config import BLENDS, LEVELS, BlendConfig
from heads.ensemble import blend_subject
from heads.honesty import gains, null
from heads.members import has_ceilings, members_of


def blended(data: str, work: str, subject: str, method: str, per: str) -> None:
    """One JSON line."""
    keep_freed_memory()
    members = members_of(open_challenge(Path(data), None).select(subject), Path(work))
    accuracy, found = has_ceilings(members), []
    config = BlendConfig(method, per)
    took = seconds(lambda: found.extend(blend_subject(s, stores, config, accuracy) for s, stores in members.items()))
    over_single, over_uniform = gains([one.resampled for one in found])
    row = {
        "models": max(len(stores) for stores in members.values()),
        "single": over_single.score,
        "uniform": over_uniform.score,
        "blend": over_single.score + over_single.gain,
        "low": over_single.score + over_single.low,
        "high": over_single.score + over_single.high,
        "optimistic": over_single.score + over_single.optimistic,
        "shuffled": null([one.resampled for one in found]).mean,
        "seconds": took,
        "peak": peak_gb(),
    }
    print(json.dumps(row))


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
        return blended(given.data, given.work, given.subject, *given.blend)
    if given.recipe != "none" and cli.run(["run", given.recipe, *tree]):
        sys.exit(1)
    print(
        "| blend | models | nested | 95 % over best single | optimistic | best single | uniform | shuffled | s | GB |"
    )
    print("|---|---|---|---|---|---|---|---|---|---|")
    for method in BLENDS:
        for per in LEVELS[:1] if method == "uniform" else LEVELS:
            command = [sys.executable, __file__, *tree, "--blend", method, per]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env=os.environ)
            row = json.loads(done.stdout.splitlines()[-1])
            print(
                f"| {method} per {per} | {row['models']} | {row['blend']:.4f} | {row['low'] - row['single']:+.4f} to "
                f"{row['high'] - row['single']:+.4f} | {row['optimistic']:.4f} | {row['single']:.4f} | "
                f"{row['uniform']:.4f} | {row['shuffled']:.4f} | {row['seconds']:.1f} | {row['peak']:.2f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
