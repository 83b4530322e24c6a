"""Files of a work folder with trained backbones are damaged at random: nothing damaged may be used in silence.

    PYTHONPATH=. python benchmarks/faults/corruption.py [--n 1000] [--seed 0] [--repair 20]

Each case flips a bit, writes zeros, cuts off, removes a file, or exchanges two files of one kind. Then `verify` looks
at the folder, and commands read it: a new fit, a blend, predictions of new images, features of another layer. A case
is right where each command ends as it does on the undamaged folder, with the same files, or with exit code 1 and one
line. In `--repair` of the cases, `verify --repair` has to make the folder whole again.
"""

import os
import random
import shutil
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import stages
from stages import Ended, Room

_STAGES = (
    "simulate",
    "extract",
    "pretrain",
    "finetune",
    "extract-trained",
    "fit-ridge",
    "fit-adamw",
    "compare",
    "blend",
)
# commands that read the folder; each begins with what was damaged
READERS: dict[str, tuple[str, ...]] = {
    "fit": ("fit-heads", "--loss", "mse", "--seed", "1", "--folds", "2", "--features", "test_resnet@32 ??????"),
    "fit-trained": ("fit-heads", "--features", "*pretrain*,*finetune*", "--solver", "trained"),
    "blend": ("blend", "--method", "uniform"),
    "compare": stages.STAGES["compare"],
    "predict": ("predict", "{inputs}/photos", "--out", "predicted.zarr"),
    "extract": ("extract", *stages.NETWORK, "--layers", "layer3", "--workers", "1"),
    "scores": ("scores", "--json"),
}
# {folder or file of the work folder: commands that read it}; what is not named is read by a fit
_OF = {
    "features.zarr": ("fit", "compare"),
    "predictions.zarr": ("blend", "scores"),
    "heads": ("predict",),
    "checkpoints": ("predict", "extract", "fit-trained"),
    "pixels": ("extract",),
    "submission": ("predict", "scores"),
    "submission.zip": ("scores",),
    "compared": ("compare",),
}
# Text for people and records of what was done, which no command reads to compute from
_FOR_PEOPLE = (".csv", ".png", ".html", "journal.jsonl", ".lock", ".marker")


def files_of(work: Path) -> list[Path]:
    """Files that are read again."""
    return sorted(path for path in work.rglob("*") if path.is_file() and not path.name.endswith(_FOR_PEOPLE))


def damage(rng: random.Random, work: Path) -> tuple[str, Path]:
    """Damage one file, keeping its time; what was done, and to which."""
    files = files_of(work)
    top = sorted({path.relative_to(work).parts[0] for path in files})
    part = rng.choice(top)  # each kind of file as often as the others, whatever their number
    path = rng.choice([one for one in files if one.relative_to(work).parts[0] == part])
    status = path.stat()
    how = rng.choice(["flip", "flip", "zero", "cut", "delete", "swap"])
    content = bytearray(path.read_bytes())
    others = [one for one in files if one != path and one.name == path.name and one.suffix == path.suffix]
    if how == "swap" and (others := [one for one in others if one.read_bytes() != bytes(content)]):
        other = rng.choice(others)
        path.write_bytes(other.read_bytes())
        other.write_bytes(bytes(content))
    elif how == "delete" or not content:
        path.unlink()
        return "delete", path
    elif how == "cut":
        path.write_bytes(content[: rng.randrange(len(content))])
    elif how == "zero" and any(content):
        start = rng.choice([at for at, byte in enumerate(content) if byte])
        stop = min(len(content), start + rng.randint(1, 64))
        content[start:stop] = bytes(stop - start)
        path.write_bytes(content)
    else:
        how = "flip"
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))  # as a disk that fails does
    return how, path


def readers_of(path: Path, work: Path) -> Sequence[str]:
    """Names of the commands that read a file."""
    return _OF.get(path.relative_to(work).parts[0], ("fit",))


def read(room: Room, name: str) -> tuple[Ended, Mapping[str, str]]:
    """Run a command, and what the folder has then that it did not have before or that is other."""
    before = stages.contents(room.case)
    ended = room.run("extract", arguments=READERS[name])
    after = stages.contents(room.case)
    shutil.rmtree(room.case / "predicted.zarr", ignore_errors=True)
    return ended, {path: digest for path, digest in after.items() if before.get(path) != digest}


def answer(name: str, ended: Ended) -> str:
    """The numbers that a command says and writes nowhere."""
    return (ended.out.splitlines() or [""])[-1].rpartition('"seconds"')[0] if name == "scores" else ""


def undamaged(room: Room, last: str) -> dict[str, tuple[Ended, Mapping[str, str]]]:
    """What every command does on the undamaged folder."""
    found = {}
    for name in READERS:
        room.restore(room.after(last))
        found[name] = read(room, name)
        if found[name][0].code:
            raise RuntimeError(f"{name} fails undamaged: {found[name][0].err}")
    return found


def main() -> int:
    n_repairs = 20
    if "--repair" in sys.argv:
        at = sys.argv.index("--repair")
        n_repairs = int(sys.argv[at + 1])
        del sys.argv[at : at + 2]
    given = stages.options(__doc__, n=1000)
    rng = random.Random(given.seed)
    counts: Counter[str] = Counter()
    missed: Counter[str] = Counter()
    broken: list[str] = []
    with stages.built(_STAGES) as (room, _):
        whole, work = _STAGES[-1], room.case / "work"
        wanted = undamaged(room, whole)
        for case in range(given.n):
            room.restore(room.after(whole))
            how, path = damage(rng, work)
            what, own = f"{how} {path.relative_to(work)}", f"work/{path.relative_to(work)}"
            counts["cases"] += 1
            counts[how] += 1
            looked = room.run("extract", arguments=("verify",))
            counts["found by verify"] += looked.code == 1
            if looked.code == 0:
                missed[f"{how} {path.relative_to(work).parts[0]} {path.name}"] += 1
            counts["tracebacks"] += looked.traceback
            hurt = room.root / "snapshots" / "hurt"
            room.keep(hurt)
            for name in readers_of(path, work):
                room.restore(hurt)
                ended, made = read(room, name)
                expected, right = wanted[name]
                if ended.traceback:
                    counts["tracebacks"] += 1
                    broken.append(f"{what}: {name}: traceback: {ended.last}")
                elif ended.said:
                    counts["refused"] += 1
                elif ended.code == 0 and _same(made, right, own) and answer(name, ended) == answer(name, expected):
                    counts["the same answer"] += 1
                elif ended.code == 0 and "left out" in ended.err:
                    counts["left out, and said"] += 1
                else:
                    counts["used in silence"] += 1
                    broken.append(f"{what}: {name}: exit code {ended.code}, other files; {ended.last}")
            if case < n_repairs:
                room.restore(hurt)
                mended = room.run("extract", arguments=("verify", "--repair"))
                again = room.run("extract", arguments=("verify",))
                good = mended.code == 0 and again.code == 0
                counts["repaired" if good else "not repaired"] += 1
                if not good:
                    broken.append(f"{what}: not repaired: {mended.last} {again.out.strip()[-200:]}")
    for line in broken:
        print(line)
    print("not found by verify: " + ", ".join(f"{what} {n}" for what, n in missed.most_common()))
    print(", ".join(f"{what} {n}" for what, n in counts.items()))
    return 1 if broken else 0


def _same(made: Mapping[str, str], right: Mapping[str, str], own: str) -> bool:
    """Whether a command made the files that it should; the damaged file, `own`, may be made again."""
    return all(made.get(name) == digest for name, digest in right.items() if name != own)


if __name__ == "__main__":
    raise SystemExit(main())
