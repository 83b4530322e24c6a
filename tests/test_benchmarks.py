"""Every speed benchmark runs at its quick size, and the page is made from what they print."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"


def run(*arguments, cwd):
    return subprocess.run(
        [sys.executable, str(BENCHMARKS / "suite.py"), *map(str, arguments)], cwd=cwd, capture_output=True, text=True
    )


def test_the_suite_runs_and_its_page_can_be_made_again(tmp_path):
    pytest.importorskip("matplotlib", reason="the page's plots need the plot extra")
    done = run("--quick", "--out", "results.json", "--page", "docs/benchmarks.md", cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    results = json.loads((tmp_path / "results.json").read_text())
    assert results["quick"] and results["machine"]["cores"] >= 1
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "Quick sizes" in page
    for one in results["benchmarks"]:
        assert one["figures"] and one["failed"] is None, one
        for figure in one["figures"]:
            assert f"| {figure['what']} | {figure['against']} |" in page
            assert figure["note"] if figure["ratio"] is None else math.isfinite(figure["ratio"]), figure
    for plot in ("aims.svg", "growth.svg"):
        assert (tmp_path / "docs" / "benchmarks" / plot).stat().st_size > 1000
    again = run("--from", "results.json", "--page", "again/benchmarks.md", cwd=tmp_path)
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "again" / "benchmarks.md").read_text() == page


def test_a_benchmark_that_fails_is_a_line_of_the_page(tmp_path):
    results = {
        "date": "2026-01-01",
        "quick": False,
        "machine": {"cpu": "a", "cores": 1, "threads": 1, "cuda": None, "python": "3", "torch": "2", "numpy": "2"},
        "benchmarks": [{"name": "metric", "seconds": 1.0, "failed": "MemoryError", "figures": []}],
    }
    (tmp_path / "results.json").write_text(json.dumps(results))
    done = run("--from", "results.json", "--page", "benchmarks.md", cwd=tmp_path)
    assert done.returncode == 1 and "failed: metric" in done.stderr
    assert "Failed: MemoryError" in (tmp_path / "benchmarks.md").read_text()


def test_a_benchmark_that_is_none_is_refused(tmp_path):
    done = run("--only", "speed", cwd=tmp_path)
    assert done.returncode == 2 and "expected some of exact_heads" in done.stderr
