"""Settings of an import: which files hold what."""

import re
from dataclasses import dataclass
from pathlib import Path

from featcache.config import at_least, one_of, option
from featcache.errors import ConfigError

DEFAULT_SURFACE = "all"  # name of a surface that was given none
TESTS = ("shared", "none")
_NAMED = "NAME=FILE names the surface; FILE alone is the surface 'all'."


@dataclass(frozen=True, kw_only=True)
class ImportConfig:
    """The files of one subject. A file may be followed by ':' and the array in it, as in 'betas.h5:betas'."""

    images: str | None = option(
        None, "Folder of the images, in the order of their names, or a file with an array of pictures.", "Images"
    )
    test_images: str | None = option(None, "The same, of images to predict and not to fit to.", "Images")
    table: Path | None = option(
        None, "CSV, TSV or Parquet file with a row for each row of the responses, which says what was shown.", "Images"
    )
    image_column: str = option(
        "image", "Column of --table: file of the image, or its row, from 0, where --images is an array.", "Images"
    )
    id_column: str | None = option(
        None,
        "Column of --table: what each picture is called, the same for all subjects.",
        "Images",
        shown="ids are made from the pixels",
    )
    split_column: str | None = option(None, "Column of --table: 'train' or 'test'.", "Images")
    session_column: str | None = option(
        None, "Column of --table: session or run of each row.", "Images", shown="each file of responses is a session"
    )
    responses: tuple[str, ...] = option(
        (),
        f"Responses, a row for each image or trial, a column for each vertex. {_NAMED} Give it once for each session.",
        "Responses",
    )
    volume: tuple[str, ...] = option(
        (), "Responses as NIfTI, MGH, GIFTI or CIFTI, a volume for each image or trial; as --responses.", "Responses"
    )
    mask: tuple[str, ...] = option(
        (),
        "Volume that is not zero at the voxels to read; for --volume and --nsd. For --nsd, also the name of one of its "
        "ROIs, or 'all'.",
        "Responses",
        shown="all voxels; for --nsd, nsdgeneral",
    )
    test_responses: tuple[str, ...] = option((), "Responses to --test-images, to score predictions.", "Responses")
    test_trials: int | None = option(
        None,
        "Trials that each row of responses to test images is the mean of, for their noise ceiling.",
        "Responses",
        shown="not known where training images have repeats and test images have none",
    )
    roi: tuple[str, ...] = option(
        (),
        "ROIs: a table with a row for each vertex, masks or labels in arrays, or label volumes. For --nsd, also the "
        "name of more of its ROIs, such as Kastner2015.",
        "Responses",
    )
    ceiling: tuple[str, ...] = option(
        (), "Noise ceiling of each vertex, in percent or as a fraction.", "Responses", shown="from repeats"
    )
    ncsnr: tuple[str, ...] = option(
        (), "Noise-ceiling signal-to-noise ratio of each vertex, as NSD has it.", "Responses"
    )
    zscore: bool | None = option(
        None,
        "Whether each vertex is z-scored within each session.",
        "Responses",
        name="zscore/--no-zscore",
        shown="on where sessions are known",
    )
    nsd: Path | None = option(None, "Folder of the Natural Scenes Dataset, as published.", "Natural Scenes Dataset")
    betas: str = option(
        "func1pt8mm/betas_fithrf_GLMdenoise_RR", "Kind of the responses of NSD.", "Natural Scenes Dataset"
    )
    test: str = option(
        TESTS[0],
        "Test images of NSD: shared (of the 1,000 that all subjects were to see) or none.",
        "Natural Scenes Dataset",
    )
    subject: str = option("1", "Name or number of the subject.", "Subject")

    def __post_init__(self) -> None:
        if self.test_trials is not None:
            at_least("test-trials", self.test_trials, 1)
        one_of("test", self.test, TESTS)
        if self.nsd is None and not self.responses and not self.volume:
            raise ConfigError(
                "--responses",
                expected="a file of responses",
                found="none",
                remedy="give --responses, --volume or --nsd",
            )
        if self.nsd is not None and (given := [name for name in _OF_FILES if getattr(self, name)]):
            raise ConfigError(
                f"--{given[0].replace('_', '-')}",
                expected="nothing beside --nsd, which names every file",
                found=f"{getattr(self, given[0])}",
                remedy="leave one of the two out",
            )

    @property
    def subject_name(self) -> str:
        """Name of the subject; 'subj01' for 1."""
        return f"subj{int(self.subject):02d}" if re.fullmatch("[0-9]{1,9}", self.subject) else self.subject


_OF_FILES = (
    "images",
    "test_images",
    "table",
    "id_column",
    "split_column",
    "session_column",
    "responses",
    "volume",
    "test_responses",
    "ceiling",
    "ncsnr",
)
