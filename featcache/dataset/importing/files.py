"""Files that the user names -> material."""

import numpy as np

from featcache.dataset.importing.config import ImportConfig
from featcache.dataset.importing.material import Material
from featcache.dataset.importing.nsd import nsd_material
from featcache.dataset.importing.responses import read_responses, recordings_of
from featcache.dataset.importing.stimuli import TEST_SESSION, Shown, numbered_sessions, read_shown


def read_material(config: ImportConfig) -> Material:
    """What the files of an import hold; responses are mapped, not read.

    Raises DataError or ConfigError for files that cannot be read, or do not belong together.
    """
    if config.nsd is not None:
        return nsd_material(config)
    responses = read_responses(config)
    n_columns = next(iter(responses.rows.values())).shape[1]
    shown = read_shown(config, sum(responses.per_file), responses.n_test, n_columns)
    session, session_names = _sessions(shown, responses.per_file, responses.n_test)
    return Material(
        name=config.subject_name,
        stimuli=shown.stimuli,
        shown=shown.stimulus,
        session=session,
        recordings=recordings_of(config, responses),
        notes=shown.notes,
        test_trials=config.test_trials,
        session_names=session_names,
    )


def _sessions(shown: Shown, per_file: tuple[int, ...], n_test: int) -> tuple[np.ndarray | None, tuple[str, ...]]:
    """Session of each trial, and names of sessions: those of the table, or else the files, where there are several."""
    if shown.sessions is not None:
        return numbered_sessions(shown.sessions, n_test)
    if len(per_file) == 1:
        return None, ()
    numbers = np.repeat(np.arange(len(per_file) + 1), [*per_file, n_test])
    return numbers, (*(f"file {number + 1}" for number in range(len(per_file))), TEST_SESSION)
