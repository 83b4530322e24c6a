"""A work folder -> an encoder's folder with its card, and from there to a model hub."""

from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from featcache import __version__
from featcache.config import BackboneConfig
from featcache.dataset.subject import Subject
from featcache.errors import ConfigError, FeatcacheError, first_line
from featcache.machine.progress import say
from heads.blend.saved import BLEND
from heads.config import ScoresConfig
from heads.encoder.card import Card, Score
from heads.encoder.folder import export_encoder, refuse_full
from heads.encoder.parts import Parts
from heads.encoder.work import models_to_use, parts_of_work
from heads.scores.metrics import ALL_SURFACES
from heads.statistics.run import score_models

_PACKAGES = ("torch", "torchvision", "timm", "numpy")


def export_work(
    subjects: Sequence[Subject],
    work: Path | str,
    folder: Path | str,
    *,
    model: str | None = None,
    network: BackboneConfig | None = None,
    data: str = "",
) -> int:
    """Write the last blend, or one model, to a folder that `load_encoder` reads; the bytes that it takes.

    model : name of a model, or the six digits that end it; None: the last blend, or the only model
    network : what a network is called now, where its file or weights were moved
    data : where images and responses came from, for the card

    Raises StoreError or ConfigError where there is nothing to export, or the folder is not empty.
    """
    work, folder = Path(work), Path(folder)
    refuse_full(folder)
    models, blend, names = models_to_use(subjects, work, model)
    parts, tensors = parts_of_work(models, work, blend, names, network)
    scores, measure = _scores([one for one in subjects if one.name in parts.subjects], parts, work)
    card = Card(
        parts=parts,
        data=data,
        scores=scores,
        measure=measure,
        versions={"featcache": __version__} | {name: version(name) for name in _PACKAGES},
        n_images={subject.name: len(subject.train) for subject in subjects},
    )
    export_encoder(parts, tensors, folder, card)
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())


def _scores(subjects: Sequence[Subject], parts: Parts, work: Path) -> tuple[list[Score], str]:
    """Out-of-fold scores of the blend, or of the models where there is none, by subject and ROI; and their measure."""
    names = [BLEND] if any(part.blend for part in parts.subjects.values()) else []
    names = names or [name for part in parts.subjects.values() for name in part.models]
    digits = ",".join(dict.fromkeys(name.rpartition(" ")[2] for name in names))
    try:
        found = score_models(subjects, ScoresConfig(models=digits, permutations=0), work).estimates
    except ConfigError as error:  # a blend of an earlier version, which cannot be scored out of fold
        say(f"the card has no scores: {error}")
        return [], ""
    measure = "accuracy" if any(one.measure == "accuracy" for one in found) else "r"
    scores = [
        Score(one.subject, one.roi, one.model, one.n_vertices, one.mean, one.low, one.high)
        for one in found
        if one.measure == measure and one.surface == ALL_SURFACES and one.subject != "all"
    ]
    words = {"accuracy": "Noise-normalised accuracy in percent, 100 r^2 / noise ceiling", "r": "Mean Pearson r"}
    return scores, words[measure]


def push(folder: Path, repository: str) -> str:
    """Upload an encoder's folder to a repository of the Hugging Face hub, which is made where it is missing; its URL.

    Raises FeatcacheError for what the hub says against it.
    """
    from huggingface_hub import HfApi

    try:
        api = HfApi()
        url = str(api.create_repo(repository, exist_ok=True))
        api.upload_folder(repo_id=repository, folder_path=folder)
        return url
    except Exception as error:  # the hub's own, and those of whichever library it speaks HTTP with
        raise FeatcacheError(
            "--push-to-hub",
            expected=f"to upload {folder} to {repository}",
            found=first_line(error),
            remedy="log in with 'hf auth login' and upload the folder, which is whole, with 'hf upload'",
        ) from error
