"""Ceilings are told from percent and from ratios of signal to noise, as far as their values and names can tell."""

from pathlib import Path

import numpy as np
import pytest

from featcache.dataset.ceilings import is_named_ncsnr, is_percent, note_on_unit
from featcache.dataset.importing.responses import as_fractions
from featcache.errors import DataError

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "real" / "noise_ceiling"


def ncsnr_of(fractions: np.ndarray) -> np.ndarray:
    """The ratios that ceilings at three trials were made from."""
    return np.sqrt(fractions / 3 / (1 - fractions))


@pytest.mark.skipif(not PUBLISHED.is_dir(), reason=f"no published ceilings in {PUBLISHED}")
def test_published_ceilings_are_told_from_the_ratios_that_they_are_made_from():
    files = sorted(PUBLISHED.glob("subj*/?h.npy"))
    assert len(files) == 16
    for path in files:
        percent = np.load(path)
        assert is_percent(percent.max()) and "ncsnr" not in note_on_unit([percent], 100)
        assert "ncsnr" not in note_on_unit([percent / 100], 1)
        ratios = ncsnr_of(percent / 100)
        if ratios.max() > 1:
            with pytest.raises(DataError, match=r"found 1.* at vertex .*ncsnr are no ceilings"):
                as_fractions(ratios, path)
        assert "they are distributed as ncsnr are" in note_on_unit([ratios], 1)


def test_how_ceilings_were_read_is_said_with_what_tells_a_wrong_unit():
    """Percent of less than 1 cannot be told from fractions: the line says what they were taken for."""
    assert (
        note_on_unit([np.array([0, 0.5, 0.8])], 1)
        == "read as fractions of variance, not percent (median 0.5, largest 0.8)"
    )
    assert note_on_unit([np.array([0, 50, 80])], 100) == "read as percent (median 50, largest 80)"
    assert note_on_unit([np.array([np.nan])], 1) == "of which none is a number"


@pytest.mark.parametrize(
    ("name", "is_ratio"),
    [("ncsnr.nii.gz", True), ("lh.NCSNR.mgh", True), ("ceiling_from_ncsnr.npy", False), ("noise_ceiling", False)],
)
def test_names_that_say_ratio(name, is_ratio):
    assert is_named_ncsnr(name) == is_ratio
