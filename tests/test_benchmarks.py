"""Every speed benchmark runs at a small size, and the page is made from what they print."""

import json
import math
import os
import runpy
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"

FEW = ["--cached-images", "8", "--train-images", "20", "--prior-images", "20", "--prior-vertices", "4"]  # of a device

# sizes below those of --quick, where those take seconds
SMALL = {
    "exact_heads": ["--vertices", "300"],
    "peers": ["--images", "60"],
    "priors": ["--few", "30", "--vertices", "8"],
    "company": ["--images", "60"],
    "full_size": ["--images", "60", "--vertices", "8"],
    "variants": ["--images", "100", "--features", "20", "--vertices", "60"],
    "gradient": ["--images", "160", "--vertices", "50"],
    "extract": ["--images", "10", "--batch-size", "5", "--cached-images", "16"],
    "store_read": [],
    "listing": [],
    "verifying": ["--images", "40", "--vertices", "60", "--rounds", "1"],
    "units": ["--units", "5", "--sets", "2", "--images", "0"],
    "metric": [],
    "blend": ["--vertices", "30", "--models", "3"],
    "stacking": ["--vertices", "200"],
    "memory": ["--vertices", "100"],
    "growth": [],
    "device": ["--device", "cpu", *FEW],
}
WHOLE = ("metric", "growth")  # run by the suite itself below


@pytest.fixture
def suite(monkeypatch, tmp_path):
    """Names of what the module defines, and an empty folder to run it in."""
    root = BENCHMARKS.parent
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # modules that benchmarks share are beside them
    monkeypatch.chdir(tmp_path)
    return runpy.run_path(str(BENCHMARKS / "suite.py"))


@pytest.fixture
def run(suite, monkeypatch):
    """Run the suite; what it leaves with."""

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["suite.py", *arguments])
        with pytest.raises(SystemExit) as left:
            suite["main"]()
        return left.value.code

    return call


def test_every_benchmark_of_the_suite_has_a_small_size(suite):
    assert SMALL.keys() == suite["BENCHMARKS"].keys()


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in SMALL if name not in WHOLE])
def test_a_benchmark_prints_figures_that_the_page_can_show(suite, monkeypatch, capfd, name):
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--quick", *SMALL[name]])
    runpy.run_path(str(BENCHMARKS / f"{name}.py"), run_name="__main__")
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    result = {"name": name, "seconds": 1.0, "failed": None, "figures": figures}
    page = suite["page"]({**DESCRIBED, "benchmarks": [result]}, [])
    assert figures
    for figure in figures:
        assert f"| {figure['what']} | {figure['against']} |" in page
        assert figure["note"] if figure["ratio"] is None else math.isfinite(figure["ratio"]), figure


@pytest.mark.slow
def test_the_figures_of_a_device_are_of_every_precision_and_name_the_card(suite, monkeypatch, capfd, pretended_cuda):
    """On a pretended device, whose times mean nothing: all parts run on it."""
    monkeypatch.setattr(sys, "argv", ["device.py", "--quick", *FEW])
    runpy.run_path(str(BENCHMARKS / "device.py"), run_name="__main__")
    figures = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert figures[0]["note"].startswith("pretended, 9 GB")
    assert all(figure["ratio"] > 0 for figure in figures[1:])
    precisions = [figure["what"].split()[2].strip(",") for figure in figures if figure["what"].startswith("extract")]
    assert precisions == ["float32", "tf32", "bfloat16", "float16"]
    assert all(figure["details"]["device_gb"] > 0 for figure in figures if figure["what"].startswith("a step"))


@pytest.mark.slow
def test_without_an_accelerator_nothing_is_measured_and_the_page_says_so(suite, monkeypatch, capfd):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["device.py"])
    runpy.run_path(str(BENCHMARKS / "device.py"), run_name="__main__")
    (figure,) = json.loads(capfd.readouterr().out.splitlines()[-1])
    assert "no accelerator here: nothing measured" in suite["row"](figure) and figure["ratio"] is None


@pytest.mark.parametrize(("name", "gmac"), [("convnext_base", 45.2), ("vit_small_patch16_224", 15.5)])
@pytest.mark.slow
def test_the_arithmetic_of_a_network_is_what_timm_publishes(suite, name, gmac):
    """At 384 px, multiplications with an addition each, from timm's model cards."""
    counts = runpy.run_path(str(BENCHMARKS / "hours.py"))["counts_of"](name, 384)
    assert counts.flops / 2e9 == pytest.approx(gmac, rel=0.01)
    assert 100 < counts.operations < counts.trained_operations / 2


def test_sections_of_some_benchmarks_are_replaced_on_a_page_that_is_there(run, tmp_path):
    figure = {"what": "a", "against": "b", "ratio": 2.0, "target": None, "at_most": True, "note": "", "details": {}}
    first, second = ({"name": name, "seconds": 1.0, "failed": None, "figures": [figure]} for name in WHOLE)
    path, page = tmp_path / "results.json", tmp_path / "benchmarks.md"

    def make(benchmarks, *only):
        path.write_text(json.dumps({**DESCRIBED, "benchmarks": benchmarks}))
        assert run("--from", "results.json", "--page", "benchmarks.md", *only) == 0
        return page.read_text()

    before = make([second])
    page.write_text(before + "\nRun beside other work.\n")
    changed = make([first, second | {"figures": [figure | {"ratio": 3.0}]}], "--only", ",".join(WHOLE))
    assert [line for line in changed.splitlines() if line.startswith("## ")] == ["## Metric", "## How cost grows"]
    assert "| a | b | 3 |" in changed and "| a | b | 2 |" in changed and "beside other work" not in changed
    assert changed.count("Run on 2026-01-01: a, 1 cores, 1 threads, no GPU") == 2
    again = make([first], "--only", "metric")
    assert again == changed


@pytest.mark.slow
def test_the_suite_runs_and_its_page_can_be_made_again(run, tmp_path):
    matplotlib = pytest.importorskip("matplotlib", reason="the page's plots need the plot extra")
    with matplotlib.rc_context():
        code = run("--quick", "--only", ",".join(WHOLE), "--out", "results.json", "--page", "docs/benchmarks.md")
    results = json.loads((tmp_path / "results.json").read_text())
    assert code == 0, results
    assert results["quick"] and results["machine"]["cores"] >= 1
    page = (tmp_path / "docs" / "benchmarks.md").read_text()
    assert "Quick sizes" in page
    assert [one["name"] for one in results["benchmarks"]] == list(WHOLE)
    for one in results["benchmarks"]:
        assert one["figures"] and one["failed"] is None, one
        for figure in one["figures"]:
            assert f"| {figure['what']} | {figure['against']} |" in page
    for plot in ("aims.svg", "growth.svg"):
        assert (tmp_path / "docs" / "benchmarks" / plot).stat().st_size > 1000
    with matplotlib.rc_context():
        assert run("--from", "results.json", "--page", "again/benchmarks.md") == 0
    assert (tmp_path / "again" / "benchmarks.md").read_text() == page


DESCRIBED = {
    "date": "2026-01-01",
    "quick": False,
    "machine": {"cpu": "a", "cores": 1, "threads": 1, "cuda": None, "python": "3", "torch": "2", "numpy": "2"},
}


def test_a_benchmark_that_fails_is_a_line_of_the_page(run, tmp_path):
    failed = [{"name": "metric", "seconds": 1.0, "failed": "MemoryError", "figures": []}]
    (tmp_path / "results.json").write_text(json.dumps({**DESCRIBED, "benchmarks": failed}))
    assert run("--from", "results.json", "--page", "benchmarks.md") == "failed: metric"
    assert "Failed: MemoryError" in (tmp_path / "benchmarks.md").read_text()


@pytest.mark.slow
def test_a_script_that_fails_is_told_apart_from_one_that_runs(suite, tmp_path):
    (tmp_path / "broken.py").write_text("raise MemoryError('too much')")
    result = suite["run"](str(tmp_path / "broken"), True)
    assert result["failed"] == "MemoryError: too much" and result["figures"] == []


def test_a_benchmark_that_is_none_is_refused(run, capfd):
    assert run("--only", "speed") == 2
    assert "expected some of exact_heads" in capfd.readouterr().err
