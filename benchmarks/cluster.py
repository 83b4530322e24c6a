"""How long the challenge would take on 1 to 64 workers, each with one card: a calculation, shown in docs/cluster.md.

    PYTHONPATH=. python benchmarks/cluster.py [--size 384] [--losses 10] [--card h100]

8 subjects, 7 backbones in two stages of 5 folds, heads of so many losses on the pooled features of both stages, and one
blend. Seconds of each unit are those that benchmarks/hours.py calculates. Units are given to workers as
`heads/units` gives them: in their order, each to the first worker that is free, phase by phase. Measured here before:
what a unit costs beside its work, and the start of a worker. No card is needed, and no time is measured.
"""

import argparse
import heapq
from dataclasses import dataclass

from backbones import BACKBONES
from hours import BANDWIDTH, CHALLENGE, FOLDS, N_ALL, N_TRAIN, VERTICES, counts_of

A100_BANDWIDTH = 2.04e12  # bytes a second of an 80 GB card, of its data sheet; training is limited by it (docs/gpu.md)
PAPER_HOURS = 8.0  # of an A100, for each subject, as the paper says
START = 10.0  # seconds until a worker has loaded its libraries
LOAD = 3.0  # seconds until a network is read and on the card
BESIDE = 0.01  # seconds that sharing a unit takes; measured 0.005
FIT = 25.0  # seconds of a fit to pooled features of five trained folds (docs/gpu.md: 5, up to five times as much)
BLEND = 240.0
SUBJECTS = len(CHALLENGE.n_train)
WORKERS = (1, 2, 4, 8, 16, 32, 64)


@dataclass(frozen=True)
class Phase:
    """Units that may be done in any order. seconds : of each; read, written : bytes of all of them"""

    name: str
    seconds: list[float]
    read: float
    written: float

    def wall(self, n_workers: int) -> float:
        """Seconds until the last unit has ended, where the first worker that is free takes the next."""
        free = [0.0] * min(n_workers, len(self.seconds))
        for one in self.seconds:
            heapq.heappush(free, heapq.heappop(free) + one + BESIDE)
        return max(free)


def phases(size: int, n_losses: int) -> list[Phase]:
    every = [counts_of(name, size) for name in BACKBONES]
    image = 3.0 * size * size
    seen = N_TRAIN * 5 * 1.0  # images that five epochs read, of which four fifths train and one fifth is scored
    hours = {one.name: one.hours(5, 32) * 3600 for one in every}
    pretrain = [hours[one.name] / FOLDS + LOAD for one in every for _ in range(FOLDS)]
    finetune = [hours[one.name] / FOLDS / SUBJECTS + LOAD for one in every for _ in range(FOLDS * SUBJECTS)]
    passes = [N_ALL / SUBJECTS / 128 * one.seconds_forward(128) + LOAD for one in every]
    extract = [one for one in passes for _ in range(2 * FOLDS * SUBJECTS)]
    weights = sum(4 * one.weights for one in every)
    rows = sum(4.0 * one.network.n_features * N_ALL for one in every) * 2 * FOLDS
    n_fits = len(every) * 2 * SUBJECTS * n_losses
    predictions = 2.0 * N_ALL * VERTICES * len(every) * 2 * n_losses
    heads = n_losses * 2 * FOLDS * SUBJECTS * sum(4.0 * one.network.n_features * VERTICES for one in every)
    responses = 4.0 * N_TRAIN * VERTICES * len(every) * 2 * n_losses
    return [
        Phase("pretrain", pretrain, len(every) * FOLDS * seen * image, FOLDS * weights),
        Phase("finetune", finetune, len(every) * FOLDS * seen * image, FOLDS * SUBJECTS * weights),
        Phase("extract", extract, len(extract) * N_ALL / SUBJECTS * image, rows),
        Phase("fit-heads", [FIT + BESIDE] * n_fits, rows * n_losses + responses, predictions + heads),
        Phase("blend", [BLEND], predictions + responses / n_losses / 14, 8.0 * N_ALL * VERTICES / 10),
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=int, default=384, help="pixels on a side")
    parser.add_argument("--losses", type=int, default=10, help="of which heads are fitted")
    given = parser.parse_args()
    found = phases(given.size, given.losses)
    n_units = sum(len(phase.seconds) for phase in found)
    print(f"{n_units:,} units: " + ", ".join(f"{phase.name} {len(phase.seconds):,}" for phase in found) + "\n")
    names = [phase.name for phase in found]
    print(f"| workers | {' | '.join(f'{name}, h' for name in names)} | in all, h | times one | busy |")
    print("|---" * (len(names) + 4) + "|")
    one = START + sum(phase.wall(1) for phase in found)
    for n in WORKERS:
        walls = [phase.wall(n) for phase in found]
        whole = START + sum(walls)
        hours = " | ".join(f"{wall / 3600:.2f}" for wall in walls)
        print(f"| {n} | {hours} | {whole / 3600:.1f} | {one / whole:.1f} | {one / whole / n:.0%} |")
    columns = ("phase", "units", "s of a unit", "GB read", "GB written", "GB/s on 8 workers", "on 64")
    print(f"\n| {' | '.join(columns)} |\n" + "|---" * len(columns) + "|")
    for phase in found:
        mean = sum(phase.seconds) / len(phase.seconds)
        rates = [(phase.read + phase.written) / phase.wall(n) / 1e9 for n in (8, 64)]
        numbers = (phase.read / 1e9, phase.written / 1e9)
        cells = [
            f"{len(phase.seconds):,}",
            f"{mean:,.0f}",
            *(f"{n:,.0f}" for n in numbers),
            *(f"{n:.1f}" for n in rates),
        ]
        print(f"| {phase.name} | {' | '.join(cells)} |")
    hours = one / 3600
    a100 = hours * BANDWIDTH / A100_BANDWIDTH
    print(f"\none H100: {hours:.0f} hours, {hours / SUBJECTS:.1f} a subject")
    print(f"by the bandwidth of an A100: {a100 / SUBJECTS:.1f} hours a subject, where the paper says {PAPER_HOURS:g}")


if __name__ == "__main__":
    main()
