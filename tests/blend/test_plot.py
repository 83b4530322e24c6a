"""The picture of weights: drawn where matplotlib is, means over the vertices of all subjects."""

import pytest
from PIL import Image

import heads.blend.plot
from heads.blend.plot import can_draw, new_figure, plot_weights
from support.blends import made_up, subject_of

SHARES = {"lh": {"all": {"a": 0.25, "b": 0.75}, "V1": {"a": 1.0, "b": 0.0}}, "rh": {"all": {"a": 0.5, "b": 0.5}}}


@pytest.fixture
def subjects(tmp_path):
    return {name: subject_of(tmp_path / name, made_up()[1], name=name) for name in ("subj01", "subj02")}


@pytest.mark.slow
def test_bars_are_means_over_vertices_and_subjects(subjects, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(heads.blend.plot, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[0])
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
def test_many_models_share_the_last_colour(subjects, tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    figures = []
    monkeypatch.setattr(heads.blend.plot, "new_figure", lambda *size: figures.append(new_figure(*size)) or figures[0])
    equal = {f"model {number}": 1 / 20 for number in range(20)}
    plot_weights(tmp_path / "weights.png", {"subj01": {"lh": {"all": equal}, "rh": {"all": equal}}}, subjects)
    (axis,) = figures[0].axes
    widths = [bars[0].get_width() for bars in axis.containers]
    assert len(widths) == 13 and widths == pytest.approx([0.05] * 12 + [0.4])
    assert axis.containers[-1].get_label() == "8 others"


def test_without_matplotlib_it_is_said_and_nothing_is_drawn(subjects, tmp_path, said, monkeypatch):
    monkeypatch.setattr(heads.blend.plot, "find_spec", lambda _: None)
    assert not can_draw("anything")
    plot_weights(tmp_path / "weights.png", {"subj01": SHARES}, subjects)
    assert not (tmp_path / "weights.png").exists()
    assert said[-1] == "no picture of the weights: matplotlib is not installed; it comes with the extra 'plot'"
