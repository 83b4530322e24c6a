"""compare: layers, backbones and named bands on the command line and in a recipe."""

import csv

import pytest

from support.commands import SMALL, fails, run


@pytest.mark.slow
def test_bands_are_compared_from_images_on_and_in_a_recipe(tiny, tmp_path, capfd, monkeypatch):
    work = tmp_path / "work"
    for name, value in (SMALL | {"FEATCACHE_DATA": str(tiny), "FEATCACHE_WORK": str(work)}).items():
        monkeypatch.setenv(name, value)
    recipe = tmp_path / "r.toml"
    recipe.write_text(
        '[[steps]]\nrun = "extract"\n[[steps]]\nrun = "compare"\nfolds = 2\ncandidates = 1\n'
        'features = ["deep=*:pooled", "rest=*:layer1"]\n'
    )
    layers = run(capfd, "extract")["stores"]
    assert layers
    found = run(capfd, "compare", "--folds", "2", "--candidates", "1", "--per", "surface")
    bands = list(found["bands"])
    assert "pooled" in bands and len(bands) > 1
    both = next(row for row in found["rows"] if (row["subject"], row["surface"], row["roi"]) == ("all", "both", "all"))
    shares = both["variance"]
    unique = sum(shares["unique"][band]["value"] for band in bands)
    assert shares["shared"]["value"] == pytest.approx(shares["full"]["value"] - unique)
    with (work / "compared").glob("layers-*/shares.csv").__next__().open() as file:
        assert {row["band"] for row in csv.DictReader(file)} == {"", *bands}
    recipe.write_text(recipe.read_text().replace("layer1", next(band for band in bands if band != "pooled")))
    steps = run(capfd, "run", str(recipe))["steps"]
    assert list(steps[-1]["bands"]) == ["deep", "rest"]
    assert "two bands or more" in fails(capfd, "compare", "--features", "backbones")
    assert "No such option" in fails(capfd, "compare", "--reference", "frozen, refitted")
