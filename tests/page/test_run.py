"""The page has what the work folder has, says what is missing, keeps to its size, and is safe with any name."""

import itertools
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from featcache.errors import ConfigError, StoreError
from featcache.workdir import Workdir
from heads.page import run as page_of
from heads.page.run import MOST_BYTES, TITLES, write_report
from heads.scores.by_roi import every_summary
from heads.statistics.sources import find_scored
from support.reported import Outline, Reported

WITHOUT_TRAINING = [name for name in TITLES if name != "learning"]


def test_scores_are_those_of_the_metrics(reported: Reported, outline: Outline):
    from heads.page.measures import measure

    scored = find_scored(reported.dataset.subjects, reported.work)
    measured = [measure(subject, of_subject, 5) for subject, of_subject in scored.items()]
    names = [re.sub(r"^M\d+ ", "", item) for item in re.findall(r"M\d+ [^\n]+", outline.text)][
        : len(measured[0].models)
    ]
    assert {*names, "blend"} == set(measured[0].r)
    scores = {name: [score for one in measured for score in one.scores(name)] for name in [*names, "blend"]}
    means = [np.mean([score.r.mean() for score in scores[name]]) for name in names]
    assert means == sorted(means, reverse=True)
    header = next(row for row in outline.rows if row[0] == "ROI")
    body = outline.rows[outline.rows.index(header) + 1 :]
    for roi, label in (("all", "all vertices"), ("early", "early")):
        row = next(row for row in body if row[0] == label)
        for column, name in enumerate(["blend", *names]):
            found = every_summary(scores[name])
            (whole,) = [one for one in found if (one.subject, one.surface, one.roi) == ("all", "both", roi)]
            cell = row[header.index("blend") + column]
            assert cell.startswith(f"{whole.mean_r:.3f} (") and f"{whole.accuracy:.1f} %" in cell
            assert row[1] == f"{whole.n_vertices:,}"


def test_every_part_is_there_or_said_to_be_missing(reported: Reported, outline: Outline):
    sections = [attributes["id"] for attributes in outline.named("section")]
    assert sections == ["models", *TITLES]
    assert "No backbone was trained" in outline.text and "pretrain, then finetune" in outline.text
    assert len(reported.html.encode()) <= MOST_BYTES
    levels = [int(tag[1]) for tag, _ in outline.tags if re.fullmatch(r"h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(after <= before + 1 for before, after in itertools.pairwise(levels))
    assert len(outline.named("main")) == len(outline.named("header")) == len(outline.named("nav")) == 1


def test_nothing_is_looked_up_outside_the_page(reported: Reported, outline: Outline):
    for _, attributes in outline.tags:
        for name in ("src", "href", "srcset", "action", "data"):
            if (value := attributes.get(name)) is not None:
                assert value.startswith(("#", "data:")), value
    for text in re.findall(r"<style>.*?</style>", reported.html, re.DOTALL):
        assert "url(" not in text and "@import" not in text
    assert all(image.get("alt") for image in outline.named("img"))
    ids = [attributes["id"] for _, attributes in outline.tags if "id" in attributes]
    assert len(set(ids)) == len(ids)
    assert {one["href"] for one in outline.named("a")} <= {f"#{name}" for name in ids}


def test_names_are_text_whatever_they_are(reported: Reported, tmp_path: Path):
    bad = "<script>alert(1)</script>"
    dataset = reported.dataset
    rois = {surface: {bad: np.full(n, True)} for surface, n in dataset.subjects[0].n_vertices.items()}
    subjects = tuple(replace(subject, rois=rois) for subject in dataset.subjects[:1])
    dataset = replace(dataset, root=Path(f'/data/"{bad}'), subjects=subjects)
    page = write_report(dataset, reported.work, tmp_path / "page.html")
    html = page.path.read_text()
    assert "<script>alert" not in html and "&lt;script&gt;alert(1)" in html
    assert len(Outline(html).named("script")) == len(Outline(reported.html).named("script"))


def test_an_empty_folder_is_refused(reported: Reported, tmp_path: Path):
    for work in (tmp_path, tmp_path / "missing"):
        with pytest.raises(StoreError, match="run 'extract' first"):
            write_report(reported.dataset, work)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("gone", "missing", "command"),
    [
        (["predictions.zarr", "submission"], WITHOUT_TRAINING[:-1], "fit-heads"),
        (["submission"], ["rois"], "blend"),
    ],
)
def test_half_finished_work_says_which_command_goes_on(reported: Reported, tmp_path: Path, gone, missing, command):
    work = tmp_path / "work"
    shutil.copytree(reported.work, work, ignore=shutil.ignore_patterns(*gone, "report.html"))
    page = write_report(reported.dataset, work)
    assert sorted(page.missing) == sorted([*missing, "learning"])
    assert [*page.sections] == [name for name in TITLES if name not in page.missing]
    assert f"<code>{command}</code>" in page.path.read_text()


def test_predictions_of_some_images_are_not_taken(reported: Reported, tmp_path: Path):
    work = Path(shutil.copytree(reported.work, tmp_path / "work"))
    for store in Workdir(work).predictions.glob("*"):
        (store / "committed.json").unlink()
    page = write_report(reported.dataset, work)
    assert "scores" in page.missing and "fit-heads" in page.path.read_text()


def test_subjects_without_ceilings_count_in_r_alone(reported: Reported, tmp_path: Path):
    dataset = reported.dataset
    without = {surface: None for surface in dataset.subjects[0].surfaces}
    some = replace(dataset, subjects=(replace(dataset.subjects[0], noise_ceiling=without), dataset.subjects[1]))
    html = write_report(some, reported.work, tmp_path / "some.html").path.read_text()
    assert "known of subj01: these count in r alone" in html and "Noise-normalised accuracy" in html
    none = replace(dataset, subjects=tuple(replace(one, noise_ceiling=without) for one in dataset.subjects))
    html = write_report(none, reported.work, tmp_path / "none.html").path.read_text()
    assert "No noise ceilings are known" in html and "Noise-normalised" not in html and "of mean r" in html


def test_without_surfaces_there_are_no_maps_and_all_else(reported: Reported, tmp_path: Path):
    dataset = reported.dataset
    nowhere = {surface: None for surface in dataset.subjects[0].surfaces}
    flat = replace(dataset, subjects=tuple(replace(one, fsaverage=nowhere) for one in dataset.subjects))
    page = write_report(flat, reported.work, tmp_path / "page.html")
    assert set(page.missing) == {"maps", "learning"} and "fsaverage" in page.missing["maps"]
    assert page.n_bytes < 700_000 and 'id="data-library"' not in page.path.read_text()
    places = {surface: np.zeros((n, 3), np.float32) for surface, n in dataset.subjects[0].n_vertices.items()}
    flat = replace(flat, subjects=tuple(replace(one, positions=places) for one in flat.subjects))
    assert "positions of the vertices" in write_report(flat, reported.work, tmp_path / "page.html").missing["maps"]


def test_pictures_are_left_out_where_asked(reported: Reported, tmp_path: Path, outline: Outline):
    page = write_report(reported.dataset, reported.work, tmp_path / "page.html", images=False)
    html = page.path.read_text()
    assert "Training image" in reported.html and "Training image" not in html and "as asked" in html
    assert "images" in page.sections


def test_a_page_that_would_be_too_large_shows_less(reported: Reported, tmp_path: Path, monkeypatch):
    monkeypatch.setattr(page_of, "MOST_BYTES", limit := len(reported.html.encode()) - 20_000)
    page = write_report(reported.dataset, reported.work, tmp_path / "page.html")
    assert page.n_bytes <= limit
    html = page.path.read_text()
    assert "stay below 5 MB" in html and len(html) < len(reported.html)
    monkeypatch.setattr(page_of, "MOST_BYTES", 1_000_000)
    with pytest.raises(StoreError, match="--subject"):
        write_report(reported.dataset, reported.work, tmp_path / "small.html")
    assert not (tmp_path / "small.html").exists()


def test_without_the_extra_one_line_says_what_to_install(reported: Reported, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "nilearn", None)
    with pytest.raises(ConfigError, match=r"pip install 'featcache\[report\]'"):
        write_report(reported.dataset, reported.work)


def test_a_damaged_blend_costs_no_other_part(reported: Reported, tmp_path: Path):
    work = Path(shutil.copytree(reported.work, tmp_path / "work"))
    Workdir(work).saved_blend.write_bytes(b"no tensors")
    Workdir(work).blend_weights.write_text("{")
    page = write_report(reported.dataset, work)
    assert set(page.missing) == {"learning", "rois"}


def test_a_blend_of_other_subjects_is_told_apart(reported: Reported, tmp_path: Path):
    work = Path(shutil.copytree(reported.work, tmp_path / "work"))
    weights = json.loads(Workdir(work).blend_weights.read_text())
    weights["weights"] = {"nobody": {}}
    Workdir(work).blend_weights.write_text(json.dumps(weights))
    assert "rois" in write_report(reported.dataset, work).missing


def test_eight_subjects_stay_within_the_limit(reported: Reported, tmp_path: Path, monkeypatch):
    (subject, scored), *_ = find_scored(reported.dataset.subjects, reported.work).items()
    subjects = tuple(replace(subject, name=f"subj{number:02d}") for number in range(1, 9))
    monkeypatch.setattr(page_of, "find_scored", lambda *_: dict.fromkeys(subjects, scored))
    page = write_report(replace(reported.dataset, subjects=subjects), reported.work, tmp_path / "page.html")
    assert page.n_bytes <= MOST_BYTES == 5_000_000
    html = page.path.read_text()
    assert all(f"Score, {one.name}" in html and f"Scores of {one.name}" in html for one in subjects)
