"""Settings of an import that cannot work are refused before a file is opened."""

from pathlib import Path

import pytest

from featcache.dataset.importing.config import ImportConfig
from featcache.errors import ConfigError


@pytest.mark.parametrize(
    ("subject", "name"), [("1", "subj01"), ("12", "subj12"), ("0", "subj00"), ("anna", "anna"), ("-1", "-1")]
)
def test_numbers_are_named_as_the_challenge_names_its_subjects_and_names_stay(subject, name):
    assert ImportConfig(responses=("a.npy",), subject=subject).subject_name == name


def test_responses_are_needed_in_one_of_three_ways():
    for given in ({"responses": ("a.npy",)}, {"volume": ("a.nii",)}, {"nsd": Path("nsd")}):
        ImportConfig(**given)
    with pytest.raises(ConfigError, match="--responses: expected a file of responses; found none"):
        ImportConfig(images="photos")


@pytest.mark.parametrize(
    "given",
    [
        {"images": "photos"},
        {"test_images": "photos"},
        {"table": Path("t.csv")},
        {"id_column": "id"},
        {"split_column": "split"},
        {"session_column": "run"},
        {"responses": ("a.npy",)},
        {"volume": ("a.nii",)},
        {"test_responses": ("a.npy",)},
        {"ceiling": ("c.npy",)},
        {"ncsnr": ("n.npy",)},
    ],
    ids=lambda given: next(iter(given)),
)
def test_nsd_names_every_file_itself(given):
    with pytest.raises(ConfigError, match=f"--{next(iter(given)).replace('_', '-')}: expected nothing beside --nsd"):
        ImportConfig(nsd=Path("nsd"), **given)
