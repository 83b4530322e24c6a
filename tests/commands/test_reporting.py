"""report: where it writes, what it says, and what it refuses."""

import pytest

import cli
from support.commands import fails, run

pytest.importorskip("nilearn", reason="the extra 'report' is not installed")


def test_a_page_is_written_where_it_is_asked_for(filled, tmp_path, capfd):
    result = run(capfd, "report", "--out", str(tmp_path / "page.html"), "--subject", "1", "--no-images")
    assert result["path"] == str(tmp_path / "page.html") and result["bytes"] == (tmp_path / "page.html").stat().st_size
    assert set(result["missing"]) == {"rois", "learning"} and "scores" in result["sections"]
    assert "Scores of subj02" not in (tmp_path / "page.html").read_text() and not (filled / "report.html").exists()
    assert cli.run(["report"]) == 0
    assert (filled / "report.html").is_file() and "without rois, learning" in capfd.readouterr().out


def test_an_empty_work_folder_is_one_line(tiny, tmp_path, capfd):
    line = fails(capfd, "report", "--data", str(tiny), "--work", str(tmp_path / "work"))
    assert "run 'extract' first" in line and not (tmp_path / "work").exists()
