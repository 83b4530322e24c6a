"""The trainings whose checkpoints are in a work folder: how the backbone of a store was trained."""

from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

from featcache.backbone.keys import DESCRIPTION, CheckpointKey, read_description
from featcache.machine.documents import DocumentError
from featcache.workdir import Workdir


class Trainings:
    """Keys of checkpoints by the fingerprint of their training, as stores name it (see `CheckpointKey.training`).

    Only descriptions are read, so this loads no network. A checkpoint that cannot be read counts as one that is gone.
    """

    def __init__(self, work: Path | str) -> None:
        self._keys: dict[str, CheckpointKey] = {}
        for path in sorted(Workdir(Path(work)).checkpoints.glob(f"[!.]*/{DESCRIPTION}")):
            with suppress(OSError, DocumentError):
                key, _ = read_description(path.parent)
                self._keys.setdefault(key.training, key)

    def find(self, training: str | None) -> CheckpointKey | None:
        """Key of one checkpoint of a training, of whichever fold; None where there is none any more."""
        return self._keys.get(training or "")

    def starts_with(self, training: str) -> CheckpointKey | None:
        """Key of the training that this one started from; None where it started from weights as they came."""
        key = self.find(training)
        return None if key is None else self.find(key.start.training)

    def chosen_on(self, training: str) -> bool:
        """Whether the epoch that was kept, here or in the training before, was chosen on the held-out fold.

        True where a checkpoint is gone: this is what training does unless it is told otherwise.
        """
        key = self.find(training)
        if key is None or stops_on_fold(key.settings):
            return True
        return key.start.training is not None and self.chosen_on(key.start.training)


def stops_on_fold(settings: Mapping[str, object]) -> bool:
    """Whether these settings of a training choose its epoch on the held-out fold."""
    return settings.get("stop") != "never"
