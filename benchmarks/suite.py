"""All speed benchmarks one after the other, each in a process of its own, and the page that shows them.

    PYTHONPATH=. python benchmarks/suite.py [--quick] [--only metric,blend]
    PYTHONPATH=. python benchmarks/suite.py --from work/benchmarks.json     (the page again, without running anything)

Writes work/benchmarks.json and, with --page, the page and its plots. Where there is a page, --only replaces the
sections of these benchmarks on it, with the machine that they ran on, and leaves the others and the plots as they are.
Exit code 1 if a benchmark failed.
"""

import argparse
import datetime
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from measure import machine

HERE = Path(__file__).resolve().parent
# in the order of the page
BENCHMARKS = {
    "exact_heads": "Closed-form heads",
    "peers": "Closed-form heads and their peers",
    "priors": "Heads under priors and himalaya",
    "company": "The default path beside other work",
    "full_size": "A subject of full size",
    "variants": "Many losses",
    "gradient": "Heads trained by gradient",
    "extract": "Extraction",
    "store_read": "Reading the cache",
    "listing": "Listing many stores",
    "verifying": "Checking a work folder",
    "units": "Sharing the work",
    "metric": "Metric",
    "blend": "Blend",
    "stacking": "Blend weights and scikit-learn",
    "memory": "Memory",
    "growth": "How cost grows",
    "device": "On an accelerator",
}


def run(name: str, quick: bool) -> dict[str, Any]:
    """What a benchmark printed last, or how it failed."""
    began = time.perf_counter()
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")])}
    command = [sys.executable, str(HERE / f"{name}.py"), *(["--quick"] if quick else [])]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    result: dict[str, Any] = {"name": name, "seconds": round(time.perf_counter() - began, 1), "failed": None}
    try:
        result["figures"] = json.loads(done.stdout.splitlines()[-1])
    except (IndexError, ValueError):
        result |= {"figures": [], "failed": (done.stderr.strip().splitlines() or ["no output"])[-1]}
    if done.returncode:
        result["failed"] = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
    print("\n".join(done.stdout.splitlines()[:-1]) or f"{name}: {result['failed']}", flush=True)
    return result


def reached(figure: Mapping[str, Any]) -> bool | None:
    """None where there is nothing to reach."""
    if figure["ratio"] is None or figure["target"] is None:
        return None
    return figure["ratio"] <= figure["target"] if figure["at_most"] else figure["ratio"] >= figure["target"]


def page(results: Mapping[str, Any], plots: Sequence[str]) -> str:
    """Markdown, from the JSON alone."""
    size = "Quick sizes, which say only that everything runs." if results["quick"] else ""
    lines = [
        "# Benchmarks",
        "",
        f"Made by `make bench` on {_where(results)}. Every figure is a ratio of times taken in one process, one after "
        f"the other, unless its row says otherwise. {size}".rstrip(),
        "",
    ]
    lines += [f"![{Path(plot).stem}](benchmarks/{plot})" for plot in plots]
    return "\n".join(lines) + "\n\n" + "\n".join(_section(one) for one in results["benchmarks"])


def updated(text: str, results: Mapping[str, Any]) -> str:
    """A page with the sections of these results in place of its own, or added."""
    head, *sections = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    by_title = {section.partition("\n")[0]: section for section in sections}
    for one in results["benchmarks"]:
        quick = " at quick sizes" if results["quick"] else ""
        section = _section(one, f"Run{quick} on {_where(results)}.")
        by_title[section.partition("\n")[0]] = section
    places = {f"## {title}": place for place, title in enumerate(BENCHMARKS.values())}
    ordered = sorted(by_title, key=lambda title: places.get(title, len(places)))
    return head + "\n".join(by_title[title].rstrip("\n") + "\n" for title in ordered)


def _where(results: Mapping[str, Any]) -> str:
    about = results["machine"]
    return (
        f"{results['date']}: {about['cpu']}, {about['cores']} cores, {about['threads']} threads, "
        f"{about['cuda'] or 'no GPU'}; Python {about['python']}, torch {about['torch']}, NumPy {about['numpy']}"
    )


def _section(one: Mapping[str, Any], note: str = "") -> str:
    lines = [f"## {BENCHMARKS[one['name']]}", "", *([note, ""] if note else []), _source(one), ""]
    if one["failed"]:
        lines += [f"Failed: {one['failed']}", ""]
    if one["figures"]:
        lines += ["| what | against | measured | aim | details |", "|---|---|---|---|---|"]
        lines += [row(figure) for figure in one["figures"]]
    return "\n".join(lines) + "\n"


def _source(one: Mapping[str, Any]) -> str:
    options = f" {one['options']}" if one.get("options") else ""
    return f"`benchmarks/{one['name']}.py{options}`" + (f", {one['seconds']:g} s" if one["seconds"] else "")


def row(figure: Mapping[str, Any]) -> str:
    measured = figure["note"] if figure["ratio"] is None else f"{figure['ratio']:.3g}"
    aim = "" if figure["target"] is None else f"at {'most' if figure['at_most'] else 'least'} {figure['target']:g}"
    mark = {True: "", False: " (missed)", None: ""}[reached(figure)]
    if figure["ratio"] is not None and figure["note"]:
        mark += f"; {figure['note']}"
    details = ", ".join(
        f"{key.replace('_', ' ')} {value:.3g}" if isinstance(value, float) else f"{key.replace('_', ' ')} {value}"
        for key, value in figure["details"].items()
        if isinstance(value, str | int | float)
    )
    return f"| {figure['what']} | {figure['against']} | {measured}{mark} | {aim} | {details} |"


def draw(results: Mapping[str, Any], folder: Path) -> list[str]:
    """Names of the plots that were made: what was reached of every aim, and the curves of cost."""
    import matplotlib

    matplotlib.use("svg")
    matplotlib.rcParams["svg.hashsalt"] = "benchmarks"  # the same figures give the same file
    folder.mkdir(parents=True, exist_ok=True)
    figures = [figure for one in results["benchmarks"] for figure in one["figures"]]
    made = [_draw_aims([figure for figure in figures if reached(figure) is not None], folder)]
    made += [_draw_curves([figure for figure in figures if "points" in figure["details"]], folder)]
    return [name for name in made if name]


def _draw_aims(figures: Sequence[Mapping[str, Any]], folder: Path) -> str:
    from matplotlib import pyplot

    figures = [figure for figure in figures if figure["target"] > 0 and figure["ratio"] > 0]
    if not figures:
        return ""
    shares = [f["target"] / f["ratio"] if f["at_most"] else f["ratio"] / f["target"] for f in figures]
    canvas, axes = pyplot.subplots(figsize=(9, 0.32 * len(figures) + 1), layout="constrained")
    axes.barh(range(len(shares)), shares, color=["#3b7dd8" if share >= 1 else "#d88a3b" for share in shares])
    axes.set_yticks(range(len(shares)), [f"{figure['what']}"[:70] for figure in figures], fontsize=7)
    axes.invert_yaxis()
    axes.set_xscale("log")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xlabel("times as good as the aim")
    canvas.savefig(folder / "aims.svg", metadata={"Date": None})
    pyplot.close(canvas)
    return "aims.svg"


def _draw_curves(figures: Sequence[Mapping[str, Any]], folder: Path) -> str:
    from matplotlib import pyplot

    if not figures:
        return ""
    columns = min(len(figures), 2)
    rows = -(-len(figures) // columns)
    canvas, panels = pyplot.subplots(rows, columns, figsize=(9, 3 * rows), layout="constrained", squeeze=False)
    for panel in panels.flat[len(figures) :]:
        panel.axis("off")
    for panel, figure in zip(panels.flat, figures, strict=False):
        sizes, took = zip(*figure["details"]["points"], strict=True)
        panel.loglog(sizes, took, "o-", color="#3b7dd8")
        panel.set_title(f"{figure['what']}: exponent {figure['ratio']:.2f}\ntheory: {figure['against']}", fontsize=8)
        panel.set_ylabel("seconds")
    canvas.savefig(folder / "growth.svg", metadata={"Date": None})
    pyplot.close(canvas)
    return "growth.svg"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that everything runs")
    parser.add_argument("--only", help="some of them, with commas between")
    parser.add_argument("--out", type=Path, default=Path("work/benchmarks.json"))
    parser.add_argument("--page", type=Path, help="where the page goes; its plots go to benchmarks/ beside it")
    parser.add_argument("--from", type=Path, dest="source", help="results of an earlier run, to make the page of")
    options = parser.parse_args()
    names = list(BENCHMARKS) if options.only is None else options.only.split(",")
    if unknown := set(names) - set(BENCHMARKS):
        parser.error(f"--only: expected some of {', '.join(BENCHMARKS)}; found {', '.join(sorted(unknown))}")
    if options.source is None:
        results = {
            "date": datetime.date.today().isoformat(),
            "quick": options.quick,
            "machine": machine(),
            "benchmarks": [run(name, options.quick) for name in names],
        }
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(results, indent=1) + "\n")
    else:
        results = json.loads(options.source.read_text())
    if options.page is not None:
        options.page.parent.mkdir(parents=True, exist_ok=True)
        if options.only and options.page.exists():
            options.page.write_text(updated(options.page.read_text(), results))
        else:
            options.page.write_text(page(results, draw(results, options.page.parent / "benchmarks")))
    failed = [one["name"] for one in results["benchmarks"] if one["failed"]]
    sys.exit(f"failed: {', '.join(failed)}" if failed else 0)


if __name__ == "__main__":
    main()
