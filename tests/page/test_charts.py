"""Charts are whole inside a page: no address, no colour of their own for letters, ids that meet no other's."""

import re
import xml.etree.ElementTree as ET

import numpy as np
import pytest

from heads.page import charts
from heads.statistics.intervals import Estimate


def estimate(roi: str, model: str, mean: float) -> Estimate:
    return Estimate("all", "both", roi, model, "", "r", 10, mean, mean - 0.1, mean + 0.2)


CHARTS = {
    "scores": lambda: charts.scores_chart(
        [estimate(roi, model, 0.3) for roi in ("all", "V1<&") for model in "ab"],
        dict(zip("ab", charts.COLOURS, strict=False)),
        "mean r",
    ),
    "ceiling": lambda: charts.ceiling_chart(np.linspace(-1, 1, 50), np.linspace(0, 1, 50)),
    "histogram": lambda: charts.histogram(np.linspace(-1, 1, 50), "r", "histogram"),
    "shares": lambda: charts.shares_chart(["all", "V1"], np.array([[0.2, 0.8], [0.5, 0.5]]), charts.COLOURS[:2]),
    "pretrain": lambda: charts.learning_chart(
        {"fold 0": [((0.1, 0.3, 0.2), 2)], "fold 1": [((0.1,), None)]}, "pretrain"
    ),
}


@pytest.mark.parametrize("name", CHARTS)
def test_a_chart_stands_alone(name):
    svg = CHARTS[name]()
    root = ET.fromstring(svg)
    assert root.tag == "svg" and not re.search(r"https?:|<style|<metadata|#010203", svg)
    ids = [one.get("id") for one in root.iter() if one.get("id")]
    assert len(set(ids)) == len(ids) and all(one.startswith(f"{name}-") for one in ids)
    used = re.findall(r'(?:href="#|url\(#)([^")]*)', svg)
    assert set(used) <= set(ids)
    assert "currentColor" in svg and root.findall(".//text")


def texts(svg: str) -> list[str]:
    return [one.text or "" for one in ET.fromstring(svg).findall(".//text")]


def test_rows_are_named_and_names_are_text():
    assert {"all vertices", "V1<&"} <= set(texts(CHARTS["scores"]()))
    assert {"all vertices", "V1"} <= set(texts(CHARTS["shares"]()))


def test_a_dot_for_each_roi_and_model_with_its_interval():
    svg = CHARTS["scores"]()
    assert all(svg.count(charts.COLOURS[number]) >= 2 for number in range(2)) and charts.COLOURS[2] not in svg


def test_a_ring_is_at_the_epoch_that_is_kept():
    kept = charts.learning_chart({"a": [((0.1, 0.3), 2)]}, "finetune")
    none = charts.learning_chart({"a": [((0.1, 0.3), None)]}, "finetune")
    assert len(kept) > len(none)
