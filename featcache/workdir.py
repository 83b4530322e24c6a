"""Every folder and file under --work: the one place that knows their names, and that keeps them under it."""

import re
from dataclasses import dataclass
from pathlib import Path

from featcache.errors import StoreError

CHALLENGE = Path("data/challenge")  # where the challenge's tree is looked for

WORK = Path("work")

_OUTSIDE = re.compile(r"[/\\\x00-\x1f\x7f]|^\.|^$")  # separators, control characters, hidden names, no name


def is_file_name(name: str) -> bool:
    """Whether a name is that of one visible file of a folder, whatever text it was made from."""
    return not _OUTSIDE.search(name) and len(name.encode(errors="replace")) <= 255


def inside(folder: Path, name: str) -> Path:
    """The path of a file in a folder, by a name that may be made from text that was read.

    Raises StoreError for a name that leads out of the folder, or that no file can have.
    """
    if not is_file_name(name):
        raise StoreError(
            folder,
            expected="names of files, without separators and of at most 255 bytes",
            found=repr(name[:80]),
            remedy="look for a file that something else than featcache wrote, and remove it",
        )
    return folder / name


@dataclass(frozen=True)
class Workdir:
    """The folder of --work, in which the stages find what earlier stages wrote. Nothing here touches the disk."""

    root: Path

    @property
    def journal(self) -> Path:
        """Record of every command that wrote to the work folder: a JSON object a line."""
        return self.root / "journal.jsonl"

    @property
    def units(self) -> Path:
        """Folder of what several processes that share the work know of its units: leases, failures, records, logs."""
        return self.root / "units"

    @property
    def report(self) -> Path:
        """The page that `report` writes."""
        return self.root / "report.html"

    @property
    def dataset(self) -> Path:
        """Folder of imported subjects, in the form of `featcache.dataset.folder`."""
        return self.root / "dataset"

    @property
    def index(self) -> Path:
        """Folder of files that remember the digests of images and responses, and what pictures look like."""
        return self.root / "index"

    def image_index(self, subject: str) -> Path:
        """Remembered digests of a subject's image files."""
        return inside(self.index, f"{subject}.json")

    def response_index(self, subject: str) -> Path:
        """Remembered digests of a subject's response files."""
        return inside(self.index, f"{subject}-responses.json")

    def checked_responses(self, subject: str) -> Path:
        """Digest of the responses of a subject that were looked through, and found fit to be used."""
        return inside(self.index, f"{subject}-checked.json")

    def picture_index(self, subject: str) -> Path:
        """Remembered looks of a subject's pictures: their numbers, perceptual hashes and thumbnails."""
        return inside(self.index, f"{subject}-pictures.npz")

    def import_index(self, subject: str) -> Path:
        """Remembered digests of the files that a subject was imported from."""
        return inside(self.index, f"{subject}-imported.json")

    def image_list(self, subject: str, fingerprint: str) -> Path:
        """Ids and digests of the images that a subject had, by the digests with which keys name them."""
        return inside(self.root / "images", f"{subject}-{fingerprint}.json")

    @property
    def splits(self) -> Path:
        """Folder of the splits that stages used, but that by image id: JSON files of groups of images."""
        return self.root / "splits"

    def split(self, digest: str) -> Path:
        """Groups of a split, by the digest that keys name it with."""
        return inside(self.splits, f"{digest}.json")

    def clusters(self, fingerprint: str) -> Path:
        """Groups of images that look alike, by what decides them."""
        return inside(self.splits, f"cluster-{fingerprint}.json")

    @property
    def pixels(self) -> Path:
        """Folder of decoded images: a .npy file for each subject and size, and a .json record beside it."""
        return self.root / "pixels"

    @property
    def checkpoints(self) -> Path:
        """Folder of trained backbones: a folder for each stage, fold and, in the second stage, subject."""
        return self.root / "checkpoints"

    @property
    def features(self) -> Path:
        """Folder of feature stores: one for each subject and backbone, or each fold of a trained backbone."""
        return self.root / "features.zarr"

    @property
    def predictions(self) -> Path:
        """Folder of prediction stores: one for each subject and model."""
        return self.root / "predictions.zarr"

    @property
    def heads(self) -> Path:
        """Folder of the weights of fitted heads: a file for each prediction store."""
        return self.root / "heads"

    def head_weights(self, store: str) -> Path:
        """Weights of the heads that made a prediction store, by the name of that store."""
        return inside(self.heads, f"{store}.safetensors")

    @property
    def maps(self) -> Path:
        """Folder of maps of what heads read: .npz, .csv and .png files, named by prediction store."""
        return self.root / "maps"

    @property
    def trainings(self) -> Path:
        """Folder of the last table of trainings: the three files below."""
        return self.root / "trainings"

    @property
    def training_arms(self) -> Path:
        """Table of arms, with differences and intervals."""
        return self.trainings / "arms.csv"

    @property
    def training_values(self) -> Path:
        """Table of the score of each arm, subject and seed."""
        return self.trainings / "values.csv"

    @property
    def trainings_picture(self) -> Path:
        """Scores of the arms as a picture, where matplotlib is installed."""
        return self.trainings / "arms.png"

    @property
    def compared(self) -> Path:
        """Folder of comparisons of feature spaces: a folder for each, by its bands and settings."""
        return self.root / "compared"

    def comparison(self, name: str) -> Path:
        """Folder of one comparison: the files below, and one of vertices for each subject."""
        return inside(self.compared, name)

    def compared_subject(self, name: str, subject: str) -> Path:
        """Shares of variance of a subject's vertices, with what intervals of ROIs are computed from."""
        return inside(self.comparison(name), f"{subject}.npz")

    def compared_shares(self, name: str) -> Path:
        """Table of shares of variance by subject, surface and ROI, with intervals."""
        return self.comparison(name) / "shares.csv"

    def compared_vertices(self, name: str) -> Path:
        """Table of shares of variance of every vertex, with intervals."""
        return self.comparison(name) / "vertices.csv"

    def compared_json(self, name: str) -> Path:
        """What was compared, how, and the table as JSON."""
        return self.comparison(name) / "shares.json"

    def compared_picture(self, name: str) -> Path:
        """The table as a picture, where matplotlib is installed."""
        return self.comparison(name) / "shares.png"

    @property
    def submission(self) -> Path:
        """Folder of the last blend: a folder of predictions for each subject, and the files below."""
        return self.root / "submission"

    @property
    def earlier_staging(self) -> Path:
        """Folder in which earlier versions put a blend together, and left what they could not end."""
        return self.root / ".submission"

    @property
    def saved_blend(self) -> Path:
        """Coefficients of the last blend, for use on other predictions."""
        return self.submission / "blend.safetensors"

    @property
    def blend_weights(self) -> Path:
        """Weights of the last blend as JSON, for people."""
        return self.submission / "weights.json"

    @property
    def blend_files(self) -> Path:
        """Checksums of the files of the last blend."""
        return self.submission / "files.json"

    @property
    def blend_picture(self) -> Path:
        """The same weights as a picture, where matplotlib is installed."""
        return self.submission / "weights.png"

    @property
    def blend_scores(self) -> Path:
        """Scores of the last blend by subject, surface and ROI, as a table."""
        return self.submission / "scores.csv"

    @property
    def scores_picture(self) -> Path:
        """The same scores as a picture, where matplotlib is installed."""
        return self.submission / "scores.png"

    @property
    def submission_zip(self) -> Path:
        """The file to hand in: the predictions of every subject of the challenge. The one below by another name."""
        return self.root / "submission.zip"

    @property
    def blend_zip(self) -> Path:
        """The same file where it belongs, with the blend that it is of."""
        return self.submission / self.submission_zip.name


def data_folder(data: Path | None, work: Path) -> Path:
    """The folder of the dataset: the one that is named, or the imported one, or else the challenge's tree."""
    if data is not None:
        return data
    imported = Workdir(work).dataset
    return imported if any(imported.glob("[!.]*")) else CHALLENGE  # an import that failed leaves a lock there
