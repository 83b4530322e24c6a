"""Pictures of weights and scores: drawn where matplotlib is, of the numbers that they are given."""

import numpy as np
import pytest
from PIL import Image

import heads.blend.plot
from heads.blend.plot import can_draw, new_figure, plot_arms, plot_scores, plot_weights
from heads.scores.metrics import VertexScores
from support.blends import made_up, subject_of

SHARES = {"lh": {"all": {"a": 0.25, "b": 0.75}, "V1": {"a": 1.0, "b": 0.0}}, "rh": {"all": {"a": 0.5, "b": 0.5}}}


@pytest.fixture
def subjects(tmp_path):
    return {name: subject_of(tmp_path / name, made_up()[1], name=name) for name in ("subj01", "subj02")}


@pytest.fixture
def figures(monkeypatch):
    """The figures that are drawn."""
    pytest.importorskip("matplotlib")
    drawn = []
    monkeypatch.setattr(heads.blend.plot, "new_figure", lambda *size: drawn.append(new_figure(*size)) or drawn[-1])
    return drawn


@pytest.mark.slow
def test_bars_are_means_over_vertices_and_subjects(subjects, tmp_path, figures):
    other = {"lh": {"all": {"a": 1.0}}, "rh": {"all": {"a": 1.0}}}
    plot_weights(tmp_path / "weights.png", {"subj01": SHARES, "subj02": other}, subjects)
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_yticklabels()] == ["all", "V1"]
    first, second = ([bar.get_width() for bar in bars] for bars in axis.containers)
    # 4 vertices on the left and 3 on the right; the second subject has model a alone
    assert first == pytest.approx([(4 * 0.25 + 3 * 0.5 + 7) / 14, 1])
    assert second == pytest.approx([(4 * 0.75 + 3 * 0.5) / 14, 0])
    with Image.open(tmp_path / "weights.png") as image:
        assert image.format == "PNG" and min(image.size) > 100


@pytest.mark.slow
def test_many_models_share_the_last_colour(subjects, tmp_path, figures):
    equal = {f"model {number}": 1 / 20 for number in range(20)}
    plot_weights(tmp_path / "weights.png", {"subj01": {"lh": {"all": equal}, "rh": {"all": equal}}}, subjects)
    (axis,) = figures[0].axes
    widths = [bars[0].get_width() for bars in axis.containers]
    assert len(widths) == 13 and widths == pytest.approx([0.05] * 12 + [0.4])
    assert axis.containers[-1].get_label() == "8 others"


@pytest.mark.slow
def test_words_that_all_models_have_are_said_once(subjects, tmp_path, figures):
    names = [f"tf_efficientnet_lite{n}@224 5 layers 7x7 linear ridge" for n in range(2)]
    plot_weights(tmp_path / "weights.png", {"subj01": {"lh": {"all": dict.fromkeys(names, 0.5)}}}, subjects)
    (legend,) = figures[0].legends
    assert legend.get_title().get_text() == "all models: 5 layers 7x7 linear ridge"
    assert [text.get_text() for text in legend.get_texts()] == [name.split(" ")[0] for name in names]


def heights(axis):
    """{label: heights of the bars that have it}"""
    return {
        bars.get_label(): pytest.approx([bar.get_height() for bar in bars], nan_ok=True) for bars in axis.containers
    }


@pytest.mark.slow
@pytest.mark.parametrize("ceiling", [None, 0.5])
def test_a_bar_of_an_roi_is_the_mean_over_the_vertices_of_all_subjects_and_a_dot_is_one_of_them(
    tmp_path, figures, ceiling
):
    roi = {"right": np.zeros(3, bool), "V1": np.array([True, True, False])}  # the first is on the right alone
    r = {"subj01": np.array([0.1, 0.3, 0.7]), "subj02": np.array([0.5, 0.5, 0.5])}
    ceilings = None if ceiling is None else np.full(3, ceiling)
    scores = [VertexScores(subject, "lh", values, ceilings, roi) for subject, values in r.items()]
    one = None if ceiling is None else np.array([ceiling])
    scores.append(VertexScores("subj01", "rh", np.array([0.6]), one, {"right": np.ones(1, bool)}))
    plot_scores(tmp_path / "scores.png", scores)
    (axis,) = figures[0].axes
    shown = (lambda r: np.array(r)) if ceiling is None else (lambda r: 100 * np.array(r) ** 2 / ceiling)
    mean = [shown([0.1, 0.3, 0.5, 0.5]).mean(), shown([0.1, 0.3, 0.7, 0.5, 0.5, 0.5]).mean()]
    assert [label.get_text() for label in axis.get_xticklabels()] == ["right", "V1", "all"]
    assert heights(axis) == {"lh": [np.nan, *mean], "rh": [shown([0.6])[0], np.nan, shown([0.6])[0]]}
    dots = [pytest.approx(line.get_ydata()[1:]) for line in axis.lines if line.get_marker() == "."]
    assert (shown([0.1, 0.3]).mean(), shown([0.1, 0.3, 0.7]).mean()) in dots
    assert axis.get_ylabel() == ("mean r" if ceiling is None else "noise-normalised accuracy, %")


@pytest.mark.slow
def test_an_arm_has_a_bar_for_each_subject_and_one_for_their_mean(tmp_path, figures):
    plot_arms(tmp_path / "arms.png", {"stage 2": {"subj01": 0.2, "subj02": 0.4}, "both": {"subj01": 0.6}})
    (axis,) = figures[0].axes
    assert [label.get_text() for label in axis.get_xticklabels()] == ["subj01", "subj02", "mean"]
    assert heights(axis) == {"stage 2": [0.2, 0.4, 0.3], "both": [0.6, np.nan, 0.6]}


def test_without_matplotlib_it_is_said_and_nothing_is_drawn(subjects, tmp_path, said, monkeypatch):
    monkeypatch.setattr(heads.blend.plot, "find_spec", lambda _: None)
    assert not can_draw("anything")
    plot_weights(tmp_path / "weights.png", {"subj01": SHARES}, subjects)
    assert not (tmp_path / "weights.png").exists()
    assert said[-1] == "no picture of the weights: matplotlib is not installed; it comes with the extra 'plot'"
